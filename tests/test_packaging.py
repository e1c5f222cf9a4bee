"""Building and installing: with a compiler, without one, and where the choice is forced."""

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastnce.backends import build, build_cuda, native

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = (
    "fastnce",
    "triton_kernels",
    "csrc",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
)

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="needs a checkout, not an installed package"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources, so that nothing is built in the real ones."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(source, copy / name, ignore=ignore)
        elif source.is_file():
            shutil.copy(source, copy / name)
    (copy / "README.md").touch()
    return copy


def make_wheel(checkout: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps"]
    command += ["--no-index", "--quiet", "-w", str(folder)]
    return subprocess.run(
        command, cwd=checkout, env=environment_with(**environment), capture_output=True, text=True
    )


def environment_with(**changes: str) -> dict[str, str]:
    own = ("CXX", "CXXFLAGS", "NVCC", "NVCCFLAGS", "CUDA_HOME")
    kept = {k: v for k, v in os.environ.items() if k not in own and not k.startswith("FASTNCE_")}
    return {**kept, **changes}


def only_wheel(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def fake_compiler(folder: Path, script: str, name: str = "fake-compiler") -> str:
    """A program that logs that it was called, then does as the script says."""
    folder.mkdir(parents=True, exist_ok=True)
    compiler = folder / name
    log = folder / "calls"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{script}\n')
    compiler.chmod(0o755)
    return str(compiler)


# Writes the file that follows -o, with the stamp that the real compiler would have put into it.
COMPILES = """
stamp=""
while [ $# -gt 0 ]; do
  case "$1" in
    -o) shift; out="$1" ;;
    -DFASTNCE_BUILD_STAMP=*) stamp="$1" ;;
    *.o) [ -f "$1" ] && stamp="$stamp$(cat "$1")" ;;
    --version) echo "fake 1.0"; exit 0 ;;
  esac
  shift
done
printf '%s' "$stamp" > "$out"
"""


def test_without_a_compiler_the_wheel_is_pure(checkout, tmp_path):
    done = make_wheel(checkout, tmp_path, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    wheel = only_wheel(tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = names_in(wheel)
    assert not [name for name in names if name.endswith(".so")]
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert {path.suffix for path in sources} == {".cpp", ".h", ".cu", ".cuh"}
    shipped = {f"fastnce/{path.relative_to(ROOT)}" for path in sources}
    assert shipped <= names, "`fastnce build` needs the sources"
    kernels = {f"fastnce/{p.relative_to(ROOT)}" for p in (ROOT / "triton_kernels").glob("*.py")}
    assert len(kernels) > 10 and kernels <= names
    assert {"fastnce/viz/gallery.css", "fastnce/viz/gallery.js"} <= names
    assert not [name for name in names if name.startswith("triton_kernels")]


def test_the_pure_package_works_and_says_what_is_missing(checkout, tmp_path):
    done = make_wheel(checkout, tmp_path, FASTNCE_NATIVE="0")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(only_wheel(tmp_path)) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        "import torch, fastnce; from fastnce.backends import native; print(fastnce.__file__); print(native.available()); "
        "print(fastnce.info_nce(torch.eye(3), torch.eye(3)).item() > 0)"
    )
    environment = environment_with(
        PYTHONPATH=str(tmp_path / "site"), XDG_CACHE_HOME=str(tmp_path / "cache")
    )
    out = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    file, reason, works = out.stdout.splitlines()
    assert file.startswith(str(tmp_path))
    assert "fastnce build" in reason
    assert works == "True"


def test_the_wheel_with_the_library_is_for_this_platform(checkout, tmp_path):
    done = make_wheel(checkout, tmp_path, CXX=fake_compiler(tmp_path, COMPILES))
    assert done.returncode == 0, done.stderr
    wheel = only_wheel(tmp_path)
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    assert f"fastnce/{build.LIBRARY}" in names_in(wheel)
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/WHEEL"))
        assert "Root-Is-Purelib: false" in archive.read(metadata).decode()


def test_a_library_of_an_earlier_build_is_not_packed(checkout, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert make_wheel(checkout, first, CXX=fake_compiler(tmp_path, COMPILES)).returncode == 0
    assert make_wheel(checkout, second, FASTNCE_NATIVE="0").returncode == 0
    assert only_wheel(second).name.endswith("-any.whl")
    assert f"fastnce/{build.LIBRARY}" not in names_in(only_wheel(second))


BROKEN = 'echo "ops.cpp:1: error: out of ideas" >&2; exit 3'


def test_a_broken_compiler_is_no_obstacle_unless_forced(checkout, tmp_path):
    done = make_wheel(checkout, tmp_path, CXX=fake_compiler(tmp_path, BROKEN))
    assert done.returncode == 0, done.stderr
    assert only_wheel(tmp_path).name.endswith("-any.whl")


def test_forced_with_a_broken_compiler_is_an_error_with_its_message(checkout, tmp_path):
    done = make_wheel(checkout, tmp_path, CXX=fake_compiler(tmp_path, BROKEN), FASTNCE_NATIVE="1")
    assert done.returncode != 0
    assert "ops.cpp:1: error: out of ideas" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_forced_without_a_compiler_is_an_error(checkout, tmp_path):
    done = make_wheel(checkout, tmp_path, CXX="no-such-compiler", FASTNCE_NATIVE="1")
    assert done.returncode != 0
    assert "no C++ compiler 'no-such-compiler'" in done.stdout + done.stderr


@pytest.fixture
def sources(tmp_path) -> Path:
    return shutil.copytree(ROOT / "csrc", tmp_path / "csrc")


def test_only_changed_sources_are_compiled_again(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, COMPILES))
    monkeypatch.delenv("CXXFLAGS", raising=False)
    build.compiler_version.cache_clear()
    library, calls = tmp_path / "lib" / build.LIBRARY, tmp_path / "calls"

    def count() -> int:
        return sum("-shared" in line for line in calls.read_text().splitlines())

    assert build.build(library, sources=sources) == library
    build.build(library, sources=sources)
    assert count() == 1
    header = sources / "common" / "vector.h"
    header.write_text(header.read_text() + "\n")
    build.build(library, sources=sources)
    assert count() == 2
    monkeypatch.setenv("CXXFLAGS", "-g")
    build.build(library, sources=sources)
    assert count() == 3
    assert [path.name for path in library.parent.iterdir()] == [build.LIBRARY]


def test_a_named_library_takes_the_place_of_the_package_s(sources, tmp_path, monkeypatch):
    """As `make sanitize` builds and loads one: the package's own is neither written nor looked at."""
    own = tmp_path / "package" / build.LIBRARY
    own.parent.mkdir()
    own.write_bytes(b"the package's own")
    monkeypatch.setattr(build, "PACKAGE", own.parent)
    monkeypatch.setattr(build, "source_folder", lambda: sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build.find_library() == own
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, COMPILES))
    build.compiler_version.cache_clear()
    named = tmp_path / "out" / "sanitize" / build.LIBRARY
    monkeypatch.setenv("FASTNCE_LIBRARY", str(named))
    assert build.find_library() is None
    assert "not built" in native._load()
    assert build.build() == named
    assert build.find_library() == named
    assert own.read_bytes() == b"the package's own"
    monkeypatch.delenv("FASTNCE_LIBRARY")
    assert build.find_library() == own


def test_flags_of_the_caller_have_the_last_word(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, COMPILES))
    monkeypatch.setenv("CXXFLAGS", "-O1 -fsanitize=address")
    build.compiler_version.cache_clear()
    build.build(tmp_path / "lib" / build.LIBRARY, sources=sources)
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    compiles = [call for call in calls if "-c" in call]
    assert compiles
    for call in compiles:
        assert [flag for flag in call if flag.startswith("-O")][-1] == "-O1"
    (link,) = (call for call in calls if "-shared" in call)
    assert "-fsanitize=address" in link


def test_a_failed_build_leaves_the_old_library(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, BROKEN))
    build.compiler_version.cache_clear()
    library = tmp_path / build.LIBRARY
    library.write_bytes(b"old")
    with pytest.raises(build.BuildError, match="exit code 3:(.|\n)*out of ideas"):
        build.build(library, sources=sources)
    assert library.read_bytes() == b"old"


