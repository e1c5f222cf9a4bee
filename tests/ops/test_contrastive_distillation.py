"""Distillation against the cross-entropy of two softmaxes, as matrices in double."""

import pytest
import torch
import torch.nn.functional as F
from forms import gaussian
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastnce
from fastnce import backends
from fastnce.blocks import tiles

RUN = [
    name
    for name in backends.names()
    if backends.supports(name, "masked_info_nce", "cpu", torch.float64) == "ok"
]
each_backend = pytest.mark.parametrize("backend", RUN)


def rows(count=6, keys=6, dtype=torch.float64):
    """The student's, and the teacher's of another depth."""
    student = gaussian(count, 4), gaussian(keys, 4, seed=1)
    teacher = gaussian(count, 7, seed=2), gaussian(keys, 7, seed=3)
    return [x.to(dtype).requires_grad_() for x in student], [x.to(dtype) for x in teacher]


def equation(
    query,
    key,
    teacher_query,
    teacher_key,
    *,
    temperature,
    teacher_temperature,
    normalize=True,
    symmetric=False,
):
    given = (query, key, teacher_query, teacher_key)
    query, key, teacher_query, teacher_key = (
        F.normalize(x, dim=1) if normalize else x for x in given
    )
    z = query @ key.T / temperature
    p = teacher_query @ teacher_key.T / teacher_temperature
    losses = -(p.softmax(dim=1) * z.log_softmax(dim=1)).sum(dim=1)
    if not symmetric:
        return losses
    return 0.5 * (losses - (p.softmax(dim=0) * z.log_softmax(dim=0)).sum(dim=0))


def results(loss, leaves):
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    upstream = upstream if loss.dim() else None
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream, retain_graph=True)]


def assert_same(got, expected, rtol=1e-12, atol=1e-12):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


@each_backend
@pytest.mark.parametrize("keys", [1, 6, 11])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("symmetric", [False, True])
def test_value_and_gradients_are_those_of_the_matrices(backend, keys, normalize, symmetric):
    count = keys if symmetric else 6
    student, teacher = rows(count, keys)
    tau = torch.tensor(0.4).double().requires_grad_()
    options = {"temperature": tau, "normalize": normalize, "symmetric": symmetric}
    losses = equation(*student, *teacher, teacher_temperature=0.7, **options)
    weights = torch.linspace(0, 2, count).double() + (count == 1)
    leaves = [*student, tau]
    for reduction, given, expected in (
        ("none", None, losses),
        ("mean", None, losses.mean()),
        ("sum", None, losses.sum()),
        ("none", weights, losses * weights),
        ("mean", weights, (losses * weights).sum() / weights.sum()),
    ):
        found = fastnce.contrastive_distillation(
            *student,
            *teacher,
            teacher_temperature=0.7,
            **options,
            reduction=reduction,
            weights=given,
            backend=backend,
        )
        assert_same(results(found, leaves), results(expected, leaves))


@each_backend
def test_the_teacher_gets_no_gradient_and_by_default_the_students_temperature(backend):
    student, teacher = rows()
    teacher = [x.requires_grad_() for x in teacher]
    tau = torch.tensor(0.4).double().requires_grad_()
    found = fastnce.contrastive_distillation(*student, *teacher, temperature=tau, backend=backend)
    expected = equation(
        *student, *teacher, temperature=tau, teacher_temperature=tau.detach()
    ).mean()
    assert_same(results(found, [*student, tau]), results(expected, [*student, tau]))
    found = fastnce.contrastive_distillation(*student, *teacher, temperature=tau, backend=backend)
    found.backward()
    assert all(x.grad is None for x in teacher)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision(backend, dtype):
    """As exact as the matrices in float32, but for the rounding of the gradients to the rows' dtype."""
    student, teacher = rows(40, 40, dtype)
    options = {"temperature": 0.1, "teacher_temperature": 0.05, "symmetric": True}
    found = fastnce.contrastive_distillation(*student, *teacher, **options, backend=backend)
    ours = results(found, student)
    matrices = []
    for to in (torch.float32, torch.float64):
        leaves = [x.detach().to(to).requires_grad_() for x in student]
        loss = equation(*leaves, *(x.to(to) for x in teacher), **options).mean()
        matrices.append(results(loss, leaves))
    for x, y, z in zip(ours, *matrices, strict=True):
        bound = 40 * torch.finfo(torch.float32).eps
        bound += 2 * torch.finfo(dtype).eps * z.abs().max() if z.dim() else 0
        assert (x - z).abs().max() <= 2 * (y - z).abs().max() + bound


