"""Triplet, pair and N-pair loss against loops over their pairs."""

import math

import torch

from fastnce.systems.metric_losses import n_pair_loss, pair_loss, triplet_loss

torch.manual_seed(0)
QUERY, KEY = torch.randn(2, 5, 3, dtype=torch.float64)


def distances():
    q, k = ((x / x.norm(dim=1, keepdim=True)) for x in (QUERY, KEY))
    return [[math.dist(a.tolist(), b.tolist()) for b in k] for a in q]


def test_triplet():
    d = distances()
    terms = [
        max(0.0, d[i][i] ** 2 - d[i][j] ** 2 + 0.3) for i in range(5) for j in range(5) if j != i
    ]
    assert 0 < sum(term > 0 for term in terms) < 20
    torch.testing.assert_close(triplet_loss(QUERY, KEY, 0.3).item(), sum(terms) / 20)


def test_pair():
    d = distances()
    positive = sum(d[i][i] ** 2 for i in range(5)) / 5
    terms = [max(0.0, 1.2 - d[i][j]) ** 2 for i in range(5) for j in range(5) if j != i]
    assert 0 < sum(term > 0 for term in terms) < 20
    torch.testing.assert_close(pair_loss(QUERY, KEY, 1.2).item(), positive + sum(terms) / 20)


def test_n_pair():
    dots = (QUERY @ KEY.T).tolist()
    terms = [
        math.log(1 + sum(math.exp(dots[i][j] - dots[i][i]) for j in range(5) if j != i))
        for i in range(5)
    ]
    length = (QUERY.square().sum() + KEY.square().sum()).item() / 10
    torch.testing.assert_close(n_pair_loss(QUERY, KEY, 0.5).item(), sum(terms) / 5 + 0.5 * length)
