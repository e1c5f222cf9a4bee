"""Pairwise cosine similarity in plain PyTorch."""

from torch import Tensor

from fastnce.reference.normalize import accumulation_dtype, normalize_rows, over_temperature


def pairwise_cosine_similarity(x: Tensor, y: Tensor, temperature: float | Tensor) -> Tensor:
    """``s_ij = x_i . y_j / (||x_i|| ||y_j|| t)``: (..., N, D), (..., M, D) -> (..., N, M), in the inputs' dtype."""
    dtype = accumulation_dtype(x.dtype)
    similarity = normalize_rows(x.to(dtype)) @ normalize_rows(y.to(dtype)).mT
    return over_temperature(similarity, temperature).to(x.dtype)
