"""MoCo's queue."""

import copy

import pytest
import torch
import torch.distributed as dist

import fastnce
from fastnce import NegativeQueue


def units(count: int, dim: int = 6, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x)


@pytest.mark.parametrize("batches", [(3, 3, 3), (5, 2, 6), (7,), (16,), (1,) * 9])
def test_first_in_first_out(batches):
    """Against a list that grows; the batches need not divide the size, and may be larger than it."""
    queue = NegativeQueue(7, 6)
    expected = list(queue.keys.clone())
    at = 0
    for seed, count in enumerate(batches):
        keys = units(count, seed=seed)
        queue.enqueue(keys)
        for key in keys:
            expected[at] = key
            at = (at + 1) % 7
        torch.testing.assert_close(queue.keys, torch.stack(expected))
        assert queue.queue_ptr.tolist() == [at]


def test_state_dict_has_the_published_names_and_shapes(tmp_path):
    queue = NegativeQueue(5, 6)
    queue.enqueue(units(3))
    state = queue.state_dict()  # what waits is written
    assert {name: tuple(x.shape) for name, x in state.items()} == {
        "queue": (6, 5),
        "queue_ptr": (1,),
    }
    torch.testing.assert_close(state["queue"][:, :3].T, units(3))
    torch.save(state, tmp_path / "queue.pt")
    other = NegativeQueue(5, 6, seed=1)
    other.enqueue(units(2))  # must not be written over what is loaded
    other.load_state_dict(torch.load(tmp_path / "queue.pt"))
    assert torch.equal(other.keys, queue.keys) and torch.equal(other.queue_ptr, queue.queue_ptr)
    published = torch.nn.functional.normalize(torch.randn(6, 5), dim=0)  # contiguous as (dim, size)
    other.load_state_dict({"queue": published, "queue_ptr": torch.zeros(1, dtype=torch.int64)})
    assert torch.equal(other.keys, published.T)
    assert other.keys.is_contiguous()


def test_the_loss_reads_the_queue_where_it_lies():
    queue = NegativeQueue(64, 6)
    for moved in (queue, copy.deepcopy(queue), queue.to(torch.float64).to(torch.float32)):
        assert moved.keys.is_contiguous()
        assert moved.keys.untyped_storage().data_ptr() == moved.queue.untyped_storage().data_ptr()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_enqueue_between_forward_and_backward(reduction, backend):
    """What every training loop of MoCo does; unreduced, the backward needs the queue as it was."""
    queue = NegativeQueue(32, 6)
    query, key = units(4, seed=1), units(4, seed=2)

    def gradient(enqueue: bool) -> torch.Tensor:
        leaf = query.clone().requires_grad_()
        loss = fastnce.info_nce(leaf, key, queue.keys, reduction=reduction, backend=backend)
        if enqueue:
            queue.enqueue(key)
        loss.sum().backward()
        return leaf.grad

    expected = gradient(enqueue=False)
    assert torch.equal(gradient(enqueue=True), expected)
    assert torch.equal(queue.keys[:4], key) or (queue.keys[:4] - key).norm() < 1e-6


def test_keys_are_normalised_and_without_gradient():
    queue = NegativeQueue(4, 6)
    queue.enqueue(3 * units(2).requires_grad_())
    torch.testing.assert_close(queue.keys[:2], units(2))
    assert not queue.keys.requires_grad


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (torch.randn(2, 5), "keys must have the shape (2, 6) (the queue has dim=6), got (2, 5)"),
        (torch.randn(2, 6).double(), "keys is torch.float64 but the queue is torch.float32"),
        (torch.randn(6), "keys must have the shape (N, D), got (6,)"),
    ],
)
def test_errors(keys, message):
    with pytest.raises((TypeError, ValueError)) as raised:
        NegativeQueue(4, 6).enqueue(keys)
    assert message in str(raised.value)


def enqueue_over_ranks(group, counts):
    rank = dist.get_rank(group)
    queue = NegativeQueue(7, 6)
    for step in range(3):
        queue.enqueue(units(sum(counts), seed=step).split(counts)[rank], group=group)
    even = NegativeQueue(7, 6)
    even.enqueue(units(4, seed=rank)[:2], group=group, check=False)
    return queue.keys, queue.queue_ptr, even.keys


@pytest.mark.parametrize("counts", [(1, 3, 0), (2, 2, 2), (4, 1, 4)])
def test_ranks_stay_in_step(counts, workers):
    one = NegativeQueue(7, 6)
    for step in range(3):
        one.enqueue(units(sum(counts), seed=step))
    answers = workers.results(enqueue_over_ranks, counts, ranks=3)
    for keys, pointer, even in answers:
        torch.testing.assert_close(keys, one.keys)
        assert torch.equal(pointer, one.queue_ptr)
        assert torch.equal(even, answers[0][2])
