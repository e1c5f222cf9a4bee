"""Golden values of the losses, from running the published implementations in fp32 on a CPU; on every backend."""

import golden
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce import conditional_contrastive, info_nce, patch_nce, reference
from fastnce.systems.class_losses import d2d_ce


def sines(*shape: int, step: float, start: float) -> Tensor:
    return golden.sines(*shape, step=step, start=start).requires_grad_()


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


# Of Contrastive Feature Loss: the losses of both directions, the gradients' norms of their sum, and that of queries in the second.
CFL = {
    "published": (0.07, True, True, 12.493148, 10.641016, 1.970279, 1.949162, None),
    "flowing": (0.07, True, False, 12.493148, 10.641016, 3.358137, 3.618330, 2.132257),
    "without": (0.07, False, True, 9.336725, 8.602188, 2.525839, 2.232710, None),
    "without, flowing": (0.07, False, False, 9.336725, 8.602188, 5.474612, 4.603101, 3.003738),
    "0.3": (0.3, True, True, 3.448216, 2.985536, 0.430288, 0.451164, None),
    "1": (1.0, True, True, 2.010364, 1.941072, 0.126286, 0.124874, None),
}


@pytest.mark.parametrize("name", CFL)
def test_contrastive_feature_loss(name, patches, backend):
    q, k = patches
    temperature, negatives, detached, there, back, of_q, of_k, of_q_back = CFL[name]
    options = {"temperature": temperature, "query_negatives": negatives, "backend": backend}
    assert patch_nce(q, k, **options).item() == pytest.approx(there, abs=3e-6)
    second = patch_nce(k, q, detach_keys=detached, **options)
    assert second.item() == pytest.approx(back, abs=3e-6)
    both = 2 * patch_nce(q, k, symmetric=True, detach_keys=detached, **options)
    assert both.item() == pytest.approx(there + back, abs=6e-6)
    assert norms(both, q, k) == pytest.approx([of_q, of_k], abs=2e-6)
    if of_q_back is None:
        assert torch.autograd.grad(second, q, allow_unused=True) == (None,)
    else:
        assert norms(second, q) == pytest.approx([of_q_back], abs=2e-6)


def test_contrastive_feature_loss_of_each_patch_and_of_maps(patches, backend):
    """The published sum over maps has the weights 2^l / 31 / 5 of both directions, times 10."""
    losses = reference.patch_nce(*patches, 0.07, self_logit=-10.0, query_negatives=True)
    golden = [1.264472, 6.556015, 21.565695, 24.226965, 11.753232, 1.269177, 9.832424, 23.477196]
    assert losses.flatten().tolist() == pytest.approx(golden, abs=6e-6)
    maps = [
        (sines(2, 4, 8, step=0.37 + 0.1 * i, start=1), sines(2, 4, 8, step=0.53 + 0.05 * i, start=0.2))
        for i in range(5)
    ]  # fmt: skip
    options = {"symmetric": True, "query_negatives": True, "detach_keys": True, "backend": backend}
    each = [2 * patch_nce(*pair, **options).item() for pair in maps]
    golden = [23.134163, 22.338459, 18.138752, 2.254733, 38.332802]
    assert each == pytest.approx(golden, abs=6e-6)
    queries, keys = zip(*maps[:4], strict=True)
    weights = [2 * 10 * 2**i / 31 / 5 for i in range(4)]
    total = patch_nce(queries, keys, layer_weights=weights, **options)
    assert total.item() == pytest.approx(10.219609, abs=4e-6)


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
