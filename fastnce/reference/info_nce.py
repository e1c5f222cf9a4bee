"""InfoNCE in plain PyTorch."""

import torch
from torch import Tensor

from fastnce.reference.normalize import accumulation_dtype, normalize_rows


def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    *,
    normalize: bool,
    symmetric: bool,
    in_batch: bool,
    self_logit: float | None,
) -> Tensor:
    """``loss_i = log sum_j exp(s_ij / t) - s_ip / t``, one per query.

    Args:
        query: (B, N, D).
        key: (B, N, D); row i is the positive of query i.
        negatives: None, (M, D) shared by all queries, or (B, N, M, D) each query's own.
        temperature: t, a float or a 0-d tensor.
        normalize: s is the cosine instead of the dot product.
        symmetric: the mean of this loss and the one with query and key exchanged.
        in_batch: the other keys of the same batch element are negatives too.
        self_logit: a further constant s in every row's sum.

    Returns:
        (B, N), fp32 (fp64 for fp64 inputs).
    """
    dtype = accumulation_dtype(query.dtype)
    query, key = query.to(dtype), key.to(dtype)
    negatives = None if negatives is None else negatives.to(dtype)
    if normalize:
        query, key = normalize_rows(query), normalize_rows(key)
        negatives = None if negatives is None else normalize_rows(negatives)

    if in_batch:
        similarity = query @ key.mT  # (B, N, N)
        positive = similarity.diagonal(dim1=-2, dim2=-1)  # (B, N)
    else:
        similarity = (query * key).sum(dim=-1, keepdim=True)  # (B, N, 1)
        positive = similarity.squeeze(-1)
    columns = [similarity]
    if negatives is not None and negatives.dim() == 2:
        columns.append(query @ negatives.T)  # (B, N, M)
    elif negatives is not None:
        columns.append((negatives @ query.unsqueeze(-1)).squeeze(-1))  # (B, N, M)
    if self_logit is not None:
        columns.append(torch.full_like(similarity[..., :1], self_logit))

    logits = torch.cat(columns, dim=-1) / temperature
    lse = logits.logsumexp(dim=-1)
    if symmetric:
        lse = 0.5 * (lse + logits.logsumexp(dim=-2))
    return lse - positive / temperature
