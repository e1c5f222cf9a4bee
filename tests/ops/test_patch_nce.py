"""PatchNCE against the definition of CUT: the -10 on the diagonal, per image or per batch, over layers."""

import functools

import pytest
import torch
import torch.nn.functional as F

import fastnce
from fastnce import patch_nce
from fastnce.testing import Sample, assert_close_to_truth, rows, run

OP = "patch_nce"


@pytest.fixture(autouse=True)
def supported(backend, needs_support):
    needs_support(OP, backend)


@pytest.fixture
def make(generator):
    return functools.partial(rows, dtype=torch.float64, device="cpu", generator=generator)


def defined(query, key, tau, negatives="image"):
    """CUT's loss of one layer: the positive in column 0, then all similarities with -10 on the diagonal."""
    if negatives == "batch":
        query, key = query.flatten(0, 1)[None], key.flatten(0, 1)[None]
    q, k = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    positive = (q * k).sum(dim=-1).flatten()[:, None]  # (B * S, 1)
    others = torch.bmm(q, k.mT)
    others = others.masked_fill(torch.eye(q.shape[1], dtype=torch.bool), -10.0).flatten(0, 1)
    logits = torch.cat([positive, others], dim=1) / tau
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


@pytest.mark.parametrize("tau", [0.07, 1.0, 4.0])
@pytest.mark.parametrize("negatives", ["image", "batch"])
def test_definition(tau, negatives, backend, make):
    q, k = make(3, 7, 5), make(3, 7, 5)
    t = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    got = patch_nce(q, k, temperature=t, negatives=negatives, backend=backend)
    expected = defined(q, k, t, negatives)
    torch.testing.assert_close(got, expected)
    got_grads = torch.autograd.grad(got, [q, k, t])
    for x, y in zip(got_grads, torch.autograd.grad(expected, [q, k, t]), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("negatives", ["image", "batch"])
def test_layers_are_averaged(negatives, backend, make):
    shapes = [(2, 7, 5), (2, 12, 3), (2, 1, 8)]
    queries, keys = [make(*s) for s in shapes], [make(*s) for s in shapes]
    got = patch_nce(queries, keys, negatives=negatives, backend=backend)
    expected = sum(defined(q, k, 0.07, negatives) for q, k in zip(queries, keys, strict=True)) / 3
    torch.testing.assert_close(got, expected)
    leaves = queries + keys
    expected_grads = torch.autograd.grad(expected, leaves)
    for x, y in zip(torch.autograd.grad(got, leaves), expected_grads, strict=True):
        torch.testing.assert_close(x, y)


def test_the_constant_counts_at_high_temperature_only(backend, make):
    q, k = make(1, 2, 5), make(1, 2, 5)
    for tau, counts in ((0.07, False), (4.0, True)):
        with_constant = patch_nce(q, k, temperature=tau, backend=backend)
        without = fastnce.info_nce(q, k, temperature=tau, backend=backend)
        assert (with_constant - without > 1e-3) == counts


def test_one_patch_has_the_constant_as_its_only_negative(backend, make):
    q, k = make(2, 1, 5), make(2, 1, 5)
    cosine = F.cosine_similarity(q, k, dim=-1)
    expected = F.softplus((-10 - cosine) / 2.0).mean()
    torch.testing.assert_close(patch_nce(q, k, temperature=2.0, backend=backend), expected)


def test_images_do_not_meet(backend, make):
    q, k = make(3, 7, 5), make(3, 7, 5)
    alone = [patch_nce(q[b : b + 1], k[b : b + 1], backend=backend) for b in range(3)]
    torch.testing.assert_close(patch_nce(q, k, backend=backend), sum(alone) / 3)
    one_image = patch_nce(q.flatten(0, 1)[None], k.flatten(0, 1)[None], backend=backend)
    torch.testing.assert_close(patch_nce(q, k, negatives="batch", backend=backend), one_image)


def test_detached_keys_get_no_gradient(backend, make):
    q, k = make(2, 7, 5), make(2, 7, 5)
    (with_keys, _) = torch.autograd.grad(patch_nce(q, k, backend=backend), [q, k])
    loss = patch_nce(q, k.detach(), backend=backend)
    torch.testing.assert_close(torch.autograd.grad(loss, q)[0], with_keys)


def test_tuples_and_mixed_dtypes_of_layers(backend, make):
    """Under autocast the layers of one call may differ in dtype."""
    queries = (make(2, 7, 5).detach().float(), make(2, 9, 4).detach().bfloat16())
    keys = (make(2, 7, 5).detach().float(), make(2, 9, 4).detach().bfloat16())
    got = patch_nce(queries, keys, backend=backend)
    expected = patch_nce([x.double() for x in queries], [x.double() for x in keys], backend="torch")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


SHAPES = [
    (1, 256, 256),
    (2, 256, 3),
    (1, 64, 128),
    (4, 63, 27),
    (2, 1, 16),
    (1, 507, 96),
    (8, 2, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("negatives", ["image", "batch"])
def test_shapes(shape, dtype, negatives, backend, needs_support):
    needs_support(OP, backend, dtype)
    assert_close_to_truth(OP, backend, shaped_sample(shape, dtype, negatives), dtype)


@functools.cache
def shaped_sample(shape, dtype, negatives):
    generator = torch.Generator().manual_seed(1)
    make = functools.partial(rows, dtype=dtype, device="cpu", generator=generator)
    query = make(*shape)
    key = query.detach() + make(*shape, grad=False)
    arguments = {"query_features": query, "key_features": key, "negatives": negatives}
    return Sample(str(shape), arguments)


def test_all_five_layers_of_cut_in_deterministic_mode(backend):
    generator = torch.Generator().manual_seed(1)
    make = functools.partial(rows, dtype=torch.float32, device="cpu", generator=generator)
    arguments = {"query_features": [make(1, 256, 256) for _ in range(5)]}
    arguments["key_features"] = [make(1, 256, 256, grad=False) for _ in range(5)]
    sample = Sample("cut", arguments)
    assert_close_to_truth(OP, backend, sample, torch.float32)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(OP, sample, backend=backend) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_zero_patches(backend, make):
    q, k = make(2, 7, 5).detach(), make(2, 7, 5).detach()
    q[0, 3], k[1, 2] = 0, 0
    q, k = q.float().requires_grad_(), k.float().requires_grad_()
    patch_nce(q, k, backend=backend).backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all()
    assert q.grad[0, 3].eq(0).all() and k.grad[1, 2].eq(0).all()


def test_a_bad_image_leaves_the_gradients_of_the_others(backend, make):
    q, k = make(2, 7, 5).detach().float().requires_grad_(), make(2, 7, 5).detach().float()
    (clean,) = torch.autograd.grad(patch_nce(q, k, backend=backend), q)
    k[1, 0] = torch.nan
    (got,) = torch.autograd.grad(patch_nce(q, k, backend=backend), q)
    torch.testing.assert_close(got[0], clean[0])
    assert got[1].isnan().all()
