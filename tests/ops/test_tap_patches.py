"""The tap: results and gradients of sample_patches, and whose memory the backward may write to."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from forms import DTYPES, among_nans, every_third_feature, gaussian
from torch import Tensor

import fastnce
from fastnce import sample_patches, tap_patches

OP = "tap_patches"
IDS = torch.tensor([11, 0, 7, 7, 3])


@pytest.fixture(autouse=True)
def supported(request, needs_support):
    names = {"backend", "fused_backend"} & set(request.fixturenames)
    needs_support(OP, request.getfixturevalue(names.pop()))


class Network(torch.autograd.Function):
    """What follows the map: its gradient for the map is whatever ``gradient()`` returns."""

    @staticmethod
    def forward(ctx, x, gradient):
        ctx.gradient = gradient
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return ctx.gradient(), None


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: every_third_feature(among_nans(x)),
    "expanded": lambda x: x[:1].expand(x.shape),
}


def make(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
    return LAYOUTS[layout](gaussian(*shape).to(dtype)).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_the_reference(dtype, layout, backend, needs_support):
    """In fp64: the patches, and the gradient of a network's sum and theirs; of repeated and of distinct positions."""
    needs_support(OP, backend, dtype)
    x = make(2, 37, 4, 3, dtype=dtype, layout=layout)
    network = gaussian(*x.shape, seed=1).to(dtype)
    for normalize, ids in itertools.product((False, True), (IDS, IDS[:3])):
        options = {"patch_ids": ids, "normalize": normalize}
        weight = gaussian(2, len(ids), 37, seed=2).to(dtype)
        wide = x.detach().double().requires_grad_()
        expected, _ = sample_patches(wide, **options, backend="torch")
        total = (network.double() * wide).sum() + (weight.double() * expected).sum()
        (gradient,) = torch.autograd.grad(total, wide)
        passed, patches, returned = tap_patches(x, **options, backend=backend)
        assert returned is ids and torch.equal(passed, x) and passed.dtype == patches.dtype == dtype
        # One gradient that belongs to the tap alone, and one that does not.
        for give in (network.clone, lambda: network):
            before = network.clone()
            out = Network.apply(passed, give)
            upstream = [out.detach(), weight]
            (got,) = torch.autograd.grad([out, patches], x, upstream, retain_graph=True)
            assert got.dtype == dtype and torch.equal(network, before)
            for value, truth in ((patches.detach(), expected.detach()), (got, gradient)):
                bound = 4 * torch.finfo(dtype).eps * truth.abs().max().item()
                torch.testing.assert_close(value.double(), truth, rtol=0, atol=bound)


def test_writes_into_a_gradient_that_is_its_own(fused_backend):
    x = make(2, 5, 4, 3)
    seen = {}

    def fresh():
        gradient = torch.ones(x.shape)
        seen["given"] = gradient.data_ptr()
        return gradient

    for first in ("network", "patches"):
        feature = x * 1.0
        feature.register_hook(lambda g: seen.update(got=g.data_ptr()))
        passed, patches, _ = tap_patches(feature, patch_ids=IDS, backend=fused_backend)
        if first == "network":  # created last, so run first
            loss = patches.sum()
            total = loss + Network.apply(passed, fresh)
        else:
            loss = Network.apply(passed, fresh)
            total = loss + patches.sum()
        total.backward()
        assert seen["given"] == seen["got"]


SHAPE = (2, 5, 4, 3)


def backward(passed: Tensor, patches: Tensor, give=lambda: torch.ones(SHAPE)) -> None:
    (Network.apply(passed, give) + patches.sum()).backward()


def of_network(size: tuple[int, ...], view: Callable[[Tensor], Tensor] = lambda x: x) -> Callable:
    """The network keeps a tensor of this size, and gives a view of it."""

    def share(x, passed, patches):
        held = torch.ones(size)
        gradient = view(held)
        backward(passed, patches, lambda: gradient)
        return held

    return share


def memory_of_numpy(x, passed, patches):
    """No tensor but the gradient itself shows that NumPy holds its memory."""
    held = np.ones(SHAPE, dtype=np.float32)
    backward(passed, patches, lambda: torch.from_numpy(held))
    return torch.from_numpy(held)


def kept_by_caller(x, passed, patches):
    held = torch.ones(x.shape)
    torch.autograd.backward([passed, patches], [held, torch.ones_like(patches)])
    return held


def another_summand(x, passed, patches):
    """The sum hands one tensor to both of its summands."""
    other = torch.zeros(x.shape, requires_grad=True)
    later = torch.zeros(x.shape, requires_grad=True) * 1.0
    later.retain_grad()
    backward(other + passed + later, patches)
    assert torch.equal(later.grad, torch.ones(x.shape))
    return other.grad


def by_a_hook(keep: Callable[[Tensor], Tensor]) -> Callable:
    def share(x, passed, patches):
        held = []
        passed.register_hook(lambda grad: held.append(keep(grad)))
        backward(passed, patches)
        return held[0]

    return share


def retained(x, passed, patches):
    passed.retain_grad()
    backward(passed, patches)
    return passed.grad


