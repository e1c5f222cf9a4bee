"""`fastnce train` and `fastnce ablate`."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from fastnce.cli.parsing import import_tyro, named_in, parse, run_with_options
from fastnce.errors import known


def train(args: list[str]) -> int:
    """Train a model on folders of images. Run the same command again to resume."""
    tyro = import_tyro()
    from fastnce.systems import of_variant, options, variants
    from fastnce.training import train as run_training
    from fastnce.training.config import layered_values, required_fields, to_dict
    from fastnce.training.ranks import leave

    if not args or args[0] in ("-h", "--help"):
        print(f"usage: fastnce train {{{','.join(variants())}}} --data DIR --out DIR [OPTIONS]\n")
        print("fastnce train cut --help shows the options of CUT.")
        return 0
    variant = known(args[0], variants(), "model")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--config")
    first.add_argument("--dry-run", action="store_true")
    first.add_argument("--no-verify", action="store_true")
    chosen, rest = first.parse_known_args(args[1:])

    config_class, values = layered_values(variant, chosen.preset, chosen.config)
    needed = [f.name for f in fields(config_class) if f.default == Path()]
    given = {*values, *named_in(rest)}
    config = parse(
        config_class,
        get_type_hints(config_class),
        [name for name in required_fields(given) if name not in values],
        f"fastnce train {variant}",
        rest,
        also=("preset", "config", "dry_run", "no_verify"),
        default=config_class(**(dict.fromkeys(needed, tyro.MISSING) | values)),
        description=(
            f"Also: --preset {{{','.join(of_variant(variant).presets)}}} sets several options at once; --config FILE reads options from a JSON "
            "file, such as the config.json of a run; --dry-run prints the resulting configuration and stops; --no-verify does not verify the kernels of a new GPU. "
            "Later ones win: defaults, preset, file, options."
        ),
    )
    if chosen.dry_run:
        print(json.dumps(to_dict(config), indent=2))
        return 0
    options.backend_is_there(os.environ.get("FASTNCE_BACKEND") or None, "FASTNCE_BACKEND")
    run_training(config, verify=not chosen.no_verify)
    leave()
    return 0


def ablate(args: list[str]) -> int:
    """Train with one choice changed at a time, over several seeds, and compare."""
    from fastnce.training.ablation import ablate as compare
    from fastnce.training.ablation import ablations

    choices = ablations()
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: fastnce ablate {{{','.join(choices)}}} --data DIR --out DIR [OPTIONS]\n")
        for name, ablation in choices.items():
            print(f"{name}: {'; '.join(ablation.choices)}.")
        return 0
    variant = known(args[0], choices, "ablation")

    def run_ablate(
        data: Path,
        out: Path,
        preset: str | None = choices[variant].preset,
        seeds: tuple[int, ...] = (0, 1, 2),
        only: tuple[str, ...] = (),
        steps: int | None = None,
        config: Path | None = None,
    ) -> None:
        """A run of its own for each choice and seed, evaluated; ablation.json, .md and .png compare them.

        Run the same command again to resume, or with more seeds or choices to add to it.

        Args:
            data: Folder of the data.
            out: Folder for the runs and the comparison; created.
            preset: Preset of all runs.
            seeds: Seeds; from two on there is a spread.
            only: Compare these choices only, the first one with the others.
            steps: Steps of each run, if not those of the preset.
            config: JSON file with options of all runs, such as those of other data or the vgg_weights of CFL's choices of VGG19,
                which are otherwise left out.
        """
        print(f"{variant}: {len(seeds)} seeds, a run in {out} for each and for each choice")
        _, table = compare(
            variant,
            data=data,
            out=out,
            preset=preset,
            seeds=seeds,
            only=only,
            config_file=config,
            overrides={} if steps is None else {"steps": steps},
        )
        print(table)
        print(f"Written: {out / 'ablation'}.json, .md and .png")

    run_with_options(f"ablate {variant}", run_ablate, args[1:])
    return 0
