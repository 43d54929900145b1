"""Read SAT checkpoints of any tensor-parallel size, quantized or not, without loading them.

Stored layout: `latest`, a text file with the name of the iteration folder; in that folder one rank file per
tensor-parallel rank, `mp_rank_RR_model_states.pt`. A quantized weight is int8 (two codes per byte for 4 bits) and has
a scale `(rows)` of its own on every rank, which is read as `(rows, 1)`.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm_hf.conversion.formats.names import is_rotary_buffer, layer_index, to_model_name, to_sat_name
from glm_hf.conversion.formats.rank_file import (
    LIKE_A_RANK_FILE,
    RANK_FILE,
    RankFile,
    canonical_files,
    describe,
    read_rank_file,
)
from glm_hf.conversion.streaming.blocks import read_merged
from glm_hf.conversion.streaming.stored_tensor import Member, RowReader, StoredTensor, check_member
from glm_hf.sharding.rules import REPLICATED, shard_rule

LONGEST_NAME = 255
QKV = "transformer.layers.0.attention.query_key_value.weight"


class SatCheckpoint:
    """
    The rank files of one SAT checkpoint, which hold the same names in the same shapes and dtypes.

    Args:
        src: The checkpoint's folder with `latest`, or its iteration folder.

    Attributes:
        folder: The iteration folder.
        ranks: Rank files in the order of their ranks.

    Raises:
        FileNotFoundError: If `src`, its iteration folder or a rank file is missing.
        ValueError: If a file cannot be read as plain tensors, or the files do not belong together.
    """

    def __init__(self, src: str | Path) -> None:
        self.folder, found = find_rank_files(Path(src))
        first = read_rank_file(found[min(found)])
        paths = _rank_paths(self.folder, found, _tp_size(first))
        self.ranks = [first, *(read_rank_file(path) for path in paths[1:])]
        self._check_ranks()
        self._checked_members: set[Member] = set()

    @property
    def tp_size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def names(self) -> list[str]:
        """The model's names of all parameters."""
        names = []
        for sat_name in self.ranks[0].tensors:
            if not is_rotary_buffer(sat_name):
                try:
                    names.append(to_model_name(sat_name))
                    shard_rule(names[-1])
                except KeyError:
                    raise ValueError(
                        f"{self.ranks[0].path}: {sat_name} is unknown; expected the tensors of GLM-130B only"
                    ) from None
        return names

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All parameters, joined, on meta by the model's names."""
        tensors = {}
        for name in self.names:
            part = self._parts(name)[0]
            shape = shard_rule(name).full_shape(part.shape, self.tp_size)
            tensors[name] = torch.empty(shape, dtype=part.dtype, device="meta")
        return tensors

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        layers = {i for name in self.ranks[0].tensors if (i := layer_index(name)) is not None}
        if missing := sorted(set(range(len(layers))) - layers):
            raise ValueError(f"{self.ranks[0].path}: layer {missing[0]} is missing; expected a complete checkpoint")
        return len(layers)

    @property
    def bits(self) -> int | None:
        """Bits of the quantized weights, None if they are not quantized."""
        weight = _get(self.ranks[0], QKV)
        if weight.dtype != torch.int8:
            return None
        bits = 8 * weight.shape[-1] / self.hidden_size
        if bits not in (4, 8):
            raise ValueError(f"{weight.path}: {QKV} has {bits:g} bits per weight; expected 4 or 8")
        return int(bits)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return _hidden_size(self.ranks[0])

    @property
    def head_dim(self) -> int | None:
        """Size of a head as the rotary frequencies tell it, None without them."""
        name = next((name for name in self.ranks[0].tensors if is_rotary_buffer(name)), None)
        if name is None:
            return None
        # The original tool for other tensor-parallel sizes shards these frequencies in some checkpoints.
        parts = [rank.tensors[name] for rank in self.ranks]
        wholes = [_read_whole(part) for part in parts if part.has_values]
        is_cut = not all(torch.equal(whole, wholes[0]) for whole in wholes)
        return 2 * parts[0].shape[0] * (self.tp_size if is_cut else 1)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Dtypes of all parameters that are not quantized weights or their scales."""
        return {
            tensor.dtype
            for name, tensor in self.ranks[0].tensors.items()
            if tensor.dtype != torch.int8 and not name.endswith("_scale") and not is_rotary_buffer(name)
        }

    @property
    def iteration(self) -> dict[str, Any]:
        """What the rank files tell of the iteration they were saved at."""
        return self.ranks[0].iteration

    @property
    def sources(self) -> dict[str, Any]:
        """Size and hash of every rank file by its name."""
        return {rank.path.name: rank.fingerprint for rank in self.ranks}

    def numel(self, name: str) -> int:
        """Return the number of elements of the joined parameter `name`."""
        part = self._parts(name)[0]
        return prod(shard_rule(name).full_shape(part.shape, self.tp_size))

    def read(self, name: str) -> Iterator[Tensor]:
        """
        Yield the joined parameter `name` in blocks of rows.

        Raises:
            ValueError: If its bytes are not those that were written.
        """
        parts = self._parts(name)
        for part in parts:
            if part.member and part.member not in self._checked_members and not part.is_whole_member:
                check_member(part.member, part.name)
                self._checked_members.add(part.member)
        return read_merged(shard_rule(name), parts)

    def require(self, tensors: dict[str, Tensor]) -> None:
        """
        Check that the checkpoint holds exactly `tensors`, sharded by the rules, without reading any values.

        Args:
            tensors: What is expected, on meta by the model's names; of a dtype it only matters whether it is a float.

        Raises:
            ValueError: If a tensor is missing, unknown or of another shape.
        """
        path = self.ranks[0].path
        if unknown := sorted(set(self.names) - tensors.keys()):
            raise ValueError(f"{path}: {to_sat_name(unknown[0])} is unknown; expected the tensors of GLM-130B only")
        for name, tensor in tensors.items():
            sat_name, rule = to_sat_name(name), shard_rule(name)
            parts = self._parts(name)
            shape = rule.shard_shape(tensor.shape, self.tp_size)
            if parts[0].shape != shape:
                raise ValueError(f"{path}: {sat_name} has shape {parts[0].shape}, expected {shape}")
            if name.endswith("_scale") and parts[0].dtype != torch.float16:
                raise ValueError(f"{path}: {sat_name} is {parts[0].dtype}, expected torch.float16")
            if parts[0].dtype.is_floating_point != tensor.dtype.is_floating_point:
                kinds = ("quantized", "floating point")[:: 1 if tensor.dtype.is_floating_point else -1]
                raise ValueError(f"{path}: {sat_name} is {kinds[0]}, but {kinds[1]} was expected, as {QKV} is")

    def check_values(self) -> None:
        """
        Read what is replicated, to check that the files belong together.

        Raises:
            ValueError: If a replicated parameter differs between ranks, or a file is a copy of another rank's.
        """
        for rank in self.ranks:
            for part in rank.tensors.values():
                if not part.has_values and not is_rotary_buffer(part.name):
                    raise ValueError(f"{part.path}: {part.name} was saved on meta and has no values")
        self._require_distinct_ranks()
        for name in self.names:
            if shard_rule(name) == REPLICATED:
                parts = self._parts(name)
                wholes = [_read_whole(part) for part in parts]
                if differing := [i for i, whole in enumerate(wholes) if not _have_equal_bytes(whole, wholes[0])]:
                    raise ValueError(
                        f"{self.folder}: {to_sat_name(name)} must be equal on all ranks, but rank 0 and ranks "
                        f"{differing} differ; the files do not belong together or are damaged"
                    )

    def _parts(self, name: str) -> list[StoredTensor]:
        """Return what every rank holds of the parameter `name`, a scale as a column."""
        parts = [_get(rank, to_sat_name(name)) for rank in self.ranks]
        if name.endswith("_scale"):
            return [replace(part, shape=(*part.shape, 1), stride=(*part.stride, 1)) for part in parts]
        return parts

    def _check_ranks(self) -> None:
        """Raise ValueError unless all ranks are of one iteration and hold the same names, shapes and dtypes."""
        first = self.ranks[0]
        for number, rank in enumerate(self.ranks):
            if rank.saved_as not in (None, number):
                raise ValueError(
                    f"{rank.path} was saved as mp_rank_{rank.saved_as:02d}_model_states.pt: it was renamed, or files "
                    "were swapped; give it back its name"
                )
            for key in rank.iteration.keys() | first.iteration.keys():
                if rank.iteration.get(key) != first.iteration.get(key):
                    raise ValueError(
                        f"{rank.path} is of {key} {rank.iteration.get(key)}, but {first.path} is of "
                        f"{first.iteration.get(key)}; all ranks must come from the same iteration"
                    )
            if difference := rank.tensors.keys() ^ first.tensors.keys():
                name = min(difference)
                owner, other = (rank, first) if name in rank.tensors else (first, rank)
                raise ValueError(
                    f"{owner.path} holds {name}, but {other.path} does not; all ranks must hold the same tensors"
                )
            for name, part in rank.tensors.items():
                expected = first.tensors[name]
                if (part.shape, part.dtype) != (expected.shape, expected.dtype):
                    raise ValueError(
                        f"{rank.path}: {name} is {describe(part.shape, part.dtype)}, but "
                        f"{describe(expected.shape, expected.dtype)} in {first.path}; all ranks must hold parts of "
                        "the same shape and dtype"
                    )

    def _require_distinct_ranks(self) -> None:
        """Raise ValueError if all that should differ between ranks has the same checksums on two of them."""
        sharded = [to_sat_name(name) for name in self.names if shard_rule(name) != REPLICATED]
        seen: dict[tuple, RankFile] = {}
        for rank in self.ranks:
            parts = [rank.tensors[name] for name in sharded]
            members = [(part.member, part.offset) for part in parts if part.member and part.member.crc is not None]
            crcs = tuple((member.crc, offset - member.offset) for member, offset in members)
            other = seen.setdefault(crcs, rank)
            if crcs and other is not rank and not _is_constant(rank.tensors[QKV]):
                raise ValueError(
                    f"{rank.path}: {parts[0].name} and all other tensors are those of {other.path}; one of them is a "
                    "copy in place of another rank"
                )


def find_rank_files(src: Path) -> tuple[Path, dict[int, Path]]:
    """
    Return the iteration folder that `src` names, and the rank files in it by their ranks.

    Raises:
        FileNotFoundError: If `src`, its iteration folder or every rank file is missing.
        ValueError: If another file looks like that of a rank.
    """
    if not src.is_dir():
        raise FileNotFoundError(f"{src} is not a folder; expected a SAT checkpoint")
    latest = src / "latest"
    folder = src
    if latest.is_file():
        with open(latest, "rb") as file:
            iteration = file.read(LONGEST_NAME).decode("utf-8", errors="replace").strip()
        folder = src / iteration
        if (
            iteration in ("", ".", "..")
            or "\0" in iteration
            or Path(iteration).name != iteration
            or not folder.is_dir()
        ):
            raise FileNotFoundError(f"{latest} names {iteration!r}, but {src} has no folder of that name")
    paths = canonical_files(folder, RANK_FILE, LIKE_A_RANK_FILE)
    found = {int(path.name.split("_")[2]): path for path in paths}
    if not found:
        expected = "latest or mp_rank_00_model_states.pt" if folder == src else "mp_rank_00_model_states.pt"
        raise FileNotFoundError(f"{folder} holds no SAT checkpoint; expected {expected} in it")
    return folder.resolve(), found


def _rank_paths(folder: Path, found: Iterable[int], tp_size: int) -> list[Path]:
    """Return the files of `tp_size` ranks, which are to be the ones `found`."""
    paths = [folder / f"mp_rank_{rank:02d}_model_states.pt" for rank in range(tp_size)]
    problem = f"expected {tp_size} ranks as the shapes tell, found {len(set(found))}"
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{folder}: {problem}: {', '.join(missing)} missing")
    if surplus := sorted(set(found) - set(range(tp_size))):
        raise ValueError(f"{folder}: {problem}: remove the files of ranks {surplus}, which belong elsewhere")
    return paths


def _tp_size(rank: RankFile) -> int:
    """Return the number of ranks, which the replicated final norm `(D)` and the sharded bias `(3D/n)` tell."""
    name = "transformer.layers.0.attention.query_key_value.bias"
    hidden_size, rows = _hidden_size(rank), prod(_get(rank, name).shape)
    if 3 * hidden_size % rows:
        raise ValueError(
            f"{rank.path}: {name} has {rows} elements; expected an equal share of {3 * hidden_size}, three times the "
            "size of transformer.final_layernorm.weight"
        )
    return 3 * hidden_size // rows


def _hidden_size(rank: RankFile) -> int:
    return prod(_get(rank, "transformer.final_layernorm.weight").shape)


def _get(rank: RankFile, name: str) -> StoredTensor:
    if name not in rank.tensors:
        raise ValueError(f"{rank.path}: {name} is missing; expected a complete GLM-130B checkpoint")
    return rank.tensors[name]


def _read_whole(part: StoredTensor) -> Tensor:
    with closing(RowReader(part)) as reader:
        return reader.take(part.shape[0])


def _is_constant(part: StoredTensor) -> bool:
    """Tell whether the first rows of a tensor hold nothing but one number, as in checkpoints made for trials."""
    with closing(RowReader(part)) as reader:
        block = next(reader.blocks(part.shape[0]))
        return bool((block == block.flatten()[0]).all())


def _have_equal_bytes(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
