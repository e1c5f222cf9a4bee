"""Log-sum-exp of the similarities of rows with columns, over all and over those of the row's label: one block of a larger matrix."""

import torch
from torch import Tensor

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
