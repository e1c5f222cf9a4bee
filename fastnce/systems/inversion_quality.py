"""How well images are inverted: step by step how far they are from their reconstructions, and what an edit leaves of the latent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce.data import LabelledImages
from fastnce.errors import UserError
from fastnce.networks import perceptual
from fastnce.networks.perceptual import with_channels
from fastnce.systems.directions import read_direction, sefa
from fastnce.systems.inverting import Inversion, at_size

# The row that holds an inversion as it is used, and the step of an edit along its direction of length 1.
INVERTED, EDIT = "inverted", 3.0
_BATCH = 16

_COLUMNS = {
    "l2": ("L2", ".4f"),
    "lpips": ("LPIPS", ".4f"),
    "similarity": ("similarity", ".3f"),
    "identity": ("identity", ".3f"),
    "moco": ("MoCo", ".3f"),
    "kept": ("class kept", ".3f"),
    "change": ("change", ".5f"),
    "distance": ("latent", ".2f"),
    "lec": ("LEC", ".2f"),
}


class Comparison(NamedTuple):
    """A number for reconstructions beside their images."""

    target: Callable[[Tensor, Tensor], Any]
    """From images (B, C, H, W) and their labels (B,), what all steps are compared with."""
    compare: Callable[[Tensor, Any], Tensor]
    """From reconstructions and that, the number of each image (B,)."""


def evaluate_inversion(
    inversion: Inversion,
    images: LabelledImages,
    data: Path,
    *,
    extractor: Path | None = None,
    lpips_backbone: Path | None = None,
    lpips_weights: Path | None = None,
    face_weights: Path | None = None,
    edit: Path | None = None,
    targets: LabelledImages | None = None,
) -> tuple[dict[str, Any], str]:
    """The errors of each step, with those of the average image beside them, and the latent's editability.

    Reconstructions are judged as they are saved, with 8 bits, at the encoder's size. A row for the average image, where every
    inversion starts, one for each step, one for the images themselves, and in the result "inverted", the last step again:

    - l2: mean squared difference; lpips; identity and moco: cosine of the features of the loss's network;
    - similarity: mean cosine of the extractor's features; kept: share of the images whose class a digits set's own classifier
      reads in the reconstruction;
    - change: mean of (y_t - y_{t-1})^2; distance: mean of ||w_t - w_avg||_F, which grows as the latent gets less editable;
    - lec, latent editing consistency (e4e): mean of ||w - e^-1(E(G(e(w))))||_F for the edit e(w) = w + 3 d. All images count; the
      published script drops batches beyond the first and the last percent.

    Args:
        inversion: how.
        images: test images, as the encoder takes them.
        data: the folder of their data.
        extractor: ReStyle: TorchScript file of the features of "similarity"; a digits set has its own.
        lpips_backbone: ReStyle: torchvision's AlexNet, for LPIPS; by default as in the training.
        lpips_weights: ReStyle: LPIPS' linear layers; by default as in the training.
        face_weights: ReStyle: ArcFace's IR-SE50, for the identity of faces; by default as in the training.
        edit: ReStyle: file of the direction d of LEC, as for `fastnce edit`; by default the generator's first of SeFa.
        targets: images, as `images`, that the reconstructions should show instead of these, such as the same in another look.

    Returns:
        The result, with "rows", and its table.

    Raises:
        UserError: no images, targets of other names, or a file that is not what it should be.
    """
    from fastnce.metrics.tables import measured, rows_table

    targets = targets or images
    for name, other in zip_longest(*(next(iter(x.files().values())) for x in (images, targets))):
        if name != other:
            raise UserError(
                f"targets: of {name} in {data} there is {other}. Name a folder of the same names."
            )
    given = {"lpips_backbone": lpips_backbone, "lpips_weights": lpips_weights}
    given |= {"face_weights": face_weights, "moco_weights": None}
    files = {name: path or _of_training(inversion.config, name) for name, path in given.items()}
    comparisons = _comparisons(inversion, images, data, extractor, files)
    generator = inversion.network.generator
    direction = sefa(generator, 1)[0] if edit is None else read_direction(edit, generator)
    rows = _rows(inversion, images, targets, comparisons)
    *_, last, _ = rows
    last["lec"] = _mean(
        editing_consistency(inversion, x, direction) for x, _, _ in _batches(images, targets)
    )
    notes = [
        f"{len(images)} images of {data}. change: mean squared, from the step before. latent: distance from the mean latent."
    ]
    table = rows_table(rows, measured(_COLUMNS, rows), notes, first="reconstruction")
    rows.append(last | {"name": INVERTED})
    return {"images": len(images), "steps": inversion.names, "rows": rows}, table


def _of_training(config: Any, name: str) -> Path | None:
    """The file that the training had; None, after a line on standard error, if it is there no more."""
    path = getattr(config, name)
    if path is None or path.exists():
        return path
    print(f"Measuring without {name}={path} of the training, which is not there.", file=sys.stderr)
    return None


def _batches(
    images: LabelledImages, targets: LabelledImages
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The images (B, C, H, W), their targets and their labels, in order."""
    for chosen in torch.arange(len(images)).split(_BATCH):
        x, y = (torch.stack([own.image(i) for i in chosen.tolist()]) for own in (images, targets))
        yield x, y, images.labels[chosen]


