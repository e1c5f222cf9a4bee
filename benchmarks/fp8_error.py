"""The error that similarities in fp8 bring into a loss: ``python -m benchmarks.fp8_error``.

The error is that of rounding rows to e4m3 and nothing else: everything is computed in float64, by the reference, with and without
the rounding. It is the same on every backend, up to the order of sums.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import report
from fastnce import reference
from fastnce.reference.normalize import rounded_unit_rows

FP8 = torch.float8_e4m3fn
COUNT = 1024
TEMPERATURE = 0.07
DIMS = (128, 256, 512)
OPTIONS = {"normalize": True, "symmetric": True, "in_batch": True, "self_logit": None}


def random_rows(dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unrelated Gaussian rows, as before training."""
    shape = (COUNT, dim)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "qk")


def clustered_rows(dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of cosine 0.8 in 64 clusters of cosine 0.5: trained features, with hard negatives."""
    of_cluster, of_pair = random_rows(dim, generator)
    of_cluster = of_cluster[:64].repeat(COUNT // 64, 1)
    own = random_rows(dim, generator)
    return tuple(
        math.sqrt(0.5) * of_cluster + math.sqrt(0.3) * of_pair + math.sqrt(0.2) * x for x in own
    )


DISTRIBUTIONS = {"random": random_rows, "clustered": clustered_rows}


def cosine_errors(query: Tensor, key: Tensor) -> tuple[float, float]:
    """The largest error of a cosine, and the root of their mean square."""
    exact = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T
    error = rounded_unit_rows(query) @ rounded_unit_rows(key).T - exact
    return error.abs().max().item(), error.square().mean().sqrt().item()


def loss_and_gradients(query: Tensor, key: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """The mean loss, and the gradients of queries and keys, flat."""
    leaves = [x.clone().requires_grad_() for x in (query, key)]
    batched = (x.unsqueeze(0) for x in leaves)
    loss = reference.info_nce(*batched, None, TEMPERATURE, **OPTIONS, **options).mean()
    return loss.detach(), torch.cat([x.flatten() for x in torch.autograd.grad(loss, leaves)])


def measure(name: str, dim: int, seed: int = 0) -> dict[str, object]:
    """One row of the table."""
    query, key = DISTRIBUTIONS[name](dim, torch.Generator().manual_seed(seed))
    largest, rms = cosine_errors(query, key)
    loss, gradients = loss_and_gradients(query, key)
    rounded_loss, rounded_gradients = loss_and_gradients(query, key, similarity_dtype=FP8)
    return {
        "rows": name,
        "dim": dim,
        "cosine_max": largest,
        "cosine_rms": rms,
        "loss": loss.item(),
        "loss_error": (rounded_loss - loss).item(),
        "gradient_error": ((rounded_gradients - gradients).norm() / gradients.norm()).item(),
    }


def table() -> str:
    """Markdown."""
    lines = []
    for row in (measure(name, dim) for name in DISTRIBUTIONS for dim in DIMS):
        line = {
            "rows": row["rows"],
            "D": str(row["dim"]),
            "cosine, rms": f"{row['cosine_rms']:.1e}",
            "times sqrt(D)": f"{row['cosine_rms'] * math.sqrt(row['dim']):.3f}",
            "cosine, largest": f"{row['cosine_max']:.1e}",
            "loss": f"{row['loss']:.3f}",
            "its error": f"{row['loss_error']:+.1e}",
            "gradient's error": f"{100 * row['gradient_error']:.1f} %",
        }
        lines.append(line)
    return report.table_of(lines)


if __name__ == "__main__":
    print(table())
