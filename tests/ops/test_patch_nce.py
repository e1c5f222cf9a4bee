"""PatchNCE patch by patch: its weights, ids and unreduced losses against the equation, typed once more in double."""

import pytest
import torch
import torch.nn.functional as F
from forms import DTYPES, gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastnce import backends, patch_nce
from fastnce.losses import PatchNCELoss
from fastnce.testing import Sample, assert_close_to_truth

THAT_RUN = [
    x
    for x in backends.names()
    if backends.supports(x, "masked_info_nce", "cpu", torch.float64) == "ok"
]
each_backend = pytest.mark.parametrize("backend", THAT_RUN)


def published(
    query: Tensor,
    key: Tensor,
    ids: Tensor | None,
    t: Tensor,
    *,
    symmetric: bool = False,
    query_negatives: bool = False,
    detach_keys: bool = False,
) -> Tensor:
    """Of one image: CUT's cross entropy, its negatives with -10 on the diagonal, those of the same ids left out."""
    itself = torch.eye(len(query), dtype=torch.bool)
    same = itself & False if ids is None else (ids[:, None] == ids) & ~itself

    def negatives(q: Tensor, k: Tensor) -> Tensor:
        cosines = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T
        return (cosines.masked_fill(itself, -10.0) / t).masked_fill(same, -torch.inf)

    def one_way(q: Tensor, k: Tensor) -> Tensor:
        k = k.detach() if detach_keys else k
        columns = [F.cosine_similarity(q, k, dim=1)[:, None] / t, negatives(q, k)]
        columns += [negatives(q, q)] if query_negatives else []
        logits = torch.cat(columns, dim=1)
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long), reduction="none")

    if symmetric:
        return (one_way(query, key) + one_way(key, query)) / 2
    return one_way(query, key)


def of_layer(
    query: Tensor, key: Tensor, ids: Tensor | None, t: Tensor, in_all: bool, **options: bool
):
    if in_all:
        rows = [x if x is None else x.flatten(0, 1) for x in (query, key, ids)]
        return published(*rows, t, **options).view(query.shape[:2])
    each = [None] * len(query) if ids is None else ids
    images = zip(query, key, each, strict=True)
    return torch.stack([published(*image, t, **options) for image in images])


