"""NT-Xent, SimCLR's loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from fastnce.ops import _checks, _common
from fastnce.ops._over_ranks import OverRanks
from fastnce.ops.labelled_lse import LabelledLSE
from fastnce.ops.masked_info_nce import Masks, rows_loss, weights_of
from fastnce.ops.sup_con import plain as sup_con
from fastnce.ranks import Fact
from fastnce.reference.normalize import accumulation_dtype, normalize_rows
from fastnce.registry import Make, Op, Sample, declare


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    decoupled: bool = False,
    return_rank: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""NT-Xent, the normalised temperature-scaled cross-entropy of SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709).

    .. math:: \ell_i = \log \sum_{j \ne i} e^{s_{ij} / \tau} - s_{i\,p(i)} / \tau

    over the 2N rows of ``cat([z1, z2])``, with the cosine s and the other view p(i) of row i. It is the supervised contrastive
    loss where each image is a class of its own.

    Args:
        z1: (N, D), the first views; float64, float32, bfloat16 or float16. Normalisation is part of the op.
        z2: (N, D), the second views.
        temperature: positive float, or tensor of one element, which gets its gradient.
        ids: (N,) integers: images of the same id, such as duplicates, are not each other's negatives. The other view always stays.
        weights: (2N,) floats, a weight for each row's loss, the rows of ``z1`` first; ``"mean"`` divides by their sum. No
            gradient.
        decoupled: the positive is not in the sum (DCL; Yeh et al. 2021, https://arxiv.org/abs/2110.06848); the negatives are of
            both views. Of the other view alone they are in ``info_nce(z1, z2, symmetric=True, decoupled=True)``. The loss of a row
            without negatives is 0.
        return_rank: the result is ``(loss, rank)`` with how many negatives are more similar to the row than its other view,
            (2N,) int64.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for (2N,), the rows of ``z1`` first.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The loss, float32 (float64 for float64 inputs). With ``return_rank`` also the ranks.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or options that do not fit together.
        RuntimeError: the requested backend cannot run this.

    Examples:
        >>> import torch, fastnce
        >>> loss = fastnce.nt_xent(torch.randn(32, 128), torch.randn(32, 128))
    """
    op = "nt_xent"
    z1, z2 = _checks.same_dtype_under_autocast(z1, z2)
    _checks.expect_rows(op, "z1", z1)
    _checks.expect_rows(op, "z2", z2, like=z1, like_name="z1")
    image = torch.arange(z1.shape[0], device=z1.device)
    rows = torch.cat([z1, z2])
    if ids is None and weights is None and not (decoupled or return_rank):
        labels = torch.cat([image, image])
        return _common.row_loss(
            op, sup_con, (rows,), labels, temperature, reduction, backend, operators="sup_con"
        )
    temperature = _checks.expect_temperature(op, temperature, z1)
    _checks.expect_choice(op, "reduction", reduction, _common.REDUCTIONS)
    weights = weights_of(op, weights, rows)
    if ids is not None:
        image = _checks.expect_labels(op, ids, z1, "z1", "ids")
    # Of the other views, which are the keys, the one that is the row itself has its id.
    ids = torch.cat([image, image])[None]
    loss, rank = rows_loss(
        op,
        (rows[None], torch.cat([z2, z1])[None], None),
        Masks(ids, ids),
        weights,
        temperature,
        reduction,
        backend,
        rank=return_rank,
        normalize=True,
        symmetric=False,
        in_batch=True,
        decoupled=bool(decoupled),
    )
    loss = loss.squeeze(0) if reduction == "none" else loss
    return (loss, rank.squeeze(0)) if return_rank else loss


@torch.compiler.disable
def over_ranks(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    strategy: str = "auto",
    gradient_scale: str = "mean",
    check: bool = True,
    backend: str | None = None,
    **options: object,
) -> Tensor:
    """``fastnce.nt_xent`` of the images of all ranks, exactly; both views of an image are on the same rank.

    Args:
        z1: (N, D), the first views of this rank's images; N may differ between ranks, and be 0 on some.
        z2: (N, D), the second views.
        temperature: positive float, or tensor of one element, which gets its gradient.
        reduction: ``"mean"`` over the views of all ranks, ``"sum"``, or ``"none"`` for this rank's (2N,), the rows of ``z1``
            first.
        group, strategy, gradient_scale, check: see ``fastnce.distributed``.
        backend: one of ``fastnce.backends.available()``; None chooses.
        options: the others of ``fastnce.nt_xent``, where this process is alone.

    Returns:
        The same loss on every rank (``"none"``: this rank's losses), float32 (float64 for float64 inputs).

    Examples:
        >>> import torch, fastnce.distributed  # one process: the plain op
        >>> loss = fastnce.distributed.nt_xent(torch.randn(32, 128), torch.randn(32, 128))
    """
    op = "nt_xent"
    call = OverRanks(op, group, temperature, reduction, strategy, gradient_scale, check, backend)
    if call.alone:
        return nt_xent(z1, z2, **options, **call.plain)
    z1, z2 = _checks.same_dtype_under_autocast(z1, z2)

    def validate() -> dict[str, Fact]:
        call.expect_default(options)
        _checks.expect_rows(op, "z1", z1, may_be_empty=True)
        _checks.expect_rows(op, "z2", z2, may_be_empty=True, like=z1, like_name="z1")
        grad = _common.wants_grad(z1, z2, temperature)
        return {"rows": 2 * len(z1), "whether gradients are needed": grad}

    call.agree("labelled_lse", z1, validate)
    with _common.no_autocast(z1):
        rows = torch.cat([z1, z2])
        no_labels = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        # Without the positives, next to which nothing then cancels where they dominate.
        others = LabelledLSE.apply(
            rows, call.temperature, no_labels, call.exchange, call.kernels, 2
        )
        dtype = accumulation_dtype(z1.dtype)
        units = normalize_rows(z1.to(dtype)) * normalize_rows(z2.to(dtype))
        positive = (units.sum(dim=1).double() / call.temperature).repeat(2)
        losses = torch.logaddexp(others[:, 0] - positive, torch.zeros_like(positive))
        return call.reduce(losses, None, z1.dtype)


def _samples(make: Make) -> Iterator[Sample]:
    z1 = make(17, 20)
    views = {"z1": z1, "z2": make.similar(z1)}
    yield Sample("mean", views)
    yield Sample("none", {**views, "temperature": 0.1, "reduction": "none"})
    yield Sample("temperature", {**views, "temperature": torch.tensor(0.2, requires_grad=True)})


declare(
    Op(
        "nt_xent",
        runs=("sup_con_forward", "sup_con_backward"),
        function=nt_xent,
        over_ranks=over_ranks,
        samples=_samples,
    )
)
