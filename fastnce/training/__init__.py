"""Training: configurations, the loop, checkpoints, and trained generators."""

from fastnce.training.build import build_config
from fastnce.training.config import ContraGANTrainConfig, CUTTrainConfig, TrainConfig
from fastnce.training.evaluation import evaluate_run
from fastnce.training.export import export_published, export_shared
from fastnce.training.generate import generate_folder
from fastnce.training.loop import Interrupted, train
from fastnce.training.representation import write_features
from fastnce.training.runtime import resolve_device
from fastnce.training.translate import load_config, load_generator, translate
from fastnce.training.translate_files import translate_folder

__all__ = [
    "CUTTrainConfig",
    "ContraGANTrainConfig",
    "Interrupted",
    "TrainConfig",
    "build_config",
    "evaluate_run",
    "export_published",
    "export_shared",
    "generate_folder",
    "load_config",
    "load_generator",
    "resolve_device",
    "train",
    "translate",
    "translate_folder",
    "write_features",
]
