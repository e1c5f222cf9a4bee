"""Similarities in fp8 in the Triton kernels: against the reference in the interpreter or on a GPU, and compiled without one."""

import re

import pytest
import torch

pytest.importorskip("triton")

import calls
from launches import SHARED_MEMORY, Launch, as_on, compiled
from loss_forms import check_form, each_offset

import fastnce
from fastnce import reference, triton_kernels
from fastnce.backends import triton as triton_ops
from fastnce.testing import Sample, assert_close_to_truth, rows
from fastnce.triton_kernels import config, launch
from fastnce.triton_kernels.rows import pack

FP8 = torch.float8_e4m3fn
DEVICE = "cpu" if launch.INTERPRETED else "cuda"
runs = pytest.mark.skipif(triton_ops.available() != "ok", reason=triton_ops.available())
compiles = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter has no compiler")


@pytest.fixture
def small_tiles(monkeypatch, nan_in_fresh_memory):
    """Several of everything in small problems."""
    tile = config.Tile(16, 16, 4, 2, 64)
    monkeypatch.setattr(config, "tile", lambda *arguments: tile)
    monkeypatch.setattr(config, "PANEL_ELEMENTS", (16 * 60, 16 * 60))


# Depths: shorter than a matrix instruction's, head and tail, and chunks with panels.
FORMS = ("tiles", "tail", "batched", "batched_queue", "panels", "panels_queue", "constant")


@runs
@each_offset
@pytest.mark.parametrize("name", FORMS)
def test_passes_multiply_rounded_rows(name, tau, small_tiles):
    """In float32 they give the reference's numbers up to the order of sums."""
    check_form(triton_kernels, DEVICE, name, tau, similarity_dtype=FP8)


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision_keeps_the_contract(dtype, reduction, small_tiles):
    generator = torch.Generator().manual_seed(0)
    query, key, queue = (
        rows(n, 40, dtype=dtype, device=DEVICE, generator=generator) for n in (33, 33, 50)
    )
    tau = torch.tensor(0.2, device=DEVICE, requires_grad=True)
    arguments = {"query": query, "positive_key": key, "negative_keys": queue, "temperature": tau}
    arguments |= {"similarity_dtype": FP8, "in_batch_negatives": True, "reduction": reduction}
    assert_close_to_truth("info_nce", "triton", Sample(f"fp8 {reduction}", arguments), dtype)


@runs
def test_packed_codes_are_the_reference_s():
    """Bit for bit, in every dtype, for rows of any size."""
    x = torch.randn(300, 90, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x[0] = 0
    x[1:100] *= torch.logspace(-30, 30, 99, device=DEVICE)[:, None]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = x.clamp(-1e4, 1e4).to(dtype)
        packed = pack(values, True, True)
        largest = values.float().abs().amax(1, keepdim=True)
        power = -torch.frexp(largest).exponent
        scaled, top = (torch.ldexp(v.float(), power) for v in (values, largest))
        codes = (scaled * 448 / top.masked_fill(largest == 0, 1)).to(FP8)
        assert torch.equal(packed.rounded.x[:, :90].float(), codes.float())
        assert not packed.rounded.x[:, 90:].float().any()
        unit = reference.normalize.rounded_unit_rows(values.float())
        got = packed.rounded.x[:, :90].float() * packed.rounded.scale[:, None]
        torch.testing.assert_close(got, unit, rtol=1e-6, atol=1e-12)


@runs
def test_a_compiled_step_has_it_too():
    query, key = torch.randn(2, 70, 20, device=DEVICE, requires_grad=True).unbind()

    def step() -> list[torch.Tensor]:
        loss = fastnce.info_nce(query, key, similarity_dtype=FP8, backend="triton")
        return [loss, *torch.autograd.grad(loss, (query, key))]

    plain = fastnce.info_nce(query, key, backend="triton")
    found, compiled_ones = step(), torch.compile(step, backend="aot_eager")()
    assert found[0] != plain
    assert all(torch.equal(a, b) for a, b in zip(found, compiled_ones, strict=True))


INSTRUCTION = {
    89: r"mma\.sync\S*\.e4m3\.e4m3",
    90: r"wgmma\.mma_async\S*\.e4m3\.e4m3",
    100: r"tcgen05\.mma\S*kind::f8f6f4",
}


def passes(depth: int) -> list[Launch]:
    """Every launch of a pass that multiplies rows in fp8, alone, with a product or for a panel; and the packing."""
    return [
        each
        for each in calls.fp8_launches(depth, torch.bfloat16)
        if each.name == "_pack_kernel" or dict(each.signature).get("x") == "*fp8e4nv"
    ]


@compiles
@pytest.mark.parametrize(("capability", "depth"), [(89, 256), (90, 256), (90, 768), (100, 768)])
def test_compiles_to_the_fp8_instruction(capability, depth):
    """``make triton-sweep`` has all depths and forms for 9.0 and 10.0."""
    with as_on(capability):
        found = passes(depth)
    if capability != 90:
        found = list({each.name: each for each in found}.values())
    for each in found:
        result = compiled(each, capability)
        assert result.spills == 0, each
        assert result.shared <= SHARED_MEMORY[capability], each
        if each.name != "_pack_kernel":
            assert re.search(INSTRUCTION[capability], result.ptx), each
    passing = "_row_products_kernel" if depth <= config.RESIDENT_DEPTH else "_panel_kernel"
    assert {each.name for each in found} == {"_pack_kernel", "_sums_kernel", passing}


def test_depths_have_room_for_the_instruction():
    for depth in range(1, 1025):
        padded = config.padded_depth(depth, fp8=True)
        assert depth <= padded < depth + 64
        if depth <= config.RESIDENT_DEPTH:
            head, tail = config.split_depth(padded)  # as Rows.split has it, of what is packed
            assert head + tail == padded and head >= 32 and (tail == 0 or tail >= 32)
