"""Losses over gloo ranks of one machine: time and peak memory of each rank, ring and gather against gather + eager PyTorch.

Every rank is a process of its own with one thread; so on a machine with fewer cores than ranks they share them. A call's time is
from a barrier to a barrier, loss and both gradients. ``peak per rank`` is the highest resident memory of any rank, the kernel's
high-water mark, reset before the call. It is above that of the process when it had imported torch and this package alone: process
group, inputs, results and whatever the call allocates are all in it. It is measured in ranks that make this call only, whose
allocator gives every array back at once.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn.functional import cross_entropy, logsigmoid, normalize

import fastnce
from benchmarks import machine, measure, memory, report
from benchmarks.timing import quartiles
from fastnce import distributed

RANKS, DIM, TEMPERATURE = 4, 256, 0.07
SCALE, BIAS = 10.0, -10.0
FP32, BF16 = torch.float32, torch.bfloat16
# The loss, rows of all ranks together, their dtype, and whether eager PyTorch's matrices fit beside each other in 16 GB.
_QUICK = [("info_nce", 2048, FP32, True)]
_FULL = [
    *_QUICK,
    ("info_nce", 8192, FP32, True),
    ("info_nce", 16384, FP32, True),
    ("info_nce", 8192, BF16, True),
    ("info_nce", 16384, BF16, True),
    ("info_nce", 65536, FP32, False),
    ("symmetric", 8192, FP32, True),
    ("symmetric", 8192, BF16, True),
    ("sigmoid", 8192, FP32, True),
]
_GATE_ROWS, _GATE_ERROR = 256, {FP32: 2e-6, BF16: 1e-2}
_MATRICES = 3  # of local x global that eager PyTorch has at its peak, as measured at 16384 rows
_TIMEOUT = datetime.timedelta(minutes=20)


def _gather_eager(query: Tensor, key: Tensor) -> Tensor:
    """As training code has it: gather the keys with their gradients, cross entropy of local x global logits."""
    logits = _eager_similarities(query, key) / TEMPERATURE
    return cross_entropy(logits.float(), _targets(query))  # as autocast does


def _symmetric_eager(query: Tensor, key: Tensor) -> Tensor:
    """The local loss of CLIP's training code: both sides are gathered."""
    return 0.5 * (_gather_eager(query, key) + _gather_eager(key, query))


def _sigmoid_eager(query: Tensor, key: Tensor) -> Tensor:
    logits = (_eager_similarities(query, key) * SCALE + BIAS).float()
    signs = torch.full_like(logits, -1.0)
    signs.scatter_(1, _targets(query)[:, None], 1.0)
    return -logsigmoid(signs * logits).sum() / len(query)


def _eager_similarities(query: Tensor, key: Tensor) -> Tensor:
    return normalize(query) @ normalize(torch.cat(all_gather(key))).T


def _targets(query: Tensor) -> Tensor:
    return torch.arange(len(query)) + dist.get_rank() * len(query)


class _Loss(NamedTuple):
    """One loss: its eager form, that of one process and that over ranks, and the products nobody can do without."""

    op: str
    eager: Callable[[Tensor, Tensor], Tensor]
    options: dict[str, Any]
    products: int


_SOFTMAX = {"temperature": TEMPERATURE}
LOSSES = {
    "info_nce": _Loss("info_nce", _gather_eager, _SOFTMAX, 3),
    "symmetric": _Loss("info_nce", _symmetric_eager, _SOFTMAX | {"symmetric": True}, 4),
    "sigmoid": _Loss("sigmoid_contrastive", _sigmoid_eager, {"scale": SCALE, "bias": BIAS}, 3),
}


