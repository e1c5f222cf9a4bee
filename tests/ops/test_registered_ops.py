"""Every op that a compiled backend registers with PyTorch keeps PyTorch's rules for registered ops."""

import pytest
import torch
from forms import OPS, gaussian, samples
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fastnce
from fastnce import backends
from fastnce.backends import native
from fastnce.ops.blur_resample import blur_kernel, blur_resample
from fastnce.ops.conv3x3 import conv3x3
from fastnce.ops.instance_norm import instance_norm
from fastnce.testing import run

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
            self.calls.setdefault(func.name().split(".")[0], []).append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def recorded() -> dict[str, list]:
    """Calls of every op, in every form of the samples, forward and backward, in every dtype."""
    with Recorder() as recorder:
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
            for backend in NAMESPACES:
                every_sample(backend, dtype)
            if "native" in NAMESPACES:
                one_block_of_labelled_lse(dtype)
                if dtype in (torch.float32, torch.bfloat16):
                    every_op_over_maps(dtype)
    return recorder.calls


def every_sample(backend: str, dtype: torch.dtype) -> None:
    on_host = backends.supports(backend, "sample_patches", "cpu", torch.float32) == "ok"
    device = "cpu" if on_host else "cuda"
    for op in OPS:
        if backends.supports(backend, op, device, dtype) == "ok":
            for sample in samples(op, dtype, device, backend).values():
                run(op, sample, backend=backend)
    if backends.supports(backend, "tap_patches", device, dtype) == "ok":
        shapes = ((2, 3, 4, 5), (1, 6, 2, 2))
        maps = [gaussian(*shape).to(device, dtype).requires_grad_() for shape in shapes]
        for normalize in (False, True):
            passed, patches, _ = fastnce.tap_patches(maps, 3, normalize=normalize, backend=backend)
            sum(x.sum() for x in passed + patches).backward()


def every_op_over_maps(dtype: torch.dtype) -> None:
    x = gaussian(2, 16, 6, 5).to(dtype).requires_grad_()
    weight, bias = torch.randn(32, 16, 3, 3, requires_grad=True), torch.randn(32)
    for reflect in (False, True):
        conv3x3(x, weight, bias, reflect=reflect).sum().backward()
    instance_norm(instance_norm(x, slope=0.2), x).square().sum().backward()
    for halve in (False, True):
        blur_resample(x, blur_kernel(16, halve=halve), halve=halve).sum().backward()


def one_block_of_labelled_lse(dtype: torch.dtype) -> None:
    """Every row has a column of its label, so that all is finite."""
    x, y = gaussian(7, 5).to(dtype), gaussian(40, 5).to(dtype)
    labels = torch.arange(7) % 3, torch.arange(40) % 3
    state = torch.zeros(7, 4, dtype=torch.float64), torch.zeros(40, 4, dtype=torch.float64)
    for tau in (0.5, torch.tensor(0.5)):
        native.labelled_lse_forward(x, y, *labels, tau, own=False)
        native.labelled_lse_backward(x, y, *labels, tau, *state, own=False)


def takes_tensors(name: str) -> bool:
    """What has no tensor argument is a query of the library, not an op."""
    namespace, _, op = name.partition("::")
    overload = getattr(getattr(torch.ops, namespace), op).default
    return any("Tensor" in str(argument.type) for argument in overload._schema.arguments)


def registered() -> list[str]:
    """The operators that have a kernel."""
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [
        name
        for name in sorted(names)
        if name.split("::")[0] in NAMESPACES.values()
        and any(has_kernel(name, key) for key in ("CPU", "CUDA"))
        and takes_tensors(name)
    ]


each_operator = pytest.mark.parametrize("name", registered())


def test_samples_reach_every_registered_op(recorded):
    assert set(recorded) == set(registered())
    assert {name.split("::")[0] for name in recorded} == set(NAMESPACES.values())


@each_operator
def test_opcheck(name, recorded):
    """Two calls are traced, which takes long; of the others the schema and the shapes that a compiler is told."""
    calls = recorded[name][::3] + recorded[name][-1:]
    for index, (func, args, kwargs) in enumerate(calls):
        tests = ["test_schema", "test_faketensor"]
        if index in (0, len(calls) // 2):
            tests.append("test_aot_dispatch_dynamic")
        detached = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, args)
        torch.library.opcheck(func, detached, kwargs, test_utils=tests)


@each_operator
def test_outputs_are_written_whole(name, recorded, nan_in_fresh_memory):
    """With fresh memory filled with NaN, an element that a kernel forgot would be NaN."""
    for func, args, kwargs in recorded[name]:
        for out in tree_leaves(func(*args, **kwargs)):
            assert not isinstance(out, Tensor) or out.isfinite().all()


@each_operator
def test_what_the_kernels_cannot_take_is_an_error_that_names_the_op(name, recorded):
    """Whoever calls an operator past the checks of the ops must not read beyond a tensor, or numbers of another type."""
    func, args, kwargs = recorded[name][0]
    flat, spec = torch.utils._pytree.tree_flatten((args, kwargs))
    places = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.is_floating_point()]
    first = next(i for i in places if flat[i].dim() >= 2)
    changed = list(flat)
    changed[first] = flat[first].int()
    with pytest.raises(RuntimeError, match=name.split("::")[1].removesuffix("_")):
        arguments, options = torch.utils._pytree.tree_unflatten(changed, spec)
        func(*arguments, **options)
