"""torch.compile and torch.export: sizes and numbers that vary are not compiled in."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastnce
from fastnce.losses import CLIPLoss, InfoNCELoss

SIZES = (8, 10, 13, 21, 34)
TEMPERATURES = (0.1, 0.15, 0.3, 0.5, 0.9)


def rows(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def two(size: int, dtype: torch.dtype) -> list[Tensor]:
    return [rows(size, 6, dtype=dtype), rows(size, 6, dtype=dtype).flip(0)]


def with_labels(size: int, dtype: torch.dtype) -> list[Tensor]:
    return [*two(size, dtype), torch.arange(size) % 3]


def module(query, key, *, temperature, backend):
    return InfoNCELoss(temperature, reduction="none", backend=backend)(query, key)


def clip(image, text, *, temperature, backend):
    return CLIPLoss(backend=backend)(image, text, 1 / temperature)


def two_layers(query, key, **options):
    """One tensor several times, which torch.compile does not pass on to an autograd.Function."""
    return fastnce.patch_nce([query, query], [key, query], **options)


def sample_patches(features, ids, *, temperature, backend):
    patches, _ = fastnce.sample_patches([features, features], patch_ids=[ids, ids], backend=backend)
    return (patches[0] + patches[1]) * temperature


# Op, what is called, and its tensors, made for a size.
CASES = {
    "info_nce": ("info_nce", fastnce.info_nce, two),
    "info_nce_none": ("info_nce", module, two),
    "queue": (
        "info_nce",
        fastnce.info_nce,
        lambda n, d: [*two(n, d), rows(n + 2, 6, dtype=d)],
    ),
    "own": ("info_nce", fastnce.info_nce, lambda n, d: [*two(n, d), rows(n, 3, 6, dtype=d)]),
    "clip": ("info_nce", clip, two),
    "patch_nce": ("patch_nce", two_layers, lambda n, d: [rows(2, n, 6, dtype=d) for _ in "qk"]),
    "conditional_contrastive": (
        "conditional_contrastive",
        fastnce.conditional_contrastive,
        with_labels,
    ),
    "sup_con": ("sup_con", fastnce.sup_con, lambda n, d: with_labels(n, d)[1:]),
    "nt_xent": ("nt_xent", fastnce.nt_xent, two),
    "pairwise_cosine_similarity": (
        "pairwise_cosine_similarity",
        fastnce.pairwise_cosine_similarity,
        two,
    ),
    "sample_patches": (
        "sample_patches",
        sample_patches,
        lambda n, d: [rows(2, 6, n, 4, dtype=d), torch.arange(5)],
    ),
}
# In fp16 the division by the number of losses comes with the backward.
WITH_DTYPES = [(name, torch.float32) for name in CASES]
WITH_DTYPES += [(name, torch.float16) for name in ("info_nce", "patch_nce")]


def results(function: Callable, tensors: list[Tensor], **options) -> list[Tensor]:
    """The result, and the gradient of each tensor that has one."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
    out = function(*leaves, **options)
    out.sum().backward()
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "dtype"), WITH_DTYPES, ids=str)
def test_two_compilations_for_all_sizes_and_temperatures(
    name, dtype, fused_backend, needs_support, device
):
    """The first of the size and the number that it is called with, the second for all others."""
    op, function, make = CASES[name]
    needs_support(op, fused_backend, dtype)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for size, temperature in zip(SIZES, TEMPERATURES, strict=True):
        tensors = [x.to(device) for x in make(size, dtype)]
        options = {"temperature": temperature, "backend": fused_backend}
        got, expected = results(compiled, tensors, **options), results(function, tensors, **options)
        # Equal to the last bit; but the compiler adds up the gradients of one tensor in another order, and kernels of the GPU
        # round a number in a tensor at another place. Triton's then take their offset from each row's maximum.
        close = 0.0
        if fused_backend != "native" or name == "patch_nce":
            close = max(2e-3 if fused_backend == "triton" else 2e-5, 4 * torch.finfo(dtype).eps)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=close, atol=close)
    assert counter.frame_count <= 2


def test_a_size_marked_dynamic_is_compiled_once(fused_backend, needs_support, device):
    needs_support("info_nce", fused_backend)
    counter = CompileCounterWithBackend("aot_eager")
    loss = InfoNCELoss(backend=fused_backend)
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for size in SIZES[:3]:
        tensors = [x.to(device) for x in two(size, torch.float32)]
        marked = [x.detach().requires_grad_() for x in tensors]
        for x in marked:
            torch._dynamo.mark_dynamic(x, 0)
        compiled(*marked).backward()
        _, *expected = results(loss, tensors)
        assert all(torch.equal(x.grad, y) for x, y in zip(marked, expected, strict=True))
    assert counter.frame_count == 1


class Call(nn.Module):
    """A function with its options as a module, which is what torch.export takes."""

    def __init__(self, function: Callable, **options: object) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors, **self.options)


@pytest.mark.parametrize("name", CASES)
def test_exported_with_a_dynamic_size(name, backend, needs_support, device):
    op, function, make = CASES[name]
    needs_support(op, backend)
    module = Call(function, temperature=0.2, backend=backend)
    first, other = ([x.to(device) for x in make(size, torch.float32)] for size in SIZES[:2])
    size, more = torch.export.Dim("size", min=3), torch.export.Dim("more", min=3)
    known = {8: size, 10: size + 2 if name == "queue" else more}
    shapes = [
        {dim: known[x.shape[dim]] for dim in range(x.dim()) if x.shape[dim] in known} for x in first
    ]
    exported = torch.export.export(module, tuple(first), dynamic_shapes={"tensors": tuple(shapes)})
    assert torch.equal(exported.module()(*other), module(*other))
