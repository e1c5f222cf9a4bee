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


def identity(x):
    return x


def transposed(x):
    return x.mT.contiguous().mT


def apart(x):
    """Every second column of every second row, NaN between."""
    buffer = torch.full((*x.shape[:-2], 2 * x.shape[-2], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
    buffer[..., ::2, ::2] = x
    return buffer[..., ::2, ::2]


def reversed_sides(x):
    """The leading dimensions in another order in memory."""
    return x.movedim(0, 1).contiguous().movedim(0, 1)


# Several panels of rows, blocks and slabs of columns; few columns, where the sides change places; many small problems.
LARGE = {
    "panels": ((1300, 40), (700, 40)),
    "few_columns": ((1300, 40), (30, 40)),
    "few_rows": ((5, 33), (2100, 33)),
    "odd": ((2, 301, 7), (2, 155, 7)),
    "many": ((4, 9, 50, 21), (4, 9, 61, 21)),
}


@functools.cache
def large_problem(name, dtype, itself):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=generator).to(dtype) for shape in LARGE[name])
    columns = x if itself else y
    noise = torch.randn(*x.shape[:-1], columns.shape[-2], generator=generator)
    # With a part along the cosines, for otherwise the temperature's gradient is a sum that cancels.
    cosines = F.normalize(x.float(), dim=-1) @ F.normalize(columns.float(), dim=-1).mT
    return x, y, (noise + 3 * cosines).to(dtype)


def results(name, backend, dtype, itself=False, layout=identity, needs=(True, True, True)):
    """The result and the gradients of x, y and the temperature, of those that are needed."""
    x, y, upstream = large_problem(name, dtype, itself)
    # The reference in fp64, of the numbers that the dtype holds.
    wide = torch.float64 if backend == "torch" else dtype
    t = torch.tensor(0.3, dtype=torch.promote_types(wide, torch.float32))
    leaves = [x.to(wide), t] if itself else [x.to(wide), y.to(wide), t]
    leaves = [a.clone().requires_grad_(need) for a, need in zip(leaves, needs, strict=False)]
    out = pairwise_cosine_similarity(*leaves[:-1], temperature=leaves[-1], backend=backend)
    wanted = [a for a in leaves if a.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, layout(upstream.to(wide)))]


def assert_near(got, expected, limit):
    for a, b in zip(got, expected, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < limit


@pytest.mark.parametrize("itself", [False, True], ids=["two", "itself"])
@pytest.mark.parametrize("name", LARGE)
def test_blocks_add_up(name, itself, backend):
    expected = results(name, "torch", torch.float64, itself)
    assert_near(results(name, backend, torch.float64, itself), expected, 1e-13)
    assert_near(results(name, backend, torch.float32, itself), expected, 2e-6)
    half = results(name, "torch", torch.bfloat16, itself)
    assert_near(results(name, backend, torch.bfloat16, itself), half, 6e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("itself", [False, True], ids=["two", "itself"])
def test_strides_of_the_upstream_gradient_change_no_bit(itself, dtype, backend):
    for name in LARGE:
        expected = results(name, backend, dtype, itself)
        many = name == "many"
        for layout in (transposed, apart, *((reversed_sides,) if many else ())):
            got = results(name, backend, dtype, itself, layout)
            # PyTorch's own products depend on the layout.
            for a, b in zip(got, expected, strict=True):
                assert torch.equal(a, b) if backend == "native" else torch.allclose(a, b, atol=0.1)


def test_an_expanded_upstream_gradient(backend, make):
    x, y = make(60, 5), make(50, 5)
    out = pairwise_cosine_similarity(x, y, backend=backend)
    expanded = torch.autograd.grad(out.sum(), [x, y], retain_graph=True)
    whole = torch.autograd.grad(out, [x, y], torch.ones(60, 50, dtype=torch.float64))
    for a, b in zip(expanded, whole, strict=True):
        torch.testing.assert_close(a, b)


NEEDS = [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_gradients_asked_for_alone(name, needs, backend):
    _, *together = results(name, "torch", torch.float64)
    expected = [grad for grad, need in zip(together, needs, strict=True) if need]
    assert_near(results(name, backend, torch.float64, needs=needs)[1:], expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LARGE)
def test_thread_count_changes_no_bit(name, dtype, fused_backend):
    for itself in (False, True):
        torch.set_num_threads(1)
        expected = results(name, fused_backend, dtype, itself)
        for count in (2, 3):
            torch.set_num_threads(count)
            for a, b in zip(results(name, fused_backend, dtype, itself), expected, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_itself_is_exactly_symmetric(dtype, backend, generator):
    if backend == "torch":
        pytest.skip("PyTorch's products are not")
    x = torch.randn(700, 40, generator=generator).to(dtype)
    got = pairwise_cosine_similarity(x, temperature=0.07, backend=backend)
    assert torch.equal(got, got.T)
    same = pairwise_cosine_similarity(x, x, temperature=0.07, backend=backend)
    assert torch.equal(got, same)
    other = pairwise_cosine_similarity(x, x.clone(), temperature=0.07, backend=backend)
    torch.testing.assert_close(got, other)


def test_medium_precision_rounds_the_factors(backend):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        for itself in (False, True):
            expected = results("panels", "torch", torch.float64, itself)
            assert_near(results("panels", backend, torch.float32, itself), expected, 6e-3)
    finally:
        torch.set_float32_matmul_precision(before)
