"""Mistakes made on purpose, each in a copy of the code, and the test that sees it: ``python -m tests.faults --help``.

A file beside this one holds the faults of an area, and at its top what they share. The keys are those of `Fault`.
"""

import argparse
import contextlib
import dataclasses
import os
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    title: str  # area: name
    old: str  # the text that is replaced, which one of `files` holds once
    new: str
    files: str  # patterns, apart by blanks
    tests: str  # what pytest is given first
    wide: str  # what it is given where these see nothing, or are not there any more
    build: str = ""  # arguments of Python that compile what the fault is in
    env: dict[str, str] = dataclasses.field(default_factory=dict)  # of pytest

    def place(self, folder: Path) -> Path | None:
        """The file to change; None, and a line that says so, unless its text is found once."""
        paths = {path for pattern in self.files.split() for path in folder.glob(pattern)}
        counts = {path: path.read_text(encoding="utf-8").count(self.old) for path in paths}
        if sum(counts.values()) != 1:
            print(f"{self.title}: its text is found {sum(counts.values())} times", flush=True)
            return None
        return max(counts, key=counts.__getitem__)


def read_faults() -> dict[str, list[Fault]]:
    """By area."""
    found = {}
    for path in sorted(HERE.glob("*.toml")):
        shared = tomllib.loads(path.read_text(encoding="utf-8"))
        each = shared.pop("fault")
        found[path.stem] = [
            Fault(title=f"{path.stem}: {fault.pop('name')}", **shared | fault) for fault in each
        ]
    return found


class Copy:
    """A copy of a tree, kept from call to call with what was compiled in it."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self.folder = folder
        self.built = ""  # what was compiled last, perhaps with a fault
        listed = subprocess.run(["git", "-C", tree, "ls-files"], stdout=subprocess.PIPE, check=True)
        names = {name for name in listed.stdout.decode().splitlines() if (tree / name).is_file()}
        for part in {name.split("/")[0] for name in names}:  # what is compiled elsewhere stays
            shutil.rmtree(folder / part, ignore_errors=True)
        for name in [*names, *(x.relative_to(tree) for x in tree.glob("fastnce/*.so"))]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, folder / name)

    @contextlib.contextmanager
    def with_fault(self, fault: Fault) -> Iterator[None]:
        path = fault.place(self.folder)
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(text, encoding="utf-8")

    def run(self, words: list[str], env: dict[str, str]) -> tuple[int, list[str]]:
        """The exit code of Python, 124 where it took too long, and the lines that it wrote."""
        env = os.environ | {"PYTHONPATH": str(self.folder), "COLUMNS": "1000"} | env
        command = ["timeout", "-k", "10", "900", sys.executable, *words]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, cwd=self.folder, env=env, errors="replace", **how)
        return done.returncode, done.stdout.splitlines()

    def build(self, fault: Fault) -> None:
        for build in {self.built, fault.build} - {""}:
            code, lines = self.run(shlex.split(build), {})
            if code != 0:
                raise RuntimeError("\n".join([f"{fault.title}: does not build", *lines[-30:]]))
        self.built = fault.build

    def seen_by(self, tests: str, env: dict[str, str]) -> str:
        """The first test that fails, hangs or crashes; "" if none does, or none is chosen."""
        words = shlex.split(tests)
        paths = {word for word in words if word.startswith("tests/")}
        there = {path for path in paths if (self.folder / path.split("::")[0]).exists()}
        if not there:
            return ""
        words = [word for word in words if word not in paths - there]
        code, lines = self.run(["-m", "pytest", "-x", "-v", "-p", "no:cacheprovider", *words], env)
        failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        if failed or code in (0, 5):  # 5: none is chosen
            return failed[0].split(" ", 1)[1].split(" - ")[0] if failed else ""
        begun = [line.split(" ")[0] for line in lines if line.startswith("tests/")] or lines[-1:]
        return f"{begun[-1]} ({'hangs' if code == 124 else f'ends with {code}'})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    add = parser.add_argument
    add("--tree", type=Path, default=ROOT, help="checkout that is copied; by default this one")
    add("--area", default="", help="faults of areas with this in their name")
    add("--only", default="", help="faults with this in their name")
    add("--out", type=Path, default=ROOT / "out/faults.md", help="table; what it has is left out")
    add("--jobs", type=int, default=1, help="faults at once, each in a copy of its own")
    add("--list", action="store_true", help="only name the faults whose text is not found")
    given = parser.parse_args()
    areas = read_faults()
    if given.list:
        for fault in sum(areas.values(), []):
            fault.place(given.tree)
        return
    copies: queue.Queue[Copy] = queue.Queue()
    for job in range(given.jobs):
        name = f"{given.tree.resolve().name}_{job}"
        copies.put(Copy(given.tree, ROOT / "out/faults" / name))
    lines = given.out.read_text(encoding="utf-8").splitlines() if given.out.exists() else []
    rows = dict(line.strip("| ").split(" | ", 1) for line in lines[2:])
    lock = threading.Lock()

    def note(title: str, text: str) -> None:
        with lock:
            print(f"{title} | {text}", flush=True)
            rows[title] = text
            titles = [x for a in areas for x in (f"{a}: no fault", *(y.title for y in areas[a]))]
            table = [f"| {title} | {rows[title]} |" for title in titles if title in rows]
            given.out.write_text("\n".join(["| fault | seen by |", "|---|---|", *table, ""]))

    def look(fault: Fault) -> None:
        copy = copies.get()
        with copy.with_fault(fault):
            copy.build(fault)
            seen = copy.seen_by(fault.tests, fault.env) or copy.seen_by(fault.wide, fault.env)
        copies.put(copy)
        note(fault.title, f"`{seen}`" if seen else "not seen")

    def look_again(area: str) -> None:
        """At the tests that saw something, without a fault."""
        copy, faults = copies.get(), areas[area]
        copy.build(faults[0])
        found = dict.fromkeys(rows[x.title].strip("`") for x in faults if x.title in rows)
        tests = [x for x in found if x.startswith("tests/") and " (" not in x]
        failing = copy.seen_by(shlex.join(tests), faults[0].env)
        copies.put(copy)
        note(f"{area}: no fault", f"{failing or 'none'} of the {len(tests)} tests below")

    chosen = {}
    for area, faults in areas.items():
        some = [x for x in faults if given.area in area and given.only in x.title]
        chosen[area] = [x for x in some if x.title not in rows and x.place(given.tree)]
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(look, sum(chosen.values(), [])))
        list(pool.map(look_again, [area for area in chosen if chosen[area]]))


if __name__ == "__main__":
    main()
