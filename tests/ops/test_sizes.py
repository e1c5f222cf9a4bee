"""The numerical contract of every loss over sizes, temperatures, labels and awkward rows: pairs of these, not all combinations."""

import pytest
import torch
from forms import (
    DTYPES,
    LOSSES,
    PATCH_FORMS,
    gaussian,
    has_form,
    info_nce_form,
    of_rows,
    rows_of,
    samples,
)
from torch import Tensor

import fastnce
from fastnce.testing import Sample, assert_close_to_truth, forget, run

SIZES = [1, 2, 63, 64, 65, 100, 252, 256, 507]
DEPTHS = [1, 3, 16, 27, 64, 96, 123, 256, 384, 512, 768, 1000, 1536]
TEMPERATURES = [0.005, 0.01, 0.023, 0.07, 0.5, 1.0, 10.0]
FORMS = ["in_batch", "symmetric", "queue", "queue in_batch", "own", "batched", "own in_batch"]
HALF = (torch.bfloat16, torch.float16)
LABELLED = [op for op in LOSSES if "labels" in next(iter(samples(op).values())).arguments]
each_loss = pytest.mark.parametrize("op", LOSSES)


def forms_of(op: str, backend: str = "torch") -> list[str]:
    """Those that the backend has."""
    return [name for name in PATCH_FORMS if has_form(backend, name)] if op == "patch_nce" else FORMS


