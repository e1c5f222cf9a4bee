"""Patch sampling from the five feature maps of a CUT step, positions given and positions drawn."""

from __future__ import annotations

import torch

from benchmarks import baselines
from benchmarks.case import Case, Draw, Inputs, Provider


def _cut_maps(shape: dict[str, int], draw: Draw) -> Inputs:
    batch, image = shape["B"], shape["image"]
    sizes = [
        (3, image + 6),
        (128, image),
        (256, image // 2),
        (256, image // 4),
        (256, image // 4),
    ]
    return {
        "features": [draw.normal(batch, channels, side, side) for channels, side in sizes],
        "patch_ids": [draw.positions(side * side, shape["S"]) for _, side in sizes],
    }


def _case(name: str, batch: int, image: int, patches: int, *sets: str, drawn: bool = False) -> Case:
    return Case(
        "sample_patches",
        name,
        {"B": batch, "image": image, "S": patches},
        _cut_maps,
        wrt=("features",),
        options={"num_patches": patches},
        sets=sets,
        gate_only=("patch_ids",) if drawn else (),
    )


CASES = [
    _case("CUT's 5 maps, 1 image, given positions", 1, 256, 256, "quick", "full"),
    _case(
        "CUT's 5 maps, 1 image, drawn positions",
        1,
        256,
        256,
        "quick",
        "full",
        "demo",
        "table",
        drawn=True,
    ),
    _case("CUT's 5 maps, 4 images, drawn positions", 4, 256, 256, "full", drawn=True),
    _case("digits, 8 images of 32 x 32", 8, 32, 64, "full", drawn=True),
]


def rivals(case: Case, device: torch.device, dtype: torch.dtype) -> list[Provider]:
    """CUT's own form."""
    return [
        Provider("published", lambda inputs: baselines.sample_patches(**inputs, **case.options))
    ]
