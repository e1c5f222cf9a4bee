"""The supervised contrastive loss."""

from __future__ import annotations

import torch

from benchmarks import baselines
from benchmarks.case import Case, Draw, Inputs, Provider


def _batch(shape: dict[str, int], draw: Draw) -> Inputs:
    labels = draw.labels(shape["N"], shape["classes"])
    centres = draw.normal(shape["classes"], shape["D"])
    return {"features": draw.near(centres[labels], noise=1.0), "labels": labels}


def _groups(shape: dict[str, int], draw: Draw) -> Inputs:
    """Exactly ``per_class`` rows of each class, in any order."""
    labels = draw.positions(shape["N"], shape["N"]) // shape["per_class"]
    centres = draw.normal(shape["N"], shape["D"])
    return {"features": draw.near(centres[labels], noise=1.0), "labels": labels}


def _case(n: int, d: int, classes: int, *sets: str, devices: tuple[str, ...]) -> Case:
    shape = {"N": n, "D": d, "classes": classes}
    return _of(f"{classes} classes, {n} x {d}", shape, _batch, sets, devices)


def _grouped(n: int, d: int, per_class: int, *sets: str, devices: tuple[str, ...]) -> Case:
    shape = {"N": n, "D": d, "per_class": per_class}
    return _of(f"{per_class} per class, {n} x {d}", shape, _groups, sets, devices)


def _of(name: str, shape: dict[str, int], make, sets, devices) -> Case:
    return Case(
        "sup_con",
        name,
        shape,
        make,
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
    _grouped(8192, 128, 4, "full", "table", devices=("cpu",)),
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
