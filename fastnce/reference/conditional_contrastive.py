"""ContraGAN's 2C loss in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce.reference.normalize import accumulation_dtype, normalize_rows, over_temperature


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
    to_proxy = (embeddings * proxies).sum(dim=-1, keepdim=True)  # (N, 1)
    logits = torch.cat([to_proxy, embeddings @ embeddings.T], dim=1)
    logits = over_temperature(logits, temperature)  # (N, 1 + N)

    def lse_without(others: Tensor) -> Tensor:
        return logits.masked_fill(F.pad(others, (1, 0)), -torch.inf).logsumexp(dim=1)

    return lse_without(is_self) - lse_without(is_self | is_other_class)
