"""A model and its tokenizer from a folder that has been looked at, on one process or on the ranks of torchrun."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from glm_hf.conversion.formats.safetensors_reader import ModelFolder
from glm_hf.folders.records import facts_of_files
from glm_hf.folders.validation import (
    GRAPH_FILE,
    find_folder,
    load_tokenizer,
    read_json,
    reading,
    require_matching_tokenizer,
)
from glm_hf.quantization.configuration import GLMQuantizationConfig
from glm_hf.sharding.restarts import require_fresh_store


@dataclass(frozen=True)
class Loaded:
    """What a folder holds."""

    model: Any
    """`GLMForBlankInfilling` in evaluation mode, this rank's shard of it, or an adapter on top."""
    tokenizer: Any
    origin: dict[str, Any]
    """What the model was made from: files with size, time and hash of what they begin with, and how it was loaded."""


def load(name: str, *, dtype: str = "auto", bits: int | None = None, device: str | None = None) -> Loaded:
    """
    Load a model; under torchrun every process gets its shard.

    Args:
        name: Folder or Hub name of a model, folder of an adapter or of an exported graph.
        dtype: Name of the dtype that is computed in, `auto` for that of the files.
        bits: 4 or 8 to quantize the weights while loading.
        device: Device of the whole model; by default all GPUs there are, else the CPU.

    Raises:
        FileNotFoundError: If there is no such model, or a file is missing.
        ValueError: If it is not a GLM-130B model, or damaged.
    """
    folder, sources, tokenizer = look_at(name)
    options: dict[str, Any] = placement(device)
    if bits is not None:
        options["quantization_config"] = GLMQuantizationConfig(bits=bits)
    with reading(folder, "cannot be loaded"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **options)
    require_matching_tokenizer(tokenizer, model.config)
    stats = facts_of_files(folder, "*.safetensors") | facts_of_files(folder, f"{GRAPH_FILE}*")
    origin = {"folder": str(folder), "files": stats, "weights": sources, "dtype": dtype, "bits": bits}
    return Loaded(model.eval(), tokenizer, {**origin, "config": model.config.to_diff_dict()})


def look_at(name: str) -> tuple[Path, dict[str, Any], Any]:
    """
    Return the folder of a model or an adapter, what tells its files of weights from others, and its tokenizer.

    Args:
        name: Folder or Hub name of a model, folder of an adapter or of an exported graph.

    Raises:
        FileNotFoundError: If there is no such folder, or a file is missing.
        ValueError: If it is not a GLM-130B model, or damaged.
    """
    folder = base = find_folder(name)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():  # of PEFT
        base = find_folder(str(read_json(folder / "adapter_config.json").get("base_model_name_or_path")))
    is_graph = (base / GRAPH_FILE).is_file()  # which is looked at when it is opened
    sources = facts_of_files(base, f"{GRAPH_FILE}*") if is_graph else ModelFolder(base).sources
    return folder, sources, load_tokenizer(folder if (folder / "tokenizer.json").is_file() else base)


def num_ranks() -> int:
    """Return the number of processes that torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def placement(device: str | None) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that say where the weights go."""
    if num_ranks() == 1:
        return {"device_map": device or "auto"}
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if not torch.distributed.is_initialized():
        require_fresh_store()
        torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    return {"distributed_config": {"tp_size": num_ranks(), "tp_plan": "auto"}}


def rank() -> int:
    """Return the number of this process among those that torchrun has started."""
    return int(os.environ.get("RANK", "0"))
