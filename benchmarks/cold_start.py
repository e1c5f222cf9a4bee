"""What a first step waits for: compiling the Triton kernels. ``python -m benchmarks cold_start``.

Without a GPU: the CPU time in which Triton, LLVM and ptxas compile, for each generation of GPUs, what a training step launches.
Kernels compile one after another, on one core; Triton keeps them on disk, so that later processes wait for none of it. On a GPU
besides: the first call of a step against the second, in a process with an empty cache and in one that finds it filled.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine

TARGETS = (80, 90, 100)
# (channels, size) of the five maps that CUT takes patches from at 256 x 256, the depth of its projection and its patches.
_MAPS = ((3, 262), (128, 256), (256, 128), (256, 64), (256, 64))
_PROJECTED, _PATCHES = 256, 256
_ROWS, _DEPTH = 1024, 512


def info_nce_launches() -> None:
    """Launches of a symmetric InfoNCE with its gradients, 1024 x 512 in bf16, the temperature trained."""
    from fastnce import triton_kernels

    query, key = (torch.empty(1, _ROWS, _DEPTH, dtype=torch.bfloat16, device="meta") for _ in "qk")
    triton_kernels.info_nce_forward(
        query,
        key,
        None,
        torch.empty((), device="meta"),
        normalize=True,
        symmetric=True,
        in_batch=True,
        self_logit=None,
        grad_scale=1 / _ROWS,
        needs=(True, True, False, True),
    )


def cut_launches() -> None:
    """Launches of a CUT step, batch 1 in fp32: patches of the five maps, tapped and not, and PatchNCE with detached keys."""
    from fastnce import triton_kernels

    maps = [torch.empty(1, c, n, n, device="meta") for c, n in _MAPS]
    ids = [torch.empty(_PATCHES, dtype=torch.int64, device="meta")] * len(maps)
    patches, norms = triton_kernels.sample_patches_forward(maps, ids, False)
    triton_kernels.sample_patches_add_(maps, patches, patches, norms, ids, False)
    layers = [torch.empty(1, _PATCHES, _PROJECTED, device="meta") for _ in maps]
    triton_kernels.patch_nce_forward(
        layers,
        layers,
        0.07,
        self_logit=-10.0,
        loss_scales=[1.0] * len(layers),
        grad_scales=[1.0] * len(layers),
        needs=([True] * len(layers), [False] * len(layers), False),
    )


STEPS: dict[str, Callable[[], None]] = {"info_nce": info_nce_launches, "CUT": cut_launches}


def cpu_seconds() -> float:
    """CPU time of this process and of those that it has waited for: ptxas is one."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(x.ru_utime + x.ru_stime for x in used)


def compile_seconds(step: str, capability: int) -> dict[str, float]:
    """CPU seconds to compile each kernel of a step, each form of one counted; Triton's cache is left out."""
    from benchmarks.launches import SHARED_MEMORY, build, recorded
    from fastnce.triton_kernels import launch as launching

    before = launching.shared_memory
    launching.shared_memory = lambda device: SHARED_MEMORY[capability] + 1024
    try:
        with recorded() as found:
            STEPS[step]()
    finally:
        launching.shared_memory = before
    seconds: dict[str, float] = {}
    for each in dict.fromkeys(found):
        start = cpu_seconds()
        build(each, capability)
        name = each.name.strip("_").removesuffix("_kernel")
        while name in seconds:
            name += "'"
        seconds[name] = cpu_seconds() - start
    return seconds


def in_fresh_process(*arguments: str, cache: Path) -> dict:
    """What this module prints for ``arguments`` in a process of its own."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "benchmarks.cold_start", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def call(step: str, device: torch.device) -> None:
    """One step's losses and gradients on a device."""
    import fastnce

    if step == "info_nce":
        query, key = (
            torch.randn(_ROWS, _DEPTH, device=device, dtype=torch.bfloat16, requires_grad=True)
            for _ in "qk"
        )
        tau = torch.tensor(0.07, device=device, requires_grad=True)
        fastnce.info_nce(query, key, temperature=tau, symmetric=True).backward()
        return
    maps = [torch.randn(1, c, n, n, device=device, requires_grad=True) for c, n in _MAPS]
    tapped, patches, ids = fastnce.tap_patches(maps, _PATCHES)
    keys, _ = fastnce.sample_patches([x.detach() for x in maps], patch_ids=ids)
    loss = fastnce.patch_nce(_projected(patches), _projected(keys))
    (loss + sum(x.mean() for x in tapped)).backward()


