"""A number that is not finite reaches the loss and every gradient that it belongs to, and no other.

Otherwise GradScaler takes a step that it should skip, or a whole batch is lost to one row. Truth is the autograd of the reference
in fp64: for each result, which rows have an element that is not finite.
"""

import math

import pytest
import torch
from native_calls import available_levels
from torch import Tensor

from fastnce import backends, reference
from fastnce.backends import native
from fastnce.ops.instance_norm import instance_norm
from fastnce.testing import SAMPLE_INPUTS, Sample, rows, run

VALUES = (math.inf, -math.inf, math.nan)


def dot_products(dtype: torch.dtype, device: str, generator: torch.Generator) -> list[Sample]:
    """Logits are infinite themselves: a softmax is 0, and the rows that it would have multiplied stay finite."""

    def make(*shape: int) -> Tensor:
        return rows(*shape, dtype=dtype, device=device, generator=generator)

    base = {"query": make(8, 6), "positive_key": make(8, 6), "normalize": False}
    base["temperature"] = torch.tensor(1.5, requires_grad=True)
    forms = {
        "in_batch": {},
        "symmetric": {"symmetric": True},
        "queue": {"negative_keys": make(7, 6)},
        "own": {"negative_keys": make(8, 3, 6)},
        "own_in_batch": {"negative_keys": make(8, 3, 6), "in_batch_negatives": True},
    }
    return [
        Sample(f"dot_{name}_{reduction}", {**base, **form, "reduction": reduction})
        for name, form in forms.items()
        for reduction in ("mean", "none")
    ]


def small_temperatures(dtype: torch.dtype, device: str, generator: torch.Generator):
    """Where exponentials need the maximum of their row."""
    x, y = (rows(40, 12, dtype=dtype, device=device, generator=generator) for _ in range(2))
    labels = torch.arange(40, device=device) % 5
    cold = {"temperature": 0.01}
    yield "info_nce", Sample("cold", {"query": x, "positive_key": y, **cold})
    yield "sup_con", Sample("cold", {"features": x, "labels": labels, **cold})
    both = {"embeddings": x, "proxies": y, "labels": labels}
    yield "conditional_contrastive", Sample("cold", {**both, **cold})


