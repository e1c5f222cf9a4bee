"""How torch is set to multiply float32; there are two ways to set it, and one raises once the other was used."""

from __future__ import annotations

import torch


def _slowly(backend: str, op: str) -> str:
    return getattr(getattr(torch.backends, backend), op).fp32_precision


# Every loss of float32 asks, and torch's own way to this takes a microsecond.
_newer = getattr(torch._C, "_get_fp32_precision_getter", _slowly)


@torch.compiler.assume_constant_result  # torch.compile cannot trace the question; the answer is compiled in
def float32_products(device_type: str) -> str:
    """``"highest"``, ``"high"`` (tf32) or ``"medium"`` (bfloat16), as ``torch.set_float32_matmul_precision`` calls them.

    Both ways count: that function, and the newer ``torch.backends.<cuda or mkldnn>.matmul.fp32_precision``, which has no bfloat16
    on GPUs.

    Args:
        device_type: "cpu", or any other for a GPU's products.
    """
    newer = _newer("mkldnn" if device_type == "cpu" else "cuda", "matmul")
    if newer == "tf32" and device_type != "cpu" and _older() == "medium":
        return "medium"
    return {"tf32": "high", "bf16": "medium"}.get(newer, "highest")


def _older() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer way has been used
        return ""
