"""Building and installing: with a compiler, without one, where the choice is forced, and when something has changed."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastnce
from fastnce.backends import build

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("fastnce", "triton_kernels", "csrc", "setup.py", "pyproject.toml", "LICENSE")

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="needs a checkout, not an installed package"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources, so that nothing is built in the real ones."""
    copy = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, copy)
    (copy / "README.md").touch()
    return copy


def environment_with(**changes: str) -> dict[str, str]:
    own = ("CXX", "CXXFLAGS", "NVCC", "NVCCFLAGS", "CUDA_HOME")
    kept = {k: v for k, v in os.environ.items() if k not in own and not k.startswith("FASTNCE_")}
    return {**kept, **changes}


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment_with(**environment),
        capture_output=True,
        text=True,
    )


def make_wheel(checkout: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet", "-w", str(folder))
    return run("-m", "pip", "wheel", ".", *options, cwd=checkout, **environment)


def wheel_of(checkout: Path, folder: Path, **environment: str) -> tuple[Path, set[str]]:
    """The one wheel, and what is in it."""
    done = make_wheel(checkout, folder, **environment)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel, set(archive.namelist())


def program(folder: Path, script: str, name: str = "compiler") -> str:
    """A program that logs that it was called, then does as the script says."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f'#!/bin/sh\necho "$@" >> {folder / "calls"}\n{script}\n')
    file.chmod(0o755)
    return str(file)


WRITES = """
while [ $# -gt 0 ]; do
  case "$1" in -o) : > "$2" ;; esac
  shift
done
"""
BROKEN = '[ "$1" = --version ] || { echo "ops.cpp:1: error: out of ideas" >&2; exit 3; }'
NATIVE, CUDA = (f"fastnce/{library.file}" for library in (build.NATIVE, build.CUDA))


def test_without_a_compiler_the_wheel_is_pure_and_works(checkout, tmp_path):
    wheel, names = wheel_of(checkout, tmp_path, CXX="no-such-compiler")
    assert wheel.name == f"fastnce-{fastnce.__version__}-py3-none-any.whl"
    assert not [name for name in names if name.endswith(".so")]
    sources = {f"fastnce/{p.relative_to(ROOT)}" for p in (ROOT / "csrc").rglob("*.*")}
    kernels = {f"fastnce/{p.relative_to(ROOT)}" for p in (ROOT / "triton_kernels").glob("*.py")}
    assert len(sources) > 50 and sources <= names, "`fastnce build` needs the sources"
    assert len(kernels) > 10 and kernels <= names
    assert {"fastnce/viz/gallery.css", "fastnce/viz/gallery.js"} <= names
    assert f"fastnce-{fastnce.__version__}.dist-info/licenses/LICENSE" in names
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        "import torch, fastnce, fastnce.triton_kernels as kernels; print(kernels.__file__); "
        "print(fastnce.info_nce(torch.eye(3), torch.eye(3)).item() > 0); "
        "print(fastnce.backends.available()['native'])"
    )
    site, cache = str(tmp_path / "site"), str(tmp_path / "cache")
    done = run("-c", script, cwd=tmp_path, PYTHONPATH=site, XDG_CACHE_HOME=cache)
    assert done.returncode == 0, done.stderr
    file, works, reason = done.stdout.splitlines()
    assert file == f"{site}/fastnce/triton_kernels/__init__.py"
    assert works == "True"
    assert reason.endswith("fastnce build")


def test_the_wheel_has_what_this_machine_can_build(checkout, tmp_path):
    """On one with a GPU, for that GPU; nothing is left over for the next one."""
    program(tmp_path, "echo 9.0; echo 9.0", "nvidia-smi")
    here = {
        "CXX": program(tmp_path, WRITES),
        "NVCC": program(tmp_path, WRITES, "nvcc"),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    for index, (change, libraries) in enumerate(
        [
            ({}, {NATIVE, CUDA}),
            ({"NVCC": "no-such-nvcc"}, {NATIVE}),
            ({"FASTNCE_NATIVE": "0", "FASTNCE_CUDA": "0"}, set()),
        ]
    ):
        wheel, names = wheel_of(checkout, tmp_path / str(index), **here | change)
        assert {NATIVE, CUDA} & names == libraries
        assert "-py3-none-" in wheel.name
        assert wheel.name.endswith("-any.whl") == (not libraries)
        assert not [name for name in names if name.endswith((".o", ".ninja"))]
    calls = (tmp_path / "calls").read_text()
    assert "code=[sm_90a]" in calls
    assert "sm_80" not in calls and "sm_100" not in calls


@pytest.mark.parametrize("message", ["error: out of ideas", "pip install ninja"])
def test_what_is_missing_is_no_obstacle_unless_forced(checkout, tmp_path, message):
    here = {"CXX": program(tmp_path, BROKEN)}
    if "ninja" in message:
        (tmp_path / "ninja.py").touch()  # in place of the package
        folder = str(tmp_path)
        here = {"CXX": program(tmp_path, WRITES), "PATH": folder, "PYTHONPATH": folder}
    wheel, _ = wheel_of(checkout, tmp_path, **here)
    assert wheel.name.endswith("-any.whl")
    done = make_wheel(checkout, tmp_path / "forced", **here, FASTNCE_NATIVE="1")
    assert done.returncode != 0
    assert "FASTNCE_NATIVE=1" in done.stderr and message in done.stderr


def test_the_kernels_are_found_beside_the_package_and_nothing_else_is():
    script = (
        "import fastnce.triton_kernels.config as c; print(c.__file__)\n"
        "try:\n import fastnce.tests\nexcept ModuleNotFoundError as error: print(error.name)"
    )
    done = run("-c", script, cwd=ROOT.parent, PYTHONPATH=str(ROOT))
    assert done.stdout.splitlines() == [str(ROOT / "triton_kernels/config.py"), "fastnce.tests"]


def test_every_source_is_counted_where_a_library_is_compared_with_them():
    counted = {
        file
        for library in (build.NATIVE, build.CUDA)
        for pattern in library.sources
        for file in (ROOT / "csrc").glob(pattern)
    }
    assert counted == {file for file in (ROOT / "csrc").rglob("*") if file.is_file()}


# As setup.py has it: without the package, and so without torch.
ALONE = f"import runpy; build = runpy.run_path({build.__file__!r}); "
# A library that compiles in a moment.
SMALL = {
    "cpu/ops.cpp": '#include "both.h"\nint ops() { return both; }\n',
    "cpu/both.h": "const int both = 2;\n",
    "cpu/one.cpp": '#include "both.h"\n#include "one.h"\nint x() { return one + both; }\n',
    "cpu/one.h": "const int one = 1;\n",
    "cpu/two.cpp": '#include "both.h"\nint two() { return both; }\n',
}


class Small:
    """The small library, and what of it a build has made again."""

    def __init__(self, folder: Path):
        self.sources, self.objects = folder / "csrc", folder / "objects"
        self.output = folder / "lib" / "small.so"
        for name, text in SMALL.items():
            (self.sources / name).parent.mkdir(parents=True, exist_ok=True)
            (self.sources / name).write_text(text)

    def build(self) -> set[str]:
        before = self._times()
        build.build(build.NATIVE, self.output, sources=self.sources, folder=self.objects)
        now = self._times()
        return {name.name.removesuffix(".o") for name in now if now[name] != before.get(name)}

    def _times(self) -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in self.objects.rglob("*.o")}

    def change(self, name: str) -> None:
        file = self.sources / name
        file.write_text(f"{file.read_text()}\n")


@pytest.fixture
def small(tmp_path, monkeypatch) -> Small:
    for name in ("CXX", "CXXFLAGS", "FASTNCE_LIBRARY"):
        monkeypatch.delenv(name, raising=False)
    build.compiler_version.cache_clear()
    return Small(tmp_path)


def test_only_what_has_changed_is_compiled_again(small):
    assert small.build() == {"ops.cpp", "one.cpp", "two.cpp"}
    assert small.build() == set()
    for changed, again in (
        ("cpu/two.cpp", {"two.cpp"}),
        ("cpu/one.h", {"one.cpp"}),
        ("cpu/both.h", {"ops.cpp", "one.cpp", "two.cpp"}),
    ):
        small.change(changed)
        assert small.build() == again, changed
        assert small.build() == set()
    assert [path.name for path in small.output.parent.iterdir()] == [small.output.name]


def test_flags_of_the_caller_are_seen_and_have_the_last_word(small, tmp_path, monkeypatch):
    small.build()
    monkeypatch.setenv("CXX", program(tmp_path / "bin", 'exec g++ "$@"'))
    monkeypatch.setenv("CXXFLAGS", "-O1 -fsanitize=address")
    assert small.build() == {"ops.cpp", "one.cpp", "two.cpp"}
    calls = [line.split() for line in (tmp_path / "bin/calls").read_text().splitlines()]
    compiles = [call for call in calls if "-c" in call]
    assert len(compiles) == 3
    for call in compiles:
        assert [flag for flag in call if flag.startswith("-O")][-1] == "-O1"
    (link,) = (call for call in calls if "-shared" in call)
    assert "-fsanitize=address" in link


def test_a_change_that_is_no_newer_is_seen(small):
    """As a file is that was unpacked, or copied with its time."""
    small.build()
    file = small.sources / "cpu/one.h"
    file.write_text("const int one = 11;\n")
    os.utime(file, (1, 1))
    assert "one.cpp" in small.build()


def test_two_that_build_at_once_compile_once(small, tmp_path):
    compiler = program(tmp_path / "bin", 'exec g++ "$@"')
    paths = f"Path({str(small.sources)!r}), folder=Path({str(small.objects)!r})"
    code = f"{ALONE}from pathlib import Path; build['build'](sources={paths})"
    environment = environment_with(CXX=compiler, FASTNCE_LIBRARY=str(small.output))
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    calls = (tmp_path / "bin/calls").read_text().splitlines()
    assert sum(" -c " in call for call in calls) == 3
    assert sum("-shared" in call for call in calls) == 1


def test_a_failed_build_leaves_the_old_library_and_says_what_failed(small):
    small.build()
    old = small.output.read_bytes()
    file = small.sources / "cpu/two.cpp"
    file.write_text("int two() { return three; }\n")
    with pytest.raises(build.BuildError, match="three"):
        small.build()
    assert small.output.read_bytes() == old


def test_torch_that_cannot_be_seen(tmp_path):
    # -S: without the installed packages
    done = run("-S", "-c", f"{ALONE}build['build']()", cwd=tmp_path)
    assert "torch cannot be seen" in done.stderr and "fastnce build" in done.stderr


def test_a_folder_that_cannot_be_written_gives_way_to_the_cache(small, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and allowed(path, mode))
    library = build.build(sources=small.sources)
    assert tmp_path / "cache" in library.parents
    assert library in build.library_candidates()


def availability(library: Path) -> str:
    code = "from fastnce import backends; print(backends.available()['native'])"
    done = run("-c", code, cwd=ROOT, FASTNCE_LIBRARY=str(library), PYTHONPATH=str(ROOT))
    return done.stdout.strip()


def test_a_named_library_takes_the_place_of_the_package_s(small, tmp_path, monkeypatch):
    """As `make sanitize` builds and loads one; why it cannot be used is a reason, not an exception."""
    named = tmp_path / "named" / "some.so"
    monkeypatch.setenv("FASTNCE_LIBRARY", str(named))
    assert build.find_library() is None
    assert "not built" in availability(named)
    assert build.build(sources=small.sources, folder=small.objects) == named
    assert build.find_library() == named
    assert "built from other sources" in availability(named)
    stamp = build.source_hash(ROOT / "csrc", build.NATIVE.sources)
    named.write_bytes(f"not ELF; fastnce-build:{stamp};".encode())
    assert "cannot be loaded" in availability(named)


def test_targets_are_those_named_else_those_of_this_machine_else_all(tmp_path, monkeypatch):
    capabilities = "8.9 9.0 10.3 12.0 8.0"
    program(tmp_path, f"printf '%s\\n' {capabilities}", "nvidia-smi")

    def targets(**environment: str) -> str:
        done = run("-c", f"{ALONE}print(*build['targets']())", cwd=tmp_path, **environment)
        return done.stdout.strip() or done.stderr.splitlines()[-1]

    assert targets(PATH="/nowhere").split() == list(build.TARGETS)
    assert targets(PATH=f"{tmp_path}:{os.environ['PATH']}") == "80 90a 100 120"
    assert targets(FASTNCE_CUDA_ARCHS="80; 120") == "80 120"
    refused = targets(FASTNCE_CUDA_ARCHS="80;hopper")
    assert "FASTNCE_CUDA_ARCHS" in refused and "'hopper'" in refused


@pytest.mark.parametrize(
    ("switch", "gpus", "answer"),
    [
        ("", (), "no GPU.*FASTNCE_CUDA=1"),
        ("", ("80",), "ok"),
        ("1", (), "ok"),
        ("0", ("80",), "=0"),
    ],
)
def test_why_the_cuda_library_is_not_wanted(monkeypatch, switch, gpus, answer):
    monkeypatch.setattr(build, "gpu_targets", lambda: gpus)
    monkeypatch.setenv("FASTNCE_CUDA", switch)
    assert re.search(answer, build.wanted(build.CUDA))


def test_a_switch_is_0_or_1(monkeypatch):
    monkeypatch.setenv("FASTNCE_NATIVE", "yes")
    with pytest.raises(build.BuildError, match="FASTNCE_NATIVE.*'yes'"):
        build.wanted(build.NATIVE)
