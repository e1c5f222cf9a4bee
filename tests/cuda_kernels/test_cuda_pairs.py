"""The passes of csrc/cuda/pairs.h, by the instructions of every GPU since Ampere and by Hopper's own, emulated, against fp64.

Errors are measured against what plain PyTorch makes of the same rows in the same precision, as the contract of every op has it.
"""

import dataclasses
import math

import pytest
import torch
from pairs_library import IN_BATCH, QUEUE, SUP_CON, TWO_C, Case, library, log_sum
from torch import Tensor

# The options of Case, and the unit of rounding of what is multiplied.
PRECISIONS = {
    "bfloat16": ({"dtype": torch.bfloat16}, 2.0**-8),
    "float16": ({"dtype": torch.float16}, 2.0**-11),
    "float32": ({"dtype": torch.float32}, 2.0**-23),
}
FP32 = 2.0**-23
LABELLED = (SUP_CON, TWO_C)


@pytest.fixture(scope="module", autouse=True)
def compiled(cxx):
    library()


@pytest.fixture(params=range(2), ids="threads{}".format)
def order_of_threads(request, monkeypatch):
    monkeypatch.setenv("FASTNCE_EMULATOR_SEED", str(request.param))


in_any_order = pytest.mark.usefixtures("order_of_threads")


@pytest.fixture(params=PRECISIONS)
def precision(request) -> str:
    return request.param


def case_of(precision: str, *sizes, **options) -> Case:
    return Case(*sizes, **PRECISIONS[precision][0], capability=80, **options)


def rounding_of(case: Case) -> float:
    """Of the products' factors."""
    return PRECISIONS[str(case.dtype).split(".")[1]][1]


def known(case: Case) -> float:
    """To how much logits are known, and exponentials relatively: two eps of the largest there can be."""
    largest = 1 / case.temperature
    if not case.unit:
        largest = case.logits[case.logits.isfinite()].abs().amax().item()
    return 2 * FP32 * max(1.0, largest)


def compare(found: Tensor, plain: Tensor, truth: Tensor, rounding: float | Tensor) -> None:
    """The contract: an error of at most twice that of plain PyTorch, and the rounding of what is summed up."""
    assert found.shape == truth.shape
    error, allowed = ((x.double() - truth).abs().amax() for x in (found, plain))
    bound = 2 * allowed + torch.as_tensor(rounding).amax()
    assert error <= bound, f"error {error}, of plain PyTorch {allowed}, bound {bound}"


def finite(z: Tensor) -> Tensor:
    return z.masked_fill(z == -math.inf, 0)


def expect_log_sum(largest: Tensor, total: Tensor, plain: Tensor, z: Tensor, case: Case, dim=-1):
    truth, some = z.logsumexp(dim), z.isfinite().any(dim)
    found = log_sum(largest, total)
    assert (found[~some] == -math.inf).all()
    if some.any():
        compare(found[some], plain.logsumexp(dim)[some], truth[some], known(case))


def check_sums(case: Case, *, columns: bool = False) -> None:
    out = case.sums(columns=columns)
    z, plain = case.logits, case.logits_in(torch.float32)
    expect_log_sum(out["largest"], out["sum"], plain, z, case)
    if columns:
        expect_log_sum(out["column_largest"], out["column_sum"], plain, z, case, -2)
    if case.kind == SUP_CON:
        count = case.same.sum(-1)
        assert torch.equal(out["label_b"].sum(0), count.float())
        sums = [x.masked_fill(~case.same, 0).sum(-1) for x in (plain, z)]
        compare(out["label_a"].sum(0), *sums, known(case) * count)
    if case.kind == TWO_C:
        positives = [x.masked_fill(~case.same, -math.inf) for x in (plain, z)]
        expect_log_sum(out["label_a"], out["label_b"], *positives, case)


def check_sums_with_product(case: Case) -> None:
    out = case.sums(product=True, term=True)
    z, plain = case.logits, case.logits_in(torch.float32)
    expect_log_sum(out["largest"], out["sum"], plain, z, case)
    if not z.isfinite().any(-1).all():
        return  # rows without a column have no softmax
    lse = log_sum(out["largest"], out["sum"])
    to_softmax = (out["largest"].double() - lse / math.log(2)).exp2()
    weights, plain_weights = z.softmax(-1), plain.softmax(-1)
    (_, y), (_, plain_y) = case.units, case.units_in(torch.float32)
    compare(
        (out["product"].double() * to_softmax[..., None]).sum(0),
        case.rounded(plain_weights) @ case.rounded(plain_y),
        weights @ y,
        (rounding_of(case) + known(case)) * (weights @ y.abs()),
    )
    compare(
        (out["term"].double() * to_softmax).sum(0),
        (plain_weights * finite(plain)).sum(-1),
        (weights * finite(z)).sum(-1),
        (FP32 + known(case)) * (weights * finite(z).abs()).sum(-1),
    )


