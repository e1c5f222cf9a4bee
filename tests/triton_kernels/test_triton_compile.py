"""The kernels compiled for real targets; needs Triton, but no GPU.

Checked are what ptxas reports (registers spilled to memory), the shared memory of a program, that there are no atomics, and that
products use the target's matrix instruction. ``make triton-sweep`` does the same for all depths, dtypes and targets.
"""

import dataclasses
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has no compiler", allow_module_level=True)

import calls
import sweep
from resources import Memory, Resources, all_resources, resources

from benchmarks.launches import Launch, as_on, compiled, recorded
from fastnce import triton_kernels
from fastnce.triton_kernels import config

DEPTHS = (256, 768)


def faults(jobs: list[tuple[Launch, int]]) -> list[str]:
    found = all_resources(jobs, Memory()).values()
    return [fault for x in found for fault in ([x] if isinstance(x, str) else x.faults())]


TILE = ("HEAD", "TAIL", "BLOCK_M", "BLOCK_N")
KERNELS = (
    "add_parts fold gather losses normalisation own_gradients own_sums pack panel row_gradients row_products scatter similarity sums "
    "sup_con two_c"
)
EVERY_KERNEL = {f"_{name}_kernel" for name in KERNELS.split()}


def one_of_each(jobs: list[tuple[Launch, int]], *constants: str) -> list[tuple[Launch, int]]:
    """The first form of every kernel with each value of the constants; the sweep compiles all forms."""
    found = {}
    for job in jobs:
        found.setdefault((job[0].name, *(job[0].constant(name) for name in constants)), job)
    return list(found.values())


@pytest.mark.parametrize(
    ("capability", "sizes", "constants"),
    [(80, (True,), TILE), (90, (True, False), (*TILE, "KIND")), (100, (True,), TILE)],
)
def test_kernels_compile_without_spills(capability, sizes, constants):
    jobs = one_of_each(sweep.jobs(capability, ["bf16"], DEPTHS, sizes), *constants)
    kernels = {job[0].name for job in jobs}
    assert kernels == EVERY_KERNEL, kernels ^ EVERY_KERNEL
    wrong = faults(jobs)
    assert not wrong, "\n".join(wrong)


def test_products_compile_without_tensor_cores():
    jobs = one_of_each(sweep.jobs(90, ["fp32"], (64,), (True,)), *TILE)
    wrong = faults([job for job in jobs if job[0].constant("PRECISION")])
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "precision", "rows"),
    [("fp32", "ieee", "*fp32"), ("tf32", "tf32", "*fp32"), ("fp32 as bf16", "tf32", "*bf16")],
)
def test_the_precision_that_torch_is_set_to_reaches_the_products(name, precision, rows):
    sums = [each for each, _ in sweep.jobs(90, [name], (64,)) if each.name == "_sums_kernel"]
    assert {each.constant("PRECISION") for each in sums} == {precision}
    assert {dict(each.signature)["x"] for each in sums} == {rows}


GOOD = Resources(
    kernel="_sums_kernel",
    target=90,
    dtype="bf16",
    tile={"HEAD": 64, "PRECISION": "ieee"},
    warps=8,
    stages=2,
    registers=200,
    spills=0,
    shared=1024,
    instructions=("wgmma.mma_async",),
    atomics=False,
)
BLACKWELL = {"target": 100, "instructions": ("tcgen05.mma",)}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"kernel": "_scatter_kernel", "tile": {}, "spills": 8}, None),
        ({**BLACKWELL, "spills": 20, "registers": 128}, None),
        ({"spills": 4, "registers": 128}, "spills: "),
        ({**BLACKWELL, "spills": 4}, "spills: "),
        ({**BLACKWELL, "spills": 24, "registers": 128}, "spills: "),
        ({"shared": 228 * 1024}, "too much shared memory: "),
        ({"atomics": True}, "atomics: "),
        ({"instructions": ()}, "no wgmma.mma_async: "),
        ({"target": 100}, "no tcgen05.mma: "),
    ],
)
def test_what_is_a_fault(changes, fault):
    found = dataclasses.replace(GOOD, **changes).faults()
    assert [line.startswith(fault) for line in found] == [True] if fault else found == []


