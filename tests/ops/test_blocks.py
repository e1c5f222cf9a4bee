"""The ``blocks`` backend on another device, as which tensors without values serve: what it allocates, and that it waits for none."""

import pytest
import torch
from forms import DTYPES, FORMS, LOSSES, gaussian, mapped, samples
from operators import Operators
from test_sizes import KINDS, awkward, forms_of, shaped
from torch.utils._pytree import tree_leaves

import fastnce
from fastnce import blocks
from fastnce.blocks import info_nce, labelled_lse, patch_nce, sigmoid_contrastive, tiles
from fastnce.testing import Sample, assert_close_to_truth, leaves_of, outputs_of, run

each_form = pytest.mark.parametrize(("op", "name"), FORMS, ids=[f"{op}-{n}" for op, n in FORMS])


class Watch(Operators):
    """Keeps also the factors of matrix products, and the largest number of bytes of one result."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.factors, self.dtypes = 0, [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = super().__torch_dispatch__(function, types, args, kwargs)
        if "mm" in function.name():
            self.factors += [x for x in args if torch.is_tensor(x)][-2:]
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for x in tree_leaves(found):
            if torch.is_tensor(x):
                self.dtypes.add(x.dtype)
            if torch.is_tensor(x) and id(x.untyped_storage()) not in given:
                self.largest = max(self.largest, x.nbytes)
        return found


@pytest.fixture(params=[False, True], ids=["float32 products", "products of 16 bits"])
def in_16_bits(request, monkeypatch) -> bool:
    """Whether products take rows of 16 bits as they are."""
    if request.param:
        monkeypatch.setattr(tiles, "multiplies_in_16_bits", lambda x: x.dtype.itemsize == 2)
    return request.param


@each_form
def test_no_result_is_read_by_the_host_or_on_another_device(op, name, in_16_bits):
    """Whatever asks for a value raises, and so do operators between devices."""
    sample = mapped(samples(op, torch.bfloat16, "meta")[name], "", lambda x: x.to("meta"))
    with Watch() as watch:
        found = run(op, sample, backend="blocks")
    assert {x.device.type for x in found.values()} == {"meta"}
    if op != "sample_patches" and "own" not in name:
        dtype = torch.bfloat16 if in_16_bits else torch.float32
        of_guide = {torch.float32} if "guide" in sample.arguments else set()
        assert {x.dtype for x in watch.factors} == {dtype} | of_guide, watch.names


@each_form
def test_a_device_without_float64_is_asked_for_none(op, name, monkeypatch):
    """Apple's, which no test can have here."""
    for module in (info_nce, labelled_lse, patch_nce):
        monkeypatch.setattr(module, "long_sums", lambda x: tiles.long_sums(MPS(x)))
    sample = mapped(samples(op, torch.float32, "meta")[name], "", lambda x: x.to("meta"))
    with Watch() as watch:
        outputs = outputs_of(op, sample.arguments, "blocks")
        torch.autograd.grad(outputs, leaves_of(sample), [torch.ones_like(x) for x in outputs])
    assert torch.float64 not in watch.dtypes


class MPS:
    """Rows that are elsewhere."""

    def __init__(self, x: torch.Tensor) -> None:
        self.dtype, self.device = x.dtype, torch.device("mps")


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


LONG, LABELS = (32768, 64), torch.zeros(32768, dtype=torch.int64, device="meta")
LARGE = [
    ("info_nce", [LONG, LONG], {}),
    ("info_nce", [LONG, LONG], {"symmetric": True}),
    ("info_nce", [LONG, LONG], {"reduction": "none"}),
    ("info_nce", [(512, 64), (512, 64), LONG], {}),
    ("info_nce", [LONG, LONG], {"query_ids": LABELS, "return_rank": True}),
    ("info_nce", [LONG, LONG], {"key_mask": LABELS > 0, "symmetric": True, "decoupled": True}),
    ("patch_nce", [(1, *LONG), (1, *LONG)], {}),
    ("patch_nce", [(1, *LONG), (1, *LONG)], {"symmetric": True, "query_negatives": True}),
    ("sup_con", [LONG], {"labels": LABELS}),
    ("nt_xent", [LONG, LONG], {}),
    ("sigmoid_contrastive", [LONG, LONG], {"scale": 10.0}),
    (
        "sigmoid_contrastive",
        [LONG, LONG],
        {"query_labels": LABELS, "key_labels": LABELS, "scale": 10.0},
    ),
    ("sigmoid_contrastive", [LONG, LONG], {"query_ids": LABELS, "scale": 10.0}),
    ("conditional_contrastive", [LONG, LONG], {"labels": LABELS}),
]