def _providers(loss: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    op, eager, options, _ = LOSSES[loss]
    ours = partial(getattr(distributed, op), **options)
    ring, gather = (partial(ours, strategy=strategy) for strategy in ("ring", "gather"))
    return {"eager": eager, "ring": ring, "gather": gather}


_gathered = partial(distributed.info_nce, temperature=TEMPERATURE, strategy="gather")
# What the ranks' agreement costs.
_AGREEMENT = {
    "check=True": _gathered,
    "check=False": partial(_gathered, check=False),
}


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
    title = f"Losses over {RANKS} ranks on {cores} of the cores of {facts['device']}"
    about = {
        "title": title,
        "machine": facts,
        "rates": machine.matmul_rates(cpu, [FP32, BF16]),
        "settings": {"command": "distributed", "size": size, "seconds_per_case": seconds},
    }
    stem = f"{machine.slug(facts['device'])}-distributed"
    results: list[dict[str, Any]] = []
    for problem in [*(_QUICK if size == "quick" else _FULL), None]:
        results.append(_agreement(log) if problem is None else _entry(*problem, seconds, log))
        print(report.case_table(results[-1]), end="\n\n", flush=True)
        report.write(out, stem, results, **about)
    print("\n".join(report.summary(results)))
    return 0


def _entry(
    loss: str,
    rows: int,
    dtype: torch.dtype,
    eager_fits: bool,
    seconds: float,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """As of ``benchmarks.measure.measure``, with ``rank_peak_bytes`` in the rows."""
    meter = machine.PeakMeter(torch.device("cpu"), dtype)
    meter.measure()
    found = {name: _row(name) for name in _providers(loss)}
    names = list(found) if eager_fits else ["ring", "gather"]
    if eager_fits:
        log(f"{loss}, {rows} rows: timing {', '.join(names)}")
        for name, samples in on_ranks(loss, rows, names, dtype, seconds)[0].items():
            found[name]["seconds"] = quartiles(samples)
    else:
        size = _MATRICES * 4 * rows * rows / 1e9
        reason = f"its matrices of local x global alone need {size:.0f} GB on all ranks together"
        found["eager"] |= {"status": "skipped", "reason": reason}
    for name in names:
        log(f"{loss}, {rows} rows: memory of {name}")
        answers = on_ranks(loss, rows, [name], dtype)
        found[name]["rank_peak_bytes"] = max(answer["peak"] for answer in answers)
        if not eager_fits:
            found[name]["seconds"] = quartiles([max(answer["seconds"] for answer in answers)])
    meter.measure()
    name, products = f"{rows} rows on {RANKS} ranks, D = {DIM}", LOSSES[loss].products
    if loss != "info_nce":
        name = f"{loss}, {name}"
    entry = _case(name, rows, dtype, LOSSES[loss].op)
    entry |= {"products": products, "flop": products * 2 * rows * rows * DIM}
    entry |= {"once": not eager_fits, "providers": list(found.values())}
    measure.add_rates(entry, None, meter.rate())
    return entry


def _agreement(log: Callable[[str], None]) -> dict[str, Any]:
    """The cost of the ranks' agreement: the smallest loss with and without it."""
    log("the agreement's cost")
    times = on_ranks("info_nce", 2 * RANKS, list(_AGREEMENT), FP32, 2.0)[0]
    name = f"2 rows on each of {RANKS} ranks, D = {DIM}: what the agreement costs"
    rows = [_row(name) | {"seconds": quartiles(samples)} for name, samples in times.items()]
    return _case(name, 2 * RANKS, FP32) | {"products": 0, "flop": 0, "providers": rows}


def _row(name: str) -> dict[str, Any]:
    return {"name": name, "ours": name != "eager", "seconds": None, "status": "ok", "reason": "ok"}


def _case(name: str, rows: int, dtype: torch.dtype, op: str = "info_nce") -> dict[str, Any]:
    return {
        "op": f"distributed.{op}",
        "case": name,
        "shape": {"N": rows, "ranks": RANKS, "D": DIM},
        "gradients": ["query", "positive_key"],
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
    }


def on_ranks(
    loss: str, rows: int, names: Sequence[str], dtype: torch.dtype, seconds: float | None = None
) -> list[Any]:
    """The answers of fresh ranks: the times of each provider in turns, gated; without ``seconds``, time and memory of one call.

    Raises what any of them raises.
    """
    context = multiprocessing.get_context("spawn")
    allocator = memory.GLIBC if seconds is None else {}
    with (
        mock.patch.dict(os.environ, allocator),
        tempfile.TemporaryDirectory() as folder,
        context.Pool(RANKS, maxtasksperchild=1) as pool,
    ):
        meet = f"file://{Path(folder, 'meet')}"
        jobs = [(rank, meet, loss, rows, names, dtype, seconds) for rank in range(RANKS)]
        return pool.starmap(_rank, jobs, chunksize=1)


def _rank(
    rank: int, meet: str, loss: str, rows: int, names, dtype: torch.dtype, seconds: float | None
) -> Any:
    torch.set_num_threads(1)
    # Of PyTorch about its own differentiable all_gather.
    warnings.filterwarnings("ignore", category=FutureWarning)
    bare = memory.status_bytes("VmRSS")
    dist.init_process_group("gloo", meet, timeout=_TIMEOUT, rank=rank, world_size=RANKS)
    try:
        if seconds is None:
            _call(loss, names[0], *_inputs(rank, 8 * RANKS, dtype))  # loads the code
            inputs = _inputs(rank, rows, dtype)
            memory.reset_peak()
            taken = _timed(loss, names[0], inputs)
            return {"peak": memory.status_bytes("VmHWM") - bare, "seconds": taken}
        for name in names:
            gate(rank, loss, name, dtype)
        return _times(rank, loss, rows, names, dtype, seconds)
    finally:
        dist.destroy_process_group()


def _inputs(rank: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    query = torch.randn(rows // RANKS, DIM, generator=generator)
    key = query + 3 * torch.randn(query.shape, generator=generator)
    return query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_()


def _call(loss: str, name: str, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    found = (_providers(loss) | _AGREEMENT)[name](query, key)
    return found, *torch.autograd.grad(found, (query, key))


def _timed(loss: str, name: str, inputs: tuple[Tensor, Tensor]) -> float:
    """Seconds from a barrier to a barrier."""
    dist.barrier()
    start = time.perf_counter()
    results = _call(loss, name, *inputs)  # they count in the memory
    dist.barrier()
    seconds = time.perf_counter() - start
    del results
    return seconds


def _times(rank: int, loss: str, rows: int, names, dtype: torch.dtype, seconds: float) -> dict:
    inputs = _inputs(rank, rows, dtype)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    goes_on = torch.ones(1)
    while goes_on.item():
        for name, samples in times.items():
            samples.append(_timed(loss, name, inputs))
        goes_on.fill_(time.perf_counter() < end)
        dist.broadcast(goes_on, 0)
    return times


def gate(rank: int, loss: str, name: str, dtype: torch.dtype) -> None:
    """Raises unless loss and gradients are those of one process in fp64; with a warm-up thereby."""
    rows = [_inputs(r, _GATE_ROWS, dtype) for r in range(RANKS)]
    query, key = (torch.cat(x).double().detach().requires_grad_() for x in zip(*rows, strict=True))
    op, _, options, _ = LOSSES[loss]
    truth = getattr(fastnce, op)(query, key, **options, backend="torch")
    truth.backward()
    found, *grads = _call(loss, name, *rows[rank])
    found = found.detach().float()
    dist.all_reduce(found)
    own = slice(rank * _GATE_ROWS // RANKS, (rank + 1) * _GATE_ROWS // RANKS)
    pairs = [(found, truth.detach())]
    pairs += [(g, x.grad[own]) for g, x in zip(grads, (query, key), strict=True)]
    for got, true in pairs:
        error = (got.double() / RANKS - true).norm() / true.norm()
        if not error < _GATE_ERROR[dtype]:
            raise RuntimeError(
                f"{name} of {loss} is wrong: off by {error:.1e} from one process in fp64"
            )
