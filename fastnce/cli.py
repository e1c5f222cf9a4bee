"""The command line: ``fastnce COMMAND ...``, also ``python -m fastnce``."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal

from fastnce.errors import UserError

INTERRUPTED = 130


def train(args: list[str]) -> int:
    """Train a model on folders of images. Run the same command again to resume."""
    tyro = _import_tyro()
    from fastnce.training import train as run_training
    from fastnce.training.build import check_options, known, layered_values
    from fastnce.training.config import to_dict
    from fastnce.training.presets import PRESETS, VARIANTS
    from fastnce.training.ranks import leave

    if not args or args[0] in ("-h", "--help"):
        print(f"usage: fastnce train {{{','.join(VARIANTS)}}} --data DIR --out DIR [OPTIONS]\n")
        print("fastnce train cut --help shows the options of CUT.")
        return 0
    variant = known(args[0], VARIANTS, "model")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--config")
    first.add_argument("--dry-run", action="store_true")
    chosen, rest = first.parse_known_args(args[1:])

    config_class, values = layered_values(variant, chosen.preset, chosen.config)
    check_options(config_class, values, rest)
    required = {"data": tyro.MISSING, "out": tyro.MISSING}
    config = tyro.cli(
        config_class,
        default=config_class(**(required | values)),
        prog=f"fastnce train {variant}",
        args=rest,
        description=(
            f"Also: --preset {{{','.join(PRESETS[config_class.system])}}} sets several options at once; --config FILE reads options from a JSON "
            "file, such as the config.json of a run; --dry-run prints the resulting configuration and stops. "
            "Later ones win: defaults, preset, file, options."
        ),
    )
    if chosen.dry_run:
        print(json.dumps(to_dict(config), indent=2))
        return 0
    _check_requested_backend()
    run_training(config)
    leave()
    return 0


def _check_requested_backend() -> None:
    from fastnce import backends

    name, known_backends = os.environ.get("FASTNCE_BACKEND"), backends.available()
    if name and name not in known_backends:
        raise UserError(
            f"FASTNCE_BACKEND={name} is unknown. Use one of: {', '.join(known_backends)}."
        )
    if name and known_backends[name] != "ok":
        raise UserError(f"FASTNCE_BACKEND={name} cannot run here: {known_backends[name]}.")


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

    _tyro("translate", run_translate, args)
    return 0


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

        target = resolve_device(device)
        generator, config = load_generator(run, which=weights, checkpoint=checkpoint, device=target)
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
        print(f"Generated {count} images into {out}")

    # One class is a natural thing to ask for.
    _tyro("generate", run_generate, ["--classes" if arg == "--class" else arg for arg in args])
    return 0


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

    _tyro("evaluate", run_evaluate, args)
    return 0


def ablate(args: list[str]) -> int:
    """Train with one choice changed at a time, over several seeds, and compare."""
    from fastnce.training.ablation import ABLATIONS, ablate
    from fastnce.training.build import known

    if not args or args[0] in ("-h", "--help"):
        print(f"usage: fastnce ablate {{{','.join(ABLATIONS)}}} --data DIR --out DIR [OPTIONS]\n")
        for name, ablation in ABLATIONS.items():
            print(f"{name}: {'; '.join(ablation.choices)}.")
        return 0
    variant = known(args[0], ABLATIONS, "ablation")

    def run_ablate(
        data: Path,
        out: Path,
        preset: str | None = "digits",
        seeds: tuple[int, ...] = (0, 1, 2),
        only: tuple[str, ...] = (),
        steps: int | None = None,
    ) -> None:
        """A run of its own for each choice and seed, evaluated; ablation.json, .md and .png compare them.

        Run the same command again to resume, or with more seeds or choices to add to it.

        Args:
            data: Folder of the data.
            out: Folder for the runs and the comparison; created.
            preset: Preset of all runs.
            seeds: Seeds; from two on there is a spread.
            only: Compare these choices only, the first one with the others; by default all.
            steps: Steps of each run, if not those of the preset.
        """
        _, table = ablate(
            variant,
            data=data,
            out=out,
            preset=preset,
            seeds=seeds,
            only=only,
            overrides={} if steps is None else {"steps": steps},
        )
        print(table)

    _tyro(f"ablate {variant}", run_ablate, args[1:])
    return 0


def data(args: list[str]) -> int:
    """Write one of the built-in data sets."""

    def digits_photos(out: Path, photo: str = "coffee", seed: int = 0) -> None:
        """Real handwritten digits (A) and the same kind of digits over a photograph (B), 32 x 32, unpaired.

        Args:
            out: Folder for trainA, trainB, testA and testB; created.
            photo: The photograph, one of those that scikit-learn and scikit-image carry.
            seed: Seed of the split, the noise and the crops.
        """
        from fastnce.data import write_digits_photos

        write_digits_photos(out, seed=seed, photo=photo)

    def photos(out: Path, size: int = 128, seed: int = 0) -> None:
        """Two folders of crops from real photographs, for the real-size path.

        Args:
            out: Folder for trainA, trainB, testA and testB; created.
            size: Side of the crops in pixels.
            seed: Seed of the crops.
        """
        from fastnce.data import write_photos

        write_photos(out, size=size, seed=seed)

    def digits(out: Path, size: int = 16, seed: int = 0) -> None:
        """Real handwritten digits in 10 class folders, greyscale.

        Args:
            out: Folder for train/<digit> and test/<digit>; created.
            size: Side of the images in pixels, 16 or 32.
            seed: Seed of the split.
        """
        from fastnce.data import write_digits

        write_digits(out, size=size, seed=seed)

    def photo_crops(out: Path, seed: int = 0) -> None:
        """Crops of seven real photographs, 32 x 32, in class folders: the class is the photograph.

        Args:
            out: Folder for train/<photograph> and test/<photograph>; created.
            seed: Seed of the crops.
        """
        from fastnce.data import write_photo_crops

        write_photo_crops(out, seed=seed)

    sets = {
        "digits": digits,
        "digits-photos": digits_photos,
        "photo-crops": photo_crops,
        "photos": photos,
    }
    _tyro("data", sets, args)
    return 0


def doctor(args: list[str]) -> int:
    """Show what is installed, which backends run here, and what is missing."""
    from fastnce.doctor import report

    _no_arguments("doctor", args)
    print(report())
    return 0


def build(args: list[str]) -> int:
    """Compile the native library against the installed torch."""
    from fastnce.build import BuildError
    from fastnce.build import build as build_library

    _no_arguments("build", args)
    try:
        print(f"Native library: {build_library()}")
    except BuildError as error:
        raise UserError(str(error)) from error
    return 0


def bench(args: list[str]) -> int:
    """Time the ops against their rivals; needs a checkout of the repository."""
    sys.path.insert(0, os.getcwd())
    try:
        from benchmarks.__main__ import main as benchmarks_main
    except ModuleNotFoundError as error:
        raise UserError(
            "the benchmarks are not part of the installed package. Run this in a checkout of the repository."
        ) from error
    return benchmarks_main(args)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "translate": translate,
    "generate": generate,
    "evaluate": evaluate,
    "ablate": ablate,
    "data": data,
    "bench": bench,
    "build": build,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0, or 2 after a mistake in the command, whose one line is on standard error; 130 after Ctrl-C.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0
    if args[0] == "--version":
        import fastnce

        print(f"fastnce {fastnce.__version__}")
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        return _fail("fastnce", f"no command {name!r}. {nearest(name, COMMANDS)}")
    try:
        return COMMANDS[name](rest)
    except BrokenPipeError:  # such as `fastnce doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        if os.environ.get("FASTNCE_DEBUG"):
            raise
        return _fail(f"fastnce {name}", str(error))
    except KeyboardInterrupt:
        print(f"\nfastnce {name}: interrupted", file=sys.stderr)
        return INTERRUPTED


def nearest(name: str, names: Sequence[str] | dict) -> str:
    """``Did you mean 'train'? Expected one of: ...``."""
    close = difflib.get_close_matches(name, names, n=1)
    guess = f"Did you mean {close[0]!r}? " if close else ""
    return f"{guess}Expected one of: {', '.join(names)}."


def _help() -> str:
    lines = [
        "usage: fastnce COMMAND ...",
        "",
        "Fused exact contrastive losses, and CUT and ContraGAN on them.",
        "",
    ]
    lines += [f"  {name:10} {function.__doc__}" for name, function in COMMANDS.items()]
    lines += [
        "",
        "fastnce COMMAND --help shows a command's options. fastnce --version shows the version.",
    ]
    return "\n".join(lines)


def _fail(who: str, message: str) -> int:
    print(f"{who}: error: {message}", file=sys.stderr)
    return 2


def _no_arguments(command: str, args: list[str]) -> None:
    if args in (["-h"], ["--help"]):
        print(f"usage: fastnce {command}\n\n{COMMANDS[command].__doc__}")
        raise SystemExit(0)
    if args:
        raise UserError(f"takes no arguments, got {' '.join(args)!r}.")


def _tyro(command: str, function: Callable | dict[str, Callable], args: list[str]) -> None:
    """Parses ``args`` after the signature of ``function`` (or of the one the first argument names), and calls it."""
    tyro, prog = _import_tyro(), f"fastnce {command}"
    if isinstance(function, dict):
        tyro.extras.subcommand_cli_from_dict(function, prog=prog, args=args)
    else:
        tyro.cli(function, prog=prog, args=args)


def _import_tyro() -> ModuleType:
    try:
        import tyro
    except ModuleNotFoundError as error:
        raise UserError(
            "this command needs the packages for training. Install them with: pip install 'fastnce[train]'"
        ) from error
    return tyro


if __name__ == "__main__":
    sys.exit(main())
