"""Shared by the tests of every op on every backend: sample inputs, and the numerical contract.

Truth is the reference in fp64 on exactly the values that the kernel was given. For the result and each gradient

    err(kernel) <= 2 err(plain PyTorch in the kernel's precision) + eps(dtype) scale

where ``err`` is the largest absolute deviation from the truth. See ``assert_close_to_truth`` for ``scale``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

import fastnce
from fastnce import backends
from fastnce.ops.labelled_lse import LabelledLSE
from fastnce.reference.normalize import accumulation_dtype
from fastnce.registry import OPS, Make, Op, Sample, watch

__all__ = [
    "SAMPLE_INPUTS",
    "Sample",
    "assert_close_to_truth",
    "error",
    "forget",
    "leaves_of",
    "outputs_of",
    "rows",
    "run",
    "truth",
]


def rows(
    *shape: int, dtype: torch.dtype, device: str, generator: torch.Generator, grad: bool = True
) -> Tensor:
    """Gaussian rows, see ``fastnce.registry.Make``."""
    return Make(dtype, device, generator)(*shape, grad=grad)


def _sampler(op: str) -> Callable[..., Iterator[Sample]]:
    def samples(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[Sample]:
        return OPS[op].samples(Make(dtype, device, generator))

    return samples


# op -> function (dtype, device, generator) -> Samples in every form that the op has.
SAMPLE_INPUTS: dict[str, Callable[..., Iterator[Sample]]] = {}


def _add(op: Op, _: object = None) -> None:
    if op.samples is not None:
        SAMPLE_INPUTS[op.name] = _sampler(op.name)


for _op in OPS.values():
    _add(_op)
watch(_add)


class _OneRank:
    """The exchange of a rank that is alone."""

    def trip(self, block: tuple[Tensor, ...]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        yield 0, block


def _labelled_lse(
    x: Tensor, labels: Tensor, *, temperature: float | Tensor = 1.0, backend: str | None = None
) -> Tensor:
    kernels = backends.select("labelled_lse", x, backend, (x,))
    return LabelledLSE.apply(x, temperature, labels, _OneRank(), kernels, 1)


# In the place of a public function, for ops that have none.
_FUNCTIONS: dict[str, Callable] = {
    "labelled_lse": _labelled_lse,
    "masked_info_nce": fastnce.info_nce,
}


def _parameters(op: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_FUNCTIONS.get(op) or OPS[op].function).parameters


def outputs_of(op: str, arguments: dict[str, object], backend: str | None = None) -> list[Tensor]:
    """The tensors that the op returns, but for positions."""
    result = _called(op, None, arguments, backend)
    return [result] if isinstance(result, Tensor) else result


def _called(
    op: str, function: Callable | None, arguments: dict[str, object], backend: str | None
) -> Tensor | list[Tensor]:
    function = function or _FUNCTIONS.get(op) or getattr(fastnce, op)
    result = function(**arguments, backend=backend)
    if isinstance(result, tuple) and len(result) == 2:  # patches and their positions
        return result[0]
    if isinstance(result, tuple):  # the maps before them
        return [x for part in result[:2] for x in (part if isinstance(part, list) else [part])]
    return result


def leaves_of(sample: Sample) -> list[Tensor]:
    """The tensors whose gradients are part of the result."""
    values = [v if isinstance(v, list) else [v] for v in sample.arguments.values()]
    return [x for value in values for x in value if isinstance(x, Tensor) and x.requires_grad]


def run(
    op: str,
    sample: Sample,
    *,
    backend: str | None = None,
    convert: Callable[[str, Tensor], Tensor] | None = None,
    function: Callable | None = None,
) -> dict[str, Tensor]:
    """The result of the op and its gradients, by name (``"out"``, ``"out[1]"``, ``"d query"``, ``"d features[0]"``).

    The gradient that arrives at a result differs from element to element; a loss that is one number gets 0.7.

    Args:
        op: its name.
        sample: its arguments. Strides and storage are passed on as they are.
        backend: where to run.
        convert: applied before the call to each floating-point tensor, with the argument's name, and to the gradient that
            arrives, with the name ``"upstream"``.
        function: called instead of the public op, such as the compiled op.
    """
    leaves: dict[str, Tensor] = {}

    def leaf(argument: str, name: str, x: object) -> object:
        if isinstance(x, (list, tuple)):
            return [leaf(argument, f"{name}[{i}]", item) for i, item in enumerate(x)]
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        value = x.detach() if convert is None else convert(argument, x.detach())
        if x.requires_grad:
            leaves[f"d {name}"] = value.requires_grad_()
        return value

    arguments = {name: leaf(name, name, value) for name, value in sample.arguments.items()}
    result = _called(op, function, arguments, backend)
    outputs = list(result) if isinstance(result, (list, tuple)) else [result]
    names = ["out"] if isinstance(result, Tensor) else [f"out[{i}]" for i in range(len(outputs))]
    if leaves:
        differentiable = [x for x in outputs if x.requires_grad]
        upstream = [_upstream(x) for x in differentiable]
        if convert is not None:
            upstream = [convert("upstream", x) for x in upstream]
        torch.autograd.backward(differentiable, upstream)
    values = {name: x.detach() for name, x in zip(names, outputs, strict=True)}
    return values | {name: x.grad for name, x in leaves.items()}


# In fp32, for every dtype. It is no tensor: a CUDA graph cannot hold a copy from the host.
_UPSTREAM = torch.tensor(0.7).item()


def _upstream(output: Tensor) -> Tensor:
    if output.dim() == 0:
        return torch.full_like(output, _UPSTREAM)
    index = torch.arange(output.numel(), dtype=torch.float64, device=output.device)
    # bf16 values, which every dtype represents, so that the truth sees the same gradient.
    return (0.2 + index.cos()).bfloat16().to(output.dtype).reshape(output.shape)


# Bounded: a cached sample stays in memory. Its backends follow one another closely, which is what the cache is for.
@functools.lru_cache(maxsize=32)
def truth(op: str, sample: Sample) -> dict[str, Tensor]:
    """The results of ``run`` for the reference in fp64 on the same values."""
    return run(op, sample, backend="torch", convert=lambda name, x: x.double())


def _flip(op: str, name: str, x: Tensor) -> Tensor:
    """Reverses the order of the features, which are summed over."""
    if not _compares(op):
        return x.flip(1 if x.dim() == 4 else -1)  # a map, or patches and their gradient
    return x.flip(-1) if x.dim() >= 2 and name not in ("upstream", "weights") else x


@functools.lru_cache(maxsize=32)
def _plain_errors(op: str, sample: Sample) -> dict[str, float]:
    """Errors of plain PyTorch in the sample's precision, the worse of two orders of summation."""
    reverse = functools.partial(_flip, op)
    direct = run(op, sample, backend="torch")
    flipped = run(op, sample, backend="torch", convert=reverse)
    for name in flipped:
        if name.startswith("d ") or not _compares(op):
            flipped[name] = reverse(name, flipped[name])
    return {
        name: max(error(op, sample, name, x), error(op, sample, name, flipped[name]))
        for name, x in direct.items()
    }


