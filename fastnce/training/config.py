"""The options of a training run: frozen dataclasses whose fields are the command line's options."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

from fastnce.data.images import check_value_range
from fastnce.data.labelled import NO_CLASSES
from fastnce.data.views import VIEW_RECIPES
from fastnce.errors import UserError
from fastnce.models import (
    ContraGANConfig,
    CUTConfig,
    CycleGANConfig,
    DCLGANConfig,
    Pix2PixConfig,
    RepresentationConfig,
    options,
)

# Fields that change how a run is carried out or watched, not what it computes: a resumed run may change them.
FREE_FIELDS = frozenset(
    {
        "out",
        "device",
        "workers",
        "deterministic",
        "log_every",
        "sample_every",
        "sample_count",
        "measure_every",
        "measure_count",
        "checkpoint_every",
        "keep_every",
        "test_a",
        "test_b",
        "extractor",
        "cache_gb",
        "broken_files",
    }
)
# Where the training images are: a resumed run may find them elsewhere, if they are the same files.
DATA_FIELDS = frozenset({"data", "data_a", "data_b"})
# Fields that a resumed run may change as long as the steps already made stay what they were.
SCHEDULE_FIELDS = frozenset({"epochs", "decay_epochs", "warmup_epochs", "steps"})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options that every system shares."""

    system: ClassVar[str]

    data: Path
    """Folder of the data."""
    out: Path
    """Folder of the run; created. A run that is there already is continued."""
    init_from: Path | None = None
    """Weights to start from. The folder of a run, of any system, or one of its checkpoints: each network that fits. Or of a
    published repository: the folder of latest_net_G.pth and its like, or FOLDER/EPOCH for EPOCH_net_G.pth."""
    seed: int = 0
    """Seed of the initialisation, the data order and everything else that is drawn."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    deterministic: bool = False
    """On a GPU: only deterministic algorithms, which may be slower. On a CPU runs are always repeatable."""
    batch_size: int = 1
    """Images per step."""
    workers: int = 2
    """Processes that read images; 0 reads in the training process. The run is the same with any number."""
    broken_files: Literal["error", "skip"] = "error"
    """What a file that cannot be read does: stop the training, or be named once and replaced by the next file; left out where
    images are measured."""
    steps: int | None = None
    """Stop after this many steps."""
    ema_decay: float = 0.999
    """Decay of the running average of the weights; 0 keeps the last weights."""
    ema_start: int | None = None
    """First step of the average, which copies the weights until then; by default it starts at once, corrected for its start."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl; a line holds the means over these steps."""
    sample_every: int = 500
    """Steps between two sample grids."""
    sample_count: int = 8
    """Images in a row of a sample grid."""
    measure_every: int = 0
    """Steps between two lines of measurements.jsonl, for systems that measure while they train; 0: never."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    keep_every: int = 0
    """Steps between two checkpoints that are kept, as checkpoints/step_XXXXXX.pt; 0: only the last two and the best are."""

    def __post_init__(self) -> None:
        options.at_least(self, 1, "batch_size", "log_every", "sample_every", "checkpoint_every")
        options.at_least(self, 1, "sample_count")
        options.at_least(self, 0, "workers", "seed", "measure_every", "keep_every")
        options.in_unit_interval(self, "ema_decay")
        options.one_of(self, "broken_files", ("error", "skip"))
        if self.steps is not None:
            options.at_least(self, 1, "steps")
        if self.ema_start is not None:
            options.at_least(self, 0, "ema_start")

    @property
    def samples_per_step(self) -> int:
        """Samples of the training stream that one step takes."""
        return self.batch_size


@dataclass(frozen=True, kw_only=True)
class UnpairedTrainConfig(TrainConfig):
    """Options of the systems that translate between two folders of images."""

    data: Path | None = None
    """Folder with trainA and trainB, and testA and testB for the sample grids; required, or data_a and data_b."""
    data_a: Path | None = None
    """Instead of data, with data_b: folder of the training images of A, wherever it is."""
    data_b: Path | None = None
    """Folder of the training images of B."""
    test_a: Path | None = None
    """With data_a and data_b: folder of the test images of A; without it, sample grids show training images."""
    test_b: Path | None = None
    """Folder of the test images of B, to go with test_a."""
    batch_size: int = 1
    """Images of each domain per step."""
    epochs: int = 200
    """Epochs at the full learning rate."""
    decay_epochs: int = 200
    """Further epochs in which the learning rate falls linearly towards 0."""
    steps: int | None = None
    """Stop after this many steps; by default after epochs + decay_epochs."""
    load_size: int = 286
    """Images are scaled to this size before the crop; in the decay epochs to crop_size."""
    crop_size: int = 256
    """Size of the random crop."""
    preprocess: str = "resize_and_crop"
    """Steps before the network, joined by _and_: resize, fixsize, scale_width, scale_shortside, zoom, crop, patch, trim or none."""
    bits: Literal[8, 16] = 8
    """Bits of a channel that are read and written; 16 for greyscale images only."""
    value_range: tuple[float, float] | None = None
    """LOW HIGH: the files' numbers that stand for black and white, where they are not of 8 bits or use all of 16; results are
    written in these numbers."""
    flip: bool = True
    """Mirror each training image with probability 1/2."""
    augment_a: Literal["none", "affine"] = "none"
    """affine: turn, scale and shift the images of A slightly."""
    direction: Literal["AtoB", "BtoA"] = "AtoB"
    """Which domain is translated to which."""
    serial: bool = False
    """Read both folders in order instead of shuffling A and drawing from B."""
    cache_gb: float = 2.0
    """Memory for decoded images in GiB, shared out among the workers."""
    extractor: Path | None = None
    """TorchScript file, or torch-fidelity, whose features measure the translations (FID and others); a digits-photos set has
    its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.at_least(self, 0, "cache_gb")
        options.one_of(self, "bits", (8, 16))
        check_value_range(self.value_range)
        options.at_least(self, 1, "load_size", "crop_size")
        options.at_least(self, 0, "epochs", "decay_epochs")
        options.one_of(self, "augment_a", ("none", "affine"))
        options.one_of(self, "direction", ("AtoB", "BtoA"))
        self._check_folders()
        if self.epochs + self.decay_epochs == 0:
            raise UserError("epochs=0 and decay_epochs=0 leave nothing to train. Use epochs >= 1.")

    def _check_folders(self) -> None:
        apart = {
            name: getattr(self, name)
            for name in ("data_a", "data_b", "test_a", "test_b")
            if getattr(self, name) is not None
        }
        if self.data is not None and apart:
            name, folder = next(iter(apart.items()))
            raise UserError(
                f"data={self.data} holds all folders, and {name}={folder} names one of them. Give data, or data_a and data_b."
            )
        needed = ["data_a", "data_b"] if apart else []
        if {"test_a", "test_b"} & apart.keys():
            needed += ["test_a", "test_b"]
        for name in needed:
            if name not in apart:
                raise UserError(f"{name} is missing beside {', '.join(apart)}. Give both folders.")

    @property
    def folders(self) -> Path | dict[str, Path]:
        """Where the images are: the folder with trainA and the like, or these by name where each was named.

        Raises:
            UserError: none was named.
        """
        if self.data is not None:
            return self.data
        named = {
            "trainA": self.data_a,
            "trainB": self.data_b,
            "testA": self.test_a,
            "testB": self.test_b,
        }
        found = {name: folder for name, folder in named.items() if folder is not None}
        if not found:
            raise UserError("data is missing. Give data, or data_a and data_b.")
        return found


