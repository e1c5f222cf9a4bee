"""The commands that use a trained run. Their signatures are their options, their docstrings the help."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fastnce.cli.parsing import with_options_of
from fastnce.errors import UserError

# Its options that all commands have.
OPENING = ("checkpoint", "weights", "device")


def opened(
    run: Path,
    checkpoint: str = "last",
    weights: Literal["ema", "raw"] = "ema",
    device: str = "auto",
    **how: Any,
) -> tuple[Any, dict[str, Any]]:
    """The `Run`, after a line that says which, and the other options.

    Args:
        run: Folder of a training run.
        checkpoint: "last", "best", or the path of a checkpoint file.
        weights: ema: the running average of the network's weights; raw: the weights themselves.
        device: auto, cpu, cuda or cuda:N.
    """
    from fastnce.training.runs import Run

    trained = Run(run, weights=weights, checkpoint=checkpoint, device=device)
    print(trained)
    return trained, how


@with_options_of(
    opened,
    "fastnce.systems.translating.translate_folder",
    "fastnce.systems.cfl.translate_label_maps",
)
def translate(
    input: Path, out: Path, run: Path | None = None, weights: str = "ema", **how: Any
) -> None:
    """Translate a folder of images, or one, with a trained generator.

    Images in the folders in it are translated too; the results keep their names. A run of CFL translates label maps.

    Args:
        input: Folder of images, or one image.
        out: Folder for the translated images; created. For one image also the file to write.
        run: Folder of a training run.
        weights: ema: the running average of the generator's weights; raw: the weights themselves. Or, without run, a file of
            weights: latest_net_G.pth of a published repository, or a .safetensors of `fastnce export`.
    """
    from fastnce.training.runs import WEIGHTS_FILES, translate_folder

    if weights in ("ema", "raw"):
        if run is None:
            raise UserError(
                "name a generator: --run FOLDER of a training, or --weights FILE, .pth or .safetensors."
            )
        trained, how = opened(run, weights=weights, **how)
    else:
        if run is not None:
            raise UserError(
                f"run={run} and the file weights={weights} are two generators. Leave one out."
            )
        if Path(weights).suffix not in WEIGHTS_FILES:
            raise UserError(
                f"weights={weights} must be ema, raw, or a .pth or .safetensors file of a generator. A checkpoint of a run: "
                f"--run RUN --checkpoint {weights}."
            )
        trained, how = opened(Path(weights), **how)
    count = translate_folder(trained.network, trained.config, input, out, **how)
    print(f"Translated {count} image{'s' * (count != 1)} into {out}")


@with_options_of(
    opened,
    "fastnce.systems.contragan.generate_folder",
    "fastnce.systems.stylegan2.generate_folder",
)
def generate(run: Path, out: Path, truncation: float | None = None, **how: Any) -> None:
    """Generate images with a trained generator.

    Of a generator that knows classes, those of a class are in a folder of its own, and a grid has a row for each class.

    Args:
        run: Folder of a training run.
        out: Folder for the images; created.
        truncation: Less variety, more fidelity. ContraGAN: cut the noise off at this value, such as 0.8. StyleGAN2: how far from
            the mean latent the images are, 1 for all the way, such as 0.7.
    """
    from fastnce.training.runs import generate_folder

    trained, how = opened(run, truncation=truncation, **how)
    made = generate_folder(trained.network, trained.config, out, **how)
    print(f"Generated {made} images into {out}; grid.png shows them")


@with_options_of(opened, "fastnce.systems.directions.edit_folder")
def edit(run: Path, out: Path, data: Path | None = None, **how: Any) -> None:
    """Move latents of a StyleGAN2 generator along a direction, and show the images.

    Writes a folder of images for each latent, edit.png with all of them, and direction.npy, which --direction reads again.

    Args:
        run: Folder of a training run of stylegan2 or restyle, or a .pt file in rosinality's layout.
        out: Folder for the images; created.
        data: For classes and svm: the digits set; by default that of the training.
    """
    from fastnce.systems.directions import edit_folder

    trained, how = opened(run, **how)
    made = edit_folder(trained.network, out, data=data or trained.config.data, **how)
    print(f"Edited {made} latents into {out}; edit.png shows them")


@with_options_of(opened, "fastnce.systems.representation.write_features")
def features(run: Path, input: Path, out: Path, **how: Any) -> None:
    """Write the features of a folder of images, from a trained encoder.

    They are those of SimCLR, MoCo or SupCon before the projection head. The file has the arrays "features" (images x features,
    float32) and "names", the files' names below --input; a .safetensors file has the names in its metadata, as a JSON list.

    Args:
        run: Folder of a training run, or a .safetensors file of `fastnce export`.
        input: Folder of images, or one image.
        out: File to write: .npz or .safetensors.
    """
    from fastnce.training.runs import write_features

    trained, how = opened(run, **how)
    count, length = write_features(trained.network, trained.config, input, out, **how)
    print(f"Wrote {length} features of each of {count} images to {out}")


def inversion(
    run: Path,
    steps: int | None = None,
    other_shapes: Literal["error", "crop", "stretch"] | None = None,
    **how: Any,
) -> tuple[Any, dict[str, Any]]:
    """How a run inverts images, and the other options.

    Args:
        run: Folder of a training run.
        steps: Steps of the inversion; by default as many as in the training, or 1 behind another run.
        other_shapes: What becomes of images of another shape than the encoder's: error; crop takes the central part; stretch
            scales all of it. By default as in the training.
    """
    from fastnce.training.runs import inversion as of_run

    first = {name: how.pop(name) for name in ("first", "first_steps") if name in how}
    trained, how = opened(run, **how)
    return of_run(trained, steps=steps, other_shapes=other_shapes, **first), how


@with_options_of(opened, inversion, "fastnce.systems.inverting.invert_folder")
def invert(run: Path, input: Path, out: Path, **how: Any) -> None:
    """Find the latents of a folder of images, or of one, with a trained ReStyle encoder.

    Writes the images of each step in folders of their own, step-1 and so on; latents.npz, the latents of each step, with the files'
    names below --input; and steps.png, which shows some images, the average image, and the steps.

    Args:
        run: Folder of a training run of restyle, or a checkpoint of the published programs, .pt.
        input: Folder of images, or one image; faces aligned as the generator's training images.
        out: Folder for the results; created.
    """
    from fastnce.systems.inverting import invert_folder

    made, how = inversion(run, **how)
    count = invert_folder(made, input, out, **how)
    print(f"Inverted {count} image{'s' * (count != 1)} into {out}; steps.png shows some")


@with_options_of(opened, inversion, "fastnce.systems.inverting.invert_folder")
def bootstrap(
    run: Path, first: Path, input: Path, out: Path, first_steps: int = 1, **how: Any
) -> None:
    """Translate images between the generators of two runs: the first encoder's step, then those of the second from there.

    The second generator is a copy of the first that was fine-tuned to another look, its encoder trained with the first one's images.
    Writes what `fastnce invert` does; the first run's steps are first-1 and so on.

    Args:
        run: Folder of a training run of restyle with the second generator.
        first: Folder of one with the first generator.
        input: Folder of images, or one image.
        out: Folder for the results; created.
        first_steps: Steps of the first encoder.
    """
    invert(run, input, out, first=first, first_steps=first_steps, **how)


@with_options_of(opened, inversion, "fastnce.systems.inverting.visualize_steps")
def steps(
    run: Path,
    input: Path,
    out: Path,
    first: Path | None = None,
    first_steps: int | None = None,
    **how: Any,
) -> None:
    """Show what each step of an inversion makes of images, and where and how much it changes them.

    Writes steps.png, rows of some images, of the average image, and of the steps; and changes.png, heat maps of the root of the mean
    squared change over all images: above each step on a scale of its own, below all on one.

    Args:
        run: Folder of a training run of restyle.
        input: Folder of images, or one image.
        out: Folder for the pictures; created.
        first: Folder of a run whose encoder makes the first steps, as in `fastnce bootstrap`.
        first_steps: Steps of that encoder; by default 1.
    """
    from fastnce.systems.inverting import visualize_steps

    made, how = inversion(run, first=first, first_steps=first_steps, **how)
    maps = visualize_steps(made, input, out, **how)
    for name, values in zip(made.names, maps, strict=True):
        print(f"{name}: mean squared change {values.mean():.3g}")
    print(f"Wrote {out / 'steps.png'} and {out / 'changes.png'}")


@with_options_of(opened, "fastnce.systems.inversion_quality.evaluate_inversion")
def evaluate(
    run: Path | None = None,
    images: Path | None = None,
    data: Path | None = None,
    without_nce: Path | None = None,
    extractor: Path | None = None,
    segmenter: Path | None = None,
    labels: Path | None = None,
    label_kind: Literal["train-ids", "ids", "colours"] = "train-ids",
    direction: Literal["AtoB", "BtoA"] | None = None,
    value_range: tuple[float, float] | None = None,
    steps: int | None = None,
    first: Path | None = None,
    first_steps: int | None = None,
    targets: Path | None = None,
    out: Path | None = None,
    broken_files: Literal["error", "skip"] | None = None,
    **opening: Any,
) -> None:
    """Measure how good a run's translations, samples or features are, beside baselines.

    CUT and its kin: FID, KID, precision, recall, density and coverage of the translated test images, and content accuracy
    of digits. pix2pix: L1, PSNR and SSIM against the truth, and with --extractor those too. CFL: sharpness, saturation, L1,
    distances of patches and of features, and with --segmenter what can be read. ContraGAN: also intra-class FID, IS and class
    accuracy of samples. SimCLR, MoCo, SupCon: k-NN and linear accuracy of features. ReStyle: the errors of each step.

    Of a run that translates, the best checkpoint is judged beside the last one. Writes metrics.json and metrics.md into the
    run's folder, or into --out; for other data than the run's own metrics-NAME.json and metrics-NAME.md.

    Args:
        run: Folder of a training run.
        images: Instead of a run: folder of translated test images, made by any program.
        data: Folder of the data; by default that of the training.
        without_nce: CUT: folder of the same training with --lambda-nce 0, for a row of the table.
        extractor: TorchScript file whose features are compared, or torch-fidelity for its Inception; by default that of the
            training. The digits sets have their own, and the built-in sets of label maps judge.pt.
        segmenter: TorchScript file of a segmentation network with Cityscapes' 19 classes: scores the segmentations too. CFL: of
            the data's classes, by default the built-in sets' segmenter.pt; without --labels.
        labels: Folder of the label maps that the translations should show, found by their names.
        label_kind: What the label maps hold: train ids, Cityscapes' own ids, or its colours.
        direction: For --images, or a system of both directions: which domain is translated to which; AtoB if not given.
        value_range: The images' numbers that stand for black and white, where they are not of 8 bits or use all of 16; by
            default as in the training.
        steps: ReStyle: steps of the inversion; by default as in the training, or 1 behind another run.
        first: ReStyle: folder of a run whose encoder makes the first steps, as in `fastnce bootstrap`.
        first_steps: ReStyle: steps of that encoder; by default 1.
        targets: ReStyle: folder of data with the images that the reconstructions should show instead of those of --data, by the
            same names, such as the same digits in another look.
        out: Folder of the report, by default that of the run or of the images.
        broken_files: What a file that cannot be read does: skip leaves it out and names it, error stops; by default as in
            the training.
    """
    from fastnce.systems.judging import Segmentation, evaluate_images
    from fastnce.training.evaluation import Report, evaluate_run
    from fastnce.training.runtime import resolve_device

    if (run is None) == (images is None):
        raise UserError(
            "give either --run, a training's folder, or --images, one of translated images."
        )
    alone = segmenter is not None and labels is None and run is not None
    if (segmenter is None) != (labels is None) and not alone:
        raise UserError("--segmenter and --labels belong together: give both, or neither.")
    how = {
        "extractor": extractor,
        "segmentation": segmenter and labels and Segmentation(segmenter, labels, label_kind),
        "broken_files": broken_files,
        "value_range": value_range,
    }
    more = {name: opening.pop(name) for name in [*opening] if name not in OPENING}
    more |= {"steps": steps, "first": first, "first_steps": first_steps, "targets": targets}
    if images is not None:
        report = Report(out or images)
        for name, value in (more | {"without_nce": without_nce}).items():
            if value is not None:
                raise UserError(f"--{name.replace('_', '-')} is for --run. Leave it out.")
        _, table = evaluate_images(
            images,
            data,
            direction=direction or "AtoB",
            out=out,
            device=resolve_device(opening["device"]),
            **how,
        )
    else:
        trained, _ = opened(run, **opening)
        report = Report.of(trained, data, out)
        _, table = evaluate_run(
            trained,
            data,
            without_nce=without_nce,
            direction=direction,
            segmenter=segmenter if alone else None,
            report=report,
            **how,
            **more,
        )
    print(table)
    print(f"Written: {report.folder / report.stem}.json and .md")


def export(
    run: Path,
    out: Path,
    format: Literal["published", "cut", "safetensors", "onnx", "torchscript"] = "safetensors",
    label: str = "latest",
    module_prefix: bool = False,
    direction: Literal["AtoB", "BtoA"] | None = None,
    checkpoint: str = "last",
    weights: Literal["ema", "raw"] = "ema",
) -> None:
    """Write a run's network as safetensors, ONNX or TorchScript, or for the published repositories.

    Args:
        run: Folder of a training run.
        out: Folder for the files; created.
        format: published, or cut: LABEL_net_G.pth and its like, as the published repositories read them, or all in LABEL.pt.
            safetensors: one file,
            model.safetensors, with the network and its configuration. onnx, torchscript: model.onnx or
            model.torchscript.pt, a graph that runs without this package, for any batch and image size.
        label: The epoch in the names of the published layout.
        module_prefix: Put "module." before the names of the published layout's weights.
        direction: onnx and torchscript, for systems that learn both directions; by default that of the training.
        checkpoint: "last", "best", or the path of a checkpoint file.
        weights: The running average of the generator's weights, or the weights themselves, from which training goes on.
    """
    from fastnce.training.export import export_graph, export_published, export_shared

    trained, _ = opened(run, checkpoint, weights, "cpu")
    if format in ("onnx", "torchscript"):
        path, check = export_graph(trained, out, format, direction=direction)
        print(f"{path} ({check})")
        return
    if direction is not None:
        raise UserError(
            f"direction={direction} is for format=onnx and torchscript: format={format} holds all networks. Leave it out."
        )
    if format == "safetensors":
        print(export_shared(trained, out))
        return
    for path in export_published(trained, out, label=label, module_prefix=module_prefix):
        print(path)


@with_options_of(opened, "fastnce.training.patch_views.visualize_similarity")
def similarity(
    run: Path,
    input: Path,
    out: Path,
    points: tuple[str, ...] = (),
    weights: Literal["raw", "ema"] = "raw",
    **how: Any,
) -> None:
    """Translate an image, and show which patches of it the model takes to be similar to points of the result.

    Writes similarity.png, a row for each point and a column for each layer, and the translation, output.png.

    Args:
        run: Folder of a training run of a system that compares patches, such as cut.
        input: Image file.
        out: Folder for the pictures; created.
        points: Points of the result, each as X,Y in pixels from the left and the top; by default some that differ.
        weights: The weights that the projector was trained with, or their running average.
    """
    from fastnce.training.patch_views import PatchEncoder, visualize_similarity

    chosen = [_point(text) for text in points]
    trained, how = opened(run, weights=weights, **how)
    path = visualize_similarity(PatchEncoder.of(trained), input, out, points=chosen, **how)
    print(f"Wrote {path}")


@with_options_of(opened, "fastnce.training.patch_views.visualize_features")
def pca(
    run: Path, input: Path, out: Path, weights: Literal["raw", "ema"] = "raw", **how: Any
) -> None:
    """Show the main components of the patch features of images and of their translations, as colours.

    Writes pca-encoder.png and pca-projected.png, two rows for each image and a column for each layer. All rows share one
    basis, so equal colours are equal features.

    Args:
        run: Folder of a training run of a system that compares patches, such as cut.
        input: Image file, or a folder of images.
        out: Folder for the pictures; created.
        weights: The weights that the projector was trained with, or their running average.
    """
    from fastnce.training.patch_views import PatchEncoder, visualize_features

    trained, how = opened(run, weights=weights, **how)
    for path in visualize_features(PatchEncoder.of(trained), input, out, **how):
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


def _point(text: str) -> tuple[int, int]:
    try:
        x, y = text.split(",")
        return int(x), int(y)
    except ValueError:
        raise UserError(
            f"points: {text!r} is no point. Write whole numbers X,Y such as 12,20."
        ) from None
