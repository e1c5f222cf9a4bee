"""Command line of the benchmarks: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
import time
from pathlib import Path

import torch

from benchmarks import (
    cold_start,
    cut_step,
    distributed,
    gpu_report,
    gpu_targets,
    machine,
    report,
    suite,
    waiting,
)

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_COMMANDS = (
    *suite.OPS,
    "all",
    "table",
    "demo",
    "cut_step",
    "distributed",
    "cold_start",
    "waiting",
    "gpu-report",
    "gpu-targets",
)
_OF_ALL_OPS = ("all", "table", "demo")
_DESCRIPTION = """\
Times the fused losses against plain PyTorch, torch.compile, fused attention and the published eager forms.
Every provider is first checked against fp64; one that is wrong is reported as wrong and not timed."""
_EPILOG = """\
commands:
  {ops}
              one op
  all         all ops
  table       the cases of the published table, all ops, about 15 minutes on 2 cores; as --size table
  demo        one case of the main ops in half a minute; writes demo.md, demo.json, demo.png
  cut_step    a training step of CUT against the published one in eager PyTorch: time, memory, where the time goes; on a CPU
  distributed info_nce over 4 gloo ranks of this machine: time and memory of each rank; --size full: up to 65536 rows
  cold_start  compiling the Triton kernels of a step for every GPU generation; on a GPU the first call against the second
  waiting     training steps under each way that OpenMP's threads can wait, on the machine as it is and beside a busy process
  gpu-report  on a machine with a GPU: builds, tests, measures, judges; writes results.json, results.md
  gpu-targets what the GPU kernels must reach, row by row: judges the --results of a gpu-report, or says what is not measured

