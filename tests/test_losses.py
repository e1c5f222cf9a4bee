"""The loss modules are the ops, CLIP's scale and the temperatures that live in modules; and the examples in the docstrings run."""

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastnce
from fastnce import losses

QUERY, KEY = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 3
CASES = {
    "info_nce": (losses.InfoNCELoss, (QUERY, KEY)),
    "patch_nce": (losses.PatchNCELoss, (QUERY.view(2, 4, 6), KEY.view(2, 4, 6))),
    "nt_xent": (losses.NTXentLoss, (QUERY, KEY)),
    "sup_con": (losses.SupConLoss, (QUERY, LABELS)),
    "conditional_contrastive": (losses.ConditionalContrastiveLoss, (QUERY, KEY, LABELS)),
    "contrastive_cross_entropy": (losses.ContrastiveCrossEntropyLoss, (QUERY, KEY, LABELS)),
    "contrastive_distillation": (
        losses.ContrastiveDistillationLoss,
        (QUERY, KEY, KEY[:, :2], QUERY[:, 1:3]),
    ),
}
each_loss = pytest.mark.parametrize("op", CASES)
# For every option what is not its default.
CHANGED = {
    "temperature": 0.3,
    "normalize": False,
    "positives": "each",
    "symmetric": True,
    "in_batch_negatives": True,
    "reduction": "sum",
    "negatives": "batch",
    "query_negatives": True,
    "detach_keys": True,
    "layer_weights": [0.5],
    "similarity_dtype": torch.float8_e4m3fn,
    "decoupled": True,
    "return_rank": True,
    "margin": 0.2,
    "angular_margin": 0.3,
    "hardness": 1.0,
    "label_smoothing": 0.1,
    "ignore_index": 1,
    "teacher_temperature": 0.9,
    "backend": "torch",
}
# What does nothing without the tensors of a guide.
NEED_A_GUIDE = ("guide_margin", "relative_margin")


@each_loss
def test_a_module_is_its_op_with_every_option_and_default(op):
    module, arguments = CASES[op]
    function = inspect.signature(getattr(fastnce, op)).parameters
    of_a_call = [
        f"{kind} | None" for kind in ("Tensor", "Sequence[Tensor]", "Tensor | Sequence[Tensor]")
    ]
    of_a_call = [n for n, p in function.items() if str(p.annotation) in of_a_call]
    options = {
        n: p.default for n, p in function.items() if p.kind is p.KEYWORD_ONLY and n not in of_a_call
    }
    assert {n: p.default for n, p in inspect.signature(module).parameters.items()} == options
    assert torch.equal(module()(*arguments), getattr(fastnce, op)(*arguments))
    for name in options.keys() - set(NEED_A_GUIDE):
        changed = {name: CHANGED[name]}
        if name == "reduction" and op == "patch_nce":
            changed = {name: "none"}
        got, expected = module(**changed)(*arguments), getattr(fastnce, op)(*arguments, **changed)
        if name == "return_rank":
            (got, rank), (expected, expected_rank) = got, expected
            assert torch.equal(rank, expected_rank)
        assert torch.equal(got, expected), name
        same = name in ("in_batch_negatives", "backend", "detach_keys", "return_rank")
        assert same or not torch.equal(got, module()(*arguments))
    if op == "info_nce":
        queue = torch.randn(5, 6)
        got = module(0.2, in_batch_negatives=True)(QUERY, KEY, queue)
        expected = fastnce.info_nce(QUERY, KEY, queue, temperature=0.2, in_batch_negatives=True)
        assert torch.equal(got, expected)


def test_a_module_takes_the_tensors_of_its_call_by_name():
    ids, weights = torch.arange(8) // 2, torch.rand(8)
    past = {"reference_features": KEY, "reference_labels": LABELS, "reference_ids": ids + 1}
    given = {"ids": ids, "weights": weights, **past}
    got = losses.SupConLoss(positives="each")(QUERY, LABELS, **given)
    assert torch.equal(got, fastnce.sup_con(QUERY, LABELS, **given, positives="each"))
    got = losses.NTXentLoss(decoupled=True)(QUERY, KEY, ids=ids)
    assert torch.equal(got, fastnce.nt_xent(QUERY, KEY, ids=ids, decoupled=True))


