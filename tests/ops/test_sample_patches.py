"""Patch sampling: what is gathered, where gradients go, and how positions are drawn."""

import pytest
import torch
import torch.nn.functional as F
from forms import DTYPES, gaussian
from torch import Tensor

from fastnce import sample_patches
from fastnce.testing import Sample, assert_close_to_truth, forget, run

OP = "sample_patches"
each_normalize = pytest.mark.parametrize("normalize", [False, True])


@pytest.fixture(autouse=True)
def supported(request, needs_support):
    names = {"backend", "fused_backend"} & set(request.fixturenames)
    needs_support(OP, request.getfixturevalue(names.pop()))


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return gaussian(*shape, seed=seed).to(dtype).requires_grad_()


@each_normalize
def test_definition(normalize, backend):
    x, ids = make(2, 5, 4, 3), torch.tensor([11, 0, 7, 7])
    patches, returned = sample_patches(x, patch_ids=ids, normalize=normalize, backend=backend)
    expected = torch.stack([x[:, :, i // 3, i % 3] for i in (11, 0, 7, 7)], dim=1)  # (B, S, C)
    if normalize:
        expected = F.normalize(expected, dim=-1)
        torch.testing.assert_close(patches, expected)
    else:
        assert torch.equal(patches, expected)
    assert returned is ids and patches.is_contiguous()
    upstream = gaussian(*patches.shape, seed=1).float()
    (got,) = torch.autograd.grad(patches, x, upstream, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(expected, x, upstream)[0])
    untouched = torch.ones(12, dtype=torch.bool)
    untouched[ids] = False
    assert got.flatten(2)[:, :, untouched].eq(0).all()
    before = x.detach().clone()
    patches.detach().zero_()
    assert torch.equal(x, before), "patches do not share memory with the map"


@each_normalize
def test_lists_of_several_dtypes_give_lists(normalize, backend):
    """Under autocast the pixels are float32 and the features of convolutions bfloat16."""
    maps = [make(1, 3, 4, 4), make(1, 5, 4, 4, dtype=torch.bfloat16), make(1, 2, 4, 4)]
    ids = [torch.tensor([3, 1]), torch.tensor([2]), torch.tensor([15])]
    patches, returned = sample_patches(maps, patch_ids=ids, normalize=normalize, backend=backend)
    assert isinstance(patches, list) and all(x is y for x, y in zip(returned, ids, strict=True))
    for x, i, got in zip(maps, ids, patches, strict=True):
        alone, _ = sample_patches(x, patch_ids=i, normalize=normalize, backend=backend)
        assert got.dtype == x.dtype and torch.equal(got, alone)
    grads = torch.autograd.grad([p.float().sum() for p in patches], maps)
    assert [grad.dtype for grad in grads] == [x.dtype for x in maps]
    patches, returned = sample_patches(tuple(maps), 3, backend=backend)
    assert [tuple(x.shape) for x in patches] == [(1, 3, 3), (1, 3, 5), (1, 3, 2)]
    assert [tuple(x.shape) for x in returned] == [(3,)] * 3
    patches[0].sum().backward()
    assert maps[0].grad.sum() == 9
    assert maps[1].grad is None or maps[1].grad.eq(0).all(), "a map that is not used"


@pytest.mark.parametrize("count", [20, 29, 30, 31, 10**6])
def test_draws_distinct_positions_the_same_for_all_images(count, backend):
    x = torch.arange(30.0).reshape(1, 1, 5, 6).repeat(3, 2, 1, 1)
    patches, ids = sample_patches(x, count, backend=backend)
    assert ids.dtype == torch.int64 and ids.shape == (min(count, 30),)
    assert len(ids.unique()) == len(ids) and ids.min() >= 0 and ids.max() < 30
    assert torch.equal(patches, ids.float()[None, :, None].expand(3, len(ids), 2))


def chi_square(seen: Tensor, kinds: int) -> float:
    counts = torch.bincount(seen, minlength=kinds).double()
    expected = len(seen) / kinds
    return ((counts - expected).square() / expected).sum().item()


def test_positions_are_uniform(backend):
    """How often each is drawn, and each comes first, over fixed draws; of few of many positions, which are drawn in another way.

    Bounds have the probability 0.001 (drawing without replacement only lowers it): of 19, 379, 47 and 5 degrees of freedom.
    """
    generator = torch.Generator().manual_seed(0)

    def draws(count: int, of: int, times: int) -> Tensor:
        x = torch.zeros(1, 1, 1, of)
        found = [sample_patches(x, count, generator=generator, backend=backend)[1] for _ in range(times)]  # fmt: skip
        return torch.stack(found)

    five = draws(5, 20, 2000)
    assert chi_square(five.flatten(), 20) < 43.8 and chi_square(five[:, 0], 20) < 43.8
    pairs = five[:, 0] * 19 + five[:, 1] - (five[:, 1] > five[:, 0]).long()
    assert five[:, 0].ne(five[:, 1]).all() and chi_square(pairs, 380) < 470
    three = draws(3, 48, 4800)
    assert three.sort().values.diff().min() > 0
    for seen in (three.flatten(), *three.T):
        assert chi_square(seen, 48) < 82.7
    # The order carries no information: each of the 6 orders of the three is as frequent.
    orders = (three.argsort() @ torch.tensor([9, 3, 1])).unique(return_inverse=True)[1]
    assert orders.max() == 5 and chi_square(orders, 6) < 20.6


@pytest.mark.parametrize(("count", "size"), [(256, 256), (1, 4), (512, 91), (32, 8)])
def test_a_generator_makes_the_draw_repeatable_on_every_backend(count, size, backend):
    maps = [torch.zeros(1, 1, size, size), torch.zeros(1, 2, size, size)]

    def draw(seed: int, name: str = backend) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return sample_patches(maps, count, generator=generator, backend=name)[1]

    state = torch.get_rng_state()
    ids = draw(0)
    assert torch.equal(torch.get_rng_state(), state), "the default generator is not touched"
    for other in (draw(0), draw(0, "torch")):
        assert all(map(torch.equal, ids, other))
    assert count == 1 or not torch.equal(ids[0], draw(1)[0])
    for x in ids:
        assert len(x.unique()) == count and x.min() >= 0 and x.max() < size * size
        assert x.dtype == torch.int64 and x.untyped_storage().resizable()  # PyTorch's own
    torch.manual_seed(4)
    first, second = (sample_patches(maps, count, backend=backend)[1] for _ in range(2))
    torch.manual_seed(4)
    assert all(map(torch.equal, first, sample_patches(maps, count, backend=backend)[1]))
    assert count == 1 or not torch.equal(first[0], second[0])


@each_normalize
def test_map_may_change_in_place_before_the_backward(normalize, backend):
    """CUT taps the map before an in-place ReLU."""
    leaf, ids = make(2, 5, 4, 4), torch.tensor([3, 0, 15])
    expected, _ = sample_patches(leaf, patch_ids=ids, normalize=normalize, backend="torch")
    upstream = gaussian(*expected.shape, seed=1).float()
    (grad,) = torch.autograd.grad(expected, leaf, upstream)
    feature = leaf * 1.0
    patches, _ = sample_patches(feature, patch_ids=ids, normalize=normalize, backend=backend)
    kept = patches.detach().clone()
    feature.relu_()
    assert torch.equal(patches, kept)
    torch.testing.assert_close(torch.autograd.grad(patches, leaf, upstream)[0], grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_tiny_and_huge_patches_normalised(dtype, backend, needs_support):
    needs_support(OP, backend, dtype)
    tiny, huge = (2e-7, 6e4) if dtype == torch.float16 else (1e-20, 1e20)
    x = torch.ones(1, 4, 2, 2, dtype=torch.float64)
    x[0, :, 0, 0], x[0, :, 0, 1], x[0, :, 1, 0] = 0, tiny, huge
    x = x.to(dtype).requires_grad_()
    patches, _ = sample_patches(x, patch_ids=torch.arange(4), normalize=True, backend=backend)
    expected = torch.full((4, 4), 0.5, dtype=dtype)
    expected[0] = 0
    torch.testing.assert_close(patches[0].detach(), expected, rtol=torch.finfo(dtype).eps, atol=0)
    upstream = torch.tensor([1.0, 2.0, 3.0, -1.0]).to(dtype).expand(1, 4, 4)
    (grad,) = torch.autograd.grad(patches, x, upstream)
    grad = grad.flatten(2)[0].T.double()  # (4 positions, 4 channels)
    assert grad[0].eq(0).all()
    # Upstream less its mean.
    tangent = torch.tensor([-0.25, 0.75, 1.75, -2.25], dtype=torch.float64).expand(3, 4)
    norms = 2 * x.detach().double()[0, 0].flatten()
    if dtype != torch.float16:  # the gradient of a row of norm 4e-7 is beyond fp16
        torch.testing.assert_close(grad[1:] * norms[1:, None], tangent, rtol=0.02, atol=0)


def test_map_further_apart_than_int32_reaches(backend, needs_support):
    """Addresses only: a few pages are touched."""
    needs_support(OP, backend, torch.bfloat16)
    far = torch.empty(3 * 2**30 + 64, dtype=torch.bfloat16)
    values, ids = torch.arange(36.0).reshape(1, 3, 3, 4).bfloat16(), torch.tensor([11, 0, 6])
    for strides in ((2**30, 16, 4, 1), (48, 16, 2**30, 1), (64, 2**30, 4, 1), (64, 16, 4, 2**29)):
        view = far.as_strided((1, 3, 3, 4), strides)
        view.copy_(values)
        got, _ = sample_patches(view, patch_ids=ids, backend=backend)
        assert torch.equal(got, values.flatten(2)[:, :, ids].mT)
    forget()


SHAPES = [(1, 1, 1, 1), (1, 3, 262, 262), (2, 64, 16, 16), (1, 1000, 3, 5), (5, 17, 1, 63), (1, 256, 64, 1)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_keep_their_layout(shape, fused_backend):
    x = gaussian(*shape).float()
    ids = torch.randperm(shape[2] * shape[3], generator=torch.Generator().manual_seed(3))[:256]
    for normalize in (False, True):
        for layout in (torch.contiguous_format, torch.channels_last):
            features = x.contiguous(memory_format=layout).requires_grad_()
            arguments = {"features": features, "patch_ids": ids, "normalize": normalize}
            sample = Sample(str(layout), arguments)
            assert_close_to_truth(OP, fused_backend, sample, torch.float32)
            grad = run(OP, sample, backend=fused_backend)["d features"]
            assert grad.is_contiguous(memory_format=layout)


@each_normalize
def test_many_repeats_of_one_position_whatever_the_threads(normalize, fused_backend, threads):
    ids = torch.arange(700) % 3
    arguments = {"features": make(2, 33, 8, 8), "patch_ids": ids, "normalize": normalize}
    sample = Sample("repeats", arguments)
    assert_close_to_truth(OP, fused_backend, sample, torch.float32)
    one = run(OP, sample, backend=fused_backend)
    threads(2)
    two = run(OP, sample, backend=fused_backend)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("bad", [-1, 12, 2**62])
def test_ids_outside_the_map(bad, backend):
    with pytest.raises(IndexError, match=rf"sample_patches: patch_ids .*\[0, 12\).* got {bad}"):
        sample_patches(make(1, 2, 3, 4), patch_ids=torch.tensor([0, bad]), backend=backend)
