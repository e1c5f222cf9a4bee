"""The analyses of a discriminator."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from fastnce.metrics import authenticity_accuracy, largest_singular_values, overfitting_gap


def test_authenticity_counts_each_side_of_the_cutoff():
    real, fake = torch.tensor([2.0, 0.4, -1.0, 0.0]), torch.tensor([-1.0, 0.3, 0.0])
    result = authenticity_accuracy(real, fake)
    assert result.real == 0.5 and result.fake == pytest.approx(1 / 3)  # on the cutoff is wrong
    result = authenticity_accuracy(real, fake, cutoff=0.5)
    assert result.real == 0.25 and result.fake == 1


def test_the_gap_is_what_training_images_have_more():
    assert overfitting_gap(torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0])) == 0.5


def test_logits_that_are_missing_or_not_finite():
    logits, broken = torch.ones(2), torch.tensor([1.0, math.nan])
    result = authenticity_accuracy(broken, -logits)
    assert math.isnan(result.real) and result.fake == 1
    assert math.isnan(overfitting_gap(logits, broken))
    with pytest.raises(ValueError, match=r"logits_fake: expected at least one logit, got \(0,\)"):
        authenticity_accuracy(logits, torch.zeros(0))
    with pytest.raises(ValueError, match="logits_held_out: expected at least one"):
        overfitting_gap(logits, torch.zeros(0))


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ConvTranspose2d(5, 4, 2), nn.Linear(5, 6)
    )


def test_weights_are_taken_as_spectral_norm_takes_them():
    net = layers()
    values = largest_singular_values(net)
    matrices = {
        "0": net[0].weight.reshape(5, 27),
        "2": net[2].weight.transpose(0, 1).reshape(4, 20),
        "3": net[3].weight,
    }
    expected = {name: torch.linalg.svdvals(x)[0].item() for name, x in matrices.items()}
    assert values == pytest.approx(expected, rel=1e-5)
    assert largest_singular_values(net, raw=True) == values


@pytest.mark.parametrize("normalise", [spectral_norm, parametrizations.spectral_norm])
def test_the_normalised_weight_and_the_raw_one(normalise):
    plain, net = layers(), layers()
    for i in (0, 2, 3):
        normalise(net[i])
    expected = largest_singular_values(plain)
    assert largest_singular_values(net, raw=True) == pytest.approx(expected, rel=1e-5)
    x = torch.randn(4, 3, 6, 6)
    for _ in range(60):  # power iterations, until the norm is found
        net(x)
    assert largest_singular_values(net) == pytest.approx(dict.fromkeys("023", 1.0), abs=1e-3)

    with torch.no_grad():  # the raw weight grows, and the power iteration has not followed
        weights = dict(net[0].named_parameters())
        raw = weights.get("weight_orig", weights.get("parametrizations.weight.original"))
        raw[0] += 3 * torch.randn(3, 3, 3)
    assert largest_singular_values(net)["0"] > 1.1
    assert largest_singular_values(net, raw=True)["0"] > 3 * expected["0"]


@pytest.mark.parametrize("normalise", [spectral_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("raw", [False, True])
def test_looking_changes_nothing(normalise, raw):
    net = nn.Sequential(normalise(nn.Linear(4, 6)), nn.ReLU(), normalise(nn.Linear(6, 2)))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    largest_singular_values(net, raw=raw)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(module.training for module in net.modules())


def test_the_value_is_that_of_the_weight_used_in_eval_mode():
    net = spectral_norm(nn.Linear(4, 6, bias=False)).eval()
    used = net(torch.eye(4)).T
    expected = torch.linalg.matrix_norm(used, 2).item()
    assert largest_singular_values(net)[""] == pytest.approx(expected, rel=1e-5)


def test_a_weight_that_is_not_finite_is_told():
    net = layers()
    net[0].weight.data[0, 0, 0, 0] = math.nan
    values = largest_singular_values(net)
    assert math.isnan(values["0"]) and values["3"] > 0
