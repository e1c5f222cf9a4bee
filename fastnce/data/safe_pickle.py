"""Reading pickled arrays of bytes without giving the file anything to run.

A pickle is a program: it names functions of any module and has them called. `load_pickled_bytes` lets it name the parts
of NumPy that an array is pickled with, gives it stand-ins for these that only keep what they are handed, and refuses
every other name.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from fastnce.errors import UserError


def load_pickled_bytes(path: Path) -> dict[str, Any]:
    """Reads a pickled dictionary of plain values and arrays of uint8, written by Python 2 or 3.

    Args:
        path: The file.

    Returns:
        Its entries; text of Python 2 is bytes, except for the keys.

    Raises:
        UserError: If the file cannot be read, holds something else, or names something that such a dictionary
            does not need; that is not imported, let alone called.
    """
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dictionary")
        return {
            key.decode() if isinstance(key, bytes) else key: _plain(x) for key, x in content.items()
        }
    except _Refused as error:
        raise UserError(
            f"{path}: asks for {error}, which a file of images has no use for and which could run any program. "
            "It was not loaded. Do not trust this file: delete it and download the archive again."
        ) from error
    # Damaged bytes are instructions like any others: there is no exception that they could not raise.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{path}: cannot be read ({reason}). Download the archive again and unpack it here."
        ) from error


class _Refused(Exception):
    pass


class _DType:
    """Stands in for numpy.dtype: keeps the name, such as "u1"."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state: tuple) -> None:
        """Byte order and alignment, which say nothing about single bytes."""


class _Array:
    """Stands in for numpy.ndarray, and for the function that makes an empty one to be filled by its state."""

    def __init__(self, *_: object) -> None:
        self.values = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran_order, content = state
        if not isinstance(dtype, _DType) or dtype.name != "u1":
            raise ValueError("it holds an array of something else than bytes")
        flat = np.frombuffer(content, dtype=np.uint8)
        self.values = flat.reshape(shape, order="F" if fortran_order else "C")


class _Unpickler(pickle.Unpickler):
    STAND_INS = {
        ("numpy", "dtype"): _DType,
        ("numpy", "ndarray"): _Array,
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
    }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in self.STAND_INS:
            raise _Refused(f"{module}.{name}")
        return self.STAND_INS[module, name]


def _plain(value: object) -> object:
    return value.values if isinstance(value, _Array) else value
