"""The table of cases: the ops, at which sizes, with which inputs and gradients, in which sets and on which devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fastnce
from benchmarks.case import Case, Draw, Inputs, Shape

Make = Callable[[Shape, Draw], Inputs]
_BOTH = "cpu cuda"


def _case(op: str, name: str, shape: Shape, sets: str, devices: str, make: Make, **more) -> Case:
    return Case(
        op, name, shape, make, sets=tuple(sets.split()), devices=tuple(devices.split()), **more
    )


# InfoNCE: one direction, keys without gradient, CLIP's two directions, MoCo's queue.


def _rows(shape: Shape, draw: Draw) -> Inputs:
    query = draw.normal(shape["N"], shape["D"])
    inputs = {"query": query, "positive_key": draw.near(query), "temperature": 0.07}
    if "M" in shape:
        inputs["negative_keys"] = draw.normal(shape["M"], shape["D"])
    return inputs


def _clip_rows(shape: Shape, draw: Draw) -> Inputs:
    return _rows(shape, draw) | {"temperature": draw.scalar(0.07)}


_QUERY, _KEYS = ("query",), ("query", "positive_key")


def _info_nce(
    name: str, shape: Shape, sets: str, device: str, wrt: tuple[str, ...] = _KEYS, **more: Any
) -> Case:
    return _case(
        "info_nce",
        name,
        shape,
        sets,
        device,
        more.pop("make", _rows),
        wrt=wrt,
        products=2 if wrt == _QUERY else 3,
        pairs=lambda shape: shape["N"] * shape.get("M", shape["N"]),
        **more,
    )


def _one_way(n: int, d: int, sets: str, device: str, once: bool = False) -> Case:
    return _info_nce(f"both gradients, {n} x {d}", {"N": n, "D": d}, sets, device, once=once)


def _fixed_keys(n: int, d: int, sets: str, device: str) -> Case:
    return _info_nce(f"keys without gradient, {n} x {d}", {"N": n, "D": d}, sets, device, _QUERY)


def _both_ways(n: int, d: int, sets: str, device: str) -> Case:
    name = f"two directions, both gradients, {n} x {d}"
    return _info_nce(name, {"N": n, "D": d}, sets, device, options={"symmetric": True})


def _clip(n: int, d: int, sets: str, device: str) -> Case:
    name = f"CLIP, two directions, learnt temperature, {n} x {d}"
    options, wrt = {"symmetric": True}, (*_KEYS, "temperature")
    return _info_nce(name, {"N": n, "D": d}, sets, device, wrt, make=_clip_rows, options=options)


def _moco(n: int, m: int, d: int, sets: str, device: str) -> Case:
    shape = {"N": n, "M": m, "D": d}
    return _info_nce(f"MoCo, queue of {m}, {n} x {d}", shape, sets, device, _QUERY)


# PatchNCE: CUT's five layers, in one image, in a batch, and over all images of a batch.


def _layers(shape: Shape, draw: Draw) -> Inputs:
    size = (shape["B"], shape["S"], shape["D"])
    queries = [draw.normal(*size) for _ in range(shape["layers"])]
    return {"query_features": queries, "key_features": [draw.near(q) for q in queries]}


def _patch_nce(name: str, batch: int, patches: int, sets: str, negatives: str = "image") -> Case:
    def pairs(shape: Shape) -> int:
        images = 1 if negatives == "image" else shape["B"]
        return shape["layers"] * shape["B"] * images * shape["S"] ** 2

    shape = {"layers": 5, "B": batch, "S": patches, "D": 256}
    options = {"temperature": 0.07, "negatives": negatives}
    wrt = ("query_features",)
    return _case(
        "patch_nce",
        name,
        shape,
        sets,
        _BOTH,
        _layers,
        wrt=wrt,
        products=2,
        pairs=pairs,
        options=options,
    )


# Rows against themselves. The similarities, and one product with G + G^T: their matrix is symmetric.


def _of_themselves(op: str, name: str, shape: Shape, sets: str, devices: str, make: Make, **more):
    pairs = more.pop("pairs", lambda shape: shape["N"] ** 2)
    return _case(op, name, shape, sets, devices, make, products=2, pairs=pairs, **more)


def _with_proxies(shape: Shape, draw: Draw) -> Inputs:
    labels = draw.labels(shape["N"], shape["classes"])
    table = draw.normal(shape["classes"], shape["D"])
    embeddings = draw.near(table[labels], noise=2.0)
    return {"embeddings": embeddings, "proxies": table[labels].clone(), "labels": labels}


def _2c(name: str, n: int, d: int, classes: int, sets: str) -> Case:
    """ContraGAN's 2C loss, at the batch sizes and widths of its published configurations."""
    return _of_themselves(
        "conditional_contrastive",
        f"{name}, {n} x {d}",
        {"N": n, "D": d, "classes": classes},
        sets,
        _BOTH,
        _with_proxies,
        wrt=("embeddings", "proxies"),
        options={"temperature": 1.0},
        gate_limits={"N": 128},
    )


