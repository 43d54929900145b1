"""Read a checkpoint of 3D-parallel training, block by block, after a check of all of its files.

Layout of a checkpoint, as far as it is read:
    config.json     the model
    parallel.json   {"tp_size": n, ...}: every layer is sharded over n tensor-parallel ranks
    latest          the name of the folder of DeepSpeed's files, such as global_step4:
    global_step4/layer_LL-model_TT-model_states.pt    what rank TT holds of part LL, as {name: tensor}
Part 0 is the embedding, part N + 1 is layer N; then come the final norm and the LM head, which is a copy of the
embedding if they are tied. A rank holds what the shard rules give it.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm_hf.configuration_glm import GLMConfig
from glm_hf.conversion.formats.model_tensors import model_tensors
from glm_hf.conversion.formats.rank_file import RankFile, canonical_files, describe, read_rank_file
from glm_hf.conversion.streaming.blocks import read_merged
from glm_hf.conversion.streaming.stored_tensor import StoredTensor, check_member
from glm_hf.folders.validation import read_config, read_json, read_text
from glm_hf.sharding.degrees import ParallelDegrees
from glm_hf.sharding.rules import REPLICATED, shard_rule

EMBEDDING = "model.embed_tokens.weight"
CHECKPOINT = re.compile(r"checkpoint-(\d+)", re.ASCII)
PART_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt", re.ASCII)
LONGEST_NAME = 255
LIKE_A_PART_FILE = re.compile(r"layer.*model_?states?")


class Checkpoint3D:
    """
    The configuration and the stored tensors of a checkpoint, after a check of all names, shapes and dtypes.

    Args:
        src: The checkpoint.

    Attributes:
        config: The model's configuration.
        tensors: All tensors, joined, on meta by name and in the order of the model.
        sources: Size and hash of every file by its name.

    Raises:
        FileNotFoundError: If it is no checkpoint of 3D-parallel training, or a file is missing.
        ValueError: If a file is damaged, or the tensors are not those of the model.
    """

    def __init__(self, src: str | Path) -> None:
        folder = _deepspeed_folder(Path(src))
        if (Path(src) / "adapter_config.json").is_file():
            raise ValueError(f"{src} holds an adapter alone: load it by PeftModel.from_pretrained, on the model")
        self.config, tp_size = _read_config(Path(src)), _read_tp_size(Path(src))
        tensors = model_tensors(self.config, torch.float16)
        places = _places(tensors, self.config, (folder / _file_name(self.config.num_hidden_layers + 2, 0)).exists())
        _require_files(folder, len(places), tp_size)
        self._parts: dict[str, list[StoredTensor]] = {name: [] for name in tensors}
        self._copies: list[StoredTensor] = []
        self.sources: dict[str, Any] = {}
        for part, names in enumerate(places):
            shapes = {inner: _shard_shape(name, tensors[name], tp_size) for inner, name in names.items()}
            for rank in range(tp_size):
                file = _read_part_file(folder / _file_name(part, rank))
                self.sources[file.path.name] = file.fingerprint
                _require_tensors(file, shapes)
                for inner, name in names.items():
                    is_copy = part > 0 and name == EMBEDDING
                    (self._copies if is_copy else self._parts[name]).append(file.tensors[inner])
        dtype = self._require_one_dtype()
        self.tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}

    def read(self, name: str) -> Iterator[Tensor]:
        """Yield the joined tensor `name` in blocks of rows; ValueError if they are not what was written."""
        for part in self._parts[name]:
            if part.member and not part.is_whole_member:
                check_member(part.member, part.name)
        return read_merged(shard_rule(name), self._parts[name])

    def check_values(self) -> None:
        """
        Read what several files hold, which training keeps alike.

        Raises:
            ValueError: If a replicated tensor differs between ranks, or a tied LM head from the embedding.
        """
        for name, parts in self._parts.items():
            for part in parts[1:] if shard_rule(name) == REPLICATED else ():
                _require_equal(parts[0], part, "all ranks must hold the same")
        for part, copy in zip(self._parts[EMBEDDING], self._copies, strict=False):
            _require_equal(part, copy, "the LM head is tied to the embedding")

    def _require_one_dtype(self) -> torch.dtype:
        """Return the dtype of all tensors; ValueError if they have several."""
        [first, *_] = self._parts[EMBEDDING]
        for part in (part for parts in (*self._parts.values(), self._copies) for part in parts):
            if part.dtype != first.dtype or not part.dtype.is_floating_point:
                raise ValueError(
                    f"{part.path}: {part.name} is {part.dtype}, but {first.name} in {first.path} is {first.dtype}; "
                    "expected one floating point dtype"
                )
        return first.dtype


def _deepspeed_folder(src: Path) -> Path:
    """Return the folder of DeepSpeed's files in the checkpoint `src`."""
    names = ("config.json", "parallel.json", "latest")
    if missing := [name for name in names if not (src / name).is_file()]:
        matches = [CHECKPOINT.fullmatch(path.name) for path in src.glob("checkpoint-*")]
        if steps := [int(match[1]) for match in matches if match]:
            raise ValueError(f"{src} holds checkpoints; give one of them, the last is {src}/checkpoint-{max(steps)}")
        raise FileNotFoundError(
            f"{src} must be a checkpoint of 3D-parallel training, as GLM3DTrainer writes it, but has no "
            f"{', '.join(missing)}"
        )
    tag = read_text(src / "latest", LONGEST_NAME).strip()
    if tag in ("", ".", "..") or Path(tag).name != tag or not (src / tag).is_dir():
        raise FileNotFoundError(f"{src / 'latest'} names {tag!r}, but {src} has no folder of that name")
    return src / tag


