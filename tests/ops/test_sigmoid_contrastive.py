"""The sigmoid loss of pairs against its equation, typed once more, in double; and its own arguments."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forms import gaussian
from hypothesis import given, settings
from hypothesis import strategies as st

import fastnce
from fastnce import backends, sigmoid_contrastive

OP = "sigmoid_contrastive"
RUN = [x for x in backends.names() if backends.supports(x, OP, "cpu", torch.float64) == "ok"]
each_backend = pytest.mark.parametrize("backend", RUN)
# The compiled kernels do not leave out pairs yet.
each_with_masks = pytest.mark.parametrize("backend", [x for x in RUN if x != "native"])


def published(query, key, positive, scale, bias, normalize, left_in=1):
    """open_clip's ``-F.logsigmoid(labels * logits).sum() / image_features.shape[0]``, of unit rows."""
    if normalize:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    labels = 2 * positive.to(query.dtype) - 1
    losses = -F.logsigmoid(labels * (query @ key.T * scale + bias)) * left_in
    return losses.sum() / len(query)


def results(loss, leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@each_backend
@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(0, 60), st.integers(1, 9)),
    form=st.sampled_from(["pairs", "labels", "negatives"]),
    scale=st.sampled_from([1e-3, 1.0, 10.0, 100.0, 1e4]),
    bias=st.sampled_from([0.0, -10.0, 3.0, -1e3]),
    normalize=st.booleans(),
)
def test_value_and_gradients_are_those_of_the_equation(
    backend, sizes, form, scale, bias, normalize
):
    count, more, depth = sizes
    given, positive = pairs_of(form, count, more)
    compare(backend, sizes, given, positive, scale, bias, normalize)


def pairs_of(form, count, more):
    """The arguments, and which pairs are positives."""
    given, positive = {}, torch.eye(count, count + more, dtype=torch.bool)
    if form == "labels":
        labels = torch.arange(count) % 3, torch.arange(count + more) % 4
        given = dict(zip(("query_labels", "key_labels"), labels, strict=True))
        positive = labels[0][:, None] == labels[1]
    elif form == "negatives":
        given, positive = {"paired": False}, positive & False
    return given, positive


def compare(backend, sizes, given, positive, scale, bias, normalize, left_in=1):
    count, more, depth = sizes
    query, key = gaussian(count, depth), gaussian(count + more, depth, seed=1)
    scale, bias = (torch.tensor(x, dtype=torch.float64) for x in (scale, bias))
    leaves = [x.double().requires_grad_() for x in (query, key, scale, bias)]
    query, key, scale, bias = leaves
    options = {"normalize": normalize, "backend": backend}
    found = sigmoid_contrastive(query, key, **given, scale=scale, bias=bias, **options)
    expected = results(published(query, key, positive, scale, bias, normalize, left_in), leaves)
    for x, y in zip(results(found, leaves), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12 * max(1.0, scale.item()))


@each_with_masks
@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(0, 60), st.integers(1, 9)),
    form=st.sampled_from(["pairs", "labels", "negatives"]),
    masks=st.sampled_from(["ids", "mask", "ids, mask"]),
    kept=st.sampled_from([0.0, 0.5, 1.0]),
    kinds=st.integers(1, 7),
)
def test_pairs_that_are_left_out_count_for_nothing(backend, sizes, form, masks, kept, kinds):
    """Of the same ids unless they are positives, and all of a masked key."""
    count, more, _ = sizes
    given, positive = pairs_of(form, count, more)
    left_in = torch.ones(count, count + more, dtype=torch.bool)
    if "ids" in masks:
        ids = torch.arange(count) % kinds, torch.arange(count + more) % (kinds + 1) - 1
        given |= {"query_ids": ids[0].int(), "key_ids": ids[1]}
        left_in = positive | (ids[0][:, None] != ids[1])
    if "mask" in masks:
        given["key_mask"] = gaussian(count + more).sigmoid() < kept
        left_in = left_in & given["key_mask"]
    compare(backend, sizes, given, positive, 5.0, -2.0, True, left_in)


@each_with_masks
def test_ids_of_pairs_are_those_of_the_queries(backend):
    query, key, ids = gaussian(6, 3), gaussian(6, 3, seed=1), torch.arange(6) % 3
    options = {"query_ids": ids, "scale": 5.0, "backend": backend}
    found = sigmoid_contrastive(query, key, **options)
    assert torch.equal(found, sigmoid_contrastive(query, key, **options, key_ids=ids))
    assert found < sigmoid_contrastive(query, key, scale=5.0, backend=backend)