def _labelled(shape: Shape, draw: Draw) -> Inputs:
    """Labels at random or, with ``per_class``, exactly so many rows of each class, in any order."""
    classes = shape.get("classes", shape["N"])
    if "per_class" in shape:
        labels = draw.positions(shape["N"], shape["N"]) // shape["per_class"]
    else:
        labels = draw.labels(shape["N"], classes)
    centres = draw.normal(classes, shape["D"])
    return {"features": draw.near(centres[labels], noise=1.0), "labels": labels}


def _sup_con(n: int, d: int, key: str, number: int, sets: str, devices: str) -> Case:
    name = f"{number} {'per class' if key == 'per_class' else key}, {n} x {d}"
    return _of_themselves(
        "sup_con",
        name,
        {"N": n, "D": d, key: number},
        sets,
        devices,
        _labelled,
        wrt=("features",),
        options={"temperature": 0.07},
    )


def _views(shape: Shape, draw: Draw) -> Inputs:
    first = draw.normal(shape["N"], shape["D"])
    return {"z1": first, "z2": draw.near(first)}


def _nt_xent(n: int, sets: str, devices: str) -> Case:
    """SimCLR's loss; N images are 2N rows."""
    return _of_themselves(
        "nt_xent",
        f"{n} images, D = 128",
        {"N": n, "D": 128},
        sets,
        devices,
        _views,
        wrt=("z1", "z2"),
        pairs=lambda shape: (2 * shape["N"]) ** 2,
        options={"temperature": 0.5},
    )


# Pairwise cosine similarity, whose result is itself N x M.


def _matrices(shape: Shape, draw: Draw) -> Inputs:
    batch = (shape["B"],) if "B" in shape else ()
    return {name: draw.normal(*batch, shape[n], shape["D"]) for name, n in (("x", "N"), ("y", "M"))}


def _pairwise(n: int, d: int, sets: str, devices: str, batch: int | None = None) -> Case:
    before, shape = ("", {}) if batch is None else (f"{batch} x ", {"B": batch})
    return _case(
        "pairwise_cosine_similarity",
        f"{before}{n} x {n}, D = {d}",
        {**shape, "N": n, "M": n, "D": d},
        sets,
        devices,
        _matrices,
        wrt=("x", "y"),
        products=3,
        pairs=lambda shape: shape.get("B", 1) * shape["N"] * shape["M"],
        options={"temperature": 0.07},
    )


# Patch sampling from the five feature maps of a CUT step, positions given and positions drawn.


