"""Representation learning from two views of each image: SimCLR, MoCo v2 and SupCon."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce import distributed
from fastnce.errors import UserError
from fastnce.models import options
from fastnce.models.lars import LARS, lars_groups
from fastnce.models.metric_losses import n_pair_loss, pair_loss, triplet_loss
from fastnce.networks.layers import to_channels_last
from fastnce.networks.resnet_encoder import RESNETS, ProjectionHead, ResNetEncoder, Stem

Method = Literal["simclr", "moco", "supcon"]
Encoder = Literal["resnet18", "resnet50", "small"]
PairLoss = Literal["nt_xent", "info_nce", "n_pair", "triplet", "pair"]
OptimizerName = Literal["sgd", "lars", "adam"]


@dataclass(frozen=True, kw_only=True)
class RepresentationConfig:
    """What defines the networks, the loss and the optimiser. The defaults are SimCLR on CIFAR-10 as in SupCon's publication."""

    method: Method = "simclr"
    """Where negatives and positives come from. simclr: the other images of the batch; moco: a queue of keys from a slowly
    moving copy of the encoder; supcon: the batch, where all images of a class are positives of one another."""
    loss: PairLoss = "nt_xent"
    """Loss of method=simclr: nt_xent, the published one, or to compare with it info_nce (one direction), n_pair, triplet, pair."""
    encoder: Encoder = "resnet50"
    """Encoder: ResNet-18, ResNet-50, or a small one of three blocks."""
    encoder_channels: int = 64
    """Encoder: channels of the first stage; each further stage doubles them."""
    stem: Stem = "cifar"
    """Encoder's first layer: imagenet, 7x7 with stride 2 and a max-pool; cifar, 3x3."""
    image_channels: int = 3
    """3 for RGB, 1 for grey."""
    head_dim: int | None = None
    """Projection head: width of the hidden layer; None: that of the features."""
    projection_dim: int = 128
    """Projection head: length of what the loss compares."""
    temperature: float = 0.5
    """Temperature of nt_xent, info_nce, moco and supcon."""
    margin: float | None = None
    """Margin of triplet (None: 0.2) and pair (None: 1)."""
    queue_size: int = 4096
    """MoCo: keys in the queue."""
    key_momentum: float = 0.99
    """MoCo: how much of the key encoder stays in each step."""
    norm_splits: int = 8
    """MoCo: parts of a batch that batch norm sees apart, in another order for the keys, so that its statistics do not tell which
    keys belong to which queries; as published, where each of 8 GPUs has its part."""
    optimizer: OptimizerName = "sgd"
    """SGD with momentum, LARS, or Adam."""
    lr: float = 0.5
    """Learning rate."""
    momentum: float = 0.9
    """SGD and LARS: decay of the velocity."""
    weight_decay: float = 1e-4
    """Weight decay, as a part of the gradient; LARS leaves out biases and norms."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: networks run under autocast; parameters and losses stay fp32."""
    backend: str | None = None
    """Backend of the contrastive ops; by default the fastest that runs here."""

    def __post_init__(self) -> None:
        options.one_of(self, "method", get_args(Method))
        options.one_of(self, "loss", get_args(PairLoss))
        options.one_of(self, "encoder", get_args(Encoder))
        options.one_of(self, "stem", get_args(Stem))
        options.one_of(self, "optimizer", get_args(OptimizerName))
        options.one_of(self, "precision", ("fp32", "bf16"))
        options.at_least(self, 1, "encoder_channels", "image_channels", "projection_dim")
        options.at_least(self, 1, "queue_size", "norm_splits")
        options.at_least(self, 0, "weight_decay")
        options.above_zero(self, "temperature", "lr")
        options.in_unit_interval(self, "key_momentum", "momentum")
        if self.head_dim is not None:
            options.at_least(self, 1, "head_dim")
        if self.margin is not None:
            options.above_zero(self, "margin")
        if self.loss != "nt_xent" and self.method != "simclr":
            raise UserError(
                f"loss={self.loss} compares the views of a batch, and method={self.method} has its own loss. "
                "Use method=simclr, or drop loss."
            )


def build_encoder(config: RepresentationConfig) -> ResNetEncoder:
    """The encoder that `config` describes, freshly initialised."""
    return ResNetEncoder(
        *RESNETS[config.encoder],
        base_channels=config.encoder_channels,
        image_channels=config.image_channels,
        stem=config.stem,
    )


