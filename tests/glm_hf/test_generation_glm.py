import copy
import shutil

import pytest
import torch
from golden import CONFIGS, golden_model
from transformers import CompileConfig, DynamicCache, GenerationConfig, StoppingCriteria
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from glm_hf import GLMForMaskedLM, generation_glm, masking_glm, positions_glm

MODEL = golden_model("cfg1")
CONFIG = MODEL.config
MASK, GMASK, SMASK = CONFIG.mask_token_id, CONFIG.gmask_token_id, CONFIG.smask_token_id
SOP, EOS, EOP = CONFIG.sop_token_id, CONFIG.eos_token_id, CONFIG.eop_token_id
SHORT = [83, 23, MASK, 53, 71, 80, EOS, SOP]
LONG = [94, 27, 30, 85, GMASK, SOP]
NEW = 8


def brute_force_greedy(row, steps=NEW):
    """Recompute everything for every token, with mask and positions written down by hand."""
    row, context = list(row), row.index(SOP)
    frozen = row.index(MASK) if MASK in row else None
    for _ in range(steps):
        length = len(row)
        visible = torch.ones(length, length, dtype=torch.bool).tril()
        visible[:context, :context] = True
        positions = torch.tensor([[index if frozen is None or index < context else frozen for index in range(length)]])
        with torch.no_grad():
            logits = MODEL(torch.tensor([row]), attention_mask=visible[None, None], position_ids=positions).logits
        row.append(logits[0, -1].argmax().item())
        if row[-1] in (EOP, EOS):
            break
    return row


def left_padded(*rows):
    return MODEL._pad_left(rows)


def generated(rows=(SHORT, LONG), **kwargs):
    """Generated rows without padding; `NEW` tokens each unless they end."""
    input_ids, attention_mask = left_padded(*rows)
    sequences = MODEL.generate(input_ids, attention_mask=attention_mask, max_new_tokens=NEW, **kwargs)
    length = input_ids.shape[1]
    return [[*row, *cut_behind_end(ids)] for row, ids in zip(rows, sequences[:, length:].tolist(), strict=True)]


def cut_behind_end(ids):
    end = next((index for index, token_id in enumerate(ids) if token_id in (EOP, EOS)), len(ids))
    return ids[: end + 1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_greedy_batch_of_both_masks_equals_brute_force(options):
    assert generated(**options) == [brute_force_greedy(SHORT), brute_force_greedy(LONG)]


@pytest.mark.parametrize("row", [SHORT, LONG], ids=["mask", "gmask"])
def test_prompt_lookup_equals_greedy(row):
    assert generated([row], prompt_lookup_num_tokens=3) == [brute_force_greedy(row)]


@pytest.mark.parametrize("row", [SHORT, LONG], ids=["mask", "gmask"])
def test_assistant_decoding_equals_greedy(row):
    assistant = copy.deepcopy(MODEL)
    with torch.no_grad():
        assistant.model.layers[-1].mlp.dense_4h_to_h.weight.mul_(0.9)  # so that some of its drafts are refused
    assert generated([row], assistant_model=assistant) == [brute_force_greedy(row)]


@pytest.mark.parametrize("row", [SHORT, LONG], ids=["mask", "gmask"])
def test_drafts_of_the_first_layers_leave_answers_as_they_are(row):
    assert generated([row], assistant_early_exit=2) == [brute_force_greedy(row)]


def step_by_hooks(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """Greedy search as a function that users hand to `generate`."""
    is_first = True
    for _ in range(NEW):
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=None if is_first else 1, is_first_iteration=is_first, **kwargs
        )
        outputs = model(**inputs, return_dict=True)
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        input_ids = torch.cat((input_ids, outputs.logits[:, -1:].argmax(-1)), dim=1)
        is_first = False
    return input_ids


def test_decoding_functions_of_users_step_by_the_hooks():
    assert generated(custom_generate=step_by_hooks) == [brute_force_greedy(SHORT), brute_force_greedy(LONG)]


@pytest.mark.parametrize("rows", [[SHORT], [LONG], [SHORT, LONG]], ids=["mask", "gmask", "both"])
def test_beam_search_is_the_same_with_every_cache_and_batch(rows):
    beams = {"num_beams": 3, "early_stopping": False}
    expected = [generated([row], **beams, use_cache=False)[0] for row in rows]
    assert generated(rows, **beams) == expected
    assert generated(rows, **beams, cache_implementation="static") == expected


def test_sampling_with_a_cache_draws_what_it_draws_without():
    draws = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        draws.append(generated(do_sample=True, temperature=1.5, top_p=0.95, use_cache=use_cache))
    assert draws[0] == draws[1]
    assert draws[0] != generated()


def test_static_cache_compiles_in_one_graph():
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("compiling on the CPU needs a C++ compiler")
    compile_config = CompileConfig(fullgraph=True, backend="aot_eager")
    compile_config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compile_config}
    assert generated(**options) == [brute_force_greedy(SHORT), brute_force_greedy(LONG)]


