"""`fastnce generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastnce.cli.parsing import run_with_options


def generate(args: list[str]) -> int:
    """Generate images of chosen classes with a trained generator."""

    def run_generate(
        run: Path,
        out: Path,
        classes: tuple[str, ...] = (),
        count: int = 16,
        truncation: float | None = None,
        interpolation: int = 0,
        seed: int = 0,
        checkpoint: str = "last",
        weights: Literal["ema", "raw"] = "ema",
        device: str = "auto",
        batch_size: int = 64,
    ) -> None:
        """Images of each class in a folder of its own, and a grid with a row for each class.

        Args:
            run: Folder of a training run.
            out: Folder for the images; created.
            classes: Numbers or names of the classes; by default all.
            count: Images of each class.
            truncation: Cut the noise off at this value, such as 0.8: less variety, more fidelity.
            interpolation: Also a picture with so many steps from one noise to another; 0 for none.
            seed: Seed of the noise.
            checkpoint: "last", "best", or the path of a checkpoint file.
            weights: The running average of the generator's weights, or the weights themselves.
            device: auto, cpu, cuda or cuda:N.
            batch_size: Images generated at a time.
        """
        from fastnce.training import generate_folder, load_generator, resolve_device
        from fastnce.training.translate import introduced

        target = resolve_device(device)
        generator, config = load_generator(run, which=weights, checkpoint=checkpoint, device=target)
        print(introduced(run, config, weights, checkpoint))
        count = generate_folder(
            generator,
            config,
            out,
            classes=classes,
            count=count,
            truncation=truncation,
            interpolation=interpolation,
            seed=seed,
            batch_size=batch_size,
        )
        print(f"Generated {count} images into {out}; grid.png shows them by class")

    # One class is a natural thing to ask for.
    run_with_options(
        "generate", run_generate, ["--classes" if arg == "--class" else arg for arg in args]
    )
    return 0
