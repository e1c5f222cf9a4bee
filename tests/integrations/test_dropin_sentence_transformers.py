"""sentence-transformers' losses under their own names: the equation, and the library's own where it is installed."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from against import THEIRS, assert_same, draw, imported, similar

from fastnce.integrations import sentence_transformers

QUERY = draw(6, 10)
DOCUMENT = similar(QUERY)
HARD = [similar(QUERY, seed=2), similar(DOCUMENT.flip(0), seed=3)]
LOSSES = "sentence_transformers.sentence_transformer.losses"
DIRECTIONS = sentence_transformers.DIRECTIONS
OPTIONS = [
    {"directions": (DIRECTIONS[0], *others)}
    for count in range(4)
    for others in itertools.combinations(DIRECTIONS[1:], count)
]
OPTIONS += [{**x, "partition_mode": "per_direction"} for x in (OPTIONS[0], OPTIONS[2])]
OPTIONS += [{"scale": 5.0}, {"similarity_fct": "dot_score", "scale": 0.5}]


def equation(
    query,
    document,
    *negatives,
    scale=20.0,
    directions=DIRECTIONS[:1],
    partition_mode="joint",
    similarity_fct="cos_sim",
):
    """All similarities of a query and its document in a row, what is left out at -inf; the first is the positive's."""
    rows = [query, document, *negatives]
    if similarity_fct == "cos_sim":
        rows = [F.normalize(x, dim=1) for x in rows]
    query, documents = rows[0], rows[1:]
    itself = torch.eye(len(query), dtype=torch.bool)

    def logits(x, y, without=True):
        found = scale * x @ y.T
        return found.masked_fill(itself, -torch.inf) if without else found

    joint = partition_mode == "joint"
    positive = logits(query, documents[0], without=False).diagonal()[:, None]
    parts = {
        "query_to_doc": [
            logits(query, documents[0]),
            *(logits(query, x, without=False) for x in documents[1:]),
        ],
        "query_to_query": [logits(query, query)],
        "doc_to_query": [logits(documents[0], query, without=not joint)],
        "doc_to_doc": [logits(documents[0], x) for x in documents],
    }
    if joint:
        return (
            torch.cat(
                [positive, *itertools.chain(*(parts[x] for x in directions))], dim=1
            ).logsumexp(1)
            - positive[:, 0]
        ).mean()
    return sum(
        (torch.cat([positive, *parts[x]], dim=1).logsumexp(1) - positive[:, 0]).mean()
        for x in directions
    ) / len(directions)


def of_ours(**options):
    if "similarity_fct" in options:
        options["similarity_fct"] = named("dot_score")
    loss = sentence_transformers.MultipleNegativesRankingLoss(None, **options)
    return lambda *x: loss.compute_loss_from_embeddings(list(x), None)


def named(name: str):
    """A similarity as the library names it."""

    def found(x, y):
        raise AssertionError("a matrix")

    found.__name__ = name
    return found


@pytest.fixture(params=THEIRS)
def theirs(request):
    def of(**options):
        if request.param == "equation":
            return lambda *x: equation(*x, **options)
        if "similarity_fct" in options:
            util = imported("sentence_transformers.util")
            options["similarity_fct"] = getattr(util, options["similarity_fct"])
        loss = imported(LOSSES).MultipleNegativesRankingLoss(None, **options)
        return lambda *x: loss.compute_loss_from_embeddings(list(x), None)

    return of


@pytest.mark.parametrize("negatives", [0, 1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients(theirs, options, negatives):
    rows = [QUERY, DOCUMENT, *HARD[:negatives]]
    assert_same(of_ours(**options), theirs(**options), *rows)


@pytest.mark.parametrize("options", OPTIONS[3:8], ids=str)
def test_a_single_query(theirs, options):
    """There are negatives of its own alone, and in the joint sum with doc_to_query its positive once more."""
    assert_same(of_ours(**options), theirs(**options), QUERY[:1], DOCUMENT[:1], HARD[0][:1])


def gist(
    query,
    document,
    *others,
    temperature=0.01,
    margin_strategy="absolute",
    margin=0.0,
    contrast_anchors=True,
    contrast_positives=True,
):
    """``others``: hard negatives, and then the guide's rows of all."""
    count = (len(others) - 2) // 2
    rows, guides = [query, document, *others[:count]], others[count:]
    rows, guides = ([F.normalize(x, dim=1) for x in y] for y in (rows, guides))
    of_positive = (guides[0] * guides[1]).sum(1, keepdim=True)
    limit = of_positive * (1 - margin) if margin_strategy == "relative" else of_positive - margin
    pairs = [(0, 1)] + [(0, 0)] * contrast_anchors + [(1, 1)] * contrast_positives
    pairs += [(0, i) for i in range(2, len(rows))]
    itself, found = torch.eye(len(query), dtype=torch.bool), []
    for i, j in pairs:
        left_out = guides[i] @ guides[j].T > limit
        if j < 2:
            left_out = left_out & ~itself if (i, j) == (0, 1) else left_out | itself
        found.append((rows[i] @ rows[j].T / temperature).masked_fill(left_out, -torch.inf))
    return F.cross_entropy(torch.cat(found, dim=1), torch.arange(len(query)))


GIST = [{}, {"margin": 0.1}, {"margin": 0.1, "margin_strategy": "relative"}]
GIST += [
    {"contrast_anchors": x, "contrast_positives": y}
    for x, y in ((False, True), (True, False), (False, False))
]


class Embeds(torch.nn.Module):
    """Takes a pair of embeddings, the model's and the guide's, for the features of sentences."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self.which = which

    def forward(self, features):
        return {"sentence_embedding": features[self.which]}


class Settings(torch.nn.Module):
    def __init__(
        self,
        temperature=0.01,
        margin_strategy="absolute",
        margin=0.0,
        contrast_anchors=True,
        contrast_positives=True,
    ):
        super().__init__()
        self.temperature, self.margin_strategy, self.margin = temperature, margin_strategy, margin
        self.contrast_anchors, self.contrast_positives = contrast_anchors, contrast_positives


@pytest.mark.parametrize("rows", [6, 1])
@pytest.mark.parametrize("negatives", [0, 1])
@pytest.mark.parametrize("options", GIST, ids=str)
def test_gist(options, negatives, rows):
    given = [x[:rows] for x in (QUERY, DOCUMENT, *HARD[:negatives])]
    guides = [similar(x[:, :4], seed=7 + i) for i, x in enumerate(given)]
    options = {"temperature": 0.2, **options}
    loss = Settings(**options)
    ours = [x.clone().requires_grad_() for x in given]
    theirs = [x.clone().requires_grad_() for x in given]
    got, expected = (
        sentence_transformers._gist_loss(loss, ours, guides),
        gist(*theirs, *guides, **options),
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(x, y) for x, y in ((got, ours), (expected, theirs))]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    left_out = (
        gist(*given, *guides, **options) != gist(*given, *guides, **options, margin=-9.0)
        if not options.get("margin")
        else True
    )
    assert left_out or rows == 1
