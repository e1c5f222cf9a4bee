"""One block of a larger matrix of similarities: the kernels against plain PyTorch in fp64, and that against autograd."""

import pytest
import torch

from fastnce import backends, reference

# As fp32 holds them: some kernels take the temperature as such.
TAUS = tuple(torch.tensor(tau).item() for tau in (1.0, 0.07, 0.01))


@pytest.fixture
def kernels(backend, device, needs_support):
    needs_support("labelled_lse", backend)
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


def moved(device, *tensors):
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in tensors]


def block(rows, columns, depth, dtype=torch.float64, seed=0):
    """x, y, their labels, and their states, the lse of which are those of a larger matrix."""
    generator = torch.Generator().manual_seed(seed)
    own = columns is None
    x = torch.randn(rows, depth, generator=generator, dtype=torch.float64).to(dtype)
    y = (
        x
        if own
        else torch.randn(columns, depth, generator=generator, dtype=torch.float64).to(dtype)
    )
    x_labels = torch.randint(4, (rows,), generator=generator) * 10**12 - 5
    y_labels = x_labels if own else torch.randint(4, (columns,), generator=generator) * 10**12 - 5
    return x, y, x_labels, y_labels


def state_of(lse, seed):
    generator = torch.Generator().manual_seed(seed)
    other = torch.rand(lse.shape, generator=generator, dtype=torch.float64).to(lse.device)
    # As a softmax's gradient: the weights that arrive for the two lse have opposite signs.
    weights = other * other.new_tensor([1.0, -0.5])
    return torch.cat([torch.logaddexp(lse, other), weights], dim=1)


def states(x, y, x_labels, y_labels, tau, own):
    forward = reference.labelled_lse_forward
    x, y = x.double(), y.double()
    rows = state_of(forward(x, y, x_labels, y_labels, tau, own=own), 1)
    return rows, rows if own else state_of(forward(y, x, y_labels, x_labels, tau, own=own), 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "columns", "depth"),
    [(1, 1, 2), (1, None, 3), (5, None, 3), (64, 65, 33), (530, 9, 16), (9, 8300, 7), (130, None, 27)],
)  # fmt: skip
def test_against_the_reference_in_double(
    kernels, backend, device, needs_support, rows, columns, depth, dtype
):
    needs_support("labelled_lse", backend, dtype)
    own = columns is None
    if backend == "triton" and columns == 8300:
        columns = 300  # parts enough for its tiles, where each takes the interpreter a while
    for tau in TAUS:
        x, y, *labels = moved(device, *block(rows, columns, depth, dtype))
        arguments = (*labels, tau)
        lse = kernels.labelled_lse_forward(x, y, *arguments, own=own)
        truth = reference.labelled_lse_forward(x.double(), y.double(), *arguments, own=own)
        assert lse.dtype == torch.float64 and lse.shape == (rows, 2)
        # Logits of 1 / tau are rounded in fp32.
        close = {"rtol": 0, "atol": (1e-14 if dtype == torch.float64 else 1e-6) / tau}
        torch.testing.assert_close(lse, truth, **close)
        both = states(x, y, *labels, tau, own)
        backward = (*arguments, *both)
        true = reference.labelled_lse_backward(x.double(), y.double(), *backward, own=own)
        plain = reference.labelled_lse_backward(x, y, *backward, own=own)
        found = kernels.labelled_lse_backward(x, y, *backward, own=own)
        size = true[0].norm() + true[1].abs() + 1e-30
        for grad, in_dtype, expected in zip(found, plain, true, strict=True):
            bound = 2 * (in_dtype - expected).norm() + rounding(backend, dtype, tau) * size
            assert (grad - expected).norm() <= bound, (tau, grad.shape)


