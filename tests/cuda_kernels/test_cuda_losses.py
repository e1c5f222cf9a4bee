"""The losses' CUDA kernels and their host side, in every form, against the reference in fp64."""

import itertools
from collections.abc import Callable

import pytest
import torch
from emulated_or_gpu import DEVICE
from loss_forms import (
    AWKWARD,
    CASES,
    PATCH_FORMS,
    check_awkward_rows,
    check_form,
    check_form_of_patch_nce,
    each_offset,
    each_patch_form,
    gaussian,
    labelled,
    seeded,
)
from torch import Tensor

from fastnce.backends import cuda
from fastnce.testing import Sample, assert_close_to_truth, run, truth

DTYPES = FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_offset
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("own")])
def test_forms(name, tau, monkeypatch):
    if name == "few_rows":  # and many parts of the columns
        monkeypatch.setenv("FASTNCE_EMULATED_MULTIPROCESSORS", "30")
    check_form(cuda, DEVICE, name, tau, dtype=BF16)


def sample_of(form: str, *shapes: tuple[int, ...], dtype=BF16, tau=0.1, **options) -> Sample:
    """InfoNCE of query and key of the first shape, with negatives of the second if there is one; or PatchNCE of layers."""
    generator = seeded()

    def rows(shape: tuple[int, ...]) -> Tensor:
        return gaussian(shape, generator, dtype).to(DEVICE).requires_grad_()

    of_temperature = torch.tensor(tau, device=DEVICE, requires_grad=True)
    options = {"temperature": of_temperature, **options}
    if form == "patch_nce":
        queries, keys = ([rows(shape) for shape in shapes] for _ in "qk")
        return Sample(form, {"query_features": queries, "key_features": keys, **options})
    arguments = {"query": rows(shapes[0]), "positive_key": rows(shapes[0])}
    if len(shapes) > 1:
        arguments["negative_keys"] = rows(shapes[1])
    options["in_batch_negatives"] = form != "queue"
    options["symmetric"] = form == "symmetric"
    options["normalize"] = form != "dot"
    return Sample(form, arguments | options)


# Form, (B, N, D), rows of the queue, temperature, multiprocessors. Depths of all kernels of csrc/cuda/pairs.h, fewer rows and more
# than a block has, tiles of columns in one part and in several, blocks of rows side by side and one after another, both offsets.
PASSES = [
    ("queue", (1, 1, 64), 1, 0.07, 4),
    ("queue", (1, 17, 200), 252, 0.1, 4),
    ("queue", (2, 65, 100), 63, 0.5, 4),
    ("queue", (1, 70, 64), 1030, 0.07, 8),
    ("queue", (1, 65, 192), 530, 0.01, 8),
    ("queue", (1, 130, 1000), 2, 0.07, 4),
    ("queue", (1, 65, 512), 70, 0.01, 132),
    ("in_batch", (1, 65, 27), None, 0.1, 4),
    ("in_batch", (1, 20, 90), 50, 0.07, 4),
    ("in_batch", (2, 65, 256), None, 0.01, 132),
    ("in_batch", (2, 65, 272), None, 0.1, 4),
    ("in_batch", (6, 20, 270), None, 0.1, 1),
    ("symmetric", (1, 65, 48), None, 0.01, 4),
    ("symmetric", (1, 330, 64), None, 0.07, 1),
    ("symmetric", (1, 330, 64), None, 0.01, 1),
    ("symmetric", (2, 70, 320), None, 0.07, 4),
    ("symmetric", (1, 70, 384), None, 0.07, 3),
    ("symmetric", (1, 65, 512), None, 0.01, 4),
    ("dot", (1, 65, 80), None, 10.0, 4),
    ("sup_con", (1, 63, 48), None, 0.5, 4),
    ("sup_con", (1, 130, 128), None, 0.07, 4),
    ("sup_con", (1, 70, 330), None, 0.01, 4),
    ("conditional_contrastive", (1, 63, 48), None, 0.5, 4),
    ("conditional_contrastive", (1, 130, 128), None, 0.01, 4),
    ("conditional_contrastive", (1, 70, 330), None, 0.01, 4),
]


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(80, BF16), (80, FP16), (90, BF16), (90, FP16)],
    ids=str,
)
@pytest.mark.parametrize("case", PASSES, ids=str)
def test_passes_of_every_gpu(case, capability, dtype, monkeypatch):
    """Gradients at once with the sum, and later, in other orders of the threads; one of them with the temperature's."""
    form, shape, queue, tau, multiprocessors = case
    monkeypatch.setenv("FASTNCE_EMULATED_CAPABILITY", str(capability))
    monkeypatch.setenv("FASTNCE_EMULATED_MULTIPROCESSORS", str(multiprocessors))
    for seed, reduction in enumerate(("sum", "none")):
        monkeypatch.setenv("FASTNCE_EMULATOR_SEED", str(seed))
        options = {"dtype": dtype, "tau": tau, "reduction": reduction}
        if (reduction == "none") == (dtype == BF16):
            options["temperature"] = tau
        if form in ("sup_con", "conditional_contrastive"):
            sample = labelled(form, *shape[1:], DEVICE, **options)
            assert_close_to_truth(form, "cuda", sample, dtype)
        else:
            shapes = [shape] if queue is None else [shape, (queue, shape[-1])]
            assert_close_to_truth("info_nce", "cuda", sample_of(form, *shapes, **options), dtype)


