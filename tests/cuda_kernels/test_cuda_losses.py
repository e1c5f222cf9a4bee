"""The losses' CUDA kernels and their host side, in every form, against the reference in fp64."""

import pytest
import torch
from emulated_or_gpu import DEVICE
from loss_forms import (
    IN_BATCH,
    awkward,
    check_a_row_of_nan,
    check_awkward_rows,
    check_form,
    each_form,
    each_labelled_loss,
    each_offset,
    gaussian,
    labelled,
    problem,
)
from torch import Tensor

from fastnce import reference
from fastnce.backends import cuda
from fastnce.testing import Sample, assert_close_to_truth

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")


@each_offset
@each_form
def test_forms(name, tau, monkeypatch):
    if name == "few_rows":  # and many parts of the columns
        monkeypatch.setenv("FASTNCE_EMULATED_MULTIPROCESSORS", "30")
    check_form(cuda, DEVICE, name, tau)


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


@awkward
@pytest.mark.parametrize("tau", [0.005, 0.07, 10.0])
def test_awkward_rows(kind, dtype, tau):
    check_awkward_rows("cuda", DEVICE, kind, dtype, tau)


def test_a_row_of_nan_spoils_its_own_loss_alone():
    check_a_row_of_nan(cuda, DEVICE)


@each_labelled_loss
@pytest.mark.parametrize("tau", [0.005, 0.1, 1.0])
@pytest.mark.parametrize(("count", "dim"), [(70, 20), (50, 270)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_labels(op, tau, count, dim, reduction):
    sample = labelled(op, count, dim, DEVICE, tau=tau, reduction=reduction)
    assert_close_to_truth(op, "cuda", sample, torch.float32)


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
    inputs, options = problem("tail_queue", 0.1, DEVICE)
    found = [
        cuda.info_nce_forward(*inputs, **options, grad_scale=1.0, needs=(True,) * 4) for _ in "ab"
    ]
    flat = [(loss, lse, *grads) for loss, lse, grads in found]
    for a, b in zip(*flat, strict=True):
        assert torch.equal(a, b)
