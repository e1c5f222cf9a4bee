"""From a run's times to the table of :mod:`fastnce.backends.dispatch`, ready to be pasted."""

from __future__ import annotations

from typing import Any

from fastnce.backends import dispatch

# The sizes of the tensor by which an op's backend is chosen, from those of a case.
_CHOSEN_BY = {
    "info_nce": lambda s: (1, s["N"], s["D"]),
    "nt_xent": lambda s: (2 * s["N"], s["D"]),
    "patch_nce": lambda s: (s["B"], s["S"], s["D"]),
    "sample_patches": lambda s: (s["B"], 3, s["image"] + 6, s["image"] + 6),
    "conditional_contrastive": lambda s: (s["N"], s["D"]),
    "sup_con": lambda s: (s["N"], s["D"]),
    "pairwise_cosine_similarity": lambda s: tuple(s[k] for k in ("B", "N", "D") if k in s),
}


def points(results: list[dict[str, Any]]) -> dict[str, tuple[dispatch.Point, ...]]:
    """op -> one point for each dtype and sizes at which several backends were timed.

    Cases of the same sizes (with and without the keys' gradient, say) are added up, over the backends that ran them all.
    """
    found: dict[tuple, list[dict[str, float]]] = {}
    for entry in results:
        times = _times(entry)
        if times:
            sizes = _CHOSEN_BY[entry["op"]](entry["shape"])
            op = "tap_patches" if "alone" in entry else entry["op"]
            key = (op, entry["dtype"], sizes)
            found.setdefault(key, []).append(times)
    table: dict[str, list[dispatch.Point]] = {}
    for (op, dtype, sizes), cases in found.items():
        common = [name for name in cases[0] if all(name in times for times in cases)]
        total = {name: round(sum(times[name] for times in cases), 1) for name in common}
        if len(total) > 1:
            table.setdefault(op, []).append(dispatch.Point(dtype, sizes, total))
    return {op: tuple(rows) for op, rows in table.items()}


def _times(entry: dict[str, Any]) -> dict[str, float]:
    """Microseconds of the package's backends; eager is its backend ``torch``."""
    found = {}
    for row in entry["providers"]:
        exact = not row.get("rounds_products") and not row.get("other_function")
        if row["seconds"] and exact and (row["ours"] or row["name"] == "eager"):
            name = "torch" if row["name"] == "eager" else row["name"]
            found[name] = 1e6 * row["seconds"]["median"]
    return found


def python(generation: str, table: dict[str, tuple[dispatch.Point, ...]]) -> str:
    """The lines for ``fastnce.backends.dispatch.MEASURED``."""
    lines = [f'    "{generation}": {{']
    for op, rows in table.items():
        lines += [f'        "{op}": (']
        lines += [f"            {row!r}," for row in rows]
        lines += ["        ),"]
    return "\n".join([*lines, "    },"])