# Each depth of PatchNCE's tiles; few problems, whose columns warps share, and more than there are multiprocessors where
# emulated; several tiles of columns, more than two of them, whole ones and ragged ones.
SHAPES = [(1, 40, 20), (5, 33, 64), (1, 128, 100), (4, 40, 128), (1, 260, 256), (4, 70, 250)]
# More layers than one launch holds; one that is deeper than the kernel takes, of 16 bits.
LAYERS = [(2, 9, 24), (1, 12, 256), (3, 1, 7), (2, 20, 70), *[(1, 3, 8)] * 14]
DEEP_LAYERS = [(2, 9, 24), (1, 12, 300)]


@pytest.mark.parametrize(
    ("shapes", "dtype"),
    [
        *itertools.product([*([shape] for shape in SHAPES), LAYERS], DTYPES),
        *itertools.product([DEEP_LAYERS], [BF16, FP16]),
    ],
    ids=str,
)
def test_patch_nce(shapes, dtype):
    tau = 0.5 if shapes is LAYERS else 0.07
    sample = sample_of("patch_nce", *shapes, dtype=dtype, tau=tau)
    assert_close_to_truth("patch_nce", "cuda", sample, dtype)


@pytest.mark.skipif(DEVICE != "cpu", reason="emulated alone")
@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_patch_nce_on_gpus_with_less_shared_memory(capability, dtype, monkeypatch):
    monkeypatch.setenv("FASTNCE_EMULATED_CAPABILITY", str(capability))
    sample = sample_of("patch_nce", (1, 40, 140), dtype=dtype)
    assert_close_to_truth("patch_nce", "cuda", sample, dtype)


@pytest.mark.parametrize("capability", [80, 90])
def test_sums_of_many_equal_numbers(capability, monkeypatch):
    """Added one by one, each sum would be rounded the same way."""
    monkeypatch.setenv("FASTNCE_EMULATED_CAPABILITY", str(capability))
    monkeypatch.setenv("FASTNCE_EMULATED_MULTIPROCESSORS", "1")
    sample = sample_of("queue", (1, 2, 64), (4096, 64), tau=0.3)
    queue = sample.arguments["negative_keys"].data
    queue.copy_(queue[:1].expand_as(queue))
    found, expected = run("info_nce", sample, backend="cuda"), truth("info_nce", sample)
    assert abs(found["out"] - expected["out"]) < 2e-6
    tau = "d temperature"
    assert abs(found[tau] / expected[tau] - 1) < 2e-6


@each_offset
@each_patch_form
def test_forms_of_patch_nce(options, tau):
    check_form_of_patch_nce(cuda, DEVICE, options, tau, depth=256)


