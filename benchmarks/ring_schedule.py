"""Bytes, memory and time per rank of the exchanges, for clusters that nobody here has: counted, and checked by simulation.

``python -m benchmarks.ring_schedule`` prints the tables of ``docs/distributed.md``. The simulation knows the schedule of
``fastnce/distributed/_exchange.py`` event by event, with every link on its own; the formulas, which are what one can reason with,
know the slowest link only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# One rank is one H100 SXM of a DGX H100 (sources in docs/distributed.md).
FLOPS = 650e12  # bf16 products; the best fused losses reach 650 to 700e12 of a peak of 989e12
NVLINK = 450e9  # bytes/s and direction, between GPUs of one node
NIC = 50e9  # bytes/s and direction; 400 Gb/s, one per GPU
NODE = 8  # GPUs, and network cards
LATENCY = 10e-6  # seconds per message, assumed
KEY_BYTES, SUM_BYTES = 2, 4  # keys travel in bf16, their gradients in float32
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 1, 3  # of n x n x D, per block


@dataclass(frozen=True)
class Job:
    """InfoNCE with gradients of queries and keys: ``n`` rows of ``d`` numbers on each of ``ranks`` GPUs."""

    ranks: int
    n: int
    d: int = 512

    @property
    def key_bytes(self) -> int:
        """Of one rank's keys."""
        return KEY_BYTES * self.n * self.d

    @property
    def sum_bytes(self) -> int:
        """Of the gradient of one rank's keys."""
        return SUM_BYTES * self.n * self.d

    def compute(self, products: int) -> float:
        """Seconds for that many products of one block."""
        return products * 2 * self.n * self.n * self.d / FLOPS

    def link(self, rank: int) -> float:
        """Bytes/s from ``rank`` to the next: a ring in the order of the ranks leaves a node through one card."""
        leaves_node = self.ranks > NODE and rank % NODE == NODE - 1
        return NIC if leaves_node else NVLINK

    @property
    def slowest_link(self) -> float:
        return min(self.link(rank) for rank in range(self.ranks))

    @property
    def gather_rate(self) -> float:
        """Bytes/s at which a collective of the library fills each rank: it leaves a node through all cards at once."""
        return min(NVLINK, NODE * NIC) if self.ranks > NODE else NVLINK

    # What a rank sends in forward and backward together.

    def ring_bytes(self) -> int:
        return 2 * (self.ranks - 1) * self.key_bytes + self.ranks * self.sum_bytes

    def gather_bytes(self) -> int:
        return (self.ranks - 1) * (2 * self.key_bytes + self.sum_bytes)

    # What a rank holds beyond its own rows and gradients.

    def ring_memory(self) -> int:
        """Two blocks on their way and two sums."""
        return 2 * (self.key_bytes + self.sum_bytes)

    def gather_memory(self) -> int:
        return self.ranks * (2 * self.key_bytes + self.sum_bytes)

    # Seconds of forward and backward together.

    def ring_seconds(self) -> float:
        """Steps run at the pace of compute or of the slowest link, whichever is slower."""
        key, total = (
            LATENCY + size / self.slowest_link for size in (self.key_bytes, self.sum_bytes)
        )
        forward, backward = self.compute(FORWARD_PRODUCTS), self.compute(BACKWARD_PRODUCTS)
        steps = self.ranks - 1
        return (
            forward
            + steps * max(forward, key)
            + backward
            + steps * max(backward, key + total)
            + total
        )

    def gather_seconds(self) -> float:
        """Nothing overlaps: collect, compute, collect, compute, return the sums."""
        products = FORWARD_PRODUCTS + BACKWARD_PRODUCTS
        moved = self.gather_bytes() / self.gather_rate
        return self.ranks * self.compute(products) + moved + 3 * (self.ranks - 1) * LATENCY

    def simulated_ring_seconds(self) -> float:
        """The ring event by event."""
        start = np.zeros(self.ranks)
        start = self._trip(start, self.compute(FORWARD_PRODUCTS), with_sums=False)
        return float(self._trip(start, self.compute(BACKWARD_PRODUCTS), with_sums=True).max())

    def _trip(self, ready: np.ndarray, compute: float, with_sums: bool) -> np.ndarray:
        """When each rank is through one trip that it begins when it is ``ready``; all arrays have a time per rank."""
        free = np.zeros(self.ranks)  # the link to the next rank
        rates = np.array([self.link(rank) for rank in range(self.ranks)])
        key, total = (LATENCY + size / rates for size in (self.key_bytes, self.sum_bytes))
        sums_here = np.zeros(self.ranks)
        for step in range(self.ranks):
            last = step + 1 == self.ranks
            done = ready + compute
            if not last:  # the block is passed on as computing with it begins
                free = sent = np.maximum(free, ready) + key
            if with_sums:
                done = np.maximum(done, sums_here)
                free = np.maximum(free, done) + total
                sums_here = np.roll(free, 1)
            if not last:  # a rank waits for the next block, and for its own to have left
                ready = np.maximum.reduce([done, sent, np.roll(sent, 1)])
        return np.maximum(done, sums_here)


def table(n: int, d: int) -> list[str]:
    """Lines of Markdown: 8 to 1024 ranks of ``n`` rows each."""
    lines = [
        "| GPUs | rows in all | sent per rank, ring / gather | memory, ring / gather | compute | ring | simulated | gather | faster |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for ranks in (8, 16, 32, 64, 128, 256, 512, 1024):
        job = Job(ranks, n, d)
        compute = ranks * job.compute(FORWARD_PRODUCTS + BACKWARD_PRODUCTS)
        ring, gather = job.ring_seconds(), job.gather_seconds()
        lines.append(
            f"| {ranks} | {ranks * n:,} | {_size(job.ring_bytes())} / {_size(job.gather_bytes())} "
            f"| {_size(job.ring_memory())} / {_size(job.gather_memory())} | {_time(compute)} | {_time(ring)} "
            f"| {_time(job.simulated_ring_seconds())} | {_time(gather)} | {'ring' if ring < gather else 'gather'} |"
        )
    return lines


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def report() -> str:
    """The tables of ``docs/distributed.md``."""
    parts = []
    for n in (1024, 16384):
        parts += [f"{n:,} rows per GPU, D = 512:", "", *table(n, 512), ""]
    return "\n".join(parts).strip()


if __name__ == "__main__":
    print(report())
