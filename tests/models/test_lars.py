"""LARS against its formula, tensor by tensor in fp64."""

import copy

import pytest
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


def test_parameters_without_gradient_and_the_closure():
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([used, unused], lr=1.0, trust=0.1)

    def closure():
        optimizer.zero_grad()
        loss = used.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert used[0, 0].item() == pytest.approx(0.9)
    assert unused[0, 0].item() == 1.0


def test_its_state_goes_through_a_checkpoint():
    nets = [model(), model()]
    first, second = (LARS(lars_groups([net]), lr=0.1) for net in nets)
    for _ in range(2):
        nets[0](torch.ones(2, 1, 4, 4, dtype=torch.float64)).sum().backward()
        first.step()
    nets[1].load_state_dict(nets[0].state_dict())
    # Copied, as a file would: torch takes the tensors of the dict themselves.
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for net, optimizer in zip(nets, (first, second), strict=True):
        net.zero_grad()
        net(torch.ones(2, 1, 4, 4, dtype=torch.float64)).sum().backward()
        optimizer.step()
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)