@each_dtype
@pytest.mark.parametrize("options", PATCH_FORMS[1:], ids="+".join)
def test_forms_of_patch_nce_in_tiles(options, dtype):
    """Warps that share columns, and blocks of 64 rows, where emulated."""
    for shape in ((1, 40, 140), (4, 70, 64)):
        sample = sample_of("patch_nce", shape, dtype=dtype, **options)
        assert_close_to_truth("patch_nce", "cuda", sample, dtype)


def embedded(x: Tensor, way: str) -> Tensor:
    """The same values with other strides, NaN beside them."""
    shape, depth = x.shape[:-1], x.shape[-1]
    if way == "sliced":
        place = x.new_full((*shape, 2 * depth + 3), torch.nan)[..., 1::2][..., :depth]
    elif way == "shifted":  # rows side by side, but no address is a multiple of 16 bytes
        place = x.new_full((*shape, depth + 1), torch.nan)[..., 1:]
    elif way == "padded":  # still in vectors of 16 bytes
        place = x.new_full((*(n + 1 for n in shape), depth + 8), torch.nan)
        place = place[(*[slice(1, None)] * len(shape), slice(8, None))]
    else:
        place = x.new_full(tuple(reversed(x.shape)), torch.nan)
        place = place.permute(*range(x.dim() - 1, -1, -1))
    return place.copy_(x)


@each_dtype
@pytest.mark.parametrize("way", ["sliced", "shifted", "padded", "transposed"])
def test_strides(way, dtype):
    """Bitwise the numbers of contiguous rows."""
    queue = (2, 9, 24), (5, 24)
    samples = [("patch_nce", sample_of("patch_nce", (2, 19, 24), dtype=dtype))]
    if dtype != FP32:
        for reduction in ("sum", "none"):
            sample = sample_of("in_batch", *queue, dtype=dtype, reduction=reduction)
            samples.append(("info_nce", sample))
    for op, sample in samples:
        convert = lambda name, x: embedded(x, way) if x.dim() > 0 else x  # noqa: E731
        found = run(op, sample, backend="cuda", convert=convert)
        for name, x in run(op, sample, backend="cuda").items():
            assert torch.equal(found[name], x) and x.isfinite().all(), (op, name)


def test_equal_gradients_that_arrive_and_extreme_ones():
    """One number for all rows (an expanded tensor), all zero, and so small that fp16 has no such number."""

    def gradient(reduction: str, change: Callable[[Tensor], Tensor]) -> Tensor:
        sample = sample_of("in_batch", (1, 9, 24), dtype=FP16, reduction=reduction)
        convert = lambda name, x: change(x) if name == "upstream" else x  # noqa: E731
        return run("info_nce", sample, backend="cuda", convert=convert)["d query"]

    def backward(value: float) -> Tensor:
        return gradient("none", lambda x: x.new_full((1, 1), value).expand(1, 9))

    now = gradient("sum", torch.ones_like)
    torch.testing.assert_close(backward(1.0), now, rtol=2e-3, atol=1e-3)
    assert not backward(0.0).any()
    assert torch.equal(backward(2.0**-30) != 0, (now.float() * 2.0**-30).half() != 0)


@pytest.mark.parametrize(("kind", "dtype"), [case for case in AWKWARD if case[0] != "own"])
@pytest.mark.parametrize("tau", [0.005, 0.07, 10.0])
def test_awkward_rows(kind, dtype, tau):
    check_awkward_rows("cuda", DEVICE, kind, dtype, tau)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("depth", [64, 300])
def test_a_row_of_nan_spoils_its_own_loss_alone(depth, capability, monkeypatch):
    monkeypatch.setenv("FASTNCE_EMULATED_CAPABILITY", str(capability))
    sample = sample_of("queue", (1, 70, depth), (100, depth), dtype=BF16, reduction="none")
    clean = run("info_nce", sample, backend="cuda")
    sample.arguments["query"].data[0, 5, 3] = torch.nan
    spoilt = run("info_nce", sample, backend="cuda")
    others = torch.arange(70, device=DEVICE) != 5
    for name in ("out", "d query", "d positive_key"):
        assert torch.equal(spoilt[name][:, others], clean[name][:, others])
        assert spoilt[name][:, 5].isnan().all()
    assert spoilt["d negative_keys"].isnan().all()


