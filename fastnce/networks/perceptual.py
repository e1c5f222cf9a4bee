"""Distances of two images in the features of frozen networks: LPIPS, and the cosines of face, MoCo and other features.

Each is `loss(output, loss.features(target))`, so that the target's features are computed once for many outputs. Images are
(B, 3, H, W) in [-1, 1]; of one channel they are seen as grey. Gradients flow to the output alone. The networks stay in eval mode.
`loss.per_image` gives each image's own value, and `loss.expects` is the side in pixels that its network reads images at; None if
it takes any.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.networks.critics import Critic
from fastnce.networks.resnet_encoder import RESNETS, ResNetEncoder
from fastnce.networks.restyle_encoder import ir_se50_layers
from fastnce.networks.weights import load_scripted, load_strictly, read_plain, read_state_dict

_GREY = (0.299, 0.587, 0.114)


class PerceptualLoss(nn.Module):
    """Base of the losses: see the module."""

    expects: int | None = None

    def _settle(self) -> None:
        """The last step of a subclass's construction."""
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PerceptualLoss:
        return super().train(False)

    @torch.no_grad()
    def features(self, target: Tensor) -> Any:
        """Of images (B, C, H, W), for `forward`; without gradient."""
        return self._features(target)

    def forward(self, output: Tensor, target_features: Any) -> Tensor:
        """The mean over the images, a scalar."""
        return self.per_image(output, target_features).mean()

    def per_image(self, output: Tensor, target_features: Any) -> Tensor:
        """The distance of each image, (B,)."""
        raise NotImplementedError

    def _features(self, images: Tensor) -> Any:
        raise NotImplementedError


class AlexNetCritic(Critic):
    """AlexNet's maps behind each ReLU, of 64, 192, 384, 256 and 256 channels, for images of at least 31 pixels.

    Source: Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014; names as torchvision's.

    Args:
        weights: torchvision's file, of which the classifier is left out; None: random weights.
    """

    # Channels, kernel, stride and padding of the convolutions, by their index in torchvision's `features`.
    LAYERS: ClassVar[dict[int, tuple[int, int, int, int]]] = {
        0: (64, 11, 4, 2),
        3: (192, 5, 1, 2),
        6: (384, 3, 1, 1),
        8: (256, 3, 1, 1),
        10: (256, 3, 1, 1),
    }

    def __init__(self, weights: Path | str | None) -> None:
        channels = [width for width, *_ in self.LAYERS.values()]
        super().__init__([f"relu{i}" for i in range(1, 6)], channels, frozen=True)
        self.features = nn.ModuleDict()
        before = 3
        for index, (width, kernel, stride, padding) in self.LAYERS.items():
            self.features[str(index)] = nn.Conv2d(before, width, kernel, stride, padding)
            before = width
        if weights is not None:
            instead = (
                "Expected torchvision's ImageNet weights of AlexNet, alexnet-owt-7be5be79.pth."
            )
            state = read_state_dict(weights, instead)
            state = {name: x for name, x in state.items() if not name.startswith("classifier.")}
            load_strictly(self, state, Path(weights), instead)
        self._settle()

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        if min(images.shape[2:]) < 31:
            raise ValueError(
                f"AlexNetCritic: images must have at least 31 pixels on a side, got {images.shape[2]}x{images.shape[3]}. "
                "Leave LPIPS out, or compare larger images."
            )
        x = images
        for index, layer in self.features.items():
            if index in ("3", "6"):
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(layer(x))
            yield x


