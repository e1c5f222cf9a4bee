"""Temperatures and biases of rows, margins, hardness and label smoothing against their equations, as matrices in double."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from forms import gaussian
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastnce
from fastnce import backends
from fastnce.blocks import tiles
from fastnce.ops.softmax_shapes import _with_bias

RUN = [
    name
    for name in backends.names()
    if backends.supports(name, "masked_info_nce", "cpu", torch.float64) == "ok"
]
each_backend = pytest.mark.parametrize("backend", RUN)

OF_KEYS = ("key_temperature", "key_bias")
OF_NEGATIVES = ("negative_bias", "negative_weights")
NUMBERS = {"margin": 0.3, "angular_margin": 0.4, "hardness": 2.5, "label_smoothing": 0.2}


def uniform(low, high, *shape, seed):
    return (
        torch.rand(shape, generator=torch.Generator().manual_seed(seed)).double() * (high - low)
        + low
    )


def problem(form, *chosen, batch=0, count=6, columns=5, depth=4):
    """Rows and options of ``info_nce``, in double.

    Args:
        form: words: "symmetric", "shared", "own", "in_batch" (with negatives), "dot".
        chosen: the options by name; "per_query", "ids", "mask" and "guide".
        batch: B, or 0 for none.
        count: N.
        columns: M.
        depth: D.
    """
    lead = (batch, count) if batch else (count,)
    words = form.split()
    call = {"query": gaussian(*lead, depth), "positive_key": gaussian(*lead, depth, seed=1)}
    call["positive_key"] = call["positive_key"] + call["query"]
    of_negatives = None
    if "shared" in words or "own" in words:
        of_negatives = (columns,) if "shared" in words else (*lead, columns)
        call["negative_keys"] = gaussian(*of_negatives, depth, seed=2)
        call["in_batch_negatives"] = "in_batch" in words
    call["normalize"] = "dot" not in words
    call["symmetric"] = "symmetric" in words
    call["temperature"] = torch.tensor(0.4).double()
    if "per_query" in chosen:
        call["temperature"] = uniform(0.2, 0.8, *lead, seed=3)
    numbers = {
        "key_temperature": lambda: uniform(0.5, 2.0, *lead, seed=4),
        "key_bias": lambda: uniform(-5.0, 1.0, *lead, seed=5),
        "negative_bias": lambda: uniform(-5.0, 1.0, *of_negatives, seed=6),
        "negative_weights": lambda: uniform(-1.0, 3.0, *of_negatives, seed=7).relu(),
        "weights": lambda: uniform(0.0, 2.0, *lead, seed=8),
        "decoupled": lambda: True,
    }
    call |= {name: numbers[name]() for name in chosen if name in numbers}
    call |= {name: NUMBERS[name] for name in chosen if name in NUMBERS}
    in_batch = of_negatives is None or call["in_batch_negatives"]
    if "ids" in chosen:
        call["query_ids"] = torch.arange(math.prod(lead)).view(lead) % 4
        if of_negatives is not None:
            call["negative_ids"] = torch.arange(math.prod(of_negatives)).view(of_negatives) % 6
    if "mask" in chosen:
        if in_batch:
            call["key_mask"] = torch.arange(math.prod(lead)).view(lead) % 3 > 0
        if of_negatives is not None:
            call["negative_mask"] = torch.arange(math.prod(of_negatives)).view(of_negatives) % 4 > 0
    if "guide" in chosen:
        shapes = [lead, lead, *([] if of_negatives is None else [of_negatives])]
        call["guide"] = [gaussian(*shape, 3, seed=9 + i) for i, shape in enumerate(shapes)]
    return call


def turned(cosine, angle):
    theta = cosine.clamp(-1, 1).acos()
    moved = torch.cos(theta + angle)
    return torch.where(theta + angle < math.pi, moved, cosine - angle * math.sin(angle))


def equation(
    query,
    positive_key,
    negative_keys=None,
    *,
    temperature,
    normalize,
    symmetric,
    in_batch_negatives=True,
    key_temperature=None,
    key_bias=None,
    negative_bias=None,
    negative_weights=None,
    margin=0.0,
    angular_margin=0.0,
    hardness=0.0,
    label_smoothing=0.0,
    query_ids=None,
    negative_ids=None,
    key_mask=None,
    negative_mask=None,
    guide=None,
    decoupled=False,
    weights=None,
):
    """One loss for each query (N, D), from the matrix of all logits."""
    if query.dim() == 3:
        given = {name: x for name, x in locals().items() if x is not None}
        shared = negative_keys is not None and negative_keys.dim() == 2
        parts = []
        for i in range(len(query)):
            part = dict(given)
            for name, x in given.items():
                if isinstance(x, torch.Tensor) and x.dim() and not (shared and "negative" in name):
                    part[name] = x[i]
            if guide is not None:
                part["guide"] = [x if x.dim() == 2 else x[i] for x in guide]
            parts.append(equation(**part))
        return torch.stack(parts)
    count = len(query)
    rows = [x for x in (query, positive_key, negative_keys) if x is not None]
    if normalize:
        rows = [F.normalize(x, dim=-1) for x in rows]
    query, key, *others = rows
    s = query @ key.T
    if not in_batch_negatives:
        s = s.diagonal()[:, None]
    columns = s.shape[1]
    own = torch.eye(count, dtype=torch.bool) if in_batch_negatives else torch.ones(count, 1) > 0
    for x in others:
        more = query @ x.T if x.dim() == 2 else (x @ query[:, :, None])[..., 0]
        s = torch.cat([s, more], dim=1)
        own = torch.cat([own, torch.zeros_like(more, dtype=torch.bool)], dim=1)

    changed = s if not angular_margin else torch.where(own, turned(s, angular_margin), s)
    changed = changed - margin * own.to(s.dtype)
    z = changed / (temperature[:, None] if temperature.dim() else temperature)
    if key_temperature is not None:
        z = z / key_temperature[None]
    z = z + hardness * s.detach() * ~own

    def of_columns(first, second):
        """(N, columns of keys), and those of negatives."""
        width = s.shape[1] - columns
        if first is None:
            first = s.new_zeros(count)
        first = first.expand(count, count) if in_batch_negatives else first[:, None]
        second = s.new_zeros(width) if second is None else second
        return torch.cat([first, second.expand(count, width)], dim=1)

    z = z + of_columns(key_bias, negative_bias)
    if negative_weights is not None:
        z = (
            z
            + of_columns(None, negative_weights)
            .where(of_columns(None, negative_weights) > 0, 1)
            .log()
        )
    out = torch.zeros_like(own)
    if negative_weights is not None:
        out = out | (of_columns(s.new_ones(count), negative_weights) == 0)
    if query_ids is not None:
        of_negatives = None if negative_ids is None else negative_ids.double()
        ids = of_columns(query_ids.double(), of_negatives)
        same = ids == query_ids[:, None]
        if negative_ids is None:
            same[:, columns:] = False
        out = out | same
    if key_mask is not None or negative_mask is not None:
        key_mask = torch.ones(count) if key_mask is None else key_mask.double()
        negative_mask = torch.ones(()) if negative_mask is None else negative_mask.double()
        out = out | (of_columns(key_mask, negative_mask) == 0)
    if guide is not None:
        guides = [F.normalize(x, dim=-1) for x in guide]
        found = (guides[0] @ guides[1].T) if in_batch_negatives else torch.zeros(count, 1) - 9
        found = torch.cat([found, *(guides[0] @ x.T for x in guides[2:])], dim=1)
        out = out | (found > (guides[0] * guides[1]).sum(dim=1, keepdim=True))
    z = z.masked_fill(out & ~own, -torch.inf)

    def losses(z):
        target = own.long().argmax(dim=1)
        if not decoupled:
            return F.cross_entropy(z, target, reduction="none", label_smoothing=label_smoothing)
        others = z.masked_fill(own, -torch.inf)
        none = (others == -torch.inf).all(dim=1)
        lse = others.masked_fill(none[:, None], 0).logsumexp(dim=1)
        return (lse - z[own]).masked_fill(none, 0)

    loss = 0.5 * (losses(z) + losses(z.T)) if symmetric else losses(z)
    return loss


def reduced(losses, weights, reduction):
    weights = torch.ones_like(losses) if weights is None else weights
    losses = losses * weights
    if reduction == "none":
        return losses
    return losses.sum() / (weights.sum() if reduction == "mean" else 1)


ROWS = ("query", "positive_key", "negative_keys")


def is_floats(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def results(function, call, dtype=torch.float64, **more):
    """The losses, their mean, and by name the gradients of both, of all floats but weights and the guide.

    The rows are of this dtype, and other numbers in that of its sums.
    """
    found = {}
    wide = torch.promote_types(dtype, torch.float32)
    for reduction in ("none", "mean"):
        leaves = {
            name: x.detach()
            .to(dtype if name in ROWS else wide)
            .requires_grad_("weights" not in name)
            for name, x in call.items()
            if is_floats(x)
        }
        loss = function(**{**call, **leaves}, reduction=reduction, **more)
        wanted = {name: x for name, x in leaves.items() if x.requires_grad}
        upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        upstream = upstream if loss.dim() else torch.ones_like(loss)
        gradients = torch.autograd.grad(loss, list(wanted.values()), upstream, allow_unused=True)
        found[reduction] = loss.detach().double()
        for (name, x), gradient in zip(wanted.items(), gradients, strict=True):
            gradient = torch.zeros_like(x) if gradient is None else gradient
            found[f"{name} of {reduction}"] = gradient.double()
    return found


def plain(reduction, **call):
    weights = call.pop("weights", None)
    return reduced(equation(**call), weights, reduction)


def assert_same(got, expected, rtol=1e-10, atol=1e-11):
    assert got.keys() == expected.keys()
    for name, x in got.items():
        torch.testing.assert_close(
            x, expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def allowed(form, chosen):
    """Whether ``info_nce`` takes the combination."""
    has = chosen.__contains__
    negatives = "shared" in form or "own" in form
    several = has("per_query") or has("key_temperature")
    masked = has("ids") or has("mask") or has("guide")
    refused = (
        several and ("symmetric" in form or has("hardness")),
        has("key_temperature") and negatives,
        any(map(has, OF_NEGATIVES)) and not negatives,
        has("angular_margin") and "dot" in form,
        has("label_smoothing")
        and (has("decoupled") or masked or has("hardness") or has("negative_weights")),
        has("guide") and ("symmetric" in form or "own" in form),
    )
    return not any(refused)


FORMS = ["batch", "batch dot", "symmetric", "shared", "shared in_batch", "own", "own in_batch dot"]
CHOICES = [
    "per_query",
    *OF_KEYS,
    *OF_NEGATIVES,
    *NUMBERS,
    "ids",
    "mask",
    "guide",
    "decoupled",
    "weights",
]
COMBINATIONS = st.tuples(
    st.sampled_from(FORMS), st.lists(st.sampled_from(CHOICES), unique=True, min_size=1, max_size=5)
).filter(lambda x: allowed(*x))


@each_backend
@example(combination=("symmetric", ["margin", "mask", "ids"]), batch=2, count=7)
@settings(deadline=None, max_examples=150, derandomize=True)
@given(combination=COMBINATIONS, batch=st.sampled_from([0, 0, 2]), count=st.sampled_from([1, 2, 7]))
def test_value_and_gradients_are_those_of_the_equation(backend, combination, batch, count):
    form, chosen = combination
    call = problem(form, *chosen, batch=batch, count=count)
    assert_same(results(fastnce.info_nce, call, backend=backend), results(plain, call))


# Each option once, and what goes together.
CASES = [
    ("batch", "per_query"),
    ("batch", "key_temperature", "key_bias"),
    ("shared in_batch", "key_bias", "negative_bias"),
    ("own", "negative_weights"),
    ("symmetric", "margin"),
    ("shared", "angular_margin", "decoupled"),
    ("batch", "angular_margin", "margin", "per_query"),
    ("shared in_batch", "hardness", "mask"),
    ("symmetric", "hardness"),
    ("batch", "label_smoothing", "key_bias"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=" ".join)


@each_backend
@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_exact_as_the_matrix_in_the_same_precision(backend, case, dtype):
    """At most twice the error of the matrix, the rounding of what cancels, and that of the results.

    With logits of size L a loss is the difference of two such numbers, and a gradient a sum whose terms are known to ``eps L / t``,
    or ``eps L^2 / t`` where it is that of numbers. The factors of its products may be rounded to the rows' precision.
    """
    if backends.supports(backend, "masked_info_nce", "cpu", dtype) != "ok":
        pytest.skip("the backend has no such rows")
    count, logit, tau = 20, 10, 0.2
    call = problem(*case, count=count, columns=30, depth=16)
    call = {
        name: x.to(dtype if name in ROWS else torch.float32).double() if is_floats(x) else x
        for name, x in call.items()
    }

    def matrix(**given):
        return plain(**{name: x.float() if is_floats(x) else x for name, x in given.items()})

    exact = results(plain, call)
    theirs = results(matrix, call, dtype)
    ours = results(fastnce.info_nce, call, dtype, backend=backend)
    for name, x in exact.items():
        of_rows = name.split()[0] in ROWS
        size = logit if " " not in name else logit / tau if of_rows else logit**2 / tau
        size *= count if " " in name and x.dim() == 0 else 1
        bound = 4 * torch.finfo(torch.float32).eps * size
        if of_rows:
            bound += torch.finfo(dtype).eps * (x.abs().max() + 1 / tau)
        elif " " in name:
            bound += torch.finfo(dtype).eps * x.abs().max()
        assert (ours[name] - x).abs().max() <= 2 * (theirs[name] - x).abs().max() + bound, name


class Largest(TorchDispatchMode):
    """Inside the block keeps the largest number of elements that an operator returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        sizes = [
            x.untyped_storage().nbytes() // x.itemsize
            for x in tree_leaves(found)
            if isinstance(x, torch.Tensor)
        ]
        self.numbers = max(self.numbers, *sizes, 0)
        return found


