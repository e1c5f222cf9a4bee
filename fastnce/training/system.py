"""What the training loop needs to know about a system."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils.data import Dataset

from fastnce.training.config import TrainConfig
from fastnce.training.schedule import Schedule

# The rows of a sample grid by their label; images (C, H, W) in [-1, 1] on the CPU.
Rows = dict[str, list[Tensor]]
# From the model and its averaged network to named numbers.
Measure = Callable[[nn.Module, nn.Module], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class System:
    """One system.

    Attributes:
        dataset: the training stream: sample i, for any i >= 0, is a pure function of the configuration and i, and
            `len` is the number of samples in an epoch.
        schedule: from the configuration and the number of samples in an epoch.
        model: from the configuration and the dataset, a module with `optimizers` (by name) and
            `training_step(batch) -> {name: scalar}`.
        network_name: the model's attribute that is used after the training and whose weights are averaged.
        network: that network alone, for trained weights.
        preview: from the configuration and the dataset, a function from a network to the rows of a sample grid.
        panels: the losses that are plotted together, a tuple of names for each panel.
        measure: from the configuration and the dataset, what to measure every `measure_every` steps; it may draw random
            numbers and change modes. None, also as its result: nothing.
        best: the measurement that is smallest for the best checkpoint.
        next_command: what to do with a finished run, named by `{run}`.
        published: where the published repository has weights files for this system, the model's networks in them: the name in
            the file's name to the attribute's path, the generator first. The configuration then has `init_from`.
    """

    dataset: Callable[[TrainConfig], Dataset]
    schedule: Callable[[TrainConfig, int], Schedule]
    model: Callable[[TrainConfig, Dataset], nn.Module]
    network_name: str
    network: Callable[[TrainConfig], nn.Module]
    preview: Callable[[TrainConfig, Dataset], Callable[[nn.Module], Rows]]
    panels: tuple[tuple[str, ...], ...]
    measure: Callable[[TrainConfig, Dataset], Measure | None] | None = None
    best: str | None = None
    next_command: str
    published: Mapping[str, str] = field(default_factory=dict)
