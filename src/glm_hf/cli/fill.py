"""Subcommand `fill`."""

import argparse
import io
import json
import re
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from glm_hf.cli.commands import add_command, positive

TEXTS_AT_ONCE = 8


def add_fill(commands: Any) -> None:
    """Add `fill`."""
    command = add_command(commands, "fill", fill, "Fill the blanks of texts, or continue texts without a blank.")
    command.add_argument("text", nargs="*", help="text with [MASK] or [gMASK]; without any, lines are read from stdin")
    command.add_argument(
        "--model", metavar="FOLDER", help="folder or Hub name of a model (default: a small one that comes with glm_hf)"
    )
    command.add_argument("--top-k", type=positive, default=1, metavar="K", help="proposals per blank (default: 1)")
    command.add_argument("--num-beams", type=positive, default=1, metavar="N", help="beams, at least K (default: 1)")
    command.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="per blank (default: 64)")
    command.add_argument("--json", action="store_true", help="print one JSON object per text, with scores")


def fill(options: argparse.Namespace) -> None:
    """Run `fill`."""
    from transformers import pipeline

    model = str(files("glm_hf") / "world_facts") if options.model is None else options.model
    if not Path(model).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise FileNotFoundError(f"there is no folder {model}, and it is not a Hub name (owner/name)")
    fill_mask = pipeline("fill-mask", model=model, dtype="auto", device_map="auto")
    settings = {"top_k": options.top_k, "num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens}
    group_size = 1 if not options.text and sys.stdin.isatty() else TEXTS_AT_ONCE

    def fill_group(group: list[dict[str, Any]]) -> None:
        for text, blanks in zip(group, fill_mask.fill_encoded(group, **settings) if group else [], strict=True):
            of_blanks = blanks if isinstance(blanks[0], list) else [blanks]
            print(describe(text["text"], of_blanks, options), flush=True)

    group: list[dict[str, Any]] = []
    for number, text in enumerate(options.text or read_lines(), 1):
        try:
            group.append(fill_mask.preprocess(text))
        except ValueError as error:
            fill_group(group)  # what came before is not lost
            raise ValueError(f"text {number}: {error}") from error
        if len(group) == group_size:
            fill_group(group)
            group = []
    fill_group(group)


def read_lines() -> Iterator[str]:
    """Yield the lines of stdin; UnicodeDecodeError if it is not UTF-8."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def describe(text: str, blanks: list[list[dict[str, Any]]], options: argparse.Namespace) -> str:
    """Return what `fill` prints for one text: JSON, the filled text, or the proposals for every blank."""
    filled = blanks[-1][0]["sequence"]
    if options.json:
        return json.dumps({"text": text, "filled": filled, "blanks": blanks}, ensure_ascii=False)
    if options.top_k == 1:
        return filled
    rows = [f"{proposal['score']:.4f}  {proposal['sequence']}" for proposals in blanks for proposal in proposals]
    return "\n".join(rows)
