"""Model folders, as the converter and `save_pretrained` write them: what belongs to one besides weights, and where.

config.json                     how the model is computed and its weights stored
generation_config.json          how `generate` ends
tokenizer files                 those that `save_pretrained` of a tokenizer writes
model.safetensors.index.json    which file holds which tensor, if there are several
README.md, LICENSE              model card and licence, if the folder that the model was made from has them
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from glm_hf.configuration_glm import GLMConfig

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    "chat_template.jinja",
)
LICENCES = ("LICENSE", "MODEL_LICENSE")
COPIED_FILES = (*TOKENIZER_FILES, *LICENCES, "generation_config.json", "README.md")


def write_model_files(
    folder: Path,
    config: GLMConfig | Mapping[str, Any],
    *,
    source: Path | None = None,
    tokenizer: Any = None,
) -> None:
    """
    Write what belongs to a model besides its weights and their index.

    Args:
        folder: Folder of the model.
        config: Configuration, or the fields of its config.json. Classes in Python files beside it are left out.
        source: Folder that the model is made from, whose tokenizer, generation settings, model card and licence are
            copied, and nothing else.
        tokenizer: Tokenizer to save, if it is not that of `source`.
    """
    if isinstance(config, GLMConfig):
        config.save_pretrained(folder)
    else:
        write_json(folder / "config.json", {name: config[name] for name in config if name != "auto_map"})
    if source is not None:
        _copy_files(source, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if not (folder / "generation_config.json").is_file():
        from glm_hf.modeling_glm import GLMForBlankInfilling  # which readers of configurations do not need

        with torch.device("meta"):
            GLMForBlankInfilling(read_config(folder)).generation_config.save_pretrained(folder)


def _copy_files(source: Path, folder: Path) -> None:
    """Copy what belongs to a model besides its configuration and weights, without classes in Python files."""
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    tokenizer_config = folder / "tokenizer_config.json"
    if tokenizer_config.is_file() and "auto_map" in read_json(source / "config.json"):
        fields = read_json(tokenizer_config)
        write_json(tokenizer_config, {name: fields[name] for name in fields if name != "auto_map"})


def write_index(folder: Path, files: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Write the index of the tensors, on meta, that each of `files` holds; nothing for a single file."""
    if len(files) == 1:
        return
    tensors = [tensor for of_file in files.values() for tensor in of_file.values()]
    metadata = {
        "total_parameters": sum(tensor.numel() for tensor in tensors),
        "total_size": sum(tensor.nbytes for tensor in tensors),
    }
    weight_map = {name: file for file, of_file in files.items() for name in of_file}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as transformers does, keys sorted."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def require_matching_tokenizer(tokenizer: Any, config: GLMConfig) -> None:
    """
    Check that a tokenizer is that of a model.

    Raises:
        ValueError: If the model has no row for every token, or other special ids than the tokenizer knows.
    """
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's vocabulary has {config.vocab_size} rows; use "
            "the tokenizer that belongs to the model"
        )
    for name, token_id in config.to_dict().items():
        known_id = getattr(tokenizer, name, None) if name.endswith("_token_id") else None
        if known_id not in (None, token_id):
            raise ValueError(
                f"the tokenizer has {name} = {known_id}, but the config has {token_id}; use the tokenizer that "
                "belongs to the model, or a config with the special ids of the tokenizer"
            )


@contextmanager
def reading(path: str | Path, problem: str = "is damaged") -> Iterator[None]:
    """Turn whatever a library trips over in a damaged file into a ValueError of one line, with the file's name."""
    try:
        yield
    except OSError:  # which has the name
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # of a library in Rust
        if not isinstance(error, Exception) and not is_panic:
            raise
        lines = str(error).strip().splitlines()
        raise ValueError(f"{path} {problem}: {lines[0] if lines else type(error).__name__}") from error


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
