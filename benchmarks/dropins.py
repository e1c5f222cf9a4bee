"""The losses of other libraries against ours of the same names: ``python -m benchmarks dropins``, in the environment of
``make test-dropins``.

Loss and gradients in float32, theirs and ours in one process, in turns, after both have given the same. Memory is by how much the
resident memory of a process of its own rises in one call: results, gradients and what a loss keeps are in it.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine, memory, report
from benchmarks.timing import time_interleaved

SIDES = ("theirs", "ours")
# Relative, in the l2 norm, of the loss and of each gradient in float32.
_SAME = 1e-4
_MODULES = {
    "open_clip": "open_clip.loss",
    "lightly": "lightly.loss",
    "pytorch_metric_learning": "pytorch_metric_learning.losses",
    "sentence_transformers": "sentence_transformers.sentence_transformer.losses",
    "info_nce": "info_nce",
    "transformers": "transformers.models.clip.modeling_clip",
}
Loss = Callable[..., Tensor]


class Pair(NamedTuple):
    """A loss of a library.

    Args:
        library: as in ``fastnce.integrations``.
        loss: the name of the class.
        case: in words.
        rows: how many.
        make: (module, rows) -> the loss, and the tensors it is called with.
    """

    library: str
    loss: str
    case: str
    rows: int
    make: Callable[[types.ModuleType, int], tuple[Loss, list[Tensor]]]


def _rows(*shape: int, seed: int = 0, unit: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (F.normalize(x, dim=-1) if unit else x).requires_grad_()


def _pair_of(dim: int, n: int, unit: bool = False) -> list[Tensor]:
    return [_rows(n, dim, seed=seed, unit=unit) for seed in range(2)]


def _clip(name: str, *numbers: float) -> Callable:
    def make(module, n):
        given = [torch.tensor(x, requires_grad=True) for x in numbers]
        return getattr(module, name)(), [*_pair_of(512, n, unit=True), *given]

    return make


def _of_labels(name: str, classes_of: int) -> Callable:
    def make(module, n):
        labels = torch.arange(n) % (n // classes_of)
        loss = getattr(module, name)()
        return lambda x: loss(x, labels), [_rows(n, 128)]

    return make


def _bank(module, n):
    size = 256 * n
    loss, filled = module.NTXentLoss(0.2, (size, 128)), _rows(size, 128, seed=5, unit=True)
    if hasattr(loss.memory_bank, "queue"):
        loss.memory_bank.queue.copy_(filled.detach().T)
    else:
        loss.memory_bank.bank.copy_(filled.detach())
    return loss, _pair_of(128, n)


def _memory(module, n):
    loss = module.CrossBatchMemory(module.SupConLoss(), 128, 64 * n)
    labels = torch.arange(n) % (n // 4)
    for seed in range(64):
        with torch.no_grad():
            loss(_rows(n, 128, seed=2 + seed), labels + seed % 8)
    return lambda x: loss(x, labels), [_rows(n, 128)]


def _multiple_negatives(module, n):
    loss = module.MultipleNegativesRankingLoss(None)
    return lambda *x: loss.compute_loss_from_embeddings(list(x), None), _pair_of(768, n)


def _transformers_clip(module, n):
    scale = torch.tensor(2.66, requires_grad=True)
    tensors = [*_pair_of(512, n, unit=True), scale]
    if "fastnce" in module.__name__:

        def ours(text, image, scale):
            return module.clip_loss(types.SimpleNamespace(logit_scale=scale), text, image)

        return ours, tensors
    return lambda text, image, scale: module.image_text_contrastive_loss(
        text @ image.T * scale.exp()
    ), tensors


PAIRS = [
    Pair("open_clip", "ClipLoss", "4096 x 512", 4096, _clip("ClipLoss", 14.3)),
    Pair("open_clip", "SigLipLoss", "4096 x 512", 4096, _clip("SigLipLoss", 14.3, -10.0)),
    Pair(
        "lightly",
        "NTXentLoss",
        "two views of 2048 x 128",
        2048,
        lambda module, n: (module.NTXentLoss(0.5), _pair_of(128, n)),
    ),
    Pair("lightly", "NTXentLoss", "256 x 128, bank of 65536", 256, _bank),
    Pair(
        "lightly",
        "DCLLoss",
        "two views of 2048 x 128",
        2048,
        lambda module, n: (module.DCLLoss(), _pair_of(128, n)),
    ),
    Pair(
        "pytorch_metric_learning",
        "NTXentLoss",
        "512 x 128, 4 per class",
        512,
        _of_labels("NTXentLoss", 4),
    ),
    Pair(
        "pytorch_metric_learning",
        "SupConLoss",
        "4096 x 128, 4 per class",
        4096,
        _of_labels("SupConLoss", 4),
    ),
    Pair(
        "pytorch_metric_learning",
        "CrossBatchMemory",
        "SupConLoss, 256 x 128, memory of 16384",
        256,
        _memory,
    ),
    Pair(
        "sentence_transformers",
        "MultipleNegativesRankingLoss",
        "4096 pairs, 768",
        4096,
        _multiple_negatives,
    ),
    Pair(
        "info_nce",
        "InfoNCE",
        "4096 x 128",
        4096,
        lambda module, n: (module.InfoNCE(), _pair_of(128, n)),
    ),
    Pair("transformers", "CLIPModel's loss", "4096 x 512", 4096, _transformers_clip),
]


def call(pair: Pair, side: str, rows: int) -> Callable[[], list[Tensor]]:
    """Loss and gradients of one side.

    Raises:
        ImportError: the library is not there.
    """
    from tests.integrations.against import imported  # which knows how torchvision is imported here

    if side == "ours":
        module = importlib.import_module(f"fastnce.integrations.{pair.library}")
    else:
        module = imported(_MODULES[pair.library])
    loss, tensors = pair.make(module, rows)

    def run() -> list[Tensor]:
        value = loss(*tensors)
        return [value.detach(), *torch.autograd.grad(value, tensors)]

    return run


def check(pair: Pair, rows: int) -> None:
    """Both give the same.

    Raises:
        RuntimeError: they do not.
    """
    theirs, ours = (call(pair, side, rows)() for side in SIDES)
    for x, y in zip(ours, theirs, strict=True):
        if not (x - y).norm() <= _SAME * y.norm():
            raise RuntimeError(
                f"{pair.library} {pair.loss}, {pair.case}: not the same, {x.norm()} and {y.norm()}"
            )


def peak_bytes(pair: Pair, side: str) -> int:
    """By how much one call makes the memory of a process of its own rise."""
    index = PAIRS.index(pair)
    return machine.in_fresh_process(os.environ | memory.GLIBC, _own_peak, index, side)


def _own_peak(index: int, side: str) -> int:
    pair = PAIRS[index]
    call(pair, side, 64)()  # loads the code
    run = call(pair, side, pair.rows)
    before = memory.reset_peak()
    kept = run()
    return memory.status_bytes("VmHWM") - before + 0 * len(kept)


def main(out: Path | None, only: Sequence[str] | None, seconds: float) -> int:
    """Measures, and writes ``<device>-dropins.json`` and ``.md``; ``only`` libraries or losses that have one of these in them."""
    facts, rows, found = machine.describe(torch.device("cpu")), [], []
    names = {pair: f"{pair.library} {pair.loss}" for pair in PAIRS}
    chosen = [x for x in PAIRS if not only or any(text in names[x] for text in only)]
    if not chosen:
        there = "; ".join(dict.fromkeys(names.values()))
        print(f"benchmarks: --only {' '.join(only)}: no loss. There are: {there}", file=sys.stderr)
        return 2
    for pair in chosen:
        try:
            check(pair, pair.rows)
        except ImportError as error:
            there = "make test-dropins makes out/dropins-venv, whose python has them all"
            print(f"benchmarks: {pair.library}: {error}; {there}", file=sys.stderr)
            return 2
        calls = {side: call(pair, side, pair.rows) for side in SIDES}
        times = time_interleaved(calls, seconds, torch.device("cpu"))
        peaks = {side: peak_bytes(pair, side) for side in SIDES}
        theirs, ours = (times[side]["median"] for side in SIDES)
        found.append(
            {"library": pair.library, "loss": pair.loss, "case": pair.case, "seconds": times}
            | {"peak_bytes": peaks}
        )
        rows.append(
            {
                "library": pair.library,
                "loss": f"`{pair.loss}`",
                "case": pair.case,
                "theirs": report.duration(theirs),
                "ours": report.duration(ours),
                "ratio": f"{theirs / ours:.{0 if theirs > 100 * ours else 1}f}x",
                "memory, theirs / ours": f"{peaks['theirs'] / 1e6:,.0f} / {peaks['ours'] / 1e6:,.0f} MB",
            }
        )
    text = f"""\
# Losses of other libraries on {facts["device"]}

Loss and gradients in float32, {facts["threads"]} threads, torch {facts["torch"]}: medians of calls in turns. Commit {facts["commit"]}.
Memory: by how much one call makes a process rise.

{report.table_of(rows)}
"""
    report.publish(out, "dropins", facts, {"results": found}, text)
    return 0