def forget() -> None:
    """Empties the caches, which keep the tensors of recent samples in memory."""
    truth.cache_clear()
    _plain_errors.cache_clear()


def _argument(sample: Sample, name: str) -> Tensor:
    """The argument that the gradient ``name`` belongs to."""
    argument, _, index = name.removeprefix("d ").rstrip("]").partition("[")
    value = sample.arguments[argument]
    return value[int(index)] if index else value


def _normalizes(op: str, sample: Sample) -> bool:
    return bool(sample.arguments.get("normalize", _compares(op)))


@functools.cache
def _compares(op: str) -> bool:
    """Whether it compares rows with one another, as all that have a temperature, or its inverse, do; the others take theirs as they are."""
    return not _parameters(op).keys().isdisjoint(("temperature", "scale"))


def error(op: str, sample: Sample, name: str, value: Tensor) -> float:
    """Largest absolute deviation from the truth; NaN if any is.

    The gradient of a row that the op normalises is proportional to 1 / norm. It is multiplied by the norm, so that rows of
    every norm count the same.
    """
    deviation = (value.double() - truth(op, sample)[name]).abs()
    return (deviation * _norms(op, sample, name)).max().item()


def _norms(op: str, sample: Sample, name: str) -> Tensor | float:
    if not name.startswith("d ") or not _compares(op) or not _normalizes(op, sample):
        return 1.0
    x = _argument(sample, name).detach().double()
    if x.dim() <= 1:
        return 1.0
    norm = x.norm(dim=-1, keepdim=True)
    return norm.masked_fill(norm == 0, 1)


