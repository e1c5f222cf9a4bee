"""The passes by Hopper's instructions (``csrc/cuda/pairs_sm90.*``), emulated, against fp64 and against the others."""

import dataclasses
import math

import pytest
import torch
from pairs_library import IN_BATCH, QUEUE, SUP_CON, TWO_C, Case, library, log_sum
from torch import Tensor

BF16, FP16 = torch.bfloat16, torch.float16
SEEDS = range(2)


@pytest.fixture(scope="module", autouse=True)
def compiled(cxx):
    library()


@pytest.fixture(autouse=True, params=SEEDS)
def order_of_threads(request, monkeypatch):
    monkeypatch.setenv("FASTNCE_EMULATOR_SEED", str(request.param))


def expect(got: Tensor, expected: Tensor, error: float) -> None:
    """Within ``error`` times the largest, or times 1."""
    assert got.isfinite().all()
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=error * scale)


def expect_product(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Its first factor is rounded to 16 bits: half a unit in the last place of each, and so of the largest sum at most."""
    assert got.isfinite().all()
    error = {BF16: 2.0**-8, FP16: 2.0**-11}[dtype]
    atol = error * float(expected.abs().max())
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=atol)


def error_of(case: Case) -> float:
    """Of fp32 logits of up to 1 / t, in units of 1, and so of the exponentials' relative error: four units in the last place."""
    return 2.0**-22 * max(1.0, 1 / case.temperature)


def expect_sums(case: Case, out: dict) -> None:
    expect(log_sum(out["largest"], out["sum"]), case.logits.logsumexp(-1), error_of(case))


# Depths of each number of chunks, more and less than a tile of rows and columns, both offsets, problems, splits.
WITH_PRODUCT = [
    Case(1, 1, 64),
    Case(2, 63, 100, QUEUE, 0.07, FP16),
    Case(65, 252, 128, QUEUE, 0.5),
    Case(130, 1030, 192, QUEUE, 0.01, multiprocessors=8),
    Case(100, 129, 256, IN_BATCH, 0.07, problems=2),
    Case(63, 65, 256, IN_BATCH, 0.005, FP16, problems=2),
    Case(129, 70, 272, IN_BATCH),
    Case(65, 130, 512, QUEUE, 0.01),
    Case(130, 140, 384, IN_BATCH, 0.07),
]


@pytest.mark.parametrize("case", WITH_PRODUCT, ids=str)
def test_sums_and_product_in_one_pass(case: Case):
    out = case.sums(product=True, term=True)
    softmax = case.logits.softmax(-1)
    expect_sums(case, out)
    to_softmax = (out["largest"].double() * math.log(2) - case.logits.logsumexp(-1)).exp()
    product = (out["product"] * to_softmax[..., None]).sum(0)
    expect_product(product, softmax @ case.units[1], case.dtype)
    terms = torch.where(softmax > 0, softmax * case.logits, 0.0).sum(-1)
    expect((out["term"] * to_softmax).sum(0), terms, error_of(case))


SUMS = [
    Case(1, 1, 64),
    Case(130, 252, 80, QUEUE, 0.07, FP16),
    Case(100, 1300, 128, QUEUE, 0.01, multiprocessors=8),
    Case(129, 129, 320, IN_BATCH, 0.07, problems=2),
    Case(65, 130, 512, IN_BATCH, 0.005),
    # Blocks of rows one after another in one part of the column sums.
    Case(330, 140, 64, QUEUE, 0.07, multiprocessors=1),
    Case(330, 140, 64, QUEUE, 0.01, multiprocessors=1),
]


@pytest.mark.parametrize("case", SUMS, ids=str)
def test_sums_of_rows_and_columns(case: Case):
    out = case.sums(columns=True)
    expect_sums(case, out)
    by_column = log_sum(out["column_largest"], out["column_sum"])
    expect(by_column, case.logits.logsumexp(-2), error_of(case))


@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.parametrize("kind", [SUP_CON, TWO_C])
def test_sums_by_label(kind: int, temperature: float):
    case = Case(100, 1100, 96, kind, temperature)
    out = case.sums()
    expect_sums(case, out)
    positives = case.logits.masked_fill(~case.same, -math.inf)
    if kind == SUP_CON:
        sums = torch.where(case.same, case.logits, 0.0).sum(-1)
        # Hundreds of positives, each as exact as a logit.
        expect(out["label_a"].sum(0), sums, error_of(case))
        assert torch.equal(out["label_b"].sum(0), case.same.sum(-1).float())
    else:
        expect(log_sum(out["label_a"], out["label_b"]), positives.logsumexp(-1), error_of(case))


PRODUCTS = [
    Case(1, 2, 64),
    Case(130, 252, 64, IN_BATCH, 0.01),
    Case(65, 63, 100, QUEUE, 0.07, FP16, problems=2),
    Case(100, 600, 192, QUEUE, 0.07, multiprocessors=16),
    Case(129, 130, 256, IN_BATCH, 0.5),
    Case(70, 130, 512, IN_BATCH, 0.07, FP16),
    Case(130, 70, 320, QUEUE, 0.07),
    Case(130, 130, 128, SUP_CON, 0.07),
    Case(130, 130, 128, TWO_C, 0.01),
]


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
@pytest.mark.parametrize("losses", ["rows", "columns", "both"])
def test_products(case: Case, losses: str):
    of_rows = case.statistics(-1) if losses != "columns" else None
    of_columns = case.statistics(-2) if losses != "rows" else None
    given = [None if s is None else s.float().contiguous() for s in (of_rows, of_columns)]
    x_product, y_product, term = case.products(*given)
    x, y = case.units
    g = case.coefficients(of_rows, of_columns)
    expect_product(x_product, g @ y, case.dtype)
    expect_product(y_product, g.mT @ x, case.dtype)
    expect(term, torch.where(g == 0, 0.0, g * case.logits).sum(-1), error_of(case))


@pytest.mark.parametrize("kind", [QUEUE, IN_BATCH])
def test_the_same_as_by_the_instructions_of_ampere(kind: int):
    hopper = Case(130, 252, 128, kind)
    ampere = dataclasses.replace(hopper, capability=80)
    ours, theirs = (case.sums(product=True, term=True) for case in (hopper, ampere))
    for name in ("largest", "sum", "term", "product"):
        ours[name], theirs[name] = ours[name].sum(0), theirs[name].sum(0)
    assert torch.equal(ours["largest"][0], theirs["largest"][0])  # a fixed offset, in one part
    expect(ours["sum"], theirs["sum"].double(), 1e-6)
    expect_product(ours["product"], theirs["product"].double(), BF16)
    statistics = hopper.statistics(-1).float().contiguous()
    for mine, other in zip(
        hopper.products(statistics, None), ampere.products(statistics, None), strict=True
    ):
        expect_product(mine, other.double(), BF16)


def test_rows_of_nan_stay_alone():
    case = Case(70, 130, 128, IN_BATCH, problems=2)
    case.x[0, 3] = math.nan
    out = case.sums(product=True)
    bad = torch.zeros(2, 70, dtype=torch.bool)
    bad[0, 3] = True
    assert out["sum"].sum(0)[bad].isnan().all()
    assert out["sum"].sum(0)[~bad].isfinite().all()
    assert out["product"].sum(0)[~bad].isfinite().all()
