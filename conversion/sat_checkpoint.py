"""Read SAT checkpoints of any tensor-parallel size without loading them.

Stored layout: `latest`, a text file with the name of the iteration folder; in that folder one zip file of `torch.save`
per rank, `mp_rank_RR_model_states.pt` = `{"module": {name: tensor}}`. Files are mapped, so that a tensor takes memory
only once it is read, and only plain tensors are unpickled, so that a file cannot run code.
"""

import pickle
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from glm_hf.conversion.name_map import is_rotary_buffer, layer_index

RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
ITERATION_KEYS = ("iteration", "global_steps")
# Files are mapped anew, which frees the pages read so far, after this many bytes or the largest tensor.
MIN_BYTES_BETWEEN_MAPPINGS = 128 * 2**20


class SatCheckpoint:
    """
    The rank files of one SAT checkpoint, which hold the same names in the same shapes and dtypes.

    Args:
        src: The checkpoint's folder with `latest`, or its iteration folder.

    Attributes:
        paths: Rank files in the order of their ranks.

    Raises:
        FileNotFoundError: If `src`, its iteration folder or a rank file is missing.
        ValueError: If a file cannot be read as plain tensors, or the files do not belong together.
    """

    def __init__(self, src: str | Path) -> None:
        folder = _iteration_folder(Path(src))
        found = {int(match[1]): path for path in folder.iterdir() if (match := RANK_FILE.fullmatch(path.name))}
        first = found[min(found)]
        self.paths = _rank_paths(folder, found, _tp_size(first, _load(first)["module"]))
        self._map_files()
        self._check_ranks()
        self._bytes_read = 0
        largest = max(tensor.nbytes for tensor in self._first.values()) * self.tp_size
        self._bytes_between_mappings = max(largest, MIN_BYTES_BETWEEN_MAPPINGS)

    @property
    def _first(self) -> dict[str, Tensor]:
        return self._contents[0]["module"]

    @property
    def tp_size(self) -> int:
        """Number of ranks."""
        return len(self.paths)

    @property
    def names(self) -> list[str]:
        """SAT names of all parameters."""
        return [name for name in self._first if not is_rotary_buffer(name)]

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Dtypes of all parameters."""
        return {self._first[name].dtype for name in self.names}

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return 1 + max((index for name in self.names if (index := layer_index(name)) is not None), default=-1)

    @property
    def head_dim(self) -> int | None:
        """Size of a head as the rotary frequencies tell it, None without them."""
        name = next((name for name in self._first if is_rotary_buffer(name)), None)
        if name is None:
            return None
        # The original tool for other tensor-parallel sizes cuts these frequencies in some checkpoints.
        parts = self.parts(name)
        is_whole = all(torch.equal(part, parts[0]) for part in parts)
        return 2 * (len(parts[0]) if is_whole else sum(len(part) for part in parts))

    def shape(self, name: str) -> torch.Size:
        """Return the shape of one rank's part of `name`."""
        return _get(self.paths[0], self._first, name).shape

    def numel(self, name: str) -> int:
        """Return the number of elements of one rank's part of `name`."""
        return self.shape(name).numel()

    def parts(self, name: str) -> list[Tensor]:
        """Return the parts of all ranks of `name`, mapped; drop them before asking for the next ones."""
        nbytes = self._first[name].nbytes * self.tp_size
        if self._bytes_read + nbytes > self._bytes_between_mappings:
            self._map_files()
            self._bytes_read = 0
        self._bytes_read += nbytes
        return [content["module"][name].detach() for content in self._contents]

    def _map_files(self) -> None:
        self._contents: list[dict] = []  # earlier mappings go before new ones come
        self._contents = [_load(path) for path in self.paths]

    def _check_ranks(self) -> None:
        """Raise ValueError unless all ranks are of one iteration and hold the same names, shapes and dtypes."""
        first_path, first = self.paths[0], self._contents[0]
        for path, rank in zip(self.paths, self._contents, strict=True):
            for key in ITERATION_KEYS:
                if rank.get(key) != first.get(key):
                    raise ValueError(
                        f"{path} is of {key} {rank.get(key)}, but {first_path} is of {first.get(key)}; "
                        "all ranks must come from the same iteration"
                    )
            if difference := rank["module"].keys() ^ first["module"].keys():
                name = min(difference)
                owner, other = (path, first_path) if name in rank["module"] else (first_path, path)
                raise ValueError(f"{owner} holds {name}, but {other} does not; all ranks must hold the same tensors")
            for name, tensor in rank["module"].items():
                expected = first["module"][name]
                if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
                    raise ValueError(
                        f"{path}: {name} is {_describe(tensor)}, but {_describe(expected)} in {first_path}; "
                        "all ranks must hold parts of the same shape and dtype"
                    )


