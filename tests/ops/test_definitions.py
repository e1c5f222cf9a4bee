"""Every loss against its equation, typed once more with torch.nn.functional; and what follows from the equation."""

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from forms import gaussian
from torch import Tensor

import fastnce
from fastnce import info_nce, nt_xent, patch_nce, sup_con
from fastnce.reference.normalize import rounded_unit_rows

LABELS = torch.tensor([0, 1, 2, 0, 1, 0, 7, 7, -3])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT


def cross_entropy(logits: Tensor, target: Tensor | None = None) -> Tensor:
    """Of each row; the positive in column 0 if there is no target."""
    target = torch.zeros(len(logits), dtype=torch.long) if target is None else target
    return F.cross_entropy(logits, target, reduction="none")


def nce(q, k, n, t, *, in_batch=False, similarity=cosine):
    """Columns are the positives, with ``in_batch`` every key, and the negatives of all queries or (N, M, D) of each."""
    pairs = similarity(q, k)
    columns = [pairs if in_batch else pairs.diagonal()[:, None]]
    if n is not None:
        columns.append(similarity(q, n) if n.dim() == 2 else similarity(q[:, None], n)[:, 0])
    target = torch.arange(len(q)) if in_batch else None
    return cross_entropy(torch.cat(columns, dim=1) / t, target)


joined = functools.partial(nce, in_batch=True)


def in_batch(q, k, t, *, similarity=cosine):
    return joined(q, k, None, t, similarity=similarity)


def symmetric(q, k, t, *, similarity=cosine):
    there, back = (in_batch(*x, t, similarity=similarity) for x in ((q, k), (k, q)))
    return (there + back) / 2


def dot_products(a, b):
    return a @ b.mT


def in_fp8(a, b):
    """Rounded, with the gradients of the exact ones."""
    exact = cosine(a, b)
    return exact + (rounded_unit_rows(a) @ rounded_unit_rows(b).mT - exact).detach()


def of_each(defined: Callable, per_element: int) -> Callable:
    """Batch elements do not meet: the first ``per_element`` arguments have one entry each, the others are of all."""

    def batched(*arguments, **options):
        parts, shared = arguments[:per_element], arguments[per_element:]
        each = [defined(*part, *shared, **options) for part in zip(*parts, strict=True)]
        return torch.stack(each)

    return batched


def cut(query, key, t):
    """CUT's loss of one image: the positive in column 0, then all similarities with -10 on the diagonal."""
    others = cosine(query, key).masked_fill(torch.eye(len(query), dtype=torch.bool), -10.0)
    return cross_entropy(torch.cat([(F.cosine_similarity(query, key))[:, None], others], 1) / t)


def cut_of_a_batch(query, key, t):
    return cut(query.flatten(0, 1), key.flatten(0, 1), t).view(query.shape[:2])


def cfl(query, key, t, *, symmetric=False, query_negatives=False, detach_keys=False):
    """Contrastive Feature Loss's of one image: sums of exponentials, patch by patch."""

    def one_way(q, k):
        k = k.detach() if detach_keys else k
        losses = []
        for i in range(len(q)):
            others = [k[j] for j in range(len(q)) if j != i]
            others += [q[j] for j in range(len(q)) if j != i and query_negatives]
            total = (1 + query_negatives) * (-10.0 / t).exp()
            for row in [k[i], *others]:
                total = total + (F.cosine_similarity(q[i], row, dim=0) / t).exp()
            losses.append(total.log() - F.cosine_similarity(q[i], k[i], dim=0) / t)
        return torch.stack(losses)

    there = one_way(query, key)
    return (there + one_way(key, query)) / 2 if symmetric else there


def two_c(e, p, t):
    """Sums of exponentials, sample by sample, as in ContraGAN's equation."""
    losses = []
    for i in range(len(e)):
        numerator = denominator = (F.cosine_similarity(e[i], p[i], dim=0) / t).exp()
        for j in range(len(e)):
            if j != i:
                term = (F.cosine_similarity(e[i], e[j], dim=0) / t).exp()
                denominator = denominator + term
                numerator = numerator + term * (LABELS[j] == LABELS[i])
        losses.append(-(numerator / denominator).log())
    return torch.stack(losses)


