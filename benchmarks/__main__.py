"""Command line of the benchmarks: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch

from benchmarks import (
    cases,
    distributed,
    dropins,
    gpu_report,
    growth,
    machine,
    measure,
    report,
    steps,
)
from fastnce.backends import native
from fastnce.errors import UserError, known
from fastnce.precision import float32_products

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_SIZES = ("quick", "full", "small", "table", "target")
_OF_ALL_OPS = ("all", "table", "demo")
_COMMANDS = {
    "all": "all ops",
    "table": "the cases of the published table, all ops, about 15 minutes on 2 cores; as --size table",
    "demo": "one case of the main ops in half a minute; writes demo.md, demo.json, demo.png",
    "steps": "a training step of every system (--only cut moco) against the published one in eager PyTorch; --size quick: only to see it run",
    "distributed": "info_nce over 4 gloo ranks of this machine: time and memory of each rank; --size full: up to 65536 rows",
    "dropins": "losses of other libraries against ours of the same names; where make test-dropins has installed them",
    "growth": "time and memory from 2^8 rows on, with the slopes; --size full: to 2^18; --limit: seconds that a call may take (20)",
    "gpu-report": "on a machine with a GPU: builds, verifies, tests, measures; writes results.json, results.md, verify.md, verdicts/",
}
_DESCRIPTION = """\
Times the fused losses against plain PyTorch, torch.compile, fused attention and the published eager forms.
Every provider is first checked against fp64; one that is wrong is reported as wrong and not timed."""
_EPILOG = f"""\
commands:
  {"  ".join(cases.OPS[:4])}
  {"  ".join(cases.OPS[4:])}
              one op
{chr(10).join(f"  {name:<11} {text}" for name, text in _COMMANDS.items())}

examples:
  python -m benchmarks info_nce
  python -m benchmarks patch_nce --dtype float32 bfloat16 --size full --seconds 10
  python -m benchmarks all --out out/benchmarks
  python -m benchmarks all --size small --threads 1 --no-compile
  python -m benchmarks table --out benchmarks/results"""


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str):
        self.exit(2, f"benchmarks: {message} (python -m benchmarks --help shows the options)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m benchmarks",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("command", metavar="COMMAND", help=f"an op, {', '.join(_COMMANDS)}")
    add("--seconds", type=_positive, help="timing of a case (default 5); demo: of all (default 30)")
    add("--out", type=Path, metavar="DIR", help="folder of the report; without it, it is printed")
    add("--dtype", nargs="+", choices=_DTYPES, help="of the inputs (default: float32 on a CPU)")
    add(
        "--size",
        choices=_SIZES,
        help="cases (default quick; steps: full); small: 64 x 128; target: on a GPU",
    )
    add(
        "--precision",
        choices=("highest", "high", "medium"),
        help="torch.set_float32_matmul_precision, for all",
    )
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    compiles = "whether torch.compile takes part (default: on a GPU, and with --size full or table)"
    add("--compile", action=argparse.BooleanOptionalAction, help=compiles)
    only = "the cases whose names have one of these in them; steps: systems; dropins: losses"
    add("--only", nargs="+", metavar="TEXT", help=only)
    add("--no-memory", action="store_true", help="do not measure peak memory")
    limit = "begin no further case after this time (default: none; demo: twice its --seconds)"
    add("--limit", type=_positive, metavar="SECONDS", help=limit)
    add("--minutes", type=_positive, default=9.0, help="gpu-report: time for all (default 9)")
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
    try:
        known(args.command, (*cases.OPS, *_COMMANDS), "command")
        for name in (args.only or ()) if args.command == "steps" else ():
            known(name, tuple(steps.STEPS), "system")
        if native.available() == "ok":
            native.instruction_set()
    except UserError as error:
        parser.error(str(error))
    except RuntimeError as error:  # FASTNCE_CPU_ISA
        parser.error(str(error).splitlines()[0].partition("fastnce: ")[2])
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU on this machine; use --device cpu")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file; give a folder")


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 1 where a backend of this package gave a wrong result, or a report could not be made.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    _check(parser, args)
    args.size = args.size or ("full" if args.command == "steps" else "quick")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        with machine.matmul_precision(args.precision):
            return _run(args)
    except KeyboardInterrupt:
        print("\nbenchmarks: stopped; the cases finished so far are in --out", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    match args.command:
        case "gpu-report":
            return gpu_report.main(args.out or Path("out/gpu-report"), args.minutes)
        case "steps":
            return steps.main(args.out, args.only, args.size)
        case "distributed":
            return distributed.main(args.out, args.size, args.seconds or 20.0, _progress)
        case "growth":
            return growth.main(args.out, args.size, args.limit or 20.0)
        case "dropins":
            return dropins.main(args.out, args.only, args.seconds or 5.0)
    return _benchmark(args)


def _benchmark(args: argparse.Namespace) -> int:
    start = time.monotonic()
    is_demo = args.command == "demo"
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    names = ["bfloat16", "float32"] if device.type == "cuda" else ["float32"]
    names = args.dtype or (names[:1] if is_demo else names)
    dtypes = [getattr(torch, name) for name in names]
    ops = cases.OPS if args.command in _OF_ALL_OPS else (args.command,)
    size = args.command if args.command in ("demo", "table") else args.size
    chosen = [case for op in ops for case in cases.select(op, size, device)]
    if args.only:
        names_of_all = [case.name for case in chosen]
        chosen = [case for case in chosen if any(text in case.name for text in args.only)]
        if not chosen:
            print(
                f"benchmarks: --only {' '.join(args.only)}: no case has that in its name. "
                f"There are: {'; '.join(names_of_all)}",
                file=sys.stderr,
            )
            return 2
    seconds, limit = args.seconds or 5.0, args.limit or math.inf
    if is_demo:
        total = args.seconds or 30.0
        # Beside the timing, a demo spends its time on starting, gates, warm-up and memory.
        seconds, limit = 0.4 * total / max(1, len(chosen)), args.limit or 2 * total

    with_compile = args.compile
    if with_compile is None:
        with_compile = not is_demo and (device.type == "cuda" or size in ("full", "table"))

    facts = machine.describe(device)
    title = "Fused losses against plain PyTorch" if args.command in _OF_ALL_OPS else args.command
    title = f"{title} on {facts['device']}"
    name = machine.slug(facts["device"])
    of_all = name if size == "quick" else f"{name}-{size}"
    stem = {"demo": "demo", "all": of_all}.get(args.command, f"{name}-{args.command}")
    rates = machine.matmul_rates(device, dtypes)
    settings = {
        "command": args.command,
        "size": size,
        "seconds_per_case": seconds,
        "dtypes": names,
        "compile": with_compile,
        "precision": float32_products(device.type),
    }

    def keep(results: list[dict]) -> None:
        about = {"title": title, "machine": facts, "rates": rates, "settings": settings}
        report.write(args.out, stem, results, **about)

    results = measure.run_cases(
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
        together = is_demo or len(ops) == 1
        pictures, note = report.plots(args.out, stem, results, title, together)
        files = ", ".join([f"{stem}.json", f"{stem}.md", *pictures])
        print(f"\nWritten to {args.out}: {files}{note}")
    return 1 if report.has_fault(results) else 0


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line[:100]}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
