"""Similarities in fp8: what they are, and how far off the theory of rounding lets them be. Of their loss see test_definitions."""

import logging
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastnce
from fastnce import backends
from fastnce.reference.normalize import rounded_unit_rows

FP8 = torch.float8_e4m3fn
# e4m3 has three bits behind the leading one: in [1, 2) its numbers are 1/8 apart. A rounding is off by half of that at most, and
# if it is anywhere within with the same chance, by 1 / sqrt(12) of it in the mean square; numbers above 1 relatively less.
WORST = 2**-4
RMS = 2**-3 / math.sqrt(12)


@pytest.mark.parametrize("dim", [128, 512])
def test_cosines_are_off_by_no_more_than_rounding(dim, generator):
    """``c' - c = sum_d q_d k_d ((1 + a_d) (1 + b_d) - 1)`` with relative roundings a and b.

    Surely at most ``(2 w + w^2) sum |q_d k_d|``; with independent roundings about ``sqrt(2) RMS sqrt(sum (q_d k_d)^2)``.
    """
    rows = torch.randn(2, 128, dim, generator=generator, dtype=torch.float64)
    q, k = F.normalize(rows, dim=-1)
    error = rounded_unit_rows(q) @ rounded_unit_rows(k).T - q @ k.T
    assert (error.abs() <= (2 * WORST + WORST**2) * (q.abs() @ k.abs().T) + 1e-4).all()
    ratio = error.square().mean().sqrt() / (q.square() @ k.square().T).mean().sqrt()
    assert 0.5 * RMS <= ratio <= math.sqrt(2) * RMS


def test_codes_are_those_of_e4m3():
    """By a table of all its numbers: the nearest, with the largest magnitude at 448; nothing overflows."""
    table = torch.arange(256, dtype=torch.uint8).view(FP8).double()
    table = table[table.isfinite()]
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:25, 0] *= 1e6  # leaves the others below the normal numbers
    largest, norm = x.abs().amax(-1, keepdim=True), x.norm(dim=-1, keepdim=True)
    scaled = x / largest * 448
    nearest = table[(scaled.unsqueeze(-1) - table).abs().argmin(-1)]
    assert torch.equal(nearest.abs().amax(-1), torch.full((50,), 448.0, dtype=torch.float64))
    torch.testing.assert_close(rounded_unit_rows(x), nearest * largest / (448 * norm))
    zero = torch.zeros(1, 40)
    assert torch.equal(rounded_unit_rows(zero), zero)
    for size in (1e-42, 1e-20, 1e20, 1e38):
        got = rounded_unit_rows(torch.full((1, 4), size))
        torch.testing.assert_close(got, torch.full((1, 4), 0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_midway_between_two_are_midway_in_every_dtype(dtype):
    """448 = 7 * 64: where 7 divides the largest number, many half-precision numbers come to lie exactly between two codes."""
    x = torch.arange(1, 225, dtype=torch.float32).view(2, -1).to(dtype)
    x[:, -1] = 224
    wide = rounded_unit_rows(x.double())
    torch.testing.assert_close(rounded_unit_rows(x.float()).double(), wide, rtol=1e-6, atol=0)


def test_backends_without_such_products_say_so(caplog):
    """By name: an error; chosen automatically: another, and one line that tells why."""
    # In a dtype that no other test chooses a backend for: a choice is logged once.
    x = torch.randn(4, 3).half()
    assert backends.supports("native", "info_nce_fp8", "cpu", x.dtype) != "ok"
    with pytest.raises(RuntimeError, match=r"info_nce_fp8: backend 'native' cannot run it on cpu"):
        fastnce.info_nce(x, x, similarity_dtype=FP8, backend="native")
    with caplog.at_level(logging.INFO, logger="fastnce"), fastnce.use_backend(None):
        loss = fastnce.info_nce(x, x, similarity_dtype=FP8)
    assert loss == fastnce.info_nce(x, x, similarity_dtype=FP8, backend="blocks")
    assert "info_nce_fp8 on cpu torch.float16: backend blocks" in caplog.text


def test_the_documented_table_is_what_the_benchmark_prints(monkeypatch):
    from benchmarks import fp8_error

    def cells(line: str) -> list[str]:
        return [cell.strip() for cell in line.strip("|").split("|")]

    monkeypatch.setattr(fp8_error, "DIMS", (128,))
    document = (Path(__file__).parents[2] / "docs/precision.md").read_text().splitlines()
    rows = [cells(line) for line in document if line.startswith("|")]
    header, _, *lines = fp8_error.table().splitlines()
    assert len(lines) == 2 and all(cells(line) in rows for line in (header, *lines))
