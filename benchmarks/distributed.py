"""InfoNCE over gloo ranks of one machine: time and peak memory of each rank, ring and gather against gather + eager PyTorch.

Every rank is a process of its own with one thread; so on a machine with fewer cores than ranks they share them. A call's time is
from a barrier to a barrier, loss and both gradients. ``peak per rank`` is the highest resident memory of any rank (the kernel's
high-water mark, reset before the call) above what that process had when it had imported torch and this package and nothing else:
process group, inputs, results and whatever the call allocates are all in it. It is measured in ranks that make this call only, whose
allocator gives every array back at once.
"""

from __future__ import annotations

import ctypes
import datetime
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn.functional import cross_entropy, normalize

import fastnce
from benchmarks import machine, report
from benchmarks.harness import quartiles
from benchmarks.memory import GLIBC, status_bytes
from fastnce import distributed

RANKS, DIM, TEMPERATURE = 4, 256, 0.07
FP32, BF16 = torch.float32, torch.bfloat16
# Rows of all ranks together, their dtype, and whether eager PyTorch's matrices fit beside each other on a machine with 16 GB.
CASES = {
    "quick": [(2048, FP32, True)],
    "full": [
        (2048, FP32, True),
        (8192, FP32, True),
        (16384, FP32, True),
        (8192, BF16, True),
        (16384, BF16, True),
        (65536, FP32, False),
    ],
}
_GATE_ROWS, _GATE_ERROR = 256, {FP32: 2e-6, BF16: 1e-2}
_MATRICES = 3  # of local x global that eager PyTorch has at its peak, as measured at 16384 rows
_TIMEOUT = datetime.timedelta(minutes=20)


def _gather_eager(query: Tensor, key: Tensor) -> Tensor:
    """What training code does: gather the keys with their gradients, cross entropy of local x global logits."""
    keys = torch.cat(all_gather(key))
    logits = normalize(query) @ normalize(keys).T / TEMPERATURE
    target = torch.arange(len(query)) + dist.get_rank() * len(query)
    return cross_entropy(logits.float(), target)  # as autocast does


