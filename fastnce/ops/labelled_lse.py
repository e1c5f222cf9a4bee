"""Log-sum-exp of the similarities of rows with columns, over all and over those of the row's label: one block of a larger matrix."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastnce import backends
from fastnce.ops import _common
from fastnce.ranks import Exchange
from fastnce.reference.normalize import accumulation_dtype, normalize_rows
from fastnce.registry import Op, Operator, declare


def labelled_lse_forward(
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    temperature: float | Tensor,
    *,
    own: bool,
) -> Tensor:
    """``[log sum_j exp(s_ij / t), log sum_{j of the label of i} exp(s_ij / t)]``, -inf for an empty sum.

    Args:
        x: (N, D), the rows.
        y: (M, D), the columns.
        x_labels: (N,) int64.
        y_labels: (M,) int64.
        temperature: t, a float or a 0-d tensor.
        own: row i leaves out column i, as its own or its positive.

    Returns:
        (N, 2) float64.
    """
    z, same = _logits(x, y, x_labels, y_labels, temperature, own)
    same_lse = z.masked_fill(~same, -torch.inf).logsumexp(dim=1)
    return torch.stack([z.logsumexp(dim=1), same_lse], dim=1).double()


def labelled_lse_backward(
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    temperature: float | Tensor,
    x_state: Tensor,
    y_state: Tensor,
    *,
    own: bool,
) -> tuple[Tensor, Tensor]:
    """This block's part in the gradient of ``x``, as rows and as columns, and of the temperature, as rows alone.

    The matrix of similarities is symmetric: what the other rank's rows give to these, it need not send.

    Args:
        x: (N, D), like all arguments up to ``temperature`` as in the forward.
        y: (M, D).
        x_labels: (N,).
        y_labels: (M,).
        temperature: a float or a 0-d tensor.
        x_state: (N, 4) float64: the two lse of the whole matrix, and the gradients that arrive for them.
        y_state: (M, 4), the same of the columns.
        own: as in the forward.

    Returns:
        (N, D) in the dtype of the sums, and 0-d.
    """
    z, same = _logits(x, y, x_labels, y_labels, temperature, own)
    x_state, y_state = x_state.to(z.dtype), y_state.to(z.dtype)

    def gradient(z: Tensor, state: Tensor, same: Tensor) -> Tensor:
        all_lse, same_lse, all_weight, same_weight = state.unbind(dim=1)
        all_part = all_weight[:, None] * (z - all_lse[:, None]).exp()
        same_part = same_weight[:, None] * (z - same_lse[:, None]).exp()
        all_part = all_part.masked_fill(z == -torch.inf, 0)
        return all_part + same_part.masked_fill(~same, 0)

    by_row = gradient(z, x_state, same)
    both = by_row + gradient(z.T, y_state, same.T).T  # (N, M)
    moment = (by_row * z.masked_fill(z == -torch.inf, 0)).sum()
    with torch.enable_grad():
        rows = x.detach().to(z.dtype).requires_grad_()
        units = normalize_rows(rows)
        upstream = both @ normalize_rows(y.to(z.dtype)) / temperature
        (grad_x,) = torch.autograd.grad(units, rows, upstream)
    return grad_x, -moment / temperature


def _logits(
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    temperature: float | Tensor,
    own: bool,
) -> tuple[Tensor, Tensor]:
    """z (N, M), -inf where left out, and where row and column have the same label and are not left out."""
    dtype = accumulation_dtype(x.dtype)
    z = normalize_rows(x.to(dtype)) @ normalize_rows(y.to(dtype)).T / temperature
    same = x_labels[:, None] == y_labels[None, :]
    if own:
        left_out = torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
        z, same = z.masked_fill(left_out, -torch.inf), same & ~left_out
    return z, same


class LabelledLSE(torch.autograd.Function):
    """``[log sum_j exp(s_ij / t), log sum_{j of the label of i} exp(s_ij / t)]`` over the rows j of all ranks but i itself.

    (N, D), t, (N,) -> (N, 2) float64. The rows are ``views`` blocks of the same length; of all views of a row none is in its sums.
    The matrix is symmetric: with the lse of the other rank's rows and the gradients that arrive for them, each rank finds its
    own rows' gradient alone, so that no gradient travels.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        temperature: float | Tensor,
        labels: Tensor,
        exchange: Exchange,
        kernels: ModuleType,
        views: int,
    ) -> Tensor:
        lse = x.new_full((len(x), 2), -torch.inf, dtype=torch.float64)
        for step, (y, y_labels) in exchange.trip((x, labels)):
            for rows, columns, own in _parts(len(x), len(y), step == 0, views):
                lse[rows] = torch.logaddexp(
                    lse[rows],
                    kernels.labelled_lse_forward(
                        x[rows], y[columns], labels[rows], y_labels[columns], temperature, own=own
                    ),
                )
        ctx.exchange, ctx.kernels, ctx.views = exchange, kernels, views
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        saved = temperature if ctx.temperature is None else None
        ctx.save_for_backward(x, labels, lse, saved)
        return lse

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor | None, ...], grad: Tensor):
        x, labels, lse, temperature = saved
        tau = ctx.temperature if temperature is None else temperature
        state = torch.cat([lse, grad], dim=1)  # (N, 4)
        grad_x = x.new_zeros(x.shape, dtype=accumulation_dtype(x.dtype))
        grad_tau = x.new_zeros((), dtype=torch.float64)
        for step, (y, y_labels, y_state) in ctx.exchange.trip((x, labels, state)):
            for rows, columns, own in _parts(len(x), len(y), step == 0, ctx.views):
                part, part_tau = ctx.kernels.labelled_lse_backward(
                    x[rows],
                    y[columns],
                    labels[rows],
                    y_labels[columns],
                    tau,
                    state[rows],
                    y_state[columns],
                    own=own,
                )
                grad_x[rows] += part
                grad_tau += part_tau
        grad_tau = None if temperature is None else grad_tau.to(temperature.dtype)
        return grad_x.to(x.dtype), grad_tau, None, None, None, None