def test_a_sweep_goes_on_where_it_was(tmp_path):
    """A result is remembered on disk; another launch or target is another result."""
    (job, other) = sweep.jobs(90, ["bf16"], (64,), (True,))[:2]
    path = tmp_path / "memory.jsonl"
    Memory(path).put(job, GOOD)
    assert Memory(path).get(job) == GOOD
    for missing in (other, (job[0], 80)):
        assert Memory(path).get(missing) is None
    assert all_resources([job], Memory(path)) == {job: GOOD}, "not compiled again"
    assert all_resources([job, other], Memory(path), deadline=0.0).keys() == {job}


def test_the_sweep_s_table():
    table = sweep.rows([GOOD, dataclasses.replace(GOOD, spills=4, registers=255)])
    assert [(row["registers"], row["spills"], row["forms"]) for row in table] == [(255, 4, 2)]
    text = sweep.markdown(table, ["_x for sm_90: broken"], 0)
    assert "255, 4, 1 (2)" in text and "2 launches compiled; 0 left out." in text
    assert "Wrong: _x for sm_90: broken" in text


def test_the_report_sees_spills(monkeypatch):
    """A tile that cannot fit in registers."""
    tile = config.Tile(128, 128, 4, 2)
    monkeypatch.setattr(config, "tiles", lambda *arguments, **options: (tile, tile))
    found = calls.launches(256, torch.bfloat16)
    worst = next(x for x in found if x.name == "_row_products_kernel" and x.constant("HEAD") == 256)
    assert any(fault.startswith("spills: ") for fault in resources(worst, 90).faults())


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def info_nce(count: int, depth: int, temperature=0.07, columns: int | None = None, **options):
    needs = (True, True, columns is not None, isinstance(temperature, torch.Tensor))
    triton_kernels.info_nce_forward(
        rows(1, count, depth),
        rows(1, count, depth),
        None if columns is None else rows(columns, depth),
        temperature,
        **{**calls.IN_BATCH, **options},
        grad_scale=1.0,
        needs=needs,
    )


def test_a_temperature_compiles_nothing_anew():
    """Neither another float nor another number of rows; the tensor's value is not even looked at."""
    with recorded() as found:
        for temperature in (0.05, 0.07, 0.1, 1.0):
            info_nce(16384, 64, temperature)
    assert len(set(found)) == len(found) / 4
    with recorded() as found:
        for count in (16384, 16385, 20000, 123456):
            info_nce(count, 64)
    kernels = [each.name for each in set(found)]
    assert len(kernels) == len(set(kernels)) + 1  # sums and products of one kernel


def test_a_temperature_tensor_stays_where_it_is():
    """A tensor without memory has no value: .item() would raise."""
    with recorded() as found:
        info_nce(1000, 64, rows(dtype=torch.float32), symmetric=True)
    assert any(each.constant("TENSOR") for each in found)


def test_depths_are_padded_by_less_than_64():
    for depth in range(1, 4097):
        padded = config.padded_depth(depth)
        assert depth <= padded < depth + 64
        if depth <= config.RESIDENT_DEPTH:
            assert sum(config.split_depth(depth)) == padded
        for dtype, rich, least in (
            (torch.bfloat16, False, config.RESIDENT_DEPTH),
            (torch.float32, False, config.RESIDENT_DEPTH),
            (torch.float32, True, config.RESIDENT_DEPTH_IEEE),
        ):
            for kind in ("sums", "panel") if depth > least else ():
                for size in (100, 228):
                    for tile in config.tiles(kind, rich, dtype, padded, size * 1024):
                        assert padded % tile.d == 0  # chunks need no mask


def test_addresses_are_64_bit():
    """Rows times depth may exceed 2^31. Packing addresses every element in 64 bits; a pass, the first row of each tile."""
    with as_on(90), recorded() as found:
        info_nce(8_400_000, 256, columns=64)
        info_nce(8_400_000, 512, columns=64, in_batch=False)
    for name, what in (
        ("_pack_kernel", "x!tt.ptr<bf16>"),
        ("_sums_kernel", " !tt.ptr<bf16>"),
        ("_row_products_kernel", " !tt.ptr<bf16>"),
        ("_panel_kernel", " !tt.ptr<bf16>"),
    ):
        text = compiled(next(x for x in found if x.name == name), 90).ttgir
        lines = [x for x in text.splitlines() if "tt.addptr" in x and what in x]
        assert lines, name
        for line in lines:
            offset = line.partition(what)[2].partition(" loc")[0]
            assert "i64" in offset and "i32" not in offset, line
