"""Subcommand `fill`."""

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator
from importlib.resources import files
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
    command.add_argument(
        "--max-text-size",
        type=int,
        default=100_000,
        metavar="N",
        help="longest text in bytes (default: 100000); a longer one is an error",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object per text, with scores")


def fill(options: argparse.Namespace) -> None:
    """Run `fill`."""
    if not options.text and sys.stdin is None:
        raise ValueError("stdin is closed; give texts as arguments, or lines on stdin")
    if sys.stdout is None:
        raise ValueError("stdout is closed, so there is no place for answers")
    fill_mask = load_pipeline(str(files("glm_hf") / "world_facts") if options.model is None else options.model)
    settings = {"top_k": options.top_k, "num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens}
    group_size = 1 if not options.text and sys.stdin.isatty() else TEXTS_AT_ONCE

    def fill_group(group: list[dict[str, Any]]) -> None:
        for text, blanks in zip(group, fill_mask.fill_encoded(group, **settings) if group else [], strict=True):
            of_blanks = blanks if isinstance(blanks[0], list) else [blanks]
            print(describe(text["text"], of_blanks, options), flush=True)

    group: list[dict[str, Any]] = []
    texts = enumerate(map(os.fsencode, options.text) if options.text else read_lines(options.max_text_size), 1)
    for number, text in texts:
        try:
            group.append(fill_mask.preprocess(decode(text, options.max_text_size)))
        except ValueError as error:
            fill_group(group)  # what came before is not lost
            raise ValueError(f"text {number}: {error}") from error
        if len(group) == group_size:
            fill_group(group)
            group = []
    fill_group(group)


def load_pipeline(model: str) -> Any:
    """
    Return the fill-mask pipeline of a folder or Hub name, after a look at all of its files; none of them is run.

    Raises:
        FileNotFoundError: If there is no such folder, or a file is missing.
        ValueError: If it is not a GLM-130B model, or damaged.
    """
    from transformers import pipeline

    from glm_hf.conversion.loading import look_at
    from glm_hf.folders.validation import reading

    folder, _, tokenizer = look_at(model)
    with reading(folder, "cannot be loaded"):
        return pipeline(
            "fill-mask",
            model=str(folder),
            tokenizer=tokenizer,
            dtype="auto",
            device_map="auto",
            trust_remote_code=False,
        )


def read_lines(most_bytes: int) -> Iterator[bytes]:
    """Yield the lines of stdin, of one that is longer than `most_bytes` only so much that this shows."""
    source = sys.stdin.buffer if isinstance(sys.stdin, io.TextIOWrapper) else sys.stdin
    while line := source.readline(most_bytes + 2):
        yield line.encode() if isinstance(line, str) else line


def decode(line: bytes, most_bytes: int) -> str:
    """Return a text without its line end; ValueError if it is not UTF-8 or has more than `most_bytes`."""
    line = line.rstrip(b"\r\n")
    if len(line) > most_bytes:
        raise ValueError(f"it has more than {most_bytes:,} bytes; split it, or raise --max-text-size")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error}") from error


def describe(text: str, blanks: list[list[dict[str, Any]]], options: argparse.Namespace) -> str:
    """Return what `fill` prints for one text: JSON, the filled text, or the proposals for every blank."""
    filled = blanks[-1][0]["sequence"]
    if options.json:
        return json.dumps({"text": text, "filled": filled, "blanks": blanks}, ensure_ascii=False)
    if options.top_k == 1:
        return filled
    rows = [f"{proposal['score']:.4f}  {proposal['sequence']}" for proposals in blanks for proposal in proposals]
    return "\n".join(rows)
