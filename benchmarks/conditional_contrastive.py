"""ContraGAN's 2C loss, at the batch sizes and widths of its published configurations."""

from __future__ import annotations

import torch

from benchmarks import baselines
from benchmarks.case import Case, Draw, Inputs, Provider


def _batch(shape: dict[str, int], draw: Draw) -> Inputs:
    labels = draw.labels(shape["N"], shape["classes"])
    table = draw.normal(shape["classes"], shape["D"])
    embeddings = draw.near(table[labels], noise=2.0)
    return {"embeddings": embeddings, "proxies": table[labels].clone(), "labels": labels}


def _case(name: str, n: int, d: int, classes: int, *sets: str) -> Case:
    return Case(
        "conditional_contrastive",
        f"{name}, {n} x {d}",
        {"N": n, "D": d, "classes": classes},
        _batch,
        wrt=("embeddings", "proxies"),
        # The similarities, and one product with G + G^T: the matrix of similarities is symmetric.
        products=2,
        pairs=lambda shape: shape["N"] ** 2,
        options={"temperature": 1.0},
        sets=sets,
        gate_limits={"N": 128},
    )


CASES = [
    _case("CIFAR10", 64, 512, 10, "quick", "full", "demo"),
    _case("ImageNet-128", 256, 1536, 1000, "quick", "full"),
    _case("Tiny ImageNet", 1024, 768, 200, "full", "table", "target"),
    _case("large batch", 2048, 1536, 1000, "full", "target"),
]


def rivals(case: Case, device: torch.device, dtype: torch.dtype) -> list[Provider]:
    """StudioGAN's own form, which holds several N x N x D arrays, and the form without them."""
    cube = case.shape["N"] ** 2 * case.shape["D"] * dtype.itemsize
    return [
        Provider(
            "published",
            lambda inputs: baselines.conditional_contrastive(**inputs, **case.options),
            extra_bytes=5 * cube,
        ),
        Provider(
            "matmul + logsumexp",
            lambda inputs: baselines.conditional_contrastive_matmul(**inputs, **case.options),
            extra_bytes=20 * case.pairs(case.shape),
        ),
    ]
