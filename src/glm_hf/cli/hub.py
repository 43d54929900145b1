"""Subcommand `export-hub`."""

import argparse
from typing import Any

from glm_hf.cli.commands import add_command, add_folders, add_overwrite, add_strict


def add_export_hub(commands: Any) -> None:
    """Add `export-hub`."""
    command = add_command(commands, "export-hub", export_hub, "Make a model folder that loads without glm_hf.")
    add_folders(command, "folder of a model with its tokenizer")
    command.add_argument("--push-to", metavar="REPO", help="Hub repository to upload it to, owner/name")
    add_overwrite(command)
    add_strict(command)


def export_hub(options: argparse.Namespace) -> None:
    """Run `export-hub`."""
    from glm_hf.hub.export import export_hub_folder

    settings = {name: getattr(options, name) for name in ("push_to", "overwrite", "strict")}
    export_hub_folder(options.src, options.dst, **settings)
    print(options.dst)