@each_loss
def test_a_temperature_of_a_module_may_be_trained_or_moved_and_is_saved(op):
    module, arguments = CASES[op]
    loss = module(nn.Parameter(torch.tensor(0.3)))
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    loss(*arguments).backward()
    assert loss.temperature.grad.abs() > 0
    assert loss.double().temperature.dtype == torch.float64
    with pytest.raises(RuntimeError, match="Missing key.*temperature"):
        loss.load_state_dict({})
    assert not list(module(0.3).parameters())

    loss = nn.Sequential(module(torch.tensor([0.25])))
    assert not list(loss.parameters())
    assert torch.equal(loss[0](*arguments), module(0.25)(*arguments))
    loss.load_state_dict({})  # as saved before it was a buffer
    assert loss[0].temperature.item() == 0.25
    saved = nn.Sequential(module(torch.tensor([0.5]))).state_dict()
    assert saved == {"0.temperature": torch.tensor([0.5])}
    loss.load_state_dict(saved)
    assert loss[0].temperature.item() == 0.5
    assert loss.to("meta")[0].temperature.device.type == "meta"


def test_repr_shows_what_was_chosen():
    on_meta = nn.Parameter(torch.empty((), device="meta"))
    shown = {
        losses.InfoNCELoss(similarity_dtype=torch.float8_e4m3fn): "InfoNCELoss(temperature=0.07, similarity_dtype=torch.float8_e4m3fn)",
        losses.NTXentLoss(nn.Parameter(torch.tensor([0.5]))): "NTXentLoss(temperature=Parameter(0.5))",
        losses.SupConLoss(torch.tensor(0.25)): "SupConLoss(temperature=Tensor(0.25))",
        losses.PatchNCELoss(on_meta): "PatchNCELoss(temperature=Parameter(...))",
        losses.CLIPLoss(backend="torch"): "CLIPLoss(backend='torch')",
    }  # fmt: skip
    for module, text in shown.items():
        assert repr(module) == text


def test_clip_loss_is_clips():
    log_scale = nn.Parameter(torch.tensor(2.0))
    logits = log_scale.exp() * nn.functional.normalize(QUERY) @ nn.functional.normalize(KEY).T
    target = torch.arange(8)
    expected = sum(nn.functional.cross_entropy(x, target) for x in (logits, logits.T)) / 2
    got = losses.CLIPLoss()(QUERY, KEY, log_scale.exp())
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(x, log_scale) for x in (got, expected)]
    torch.testing.assert_close(*grads)
    of_seven = losses.CLIPLoss(backend="torch")(QUERY, KEY, 7.0)
    for scale in (7, np.float32(7), torch.tensor(7), torch.full((1, 1), 7.0)):
        torch.testing.assert_close(losses.CLIPLoss()(QUERY, KEY, scale), of_seven)


def test_siglip_loss_is_siglips():
    log_scale, bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor([-3.0]))
    cosines = nn.functional.normalize(QUERY) @ nn.functional.normalize(KEY).T
    signs = 2 * torch.eye(8) - 1
    logits = log_scale.exp() * cosines + bias
    expected = -nn.functional.logsigmoid(signs * logits).sum() / 8
    got = losses.SigLIPLoss()(QUERY, KEY, log_scale.exp(), bias)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(x, (log_scale, bias)) for x in (got, expected)]
    torch.testing.assert_close(*grads)
    of_same = losses.SigLIPLoss()(QUERY, KEY, 7.0, -3.0, query_ids=torch.zeros(8).long())
    positives = -nn.functional.logsigmoid(7 * cosines.diagonal() - 3).mean()
    torch.testing.assert_close(of_same, positives)


