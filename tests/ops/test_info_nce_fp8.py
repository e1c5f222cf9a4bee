"""Similarities in fp8: what they are, how far off the theory of rounding lets them be, and what the gradients ignore."""

import logging
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastnce
from fastnce import backends
from fastnce.reference.normalize import rounded_unit_rows
from fastnce.testing import rows

FP8 = torch.float8_e4m3fn
# e4m3 has three bits behind the leading one: in [1, 2) its numbers are 1/8 apart. A rounding is off by half of that at most, and
# if it is anywhere within with the same chance, by 1 / sqrt(12) of it in the mean square; numbers above 1 relatively less.
WORST = 2**-4
RMS = 2**-3 / math.sqrt(12)


def clustered(count: int, dim: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Two views of rows in eight clusters, with cosines of about 0.8 inside one."""
    centres = torch.randn(8, dim, generator=generator, dtype=torch.float64).repeat(count // 8, 1)
    return tuple(centres + 0.5 * noise for noise in random(count, dim, generator))


def random(count: int, dim: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.randn(count, dim, generator=generator, dtype=torch.float64) for _ in ("q", "k")
    )


@pytest.mark.parametrize("dim", [128, 256, 512])
@pytest.mark.parametrize("distribution", [random, clustered])
def test_cosines_are_off_by_no_more_than_rounding(distribution, dim, generator):
    """``c' - c = sum_d q_d k_d ((1 + a_d) (1 + b_d) - 1)`` with relative roundings a and b.

    Surely at most ``(2 w + w^2) sum |q_d k_d|``. With independent roundings it is about ``sqrt(sum (q_d k_d)^2)`` times one: a
    and b of equal elements are equal, so twice RMS. Of n such sums with terms bounded by w, the largest is within
    ``2 w sqrt(2 log(2 n / p))`` of that root but with the chance p (Hoeffding).
    """
    count = 128
    q, k = (F.normalize(x, dim=-1) for x in distribution(count, dim, generator))
    error = rounded_unit_rows(q) @ rounded_unit_rows(k).T - q @ k.T
    small = 2**-9 / 448 * (q.abs().amax() + k.abs().amax())  # below the normal numbers
    sure = (2 * WORST + WORST**2) * (q.abs() @ k.abs().T) + small * math.sqrt(dim)
    assert (error.abs() <= sure).all()
    root = (q.square() @ k.square().T).sqrt()
    assert error.square().mean().sqrt() <= 2 * RMS * root.square().mean().sqrt() + RMS**2
    chance = 2 * WORST * math.sqrt(2 * math.log(2 * count**2 / 1e-6))
    assert (error.abs() <= chance * root + WORST**2).all()
    # A product that does not round at all would pass the above.
    assert error.square().mean().sqrt() >= 0.5 * RMS * root.square().mean().sqrt()


def test_codes_are_those_of_e4m3():
    """By a table of all its numbers: the nearest, with the largest magnitude at 448; nothing overflows."""
    table = torch.arange(256, dtype=torch.uint8).view(FP8).double()
    table = table[table.isfinite()]
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 0] *= 1e6  # leaves the others below the normal numbers
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


@pytest.mark.parametrize("form", ["in_batch", "symmetric", "queue", "queue_in_batch", "batched"])
def test_loss_and_gradients_are_those_of_the_definition(form, generator):
    """Typed once more with torch.nn.functional; straight-through gradients by hand."""
    shape = (2, 9, 24) if form == "batched" else (9, 24)
    query, key = (
        rows(*shape, dtype=torch.float64, device="cpu", generator=generator) for _ in "qk"
    )
    queue = rows(11, 24, dtype=torch.float64, device="cpu", generator=generator)
    tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    arguments: dict = {"temperature": tau, "similarity_dtype": FP8, "reduction": "none"}
    inputs = [query, key, tau]
    if form.startswith("queue"):
        inputs.append(queue)
        arguments |= {"negative_keys": queue, "in_batch_negatives": form == "queue_in_batch"}
    loss = fastnce.info_nce(query, key, symmetric=form == "symmetric", backend="torch", **arguments)
    weight = torch.linspace(-1, 1, loss.numel(), dtype=torch.float64).view(loss.shape)
    got = torch.autograd.grad((loss * weight).sum(), inputs)

    def cosine(a, b):
        exact = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT
        return exact + (rounded_unit_rows(a) @ rounded_unit_rows(b).mT - exact).detach()

    own = cosine(query, key)
    columns = own
    if form.startswith("queue"):
        first = own if form == "queue_in_batch" else own.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        columns = torch.cat([first, cosine(query, queue)], -1)
    positive = own.diagonal(dim1=-2, dim2=-1) / tau
    expected = (columns / tau).logsumexp(-1) - positive
    if form == "symmetric":
        expected = 0.5 * (expected + (columns / tau).logsumexp(-2) - positive)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(got, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)
    plain = fastnce.info_nce(query, key, backend="torch", **{**arguments, "similarity_dtype": None})
    assert not torch.allclose(loss, plain, rtol=1e-3)


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
