"""The losses' CUDA kernels and their host side, in every form, against the reference in fp64.

On a GPU, or with FASTNCE_CUDA_EMULATED on the host. Memory that PyTorch hands out is filled with NaN, so that what a kernel leaves
unwritten shows.
"""

import pytest
import torch
from torch import Tensor

from fastnce import cuda, reference
from fastnce.testing import Sample, assert_close_to_truth, rows

DEVICE = next(
    (d for d in ("cpu", "cuda") if cuda.supports("info_nce", d, torch.float32) == "ok"), ""
)
if not DEVICE:
    pytest.skip(cuda.supports("info_nce", "cuda", torch.float32), allow_module_level=True)

IN_BATCH = {"normalize": True, "symmetric": False, "in_batch": True, "self_logit": None}
SYMMETRIC = {**IN_BATCH, "symmetric": True}
QUEUE = {**IN_BATCH, "in_batch": False}

# (B, N, D), negatives, options. Depths: of one instruction, ragged, with columns of their own, and deeper than tiles hold.
CASES = {
    "tiles": ((1, 70, 20), None, IN_BATCH),
    "two_chunks": ((1, 40, 150), None, SYMMETRIC),
    "queue_in_batch": ((1, 20, 90), (50, 90), IN_BATCH),
    "batched": ((3, 20, 20), None, SYMMETRIC),
    "batched_queue": ((3, 20, 20), (41, 20), QUEUE),
    "deep": ((1, 20, 530), None, SYMMETRIC),
    "deep_queue": ((1, 12, 270), (30, 270), IN_BATCH),
    "many_parts": ((1, 3, 150), (400, 150), QUEUE),
    "few_columns": ((1, 70, 20), (3, 20), QUEUE),
    "one_row": ((1, 1, 20), None, SYMMETRIC),
    "one_element": ((1, 7, 1), None, IN_BATCH),
    "constant": ((2, 20, 20), None, {**IN_BATCH, "self_logit": -10.0}),
    "dot": ((1, 40, 4), None, {**SYMMETRIC, "normalize": False}),
    "own": ((2, 5, 20), (2, 5, 40, 20), IN_BATCH),
    "own_alone": ((2, 5, 150), (2, 5, 3, 150), QUEUE),
}


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def gaussian(shape, generator, dtype=torch.float64) -> Tensor:
    return rows(*shape, dtype=dtype, device="cpu", generator=generator, grad=False)


def problem(name: str, tau: float):
    shape, negatives, options = CASES[name]
    generator = torch.Generator().manual_seed(0)
    query = gaussian(shape, generator)
    key = 0.3 * query + gaussian(shape, generator)
    if negatives is not None:
        negatives = gaussian(negatives, generator)
    inputs = (query, key, negatives, torch.tensor(tau, dtype=torch.float64))
    return tuple(None if x is None else x.float().to(DEVICE) for x in inputs), options


def assert_close(got, expected, tau: float) -> None:
    """To 1e-5 of the largest number, and to the rounding of logits of size L = 1 / tau in softmaxes times 1 / tau."""
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        logit = max(1.0, 1 / tau)
        count = 1 if index == 0 else logit * (logit * got[0].numel() if b.dim() == 0 else 1)
        bound = 1e-5 * b.abs().max() + 4 * torch.finfo(torch.float32).eps * logit * count
        assert (a.double() - b).abs().max() <= bound, (index, a, b)


@pytest.mark.parametrize("tau", [0.01, 0.1], ids=["running", "fixed"])
@pytest.mark.parametrize("name", CASES)
def test_forms(name, tau, monkeypatch):
    """Gradients with the loss, of one argument alone, and later, from the saved log-sum-exp."""
    if name == "many_parts":
        monkeypatch.setenv("FASTNCE_EMULATED_MULTIPROCESSORS", "30")
    tau = 10 * tau if name == "dot" else tau
    inputs, options = problem(name, tau)
    needs = tuple(x is not None for x in inputs)
    query, key, negatives, temperature = inputs
    loss, lse, now = cuda.info_nce_forward(*inputs, **options, grad_scale=0.25, needs=needs)
    alone = [
        cuda.info_nce_forward(
            query, key, negatives, tau, **options, grad_scale=0.25, needs=[i == j for j in range(4)]
        )[2][i]
        for i in (0, 1)
    ]
    upstream = torch.linspace(-1, 1, loss.numel()).view_as(loss).to(DEVICE)
    later = cuda.info_nce_backward(upstream, *inputs, lse, **options, needs=needs)
    got = [loss, *alone, *(x for x in (*now, *later) if x is not None)]

    leaves = [x if x is None else x.double().requires_grad_() for x in inputs]
    wanted = [x for x in leaves if x is not None]
    exact = reference.info_nce(*leaves, **options)
    weight = torch.full_like(exact, 0.25)
    first = torch.autograd.grad(exact, wanted, weight, retain_graph=True)
    second = torch.autograd.grad(exact, wanted, upstream.double())
    assert_close(got, [exact.detach(), *first[:2], *first, *second], tau)


