"""CLIP and SigLIP of transformers, whose ``return_loss=True`` then makes no matrix of logits."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.ops.info_nce import info_nce
from fastnce.ops.sigmoid_contrastive import sigmoid_contrastive

LIBRARY = ("transformers", "5.24.0")  # compared with
STANDS_FOR = {
    "transformers.models.clip.modeling_clip": ("CLIPModel",),
    "transformers.models.siglip.modeling_siglip": ("SiglipModel",),
}


def clip_loss(model: nn.Module, text: Tensor, image: Tensor) -> Tensor:
    """Of unit rows (N, D), with the scale of a ``CLIPModel``."""
    temperature = 1 / model.logit_scale.exp()
    return info_nce(text, image, temperature=temperature, symmetric=True, normalize=False)


def siglip_loss(model: nn.Module, text: Tensor, image: Tensor) -> Tensor:
    """Of unit rows (N, D), with the scale and the bias of a ``SiglipModel``."""
    scale, bias = model.logit_scale.exp(), model.logit_bias
    return sigmoid_contrastive(text, image, scale=scale, bias=bias, normalize=False)


_LOSSES = {"CLIPModel": clip_loss, "SiglipModel": siglip_loss}


def _without_the_matrix(
    theirs: type, output: type, loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor]
) -> type:
    from transformers.utils import can_return_tuple

    class Model(theirs):
        """Theirs; with ``return_loss=True`` there are the loss and the embeddings, and ``logits_per_*`` are None."""

        @can_return_tuple
        def forward(
            self,
            input_ids: Tensor | None = None,
            pixel_values: Tensor | None = None,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            return_loss: bool | None = None,
            interpolate_pos_encoding: bool = False,
            **kwargs: object,
        ) -> object:
            of_image = {"pixel_values": pixel_values}
            of_image["interpolate_pos_encoding"] = interpolate_pos_encoding
            of_text = {"input_ids": input_ids, "attention_mask": attention_mask}
            of_text["position_ids"] = position_ids
            if not return_loss:
                return super().forward(**of_text, **of_image, **kwargs)
            seen, read = (
                self.vision_model(**of_image, **kwargs),
                self.text_model(**of_text, **kwargs),
            )
            image, text = seen.pooler_output, read.pooler_output
            if hasattr(self, "visual_projection"):
                image, text = self.visual_projection(image), self.text_projection(text)
            image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
            return output(
                loss=loss_of(self, text, image),
                text_embeds=text,
                image_embeds=image,
                text_model_output=read,
                vision_model_output=seen,
            )

    return Model


def __getattr__(name: str) -> type:
    """The models are made from theirs: the library is imported when one is asked for."""
    if name not in _LOSSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = next(importlib.import_module(x) for x, names in STANDS_FOR.items() if name in names)
    output = getattr(module, name.replace("Model", "Output"))
    made = _without_the_matrix(getattr(module, name), output, _LOSSES[name])
    made.__name__ = made.__qualname__ = name
    made.__module__ = __name__
    globals()[name] = made
    return made