def _before_cancellation(op: str, sample: Sample, name: str) -> float:
    """The size of the numbers whose difference the tensor ``name`` is.

    With logits of size L = max |s| / t: a loss is ``lse - positive``, each up to L. Logits known to eps L give a softmax
    known to eps L, so that a gradient is a sum whose terms are known to ``eps L w / t`` with the row's weight w, and the
    gradient of the temperature one whose terms are known to ``eps L^2 w / t``. Plain PyTorch has these errors too, except
    where it is exact by chance, as with one row.
    """
    if not _compares(op):
        return 0.0
    arguments = sample.arguments
    temperature, longest, longest_key, logit = _sizes(op, sample)
    matrices = _rows_of(sample)
    is_mean = arguments.get("reduction", "mean") == "mean" and OPS[op].is_loss
    count = matrices[0].shape[:-1].numel() * (2 if op == "nt_xent" else 1)  # of losses
    weights = [x.double().abs() for x in _items(arguments.get("weights")) if x is not None]
    if is_mean:
        weights = [x / x.mean() for x in weights]
    heaviest = max((x.max().item() for x in weights), default=1.0)
    total = sum(x.sum().item() for x in weights) if weights else count
    if not name.startswith("d "):
        if arguments.get("reduction") == "sum":
            return logit * total
        return logit * (1 if is_mean else heaviest)
    x = _argument(sample, name)
    if x.dim() <= 1:
        powers = {"d bias": (1, 0), "d scale": (2, 1)}.get(name, (2, -1))
        return logit ** powers[0] * temperature ** powers[1] * (1 if is_mean else total)
    other = heaviest * max(longest, longest_key)
    return other * logit / temperature / (x.shape[:-1].numel() if is_mean else 1)


def _sizes(op: str, sample: Sample) -> tuple[float, float, float, float]:
    """The temperature, the norms of the longest query and key as the logits have them, and the largest logit, at least 1."""

    def number(name: str) -> float:
        parameter = _parameters(op).get(name)
        value = sample.arguments.get(name, parameter.default if parameter else 0.0)
        return value.item() if isinstance(value, Tensor) else value

    temperature = 1 / number("scale") if "scale" in sample.arguments else number("temperature")
    longest = longest_key = 1.0
    if not _normalizes(op, sample):
        norms = [x.detach().double().norm(dim=-1).max().item() for x in _rows_of(sample)]
        longest, longest_key = norms[0], max(norms[1:])
    logit = longest * longest_key / temperature + abs(number("bias"))
    return temperature, longest, longest_key, max(1.0, logit)


