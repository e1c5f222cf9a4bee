"""Losses and all gradients over ranks against one process with all rows."""

import collections
import contextlib
import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import fastnce
from fastnce import backends, distributed

DIM, CLASSES = 24, 5
ROWS = {2: [(6, 6), (9, 3)], 3: [(4, 4, 4), (7, 0, 5)], 4: [(3, 3, 3, 3), (1, 6, 2, 3)]}
VARIANTS = {
    "info_nce": {},
    "info_nce, symmetric": {"symmetric": True},
    "info_nce, dot products": {"normalize": False},
    "info_nce, queue": {"in_batch_negatives": True},
    "info_nce, queue alone": {},
    "nt_xent": {},
    "sup_con": {},
    "conditional_contrastive": {},
    "sigmoid_contrastive": {},
    "sigmoid_contrastive, labels": {},
    "sigmoid_contrastive, dot products": {"normalize": False},
    "sigmoid_contrastive, negatives": {"paired": False},
    "sigmoid_contrastive, masks": {},
    "sigmoid_contrastive, labels, masks": {},
}


def draw(variant: str, count: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], list]:
    """The rows of all ranks that get gradients, and the other arguments: per row, or the same everywhere."""
    generator = torch.Generator().manual_seed(count)
    options = {"generator": generator, "dtype": torch.float64}
    x, noise = torch.randn(2, count, DIM, **options)
    labels = torch.randint(CLASSES, (count,), generator=generator) * 1000
    queue = torch.randn(11, DIM, **options)
    rows = [x] if variant == "sup_con" else [x, x + noise]
    if "dot" in variant:
        rows = [0.1 * y for y in rows]
    labelled = variant in ("sup_con", "conditional_contrastive")
    others = [labels] if labelled else [queue.to(dtype)] if "queue" in variant else []
    if "labels" in variant:
        others = [labels, labels.roll(1)]
    return [y.to(dtype) for y in rows], others


def masks_of(variant: str, count: int) -> dict[str, torch.Tensor]:
    """Arguments by name, per row."""
    if "masks" not in variant:
        return {}
    ids = torch.arange(count) % 3
    return {"query_ids": ids, "key_ids": ids.flip(0), "key_mask": torch.arange(count) % 5 != 1}


