"""The cost of a call beside its kernel: microseconds per eager forward and backward of small inputs, of this checkout and another.

    python -m benchmarks.overhead OTHER_CHECKOUT [--rounds 15]

One process per checkout, of which only one works at a time: they take turns, so that a busy machine hinders both alike. Of every
round counts the quickest batch of calls, of all rounds the median. One thread, the compiled CPU kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

_CALLS, _BATCHES = 20, 15  # calls of a batch, batches of a round


def _calls() -> dict[str, Callable[[], object]]:
    """The measured calls, by name."""
    import torch

    import fastnce

    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, requires_grad=True)

    query, key = rows(64, 128), rows(64, 128)
    layers = [rows(1, 64, 64) for _ in range(5)], [rows(1, 64, 64).detach() for _ in range(5)]
    embeddings, proxies = rows(64, 512), rows(64, 512)
    labels = torch.randint(10, (64,), generator=generator)
    features, ids = rows(1, 64, 16, 16), torch.randperm(256, generator=generator)[:64]
    ones = torch.ones(1, 64, 64)
    similarity = torch.ones(64, 64)
    return {
        "pairwise_cosine_similarity 64 x 128": lambda: fastnce.pairwise_cosine_similarity(
            query
        ).backward(similarity),
        "info_nce 64 x 128": lambda: fastnce.info_nce(query, key).backward(),
        "info_nce 64 x 128, unreduced": lambda: (
            fastnce.info_nce(query, key, reduction="none").sum().backward()
        ),
        "patch_nce, five layers of 64 x 64": lambda: fastnce.patch_nce(*layers).backward(),
        "conditional_contrastive 64 x 512": lambda: fastnce.conditional_contrastive(
            embeddings, proxies, labels
        ).backward(),
        "sup_con 64 x 128": lambda: fastnce.sup_con(query, labels).backward(),
        "sample_patches 64 of 16 x 16": lambda: fastnce.sample_patches(features, patch_ids=ids)[
            0
        ].backward(ones),
    }


def _serve() -> None:
    """One round, as a line of JSON, for every line that comes."""
    import torch

    torch.set_num_threads(1)
    calls = _calls()
    for _ in sys.stdin:
        print(json.dumps({name: _microseconds(call) for name, call in calls.items()}), flush=True)


def _microseconds(call: Callable[[], object]) -> float:
    quickest = float("inf")
    for _ in range(_BATCHES):
        start = time.process_time()
        for _ in range(_CALLS):
            call()
        quickest = min(quickest, time.process_time() - start)
    return 1e6 * quickest / _CALLS


def _worker(checkout: Path) -> subprocess.Popen:
    # This file is run by its path, and fastnce found in the checkout.
    environment = os.environ | {"PYTHONPATH": str(checkout), "FASTNCE_BACKEND": "native"}
    command = [sys.executable, __file__, "--serve"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=checkout, **pipes)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, nargs="?", help="another checkout, built")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return _serve()
    if args.other is None:
        parser.error("name another checkout")
    here = Path(__file__).resolve().parents[1]
    workers = [_worker(checkout) for checkout in (here, args.other.resolve())]
    rounds: list[list[dict[str, float]]] = [[], []]
    for _ in range(args.rounds + 1):
        for worker, found in zip(workers, rounds, strict=True):
            worker.stdin.write("\n")
            worker.stdin.flush()
            found.append(json.loads(worker.stdout.readline()))
    for worker in workers:
        worker.stdin.close()
    print("| forward and backward, in us | this checkout | the other | ratio |\n|---|---|---|---|")
    for name in rounds[0][0]:
        # The first round warms up.
        new, old = (statistics.median(x[name] for x in found[1:]) for found in rounds)
        print(f"| {name} | {new:.1f} | {old:.1f} | {new / old:.2f} |")


if __name__ == "__main__":
    main()
