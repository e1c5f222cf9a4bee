"""Builds the native library, and where there is a GPU the CUDA library, into the package. The metadata is in pyproject.toml.

FASTNCE_NATIVE=1 and FASTNCE_CUDA=1 make a failed build an error, 0 skips it. Without either the package is installed as pure
Python where the libraries cannot be built, and `fastnce build` can do it later.
"""

import importlib
import os
import sys
import types
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def _build_modules():
    """fastnce/backends/build.py and fastnce/backends/build_cuda.py alone: the package itself would need torch."""
    package = types.ModuleType("fastnce_sources")
    package.__path__ = [str(ROOT / "fastnce" / "backends")]
    sys.modules[package.__name__] = package
    names = ("build", "build_cuda")
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


class DistributionWithLibraries(Distribution):
    """Belongs to one platform from the moment that it has a library."""

    libraries_built: tuple[Path, ...] = ()

    def has_ext_modules(self):
        return bool(self.libraries_built)


class build_libraries(Command):
    """Compiles csrc/ into the package that is being built."""

    description = "compile the native library and the CUDA library"
    user_options = []

    def initialize_options(self):
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        native, cuda = _build_modules()
        self.distribution.libraries_built = ()
        self._build(native, "FASTNCE_NATIVE", native.LIBRARY, native.BuildError)
        self._build(cuda, "FASTNCE_CUDA", cuda.LIBRARY.file, native.BuildError)

    def _build(self, module, variable, file, build_error):
        package = ROOT if self.editable_mode else Path(self.build_lib)
        library = package / "fastnce" / file
        try:
            if (reason := module.wanted()) != "ok":
                raise build_error(reason)
            self.distribution.libraries_built += (module.build(library, sources=ROOT / "csrc"),)
        except build_error as error:
            if not self.editable_mode:
                library.unlink(missing_ok=True)  # one from an earlier build
            if os.environ.get(variable) == "1":
                raise CompileError(f"{variable}=1, but {error}") from error
            self.warn(f"installing without {file}: {error}")

    def get_source_files(self):
        return [
            str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()
        ]

    def get_outputs(self):
        return [str(library) for library in self.distribution.libraries_built]

    def get_output_mapping(self):
        return {}


class build_with_libraries(build):
    sub_commands = [*build.sub_commands, ("build_libraries", None)]


class platform_wheel(bdist_wheel):
    """A wheel for one platform where it holds a library, which serves every Python; else a pure one."""

    def run(self):
        self.run_command("build")
        self.root_is_pure = not self.distribution.libraries_built
        super().run()

    def get_tag(self):
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


CSRC = ["fastnce.csrc", "fastnce.csrc.cpu", "fastnce.csrc.cuda"]
SOURCES = ["*.cpp", "*.h", "*.cu", "*.cuh"]

setup(
    distclass=DistributionWithLibraries,
    ext_modules=[],
    packages=[*find_packages(include=["fastnce", "fastnce.*"]), *CSRC, "fastnce.triton_kernels"],
    # The bare name belongs to another project.
    package_dir={"fastnce.csrc": "csrc", "fastnce.triton_kernels": "triton_kernels"},
    package_data=dict.fromkeys(CSRC, SOURCES) | {"fastnce.viz": ["*.css", "*.js"]},
    cmdclass={
        "build": build_with_libraries,
        "build_libraries": build_libraries,
        "bdist_wheel": platform_wheel,
    },
)
