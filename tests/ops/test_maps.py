"""The ops over feature maps (conv3x3, instance_norm, blur_resample): the compiled kernels against plain PyTorch in double."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from forms import gaussian
from torch import Tensor

import fastnce
from fastnce.backends import native
from fastnce.ops import maps
from fastnce.ops.blur_resample import blur_kernel, blur_resample
from fastnce.ops.conv3x3 import conv3x3
from fastnce.ops.instance_norm import instance_norm

needs_kernels = pytest.mark.skipif(native.available() != "ok", reason=native.available())
# Relative errors, in the norm of all elements: rounding of sums for float32, of the result for bfloat16.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3}


@dataclasses.dataclass(frozen=True)
class Case:
    """An op of the first inputs, which are maps or weights; and their shapes."""

    op: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    maps: int = 1  # how many of the inputs are maps


def _conv(reflect: bool, maps_shape, outputs: int) -> Case:
    shapes = (maps_shape, (outputs, maps_shape[1], 3, 3), (outputs,))
    return Case(lambda x, w, b: conv3x3(x, w, b, reflect=reflect), shapes)


def _resample(halve: bool, shape) -> Case:
    return Case(
        lambda x: blur_resample(x, blur_kernel(shape[1], halve=halve).to(x), halve=halve), (shape,)
    )


CASES = {
    "conv_zeros": _conv(False, (2, 32, 12, 16), 64),
    "conv_reflect": _conv(True, (2, 32, 12, 16), 64),
    # Sizes that are no multiple of a tile, blocks of channels that are not full, more tiles than a block.
    "conv_zeros_odd": _conv(False, (1, 48, 7, 9), 80),
    "conv_reflect_odd": _conv(True, (3, 16, 13, 30), 16),
    "conv_reflect_smallest": _conv(True, (2, 16, 2, 3), 32),
    "conv_many_channels": _conv(True, (1, 288, 8, 8), 48),
    "norm": Case(lambda x: instance_norm(x), ((2, 32, 9, 7),)),
    "norm_relu": Case(lambda x: instance_norm(x, slope=0.0), ((2, 80, 20, 20),)),
    "norm_leaky": Case(lambda x: instance_norm(x, slope=0.2), ((3, 16, 5, 5),)),
    "norm_residual": Case(lambda x, y: instance_norm(x, y), ((2, 32, 18, 18),) * 2, maps=2),
    "halve_even": _resample(True, (2, 32, 8, 10)),
    "halve_odd": _resample(True, (2, 16, 7, 5)),
    "halve_smallest": _resample(True, (1, 16, 2, 3)),
    "double": _resample(False, (2, 32, 5, 4)),
    "double_smallest": _resample(False, (1, 16, 2, 2)),
}


def inputs_of(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Maps of `dtype`, not centred at 0; weights of float32."""
    found = [gaussian(*shape, seed=seed).float() for seed, shape in enumerate(case.shapes)]
    return [
        (x * 2 + 3).to(dtype) if index < case.maps else x / x[0].numel() ** 0.5
        for index, x in enumerate(found)
    ]