def check_products(case: Case, *, by_row: bool = True, by_column: bool = True) -> None:
    statistics = [
        case.statistics(dim).float() if wanted else None
        for wanted, dim in ((by_row, -1), (by_column, -2))
    ]
    of_x, of_y, term = case.products(*statistics)
    g, plain = (case.coefficients(*statistics, dtype) for dtype in (torch.float64, torch.float32))
    size = case.coefficients(*statistics, sizes=True).abs()
    (x, y), (plain_x, plain_y) = case.units, case.units_in(torch.float32)
    rounding = rounding_of(case) + known(case)

    def plain_product(values: Tensor, rows: Tensor) -> Tensor:
        return case.rounded(values) @ case.rounded(rows)

    # Of zero rows there is no gradient, and so no product is promised.
    some_x, some_y = ((scale != 0)[..., None] for scale in (case.x_scale, case.y_scale))
    compare(
        of_x.where(some_x, 0),
        plain_product(plain, plain_y) * some_x,
        g @ y * some_x,
        rounding * (size @ y.abs()),
    )
    compare(
        of_y.where(some_y, 0),
        plain_product(plain.mT, plain_x) * some_y,
        g.mT @ x * some_y,
        rounding * (size.mT @ x.abs()),
    )
    z = finite(case.logits)
    plain_term = (plain * finite(case.logits_in(torch.float32))).sum(-1)
    compare(term, plain_term, (g * z).sum(-1), (FP32 + known(case)) * (size * z.abs()).sum(-1))


# --- every pass, kind and precision, at depths of each kernel ---

SIZES = [(65, 100, 27), (17, 252, 200)]


@in_any_order
@pytest.mark.parametrize(("rows", "columns", "depth"), SIZES)
@pytest.mark.parametrize("kind", [QUEUE, IN_BATCH])
def test_sums_with_product(precision, kind, rows, columns, depth):
    """Both offsets."""
    for temperature in (0.1, 0.01):
        check_sums_with_product(case_of(precision, rows, columns, depth, kind, temperature))


@in_any_order
@pytest.mark.parametrize("depth", [48, 330])
def test_sums_of_columns(precision, depth):
    for temperature in (0.07, 0.01):
        check_sums(case_of(precision, 65, 140, depth, IN_BATCH, temperature), columns=True)


@in_any_order
@pytest.mark.parametrize("depth", [48, 330])
@pytest.mark.parametrize("kind", LABELLED)
def test_sums_by_label(precision, kind, depth):
    for temperature in (0.5, 0.005):
        check_sums(case_of(precision, 63, 140, depth, kind, temperature))


@in_any_order
@pytest.mark.parametrize("depth", [27, 200, 330])
@pytest.mark.parametrize("kind", [QUEUE, IN_BATCH, *LABELLED])
def test_products(precision, kind, depth):
    check_products(case_of(precision, 65, 100, depth, kind, 0.1), by_column=kind != QUEUE)


# --- sizes and cuts ---


@pytest.mark.parametrize("depth", [1, 15, 130, 257, 1000])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 63), (130, 2)])
def test_few_rows_and_odd_depths(rows, columns, depth):
    for kind in (QUEUE, IN_BATCH):
        case = case_of("float16", rows, columns, depth, kind)
        check_sums(case, columns=True)
        check_products(case)
        if depth <= 256:
            check_sums_with_product(case)


@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
@pytest.mark.parametrize("depth", [64, 300])
def test_problems_and_splits(depth, multiprocessors):
    case = case_of("bfloat16", 140, 300, depth, IN_BATCH, problems=2)
    case = dataclasses.replace(case, multiprocessors=multiprocessors)
    check_sums(case)
    check_sums(case, columns=True)
    check_products(case)
    if depth <= 256:
        check_sums_with_product(case)


@pytest.mark.parametrize("panel", [(128, 1), (150, 2), (150, 1)])
def test_panels(precision, panel):
    """Of a part of one problem's rows, or of a part of the problems."""
    check_products(case_of(precision, 150, 20, 272, IN_BATCH, problems=3, panel=panel))


def test_results_do_not_depend_on_the_order_of_threads():
    case = case_of("bfloat16", 100, 300, 100)
    first = case.sums(product=True, term=True)
    again = case.sums(product=True, term=True)
    assert all(x is None or torch.equal(x, again[name]) for name, x in first.items())


# --- numbers ---


