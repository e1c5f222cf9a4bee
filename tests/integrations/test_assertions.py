"""The assertions that the libraries make of their own losses, in our words: of ours, and of theirs where they are installed."""

import importlib
from types import ModuleType

import pytest
import torch
from against import THEIRS, draw, imported

X = draw(8, 12).float()
NEAR, FAR = (X + noise * draw(8, 12, seed=1).float() for noise in (0.1, 3.0))
UNIT, UNIT_NEAR = (torch.nn.functional.normalize(x, dim=1) for x in (X, NEAR))
LABELS = torch.arange(8) // 2


def lightly_refuses_a_temperature_of_zero(module):
    with pytest.raises(ValueError):
        module.NTXentLoss(temperature=0.0)(X, NEAR)


def lightly_exchanges_the_views(module):
    for name in ("NTXentLoss", "DCLLoss", "DCLWLoss"):
        loss = getattr(module, name)()
        torch.testing.assert_close(loss(X, FAR), loss(FAR, X))


def lightly_prefers_views_that_agree(module):
    for name in ("NTXentLoss", "DCLLoss", "DCLWLoss"):
        loss = getattr(module, name)()
        assert loss(X, NEAR) < loss(X, FAR)


def lightly_knows_the_size_of_the_bank(module):
    for size in (-1, (-1, 12)):
        with pytest.raises(ValueError):
            module.NTXentLoss(memory_bank_size=size)


def lightly_with_a_bank_backward_and_the_bank_without_gradient(module):
    loss = module.NTXentLoss(memory_bank_size=(16, 12))
    rows = X.clone().requires_grad_()
    for _ in range(3):
        loss(rows, NEAR).backward()
    assert rows.grad.abs().sum() > 0
    assert not any(x.requires_grad for x in loss.memory_bank.buffers())


def lightly_dcl_has_weights(module):
    weighted = module.DCLLoss(weight_fn=lambda out0, out1: torch.full((len(out0),), 2.0))
    assert weighted(X, NEAR) < module.DCLLoss()(X, NEAR)  # the positive counts twice


def metric_learning_is_zero_without_pairs(module):
    for name in ("NTXentLoss", "SupConLoss"):
        rows = X.clone().requires_grad_()
        loss = getattr(module, name)()(rows, torch.arange(8))
        loss.backward()
        assert loss == 0
        assert not rows.grad.any()


def metric_learning_takes_lengths_for_nothing(module):
    for name in ("NTXentLoss", "SupConLoss"):
        loss = getattr(module, name)()
        torch.testing.assert_close(loss(X, LABELS), loss(7 * X, LABELS))


def metric_learning_takes_half_precision(module):
    for name in ("NTXentLoss", "SupConLoss"):
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            rows = X.to(dtype).requires_grad_()
            getattr(module, name)(temperature=0.5)(rows, LABELS).backward()
            assert rows.grad.isfinite().all()


def metric_learning_wants_a_label_for_each_row(module):
    with pytest.raises(ValueError):
        module.NTXentLoss()(X, LABELS[:5])


def metric_learning_of_two_views_of_each_row(module):
    loss = module.SelfSupervisedLoss(module.NTXentLoss())
    rows, labels = torch.cat([X, NEAR]), torch.arange(8).repeat(2)
    torch.testing.assert_close(loss(X, NEAR), module.NTXentLoss()(rows, labels))


def metric_learning_memory_begins_empty_and_is_full_in_the_end(module):
    alone = module.SupConLoss()
    memory = module.CrossBatchMemory(module.SupConLoss(), 12, memory_size=16)
    torch.testing.assert_close(memory(X, LABELS), alone(X, LABELS))
    for _ in range(3):
        memory(NEAR, LABELS)
    assert memory(X, LABELS) > alone(X, LABELS)  # more to tell apart
    memory.reset_queue()
    torch.testing.assert_close(memory(X, LABELS), alone(X, LABELS))


def info_nce_wants_rows_that_fit(module):
    loss = module.InfoNCE()
    for query, key in ((X[0], X[0]), (X, NEAR[:, :5]), (X, NEAR[:3])):
        with pytest.raises(ValueError):
            loss(query, key)
    with pytest.raises(ValueError):
        module.InfoNCE(negative_mode="paired")(X, NEAR, FAR)
    with pytest.raises(ValueError):
        module.InfoNCE(negative_mode="unpaired")(X, NEAR, FAR[None].repeat(8, 1, 1))


