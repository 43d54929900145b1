"""Hub folders: a model together with the code that runs it, so that it loads where glm_hf is not installed.

A Hub folder is flat. It holds the weights as safetensors, `config.json` and `tokenizer_config.json` with an `auto_map`
from Auto classes to the Python files beside them, these files (copies of this package's), the tokenizer, the
generation settings and a model card. The card states what the folder's own files tell, and GLM-130B's facts only for a
model of its size.
"""

import inspect
import logging
import os
import shutil
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers.dynamic_module_utils import get_relative_import_files

from glm_hf.configuration_glm import GLMConfig
from glm_hf.folders.atomic import AtomicFolder, require_vacant
from glm_hf.folders.model_folder import INDEX, read_json, require_files, weight_files, write_json, write_model_files

AUTO_MAP = {
    "AutoConfig": "configuration_glm.GLMConfig",
    "AutoModel": "modeling_glm.GLMModel",
    "AutoModelForCausalLM": "modeling_glm.GLMForBlankInfilling",
    "AutoModelForSeq2SeqLM": "modeling_glm.GLMForBlankInfilling",
    "AutoModelForMaskedLM": "modeling_glm.GLMForMaskedLM",
    "AutoModelForDecision": "modeling_glm.GLMForBlankInfilling",  # the class that `transformers serve` tries first
}
TOKENIZER_AUTO_MAP: dict[str, list[str | None]] = {"AutoTokenizer": ["tokenization_glm.GLMTokenizer", None]}
NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")

CARD = """\
---
{metadata}
---

# {title}

{introduction}
It has {num_parameters:,} parameters: {num_hidden_layers} layers, hidden size {hidden_size},
{num_attention_heads} heads, a vocabulary of {vocab_size} and a context of {max_position_embeddings} tokens.

## Blanks

The text around a blank is read in both directions; the blank is then written from left to right.

| token | blank |
|---|---|
| `[MASK]` | a few words inside the text |
| `[sMASK]` | a sentence inside the text |
| `[gMASK]` | the rest of the text; added to a text that has no mask |

## Usage

```
pip install "transformers>=5.17,<5.25" torch accelerate
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True, dtype="auto", device_map="auto")
texts = tokenizer(["Beijing is the [MASK] of China."])["input_ids"]
print(tokenizer.batch_decode(model.fill_blanks(texts).sequences))
```

`trust_remote_code=True` runs the Python files of this folder. After `import glm_hf`, the package they come from, its
own classes are used and the flag is not needed. `AutoModelForMaskedLM` and `pipeline("fill-mask")` score one token for
every `[MASK]`; `generate` continues ids that end in `<|startofpiece|>`.

## Hardware and limits

- The weights take {gigabytes:.3g} GB, and the cache comes on top. `device_map="auto"` spreads them over the devices.
- Prompt and answer together have at most {max_position_embeddings} tokens.
- FlashAttention and continuous batching are not supported: their masks are causal, the context is not.
- Like every language model it can write what is false or harmful. Check its answers before you rely on them.

## Licence

{licence} The Python files are under the Apache License 2.0.

## Citation

```bibtex
{citation}
```
"""
CITATION = """\
@inproceedings{zeng2023glm130b,
  title     = {{GLM-130B}: An Open Bilingual Pre-trained Model},
  author    = {Zeng, Aohan and Liu, Xiao and Du, Zhengxiao and Wang, Zihan and Lai, Hanyu and Ding, Ming and
               Yang, Zhuoyi and Xu, Yifan and Zheng, Wendi and Xia, Xiao and others},
  booktitle = {International Conference on Learning Representations},
  year      = {2023},
  url       = {https://arxiv.org/abs/2210.02414}
}"""
RELEASED_LICENCE = {
    "license": "other",
    "license_name": "glm-130b-license",
    "license_link": "https://github.com/THUDM/GLM-130B/blob/main/MODEL_LICENSE",
}

logger = logging.getLogger(__name__)


