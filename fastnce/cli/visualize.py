"""`fastnce visualize`: what a model learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastnce.cli.parsing import run_with_options
from fastnce.errors import UserError


def visualize(args: list[str]) -> int:
    """Show what a model learnt: similarity maps, components of its features, a run as a page."""

    def similarity(
        run: Path,
        input: Path,
        out: Path,
        points: tuple[str, ...] = (),
        count: int = 4,
        layers: tuple[int, ...] = (),
        scale: Literal["similarity", "cosine"] = "similarity",
        checkpoint: str = "last",
        weights: Literal["raw", "ema"] = "raw",
        device: str = "auto",
    ) -> None:
        """Translate an image, and show which patches of it the model takes to be similar to points of the result.

        Writes similarity.png, a row for each point and a column for each layer, and the translation, output.png.

        Args:
            run: Folder of a training run of cut or fastcut.
            input: Image file.
            out: Folder for the pictures; created.
            points: Points of the result, each as X,Y in pixels from the left and the top; by default some that differ.
            count: How many points are chosen, where none is given.
            layers: Layers to show, of those that the run compares; by default all.
            scale: exp(cosine / temperature) as the loss has it, or the cosine, which shows small similarities too.
            checkpoint: "last", "best", or the path of a checkpoint file.
            weights: The weights that the projector was trained with, or their running average.
            device: auto, cpu, cuda or cuda:N.
        """
        from fastnce.training import resolve_device
        from fastnce.training.patch_encoder import PatchEncoder
        from fastnce.training.translate import introduced, load_config
        from fastnce.training.visualize import visualize_similarity

        chosen = [_point(text) for text in points]
        target = resolve_device(device)
        print(introduced(run, load_config(run), weights, checkpoint))
        encoder = PatchEncoder.load(run, which=weights, checkpoint=checkpoint, device=target)
        path = visualize_similarity(
            encoder, input, out, points=chosen, count=count, layers=layers, scale=scale
        )
        print(f"Wrote {path}")

    def pca(
        run: Path,
        input: Path,
        out: Path,
        count: int = 3,
        layers: tuple[int, ...] = (),
        checkpoint: str = "last",
        weights: Literal["raw", "ema"] = "raw",
        device: str = "auto",
    ) -> None:
        """Show the main components of the patch features of images and of their translations, as colours.

        Writes pca-encoder.png and pca-projected.png, two rows for each image and a column for each layer. All rows share one
        basis, so equal colours are equal features.

        Args:
            run: Folder of a training run of cut or fastcut.
            input: Image file, or a folder of images.
            out: Folder for the pictures; created.
            count: How many images of a folder to take.
            layers: Layers to show, of those that the run compares; by default all.
            checkpoint: "last", "best", or the path of a checkpoint file.
            weights: The weights that the projector was trained with, or their running average.
            device: auto, cpu, cuda or cuda:N.
        """
        from fastnce.training import resolve_device
        from fastnce.training.patch_encoder import PatchEncoder
        from fastnce.training.translate import introduced, load_config
        from fastnce.training.visualize import visualize_features

        target = resolve_device(device)
        print(introduced(run, load_config(run), weights, checkpoint))
        encoder = PatchEncoder.load(run, which=weights, checkpoint=checkpoint, device=target)
        for path in visualize_features(encoder, input, out, count=count, layers=layers):
            print(f"Wrote {path}")

    def gallery(run: tuple[Path, ...], out: Path | None = None) -> None:
        """Write one HTML page that shows a run, or several side by side: samples, curves, evaluation, configuration.

        The page holds everything, needs no network, and stays below about 10 MB. For runs of any system.

        Args:
            run: Folder of a training run, or of several.
            out: The HTML file; by default gallery.html in the first run's folder.
        """
        from fastnce.training.gallery import write_gallery

        print(f"Wrote {write_gallery(run, out)}")

    run_with_options("visualize", {"gallery": gallery, "pca": pca, "similarity": similarity}, args)
    return 0


def _point(text: str) -> tuple[int, int]:
    try:
        x, y = text.split(",")
        return int(x), int(y)
    except ValueError:
        raise UserError(
            f"points: {text!r} is no point. Write whole numbers X,Y such as 12,20."
        ) from None
