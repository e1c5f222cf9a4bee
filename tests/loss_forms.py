"""The losses in every form, against the reference in fp64: what the tests of the CUDA and of the Triton kernels share.

In what follows ``kernels`` is a module with a backend's ``info_nce_forward`` and ``info_nce_backward``, ``backend`` its name, and
``device`` where its kernels run.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastnce import backends, reference
from fastnce.testing import Sample, assert_close_to_truth, rows

IN_BATCH = {"normalize": True, "symmetric": False, "in_batch": True, "self_logit": None}
SYMMETRIC = {**IN_BATCH, "symmetric": True}
QUEUE = {**IN_BATCH, "in_batch": False}

# A constant among the cosines. Of CUT's, -10, nothing can be seen: the exponential of -10 / tau is nothing beside the others.
VISIBLE = 0.3

# (B, N, D), negatives, options. Depths: of one tile, head and tail, chunks with panels, and deeper than shared memory holds.
CASES = {
    "tiles": ((1, 70, 20), None, IN_BATCH),
    "tail": ((1, 20, 150), None, SYMMETRIC),
    "tail_queue": ((1, 20, 90), (50, 90), IN_BATCH),
    "batched": ((3, 20, 20), None, SYMMETRIC),
    "batched_queue": ((3, 20, 20), (41, 20), QUEUE),
    "panels": ((1, 40, 270), None, SYMMETRIC),
    "panels_of_a_batch": ((2, 20, 270), None, IN_BATCH),
    "panels_queue": ((1, 20, 270), (30, 270), IN_BATCH),
    "deep": ((1, 20, 530), None, SYMMETRIC),
    "few_rows": ((1, 3, 20), (250, 20), QUEUE),
    "few_columns": ((1, 70, 20), (3, 20), QUEUE),
    "one_row": ((1, 1, 20), None, SYMMETRIC),
    "one_element": ((1, 7, 1), None, IN_BATCH),
    "constant": ((2, 20, 20), None, {**IN_BATCH, "self_logit": VISIBLE}),
    "dot": ((1, 40, 4), None, {**SYMMETRIC, "normalize": False}),
    "own": ((2, 5, 20), (2, 5, 40, 20), IN_BATCH),
    "own_alone": ((2, 5, 150), (2, 5, 3, 150), QUEUE),
}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def gaussian(shape: Iterable[int], generator: torch.Generator, dtype=torch.float64) -> Tensor:
    """Rows on the host, without gradient."""
    return rows(*shape, dtype=dtype, device="cpu", generator=generator, grad=False)


def problem(name: str, tau: float, device: str) -> tuple[tuple[Tensor | None, ...], dict]:
    """Query, key, negatives and temperature in float32, and the options."""
    shape, negatives, options = CASES[name]
    generator = seeded()
    query = gaussian(shape, generator)
    key = 0.3 * query + gaussian(shape, generator)
    if negatives is not None:
        negatives = gaussian(negatives, generator)
    inputs = (query, key, negatives, torch.tensor(tau, dtype=torch.float64))
    return tuple(None if x is None else x.float().to(device) for x in inputs), options


def assert_close(got: list[Tensor], expected: list[Tensor], tau: float) -> None:
    """To 1e-5 of the largest number, and to the rounding of logits of size L = 1 / tau in softmaxes times 1 / tau.

    Numbers of 16 bits to the rounding of their own, and that of the factors of their products.
    """
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        logit = max(1.0, 1 / tau)
        count = 1 if index == 0 else logit * (logit * got[0].numel() if b.dim() == 0 else 1)
        own = 1e-5 if a.dtype == torch.float32 else 1.5 * torch.finfo(a.dtype).eps
        bound = own * b.abs().max() + 4 * torch.finfo(torch.float32).eps * logit * count
        assert (a.double() - b).abs().max() <= bound, (index, a, b)


each_form = pytest.mark.parametrize("name", CASES)
each_offset = pytest.mark.parametrize("tau", [0.01, 0.1], ids=["running", "fixed"])


def check_form(
    kernels: ModuleType,
    device: str,
    name: str,
    tau: float,
    similarity_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Gradients with the loss, of one argument alone, and later, from the saved log-sum-exp."""
    tau = 10 * tau if name == "dot" else tau
    inputs, options = problem(name, tau, device)
    if similarity_dtype is not None:
        options = {**options, "similarity_dtype": similarity_dtype}
        # Values of bf16: those of fp32 may lie so near the middle of two codes of fp8 that fp32 and fp64 disagree.
        inputs = [x if x is None or x.dim() == 0 else x.bfloat16().float() for x in inputs]
    inputs = [x if x is None or x.dim() == 0 else x.to(dtype) for x in inputs]
    needs = tuple(x is not None for x in inputs)
    query, key, negatives, _ = inputs
    loss, lse, now = kernels.info_nce_forward(*inputs, **options, grad_scale=0.25, needs=needs)
    alone = [
        kernels.info_nce_forward(
            query, key, negatives, tau, **options, grad_scale=0.25, needs=[i == j for j in range(4)]
        )[2][i]
        for i in (0, 1)
    ]
    upstream = torch.linspace(-1, 1, loss.numel()).view_as(loss).to(device)
    later = kernels.info_nce_backward(upstream, *inputs, lse, **options, needs=needs)
    got = [loss, *alone, *(x for x in (*now, *later) if x is not None)]

    leaves = [x if x is None else x.double().requires_grad_() for x in inputs]
    wanted = [x for x in leaves if x is not None]
    exact = reference.info_nce(*leaves, **options)
    weight = torch.full_like(exact, 0.25)
    first = torch.autograd.grad(exact, wanted, weight, retain_graph=True)
    second = torch.autograd.grad(exact, wanted, upstream.double())
    assert_close(got, [exact.detach(), *first[:2], *first, *second], tau)