def test_torch_that_cannot_be_seen(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match="torch cannot be seen.*fastnce build"):
        build.build(tmp_path / build.LIBRARY, sources=sources)


def test_a_folder_that_cannot_be_written_gives_way_to_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build.os, "access", lambda path, mode: False)
    assert tmp_path in build.writable_output(build.NATIVE).parents


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "not built"),
        (b"fastnce-build:0123;", "was built from other sources"),
        (b"not a library", "was built from other sources"),
    ],
)
def test_available_says_why_not(content, reason, tmp_path, monkeypatch):
    library = tmp_path / build.LIBRARY
    if content is not None:
        library.write_bytes(content)
    monkeypatch.setattr(build, "library_candidates", lambda _: [library])
    assert reason in native._load()
    assert native._load().endswith("Run: fastnce build")


def test_a_library_that_does_not_load_is_a_reason_not_an_exception(tmp_path, monkeypatch):
    library = tmp_path / build.LIBRARY
    stamp = build.source_hash(build.source_folder(), build.NATIVE)
    library.write_bytes(f"not ELF; fastnce-build:{stamp}-0;".encode())
    monkeypatch.setattr(build, "library_candidates", lambda _: [library])
    assert "cannot be loaded" in native._load()


CUDA_FILE = f"fastnce/{build_cuda.LIBRARY.file}"
GPU = "echo 9.0; echo 9.0"  # nvidia-smi's answer


