"""The encoder and the projector of a trained CUT, for looking at what they learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.data.images import read_image, to_array, to_image, to_tensor
from fastnce.data.transforms import resize_to_multiple
from fastnce.errors import UserError
from fastnce.models.channels import convert_channels
from fastnce.networks import PatchProjector
from fastnce.training.checkpoint import load_checkpoint
from fastnce.training.config import CUTTrainConfig, DCLGANTrainConfig
from fastnce.training.translate import checkpoint_path, load_generator
from fastnce.training.translate_files import image_scaling


@dataclass(frozen=True)
class PatchEncoder:
    """The part of a trained model that its contrastive loss compares patches with: the generator's encoder E and F behind it.

    A checkpoint has a running average of the generator but not of F: F was trained beside the weights themselves. So "raw"
    weights show exactly what the loss saw. With "ema" the generator is the one that is used after the training, and F is
    slightly ahead of it; as long as the weights moved little in the last steps, the two agree.

    Attributes:
        generator: in eval mode.
        projector: F; None where patches are compared as they are, or not at all.
        config: of the run.
        in_channels: of the images that it takes; others are converted as in training.
        output_side: what encodes translated images, if not this one: in DCLGAN the generator of the other direction and the
            projector behind it.
    """

    generator: nn.Module
    projector: PatchProjector | None
    config: CUTTrainConfig | DCLGANTrainConfig
    in_channels: int
    output_side: PatchEncoder | None = None

    @classmethod
    def load(
        cls,
        run: Path,
        *,
        which: Literal["ema", "raw"] = "raw",
        checkpoint: str | Path = "last",
        device: str | torch.device = "cpu",
    ) -> PatchEncoder:
        """Loads it from the folder of a run; the arguments are those of `load_generator`.

        Raises:
            UserError: no such run or checkpoint, or a run of a system that compares no patches.
        """
        if Path(run).is_file():
            raise UserError(f"run={run} holds a generator alone. Name the folder of its run.")
        generator, config = load_generator(run, which=which, checkpoint=checkpoint, device=device)
        if not isinstance(config, CUTTrainConfig | DCLGANTrainConfig):
            raise UserError(
                f"run={run} is a run of {config.system}, which compares no patches. Name a run of cut, fastcut, sincut or dclgan."
            )
        state = load_checkpoint(checkpoint_path(run, checkpoint))["model"]
        target = next(generator.parameters()).device
        if isinstance(config, CUTTrainConfig):
            projector = _projector(state, "projector.", target)
            return cls(generator, projector, config, config.in_channels)
        there, back = (_projector(state, f"projector_{side}.", target) for side in "ab")
        output_side = cls(generator.b_to_a, back, config, config.out_channels)
        return cls(generator.a_to_b, there, config, config.in_channels, output_side)

    @property
    def of_output(self) -> PatchEncoder:
        """What encodes translated images."""
        return self.output_side or self

    def read(self, path: Path) -> Tensor:
        """(C, H, W) in [-1, 1]: an image as for translation, scaled as in training and not cropped, with sides a multiple of 4."""
        config = self.config
        image = read_image(path, config.in_channels, config.bits, config.value_range)
        array = image_scaling(config, [path]).prepare(image)
        return to_tensor(to_array(resize_to_multiple(to_image(array))))

    @torch.inference_mode()
    def translate(self, image: Tensor) -> Tensor:
        """The translation of one image (C, H, W), on the CPU."""
        return self.generator(image[None].to(self._device))[0].float().cpu()

    @torch.inference_mode()
    def encode(self, image: Tensor) -> list[Tensor]:
        """The features E(image), (1, C_l, h_l, w_l) for each of `config.nce_layers`, on the CPU."""
        images = convert_channels(image[None].to(self._device), self.in_channels)
        features = self.generator.encode(images, self.config.nce_layers)
        return [feature.float().cpu() for feature in features]

    @torch.inference_mode()
    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """F(features), L2-normalised, (1, dim, h_l, w_l) for each layer, on the CPU.

        Raises:
            UserError: the run compares no patches.
        """
        if self.config.lambda_nce == 0:
            raise UserError(
                "the run was trained without the contrastive loss (lambda_nce=0), so it has no learnt similarity. "
                "Name another run."
            )
        if self.projector is None:
            return [F.normalize(x, dim=1) for x in features]
        patches = [x.to(self._device).flatten(2).transpose(1, 2) for x in features]
        projected = [F.normalize(x, dim=2).cpu() for x in self.projector(patches)]
        return [
            x.transpose(1, 2).unflatten(2, feature.shape[2:])
            for x, feature in zip(projected, features, strict=True)
        ]

    def chosen(self, layers: Sequence[int]) -> list[int]:
        """Indices in `config.nce_layers` of the layers asked for; of all if none is named."""
        known = self.config.nce_layers
        unknown = sorted(set(layers) - set(known))
        if unknown:
            raise UserError(
                f"layers={' '.join(map(str, layers))}: the run compares the layers {' '.join(map(str, known))} only. "
                "Choose from these."
            )
        return [index for index, layer in enumerate(known) if not layers or layer in layers]

    @property
    def _device(self) -> torch.device:
        return next(self.generator.parameters()).device


def _projector(
    model_state: dict[str, Tensor], prefix: str, device: torch.device
) -> PatchProjector | None:
    """The projector whose weights have this prefix in a model's state; None if there are none."""
    weights = {k.removeprefix(prefix): v for k, v in model_state.items() if k.startswith(prefix)}
    if not weights:
        return None
    count = sum(name.endswith(".0.weight") for name in weights)
    first = [weights[f"mlp_{index}.0.weight"] for index in range(count)]
    projector = PatchProjector([weight.shape[1] for weight in first], first[0].shape[0])
    projector.load_state_dict(weights)
    return projector.to(device).eval().requires_grad_(False)
