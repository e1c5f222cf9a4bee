"""PatchNCE's CUDA kernels: every shape of block, layers of several depths, awkward rows, and what is asked for."""

import pytest
import torch
from emulated_or_gpu import DEVICE
from loss_forms import check_the_constant_of_patch_nce
from torch import Tensor

from fastnce import reference
from fastnce.backends import cuda
from fastnce.testing import Sample, assert_close_to_truth, rows

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Each depth of the kernel's tiles; few problems, whose columns warps share, and more than there are multiprocessors where
# emulated; several tiles of columns, more than two of them, whole ones and ragged ones.
SHAPES = [(1, 40, 20), (5, 33, 64), (1, 128, 100), (4, 40, 128), (1, 260, 256), (4, 70, 250)]


def gaussian(shape, generator, dtype=torch.float32) -> Tensor:
    return rows(*shape, dtype=dtype, device=DEVICE, generator=generator, grad=False)


def pair(shape, generator, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    query = gaussian(shape, generator, dtype)
    return query, query + gaussian(shape, generator, dtype)


def check(pairs, dtype, tau=0.07) -> None:
    queries, keys = ([x.requires_grad_() for x in side] for side in zip(*pairs, strict=True))
    temperature = torch.tensor(tau, device=DEVICE, requires_grad=True)
    arguments = {"query_features": queries, "key_features": keys, "temperature": temperature}
    assert_close_to_truth("patch_nce", "cuda", Sample("layers", arguments), dtype)


def call(pairs, tau=0.07, *, scale=1.0, queries=True, keys=True, temperature=True) -> list:
    """Loss, the gradients of the first layer's queries and keys, and the temperature's."""
    count = len(pairs)
    needs = [queries] * count, [keys] * count, temperature
    loss, (grad_queries, grad_keys, grad_temperature) = cuda.patch_nce_forward(
        [query for query, _ in pairs],
        [key for _, key in pairs],
        tau,
        self_logit=-10.0,
        loss_scales=[scale] * count,
        grad_scales=[scale] * count,
        needs=needs,
    )
    return [loss, grad_queries[0], grad_keys[0], grad_temperature]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype, generator):
    check([pair(shape, generator, dtype)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_of_every_depth_and_more_than_one_launch_holds(dtype, generator):
    """Deeper than the kernel takes, and 16 more layers."""
    shapes = [(2, 9, 24), (1, 12, 300), (3, 1, 7), (2, 20, 70)] + [(1, 3, 8)] * 14
    check([pair(shape, generator, dtype) for shape in shapes], dtype, tau=0.5)


@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpus_with_less_shared_memory(capability, dtype, generator, monkeypatch):
    if DEVICE != "cpu":
        pytest.skip("emulated alone")
    monkeypatch.setenv("FASTNCE_EMULATED_CAPABILITY", str(capability))
    check([pair((1, 40, 140), generator, dtype)], dtype)


AWKWARD = ["identical", "opposite", "zero", "sizes"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("tau", [0.005, 0.07, 10.0])
def test_awkward_rows(kind, dtype, tau, generator):
    query, key = pair((1, 20, 12), generator, dtype)
    if kind == "identical":
        query, key = query[:, :1].repeat(1, 20, 1), query[:, :1].repeat(1, 20, 1)
    elif kind == "opposite":
        key = -query
    elif kind == "zero":
        query[0, 3], key[0, 3], key[0, 7] = 0, 0, 0
    else:
        tiny, huge = (0.1, 10) if dtype == torch.float16 else (1e-20, 1e20)
        query[:, ::3] *= tiny
        query[:, 1::3] *= huge
        key[:, ::2] *= tiny
        key[:, 1::2] *= huge
    check([(query, key)], dtype, tau)


def embedded(x: Tensor, way: str) -> Tensor:
    """The same values with other strides, NaN beside them."""
    if way == "sliced":
        place = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan)[..., 1::2]
        place = place[..., : x.shape[-1]]
    elif way == "padded":  # still in vectors of 16 bytes
        place = x.new_full((x.shape[0] + 1, x.shape[1] + 3, x.shape[2] + 8), torch.nan)
        place = place[1:, 2:-1, 8:]
    else:
        place = x.new_full(tuple(reversed(x.shape)), torch.nan).permute(2, 1, 0)
    return place.copy_(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["sliced", "padded", "transposed"])
def test_strides(way, dtype, generator):
    """Bitwise the numbers of contiguous rows."""
    query, key = pair((2, 19, 24), generator, dtype)
    found = call([(embedded(query, way), embedded(key, way))])
    for a, b in zip(found, call([(query, key)]), strict=True):
        assert torch.equal(a, b)
        assert b.isfinite().all()


def test_what_is_not_asked_for_is_not_given(generator):
    pairs = [pair((2, 19, 24), generator)]
    loss, *grads = call(pairs)
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (False,) * 3):
        alone, *found = call(pairs, queries=wanted[0], keys=wanted[1], temperature=wanted[2])
        assert torch.equal(alone, loss)
        for want, got, grad in zip(wanted, found, grads, strict=True):
            assert torch.equal(got, grad) if want else got is None


def test_precision_of_float32_products(generator):
    """bfloat16 factors where they are allowed, and float32's accuracy otherwise."""
    query, key = pair((1, 40, 64), generator)
    leaves = [x.double().requires_grad_() for x in (query, key)]
    options = {"normalize": True, "symmetric": False, "in_batch": True, "self_logit": -10.0}
    exact = reference.info_nce(*leaves, None, 0.1, **options).sum()
    expected = [exact.detach(), *torch.autograd.grad(exact, leaves)]
    for precision, largest, least in (("highest", 1e-5, 0.0), ("medium", 2e-2, 1e-4)):
        torch.set_float32_matmul_precision(precision)
        try:
            found = call([(query, key)], 0.1)[:3]
        finally:
            torch.set_float32_matmul_precision("highest")
        pairs = zip(found, expected, strict=True)
        off = max((a - b).abs().max() / b.abs().max() for a, b in pairs)
        assert least <= off <= largest


def test_the_constant():
    check_the_constant_of_patch_nce(cuda, DEVICE)


def test_a_bad_image_leaves_the_others(generator):
    query, key = pair((3, 9, 20), generator)
    clean = call([(query, key)])
    key[1, 4, 7] = torch.nan
    spoilt = call([(query, key)])
    assert spoilt[0].isnan() and spoilt[3].isnan()
    for got, expected in zip(spoilt[1:3], clean[1:3], strict=True):
        assert torch.equal(got[::2], expected[::2])
        assert got[1].isnan().any(-1).all()


@pytest.mark.parametrize("shape", [(1, 70, 20), (5, 33, 64)], ids=str)
def test_repeated_calls_are_bitwise_equal(shape, generator, monkeypatch):
    """In whatever order blocks and threads run."""
    pairs = [pair(shape, generator, torch.bfloat16)]
    first = call(pairs)
    for seed in ("1", "2", "3"):
        monkeypatch.setenv("FASTNCE_EMULATOR_SEED", seed)
        for a, b in zip(call(pairs), first, strict=True):
            assert torch.equal(a, b)
