"""Ranger against the golden values of the published code, in fp32, and its state."""

import copy

import pytest
import torch
from golden import sines
from torch import nn

from fastnce.systems.ranger import Ranger, step_factor


def parameters() -> list[nn.Parameter]:
    return [
        nn.Parameter(sines(3, 4, step=0.37, start=0.1)),
        nn.Parameter(sines(3, step=0.9, start=0.4)),
    ]


def take(optimizer: Ranger, step: int) -> None:
    (w, b), *_ = (group["params"] for group in optimizer.param_groups)
    w.grad, b.grad = sines(3, 4, step=0.21, start=0.3 * step), sines(3, step=0.5, start=0.2 * step)
    optimizer.step()


def golden(*values: float):
    return pytest.approx(list(values), abs=1e-6)


def test_golden_steps():
    w, b = parameters()
    optimizer = Ranger([w, b], lr=0.01)
    rows = {
        1: (0.102490, 0.453616, 0.743661, 0.933212),
        5: (0.109458, 0.455049, 0.740847, 0.927626),
        6: (0.104695, 0.453956, 0.742673, 0.931601),
        7: (0.104725, 0.453850, 0.742580, 0.931641),
        12: (0.104193, 0.453128, 0.742998, 0.932277),
    }
    biases = {
        1: (0.387432, 0.957116, 0.799176),
        6: (0.379680, 0.944283, 0.784378),
        12: (0.378330, 0.942941, 0.783190),
    }
    for step in range(1, 13):
        take(optimizer, step)
        if step in rows:
            assert w[0].tolist() == golden(*rows[step])
        if step in biases:
            assert b.tolist() == golden(*biases[step])


def test_golden_factors():
    found = [step_factor(step, 0.95, 0.999) for step in (1, 2, 5, 6, 12)]
    assert [rectified for rectified, _ in found] == [False, False, False, True, True]
    assert [factor for _, factor in found] == golden(20, 10.25641, 4.420494, 0.007541, 0.013723)


def test_a_saved_state_goes_on_and_a_late_weight_starts_its_own_count():
    kept = parameters()
    optimizer = Ranger(kept, lr=0.01)
    for step in range(1, 9):
        take(optimizer, step)
    again = [nn.Parameter(p.detach().clone()) for p in kept]
    other = Ranger(again, lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(9, 14):
        take(optimizer, step)
        take(other, step)
    assert all(torch.equal(x, y) for x, y in zip(kept, again, strict=True))

    late, alone = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer.add_param_group({"params": [late]})
    take(optimizer, 14)
    assert late.tolist() == [[1.0, 1.0]] * 2 and late not in optimizer.state
    gradient = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    late.grad, alone.grad = gradient, gradient.clone()
    optimizer.step()
    Ranger([alone], lr=0.01).step()
    assert torch.equal(late, alone)
