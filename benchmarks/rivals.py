"""Who competes in a case: plain PyTorch, the published forms, other people's fused losses, and this package's backends.

Other people's, on a GPU where they are installed, are called as their documentation says: PyTorch's chunked
``linear_cross_entropy``, and of PyPI memeff 0.3.1 and inf-cl 1.2.1. None is needed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnce
from benchmarks import baselines, machine
from benchmarks.cases import Call, Case, Inputs, Provider, network
from fastnce.registry import OPS

# Rivals that are quicker when compiled, and whose products are of the inputs' dtype. The reference multiplies in fp32.
COMPILED_TOO = ("published", "matmul + logsumexp")
# Plain PyTorch keeps about this many bytes per pair (i, j): a few N x M arrays in fp32.
EAGER_BYTES_PER_PAIR = 24
# inf-cl multiplies whole heads and blocks of rows: for other sizes it is silently wrong.
_INF_CL_DEPTH, _INF_CL_ROWS = 256, 128


def fused(case: Case, backend: str | None) -> Call:
    """The public op on one backend; for sample_patches the patches alone."""
    op = getattr(fastnce, case.op)
    if case.form is not None:
        return lambda inputs: case.form(inputs, **case.options, backend=backend)
    if case.op == "sample_patches":
        return lambda inputs: op(**inputs, **case.options, backend=backend)[0]
    return lambda inputs: op(**inputs, **case.options, backend=backend)


def providers(
    case: Case, device: torch.device, dtype: torch.dtype, with_compile: bool = True
) -> list[Provider]:
    """Plain PyTorch, compiled and not, the op's rivals, and every fused backend of the package."""
    eager = fused(case, "torch")
    can_compile = compiler(device) if with_compile else "not asked for; --compile adds it"
    eager_bytes = EAGER_BYTES_PER_PAIR * case.pairs(case.shape)
    out = [
        Provider("eager", eager, extra_bytes=eager_bytes),
        _compiled("compile", eager, can_compile, eager_bytes // 2),
    ]
    half = dtype in (torch.bfloat16, torch.float16)
    for rival in _rivals(case, device, dtype):
        out.append(rival)
        if half and rival.name in COMPILED_TOO and case.products:
            name, size = f"{rival.name}, compiled", rival.extra_bytes // 2
            out.append(_compiled(name, rival.call, can_compile, size))
    for name in fastnce.backends.available():
        if name != "torch":
            out += _backend(case, device, dtype, name)
    return out


def _backend(case: Case, device: torch.device, dtype: torch.dtype, name: str) -> list[Provider]:
    """A backend of the package, and its forms with rounded products."""
    # The backend's own predicate: its reason without the advice that the public op adds for a caller.
    reason = fastnce.backends.supports(name, case.op, device.type, dtype)
    exact = Provider(name, fused(case, name), ours=True, reason=reason)
    out = [exact]
    if name == "triton" and device.type == "cuda" and case.op == "info_nce":
        out += [with_fp8(exact, case)] if "M" not in case.shape else []
    # Of other backends the products' precision is the whole run's, for all providers: --precision.
    if name == "native" and dtype == torch.float32 and OPS[case.op].rounds_products:

        def rounding(inputs: Inputs) -> Any:
            with machine.matmul_precision("medium"):
                return exact.call(inputs)

        if reason == "ok" and not machine.multiplies_bfloat16():
            reason = "this processor multiplies no bfloat16; medium is float32 here"
        named = Provider(f"{name}, bf16 products", rounding, ours=True, reason=reason)
        out.append(dataclasses.replace(named, rounds_products=True))
    return out


def with_fp8(exact: Provider, case: Case) -> Provider:
    """The same with similarities of rows rounded to e4m3, for which the reference does so too."""
    options = {**case.options, "similarity_dtype": torch.float8_e4m3fn}
    rounded = dataclasses.replace(case, options=options)
    return dataclasses.replace(
        exact,
        name=f"{exact.name}, fp8 similarities",
        call=fused(rounded, exact.name),
        rounds_products=True,
        truth=fused(rounded, "torch"),
    )


def _compiled(name: str, call: Call, reason: str, extra_bytes: int) -> Provider:
    if reason == "ok":
        # Deprecations inside the compiler are of no use to the reader of a table.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch._inductor")
        call = torch.compile(call, dynamic=False)
    return Provider(name, call, reason=reason, extra_bytes=extra_bytes, compiled=True)


def compiler(device: torch.device) -> str:
    """``"ok"`` where torch.compile can generate code for ``device``, or what is missing."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        return "no C++ compiler found; install g++"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return "ok"


def _rivals(case: Case, device: torch.device, dtype: torch.dtype) -> list[Provider]:
    """The published form, and what else there is for the op."""
    pairs = case.pairs(case.shape)
    cube = case.shape.get("N", 0) ** 2 * case.shape.get("D", 0)
    size = {
        "info_nce": 4 * dtype.itemsize * pairs,
        "conditional_contrastive": 5 * dtype.itemsize * cube,
        "sup_con": 20 * pairs,
        "nt_xent": 16 * pairs,
        "sigmoid_contrastive": 20 * pairs,
        "pairwise_cosine_similarity": 3 * dtype.itemsize * pairs,
    }

    def published(inputs: Inputs) -> Any:
        result = getattr(baselines, case.op)(**inputs, **case.options)
        return network(inputs) + result if case.alone else result

    found = [Provider("published", published, extra_bytes=size.get(case.op, 0))]
    if case.op == "conditional_contrastive":
        matmul = partial(_call, baselines.conditional_contrastive_matmul, case.options)
        found.append(Provider("matmul + logsumexp", matmul, extra_bytes=20 * pairs))
    if case.op in ("patch_nce", "info_nce") and len(case.wrt) == 1:  # keys without gradient
        attention = getattr(baselines, f"attention_{case.op}")
        kernels = baselines.attention_kernels(device, dtype, case.shape["D"])
        for kernel, reason in kernels.items():
            call = partial(_call, partial(attention, kernel), case.options)
            found.append(Provider(f"attention ({kernel})", call, reason=reason))
    if case.op == "info_nce" and device.type == "cuda" and "M" not in case.shape:
        found += other_people_s(case)
    return found


def _call(function: Call, options: dict[str, Any], inputs: Inputs) -> Any:
    return function(**inputs, **options)


def other_people_s(case: Case) -> list[Provider]:
    """Fused losses of in-batch InfoNCE, each with the reason if it cannot run."""
    symmetric, learnt = case.options.get("symmetric", False), "temperature" in case.wrt
    both = "positive_key" in case.wrt
    has_linear = "ok" if hasattr(F, "linear_cross_entropy") else "this torch has none"
    memeff = "has no gradient of the temperature" if learnt else _installed("memeff", "memeff")
    inf_cl = _installed("inf_cl", "inf-cl")
    if learnt:
        inf_cl = "its gradient of the temperature fails on one GPU"
    elif case.shape["D"] % _INF_CL_DEPTH or case.shape["N"] % _INF_CL_ROWS:
        inf_cl = f"needs D to be a multiple of {_INF_CL_DEPTH}, and N of {_INF_CL_ROWS}"
    linear = partial(linear_cross_entropy, symmetric)
    found = [
        Provider("linear_cross_entropy", linear, reason=has_linear),
        Provider("memeff", partial(_memeff, symmetric, both), reason=memeff),
    ]
    if symmetric:
        found.append(Provider("inf-cl", _inf_cl, reason=inf_cl))
    return found


def _installed(module: str, package: str) -> str:
    found = importlib.util.find_spec(module) is not None
    return "ok" if found else f"not installed; pip install {package}"


def _units(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return F.normalize(inputs["query"], dim=-1), F.normalize(inputs["positive_key"], dim=-1)


def linear_cross_entropy(symmetric: bool, inputs: Inputs) -> Tensor:
    """A linear layer whose classes are the keys, row i of class i; in chunks of rows where this torch knows how."""
    query, key = _units(inputs)
    target = torch.arange(len(query), device=query.device)
    chunked = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    options = {"options": chunked()} if chunked else {}

    def loss(rows: Tensor, classes: Tensor) -> Tensor:
        return F.linear_cross_entropy(rows / inputs["temperature"], classes, target, **options)

    return 0.5 * (loss(query, key) + loss(key, query)) if symmetric else loss(query, key)


def _memeff(symmetric: bool, both: bool, inputs: Inputs) -> Tensor:
    import memeff

    # Its default scales the gradients by another factor.
    options = {"temperature": inputs["temperature"], "stable": False}
    if symmetric:
        loss = memeff.MemoryEfficientCLIPLoss(**options)
    elif both:
        # From 2 on no negative is dropped for being too similar.
        loss = memeff.MemoryEfficientQwen3Loss(**options, margin=2.0)
    else:
        loss = memeff.MemoryEfficientLiTLoss(**options)
    return loss(inputs["query"], inputs["positive_key"])


def _inf_cl(inputs: Inputs) -> Tensor:
    import inf_cl

    query, key = _units(inputs)
    scale = torch.tensor(1 / inputs["temperature"], device=query.device)
    losses = [inf_cl.cal_inf_loss(a, b, scale=scale) for a, b in ((query, key), (key, query))]
    return 0.5 * sum(loss.mean() for loss in losses)
