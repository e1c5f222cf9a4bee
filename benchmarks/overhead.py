"""The cost of a call beside its kernel: microseconds per eager forward and backward of small inputs, of this checkout and another.

    python -m benchmarks.overhead OTHER_CHECKOUT [--rounds 15]

The checkouts take turns, so that a busy machine hinders both alike. Of every round, a process of its own, counts the quickest
batch of calls, of all rounds the median. One thread, the compiled CPU kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import timeit
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


def _microseconds(call: Callable[[], object]) -> float:
    batches = timeit.repeat(call, timer=time.process_time, repeat=_BATCHES, number=_CALLS)
    return 1e6 * min(batches) / _CALLS


def _round(checkout: Path) -> dict[str, float]:
    """Microseconds of each call, in a process that finds fastnce in the checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "FASTNCE_BACKEND": "native"}
    environment |= {"OMP_NUM_THREADS": "1"}
    # This file is run by its path.
    command = [sys.executable, __file__, "--round"]
    done = subprocess.run(
        command, env=environment, cwd=checkout, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, nargs="?", help="another checkout, built")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--round", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.round:
        print(json.dumps({name: _microseconds(call) for name, call in _calls().items()}))
        return
    if args.other is None:
        parser.error("name another checkout")
    checkouts = (Path(__file__).resolve().parents[1], args.other.resolve())
    rounds = [[_round(checkout) for checkout in checkouts] for _ in range(args.rounds)]
    print("| forward and backward, in us | this checkout | the other | ratio |\n|---|---|---|---|")
    for name in rounds[0][0]:
        new, old = (
            statistics.median(x[name] for x in found) for found in zip(*rounds, strict=True)
        )
        print(f"| {name} | {new:.1f} | {old:.1f} | {new / old:.2f} |")


if __name__ == "__main__":
    main()
