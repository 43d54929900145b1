"""Model cards. A card states what the folder's own files tell, and facts of GLM-130B only for a model of its size."""

from typing import Any

from huggingface_hub import ModelCardData

from glm_hf.configuration_glm import GLMConfig

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


def model_card(config: dict[str, Any], name: str, num_parameters: int, num_bytes: int) -> str:
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