def info_nce_prefers_keys_that_agree(module):
    loss, negatives = module.InfoNCE(), draw(30, 12, seed=4).float()
    assert loss(X, NEAR) < loss(X, FAR)
    assert loss(X, NEAR, negatives) < loss(X, FAR, negatives)
    assert loss(X, NEAR, negatives) < loss(X, NEAR, torch.cat([negatives, X]))


def info_nce_paired_and_unpaired_are_one_where_negatives_are(module):
    negatives = draw(30, 12, seed=4).float()
    paired = module.InfoNCE(negative_mode="paired")(X, NEAR, negatives.repeat(8, 1, 1))
    torch.testing.assert_close(paired, module.InfoNCE()(X, NEAR, negatives))


def info_nce_reduces(module):
    each = module.InfoNCE(reduction="none")(X, NEAR)
    assert each.shape == (8,)
    torch.testing.assert_close(each.mean(), module.InfoNCE()(X, NEAR))
    torch.testing.assert_close(each.sum(), module.InfoNCE(reduction="sum")(X, NEAR))


def open_clip_gives_a_dictionary(module):
    for name, numbers in (("ClipLoss", (10.0,)), ("SigLipLoss", (10.0, -10.0))):
        given = [torch.tensor(x) for x in numbers]
        loss = getattr(module, name)()
        found = loss(UNIT, UNIT_NEAR, *given, output_dict=True)
        assert list(found) == ["contrastive_loss"]
        torch.testing.assert_close(found["contrastive_loss"], loss(UNIT, UNIT_NEAR, *given))


def open_clip_takes_pairs_in_any_order(module):
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    for name, numbers in (("ClipLoss", (10.0,)), ("SigLipLoss", (10.0, -10.0))):
        given = [torch.tensor(x) for x in numbers]
        loss = getattr(module, name)()
        expected = loss(UNIT, UNIT_NEAR, *given)
        torch.testing.assert_close(loss(UNIT[order], UNIT_NEAR[order], *given), expected)
        assert loss(UNIT, UNIT_NEAR[order], *given) > expected


def open_clip_clip_exchanges_the_sides(module):
    scale = torch.tensor(10.0)
    loss = module.ClipLoss()
    torch.testing.assert_close(loss(UNIT, UNIT_NEAR, scale), loss(UNIT_NEAR, UNIT, scale))


def ranking(module, *rows, **options):
    loss = module.MultipleNegativesRankingLoss(None, **options)
    return loss.compute_loss_from_embeddings(list(rows), None)


def sentence_transformers_prefer_documents_that_agree(module):
    assert ranking(module, X, NEAR) < ranking(module, X, FAR)
    assert ranking(module, X, NEAR) < ranking(module, X, NEAR, FAR)  # hard negatives besides


def sentence_transformers_scale_by_the_inverse_temperature(module):
    zero = ranking(module, X, NEAR, scale=1e-6)
    torch.testing.assert_close(zero, torch.tensor(8.0).log(), rtol=1e-4, atol=0)


def sentence_transformers_harden_by_a_strength(module):
    for mode in ("in_batch_negatives", "hard_negatives", "all_negatives"):
        hard = ranking(module, X, NEAR, FAR, hardness_mode=mode, hardness_strength=5.0)
        assert hard != ranking(module, X, NEAR, FAR)
        none = ranking(module, X, NEAR, FAR, hardness_mode=mode, hardness_strength=0.0)
        torch.testing.assert_close(none, ranking(module, X, NEAR, FAR))


def sentence_transformers_name_wrong_options(module):
    for options in (
        {"directions": ("up",)},
        {"partition_mode": "each"},
        {"hardness_mode": "soft"},
        {"directions": ("query_to_query",)},
    ):
        with pytest.raises(ValueError):
            module.MultipleNegativesRankingLoss(None, **options)


MODULES = {
    "lightly": "lightly.loss",
    "metric_learning": "pytorch_metric_learning.losses",
    "info_nce": "info_nce",
    "open_clip": "open_clip.loss",
    "sentence_transformers": "sentence_transformers.sentence_transformer.losses",
}
ASSERTIONS = {
    name: function
    for name, function in list(globals().items())
    if callable(function) and name.startswith(tuple(MODULES))
}
SIDES = ["ours", *(x for x in THEIRS if x != "equation")]


def module_of(name: str, side: str) -> ModuleType:
    library = next(x for x in MODULES if name.startswith(x))
    if side == "library":
        return imported(MODULES[library])
    ours = "pytorch_metric_learning" if library == "metric_learning" else library
    return importlib.import_module(f"fastnce.integrations.{ours}")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ASSERTIONS)
def test_(name, side):
    ASSERTIONS[name](module_of(name, side))
