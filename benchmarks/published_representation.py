"""The steps of SimCLR and MoCo v2 in plain eager PyTorch: what ``fastnce.models.Representation`` is timed and tested against.

Written from the equations. SimCLR encodes both views as one batch. MoCo's networks see each part of a batch apart, as on the GPUs
of the publication. State-dict keys of the ResNet are the field's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import baselines


class _Block(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential()
        if stride > 1 or before != width:
            conv = nn.Conv2d(before, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet18(nn.Sequential):
    """For images of 32 pixels: (N, 3, H, W) to (N, 512)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        widths = (64, 64, 128, 256, 512)
        for stage in range(1, 5):
            before, width = widths[stage - 1 : stage + 1]
            blocks = _Block(before, width, 1 if stage == 1 else 2), _Block(width, width, 1)
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()


def projection_head() -> nn.Sequential:
    """Of ResNet-18's 512 features 128."""
    return nn.Sequential(nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Linear(512, 128))


class PublishedRepresentation(nn.Module):
    """An encoder and its head, MoCo's copies of both and its queue, SGD, and one training step.

    Args:
        encoder, head: the networks that learn; MoCo's key networks begin as copies of them.
        config: temperature, lr, momentum, weight_decay; method "simclr", "supcon" or "moco", and its key_momentum and norm_splits.
        queue: MoCo's first keys (K, dim), of length 1.
    """

    def __init__(
        self, encoder: nn.Module, head: nn.Module, config, queue: Tensor | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.config, self.place = encoder, head, config, 0
        if config.method == "moco":
            self.key_encoder, self.key_head = copy.deepcopy((encoder, head))
            self.register_buffer("queue", queue.clone())
        learned = [*encoder.parameters(), *head.parameters()]
        how = {"momentum": config.momentum, "weight_decay": config.weight_decay}
        self.optimizer = torch.optim.SGD(learned, config.lr, **how)

    def training_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One update."""
        views, temperature = (batch["view1"], batch["view2"]), self.config.temperature
        if self.config.method == "moco":
            z1, z2, loss = self._against_the_queue(*views)
        else:
            z = self.head(self.encoder(torch.cat(views)))
            z1, z2 = z.chunk(2)
            if self.config.method == "supcon":
                loss = baselines.sup_con(z, batch["label"].repeat(2), temperature=temperature)
            else:
                loss = baselines.nt_xent(z1, z2, temperature=temperature)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        cosine = F.cosine_similarity(z1.detach(), z2.detach()).mean()
        return {"loss": loss.detach(), "positive_cosine": cosine}

    def _against_the_queue(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slowness = self.config.key_momentum
        with torch.no_grad():
            for slow, quick in (
                (self.key_encoder, self.encoder),
                (self.key_head, self.head),
            ):
                for key, query in zip(slow.parameters(), quick.parameters(), strict=True):
                    key.copy_(slowness * key + (1 - slowness) * query)
            order = torch.randperm(len(view2))
            shuffled = self._in_parts(self.key_encoder, self.key_head, view2[order])
            keys = F.normalize(shuffled[order.argsort()])
        queries = F.normalize(self._in_parts(self.encoder, self.head, view1))
        positive = (queries * keys).sum(1, keepdim=True)
        # A copy: the keys are written over before the backward pass.
        logits = torch.cat([positive, queries @ self.queue.clone().T], 1)
        target = torch.zeros(len(logits), dtype=torch.int64)
        loss = F.cross_entropy(logits / self.config.temperature, target)
        places = (self.place + torch.arange(len(keys))) % len(self.queue)
        self.queue[places] = keys
        self.place = (self.place + len(keys)) % len(self.queue)
        return queries, keys, loss

    def _in_parts(self, encoder: nn.Module, head: nn.Module, images: Tensor) -> Tensor:
        parts = images.tensor_split(self.config.norm_splits)
        return torch.cat([head(encoder(part)) for part in parts])