class Representation(nn.Module):
    """The networks `encoder` and `head`, their optimiser (`optimizers["encoder"]`), and one training step.

    Two views x1, x2 of each image, z = head(encoder(x)), and a contrastive loss, the framework of Le-Khac et al., "Contrastive
    Representation Learning: A Framework and Review", 2020 (https://arxiv.org/abs/2010.05113):

        simclr    nt_xent(z1, z2), or another loss of the pairs (`loss`)
        supcon    sup_con([z1, z2], [labels, labels])
        moco      info_nce(z1, k2, negative_keys=queue), k2 = key_head(key_encoder(x2)) without gradient

    SimCLR and SupCon encode both views as one batch. MoCo first moves the key networks, key <- m key + (1 - m) query, then
    encodes, updates, and at last puts the keys into the queue in the place of the oldest.

    In several processes the losses are those of the images of all of them, but for triplet and pair, which stay within each
    one's own; so do batch norm and MoCo's shuffling.

    Source: SimCLR, Chen et al. 2020 (https://arxiv.org/abs/2002.05709); MoCo v2, Chen et al. 2020
    (https://arxiv.org/abs/2003.04297); SupCon, Khosla et al. 2020 (https://arxiv.org/abs/2004.11362).

    Args:
        config: see `RepresentationConfig`.

    Attributes:
        key_encoder, key_head, queue: MoCo's; not there in the others.

    Raises:
        UserError: a backend that is not there.
    """

    def __init__(self, config: RepresentationConfig) -> None:
        super().__init__()
        options.backend_is_there(config.backend)
        self.config = config
        self.encoder = build_encoder(config)
        features = self.encoder.feature_dim
        self.head = ProjectionHead(features, config.head_dim or features, config.projection_dim)
        # Faster on a GPU and on a CPU.
        to_channels_last(self)
        if config.method == "moco":
            self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
            self.key_head = copy.deepcopy(self.head).requires_grad_(False)
            self.queue = distributed.NegativeQueue(config.queue_size, config.projection_dim)
        self.optimizers = {"encoder": _optimizer(config, [self.encoder, self.head])}

    def training_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One update.

        Args:
            batch: "view1" and "view2" (N, C, H, W) in [-1, 1], and for supcon "label" (N,) int64, on the networks' device.

        Returns:
            Detached scalars: "loss", and "positive_cosine", the mean cosine of the two views of an image.

        Raises:
            ValueError: fewer images than the loss needs.
        """
        views = [
            batch[name].contiguous(memory_format=torch.channels_last) for name in ("view1", "view2")
        ]
        self._check_batch(len(views[0]))
        optimizer = self.optimizers["encoder"]
        optimizer.zero_grad(set_to_none=True)
        if self.config.method == "moco":
            z1, z2 = self._query_and_key(*views)
        else:
            z1, z2 = self._embed(self.encoder, self.head, torch.cat(views)).chunk(2)
        loss = self._loss(z1, z2, batch.get("label"))
        loss.backward()
        optimizer.step()
        if self.config.method == "moco":
            self.queue.enqueue(z2)
        cosine = F.cosine_similarity(z1.detach(), z2.detach()).mean()
        return {"loss": loss.detach(), "positive_cosine": cosine}

    def _check_batch(self, count: int) -> None:
        config = self.config
        if config.method != "moco" and count < 2:
            raise ValueError(
                f"training_step: got {count} image, which has no negatives with method={config.method}. Give at least 2."
            )
        if config.method == "moco" and count < config.norm_splits:
            raise ValueError(
                f"training_step: got {count} images, fewer than norm_splits={config.norm_splits}. Give more, or split less."
            )

    def _loss(self, z1: Tensor, z2: Tensor, labels: Tensor | None) -> Tensor:
        config = self.config
        # Over ranks, if there are several. They have equally many images, which need not be checked in each step.
        how = {"temperature": config.temperature, "backend": config.backend, "check": False}
        if config.method == "moco":
            return distributed.info_nce(z1, z2, self.queue.keys, **how)
        if config.method == "supcon":
            return distributed.sup_con(torch.cat([z1, z2]), labels.repeat(2), **how)
        if config.loss == "nt_xent":
            return distributed.nt_xent(z1, z2, **how)
        if config.loss == "info_nce":
            return distributed.info_nce(z1, z2, **how)
        if config.loss == "n_pair":
            return n_pair_loss(z1, z2, backend=config.backend)
        margin = {} if config.margin is None else {"margin": config.margin}
        function = triplet_loss if config.loss == "triplet" else pair_loss
        return function(z1, z2, **margin)

    def _query_and_key(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of the first views, and without gradient, from the key networks, of the second ones."""
        with torch.no_grad():
            self._move_key_networks()
            order = torch.randperm(len(view2), device=view2.device)
            shuffled = self._embed(self.key_encoder, self.key_head, view2[order])
            key = torch.empty_like(shuffled)
            key[order] = shuffled
        return self._embed(self.encoder, self.head, view1), key

    def _move_key_networks(self) -> None:
        keys = [*self.key_encoder.parameters(), *self.key_head.parameters()]
        queries = [*self.encoder.parameters(), *self.head.parameters()]
        torch._foreach_lerp_(keys, queries, 1 - self.config.key_momentum)

    def _embed(self, encoder: nn.Module, head: nn.Module, images: Tensor) -> Tensor:
        """(N, C, H, W) to (N, projection_dim) float32."""
        splits = self.config.norm_splits if self.config.method == "moco" else 1
        low = self.config.precision == "bf16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=low):
            parts = [head(encoder(part)) for part in images.tensor_split(splits)]
        return torch.cat(parts).float()


def _optimizer(config: RepresentationConfig, modules: list[nn.Module]) -> torch.optim.Optimizer:
    parameters = [p for module in modules for p in module.parameters()]
    common = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, fused=True, **common)
    if config.optimizer == "lars":
        return LARS(lars_groups(modules), momentum=config.momentum, **common)
    return torch.optim.SGD(parameters, momentum=config.momentum, fused=True, **common)
