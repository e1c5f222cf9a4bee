"""A first step waits for the compilation of the Triton kernels: how long. ``python -m benchmarks cold_start``.

Without a GPU: the CPU time in which Triton, LLVM and ptxas compile, for each generation of GPUs, what a training step launches.
Kernels compile one after another, on one core; Triton keeps them on disk, so that later processes wait for none of it. On a GPU
besides: the first call of a step against the second, in a process with an empty cache and in one that finds it filled.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from benchmarks import machine, report
from benchmarks.timing import seconds_of

TARGETS = (80, 90, 100)
# (channels, size) of the five maps that CUT takes patches from at 256 x 256.
_MAPS = ((3, 262), (128, 256), (256, 128), (256, 64), (256, 64))


def _info_nce(device: torch.device) -> None:
    """A symmetric InfoNCE with its gradients, 1024 x 512 in bf16, the temperature trained."""
    from fastnce import triton_kernels

    query, key = torch.zeros(2, 1, 1024, 512, dtype=torch.bfloat16, device=device)
    triton_kernels.info_nce_forward(
        query,
        key,
        None,
        torch.ones((), device=device),
        normalize=True,
        symmetric=True,
        in_batch=True,
        self_logit=None,
        grad_scale=1 / 1024,
        needs=(True, True, False, True),
    )


def _cut(device: torch.device) -> None:
    """A CUT step, batch 1 in fp32: patches of the five maps, tapped and not, and PatchNCE with detached keys."""
    from fastnce import triton_kernels

    maps = [torch.zeros(1, c, n, n, device=device) for c, n in _MAPS]
    ids = [torch.arange(256, device=device)] * len(maps)
    patches, norms = triton_kernels.sample_patches_forward(maps, ids, False)
    triton_kernels.sample_patches_add_(maps, patches, patches, norms, ids, False)
    layers = [torch.zeros(1, 256, 256, device=device) for _ in maps]
    ones, unwanted = [1.0] * len(layers), [False] * len(layers)
    triton_kernels.patch_nce_forward(
        layers,
        layers,
        0.07,
        self_logit=-10.0,
        loss_scales=ones,
        grad_scales=ones,
        needs=([True] * len(layers), unwanted, False),
    )


STEPS: dict[str, Callable[[torch.device], None]] = {"info_nce": _info_nce, "CUT": _cut}


def _cpu_seconds() -> float:
    """CPU time of this process and of those that it has waited for: ptxas is one."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(x.ru_utime + x.ru_stime for x in used)


def compile_seconds(step: str, capability: int) -> dict[str, float]:
    """CPU seconds to compile each kernel of a step, each form of one counted, with an empty cache."""
    from benchmarks.launches import as_on, build, recorded

    with as_on(capability), recorded() as found:
        STEPS[step](torch.device("meta"))
    seconds: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory() as empty,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=empty),
    ):
        for each in dict.fromkeys(found):
            start = _cpu_seconds()
            build(each, capability)
            name = each.name.strip("_").removesuffix("_kernel")
            while name in seconds:
                name += "'"
            seconds[name] = _cpu_seconds() - start
    return seconds


def _calls() -> dict[str, list[float]]:
    """Seconds of the first two calls of each step on the GPU, in processes with an empty and a filled cache."""
    found = {}
    for step in STEPS:
        with tempfile.TemporaryDirectory() as cache:
            for state in ("empty", "filled"):
                environment = {**os.environ, "TRITON_CACHE_DIR": cache}
                times = machine.in_fresh_process(environment, _two_calls, step)
                found[f"{step}, cache {state}"] = times
    return found


def _two_calls(step: str) -> list[float]:
    gpu = torch.device("cuda")
    torch.zeros(1, device=gpu).add_(1)  # the device's own start
    return seconds_of(lambda: STEPS[step](gpu), 2, gpu)


def table(found: dict, device: str) -> str:
    """Markdown."""
    lines = []
    for name, seconds in found["compile_cpu_seconds"].items():
        longest = max(seconds, key=seconds.__getitem__)
        times = (f"{sum(seconds.values()):.1f} s", f"`{longest}` {seconds[longest]:.1f} s")
        lines.append((*name.split(" "), str(len(seconds)), *times))
    calls = [
        f"{name}: first call {first:.2f} s, second {1e3 * second:.2f} ms."
        for name, (first, second) in found["calls"].items()
    ]
    calls = calls or ["First and second call on a GPU: not measured on hardware."]
    return f"""\
# Cold start on {device}

CPU seconds of one core to compile what a step launches (`python -m benchmarks cold_start`): a symmetric `info_nce` of 1024 x 512
in bfloat16; a CUT step's patches and PatchNCE, batch 1 in float32. No GPU takes part.

{report.table(("step", "target", "kernels", "together", "the longest"), lines)}

{chr(10).join(calls)}
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cold_start", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--out", type=Path, help="folder for the JSON and the table")
    add("--targets", type=int, nargs="+", choices=TARGETS, default=TARGETS)
    args = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        missing = "Triton is not installed. Run: pip install triton"
        print(f"benchmarks cold_start: {missing}", file=sys.stderr)
        return 1
    facts = machine.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    compiled = {
        f"{step} sm_{capability}": compile_seconds(step, capability)
        for capability in args.targets
        for step in STEPS
    }
    calls = _calls() if torch.cuda.is_available() else {}
    found = {"compile_cpu_seconds": compiled, "calls": calls}
    text = table(found, facts["device"])
    report.publish(args.out, "cold-start", facts, found, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
