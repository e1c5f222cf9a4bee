"""The supervised contrastive loss."""

from __future__ import annotations

import torch

from benchmarks import baselines
from benchmarks.case import Case, Draw, Inputs, Provider


def _batch(shape: dict[str, int], draw: Draw) -> Inputs:
    labels = draw.labels(shape["N"], shape["classes"])
    centres = draw.normal(shape["classes"], shape["D"])
    return {"features": draw.near(centres[labels], noise=1.0), "labels": labels}


def _case(n: int, d: int, classes: int, *sets: str, devices: tuple[str, ...]) -> Case:
    return Case(
        "sup_con",
        f"{classes} classes, {n} x {d}",
        {"N": n, "D": d, "classes": classes},
        _batch,
        wrt=("features",),
        # The similarities, and one product with G + G^T: the matrix of similarities is symmetric.
        products=2,
        pairs=lambda shape: shape["N"] ** 2,
        options={"temperature": 0.07},
        sets=sets,
        devices=devices,
    )


CASES = [
    _case(512, 128, 10, "quick", "full", devices=("cpu", "cuda")),
    _case(2048, 128, 100, "quick", "full", devices=("cpu", "cuda")),
    _case(8192, 128, 1000, "full", devices=("cpu",)),
    _case(32768, 128, 1000, "full", devices=("cuda",)),
]


def rivals(case: Case, device: torch.device, dtype: torch.dtype) -> list[Provider]:
    """The published form with its masks."""
    return [
        Provider(
            "published",
            lambda inputs: baselines.sup_con(**inputs, **case.options),
            extra_bytes=20 * case.pairs(case.shape),
        )
    ]
