"""A system: the options of its training, and everything that the loop and the commands ask of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastnce.errors import UserError
from fastnce.systems import options
from fastnce.systems.schedule import Schedule

if TYPE_CHECKING:
    from PIL import Image

    from fastnce.data import LabelledImages

# The rows of a sample grid by their label; images (C, H, W) in [-1, 1] on the CPU.
Rows = dict[str, list[Tensor]]
# From the model and its averaged network to named numbers.
Measure = Callable[[nn.Module, nn.Module], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(options.Options):
    """Options that every system shares. A training needs `data` and `out`; a model alone, only what its networks are made of."""

    system: ClassVar[str]

    data: Path = Path()
    """Folder of the data."""
    out: Path = Path()
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
    """A file that cannot be read stops the training (error), or is named once and replaced by the next file; left out where
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
        super().__post_init__()
        options.at_least(self, 1, "batch_size", "log_every", "sample_every", "checkpoint_every")
        options.at_least(self, 1, "sample_count", "steps")
        options.at_least(self, 0, "workers", "seed", "measure_every", "keep_every", "ema_start")
        options.in_unit_interval(self, "ema_decay")

    @property
    def samples_per_step(self) -> int:
        """Samples of the training stream that one step takes."""
        return self.batch_size

    @property
    def folders(self) -> Path | dict[str, Path]:
        """Where the images are: one folder, or several by their names."""
        return self.data


class Ablation(NamedTuple):
    """Choices of one training to compare, and the numbers of its evaluation that are compared."""

    choices: Mapping[
        str, Mapping[str, object]
    ]  # option values; the others are held against the first, or as `against` says
    measures: Mapping[str, tuple[str, str]]  # name in the evaluation's rows -> (title, format)
    row: str  # name of the evaluation's row that holds the run's own numbers
    against: Mapping[str, str] = MappingProxyType({})  # choice -> another than the first
    beside: tuple[str, ...] = ()  # names of rows of the data's own numbers, the same in all runs
    preset: str = "digits"  # of the runs, if no other is asked for
    needs: Mapping[str, str] = MappingProxyType({})  # choice -> option without which it is left out
    longer: Mapping[str, float] = MappingProxyType({})  # choice -> how many times as many steps


