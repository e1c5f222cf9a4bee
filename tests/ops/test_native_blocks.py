"""The compiled CPU kernels cut their matrices into blocks and share these among threads: neither changes the results."""

import pytest
import torch
from loss_forms import check_form, check_the_constant_of_patch_nce
from native_calls import BLOCKS, IN_BATCH, SYMMETRIC, deviations, kernel_results, reference_results

from fastnce import reference
from fastnce.backends import native

pytestmark = pytest.mark.skipif(native.available() != "ok", reason=native.available())


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_add_up(name):
    assert max(deviations(kernel_results(name, torch.float64), reference_results(name))) < 1e-11
    single = [x.double() for x in kernel_results(name)]
    assert max(deviations(single, reference_results(name))) < 2e-5


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_bfloat16_add_up(name):
    """Exact losses; gradients whose products round their factors, and then the result, to 2^-9."""
    loss, *grads = [x.double() for x in kernel_results(name, torch.bfloat16)]
    expected_loss, *expected = reference_results(name, torch.bfloat16)
    assert max(deviations([loss], [expected_loss])) < 2e-5
    for got, true in zip(grads, expected, strict=True):
        assert ((got - true).norm() / true.norm()).item() < 6e-3


@pytest.mark.parametrize("name", BLOCKS)
def test_medium_precision_rounds_the_factors_of_products(name, medium_precision):
    expected = reference_results(name)
    for got, true in zip(kernel_results(name), expected, strict=True):
        assert ((got.double() - true).norm() / true.norm()).item() < 2e-2


def test_the_constant_beside_the_columns():
    """One that can be seen: CUT's, in the blocks above, changes no bit of the results."""
    check_form(native, "cpu", "constant", 0.1)
    check_the_constant_of_patch_nce(native, "cpu")


@pytest.fixture
def medium_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_symmetric_is_the_mean_of_both_directions_beyond_one_block_of_columns():
    query, key = torch.randn(2, 1, 8300, 3, generator=torch.Generator().manual_seed(0))
    call = {"grad_scale": 1.0, "needs": (True, True, False, False)}
    loss, lse, (dq, dk, *_) = native.info_nce_forward(query, key, None, 0.2, **SYMMETRIC, **call)
    row, row_lse, (dq_row, dk_row, *_) = native.info_nce_forward(
        query, key, None, 0.2, **IN_BATCH, **call
    )
    column, column_lse, (dk_column, dq_column, *_) = native.info_nce_forward(
        key, query, None, 0.2, **IN_BATCH, **call
    )
    torch.testing.assert_close(lse, torch.stack([row_lse, column_lse]))
    torch.testing.assert_close(loss, (row + column) / 2)
    scale = dq.abs().max()
    torch.testing.assert_close(dq / scale, (dq_row + dq_column) / 2 / scale)
    torch.testing.assert_close(dk / scale, (dk_row + dk_column) / 2 / scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BLOCKS)
def test_thread_count_changes_no_bit(name, dtype, threads):
    threads(1)
    expected = kernel_results(name, dtype)
    for count in (2, 3):
        threads(count)
        for x, y in zip(kernel_results(name, dtype), expected, strict=True):
            assert torch.equal(x, y), count


def conditional_inputs(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, count, 20, generator=generator, dtype=torch.float64).to(dtype)
    return *rows, torch.randint(20, (count,), generator=generator)


def conditional_results(count: int, tau: float, dtype: torch.dtype = torch.float32):
    """Losses and gradients, those of the forward and those of the backward."""
    inputs = conditional_inputs(count, dtype)
    call = {"needs": (True, True, True)}
    loss, lse, now = native.conditional_contrastive_forward(*inputs, tau, grad_scale=0.25, **call)
    upstream = torch.linspace(0, 1, count, dtype=loss.dtype)
    later = native.conditional_contrastive_backward(upstream, *inputs, tau, lse, **call)
    return [loss, *now, *later]


@pytest.mark.parametrize("count", [130, 700, 3400])
@pytest.mark.parametrize("tau", [0.01, 0.2], ids=["maximum", "fixed_offset"])
def test_thread_count_changes_no_bit_conditional_contrastive(count, tau, threads):
    threads(1)
    expected = conditional_results(count, tau)
    for number in (2, 3, 5):
        threads(number)
        for x, y in zip(conditional_results(count, tau), expected, strict=True):
            assert torch.equal(x, y), number


