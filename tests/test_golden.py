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


def norms(loss: Tensor, *leaves: Tensor) -> list[float]:
    """Of the gradients."""
    return [x.norm().item() for x in torch.autograd.grad(loss, leaves, retain_graph=True)]


@pytest.fixture
def patches() -> tuple[Tensor, Tensor]:
    """Two images of four patches with eight channels: queries and keys."""
    return sines(2, 4, 8, step=0.37, start=1.0), sines(2, 4, 8, step=0.53, start=0.2)


def test_patch_nce(patches, backend):
    """Of each image, in both directions; of the batch; and where the constant logit is in effect."""
    q, k = patches
    loss, back = patch_nce(q, k, backend=backend), patch_nce(k, q, backend=backend)
    assert loss.item() == pytest.approx(9.336725, abs=3e-6)
    assert norms(loss, q) == pytest.approx([2.525839], abs=2e-6)
    (dq,) = torch.autograd.grad(loss, q)
    golden = [0.0327269, 0.0178712, -0.0023163, -0.0222991]
    assert dq[0, 0, :4].tolist() == pytest.approx(golden, abs=1e-7)
    assert back.item() == pytest.approx(8.602188, abs=3e-6)
    assert norms(back, k) == pytest.approx([2.232710], abs=2e-6)
    batch = patch_nce(q, k, negatives="batch", backend=backend)
    assert batch.item() == pytest.approx(10.335029, abs=3e-6)
    assert norms(batch, q) == pytest.approx([2.352371], abs=2e-6)
    warm = patch_nce(q, k, temperature=1.0, backend=backend)
    assert warm.item() == pytest.approx(1.477908, abs=1e-6)


def test_patch_nce_of_each_patch(patches, backend):
    """At t = 0.07 the constant logit vanishes in fp32, so that InfoNCE gives the same numbers one by one."""
    losses = info_nce(*patches, reduction="none", backend=backend).flatten().tolist()
    golden = [0.790217, 0.262570, 20.656017, 20.127344, 6.135272, 1.2e-7, 4.296966, 22.425415]
    # fp32's spacing at 20 is 1.9e-6, and the published code divides by the norm plus 1e-7.
    assert losses == pytest.approx(golden, abs=6e-6)


@pytest.mark.parametrize(
    ("temperature", "loss", "of_embeddings", "of_table"),
    [(1.0, 1.253212, 0.184542, 0.070878), (0.5, 1.650104, 0.416977, 0.154027)],
)
def test_conditional_contrastive(temperature, loss, of_embeddings, of_table, backend):
    embeddings, table = sines(6, 8, step=0.37, start=1.0), sines(3, 8, step=0.53, start=0.2)
    labels = torch.tensor([0, 1, 2, 0, 1, 0])
    # The published code normalises first; the op does so too.
    rows = F.normalize(embeddings), F.normalize(table)[labels]
    got = conditional_contrastive(*rows, labels, temperature=temperature, backend=backend)
    assert got.item() == pytest.approx(loss, abs=1e-6)
    assert norms(got, embeddings, table) == pytest.approx([of_embeddings, of_table], abs=1e-6)


def test_d2d_ce():
    embeddings, classes = sines(6, 8, step=0.37, start=1.0), sines(3, 8, step=0.53, start=0.2)
    labels = torch.tensor([0, 1, 2, 0, 1, 0])
    loss = d2d_ce(embeddings, classes[labels], labels, temperature=0.5, margin=0.98)
    assert loss.item() == pytest.approx(2.811237, rel=1e-6)
    assert norms(loss, embeddings) == pytest.approx([0.495175], rel=3e-6)
    alone = d2d_ce(embeddings[:1], classes[:1], torch.tensor([2]))
    # log(exp(-a)) + a: nothing to tell it from.
    assert alone.item() == pytest.approx(0.0, abs=1e-6)
    assert torch.autograd.grad(alone, embeddings)[0].isfinite().all()
