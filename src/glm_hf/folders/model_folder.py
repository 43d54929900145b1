"""Find and read the files of a model folder, as the converter and `save_pretrained` write them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from glm_hf.configuration_glm import GLMConfig

INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; FileNotFoundError without the file, ValueError if it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no fields; expected a JSON object")
    return content


def read_config(folder: str | Path, **overrides: Any) -> GLMConfig:
    """
    Return the configuration of a model, with some fields replaced.

    Raises:
        FileNotFoundError: If the folder has none.
        ValueError: If it is of another type of model, or not valid.
    """
    require_files(Path(folder), ["config.json"])
    return parse_config({**read_json(Path(folder) / "config.json"), **overrides}, folder)


def parse_config(fields: dict[str, Any], folder: str | Path) -> GLMConfig:
    """Return the configuration of `fields` from a folder; ValueError if it is of another type, or not valid."""
    if fields.get("model_type") != GLMConfig.model_type:
        raise ValueError(f"{folder} must hold a {GLMConfig.model_type} model, got {fields.get('model_type')}")
    try:
        return GLMConfig.from_dict(fields)
    except (StrictDataclassError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder}/config.json is not valid: {error.__cause__ or error}") from error


def require_files(folder: Path, names: Iterable[str]) -> None:
    """Raise FileNotFoundError unless `folder` has all files `names`."""
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder} must hold a model, as the converter and save_pretrained write it, but has no "
            f"{', '.join(missing)}"
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of the model in `folder`, all of which exist; else FileNotFoundError."""
    names = ["model.safetensors"]  # what transformers takes first, even if an index is there
    if not (folder / names[0]).is_file() and (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"{folder / INDEX} has no weight_map; expected an index of safetensors files")
        names = sorted(set(weight_map.values()))
    require_files(folder, names)
    return [folder / name for name in names]