@each_backend
@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=3),
    options=st.fixed_dictionaries(
        {name: st.booleans() for name in ("symmetric", "query_negatives", "detach_keys")}
    ),
    negatives=st.sampled_from(["image", "batch"]),
    reduction=st.sampled_from(["mean", "none"]),
    temperature=st.sampled_from([0.2, 1.0, 5.0]),
    with_ids=st.booleans(),
    with_weights=st.booleans(),
    layer_weights=st.booleans(),
    kinds=st.integers(1, 4),
)
def test_value_and_gradients_are_those_of_the_equation(
    backend,
    sizes,
    options,
    negatives,
    reduction,
    temperature,
    with_ids,
    with_weights,
    layer_weights,
    kinds,
):
    """At temperatures at which CUT's constant counts, and where it does not."""
    shapes = [(2, *size) for size in sizes]
    queries = [gaussian(*x, seed=i).requires_grad_() for i, x in enumerate(shapes)]
    keys = [gaussian(*x, seed=i + 9).requires_grad_() for i, x in enumerate(shapes)]
    t = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    numbers = [torch.arange(2 * x[1]).view(2, x[1]) for x in shapes]
    ids = [(7 * x**2 + x) % kinds for x in numbers] if with_ids else None
    weights = [(x % 3).double() for x in numbers] if with_weights else None
    of_layers = [0.5, 2.0, 1.0][: len(sizes)] if layer_weights and reduction == "mean" else None
    more = {"temperature": t, "negatives": negatives, "reduction": reduction, "backend": backend}
    got = patch_nce(
        queries, keys, ids=ids, weights=weights, layer_weights=of_layers, **more, **options
    )

    each = zip(queries, keys, ids or [None] * len(sizes), strict=True)
    expected = [of_layer(*x, t, negatives == "batch", **options) for x in each]
    if weights is not None:
        expected = [x * w for x, w in zip(expected, weights, strict=True)]
    if reduction == "mean":
        totals = [
            x.numel() if weights is None else w.sum()
            for x, w in zip(expected, weights or expected, strict=True)
        ]
        shares = of_layers or [1 / len(sizes)] * len(sizes)
        means = [
            x.sum() / max(total, 1) * w
            for x, total, w in zip(expected, totals, shares, strict=True)
        ]
        got, expected = [got], [sum(means)]
    leaves = [*queries, *keys, t]
    upstream = [gaussian(*x.shape, seed=3) for x in expected]
    found = torch.autograd.grad(got, leaves, upstream, allow_unused=True)
    true = torch.autograd.grad(expected, leaves, upstream, allow_unused=True)
    for x, y in zip([*got, *found], [*expected, *true], strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("backend", "dtype"), [(x, dtype) for dtype in DTYPES for x in THAT_RUN], ids=str
)
def test_numerical_contract(backend, dtype):
    sizes = ((1, 16, 1.0), (256, 64, 0.07), (97, 27, 1.0), (300, 8, 0.07), (40, 8, 5.0))
    for index, (count, depth, temperature) in enumerate(sizes):
        query = gaussian(2, count, depth, seed=index)
        key = query + 0.7 * gaussian(2, count, depth, seed=index + 9)
        arguments = {
            "query_features": query.to(dtype).requires_grad_(),
            "key_features": key.to(dtype).requires_grad_(),
            "temperature": torch.tensor(temperature, requires_grad=True),
            "negatives": ("image", "batch")[index % 2],
            "query_negatives": index == 2,
            "symmetric": index > 1,
            "ids": torch.arange(2 * count).view(2, count) % 40 if index else None,
            "reduction": "none",
        }
        sample = Sample(f"{count} patches at {temperature}", arguments)
        assert_close_to_truth("patch_nce", backend, sample, dtype)


@each_backend
def test_weights_and_ids_that_tell_nothing_apart_change_nothing(backend):
    """The mean goes another way with them than without."""
    for options in ({}, {"negatives": "batch", "symmetric": True, "query_negatives": True}):
        found = []
        for weights in (None, [torch.full((2, 9), 3.0), torch.full((2, 5), 0.25)]):
            layers = [gaussian(2, n, 6, seed=n).requires_grad_() for n in (9, 5, 19, 15)]
            layers[2:] = [x[:, :n] for x, n in zip(layers[2:], (9, 5), strict=True)]
            more = {"weights": weights, "temperature": 1.5, "backend": backend, **options}
            if weights is not None:
                more["ids"] = [torch.arange(2 * n).view(2, n) for n in (9, 5)]
            loss = patch_nce(layers[:2], layers[2:], **more)
            found.append([loss, *torch.autograd.grad(loss, layers)])
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y)


@each_backend
def test_of_no_weight_at_all_the_mean_is_zero(backend):
    x = gaussian(2, 5, 4).requires_grad_()
    loss = patch_nce(x, gaussian(2, 5, 4, seed=1), weights=torch.zeros(2, 5), backend=backend)
    assert loss.eq(0) and torch.autograd.grad(loss, x)[0].eq(0).all()


@each_backend
def test_a_module_takes_ids_and_weights_by_name(backend):
    layers = [gaussian(2, n, 4, seed=n) for n in (3, 5)]
    masks = {"ids": [torch.arange(2 * n).view(2, n) % 2 for n in (3, 5)]}
    masks["weights"] = [torch.rand(2, n) for n in (3, 5)]
    loss = PatchNCELoss(0.5, reduction="none", backend=backend)
    found = loss(layers, layers, **masks)
    expected = patch_nce(
        layers, layers, **masks, temperature=0.5, reduction="none", backend=backend
    )
    assert [x.shape for x in found] == [(2, 3), (2, 5)]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
