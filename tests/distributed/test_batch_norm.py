"""Batch norm over ranks: that of one process with the whole batch."""

import torch
import torch.distributed as dist
from torch import nn

from fastnce.networks.layers import BatchNormOfRanks

COUNTS = (3, 1, 2, 2)  # images of each rank


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Maps, far from mean 0, and what each rank's loss weighs their norm with."""
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(2, sum(COUNTS), 3, 4, 5, generator=generator)
    return (2 * x + 30).double(), weights.double()


def passed(norm: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * y * weights).sum().backward()
    return [y.detach(), x.grad]


def on_one_rank(group) -> list[torch.Tensor]:
    rank = dist.get_rank(group)
    own = [x.split(COUNTS)[rank] for x in batch()]
    norm = BatchNormOfRanks(3).double()
    found = passed(norm, *own)
    with torch.no_grad():
        evaluated = norm.eval()(own[0])
    return [*found, evaluated, norm.running_mean, norm.running_var, norm.num_batches_tracked]


def test_ranks_equal_one_process(workers):
    found = workers.results(on_one_rank)
    norm = nn.BatchNorm2d(3, affine=False).double()
    x, weights = batch()
    expected = passed(norm, x, weights)
    expected.append(norm.eval()(x))
    joined = [torch.cat(parts) for parts in zip(*(rank[:3] for rank in found), strict=True)]
    torch.testing.assert_close(joined, expected, rtol=1e-9, atol=1e-9)
    for rank in found:
        torch.testing.assert_close(rank[3:], list(norm.buffers()), rtol=1e-12, atol=1e-12)