def export_hub_folder(src: str | Path, dst: str | Path, *, push_to: str | None = None) -> None:
    """
    Make a folder that loads with `trust_remote_code=True` without glm_hf, and upload it when asked.

    Weights are hard links to those of `src` where the file system allows it: they take no space, and must not be
    changed in place. Other files are copies. Training state and whatever else lies in `src` stays behind; the model
    card is written anew.

    Args:
        src: Folder of a model with its tokenizer, made by the converter or by `save_pretrained`.
        dst: Folder to create; may exist if it is empty.
        push_to: Repository `"owner/name"` on the Hub, created if it does not exist. Login, and whether a new
            repository is private, are huggingface_hub's and the account's. An interrupted upload is resumed by
            `hf upload REPO DST`.

    Raises:
        FileNotFoundError: If `src` lacks the configuration, the tokenizer or weights.
        FileExistsError: If `dst` holds something already.
        ValueError: If `src` is not a GLM-130B model, is quantized or has damaged files, or `push_to` is not a
            repository name.
        OSError: If the Hub refuses the upload or the disk is full.
    """
    src, dst = Path(src), Path(os.path.abspath(dst))
    require_files(src, NEEDED)
    config = _read_config(src)
    weights = weight_files(src)
    num_parameters = sum(map(_num_parameters, weights))
    card = _model_card(config, push_to or dst.name, num_parameters, sum(path.stat().st_size for path in weights))
    require_vacant(dst)
    if push_to is not None:
        HfApi().create_repo(push_to, exist_ok=True)  # first, so that a missing login costs no time
    with AtomicFolder(dst).writing() as folder:
        write_model_files(folder, config, source=src)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_json(folder / "config.json", config | {"auto_map": AUTO_MAP})
        tokenizer_config = read_json(src / "tokenizer_config.json")
        write_json(folder / "tokenizer_config.json", tokenizer_config | {"auto_map": TOKENIZER_AUTO_MAP})
        index = [src / INDEX] if (src / INDEX).is_file() else []
        for path in (*index, *_source_files()):
            shutil.copyfile(path, folder / path.name)
        _link_or_copy(weights, folder)
    if push_to is not None:
        HfApi().upload_folder(repo_id=push_to, folder_path=dst)


def _read_config(src: Path) -> dict[str, Any]:
    """Return `config.json` of a GLM-130B model whose weights need nothing but the exported code."""
    config = read_json(src / "config.json")
    if config.get("model_type") != GLMConfig.model_type:
        raise ValueError(f"{src} must be a model of type {GLMConfig.model_type}, got {config.get('model_type')}")
    if config.get("quantization_config"):
        raise ValueError(
            f"{src} is quantized, and without glm_hf its codes would be taken for weights; export the model that it "
            "was made from"
        )
    try:
        GLMConfig.from_dict(config)
    except StrictDataclassError as error:
        raise ValueError(f"{src / 'config.json'} is not valid: {error.__cause__}") from error
    config.pop("custom_pipelines", None)  # written by a pipeline's save_pretrained; makes fill-mask ask for trust
    return config


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


def _model_card(config: dict[str, Any], name: str, num_parameters: int, num_bytes: int) -> str:
    """Return the model card of a model whose weights have so many parameters and bytes."""
    model_config = GLMConfig.from_dict(config)
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": ["glm", "glm130b", "blank-infilling"],
    }
    if all(getattr(model_config, size) == getattr(GLMConfig(), size) for size in SIZES):
        metadata |= {"language": ["en", "zh"], **RELEASED_LICENCE}
        title = "GLM-130B"
        introduction = "GLM-130B is a language model for English and Chinese that fills blanks in a text."
        link = RELEASED_LICENCE["license_link"]
        licence = f"The weights of GLM-130B are for non-commercial research only: [GLM-130B License]({link})."
    else:
        metadata["license"] = "unknown"
        title = name.rpartition("/")[2]
        introduction = "This language model has the architecture of GLM-130B and fills blanks in a text."
        licence = "The licence of the weights is not stated."
    return CARD.format(
        metadata=ModelCardData(**metadata).to_yaml(),
        name=name,
        title=title,
        introduction=introduction,
        licence=licence,
        citation=CITATION,
        num_parameters=num_parameters,
        gigabytes=num_bytes / 1e9,
        max_position_embeddings=model_config.max_position_embeddings,
        **{size: getattr(model_config, size) for size in SIZES},
    )


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
