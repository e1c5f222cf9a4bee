"""`fastnce translate`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastnce.cli.parsing import run_with_options


def translate(args: list[str]) -> int:
    """Translate a folder of images with a trained generator."""

    def run_translate(
        run: Path,
        input: Path,
        out: Path,
        checkpoint: str = "last",
        weights: Literal["ema", "raw"] = "ema",
        device: str = "auto",
        batch_size: int = 16,
    ) -> None:
        """Translate every image of a folder; the results keep their names, as PNG.

        Args:
            run: Folder of a training run.
            input: Folder of images.
            out: Folder for the translated images; created.
            checkpoint: "last", "best", or the path of a checkpoint file.
            weights: The running average of the generator's weights, or the weights themselves.
            device: auto, cpu, cuda or cuda:N.
            batch_size: Images translated at a time, where they have the same size.
        """
        from fastnce.training import load_generator, resolve_device, translate_folder

        target = resolve_device(device)
        generator, config = load_generator(run, which=weights, checkpoint=checkpoint, device=target)
        count = translate_folder(generator, config, input, out, batch_size=batch_size)
        print(f"Translated {count} images into {out}")

    run_with_options("translate", run_translate, args)
    return 0
