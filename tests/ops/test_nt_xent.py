"""NT-Xent against its definition."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastnce import nt_xent, sup_con
from fastnce.testing import Sample, assert_close_to_truth, rows

OP = "nt_xent"


@pytest.fixture(autouse=True)
def supported(backend, needs_support):
    needs_support(OP, backend)


@pytest.fixture
def make(generator):
    return functools.partial(rows, dtype=torch.float64, device="cpu", generator=generator)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_definition(reduction, count, backend, make, generator):
    z1, z2 = make(count, 5), make(count, 5)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    got = nt_xent(z1, z2, temperature=t, reduction=reduction, backend=backend)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / t).masked_fill(torch.eye(2 * count, dtype=torch.bool), -torch.inf)
    target = (torch.arange(2 * count) + count) % (2 * count)
    expected = F.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    got_grads = torch.autograd.grad(got, [z1, z2, t], upstream)
    for x, y in zip(got_grads, torch.autograd.grad(expected, [z1, z2, t], upstream), strict=True):
        torch.testing.assert_close(x, y)


def test_is_sup_con_with_a_class_per_image(backend, make):
    z1, z2 = make(9, 5), make(9, 5)
    image = torch.arange(9)
    expected = sup_con(torch.cat([z1, z2]), torch.cat([image, image]), temperature=0.5)
    torch.testing.assert_close(nt_xent(z1, z2, backend=backend), expected)


def test_views_may_be_exchanged(backend, make):
    z1, z2 = make(9, 5), make(9, 5)
    there = nt_xent(z1, z2, reduction="none", backend=backend)
    back = nt_xent(z2, z1, reduction="none", backend=backend)
    torch.testing.assert_close(there, back.roll(9))


@functools.cache
def shaped_sample(size, dim, tau, dtype):
    generator = torch.Generator().manual_seed(size + dim)
    make = functools.partial(rows, dtype=dtype, device="cpu", generator=generator)
    z1 = make(size, dim)
    arguments = {"z1": z1, "z2": (z1.detach() + make(size, dim, grad=False)).requires_grad_()}
    arguments |= {"temperature": tau, "reduction": "sum" if dtype == torch.float16 else "mean"}
    return Sample(f"{size} {dim} {tau}", arguments)


@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 3), (63, 16), (64, 128), (65, 1000), (252, 27)], ids=str
)
@pytest.mark.parametrize("tau", [0.005, 0.1, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes(shape, tau, dtype, backend, needs_support):
    needs_support(OP, backend, dtype)
    assert_close_to_truth(OP, backend, shaped_sample(*shape, tau, dtype), dtype)


def test_zero_rows(backend, make):
    z1, z2 = make(4, 3).detach(), make(4, 3).detach()
    z1[1], z2[2] = 0, 0
    z1, z2 = z1.requires_grad_(), z2.requires_grad_()
    nt_xent(z1, z2, backend=backend).backward()
    assert z1.grad.isfinite().all() and z2.grad.isfinite().all()
    assert z1.grad[1].eq(0).all() and z2.grad[2].eq(0).all()
