"""Prefill and decoding steps over a cache of fixed size, compiled as whole graphs, give the tokens of eager ones."""

import random

import pytest
import torch
from golden import golden_model
from transformers import StaticCache

from glm_hf import GLMForBlankInfilling, GLMQuantizationConfig
from glm_hf.versions_glm import CACHE

NUM_TEXTS, ROWS_AT_ONCE, LENGTH, STEPS = 100, 10, 24, 12


@pytest.fixture(scope="module", params=["fp32", "INT4"])
def model(request, tmp_path_factory) -> GLMForBlankInfilling:
    plain = golden_model("cfg1")
    if request.param == "fp32":
        return plain
    folder = tmp_path_factory.mktemp("int4")
    plain.save_pretrained(folder)
    return GLMForBlankInfilling.from_pretrained(folder, quantization_config=GLMQuantizationConfig(bits=4)).eval()


def texts(model: GLMForBlankInfilling) -> torch.Tensor:
    """Return rows of all kinds of masks and lengths `(NUM_TEXTS, LENGTH)`, padded on the left, that end in sop."""
    rng, config = random.Random(0), model.config
    masks = [config.mask_token_id, config.gmask_token_id, config.smask_token_id]
    rows = []
    for _ in range(NUM_TEXTS):
        row = [rng.randrange(3, 140) for _ in range(rng.randrange(2, LENGTH - 2))]
        row[rng.randrange(len(row))] = rng.choice(masks)
        rows.append([config.pad_token_id] * (LENGTH - len(row) - 1) + [*row, config.sop_token_id])
    return torch.tensor(rows)


@torch.no_grad()
def decode(model: GLMForBlankInfilling, step, ids: torch.Tensor) -> torch.Tensor:
    """Return the most likely tokens `(B, STEPS)` by a bare loop over `step`, a model's call."""
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + STEPS)
    config = model.config
    cache.early_initialization(len(ids), config.num_attention_heads, config.head_dim, model.dtype, model.device)
    mask = torch.zeros(len(ids), LENGTH + STEPS, dtype=torch.long)
    mask[:, :LENGTH] = ids != config.pad_token_id
    outputs = step(ids, attention_mask=mask[:, :LENGTH], logits_to_keep=1, **{CACHE: cache})
    tokens = []
    for index in range(STEPS):
        tokens.append(outputs.logits[:, -1].argmax(-1))
        mask[:, LENGTH + index] = 1
        outputs = step(tokens[-1][:, None], attention_mask=mask, **{CACHE: cache})
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_steps_give_the_tokens_of_eager_ones(model, backend):
    rows = texts(model)[: ROWS_AT_ONCE if backend == "inductor" else NUM_TEXTS]
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for ids in rows.split(ROWS_AT_ONCE):
        mask = ids != model.config.pad_token_id
        expected = model.generate(
            ids, attention_mask=mask.long(), max_new_tokens=STEPS, eos_token_id=None, do_sample=False
        )[:, LENGTH:]
        assert torch.equal(decode(model, model, ids), expected)
        assert torch.equal(decode(model, compiled, ids), expected)
