"""`fastnce export`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastnce.cli.parsing import run_with_options
from fastnce.errors import UserError


def export(args: list[str]) -> int:
    """Write a run's network as safetensors, ONNX or TorchScript, or for the published repositories."""

    def run_export(
        run: Path,
        out: Path,
        format: Literal["cut", "safetensors", "onnx", "torchscript"] = "safetensors",
        checkpoint: str = "last",
        weights: Literal["ema", "raw"] = "ema",
        label: str = "latest",
        module_prefix: bool = False,
        direction: Literal["AtoB", "BtoA"] | None = None,
    ) -> None:
        """Write a run's weights in another layout.

        Args:
            run: Folder of a training run.
            out: Folder for the files; created.
            format: cut: LABEL_net_G.pth and its like, as the published repositories read them. safetensors: one file,
                model.safetensors, with the network and its configuration. onnx, torchscript: model.onnx or
                model.torchscript.pt, a graph that runs without this package, for any batch and image size.
            checkpoint: "last", "best", or the path of a checkpoint file.
            weights: The running average of the generator's weights, or the weights themselves, from which training goes on.
            label: The epoch in the names of the published layout.
            module_prefix: Put "module." before the names of the published layout's weights.
            direction: onnx and torchscript, for systems that learn both directions; by default that of the training.
        """
        from fastnce.training.export import export_graph, export_published, export_shared
        from fastnce.training.translate import introduced, load_config

        print(introduced(run, load_config(run), weights, checkpoint))
        if format in ("onnx", "torchscript"):
            path, check = export_graph(
                run, out, format, which=weights, checkpoint=checkpoint, direction=direction
            )
            print(f"{path} ({check})")
            return
        if direction is not None:
            raise UserError(
                f"direction={direction} is for format=onnx and torchscript: format={format} holds all networks. Leave it out."
            )
        if format == "safetensors":
            print(export_shared(run, out, which=weights, checkpoint=checkpoint))
            return
        for path in export_published(
            run,
            out,
            label=label,
            which=weights,
            checkpoint=checkpoint,
            module_prefix=module_prefix,
        ):
            print(path)

    run_with_options("export", run_export, args)
    return 0
