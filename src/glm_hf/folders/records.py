"""What finished folders were made from: a command that is repeated knows by it that there is nothing left to do.

Nothing of this lies in the folders, which hold what their readers expect and no more. A record is a file in the user's
cache, `$XDG_CACHE_HOME/glm_hf/complete/HASH.json`: {"path", "origin", "identity", "files"}. `identity` is device and
inode, which a folder keeps when it is renamed. Without a record, or with one that does not fit, a folder is like
any other that exists already.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def remember(folder: Path, dst: Path, origin: Mapping[str, Any], *, pattern: str = "**/*") -> None:
    """
    Record that a folder is complete.

    Args:
        folder: The folder, by its name of now.
        dst: The name that it has or will have, absolute.
        origin: Plan and sources, as JSON.
        pattern: Which of its files have to stay as they are.
    """
    files = facts_of_files(folder, pattern)
    record = {"path": str(dst), "origin": origin, "identity": _identity(folder), "files": files}
    try:
        path = _path(dst)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        new.replace(path)
    except (OSError, RuntimeError) as error:  # without a home, or one that can be written to
        logger.debug("%s is not recorded as complete: %s", dst, error)


def is_complete(dst: Path, origin: Mapping[str, Any]) -> bool:
    """Tell whether a folder was made from `origin`, and has not changed since."""
    try:
        record = json.loads(_path(dst).read_text(encoding="utf-8"))
        is_same = record["origin"] == json.loads(json.dumps(origin)) and record["identity"] == _identity(dst)
        found = facts_of_files(dst) if is_same else {}
        return is_same and all(found.get(name) == facts for name, facts in record["files"].items())
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _path(dst: Path) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "glm_hf" / "complete" / f"{hashlib.sha256(os.fsencode(dst)).hexdigest()[:32]}.json"


def _identity(folder: Path) -> list[int]:
    status = folder.stat()
    return [status.st_dev, status.st_ino]


def facts_of_files(folder: Path, pattern: str = "**/*") -> dict[str, list[int]]:
    """Return size and time of change of the files in a folder that match a pattern."""
    paths = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
    return {path.relative_to(folder).as_posix(): facts_of_file(path) for path in paths}


def facts_of_file(path: Path) -> list[int]:
    """Return size and time of change of a file."""
    return [path.stat().st_size, path.stat().st_mtime_ns]