def test_a_bad_image_leaves_the_others():
    sample = sample_of("patch_nce", (3, 9, 20), dtype=FP32)
    clean = run("patch_nce", sample, backend="cuda")
    sample.arguments["key_features"][0].data[1, 4, 7] = torch.nan
    spoilt = run("patch_nce", sample, backend="cuda")
    assert spoilt["out"].isnan() and spoilt["d temperature"].isnan()
    for name in ("d query_features[0]", "d key_features[0]"):
        assert torch.equal(spoilt[name][::2], clean[name][::2])
        assert spoilt[name][1].isnan().any(-1).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sup_con_of_more_rows_than_a_block_has_threads(reduction, generator):
    x = gaussian((300, 5), generator, BF16).to(DEVICE).requires_grad_()
    labels = torch.randint(200, (300,), generator=generator).to(DEVICE)  # many without a positive
    sample = Sample("many", {"features": x, "labels": labels, "reduction": reduction})
    assert_close_to_truth("sup_con", "cuda", sample, BF16)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precision_of_float32_products(precision):
    """bfloat16 factors where they are allowed, and float32's accuracy otherwise."""
    sample = sample_of("patch_nce", (1, 40, 64), dtype=FP32)
    torch.set_float32_matmul_precision(precision)
    try:
        found = run("patch_nce", sample, backend="cuda")
    finally:
        torch.set_float32_matmul_precision("highest")
    expected = truth("patch_nce", sample)
    # The temperature's gradient is a sum over all pairs, of another size.
    rows = [name for name in found if name != "d temperature"]
    off = max(((found[x] - expected[x]).abs().max() / expected[x].abs().max()) for x in rows)
    # A logit of 40 products of factors rounded to 8 bits, against sums in float32.
    least, largest = (1e-4, 2e-2) if precision == "medium" else (0, 1e-5)
    assert least <= off <= largest


def test_float32_products_lose_nothing_to_the_accumulator():
    """Rows near their keys: the positive's logit is a sum of squares, from which truncation takes something at each step."""
    sample = sample_of("patch_nce", (1, 32, 256), dtype=FP32, tau=0.07)
    query, key = (sample.arguments[name][0].data for name in ("query_features", "key_features"))
    key.mul_(0.03).add_(query)
    found, expected = (run("patch_nce", sample, backend="cuda"), truth("patch_nce", sample))
    # A loss of 4e-5 changes by this much of itself where a logit changes by it: 14 times a rounding, and a few more of the norms.
    assert abs(found["out"] / expected["out"] - 1) < 4e-6


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        ("info_nce", [(1, 20, 90), (50, 90)]),
        ("patch_nce", [(1, 70, 20)]),
        ("patch_nce", [(5, 33, 64)]),
    ],
)
def test_repeated_calls_are_bitwise_equal(op, shapes, monkeypatch):
    """In whatever order blocks and threads run."""
    sample = sample_of(op, *shapes, dtype=BF16)
    first = run(op, sample, backend="cuda")
    for seed in ("0", "1", "2", "3"):
        monkeypatch.setenv("FASTNCE_EMULATOR_SEED", seed)
        for name, x in run(op, sample, backend="cuda").items():
            assert torch.equal(x, first[name]), name


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_deep_rows_lose_no_more_than_tensor_cores_drop(dtype):
    """Losses that are not reduced, whose positives count fully."""
    generator = seeded()
    z1 = gaussian((259, 300), generator, dtype).to(DEVICE).requires_grad_()
    z2 = gaussian((259, 300), generator, dtype).to(DEVICE).requires_grad_()
    sample = Sample("deep", {"z1": z1, "z2": z2, "temperature": 0.2, "reduction": "none"})
    assert_close_to_truth("nt_xent", "cuda", sample, dtype)
