"""What is special to the compiled CPU kernels: instruction sets, memory, registration. Blocks: test_native_blocks.py."""

import itertools
import subprocess
import sys

import pytest
import torch
from native_calls import (
    LEVELS,
    available_levels,
    deviations,
    kernel_results,
    problem,
    reference_results,
)

from fastnce.backends import native
from fastnce.testing import SAMPLE_INPUTS, assert_close_to_truth

pytestmark = pytest.mark.skipif(native.available() != "ok", reason=native.available())

OPS = (
    "info_nce",
    "patch_nce",
    "conditional_contrastive",
    "sample_patches",
    "sup_con",
    "nt_xent",
    "pairwise_cosine_similarity",
)


@pytest.mark.parametrize("op", OPS)
def test_every_instruction_set_keeps_the_numerical_contract(op, monkeypatch):
    levels = available_levels(monkeypatch)
    assert "portable" in levels
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        samples = list(SAMPLE_INPUTS[op](dtype, "cpu", torch.Generator().manual_seed(0)))
        for level, sample in itertools.product(levels, samples):
            monkeypatch.setenv("FASTNCE_CPU_ISA", level)
            assert_close_to_truth(op, "native", sample, dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["several_panels", "keys_and_queue", "few_columns"])
def test_blocks_add_up_on_every_instruction_set(name, level, monkeypatch):
    if level not in available_levels(monkeypatch):
        pytest.skip(f"this processor does not have {level}")
    monkeypatch.setenv("FASTNCE_CPU_ISA", level)
    assert max(deviations(kernel_results(name, torch.float64), reference_results(name))) < 1e-11


def test_instruction_set_is_really_chosen(monkeypatch):
    """A chain of multiply-adds is rounded once with FMA and twice without: the levels cannot agree to the last bit."""
    if "avx2" not in available_levels(monkeypatch):
        pytest.skip("this processor has one level only")
    losses = {}
    for level in ("portable", "avx2"):
        monkeypatch.setenv("FASTNCE_CPU_ISA", level)
        losses[level] = kernel_results("several_panels")[0]
    assert not torch.equal(losses["portable"], losses["avx2"])


def test_medium_precision_is_another_computation(monkeypatch):
    """Of float32 inputs alone, and only where the processor multiplies bfloat16."""
    before = torch.get_float32_matmul_precision()

    def losses(precision, dtype):
        torch.set_float32_matmul_precision(precision)
        return kernel_results("several_panels", dtype)[0]

    levels = available_levels(monkeypatch)
    try:
        for level, dtype in itertools.product(levels, (torch.float32, torch.float64)):
            monkeypatch.setenv("FASTNCE_CPU_ISA", level)
            same = torch.equal(losses("medium", dtype), losses("highest", dtype))
            assert same == (level != "avx512bf16" or dtype == torch.float64)
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_instruction_set_has_a_name(monkeypatch):
    found = available_levels(monkeypatch)
    assert native.instruction_set() == found[-1]
    for level in found:
        monkeypatch.setenv("FASTNCE_CPU_ISA", level)
        assert native.instruction_set() == level


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("FASTNCE_CPU_ISA", "avx1024")
    with pytest.raises(RuntimeError, match="FASTNCE_CPU_ISA=avx1024 is unknown. Use portable"):
        kernel_results("own")