def results(case: Case, inputs: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The result and the gradients of all inputs; the upstream gradient as `dtype`, the result's if not given, holds it."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = case.op(*leaves)
    upstream = gaussian(*out.shape, seed=9).to(dtype or out.dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def assert_close_to_truth(name: str, dtype: torch.dtype, op: Callable | None = None) -> None:
    """Against double, for which there are no compiled kernels; with another op in the place of the case's if given."""
    case = CASES[name]
    inputs = inputs_of(case, dtype)
    truth = results(case, [x.double() for x in inputs], dtype)
    got = results(case if op is None else dataclasses.replace(case, op=op), inputs)
    for one, other in zip(got, truth, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < TOLERANCE[dtype], f"{tuple(one.shape)}: {error:.1e}"


@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name, dtype, instruction_sets):
    case = CASES[name]
    inputs = inputs_of(case, dtype)
    assert maps.has_kernels(inputs[0], inputs[0].shape[1:2])
    assert not maps.has_kernels(inputs[0].double(), ())
    out = case.op(*inputs)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    for _ in instruction_sets():
        assert_close_to_truth(name, dtype)


@needs_kernels
@pytest.mark.parametrize("name", ["conv_reflect", "conv_many_channels", "norm_leaky", "halve_odd"])
def test_the_number_of_threads_changes_no_bit(name, threads):
    """For more threads the weights' gradient is cut into more tasks."""
    case, found = CASES[name], []
    for count in (1, 3, 13):
        threads(count)
        found.append(results(case, inputs_of(case, torch.float32)))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_kernels
def test_a_large_mean_does_not_cancel():
    x = gaussian(1, 16, 40, 40).float() + 1000
    truth = torch.nn.functional.instance_norm(x.double())
    # A mean of 1000 in float32 is itself off by 3e-5; squares of such numbers would be off by 0.1.
    assert (instance_norm(x) - truth).abs().max() < 2e-4


def test_plain_norm_of_one_image_takes_a_channels_last_gradient():
    """PyTorch's own gives a gradient that is wrong by its whole size."""
    x, grad = torch.randn(2, 1, 3, 5, 5, dtype=torch.float64)
    x.requires_grad_()
    mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
    (truth,) = torch.autograd.grad((x - mean) / (variance + 1e-5).sqrt(), x, grad)
    channels_last = grad.contiguous(memory_format=torch.channels_last)
    (got,) = torch.autograd.grad(instance_norm(x), x, channels_last)
    torch.testing.assert_close(got, truth)


@needs_kernels
def test_under_autocast_maps_are_bfloat16_and_weights_keep_their_gradient():
    case = CASES["conv_reflect"]
    x, weight, bias = (x.requires_grad_() for x in inputs_of(case, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = conv3x3(x, weight, bias, reflect=True)
        again = instance_norm(out, slope=0.0)
        small = blur_resample(again, blur_kernel(64, halve=True), halve=True)
    assert {out.dtype, again.dtype, small.dtype} == {torch.bfloat16}
    small.float().square().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32


@pytest.mark.parametrize("name", CASES)
def test_without_the_library_the_ops_are_plain_pytorch(name):
    with fastnce.use_backend("torch"):
        assert not maps.has_kernels(inputs_of(CASES[name], torch.float32)[0], ())
        assert_close_to_truth(name, torch.float32)


@needs_kernels
def test_what_has_no_kernel():
    x = torch.randn(1, 16, 4, 4)
    assert maps.has_kernels(x, (16, 32))
    assert not maps.has_kernels(x, (16, 20))
    assert not maps.has_kernels(x.double(), (16,))
    assert not maps.has_kernels(x.half(), (16,))
    assert "multiples of 16 channels" in maps.supports("cpu", torch.float32, 12)
    torch.testing.assert_close(
        conv3x3(torch.ones(1, 3, 4, 4), torch.ones(5, 3, 3, 3))[0, 0, 1, 1], torch.tensor(27.0)
    )


@needs_kernels
@pytest.mark.parametrize(("side", "by_kernels"), [(15, False), (16, True)])
def test_few_positions_of_wide_maps_are_left_to_pytorch(side, by_kernels):
    """Few are less than C * K / 256: the weights alone would take longer."""
    weight = torch.zeros(256, 256, 3, 3, requires_grad=True)
    y = conv3x3(torch.zeros(1, 256, side, side), weight)
    assert (y.grad_fn.name() == "Conv3x3FunctionBackward") == by_kernels


@needs_kernels
@pytest.mark.parametrize("name", ["conv_reflect", "norm_relu", "halve_even"])
def test_compiled_by_torch_they_are_the_same(name):
    """Traced with AOT autograd alone: what the compiler sees is plain PyTorch."""
    compiled = torch.compile(CASES[name].op, backend="aot_eager", fullgraph=True)
    assert_close_to_truth(name, torch.float32, compiled)
    torch.compiler.reset()