examples:
  python -m benchmarks info_nce
  python -m benchmarks patch_nce --dtype float32 bfloat16 --size full --seconds 10
  python -m benchmarks all --out out/benchmarks
  python -m benchmarks table --out benchmarks/results"""


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str):
        self.exit(2, f"benchmarks: {message} (python -m benchmarks --help shows the options)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m benchmarks",
        description=_DESCRIPTION,
        epilog=_EPILOG.format(ops="  ".join(suite.OPS[:4]) + "\n  " + "  ".join(suite.OPS[4:])),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "command",
        metavar="COMMAND",
        help="an op, all, table, demo, cut_step, distributed, cold_start, waiting, gpu-report or gpu-targets",
    )
    add(
        "--seconds",
        type=_positive,
        help="timing budget of one case, all providers together (default 5); demo: of the whole run (default 30)",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the JSON, the table and the plot; without it the table is only printed",
    )
    add(
        "--dtype",
        nargs="+",
        choices=_DTYPES,
        help="dtypes of the inputs (default float32; table, and on a GPU: float32 and bfloat16)",
    )
    add(
        "--size",
        choices=("quick", "full", "table", "target"),
        default="quick",
        help="the set of cases (default quick); table is for a CPU, target for a GPU",
    )
    add(
        "--precision",
        choices=("highest", "high", "medium"),
        help="torch.set_float32_matmul_precision, for all providers (default: torch's own, highest)",
    )
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="whether torch.compile takes part (default: on a GPU and with --size full or table; on a CPU it can compile for a minute)",
    )
    add("--no-memory", action="store_true", help="do not measure peak memory")
    add(
        "--limit",
        type=_positive,
        metavar="SECONDS",
        help="begin no further case after this time (default: none; demo: twice its --seconds)",
    )
    add(
        "--minutes",
        type=_positive,
        default=9.0,
        help="gpu-report: time for build, tests and benchmarks together (default 9)",
    )
    add("--results", type=Path, metavar="FILE", help="gpu-targets: results.json of a gpu-report")
    return parser


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.command not in _COMMANDS:
        near = difflib.get_close_matches(args.command, _COMMANDS, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(_COMMANDS)}."
        parser.error(f"unknown command {args.command!r}; {hint}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU on this machine; use --device cpu")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file; give a folder")
    if args.results is not None and not args.results.is_file():
        parser.error(f"--results {args.results}: no such file; make gpu-report writes one")


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 1 where a backend of this package gave a wrong result, or a report could not be made.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    _check(parser, args)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        if args.command == "gpu-report":
            return gpu_report.main(args.out or Path("out/gpu-report"), args.minutes)
        if args.command == "gpu-targets":
            return gpu_targets.main(args.out, args.results)
        if args.command == "cold_start":
            return cold_start.main([] if args.out is None else ["--out", str(args.out)])
        if args.command == "waiting":
            return waiting.main(args.out, seconds=args.seconds or 1.0)
        with machine.matmul_precision(args.precision):
            if args.command == "cut_step":
                return cut_step.main([] if args.out is None else ["--out", str(args.out)])
            if args.command == "distributed":
                return distributed.main(args.out, args.size, args.seconds or 20.0, _progress)
            return _benchmark(args)
    except KeyboardInterrupt:
        print("\nbenchmarks: stopped; the cases finished so far are in --out", file=sys.stderr)
        return 130


def _benchmark(args: argparse.Namespace) -> int:
    start = time.monotonic()
    is_demo = args.command == "demo"
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    names = ["float32"]
    if device.type == "cuda":
        names = ["bfloat16", "float32"]
    elif args.command == "table":
        names = ["float32", "bfloat16"]
    names = args.dtype or names
    if is_demo and not args.dtype:
        names = names[:1]
    dtypes = [getattr(torch, name) for name in names]
    ops = suite.OPS if args.command in _OF_ALL_OPS else (args.command,)
    size = args.command if args.command in ("demo", "table") else args.size
    chosen = [case for op in ops for case in suite.cases(op, size, device)]
    total = (args.seconds or 30.0) if is_demo else None
    # Beside the timing, a demo spends its time on starting, gates, warm-up and memory.
    seconds = 0.4 * total / max(1, len(chosen)) if is_demo else args.seconds or 5.0
    limit = args.limit or (2 * total if is_demo else float("inf"))

    with_compile = args.compile
    if with_compile is None:
        with_compile = not is_demo and (device.type == "cuda" or size in ("full", "table"))

    rates = machine.matmul_rates(device, dtypes)
    facts = machine.describe(device)
    settings = {
        "command": args.command,
        "size": size,
        "seconds_per_case": seconds,
        "dtypes": names,
        "compile": with_compile,
        "precision": torch.get_float32_matmul_precision(),
    }
    title = f"{_title(args.command)} on {facts['device']}"
    stem = "demo" if is_demo else _stem(args.command, facts["device"])

    def keep(results: list[dict]) -> None:
        if args.out is not None:
            report.write(
                args.out,
                stem,
                results,
                title=title,
                machine=facts,
                rates=rates,
                settings=settings,
            )

    results = suite.run_cases(
        chosen,
        device,
        dtypes,
        seconds=seconds,
        with_compile=with_compile,
        with_memory=not args.no_memory,
        rates=rates,
        deadline=start + limit,
        log=_progress,
        keep=keep,
    )
    _progress("")
    keep(results)
    for entry in results:
        print(report.case_table(entry), end="\n\n")
    print("\n".join(report.summary(results)))
    if args.out is not None:
        if is_demo:
            note = report.plot(args.out / f"{stem}.png", results, title)
            pictures = [f"{stem}.png"] if note == "ok" else []
        else:
            pictures, note = report.plots(args.out, stem, results, title)
        files = ", ".join([f"{stem}.json", f"{stem}.md", *pictures])
        print(f"\nWritten to {args.out}: {files}" + ("" if note == "ok" else f"; {note}"))
    return 1 if report.has_fault(results) else 0


def _title(command: str) -> str:
    return "Fused losses against plain PyTorch" if command in _OF_ALL_OPS else command


def _stem(command: str, device: str) -> str:
    return machine.slug(device) if command == "all" else f"{machine.slug(device)}-{command}"


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line[:100]}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
