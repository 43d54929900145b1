"""Subcommand `train`."""

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
