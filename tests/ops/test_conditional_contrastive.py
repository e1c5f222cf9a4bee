"""The 2C loss against its definition, over shapes, labels, temperatures and degenerate rows."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastnce import conditional_contrastive
from fastnce.testing import Sample, assert_close_to_truth, rows, run

OP = "conditional_contrastive"


@pytest.fixture(autouse=True)
def supported(backend, needs_support):
    needs_support(OP, backend)


@pytest.fixture
def make(generator):
    return functools.partial(rows, dtype=torch.float64, device="cpu", generator=generator)


def defined(e, p, labels, tau):
    """Sums of exponentials, sample by sample, as in the paper's equation."""
    losses = []
    for i in range(len(e)):
        to_proxy = (F.cosine_similarity(e[i], p[i], dim=0) / tau).exp()
        numerator = denominator = to_proxy
        for j in range(len(e)):
            if j != i:
                term = (F.cosine_similarity(e[i], e[j], dim=0) / tau).exp()
                denominator = denominator + term
                numerator = numerator + term * (labels[j] == labels[i])
        losses.append(-(numerator / denominator).log())
    return torch.stack(losses)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_definition(reduction, tau, backend, make, generator):
    e, p = make(9, 5), make(9, 5)
    labels = torch.tensor([0, 1, 2, 0, 1, 0, 7, 7, -3])
    t = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    got = conditional_contrastive(e, p, labels, temperature=t, reduction=reduction, backend=backend)
    expected = defined(e, p, labels, t)
    if reduction != "none":
        expected = getattr(expected, reduction)()
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    got_grads = torch.autograd.grad(got, [e, p, t], upstream)
    for x, y in zip(got_grads, torch.autograd.grad(expected, [e, p, t], upstream), strict=True):
        torch.testing.assert_close(x, y)


