"""The temperature of every op, and CLIP's scale: what forms they take, and what is no temperature."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastnce
from fastnce.losses import CLIPLoss

ROWS, KEYS = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
OPS = {
    "info_nce": lambda x, **kw: fastnce.info_nce(x, KEYS.to(x), **kw),
    "patch_nce": lambda x, **kw: fastnce.patch_nce(x[None], KEYS.to(x)[None], **kw),
    "nt_xent": lambda x, **kw: fastnce.nt_xent(x, KEYS.to(x), **kw),
    "sup_con": lambda x, **kw: fastnce.sup_con(x, LABELS.to(x.device), **kw),
    "conditional_contrastive": lambda x, **kw: fastnce.conditional_contrastive(
        x, KEYS.to(x), LABELS.to(x.device), **kw
    ),
    "pairwise_cosine_similarity": lambda x, **kw: fastnce.pairwise_cosine_similarity(
        x, KEYS.to(x), **kw
    ).sum(),
}
each_op = pytest.mark.parametrize("op", OPS)
NUMBERS = [np.float32(0.25), np.float64(0.25), torch.tensor(0.25, dtype=torch.bfloat16)]


@each_op
def test_one_element_of_any_shape_and_numbers_of_numpy(op, backend):
    tau = torch.tensor(0.25, requires_grad=True)
    expected = OPS[op](ROWS, temperature=tau, backend=backend)
    expected.backward()
    for shape in ((1,), (1, 1)):
        parameter = torch.nn.Parameter(torch.full(shape, 0.25))
        got = OPS[op](ROWS, temperature=parameter, backend=backend)
        got.backward()
        assert torch.equal(got, expected) and torch.equal(parameter.grad, tau.grad.view(shape))
    for number in NUMBERS:
        assert torch.equal(OPS[op](ROWS, temperature=number, backend=backend), expected)
    two = OPS[op](ROWS, temperature=np.int32(2), backend=backend)
    assert torch.equal(two, OPS[op](ROWS, temperature=2.0, backend=backend))


@each_op
def test_what_is_not_read_and_not_positive_makes_the_loss_nan(op, backend):
    """As on an accelerator: a compiler does not read it, either. What is read is an error: see test_errors."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, tau: OPS[op](x, temperature=tau, backend=backend), backend="eager", fullgraph=True
    )
    for value in (-0.5, 0.0, torch.nan):
        assert compiled(ROWS, torch.tensor(value)).isnan()
    plain = OPS[op](ROWS, temperature=torch.tensor(0.25), backend=backend)
    torch.testing.assert_close(compiled(ROWS, torch.tensor(0.25)), plain)


class Copies(TorchDispatchMode):
    """Counts the operators that copy a tensor to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "copy" in str(function):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


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


@each_op
def test_meta_rows_pass_shapes_on(op):
    rows = torch.empty(6, 5, device="meta", dtype=torch.bfloat16, requires_grad=True)
    loss = OPS[op](rows, temperature=0.25)
    loss.backward()
    assert rows.grad.shape == (6, 5) and rows.grad.device.type == "meta"
    with torch.autocast("cpu"):
        assert OPS[op](rows, temperature=0.25).shape == ()


def test_meta_maps_pass_shapes_on():
    maps = torch.empty(2, 3, 4, 5, device="meta", requires_grad=True)
    passed, patches, ids = fastnce.tap_patches(maps, 7)
    again, _ = fastnce.sample_patches(maps, patch_ids=ids)
    assert passed.shape == (2, 3, 4, 5) and patches.shape == again.shape == (2, 7, 3)


def scale_gradient(loss: CLIPLoss, keys: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and the gradient of the logarithm."""
    log_scale = log_scale.clone().requires_grad_()
    value = loss(ROWS.to(keys), keys, log_scale.exp())
    return value.detach(), torch.autograd.grad(value, log_scale)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_clip_divides_in_fp32(dtype, backend):
    """1 / 14.3125 of bfloat16 is off by 1e-3, and so would be the loss."""
    scale = torch.tensor(14.3125, dtype=dtype)
    got = CLIPLoss(backend=backend)(ROWS.to(dtype), KEYS.to(dtype), scale)
    exact = CLIPLoss(backend="torch")(
        ROWS.to(dtype).double(), KEYS.to(dtype).double(), scale.double()
    )
    assert (got.double() - exact).abs() < 1e-5 * exact


@pytest.mark.parametrize("matching", [True, False])
@pytest.mark.parametrize("log_scale", [0.0, 4.0, 40.0, 50.0])
def test_clips_gradient_at_large_scales(log_scale, matching):
    """Of plain PyTorch: finite, where in between the temperature's is, which is of the size of the scale's square."""
    keys = ROWS + 0.01 * KEYS if matching else KEYS
    loss, log_scale = CLIPLoss(backend="torch"), torch.tensor(log_scale)
    if not matching and log_scale > 40:
        assert scale_gradient(loss, keys, log_scale)[1].isinf()
        return
    got = scale_gradient(loss, keys, log_scale)
    exact = scale_gradient(loss, keys.double(), log_scale.double())
    for one, other in zip(got, exact, strict=True):
        assert (one - other).abs() <= 1e-5 * max(other.abs(), 1)


def test_the_second_derivative_of_the_temperature():
    def loss(tau):
        return fastnce.info_nce(ROWS.double(), KEYS.double(), temperature=tau, backend="torch")

    tau = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(loss, (tau,))


@pytest.mark.parametrize("scale", [-1.0, 0.0, torch.inf, torch.nan])
def test_clip_refuses_what_is_no_scale(scale):
    for form in (scale, np.float32(scale), torch.tensor([scale])):
        with pytest.raises(
            ValueError, match=f"CLIPLoss: logit_scale must be positive and finite, got {scale}"
        ):
            CLIPLoss()(ROWS, KEYS, form)
    with pytest.raises(ValueError, match=r"logit_scale must be .*one element, got .*\(2,\)"):
        CLIPLoss()(ROWS, KEYS, torch.ones(2))


def test_clip_takes_scales_of_any_shape_and_of_integers():
    expected = CLIPLoss()(ROWS, KEYS, 7.0)
    for scale in (7, np.float32(7), torch.tensor(7), torch.full((1, 1), 7.0)):
        torch.testing.assert_close(CLIPLoss()(ROWS, KEYS, scale), expected)
