"""open_clip's losses under their own names: their equations, written down here, and the library's own where it is installed."""

import pytest
import torch
import torch.nn.functional as F
from against import THEIRS, assert_same, assert_same_class, draw, imported, similar
from torch import Tensor

from fastnce.integrations import open_clip

IMAGE = draw(9, 12, unit=True)
TEXT = F.normalize(similar(IMAGE), dim=-1)
SCALE, BIAS = torch.tensor([11.0]), torch.tensor(-3.0)


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = scale * image @ text.T + (0 if bias is None else bias)
    target = torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    logits = scale * image @ text.T + (0 if bias is None else bias)
    signs = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(image)


EQUATIONS = {"ClipLoss": clip_loss, "SigLipLoss": siglip_loss}


@pytest.fixture(params=THEIRS)
def theirs(request):
    """A loss by its name."""
    if request.param == "equation":
        return EQUATIONS.get
    return lambda name: getattr(imported("open_clip.loss"), name)()


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("name", EQUATIONS)
def test_values_and_gradients(theirs, name, bias):
    ours = getattr(open_clip, name)()
    assert_same(ours, theirs(name), IMAGE, TEXT, SCALE, bias)
    assert_same(ours, theirs(name), IMAGE[:2], TEXT[:2], SCALE.squeeze(), bias)


@pytest.mark.parametrize("name", EQUATIONS)
def test_signatures(library, name):
    assert_same_class(getattr(open_clip, name), getattr(library("open_clip.loss"), name))


@pytest.mark.parametrize("name", EQUATIONS)
def test_what_a_training_loop_calls(name):
    """As ``loss(**model_out, output_dict=True)``, where the model has a bias or has none."""
    ours, rows = getattr(open_clip, name)(), {"image_features": IMAGE, "text_features": TEXT}
    out = ours(**rows, logit_scale=SCALE, logit_bias=BIAS, output_dict=True)
    assert list(out) == ["contrastive_loss"]
    assert out["contrastive_loss"].shape == ()
    assert out["contrastive_loss"] == ours(IMAGE, TEXT, 11.0, BIAS)
    assert not ours.state_dict()


def test_a_bias_that_does_nothing_gets_its_gradient():
    bias = torch.nn.Parameter(torch.tensor([-3.0]))
    open_clip.ClipLoss()(IMAGE, TEXT, SCALE, bias).backward()
    assert torch.equal(bias.grad, torch.zeros(1))


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"ClipLoss: use_horovod=True"):
        open_clip.ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match=r"world_size=2, but torch.distributed has 1 ranks"):
        open_clip.ClipLoss(world_size=2)(IMAGE, TEXT, SCALE)
    with pytest.raises(ValueError, match=r"dist_impl must be one of .*, got 'ring'"):
        open_clip.SigLipLoss(dist_impl="ring")
