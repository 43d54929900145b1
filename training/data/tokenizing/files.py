"""Files as streams of bytes, decompressed by the endings of their names."""

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

COMPRESSED = (".gz", ".zst")
BLOCK_BYTES = 2**20


def open_file(path: str) -> BinaryIO:
    """Open a file, decompressed; ValueError if the package that reads it is not there."""
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.open(path, "rb"))
    if path.endswith(".zst"):
        try:
            import pyarrow
        except ImportError as error:
            raise ValueError("zst files are read by the package pyarrow: pip install pyarrow") from error
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), BLOCK_BYTES)
    return open(path, "rb")


def guarded(path: str, items: Iterator[Any]) -> Iterator[Any]:
    """Yield what is read from a file; ValueError with its name if it is damaged."""
    damages: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if path.endswith((".parquet", ".zst")):
        from pyarrow import ArrowException

        damages += (ArrowException,)
    end = object()
    while True:
        try:
            item = next(items, end)
        except damages as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if item is end:
            return
        yield item


def blocks(path: str, size: int = BLOCK_BYTES) -> Iterator[bytes]:
    """Yield the content of a file."""
    with open_file(path) as file:
        while block := file.read(size):
            yield block
