"""A fused backend in its shortest form: the reference, with autograd for the gradients.

It stands in for the compiled one where that is not built, so that the autograd Functions of :mod:`fastnce.ops` are always
tested, and it is what the tests break on purpose to show that a wrong kernel is noticed.
"""

import functools

import torch

from fastnce import reference


def available() -> str:
    return "ok"


def supports(op: str, device_type: str, dtype: torch.dtype) -> str:
    fused = (
        "info_nce",
        "info_nce_fp8",
        "patch_nce",
        "conditional_contrastive",
        "sample_patches",
        "tap_patches",
        "nt_xent",
        "sup_con",
        "pairwise_cosine_similarity",
    )
    return "ok" if op in fused else f"{op} has no kernel here. Use backend='torch'"


def _gradients(losses, upstream, inputs, needs):
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(losses, wanted, upstream.expand_as(losses)) if wanted else ())
    return tuple(next(found) if need else None for need in needs)


def _leaves(inputs, needs):
    """Each input on its own, so that one tensor passed twice gets two gradients."""
    pairs = zip(inputs, needs, strict=True)
    return [
        x.detach().requires_grad_(need) if isinstance(x, torch.Tensor) else x for x, need in pairs
    ]


def info_nce_forward(
    query, key, negatives, temperature, *, grad_scale, mean=False, needs, **options
):
    with torch.enable_grad():
        inputs = _leaves((query, key, negatives, temperature), needs)
        losses = reference.info_nce(*inputs, **options)
        grads = (None,) * 4
        if grad_scale is not None:
            weight = grad_scale / losses.numel() if mean else grad_scale
            grads = _gradients(losses, losses.new_tensor(weight), inputs, needs)
    lse = losses.detach().new_zeros((2, *losses.shape) if options["symmetric"] else losses.shape)
    return losses.detach(), lse, grads


def info_nce_backward(grad_loss, query, key, negatives, temperature, lse, *, needs, **options):
    with torch.enable_grad():
        inputs = _leaves((query, key, negatives, temperature), needs)
        return _gradients(reference.info_nce(*inputs, **options), grad_loss, inputs, needs)


info_nce_fp8_forward = functools.partial(info_nce_forward, similarity_dtype=torch.float8_e4m3fn)
info_nce_fp8_backward = functools.partial(info_nce_backward, similarity_dtype=torch.float8_e4m3fn)


def patch_nce_forward(
    queries,
    keys,
    temperature,
    *,
    self_logit,
    loss_scales,
    grad_scales,
    loss_layers=0,
    grad_layers=0,
    needs,
):
    options = {"normalize": True, "symmetric": False, "in_batch": True, "self_logit": self_logit}
    need_queries, need_keys, need_temperature = needs
    loss, grad_temperature, grads = 0.0, 0.0, []
    for layer, (query, key) in enumerate(zip(queries, keys, strict=True)):
        counts = [query.shape[:-1].numel() * layers if layers else 1 for layers in (loss_layers, grad_layers)]
        loss_scale = loss_scales[layer] / counts[0]
        scale = None if not grad_scales else grad_scales[layer] / counts[1]
        needed = (need_queries[layer], need_keys[layer], False, need_temperature)
        losses, _, found = info_nce_forward(
            query, key, None, temperature, **options, grad_scale=scale, needs=needed
        )
        loss = loss + losses.sum() * loss_scale
        grads.append(found)
        if found[3] is not None:
            grad_temperature = grad_temperature + found[3] * (loss_scale / scale)
    grad_temperature = grad_temperature if need_temperature and grad_scales else None
    return loss, ([found[0] for found in grads], [found[1] for found in grads], grad_temperature)


def conditional_contrastive_forward(
    embeddings, proxies, labels, temperature, *, grad_scale, mean=False, needs
):
    with torch.enable_grad():
        e, p, t = inputs = _leaves((embeddings, proxies, temperature), needs)
        losses = reference.conditional_contrastive(e, p, labels, t)
        grads = (None,) * 3
        if grad_scale is not None:
            weight = grad_scale / len(losses) if mean else grad_scale
            grads = _gradients(losses, losses.new_tensor(weight), inputs, needs)
    return losses.detach(), losses.detach().new_zeros(2, len(losses)), grads


def conditional_contrastive_backward(
    grad_loss, embeddings, proxies, labels, temperature, lse, *, needs
):
    with torch.enable_grad():
        e, p, t = inputs = _leaves((embeddings, proxies, temperature), needs)
        losses = reference.conditional_contrastive(e, p, labels, t)
        return _gradients(losses, grad_loss, inputs, needs)


def sup_con_forward(features, labels, temperature, *, grad_scale, mean, needs):
    with torch.enable_grad():
        x, t = inputs = _leaves((features, temperature), needs)
        losses, has_positive = reference.sup_con(x, labels, t)
        grads = (None,) * 2
        if grad_scale is not None:
            weight = grad_scale / max(1, int(has_positive.sum())) if mean else grad_scale
            grads = _gradients(losses, losses.new_ones(()) * weight, inputs, needs)
    return losses.detach(), has_positive, losses.detach().new_zeros(len(losses)), grads


def sup_con_backward(grad_loss, features, labels, temperature, lse, *, needs):
    with torch.enable_grad():
        x, t = inputs = _leaves((features, temperature), needs)
        return _gradients(reference.sup_con(x, labels, t)[0], grad_loss, inputs, needs)


def pairwise_cosine_similarity_forward(x, y, temperature):
    return reference.pairwise_cosine_similarity(x, x if y is None else y, temperature)


def pairwise_cosine_similarity_backward(grad, x, y, temperature, *, needs):
    with torch.enable_grad():
        x, y, t = inputs = _leaves((x, y, temperature), needs)
        out = reference.pairwise_cosine_similarity(x, x if y is None else y, t)
        return _gradients(out, grad, inputs, needs)


def sample_patches_forward(features, patch_ids, normalize):
    patches, inverse_norms = [], []
    for feature, ids in zip(features, patch_ids, strict=True):
        raw = reference.sample_patches(feature, ids, False)
        patches.append(reference.sample_patches(feature, ids, normalize).contiguous())
        wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
        largest = wide.abs().amax(
            dim=-1, keepdim=True
        )  # the square of a tiny or huge norm is out of range
        norm = (wide / largest.clamp(min=torch.finfo(wide.dtype).tiny)).norm(dim=-1) * largest[
            ..., 0
        ]
        inverse_norms.append(torch.where(norm > 0, 1 / norm, 0))
    return patches, inverse_norms if normalize else []


def sample_patches_backward(
    grad_patches, patches, inverse_norms, patch_ids, feature_likes, normalize
):
    grads = []
    for i, (grad, like, ids) in enumerate(zip(grad_patches, feature_likes, patch_ids, strict=True)):
        if normalize:
            unit, wide = patches[i].to(inverse_norms[i].dtype), grad.to(inverse_norms[i].dtype)
            wide = wide - unit * (unit * wide).sum(dim=-1, keepdim=True)
            grad = wide * inverse_norms[i].unsqueeze(-1)
        flat = grad.new_zeros(like.shape).flatten(2).index_add_(2, ids, grad.mT)
        grads.append(torch.empty_like(like).copy_(flat.view(like.shape)))
    return grads


def sample_patches_add_(maps, grad_patches, patches, inverse_norms, patch_ids, normalize):
    grads = sample_patches_backward(
        grad_patches, patches, inverse_norms, patch_ids, maps, normalize
    )
    for x, grad in zip(maps, grads, strict=True):
        x.add_(grad)
