"""The supervised loss against other rows, with ids and in its three forms: against equations with the whole matrix, in double."""

import pytest
import torch
import torch.nn.functional as F
from forms import gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import fastnce
from fastnce import backends
from fastnce.blocks import positive_pairs as blocks_of_pairs
from fastnce.ops import positive_pairs as pairs

RUN = [
    x
    for x in backends.names()
    if backends.supports(x, "masked_info_nce", "cpu", torch.float64) == "ok"
]
each_backend = pytest.mark.parametrize("backend", RUN)
each_form = pytest.mark.parametrize("positives", ["mean", "each", "sum"])


def published(
    features,
    labels,
    reference_features=None,
    reference_labels=None,
    *,
    temperature,
    normalize=True,
    positives="mean",
    ids=None,
    reference_ids=None,
    reference_mask=None,
    weights=None,
    reduction="mean",
):
    """With a matrix of which pairs are positives and which are in the sums."""
    own = reference_features is None
    if own:
        reference_features, reference_labels = features, labels
        reference_ids = ids = torch.arange(len(labels)) if ids is None else ids
    if normalize:
        features = F.normalize(features, dim=-1)
        reference_features = F.normalize(reference_features, dim=-1)
    z = features @ reference_features.T / temperature
    kept = torch.ones_like(z, dtype=torch.bool)
    if ids is not None:
        kept &= ids[:, None] != reference_ids
    if reference_mask is not None:
        kept &= reference_mask
    same = (labels[:, None] == reference_labels) & kept
    count = same.sum(dim=1)
    has = count > 0
    terms = has.to(z.dtype)
    losses = []
    for z_i, same_i, kept_i in zip(z, same, kept, strict=True):
        if not same_i.any():
            losses.append(0 * z_i.sum())
            continue
        others = z_i[kept_i & ~same_i].exp().sum()
        of_positives = z_i[same_i]
        if positives == "mean":
            losses.append(z_i[kept_i].exp().sum().log() - of_positives.mean())
        elif positives == "sum":
            total = of_positives.exp().sum()
            losses.append(-(total / (total + others)).log())
        else:
            found = of_positives.exp()
            losses.append(-(found / (found + others)).log().sum())
    losses = torch.stack(losses)
    if positives == "each":
        terms = count.to(z.dtype)
        if reduction == "none":
            losses = losses / count.clamp(min=1)
    if weights is not None:
        losses, terms = losses * weights, terms * weights
    if reduction == "none":
        return losses
    return losses.sum() / (terms.sum() if reduction == "mean" and terms.sum() > 0 else 1)


