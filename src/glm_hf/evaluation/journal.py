"""Results of rows, kept in a file that grows by a line for each and is read when an interrupted run resumes."""

import hashlib
import json
from pathlib import Path
from typing import Any, TextIO

from glm_hf.folders.validation import read_text

MOST_BYTES = 2**34
"""Largest journal that is read."""


class Journal:
    """
    Results of rows by what they are made from.

    Args:
        path: File, made when the first result comes; None to keep results in memory only.
        origin: What all results depend on, such as the model, as JSON; a file of another origin is begun anew.
        writes: Whether results are written; of several ranks only one does.

    Raises:
        ValueError: If the file is none of a journal.
    """

    def __init__(self, path: Path | None, origin: Any, writes: bool = True) -> None:
        self.writes = writes
        self.path, self.origin = path, json.loads(json.dumps(origin))
        self._known: dict[str, Any] = {}
        self._file: TextIO | None = None
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        """Read what an earlier run has left; of its last line perhaps only a part."""
        first, *lines = read_text(path, MOST_BYTES).split("\n")
        try:
            head = json.loads(first)
            origin = head["origin"]
        except (ValueError, KeyError, TypeError) as error:
            if first and lines:
                raise ValueError(f"{path} is not a journal of an evaluation; move it away") from error
            return  # ended in its first line
        if origin != self.origin:
            return
        for line in lines[:-1]:
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path} is damaged; remove it, or run with --no-resume") from error
            self._known[key] = value

    def find(self, *made_from: Any) -> tuple[str, Any]:
        """Return the key of a result, by what it is made from, and the result, None if it is not known."""
        key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]
        return key, self._known.get(key)

    def record(self, key: str, value: Any) -> None:
        """Remember a result, at once."""
        self._known[key] = value
        if self.path is None or not self.writes:
            return
        if self._file is None:
            self._file = self._begin(self.path)
        self._file.write(json.dumps((key, value)) + "\n")
        self._file.flush()

    def _begin(self, path: Path) -> TextIO:
        """Open the file behind what is known, which is written anew so that no line is broken."""
        path.parent.mkdir(parents=True, exist_ok=True)
        *known, _ = self._known.items()
        scratch = path.with_name(f".{path.name}.new")
        with scratch.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"origin": self.origin}) + "\n")
            file.writelines(json.dumps(pair) + "\n" for pair in known)
        scratch.replace(path)
        return path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
