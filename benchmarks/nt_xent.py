"""NT-Xent, SimCLR's loss; N images are 2N rows."""

from __future__ import annotations

import torch

from benchmarks import baselines
from benchmarks.case import Case, Draw, Inputs, Provider


def _views(shape: dict[str, int], draw: Draw) -> Inputs:
    first = draw.normal(shape["N"], shape["D"])
    return {"z1": first, "z2": draw.near(first)}


def _case(n: int, d: int, *sets: str, devices: tuple[str, ...]) -> Case:
    return Case(
        "nt_xent",
        f"{n} images, D = {d}",
        {"N": n, "D": d},
        _views,
        wrt=("z1", "z2"),
        # The similarities, and one product with G + G^T: the matrix of similarities is symmetric.
        products=2,
        pairs=lambda shape: (2 * shape["N"]) ** 2,
        options={"temperature": 0.5},
        sets=sets,
        devices=devices,
    )


CASES = [
    _case(256, 128, "quick", "full", devices=("cpu", "cuda")),
    _case(1024, 128, "quick", "full", devices=("cpu", "cuda")),
    _case(4096, 128, "full", devices=("cpu",)),
    _case(16384, 128, "full", devices=("cuda",)),
]


def rivals(case: Case, device: torch.device, dtype: torch.dtype) -> list[Provider]:
    """SimCLR's own form."""
    return [
        Provider(
            "published",
            lambda inputs: baselines.nt_xent(**inputs, **case.options),
            extra_bytes=16 * case.pairs(case.shape),
        )
    ]
