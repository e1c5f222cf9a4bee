"""Representation learning from two views of each image: SimCLR, MoCo v2 and SupCon."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce import distributed
from fastnce.errors import UserError
from fastnce.files import atomic_path
from fastnce.networks.heads import ProjectionHead
from fastnce.networks.layers import to_channels_last
from fastnce.networks.resnet_encoder import RESNETS, ResNetEncoder, Stem
from fastnce.systems import options
from fastnce.systems.adversarial import at_least_fp32
from fastnce.systems.lars import LARS, lars_groups
from fastnce.systems.metric_losses import n_pair_loss, pair_loss, triplet_loss
from fastnce.systems.schedule import WarmupCosine
from fastnce.systems.system import (
    Ablation,
    LabelledConfig,
    LabelledSystem,
    Measure,
    Rows,
    autocast,
    image_batches,
    images_with_labels,
    random_images,
    rng_kept,
)

if TYPE_CHECKING:
    from types import ModuleType

    from fastnce.data import LabelledImages, TwoViews

# A sample grid shows this many classes, and looks for neighbours among this many training images.
_GRID_CLASSES = 10
_GRID_IMAGES = 2000

Method = Literal["simclr", "moco", "supcon"]
Encoder = Literal["resnet18", "resnet50", "small"]
PairLoss = Literal["nt_xent", "info_nce", "n_pair", "triplet", "pair"]
OptimizerName = Literal["sgd", "lars", "adam"]


@dataclass(frozen=True, kw_only=True)
class RepresentationConfig(LabelledConfig):
    """The options of the networks, the loss and the optimiser. The defaults are SimCLR on CIFAR-10 as in SupCon's publication."""

    system: ClassVar[str] = "representation"

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

    data: Path = Path()
    """Folder of labelled images: train/CLASS/*.png and test/CLASS/*.png, CIFAR or Tiny ImageNet as distributed. Only supcon
    learns from the labels; the others are measured with them, and take images without: train/*.png, or a folder of images."""
    image_size: int = 32
    """Height and width of the images and of their views."""
    views: str = "simclr-cifar"
    """How the two views of an image are made: simclr, moco-v2, simclr-cifar, supcon, digits or digits-crops."""
    batch_size: int = 1024
    """Images per step, each with two views."""
    last_batch: Literal["auto", "drop", "keep"] = "auto"
    """The images of an epoch that fill no whole batch. drop: they are left out, others in each epoch; keep: they
    share a batch with the next epoch's first ones, where an image may come twice and be its own negative. auto: drop, and a
    run from before this option goes on with keep."""
    epochs: int = 1000
    """Epochs, over which the learning rate falls to 0 as half a cosine."""
    warmup_epochs: int = 10
    """First epochs, in which the learning rate rises."""
    steps: int | None = None
    """Train for this many steps instead of `epochs`."""
    ema_decay: float = 0.0
    """Decay of the running average of the encoder's weights; 0 keeps the last weights."""
    sample_count: int = 8
    """Neighbours of each test image in a sample grid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.at_least(self, 1, "encoder_channels", "image_channels", "projection_dim")
        options.at_least(self, 1, "queue_size", "norm_splits", "head_dim", "image_size", "epochs")
        options.at_least(self, 0, "weight_decay", "warmup_epochs")
        options.above_zero(self, "temperature", "lr", "margin")
        options.in_unit_interval(self, "key_momentum", "momentum")
        if self.loss != "nt_xent" and self.method != "simclr":
            raise UserError(
                f"loss={self.loss} compares the views of a batch, and method={self.method} has its own loss. "
                "Use method=simclr, or drop loss."
            )
        if self.class_balance and self.method != "supcon":
            raise UserError(
                f"class_balance is for method=supcon, which learns from the labels, got method={self.method}. Leave it out."
            )
        if self.method != "moco" and self.batch_size < 2:
            raise UserError(
                f"batch_size={self.batch_size} leaves method={self.method} no negatives: they are the other images of the "
                "batch. Use batch_size >= 2, the more the better."
            )
        if self.method == "moco" and self.norm_splits > self.batch_size:
            raise UserError(
                f"norm_splits={self.norm_splits} is more than batch_size={self.batch_size}. Use a smaller norm_splits."
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
            keys = [*self.key_encoder.parameters(), *self.key_head.parameters()]
            queries = [*self.encoder.parameters(), *self.head.parameters()]
            torch._foreach_lerp_(keys, queries, 1 - self.config.key_momentum)
            order = torch.randperm(len(view2), device=view2.device)
            shuffled = self._embed(self.key_encoder, self.key_head, view2[order])
            key = torch.empty_like(shuffled)
            key[order] = shuffled
        return self._embed(self.encoder, self.head, view1), key

    def _embed(self, encoder: nn.Module, head: nn.Module, images: Tensor) -> Tensor:
        """(N, C, H, W) to (N, projection_dim), float32 or what the networks are in beyond it."""
        splits = self.config.norm_splits if self.config.method == "moco" else 1
        with autocast(self):
            parts = [head(encoder(part)) for part in images.tensor_split(splits)]
        return at_least_fp32(torch.cat(parts))


def _optimizer(config: RepresentationConfig, modules: list[nn.Module]) -> torch.optim.Optimizer:
    parameters = [p for module in modules for p in module.parameters()]
    common = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, fused=True, **common)
    if config.optimizer == "lars":
        return LARS(lars_groups(modules), momentum=config.momentum, **common)
    return torch.optim.SGD(parameters, momentum=config.momentum, fused=True, **common)


_ENCODER_MEASURES = {
    "knn_200": ("k-NN, k=200", ".3f"),
    "knn_20": ("k-NN, k=20", ".3f"),
    "linear": ("linear", ".3f"),
}
# The built-in sets, for a few minutes on one CPU core.
_SMALL: dict[str, object] = {
    "encoder": "small",
    "encoder_channels": 16,
    "norm_splits": 4,
    "optimizer": "adam",
    "lr": 2e-3,
    "weight_decay": 1e-6,
    "batch_size": 128,
    "warmup_epochs": 5,
    "workers": 0,
    "log_every": 50,
    "sample_every": 500,
    "measure_every": 250,
    "checkpoint_every": 250,
}


class RepresentationSystem(LabelledSystem):
    """SimCLR, MoCo v2 and SupCon in the training loop."""

    config_class = RepresentationConfig
    model_class = Representation
    network = staticmethod(build_encoder)
    variants = {
        # The defaults are SimCLR's on CIFAR-10, and SupCon's are the same but for temperature and views (Khosla et al. 2020).
        "simclr": {"method": "simclr"},
        "supcon": {"method": "supcon", "temperature": 0.1, "views": "supcon"},
        # As in the CIFAR-10 demo of MoCo's authors.
        "moco": {
            "method": "moco",
            "temperature": 0.1,
            "encoder": "resnet18",
            "batch_size": 512,
            "lr": 0.06,
            "weight_decay": 5e-4,
            "epochs": 200,
            "warmup_epochs": 0,
        },
    }
    presets = {
        "digits": _SMALL
        | {"image_size": 16, "image_channels": 1, "views": "digits-crops", "steps": 1000},
        "photo-crops": _SMALL | {"steps": 150, "sample_every": 150, "measure_every": 50},
        # As published on ImageNet: SimCLR with batches of 4096 for 100 epochs, MoCo v2 for 200.
        "simclr-imagenet": {
            "stem": "imagenet",
            "image_size": 224,
            "views": "simclr",
            "temperature": 0.1,
            "optimizer": "lars",
            "lr": 4.8,
            "weight_decay": 1e-6,
            "batch_size": 4096,
            "epochs": 100,
            "workers": 16,
        },
        "moco-imagenet": {
            "encoder": "resnet50",
            "stem": "imagenet",
            "image_size": 224,
            "views": "moco-v2",
            "temperature": 0.2,
            "queue_size": 65536,
            "key_momentum": 0.999,
            "lr": 0.03,
            "weight_decay": 1e-4,
            "batch_size": 256,
            "epochs": 200,
            "warmup_epochs": 0,
            "workers": 16,
        },
    }
    ablations = {
        # The methods, and in SimCLR's place the families of losses before it.
        "simclr": Ablation(
            choices={
                "SimCLR": {},
                "MoCo v2": {"method": "moco", "temperature": 0.1},
                "SupCon": {"method": "supcon", "temperature": 0.1},
                "InfoNCE, one direction": {"loss": "info_nce"},
                "N-pair": {"loss": "n_pair"},
                "triplet": {"loss": "triplet"},
                "pair": {"loss": "pair"},
            },
            measures=_ENCODER_MEASURES,
            row="trained encoder",
        ),
        "moco": Ablation(
            choices={f"{2**n} negatives": {"queue_size": 2**n} for n in range(6, 17, 2)},
            measures=_ENCODER_MEASURES,
            row="trained encoder",
        ),
    }
    older = {"last_batch": "keep"}
    network_name = "encoder"
    panels = (("loss",), ("positive_cosine",))
    does = "write features of whole images"
    next_command = "fastnce features --run {run} --input DIR --out features.npz"
    reported = ("method",)
    output = "features"

    def called(self, config: RepresentationConfig) -> str:
        return config.method

    def settled(
        self, config: RepresentationConfig, before: RepresentationConfig | None
    ) -> RepresentationConfig:
        if config.last_batch == "auto":
            config = replace(config, last_batch="drop" if before is None else before.last_batch)
        return super().settled(config, before)

    def dataset(self, config: RepresentationConfig) -> TwoViews:
        from fastnce.data import VIEW_RECIPES, TwoViews

        options.one_of(config, "views", VIEW_RECIPES)
        drop = config.last_batch != "keep"
        images = images_of(config, "train")
        return TwoViews(images, config.views, batch_size=config.batch_size if drop else 1)

    def schedule(self, config: RepresentationConfig, epoch_samples: int) -> WarmupCosine:
        """To the end of the epochs, or for `steps`, where they are given: the cosine ends there."""
        total = config.steps or config.epochs * epoch_samples // config.batch_size
        warmup = config.warmup_epochs * epoch_samples // config.batch_size
        if total == 0:
            raise UserError(
                f"batch_size={config.batch_size} is larger than all epochs together, {epoch_samples} samples each. "
                "Use a smaller batch_size or more epochs."
            )
        if warmup >= total:
            raise UserError(
                f"warmup_epochs={config.warmup_epochs} takes {warmup} steps, but the run has {total}. "
                "Use fewer warmup_epochs, or more epochs or steps."
            )
        return WarmupCosine(
            total_steps=total,
            samples_per_step=config.batch_size,
            epoch_samples=epoch_samples,
            warmup_steps=warmup,
        )

    def preview(
        self, config: RepresentationConfig, dataset: TwoViews
    ) -> Callable[[nn.Module], Rows]:
        """A row for each class: a test image, then the training images whose features are nearest to its own.

        Without classes, rows of images spread over the test set; without test images, of training images, each its own nearest.
        """
        from fastnce.data.labelled import has_split
        from fastnce.metrics.probes import encode

        train = dataset.dataset
        test = images_of(config, "test") if has_split(config.data, "test") else train
        gallery = range(0, len(train), max(1, len(train) // _GRID_IMAGES))
        if test.num_classes > 1:
            # A class may have no test image.
            labels, first = np.unique(test.labels.numpy(), return_index=True)
            shown = zip(labels[:_GRID_CLASSES].tolist(), first.tolist(), strict=False)
            queries = {test.class_names[label]: index for label, index in shown}
        else:
            step = max(1, len(test) // _GRID_CLASSES)
            queries = {str(index): index for index in range(0, len(test), step)[:_GRID_CLASSES]}

        def rows(encoder: nn.Module) -> Rows:
            known = F.normalize(encode(encoder, train, gallery))
            asked = F.normalize(encode(encoder, test, list(queries.values())))
            count = min(config.sample_count, len(gallery))
            nearest = (asked @ known.T).topk(count).indices.tolist()
            return {
                name: [test.image(query), *(train.image(gallery[i]) for i in near)]
                for (name, query), near in zip(queries.items(), nearest, strict=True)
            }

        return rows

    def measure(self, config: RepresentationConfig, dataset: TwoViews) -> Measure | None:
        from fastnce.data.labelled import has_split
        from fastnce.metrics.probes import accuracy, encode, knn_predict

        train = dataset.dataset
        missing = "test images" if not has_split(config.data, "test") else "classes"
        if missing == "test images" or train.num_classes < 2:
            print(
                f"{config.data} has no {missing}: trained without measuring k-NN accuracy.",
                file=sys.stderr,
            )
            return None
        test = images_of(config, "test")

        def measure(model: nn.Module, encoder: nn.Module) -> dict[str, float]:
            predicted = knn_predict(encode(encoder, train), train.labels, encode(encoder, test))
            return {"knn/accuracy": accuracy(predicted, test.labels)}

        return measure

    def evaluate(
        self,
        config: RepresentationConfig,
        networks: Mapping[str, nn.Module],
        data: Path,
        device: torch.device,
    ) -> tuple[dict[str, Any], str]:
        """k-NN and linear accuracy of the encoder on the test images; beside it raw pixels and the encoder before its training."""
        from fastnce.data.labelled import has_split
        from fastnce.metrics.probes import (
            RANDOM_ENCODER,
            RAW_PIXELS,
            TRAINED_ENCODER,
            evaluate_encoders,
            format_encoder_table,
        )

        other = None if data == config.data else data
        train = images_of(config, "train", other)
        if train.num_classes < 2 or not has_split(data, "test"):
            missing = "classes" if train.num_classes < 2 else "test images"
            raise UserError(
                f"data={data} has no {missing} to measure accuracy with. Name a folder with train/CLASS and test/CLASS."
            )
        encoders = {
            TRAINED_ENCODER: networks["run"],
            RANDOM_ENCODER: random_encoder(config, train).to(device),
            RAW_PIXELS: nn.Flatten(),
        }
        result = evaluate_encoders(encoders, train, images_of(config, "test", other))
        return result, format_encoder_table(result)

    def graph_inputs(
        self, network: nn.Module, config: RepresentationConfig, channels: int, count: int
    ) -> dict[str, Tensor]:
        return {"image": random_images(count, channels, config.image_size, config.image_size)}


def images_of(config: RepresentationConfig, split: str, data: Path | None = None) -> LabelledImages:
    """The images of a split, as the encoder of `config` takes them; from its own folder or from `data`.

    Of its own folder the classes of the run; labels of another one are compared with each other only, whatever they are.
    """
    own = config if data is None else replace(config, class_names=())
    return images_with_labels(
        own, split, data or config.data, needs_labels=config.method == "supcon"
    )


def random_encoder(config: RepresentationConfig, train: LabelledImages) -> nn.Module:
    """The encoder before training, with the statistics of the training images in its batch norms."""
    from fastnce.metrics.probes import calibrate

    with rng_kept():
        torch.manual_seed(config.seed)
        encoder = build_encoder(config)
    return calibrate(encoder, train)


@torch.inference_mode()
def write_features(
    encoder: nn.Module,
    config: LabelledConfig,
    input: Path,
    out: Path,
    *,
    normalize: bool = False,
    batch_size: int = 64,
    broken_files: Literal["error", "skip"] | None = None,
) -> tuple[int, int]:
    """Writes an encoder's features of a folder of images, with their names.

    An image is cut to its central square and scaled to the size of the training. The file has the arrays "features" (N, F)
    float32 and "names" (N,), the files' names below `input`, sorted; a .safetensors file has "names" in its metadata, as JSON.

    Args:
        encoder: as `load_generator` gives it.
        config: the configuration of its run, with `image_size` and `image_channels`.
        input: folder of images, also in folders below it; or one image.
        out: file to write, .npz or .safetensors.
        normalize: Scale each image's features to length 1, as k-NN compares them.
        batch_size: Images at a time.
        broken_files: error: stop at a file that cannot be read; skip: leave it out and name it; by default as in training.

    Returns:
        N and F.

    Raises:
        UserError: no images, a broken one, another kind of file, or it cannot be written.
    """
    expect_arrays_file(out)
    device = next(encoder.parameters()).device
    names, parts = [], []
    for batch_names, batch in image_batches(config, input, batch_size, broken_files, "features"):
        names += batch_names
        parts.append(encoder(batch.to(device)).float().cpu())
    features = F.normalize(torch.cat(parts)) if normalize else torch.cat(parts)
    write_arrays(out, names, features=features)
    return features.shape[0], features.shape[1]


def expect_arrays_file(out: Path) -> None:
    """Raises `UserError` unless `write_arrays` can write a file of this name."""
    if Path(out).suffix not in (".npz", ".safetensors"):
        raise UserError(f"out={out}: expected a file that ends in .npz or .safetensors.")


def write_arrays(out: Path, names: Sequence[str], **arrays: Tensor) -> None:
    """Writes arrays that have a row for each of `names`, as .npz with "names", or .safetensors with these in the metadata."""
    if Path(out).suffix == ".npz":
        with atomic_path(out) as temporary:
            values = {name: array.numpy() for name, array in arrays.items()}
            np.savez(temporary, names=np.array(names), **values)
    else:
        data = import_safetensors().torch.save(arrays, metadata={"names": json.dumps(names)})
        with atomic_path(out) as temporary:
            temporary.write_bytes(data)


def import_safetensors() -> ModuleType:
    """The package; raises `UserError` where it is not installed."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise UserError(
            "safetensors files need the package safetensors. Install it with: pip install 'fastnce[train]'"
        ) from error
    return safetensors
