"""The passes over the matrix of similarities (``csrc/cuda/pairs.h``), emulated, called directly; and what they should give.

Packed rows are made of random ones as the ops make them: padded with zeros, with a scale to unit length each.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math

import torch
from emulated import build_emulated
from torch import Tensor

QUEUE, IN_BATCH, SUP_CON, TWO_C = range(4)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Problem(ctypes.Structure):
    """As in pairs_calls.cpp."""

    _fields_ = (
        [
            (name, ctypes.c_void_p)
            for name in ("x", "x_scale", "y", "y_scale", "x_labels", "y_labels")
        ]
        + [(name, ctypes.c_int64) for name in ("problems", "rows", "columns", "depth")]
        + [("temperature", ctypes.c_double), ("temperature_tensor", ctypes.c_void_p)]
        + [("panel_rows", ctypes.c_int64), ("panel_problems", ctypes.c_int64)]
        + [
            (name, ctypes.c_int)
            for name in ("dtype", "kind", "unit_rows", "capability", "multiprocessors")
        ]
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The emulated library, which has the calls of pairs_calls.cpp. Raises ``build.BuildError`` with the compiler's message."""
    loaded = ctypes.CDLL(str(build_emulated()))
    for name in ("plan_sums_of", "sums_of", "plan_products_of", "products_of"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def call(name: str, *arguments: object) -> None:
    if message := getattr(library(), name)(*arguments):
        raise RuntimeError(message.decode())


def pointers(tensors: list[Tensor | None]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def fresh(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """NaN between NaN: what is not written, or read beyond the end, is seen."""
    size = math.prod(shape)
    return torch.full((size + 64,), math.nan, dtype=dtype)[32 : 32 + size].view(shape)


@dataclasses.dataclass
class Case:
    """Problems of random rows.

    Args:
        rows, columns, depth: of each problem; the depth is padded.
        kind: of the pairs.
        temperature: of the logits.
        dtype: of the packed rows.
        unit: rows have a scale to unit length, else 1.
        on_device: the temperature is a tensor.
        panel: rows and problems of a panel of coefficients, instead of what is planned.
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
    unit: bool = True
    on_device: bool = False
    panel: tuple[int, int] = (0, 0)
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
            return fresh(*values.shape, dtype=self.dtype).copy_(values)

        def labels(count: int) -> Tensor:  # that differ in their upper halves
            return torch.randint(4, (self.problems, count), generator=generator) << 40

        self.x, self.y = rows(n), rows(m)
        self.x_labels, self.y_labels = labels(n), labels(m)
        if self.kind in (SUP_CON, TWO_C):  # rows against themselves
            self.y[:, :both] = self.x[:, :both]
            self.y_labels[:, :both] = self.x_labels[:, :both]
        self.x_scale, self.y_scale = (self._scale(t) for t in (self.x, self.y))
        self.on_the_device = torch.tensor(self.temperature, dtype=torch.float64)

    def _scale(self, rows: Tensor) -> Tensor:
        norms = rows.double().norm(dim=-1)
        scale = 1 / norms if self.unit else torch.ones_like(norms)
        return fresh(*scale.shape).copy_(scale)

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
            math.nan if self.on_device else self.temperature,
            self.on_the_device.data_ptr() if self.on_device else None,
            *self.panel,
            DTYPES.index(self.dtype),
            self.kind,
            int(self.unit),
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
        plan = (ctypes.c_int64 * 3)()
        problem = self.problem()
        call("plan_products_of", ctypes.byref(problem), 1, 1, plan)
        x_splits, y_splits, workspace = plan
        depth = self.x.shape[-1]
        x_product = fresh(x_splits, self.problems, self.rows, depth)
        y_product = fresh(y_splits, self.problems, self.columns, depth)
        term = fresh(x_splits, self.problems, self.rows)
        room = torch.full((workspace + 64,), 255, dtype=torch.uint8)
        values = [of_rows, of_columns, x_product, y_product, term, room]
        call("products_of", ctypes.byref(problem), pointers(values))
        assert (room[workspace:] == 255).all()
        return x_product.sum(0), y_product.sum(0), term.sum(0)

    # --- what they should give: in float64, and as plain PyTorch has it in float32, with the products' factors rounded ---

    def rounded(self, factor: Tensor) -> Tensor:
        """A factor of a product in float32, as the products' precision has it."""
        if factor.dtype == torch.float64:
            return factor
        return factor.to(self.dtype).float()

    def units_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return (
            self.x.to(dtype) * self.x_scale.to(dtype)[..., None],
            self.y.to(dtype) * self.y_scale.to(dtype)[..., None],
        )

    def logits_in(self, dtype: torch.dtype) -> Tensor:
        """-inf for pairs that do not count."""
        x, y = (self.rounded(rows.to(dtype)) for rows in (self.x, self.y))
        scale = self.x_scale.to(dtype)[:, :, None], self.y_scale.to(dtype)[:, None, :]
        precision = torch.float64 if self.on_device else torch.float32  # the kernels' argument
        temperature = torch.tensor(self.temperature, dtype=precision).to(dtype)
        z = x @ y.mT * scale[0] * scale[1] / temperature
        own = torch.eye(self.rows, self.columns, dtype=torch.bool)
        return z if self.kind == QUEUE else z.masked_fill(own, -math.inf)

    @functools.cached_property
    def units(self) -> tuple[Tensor, Tensor]:
        return self.units_in(torch.float64)

    @functools.cached_property
    def logits(self) -> Tensor:
        return self.logits_in(torch.float64)

    @functools.cached_property
    def same(self) -> Tensor:
        equal = self.x_labels[:, :, None] == self.y_labels[:, None, :]
        return equal & (self.logits > -math.inf)

    def statistics(self, dim: int) -> Tensor:
        """Log-sum-exp, random weights and the third number of the losses of rows (dim -1) or columns (-2): (3, problems, n)."""
        lse = self.logits.logsumexp(dim)
        lse = lse.masked_fill(lse == -math.inf, 0)  # of a single row, as the ops have it
        weight = torch.rand(lse.shape, generator=torch.Generator().manual_seed(self.seed)).double()
        third = torch.zeros_like(lse)
        if self.kind == SUP_CON:
            third = weight / self.same.sum(dim).clamp(min=1)
        if self.kind == TWO_C:
            third = self.logits.masked_fill(~self.same, -math.inf).logsumexp(dim)
            third = third.masked_fill(third == -math.inf, 0)
        return torch.stack([lse, weight, third])

    def coefficients(
        self,
        of_rows: Tensor | None,
        of_columns: Tensor | None,
        dtype: torch.dtype = torch.float64,
        *,
        sizes: bool = False,
    ) -> Tensor:
        """G; or the sizes of what it is the sum of."""
        z = self.logits_in(dtype)
        g = torch.zeros_like(z)
        for statistics, dim in ((of_rows, -1), (of_columns, -2)):
            if statistics is None:
                continue
            lse, weight, third = (value.unsqueeze(dim).to(dtype) for value in statistics)
            sign = 1 if sizes else -1
            g += weight * (z - lse).exp()
            if self.kind == SUP_CON:
                g += sign * torch.where(self.same, third, 0.0)
            if self.kind == TWO_C:
                g += sign * torch.where(self.same, weight * (z - third).exp(), 0.0)
        return g


def log_sum(largest: Tensor, total: Tensor) -> Tensor:
    """Log-sum-exp (natural) over the parts ``sum 2^largest``."""
    return (total.double().log() + largest.double() * math.log(2)).logsumexp(0)
