"""What the GPU kernels must reach, as data, and judging a run's results by it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

# What is compared of a case's providers.
SHARE = "share of cuBLAS"  # rate on the mandatory products / the rate of torch.mm in the same run
SPEED = "speed over"  # time of the fastest of the rivals / time of ours
SPEED_ABOVE = (
    "speed above the network over"  # the same of the times above what the case takes without the op
)
MEMORY = "memory over inputs"  # peak beyond the inputs, results and gradients included / bytes of the inputs
LEAST_TIME = "time over the least"  # time / (reading the inputs once + the mandatory products at cuBLAS's rate)

EAGER = ("eager", "published")
COMPILED = ("compile", "published, compiled")
NO_HARDWARE = "not measured on hardware"
ATTENTION = ("attention (flash)", "attention (cudnn)", "attention (efficient)")
FP8 = "triton, fp8 similarities"


@dataclasses.dataclass(frozen=True)
class Target:
    """One row: a figure of one provider in one case.

    Args:
        op: the op, and
        case: the name of the case in its module.
        quantity: ``SHARE``, ``SPEED``, ``SPEED_ABOVE``, ``MEMORY`` or ``LEAST_TIME``.
        bound: of the figure; the most for ``MEMORY`` and ``LEAST_TIME``, the least for the others.
        against: the rivals of a speed; the fastest of them counts.
        provider: whose figure it is.
        dtype: of the inputs.
    """

    op: str
    case: str
    quantity: str
    bound: float
    against: tuple[str, ...] = ()
    provider: str = "triton"
    dtype: str = "bfloat16"

    @property
    def at_most(self) -> bool:
        """Whether ``bound`` is the most that the figure may be."""
        return self.quantity in (MEMORY, LEAST_TIME)

    def __str__(self) -> str:
        rivals = f" {' / '.join(self.against)}" if self.against else ""
        word = "at most" if self.at_most else "at least"
        return f"{self.quantity}{rivals}: {word} {self.show(self.bound)}"

    def show(self, figure: float) -> str:
        """A figure in the target's unit."""
        return f"{figure:.0%}" if self.quantity == SHARE else f"{figure:.3g}x"


def _both_ways() -> list[Target]:
    found = []
    for depth, share in ((256, 0.40), (512, 0.52), (1024, 0.62)):
        case = f"two directions, both gradients, 65536 x {depth}"
        found += [
            Target("info_nce", case, SHARE, share),
            Target("info_nce", case, SPEED, 2, ("memeff",)),
            Target("info_nce", case, SPEED, 8, ("inf-cl",)),
            Target("info_nce", case, SPEED, 3, EAGER),
        ]
    # Where eager fits on every GPU.
    smaller = "two directions, both gradients, 32768 x 256"
    return [*found, Target("info_nce", smaller, SPEED, 3, EAGER)]


def _fixed_keys() -> list[Target]:
    found = []
    for depth in (256, 512):
        case = f"keys without gradient, 65536 x {depth}"
        found += [
            Target("info_nce", case, SHARE, 0.60),
            Target("info_nce", case, SPEED, 1.3, ATTENTION),
            Target("info_nce", case, SPEED, 1.3, ("triton",), provider=FP8),
        ]
    return found


_DRAWN = "CUT's 5 maps, 1 image, drawn positions"
_CUT = ("CUT, 1 image", "CUT, 16 images")
_2C = ("Tiny ImageNet, 1024 x 768", "large batch, 2048 x 1536")
_MATMUL = ("matmul + logsumexp, compiled", "compile")

TRITON: tuple[Target, ...] = (
    *_both_ways(),
    *_fixed_keys(),
    Target("info_nce", "two directions, both gradients, 262144 x 512", MEMORY, 4),
    *(Target("patch_nce", case, SPEED, 15, EAGER) for case in _CUT),
    *(Target("patch_nce", case, SPEED, 3, COMPILED) for case in _CUT),
    Target("sample_patches", "the same, forward alone", SPEED, 3, EAGER),
    Target("sample_patches", _DRAWN, SPEED, 6, EAGER),
    Target("sample_patches", "the same, inside a network", SPEED_ABOVE, 12, EAGER),
    *(Target("conditional_contrastive", case, SPEED, 100, ("published",)) for case in _2C),
    *(Target("conditional_contrastive", case, SPEED, 3, _MATMUL) for case in _2C),
    Target("info_nce", "MoCo, queue of 65536, 256 x 128", SPEED, 5, EAGER),
    Target("info_nce", "MoCo, queue of 65536, 256 x 128", LEAST_TIME, 2),
)

