"""`fastnce evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastnce.cli.parsing import run_with_options


def evaluate(args: list[str]) -> int:
    """Measure how good a run's translations, samples or features are, beside baselines."""

    def run_evaluate(
        run: Path,
        data: Path | None = None,
        without_nce: Path | None = None,
        extractor: Path | None = None,
        checkpoint: str = "last",
        weights: Literal["ema", "raw"] = "ema",
        device: str = "auto",
    ) -> None:
        """CUT: content accuracy, FID and KID of the translated test images. ContraGAN: FID, intra-class FID, IS, precision,
        recall, density, coverage and class accuracy of samples. SimCLR, MoCo, SupCon: k-NN and linear accuracy of features.

        Writes metrics.json and metrics.md into the run's folder.

        Args:
            run: Folder of a training run.
            data: Folder of the data; by default that of the training. For CUT a set of `fastnce data digits-photos`.
            without_nce: CUT: folder of the same training with --lambda-nce 0, for the table's last row.
            extractor: ContraGAN: TorchScript file whose features are compared; a digits set has its own.
            checkpoint: "last", "best", or the path of a checkpoint file.
            weights: The running average of the generator's weights, or the weights themselves.
            device: auto, cpu, cuda or cuda:N.
        """
        from fastnce.training import evaluate_run

        _, table = evaluate_run(
            run,
            data,
            without_nce=without_nce,
            extractor=extractor,
            checkpoint=checkpoint,
            weights=weights,
            device=device,
        )
        print(table)

    run_with_options("evaluate", run_evaluate, args)
    return 0
