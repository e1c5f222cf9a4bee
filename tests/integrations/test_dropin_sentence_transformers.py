"""sentence-transformers' losses under their own names: the equation, and the library's own where it is installed."""

import inspect
import itertools

import pytest
import small_models
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
OPTIONS += [
    {"hardness_mode": mode, "hardness_strength": 3.0, "directions": x["directions"]}
    for mode in ("in_batch_negatives", "hard_negatives", "all_negatives")
    for x in (OPTIONS[0], OPTIONS[7])
]
OPTIONS += [{"scale": 5.0}, {"similarity_fct": "dot_score", "scale": 0.5}]


def equation(
    query,
    document,
    *negatives,
    scale=20.0,
    directions=DIRECTIONS[:1],
    partition_mode="joint",
    similarity_fct="cos_sim",
    hardness_mode=None,
    hardness_strength=0.0,
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

    def with_documents(x, i):
        found = logits(query, x, without=i == 0)
        own = itself & (i > 0)  # hard negatives of the query itself
        harder = {"in_batch_negatives": ~own, "hard_negatives": own}.get(hardness_mode, own | True)
        return found + hardness_strength * harder * (query @ x.T).detach()

    joint = partition_mode == "joint"
    positive = logits(query, documents[0], without=False).diagonal()[:, None]
    parts = {
        "query_to_doc": [with_documents(x, i) for i, x in enumerate(documents)],
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


CLASSES = ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"]
CLASSES += ["GISTEmbedLoss", "CachedGISTEmbedLoss"]


@pytest.fixture
def model(library, tmp_path):
    library("sentence_transformers")
    return small_models.sentence_transformer(tmp_path)


@pytest.mark.parametrize("same_tokens", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_a_model_of_the_library(library, model, tmp_path, monkeypatch, name, same_tokens):
    """Losses and parameters' gradients, from sentences on; a guide with a vocabulary of its own takes the texts anew."""
    given = [model]
    if "GIST" in name:
        (tmp_path / "guide").mkdir()
        if not same_tokens:
            monkeypatch.setattr(small_models, "WORDS", small_models.WORDS[::-1])
        given.append(small_models.sentence_transformer(tmp_path / "guide", hidden=8))
    options = {"mini_batch_size": 3} if name.startswith("Cached") else {}
    found, configs = [], []
    for module in (sentence_transformers, library(LOSSES)):
        model.zero_grad()
        features = [model.preprocess(small_models.sentences(7, seed)) for seed in range(3)]
        loss = getattr(module, name)(*given, **options)
        value = loss(features, labels=None)
        value.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([value.detach(), *gradients])
        configs.append(loss.get_config_dict())
        with torch.no_grad():
            torch.testing.assert_close(loss(features, labels=None), found[-1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    scale = max(x.abs().max() for x in found[1][1:]).item()
    torch.testing.assert_close(found[0][1:], found[1][1:], rtol=1e-4, atol=1e-5 * scale)
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", CLASSES)
def test_signatures(library, name):
    """Those that are made from theirs have theirs."""
    ours, theirs = getattr(sentence_transformers, name), getattr(library(LOSSES), name)
    assert issubclass(ours, theirs) == (name != CLASSES[0])
    features = ["self", "sentence_features", "labels"]
    assert list(inspect.signature(ours.forward).parameters) == features
    if name == CLASSES[0]:
        by_name = (
            {
                p.name: getattr(p.default, "__name__", p.default)
                for p in inspect.signature(f).parameters.values()
            }
            for f in (ours, theirs)
        )
        assert next(by_name) == next(by_name)


def test_what_is_refused():
    made = sentence_transformers.MultipleNegativesRankingLoss
    for options, message in (
        (
            {"similarity_fct": named("euclidean_sim")},
            "similarity_fct must be cos_sim or dot_score, got euclidean_sim",
        ),
        ({"directions": ("doc_to_doc",)}, r"directions must have 'query_to_doc'.*Add it"),
        ({"directions": ("query_to_docs",)}, "directions must be one of .*, got 'query_to_docs'"),
        (
            {"directions": DIRECTIONS, "partition_mode": "per_direction"},
            ".*needs a positive in each direction",
        ),
        (
            {"partition_mode": "each"},
            "partition_mode must be one of 'joint', 'per_direction', got 'each'",
        ),
        ({"hardness_mode": "all"}, "hardness_mode must be one of .*, got 'all'"),
        ({"hardness_strength": -1.0}, "hardness_strength must not be negative, got -1.0"),
    ):
        with pytest.raises(ValueError, match=f"MultipleNegativesRankingLoss: {message}"):
            made(None, **options)


def test_over_ranks_without_ranks():
    """Gathering from no others changes nothing, but what would be refused over ranks is refused."""
    options = {"gather_across_devices": True}
    assert_same(of_ours(**options), of_ours(), QUERY, DOCUMENT, HARD[0])
    with pytest.raises(ValueError, match="gather_across_devices=True goes with"):
        of_ours(**options, directions=DIRECTIONS)(QUERY, DOCUMENT)
