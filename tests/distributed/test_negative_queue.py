"""MoCo's queue."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastnce
from fastnce import NegativeQueue


def units(count: int, dim: int = 6, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x)


@pytest.mark.parametrize("batches", [(3, 3, 3), (5, 2, 6), (7,), (16,), (1,) * 9])
def test_first_in_first_out(batches):
    """Against a list that grows; the batches need not divide the size, and may be larger than it."""
    queue = NegativeQueue(7, 6)
    expected, at = queue.keys.clone(), 0
    for seed, count in enumerate(batches):
        keys = units(count, seed=seed)
        queue.enqueue(keys)
        for key in keys:
            expected[at % 7] = key
            at += 1
        torch.testing.assert_close(queue.keys, expected)
        assert queue.queue_ptr.tolist() == [at % 7]


def test_state_dict_has_the_published_names_and_shapes(tmp_path):
    queue = NegativeQueue(5, 6)
    queue.enqueue(units(3))
    state = queue.state_dict()  # what waits is written
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    assert shapes == {"queue": (6, 5), "queue_ptr": (1,)}
    torch.testing.assert_close(state["queue"][:, :3].T, units(3))
    torch.save(state, tmp_path / "queue.pt")
    other = NegativeQueue(5, 6, seed=1)
    other.enqueue(units(2))  # must not be written over what is loaded
    other.load_state_dict(torch.load(tmp_path / "queue.pt"))
    assert torch.equal(other.keys, queue.keys) and torch.equal(other.queue_ptr, queue.queue_ptr)
    # Published ones are contiguous as (dim, size); those of older versions were not.
    published = torch.nn.functional.normalize(torch.randn(6, 5), dim=0)
    for queue in (published, published.T.contiguous().T):
        torch.save({"queue": queue, "queue_ptr": torch.tensor([3])}, tmp_path / "queue.pt")
        other.load_state_dict(torch.load(tmp_path / "queue.pt"))
        assert torch.equal(other.keys, published.T) and other.keys.is_contiguous()
        assert other.queue_ptr.tolist() == [3]


def test_the_loss_reads_the_queue_where_it_lies():
    queue = NegativeQueue(64, 6)
    for moved in (queue, copy.deepcopy(queue), queue.to(torch.float64).to(torch.float32)):
        assert moved.keys.is_contiguous()
        assert moved.keys.untyped_storage().data_ptr() == moved.queue.untyped_storage().data_ptr()


class Holder(nn.Module):
    """A user's model with a queue."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = nn.Linear(6, 6)
        self.queue = NegativeQueue(5, 6, seed=seed)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("way", ["torch.save", "save_file", "save_model"])
def test_saving_a_model_with_a_queue(way, assign, tmp_path):
    model, other = Holder(), Holder(seed=1)
    model.queue.enqueue(units(2))
    path = str(tmp_path / "model")
    if way == "torch.save":
        torch.save(model.state_dict(), path)
        other.load_state_dict(torch.load(path), assign=assign)
    elif way == "save_file":
        save_file(model.state_dict(), path)
        other.load_state_dict(load_file(path), assign=assign)
    else:
        save_model(model, path)
        assert load_model(other, path) == (set(), [])
    state = other.state_dict()
    assert all(x.is_contiguous() for x in state.values())
    assert (state["queue.queue"].shape, state["queue.queue_ptr"].tolist()) == ((6, 5), [2])
    assert torch.equal(other.queue.keys, model.queue.keys) and other.queue.keys.is_contiguous()
    other.queue.enqueue(units(1, seed=3))
    torch.testing.assert_close(other.queue.keys[2], units(1, seed=3)[0])


MOVES = {
    "half": lambda q: q.half(),
    "to a dtype": lambda q: q.to(torch.float64),
    "cpu": lambda q: q.cpu(),
    "copy": copy.deepcopy,
    "pickle": lambda q: pickle.loads(pickle.dumps(q)),
    "part of a model": lambda q: nn.ModuleList([q]).bfloat16()[0],
}


@pytest.mark.parametrize("move", MOVES)
def test_keys_that_wait_go_with_the_queue(move):
    queue = NegativeQueue(5, 6)
    queue.enqueue(units(2))
    queue.enqueue(units(1, seed=1))
    moved = MOVES[move](queue)
    expected = torch.cat([units(2), units(1, seed=1)]).to(moved.queue.dtype)
    torch.testing.assert_close(moved.keys[:3], expected)
    assert moved.keys.dtype == moved.queue.dtype and moved.queue_ptr.tolist() == [3]
    assert moved.to("meta").keys.device.type == "meta"


