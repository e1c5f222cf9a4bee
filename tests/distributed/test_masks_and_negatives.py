"""InfoNCE over ranks with negatives of all ranks, ids, masks, weights and ranks, against one process with all rows."""

import itertools

import pytest
import torch
import torch.distributed as dist

import fastnce
from fastnce import distributed

DIM = 8
# Queries and negatives of each rank.
SHAPES = {2: ((5, 3), (2, 7)), 3: ((4, 0, 5), (3, 6, 0))}
# Which of the arguments that are drawn are given, and options.
CASES = {
    "negatives of all": ("negatives", {"negatives_of": "all", "in_batch_negatives": True}),
    "negatives of all alone": ("negatives", {"negatives_of": "all"}),
    "weights": ("negatives weights", {"negatives_of": "all", "in_batch_negatives": True}),
    "ids": ("query_ids", {}),
    "ids of both": ("query_ids key_ids key_mask", {"return_rank": True}),
    "symmetric": ("query_ids key_ids key_mask", {"symmetric": True, "return_rank": True}),
    "symmetric mask": ("key_mask weights", {"symmetric": True}),
    "symmetric, decoupled": ("query_ids weights", {"symmetric": True, "decoupled": True}),
    "symmetric, decoupled mask": ("key_mask", {"symmetric": True, "decoupled": True}),
    "decoupled": ("query_ids", {"decoupled": True, "return_rank": True}),
    "decoupled, dot products": (
        "negatives",
        {"negatives_of": "all", "decoupled": True, "normalize": False},
    ),
    "negative ids": (
        "negatives query_ids negative_ids negative_mask",
        {"negatives_of": "all", "return_rank": True},
    ),
    "one mask": (
        "negatives query_ids negative_mask",
        {"negatives_of": "all", "in_batch_negatives": True},
    ),
    "all together": (
        "negatives query_ids key_ids negative_ids key_mask negative_mask weights",
        {
            "negatives_of": "all",
            "in_batch_negatives": True,
            "decoupled": True,
            "return_rank": True,
        },
    ),
    "guide": (
        "negatives guide query_ids",
        {"negatives_of": "all", "in_batch_negatives": True, "guide_margin": 0.1},
    ),
    "own": ("negatives", {"in_batch_negatives": True}),
    "own alone": ("negatives", {}),
    "own, masks": (
        "negatives query_ids negative_ids key_mask",
        {"in_batch_negatives": True, "return_rank": True},
    ),
    "each query's own": ("each_own negative_mask query_ids", {"in_batch_negatives": True}),
}


def draw(case: str, counts: tuple[int, ...], negatives: tuple[int, ...]) -> tuple[dict, dict]:
    """The arguments that ``case`` needs with the rows of all ranks; and by name, how many of them each rank has."""
    generator = torch.Generator().manual_seed(1)
    count, more = sum(counts), sum(negatives)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def integers(size: int) -> torch.Tensor:
        return torch.randint(4, (size,), generator=generator)

    query = normal(count, DIM)
    drawn = {"query": query, "positive_key": query + normal(count, DIM)}
    each_own = "each_own" in CASES[case][0]
    drawn["negative_keys"] = normal(count, 3, DIM) if each_own else normal(more, DIM)
    # Those of the first rank are all the same: within its own block nothing is left.
    drawn["query_ids"] = torch.where(torch.arange(count) < counts[0], 1, integers(count))
    drawn["key_ids"], drawn["negative_ids"] = integers(count), integers(more)
    drawn["key_mask"] = integers(count) > 0
    drawn["negative_mask"] = normal(*drawn["negative_keys"].shape[:-1]) > -0.5
    drawn["weights"] = normal(count).exp() * 0.1
    drawn["guide"] = [normal(count, 5), normal(count, 5), normal(more, 5)]
    given = (
        CASES[case][0].replace("negatives", "negative_keys").replace("each_own", "negative_keys")
    )
    given = ["query", "positive_key", *given.split()]
    of_negatives = {"negative_keys", "negative_ids", "negative_mask"}
    sizes = {name: negatives if name in of_negatives and not each_own else counts for name in given}
    return {name: drawn[name] for name in given}, sizes


