"""The ops' launches, without a GPU: recorded on tensors without memory, and compiled for any target.

Not for use with TRITON_INTERPRET=1, which has no compiler.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastnce.triton_kernels.launch as launch_module

# Shared memory that a program can have, in bytes. 8.0 has 163 KiB, but its tiles serve 8.6, 8.9 and 12.0 too.
SHARED_MEMORY = {80: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel as Triton would specialise it for the arguments of one call."""

    kernel: str  # module and name
    signature: tuple
    constants: tuple
    attributes: tuple
    options: tuple

    @property
    def name(self) -> str:
        return self.kernel.rpartition(".")[2]

    def constant(self, name: str) -> object:
        return dict(self.constants).get(name)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside the block every launch is noted, and none happens."""
    found: list[Launch] = []

    def note(kernel, grid, arguments, options):
        assert all(isinstance(size, int) and size > 0 for size in grid), (kernel, grid)
        # Beyond these a grid cannot be launched.
        assert grid[0] < 2**31 and all(size < 2**16 for size in grid[1:]), (kernel, grid)
        found.append(_specialised(kernel, arguments, options))

    start = launch_module._start
    launch_module._start = note
    try:
        yield found
    finally:
        launch_module._start = start


@contextlib.contextmanager
def as_on(capability: int) -> Iterator[None]:
    """Inside the block tiles are chosen as on a GPU of that compute capability."""
    before = launch_module.shared_memory, launch_module.tensor_memory
    launch_module.shared_memory = lambda device: SHARED_MEMORY[capability] + 1024
    launch_module.tensor_memory = lambda device: capability == 100
    try:
        yield
    finally:
        launch_module.shared_memory, launch_module.tensor_memory = before


def _specialised(kernel, arguments: dict[str, object], options: dict[str, object]) -> Launch:
    names = [parameter.name for parameter in kernel.params]
    assert set(arguments) == set(names), set(arguments) ^ set(names)
    signature, constants, attributes = [], [], []

    def describe(value: object, path: tuple, free: bool) -> object:
        if isinstance(value, tuple):
            return tuple(describe(x, (*path, i), free) for i, x in enumerate(value))
        if value is None or (type(value) is int and value == 1 and free):
            constants.append((path if len(path) > 1 else names[path[0]], value))
            return "constexpr"
        if isinstance(value, torch.Tensor):
            attributes.append(path)  # PyTorch aligns memory; slices are in whole rows
            return _TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        assert type(value) is int, value
        if value % 16 == 0 and free:
            attributes.append(path)
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            constants.append((parameter.name, value))
            signature.append((parameter.name, "constexpr"))
        else:
            free = not parameter.do_not_specialize
            signature.append((parameter.name, describe(value, (index,), free)))
    where = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
    return Launch(
        where, tuple(signature), tuple(constants), tuple(attributes), tuple(options.items())
    )


@dataclasses.dataclass
class Compiled:
    """The compiler's output for one launch, and what it takes."""

    ttgir: str
    ptx: str
    shared: int
    registers: int
    spills: int  # bytes of stack: registers that do not fit, for no kernel here has arrays


def build(launch: Launch, capability: int):
    """Triton's compilation of a launch for a compute capability such as 90."""
    module, _, name = launch.kernel.rpartition(".")
    kernel = getattr(importlib.import_module(module), name)
    source = ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs={
            (name,) if isinstance(name, tuple) and len(name) == 1 else name: value
            for name, value in launch.constants
        },
        attrs={path: [["tt.divisibility", 16]] for path in launch.attributes},
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=dict(launch.options))


def compiled(launch: Launch, capability: int) -> Compiled:
    """Compiles a launch, and asks CUDA's tool that comes with Triton what it takes."""
    result = build(launch, capability)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(result.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    asm, shared = result.asm, result.metadata.shared
    return Compiled(asm["ttgir"], asm["ptx"], shared, int(registers), int(stack))
