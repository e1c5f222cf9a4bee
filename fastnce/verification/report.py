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
    """One form in a few words: "right; small 1.84, medium 0.97 times as fast"."""
    speeds = ", ".join(f"{size} {_shown(speed)}" for size, speed in entry.speed.items())
    return f"{entry}; {speeds} times as fast" if speeds else str(entry)


def _shown(speed: float | str) -> str:
    return speed if isinstance(speed, str) else f"{speed:.2f}"


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
        found = str(entry).replace("|", "\\|").replace("\n", " ")
        error = f"{max(entry.errors.values()):.2f}" if entry.errors else ""
        speeds = " | ".join(_shown(entry.speed.get(size, "")) for size in SIZES)
        lines.append(f"| {op} | {dtype} | {form} | {found} | {error} | {speeds} |")
    return lines


def choices(place: torch.device) -> list[str]:
    """What is chosen on a device, and why not something else: one line for each op, dtype and form with a verdict."""
    names = tuple(name for name in verdicts.EARNING if runs(name, place) == "ok")
    if not names:
        return ["blocks: neither of the GPU's own backends can run, see above"]
    found = [verdict for name in names if (verdict := verdicts.of(name, place))]
    if not found:
        return ["blocks: the GPU's own backends are not verified here. Run: fastnce verify"]
    lines = []
    for task in dict.fromkeys(task for verdict in found for task in verdict):
        op, dtype, form = task
        raced = {size for verdict in found if task in verdict for size in verdict[task].speed}
        told: dict[str, list[str]] = {}
        for size in [size for size in SIZES if size in raced] or ["small"]:
            chosen, why = verdicts.fastest(names, op, place, getattr(torch, dtype), form, size)
            because = f" ({'; '.join(why)})" if why else ""
            told.setdefault(f"{chosen or 'blocks'}{because}", []).append(size if raced else "")
        shown = "; ".join(f"{' and '.join(sizes)} {what}".strip() for what, sizes in told.items())
        lines.append(f"{op} {dtype}, {form}: {shown}")
    return lines
