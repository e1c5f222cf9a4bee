"""What ``fastnce verify`` asks of a kernel: the cases in which it has to be right, and the races that it has to win."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastnce.registry import Make

# In the order of what a training is likely to have.
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
Cut = Callable[[int], int]
Arguments = Callable[[Make, Cut], dict[str, object]]


class Case(NamedTuple):
    """One call of an op.

    Args:
        form: the name that the op's form has for it.
        name: what is special about it; of a race, its size.
        arguments: (what makes rows, what cuts numbers of rows down for tests on a CPU) -> the op's arguments.
    """

    form: str
    name: str
    arguments: Arguments


class QuickMake(Make):
    """Makes large samples on their device, where nobody compares numbers between devices."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device) -> None:
        super().__init__(dtype, str(device), torch.Generator())

    def __call__(self, *shape: int, grad: bool = True) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device).requires_grad_(grad)

    def similar(self, x: Tensor) -> Tensor:
        return (0.8 * x.detach() + 0.6 * torch.randn_like(x)).requires_grad_()


def _options(make: Make, tau: float | None, options: dict[str, object]) -> dict[str, object]:
    if tau is None:
        return options
    return options | {"temperature": torch.tensor(tau, device=make.device, requires_grad=True)}


def _pairs(
    count: int,
    depth: int,
    *,
    keys: bool = True,
    queue: int = 0,
    own: int = 0,
    tau: float | None = None,
    **options: object,
) -> Arguments:
    """Of ``info_nce``; ``tau`` is a temperature that gets its gradient.

    Keys are not like their queries: where positives dominate, gradients are near zero, and no error of theirs would be seen.
    """

    def arguments(make: Make, cut: Cut) -> dict[str, object]:
        query = make(cut(count), depth)
        found: dict[str, object] = {
            "query": query,
            "positive_key": make(cut(count), depth, grad=keys),
        }
        if queue:
            found["negative_keys"] = make(cut(queue), depth, grad=False)
        if own:
            found["negative_keys"] = make(cut(count), cut(own), depth)
        return found | _options(make, tau, options)

    return arguments


def _rows(
    name: str,
    count: int,
    depth: int,
    *,
    partners: str = "",
    labels: bool = True,
    alone: bool = True,
    tau: float = 0.2,
    **options: object,
) -> Arguments:
    """Of a loss among rows: the arguments ``name``, ``partners``, if there are some, and ``labels``.

    There are four classes, and the first row is ``alone`` in a fifth.
    """

    def arguments(make: Make, cut: Cut) -> dict[str, object]:
        rows = make(cut(count), depth)
        found: dict[str, object] = {name: rows}
        if partners:
            found[partners] = make.similar(rows)
        if labels:
            of_row = torch.arange(len(rows), device=make.device) * 7 % 4
            of_row[:alone] = 4
            found["labels"] = of_row
        return found | _options(make, tau, options)

    return arguments


_features = functools.partial(_rows, "features")
_embeddings = functools.partial(_rows, "embeddings", partners="proxies")
_views = functools.partial(_rows, "z1", partners="z2", labels=False)
_block = functools.partial(_rows, "x", alone=False)  # the sum over no row is -inf


def _layers(
    *shapes: tuple[int, int, int], keys: bool = True, tau: float | None = None
) -> Arguments:
    """Of ``patch_nce``: (B, S, C) of each layer."""

    def arguments(make: Make, cut: Cut) -> dict[str, object]:
        queries = [make(batch, cut(patches), depth) for batch, patches, depth in shapes]
        of_keys = [make(*query.shape, grad=keys) for query in queries]
        return {"query_features": queries, "key_features": of_keys} | _options(make, tau, {})

    return arguments


def _maps(
    *shapes: tuple[int, int, int, int],
    patches: int,
    last: bool = False,
    repeated: bool = False,
    **options: object,
) -> Arguments:
    """Of ``sample_patches`` and ``tap_patches``: maps (B, C, H, W), channels ``last``."""

    def arguments(make: Make, cut: Cut) -> dict[str, object]:
        maps, ids = [], []
        for batch, channels, height, width in shapes:
            x = make(batch, channels, cut(height), width, grad=False)
            if last:
                x = x.contiguous(memory_format=torch.channels_last)
            positions = cut(height) * width
            drawn = torch.arange(min(patches, positions), device=make.device) * 37 % positions
            if repeated:
                drawn[::3] = drawn[0]
            maps.append(x.requires_grad_())
            ids.append(drawn)
        return {"features": maps, "patch_ids": ids} | options

    return arguments


def _two(rows: int, depth: int, columns: int = 0) -> Arguments:
    def arguments(make: Make, cut: Cut) -> dict[str, object]:
        found = {"x": make(cut(rows), depth), "y": make(cut(columns or rows), depth)}
        return found | _options(make, 0.5, {})

    return arguments


