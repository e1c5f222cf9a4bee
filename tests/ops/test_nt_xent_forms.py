"""NT-Xent with ids, weights, the positive out of the sum, and ranks: against its equation with the whole matrix, in double."""

import pytest
import torch
import torch.nn.functional as F
from forms import gaussian
from hypothesis import given, settings
from hypothesis import strategies as st

import fastnce
from fastnce import backends

RUN = [
    x
    for x in backends.names()
    if backends.supports(x, "masked_info_nce", "cpu", torch.float64) == "ok"
]
each_backend = pytest.mark.parametrize("backend", RUN)


def published(z1, z2, temperature, ids, weights, decoupled, reduction):
    """The loss, and how many negatives are more similar than the positive."""
    count, x = len(z1), F.normalize(torch.cat([z1, z2]), dim=1)
    z = x @ x.T / temperature
    image = torch.arange(2 * count) % count
    ids = image if ids is None else ids[image]
    negative = ids[:, None] != ids
    positive = z[torch.arange(2 * count), (torch.arange(2 * count) + count) % (2 * count)]
    others = (z.exp() * negative).sum(dim=1)
    if decoupled:
        losses = torch.where(others > 0, others.masked_fill(others == 0, 1).log() - positive, 0)
    else:
        losses = (others + positive.exp()).log() - positive
    rank = (negative & (z > positive[:, None])).sum(dim=1)
    total = 2 * count if weights is None else weights.sum()
    losses = losses if weights is None else losses * weights
    if reduction == "none":
        return losses, rank
    return losses.sum() / (total if reduction == "mean" else 1), rank


@each_backend
@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    count=st.integers(1, 9),
    options=st.sets(st.sampled_from(["ids", "weights", "decoupled", "return_rank"]), min_size=1),
    classes=st.integers(1, 9),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_value_gradients_and_ranks_are_those_of_the_equation(
    backend, count, options, classes, reduction
):
    leaves = [gaussian(count, 4), gaussian(count, 4, seed=1), torch.tensor(0.3).double()]
    z1, z2, tau = leaves = [x.requires_grad_() for x in leaves]
    ids = torch.arange(count) % classes if "ids" in options else None
    weights = gaussian(2 * count, seed=2).abs() if "weights" in options else None
    given = {"ids": ids, "weights": weights, "decoupled": "decoupled" in options}
    given |= {"temperature": tau, "reduction": reduction}
    found = fastnce.nt_xent(z1, z2, **given, return_rank="return_rank" in options, backend=backend)
    expected, rank = published(z1, z2, **given)
    if "return_rank" in options:
        found, found_rank = found
        assert torch.equal(found_rank, rank)
    at = torch.arange(1.0, found.numel() + 1).view(found.shape)
    for x, y in zip(
        [found, *torch.autograd.grad((found * at).sum(), leaves)],
        [expected, *torch.autograd.grad((expected * at).sum(), leaves)],
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@each_backend
def test_the_loss_itself_among_its_options(backend):
    """With options that change nothing it is the plain call's; without the own view, InfoNCE's."""
    z1, z2 = gaussian(7, 5), gaussian(7, 5, seed=1)
    plain = fastnce.nt_xent(z1, z2, reduction="none", backend=backend)
    for options in ({"ids": torch.arange(7)}, {"weights": torch.ones(14)}):
        found = fastnce.nt_xent(z1, z2, reduction="none", **options, backend=backend)
        torch.testing.assert_close(found, plain)
    x, y = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    z = x @ y.T / 0.5
    others = z.masked_fill(torch.eye(7, dtype=torch.bool), -torch.inf)
    both = (others.logsumexp(dim=1) + others.logsumexp(dim=0)) / 2 - z.diagonal()
    options = {"symmetric": True, "decoupled": True, "temperature": 0.5}
    torch.testing.assert_close(fastnce.info_nce(z1, z2, **options, backend=backend), both.mean())


x = torch.randn(4, 3)
MISTAKES = [
    (ValueError, r"ids must have the shape \(4,\)", {"ids": torch.arange(8)}),
    (TypeError, r"ids must be integers", {"ids": torch.ones(4)}),
    (ValueError, r"weights must have the shape \(8,\)", {"weights": torch.ones(4)}),
    (ValueError, r"temperature must be positive.*got 0", {"temperature": 0.0, "decoupled": True}),
    (ValueError, r"reduction must be one of", {"reduction": "avg", "decoupled": True}),
]


@pytest.mark.parametrize(("kind", "pattern", "options"), MISTAKES)
def test_mistakes_are_one_line(kind, pattern, options):
    with pytest.raises(kind, match=f"^nt_xent: {pattern}") as caught:
        fastnce.nt_xent(x, x, **options)
    assert "\n" not in str(caught.value)
