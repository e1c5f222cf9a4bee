"""The numerical contract notices wrong kernels: each test breaks a correct op in one way."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastnce
from fastnce.testing import SAMPLE_INPUTS, Sample, assert_close_to_truth, error, run, truth


def sample_of(op: str, name: str, dtype: torch.dtype = torch.float32) -> Sample:
    samples = SAMPLE_INPUTS[op](dtype, "cpu", torch.Generator().manual_seed(0))
    return next(sample for sample in samples if sample.name == name)


class Wrong(torch.autograd.Function):
    """The identity, with another gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.change(grad), None


def argument(name: str, change: Callable[[Tensor], Tensor]) -> Callable:
    return lambda right, arguments: right(**arguments | {name: change(arguments[name])})


def gradient(name: str, change: Callable[[Tensor], Tensor]) -> Callable:
    return argument(name, lambda x: Wrong.apply(x, change))


def scaled(name: str, factor: float) -> Callable:
    return gradient(name, lambda grad: grad * factor)


def values(name: str, change: Callable[[Tensor], Tensor]) -> Callable:
    """The numbers of the argument, changed without a trace in its gradient."""
    return argument(name, lambda x: x + (change(x) - x).detach())


def given(**options: object) -> Callable:
    return lambda right, arguments: right(**arguments | options)


def result(change: Callable[[Tensor], Tensor]) -> Callable:
    return lambda right, arguments: change(right(**arguments))


def nan_at_the_end(grad: Tensor) -> Tensor:
    grad = grad.clone()
    grad[-1, 0] = torch.nan
    return grad


def tf32(x: Tensor) -> Tensor:
    return (x.detach().view(torch.int32) & ~0x1FFF).view(torch.float32)


FLOAT, HALF = torch.float32, torch.bfloat16
# Fault: op, sample, dtype, what is called with the right op and its arguments.
FAULTS = {
    **{
        f"gradient of {name} off by 1e-4": ("info_nce", "queue", FLOAT, scaled(name, 1 + 1e-4))
        for name in ("query", "positive_key", "negative_keys", "temperature")
    },
    **{
        f"gradient in {dtype} off by 6 eps": ("info_nce", "queue", dtype, scaled("query", 1 + 6 * torch.finfo(dtype).eps))
        for dtype in (torch.bfloat16, torch.float16)
    },
    "wrong sign": ("info_nce", "queue", FLOAT, scaled("query", -1)),
    "gradient of zero": ("info_nce", "in_batch", FLOAT, scaled("positive_key", 0.0)),
    "one row": ("info_nce", "in_batch", FLOAT, gradient("query", lambda g: torch.cat([g[:-1], g[-2:-1]]))),
    "NaN": ("info_nce", "in_batch", FLOAT, gradient("positive_key", nan_at_the_end)),
    "no projection": ("info_nce", "in_batch", FLOAT, gradient("query", lambda g: g + 1e-4)),
    "products in bf16": ("info_nce", "in_batch", FLOAT, values("query", lambda x: x.bfloat16().float())),
    "products in tf32": ("info_nce", "in_batch", FLOAT, values("query", tf32)),
    "one direction only": ("info_nce", "symmetric_none", FLOAT, given(symmetric=False)),
    "in-batch negatives forgotten": ("info_nce", "queue_in_batch", FLOAT, given(in_batch_negatives=False)),
    "normalised though not asked": ("info_nce", "dot", FLOAT, given(normalize=True)),
    "own class a negative": ("conditional_contrastive", "mean", FLOAT, given(labels=torch.arange(34))),
    "loss off by 1e-5": ("info_nce", "in_batch", FLOAT, result(lambda out: out + 1e-5)),
    "loss of bf16 inputs rounded": ("info_nce", "in_batch", HALF, result(lambda out: out.bfloat16().float())),
    "backward ignores what arrives": ("info_nce", "none", FLOAT, result(lambda out: Wrong.apply(out, torch.ones_like))),
}  # fmt: skip


@pytest.fixture
def broken(monkeypatch) -> Callable:
    """Puts a wrong op in the place of one, on every backend but the reference."""

    def install(op: str, wrong: Callable[[Callable, dict], object]) -> None:
        right = getattr(fastnce, op)

        def function(*, backend: str | None, **arguments):
            if backend == "torch":
                return right(**arguments, backend=backend)
            return wrong(lambda **changed: right(**changed, backend="torch"), arguments)

        monkeypatch.setattr(fastnce, op, function)

    return install


def assert_noticed(op: str, name: str, dtype: torch.dtype, what: str = "is off by") -> None:
    with pytest.raises(AssertionError, match=what):
        assert_close_to_truth(op, "broken", sample_of(op, name, dtype), dtype)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_result_or_gradient_is_noticed(fault, broken):
    op, name, dtype, wrong = FAULTS[fault]
    broken(op, wrong)
    assert_noticed(op, name, dtype)


def test_a_missing_gradient_or_another_dtype_is_noticed(broken):
    broken("info_nce", lambda right, a: right(**a | {"query": a["query"].detach()}))
    assert_noticed("info_nce", "in_batch", FLOAT, "d query is missing")
    broken("nt_xent", lambda right, a: right(**a).double())
    assert_noticed("nt_xent", "mean", FLOAT, "out is torch.float64")


def test_errors_are_weighed_by_the_norm_of_the_row():
    """A small row has a large gradient, which must not hide an error in the gradient of another."""
    sample = sample_of("info_nce", "in_batch")
    query = sample.arguments["query"].detach().clone()
    query[0] *= 1e-10
    sample = Sample("small row", {**sample.arguments, "query": query.requires_grad_()})
    got = run("info_nce", sample, backend="torch")["d query"]
    others = truth("info_nce", sample)["d query"][1:].abs().amax(dim=1)
    worst = others.argmax()
    got[1 + worst] *= 1.01
    assert got[0].abs().max() > 1e6 * others[worst]
    assert error("info_nce", sample, "d query", got) > 0.01 * others[worst]


def test_a_sample_that_plain_pytorch_cannot_compute_is_refused():
    """Here fp16 cannot hold the gradient at all; a bound of twice that error would allow anything."""
    query = (torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * 6e4).half()
    arguments = {"query": query.requires_grad_(), "positive_key": torch.ones(4, 8).half()}
    with pytest.raises(AssertionError, match="plain PyTorch is itself off"):
        assert_close_to_truth("info_nce", "torch", Sample("huge", arguments), torch.float16)


def test_samples_cover_every_public_op():
    public = {name for name in fastnce.__all__ if callable(getattr(fastnce, name))}
    # tap_patches is sample_patches inside a network, the others losses made of info_nce; they have tests of their own.
    others = {"use_backend", "tap_patches", "NegativeQueue", "GradCache", "verify"}
    others |= {"contrastive_cross_entropy", "contrastive_distillation"}
    assert set(SAMPLE_INPUTS) == public - others