MEMORY = r"""
import re, sys, torch, fastnce
def peak():  # ru_maxrss starts at what the parent had; this does not
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\s+(\d+) kB", file.read()).group(1)) / 1024
def step(n, symmetric):
    x = torch.randn(2, n, 8, requires_grad=True)
    fastnce.info_nce(x[0], x[1], symmetric=symmetric, backend="native").backward()
    loss = fastnce.info_nce(x[0], x[1], symmetric=symmetric, reduction="none", backend="native")
    loss.square().sum().backward()
    labels = torch.arange(n) % 10
    fastnce.conditional_contrastive(x[0], x[1], labels, backend="native").backward()
    fastnce.sup_con(x[0], labels, backend="native").backward()
    fastnce.sup_con(x[0], labels, temperature=0.01, backend="native").backward()
    fastnce.nt_xent(x[0, : n // 2], x[1, : n // 2], backend="native").backward()
for symmetric in (False, True):
    step(2048, symmetric)
before = peak()
step(8192, sys.argv[1] == "symmetric")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("form", ["one_direction", "symmetric"])
def test_memory_does_not_grow_with_the_matrix(form):
    """8192 x 8192 floats are 256 MiB; the panels take the same 16 MiB as for 2048 x 2048."""
    out = subprocess.run([sys.executable, "-c", MEMORY, form], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < 60, "MiB"


def registered_calls(dtype: torch.dtype):
    ops = torch.ops.fastnce
    query, key, negatives = torch.randn(2, 5, 7), torch.randn(2, 5, 7), torch.randn(3, 7)
    query, key, negatives = (x.to(dtype) for x in (query, key, negatives))
    tau = torch.tensor(0.3, dtype=torch.promote_types(dtype, torch.float32))
    everything = (True,) * 4
    for queue, symmetric, scale in ((None, True, 0.5), (negatives, False, 0.5), (None, True, None)):
        options = (True, symmetric, True, None, dtype == torch.bfloat16)
        inputs = (query, key, queue, tau, 0.0)
        yield ops.info_nce_forward, (*inputs, *options, scale, symmetric, *everything)
        loss, lse, *_ = ops.info_nce_forward(*inputs, *options, scale, symmetric, *everything)
        yield ops.info_nce_backward, (loss, *inputs, lse, *options, True, True, False, True)
    layers = ([query, query[:, :3]], [key, key[:, :3]], tau, 0.0, -10.0, True, [0.1, 0.2])
    for scales in ([], [0.1, 1.0]):
        yield (
            ops.patch_nce_forward,
            (*layers, scales, 2, len(scales), [True, False], [False, True], True),
        )
    labels = torch.tensor([0, 1, 0, 2, 1])
    inputs = (query[0], key[0], labels, None, 0.3)
    for scale in (None, 0.5):
        yield ops.conditional_contrastive_forward, (*inputs, scale, True, True, False, False)
    loss, lse, *_ = ops.conditional_contrastive_forward(*inputs, None, False, True, True, True)
    yield ops.conditional_contrastive_backward, (loss, *inputs, lse, True, True, True)
    inputs = (query[0], labels, tau, 0.0)
    for scale, mean in ((None, False), (0.5, False), (0.5, True)):
        yield ops.sup_con_forward, (*inputs, scale, mean, True, mean)
    loss, _, lse, *_ = ops.sup_con_forward(*inputs, None, False, True, True)
    yield ops.sup_con_backward, (loss, *inputs, lse, True, True)
    for y, scale in ((key[:, :3], (tau, 0.0)), (None, (None, 0.3))):
        inputs = (query, y, *scale, dtype == torch.bfloat16)
        out = ops.pairwise_cosine_similarity_forward(*inputs)
        yield ops.pairwise_cosine_similarity_forward, inputs
        needs = (True, True, scale[0] is not None)
        yield ops.pairwise_cosine_similarity_backward, (out.mT.contiguous().mT, *inputs, *needs)
    features = [torch.randn(2, 3, 4, 5).to(dtype), torch.randn(1, 6, 2, 2).to(dtype)]
    ids = [torch.tensor([0, 19, 7]), torch.tensor([3, 3])]
    for normalize in (False, True):
        yield ops.sample_patches_forward, (features, ids, normalize)
        patches, norms = ops.sample_patches_forward(features, ids, normalize)
        args = (patches, patches, norms, ids, features, normalize)
        yield ops.sample_patches_backward, args
        maps = [torch.ones_like(x) for x in features]
        yield ops.sample_patches_add_, (maps, *args[:4], normalize)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_opcheck(dtype):
    """Of the dtypes that tests/ops/test_registered_ops.py leaves out."""
    seen = set()
    for op, arguments in registered_calls(dtype):
        torch.library.opcheck(op, arguments)
        seen.add(f"{op._qualified_op_name}")
    assert len(seen) == 12


def among_nans(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as a slice of a buffer that is NaN everywhere else."""
    *outer, rows, columns = x.shape
    buffer = torch.full((*outer, 2 * rows + 3, columns + 5), float("nan"), dtype=x.dtype)
    view = buffer[..., 1 : 2 * rows + 1 : 2, 2 : columns + 2]
    return view.copy_(x)


