"""info-nce-pytorch under its own names: its equation, and the library's own where it is installed."""

import pytest
import torch
import torch.nn.functional as F
from against import (
    THEIRS,
    assert_same,
    assert_same_class,
    assert_same_signature,
    draw,
    imported,
    similar,
)

from fastnce.integrations import info_nce

QUERY = draw(7, 10)
KEY = similar(QUERY)
NEGATIVES = {
    "in batch": (None, "unpaired"),
    "unpaired": (draw(11, 10, seed=2), "unpaired"),
    "paired": (draw(7, 5, 10, seed=3), "paired"),
}


def equation(query, key, negatives=None, temperature=0.1, reduction="mean", negative_mode=""):
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    if negatives is None:
        logits, target = query @ key.T, torch.arange(len(query))
    else:
        negatives, target = F.normalize(negatives, dim=-1), torch.zeros(len(query)).long()
        paired = torch.einsum(
            "nd,nmd->nm" if negative_mode == "paired" else "nd,md->nm", query, negatives
        )
        logits = torch.cat([(query * key).sum(1, keepdim=True), paired], dim=1)
    return F.cross_entropy(logits / temperature, target, reduction=reduction)


@pytest.fixture(params=THEIRS)
def theirs(request):
    return equation if request.param == "equation" else imported("info_nce").info_nce


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_values_and_gradients(theirs, negatives, reduction):
    rows, mode = NEGATIVES[negatives]
    options = {"reduction": reduction, "negative_mode": mode}

    def of_theirs(*x):
        return theirs(*x, **options)

    assert_same(lambda *x: info_nce.info_nce(*x, **options), of_theirs, QUERY, KEY, rows)
    assert_same(info_nce.InfoNCE(**options), of_theirs, QUERY, KEY, rows)
    assert_same(
        info_nce.InfoNCE(0.3, **options), lambda *x: theirs(*x, 0.3, **options), QUERY, KEY, rows
    )


def test_signatures(library):
    assert_same_signature(info_nce.info_nce, library("info_nce").info_nce)
    assert_same_class(info_nce.InfoNCE, library("info_nce").InfoNCE)


def test_what_is_refused():
    with pytest.raises(
        ValueError, match=r"'paired' needs negative_keys of 3 dimensions, got \(11, 10\)"
    ):
        info_nce.info_nce(QUERY, KEY, NEGATIVES["unpaired"][0], negative_mode="paired")
    with pytest.raises(
        ValueError, match="negative_mode must be one of 'unpaired', 'paired', got 'own'"
    ):
        info_nce.info_nce(QUERY, KEY, NEGATIVES["unpaired"][0], negative_mode="own")
