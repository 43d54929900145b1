"""Subcommand `export-onnx`, which is also `optimum-cli export glm-onnx`."""

import argparse
from typing import Any

from glm_hf.cli.commands import add_command, add_folders, add_overwrite


def add_export_onnx(commands: Any) -> None:
    """Add `export-onnx`."""
    text = "Write a model as one ONNX graph with its cache, for onnxruntime."
    command = add_command(commands, "export-onnx", export_onnx, text)
    add_folders(command, "model folder, quantized or not")
    add_settings(command)


def add_settings(command: Any) -> None:
    """Add the options of an export, besides its folders."""
    command.add_argument("--dtype", default="fp32", metavar="DTYPE", help="fp32 (default) or fp16")
    command.add_argument("--quantization", metavar="KIND", help="quantize the layers: int4 or int8")
    command.add_argument("--opset", type=int, default=24, metavar="N", help="version of the operators (default: 24)")
    command.add_argument("--verify", action="store_true", help="compare the graph with the torch model afterwards")
    add_overwrite(command)


def export_onnx(options: argparse.Namespace) -> None:
    """Run `export-onnx`."""
    from glm_hf.onnx import export_onnx as export
    from glm_hf.onnx import verify_onnx

    settings = {name: getattr(options, name) for name in ("dtype", "quantization", "opset", "overwrite")}
    export(options.src, options.dst, **settings)
    for comparison in verify_onnx(options.src, options.dst) if options.verify else ():
        sizes = f"largest difference {comparison.difference:.2g}, largest logit {comparison.largest:.2g}"
        print(f"{comparison.case}: {sizes}")
    print(options.dst)
