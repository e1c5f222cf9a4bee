"""The rivals: how published code computes each loss, and attention as the fused baseline that PyTorch already has.

Written from the equations. Every function takes the arguments of the public op of the same name. Products are in the dtype of
the inputs, softmax in fp32, which is what autocast makes of the published code.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Of CUT: the logit of a query with its own position among its negatives.
SELF_LOGIT = -10.0


def wide(x: Tensor) -> Tensor:
    """In the dtype of sums and softmax."""
    return x if x.dtype == torch.float64 else x.float()


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    symmetric: bool = False,
    query_ids: Tensor | None = None,
    return_rank: bool = False,
) -> Tensor:
    """Cross-entropy of the logits: CLIP's two directions, SimCLR's one, or MoCo's positive beside a queue.

    Negatives of the same id are taken out by a mask of all pairs. Ranks are counted, too, and not returned.
    """
    query, key = F.normalize(query, dim=-1), F.normalize(positive_key, dim=-1)
    if negative_keys is not None:
        positive = (query * key).sum(dim=-1, keepdim=True)
        others = query @ F.normalize(negative_keys, dim=-1).T
        logits = wide(torch.cat([positive, others], dim=1)) / temperature
        return F.cross_entropy(
            logits, torch.zeros(len(query), dtype=torch.long, device=query.device)
        )
    logits = wide(query @ key.T) / temperature
    target = torch.arange(len(query), device=query.device)
    if query_ids is not None:
        same = query_ids[:, None] == query_ids[None, :]
        logits = logits.masked_fill(same.fill_diagonal_(False), -torch.inf)
    if return_rank:
        (logits.detach() > logits.detach().diagonal()[:, None]).sum(dim=1)
    loss = F.cross_entropy(logits, target)
    return 0.5 * (loss + F.cross_entropy(logits.T, target)) if symmetric else loss


def patch_nce(
    query_features: list[Tensor],
    key_features: list[Tensor],
    *,
    temperature: float = 0.07,
    negatives: str = "image",
    symmetric: bool = False,
    query_negatives: bool = False,
    detach_keys: bool = False,
) -> Tensor:
    """CUT's form, layer after layer: bmm, the diagonal overwritten by -10, the positive in front, cross-entropy.

    Contrastive Feature Loss's has the products of the queries beside those, and calls it once more for the second direction.
    """

    def one_way(query: Tensor, key: Tensor) -> Tensor:
        key = key.detach() if detach_keys else key
        positive = (query * key).sum(dim=-1).reshape(-1, 1)  # (B S, 1)
        if negatives == "batch":
            query, key = query.flatten(0, 1).unsqueeze(0), key.flatten(0, 1).unsqueeze(0)
        size = query.shape[1]
        diagonal = torch.eye(size, dtype=torch.bool, device=query.device)
        columns = [positive]
        for others in (key, query) if query_negatives else (key,):
            logits = torch.bmm(query, others.mT).masked_fill(diagonal, SELF_LOGIT)
            columns.append(logits.reshape(-1, size))
        logits = wide(torch.cat(columns, dim=1)) / temperature
        target = torch.zeros(len(logits), dtype=torch.long, device=query.device)
        return F.cross_entropy(logits, target)

    total = 0.0
    for query, key in zip(query_features, key_features, strict=True):
        query, key = (x / (x.norm(dim=-1, keepdim=True) + 1e-7) for x in (query, key))
        loss = one_way(query, key)
        total = total + (0.5 * (loss + one_way(key, query)) if symmetric else loss)
    return total / len(query_features)


def conditional_contrastive(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """StudioGAN's form: cosine similarity of all pairs, broadcast to N x N x D.

    Kinder than the published code, which also loops over the classes on the host.
    """
    pairs = F.cosine_similarity(embeddings.unsqueeze(1), embeddings.unsqueeze(0), dim=-1)
    to_proxy = torch.exp(wide(F.cosine_similarity(embeddings, proxies, dim=-1)) / temperature)
    others = torch.exp(wide(pairs) / temperature)
    others = others * ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    same_class = others * (labels[:, None] == labels[None, :])
    return -torch.log((to_proxy + same_class.sum(dim=1)) / (to_proxy + others.sum(dim=1))).mean()


def conditional_contrastive_matmul(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """The same loss without the cube: one product in the inputs' dtype, two log-sum-exps of masked logits in fp32."""
    embeddings, proxies = F.normalize(embeddings, dim=-1), F.normalize(proxies, dim=-1)
    logits = wide(embeddings @ embeddings.T) / temperature
    diagonal = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    # The pair of a row with itself is its pair with the proxy.
    to_proxy = wide((embeddings * proxies).sum(dim=-1)) / temperature
    logits = torch.where(diagonal, to_proxy[:, None], logits)
    other_class = labels[:, None] != labels[None, :]
    same_class = logits.masked_fill(other_class, -torch.inf)
    return (logits.logsumexp(dim=1) - same_class.logsumexp(dim=1)).mean()