def _projected(patches: list[Tensor]) -> list[Tensor]:
    """To CUT's depth; what a projection multiplies is no concern of this."""
    weights = [x.new_ones(x.shape[-1], _PROJECTED) for x in patches]
    return [x @ w for x, w in zip(patches, weights, strict=True)]


def first_calls(step: str, device: torch.device, backend: str) -> list[float]:
    """Seconds of the first two calls, waited for."""
    import fastnce

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.zeros(1, device=device).add_(1)  # the device's own start
    wait()
    times = []
    with fastnce.use_backend(backend):
        for _ in range(2):
            start = time.perf_counter()
            call(step, device)
            wait()
            times.append(time.perf_counter() - start)
    return times


def measure(targets: tuple[int, ...] = TARGETS) -> dict[str, object]:
    """Everything that this machine can show."""
    compiled, calls = {}, {}
    for capability in targets:
        for step in STEPS:
            with tempfile.TemporaryDirectory() as empty:
                arguments = ("--compile", step, str(capability))
                compiled[f"{step} sm_{capability}"] = in_fresh_process(
                    *arguments, cache=Path(empty)
                )
    for step in STEPS if torch.cuda.is_available() else ():
        with tempfile.TemporaryDirectory() as cache:
            for state in ("empty", "filled"):
                calls[f"{step}, cache {state}"] = in_fresh_process(
                    "--call", step, cache=Path(cache)
                )
    return {"compile_cpu_seconds": compiled, "calls": calls}


def table(found: dict, device: str) -> str:
    """Markdown."""
    compiled: dict[str, dict[str, float]] = found["compile_cpu_seconds"]
    lines = [
        f"# Cold start on {device}",
        "",
        "CPU seconds of one core to compile what a step launches (`python -m benchmarks cold_start`): a symmetric `info_nce` of "
        f"{_ROWS} x {_DEPTH} in bfloat16; a CUT step's patches and PatchNCE, batch 1 in float32. No GPU takes part.",
        "",
        "| step | target | kernels | together | the longest |",
        "|---|---|---|---|---|",
    ]
    for name, seconds in compiled.items():
        step, target = name.split(" ")
        longest = max(seconds, key=seconds.__getitem__)
        lines.append(
            f"| {step} | {target} | {len(seconds)} | {sum(seconds.values()):.1f} s | `{longest}` {seconds[longest]:.1f} s |"
        )
    lines.append("")
    if not found["calls"]:
        lines.append("First and second call on a GPU: not measured on hardware.")
    for name, values in found["calls"].items():
        first, second = values["seconds"]
        lines.append(f"{name}: first call {first:.2f} s, second {1e3 * second:.2f} ms.")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cold_start", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--out", type=Path, help="folder for the JSON and the table")
    add("--targets", type=int, nargs="+", choices=TARGETS, default=TARGETS)
    add("--compile", nargs=2, metavar=("STEP", "TARGET"), help=argparse.SUPPRESS)
    add("--call", metavar="STEP", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.compile:
        print(json.dumps(compile_seconds(args.compile[0], int(args.compile[1]))))
        return 0
    if args.call:
        times = first_calls(args.call, torch.device("cuda"), "triton")
        print(json.dumps({"seconds": times}))
        return 0
    if importlib.util.find_spec("triton") is None:
        print(
            "benchmarks cold_start: Triton is not installed. Run: pip install triton",
            file=sys.stderr,
        )
        return 1
    facts = machine.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found = measure(tuple(args.targets))
    text = table(found, facts["device"])
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        stem = args.out / f"{machine.slug(facts['device'])}-cold-start"
        stem.with_suffix(".json").write_text(
            json.dumps({"machine": facts, **found}, indent=1) + "\n"
        )
        stem.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
