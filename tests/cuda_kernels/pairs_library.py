"""The passes over the matrix of similarities (``csrc/cuda/pairs.h``), emulated, called directly; and what they should give.

Packed rows are made of random ones as the ops make them: padded with zeros, with a scale to unit length each.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import subprocess
import tempfile
from pathlib import Path

import torch
from emulated import FLAGS, HERE, SOURCES
from torch import Tensor

from fastnce import build

QUEUE, IN_BATCH, SUP_CON, TWO_C = range(4)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FILES = ("pairs.cpp", "pairs_sm80_float.cu", "pairs_sm80_half.cu", "pairs_sm90.cu")


class Problem(ctypes.Structure):
    """As in pairs_calls.cpp."""

    _fields_ = (
        [
            (name, ctypes.c_void_p)
            for name in ("x", "x_scale", "y", "y_scale", "x_labels", "y_labels")
        ]
        + [(name, ctypes.c_int64) for name in ("problems", "rows", "columns", "depth")]
        + [("temperature", ctypes.c_double)]
        + [
            (name, ctypes.c_int)
            for name in ("dtype", "precision", "kind", "unit_rows", "capability", "multiprocessors")
        ]
    )


@functools.cache
def library() -> ctypes.CDLL:
    """Raises ``build.BuildError`` without a compiler."""
    folder = Path(tempfile.mkdtemp(prefix="fastnce-pairs-"))
    files = [*(SOURCES / name for name in FILES), HERE / "emulator.cpp", HERE / "pairs_calls.cpp"]

    def command(file: Path) -> list[str]:
        return [*build.cxx(), *FLAGS, f"-I{SOURCES}", f"-I{HERE}", "-x", "c++"]

    objects = build.compile_files(files, command, folder, False)
    output = folder / "pairs.so"
    subprocess.run([*build.cxx(), "-shared", *map(str, objects), "-o", str(output)], check=True)
    loaded = ctypes.CDLL(str(output))
    for name in ("plan_sums_of", "sums_of", "plan_products_of", "products_of"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def call(name: str, *arguments: object) -> None:
    if message := getattr(library(), name)(*arguments):
        raise RuntimeError(message.decode())


def pointers(tensors: list[Tensor | None]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def fresh(*shape: int) -> Tensor:
    """An output not written is seen."""
    return torch.full(shape, math.nan)


@dataclasses.dataclass
class Case:
    """Problems of random rows.

    Args:
        rows, columns, depth: of each problem; the depth is padded.
        kind: of the pairs.
        temperature: of the logits.
        dtype: of the packed rows.
        problems: how many.
        capability: of the GPU.
        multiprocessors: of the GPU; columns are split where there are more than blocks of rows.
        seed: of the rows.
    """

    rows: int
    columns: int
    depth: int
    kind: int = QUEUE
    temperature: float = 0.07
    dtype: torch.dtype = torch.bfloat16
    problems: int = 1
    capability: int = 90
    multiprocessors: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        n, m, both = self.rows, self.columns, min(self.rows, self.columns)

        def rows(count: int) -> Tensor:
            values = torch.randn(self.problems, count, self.depth, generator=generator)
            values = torch.nn.functional.pad(values, (0, -self.depth % 16))
            return values.to(self.dtype)

        self.x, self.y = rows(n), rows(m)
        self.x_labels = torch.randint(4, (self.problems, n), generator=generator)
        self.y_labels = torch.randint(4, (self.problems, m), generator=generator)
        if self.kind != QUEUE:  # rows against themselves, or their positives
            self.y[:, :both] = self.x[:, :both]
            self.y_labels[:, :both] = self.x_labels[:, :both]
        self.x_scale, self.y_scale = (1 / t.double().norm(dim=-1) for t in (self.x, self.y))
        self.x_scale, self.y_scale = self.x_scale.float(), self.y_scale.float()

    def problem(self) -> Problem:
        labels = self.kind in (SUP_CON, TWO_C)
        return Problem(
            self.x.data_ptr(),
            self.x_scale.data_ptr(),
            self.y.data_ptr(),
            self.y_scale.data_ptr(),
            self.x_labels.data_ptr() if labels else None,
            self.y_labels.data_ptr() if labels else None,
            self.problems,
            self.rows,
            self.columns,
            self.x.shape[-1],
            self.temperature,
            DTYPES.index(self.dtype),
            0,
            self.kind,
            1,
            self.capability,
            self.multiprocessors,
        )

    # --- what the kernels give ---

    def sums(self, *, product: bool = False, term: bool = False, columns: bool = False) -> dict:
        plan = (ctypes.c_int64 * 2)()
        problem = self.problem()
        call("plan_sums_of", ctypes.byref(problem), int(product), plan)
        splits, row_blocks = plan
        rows, labelled = (splits, self.problems, self.rows), self.kind in (SUP_CON, TWO_C)
        by_column = (row_blocks, self.problems, self.columns)
        out = {
            "largest": fresh(*rows),
            "sum": fresh(*rows),
            "label_a": fresh(*rows) if labelled else None,
            "label_b": fresh(*rows) if labelled else None,
            "term": fresh(*rows) if term else None,
            "product": fresh(*rows, self.x.shape[-1]) if product else None,
            "column_largest": fresh(*by_column) if columns else None,
            "column_sum": fresh(*by_column) if columns else None,
        }
        call("sums_of", ctypes.byref(problem), int(product), pointers(list(out.values())))
        return out

    def products(
        self, of_rows: Tensor | None, of_columns: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``sum_j G_ij y^_j``, ``sum_i G_ij x^_i`` and ``sum_j G_ij z_ij``, from statistics (3, problems, rows or columns)."""
        plan = (ctypes.c_int64 * 4)()
        problem = self.problem()
        call("plan_products_of", ctypes.byref(problem), 1, 1, plan)
        x_splits, y_splits, term_splits, workspace = plan
        depth = self.x.shape[-1]
        x_product = fresh(x_splits, self.problems, self.rows, depth)
        y_product = fresh(y_splits, self.problems, self.columns, depth)
        term = fresh(term_splits, self.problems, self.rows)
        room = torch.empty(workspace, dtype=torch.uint8)
        values = [of_rows, of_columns, x_product, y_product, term, room]
        call("products_of", ctypes.byref(problem), pointers(values))
        return x_product.sum(0), y_product.sum(0), term.sum(0)

    # --- what they should give, in fp64 ---

    @functools.cached_property
    def units(self) -> tuple[Tensor, Tensor]:
        return (
            self.x.double() * self.x_scale.double()[..., None],
            self.y.double() * self.y_scale.double()[..., None],
        )

    @functools.cached_property
    def logits(self) -> Tensor:
        """-inf for pairs that do not count."""
        x, y = self.units
        z = x @ y.mT / self.temperature
        own = torch.eye(self.rows, self.columns, dtype=torch.bool)
        return z if self.kind == QUEUE else z.masked_fill(own, -math.inf)

    @functools.cached_property
    def same(self) -> Tensor:
        equal = self.x_labels[:, :, None] == self.y_labels[:, None, :]
        return equal & (self.logits > -math.inf)

    def statistics(self, dim: int) -> Tensor:
        """Log-sum-exp, random weights and the third number of the losses of rows (dim -1) or columns (-2): (3, problems, n)."""
        lse = self.logits.logsumexp(dim)
        weight = torch.rand(lse.shape, generator=torch.Generator().manual_seed(self.seed)).double()
        third = torch.zeros_like(lse)
        if self.kind == SUP_CON:
            third = weight / self.same.sum(dim).clamp(min=1)
        if self.kind == TWO_C:
            third = self.logits.masked_fill(~self.same, -math.inf).logsumexp(dim)
        return torch.stack([lse, weight, third])

    def coefficients(self, of_rows: Tensor | None, of_columns: Tensor | None) -> Tensor:
        z, g = self.logits, torch.zeros_like(self.logits)
        for statistics, dim in ((of_rows, -1), (of_columns, -2)):
            if statistics is None:
                continue
            lse, weight, third = (value.unsqueeze(dim) for value in statistics)
            g += weight * (z - lse).exp()
            if self.kind == SUP_CON:
                g -= torch.where(self.same, third, 0.0)
            if self.kind == TWO_C:
                g -= torch.where(self.same, weight * (z - third).exp(), 0.0)
        return g


def log_sum(largest: Tensor, total: Tensor) -> Tensor:
    """Log-sum-exp (natural) over the parts ``sum 2^largest``."""
    return (total.double().log() + largest.double() * math.log(2)).logsumexp(0)
