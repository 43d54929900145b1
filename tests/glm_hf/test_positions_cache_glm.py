"""Positions behind a cache, for loops that step the model themselves: guidance, contrastive search, by hand."""

import copy

import pytest
import torch
from golden import golden_model
from transformers import DynamicCache, StaticCache

from glm_hf.versions_glm import CACHE

MODEL = golden_model("cfg1")
CONFIG = MODEL.config
MASK, GMASK, SMASK = CONFIG.mask_token_id, CONFIG.gmask_token_id, CONFIG.smask_token_id
SOP, EOS, PAD = CONFIG.sop_token_id, CONFIG.eos_token_id, CONFIG.pad_token_id
SHORT = [83, 23, MASK, 53, 71, 80, EOS, SOP]
ROWS = [SHORT, [94, 27, 30, 85, GMASK, SOP], [55, SMASK, 120, 7, EOS, SOP], [MASK, 11, EOS, SOP]]
STEPS = 4
NOISE = 2e-4


def whole(row, new):
    """Logits of new tokens, everything read again."""
    with torch.no_grad():
        return MODEL(torch.tensor([[*row, *new]]), use_cache=False).logits[0, -len(new) :]


def batch_of(rows):
    ids, mask = MODEL._pad_left(rows)
    return ids, mask


def new_tokens(number_of_rows):
    return torch.arange(number_of_rows * STEPS).reshape(number_of_rows, STEPS) % 40 + 20


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_tokens_by_hand_stand_where_they_would_without_a_cache(row, name):
    new = new_tokens(1)
    outputs = MODEL(torch.tensor([row]), use_cache=True)
    stepped = []
    for column in range(STEPS):
        with torch.no_grad():
            outputs = MODEL(new[:, column : column + 1], **{name: outputs[CACHE]})
        stepped.append(outputs.logits[0, -1])
    torch.testing.assert_close(torch.stack(stepped), whole(row, new[0].tolist()), atol=NOISE, rtol=0)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_several_tokens_at_once_behind_a_padded_batch(kind):
    cache = DynamicCache(config=CONFIG) if kind == "dynamic" else StaticCache(config=CONFIG, max_cache_len=32)
    ids, mask = batch_of(ROWS)
    new = new_tokens(len(ROWS))
    with torch.no_grad():
        MODEL(ids, attention_mask=mask, past_key_values=cache)
        logits = MODEL(
            new, attention_mask=torch.cat((mask, torch.ones_like(new)), dim=1), past_key_values=cache
        ).logits
    for row, own, tokens in zip(ROWS, logits, new.tolist(), strict=True):
        torch.testing.assert_close(own, whole(row, tokens), atol=NOISE, rtol=0)


CHANGES = {
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
    "chosen": (lambda cache: cache.batch_select_indices(torch.tensor([3, 1])), [3, 1]),
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 3, 1])), [2, 0, 3, 1]),
    "mixed": (
        lambda cache: (cache.reorder_cache(torch.tensor([1, 1, 0, 3])), cache.batch_repeat_interleave(2)),
        [1, 1, 1, 1, 0, 0, 3, 3],
    ),
    "copied": (lambda cache: None, [0, 1, 2, 3]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_keep_their_blanks_when_a_cache_is_changed(change):
    ids, mask = batch_of(ROWS)
    cache = DynamicCache(config=CONFIG)
    with torch.no_grad():
        MODEL(ids, attention_mask=mask, past_key_values=cache)
    cache = copy.deepcopy(cache)
    function, order = CHANGES[change]
    function(cache)
    new = new_tokens(len(order))
    mask = torch.cat((mask[order], torch.ones_like(new)), dim=1)
    with torch.no_grad():
        logits = MODEL(new, attention_mask=mask, past_key_values=cache).logits
    for row, own, tokens in zip(order, logits, new.tolist(), strict=True):
        torch.testing.assert_close(own, whole(ROWS[row], tokens), atol=NOISE, rtol=0)


def test_counted_positions_of_a_caller_do_not_move_a_blank():
    ids, mask = batch_of(ROWS)
    with torch.no_grad():
        outputs = MODEL(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)
    new = new_tokens(len(ROWS))
    for column in range(STEPS):
        mask = torch.cat((mask, torch.ones(len(ROWS), 1, dtype=torch.long)), dim=1)
        with torch.no_grad():
            outputs = MODEL(
                new[:, column : column + 1],
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1)[:, -1:],
                past_key_values=outputs[CACHE],
            )
    for row, own, tokens in zip(ROWS, outputs.logits, new.tolist(), strict=True):
        torch.testing.assert_close(own[-1], whole(row, tokens)[-1], atol=NOISE, rtol=0)