def _cut_maps(shape: Shape, draw: Draw) -> Inputs:
    batch, image = shape["B"], shape["image"]
    sides = (image + 6, image, image // 2, image // 4, image // 4)
    sizes = list(zip((3, 128, 256, 256, 256), sides, strict=True))
    return {
        "features": [draw.normal(batch, channels, side, side) for channels, side in sizes],
        "patch_ids": [draw.positions(side * side, shape["S"]) for side in sides],
    }


def _tracked_maps(shape: Shape, draw: Draw) -> Inputs:
    """Maps as they come out of a network that is trained, for a forward that is timed without its backward."""
    inputs = _cut_maps(shape, draw)
    inputs["features"] = [x.requires_grad_() for x in inputs["features"]]
    return inputs


class _Network(torch.autograd.Function):
    """What a map goes on into: nothing in the forward, a fresh dense gradient in the backward."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.shape = x.shape
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        # Of ones: the gradient that arrives at one number is 4096.
        return (grad / 4096).expand(ctx.shape).clone(memory_format=torch.contiguous_format)


def network(inputs: Inputs) -> list[torch.Tensor]:
    """The maps into a stand-in for the rest of the network, the same for every provider."""
    return [_Network.apply(x) for x in inputs["features"]]


def _through_the_tap(inputs: Inputs, backend: str | None, **options: int) -> list[torch.Tensor]:
    maps, patches, _ = fastnce.tap_patches(**inputs, **options, backend=backend)
    return network({"features": maps}) + patches


def _sampling(
    name: str,
    sets: str,
    batch: int = 1,
    image: int = 256,
    patches: int = 256,
    drawn: bool = True,
    forward: bool = False,
    tap: bool = False,
) -> Case:
    return _case(
        "sample_patches",
        name,
        {"B": batch, "image": image, "S": patches},
        sets,
        _BOTH,
        _tracked_maps if forward else _cut_maps,
        wrt=() if forward else ("features",),
        options={"num_patches": patches},
        gate_only=("patch_ids",) if drawn else (),
        form=_through_the_tap if tap else None,
        alone=network if tap else None,
    )


CASES = [
    _one_way(2048, 256, "quick full demo", "cpu"),
    _one_way(4096, 256, "full", "cpu"),
    _one_way(16384, 256, "full table", "cpu"),
    _one_way(8192, 1024, "full table", "cpu"),
    _one_way(4096, 768, "full", "cpu"),
    _fixed_keys(2048, 256, "quick full", "cpu"),
    _fixed_keys(16384, 256, "full table", "cpu"),
    _one_way(131072, 128, "table", "cpu", once=True),
    _clip(1024, 512, "quick full", "cpu"),
    _clip(4096, 512, "full", "cpu"),
    _moco(256, 16384, 128, "quick", "cpu"),
    _moco(256, 65536, 128, "full table", "cpu"),
    _one_way(8192, 256, "quick full demo", "cuda"),
    _one_way(32768, 256, "quick full", "cuda"),
    _one_way(65536, 768, "full", "cuda"),
    _fixed_keys(32768, 128, "quick full", "cuda"),
    _fixed_keys(65536, 256, "full target", "cuda"),
    _fixed_keys(65536, 512, "full target", "cuda"),
    _clip(8192, 512, "quick full", "cuda"),
    _clip(32768, 512, "full", "cuda"),
    _clip(65536, 768, "full", "cuda"),
    _both_ways(32768, 256, "full target", "cuda"),
    _both_ways(65536, 128, "full target", "cuda"),
    _both_ways(65536, 256, "full target", "cuda"),
    _both_ways(65536, 512, "full target", "cuda"),
    _both_ways(65536, 1024, "full target", "cuda"),
    _both_ways(262144, 512, "full target", "cuda"),
    _moco(256, 65536, 128, "quick full target", "cuda"),
    _patch_nce("CUT, 1 image", 1, 256, "quick full demo table target"),
    _patch_nce("16 patches, 1 image", 1, 16, "full table"),
    _patch_nce("CUT, 8 images", 8, 256, "full"),
    _patch_nce("CUT, 16 images", 16, 256, "full target"),
    _patch_nce("64 patches, 8 images", 8, 64, "quick full"),
    _patch_nce("negatives from 4 images", 4, 256, "full", negatives="batch"),
    _patch_nce("SinCUT, 16 images of 1 patch", 16, 1, "full", negatives="batch"),
    _2c("CIFAR10", 64, 512, 10, "quick full demo"),
    _2c("ImageNet-128", 256, 1536, 1000, "quick full"),
    _2c("Tiny ImageNet", 1024, 768, 200, "full table target"),
    _2c("large batch", 2048, 1536, 1000, "full target"),
    _sampling("CUT's 5 maps, 1 image, given positions", "quick full", drawn=False),
    _sampling("CUT's 5 maps, 1 image, drawn positions", "quick demo full table target"),
    _sampling("CUT's 5 maps, 1 image, forward alone", "full table target", forward=True),
    _sampling("CUT's 5 maps, 1 image, inside a network", "full table target", tap=True),
    _sampling("CUT's 5 maps, 4 images, drawn positions", "full", batch=4),
    _sampling("digits, 8 images of 32 x 32", "full", batch=8, image=32, patches=64),
    _sup_con(512, 128, "classes", 10, "quick full", _BOTH),
    _sup_con(2048, 128, "classes", 100, "quick full", _BOTH),
    _sup_con(8192, 128, "classes", 1000, "full", "cpu"),
    _sup_con(8192, 128, "per_class", 4, "full table", "cpu"),
    _sup_con(32768, 128, "classes", 1000, "full", "cuda"),
    _nt_xent(256, "quick full", _BOTH),
    _nt_xent(1024, "quick full", _BOTH),
    _nt_xent(4096, "full", "cpu"),
    _nt_xent(16384, "full", "cuda"),
    _pairwise(64, 64, "full", _BOTH, batch=64),
    _pairwise(256, 256, "quick full", _BOTH),
    _pairwise(2048, 256, "quick full", _BOTH),
    _pairwise(8192, 512, "full", "cuda"),
]
OPS = tuple(dict.fromkeys(case.op for case in CASES))


def select(op: str, size: str, device: torch.device) -> list[Case]:
    """The cases of ``op`` in the set ``size`` that are meant for ``device``."""
    of_op = (case for case in CASES if case.op == op)
    return [case for case in of_op if size in case.sets and device.type in case.devices]


def find(op: str, name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if (case.op, case.name) == (op, name))
