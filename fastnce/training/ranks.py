"""Training in several processes, one for each device, as ``torchrun`` starts them.

Every process (rank) holds the whole model and takes its share of each batch. Gradients are averaged before each optimiser step,
running statistics after each training step, so that all ranks hold the same weights. Rank 0 writes the run's folder.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastnce.errors import UserError


def joined_from_environment(device: torch.device) -> torch.device:
    """Joins the group of ranks that ``torchrun`` announces, if it does. Gives this rank's device: its own GPU where that is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if device.index is not None:
            raise UserError(
                f"device={device} is one GPU, but torchrun started several processes. Use device=cuda."
            )
        if local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started more processes than the {torch.cuda.device_count()} GPUs here. "
                "Use --nproc-per-node with at most that many."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank() > 0:  # the first one says it for all
            logging.getLogger("fastnce").setLevel(logging.ERROR)
    return device


def leave() -> None:
    """Leaves the group of ranks, if there is one, together with the others."""
    if dist.is_available() and dist.is_initialized():
        # gloo ends the process when a rank leaves while another one still works.
        dist.barrier()
        dist.destroy_process_group()


class Ranks:
    """The ranks of a training; a single one without `torch.distributed`.

    Attributes:
        rank: of this process.
        size: number of processes.
        is_first: whether this one writes the run's folder.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0
        self.is_first = self.rank == 0
        # For what the host decides, so that no GPU is waited for.
        self._host = dist.new_group(backend="gloo") if self.size > 1 else None

    def average_gradients_before(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Has every step of `optimizers` take the mean of the ranks' gradients."""
        if self.size > 1:
            for optimizer in optimizers:
                optimizer.register_step_pre_hook(lambda optimizer, *_: self._average(optimizer))

    def average_buffers(self, model: nn.Module) -> None:
        """Takes the mean of running statistics and the like over the ranks."""
        if self.size > 1:
            self._mean([b for b in model.buffers() if b.is_floating_point()])

    def mean(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The means of scalars over the ranks."""
        if self.size == 1:
            return dict(losses)
        values = torch.stack([loss.detach().double() for loss in losses.values()])
        self._mean([values])
        return dict(zip(losses, values, strict=True))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on some rank."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._host)
        return bool(value)

    def gathered(self, value: object) -> list:
        """The ranks' values on the first rank, nothing on the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_first else None
        dist.gather_object(value, values, group=self._host)
        return values or []

    def share(self, samples: range, per_step: int) -> Iterable[int]:
        """This rank's samples of a stream of which each step takes `per_step`: every `size`-th one of each step."""
        return samples if self.size == 1 else _Share(samples, per_step, self)

    def _average(self, optimizer: torch.optim.Optimizer) -> None:
        grads = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        self._mean(grads)

    def _mean(self, tensors: list[Tensor]) -> None:
        """Replaces tensors by their means over the ranks, in one message for each dtype."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        with torch.no_grad():
            for same in by_dtype.values():
                flat = torch.cat([tensor.reshape(-1) for tensor in same])
                dist.all_reduce(flat)
                parts = (flat / self.size).split([tensor.numel() for tensor in same])
                for tensor, part in zip(same, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))


@dataclass(frozen=True)
class _Share:
    samples: range
    per_step: int
    ranks: Ranks

    def __len__(self) -> int:
        return len(self.samples) // self.ranks.size

    def __iter__(self) -> Iterator[int]:
        mine = (s % self.per_step % self.ranks.size == self.ranks.rank for s in self.samples)
        return itertools.compress(self.samples, mine)
