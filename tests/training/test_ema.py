"""The running average of the weights."""

import torch
from torch import nn

from fastnce.networks import ResnetGenerator
from fastnce.training.ema import WeightAverage


def test_is_the_weighted_mean_of_all_weights_seen():
    torch.manual_seed(0)
    source = nn.Linear(3, 2).double()
    average = WeightAverage(source, 0.9)
    total, norm = torch.zeros_like(source.weight), 0.0
    for _ in range(60):
        with torch.no_grad():
            source.weight.normal_()
        average.update(source)
        total, norm = 0.9 * total + source.weight.detach(), 0.9 * norm + 1
        torch.testing.assert_close(average.module.weight, total / norm, rtol=1e-12, atol=1e-14)


def test_the_source_is_left_alone_and_buffers_are_copied():
    source = ResnetGenerator(base_channels=2, num_blocks=1)
    average = WeightAverage(source, 0.5)
    before = [parameter.clone() for parameter in source.parameters()]
    with torch.no_grad():
        source.model[7].filt.fill_(7.0)
    average.update(source)
    assert all(torch.equal(a, b) for a, b in zip(before, source.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in source.parameters())
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    assert average.module.model[7].filt.mean() == 7.0


def test_state():
    source = nn.Linear(2, 2)
    one, other = WeightAverage(source, 0.9), WeightAverage(nn.Linear(2, 2), 0.9)
    one.update(nn.Linear(2, 2))
    other.load_state_dict(one.state_dict())
    following = nn.Linear(2, 2)
    one.update(following)
    other.update(following)
    assert torch.equal(one.module.weight, other.module.weight)
    assert one.updates == other.updates == 2


def test_late_start_copies_and_then_averages_buffers_too():
    """The form of GANs: copies until `start`, then the plain average, of batch norm's statistics as well."""
    source = nn.BatchNorm1d(2)
    average = WeightAverage(source, 0.75, start=2)

    def step(value):
        with torch.no_grad():
            source.weight.fill_(value)
            source.running_mean.fill_(10 * value)
            source.num_batches_tracked += 1
        average.update(source)
        return average.module.weight[0].item(), average.module.running_mean[0].item()

    assert step(1.0) == (1.0, 10.0)
    assert step(3.0) == (3.0, 30.0)
    assert step(7.0) == (0.75 * 3 + 0.25 * 7, 0.75 * 30 + 0.25 * 70)
    assert average.module.num_batches_tracked == 3
