"""Tables of sizes, as all plans print them."""

from collections.abc import Sequence

GIB = 2**30


def gib(num_bytes: float | None) -> str:
    """Return bytes in GiB with two decimals, "-" for None."""
    return "-" if num_bytes is None else f"{num_bytes / GIB:.2f}"


def format_table(rows: Sequence[Sequence[str]], *, notes: bool = False) -> list[str]:
    """
    Return the lines of a table, whose columns are aligned on the right.

    Args:
        rows: Cells of every row, the titles first.
        notes: Whether the last column holds notes, which are aligned on the left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if notes:
        widths[-1] = 0
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
