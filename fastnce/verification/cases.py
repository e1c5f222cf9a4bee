"""What ``fastnce verify`` asks of a kernel: the cases in which it has to be right, and the races that it has to win."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastnce.registry import Make

# In the order of what a training is likely to have.
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
# (What makes rows, what cuts numbers of rows down for tests on a CPU) -> the op's arguments.
Cut = Callable[[int], int]
Arguments = Callable[[Make, Cut], dict[str, object]]
# By op, form, and what is special about a case, or the size of a race.
Calls = dict[str, dict[str, dict[str, Arguments]]]


class QuickMake(Make):
    """Makes large samples on their device, where nobody compares numbers between devices."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device) -> None:
        super().__init__(dtype, str(device), torch.Generator())

    def __call__(self, *shape: int, grad: bool = True) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device).requires_grad_(grad)

    def similar(self, x: Tensor) -> Tensor:
        return (0.8 * x.detach() + 0.6 * torch.randn_like(x)).requires_grad_()


def _later(function: Callable[..., dict[str, object]]) -> Callable[..., Arguments]:
    """The function without its ``make`` and ``cut``, which are given to what it returns."""

    def options(*given: Any, **named: Any) -> Arguments:
        return lambda make, cut: function(make, cut, *given, **named)

    return options


def _temperature(make: Make, value: float | None) -> dict[str, object]:
    """One that gets its gradient."""
    if value is None:
        return {}
    return {"temperature": torch.tensor(value, device=make.device, requires_grad=True)}


@_later
def _pairs(
    make: Make,
    cut: Cut,
    count: int,
    depth: int,
    *,
    keys: bool = True,
    negatives: tuple[int, ...] = (),
    tau: float | None = None,
    **options: object,
) -> dict[str, object]:
    """Of ``info_nce``.

    Keys are not like their queries: where positives dominate, gradients are near zero, and no error of theirs would be seen.
    """
    found = {"query": make(cut(count), depth), "positive_key": make(cut(count), depth, grad=keys)}
    if negatives:
        found["negative_keys"] = make(*map(cut, negatives), depth, grad=keys)
    return found | _temperature(make, tau) | options


@_later
def _rows(
    make: Make,
    cut: Cut,
    name: str,
    partners: str,
    count: int,
    depth: int,
    *,
    labels: bool = True,
    alone: bool = True,
    **options: object,
) -> dict[str, object]:
    """Of a loss among rows: the arguments ``name``, ``partners``, if there are some, and ``labels``.

    There are four classes, and the first row is ``alone`` in a fifth.
    """
    rows = make(cut(count), depth)
    found = {name: rows}
    if partners:
        found[partners] = make.similar(rows)
    if labels:
        found["labels"] = torch.arange(len(rows), device=make.device) * 7 % 4
        found["labels"][:alone] = 4
    return found | _temperature(make, 0.2) | options


