"""The Triton kernels cut into tiles, parts and panels in every way that they know, against the reference in fp64.

On a GPU, or with TRITON_INTERPRET=1 on the host. Memory that PyTorch hands out is filled with NaN, so that what a kernel leaves
unwritten shows.
"""

import pytest
import torch

from fastnce import backends, reference, triton_ops

if triton_ops.available() != "ok":
    pytest.skip(triton_ops.available(), allow_module_level=True)

from fastnce import triton_kernels
from fastnce.testing import Sample, assert_close_to_truth, rows, run
from fastnce.triton_kernels import config, launch

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
IN_BATCH = {"normalize": True, "symmetric": False, "in_batch": True, "self_logit": None}
SYMMETRIC = {**IN_BATCH, "symmetric": True}
QUEUE = {**IN_BATCH, "in_batch": False}

# (B, N, D), negatives, options. Depths: one tile, head and tail, and chunks with panels.
CASES = {
    "tiles": ((1, 70, 20), None, IN_BATCH),
    "tail": ((1, 40, 90), None, SYMMETRIC),
    "tail_queue": ((1, 20, 90), (50, 90), IN_BATCH),
    "batched": ((3, 20, 20), None, SYMMETRIC),
    "panels": ((1, 40, 270), None, SYMMETRIC),
    "panels_of_a_batch": ((3, 20, 270), None, IN_BATCH),
    "panels_queue": ((1, 20, 270), (50, 270), IN_BATCH),
    "few_rows": ((1, 3, 20), (150, 20), QUEUE),
    "few_columns": ((1, 70, 20), (3, 20), QUEUE),
    "one_row": ((1, 1, 20), None, SYMMETRIC),
    "constant": ((2, 20, 20), None, {**IN_BATCH, "self_logit": -10.0}),
    "dot": ((1, 40, 4), None, {**SYMMETRIC, "normalize": False}),
    "own": ((2, 5, 20), (2, 5, 40, 20), IN_BATCH),
    "own_alone": ((2, 5, 150), (2, 5, 3, 150), QUEUE),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several of everything in small problems, and NaN in fresh memory."""
    tile = config.Tile(16, 16, 4, 2, 32)
    monkeypatch.setattr(config, "tiles", lambda *arguments: (tile, tile))
    monkeypatch.setattr(config, "PANEL_ELEMENTS", (16 * 60, 16 * 60))
    monkeypatch.setattr(config, "ADDED_ELEMENTS", 1)
    monkeypatch.setattr(config, "COLUMN_PARTS", 250)
    monkeypatch.setattr(config, "HALF_TILES", (0, 0))
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(name: str, tau: float):
    shape, negatives, options = CASES[name]
    generator = torch.Generator().manual_seed(0)
    query, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "qk")
    key = 0.3 * query + noise
    if negatives is not None:
        negatives = torch.randn(negatives, generator=generator, dtype=torch.float64)
    inputs = (query, key, negatives, torch.tensor(tau, dtype=torch.float64))
    return tuple(None if x is None else x.float().to(DEVICE) for x in inputs), options


def assert_close(got, expected, tau: float) -> None:
    """To 1e-5 of the largest number, and to the rounding of logits of size L = 1 / tau in softmaxes times 1 / tau."""
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        logit = max(1.0, 1 / tau)
        count = 1 if index == 0 else logit * (logit * got[0].numel() if b.dim() == 0 else 1)
        bound = 1e-5 * b.abs().max() + 4 * torch.finfo(torch.float32).eps * logit * count
        assert (a.double() - b).abs().max() <= bound, (index, a, b)


@pytest.mark.parametrize("tau", [0.01, 0.1], ids=["running", "fixed"])
@pytest.mark.parametrize("name", CASES)
def test_tiles_and_panels_add_up(name, tau):
    tau = 10 * tau if name == "dot" else tau
    inputs, options = problem(name, tau)
    needs = tuple(x is not None for x in inputs)
    query, key, negatives, temperature = inputs
    loss, lse, now = triton_kernels.info_nce_forward(
        *inputs, **options, grad_scale=0.25, needs=needs
    )
    _, _, alone = triton_kernels.info_nce_forward(
        query, key, negatives, tau, **options, grad_scale=0.25, needs=(False, True, False, False)
    )
    upstream = torch.linspace(-1, 1, loss.numel()).view_as(loss).to(DEVICE)
    later = triton_kernels.info_nce_backward(upstream, *inputs, lse, **options, needs=needs)
    got = [loss, alone[1], *(x for x in (*now, *later) if x is not None)]

    leaves = [x if x is None else x.double().requires_grad_() for x in inputs]
    wanted = [x for x in leaves if x is not None]
    exact = reference.info_nce(*leaves, **options)
    weight = torch.full_like(exact, 0.25)
    first = torch.autograd.grad(exact, wanted, weight, retain_graph=True)
    second = torch.autograd.grad(exact, wanted, upstream.double())
    assert_close(got, [exact.detach(), first[1], *first, *second], tau)


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


AWKWARD = [
    (kind, dtype)
    for kind in ("identical", "zero", "sizes")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if (kind, dtype) != ("sizes", torch.float16)  # its gradients would be out of range
]


@pytest.mark.parametrize(("kind", "dtype"), AWKWARD)
@pytest.mark.parametrize("tau", [0.005, 0.07, 10.0])
def test_awkward_rows(kind, dtype, tau):
    generator = torch.Generator().manual_seed(0)
    query, key = (
        rows(20, 12, dtype=torch.float64, device="cpu", generator=generator, grad=False)
        for _ in "qk"
    )
    if kind == "identical":
        query, key = query[:1].repeat(20, 1), query[:1].repeat(20, 1)
    elif kind == "zero":
        query[3], key[3], key[7] = 0, 0, 0
    else:
        query[::3] *= 1e-20
        key[::2] *= 1e20
    query, key = (x.to(DEVICE, dtype).requires_grad_() for x in (query, key))
    arguments = {"query": query, "positive_key": key, "temperature": tau, "symmetric": True}
    assert_close_to_truth("info_nce", "triton", Sample(f"{kind} {tau}", arguments), dtype)


@pytest.mark.parametrize("op", ["sup_con", "conditional_contrastive"])
@pytest.mark.parametrize("tau", [0.005, 0.1, 1.0])
@pytest.mark.parametrize("dim", [20, 270])
def test_labelled_rows_in_tiles_and_panels(op, tau, dim):
    generator = torch.Generator().manual_seed(0)
    x, proxies = (
        rows(50, dim, dtype=torch.float32, device=DEVICE, generator=generator) for _ in "xp"
    )
    labels = torch.tensor([-(2**63), -1, 0, 2**32, 2**63 - 1])
    labels = labels[torch.randint(5, (50,), generator=generator)].to(DEVICE)
    temperature = torch.tensor(tau, requires_grad=True)
    arguments = {"labels": labels, "temperature": temperature}
    if op == "sup_con":
        arguments |= {"features": x}
    else:
        arguments |= {"embeddings": x, "proxies": proxies}
    assert_close_to_truth(op, "triton", Sample("labels", arguments), torch.float32)


def labelled(op: str, count: int, dtype: torch.dtype, tau: float) -> Sample:
    """Rows of which one is there twice, of labels that many, two and one of them have; or of one label alone."""
    generator = torch.Generator().manual_seed(count)
    x, proxies = (
        rows(count, 20, dtype=dtype, device=DEVICE, generator=generator, grad=False) for _ in "xp"
    )
    x[count // 2] = x[0]
    labels = torch.randint(5, (count,), generator=generator)
    labels[count // 3] = labels[count - 1] = 5
    labels[1] = 6
    arguments = {"labels": labels.to(DEVICE), "temperature": torch.tensor(tau, requires_grad=True)}
    names = ("features",) if op == "sup_con" else ("embeddings", "proxies")
    arguments |= {n: v.requires_grad_() for n, v in zip(names, (x, proxies), strict=False)}
    return Sample(f"{count} rows", arguments)


@pytest.mark.parametrize("op", ["sup_con", "conditional_contrastive"])
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
    monkeypatch.setattr(config, "tiles", lambda *arguments: (tile, tile))
    monkeypatch.setattr(config, "COLUMN_PARTS", 10 * count)  # two blocks at a time
    assert_close_to_truth(op, "triton", labelled(op, count, dtype, tau), dtype)


@pytest.mark.skipif(not launch.INTERPRETED, reason="only the interpreter can be asked")
@pytest.mark.parametrize("op", ["sup_con", "conditional_contrastive"])
def test_half_the_tiles_are_half_the_products(op, monkeypatch):
    """Of 7 x 7 tiles those on and above the diagonal, 28; and the results are the same but for rounding."""
    from fastnce.triton_kernels import sums

    multiply, found = sums.multiply, []

    def counting(*arguments):
        found.append(arguments)
        return multiply(*arguments)

    monkeypatch.setattr(sums, "multiply", counting)
    sample = labelled(op, 100, torch.float32, 0.1)
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
