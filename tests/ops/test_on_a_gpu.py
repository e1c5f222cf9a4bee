"""What only a GPU can show: CUDA graphs, streams, several devices, addresses beyond 2^31. Skipped without one."""

import pytest
import torch
from forms import LOSSES, OPS, call, mapped, tensors_of, typical
from torch import Tensor

import fastnce
from fastnce import backends
from fastnce.testing import Sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FUSED = [name for name in backends.names() if name not in ("torch", "native")]
each_backend = pytest.mark.parametrize("gpu_backend", FUSED)
each_op = pytest.mark.parametrize("op", OPS)


@pytest.fixture
def sample(op, gpu_backend) -> Sample:
    reason = backends.supports(gpu_backend, op, "cuda", torch.float32)
    if reason != "ok":
        pytest.skip(f"{gpu_backend}: {reason}")
    return mapped(typical(op, device="cuda"), "", torch.clone)


def loss_and_gradients(op: str, sample: Sample, backend: str) -> list[Tensor]:
    results = call(op, sample, backend)
    leaves = [x for x in tensors_of(sample) if x.requires_grad]
    total = sum(x.float().square().sum() for x in results)
    return [x.detach() for x in results] + list(torch.autograd.grad(total, leaves))


def refill(sample: Sample) -> None:
    """Other numbers in the same memory."""
    with torch.no_grad():
        for x in tensors_of(sample):
            if x.is_floating_point() and x.dim() > 0:
                x.copy_(x.flip(0) * 0.5 + 0.1)


@each_backend
@each_op
def test_a_graph_replays_with_new_numbers(op, gpu_backend, sample):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            loss_and_gradients(op, sample, gpu_backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradients(op, sample, gpu_backend)
    for _ in range(2):
        refill(sample)
        graph.replay()
        assert all(map(torch.equal, captured, loss_and_gradients(op, sample, gpu_backend)))


@each_backend
@each_op
def test_work_is_put_into_the_current_stream(op, gpu_backend, sample):
    final = mapped(sample, "", torch.clone)
    refill(final)
    expected = loss_and_gradients(op, final, gpu_backend)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # About 0.1 s: what does not queue behind it reads the old numbers.
        torch.cuda._sleep(200_000_000)
        refill(sample)
        got = loss_and_gradients(op, sample, gpu_backend)
    side.synchronize()
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("op", LOSSES)
def test_no_temperature_makes_the_host_wait(op):
    """Of the host's a kernel takes the number; of the GPU's that is not positive, nobody reads that the loss is NaN."""
    sample, host = typical(op, device="cuda"), torch.tensor([0.5])
    for tau in (host, torch.nn.Parameter(host), torch.tensor(-0.5, device="cuda")):
        torch.cuda.set_sync_debug_mode("error")
        try:
            (loss,) = call(op, sample, None, temperature=tau)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert loss.isnan().all() if tau.is_cuda else loss.isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_backend
@each_op
def test_a_device_that_is_not_the_current_one(op, gpu_backend, sample):
    there = mapped(sample, "", lambda x: x.to("cuda:1"))
    with torch.cuda.device(0):
        got = loss_and_gradients(op, there, gpu_backend)
    for x, y in zip(got, loss_and_gradients(op, sample, gpu_backend), strict=True):
        assert x.device == torch.device("cuda:1")
        torch.testing.assert_close(x.cpu(), y.cpu())


@each_backend
def test_addresses_beyond_2_31(gpu_backend):
    rows, depth = 2**21 + 77, 1024  # 4 GiB in bfloat16; more than 2^31 elements
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    if backends.supports(gpu_backend, "info_nce", "cuda", torch.bfloat16) != "ok":
        pytest.skip(f"{gpu_backend} does not run here")
    generator = torch.Generator("cuda").manual_seed(0)
    like = {"dtype": torch.bfloat16, "device": "cuda"}
    queue = torch.zeros(rows, depth, **like)
    # All but the last rows are zero, with cosine 0: only right addresses find the others.
    queue[-64:].normal_(generator=generator)
    query, key = (torch.randn(128, depth, generator=generator, **like) for _ in "qk")
    query.requires_grad_()
    loss = fastnce.info_nce(query, key, queue, temperature=0.05, backend=gpu_backend)
    (got,) = torch.autograd.grad(loss, query)
    q = query.detach().double().requires_grad_()
    tail = torch.nn.functional.normalize(queue[-64:].double(), dim=1)
    q_hat = torch.nn.functional.normalize(q, dim=1)
    positive = (q_hat * torch.nn.functional.normalize(key.double(), dim=1)).sum(1) / 0.05
    zeros = torch.full_like(positive, rows - 64).log().unsqueeze(1)
    logits = torch.cat([positive.unsqueeze(1), zeros, q_hat @ tail.mT / 0.05], dim=1)
    expected = (logits.logsumexp(1) - positive).mean()
    (true,) = torch.autograd.grad(expected, q)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)
    assert (got.double() - true).norm() < 0.02 * true.norm()
