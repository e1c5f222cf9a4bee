"""Weights to start from: those of another run, or files of the published repositories of CUT, CycleGAN, pix2pix, DCLGAN, CFL, SPADE.

Those repositories write one file per network, `{latest|EPOCH}_net_{G,D,F}.pth` (`G_A`, `G_B`, ... where there are two
directions), a plain state dict. Our networks have the same keys, so what is left is to find out from keys and shapes how
a network was configured, and to say clearly what a file is when it is not the expected one.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.networks.weights import difference, load_strictly, read_plain, read_state_dict
from fastnce.systems import SYSTEMS, System, TrainConfig, system_named
from fastnce.training.checkpoint import below, load_checkpoint
from fastnce.training.config import as_option

# What a network of the published repositories is, with how its keys give it away.
RESNET, PATCH, PROJECTOR = "ResNet generator", "patch discriminator", "patch projector (netF)"
UNET, SPADE = "U-Net generator", "SPADE generator"
MULTISCALE, FEATURES = "discriminator of several scales", "critic with its projections (F_q)"
# The system that a generator without its configuration is taken for.
_SYSTEMS = {RESNET: "cut", UNET: "pix2pix", SPADE: "cfl"}
# The preset that a SPADE generator was trained with, by its input's channels: these tell classes, "don't care" and edges apart.
_SPADE_PRESETS = {36: "cityscapes", 151: "ade20k", 184: "coco"}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclasses.dataclass(frozen=True)
class Recognised:
    """The content of a published weights file."""

    kind: str  # `RESNET`, `UNET`, `SPADE`, `PATCH`, `MULTISCALE`, `PROJECTOR` or `FEATURES`
    options: dict[str, object]  # of the system's configuration, as far as weights fix them
    layer_channels: tuple[int, ...] = ()  # for a projector, those of each feature map


def read_published(path: Path) -> dict[str, Tensor]:
    """The state dict in a published `.pth` file, tensors on the CPU.

    The statistics that instance norm kept before PyTorch 0.4, which nothing reads, are removed.
    """
    state = read_state_dict(path, "Name a weights file, such as latest_net_G.pth.")
    return {
        name: tensor
        for name, tensor in state.items()
        # Without a weight beside them they belong to an instance norm that does not use them, or to SPADE, which does.
        if not (name.endswith(_STATISTICS) and f"{name.rpartition('.')[0]}.weight" not in state)
        or ".param_free_norm." in name
    }


def recognise(state: Mapping[str, Tensor], path: Path) -> Recognised:
    """The kind and the options of the network with this state dict, from keys and shapes; `path` names it in errors."""
    stem, first = state.get("model.1.weight"), state.get("model.0.weight")
    if stem is not None and stem.ndim == 4 and stem.shape[2:] == (7, 7):
        return Recognised(RESNET, _resnet_options(state, path))
    if first is not None and first.ndim == 4 and first.shape[2:] == (4, 4):
        return Recognised(PATCH, _patch_options(state, path))
    if "model.model.0.weight" in state:
        return Recognised(UNET, _unet_options(state, path))
    if "mlp_0.0.weight" in state:
        inputs = sorted(k for k in state if re.fullmatch(r"mlp_\d+\.0\.weight", k))
        channels = tuple(state[f"mlp_{i}.0.weight"].shape[1] for i in range(len(inputs)))
        width = state["mlp_0.0.weight"].shape[0]
        return Recognised(PROJECTOR, {"projection_dim": width}, channels)
    if "head_0.conv_0.weight_orig" in state:
        return Recognised(SPADE, _spade_options(state))
    if "discriminator_0.model0.0.weight" in state:
        layers = [
            k for k in state if re.fullmatch(r"discriminator_0\.model\d+\.0(\.0)?\.weight.*", k)
        ]
        options = {
            "disc_channels": state["discriminator_0.model0.0.weight"].shape[0],
            "disc_layers": len({k.split(".")[1] for k in layers}) - 1,
            "disc_scales": len({k.split(".")[0] for k in state}),
        }
        return Recognised(MULTISCALE, options)
    if any(k.startswith(("projection.mlps.", "encoder.slice1.")) for k in state):
        return _critic_projections(state)
    known = {
        "encoder.convs.": "a StyleGAN2-style generator",
        "convs.": "a StyleGAN2-style discriminator",
        "net.": "a pixel discriminator",
    }
    what = next((text for key, text in known.items() if any(k.startswith(key) for k in state)), "")
    raise UserError(
        f"{path}: holds {what or 'no network that is known here'} (keys {', '.join(list(state)[:3])}, ...), expected a "
        f"{RESNET}, {UNET}, {SPADE}, {PATCH}, {MULTISCALE}, {PROJECTOR} or {FEATURES}. Name another file."
    )


def _resnet_options(state: Mapping[str, Tensor], path: Path) -> dict[str, object]:
    if any(k.endswith(".conv_block.6.weight") for k in state):
        raise UserError(
            f"{path}: was trained with dropout in its residual blocks (--no_dropout False), which the networks here do not have. "
            "It cannot be loaded."
        )
    _only_instance_norm(state, path, "model.1.bias")
    # (kernel size of the resampling filters, from the first layer on: 3 blurs downwards, 4 upwards)
    filters = [state[k].shape[-1] for k in _sorted_by_layer(state) if k.endswith(".filt")]
    if filters not in ([], [3, 3], [4, 4], [3, 3, 4, 4]):
        raise UserError(
            f"{path}: was trained with resampling filters of sizes {filters}, expected two of 3 for downsampling, two of 4 for "
            "upsampling, or none of either. It cannot be loaded."
        )
    last = [k for k in _sorted_by_layer(state) if k.endswith(".weight")][-1]
    return {
        "in_channels": state["model.1.weight"].shape[1],
        "out_channels": state[last].shape[0],
        "base_channels": state["model.1.weight"].shape[0],
        "num_blocks": sum(k.endswith(".conv_block.1.weight") for k in state),
        "antialias": 3 in filters,
        "antialias_up": 4 in filters,
    }


def _unet_options(state: Mapping[str, Tensor], path: Path) -> dict[str, object]:
    first, last = state["model.model.0.weight"], state.get("model.model.3.weight")
    level, levels = "model.model.1.model.", 1
    while f"{level}1.weight" in state:
        level, levels = f"{level}3.model.", levels + 1
    if last is None or f"model.model.1.model.{2 if levels > 2 else 4}.weight" not in state:
        raise UserError(
            f"{path}: holds a U-Net that was not trained with batch norm (--norm batch), which the one here has. It cannot be loaded."
        )
    return {
        "in_channels": first.shape[1],
        "out_channels": last.shape[1],
        "base_channels": first.shape[0],
        "num_downs": levels,
    }


def _spade_options(state: Mapping[str, Tensor]) -> dict[str, object]:
    """`label_classes` are all channels of its input. Weights do not tell "normal" from "more" upsampling."""
    most = "up_4.conv_0.weight_orig" in state
    return {
        "label_classes": state["fc.weight"].shape[1],
        "base_channels": state["conv_img.weight"].shape[1] * (2 if most else 1),
        "hidden_channels": state["head_0.norm_0.mlp_shared.0.weight"].shape[0],
        **({"upsampling": "most"} if most else {}),
    }


def _critic_projections(state: Mapping[str, Tensor]) -> Recognised:
    weight = re.compile(r"projection\.mlps\.\d+\.(0\.)?weight")
    first = [x for name, x in state.items() if weight.fullmatch(name)]
    if not first:
        return Recognised(FEATURES, {"projector": "identity"})
    kind = "mlp" if "projection.mlps.0.0.weight" in state else "linear"
    options = {"projector": kind, "projection_dim": first[0].shape[0]}
    return Recognised(FEATURES, options, tuple(x.shape[1] for x in first))


def _patch_options(state: Mapping[str, Tensor], path: Path) -> dict[str, object]:
    batch_norm = any(name.endswith("running_mean") for name in state)
    if not batch_norm:
        _only_instance_norm(state, path, "model.0.bias")
    convolutions = [k for k, weight in state.items() if k.endswith(".weight") and weight.ndim == 4]
    return {
        "disc_channels": state["model.0.weight"].shape[0],
        "disc_layers": len(convolutions) - 2,
        "disc_antialias": "model.2.filt" in state,
        **({"disc_norm": "batch"} if batch_norm else {}),
    }


def _only_instance_norm(state: Mapping[str, Tensor], path: Path, bias: str) -> None:
    """Other norms either have weights of their own or, without biases, leave the convolutions without them."""
    if any(name.endswith("running_mean") for name in state):
        raise UserError(
            f"{path}: was trained with batch norm, and the networks here have instance norm. It cannot be loaded."
        )
    biases = sum(name.endswith(".bias") for name in state)
    weights = sum(name.endswith(".weight") for name in state)
    if bias not in state or biases != weights:
        raise UserError(
            f"{path}: has convolutions without bias, so it was not trained with instance norm (normG, normD), which the "
            "networks here have. It cannot be loaded."
        )


def _sorted_by_layer(state: Mapping[str, Tensor]) -> list[str]:
    """Keys `model.<index>...` by their index."""
    return sorted(state, key=lambda name: int(name.split(".")[1]))


def published_config(state: Mapping[str, Tensor], path: Path) -> TrainConfig:
    """The configuration of the generator in a published file; all that weights do not tell has its default."""
    found = recognise(state, path)
    if found.kind not in _SYSTEMS:
        raise UserError(
            f"{path}: holds a {found.kind}, expected a generator. Name its file, such as latest_net_G.pth."
        )
    system, options = system_named(_SYSTEMS[found.kind]), dict(found.options)
    if found.kind == SPADE and (preset := _SPADE_PRESETS.get(options["label_classes"])):
        options |= system.presets[preset]
    return system.config_class(data=path.parent, out=path.parent, **options)


def published_files(where: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """The published weights files of one epoch by the network's name, of `names` those that there are; the first must be.

    `where` is a folder, for its `latest_net_*.pth`, or the folder and the epoch: `checkpoints/horses/200`.
    """
    where = Path(where)
    folder, label = (where, "latest") if where.is_dir() else (where.parent, where.name)
    files = {name: folder / f"{label}_net_{name}.pth" for name in names}
    found = {name: path for name, path in files.items() if path.is_file()}
    if names[0] not in found:
        ending = f"_net_{names[0]}.pth"
        there = sorted(path.name.removesuffix(ending) for path in folder.glob(f"*{ending}"))
        have = f"found {', '.join(there)}" if there else f"{folder} holds no *{ending}"
        raise UserError(
            f"{files[names[0]]}: no such file; {have}. Name a run's --out folder, a folder that holds latest{ending}, or FOLDER/EPOCH."
        )
    return found


def system_of_file(path: Path) -> System | None:
    """The system whose published program wrote this file, all networks in one; None if it is none of these."""
    if not path.is_file():
        return None
    try:
        content = read_plain(path, "", allowed=[argparse.Namespace])
    except UserError:
        return None
    keys = content.keys() if isinstance(content, Mapping) else set()
    return next(
        (s for s in SYSTEMS.values() if s.published_keys and s.published_keys <= keys), None
    )


def load_initial(model: nn.Module, config: TrainConfig) -> list[str]:
    """Starts a model, freshly built from `config`, from the weights that `config.init_from` names.

    Returns:
        A line for each network: where its weights come from.
    """
    where = config.init_from
    assert where is not None
    path = where
    if (where / "config.json").is_file() or (where / "checkpoints").is_dir():
        path = where / "checkpoints" / "last.pt"
    if path.suffix == ".pt":
        system = system_of_file(path)
        if system is not None and system.name == config.system:
            return system.start_from_published(model, path)
        return load_run(model, path, config.system)
    return load_published(model, config, system_named(config.system).published)


# What a network of a translation from A to B is, under its published name in a system of one or of both directions.
_ROLES = {"G": "G", "G_A": "G", "D": "D", "D_A": "D", "F": "F", "F1": "F"}


def load_run(model: nn.Module, path: Path, system: str) -> list[str]:
    """Starts a model of `system` from a checkpoint of a run of any system: each network whose weights have the same names and shapes.

    Networks are matched by their names in the model, those of a translation from A to B also between systems of one and of both
    directions: generator, its discriminator, its projector. They are the weights themselves, not their running average, unless the
    system says otherwise.
    """
    state = load_checkpoint(path)
    ours = SYSTEMS[system]
    if ours.starts_averaged and state["config"]["system"] == system:
        averaged = state["average"]["module"].items()
        state["model"] |= {f"{ours.network_name}.{name}": x for name, x in averaged}
    published = {name: known.published for name, known in SYSTEMS.items()}
    theirs = published.get(state["config"]["system"], {})
    by_role = {_ROLES[name]: attribute for name, attribute in theirs.items() if name in _ROLES}
    roles = {
        attribute: _ROLES[name] for name, attribute in published[system].items() if name in _ROLES
    }
    lines, fitting = [], 0
    for attribute in _networks(model, (*published[system].values(), *ours.parts)):
        network = model.get_submodule(attribute)
        names = [attribute, by_role.get(roles.get(attribute, ""), attribute)]
        weights = next(filter(None, (below(state["model"], name) for name in names)), {})
        why_not = difference(network.state_dict(), weights) if weights else f"{path} has none"
        if why_not is None:
            network.load_state_dict(weights)
            fitting += 1
        lines.append(f"{attribute}: " + (f"starts anew, {why_not}" if why_not else f"from {path}"))
    if not fitting:
        raise UserError(
            f"init_from={path}: none of its networks fits ({lines[0]}). Give the network options of that run, or name another."
        )
    return lines


def _networks(model: nn.Module, known: Iterable[str]) -> list[str]:
    """The attributes' paths of a model's networks: the known ones, and what else has parameters."""
    there = dict(model.named_modules())
    paths = [path for path in known if path in there]
    for name, child in model.named_children():
        if any(True for _ in child.parameters()) and not any(
            path.split(".")[0] == name for path in paths
        ):
            paths.append(name)
    return paths


def load_published(model: nn.Module, config: TrainConfig, networks: Mapping[str, str]) -> list[str]:
    """Starts a model from the published weights in `config.init_from`.

    `networks` are the model's: published name to the attribute's path, the generator first. Errors say which options to give.
    """
    where = config.init_from
    if not networks:
        raise UserError(
            f"init_from={where}: is no run, and weights of published repositories are not known for {config.system}. Name the --out "
            "folder of a run, or leave it out."
        )
    files = published_files(where, tuple(networks))
    lines = []
    for name, attribute in networks.items():
        network = dict(model.named_modules()).get(attribute)
        if network is None:
            continue
        if name not in files:
            lines.append(f"{name}: {where} has no file of it, so it starts anew")
            continue
        state = read_published(files[name])
        found = recognise(state, files[name])
        if attribute.endswith(".b_to_a"):
            a, b = found.options["in_channels"], found.options["out_channels"]
            found.options.update(in_channels=b, out_channels=a)  # in the terms of A to B
        if found.kind == SPADE:
            found.options["label_classes"] -= config.dont_care + config.instances
        _check_options(found, config, network, files[name])
        load_strictly(network, state, files[name])
        lines.append(f"{name}: {files[name]}")
    return lines


def _check_options(found: Recognised, config: TrainConfig, network: nn.Module, path: Path) -> None:
    """Raises `UserError` with the options that the weights ask for, if `config` has others."""
    differing = {k: v for k, v in found.options.items() if getattr(config, k) != v}
    if differing:
        theirs = ", ".join(f"{k}={v}" for k, v in differing.items())
        ours = ", ".join(f"{k}={getattr(config, k)}" for k in differing)
        options = " ".join(word for k, v in differing.items() for word in as_option(k, v))
        raise UserError(f"{path}: has {theirs}, but the options say {ours}. Add {options}.")
    if not found.layer_channels:
        return
    expected = tuple(network.in_channels)
    if found.layer_channels != expected:
        raise UserError(
            f"{path}: was trained on feature maps of {list(found.layer_channels)} channels, but nce_layers="
            f"{list(getattr(config, 'nce_layers', ()))} gives {list(expected)}. Give the nce_layers of that training."
        )