def sample_patches(
    features: list[Tensor], num_patches: int = 256, *, patch_ids: list[Tensor] | None = None
) -> list[Tensor]:
    """CUT's form: a whole permutation of the positions drawn on the host, then permute, flatten and index."""
    patches = []
    for layer, feature in enumerate(features):
        if patch_ids is None:
            ids = np.random.permutation(feature.shape[2] * feature.shape[3])[:num_patches]
            ids = torch.as_tensor(ids, dtype=torch.long, device=feature.device)
        else:
            ids = patch_ids[layer]
        patches.append(feature.permute(0, 2, 3, 1).flatten(1, 2)[:, ids])
    return patches


def sup_con(
    features: Tensor, labels: Tensor, *, temperature: float = 0.07, positives: str = "mean"
) -> Tensor:
    """The form of the published L_out: masks, the row maximum taken off, the logarithm of the summed exponentials.

    With a term for each positive, kinder than pytorch-metric-learning's form, which has a row of logits for each pair.
    """
    features = F.normalize(features, dim=-1)
    logits = wide(features @ features.T) / temperature
    if positives == "each":
        same = labels[:, None] == labels[None, :]
        others = logits.masked_fill(same, -torch.inf).logsumexp(dim=1, keepdim=True)
        terms = F.softplus(others - logits)[same.clone().fill_diagonal_(False)]
        return terms.sum() / max(1, terms.numel())
    logits = logits - logits.amax(dim=1, keepdim=True).detach()
    not_self = 1 - torch.eye(len(labels), device=features.device, dtype=logits.dtype)
    positives = (labels[:, None] == labels[None, :]) * not_self
    log_prob = logits - (torch.exp(logits) * not_self).sum(dim=1, keepdim=True).log()
    count = positives.sum(dim=1)
    losses = -(positives * log_prob).sum(dim=1) / count.clamp(min=1)
    return losses.sum() / (count > 0).sum().clamp(min=1)


def nt_xent(z1: Tensor, z2: Tensor, *, temperature: float = 0.5) -> Tensor:
    """SimCLR's form: all 2N x 2N logits, the diagonal at -inf, cross-entropy with the other view."""
    count = len(z1)
    features = F.normalize(torch.cat([z1, z2]), dim=-1)
    logits = wide(features @ features.T) / temperature
    diagonal = torch.eye(2 * count, dtype=torch.bool, device=z1.device)
    target = torch.arange(2 * count, device=z1.device).roll(count)
    return F.cross_entropy(logits.masked_fill(diagonal, -torch.inf), target)


