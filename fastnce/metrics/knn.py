"""How much of the classes is in a representation: nearest neighbours, and a linear classifier on top."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce.errors import UserError

# Entries of a block of similarities: 128 MiB of float32.
_BLOCK_ENTRIES = 2**25


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
        train_features: (N, F).
        train_labels: (N,) int64.
        test_features: (M, F), on the same device.
        k: neighbours; all of them where there are fewer.
        temperature: positive.

    Returns:
        (M,) int64.

    Raises:
        ValueError: shapes that do not fit together, or an argument out of range.

    Example:
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
        train_features: (N, F).
        train_labels: (N,) int64.
        test_features: (M, F).
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
