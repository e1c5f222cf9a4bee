"""InfoNCE in plain PyTorch."""

import torch
from torch import Tensor

from fastnce.reference.normalize import (
    accumulation_dtype,
    normalize_rows,
    over_temperature,
    rounded_unit_rows,
)


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
    similarity_dtype: torch.dtype | None = None,
) -> Tensor:
    """``loss_i = log sum_j exp(s_ij / t) - s_ip / t``, one per query.

    With ``similarity_dtype=torch.float8_e4m3fn`` every s, the positive's too, is the product of rows that
    :func:`~fastnce.reference.normalize.rounded_unit_rows` has rounded. Gradients take no notice of the rounding: they are
    ``sum_j G_ij k_j`` over the rows as they were, with the coefficients G of the rounded similarities.

    Args:
        query: (B, N, D).
        key: (B, N, D); row i is the positive of query i.
        negatives: None, (M, D) shared by all queries, or (B, N, M, D) each query's own.
        temperature: t, a float or a 0-d tensor.
        normalize: s is the cosine instead of the dot product.
        symmetric: the mean of this loss and the one with query and key exchanged.
        in_batch: the other keys of the same batch element are negatives too.
        self_logit: a further constant s in every row's sum.
        similarity_dtype: None, or torch.float8_e4m3fn for normalised rows without negatives of each query's own.

    Returns:
        (B, N), fp32 (fp64 for fp64 inputs).
    """
    dtype = accumulation_dtype(query.dtype)
    query, key = query.to(dtype), key.to(dtype)
    negatives = None if negatives is None else negatives.to(dtype)
    rows = (query, key, negatives)
    if normalize:
        query, key, negatives = (x if x is None else normalize_rows(x) for x in rows)
    columns = _similarities(query, key, negatives, in_batch)
    if similarity_dtype is not None:
        rounded = (x if x is None else rounded_unit_rows(x) for x in rows)
        values = _similarities(*rounded, in_batch)
        columns = [s + (v - s).detach() for s, v in zip(columns, values, strict=True)]
    if self_logit is not None:
        columns.append(torch.full_like(columns[0][..., :1], self_logit))

    logits = over_temperature(torch.cat(columns, dim=-1), temperature)
    positive = logits[..., 0]
    if in_batch:  # of the square part alone: torch.export cannot tell the shorter side of the whole
        positive = logits[..., : query.shape[-2]].diagonal(dim1=-2, dim2=-1)
    lse = logits.logsumexp(dim=-1)
    if symmetric:
        lse = 0.5 * (lse + logits.logsumexp(dim=-2))
    return lse - positive


def _similarities(
    query: Tensor, key: Tensor, negatives: Tensor | None, in_batch: bool
) -> list[Tensor]:
    """Products of each query with the keys, (B, N, N) or with its own alone (B, N, 1), and with negatives (B, N, M)."""
    columns = [query @ key.mT if in_batch else (query * key).sum(dim=-1, keepdim=True)]
    if negatives is not None and negatives.dim() == 2:
        columns.append(query @ negatives.T)
    elif negatives is not None:
        columns.append((negatives @ query.unsqueeze(-1)).squeeze(-1))
    return columns
