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
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    text: str,
    *,
    registers: bool = True,
    take_words: Callable[[argparse.Namespace, list[str]], None] | None = None,
) -> Any:
    """
    Add a subcommand.

    Args:
        commands: Group of subcommands, as `add_subparsers` returns it.
        name: Name of the subcommand.
        run: Function that takes the parsed options and does the work.
        text: Help in one sentence.
        registers: Whether GLM is made known to transformers before `run`, which takes longer than most imports.
        take_words: Function that takes words that stand behind options, where more of them may come.
    """
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run, registers=registers, take_words=take_words)
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
    """Add the options that start anew."""
    command.add_argument("--no-resume", action="store_true", help="discard what an interrupted run has written")
    add_overwrite(command)


def add_overwrite(command: Any) -> None:
    """Add the option that replaces what is there."""
    command.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")


def add_strict(command: Any) -> None:
    """Add the option that refuses weights without a meaning."""
    command.add_argument("--strict", action="store_true", help="refuse weights that are NaN or infinite")


def rerun_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the options that `add_no_resume` has added."""
    return {"resume": not options.no_resume, "overwrite": options.overwrite}


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