@each_with_masks
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_masked_key_is_not_there(backend, dtype):
    """As if it were not given, and without a gradient; in every dtype."""
    query, key = gaussian(7, 5).to(dtype), gaussian(30, 5, seed=1).to(dtype)
    mask, options = torch.arange(30) % 3 > 0, {"scale": 4.0, "bias": -1.0, "backend": backend}
    labels = torch.arange(7) % 2, torch.arange(30) % 2
    short = labels[0], labels[1][mask]
    found, leaves = [], []
    for rows, both, masks in (
        ((query, key), labels, {"key_mask": mask}),
        ((query, key[mask]), short, {}),
    ):
        leaves = [x.clone().requires_grad_() for x in rows]
        loss = sigmoid_contrastive(*leaves, *both, **options, **masks)
        found.append(results(loss, leaves))
    (loss, of_query, of_key), expected = found
    assert not of_key[~mask].any()
    for x, y in zip((loss, of_query, of_key[mask]), expected, strict=True):
        torch.testing.assert_close(x, y)


@each_with_masks
def test_compiled_with_masks(backend):
    """Ids given once are the queries' and the keys'."""
    torch._dynamo.reset()
    compiled = torch.compile(sigmoid_contrastive, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (8, 13):
        leaves = [gaussian(size, 6).requires_grad_(), gaussian(size, 6, seed=1).requires_grad_()]
        options = {"scale": 5.0, "query_ids": torch.arange(size) % 3, "backend": backend}
        options |= {"key_mask": torch.arange(size) % 4 > 0, "reduction": "none"}
        found = results(compiled(*leaves, **options).sum(), leaves)
        expected = results(sigmoid_contrastive(*leaves, **options).sum(), leaves)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_scale_or_bias_overflows(backend, dtype):
    """Where every pair is far on the wrong side, the loss is the sum of the logits."""
    x = gaussian(5, 3).to(dtype)
    for scale, bias in ((1e15, 0.0), (1e4, 1e4), (1.0, -1e30), (1.0, 1e30)):
        leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        numbers = [torch.tensor(n, dtype=dtype, requires_grad=True) for n in (scale, bias)]
        loss = sigmoid_contrastive(*leaves, scale=numbers[0], bias=numbers[1], backend=backend)
        for found in results(loss, leaves + numbers):
            assert found.isfinite().all()
        positive = torch.eye(5, dtype=torch.bool)
        wide = [y.double() for y in (x, x)]
        expected = published(*wide, positive, scale, bias, True)
        torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=0)


@each_backend
def test_small_losses_keep_their_digits(backend):
    """Of SigLIP's first step, logits are near -10 and -20, whose losses are 5e-5 and 2e-9."""
    query, key = gaussian(4, 3), gaussian(50, 3, seed=1)
    for bias in (-10.0, -20.0, -60.0):
        options = {"scale": 0.1, "bias": bias, "paired": False, "reduction": "none"}
        found = sigmoid_contrastive(query.float(), key.float(), **options, backend=backend)
        expected = sigmoid_contrastive(query.double(), key.double(), **options, backend="torch")
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@each_backend
def test_numbers_and_tensors_of_every_kind(backend):
    x, y = gaussian(4, 3).float(), gaussian(4, 3, seed=1).float()

    def loss(scale, bias):
        return sigmoid_contrastive(x, y, scale=scale, bias=bias, backend=backend)

    expected = loss(2.0, -1.0)
    for shape in ((), (1,), (1, 1)):
        leaves = [torch.full(shape, n, requires_grad=True) for n in (2.0, -1.0)]
        found = loss(*leaves)
        torch.testing.assert_close(found, expected)
        assert all(g.shape == shape for g in torch.autograd.grad(found, leaves))
    for kind in (np.float32, np.float64, np.int32, int):
        assert torch.equal(loss(kind(2), kind(-1)), expected)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.tensor(2.0), torch.tensor(-1.0)), expected)
    assert compiled(torch.tensor(-2.0), torch.tensor(-1.0)).isnan()
    assert compiled(torch.tensor(2.0), torch.tensor(torch.nan)).isnan()