def sigmoid_contrastive(query: Tensor, key: Tensor, *, scale: float, bias: float) -> Tensor:
    """SigLIP's: the logits of all pairs, a matrix of labels, the sum over N."""
    logits = wide(F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T) * scale + bias
    labels = 2 * torch.eye(len(query), device=query.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(query)


def pairwise_cosine_similarity(
    x: Tensor, y: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """Normalised copies and one product."""
    x_unit = F.normalize(x, dim=-1)
    y_unit = x_unit if y is None else F.normalize(y, dim=-1)
    return x_unit @ y_unit.mT / temperature


class LseAttention(torch.autograd.Function):
    """``log sum_j exp(q_i . k_j / t)`` through the fused attention of PyTorch, keys without gradient.

    Attention with the keys as values returns the softmax-weighted mean key, which is t times the gradient of the log-sum-exp:
    loss and gradient in one pass of two products.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, temperature: float, kernel: str) -> Tensor:
        """query (B, N, D), key (B, M, D) -> (B, N)."""
        mean_key, lse = _attend(query.unsqueeze(1), key.unsqueeze(1), 1 / temperature, kernel)
        ctx.save_for_backward(mean_key.squeeze(1))
        ctx.temperature = temperature
        return lse.reshape(len(query), -1)[:, : query.shape[1]]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (mean_key,) = ctx.saved_tensors
        grad_query = (grad / ctx.temperature).unsqueeze(-1) * mean_key
        return grad_query.to(mean_key.dtype), None, None, None


def _attend(query: Tensor, key: Tensor, scale: float, kernel: str) -> tuple[Tensor, Tensor]:
    aten = torch.ops.aten
    if kernel == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, key, scale=scale)
    if kernel == "flash":
        return aten._scaled_dot_product_flash_attention(query, key, key, scale=scale)[:2]
    attend = getattr(aten, f"_scaled_dot_product_{kernel}_attention")  # cudnn, efficient
    return attend(query, key, key, None, True, scale=scale)[:2]


def attention_kernels(device: torch.device, dtype: torch.dtype, dim: int) -> dict[str, str]:
    """The fused attention kernels for a device and dtype: name -> ``"ok"`` or why not."""
    if device.type == "cpu":
        return {"cpu": "ok"}
    if dtype == torch.float64:
        return {"efficient": "no fused attention in float64"}
    aligned = "ok" if dim % 8 == 0 else f"needs D to be a multiple of 8, D is {dim}"
    if dtype == torch.float32:
        return {"efficient": aligned}
    narrow = aligned if dim <= 256 else f"needs D <= 256, D is {dim}"
    return {"flash": narrow, "cudnn": narrow, "efficient": aligned}


def attention_info_nce(
    kernel: str,
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float,
) -> Tensor:
    """InfoNCE over fused attention; keys without gradient."""
    query, key = query.unsqueeze(0), positive_key.unsqueeze(0)
    return _attention(kernel, query, key, negative_keys, temperature)


def attention_patch_nce(
    kernel: str,
    query_features: list[Tensor],
    key_features: list[Tensor],
    *,
    temperature: float = 0.07,
    negatives: str = "image",
) -> Tensor:
    """PatchNCE over fused attention, layer after layer."""
    total = 0.0
    for query, key in zip(query_features, key_features, strict=True):
        if negatives == "batch":
            query, key = query.flatten(0, 1).unsqueeze(0), key.flatten(0, 1).unsqueeze(0)
        total = total + _attention(kernel, query, key, None, temperature, SELF_LOGIT)
    return total / len(query_features)


def _attention(
    kernel: str,
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    temperature: float,
    self_logit: float | None = None,
) -> Tensor:
    """InfoNCE of (B, N, D); keys, and negatives (M, D), without gradient."""
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    positive = wide((query * key).sum(dim=-1)) / temperature
    if negatives is None:
        lse = LseAttention.apply(query, key, temperature, kernel)
    else:
        negatives = F.normalize(negatives, dim=-1).expand(len(query), -1, -1)
        lse = LseAttention.apply(query, negatives, temperature, kernel)
        lse = torch.logaddexp(lse, positive)
    if self_logit is not None:
        lse = torch.logaddexp(lse, torch.full_like(lse, self_logit / temperature))
    return (lse - positive).mean()
