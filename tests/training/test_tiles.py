"""Tiled translation is the translation of the whole image, without seams."""

import pytest
import torch
from torch import Tensor

from fastnce.errors import UserError
from fastnce.networks import ResnetGenerator, StyleGAN2Generator, UNetGenerator
from fastnce.systems import tiles
from fastnce.systems.translating import translate

TILE = 32


def make(antialias: bool = True) -> ResnetGenerator:
    """A generator whose activations are of the order of 1, so that norms and borders matter."""
    torch.manual_seed(0)
    generator = ResnetGenerator(base_channels=8, num_blocks=2, antialias=antialias).eval()
    for parameter in generator.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.3)
    return generator.requires_grad_(False)


def make_stylegan2() -> StyleGAN2Generator:
    torch.manual_seed(0)
    generator = StyleGAN2Generator(base_channels=8, num_blocks=4).eval()
    for name, parameter in generator.named_parameters():
        if name.endswith(("bias", "noise.weight")):  # they start at 0
            torch.nn.init.constant_(parameter, 0.3)
    return generator.requires_grad_(False)


def image() -> Tensor:
    """Bright on one side and dark on the other: every tile has statistics of its own."""
    torch.manual_seed(1)
    ramp = torch.linspace(-0.8, 0.8, 172).expand(1, 3, 108, 172)
    return (ramp + 0.2 * torch.randn(1, 3, 108, 172)).clamp(-1, 1)


def untied_tiles(generator, x: Tensor) -> Tensor:
    """Each tile translated for itself: what must not come out."""
    rows = [
        torch.cat([generator(piece) for piece in row.split(TILE, 3)], 3) for row in x.split(TILE, 2)
    ]
    return torch.cat(rows, 2)


@pytest.mark.parametrize("kind", ["blurred", "strided", "sincut"])
@pytest.mark.parametrize("tile", [16, TILE, 52, 108])
def test_tiles_give_the_untiled_result(kind, tile):
    generator = make_stylegan2() if kind == "sincut" else make(kind == "blurred")
    x = image()
    whole, tiled = generator(x), tiles.translate_in_tiles(generator, x, tile)
    assert whole.std() > 0.3  # not saturated, not flat
    torch.testing.assert_close(tiled, whole, rtol=0, atol=3e-5)
    # Tiles for themselves are far from it.
    assert (untied_tiles(generator, x) - whole).abs().mean() > 0.05


def test_translate_uses_tiles_for_large_images_of_any_size():
    generator = make()
    x = image()[..., :99, :170]
    expected = translate(generator, x)
    result = translate(generator, x, tile=TILE)
    assert result.shape == x.shape
    torch.testing.assert_close(result, expected, rtol=0, atol=3e-5)
    # A batch goes through one by one: norms tie the tiles of an image, not the images.
    both = translate(generator, torch.cat([x, x.flip(3)]), tile=TILE)
    torch.testing.assert_close(both[:1], expected, rtol=0, atol=3e-5)
    # What fits in a tile is translated as ever, by any generator.
    one = torch.nn.Conv2d(3, 3, 1)
    assert translate(one, x[..., :TILE, :TILE], tile=TILE).shape == (1, 3, TILE, TILE)


def test_other_generators_and_odd_tiles_are_refused():
    for tile in (0, 12, 34):
        with pytest.raises(UserError, match=f"tile={tile} must be a multiple of 4"):
            tiles.translate_in_tiles(make(), image(), tile)
    with pytest.raises(UserError, match="is for the ResNet generator and SinCUT's, got a Conv2d"):
        tiles.translate_in_tiles(torch.nn.Conv2d(3, 3, 1), image(), TILE)
    with pytest.raises(UserError, match=f"tile={TILE}: each pixel that a U-Net makes depends on"):
        tiles.translate_in_tiles(UNetGenerator(base_channels=2, num_downs=2), image(), TILE)
