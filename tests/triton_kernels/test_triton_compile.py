"""Every kernel in every configuration, compiled for real targets; needs Triton, but no GPU.

Checked are what ptxas reports (registers spilled to memory), the shared memory of a program, that there are no atomics, and that
products use the target's matrix instruction. FASTNCE_TRITON_SWEEP=1 (``make triton-sweep``) compiles all depths, dtypes and targets.
"""

import concurrent.futures
import multiprocessing
import os
import re
import warnings

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has no compiler", allow_module_level=True)

import calls

from benchmarks.launches import SHARED_MEMORY, Compiled, Launch, compiled, recorded
from fastnce import triton_kernels
from fastnce.triton_kernels import config, launch

SWEEP = os.environ.get("FASTNCE_TRITON_SWEEP") == "1"
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
TARGETS = (80, 90, 100) if SWEEP else (80, 90)
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if SWEEP else (torch.bfloat16,)
DEPTHS = calls.DEPTHS if SWEEP else (256, 768)

# Reasoned exceptions: kernel -> bytes. They multiply no matrices and wait for memory; ptxas keeps them at 48 and 96 registers,
# far from the limit, for the sake of occupancy, and saves one to four registers for it.
SPILLS_ALLOWED = {"_row_gradients_kernel": 16, "_scatter_kernel": 8}


@pytest.fixture
def multiprocessor(monkeypatch):
    """The shared memory of a target's multiprocessor, for the choice of tiles."""

    def use(capability: int) -> None:
        size = SHARED_MEMORY[capability] + 1024
        monkeypatch.setattr(launch, "shared_memory", lambda device: size)

    return use


def _work(job: tuple[Launch, int]) -> Compiled | str:
    warnings.simplefilter("ignore")
    try:
        return compiled(*job)
    except Exception as error:
        return f"{job[0].name} for sm_{job[1]}: {type(error).__name__}: {error}"


def all_compiled(jobs: list[tuple[Launch, int]]) -> list[Compiled | str]:
    # Not forked: PyTorch's threads would not survive it.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        return list(pool.map(_work, jobs, chunksize=4))


def faults(result: Compiled | str) -> list[str]:
    if isinstance(result, str):
        return [result]
    found = []
    name = result.launch.name
    if result.spills > SPILLS_ALLOWED.get(name, 0):
        found.append(f"spills: {result}")
    if result.shared > SHARED_MEMORY[result.capability]:
        found.append(f"too much shared memory: {result}")
    if re.search(r"\b(atom|red)\.", result.ptx):
        found.append(f"atomics: {result}")
    multiplies = "PRECISION" in dict(result.launch.constants) and name != "_own_sums_kernel"
    half = dict(result.launch.signature)["x"] in ("*bf16", "*fp16") if multiplies else False
    if half and MATRIX_INSTRUCTION[result.capability] not in result.ptx:
        found.append(f"no {MATRIX_INSTRUCTION[result.capability]}: {result}")
    return found


@pytest.mark.parametrize("capability", TARGETS)
def test_kernels_compile_without_spills(capability, multiprocessor):
    multiprocessor(capability)
    found = [x for dtype in DTYPES for x in calls.sampling_launches(dtype)]
    for depth in DEPTHS:
        for dtype in DTYPES:
            found += calls.launches(depth, dtype)
            if SWEEP or capability == 90:
                found += calls.launches(depth, dtype, large=False)
    jobs = [(each, capability) for each in dict.fromkeys(found)]
    results = all_compiled(jobs)
    wrong = [fault for result in results for fault in faults(result)]
    assert not wrong, "\n".join(wrong)
    kernels = {job[0].name for job in jobs}
    assert kernels == EVERY_KERNEL, kernels ^ EVERY_KERNEL


EVERY_KERNEL = {
    "_gather_kernel",
    "_losses_kernel",
    "_normalisation_kernel",
    "_own_gradients_kernel",
    "_own_sums_kernel",
    "_pack_kernel",
    "_panel_kernel",
    "_row_gradients_kernel",
    "_row_products_kernel",
    "_scatter_kernel",
    "_similarity_kernel",
    "_sums_kernel",
}


@pytest.mark.parametrize("precision", ["highest", "high", "medium"] if SWEEP else ["highest"])
def test_fp32_compiles_in_every_precision(precision, multiprocessor):
    multiprocessor(90)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = calls.launches(64, torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)
    sums = [each for each in found if each.name == "_sums_kernel"]
    assert {each.constant("PRECISION") for each in sums} == {
        "ieee" if precision == "highest" else "tf32"
    }
    assert {dict(each.signature)["x"] for each in sums} == {
        "*bf16" if precision == "medium" else "*fp32"
    }
    results = all_compiled([(each, 90) for each in found])
    wrong = [fault for result in results for fault in faults(result)]
    assert not wrong, "\n".join(wrong)


def test_the_report_sees_spills(multiprocessor, monkeypatch):
    """A tile that cannot fit in registers."""
    multiprocessor(90)
    tile = config.Tile(128, 128, 4, 2)
    monkeypatch.setattr(config, "tiles", lambda *arguments: (tile, tile))
    found = calls.launches(256, torch.bfloat16)
    worst = next(x for x in found if x.name == "_row_products_kernel" and x.constant("HEAD") == 256)
    assert any(fault.startswith("spills: ") for fault in faults(compiled(worst, 90)))


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


def test_memory_is_linear_in_the_rows():
    """262144 x 512, both directions: what is allocated in all, were none of it freed, beside the inputs."""
    sizes = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and "empty" in str(function):
                sizes.append(out.nbytes)
            return out

    count, depth = 262144, 512
    with recorded(), Counting():
        info_nce(count, depth, symmetric=True)
    inputs = 2 * count * depth * 2
    assert max(sizes) <= inputs
    assert sum(size for size in sizes if size > inputs) == 0


def test_addresses_are_64_bit(multiprocessor):
    """Rows times depth may exceed 2^31. Packing addresses every element in 64 bits; a pass, the first row of each tile."""
    multiprocessor(90)
    with recorded() as found:
        info_nce(8_400_000, 256)
    for name, what in (("_pack_kernel", "x!tt.ptr<bf16>"), ("_sums_kernel", " !tt.ptr<bf16>")):
        text = compiled(next(x for x in found if x.name == name), 90).ttgir
        lines = [x for x in text.splitlines() if "tt.addptr" in x and what in x]
        assert lines, name
        for line in lines:
            offset = line.partition(what)[2].partition(" loc")[0]
            assert "i64" in offset and "i32" not in offset, line
