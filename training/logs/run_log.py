"""
The log of a run, `log.jsonl` in its output folder: a line of JSON for every entry that transformers' `Trainer` logs.

A run that is resumed begins the file anew with the entries of its checkpoint, so that it never tells of steps that
were undone. A value that is not finite is null.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from glm_hf.folders.validation import read_json, read_text

LOG_FILE = "log.jsonl"
STATE_FILE = "trainer_state.json"  # of transformers' `Trainer`, in its checkpoints

Entry = dict[str, Any]


class RunLog:
    """
    The file as it is written.

    Args:
        folder: Output folder of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.file = Path(folder) / LOG_FILE

    def begin(self, history: list[Entry]) -> None:
        """Replace the file by one with the entries of a checkpoint, none for a new run."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_name(f".{LOG_FILE}.partial")
        new.write_text("".join(map(_line_of, history)), encoding="utf-8")
        os.replace(new, self.file)

    def append(self, entry: Entry) -> None:
        """Add an entry, which others can read from then on."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(_line_of(entry))


def _line_of(entry: Entry) -> str:
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in entry.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_history(run: str | Path) -> list[Entry]:
    """
    Return what a run has logged so far, in the order of its steps; values that are not finite are None.

    Args:
        run: Output folder of a run that has ended, was interrupted or is in progress, with `log.jsonl` or, as of
            transformers' `Trainer`, checkpoints; or one of its checkpoints, or a file of the form of `log.jsonl`.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If a file is damaged, or nothing was logged yet.
    """
    folder = Path(run)
    source = folder if folder.is_file() else folder / LOG_FILE
    if source.is_file():
        history = _read_lines(source)
    else:
        source = _state_file(folder)
        history = read_json(source).get("log_history", [])
    if not all(isinstance(entry, dict) and isinstance(entry.get("step"), int) for entry in history):
        raise ValueError(f"{source} is damaged: every entry must be an object with its step")
    if not any("loss" in entry or "eval_loss" in entry for entry in history):
        raise ValueError(f"{source} holds no loss yet; wait until the run has logged one, every logging_steps")
    return [json.loads(_line_of(entry)) for entry in history]


def _state_file(folder: Path) -> Path:
    """Return the newest file of the state of transformers' `Trainer`."""
    numbered = {file.parent.name.rpartition("-")[2]: file for file in folder.glob(f"checkpoint-*/{STATE_FILE}")}
    newest = max((number for number in numbered if number.isdecimal()), key=int, default=None)
    for file in (folder / STATE_FILE, *([] if newest is None else [numbered[newest]])):
        if file.is_file():
            return file
    problem = "has neither" if folder.is_dir() else "is no folder: it has neither"
    raise FileNotFoundError(
        f"{folder} {problem} {LOG_FILE} nor a checkpoint with {STATE_FILE}; give the output_dir of a run"
    )


def _read_lines(file: Path) -> list[Entry]:
    """Return the entries of a log, without a last line that is still being written."""
    history = []
    for number, line in enumerate(read_text(file).split("\n")[:-1], 1):
        try:
            history.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged in line {number}: {error}") from error
    return history
