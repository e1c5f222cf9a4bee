"""What is special to the compiled CPU kernels: blocks, threads, instruction sets, precision, memory."""

import functools
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from forms import (
    OPS,
    PATCH_FORMS,
    among_nans,
    assert_same,
    channels_last,
    gaussian,
    info_nce_form,
    mapped,
    of_rows,
    samples,
    tensors_of,
    transposed,
)

import fastnce
from fastnce.backends import native
from fastnce.testing import Sample, assert_close_to_truth, run, truth

pytestmark = pytest.mark.skipif(native.available() != "ok", reason=native.available())

# What makes the kernels cut their matrices in every way that they know: op, shape of the queries, of the other rows or its form, form or t.
LARGE = {
    "several_panels": ("info_nce", (1100, 20), None, "in_batch"),
    "several_panels_symmetric": ("info_nce", (1100, 20), None, "symmetric"),
    "one_row": ("info_nce", (1, 16), (70_000, 16), "queue"),
    "few_rows_recomputed": ("info_nce", (50, 4), (90_000, 4), "queue"),
    "few_columns": ("info_nce", (3000, 130), (7, 130), "queue"),
    "keys_and_queue": ("info_nce", (600, 33), (900, 33), "queue in_batch"),
    "batch_and_queue": ("info_nce", (3, 70, 33), (50, 33), "queue in_batch"),
    "own": ("info_nce", (2, 30, 27), (2, 30, 150, 27), "own in_batch"),
    "many_small": ("patch_nce", (9, 40, 27), None, 4.0),  # where CUT's constant counts
    "layers": ("patch_nce", (1, 256, 256), None, 0.07),  # five of them
    # Its forms: two sides that are no whole blocks; in fp64 more of these than are kept at a time; temperatures as below.
    **{
        f"{form} {shape[1]} {tau}": ("patch_nce", shape, form, tau)
        for form in PATCH_FORMS
        if form != "image"
        for shape, tau in (((4, 150, 27), 0.02), ((4, 150, 27), 0.2), ((1, 1300, 20), 0.2))
    },
    "panels": ("pairwise_cosine_similarity", (1300, 40), (700, 40), ""),
    "panels_itself": ("pairwise_cosine_similarity", (1300, 40), None, ""),
    "few_other_rows": ("pairwise_cosine_similarity", (1300, 40), (30, 40), ""),
    "few_rows": ("pairwise_cosine_similarity", (5, 33), (2100, 33), ""),
    "odd": ("pairwise_cosine_similarity", (2, 301, 7), (2, 155, 7), ""),
    "many": ("pairwise_cosine_similarity", (4, 9, 50, 21), (4, 9, 61, 21), ""),
    "many_itself": ("pairwise_cosine_similarity", (4, 9, 50, 21), None, ""),
    # Blocks that the diagonal cuts; of the largest more than are kept at a time. Kernels that keep each row's maximum, and not.
    **{
        f"{op} {count} {tau}": (op, (count, depth), None, tau)
        for op, depth in (("sup_con", 40), ("conditional_contrastive", 20))
        for count in (47, 130, 700, 2500)
        for tau in (0.01, 0.2)
    },
}
each_large = pytest.mark.parametrize("name", LARGE)


@functools.lru_cache(maxsize=2)
def large(name: str, dtype: torch.dtype, reduction: str = "none") -> Sample:
    op, shape, others, form = LARGE[name]
    x, y = gaussian(*shape), 0.3 * gaussian(*shape) + gaussian(*shape, seed=1)
    tau = {"info_nce": 0.07, "pairwise_cosine_similarity": 0.3}.get(op, form)
    temperature = torch.tensor(tau, dtype=torch.promote_types(dtype, torch.float32))
    options = {"temperature": temperature, "reduction": reduction}
    if op == "info_nce":
        rows = None if others is None else gaussian(*others, seed=2).to(dtype)
        options |= info_nce_form(form, rows, rows)
    elif op == "pairwise_cosine_similarity":
        y = None if others is None else gaussian(*others, seed=2)
    elif op == "patch_nce":
        options |= PATCH_FORMS[others or "image"]
    else:
        generator = torch.Generator().manual_seed(0)
        classes = 20 if op == "conditional_contrastive" else shape[0] // 7  # below and above 8 rows
        options["labels"] = torch.randint(classes, shape[:1], generator=generator)
    sample = of_rows(op, [x] if y is None else [x, y], dtype, **options)
    if name == "layers":
        for key in ("query_features", "key_features"):
            x = sample.arguments[key].detach()
            sample.arguments[key] = [x.roll(i, -2).requires_grad_() for i in range(5)]
    return Sample(f"{name} {reduction}", sample.arguments)


