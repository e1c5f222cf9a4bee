"""The contrastive losses of pytorch-metric-learning (``pytorch_metric_learning.losses``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnce.distributed.negative_queue import NegativeQueue
from fastnce.ops.sup_con import sup_con

LIBRARY = ("pytorch-metric-learning", "2.9.0")  # compared with
_LOSSES = "pytorch_metric_learning.losses"
STANDS_FOR = {
    f"{_LOSSES}.ntxent_loss": ("NTXentLoss",),
    f"{_LOSSES}.supcon_loss": ("SupConLoss",),
    f"{_LOSSES}.self_supervised_loss": ("SelfSupervisedLoss",),
    f"{_LOSSES}.cross_batch_memory": ("CrossBatchMemory",),
}


class _Labelled(nn.Module):
    """A loss of rows with labels, among each other or against other rows."""

    _positives: str
    # What ``reducer`` may be, by the name of its class; the first is the default.
    _reductions: dict[str, str]

    def __init__(self, temperature: float, options: dict[str, object]) -> None:
        super().__init__()
        op = type(self).__name__
        self.temperature = temperature
        self._reduction = self._reductions[_class_of(op, "reducer", options, self._reductions)]
        distance = options.get("distance")
        known = ("CosineSimilarity", "DotProductSimilarity")
        _class_of(op, "distance", options, known)
        self._normalize = getattr(distance, "normalize_embeddings", True)
        for name, value in options.items():
            if name not in ("reducer", "distance", "collect_stats") and value is not None:
                raise ValueError(
                    f"{op}: {name} is not there. Drop it, or keep pytorch-metric-learning's own class."
                )

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``embeddings`` (N, D) with ``labels`` (N,), among each other, or against ``ref_emb`` (M, D).

        ``indices_tuple``, the pairs that a miner has chosen, must be None: there is no list of pairs here.
        """
        op = type(self).__name__
        _expect_no_miner(op, indices_tuple)
        if labels is None:
            raise ValueError(f"{op}: labels is None. Pass the labels of the embeddings, (N,).")
        ref_labels = None if ref_emb is None else ref_labels
        return self.against(embeddings, labels, ref_emb, ref_labels)

    def against(
        self,
        embeddings: Tensor,
        labels: Tensor,
        references: Tensor | None,
        reference_labels: Tensor | None,
        **of_a_memory: Tensor,
    ) -> Tensor:
        """The loss against other rows, or with None among each other; ``of_a_memory`` as ``fastnce.sup_con`` takes it."""
        options = {"temperature": self.temperature, "normalize": self._normalize}
        options |= {"positives": self._positives, **of_a_memory}
        of_all = self._reduction == "mean of all"
        options["reduction"] = "none" if of_all else self._reduction
        loss = sup_con(embeddings, labels, references, reference_labels, **options)
        return loss.mean() if of_all else loss


def _class_of(op: str, name: str, options: dict[str, object], known: object) -> str:
    """By name, of the option, or the first that is ``known``."""
    value = options.get(name)
    found = next(iter(known)) if value is None else type(value).__name__
    if found not in known:
        raise ValueError(
            f"{op}: {name} must be {' or '.join(known)}, got {found}. Keep pytorch-metric-learning's own class for others."
        )
    return found


def _expect_no_miner(op: str, indices_tuple: object) -> None:
    if indices_tuple is not None:
        raise ValueError(
            f"{op}: indices_tuple lists the pairs of a miner, and all pairs count here. Drop the miner, or keep "
            f"pytorch-metric-learning's own class."
        )


class NTXentLoss(_Labelled):
    """A term for each positive pair, over it and the anchor's negatives, as ``pytorch_metric_learning.losses.NTXentLoss``.

    Args:
        temperature: positive float.
        kwargs: ``distance``, a ``CosineSimilarity`` or ``DotProductSimilarity``; ``reducer``, a ``MeanReducer``,
            ``AvgNonZeroReducer`` or ``SumReducer``.

    Examples:
        >>> import torch
        >>> loss = NTXentLoss()(torch.randn(8, 16), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]))
    """

    _positives = "each"
    _reductions = {"MeanReducer": "mean", "AvgNonZeroReducer": "mean", "SumReducer": "sum"}

    def __init__(self, temperature: float = 0.07, **kwargs: object) -> None:
        super().__init__(temperature, kwargs)


