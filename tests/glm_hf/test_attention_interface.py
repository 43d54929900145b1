"""Attention functions of users, with a mask function of their own or without."""

import pytest
import torch
from golden import golden_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from glm_hf import GLMForMaskedLM
from glm_hf.modeling_glm import eager_attention_forward

MODEL = golden_model("cfg1")
CONFIG = MODEL.config
MASK, GMASK = CONFIG.mask_token_id, CONFIG.gmask_token_id
SOP, EOS, PAD = CONFIG.sop_token_id, CONFIG.eos_token_id, CONFIG.pad_token_id
SHORT = [83, 23, MASK, 53, 71, 80, EOS, SOP, 21, 22]
LONG = [94, 27, 30, 85, GMASK, SOP, 31]
NOISE = 2e-4


def by_sdpa(module, *arguments, **options):
    return sdpa_attention_forward(module, *arguments, **options)


def by_hand(module, *arguments, **options):
    return eager_attention_forward(module, *arguments, **options)


AttentionInterface.register("users_sdpa", by_sdpa)
AttentionInterface.register("users_eager", by_hand)
AttentionInterface.register("users_sdpa_with_masks", by_sdpa)
AttentionMaskInterface.register("users_sdpa_with_masks", sdpa_mask)
AttentionInterface.register("users_padding_only", by_sdpa)
AttentionMaskInterface.register(
    "users_padding_only", lambda *arguments, attention_mask=None, **options: attention_mask
)
NAMES = ["users_sdpa", "users_eager", "users_sdpa_with_masks"]


def inputs():
    ids, mask = MODEL._pad_left([SHORT, LONG])
    segments = torch.tensor([[1] * len(SHORT) + [2] * len(LONG) + [0]])
    return {
        "one row": {"input_ids": torch.tensor([SHORT])},
        "no context": {"input_ids": torch.tensor([[11, 12, 13]])},
        "padded batch": {"input_ids": ids, "attention_mask": mask},
        "packed": {"input_ids": torch.tensor([[*SHORT, *LONG, PAD]]), "segment_ids": segments},
    }


@pytest.mark.parametrize("case", inputs())
@pytest.mark.parametrize("name", NAMES)
def test_context_is_read_both_ways(name, case):
    given = inputs()[case]
    kept = given.get("segment_ids", given.get("attention_mask", torch.ones_like(given["input_ids"]))) > 0
    with torch.no_grad():
        logits, expected = (
            golden_model("cfg1", kind)(**given, use_cache=False).logits[kept] for kind in (name, "sdpa")
        )
    torch.testing.assert_close(logits, expected, atol=NOISE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_text_is_generated_with_every_cache(name):
    ids, mask = MODEL._pad_left([SHORT[:8], LONG[:6]])
    expected = MODEL.generate(ids, attention_mask=mask, max_new_tokens=6).tolist()
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        model = golden_model("cfg1", name)
        assert model.generate(ids, attention_mask=mask, max_new_tokens=6, **options).tolist() == expected


@pytest.mark.parametrize("name", NAMES)
def test_masked_lm_scores_the_same(name):
    models = [GLMForMaskedLM(golden_model("cfg1", kind).config).eval() for kind in (name, "sdpa")]
    for model in models:
        model.load_state_dict(MODEL.state_dict())
    with torch.no_grad():
        logits, expected = (model(torch.tensor([[83, MASK, 53, MASK]])).logits for model in models)
    torch.testing.assert_close(logits, expected, atol=NOISE, rtol=0)


@pytest.mark.parametrize("case", ["one row", "padded batch"])
def test_masks_that_cannot_hold_a_context_are_refused(case):
    model = golden_model("cfg1", "users_padding_only")
    with pytest.raises(ValueError, match="'users_padding_only' makes masks that would drop the two-way context"):
        model(**inputs()[case])