def part(x: torch.Tensor, sizes: tuple[int, ...], rank: int) -> torch.Tensor:
    return x.split(sizes)[rank].clone()


def differentiated(function, given: dict, options: dict) -> tuple:
    """Loss, gradients of the rows and the temperature, and ranks."""
    leaves = {
        name: x.requires_grad_() if name in ("query", "positive_key", "negative_keys") else x
        for name, x in given.items()
    }
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    found = function(**leaves, temperature=tau, **options)
    loss, ranks = found if options.get("return_rank") else (found, None)
    loss.sum().backward()
    grads = {name: x.grad for name, x in leaves.items() if getattr(x, "requires_grad", False)}
    return loss.detach(), grads, tau.grad, ranks


def of_dtype(given: dict, dtype: torch.dtype) -> dict:
    """With rows of this type."""
    return {
        name: x.to(dtype) if name in ("query", "positive_key", "negative_keys") else x
        for name, x in given.items()
    }


def on_a_rank(group, case, counts, negatives, options, dtype=torch.float64):
    rank = dist.get_rank(group)
    given, sizes = draw(case, counts, negatives)
    given = of_dtype(given, dtype)
    own = {
        name: [part(y, z, rank) for y, z in zip(x, (counts, counts, negatives), strict=True)]
        if name == "guide"
        else part(x, sizes[name], rank)
        for name, x in given.items()
    }
    return differentiated(distributed.info_nce, own, {**CASES[case][1], **options, "group": group})


def one_process(case, counts, negatives, reduction, dtype=torch.float64):
    """The plain op; of negatives of one rank's queries alone, each query's own, with a mask."""
    given = of_dtype(draw(case, counts, negatives)[0], dtype)
    options = {k: v for k, v in CASES[case][1].items() if k != "negatives_of"}
    function = fastnce.info_nce
    if case.startswith("own"):
        owner = [
            torch.arange(len(x)).repeat_interleave(torch.tensor(x)) for x in (counts, negatives)
        ]
        mask = owner[0][:, None] == owner[1]

        def function(query, negative_keys, negative_ids=None, **others):
            each = negative_keys.expand(len(query), -1, -1)
            ids = None if negative_ids is None else negative_ids.expand(len(query), -1)
            return fastnce.info_nce(
                query, negative_keys=each, negative_ids=ids, negative_mask=mask, **others
            )

    options |= {"reduction": reduction, "backend": "torch"}
    return differentiated(function, given, options)


