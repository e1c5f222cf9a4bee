"""No import of the package leads back to where it began, lazy ones included; importing it stays light."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import fastnce

PACKAGE = Path(fastnce.__file__).parent
ROOTS = [PACKAGE, PACKAGE.parent / "triton_kernels", PACKAGE.parent / "benchmarks"]
# What the losses must not need.
HEAVY = {"PIL", "tqdm", "tyro", "matplotlib", "torchvision", "sklearn", "skimage", "torchmetrics"}


def modules() -> dict[str, Path]:
    """Files by their dotted names; a package has the name of its folder."""
    found = {}
    for root in ROOTS:
        for path in root.rglob("*.py"):
            parts = path.relative_to(root.parent).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if parts[0] == "triton_kernels":
                parts = ("fastnce", *parts)
            found[".".join(parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ``known`` that a file imports, also inside functions; of a package, only what it is asked for itself."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return found & known.keys()


def test_no_import_leads_back():
    known = modules()
    graph = {name: imports(name, path, known) for name, path in known.items()}
    assert "fastnce.errors" in graph["fastnce.cli.parsing"]  # imports are seen at all
    graphlib.TopologicalSorter(graph).prepare()  # raises with the names along a cycle


@pytest.mark.parametrize("start", ["fastnce", "fastnce.models", "fastnce.distributed"])
def test_the_losses_and_models_are_light(start):
    """What PyTorch itself imports, where it is installed, does not count: tqdm."""
    code = (
        f"import sys, torch; before = set(sys.modules); import {start}; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "fastnce" in loaded
    assert not loaded & HEAVY
