"""The share of the 2C loss in a ContraGAN step at the published settings: ``python -m benchmarks.class_loss_share``.

The loss is timed at the full batch, forward and backward, for each update of the step. On a CPU the networks are timed with a
smaller batch of the same images, for the full one takes minutes, and the time is scaled by the number of images. Images that
are cheaper in a larger batch would make the true share larger by that factor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import fastnce
from benchmarks import baselines, machine, report
from benchmarks.cases import Draw
from benchmarks.timing import median_seconds
from fastnce.models import ContraGAN, ContraGANConfig
from fastnce.training import build_config

# Preset, images of a batch, images of the batch that the networks are timed with on a CPU.
SETTINGS = (("cifar10", 64, 16), ("tiny-imagenet", 1024, 8))
_NETWORK_REPEATS, _LOSS_REPEATS = 3, 7


def _loss_seconds(config: ContraGANConfig, count: int, op: Callable, device: torch.device) -> float:
    draw = Draw(device, torch.float32)
    embeddings = draw.normal(count, config.embed_dim).requires_grad_()
    labels = draw.labels(count, config.num_classes)
    proxies = draw.normal(config.num_classes, config.embed_dim)[labels].requires_grad_()
    return median_seconds(lambda: op(embeddings, proxies, labels).backward(), _LOSS_REPEATS, device)


def measure(preset: str, count: int, timed: int, device: torch.device) -> dict:
    """One row of the table, seconds: of batches of ``count`` images, the networks timed with ``timed`` images."""
    # Without the class loss: that is timed by itself, at the full batch.
    overrides = {"data": ".", "out": ".", "lambda_cond": 0.0}
    config = build_config("contragan", preset=preset, overrides=overrides)
    model = ContraGAN(config).to(device)
    total = timed * config.d_steps
    size = (config.image_channels, config.image_size, config.image_size)
    batch = {
        "image": torch.rand(total, *size, device=device) * 2 - 1,
        "label": torch.randint(config.num_classes, (total,), device=device),
    }
    step = median_seconds(lambda: model.training_step(batch), _NETWORK_REPEATS, device)
    networks, updates = step * count / timed, config.d_steps + 1
    losses = {
        "fused": fastnce.conditional_contrastive,
        "plain": partial(fastnce.conditional_contrastive, backend="torch"),
    }
    if count**2 * config.embed_dim < 2**29:
        losses["published"] = baselines.conditional_contrastive
    row = {
        "preset": preset,
        "batch": count,
        "embed_dim": config.embed_dim,
        "updates": updates,
        "networks_timed_with": timed,
        "networks_seconds": networks,
    }
    for name, op in losses.items():
        seconds = updates * _loss_seconds(config, count, op, device)
        row |= {f"{name}_seconds": seconds, f"{name}_share": seconds / (seconds + networks)}
    return row


def table(rows: list[dict], title: str) -> str:
    """Markdown."""

    def of(row: dict, name: str) -> str:
        if f"{name}_seconds" not in row:
            return "too large"
        return f"{1e3 * row[f'{name}_seconds']:.1f} ms, {100 * row[f'{name}_share']:.3f} %"

    lines = [
        {
            "setting": row["preset"],
            "batch x D": f"{row['batch']} x {row['embed_dim']}",
            "networks, s per step": f"{row['networks_seconds']:.1f}",
            "timed with": f"{row['networks_timed_with']} images",
            "2C fused": of(row, "fused"),
            "plain PyTorch": of(row, "plain"),
            "published form": of(row, "published"),
        }
        for row in rows
    ]
    note = "Medians; the loss in ms and as a share of the step. All updates of a step together, forward and backward."
    return f"# {title}\n\n{report.table_of(lines)}\n\n{note}\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.class_loss_share", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, help="folder for the JSON and the table")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = machine.describe(device)
    rows = []
    for preset, count, timed in SETTINGS:
        rows.append(measure(preset, count, count if device.type == "cuda" else timed, device))
        print(rows[-1], file=sys.stderr)
    text = table(rows, f"The 2C loss within a ContraGAN step on {facts['device']}")
    report.publish(args.out, "class-loss-share", facts, {"rows": rows}, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