def _rounded_factors(op: str, sample: Sample, name: str, dtype: torch.dtype) -> float:
    """The error that rounding the factors of a gradient's products to the inputs' half precision may cost.

    Tensor cores and AVX-512 multiply them in that precision: the softmax weights, and the weighted rows of the other side. Each
    is off by half an eps at most, and hardly ever all in one direction: a gradient is allowed ``eps / 2 w / t``, that of the
    temperature ``eps / 2 L w / t``. Losses come from products of the inputs as they are, exact to the accumulation.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if not half or not name.startswith("d ") or not _compares(op):
        return 0.0
    size = _before_cancellation(op, sample, name)
    return 0.5 * torch.finfo(dtype).eps * size / _sizes(op, sample)[3]


def _roundings(op: str, backend: str, sample: Sample, dtype: torch.dtype) -> float:
    """How many eps of the accumulation the numbers that cancel may be off by.

    In fp64 the truth has passed through as many roundings as the kernel. Tensor cores do not round: of each of the D products that
    a logit adds up, they drop what lies below the last bit of the sum so far. That is half a bit on average and always makes the
    sum smaller, and the sum is half of the whole on average: D / 4 eps. (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor
    cores".) The emulator of the CUDA kernels does the same.
    """
    if dtype == torch.float64:
        return 4
    rows = _rows_of(sample)[0]
    if dtype == torch.float32 or not (rows.is_cuda or backend == "cuda"):
        return 1
    return max(1, rows.shape[-1] / 4)


def _rows_of(sample: Sample) -> list[Tensor]:
    """The matrices that are multiplied for the loss."""
    others = ("weights", "guide")
    values = [v for name, v in sample.arguments.items() if name not in others]
    tensors = [x for v in values for x in _items(v)]
    return [x for x in tensors if isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 2]


def _items(value: object) -> Sequence:
    return value if isinstance(value, (list, tuple)) else [value]


def assert_close_to_truth(
    op: str,
    backend: str,
    sample: Sample,
    dtype: torch.dtype,
    *,
    plain_limit: float = 0.02,
    got: dict[str, Tensor] | None = None,
) -> float:
    """Checks the numerical contract for the result and every gradient of one call.

    ``scale`` is the largest magnitude in the true tensor, plus, at the precision of the accumulation (fp32, or fp64 for fp64),
    the size of the numbers that cancel in it (see ``_before_cancellation``), as often as ``_roundings`` says.
    eps(dtype) is that of the tensor itself: a loss of bf16 inputs is fp32 and is held to fp32's. Gradients of bf16 and fp16 inputs may besides have passed through products
    whose factors are rounded to that dtype (see ``_rounded_factors``).

    Args:
        op: its name.
        backend: the backend under test.
        sample: the call.
        dtype: that of the inputs; the gradients must come back in it.
        plain_limit: where plain PyTorch itself is off by more than this part of the truth (or a hundred roundings of what
            cancels), the bound would mean nothing: an error.
        got: what ``run`` gave, if it has been called.

    Returns:
        The largest error, as a share of what is allowed.

    Raises:
        AssertionError: a tensor is missing, has the wrong dtype or shape, or is too far from the truth.
    """
    true, plain = truth(op, sample), _plain_errors(op, sample)
    got = run(op, sample, backend=backend) if got is None else got
    assert got.keys() == true.keys()
    acc = accumulation_dtype(dtype)
    roundings = _roundings(op, backend, sample, dtype)
    largest_share = 0.0
    for name, expected in true.items():
        value = got[name]
        where = f"{op} on {backend}, {dtype}, sample {sample.name!r}: {name}"
        assert value is not None, f"{where} is missing"
        assert value.shape == expected.shape, f"{where}: {value.shape}, not {expected.shape}"
        wanted = _expected_dtype(op, sample, name, dtype)
        assert value.dtype == wanted, f"{where} is {value.dtype}, not {wanted}"
        largest = (expected.abs() * _norms(op, sample, name)).max().item()
        rounding = torch.finfo(value.dtype).eps * largest
        cancelled = roundings * torch.finfo(acc).eps * _before_cancellation(op, sample, name)
        assert plain[name] <= plain_limit * largest + 100 * cancelled, (
            f"{where}: plain PyTorch is itself off by {plain[name]:.2e} of {largest:.2e}; choose another sample"
        )
        factors = _rounded_factors(op, sample, name, dtype)
        bound = 2 * plain[name] + rounding + cancelled + factors
        deviation = error(op, sample, name, value)
        # Written so that NaN fails.
        assert deviation <= bound, (
            f"{where} is off by {deviation:.2e}, allowed {bound:.2e} "
            f"(twice plain PyTorch's {plain[name]:.2e}; largest value {largest:.2e})"
        )
        largest_share = max(largest_share, deviation / bound if bound else 0.0)
    return largest_share


def _expected_dtype(op: str, sample: Sample, name: str, dtype: torch.dtype) -> torch.dtype:
    if name.startswith("d "):
        return _argument(sample, name).dtype
    if op == "labelled_lse":
        return torch.float64
    return accumulation_dtype(dtype) if OPS[op].is_loss else dtype
