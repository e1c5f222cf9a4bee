"""What holds for every op on every backend, in every form of its arguments."""

import numpy as np
import pytest
import torch
from forms import (
    DTYPES,
    FORMS,
    LAYOUTS,
    LOSSES,
    OPS,
    REDUCED,
    LikeDTensor,
    assert_same,
    call,
    first_rows,
    has_form,
    is_rows,
    mapped,
    of_rows,
    samples,
    tensors_of,
    typical,
)
from torch import Tensor

import fastnce
from fastnce.testing import Sample, assert_close_to_truth, run

each_form = pytest.mark.parametrize(("op", "name"), FORMS, ids=[f"{op}-{n}" for op, n in FORMS])
each_op = pytest.mark.parametrize("op", OPS)
# For tests of any one dtype: the second for ops that a backend has in 16 bits alone.
WIDEST = torch.float32, torch.bfloat16


@each_form
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_numerical_contract(op, name, dtype, backend, needs_support, device):
    needs_support(op, backend, dtype)
    if not has_form(backend, name):
        pytest.skip(f"{backend}: it has no such form, and says so")
    assert_close_to_truth(op, backend, samples(op, dtype, device)[name], dtype)


@pytest.mark.parametrize(
    ("op", "name", "layout", "dtype"),
    [
        pytest.param(op, name, layout, DTYPES[(i + j + 1) % 4], id=f"{op}-{name}-{layout.__name__}")
        for i, (op, name) in enumerate(FORMS)
        for j, layout in enumerate(LAYOUTS)
    ],
)
def test_strides_and_neighbours(op, name, layout, dtype, fused_backend, needs_support, device):
    """Every form in every layout; every layout in every dtype."""
    dtype = needs_support(op, fused_backend, dtype, *WIDEST)
    if not has_form(fused_backend, name):
        pytest.skip(f"{fused_backend}: it has no such form, and says so")
    sample = mapped(samples(op, dtype, device)[name], layout.__name__, layout)
    assert_close_to_truth(op, fused_backend, sample, dtype)


@each_op
def test_gradient_of_one_argument_alone(op, fused_backend, needs_support, device):
    dtype = needs_support(op, fused_backend, *WIDEST)
    for sample in samples(op, dtype, device, fused_backend).values():
        for chosen in range(sum(x.requires_grad for x in tensors_of(sample))):
            alone = mapped(sample, f"only {chosen}", lambda x: x)
            wanted = [x for x in tensors_of(alone) if x.requires_grad]
            for i, x in enumerate(wanted):
                x.requires_grad_(i == chosen)
            assert_close_to_truth(op, fused_backend, alone, dtype)


@each_op
def test_without_gradients(op, backend, needs_support, device):
    dtype = needs_support(op, backend, *WIDEST)
    for sample in samples(op, dtype, device, backend).values():
        expected = call(op, sample, backend)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                got = call(op, sample, backend)
            for x, y in zip(got, expected, strict=True):
                assert not x.requires_grad
                torch.testing.assert_close(x, y.detach(), rtol=1e-6, atol=1e-6)


@each_op
def test_repeatable_in_deterministic_mode_and_arguments_left_alone(
    op, backend, needs_support, device, nan_in_fresh_memory
):
    dtype = needs_support(op, backend, *WIDEST)
    for sample in samples(op, dtype, device, backend).values():
        before = [x.detach().clone() for x in tensors_of(sample)]
        first, second = (run(op, sample, backend=backend) for _ in range(2))
        assert_same(first, second, sample)
        assert all(torch.equal(x, y) for x, y in zip(tensors_of(sample), before, strict=True))