def captured(x, passed, patches):
    total = Network.apply(passed, lambda: torch.ones(x.shape)) + patches.sum()
    of_passed, x.grad = torch.autograd.grad(total, [passed, x])
    return of_passed


# Who holds the gradient; each returns what it holds, which was all ones.
SHARED = {
    "caller": kept_by_caller,
    "network": of_network(SHAPE),
    "view of the network's": of_network((360,), lambda x: x[120:240].view(SHAPE)),
    "numpy": memory_of_numpy,
    "expanded": of_network((1,), lambda x: x.expand(SHAPE)),
    "another summand": another_summand,
    "hook": by_a_hook(lambda grad: grad),
    "view by a hook": by_a_hook(lambda grad: grad[:]),
    "retained": retained,
    "captured": captured,
}


@pytest.mark.parametrize("share", SHARED)
def test_a_gradient_that_others_hold_is_left_alone(share, backend):
    if backend == "torch" and share == "numpy":
        pytest.skip("PyTorch itself adds into memory that NumPy holds")
    for patches_last in (False, True):
        x = make(*SHAPE)
        passed, patches, _ = tap_patches(x, patch_ids=IDS, backend=backend)
        held = SHARED[share](x, passed, patches * 1.0 if patches_last else patches)
        assert torch.equal(held, torch.ones_like(held))
        times = torch.bincount(IDS, minlength=12).reshape(4, 3)
        torch.testing.assert_close(x.grad, (1.0 + times).expand(x.shape))


def test_the_map_used_many_times(backend):
    x = make(2, 5, 4, 3)
    passed, patches, _ = tap_patches(x, patch_ids=IDS, backend=backend)
    again, more, _ = tap_patches(passed, patch_ids=IDS[:3], backend=backend)
    total = (again * passed).sum() + (passed + passed).sum() + patches.sum() + more.square().sum()
    twice = [torch.autograd.grad(total, x, retain_graph=True)[0] for _ in range(2)]
    plain = x.detach().clone().requires_grad_()
    first, _ = sample_patches(plain, patch_ids=IDS, backend="torch")
    second, _ = sample_patches(plain, patch_ids=IDS[:3], backend="torch")
    total = plain.square().sum() + 2 * plain.sum() + first.sum() + second.square().sum()
    (expected,) = torch.autograd.grad(total, plain)
    for got in twice:
        torch.testing.assert_close(got, expected)


def test_lists_of_several_dtypes(backend, needs_support):
    needs_support(OP, backend, torch.bfloat16)
    maps = [make(2, 3, 4, 4), make(2, 5, 4, 3, dtype=torch.bfloat16), make(2, 7, 5, 5)]
    ids = [torch.tensor([3, 1]), IDS, torch.tensor([24])]
    passed, patches, returned = tap_patches(maps, patch_ids=ids, backend=backend)
    assert all(x is y for x, y in zip(returned, ids, strict=True))
    plain, _ = sample_patches(maps, patch_ids=ids, backend="torch")
    for got, expected in zip(patches, plain, strict=True):
        assert torch.equal(got, expected)
    # The map in the middle is not used, nor are the patches of the last one.
    total = passed[0].sum() + patches[0].sum() + patches[1].float().sum() + passed[2].sum()
    grads = torch.autograd.grad(total, maps)
    other = maps[0].sum() + plain[0].sum() + plain[1].float().sum() + maps[2].sum()
    for got, expected in zip(grads, torch.autograd.grad(other, maps), strict=True):
        assert torch.equal(got, expected)


def test_under_checkpointing(backend):
    """Which lets a backward read what was saved once; one map goes on, of the other the patches alone are used."""

    def step(x):
        passed, patches, _ = tap_patches([x * 1, x * 2], patch_ids=[IDS, IDS], backend=backend)
        return passed[0].square().sum() + sum(y.cos().sum() for y in patches)

    x = make(2, 5, 4, 3)
    (expected,) = torch.autograd.grad(step(x), x)
    out = torch.utils.checkpoint.checkpoint(step, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out, x)[0], expected)


def test_without_gradients(backend):
    x = make(2, 5, 4, 3)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            passed, patches, _ = tap_patches(x, patch_ids=IDS, backend=backend)
        assert not patches.requires_grad and torch.equal(passed, x)


def test_compiles_in_one_graph(backend):
    torch._dynamo.reset()

    def step(x):
        passed, patches, _ = tap_patches(x * 1.0, patch_ids=IDS, backend=backend)
        return passed.square().sum() + patches.cos().sum()

    x = make(2, 5, 4, 3)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(got, torch.autograd.grad(step(x), x)[0])


def test_the_map_cannot_be_changed_in_place(fused_backend):
    """It is also the map that was given, which autograd would not know to have changed."""
    passed, _, _ = tap_patches(make(2, 5, 4, 3) * 1.0, patch_ids=IDS, backend=fused_backend)
    with pytest.raises(RuntimeError, match="modified inplace"):
        passed.relu_()


def test_errors_name_the_op(backend):
    with pytest.raises(ValueError, match="tap_patches: num_patches .*got 0"):
        fastnce.tap_patches(make(2, 5, 4, 3), 0, backend=backend)
