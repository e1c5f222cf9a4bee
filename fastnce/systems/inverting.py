"""Inverting images into the latent space of a generator, by small steps: the loop of ReStyle, and encoder bootstrapping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.files import expect_apart
from fastnce.systems.system import image_batches
from fastnce.systems.translation import input_channels

# Images inverted at a time where nothing else is said, and those that a picture of steps shows.
_BATCH, _COLUMNS = 16, 8


class Step(NamedTuple):
    """One step of an inversion."""

    image: Tensor
    """(B, C, S, S): the reconstruction, as the generator makes it."""
    seen: Tensor
    """(B, C, H, W): the same at the encoder's size, for losses and for the next step."""
    latent: Tensor
    """(B, k, D): the generator's styles."""


def at_size(image: Tensor, size: tuple[int, int]) -> Tensor:
    """`image` (B, C, S, S) at the encoder's size (H, W): averaged to a square of the longer side, its middle kept.

    Average pooling repeats the pixels of a smaller image. Of 192 x 256 (cars) rows 32 to 223 of 256 are kept.
    """
    side = max(size)
    top, left = ((side - length) // 2 for length in size)
    pooled = F.adaptive_avg_pool2d(image, (side, side))
    return pooled[..., top : top + size[0], left : left + size[1]]


@torch.no_grad()
def average_image(generator: nn.Module, size: tuple[int, int]) -> Tensor:
    """The image of the mean latent with the fixed noise, (1, C, H, W), at the encoder's `size` (H, W)."""
    latent = generator.latent_avg.expand(1, generator.num_styles, -1)
    return at_size(generator(latent, noise="fixed"), size)


def average_start(generator: nn.Module, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where an inversion begins: w_0 (1, k, D), the mean latent, and y_0, its `average_image`."""
    latent = generator.latent_avg.detach().expand(1, generator.num_styles, -1)
    return latent, average_image(generator, size)


def iterate(
    encoder: nn.Module,
    generator: nn.Module,
    x: Tensor,
    *,
    steps: int,
    start: tuple[Tensor, Tensor] | None = None,
    noise: str = "fixed",
) -> Iterator[Step]:
    """The steps of an inversion, as many as are asked for:

        w_t = w_{t-1} + E(cat(x, y_{t-1})),   y_t = pool(G(w_t)),   t = 1..steps

    w_{t-1} and y_{t-1} are detached, so that the graph of a step ends where it began: a training calls `backward` on each step's
    loss before it asks for the next. An encoder of as many channels as x has does not see y, and makes one step.

    Source: Alaluf et al., "ReStyle: A Residual-Based StyleGAN Encoder via Iterative Refinement", ICCV 2021.

    Args:
        encoder: (B, 2 C, H, W) -> (B, k, D); see `fastnce.networks.restyle_encoder`.
        generator: see `fastnce.networks.style_generator`.
        x: images (B, C, H, W) in [-1, 1] at the encoder's size.
        steps: how many; also more or fewer than trained with.
        start: w_0 (1 or B, k, D) and y_0 (1 or B, C, H, W), by default `average_start`.
        noise: "fixed" or "random", of the generator.

    Raises:
        ValueError: images of other channels, a start of another shape, or several steps of an encoder that does not see y.
    """
    if start is None:
        start = average_start(generator, (x.shape[2], x.shape[3]))
    channels, seen = x.shape[1], input_channels(encoder)
    if start[1].shape[1:] != x.shape[1:]:
        raise ValueError(
            f"iterate: x: expected images of {tuple(start[1].shape[1:])} as the start has, got {tuple(x.shape[1:])}."
        )
    if seen not in (None, channels, 2 * channels):
        raise ValueError(
            f"iterate: the encoder takes {seen} channels, and images of {channels} need {2 * channels} with the reconstruction "
            f"beside them, or {channels} for one step. Use an encoder of {2 * channels}."
        )
    if seen == channels and steps > 1:
        raise ValueError(
            f"iterate: steps={steps}, but the encoder takes the {channels} channels of the image alone and would start again "
            "from the average each time. Use steps=1."
        )
    return _steps(encoder, generator, x, steps, start, noise, alone=seen == channels)


def _steps(
    encoder: nn.Module,
    generator: nn.Module,
    x: Tensor,
    steps: int,
    start: tuple[Tensor, Tensor],
    noise: str,
    alone: bool,
) -> Iterator[Step]:
    latent, seen = (tensor.expand(len(x), *tensor.shape[1:]) for tensor in start)
    for _ in range(steps):
        delta = encoder(x if alone else torch.cat([x, seen], dim=1))
        if delta.shape != latent.shape:
            raise ValueError(
                f"iterate: the encoder gives latents {tuple(delta.shape)}, and the generator's are {tuple(latent.shape)}. "
                "Use an encoder of the generator's number of styles."
            )
        latent = latent + delta
        image = generator(latent, noise=noise)
        seen = at_size(image, (x.shape[2], x.shape[3]))
        yield Step(image, seen, latent)
        latent, seen = latent.detach(), seen.detach()


class Inverter(nn.Module):
    """An encoder and the generator whose latents it finds: what a run of ReStyle leaves. x (B, C, H, W) -> the `Step`s.

    With an e4e head the state dict holds its stage, so that styles that were not learned yet are not used.
    """

    def __init__(self, encoder: nn.Module, generator: nn.Module) -> None:
        super().__init__()
        self.encoder, self.generator = encoder, generator
        if getattr(encoder, "head", None) == "e4e":
            self.register_buffer("stage", torch.tensor(encoder.stage))
            self.register_load_state_dict_post_hook(lambda module, _: module.set_stage())

    def set_stage(self, stage: int | None = None) -> None:
        """The stage of an e4e head: this one, or None: that of the buffer `stage`, where it was copied from another network."""
        if hasattr(self, "stage"):
            if stage is not None:
                self.stage.fill_(stage)
            self.encoder.stage = int(self.stage) if stage is None else stage

    def forward(self, x: Tensor, steps: int = 5) -> list[Step]:
        return list(iterate(self.encoder, self.generator, x, steps=steps))


def bootstrap(
    first: nn.Module,
    second: nn.Module,
    x: Tensor,
    steps: int,
    *,
    first_steps: int = 1,
    start: tuple[Tensor, Tensor] | None = None,
) -> Iterator[Step]:
    """Encoder bootstrapping: `first_steps` of one model, then `steps` of another that start from the latent and the image reached.

    The second model's generator is a fine-tuned copy of the first's, with the same latent space; its mean latent is not used.
    More than one step tends back to the photograph.

    Args:
        first: an `Inverter`, or what has `encoder` and `generator`.
        second: likewise.
        x: images (B, C, H, W) in [-1, 1].
        steps: of the second model.
        first_steps: of the first, at least 1.
        start: of the first; see `iterate`.

    Yields:
        The `first_steps + steps` steps.

    Raises:
        ValueError: as `iterate`, and where the two models' latents or channels differ.
    """
    for step in iterate(first.encoder, first.generator, x, steps=first_steps, start=start):
        yield step
    start = (step.latent.detach(), step.seen.detach())
    yield from iterate(second.encoder, second.generator, x, steps=steps, start=start)


class Inversion:
    """How a command inverts images: with a trained network, for how many steps, and behind which other one.

    Args:
        network: the `Inverter` of a run, in eval mode.
        config: the run's configuration.
        steps: by default as many as it was trained with, or 1 behind another model.
        first: a run, with `network` and `config`, whose steps come first, for encoder bootstrapping.
        first_steps: how many they are, by default 1.

    Attributes:
        names: of the steps, "step 1" and so on; those of `first` are "first 1" and so on.

    Raises:
        UserError: a number below 1, or two models that do not fit together.
    """

    def __init__(
        self,
        network: nn.Module,
        config: Any,
        steps: int | None = None,
        first: Any = None,
        first_steps: int | None = None,
    ) -> None:
        if first is None and first_steps is not None:
            raise UserError(
                f"first_steps={first_steps} is for another run's encoder. Name it: first."
            )
        usual = config.steps_per_batch if first is None else 1
        self.steps = usual if steps is None else steps
        self.first_steps = 1 if first_steps is None else first_steps
        for name, value in (("steps", self.steps), ("first_steps", self.first_steps)):
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1.")
        if first is not None:
            _expect_alike(first.network, first.config, network, config)
        self.network, self.config = network, config
        self.first = first and first.network
        before = 0 if first is None else self.first_steps
        self.names = [f"first {t + 1}" for t in range(before)]
        self.names += [f"step {t + 1}" for t in range(self.steps)]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def batches(
        self, input: Path, batch_size: int, broken_files: Literal["error", "skip"] | None
    ) -> Iterator[tuple[list[str], Tensor]]:
        """The images of a folder, or one, as the encoder takes them: see `image_batches`."""
        from fastnce.data.labelled import fitted

        config = self.config
        how = (input, batch_size, broken_files, "invert")
        return image_batches(
            config, *how, lambda image, path: fitted(image, config.size, config.other_shapes, path)
        )

    @cached_property
    def start(self) -> tuple[Tensor, Tensor]:
        """w_0 (1, k, D) and y_0 (1, C, H, W), on the network's device."""
        return average_start((self.first or self.network).generator, self.config.size)

    def average(self, count: int) -> Tensor:
        """y_0 for so many images, on the CPU."""
        return self.start[1].expand(count, -1, -1, -1).float().cpu()

    def __call__(self, x: Tensor) -> Iterator[Step]:
        """The steps of images (B, C, H, W) on the network's device, one for each of `names`."""
        network, how = self.network, {"steps": self.steps, "start": self.start}
        try:
            if self.first is not None:
                yield from bootstrap(self.first, network, x, first_steps=self.first_steps, **how)
            else:
                yield from iterate(network.encoder, network.generator, x, **how)
        except ValueError as error:
            raise UserError(str(error)) from error

    def latent(self, x: Tensor) -> Tensor:
        """The latent (B, k, D) of the last step."""
        *_, last = self(x)
        return last.latent


def _expect_alike(first: nn.Module, first_config: Any, second: nn.Module, config: Any) -> None:
    """Raises `UserError` unless the second model can go on where the first one ends."""
    facts = [
        {
            "size of the images": "x".join(map(str, told.size[::-1])),
            "channels of the images": told.image_channels,
            "latents": f"{network.generator.num_styles} of {len(network.generator.latent_avg)}",
        }
        for network, told in ((first, first_config), (second, config))
    ]
    for name, one in facts[0].items():
        if one != facts[1][name]:
            raise UserError(
                f"first: the two models differ in the {name}: {one} of the first, {facts[1][name]} of the second. Name a run whose "
                "generator is that of which the second one was fine-tuned."
            )


def invert_folder(
    inversion: Inversion,
    input: Path,
    out: Path,
    *,
    batch_size: int = _BATCH,
    latents: Literal["npz", "safetensors"] = "npz",
    broken_files: Literal["error", "skip"] | None = None,
) -> int:
    """Writes what each step makes of the images of a folder, and of the folders in it, or of one image.

    `OUT/STEP/NAME.png` at the generator's size, STEP being one of the inversion's `names` with a hyphen, and the latents
    `OUT/latents.npz`: "latents" (N, steps, k, D) float32 and "names" (N,), the files' names below `input`, sorted; a .safetensors
    file has "names" in its metadata, as JSON. `OUT/steps.png` shows some images, the average, and the steps.

    Args:
        inversion: how.
        input: folder of images, or an image.
        out: folder; created.
        batch_size: Images at a time.
        latents: Kind of the latents' file.
        broken_files: A file that cannot be read: error stops, skip leaves it out and names it; by default as in the training.

    Returns:
        The number of images inverted.

    Raises:
        UserError: no images, a broken one, or `out` cannot be written.
    """
    from fastnce.data import save_image
    from fastnce.systems.representation import write_arrays
    from fastnce.systems.translating import targets

    input, out = Path(input), Path(out)
    paths = _paths(input, out)
    written = [targets(paths, input, out / name.replace(" ", "-")) for name in inversion.names]
    folder = input.parent if input.is_file() else input
    names: list[str] = []
    found: list[Tensor] = []
    strip = _Strip(inversion, len(paths))
    for batch_names, x in inversion.batches(input, batch_size, broken_files):
        latent, seen = [], [inversion.average(len(x))]
        for files, step in zip(written, _inverted(inversion, x), strict=True):
            for name, image in zip(batch_names, step.image, strict=True):
                save_image(image, files[folder / name])
            latent.append(step.latent)
            seen.append(step.seen)
        strip.add(x, seen)
        names += batch_names
        found.append(torch.stack(latent, dim=1))
    write_arrays(out / f"latents.{latents}", names, latents=torch.cat(found))
    strip.save(out / "steps.png")
    return len(names)


class _Strip:
    """The picture of an inversion: a row for the images, for the average and for each step, of images from all of a folder."""

    def __init__(self, inversion: Inversion, count: int) -> None:
        self.rows: dict[str, list[Tensor]] = {
            name: [] for name in ("image", "average", *inversion.names)
        }
        self.chosen = set(torch.linspace(0, count - 1, min(count, _COLUMNS)).long().tolist())
        self.passed = 0

    def add(self, x: Tensor, seen: Sequence[Tensor]) -> None:
        """Takes what is shown of a batch: images and their reconstructions, the average first, (B, C, H, W) each."""
        for index in range(len(x)):
            if self.passed + index in self.chosen:
                for row, images in zip(self.rows.values(), (x, *seen), strict=True):
                    row.append(images[index])
        self.passed += len(x)

    def save(self, path: Path) -> None:
        from fastnce.viz.plots import save_sample_grid

        save_sample_grid(self.rows, path)


def _paths(input: Path, out: Path) -> list[Path]:
    """The images of a folder, or one; `UserError` if there are none, or if results would be among them."""
    from fastnce.data import list_images

    if input.is_file():
        return [input]
    expect_apart(out, [input])
    return list_images(input)


@torch.inference_mode()
def _inverted(inversion: Inversion, x: Tensor) -> Iterator[Step]:
    """The steps of images on the CPU, on the CPU."""
    for step in inversion(x.to(inversion.device)):
        yield Step(*(tensor.float().cpu() for tensor in step))


def visualize_steps(
    inversion: Inversion,
    input: Path,
    out: Path,
    *,
    batch_size: int = _BATCH,
    broken_files: Literal["error", "skip"] | None = None,
) -> Tensor:
    """Writes the pictures `OUT/steps.png` and `OUT/changes.png` of the inversion of a folder of images, or of one.

    steps.png has rows of some images, of the average image, and of the steps. changes.png has a heat map for each step over all
    images, of the root of the result: above each on a scale of its own, which shows where the step changes the images, below
    all on one scale, which shows how much.

    Args:
        inversion: how.
        input: folder of images, or an image.
        out: folder; created.
        batch_size: Images at a time.
        broken_files: A file that cannot be read: error stops, skip leaves it out and names it; by default as in the training.

    Returns:
        (steps, H, W): at each pixel the mean over images and channels of (y_t - y_{t-1})^2.

    Raises:
        UserError: no images, a broken one, or `out` cannot be written.
    """
    from fastnce.viz.feature_maps import save_changes

    input, out = Path(input), Path(out)
    strip = _Strip(inversion, len(_paths(input, out)))
    sums = torch.zeros(len(inversion.names), *inversion.config.size)
    for _, x in inversion.batches(input, batch_size, broken_files):
        seen = [inversion.average(len(x))]
        for t, step in enumerate(_inverted(inversion, x)):
            sums[t] += (step.seen - seen[-1]).square().mean(1).sum(0)
            seen.append(step.seen)
        strip.add(x, seen)
    maps = sums / strip.passed
    strip.save(out / "steps.png")
    save_changes(inversion.names, maps, out / "changes.png")
    return maps