def shaped(op: str, index: int, dtype: torch.dtype, backend: str = "torch") -> Sample:
    """Sizes that are coprime in number: in 36 samples each meets each of the others."""
    forms = forms_of(op, backend)
    form = forms[(index + index // 9) % len(forms)]
    count, depth = SIZES[index % 9], DEPTHS[(4 * index) % 13]
    # The fp16 gradient of a mean over many rows is below what fp16 resolves.
    mean = "sum" if dtype == torch.float16 else "mean"
    reduction = (mean, "none", "sum")[index % 3]
    if op == "nt_xent":
        # Of one image the loss is 0, of near ones almost: there the bound means nothing.
        count, reduction = max(2, count), mean if count > 2 else "mean"
    elif op == "patch_nce" and dtype in (torch.float64, torch.float16):  # it has no other reduction
        count = min(count, 8)
    tau = TEMPERATURES[(3 * index) % 7]
    lead = (3,) if op == "info_nce" and "batched" in form else ()
    x = gaussian(*lead, count, depth, seed=index)
    y = x + (1.0 if op == "nt_xent" else 0.7) * gaussian(*lead, count, depth, seed=index + 1)
    options = {"temperature": tau, "reduction": reduction}
    if index % 2 and op != "nt_xent":
        options["temperature"] = torch.tensor(tau)
    if op == "info_nce":
        other = SIZES[(5 * index + 3) % 9]
        rows = gaussian(other, depth, seed=index + 2), gaussian(count, min(other, 10), depth)
        options["normalize"] = depth > 16 or tau < 0.5
        options |= info_nce_form(form, *(r.to(dtype) for r in rows))
    elif op == "patch_nce":
        options |= {"negatives": ("image", "batch")[index % 2], **PATCH_FORMS[form]}
        x, y = (z.unflatten(0, (2, -1)) if count % 2 == 0 else z for z in (x, y))
    elif op == "pairwise_cosine_similarity":
        y = gaussian(SIZES[(5 * index + 3) % 9], depth, seed=index + 1)
    elif op == "sup_con":
        options["labels"] = torch.arange(count) % max(1, count // 3)
    return of_rows(op, (x, y), dtype, **options)


@each_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_and_temperatures(op, dtype, fused_backend, needs_support):
    needs_support(op, fused_backend, dtype)
    for index in range(DTYPES.index(dtype), 54 if op in ("info_nce", "patch_nce") else 36, 4):
        assert_close_to_truth(op, fused_backend, shaped(op, index, dtype, fused_backend), dtype)


def of_kind(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (20, 12) twice, and negatives (30, 12), of an awkward kind."""
    x, y, negatives = gaussian(20, 12, seed=5), gaussian(20, 12, seed=6), gaussian(30, 12, seed=7)
    tiny, huge = (1e-6, 2e4) if dtype == torch.float16 else (1e-20, 1e20)
    if kind == "identical":
        x, y, negatives = x[:1].repeat(20, 1), x[:1].repeat(20, 1), x[:1].repeat(30, 1)
    elif kind == "opposite":  # every cosine of two sides -1
        x, y, negatives = x[:1].repeat(20, 1), -x[:1].repeat(20, 1), -x[:1].repeat(30, 1)
    elif kind == "one opposite":  # the positive is the worst key
        y = -x
    elif kind == "zero":
        x[3], y[3], y[7], negatives[0] = 0, 0, 0, 0
    elif kind == "all zero":
        x, y, negatives = x * 0, y * 0, negatives * 0
    elif kind == "norms":
        x[::3] *= tiny
        x[1::3] *= huge
        y[::2] *= huge
        y[1::2] *= tiny
        negatives[::2] *= tiny
    elif kind == "duplicates":  # of the positive, among the negatives
        y = x + 0.1 * y
        y[1::2] = y[::2].clone()
        negatives[:20] = y
    return x, y, negatives


def awkward(op: str, kind: str, tau: float, form: str, dtype: torch.dtype) -> Sample:
    x, y, negatives = of_kind(kind, dtype)
    options = {"temperature": torch.tensor(tau), "reduction": "sum"}
    if op == "info_nce":
        options |= info_nce_form(form, negatives.to(dtype), negatives.to(dtype))
    elif op == "patch_nce":
        options |= PATCH_FORMS.get(form, {})
    return of_rows(op, (x, y), dtype, labels=torch.arange(20) % 4, **options)


KINDS = ["identical", "opposite", "one opposite", "zero", "all zero", "norms", "duplicates"]


@each_loss
@pytest.mark.parametrize("kind", KINDS)
def test_awkward_rows(op, kind, fused_backend, needs_support):
    """InfoNCE and PatchNCE in every form, in turn with the dtypes and temperatures."""
    forms = forms_of(op, fused_backend)
    of_many = {"info_nce": forms[:4], "patch_nce": forms}.get(op)
    for i, tau in enumerate((0.005, 0.07, 1.0)):
        for j, dtype in enumerate((torch.float32, torch.bfloat16)):
            needs_support(op, fused_backend, dtype)
            for form in of_many if of_many and (i + j) % 2 == 0 else [forms[(i + j) % len(forms)]]:
                sample = awkward(op, kind, tau, form, dtype)
                assert_close_to_truth(op, fused_backend, sample, dtype)


@each_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows_have_the_cosine_zero_and_the_gradient_zero(op, dtype, backend, needs_support):
    needs_support(op, backend, dtype)
    for form in ("queue in_batch", "symmetric") if op == "info_nce" else ("",):
        got = run(op, awkward(op, "zero", 0.5, form, dtype), backend=backend)
        x, *others = (grad.flatten(0, -2) for name, grad in got.items() if grad.dim() >= 2)
        if op == "pairwise_cosine_similarity":
            assert x[3].eq(0).all() and x[:, 3].eq(0).all()
            x, *others = others
        zeros = [[3], [3, 7], [0]]
        for grad, rows in zip((x, *others), zeros, strict=False):
            assert grad.isfinite().all() and grad[rows].eq(0).all() and grad.abs().sum() > 0
        rows = torch.ones(20, dtype=torch.bool).index_fill(0, torch.tensor([3]), False)
        assert x[rows].ne(0).any(-1).all(), "no other row lost its gradient"


LABELS = {
    "one_class": lambda n: torch.zeros(n, dtype=torch.long),
    "two_each": lambda n: torch.arange(n) // 2,
    "eight_and_nine": lambda n: torch.arange(n) % 17 // 9,
    "all_different": lambda n: torch.arange(n) - 2**62,
    "two_and_many": lambda n: (torch.arange(n) >= 2).long() * 2**40,
}


@pytest.mark.parametrize("op", LABELLED)
@pytest.mark.parametrize("labelling", LABELS)
def test_labellings(op, labelling, fused_backend, needs_support):
    needs_support(op, fused_backend)
    for i, tau in enumerate((0.005, 0.0229, 0.023, 0.07, 1.0)):
        for duplicates in (False, True):
            dtype = DTYPES[(i + duplicates) % 2]
            x = gaussian(68, 24, seed=7)
            x[34:] = x[:34].clone() if duplicates else x[34:]
            options = {"temperature": torch.tensor(tau), "labels": LABELS[labelling](68)}
            options["reduction"] = "none" if duplicates else "sum"
            sample = of_rows(op, (x, gaussian(68, 24, seed=8)), dtype, **options)
            assert_close_to_truth(op, fused_backend, sample, dtype)


# What may and may not change a loss.


@each_loss
def test_one_tensor_for_every_argument(op, backend, needs_support):
    needs_support(op, backend)
    x = gaussian(12, 5).requires_grad_()
    apart = of_rows(op, (x, x), torch.float64)
    same = {
        name: (x.view_as(value) if value.dim() > 2 else x) if name != "labels" else value
        for name, value in apart.arguments.items()
    }
    expected = run(op, apart, backend="torch")
    out = getattr(fastnce, op)(**same, backend=backend)
    torch.testing.assert_close(out, expected.pop("out"))
    upstream = torch.tensor(0.7, dtype=torch.float64)
    if out.dim():
        upstream = (0.2 + torch.arange(out.numel()).cos()).bfloat16().double().view_as(out)
    (got,) = torch.autograd.grad(out, x, upstream)
    torch.testing.assert_close(got, sum(grad.view_as(x) for grad in expected.values()))


@each_loss
def test_expanded_rows(op, fused_backend, needs_support):
    """Strides of zero; as own negatives of every query a queue."""
    needs_support(op, fused_backend)
    options = info_nce_form("own", None, gaussian(9, 4, 6).float()) if op == "info_nce" else {}
    sample = of_rows(op, (gaussian(9, 6), gaussian(9, 6, seed=1)), torch.float32, **options)
    for dim, name in zip((-2, -1, -3), rows_of(sample), strict=False):
        x = sample.arguments[name].detach()
        sample.arguments[name] = x.narrow(dim, 0, 1).expand(x.shape).requires_grad_()
    assert_close_to_truth(op, fused_backend, sample, torch.float32)


@each_loss
def test_rows_further_apart_than_int32_reaches(op, fused_backend, needs_support):
    """6 GB of addresses of which only a few pages are ever touched."""
    needs_support(op, fused_backend, torch.bfloat16)
    far = torch.empty(3 * 2**30 + 64, dtype=torch.bfloat16)
    options = {}
    if op == "info_nce":
        options = {"negative_keys": gaussian(4, 16, seed=2).bfloat16(), "in_batch_negatives": True}
    sample = of_rows(op, (gaussian(4, 16), gaussian(4, 16, seed=1)), torch.bfloat16, **options)
    for i, (name, x) in enumerate(sample.arguments.items()):
        if isinstance(x, Tensor) and x.dtype == torch.bfloat16:
            strides = (0,) * (x.dim() - 2) + (2**30 - 20, 1)
            view = far.as_strided(x.shape, strides, 20 * i).copy_(x.detach())
            sample.arguments[name] = view.requires_grad_()
    try:
        assert_close_to_truth(op, fused_backend, sample, torch.bfloat16)
    finally:
        forget()  # with 6 GB of addresses held, the system may refuse to fork


@pytest.mark.parametrize("op", ["info_nce", "patch_nce"])
def test_a_key_that_all_queries_are_near(op, fused_backend, device, needs_support):
    """In fp16 the gradient of the sum of their losses is beyond 65504, that of the mean is not."""
    needs_support(op, fused_backend, torch.float16)
    query = torch.zeros(4096, 16, dtype=torch.float16, device=device)
    query[:, 0], query[:, 1] = 0.9, 0.43
    key = torch.eye(16, dtype=torch.float16, device=device).roll(-1, 0).repeat(256, 1)
    key[0], key[1:, 0] = 0, 0
    key[0, 0] = 0.1
    names = {"info_nce": ("query", "positive_key"), "patch_nce": ("query_features", "key_features")}
    rows = (
        x.requires_grad_() if op == "info_nce" else x[None].requires_grad_() for x in (query, key)
    )
    sample = Sample("hub", dict(zip(names[op], rows, strict=True)))
    assert_close_to_truth(op, fused_backend, sample, torch.float16)