def test_a_state_dict_leaves_the_queue_to_the_backward():
    """Keys that wait are in it; those that the loss has read are not written over."""
    queue, query = NegativeQueue(8, 6), units(2, seed=5).requires_grad_()
    loss = fastnce.info_nce(query, units(2), queue.keys, reduction="none", backend="torch")
    queue.enqueue(units(2))
    first, second = queue.state_dict(), queue.state_dict()
    loss.sum().backward()
    torch.testing.assert_close(first["queue"][:, :2].T, units(2))
    assert torch.equal(first["queue"], second["queue"]) and first["queue_ptr"].tolist() == [2]
    queue.load_state_dict({}, strict=False)  # nothing for it: what waits still waits
    assert torch.equal(queue.keys.T, first["queue"])


@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_keys_of_any_dtype_under_autocast(dtype, queue_dtype):
    """As the loss takes them there; they are normalised in the wider dtype, then rounded to the queue's."""
    queue, keys = NegativeQueue(4, 6, dtype=queue_dtype), (3 * units(2)).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        queue.enqueue(keys)
        assert fastnce.info_nce(keys, keys, queue.keys).isfinite()
    wide = torch.promote_types(dtype, queue_dtype)
    expected = torch.nn.functional.normalize(keys.detach().double()).to(wide).to(queue_dtype)
    found = queue.keys[:2]
    assert found.dtype == queue_dtype and not found.requires_grad
    torch.testing.assert_close(found, expected)


def ddp_with_a_queue(group):
    """Each rank begins with other keys; DDP sends them rank 0's."""
    rank = dist.get_rank(group)
    model = Holder(seed=rank)
    ddp = DistributedDataParallel(model, process_group=group)
    ddp(torch.randn(2, 6)).sum().backward()
    model.queue.enqueue(units(1, seed=rank), group=group)
    return model.queue.keys, model.queue.keys.is_contiguous(), model.queue.queue_ptr.tolist()


def test_ddp_sends_the_queue(workers):
    first = NegativeQueue(5, 6, seed=0)
    first.enqueue(units(1))
    first.enqueue(units(1, seed=1))
    for keys, contiguous, pointer in workers.results(ddp_with_a_queue, ranks=2):
        torch.testing.assert_close(keys, first.keys)
        assert contiguous and pointer == [2]


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


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (torch.randn(2, 5), r"keys .*dim=6\), got \(2, 5\)"),
        (torch.randn(2, 6).double(), "keys is torch.float64 but the queue is torch.float32"),
        (torch.randn(2, 6).bfloat16(), "keys is torch.bfloat16 but the queue is torch.float32"),
        (torch.randn(6), r"keys .*got \(6,\)"),
    ],
)
def test_errors(keys, message):
    with pytest.raises((TypeError, ValueError), match=message):
        NegativeQueue(4, 6).enqueue(keys)


def memory(size: int = 7, **batches) -> NegativeQueue:
    """A labelled queue that has taken in batches of these sizes."""
    queue = NegativeQueue(size, 6, labelled=True)
    for seed, count in enumerate(batches.get("counts", ())):
        queue.enqueue(units(count, seed=seed), 10 * seed + torch.arange(count))
    return queue


@pytest.mark.parametrize("counts", [(3, 3, 3), (5, 2, 6), (7,), (16,), (1,) * 9, (2,)])
def test_labels_and_ids_go_with_their_keys(counts):
    queue, expected = NegativeQueue(7, 6, labelled=True), {}
    assert not queue.filled.any()
    at = 0
    for seed, count in enumerate(counts):
        labels = 10 * seed + torch.arange(count)
        given = queue.enqueue(units(count, seed=seed), labels.int())
        assert given.dtype == torch.int64 and len(set(given.tolist())) == count
        assert not set(given.tolist()) & {i for _, i in expected.values()}
        for label, id_ in zip(labels.tolist(), given.tolist(), strict=True):
            expected[at % 7] = (label, id_)
            at += 1
    assert queue.filled.tolist() == [place in expected for place in range(7)]
    for place, (label, id_) in expected.items():
        assert (queue.labels[place], queue.ids[place]) == (label, id_)
    plain = NegativeQueue(7, 6)
    for seed, count in enumerate(counts):
        plain.enqueue(units(count, seed=seed))
    assert torch.equal(queue.keys, plain.keys)


def test_new_ids_are_new_among_given_ones_and_those_that_wait():
    queue = memory()
    assert queue.enqueue(units(2), torch.zeros(2).long(), torch.tensor([40, 7])).tolist() == [40, 7]
    assert queue.enqueue(units(2), torch.zeros(2).long()).tolist() == [41, 42]
    labels, ids = torch.arange(2), torch.tensor([90, 91])
    queue.enqueue(units(2), labels, ids)
    labels += 5  # the caller's own: they go on with them before the queue writes
    ids += 5
    assert queue.labels[4:6].tolist() == [0, 1] and queue.ids[:6].tolist() == [
        40,
        7,
        41,
        42,
        90,
        91,
    ]