@pytest.mark.parametrize("scale", [-1.0, 0, 0.0, torch.inf, torch.nan])
def test_clip_refuses_what_is_no_scale(scale):
    for form in (scale, np.float32(scale), torch.tensor([float(scale)])):
        with pytest.raises(ValueError, match=f"CLIPLoss: logit_scale .*got {scale}.*exp"):
            losses.CLIPLoss()(QUERY, KEY, form)
    with pytest.raises(ValueError, match=r"CLIPLoss: logit_scale .*got .*\(2,\)"):
        losses.CLIPLoss()(QUERY, KEY, torch.ones(2))


def with_gradient(keys: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of plain PyTorch and the gradient of the logarithm."""
    log_scale = log_scale.clone().requires_grad_()
    value = losses.CLIPLoss(backend="torch")(QUERY.to(keys), keys, log_scale.exp())
    return value.detach(), torch.autograd.grad(value, log_scale)[0]


@pytest.mark.parametrize("matching", [True, False])
@pytest.mark.parametrize("log_scale", [0.0, 4.0, 40.0, 50.0])
def test_clips_gradient_at_large_scales(log_scale, matching):
    """Finite where in between the temperature's is, which is of the size of the scale's square."""
    keys, log_scale = QUERY + 0.01 * KEY if matching else KEY, torch.tensor(log_scale)
    got = with_gradient(keys, log_scale)
    if not matching and log_scale > 40:
        assert got[1].isinf()
        return
    exact = with_gradient(keys.double(), log_scale.double())
    for one, other in zip(got, exact, strict=True):
        assert (one - other).abs() <= 1e-5 * max(other.abs(), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_clip_divides_in_fp32(dtype, backend):
    """1 / 14.3125 of bfloat16 is off by 1e-3, and so would be the loss."""
    inputs = [x.to(dtype) for x in (QUERY, KEY, torch.tensor(14.3125))]
    got = losses.CLIPLoss(backend=backend)(*inputs)
    exact = losses.CLIPLoss(backend="torch")(*(x.double() for x in inputs))
    assert (got.double() - exact).abs() < 1e-5 * exact


class Copies(TorchDispatchMode):
    """Counts the operators that copy a tensor to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        devices = {x.device for x in (*args, found) if isinstance(x, torch.Tensor)}
        if "copy" in str(function) and len(devices) > 1:
            self.found.append(str(function))
        return found


@pytest.mark.parametrize("grad", [False, True])
def test_a_temperature_on_the_host_is_not_copied_to_the_rows(grad):
    """Meta rows stand for a GPU's: from memory that is not pinned, a copy would wait."""
    rows, keys = torch.empty(2, 6, 5, device="meta")
    tau = torch.tensor([0.25], requires_grad=grad)
    with Copies() as copies:
        out = fastnce.info_nce(rows, keys, temperature=tau)
    assert out.device.type == "meta" and out.requires_grad == grad and copies.found == []
    # Where no mode watches, the number alone goes on.
    assert fastnce.info_nce(rows, keys, temperature=tau).requires_grad == grad
    with pytest.raises(ValueError, match=r"temperature must be positive and finite, got -0\.25"):
        fastnce.info_nce(rows, keys, temperature=-tau)


PACKAGE = Path(fastnce.__file__).parent


@pytest.mark.parametrize(
    "part", sorted({x.stem for x in PACKAGE.glob("[a-z]*")} - {"libfastnce_cpu"})
)
def test_examples_in_docstrings_run(part):
    names = [m.name for m in pkgutil.walk_packages([str(PACKAGE)], "fastnce.")]
    for name in names:
        if name == f"fastnce.{part}" or name.startswith(f"fastnce.{part}."):
            assert doctest.testmod(importlib.import_module(name)).failed == 0, name


@pytest.mark.parametrize("op", [*CASES, "sample_patches", "pairwise_cosine_similarity"])
def test_every_op_has_an_example(op):
    finder = doctest.DocTestFinder()
    examples = [e for test in finder.find(getattr(fastnce, op), op) for e in test.examples]
    assert len(examples) >= 2
