"""`fastnce export`: a run's weights for the published repositories, or for sharing."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim

from fastnce.errors import UserError
from fastnce.files import atomic_path
from fastnce.networks.stylegan2 import NoiseInjection
from fastnce.training.checkpoint import below
from fastnce.training.runs import Run, opened
from fastnce.training.shared import CONFIG_KEY, shared_values, write_shared

# How far the exported graph may be from the network, as a share of the largest output: rounding.
_TOLERANCE = 1e-3


def export_published(
    run: Run | Path,
    out: Path,
    *,
    label: str = "latest",
    module_prefix: bool = False,
    **how: Any,
) -> list[Path]:
    """Writes a run's networks as the published repository keeps them: `out/{label}_net_{G,D,F}.pth`, plain state dicts.

    Where it keeps all in one file, that is `out/{label}.pt`, with the network that is used after the training.

    Args:
        run: the run, or its folder and in `how` what opens it. With "ema" weights the generator is the average; the others have none.
        label: the epoch in the files' names.
        module_prefix: put `module.` before every key, as the published code does when it trains on a CPU.
    """
    run = opened(run, **how)
    system = run.system
    if not system.published:
        path = Path(out) / f"{label}.pt"
        system.save_published(run.network, run.config, path)
        return [path]
    state = run.state()
    model: dict[str, Tensor] = dict(state["model"])
    if run.weights == "ema":
        model |= {f"{system.network_name}.{k}": v for k, v in state["average"]["module"].items()}
    written = []
    for name, attribute in system.published.items():
        weights = below(model, attribute)
        if weights:
            path = Path(out) / f"{label}_net_{name}.pth"
            prefix = "module." if module_prefix else ""
            with atomic_path(path) as temporary:
                torch.save({f"{prefix}{k}": v.clone() for k, v in weights.items()}, temporary)
            written.append(path)
    return written


def export_shared(run: Run | Path, out: Path, **how: Any) -> Path:
    """Writes the network that a run was made for, with its configuration, as `out/model.safetensors`.

    The file takes the place of the run's folder wherever a trained network is read. `how` opens a folder: see `Run`.
    """
    run = opened(run, **how)
    path = Path(out) / "model.safetensors"
    write_shared(run.network, run.config, path)
    return path


def export_graph(
    run: Run | Path,
    out: Path,
    format: Literal["onnx", "torchscript"],
    *,
    direction: str | None = None,
    **how: Any,
) -> tuple[Path, str]:
    """Writes the network that a run was made for as a graph that runs without this package, in plain operations.

    `out/model.onnx` or `out/model.torchscript.pt`, float32, with any batch size and, for image translation, any height and width
    that the network takes. Inputs and outputs are named: `image` to `translation`; `z` and `label` to `image`; `image` to
    `features`. Images are (N, C, H, W) in [-1, 1]. The run's configuration is in the file, under `fastnce.config`. The noise that
    SinCUT's generator adds is left out: it is drawn anew for each size of image.

    The file is then run with a batch and a size that the export did not see, in onnxruntime or by PyTorch, and compared.

    Args:
        run: the run, or its folder, or a file that takes its place.
        out: folder for the file; created.
        format: "onnx" or "torchscript".
        direction: "AtoB" or "BtoA" for systems that learn both; None: that of the training.
        how: for a folder, what `Run` needs to open it.

    Returns:
        The file, and a line on how it was checked.

    Raises:
        UserError: no such run or checkpoint, a package is missing, the file differs from the network, or it cannot be written.
    """
    run = opened(run, **how)
    network, channels = run.system.in_direction(run.network, run.config, direction)
    without_noise = _leave_out_noise(network)
    seen, unseen = (
        run.system.graph_inputs(network, run.config, channels, count) for count in (2, 3)
    )
    text = json.dumps(shared_values(run.config))
    if format == "onnx":
        path = Path(out) / "model.onnx"
        data = _onnx(network, seen, run.system.any_size, run.system.output, text)
    else:
        path = Path(out) / "model.torchscript.pt"
        with _quiet():
            traced = torch.jit.trace(network, tuple(seen.values()), check_trace=False)
            data = traced.save_to_buffer(_extra_files={CONFIG_KEY: text})
    expected = network(*unseen.values())
    result, by = _run_graph(data, format, unseen)
    if result is not None:
        error = ((result - expected).abs().max() / expected.abs().max()).item()
        if not error < _TOLERANCE:
            raise UserError(
                f"format={format}: the exported graph differs from the network by {error:.1e} of the largest output. "
                "Export with the other format, and report this."
            )
        by += f": differs from the network by {error:.0e} of the largest output"
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return path, f"without SinCUT's noise, {by}" if without_noise else by


def _leave_out_noise(network: nn.Module) -> bool:
    """Whether there was any."""
    places = [
        (parent, name)
        for parent in network.modules()
        for name, child in parent.named_children()
        if isinstance(child, NoiseInjection)
    ]
    for parent, name in places:
        setattr(parent, name, nn.Identity())
    return bool(places)


def _onnx(
    network: nn.Module, inputs: dict[str, Tensor], sized: bool, output: str, text: str
) -> bytes:
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise UserError(
                f"format=onnx needs the package {package}. Install it with: pip install 'fastnce[export]'"
            ) from error
    axes = {0: Dim.DYNAMIC, **({2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if sized else {})}
    with _quiet():
        program = torch.onnx.export(
            network,
            tuple(inputs.values()),
            dynamo=True,
            dynamic_shapes=tuple(
                axes if x.is_floating_point() else {0: Dim.DYNAMIC} for x in inputs.values()
            ),
            input_names=list(inputs),
            output_names=[output],
            verbose=False,
        )
        proto = program.model_proto
    entry = proto.metadata_props.add()
    entry.key, entry.value = CONFIG_KEY, text
    return proto.SerializeToString()


def _run_graph(data: bytes, format: str, inputs: dict[str, Tensor]) -> tuple[Tensor | None, str]:
    """The graph's result for `inputs`, and a line on who ran it."""
    if format == "torchscript":
        with _quiet():
            return torch.jit.load(io.BytesIO(data))(*inputs.values()), "checked by running it"
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ModuleNotFoundError:
        return None, "not checked: onnxruntime is not installed"
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    by = f"checked by running it in onnxruntime {onnxruntime.__version__}"
    return torch.from_numpy(found), by


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own future."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