class BothLSE(torch.autograd.Function):
    """``[log sum_j exp(q_i . k_j / t), log sum_j exp(q_j . k_i / t)]`` over the rows j of all ranks but the pair's own.

    (N, D), (N, D), t -> (N, 2) float64. Keys travel, and each block gives its columns' sums with its rows'. In the backward queries
    and keys travel with their sums, so that each rank finds its own rows' gradients alone: none travels.
    """

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        temperature: float | Tensor,
        exchange: Exchange,
        kernels: ModuleType,
    ) -> Tensor:
        by_row = query.new_full((len(query),), -torch.inf, dtype=torch.float64)
        by_column = {}  # of each rank's keys
        for step, (keys,) in exchange.trip((key,)):
            for owner, columns in exchange.by_owner(step, keys):
                own = owner == exchange.ranks.rank
                of_rows, by_column[owner] = _both_lse(kernels, query, columns, temperature, own)
                by_row = torch.logaddexp(by_row, of_rows)
        columns = exchange.to_owners([by_column[rank] for rank in range(exchange.ranks.size)])
        lse = torch.stack([by_row, columns.logsumexp(dim=0)], dim=1)
        ctx.exchange, ctx.kernels = exchange, kernels
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        saved = temperature if ctx.temperature is None else None
        ctx.save_for_backward(query, key, lse, saved)
        return lse

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor | None, ...], grad: Tensor):
        query, key, lse, temperature = saved
        tau, needs = ctx.temperature if temperature is None else temperature, ctx.needs_input_grad
        # Of queries and of keys: the lse and its weight, and those of a label that no other row has.
        nothing = torch.zeros_like(lse[:, 0])
        states = [torch.stack([lse[:, i], nothing, grad[:, i], nothing], dim=1) for i in range(2)]
        acc = accumulation_dtype(query.dtype)
        sums = [x.new_zeros(x.shape, dtype=acc) for x in (query, key)]
        grad_tau = query.new_zeros((), dtype=torch.float64)
        for step, (queries, keys, of_queries, of_keys) in ctx.exchange.trip((query, key, *states)):
            if len(query) == 0 or len(keys) == 0:
                continue
            others = ((keys, of_keys), (queries, of_queries))
            for i, (x, (y, y_state)) in enumerate(zip((query, key), others, strict=True)):
                if needs[i] or needs[2]:
                    part, part_tau = ctx.kernels.labelled_lse_backward(
                        x, y, *_apart(x, y), tau, states[i], y_state, own=step == 0
                    )
                    sums[i] += part
                    grad_tau += part_tau
        grads = [x.to(query.dtype) if need else None for x, need in zip(sums, needs, strict=False)]
        grad_tau = None if temperature is None else grad_tau.to(temperature.dtype)
        return *grads, grad_tau, None, None