@pytest.mark.parametrize("name", ["keys_and_queue", "batch_and_queue", "many_small", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbouring_memory_is_not_read(name, dtype):
    (query, key, negatives, temperature), options = problem(name, dtype)
    needs = (True, True, negatives is not None, True)
    clean = native.info_nce_forward(
        query, key, negatives, temperature, **options, grad_scale=1.0, needs=needs
    )
    poisoned = native.info_nce_forward(
        among_nans(query),
        among_nans(key),
        None if negatives is None else among_nans(negatives),
        temperature,
        **options,
        grad_scale=1.0,
        needs=needs,
    )
    for x, y in zip((*clean[:2], *clean[2]), (*poisoned[:2], *poisoned[2]), strict=True):
        assert x is y is None or torch.equal(x, y)
        assert x is None or x.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_query_spoils_its_own_row_alone(value):
    (query, key, negatives, temperature), options = problem("few_columns")
    args = (key, negatives, temperature)
    call = {**options, "grad_scale": 1.0, "needs": (True, False, False, False)}
    loss, _, grads = native.info_nce_forward(query, *args, **call)
    query[0, 5, 3] = value
    spoilt, _, spoilt_grads = native.info_nce_forward(query, *args, **call)
    others = torch.arange(query.shape[1]) != 5
    assert not spoilt[0, 5].isfinite()
    assert torch.equal(spoilt[:, others], loss[:, others])
    assert torch.equal(spoilt_grads[0][:, others], grads[0][:, others])


def test_a_bad_key_of_another_batch_element_does_no_harm():
    (query, key, negatives, temperature), options = problem("many_small")
    call = {**options, "grad_scale": 1.0, "needs": (True, True, False, False)}
    loss, _, grads = native.info_nce_forward(query, key, negatives, temperature, **call)
    key[4] = float("nan")
    spoilt, _, bad = native.info_nce_forward(query, key, negatives, temperature, **call)
    others = torch.arange(len(query)) != 4
    assert spoilt[4].isnan().all()
    for x, y in ((spoilt, loss), (bad[0], grads[0]), (bad[1], grads[1])):
        assert torch.equal(x[others], y[others])


def test_labels_of_any_size_and_sign():
    generator = torch.Generator().manual_seed(0)
    embeddings, proxies = torch.randn(2, 50, 8, generator=generator)
    classes = torch.tensor([-(2**63), -1, 0, 2**31, 2**32, 2**63 - 1])
    labels = torch.randint(len(classes), (50,), generator=generator)
    call = {"grad_scale": 1.0, "needs": (True, True, False)}
    small = native.conditional_contrastive_forward(embeddings, proxies, labels, 0.2, **call)
    large = native.conditional_contrastive_forward(
        embeddings, proxies, classes[labels], 0.2, **call
    )
    assert torch.equal(small[0], large[0])
    assert torch.equal(small[2][0], large[2][0])


def test_errors_name_the_op():
    x = torch.randn(1, 4, 3)
    rest = (None, None, 0.1, True, False, True, None, False, None, False, *(False,) * 4)
    with pytest.raises(RuntimeError, match="info_nce_forward: key has a wrong or empty shape"):
        torch.ops.fastnce.info_nce_forward(x, x[:, :3], *rest)
    with pytest.raises(RuntimeError, match="info_nce_forward: key must have the dtype Float"):
        torch.ops.fastnce.info_nce_forward(x, x.double(), *rest)
    with pytest.raises(RuntimeError, match="info_nce_forward: query has the unsupported dtype Int"):
        torch.ops.fastnce.info_nce_forward(x.int(), x.int(), *rest)
    with pytest.raises(RuntimeError, match="patch id 9 lies outside a map of 9 positions"):
        native.sample_patches_forward([torch.randn(1, 2, 3, 3)], [torch.tensor([0, 9])], False)


# The most that any processor does in a cycle, in float32: four units of 16 bytes, or two of 32 or 64, that multiply and add.
FLOP_A_CYCLE = {"portable": 32, "avx2": 32, "avx512": 64, "avx512bf16": 64}
MOST_GIGAHERTZ = 7


@pytest.mark.parametrize("level", LEVELS)
def test_fma_peak_is_what_a_processor_can_do(level, threads, monkeypatch):
    """Chains of multiply-adds that the compiler merged or left out would be quicker. A busy machine is slower, never quicker."""
    if level not in available_levels(monkeypatch):
        pytest.skip(f"this processor does not have {level}")
    monkeypatch.setenv("FASTNCE_CPU_ISA", level)
    threads(1)
    most = MOST_GIGAHERTZ * FLOP_A_CYCLE[level]
    own = 2 if level == "avx512bf16" else 1  # the instructions for pairs of bfloat16
    for dtype, times in ((torch.float32, 1), (torch.float64, 0.5), (torch.bfloat16, own)):
        assert 0 < native.fma_peak(0.02, dtype) < times * most


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), 1e9])
def test_fma_peak_of_no_time_or_too_much(seconds):
    with pytest.raises(RuntimeError, match=r"fma_peak: seconds must lie in \(0, 60\]"):
        native.fma_peak(seconds)


def test_supports_gives_reasons():
    assert native.supports("info_nce", "cpu", torch.bfloat16) == "ok"
    assert "no compiled kernel" in native.supports("moco", "cpu", torch.float32)
    assert "run on cpu" in native.supports("info_nce", "cuda", torch.float32)
    assert "float64, float32" in native.supports("info_nce", "cpu", torch.int64)