CUDA: tuple[Target, ...] = (
    Target("patch_nce", _CUT[0], SPEED, 1.3, ("triton",), provider="cuda"),
    Target("sample_patches", _DRAWN, SPEED, 1.3, ("triton",), provider="cuda"),
    *(
        Target(
            "info_nce",
            f"two directions, both gradients, 65536 x {depth}",
            SPEED,
            1.15,
            ("triton",),
            provider="cuda",
        )
        for depth in (128, 256, 512)
    ),
    *(
        Target("info_nce", f"keys without gradient, 65536 x {depth}", SHARE, 0.75, provider="cuda")
        for depth in (256, 512)
    ),
)

ALL = (*TRITON, *CUDA)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of one target: ``status`` is "met", "missed" or "not measured"; ``figure`` None and ``reason`` given where it was not."""

    target: Target
    status: str
    figure: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.figure is None:
            return self.reason if self.reason == NO_HARDWARE else f"not measured: {self.reason}"
        target = self.target
        return f"{self.status}: {target.show(self.figure)} of {target.show(target.bound)}"


def judge(
    targets: Iterable[Target],
    results: list[dict[str, Any]],
    rates: dict[str, float],
    bandwidth: float | None = None,
    reason: str = "the case was not run",
) -> list[Verdict]:
    """Holds a run against the targets.

    Args:
        targets: the rows.
        results: entries of :func:`benchmarks.harness.measure`.
        rates: GFLOP/s of torch.mm by dtype.
        bandwidth: GB/s of the device's memory, as measured.
        reason: why a case that is not among the results was not measured.
    """
    entries = {(entry["op"], entry["case"], entry["dtype"]): entry for entry in results}
    verdicts = []
    for target in targets:
        entry = entries.get((target.op, target.case, target.dtype))
        if entry is None or "not_run" in entry:
            why = reason if entry is None else entry["not_run"]
            verdicts.append(Verdict(target, "not measured", reason=why))
            continue
        figure = _figure(target, entry, rates, bandwidth)
        if isinstance(figure, str):
            verdicts.append(Verdict(target, "not measured", reason=figure))
        else:
            good = figure <= target.bound if target.at_most else figure >= target.bound
            verdicts.append(Verdict(target, "met" if good else "missed", figure))
    return verdicts


def _figure(
    target: Target, entry: dict[str, Any], rates: dict[str, float], bandwidth: float | None
) -> float | str:
    """The figure, or why there is none."""
    rows = {row["name"]: row for row in entry["providers"]}
    ours = rows.get(target.provider)
    if ours is None or not ours["seconds"]:
        return _why_not(target.provider, ours)
    seconds = ours["seconds"]["median"]
    if target.quantity == SHARE:
        return ours.get("share_of_matmul", "torch.mm's rate is missing")
    if target.quantity == MEMORY:
        if "peak_extra_bytes" not in ours:
            return ours.get("peak_extra_note", "peak memory is missing")
        return ours["peak_extra_bytes"] / entry["input_bytes"]
    if target.quantity == LEAST_TIME:
        if not bandwidth or target.dtype not in rates:
            return "the memory's bandwidth or torch.mm's rate is missing"
        least = entry["input_bytes"] / bandwidth + entry["flop"] / rates[target.dtype]
        return seconds / (least / 1e9)
    timed = [rows[name] for name in target.against if name in rows and rows[name]["seconds"]]
    if not timed:
        return "; ".join(_why_not(name, rows.get(name)) for name in target.against)
    if target.quantity == SPEED:
        return min(row["seconds"]["median"] for row in timed) / seconds
    if "seconds_above_alone" not in ours:
        return "the time without the op is missing"
    rival = min(row["seconds_above_alone"] for row in timed)
    above = ours["seconds_above_alone"]
    # What cannot be told from nothing is as quick as can be told.
    return rival / above if above > 0 else math.inf


def _why_not(name: str, row: dict[str, Any] | None) -> str:
    if row is None:
        return f"{name} did not take part"
    return f"{name}: {row['reason']}" if row["reason"] != "ok" else f"{name} was not timed"