def _ours(strategy: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda query, key: distributed.info_nce(
        query, key, temperature=TEMPERATURE, strategy=strategy
    )


PROVIDERS = {"eager": _gather_eager, "ring": _ours("ring"), "gather": _ours("gather")}


@dataclass(frozen=True)
class _Job:
    """What the ranks do: gate and time several providers, or make one call that gives memory and time."""

    rows: int
    providers: tuple[str, ...]
    dtype: torch.dtype = FP32
    seconds: float = 0.0
    once: bool = False


def main(out: Path | None, size: str, seconds: float, log: Callable[[str], None]) -> int:
    """Measures, prints, and writes ``<device>-distributed.json`` and ``.md``.

    Args:
        out: folder for the files, or None.
        size: ``"quick"``; anything else is ``"full"``.
        seconds: of timing per case, all providers together.
        log: gets a line of progress.

    Returns:
        0. A wrong result raises.
    """
    cpu = torch.device("cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = machine.describe(cpu) | {"threads": RANKS, "usable_cores": cores}
    results: list[dict[str, Any]] = []
    title = f"InfoNCE over {RANKS} ranks on {cores} of the cores of {facts['device']}"
    settings = {"command": "distributed", "size": size, "seconds_per_case": seconds}
    rates = machine.matmul_rates(cpu, [FP32, BF16])
    for entry in _entries(size, seconds, log):
        results.append(entry)
        print(report.case_table(entry), end="\n\n", flush=True)
        if out is not None:
            stem = f"{machine.slug(facts['device'])}-distributed"
            report.write(
                out, stem, results, title=title, machine=facts, rates=rates, settings=settings
            )
    print("\n".join(report.summary(results)))
    return 0


def _entries(size: str, seconds: float, log: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """As of :func:`benchmarks.suite.run_cases`, with ``rank_peak_bytes`` in the rows."""
    for rows, dtype, eager_fits in CASES.get(size, CASES["full"]):
        yield _entry(rows, dtype, eager_fits, seconds, log)
    yield _check_entry(log)


def _entry(
    rows: int, dtype: torch.dtype, eager_fits: bool, seconds: float, log: Callable[[str], None]
) -> dict[str, Any]:
    meter = machine.PeakMeter(torch.device("cpu"), dtype)
    meter.measure()
    names = tuple(name for name in PROVIDERS if eager_fits or name != "eager")
    found: dict[str, dict[str, Any]] = {name: {"status": "ok", "reason": "ok"} for name in names}
    if not eager_fits:
        size = _MATRICES * 4 * rows * rows / 1e9
        reason = f"its matrices of local x global alone need {size:.0f} GB on all ranks together"
        found = {"eager": {"status": "skipped", "reason": reason}, **found}
    else:
        log(f"{rows} rows: timing {', '.join(names)}")
        times = _on_ranks(_Job(rows, names, dtype, seconds))[0]
        for name, samples in times.items():
            found[name]["seconds"] = quartiles(samples)
    for name in names:
        log(f"{rows} rows: memory of {name}")
        answers = _on_ranks(_Job(rows, (name,), dtype, once=True))
        found[name]["rank_peak_bytes"] = max(answer["peak"] for answer in answers)
        if not eager_fits:
            found[name]["seconds"] = quartiles([max(answer["seconds"] for answer in answers)])
    meter.measure()
    peak = meter.rate()
    flop = 3 * 2 * rows * rows * DIM
    providers = []
    for name, row in found.items():
        row = {"name": name, "ours": name != "eager", "seconds": None} | row
        if row["seconds"]:
            row["gflops"] = flop / row["seconds"]["median"] / 1e9
            if peak:
                row["share_of_peak"] = row["gflops"] / peak
        providers.append(row)
    return {
        "op": "distributed.info_nce",
        "case": f"{rows} rows on {RANKS} ranks, D = {DIM}",
        "shape": {"N": rows, "ranks": RANKS, "D": DIM},
        "gradients": ["query", "positive_key"],
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "products": 3,
        "flop": flop,
        "fma_peak_gflops": peak,
        "once": not eager_fits,
        "providers": providers,
    }


def _check_entry(log: Callable[[str], None]) -> dict[str, Any]:
    """What the ranks' agreement costs: the smallest loss with and without it."""
    log("the agreement's cost")
    times = _on_ranks(_Job(2 * RANKS, ("checked", "unchecked"), seconds=2.0))[0]
    names = {"checked": "check=True", "unchecked": "check=False"}
    return {
        "op": "distributed.info_nce",
        "case": f"2 rows on each of {RANKS} ranks, D = {DIM}: what the agreement costs",
        "shape": {"N": 2 * RANKS, "ranks": RANKS, "D": DIM},
        "gradients": ["query", "positive_key"],
        "dtype": "float32",
        "device": "cpu",
        "products": 0,
        "flop": 0,
        "providers": [
            {"name": names[name], "ours": True, "status": "ok", "seconds": quartiles(samples)}
            for name, samples in times.items()
        ],
    }


def _unchecked(query: Tensor, key: Tensor) -> Tensor:
    return distributed.info_nce(query, key, strategy="gather", check=False)


_CALLS = PROVIDERS | {"checked": _ours("gather"), "unchecked": _unchecked}


def _on_ranks(job: _Job) -> list[Any]:
    """The answers of fresh ranks. Raises what any of them raises."""
    context = multiprocessing.get_context("spawn")
    kept = {name: os.environ.get(name) for name in GLIBC}
    if job.once:
        os.environ.update(GLIBC)
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            context.Pool(RANKS, maxtasksperchild=1) as pool,
        ):
            meet = f"file://{Path(folder, 'meet')}"
            arguments = [(rank, meet, job) for rank in range(RANKS)]
            return pool.starmap(_rank, arguments, chunksize=1)
    finally:
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _rank(rank: int, meet: str, job: _Job) -> Any:
    torch.set_num_threads(1)
    # Of PyTorch about its own differentiable all_gather.
    warnings.filterwarnings("ignore", category=FutureWarning)
    bare = status_bytes("VmRSS")
    dist.init_process_group("gloo", meet, timeout=_TIMEOUT, rank=rank, world_size=RANKS)
    try:
        return _call_once(rank, job, bare) if job.once else _times(rank, job)
    finally:
        dist.destroy_process_group()


def _inputs(rank: int, rows: int, dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    query = torch.randn(rows // RANKS, DIM, generator=generator)
    key = query + 3 * torch.randn(query.shape, generator=generator)
    return query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_()


def _call(name: str, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    loss = _CALLS[name](query, key)
    return loss, *torch.autograd.grad(loss, (query, key))


def _call_once(rank: int, job: _Job, bare: int) -> dict[str, float]:
    (name,) = job.providers
    _call(name, *_inputs(rank, 8 * RANKS, job.dtype))  # loads the code
    query, key = _inputs(rank, job.rows, job.dtype)
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    dist.barrier()
    start = time.perf_counter()
    kept = _call(name, query, key)  # results count
    dist.barrier()
    seconds = time.perf_counter() - start
    del kept
    return {"peak": status_bytes("VmHWM") - bare, "seconds": seconds}


def _times(rank: int, job: _Job) -> dict[str, list[float]]:
    for name in job.providers:
        if name in PROVIDERS:
            _gate(rank, name, job.dtype)
    query, key = _inputs(rank, job.rows, job.dtype)
    times: dict[str, list[float]] = {name: [] for name in job.providers}
    end = time.perf_counter() + job.seconds
    goes_on = torch.ones(1)
    while goes_on.item():
        for name, samples in times.items():
            dist.barrier()
            start = time.perf_counter()
            _call(name, query, key)
            dist.barrier()
            samples.append(time.perf_counter() - start)
        goes_on.fill_(time.perf_counter() < end)
        dist.broadcast(goes_on, 0)
    return times


def _gate(rank: int, name: str, dtype: torch.dtype) -> None:
    """Raises unless loss and gradients are those of one process in fp64; with a warm-up thereby."""
    rows = [_inputs(r, _GATE_ROWS, dtype) for r in range(RANKS)]
    query, key = (torch.cat(x).double().detach().requires_grad_() for x in zip(*rows, strict=True))
    truth = fastnce.info_nce(query, key, temperature=TEMPERATURE, backend="torch")
    truth.backward()
    loss, *grads = _call(name, *rows[rank])
    loss = loss.detach().float()
    dist.all_reduce(loss)
    own = slice(rank * _GATE_ROWS // RANKS, (rank + 1) * _GATE_ROWS // RANKS)
    pairs = [(loss, truth.detach())]
    pairs += [(g, x.grad[own]) for g, x in zip(grads, (query, key), strict=True)]
    for got, true in pairs:
        error = (got.double() / RANKS - true).norm() / true.norm()
        if not error < _GATE_ERROR[dtype]:
            raise RuntimeError(f"{name} is wrong: off by {error:.1e} from one process in fp64")
