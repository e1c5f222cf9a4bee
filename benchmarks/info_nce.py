"""InfoNCE: one direction, keys without gradient, CLIP's two directions, MoCo's queue."""

from __future__ import annotations

from collections.abc import Callable
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


def _pairs(shape: dict[str, int]) -> int:
    return shape["N"] * shape.get("M", shape["N"])


def _case(
    name: str,
    shape: dict[str, int],
    *sets: str,
    device: str,
    draw: Callable[[dict[str, int], Draw], Inputs] = _rows,
    wrt: tuple[str, ...] = ("query", "positive_key"),
    symmetric: bool = False,
    once: bool = False,
) -> Case:
    return Case(
        "info_nce",
        name,
        shape,
        draw,
        wrt=wrt,
        products=2 if wrt == ("query",) else 3,
        pairs=_pairs,
        options={"symmetric": True} if symmetric else {},
        sets=sets,
        devices=(device,),
        once=once,
    )


def _one_way(n: int, d: int, *sets: str, device: str, once: bool = False) -> Case:
    name = f"both gradients, {n} x {d}"
    return _case(name, {"N": n, "D": d}, *sets, device=device, once=once)


def _fixed_keys(n: int, d: int, *sets: str, device: str) -> Case:
    name = f"keys without gradient, {n} x {d}"
    return _case(name, {"N": n, "D": d}, *sets, device=device, wrt=("query",))


def _two_way(n: int, d: int, *sets: str, device: str) -> Case:
    wrt = ("query", "positive_key", "temperature")
    name = f"CLIP, two directions, learnt temperature, {n} x {d}"
    return _case(name, {"N": n, "D": d}, *sets, device=device, draw=_clip, wrt=wrt, symmetric=True)


def _both_ways(n: int, d: int, *sets: str, device: str) -> Case:
    name = f"two directions, both gradients, {n} x {d}"
    return _case(name, {"N": n, "D": d}, *sets, device=device, symmetric=True)


def _moco(n: int, m: int, d: int, *sets: str, device: str) -> Case:
    name = f"MoCo, queue of {m}, {n} x {d}"
    shape = {"N": n, "M": m, "D": d}
    return _case(name, shape, *sets, device=device, draw=_queue, wrt=("query",))


CASES = [
    _one_way(2048, 256, "quick", "full", "demo", device="cpu"),
    _one_way(4096, 256, "full", device="cpu"),
    _one_way(16384, 256, "full", "table", device="cpu"),
    _one_way(8192, 1024, "full", "table", device="cpu"),
    _one_way(4096, 768, "full", device="cpu"),
    _fixed_keys(2048, 256, "quick", "full", device="cpu"),
    _fixed_keys(16384, 256, "full", "table", device="cpu"),
    _one_way(131072, 128, "table", device="cpu", once=True),
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
