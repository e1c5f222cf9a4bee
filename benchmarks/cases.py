"""What is measured: cases (an op, sizes, inputs, gradients) and the providers that compute them; and the table of the cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import fastnce

Inputs = dict[str, Any]
Shape = dict[str, int]
Call = Callable[[Inputs], Any]

# The truth in fp64 keeps several N x M arrays: about this many bytes per pair.
_TRUTH_BYTES_PER_PAIR = 64


class Draw:
    """Seeded random inputs of one device and dtype; drawn on the CPU, so the same on every device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Independent standard normal numbers."""
        return torch.randn(shape, generator=self._generator).to(self.device, self.dtype)

    def near(self, x: Tensor, noise: float = 3.0) -> Tensor:
        """``x`` with noise; the default makes positives of cosine 0.3, closer than negatives but no trivial task."""
        return x + noise * self.normal(*x.shape)

    def labels(self, count: int, classes: int) -> Tensor:
        """(count,) int64 class labels."""
        return torch.randint(classes, (count,), generator=self._generator).to(self.device)

    def positions(self, limit: int, count: int) -> Tensor:
        """(count,) distinct int64 positions below ``limit``."""
        return torch.randperm(limit, generator=self._generator)[:count].to(self.device)

    def scalar(self, value: float) -> Tensor:
        """A 0-d parameter, in the dtype in which the ops keep it."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.tensor(value, device=self.device, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """One problem: an op, its sizes, and how to make its inputs.

    Args:
        op: the public op, ``fastnce.<op>``.
        name: unique within the op.
        shape: the sizes, by the letters used in the docstrings.
        make: ``(shape, draw) -> arguments of the op``.
        wrt: the arguments whose gradients are computed; none times the forward alone.
        products: how many N x M x D matrix products loss and gradients cannot do without; 0 if there is no product.
        pairs: ``shape -> N * M``, summed over whatever is batched.
        options: further arguments of the op, the same for every provider.
        sets: the sets (``quick``, ``full``, ``demo``, ``small``, ``table``, ``target``) that it belongs to.
        devices: the device types that it is meant for.
        gate_only: arguments given for the gate but left out (None) when timed, such as positions to be drawn.
        gate_limits: sizes that the gate does not exceed, where a rival needs too much at the timed ones.
        once: so long, and so large for a rival, that only our own backends take part, with one call that gives time and
            memory (on a CPU only).
        form: ``(inputs, **options, backend) -> outputs`` of ours, where that is not ``op(**inputs, **options, backend)``.
        alone: what the case does besides the op, such as the network that a map goes on into. It is timed with the
            providers, and what they take above it is reported too.
    """

    op: str
    name: str
    shape: Shape
    make: Callable[[Shape, Draw], Inputs]
    wrt: tuple[str, ...]
    products: float = 0
    pairs: Callable[[Shape], int] = lambda shape: 0
    options: dict[str, Any] = field(default_factory=dict)
    sets: tuple[str, ...] = ("full",)
    devices: tuple[str, ...] = ("cpu", "cuda")
    gate_only: tuple[str, ...] = ()
    gate_limits: Shape = field(default_factory=dict)
    once: bool = False
    form: Callable[..., Any] | None = None
    alone: Call | None = None

    @property
    def flop(self) -> int:
        """Floating-point operations of the mandatory products."""
        return 2 * self.products * self.pairs(self.shape) * self.shape.get("D", 0)

    def gate_shape(self, truth_bytes: float) -> Shape:
        """The sizes at which the result is checked against fp64: the timed ones, or less where the truth needs more memory."""
        shape = self.cut(self.gate_limits)
        while (
            _TRUTH_BYTES_PER_PAIR * self.pairs(shape) > truth_bytes
            and max(shape.get("N", 1), shape.get("M", 1)) > 1
        ):
            larger = "M" if shape.get("M", 0) > shape.get("N", 0) else "N"
            shape |= {larger: (shape[larger] + 1) // 2}
        return shape

    def cut(self, limits: Shape) -> Shape:
        """The sizes, none above its limit."""
        return {key: min(size, limits.get(key, size)) for key, size in self.shape.items()}

    def inputs(
        self, device: torch.device, dtype: torch.dtype, shape: Shape | None = None
    ) -> Inputs:
        """The op's arguments at the timed sizes, those in ``wrt`` requiring a gradient.

        With a ``shape`` they are at those sizes, and complete: what ``gate_only`` leaves out of the timing is given.
        """
        inputs = self.make(shape or self.shape, Draw(device, dtype))
        for leaf in leaves(inputs, self.wrt):
            leaf.requires_grad_()
        if shape is None:
            inputs |= dict.fromkeys(self.gate_only)
        return inputs


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Args:
        name: shown in tables.
        call: arguments -> loss, or output tensors.
        ours: a fused backend of this package, held to the package's numerical contract.
        reason: why it cannot run here, or ``"ok"``.
        extra_bytes: what it is known to allocate at least, at the timed sizes; it is skipped where that is not free.
        compiled: the first call compiles.
        rounds_products: the factors of its products are rounded to fewer bits than the inputs have.
        truth: plain PyTorch of what it computes, where that is another function than the case's: of rounded similarities.
    """

    name: str
    call: Call
    ours: bool = False
    reason: str = "ok"
    extra_bytes: int = 0
    compiled: bool = False
    rounds_products: bool = False
    truth: Call | None = None


