"""Losses under the names of other libraries over two ranks: values, and the gradients of the rows and of the scale.

Theirs are written down here as what each rank makes of all rows; where the library is installed, its own class runs on the ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from against import THEIRS, draw, imported, similar
from distributed.workers import Workers
from torch import Tensor

RANKS, ROWS = 2, 5
GATHERS = itertools.product((False, True), repeat=2)
CASES = {
    f"ClipLoss, local_loss={local}, gather_with_grad={grad}": {
        "local_loss": local,
        "gather_with_grad": grad,
    }
    for local, grad in GATHERS
}
CASES |= {
    f"SigLipLoss, {x}": {"dist_impl": x} for x in (None, "bidir", "shift", "reduce", "gather")
}
CASES |= {name: {"gather_distributed": True} for name in ("NTXentLoss", "DCLLoss")}
NUMBERS = {"ClipLoss": (9.0,), "SigLipLoss": (9.0, -2.0), "NTXentLoss": (), "DCLLoss": ()}
MODULES = {
    "ClipLoss": "open_clip.loss",
    "SigLipLoss": "open_clip.loss",
    "NTXentLoss": "lightly.loss",
    "DCLLoss": "lightly.loss",
}


@pytest.fixture(scope="module")
def workers(tmp_path_factory) -> Iterator[Workers]:
    workers = Workers(RANKS, tmp_path_factory.mktemp("ranks"))
    yield workers
    workers.stop()


def leaves(case: str) -> list[Tensor]:
    """The two sides of all ranks, unit rows, and the numbers."""
    x = draw(RANKS * ROWS, 12, unit=True)
    numbers = [torch.tensor(y, dtype=torch.float64) for y in NUMBERS[case.split(",")[0]]]
    return [y.requires_grad_() for y in (x, F.normalize(similar(x), dim=1), *numbers)]


def own(rank: int) -> slice:
    return slice(ROWS * rank, ROWS * (rank + 1))


def on_a_rank(_, case: str, of_fastnce: bool) -> list[Tensor]:
    """This rank's loss, and the gradients of its rows and of the numbers."""
    name, options, rank = case.split(",")[0], CASES[case], dist.get_rank()
    if MODULES[name] == "open_clip.loss":
        options = {**options, "rank": rank, "world_size": RANKS}
    library = MODULES[name].split(".")[0]
    module = imported(f"fastnce.integrations.{library}" if of_fastnce else MODULES[name])
    *sides, numbers = *leaves(case)[:2], leaves(case)[2:]
    sides = [x.detach()[own(rank)].clone().requires_grad_() for x in sides]
    loss = getattr(module, name)(**options)(*sides, *numbers)
    loss.backward()
    return [loss.detach(), *(x.grad for x in (*sides, *numbers))]


def loss_of_rank(case: str, rank: int, left: Tensor, right: Tensor, *numbers: Tensor) -> Tensor:
    """What a rank goes backward from, of the rows of all ranks."""
    mine, name = own(rank), case.split(",")[0]
    if name == "SigLipLoss":
        logits = numbers[0] * left[mine] @ right.T + numbers[1]
        signs = 2 * torch.eye(len(left), dtype=left.dtype)[mine] - 1
        return -F.logsigmoid(signs * logits).sum() / ROWS
    if name == "NTXentLoss":
        rows = F.normalize(torch.cat([left, right]), dim=1)
        logits = (rows @ rows.T / 0.5).fill_diagonal_(-torch.inf)
        losses = F.cross_entropy(logits, torch.arange(len(rows)).roll(len(left)), reduction="none")
        return losses.view(2, -1)[:, mine].mean()
    if name == "DCLLoss":
        rows = F.normalize(torch.cat([left, right]), dim=1)
        logits, positive = rows @ rows.T / 0.1, torch.arange(len(rows)).roll(len(left))
        losses = -logits[torch.arange(len(rows)), positive]
        logits = logits.fill_diagonal_(-torch.inf).scatter(1, positive[:, None], -torch.inf)
        return (losses + logits.logsumexp(1)).view(2, -1)[:, mine].mean()
    local, grad = CASES[case]["local_loss"], CASES[case]["gather_with_grad"]
    sides = [left, right]
    gathered = sides if grad else [x.detach() for x in sides]
    if not (local or grad):
        gathered = [
            torch.cat([y[: mine.start], x[mine], y[mine.stop :]])
            for x, y in zip(sides, gathered, strict=True)
        ]
    rows = [x[mine] for x in sides] if local else gathered
    target = torch.arange(len(left))[mine] if local else torch.arange(len(left))
    pairs = zip(rows, reversed(gathered), strict=True)
    return sum(F.cross_entropy(numbers[0] * x @ y.T, target) for x, y in pairs) / 2


def by_equation(case: str) -> list[list[Tensor]]:
    """``on_a_rank`` of every rank."""
    given = leaves(case)
    losses = [loss_of_rank(case, rank, *given) for rank in range(RANKS)]
    found = []
    # Without gather_with_grad no gradient comes from the losses of other ranks.
    alone = CASES[case].get("gather_with_grad") is False
    for rank, loss in enumerate(losses):
        to_rows = torch.autograd.grad(loss if alone else sum(losses), given[:2], retain_graph=True)
        numbers = torch.autograd.grad(loss, given[2:], retain_graph=True) if given[2:] else ()
        found.append([loss.detach(), *(x[own(rank)] for x in to_rows), *numbers])
    return found


@pytest.fixture(params=THEIRS)
def theirs(request, workers):
    def of(case: str) -> list[list[Tensor]]:
        if request.param == "equation":
            return by_equation(case)
        return workers.results(on_a_rank, case, False)

    return of


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(workers, theirs, case):
    """Those of the numbers as DDP averages them: how they are shared out among ranks is nobody's concern."""
    expected = theirs(case)
    got = workers.results(on_a_rank, case, True)
    for ours, of_theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours[:3], of_theirs[:3], rtol=1e-12, atol=1e-12)
    ours, of_theirs = (
        [torch.stack(x).mean(0) for x in zip(*(y[3:] for y in side), strict=True)]
        for side in (got, expected)
    )
    torch.testing.assert_close(ours, of_theirs, rtol=1e-12, atol=1e-12)
