"""A graph that is open in onnxruntime, and the folder it lies in."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm_hf.configuration_glm import GLMConfig
from glm_hf.folders.validation import GRAPH_FILE, parse_config, read_json, require_files, shortened
from glm_hf.onnx.configuration import GLMONNXConfig
from glm_hf.onnx.export import QUANTIZATIONS, QUANTIZED_HERE, require
from glm_hf.onnx.rooms import Rooms

WEIGHTS_FILE = "model.onnx.data"
DTYPES = {"tensor(float)": (torch.float32, np.float32), "tensor(float16)": (torch.float16, np.float16)}


class GraphSession:
    """
    A graph in onnxruntime, with all of its graph optimizations and as many threads as torch has.

    Args:
        folder: Folder of the graph.

    Attributes:
        config: Configuration that the graph was exported with; a copy, so that nobody changes it.
        dtype: Dtype of logits, keys and values.
        num_bytes: Size of the weights.
        quantized_here: Bits of the layers' weights if the export has quantized them, else None.

    Raises:
        ModuleNotFoundError: If onnxruntime is missing.
        FileNotFoundError: If a file is missing.
        ValueError: If this onnxruntime cannot run the graph, or it is another than those that are exported here.
    """

    def __init__(self, folder: Path) -> None:
        ort = require("onnxruntime")
        require_files(folder, [GRAPH_FILE, WEIGHTS_FILE])
        self.folder = folder
        self.config = read_graph_config(folder)
        self.num_bytes = (folder / WEIGHTS_FILE).stat().st_size
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(folder / GRAPH_FILE, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has no common class of them
            raise ValueError(
                f"{folder / GRAPH_FILE} cannot be run by onnxruntime {ort.__version__}: {first_line(error)}; it needs "
                "1.24 or newer, and a folder that is whole"
            ) from error
        kinds = {entry.name: entry.type for entry in self._session.get_inputs()}
        if not {"write_indices", "num_logits_to_keep", "past_key_values.0.key"} <= kinds.keys():
            raise ValueError(f"{folder / GRAPH_FILE} was not exported by glm_hf, whose inputs it lacks")
        self.dtype, self._numpy_dtype = DTYPES[kinds["past_key_values.0.key"]]
        notes = self._session.get_modelmeta().custom_metadata_map
        self.quantized_here = QUANTIZATIONS.get(notes.get(QUANTIZED_HERE, ""))
        self._options = ort.RunOptions()
        self._options.log_severity_level = 4  # of errors that are raised as well

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraphSession":
        """Return the same session, which nobody changes."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the folder, which is opened again."""
        return GraphSession, (self.folder,)

    def run(self, input_ids: Tensor, position_ids: Tensor, visible: Tensor, rooms: Rooms, num_logits: int) -> Tensor:
        """
        Compute the logits `(B, num_logits, V)` of the last tokens, and write keys and values of all into their rooms.

        Args:
            input_ids: `(B, L)`.
            position_ids: `(B, L)`.
            visible: `(B, 1, L, C)`.
            rooms: Where keys and values lie.
            num_logits: Tokens at the end whose logits are wanted.

        Raises:
            ValueError: If onnxruntime cannot compute them.
        """
        logits = torch.empty(len(input_ids), num_logits, self.config.vocab_size, dtype=self.dtype)
        binding = self._session.io_binding()
        given = {
            "input_ids": (input_ids, np.int64),
            "position_ids": (position_ids, np.int64),
            "attention_mask": (visible, np.bool_),
            "write_indices": (rooms.write_indices, np.int64),
            "num_logits_to_keep": (torch.tensor(num_logits), np.int64),
        }
        given = {name: (tensor.contiguous(), kind) for name, (tensor, kind) in given.items()}  # alive until the end
        for name, (tensor, kind) in given.items():
            binding.bind_input(name, "cpu", 0, kind, tensor.shape, tensor.data_ptr())
        binding.bind_output("logits", "cpu", 0, self._numpy_dtype, logits.shape, logits.data_ptr())
        for index, layer in enumerate(rooms.layers):
            for part, room in zip(("key", "value"), layer, strict=True):
                place: tuple[Any, ...] = ("cpu", 0, self._numpy_dtype, room.shape, room.data_ptr())
                binding.bind_input(f"past_key_values.{index}.{part}", *place)
                binding.bind_output(f"present_key_values.{index}.{part}", *place)
        try:
            self._session.run_with_iobinding(binding, self._options)
        except Exception as error:  # onnxruntime has no common class of them
            raise ValueError(f"onnxruntime cannot compute {self.folder / GRAPH_FILE}: {first_line(error)}") from error
        return logits

    def copy_to(self, folder: Path) -> None:
        """Copy the graph and its weights to another folder."""
        for name in (GRAPH_FILE, WEIGHTS_FILE):
            if not (folder / name).exists() or not (folder / name).samefile(self.folder / name):
                shutil.copyfile(self.folder / name, folder / f".{name}.partial")
                (folder / f".{name}.partial").replace(folder / name)  # which another session may have open


def first_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    return str(error).strip().partition("\n")[0]


def read_graph_config(folder: Path) -> GLMONNXConfig:
    """
    Return the configuration of a folder with a graph.

    Raises:
        FileNotFoundError: If the folder has none.
        ValueError: If it is of another type of model, or not valid.
    """
    require_files(folder, ["config.json"])
    fields = read_json(folder / "config.json")
    if fields.get("model_type") != GLMONNXConfig.model_type:
        raise ValueError(
            f"{folder} must hold an exported {GLMONNXConfig.model_type} graph, got "
            f"{shortened(fields.get('model_type'))}; write one by `optimum-cli export glm-onnx`"
        )
    parse_config({**fields, "model_type": GLMConfig.model_type}, folder)
    return GLMONNXConfig.from_dict(fields)
