"""Hopper's instructions as emulated: layouts by the formulas of the PTX ISA, written here once more, and faults noticed."""

import ctypes

import pytest
import torch
from torch import Tensor

FAULTS = (
    "none",
    "no_barrier",
    "no_init",
    "too_many_bytes",
    "two_arrivals",
    "no_fence",
    "no_wait",
    "disagree",
    "tile_changed",
    "operand_changed",
)
DTYPES = (torch.bfloat16, torch.float16)
SEEDS = range(3)


@pytest.fixture(scope="module")
def library(emulator_cases) -> ctypes.CDLL:
    return emulator_cases("emulator_sm90_cases.cu")


@pytest.fixture
def run(library, monkeypatch):
    """Threads' results (128, columns / 2), the tiles' bytes, and the error's message."""

    def call(
        x: Tensor,
        at: tuple[int, int, int],
        columns: int,
        registers: Tensor | None = None,
        fault: str = "none",
        seed: int = 0,
    ) -> tuple[Tensor, Tensor, str]:
        monkeypatch.setenv("FASTNCE_EMULATOR_SEED", str(seed))
        out = torch.full((128, columns // 2), torch.nan)
        tiles = torch.zeros(192 * 128, dtype=torch.uint8)
        message = library.run_case(
            int(x.dtype == torch.bfloat16),
            ctypes.c_void_p(x.data_ptr()),
            (ctypes.c_int * 3)(*x.shape),
            (ctypes.c_int * 3)(*at),
            columns,
            None if registers is None else ctypes.c_void_p(registers.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_void_p(tiles.data_ptr()),
            FAULTS.index(fault),
        )
        return out, tiles, message.decode()

    return call


def rows(dtype: torch.dtype, *, nan_elsewhere: bool = False) -> Tensor:
    x = torch.randn(3, 100, 112, generator=torch.Generator().manual_seed(0)).to(dtype)
    if nan_elsewhere:
        x[0], x[2] = torch.nan, torch.nan
    return x


def box(x: Tensor, at: tuple[int, int, int], lines: int) -> Tensor:
    """(lines, 64), zeros beyond the end."""
    element, row, problem = at
    part = x[problem, row : row + lines, element : element + 64]
    return torch.nn.functional.pad(part, (0, 64 - part.shape[1], 0, lines - part.shape[0])).float()


def accumulators(out: Tensor) -> Tensor:
    """(64, columns) from the fragments of matrix D of m64nNk16."""
    columns = out.shape[1] * 2
    d = torch.empty(64, columns)
    for thread in range(128):
        group, in_group = thread % 32 // 4, thread % 4
        for i in range(columns // 2):
            row = 16 * (thread // 32) + group + 8 * (i // 2 % 2)
            d[row, 8 * (i // 4) + 2 * in_group + i % 2] = out[thread, i]
    return d


def fragments(a: Tensor) -> Tensor:
    """(steps, 128, 8) from (64, 16 steps): the fragments of matrix A of m64nNk16."""
    out = torch.empty(a.shape[1] // 16, 128, 8, dtype=a.dtype)
    for thread in range(128):
        group, in_group = thread % 32 // 4, thread % 4
        for i in range(8):
            row = 16 * (thread // 32) + group + (8 if i in (2, 3, 6, 7) else 0)
            column = 2 * in_group + i % 2 + (8 if i >= 4 else 0)
            out[:, thread, i] = a[row, column::16]
    return out.contiguous()


PLACES = [(0, 0, 1), (64, 60, 1), (16, 7, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", PLACES)
def test_a_copied_box_is_swizzled_and_zero_beyond_the_end(run, dtype, at):
    x = rows(dtype, nan_elsewhere=True)
    _, tiles, message = run(x, at, 64)
    assert message == ""
    pieces = tiles[64 * 128 :].view(128, 8, 8, 2)  # line, piece of 16 bytes, element
    lines = torch.empty(128, 8, 8, 2, dtype=torch.uint8)
    for line in range(128):
        for piece in range(8):
            lines[line, piece] = pieces[line, piece ^ line % 8]
    assert torch.equal(lines.view(dtype).view(128, 64).float(), box(x, at, 128))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("columns", [64, 128])
def test_a_product_of_tiles(run, dtype, at, columns):
    x = rows(dtype)
    for seed in SEEDS:
        out, _, message = run(x, at, columns, seed=seed)
        assert message == ""
        torch.testing.assert_close(accumulators(out), box(x, at, 64) @ box(x, at, columns).T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", PLACES)
def test_a_product_from_registers_with_a_tile_across(run, dtype, at):
    x = rows(dtype)
    a = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    for seed in SEEDS:
        out, _, message = run(x, at, 64, fragments(a), seed=seed)
        assert message == ""
        torch.testing.assert_close(accumulators(out), a.float() @ box(x, at, 64))


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("no_init", "before its init"),
        ("too_many_bytes", "wait for ever"),
        ("two_arrivals", "more arrivals"),
        ("no_fence", "no fence"),
        ("no_wait", "on their way"),
        ("disagree", "disagree"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_faults_are_reported(run, fault, what, seed):
    _, _, message = run(rows(torch.bfloat16), (0, 0, 1), 128, fault=fault, seed=seed)
    assert what in message


def test_what_came_too_late_is_nan(run):
    results = []
    for seed in range(8):
        _, tiles, message = run(rows(torch.bfloat16), (0, 0, 1), 128, fault="no_barrier", seed=seed)
        assert message == ""
        results.append(bool(tiles.view(torch.bfloat16).isnan().any()))
    assert sum(results) > 2


@pytest.mark.parametrize("fault", ["tile_changed", "operand_changed"])
@pytest.mark.parametrize("seed", SEEDS)
def test_operands_changed_too_early_show(run, fault, seed):
    x = rows(torch.bfloat16)
    a = fragments(torch.ones(64, 64, dtype=torch.bfloat16))
    right, _, _ = run(x, (0, 0, 1), 64, a, seed=seed)
    wrong, _, message = run(x, (0, 0, 1), 64, a, fault, seed)
    assert message == ""
    assert not torch.equal(right, wrong)
