"""ReStyle's training step: the published numbers, a plain transcription of it, stages, what is left out, and mistakes."""

import pytest
import torch
from golden import fill_styles, sines
from torch import nn

from fastnce.networks.restyle_encoder import build_encoder
from fastnce.networks.style_generator import StyleGenerator
from fastnce.systems.restyle import ReStyle, ReStyleConfig

BARE = {"lambda_lpips": 0.0, "lambda_id": 0.0}
PUBLISHED = BARE | {
    "generator_shape": (16, 512, 8, 3, 512, 512, 512),
    "encoder": "resnet34",
    "image_size": 64,
}


@pytest.fixture(scope="module")
def filled():
    """The state of a filled inverter of the golden values, a batch, and noise for the latent discriminator."""
    generator = fill_styles(StyleGenerator(16))
    encoder = fill_styles(build_encoder("resnet34", 6, 6))
    with torch.no_grad():
        for style in encoder.styles:
            style.linear.weight *= 0.2
        for layer in (generator.conv1, *generator.convs):
            layer.noise.weight.zero_()
        for j in range(5):
            noise = generator.noises.get_buffer(f"noise_{j}")
            noise.copy_(sines(*noise.shape, step=0.7, start=0.1 * j))
        z = sines(64, 512, step=0.37, start=0.2)
        generator.latent_avg.copy_(generator.mapping(z).mean(0))
    state = {f"encoder.{name}": x for name, x in encoder.state_dict().items()}
    return state | {f"generator.{name}": x for name, x in generator.state_dict().items()}


def published(filled, **changes) -> ReStyle:
    model = ReStyle(ReStyleConfig(**PUBLISHED | changes))
    stage = {"stage": torch.tensor(6)} if changes.get("head") == "e4e" else {}
    model.inverter.load_state_dict(filled | stage)
    return model


def gradient(module: nn.Module) -> float:
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return torch.stack([grad.norm() for grad in grads]).norm().item()


BATCH = {"image": sines(2, 3, 64, 64, step=0.0137, start=0.3)}


def test_golden_training_of_psp(filled):
    """Golden values 15 of the sheet."""
    model = published(filled, lambda_w_norm=0.005, generator_gradients="published")
    near = {"rel": 1e-4}
    expected = [1.401509, 1.408203, 1.412998, 1.415161, 1.416438]
    norms = [3.272277, 6.542075, 9.811066, 13.080894, 16.348228]
    losses = model.training_step(BATCH)
    for number, (l2, norm) in enumerate(zip(expected, norms, strict=True), 1):
        assert losses[f"loss_{number}"].item() == pytest.approx(l2 + 0.005 * norm, **near)
    assert losses["L2"].item() == pytest.approx(expected[-1], **near)
    assert losses["w_norm"].item() == pytest.approx(norms[-1], **near)
    encoder = model.encoder
    assert gradient(encoder) == pytest.approx(6.779625, **near)
    assert gradient(encoder.styles[0].linear) == pytest.approx(0.05962263, **near)
    assert gradient(encoder.conv1) == pytest.approx(2.533684, **near)
    assert gradient(model.generator) == pytest.approx(13.35812, **near)
    means = encoder.bn1.running_mean[:3].tolist()
    assert means == pytest.approx([0.151330, 0.186085, -0.026945], rel=1e-4)
    assert encoder.bn1.num_batches_tracked == 5
    losses = model.training_step(BATCH)
    expected = [1.400644, 1.406460, 1.410381, 1.411806, 1.412190]
    assert losses["L2"].item() == pytest.approx(expected[-1], **near)
    assert gradient(encoder) == pytest.approx(6.544504, **near)
    assert gradient(model.generator) == pytest.approx(26.55160, **near)