@pytest.mark.parametrize(("op", "shapes", "options"), LARGE)
def test_no_array_is_larger_than_a_block(op, shapes, options, in_16_bits, monkeypatch):
    """The whole matrix has 4 GB."""
    monkeypatch.setattr(tiles, "BYTES_ELSEWHERE", 16 << 20)
    dtype = torch.bfloat16 if in_16_bits else torch.float32
    arguments = [rows(*shape, dtype=dtype) for shape in shapes]
    with Watch() as watch:
        found = getattr(fastnce, op)(*arguments, **options, backend="blocks")
        (found[0] if isinstance(found, tuple) else found).sum().backward()
    assert 8 << 20 <= watch.largest <= 20 << 20


def test_a_step_of_patch_nce_is_few_operators(in_16_bits):
    """Five layers, one image, keys detached."""
    dtype, most = (torch.bfloat16, 39) if in_16_bits else (torch.float32, 24)
    layers = [rows(1, 256, 256, dtype=dtype) for _ in range(5)]
    keys = [rows(1, 256, 256, dtype=dtype).detach() for _ in range(5)]
    with Operators() as watch:
        fastnce.patch_nce(layers, keys, backend="blocks").backward()
    assert len(watch.names) <= most, watch.names


PRODUCTS = {
    5: {"query_negatives": True},
    3: {"symmetric": True},
    7: {"symmetric": True, "query_negatives": True},
}


@pytest.mark.parametrize("detach_keys", [False, True])
@pytest.mark.parametrize("products", PRODUCTS)
def test_similarities_serve_both_of_their_rows(products, detach_keys):
    """And two layers of one size are one batch. Without ``symmetric``, detached keys need no product."""
    layers = [rows(2, 256, 256) for _ in range(4)]
    options = PRODUCTS[products] | {"detach_keys": detach_keys}
    with Operators() as watch:
        fastnce.patch_nce(layers[:2], layers[2:], **options, backend="blocks").backward()
    left_out = detach_keys and not options.get("symmetric", False)
    assert sum("mm" in name for name in watch.names) == products - left_out


@pytest.mark.parametrize("temperature", [0.01, 0.07])
def test_blocks_of_every_height_give_the_same(temperature, monkeypatch):
    """Without the maximum of a row, and with it."""
    query, key = gaussian(300, 20).requires_grad_(), gaussian(300, 20, seed=1).requires_grad_()
    batched = query.view(4, 75, 20), key.view(4, 75, 20)
    ids, noise = torch.arange(300) % 9, gaussian(300, 3, seed=2)
    masks = {"query_ids": ids, "key_mask": ids > 0, "decoupled": True, "return_rank": True}
    guide = {"guide": [noise[:, :2], noise[:, 1:]], "return_rank": True}
    options = {"temperature": temperature, "backend": "blocks"}
    bias = torch.tensor(-1.0, requires_grad=True)
    pairs = {"scale": 10.0, "bias": bias, "backend": "blocks"}
    found = []
    for budget in (1, 300 * 4 * 100, 75 * 75 * 4 * 2, 1 << 30):
        monkeypatch.setitem(tiles.BYTES, "cpu", budget)
        losses = [
            fastnce.info_nce(query, key, symmetric=True, **options),
            fastnce.info_nce(query, key, key, in_batch_negatives=True, **options),
            fastnce.info_nce(query, key.detach(), key.detach(), **options),
            fastnce.info_nce(*batched, **options),
            fastnce.patch_nce(*batched, query_negatives=True, **options),
            fastnce.patch_nce(*batched, symmetric=True, query_negatives=True, **options),
            fastnce.patch_nce(
                *batched, symmetric=True, query_negatives=True, detach_keys=True, **options
            ),
            fastnce.sup_con(query, ids, **options),
            fastnce.conditional_contrastive(query, key, ids, **options),
            fastnce.sigmoid_contrastive(query, key, **pairs),
            fastnce.sigmoid_contrastive(query, key, ids, ids, **pairs),
            fastnce.sigmoid_contrastive(query, key, **pairs, query_ids=ids, key_mask=ids > 0),
        ]
        ranked = [
            fastnce.info_nce(query, key, **options, **masks),
            fastnce.info_nce(query, key, **options, **masks, symmetric=True),
            fastnce.info_nce(query, key, **options, **guide),
        ]
        losses += [loss for loss, _ in ranked]
        grads = torch.autograd.grad(sum(losses), (query, key, bias))
        found.append((*losses, *(rank for _, rank in ranked), *grads))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("temperature", [0.02, 1 / 36, 0.028])
