"""torch.compile and torch.export: sizes and numbers that vary are not compiled in."""

from collections.abc import Callable

import pytest
import torch
from forms import LOSSES, gaussian, info_nce_form, of_rows
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastnce
from fastnce.losses import CLIPLoss, InfoNCELoss

SIZES = (8, 10, 13, 21, 34)
TEMPERATURES = (0.1, 0.15, 0.3, 0.5, 0.9)


def module(query, positive_key, **options):
    return InfoNCELoss(reduction="none", **options)(query, positive_key)


def masked(query, positive_key, negative_keys=None, **options):
    """InfoNCE with ids, and masks, weights or a guide, made of the rows."""
    ids = torch.arange(query.shape[0], device=query.device) % 3
    if negative_keys is None:
        options |= {"key_mask": ids > 0, "weights": query.detach()[:, 0].abs()}
    elif negative_keys.dim() == 2:
        guide = [x.detach() for x in (query, positive_key, negative_keys)]
        options |= {"guide": guide, "guide_margin": 0.1, "reduction": "none"}
    else:
        options |= {"negative_mask": negative_keys.detach()[..., 0] > 0}
    options |= {"query_ids": ids, "in_batch_negatives": True, "decoupled": True}
    return fastnce.info_nce(query, positive_key, negative_keys, **options)


def masked_patches(query_features, key_features, **options):
    places = torch.arange(query_features.shape[1], device=query_features.device)[None]
    options |= {"ids": places % 3, "weights": query_features.detach()[..., 0].abs()}
    return fastnce.patch_nce(query_features, key_features, query_negatives=True, **options)


def clip(query, positive_key, *, temperature, backend):
    return CLIPLoss(backend=backend)(query, positive_key, 1 / temperature)


def two_layers(query_features, key_features, **options):
    """One tensor several times, which torch.compile does not pass on to an autograd.Function."""
    return fastnce.patch_nce([query_features] * 2, [key_features, query_features], **options)


def sample_patches(features, patch_ids, *, temperature, backend):
    ids = [patch_ids, patch_ids]
    patches, _ = fastnce.sample_patches([features, features], patch_ids=ids, backend=backend)
    return (patches[0] + patches[1]) * temperature


# Op, and what is called.
CASES = {op: (op, getattr(fastnce, op)) for op in LOSSES} | {
    "info_nce none": ("info_nce", module),
    "queue": ("info_nce", fastnce.info_nce),
    "own": ("info_nce", fastnce.info_nce),
    "masked": ("info_nce", masked),
    "masked queue": ("info_nce", masked),
    "masked own": ("info_nce", masked),
    "masked patches": ("patch_nce", masked_patches),
    "clip": ("info_nce", clip),
    "patch_nce": ("patch_nce", two_layers),
    "sample_patches": ("sample_patches", sample_patches),
}
# In fp16 the division by the number of losses comes with the backward.
WITH_DTYPES = [(name, torch.float32) for name in CASES]
WITH_DTYPES += [(name, torch.float16) for name in ("info_nce", "masked", "patch_nce")]


def tensors(name: str, size: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The arguments, of which one or more have the size."""
    if name == "sample_patches":
        arguments = {"features": gaussian(2, 6, size, 4).to(dtype), "patch_ids": torch.arange(5)}
    else:
        rows = gaussian(size, 6), gaussian(size, 6, seed=1)
        form = info_nce_form(name, gaussian(size + 2, 6).to(dtype), gaussian(size, 3, 6).to(dtype))
        made = of_rows(CASES[name][0], rows, dtype, **form).arguments
        arguments = {key: x for key, x in made.items() if isinstance(x, Tensor)}
    return {key: x.to(device) for key, x in arguments.items()}


def results(function: Callable, given: dict[str, Tensor], **options) -> list[Tensor]:
    """The result, and the gradient of each tensor that has one."""
    leaves = {key: x.detach().requires_grad_(x.is_floating_point()) for key, x in given.items()}
    out = function(**leaves, **options)
    out.sum().backward()
    return [out.detach(), *(x.grad for x in leaves.values() if x.grad is not None)]


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "dtype"), WITH_DTYPES, ids=str)
def test_two_compilations_for_all_sizes_and_temperatures(
    name, dtype, fused_backend, needs_support, device
):
    """The first of the size and the number that it is called with, the second for all others."""
    op, function = CASES[name]
    needs_support("masked_info_nce" if "masked" in name else op, fused_backend, dtype)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for size, temperature in zip(SIZES, TEMPERATURES, strict=True):
        given = tensors(name, size, dtype, device)
        options = {"temperature": temperature, "backend": fused_backend}
        got, expected = results(compiled, given, **options), results(function, given, **options)
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
        given = tensors("info_nce", size, torch.float32, device)
        marked = {key: x.detach().requires_grad_() for key, x in given.items()}
        for x in marked.values():
            torch._dynamo.mark_dynamic(x, 0)
        compiled(**marked).backward()
        _, *expected = results(loss, given)
        assert all(torch.equal(x.grad, y) for x, y in zip(marked.values(), expected, strict=True))
    assert counter.frame_count == 1


class Call(nn.Module):
    """A function with its options as a module, which is what torch.export takes."""

    def __init__(self, function: Callable, **options: object) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        return self.function(**given, **self.options)


@pytest.mark.parametrize("name", CASES)
def test_exported_with_a_dynamic_size(name, backend, needs_support, device):
    op, function = CASES[name]
    needs_support("masked_info_nce" if "masked" in name else op, backend)
    module = Call(function, temperature=0.2, backend=backend)
    first, other = (tensors(name, size, torch.float32, device) for size in SIZES[:2])
    size, more = torch.export.Dim("size", min=3), torch.export.Dim("more", min=3)
    known = {8: size, 10: size + 2 if "queue" in name else more}
    shapes = {
        key: {dim: known[n] for dim, n in enumerate(x.shape) if n in known}
        for key, x in first.items()
    }
    exported = torch.export.export(module, (first,), dynamic_shapes={"given": shapes})
    assert torch.equal(exported.module()(other), module(other))
