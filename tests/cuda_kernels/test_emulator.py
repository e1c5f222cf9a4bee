"""The emulator notices what a GPU would punish: what it lets pass, no test of the CUDA kernels could find."""

import ctypes
import re

import pytest
import torch

FAULTS = (
    "none",
    "no_barrier",
    "no_wait",
    "copy_left_behind",
    "some_skip_barrier",
    "barrier_sizes",
    "overrun",
    "half_warp",
    "divergent_warp",
    "misaligned_copy",
    "too_many_threads",
    "too_much_shared_memory",
)
SEEDS = range(5)


@pytest.fixture(scope="module")
def library(emulator_cases) -> ctypes.CDLL:
    return emulator_cases("emulator_cases.cu")


@pytest.fixture
def run(library, monkeypatch):
    """The result of a kernel and the error's message."""

    def call(kernel: str, fault: str, x: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, str]:
        monkeypatch.setenv("FASTNCE_EMULATOR_SEED", str(seed))
        out = torch.zeros(128)
        pointers = (ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        message = library.run_case(kernel.encode(), FAULTS.index(fault), *pointers)
        return out, message.decode()

    return call


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", SEEDS)
def test_right_kernels(run, x, seed):
    for kernel, expected in (
        ("reverse", x.flip(0)),
        ("copy", x),
        ("sum", x.view(4, 32).sum(1, keepdim=True).expand(4, 32).flatten()),
    ):
        out, message = run(kernel, "none", x, seed)
        assert message == ""
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrix_instructions(run, dtype):
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    out, message = run(f"multiply_{dtype}".replace("torch.", ""), "none", x)
    assert message == ""
    torch.testing.assert_close(out.view(16, 8), x[:16] @ x[16:].T)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("kernel", "fault"), [("reverse", "no_barrier"), ("copy", "no_wait")])
def test_what_came_too_late_is_nan(run, x, kernel, fault, seed):
    out, message = run(kernel, fault, x, seed)
    assert message == ""
    assert out.isnan().any()


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
    ],
)
def test_faults_are_reported(run, x, kernel, fault, what, seed):
    _, message = run(kernel, fault, x, seed)
    assert what in message


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("too_many_threads", "block 2048 x 1 x 1.*a block cannot have this size"),
        ("too_much_shared_memory", "307200 bytes of shared memory.*more shared memory than"),
    ],
)
def test_launch_errors_name_op_shape_and_fix(run, x, fault, what):
    out, message = run("reverse", fault, x)
    assert message.startswith("a test: grid 1 x 1 x 1, block ")
    assert re.search(what, message)
    assert (out == 0).all()
    assert message.endswith("Use backend='triton' or backend='torch' for this call.")


def test_the_seed_decides_the_order(run, x):
    """Without another order, five seeds would be one test."""
    results = {tuple(run("reverse", "no_barrier", x, seed)[0].isnan().tolist()) for seed in SEEDS}
    assert len(results) > 1
    first, second = (run("reverse", "no_barrier", x, 3)[0].isnan() for _ in range(2))
    assert torch.equal(first, second)