class LPIPS(PerceptualLoss):
    r"""The learned perceptual distance of Zhang et al., version 0.1 on AlexNet, for images of at least 31 pixels.

    With the maps f_l of an image, at each position divided by the length of its channels (plus 1e-10):

        sum over l of mean over positions p of sum over channels c of v_lc (f_lcp(output) - f_lcp(target))^2

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018.

    Args:
        backbone: torchvision's weights of AlexNet; None: random ones.
        weights: v, the linear layers of LPIPS v0.1 as the package `lpips` ships them, `alex.pth`; None: ones.

    Raises:
        UserError: no such file, or one that holds something else.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Path | str | None, weights: Path | str | None) -> None:
        super().__init__()
        self.backbone = AlexNetCritic(backbone)
        self.lins = nn.ParameterList(torch.ones(1, c, 1, 1) for c in self.backbone.channels)
        if weights is not None:
            instead = "Expected LPIPS v0.1 of AlexNet, alex.pth of the package lpips."
            state = read_state_dict(weights, instead)
            names = {f"lin{index}.model.1.weight": str(index) for index in range(5)}
            state = {names.get(name, name): x for name, x in state.items()}
            load_strictly(self.lins, state, Path(weights), instead)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self._settle()

    def per_layer(self, output: Tensor, target_features: list[Tensor]) -> list[Tensor]:
        """The summands of each image, (B,) for each of the five layers."""
        pairs = zip(self._features(output), target_features, self.lins, strict=True)
        return [
            ((own - other).square() * weight).sum(1).mean((1, 2)) for own, other, weight in pairs
        ]

    def per_image(self, output: Tensor, target_features: list[Tensor]) -> Tensor:
        return torch.stack(self.per_layer(output, target_features)).sum(0)

    def _features(self, images: Tensor) -> list[Tensor]:
        maps = self.backbone((with_channels(images, 3) - self.shift) / self.scale)
        # The gradient of this length is 0 where all channels are.
        return [x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10) for x in maps]


class SimilarityLoss(PerceptualLoss):
    """1 - the cosine of the features, vectors of one length; a subclass gives them as they are, `_vectors(images) -> (B, F)`."""

    def per_image(self, output: Tensor, target_features: Tensor) -> Tensor:
        return 1 - (self._features(output) * target_features).sum(1)

    def _features(self, images: Tensor) -> Tensor:
        return F.normalize(self._vectors(images), dim=1)

    def _vectors(self, images: Tensor) -> Tensor:
        raise NotImplementedError


class IdentityLoss(SimilarityLoss):
    """How far two faces are from being the same person's, in the features of ArcFace's IR-SE50, 512 numbers.

    Faces are aligned as FFHQ's. They are seen at 256 pixels, of which rows 35 to 223 and columns 32 to 220 are averaged to 112.

    Source: Richardson et al., "Encoding in Style", CVPR 2021, with the network of Deng et al., "ArcFace", CVPR 2019.

    Args:
        weights: ArcFace's weights of IR-SE50, `input_layer.*`, `body.*`, `output_layer.*`; None: random ones.

    Raises:
        UserError: no such file, or one that holds something else.
    """

    expects = 256

    def __init__(self, weights: Path | str | None) -> None:
        super().__init__()
        layers = ir_se50_layers(3)
        layers["output_layer"] = nn.Sequential(
            nn.BatchNorm2d(512),
            nn.Dropout(0.6),
            nn.Flatten(),
            nn.Linear(512 * 7 * 7, 512),
            nn.BatchNorm1d(512),
        )
        self.network = nn.Sequential(OrderedDict(layers))
        if weights is not None:
            instead = "Expected ArcFace's weights of IR-SE50, with the names input_layer.0.weight and so on."
            load_strictly(self.network, read_state_dict(weights, instead), Path(weights), instead)
        self._settle()

    def _vectors(self, images: Tensor) -> Tensor:
        images = with_channels(images, 3)
        if images.shape[2:] != (256, 256):
            images = F.adaptive_avg_pool2d(images, 256)
        return self.network(F.adaptive_avg_pool2d(images[..., 35:223, 32:220], 112))


class MoCoLoss(SimilarityLoss):
    """How far two images are from one another in the features of a contrastively trained ResNet.

    A published MoCo v2 sees images of 224 pixels, resized by repeating or leaving out pixels, in [-1, 1] without ImageNet's
    statistics, as pSp and ReStyle use it. The encoder of a run here sees them at the size of its training.

    Source: Tov et al., "Designing an Encoder for StyleGAN Image Manipulation", SIGGRAPH 2021.

    Args:
        weights_or_run: a published checkpoint of MoCo v2, or torchvision's weights of a ResNet-50; or the folder of a
            `fastnce train moco` (or simclr, or supcon), of which the averaged weights of the last checkpoint are taken. None: a
            ResNet-50 with random weights.

    Raises:
        UserError: neither of these, or damaged.
    """

    def __init__(self, weights_or_run: Path | str | None) -> None:
        super().__init__()
        self.expects, self.channels, self._mode = 224, 3, "nearest"
        path = None if weights_or_run is None else Path(weights_or_run)
        if path is not None and path.is_dir():
            self._read_run(path)
        else:
            self.network = ResNetEncoder(*RESNETS["resnet50"])
            if path is not None:
                load_strictly(self.network, *_moco_weights(path))
        self._settle()

    def _read_run(self, run: Path) -> None:
        path = run / "checkpoints" / "last.pt"
        checkpoint = read_plain(path, "Name the --out folder of a fastnce train moco.")
        config = checkpoint.get("config", {}) if isinstance(checkpoint, dict) else {}
        if config.get("system") != "representation":
            raise UserError(
                f"{run}: is a run of {config.get('system', 'something else')}, which has no encoder of whole images. Name one of "
                "moco, simclr or supcon."
            )
        self.expects, self.channels = config["image_size"], config["image_channels"]
        self._mode = "bilinear"
        self.network = ResNetEncoder(
            *RESNETS[config["encoder"]],
            base_channels=config["encoder_channels"],
            image_channels=self.channels,
            stem=config["stem"],
        )
        load_strictly(self.network, checkpoint["average"]["module"], path)

    def _vectors(self, images: Tensor) -> Tensor:
        images = with_channels(images, self.channels)
        if images.shape[2:] != (self.expects, self.expects):
            smooth = self._mode == "bilinear"
            images = F.interpolate(images, self.expects, mode=self._mode, antialias=smooth)
        return self.network(images)


def _moco_weights(path: Path) -> tuple[dict[str, Tensor], Path, str]:
    """What `load_strictly` takes besides the network."""
    instead = "Expected MoCo v2's checkpoint of a ResNet-50, torchvision's weights of one, or the folder of a fastnce train moco."
    state = read_state_dict(path, instead, entry="state_dict")
    prefix = "encoder_q."
    state = {name.removeprefix("module."): x for name, x in state.items()}
    if any(name.startswith(prefix) for name in state):
        state = {
            name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)
        }
    return {name: x for name, x in state.items() if not name.startswith("fc.")}, path, instead


class ScriptedSimilarity(SimilarityLoss):
    """The same in the features of a network from a TorchScript file, from images in [-1, 1] to (B, F) or anything longer.

    Args:
        file: as `torch.jit.save` wrote it; it must let gradients through. Use only files whose origin you trust.

    Raises:
        UserError: no such file, no TorchScript module; in use one that fails on the images or gives no gradients.
    """

    def __init__(self, file: Path | str) -> None:
        super().__init__()
        self.file = file
        self.network, self.name = load_scripted("similarity", file)
        self._settle()

    def _vectors(self, images: Tensor) -> Tensor:
        try:
            result = self.network(images)
        except Exception as error:  # whatever a scripted module raises
            reason = " ".join(str(error).split())[-120:]
            raise UserError(
                f"similarity {self.file}: fails on images of shape {tuple(images.shape)} ({reason}). It must take these, in [-1, 1]."
            ) from error
        if not isinstance(result, Tensor) or result.ndim < 2 or len(result) != len(images):
            raise UserError(
                f"similarity {self.file}: gives no features of {len(images)} images, (N, F). Save a network that does."
            )
        if images.requires_grad and torch.is_grad_enabled() and not result.requires_grad:
            raise UserError(
                f"similarity {self.file}: its features have no gradient. Save a network of float images, not of 8 bits."
            )
        return result.flatten(1)


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Images (B, 1 or 3, H, W) with the channels that a network reads: grey repeated, or the grey of colours."""
    have = images.shape[1]
    if have == channels:
        return images
    if have == 1:
        return images.expand(-1, channels, -1, -1)
    if (have, channels) == (3, 1):
        return (images * images.new_tensor(_GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)
    raise ValueError(f"images have {have} channels, and the network reads {channels}. Use 1 or 3.")


def w_norm(w: Tensor, about: Tensor | float) -> Tensor:
    """pSp's w-norm: the mean over the batch of ||w - about||, codes (B, k, D) about the mean latent, (D,) or (k, D)."""
    return (w - about).flatten(1).norm(dim=1).mean()
