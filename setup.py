"""Builds the native library, and where there is a GPU the CUDA library, into the package. The metadata is in pyproject.toml.

FASTNCE_NATIVE=1 and FASTNCE_CUDA=1 make a failed build an error, 0 skips it. Without either the package is installed as pure
Python where the libraries cannot be built, and `fastnce build` can do it later.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = [
    "fastnce.csrc",
    *(f"fastnce.csrc.{p.name}" for p in (ROOT / "csrc").iterdir() if p.is_dir()),
]


def _building():
    """fastnce/backends/build.py alone: the package itself would need torch."""
    file = ROOT / "fastnce" / "backends" / "build.py"
    spec = importlib.util.spec_from_file_location("fastnce_building", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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
        building = _building()
        package = ROOT if self.editable_mode else Path(self.build_lib)
        self.distribution.libraries_built = ()
        for library in (building.NATIVE, building.CUDA):
            output = package / "fastnce" / library.file
            try:
                if (reason := building.wanted(library)) != "ok":
                    raise building.BuildError(reason)
                made = building.build(library, output, sources=ROOT / "csrc")
                self.distribution.libraries_built += (made,)
            except building.BuildError as error:
                if not self.editable_mode:
                    output.unlink(missing_ok=True)  # one from an earlier build
                if os.environ.get(library.switch) == "1":
                    raise CompileError(f"{library.switch}=1, but {error}") from error
                self.warn(f"installing without {library.file}: {error}")


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


setup(
    distclass=DistributionWithLibraries,
    ext_modules=[],
    packages=[*find_packages(include=["fastnce", "fastnce.*"]), *CSRC, "fastnce.triton_kernels"],
    # The bare name belongs to another project.
    package_dir={"fastnce.csrc": "csrc", "fastnce.triton_kernels": "triton_kernels"},
    package_data=dict.fromkeys(CSRC, ["*.cpp", "*.h", "*.cu", "*.cuh"])
    | {"fastnce.viz": ["*.css", "*.js"], "fastnce.verification": ["results/*.json"]},
    cmdclass={
        "build": build_with_libraries,
        "build_libraries": build_libraries,
        "bdist_wheel": platform_wheel,
    },
)
