"""Pairwise cosine similarity, whose result is itself N x M."""

from __future__ import annotations

import torch

from benchmarks import baselines
from benchmarks.case import Case, Draw, Inputs, Provider


def _rows(shape: dict[str, int], draw: Draw) -> Inputs:
    return {"x": draw.normal(shape["N"], shape["D"]), "y": draw.normal(shape["M"], shape["D"])}


def _case(n: int, m: int, d: int, *sets: str, devices: tuple[str, ...]) -> Case:
    return Case(
        "pairwise_cosine_similarity",
        f"{n} x {m}, D = {d}",
        {"N": n, "M": m, "D": d},
        _rows,
        wrt=("x", "y"),
        products=3,
        pairs=lambda shape: shape["N"] * shape["M"],
        options={"temperature": 0.07},
        sets=sets,
        devices=devices,
    )


def _batched(b: int, n: int, d: int, *sets: str) -> Case:
    return Case(
        "pairwise_cosine_similarity",
        f"{b} x {n} x {n}, D = {d}",
        {"B": b, "N": n, "M": n, "D": d},
        lambda shape, draw: {
            name: draw.normal(shape["B"], shape[size], shape["D"]) for name, size in ("xN", "yM")
        },
        wrt=("x", "y"),
        products=3,
        pairs=lambda shape: shape["B"] * shape["N"] * shape["M"],
        options={"temperature": 0.07},
        sets=sets,
    )


CASES = [
    _batched(64, 64, 64, "full"),
    _case(256, 256, 256, "quick", "full", devices=("cpu", "cuda")),
    _case(2048, 2048, 256, "quick", "full", devices=("cpu", "cuda")),
    _case(8192, 8192, 512, "full", devices=("cuda",)),
]


def rivals(case: Case, device: torch.device, dtype: torch.dtype) -> list[Provider]:
    """Normalised copies and one product, in the inputs' dtype."""
    return [
        Provider(
            "published",
            lambda inputs: baselines.pairwise_cosine_similarity(**inputs, **case.options),
            extra_bytes=3 * dtype.itemsize * case.pairs(case.shape),
        )
    ]