def assert_near_truth(name: str, dtype: torch.dtype, reduction: str) -> None:
    """Relative to the largest element, or, where the factors of products are rounded to half precision, in the norm."""
    op, sample = LARGE[name][0], large(name, dtype, reduction)
    got = run(op, sample, backend="native")
    single = 5e-5 if "labels" in sample.arguments else 2e-5
    limit = {torch.float64: 1e-11, torch.float32: single, torch.bfloat16: 6e-3}[dtype]
    for key, true in truth(op, sample).items():
        exact = dtype != torch.bfloat16
        cancels = op == "pairwise_cosine_similarity" and dtype != torch.float64
        if key == "d temperature" and (cancels or op == "conditional_contrastive" and not exact):
            continue  # a sum that cancels: the contract of every op bounds it
        size = (lambda x: x.abs().max()) if exact else torch.linalg.vector_norm
        assert size(got[key].double() - true) < limit * size(true), (dtype, reduction, key)


@each_large
def test_blocks_add_up(name):
    """Gradients that the forward gives, and those of the backward."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for reduction in ("none", "sum"):
            if dtype != torch.bfloat16 or "2500" not in name:
                assert_near_truth(name, dtype, reduction)


@each_large
def test_neither_threads_nor_neighbours_change_a_bit(name, threads):
    """The same numbers as slices of buffers that are NaN everywhere else."""
    op = LARGE[name][0]
    for dtype, reduction in [
        (torch.float32, "none"),
        (torch.float32, "sum"),
        (torch.bfloat16, "none"),
        (torch.float64, "sum"),
    ]:
        sample = large(name, dtype, reduction)
        threads(1)
        expected = run(op, sample, backend="native")
        for count in (2, 3):
            threads(count)
            assert_same(run(op, sample, backend="native"), expected, f"{count} threads")
    poisoned = mapped(sample, "", lambda x: among_nans(x) if x.dim() > 1 else x)
    assert_same(run(op, poisoned, backend="native"), expected, "among NaNs")


@pytest.fixture
def medium_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", [name for name in LARGE if " " not in name])
def test_medium_precision_rounds_the_factors_of_products(name, medium_precision):
    op, sample = LARGE[name][0], large(name, torch.float32)
    got = run(op, sample, backend="native")
    for key, true in truth(op, sample).items():
        assert (got[key].double() - true).norm() < 2e-2 * true.norm(), key


def test_medium_precision_is_another_computation(medium_precision, instruction_sets):
    """Of float32 inputs alone, and only where the processor multiplies bfloat16."""
    for level in instruction_sets():
        for dtype in (torch.float32, torch.float64):
            sample = large("several_panels", dtype)
            medium = run("info_nce", sample, backend="native")["out"]
            torch.set_float32_matmul_precision("highest")
            same = torch.equal(medium, run("info_nce", sample, backend="native")["out"])
            torch.set_float32_matmul_precision("medium")
            assert same == (level != "avx512bf16" or dtype == torch.float64)


@pytest.mark.parametrize("name", ["panels", "panels_itself", "few_other_rows", "few_rows", "many"])
def test_gradients_alone_and_strides_of_what_arrives(name):
    """Of a matrix of similarities, whose upstream gradient is a matrix too."""
    sample = large(name, torch.float32)
    out = fastnce.pairwise_cosine_similarity(**sample.arguments, backend="native")
    upstream = gaussian(*out.shape, seed=3).float()
    leaves = tensors_of(sample)
    together = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    for layout in (transposed, among_nans, channels_last):
        other = torch.autograd.grad(out, leaves, layout(upstream), retain_graph=True)
        assert all(map(torch.equal, other, together)), layout
    expanded = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    for x, y in zip(expanded, torch.autograd.grad(out, leaves, torch.ones_like(out)), strict=True):
        torch.testing.assert_close(x, y)
    for chosen in range(len(leaves)):
        for i, x in enumerate(leaves):
            x.requires_grad_(i == chosen)
        alone = fastnce.pairwise_cosine_similarity(**sample.arguments, backend="native")
        (got,) = torch.autograd.grad(alone, leaves[chosen], upstream)
        assert (got - together[chosen]).norm() <= 2e-6 * together[chosen].norm()
    for x in leaves:
        x.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_kept_goes_past_the_caches(dtype):
    """More than 16 MB of exponentials, in panels of 768 rows, of which the second takes the first one's pages and the last one is smaller."""
    rows = (
        gaussian(n, 6, seed=n + i).to(dtype).requires_grad_()
        for i, n in enumerate((1600, 1600, 7000))
    )
    names = ("query", "positive_key", "negative_keys")
    call = dict(zip(names, rows, strict=True)) | {"temperature": 0.2}
    assert_close_to_truth("info_nce", "native", Sample("queue", call), dtype)


