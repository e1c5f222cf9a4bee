"""Adversarial objectives and penalties: values by hand, gradients by finite differences."""

from collections.abc import Callable

import pytest
import torch
from second_derivatives import check_penalty
from torch import Tensor

from fastnce.networks import PatchDiscriminator
from fastnce.systems.adversarial import discriminator_losses, generator_loss, gradient_penalty, r1


@pytest.mark.parametrize(
    ("mode", "terms", "generators"),
    [
        ("vanilla", [0.2613, 0.5505], 1.3005),
        ("nonsaturating", [0.2613, 0.5505], 1.3005),
        ("hinge", [0.25, 0.75], 0.75),
        ("lsgan", [2.125, 2.125], 4.625),
        ("wgangp", [-1.75, -0.75], 0.75),
    ],
)
def test_objectives_by_hand(mode, terms, generators):
    real, fake = torch.tensor([0.5, 3.0]), torch.tensor([-2.0, 0.5])
    found = [*discriminator_losses(real, fake, mode), generator_loss(fake, mode)]
    assert [x.item() for x in found] == pytest.approx([*terms, generators], abs=1e-4)


def test_penalties_of_a_known_function():
    """The slope of 3 x_0 + 4 x_1, summed over two logits, is 10 everywhere."""
    weight = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)

    def judge(x: Tensor) -> Tensor:
        logit = (x * weight).sum((1, 2, 3))
        return torch.stack([logit, logit], dim=1)

    real, fake = torch.randn(2, 5, 2, 1, 1).requires_grad_()
    assert r1(judge(real), real).item() == pytest.approx(100)
    assert gradient_penalty(judge, real, fake).item() == pytest.approx(81)


def test_the_penalty_is_taken_between_the_images():
    """The slope of x^2 / 2 is x: real 3 and fake 1 give places between 1 and 3, an image each."""
    seen = []

    def judge(x: Tensor) -> Tensor:
        seen.append(x.detach().flatten())
        return x.square().sum((1, 2, 3)) / 2

    real, fake = torch.full((50, 1, 1, 1), 3.0), torch.full((50, 1, 1, 1), 1.0)
    penalty = gradient_penalty(judge, real, fake)
    assert seen[0].min() >= 1 and seen[0].max() <= 3 and seen[0].std() > 0.3
    assert penalty.item() == pytest.approx((seen[0] - 1).square().mean().item(), rel=1e-5)


def penalty_of(name: str, judge: Callable[..., Tensor], real: Tensor, fake: Tensor) -> Tensor:
    if name == "r1":
        images = real.clone().requires_grad_()
        return r1(judge(images), images)
    torch.manual_seed(0)
    return gradient_penalty(judge, real, fake)


@pytest.mark.parametrize("norm", ["instance", "none"])
@pytest.mark.parametrize("name", ["r1", "gradient_penalty"])
def test_gradient_of_the_penalties_by_finite_differences(name, norm):
    torch.manual_seed(0)
    network = PatchDiscriminator(base_channels=3, num_layers=2, norm=norm).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    real, fake = torch.randn(2, 2, 3, 16, 16, dtype=torch.float64)
    check_penalty(network, lambda judge: penalty_of(name, judge, real, fake))
