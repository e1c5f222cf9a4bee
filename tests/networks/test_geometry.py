"""The pixels that the positions of a feature map look at."""

import pytest
import torch
from torch import nn

from fastnce.networks import ResnetGenerator
from fastnce.networks.resnet_generator import PixelGrid, pixel_grid


def copying_generator(antialias: bool) -> ResnetGenerator:
    """Every convolution copies its first channel in place, so that a bright pixel can be followed through the layers."""
    generator = ResnetGenerator(1, 1, base_channels=1, num_blocks=2, antialias=antialias)
    for layer in generator.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)
            middle = layer.kernel_size[0] // 2
            layer.weight.data[0, 0, middle, middle] = 1.0
    return generator


def centre(feature: torch.Tensor) -> tuple[float, float]:
    """Row and column of the bright spot in (1, C, h, w)."""
    spot = feature[0, 0] - feature[0, 0].median()
    spot = spot.clamp(min=0) / spot.clamp(min=0).sum()
    rows, columns = (torch.arange(n, dtype=torch.float32) for n in spot.shape)
    return (spot.sum(1) @ rows).item(), (spot.sum(0) @ columns).item()


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("row", "column"), [(12, 20), (16, 8)])
def test_a_bright_pixel_is_found_at_its_position_in_every_layer(antialias, row, column):
    generator = copying_generator(antialias)
    image = torch.zeros(1, 1, 32, 36)
    image[0, 0, row, column] = 1.0
    taps = range(len(generator.model))
    with torch.no_grad():
        features = generator.encode(image, taps)
    for tap, feature in zip(taps, features, strict=True):
        grid = pixel_grid(generator, tap, feature, image)
        found = [grid.pixel(position) for position in centre(feature)]
        assert found == pytest.approx([row, column], abs=1e-3), f"layer {tap}: {found}"


def test_the_grid_of_each_published_tap():
    generator = ResnetGenerator(base_channels=2, num_blocks=5)
    image = torch.zeros(1, 3, 32, 32)
    features = generator.encode(image, (0, 4, 8, 12, 16))
    grids = [
        pixel_grid(generator, t, f, image) for t, f in zip((0, 4, 8, 12, 16), features, strict=True)
    ]
    assert grids == [(-3, 1), (0, 1), (0, 2), (0, 4), (0, 4)]


def test_other_generators_have_their_maps_centred_on_the_image():
    image = torch.zeros(1, 3, 32, 32)
    other = nn.Identity()
    assert pixel_grid(other, 0, torch.zeros(1, 3, 32, 32), image) == (0, 1)
    assert pixel_grid(other, 2, torch.zeros(1, 3, 16, 16), image) == (0.5, 2)
    assert pixel_grid(other, 0, torch.zeros(1, 3, 38, 38), image) == (-3, 1)


def test_nearest_position():
    grid = PixelGrid(-3.0, 1.0)
    assert grid.nearest(0, 38) == 3
    assert PixelGrid(0.0, 4.0).nearest(9, 8) == 2
    assert PixelGrid(0.0, 4.0).nearest(31, 8) == 7  # position 8 would be outside
