"""Calls that make the ops launch every kernel in every form; on tensors without memory, for the compiler."""

from __future__ import annotations

import torch
from launches import Launch, recorded

from fastnce import triton_kernels

IN_BATCH = {"normalize": True, "symmetric": False, "in_batch": True, "self_logit": None}
DETACHED = {"symmetric": True, "detach_keys": True}
FP8 = {"similarity_dtype": torch.float8_e4m3fn}
COUNT = 16384


def launches(depth: int, dtype: torch.dtype) -> list[Launch]:
    """All different launches of losses of rows of ``depth``."""
    with recorded() as found:
        _info_nce(depth, dtype, COUNT)
        _losses(depth, dtype, COUNT)
        _masked(depth, dtype, COUNT)
    return list(dict.fromkeys(found))


def fp8_launches(depth: int, dtype: torch.dtype) -> list[Launch]:
    """Likewise those with similarities in fp8, from compute capability 8.9 on."""
    with recorded() as found:
        _info_nce(depth, dtype, COUNT, fp8=True)
    return list(dict.fromkeys(found))


def sampling_launches(dtype: torch.dtype) -> list[Launch]:
    """All different launches of sample_patches."""
    with recorded() as found:
        _sampling(dtype)
    return list(dict.fromkeys(found))


def _rows(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _info_nce(depth: int, dtype: torch.dtype, count: int, fp8: bool = False) -> None:
    tau = torch.empty((), device="meta")
    query, key = (_rows(1, count, depth, dtype=dtype) for _ in "qk")
    queue = _rows(4 * count, depth, dtype=dtype)
    own = _rows(1, count, 64, depth, dtype=dtype)
    everything = (True, True, True, True)
    symmetric = {**IN_BATCH, "symmetric": True}
    forms = [
        (None, 0.07, IN_BATCH, (True, False, False, False)),  # one pass
        (None, 0.07, IN_BATCH, (False, True, False, False)),  # sums, then keys alone
        (None, 0.005, IN_BATCH, (True, True, False, False)),  # the running maximum
        (None, tau, symmetric, (True, True, False, True)),
        (None, 0.07, symmetric, (True, True, False, False)),
        (queue, tau, IN_BATCH, everything),
        (own, tau, {**IN_BATCH, "in_batch": False}, everything),
        (None, 5.0, {**IN_BATCH, "normalize": False}, (True, True, False, False)),
    ]
    if fp8:
        forms = [
            (None, 0.07, {**IN_BATCH, **FP8}, (True, False, False, False)),
            (None, tau, {**symmetric, **FP8}, (True, True, False, True)),
            (queue, 0.005, {**IN_BATCH, **FP8}, (True, True, True, False)),
        ]
    for negatives, temperature, options, needs in forms:
        scale = {"grad_scale": 1.0, "needs": needs}
        loss, lse, _ = triton_kernels.info_nce_forward(
            query, key, negatives, temperature, **options, **scale
        )
        triton_kernels.info_nce_backward(
            loss, query, key, negatives, temperature, lse, **options, needs=needs
        )


def _losses(depth: int, dtype: torch.dtype, count: int) -> None:
    tau = torch.empty((), device="meta")
    query, key = (_rows(1, count, depth, dtype=dtype) for _ in "qk")
    layers = [_rows(2, count, depth, dtype=dtype), _rows(2, count // 2, depth, dtype=dtype)]
    negatives = {"query_negatives": True}
    forms = ({}, negatives, negatives | DETACHED)
    for temperature, options in (*((0.07, form) for form in forms), (tau, forms[-1])):
        triton_kernels.patch_nce_forward(
            layers,
            layers,
            temperature,
            self_logit=-10.0,
            **options,
            loss_scales=[0.1, 0.2],
            grad_scales=[0.1, 0.2],
            needs=([True, True], [True, True], temperature is tau),
        )
    labels = torch.empty(count, dtype=torch.int64, device="meta")
    for temperature, needs in ((0.07, (True, True, False)), (tau, (True, True, True))):
        triton_kernels.conditional_contrastive_forward(
            query[0], key[0], labels, temperature, grad_scale=1.0, needs=needs
        )
        triton_kernels.sup_con_forward(
            query[0], labels, temperature, grad_scale=1.0, mean=True, needs=needs[1:]
        )
        # One rank's rows against another's, and against themselves.
        for y, own in ((torch.cat([query[0]] * 2), False), (query[0], True)):
            block = (query[0], y, labels, labels if own else torch.cat([labels] * 2), temperature)
            triton_kernels.labelled_lse_forward(*block, own=own)
            states = (_rows(len(x), 4, dtype=torch.float64) for x in block[:2])
            triton_kernels.labelled_lse_backward(*block, *states, own=own)
    _sigmoid(query[0], key[0], labels, tau)
    matrix = triton_kernels.pairwise_cosine_similarity_forward(query, key, tau)
    triton_kernels.pairwise_cosine_similarity_backward(matrix, query, key, tau, needs=(True,) * 3)


def _sigmoid(query: torch.Tensor, key: torch.Tensor, labels: torch.Tensor, tau) -> None:
    none = torch.empty(0, dtype=torch.int64, device="meta")
    for of_labels, ids, temperature in (
        (none, (None, None), 0.1),
        (torch.cat([labels, labels]), (labels, labels), tau),
    ):
        inputs = (query, key, tau, of_labels, *ids, temperature)
        options = {"paired": len(of_labels) == 0, "normalize": True, "needs": (True,) * 4}
        triton_kernels.sigmoid_contrastive_forward(*inputs, **options, grad_scale=None)
        triton_kernels.sigmoid_contrastive_forward(*inputs, **options, grad_scale=1.0, mean=True)


def _masked(depth: int, dtype: torch.dtype, count: int) -> None:
    tau = torch.empty((), device="meta")
    query, key = (_rows(1, count, depth, dtype=dtype) for _ in "qk")
    queue, own = _rows(4 * count, depth, dtype=dtype), _rows(1, count, 64, depth, dtype=dtype)
    guide, of_queue = (
        _rows(1, count, 100, dtype=torch.float32),
        _rows(4 * count, 100, dtype=torch.float32),
    )
    ids, of_all, of_own = (
        torch.empty(shape, dtype=torch.int64, device="meta")
        for shape in ((1, count), (4 * count,), (1, count, 64))
    )
    options = {"normalize": True, "decoupled": False, "symmetric": False, "in_batch": True}
    both = (True, True, True, True)
    for negatives, masks, temperature, changed, needs in (
        (None, (ids, ids, None, None, None, None), 0.07, {}, (True, True, False, False)),
        (None, (ids, ids, None, None, None, None), tau, {"symmetric": True}, (True, True, False, True)),
        (queue, (ids, None, of_all, guide, None, of_queue), 0.005, {"in_batch": False}, both),
        (queue, (None, None, None, guide, guide, of_queue), tau, {"decoupled": True}, both),
        (own, (ids, None, of_own, None, None, None), tau, {"in_batch": False}, both),
    ):  # fmt: skip
        inputs, weights = (query, key, negatives, *masks), _rows(1, count, dtype=torch.float32)
        given = options | changed
        for rank in (False, True):
            loss, lse, *_ = triton_kernels.masked_info_nce_forward(
                *inputs, weights, temperature, rank=rank, needs=needs, **given
            )
        triton_kernels.masked_info_nce_backward(
            loss, *inputs, temperature, lse, needs=needs, **given
        )


def _sampling(dtype: torch.dtype) -> None:
    sizes = [(3, 262), (128, 256), (256, 128), (256, 64), (256, 64)]
    maps = [_rows(1, c, n, n, dtype=dtype) for c, n in sizes]
    ids = [torch.empty(256, dtype=torch.int64, device="meta")] * len(maps)
    for normalize in (False, True):
        patches, norms = triton_kernels.sample_patches_forward(maps, ids, normalize)
        triton_kernels.sample_patches_backward(patches, patches, norms, ids, maps, normalize)
