"""What the 2C loss takes of a ContraGAN step at the published settings: ``python -m benchmarks.class_loss_share``.

The loss is timed at the full batch, forward and backward, for each update of the step. On a CPU the networks are timed with a
smaller batch of the same images, for the full one takes minutes, and the time is scaled by the number of images. Images that
are cheaper in a larger batch would make the true share larger by that factor.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import fastnce
from benchmarks import baselines, machine
from fastnce.models import ContraGAN, ContraGANConfig
from fastnce.systems import SYSTEMS

_FIELDS = {field.name for field in dataclasses.fields(ContraGANConfig)}
# Preset, images of a batch, images of the batch that the networks are timed with on a CPU.
SETTINGS = (("cifar10", 64, 16), ("tiny-imagenet", 1024, 8))
_NETWORK_REPEATS, _LOSS_REPEATS = 3, 7


def _median_seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _loss_seconds(config: ContraGANConfig, count: int, op: Callable, device: torch.device) -> float:
    torch.manual_seed(0)
    embeddings = torch.randn(count, config.embed_dim, device=device, requires_grad=True)
    labels = torch.randint(config.num_classes, (count,), device=device)
    table = torch.randn(config.num_classes, config.embed_dim, device=device)
    proxies = table[labels].requires_grad_()
    return _median_seconds(
        lambda: op(embeddings, proxies, labels).backward(), _LOSS_REPEATS, device
    )


def measure(preset: str, count: int, timed: int, device: torch.device) -> dict:
    """One row of the table, seconds.

    Args:
        preset: of ContraGAN.
        count: images of a batch.
        timed: images of the batch that the networks are timed with.
        device: where.
    """
    values = {k: v for k, v in SYSTEMS["contragan"].presets[preset].items() if k in _FIELDS}
    # Without the class loss: that is timed by itself, at the full batch.
    config = ContraGANConfig(**values, lambda_cond=0.0)
    model = ContraGAN(config).to(device)
    total = timed * config.d_steps
    size = (config.image_channels, config.image_size, config.image_size)
    batch = {
        "image": torch.rand(total, *size, device=device) * 2 - 1,
        "label": torch.randint(config.num_classes, (total,), device=device),
    }
    step = _median_seconds(lambda: model.training_step(batch), _NETWORK_REPEATS, device)
    networks = step * count / timed
    updates = config.d_steps + 1
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
        row[f"{name}_seconds"] = seconds
        row[f"{name}_share"] = seconds / (seconds + networks)
    return row


def table(rows: list[dict], title: str) -> str:
    """Markdown."""
    lines = [
        f"# {title}",
        "",
        "| setting | batch x D | networks, s per step | timed with | 2C fused, ms | share | plain PyTorch | published form |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        published = "too large"
        if "published_seconds" in row:
            published = (
                f"{1e3 * row['published_seconds']:.0f} ms, {100 * row['published_share']:.2f} %"
            )
        lines.append(
            f"| {row['preset']} | {row['batch']} x {row['embed_dim']} | {row['networks_seconds']:.1f} "
            f"| {row['networks_timed_with']} images | {1e3 * row['fused_seconds']:.1f} | {100 * row['fused_share']:.3f} % "
            f"| {1e3 * row['plain_seconds']:.1f} ms, {100 * row['plain_share']:.3f} % | {published} |"
        )
    return (
        "\n".join([*lines, "", "Medians. All updates of a step together, forward and backward."])
        + "\n"
    )


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
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        stem = args.out / f"{machine.slug(facts['device'])}-class-loss-share"
        stem.with_suffix(".json").write_text(
            json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n"
        )
        stem.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
