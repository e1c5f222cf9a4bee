"""Editing with a style generator: directions in its latent space, found without labels or from classes, and pictures along them.

Sources: Shen and Zhou, "Closed-Form Factorization of Latent Semantics in GANs", CVPR 2021 (SeFa); Härkönen et al., "GANSpace",
NeurIPS 2020 (principal components); Shen et al., "InterFaceGAN", CVPR 2020 (the plane between two classes).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.files import atomic_path, expect_apart
from fastnce.networks.style_generator import StyleGenerator
from fastnce.networks.weights import load_scripted, read_plain
from fastnce.systems.generating import SPLITS
from fastnce.systems.representation import import_safetensors
from fastnce.systems.stylegan2 import images_of, sample_latents

_BATCH = 64
_ROWS = 16  # of the picture of all


def style_generator(network: nn.Module) -> StyleGenerator:
    """The generator that a network is, or holds as its attribute `generator`."""
    found = getattr(network, "generator", network)
    if not isinstance(found, StyleGenerator):
        raise UserError(
            f"{type(network).__name__} holds no StyleGAN2 generator, so there is no latent space to edit in. "
            "Name a run of stylegan2 or restyle."
        )
    return found


def sefa(generator: StyleGenerator, count: int, styles: Sequence[int] = ()) -> Tensor:
    """The directions that change the convolutions' styles most: (count, D), orthogonal, of length 1, the strongest first.

    Right singular vectors of the modulation weights of all convolutions but those of ToRGB, stacked; with `styles` of those that
    the latents at these places drive.
    """
    layers = [generator.conv1, *generator.convs]
    chosen = [layer for i, layer in enumerate(layers) if not styles or i in styles]
    if not chosen:
        raise UserError(
            f"styles={tuple(styles)} drive no convolution. Use places from 0 to {len(layers) - 1}."
        )
    weights = torch.cat([layer.conv.modulation.weight.detach().double() for layer in chosen])
    vectors = torch.linalg.svd(weights, full_matrices=False).Vh
    return _first(vectors, count).to(generator.latent_avg)


def principal_directions(
    generator: StyleGenerator, count: int, *, samples: int = 10_000, seed: int = 0
) -> Tensor:
    """The principal components of mapped samples: (count, D), orthogonal, each as long as the samples' standard deviation along it."""
    w = sample_latents(generator, samples, seed).double()
    variances, vectors = torch.linalg.eigh(torch.cov(w.T))
    scaled = (vectors * variances.clamp_min(0).sqrt()).T.flip(0)
    return _first(scaled, count).to(generator.latent_avg)


def class_direction(
    generator: StyleGenerator,
    classify: Callable[[Tensor], Tensor],
    start: int,
    end: int,
    *,
    samples: int = 2_000,
    seed: int = 0,
) -> Tensor:
    """From the mean latent of the samples of one class to that of another: (D,).

    `classify` takes images (N, C, S, S) in [-1, 1] to the numbers of their classes, (N,).

    Raises:
        UserError: no sample is of one of the classes.
    """
    one, other = _of_classes(generator, classify, start, end, samples, seed)
    return other.mean(0) - one.mean(0)


def boundary_direction(
    generator: StyleGenerator,
    classify: Callable[[Tensor], Tensor],
    start: int,
    end: int,
    *,
    samples: int = 2_000,
    seed: int = 0,
) -> Tensor:
    """The normal of the plane between the samples of two classes, towards the second: (D,), as long as their standard deviation along it.

    The plane is that of a linear support vector machine, with classes of equal weight. Other arguments and errors as
    `class_direction`; needs scikit-learn. Source: Shen et al., "Interpreting the Latent Space of GANs for Semantic Face Editing",
    CVPR 2020 (InterFaceGAN).
    """
    if importlib.util.find_spec("sklearn") is None:
        raise UserError(
            "direction=svm needs scikit-learn, which is not installed. Run: pip install 'fastnce[demo]'"
        )
    from sklearn.svm import LinearSVC

    groups = _of_classes(generator, classify, start, end, samples, seed)
    w = torch.cat(groups).cpu().double()
    labels = torch.arange(2).repeat_interleave(torch.tensor([len(group) for group in groups]))
    machine = LinearSVC(dual=False, class_weight="balanced", max_iter=10_000)
    machine.fit(((w - w.mean(0)) / w.std()).numpy(), labels.numpy())
    normal = torch.nn.functional.normalize(torch.from_numpy(machine.coef_[0]), dim=0)
    return ((w @ normal).std() * normal).to(generator.latent_avg)