@pytest.mark.parametrize("strategy", ["ring", "gather"])
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_equal_to_one_process(case, size, strategy, workers):
    shapes = SHAPES[size]
    for reduction, backend in (("mean", "torch"), ("mean", None), ("none", None)):
        options = {"strategy": strategy, "reduction": reduction, "backend": backend}
        answers = workers.results(on_a_rank, case, *shapes, options, ranks=size)
        losses, grads, taus, ranks = zip(*answers, strict=True)
        loss, true_grads, tau, true_ranks = one_process(case, *shapes, reduction)
        found = torch.cat(losses) if reduction == "none" else losses[-1]
        scale = 1 if reduction == "none" else size
        torch.testing.assert_close(found, loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sum(taus) / scale, tau, rtol=1e-11, atol=1e-12)
        for name, true in true_grads.items():
            joined = torch.cat([x[name] for x in grads]) / scale
            torch.testing.assert_close(joined, true, rtol=1e-11, atol=1e-12, msg=name)
        if true_ranks is not None:
            assert torch.equal(torch.cat(ranks, dim=-1), true_ranks)


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative, in the l2 norm of the whole tensor."""
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("strategy", ["ring", "gather"])
@pytest.mark.parametrize("case", ["negatives of all", "all together"])
def test_single_precision(case, strategy, workers):
    """1e-6, or twice what one process is off by."""
    dtype, options = torch.float32, {"strategy": strategy}
    answers = workers.results(on_a_rank, case, *SHAPES[3], options, dtype, ranks=3)
    losses, grads, *_ = zip(*answers, strict=True)
    loss, true_grads, *_ = one_process(case, *SHAPES[3], "mean")
    plain_loss, plain_grads, *_ = one_process(case, *SHAPES[3], "mean", dtype)
    assert losses[0].dtype == torch.float32
    assert error(losses[0], loss) < max(1e-6, 2 * error(plain_loss, loss))
    for name, true in true_grads.items():
        joined = torch.cat([x[name] for x in grads]) / 3
        assert joined.dtype == torch.float32
        assert error(joined, true) < max(1e-6, 2 * error(plain_grads[name], true)), name


def nothing_left(group, options):
    x = torch.randn(3, 3, 4, requires_grad=True)
    ids = torch.full((3,), 7)
    options = {"query_ids": ids, "in_batch_negatives": True, **options}
    if not options.get("symmetric"):
        options |= {"negative_keys": x[2], "negative_ids": ids, "negatives_of": "all"}
    loss, rank = distributed.info_nce(x[0], x[1], **options, return_rank=True, group=group)
    loss.sum().backward()
    return loss.detach(), rank, x.grad


@pytest.mark.parametrize("strategy", ["ring", "gather"])
@pytest.mark.parametrize(
    "options", [{}, {"decoupled": True}, {"symmetric": True, "decoupled": True}]
)
def test_queries_without_negatives_have_loss_and_gradient_0(options, strategy, workers):
    for reduction, backend in itertools.product(("mean", "none"), ("torch", None)):
        given = {**options, "strategy": strategy, "reduction": reduction, "backend": backend}
        for loss, rank, grad in workers.results(nothing_left, given, ranks=2):
            assert not loss.any() and not rank.any() and not grad.any()


def misused(group, case):
    rank, x = dist.get_rank(group), torch.randn(3, 4)
    ids, options = torch.arange(3), {"group": group}
    if case == "ids on one rank":
        options["query_ids"] = ids if rank == 1 else None
    if case == "weights on one rank":
        options["weights"] = torch.ones(3) if rank == 1 else None
    if case == "negatives of another D":
        options |= {"negative_keys": torch.randn(2, 5 if rank == 1 else 4), "negatives_of": "all"}
    if case == "no negatives":
        options |= {"negative_keys": None if rank == 1 else x, "negatives_of": "all"}
        options["in_batch_negatives"] = True
    if case == "negatives of whom":
        options |= {"negative_keys": x, "negatives_of": "all" if rank == 1 else "own"}
    if case == "gradients":
        options["negative_keys"] = torch.randn(3, 4, requires_grad=rank == 1)
    if case == "guides":
        options["guide"] = (torch.randn(3, 2 + rank), torch.randn(3, 2 + rank))
    return distributed.info_nce(x, x, **options)


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("ids on one rank", "the masks and weights given: rank 0 has none, rank 1 has query_ids", None),
        ("weights on one rank", "given: rank 0 has none, rank 1 has weights", None),
        ("negatives of another D", "rank 1 ", "negative_keys must have the shape (2, 4)"),
        ("no negatives", "rank 1 ", "negatives_of='all' needs negative_keys of shape (M, D)"),
        ("negatives of whom", "negatives_of: rank 0 has own, rank 1 has all", None),
        ("gradients", "whether negative_keys need a gradient: rank 0 has 0, rank 1 has 1", None),
        ("guides", "the guide's D: rank 0 has 2, rank 1 has 3", None),
    ],
)  # fmt: skip
def test_misuse_is_one_line_on_every_rank(case, first, second, workers):
    for answer, message in zip(
        workers.run(misused, case, ranks=2), (first, second or first), strict=True
    ):
        assert isinstance(answer, (ValueError, RuntimeError)) and message in str(answer)
        assert "\n" not in str(answer)
