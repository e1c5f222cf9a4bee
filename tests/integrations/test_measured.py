"""README's example, and what ``python -m benchmarks dropins`` measures."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from against import draw, similar

from benchmarks import dropins

README = Path(__file__).parents[2] / "README.md"


def example() -> str:
    return re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)


def run(code: str) -> dict:
    views = {"view1": draw(6, 10), "view2": similar(draw(6, 10))}
    given = {name: x.float().requires_grad_() for name, x in views.items()}
    exec(code, given)
    return given


def test_the_example_of_the_readme():
    got = run(example())
    views = [got[name].detach().double().requires_grad_() for name in ("view1", "view2")]
    rows = F.normalize(torch.cat(views), dim=1)
    logits = (rows @ rows.T / 0.5).fill_diagonal_(-torch.inf)
    loss = F.cross_entropy(logits, torch.arange(12).roll(6))
    loss.backward()
    assert abs(got["loss"].item() - loss.item()) < 1e-6
    torch.testing.assert_close(got["view1"].grad.double(), views[0].grad, rtol=1e-4, atol=1e-7)


def test_the_line_before_it(library):
    """What the comment of the first line has in its place."""
    library("lightly.loss")
    first, *rest = example().splitlines()
    before = "\n".join([first.split("# before: ")[1], *rest])
    got, expected = run(example()), run(before)
    assert type(got["NTXentLoss"](0.5)) is not type(expected["NTXentLoss"](0.5))
    for name in ("view1", "view2"):
        torch.testing.assert_close(got[name].grad, expected[name].grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("pair", dropins.PAIRS, ids=lambda x: f"{x.library} {x.loss} {x.case}")
def test_the_measured_pairs_are_the_same_loss(library, pair):
    library(pair.library)
    dropins.check(pair, 32)
