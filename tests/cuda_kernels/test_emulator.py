"""The emulator notices what a GPU would punish: what it lets pass, no test of the CUDA kernels could find.

Of Hopper's instructions the layouts are checked by the formulas of the PTX ISA, written here once more.
"""

import ctypes

import pytest
import torch
from emulated import HERE, LIBRARY, plan
from torch import Tensor

from fastnce.backends import build

BF16, FP16 = torch.bfloat16, torch.float16
SEEDS = range(5)
each_dtype = pytest.mark.parametrize("dtype", [BF16, FP16])


@pytest.fixture(scope="module")
def library(cxx) -> ctypes.CDLL:
    output = LIBRARY.parent / "emulator_cases.so"
    made = plan([HERE / "emulator_cases.cu", HERE / "emulator.cpp"], "-fvisibility=default")
    build.compile_library(made, output, LIBRARY.parent / "emulator_cases")
    loaded = ctypes.CDLL(str(output))
    loaded.run_kernel.restype = loaded.run_tiles.restype = ctypes.c_char_p
    return loaded


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


@pytest.fixture
def run(library, monkeypatch):
    """The result of a kernel and the error's message."""

    def call(kernel: str, x: Tensor, fault: str = "none", seed: int = 0) -> tuple[Tensor, str]:
        monkeypatch.setenv("FASTNCE_EMULATOR_SEED", str(seed))
        out = torch.zeros(128)
        message = library.run_kernel(kernel.encode(), fault.encode(), pointer(x), pointer(out))
        return out, message.decode()

    return call


@pytest.fixture
def x() -> Tensor:
    return torch.randn(128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", SEEDS)
def test_right_kernels(run, x, seed):
    for kernel, expected in (
        ("reverse", x.flip(0)),
        ("copy", x),
        ("sum", x.view(4, 32).sum(1, keepdim=True).expand(4, 32).flatten()),
    ):
        out, message = run(kernel, x, seed=seed)
        assert message == ""
        torch.testing.assert_close(out, expected)


@each_dtype
def test_matrix_instructions(run, dtype):
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    out, message = run(f"multiply_{dtype}".replace("torch.", ""), x)
    assert message == ""
    torch.testing.assert_close(out.view(16, 8), x[:16] @ x[16:].T)


@each_dtype
def test_the_accumulator_is_cut_off(run, dtype):
    """A float's last bit beside 1 is 2^-23. What lies below is lost, and not rounded."""
    x = torch.zeros(24, 16)
    x[0, :2] = torch.tensor([1.0, 2.0**-8])
    x[16:18, 0] = 1.0
    x[16, 1], x[17, 1] = 2.0**-15, 1.75 * 2.0**-15
    out, message = run(f"multiply_{dtype}".replace("torch.", ""), x)
    assert message == ""
    assert out[:2].tolist() == [1 + 2.0**-23, 1 + 2.0**-23]


@pytest.mark.parametrize("seed", SEEDS)
def test_what_came_too_late_is_nan(run, x, seed):
    out, message = run("reverse", x, "no_barrier", seed)
    assert message == ""
    assert out.isnan().any()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_copy_comes_early_or_late(run, x, seed):
    """Who does not wait for it reads what it brings, or what was there before: neither is to be relied on."""
    out, message = run("copy", x, "no_wait", seed)
    assert message == ""
    early = out == x
    assert early.any() and not early.all()
    assert out[~early].eq(7).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kernel", "fault", "what"),
    [
        ("reverse", "some_skip_barrier", "wait for ever"),
        ("reverse", "barrier_sizes", "disagree about a barrier"),
        ("reverse", "overrun", "beyond the shared memory"),
        ("copy", "copy_left_behind", "copies on their way"),
        ("copy", "misaligned_copy", "shared address is not aligned"),
        ("sum", "half_warp", "wait for ever"),
        ("sum", "divergent_warp", "different operations"),
        ("tiles", "no_init", "before its init"),
        ("tiles", "too_many_bytes", "wait for ever"),
        ("tiles", "two_arrivals", "more arrivals"),
        ("tiles", "no_fence", "no fence"),
        ("tiles", "no_wait", "on their way"),
        ("tiles", "disagree", "disagree"),
    ],
)
def test_faults_are_reported(run, multiply, x, kernel, fault, what, seed):
    if kernel == "tiles":
        message = multiply(rows(BF16), (0, 0, 1), 128, fault=fault, seed=seed)[-1]
    else:
        message = run(kernel, x, fault, seed)[-1]
    assert what in message


