"""CLIP and SigLIP of transformers with their own loss, without its matrix: the parts that need no library, and small models."""

import types

import pytest
import torch
import torch.nn.functional as F
from against import assert_same, draw, similar

from fastnce.integrations import transformers as ours

TEXT = draw(7, 8, unit=True)
IMAGE = F.normalize(similar(TEXT), dim=1)
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def clip(text, image, log_scale, bias):
    logits, target = text @ image.T * log_scale.exp(), torch.arange(len(text))
    return (
        F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
    ) / 2 + 0 * bias.sum()


def siglip(text, image, log_scale, bias):
    logits = text @ image.T * log_scale.exp() + bias
    return -F.logsigmoid((2 * torch.eye(len(text)) - 1) * logits).sum() / len(text)


@pytest.mark.parametrize("loss, equation", [(ours.clip_loss, clip), (ours.siglip_loss, siglip)])
def test_the_losses(loss, equation):
    def of_a_model(text, image, log_scale, bias):
        return loss(types.SimpleNamespace(logit_scale=log_scale, logit_bias=bias), text, image)

    assert_same(of_a_model, equation, TEXT, IMAGE, torch.tensor([2.0]), torch.tensor([-1.0]))


def model(library, name):
    """Theirs, small, in float64; and ours of the same parameters."""
    prefix = name.removesuffix("Model")
    module = library(f"transformers.models.{prefix.lower()}.modeling_{prefix.lower()}")
    text = {
        **SMALL,
        "vocab_size": 50,
        "max_position_embeddings": 12,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    config = getattr(library("transformers"), f"{prefix}Config")(
        text_config=text, vision_config=vision
    )
    torch.manual_seed(0)
    theirs = getattr(module, name)(config).double()
    copy = getattr(ours, name)(config).double()
    copy.load_state_dict(theirs.state_dict())
    return copy, theirs


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_a_model(library, name):
    """Loss, embeddings and every parameter's gradient; without a loss everything is theirs."""
    ids = torch.arange(5 * 7).view(5, 7) * 11 % 47 + 3
    ids[:, -1] = 2
    given = {
        "input_ids": ids,
        "pixel_values": draw(5, 3, 16, 16),
        "attention_mask": torch.ones_like(ids),
    }
    both = model(library, name)
    outs = [m(**given, return_loss=True) for m in both]
    for out in outs:
        out.loss.backward()
    for key in ("loss", "text_embeds", "image_embeds"):
        torch.testing.assert_close(*(out[key] for out in outs), rtol=1e-12, atol=1e-12)
    assert outs[0].logits_per_image is None
    parameters = zip(*(m.named_parameters() for m in both), strict=True)
    for (key, x), (_, y) in parameters:
        assert (x.grad is None) == (y.grad is None), key
        if x.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-11, atol=1e-12, msg=key)
    without = [m(**given).logits_per_image for m in both]
    assert torch.equal(*without)
    assert isinstance(both[0](**given, return_loss=True, return_dict=False), tuple)
