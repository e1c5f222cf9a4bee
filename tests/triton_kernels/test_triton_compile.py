"""The kernels compiled for real targets; needs Triton, but no GPU.

Checked are the stack (registers that ptxas spills to memory), the shared memory of a program, that there are no atomics, and that
products use the target's matrix instruction. ``make triton-sweep`` does the same for all depths, dtypes and targets.
"""

import dataclasses
import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has no compiler", allow_module_level=True)

import calls
import sweep
from launches import SHARED_MEMORY, Launch, as_on, compiled, recorded
from resources import Memory, Resources, all_resources, resources

from fastnce import triton_kernels
from fastnce.triton_kernels import config
from fastnce.triton_kernels.tiles import GIVEN, MASKED


def faults(jobs: list[tuple[Launch, int]]) -> list[str]:
    found = all_resources(jobs, Memory()).values()
    return [fault for x in found for fault in ([x] if isinstance(x, str) else x.faults())]


TILE = ("HEAD", "TAIL", "BLOCK_M", "BLOCK_N")
KERNELS = (
    "add_parts fold gather losses normalisation own_gradients own_sums pack panel positive_logits row_gradients row_products scatter "
    "similarity sums sup_con two_c"
)
EVERY_KERNEL = {f"_{name}_kernel" for name in KERNELS.split()}


def one_of_each(jobs: list[tuple[Launch, int]], *constants: str) -> list[tuple[Launch, int]]:
    """The first form of every kernel with each value of the constants; the sweep compiles all forms."""
    found = {}
    for job in jobs:
        found.setdefault((job[0].name, *(job[0].constant(name) for name in constants)), job)
    return list(found.values())


@pytest.mark.parametrize(
    ("capability", "constants"),
    [
        (80, TILE),
        (89, TILE),
        (90, (*TILE, "KIND")),
        (100, TILE),
    ],
)
def test_kernels_compile_without_spills(capability, constants):
    jobs = one_of_each(sweep.jobs(capability, ["bf16"], (256, 768)), *constants)
    kernels = {job[0].name for job in jobs}
    assert kernels == EVERY_KERNEL, kernels ^ EVERY_KERNEL
    wrong = faults(jobs)
    assert not wrong, "\n".join(wrong)


def test_products_compile_without_tensor_cores():
    jobs = one_of_each(sweep.jobs(90, ["fp32"], (64,)), *TILE)
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


@pytest.mark.parametrize(
    ("capability", "name", "depth"),
    [
        (80, "bf16", 96),
        (89, "fp16", 128),
        (89, "bf16", 192),
        (80, "bf16", 256),
        (80, "tf32", 128),
    ],
)
def test_warps_have_rows_of_their_own_and_the_next_columns_are_on_their_way(
    capability, name, depth
):
    """Else each warp reads all rows of the tile, and each of the similarities is made twice (mma.sync)."""
    passes = [
        job
        for job in sweep.jobs(capability, [name], (depth,))
        if job[0].name in ("_sums_kernel", "_row_products_kernel")
        # Given coefficients have no similarities, but where the temperature has a gradient.
        # Where pairs are left out tiles have too few rows for it.
        and job[0].constant("KIND") != GIVEN.value
        and job[0].constant("KIND") < MASKED.value
        and dict(job[0].signature)["raw"] != "constexpr"
    ]
    for launch, target in one_of_each(passes, "KIND", "OFFSET"):
        result = compiled(launch, target)
        split = re.findall(r"nvidia_mma<.*?warpsPerCTA = \[(\d+), (\d+)\]", result.ttgir)
        assert split and all(columns == "1" for _, columns in split), (launch, split)
        # A local_alloc of (buffers, columns of y, depth) for each array that is copied ahead.
        buffers = re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x", result.ttgir)
        assert buffers and all(int(number) >= 2 for number in buffers), (launch, buffers)
        assert result.spills == 0 and result.shared <= SHARED_MEMORY[target], launch


