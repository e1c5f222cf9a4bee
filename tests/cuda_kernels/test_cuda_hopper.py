"""The passes by Hopper's instructions (``csrc/cuda/pairs_sm90.*``), emulated, against fp64."""

import math

import pytest
import torch
from pairs_library import IN_BATCH, QUEUE, SUP_CON, TWO_C, Case, library, log_sum

from fastnce import build

BF16, FP16 = torch.bfloat16, torch.float16
SEEDS = range(3)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    try:
        library()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True, params=SEEDS)
def order_of_threads(request, monkeypatch):
    monkeypatch.setenv("FASTNCE_EMULATOR_SEED", str(request.param))


def expect(got: torch.Tensor, expected: torch.Tensor, error: float) -> None:
    """Within ``error`` of the largest."""
    assert got.isfinite().all()
    scale = expected[expected.isfinite()].abs().max()
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=float(error * scale))


# Exponentials are weights of a product in 16 bits: half a unit in the last place of each, and as much of the sum.
ROUNDING = {BF16: 2.0**-8, FP16: 2.0**-11}
# Products in fp32 of up to 512 terms, divided by the temperature.
EXACT = 1e-6

SUMS = [
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


@pytest.mark.parametrize("case", SUMS, ids=str)
def test_sums_with_product_of_a_pass(case: Case):
    out = case.sums(product=True, term=True)
    lse = case.logits.logsumexp(-1)
    expect(log_sum(out["largest"], out["sum"]), lse, EXACT)
    to_softmax = (out["largest"].double() * math.log(2) - lse).exp()
    softmax = case.logits.softmax(-1)
    expect((out["product"] * to_softmax[..., None]).sum(0), softmax @ case.units[1], ROUNDING[case.dtype])
    terms = torch.where(softmax > 0, softmax * case.logits, 0.0).sum(-1)
    expect((out["term"] * to_softmax).sum(0), terms, 4 * EXACT)
