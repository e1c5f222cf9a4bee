"""StyleGAN2's training step against a plain transcription, its fine-tuning, files of rosinality, mistakes."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce.errors import UserError
from fastnce.models import StyleGAN2, StyleGAN2Config
from fastnce.networks import StyleGenerator
from fastnce.systems.stylegan2 import generate_folder, path_lengths

TINY = StyleGAN2Config(
    image_size=16,
    image_channels=1,
    latent_dim=6,
    mapping_layers=2,
    channels=(6, 5, 4),
    r1_every=2,
    path_every=3,
    batch_size=4,
    lr=0.01,
)


def model(**changes) -> StyleGAN2:
    torch.manual_seed(0)
    return StyleGAN2(replace(TINY, **changes)).double()


def batches(count: int) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(1)
    images = torch.rand(count, 4, 1, 16, 16, generator=random, dtype=torch.float64) * 2 - 1
    return [{"image": x} for x in images]


class Published:
    """rosinality's training: a step of D, of its R1, of G and of its path length, all parameters in each."""

    def __init__(self, networks, config: StyleGAN2Config) -> None:
        self.g, self.d = networks
        self.config, self.mean = config, 0.0
        self.w: list[Tensor] = []
        self.optimizers = []
        for network, every in ((self.g, config.path_every), (self.d, config.r1_every)):
            ratio = every / (every + 1)
            self.optimizers.append(
                torch.optim.Adam(
                    network.parameters(), lr=config.lr * ratio, betas=(0.0, config.beta2**ratio)
                )
            )

    def styles(self, count: int) -> Tensor:
        one = torch.rand(()) >= self.config.mixing
        z = torch.randn(1 if one else 2, count, 6).double()
        w = [self.g.style(x) for x in z]
        if one:
            return torch.stack([w[0]] * self.g.num_styles, 1)
        at = int(torch.randint(1, self.g.num_styles, ()))
        return torch.stack([w[0]] * at + [w[1]] * (self.g.num_styles - at), 1)

    def update(self, index: int, loss: Tensor) -> None:
        network = (self.g, self.d)[index]
        network.zero_grad()
        # All take part.
        (loss + 0 * sum(p.sum() for p in network.parameters())).backward()
        self.optimizers[index].step()

    def step(self, number: int, real: Tensor) -> dict[str, float]:
        config, losses = self.config, {}
        fake = self.g(self.styles(4), noise="random").detach()
        on_real, on_fake = F.softplus(-self.d(real)).mean(), F.softplus(self.d(fake)).mean()
        losses |= {"D_real": on_real.item(), "D_fake": on_fake.item()}
        self.update(1, on_real + on_fake)
        if number % config.r1_every == 0:
            x = real.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.d(x).sum(), x, create_graph=True)
            penalty = slope.square().sum((1, 2, 3)).mean()
            losses["D_r1"] = config.lambda_r1 / 2 * penalty.item()
            self.update(1, config.lambda_r1 / 2 * penalty * config.r1_every)
        w = self.styles(4)
        self.w.append(w.detach())
        on_fake = F.softplus(-self.d(self.g(w, noise="random"))).mean()
        losses["G_GAN"] = on_fake.item()
        self.update(0, on_fake)
        if number % config.path_every == 0:
            w = self.styles(2)
            images = self.g(w, noise="random")
            noise = torch.randn_like(images) / math.sqrt(16 * 16)
            (slope,) = torch.autograd.grad((images * noise).sum(), w, create_graph=True)
            lengths = slope.pow(2).sum(2).mean(1).sqrt()
            mean = self.mean + 0.01 * (lengths.mean() - self.mean)
            penalty = (lengths - mean).pow(2).mean()
            losses["G_path"] = config.lambda_path * penalty.item()
            self.update(0, config.lambda_path * penalty * config.path_every)
            self.mean = losses["path_length"] = mean.item()
        return losses


@pytest.mark.parametrize("mixing", [0.0, 0.9])
def test_steps_against_the_published_ones(mixing):
    """Seven, of which two have both penalties; in fp64."""
    ours = model(mixing=mixing)
    theirs = Published(copy.deepcopy((ours.generator, ours.discriminator)), ours.config)
    for number, batch in enumerate(batches(7)):
        torch.manual_seed(number)
        losses = ours.training_step(batch)
        torch.manual_seed(number)
        expected = theirs.step(number, batch["image"])
        assert set(expected) <= set(losses)
        for name, value in expected.items():
            assert losses[name].item() == pytest.approx(value, rel=1e-9), (number, name)
    for mine, other in ((ours.generator, theirs.g), (ours.discriminator, theirs.d)):
        for name, x in mine.named_parameters():
            torch.testing.assert_close(x, other.get_parameter(name), rtol=1e-7, atol=1e-10)
    # Of so few steps w's mean is a plain one.
    w = torch.stack(theirs.w).mean((0, 1, 2))
    torch.testing.assert_close(ours.generator.latent_avg, w)