LABELS = {
    "random": lambda n: torch.arange(n) * 7 % 5,
    "one_class": lambda n: torch.zeros(n, dtype=torch.long),
    "all_different": lambda n: torch.arange(n) - 2**62,
}
SIZES = [1, 2, 63, 64, 65, 100, 252, 256, 507]
DIMS = [1, 3, 16, 27, 64, 96, 123, 256, 384, 512, 768, 1000, 1536]
TAUS = [0.005, 0.01, 0.023, 0.07, 0.5, 1.0, 10.0]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
CASES = [
    (SIZES[i % 9], DIMS[(4 * i) % 13], TAUS[(3 * i) % 7], list(LABELS)[(i + i // 9) % 3], i)
    for i in range(27)
]


@functools.cache
def shaped_sample(size, dim, tau, labelling, index, dtype):
    generator = torch.Generator().manual_seed(index)
    make = functools.partial(rows, dtype=dtype, device="cpu", generator=generator)
    # The fp16 gradient of a mean over many rows is below what fp16 resolves.
    reduction = ("sum" if dtype == torch.float16 else "mean", "none", "sum")[index % 3]
    temperature = torch.tensor(tau, requires_grad=True) if index % 2 else tau
    arguments = {"embeddings": make(size, dim), "proxies": make(size, dim)}
    arguments |= {"labels": LABELS[labelling](size), "temperature": temperature}
    return Sample(f"{size} {dim} {tau} {labelling}", arguments | {"reduction": reduction})


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"N{c[0]}-D{c[1]}-tau{c[2]}-{c[3]}")
def test_shapes(case, backend, needs_support):
    dtype = DTYPES[case[-1] % 4]
    needs_support(OP, backend, dtype)
    assert_close_to_truth(OP, backend, shaped_sample(*case, dtype), dtype)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("labelling", LABELS)
def test_temperatures(tau, labelling, backend):
    sample = shaped_sample(65, 16, tau, labelling, 1, torch.float32)
    assert_close_to_truth(OP, backend, sample, torch.float32)


def test_thousands_of_rows(backend):
    sample = shaped_sample(2049, 16, 0.5, "random", 0, torch.float32)
    assert_close_to_truth(OP, backend, sample, torch.float32)


@functools.cache
def degenerate_sample(kind, tau, dtype):
    generator = torch.Generator().manual_seed(5)
    e, p = (torch.randn(20, 12, generator=generator) for _ in range(2))
    if kind == "identical":
        e, p = e[:1].repeat(20, 1), e[:1].repeat(20, 1)
    elif kind == "opposite":
        p = -e
    elif kind == "zero":
        e[3], p[5] = 0, 0
    elif kind == "all_zero":
        e, p = e * 0, p * 0
    elif kind == "norms":
        e[::3] *= 1e-20
        e[1::3] *= 1e20
        p[::2] *= 1e20
        p[1::2] *= 1e-20
    elif kind == "duplicates":
        e[10:] = e[:10].clone()
    arguments = {
        "embeddings": e.to(dtype).requires_grad_(),
        "proxies": p.to(dtype).requires_grad_(),
    }
    arguments |= {"labels": torch.arange(20) % 4, "reduction": "sum"}
    arguments["temperature"] = torch.tensor(tau, requires_grad=True)
    return Sample(f"{kind} {tau}", arguments)


@pytest.mark.parametrize(
    "kind", ["identical", "opposite", "zero", "all_zero", "norms", "duplicates"]
)
@pytest.mark.parametrize("tau", [0.005, 0.07, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_degenerate_rows(kind, tau, dtype, backend, needs_support):
    needs_support(OP, backend, dtype)
    assert_close_to_truth(OP, backend, degenerate_sample(kind, tau, dtype), dtype)


def test_zero_rows_get_the_gradient_zero(backend):
    sample = degenerate_sample("zero", 0.5, torch.float32)
    got = run(OP, sample, backend=backend)
    assert got["d embeddings"].isfinite().all() and got["d proxies"].isfinite().all()
    assert got["d embeddings"][3].eq(0).all() and got["d proxies"][5].eq(0).all()
    assert got["d embeddings"][4].abs().sum() > 0


def test_one_class_loses_nothing(backend, make):
    e, p = make(9, 5), make(9, 5)
    losses = conditional_contrastive(
        e, p, torch.zeros(9, dtype=torch.long), reduction="none", backend=backend
    )
    torch.testing.assert_close(losses, torch.zeros(9, dtype=torch.float64))
    de, dp = torch.autograd.grad(losses.sum(), [e, p])
    torch.testing.assert_close(de, torch.zeros_like(de))
    torch.testing.assert_close(dp, torch.zeros_like(dp))


def test_permuting_samples_permutes_losses_and_gradients(backend, make):
    e, p = make(30, 5), make(30, 5)
    labels = torch.arange(30) % 4
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    losses = conditional_contrastive(e, p, labels, reduction="none", backend=backend)
    permuted = conditional_contrastive(
        e[order], p[order], labels[order], reduction="none", backend=backend
    )
    torch.testing.assert_close(losses[order], permuted)
    weights = torch.arange(30.0, dtype=torch.float64)
    plain = torch.autograd.grad((losses * weights).sum(), [e, p])
    through = torch.autograd.grad((permuted * weights[order]).sum(), [e, p])
    torch.testing.assert_close(plain, through)


def test_renaming_classes_changes_nothing(backend, make):
    e, p = make(30, 5), make(30, 5)
    labels = torch.arange(30) % 4
    names = torch.tensor([2**62, -(2**62), 5, 2**33 + 5])  # equal in their lower 32 bits
    plain = conditional_contrastive(e, p, labels, reduction="none", backend=backend)
    renamed = conditional_contrastive(e, p, names[labels], reduction="none", backend=backend)
    torch.testing.assert_close(plain, renamed)


def test_gradients_have_no_part_along_the_row(backend, make):
    e, p = make(30, 5), make(30, 5)
    loss = conditional_contrastive(e, p, torch.arange(30) % 4, backend=backend)
    for x, grad in zip((e, p), torch.autograd.grad(loss, [e, p]), strict=True):
        torch.testing.assert_close((x * grad).sum(dim=-1), torch.zeros(30, dtype=torch.float64))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_proxy_changes_its_own_loss_only(bad, backend, make):
    e, p = make(30, 5).detach().float(), make(30, 5).detach().float()
    labels = torch.arange(30) % 4
    clean = conditional_contrastive(e, p, labels, reduction="none", backend=backend)
    p[7, 2] = bad
    got = conditional_contrastive(e, p, labels, reduction="none", backend=backend)
    assert got[7].isnan()
    others = torch.arange(30) != 7
    assert torch.equal(got[others], clean[others])
    e[3, 0] = bad  # is a term of every sum
    assert conditional_contrastive(e, p, labels, reduction="none", backend=backend).isnan().all()


def test_embeddings_may_be_their_own_proxies(backend, make):
    x = make(12, 5)
    y, z = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    labels = torch.arange(12) % 3
    one = torch.autograd.grad(conditional_contrastive(x, x, labels, backend=backend), x)[0]
    two = torch.autograd.grad(conditional_contrastive(y, z, labels, backend="torch"), [y, z])
    torch.testing.assert_close(one, two[0] + two[1])


def test_large_call_is_repeatable_in_deterministic_mode(backend):
    sample = shaped_sample(507, 64, 0.5, "random", 1, torch.float32)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(OP, sample, backend=backend) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)
