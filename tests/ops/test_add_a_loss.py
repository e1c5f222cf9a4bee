"""What CONTRIBUTING.md says of a new loss: one file declares it, and everything else knows it."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F

import fastnce
from fastnce import backends, doctor, reference, registry
from fastnce.backends import operators
from fastnce.ops import _checks, _common
from fastnce.registry import Make, Op, Operator, Sample, declare
from fastnce.testing import SAMPLE_INPUTS, assert_close_to_truth, run

# The file fastnce/ops/alignment.py: how far rows are from their partners (Wang and Isola 2020).


def alignment(x, y, *, temperature=1.0, reduction="mean", backend=None):
    """``loss_i = (1 - cos(x_i, y_i)) / t``."""
    op = "alignment"
    _checks.expect_rows(op, "x", x)
    _checks.expect_rows(op, "y", y, like=x, like_name="x")
    return _common.row_loss(op, plain, (x, y), None, temperature, reduction, backend)


def plain(x, y, temperature):
    dtype = registry.accumulation_dtype(x.dtype)
    return (1 - F.cosine_similarity(x.to(dtype), y.to(dtype))) / temperature


def _samples(make: Make):
    x = make(9, 5)
    yield Sample("mean", {"x": x, "y": make.similar(x)})
    yield Sample("none", {"x": x, "y": make.similar(x), "reduction": "none"})
    tau = torch.tensor(0.5, requires_grad=True)
    yield Sample("temperature", {"x": x, "y": make.similar(x), "temperature": tau})


def _losses(x, **_):
    dtype = registry.accumulation_dtype(x.dtype)
    return tuple(x.new_empty(x.shape[:1], dtype=dtype) for _ in range(2))


TENSORS = "Tensor x, Tensor y, Tensor? temperature_tensor, float temperature"
NEEDS = "bool need_x, bool need_y, bool need_temperature"
GRADS = "Tensor grad_x, Tensor grad_y, Tensor grad_temperature"


# The file triton_kernels/alignment.py, with plain PyTorch for the kernels.


def alignment_forward(x, y, temperature, *, grad_scale, mean=False, needs):
    loss = plain(x, y, temperature)
    scale = 1 / len(x) if mean else 1.0
    grads = (None,) * 3
    if grad_scale is not None:
        upstream = torch.full_like(loss, grad_scale * scale)
        grads = alignment_backward(upstream, x, y, temperature, loss, needs=needs)
    return loss, torch.zeros_like(loss), grads


def alignment_backward(grad_loss, x, y, temperature, lse, *, needs):
    dtype = registry.accumulation_dtype(x.dtype)
    (u, x_norm), (v, y_norm) = (_unit(rows.to(dtype)) for rows in (x, y))
    weight = grad_loss[:, None] / temperature
    cosine = (u * v).sum(dim=1, keepdim=True)
    grads = (
        (weight * (cosine * u - v) / x_norm).to(x.dtype),
        (weight * (cosine * v - u) / y_norm).to(y.dtype),
        -(weight * (1 - cosine)).sum() / temperature,
    )
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _unit(rows):
    norm = rows.norm(dim=1, keepdim=True)
    return rows / norm, norm


class Kernels(operators.Namespace):
    """A backend of Python functions, each an operator of torch.ops.fastnce_toy."""

    def available(self):
        return "ok"

    def supports(self, op, device, dtype):
        return "ok" if self.has(op) else f"{op} has no toy kernel"

    def _function(self, operator):
        if operator.name in globals():
            run = operators.implementation(operator, globals()[operator.name])
            self._library.impl(operator.name, run, "CPU")
        return super()._function(operator)


TABLES = (registry.OPS, registry.REFERENCES, SAMPLE_INPUTS)


@functools.cache
def declared_once():
    """The toy backend, and what the tables hold of the loss: PyTorch defines an operator once in a process."""
    kernels = types.SimpleNamespace(__name__="toy")
    namespace = Kernels("fastnce_toy", "CPU", vars(kernels))
    kernels.available, kernels.supports = namespace.available, namespace.supports
    declare(
        Op("alignment", function=alignment, samples=_samples),
        Operator(
            f"alignment_forward({TENSORS}, float? grad_scale, bool mean, {NEEDS}) -> "
            f"(Tensor loss, Tensor lse, {GRADS})",
            _losses,
        ),
        Operator(
            f"alignment_backward(Tensor grad_loss, {TENSORS}, Tensor lse, {NEEDS}) -> ({GRADS})"
        ),
        alignment=plain,
    )
    return kernels, [table["alignment"] for table in TABLES]


@pytest.fixture(scope="module", autouse=True)
def declared():
    """For these tests alone: those that go through all ops do not see it."""
    backends._TABLE["toy"], entries = declared_once()
    for table, entry in zip(TABLES, entries, strict=True):
        table["alignment"] = entry
    yield
    del backends._TABLE["toy"]
    for table in TABLES:
        del table["alignment"]


BACKENDS = ["torch", "toy"]


def samples(dtype=torch.float32):
    return list(SAMPLE_INPUTS["alignment"](dtype, "cpu", torch.Generator().manual_seed(0)))


def test_it_is_known_everywhere():
    assert fastnce.alignment is alignment
    assert reference.alignment is plain
    assert "alignment" in doctor.report()
    assert backends.supports("native", "alignment", "cpu", torch.float32) != "ok"
    x, y = torch.randn(2, 4, 3)
    torch.testing.assert_close(fastnce.alignment(x, y), plain(x, y, 1.0).mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_numerical_contract(backend, dtype):
    for sample in samples(dtype):
        assert_close_to_truth("alignment", backend, sample, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend):
    for sample in samples():
        compiled = torch.compile(alignment, fullgraph=True, backend="aot_eager")
        got = run("alignment", sample, backend=backend, function=compiled)
        for name, expected in run("alignment", sample, backend=backend).items():
            torch.testing.assert_close(got[name], expected)


def test_operators_keep_pytorch_s_rules():
    x, y = torch.randn(2, 4, 3)
    call = torch.ops.fastnce_toy.alignment_forward.default
    torch.library.opcheck(call, (x, y, None, 1.0, 1.0, True, True, False, False))


def test_errors_come_from_the_shared_checks():
    with pytest.raises(ValueError, match="alignment: y must have the shape .4, 3."):
        alignment(torch.randn(4, 3), torch.randn(3, 3))
    x = torch.randn(4, 3)
    with pytest.raises(TypeError, match="alignment_forward.*'scale'"):
        backends._TABLE["toy"].alignment_forward(x, x, 1.0, grad_scale=None, scale=1.0)
