"""When the Triton backend looks for a GPU, and what it says of one: with a stand-in where there is none."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from fastnce.backends import triton as triton_ops
from fastnce.triton_kernels import launch

ON_HOST = "the interpreter runs on the host"
COMPILERS = "Failed to find C compiler. Please specify via CC environment variable"


def in_a_process(code: str, **variables: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def gpus(monkeypatch) -> list[int]:
    """Of compute capability 9.0, 7.5 and 8.0. Returns the GPUs on which the first kernel was started."""
    if launch.INTERPRETED:
        pytest.skip(ON_HOST)
    capabilities = [(9, 0), (7, 5), (8, 0)]
    started: list[int] = []
    monkeypatch.setattr(triton_ops, "_answers", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index or 0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(launch, "start_nothing", started.append)
    return started


def ask(device: str, op: str = "info_nce") -> str:
    return triton_ops.supports(op, device, torch.bfloat16)


def test_each_gpu_is_asked_once_for_itself(gpus):
    assert [ask(f"cuda:{index}") for index in (0, 2, 0, 2)] == ["ok"] * 4
    assert ask("cuda") == triton_ops.available() == "ok"
    older = "the Triton kernels need a GPU of compute capability 8.0, this one has 7.5"
    assert ask("cuda:1") == older
    assert gpus == [0, 2]


def test_older_gpus_multiply_no_fp8(gpus):
    why = "products in fp8 need a GPU of compute capability 8.9, this one has 8.0"
    assert ask("cuda:2", "info_nce_fp8") == why
    assert ask("cuda:0", "info_nce_fp8") == ask("cuda", "info_nce_fp8") == "ok"


@pytest.mark.parametrize(
    "error", [RuntimeError(COMPILERS), PermissionError(13, "denied"), KeyError]
)
def test_a_machine_that_cannot_compile_says_so(error, gpus, monkeypatch):
    """A slim container has no C compiler, no Python.h, or no cache that can be written."""

    def fail(index: int) -> None:
        gpus.append(index)
        raise error

    monkeypatch.setattr(launch, "start_nothing", fail)
    for _ in range(2):
        reason = ask("cuda:0")
        assert reason.startswith("Triton cannot compile and start a kernel: ")
        assert "needs a C compiler, Python's headers (Python.h) and a cache" in reason
        assert (COMPILERS in reason) == (COMPILERS in str(error))
    assert triton_ops.available() == reason and gpus == [0]


def test_nothing_is_started_while_a_graph_is_captured(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ask("cuda:0") == "ok" and gpus == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert ask("cuda:0") == "ok" and gpus == [0]


@pytest.mark.skipif(launch.INTERPRETED, reason=ON_HOST)
def test_the_first_kernel_can_be_compiled(monkeypatch):
    import contextlib

    from launches import compiled, recorded

    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    with recorded() as found:
        launch.start_nothing(0)
    assert "_nothing_kernel" in compiled(found[0], 80).ptx


def test_importing_asks_no_gpu():
    """Nor does a call on the CPU. A process that has woken a GPU cannot fork, nor choose among GPUs any more."""
    in_a_process(
        """
import sys, torch
def asked(*args): raise AssertionError("a GPU was asked")
for name in {"_cuda_getDeviceCount", "_cuda_init"} & set(dir(torch._C)):
    setattr(torch._C, name, asked)
torch.cuda.is_available = torch.cuda.get_device_capability = torch.cuda.device_count = asked
import fastnce
fastnce.info_nce(torch.eye(4), torch.eye(4))
assert not torch.cuda.is_initialized() and "fastnce.triton_kernels" not in sys.modules
"""
    )


def test_the_first_question_may_come_while_torch_compile_traces():
    in_a_process(
        """
import torch, fastnce
from fastnce.backends import triton as triton_ops
assert triton_ops._operators is None
x = torch.randn(2, 8, 4)
step = torch.compile(lambda x, y: fastnce.info_nce(x, y, backend="triton"), fullgraph=True, backend="aot_eager")
torch.testing.assert_close(step(*x), fastnce.info_nce(*x, backend="torch"))
""",
        TRITON_INTERPRET="1",
    )
