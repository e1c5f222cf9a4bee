"""pytorch-metric-learning's losses under their own names: their equations, and the library's own where it is installed."""

import pytest
import torch
import torch.nn.functional as F
from against import THEIRS, assert_same, assert_same_class, draw, imported

from fastnce.integrations import pytorch_metric_learning as ours

ROWS, LABELS = draw(12, 8), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 5, 7])
OTHERS, OF_OTHERS = draw(10, 8, seed=2), torch.arange(10) % 4
MODULE = "pytorch_metric_learning.losses"


class MeanReducer:
    """By the names of theirs, as the following."""


class AvgNonZeroReducer:
    pass


class SumReducer:
    pass


class CosineSimilarity:
    normalize_embeddings = True


class DotProductSimilarity:
    def __init__(self, normalize_embeddings=True):
        self.normalize_embeddings = normalize_embeddings


class LpDistance:
    pass


def losses(name, rows, labels, others=None, of_others=None, temperature=None, normalize=True):
    """NTXentLoss: of each positive pair; SupConLoss: of each row, 0 for rows without a positive."""
    rows = F.normalize(rows, dim=1) if normalize else rows
    if others is None:
        others, of_others, itself = rows, labels, torch.eye(len(rows), dtype=torch.bool)
    else:
        others = F.normalize(others, dim=1) if normalize else others
        itself = torch.zeros(len(rows), len(others), dtype=torch.bool)
    positive = (labels[:, None] == of_others) & ~itself
    default = 0.07 if name == "NTXentLoss" else 0.1
    logits = rows @ others.T / (temperature or default)
    if name == "NTXentLoss":
        negative = logits.masked_fill(labels[:, None] == of_others, -torch.inf).logsumexp(1)
        i, j = positive.nonzero(as_tuple=True)
        return torch.logaddexp(negative[i], logits[i, j]) - logits[i, j]
    lse = logits.masked_fill(itself, -torch.inf).logsumexp(1)
    count = positive.sum(1)
    return (lse - (logits * positive).sum(1) / count.clamp(min=1)) * (count > 0)


REDUCED = {
    None: {"NTXentLoss": torch.mean, "SupConLoss": lambda x: x[x > 0].mean()},
    "MeanReducer": {"NTXentLoss": torch.mean, "SupConLoss": torch.mean},
    "AvgNonZeroReducer": {"NTXentLoss": torch.mean, "SupConLoss": lambda x: x[x > 0].mean()},
    "SumReducer": {"NTXentLoss": torch.sum, "SupConLoss": torch.sum},
}


def made(side, name, temperature=None, reducer=None, distance=None, normalize=True):
    """A loss of ours, or of theirs with their objects."""
    library = imported("pytorch_metric_learning") if side == "library" else None

    def of(module, name):
        return (
            getattr(imported(f"{library.__name__}.{module}"), name) if library else globals()[name]
        )

    options = {} if temperature is None else {"temperature": temperature}
    if reducer:
        options["reducer"] = of("reducers", reducer)()
    if distance:
        given = {} if distance == "CosineSimilarity" else {"normalize_embeddings": normalize}
        options["distance"] = of("distances", distance)(**given)
    return getattr(ours if side == "ours" else imported(MODULE), name)(**options)


OPTIONS = [{"reducer": x} for x in REDUCED]
OPTIONS += [
    {"temperature": 0.5},
    {"distance": "CosineSimilarity"},
    {"distance": "DotProductSimilarity"},
]
OPTIONS += [{"distance": "DotProductSimilarity", "normalize": False, "temperature": 2.0}]


@pytest.mark.parametrize("against", ["each other", "others"])
@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("side", THEIRS)
def test_values_and_gradients(side, options, name, against):
    rows = (ROWS,) if against == "each other" else (ROWS, OTHERS)

    def of(loss):
        return lambda x, *y: loss(x, LABELS, None, *y, *([OF_OTHERS] if y else []))

    def by_equation(x, *y):
        given = {
            "temperature": options.get("temperature"),
            "normalize": options.get("normalize", True),
        }
        found = losses(name, x, LABELS, *y, *([OF_OTHERS] if y else []), **given)
        return REDUCED[options.get("reducer")][name](found)

    theirs = by_equation if side == "equation" else of(made(side, name, **options))
    assert_same(of(made("ours", name, **options)), theirs, *rows)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