def compare(arguments, backend, **options):
    """Value and gradients of all rows and the temperature."""
    leaves = [x for x in arguments.values() if x is not None and x.is_floating_point()]
    leaves = [x for x in leaves if x.requires_grad]
    found = fastnce.sup_con(**arguments, **options, backend=backend)
    expected = published(**arguments, **options)
    weight = torch.arange(1.0, found.numel() + 1).view(found.shape)
    for x, y in zip(
        [found, *torch.autograd.grad((found * weight).sum(), leaves)],
        [expected, *torch.autograd.grad((expected * weight).sum(), leaves)],
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


def problem(count, more, depth, seed=0, classes=3):
    """Samples, which have ids, of one label each, some of them twice; and references, some of which are these."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2 * count, (count,), generator=generator)
    more_ids = torch.randint(2 * count, (more,), generator=generator)
    # Of the whole range; one is that of padding in the ops that have ids alone.
    values = torch.tensor([-(2**63), -1, 0, 5, 2**63 - 1])
    return {
        "features": gaussian(count, depth).requires_grad_(),
        "labels": values[ids * 7 % classes],
        "reference_features": gaussian(more, depth, seed=1).requires_grad_(),
        "reference_labels": values[more_ids * 7 % classes],
        "temperature": torch.tensor(0.3, dtype=torch.float64, requires_grad=True),
        "ids": ids,
        "reference_ids": more_ids,
        "reference_mask": torch.rand(more, generator=generator) < 0.8,
        "weights": torch.rand(count, generator=generator, dtype=torch.float64),
    }


OF_REFERENCES = ("reference_features", "reference_labels", "reference_ids", "reference_mask")


@each_backend
@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 20), st.integers(1, 6)),
    seed=st.integers(0, 99),
    classes=st.integers(1, 5),
    own=st.booleans(),
    left_out=st.sets(st.sampled_from(["ids", "reference_mask", "weights"])),
    positives=st.sampled_from(["mean", "each", "sum"]),
    normalize=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_value_and_gradients_are_those_of_the_equation(
    backend, sizes, seed, classes, own, left_out, positives, normalize, reduction
):
    arguments = problem(*sizes, seed=seed, classes=classes)
    for name in OF_REFERENCES if own else ():
        del arguments[name]
    for name in left_out:
        arguments.pop(name, None)
    if "ids" in left_out:
        arguments.pop("reference_ids", None)
    options = {"positives": positives, "normalize": normalize, "reduction": reduction}
    compare(arguments, backend, **options)


@each_backend
@each_form
def test_nothing_to_compare_with(backend, positives):
    """No positives, no negatives, neither; a row alone; all rows the same sample."""
    x, y = gaussian(4, 3), gaussian(5, 3, seed=1)
    labels, ids = torch.tensor([0, 0, 1, 2]), torch.arange(4)
    cases = [
        {"labels": torch.arange(4)},
        {"labels": torch.zeros(4, dtype=torch.int64)},
        {"labels": labels, "ids": torch.zeros(4, dtype=torch.int64)},
        {"labels": labels, "ids": torch.tensor([7, 7, 8, 9])},
        {"labels": labels, "reference_labels": torch.full((5,), 3)},
        {"labels": labels, "reference_labels": torch.zeros(5, dtype=torch.int64)},
        {"labels": labels, "reference_labels": torch.zeros(5), "reference_mask": torch.zeros(5)},
        {"labels": labels, "reference_labels": torch.zeros(5), "ids": ids, "reference_ids": 0 * y},
    ]
    for case in cases:
        given = {"features": x.clone().requires_grad_(), "temperature": 0.5, **case}
        if "reference_labels" in case:
            given["reference_labels"] = case["reference_labels"].long()
            given["reference_features"] = y.clone().requires_grad_()
        if "reference_mask" in case:
            given["reference_mask"] = case["reference_mask"].bool()
        if "reference_ids" in case:
            given["reference_ids"] = case["reference_ids"][:, 0].long()
        given = {k: v if k != "temperature" else torch.tensor(v).double() for k, v in given.items()}
        for reduction in ("mean", "sum", "none"):
            compare(given, backend, positives=positives, reduction=reduction)
    one = gaussian(1, 3).requires_grad_()
    loss = fastnce.sup_con(one, torch.tensor([0]), positives=positives, weights=torch.ones(1))
    loss.backward()
    assert loss == 0 and one.grad.eq(0).all()


@each_backend
@each_form
def test_no_digit_is_lost_at_small_temperatures(backend, positives):
    """In float32, near float64's; positives that dominate, and a row of zeros."""
    x = gaussian(9, 5)
    x[1] = x[0] + 1e-3 * x[1]
    x[2] = 0
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3])
    for tau in (0.01, 0.07, 10.0):
        options = {"temperature": tau, "positives": positives, "weights": torch.ones(9)}
        found, leaves = [], [x.float().requires_grad_(), x.float().double().requires_grad_()]
        for leaf in leaves:
            loss = fastnce.sup_con(leaf, labels, **options, backend=backend)
            found.append([loss.detach().double(), torch.autograd.grad(loss, leaf)[0].double()])
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5 / tau)


@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(positives, dtype):
    """The sums are float32's, and the gradients are rounded in the end."""
    arguments = problem(6, 9, 5)
    arguments |= {k: arguments[k].detach().to(dtype) for k in ("features", "reference_features")}
    arguments["temperature"] = 0.3
    found = []
    for wide in (dtype, torch.float32):
        leaves = [arguments[k].to(wide).requires_grad_() for k in OF_REFERENCES[:1]]
        leaves.append(arguments["features"].to(wide).requires_grad_())
        given = arguments | {"reference_features": leaves[0], "features": leaves[1]}
        loss = fastnce.sup_con(**given, positives=positives)
        assert loss.dtype == torch.float32
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    assert torch.equal(found[0][0], found[1][0])
    for x, y in zip(found[0][1:], found[1][1:], strict=True):
        assert torch.equal(x, y.to(dtype))


