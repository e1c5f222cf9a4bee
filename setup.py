"""Builds the native library into the package. The metadata is in pyproject.toml.

FASTNCE_NATIVE=1 makes a failed build an error, FASTNCE_NATIVE=0 skips it. Without either the package is installed as pure
Python where the library cannot be built, and `fastnce build` can do it later.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def _load_build_module():
    """fastnce/build.py alone: importing the package would need torch."""
    spec = importlib.util.spec_from_file_location("fastnce_build", ROOT / "fastnce" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class DistributionWithLibrary(Distribution):
    """Belongs to one platform from the moment that it has the library."""

    library: Path | None = None

    def has_ext_modules(self):
        return self.library is not None


class build_native(Command):
    """Compiles csrc/ into the package that is being built."""

    description = "compile the native library"
    user_options = []

    def initialize_options(self):
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    @property
    def library(self) -> Path:
        package = ROOT if self.editable_mode else Path(self.build_lib)
        return package / "fastnce" / _load_build_module().LIBRARY

    def run(self):
        native = _load_build_module()
        wanted = os.environ.get("FASTNCE_NATIVE", "")
        try:
            if wanted == "0":
                raise native.BuildError("FASTNCE_NATIVE=0")
            self.distribution.library = native.build(self.library, sources=ROOT / "csrc")
        except native.BuildError as error:
            if not self.editable_mode:
                self.library.unlink(missing_ok=True)  # one from an earlier build
            if wanted == "1":
                raise CompileError(f"FASTNCE_NATIVE=1, but {error}") from error
            self.warn(f"installing without the native library: {error}")

    def get_source_files(self):
        return [
            str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()
        ]

    def get_outputs(self):
        return [str(self.library)] if self.distribution.library else []

    def get_output_mapping(self):
        return {}


class build_with_native(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]


class platform_wheel(bdist_wheel):
    """A wheel for one platform where it holds the library, which serves every Python; else a pure one."""

    def run(self):
        self.run_command("build")
        self.root_is_pure = self.distribution.library is None
        super().run()

    def get_tag(self):
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


CSRC = ["fastnce.csrc", "fastnce.csrc.common", "fastnce.csrc.cpu"]

setup(
    distclass=DistributionWithLibrary,
    ext_modules=[],
    packages=[*find_packages(include=["fastnce", "fastnce.*"]), *CSRC, "fastnce.triton_kernels"],
    # The bare name belongs to another project.
    package_dir={"fastnce.csrc": "csrc", "fastnce.triton_kernels": "triton_kernels"},
    package_data={name: ["*.cpp", "*.h"] for name in CSRC} | {"fastnce.viz": ["*.css", "*.js"]},
    cmdclass={
        "build": build_with_native,
        "build_native": build_native,
        "bdist_wheel": platform_wheel,
    },
)