def forms_of(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
    generator = torch.Generator().manual_seed(0)
    found = [
        (op, sample) for op, s in SAMPLE_INPUTS.items() for sample in s(dtype, device, generator)
    ]
    found += [("info_nce", sample) for sample in dot_products(dtype, device, generator)]
    found += small_temperatures(dtype, device, generator)
    return {f"{op}-{sample.name}": (op, sample) for op, sample in found}


def poisoned(sample: Sample, argument: str, value: float) -> Sample:
    """One element of one row is ``value``; of a list of tensors, in the first."""

    def change(x: object, chosen: bool) -> object:
        if isinstance(x, list):
            return [change(item, chosen and i == 0) for i, item in enumerate(x)]
        if not isinstance(x, Tensor):
            return x
        copy = x.detach().clone()
        if chosen and argument == "features" and x.dim() == 4:
            copy[1, 2, x.shape[2] // 2, x.shape[3] // 2] = value
        elif chosen:
            one_row = copy.view(-1, x.shape[-1])[5:6]
            one_row[:, 2] = value
        return copy.requires_grad_(x.requires_grad)

    changed = {name: change(x, name == argument) for name, x in sample.arguments.items()}
    return Sample(f"{sample.name}, {value} in {argument}", changed)


def rows_of_floats(sample: Sample) -> list[str]:
    """The arguments that have rows."""
    first = {name: x[0] if isinstance(x, list) else x for name, x in sample.arguments.items()}
    return [
        name
        for name, x in first.items()
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 2
    ]


def as_rows(op: str, name: str, x: Tensor) -> Tensor:
    """(..., D) in double; the rows of a map's gradient are its positions, those of losses single numbers."""
    x = x.detach().double()
    if op == "sample_patches" and name.startswith("d "):
        return x.movedim(1, -1)
    return x if x.dim() >= 2 and (name.startswith("d ") or op == "sample_patches") else x[..., None]


def assert_same_rows(op: str, backend: str, sample: Sample, dtype: torch.dtype) -> None:
    expected = run(op, sample, backend="torch", convert=lambda name, x: x.double())
    got = run(op, sample, backend=backend)
    assert got.keys() == expected.keys()
    for name, truth in expected.items():
        where = f"{op} on {backend}, {dtype}, {sample.name}: {name}"
        x, truth = as_rows(op, name, got[name]), as_rows(op, name, truth)
        finite = truth.isfinite().all(-1)
        got_finite = x.isfinite().all(-1)
        if backend in ("triton", "cuda") and sample.name.startswith("dot"):
            assert not (got_finite & ~finite).any(), where
            continue  # an infinite logit takes its whole row of the matrix along
        assert torch.equal(got_finite, finite), where
        if finite.any():
            x, truth = x[finite], truth[finite]
            tolerance = 1e-4 if torch.finfo(dtype).eps < 1e-5 else 3e-2
            allowed = tolerance * max(truth.abs().max().item(), 1e-4)
            assert (x - truth).abs().max().item() <= allowed, where


@pytest.mark.parametrize("form", forms_of())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_that_are_not_finite(form, dtype, backend, needs_support, device):
    op, sample = forms_of(dtype, device)[form]
    needs_support(op, backend, dtype)
    for argument in rows_of_floats(sample):
        for value in VALUES if dtype == torch.float32 else VALUES[:1]:
            assert_same_rows(op, backend, poisoned(sample, argument, value), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zero_rows_stay_finite(dtype, fused_backend, needs_support, device):
    """Beside a row that is not: an infinite row's inverse norm is no zero row's."""
    op, sample = forms_of(dtype, device)["info_nce-queue"]
    needs_support(op, fused_backend, dtype)
    changed = poisoned(sample, "query", math.inf)
    with torch.no_grad():
        changed.arguments["query"][7] = 0
    assert_same_rows(op, fused_backend, changed, dtype)
    gradient = run(op, changed, backend=fused_backend)["d query"]
    assert not gradient[7].any() and not gradient[5].isfinite().any()


@pytest.mark.skipif(native.available() != "ok", reason=native.available())
def test_of_every_instruction_set(monkeypatch):
    forms = forms_of()
    for level in available_levels(monkeypatch):
        monkeypatch.setenv("FASTNCE_CPU_ISA", level)
        for form in ("info_nce-queue_in_batch", "info_nce-dot_symmetric_none", "sup_con-mean"):
            op, sample = forms[form]
            for argument in rows_of_floats(sample):
                assert_same_rows(op, "native", poisoned(sample, argument, math.inf), torch.float32)


def test_labelled_lse(fused_backend, needs_support, device):
    """A lse that is not finite is no empty sum, which has no gradient."""
    needs_support("labelled_lse", fused_backend)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 5, generator=generator).to(device) for n in (7, 40))
    labels = [(torch.arange(n) % 3).to(device) for n in (7, 40)]
    y[5, 1] = math.inf
    kernels = backends.select("labelled_lse", x, fused_backend)
    lse = kernels.labelled_lse_forward(x, y, *labels, 0.5, own=False)
    expected = reference.labelled_lse_forward(x, y, *labels, 0.5, own=False)
    assert torch.equal(lse.isfinite(), expected.isfinite())
    state = [torch.ones(n, 4, dtype=torch.float64, device=device) for n in (7, 40)]
    state[0][:, :2] = expected
    y[5, 1] = 0  # the lse alone says so
    gradients = kernels.labelled_lse_backward(x, y, *labels, 0.5, *state, own=False)
    assert gradients[0].isnan().all() and gradients[1].isnan()


@pytest.mark.parametrize("value", VALUES)
def test_instance_norm(value):
    """In fp64 it is plain PyTorch."""
    x = torch.randn(2, 16, 6, 5, generator=torch.Generator().manual_seed(0))
    x[1, 3, 2, 2] = value
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.detach().to(dtype).requires_grad_()
        out = instance_norm(leaf, slope=0.2)
        (grad,) = torch.autograd.grad(out, leaf, out.detach().isnan().to(dtype) + 0.5)
        found.append(torch.stack([out.isfinite().all(-1).all(-1), grad.isfinite().all(-1).all(-1)]))
    assert torch.equal(*found) and not found[0].all() and found[0].sum() == 62
