"""The loss modules are the ops, and the examples in the docstrings run."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn

import fastnce
from fastnce import losses


@pytest.fixture
def rows():
    torch.manual_seed(0)
    return torch.randn(8, 6, requires_grad=True), torch.randn(8, 6)


LABELS = torch.arange(8) % 3
CASES = {
    "info_nce": (losses.InfoNCELoss, lambda q, k: (q, k)),
    "patch_nce": (losses.PatchNCELoss, lambda q, k: (q.view(2, 4, 6), k.view(2, 4, 6))),
    "nt_xent": (losses.NTXentLoss, lambda q, k: (q, k)),
    "sup_con": (losses.SupConLoss, lambda q, k: (q, LABELS)),
    "conditional_contrastive": (losses.ConditionalContrastiveLoss, lambda q, k: (q, k, LABELS)),
}


@pytest.mark.parametrize("op", CASES)
def test_module_is_its_op(op, rows):
    module, inputs = CASES[op]
    arguments = inputs(*rows)
    assert torch.equal(module()(*arguments), getattr(fastnce, op)(*arguments))
    expected = getattr(fastnce, op)(*arguments, temperature=0.3, backend="torch")
    assert torch.equal(module(temperature=0.3, backend="torch")(*arguments), expected)


@pytest.mark.parametrize("op", CASES)
def test_module_has_every_option_and_default_of_its_op(op):
    function = inspect.signature(getattr(fastnce, op)).parameters
    module = inspect.signature(CASES[op][0]).parameters
    options = {n: p.default for n, p in function.items() if p.kind is p.KEYWORD_ONLY}
    assert {name: p.default for name, p in module.items()} == options


@pytest.mark.parametrize("op", [op for op in CASES if op != "patch_nce"])
def test_options_reach_the_op(op, rows):
    module, inputs = CASES[op]
    got = module(reduction="none")(*inputs(*rows))
    assert got.dim() == 1
    torch.testing.assert_close(got.sum(), module(reduction="sum")(*inputs(*rows)))


def test_info_nce_options_and_negatives(rows):
    query, key = rows
    queue = torch.randn(5, 6)
    got = losses.InfoNCELoss(0.2, in_batch_negatives=True, normalize=False)(query, key, queue)
    expected = fastnce.info_nce(
        query, key, queue, temperature=0.2, in_batch_negatives=True, normalize=False
    )
    assert torch.equal(got, expected)
    got = losses.InfoNCELoss(symmetric=True)(query, key)
    assert torch.equal(got, fastnce.info_nce(query, key, symmetric=True))
    patches = query.view(2, 4, 6), key.view(2, 4, 6)
    got = losses.PatchNCELoss(negatives="batch")(*patches)
    assert torch.equal(got, fastnce.patch_nce(*patches, negatives="batch"))


@pytest.mark.parametrize("op", CASES)
def test_temperature_may_be_trained(op, rows):
    module, inputs = CASES[op]
    loss = module(nn.Parameter(torch.tensor(0.3)))
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    assert "temperature" in loss.state_dict()
    loss(*inputs(*rows)).backward()
    assert loss.temperature.grad.abs() > 0
    assert loss.double().temperature.dtype == torch.float64
    assert not list(module(0.3).parameters())


def test_repr_shows_what_was_chosen():
    assert repr(losses.InfoNCELoss(0.1, symmetric=True)) == (
        "InfoNCELoss(temperature=0.1, normalize=True, symmetric=True, reduction='mean')"
    )
    assert repr(losses.PatchNCELoss(negatives="batch", backend="torch")) == (
        "PatchNCELoss(temperature=0.07, negatives='batch', backend='torch')"
    )
    assert repr(losses.NTXentLoss(nn.Parameter(torch.tensor([0.5])))) == (
        "NTXentLoss(temperature=Parameter(0.5), reduction='mean')"
    )
    assert "temperature=Tensor(0.25)" in repr(losses.SupConLoss(torch.tensor(0.25)))
    on_meta = nn.Parameter(torch.empty((), device="meta"))
    assert "temperature=Parameter(...)" in repr(losses.PatchNCELoss(on_meta))
    assert repr(losses.CLIPLoss(backend="torch")) == "CLIPLoss(normalize=True, backend='torch')"


@pytest.mark.parametrize("op", CASES)
def test_a_plain_tensor_as_temperature_moves_and_is_saved(op, rows):
    module, inputs = CASES[op]
    loss = nn.Sequential(module(torch.tensor([0.25])))
    assert not list(loss.parameters())
    expected = module(0.25)(*inputs(*rows))
    assert torch.equal(loss[0](*inputs(*rows)), expected)
    assert loss.to("meta")[0].temperature.device.type == "meta"

    saved = nn.Sequential(module(torch.tensor([0.5]))).state_dict()
    assert saved == {"0.temperature": torch.tensor([0.5])}
    loss = nn.Sequential(module(torch.tensor([0.25])))
    loss.load_state_dict({})  # as saved before it was a buffer
    assert loss[0].temperature.item() == 0.25
    loss.load_state_dict(saved)
    assert loss[0].temperature.item() == 0.5
    with pytest.raises(RuntimeError, match="Missing key.*temperature"):
        module(nn.Parameter(torch.tensor(0.25))).load_state_dict({})


def test_clip_loss(rows):
    image, text = rows
    scale = nn.Parameter(torch.tensor(2.0))
    logits = scale.exp() * nn.functional.normalize(image) @ nn.functional.normalize(text).T
    target = torch.arange(8)
    expected = (
        nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)
    ) / 2
    got = losses.CLIPLoss()(image, text, scale.exp())
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, scale), torch.autograd.grad(expected, scale)
    )
    torch.testing.assert_close(losses.CLIPLoss()(image, text, scale.exp().item()), expected)
    torch.testing.assert_close(
        losses.CLIPLoss(backend="torch")(image, text, 7), losses.CLIPLoss()(image, text, 7.0)
    )


def test_clip_loss_refuses_a_scale_of_zero(rows):
    with pytest.raises(
        ValueError, match="CLIPLoss: logit_scale must be positive and finite, got 0.*exp"
    ):
        losses.CLIPLoss()(*rows, 0)


def public_modules() -> list[str]:
    names = ["fastnce", "fastnce.losses", "fastnce.backends"]
    for package in (
        "fastnce.ops",
        "fastnce.distributed",
        "fastnce.networks",
        "fastnce.systems",
        "fastnce.data",
        "fastnce.metrics",
    ):
        try:
            found = importlib.import_module(package)
        except ModuleNotFoundError:
            continue
        names += [package, *(m.name for m in pkgutil.iter_modules(found.__path__, package + "."))]
    return names


@pytest.mark.parametrize("name", public_modules())
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


@pytest.mark.parametrize("op", [*CASES, "sample_patches", "pairwise_cosine_similarity"])
def test_every_op_has_an_example(op):
    finder = doctest.DocTestFinder()
    examples = [e for test in finder.find(getattr(fastnce, op), op) for e in test.examples]
    assert len(examples) >= 2
