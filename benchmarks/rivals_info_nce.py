"""Other people's fused losses, on a GPU, where they are installed: called as their documentation says.

PyTorch's own chunked ``linear_cross_entropy``, and of PyPI memeff 0.3.1, inf-cl 1.2.1 and siglip-kernel 0.1.2. None is needed.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import baselines
from benchmarks.case import Case, Inputs, Provider

# SigLIP's initial bias; Zhai et al. 2023, section 3.2.
_BIAS = -10.0
# inf-cl multiplies whole heads and blocks of rows: for other sizes it is silently wrong.
_INF_CL_DEPTH, _INF_CL_ROWS = 256, 128


def providers(case: Case, device: torch.device) -> list[Provider]:
    """Those that have the form of ``case``, each with the reason if it cannot run; none on a CPU, none for a queue."""
    if device.type != "cuda" or "M" in case.shape:
        return []
    symmetric = case.options.get("symmetric", False)
    found = [
        Provider(
            "linear_cross_entropy",
            functools.partial(linear_cross_entropy, symmetric),
            reason=_has_linear_cross_entropy(),
        ),
        Provider(
            "memeff",
            functools.partial(_memeff, symmetric, "positive_key" in case.wrt),
            reason=_memeff_reason(case),
        ),
    ]
    if symmetric:
        found += [
            Provider("inf-cl", _inf_cl, reason=_inf_cl_reason(case)),
            Provider(
                "siglip-kernel (sigmoid loss)",
                _siglip_kernel,
                reason=_installed("siglip_kernel", "siglip-kernel"),
                truth=_sigmoid_loss,
            ),
        ]
    return found


def _installed(module: str, package: str) -> str:
    found = importlib.util.find_spec(module) is not None
    return "ok" if found else f"not installed; pip install {package}"


def _units(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return F.normalize(inputs["query"], dim=-1), F.normalize(inputs["positive_key"], dim=-1)


def _has_linear_cross_entropy() -> str:
    return "ok" if hasattr(F, "linear_cross_entropy") else "this torch has none"


def linear_cross_entropy(symmetric: bool, inputs: Inputs) -> Tensor:
    """A linear layer whose classes are the keys, row i of class i; in chunks of rows where this torch knows how."""
    query, key = _units(inputs)
    target = torch.arange(len(query), device=query.device)
    chunked = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    options = {"options": chunked()} if chunked else {}

    def loss(rows: Tensor, classes: Tensor) -> Tensor:
        return F.linear_cross_entropy(rows / inputs["temperature"], classes, target, **options)

    return 0.5 * (loss(query, key) + loss(key, query)) if symmetric else loss(query, key)


def _memeff_reason(case: Case) -> str:
    if "temperature" in case.wrt:
        return "has no gradient of the temperature"
    return _installed("memeff", "memeff")


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


def _inf_cl_reason(case: Case) -> str:
    if "temperature" in case.wrt:
        return "its gradient of the temperature fails on one GPU"
    if case.shape["D"] % _INF_CL_DEPTH or case.shape["N"] % _INF_CL_ROWS:
        return f"needs D to be a multiple of {_INF_CL_DEPTH}, and N of {_INF_CL_ROWS}"
    return _installed("inf_cl", "inf-cl")


def _inf_cl(inputs: Inputs) -> Tensor:
    import inf_cl

    query, key = _units(inputs)
    scale = torch.tensor(1 / inputs["temperature"], device=query.device)
    losses = [inf_cl.cal_inf_loss(a, b, scale=scale) for a, b in ((query, key), (key, query))]
    return 0.5 * sum(loss.mean() for loss in losses)


def _siglip_kernel(inputs: Inputs) -> Tensor:
    import siglip_kernel

    query, key = _units(inputs)
    temperature = torch.as_tensor(inputs["temperature"], device=query.device)
    bias = torch.tensor(_BIAS, device=query.device)
    return siglip_kernel.fused_siglip_loss(query, key, -temperature.log(), bias)


def _sigmoid_loss(inputs: Inputs) -> Tensor:
    return baselines.sigmoid_loss(*_units(inputs), 1 / inputs["temperature"], _BIAS)
