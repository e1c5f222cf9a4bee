"""Translation between two folders of images in both directions: CycleGAN, DCLGAN and SimDCL."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fastnce.data import UnpairedImages
from fastnce.models import DCLGAN, CycleGAN
from fastnce.models.two_way import TwoWayGenerators, TwoWayModel
from fastnce.training.config import CycleGANTrainConfig, DCLGANTrainConfig
from fastnce.training.system import Rows, System
from fastnce.training.translation import (
    expect_sizes_fit,
    first_test_images,
    fixed_size,
    linear_decay,
    translated,
    unpaired_images,
)
from fastnce.training.translation_evaluation import translation_measure

TwoWayTrainConfig = CycleGANTrainConfig | DCLGANTrainConfig


def _model(config: TwoWayTrainConfig, dataset: UnpairedImages) -> TwoWayModel:
    _, height, width = dataset[0]["A"].shape
    model_class = CycleGAN if isinstance(config, CycleGANTrainConfig) else DCLGAN
    model = model_class(config, (height, width))
    one_size, compared = fixed_size(config), ""
    if isinstance(config, DCLGANTrainConfig) and config.lambda_nce > 0:
        compared = "AB"
        if config.num_patches == 0:
            one_size = "num_patches=0 compares all positions of A and B at once"
    networks = {
        "generator from A to B": (model.generators.a_to_b, config.in_channels),
        "generator from B to A": (model.generators.b_to_a, config.out_channels),
        "discriminator of A": (model.discriminator_b, config.in_channels),
        "discriminator of B": (model.discriminator_a, config.out_channels),
    }
    expect_sizes_fit(config, dataset, networks, one_size=one_size, compared=compared)
    return model


def _both_directions(
    config: TwoWayTrainConfig, dataset: UnpairedImages
) -> Callable[[nn.Module], Rows]:
    images_a, images_b = (first_test_images(config, domain) for domain in "AB")

    def rows(generators: nn.Module) -> Rows:
        return {
            "A": images_a,
            "A to B": translated(generators.a_to_b, images_a),
            "B": images_b,
            "B to A": translated(generators.b_to_a, images_b),
        }

    return rows


def _system(panels: tuple[tuple[str, ...], ...], projectors: dict[str, str]) -> System:
    return System(
        dataset=unpaired_images,
        schedule=linear_decay,
        model=_model,
        network_name="generators",
        network=TwoWayGenerators,
        preview=_both_directions,
        next_command="fastnce translate --run {run} --input DIR --out DIR --direction BtoA",
        panels=panels,
        measure=translation_measure,
        best="fid",
        published={
            "G_A": "generators.a_to_b",
            "G_B": "generators.b_to_a",
            "D_A": "discriminator_a",
            "D_B": "discriminator_b",
        }
        | projectors,
    )


_ADVERSARIAL = (("G_A", "D_A"), ("G_B", "D_B"))
CYCLEGAN_SYSTEM = _system((*_ADVERSARIAL, ("cycle_A", "cycle_B", "idt_A", "idt_B"), ("G",)), {})
DCLGAN_SYSTEM = _system(
    (*_ADVERSARIAL, ("NCE1", "NCE2"), ("idt_A", "idt_B", "sim_A", "sim_B"), ("G",)),
    {"F1": "projector_a", "F2": "projector_b"},
)
