"""pix2pix's networks: shapes, sizes, keys, and what normalises after the training."""

import pytest
import torch
from torch import nn

from fastnce.networks import UNetGenerator
from fastnce.networks.layers import init_normal


@pytest.mark.parametrize(("num_downs", "millions"), [(8, 54.414), (7, 41.829)])
def test_published_parameter_counts(num_downs, millions):
    with torch.device("meta"):
        generator = UNetGenerator(num_downs=num_downs)
    count = sum(parameter.numel() for parameter in generator.parameters())
    assert round(count / 1e6, 3) == millions


def test_published_key_path():
    with torch.device("meta"):
        state = UNetGenerator().state_dict()
    inside = "model.model.1.model.3.model.3"
    for key, shape in {
        "model.model.0.weight": (64, 3, 4, 4),
        "model.model.1.model.1.weight": (128, 64, 4, 4),
        "model.model.1.model.2.running_mean": (128,),
        f"{inside}.model.1.weight": (512, 256, 4, 4),
        f"{inside}.model.3.model.3.model.3.model.3.model.1.weight": (512, 512, 4, 4),  # innermost
        f"{inside}.model.3.model.3.model.3.model.3.model.3.weight": (512, 512, 4, 4),
        f"{inside}.model.3.model.3.model.3.model.3.model.4.weight": (512,),
        "model.model.1.model.5.weight": (256, 64, 4, 4),
        "model.model.3.weight": (128, 3, 4, 4),
        "model.model.3.bias": (3,),
    }.items():
        assert tuple(state[key].shape) == shape, key
    convolutions = [k for k in state if k.endswith("weight") and state[k].dim() == 4]
    assert len(convolutions) == 16
    assert [k for k in convolutions if k.replace("weight", "bias") in state] == [
        "model.model.3.weight"
    ]


def test_dropout_is_where_it_was_published():
    with torch.device("meta"):
        names = [n for n, m in UNetGenerator().named_modules() if isinstance(m, nn.Dropout)]
        assert not [m for m in UNetGenerator(dropout=False).modules() if isinstance(m, nn.Dropout)]
    # The three levels of full width between the fourth and the innermost: `model.` once per level and once per Sequential.
    assert [name.count("model") - 1 for name in sorted(names, key=len)] == [5, 6, 7]


def test_every_level_has_a_say():
    """The image changes if any single convolution does: no level is left out, no skip replaces one."""
    torch.manual_seed(0)
    generator = UNetGenerator(base_channels=4, num_downs=4).eval()
    x = torch.randn(1, 3, 32, 48)
    before = generator(x)
    assert before.shape == x.shape and before.abs().max() <= 1
    for module in generator.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            weight = module.weight.detach().clone()
            module.weight.data.mul_(torch.rand_like(weight))
            assert not torch.allclose(generator(x), before, atol=1e-4)
            module.weight.data.copy_(weight)
    assert torch.equal(generator(x), before)


def test_what_normalises_in_eval_mode():
    torch.manual_seed(0)
    x = torch.randn(3, 3, 16, 16)
    own = UNetGenerator(base_channels=4, num_downs=3, dropout=False)
    init_normal(own, 0.2)
    running = UNetGenerator(base_channels=4, num_downs=3, test_statistics="running")
    running.load_state_dict(own.state_dict())
    running.eval()
    one_by_one = torch.cat([own(image[None]) for image in x])  # in training mode
    torch.testing.assert_close(own.eval()(x), one_by_one, rtol=1e-4, atol=1e-5)
    # The averages are still those before any step: mean 0, variance 1.
    assert not torch.allclose(running(x), one_by_one, atol=0.01)


def test_sizes_that_cannot_be_halved():
    with pytest.raises(ValueError, match=r"images of 16x24 cannot be halved 4 times.* of 16, or"):
        UNetGenerator(base_channels=4, num_downs=4)(torch.zeros(1, 3, 16, 24))
    with pytest.raises(ValueError, match="num_downs=1 must be at least 2"):
        UNetGenerator(num_downs=1)


def test_normal_initialisation():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(64, 64, 3), nn.BatchNorm2d(4096), nn.ConvTranspose2d(64, 64, 3)
    )
    init_normal(network, 0.5)
    for layer, mean in zip(network, (0, 1, 0), strict=True):
        assert layer.weight.mean().item() == pytest.approx(mean, abs=0.03)
        assert layer.weight.std().item() == pytest.approx(0.5, rel=0.03)
        assert not layer.bias.any()
