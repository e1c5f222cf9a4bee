"""The patchwise contrastive loss of a translation system: sample patches, project them, compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

import fastnce
from fastnce import distributed
from fastnce.errors import UserError
from fastnce.networks import PatchProjector, ResnetGenerator
from fastnce.systems import options
from fastnce.systems.adversarial import at_least_fp32
from fastnce.systems.translation import build_generator

Negatives = Literal["image", "batch", "queue", "image+queue"]


@dataclass(frozen=True, kw_only=True)
class PatchConfig(options.Options):
    """What every loss of patches is told. A system's configuration inherits from it."""

    num_patches: int = 256
    """Patches per image and layer; 0: all positions."""
    projection_dim: int = 256
    """Width of the projector's layers."""
    temperature: float = 0.07
    """Temperature of the contrastive loss."""
    backend: str | None = None
    """Backend of the contrastive ops; by default the fastest that runs here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.at_least(self, 1, "projection_dim")
        options.at_least(self, 0, "num_patches")
        options.above_zero(self, "temperature")


@dataclass(frozen=True, kw_only=True)
class PatchContrastConfig(PatchConfig):
    """The patchwise contrastive loss. The defaults are the published CUT's. A system's configuration inherits from it."""

    nce_layers: tuple[int, ...] = (0, 4, 8, 12, 16)
    """Generator layers whose features are compared; 0 is the padded image itself."""
    projector: Literal["mlp", "none"] = "mlp"
    """The step of patches before they are compared: a small trained MLP per layer, or nothing."""
    negatives: Negatives = "image"
    """Which patches are negatives. image: others of the same image; batch: others of all images of the batch; queue: those of
    earlier images only; image+queue: others of the same image and those of earlier images."""
    queue_size: int = 4096
    """Patches of earlier images that each layer keeps, with a queue among the negatives."""
    norm_floor: float = 0.0
    """Added to the norm of a patch by which it is divided: 1e-7 in the published code, which tells in the first step only.
    With 0 the normalisation is part of the fused loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.at_least(self, 1, "queue_size")
        options.at_least(self, 0, "norm_floor")
        if self.norm_floor > 0 and "queue" in self.negatives:
            raise UserError(
                f"norm_floor={self.norm_floor} is for the published negatives, image and batch, got negatives={self.negatives}. "
                "Use norm_floor=0."
            )


class Comparison(NamedTuple):
    """The two sides of one contrastive loss: feature maps (N, C, H, W), one per layer, and what projects their patches."""

    queries: Sequence[Tensor]  # of the translated images
    keys: Sequence[Tensor]  # of the images they were made of; they get no gradient
    query_projector: nn.Module | None  # None compares the features themselves
    key_projector: nn.Module | None  # the same network in CUT, another one in DCLGAN