def _read_config(src: Path) -> GLMConfig:
    config = read_config(src)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{src}/config.json has a quantization_config, but weights in training are not quantized")
    return config


def _read_tp_size(src: Path) -> int:
    degrees = read_json(src / "parallel.json")
    try:
        return ParallelDegrees.of(degrees).tp_size
    except ValueError as error:
        raise ValueError(f"{src}/parallel.json: {error}") from error


def _file_name(part: int, rank: int) -> str:
    return f"layer_{part:02d}-model_{rank:02d}-model_states.pt"


def _places(tensors: dict[str, Tensor], config: GLMConfig, has_copy: bool) -> list[dict[str, str]]:
    """Return what every part holds: the model's names of its tensors by their names in the part."""
    count = config.num_hidden_layers
    modules = {"model.embed_tokens": 0, "model.norm": count + 1, "lm_head": count + 2}
    places: list[dict[str, str]] = [{} for _ in range(count + 2)]
    if has_copy or not config.tie_word_embeddings:
        places.append({"weight": EMBEDDING} if config.tie_word_embeddings else {})
    for name in tensors:
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
            places[int(match[1]) + 1][match[2]] = name
        else:
            module, _, inner = name.rpartition(".")
            places[modules[module]][inner] = name
    return places


def _require_files(folder: Path, num_parts: int, tp_size: int) -> None:
    """Raise an error unless the files of parts in `folder` are those of `num_parts` parts on `tp_size` ranks."""
    expected = [_file_name(part, rank) for part in range(num_parts) for rank in range(tp_size)]
    told = f"config.json and parallel.json tell of {num_parts} parts on {tp_size} tensor-parallel ranks"
    for name in expected:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: {told}; copy the checkpoint again")
    found = {path.name for path in canonical_files(folder, PART_FILE, LIKE_A_PART_FILE)}
    if surplus := sorted(found - set(expected)):
        raise ValueError(f"{folder / surplus[0]} is not of this checkpoint: {told}; remove what belongs elsewhere")


def _read_part_file(path: Path) -> RankFile:
    """Return what a file holds; ValueError if it is damaged, renamed, or holds more than tensors by their names."""
    file = read_rank_file(path, key=None)
    saved_as = f"{next(iter(file.members.values())).name.split('/')[0]}.pt"
    if PART_FILE.fullmatch(saved_as) and saved_as != path.name:
        raise ValueError(f"{path} was saved as {saved_as}: it was renamed, or files were swapped; give it its name")
    return file


def _shard_shape(name: str, tensor: Tensor, tp_size: int) -> tuple[int, ...]:
    try:
        return shard_rule(name).shard_shape(tensor.shape, tp_size)
    except ValueError as error:
        raise ValueError(f"config.json and parallel.json do not fit: {name}: {error}") from error


def _require_tensors(file: RankFile, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless a file holds tensors of these shapes and nothing else."""
    if difference := sorted(shapes.keys() ^ file.tensors.keys()):
        state = "is missing" if difference[0] in shapes else "is unknown"
        raise ValueError(f"{file.path}: {difference[0]} {state}; expected the tensors of GLMForBlankInfilling")
    for name, shape in shapes.items():
        if (stored := file.tensors[name]).shape != shape:
            raise ValueError(
                f"{file.path}: {name} is {describe(stored.shape, stored.dtype)}, but config.json and parallel.json "
                f"tell {shape}"
            )


def _require_equal(first: StoredTensor, second: StoredTensor, why: str) -> None:
    """Raise ValueError unless two tensors of one shape and dtype have the same bytes."""
    blocks = zip(read_merged(REPLICATED, [first]), read_merged(REPLICATED, [second]), strict=True)
    # all blocks are read, since checksums are compared at the end: damage is no divergence
    are_equal = [torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in blocks]
    if not all(are_equal):
        raise ValueError(
            f"{second.path}: {second.name} differs from {first.name} in {first.path}, but {why}; training has gone "
            "wrong, or the files do not belong together: use another checkpoint"
        )
