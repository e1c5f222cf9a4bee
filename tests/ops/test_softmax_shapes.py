"""Temperatures and biases of rows, margins, hardness and label smoothing against their equations, as matrices in double."""

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
    or ``eps L^2 / t`` where it is that of numbers.
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
        assert (ours[name] - x).abs().max() <= 2 * (theirs[name] - x).abs().max() + bound, name