@each_backend
def test_autocast_does_not_reach_in(backend):
    student, teacher = rows(dtype=torch.float32)
    options = {"symmetric": True, "backend": backend}
    expected = results(fastnce.contrastive_distillation(*student, *teacher, **options), student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fastnce.contrastive_distillation(*student, *teacher, **options)
        if backend != "torch":  # whose backward is PyTorch's
            assert_same(results(loss, student), expected, 1e-5, 1e-6)
    assert_same(results(loss, student), expected, 1e-5, 1e-6)


class Largest(TorchDispatchMode):
    """Inside the block keeps the largest number of elements that an operator returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return found


@pytest.mark.parametrize("keys", [200, 300])
def test_no_matrix(keys, monkeypatch):
    monkeypatch.setattr(tiles, "BYTES", {"cpu": 1})
    student, teacher = rows(200, keys)
    with Largest() as largest:
        loss = fastnce.contrastive_distillation(*student, *teacher, backend="blocks")
        loss.backward()
    assert 0 < largest.numbers <= 64 * keys
    expected = equation(*student, *teacher, temperature=0.07, teacher_temperature=0.07).mean()
    gradients = torch.autograd.grad(expected, student)
    assert_same(
        [loss.detach(), *(x.grad for x in student)], [expected.detach(), *gradients], 1e-10, 1e-12
    )


@each_backend
def test_compiled(backend):
    torch._dynamo.reset()
    compiled = torch.compile(fastnce.contrastive_distillation, fullgraph=True, backend="aot_eager")
    student, teacher = rows()
    options = {"symmetric": True, "backend": backend}
    expected = fastnce.contrastive_distillation(*student, *teacher, **options)
    found = compiled(*student, *teacher, **options)
    assert_same(results(found, student), results(expected, student))


def test_second_derivatives_are_plain_pytorchs_alone():
    student, teacher = rows()
    for backend in RUN:
        loss = fastnce.contrastive_distillation(*student, *teacher, backend=backend)
        (grad,) = torch.autograd.grad(loss, student[1], create_graph=True)
        if backend == "torch":
            assert torch.autograd.grad(grad.square().sum(), student[1])[0].isfinite().all()
        else:
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(grad.square().sum(), student[1])


x, y = torch.randn(4, 3), torch.randn(5, 3)
MISTAKES = [
    (ValueError, r"key must have the shape \(5, 3\)", (x, torch.randn(5, 2), x, y), {}),
    (TypeError, r"key is torch.float64 but query", (x, x.double(), x, x), {}),
    (ValueError, r"teacher_query must have the shape \(4, 3\) \(a row for each of the student's\)", (x, y, y, y), {}),
    (ValueError, r"teacher_key must have the shape \(5, 3\)", (x, y, x, x), {}),
    (ValueError, r"teacher_key must have the shape \(5, 3\)", (x, y, x, torch.randn(5, 2)), {}),
    (TypeError, r"teacher_key is torch.float64 but teacher_query", (x, y, x, y.double()), {}),
    (ValueError, r"teacher_query is on meta but query is on cpu\. Move", (x, y, x.to("meta"), y.to("meta")), {}),
    (ValueError, r"symmetric=True needs as many keys as queries, got 5 and 4", (x, y, x, y), {"symmetric": True}),
    (ValueError, r"temperature must be positive", (x, y, x, y), {"teacher_temperature": 0.0}),
    (ValueError, r"weights must have the shape \(4,\)", (x, y, x, y), {"weights": torch.ones(5)}),
    (ValueError, r"reduction must be one of", (x, y, x, y), {"reduction": "avg"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "pattern", "arguments", "options"), MISTAKES)
def test_mistakes_are_one_line(kind, pattern, arguments, options):
    with pytest.raises(kind, match=f"^contrastive_distillation: {pattern}") as caught:
        fastnce.contrastive_distillation(*arguments, **options)
    assert "\n" not in str(caught.value)