@pytest.mark.parametrize("count", [47, 130, 700, 2500])
@pytest.mark.parametrize("tau", [0.01, 0.2], ids=["maximum", "fixed_offset"])
def test_blocks_of_conditional_contrastive_add_up(count, tau):
    """Blocks that the diagonal cuts, and more of them than are kept at a time (from 2300 rows on in double).

    Weights of one sign: with both, the temperature's gradient is the small difference of large sums.
    """
    embeddings, proxies, labels = conditional_inputs(count, torch.float64)
    temperature = torch.tensor(tau, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (embeddings, proxies, temperature)]
    loss = reference.conditional_contrastive(embeddings, proxies, labels, temperature)
    expected = [loss.detach()]
    upstream = torch.linspace(0, 1, count, dtype=torch.float64)
    for weight in (torch.full_like(loss, 0.25), upstream):
        expected += torch.autograd.grad(loss, leaves, weight, retain_graph=True)
    assert max(deviations(conditional_results(count, tau, torch.float64), expected)) < 1e-10
    single = [x.double() for x in conditional_results(count, tau)]
    assert max(deviations(single, expected)) < 5e-5


def sup_con_results(count: int, tau: float, dtype: torch.dtype = torch.float32):
    """Losses, lse and gradients, those of the forward and those of the backward; classes below and above 8 rows."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, 40, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(count // 7, (count,), generator=generator)
    call = {"needs": (True, True)}
    loss, _, lse, now = native.sup_con_forward(
        features, labels, tau, grad_scale=1.0, mean=True, **call
    )
    upstream = torch.linspace(-1, 1, count, dtype=loss.dtype)
    return [
        loss,
        lse,
        *now,
        *native.sup_con_backward(upstream, features, labels, tau, lse, **call),
    ]


@pytest.mark.parametrize("count", [130, 700, 3400])
@pytest.mark.parametrize("tau", [0.01, 0.2], ids=["maximum", "fixed_offset"])
def test_thread_count_changes_no_bit_sup_con(count, tau, threads):
    threads(1)
    expected = sup_con_results(count, tau)
    for number in (2, 3, 5):
        threads(number)
        for x, y in zip(sup_con_results(count, tau), expected, strict=True):
            assert torch.equal(x, y), number


@pytest.mark.parametrize("count", [130, 700, 2500, 8300])
@pytest.mark.parametrize("tau", [0.01, 0.2], ids=["maximum", "fixed_offset"])
def test_blocks_of_sup_con_add_up(count, tau):
    """Several panels, blocks of columns, and blocks that the diagonal cuts; single precision beside double."""
    if count < 8000:  # the reference keeps the whole matrix
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(count, 40, generator=generator, dtype=torch.float64)
        labels = torch.randint(count // 7, (count,), generator=generator)
        x, t = features.requires_grad_(), torch.tensor(tau, dtype=torch.float64, requires_grad=True)
        loss, has_positive = reference.sup_con(x, labels, t)
        weights = (
            torch.ones_like(loss) / has_positive.sum(),
            torch.linspace(-1, 1, count, dtype=torch.float64),
        )
        expected = [loss.detach()]
        for weight in weights:
            expected += torch.autograd.grad(loss, [x, t], weight, retain_graph=True)
        loss, _, *grads = sup_con_results(count, tau, torch.float64)
        assert max(deviations([loss, *grads], expected)) < 1e-10
    single = [x.double() for x in sup_con_results(count, tau)]
    assert max(deviations(single, sup_con_results(count, tau, torch.float64))) < 5e-5


def test_sup_con_beyond_one_block_of_columns():
    """Of more columns than a part takes, against the definition row by row."""
    count, tau = 16_700, 0.3
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(count) // 2
    unit = torch.nn.functional.normalize(x)
    expected, grad = [], torch.zeros_like(unit)
    for rows in torch.arange(count).split(1000):
        logits = unit[rows] @ unit.T / tau
        logits[torch.arange(len(rows)), rows] = -torch.inf
        lse = logits.logsumexp(1, keepdim=True)
        expected.append((lse - logits.gather(1, (rows ^ 1).unsqueeze(1))).squeeze(1))
        share = logits.sub_(lse).exp_()
        grad[rows] += (share @ unit - unit[rows ^ 1]) / tau
        grad += share.T @ unit[rows] / tau
        grad[rows ^ 1] -= unit[rows] / tau
    along = (grad * unit).sum(1, keepdim=True)
    gradient = (grad - along * unit) / x.norm(dim=1, keepdim=True)
    loss, _, _, (got, _) = native.sup_con_forward(
        x.float(), labels, tau, grad_scale=1.0, mean=False, needs=(True, False)
    )
    torch.testing.assert_close(loss.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)
    norm = x.norm(dim=1, keepdim=True)
    assert ((got - gradient) * norm).norm() < 1e-4 * (gradient * norm).norm()