def _comparisons(
    inversion: Inversion,
    images: LabelledImages,
    data: Path,
    extractor: Path | None,
    files: dict[str, Path | None],
) -> dict[str, Comparison]:
    """What is measured, by the columns' names, on the inversion's device."""
    device = inversion.device
    found = {"l2": Comparison(lambda x, _: x, lambda y, x: (y - x).square().mean((1, 2, 3)))}
    for name, made, needed, is_distance in (
        ("lpips", perceptual.LPIPS, ("lpips_backbone", "lpips_weights"), True),
        ("identity", perceptual.IdentityLoss, ("face_weights",), False),
        ("moco", perceptual.MoCoLoss, ("moco_weights",), False),
    ):
        given = [files[file] for file in needed]
        if all(given):
            loss = made(*given).to(device)
            found[name] = Comparison(
                lambda x, _, loss=loss: loss.features(x),
                loss.per_image if is_distance else lambda y, f, loss=loss: 1 - loss.per_image(y, f),
            )
        elif any(given):
            missing = needed[given.index(None)]
            raise UserError(
                f"{missing} is missing: {name} needs {' and '.join(needed)}. Name its file."
            )
    judge = _judge(images, data, extractor, device)
    if judge is not None:
        found["similarity"] = Comparison(
            lambda x, _: F.normalize(judge(x)), lambda y, f: (F.normalize(judge(y)) * f).sum(1)
        )
        if judge.reads_labels:
            found["kept"] = Comparison(
                lambda _, label: label,
                lambda y, label: (judge.class_probabilities(y).argmax(1) == label).double(),
            )
    return found


def _judge(images: LabelledImages, data: Path, extractor: Path | None, device: torch.device) -> Any:
    """What similarity is measured with; None, after a line on standard error, where there is nothing."""
    from fastnce.demo import generation_evaluator
    from fastnce.demo.judges import DIGITS

    try:
        judge = generation_evaluator(data, extractor, device=device).to(device)
        if judge.reads_labels:
            judge = _Grey(judge)
            judge.reads_labels = images.class_names == DIGITS
            judge(images.image(0)[None].to(device))
    except (UserError, ValueError) as error:
        if extractor is not None:
            raise
        print(f"Measuring without similarity. {error}", file=sys.stderr)
        return None
    return judge


class _Grey:
    """The classifier of grey digits, for images of any colours."""

    def __init__(self, judge: Any) -> None:
        self.judge = judge

    def __call__(self, images: Tensor) -> Tensor:
        return self.judge(with_channels(images, 1))

    def class_probabilities(self, images: Tensor) -> Tensor:
        return self.judge.class_probabilities(with_channels(images, 1))


@torch.inference_mode()
def _rows(
    inversion: Inversion,
    images: LabelledImages,
    targets: LabelledImages,
    comparisons: dict[str, Comparison],
) -> list[dict[str, Any]]:
    """The mean over all images of each comparison, for the average image, for each step, and for the images themselves."""
    device, (latent_avg, average) = inversion.device, inversion.start
    names = ["average image", *inversion.names, "the images"]
    sums: list[dict[str, float]] = [{} for _ in names]
    for batch in _batches(images, targets):
        x, y, labels = (part.to(device) for part in batch)
        wanted = {name: c.target(y, labels) for name, c in comparisons.items()}
        steps = [(average.expand_as(x), latent_avg), *((s.image, s.latent) for s in inversion(x))]
        before = None
        for row, (image, latent) in zip(sums, [*steps, (x, None)], strict=True):
            seen = at_size(_as_saved(image), inversion.config.size)
            values = {name: c.compare(seen, wanted[name]) for name, c in comparisons.items()}
            if latent is not None:
                values["distance"] = (latent - latent_avg).flatten(1).norm(dim=1)
                if before is not None:
                    values["change"] = (seen - before).square().mean((1, 2, 3))
                before = seen
            for name, value in values.items():
                row[name] = row.get(name, 0.0) + value.double().sum().item()
    means = ({key: value / len(images) for key, value in row.items()} for row in sums)
    return [{"name": name} | row for name, row in zip(names, means, strict=True)]


def _as_saved(images: Tensor) -> Tensor:
    from fastnce.metrics.distribution import as_saved

    return as_saved(images.float()).to(images.device)


@torch.inference_mode()
def editing_consistency(inversion: Inversion, x: Tensor, direction: Tensor) -> Tensor:
    """||w - (E(G(w + 3 d)) - 3 d)||_F (B,) of images on the CPU, with w = E(x) and E all the steps of an inversion.

    `direction` d is (D,) or (k, D). Source: Tov et al., SIGGRAPH 2021, "latent editing consistency".
    """
    edit = EDIT * direction.to(inversion.device)
    latent = inversion.latent(x.to(inversion.device))
    edited = at_size(
        inversion.network.generator(latent + edit, noise="fixed"), inversion.config.size
    )
    return (latent - (inversion.latent(edited) - edit)).flatten(1).norm(dim=1)


def _mean(parts: Iterator[Tensor]) -> float:
    return torch.cat(list(parts)).double().mean().item()