def test_path_length_of_a_linear_generator():
    """The images are a matrix times the mean of the w of two layers: each layer's gradient is half the noise's image in it."""
    matrix, w = torch.randn(12, 5), torch.randn(3, 2, 5, requires_grad=True)
    images = (w.mean(1) @ matrix.T).view(3, 1, 3, 4)
    noise = torch.randn(3, 1, 3, 4)
    expected = (noise.view(3, 12) @ matrix / 2).norm(dim=1)
    torch.testing.assert_close(path_lengths(images, w, noise), expected)
    torch.manual_seed(0)
    drawn = path_lengths(images, w)
    torch.manual_seed(0)
    noise = torch.randn(3, 1, 3, 4) / 12**0.5
    torch.testing.assert_close(drawn, path_lengths(images, w, noise))


def test_what_a_penalty_does_not_depend_on_is_updated_all_the_same():
    """As published: Adam's mean squared gradient of the last bias of D decays in R1's updates too."""
    ours = model(lambda_path=0.0)
    ours.training_step(batches(1)[0])
    state = ours.optimizers["D"].state[ours.discriminator.final_linear[1].bias]
    assert state["step"] == 2
    assert ours.optimizers["G"].param_groups[0]["betas"] == (0.0, TINY.beta2)


@pytest.mark.parametrize(("freeze", "kept"), [(1, ("style",)), (8, ("style", "input", "conv"))])
def test_frozen_layers_stay(freeze, kept):
    ours = model(freeze=freeze, init_from="a run")
    ours.generator.latent_avg.fill_(0.5)
    before = copy.deepcopy(ours.generator.state_dict())
    for batch in batches(2):
        ours.training_step(batch)
    last = tuple(f"convs.{index}." for index in (2, 3))  # of 16 pixels
    for name, x in ours.generator.named_parameters():
        stays = name.startswith(kept) and not name.startswith(last)
        assert torch.equal(x, before[name]) == stays, name
    assert torch.equal(ours.generator.latent_avg, before["latent_avg"])


def test_small_data_are_augmented_for_the_discriminator_alone():
    ours = model(diff_augment=True)
    seen = []
    ours.discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    (batch,) = batches(1)
    ours.training_step(batch)
    assert len(seen) == 4 and all((x == 0).any() for x in seen)  # the cutout
    assert not any(torch.equal(x, batch["image"]) for x in seen)


def test_bf16_step_is_near_the_fp32_one():
    """At a small lr: Adam's first updates have the size of lr, whatever that of the gradients."""
    losses = []
    for precision in ("fp32", "bf16"):
        ours = model(precision=precision, lr=1e-5).float()
        torch.manual_seed(1)
        losses.append(ours.training_step({"image": batches(1)[0]["image"].float()}))
    for name, value in losses[0].items():
        assert losses[1][name].dtype == torch.float32
        assert losses[1][name].item() == pytest.approx(value.item(), abs=0.05), name


def test_generated_images(tmp_path):
    torch.manual_seed(0)
    generator = StyleGenerator(16, 6, 2, (6, 5, 4), 1).eval()
    with pytest.raises(UserError, match=r"truncation=0.5 needs a mean latent"):
        generate_folder(generator, TINY, tmp_path, truncation=0.5)
    generator.latent_avg.copy_(generator.mean_latent(1000))

    def files(name: str, **options) -> list[bytes]:
        out = tmp_path / name
        assert generate_folder(generator, TINY, out, **options) == options["count"]
        assert (out / "grid.png").exists()
        return [path.read_bytes() for path in sorted((out / "images").iterdir())]

    three = files("one", count=3, interpolation=4)
    assert len(set(three)) == 3 and (tmp_path / "one" / "interpolation.png").exists()
    assert files("two", count=4, batch_size=2)[:3] == three
    assert files("whole", count=3, truncation=1.0) == three
    assert len(set(files("mean", count=3, truncation=0.0))) == 1
    with pytest.raises(UserError, match="truncation=-1.0"):
        files("none", count=1, truncation=-1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 24}, "image_size=24 must be a power of two"),
        ({"channels": (4,)}, "Give 3 widths"),
        ({"freeze": 6}, "freeze=6 is no size of a layer"),
        ({"freeze": 8}, "freeze=8 would keep layers as they were drawn. .*--init-from"),
        ({"mixing": 1.5}, "mixing=1.5"),
        ({"r1_every": 0}, "r1_every=0"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(UserError, match=message):
        model(**changes)
