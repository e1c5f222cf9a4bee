"""The Triton kernels cut into tiles, parts and panels in every way that they know, against the reference in fp64.

On a GPU, or with TRITON_INTERPRET=1 on the host.
"""

import math

import pytest
import torch
from loss_forms import (
    CASES,
    IN_BATCH,
    QUEUE,
    awkward,
    check_awkward_rows,
    check_form,
    check_form_of_patch_nce,
    each_form,
    each_labelled_loss,
    each_offset,
    each_patch_form,
    gaussian,
    labelled,
)

import fastnce
from fastnce import backends
from fastnce.backends import triton as triton_ops

if triton_ops.available() != "ok":
    pytest.skip(triton_ops.available(), allow_module_level=True)

from fastnce import pairwise_cosine_similarity, triton_kernels
from fastnce.testing import Sample, assert_close_to_truth, rows, run
from fastnce.triton_kernels import config, launch
from fastnce.triton_kernels.rows import pack

DEVICE = "cpu" if launch.INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, nan_in_fresh_memory):
    """Several of everything in small problems."""
    tile = config.Tile(16, 16, 4, 2, 32)
    monkeypatch.setattr(config, "tile", lambda *arguments: tile)
    monkeypatch.setattr(config, "PANEL_ELEMENTS", (16 * 60, 16 * 60))
    monkeypatch.setattr(config, "ADDED_ELEMENTS", 1)
    monkeypatch.setattr(config, "COLUMN_PARTS", 160)  # of 40 rows two blocks of three at a time
    monkeypatch.setattr(config, "HALF_TILES", (0, 0))


@each_offset
@each_form
def test_tiles_and_panels_add_up(name, tau):
    check_form(triton_kernels, DEVICE, name, tau)


@each_offset
def test_many_parts_of_few_rows(tau, monkeypatch):
    """More than are added at a time, as a large device has them."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 40)
    monkeypatch.setitem(CASES, "many_parts", ((1, 3, 20), (700, 20), IN_BATCH))
    check_form(triton_kernels, DEVICE, "many_parts", tau)


def test_many_parts_of_labelled_rows(monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 400)
    monkeypatch.setattr(config, "HALF_TILES", (0, 1 << 62))
    sample = labelled("sup_con", 273, 20, DEVICE, twins=True)
    assert_close_to_truth("sup_con", "triton", sample, torch.float32)


def test_the_tests_notice_a_wrong_tile(monkeypatch):
    """A range of columns that ends one tile early, as a mistake in a kernel would have it."""
    from fastnce.triton_kernels import sums

    honest = sums.launch

    def short(kernel, grid, options, /, **arguments):
        if "columns" in arguments and "part_sum" in arguments:
            arguments["columns"] -= 16
        honest(kernel, grid, options, **arguments)

    monkeypatch.setattr(sums, "launch", short)
    with pytest.raises(AssertionError):
        test_tiles_and_panels_add_up("tiles", 0.1)


def integers(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape), device=DEVICE).view(shape)


# Rows (N, D), further arguments; ids that some have in common, and a query with nothing left.
MASKED = {
    "ids": ((2, 33), {"query_ids": integers(2, 33) // 4, "key_mask": integers(2, 33) % 5 > 0}),
    "symmetric": (
        (37,),
        {"query_ids": integers(37) // 3, "symmetric": True, "decoupled": True},
    ),
    "queue": (
        (20,),
        {"negatives": (75,), "query_ids": integers(20) % 3, "negative_ids": integers(75) % 4},
    ),
    "nothing left": (
        (20,),
        {"negatives": (40,), "query_ids": integers(20) % 2, "negative_ids": 0 * integers(40)},
    ),
    "own": (
        (9,),
        {"negatives": (9, 70), "query_ids": integers(9) % 3, "negative_ids": integers(9, 70) % 4},
    ),
    "guide": ((20,), {"negatives": (50,), "in_batch_negatives": True, "guide": True}),
}


def masked(name, dim, generator, dtype, **options) -> dict:
    rows, given = MASKED[name]
    given = dict(given)
    shapes = {"query": rows, "positive_key": rows}
    if "negatives" in given:
        shapes["negative_keys"] = given.pop("negatives")
    found = {
        key: gaussian((*shape, dim), generator, dtype).to(DEVICE).requires_grad_()
        for key, shape in shapes.items()
    }
    if given.pop("guide", False):
        # Cosines of 12 directions: none is near another plus the margin.
        angles = [
            (5 * integers(*x) ** 2 + i * integers(*x)) % 12 for i, x in enumerate(shapes.values())
        ]
        turned = [x * (math.pi / 6) for x in angles]
        given |= {
            "guide": [torch.stack([x.cos(), x.sin()], -1) for x in turned],
            "guide_margin": 0.04,
        }
    return found | given | options


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [20, 270])
@pytest.mark.parametrize("name", MASKED)
def test_pairs_left_out_in_tiles_and_panels(name, dim, dtype, generator):
    for tau, reduction in ((0.1, "sum"), (0.005, "none")):
        made = torch.tensor(tau, device=DEVICE, requires_grad=True)
        call = masked(name, dim, generator, dtype, temperature=made, reduction=reduction)
        call["weights"] = torch.linspace(0, 2, math.prod(MASKED[name][0])).view(MASKED[name][0])
        call["weights"] = call["weights"].to(DEVICE)
        assert_close_to_truth("masked_info_nce", "triton", Sample(name, call), dtype)


@pytest.mark.parametrize("dim", [20, 270])
@pytest.mark.parametrize("name", MASKED)
def test_ranks_of_tiles(name, dim, generator):
    """Of whole numbers, whose products are exact: some are as similar as the positive."""
    call = masked(name, dim, generator, torch.float32, temperature=2.0, normalize=False)
    rows = [key for key in call if key in ("query", "positive_key", "negative_keys")]
    call |= {key: call[key].detach().round() for key in rows}
    _, found = fastnce.info_nce(**call, return_rank=True, backend="triton")
    _, expected = fastnce.info_nce(**call, return_rank=True, backend="torch")
    assert torch.equal(found, expected) and (found > 0).any()


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("dim", [20, 270])
def test_of_nothing_left_there_is_no_gradient_at_all(dim, decoupled, generator):
    """Of unreduced losses, too, whose backward makes the positive's logit anew."""
    options = {"temperature": 0.07, "reduction": "none", "decoupled": decoupled}
    call = masked("nothing left", dim, generator, torch.float32, **options)
    loss = fastnce.info_nce(**call, backend="triton")
    loss.sum().backward()
    empty, grad = call["query_ids"] == 0, call["query"].grad
    assert not loss[empty].any() and not grad[empty].any()
    assert loss[~empty].all() and grad[~empty].any()


