"""Calls of InfoNCE's compiled CPU kernels that cut the matrix in every way, the reference's results, and the instruction sets."""

import torch

from fastnce import reference
from fastnce.backends import native

IN_BATCH = {"normalize": True, "symmetric": False, "in_batch": True, "self_logit": None}
SYMMETRIC = {**IN_BATCH, "symmetric": True}
QUEUE = {**IN_BATCH, "in_batch": False}
PATCHES = {**IN_BATCH, "self_logit": -10.0}

LEVELS = ("portable", "avx2", "avx512", "avx512bf16")

# (B, N, D), negatives, options: what makes the kernels cut the matrix in every way that they know.
BLOCKS = {
    "several_panels": ((1, 1100, 20), None, IN_BATCH),
    "several_panels_symmetric": ((1, 1100, 20), None, SYMMETRIC),
    "one_row": ((1, 1, 16), (70_000, 16), QUEUE),
    "few_rows_recomputed": ((1, 50, 4), (90_000, 4), QUEUE),
    "few_columns": ((1, 3000, 130), (7, 130), QUEUE),
    "keys_and_queue": ((1, 600, 33), (900, 33), IN_BATCH),
    "batch_and_queue": ((3, 70, 33), (50, 33), IN_BATCH),
    "many_small": ((9, 40, 27), None, PATCHES),
    "own": ((2, 30, 27), (2, 30, 150, 27), IN_BATCH),
}


def problem(name: str, dtype: torch.dtype = torch.float32) -> tuple[tuple, dict]:
    """Positional arguments and options of :func:`native.info_nce_forward`."""
    shape, negatives, options = BLOCKS[name]
    generator = torch.Generator().manual_seed(0)
    query, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "qk")
    key = 0.3 * query + noise
    if negatives is not None:
        negatives = torch.randn(negatives, generator=generator, dtype=torch.float64).to(dtype)
    temperature = torch.tensor(0.07, dtype=torch.promote_types(dtype, torch.float32))
    return (query.to(dtype), key.to(dtype), negatives, temperature), options


def kernel_results(name: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Losses and gradients, those of the forward itself and those of the backward."""
    inputs, options = problem(name, dtype)
    needs = tuple(x is not None for x in inputs)
    loss, lse, now = native.info_nce_forward(*inputs, **options, grad_scale=0.25, needs=needs)
    upstream = torch.linspace(-1, 1, loss.numel(), dtype=loss.dtype).view_as(loss)
    later = native.info_nce_backward(upstream, *inputs, lse, **options, needs=needs)
    return [loss, *(x for x in (*now, *later) if x is not None)]


def reference_results(name: str, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """In double, of the numbers that ``dtype`` holds."""
    inputs, options = problem(name, dtype)
    inputs = [x if x is None else x.double() for x in inputs]
    leaves = [x if x is None else x.requires_grad_() for x in inputs]
    wanted = [x for x in leaves if x is not None]
    loss = reference.info_nce(*leaves, **options)
    upstream = torch.linspace(-1, 1, loss.numel(), dtype=loss.dtype).view_as(loss)
    now = torch.autograd.grad(loss, wanted, torch.full_like(loss, 0.25), retain_graph=True)
    later = torch.autograd.grad(loss, wanted, upstream)
    return [loss.detach(), *now, *later]


def deviations(got: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    """Of each tensor, relative to its largest element."""
    pairs = zip(got, expected, strict=True)
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]


def available_levels(monkeypatch) -> list[str]:
    """The instruction sets of this processor."""
    found = []
    for level in LEVELS:
        monkeypatch.setenv("FASTNCE_CPU_ISA", level)
        try:
            native.info_nce_forward(
                *problem("own")[0], **IN_BATCH, grad_scale=None, needs=(False,) * 4
            )
        except RuntimeError as error:
            assert "this processor does not have it" in str(error)
        else:
            found.append(level)
    monkeypatch.delenv("FASTNCE_CPU_ISA")
    return found
