"""Check a download, or compare both sides of a conversion tensor by tensor, reading every byte again."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from glm_hf.conversion.checkpoint_config import require_model
from glm_hf.conversion.convert import converted
from glm_hf.conversion.formats.rank_file import RankFile, read_rank_file
from glm_hf.conversion.formats.safetensors_reader import ModelFolder
from glm_hf.conversion.formats.sat_checkpoint import SatCheckpoint, find_rank_files
from glm_hf.conversion.streaming.blocks import progress_bar, read_ahead, read_merged
from glm_hf.conversion.streaming.stored_tensor import Member, StoredTensor, check_member
from glm_hf.folders.finite import FiniteWeights
from glm_hf.sharding.rules import REPLICATED


@dataclass
class VerificationReport:
    """
    What a verification has seen.

    Attributes:
        num_tensors: Tensors that were read; of a download, on every rank.
        num_bytes: Bytes of them, as `src` stores them.
        not_finite: One line for every tensor with values that are NaN or infinite.
        problems: One line for everything that is wrong, with file or tensor; for a tensor that differs, its first
            difference.
    """

    num_tensors: int = 0
    num_bytes: int = 0
    not_finite: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def verify_checkpoint(src: str | Path, dst: str | Path | None = None, *, strict: bool = False) -> VerificationReport:
    """
    Check that a SAT checkpoint is whole, or that `dst` holds exactly the weights that `src` holds.

    Alone, a checkpoint must have every rank, the right shapes, one iteration, and bytes that agree with the checksums
    that were written with them. A model folder alone has no checksums, so only names, shapes and sizes are checked.
    Weights that are NaN or infinite are reported in any case.

    Args:
        src: SAT checkpoint or model folder.
        dst: SAT checkpoint or model folder that was made from it, at any number of ranks. If it has another dtype or
            is quantized, it must hold what casting or quantizing `src` gives.
        strict: Whether weights that are NaN or infinite are problems rather than warnings.

    Returns:
        What was seen; nothing is wrong if `problems` is empty.

    Raises:
        FileNotFoundError: If `src` or `dst` is not there at all, or lacks a file.
        ValueError: If `src` or `dst` is not what it should be as a whole, so that tensors cannot be compared.
    """
    finite = FiniteWeights()
    if dst is not None:
        report = _compare(_open(Path(src)), _open(Path(dst)), finite)
    elif _is_model_folder(Path(src)):
        report = _check_model_folder(ModelFolder(src), finite)
    else:
        report = _check_download(Path(src), finite)
    report.not_finite = list(finite.found.values())
    if strict:
        report.problems += report.not_finite
    return report


def _is_model_folder(path: Path) -> bool:
    return (path / "config.json").is_file() and not (path / "latest").exists()


def _open(path: Path) -> SatCheckpoint | ModelFolder:
    if _is_model_folder(path):
        return ModelFolder(path)
    checkpoint = SatCheckpoint(path)
    require_model(checkpoint)
    return checkpoint


def _check_model_folder(source: ModelFolder, finite: FiniteWeights) -> VerificationReport:
    """Read all tensors of a model folder."""
    report = VerificationReport()
    tensors = source.tensors
    with progress_bar("Checking", sum(tensor.nbytes for tensor in tensors.values())) as progress:
        for name, tensor in tensors.items():
            for block in finite.watch(name, source.read(name)):
                progress.update(block.nbytes)
            report.num_tensors += 1
            report.num_bytes += tensor.nbytes
    return report


def _check_download(src: Path, finite: FiniteWeights) -> VerificationReport:
    """Check every rank file by itself, so that all damaged ones are named, and then all together."""
    report = VerificationReport()
    ranks: list[RankFile] = []
    _, found = find_rank_files(src)
    for number in sorted(found):
        try:
            ranks.append(read_rank_file(found[number]))
        except (ValueError, OSError) as error:
            report.problems.append(str(error))
    with progress_bar(
        "Checking", sum(member.nbytes for rank in ranks for member in rank.members.values())
    ) as progress:
        for rank in ranks:
            held: dict[Member | None, list[StoredTensor]] = {}
            for tensor in rank.tensors.values():
                held.setdefault(tensor.member, []).append(tensor)
            for member in rank.members.values():
                try:
                    _check_member(member, held.get(member, []), finite)
                except (ValueError, OSError) as error:
                    report.problems.append(f"{member.path}: {error}" if isinstance(error, OSError) else str(error))
                progress.update(member.nbytes)
            if any(member.crc is None for member in rank.members.values()):
                report.problems.append(f"{rank.path} was saved without checksums and cannot be checked")
            report.num_tensors += len(rank.tensors)
            report.num_bytes += sum(tensor.nbytes for tensor in rank.tensors.values())
    if not report.problems:
        try:
            require_model(SatCheckpoint(src))
        except (ValueError, FileNotFoundError) as error:
            report.problems.append(str(error))
    return report


def _check_member(member: Member, tensors: list[StoredTensor], finite: FiniteWeights) -> None:
    """Compare the checksum of a member, and look at the values of the tensors that it holds."""
    if not any(tensor.is_whole_member for tensor in tensors):
        check_member(member, tensors[0].name if tensors else member.name)
    for tensor in tensors:
        for _ in finite.watch(f"{tensor.path}: {tensor.name}", read_merged(REPLICATED, [tensor])):
            pass


def _compare(
    source: SatCheckpoint | ModelFolder, target: SatCheckpoint | ModelFolder, finite: FiniteWeights
) -> VerificationReport:
    """Compare all tensors of `target` with what `source` gives for them."""
    report = VerificationReport()
    expected, actual = source.tensors, target.tensors
    is_quantized_here = source.bits is None and target.bits is not None
    made = {name for name in actual if is_quantized_here and name.endswith("_scale")}
    if source.bits not in (None, target.bits) or expected.keys() != actual.keys() - made:
        raise ValueError(
            f"the second has {len(actual)} tensors of a model {_quantization(target)}, but {len(expected)} of one "
            f"{_quantization(source)} were expected; compare a model with what was made from it"
        )
    with progress_bar("Comparing", sum(tensor.nbytes for tensor in expected.values())) as progress:
        for name, tensor in expected.items():
            unit = {stored: actual[stored] for stored in (name, f"{name}_scale") if stored in {name} | made}
            try:
                blocks = converted(
                    name, _regrouped(name, finite.watch(name, source.read(name)), unit[name]), tensor.dtype, unit
                )
                with closing(read_ahead(blocks)) as ahead:
                    difference = _first_difference(ahead, {stored: target.read(stored) for stored in unit})
            except ValueError as error:
                difference = str(error)
            if difference is not None:
                report.problems.append(difference)
            report.num_tensors += 1
            report.num_bytes += tensor.nbytes
            progress.update(tensor.nbytes)
    return report


def _quantization(side: SatCheckpoint | ModelFolder) -> str:
    return f"quantized to int{side.bits}" if side.bits else "that is not quantized"


def _regrouped(name: str, blocks: Iterator[Tensor], actual: Tensor) -> Iterator[Tensor]:
    """Yield the blocks of a scale with every column as often as the other side, sharded over more ranks, has it."""
    for block in blocks:
        times = actual.shape[1] // block.shape[1] if name.endswith("_scale") else 1
        yield block.repeat_interleave(times, dim=1) if times > 1 else block


def _first_difference(blocks: Iterator[tuple[str, Tensor]], readers: dict[str, Iterator[Tensor]]) -> str | None:
    """
    Return what differs first between `blocks` and the rows that `readers` give, in words; None if nothing does.

    All rows are read in any case, so that a damaged file raises ValueError by its checksum.
    """
    difference = None
    for name, row, expected, actual in _aligned(blocks, readers):
        if difference is None:
            difference = _difference(name, row, expected, actual)
    left = [name for name, reader in readers.items() if sum(1 for _ in reader)]
    return difference or (f"{left[0]} has more rows than expected" if left else None)


def _difference(name: str, row: int, expected: Tensor, actual: Tensor | None) -> str | None:
    """Return what differs first between two blocks that begin at `row`, in words."""
    if actual is None or expected.shape != actual.shape or expected.dtype != actual.dtype:
        return f"{name} has another shape or dtype than expected"
    if torch.equal(_as_bytes(expected), _as_bytes(actual)):
        return None
    differs = (_as_bytes(expected) != _as_bytes(actual)).view(*expected.shape, -1).any(-1)
    index = tuple(differs.nonzero()[0].tolist())
    where = ", ".join(map(str, (row + index[0], *index[1:])))
    return f"{name}[{where}] is {actual[index].item()}, expected {expected[index].item()}"


def _aligned(
    blocks: Iterator[tuple[str, Tensor]], readers: dict[str, Iterator[Tensor]]
) -> Iterator[tuple[str, int, Tensor, Tensor | None]]:
    """Yield (name, index of the first row, expected rows, as many rows of the reader); None where it has ended."""
    for name, group in groupby(blocks, key=itemgetter(0)):
        row, rest = 0, None
        for _, block in group:
            while len(block):
                if rest is None or not len(rest):
                    rest = next(readers[name], None)
                count = len(block) if rest is None else min(len(block), len(rest))
                yield name, row, block[:count], None if rest is None else rest[:count]
                row, block, rest = row + count, block[count:], None if rest is None else rest[count:]


def _as_bytes(block: Tensor) -> Tensor:
    return block.contiguous().view(torch.uint8)
