"""What was found, for people: a report that can be attached to a bug report, and the lines of ``fastnce doctor``."""

from __future__ import annotations

import platform

import torch

import fastnce
from fastnce import backends
from fastnce.backends import verdicts
from fastnce.backends.verdicts import SIZES, Entry
from fastnce.verification.cases import CASES, DTYPES


def runs(name: str, place: torch.device) -> str:
    """``"ok"``, or why a backend runs nothing there; the GPUs of one machine may differ."""
    reasons = [backends.supports(name, op, place, dtype) for op in CASES for dtype in DTYPES]
    return "ok" if "ok" in reasons else reasons[0]


def told(entry: Entry) -> str:
    """One form in a few words: "right, small 1.84, medium 0.97 times as fast"."""
    if entry.status != verdicts.RIGHT:
        return f"{entry.status}: {entry.reason}"
    speeds = ", ".join(
        f"{size} {x if isinstance(x, str) else f'{x:.2f}'}" for size, x in entry.speed.items()
    )
    return f"right; {speeds} times as fast" if speeds else "right"


def text(place: torch.device) -> str:
    """The machine, the versions, and a table for each backend, in Markdown."""
    gpu, driver = verdicts.machine(place)
    lines = [
        f"# fastnce verify: {gpu}",
        "",
        f"fastnce {fastnce.__version__}, torch {torch.__version__}, driver {driver or 'unknown'}, "
        f"Python {platform.python_version()}, {platform.platform()}",
        "",
        "Errors are shares of what the numerical contract allows. Speeds are relative to plain PyTorch: a backend is chosen from "
        f"{verdicts.LEAST_SPEED} on, the faster of two.",
    ]
    for name in verdicts.EARNING:
        reason = runs(name, place)
        lines += ["", f"## {name}", ""]
        lines += _table(name, place) if reason == "ok" else [f"It cannot run here: {reason}"]
    return "\n".join(lines) + "\n"


def _table(name: str, place: torch.device) -> list[str]:
    key = verdicts.key_of(name, place)
    verdict = verdicts.of(name, place)
    if verdict is None:
        return ["Not verified."]
    lines = [
        f"Triton {key.triton}, kernels {key.kernels}" if key.triton else f"Kernels {key.kernels}",
        "",
        f"| op | dtype | form | found | largest error | {' | '.join(SIZES)} |",
        f"|---|---|---|---|---|{'---|' * len(SIZES)}",
    ]
    for (op, dtype, form), entry in verdict.items():
        found = entry.status
        if found != verdicts.RIGHT:
            found += f": {entry.reason}".replace("|", "\\|").replace("\n", " ")
        error = f"{max(entry.errors.values()):.2f}" if entry.errors else ""
        speeds = [entry.speed.get(size, "") for size in SIZES]
        told = [x if isinstance(x, str) else f"{x:.2f}" for x in speeds]
        lines.append(f"| {op} | {dtype} | {form} | {found} | {error} | {' | '.join(told)} |")
    return lines


def choices(place: torch.device) -> list[str]:
    """What is chosen on a device, and why not something else: one line for each op, dtype and form with a verdict."""
    names = tuple(name for name in verdicts.EARNING if runs(name, place) == "ok")
    if not names:
        return ["blocks: neither of the GPU's own backends can run, see above"]
    found = {name: verdicts.of(name, place) for name in names}
    if not any(found.values()):
        return ["blocks: the GPU's own backends are not verified here. Run: fastnce verify"]
    lines = []
    for op, dtype, form in dict.fromkeys(
        task for verdict in found.values() for task in verdict or {}
    ):
        told: dict[str, list[str]] = {}
        raced = {
            s
            for verdict in found.values()
            if verdict
            for s in verdict.get((op, dtype, form), Entry()).speed
        }
        for size in [size for size in SIZES if size in raced] or ["small"]:
            chosen, why = verdicts.fastest(names, op, place, getattr(torch, dtype), form, size)
            because = f" ({'; '.join(why)})" if why else ""
            told.setdefault(f"{chosen or 'blocks'}{because}", []).append(size if raced else "")
        shown = "; ".join(f"{' and '.join(sizes)} {what}".strip() for what, sizes in told.items())
        lines.append(f"{op} {dtype}, {form}: {shown}")
    return lines
