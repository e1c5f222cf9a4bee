"""The ``torch`` backend: every op in plain PyTorch, written to be read beside its equation, in ``fastnce/ops/<op>.py``.

It is the specification, the oracle of the tests and the baseline of the benchmarks. The functions are differentiable; autograd
derives their gradients. They take inputs that ``fastnce.ops`` has validated.
"""

from collections.abc import Callable

import torch

from fastnce import registry


def available() -> str:
    """Plain PyTorch always runs."""
    return "ok"


def supports(op: str, device: str | torch.device, dtype: torch.dtype) -> str:
    """Plain PyTorch runs every op on every device and floating-point dtype."""
    return "ok"


def __getattr__(name: str) -> Callable:
    if name not in registry.REFERENCES:
        raise AttributeError(f"fastnce.reference has no function {name!r}")
    return registry.REFERENCES[name]


def __dir__() -> list[str]:
    return ["available", "supports", *registry.REFERENCES]