_ODD_MAPS = ((2, 33, 17, 13), (2, 130, 9, 8))
_SAMPLED = [
    Case("planes", "planes", _maps(*_ODD_MAPS, patches=64)),
    Case("planes", "repeated positions", _maps(*_ODD_MAPS, patches=64, repeated=True)),
    Case("planes", "normalised", _maps(*_ODD_MAPS, patches=64, normalize=True)),
    Case("channels last", "channels last", _maps(*_ODD_MAPS, patches=64, last=True)),
    Case(
        "channels last",
        "repeated, normalised",
        _maps(*_ODD_MAPS, patches=64, last=True, repeated=True, normalize=True),
    ),
]
_ODD_LAYERS = ((2, 33, 64), (2, 256, 256), (2, 1, 48))

# The first of a form is captured in a graph as well.
CASES: dict[str, list[Case]] = {
    "patch_nce": [
        Case("keys fixed", "uneven layers", _layers(*_ODD_LAYERS, keys=False)),
        Case("both gradients", "uneven layers", _layers(*_ODD_LAYERS, tau=0.1)),
    ],
    "sample_patches": _SAMPLED,
    "tap_patches": _SAMPLED,
    "info_nce": [
        Case("keys fixed", "queue of 20011", _pairs(77, 128, keys=False, queue=20011)),
        Case("keys fixed", "N = 1029", _pairs(1029, 128, keys=False)),
        Case("both gradients", "N = 2125", _pairs(2125, 128, temperature=0.07)),
        Case("both gradients", "unreduced", _pairs(515, 64, tau=0.1, reduction="none")),
        Case("both gradients", "D = 300", _pairs(515, 300)),
        Case("symmetric", "temperature 0.07", _pairs(1029, 128, symmetric=True, tau=0.07)),
        Case("symmetric", "temperature 0.01", _pairs(1029, 128, symmetric=True, tau=0.01)),
        Case("own negatives", "33 each", _pairs(65, 64, own=33, tau=0.1)),
    ],
    "sup_con": [
        Case("any", "N = 515", _features(515, 64)),
        Case("any", "half of the tiles", _features(4100, 256)),
        Case("any", "unreduced, D = 300", _features(259, 300, reduction="none")),
    ],
    "nt_xent": [
        Case("any", "N = 259", _views(259, 64)),
        Case("any", "unreduced, D = 300", _views(259, 300, reduction="none")),
    ],
    "conditional_contrastive": [
        Case("any", "N = 515", _embeddings(515, 64)),
        Case("any", "half of the tiles", _embeddings(4100, 256)),
        Case("any", "unreduced, D = 300", _embeddings(259, 300, reduction="none")),
    ],
    "pairwise_cosine_similarity": [
        Case("any", "77 x 1003", _two(77, 128, 1003)),
        Case("any", "D = 300", _two(259, 300, 77)),
    ],
    "labelled_lse": [
        Case("any", "N = 515", _block(515, 64)),
        Case("any", "D = 300", _block(259, 300)),
    ],
}

# The layers of CUT: one image, and 32.
_OF_CUT, _OF_32 = ((1, 256, 256),) * 5, ((32, 256, 256),) * 5
_LONG_LAYERS = ((2, 4096, 256),) * 5
_MAPS = {
    "small": ((1, 64, 64, 64),),
    "medium": ((1, 128, 128, 128), (1, 256, 64, 64)),
    "large": ((16, 128, 128, 128),),
}


# Rows N x D of each size.
_ROWS = {"small": (512, 128), "medium": (4096, 128), "large": (16384, 128), "deep": (4096, 512)}


def _each(form: str, arguments: Callable[..., Arguments], **options: object) -> list[Case]:
    return [Case(form, size, arguments(*rows, **options)) for size, rows in _ROWS.items()]


def _each_map(form: str, last: bool) -> list[Case]:
    return [
        Case(form, size, _maps(*shapes, patches=256, last=last)) for size, shapes in _MAPS.items()
    ]


RACES: dict[str, list[Case]] = {
    "patch_nce": [
        Case("keys fixed", "small", _layers(*_OF_CUT, keys=False)),
        Case("keys fixed", "medium", _layers(*_OF_32, keys=False)),
        Case("keys fixed", "large", _layers(*_LONG_LAYERS, keys=False)),
        Case("both gradients", "small", _layers(*_OF_CUT)),
        Case("both gradients", "medium", _layers(*_OF_32)),
        Case("both gradients", "large", _layers(*_LONG_LAYERS)),
    ],
    "sample_patches": [*_each_map("planes", last=False), *_each_map("channels last", last=True)],
    "info_nce": [
        *_each("keys fixed", _pairs, keys=False),
        *_each("both gradients", _pairs),
        *_each("symmetric", _pairs, symmetric=True),
        Case("own negatives", "small", _pairs(512, 128, own=256)),
        Case("own negatives", "medium", _pairs(2048, 256, own=1024)),
    ],
    "sup_con": _each("any", _features),
    "nt_xent": [
        Case("any", size, _views(count // 2, depth)) for size, (count, depth) in _ROWS.items()
    ],
    "conditional_contrastive": _each("any", _embeddings),
    "pairwise_cosine_similarity": _each("any", _two),
    "labelled_lse": _each("any", _block),
}
RACES["tap_patches"] = RACES["sample_patches"]


def forms(op: str) -> list[str]:
    """The forms of an op, in order."""
    return list(dict.fromkeys(case.form for case in CASES[op]))
