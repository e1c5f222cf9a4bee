"""Sample grids and the loss plot."""

import numpy as np
import torch
from PIL import Image

from fastnce.viz.plots import (
    sample_grid,
    save_loss_plot,
    save_measurement_plot,
    save_sample_grid,
)


def test_small_images_are_enlarged_pixel_by_pixel():
    image = torch.full((3, 32, 32), -1.0)
    image[0, 0, 0] = 1.0
    grid = np.asarray(sample_grid({"in": [image]}))
    red = (grid == (255, 0, 0)).all(axis=2)
    assert red.sum() == 9
    assert ((grid == 0).all(axis=2)).sum() >= 96 * 96 - 9


def test_rows_of_different_sizes_and_channels(tmp_path):
    rows = {
        "input": [torch.zeros(3, 128, 64), torch.zeros(3, 100, 200)],
        "output": [torch.ones(1, 128, 64), torch.ones(7, 100, 200)],
    }
    save_sample_grid(rows, tmp_path / "deep" / "grid.png")
    picture = Image.open(tmp_path / "deep" / "grid.png")
    assert picture.height >= 2 * 128
    assert picture.width >= 2 * 200


def test_loss_plot(tmp_path):
    path = tmp_path / "loss.png"
    save_loss_plot([{"step": 1, "G": 1.0}], (("G",),), path)
    assert not path.exists()
    lines = [
        {"step": s, "G": 1.0 / s, "D_real": 0.5, "new": 2.0, "seconds": 9.0} for s in (1, 2, 3)
    ]
    save_loss_plot(lines, (("D_real", "absent"), ("G",)), path)
    with Image.open(path) as picture:
        assert picture.width > 600


def test_measurement_plot(tmp_path):
    """A panel for each kind; a measurement may be missing or None."""
    path = tmp_path / "measurements.png"
    save_measurement_plot([{"step": 1, "fid": 1.0}], path)
    assert not path.exists()
    lines = [{"step": 1, "fid": None}, {"step": 2, "fid": 3.0, "sv/conv": 1.0, "sv/linear": 2.0}]
    save_measurement_plot(lines, path)
    with Image.open(path) as picture:
        assert picture.height > 500