def _iteration_folder(src: Path) -> Path:
    """Return the folder with the rank files that `src` names."""
    if not src.is_dir():
        raise FileNotFoundError(f"{src} is not a folder; expected a SAT checkpoint")
    latest = src / "latest"
    folder = src
    if latest.is_file():
        iteration = latest.read_text(encoding="utf-8", errors="replace").strip()
        folder = src / iteration
        if not iteration or not folder.is_dir():
            raise FileNotFoundError(f"{latest} names {iteration!r}, but {src} has no folder of that name")
    if not any(RANK_FILE.fullmatch(path.name) for path in folder.iterdir()):
        expected = "latest or mp_rank_00_model_states.pt" if folder == src else "mp_rank_00_model_states.pt"
        raise FileNotFoundError(f"{folder} holds no SAT checkpoint; expected {expected} in it")
    return folder


def _rank_paths(folder: Path, found: Iterable[int], tp_size: int) -> list[Path]:
    """Return the files of `tp_size` ranks, which are to be the ones `found`."""
    paths = [folder / f"mp_rank_{rank:02d}_model_states.pt" for rank in range(tp_size)]
    problem = f"expected {tp_size} ranks as the shapes tell, found {len(set(found))}"
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{folder}: {problem}: {', '.join(missing)} missing")
    if surplus := sorted(set(found) - set(range(tp_size))):
        raise ValueError(f"{folder}: {problem}: remove the files of ranks {surplus}, which belong elsewhere")
    return paths


def _load(path: Path) -> dict:
    """Map a rank file and check that its `module` maps names to tensors of a model that is not quantized."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than plain tensors or is damaged; refused, because reading it further could run code"
        ) from error
    except Exception as error:  # whatever torch trips over in a damaged file
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is not a complete zip file of torch.save, copy it again: {reason}") from error
    module = content.get("module") if isinstance(content, dict) else None
    if not isinstance(module, dict) or not module:
        raise ValueError(f"{path} has no tensors under the key 'module'; expected a rank file of a SAT checkpoint")
    for name, tensor in module.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {name} is a {type(tensor).__name__}; expected a tensor")
        if name.endswith(".weight_scale") or tensor.dtype == torch.int8:
            raise ValueError(
                f"{path}: {name} is quantized; importing quantized SAT checkpoints is not supported yet, "
                "convert the fp16 checkpoint instead"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is {_describe(tensor)}; expected floating point")
    return content


def _tp_size(path: Path, module: dict[str, Tensor]) -> int:
    """Return the number of ranks, which the uncut final norm `(D)` and the cut bias `(3D/n)` tell."""
    hidden_size = _get(path, module, "transformer.final_layernorm.weight").numel()
    rows = _get(path, module, "transformer.layers.0.attention.query_key_value.bias").numel()
    if not rows or 3 * hidden_size % rows:
        raise ValueError(
            f"{path}: transformer.layers.0.attention.query_key_value.bias has {rows} elements; expected an equal "
            f"share of {3 * hidden_size}, three times the size of transformer.final_layernorm.weight"
        )
    return 3 * hidden_size // rows


def _get(path: Path, module: dict[str, Tensor], name: str) -> Tensor:
    if name not in module:
        raise ValueError(f"{path}: {name} is missing; expected a complete GLM-130B checkpoint")
    return module[name]


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}".replace("torch.", "")