def embedded(x: Tensor, way: str) -> Tensor:
    """The same values with other strides, NaN beside them."""
    if way == "sliced":
        place = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan)[..., 1::2]
        place = place[..., : x.shape[-1]]
    elif way == "shifted":  # rows side by side, but no address is a multiple of 16 bytes
        place = x.new_full((*x.shape[:-1], x.shape[-1] + 1), torch.nan)[..., 1:]
    else:
        place = x.new_full(tuple(reversed(x.shape)), torch.nan)
        place = place.permute(*range(x.dim() - 1, -1, -1))
    return place.copy_(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["sliced", "shifted", "transposed"])
def test_strides(way, dtype, generator):
    """Bitwise the numbers of contiguous rows."""
    shapes = (2, 9, 24), (2, 9, 24), (2, 9, 5, 24)
    inputs = [gaussian(shape, generator, dtype).to(DEVICE) for shape in shapes]

    def call(inputs, upstream):
        common = {**IN_BATCH, "needs": (True, True, True, False)}
        loss, lse, now = cuda.info_nce_forward(*inputs, 0.1, **common, grad_scale=1.0)
        later = cuda.info_nce_backward(upstream, *inputs, 0.1, lse, **common)
        return [loss, *now[:3], *later[:3]]

    upstream = torch.linspace(-1, 1, 18).view(2, 9).to(DEVICE)
    found = call([embedded(x, way) for x in inputs], embedded(upstream, way))
    for a, b in zip(found, call(inputs, upstream), strict=True):
        assert torch.equal(a, b)
        assert b.isfinite().all()


def test_equal_gradients_that_arrive_and_extreme_ones(generator):
    """One number for all rows (an expanded tensor), all zero, and so small that fp16 has no such number."""
    query, key = (gaussian((1, 9, 24), generator, torch.float16).to(DEVICE) for _ in "qk")
    common = {**IN_BATCH, "needs": (True, False, False, False)}
    _, lse, (now, *_) = cuda.info_nce_forward(query, key, None, 0.1, **common, grad_scale=1.0)

    def backward(value: float) -> Tensor:
        upstream = torch.full((1, 1), value, device=DEVICE).expand(1, 9)
        return cuda.info_nce_backward(upstream, query, key, None, 0.1, lse, **common)[0]

    torch.testing.assert_close(backward(1.0), now, rtol=2e-3, atol=1e-3)
    assert torch.equal(backward(0.0), torch.zeros_like(query))
    assert torch.equal(backward(2.0**-30) != 0, (now.float() * 2.0**-30).half() != 0)


AWKWARD = [
    (kind, dtype)
    for kind in ("identical", "zero", "sizes")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if (kind, dtype) != ("sizes", torch.float16)  # its gradients would be out of range
]


