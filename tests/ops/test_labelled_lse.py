"""One block of a larger matrix of similarities: the kernels against plain PyTorch in fp64, and that against autograd."""

import pytest
import torch
from forms import DTYPES, among_nans, gaussian
from torch import Tensor

from fastnce import backends, reference

# As fp32 holds them: some kernels take the temperature as such.
TAUS = tuple(torch.tensor(tau).item() for tau in (1.0, 0.07, 0.01))


def kernels_of(backend: str, device: str):
    reason = backends.supports(backend, "labelled_lse", device, torch.float32)
    if reason != "ok":
        pytest.skip(reason)
    return backends.select("labelled_lse", torch.zeros(1, device=device), backend)


def rounding(backend, dtype, tau):
    """What a backend may add to twice the error of plain PyTorch, relative to the size of all gradients.

    Logits of size 1 / tau are rounded in fp32, which is a relative error of their exponentials; most of it averages out. In
    Triton the coefficients of the gradients go into the products in the inputs' dtype.
    """
    if dtype == torch.float64:
        return 1e-12
    if backend != "triton" and dtype != torch.float16:
        return 1e-6
    of_logits = torch.finfo(torch.float32).eps * max(8.0, 1 / tau)
    return of_logits + (torch.finfo(dtype).eps if backend == "triton" else 0.0)


def block(rows, columns, depth, dtype=torch.float32, device="cpu"):
    """x, y and their labels; of its own columns if there is no number of them."""
    x = gaussian(rows, depth, seed=6).to(device, dtype)
    labels = (gaussian(rows, seed=3) * 2).round().long().to(device) * 10**12 - 5
    if columns is None:
        return x, x, labels, labels
    y_labels = (gaussian(columns, seed=4) * 2).round().long().to(device) * 10**12 - 5
    return x, gaussian(columns, depth, seed=1).to(device, dtype), labels, y_labels


def state_of(lse: Tensor, seed: int) -> Tensor:
    """The lse of a larger matrix. As of a softmax, the weights that arrive for the two lse have opposite signs."""
    other = gaussian(*lse.shape, seed=seed).sigmoid().to(lse.device)
    weights = other * other.new_tensor([1.0, -0.5])
    return torch.cat([torch.logaddexp(lse, other), weights], dim=1)


def states(x, y, x_labels, y_labels, tau, own):
    forward = reference.labelled_lse_forward
    x, y = x.double(), y.double()
    rows = state_of(forward(x, y, x_labels, y_labels, tau, own=own), 1)
    return rows, rows if own else state_of(forward(y, x, y_labels, x_labels, tau, own=own), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "depth"),
    [(1, 1, 2), (1, None, 3), (5, None, 3), (64, 65, 33), (530, 9, 16), (9, 8300, 7), (130, None, 27)],
)  # fmt: skip
def test_against_the_reference_in_double(
    fused_backend, device, needs_support, rows, columns, depth, dtype
):
    needs_support("labelled_lse", fused_backend, dtype)
    kernels, own = kernels_of(fused_backend, device), columns is None
    if fused_backend == "triton" and columns == 8300:
        columns = 300  # parts enough for its tiles, where each takes the interpreter a while
    for tau in TAUS:
        x, y, *labels = block(rows, columns, depth, dtype, device)
        arguments = (*labels, tau)
        lse = kernels.labelled_lse_forward(x, y, *arguments, own=own)
        truth = reference.labelled_lse_forward(x.double(), y.double(), *arguments, own=own)
        assert lse.dtype == torch.float64 and lse.shape == (rows, 2)
        # Logits of 1 / tau are rounded in fp32.
        close = {"rtol": 0, "atol": (1e-14 if dtype == torch.float64 else 1e-6) / tau}
        torch.testing.assert_close(lse, truth, **close)
        backward = (*arguments, *states(x, y, *labels, tau, own))
        true = reference.labelled_lse_backward(x.double(), y.double(), *backward, own=own)
        plain = reference.labelled_lse_backward(x, y, *backward, own=own)
        found = kernels.labelled_lse_backward(x, y, *backward, own=own)
        size = true[0].norm() + true[1].abs() + 1e-30
        for grad, in_dtype, expected in zip(found, plain, true, strict=True):
            bound = 2 * (in_dtype - expected).norm() + rounding(fused_backend, dtype, tau) * size
            assert (grad - expected).norm() <= bound, (tau, grad.shape)