def simclr(z1, z2, t):
    z, count = torch.cat([z1, z2]), 2 * len(z1)
    logits = (cosine(z, z) / t).masked_fill(torch.eye(count, dtype=torch.bool), -torch.inf)
    return cross_entropy(logits, torch.arange(count).roll(len(z1)))


def l_out(x, t):
    """Of the paper, sample by sample; 0 where a sample has no positive."""
    z, losses = F.normalize(x, dim=1), []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        log_softmax = F.log_softmax(z[others] @ z[i] / t, dim=0)
        terms = [-log_softmax[others.index(p)] for p in others if LABELS[p] == LABELS[i]]
        losses.append(torch.stack(terms).mean() if terms else x.new_zeros(()))
    return torch.stack(losses)


def similarity(x, y, t):
    return F.cosine_similarity(x.unsqueeze(-2), y.unsqueeze(-3), dim=-1) / t


def labelled(op: str) -> Callable:
    return lambda *rows, **kw: getattr(fastnce, op)(*rows, LABELS, **kw)


ROWS, TWO = (9, 6), (2, 9, 6)
JOINED = functools.partial(info_nce, in_batch_negatives=True)
BOTH = functools.partial(info_nce, symmetric=True)
DOT = functools.partial(info_nce, normalize=False)
OF_A_BATCH = functools.partial(patch_nce, negatives="batch")
SIMILARITIES = fastnce.pairwise_cosine_similarity
# The op, its equation, and the shapes of the rows.
DEFINITIONS = {
    "in_batch": (info_nce, in_batch, [ROWS, ROWS]),
    "symmetric": (BOTH, symmetric, [ROWS, ROWS]),
    "queue": (info_nce, nce, [ROWS, ROWS, (11, 6)]),
    "queue_in_batch": (JOINED, joined, [ROWS, ROWS, (11, 6)]),
    "own": (info_nce, nce, [ROWS, ROWS, (9, 4, 6)]),
    "own_in_batch": (JOINED, joined, [ROWS, ROWS, (9, 4, 6)]),
    "dot": (DOT, functools.partial(in_batch, similarity=dot_products), [ROWS, ROWS]),
    "batched": (info_nce, of_each(in_batch, 2), [TWO, TWO]),
    "batched_symmetric": (BOTH, of_each(symmetric, 2), [TWO, TWO]),
    "batched_queue": (info_nce, of_each(nce, 2), [TWO, TWO, (11, 6)]),
    "batched_queue_in_batch": (JOINED, of_each(joined, 2), [TWO, TWO, (11, 6)]),
    "batched_own": (info_nce, of_each(nce, 3), [TWO, TWO, (2, 9, 4, 6)]),
    "batched_own_in_batch": (JOINED, of_each(joined, 3), [TWO, TWO, (2, 9, 4, 6)]),
    "patch_nce": (patch_nce, of_each(cut, 2), [TWO, TWO]),
    "patch_nce_batch": (OF_A_BATCH, cut_of_a_batch, [TWO, TWO]),
    "one_patch": (patch_nce, of_each(cut, 2), [(2, 1, 6), (2, 1, 6)]),
    "conditional_contrastive": (labelled("conditional_contrastive"), two_c, [ROWS, ROWS]),
    "nt_xent": (nt_xent, simclr, [ROWS, ROWS]),
    "nt_xent_of_one": (nt_xent, simclr, [(1, 6), (1, 6)]),
    "sup_con": (labelled("sup_con"), l_out, [ROWS]),
    "similarity": (SIMILARITIES, similarity, [(7, 5), (4, 5)]),
    "similarity_batched": (SIMILARITIES, similarity, [(2, 3, 7, 5), (2, 3, 4, 5)]),
}

FORMS_OF_PATCHES = [
    dict(zip(("symmetric", "query_negatives", "detach_keys"), chosen, strict=True))
    for chosen in itertools.product((False, True), repeat=3)
    if any(chosen)
]
for options in FORMS_OF_PATCHES:
    op, defined = (functools.partial(function, **options) for function in (patch_nce, cfl))
    name = " ".join(["patch_nce", *(option for option, given in options.items() if given)])
    DEFINITIONS[name] = op, of_each(defined, 2), [TWO, TWO]
    DEFINITIONS[f"one {name}"] = op, of_each(defined, 2), [(2, 1, 6), (2, 1, 6)]
