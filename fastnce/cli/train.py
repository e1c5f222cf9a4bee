"""`fastnce train`."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import MISSING, fields
from typing import get_type_hints

from fastnce.cli.parsing import import_tyro, named_in, parse
from fastnce.errors import UserError


def train(args: list[str]) -> int:
    """Train a model on folders of images. Run the same command again to resume."""
    tyro = import_tyro()
    from fastnce.training import train as run_training
    from fastnce.training.build import known, layered_values, required_fields
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
    needed = [f.name for f in fields(config_class) if f.default is MISSING]
    given = {*values, *named_in(rest)}
    config = parse(
        config_class,
        get_type_hints(config_class),
        [name for name in required_fields(config_class, given) if name not in values],
        f"fastnce train {variant}",
        rest,
        also=("preset", "config", "dry_run"),
        default=config_class(**(dict.fromkeys(needed, tyro.MISSING) | values)),
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