def test_logits_as_far_apart_as_they_can_be(temperature):
    """Positives are opposite, and negatives the same: their exponentials are without a maximum where float32 holds them."""
    x = gaussian(8, 12).float()
    given = (z.requires_grad_() for z in (x, -x, x.repeat(100, 1)))
    arguments = dict(zip(("query", "positive_key", "negative_keys"), given, strict=True))
    sample = Sample("far apart", arguments | {"temperature": temperature})
    assert_close_to_truth("info_nce", "blocks", sample, torch.float32)


def test_layers_of_one_shape_keep_their_gradients():
    """They are one batch."""
    layers = [gaussian(2, 9, 6, seed=i).requires_grad_() for i in range(6)]
    sample = Sample("layers", {"query_features": layers[:3], "key_features": layers[3:]})
    assert_close_to_truth("patch_nce", "blocks", sample, layers[0].dtype)


def test_gradients_are_added_into_maps_of_any_strides():
    ids = torch.tensor([7, 0, 7])
    wide, dense = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 5)
    grads = [gaussian(2, 3, 3).float()]
    for maps in (wide[..., :5], dense):
        blocks.sample_patches_add_([maps], grads, [], [], [ids], False)
    assert dense.any() and torch.equal(wide[..., :5], dense) and not wide[..., 5:].any()


# On a CPU as on a GPU: products of 16 bits, multiplied exactly; a temperature that nobody reads; no attention.


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(tiles, "multiplies_in_16_bits", lambda x: x.dtype.itemsize == 2)
    monkeypatch.setattr(info_nce, "has_attention", lambda x: False)
    for file in (info_nce, labelled_lse, patch_nce, sigmoid_contrastive):
        monkeypatch.setattr(file, "number", lambda temperature: temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [*LOSSES, "sigmoid_contrastive"])
def test_numerical_contract_as_on_a_gpu(op, dtype, as_on_a_gpu):
    """Every form, sizes and temperatures; of the latter also small ones."""
    for sample in samples(op, dtype).values():
        assert_close_to_truth(op, "blocks", sample, dtype)
    if op not in LOSSES:
        return
    for index in range(DTYPES.index(dtype), 54 if op in ("info_nce", "patch_nce") else 36, 4):
        assert_close_to_truth(op, "blocks", shaped(op, index, dtype), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", LOSSES)
def test_awkward_rows_as_on_a_gpu(op, kind, as_on_a_gpu):
    for tau in (0.005, 0.02, 0.028, 0.07, 1.0):
        for dtype in DTYPES[1:] if kind != "norms" else DTYPES[1:3]:
            for form in forms_of(op) if op in ("info_nce", "patch_nce") else [""]:
                sample = awkward(op, kind, tau, form, dtype)
                assert_close_to_truth(op, "blocks", sample, dtype)


@pytest.mark.parametrize("symmetric", [False, True])
def test_coefficients_of_16_bits_hold_gradients_of_any_size(symmetric, as_on_a_gpu):
    """As a gradient scaler sends them, to losses that are not reduced."""
    query, key = (gaussian(40, 12, seed=seed).half().requires_grad_() for seed in (0, 1))
    found = []
    for dtype, backend in ((torch.float16, "blocks"), (torch.float64, "torch")):
        options = {"symmetric": symmetric, "reduction": "none", "backend": backend}
        rows = query.to(dtype), key.to(dtype)
        losses = fastnce.info_nce(*rows, temperature=torch.tensor(1.0), **options)
        upstream = torch.logspace(-3, 3, 40, dtype=losses.dtype)
        found.append([x.double() for x in torch.autograd.grad(losses, (query, key), upstream)])
    for x, truth in zip(*found, strict=True):
        torch.testing.assert_close(x, truth, rtol=2e-3, atol=2e-3 * truth.abs().max().item())