class PatchContrast(nn.Module):
    """The contrastive losses of a step, all at once.

    Of each map of the keys `num_patches` positions are drawn, the same for all images of the batch, and the queries' patches
    are taken at the same ones. The positive of a query is the key at its own position. A projector that serves several losses
    sees the patches of all of them in one pass. The gradient flows through the queries only.

    With a queue among the negatives, each loss and layer has its own first-in-first-out queue of `queue_size` projected keys of
    earlier batches, filled with random unit vectors at the start. The loss is then `info_nce`, without the published constant
    logit -10 in the place of the positive, which is nothing at usual temperatures: exp(-10 / 0.07) = 1e-62. Ranks take in each
    other's keys. The queues are in the state dict; without one this module has no state.

    Call it under the autocast of the networks, but not in the same autocast context as a pass without gradient: autocast would
    hand on the weights that it cast there, without gradient.

    Args:
        config: `num_patches`, `temperature`, `negatives`, `queue_size` and `backend`, see `PatchContrastConfig`.
        names: the losses that will be asked for, and
        dims: the length of a projected patch in each layer, see `projected_dims`; both only matter for queues.

    Examples:
        >>> import torch
        >>> contrast = PatchContrast(PatchContrastConfig(num_patches=16), ["NCE1", "NCE2"], [256])
        >>> f1, f2 = PatchProjector([64]), PatchProjector([64])
        >>> a, fake_b, b, fake_a = ([torch.randn(2, 64, 8, 8)] for _ in range(4))  # feature maps
        >>> losses = contrast({"NCE1": Comparison(fake_b, a, f2, f1), "NCE2": Comparison(fake_a, b, f1, f2)})
        >>> (losses["NCE1"] + losses["NCE2"]).backward()
    """

    def __init__(
        self, config: PatchContrastConfig, names: Sequence[str], dims: Sequence[int]
    ) -> None:
        super().__init__()
        self.config = config
        self.queues = nn.ModuleDict()
        if config.negatives in ("queue", "image+queue"):
            for name in names:
                self.queues[name] = nn.ModuleList(
                    distributed.NegativeQueue(config.queue_size, dim, seed=layer)
                    for layer, dim in enumerate(dims)
                )

    def forward(
        self,
        comparisons: Mapping[str, Comparison],
        patch_ids: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """The losses, by the names of the comparisons; each the mean over its patches, images and layers.

        Args:
            comparisons: what to compare. The maps of all of them have the same H and W in the same layer.
            patch_ids: positions by name, one (S,) int64 tensor per layer; drawn for the names that are not there.
        """
        patch_ids = patch_ids or {}
        query_patches, key_patches = [], []
        for name, pair in comparisons.items():
            with torch.no_grad():
                patches, ids = sample(self.config, pair.keys, patch_ids.get(name))
            key_patches.append((pair.key_projector, patches))
            query_patches.append((pair.query_projector, sample(self.config, pair.queries, ids)[0]))
        # Queries first: what autocast remembers of a pass without gradient must not serve one with it.
        queries = projected(query_patches)
        with torch.no_grad():
            keys = projected(key_patches)
        return {
            name: self._compare(name, *pair)
            for name, pair in zip(comparisons, zip(queries, keys, strict=True), strict=True)
        }

    def _compare(self, name: str, queries: list[Tensor], keys: list[Tensor]) -> Tensor:
        config = self.config
        how = {"temperature": config.temperature, "backend": config.backend}
        if config.norm_floor > 0:
            return self._compare_with_floor(queries, keys)
        if name not in self.queues:
            return fastnce.patch_nce(queries, keys, negatives=config.negatives, **how)
        losses = []
        for query, key, queue in zip(queries, keys, self.queues[name], strict=True):
            in_image = config.negatives == "image+queue"
            earlier = queue.keys.to(query.dtype)
            losses.append(fastnce.info_nce(query, key, earlier, in_batch_negatives=in_image, **how))
            queue.enqueue(key.flatten(0, 1).to(queue.queue.dtype))
        return sum(losses) / len(losses)

    def _compare_with_floor(self, queries: list[Tensor], keys: list[Tensor]) -> Tensor:
        """The same with `norm_floor`, and without the published constant logit -10, which is 1e-62 at a temperature of 0.07."""
        config, losses = self.config, []
        for pair in zip(queries, keys, strict=True):
            query, key = (_shortened(x, config.norm_floor) for x in pair)
            if config.negatives == "batch":
                query, key = query.flatten(0, 1), key.flatten(0, 1)
            losses.append(
                fastnce.info_nce(
                    query,
                    key,
                    temperature=config.temperature,
                    normalize=False,
                    backend=config.backend,
                )
            )
        return sum(losses) / len(losses)


def sample(
    config: PatchConfig, maps: Sequence[Tensor], patch_ids: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Patches (N, S, C) of each map, at `patch_ids` or at positions drawn anew, and the positions."""
    if patch_ids is None and config.num_patches == 0:
        patch_ids = [torch.arange(x[0, 0].numel(), device=x.device) for x in maps]
    return fastnce.sample_patches(
        list(maps), config.num_patches or 1, patch_ids=patch_ids, backend=config.backend
    )


def _shortened(rows: Tensor, floor: float) -> Tensor:
    """Rows divided by their norm plus `floor`."""
    rows = at_least_fp32(rows)
    return rows / (torch.linalg.vector_norm(rows, dim=-1, keepdim=True) + floor)


def projected(parts: list[tuple[nn.Module | None, list[Tensor]]]) -> list[list[Tensor]]:
    """Each part's patches, `[layer]` (N, S, C), behind the part's projector; one pass for all parts of the same projector."""
    results = [patches for _, patches in parts]
    for projector in dict.fromkeys(projector for projector, _ in parts):
        if projector is None:
            continue
        mine = [index for index, (other, _) in enumerate(parts) if other is projector]
        sizes = [len(results[index][0]) for index in mine]
        stacked = [torch.cat(x) for x in zip(*(results[index] for index in mine), strict=True)]
        split = [layer.split(sizes) for layer in projector(stacked)]
        for index, patches in zip(mine, zip(*split, strict=True), strict=True):
            results[index] = list(patches)
    return results


def projected_dims(config: PatchContrastConfig, channels: Sequence[int]) -> list[int]:
    """The lengths of projected patches, for maps of `channels`."""
    return list(channels) if config.projector == "none" else [config.projection_dim] * len(channels)


def build_projector(config: PatchContrastConfig, channels: Sequence[int]) -> PatchProjector | None:
    """The projector that `config` describes, for maps of `channels`; None where there is nothing to train."""
    if config.projector == "none":
        return None
    return PatchProjector(channels, config.projection_dim)


def _check_num_patches(config: PatchContrastConfig, shapes: list[tuple[int, int, int]]) -> None:
    for index, (layer, (_, height, width)) in enumerate(
        zip(config.nce_layers, shapes, strict=True)
    ):
        if config.num_patches > height * width:
            raise UserError(
                f"num_patches={config.num_patches} exceeds the {height}x{width} = {height * width} positions of feature "
                f"map {index} (layer {layer}). Use num_patches <= {height * width}, or drop that layer from nce_layers."
            )


def feature_shapes(
    config: PatchContrastConfig, image_size: tuple[int, int] | None
) -> list[tuple[int, int, int]]:
    """(C, H, W) of the feature maps that `nce_layers` name, found without computing anything.

    Raises:
        UserError: the generator has no such layers, or, for images of `image_size`, a map has less than `num_patches` positions.
    """
    with torch.device("meta"):
        generator = build_generator(config)
        image = torch.empty(1, config.in_channels, *(image_size or (256, 256)))
    try:
        shapes = [tuple(x.shape[1:]) for x in generator.encode(image, config.nce_layers)]
    except ValueError as error:
        hint = str(error)
        if isinstance(generator, ResnetGenerator):
            first = generator.first_block
            hint = (
                f"must be ascending, distinct layers of the generator, from 0 to {len(generator.model) - 1}; its "
                f"{config.num_blocks} residual blocks are the layers {first} to {first + config.num_blocks - 1}."
            )
        raise UserError(f"nce_layers={config.nce_layers}: {hint}") from error
    if image_size is not None:
        _check_num_patches(config, shapes)
    return shapes
