"""Every op that a compiled backend registers with PyTorch keeps PyTorch's rules for registered ops."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastnce
from fastnce import backends
from fastnce.backends import native
from fastnce.ops.blur_resample import blur_kernel, blur_resample
from fastnce.ops.conv3x3 import conv3x3
from fastnce.ops.instance_norm import instance_norm
from fastnce.testing import SAMPLE_INPUTS, run

# Backend, and the namespace of its operators, where it can run.
NAMESPACES = {
    name: namespace
    for name, namespace in (("native", "fastnce"), ("cuda", "fastnce_cuda"))
    if backends.available()[name] == "ok"
}
pytestmark = pytest.mark.skipif(not NAMESPACES, reason=str(backends.available()))


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of an op of these namespaces."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in NAMESPACES.values():
            self.calls.setdefault(func.name(), []).append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def recorded() -> dict[str, list]:
    """Calls of every op, in every form of the samples, forward and backward, fp32 and bf16."""
    with Recorder() as recorder:
        for backend in NAMESPACES:
            every_sample(backend)
        if "native" in NAMESPACES:
            for dtype in (torch.float32, torch.bfloat16):
                one_block_of_labelled_lse(dtype)
                every_op_over_maps(dtype)
    return recorder.calls


def every_sample(backend: str) -> None:
    on_host = backends.supports(backend, "sample_patches", "cpu", torch.float32) == "ok"
    device = "cpu" if on_host else "cuda"
    for op, samples in SAMPLE_INPUTS.items():
        for dtype in (torch.float32, torch.bfloat16):
            if backends.supports(backend, op, device, dtype) != "ok":
                continue
            for sample in samples(dtype, device, torch.Generator().manual_seed(0)):
                run(op, sample, backend=backend)
    for normalize in (False, True):
        maps = [
            torch.randn(2, 3, 4, 5, device=device, requires_grad=True),
            torch.randn(1, 6, 2, 2, device=device),
        ]
        if backends.supports(backend, "tap_patches", device, torch.float32) == "ok":
            passed, patches, _ = fastnce.tap_patches(maps, 3, normalize=normalize, backend=backend)
            sum(x.sum() for x in passed + patches).backward()


def every_op_over_maps(dtype: torch.dtype) -> None:
    x = torch.randn(2, 16, 6, 5).to(dtype).requires_grad_()
    weight, bias = torch.randn(32, 16, 3, 3, requires_grad=True), torch.randn(32)
    for reflect in (False, True):
        conv3x3(x, weight, bias, reflect=reflect).sum().backward()
    instance_norm(instance_norm(x, slope=0.2), x).square().sum().backward()
    for halve in (False, True):
        blur_resample(x, blur_kernel(16, halve=halve), halve=halve).sum().backward()


def one_block_of_labelled_lse(dtype: torch.dtype) -> None:
    """Every row has a column of its label, so that all is finite."""
    x, y = torch.randn(7, 5).to(dtype), torch.randn(40, 5).to(dtype)
    labels = torch.arange(7) % 3, torch.arange(40) % 3
    state = torch.zeros(7, 4, dtype=torch.float64), torch.zeros(40, 4, dtype=torch.float64)
    for tau in (0.5, torch.tensor(0.5)):
        native.labelled_lse_forward(x, y, *labels, tau, own=False)
        native.labelled_lse_backward(x, y, *labels, tau, *state, own=False)


def registered() -> list[str]:
    """The operators that have a kernel."""
    keys = ("CPU", "CUDA")
    return [
        name
        for name in sorted({name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()})
        if name.split("::")[0] in NAMESPACES.values()
        and any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)
    ]


def test_samples_reach_every_registered_op(recorded):
    # What has no tensor argument is a query of the library, not an op.
    with_tensors = {name for name in registered() if takes_tensors(name)}
    assert {name.split(".")[0] for name in recorded} == with_tensors
    assert {name.split("::")[0] for name in recorded} == set(NAMESPACES.values())


def takes_tensors(name: str) -> bool:
    namespace, _, op = name.partition("::")
    overload = getattr(getattr(torch.ops, namespace), op).default
    return any("Tensor" in str(argument.type) for argument in overload._schema.arguments)


@pytest.mark.parametrize("name", registered())
def test_opcheck(name, recorded):
    if not takes_tensors(name):
        pytest.skip("no tensors")
    for func, args, kwargs in recorded[name][::4] + recorded[name][-1:]:
        detached = torch.utils._pytree.tree_map(
            lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x, args
        )
        torch.library.opcheck(
            func,
            detached,
            kwargs,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.parametrize("name", registered())
def test_outputs_are_written_whole(name, recorded):
    """With fresh memory filled with NaN, an element that a kernel forgot would be NaN."""
    if not takes_tensors(name):
        pytest.skip("no tensors")
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    try:
        for func, args, kwargs in recorded[name]:
            for out in torch.utils._pytree.tree_leaves(func(*args, **kwargs)):
                if isinstance(out, torch.Tensor):
                    assert out.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)
