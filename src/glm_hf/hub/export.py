"""Hub folders: a model together with the code that runs it, so that it loads where glm_hf is not installed.

A Hub folder is flat. It holds the weights as safetensors, `config.json` and `tokenizer_config.json` with an `auto_map`
from Auto classes to the Python files beside them, these files (copies of this package's), the tokenizer, the
generation settings and a model card.
"""

import inspect
import logging
import os
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers.dynamic_module_utils import get_relative_import_files

from glm_hf.configuration_glm import GLMConfig
from glm_hf.folders.atomic import AtomicFolder
from glm_hf.folders.finite import FiniteWeights
from glm_hf.folders.model_folder import write_json, write_model_files
from glm_hf.folders.validation import (
    INDEX,
    parse_config,
    read_json,
    require_files,
    require_generation_config,
    require_inside,
    weight_files,
)
from glm_hf.hub.model_card import model_card
from glm_hf.modeling_glm import GLMForBlankInfilling

AUTO_MAP = {
    "AutoConfig": "configuration_glm.GLMConfig",
    "AutoModel": "modeling_glm.GLMModel",
    "AutoModelForCausalLM": "modeling_glm.GLMForBlankInfilling",
    "AutoModelForSeq2SeqLM": "modeling_glm.GLMForBlankInfilling",
    "AutoModelForMaskedLM": "modeling_glm.GLMForMaskedLM",
    "AutoModelForDecision": "modeling_glm.GLMForBlankInfilling",  # the class that `transformers serve` tries first
}
TOKENIZER_AUTO_MAP: dict[str, list[str | None]] = {"AutoTokenizer": ["tokenization_glm.GLMTokenizer", None]}
FLOATING = ("F16", "BF16", "F32")
BLOCK_ELEMENTS = 2 * 2**20
NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")

logger = logging.getLogger(__name__)


def export_hub_folder(
    src: str | Path, dst: str | Path, *, push_to: str | None = None, overwrite: bool = False, strict: bool = False
) -> None:
    """
    Make a folder that loads with `trust_remote_code=True` without glm_hf, and upload it when asked.

    Weights are hard links to those of `src` where the file system allows it: they take no space, and must not be
    changed in place. Other files are copies. Training state and whatever else lies in `src` stays behind; the model
    card is written anew. Once the folder is complete, the same call does nothing but the upload.

    Args:
        src: Folder of a model with its tokenizer, made by the converter or by `save_pretrained`.
        dst: Folder to create; may exist if it is empty.
        push_to: Repository `"owner/name"` on the Hub, created if it does not exist. Login, and whether a new
            repository is private, are huggingface_hub's and the account's. An interrupted upload is resumed by
            `hf upload REPO DST`.
        overwrite: Whether to replace a folder at `dst`, once the new one is complete.
        strict: Whether NaN and infinity among the weights are an error rather than a warning.

    Raises:
        FileNotFoundError: If `src` lacks the configuration, the tokenizer or weights.
        FileExistsError: If `dst` holds something else already.
        ValueError: If `src` is not a GLM-130B model, is quantized, has damaged files or files that lie elsewhere, or
            `push_to` is not a repository name.
        OSError: If the Hub refuses the upload or the disk is full.
    """
    src, dst = Path(src), Path(os.path.abspath(dst))
    require_files(src, NEEDED)
    config = _read_config(src)
    weights = weight_files(src)
    num_parameters = sum(map(_num_parameters, weights))
    card = model_card(config, push_to or dst.name, num_parameters, sum(path.stat().st_size for path in weights))
    for path in weights:
        require_inside(src, path.name)
    _require_model(src, config, weights)
    sources = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in weights}
    target = AtomicFolder(dst, replaces=overwrite, origin={"plan": {"strict": strict}, "sources": sources})

    def write_small_files(folder: Path) -> None:
        write_model_files(folder, config, source=src)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_json(folder / "config.json", config | {"auto_map": AUTO_MAP})
        tokenizer_config = read_json(src / "tokenizer_config.json")
        write_json(folder / "tokenizer_config.json", tokenizer_config | {"auto_map": TOKENIZER_AUTO_MAP})
        index = [src / INDEX] if (src / INDEX).is_file() else []
        for path in (*index, *_source_files()):
            shutil.copyfile(path, folder / path.name)

    is_complete = target.is_complete(write_small_files)
    if not is_complete:
        target.require_possible()
    if push_to is not None:
        HfApi().create_repo(push_to, exist_ok=True)  # first, so that a missing login costs no time
    if not is_complete:
        with target.writing() as folder:
            write_small_files(folder)
            _watch(weights, FiniteWeights(strict))
            _link_or_copy(weights, folder)
    if push_to is not None:
        HfApi().upload_folder(repo_id=push_to, folder_path=dst)