def test_decode_steps_without_padding_carry_no_mask(monkeypatch):
    seen = []
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append((query.shape[2], attention_mask))
        return attend(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", spy)
    MODEL.generate(torch.tensor([LONG]), max_new_tokens=4, min_new_tokens=4)
    lengths = [length for length, _ in seen]
    layers = CONFIG.num_hidden_layers
    prefill = [1, len(LONG) - 1] * (layers - 1) + [1]  # sop and context apart; the last layer needs sop only
    assert lengths == prefill + [1] * 3 * layers
    assert all(mask is None for _, mask in seen)


def test_positions_given_to_generate_win():
    positions = torch.arange(len(SHORT))[None] + 100
    shifted = MODEL.generate(torch.tensor([SHORT]), position_ids=positions, max_new_tokens=3, min_new_tokens=3)
    row = list(SHORT)
    for _ in range(3):
        with torch.no_grad():
            logits = MODEL(torch.tensor([row]), position_ids=torch.arange(len(row))[None] + 100).logits[0, -1]
        logits[[EOP, EOS]] = -torch.inf
        row.append(logits.argmax().item())
    assert shifted[0].tolist() == row


@pytest.mark.parametrize("settings", ["argument", "generation_config"])
def test_chunked_prefill_is_refused(settings):
    options = {"prefill_chunk_size": 4}
    if settings == "generation_config":
        config = copy.deepcopy(MODEL.generation_config)
        config.prefill_chunk_size = 4
        options = {"generation_config": config}
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        MODEL.generate(torch.tensor([LONG]), max_new_tokens=2, **options)


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match="continuous batching"):
        MODEL.generate_batch([LONG])


def test_cache_whose_context_grew_is_refused():
    cache = DynamicCache(config=CONFIG)
    MODEL(torch.tensor([[11, 12, 13]]), past_key_values=cache)
    with pytest.raises(ValueError, match="context has grown"):
        MODEL.generate(torch.tensor([[11, 12, 13, 14, GMASK, SOP]]), past_key_values=cache, max_new_tokens=2)


def test_cache_with_the_whole_context_is_continued():
    cache = DynamicCache(config=CONFIG)
    first = MODEL.generate(torch.tensor([LONG]), past_key_values=cache, max_new_tokens=3, min_new_tokens=3)
    longer = torch.cat((first, torch.tensor([[41, 42]])), dim=1)
    continued = MODEL.generate(longer, past_key_values=cache, max_new_tokens=4)
    assert continued.tolist() == MODEL.generate(longer, max_new_tokens=4).tolist()


def test_new_ids_alone_do_not_continue_a_cache():
    cache = DynamicCache(config=CONFIG)
    MODEL.generate(torch.tensor([LONG]), past_key_values=cache, max_new_tokens=3, min_new_tokens=3)
    mask = torch.ones(1, cache.get_seq_length() + 1)
    with pytest.raises(ValueError, match="ids of the whole sequence"):
        MODEL.generate(torch.tensor([[41]]), attention_mask=mask, past_key_values=cache, max_new_tokens=2)