@pytest.mark.parametrize("depth", [64, 300])
def test_a_temperature_on_the_device(depth):
    for temperature in (0.07, 0.005):
        case = case_of("float32", 40, 50, depth, IN_BATCH, temperature, on_device=True)
        check_sums(case)
        check_products(case)


def test_rows_that_are_not_normalised(precision):
    case = case_of(precision, 65, 80, 40, QUEUE, 2.0, unit=False)
    check_sums(case, columns=True)
    check_sums_with_product(case)
    check_products(case)


def test_zero_rows():
    for depth in (64, 300):
        case = case_of("bfloat16", 40, 50, depth, IN_BATCH)
        for rows, scale in ((case.x, case.x_scale), (case.y, case.y_scale)):
            rows[:, 3] = 0
            scale[:, 3] = 0
        check_sums(case, columns=True)
        check_products(case)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("depth", [64, 300])
def test_rows_of_nan_stay_alone(depth, capability):
    case = Case(70, 100, depth, QUEUE, capability=capability)
    clean = case.sums()
    statistics = case.statistics(-1).float()
    products, _, terms = case.products(statistics, None)
    case.x[0, 5] = math.nan
    found = case.sums()
    others = torch.arange(70) != 5
    for name in ("largest", "sum"):
        assert torch.equal(found[name][..., others], clean[name][..., others])
    assert found["sum"][..., 5].isnan().all()
    of_x, of_y, term = case.products(statistics, None)
    assert torch.equal(of_x[:, others], products[:, others])
    assert torch.equal(term[:, others], terms[:, others])
    assert of_x[:, 5].isnan().all()
    assert of_y.isnan().all()


def test_a_depth_that_is_not_padded_is_refused():
    case = case_of("bfloat16", 4, 4, 16)
    case.x = case.x[..., :15].contiguous()
    with pytest.raises(RuntimeError, match="multiple of 16, got 15"):
        case.sums()


# --- by Hopper's instructions: depths of each number of chunks, more and less than a tile of rows and columns, both offsets ---

BF16, FP16 = torch.bfloat16, torch.float16


@in_any_order
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 64),
        Case(2, 63, 100, QUEUE, 0.07, FP16),
        Case(65, 252, 128, QUEUE, 0.5),
        Case(130, 1030, 192, QUEUE, 0.01, multiprocessors=8),
        Case(100, 129, 256, IN_BATCH, 0.07, problems=2),
        Case(63, 65, 256, IN_BATCH, 0.005, FP16, problems=2),
        Case(129, 70, 272, IN_BATCH),
        Case(65, 130, 512, QUEUE, 0.01),
        Case(130, 140, 384, IN_BATCH, 0.07),
    ],
    ids=str,
)
def test_hopper_sums_with_product(case):
    check_sums_with_product(case)


@in_any_order
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 64),
        Case(130, 252, 80, QUEUE, 0.07, FP16),
        Case(100, 1300, 128, QUEUE, 0.01, multiprocessors=8),
        Case(129, 129, 320, IN_BATCH, 0.07, problems=2),
        Case(65, 130, 512, IN_BATCH, 0.005),
        # Blocks of rows one after another in one part of the column sums.
        Case(330, 140, 64, QUEUE, 0.07, multiprocessors=1),
        Case(330, 140, 64, QUEUE, 0.01, multiprocessors=1),
    ],
    ids=str,
)
def test_hopper_sums_of_columns(case):
    check_sums(case, columns=True)


@in_any_order
@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.parametrize("kind", LABELLED)
def test_hopper_sums_by_label(kind, temperature):
    check_sums(Case(100, 1100, 96, kind, temperature))


@in_any_order
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 2, 64),
        Case(130, 252, 64, IN_BATCH, 0.01),
        Case(65, 63, 100, QUEUE, 0.07, FP16, problems=2),
        Case(100, 600, 192, QUEUE, 0.07, multiprocessors=16),
        Case(129, 130, 256, IN_BATCH, 0.5),
        Case(70, 130, 512, IN_BATCH, 0.07, FP16),
        Case(130, 70, 320, QUEUE, 0.07),
        Case(130, 130, 128, SUP_CON, 0.07),
        Case(130, 130, 128, TWO_C, 0.01),
    ],
    ids=str,
)
@pytest.mark.parametrize("losses", ["rows", "columns", "both"])
def test_hopper_products(case, losses):
    check_products(case, by_row=losses != "columns", by_column=losses != "rows")


@pytest.mark.parametrize("kind", [QUEUE, IN_BATCH])
def test_hopper_takes_the_offset_of_ampere(kind):
    hopper = Case(130, 252, 128, kind)
    ours, theirs = (
        case.sums(product=True) for case in (hopper, dataclasses.replace(hopper, capability=80))
    )
    assert torch.equal(ours["largest"].amax(0), theirs["largest"].amax(0))
