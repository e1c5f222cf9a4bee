"""How near translations are to the images that they should be, where these are known: L1, PSNR and SSIM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastnce.metrics.tables import finite_or_none, one_or_several, rows_table

# Side of SSIM's Gaussian window (standard deviation 1.5); a smaller image has no SSIM.
_WINDOW = 11

_COLUMNS = {"l1": ("L1", ".4f"), "psnr": ("PSNR", ".2f"), "ssim": ("SSIM", ".4f")}


@torch.inference_mode()
def pair_numbers(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """L1, PSNR and SSIM of images and what they should be, each the mean over the images.

    Values count from 0 to 1. L1 is the mean absolute difference, PSNR is 10 log10(1 / mean squared difference) in dB. SSIM is
    that of Wang et al., 2004, with Gaussian windows of 11x11 pixels around every pixel, mirrored at the border, through
    torchmetrics. (scikit-image leaves the 5 pixels at the border out.)

    Args:
        pairs: (C, H, W) in [-1, 1] each, the image and its truth.

    Returns:
        {"count", "size", "l1", "psnr", "ssim"}. A number is None if it cannot be had: PSNR where an image is its truth exactly,
        SSIM of images with a side below 11 pixels.

    Raises:
        ValueError: no pairs, or a pair of two shapes.

    Examples:
        >>> truth = torch.zeros(3, 16, 16)
        >>> numbers = pair_numbers([(truth + 0.2, truth)])
        >>> round(numbers["l1"], 3), round(numbers["psnr"], 3)
        (0.1, 20.0)
    """
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    values: dict[str, list[float]] = {name: [] for name in _COLUMNS}
    sizes = set()
    for image, truth in pairs:
        if image.shape != truth.shape:
            raise ValueError(
                f"pair_numbers: a pair of {tuple(image.shape)} and {tuple(truth.shape)}."
            )
        one, other = ((x[None].double() + 1) / 2 for x in (image, truth))
        height, width = image.shape[1:]
        sizes.add(f"{width}x{height}")
        values["l1"].append((one - other).abs().mean().item())
        values["psnr"].append(peak_signal_noise_ratio(one, other, data_range=1.0).item())
        ssim = float("nan")
        if min(height, width) >= _WINDOW:
            ssim = structural_similarity_index_measure(one, other, data_range=1.0).item()
        values["ssim"].append(ssim)
    count = len(values["l1"])
    if not count:
        raise ValueError("pair_numbers: no pairs.")
    means = {name: finite_or_none(sum(numbers) / count) for name, numbers in values.items()}
    return {"count": count, "size": one_or_several(sizes)} | means


def format_pair_table(result: Mapping[str, Any]) -> str:
    """{"reference", "rows": [{"name"} and `pair_numbers`, ...]} as a Markdown table that also reads well as text."""
    first = result["rows"][0]
    foot = (
        f"{first['count']} images of {first['size']}, each against its own of {result['reference']}, as files hold them. L1 and SSIM of "
        "values from 0 to 1, PSNR in dB; means over the images."
    )
    return rows_table(result["rows"], _COLUMNS, [foot])
