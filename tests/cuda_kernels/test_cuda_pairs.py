"""The passes of csrc/cuda/pairs.h, emulated on the host, against fp64.

Each is called on packed rows, as the ops call it. Errors are measured against what plain PyTorch makes of the same rows in the
same precision (the numerical contract of every op), per row: sums as log-sum-exps, products in units of the largest element.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import pathlib
import subprocess

import pytest
import torch
from torch import Tensor

ROOT = pathlib.Path(__file__).parents[2]
QUEUE, IN_BATCH, SUP_CON, TWO_C = range(4)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LN_2 = math.log(2)
# The unit of rounding of what is multiplied.
EPS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-23, "tf32": 2.0**-11}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    out = tmp_path_factory.mktemp("pairs") / "pairs.so"
    sources = [*sorted((ROOT / "csrc/cuda").glob("pairs*.cu")), ROOT / "csrc/cuda/pairs.cpp"]
    sources += [ROOT / "tests/cuda_kernels" / name for name in ("pairs_calls.cpp", "emulator.cpp")]
    folders = [f"-I{ROOT / folder}" for folder in ("csrc/cuda", "tests/cuda_kernels")]
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-DFASTNCE_EMULATED"]
    command = ["g++", *options, *folders, "-x", "c++", *map(str, sources), "-o", str(out)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(out))


def guarded(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A contiguous tensor of NaN between NaN."""
    size = torch.Size(shape).numel()
    fill = -(2**62) if dtype == torch.int64 else float("nan")
    return torch.full((size + 64,), fill, dtype=dtype)[32 : 32 + size].view(shape)


def guard(x: Tensor) -> Tensor:
    return guarded(*x.shape, dtype=x.dtype).copy_(x)


def address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def addresses(*tensors: Tensor | None) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(address(x) for x in tensors))


