"""How much of the classes is in a representation: nearest neighbours and a linear classifier on an encoder's features."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.data import LabelledImages
from fastnce.errors import UserError
from fastnce.metrics.tables import rows_table

TRAINED_ENCODER = "trained encoder"
RANDOM_ENCODER = "random encoder"
RAW_PIXELS = "raw pixels"

# Neighbours that vote: many, as published for CIFAR-10, where a class has 5000 images, and few.
NEIGHBOURS = (200, 20)

# Entries of a block of similarities: 128 MiB of float32.
_BLOCK_ENTRIES = 2**25
_BATCH = 256


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
) -> Tensor:
    """Classes by weighted vote of the k nearest training images.

    Each of the k training features with the largest cosine s votes for its class with weight `exp(s / temperature)`.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018
    (https://arxiv.org/abs/1805.01978); k and temperature as in the CIFAR-10 demo of MoCo's authors.

    Args:
        train_features, train_labels: (N, F) and (N,) int64.
        test_features: (M, F), on the same device.
        k: neighbours; all of them where there are fewer.
        temperature: positive.

    Returns:
        (M,) int64.

    Raises:
        ValueError: shapes that do not fit together, or an argument out of range.

    Examples:
        >>> train = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> knn_predict(train, torch.tensor([3, 7]), torch.tensor([[0.2, 0.9]]), k=1)
        tensor([7])
    """
    if (
        train_features.ndim != 2
        or test_features.ndim != 2
        or train_features.shape[1] != test_features.shape[1]
        or train_labels.shape != train_features.shape[:1]
        or len(train_features) == 0
    ):
        raise ValueError(
            "knn_predict: expected train_features (N, F), N >= 1, train_labels (N,) and test_features (M, F), got "
            f"{tuple(train_features.shape)}, {tuple(train_labels.shape)} and {tuple(test_features.shape)}."
        )
    if k < 1 or not temperature > 0:
        raise ValueError(
            f"knn_predict: k={k}, temperature={temperature}: expected k >= 1 and temperature > 0."
        )
    k = min(k, len(train_features))
    train = F.normalize(train_features.float())
    num_classes = int(train_labels.max()) + 1
    predicted = []
    for block in F.normalize(test_features.float()).split(max(1, _BLOCK_ENTRIES // len(train))):
        nearest = (block @ train.T).topk(k)  # values, indices (block, k)
        # Relative to the nearest one, which changes no vote and cannot overflow.
        weights = ((nearest.values - nearest.values[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(block), num_classes)
        votes.scatter_add_(1, train_labels[nearest.indices], weights)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted) if predicted else train_labels[:0]


def linear_predict(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, *, steps: int = 1000
) -> Tensor:
    """Classes by logistic regression on the features, each first shifted and scaled to mean 0 and variance 1.

    scikit-learn's `LogisticRegression` (L-BFGS, its default L2 penalty), which converges instead of depending on a learning
    rate as the published linear evaluations do.

    Args:
        train_features, train_labels, test_features: (N, F), (N,) int64 and (M, F).
        steps: the most iterations; scikit-learn warns where they do not suffice.

    Returns:
        (M,) int64, on the CPU.

    Raises:
        UserError: scikit-learn is missing.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ModuleNotFoundError as error:
        raise UserError(
            "linear evaluation needs scikit-learn. Install it with: pip install 'fastnce[demo]'"
        ) from error
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=steps))
    classifier.fit(train_features.cpu().double().numpy(), train_labels.cpu().numpy())
    return torch.from_numpy(classifier.predict(test_features.cpu().double().numpy()))


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of the predictions that are right."""
    return (predicted.cpu() == labels.cpu()).double().mean().item()


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
    columns = {f"knn_{k}": (f"k-NN, k={k}", ".3f") for k in NEIGHBOURS}
    columns["linear"] = ("linear", ".3f")
    foot = f"Accuracy on {result['test_count']} test images, with {result['train_count']} training images whose labels are known."
    return rows_table(result["rows"], columns, [foot], first="features")
