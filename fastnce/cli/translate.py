"""`fastnce translate`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastnce.cli.parsing import run_with_options
from fastnce.errors import UserError


def translate(args: list[str]) -> int:
    """Translate a folder of images, or one, with a trained generator."""

    def run_translate(
        input: Path,
        out: Path,
        run: Path | None = None,
        weights: str = "ema",
        checkpoint: str = "last",
        direction: Literal["AtoB", "BtoA"] | None = None,
        preprocess: str | None = None,
        size: int | None = None,
        tile: int | None = None,
        part: Literal["left", "right", "whole"] | None = None,
        format: Literal["png", "jpg", "tiff", "webp", "npy"] | None = None,
        broken_files: Literal["error", "skip"] | None = None,
        value_range: tuple[float, float] | None = None,
        device: str = "auto",
        batch_size: int = 16,
    ) -> None:
        """Translate every image of a folder, and of the folders in it; the results keep their names.

        Args:
            input: Folder of images, or one image.
            out: Folder for the translated images; created. For one image also the file to write.
            run: Folder of a training run.
            weights: ema: the running average of the generator's weights; raw: the weights themselves. Or, without run, a file of
                weights: latest_net_G.pth of a published repository, or a .safetensors of `fastnce export`.
            checkpoint: "last", "best", or the path of a checkpoint file.
            direction: For systems that learn both directions; by default that of the training.
            preprocess: How images are scaled, by default as in training; none keeps their size.
            size: Size to which they are scaled; by default the crop size of the training.
            tile: Larger images are computed in tiles of this size, with the same result in less memory. Images of any number of
                pixels are read.
            part: Translate this half of each file, or the whole. By default that is the input's half where pix2pix learned from
                pairs side by side and these are such, else the whole.
            format: Of the results, unless --out names a file: png, or what holds all their numbers and channels. jpg and webp have
                quality 95.
            broken_files: What a file that cannot be read does: skip leaves it out and names it, error stops when the images before
                it are translated; by default as in the training.
            value_range: The images' numbers that stand for black and white; by default as in the training. Results are written in
                these numbers.
            device: auto, cpu, cuda or cuda:N.
            batch_size: Images translated at a time, where they have the same size.
        """
        from fastnce.training import load_generator, resolve_device, translate_folder
        from fastnce.training.translate import WEIGHTS_FILES, introduced

        target = resolve_device(device)
        if weights not in ("ema", "raw"):
            if run is not None:
                raise UserError(
                    f"run={run} and the file weights={weights} are two generators. Leave one out."
                )
            if Path(weights).suffix not in WEIGHTS_FILES:
                raise UserError(
                    f"weights={weights} must be ema, raw, or a .pth or .safetensors file of a generator. A checkpoint of a run: "
                    f"--run RUN --checkpoint {weights}."
                )
            run = Path(weights)
            generator, config = load_generator(run, device=target)
        elif run is None:
            raise UserError(
                "name a generator: --run FOLDER of a training, or --weights FILE, .pth or .safetensors."
            )
        else:
            generator, config = load_generator(
                run, which=weights, checkpoint=checkpoint, device=target
            )
        print(introduced(run, config, weights, checkpoint))
        count = translate_folder(
            generator,
            config,
            input,
            out,
            batch_size=batch_size,
            direction=direction,
            preprocess=preprocess,
            size=size,
            tile=tile,
            part=part,
            format=format,
            broken_files=broken_files,
            value_range=value_range,
        )
        print(f"Translated {count} image{'s' * (count != 1)} into {out}")

    run_with_options("translate", run_translate, args)
    return 0
