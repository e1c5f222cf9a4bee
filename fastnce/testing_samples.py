"""The sample inputs of every op, in every form that it has; :mod:`fastnce.testing` runs and judges them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One call of an op: its arguments by name.

    The gradients of the tensors that have ``requires_grad`` are part of the result.
    """

    name: str
    arguments: dict[str, object]

    def __repr__(self) -> str:
        return self.name


def rows(
    *shape: int, dtype: torch.dtype, device: str, generator: torch.Generator, grad: bool = True
) -> Tensor:
    """Gaussian rows; the same numbers for every dtype, up to rounding."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(device, dtype).requires_grad_(grad)


def _similar(x: Tensor, generator: torch.Generator) -> Tensor:
    """Rows whose cosine with those of ``x`` is about 0.8, as positives have during training."""
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
    return (0.8 * x.detach() + 0.6 * noise).to(x.dtype).requires_grad_()


def _info_nce(make: Callable, generator: torch.Generator) -> Iterator[Sample]:
    query = make(33, 20)
    pair = {"query": query, "positive_key": _similar(query, generator)}
    tau = torch.tensor(0.1, requires_grad=True)
    yield Sample("in_batch", pair)
    yield Sample("symmetric", {**pair, "symmetric": True, "temperature": tau})
    yield Sample("none", {**pair, "reduction": "none", "temperature": tau})
    yield Sample("symmetric_none", {**pair, "symmetric": True, "reduction": "none"})
    queue = {**pair, "negative_keys": make(70, 20)}
    yield Sample("queue", {**queue, "temperature": tau})
    yield Sample("queue_none", {**queue, "reduction": "none"})
    yield Sample("queue_in_batch", {**queue, "in_batch_negatives": True, "reduction": "sum"})
    own = {**pair, "negative_keys": make(33, 9, 20)}
    yield Sample("own", {**own, "reduction": "none", "temperature": tau})
    yield Sample("own_in_batch", {**own, "in_batch_negatives": True, "temperature": tau})
    small = make(8, 6)
    dot = {"query": small, "positive_key": _similar(small, generator), "normalize": False}
    yield Sample("dot", {**dot, "temperature": torch.tensor(1.5, requires_grad=True)})
    yield Sample("dot_symmetric", {**dot, "symmetric": True, "temperature": 1.5})
    query = make(3, 17, 24)
    batched = {"query": query, "positive_key": _similar(query, generator)}
    yield Sample("batched", {**batched, "temperature": tau})
    yield Sample("batched_symmetric", {**batched, "symmetric": True, "reduction": "none"})
    yield Sample("batched_queue", {**batched, "negative_keys": make(40, 24)})
    yield Sample("batched_own", {**batched, "negative_keys": make(3, 17, 5, 24)})


def _patch_nce(make: Callable, generator: torch.Generator) -> Iterator[Sample]:
    tau = torch.tensor(0.5, requires_grad=True)
    query = make(2, 33, 20)
    pair = {"query_features": query, "key_features": _similar(query, generator)}
    yield Sample("image", pair)
    yield Sample("batch", {**pair, "negatives": "batch"})
    yield Sample("self_logit", {**pair, "temperature": torch.tensor(2.0, requires_grad=True)})
    yield Sample("detached", {**pair, "key_features": pair["key_features"].detach()})
    queries = [make(2, 16, 8), make(2, 33, 27), make(2, 5, 64)]
    layers = {
        "query_features": queries,
        "key_features": [_similar(x, generator).detach() for x in queries],
    }
    yield Sample("layers", {**layers, "temperature": tau})
    yield Sample("layers_batch", {**layers, "negatives": "batch"})


def _conditional_contrastive(make: Callable, generator: torch.Generator) -> Iterator[Sample]:
    embeddings = make(34, 20)
    labels = torch.randint(5, (34,), generator=generator).to(embeddings.device)
    both = {"embeddings": embeddings, "proxies": _similar(embeddings, generator), "labels": labels}
    yield Sample("mean", both)
    yield Sample("temperature", {**both, "temperature": torch.tensor(0.2, requires_grad=True)})
    yield Sample("none", {**both, "temperature": 0.1, "reduction": "none"})
    yield Sample("int32_labels", {**both, "labels": labels.int(), "reduction": "sum"})
    yield Sample("detached_proxies", {**both, "proxies": both["proxies"].detach()})


def _sample_patches(make: Callable, generator: torch.Generator) -> Iterator[Sample]:
    def ids(count: int, size: int) -> Tensor:
        return torch.randperm(size, generator=generator)[:count].to(make(1).device)

    one = {"features": make(2, 12, 9, 7), "patch_ids": ids(16, 63)}
    yield Sample("one", one)
    yield Sample("one_normalized", {**one, "normalize": True})
    repeated = {**one, "patch_ids": torch.tensor([5, 5, 0, 62, 5]).to(make(1).device)}
    yield Sample("repeated", repeated)
    yield Sample("repeated_normalized", {**repeated, "normalize": True})
    several = {
        "features": [make(2, 3, 16, 16), make(2, 40, 8, 5), make(2, 9, 1, 1)],
        "patch_ids": [ids(50, 256), ids(40, 40), ids(1, 1)],
    }
    yield Sample("several", several)
    yield Sample("several_normalized", {**several, "normalize": True})


def _nt_xent(make: Callable, generator: torch.Generator) -> Iterator[Sample]:
    z1 = make(17, 20)
    views = {"z1": z1, "z2": _similar(z1, generator)}
    yield Sample("mean", views)
    yield Sample("none", {**views, "temperature": 0.1, "reduction": "none"})
    yield Sample("temperature", {**views, "temperature": torch.tensor(0.2, requires_grad=True)})


def _sup_con(make: Callable, generator: torch.Generator) -> Iterator[Sample]:
    features = make(34, 20)
    labels = torch.randint(8, (34,), generator=generator)
    labels[3] = 99  # a class of one
    labelled = {"features": features, "labels": labels.to(features.device)}
    yield Sample("mean", labelled)
    yield Sample("none", {**labelled, "reduction": "none"})
    yield Sample("temperature", {**labelled, "temperature": torch.tensor(0.2, requires_grad=True)})


def _pairwise_cosine_similarity(make: Callable, generator: torch.Generator) -> Iterator[Sample]:
    yield Sample("two", {"x": make(12, 20), "y": make(7, 20)})
    yield Sample("itself", {"x": make(12, 20)})
    batched = {"x": make(2, 3, 12, 20), "y": make(2, 3, 7, 20)}
    yield Sample("batched", {**batched, "temperature": torch.tensor(0.2, requires_grad=True)})


_MAKERS = {
    "info_nce": _info_nce,
    "patch_nce": _patch_nce,
    "conditional_contrastive": _conditional_contrastive,
    "sample_patches": _sample_patches,
    "nt_xent": _nt_xent,
    "sup_con": _sup_con,
    "pairwise_cosine_similarity": _pairwise_cosine_similarity,
}


def _table_entry(maker: Callable) -> Callable[..., Iterator[Sample]]:
    def samples(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[Sample]:
        make = functools.partial(rows, dtype=dtype, device=device, generator=generator)
        return maker(make, generator)

    return samples


# op -> function (dtype, device, generator) -> Samples in every form that the op has.
SAMPLE_INPUTS: dict[str, Callable[..., Iterator[Sample]]] = {
    op: _table_entry(maker) for op, maker in _MAKERS.items()
}