@pytest.mark.parametrize("move", MOVES)
def test_labels_that_wait_go_with_the_queue(move):
    queue = memory(counts=(2, 1))
    moved = MOVES[move](queue)
    assert moved.labels[:3].tolist() == [0, 1, 10] and moved.ids[:3].tolist() == [0, 1, 2]
    assert moved.filled.tolist() == [True] * 3 + [False] * 4
    assert moved.labels.dtype == moved.ids.dtype == torch.int64


def test_the_state_dict_of_a_labelled_queue(tmp_path):
    queue, other = memory(counts=(2,)), memory(counts=(5,))
    state = queue.state_dict()
    assert list(state) == ["queue", "queue_ptr", "queue_labels", "queue_ids"]
    save_file(state, str(tmp_path / "queue"))
    other.load_state_dict(load_file(str(tmp_path / "queue")))
    for name in ("keys", "labels", "ids", "filled"):
        assert torch.equal(getattr(other, name), getattr(queue, name))
    # A file of keys alone: nothing is known of them.
    published = NegativeQueue(7, 6).state_dict()
    with pytest.raises(RuntimeError, match="Missing key.*queue_labels"):
        other.load_state_dict(published)
    other.load_state_dict(published, strict=False)
    assert not other.filled.any()
    with pytest.raises(RuntimeError, match="Unexpected key.*queue_labels"):
        NegativeQueue(7, 6).load_state_dict(state)


@pytest.mark.parametrize("positives", ["mean", "each", "sum"])
@pytest.mark.parametrize("first", ["enqueue", "loss"])
def test_a_batch_against_the_memory(first, positives):
    """As a list of all past rows would have it; a row's own copy is left out, and places not yet taken."""
    size, past, queue = 11, [], NegativeQueue(11, 6, labelled=True)
    for step in range(5):
        x, y = units(4, seed=step).requires_grad_(), torch.arange(4) % 3
        if first == "enqueue":
            ids = queue.enqueue(x, y)
            given = {"ids": ids, "reference_ids": queue.ids}
        else:
            given = {"reference_mask": queue.filled}
        found = fastnce.sup_con(x, y, queue.keys, queue.labels, **given, positives=positives)
        (grad,) = torch.autograd.grad(found, x)
        number = torch.arange(4) + 4 * step
        if first == "enqueue":
            past += zip(x.detach(), y, number, strict=True)
        if past:
            rows, labels, numbers = (torch.stack(z) for z in zip(*past[-size:], strict=True))
            given = {"ids": number, "reference_ids": numbers, "positives": positives}
            expected = fastnce.sup_con(x, y, rows, labels, **given, backend="torch")
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(grad, torch.autograd.grad(expected, x)[0])
        else:
            assert found == 0 and grad.eq(0).all()
        if first == "loss":
            queue.enqueue(x, y)
            past += zip(x.detach(), y, number, strict=True)


def test_errors_of_labels():
    queue, labelled, keys = NegativeQueue(4, 6), memory(), units(2)
    for name in ("labels", "ids", "filled"):
        with pytest.raises(ValueError, match=r"keys alone\. Make it .*labelled=True"):
            getattr(queue, name)
    mistakes = [
        (queue, (keys, torch.arange(2)), "labels are of a labelled queue.*or drop labels"),
        (labelled, (keys,), "labels is None"),
        (labelled, (keys, torch.arange(3)), r"labels must have the shape \(2,\)"),
        (labelled, (keys, keys[:, 0]), "labels must be integers"),
        (labelled, (keys, torch.arange(2), torch.arange(3)), r"ids must have the shape \(2,\)"),
    ]
    for one, arguments, message in mistakes:
        with pytest.raises((TypeError, ValueError), match=f"enqueue: {message}") as caught:
            one.enqueue(*arguments)
        assert "\n" not in str(caught.value)
    assert "labelled=True" in repr(labelled) and "labelled" not in repr(queue)


def labels_over_ranks(group, counts, given):
    rank, queue = dist.get_rank(group), memory()
    for step in range(3):
        numbers = (torch.arange(sum(counts)) + 100 * step).split(counts)[rank]
        keys = units(sum(counts), seed=step).split(counts)[rank]
        ids = queue.enqueue(keys, numbers, 2 * numbers if given else None, group=group)
    return queue.keys, queue.labels, queue.ids, ids


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("counts", [(1, 3, 0), (4, 1, 4)])
def test_labels_of_all_ranks(counts, given, workers):
    one, total = memory(), sum(counts)
    for step in range(3):
        numbers = torch.arange(total) + 100 * step
        ids = one.enqueue(units(total, seed=step), numbers, 2 * numbers if given else None)
    answers = workers.results(labels_over_ranks, counts, given, ranks=3)
    for part, (keys, labels, of_queue, own) in zip(ids.split(counts), answers, strict=True):
        torch.testing.assert_close(keys, one.keys)
        assert torch.equal(labels, one.labels) and torch.equal(of_queue, one.ids)
        assert torch.equal(own, part)


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
