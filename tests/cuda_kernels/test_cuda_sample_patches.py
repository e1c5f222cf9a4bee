"""The CUDA kernels of patch sampling: any strides, vectors where they are possible, repeated and scattered positions."""

import pytest
import torch
from emulated_or_gpu import DEVICE
from torch import Tensor

from fastnce import reference
from fastnce.backends import cuda
from fastnce.testing import rows

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Channels in several tiles; planes of several tiles; planes and channels that no vector divides; one of everything.
SHAPES = [(2, 40, 8, 6), (1, 33, 40, 44), (2, 3, 5, 7), (1, 300, 3, 3), (2, 16, 1, 1)]
LAYOUTS = ["planes", "channels_last", "shifted", "sliced", "columns"]


def gaussian(shape, generator, dtype=torch.float32) -> Tensor:
    return rows(*shape, dtype=dtype, device=DEVICE, generator=generator, grad=False)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides, NaN beside them where there is a place."""
    b, c, h, w = x.shape
    if layout == "planes":
        place = torch.empty_like(x)
    elif layout == "channels_last":
        place = torch.empty_like(x, memory_format=torch.channels_last)
    elif layout == "shifted":  # channels are neighbours, but no address is a multiple of 16 bytes
        place = x.new_full((b, h, w, c + 1), torch.nan)[..., 1:].permute(0, 3, 1, 2)
    elif layout == "sliced":
        place = x.new_full((b, 2 * c, h + 1, 3 * w), torch.nan)[:, ::2, 1:, ::3]
    else:
        place = x.new_full((w, c, b, h), torch.nan).permute(2, 1, 3, 0)
    return place.copy_(x)


def positions(kind: str, size: int, generator) -> Tensor:
    drawn = torch.randperm(size, generator=generator)
    if kind == "distinct":
        ids = drawn[:70]
    else:
        ids = torch.cat([drawn[:5], drawn[:2].repeat(25), drawn[2:9]])
    return ids.repeat_interleave(2).to(DEVICE)[::2]  # not contiguous


def expected_of(x: Tensor, ids: Tensor, normalize: bool, upstream: Tensor):
    leaf = x.double().requires_grad_()
    patches = reference.sample_patches(leaf, ids, normalize)
    return patches.detach(), torch.autograd.grad(patches, leaf, upstream.double())[0]


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """To the rounding of the result, of numbers near 1 before they cancel, and of 27 numbers' sum in float32."""
    eps = torch.finfo(dtype).eps
    rtol = 2 * eps + 27 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=4 * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ["distinct", "repeated"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(layout, kind, normalize, dtype, generator):
    """All maps in one call; the gradient into a new map, and added to one."""
    plain = [gaussian(shape, generator, dtype) for shape in SHAPES]
    maps = [laid_out(x, layout) for x in plain]
    ids = [positions(kind, x.shape[2] * x.shape[3], generator) for x in plain]
    patches, norms = cuda.sample_patches_forward(maps, ids, normalize)
    upstream = [gaussian(x.shape, generator, dtype) / 4 for x in patches]
    arguments = (upstream, patches if normalize else [], norms, ids)
    dense = cuda.sample_patches_backward(*arguments, maps, normalize)
    cuda.sample_patches_add_(maps, *arguments, normalize)
    for i, x in enumerate(plain):
        want_patches, want_grad = expected_of(x, ids[i], normalize, upstream[i])
        if normalize:
            assert_near(patches[i], want_patches, dtype)
            lengths = x.double().flatten(2)[:, :, ids[i]].norm(dim=1)
            torch.testing.assert_close(norms[i].double(), 1 / lengths, rtol=1e-6, atol=0)
        else:
            assert torch.equal(patches[i].double(), want_patches) and norms == []
        assert dense[i].dtype == dtype
        if layout in ("planes", "channels_last"):
            assert dense[i].stride() == maps[i].stride()
        assert_near(dense[i], want_grad, dtype)
        untouched = torch.ones(x.shape[2] * x.shape[3], dtype=torch.bool, device=DEVICE)
        untouched[ids[i]] = False
        assert dense[i].flatten(2)[:, :, untouched].eq(0).all()
        assert_near(maps[i], x.double() + want_grad, dtype)
        assert torch.equal(maps[i].flatten(2)[:, :, untouched], x.flatten(2)[:, :, untouched])


def test_gradients_that_are_expanded_or_transposed(generator):
    x = gaussian((2, 16, 6, 6), generator)
    ids = positions("repeated", 36, generator)
    patches, norms = cuda.sample_patches_forward([x], [ids], True)
    ways = [
        gaussian((1, 1, 16), generator).expand(patches[0].shape),
        gaussian((16, len(ids), 2), generator).permute(2, 1, 0),
        gaussian((2, len(ids), 17), generator)[..., 1:],
    ]
    for upstream in ways:
        found = cuda.sample_patches_backward([upstream], patches, norms, [ids], [x], True)[0]
        assert_near(found, expected_of(x, ids, True, upstream)[1], torch.float32)


def test_more_maps_than_one_launch_holds(generator):
    maps = [gaussian((1, 1 + i, 2, 3), generator) for i in range(37)]
    ids = [torch.tensor([i % 6, (i + 1) % 6], device=DEVICE) for i in range(37)]
    patches, _ = cuda.sample_patches_forward(maps, ids, False)
    dense = cuda.sample_patches_backward(patches, [], [], ids, maps, False)
    for x, at, got, grad in zip(maps, ids, patches, dense, strict=True):
        expected = x.flatten(2)[:, :, at].mT
        assert torch.equal(got, expected)
        assert torch.equal(grad.flatten(2)[:, :, at].mT, expected)
        assert grad.count_nonzero() == expected.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_zero_tiny_and_huge_patches(layout, dtype, generator):
    tiny, huge = (2e-7, 6e4) if dtype == torch.float16 else (1e-20, 1e20)
    x = torch.ones(1, 16, 2, 2, dtype=torch.float64)
    x[0, :, 0, 0], x[0, :, 0, 1], x[0, :, 1, 0] = 0, tiny, huge
    x = laid_out(x.to(DEVICE, dtype), layout)
    patches, norms = cuda.sample_patches_forward([x], [torch.arange(4, device=DEVICE)], True)
    expected = torch.full((4, 16), 0.25, dtype=torch.float64, device=DEVICE)
    expected[0] = 0
    assert_near(patches[0][0], expected, dtype)
    assert norms[0][0, 0] == 0
    torch.testing.assert_close(1 / norms[0][0, 1:].double(), 4 * x[0, 0].flatten()[1:].double())


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bad", [-1, 12, 2**62])
def test_positions_outside_the_map(bad, normalize, generator):
    """Their patches are NaN; their gradients go nowhere, whatever they are."""
    x, ids = gaussian((2, 4, 3, 4), generator), torch.tensor([7, bad, 0], device=DEVICE)
    inside = ids[::2]
    patches, norms = cuda.sample_patches_forward([x], [ids], normalize)
    assert all(x[:, 1].isnan().all() for x in [*patches, *norms])
    expected, expected_norms = cuda.sample_patches_forward([x], [inside], normalize)
    assert torch.equal(patches[0][:, ::2], expected[0])
    upstream = gaussian(patches[0].shape, generator)
    upstream[:, 1] = torch.nan
    saved = (patches, norms) if normalize else ([], [])
    saved_inside = (expected, expected_norms) if normalize else ([], [])
    wanted = [[upstream[:, ::2]], *saved_inside, [inside]]
    dense = cuda.sample_patches_backward(*wanted, [x], normalize)[0]
    assert torch.equal(
        cuda.sample_patches_backward([upstream], *saved, [ids], [x], normalize)[0], dense
    )
    onto, onto_inside = x.clone(), x.clone()
    cuda.sample_patches_add_([onto], [upstream], *saved, [ids], normalize)
    cuda.sample_patches_add_([onto_inside], *wanted, normalize)
    assert torch.equal(onto, onto_inside)
