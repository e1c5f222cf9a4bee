"""Patch sampling from the five feature maps of a CUT step, positions given and positions drawn."""

from __future__ import annotations

import torch

import fastnce
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


def _tracked_maps(shape: dict[str, int], draw: Draw) -> Inputs:
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


def _network(maps: list[torch.Tensor]) -> list[torch.Tensor]:
    return [_Network.apply(x) for x in maps]


def _through_the_tap(inputs: Inputs, backend: str | None, **options: int) -> list[torch.Tensor]:
    maps, patches, _ = fastnce.tap_patches(**inputs, **options, backend=backend)
    return _network(maps) + patches


def _case(
    name: str,
    batch: int,
    image: int,
    patches: int,
    *sets: str,
    drawn: bool = False,
    forward: bool = False,
    tap: bool = False,
) -> Case:
    return Case(
        "sample_patches",
        name,
        {"B": batch, "image": image, "S": patches},
        _tracked_maps if forward else _cut_maps,
        wrt=() if forward else ("features",),
        options={"num_patches": patches},
        sets=sets,
        gate_only=("patch_ids",) if drawn else (),
        form=_through_the_tap if tap else None,
        alone=(lambda inputs: _network(inputs["features"])) if tap else None,
    )


_CUT = ("full", "table", "target")
CASES = [
    _case("CUT's 5 maps, 1 image, given positions", 1, 256, 256, "quick", "full"),
    _case(
        "CUT's 5 maps, 1 image, drawn positions",
        1,
        256,
        256,
        "quick",
        "demo",
        *_CUT,
        drawn=True,
    ),
    _case("the same, forward alone", 1, 256, 256, *_CUT, drawn=True, forward=True),
    _case("the same, inside a network", 1, 256, 256, *_CUT, drawn=True, tap=True),
    _case("CUT's 5 maps, 4 images, drawn positions", 4, 256, 256, "full", drawn=True),
    _case("digits, 8 images of 32 x 32", 8, 32, 64, "full", drawn=True),
]


def rivals(case: Case, device: torch.device, dtype: torch.dtype) -> list[Provider]:
    """CUT's own form; inside a network the map has both uses."""

    def published(inputs: Inputs) -> list[torch.Tensor]:
        patches = baselines.sample_patches(**inputs, **case.options)
        return (_network(inputs["features"]) if case.alone else []) + patches

    return [Provider("published", published)]