class System:
    """One system: what the training loop, the registry and every command know of it.

    A system is a subclass with one instance in `fastnce.systems.SYSTEMS`. The configuration is handed to each method, so that an
    instance has no state.

    Attributes:
        config_class: the options; its `system` is the system's name.
        model_class: what is trained, made of the configuration (see `model`).
        network: makes of the configuration the network `network_name` alone, for trained weights.
        variants: what `fastnce train NAME` starts from: name -> the values that differ from the defaults.
        presets: further sets of values by name.
        ablations: what `fastnce ablate NAME` compares, by the name of the variant.
        older: options that are newer than some runs, with the values by which those were made.
        network_name: the model's attribute that is used after the training and whose weights are averaged.
        starts_averaged: whether `init_from` takes that attribute's averaged weights from a run.
        parts: networks that `init_from` starts, by their attributes' paths, where an attribute of the model holds several.
        panels: the losses that are plotted together, a tuple of names for each panel.
        best: the measurement that is smallest for the best checkpoint.
        does: what the network is for, such as "translate images".
        next_command: what to do with a finished run, named by `{run}`.
        paired: whether it learns from pairs of images.
        published: where the published repository has weights files for this system, the model's networks in them: the name in
            the file's name to the attribute's path, the generator first.
        published_keys: of systems whose published program writes one file: entries by which it is known. See `read_published`.
        compared: where a loss compares patches of an image with those of its translation, what encodes each of the two: the part of
            the network, the attribute of the projector behind it, the option that says how many channels it sees.
        compares_best: whether an evaluation has a row for the best checkpoint too.
        judged_by: the settings of `fastnce evaluate` that are for this system.
        reported: options that stand in the report of an evaluation.
        reports_cost: whether what the training cost stands there too.
        output: the name of the network's output in an exported graph.
        any_size: whether the network takes images of any height and width.
    """

    config_class: type[TrainConfig]
    model_class: Callable[..., nn.Module]
    network: Callable[..., nn.Module]
    variants: Mapping[str, Mapping[str, object]]
    presets: Mapping[str, Mapping[str, object]] = {}
    ablations: Mapping[str, Ablation] = {}
    older: Mapping[str, object] = {}
    network_name: str
    starts_averaged: bool = False
    parts: tuple[str, ...] = ()
    panels: tuple[tuple[str, ...], ...]
    best: str | None = None
    next_command: str
    does: str = ""
    paired: bool = False
    published: Mapping[str, str] = {}
    published_keys: frozenset[str] = frozenset()
    compared: tuple[tuple[str, str, str], ...] = ()
    compares_best: bool = False
    judged_by: frozenset[str] = frozenset()
    reported: tuple[str, ...] = ()
    reports_cost: bool = False
    output: str = "output"
    any_size: bool = False

    @property
    def name(self) -> str:
        return self.config_class.system

    def settled(self, config: TrainConfig, before: TrainConfig | None) -> TrainConfig:
        """`config` with what a run decides when it begins: as in the run `before` that it continues, or anew if that is None."""
        return config

    def of_data(self, config: TrainConfig, dataset: Dataset) -> TrainConfig:
        """`config` with what only the data tells, such as the names of its classes."""
        return config

    def folders_read(self, config: TrainConfig) -> Sequence[Path]:
        """The folders that a training may read images from."""
        return [config.data]

    def dataset(self, config: TrainConfig) -> Dataset:
        """The training stream: sample i, for any i >= 0, is a pure function of the configuration and i; `len` is the number of
        samples in an epoch."""
        raise NotImplementedError

    def schedule(self, config: TrainConfig, epoch_samples: int) -> Schedule:
        """How long the training is, and the learning rate in it."""
        if config.steps is None:
            raise UserError("steps is missing. Give the number of steps to train.")
        return Schedule(
            total_steps=config.steps,
            samples_per_step=config.samples_per_step,
            epoch_samples=epoch_samples,
        )

    def model(self, config: TrainConfig, dataset: Dataset) -> nn.Module:
        """A module with `optimizers` by name and `training_step(batch) -> {name: scalar}`."""
        return self.model_class(config)

    def preview(self, config: TrainConfig, dataset: Dataset) -> Callable[[nn.Module], Rows]:
        """A function from the network to the rows of a sample grid."""
        raise NotImplementedError

    def measure(self, config: TrainConfig, dataset: Dataset) -> Measure | None:
        """The measurements made every `measure_every` steps; it may draw random numbers and change modes. None: nothing."""
        return None

    def evaluate(
        self,
        config: TrainConfig,
        networks: Mapping[str, nn.Module],
        data: Path | Mapping[str, Path],
        device: torch.device,
        **settings: Any,
    ) -> tuple[dict[str, Any], str]:
        """How good trained networks are, beside baselines: the result, and its table.

        `networks`, on `device`, are "run", and "best" and "without_nce" where the caller has them. `data` is the folder of the
        data, or the folders by their names. `settings` are those of `judged_by` that were given.
        """
        raise UserError(f"a run of {self.name} has no evaluation.")

    def translate_folder(
        self, network: nn.Module, config: TrainConfig, input: Path, out: Path, **how: Any
    ) -> int:
        """Translates the files of a folder with a trained network; the number of results.

        `how` are the options of `fastnce translate`; `UserError` names one that is not for this system.
        """
        raise NotImplementedError

    def generate_folder(
        self, network: nn.Module, config: TrainConfig, out: Path, **how: Any
    ) -> int:
        """Writes images of a trained generator into a folder; their number.

        `how` are the options of `fastnce generate`; `UserError` names one that is not for this system.
        """
        raise NotImplementedError

    def read_published(self, path: Path) -> tuple[TrainConfig, dict[str, Tensor]]:
        """The configuration and the weights of the network in a file that has `published_keys`."""
        raise NotImplementedError

    def start_from_published(self, model: nn.Module, path: Path) -> list[str]:
        """Starts a model from such a file; a line for each network."""
        raise NotImplementedError

    def save_published(self, network: nn.Module, config: TrainConfig, path: Path) -> None:
        """Writes such a file."""
        raise UserError(
            f"a run of {self.name} has no published layout of files. Use format=safetensors."
        )

    def known_options(
        self, function: Callable[..., Any], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Those of a command's options that `function` takes; `UserError` if another one is given."""
        taken = inspect.signature(function).parameters
        for name, value in options.items():
            if name not in taken and value not in (None, ()):
                raise UserError(f"{name}={value} is not for a run of {self.name}. Leave it out.")
        return {name: value for name, value in options.items() if name in taken}

    def in_direction(
        self, network: nn.Module, config: TrainConfig, direction: str | None
    ) -> tuple[nn.Module, int]:
        """The part of a network that works in a direction, "AtoB" or "BtoA", and the channels of its input."""
        if direction is not None:
            raise UserError(f"direction={direction}: a run of {self.name} has none. Leave it out.")
        return network, getattr(config, "image_channels", 3)

    def graph_inputs(
        self, network: nn.Module, config: TrainConfig, channels: int, count: int
    ) -> dict[str, Tensor]:
        """Random inputs of the network by their names, `count` of them; where sizes are free, in a size of their own."""
        raise UserError(f"a run of {self.name} has no graph to export.")

    def expect_to(self, what: str, config: TrainConfig) -> None:
        """Raises `UserError`, with the command that runs of this system are for, unless that is `what`."""
        if self.does != what:
            command = self.next_command.format(run=config.out)
            raise UserError(
                f"a run of {self.called(config)} does not {what}. What to do with it: {command}"
            )

    def called(self, config: TrainConfig) -> str:
        """A reader's name for a run of this configuration."""
        return self.name


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(TrainConfig):
    """Options of the systems that train on images with class labels."""

    class_names: tuple[str, ...] = ()
    """Classes to train on, in the order of their labels; by default all that the data has, sorted. A run keeps its own: a class
    that the data gets later is left out."""
    class_balance: bool = False
    """Draw every class equally often, however many images it has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.class_names:  # `generate` makes folders of them
            if Path(name).name != name or name == "..":
                raise UserError(f"class_names={name!r} is no name of a folder. Use one without /.")

    def with_class_names(self, names: tuple[str, ...]) -> Self:
        """The configuration of a run on these classes."""
        return replace(self, class_names=names)


class LabelledSystem(System):
    """A system that trains on images with class labels."""

    def settled(self, config: LabelledConfig, before: LabelledConfig | None) -> LabelledConfig:
        if before is not None and not config.class_names:
            return config.with_class_names(before.class_names)
        return config

    def of_data(self, config: LabelledConfig, dataset: Dataset) -> LabelledConfig:
        return config.with_class_names(dataset.class_names)

    def folders_read(self, config: LabelledConfig) -> Sequence[Path]:
        from fastnce.data.labelled import folders_read

        return folders_read(config.data)


def images_with_labels(
    config: Any, split: str, root: Path, *, flip: bool = False, needs_labels: bool, **how: Any
) -> LabelledImages:
    """The images of a split of `root`, of the classes and as large as a `LabelledConfig` says.

    `how` are arguments of `LabelledImages` that differ.
    """
    from fastnce.data import LabelledImages
    from fastnce.data.labelled import NO_CLASSES

    values = {
        "image_size": config.image_size,
        "channels": config.image_channels,
        "flip": flip,
        "seed": config.seed,
        "classes": () if config.class_names == NO_CLASSES else config.class_names,
        "needs_labels": needs_labels,
        "class_balance": config.class_balance and split == "train",
        "broken_files": config.broken_files,
    }
    return LabelledImages(root, split, **(values | how))


def image_batches(
    config: Any,
    input: Path,
    batch_size: int,
    broken_files: Literal["error", "skip"] | None,
    task: str,
    fit: Callable[[Image.Image, Path], Image.Image] | None = None,
) -> Iterator[tuple[list[str], Tensor]]:
    """The images of a folder, and of the folders in it, or one image, in batches.

    `fit` gives an image the size that a network takes; by default its central square is scaled to the configuration's `image_size`.

    Yields:
        The names below `input`, sorted over all batches, and the images (B, C, S, S) in [-1, 1].

    Raises:
        UserError: no images, a batch below 1, or a file that cannot be read and is not skipped.
    """
    from tqdm import tqdm

    from fastnce.data import list_images
    from fastnce.data.broken import readable
    from fastnce.data.images import read_image, to_array, to_tensor
    from fastnce.data.labelled import to_square

    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is too small. Use batch_size >= 1.")
    input = Path(input)
    folder, paths = (input.parent, [input]) if input.is_file() else (input, list_images(input))

    def read(path: Path) -> Tensor:
        image = read_image(path, config.image_channels)
        fitted = fit(image, path) if fit else to_square(image, config.image_size)
        return to_tensor(to_array(fitted))

    names: list[str] = []
    batch: list[Tensor] = []
    shown = tqdm(paths, desc=task, unit="image", disable=None)
    skip = (broken_files or config.broken_files) == "skip"
    for path, image in readable(shown, read, skip=skip):
        names.append(path.relative_to(folder).as_posix())
        batch.append(image)
        if len(batch) == batch_size:
            yield names, torch.stack(batch)
            names, batch = [], []
    if batch:
        yield names, torch.stack(batch)


def autocast(model: nn.Module) -> AbstractContextManager:
    """The precision in which a model's networks run, by its configuration.

    A new context each time: autocast caches the weights it casts, and a copy that was made while a network was frozen must
    not serve a pass that needs gradients.
    """
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=model.config.precision == "bf16")


def rng_kept() -> AbstractContextManager:
    """Context whose random numbers leave no trace in torch's generators."""
    return torch.random.fork_rng(range(torch.cuda.device_count()))


def random_images(count: int, channels: int, height: int, width: int) -> Tensor:
    """(count, channels, height, width) in [-1, 1], drawn with the seed `count`."""
    random = torch.Generator().manual_seed(count)
    return torch.rand(count, channels, height, width, generator=random) * 2 - 1
