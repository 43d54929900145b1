"""Subcommands for quantization: `quantize` and `analyze`."""

import argparse
from typing import Any

from glm_hf.cli.commands import (
    add_command,
    add_folders,
    add_max_shard_size,
    add_no_resume,
    add_overwrite,
    rerun_settings,
)


def add_quantize(commands: Any) -> None:
    """Add `quantize`."""
    command = add_command(commands, "quantize", quantize, "Quantize a Hugging Face folder without loading the model.")
    add_folders(command, "folder of a model that is not quantized")
    command.add_argument("--bits", type=int, choices=(4, 8), required=True, help="bits of the weights of the layers")
    command.add_argument("--group-size", type=int, metavar="N", help="input features per scale (default: whole rows)")
    command.add_argument("--quantize-embeddings", action="store_true", help="also store embedding and LM head in INT8")
    add_max_shard_size(command)
    add_no_resume(command)


def quantize(options: argparse.Namespace) -> None:
    """Run `quantize`."""
    from glm_hf.conversion import quantize_checkpoint

    names = ("bits", "group_size", "quantize_embeddings", "max_shard_size")
    settings = {name: getattr(options, name) for name in names}
    quantize_checkpoint(options.src, options.dst, **settings, **rerun_settings(options))
    print(options.dst)


def add_analyze(commands: Any) -> None:
    """Add `analyze`."""
    command = add_command(
        commands, "analyze", analyze, "Report how weights are distributed, and what INT8 and INT4 lose."
    )
    command.add_argument("src", help="folder of a model that is not quantized")
    command.add_argument("--output", default="analysis", metavar="FOLDER", help="new folder (default: analysis)")
    command.add_argument(
        "--group-size",
        type=int,
        action="append",
        metavar="N",
        help="group size of INT4; may be repeated (default: 128)",
    )
    add_overwrite(command)


def analyze(options: argparse.Namespace) -> None:
    """Run `analyze`."""
    from glm_hf.conversion.analysis.report import describe_analysis, write_analysis

    group_sizes = options.group_size or (128,)
    analysis = write_analysis(options.src, options.output, group_sizes=group_sizes, overwrite=options.overwrite)
    print(describe_analysis(analysis))
    print(options.output)