@pytest.mark.parametrize(
    ("fault", "shape", "what"),
    [
        ("too_many_threads", "block 2048 x 1 x 1", "a block cannot have this size"),
        ("too_much_shared_memory", "307200 bytes of shared memory", "more shared memory than"),
    ],
)
def test_launch_errors_name_op_shape_and_fix(run, x, fault, shape, what):
    out, message = run("reverse", x, fault)
    assert message.startswith("a test: grid 1 x 1 x 1, block ")
    assert shape in message and what in message
    assert message.endswith("Use backend='triton' or backend='torch' for this call.")
    assert (out == 0).all()


def test_a_kernel_s_limit_of_shared_memory_is_set_once(library):
    """To all that there is: were it each launch's own, one thread's could fall before another's launch begins."""
    found = (ctypes.c_int * 2)()
    library.run_limits(found)
    assert list(found) == [1, 227 * 1024]


def test_the_seed_decides_the_order(run, x):
    """Without another order, five seeds would be one test."""
    results = {tuple(run("reverse", x, "no_barrier", s)[0].isnan().tolist()) for s in (*SEEDS, 3)}
    assert 1 < len(results) <= len(SEEDS)


# --- Hopper's instructions ---


@pytest.fixture
def multiply(library, monkeypatch):
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
        message = library.run_tiles(
            int(x.dtype == BF16),
            pointer(x),
            (ctypes.c_int * 3)(*x.shape),
            (ctypes.c_int * 3)(*at),
            columns,
            pointer(registers),
            pointer(out),
            pointer(tiles),
            fault.encode(),
        )
        return out, tiles, message.decode()

    return call


def rows(dtype: torch.dtype) -> Tensor:
    return torch.randn(3, 100, 112, generator=torch.Generator().manual_seed(0)).to(dtype)


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


each_place = pytest.mark.parametrize("at", [(0, 0, 1), (64, 60, 1), (16, 7, 1)])


@each_dtype
@each_place
def test_a_copied_box_is_swizzled_and_zero_beyond_the_end(multiply, dtype, at):
    x = rows(dtype)
    x[0], x[2] = torch.nan, torch.nan
    _, tiles, message = multiply(x, at, 64)
    assert message == ""
    pieces = tiles[64 * 128 :].view(128, 8, 8, 2)  # line, piece of 16 bytes, element
    line, piece = torch.arange(128)[:, None], torch.arange(8)
    lines = pieces[line, piece ^ line % 8]
    assert torch.equal(lines.view(dtype).view(128, 64).float(), box(x, at, 128))


@each_dtype
@each_place
@pytest.mark.parametrize(("columns", "across"), [(64, False), (128, False), (64, True)])
def test_a_product(multiply, dtype, at, columns, across):
    """Of two tiles, or of registers with a tile across."""
    x = rows(dtype)
    a = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = a.float() @ box(x, at, 64) if across else box(x, at, 64) @ box(x, at, columns).T
    for seed in range(3):
        out, _, message = multiply(x, at, columns, fragments(a) if across else None, seed=seed)
        assert message == ""
        torch.testing.assert_close(accumulators(out), expected)


def test_what_a_copy_brings_too_late_is_nan(multiply):
    late = 0
    for seed in range(8):
        _, tiles, message = multiply(rows(BF16), (0, 0, 1), 128, fault="no_barrier", seed=seed)
        assert message == ""
        late += bool(tiles.view(BF16).isnan().any())
    assert late > 2


@pytest.mark.parametrize("fault", ["tile_changed", "operand_changed"])
@pytest.mark.parametrize("seed", SEEDS)
def test_operands_changed_too_early_show(multiply, fault, seed):
    x, a = rows(BF16), fragments(torch.ones(64, 64, dtype=BF16))
    right, _, _ = multiply(x, (0, 0, 1), 64, a, seed=seed)
    wrong, _, message = multiply(x, (0, 0, 1), 64, a, fault, seed)
    assert message == ""
    assert not torch.equal(right, wrong)
