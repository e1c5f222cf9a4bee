"""The launches of a call on tensors without memory: how many, with what grids, and what they leave behind."""

import gc
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("tensors without memory cannot be interpreted", allow_module_level=True)

import calls
from launches import recorded
from operators import Operators
from torch._subclasses import FakeTensorMode

from fastnce import triton_kernels
from fastnce.ops import _common
from fastnce.triton_kernels import gradients, launch

CUDA = torch.backends.cuda.matmul


@pytest.fixture
def grids(monkeypatch) -> dict[str, tuple[int, ...]]:
    """The last grid of every kernel, by name; none starts."""
    found = {}

    def note(kernel, grid, arguments, options):
        found[kernel.fn.__name__] = grid

    monkeypatch.setattr(launch, "_start", note)
    return found


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def patch_nce_of(shapes, dtype, keys=False, **options):
    layers = [rows(*shape, dtype=dtype) for shape in shapes]
    ones = (1.0,) * len(shapes)
    return triton_kernels.patch_nce_forward(
        layers,
        layers,
        0.07,
        self_logit=-10.0,
        **options,
        loss_scales=ones,
        grad_scales=ones,
        loss_layers=len(shapes),
        grad_layers=len(shapes),
        needs=((True,) * len(shapes), (keys,) * len(shapes), False),
    )


STARTED = {
    torch.bfloat16: ("pack sums losses row_gradients", "cat cat sum mul"),
    torch.float32: (
        "pack sums losses panel row_gradients",
        "cat cat full_like stack bmm reciprocal nan_to_num_ sum mul",
    ),
}


@pytest.mark.parametrize("dtype", STARTED)
def test_patch_nce_of_five_layers_starts_little(dtype):
    """Keys detached, as CUT has them. Layers of other sizes are a problem of their own."""
    shapes = [(1, 256, 256)] * 5
    kernels, operators = (names.split() for names in STARTED[dtype])
    with recorded() as found, Operators() as started:
        _, (grads, _, _) = patch_nce_of(shapes, dtype)
    assert [each.name for each in found] == [f"_{name}_kernel" for name in kernels]
    assert started.names == operators
    assert [grad.shape for grad in grads] == [torch.Size(shape) for shape in shapes]
    with recorded() as found:
        patch_nce_of([*shapes, (1, 64, 256)], dtype)
    assert len(found) == 2 * len(kernels)


BOTH_SUMS = "pack sums losses row_products row_gradients"
FORMS = {
    "symmetric": f"{BOTH_SUMS} row_products row_gradients",
    "symmetric detach_keys": "pack sums losses row_gradients",
    "query_negatives": BOTH_SUMS,
    "symmetric query_negatives detach_keys": BOTH_SUMS,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_patch_nce_take_all_layers_together(form):
    options = dict.fromkeys(form.split(), True)
    with recorded() as found:
        _, grads = patch_nce_of([(2, 256, 256)] * 4, torch.bfloat16, keys=True, **options)
    assert [each.name for each in found] == [f"_{name}_kernel" for name in FORMS[form].split()]
    layers = [grad for side in grads[:2] for grad in side]
    assert all(grad.shape == (2, 256, 256) and grad.is_contiguous() for grad in layers)


@pytest.mark.parametrize(("apart", "starts"), [(False, 1), (True, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_in_one_memory_are_scaled_at_once(dtype, apart, starts):
    with FakeTensorMode():
        memory = torch.empty(5, 1, 256, 64, dtype=dtype, device="cuda")
        grads = [x.clone() if apart else x for x in memory]
        by = torch.empty((), device="cuda")
        with Operators() as started:
            found = _common.scaled((None, *grads), by)
    assert len(started.names) == starts, started.names
    assert found[0] is None
    assert [(x.shape, x.dtype) for x in found[1:]] == [(x.shape, x.dtype) for x in grads]


def test_a_call_leaves_no_tensor_behind(grids):
    """What a cache kept would lie in the memory of a CUDA graph that captured the first call, and be freed with it."""
    gc.collect()
    before = {id(x) for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}
    patch_nce_of([(2, 33, 64), (2, 256, 64), (2, 1, 64)], torch.bfloat16, keys=True)
    calls.launches(64, torch.bfloat16)
    gc.collect()
    after = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    assert all(id(x) in before for x in after)


@pytest.fixture
def newer_precision():
    before = CUDA.fp32_precision
    CUDA.fp32_precision = "tf32"
    yield
    CUDA.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_newer_way_to_set_the_precision(dtype, newer_precision):
    with recorded() as found:
        patch_nce_of([(1, 256, 64)], dtype)
    assert {each.constant("PRECISION") for each in found} - {None} == {"tf32"}


def test_16_bit_rows_do_not_ask_for_it(monkeypatch):
    monkeypatch.delattr(triton_kernels.rows, "float32_products")
    with recorded():
        patch_nce_of([(1, 256, 64)], torch.bfloat16, keys=True)


def with_a_queue(count: int, negatives: int, depth: int, needs: tuple[bool, ...]) -> torch.Tensor:
    """The gradients that are needed, of queries, which are returned, and a queue."""
    query, queue = rows(1, count, depth), rows(negatives, depth)
    options = {**calls.IN_BATCH, "in_batch": False, "grad_scale": 1.0, "needs": needs}
    triton_kernels.info_nce_forward(query, query, queue, 0.07, **options)
    return query


def test_many_parts_of_few_rows_have_many_programs(grids):
    """A queue of 65536 for 256 rows is split into 132 parts, so that the device is busy; it is when they are added as well."""
    query = with_a_queue(256, 65536, 256, needs=(True, False, False, False))
    programs = launch.multiprocessors(query.device)
    assert grids["_sums_kernel"][1] > programs // 2 > gradients._FEW_PARTS
    across, down = grids["_add_parts_kernel"]
    assert across * down >= programs


def test_a_panel_of_millions_of_columns_can_be_launched():
    """The second and third dimension of a grid end at 65535; ``recorded`` looks."""
    with recorded() as found:
        query = with_a_queue(64, 10_000_000, 512, needs=(True, True, True, False))
        triton_kernels.pairwise_cosine_similarity_forward(query[0], rows(10_000_000, 512), 0.07)
    assert {"_panel_kernel", "_similarity_kernel"} <= {each.name for each in found}