@dataclass(frozen=True, kw_only=True)
class CUTTrainConfig(CUTConfig, UnpairedTrainConfig):
    """Training of CUT, FastCUT or SinCUT."""

    system: ClassVar[str] = "cut"

    dataset: Literal["folders", "single-image"] = "folders"
    """single-image: train on patches of crop_size of the one image in trainA and the one in trainB, at random zooms, whatever load_size and preprocess say."""
    max_zoom_out: float = 3.0
    """single-image: by how much the image is shrunk at most before a patch is cut out of it."""
    epoch_samples: int = 100_000
    """single-image: patches in an epoch."""

    def __post_init__(self) -> None:
        UnpairedTrainConfig.__post_init__(self)
        CUTConfig.__post_init__(self)
        options.one_of(self, "dataset", ("folders", "single-image"))
        options.at_least(self, 1, "max_zoom_out", "epoch_samples")


@dataclass(frozen=True, kw_only=True)
class DCLGANTrainConfig(DCLGANConfig, UnpairedTrainConfig):
    """Training of DCLGAN or SimDCL."""

    system: ClassVar[str] = "dclgan"

    def __post_init__(self) -> None:
        UnpairedTrainConfig.__post_init__(self)
        DCLGANConfig.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class CycleGANTrainConfig(CycleGANConfig, UnpairedTrainConfig):
    """Training of CycleGAN."""

    system: ClassVar[str] = "cyclegan"

    epochs: int = 100
    """Epochs at the full learning rate."""
    decay_epochs: int = 100
    """Further epochs in which the learning rate falls linearly towards 0."""

    def __post_init__(self) -> None:
        UnpairedTrainConfig.__post_init__(self)
        CycleGANConfig.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class Pix2PixTrainConfig(Pix2PixConfig, UnpairedTrainConfig):
    """Training of pix2pix. The options are those of unpaired images, although the images are pairs."""

    system: ClassVar[str] = "pix2pix"

    data: Path | None = None
    """Folder with train, each of its images A and B side by side, or with trainA and trainB and equal names in both; and test
    or testA and testB for the sample grids."""
    batch_size: int = 1
    """Pairs per step."""
    epochs: int = 100
    """Epochs at the full learning rate."""
    decay_epochs: int = 100
    """Further epochs in which the learning rate falls linearly towards 0."""
    load_size: int = 286
    """Images are scaled to this size before the crop."""
    flip: bool = True
    """Mirror each pair with probability 1/2."""
    augment_a: Literal["none"] = "none"
    """Only none: the images of a pair would no longer fit."""

    def __post_init__(self) -> None:
        UnpairedTrainConfig.__post_init__(self)
        Pix2PixConfig.__post_init__(self)
        options.one_of(self, "augment_a", ("none",))


