"""InfoNCE's masks, weights, decoupled form and ranks: against the equation, typed once more query by query; and what follows from it."""

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from forms import DTYPES, gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastnce import backends, info_nce
from fastnce.losses import InfoNCELoss
from fastnce.ops.masked_info_nce import LEFT_OUT
from fastnce.testing import Sample, assert_close_to_truth

OP = "masked_info_nce"


def that_run(dtype: torch.dtype) -> list[str]:
    return [x for x in backends.names() if backends.supports(x, OP, "cpu", dtype) == "ok"]


each_backend = pytest.mark.parametrize("backend", that_run(torch.float64))
in_each_dtype = pytest.mark.parametrize(
    ("backend", "dtype"), [(x, dtype) for dtype in DTYPES for x in that_run(dtype)], ids=str
)

# What has a batch dimension if the queries have one.
OF_EACH = ("query", "positive_key", "query_ids", "key_ids", "key_mask", "guide", "weights")


def published(query: Tensor, positive_key: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """The losses before weights, in the shape of the queries; and the ranks, as ``info_nce`` returns both."""
    given = {"query": query, "positive_key": positive_key, **options}
    if query.dim() == 2:
        return of_one(**given)
    names = [*OF_EACH, "negative_ids", "negative_mask", "negative_keys"]
    if (keys := options.get("negative_keys")) is not None and keys.dim() == 2:
        names = OF_EACH

    def part(name: str, b: int) -> object:
        x = given[name]
        if name == "guide":
            return [x[0][b], x[1][b], *x[2:]]
        return x[b] if name in names and x is not None else x

    each = [of_one(**{name: part(name, b) for name in given}) for b in range(len(query))]
    losses, ranks = zip(*each, strict=True)
    return torch.stack(losses), torch.stack(ranks, dim=ranks[0].dim() - 1)


def of_one(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: Tensor,
    normalize: bool = True,
    symmetric: bool = False,
    in_batch_negatives: bool | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    negative_mask: Tensor | None = None,
    guide: Iterable[Tensor] | None = None,
    guide_margin: float = 0.0,
    relative_margin: bool = False,
    decoupled: bool = False,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Of queries (N, D), one exponential after the other."""
    count = len(query)
    in_batch = negative_keys is None if in_batch_negatives is None else in_batch_negatives
    key_ids = query_ids if key_ids is None else key_ids

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(a, b, dim=0) if normalize else a @ b

    def of_query(i: int, x: Tensor | None) -> Tensor | None:
        """What a query's own negatives have, or all share."""
        own = negative_keys is not None and negative_keys.dim() == 3
        return x[i] if x is not None and own else x

    def counts(
        i: int, j: int, ids: Tensor | None, mask: Tensor | None, rows: Tensor | None
    ) -> bool:
        if mask is not None and not mask[j]:
            return False
        if ids is not None and int(ids[j]) in (LEFT_OUT, int(query_ids[i])):
            return False
        if rows is None:
            return True
        of_key, limit = (F.cosine_similarity(guide[0][i], x, dim=0) for x in (rows[j], guide[1][i]))
        return bool(
            of_key <= (limit * (1 - guide_margin) if relative_margin else limit - guide_margin)
        )

    of_guide = (None, None, None) if guide is None else (*guide, None)[:3]
    pairs = [
        (i, j)
        for i in range(count)
        for j in range(count)
        if in_batch and i != j and counts(i, j, key_ids, key_mask, of_guide[1])
    ]

    def loss(positive: Tensor, others: list[Tensor]) -> tuple[Tensor, Tensor]:
        total = sum(((s / temperature).exp() for s in others), torch.zeros_like(positive))
        total = total if decoupled else total + (positive / temperature).exp()
        rank = sum(int(s > positive) for s in others)
        if decoupled and not others:
            return torch.full_like(positive, -torch.inf), torch.tensor(rank)
        return total.log() - positive / temperature, torch.tensor(rank)

    positives = [similarity(q, k) for q, k in zip(query, positive_key, strict=True)]
    found, back = [], []
    for i, positive in enumerate(positives):
        others = [similarity(query[i], positive_key[j]) for at, j in pairs if at == i]
        if negative_keys is not None:
            keys, ids, mask = (of_query(i, x) for x in (negative_keys, negative_ids, negative_mask))
            others += [
                similarity(query[i], key)
                for j, key in enumerate(keys)
                if counts(i, j, ids, mask, of_guide[2])
            ]
        found.append(loss(positive, others))
        of_key = [similarity(query[j], positive_key[i]) for j, at in pairs if at == i]
        back.append(loss(positive, of_key))
    losses, ranks = (torch.stack(x) for x in zip(*found, strict=True))
    if symmetric:
        losses_back, ranks_back = (torch.stack(x) for x in zip(*back, strict=True))
        losses, ranks = (losses + losses_back) / 2, torch.stack([ranks, ranks_back])
    return losses.masked_fill(losses == -torch.inf, 0), ranks


def reduced(losses: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    losses = losses if weights is None else losses * weights
    if reduction == "none":
        return losses
    return losses.sum() / (
        (losses.numel() if weights is None else weights.sum()) if reduction == "mean" else 1
    )


FORMS = ("in_batch", "symmetric", "queue", "queue in_batch", "own", "own in_batch")


def shaped(
    form: str, count: int, more: int, depth: int, batch: int = 0, seed: int = 0
) -> dict[str, object]:
    """Rows of a form, in double: positives as similar as during training."""
    lead = (batch,) if batch else ()
    query, other = (gaussian(*lead, count, depth, seed=seed + i) for i in (0, 1))
    call = {"query": query, "positive_key": 0.8 * query + 0.6 * other}
    if "own" in form:
        call["negative_keys"] = gaussian(*lead, count, more, depth, seed=seed + 2)
    elif "queue" in form:
        call["negative_keys"] = gaussian(more, depth, seed=seed + 2)
    if "negative_keys" in call:
        call["in_batch_negatives"] = "in_batch" in form
    return call | ({"symmetric": True} if form == "symmetric" else {})


def columns(call: dict[str, object]) -> torch.Size | None:
    """The shape of what goes with ``negative_keys``."""
    return call["negative_keys"].shape[:-1] if "negative_keys" in call else None


def in_batch(call: dict[str, object]) -> bool:
    return call.get("in_batch_negatives", True)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, object]:
    """Every form with every mask and option; of ids there are few, so that many are the same, and of all types."""
    form = draw(st.sampled_from(FORMS))
    sizes = draw(st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 5)))
    call = shaped(
        form, *sizes, batch=draw(st.sampled_from([0, 0, 1, 2])), seed=draw(st.integers(0, 99))
    )
    rows = call["query"].shape[:-1]
    maybe, some = st.booleans(), st.randoms(use_true_random=False)
    generator = torch.Generator().manual_seed(draw(some).randrange(2**31))

    def of_values(values: Tensor, shape: Iterable[int]) -> Tensor:
        return values[torch.randint(len(values), tuple(shape), generator=generator)]

    values = draw(
        st.sampled_from([[0, 1, 2**40, -1], [0, 1], [3], [LEFT_OUT, LEFT_OUT + 2, 2**63 - 1]])
    )
    values = torch.tensor(values)
    small = draw(st.sampled_from([torch.int32, torch.uint8]))
    values = values.to(small) if values.max() < 100 and draw(maybe) else values
    if draw(maybe) and in_batch(call):
        call["query_ids"] = of_values(values, rows)
        if draw(maybe):
            call["key_ids"] = of_values(values, rows)
    if in_batch(call) and draw(maybe):
        call["key_mask"] = of_values(torch.tensor([True, True, False]), rows)
    if (shape := columns(call)) is not None:
        if draw(maybe):
            call["negative_ids"] = of_values(values, shape)
            call.setdefault("query_ids", of_values(values, rows))
        if draw(maybe):
            call["negative_mask"] = of_values(torch.tensor([True, True, False]), shape)
    if draw(maybe) and form not in ("symmetric", "own", "own in_batch"):
        shapes = [rows, rows, *([] if columns(call) is None else [columns(call)])]
        call["guide"] = [gaussian(*shape, 3, seed=9 + i) for i, shape in enumerate(shapes)]
        call["guide_margin"] = draw(st.sampled_from([0.0, 0.3, -0.3]))
        call["relative_margin"] = draw(maybe)
    if draw(maybe):
        call["weights"] = of_values(torch.tensor([0.0, 0.5, 2.0]), rows).double()
    call["normalize"] = draw(maybe)
    call["decoupled"] = draw(maybe)
    call["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    call["temperature"] = draw(st.sampled_from([0.5, 1.0, 3.0]))
    return call


def results(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The loss, or losses, and the gradients of all leaves, zeros where there is no way to one."""
    upstream = torch.arange(1.0, loss.numel() + 1, dtype=loss.dtype).view_as(loss)
    total = (loss * upstream).sum() + 0 * sum(x.sum() for x in leaves)
    return [loss.detach(), *torch.autograd.grad(total, leaves)]


def with_leaves(call: dict[str, object]) -> tuple[dict[str, object], list[Tensor]]:
    """The call with a gradient for every tensor that has one, the temperature's too."""
    names = [x for x in ("query", "positive_key", "negative_keys", "temperature") if x in call]
    made = {name: torch.as_tensor(call[name], dtype=torch.float64) for name in names}
    made = {name: x.detach().clone().requires_grad_() for name, x in made.items()}
    return call | made, list(made.values())


@each_backend
@settings(deadline=None, max_examples=250, derandomize=True)
@given(call=calls())
def test_value_gradients_and_ranks_are_those_of_the_equation(backend, call):
    call, leaves = with_leaves(call)
    loss, rank = info_nce(**call, return_rank=True, backend=backend)
    losses, ranks = published(**call)
    expected = reduced(losses, call.get("weights"), call["reduction"])
    if call["reduction"] == "mean" and "weights" in call and call["weights"].sum() == 0:
        expected = 0 * losses.sum()  # see below
    for x, y in zip(results(loss, leaves), results(expected, leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)
    assert rank.dtype == torch.int64 and torch.equal(rank, ranks)


# The numerical contract, in sizes that cross the kernels' blocks.
KINDS = (
    "ids",
    "mask",
    "ids and mask",
    "guide",
    "all left out",
    "some left nothing",
    "weights alone",
)


def masked(
    kind: str, form: str, count: int, more: int, batch: int, index: int, dtype: torch.dtype
) -> Sample:
    """A form with a kind of mask, and in turn the other options."""
    depth = (3, 16, 27, 64)[index % 4]
    call = shaped(form, count, more, depth, batch, seed=index)
    if kind == "guide" and ("own" in form or form == "symmetric"):
        kind = "ids and mask"
    rows, shape = call["query"].shape[:-1], columns(call)
    ids = torch.arange(rows.numel()).view(rows) % 7
    more_ids = None if shape is None else torch.arange(shape.numel()).view(shape) % 11
    if "ids" in kind or "left" in kind:
        if kind == "all left out":
            ids, more_ids = ids * 0, None if shape is None else more_ids * 0
        elif kind == "some left nothing":  # a third of the queries have the id that all keys have
            ids, more_ids = ids % 3, None if shape is None else more_ids * 0
            call |= {"key_ids": ids * 0} if in_batch(call) else {}
        call |= {"query_ids": ids} | ({} if shape is None else {"negative_ids": more_ids})
    if "mask" in kind:
        if in_batch(call):
            call["key_mask"] = torch.arange(rows.numel()).view(rows) % 5 > 0
        if shape is not None:
            call["negative_mask"] = torch.arange(shape.numel()).view(shape) % 3 > 0
    if kind == "guide":
        # Cosines of 12 directions, 30 degrees apart: none is within 0.03 of another plus the margin.
        angles = torch.arange(12) * (torch.pi / 6)
        directions = torch.stack([angles.cos(), angles.sin()], dim=1)
        made = [rows, rows] if shape is None else [rows, rows, shape]
        call["guide"] = [
            directions[
                (5 * torch.arange(x.numel()) ** 2 + i * torch.arange(x.numel())).view(x) % 12
            ]
            for i, x in enumerate(made)
        ]
        call["guide_margin"] = (0.04, -0.04)[index % 2]
    if kind == "weights alone" or index % 3 == 0:
        weights = gaussian(*rows, seed=index + 5).abs()
        call["weights"] = weights * (torch.arange(rows.numel()).view(rows) % 4 != 1)
    mean = "sum" if dtype == torch.float16 else "mean"
    call["reduction"] = (mean, "none", "sum")[index % 3]
    call["decoupled"] = index % 2 == 1
    call["normalize"] = index % 5 != 2
    tau = (0.05, 0.2, 1.0, 0.5)[index % 4] if call["normalize"] else 3.0 * depth**0.5
    call["temperature"] = torch.tensor(tau, requires_grad=True)
    for name in ("query", "positive_key", "negative_keys"):
        if name in call:
            call[name] = call[name].to(dtype).requires_grad_()
    return Sample(f"{kind}, {form}, {count} rows, {more} more, {batch} problems, {index}", call)


SIZES = ((1, 1, 0), (7, 300, 0), (97, 7, 2), (300, 97, 0), (64, 33, 3), (65, 1, 0), (2, 513, 2))


@in_each_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_numerical_contract(kind, backend, dtype):
    start = KINDS.index(kind) + DTYPES.index(dtype)
    for k, form in enumerate(FORMS):
        index = 5 * start + k
        count, more, batch = SIZES[(start + k) % len(SIZES)]
        count, more = (min(count, 97), min(more, 40)) if "own" in form else (count, more)
        sample = masked(kind, form, count, more, batch, index, dtype)
        assert_close_to_truth("info_nce", backend, sample, dtype)


@in_each_dtype
@pytest.mark.parametrize("form", FORMS)
def test_sizes(form, backend, dtype):
    for index, (count, more, batch) in enumerate(SIZES):
        count, more = (min(count, 97), min(more, 40)) if "own" in form else (count, more)
        kind = KINDS[(index + FORMS.index(form)) % 4]
        sample = masked(kind, form, count, more, batch, index, dtype)
        assert_close_to_truth("info_nce", backend, sample, dtype)


# What follows from the equation.


@each_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_masks_that_leave_nothing_out_change_nothing(form, reduction, backend):
    call = shaped(form, 33, 40 if "own" not in form else 7, 12, batch=2) | {"reduction": reduction}
    rows, shape = call["query"].shape[:-1], columns(call)
    masks = {"weights": torch.ones(rows)}
    if in_batch(call):
        masks |= {"query_ids": torch.arange(66).view(rows), "key_mask": torch.ones(rows).bool()}
    if shape is not None:
        masks["negative_mask"] = torch.ones(shape).bool()
    found = []
    for more in ({}, masks):
        one, leaves = with_leaves(call | more | {"temperature": 0.1})
        found.append(results(info_nce(**one, backend=backend), leaves))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@each_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("form", ["queue", "queue in_batch", "own", "own in_batch"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_in_padding_reaches_nothing(value, form, reduction, backend):
    call = shaped(form, 9, 13, 5) | {"reduction": reduction, "normalize": "in_batch" in form}
    call["negative_mask"] = torch.arange(columns(call).numel()).view(columns(call)) % 3 > 0
    padding = ~call["negative_mask"].unsqueeze(-1)
    found = []
    for filling in (0.0, value):
        keys = call["negative_keys"].masked_fill(padding, filling)
        one, leaves = with_leaves(call | {"temperature": 2.0, "negative_keys": keys})
        found.append(results(info_nce(**one, backend=backend), leaves))
    for x, y in zip(*found, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y)
    assert found[1][3].masked_select(padding).eq(0).all(), "padding has a gradient"


@each_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_key_that_does_not_count_reaches_the_loss_of_its_own_query_alone(value, backend):
    """Other gradients have it as a product with 0, as those of every loss have rows that are not finite."""
    call = shaped("in_batch", 9, 0, 5)
    key_mask = torch.arange(9) != 4
    losses = []
    for filling in (0.0, value):
        key = call["positive_key"].clone()
        key[4] = filling
        options = {"temperature": 0.5, "reduction": "none", "backend": backend}
        losses.append(info_nce(call["query"], key, key_mask=key_mask, **options))
    torch.testing.assert_close(*(x[key_mask] for x in losses))
    assert not losses[1][4].isfinite()


@each_backend
def test_a_query_that_is_not_finite_reaches_its_own_loss_alone(backend):
    for form in FORMS[:1] + FORMS[2:]:  # symmetric, a query is a negative of keys
        call = shaped(form, 9, 7, 5)
        call["query_ids"] = torch.arange(9) % 3
        if (shape := columns(call)) is not None:
            call["negative_ids"] = torch.arange(shape.numel()).view(shape) % 5
        options = {"temperature": 0.5, "reduction": "none", "backend": backend}
        expected = info_nce(**call, **options)
        call["query"] = call["query"].clone().index_fill_(0, torch.tensor([4]), torch.nan)
        call["query"].requires_grad_()
        losses = info_nce(**call, **options)
        others = torch.arange(9) != 4
        torch.testing.assert_close(losses[others], expected[others])
        (grad,) = torch.autograd.grad(losses.sum(), call["query"])
        assert losses[4].isnan() and grad[others].isfinite().all()


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_query_with_nothing_left_has_no_loss_and_no_gradient(form, decoupled, reduction, backend):
    """Several, unless the loss is symmetric, and all."""
    several, none = torch.arange(6) % 2 == 0, torch.zeros(6, dtype=torch.bool)
    for left in (none,) if form == "symmetric" else (several, none):
        call, leaves = with_leaves(shaped(form, 6, 4, 5) | {"temperature": 0.5})
        call["query_ids"] = torch.where(left, torch.arange(6), 7)
        if in_batch(call):
            call["key_ids"] = torch.full((6,), 7)
        if (shape := columns(call)) is not None:
            call["negative_ids"] = torch.full(shape, 7)
        options = {"reduction": reduction, "decoupled": decoupled, "backend": backend}
        loss, rank = info_nce(**call, **options, return_rank=True)
        loss, of_query, *others = results(loss, leaves)
        assert all(x.isfinite().all() for x in (loss, of_query, *others))
        # The softmax of the positive alone is 1, but for a rounding.
        assert of_query[~left].abs().max() < 1e-15 and rank.view(-1, 6)[:, ~left].eq(0).all()
        if reduction == "none":
            assert loss[~left].abs().max() < 1e-15 and loss[left].ne(0).all()


@each_backend
def test_of_no_weight_at_all_the_mean_is_zero(backend):
    call, leaves = with_leaves(shaped("in_batch", 6, 0, 5) | {"temperature": 0.5})
    for decoupled in (False, True):
        loss = info_nce(**call, weights=torch.zeros(6), decoupled=decoupled, backend=backend)
        assert all(x.eq(0).all() for x in results(loss, leaves))


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_may_be_negative(reduction, backend):
    """As the advantages of reinforcement learning are. The mean is divided by their sum."""
    weights = torch.tensor([-1.0, 0.0, 2.5, 3.0])
    call, leaves = with_leaves(shaped("in_batch", 4, 0, 5) | {"temperature": 0.5})
    found = info_nce(**call, weights=weights, reduction=reduction, backend=backend)
    expected = reduced(published(**call)[0], weights.double(), reduction)
    for x, y in zip(results(found, leaves), results(expected, leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@in_each_dtype
@pytest.mark.parametrize("form", FORMS)
def test_ranks_are_exact(form, backend, dtype):
    """Of small integers, whose products every dtype has: what is as similar as the positive does not count."""
    call = shaped(form, 97, 130 if "own" not in form else 40, 4, batch=2)
    for name in ("query", "positive_key", "negative_keys"):
        if name in call:
            call[name] = call[name].round().to(dtype).requires_grad_()
    rows = call["query"].shape[:-1]
    call |= {"normalize": False, "temperature": 0.5}
    call["query_ids"] = torch.arange(rows.numel()).view(rows) % 9
    if (shape := columns(call)) is not None:
        call["negative_ids"] = torch.arange(shape.numel()).view(shape) % 9
    exact = {
        k: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for k, x in call.items()
    }
    _, expected = info_nce(**exact, return_rank=True, backend="torch")
    assert expected.max() > 20
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "backend": backend}
        loss, rank = info_nce(**call, **options, return_rank=True)
        assert torch.equal(rank, expected) and not rank.requires_grad
        assert torch.equal(loss, info_nce(**call, **options)), "asking for ranks changes the loss"
        loss.sum().backward()


@each_backend
def test_a_duplicate_of_the_positive_is_no_more_similar_to_a_guide(backend):
    """Whichever way the products are added up; with a margin it is."""
    for dtype in (torch.float64, torch.float32):
        query = gaussian(64, 8).to(dtype)
        twice = [gaussian(32, 700, seed=i).repeat(2, 1).to(dtype) for i in (1, 2)]
        options = {"reduction": "none", "temperature": 0.5, "backend": backend}
        # Nothing but the duplicates has a positive product.
        far = torch.cat([torch.eye(32), torch.eye(32)]).repeat_interleave(20, dim=1).to(dtype)
        for guide in ((twice[0], twice[1]), (far, far)):
            pairs = (guide[0] @ guide[1].T).argmax(dim=1)
            kept = info_nce(query, query.flip(0), guide=guide, **options)
            left = info_nce(query, query.flip(0), guide=guide, guide_margin=1e-3, **options)
            assert (kept > left).all(), pairs


@each_backend
def test_guides_and_weights_of_another_dtype(backend):
    """A guide is another model's: its rows are of its own dtype and dimension, and its order is what it finds in the dtype of the sums."""
    query, key = gaussian(20, 6).float(), gaussian(20, 6, seed=1).float()
    guide = [gaussian(20, 3, seed=i).bfloat16() for i in (2, 3)]
    weights = gaussian(20, seed=4).abs().half()
    options = {"temperature": 0.5, "backend": backend}
    found = info_nce(query, key, guide=guide, weights=weights, **options)
    wide = {"guide": [x.double() for x in guide], "weights": weights.double()}
    expected = info_nce(query.double(), key.double(), **wide, **options | {"backend": "torch"})
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@each_backend
def test_under_autocast_and_on_meta_tensors(backend):
    call = shaped("queue in_batch", 9, 5, 6)
    call = {k: x.float() if isinstance(x, Tensor) else x for k, x in call.items()}
    call |= {"query_ids": torch.arange(9) % 3, "negative_ids": torch.arange(5), "decoupled": True}
    call["guide"] = [gaussian(n, 4, seed=n).float() for n in (9, 9, 5)]
    options = {"return_rank": True, "backend": backend}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = call | {"query": call["query"].bfloat16()}
        loss, rank = info_nce(**mixed, **options)
    expected, ranks = info_nce(**call | {"query": call["query"].bfloat16().float()}, **options)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(rank, ranks)

    def meta(x: object) -> object:
        return x.to("meta") if isinstance(x, Tensor) else x

    there = {k: [meta(y) for y in x] if k == "guide" else meta(x) for k, x in call.items()}
    loss, rank = info_nce(**there, return_rank=True)
    assert loss.is_meta and rank.is_meta and rank.shape == ranks.shape and rank.dtype == torch.int64


@each_backend
def test_no_gradient_to_what_needs_none(backend):
    """The same gradients whichever are asked for."""
    call, leaves = with_leaves(shaped("queue in_batch", 9, 5, 6) | {"temperature": 0.5})
    call |= {"query_ids": torch.arange(9) % 3, "negative_ids": torch.arange(5), "backend": backend}
    for reduction in ("mean", "none"):
        _, *expected = results(info_nce(**call, reduction=reduction), leaves)
        for chosen, grad in zip(leaves, expected, strict=True):
            for x in leaves:
                x.requires_grad_(x is chosen)
            _, found = results(info_nce(**call, reduction=reduction), [chosen])
            torch.testing.assert_close(found, grad)
        for x in leaves:
            x.requires_grad_()
        with torch.no_grad():
            assert not info_nce(**call, reduction=reduction).requires_grad


@each_backend
def test_a_module_takes_the_call_s_tensors_by_name(backend):
    call = shaped("queue in_batch", 9, 5, 6)
    rows = [call.pop(name) for name in ("query", "positive_key", "negative_keys")]
    options = {
        "temperature": 0.5,
        "in_batch_negatives": True,
        "decoupled": True,
        "return_rank": True,
    }
    masks = {"query_ids": torch.arange(9) % 3, "weights": torch.rand(9)}
    found = InfoNCELoss(**options, backend=backend)(*rows, **masks)
    for x, y in zip(found, info_nce(*rows, **masks, **options, backend=backend), strict=True):
        assert torch.equal(x, y)


def test_plain_pytorch_has_second_derivatives():
    call, leaves = with_leaves(shaped("queue in_batch", 3, 2, 3) | {"temperature": 0.5})
    call |= {"query_ids": torch.tensor([0, 0, 1]), "negative_ids": torch.tensor([0, 1])}
    call |= {"weights": torch.tensor([1.0, 0.0, 2.0]), "backend": "torch"}
    names = ("query", "positive_key", "negative_keys", "temperature")
    for decoupled in (False, True):
        call["decoupled"] = decoupled

        def loss(*tensors: Tensor) -> Tensor:
            return info_nce(**call | dict(zip(names, tensors, strict=True)))

        assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("backend", [x for x in that_run(torch.float64) if x != "torch"])
def test_what_fused_kernels_refuse(backend):
    query, key = gaussian(5, 3), gaussian(5, 3, seed=1)
    options = {"query_ids": torch.arange(5), "backend": backend}
    with pytest.raises(RuntimeError, match=r"info_nce: .*torch.func.*backend='torch'"):
        torch.func.grad(lambda x: info_nce(x, key, **options))(query)