def test_a_cache_filled_anew_forgets():
    cache = StaticCache(config=CONFIG, max_cache_len=32)
    for row in (ROWS[0], ROWS[1]):
        cache.reset()
        with torch.no_grad():
            MODEL(torch.tensor([row]), past_key_values=cache)
            logits = MODEL(torch.tensor([[31]]), past_key_values=cache).logits[0]
        torch.testing.assert_close(logits, whole(row, [31]), atol=NOISE, rtol=0)


def test_answer_that_was_taken_back_is_written_anew():
    cache = DynamicCache(config=CONFIG)
    with torch.no_grad():
        MODEL(torch.tensor([[*SHORT, 21, 22]]), past_key_values=cache)
        cache.crop(-2)
        logits = MODEL(torch.tensor([[31]]), past_key_values=cache).logits[0]
    torch.testing.assert_close(logits, whole(SHORT, [31]), atol=NOISE, rtol=0)


def filled_by(*arguments, **options):
    cache = DynamicCache(config=CONFIG)
    MODEL(*arguments, past_key_values=cache, **options)
    return cache


def foreign_cache():
    cache = filled_by(torch.tensor([SHORT]))
    return DynamicCache([(layer.keys, layer.values) for layer in cache.layers])


def cut_cache():
    cache = filled_by(torch.tensor([SHORT]))
    cache.crop(-4)
    return cache


REFUSED = {
    "its history is unknown": (foreign_cache, [[31]], "does not tell where its blanks stand"),
    "positions were the caller's": (
        lambda: filled_by(torch.tensor([SHORT]), position_ids=torch.arange(8)[None] + 3),
        [[31]],
        "does not tell where its blanks stand",
    ),
    "samples were packed": (
        lambda: filled_by(torch.tensor([[*SHORT, *SHORT]]), segment_ids=torch.tensor([[1] * 8 + [2] * 8])),
        [[31]],
        "does not tell where its blanks stand",
    ),
    "its context was cut": (cut_cache, [[31]], "was cropped within its context"),
    "sop comes late": (lambda: filled_by(torch.tensor([SHORT[:-1]])), [[SOP]], "was read causally"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_step_is_refused_if(case):
    make, tokens, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        MODEL(torch.tensor(tokens), past_key_values=make())


def test_unlike_rows_whose_keys_cannot_be_read_are_refused():
    ids, mask = batch_of(ROWS[:2])
    cache = filled_by(ids, attention_mask=mask)
    cache.layers[0].keys = None
    layout = cache.glm_layout
    cache = filled_by(ids, attention_mask=mask)
    cache.glm_layout = type(layout)(layout.frozen, layout.columns, None, layout.last_sop)
    with pytest.raises(ValueError, match="cannot be told apart"):
        MODEL(torch.tensor([[31], [32]]), past_key_values=cache)


def test_training_mode_with_gradient_checkpointing_generates_as_without():
    model = copy.deepcopy(MODEL).train()
    ids, mask = batch_of(ROWS)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=STEPS)
    model.gradient_checkpointing_enable()
    assert model.generate(ids, attention_mask=mask, max_new_tokens=STEPS).tolist() == expected.tolist()


def test_filled_cache_is_refused_where_layers_are_computed_twice():
    model = copy.deepcopy(MODEL).train()
    model.gradient_checkpointing_enable()
    assert model(torch.tensor([SHORT]), past_key_values=DynamicCache(config=CONFIG)).logits.requires_grad
    with pytest.raises(ValueError, match="gradient checkpointing computes layers twice"):
        model(torch.tensor([[31]]), past_key_values=filled_by(torch.tensor([SHORT])))


def test_two_caches_are_refused():
    with pytest.raises(ValueError, match="give one cache"):
        MODEL(torch.tensor([SHORT]), past_key_values=DynamicCache(config=CONFIG), cache=DynamicCache(config=CONFIG))
