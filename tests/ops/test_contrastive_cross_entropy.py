"""The cross-entropy with the index of each query's key against PyTorch's own, of the matrix of all logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from forms import gaussian
from hypothesis import given, settings
from hypothesis import strategies as st

import fastnce
from fastnce import backends

RUN = [
    name
    for name in backends.names()
    if backends.supports(name, "contrastive_cross_entropy", "cpu", torch.float64) == "ok"
]
each_backend = pytest.mark.parametrize("backend", RUN)


def results(loss, leaves):
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream if loss.dim() else None)]


def assert_same(got, expected):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def rows(count, pool, depth=4):
    return gaussian(count, depth).requires_grad_(), gaussian(pool, depth, seed=1).requires_grad_()


def cosines(query, key):
    return F.normalize(query, dim=1) @ F.normalize(key, dim=1).T


@each_backend
@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ignore_index=st.sampled_from([-100, -1, 0]),
    label_smoothing=st.sampled_from([0.0, 0.2, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    normalize=st.booleans(),
    data=st.data(),
)
def test_value_and_gradients_are_pytorchs(
    backend, sizes, ignore_index, label_smoothing, reduction, normalize, data
):
    count, pool = sizes
    query, key = rows(count, pool)
    choices = st.sampled_from([*range(pool), ignore_index])
    targets = torch.tensor(data.draw(st.lists(choices, min_size=count, max_size=count)))
    tau = torch.tensor(0.3).double().requires_grad_()
    options = {"label_smoothing": label_smoothing, "ignore_index": ignore_index}
    options |= {"reduction": reduction}
    logits = (cosines(query, key) if normalize else query @ key.T) / tau
    found = fastnce.contrastive_cross_entropy(
        query, key, targets, temperature=tau, normalize=normalize, **options, backend=backend
    )
    leaves = [query, key, tau]
    if (targets == ignore_index).all() and reduction == "mean":  # PyTorch's is NaN
        assert all(torch.equal(x, torch.zeros_like(x)) for x in results(found, leaves))
        return
    assert_same(
        results(found, leaves), results(F.cross_entropy(logits, targets, **options), leaves)
    )


@each_backend
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("margin", [0.0, 0.35])
@pytest.mark.parametrize("angular_margin", [0.0, 0.5])
def test_classes_with_margins_and_numbers_of_rows(backend, label_smoothing, margin, angular_margin):
    """CosFace, ArcFace and both, with temperatures and biases of rows, and a weight for each loss."""
    query, key = rows(7, 5)
    targets = torch.tensor([0, 4, 2, 2, -100, 2, 1])
    numbers = {
        "temperature": torch.linspace(0.2, 0.5, 7),
        "key_temperature": torch.linspace(0.5, 2, 5),
        "key_bias": torch.linspace(-3, 1, 5),
    }
    numbers = {name: x.double().requires_grad_() for name, x in numbers.items()}
    weights = torch.linspace(0, 2, 7).double()
    found = fastnce.contrastive_cross_entropy(
        query,
        key,
        targets,
        **numbers,
        margin=margin,
        angular_margin=angular_margin,
        label_smoothing=label_smoothing,
        weights=weights,
        backend=backend,
    )
    s = cosines(query, key)
    own = F.one_hot(targets.clamp(min=0), 5).bool()
    s = torch.where(own, (s.acos() + angular_margin).cos() - margin, s)
    tau, of_keys, bias = numbers.values()
    logits = s / tau[:, None] / of_keys + bias
    options = {"label_smoothing": label_smoothing, "reduction": "none"}
    losses = F.cross_entropy(logits, targets, **options) * weights
    expected = losses.sum() / weights[targets >= 0].sum()
    leaves = [query, key, *numbers.values()]
    assert_same(results(found, leaves), results(expected, leaves))


@each_backend
def test_keys_that_are_no_negatives_and_ranks(backend):
    """Duplicates of a positive by id, padding by the mask; both may hit a positive, which stays."""
    query, key = rows(5, 8)
    targets = torch.tensor([0, 3, -100, 7, 3])
    ids = torch.tensor([0, 1, 2, 0, 4, 0, 6, 2])
    mask = torch.arange(8) != 3
    found, rank = fastnce.contrastive_cross_entropy(
        query, key, targets, key_ids=ids, key_mask=mask, return_rank=True, backend=backend
    )
    logits = cosines(query, key) / 0.07
    own = F.one_hot(targets.clamp(min=0), 8).bool()
    out = (ids == ids[targets.clamp(min=0)][:, None]) | ~mask
    logits = logits.masked_fill(out & ~own, -torch.inf)
    assert_same(
        results(found, [query, key]), results(F.cross_entropy(logits, targets), [query, key])
    )
    expected = (logits > logits.where(own, -torch.inf).amax(dim=1, keepdim=True)).sum(dim=1)
    assert torch.equal(rank, expected.masked_fill(targets < 0, -1))


@each_backend
def test_gradients_of_a_key_with_many_queries_add_up_in_single_precision(backend):
    """In bfloat16, 256 + 1 is 256."""
    if backends.supports(backend, "contrastive_cross_entropy", "cpu", torch.bfloat16) != "ok":
        pytest.skip("the backend has no such rows")
    query, key = (x.detach().bfloat16().requires_grad_() for x in rows(2000, 3))
    targets = torch.zeros(2000, dtype=torch.int64)
    options = {"temperature": 1.0, "reduction": "sum", "backend": backend}
    (got,) = torch.autograd.grad(
        fastnce.contrastive_cross_entropy(query, key, targets, **options), key
    )
    wide = [x.detach().double().requires_grad_() for x in (query, key)]
    loss = F.cross_entropy(cosines(*wide), targets, reduction="sum")
    (expected,) = torch.autograd.grad(loss, wide[1])
    assert (got - expected).abs().max() <= 0.02 * expected.abs().max()


@each_backend
def test_compiled(backend):
    torch._dynamo.reset()
    compiled = torch.compile(fastnce.contrastive_cross_entropy, fullgraph=True, backend="aot_eager")
    leaves = rows(6, 9)
    targets = torch.tensor([0, 8, -100, 3, 3, 1])
    options = {"angular_margin": 0.3, "label_smoothing": 0.1, "backend": backend}
    expected = fastnce.contrastive_cross_entropy(*leaves, targets, **options)
    assert_same(results(compiled(*leaves, targets, **options), leaves), results(expected, leaves))


x, targets = torch.randn(4, 3), torch.arange(4)
MISTAKES = [
    (ValueError, r"key must have the shape \(5, 3\)", (x, torch.randn(5, 2), targets), {}),
    (TypeError, r"key is torch.float64", (x, x.double(), targets), {}),
    (TypeError, r"targets must be integers", (x, x, targets.float()), {}),
    (ValueError, r"targets must have the shape \(4,\)", (x, x, targets[:3]), {}),
    (ValueError, r"targets must be rows of key, from 0 to 2, or ignore_index=-100, got 3", (x, x[:3], targets), {}),
    (ValueError, r"targets must be rows of key.*got -100", (x, x, targets - 100), {"ignore_index": -1}),
    (ValueError, r"key_ids must have the shape \(5,\)", (x, torch.randn(5, 3), targets), {"key_ids": targets}),
    (TypeError, r"key_mask must be bool", (x, x, targets), {"key_mask": targets}),
    (ValueError, r"label_smoothing does not go with masks", (x, x, targets), {"key_mask": targets > 0, "label_smoothing": 0.1}),
    (ValueError, r"temperature must have the shape \(4,\)", (x, x, targets), {"temperature": torch.ones(3)}),
    (ValueError, r"key_bias must have the shape \(5,\)", (x, torch.randn(5, 3), targets), {"key_bias": torch.ones(4)}),
    (ValueError, r"weights must have the shape \(4,\)", (x, x, targets), {"weights": torch.ones(3)}),
    (ValueError, r"angular_margin must be from 0", (x, x, targets), {"angular_margin": -math.pi}),
    (ValueError, r"reduction must be one of", (x, x, targets), {"reduction": "avg"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "pattern", "arguments", "options"), MISTAKES)
def test_mistakes_are_one_line(kind, pattern, arguments, options):
    with pytest.raises(kind, match=f"^contrastive_cross_entropy: {pattern}") as caught:
        fastnce.contrastive_cross_entropy(*arguments, **options)
    assert "\n" not in str(caught.value)
