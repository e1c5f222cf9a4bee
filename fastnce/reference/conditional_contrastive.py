"""ContraGAN's 2C loss in plain PyTorch."""

import torch
from torch import Tensor

from fastnce.reference.normalize import accumulation_dtype, normalize_rows


def conditional_contrastive(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, temperature: float | Tensor
) -> Tensor:
    """``loss_i = log den_i - log num_i``, with the sums over ``exp(cosine / t)``.

    ``den_i`` sums the sample's own proxy and all other samples; ``num_i`` its own proxy and the other samples of its class.

    Args:
        embeddings: (N, D).
        proxies: (N, D); row i is the proxy of sample i's class.
        labels: (N,) int64.
        temperature: t, a float or a 0-d tensor.

    Returns:
        (N,), fp32 (fp64 for fp64 inputs).
    """
    dtype = accumulation_dtype(embeddings.dtype)
    embeddings, proxies = normalize_rows(embeddings.to(dtype)), normalize_rows(proxies.to(dtype))

    is_self = torch.eye(labels.shape[0], dtype=torch.bool, device=labels.device)
    is_other_class = labels[:, None] != labels[None, :]  # (N, N)
    to_proxy = (embeddings * proxies).sum(dim=-1, keepdim=True) / temperature  # (N, 1)
    to_others = (embeddings @ embeddings.T / temperature).masked_fill(is_self, -torch.inf)
    to_same_class = to_others.masked_fill(is_other_class, -torch.inf)

    log_den = torch.cat([to_proxy, to_others], dim=1).logsumexp(dim=1)
    log_num = torch.cat([to_proxy, to_same_class], dim=1).logsumexp(dim=1)
    return log_den - log_num