def _watch(weights: list[Path], finite: FiniteWeights) -> None:
    """Read all weights, and report those that are not finite."""
    num_bytes = sum(path.stat().st_size for path in weights)
    with tqdm(total=num_bytes, desc="Checking", unit="B", unit_scale=True, disable=None) as progress:
        for path in weights:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    for block in finite.watch(name, _blocks(file.get_slice(name))):
                        progress.update(block.nbytes)


def _blocks(stored: Any) -> Iterator[torch.Tensor]:
    """Yield a tensor of a safetensors file in blocks of rows."""
    shape = stored.get_shape()
    if not shape:
        yield stored[...].reshape(1)
        return
    step = max(1, BLOCK_ELEMENTS // max(1, prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield stored[start : start + step]


def _read_config(src: Path) -> dict[str, Any]:
    """Return `config.json` of a GLM-130B model whose weights need nothing but the exported code."""
    config = read_json(src / "config.json")
    require_generation_config(src, parse_config(config, src))
    if config.get("quantization_config"):
        raise ValueError(
            f"{src} is quantized, and without glm_hf its codes would be taken for weights; export the model that it "
            "was made from"
        )
    config.pop("custom_pipelines", None)  # written by a pipeline's save_pretrained; makes fill-mask ask for trust
    return config


def _require_model(src: Path, config: dict[str, Any], weights: list[Path]) -> None:
    """Raise ValueError unless the files hold the weights of the model that its configuration tells, and no others."""
    with torch.device("meta"):
        model = GLMForBlankInfilling(parse_config(config, src))
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, list[int]] = {}
    for path in weights:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            if wrong := [name for name, part in slices.items() if part.get_dtype() not in FLOATING]:
                raise ValueError(
                    f"{path}: {wrong[0]} is {slices[wrong[0]].get_dtype()}; expected {', '.join(FLOATING)}"
                )
            found |= {name: part.get_shape() for name, part in slices.items()}
    tied = set(model.all_tied_weights_keys)
    if difference := sorted((expected.keys() ^ found.keys()) - tied):
        state = "is missing" if difference[0] in expected else "is unknown"
        raise ValueError(f"{src}: {difference[0]} {state}; expected the tensors of GLMForBlankInfilling")
    for name, shape in found.items():
        if shape != expected[name]:
            raise ValueError(f"{src}: {name} is {shape}, but config.json tells {expected[name]}")


def _num_parameters(path: Path) -> int:
    """Count the elements in a safetensors file, whose header must fit its size."""
    try:
        with safe_open(path, framework="pt") as file:
            return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}; make the folder again") from error


def _source_files() -> list[Path]:
    """Return the Python files behind the auto maps with all they import, found as the loader of the Hub finds them."""
    references = [*AUTO_MAP.values(), *filter(None, TOKENIZER_AUTO_MAP["AutoTokenizer"])]
    package = Path(inspect.getfile(GLMConfig)).parent
    entries = {package / (reference.partition(".")[0] + ".py") for reference in references}
    return sorted({file for entry in entries for file in (entry, *map(Path, get_relative_import_files(entry)))})


def _link_or_copy(weights: list[Path], folder: Path) -> None:
    """Hard-link `weights` into `folder`, or copy them with a progress bar where that is impossible."""
    try:
        for path in weights:
            os.link(path.resolve(), folder / path.name)
        return
    except OSError as error:
        logger.warning("cannot hard-link the weights (%s): copying them", error.strerror)
    num_bytes = sum(path.stat().st_size for path in weights)
    with tqdm(total=num_bytes, desc="Copying", unit="B", unit_scale=True, disable=None) as progress:
        for path in weights:
            (folder / path.name).unlink(missing_ok=True)
            shutil.copyfile(path, folder / path.name)
            progress.update(path.stat().st_size)


__all__ = ["export_hub_folder"]
