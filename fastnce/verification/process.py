"""Child processes with a time limit: an illegal access or a kernel that hangs costs the op in progress, and not the user's context."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import IO, Any

from fastnce.backends.build import PACKAGE
from fastnce.backends.verdicts import Task

# Seconds for a process to start, on a busy machine.
_START = 60.0
Fields = dict[str, Any]  # of an Entry
Tell = Callable[[Task, Fields], None]


class Limit:
    """When to stop, a time of ``time.monotonic``; 0 stops at once."""

    def __init__(self, end: float) -> None:
        self.end = end

    @property
    def seconds(self) -> float:
        """That are left."""
        return self.end - time.monotonic()


def run(
    request: dict[str, Any], tasks: list[Task], limit: Limit, patience: float, tell: Tell
) -> None:
    """Works through ``tasks``, in a new process after each that has ended early.

    Args:
        request: what ``fastnce.verification.child`` reads, but for the tasks.
        tasks: in order.
        limit: what is not finished by then is left out.
        patience: seconds without a line from the process after which it is ended.
        tell: called for each task that was finished, or that ended its process.
    """
    left = list(tasks)
    while left and limit.seconds > 0:
        count = len(left)
        with tempfile.TemporaryFile() as log:
            child = _Child({**request, "tasks": left}, log)
            try:
                blame = _serve(child, left, limit, patience, tell)
            finally:
                child.end()
        if blame is None and len(left) == count and limit.seconds > 0:
            blame = {"status": "failed", "reason": "a process has ended without an answer"}
        if blame is not None:
            # What cannot even start cannot start for the others.
            ended = len(left) if child.at == "starting" else 1
            for task in left[:ended]:
                tell(task, blame)
            del left[:ended]


def _serve(
    child: _Child, left: list[Task], limit: Limit, patience: float, tell: Tell
) -> Fields | None:
    """Takes the finished tasks off ``left``; returns what to say of the next one if it has ended the process."""
    heard = time.monotonic()
    while True:
        try:
            line = child.lines.get(timeout=min(0.5, patience))
        except queue.Empty:
            if limit.seconds <= 0:
                return None
            if time.monotonic() - heard < (_START if child.at == "starting" else patience):
                continue
            return {"status": "hung", "reason": f"{child.at}: no answer for {patience:.0f} s"}
        heard = time.monotonic()
        if line is None:
            return child.crash()
        answer = json.loads(line)
        if "in" in answer:
            child.at = answer["in"]
        else:
            child.at = "between cases"
            tell(left.pop(0), answer)


class _Child:
    """A process, and the lines that it writes; ``at`` is the last case that it has begun with and not finished."""

    def __init__(self, request: dict[str, Any], log: IO[bytes]) -> None:
        self.at, self._log = "starting", log
        self.lines: queue.Queue[str | None] = queue.Queue()
        paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONOPTIMIZE": "",  # would take the checks out
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastnce.verification.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | environment,
            start_new_session=True,
        )
        threading.Thread(target=self._read, args=(json.dumps(request),), daemon=True).start()

    def _read(self, request: str) -> None:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.write(request + "\n")  # and stays open, for the child ends with it
            process.stdin.flush()
        for line in process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def crash(self) -> Fields | None:
        """What to say of a process that has closed its output; None if it has ended well."""
        code = self._process.wait()
        if code == 0:
            return None
        how = f"signal {-code}" if code < 0 else f"status {code}"
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()
        last = f", {said[-1][:300]}" if said and code > 0 else ""
        return {"status": "crashed", "reason": f"{self.at}: {how}{last}"}

    def end(self) -> None:
        """Ends the process and those that it has started."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                if hasattr(os, "killpg"):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.kill()
            self._process.wait()
