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


TEACHER = [draw(9, 5, seed=s, unit=True) for s in (2, 3)]
TOKENS, LABELS = draw(9, 4, 7, seed=4), torch.arange(36).view(9, 4) % 7


def distilled(image, text, scale):
    logits, of_teacher = scale * image @ text.T, 20 * TEACHER[0].to(image) @ TEACHER[1].to(image).T
    return (
        F.cross_entropy(logits, of_teacher.softmax(1))
        + F.cross_entropy(logits.T, of_teacher.T.softmax(1))
    ) / 2


def caption(tokens):
    return F.cross_entropy(tokens.mT, LABELS, ignore_index=3)


@pytest.mark.parametrize("side", THEIRS)
def test_distillation(side):
    """Both losses together: each as its own output is in ``test_outputs``."""

    def of(loss):
        return lambda x, y, scale: sum(loss(x, y, scale, *(t.to(x) for t in TEACHER), 20.0))

    theirs = lambda *x: clip_loss(*x) + distilled(*x)  # noqa: E731
    if side == "library":
        theirs = of(imported("open_clip.loss").DistillClipLoss())
    assert_same(of(open_clip.DistillClipLoss()), theirs, IMAGE, TEXT, SCALE)


@pytest.mark.parametrize("weights", [(2.0, 0.5), (1.0, 0.0)])
@pytest.mark.parametrize("side", THEIRS)
def test_captions(side, weights):
    def of(loss):
        return lambda x, y, tokens, scale: sum(loss(x, y, tokens, LABELS, scale))

    def theirs(x, y, tokens, scale):
        return weights[0] * caption(tokens) + weights[1] * clip_loss(x, y, scale)

    if side == "library":
        theirs = of(imported("open_clip.loss").CoCaLoss(*weights, pad_id=3))
    ours = of(open_clip.CoCaLoss(*weights, pad_id=3))
    assert_same(ours, theirs, IMAGE, TEXT, TOKENS, SCALE)


def test_outputs():
    """Each loss where the training loop looks for it."""
    teacher = (*TEACHER, 20.0)
    for loss, given, expected in (
        (
            open_clip.DistillClipLoss(),
            (SCALE, *teacher),
            {
                "contrastive_loss": clip_loss(IMAGE, TEXT, SCALE),
                "distill_loss": distilled(IMAGE, TEXT, SCALE),
            },
        ),
        (
            open_clip.CoCaLoss(2.0, 1.0, 3),
            (TOKENS, LABELS, SCALE),
            {
                "contrastive_loss": clip_loss(IMAGE, TEXT, SCALE),
                "caption_loss": 2 * caption(TOKENS),
            },
        ),
    ):
        expected = {k: v.squeeze() for k, v in expected.items()}
        torch.testing.assert_close(loss(IMAGE, TEXT, *given, output_dict=True), expected)
        torch.testing.assert_close(loss(IMAGE, TEXT, *given), (*expected.values(),))


@pytest.mark.parametrize("name", [*EQUATIONS, "DistillClipLoss", "CoCaLoss"])
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
