"""Ranks that disagree get an error that says so, on every rank; and so do those whose rank has died."""

import math
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from workers import Workers

from fastnce import NegativeQueue, distributed
from fastnce.ranks import agree, ranks_of

# What the error says, and what rank 0 and the others pass.
CASES = {
    "D": ("rank 0 has 8, rank 1 has 9", {}, {"dim": 9}),
    "dtype": ("rank 0 has torch.float32, rank 1 has torch.float64", {}, {"dtype": torch.float64}),
    "temperature": ("rank 0 has 0.1, rank 1 has 0.2", {}, {"temperature": 0.2}),
    "temperature rounded": ("rank 0 has 0.1, rank 1 has 0.10000000149", {}, {"temperature": torch.tensor(0.1)}),
    "strategy": ("rank 0 has ring, rank 1 has gather", {"strategy": "ring"}, {"strategy": "gather"}),
    "reduction": ("rank 0 has mean, rank 1 has sum", {}, {"reduction": "sum"}),
    "the op": ("rank 0 has info_nce, rank 1 has nt_xent", {}, {"op": "nt_xent"}),
    "whether query needs a gradient": ("rank 0 has 1, rank 1 has 0", {}, {"grad": False}),
    "symmetric": ("rank 0 has 0, rank 1 has 1", {}, {"symmetric": True}),
}  # fmt: skip


def call(group, first, others):
    given = {"op": "info_nce", "dim": 8, "dtype": torch.float32, "grad": True, "temperature": 0.1}
    given |= first if dist.get_rank(group) == 0 else others
    shape = (3, given.pop("dim"))
    x = torch.randn(2, *shape, dtype=given.pop("dtype"), requires_grad=given.pop("grad"))
    return getattr(distributed, given.pop("op"))(*x, group=group, **given).item()


@pytest.mark.parametrize("case", CASES)
def test_a_disagreement_is_an_error_on_every_rank(case, workers):
    """That names what it is about and the values; and afterwards the ranks work as before."""
    values, first, others = CASES[case]
    for answer in workers.run(call, first, others, ranks=3):
        assert isinstance(answer, ValueError) and "disagree" in str(answer)
        assert f"{case.removesuffix(' rounded')}: {values}" in str(answer)
    assert len(set(workers.results(call, {}, {}, ranks=3))) == 1


def numbers_of_accelerators(group, values):
    """What ranks exchange whose temperatures no check has read."""
    tau = torch.tensor(values[dist.get_rank(group)])
    facts = {"rows": 3, "temperature": tau}
    return agree(ranks_of(group), "info_nce", tau.device, lambda: facts, check=True)


def temperatures(group, values):
    tau = torch.tensor(values[dist.get_rank(group)], requires_grad=True)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    return distributed.info_nce(*x, temperature=tau, group=group)


@pytest.mark.parametrize(
    "values",
    [(math.nan, math.nan, math.nan), (0.1, math.nan, 0.1), (math.inf, 0.1, -0.1)],
)
@pytest.mark.parametrize("call", [temperatures, numbers_of_accelerators])
def test_a_temperature_that_is_no_number_is_named_with_its_ranks(call, values, workers):
    """NaN differs from itself, and no rank may be told that rank 0 disagrees with rank 0."""
    invalid = [rank for rank, value in enumerate(values) if not 0 < value < math.inf]
    for rank, answer in enumerate(workers.run(call, values, ranks=3)):
        assert isinstance(answer, (ValueError, RuntimeError)) and "disagree" not in str(answer)
        if rank in invalid:
            assert "temperature" in str(answer) and f"{values[rank]:g}" in str(answer)
        else:
            assert all(str(other) in str(answer) for other in invalid)


def wrong(group, case: str):
    x, rank = torch.randn(3, 4), dist.get_rank(group)
    if case == "one argument":
        return distributed.info_nce(x, x if rank == 0 else x[:2], group=group)
    if case == "no backend":  # chosen before any rank waits for another's rows
        return distributed.nt_xent(x, x, group=group, backend="triton" if rank > 0 else "torch")
    if case == "no row":
        return distributed.nt_xent(x[:0], x[:0], group=group)
    if case == "ids":
        return distributed.nt_xent(x, x, group=group, ids=None if rank == 0 else torch.arange(3))
    if case == "other rows":
        labels = torch.arange(3)
        return distributed.sup_con(x, labels, *((x, labels) if rank > 0 else ()), group=group)
    if case == "another form":
        return distributed.sup_con(x, torch.arange(3), normalize=rank == 0, group=group)
    labelled = case == "labels"
    queue = NegativeQueue(8, 4 if labelled else 4 + rank, labelled=labelled and rank == 0)
    labels = (torch.arange(2),) if queue.labelled else ()
    return queue.enqueue(torch.randn(2, queue.keys.shape[1]), *labels, group=group)


@pytest.mark.parametrize(
    ("case", "first", "others"),
    [
        ("one argument", "rank 1, 2 ", "positive_key must have the shape"),
        ("no backend", "rank 1, 2 ", "backend 'triton' cannot run it"),
        ("no row", "no rank has any row", "no rank has any row"),
        ("ids", "rank 1, 2 ", "nt_xent: there is no ids over ranks"),
        ("other rows", "rank 1, 2 ", "sup_con: there is no reference_features over ranks"),
        ("another form", "rank 1, 2 ", "sup_con: there is no normalize over ranks"),
        ("queues", "disagree on D", "disagree on D"),
        ("labels", "disagree on whether keys have labels", "disagree on whether keys have labels"),
    ],
)
def test_an_invalid_argument_of_some_ends_the_call_on_all(case, first, others, workers):
    answers = workers.run(wrong, case, ranks=3)
    for answer, message in zip(answers, (first, others, others), strict=True):
        assert isinstance(answer, (ValueError, RuntimeError)) and message in str(answer)


def unchecked(group):
    """Loss with and without the check, and how many messages the check takes."""
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(dist.get_rank(group)))
    options = {"strategy": "ring", "group": group}
    with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gather:
        losses = [distributed.info_nce(*x, check=check, **options) for check in (True, False)]
    return [loss.item() for loss in losses], gather.call_count


def test_the_check_is_one_message_and_can_be_left_out(workers):
    for losses, messages in workers.results(unchecked, ranks=2):
        assert losses[0] == losses[1]
        assert messages == 1


def outsider(group):
    """Rank 0 asks for a group that it is not part of."""
    return distributed.nt_xent(torch.eye(2), torch.eye(2), group=dist.new_group([1, 2, 3]))


def test_a_rank_outside_the_group(workers):
    answers = workers.run(outsider)
    assert "not one of its ranks" in str(answers[0])
    assert all(isinstance(answer, torch.Tensor) for answer in answers[1:])


def dying(group):
    """The last rank ends between forward and backward."""
    x = torch.randn(2, 4, 8, requires_grad=True)
    loss = distributed.info_nce(*x, strategy="ring")
    if dist.get_rank() == 2:
        os._exit(3)
    errors = []
    for call in (loss.backward, lambda: distributed.info_nce(*x)):
        try:
            call()
        except RuntimeError as error:
            errors.append(str(error))
    return errors


def test_a_rank_that_dies_ends_the_others(tmp_path):
    """And whoever tries again gets the error again."""
    workers = Workers(3, tmp_path)
    try:
        *alive, dead = workers.run(dying)
    finally:
        workers.stop()
    assert str(dead) == "exit code 3"
    for rank, errors in enumerate(alive):
        assert len(errors) == 2
        assert all(f"info_nce: rank {rank} lost the other ranks" in error for error in errors)
