"""Networks that judge images: a TorchScript file of the user's, or torch-fidelity's Inception."""

import hashlib
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from fastnce.data.images import to_uint8
from fastnce.errors import UserError

# The name that stands for torch-fidelity's Inception in the place of a file.
FIDELITY = "torch-fidelity"


def load_scripted(
    what: str, path: Path | str, device: torch.device | str = "cpu"
) -> tuple[nn.Module, str]:
    """A module from a TorchScript file in eval mode, and its name: the file's, and twelve digits of the content's hash.

    UserError if there is no such file, or it is no TorchScript module; `what` names it there. Use only files whose origin you
    trust.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what} {path}: no such file. Give a TorchScript file.")
    try:
        with warnings.catch_warnings():
            # torch.export is to replace TorchScript, but the published extractors are such files.
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location=device).eval()
    except Exception as error:  # RuntimeError mostly, and whatever a damaged archive raises
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{what} {path}: not a TorchScript module ({reason}). "
            "Give a file that torch.jit.save wrote, not a state dict or a pickle."
        ) from error
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return module, f"{path.name}-{digest[:12]}"


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