@_later
def _masked(
    make: Make, cut: Cut, count: int, depth: int, negatives: tuple[int, ...] = (), **options: object
) -> dict[str, object]:
    """Of ``masked_info_nce``: four queries in a row have the same id; the first has nothing left but the others' keys."""
    found = _pairs(count, depth, negatives=negatives, **options)(make, cut)
    ids = torch.arange(cut(count), device=make.device) // 4
    found["query_ids"] = ids
    if negatives:
        shape = tuple(map(cut, negatives))
        others = torch.arange(math.prod(shape), device=make.device).view(shape)
        found |= {"negative_ids": others % (len(ids) // 4 + 2), "negative_mask": others % 5 > 0}
    return found


@_later
def _classified(
    make: Make,
    cut: Cut,
    count: int,
    depth: int,
    columns: int = 0,
    *,
    labels: bool = False,
    masked: bool = False,
    **options: object,
) -> dict[str, object]:
    """Of ``sigmoid_contrastive``, whose scale and bias get their gradients."""
    rows = make(cut(count), depth), make(cut(columns or count), depth)
    found: dict[str, object] = dict(zip(("query", "key"), rows, strict=True))
    for name, value in (("scale", 5.0), ("bias", -1.0)):
        found[name] = torch.tensor(value, device=make.device, requires_grad=True)
    numbers = [torch.arange(len(x), device=make.device) for x in rows]
    if labels:
        found |= {"query_labels": numbers[0] % 7, "key_labels": numbers[1] * 3 % 7}
    if masked:
        found |= {"query_ids": numbers[0] // 4, "key_ids": numbers[1] // 4}
        found["key_mask"] = numbers[1] % 5 > 0
    return found | options


_features = functools.partial(_rows, "features", "")
_embeddings = functools.partial(_rows, "embeddings", "proxies")
_views = functools.partial(_rows, "z1", "z2", labels=False)
_block = functools.partial(_rows, "x", "", alone=False)  # the sum over no row is -inf


@_later
def _two(make: Make, cut: Cut, rows: int, depth: int, columns: int = 0) -> dict[str, object]:
    found = {"x": make(cut(rows), depth), "y": make(cut(columns or rows), depth)}
    return found | _temperature(make, 0.5)


@_later
def _layers(
    make: Make,
    cut: Cut,
    *shapes: tuple[int, int, int],
    keys: bool = True,
    tau: float | None = None,
    **options: object,
) -> dict[str, object]:
    """Of ``patch_nce``: (B, S, C) of each layer."""
    queries = [make(batch, cut(patches), depth) for batch, patches, depth in shapes]
    of_keys = [make(*query.shape, grad=keys) for query in queries]
    found = {"query_features": queries, "key_features": of_keys}
    return found | _temperature(make, tau) | options


@_later
def _maps(
    make: Make,
    cut: Cut,
    *shapes: tuple[int, int, int, int],
    patches: int = 256,
    last: bool = False,
    repeated: bool = False,
    **options: object,
) -> dict[str, object]:
    """Of ``sample_patches`` and ``tap_patches``: maps (B, C, H, W), channels ``last``."""
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


_ODD_MAPS = ((2, 33, 17, 13), (2, 130, 9, 8))
_ODD_LAYERS = ((2, 33, 64), (2, 256, 256), (2, 1, 48))
_BOTH = {"symmetric": True, "query_negatives": True}
_SAMPLED = {
    "planes": {
        "planes": _maps(*_ODD_MAPS, patches=64),
        "repeated positions": _maps(*_ODD_MAPS, patches=64, repeated=True),
        "normalised": _maps(*_ODD_MAPS, patches=64, normalize=True),
    },
    "channels last": {
        "channels last": _maps(*_ODD_MAPS, patches=64, last=True),
        "repeated, normalised": _maps(
            *_ODD_MAPS, patches=64, last=True, repeated=True, normalize=True
        ),
    },
}

# The first of a form is captured in a graph as well.
CASES: Calls = {
    "patch_nce": {
        "keys fixed": {"uneven layers": _layers(*_ODD_LAYERS, keys=False)},
        "both gradients": {"uneven layers": _layers(*_ODD_LAYERS, tau=0.1)},
        "query negatives": {
            "both gradients": _layers(*_ODD_LAYERS, tau=0.1, query_negatives=True),
            "keys fixed": _layers(*_ODD_LAYERS, keys=False, query_negatives=True),
        },
        "symmetric": {
            "both gradients": _layers(*_ODD_LAYERS, tau=0.1, symmetric=True),
            "keys detached": _layers(*_ODD_LAYERS, symmetric=True, detach_keys=True),
        },
        "symmetric, query negatives": {
            "both gradients": _layers(*_ODD_LAYERS, tau=0.1, **_BOTH),
            "keys detached": _layers(*_ODD_LAYERS, tau=0.1, **_BOTH, detach_keys=True),
        },
    },
    "sample_patches": _SAMPLED,
    "tap_patches": _SAMPLED,
    "info_nce": {
        "keys fixed": {
            "queue of 20011": _pairs(77, 128, keys=False, negatives=(20011,)),
            "N = 1029": _pairs(1029, 128, keys=False),
        },
        "both gradients": {
            "N = 2125": _pairs(2125, 128, temperature=0.07),
            "unreduced": _pairs(515, 64, tau=0.1, reduction="none"),
            "D = 300": _pairs(515, 300),
        },
        "symmetric": {
            "temperature 0.07": _pairs(1029, 128, symmetric=True, tau=0.07),
            "temperature 0.01": _pairs(1029, 128, symmetric=True, tau=0.01),
        },
        "own negatives": {"33 each": _pairs(65, 64, negatives=(65, 33), tau=0.1)},
    },
    "masked_info_nce": {
        "any": {
            "N = 515": _masked(515, 64, tau=0.1),
            "queue, decoupled": _masked(259, 128, (1003,), tau=0.1, decoupled=True),
            "symmetric, D = 300": _masked(259, 300, tau=0.1, symmetric=True, reduction="none"),
        },
        "own negatives": {"33 each": _masked(65, 64, (65, 33), tau=0.1)},
    },
    "sigmoid_contrastive": {
        "any": {
            "N = 515": _classified(515, 64),
            "labels, 77 x 1003": _classified(77, 128, 1003, labels=True, masked=True),
            "unreduced, D = 300": _classified(259, 300, masked=True, reduction="none"),
        },
    },
    "sup_con": {
        "any": {
            "N = 515": _features(515, 64),
            "half of the tiles": _features(4100, 256),
            "unreduced, D = 300": _features(259, 300, reduction="none"),
        },
    },
    "nt_xent": {
        "any": {
            "N = 259": _views(259, 64),
            "unreduced, D = 300": _views(259, 300, reduction="none"),
        },
    },
    "conditional_contrastive": {
        "any": {
            "N = 515": _embeddings(515, 64),
            "half of the tiles": _embeddings(4100, 256),
            "unreduced, D = 300": _embeddings(259, 300, reduction="none"),
        },
    },
    "pairwise_cosine_similarity": {
        "any": {"77 x 1003": _two(77, 128, 1003), "D = 300": _two(259, 300, 77)},
    },
    "labelled_lse": {"any": {"N = 515": _block(515, 64), "D = 300": _block(259, 300)}},
}

# Of each size: rows N x D, the layers of CUT for one image and for 32 and longer ones, and maps.
_ROWS = {"small": (512, 128), "medium": (4096, 128), "large": (16384, 128), "deep": (4096, 512)}
_VIEWS = {size: (count // 2, depth) for size, (count, depth) in _ROWS.items()}
_LAYERS = {
    "small": ((1, 256, 256),) * 5,
    "medium": ((32, 256, 256),) * 5,
    "large": ((2, 4096, 256),) * 5,
}
_MAPS = {
    "small": ((1, 64, 64, 64),),
    "medium": ((1, 128, 128, 128), (1, 256, 64, 64)),
    "large": ((16, 128, 128, 128),),
}


def _races(
    arguments: Callable[..., Arguments], sizes: Mapping[str, tuple], **options: object
) -> dict[str, Arguments]:
    return {size: arguments(*given, **options) for size, given in sizes.items()}


RACES: Calls = {
    "patch_nce": {
        "keys fixed": _races(_layers, _LAYERS, keys=False),
        "both gradients": _races(_layers, _LAYERS),
        "query negatives": _races(_layers, _LAYERS, keys=False, query_negatives=True),
        "symmetric": _races(_layers, _LAYERS, symmetric=True),
        "symmetric, query negatives": _races(_layers, _LAYERS, **_BOTH, detach_keys=True),
    },
    "sample_patches": {
        "planes": _races(_maps, _MAPS),
        "channels last": _races(_maps, _MAPS, last=True),
    },
    "info_nce": {
        "keys fixed": _races(_pairs, _ROWS, keys=False),
        "both gradients": _races(_pairs, _ROWS),
        "symmetric": _races(_pairs, _ROWS, symmetric=True),
        "own negatives": {
            "small": _pairs(512, 128, negatives=(512, 256)),
            "medium": _pairs(2048, 256, negatives=(2048, 1024)),
        },
    },
    "masked_info_nce": {
        "any": _races(_masked, _ROWS),
        "own negatives": {
            "small": _masked(512, 128, (512, 256)),
            "medium": _masked(2048, 256, (2048, 1024)),
        },
    },
    "sigmoid_contrastive": {"any": _races(_classified, _ROWS)},
    "sup_con": {"any": _races(_features, _ROWS)},
    "nt_xent": {"any": _races(_views, _VIEWS)},
    "conditional_contrastive": {"any": _races(_embeddings, _ROWS)},
    "pairwise_cosine_similarity": {"any": _races(_two, _ROWS)},
    "labelled_lse": {"any": _races(_block, _ROWS)},
}
RACES["tap_patches"] = RACES["sample_patches"]