def numbers(variant: str, temperature: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The arguments of one element, which get gradients."""
    found = {"temperature": temperature}
    if variant.startswith("sigmoid"):
        found = {"scale": 1 / temperature, "bias": -1.5}
    return {
        name: torch.tensor(x, dtype=torch.float64).to(dtype).requires_grad_()
        for name, x in found.items()
    }


def their_gradients(given: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([x.grad for x in given.values()])


def one_process(variant, rows, others, temperature, reduction="mean"):
    """Loss and gradients of the plain op on the rows of all ranks."""
    leaves = [y.clone().requires_grad_() for y in rows]
    taus = numbers(variant, temperature, rows[0].dtype)
    options = {**taus, "reduction": reduction, **masks_of(variant, len(rows[0]))}
    op = getattr(fastnce, variant.split(",")[0])
    loss = op(*leaves, *others, **VARIANTS[variant], **options)
    loss.sum().backward()
    return loss.detach(), [y.grad for y in leaves], their_gradients(taus)


def over_ranks(group, variant, counts, temperature, dtype, options):
    """This rank's loss, its rows' gradients, and the temperature's."""
    rank = dist.get_rank(group)
    rows, others = draw(variant, sum(counts), dtype)
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    leaves = [y[own].clone().requires_grad_() for y in rows]
    others = [y if "queue" in variant else y[own] for y in others]
    taus = numbers(variant, temperature, dtype)
    masks = {name: y[own] for name, y in masks_of(variant, sum(counts)).items()}
    op = getattr(distributed, variant.split(",")[0])
    loss = op(*leaves, *others, **taus, **masks, group=group, **VARIANTS[variant], **options)
    loss.sum().backward()
    return loss.detach(), [y.grad for y in leaves], their_gradients(taus)


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative, in the l2 norm of the whole tensor."""
    return ((found.double() - truth).norm() / truth.norm()).item()


def joined(answers):
    """What one process would have: the loss of rank 0, all rows' gradients as DDP would average them, the temperature's mean."""
    losses, grads, taus = zip(*answers, strict=True)
    grads = [torch.cat(parts) / len(answers) for parts in zip(*grads, strict=True)]
    return losses[0], grads, torch.stack(taus).mean(dim=0)


@pytest.mark.parametrize("strategy", ["ring", "gather"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_one_process(variant, size, strategy, workers):
    """1e-6 relative in fp32; where the temperature magnifies rounding, twice what one process is off by.

    Also of plain PyTorch, which runs where there are no fused kernels, such as on a GPU.
    """
    even, uneven = ROWS[size]
    f32, f64, (even, uneven) = torch.float32, torch.float64, ROWS[size]
    cases = [(even, 0.5, None), (uneven, 0.07, None), (uneven, 0.01, None)]
    cases = [(*case, dtype) for case in cases for dtype in (f64, f32)]
    for counts, temperature, backend, dtype in (*cases, (uneven, 0.07, "torch", f64)):
        options = {"strategy": strategy, "backend": backend}
        call = (variant, counts, temperature, dtype, options)
        answers = workers.results(over_ranks, *call, ranks=size)
        losses = [loss for loss, *_ in answers]
        assert all(torch.equal(loss, losses[0]) for loss in losses)
        assert losses[0].dtype == dtype
        rows, others = draw(variant, sum(counts), dtype)
        wide = [y.double() if y.is_floating_point() else y for y in others]
        truth = one_process(variant, [y.double() for y in rows], wide, temperature)
        plain = one_process(variant, rows, others, temperature)
        for found, single, true in zip(*map(flat, (joined(answers), plain, truth)), strict=True):
            bound = 1e-12 if dtype == f64 else max(1e-6, 2 * error(single, true))
            assert error(found, true) < bound, (counts, temperature, dtype, backend)


def flat(result):
    loss, grads, tau = result
    return [loss, *grads, tau]


@pytest.mark.parametrize(
    "variant",
    ["info_nce", "nt_xent", "sup_con", "conditional_contrastive", "sigmoid_contrastive, labels"],
)
def test_reductions_and_gradient_scales(variant, workers):
    counts, size = (4, 2, 3), 3
    rows, others = draw(variant, sum(counts), torch.float64)
    for reduction in ("sum", "none", "mean"):
        truth = one_process(variant, rows, others, 0.2, reduction)
        for scale in ("mean", "sum"):
            options = {"reduction": reduction, "gradient_scale": scale}
            answers = workers.results(
                over_ranks, variant, counts, 0.2, torch.float64, options, ranks=size
            )
            loss, grads, tau = joined(answers)
            if scale == "sum" or reduction == "none":
                grads, tau = [size * grad for grad in grads], size * tau
            if reduction == "none":
                loss = by_view([loss for loss, *_ in answers], variant)
            for found, true in zip([loss, *grads, tau], flat(truth), strict=True):
                torch.testing.assert_close(found, true)


def by_view(losses, variant):
    """The losses in the order of one process, where all first views come first."""
    if variant != "nt_xent":
        return torch.cat(losses)
    halves = [loss.chunk(2) for loss in losses]
    return torch.cat([half[view] for view in (0, 1) for half in halves])


def test_published_scale_is_one_over_the_number_of_ranks(workers):
    """StudioGAN's gather gives each rank its own rows' gradient alone, and DDP then divides by the number of ranks.

    So it does with unreduced losses, of which the mean of one's own, averaged over ranks, has the gradients of one process.
    """
    op, options = "conditional_contrastive", {"gradient_scale": "published"}

    def gradients(counts: tuple[int, ...], options: dict) -> list[torch.Tensor]:
        call = (op, counts, 1.0, torch.float64, options)
        return joined(workers.results(over_ranks, *call, ranks=len(counts)))[1]

    def truth(count: int) -> list[torch.Tensor]:
        return one_process(op, *draw(op, count, torch.float64), 1.0)[1]

    for found, true in zip(gradients((4, 5, 3), options), truth(12), strict=True):
        torch.testing.assert_close(found, true / 3)
    for scale, share in (("mean", 1), ("sum", 1), ("published", 2)):
        found = gradients((4, 4), {"reduction": "none", "gradient_scale": scale})
        for x, true in zip(found, truth(8), strict=True):
            # The worker sums its 4 losses; their mean is a quarter.
            torch.testing.assert_close(x / 4, true / share)
    call = ("info_nce", (4, 5, 3), 1.0, torch.float64, options)
    for answer in workers.run(over_ranks, *call, ranks=3):
        assert "gradient_scale" in str(answer) and "published" in str(answer)


def half_precision(group, strategy):
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8 * size, DIM, generator=generator).bfloat16()
    truth = x.double().requires_grad_()
    fastnce.info_nce(*truth, temperature=0.2).backward()
    own = x[:, 8 * rank : 8 * rank + 8].clone().requires_grad_()
    loss = distributed.info_nce(*own, temperature=0.2, group=group, strategy=strategy)
    loss.backward()
    assert loss.dtype == torch.float32 and own.grad.dtype == torch.bfloat16
    return error(own.grad / size, truth.grad[:, 8 * rank : 8 * rank + 8])


def test_half_precision_rounds_the_gradients_once(workers):
    for strategy in ("ring", "gather"):
        assert max(workers.results(half_precision, strategy)) < 2**-8


def keys_without_gradient(group):
    own = slice(3 * dist.get_rank(group), 3 * dist.get_rank(group) + 3)
    query, key = (rows[own] for rows in draw("info_nce", 12, torch.float64)[0])
    query.requires_grad_()
    distributed.info_nce(query, key, group=group).backward()
    return query.grad


def test_keys_without_gradient(workers):
    query, key = draw("info_nce", 12, torch.float64)[0]
    query.requires_grad_()
    fastnce.info_nce(query, key).backward()
    found = torch.cat(workers.results(keys_without_gradient)) / 4
    torch.testing.assert_close(found, query.grad)


def second_derivatives(group):
    """What each loss answers where a penalty on its gradient is differentiated, for the input by name."""
    answers = {}
    for variant, strategy, reduction, backend in itertools.product(
        VARIANTS, ["ring", "gather"], ["mean", "none"], ["torch", None]
    ):
        rows, others = draw(variant, 6, torch.float32)
        start = rows[0].clone().requires_grad_()
        options = {"strategy": strategy, "reduction": reduction, "backend": backend}
        op = getattr(distributed, variant.split(",")[0])
        if variant.startswith("sigmoid"):
            options["scale"] = 5.0
        loss = op(
            start.sin(), *rows[1:], *others, **VARIANTS[variant], **options, group=group
        ).sum()
        (grad,) = torch.autograd.grad(loss, start, create_graph=True)
        try:
            torch.autograd.grad(loss + grad.square().sum(), start)
            answers[variant, strategy, reduction, backend] = "no error"
        except RuntimeError as error:
            answers[variant, strategy, reduction, backend] = str(error)
    return answers


def test_a_second_derivative_is_an_error(workers):
    for answers in workers.results(second_derivatives, ranks=2):
        silent = {case for case, answer in answers.items() if "second derivative" not in answer}
        assert not silent


def test_alone_it_is_the_plain_op():
    """Without a process group; also what the examples of the docstrings run."""
    for variant in ("info_nce", "nt_xent", "sup_con", "conditional_contrastive"):
        rows, others = draw(variant, 6, torch.float32)
        plain = getattr(fastnce, variant)(*rows, *others)
        assert torch.equal(plain, getattr(distributed, variant)(*rows, *others))
    x, labels = torch.randn(6, 4), torch.arange(6) % 2
    for arguments, options in (((x, labels), {"positives": "each"}), ((x, labels, x, labels), {})):
        plain = fastnce.sup_con(*arguments, **options)
        assert torch.equal(plain, distributed.sup_con(*arguments, **options))
    plain = fastnce.nt_xent(x, x.flip(0), decoupled=True)
    assert torch.equal(plain, distributed.nt_xent(x, x.flip(0), decoupled=True))
    rows, others = draw("sigmoid_contrastive", 6, torch.float32)
    plain = fastnce.sigmoid_contrastive(*rows, scale=5.0)
    assert torch.equal(plain, distributed.sigmoid_contrastive(*rows, scale=5.0))


def operators_called(group, op, strategy):
    """How often each operator runs in a step."""
    query, key = (x[:4].requires_grad_() for x in draw("info_nce", 4, torch.float64)[0])
    kernels = backends.select("labelled_lse", query, None, (query,))
    counts = collections.Counter()

    def counted(name):
        function = getattr(kernels, name)

        def call(*arguments, **options):
            counts[name] += 1
            return function(*arguments, **options)

        return mock.patch.object(kernels, name, call)

    options = {"symmetric": True} if op == "info_nce" else {"scale": 10.0}
    ops = ("info_nce", "labelled_lse", op)
    with contextlib.ExitStack() as stack:
        for name in {f"{x}_{way}" for x in ops for way in ("forward", "backward")}:
            stack.enter_context(counted(name))
        getattr(distributed, op)(query, key, group=group, strategy=strategy, **options).backward()
    return counts


@pytest.mark.parametrize("strategy", ["ring", "gather"])
def test_no_product_is_made_twice(strategy, workers):
    """Symmetric: a square of others gives both sides' sums at once, and one more operator each side's gradients."""
    blocks = 3 if strategy == "ring" else 2
    found = {"info_nce_forward": 2, "labelled_lse_forward": 2, "labelled_lse_backward": 2 * blocks}
    for counts in workers.results(operators_called, "info_nce", strategy, ranks=3):
        assert counts == found
    for counts in workers.results(operators_called, "sigmoid_contrastive", strategy, ranks=3):
        assert counts == {"sigmoid_contrastive_forward": blocks}
