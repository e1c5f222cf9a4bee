"""InfoNCE: one direction, keys without gradient, CLIP's two directions, MoCo's queue."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks import baselines, rivals_info_nce
from benchmarks.case import Case, Draw, Inputs, Provider


def _rows(shape: dict[str, int], draw: Draw) -> Inputs:
    query = draw.normal(shape["N"], shape["D"])
    return {"query": query, "positive_key": draw.near(query), "temperature": 0.07}


def _clip(shape: dict[str, int], draw: Draw) -> Inputs:
    return _rows(shape, draw) | {"temperature": draw.scalar(0.07)}


def _queue(shape: dict[str, int], draw: Draw) -> Inputs:
    return _rows(shape, draw) | {"negative_keys": draw.normal(shape["M"], shape["D"])}


def _square(shape: dict[str, int]) -> int:
    return shape["N"] ** 2


def _one_way(n: int, d: int, *sets: str, device: str) -> Case:
    return Case(
        "info_nce",
        f"both gradients, {n} x {d}",
        {"N": n, "D": d},
        _rows,
        wrt=("query", "positive_key"),
        products=3,
        pairs=_square,
        sets=sets,
        devices=(device,),
    )


def _fixed_keys(n: int, d: int, *sets: str, device: str) -> Case:
    return Case(
        "info_nce",
        f"keys without gradient, {n} x {d}",
        {"N": n, "D": d},
        _rows,
        wrt=("query",),
        products=2,
        pairs=_square,
        sets=sets,
        devices=(device,),
    )


def _two_way(n: int, d: int, *sets: str, device: str) -> Case:
    return Case(
        "info_nce",
        f"CLIP, two directions, learnt temperature, {n} x {d}",
        {"N": n, "D": d},
        _clip,
        wrt=("query", "positive_key", "temperature"),
        products=3,
        pairs=_square,
        options={"symmetric": True},
        sets=sets,
        devices=(device,),
    )


def _both_ways(n: int, d: int, *sets: str, device: str) -> Case:
    return Case(
        "info_nce",
        f"two directions, both gradients, {n} x {d}",
        {"N": n, "D": d},
        _rows,
        wrt=("query", "positive_key"),
        products=3,
        pairs=_square,
        options={"symmetric": True},
        sets=sets,
        devices=(device,),
    )


def _huge(n: int, d: int) -> Case:
    return Case(
        "info_nce",
        f"both gradients, {n} x {d}",
        {"N": n, "D": d},
        _rows,
        wrt=("query", "positive_key"),
        products=3,
        pairs=_square,
        sets=("table",),
        devices=("cpu",),
        once=True,
    )


def _moco(n: int, m: int, d: int, *sets: str, device: str) -> Case:
    return Case(
        "info_nce",
        f"MoCo, queue of {m}, {n} x {d}",
        {"N": n, "M": m, "D": d},
        _queue,
        wrt=("query",),
        products=2,
        pairs=lambda shape: shape["N"] * shape["M"],
        sets=sets,
        devices=(device,),
    )


CASES = [
    _one_way(2048, 256, "quick", "full", "demo", device="cpu"),
    _one_way(4096, 256, "full", device="cpu"),
    _one_way(16384, 256, "full", "table", device="cpu"),
    _one_way(8192, 1024, "full", "table", device="cpu"),
    _one_way(4096, 768, "full", device="cpu"),
    _fixed_keys(2048, 256, "quick", "full", device="cpu"),
    _fixed_keys(16384, 256, "full", "table", device="cpu"),
    _huge(131072, 128),
    _two_way(1024, 512, "quick", "full", device="cpu"),
    _two_way(4096, 512, "full", device="cpu"),
    _moco(256, 16384, 128, "quick", device="cpu"),
    _moco(256, 65536, 128, "full", "table", device="cpu"),
    _one_way(8192, 256, "quick", "full", "demo", device="cuda"),
    _one_way(32768, 256, "quick", "full", device="cuda"),
    _one_way(65536, 768, "full", device="cuda"),
    _fixed_keys(32768, 128, "quick", "full", device="cuda"),
    _fixed_keys(65536, 256, "full", "target", device="cuda"),
    _fixed_keys(65536, 512, "full", "target", device="cuda"),
    _two_way(8192, 512, "quick", "full", device="cuda"),
    _two_way(32768, 512, "full", device="cuda"),
    _two_way(65536, 768, "full", device="cuda"),
    _both_ways(32768, 256, "full", "target", device="cuda"),
    _both_ways(65536, 128, "full", "target", device="cuda"),
    _both_ways(65536, 256, "full", "target", device="cuda"),
    _both_ways(65536, 512, "full", "target", device="cuda"),
    _both_ways(65536, 1024, "full", "target", device="cuda"),
    _both_ways(262144, 512, "full", "target", device="cuda"),
    _moco(256, 65536, 128, "quick", "full", "target", device="cuda"),
]


def rivals(case: Case, device: torch.device, dtype: torch.dtype) -> list[Provider]:
    """The published form; for keys without gradient, fused attention; on a GPU, other people's fused losses."""
    pair_bytes = 4 * dtype.itemsize * case.pairs(case.shape)
    found = [
        Provider(
            "published",
            lambda inputs: baselines.info_nce(**inputs, **case.options),
            extra_bytes=pair_bytes,
        )
    ]
    if case.wrt == ("query",):
        kernels = baselines.attention_kernels(device, dtype, case.shape["D"])
        found += [
            Provider(f"attention ({kernel})", partial(_attention, kernel), reason=reason)
            for kernel, reason in kernels.items()
        ]
    return found + rivals_info_nce.providers(case, device)


def _attention(kernel: str, inputs: Inputs) -> torch.Tensor:
    query, key = inputs["query"].unsqueeze(0), inputs["positive_key"].unsqueeze(0)
    negatives = inputs.get("negative_keys")
    return baselines.attention_info_nce(kernel, query, key, negatives, inputs["temperature"])
