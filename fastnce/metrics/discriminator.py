"""A discriminator over a training: does it overfit, do its layers' norms rise."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


@dataclass(frozen=True)
class Authenticity:
    """How well a discriminator tells real from fake; NaN if a logit is not finite."""

    real: float
    """Share of the real images whose logit is above the cutoff."""
    fake: float
    """Share of the fake images whose logit is below it."""


def authenticity_accuracy(
    logits_real: Tensor, logits_fake: Tensor, cutoff: float = 0.0
) -> Authenticity:
    """The discriminator's accuracy on real and on fake images.

    A discriminator that is surer of the real images it is trained on than of held-out ones has learned them by heart: compare
    `real` of both (`overfitting_gap`). One that is right about everything gives the generator nothing to follow.

    Args:
        logits_real, logits_fake: (N,) and (M,) adversarial logits of real and of generated images.
        cutoff: Where real begins: 0 for the hinge and the logistic loss, 0.5 for least squares. A logit on it counts as wrong.

    Raises:
        ValueError: If one is empty.

    Examples:
        >>> authenticity_accuracy(torch.tensor([1.0, -0.5]), torch.tensor([-1.0, -2.0]))
        Authenticity(real=0.5, fake=1.0)
    """
    return Authenticity(
        _share("authenticity_accuracy: logits_real", logits_real - cutoff),
        _share("authenticity_accuracy: logits_fake", cutoff - logits_fake),
    )


def overfitting_gap(logits_train: Tensor, logits_held_out: Tensor, cutoff: float = 0.0) -> float:
    """Accuracy on real training images less that on held-out ones: near 0, 1 at worst; NaN if a logit is not finite.

    Args:
        logits_train, logits_held_out: (N,) and (M,) adversarial logits of real images that the discriminator is trained on, and
            of others.
        cutoff: As `authenticity_accuracy`.

    Raises:
        ValueError: If one is empty.
    """
    trained_on = _share("overfitting_gap: logits_train", logits_train - cutoff)
    return trained_on - _share("overfitting_gap: logits_held_out", logits_held_out - cutoff)


@torch.no_grad()
def largest_singular_values(module: nn.Module, *, raw: bool = False) -> dict[str, float]:
    """The largest singular value of every convolution's and linear layer's weight, as a matrix.

    The matrix is the one that spectral normalisation sees: output channels by all the rest. With it, the values stay near 1
    while its power iteration keeps up; they rise from layer to layer shortly before a training collapses, and so do those of
    the raw weights (Brock et al., 2019). Nothing is changed: no power iteration is made, so before the first forward in training
    mode, while its vectors are still random, the values of normalised weights mean nothing.

    Args:
        module: A network, with spectral normalisation from `torch.nn.utils.spectral_norm`, from
            `torch.nn.utils.parametrizations`, or without.
        raw: Take the weight that is trained, not the normalised one.

    Returns:
        By the layer's name; NaN for a weight that is not finite.

    Examples:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
        >>> largest_singular_values(nn.Sequential(layer))
        {'0': 4.0}
    """
    values = {}
    for name, layer in module.named_modules():
        if isinstance(layer, _LAYERS):
            weight = _raw_weight(layer) if raw else _effective_weight(layer)
            matrix = weight.transpose(0, 1) if isinstance(layer, _TRANSPOSED) else weight
            values[name] = _largest_singular_value(matrix.flatten(1).double())
    return values


def _largest_singular_value(matrix: Tensor) -> float:
    """Through the smaller Gram matrix: for wide layers ten times faster than singular values."""
    if not matrix.isfinite().all():
        return math.nan
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt().item()


def _share(name: str, beyond: Tensor) -> float:
    """The share of positive values."""
    if beyond.numel() == 0:
        raise ValueError(f"{name}: expected at least one logit, got {tuple(beyond.shape)}.")
    return (beyond > 0).double().mean().item() if beyond.isfinite().all() else math.nan


def _spectral_norm(layer: nn.Module) -> SpectralNorm | None:
    """The hook that `torch.nn.utils.spectral_norm` left on the layer's weight."""
    hooks = layer._forward_pre_hooks.values()
    return next((x for x in hooks if isinstance(x, SpectralNorm) and x.name == "weight"), None)


def _raw_weight(layer: nn.Module) -> Tensor:
    if _spectral_norm(layer) is not None:
        return layer.weight_orig
    if is_parametrized(layer, "weight"):
        return layer.parametrizations.weight.original
    return layer.weight


def _effective_weight(layer: nn.Module) -> Tensor:
    """The weight as the next forward in eval mode would use it."""
    hook = _spectral_norm(layer)
    if hook is not None:
        return hook.compute_weight(layer, do_power_iteration=False)
    if is_parametrized(layer, "weight"):
        parametrization = layer.parametrizations.weight
        modes = [(part, part.training) for part in parametrization.modules()]
        parametrization.eval()  # in training mode reading the weight makes a power iteration
        try:
            return layer.weight
        finally:
            for part, training in modes:
                part.training = training
    return layer.weight