TEXTS = [[83, 23, MASK, 53, 71], [94, 27, 30, 85, GMASK], [21, 3, 33], [98, MASK, 141, 88, MASK], [55, SMASK, 120]]


def test_batch_is_filled_as_its_texts_alone():
    batch = MODEL.fill_blanks(TEXTS, max_new_tokens=NEW)
    for index, text in enumerate(TEXTS):
        alone = MODEL.fill_blanks([text], max_new_tokens=NEW)
        assert batch.sequences[index] == alone.sequences[0]
        assert batch.blanks[index] == alone.blanks[0]
        assert batch.scores[index] == pytest.approx(alone.scores[0], abs=1e-3)


def test_padded_tensor_is_filled_as_lists():
    input_ids, attention_mask = left_padded(*TEXTS)
    assert MODEL.fill_blanks(input_ids, attention_mask, max_new_tokens=NEW) == MODEL.fill_blanks(
        TEXTS, max_new_tokens=NEW
    )


def test_sequence_is_the_text_with_blanks_in_place_of_masks():
    filled = MODEL.fill_blanks(TEXTS, max_new_tokens=NEW)
    for text, sequence, blanks in zip(TEXTS, filled.sequences, filled.blanks, strict=True):
        text = text if set(text) & {MASK, GMASK, SMASK} else [*text, GMASK]
        parts = iter(blanks)
        expected = [token for item in text for token in (next(parts) if item in (MASK, GMASK, SMASK) else [item])]
        assert sequence == expected


def test_text_keeps_an_end_of_sentence_of_its_own():
    assert MODEL.fill_blanks([[83, MASK, 53, EOS]], max_new_tokens=2).sequences[0][-2:] == [53, EOS]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_scores_are_log_probabilities_of_the_blanks(options):
    texts = [[83, 23, MASK, 53, 71], [94, 27, 30, 85, GMASK]]
    contexts = [[*texts[0], EOS], texts[1]]
    filled = MODEL.fill_blanks(texts, max_new_tokens=NEW, **options)
    for context, (blank,), (score,) in zip(contexts, filled.blanks, filled.scores, strict=True):
        row = [*context, SOP, *blank]
        with torch.no_grad():
            log_probs = MODEL(torch.tensor([row])).logits[0].log_softmax(-1)
        of_tokens = sum(log_probs[len(context) + index, token].item() for index, token in enumerate(blank))
        ends = [log_probs[-1, end].item() for end in (EOP, EOS)] if len(blank) < NEW else [0.0]
        assert any(score == pytest.approx(of_tokens + end, abs=1e-3) for end in ends)


def test_score_blanks_sums_the_tokens_and_their_end():
    contexts, blanks = [[83, MASK, 53, EOS], [94, GMASK]], [[11, 12, 13], [14]]
    for context, blank, score in zip(contexts, blanks, MODEL.score_blanks(contexts, blanks), strict=True):
        with torch.no_grad():
            log_probs = MODEL(torch.tensor([[*context, SOP, *blank]])).logits[0].log_softmax(-1)
        expected = sum(log_probs[len(context) + index, token] for index, token in enumerate([*blank, EOP]))
        assert score == pytest.approx(expected.item(), abs=1e-3)


def test_proposals_come_best_first():
    (proposals,) = MODEL.propose_blanks(
        [[94, 27, 30, 85, GMASK]], num_beams=4, num_return_sequences=4, length_penalty=0.0
    )
    scores = [proposal.score for proposal in proposals]
    assert len({tuple(proposal.ids) for proposal in proposals}) == 4
    assert scores == sorted(scores, reverse=True)


def test_model_that_only_wants_masks_still_comes_to_an_end():
    model = copy.deepcopy(MODEL)
    with torch.no_grad():
        for bad in (MASK, GMASK, SMASK, SOP):
            model.model.embed_tokens.weight[bad] *= 100
    filled = model.fill_blanks([[83, MASK, 53, MASK], [94, 27]], max_new_tokens=5)
    assert [len(blanks) for blanks in filled.blanks] == [2, 1]
    assert not {MASK, GMASK, SMASK, SOP}.intersection(*filled.sequences)


