"""PatchNCE: CUT's five layers, in one image, in a batch, and over all images of a batch."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks import baselines
from benchmarks.case import Case, Draw, Inputs, Provider


def _layers(shape: dict[str, int], draw: Draw) -> Inputs:
    size = (shape["B"], shape["S"], shape["D"])
    queries = [draw.normal(*size) for _ in range(shape["layers"])]
    return {"query_features": queries, "key_features": [draw.near(q) for q in queries]}


def _pairs_in_image(shape: dict[str, int]) -> int:
    return shape["layers"] * shape["B"] * shape["S"] ** 2


def _pairs_in_batch(shape: dict[str, int]) -> int:
    return shape["layers"] * (shape["B"] * shape["S"]) ** 2


def _case(name: str, batch: int, patches: int, *sets: str, negatives: str = "image") -> Case:
    return Case(
        "patch_nce",
        name,
        {"layers": 5, "B": batch, "S": patches, "D": 256},
        _layers,
        wrt=("query_features",),
        products=2,
        pairs=_pairs_in_image if negatives == "image" else _pairs_in_batch,
        options={"temperature": 0.07, "negatives": negatives},
        sets=sets,
    )


CASES = [
    _case("CUT, 1 image", 1, 256, "quick", "full", "demo", "table", "target"),
    _case("16 patches, 1 image", 1, 16, "full", "table"),
    _case("CUT, 8 images", 8, 256, "full"),
    _case("CUT, 16 images", 16, 256, "full", "target"),
    _case("64 patches, 8 images", 8, 64, "quick", "full"),
    _case("negatives from 4 images", 4, 256, "full", negatives="batch"),
    _case("SinCUT, 16 images of 1 patch", 16, 1, "full", negatives="batch"),
]


def rivals(case: Case, device: torch.device, dtype: torch.dtype) -> list[Provider]:
    """CUT's own form, and fused attention: the keys have no gradient."""
    kernels = baselines.attention_kernels(device, dtype, case.shape["D"])
    return [Provider("published", lambda inputs: baselines.patch_nce(**inputs, **case.options))] + [
        Provider(f"attention ({kernel})", partial(_attention, case, kernel), reason=reason)
        for kernel, reason in kernels.items()
    ]


def _attention(case: Case, kernel: str, inputs: Inputs) -> torch.Tensor:
    return baselines.attention_patch_nce(kernel, **inputs, **case.options)
