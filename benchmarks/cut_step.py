"""One training step of CUT against the published step in plain eager PyTorch: ``python -m benchmarks.cut_step``.

256 x 256, batch 1, the published CUT (9 blocks, 64 channels, identity loss), both in the same process, in turns. Before any
timing both are checked on a smaller image. In float64 all gradients agree to 1e-4. In float32 ours are at most three times as far
from those as the eager step's, for Winograd's convolutions round a little more. Memory is the most that a process of its own
needs: networks, Adam, and two steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import machine, memory, report
from benchmarks.published_cut import PublishedCUT
from benchmarks.timing import in_turns, seconds_of
from fastnce.models import CUT, CUTConfig

PROVIDERS = ("eager fp32", "fastnce fp32", "fastnce bf16")
_CHECK_SIZE = 64
# Multiply-adds of a step on two 256 x 256 images, in 1e9: as published, and without the second pass for the keys.
_GMAC = {"eager": 711.6, "fastnce": 642.7}
_GROUPS = {
    "3x3 convolutions (Winograd)": ("fastnce::conv3x3",),
    "other convolutions (oneDNN)": ("aten::mkldnn_convolution", "aten::convolution_backward"),
    "instance norm, ReLU, sums": ("fastnce::instance_norm",),
    "blurs": ("fastnce::blur_resample",),
    "patches and contrastive loss": ("fastnce::sample_patches", "fastnce::patch_nce"),
    "Adam": ("aten::_fused_adam_",),
}


def _ours(size: int, precision: str = "fp32") -> CUT:
    # PyTorch's own initialisation: with the published one, patches are so short that the published 1e-7 in their norm shows.
    torch.manual_seed(0)
    return CUT(CUTConfig(init_gain=None, precision=precision), (size, size))


def _published(model: CUT) -> PublishedCUT:
    """With the same weights."""
    published = PublishedCUT()
    for one, other in _pairs(model, published):
        other.load_state_dict(one.state_dict())
    return published


def _pairs(model: CUT, published: PublishedCUT) -> list[tuple[nn.Module, nn.Module]]:
    ours = model.generator, model.discriminator, model.projector
    return list(zip(ours, (published.g, published.d, published.f), strict=True))


def _batch(size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(1, 3, size, size, generator=generator) * 2 - 1 for name in "AB"}


def _patch_ids(size: int) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    sides = (size + 6, size, size // 2, size // 4, size // 4)
    return {
        name: [torch.randperm(side**2, generator=generator)[:256] for side in sides]
        for name in ("NCE", "NCE_Y")
    }


def check() -> dict[str, float]:
    """Relative differences of losses and of G's, D's and F's gradients after one step at 64 x 64.

    Returns:
        the largest of: "float64", ours from the eager step's; "eager fp32" and "fastnce fp32", from the eager float64 step's.

    Raises:
        RuntimeError: they are not the same step.
    """
    results = {}
    for dtype in (torch.float64, torch.float32):
        ours = _ours(_CHECK_SIZE)
        published = _published(ours)
        for network in (ours, published.g, published.d, published.f):
            network.to(dtype)
        for name, step, networks in (
            ("eager", published.training_step, (published.g, published.d, published.f)),
            ("fastnce", ours.training_step, [one for one, _ in _pairs(ours, published)]),
        ):
            batch = {key: image.to(dtype) for key, image in _batch(_CHECK_SIZE).items()}
            losses = step(batch, patch_ids=_patch_ids(_CHECK_SIZE))
            gradients = [
                torch.cat([p.grad.double().flatten() for p in network.parameters()])
                for network in networks
            ]
            values = torch.stack([losses[key].double() for key in sorted(losses)])
            results[name, dtype] = [values, *gradients]
    truth = results["eager", torch.float64]
    found = {
        "float64": _difference(results["fastnce", torch.float64], truth),
        "eager fp32": _difference(results["eager", torch.float32], truth),
        "fastnce fp32": _difference(results["fastnce", torch.float32], truth),
    }
    if not (found["float64"] < 1e-4 and found["fastnce fp32"] < 3 * found["eager fp32"]):
        raise RuntimeError(f"cut_step: not the same step, relative differences {found}")
    return found


def _difference(got: list[Tensor], truth: list[Tensor]) -> float:
    pairs = zip(got, truth, strict=True)
    return max(((one - other).norm() / other.norm()).item() for one, other in pairs)


def make(provider: str, size: int) -> Callable[[], object]:
    """One step of `provider` on the same images each time."""
    kind, precision = provider.split()
    model = _ours(size, precision)
    step = _published(model).training_step if kind == "eager" else model.training_step
    batch = _batch(size)
    return lambda: step(batch)


def time_steps(size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, the providers in turns, after one step each that is not counted."""
    steps = {provider: make(provider, size) for provider in PROVIDERS}
    found = in_turns(steps, rounds + 1, {}, torch.device("cpu"))
    return {provider: seconds[1:] for provider, seconds in found.items()}