def test_answers_end_where_the_context_window_ends():
    model = copy.deepcopy(MODEL)
    model.config.max_position_embeddings = 12
    filled = model.fill_blanks([[94, 27, 30, 85, 74]], max_new_tokens=100, min_new_tokens=5)
    assert len(filled.blanks[0][0]) == 12 - len([94, 27, 30, 85, 74, GMASK, SOP])


@pytest.mark.parametrize("text", [[], [MASK], [11, MASK, GMASK], [11] * 3000], ids=["empty", "masks", "mixed", "long"])
def test_bad_text_is_refused_before_anything_is_generated(text, monkeypatch):
    monkeypatch.setattr(MODEL, "generate", None)
    with pytest.raises(ValueError, match="the text"):
        MODEL.fill_blanks([[11, MASK, 12], text])


def test_no_texts_give_no_blanks():
    assert MODEL.fill_blanks([]).sequences == []


def test_one_dimensional_ids_are_refused():
    with pytest.raises(ValueError, match="input_ids must be 2D"):
        MODEL.fill_blanks(torch.tensor([11, MASK]))


@pytest.mark.parametrize("name", CONFIGS)
def test_masked_lm_hands_its_weights_to_the_generating_head(name):
    infilling = golden_model(name)
    masked_lm = GLMForMaskedLM(infilling.config).eval()
    masked_lm.load_state_dict(infilling.state_dict())
    head = masked_lm.as_blank_infilling()
    assert head.model is masked_lm.model
    text = [[11, infilling.config.mask_token_id, 12]]
    assert head.fill_blanks(text, max_new_tokens=4) == infilling.fill_blanks(text, max_new_tokens=4)


def test_embeddings_are_continued_from_their_last_position():
    row = [21, 22, 23, 24, GMASK, SOP]
    expected = MODEL.generate(torch.tensor([row]), max_new_tokens=NEW, min_new_tokens=NEW)[0, len(row) :]
    for options in ({}, {"use_cache": False}, {"num_beams": 1, "cache_implementation": "static"}):
        embeds = MODEL.get_input_embeddings()(torch.tensor([row]))
        tokens = MODEL.generate(inputs_embeds=embeds, max_new_tokens=NEW, min_new_tokens=NEW, **options)
        assert tokens[0].tolist() == expected.tolist()


def test_context_behind_a_filled_cache_is_refused_in_forward():
    cache = DynamicCache(config=CONFIG)
    MODEL(torch.tensor([[11, 12]]), past_key_values=cache)
    with pytest.raises(ValueError, match="came with a filled cache"):
        MODEL(torch.tensor([[13, GMASK, SOP]]), past_key_values=cache)


@pytest.mark.parametrize("cached", [len(LONG) - 1, len(LONG)])
def test_cache_must_hold_the_first_sop(cached):
    cache = DynamicCache(config=CONFIG)
    MODEL(torch.tensor([LONG]), past_key_values=cache)
    if cached < len(LONG):
        cache.crop(cached - len(LONG))
    longer = torch.tensor([[*LONG, 41]])
    if cached == len(LONG):
        assert MODEL.generate(longer, past_key_values=cache, max_new_tokens=1).shape == (1, 8)
    else:
        with pytest.raises(ValueError, match="context has grown"):
            MODEL.generate(longer, past_key_values=cache, max_new_tokens=1)


def test_causal_cache_is_continued():
    cache = DynamicCache(config=CONFIG)
    MODEL(torch.tensor([[GMASK, SOP, 11, 12, 13]]), past_key_values=cache)
    row = torch.tensor([[GMASK, SOP, 11, 12, 13, 14]])
    continued = MODEL.generate(row, past_key_values=cache, max_new_tokens=4)
    assert continued.tolist() == MODEL.generate(row, max_new_tokens=4).tolist()


