"""Prefill and decoding steps over a cache of fixed size, compiled as whole graphs, give the tokens of eager ones."""

import random
from pathlib import Path

import pytest
import torch
from forked import run_ranks
from golden import golden_model
from transformers import StaticCache

from glm_hf import GLMForBlankInfilling, GLMQuantizationConfig
from glm_hf.quantization.quantizer import CASTS_BEFORE_CONVERTING
from glm_hf.versions_glm import CACHE

NUM_TEXTS, ROWS_AT_ONCE, LENGTH, STEPS = 100, 10, 24, 12
NUM_TEXTS_ON_RANKS = 30


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch.compiler.reset()


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


def new_cache(model: GLMForBlankInfilling, batch: int) -> StaticCache:
    num_ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + STEPS)
    num_heads = model.config.num_attention_heads // num_ranks
    cache.early_initialization(batch, num_heads, model.config.head_dim, torch.float32, torch.device("cpu"))
    return cache


@torch.no_grad()
def decode(model: GLMForBlankInfilling, step, ids: torch.Tensor) -> torch.Tensor:
    """Return the most likely tokens `(B, STEPS)` by a bare loop over `step`, a model's call."""
    cache, config = new_cache(model, len(ids)), model.config
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


def run_rank(rank: int, folder: Path, is_quantized: bool) -> None:
    """Decode as one of two ranks, and save what was compiled and what was not."""
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    options = {"quantization_config": GLMQuantizationConfig(bits=4)} if is_quantized else {}
    shared = {"tp_size": 2, "tp_plan": "auto"}
    model = GLMForBlankInfilling.from_pretrained(folder, distributed_config=shared, dtype=torch.float32, **options)
    rows = texts(model.eval())[:NUM_TEXTS_ON_RANKS].split(ROWS_AT_ONCE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    result = {
        name: torch.cat([decode(model, step, ids) for ids in rows])
        for name, step in (("eager", model), ("compiled", compiled))
    }
    if rank == 0:
        torch.save(result, folder / "result.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("model", ["INT4"], indirect=True)
def test_two_ranks_give_the_tokens_of_one(model, tmp_path):
    is_quantized = hasattr(model, "hf_quantizer")
    if is_quantized and CASTS_BEFORE_CONVERTING:
        pytest.skip("ranks share quantized weights from transformers 5.23 on")
    golden_model("cfg1").save_pretrained(tmp_path)
    run_ranks(lambda rank: run_rank(rank, tmp_path, is_quantized), 2, tmp_path)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    rows = texts(model)[:NUM_TEXTS_ON_RANKS].split(ROWS_AT_ONCE)
    expected = torch.cat([decode(model, model, ids) for ids in rows])
    assert torch.equal(result["eager"], expected)
    assert torch.equal(result["compiled"], expected)


@torch.no_grad()
def test_compiled_models_notice_caches_that_are_not_what_they_were(model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = texts(model)[:2]
    cache = new_cache(model, 2)
    compiled(ids, **{CACHE: cache})
    cache.reset()
    with pytest.raises(RuntimeError, match="a cache was emptied, or filled by others"):
        compiled(ids, **{CACHE: cache})
    model(ids, attention_mask=torch.ones(2, 1, LENGTH, LENGTH + STEPS), position_ids=ids, **{CACHE: cache})
    other = new_cache(model, 2)
    other.layers = cache.layers
    with pytest.raises(RuntimeError, match="a cache was emptied, or filled by others"):
        compiled(ids[:, -1:], **{CACHE: other})