@pytest.mark.parametrize("name", ["queue", "own"])
def test_padding_of_nan_reaches_nothing(name, generator):
    call = masked(name, 20, generator, torch.float32, temperature=0.5)
    keys = call["negative_keys"]
    call["negative_mask"] = integers(*keys.shape[:-1]) % 3 > 0
    with torch.no_grad():
        keys[~call["negative_mask"]] = torch.nan
    fastnce.info_nce(**call, backend="triton").backward()
    assert keys.grad.isfinite().all() and call["query"].grad.isfinite().all()
    assert not keys.grad[~call["negative_mask"]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [20, 270])
def test_the_sigmoid_loss_in_tiles_and_panels(dim, dtype, generator):
    forms = {
        "pairs": {},
        "negatives": {"paired": False, "key_mask": integers(70) % 5 > 0},
        "labels": {"query_labels": integers(33) % 4, "key_labels": integers(70) % 5},
    }
    forms["pairs, ids"] = {"query_ids": integers(33) // 4, "key_ids": integers(70) // 4}
    forms["labels, ids"] = (
        forms["labels"] | forms["pairs, ids"] | {"key_mask": integers(70) % 3 > 0}
    )
    for index, (name, options) in enumerate(forms.items()):
        rows = (gaussian((n, dim), generator, dtype).to(DEVICE) for n in (33, 70))
        call = {key: x.requires_grad_() for key, x in zip(("query", "key"), rows, strict=True)}
        for key, value in (("scale", (5.0, 200.0)[index % 2]), ("bias", -3.0)):
            call[key] = torch.tensor(value, device=DEVICE, requires_grad=True)
        options = options | {"reduction": ("sum", "none")[index % 2]}
        sample = Sample(name, call | options)
        assert_close_to_truth("sigmoid_contrastive", "triton", sample, dtype)


@awkward
@pytest.mark.parametrize("tau", [0.005, 0.07, 10.0])
def test_awkward_rows(kind, dtype, tau):
    check_awkward_rows("triton", DEVICE, kind, dtype, tau)


def test_a_row_of_nan_spoils_its_own_loss_alone(generator):
    query, key, queue = (
        gaussian(shape, generator, torch.float32).to(DEVICE)
        for shape in ((1, 9, 20), (1, 9, 20), (30, 20))
    )
    query[0, 4, 7] = torch.nan
    loss, _, (grad, *_) = triton_kernels.info_nce_forward(
        query, key, queue, 0.1, **QUEUE, grad_scale=1.0, needs=(True, False, False, False)
    )
    spoilt = torch.arange(9, device=DEVICE) == 4
    assert torch.equal(loss[0].isnan(), spoilt)
    assert torch.equal(grad[0].isnan().any(-1), spoilt)


@each_labelled_loss
@pytest.mark.parametrize("tau", [0.005, 0.1, 1.0])
@pytest.mark.parametrize("dim", [20, 270])
def test_labelled_rows_in_tiles_and_panels(op, tau, dim):
    reduction = "none" if tau == 0.1 else "mean"
    sample = labelled(op, 50, dim, DEVICE, tau=tau, reduction=reduction)
    assert_close_to_truth(op, "triton", sample, torch.float32)


@each_labelled_loss
@pytest.mark.parametrize(
    ("count", "dtype", "tau", "height"),
    [
        (63, torch.float32, 0.1, 16),
        (64, torch.float32, 0.005, 16),
        (65, torch.bfloat16, 0.1, 32),
        (100, torch.float16, 0.1, 16),
        (252, torch.float32, 0.1, 32),
    ],
)
def test_half_the_tiles(op, count, dtype, tau, height, monkeypatch):
    tile = config.Tile(height, 16, 4, 2, 32)
    monkeypatch.setattr(config, "tile", lambda *arguments: tile)
    monkeypatch.setattr(config, "COLUMN_PARTS", 10 * count)  # two blocks at a time
    sample = labelled(op, count, 20, DEVICE, dtype, tau, twins=True)
    assert_close_to_truth(op, "triton", sample, dtype)


@pytest.mark.skipif(not launch.INTERPRETED, reason="only the interpreter can be asked")
@each_labelled_loss
def test_half_the_tiles_are_half_the_products(op, monkeypatch):
    """Of 7 x 7 tiles those on and above the diagonal, 28; and the results are the same but for rounding."""
    from fastnce.triton_kernels import sums

    multiply, found = sums.multiply, []

    def counting(*arguments):
        found.append(arguments)
        return multiply(*arguments)

    monkeypatch.setattr(sums, "multiply", counting)
    sample = labelled(op, 100, 20, DEVICE, twins=True)
    losses = []
    for threshold, tiles in ((0, 28), (1 << 62, 49)):
        monkeypatch.setattr(config, "HALF_TILES", (0, threshold))
        found.clear()
        losses.append(run(op, sample, backend="triton")["out"])
        assert len(found) == tiles
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)


