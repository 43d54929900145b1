"""Model folders, as the converter and `save_pretrained` write them: what belongs to one besides weights, and where.

config.json                     how the model is computed and its weights stored
generation_config.json          how `generate` ends
tokenizer files                 those that `save_pretrained` of a tokenizer writes
model.safetensors.index.json    which file holds which tensor, if there are several
README.md, LICENSE              model card and licence, if the folder that the model was made from has them
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from glm_hf.configuration_glm import GLMConfig
from glm_hf.folders.validation import INDEX, read_config, read_json, require_inside

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
            require_inside(source, name)
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