def calls_of_pairs(count, more, classes, **options):
    labels = torch.randint(classes, (count + more,), generator=torch.Generator().manual_seed(3))
    ids = torch.arange(count + more) % max(1, count // 2)
    query, key, others = gaussian(count, 6), gaussian(more, 6, seed=1), gaussian(count, seed=2)
    others[0] = -torch.inf
    tau = torch.tensor(0.7, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (query, key, others, tau)]
    given = (labels[:count], labels[count:], ids[:count], ids[count:])
    for matrix in (False, True):
        losses, counts = pairs.positive_pairs(
            *leaves[:2], *given, *leaves[2:], **options, matrix=matrix
        )
        grads = torch.autograd.grad((losses * gaussian(count, seed=4)).sum(), leaves)
        yield [losses.detach(), counts, *grads]


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize(
    ("count", "more", "classes"), [(1, 1, 1), (300, 70, 9), (130, 4100, 1), (257, 300, 250)]
)
def test_blocks_of_pairs_are_the_matrix(count, more, classes, each):
    blocks, matrix = calls_of_pairs(count, more, classes, each=each)
    for x, y in zip(blocks, matrix, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("classes", [1, 50])
def test_no_block_of_pairs_grows(classes, monkeypatch):
    """Whatever the labels; the work is that of the pairs, and of the ends of blocks."""
    sizes = []
    plain = blocks_of_pairs._Pairs._block

    def counted(self, rows, columns):
        sizes.append((rows.stop - rows.start, columns.stop - columns.start))
        return plain(self, rows, columns)

    monkeypatch.setattr(blocks_of_pairs._Pairs, "_block", counted)
    count = 2500
    next(calls_of_pairs(count, count, classes, each=True))
    assert max(r * c for r, c in sizes) <= blocks_of_pairs.QUERIES * blocks_of_pairs.KEYS
    assert sum(r * c for r, c in sizes) <= 2 * 2 * (count**2 / classes + count * 128)


@each_form
def test_a_second_derivative_is_refused_or_right(positives):
    x, labels = gaussian(6, 3).requires_grad_(), torch.arange(6) % 2
    for backend in RUN:
        loss = fastnce.sup_con(
            x, labels, positives=positives, weights=torch.ones(6), backend=backend
        )
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        if backend == "torch":
            (second,) = torch.autograd.grad(grad.square().sum(), x)
            assert second.abs().sum() > 0
        else:
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(grad.square().sum(), x)


@pytest.mark.parametrize("backend", [x for x in RUN if x != "torch"][:1])
@pytest.mark.parametrize("own", [True, False])
@each_form
def test_two_compilations_for_all_sizes_and_temperatures(backend, positives, own):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fastnce.sup_con, fullgraph=True, backend=counter)
    for size in (8, 10, 13, 21):
        arguments = problem(size, size + 3, 6)
        for name in OF_REFERENCES if own else ():
            del arguments[name]
        arguments["temperature"] = size / 20
        leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        found = []
        for function in (compiled, fastnce.sup_con):
            loss = function(**arguments, positives=positives, backend=backend)
            found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= 2


x = torch.randn(4, 3)
labels = torch.arange(4)
MISTAKES = [
    (ValueError, r"positives must be one of 'mean', 'each', 'sum', got 'all'", (), {"positives": "all"}),
    (ValueError, r"reference_labels without reference_features.*drop it", (None, labels), {}),
    (ValueError, r"reference_ids without reference_features", (), {"reference_ids": labels}),
    (ValueError, r"reference_mask without reference_f", (), {"reference_mask": labels > 0}),
    (ValueError, r"reference_labels is None\. Pass", (x,), {}),
    (ValueError, r"reference_features must have the shape \(4, 3\) \(features are \(4, 3\)\)", (x[:, :2], labels), {}),
    (TypeError, r"reference_features is torch.float64 but features", (x.double(), labels), {}),
    (ValueError, r"reference_features is empty", (x[:0], labels[:0]), {}),
    (ValueError, r"reference_labels must have the shape \(4,\)", (x, labels[:3]), {}),
    (TypeError, r"reference_labels must be integers", (x, x[:, 0]), {}),
    (ValueError, r"ids of one side.*Pass reference_ids too", (x, labels), {"ids": labels}),
    (ValueError, r"ids of one side.*Pass ids too", (x, labels), {"reference_ids": labels}),
    (ValueError, r"ids must have the shape \(4,\)", (), {"ids": labels[:2]}),
    (TypeError, r"ids must be integers", (), {"ids": x[:, 0]}),
    (TypeError, r"reference_mask must be bool", (x, labels), {"reference_mask": labels}),
    (ValueError, r"weights must have the shape \(4,\)", (), {"weights": x[:2, 0]}),
    (ValueError, r"weights require a gradient.*detach", (), {"weights": torch.ones(4, requires_grad=True)}),
    (ValueError, r"temperature must be positive.*got -1", (), {"temperature": -1.0, "ids": labels}),
    (ValueError, r"reduction must be one of", (), {"reduction": "avg", "ids": labels}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "pattern", "references", "options"), MISTAKES)
def test_mistakes_are_one_line(kind, pattern, references, options):
    with pytest.raises(kind, match=f"^sup_con: {pattern}") as caught:
        fastnce.sup_con(x, labels, *references, **options)
    assert "\n" not in str(caught.value)