def _of_classes(
    generator: StyleGenerator,
    classify: Callable[[Tensor], Tensor],
    start: int,
    end: int,
    samples: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """The latents (N, D) of the samples of either class."""
    if start == end:
        raise UserError(f"classes={start} {end}: name two that differ.")
    w = sample_latents(generator, samples, seed)
    parts = w.split(_BATCH)
    labels = torch.cat([classify(images_of(generator, part)) for part in parts]).to(w.device)
    for label in (start, end):
        if not (labels == label).any():
            found = ", ".join(map(str, sorted(set(labels.tolist()))))
            raise UserError(
                f"classes={start} {end}: none of {samples} samples is of class {label}, only of {found}. Use two of these."
            )
    return w[labels == start], w[labels == end]


_BY_CLASSES = {"classes": class_direction, "svm": boundary_direction}
_METHODS = ("sefa", "pca", *_BY_CLASSES)


def read_direction(path: Path | str, generator: StyleGenerator) -> Tensor:
    """A direction (D,), or (num_styles, D) with its own for each place, from a file: .npy, or the tensor in a .pt or .pth.

    Axes of length 1 in front are left out.

    Raises:
        UserError: no such file, another kind of file, or numbers of another shape.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".pt", ".pth"):
        raise UserError(
            f"direction={path} is neither {', '.join(_METHODS)} nor a file that ends in .npy, .pt or .pth."
        )
    value = _content(path)
    value = value.reshape([n for i, n in enumerate(value.shape) if n > 1 or i == value.ndim - 1])
    shapes = (generator.latent_dim,), (generator.num_styles, generator.latent_dim)
    if value.shape not in shapes:
        raise UserError(
            f"{path}: holds numbers of shape {value.shape}, expected {shapes[0]} or {shapes[1]}. "
            "Give a direction of this generator's w."
        )
    return torch.from_numpy(value).to(generator.latent_avg)


def read_latents(path: Path | str, generator: StyleGenerator) -> tuple[list[str], Tensor]:
    """The names and latents (N, num_styles, D) in a file of `fastnce invert`, .npz or .safetensors; of several steps the last.

    Raises:
        UserError: no such file, or one without latents of this generator.
    """
    path = Path(path)
    if path.suffix not in (".npz", ".safetensors"):
        raise UserError(f"latents={path}: expected a .npz or .safetensors of `fastnce invert`.")
    content = _content(path)
    names, latents = list(content["names"]), torch.as_tensor(content["latents"])
    if latents.ndim == 4:  # (N, steps, k, D)
        latents = latents[:, -1]
    if tuple(latents.shape[1:]) != (generator.num_styles, generator.latent_dim):
        raise UserError(
            f"latents={path}: have the shape {tuple(latents.shape)}, expected (N, {generator.num_styles}, {generator.latent_dim}) "
            "as the generator's are. Invert with an encoder of this generator."
        )
    return names, latents.to(generator.latent_avg)


def _content(path: Path) -> Any:
    """The numbers of a direction, or the latents and names, in a file; no code in it is run."""
    if path.suffix in (".pt", ".pth"):
        value = read_plain(path, "Name a file with one tensor.")
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: holds {type(value).__name__}, expected one tensor.")
        return value.detach().float().numpy()
    if not path.is_file():
        raise UserError(f"{path}: no such file. Name an existing one.")
    safetensors = import_safetensors() if path.suffix == ".safetensors" else None
    try:
        if safetensors is not None:
            with safetensors.safe_open(path, "pt") as file:
                names = json.loads(file.metadata()["names"])
                return {"names": names, "latents": file.get_tensor("latents")}
        content = np.load(path, allow_pickle=False)
        if path.suffix == ".npz":
            return {name: content[name] for name in ("names", "latents")}
        return content.astype(np.float32)
    except Exception as error:  # each reader has its own
        raise UserError(f"{path}: is damaged, or not as fastnce writes it ({error}).") from error


def edited(
    generator: StyleGenerator,
    w: Tensor,
    direction: Tensor,
    factors: Sequence[float],
    styles: Sequence[int] = (),
) -> Tensor:
    """Images of `w + factor * direction` with the fixed noise: (B, len(factors), C, S, S), on the CPU, without gradients.

    Args:
        generator: its mode does not matter.
        w: (B, D) or (B, num_styles, D).
        direction: (D,) or (num_styles, D).
        factors: how far.
        styles: the places that move, the others keep their latents; by default all.
    """
    wide = generator.spread(w)
    moves = torch.zeros(generator.num_styles, 1).to(w)
    moves[list(styles) if styles else slice(None)] = 1
    steps = torch.tensor(factors).to(w)[:, None, None] * (moves * direction)  # (F, k, D)
    latents = (wide[:, None] + steps).flatten(0, 1)
    return images_of(generator, latents, _BATCH).unflatten(0, (len(w), -1))


def edit_folder(
    network: nn.Module,
    out: Path,
    *,
    direction: str = "sefa",
    index: int = 0,
    classes: tuple[int, int] | None = None,
    classifier: Path | None = None,
    data: Path | None = None,
    latents: Path | None = None,
    count: int = 6,
    truncation: float = 0.7,
    styles: tuple[int, ...] = (),
    reach: float = 3.0,
    columns: int = 7,
    seed: int = 0,
) -> int:
    """Writes `out/NNNN/NN.png`, the images of each latent along a direction, `out/edit.png`, their strips, and `out/direction.npy`.

    Args:
        network: a `StyleGenerator`, or what holds one.
        out: folder; created.
        direction: sefa: what changes the layers' styles most. pca: a principal component of the latents, in standard
            deviations. classes: from the mean of one class to that of another. svm: the normal of the plane between two classes.
            Or a file: .npy, .pt or .pth.
        index: For sefa and pca: which, 0 the strongest.
        classes: For classes and svm: the numbers of the two.
        classifier: For classes and svm: TorchScript file of a network from images in [-1, 1] to a logit for each class; by default
            that of a digits set.
        data: For classes and svm: the digits set; by default that of the training.
        latents: File of `fastnce invert` with the latents to edit; by default samples.
        count: Samples to edit.
        truncation: Of the samples: 1 takes them as they are, less nearer to the mean.
        styles: The places of the latent that move, 0 the coarsest; by default all.
        reach: How far: from -reach to +reach times the direction.
        columns: Images of each latent, an odd number for the unchanged one in the middle.
        seed: Seed of the samples, which are those of `fastnce generate`.

    Returns:
        The number of latents.

    Raises:
        UserError: a value out of range, a file that does not fit.
    """
    from fastnce.data import save_image
    from fastnce.viz.plots import save_sample_grid

    generator = style_generator(network)
    for name, value, least in (("count", count, 1), ("columns", columns, 2), ("index", index, 0)):
        if value < least:
            raise UserError(f"{name}={value} is too small. Use {name} >= {least}.")
    expect_apart(out, [Path(data) / split for split in SPLITS] if data else [])
    if not all(0 <= i < generator.num_styles for i in styles):
        raise UserError(f"styles={styles}: use places from 0 to {generator.num_styles - 1}.")
    if latents is None:
        names = [str(i) for i in range(count)]
        w = generator.truncate(sample_latents(generator, count, seed), truncation)
    else:
        names, w = read_latents(latents, generator)
    if direction == "sefa":
        moved = sefa(generator, index + 1, styles)[-1]
    elif direction == "pca":
        moved = principal_directions(generator, index + 1)[-1]
    elif direction in _BY_CLASSES:
        if classes is None:
            raise UserError(f"direction={direction} needs two classes. Give --classes FROM TO.")
        classify = _classifier(generator, classifier, data)
        moved = _BY_CLASSES[direction](generator, classify, *classes)
    else:
        moved = read_direction(direction, generator)
    rows = {}
    factors = np.linspace(-reach, reach, columns).tolist()
    for number, (name, latent) in enumerate(zip(names, w, strict=True)):
        images = edited(generator, latent[None], moved, factors, styles)[0]
        for column, image in enumerate(images):
            save_image(image, Path(out) / f"{number:04d}" / f"{column:02d}.png")
        if number < _ROWS:
            rows[name] = list(images)
    save_sample_grid(rows, Path(out) / "edit.png")
    with atomic_path(Path(out) / "direction.npy") as temporary:
        np.save(temporary, moved.cpu().numpy())
    return len(names)


def _first(vectors: Tensor, count: int) -> Tensor:
    """The first rows, each with the sign that makes its largest number positive."""
    if count > len(vectors):
        raise UserError(
            f"{count} directions are asked for, and there are {len(vectors)}. Use fewer."
        )
    vectors = vectors[:count]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * largest.sign()


def _classifier(
    generator: StyleGenerator, file: Path | None, data: Path | None
) -> Callable[[Tensor], Tensor]:
    from fastnce.demo import load_digit_classifier
    from fastnce.demo.sets import kind_of

    if file is not None:
        network: Callable[[Tensor], Tensor] = load_scripted("classifier", file)[0]
        channels = generator.image_channels
    elif data is not None and kind_of(data) == "digits":
        judge = load_digit_classifier(data)
        if judge.image_size != generator.image_size:
            raise UserError(
                f"data={data}: its digits have {judge.image_size} pixels and the generator's images {generator.image_size}. "
                "Give --classifier FILE."
            )
        network, channels = judge.logits, 1
    else:
        raise UserError("Two classes need --classifier FILE, or --data of a digits set.")

    @torch.no_grad()
    def classify(images: Tensor) -> Tensor:
        seen = images if channels == images.shape[1] else images.mean(1, keepdim=True)
        return network(seen).argmax(1)

    return classify
