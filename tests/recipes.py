"""The scripts of docs/trainers.md, and what they should come to."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "trainers.md").read_text()
SCRIPTS = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE, re.M | re.S))


def one_process(rows: int, accumulation: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder before and after, in float32 with the matrix and batches of ``rows``; after with ``keys`` (M, D), the queue's."""
    names: dict = {"__name__": "model"}
    exec(SCRIPTS["model.py"], names)
    torch.manual_seed(0)
    model = names["Model"]()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    keys = model.queue.keys.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batches = zip(*(x.split(rows) for x in names["views"]().tensors), strict=True)
    for step, batch in enumerate(batches, 1):
        query, key = (F.normalize(model(x), dim=1) for x in batch)
        logits = query @ torch.cat([key, keys]).T / 0.2
        (F.cross_entropy(logits, torch.arange(rows)) / accumulation).backward()
        keys = torch.cat([keys, key.detach()])[-len(keys) :]
        if step % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    return before, {**model.state_dict(), "keys": keys}


def assert_trained(found: dict[str, Tensor], rows: int, accumulation: int = 2) -> None:
    """The state dict of a model that has been trained over ranks, with ``rows`` on all of them together, up to bfloat16's rounding."""
    before, expected = one_process(rows, accumulation)
    for name in (x for x in before if x.startswith("encoder")):
        change = expected[name] - before[name]
        assert (found[name] - expected[name]).norm() <= 0.05 * change.norm(), name
    # The ranks' keys come in another order, in which whole batches are dropped.
    queue, keys = found["queue.queue"], expected["keys"]
    assert len(keys) % rows == 0
    torch.testing.assert_close(queue @ queue.T, keys.T @ keys, rtol=0.02, atol=0.02 * len(keys))
    assert found["queue.queue_ptr"].tolist() == [512 % len(keys)]


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert list(found) == list(expected) and "queue.queue" in found
    for name, x in expected.items():
        assert torch.equal(found[name], x), name
