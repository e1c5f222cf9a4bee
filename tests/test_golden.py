"""Golden values of the losses, from running the published implementations in fp32 on a CPU; on every backend."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce import conditional_contrastive, info_nce, patch_nce
from fastnce.systems.class_losses import d2d_ce


def sines(*shape: int, step: float, start: float) -> Tensor:
    """sin(start + step * i) over the elements in C order, computed in fp64, rounded to fp32."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(start + step * index).float().reshape(shape).requires_grad_()


@pytest.fixture
def patches():
    """Two images of four patches with eight channels: queries and keys, (2, 4, 8)."""
    query, key = sines(8, 8, step=0.37, start=1.0), sines(8, 8, step=0.53, start=0.2)
    return query, key, query.view(2, 4, 8), key.view(2, 4, 8)


def test_patch_nce_of_each_image(patches, backend, needs_support):
    needs_support("patch_nce", backend)
    query, key, q, k = patches
    loss = patch_nce(q, k, backend=backend)
    assert loss.item() == pytest.approx(9.336725, abs=3e-6)
    (dq,) = torch.autograd.grad(loss, query)
    assert dq.norm().item() == pytest.approx(2.525839, abs=2e-6)
    assert dq[0, :4].tolist() == pytest.approx(
        [0.0327269, 0.0178712, -0.0023163, -0.0222991], abs=1e-7
    )
    back = patch_nce(k, q, backend=backend)
    assert back.item() == pytest.approx(8.602188, abs=3e-6)
    (dk,) = torch.autograd.grad(back, key)
    assert dk.norm().item() == pytest.approx(2.232710, abs=2e-6)


def test_patch_nce_of_each_patch(patches, backend, needs_support):
    """At t = 0.07 the constant logit vanishes in fp32, so that InfoNCE gives the same numbers one by one."""
    needs_support("info_nce", backend)
    _, _, q, k = patches
    losses = info_nce(q, k, reduction="none", backend=backend).flatten().tolist()
    golden = [0.790217, 0.262570, 20.656017, 20.127344, 6.135272, 1.2e-7, 4.296966, 22.425415]
    # fp32's spacing at 20 is 1.9e-6, and the published code divides by the norm plus 1e-7.
    assert losses == pytest.approx(golden, abs=6e-6)


def test_patch_nce_of_the_batch(patches, backend, needs_support):
    needs_support("patch_nce", backend)
    query, _, q, k = patches
    loss = patch_nce(q, k, negatives="batch", backend=backend)
    assert loss.item() == pytest.approx(10.335029, abs=3e-6)
    (dq,) = torch.autograd.grad(loss, query)
    assert dq.norm().item() == pytest.approx(2.352371, abs=2e-6)


def test_patch_nce_with_the_constant_logit_in_effect(patches, backend, needs_support):
    needs_support("patch_nce", backend)
    _, _, q, k = patches
    loss = patch_nce(q, k, temperature=1.0, backend=backend)
    assert loss.item() == pytest.approx(1.477908, abs=1e-6)


@pytest.mark.parametrize(
    ("temperature", "loss", "embeddings_norm", "table_norm"),
    [(1.0, 1.253212, 0.184542, 0.070878), (0.5, 1.650104, 0.416977, 0.154027)],
)
def test_conditional_contrastive(
    temperature, loss, embeddings_norm, table_norm, backend, needs_support
):
    needs_support("conditional_contrastive", backend)
    embeddings, table = sines(6, 8, step=0.37, start=1.0), sines(3, 8, step=0.53, start=0.2)
    labels = torch.tensor([0, 1, 2, 0, 1, 0])
    # The published code normalises first; the op does so too.
    got = conditional_contrastive(
        F.normalize(embeddings),
        F.normalize(table)[labels],
        labels,
        temperature=temperature,
        backend=backend,
    )
    assert got.item() == pytest.approx(loss, abs=1e-6)
    of_embeddings, of_table = torch.autograd.grad(got, [embeddings, table])
    assert of_embeddings.norm().item() == pytest.approx(embeddings_norm, abs=1e-6)
    assert of_table.norm().item() == pytest.approx(table_norm, abs=1e-6)


def test_d2d_ce():
    embeddings, classes = sines(6, 8, step=0.37, start=1.0), sines(3, 8, step=0.53, start=0.2)
    labels = torch.tensor([0, 1, 2, 0, 1, 0])
    loss = d2d_ce(embeddings, classes[labels], labels, temperature=0.5, margin=0.98)
    loss.backward()
    assert loss.item() == pytest.approx(2.811237, rel=1e-6)
    assert embeddings.grad.norm().item() == pytest.approx(0.495175, rel=3e-6)


def test_d2d_ce_of_a_sample_alone():
    embeddings, proxies = sines(1, 8, step=0.37, start=1.0), sines(1, 8, step=0.53, start=0.2)
    loss = d2d_ce(embeddings, proxies, torch.tensor([2]))
    loss.backward()
    # log(exp(-a)) + a: nothing to tell it from.
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert embeddings.grad.isfinite().all()
