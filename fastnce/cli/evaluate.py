"""`fastnce evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastnce.cli.parsing import run_with_options
from fastnce.errors import UserError


def evaluate(args: list[str]) -> int:
    """Measure how good a run's translations, samples or features are, beside baselines."""

    def run_evaluate(
        run: Path | None = None,
        images: Path | None = None,
        data: Path | None = None,
        without_nce: Path | None = None,
        extractor: Path | None = None,
        segmenter: Path | None = None,
        labels: Path | None = None,
        label_kind: Literal["train-ids", "ids", "colours"] = "train-ids",
        checkpoint: str = "last",
        weights: Literal["ema", "raw"] = "ema",
        direction: Literal["AtoB", "BtoA"] | None = None,
        value_range: tuple[float, float] | None = None,
        out: Path | None = None,
        device: str = "auto",
        broken_files: Literal["error", "skip"] | None = None,
    ) -> None:
        """CUT and its kin: FID, KID, precision, recall, density and coverage of the translated test images, and content accuracy
        of digits. pix2pix: L1, PSNR and SSIM against the truth, and with --extractor those too. ContraGAN: also intra-class FID,
        IS and class accuracy of samples. SimCLR, MoCo, SupCon: k-NN and linear accuracy of features.

        Writes metrics.json and metrics.md into the run's folder, or into --out; for other data than the run's own
        metrics-NAME.json and metrics-NAME.md.

        Args:
            run: Folder of a training run.
            images: Instead of a run: folder of translated test images, made by any program.
            data: Folder of the data; by default that of the training.
            without_nce: CUT: folder of the same training with --lambda-nce 0, for a row of the table.
            extractor: TorchScript file whose features are compared, or torch-fidelity for its Inception; by default that of the
                training. The digits sets have their own.
            segmenter: TorchScript file of a segmentation network with Cityscapes' 19 classes: scores the segmentations too.
            labels: Folder of the label maps that the translations should show, found by their names.
            label_kind: What the label maps hold: train ids, Cityscapes' own ids, or its colours.
            checkpoint: "last", "best", or the path of a checkpoint file. With "last", CUT's best one is judged too.
            weights: The running average of the generator's weights, or the weights themselves.
            direction: For --images, or a system of both directions: which domain is translated to which; AtoB if not given.
            value_range: The images' numbers that stand for black and white, where they are not of 8 bits or use all of 16; by
                default as in the training.
            out: Folder of the report, by default that of the run or of the images.
            device: auto, cpu, cuda or cuda:N.
            broken_files: What a file that cannot be read does: skip leaves it out and names it, error stops; by default as in
                the training.
        """
        from fastnce.training.evaluation import Report, Segmentation, evaluate_images, evaluate_run
        from fastnce.training.translate import introduced, load_config

        if (run is None) == (images is None):
            raise UserError(
                "give either --run, a training's folder, or --images, one of translated images."
            )
        if (segmenter is None) != (labels is None):
            raise UserError("--segmenter and --labels belong together: give both, or neither.")
        segmentation = None
        if segmenter is not None and labels is not None:
            segmentation = Segmentation(segmenter, labels, label_kind)
        if images is not None:
            report = Report(out or images)
            if without_nce is not None:
                raise UserError("--without-nce is for --run. Leave it out.")
            _, table = evaluate_images(
                images,
                data,
                extractor=extractor,
                segmentation=segmentation,
                direction=direction or "AtoB",
                out=out,
                device=device,
                broken_files=broken_files,
                value_range=value_range,
            )
        else:
            report = Report.of(run, data, out)
            print(introduced(run, load_config(run), weights, checkpoint))
            _, table = evaluate_run(
                run,
                data,
                without_nce=without_nce,
                extractor=extractor,
                segmentation=segmentation,
                direction=direction,
                checkpoint=checkpoint,
                weights=weights,
                device=device,
                broken_files=broken_files,
                value_range=value_range,
                report=report,
            )
        print(table)
        print(f"Written: {report.folder / report.stem}.json and .md")

    run_with_options("evaluate", run_evaluate, args)
    return 0