@each_backend
def test_two_compilations_for_all_sizes_and_numbers(backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sigmoid_contrastive, fullgraph=True, backend=counter)
    for size in (8, 10, 13, 21):
        given = gaussian(size, 6).float(), gaussian(size + 3, 6, seed=1).float()
        options = {"scale": size / 2, "bias": -size / 3, "backend": backend}
        leaves = [x.clone().requires_grad_() for x in given]
        found = results(compiled(*leaves, **options), leaves)
        expected = results(sigmoid_contrastive(*leaves, **options), leaves)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)
    assert counter.frame_count <= 2


@each_backend
def test_blocks_of_the_matrix_add_up(backend):
    query, key = gaussian(7, 5), gaussian(20, 5, seed=1)
    options = {"scale": 3.0, "bias": -2.0, "reduction": "none", "backend": backend}
    whole = sigmoid_contrastive(query, key, **options)
    parts = sigmoid_contrastive(query, key[:7], **options)
    parts += sigmoid_contrastive(query, key[7:], paired=False, **options)
    torch.testing.assert_close(parts, whole)


x = torch.randn(4, 3)
labels = torch.arange(4)
MISTAKES = [
    (ValueError, r"key must have the shape \(4, 3\)", (x, x[:, :2]), {}),
    (TypeError, r"key is torch.float64 but query", (x, x.double()), {}),
    (ValueError, r"key must have a row for each query.*got \(3, 3\).*paired=False", (x, x[:3]), {}),
    (ValueError, r"key_labels is None\. Pass", (x, x, labels), {}),
    (ValueError, r"query_labels is None\. Pass", (x, x, None, labels), {}),
    (ValueError, r"key_labels must have the shape \(4,\)", (x, x, labels, labels[:3]), {}),
    (TypeError, r"query_labels must be integers", (x, x, labels.float(), labels), {}),
    (
        ValueError,
        r"paired=True has no meaning with labels",
        (x, x, labels, labels),
        {"paired": True},
    ),
    (ValueError, r"scale must be positive.*got -1", (x, x), {"scale": -1.0}),
    (ValueError, r"scale must be positive.*got 0", (x, x), {"scale": torch.zeros(1)}),
    (TypeError, r"bias must be a float.*got str", (x, x), {"bias": "0"}),
    (TypeError, r"bias must be a float.*int64.*bias\.float", (x, x), {"bias": torch.tensor(1)}),
    (ValueError, r"bias must be a float.*shape \(2,\)", (x, x), {"bias": torch.zeros(2)}),
    (ValueError, r"bias must be finite, got nan", (x, x), {"bias": float("nan")}),
    (ValueError, r"bias must be finite, got inf", (x, x), {"bias": torch.tensor(torch.inf)}),
    (ValueError, r"reduction must be one of", (x, x), {"reduction": "avg"}),
    (ValueError, r"key_ids need the ids of the queries.*query_ids", (x, x), {"key_ids": labels}),
    (
        ValueError,
        r"query_ids need the ids of the keys too.*Pass key_ids",
        (x, torch.cat([x, x])),
        {"query_ids": labels},
    ),
    (
        ValueError,
        r"query_ids need the ids of the keys too",
        (x, x),
        {"query_ids": labels, "paired": False},
    ),
    (ValueError, r"query_ids must have the shape \(4,\)", (x, x), {"query_ids": labels[:3]}),
    (TypeError, r"query_ids must be integers", (x, x), {"query_ids": labels.float()}),
    (
        ValueError,
        r"key_ids must have the shape \(4,\)",
        (x, x),
        {"query_ids": labels, "key_ids": labels[:3]},
    ),
    (TypeError, r"key_mask must be bool.*got torch.int64", (x, x), {"key_mask": labels}),
    (ValueError, r"key_mask must have the shape \(4,\)", (x, x), {"key_mask": labels[:3] > 0}),
    (TypeError, r"key_mask must be a tensor", (x, x), {"key_mask": True}),
]


@pytest.mark.parametrize(("kind", "pattern", "given", "options"), MISTAKES)
def test_mistakes_are_one_line(kind, pattern, given, options):
    with pytest.raises(kind, match=f"^{OP}: {pattern}") as caught:
        fastnce.sigmoid_contrastive(*given, **{"scale": 1.0} | options)
    assert "\n" not in str(caught.value)