def test_all_blocks_together_have_the_gradients_of_autograd():
    """Rows in two blocks: the sums of the blocks' parts are the derivative of the whole."""
    x, _, labels, _ = block(12, None, 5)
    tau = torch.tensor(0.3, dtype=torch.float64)
    leaf, leaf_tau = x.clone().requires_grad_(), tau.clone().requires_grad_()
    z = torch.nn.functional.normalize(leaf) @ torch.nn.functional.normalize(leaf).T / leaf_tau
    z = z.masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf)
    same = labels[:, None] == labels[None, :]
    lse = torch.stack([z.logsumexp(1), z.masked_fill(~same, -torch.inf).logsumexp(1)], dim=1)
    weights = torch.randn(12, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (lse * weights).sum().backward()
    state = torch.cat([lse.detach(), weights], dim=1)
    parts = slice(0, 5), slice(5, 12)
    found, found_tau = torch.zeros_like(x), torch.zeros((), dtype=torch.float64)
    for rows in parts:
        for columns in parts:
            own = rows == columns
            arguments = (x[rows], x[columns], labels[rows], labels[columns], tau)
            both = state[rows], state[columns]
            grad, grad_tau = reference.labelled_lse_backward(*arguments, *both, own=own)
            found[rows] += grad
            found_tau += grad_tau
    torch.testing.assert_close(found, leaf.grad)
    torch.testing.assert_close(found_tau, leaf_tau.grad)


def test_strides_and_a_row_of_zeros(kernels, backend, device):
    dtype = torch.float32 if backend == "triton" else torch.float64
    x, y, x_labels, y_labels = moved(device, *block(20, 31, 8, dtype))
    x[3] = 0
    wide = x.new_full((20, 16), torch.nan)
    wide[:, ::2] = x
    labels = torch.stack([x_labels, x_labels + 1], dim=1)[:, 0]
    arguments = (labels, y_labels, 0.5)
    lse = kernels.labelled_lse_forward(wide[:, ::2], y.T.contiguous().T, *arguments, own=False)
    torch.testing.assert_close(
        lse[3, 0], lse.new_tensor(31.0).log(), rtol=1e-6 if backend == "triton" else 1e-12, atol=0
    )
    both = states(x, y, x_labels, y_labels, 0.5, False)
    grad, _ = kernels.labelled_lse_backward(wide[:, ::2], y, *arguments, *both, own=False)
    true, _ = reference.labelled_lse_backward(x, y, *arguments, *both, own=False)
    torch.testing.assert_close(grad, true)
    assert grad[3].eq(0).all()


def test_the_temperature_as_a_tensor(kernels, backend, device):
    x, y, *labels = moved(device, *block(20, 31, 8, torch.float32))
    both = states(x, y, *labels, 0.5, False)
    for tau in (0.5, torch.tensor(0.5, device=device)):
        lse = kernels.labelled_lse_forward(x, y, *labels, tau, own=False)
        _, grad_tau = kernels.labelled_lse_backward(x, y, *labels, tau, *both, own=False)
        true = reference.labelled_lse_forward(x, y, *labels, tau, own=False)
        torch.testing.assert_close(lse, true, rtol=1e-6, atol=1e-6)
        _, true_tau = reference.labelled_lse_backward(x, y, *labels, tau, *both, own=False)
        torch.testing.assert_close(grad_tau.double(), true_tau.double(), rtol=1e-5, atol=1e-5)


def test_compiled_without_a_graph_break(kernels, fused_backend, device):
    x, y, *labels = moved(device, *block(20, 31, 8, torch.float32))
    tau = torch.tensor(0.5, device=device)
    both = states(x, y, *labels, tau, False)

    def function(x, y, x_labels, y_labels, tau, x_state, y_state):
        arguments = (x, y, x_labels, y_labels, tau)
        lse = kernels.labelled_lse_forward(*arguments, own=False)
        grads = kernels.labelled_lse_backward(*arguments, x_state, y_state, own=False)
        return lse, *grads

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    arguments = (x, y, *labels, tau, *both)
    for got, expected in zip(compiled(*arguments), function(*arguments), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


def test_labels_that_a_side_does_not_have(kernels, device):
    """No column of a row's label: the row's second lse is -inf, and has no part in the gradient."""
    x, y, x_labels, y_labels = moved(device, *block(6, 5, 8, torch.float32))
    labels = (torch.full_like(x_labels, 7), torch.full_like(y_labels, 8))
    lse = kernels.labelled_lse_forward(x, y, *labels, 0.5, own=False)
    assert lse[:, 0].isfinite().all() and lse[:, 1].eq(-torch.inf).all()
    weights = torch.ones_like(lse)
    other = reference.labelled_lse_forward(y, x, labels[1], labels[0], 0.5, own=False)
    both = torch.cat([lse, weights], 1), torch.cat([other, torch.ones_like(other)], 1)
    arguments = (x, y, *labels, 0.5, *both)
    got = kernels.labelled_lse_backward(*arguments, own=False)
    true = reference.labelled_lse_backward(*arguments, own=False)
    for grad, expected in zip(got, true, strict=True):
        torch.testing.assert_close(grad.to(expected.dtype), expected, rtol=1e-4, atol=1e-5)


def test_results_do_not_depend_on_the_threads(kernels, fused_backend):
    x, y, *labels = block(300, 700, 16, torch.float32)
    both = states(x, y, *labels, 0.1, False)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        lse = kernels.labelled_lse_forward(x, y, *labels, 0.1, own=False)
        found.append((lse, *kernels.labelled_lse_backward(x, y, *labels, 0.1, *both, own=False)))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
