"""CUT's training step against a plain transcription of its equations, with every term."""

from dataclasses import replace

import pytest
import torch
from transcriptions import FAST, TINY, CUTSteps, batches, check_steps, draw_ids, make

from fastnce.models import CUT, CUTConfig

PATCHES = {"num_patches": 6, "nce_layers": (4, 8, 12)}
SINCUT = {"num_patches": 1, "negatives": "batch", "gan_mode": "nonsaturating"}
SINCUT |= {"lambda_nce": 4.0, "lambda_r1": 1.0, "lambda_identity": 1.0}
CASES = {
    "cut": (TINY, {}),
    "cut, all images' negatives": (TINY, {"negatives": "batch"}),
    "fastcut": (FAST, {}),
    "fastcut, all images' negatives": (FAST, {"negatives": "batch"}),
    "no anti-aliasing": (TINY, {"antialias": False, "nce_layers": (0, 4, 6, 10, 12)}),
    "grey to RGB": (TINY, {"in_channels": 1}),
    "RGB to grey": (TINY, {"out_channels": 1}),
    "grey to RGB, fastcut": (FAST, {"in_channels": 1}),
    "RGB to grey, fastcut": (FAST, {"out_channels": 1}),
    "grey": (TINY, {"in_channels": 1, "out_channels": 1}),
    "vanilla": (TINY, {"gan_mode": "vanilla"}),
    "non-saturating, R1": (TINY, {"gan_mode": "nonsaturating", "lambda_r1": 2.0}),
    "hinge": (TINY, {"gan_mode": "hinge", "lambda_gan": 0.5}),
    "wgangp": (TINY, {"gan_mode": "wgangp", "lambda_gp": 3.0}),
    "wgangp, R1": (TINY, {"gan_mode": "wgangp", "lambda_r1": 0.7}),
    "identity": (TINY, {"lambda_identity": 2.0}),
    "identity, fastcut": (FAST, {"lambda_identity": 2.0}),
    "identity, no contrast": (TINY, {"lambda_nce": 0.0, "lambda_identity": 2.0}),
    "no projector": (TINY, {"projector": "none"}),
    "all positions": (TINY, {"num_patches": 0, "nce_layers": (12, 14)}),
    # Smaller than what a step brings, no multiple of it, and so large that random keys stay to the end.
    "short queue": (TINY, PATCHES | {"negatives": "queue", "queue_size": 7}),
    "queue": (TINY, PATCHES | {"negatives": "queue", "queue_size": 17}),
    "queue beside the image": (FAST, PATCHES | {"negatives": "image+queue", "queue_size": 50}),
    "queue of features": (
        TINY,
        PATCHES | {"negatives": "image+queue", "queue_size": 17, "projector": "none"},
    ),
    "floor under norms": (TINY, {"norm_floor": 0.3}),
    "floor under norms, all images' negatives": (FAST, {"norm_floor": 0.3, "negatives": "batch"}),
    "as in SinCUT": (TINY, SINCUT),
}


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("case", CASES)
def test_three_steps_follow_the_equations(case, backend):
    """The second of them mirrored."""
    config, changes = CASES[case]
    config = replace(config, **changes, backend=backend)
    model = make(config)
    ids = draw_ids(model, 2)
    steps = [
        (batch, {"flip": step == 1, "patch_ids": ids})
        for step, batch in enumerate(batches(3, config))
    ]
    check_steps(model, CUTSteps(model, config.norm_floor), steps)


def distances_at_the_published_initialisation(
    floor: float, steps: int, **options: float
) -> list[dict[str, float]]:
    """A step at a time: how far losses and gradients are from the equations in fp64, relative to their size.

    Of a gradient it is what exceeds twice the error of the plain transcription in fp32: at these small weights the gradients of
    some biases of F are sums that cancel to a thousandth.
    """
    torch.manual_seed(0)
    config = CUTConfig(
        base_channels=16, disc_channels=16, num_patches=64, projection_dim=64, **options
    )
    model = CUT(config, (64, 64))
    plain, exact = CUTSteps(model, floor), CUTSteps(model, floor)
    exact.networks.double()
    found = []
    for step, batch in enumerate(batches(steps, config, torch.float32, size=1, side=(64, 64))):
        ids = draw_ids(model, step, (64, 64))
        # Else Adam turns rounding into steps: its first ones are signs.
        plain.copy_state(model)
        exact.copy_state(model)
        losses = model.training_step(batch, patch_ids=ids)
        plain.step(batch, ids, False)
        expected = exact.step({name: x.double() for name, x in batch.items()}, ids, False)
        distances = {
            name: ((losses[name] - value).abs() / value.abs()).item()
            for name, value in expected.items()
            if value.abs() > 1e-6  # D_fake begins at 1e-9
        }
        of_plain, of_exact = plain.gradient_pairs(model), exact.gradient_pairs(model)
        for name, (one, truth) in of_exact.items():
            rounding = (of_plain[name][1] - truth).norm()
            # A bias in front of a norm has no gradient but rounding: its layer's weight gives the scale.
            scale = max(truth.norm(), of_exact[name.replace("bias", "weight")][1].norm())
            distances[name] = (((one - truth).norm() - 2 * rounding).clamp(min=0) / scale).item()
        found.append(distances)
    return found


@pytest.mark.parametrize("norm_floor", [0.0, 1e-7])
def test_three_steps_in_fp32_at_the_published_initialisation(norm_floor):
    for distances in distances_at_the_published_initialisation(
        norm_floor, steps=3, norm_floor=norm_floor
    ):
        assert max(distances.values()) < 1e-4, max(distances, key=distances.get)


def test_the_published_floor_under_norms_matters_in_the_first_step_only():
    """The published code adds 1e-7 to the norm of a patch; with its initialisation the first projections are not much longer."""
    first, second = distances_at_the_published_initialisation(1e-7, steps=2)
    assert 1e-3 < first["NCE"] < 0.03
    assert max(second[name] for name in ("G_GAN", "NCE", "NCE_Y", "G", "D_real")) < 1e-4
