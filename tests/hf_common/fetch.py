"""Fetch the common model tests of the installed transformers from its source distribution, which alone has them."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

VERSION = version("transformers")
CACHE = Path(__file__).parents[2] / ".cache" / "transformers-tests" / VERSION
MARKER = CACHE / "tests" / "test_modeling_common.py"


def fetch() -> None:
    """Unpack `tests/test*.py` of the source distribution into the cache unless they are there."""
    if MARKER.is_file():
        return
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as folder:
        unpacked = Path(folder) / "unpacked"
        unpack(download(Path(folder)), unpacked)
        (unpacked / "tests" / "__init__.py").touch()
        shutil.rmtree(CACHE, ignore_errors=True)
        unpacked.rename(CACHE)


def download(folder: Path) -> Path:
    """Download the source distribution with pip, from whatever index pip is configured for."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "transformers", "--dest", str(folder), f"transformers=={VERSION}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(folder.glob("transformers-*.tar.gz"))
    if result.returncode or len(archives) != 1:
        lines = result.stderr.strip().splitlines() or ["pip left no archive"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        sys.exit(f"cannot download the source distribution of transformers {VERSION}, which has its tests: {reason}")
    return archives[0]


def unpack(archive: Path, folder: Path) -> None:
    """Extract the test modules, and nothing else, without the archive's top folder."""
    with tarfile.open(archive) as members:
        for member in members:
            parts = Path(member.name).parts[1:]
            if member.isfile() and len(parts) == 2 and parts[0] == "tests" and parts[1].startswith("test"):
                member.name = "/".join(parts)
                members.extract(member, folder, filter="data")
    if not (folder / "tests" / MARKER.name).is_file():
        sys.exit(f"the source distribution of transformers {VERSION} has no tests/{MARKER.name}")


if __name__ == "__main__":
    fetch()