DEFINITIONS["batch patch_nce, all of these"] = (
    functools.partial(patch_nce, negatives="batch", **options),
    lambda q, k, t: cfl(*(x.flatten(0, 1) for x in (q, k)), t, **FORMS_OF_PATCHES[-1]).view(2, 9),
    [TWO, TWO],
)

for name in ("in_batch", "symmetric", "queue", "queue_in_batch", "batched"):
    op, defined, shapes = DEFINITIONS[name]
    rounded = functools.partial(op, similarity_dtype=torch.float8_e4m3fn)
    DEFINITIONS[f"fp8 {name}"] = rounded, functools.partial(defined, similarity=in_fp8), shapes

REDUCTIONS = {name: ("none", "mean") for name in DEFINITIONS if "patch" in name}
REDUCTIONS |= {"similarity": ("none",), "similarity_batched": ("none",)}


@pytest.mark.parametrize(
    ("name", "reduction"),
    [
        (x, reduction)
        for x in DEFINITIONS
        for reduction in REDUCTIONS.get(x, ("none", "mean", "sum"))
    ],
)
def test_definition(name, reduction, backend, needs_support):
    """Of patches at a temperature at which CUT's constant counts."""
    if "fp8" in name:
        needs_support("info_nce_fp8", backend)
    if "patch" in name and reduction == "none":
        needs_support("masked_info_nce", backend)
    op, defined, shapes = DEFINITIONS[name]
    options = {} if "similarity" in name else {"reduction": reduction}
    rows = [gaussian(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    t = torch.tensor(2.0 if "patch" in name else 0.3, dtype=torch.float64, requires_grad=True)
    got, expected = op(*rows, temperature=t, backend=backend, **options), defined(*rows, t)
    if reduction != "none":
        count = (expected != 0).sum() if defined is l_out else expected.numel()
        expected = expected.sum() / (1 if reduction == "sum" else count)
    assert got.dtype == torch.float64 and got.shape == expected.shape
    torch.testing.assert_close(got, expected)
    upstream = gaussian(*expected.shape, seed=9)
    found, defined = (
        torch.autograd.grad(x, [*rows, t], upstream, allow_unused=True) for x in (got, expected)
    )
    for x, y in zip(found, defined, strict=True):
        assert (x is None) == (y is None)  # keys that are detached
        if x is not None:
            torch.testing.assert_close(x, y)


# What each op has of its own.


@pytest.mark.parametrize("negatives", ["image", "batch"])
def test_layers_are_averaged(negatives, backend):
    """Lists and tuples; under autocast the layers of one call may differ in dtype."""
    shapes = [(2, 7, 5), (2, 12, 3), (2, 1, 8)]
    queries, keys = (
        tuple(gaussian(*s, seed=seed + i).requires_grad_() for i, s in enumerate(shapes))
        for seed in (0, 3)
    )
    got = patch_nce(queries, list(keys), negatives=negatives, backend=backend)
    defined = of_each(cut, 2) if negatives == "image" else cut_of_a_batch
    expected = sum(defined(q, k, 0.07).mean() for q, k in zip(queries, keys, strict=True)) / 3
    torch.testing.assert_close(got, expected)
    leaves = queries + keys
    grads = torch.autograd.grad(got, leaves)
    for x, y in zip(grads, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(x, y)
    mixed = [
        [x.detach().to(dtype) for x, dtype in zip(side, (torch.float32, torch.bfloat16, torch.float32), strict=True)]
        for side in (queries, keys)
    ]  # fmt: skip
    for weights in (None, [0.25, 1.0, 2.0]):
        options = {"negatives": negatives, "layer_weights": weights}
        got = patch_nce(*mixed, **options, backend=backend)
        exact = patch_nce(*([x.double() for x in side] for side in mixed), **options)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("query_negatives", [False, True])
def test_detached_each_side_learns_from_its_own_direction(query_negatives, backend):
    q, k = (gaussian(2, 9, 6, seed=seed).requires_grad_() for seed in (0, 1))
    options = {"query_negatives": query_negatives, "detach_keys": True, "backend": backend}
    there, back = patch_nce(q, k, **options), patch_nce(k, q, **options)
    assert torch.autograd.grad(back, q, allow_unused=True, retain_graph=True) == (None,)
    alone = torch.autograd.grad(there, q) + torch.autograd.grad(back, k)
    both = torch.autograd.grad(patch_nce(q, k, symmetric=True, **options), (q, k))
    for x, y in zip(both, alone, strict=True):
        torch.testing.assert_close(2 * x, y)


def test_with_query_negatives_both_directions_are_nt_xent(backend):
    """Within each image; at a temperature at which CUT's constants are nothing."""
    q, k = (gaussian(2, 9, 6, seed=seed).requires_grad_() for seed in (0, 1))
    got = patch_nce(q, k, symmetric=True, query_negatives=True, temperature=0.1, backend=backend)
    images = zip(q, k, strict=True)
    expected = sum(nt_xent(*x, temperature=0.1, backend=backend) for x in images) / 2
    torch.testing.assert_close(got, expected)
    for x, y in zip(*(torch.autograd.grad(z, (q, k)) for z in (got, expected)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("count", [1, 5])
def test_without_any_positive_sup_con_is_zero(count, backend):
    x = gaussian(count, 4).requires_grad_()
    for reduction in ("mean", "sum", "none"):
        loss = sup_con(x, torch.arange(count), reduction=reduction, backend=backend)
        assert loss.eq(0).all()
        assert torch.autograd.grad(loss.sum(), x)[0].eq(0).all()


@pytest.mark.parametrize("op", ["sup_con", "conditional_contrastive"])
@pytest.mark.parametrize("tau", [0.005, 0.023, 1.0])
def test_one_class_loses_nothing(op, tau, backend):
    """Of SupCon two rows, which may also be opposite: the smallest sum that there is."""
    x = gaussian(2, 6).float()
    opposite = torch.stack([x[0], -x[0] + 1e-3])
    for rows in (x, opposite):
        leaf, labels = rows.clone().requires_grad_(), torch.full((2,), 4)
        others = (leaf, gaussian(2, 6, seed=1).float()) if op != "sup_con" else (leaf,)
        options = {"temperature": tau, "reduction": "none", "backend": backend}
        losses = getattr(fastnce, op)(*others, labels, **options)
        torch.testing.assert_close(losses, torch.zeros(2), rtol=0, atol=2e-7 / tau)
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
        torch.testing.assert_close(grad, torch.zeros(2, 6), rtol=0, atol=2e-7 / tau**2)


@pytest.mark.parametrize("tau", [0.005, 0.023, 0.07, 1.0])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e6])
def test_gradients_keep_the_scale_of_the_upstream(tau, size, backend):
    """Duplicates and near opposites: softmax weights from 1 down to exp(-2 / tau)."""
    x = torch.tensor([[1.0, 0.2], [-0.9, -0.1]]).repeat(1, 3)
    x = torch.cat([x, 2 * x]).requires_grad_()
    labels, upstream = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, -0.5, 0.25, 2.0]) * size
    got = sup_con(x, labels, temperature=tau, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(got, x, upstream)
    y = x.detach().double().requires_grad_()
    exact = sup_con(y, labels, temperature=tau, reduction="none", backend="torch")
    (expected,) = torch.autograd.grad(exact, y, upstream.double())
    scale = expected.abs().max()
    assert scale > 0
    torch.testing.assert_close(grad / scale, (expected / scale).float(), rtol=1e-4, atol=1e-4)


def test_similarities_with_itself_are_exactly_symmetric(backend):
    """Both sides get the gradient of one tensor."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = gaussian(700, 40).to(dtype)
        similarities = functools.partial(
            fastnce.pairwise_cosine_similarity, temperature=0.07, backend=backend
        )
        got = similarities(x)
        assert backend in ("blocks", "torch") or torch.equal(
            got, got.T
        )  # PyTorch's products are not
        assert torch.equal(got, similarities(x, x))
        torch.testing.assert_close(got, similarities(x, x.clone()))
    x, y = gaussian(7, 5).requires_grad_(), gaussian(7, 5).requires_grad_()
    (of_x,) = torch.autograd.grad(similarities(x).sin().sum(), x)
    both = torch.autograd.grad(similarities(x, y).sin().sum(), [x, y])
    torch.testing.assert_close(of_x, sum(both))
