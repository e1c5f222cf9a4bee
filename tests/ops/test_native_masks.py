"""Pairs that are left out on the compiled CPU kernels: in every way that they cut their matrices, and where nothing is left."""

import functools

import pytest
import torch
from forms import among_nans, assert_same, gaussian, mapped

import fastnce
from fastnce.backends import native
from fastnce.testing import Sample, assert_close_to_truth, run

pytestmark = pytest.mark.skipif(native.available() != "ok", reason=native.available())

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def integers(high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def some(*shape: int) -> torch.Tensor:
    """Bools, of which four in five are True."""
    return integers(5, *shape, seed=9) > 0


def labels(count: int) -> dict[str, object]:
    """Some ids that many queries have, one of them every number of an int64, others that one has alone."""
    ids = integers(count, count) - 2**62
    return {"query_ids": torch.where(some(count), ids, integers(7, count))}


def in_batch(count: int, **options: object) -> dict[str, object]:
    return {"rows": (count, 24), **labels(count), **options}


def queue(count: int, others: int, **options: object) -> dict[str, object]:
    ids = {"query_ids": integers(50, count), "negative_ids": integers(60, others, seed=1)}
    return {"rows": (count, 24), "negatives": (others, 24), **ids, **options}


def own(count: int, others: int, **options: object) -> dict[str, object]:
    ids = {"query_ids": integers(9, count), "negative_ids": integers(10, count, others, seed=1)}
    return {"rows": (count, 24), "negatives": (count, others, 24), **ids, **options}


def guided(count: int, others: int | None = None) -> dict[str, object]:
    shapes = [(count, 31)] * 2 + ([] if others is None else [(others, 31)])
    rows = [gaussian(*shape, seed=20 + i) for i, shape in enumerate(shapes)]
    return {"guide": [rows[0], 0.6 * rows[0] + rows[1], *rows[2:]], "guide_margin": 0.35}


EMPTY = {"query_ids": torch.zeros(70, dtype=torch.int64)}
ALL_BUT_ONE = {"key_mask": torch.arange(300) == 7}

# Blocks have 144 keys and 96 rows; panels 768 rows; a problem of up to 256 rows packs the keys of a queue on the way.
FORMS: dict[str, dict[str, object]] = {
    "one": {"rows": (1, 5), "query_ids": torch.zeros(1, dtype=torch.int64)},
    "blocks": in_batch(145),
    "panels": in_batch(850, key_ids=integers(40, 850, seed=2), key_mask=some(850)),
    "mask": {"rows": (300, 24), "key_mask": some(300)},
    "all_but_one": {"rows": (300, 24), **ALL_BUT_ONE},
    "all_but_one_cold": {"rows": (300, 24), **ALL_BUT_ONE, "tau": 0.004},
    "symmetric": in_batch(300, symmetric=True, key_ids=integers(30, 300), key_mask=some(300)),
    "symmetric_panels": in_batch(800, symmetric=True, key_mask=some(800)),
    "symmetric_cold": in_batch(300, symmetric=True, tau=0.004, key_mask=some(300)),
    "symmetric_all_but_one": {"rows": (300, 24), **ALL_BUT_ONE, "symmetric": True},
    "symmetric_all_but_one_cold": {
        "rows": (300, 24),
        **ALL_BUT_ONE,
        "symmetric": True,
        "tau": 0.01,
    },
    "batch": {"rows": (3, 70, 24), "query_ids": integers(9, 3, 70), "key_mask": some(3, 70)},
    "many": {"rows": (65, 9, 24), "query_ids": integers(4, 65, 9), "symmetric": True},
    "dot": in_batch(160, normalize=False, tau=5.0),
    "dot_cold": in_batch(160, normalize=False, tau=0.02),
    "cold": in_batch(200, tau=0.004),
    "queue": queue(200, 1700),
    "queue_packed": queue(300, 900, negative_mask=some(900), tau=0.3),
    "queue_masked": {"rows": (50, 24), "negatives": (400, 24), "negative_mask": some(400)},
    "queue_in_batch": queue(150, 333, in_batch_negatives=True),
    "queue_in_batch_cold": queue(150, 333, in_batch_negatives=True, tau=0.004),
    "batch_and_queue": {
        "rows": (3, 70, 24),
        "negatives": (150, 24),
        "in_batch_negatives": True,
        "query_ids": integers(9, 3, 70),
        "negative_ids": integers(9, 150),
    },
    "own": own(30, 90, negative_mask=some(30, 90)),
    "own_in_batch": own(30, 70, in_batch_negatives=True),
    "own_beside_nothing": own(70, 20, in_batch_negatives=True) | EMPTY,
    "own_in_batch_cold": own(30, 70, in_batch_negatives=True, tau=0.004),
    "guide": {"rows": (300, 24), **guided(300), **labels(300)},
    "guide_queue": queue(100, 500, **guided(100, 500)),
    "guide_queue_in_batch": queue(100, 500, in_batch_negatives=True, **guided(100, 500)),
    "nothing": {"rows": (70, 24), **EMPTY},
    "nothing_cold": {"rows": (70, 24), **EMPTY, "tau": 0.004},
    "nothing_symmetric": {"rows": (70, 24), **EMPTY, "symmetric": True},
}
each_form = pytest.mark.parametrize("name", FORMS)


@functools.lru_cache(maxsize=4)
def sample(name: str, dtype: torch.dtype, **more: object) -> Sample:
    options = dict(FORMS[name])
    shape, others, tau = (
        options.pop("rows"),
        options.pop("negatives", None),
        options.pop("tau", 0.07),
    )
    query, key = gaussian(*shape), gaussian(*shape, seed=1)
    rows = {"query": query, "positive_key": query + 2 * key}
    if others is not None:
        rows["negative_keys"] = gaussian(*others, seed=2)
    # A third of the cases each: the temperature's dtype is that of the sums.
    temperature = torch.tensor(tau, dtype=torch.promote_types(dtype, torch.float32))
    arguments = {key: x.to(dtype).requires_grad_() for key, x in rows.items()}
    arguments |= {"temperature": temperature.requires_grad_(), **options, **more}
    if "guide" in arguments:
        arguments["guide"] = [x.to(dtype) for x in options["guide"]]
    return Sample(f"{name} {list(more)}", arguments)


def variants(name: str) -> list[dict[str, object]]:
    """How the loss is asked for: gradients from the forward and from the backward, each with and without what else there is."""
    shape = FORMS[name]["rows"][:-1]
    weights = gaussian(*shape, seed=3).abs()
    return [
        {"reduction": "sum"},
        {"reduction": "none", "decoupled": True},
        {"reduction": "mean", "decoupled": True, "weights": weights},
        {"reduction": "none", "weights": weights},
    ]


@each_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_add_up(name, dtype):
    # In double, which runs the same code, gradients from the forward and from the backward once each.
    for options in variants(name)[:2] if dtype == torch.float64 else variants(name):
        if "weights" in options:
            options["weights"] = options["weights"].to(torch.promote_types(dtype, torch.float32))
        assert_close_to_truth("info_nce", "native", sample(name, dtype, **options), dtype)


@each_form
def test_ranks_are_those_of_the_matrix(name):
    for dtype in (torch.float64, torch.float32):
        call = sample(name, dtype, reduction="sum", return_rank=True).arguments
        loss, rank = fastnce.info_nce(**call, backend="native")
        wide = {
            key: [x.double() for x in value] if key == "guide" else value
            for key, value in call.items()
        }
        for key, value in wide.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                wide[key] = value.detach().double()
        assert torch.equal(rank, fastnce.info_nce(**wide, backend="torch")[1]), dtype
        # They take nothing from the rest.
        del call["return_rank"]
        assert torch.equal(loss, fastnce.info_nce(**call, backend="native")), dtype


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_duplicate_is_above_its_original(dtype, precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    queries, key = gaussian(130, 37).to(dtype), gaussian(1, 37, seed=1).to(dtype)
    keys = key.expand(130, 37)
    try:
        for options in (
            {},
            {"normalize": False},
            {"negative_keys": key.expand(400, 37)},
            {"negative_keys": keys[:, None].expand(130, 3, 37)},
            {"negative_keys": key.expand(400, 37), "in_batch_negatives": True},
            {"symmetric": True},
        ):
            of = queries[:1].expand(130, 37) if "symmetric" in options else queries
            options |= {"temperature": 0.013, "return_rank": True, "backend": "native"}
            assert fastnce.info_nce(of, keys, **options)[1].eq(0).all(), options
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "name", ["nothing", "nothing_cold", "nothing_symmetric", "own_beside_nothing"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_where_nothing_is_left(name, dtype):
    """Neither loss nor gradient; with the positive in the sum the loss is exactly 0."""
    if name == "own_beside_nothing":
        call = sample(name, dtype).arguments | {"negative_mask": torch.zeros(70, 20).bool()}
    else:
        call = dict(sample(name, dtype).arguments)
    leaves = [x for x in call.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    for reduction in ("sum", "none"):
        for decoupled in (False, True):
            options = {"reduction": reduction, "decoupled": decoupled, "backend": "native"}
            loss = fastnce.info_nce(**call, **options)
            grads = torch.autograd.grad(loss.sum(), leaves)
            assert loss.abs().max() == 0
            # Symmetric, the backward knows the positive's softmax from its logit and the log-sum-exp.
            exact = decoupled or reduction == "sum" or "symmetric" not in name
            rounding = len(call["query"]) * torch.finfo(dtype).eps / call["temperature"].item() ** 2
            tolerance = 0 if exact else rounding
            assert all(x.abs().max() <= tolerance for x in grads), (reduction, decoupled)


def test_operators_say_where_nothing_is_left():
    query, key = (gaussian(2, 40, 9, seed=i) for i in range(2))
    ones = query.new_ones(2, 40)
    ids = torch.zeros(2, 40, dtype=torch.int64)
    ids[0, 3] = 1  # among 40 of which one has an id of its own, in the first batch element alone
    masks = (ids, ids, None, None, None, None)
    options = {"normalize": True, "in_batch": True, "decoupled": True}
    options["needs"] = (True, True, False, True)
    for symmetric in (False, True):
        options["symmetric"] = symmetric
        inputs = (query, key, None, *masks)
        loss, lse, rank, grads = native.masked_info_nce_forward(
            *inputs, ones, 0.07, **options, rank=False
        )
        assert rank.shape == (0,) and rank.dtype == torch.int64
        assert lse.shape == ((2, 2, 40) if symmetric else (2, 40))
        assert loss[0].isfinite().all() and loss[1].eq(-torch.inf).all()
        assert lse[..., 1, :].eq(-torch.inf).all() and lse[..., 0, :].isfinite().all()
        assert all(x is None or x.isfinite().all() for x in grads)
        assert all(x[1].eq(0).all() and x[0].ne(0).any(1).all() for x in grads[:2])
        again = native.masked_info_nce_backward(ones, *inputs, 0.07, lse, **options)
        torch.testing.assert_close(again, grads)
        nothing = native.masked_info_nce_forward(*inputs, None, 0.07, **options, rank=True)
        assert nothing[-1] == (None,) * 4 and torch.equal(nothing[0], loss)


EVERY_WAY = [
    "panels",
    "symmetric_panels",
    "symmetric_cold",
    "queue",
    "own_in_batch",
    "guide",
    "many",
]


@pytest.mark.parametrize("name", EVERY_WAY)
def test_neither_threads_nor_neighbours_change_a_bit(name, threads):
    for dtype in (torch.float32, torch.bfloat16):
        for reduction in ("none", "sum"):
            call = sample(name, dtype, reduction=reduction)
            ranks = Sample(name, call.arguments | {"return_rank": True})

            def results(call: Sample = call, ranks: Sample = ranks) -> dict[str, torch.Tensor]:
                rank = fastnce.info_nce(**ranks.arguments, backend="native")[1]
                return run("info_nce", call, backend="native") | {"rank": rank}

            threads(1)
            expected = results()
            for count in (2, 3):
                threads(count)
                assert_same(results(), expected, f"{count} threads")
            poisoned = mapped(
                call, "", lambda x: x if x.dtype == torch.int64 and x.dim() > 1 else among_nans(x)
            )
            assert_same(
                run("info_nce", poisoned, backend="native") | {"rank": expected["rank"]}, expected
            )


def test_every_instruction_set(instruction_sets):
    for _ in instruction_sets():
        for name in ("blocks", "symmetric", "queue_in_batch", "guide", "nothing_symmetric"):
            for dtype in (torch.float64, torch.float32):
                call = sample(name, dtype, reduction="none", decoupled=True)
                assert_close_to_truth("info_nce", "native", call, dtype)
            test_ranks_are_those_of_the_matrix(name)


@pytest.mark.parametrize("name", ["queue_masked", "queue_packed", "own"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_reaches_nothing(name, dtype):
    """Where keys are packed on the way, and before; of bfloat16 as pairs, of which one may be padding."""
    call = sample(name, dtype, reduction="sum")
    padding = ~call.arguments["negative_mask"].unsqueeze(-1)
    found = []
    for value in (0.0, torch.nan):
        keys = call.arguments["negative_keys"].detach().masked_fill(padding, value)
        arguments = call.arguments | {"negative_keys": keys.requires_grad_()}
        found.append(run("info_nce", Sample(str(value), arguments), backend="native"))
    assert all(x.isfinite().all() for x in found[1].values())
    assert_same(*found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["pairs", "labels", "negatives"])
def test_pairs_of_the_sigmoid_loss(form, dtype, threads):
    """Several panels of queries and runs of keys; the rows of keys that do not count may be NaN."""
    count, others = (800, 1100)
    options = {"query_ids": integers(30, count), "key_ids": integers(40, others, seed=1)}
    options |= {"key_mask": some(others), "reduction": "none"}
    if form == "labels":
        labels = {
            "query_labels": integers(300, count, seed=2),
            "key_labels": integers(300, others, seed=3),
        }
        options |= labels
    elif form == "negatives":
        options["paired"] = False
    rows = {"query": gaussian(count, 24), "key": gaussian(others, 24, seed=1)}
    rows = {name: x.to(dtype).requires_grad_() for name, x in rows.items()}
    scale = torch.tensor(5.0, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    call = Sample(form, {**rows, **options, "scale": scale, "bias": -2.0})
    assert_close_to_truth("sigmoid_contrastive", "native", call, dtype)
    padding = ~options["key_mask"].unsqueeze(-1)
    poisoned = rows["key"].detach().masked_fill(padding, torch.nan).requires_grad_()
    expected = run("sigmoid_contrastive", call, backend="native")
    threads(2)
    found = Sample(form, call.arguments | {"key": poisoned})
    assert_same(run("sigmoid_contrastive", found, backend="native"), expected)
