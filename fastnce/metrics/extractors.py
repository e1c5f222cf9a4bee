"""Networks that judge images: a TorchScript file of the user's, or torch-fidelity's Inception."""

from pathlib import Path

import torch
from torch import Tensor, nn

from fastnce.data.images import to_uint8
from fastnce.errors import UserError
from fastnce.networks.weights import load_scripted

# The name that stands for torch-fidelity's Inception in the place of a file.
FIDELITY = "torch-fidelity"


class ScriptedExtractor(nn.Module):
    """A feature extractor from a TorchScript file, for images of any kind.

    The module takes (N, 3, H, W) uint8, resizes by itself if it has to, and returns features (N, F). One whose `forward` has
    the argument `return_features` is called with `return_features=True` for its features, and with `no_output_bias=True` for
    the class probabilities of the Inception score. Such is the widely used Inception-v3 file of 2015-12-05 (2048 features).

    Args:
        path: The file, as `torch.jit.save` wrote it. Use only files whose origin you trust.
        device: Where it runs.

    Raises:
        UserError: If there is no such file, or it is no TorchScript module.
    """

    reads_labels = False  # its classes are not those of the data

    def __init__(self, path: Path | str, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.module, self.name = load_scripted("extractor", path, device)
        arguments = {argument.name for argument in self.module.forward.schema.arguments}
        self._has_features_argument = "return_features" in arguments
        self._has_probabilities = "no_output_bias" in arguments
        self.device = torch.device(device)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1 or 3, H, W) float in [-1, 1], quantised to 8 bits, to features (N, F)."""
        arguments = {"return_features": True} if self._has_features_argument else {}
        return self.module(self._bytes(images), **arguments)

    def class_probabilities(self, images: Tensor) -> Tensor | None:
        """(N, K) probabilities of the extractor's own classes; None if it has none."""
        if not self._has_probabilities:
            return None
        return self.module(self._bytes(images), no_output_bias=True)

    def _bytes(self, images: Tensor) -> Tensor:
        return to_uint8(images).expand(-1, 3, -1, -1).to(self.device)


class FidelityInception(nn.Module):
    """The Inception-v3 of 2015-12-05 as the package torch-fidelity carries it: 2048 features, weights from the hub.

    Through torchmetrics, so that features are those of its FID. Both packages, and torchvision, which torch-fidelity needs,
    must be installed; the weights are downloaded on the first use and kept in torch's hub folder.

    Args:
        device: Where it runs.

    Raises:
        UserError: If a package is missing, or the weights cannot be had.
    """

    reads_labels = False
    name = "torch-fidelity-inception-v3-compat-2048"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            self.module = NoTrainInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()
        except ModuleNotFoundError as error:
            raise UserError(
                f"extractor {FIDELITY}: the package {error.name or FIDELITY} is not installed. Run: pip install torch-fidelity "
                "torchvision; or give a TorchScript file."
            ) from error
        except OSError as error:  # no connection, or no space for the file
            raise UserError(
                f"extractor {FIDELITY}: its weights cannot be downloaded ({error}). Give a TorchScript file instead."
            ) from error
        self.device = torch.device(device)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1 or 3, H, W) float in [-1, 1], quantised to 8 bits, to features (N, 2048)."""
        return self.module(to_uint8(images).expand(-1, 3, -1, -1).to(self.device))


def load_extractor(extractor: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """A `ScriptedExtractor` from a file, or `FidelityInception` for the name "torch-fidelity".

    Raises:
        UserError: If it cannot be had.
    """
    if str(extractor) == FIDELITY:
        return FidelityInception(device)
    return ScriptedExtractor(extractor, device)
