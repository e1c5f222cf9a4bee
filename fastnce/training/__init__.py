"""Training: configurations, the loop, checkpoints, and trained runs."""

from fastnce.systems import TrainConfig
from fastnce.systems.contragan import ContraGANConfig as ContraGANTrainConfig
from fastnce.systems.cut import CUTConfig as CUTTrainConfig
from fastnce.systems.translating import translate
from fastnce.training.config import build_config
from fastnce.training.evaluation import evaluate_run
from fastnce.training.export import export_published, export_shared
from fastnce.training.loop import Interrupted, train
from fastnce.training.runs import (
    Run,
    generate_folder,
    load_generator,
    translate_folder,
    write_features,
)
from fastnce.training.runtime import resolve_device

__all__ = [
    "CUTTrainConfig",
    "ContraGANTrainConfig",
    "Interrupted",
    "Run",
    "TrainConfig",
    "build_config",
    "evaluate_run",
    "export_published",
    "export_shared",
    "generate_folder",
    "load_generator",
    "resolve_device",
    "train",
    "translate",
    "translate_folder",
    "write_features",
]