def test_all_blocks_together_have_the_gradients_of_autograd():
    """Rows in two blocks: the sums of the blocks' parts are the derivative of the whole."""
    x, _, labels, _ = block(12, None, 5, torch.float64)
    leaf = x.clone().requires_grad_()
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    z = torch.nn.functional.normalize(leaf) @ torch.nn.functional.normalize(leaf).T / tau
    z = z.masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf)
    same = labels[:, None] == labels[None, :]
    lse = torch.stack([z.logsumexp(1), z.masked_fill(~same, -torch.inf).logsumexp(1)], dim=1)
    weights = gaussian(12, 2, seed=3)
    (lse * weights).sum().backward()
    state = torch.cat([lse.detach(), weights], dim=1)
    found, found_tau = torch.zeros_like(x), torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 5), slice(5, 12)):
        for columns in (slice(0, 5), slice(5, 12)):
            arguments = (x[rows], x[columns], labels[rows], labels[columns], tau.detach())
            both = state[rows], state[columns]
            parts = reference.labelled_lse_backward(*arguments, *both, own=rows == columns)
            found[rows] += parts[0]
            found_tau += parts[1]
    torch.testing.assert_close(found, leaf.grad)
    torch.testing.assert_close(found_tau, tau.grad)


def test_strides_a_row_of_zeros_and_the_temperature_as_a_tensor(fused_backend, device):
    kernels = kernels_of(fused_backend, device)
    x, y, x_labels, y_labels = block(20, 31, 8, device=device)
    x[3] = 0
    both = states(x, y, x_labels, y_labels, 0.5, False)
    labels = torch.stack([x_labels, x_labels + 1], dim=1)[:, 0], y_labels
    lse = reference.labelled_lse_forward(x, y, x_labels, y_labels, 0.5, own=False)
    true = reference.labelled_lse_backward(x, y, x_labels, y_labels, 0.5, *both, own=False)
    for tau in (0.5, torch.tensor(0.5, device=device)):
        arguments = (among_nans(x), y.T.contiguous().T, *labels, tau)
        got = kernels.labelled_lse_forward(*arguments, own=False)
        torch.testing.assert_close(got, lse, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got[3, 0], got.new_tensor(31.0).log(), rtol=1e-6, atol=0)
        grad, grad_tau = kernels.labelled_lse_backward(*arguments, *both, own=False)
        torch.testing.assert_close(grad.to(true[0].dtype), true[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grad_tau.double(), true[1].double(), rtol=1e-5, atol=1e-5)
        assert grad[3].eq(0).all()


def test_labels_that_a_side_does_not_have(fused_backend, device):
    """No column of a row's label: the row's second lse is -inf, and has no part in the gradient."""
    kernels = kernels_of(fused_backend, device)
    x, y, x_labels, y_labels = block(6, 5, 8, device=device)
    labels = (torch.full_like(x_labels, 7), torch.full_like(y_labels, 8))
    lse = kernels.labelled_lse_forward(x, y, *labels, 0.5, own=False)
    assert lse[:, 0].isfinite().all() and lse[:, 1].eq(-torch.inf).all()
    other = reference.labelled_lse_forward(y, x, labels[1], labels[0], 0.5, own=False)
    both = (torch.cat([part, torch.ones_like(part)], 1) for part in (lse, other))
    arguments = (x, y, *labels, 0.5, *both)
    got = kernels.labelled_lse_backward(*arguments, own=False)
    true = reference.labelled_lse_backward(*arguments, own=False)
    for grad, expected in zip(got, true, strict=True):
        torch.testing.assert_close(grad.to(expected.dtype), expected, rtol=1e-4, atol=1e-5)


def test_results_do_not_depend_on_the_threads(fused_backend, threads):
    kernels = kernels_of(fused_backend, "cpu")
    x, y, *labels = block(300, 700, 16)
    arguments, found = (x, y, *labels, 0.1), []
    both = states(*arguments, False)
    for count in (1, 3):
        threads(count)
        lse = kernels.labelled_lse_forward(*arguments, own=False)
        found.append((lse, *kernels.labelled_lse_backward(*arguments, *both, own=False)))
    if fused_backend == "blocks":  # of PyTorch's products the last bits do
        torch.testing.assert_close(*found)
    else:
        assert all(map(torch.equal, *found))
