"""lightly's losses under their own names: their equations, and the library's own where it is installed."""

import pytest
import torch
import torch.nn.functional as F
from against import THEIRS, assert_same, assert_same_class, draw, imported, similar

from fastnce.integrations import lightly

VIEW = draw(6, 10)
OTHER = similar(VIEW)


def nt_xent(out0, out1, temperature):
    rows = F.normalize(torch.cat([out0, out1]), dim=1)
    logits = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(rows)).roll(len(out0)))


def with_bank(out0, out1, bank, temperature):
    out0, out1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
    positive = (out0 * out1).sum(1, keepdim=True)
    logits = torch.cat([positive, out0 @ bank.to(out0.dtype).T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(out0)).long())


@pytest.fixture(params=THEIRS)
def their_nt_xent(request):
    if request.param == "equation":
        return lambda temperature: lambda *x: nt_xent(*x, temperature)
    return imported("lightly.loss").NTXentLoss


@pytest.mark.parametrize("temperature", [0.5, 0.07])
def test_nt_xent(their_nt_xent, temperature):
    assert_same(lightly.NTXentLoss(temperature), their_nt_xent(temperature), VIEW, OTHER)


BEGIN = draw(12, 6, seed=99, unit=True)


def steps(count: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(draw(4, 6, seed=2 * i), draw(4, 6, seed=2 * i + 1)) for i in range(count)]


def with_a_bank() -> lightly.NTXentLoss:
    loss = lightly.NTXentLoss(0.2, (12, 6)).double()
    loss.memory_bank.queue.copy_(BEGIN.T)
    return loss


class Bank(torch.nn.Module):
    """What the library's loss with a bank is, whose batches fit."""

    def __init__(self) -> None:
        super().__init__()
        self.memory_bank, self.place = torch.nn.Module(), 0
        self.memory_bank.bank = BEGIN.clone()

    def forward(self, out0, out1):
        loss = with_bank(out0, out1, self.memory_bank.bank.clone(), 0.2)
        if out0.requires_grad:
            end = self.place + len(out1)
            self.memory_bank.bank[self.place : end] = F.normalize(out1.detach(), dim=1)
            self.place = end % len(BEGIN)
        return loss


@pytest.fixture(params=THEIRS)
def their_bank(request):
    if request.param == "equation":
        return Bank()
    loss = imported("lightly.loss").NTXentLoss(0.2, (12, 6)).double()
    loss.memory_bank.bank.copy_(BEGIN)
    return loss


def test_the_bank(their_bank):
    """Values, gradients and the bank after each step; rows without gradients leave it alone."""
    ours = with_a_bank()
    for out0, out1 in steps():
        for grad in (True, False):
            leaves = [x.clone().requires_grad_(grad) for x in (out0, out1, out0, out1)]
            values = [ours(*leaves[:2]), their_bank(*leaves[2:])]
            pairs = [values, (ours.memory_bank.keys, their_bank.memory_bank.bank)]
            if grad:
                sum(values).backward()
                pairs += [(x.grad, y.grad) for x, y in zip(leaves[:2], leaves[2:], strict=True)]
            for x, y in pairs:
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    assert not torch.equal(ours.memory_bank.keys, BEGIN)


def dcl(out0, out1, temperature=0.1, weights=None):
    """Each view's rows against all others but the positive, whose similarity has a weight."""
    rows = F.normalize(torch.cat([out0, out1]), dim=1)
    logits, count = rows @ rows.T / temperature, len(rows)
    itself, other = torch.arange(count), torch.arange(count).roll(len(out0))
    positive = logits[itself, other]
    if weights is not None:
        positive = positive * weights
    left_out = torch.zeros(count, count, dtype=torch.bool)
    left_out[itself, itself] = left_out[itself, other] = True
    return (logits.masked_fill(left_out, -torch.inf).logsumexp(1) - positive).mean()


def dclw(out0, out1, sigma=0.5):
    with torch.no_grad():
        share = ((F.normalize(out0, dim=1) * F.normalize(out1, dim=1)).sum(1) / sigma).softmax(0)
    return dcl(out0, out1, weights=(2 - len(out0) * share).repeat(2))


def of_one_side(x, y):
    """Another weight for each direction."""
    return 0.3 + x[:, 0] ** 2 - y[:, 1]


def with_weights(*views):
    x, y = (F.normalize(view, dim=1) for view in views)
    return dcl(*views, weights=torch.cat([of_one_side(x, y), of_one_side(y, x)]))


DCL = {
    "plain": ("DCLLoss", {}, dcl),
    "temperature": ("DCLLoss", {"temperature": 0.7}, lambda *x: dcl(*x, 0.7)),
    "weights": ("DCLLoss", {"weight_fn": of_one_side}, with_weights),
    "DCLW": ("DCLWLoss", {}, dclw),
    "sigma": ("DCLWLoss", {"sigma": 2.0}, lambda *x: dclw(*x, 2.0)),
}


@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")  # theirs
@pytest.mark.parametrize("side", THEIRS)
@pytest.mark.parametrize("case", DCL)
def test_decoupled(side, case):
    name, options, theirs = DCL[case]
    if side == "library":
        theirs = getattr(imported("lightly.loss"), name)(**options)
    assert_same(getattr(lightly, name)(**options), theirs, VIEW, OTHER)


def test_a_checkpoint_of_theirs_loads():
    """Its loss has no state; ours neither takes nor leaves any."""
    loss = lightly.NTXentLoss(memory_bank_size=(12, 6))
    assert not loss.state_dict()
    loss.load_state_dict({})


@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss", "DCLWLoss"])
def test_signatures(library, name):
    assert_same_class(getattr(lightly, name), getattr(library("lightly.loss"), name))


def test_what_is_refused():
    with pytest.raises(
        ValueError,
        match=r"memory_bank_size must be 0, for no bank, or \(size, dim of the features\), got 12",
    ):
        lightly.NTXentLoss(memory_bank_size=12)
