"""The supervised contrastive loss in plain PyTorch."""

import torch
from torch import Tensor

from fastnce.reference.normalize import accumulation_dtype, normalize_rows, over_temperature


def sup_con(features: Tensor, labels: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """``loss_i = log sum_{a != i} exp(s_ia / t) - mean_{p in P_i} s_ip / t`` (the L_out form).

    Args:
        features: (N, D).
        labels: (N,) int64; ``P_i`` are the other samples with the label of i.
        temperature: t, a float or a 0-d tensor.

    Returns:
        The losses (N,), 0 where ``P_i`` is empty, and whether each sample has a positive, (N,) bool.
    """
    features = normalize_rows(features.to(accumulation_dtype(features.dtype)))

    is_self = torch.eye(labels.shape[0], dtype=torch.bool, device=labels.device)
    is_positive = (labels[:, None] == labels[None, :]) & ~is_self  # (N, N)
    num_positives = is_positive.sum(dim=1)  # (N,)
    logits = over_temperature(features @ features.T, temperature)  # (N, N)

    lse = logits.masked_fill(is_self, -torch.inf).logsumexp(dim=1)
    positive = logits.masked_fill(~is_positive, 0).sum(dim=1) / num_positives.clamp(min=1)
    has_positive = num_positives > 0
    return (lse - positive).masked_fill(~has_positive, 0), has_positive
