"""Exact properties of InfoNCE: what may and may not change the result."""

import functools

import pytest
import torch

from fastnce import info_nce
from fastnce.testing import Sample, assert_close_to_truth, forget, rows

OP = "info_nce"


@pytest.fixture(autouse=True)
def supported(backend, needs_support):
    needs_support(OP, backend)


@pytest.fixture
def make(generator):
    return functools.partial(rows, dtype=torch.float64, device="cpu", generator=generator)


def forms(make):
    """query and key (2, 9, 6), a queue (11, 6), each query's own negatives (2, 9, 4, 6)."""
    return make(2, 9, 6), make(2, 9, 6), make(11, 6), make(2, 9, 4, 6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "key", "queue", "own"])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_bad_row_changes_only_what_the_equation_says(bad, where, normalize, backend, make):
    q, k, queue, own = (x.detach().float() for x in forms(make))
    negatives = queue if where == "queue" else own
    options = {"in_batch_negatives": True, "normalize": normalize, "reduction": "none"}
    clean = info_nce(q, k, negatives, **options, backend=backend)
    if where == "queue":
        queue[2, 3] = bad
    else:
        {"query": q, "key": k, "own": own[:, :, 2]}[where][1, 4, 2] = bad
    losses = info_nce(q, k, negatives, **options, backend=backend)

    untouched = torch.ones(2, 9, dtype=torch.bool)
    if where in ("query", "own"):
        untouched[1, 4] = False  # a term of this query's sum alone
    elif where == "key":
        untouched[1] = False  # of all queries of its batch element
    else:
        untouched[:] = False
    torch.testing.assert_close(losses[untouched], clean[untouched])
    if normalize:
        assert losses[~untouched].isnan().all()
    else:  # an infinite logit may be a positive or a negative one
        plain = info_nce(q, k, negatives, **options, backend="torch")
        torch.testing.assert_close(losses, plain, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_permuting_keys_permutes_their_gradients_only(backend, make):
    q, k, queue, _ = (x.detach().float() for x in forms(make))
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    grads = {}
    for name, negatives in (("plain", queue), ("permuted", queue[order])):
        leaves = [x.clone().requires_grad_() for x in (q, k, negatives)]
        loss = info_nce(*leaves, backend=backend)
        grads[name] = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    plain, permuted = grads["plain"], grads["permuted"]
    for x, y in zip(plain[:3], permuted[:3], strict=True):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(plain[3][order], permuted[3])


def test_scaling_rows_leaves_the_loss_and_divides_the_gradient(backend, make):
    q, k, queue, _ = (x.detach().float() for x in forms(make))
    factors = torch.logspace(-6, 6, 9).unsqueeze(-1)
    results = []
    for scale in (torch.ones(9, 1), factors):
        leaf = (q * scale).requires_grad_()
        losses = info_nce(leaf, k / scale, queue, reduction="none", backend=backend)
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
        results.append((losses.detach(), grad * scale))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_identities(reduction, backend, make):
    """A softmax sums to one: the gradients of all keys sum to zero. The loss depends on q / t only: q . dq = -t dt."""
    q, k, queue, _ = forms(make)
    tau = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    options = {"normalize": False, "in_batch_negatives": True, "reduction": reduction}
    losses = info_nce(q, k, queue, temperature=tau, backend=backend, **options)
    dq, dk, dn, dtau = torch.autograd.grad(losses.sum(), [q, k, queue, tau])
    zero = torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(dk.sum(dim=(0, 1)) + dn.sum(dim=0), zero)
    torch.testing.assert_close((q * dq).sum(), -tau.detach() * dtau)
    losses = info_nce(q, k, queue, temperature=tau, backend=backend)
    for x, grad in zip((q, k, queue), torch.autograd.grad(losses, [q, k, queue]), strict=True):
        torch.testing.assert_close((x * grad).sum(dim=-1), torch.zeros(x.shape[:-1], dtype=x.dtype))


def test_batch_elements_do_not_meet(backend, make):
    q, k, queue, own = forms(make)
    for negatives in (None, queue, own):
        whole = info_nce(q, k, negatives, reduction="none", backend=backend)
        parts = [
            info_nce(
                q[b],
                k[b],
                own[b] if negatives is own else negatives,
                reduction="none",
                backend=backend,
            )
            for b in range(2)
        ]
        assert whole.shape == (2, 9)
        torch.testing.assert_close(whole, torch.stack(parts))


def test_symmetric_is_the_mean_of_both_directions(backend, make):
    q, k, *_ = forms(make)
    both = info_nce(q, k, symmetric=True, reduction="none", backend=backend)
    there = info_nce(q, k, reduction="none", backend=backend)
    back = info_nce(k, q, reduction="none", backend=backend)
    torch.testing.assert_close(both, (there + back) / 2)


def test_a_queue_is_every_querys_own_negatives_expanded(backend, make):
    q, k, queue, _ = forms(make)
    own = queue.detach().expand(2, 9, 11, 6).requires_grad_()  # strides 0
    of_queue = torch.autograd.grad(info_nce(q, k, queue, backend=backend), [q, k, queue])
    of_own = torch.autograd.grad(info_nce(q, k, own, backend=backend), [q, k, own])
    torch.testing.assert_close(of_queue[:2], of_own[:2])
    torch.testing.assert_close(of_queue[2], of_own[2].sum(dim=(0, 1)))


def test_expanded_rows(backend, make):
    q = make(1, 6).detach().expand(9, 6).requires_grad_()
    k = make(9, 1).detach().expand(9, 6).requires_grad_()
    sample = Sample("expanded", {"query": q.float(), "positive_key": k.float()})
    expanded = {key: x.detach().requires_grad_() for key, x in sample.arguments.items()}
    assert_close_to_truth(OP, backend, Sample("expanded", expanded), torch.float32)


def test_query_and_key_may_be_one_tensor(backend, make):
    x = make(9, 6)
    y = x.detach().clone().requires_grad_()
    one = info_nce(x, x, temperature=0.5, backend=backend)
    two = info_nce(y, y.clone(), temperature=0.5, backend="torch")
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(torch.autograd.grad(one, x), torch.autograd.grad(two, y))


@pytest.mark.parametrize("form", ["in_batch", "queue"])
def test_rows_further_apart_than_int32_reaches(form, backend, make, needs_support):
    needs_support(OP, backend, torch.bfloat16)
    # 6 GB of addresses of which only a few pages are ever touched.
    far = torch.empty(3 * 2**30 + 64, dtype=torch.bfloat16)
    near = [make(4, 16, grad=False).bfloat16() for _ in range(2)]
    views = [
        far.as_strided((4, 16), (2**30, 1), offset).copy_(x)
        for offset, x in zip((0, 32), near, strict=True)
    ]
    names = ("query", "positive_key") if form == "in_batch" else ("query", "negative_keys")
    arguments = {"query": near[0], "positive_key": near[1]}
    arguments |= dict(zip(names, views, strict=True))
    sample = Sample("far", {key: x.detach().requires_grad_() for key, x in arguments.items()})
    try:
        assert_close_to_truth(OP, backend, sample, torch.bfloat16)
    finally:
        forget()  # with 6 GB of addresses held, the system may refuse to fork