def breakdown(provider: str, size: int) -> dict[str, float]:
    """Seconds of one profiled step by group of operators; "other" is the rest of the step."""
    step = make(provider, size)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        (total,) = seconds_of(step, 1, torch.device("cpu"))
    events = profile.key_averages()
    found = {
        group: sum(e.self_cpu_time_total for e in events if e.key.startswith(names)) / 1e6
        for group, names in _GROUPS.items()
    }
    return {**found, "other": total - sum(found.values())}


def peak_bytes(provider: str, size: int) -> int:
    """By how much the resident memory of a process of its own rises: networks, Adam and two steps."""
    return machine.in_fresh_process(os.environ | memory.GLIBC, _own_peak, provider, size)


def _own_peak(provider: str, size: int) -> int:
    make(provider, _CHECK_SIZE)()  # loads the code
    before = memory.reset_peak()
    step = make(provider, size)
    step()
    step()
    return memory.status_bytes("VmHWM") - before


def markdown(facts: Mapping, results: Mapping) -> str:
    """The report."""
    size, found, times = results["size"], results["check"], results["seconds"]
    eager, eager_peak = statistics.median(times["eager fp32"]), results["peak_bytes"]["eager fp32"]
    steps = []
    for provider, seconds in times.items():
        median, peak = statistics.median(seconds), results["peak_bytes"][provider]
        step = {
            "step": provider,
            "seconds": f"{median:.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
            "eager / this": f"{eager / median:.2f}",
            "GMAC/s of the published step": f"{_GMAC['eager'] / median * (size / 256) ** 2:.0f}",
            "peak memory, MB": f"{peak / 1e6:.0f}",
            "share of eager's": f"{peak / eager_peak:.2f}",
        }
        steps.append(step)
    shares = [
        (group, *(f"{of[group]:.2f}" for of in results["breakdown"].values()))
        for group in (*_GROUPS, "other")
    ]
    return f"""\
# A training step of CUT on {facts["device"]}

{size} x {size}, batch 1, {facts["threads"]} threads, median of {len(seconds)} steps in turns (smallest to largest).

{report.table_of(steps)}

Where the time of a profiled step goes, seconds:

{report.table(("", *results["breakdown"]), shares)}

Largest relative difference of a loss or a network's gradient at {_CHECK_SIZE} x {_CHECK_SIZE}: ours in float64 from the eager
step's {found["float64"]:.0e}; in float32 from float64, eager {found["eager fp32"]:.0e}, ours {found["fastnce fp32"]:.0e}. The
published step has {_GMAC["eager"]} GMAC, ours {_GMAC["fastnce"]}, before Winograd's saving of 4 in the 3x3 convolutions.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cut_step", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, help="folder for the JSON and the table")
    parser.add_argument("--size", type=int, default=256, help="height and width (default 256)")
    parser.add_argument("--rounds", type=int, default=5, help="steps timed of each (default 5)")
    args = parser.parse_args(argv)
    facts = machine.describe(torch.device("cpu"))
    results = {"size": args.size, "check": check()}
    results["seconds"] = time_steps(args.size, args.rounds)
    results["breakdown"] = {p: breakdown(p, args.size) for p in PROVIDERS}
    results["peak_bytes"] = {p: peak_bytes(p, args.size) for p in PROVIDERS}
    report.publish(args.out, "cut_step", facts, results, markdown(facts, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
