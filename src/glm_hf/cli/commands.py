"""What the modules of the command share: how a subcommand is added, and types of options.

Every subcommand has a function that adds it to the parser, which imports nothing heavy, and one that runs it, which
imports what it needs. So help and wrong usage cost no import of torch.
"""

import argparse
from collections.abc import Callable
from typing import Any

TP_SIZE = ("--tensor", "--tp", "--tp-size")
"""Spellings of the option for the number of tensor-parallel ranks."""


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str, *, registers: bool = True
) -> Any:
    """
    Add a subcommand.

    Args:
        commands: Group of subcommands, as `add_subparsers` returns it.
        name: Name of the subcommand.
        run: Function that takes the parsed options and does the work.
        text: Help in one sentence.
        registers: Whether GLM is made known to transformers before `run`, which takes longer than most imports.
    """
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run, registers=registers)
    return command


def add_folders(command: Any, src: str) -> None:
    """Add the two folders of a subcommand that makes one from the other; `src` is the help of the first."""
    command.add_argument("src", help=src)
    command.add_argument("dst", help="new folder")


def add_tp_size(command: Any) -> None:
    """Add the option for the number of ranks that a checkpoint is written for."""
    command.add_argument(
        *TP_SIZE, dest="tp_size", type=int, required=True, metavar="N", help="number of tensor-parallel ranks"
    )


def add_no_resume(command: Any) -> None:
    """Add the option that starts anew."""
    command.add_argument("--no-resume", action="store_true", help="discard what an interrupted run has written")


def add_max_shard_size(command: Any) -> None:
    """Add the option that limits the size of files."""
    command.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest output file (default: 5GB)")


def positive(text: str) -> int:
    """Parse an integer from 1 to 2048."""
    number = int(text)
    if not 1 <= number <= 2048:
        raise argparse.ArgumentTypeError(f"must be from 1 to 2048, got {text}")
    return number


def integers(text: str) -> tuple[int, ...]:
    """Parse integers with commas between them."""
    return tuple(int(part) for part in text.split(","))
