"""The losses as modules: constructor arguments are the options of the op, ``forward`` takes its tensors.

``temperature`` may be a float; an ``nn.Parameter`` of one element, which is trained with the module; or another tensor of one
element, a buffer: it moves with the module and is in its ``state_dict``, which loads without it, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastnce.ops import _checks
from fastnce.ops.conditional_contrastive import conditional_contrastive
from fastnce.ops.contrastive_distillation import contrastive_distillation
from fastnce.ops.info_nce import info_nce
from fastnce.ops.nt_xent import nt_xent
from fastnce.ops.patch_nce import patch_nce
from fastnce.ops.sigmoid_contrastive import sigmoid_contrastive
from fastnce.ops.softmax_shapes import contrastive_cross_entropy
from fastnce.ops.sup_con import sup_con


def _is_of_a_call(parameter: inspect.Parameter) -> bool:
    """Whether it is tensors, such as ids, which differ from call to call."""
    return "Tensor" in str(parameter.annotation) and "float" not in str(parameter.annotation)


class _Loss(nn.Module):
    """An op with its options, those of the op by name; the temperature may also come first."""

    _op: Callable[..., Tensor]

    def __init_subclass__(cls, op: Callable[..., Tensor]) -> None:
        super().__init_subclass__()
        cls._op = staticmethod(op)
        options = inspect.signature(op).parameters.values()
        options = [x for x in options if x.kind is x.KEYWORD_ONLY and not _is_of_a_call(x)]
        first = options[0].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
        cls.__signature__ = inspect.Signature([first, *options[1:]])

    def __init__(self, *temperature: float | Tensor, **options: object) -> None:
        super().__init__()
        given = type(self).__signature__.bind(*temperature, **options)
        given.apply_defaults()
        temperature = given.arguments.pop("temperature")
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature)
        else:
            self.temperature = temperature
        self.options = given.arguments

    def forward(self, *inputs: Tensor | Sequence[Tensor] | None, **named: Tensor) -> Tensor:
        """The loss of the op's tensors; those that the op takes by name, such as ids and weights, by name."""
        return self._op(*inputs, **named, temperature=self.temperature, **self.options)

    def extra_repr(self) -> str:
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            # One that is elsewhere, or in parts, has no number to show.
            here = type(temperature) in (Tensor, nn.Parameter) and temperature.device.type != "meta"
            number = f"{temperature.item():g}" if here and temperature.numel() == 1 else "..."
            shown = f"{type(temperature).__name__}({number})"
        else:
            shown = repr(temperature)
        return ", ".join([f"temperature={shown}", *_shown(self)])

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        if "temperature" in self._buffers:  # which checkpoints of older versions lack
            state_dict.setdefault(f"{prefix}temperature", self.temperature)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _shown(loss: nn.Module) -> list[str]:
    """The options that are not the defaults."""
    known = inspect.signature(type(loss)).parameters
    return [f"{k}={v!r}" for k, v in loss.options.items() if v != known[k].default]


class InfoNCELoss(_Loss, op=info_nce):
    """``fastnce.info_nce`` as a module.

    Examples:
        >>> import torch
        >>> loss = InfoNCELoss(temperature=0.1)(torch.randn(8, 16), torch.randn(8, 16))
    """


class PatchNCELoss(_Loss, op=patch_nce):
    """``fastnce.patch_nce`` as a module.

    Examples:
        >>> import torch
        >>> loss = PatchNCELoss()(torch.randn(1, 256, 64), torch.randn(1, 256, 64))
    """


class NTXentLoss(_Loss, op=nt_xent):
    """``fastnce.nt_xent`` as a module.

    Examples:
        >>> import torch
        >>> loss = NTXentLoss()(torch.randn(8, 16), torch.randn(8, 16))
    """


class SupConLoss(_Loss, op=sup_con):
    """``fastnce.sup_con`` as a module.

    Examples:
        >>> import torch
        >>> loss = SupConLoss()(torch.randn(4, 16), torch.tensor([0, 0, 1, 1]))
    """


class ConditionalContrastiveLoss(_Loss, op=conditional_contrastive):
    """``fastnce.conditional_contrastive`` as a module.

    Examples:
        >>> import torch
        >>> labels = torch.tensor([0, 1, 0, 1])
        >>> loss = ConditionalContrastiveLoss()(torch.randn(4, 8), torch.randn(2, 8)[labels], labels)
    """


class ContrastiveCrossEntropyLoss(_Loss, op=contrastive_cross_entropy):
    """``fastnce.contrastive_cross_entropy`` as a module.

    Examples:
        >>> import torch
        >>> loss = ContrastiveCrossEntropyLoss(margin=0.3)
        >>> loss = loss(torch.randn(4, 8), torch.randn(10, 8), torch.tensor([0, 9, 3, 3]))
    """


class ContrastiveDistillationLoss(_Loss, op=contrastive_distillation):
    """``fastnce.contrastive_distillation`` as a module.

    Examples:
        >>> import torch
        >>> student, teacher = torch.randn(2, 8, 16), torch.randn(2, 8, 32)
        >>> loss = ContrastiveDistillationLoss(symmetric=True)(*student, *teacher)
    """


class _ImageText(nn.Module):
    """A loss of images and texts, whose scale and bias the model owns and hands over."""

    def __init__(self, *, normalize: bool = True, backend: str | None = None) -> None:
        super().__init__()
        self.options = {"normalize": normalize, "backend": backend}

    def extra_repr(self) -> str:
        return ", ".join(_shown(self))


class CLIPLoss(_ImageText):
    """CLIP's loss (Radford et al. 2021, https://arxiv.org/abs/2103.00020): symmetric InfoNCE of images and texts.

    Examples:
        >>> import torch
        >>> logit_scale = torch.nn.Parameter(torch.tensor(2.66))
        >>> loss = CLIPLoss()(torch.randn(8, 16), torch.randn(8, 16), logit_scale.exp())
    """

    def forward(self, image: Tensor, text: Tensor, logit_scale: float | Tensor) -> Tensor:
        """The loss of ``image`` and ``text`` (N, D), whose cosines are multiplied by ``logit_scale`` (already exponentiated).

        ``logit_scale``: positive float, or tensor of one element and any dtype, which gets its gradient.
        """
        _checks.expect_tensor("CLIPLoss", "image", image, "(N, D)")
        temperature = _checks.expect_scale("CLIPLoss", logit_scale, image)
        return info_nce(image, text, temperature=temperature, symmetric=True, **self.options)


class SigLIPLoss(_ImageText):
    """SigLIP's loss (Zhai et al. 2023, https://arxiv.org/abs/2303.15343): every pair of an image and a text by itself.

    Examples:
        >>> import torch
        >>> logit_scale, logit_bias = torch.tensor(10.0).log(), torch.tensor(-10.0)
        >>> loss = SigLIPLoss()(torch.randn(8, 16), torch.randn(8, 16), logit_scale.exp(), logit_bias)
    """

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor,
        **named: Tensor,
    ) -> Tensor:
        """The loss of ``image`` and ``text`` (N, D): the mean over images of their pairs' sums.

        ``logit_scale`` (already exponentiated) and ``logit_bias``: floats, or tensors of one element, which get their gradients.
        Other tensors of ``fastnce.sigmoid_contrastive``, such as ids, are passed by its names for them.
        """
        numbers = {"scale": logit_scale, "bias": logit_bias}
        return sigmoid_contrastive(image, text, **numbers, **named, **self.options)
