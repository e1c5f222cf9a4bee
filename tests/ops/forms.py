"""The ops and their samples, as the tests go through them; samples of other sizes and rows; and what changes a sample."""

import functools
import inspect
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

import fastnce
from fastnce import backends
from fastnce.testing import SAMPLE_INPUTS, Sample

OPS = list(SAMPLE_INPUTS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def with_option(name: str) -> list[str]:
    """The ops that have it."""
    return [op for op in OPS if name in inspect.signature(getattr(fastnce, op)).parameters]


LOSSES = with_option("temperature")
REDUCED = [op for op in with_option("reduction") if op != "patch_nce"]  # which has no sum


# Words in the names of samples whose forms a backend has not: the CUDA kernels have no negatives of each query's own.
LACKING = {"cuda": {"own"}}


def has_form(backend: str, name: str) -> bool:
    """Whether a backend that runs the op takes the sample of this name."""
    words = set(name.split("_"))
    lacking = LACKING.get(backend, set())
    if backend and backends.supports(backend, "masked_info_nce", "cpu", torch.float32) != "ok":
        lacking = lacking | {"masked"}  # an op of its own
    return not lacking & words


@functools.cache
def samples(
    op: str, dtype: torch.dtype = torch.float32, device: str = "cpu", backend: str = ""
) -> dict[str, Sample]:
    """In every form of the op that the backend has, by name."""
    found = SAMPLE_INPUTS[op](dtype, device, torch.Generator().manual_seed(0))
    return {sample.name: sample for sample in found if has_form(backend, sample.name)}


FORMS = [(op, name) for op in OPS for name in samples(op)]

# Of patch_nce, by the first sample that has it: what is asked for.
PATCH_FORMS: dict[str, dict[str, bool]] = {}
for _name, _sample in samples("patch_nce").items():
    _options = {key: True for key, value in _sample.arguments.items() if value is True}
    if _options not in PATCH_FORMS.values():
        PATCH_FORMS[_name] = _options


def typical(
    op: str, dtype: torch.dtype = torch.float32, device: str = "cpu", backend: str = ""
) -> Sample:
    """The form with the most gradients and options: for what takes long, or does not depend on the form."""

    def size(sample: Sample) -> tuple[int, int]:
        return sum(x.requires_grad for x in tensors_of(sample)), len(sample.arguments)

    return max(samples(op, dtype, device, backend).values(), key=size)


def tensors_of(sample: Sample) -> list[Tensor]:
    """The tensors themselves, in the order of the arguments."""
    values = [v if isinstance(v, list) else [v] for v in sample.arguments.values()]
    return [x for value in values for x in value if isinstance(x, Tensor)]


def rows_of(sample: Sample) -> list[str]:
    """The arguments that have rows."""
    first = {name: x[0] if isinstance(x, list) else x for name, x in sample.arguments.items()}
    rows = {name: x for name, x in first.items() if isinstance(x, Tensor) and is_rows(x)}
    return [name for name in rows if name != "weights"]


def is_rows(x: Tensor) -> bool:
    return x.is_floating_point() and x.dim() >= 2


def mapped(sample: Sample, name: str, function: Callable[[Tensor], Tensor]) -> Sample:
    """The sample with ``function`` applied to every tensor; tensors keep their ``requires_grad``."""

    def change(x: object) -> object:
        if isinstance(x, list):
            return [change(item) for item in x]
        if not isinstance(x, Tensor):
            return x
        return function(x.detach()).requires_grad_(x.requires_grad)

    arguments = {key: change(value) for key, value in sample.arguments.items()}
    return Sample(f"{sample.name} {name}", arguments)


def call(op: str, sample: Sample, backend: str, **changes: object) -> list[Tensor]:
    """The results of the op as a list, without a backward."""
    out = getattr(fastnce, op)(**{**sample.arguments, **changes}, backend=backend)
    out = out[0] if op == "sample_patches" else out
    return out if isinstance(out, list) else [out]


def first_rows(sample: Sample, x: Tensor) -> dict[str, object]:
    """The first argument with ``x`` in it, of a list as the first of its items."""
    name, value = next(iter(sample.arguments.items()))
    return {name: [x, *value[1:]] if isinstance(value, list) else x}


class LikeDTensor(Tensor):
    """What the ops know a DTensor by."""

    def full_tensor(self):
        return self.as_subclass(Tensor)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], where: object = "") -> None:
    assert got.keys() == expected.keys()
    for name, x in got.items():
        assert torch.equal(x, expected[name]), f"{where}: {name} differs"


# Layouts of the same numbers.


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() >= 2 else x


def among_nans(x: Tensor) -> Tensor:
    """Every second row of every dimension, in the middle of a larger buffer that is NaN elsewhere."""
    if x.dim() == 0:
        return x
    if not x.is_floating_point():
        buffer = x.new_full((2 * len(x) + 1, *x.shape[1:]), 2**31 - 1)
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


LAYOUTS = [transposed, among_nans, every_third_feature, channels_last]

# Samples of other sizes.


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def of_rows(
    op: str,
    rows: Iterable[Tensor],
    dtype: torch.dtype,
    *,
    labels: Tensor | None = None,
    **options: object,
) -> Sample:
    """A loss of as many of the ``rows`` as it takes, (N, D) or as it has them, with their gradients.

    Labels are five classes if not given; a temperature that is a tensor gets its gradient.
    """
    first = next(iter(samples(op).values())).arguments
    arguments: dict[str, object] = {}
    for name, x in zip(rows_of(Sample("", first)), rows, strict=False):
        shape = (1,) * (first[name].dim() - x.dim()) + x.shape
        arguments[name] = x.detach().to(dtype).view(shape).requires_grad_()
    if "labels" in first:
        count = next(iter(arguments.values())).shape[0]
        arguments["labels"] = torch.arange(count) % 5 if labels is None else labels
    if "scale" in first:
        options.setdefault("scale", first["scale"])
    if op not in REDUCED:
        options.pop("reduction", None)
    if isinstance(options.get("temperature"), Tensor):
        options["temperature"] = options["temperature"].detach().requires_grad_()
    return Sample(f"{[tuple(x.shape) for x in rows]} {options}", arguments | options)


def info_nce_form(form: str, negatives: Tensor, own: Tensor) -> dict[str, object]:
    """The options of InfoNCE's forms, by words in their name: negatives (M, D) or a query's own (..., N, M, D)."""
    options: dict[str, object] = {"symmetric": True} if "symmetric" in form else {}
    if "queue" in form or "own" in form:
        rows = negatives if "queue" in form else own
        options["negative_keys"] = rows.detach().requires_grad_()
        options["in_batch_negatives"] = "in_batch" in form
    return options
