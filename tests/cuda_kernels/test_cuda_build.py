"""Every CUDA file compiled for every target, on a machine without a GPU: what the compiler reports of the kernels."""

import shutil
import subprocess
import sys

import pytest
from cuda_resources import Kernel, compile_all, files

from fastnce.backends import build

# What must stand in every kernel of the files of this name: matrix instructions, and TMA's loads.
EXPECTED = {
    "pairs_sm80": {"HMMA"},
    "pairs_sm90": {"HGMMA", "UTMALDG"},
    "patch_nce": {"HMMA"},
}
# Reasoned exceptions: (file, part of the kernel's name) -> why.
WITHOUT: dict[tuple[str, str], str] = {
    ("patch_nce.cu", "sum_"): "adds up what the blocks leave",
}
LOCAL_MEMORY: dict[tuple[str, str], str] = {}


def excused(kernel: Kernel, exceptions: dict[tuple[str, str], str]) -> bool:
    return any(kernel.file == file and part in kernel.name for file, part in exceptions)


@pytest.fixture(scope="module")
def done(nvcc):
    return compile_all()


@pytest.fixture(scope="module")
def kernels(done) -> list[Kernel]:
    return [kernel for each in done for kernel in each.kernels]


def test_every_file_for_every_target(kernels):
    with_kernels = {file.name for file in files() if "__global__" in file.read_text()}
    for name in with_kernels:
        expected = set(build.ONLY_FOR.get(name, build.TARGETS))
        assert {kernel.target for kernel in kernels if kernel.file == name} == expected


def test_nothing_is_kept_in_local_memory(kernels):
    """Neither registers that were spilled nor arrays that the compiler could not keep in registers."""
    wrong = [
        f"{kernel.file} {kernel.name} sm_{kernel.target}: {kernel.stack} bytes of stack, "
        f"{kernel.spill_stores} + {kernel.spill_loads} spilled"
        for kernel in kernels
        if (
            kernel.stack
            or kernel.spill_stores
            or kernel.spill_loads
            or "LDL" in kernel.instructions
        )
        and not excused(kernel, LOCAL_MEMORY)
    ]
    assert not wrong, "\n".join(wrong)


def test_products_use_the_matrix_instructions(kernels):
    for start, instructions in EXPECTED.items():
        of = [kernel for kernel in kernels if kernel.file.startswith(start)]
        assert of, start
        without = [
            f"{kernel.file} {kernel.name} sm_{kernel.target}"
            for kernel in of
            if not instructions <= kernel.instructions.keys() and not excused(kernel, WITHOUT)
        ]
        assert not without, f"not all of {instructions} in:\n" + "\n".join(without)


def test_warp_groups_exchange_no_more_registers_than_there_are(kernels):
    """A kernel is launched with as many as pairs_sm90.cuh counts on (kLaunchRegisters), or a claim waits for ever."""
    launched = {kernel.registers for kernel in kernels if kernel.file == "pairs_sm90.cu"}
    assert launched == {65536 // 384 // 8 * 8}


def test_the_compiler_has_nothing_to_warn_of(done):
    assert not [warning for each in done for warning in each.warnings]


def test_exceptions_are_needed(kernels):
    for exceptions in (WITHOUT, LOCAL_MEMORY):
        for file, part in exceptions:
            assert any(kernel.file == file and part in kernel.name for kernel in kernels)


BINDING = ("op.cpp", "device_properties.cu")


def test_the_library_loads_into_a_torch_without_cuda(nvcc, tmp_path, monkeypatch):
    """All but the kernels: it links against this torch, whichever it is."""
    sources = build.source_folder()
    shutil.copytree(sources / "common", tmp_path / "csrc" / "common")
    (tmp_path / "csrc" / "cuda").mkdir()
    headers = [*sources.glob("cuda/*.h"), *sources.glob("cuda/*.cuh")]
    for file in [*headers, *(sources / "cuda" / name for name in BINDING)]:
        shutil.copy(file, tmp_path / "csrc" / "cuda")
    monkeypatch.setenv("FASTNCE_CUDA_ARCHS", "80")
    library = build.build(
        build.CUDA, tmp_path / "lib.so", sources=tmp_path / "csrc", folder=tmp_path
    )
    code = f"import torch; torch.ops.load_library({str(library)!r})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
