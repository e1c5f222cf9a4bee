"""Losses of repositories that are no packages, against their equations: SupContrast, CUT and solo-learn."""

import types

import pytest
import torch
import torch.nn.functional as F
from against import assert_same, draw, similar

from fastnce.integrations import cut, solo, supcontrast

FEATURES = F.normalize(
    torch.stack([draw(6, 8), draw(6, 8) + 0.5 * draw(6, 8, seed=1), draw(6, 8, seed=2)], dim=1),
    dim=2,
)
LABELS = torch.tensor([0, 1, 0, 2, 1, 3])
MASK = (draw(6, 6, seed=3) > 0.5).double() * draw(6, 6, seed=4).abs()


def sup_con(
    features, labels=None, mask=None, temperature=0.07, contrast_mode="all", base_temperature=0.07
):
    count, views = features.shape[:2]
    rows = torch.cat(features.flatten(2).unbind(1))
    if mask is None:
        labels = torch.arange(count) if labels is None else labels.flatten()
        mask = labels[:, None] == labels
    itself = torch.eye(len(rows), dtype=torch.bool)
    mask = mask.to(rows).repeat(views, views) * ~itself
    logits = rows @ rows.T / temperature
    log_probability = logits - logits.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    total = mask.sum(1)
    losses = -(mask * log_probability).sum(1) / torch.where(total < 1e-6, 1, total)
    if contrast_mode == "one":
        losses = losses[:count]
    return losses.mean() * temperature / base_temperature


GIVEN = {
    "nothing": {},
    "labels": {"labels": LABELS},
    "labels as a column": {"labels": LABELS[:, None]},
    "labels of floats": {"labels": LABELS / 3},
    "mask": {"mask": MASK},
    "mask of labels": {"mask": LABELS[:, None] == LABELS},
}


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"contrast_mode": "one"}, {"temperature": 0.3, "base_temperature": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("given", GIVEN)
def test_supcontrast(given, options, views):
    """Rows of no unit length too; with one view some have no positive, and count as 0."""
    ours = supcontrast.SupConLoss(**options)
    views = 2 if given == "nothing" else views  # with one no row would have a positive
    rows = 0.4 * FEATURES[:, :views]
    for x in (rows, rows.view(6, views, 2, 4)):
        assert_same(
            lambda y: ours(y, **GIVEN[given]), lambda y: sup_con(y, **GIVEN[given], **options), x
        )


def test_supcontrast_without_positives():
    rows = FEATURES[:, :1].clone().requires_grad_()
    loss = supcontrast.SupConLoss()(rows)
    loss.backward()
    assert loss == 0 and not rows.grad.any()


def test_what_supcontrast_refuses():
    with pytest.raises(
        ValueError, match=r"features must have the shape \(N, views, ...\), got \(6, 8\)"
    ):
        supcontrast.SupConLoss()(FEATURES[:, 0])
    with pytest.raises(ValueError, match="labels and mask both"):
        supcontrast.SupConLoss()(FEATURES, LABELS, MASK)
    with pytest.raises(ValueError, match=r"labels must be one for each of 6 samples, got \(5,\)"):
        supcontrast.SupConLoss()(FEATURES, LABELS[:5])
    with pytest.raises(ValueError, match="contrast_mode must be one of"):
        supcontrast.SupConLoss(contrast_mode="two")


def patch_nce(query, key, images, temperature):
    """A loss for each patch: its own key, and the keys of its image with -10 in the place of its own."""
    key = key.detach()
    positive = (query * key).sum(1, keepdim=True)
    query, key = (x.view(images, -1, x.shape[1]) for x in (query, key))
    among = query @ key.mT
    itself = torch.eye(among.shape[1], dtype=torch.bool)
    among = among.masked_fill(itself, -10.0).flatten(0, 1)
    logits = torch.cat([positive, among], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits)).long(), reduction="none")


@pytest.mark.parametrize("temperature", [0.07, 4.0])  # at 4 the constant is seen
@pytest.mark.parametrize("together", [False, True])
def test_cut(together, temperature):
    opt = types.SimpleNamespace(
        batch_size=3, nce_T=temperature, nce_includes_all_negatives_from_minibatch=together
    )
    query = draw(12, 8, unit=True)
    key = F.normalize(similar(query), dim=1)
    images = 1 if together else 3
    assert_same(cut.PatchNCELoss(opt), lambda *x: patch_nce(*x, images, temperature), query, key)
    assert cut.PatchNCELoss(opt)(query, key).shape == (12,)


@pytest.mark.parametrize("use_mlp", [False, True])
def test_cut_samples(use_mlp):
    """Patches of the same places in all images, projected and of length 1; another's places are taken over."""
    maps = [draw(2, 3, 5, 4), draw(2, 6, 2, 3, seed=1)]
    sampler = cut.PatchSampleF(use_mlp=use_mlp, nc=7)
    sampler.create_mlp(maps)
    sampler.double()
    rows, ids = sampler(maps, 6)
    assert [x.shape for x in ids] == [(6,), (6,)]
    assert all(len(x.unique()) == 6 for x in ids)
    for layer, (x, got, at) in enumerate(zip(maps, rows, ids, strict=True)):
        expected = torch.cat([image.flatten(1).T[at] for image in x])
        if use_mlp:
            first, second = (sampler.state_dict()[f"mlp_{layer}.{i}.weight"] for i in (0, 2))
            expected = (expected @ first.T).relu() @ second.T
        expected = expected / (expected.norm(dim=1, keepdim=True) + 1e-7)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    again, same = sampler(maps, 6, ids)
    assert all(map(torch.equal, again + same, rows + ids))


def test_what_cut_refuses():
    opt = types.SimpleNamespace(
        batch_size=5, nce_T=0.07, nce_includes_all_negatives_from_minibatch=False
    )
    with pytest.raises(ValueError, match="init_type must be 'normal', got 'xavier'"):
        cut.PatchSampleF(init_type="xavier")
    with pytest.raises(
        ValueError, match=r"feat_q has 12 rows, which are no multiple of opt.batch_size=5"
    ):
        cut.PatchNCELoss(opt)(*draw(2, 12, 8))


@pytest.mark.parametrize("views", [2, 3])
def test_solo_simclr(views):
    def equation(z, temperature):
        z, index = F.normalize(z, dim=1), torch.arange(4).repeat(views)
        e = torch.exp(z @ z.T / temperature)
        same = index[:, None] == index
        positive = (e * (same ^ torch.eye(len(z), dtype=torch.bool))).sum(1)
        return -torch.log(positive / (positive + (e * ~same).sum(1))).mean()

    rows, index = draw(4 * views, 8), torch.arange(4).repeat(views)
    assert_same(lambda z: solo.simclr_loss_func(z, index), lambda z: equation(z, 0.1), rows)
    assert_same(lambda z: solo.simclr_loss_func(z, index, 0.4), lambda z: equation(z, 0.4), rows)


def test_solo_moco_and_nnclr():
    query, key, queue = draw(5, 8, unit=True), draw(5, 8, seed=1), draw(8, 20, seed=2)

    def moco(query, key, queue):
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], dim=1) / 0.1
        return F.cross_entropy(logits, torch.zeros(5).long())

    def nnclr(nn, p):
        return F.cross_entropy(
            F.normalize(nn, dim=1) @ F.normalize(p, dim=1).T / 0.1, torch.arange(5)
        )

    assert_same(solo.mocov2plus_loss_func, moco, query, key, queue)
    assert_same(solo.nnclr_loss_func, nnclr, query, key)
