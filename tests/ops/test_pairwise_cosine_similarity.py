"""Pairwise cosine similarity against torch.nn.functional."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastnce import pairwise_cosine_similarity
from fastnce.testing import Sample, assert_close_to_truth, rows

OP = "pairwise_cosine_similarity"


@pytest.fixture(autouse=True)
def supported(backend, needs_support):
    needs_support(OP, backend)


@pytest.fixture
def make(generator):
    return functools.partial(rows, dtype=torch.float64, device="cpu", generator=generator)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
def test_definition(lead, backend, make, generator):
    x, y = make(*lead, 7, 5), make(*lead, 4, 5)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    got = pairwise_cosine_similarity(x, y, temperature=t, backend=backend)
    expected = F.cosine_similarity(x.unsqueeze(-2), y.unsqueeze(-3), dim=-1) / t
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    got_grads = torch.autograd.grad(got, [x, y, t], upstream)
    for a, b in zip(got_grads, torch.autograd.grad(expected, [x, y, t], upstream), strict=True):
        torch.testing.assert_close(a, b)


def test_with_itself(backend, make):
    x = make(7, 5)
    got = pairwise_cosine_similarity(x, backend=backend)
    torch.testing.assert_close(got.diagonal(), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(got, got.T)
    y = x.detach().clone().requires_grad_()
    both = pairwise_cosine_similarity(x, y, backend=backend)
    (of_x,) = torch.autograd.grad(got.sin().sum(), x)
    torch.testing.assert_close(of_x, sum(torch.autograd.grad(both.sin().sum(), [x, y])))


@functools.cache
def shaped_sample(size, other, dim, dtype):
    generator = torch.Generator().manual_seed(size + dim)
    make = functools.partial(rows, dtype=dtype, device="cpu", generator=generator)
    arguments = {"x": make(size, dim), "y": make(other, dim)}
    arguments["temperature"] = torch.tensor(0.07, requires_grad=True)
    return Sample(f"{size} {other} {dim}", arguments)


SHAPES = [(1, 1, 1), (2, 64, 3), (63, 65, 16), (64, 1, 27), (100, 252, 123), (256, 100, 1536)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shapes(shape, dtype, backend, needs_support):
    needs_support(OP, backend, dtype)
    assert_close_to_truth(OP, backend, shaped_sample(*shape, dtype), dtype)


def test_degenerate_rows(backend, make):
    x = make(4, 3).detach().float()
    x[1], x[2], x[3] = 0, x[0] * -1e20, x[0] * 1e-20
    x.requires_grad_()
    got = pairwise_cosine_similarity(x, backend=backend)
    expected = torch.tensor([[1, 0, -1, 1], [0, 0, 0, 0], [-1, 0, 1, -1], [1, 0, -1, 1]])
    torch.testing.assert_close(got, expected.float())
    (grad,) = torch.autograd.grad(got.sin().sum(), x)
    assert grad.isfinite().all() and grad[1].eq(0).all()


def test_a_bad_row_stays_in_its_row_and_column(backend, make):
    x, y = make(4, 3).detach(), make(5, 3).detach()
    x[2, 1], y[3, 0] = torch.nan, torch.inf
    bad = pairwise_cosine_similarity(x, y, backend=backend).isnan()
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[2], expected[:, 3] = True, True
    assert torch.equal(bad, expected)
