"""The bytes that the kernels' calls hold at their peak beyond their inputs, as ``peak_extra_bytes`` of the benchmarks."""

import os
import weakref

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("tensors without memory cannot be interpreted", allow_module_level=True)

import calls
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastnce import triton_kernels
from fastnce.triton_kernels import launch

MIB = 1 << 20
FORMS = {
    "symmetric": {"symmetric": True},
    "one_direction": {},
    "fp8": {"symmetric": True, **calls.FP8},
}


class LiveBytes(TorchDispatchMode):
    """Inside the block counts the bytes of all storages that were made in it and are still referred to.

    Not counted is what an operation of the library takes for itself while it runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self._made |= _storages(out) - _storages((args, kwargs))
        self.peak = max(self.peak, sum(x.nbytes() for x in self._made))
        return out


def _storages(tree: object) -> set[torch.UntypedStorage]:
    return {x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch):
    monkeypatch.setattr(launch, "_start", lambda *arguments: None)


def rows(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def peak_of_info_nce(count: int, depth: int, at_once: bool, **options) -> int:
    """Bytes of both gradients of a mean loss, at once with it, or from the log-sum-exp of an earlier call."""
    query, key = rows(1, count, depth), rows(1, count, depth)
    inputs = query, key, None, 0.07
    options = {**calls.IN_BATCH, **options, "needs": (True, True, False, False)}
    scale = 1.0 if at_once else None
    with LiveBytes() as forward:
        loss, lse, _ = triton_kernels.info_nce_forward(*inputs, **options, grad_scale=scale)
    if at_once:
        return forward.peak
    with LiveBytes() as backward:
        triton_kernels.info_nce_backward(loss, *inputs, lse, **options)
    return max(forward.peak, backward.peak)


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    ("count", "depth", "at_once"),
    [
        (262144, 512, True),
        *((65536, depth, True) for depth in (256, 512, 1024)),
        *((65536, depth, False) for depth in (256, 512)),
    ],
)
def test_both_gradients_take_less_than_four_times_the_inputs(count, depth, at_once, options):
    inputs = 2 * count * depth * 2
    assert inputs <= peak_of_info_nce(count, depth, at_once, **options) < 4 * inputs


@pytest.mark.parametrize("depth", [128, 512])
def test_half_the_tiles_take_little_memory(depth):
    """The columns' sums by blocks of rows, of which there would be 1 GiB in all."""
    features, labels = rows(65536, depth), torch.empty(65536, dtype=torch.int64, device="meta")
    with LiveBytes() as memory:
        triton_kernels.sup_con_forward(
            features, labels, 0.07, grad_scale=None, mean=True, needs=(False, False)
        )
    assert memory.peak < features.nbytes + 100 * MIB
