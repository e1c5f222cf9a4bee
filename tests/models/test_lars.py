"""LARS against its formula, tensor by tensor in fp64."""

import copy

import torch
from torch import nn

from fastnce.systems.lars import LARS, lars_groups


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)
    ).double()


def test_three_steps_are_the_formula():
    net = model()
    twin = copy.deepcopy(net)
    optimizer = LARS(lars_groups([net]), lr=0.5, momentum=0.8, weight_decay=0.1, trust=0.02)
    velocity = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for step in range(3):
        lr = 0.5 / (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x = torch.randn(4, 1, 4, 4, dtype=torch.float64)
        for each in (net, twin):
            each.zero_grad()
            each(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            for name, w in twin.named_parameters():
                adapted = name in ("0.weight", "3.weight")
                update = w.grad + 0.1 * w if adapted else w.grad
                ratio = 0.02 * w.norm() / update.norm() if adapted else 1.0
                velocity[name] = 0.8 * velocity[name] + lr * ratio * update
                w -= velocity[name]
        for (name, w), expected in zip(net.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(w, expected, msg=name)


def test_a_zero_weight_or_gradient_moves_as_without_scaling():
    zero, still = (nn.Parameter(torch.full((2, 2), value)) for value in (0.0, 3.0))
    optimizer = LARS([zero, still], lr=0.5)
    zero.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizer.step()
    assert zero.tolist() == [[-0.5, -0.5]] * 2
    assert still.tolist() == [[3.0, 3.0]] * 2