def test_the_cuda_library_is_built_on_request(checkout, tmp_path):
    compilers = {
        "CXX": fake_compiler(tmp_path, COMPILES),
        "NVCC": fake_compiler(tmp_path, COMPILES, "nvcc"),
    }
    done = make_wheel(checkout, tmp_path / "with", **compilers, FASTNCE_CUDA="1")
    assert done.returncode == 0, done.stderr
    assert {CUDA_FILE, f"fastnce/{build.LIBRARY}"} <= names_in(only_wheel(tmp_path / "with"))
    done = make_wheel(checkout, tmp_path / "without", **compilers, FASTNCE_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert CUDA_FILE not in names_in(only_wheel(tmp_path / "without"))


def test_on_a_machine_with_a_gpu_the_cuda_library_is_built_for_that_gpu(checkout, tmp_path):
    fake_compiler(tmp_path / "bin", GPU, "nvidia-smi")
    compilers = {
        "CXX": fake_compiler(tmp_path, COMPILES),
        "NVCC": fake_compiler(tmp_path, COMPILES, "nvcc"),
    }
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = make_wheel(checkout, tmp_path, **compilers, PATH=path)
    assert done.returncode == 0, done.stderr
    assert CUDA_FILE in names_in(only_wheel(tmp_path))
    calls = (tmp_path / "calls").read_text()
    assert "code=[sm_90a]" in calls
    assert "sm_80" not in calls and "sm_100" not in calls


def test_a_gpu_without_a_cuda_compiler_is_no_obstacle_unless_forced(checkout, tmp_path):
    fake_compiler(tmp_path / "bin", GPU, "nvidia-smi")
    here = {
        "CXX": fake_compiler(tmp_path, COMPILES),
        "NVCC": "no-such-nvcc",
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }
    done = make_wheel(checkout, tmp_path, **here)
    assert done.returncode == 0, done.stderr
    names = names_in(only_wheel(tmp_path))
    assert CUDA_FILE not in names and f"fastnce/{build.LIBRARY}" in names
    done = make_wheel(checkout, tmp_path / "forced", **here, FASTNCE_CUDA="1")
    assert done.returncode != 0
    assert (
        "FASTNCE_CUDA=1, but there is no CUDA compiler 'no-such-nvcc'" in done.stdout + done.stderr
    )


@pytest.mark.parametrize(
    ("capability", "target"),
    [("8.0", "80"), ("8.9", "80"), ("9.0", "90a"), ("10.3", "100"), ("12.0", "120")],
)
def test_target_of_a_gpu(capability, target):
    assert build_cuda.target_of(capability) == target


def test_targets_are_those_named_else_those_of_this_machine_else_all(monkeypatch):
    monkeypatch.delenv("FASTNCE_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(build_cuda, "gpu_targets", lambda: ())
    assert build_cuda.targets() == build_cuda.TARGETS
    monkeypatch.setattr(build_cuda, "gpu_targets", lambda: ("90a",))
    assert build_cuda.targets() == ("90a",)
    monkeypatch.setenv("FASTNCE_CUDA_ARCHS", "80; 120")
    assert build_cuda.targets() == ("80", "120")
    monkeypatch.setenv("FASTNCE_CUDA_ARCHS", "80;hopper")
    with pytest.raises(build.BuildError, match="no target 'hopper'.*such as 80;90a;100"):
        build_cuda.targets()


def test_why_the_cuda_library_is_not_wanted(monkeypatch):
    monkeypatch.setattr(build_cuda, "gpu_targets", lambda: ())
    monkeypatch.delenv("FASTNCE_CUDA", raising=False)
    assert "no GPU" in build_cuda.wanted() and "FASTNCE_CUDA=1" in build_cuda.wanted()
    monkeypatch.setenv("FASTNCE_CUDA", "1")
    assert build_cuda.wanted() == "ok"
    monkeypatch.setenv("FASTNCE_CUDA", "0")
    assert build_cuda.wanted() == "FASTNCE_CUDA=0"
    monkeypatch.setenv("FASTNCE_CUDA", "yes")
    with pytest.raises(build.BuildError, match="FASTNCE_CUDA must be 0 or 1, got 'yes'"):
        build_cuda.wanted()


def test_version_is_written_in_one_place(checkout, tmp_path):
    version = importlib.import_module("fastnce").__version__
    done = make_wheel(checkout, tmp_path, FASTNCE_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert only_wheel(tmp_path).name.startswith(f"fastnce-{version}-")