def leaves(inputs: Inputs, names: Iterable[str]) -> list[Tensor]:
    """The tensors of the named arguments, lists flattened."""
    values = [inputs[name] for name in names]
    return [x for value in values for x in (value if isinstance(value, (list, tuple)) else [value])]


def _case(
    family: Case, sets: str, devices: str = "cpu cuda", label: str = "", **shape: int
) -> Case:
    """A case of a family, whose name is filled in with the sizes."""
    name = family.name.format(label=label, **shape)
    sizes = {**family.shape, **shape}
    return replace(
        family, name=name, shape=sizes, sets=tuple(sets.split()), devices=tuple(devices.split())
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


def _rows_with_ids(shape: Shape, draw: Draw) -> Inputs:
    """One in four rows, on average, is another's duplicate or of its kind, and no negative of it."""
    return _rows(shape, draw) | {"query_ids": draw.labels(shape["N"], 4 * shape["N"])}


def _without_rank(inputs: Inputs, backend: str | None, **options: Any) -> Tensor:
    return fastnce.info_nce(**inputs, **options, backend=backend)[0]


def _pairs(shape: Shape) -> int:
    return shape.get("B", 1) * shape["N"] * shape.get("M", shape["N"])


_KEYS = ("query", "positive_key")
ONE_WAY = Case("info_nce", "both gradients, {N} x {D}", {}, _rows, _KEYS, products=3, pairs=_pairs)
IDS = replace(ONE_WAY, name="ids masked, both gradients, {N} x {D}", make=_rows_with_ids)
RANKED = replace(
    ONE_WAY,
    name="ranks besides, both gradients, {N} x {D}",
    options={"return_rank": True},
    form=_without_rank,
)
FIXED = replace(ONE_WAY, name="keys without gradient, {N} x {D}", wrt=("query",), products=2)
MOCO = replace(FIXED, name="MoCo, queue of {M}, {N} x {D}")
BOTH_WAYS = replace(
    ONE_WAY, name="two directions, both gradients, {N} x {D}", options={"symmetric": True}
)
CLIP = replace(
    BOTH_WAYS,
    name="CLIP, two directions, learnt temperature, {N} x {D}",
    make=_clip_rows,
    wrt=(*_KEYS, "temperature"),
)


def _images_and_texts(shape: Shape, draw: Draw) -> Inputs:
    image = draw.normal(shape["N"], shape["D"])
    return {"query": image, "key": draw.near(image)}


SIGLIP = Case(
    "sigmoid_contrastive",
    "SigLIP, both gradients, {N} x {D}",
    {},
    _images_and_texts,
    ("query", "key"),
    products=3,
    pairs=_pairs,
    options={"scale": 10.0, "bias": -10.0},
)


# PatchNCE: CUT's five layers, in one image, in a batch, and over all images of a batch.


def _layers(shape: Shape, draw: Draw) -> Inputs:
    size = (shape["B"], shape["S"], shape["D"])
    queries = [draw.normal(*size) for _ in range(shape["layers"])]
    return {"query_features": queries, "key_features": [draw.near(q) for q in queries]}


PATCHES = Case(
    "patch_nce",
    "{label}",
    {"layers": 5, "B": 1, "S": 256, "D": 256},
    _layers,
    ("query_features",),
    products=2,
    pairs=lambda shape: shape["layers"] * shape["B"] * shape["S"] ** 2,
    options={"temperature": 0.07, "negatives": "image"},
)
PATCHES_OF_BATCH = replace(
    PATCHES,
    pairs=lambda shape: shape["layers"] * (shape["B"] * shape["S"]) ** 2,
    options={"temperature": 0.07, "negatives": "batch"},
)

# Contrastive Feature Loss as published, and with gradients to both sides of every pair: 2 S rows of each image among themselves.
# Half of the similarities serve twice.
FEATURES = replace(
    PATCHES,
    name="CFL, {layers} maps, {B} images of {S} patches",
    wrt=("query_features", "key_features"),
    products=1.5,
    pairs=lambda shape: shape["layers"] * shape["B"] * (2 * shape["S"]) ** 2,
    options={"symmetric": True, "query_negatives": True, "detach_keys": True},
    gate_limits={"S": 256},
)
FEATURES_FLOWING = replace(
    FEATURES,
    name="CFL, gradients both ways, {layers} maps, {B} images of {S} patches",
    options={"symmetric": True, "query_negatives": True},
)


# Rows against themselves. The similarities, and one product with G + G^T: their matrix is symmetric.


def _with_proxies(shape: Shape, draw: Draw) -> Inputs:
    labels = draw.labels(shape["N"], shape["classes"])
    table = draw.normal(shape["classes"], shape["D"])
    embeddings = draw.near(table[labels], noise=2.0)
    return {"embeddings": embeddings, "proxies": table[labels].clone(), "labels": labels}


# ContraGAN's 2C loss, at the batch sizes and widths of its published configurations.
TWO_C = Case(
    "conditional_contrastive",
    "{label}, {N} x {D}",
    {},
    _with_proxies,
    ("embeddings", "proxies"),
    products=2,
    pairs=_pairs,
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


SUP_CON = Case(
    "sup_con",
    "{classes} classes, {N} x {D}",
    {},
    _labelled,
    ("features",),
    products=2,
    pairs=_pairs,
    options={"temperature": 0.07},
)
# The similarities once more where positives are.
SUP_CON_EACH = replace(
    SUP_CON,
    name="a term for each positive, {classes} classes, {N} x {D}",
    products=3,
    options={"temperature": 0.07, "positives": "each"},
)
SUP_CON_GROUPS = replace(SUP_CON, name="{per_class} per class, {N} x {D}")


def _views(shape: Shape, draw: Draw) -> Inputs:
    first = draw.normal(shape["N"], shape["D"])
    return {"z1": first, "z2": draw.near(first)}


# SimCLR's loss; N images are 2N rows.
NT_XENT = Case(
    "nt_xent",
    "{N} images, D = {D}",
    {},
    _views,
    ("z1", "z2"),
    products=2,
    pairs=lambda shape: (2 * shape["N"]) ** 2,
    options={"temperature": 0.5},
)


# Pairwise cosine similarity, whose result is itself N x M.


def _matrices(shape: Shape, draw: Draw) -> Inputs:
    batch = (shape["B"],) if "B" in shape else ()
    return {name: draw.normal(*batch, shape[n], shape["D"]) for name, n in (("x", "N"), ("y", "M"))}


PAIRWISE = Case(
    "pairwise_cosine_similarity",
    "{N} x {M}, D = {D}",
    {},
    _matrices,
    ("x", "y"),
    products=3,
    pairs=_pairs,
    options={"temperature": 0.07},
)
BATCHED = replace(PAIRWISE, name="{B} x {N} x {M}, D = {D}")


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
    """A stand-in for the network that a map goes on into: nothing in the forward, a fresh dense gradient in the backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # Of ones: the gradient that arrives at one number is 4096.
        return (grad / 4096).expand(ctx.shape).clone(memory_format=torch.contiguous_format)


def network(inputs: Inputs) -> list[Tensor]:
    """The maps into a stand-in for the rest of the network, the same for every provider."""
    return [_Network.apply(x) for x in inputs["features"]]


def _through_the_tap(inputs: Inputs, backend: str | None, **options: int) -> list[Tensor]:
    maps, patches, _ = fastnce.tap_patches(**inputs, **options, backend=backend)
    return network({"features": maps}) + patches


SAMPLING = Case(
    "sample_patches",
    "{label}",
    {"B": 1, "image": 256, "S": 256},
    _cut_maps,
    ("features",),
    options={"num_patches": 256},
)
DRAWN = replace(SAMPLING, gate_only=("patch_ids",))
FORWARD = replace(DRAWN, make=_tracked_maps, wrt=())
TAP = replace(DRAWN, form=_through_the_tap, alone=network)
DIGITS = replace(DRAWN, options={"num_patches": 64})

_MAPS = "CUT's 5 maps, 1 image, "
_CUT = "full table target"
CASES = [
    _case(ONE_WAY, "small", N=64, D=128),
    _case(FIXED, "small", N=64, D=128),
    _case(BOTH_WAYS, "small", N=64, D=128),
    _case(IDS, "small", N=64, D=128),
    _case(ONE_WAY, "quick full demo", "cpu", N=2048, D=256),
    _case(ONE_WAY, "full", "cpu", N=4096, D=256),
    _case(ONE_WAY, "full table", "cpu", N=16384, D=256),
    _case(ONE_WAY, "full table", "cpu", N=8192, D=1024),
    _case(ONE_WAY, "full", "cpu", N=4096, D=768),
    _case(IDS, "full", "cpu", N=16384, D=256),
    _case(RANKED, "full", "cpu", N=16384, D=256),
    _case(FIXED, "quick full", "cpu", N=2048, D=256),
    _case(FIXED, "full table", "cpu", N=16384, D=256),
    _case(replace(ONE_WAY, once=True), "full", "cpu", N=131072, D=128),
    _case(BOTH_WAYS, "full table", "cpu", N=16384, D=256),
    _case(BOTH_WAYS, "full table", "cpu", N=8192, D=1024),
    _case(CLIP, "quick full", "cpu", N=1024, D=512),
    _case(CLIP, "full", "cpu", N=4096, D=512),
    _case(MOCO, "quick", "cpu", N=256, M=16384, D=128),
    _case(MOCO, "full table", "cpu", N=256, M=65536, D=128),
    _case(ONE_WAY, "quick full demo", "cuda", N=8192, D=256),
    _case(ONE_WAY, "quick full", "cuda", N=32768, D=256),
    _case(ONE_WAY, "full", "cuda", N=65536, D=768),
    _case(FIXED, "quick full", "cuda", N=32768, D=128),
    _case(FIXED, "full target", "cuda", N=65536, D=256),
    _case(FIXED, "full target", "cuda", N=65536, D=512),
    _case(CLIP, "quick full", "cuda", N=8192, D=512),
    _case(CLIP, "full", "cuda", N=32768, D=512),
    _case(CLIP, "full", "cuda", N=65536, D=768),
    _case(BOTH_WAYS, "full target", "cuda", N=32768, D=256),
    _case(BOTH_WAYS, "full target", "cuda", N=65536, D=128),
    _case(BOTH_WAYS, "full target", "cuda", N=65536, D=256),
    _case(BOTH_WAYS, "full target", "cuda", N=65536, D=512),
    _case(BOTH_WAYS, "full target", "cuda", N=65536, D=1024),
    _case(BOTH_WAYS, "full target", "cuda", N=262144, D=512),
    _case(MOCO, "quick full target", "cuda", N=256, M=65536, D=128),
    _case(PATCHES, "quick full demo table target", label="CUT, 1 image"),
    _case(PATCHES, "full table", label="16 patches, 1 image", S=16),
    _case(PATCHES, "small", label="1 layer of 64 patches, D = 128", layers=1, S=64, D=128),
    _case(PATCHES, "full", label="CUT, 8 images", B=8),
    _case(PATCHES, "full target", label="CUT, 16 images", B=16),
    _case(PATCHES, "quick full", label="64 patches, 8 images", B=8, S=64),
    _case(PATCHES_OF_BATCH, "full", label="negatives from 4 images", B=4),
    _case(PATCHES_OF_BATCH, "full", label="SinCUT, 16 images of 1 patch", B=16, S=1),
    _case(FEATURES, "quick full", layers=4, B=1, S=256),
    _case(FEATURES, "full", layers=1, B=16, S=1024),
    _case(FEATURES_FLOWING, "full", layers=1, B=16, S=1024),
    _case(TWO_C, "small", label="10 classes", N=64, D=128, classes=10),
    _case(TWO_C, "quick full demo", label="CIFAR10", N=64, D=512, classes=10),
    _case(TWO_C, "quick full", label="ImageNet-128", N=256, D=1536, classes=1000),
    _case(TWO_C, "full table target", label="Tiny ImageNet", N=1024, D=768, classes=200),
    _case(TWO_C, "full target", label="large batch", N=2048, D=1536, classes=1000),
    _case(DIGITS, "small", label="5 maps of an image of 32 x 32", image=32, S=64),
    _case(SAMPLING, "quick full", label=f"{_MAPS}given positions"),
    _case(DRAWN, f"quick demo {_CUT}", label=f"{_MAPS}drawn positions"),
    _case(FORWARD, _CUT, label=f"{_MAPS}forward alone"),
    _case(TAP, _CUT, label=f"{_MAPS}inside a network"),
    _case(DRAWN, "full", label="CUT's 5 maps, 4 images, drawn positions", B=4),
    _case(DIGITS, "full", label="digits, 8 images of 32 x 32", B=8, image=32, S=64),
    _case(SUP_CON, "small", N=64, D=128, classes=10),
    _case(SUP_CON, "quick full", N=512, D=128, classes=10),
    _case(SUP_CON, "quick full", N=2048, D=128, classes=100),
    _case(SUP_CON, "full", "cpu", N=8192, D=128, classes=1000),
    _case(SUP_CON_EACH, "full", "cpu", N=2048, D=128, classes=32),
    _case(SUP_CON_GROUPS, "full table", "cpu", N=8192, D=128, per_class=4),
    _case(SUP_CON, "full", "cuda", N=32768, D=128, classes=1000),
    _case(NT_XENT, "small", N=32, D=128),
    _case(NT_XENT, "quick full", N=256, D=128),
    _case(NT_XENT, "quick full", N=1024, D=128),
    _case(NT_XENT, "full table", "cpu", N=4096, D=128),
    _case(NT_XENT, "full", "cuda", N=16384, D=128),
    _case(SIGLIP, "small", N=64, D=128),
    _case(SIGLIP, "quick full", N=1024, D=256),
    _case(SIGLIP, "full table", "cpu", N=16384, D=256),
    _case(SIGLIP, "full", "cuda", N=32768, D=768),
    _case(PAIRWISE, "small", N=64, M=64, D=128),
    _case(BATCHED, "full", B=64, N=64, M=64, D=64),
    _case(PAIRWISE, "quick full", N=256, M=256, D=256),
    _case(PAIRWISE, "quick full", N=2048, M=2048, D=256),
    _case(PAIRWISE, "full", "cuda", N=8192, M=8192, D=512),
]
OPS = tuple(dict.fromkeys(case.op for case in CASES))


def select(op: str, size: str, device: torch.device) -> list[Case]:
    """The cases of ``op`` in the set ``size`` that are meant for ``device``."""
    of_op = (case for case in CASES if case.op == op)
    return [case for case in of_op if size in case.sets and device.type in case.devices]


def find(op: str, name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if (case.op, case.name) == (op, name))