def test_small_problems_keep_all_tiles(monkeypatch):
    """The thresholds, as they are."""
    monkeypatch.undo()
    assert not config.half_tiles(1024, 768) and config.half_tiles(2048, 1536)
    assert not config.half_tiles(65536, 32) and config.half_tiles(65536, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patch_nce_of_layers_of_one_depth(dtype):
    """One launch for all, with different numbers of patches; and a layer of another, larger depth."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 33, 24), (2, 16, 24), (2, 1, 24), (2, 9, 270)]
    make = [
        [rows(*shape, dtype=dtype, device=DEVICE, generator=generator) for shape in shapes]
        for _ in "qk"
    ]
    arguments = {"query_features": make[0], "key_features": make[1]}
    arguments["temperature"] = torch.tensor(0.3, requires_grad=True)
    assert_close_to_truth("patch_nce", "triton", Sample("layers", arguments), dtype)


@each_offset
@each_patch_form
def test_forms_of_patch_nce(options, tau):
    check_form_of_patch_nce(triton_kernels, DEVICE, options, tau)


@each_patch_form
def test_forms_of_patch_nce_in_16_bits(options):
    generator = torch.Generator().manual_seed(0)
    arguments = {
        name: rows(2, 17, 150, dtype=torch.float16, device=DEVICE, generator=generator)
        for name in ("query_features", "key_features")
    }
    sample = Sample("fp16", arguments | options)
    assert_close_to_truth("patch_nce", "triton", sample, torch.float16)


def test_fp64_is_refused_with_a_reason_and_falls_to_pytorch():
    reason = backends.supports("triton", "info_nce", DEVICE, torch.float64)
    assert reason == "the Triton kernels take float32, bfloat16 and float16"
    chosen = backends.select("info_nce", torch.empty(1, dtype=torch.float64, device=DEVICE))
    assert chosen is not triton_ops


def test_the_interpreter_is_never_chosen_by_itself():
    if not launch.INTERPRETED:
        pytest.skip("on a GPU")
    for op in ("info_nce", "pairwise_cosine_similarity"):
        assert backends.select(op, torch.empty(1)) is not triton_ops
        assert backends.select(op, torch.empty(1), "triton") is triton_ops


@pytest.mark.parametrize("normalize", [False, True])
def test_a_patch_id_outside_its_map_touches_no_memory(normalize):
    """The host does not look at ids on a GPU: such a patch is NaN, its gradient is dropped, and others are as without it."""
    ids = torch.tensor([4, -1, 11, 12, 4, -(2**40), 2**40], device=DEVICE)
    right = torch.tensor([0, 2, 4], device=DEVICE)
    # Maps that lie between others' memory, which nobody may read or write.
    memory = torch.full((3, 2, 5, 4, 3), torch.nan, device=DEVICE)
    memory[1] = gaussian((2, 5, 4, 3), torch.Generator().manual_seed(0), torch.float32)
    patches, norms = triton_kernels.sample_patches_forward([memory[1]], [ids], normalize)
    expected, _ = triton_kernels.sample_patches_forward([memory[1]], [ids[right]], normalize)
    wrong = [1, 3, 5, 6]
    assert torch.equal(patches[0][:, right], expected[0]) and patches[0][:, wrong].isnan().all()

    grad = torch.ones_like(patches[0])
    sums = torch.zeros_like(memory)
    saved = ([patches[0]], norms) if normalize else ([], [])
    triton_kernels.sample_patches_add_([sums[1]], [grad], *saved, [ids], normalize)
    assert sums[0].eq(0).all() and sums[2].eq(0).all()
    only = [[x[:, right].contiguous() for x in each] for each in saved]
    expected = triton_kernels.sample_patches_backward(
        [grad[:, right]], *only, [ids[right]], [memory[1]], normalize
    )
    assert torch.equal(sums[1], expected[0])


@pytest.mark.parametrize(("size", "norm"), [(300.0, 1.0), (2e-4, 2**-6)])
@pytest.mark.parametrize("dim", [16, 270])
def test_fp16_cosines_take_gradients_of_any_size(dim, size, norm, generator):
    x, y = (norm * gaussian((33, dim), generator, torch.float16).to(DEVICE) for _ in "xy")
    grad = gaussian((33, 33), generator, torch.float32).sign().to(DEVICE) * size
    got = triton_kernels.pairwise_cosine_similarity_backward(
        grad.half(), x, y, 0.5, needs=(True, True, True)
    )
    leaves = [v.double().requires_grad_() for v in (x, y, torch.tensor(0.5))]
    cosines = pairwise_cosine_similarity(*leaves[:2], temperature=leaves[2], backend="torch")
    true = torch.autograd.grad(cosines, leaves, grad.half().double())
    for found, expected in zip(got, true, strict=True):
        assert (found.double() - expected).norm() < 2e-3 * expected.norm()


@pytest.fixture(params=["high", "medium"])
def fewer_bits(request):
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dim", [20, 270])
def test_fewer_bits_of_a_product_are_the_positive_s_as_well(dim, fewer_bits, generator):
    """A negative that equals the positive has the same logit: log 2, or log 5 of four, at any temperature."""
    query, key = (gaussian((1, 9, dim), generator, torch.float32).to(DEVICE) for _ in "qk")
    for copies, expected in ((1, math.log(2)), (4, math.log(5))):
        loss, _, _ = triton_kernels.info_nce_forward(
            query[:, :1],
            key[:, :1],
            key[0, :1].repeat(copies, 1),
            0.005,
            **QUEUE | {"in_batch": False},
            grad_scale=None,
            needs=(False,) * 4,
        )
        assert abs(loss.item() - expected) < 1e-4


def test_rows_are_rounded_to_tf32_where_it_is_multiplied(generator):
    """To the nearest: matrix instructions cut off what they do not take. NaN and infinity stay."""
    x = gaussian((40, 20), generator, torch.float32).to(DEVICE)
    x[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    x[1, 0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    torch.set_float32_matmul_precision("high")
    packed = pack(x, False).x[:, :20]
    torch.set_float32_matmul_precision("highest")
    mantissa, exponent = torch.frexp(x)
    expected = torch.ldexp((mantissa * 2**11).round(), exponent - 11)
    torch.testing.assert_close(packed, expected, rtol=0, atol=0, equal_nan=True)
