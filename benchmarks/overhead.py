"""Microseconds per eager forward and backward, of this checkout and another: of small inputs, the cost of a call beside its kernel.

    python -m benchmarks.overhead OTHER_CHECKOUT [--rounds 15] [--large]

The checkouts take turns, so that a busy machine hinders both alike. Of every round, a process of its own, counts the quickest
batch of calls, of all rounds the median. The compiled CPU kernels; small inputs on one thread, large ones on all.
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


def _small() -> dict[str, Callable[[], object]]:
    """Calls of small inputs, by name."""
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


def _large() -> dict[str, Callable[[], object]]:
    """Calls of up to a second."""
    import torch

    import fastnce
    from fastnce.ops.conv3x3 import conv3x3

    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, requires_grad=True)

    long, long_key = rows(16384, 128), rows(16384, 128)
    query, key, deep, deep_key = (
        rows(8192, 256),
        rows(8192, 256),
        rows(4096, 1024),
        rows(4096, 1024),
    )
    queue, few, few_keys = rows(65536, 128).detach(), rows(256, 128), rows(256, 128).detach()
    layers = [rows(1, 256, 256) for _ in range(5)], [rows(1, 256, 256).detach() for _ in range(5)]
    labels = torch.randint(2048, (8192,), generator=generator)
    last, weight = {"memory_format": torch.channels_last}, rows(256, 256, 3, 3)
    maps, arriving = (rows(2, 256, 64, 64).detach().to(**last) for _ in range(2))
    maps.requires_grad_()
    return {
        "conv3x3 of 2 x 256 x 64 x 64": lambda: conv3x3(maps, weight).backward(arriving),
        "info_nce 16384 x 128": lambda: fastnce.info_nce(long, long_key).backward(),
        "info_nce 8192 x 256": lambda: fastnce.info_nce(query, key).backward(),
        "info_nce 8192 x 256, keys fixed": lambda: fastnce.info_nce(query, key.detach()).backward(),
        "info_nce 8192 x 256, symmetric": lambda: fastnce.info_nce(
            query, key, symmetric=True
        ).backward(),
        "info_nce 4096 x 1024": lambda: fastnce.info_nce(deep, deep_key).backward(),
        "info_nce, queue of 65536, 256 x 128": lambda: fastnce.info_nce(
            few, few_keys, queue
        ).backward(),
        "nt_xent 4096 x 256": lambda: fastnce.nt_xent(query[:4096], key[:4096]).backward(),
        "sup_con 8192 x 256": lambda: fastnce.sup_con(query, labels).backward(),
        "conditional_contrastive 4096 x 1024": lambda: fastnce.conditional_contrastive(
            deep, deep_key, labels[:4096]
        ).backward(),
        "patch_nce, five layers of 256 x 256": lambda: fastnce.patch_nce(*layers).backward(),
    }


def _microseconds(call: Callable[[], object], large: bool) -> float:
    if large:
        return 1e6 * min(timeit.repeat(call, repeat=4, number=1))
    batches = timeit.repeat(call, timer=time.process_time, repeat=_BATCHES, number=_CALLS)
    return 1e6 * min(batches) / _CALLS


def _round(checkout: Path, large: bool) -> dict[str, float]:
    """Microseconds of each call, in a process that finds fastnce in the checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "FASTNCE_BACKEND": "native"}
    # This file is run by its path.
    command = [sys.executable, __file__, "--round"]
    if large:
        command.append("--large")
    else:
        environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=checkout, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, nargs="?", help="another checkout, built")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--large", action="store_true", help="calls of up to a second")
    parser.add_argument("--round", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.round:
        calls = _large() if args.large else _small()
        print(json.dumps({name: _microseconds(call, args.large) for name, call in calls.items()}))
        return
    if args.other is None or not (args.other / "fastnce").is_dir():
        parser.error(f"name another checkout, with its fastnce built; got {args.other}")
    checkouts = (Path(__file__).resolve().parents[1], args.other.resolve())
    rounds = [[_round(checkout, args.large) for checkout in checkouts] for _ in range(args.rounds)]
    print("| forward and backward, in us | this checkout | the other | ratio |\n|---|---|---|---|")
    for name in rounds[0][0]:
        new, old = (
            statistics.median(x[name] for x in found) for found in zip(*rounds, strict=True)
        )
        print(f"| {name} | {new:.1f} | {old:.1f} | {new / old:.2f} |")


if __name__ == "__main__":
    main()
