"""CUT's training step against a plain transcription of its equations, with every term."""

from dataclasses import replace

import pytest
import torch
from cut_transcription import FAST, TINY, Transcription, batches, draw_ids, gradient_pairs, make

from fastnce.models import CUT, CUTConfig

MIRRORED = [False, True, False]
PATCHES = {"num_patches": 6, "nce_layers": (4, 8, 12)}
CASES = {
    "cut": (TINY, None),
    "cut, all images' negatives": (replace(TINY, negatives="batch"), None),
    "fastcut": (FAST, MIRRORED),
    "fastcut, all images' negatives": (replace(FAST, negatives="batch"), MIRRORED),
    "mirrored, no anti-aliasing": (
        replace(TINY, antialias=False, nce_layers=(0, 4, 6, 10, 12)),
        [True] * 3,
    ),
    "grey to RGB": (replace(TINY, in_channels=1), None),
    "RGB to grey": (replace(TINY, out_channels=1), None),
    "grey to RGB, fastcut": (replace(FAST, in_channels=1), MIRRORED),
    "RGB to grey, fastcut": (replace(FAST, out_channels=1), MIRRORED),
    "grey": (replace(TINY, in_channels=1, out_channels=1), None),
    "vanilla": (replace(TINY, gan_mode="vanilla"), None),
    "non-saturating, R1": (replace(TINY, gan_mode="nonsaturating", lambda_r1=2.0), None),
    "hinge": (replace(TINY, gan_mode="hinge", lambda_gan=0.5), None),
    "wgangp": (replace(TINY, gan_mode="wgangp", lambda_gp=3.0), None),
    "wgangp, R1": (replace(TINY, gan_mode="wgangp", lambda_r1=0.7), None),
    "identity": (replace(TINY, lambda_identity=2.0), MIRRORED),
    "identity, fastcut": (replace(FAST, lambda_identity=2.0), MIRRORED),
    "identity, no contrast": (replace(TINY, lambda_nce=0.0, lambda_identity=2.0), None),
    "no projector": (replace(TINY, projector="none"), None),
    "all positions": (replace(TINY, num_patches=0, nce_layers=(12, 14)), None),
    # Smaller than what a step brings, no multiple of it, and so large that random keys stay to the end.
    "short queue": (replace(TINY, **PATCHES, negatives="queue", queue_size=7), None),
    "queue": (replace(TINY, **PATCHES, negatives="queue", queue_size=17), None),
    "queue beside the image": (
        replace(FAST, **PATCHES, negatives="image+queue", queue_size=50),
        MIRRORED,
    ),
    "queue of features": (
        replace(TINY, **PATCHES, negatives="image+queue", queue_size=17, projector="none"),
        None,
    ),
    "as in SinCUT": (
        replace(
            TINY,
            num_patches=1,
            negatives="batch",
            gan_mode="nonsaturating",
            lambda_nce=4.0,
            lambda_r1=1.0,
            lambda_identity=1.0,
        ),
        None,
    ),
}


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("case", CASES)
def test_three_steps_follow_the_equations(case, backend):
    config, flips = CASES[case]
    model = make(replace(config, backend=backend))
    truth = Transcription(model)
    ids = draw_ids(model, 2) if config.num_patches else {"NCE": None, "NCE_Y": None}
    given = ids if config.num_patches else None
    channels = (config.in_channels, config.out_channels)
    steps = zip(batches(3, channels=channels), flips or [False] * 3, strict=True)
    for step, (batch, flip) in enumerate(steps):
        torch.manual_seed(step)  # of the penalty's places
        losses = model.training_step(batch, flip=flip, patch_ids=given)
        torch.manual_seed(step)
        expected = truth.step(batch, ids, flip)
        assert set(losses) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(losses[name], value.detach(), rtol=1e-6, atol=1e-9)
        for name, (one, other) in gradient_pairs(model, truth).items():
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    "config",
    [TINY, replace(TINY, lambda_r1=2.0), replace(TINY, gan_mode="wgangp")],
    ids=["cut", "r1", "wgangp"],
)
def test_gradients_are_not_trivially_small(config):
    """Guards the comparison above: every network's gradient is well above its absolute tolerance."""
    model = make(config)
    model.training_step(batches(1)[0], patch_ids=draw_ids(model, 2))
    for network in (model.generator, model.projector, model.discriminator):
        assert max(parameter.grad.abs().max() for parameter in network.parameters()) > 1e-5


def published_initialisation(norm_floor: float) -> tuple[dict[str, float], dict[str, float]]:
    """The largest relative differences of losses and of gradients, in fp32 over three steps."""
    torch.manual_seed(0)
    config = CUTConfig(base_channels=16, disc_channels=16, num_patches=64, projection_dim=64)
    model = CUT(config, (64, 64))
    truth = Transcription(model, norm_floor)
    losses, gradients = {}, {}
    for step, batch in enumerate(batches(3, 1, torch.float32, side=(64, 64))):
        ids = draw_ids(model, step, (64, 64))
        truth.copy_state(model)
        ours, theirs = model.training_step(batch, patch_ids=ids), truth.step(batch, ids, False)
        for name, value in theirs.items():
            losses[f"{step} {name}"] = ((ours[name] - value).abs() / value.abs()).item()
        pairs = gradient_pairs(model, truth)
        for name, (one, other) in pairs.items():
            # A bias in front of a norm has no gradient but rounding: it is measured by its layer's weight.
            scale = max(other.norm(), pairs[name.replace("bias", "weight")][1].norm())
            gradients[f"{step} {name}"] = ((one - other).norm() / scale).item()
    return losses, gradients