@pytest.mark.parametrize("op", REDUCED)
def test_reductions_agree(op, backend, needs_support, device):
    needs_support(op, backend)
    sample = next(iter(samples(op, device=device).values()))
    of_sum, of_mean = (
        run(op, Sample("", {**sample.arguments, "reduction": reduction}), backend=backend)
        for reduction in ("sum", "mean")
    )
    leaves = mapped(sample, "", lambda x: x)
    losses = call(op, leaves, backend, reduction="none")[0]
    count = (losses != 0).sum() if op == "sup_con" else losses.numel()  # samples with a positive
    torch.testing.assert_close(of_sum.pop("out"), losses.sum().detach())
    torch.testing.assert_close(of_mean.pop("out"), losses.sum().detach() / count)
    # Reaches the op as an expanded tensor.
    losses.sum().backward(gradient=torch.tensor(0.7, device=device))
    grads = [x.grad for x in tensors_of(leaves) if x.requires_grad]
    for grad, summed, mean in zip(grads, of_sum.values(), of_mean.values(), strict=True):
        torch.testing.assert_close(summed, grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mean, grad / count, rtol=1e-5, atol=1e-6)


@each_op
def test_compile_is_equal_to_eager(op, fused_backend, needs_support, device):
    """Of the form with the most tensors; and of the first where nothing needs a gradient."""
    dtype = needs_support(op, fused_backend, *WIDEST)
    most = typical(op, dtype, device, fused_backend)
    first = next(iter(samples(op, dtype, device, fused_backend).values()))
    without = mapped(first, "", lambda x: x)
    for x in tensors_of(without):
        x.requires_grad_(False)
    for sample in (most, without):
        # Anew: to a compiler that has seen two, a temperature is variable, and kernels of the GPU round it elsewhere.
        torch._dynamo.reset()
        compiled = torch.compile(getattr(fastnce, op), fullgraph=True, backend="aot_eager")
        got = run(op, sample, backend=fused_backend, function=compiled)
        assert_same(got, run(op, sample, backend=fused_backend), sample)


@each_op
def test_autocast_promotes_and_keeps_the_loss_wide(op, backend, needs_support, device):
    needs_support(op, backend)
    needs_support(op, backend, torch.bfloat16)
    count = iter(range(100))

    def mix(x: Tensor) -> Tensor:
        return x.bfloat16() if is_rows(x) and next(count) % 2 == 0 else x

    sample = mapped(typical(op, device=device, backend=backend), "mixed", mix)
    promoted = sample  # one tensor of rows is taken as it comes
    if len({x.dtype for x in tensors_of(sample) if is_rows(x)}) > 1:
        promoted = mapped(sample, "promoted", lambda x: x.float() if x.is_floating_point() else x)
    assert any(x.dtype == torch.bfloat16 for x in tensors_of(sample))
    under_autocast = torch.autocast(device, dtype=torch.bfloat16)(getattr(fastnce, op))
    got = run(op, sample, backend=backend, function=under_autocast)
    expected = run(op, promoted, backend=backend)
    for key, x in got.items():
        assert x.dtype == torch.float32 or key != "out" or op not in REDUCED
        # sample_patches promotes nothing: its bf16 results are rounded once.
        bound = 4 * torch.finfo(x.dtype).eps * expected[key].abs().max().item()
        torch.testing.assert_close(
            x.float(),
            expected[key].float(),
            rtol=0,
            atol=bound,
            msg=lambda m, key=key: f"{key}: {m}",
        )


@each_op
def test_what_fused_kernels_refuse(op, fused_backend, needs_support, device):
    dtype = needs_support(op, fused_backend, *WIDEST)
    sample = typical(op, dtype, device, fused_backend)
    first = tensors_of(sample)[0].detach()
    with pytest.raises(RuntimeError, match=f"{op}: .*torch.func.*backend='torch'"):
        torch.func.grad(
            lambda x: sum(y.sum() for y in call(op, sample, fused_backend, **first_rows(sample, x)))
        )(first)
    of_ranks = mapped(sample, "", lambda x: x.as_subclass(LikeDTensor) if is_rows(x) else x)
    with pytest.raises(TypeError, match=f"{op}: .*DTensor.*full_tensor"):
        call(op, of_ranks, fused_backend)


