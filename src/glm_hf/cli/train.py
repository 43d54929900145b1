"""Subcommands `train` and `report`."""

import argparse
import os
from typing import Any

from glm_hf.cli.commands import add_command


def add_train(commands: Any) -> None:
    """Add `train`."""
    command = add_command(commands, "train", train, "Train a model as a configuration file says.")
    command.add_argument("config", help="YAML file; examples/training holds some to start from")
    command.add_argument("--resume", action="store_true", help="resume from the last checkpoint, if there is one")
    command.add_argument("--overwrite", action="store_true", help="begin anew, and remove earlier checkpoints")
    command.add_argument("--output-dir", metavar="FOLDER", help="output folder, instead of the one in the file")


def train(options: argparse.Namespace) -> None:
    """Run `train`."""
    from glm_hf.training.launch import train_run
    from glm_hf.training.run_config import RunConfig

    settings = {name: getattr(options, name) for name in ("resume", "output_dir", "overwrite")}
    folder = train_run(RunConfig.read(options.config), **settings)
    if os.environ.get("RANK", "0") == "0":
        print(folder)


def add_report(commands: Any) -> None:
    """Add `report`."""
    text = "Draw the curves of a training run, finished or not: losses, norms of gradients, throughput, MFU and HFU."
    command = add_command(commands, "report", report, text, registers=False)
    command.add_argument("folder", metavar="RUN", help="output folder of the run, or its log.jsonl")
    command.add_argument("--output", metavar="FILE", help="file .html or .png (default: report.html in the folder)")


def report(options: argparse.Namespace) -> None:
    """Run `report`."""
    from glm_hf.training.logs.curves import write_report

    is_folder = os.path.isdir(options.folder)
    default = os.path.join(options.folder, "report.html") if is_folder else f"{options.folder}.html"
    path = default if options.output is None else options.output
    write_report(options.folder, path)
    print(path)
