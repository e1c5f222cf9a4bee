"""`fastnce ablate`."""

from __future__ import annotations

from pathlib import Path

from fastnce.cli.parsing import run_with_options


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
        count = len(only or ABLATIONS[variant].choices)
        print(f"{variant}: {count} choices, {len(seeds)} seeds, a run in {out} for each")
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
        print(f"Written: {out / 'ablation'}.json, .md and .png")

    run_with_options(f"ablate {variant}", run_ablate, args[1:])
    return 0
