"""The supervised contrastive loss against its definition, and its corner cases."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastnce import sup_con
from fastnce.testing import Sample, assert_close_to_truth, rows, run

OP = "sup_con"


@pytest.fixture(autouse=True)
def supported(backend, needs_support):
    needs_support(OP, backend)


@pytest.fixture
def make(generator):
    return functools.partial(rows, dtype=torch.float64, device="cpu", generator=generator)


def defined(features, labels, tau):
    """L_out of the paper, sample by sample; None where a sample has no positive."""
    z = F.normalize(features, dim=1)
    losses = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        log_softmax = F.log_softmax(z[others] @ z[i] / tau, dim=0) if others else None
        terms = [-log_softmax[others.index(p)] for p in positives]
        losses.append(torch.stack(terms).mean() if terms else None)
    return losses


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tau", [0.07, 1.0])
def test_definition(reduction, tau, backend, make, generator):
    x = make(10, 5)
    labels = torch.tensor([0, 1, 2, 0, 1, 0, 7, 7, -3, 2**40])
    t = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    got = sup_con(x, labels, temperature=t, reduction=reduction, backend=backend)
    losses = defined(x, labels, t)
    assert [loss is None for loss in losses] == [False] * 2 + [True] + [False] * 5 + [True] * 2
    with_positive = torch.stack([loss for loss in losses if loss is not None])
    if reduction == "none":
        zero = torch.zeros((), dtype=torch.float64)
        expected = torch.stack([zero if loss is None else loss for loss in losses])
    else:
        expected = getattr(with_positive, reduction)()
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    got_grads = torch.autograd.grad(got, [x, t], upstream)
    for a, b in zip(got_grads, torch.autograd.grad(expected, [x, t], upstream), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("count", [1, 5])
def test_without_any_positive_the_loss_is_zero(count, backend, make):
    x = make(count, 4)
    for reduction in ("mean", "sum", "none"):
        loss = sup_con(x, torch.arange(count), reduction=reduction, backend=backend)
        assert loss.eq(0).all()
        assert torch.autograd.grad(loss.sum(), x)[0].eq(0).all()


@functools.cache
def shaped_sample(size, dim, tau, dtype):
    generator = torch.Generator().manual_seed(size + dim)
    make = functools.partial(rows, dtype=dtype, device="cpu", generator=generator)
    arguments = {"features": make(size, dim), "labels": torch.arange(size) % max(1, size // 3)}
    arguments |= {"temperature": tau, "reduction": "sum" if dtype == torch.float16 else "mean"}
    return Sample(f"{size} {dim} {tau}", arguments)


SHAPES = [(2, 1), (3, 3), (63, 16), (64, 27), (65, 1536), (100, 123), (252, 96), (507, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tau", [0.005, 0.07, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes(shape, tau, dtype, backend, needs_support):
    needs_support(OP, backend, dtype)
    assert_close_to_truth(OP, backend, shaped_sample(*shape, tau, dtype), dtype)


@pytest.mark.parametrize("kind", ["identical", "zero", "all_zero", "norms"])
def test_degenerate_rows(kind, backend):
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    if kind == "identical":
        x = x[:1].repeat(12, 1)
    elif kind == "norms":
        x[::2] *= 1e-20
        x[1::2] *= 1e20
    else:
        x[3 if kind == "zero" else slice(None)] = 0
    arguments = {"features": x.requires_grad_(), "labels": torch.arange(12) % 3}
    sample = Sample(kind, arguments | {"temperature": torch.tensor(0.1, requires_grad=True)})
    assert_close_to_truth(OP, backend, sample, torch.float32)
    if kind in ("zero", "all_zero"):
        assert run(OP, sample, backend=backend)["d features"][3].eq(0).all()


def test_permuting_samples_permutes_the_losses(backend, make):
    x = make(20, 5).detach()
    labels = torch.arange(20) % 4
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    losses = sup_con(x, labels, reduction="none", backend=backend)
    permuted = sup_con(x[order] * 3, labels[order] + 5, reduction="none", backend=backend)
    torch.testing.assert_close(losses[order], permuted)


def test_a_bad_row_reaches_every_sum_that_it_is_a_term_of(backend, make):
    x = make(8, 5).detach()
    x[2, 1] = torch.nan
    losses = sup_con(x, torch.tensor([0, 0, 1, 1, 2, 2, 3, 4]), reduction="none", backend=backend)
    assert losses[:6].isnan().all()
    assert losses[6:].eq(0).all()  # without a positive


LABELS = {
    "one_class": lambda n: torch.zeros(n, dtype=torch.long),
    "two_each": lambda n: torch.arange(n) // 2,
    "eight_and_nine": lambda n: torch.arange(n) % 17 // 9,
    "all_different": lambda n: torch.arange(n) - 2**62,
    "two_and_many": lambda n: (torch.arange(n) >= 2).long() * 2**40,
}


@functools.cache
def labelled_sample(labelling, tau, duplicates, dtype):
    generator = torch.Generator().manual_seed(7)
    x = rows(68, 24, dtype=dtype, device="cpu", generator=generator, grad=False)
    if duplicates:
        x[34:] = x[:34].clone()
    arguments = {"features": x.requires_grad_(), "labels": LABELS[labelling](68)}
    arguments |= {"temperature": torch.tensor(tau, requires_grad=True)}
    name = f"{labelling} {tau} {duplicates}"
    return Sample(name, arguments | {"reduction": "none" if duplicates else "sum"})


@pytest.mark.parametrize("labelling", LABELS)
@pytest.mark.parametrize("tau", [0.005, 0.0229, 0.023, 0.07, 1.0])
@pytest.mark.parametrize("duplicates", [False, True], ids=["distinct", "duplicates"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_labellings_and_temperatures(labelling, tau, duplicates, dtype, backend):
    sample = labelled_sample(labelling, tau, duplicates, dtype)
    assert_close_to_truth(OP, backend, sample, dtype)


@pytest.mark.parametrize("tau", [0.005, 0.023, 1.0])
def test_two_rows_of_one_class_lose_nothing(tau, backend):
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()
    losses = sup_con(x, torch.tensor([4, 4]), temperature=tau, reduction="none", backend=backend)
    torch.testing.assert_close(losses, torch.zeros(2), rtol=0, atol=2e-7 / tau)
    (grad,) = torch.autograd.grad(losses.sum(), x)
    torch.testing.assert_close(grad, torch.zeros(2, 6), rtol=0, atol=2e-7 / tau**2)


@pytest.mark.parametrize("tau", [0.005, 0.023, 0.07, 1.0])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e6])
def test_gradients_keep_the_scale_of_the_upstream(tau, size, backend):
    """Duplicates and near opposites: softmax weights from 1 down to exp(-2 / tau)."""
    x = torch.tensor([[1.0, 0.2], [-0.9, -0.1]]).repeat(1, 3)
    x = torch.cat([x, 2 * x]).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1])
    upstream = torch.tensor([1.0, -0.5, 0.25, 2.0]) * size
    got = sup_con(x, labels, temperature=tau, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(got, x, upstream)
    y = x.detach().double().requires_grad_()
    exact = sup_con(y, labels, temperature=tau, reduction="none", backend="torch")
    (expected,) = torch.autograd.grad(exact, y, upstream.double())
    scale = expected.abs().max()
    assert scale > 0
    torch.testing.assert_close(grad / scale, (expected / scale).float(), rtol=1e-4, atol=1e-4)


def test_only_opposite_rows(backend):
    """Two rows of one class, each the other's opposite: the smallest sum that there is."""
    x = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 1e-3, 0.0]]).requires_grad_()
    labels = torch.zeros(2, dtype=torch.long)
    losses = sup_con(x, labels, temperature=0.023, reduction="none", backend=backend)
    torch.testing.assert_close(losses, torch.zeros(2), rtol=0, atol=1e-5)
    (grad,) = torch.autograd.grad(losses, x, torch.full((2,), 1e6))
    assert grad.isfinite().all() and grad.abs().max() < 1e6 * 1e-5 / 0.023


def test_the_mean_counts_rows_with_a_positive(backend, make):
    x = make(6, 5)
    labels = torch.tensor([0, 0, 1, 2, 3, 3])
    losses = sup_con(x, labels, reduction="none", backend=backend)
    mean = sup_con(x, labels, backend=backend)
    torch.testing.assert_close(mean, losses.sum() / 4)
    (of_mean,), (of_sum,) = (torch.autograd.grad(y, x) for y in (mean, losses.sum()))
    torch.testing.assert_close(of_mean, of_sum / 4)