@each_case
def test_no_matrix(case, monkeypatch):
    monkeypatch.setattr(tiles, "BYTES", {"cpu": 1})
    count, columns = 200, 300
    call = problem(*case, count=count, columns=columns, depth=3)
    limit = 64 * (count + columns)
    if call.get("negative_keys") is not None and call["negative_keys"].dim() == 3:
        limit = (3 + 2) * count * columns  # the rows themselves
    with Largest() as largest:
        results(fastnce.info_nce, call, backend="blocks")
    assert 0 < largest.numbers <= limit


@each_backend
def test_one_element_is_the_temperature_of_all(backend, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the plain call does more than it must")

    query, key = gaussian(5, 4), gaussian(5, 4, seed=1)
    expected = fastnce.info_nce(query, key, temperature=0.3, backend=backend)
    per_query = fastnce.info_nce(
        query, key, temperature=torch.full((5,), 0.3).double(), backend=backend
    )
    torch.testing.assert_close(per_query, expected)
    monkeypatch.setattr(sys.modules["fastnce.ops.info_nce"], "softmax_of", fail)
    for shape in ((), (1,), (1, 1)):
        leaf = torch.full(shape, 0.3).double().requires_grad_()
        loss = fastnce.info_nce(query, key, temperature=leaf, backend=backend)
        torch.testing.assert_close(loss.detach(), expected)
        assert torch.autograd.grad(loss, leaf)[0].shape == shape
    fastnce.info_nce(query, key, margin=0, query_ids=torch.arange(5), backend=backend)


@each_backend
def test_negatives_without_ids_are_those_of_every_query(backend):
    """A mask, or a weight of 0, gives them none."""
    query, key, negatives = gaussian(3, 4), gaussian(3, 4, seed=1), gaussian(4, 4, seed=2)
    counts = torch.tensor([True, False, True, True])
    ids = {"query_ids": torch.arange(3), "in_batch_negatives": True, "backend": backend}
    expected = fastnce.info_nce(query, key, negatives[counts], **ids)
    for left_in in ({"negative_mask": counts}, {"negative_weights": counts.double()}):
        found = fastnce.info_nce(query, key, negatives, **ids, **left_in)
        torch.testing.assert_close(found, expected)


@each_backend
@pytest.mark.parametrize("option", ["hardness", "negative_bias"])
def test_padding_may_be_nan(backend, option):
    rows = [gaussian(4, 3, seed=i) for i in range(3)]
    rows[2][1] = torch.nan
    leaves = [x.requires_grad_() for x in rows]
    counts = torch.tensor([True, False, True, True])
    given_option = {option: NUMBERS.get(option, torch.zeros(4))}
    loss = fastnce.info_nce(*leaves, negative_mask=counts, **given_option, backend=backend)
    assert all(x.isfinite().all() for x in (loss, *torch.autograd.grad(loss, leaves)))


@each_backend
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("option", ["margin", "angular_margin", "hardness"])
def test_a_query_without_negatives_has_no_loss(backend, option, decoupled):
    rows = [gaussian(3, 4, seed=i).requires_grad_() for i in range(3)]
    call = {option: NUMBERS[option], "negative_weights": torch.zeros(3), "decoupled": decoupled}
    losses = fastnce.info_nce(*rows, **call, reduction="none", backend=backend)
    assert torch.equal(losses, torch.zeros(3).double())
    assert all(
        torch.equal(x, torch.zeros(3, 4).double()) for x in torch.autograd.grad(losses.sum(), rows)
    )


@each_backend
def test_ranks_are_those_without_margin_or_hardness(backend):
    call = problem("symmetric", "margin", "mask", count=9)
    expected = fastnce.info_nce(**{**call, "margin": 0.0}, return_rank=True, backend=backend)[1]
    for option in ("margin", "hardness"):
        given = {**call, "margin": 0.0, option: 0.4}
        assert torch.equal(
            fastnce.info_nce(**given, return_rank=True, backend=backend)[1], expected
        )


def test_an_angular_margin_at_the_ends_of_the_angle():
    """Of equal rows the angle's gradient is undefined, and 0 is taken; towards pi the positive's logit goes on falling."""
    x = F.normalize(gaussian(4, 5), dim=1).requires_grad_()
    call = {"angular_margin": 0.5, "reduction": "none", "decoupled": True, "temperature": 1.0}
    other = gaussian(1, 5, seed=1)
    same = fastnce.info_nce(x, x.detach(), other, **call)
    cosine = F.normalize(x, dim=1) @ F.normalize(other, dim=1)[0]
    torch.testing.assert_close(same, cosine - math.cos(0.5))
    assert torch.autograd.grad(same.sum(), x)[0].isfinite().all()

    angles = torch.linspace(0, math.pi, 50).double()
    keys = torch.stack([angles.cos(), angles.sin()], dim=1)
    query = torch.tensor([1.0, 0.0]).double().expand(50, 2)
    losses = fastnce.info_nce(query, keys, torch.tensor([[0.0, 1.0]]).double(), **call)
    assert (losses.diff() > 0).all()
    assert losses[-1].item() == pytest.approx(1 + 0.5 * math.sin(0.5))


def test_a_bias_keeps_its_digits_in_products_of_bfloat16():
    bias = uniform(-30, 30, 100, seed=0).float()
    columns = _with_bias(torch.zeros(100, 1), bias)[:, 1:]
    kept = columns.bfloat16().double().sum(dim=1)
    assert ((kept - bias.double()).abs() <= 2.0**-16 * bias.double().abs()).all()


@each_backend
@each_case
def test_autocast_does_not_reach_in(backend, case):
    call = problem(*case)
    expected = results(fastnce.info_nce, call, torch.float32, backend=backend)

    def under_autocast(**given):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fastnce.info_nce(**given)

    found = results(under_autocast, call, torch.float32, backend=backend)
    assert_same(found, expected, 1e-5, 1e-5)


COMPILED = [
    ("batch", "per_query", "key_bias", "angular_margin"),
    ("symmetric", "hardness", "mask"),
    ("shared", "negative_weights", "negative_bias"),
]


@pytest.mark.parametrize("backend", [x for x in RUN if x != "torch"])
@pytest.mark.parametrize("case", COMPILED, ids=" ".join)
def test_compiled(backend, case):
    torch._dynamo.reset()
    compiled = torch.compile(fastnce.info_nce, fullgraph=True, backend="aot_eager")
    call = problem(*case)
    assert_same(
        results(compiled, call, backend=backend), results(fastnce.info_nce, call, backend=backend)
    )


def test_wrong_numbers_that_nobody_reads_are_nan():
    torch._dynamo.reset()
    compiled = torch.compile(fastnce.info_nce, fullgraph=True, backend="eager")
    x = gaussian(3, 4)
    for wrong in (
        {"temperature": torch.tensor([1.0, -1.0, 1.0])},
        {"key_bias": torch.tensor([0, torch.inf, 0])},
    ):
        assert compiled(x, x, **wrong).isnan()


def test_second_derivatives_are_plain_pytorchs_alone():
    x, y = gaussian(4, 3).requires_grad_(), gaussian(4, 3, seed=1)
    for backend in RUN:
        loss = fastnce.info_nce(x, y, margin=0.2, key_bias=torch.zeros(4), backend=backend)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        if backend == "torch":
            assert torch.autograd.grad(grad.square().sum(), x)[0].isfinite().all()
        else:
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(grad.square().sum(), x)


x = torch.randn(4, 3)
ones, wrong, labels = torch.ones(4), torch.tensor([1.0, 2.0, -1.0, 1.0]), torch.arange(4)
inf = torch.tensor([0.0, 0.0, torch.inf, 0.0])
MISTAKES = [
    (ValueError, r"temperature must have the shape \(4,\) \(one for each query, or a tensor of one", {"temperature": torch.ones(2)}),
    (ValueError, r"temperature must be positive and finite, got -1\.0\. Usual", {"temperature": wrong}),
    (TypeError, r"temperature must be floats, got torch.int64\..*temperature\.float", {"temperature": labels}),
    (ValueError, r"temperature of one per query does not go with symmetric=True\. Average", {"temperature": ones, "symmetric": True}),
    (ValueError, r"temperature of one per query does not go with hardness", {"temperature": ones, "hardness": 1.0}),
    (ValueError, r"key_temperature does not go with symmetric=True", {"key_temperature": ones, "symmetric": True}),
    (ValueError, r"key_temperature does not go with negative_keys", {"key_temperature": ones, "negative_keys": x}),
    (ValueError, r"key_temperature must be positive and finite, got inf", {"key_temperature": ones + inf}),
    (ValueError, r"key_temperature is on meta but query is on cpu\. Move", {"key_temperature": ones.to("meta")}),
    (TypeError, r"key_temperature must be a tensor.*got float", {"key_temperature": 2.0}),
    (ValueError, r"key_bias must have the shape \(4,\)", {"key_bias": torch.ones(3)}),
    (ValueError, r"key_bias must be finite, got inf\. Leave a key out with key_mask", {"key_bias": inf}),
    (ValueError, r"negative_bias must be finite, got -inf\. .*negative_mask", {"negative_bias": -inf, "negative_keys": x}),
    (ValueError, r"negative_bias needs negative_keys, got None", {"negative_bias": ones}),
    (ValueError, r"negative_weights needs negative_keys, got None", {"negative_weights": ones}),
    (ValueError, r"negative_weights must be not negative and finite, got -1", {"negative_weights": wrong, "negative_keys": x}),
    (ValueError, r"negative_weights require a gradient", {"negative_weights": torch.ones(4, requires_grad=True), "negative_keys": x}),
    (TypeError, r"margin must be a float, got str", {"margin": "0.1"}),
    (TypeError, r"margin must be a float, got Tensor", {"margin": ones}),
    (ValueError, r"margin must be from .*, got nan", {"margin": math.nan}),
    (ValueError, r"angular_margin must be from 0 to 3\.14159, got 4", {"angular_margin": 4}),
    (ValueError, r"angular_margin needs .*normalize=True, got normalize=False\. Use margin", {"angular_margin": 0.1, "normalize": False}),
    (ValueError, r"hardness must be from 0 .*got -1", {"hardness": -1}),
    (ValueError, r"label_smoothing must be from 0 to 1, got 1\.5", {"label_smoothing": 1.5}),
    (ValueError, r"label_smoothing does not go with decoupled=True", {"label_smoothing": 0.1, "decoupled": True}),
    (ValueError, r"label_smoothing does not go with masks", {"label_smoothing": 0.1, "query_ids": labels}),
    (ValueError, r"label_smoothing does not go with hardness", {"label_smoothing": 0.1, "hardness": 1}),
    (ValueError, r"label_smoothing does not go with negative_weights", {"label_smoothing": 0.1, "negative_weights": ones, "negative_keys": x}),
    (ValueError, r"similarity_dtype goes with no .*shape of the softmax", {"similarity_dtype": torch.float8_e4m3fn, "margin": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "pattern", "options"), MISTAKES)
def test_mistakes_are_one_line(kind, pattern, options):
    with pytest.raises(kind, match=f"^info_nce: {pattern}") as caught:
        fastnce.info_nce(x, x, **options)
    assert "\n" not in str(caught.value)
