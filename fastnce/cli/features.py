"""`fastnce features`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastnce.cli.parsing import run_with_options


def features(args: list[str]) -> int:
    """Write the features of a folder of images, from a trained encoder."""

    def run_features(
        run: Path,
        input: Path,
        out: Path,
        normalize: bool = False,
        checkpoint: str = "last",
        weights: Literal["ema", "raw"] = "ema",
        device: str = "auto",
        batch_size: int = 64,
        broken_files: Literal["error", "skip"] | None = None,
    ) -> None:
        """What the encoder of SimCLR, MoCo or SupCon makes of each image, before the projection head.

        The file has the arrays "features" (images x features, float32) and "names", the files' names below --input; a
        .safetensors file has the names in its metadata, as a JSON list.

        Args:
            run: Folder of a training run, or a .safetensors file of `fastnce export`.
            input: Folder of images, or one image.
            out: File to write: .npz or .safetensors.
            normalize: Scale each image's features to length 1, as k-NN compares them.
            checkpoint: "last", "best", or the path of a checkpoint file.
            weights: The running average of the encoder's weights, or the weights themselves.
            device: auto, cpu, cuda or cuda:N.
            batch_size: Images at a time.
            broken_files: error: stop at a file that cannot be read; skip: leave it out and name it; by default as in training.
        """
        from fastnce.training import load_generator, resolve_device, write_features
        from fastnce.training.translate import introduced

        target = resolve_device(device)
        encoder, config = load_generator(run, which=weights, checkpoint=checkpoint, device=target)
        print(introduced(run, config, weights, checkpoint))
        count, length = write_features(
            encoder,
            config,
            input,
            out,
            normalize=normalize,
            batch_size=batch_size,
            broken_files=broken_files,
        )
        print(f"Wrote {length} features of each of {count} images to {out}")

    run_with_options("features", run_features, args)
    return 0