@dataclass(frozen=True, kw_only=True)
class LabelledTrainConfig(TrainConfig):
    """Options of the systems that train on images with class labels."""

    class_names: tuple[str, ...] = ()
    """Classes to train on, in the order of their labels; by default all that the data has, sorted. A run keeps its own: a class
    that the data gets later is left out."""
    class_balance: bool = False
    """Draw every class equally often, however many images it has."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        for name in self.class_names:  # `generate` makes folders of them
            if Path(name).name != name or name == "..":
                raise UserError(f"class_names={name!r} is no name of a folder. Use one without /.")

    def with_class_names(self, names: tuple[str, ...]) -> Self:
        """The configuration of a run on these classes."""
        return replace(self, class_names=names)


@dataclass(frozen=True, kw_only=True)
class ContraGANTrainConfig(ContraGANConfig, LabelledTrainConfig):
    """Training of ContraGAN, or of a GAN with another conditioning on the same networks."""

    system: ClassVar[str] = "contragan"

    data: Path
    """Folder of labelled images: train/CLASS/*.png and test/CLASS/*.png, CIFAR or Tiny ImageNet as distributed. With
    conditioning=none also train/*.png, or a folder of images."""
    batch_size: int = 64
    """Images per update of a network."""
    steps: int = 100_000
    """Steps, each of `d_steps` updates of D and one of G."""
    flip: bool = True
    """Mirror each training image with probability 1/2."""
    ema_decay: float = 0.9999
    """Decay of the running average of the generator's weights; 0 keeps the last weights."""
    ema_start: int | None = 1000
    """First step of the average, which copies the weights until then; None: it starts at once, corrected for its start."""
    sample_count: int = 10
    """Images of each class in a sample grid."""
    measure_count: int = 10_000
    """Real test images, and as many samples, in a measurement; all if there are fewer."""
    extractor: Path | None = None
    """TorchScript file whose features measure the samples (FID and others); the digits set has its own."""

    def __post_init__(self) -> None:
        LabelledTrainConfig.__post_init__(self)
        ContraGANConfig.__post_init__(self)
        options.at_least(self, 2, "measure_count")
        if self.micro_batches > self.batch_size:
            raise UserError(
                f"micro_batches={self.micro_batches} are more parts than batch_size={self.batch_size} has images. "
                f"Use micro_batches <= {self.batch_size}."
            )

    @property
    def samples_per_step(self) -> int:
        return self.batch_size * self.d_steps

    def with_class_names(self, names: tuple[str, ...]) -> Self:
        return replace(
            self,
            class_names=names,
            num_classes=1 if names == NO_CLASSES else self.num_classes,
        )


@dataclass(frozen=True, kw_only=True)
class RepresentationTrainConfig(RepresentationConfig, LabelledTrainConfig):
    """Training of an encoder with SimCLR, MoCo v2 or SupCon."""

    system: ClassVar[str] = "representation"

    data: Path
    """Folder of labelled images: train/CLASS/*.png and test/CLASS/*.png, CIFAR or Tiny ImageNet as distributed. Only supcon
    learns from the labels; the others are measured with them, and take images without: train/*.png, or a folder of images."""
    image_size: int = 32
    """Height and width of the images and of their views."""
    views: str = "simclr-cifar"
    """How the two views of an image are made: simclr, moco-v2, simclr-cifar, supcon, digits or digits-crops."""
    batch_size: int = 1024
    """Images per step, each with two views."""
    last_batch: Literal["auto", "drop", "keep"] = "auto"
    """What becomes of the images of an epoch that fill no whole batch. drop: they are left out, others in each epoch; keep: they
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
        LabelledTrainConfig.__post_init__(self)
        RepresentationConfig.__post_init__(self)
        options.at_least(self, 1, "image_size", "epochs")
        options.at_least(self, 0, "warmup_epochs")
        options.one_of(self, "views", VIEW_RECIPES)
        options.one_of(self, "last_batch", ("auto", "drop", "keep"))
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


CONFIGS: dict[str, type[TrainConfig]] = {
    "cut": CUTTrainConfig,
    "dclgan": DCLGANTrainConfig,
    "cyclegan": CycleGANTrainConfig,
    "pix2pix": Pix2PixTrainConfig,
    "contragan": ContraGANTrainConfig,
    "representation": RepresentationTrainConfig,
}


def to_dict(config: TrainConfig) -> dict[str, object]:
    """The configuration as JSON values, with its system's name first."""
    values: dict[str, object] = {"system": config.system}
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = list(value)
        values[field.name] = value
    return values


def settled(config: TrainConfig, before: TrainConfig | None) -> TrainConfig:
    """`config` with what a run decides when it begins: as in the run `before` that it continues, or anew if that is None."""
    if isinstance(config, RepresentationTrainConfig) and config.last_batch == "auto":
        decided = "drop"
        if isinstance(before, RepresentationTrainConfig):
            decided = before.last_batch
        config = replace(config, last_batch=decided)
    if (
        isinstance(config, LabelledTrainConfig)
        and isinstance(before, LabelledTrainConfig)
        and not config.class_names
    ):
        config = config.with_class_names(before.class_names)
    return config


def differing_fields(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Names of the fields of two `to_dict` results that differ and change what a run computes."""
    names = [*one, *(name for name in other if name not in one)]
    return [
        name
        for name in names
        if name not in FREE_FIELDS
        and name not in SCHEDULE_FIELDS
        and one.get(name) != other.get(name)
    ]
