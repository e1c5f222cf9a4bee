"""Both ways of torch to say how exactly float32 is multiplied."""

from collections.abc import Iterator

import pytest
import torch

import fastnce
from fastnce.precision import float32_products

CPU, CUDA = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = CPU.fp32_precision, CUDA.fp32_precision
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")
    CPU.fp32_precision, CUDA.fp32_precision = before


@pytest.mark.parametrize("older", ["highest", "high", "medium"])
def test_the_older_way(older):
    torch.set_float32_matmul_precision(older)
    assert float32_products("cpu") == float32_products("cuda") == older


@pytest.mark.parametrize(
    ("older", "cpu", "cuda", "expected"),
    [
        ("highest", "ieee", "tf32", ("highest", "high")),
        ("highest", "bf16", "ieee", ("medium", "highest")),
        ("highest", "tf32", "tf32", ("high", "high")),
        ("medium", "ieee", "ieee", ("highest", "highest")),
    ],
)
def test_the_newer_way_decides(older, cpu, cuda, expected):
    """Each device for itself, whatever was said the older way before; the older question raises after most of these."""
    torch.set_float32_matmul_precision(older)
    CPU.fp32_precision, CUDA.fp32_precision = cpu, cuda
    assert (float32_products("cpu"), float32_products("cuda")) == expected


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_op_runs_after_the_newer_way(dtype, compiled):
    CUDA.fp32_precision = "tf32"
    loss = fastnce.info_nce
    if compiled:
        torch.compiler.reset()
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert loss(*torch.randn(2, 8, 4, dtype=dtype)).isfinite()
