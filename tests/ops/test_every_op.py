"""What holds for every op on every backend, in every form of its arguments."""

import functools

import pytest
import torch
from torch import Tensor

import fastnce
from fastnce.testing import SAMPLE_INPUTS, Sample, assert_close_to_truth, run

OPS = list(SAMPLE_INPUTS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@functools.cache
def samples(op: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Sample]:
    found = SAMPLE_INPUTS[op](dtype, device, torch.Generator().manual_seed(0))
    return {sample.name: sample for sample in found}


FORMS = [(op, name) for op in OPS for name in samples(op)]
each_form = pytest.mark.parametrize(("op", "name"), FORMS, ids=[f"{op}-{n}" for op, n in FORMS])
# One form of each op: for what takes long, or does not depend on the form.
TYPICAL = [
    ("info_nce", "queue_in_batch"),
    ("patch_nce", "layers"),
    ("conditional_contrastive", "temperature"),
    ("sample_patches", "several_normalized"),
    ("nt_xent", "temperature"),
    ("sup_con", "temperature"),
    ("pairwise_cosine_similarity", "batched"),
]
each_op = pytest.mark.parametrize(("op", "name"), TYPICAL, ids=[op for op, _ in TYPICAL])


def mapped(sample: Sample, name: str, function) -> Sample:
    """The sample with ``function`` applied to every tensor; tensors keep their ``requires_grad``."""

    def change(x):
        if isinstance(x, list):
            return [change(item) for item in x]
        if not isinstance(x, Tensor):
            return x
        return function(x.detach()).requires_grad_(x.requires_grad)

    arguments = {key: change(value) for key, value in sample.arguments.items()}
    return Sample(f"{sample.name} {name}", arguments)


def tensors_of(sample: Sample) -> list[Tensor]:
    """The tensors themselves, in the order of the arguments."""
    values = [v if isinstance(v, list) else [v] for v in sample.arguments.values()]
    return [x for value in values for x in value if isinstance(x, Tensor)]


def call(op: str, sample: Sample, backend: str, **changes) -> list[Tensor]:
    """The results of the op as a list, without a backward."""
    out = getattr(fastnce, op)(**{**sample.arguments, **changes}, backend=backend)
    out = out[0] if op == "sample_patches" else out
    return out if isinstance(out, list) else [out]


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, x in got.items():
        assert torch.equal(x, expected[name]), f"{name} differs"


@each_form
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_numerical_contract(op, name, dtype, backend, needs_support, device):
    needs_support(op, backend, dtype)
    assert_close_to_truth(op, backend, samples(op, dtype, device)[name], dtype)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() >= 2 else x


def among_nans(x: Tensor) -> Tensor:
    """Every second row of every dimension, in the middle of a larger buffer that is NaN elsewhere."""
    if x.dim() == 0:
        return x
    if not x.is_floating_point():
        buffer = x.new_full((2 * len(x) + 1,), 2**31 - 1)
        buffer[1::2] = x
        return buffer[1::2]
    sizes = [2 * size + 1 for size in x.shape[:-1]]
    buffer = x.new_full((*sizes, x.shape[-1] + 5), torch.nan)
    view = buffer[(*[slice(1, None, 2)] * len(sizes), slice(3, 3 + x.shape[-1]))]
    return view.copy_(x)


def every_third_feature(x: Tensor) -> Tensor:
    """No dimension has the stride 1."""
    if x.dim() == 0 or not x.is_floating_point():
        return x
    buffer = x.new_full((*x.shape, 3), torch.nan)
    buffer[..., 1] = x
    return buffer[..., 1]


def channels_last(x: Tensor) -> Tensor:
    """The last dimension outermost but one: for maps (B, C, H, W), torch.channels_last."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() >= 3 else x


@each_form
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (transposed, torch.float32),
        (among_nans, torch.float32),
        (among_nans, torch.bfloat16),
        (every_third_feature, torch.float32),
        (channels_last, torch.float32),
    ],
)
def test_strides_and_neighbours(op, name, layout, dtype, backend, needs_support, device):
    needs_support(op, backend, dtype)
    sample = mapped(samples(op, dtype, device)[name], layout.__name__, layout)
    assert_close_to_truth(op, backend, sample, dtype)


@each_form
def test_gradient_of_one_argument_alone(op, name, backend, needs_support, device):
    needs_support(op, backend)
    sample = samples(op, device=device)[name]
    for chosen in range(sum(x.requires_grad for x in tensors_of(sample))):
        counter = iter(range(100))
        alone = mapped(sample, f"only {chosen}", lambda x: x)
        for x, original in zip(tensors_of(alone), tensors_of(sample), strict=True):
            if original.requires_grad:
                x.requires_grad_(next(counter) == chosen)
        assert_close_to_truth(op, backend, alone, torch.float32)


@each_form
def test_without_gradients(op, name, backend, needs_support, device):
    needs_support(op, backend)
    sample = samples(op, device=device)[name]
    expected = call(op, sample, backend)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            got = call(op, sample, backend)
        for x, y in zip(got, expected, strict=True):
            assert not x.requires_grad
            torch.testing.assert_close(x, y.detach(), rtol=1e-6, atol=1e-6)


@each_form
def test_arguments_are_left_alone(op, name, backend, needs_support, device):
    needs_support(op, backend)
    sample = samples(op, device=device)[name]
    before = [x.detach().clone() for x in tensors_of(sample)]
    run(op, sample, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(tensors_of(sample), before, strict=True))


@each_form
def test_gradcheck(op, name, backend, needs_support, device):
    needs_support(op, backend, torch.float64)
    sample = samples(op, torch.float64, device)[name]
    leaves = [x.detach().double().requires_grad_() for x in tensors_of(sample) if x.requires_grad]

    def function(*values):
        queue = iter(values)

        def replace(x):
            if isinstance(x, list):
                return [replace(item) for item in x]
            return next(queue) if isinstance(x, Tensor) and x.requires_grad else x

        arguments = {key: replace(value) for key, value in sample.arguments.items()}
        return tuple(call(op, Sample("", arguments), backend))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@each_form
def test_repeatable_in_deterministic_mode(op, name, backend, needs_support, device):
    needs_support(op, backend)
    sample = samples(op, device=device)[name]
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(run(op, sample, backend=backend), run(op, sample, backend=backend))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op", [op for op in OPS if op not in ("sample_patches", "patch_nce")])
def test_reductions_agree(op, backend, needs_support, device):
    needs_support(op, backend)
    if op == "pairwise_cosine_similarity":
        pytest.skip("it has no reduction")
    sample = next(iter(samples(op, device=device).values()))
    results = {
        reduction: run(
            op, Sample("", {**sample.arguments, "reduction": reduction}), backend=backend
        )
        for reduction in ("mean", "sum")
    }
    leaves = mapped(sample, "", lambda x: x)
    losses = call(op, leaves, backend, reduction="none")[0]
    count = (losses != 0).sum() if op == "sup_con" else losses.numel()  # samples with a positive
    torch.testing.assert_close(results["sum"]["out"], losses.sum().detach())
    torch.testing.assert_close(results["mean"]["out"], losses.sum().detach() / count)
    losses.sum().backward(
        gradient=torch.tensor(0.7, device=device)
    )  # reaches the op as an expanded tensor
    grads = [x.grad for x in tensors_of(leaves) if x.requires_grad]
    sums = [x for key, x in results["sum"].items() if key != "out"]
    means = [x for key, x in results["mean"].items() if key != "out"]
    for grad, of_sum, of_mean in zip(grads, sums, means, strict=True):
        torch.testing.assert_close(of_sum, grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(of_mean, grad / count, rtol=1e-5, atol=1e-6)


@each_op
def test_compile_is_equal_to_eager(op, name, backend, needs_support, device):
    needs_support(op, backend)
    needs_compile(op, backend)
    torch._dynamo.reset()
    compiled = torch.compile(getattr(fastnce, op), fullgraph=True, backend="aot_eager")
    sample = samples(op, device=device)[name]
    assert_same(
        run(op, sample, backend=backend, function=compiled), run(op, sample, backend=backend)
    )


def needs_compile(op: str, backend: str) -> None:
    if backend == "python_kernels" and op != "sample_patches":
        pytest.skip("its kernels call autograd, which torch.compile cannot trace inside a Function")


def first_rows(count: int):
    return lambda x: x[:count] if x.dim() else x


@pytest.mark.parametrize(
    ("op", "name", "fewer"),
    [
        ("info_nce", "in_batch", first_rows(21)),
        ("info_nce", "own", first_rows(21)),
        ("patch_nce", "image", lambda x: x[:, :15]),
        ("conditional_contrastive", "none", first_rows(21)),
        ("sample_patches", "one", lambda x: x[:, :, :, :6] if x.dim() == 4 else x[x < 54]),
        ("sup_con", "mean", first_rows(21)),
        ("pairwise_cosine_similarity", "two", first_rows(5)),
    ],
)
def test_compile_with_dynamic_shapes(op, name, fewer, backend, needs_support, device):
    needs_support(op, backend)
    needs_compile(op, backend)
    torch._dynamo.reset()
    compiled = torch.compile(
        getattr(fastnce, op), fullgraph=True, backend="aot_eager", dynamic=True
    )
    sample = samples(op, device=device)[name]
    for each in (sample, mapped(sample, "fewer", fewer)):
        got = run(op, each, backend=backend, function=compiled)
        expected = run(op, each, backend=backend)
        if backend in ("native", "torch"):
            assert_same(got, expected)
            continue
        # A float temperature is a tensor to the compiler, and kernels of the GPU round a number in a tensor at another place.
        # Triton's then take their offset from each row's maximum.
        close = 2e-3 if backend == "triton" else 2e-5
        for key, x in got.items():
            torch.testing.assert_close(x, expected[key], rtol=close, atol=close, msg=key)


@each_op
def test_autocast_promotes_and_keeps_the_loss_wide(op, name, backend, needs_support, device):
    needs_support(op, backend)
    needs_support(op, backend, torch.bfloat16)
    count = iter(range(100))

    def mix(x):
        is_rows = x.is_floating_point() and x.dim() >= 2
        return x.bfloat16() if is_rows and next(count) % 2 == 0 else x

    sample = mapped(samples(op, device=device)[name], "mixed", mix)
    promoted = mapped(sample, "promoted", lambda x: x.float() if x.is_floating_point() else x)
    assert any(x.dtype == torch.bfloat16 for x in tensors_of(sample))
    under_autocast = torch.autocast(device, dtype=torch.bfloat16)(getattr(fastnce, op))
    got = run(op, sample, backend=backend, function=under_autocast)
    expected = run(op, promoted, backend=backend)
    for key, x in got.items():
        if key == "out" and op != "pairwise_cosine_similarity":
            assert x.dtype == torch.float32
        # sup_con has one argument, and sample_patches promotes nothing: their bf16 results are rounded once.
        eps = torch.finfo(x.dtype).eps
        largest = expected[key].abs().max().item()
        torch.testing.assert_close(
            x.float(),
            expected[key],
            rtol=0,
            atol=4 * eps * largest,
            msg=lambda m, key=key: f"{key}: {m}",
        )


@each_op
def test_torch_func_is_refused_by_fused_kernels(op, name, fused_backend, needs_support, device):
    needs_support(op, fused_backend)
    sample = samples(op, device=device)[name]
    first = next(iter(sample.arguments))
    value = sample.arguments[first]

    def loss(x):
        changed = [x, *value[1:]] if isinstance(value, list) else x
        return sum(out.sum() for out in call(op, sample, fused_backend, **{first: changed}))

    x = (value[0] if isinstance(value, list) else value).detach()
    with pytest.raises(RuntimeError, match=f"{op}: .*torch.func.*backend='torch'"):
        torch.func.grad(loss)(x)


class LikeDTensor(Tensor):
    """What the ops know a DTensor by."""

    def full_tensor(self):
        return self.as_subclass(Tensor)


@each_op
def test_rows_of_several_ranks_are_refused_by_fused_kernels(
    op, name, fused_backend, needs_support, device
):
    needs_support(op, fused_backend)
    sample = mapped(
        samples(op, device=device)[name],
        "of ranks",
        lambda x: x.as_subclass(LikeDTensor) if x.is_floating_point() and x.dim() > 0 else x,
    )
    with pytest.raises(TypeError, match=f"{op}: .*DTensor.*full_tensor"):
        call(op, sample, fused_backend)


@each_op
def test_torch_func_works_on_plain_pytorch(op, name):
    sample = samples(op)[name]
    first = next(iter(sample.arguments))
    value = sample.arguments[first]

    def loss(x):
        changed = [x, *value[1:]] if isinstance(value, list) else x
        return sum(out.sum() for out in call(op, sample, "torch", **{first: changed}))

    x = (value[0] if isinstance(value, list) else value).detach().requires_grad_()
    expected = torch.autograd.grad(loss(x), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)


@each_op
def test_second_derivative_of_plain_pytorch(op, name):
    sample = mapped(samples(op, torch.float64)[name], "", lambda x: x)
    first = tensors_of(sample)[0]

    def gradient(x):
        changed = mapped(sample, "", lambda y: y)
        key, value = next(iter(changed.arguments.items()))
        changed.arguments[key] = [x, *value[1:]] if isinstance(value, list) else x
        total = sum(out.cos().sum() for out in call(op, changed, "torch"))
        return torch.autograd.grad(total, x, create_graph=True)[0]

    x = first.detach().requires_grad_()
    assert torch.autograd.gradcheck(gradient, (x,), fast_mode=True)


@pytest.mark.parametrize(
    "op", ["info_nce", "patch_nce", "conditional_contrastive", "sup_con", "nt_xent"]
)
def test_half_precision_survives_a_gradient_scaler(op, backend, needs_support, device):
    """GradScaler multiplies the loss by 65536, which fp16 cannot represent, so that small gradients do not underflow."""
    needs_support(op, backend, torch.float16)
    sample = mapped(
        next(iter(samples(op, torch.float16, device).values())),
        "",
        lambda x: x * 2 if x.is_floating_point() else x,
    )
    exact = mapped(sample, "fp64", lambda x: x.double() if x.is_floating_point() else x)
    call(op, sample, backend)[0].mul(65536.0).backward()
    call(op, exact, "torch")[0].mul(65536.0).backward()
    for x, y in zip(tensors_of(sample), tensors_of(exact), strict=True):
        if x.requires_grad:
            torch.testing.assert_close(
                x.grad.double(), y.grad, rtol=2e-3, atol=2e-3 * y.grad.abs().max().item()
            )


@pytest.mark.parametrize("op", ["info_nce", "patch_nce", "conditional_contrastive", "sup_con"])
def test_half_precision_keeps_the_gradient_of_a_mean_of_many(op, fused_backend):
    """Below 6e-5, where those of a mean of many rows lie, fp16 loses digits: the division has to wait for the scaler's factor."""
    generator = torch.Generator().manual_seed(0)
    x, y = 128 * torch.randn(2, 1024, 16, generator=generator).half()
    labels = torch.arange(1024) % 64

    def gradient(dtype: torch.dtype, backend: str) -> torch.Tensor:
        rows, others = x.to(dtype, copy=True).requires_grad_(), y.to(dtype)
        arguments = {
            "info_nce": (rows, others),
            "patch_nce": (rows[None], others[None]),
            "conditional_contrastive": (rows, others, labels),
            "sup_con": (rows, labels),
        }
        loss = getattr(fastnce, op)(*arguments[op], temperature=1.0, backend=backend)
        (65536 * loss).backward()
        return rows.grad.double()

    found, expected = gradient(torch.float16, fused_backend), gradient(torch.float64, "torch")
    largest = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * largest)