@each_op
def test_plain_pytorch_has_transforms_and_second_derivatives(op):
    sample = typical(op, torch.float64)

    def loss(x: Tensor) -> Tensor:
        return sum(y.cos().sum() for y in call(op, sample, "torch", **first_rows(sample, x)))

    x = tensors_of(sample)[0].detach().requires_grad_()
    expected = torch.autograd.grad(loss(x), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    assert torch.autograd.gradcheck(
        lambda x: torch.autograd.grad(loss(x), x, create_graph=True)[0], (x,), fast_mode=True
    )


@pytest.mark.parametrize("op", LOSSES)
def test_temperatures_of_every_kind(op, backend, needs_support):
    """One element of any shape and dtype, which gets its gradient; numbers of NumPy; and what nobody reads makes the loss NaN."""
    needs_support(op, backend)
    sample = typical(op, backend=backend)

    def loss(temperature: object) -> Tensor:
        return call(op, sample, backend, temperature=temperature)[0].sum()

    tau = torch.tensor(0.25, requires_grad=True)
    expected = loss(tau)
    (grad,) = torch.autograd.grad(expected, tau)
    for shape in ((1,), (1, 1)):
        parameter = torch.nn.Parameter(torch.full(shape, 0.25))
        got = loss(parameter)
        assert torch.equal(got, expected)
        assert torch.equal(torch.autograd.grad(got, parameter)[0], grad.view(shape))
    for dtype in DTYPES:
        other = torch.tensor(0.25, dtype=dtype, requires_grad=True)
        (of_other,) = torch.autograd.grad(loss(other), other)
        assert of_other.dtype == dtype and of_other.shape == ()
        torch.testing.assert_close(of_other.float(), grad, rtol=1e-2, atol=0)
    for number in (np.float32(0.25), np.float64(0.25), torch.tensor(0.25, dtype=torch.bfloat16)):
        assert torch.equal(loss(number), expected)
    assert torch.equal(loss(np.int32(2)), loss(2.0))
    # As on an accelerator, a compiler does not read it. What is read is an error: see test_errors.
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    for value in (-0.5, 0.0, torch.nan):
        assert compiled(torch.tensor(value)).isnan()
    torch.testing.assert_close(compiled(torch.tensor(0.25)), expected)


@each_op
def test_meta_tensors_pass_shapes_on(op):
    for dtype in (torch.float32, torch.bfloat16):
        sample = typical(op, dtype)
        there = mapped(sample, "", lambda x: x.to("meta") if x.dim() else x)
        for autocast in (False, True):
            with torch.autocast("cpu", enabled=autocast):
                got = call(op, there, None)
            expected = call(op, sample, "torch")
            for x, y in zip(got, expected, strict=True):
                assert x.is_meta and (x.shape, x.dtype) == (y.shape, y.dtype)
        leaves = [x for x in tensors_of(there) if x.requires_grad and x.is_meta]
        grads = torch.autograd.grad(sum(map(torch.sum, got)), leaves)
        for x, grad in zip(leaves, grads, strict=True):
            assert grad.is_meta and (grad.shape, grad.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("op", [op for op in LOSSES if op != "pairwise_cosine_similarity"])
def test_half_precision_survives_a_gradient_scaler(op, backend, needs_support, device):
    """GradScaler multiplies the loss by 65536, which fp16 cannot represent, so that small gradients do not underflow.

    Below 6e-5, where those of a mean of many or long rows lie, fp16 loses digits: the division has to wait for the scaler's factor.
    """
    needs_support(op, backend, torch.float16)
    generator = torch.Generator().manual_seed(0)
    rows = 2048 * torch.randn(2, 128, 16, generator=generator).half()
    labels = torch.arange(128) % 32
    sample = of_rows(op, rows, torch.float16, labels=labels, temperature=torch.tensor(1.0))
    sample = mapped(sample, "", lambda x: x.to(device))
    exact = mapped(sample, "fp64", lambda x: x.double() if x.is_floating_point() else x)
    call(op, sample, backend)[0].mul(65536.0).backward()
    call(op, exact, "torch")[0].mul(65536.0).backward()
    for x, y in zip(tensors_of(sample), tensors_of(exact), strict=True):
        if x.requires_grad:
            largest = y.grad.abs().max().item()
            torch.testing.assert_close(x.grad.double(), y.grad, rtol=2e-3, atol=2e-3 * largest)