class SupConLoss(_Labelled):
    """The supervised contrastive loss as ``pytorch_metric_learning.losses.SupConLoss``.

    Args:
        temperature: positive float.
        kwargs: ``distance`` as for ``NTXentLoss``; ``reducer``, an ``AvgNonZeroReducer``, ``MeanReducer`` or ``SumReducer``.

    Examples:
        >>> import torch
        >>> loss = SupConLoss()(torch.randn(8, 16), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]))
    """

    _positives = "mean"
    _reductions = {"AvgNonZeroReducer": "mean", "MeanReducer": "mean of all", "SumReducer": "sum"}

    def __init__(self, temperature: float = 0.1, **kwargs: object) -> None:
        super().__init__(temperature, kwargs)


class SelfSupervisedLoss(nn.Module):
    """A loss of two views, each row a class of its own, as ``pytorch_metric_learning.losses.SelfSupervisedLoss``.

    Args:
        loss: one of those with labels here, or of theirs.
        symmetric: all rows of both views against each other; else the first view against the second.
        kwargs: none.

    Examples:
        >>> import torch
        >>> loss = SelfSupervisedLoss(NTXentLoss())(*torch.randn(2, 8, 16))
    """

    def __init__(self, loss: nn.Module, symmetric: bool = True, **kwargs: object) -> None:
        super().__init__()
        self.loss, self.symmetric = loss, symmetric

    def forward(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        """The loss of the two views (N, D)."""
        labels = torch.arange(len(embeddings), device=embeddings.device)
        if self.symmetric:
            return self.loss(torch.cat([embeddings, ref_emb]), torch.cat([labels, labels]))
        return self.loss(embeddings, labels, ref_emb=ref_emb, ref_labels=labels)


class CrossBatchMemory(nn.Module):
    """A loss against the rows of past batches (Wang et al. 2020, https://arxiv.org/abs/1912.06798), as theirs.

    Args:
        loss: ``NTXentLoss`` or ``SupConLoss`` of this module.
        embedding_size: numbers per row.
        memory_size: rows; of a batch that is larger the last stay.
        miner: None.
        kwargs: none.

    Examples:
        >>> import torch
        >>> loss = CrossBatchMemory(SupConLoss(), embedding_size=16, memory_size=64)
        >>> value = loss(torch.randn(8, 16), torch.arange(8) // 2)
    """

    def __init__(
        self,
        loss: nn.Module,
        embedding_size: int,
        memory_size: int = 1024,
        miner: object = None,
        **kwargs: object,
    ) -> None:
        super().__init__()
        op = "CrossBatchMemory"
        _expect_no_miner(op, miner)
        if not isinstance(loss, _Labelled):
            raise TypeError(
                f"{op}: loss must be NTXentLoss or SupConLoss of {__name__}, got {type(loss).__name__}."
            )
        if not loss._normalize:
            raise ValueError(f"{op}: the memory has unit rows. Use CosineSimilarity.")
        self.loss, self.embedding_size, self.memory_size = loss, embedding_size, memory_size
        self.reset_queue()

    def reset_queue(self) -> None:
        """Empties the memory."""
        self.memory = NegativeQueue(self.memory_size, self.embedding_size, labelled=True)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``embeddings`` (N, D) against the memory, which has taken them in: a row's own copy is left out.

        With ``enqueue_mask`` (N,) bool the memory takes in the rows where it is True, and the loss is of the others.
        """
        _expect_no_miner("CrossBatchMemory", indices_tuple)
        taken_in, of_taken_in = embeddings, labels
        if enqueue_mask is not None:
            taken_in, of_taken_in = embeddings[enqueue_mask], labels[enqueue_mask]
            embeddings, labels = embeddings[~enqueue_mask], labels[~enqueue_mask]
        ids = self.memory.enqueue(taken_in, of_taken_in)
        of_memory = {"reference_mask": self.memory.filled}
        if enqueue_mask is None:
            of_memory = {"ids": ids, "reference_ids": self.memory.ids}
        return self.loss.against(
            embeddings, labels, self.memory.keys, self.memory.labels, **of_memory
        )
