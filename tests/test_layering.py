"""Imports point one way, and importing the package stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastnce

ROOT = Path(fastnce.__file__).parent

# What the modules under each name of the package may import from it, besides themselves and `errors`.
KERNELS = {
    "reference",
    "triton_kernels",
    "triton_ops",
    "cuda",
    "native",
    "native_maps",
    "operators",
    "fakes",
}
OPS = {"ops", "backends", "dispatch"} | KERNELS
LOSSES = {"losses"} | OPS
NETWORKS = {"networks", "__init__"} | LOSSES  # the package itself offers the ops and the losses
MODELS = {"models", "distributed"} | NETWORKS
SIDE = {"data", "metrics", "viz"}
TRAINING = {"training"} | SIDE | MODELS
ALLOWED = {
    "errors": set(),
    "waiting": set(),
    "reference": set(),
    "triton_kernels": set(),
    "build": set(),
    "build_cuda": {"build"},
    "operators": set(),
    "fakes": set(),
    "native": {"build", "operators", "fakes"},
    "native_maps": {"native", "fakes"},
    "cuda": {"build", "build_cuda", "operators", "fakes"},
    "triton_schemas": set(),
    "triton_ops": {"triton_schemas", "triton_kernels", "operators", "fakes"},
    "dispatch": set(),
    "backends": KERNELS | {"dispatch"},
    "ops": OPS,
    "losses": LOSSES,
    "distributed": {"distributed"} | LOSSES,
    "networks": NETWORKS,
    "models": MODELS,
    "data": NETWORKS | SIDE,
    "metrics": NETWORKS | SIDE,
    "viz": NETWORKS | SIDE,
    "training": TRAINING,
    "doctor": TRAINING | {"build", "build_cuda", "waiting"},
    "cli": TRAINING | {"doctor", "build", "build_cuda"},
    "__main__": {"cli"},
    "__init__": LOSSES | {"waiting"},
    "testing_samples": set(),
    "testing": LOSSES | {"__init__", "testing_samples"},
}
BELOW_MODELS = {"errors", "build", "build_cuda", "distributed"} | NETWORKS
BELOW_MODELS |= {"testing", "testing_samples"}
HEAVY = {"PIL", "tqdm", "tyro", "matplotlib", "torchvision", "sklearn", "skimage", "torchmetrics"}


def modules() -> list[Path]:
    found = set(ROOT.rglob("*.py"))
    beside = ROOT.parent / "triton_kernels"  # in a checkout
    return sorted(found | set(beside.glob("*.py")))


def inside(path: Path) -> Path:
    """Where a file is in the package; the kernels lie beside it in a checkout."""
    return path.relative_to(ROOT if path.is_relative_to(ROOT) else ROOT.parent)


def stem(path: Path) -> str:
    """The name right under the package that a file belongs to."""
    first = inside(path).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, also inside functions."""
    package = ["fastnce", *inside(path).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    """The names right under the package that a file imports from; `__init__` for the package itself."""
    found = set()
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "fastnce":
            known = len(parts) > 1 and (
                parts[1] == "triton_kernels"
                or (ROOT / parts[1]).is_dir()
                or (ROOT / f"{parts[1]}.py").exists()
            )
            found.add(parts[1] if known else "__init__")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(inside(path)))
def test_imports_point_one_way(path):
    name = stem(path)
    assert name in ALLOWED, f"{name} has no place in the layers yet: give it one in this test"
    wrong = own_imports(path) - ALLOWED[name] - {name, "errors"}
    assert not wrong, f"{inside(path)} must not import {wrong}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(inside(path)))
def test_nothing_below_models_imports_heavy_packages(path):
    tops = {name.split(".")[0] for name in imported(path)}
    assert "torchvision" not in tops
    if stem(path) in BELOW_MODELS:
        assert not tops & HEAVY
    if stem(path) in KERNELS:
        own = {"fastnce", "torch", "triton"} | set(sys.stdlib_module_names)
        assert not tops - own, f"kernels import torch and triton only, not {tops - own}"


def test_the_check_itself_sees_imports(tmp_path):
    """Against a checker that finds nothing because it reads nothing."""
    assert own_imports(ROOT / "losses.py") == {"ops"}
    assert "backends" in own_imports(ROOT / "ops" / "info_nce.py")
    kernels = [path for path in modules() if stem(path) == "triton_kernels"]
    assert len(kernels) > 10
    assert own_imports(next(x for x in kernels if x.name == "sup_con.py")) == {"triton_kernels"}
    assert "reference" in own_imports(ROOT / "reference" / "info_nce.py")
    assert own_imports(ROOT / "testing.py") >= {"__init__", "reference"}


def test_import_is_light():
    """What PyTorch itself imports, where it is installed, does not count: tqdm."""
    code = (
        "import sys, torch; before = set(sys.modules); import fastnce; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "fastnce" in loaded
    assert not loaded & HEAVY
