"""A number that is not finite reaches the loss and every gradient that it belongs to, and no other.

Otherwise GradScaler takes a step that it should skip, or a whole batch is lost to one row. Truth is the autograd of the reference
in fp64: for each result, which rows have an element that is not finite.
"""

import math

import pytest
import torch
from forms import DTYPES, OPS, gaussian, has_form, info_nce_form, of_rows, rows_of, samples
from torch import Tensor

import fastnce
from fastnce import backends, reference
from fastnce.backends import native
from fastnce.ops.instance_norm import instance_norm
from fastnce.testing import Sample, run

VALUES = (math.inf, -math.inf, math.nan)


def forms_of(
    op: str, dtype: torch.dtype = torch.float32, device: str = "cpu", backend: str = ""
) -> list[Sample]:
    """Those of every op; dot products, the logits of which are infinite themselves; and small temperatures.

    A softmax of infinite logits is 0, and the rows that it would have multiplied stay finite. Where the temperature is small,
    exponentials need the maximum of their row. Masks have tests of their own: the gradients of plain PyTorch have 0 for the pairs
    that are left out of a row that is not finite, others NaN.
    """
    found = [x for x in samples(op, dtype, device, backend).values() if "masked" not in x.name]
    if op == "info_nce":
        for form in ("dot", "dot symmetric", "dot queue", "dot own", "dot own in_batch"):
            if not has_form(backend, form.replace(" ", "_")):
                continue
            for reduction in ("mean", "none"):
                options = {"temperature": torch.tensor(1.5), "reduction": reduction}
                negatives = gaussian(7, 6).to(device, dtype), gaussian(8, 3, 6).to(device, dtype)
                options |= info_nce_form(form, *negatives) | {"normalize": False}
                rows = (x.to(device) for x in (gaussian(8, 6), gaussian(8, 6, seed=1)))
                made = of_rows(op, tuple(rows), dtype, **options)
                found.append(Sample(f"{form} {reduction}", made.arguments))
    if op in ("info_nce", "sup_con", "conditional_contrastive"):
        rows = tuple(gaussian(40, 12, seed=seed).to(device) for seed in (0, 1))
        labels = torch.arange(40, device=device) % 5
        found.append(of_rows(op, rows, dtype, labels=labels, temperature=0.01))
    return found


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


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_finite(op, dtype, fused_backend, needs_support, device):
    """On the host of every instruction set in single precision."""
    needs_support(op, fused_backend, dtype)
    for sample in forms_of(op, dtype, device, fused_backend):
        for argument in rows_of(sample):
            for value in VALUES if dtype == torch.float32 else VALUES[:1]:
                assert_same_rows(op, fused_backend, poisoned(sample, argument, value), dtype)


@pytest.mark.skipif(native.available() != "ok", reason=native.available())
def test_of_every_instruction_set(instruction_sets):
    for _ in instruction_sets():
        for op, choose in {"info_nce": ("queue_in_batch", "dot symmetric none"), "sup_con": ("mean",)}.items():  # fmt: skip
            for sample in forms_of(op):
                for argument in rows_of(sample) if sample.name in choose else ():
                    poison = poisoned(sample, argument, math.inf)
                    assert_same_rows(op, "native", poison, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_zero_row_stays_finite_beside_an_infinite_one(
    dtype, fused_backend, needs_support, device
):
    """An infinite row's inverse norm is no zero row's."""
    needs_support("info_nce", fused_backend, dtype)
    changed = poisoned(samples("info_nce", dtype, device)["queue"], "query", math.inf)
    with torch.no_grad():
        changed.arguments["query"][7] = 0
    assert_same_rows("info_nce", fused_backend, changed, dtype)
    gradient = run("info_nce", changed, backend=fused_backend)["d query"]
    assert not gradient[7].any() and not gradient[5].isfinite().any()


def test_labelled_lse(fused_backend, needs_support, device):
    """A lse that is not finite is no empty sum, which has no gradient."""
    needs_support("labelled_lse", fused_backend)
    x, y = gaussian(7, 5).float().to(device), gaussian(40, 5).float().to(device)
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
    x = gaussian(2, 16, 6, 5)
    x[1, 3, 2, 2] = value
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.detach().to(dtype).requires_grad_()
        out = instance_norm(leaf, slope=0.2)
        (grad,) = torch.autograd.grad(out, leaf, out.detach().isnan().to(dtype) + 0.5)
        found.append(torch.stack([out.isfinite().all(-1).all(-1), grad.isfinite().all(-1).all(-1)]))
    assert torch.equal(*found) and not found[0].all() and found[0].sum() == 62


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("argument", ["query", "positive_key", "negative_keys"])
def test_a_loss_is_infinite_where_that_of_plain_pytorch_is(argument, value, backend):
    """Not NaN, also where a row's sums, with and without its own negatives, have maxima far apart."""
    rows = {"query": gaussian(2, 9, 6), "positive_key": gaussian(2, 9, 6, seed=1)}
    rows["negative_keys"] = gaussian(2, 9, 4, 6, seed=2)
    rows = {name: x.float() for name, x in rows.items()}
    rows[argument][1, 4, ..., 2] = value
    options = {"in_batch_negatives": True, "normalize": False, "reduction": "none"}
    losses, plain = (fastnce.info_nce(**rows, **options, backend=x) for x in (backend, "torch"))
    torch.testing.assert_close(losses, plain, equal_nan=True, rtol=1e-4, atol=1e-4)
