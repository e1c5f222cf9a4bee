"""The losses of lightly (``lightly.loss``)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.distributed.negative_queue import NegativeQueue
from fastnce.ops.info_nce import info_nce
from fastnce.ops.info_nce import over_ranks as info_nce_over_ranks
from fastnce.ops.nt_xent import nt_xent
from fastnce.ops.nt_xent import over_ranks as nt_xent_over_ranks
from fastnce.ranks import ranks_of
from fastnce.reference.normalize import normalize_rows

LIBRARY = ("lightly", "1.6.0")  # compared with
STANDS_FOR = {
    "lightly.loss.ntx_ent_loss": ("NTXentLoss",),
    "lightly.loss.dcl_loss": ("DCLLoss", "DCLWLoss", "negative_mises_fisher_weights"),
}


class _MemoryBank(NegativeQueue):
    """As lightly's it is in no state dict, and takes in this rank's keys alone unless it is told to gather."""

    def __init__(self, size: int, dim: int, gather_distributed: bool) -> None:
        super().__init__(size, dim)
        self.gather_distributed = gather_distributed

    def take_in(self, keys: Tensor) -> None:
        if self.gather_distributed:
            self.enqueue(keys)
        else:
            self._validate(keys, None, None)
            self._waiting.append((normalize_rows(keys.detach()).to(self.queue.dtype),))

    def _save_to_state_dict(self, *_: object) -> None:
        pass

    def _load_from_state_dict(self, *_: object) -> None:
        pass


class NTXentLoss(nn.Module):
    """SimCLR's loss, and MoCo's with a bank, as ``lightly.loss.NTXentLoss``.

    Args:
        temperature: positive float.
        memory_bank_size: 0, or (size, dim) of a bank of negatives: ``out0`` are then queries, ``out1`` their positives. The bank
            takes in ``out1`` after the loss, where ``out0`` requires a gradient. It goes round at its end.
        gather_distributed: the rows of all ranks are negatives, and get gradients; the loss is that of this rank's rows. The
            bank takes in the rows of all ranks.

    Examples:
        >>> import torch
        >>> loss = NTXentLoss(memory_bank_size=(4096, 128))(*torch.randn(2, 32, 128))
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.temperature, self.gather_distributed = temperature, gather_distributed
        size = [memory_bank_size] if isinstance(memory_bank_size, int) else list(memory_bank_size)
        if size[0] < 0 or (size[0] > 0 and len(size) != 2):
            raise ValueError(
                f"NTXentLoss: memory_bank_size must be 0, for no bank, or (size, dim of the features), got {memory_bank_size}."
            )
        self.memory_bank = None
        if size[0] > 0:
            self.memory_bank = _MemoryBank(*size, gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of the two views (N, D), float32 (float64 for float64 rows)."""
        options = {"temperature": self.temperature}
        if self.memory_bank is not None:
            loss = info_nce(out0, out1, self.memory_bank.keys, **options)
            if out0.requires_grad:
                self.memory_bank.take_in(out1)
            return loss
        if self.gather_distributed:
            return nt_xent_over_ranks(out0, out1, reduction="none", **options).mean()
        return nt_xent(out0, out1, **options)


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """The weights (N,) of the positives of unit rows (N, D) in ``DCLWLoss``: 2 less N times the softmax of their similarities."""
    similarity = (out0 * out1).detach().sum(dim=1) / sigma
    return 2 - len(out0) * similarity.softmax(dim=0)


class DCLLoss(nn.Module):
    """The decoupled loss (Yeh et al. 2021, https://arxiv.org/abs/2110.06848) as ``lightly.loss.DCLLoss``.

    Args:
        temperature: positive float.
        weight_fn: of the unit rows of a view and of the other, (N, D) each, to the weights (N,) of the positives' similarities.
        gather_distributed: the rows of all ranks are negatives, and get gradients; the loss is that of this rank's rows.

    Examples:
        >>> import torch
        >>> loss = DCLLoss()(*torch.randn(2, 32, 128))
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.temperature, self.weight_fn = temperature, weight_fn
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of the two views (N, D), float32 (float64 for float64 rows)."""
        ranks = ranks_of(None) if self.gather_distributed else None
        if ranks is None:
            loss = nt_xent(out0, out1, temperature=self.temperature, decoupled=True)
        else:
            ids = (ranks.rank << 32) + torch.arange(2 * len(out0), device=out0.device)
            rows, others = torch.cat([out0, out1]), torch.cat([out1, out0])
            loss = info_nce_over_ranks(
                rows,
                others,
                temperature=self.temperature,
                query_ids=ids,
                key_ids=ids.roll(len(out0)),
                decoupled=True,
                reduction="none",
            ).mean()
        if self.weight_fn is None:
            return loss
        out0, out1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        weights = (self.weight_fn(out0, out1) + self.weight_fn(out1, out0)) / 2
        return loss + ((1 - weights) * (out0 * out1).sum(dim=1)).mean() / self.temperature


class DCLWLoss(DCLLoss):
    """``DCLLoss`` with the weights of the paper, ``negative_mises_fisher_weights``, as ``lightly.loss.DCLWLoss``.

    Args:
        temperature, gather_distributed: see ``DCLLoss``.
        sigma: of the weights.

    Examples:
        >>> import torch
        >>> loss = DCLWLoss()(*torch.randn(2, 32, 128))
    """

    def __init__(
        self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False
    ) -> None:
        weight_fn = functools.partial(negative_mises_fisher_weights, sigma=sigma)
        super().__init__(temperature, weight_fn, gather_distributed)