AWKWARD = [
    (kind, dtype)
    for kind in ("identical", "opposite", "zero", "sizes", "own")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    # Its gradients would be out of range.
    if dtype != torch.float16 or kind in ("identical", "opposite", "zero")
]
awkward = pytest.mark.parametrize(("kind", "dtype"), AWKWARD)


def check_awkward_rows(backend: str, device: str, kind: str, dtype: torch.dtype, tau: float):
    """Rows that are all the same, opposite, zero, or of norms of 1e-20 and 1e20; or the last two among queries' own negatives."""
    generator = seeded()
    count = 6 if kind == "own" else 20
    query, key = (gaussian((count, 12), generator) for _ in "qk")
    arguments = {"query": query, "positive_key": key, "temperature": tau}
    if kind == "own":
        arguments["negative_keys"] = own = gaussian((6, 19, 12), generator)
        own[:, 3] = 0
        own[:, 4:9] *= 1e-20
        own[:, 9:] *= 1e20
    elif kind == "identical":
        arguments |= {"query": query[:1].repeat(20, 1), "positive_key": query[:1].repeat(20, 1)}
    elif kind == "opposite":
        arguments["positive_key"] = -query
    elif kind == "zero":
        query[3], key[3], key[7] = 0, 0, 0
    else:
        query[::3] *= 1e-20
        key[::2] *= 1e20
    for name, x in arguments.items():
        if isinstance(x, Tensor):
            arguments[name] = x.to(device, dtype).requires_grad_()
    sample = Sample(f"{kind} {tau}", arguments | {"symmetric": kind != "own"})
    if backends.supports(backend, "info_nce", device, dtype) == "ok":
        assert_close_to_truth("info_nce", backend, sample, dtype)
    if kind != "own":
        layers = {
            "query_features": arguments["query"][None],
            "key_features": arguments["positive_key"][None],
        }
        layers = {name: [x.detach().requires_grad_()] for name, x in layers.items()}
        sample = Sample(f"{kind} {tau}", layers | {"temperature": tau})
        assert_close_to_truth("patch_nce", backend, sample, dtype)


_NEGATIVES = {"query_negatives": True}
_BOTH = {"symmetric": True}
_DETACHED = {"symmetric": True, "detach_keys": True}
PATCH_FORMS = ({}, _NEGATIVES, _BOTH, _DETACHED, _NEGATIVES | _BOTH, _NEGATIVES | _DETACHED)
each_patch_form = pytest.mark.parametrize("options", PATCH_FORMS, ids=lambda x: "+".join(x) or "-")


def check_form_of_patch_nce(
    kernels: ModuleType, device: str, options: dict[str, bool], tau: float, depth: int = 270
) -> None:
    """In layers of two depths, with a constant that can be seen, unlike CUT's."""
    generator = seeded()
    shapes = [(2, 9, 20), (2, 12, 20), (1, 12, depth)]
    layers = [gaussian(x, generator).float().to(device) for x in (*shapes, *shapes)]
    scales = [0.1, 0.2, 0.3]
    options = dict.fromkeys(("symmetric", "query_negatives", "detach_keys"), False) | options
    loss, (grads, of_keys, grad_temperature) = kernels.patch_nce_forward(
        layers[:3],
        layers[3:],
        torch.tensor(tau, device=device),
        self_logit=VISIBLE,
        **options,
        loss_scales=scales,
        grad_scales=scales,
        needs=([True] * 3, [True, True, False], True),
    )
    leaves = [x.double().requires_grad_() for x in layers]
    exact_tau = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    losses = [
        reference.patch_nce(query, key, exact_tau, self_logit=VISIBLE, **options)
        for query, key in zip(leaves[:3], leaves[3:], strict=True)
    ]
    exact = sum(scale * loss.sum() for scale, loss in zip(scales, losses, strict=True))
    expected = torch.autograd.grad(exact, [*leaves[:5], exact_tau])
    assert of_keys[2:] in ([], [None])
    assert_close([loss, *grads, *of_keys[:2], grad_temperature], [exact.detach(), *expected], tau)


each_labelled_loss = pytest.mark.parametrize("op", ["sup_con", "conditional_contrastive"])


def labelled(
    op: str,
    count: int,
    dim: int,
    device: str,
    dtype: torch.dtype = torch.float32,
    tau: float = 0.1,
    twins: bool = False,
    **options: object,
) -> Sample:
    """Rows, of which one is there twice if ``twins``; labels of the whole range of int64 that many, two and one of them have."""
    generator = torch.Generator().manual_seed(count)
    x, proxies = (gaussian((count, dim), generator, dtype) for _ in "xp")
    if twins:
        x[count // 2] = x[0]
    values = torch.tensor([-(2**63), -1, 0, 2**32, 2**63 - 1])
    labels = values[torch.randint(5, (count,), generator=generator)]
    labels[count // 3] = labels[count - 1] = 5
    labels[1] = 6
    temperature = torch.tensor(tau, device=device, requires_grad=True)
    arguments = {"labels": labels.to(device), "temperature": temperature, **options}
    names = ("features",) if op == "sup_con" else ("embeddings", "proxies")
    for name, value in zip(names, (x, proxies), strict=False):
        arguments[name] = value.to(device).requires_grad_()
    return Sample(f"{count} rows", arguments)
