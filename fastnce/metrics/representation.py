"""The evaluation of an encoder: what classifiers on its features reach, beside the same on raw pixels and without training."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastnce.data import LabelledImages
from fastnce.metrics.knn import accuracy, knn_predict, linear_predict
from fastnce.metrics.tables import markdown_table

TRAINED_ENCODER = "trained encoder"
RANDOM_ENCODER = "random encoder"
RAW_PIXELS = "raw pixels"

# Neighbours that vote: many, as published for CIFAR-10, where a class has 5000 images, and few.
NEIGHBOURS = (200, 20)

_BATCH = 256


@torch.no_grad()
def encode(
    encoder: nn.Module, dataset: LabelledImages, indices: Sequence[int] | None = None
) -> Tensor:
    """Features of a set's images, in the order of the files, without any augmentation.

    Args:
        encoder: from (B, C, H, W) in [-1, 1] to (B, F); an encoder with batch norm in eval mode.
        dataset: the images.
        indices: which of them; all by default.

    Returns:
        (N, F) float32 on the CPU.
    """
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    indices = range(len(dataset)) if indices is None else indices
    features = []
    for start in range(0, len(indices), _BATCH):
        images = torch.stack([dataset.image(i) for i in indices[start : start + _BATCH]])
        features.append(encoder(images.to(device)).float().cpu())
    return torch.cat(features)


def calibrate(encoder: nn.Module, dataset: LabelledImages) -> nn.Module:
    """Gives an untrained encoder's batch norms the statistics of the data, and puts it into eval mode.

    With the initial ones, mean 0 and variance 1, its features would be no fair baseline.
    """
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    encode(encoder.train(), dataset)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return encoder.eval()


def evaluate_encoders(
    encoders: Mapping[str, nn.Module], train: LabelledImages, test: LabelledImages
) -> dict[str, Any]:
    """k-NN and linear accuracy of each encoder on the test images; the training images have the labels that are known.

    Args:
        encoders: by the name of their row, in eval mode. `nn.Flatten()` gives the raw pixels.
        train: the training images.
        test: the test images.

    Returns:
        {"train_count", "test_count", "rows": [{"name", "knn_200", "knn_20", "linear"}, ...]}
    """
    rows = []
    for name, encoder in encoders.items():
        known, asked = encode(encoder, train), encode(encoder, test)
        row: dict[str, Any] = {"name": name}
        for k in NEIGHBOURS:
            row[f"knn_{k}"] = accuracy(knn_predict(known, train.labels, asked, k=k), test.labels)
        row["linear"] = accuracy(linear_predict(known, train.labels, asked), test.labels)
        rows.append(row)
    return {"train_count": len(train), "test_count": len(test), "rows": rows}


def format_encoder_table(result: Mapping[str, Any]) -> str:
    """The rows of `evaluate_encoders` as a Markdown table that also reads well as text."""
    names = [*(f"knn_{k}" for k in NEIGHBOURS), "linear"]
    lines = [("features", *(f"k-NN, k={k}" for k in NEIGHBOURS), "linear")]
    for row in result["rows"]:
        lines.append((row["name"], *(f"{row[name]:.3f}" for name in names)))
    foot = f"Accuracy on {result['test_count']} test images, with {result['train_count']} training images whose labels are known."
    return markdown_table(lines, [foot])