@pytest.mark.parametrize("side", THEIRS)
def test_two_views(side, name, symmetric):
    views, each = (ROWS[:6], ROWS[6:]), torch.arange(6)

    def theirs(x, y):
        if symmetric:
            return losses(name, torch.cat([x, y]), each.repeat(2)).mean()
        return losses(name, x, each, y, each).mean()

    if side == "library":
        theirs = imported(MODULE).SelfSupervisedLoss(made(side, name), symmetric=symmetric)
    assert_same(ours.SelfSupervisedLoss(made("ours", name), symmetric=symmetric), theirs, *views)


class Memory(torch.nn.Module):
    """The last rows and their labels, all of them: nothing here is older than the memory."""

    def __init__(self, name):
        super().__init__()
        self.name, self.rows, self.labels = name, [], []

    def forward(self, rows, labels, enqueue_mask=None):
        every = torch.ones(len(rows), dtype=torch.bool)
        into = every if enqueue_mask is None else enqueue_mask
        of = every if enqueue_mask is None else ~enqueue_mask
        self.rows = [*self.rows, *rows[into].detach()][-16:]
        self.labels = [*self.labels, *labels[into]][-16:]
        memory, of_memory = torch.stack(self.rows), torch.stack(self.labels)
        if (
            enqueue_mask is None
        ):  # each row is in the memory too: its copy is moved to a class of its own, and out of sight
            logits = losses_without_copies(self.name, rows, labels, memory, of_memory)
        else:
            logits = losses(self.name, rows[of], labels[of], memory, of_memory)
        return logits.mean() if self.name == "NTXentLoss" else logits[logits > 0].mean()


def losses_without_copies(name, rows, labels, memory, of_memory):
    """Row by row, the memory without the row itself."""
    found = []
    for i, row in enumerate(rows):
        others = (memory != row.detach()).any(1)
        found.append(
            losses(name, rows[i : i + 1], labels[i : i + 1], memory[others], of_memory[others])
        )
    return torch.cat(found)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
@pytest.mark.parametrize("side", THEIRS)
def test_memory(side, name, masked):
    """16 rows, 6 or 3 a step: until it is full what is not there does not count, then the oldest go."""
    memory = ours.CrossBatchMemory(made("ours", name), 8, 16).double()
    theirs = Memory(name)
    if side == "library":
        theirs = imported(MODULE).CrossBatchMemory(made(side, name), 8, 16).double()
    mask = torch.arange(6) < 3 if masked else None
    for step in range(7):
        leaves = [draw(6, 8, seed=10 + step).requires_grad_() for _ in range(2)]
        labels = torch.tensor([0, 1, 2, 0, 1, step % 3])
        values = [
            loss(x, labels, enqueue_mask=mask)
            for loss, x in zip((memory, theirs), leaves, strict=True)
        ]
        torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)
        sum(values).backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-12, atol=1e-12)
    memory.reset_queue()
    assert not memory.memory.filled.any()


@pytest.mark.parametrize(
    "name", ["NTXentLoss", "SupConLoss", "SelfSupervisedLoss", "CrossBatchMemory"]
)
def test_signatures(library, name):
    assert_same_class(getattr(ours, name), getattr(library(MODULE), name))


def test_what_is_refused():
    loss = ours.NTXentLoss()
    with pytest.raises(
        ValueError, match="NTXentLoss: indices_tuple lists the pairs of a miner.* Drop the miner"
    ):
        loss(ROWS, LABELS, (torch.arange(2),) * 4)
    with pytest.raises(ValueError, match="NTXentLoss: labels is None"):
        loss(ROWS)
    with pytest.raises(
        ValueError,
        match="distance must be CosineSimilarity or DotProductSimilarity, got LpDistance",
    ):
        ours.SupConLoss(distance=LpDistance())
    with pytest.raises(ValueError, match="reducer must be .*, got LpDistance"):
        ours.SupConLoss(reducer=LpDistance())
    with pytest.raises(ValueError, match="SupConLoss: embedding_regularizer is not there"):
        ours.SupConLoss(embedding_regularizer=LpDistance())
    with pytest.raises(
        TypeError, match="loss must be NTXentLoss or SupConLoss .*, got CrossEntropyLoss"
    ):
        ours.CrossBatchMemory(torch.nn.CrossEntropyLoss(), 8)
    with pytest.raises(ValueError, match="unit rows. Use CosineSimilarity"):
        ours.CrossBatchMemory(ours.SupConLoss(distance=DotProductSimilarity(False)), 8)