def _both_lse(
    kernels: ModuleType, x: Tensor, y: Tensor, temperature: float | Tensor, own: bool
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the rows (N,) and of the columns (M,) of a block, float64; its pairs are left out if they are ``own``.

    Of a square without pairs the symmetric loss has both from one product.
    """
    if len(x) == 0 or len(y) == 0:
        return tuple(z.new_full((len(z),), -torch.inf, dtype=torch.float64) for z in (x, y))
    if not own and len(x) == len(y) and kernels is not backends.reference:
        options = {"normalize": True, "symmetric": True, "in_batch": True, "self_logit": None}
        lse = kernels.info_nce_forward(
            x[None], y[None], None, temperature, **options, grad_scale=None, needs=(False,) * 4
        )[1]
        return tuple(lse[:, 0].double())
    return tuple(
        kernels.labelled_lse_forward(a, b, *_apart(a, b), temperature, own=own)[:, 0]
        for a, b in ((x, y), (y, x))
    )


def _apart(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of rows and columns of which none is the same."""
    options = {"dtype": torch.int64}
    return x.new_zeros(len(x), **options), y.new_ones(len(y), **options)


def _parts(rows: int, columns: int, own: bool, views: int) -> list[tuple[slice, slice, bool]]:
    """The parts of a block: rows, columns, and whether a row leaves out the column of its number."""
    if rows == 0 or columns == 0:
        return []
    if not own:
        return [(slice(rows), slice(columns), False)]
    each = rows // views
    view = [slice(start, start + each) for start in range(0, rows, each)]
    return [(mine, other, True) for mine in view for other in view]


class SameLabelSum(torch.autograd.Function):
    """The sum over the rows of all ranks that have the row's label, its own among them: (N, C), (N,) -> (N, C).

    As a matrix it is symmetric, so that its backward is itself.
    """

    @staticmethod
    def forward(ctx, x: Tensor, labels: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        ctx.save_for_backward(labels)
        return _same_label_sum(x, labels, exchange)

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor], grad: Tensor):
        (labels,) = saved
        return _same_label_sum(grad.contiguous(), labels, ctx.exchange), None, None


def _same_label_sum(x: Tensor, labels: Tensor, exchange: Exchange) -> Tensor:
    """One sum per row that is the first of its label in sorted order, and one for all labels that no own row has."""
    found = labels.sort().values
    sums = x.new_zeros((len(x) + 1, x.shape[1]))
    for _, (y, y_labels) in exchange.trip((x, labels)):
        if len(x) > 0:
            place = torch.searchsorted(found, y_labels)
            is_here = found[place.clamp(max=len(x) - 1)] == y_labels
            sums.index_add_(0, place.where(is_here, len(x)), y)
    return sums[torch.searchsorted(found, labels)]


def _two_sums(x: Tensor, **_: object) -> Tensor:
    return x.new_empty((x.shape[0], 2), dtype=torch.float64)


def _gradients(x: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((), dtype=torch.float64)


declare(
    Op("labelled_lse", is_loss=False),
    Operator(
        "labelled_lse_forward(Tensor x, Tensor y, Tensor x_labels, Tensor y_labels, Tensor? temperature_tensor, "
        "float temperature, bool own) -> Tensor",
        _two_sums,
    ),
    Operator(
        "labelled_lse_backward(Tensor x, Tensor y, Tensor x_labels, Tensor y_labels, Tensor? temperature_tensor, "
        "float temperature, Tensor x_state, Tensor y_state, bool own) -> (Tensor grad_x, Tensor grad_temperature)",
        _gradients,
    ),
    labelled_lse_forward=labelled_lse_forward,
    labelled_lse_backward=labelled_lse_backward,
)
