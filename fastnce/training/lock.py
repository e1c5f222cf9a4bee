"""One training at a time in a run's folder."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from fastnce.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_held: set[int] = set()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context in which no other process has the folder; made if it is not there.

    The system releases the lock when the process ends, however it ends. On file systems without locks there is none.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _lock(folder / ".lock")
    except OSError:  # what is really in the way is said when the first file is written
        handle = None
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                (folder / ".lock").unlink()
            _held.discard(handle)
            os.close(handle)
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if nothing was written


def _lock(path: Path) -> int | None:
    """The open file that holds the lock; None where files cannot be locked."""
    if fcntl is None:
        return None
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
            os.close(handle)
            raise UserError(
                f"out={path.parent} is in use: {who} is training there. Wait for it, end it, or name another folder."
            ) from None
        except OSError:
            os.close(handle)
            raise
        try:
            current = os.stat(path).st_ino == os.fstat(handle).st_ino
        except FileNotFoundError:
            current = False
        if current:
            break
        os.close(handle)  # its holder removed it while we opened it
    _held.add(handle)
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return handle


def _close_inherited() -> None:
    """In a data worker: it must not hold the lock of a training that was killed."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)
