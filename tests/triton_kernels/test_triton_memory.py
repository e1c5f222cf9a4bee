"""What the kernels' calls hold at their peak beyond their inputs, results and gradients among it, as ``peak_extra_bytes`` of the benchmarks."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("tensors without memory cannot be interpreted", allow_module_level=True)

import calls
from memory import LiveBytes

from benchmarks.launches import recorded
from fastnce import triton_kernels

MIB = 1 << 20


def rows(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def peak_of_info_nce(count: int, depth: int, *, needs=(True, True, False, False), **options) -> int:
    """Bytes of a mean loss with its gradients."""
    query, key = rows(1, count, depth), rows(1, count, depth)
    with recorded(), LiveBytes() as memory:
        triton_kernels.info_nce_forward(
            query, key, None, 0.07, **{**calls.IN_BATCH, **options}, grad_scale=1.0, needs=needs
        )
    return memory.peak


def test_the_count_is_of_what_lives():
    x = rows(1000)
    with LiveBytes() as memory:
        a = x + 1
        assert memory.live == a.nbytes == 2000
        view = a[10:]
        del a
        b = view.float()
        assert memory.live == memory.peak == 2000 + b.nbytes
        del view
        b.add_(1)
        b[:10] = 2
        assert memory.live == b.nbytes
    assert memory.peak == 2000 + b.nbytes


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "one_direction"])
@pytest.mark.parametrize(
    ("count", "depth"), [(262144, 512), (65536, 256), (65536, 512), (65536, 1024)]
)
def test_both_gradients_take_less_than_four_times_the_inputs(count, depth, symmetric):
    inputs = 2 * count * depth * 2
    assert peak_of_info_nce(count, depth, symmetric=symmetric) < 4 * inputs