def test_long_neighbour_does_not_shorten_an_answer():
    long_text = [50] * (CONFIG.max_position_embeddings - 5) + [GMASK]
    options = {"max_new_tokens": 12, "min_new_tokens": 12}
    batch = MODEL.fill_blanks([[94, 27, 30], long_text], **options)
    assert [len(blanks[0]) for blanks in batch.blanks] == [12, 3]
    assert batch.blanks[0] == MODEL.fill_blanks([[94, 27, 30]], **options).blanks[0]


def test_generation_config_counts_new_tokens_and_suppresses():
    text = [[94, 27, 30, 85, GMASK]]
    plain = MODEL.fill_blanks(text, max_new_tokens=3).blanks[0][0]
    config = GenerationConfig(max_new_tokens=3, suppress_tokens=[plain[0]])
    assert plain[0] not in MODEL.fill_blanks(text, generation_config=config).blanks[0][0]
    assert len(MODEL.fill_blanks(text, generation_config=config, min_new_tokens=3).blanks[0][0]) == 3
    assert plain[0] not in MODEL.fill_blanks(text, max_new_tokens=3, suppress_tokens=[plain[0]]).blanks[0][0]
    with pytest.raises(ValueError, match="at least 1 new token"):
        MODEL.fill_blanks(text, max_new_tokens=0)


class StopAtLength(StoppingCriteria):
    """Stop the first row after two tokens."""

    def __init__(self, prompt_length):
        self.length = prompt_length + 2

    def __call__(self, input_ids, scores, **kwargs):
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        done[0] = input_ids.shape[1] >= self.length
        return done


def test_row_stopped_by_a_criterion_ends_there():
    texts = [[94, 27, 30, 85, 94, GMASK], [94, 27, 30, 85, 11, GMASK]]
    plain = MODEL.fill_blanks(texts, max_new_tokens=6, min_new_tokens=6)
    stopped = MODEL.fill_blanks(texts, max_new_tokens=6, min_new_tokens=6, stopping_criteria=[StopAtLength(7)])
    assert stopped.blanks == [[plain.blanks[0][0][:2]], plain.blanks[1]]
    log_probs = MODEL(torch.tensor([[*texts[0], SOP, *plain.blanks[0][0]]])).logits[0].log_softmax(-1)
    expected = sum(log_probs[6 + index, token].item() for index, token in enumerate(plain.blanks[0][0][:2]))
    assert stopped.scores[0][0] == pytest.approx(expected, abs=1e-3)


def test_padded_tensor_without_mask_leaves_padding_out():
    input_ids, attention_mask = left_padded(*TEXTS)
    with_mask = MODEL.fill_blanks(input_ids, attention_mask, max_new_tokens=3)
    assert MODEL.fill_blanks(input_ids, max_new_tokens=3) == with_mask


def test_blank_that_does_not_fit_is_not_scored():
    with pytest.raises(ValueError, match="but the model takes 2048"):
        MODEL.score_blanks([[94, GMASK]], [[11] * 2100])


def test_offloaded_weights_fill_blanks(tmp_path):
    MODEL.save_pretrained(tmp_path / "model")
    offloaded = type(MODEL).from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert offloaded.fill_blanks(TEXTS, max_new_tokens=3) == MODEL.fill_blanks(TEXTS, max_new_tokens=3)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_the_layout_is_computed_once_per_prefill(options, monkeypatch):
    calls = []
    for module in (generation_glm, masking_glm, positions_glm):
        layout = module.infilling_layout
        monkeypatch.setattr(module, "infilling_layout", lambda *args, f=layout: (calls.append(1), f(*args))[1])
    generated((SHORT,), **options)
    assert len(calls) == 1
    calls.clear()
    context = [83, 23, MASK, 53, MASK, 80, EOS]
    assert len(MODEL.fill_blanks([context], max_new_tokens=3, **options).blanks[0]) == 2
    assert len(calls) == 2  # one for each blank