GOOD = Resources(
    kernel="_sums_kernel",
    target=90,
    dtype="bf16",
    tile={"HEAD": 64, "PRECISION": "tf32"},
    warps=8,
    stages=2,
    registers=200,
    spills=0,
    shared=1024,
    instructions=("wgmma.mma_async",),
    atomics=False,
)
AMPERE = {"target": 89, "instructions": ("mma.sync",)}
IEEE = {"dtype": "fp32", "tile": {"HEAD": 64, "PRECISION": "ieee"}, "instructions": ()}
BLACKWELL = {"target": 100, "instructions": ("tcgen05.mma",)}
# Listed, up to 24 bytes.
FULL = {
    "kernel": "_row_products_kernel",
    "tile": {"HEAD": 128, "TAIL": 128, "PRECISION": "tf32"},
    "registers": 255,
}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"kernel": "_own_sums_kernel", "tile": {}, "spills": 16}, None),
        ({"kernel": "_scatter_kernel", "tile": {}, "spills": 8}, "spills: "),
        ({**BLACKWELL, "spills": 16, "registers": 128}, None),
        ({**FULL, "spills": 24}, None),
        ({**FULL, "spills": 28}, "spills: "),
        ({**FULL, "spills": 8, **AMPERE}, "spills: "),
        ({**FULL, "spills": 8, "tile": GOOD.tile}, "spills: "),
        ({**IEEE, "spills": 16, "registers": 80}, None),
        ({**IEEE, "spills": 16, "registers": 129}, "spills: "),
        ({"spills": 4, "registers": 128}, "spills: "),
        ({**BLACKWELL, "spills": 4}, "spills: "),
        ({**BLACKWELL, "spills": 20, "registers": 128}, "spills: "),
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
    (job, other) = sweep.jobs(90, ["bf16"], (64,))[:2]
    path = tmp_path / "memory.jsonl"
    Memory(path).put(job, GOOD)
    assert Memory(path).get(job) == GOOD
    for missing in (other, (job[0], 80)):
        assert Memory(path).get(missing) is None
    assert all_resources([job], Memory(path)) == {job: GOOD}, "not compiled again"
    assert all_resources([job, other], Memory(path), deadline=0.0).keys() == {job}


def test_the_sweep_s_table(tmp_path, monkeypatch):
    """What another version of Triton has left in the files stays there; what was not compiled is named."""
    listed = dataclasses.replace(GOOD, **FULL, spills=24)
    assert sweep.swept([GOOD, listed], [], [])["listed"] == [f"{listed}: {listed.listed()}"]
    table = sweep.swept([GOOD, dataclasses.replace(GOOD, spills=4, registers=255)], [], [])
    assert [(row["registers"], row["spills"], row["forms"]) for row in table["rows"]] == [
        (255, 4, 2)
    ]
    sweep.written(tmp_path, table)
    monkeypatch.setattr(sweep.triton, "__version__", "0.1")
    left_out = sweep.jobs(90, ["bf16"], (128,))[:1]
    for _ in "twice":
        sweep.written(tmp_path, sweep.swept([GOOD], ["_x for sm_90: broken"], left_out))
    text = (tmp_path / "triton-resources.md").read_text()
    old, new = text.split("## Triton ")[1:]
    assert "200, 0, 1 (1)" in old and "Wrong: _x for sm_90: broken" in old
    assert "1 launches compiled; 1 left out." in old
    assert "Left out on sm_90: gather 1." in old
    assert "255, 4, 1 (2)" in new and "2 launches compiled; 0 left out." in new


def test_a_sweep_that_is_stopped_has_seen_every_kernel():
    """Of each kernel, dtype and target one goes first."""
    jobs = [job for target in (80, 90) for job in sweep.jobs(target, ["bf16", "fp16"], (256,))]
    ordered = sweep.widest_first(jobs)
    kinds = {(job[0].name, sweep.operand(job[0]), job[1]) for job in jobs}
    first = {(job[0].name, sweep.operand(job[0]), job[1]) for job in ordered[: len(kinds) + 8]}
    assert set(ordered) == set(jobs) and first == kinds


def test_the_report_sees_spills(monkeypatch):
    """A tile that cannot fit in registers."""
    tile = config.Tile(128, 128, 4, 2)
    monkeypatch.setattr(config, "tile", lambda *arguments: tile)
    found = calls.launches(256, torch.bfloat16)
    worst = next(x for x in found if x.name == "_row_products_kernel")
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
        for operands, resident in config.RESIDENT_DEPTHS.items():
            for kind in ("sums", "panel") if depth > resident else ():
                for size in (100, 228):
                    tile = config.tile(kind, False, operands, padded, size * 1024, False)
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