@pytest.mark.parametrize(("kind", "dtype"), AWKWARD)
@pytest.mark.parametrize("tau", [0.005, 0.07, 10.0])
def test_awkward_rows(kind, dtype, tau, generator):
    query, key = (gaussian((20, 12), generator) for _ in "qk")
    if kind == "identical":
        query, key = query[:1].repeat(20, 1), query[:1].repeat(20, 1)
    elif kind == "zero":
        query[3], key[3], key[7] = 0, 0, 0
    else:
        query[::3] *= 1e-20
        key[::2] *= 1e20
    query, key = (x.to(DEVICE, dtype).requires_grad_() for x in (query, key))
    arguments = {"query": query, "positive_key": key, "temperature": tau, "symmetric": True}
    assert_close_to_truth("info_nce", "cuda", Sample(f"{kind} {tau}", arguments), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tau", [0.01, 1.0])
def test_awkward_negatives(dtype, tau, generator):
    """Zero rows, and norms of 1e-20 and 1e20, among each query's own negatives."""
    query, key, own = (gaussian(shape, generator) for shape in ((6, 12), (6, 12), (6, 19, 12)))
    own[:, 3] = 0
    own[:, 4:9] *= 1e-20
    own[:, 9:] *= 1e20
    names = ("query", "positive_key", "negative_keys")
    tensors = (x.to(DEVICE, dtype).requires_grad_() for x in (query, key, own))
    arguments = {**dict(zip(names, tensors, strict=True)), "temperature": tau}
    assert_close_to_truth("info_nce", "cuda", Sample(f"own {tau}", arguments), dtype)


def test_a_row_of_nan_spoils_its_own_loss_alone(generator):
    query, key, queue = (
        gaussian(shape, generator, torch.float32).to(DEVICE)
        for shape in ((1, 9, 20), (1, 9, 20), (30, 20))
    )
    query[0, 4, 7] = torch.nan
    loss, _, (grad, *_) = cuda.info_nce_forward(
        query, key, queue, 0.1, **QUEUE, grad_scale=1.0, needs=(True, False, False, False)
    )
    spoilt = torch.arange(9, device=DEVICE) == 4
    assert torch.equal(loss[0].isnan(), spoilt)
    assert torch.equal(grad[0].isnan().any(-1), spoilt)


@pytest.mark.parametrize("op", ["sup_con", "conditional_contrastive"])
@pytest.mark.parametrize("tau", [0.005, 0.1, 1.0])
@pytest.mark.parametrize("dim", [20, 270])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_labels(op, tau, dim, reduction, generator):
    """Of the whole range of int64, one class with a single row, and more rows than a block of threads."""
    count = 50 if dim > 20 else 70
    x, proxies = (gaussian((count, dim), generator, torch.float32).to(DEVICE) for _ in "xp")
    values = torch.tensor([-(2**63), -1, 0, 2**32, 2**63 - 1])
    labels = values[torch.randint(5, (count,), generator=generator)]
    labels[7] = 99
    arguments = {"labels": labels.to(DEVICE), "reduction": reduction}
    arguments["temperature"] = torch.tensor(tau, device=DEVICE, requires_grad=True)
    names = ("features",) if op == "sup_con" else ("embeddings", "proxies")
    for name, value in zip(names, (x, proxies), strict=False):
        arguments[name] = value.requires_grad_()
    assert_close_to_truth(op, "cuda", Sample("labels", arguments), torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sup_con_of_more_rows_than_a_block_has_threads(reduction, generator):
    x = gaussian((300, 5), generator, torch.float32).to(DEVICE).requires_grad_()
    labels = torch.randint(200, (300,), generator=generator).to(DEVICE)  # many without a positive
    sample = Sample("many", {"features": x, "labels": labels, "reduction": reduction})
    assert_close_to_truth("sup_con", "cuda", sample, torch.float32)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_precision_of_float32_products(precision, generator):
    """bfloat16 factors where they are allowed, and float32's accuracy otherwise."""
    query, key = (gaussian((1, 40, 64), generator, torch.float32).to(DEVICE) for _ in "qk")
    common = {**IN_BATCH, "needs": (True, True, False, False), "grad_scale": 1.0}
    torch.set_float32_matmul_precision(precision)
    try:
        loss, _, grads = cuda.info_nce_forward(query, key, None, 0.1, **common)
    finally:
        torch.set_float32_matmul_precision("highest")
    leaves = [x.double().requires_grad_() for x in (query, key)]
    exact = reference.info_nce(*leaves, None, 0.1, **IN_BATCH)
    expected = [exact.detach(), *torch.autograd.grad(exact.sum(), leaves)]
    off = [
        (a - b).abs().max() / b.abs().max()
        for a, b in zip([loss, *grads[:2]], expected, strict=True)
    ]
    # A logit of 40 products of factors rounded to 8 bits, against sums in float32.
    limit = 2e-2 if precision == "medium" else 1e-5
    assert max(off) <= limit
    assert (max(off) > 1e-4) == (precision == "medium")


def test_repeated_calls_are_bitwise_equal():
    inputs, options = problem("queue_in_batch", 0.1)
    found = [
        cuda.info_nce_forward(*inputs, **options, grad_scale=1.0, needs=(True,) * 4) for _ in "ab"
    ]
    flat = [(loss, lse, *grads) for loss, lse, grads in found]
    for a, b in zip(*flat, strict=True):
        assert torch.equal(a, b)