def test_symmetric_beyond_one_block_of_columns():
    """It is the mean of both directions."""
    q, k = (gaussian(8300, 3, seed=seed).float().requires_grad_() for seed in range(2))
    for reduction in ("none", "sum"):
        of = functools.partial(fastnce.info_nce, temperature=0.2, reduction=reduction)
        both = of(q, k, symmetric=True, backend="native")
        mean = (of(q, k, backend="native") + of(k, q, backend="native")) / 2
        torch.testing.assert_close(both, mean)
        grads, expected = (torch.autograd.grad(x.sum(), [q, k]) for x in (both, mean))
        for x, y in zip(grads, expected, strict=True):
            torch.testing.assert_close(x / y.abs().max(), y / y.abs().max())


@pytest.mark.parametrize(("count", "tau"), [(8300, 0.01), (16_700, 0.3)])
def test_sup_con_beyond_one_block_of_columns(count, tau):
    """Of more columns than a part takes, against the definition row by row."""
    x = gaussian(count, 3)
    labels, wide = torch.arange(count) // 2, torch.float64 if tau < 0.1 else torch.float32
    unit = torch.nn.functional.normalize(x).to(wide)
    expected, grad = [], torch.zeros_like(unit)
    for rows in torch.arange(count).split(1000):
        logits = unit[rows] @ unit.T / tau
        logits[torch.arange(len(rows)), rows] = -torch.inf
        lse = logits.logsumexp(1, keepdim=True)
        expected.append((lse - logits.gather(1, (rows ^ 1).unsqueeze(1))).squeeze(1))
        share = logits.sub_(lse).exp_()
        grad[rows] += (share @ unit - unit[rows ^ 1]) / tau
        grad += share.T @ unit[rows] / tau
        grad[rows ^ 1] -= unit[rows] / tau
    tangent = grad - (grad * unit).sum(1, keepdim=True) * unit
    for reduction in ("none", "sum"):
        leaf = x.float().requires_grad_()
        options = {"temperature": tau, "reduction": reduction, "backend": "native"}
        loss = fastnce.sup_con(leaf, labels, **options)
        (got,) = torch.autograd.grad(loss.sum(), leaf)
        true = torch.cat(expected).float()
        true = true if reduction == "none" else true.sum()
        torch.testing.assert_close(loss, true, rtol=1e-5, atol=1e-5 / tau)
        norm = x.norm(dim=1, keepdim=True)
        assert (got * norm - tangent).norm() < 1e-4 * tangent.norm()


def test_every_instruction_set_keeps_the_numerical_contract(instruction_sets):
    for _ in instruction_sets():
        for op in OPS:
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                for sample in samples(op, dtype, backend="native").values():
                    assert_close_to_truth(op, "native", sample, dtype)
        for name in ("several_panels", "keys_and_queue", "few_columns", "odd"):
            assert_near_truth(name, torch.float64, "none")


def test_instruction_sets_have_names_and_are_really_chosen(instruction_sets, monkeypatch):
    """A chain of multiply-adds is rounded once with FMA and twice without: the levels cannot agree to the last bit."""
    sample, losses = large("several_panels", torch.float32), {}
    for level in instruction_sets():
        losses[level] = run("info_nce", sample, backend="native")["out"]
    assert next(iter(losses)) == "portable" and native.instruction_set() == list(losses)[-1]
    assert "avx2" not in losses or not torch.equal(losses["portable"], losses["avx2"])
    monkeypatch.setenv("FASTNCE_CPU_ISA", "avx1024")
    with pytest.raises(RuntimeError, match="FASTNCE_CPU_ISA=avx1024.*portable"):
        run("info_nce", sample, backend="native")


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


def test_fma_peak_is_what_a_processor_can_do(threads):
    """Chains of multiply-adds that the compiler merged or left out would be quicker than two units of 64 bytes at 7 GHz."""
    threads(1)
    for dtype, flop_a_cycle in ((torch.float64, 32), (torch.float32, 64), (torch.bfloat16, 128)):
        assert 0 < native.fma_peak(0.02, dtype) < 7 * flop_a_cycle
    for seconds in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(RuntimeError, match=r"fma_peak: seconds .*\(0, 60\]"):
            native.fma_peak(seconds)


def test_supports_gives_reasons():
    assert native.supports("info_nce", "cpu", torch.bfloat16) == "ok"
    assert "no compiled kernel" in native.supports("moco", "cpu", torch.float32)
    assert "run on cpu" in native.supports("info_nce", "cuda", torch.float32)
    assert "float64, float32" in native.supports("info_nce", "cpu", torch.int64)
