"""Read the weights of a Hugging Face model folder, quantized or not, in blocks of rows, without loading them.

The folder holds config.json and model.safetensors, or shards with model.safetensors.index.json, as the converter and
`save_pretrained` write them. safetensors files have no checksums.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glm_hf.conversion.formats.model_tensors import model_tensors
from glm_hf.conversion.formats.safetensors_writer import DTYPE_NAMES
from glm_hf.conversion.streaming.blocks import read_merged
from glm_hf.conversion.streaming.stored_tensor import StoredTensor, contiguous_stride
from glm_hf.folders.validation import (
    parse_config,
    read_json,
    require_files,
    require_generation_config,
    require_regular,
    weight_files,
)
from glm_hf.quantization.configuration import GLMQuantizationConfig
from glm_hf.sharding.rules import REPLICATED


class ModelFolder:
    """
    The configuration and the stored tensors of `GLMForBlankInfilling`.

    Args:
        src: The folder.

    Attributes:
        config: The model's configuration, without that of the quantization.
        quantization: Quantization of the weights, None for none.
        sources: Size, time of change and hash of the header of every file by its name.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If it is not a model of this type, a file is damaged, or the tensors are not those of the model.
    """

    def __init__(self, src: str | Path) -> None:
        self._folder = Path(src)
        require_files(self._folder, ["config.json"])
        fields = read_json(self._folder / "config.json")
        stored_as = fields.pop("quantization_config", None)
        self.config, self.quantization = parse_config(fields, src), None
        if stored_as:
            if not isinstance(stored_as, dict):
                raise ValueError(f"{src}/config.json: quantization_config must be an object, got {stored_as}")
            try:
                self.quantization = GLMQuantizationConfig.of(stored_as)
            except ValueError as error:
                raise ValueError(f"{src}/config.json: {error}") from error
        require_generation_config(self._folder, self.config)
        paths = weight_files(self._folder)
        self._stored: dict[str, StoredTensor] = {}
        for stored in (stored for path in paths for stored in _read_header(path)):
            if stored.name in self._stored:
                raise ValueError(f"{stored.path}: {stored.name} is also in {self._stored[stored.name].path}")
            self._stored[stored.name] = stored
        self._require_model()
        self.sources = {path.name: _fingerprint(path) for path in paths}

    @property
    def bits(self) -> int | None:
        """Bits of the quantized linears, None if weights are not quantized."""
        return None if self.quantization is None else self.quantization.bits

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors, on meta by name and in the order of the model."""
        return {
            name: torch.empty(self._stored[name].shape, dtype=self._stored[name].dtype, device="meta")
            for name in self._expected()
        }

    def read(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor `name` in blocks of rows."""
        return read_merged(REPLICATED, [self._stored[name]])

    def _expected(self) -> dict[str, Tensor]:
        return model_tensors(self.config, torch.float16, self.quantization)

    def _require_model(self) -> None:
        """Raise ValueError unless the files hold exactly the tensors of the model."""
        expected = self._expected()
        if difference := sorted(expected.keys() ^ self._stored.keys()):
            state = "is missing" if difference[0] in expected else "is unknown"
            raise ValueError(f"{self._folder}: {difference[0]} {state}; expected the tensors of GLMForBlankInfilling")
        for name, tensor in expected.items():
            stored = self._stored[name]
            is_right_kind = (
                stored.dtype == tensor.dtype or stored.dtype.is_floating_point and tensor.dtype.is_floating_point
            )
            if stored.shape != tensor.shape or not is_right_kind:
                raise ValueError(
                    f"{stored.path}: {name} is {stored.shape} {stored.dtype}, but config.json tells "
                    f"{tuple(tensor.shape)} {tensor.dtype}"
                )


def _read_header(path: Path) -> list[StoredTensor]:
    """Return where the tensors of a safetensors file lie."""
    require_regular(path)
    try:
        with safe_open(path, framework="pt"):  # the library checks the header and the size of the file
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}; make the folder again") from error
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    stored = []
    for name, entry in entries.items():
        if name != "__metadata__":
            if entry["dtype"] not in dtypes:
                raise ValueError(f"{path}: {name} is {entry['dtype']}; expected one of {', '.join(dtypes)}")
            shape = tuple(entry["shape"])
            offset = 8 + length + entry["data_offsets"][0]
            stored.append(StoredTensor(path, name, dtypes[entry["dtype"]], shape, contiguous_stride(shape), offset))
    return stored


def _fingerprint(path: Path) -> dict[str, Any]:
    """Return size, time of change and a hash of the header of a safetensors file."""
    with open(path, "rb") as file:
        header = file.read(8)
        header += file.read(int.from_bytes(header, "little"))
    status = path.stat()
    return {
        "size": status.st_size,
        "changed_ns": status.st_mtime_ns,
        "header": hashlib.sha256(header).hexdigest(),
    }
