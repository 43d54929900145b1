"""Compare an exported graph with the torch model, on inputs of every shape that a graph is asked for.

Shapes: `B` batch, `L` length, `V` vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from glm_hf.configuration_glm import GLMConfig
from glm_hf.conversion.formats.safetensors_reader import ModelFolder
from glm_hf.conversion.quantize import loaded_dtype
from glm_hf.infilling_glm import mask_token_ids, pad_left, prepare_context
from glm_hf.modeling_glm import GLMForBlankInfilling
from glm_hf.onnx.runtime import ORTGLMForBlankInfilling
from glm_hf.quantization.configuration import GLMQuantizationConfig
from glm_hf.versions_glm import CACHE

TOLERANCES = {torch.float32: 1e-3, torch.float16: 3e-2}
"""Largest difference by the dtype of the graph, as a share of the largest logit."""
NUM_NEW = 4


@dataclass(frozen=True)
class Comparison:
    """How far two sets of logits are apart."""

    case: str
    """What was computed."""
    difference: float
    """Largest difference of two logits."""
    largest: float
    """Largest magnitude of the torch model's logits."""


def verify_onnx(src: str | Path, folder: str | Path) -> list[Comparison]:
    """
    Compare the logits of a graph with those of the torch model in fp32, which is loaded for it.

    Args:
        src: Model folder that the graph was exported from.
        folder: Folder that `export_onnx` has written.

    Returns:
        The comparisons: contexts with short and long blanks, a padded batch, tokens added one by one, and the last
        positions.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a folder is not what it should be, or logits differ by more than rounding does.
    """
    graph = ORTGLMForBlankInfilling.from_pretrained(folder)
    if (bits := graph.session.quantized_here) is None:
        model = GLMForBlankInfilling.from_pretrained(src, dtype=torch.float32).eval()
    else:  # from the dtype that weights are quantized in
        settings = GLMQuantizationConfig(bits=bits)
        stored = loaded_dtype(ModelFolder(src))
        model = GLMForBlankInfilling.from_pretrained(src, dtype=stored, quantization_config=settings).eval()
        nn.Module.float(model)  # transformers' own refuses quantized models of any kind
    comparisons = []
    for case, inputs, num_new in _cases(model.config):
        expected, actual = (_logits(one, inputs, num_new) for one in (model, graph))
        is_token = inputs["attention_mask"][:, -expected.shape[1] :].bool()
        difference = (actual.float() - expected)[is_token].abs().max()
        comparisons.append(Comparison(case, difference.item(), expected[is_token].abs().max().item()))
    worst = max(comparisons, key=lambda comparison: comparison.difference / comparison.largest)
    if not worst.difference <= TOLERANCES[graph.dtype] * worst.largest:
        raise ValueError(
            f"{folder}: logits of {worst.case} differ by {worst.difference:.2g} from those of {src}, which are at "
            f"most {worst.largest:.2g}; export it again"
        )
    return comparisons


def _cases(config: GLMConfig) -> Iterator[tuple[str, dict[str, Tensor], int]]:
    """Yield names, arguments of the model, and how many tokens at the end are added one by one."""
    generator = torch.Generator().manual_seed(0)
    special = {*mask_token_ids(config), config.sop_token_id, config.eop_token_id, config.eos_token_id}
    ids = torch.tensor([token_id for token_id in range(config.vocab_size) if token_id not in special])

    def text(length: int) -> list[int]:
        return ids[torch.randint(len(ids), (length,), generator=generator)].tolist()

    def sample(mask: int, before: int, behind: int, new: int) -> list[int]:
        context = prepare_context([*text(before), mask, *text(behind)], config)
        return [*context, config.sop_token_id, *text(new)]

    def batch(*rows: list[int]) -> dict[str, Tensor]:
        input_ids, attention_mask = pad_left(rows, config.pad_token_id)
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    length = min(20, config.max_position_embeddings - NUM_NEW - 3)  # behind a mask, an end and a start token
    short = sample(config.mask_token_id, length // 2, length // 4, 3)
    long = sample(config.gmask_token_id, length, 0, NUM_NEW)
    yield "a short blank", batch(short), 0
    yield "a long blank", batch(long), 0
    yield "a padded batch", batch(short, long), 0
    yield "tokens one by one", batch(long), NUM_NEW
    last = batch(long) | {"position_ids": torch.arange(len(long))[None] + config.max_position_embeddings - len(long)}
    last["attention_mask"] = torch.ones_like(last["input_ids"])
    yield "the last positions", last, 0


def _logits(model: GLMForBlankInfilling, inputs: dict[str, Tensor], num_new: int) -> Tensor:
    """Return the logits of all tokens, of which the last `num_new` are added one by one."""
    length = inputs["input_ids"].shape[1] - num_new
    with torch.no_grad():
        whole = {name: tensor[:, :length] for name, tensor in inputs.items()}
        outputs = model(**whole, use_cache=bool(num_new))
        logits = [outputs.logits]
        for end in range(length + 1, length + num_new + 1):
            outputs = model(
                inputs["input_ids"][:, end - 1 : end],
                attention_mask=inputs["attention_mask"][:, :end],
                past_key_values=outputs[CACHE],
            )
            logits.append(outputs.logits)
    return torch.cat(logits, dim=1)
