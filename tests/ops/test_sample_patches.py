"""Patch sampling: what is gathered, where gradients go, and how positions are drawn."""

import functools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

import fastnce
from fastnce import sample_patches
from fastnce.testing import Sample, assert_close_to_truth, rows, run

OP = "sample_patches"


@pytest.fixture(autouse=True)
def supported(backend, needs_support):
    needs_support(OP, backend)


@pytest.fixture
def make(generator):
    return functools.partial(rows, dtype=torch.float32, device="cpu", generator=generator)


@pytest.mark.parametrize("normalize", [False, True])
def test_definition(normalize, backend, make, generator):
    x = make(2, 5, 4, 3)
    ids = torch.tensor([11, 0, 7, 7])
    patches, returned = sample_patches(x, patch_ids=ids, normalize=normalize, backend=backend)
    expected = torch.stack([x[:, :, i // 3, i % 3] for i in (11, 0, 7, 7)], dim=1)  # (B, S, C)
    if normalize:
        expected = F.normalize(expected, dim=-1)
        torch.testing.assert_close(patches, expected)
    else:
        assert torch.equal(patches, expected)
    assert returned is ids
    assert patches.is_contiguous()
    upstream = torch.randn(patches.shape, generator=generator)
    (got,) = torch.autograd.grad(patches, x, upstream)
    torch.testing.assert_close(got, torch.autograd.grad(expected, x, upstream)[0])
    untouched = torch.ones(12, dtype=torch.bool)
    untouched[ids] = False
    assert got.flatten(2)[:, :, untouched].eq(0).all()


def test_a_list_gives_lists(backend, make):
    maps = [make(2, 5, 4, 3), make(2, 8, 2, 2)]
    ids = [torch.tensor([3, 1]), torch.tensor([2])]
    patches, returned = sample_patches(maps, patch_ids=ids, backend=backend)
    assert isinstance(patches, list) and isinstance(returned, list)
    for x, i, got in zip(maps, ids, patches, strict=True):
        assert torch.equal(got, sample_patches(x, patch_ids=i, backend=backend)[0])
    patches, returned = sample_patches(tuple(maps), 3, backend=backend)
    assert [tuple(x.shape) for x in patches] == [(2, 3, 5), (2, 3, 8)]
    assert [tuple(x.shape) for x in returned] == [(3,), (3,)]


def test_maps_of_several_dtypes(backend, make, generator):
    """Under autocast the pixels are float32 and the features of convolutions bfloat16."""
    maps = [
        make(1, 3, 4, 4),
        make(1, 5, 4, 4).detach().bfloat16().requires_grad_(),
        make(1, 2, 4, 4),
    ]
    ids = [torch.tensor([3, 1]), torch.tensor([2]), torch.tensor([15])]
    for normalize in (False, True):
        patches, _ = sample_patches(maps, patch_ids=ids, normalize=normalize, backend=backend)
        for x, i, got in zip(maps, ids, patches, strict=True):
            alone, _ = sample_patches(x, patch_ids=i, normalize=normalize, backend=backend)
            assert got.dtype == x.dtype and torch.equal(got, alone)
        for x, grad in zip(
            maps, torch.autograd.grad([p.float().sum() for p in patches], maps), strict=True
        ):
            assert grad.dtype == x.dtype


def test_an_unused_map_gets_the_gradient_zero_or_none(backend, make):
    maps = [make(1, 3, 4, 4), make(1, 5, 4, 4)]
    patches, _ = sample_patches(maps, 4, backend=backend)
    patches[0].sum().backward()
    assert maps[0].grad.sum() == 12
    assert maps[1].grad is None or maps[1].grad.eq(0).all()


def test_draws_distinct_positions_the_same_for_all_images(backend, make):
    x = torch.arange(30.0).reshape(1, 1, 5, 6).repeat(3, 2, 1, 1)
    patches, ids = sample_patches(x, 20, backend=backend)
    assert ids.dtype == torch.int64 and ids.shape == (20,)
    assert len(ids.unique()) == 20 and ids.min() >= 0 and ids.max() < 30
    assert torch.equal(patches, ids.float()[None, :, None].expand(3, 20, 2))


@pytest.mark.parametrize("count", [29, 30, 31, 10**6])
def test_never_more_patches_than_positions(count, backend, make):
    _, ids = sample_patches(make(1, 2, 5, 6), count, backend=backend)
    assert len(ids) == min(count, 30)
    assert len(ids.unique()) == len(ids)


def test_positions_are_uniform(backend):
    """Chi-square of how often each of 20 positions is drawn, and of which comes first, over 2,000 fixed draws of 5."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(1, 1, 4, 5)
    draws = torch.stack(
        [sample_patches(x, 5, generator=generator, backend=backend)[1] for _ in range(2000)]
    )
    for seen, expected in ((draws.flatten(), 500), (draws[:, 0], 100)):
        counts = torch.bincount(seen, minlength=20).double()
        # 19 degrees of freedom: above 43.8 with probability 0.001 (drawing without replacement only lowers it).
        assert ((counts - expected).square() / expected).sum() < 43.8
    pairs = torch.bincount((draws[:, 0] * 20 + draws[:, 1]), minlength=400).reshape(20, 20)
    assert pairs.diagonal().eq(0).all()
    chi_square = ((pairs - 2000 / 380).square() / (2000 / 380)).sum() - 20 * 2000 / 380
    assert chi_square < 470  # 379 degrees of freedom, probability 0.001


def test_few_of_many_positions_are_uniform_too(backend):
    """As above, for 3 of 48 positions, which are drawn in another way."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(1, 1, 6, 8)
    draws = torch.stack(
        [sample_patches(x, 3, generator=generator, backend=backend)[1] for _ in range(4800)]
    )
    assert draws.dtype == torch.int64 and draws.sort().values.diff().min() > 0
    for seen, expected in ((draws.flatten(), 300), *((draws[:, i], 100) for i in range(3))):
        counts = torch.bincount(seen, minlength=48).double()
        # 47 degrees of freedom: above 82.7 with probability 0.001.
        assert ((counts - expected).square() / expected).sum() < 82.7
    # The order carries no information: each of the 6 orders of the three is as frequent.
    orders = torch.bincount(draws.argsort() @ torch.tensor([9, 3, 1]), minlength=27)
    orders = orders[orders > 0].double()
    assert len(orders) == 6
    assert ((orders - 800).square() / 800).sum() < 20.6  # 5 degrees of freedom, probability 0.001


@pytest.mark.parametrize(("count", "size"), [(256, 256), (1, 4), (512, 91)])
def test_few_of_many_positions_are_distinct_and_repeatable(count, size, backend):
    x = torch.zeros(1, 1, size, size)
    ids = [
        sample_patches(x, count, generator=torch.Generator().manual_seed(s), backend=backend)[1]
        for s in (0, 0, 1)
    ]
    assert len(ids[0].unique()) == len(ids[0]) == count
    assert ids[0].min() >= 0 and ids[0].max() < size * size
    assert torch.equal(ids[0], ids[1])
    assert ids[0].dtype == torch.int64 and ids[0].untyped_storage().resizable()  # PyTorch's own
    assert count == 1 or not torch.equal(ids[0], ids[2])


def test_a_generator_makes_the_draw_repeatable(backend, make):
    maps = [make(1, 3, 16, 16), make(1, 5, 8, 8)]

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample_patches(maps, 32, generator=generator, backend=backend)

    (patches, ids), (again, same) = draw(1), draw(1)
    assert all(torch.equal(x, y) for x, y in zip(patches + ids, again + same, strict=True))
    assert not torch.equal(ids[0], draw(2)[1][0])
    state = torch.get_rng_state()
    draw(1)
    assert torch.equal(torch.get_rng_state(), state)  # the default generator is not touched


def test_the_default_generator_is_the_global_one(backend, make):
    x = make(1, 3, 16, 16)
    torch.manual_seed(4)
    _, first = sample_patches(x, 32, backend=backend)
    _, second = sample_patches(x, 32, backend=backend)
    torch.manual_seed(4)
    assert torch.equal(first, sample_patches(x, 32, backend=backend)[1])
    assert not torch.equal(first, second)


def test_the_draw_does_not_depend_on_the_backend(backend, make):
    x = make(1, 3, 16, 16)
    ids = [
        sample_patches(x, 32, generator=torch.Generator().manual_seed(1), backend=name)[1]
        for name in (backend, "torch")
    ]
    assert torch.equal(*ids)


@pytest.mark.parametrize("normalize", [False, True])
def test_map_may_change_in_place_before_the_backward(normalize, backend, make, generator):
    """CUT taps the map before an in-place ReLU."""
    leaf = make(2, 5, 4, 4)
    ids = torch.tensor([3, 0, 15])
    expected, _ = sample_patches(leaf, patch_ids=ids, normalize=normalize, backend="torch")
    upstream = torch.randn(expected.shape, generator=generator)
    (grad,) = torch.autograd.grad(expected, leaf, upstream)
    feature = leaf * 1.0
    patches, _ = sample_patches(feature, patch_ids=ids, normalize=normalize, backend=backend)
    kept = patches.detach().clone()
    feature.relu_()
    assert torch.equal(patches, kept)
    torch.testing.assert_close(torch.autograd.grad(patches, leaf, upstream)[0], grad)


def test_patches_do_not_share_memory_with_the_map(backend, make):
    x = make(1, 3, 2, 2).detach()
    patches, _ = sample_patches(x, patch_ids=torch.arange(4), backend=backend)
    before = x.clone()
    patches.zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_keeps_channels_last(normalize, backend, make):
    x = make(2, 8, 4, 4).detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    patches, _ = sample_patches(x, 5, normalize=normalize, backend=backend)
    patches.square().sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.abs().sum() > 0 or normalize


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_tiny_and_huge_patches_normalised(dtype, backend, make, needs_support):
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
    tangent = torch.tensor(
        [-0.25, 0.75, 1.75, -2.25], dtype=torch.float64
    )  # upstream less its mean
    norms = 2 * x.detach().double()[0, 0].flatten()
    if dtype != torch.float16:  # the gradient of a row of norm 4e-7 is beyond fp16
        torch.testing.assert_close(
            grad[1:] * norms[1:, None], tangent.expand(3, 4), rtol=0.02, atol=0
        )


@pytest.mark.parametrize("normalize", [False, True])
def test_a_bad_position_stays_where_it_is(normalize, backend, make):
    x = make(2, 5, 4, 4).detach()
    ids = torch.arange(16)
    clean, _ = sample_patches(x, patch_ids=ids, normalize=normalize, backend=backend)
    x[1, 2, 1, 1] = torch.nan
    got, _ = sample_patches(x, patch_ids=ids, normalize=normalize, backend=backend)
    bad = torch.zeros(2, 16, dtype=torch.bool)
    bad[1, 5] = True
    assert torch.equal(got[~bad], clean[~bad])
    assert got[bad].isnan().all() if normalize else got[bad].isnan().sum() == 1


def test_map_further_apart_than_int32_reaches(backend, needs_support):
    needs_support(OP, backend, torch.bfloat16)
    far = torch.empty(
        3 * 2**30 + 64, dtype=torch.bfloat16
    )  # addresses only; a few pages are touched
    for strides in ((2**30, 16, 4, 1), (48, 16, 2**30, 1), (64, 2**30, 4, 1), (64, 16, 4, 2**29)):
        view = far.as_strided((1, 3, 3, 4), strides)
        values = torch.arange(36.0).reshape(1, 3, 3, 4).bfloat16()
        view.copy_(values)
        ids = torch.tensor([11, 0, 6])
        got, _ = sample_patches(view, patch_ids=ids, backend=backend)
        assert torch.equal(got, values.flatten(2)[:, :, ids].mT)


SHAPES = [
    (1, 1, 1, 1),
    (1, 3, 262, 262),
    (2, 64, 16, 16),
    (1, 1000, 3, 5),
    (5, 17, 1, 63),
    (1, 256, 64, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_shapes(shape, normalize, memory_format, backend):
    assert_close_to_truth(OP, backend, shaped(shape, normalize, memory_format), torch.float32)


@functools.cache
def shaped(shape, normalize, memory_format):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator).contiguous(memory_format=memory_format)
    ids = torch.randperm(shape[2] * shape[3], generator=generator)[:256]
    arguments = {"features": x.requires_grad_(), "patch_ids": ids, "normalize": normalize}
    return Sample(str(shape), arguments)


@pytest.mark.parametrize("normalize", [False, True])
def test_many_repeats_of_one_position_in_deterministic_mode(normalize, backend, make):
    sample = Sample(
        "repeats",
        {
            "features": make(2, 33, 8, 8),
            "patch_ids": torch.arange(700) % 3,
            "normalize": normalize,
        },
    )
    assert_close_to_truth(OP, backend, sample, torch.float32)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(OP, sample, backend=backend) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


@hypothesis.given(data=st.data(), dims=st.tuples(*[st.integers(1, 9)] * 4), normalize=st.booleans())
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_any_call(backend, data, dims, normalize):
    ids = data.draw(st.lists(st.integers(0, dims[2] * dims[3] - 1), min_size=1, max_size=20))
    order = data.draw(st.permutations(range(4)))
    x = torch.randn(dims, generator=torch.Generator().manual_seed(sum(dims)))
    x = x.permute(order).contiguous().permute([order.index(i) for i in range(4)])
    arguments = {"features": x.requires_grad_(), "patch_ids": torch.tensor(ids)}
    arguments["normalize"] = normalize
    assert_close_to_truth(OP, backend, Sample(str(dims), arguments), torch.float32)


@pytest.mark.parametrize("bad", [-1, 12, 2**62])
def test_ids_outside_the_map(bad, backend, make):
    with pytest.raises(IndexError, match=rf"patch_ids must lie in \[0, 12\).* got {bad}"):
        sample_patches(make(1, 2, 3, 4), patch_ids=torch.tensor([0, bad]), backend=backend)


def test_chains_with_patch_nce(backend, make):
    """Sampling, then the loss: one gradient through both, as CUT uses them."""
    source, target = make(2, 16, 8, 8), make(2, 16, 8, 8)
    results = []
    for name in (backend, "torch"):
        keys, ids = sample_patches(
            source.detach(), 20, generator=torch.Generator().manual_seed(0), backend=name
        )
        queries, _ = sample_patches(target, patch_ids=ids, backend=name)
        loss = fastnce.patch_nce(queries, keys, backend=name)
        results.append((loss.detach(), torch.autograd.grad(loss, target)[0]))
    torch.testing.assert_close(*results)


def test_compiles_where_nothing_needs_a_gradient(backend, make):
    """A single map: in its count of arguments torch.compile once lost the context."""
    torch._dynamo.reset()
    x, ids = make(2, 5, 4, 3).detach(), torch.tensor([3, 0])
    compiled = torch.compile(
        lambda x: sample_patches(x, patch_ids=ids, backend=backend)[0],
        backend="eager",
        fullgraph=True,
    )
    assert torch.equal(compiled(x), sample_patches(x, patch_ids=ids, backend=backend)[0])