@dataclasses.dataclass
class Problem:
    """Packed rows and columns, and the logits of their pairs in fp64."""

    kind: int
    precision: str
    problems: int
    rows: int
    columns: int
    depth: int
    temperature: float
    seed: int = 0
    unit: bool = True
    device_temperature: bool = False
    multiprocessors: int = 4
    panel: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        named = {"tf32": torch.float32}
        self.dtype = named.get(self.precision) or getattr(torch, self.precision)
        padded = (self.depth + 15) // 16 * 16

        def rows(count: int) -> tuple[Tensor, Tensor]:
            x = torch.randn(self.problems * count, self.depth, generator=generator)
            x = x + 0.7 * torch.randn(self.depth, generator=generator)
            packed = torch.zeros(len(x), padded, dtype=self.dtype)
            packed[:, : self.depth] = x.to(self.dtype)
            scale = 1 / packed.double().norm(dim=1) if self.unit else torch.ones(len(x))
            return guard(packed), guard(scale.float())

        self.x, self.x_scale = rows(self.rows)
        self.y, self.y_scale = (self.x, self.x_scale) if self.labelled else rows(self.columns)
        labels = torch.randint(0, 3, (self.problems * self.rows,), generator=generator)
        self.labels = guard(labels * 2**40) if self.labelled else None
        self.device = None
        if self.device_temperature:
            self.device = torch.tensor(self.temperature, dtype=torch.float64)

    @property
    def labelled(self) -> bool:
        return self.kind in (SUP_CON, TWO_C)

    @property
    def largest_logit(self) -> float:
        if self.unit:
            return 1 / self.temperature
        z = self.logits()
        return float(z[z.isfinite()].abs().amax())

    def arguments(self):
        sizes = [self.problems, self.rows, self.columns, self.x.shape[1], DTYPES[self.dtype]]
        sizes += [int(self.precision == "tf32"), int(self.unit), self.kind]
        sizes += [self.multiprocessors, 80]
        tensors = (self.x, self.x_scale, self.y, self.y_scale, self.labels, self.labels)
        temperature = float("nan") if self.device_temperature else self.temperature
        return (
            (ctypes.c_int64 * len(sizes))(*sizes),
            addresses(*tensors, self.device),
            ctypes.c_double(temperature),
        )

    def by_problem(self, x: Tensor) -> Tensor:
        return x.reshape(self.problems, -1, *x.shape[1:])

    def unit_rows(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        return tuple(
            self.by_problem(x.to(dtype) * scale.to(dtype)[:, None])
            for x, scale in ((self.x, self.x_scale), (self.y, self.y_scale))
        )

    def logits(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """(problems, rows, columns), -inf where a pair does not count; in fp32 as plain PyTorch has them."""
        x, y = (self.by_problem(self.rounded(v.to(dtype))) for v in (self.x, self.y))
        scales = self.by_problem(self.x_scale).to(dtype), self.by_problem(self.y_scale).to(dtype)
        temperature = torch.tensor(self.temperature).to(dtype)  # the float that the kernels get
        if self.device_temperature:
            temperature = torch.tensor(self.temperature, dtype=dtype)
        z = x @ y.mT * scales[0][:, :, None] * scales[1][:, None, :] / temperature
        if self.kind != QUEUE:
            z.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        return z

    def rounded(self, x: Tensor) -> Tensor:
        """What is multiplied in fp32 arithmetic, as the precision has it."""
        if x.dtype == torch.float64:
            return x
        if self.precision != "tf32":
            return x.to(self.dtype).float()
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)

    @property
    def same(self) -> Tensor:
        labels = self.by_problem(self.labels)
        return (labels[:, :, None] == labels[:, None, :]) & self.logits().isfinite()


def compare(found: Tensor, plain: Tensor, truth: Tensor, rounding: float | Tensor) -> None:
    """The contract: an error of at most twice that of plain PyTorch, and the rounding of what is summed up."""
    assert found.shape == truth.shape
    error, allowed = ((x.double() - truth).abs().amax() for x in (found, plain))
    bound = 2 * allowed + torch.as_tensor(rounding).amax()
    assert error <= bound, f"error {error}, plain {allowed}, bound {bound}"


def without_infinite(z: Tensor) -> Tensor:
    return z.masked_fill(z == -torch.inf, 0)


def merged(largest: Tensor, sums: Tensor) -> Tensor:
    """Natural log-sum-exp of parts to base 2."""
    return torch.logsumexp((largest.double() + sums.double().log2()) * LN_2, 0)


def run_sums(library, problem: Problem, *, product: bool = False, columns: bool = False):
    plan = (ctypes.c_int64 * 3)()
    arguments = problem.arguments()
    assert library.pairs_plan_sums(*arguments, int(product), plan) == 0
    _, splits, row_blocks = plan
    rows = problem.problems * problem.rows
    largest, sums = guarded(splits, rows), guarded(splits, rows)
    out = {"largest": largest, "sum": sums, "splits": splits}
    keys = ["product", "term", "a", "b", "column_largest", "column_sum"]
    out |= dict.fromkeys(keys)
    if product:
        out["product"] = guarded(splits, rows, problem.x.shape[1])
        out["term"] = guarded(splits, rows)
    if problem.labelled:
        out["a"], out["b"] = guarded(splits, rows), guarded(splits, rows)
    if columns:
        total = problem.problems * problem.columns
        out["column_largest"], out["column_sum"] = (guarded(row_blocks, total) for _ in "ab")
    pointers = addresses(largest, sums, *(out[key] for key in keys))
    assert library.pairs_sums(*arguments, int(product), pointers) == 0
    return out


def check_sums(library, problem: Problem, *, product: bool = False, columns: bool = False) -> None:
    out = run_sums(library, problem, product=product, columns=columns)
    z, plain = problem.logits(), problem.logits(torch.float32)
    # Logits are known to eps of the largest there can be, and so is a log-sum-exp; a softmax relatively so.
    known = 2 * EPS["float32"] * problem.largest_logit
    lse = torch.logsumexp(z, 2).flatten()
    compare(merged(out["largest"], out["sum"]), torch.logsumexp(plain, 2).flatten(), lse, known)
    if columns:
        found = merged(out["column_largest"], out["column_sum"])
        compare(found, torch.logsumexp(plain, 1).flatten(), torch.logsumexp(z, 1).flatten(), known)
    if product:
        check_product(problem, out, z, plain, known)
    if problem.labelled:
        check_label_sums(problem, out, z, plain, known)


def check_product(problem, out, z, plain, known) -> None:
    lse = merged(out["largest"], out["sum"])
    to_softmax = (out["largest"].double() - lse / LN_2).exp2()
    weights, plain_weights = torch.softmax(z, 2), torch.softmax(plain, 2)
    y, plain_y = problem.unit_rows()[1], problem.unit_rows(torch.float32)[1]
    compare(
        (out["product"].double() * to_softmax[..., None]).sum(0),
        (problem.rounded(plain_weights) @ problem.rounded(plain_y)).flatten(0, 1),
        (weights @ y).flatten(0, 1),
        (EPS[problem.precision] + known) * (weights @ y.abs()),
    )
    terms = weights * without_infinite(z), plain_weights * without_infinite(plain)
    compare(
        (out["term"].double() * to_softmax).sum(0),
        terms[1].sum(2).flatten(),
        terms[0].sum(2).flatten(),
        (EPS["float32"] + known) * terms[0].abs().sum(2),
    )


def check_label_sums(problem, out, z, plain, known) -> None:
    same = problem.same
    some = same.any(2).flatten()
    if problem.kind == SUP_CON:
        count = same.sum(2).flatten()
        assert torch.equal(out["b"].sum(0), count.float())
        sums = [x.masked_fill(~same, 0).sum(2).flatten() for x in (z, plain)]
        return compare(out["a"].sum(0), sums[1], sums[0], known * count)
    found = merged(out["a"], out["b"])
    sums = [torch.logsumexp(x.masked_fill(~same, -torch.inf), 2).flatten() for x in (z, plain)]
    assert (found[~some] == -torch.inf).all()
    return compare(found[some], sums[1][some], sums[0][some], known)


def statistics_of(problem: Problem, dim: int, generator: torch.Generator) -> Tensor:
    """(3, count) log-sum-exp, weight, third, as the ops have them."""
    z = problem.logits()
    lse = torch.logsumexp(z, dim).flatten()
    lse = torch.where(lse == -torch.inf, 0.0, lse)
    weight = torch.rand(lse.shape, generator=generator) * 2 - 1
    third = weight.double()
    if problem.kind == SUP_CON:
        third = weight / problem.same.sum(dim).flatten().clamp(min=1)
    if problem.kind == TWO_C:
        third = torch.logsumexp(z.masked_fill(~problem.same, -torch.inf), dim).flatten()
        third = torch.where(third == -torch.inf, lse, third)
    return guard(torch.stack([lse, weight.double(), third]).float())


def coefficients(problem: Problem, z: Tensor, statistics: list[Tensor | None]) -> Tensor:
    g = torch.zeros_like(z)
    for s, dim in zip(statistics, (2, 1), strict=True):
        if s is None:
            continue
        lse, weight, third = (problem.by_problem(v).unsqueeze(dim).to(z.dtype) for v in s)
        g += weight * (z - lse).exp()
        if problem.kind == SUP_CON:
            g -= torch.where(problem.same, third.expand_as(z), 0)
        if problem.kind == TWO_C:
            g -= torch.where(problem.same, weight * (z - third).exp(), 0)
    return g.masked_fill(z == -torch.inf, 0)


def coefficient_sizes(problem: Problem, z: Tensor, statistics: list[Tensor | None]) -> Tensor:
    """The sizes of the coefficients' terms, before they cancel."""
    sizes = torch.zeros_like(z)
    for s, dim in zip(statistics, (2, 1), strict=True):
        if s is None:
            continue
        lse, weight, third = (problem.by_problem(v).unsqueeze(dim).double() for v in s)
        sizes += (weight * (z - lse).exp()).abs()
        if problem.labelled:
            target = third.expand_as(z) if problem.kind == SUP_CON else weight * (z - third).exp()
            sizes += torch.where(problem.same, target.abs(), 0)
    return sizes.masked_fill(z == -torch.inf, 0)


def run_products(library, problem: Problem, statistics, *, of_x: bool, of_y: bool):
    plan = (ctypes.c_int64 * 6)()
    arguments = problem.arguments()
    panel = (ctypes.c_int64 * 2)(*problem.panel)
    assert library.pairs_plan_products(*arguments, int(of_x), int(of_y), panel, plan) == 0
    x_splits, y_splits, term_splits, workspace_bytes = plan[:4]
    x = guarded(x_splits, *problem.x.shape) if of_x else None
    y = guarded(y_splits, *problem.y.shape) if of_y else None
    term = guarded(term_splits, len(problem.x)) if of_x else None
    workspace = torch.full((workspace_bytes + 64,), 255, dtype=torch.uint8)
    code = library.pairs_products(
        *arguments, addresses(*statistics), panel, addresses(x, y, term), address(workspace)
    )
    assert code == 0
    assert (workspace[workspace_bytes:] == 255).all()
    return x, y, term


def check_products(
    library, problem: Problem, *, by_row=True, by_column=False, of_x=True, of_y=False
) -> None:
    generator = torch.Generator().manual_seed(problem.seed + 100)
    wanted = (by_row, by_column)
    statistics = [
        statistics_of(problem, dim, generator) if want else None
        for want, dim in zip(wanted, (2, 1), strict=True)
    ]
    x, y, term = run_products(library, problem, statistics, of_x=of_x, of_y=of_y)
    z, plain = problem.logits(), problem.logits(torch.float32)
    g, plain_g = (coefficients(problem, v, statistics) for v in (z, plain))
    size = coefficient_sizes(problem, z, statistics)
    units, plain_units = problem.unit_rows(), problem.unit_rows(torch.float32)
    known = 2 * EPS["float32"] * problem.largest_logit
    eps = EPS[problem.precision] + known

    def product(values: Tensor, rows: Tensor) -> Tensor:
        return (problem.rounded(values) @ problem.rounded(rows)).flatten(0, 1)

    if x is not None:
        plain_product, exact = product(plain_g, plain_units[1]), product(g, units[1])
        compare(x.sum(0), plain_product, exact, eps * (size @ units[1].abs()))
        terms = [(a * without_infinite(b)).sum(2).flatten() for a, b in ((plain_g, plain), (g, z))]
        rounding = (EPS["float32"] + known) * (size * without_infinite(z).abs()).sum(2)
        compare(term.sum(0), *terms, rounding)
    if y is not None:
        plain_product, exact = product(plain_g.mT, plain_units[0]), product(g.mT, units[0])
        compare(y.sum(0), plain_product, exact, eps * (size.mT @ units[0].abs()))


@pytest.fixture(params=[1, 2])
def seed(request, monkeypatch) -> int:
    """Of the order in which the emulator runs threads."""
    monkeypatch.setenv("FASTNCE_EMULATOR_SEED", str(request.param))
    return request.param


PRECISIONS = list(EPS)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("problems", "rows", "columns", "depth"), [(1, 65, 100, 27), (3, 17, 63, 200)]
)
def test_sums_with_product(library, seed, precision, problems, rows, columns, depth):
    for kind in (QUEUE, IN_BATCH):
        problem = Problem(kind, precision, problems, rows, rows if kind else columns, depth, 0.1)
        check_sums(library, problem, product=True)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("depth", [48, 330])
def test_sums(library, seed, precision, depth):
    check_sums(library, Problem(QUEUE, precision, 1, 63, 252, depth, 0.07))
    check_sums(library, Problem(IN_BATCH, precision, 2, 65, 65, depth, 0.07), columns=True)
    check_sums(library, Problem(IN_BATCH, precision, 1, 140, 140, depth, 0.01), columns=True)
    for kind in (SUP_CON, TWO_C):
        for temperature in (0.5, 0.01):
            check_sums(library, Problem(kind, precision, 1, 100, 100, depth, temperature))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("depth", [27, 200, 330])
def test_products(library, seed, precision, depth):
    both = {"by_column": True, "of_y": True}
    check_products(library, Problem(QUEUE, precision, 1, 63, 100, depth, 0.1), of_y=True)
    check_products(library, Problem(IN_BATCH, precision, 2, 65, 65, depth, 0.1), **both)
    for kind in (SUP_CON, TWO_C):
        check_products(library, Problem(kind, precision, 1, 100, 100, depth, 0.3), by_column=True)
