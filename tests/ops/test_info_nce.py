"""InfoNCE against its definition, over shapes, temperatures and degenerate rows."""

import functools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

from fastnce import info_nce
from fastnce.testing import Sample, assert_close_to_truth, rows, run

OP = "info_nce"


@pytest.fixture(autouse=True)
def supported(backend, needs_support):
    needs_support(OP, backend)


@pytest.fixture
def make(generator):
    return functools.partial(rows, dtype=torch.float64, device="cpu", generator=generator)


def forms(make):
    """query and key (2, 9, 6), a queue (11, 6), each query's own negatives (2, 9, 4, 6)."""
    return make(2, 9, 6), make(2, 9, 6), make(11, 6), make(2, 9, 4, 6)


# The definition, typed from torch.nn.functional. Every form for one batch element.
def cosine(a, b):
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def defined_in_batch(q, k, n, tau):
    return F.cross_entropy(cosine(q, k) / tau, torch.arange(len(q)), reduction="none")


def defined_symmetric(q, k, n, tau):
    target = torch.arange(len(q))
    there = F.cross_entropy(cosine(q, k) / tau, target, reduction="none")
    return (there + F.cross_entropy(cosine(k, q) / tau, target, reduction="none")) / 2


def defined_queue(q, k, n, tau):
    logits = torch.cat([F.cosine_similarity(q, k).unsqueeze(1), cosine(q, n)], dim=1) / tau
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long), reduction="none")


def defined_queue_in_batch(q, k, n, tau):
    logits = torch.cat([cosine(q, k), cosine(q, n)], dim=1) / tau
    return F.cross_entropy(logits, torch.arange(len(q)), reduction="none")


def defined_own(q, k, n, tau):
    negatives = F.cosine_similarity(q.unsqueeze(1), n, dim=-1)
    logits = torch.cat([F.cosine_similarity(q, k).unsqueeze(1), negatives], dim=1) / tau
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long), reduction="none")


def defined_own_in_batch(q, k, n, tau):
    logits = torch.cat([cosine(q, k), F.cosine_similarity(q.unsqueeze(1), n, dim=-1)], dim=1) / tau
    return F.cross_entropy(logits, torch.arange(len(q)), reduction="none")


DEFINITIONS = {
    "in_batch": (defined_in_batch, None, {}),
    "symmetric": (defined_symmetric, None, {"symmetric": True}),
    "queue": (defined_queue, "queue", {}),
    "queue_in_batch": (defined_queue_in_batch, "queue", {"in_batch_negatives": True}),
    "own": (defined_own, "own", {}),
    "own_in_batch": (defined_own_in_batch, "own", {"in_batch_negatives": True}),
}


