"""Write SAT rank files: all ranks at once, in segments after which an interrupted run can be resumed."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm_hf.conversion.formats.names import to_sat_name
from glm_hf.conversion.formats.torch_zip import CRC_OFFSET, TorchZip, ZipMember
from glm_hf.conversion.streaming.blocks import split_block
from glm_hf.sharding.rules import ROW, shard_rule

SEGMENT_BYTES = 5 * 10**9


class RankSegment:
    """
    Some consecutive tensors in the files of all ranks, as a segment of a folder.

    Args:
        files: Layout of every rank's file by its path in the folder, in rank order.
        tensors: All tensors of the model, joined, on meta by name.
        names: Names of those in this segment.
    """

    def __init__(self, files: Mapping[str, TorchZip], tensors: Mapping[str, Tensor], names: list[str]) -> None:
        self.names = names
        self.label = f"{names[0]} to {names[-1]}"
        self.layout: list[Any] = [[name, list(tensors[name].shape), str(tensors[name].dtype)] for name in names]
        self.layout += [[path, zlib.crc32(layout.beginning)] for path, layout in files.items()]
        self.num_bytes = sum(tensors[name].nbytes for name in names)
        self.end = {path: layout.members[to_sat_name(names[-1])].end for path, layout in files.items()}
        self._files = files
        self._num_rows = {name: len(tensors[name]) for name in names}
        self._is_last = names[-1] == list(tensors)[-1]
        if self._is_last:
            self.end = {path: layout.size for path, layout in files.items()}

    @contextmanager
    def open(self, folder: Path) -> Iterator[Callable[[str, Tensor], None]]:
        """Yield the function that appends a contiguous block of rows to a tensor; tensors come in their order."""
        coming = list(reversed(self.names))
        row = 0
        with ExitStack() as stack:
            ranks = []
            for path, layout in self._files.items():
                (folder / path).parent.mkdir(exist_ok=True)
                rank = _RankFile(folder / path, layout, layout.members[to_sat_name(self.names[0])])
                ranks.append(stack.enter_context(closing(rank)))

            def write(name: str, block: Tensor) -> None:
                nonlocal row
                assert name == coming[-1]
                rule, num_rows = shard_rule(name), self._num_rows[name]
                if row == 0:
                    for rank in ranks:
                        rank.begin(to_sat_name(name))
                if rule == ROW and name.endswith("_scale"):
                    block = block.repeat_interleave(len(ranks) // block.shape[1], dim=1)  # (rows, ranks)
                for number, part in split_block(rule, num_rows, len(ranks), row, block):
                    ranks[number].append(part)
                row += len(block)
                if row == num_rows:
                    for rank in ranks:
                        rank.end()
                    coming.pop()
                    row = 0

            yield write
            assert not coming
            if self._is_last:
                for rank in ranks:
                    rank.write_directory()


def plan_segments(files: Mapping[str, TorchZip], tensors: Mapping[str, Tensor]) -> list[RankSegment]:
    """
    Distribute the tensors of a model over segments of about `SEGMENT_BYTES`, in their order.

    Args:
        files: Layout of every rank's file by its path in the folder, in rank order.
        tensors: All tensors of the model, joined, on meta by name.
    """
    groups: list[list[str]] = [[]]
    num_bytes = 0
    for name, tensor in tensors.items():
        if groups[-1] and num_bytes + tensor.nbytes > SEGMENT_BYTES:
            groups.append([])
            num_bytes = 0
        groups[-1].append(name)
        num_bytes += tensor.nbytes
    return [RankSegment(files, tensors, names) for names in groups]


class _RankFile:
    """One rank's file, to be written on from the member `first`; what lies behind that is overwritten."""

    def __init__(self, path: Path, layout: TorchZip, first: ZipMember) -> None:
        self._layout = layout
        is_new = first.start == len(layout.beginning)
        self._file = open(path, "w+b" if is_new else "r+b")
        if is_new:
            self._file.write(layout.beginning)
        self._file.seek(first.start)

    def close(self) -> None:
        self._file.close()

    def begin(self, sat_name: str) -> None:
        self._member = self._layout.members[sat_name]
        assert self._file.tell() == self._member.start
        self._file.write(self._member.header())
        self._crc = 0

    def append(self, part: Tensor) -> None:
        content = part.flatten().view(torch.uint8).numpy().data
        self._crc = zlib.crc32(content, self._crc)
        self._file.write(content)

    def end(self) -> None:
        """Put the checksum of the member into its header."""
        assert self._file.tell() == self._member.end
        self._file.seek(self._member.start + CRC_OFFSET)
        self._file.write(self._crc.to_bytes(4, "little"))
        self._file.seek(self._member.end)

    def write_directory(self) -> None:
        """End the file, with the checksums of all members as their headers have them."""
        crcs = {}
        for name, member in self._layout.members.items():
            self._file.seek(member.start + CRC_OFFSET)
            crcs[name] = int.from_bytes(self._file.read(4), "little")
        self._file.seek(self._layout.directory_start)
        self._file.write(self._layout.directory(crcs))
