"""
The one place where a model folder is checked before any work, so that a damaged one is an error of one line.

Types and ranges of config.json, generation_config.json and the index, which files there are, and the tokenizer.
Nothing in a folder is run: its model type is looked at before any class of transformers is chosen by it.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from glm_hf.configuration_glm import GLMConfig
from glm_hf.tokenization_glm import GLMTokenizer

INDEX = "model.safetensors.index.json"
DTYPES = ("float16", "bfloat16", "float32", "float64")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
GRAPH_FILE = "model.onnx"
"""What an exported folder has in the place of safetensors files."""
MODEL_FILES = ("*.json", "*.jinja", "*.safetensors", GRAPH_FILE, f"{GRAPH_FILE}.data")
"""What is downloaded of a model: no file that could be run."""
MOST_BYTES = 256 * 2**20
"""Largest JSON or YAML file that is read; the index of GLM-130B has 0.1 MB, its tokenizer 10 MB."""

COUNTS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences", "top_k")
SHARES = (
    *("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty"),
    *("encoder_repetition_penalty", "length_penalty", "guidance_scale"),
)
FILE_NAME = re.compile(r"(?!\.)[\w.-]+\.safetensors", re.ASCII)
FLAGS = ("do_sample", "use_cache", "output_scores", "output_logits", "renormalize_logits", "remove_invalid_values")
GENERATION_KINDS = (
    (COUNTS, (int,), "an integer"),
    (SHARES, (int, float), "a number"),
    (FLAGS, (bool,), "true or false"),
)


def find_folder(model: str | Path, patterns: Sequence[str] = MODEL_FILES, **downloads: Any) -> Path:
    """
    Return the folder of a model: itself, or where its files of data are in the Hub's cache, downloaded if need be.

    Args:
        model: Folder, or name on the Hub.
        patterns: Names of the files that are downloaded.
        **downloads: Other arguments of huggingface_hub's `snapshot_download`, such as `revision`.

    Raises:
        FileNotFoundError: If it is neither a folder nor a name on the Hub.
        OSError: If the Hub does not give it.
    """
    if Path(model).is_dir():
        return Path(model)
    if not HUB_NAME.fullmatch(str(model)):
        raise FileNotFoundError(f"there is no folder {model}, and it is not a Hub name (owner/name)")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(model), allow_patterns=list(patterns), **downloads))


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
        is_report = type(error).__name__.startswith("StrictDataclass") and error.__cause__ is not None
        lines = str(error.__cause__ if is_report else error).strip().splitlines()
        raise ValueError(f"{path} {problem}: {lines[0] if lines else type(error).__name__}") from error


def read_text(path: Path, most_bytes: int = MOST_BYTES, *, may_be_pipe: bool = False) -> str:
    """Return the text of a file; ValueError if it is not UTF-8, or larger than a file of its kind can be."""
    if not may_be_pipe:
        require_regular(path)
    with open(path, "rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"{path} has more than {most_bytes:,} bytes; expected a text file")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; FileNotFoundError without the file, ValueError if it holds none."""
    text = read_text(path)
    try:
        content = json.loads(text)
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
    require_model_type(fields, folder)
    path = f"{folder}/config.json"
    for name in ("dtype", "torch_dtype"):
        if fields.get(name) is not None and fields[name] not in DTYPES:
            raise ValueError(f"{path}: {name} must be one of {', '.join(DTYPES)}, got {shortened(fields[name])}")
    for name in ("attn_implementation", "_attn_implementation"):
        if not isinstance(fields.get(name), (str, type(None))):
            raise ValueError(f"{path}: {name} must be a name, got {shortened(fields[name])}")
    with reading(path, "is not valid"):
        return GLMConfig.from_dict(fields)


def require_model_type(fields: Mapping[str, Any], folder: str | Path) -> None:
    """Raise ValueError unless the fields of a config.json are those of a GLM-130B model."""
    if fields.get("model_type") != GLMConfig.model_type:
        raise ValueError(
            f"{folder} must hold a {GLMConfig.model_type} model, got {shortened(fields.get('model_type'))}; code that "
            "comes with a model is not run"
        )


def require_generation_config(folder: Path, config: GLMConfig) -> None:
    """Raise ValueError if a folder has a generation_config.json by which nothing can be generated."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    fields = read_json(path)
    for names, kinds, wanted in GENERATION_KINDS:
        for name in names:
            if not (fields.get(name) is None or type(fields[name]) in kinds):
                raise ValueError(f"{path}: {name} must be {wanted}, got {shortened(fields[name])}")
    for name in [name for name in fields if name.endswith("_token_id") or name == "suppress_tokens"]:
        ids = fields[name] if isinstance(fields[name], list) else [fields[name]]
        if not all(value is None or type(value) is int and 0 <= value < config.vocab_size for value in ids):
            raise ValueError(f"{path}: {name} must lie in the vocabulary, got {shortened(fields[name])}")
    with reading(path):
        GenerationConfig.from_dict(fields).validate()


def load_tokenizer(folder: str | Path) -> GLMTokenizer:
    """
    Return the tokenizer of a folder.

    Raises:
        FileNotFoundError: If the folder has none.
        ValueError: If its files are damaged.
    """
    require_files(Path(folder), ["tokenizer.json"])
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (Path(folder) / name).is_file():
            read_json(Path(folder) / name)
    with reading(Path(folder) / "tokenizer.json", "or tokenizer_config.json is damaged"):
        tokenizer = GLMTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.decode(tokenizer.backend_tokenizer.encode("text [MASK]").ids)
        for name in ("mask", "smask", "gmask", "sop", "eop", "eos", "pad"):
            if not isinstance(getattr(tokenizer, f"{name}_token_id"), int):
                raise ValueError(f"it has no {name} token")
    return tokenizer


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


def require_files(folder: Path, names: Iterable[str]) -> None:
    """Raise FileNotFoundError unless `folder` has all files `names`."""
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder} must hold a model, as the converter and save_pretrained write it, but has no "
            f"{', '.join(missing)}"
        )


def weight_files(folder: Path) -> list[Path]:
    """
    Return the safetensors files of the model in `folder`, all of which exist.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: If the index is damaged, or names files that lie elsewhere.
    """
    names = ["model.safetensors"]  # what transformers takes first, even if an index is there
    if not (folder / names[0]).is_file() and (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"{folder / INDEX} has no weight_map; expected an index of safetensors files")
        names = sorted(set(weight_map.values()))
        if not names:
            raise ValueError(f"{folder / INDEX} names no files; expected an index of safetensors files")
        for name in names:
            if not FILE_NAME.fullmatch(name):
                raise ValueError(f"{folder / INDEX} names {shortened(name)}; expected names of files beside it")
    require_files(folder, names)
    return [folder / name for name in names]


def require_regular(path: Path) -> None:
    """Raise ValueError if a path is that of a device, a pipe or the like, which may never end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file")


def require_inside(folder: Path, name: str) -> None:
    """
    Check that a file is not a link to a place outside of its folder, whose content nobody has meant to give away.

    The Hub's cache, in which `snapshots/REVISION/NAME` links to `blobs/HASH`, is one folder.

    Raises:
        ValueError: If it is one.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    target = (folder / name).resolve()
    if root not in target.parents:
        raise ValueError(f"{folder / name} is a link to {target}, outside of the folder; copy the file there")


def shortened(value: Any) -> str:
    """Return a value of a file as it may stand in an error."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