@pytest.mark.parametrize("form", DEFINITIONS)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_definition(form, batched, reduction, backend, make, generator):
    defined, kind, options = DEFINITIONS[form]
    q, k, queue, own = forms(make)
    if not batched:
        q, k, own = (x.detach()[0].requires_grad_() for x in (q, k, own))
    negatives = {None: None, "queue": queue, "own": own}[kind]
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    leaves = [x for x in (q, k, negatives, tau) if x is not None]
    got = info_nce(
        q, k, negatives, temperature=tau, reduction=reduction, backend=backend, **options
    )
    if batched:
        own_of = [negatives[b] if kind == "own" else negatives for b in range(2)]
        expected = torch.stack([defined(q[b], k[b], own_of[b], tau) for b in range(2)])
    else:
        expected = defined(q, k, negatives, tau)
    if reduction != "none":
        expected = getattr(expected, reduction)()
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    got_grads = torch.autograd.grad(got, leaves, upstream)
    for x, y in zip(got_grads, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(x, y)


def test_definition_without_normalisation(backend, make):
    q, k, *_ = forms(make)
    q, k = q.detach()[0].requires_grad_(), k.detach()[0].requires_grad_()
    expected = F.cross_entropy(q @ k.T / 2.0, torch.arange(9))
    got = info_nce(q, k, temperature=2.0, normalize=False, backend=backend)
    torch.testing.assert_close(got, expected)
    for x, y in zip(
        torch.autograd.grad(got, [q, k]), torch.autograd.grad(expected, [q, k]), strict=True
    ):
        torch.testing.assert_close(x, y)


SIZES = [1, 2, 63, 64, 65, 100, 252, 256, 507]
DIMS = [1, 3, 16, 27, 64, 96, 123, 256, 384, 512, 768, 1000, 1536]
TAUS = [0.005, 0.01, 0.023, 0.07, 0.5, 1.0, 10.0]
FORMS = ["in_batch", "symmetric", "queue", "queue_in_batch", "own", "batched"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


def covering_cases():
    """Every size with every form, every width and every temperature at least once; neighbours differ in all of them."""
    for index in range(54):
        size, form = SIZES[index % 9], FORMS[(index + index // 9) % 6]
        yield (
            size,
            SIZES[(5 * index + 3) % 9],
            DIMS[(index * 4) % 13],
            TAUS[(index * 3) % 7],
            form,
            index,
        )


@functools.cache
def shaped_sample(size, other, dim, tau, form, index, dtype) -> Sample:
    generator = torch.Generator().manual_seed(index)
    make = functools.partial(rows, dtype=dtype, device="cpu", generator=generator)
    shape = (3, size, dim) if form == "batched" else (size, dim)
    query = make(*shape)
    key = (query.detach() + 0.7 * make(*shape).detach()).requires_grad_()
    temperature = torch.tensor(tau, requires_grad=True) if index % 2 else tau
    arguments = {"query": query, "positive_key": key, "temperature": temperature}
    if form.startswith("queue"):
        arguments["negative_keys"] = make(other, dim)
        arguments["in_batch_negatives"] = form == "queue_in_batch"
    elif form == "own":
        arguments["negative_keys"] = make(size, min(other, 10), dim)
    elif form == "symmetric":
        arguments["symmetric"] = True
    # The fp16 gradient of a mean over many rows is below what fp16 resolves.
    arguments["reduction"] = ("sum" if dtype == torch.float16 else "mean", "none", "sum")[index % 3]
    return Sample(f"N{size} M{other} D{dim} tau{tau} {form}", arguments)


@pytest.mark.parametrize(
    "case", list(covering_cases()), ids=lambda c: f"{c[4]}-N{c[0]}-M{c[1]}-D{c[2]}-tau{c[3]}"
)
def test_shapes(case, backend, needs_support):
    dtype = DTYPES[case[-1] % 4]
    needs_support(OP, backend, dtype)
    assert_close_to_truth(OP, backend, shaped_sample(*case, dtype), dtype)


@pytest.mark.parametrize("form", ["in_batch", "queue"])
def test_thousands_of_rows(form, backend):
    size, other = (4097, 1) if form == "in_batch" else (65, 4097)
    sample = shaped_sample(size, other, 27, 0.07, form, 1, torch.float32)
    assert_close_to_truth(OP, backend, sample, torch.float32)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("form", ["in_batch", "symmetric", "queue"])
def test_temperatures(tau, learned, form, backend):
    assert_close_to_truth(OP, backend, tau_sample(tau, learned, form), torch.float32)


@functools.cache
def tau_sample(tau, learned, form):
    return shaped_sample(40, 65, 16, tau, form, int(learned), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_temperature_of_any_dtype_gets_a_gradient_of_its_own(dtype, backend, make):
    q, k = make(8, 5).float(), make(8, 5).float()
    tau = torch.tensor(0.25, dtype=dtype, requires_grad=True)
    info_nce(q, k, temperature=tau, backend=backend).backward()
    exact = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    info_nce(q.double(), k.double(), temperature=exact, backend="torch").backward()
    assert tau.grad.dtype == dtype and tau.grad.shape == ()
    torch.testing.assert_close(tau.grad.double(), exact.grad, rtol=1e-2, atol=0)


def degenerate(kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query (20, 12), key (20, 12), negatives (30, 12) of an awkward kind."""
    generator = torch.Generator().manual_seed(5)
    make = functools.partial(
        rows, dtype=torch.float64, device="cpu", generator=generator, grad=False
    )
    q, k, n = make(20, 12), make(20, 12), make(30, 12)
    tiny, huge = (1e-6, 2e4) if dtype == torch.float16 else (1e-20, 1e20)
    if kind == "identical":
        q, k, n = q[:1].repeat(20, 1), q[:1].repeat(20, 1), q[:1].repeat(30, 1)
    elif kind == "opposite":  # every cosine -1
        q, k, n = q[:1].repeat(20, 1), -q[:1].repeat(20, 1), -q[:1].repeat(30, 1)
    elif kind == "one_opposite":  # the positive is the worst key
        k = -q
    elif kind == "zero":
        q[3], k[3], k[7], n[0] = 0, 0, 0, 0
    elif kind == "all_zero":
        q, k, n = q * 0, k * 0, n * 0
    elif kind == "norms":
        q[::3] *= tiny
        q[1::3] *= huge
        k[::2] *= huge
        k[1::2] *= tiny
        n[::2] *= tiny
    elif kind == "duplicates":  # of the positive, among the negatives
        k = q + 0.1 * k
        k[1::2] = k[::2].clone()
        n[:20] = k
    return tuple(x.to(dtype).requires_grad_() for x in (q, k, n))


@functools.cache
def degenerate_sample(kind, tau, form, dtype):
    q, k, n = degenerate(kind, dtype)
    arguments = {"query": q, "positive_key": k, "temperature": torch.tensor(tau).requires_grad_()}
    if form.startswith("queue"):
        arguments |= {"negative_keys": n, "in_batch_negatives": form == "queue_in_batch"}
    arguments |= {"symmetric": form == "symmetric", "reduction": "sum"}
    return Sample(f"{kind} tau {tau} {form}", arguments)


@pytest.mark.parametrize(
    "kind",
    ["identical", "opposite", "one_opposite", "zero", "all_zero", "norms", "duplicates"],
)
@pytest.mark.parametrize("tau", [0.005, 0.07, 1.0])
@pytest.mark.parametrize("form", ["in_batch", "symmetric", "queue", "queue_in_batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_degenerate_rows(kind, tau, form, dtype, backend, needs_support):
    needs_support(OP, backend, dtype)
    assert_close_to_truth(OP, backend, degenerate_sample(kind, tau, form, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_zero_rows_have_cosine_zero_and_gradient_zero(dtype, reduction, backend, needs_support):
    needs_support(OP, backend, dtype)
    q, k, n = degenerate("zero", dtype)
    losses = info_nce(q, k, n, in_batch_negatives=True, reduction=reduction, backend=backend)
    losses.sum().backward()
    for x, zeros in ((q, [3]), (k, [3, 7]), (n, [0])):
        assert torch.isfinite(x.grad).all()
        assert x.grad[zeros].eq(0).all()
        assert x.grad.abs().sum() > 0
    if (
        reduction == "none"
    ):  # a zero query is equally far from its positive, 19 keys and 30 negatives
        torch.testing.assert_close(
            losses[3].item(), torch.tensor(50.0).log().item(), rtol=1e-6, atol=0
        )


def test_number_of_threads_leaves_the_result_within_rounding(backend):
    sample = shaped_sample(507, 1, 64, 0.07, "symmetric", 1, torch.float32)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert_close_to_truth(OP, backend, sample, torch.float32)


@pytest.mark.parametrize("form", ["in_batch", "symmetric", "queue_in_batch", "own"])
def test_large_call_is_repeatable_in_deterministic_mode(form, backend):
    sample = shaped_sample(507, 256, 64, 0.07, form, 1, torch.float32)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(OP, sample, backend=backend) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


@hypothesis.given(
    batch=st.integers(1, 3),
    size=st.integers(1, 70),
    other=st.integers(1, 70),
    dim=st.integers(1, 40),
    tau=st.floats(0.02, 5),
    form=st.sampled_from(
        ["in_batch", "symmetric", "queue", "queue_in_batch", "own", "own_in_batch"]
    ),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    normalize=st.booleans(),
    seed=st.integers(0, 1000),
)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_any_call(backend, batch, size, other, dim, tau, form, reduction, normalize, seed):
    generator = torch.Generator().manual_seed(seed)
    make = functools.partial(rows, dtype=torch.float32, device="cpu", generator=generator)
    arguments = {"query": make(batch, size, dim), "positive_key": make(batch, size, dim)}
    if form.startswith("queue"):
        arguments["negative_keys"] = make(other, dim)
    elif form.startswith("own"):
        arguments["negative_keys"] = make(batch, size, min(other, 6), dim)
    if form != "symmetric" and "negative_keys" in arguments:
        arguments["in_batch_negatives"] = form.endswith("in_batch")
    arguments["symmetric"] = form == "symmetric"
    arguments |= {"temperature": tau, "reduction": reduction, "normalize": normalize}
    assert_close_to_truth(OP, backend, Sample(str(arguments), arguments), torch.float32)
