"""`generate` on what a tokenizer returns: texts without `sop`, in batches of all kinds, by every decoding method."""

import copy

import pytest
import torch
from golden import golden_model
from transformers import DynamicCache, StoppingCriteria, TextStreamer

from glm_hf.infilling_glm import prepare_context

MODEL = golden_model("cfg1")
CONFIG = MODEL.config
MASK, GMASK, SMASK = CONFIG.mask_token_id, CONFIG.gmask_token_id, CONFIG.smask_token_id
SOP, EOS, EOP, PAD = CONFIG.sop_token_id, CONFIG.eos_token_id, CONFIG.eop_token_id, CONFIG.pad_token_id
NEW = 8
TEXTS = [
    [83, 23, MASK, 53, 71],
    [94, 27, 30, 85, GMASK],
    [21, 3, 33],
    [98, MASK, 141, 88, MASK],
    [55, SMASK, 120],
    [55, 12, EOS],
    [31, 32, MASK],
    [31, MASK, 32, EOS],
]
SPECIAL = {MASK, GMASK, SMASK, SOP, EOS, EOP, PAD}


def padded(texts, side="left"):
    length = max(map(len, texts))
    fill = [[PAD] * (length - len(text)) for text in texts]
    pairs = zip(fill, texts, strict=True)
    ids = [[*pad, *text] if side == "left" else [*text, *pad] for pad, text in pairs]
    return torch.tensor(ids)


def answers(sequences, length):
    """What a user reads: special tokens skipped in what follows the prompt."""
    return [[token for token in row if token not in SPECIAL] for row in sequences[:, length:].tolist()]


def filled(texts, **options):
    return [blanks[0] for blanks in MODEL.fill_blanks(texts, max_new_tokens=NEW, **options).blanks]


@pytest.mark.parametrize("gives_mask", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str
)
def test_plain_texts_are_filled_as_by_fill_blanks(options, side, gives_mask):
    ids = padded(TEXTS, side)
    mask = (ids != PAD).long() if gives_mask else None
    sequences = MODEL.generate(ids, attention_mask=mask, max_new_tokens=NEW, **options)
    length = ids.shape[1]
    assert (sequences[:, :length] == ids).all()
    assert answers(sequences, length) == filled(TEXTS, **options)


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_what_was_added_stands_behind_the_prompt(text):
    sequence = MODEL.generate(torch.tensor([text]), max_new_tokens=NEW)[0].tolist()
    context = [*prepare_context(text, CONFIG), SOP]
    assert sequence[: len(context)] == context
    assert set(context[len(text) :]) <= SPECIAL
    assert MODEL.generate(torch.tensor([context]), max_new_tokens=NEW)[0].tolist() == sequence


@pytest.mark.parametrize(
    "rows",
    [
        [[21, 3, 33], [83, 23, MASK, 53, 71, EOS, SOP], [GMASK, SOP, 41, 42], [98, MASK, 141]],
        [[21, 3, 33], [31, 32, 33, MASK], [41, 42, GMASK], [31, 32, 33, SMASK]],  # the sop of the last three at 3
    ],
    ids=["with sop", "of one position"],
)
def test_rows_are_each_as_if_alone(rows):
    ids = padded(rows)
    sequences = MODEL.generate(ids, max_new_tokens=NEW)
    assert (sequences[:, : ids.shape[1]] == ids).all()
    alone = [answers(MODEL.generate(torch.tensor([row]), max_new_tokens=NEW), len(row))[0] for row in rows]
    assert answers(sequences, ids.shape[1]) == alone


def test_text_behind_gmask_and_sop_is_read_causally():
    row = [GMASK, SOP, 41, 42, 43]
    visible = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    with torch.no_grad():
        logits = MODEL(torch.tensor([row]), attention_mask=visible, position_ids=torch.arange(5)[None]).logits
    assert MODEL.generate(torch.tensor([row]), max_new_tokens=1)[0].tolist() == [*row, int(logits[0, -1].argmax())]


def test_outputs_in_a_dict_hold_the_prompts_and_their_samples():
    ids = padded(TEXTS)
    outputs = MODEL.generate(
        ids, max_new_tokens=NEW, num_beams=4, num_return_sequences=2, return_dict_in_generate=True, output_scores=True
    )
    assert len(outputs.sequences) == 2 * len(TEXTS)
    assert (outputs.sequences[:, : ids.shape[1]] == ids.repeat_interleave(2, dim=0)).all()
    assert answers(outputs.sequences[::2], ids.shape[1]) == filled(TEXTS, num_beams=4)
    assert len(outputs.scores) == outputs.sequences.shape[1] - ids.shape[1] - 2  # [gMASK] or </s>, and sop


def test_samples_are_drawn_as_behind_completed_prompts():
    ids = padded(TEXTS)
    draws = []
    for prompts in (ids, padded([[*prepare_context(text, CONFIG), SOP] for text in TEXTS])):
        torch.manual_seed(5)
        options = {"do_sample": True, "temperature": 1.5, "suppress_tokens": [MASK, GMASK, SMASK, SOP]}
        draws.append(answers(MODEL.generate(prompts, max_new_tokens=NEW, **options), prompts.shape[1]))
    assert draws[0] == draws[1]


@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_num_tokens": 3}, {"assistant_model": copy.deepcopy(MODEL)}],
    ids=["lookup", "assistant"],
)
@pytest.mark.parametrize("text", TEXTS[:4], ids=str)
def test_assistants_leave_answers_as_they_are(text, options):
    ids = torch.tensor([text])
    assert answers(MODEL.generate(ids, max_new_tokens=NEW, **options), len(text)) == filled([text])


class Words(TextStreamer):
    """Collect ids as they come."""

    def __init__(self):
        self.parts = []

    def put(self, value):
        self.parts.append(value.flatten().tolist())

    def end(self):
        pass


def test_streamer_gets_the_completed_prompt_and_then_tokens():
    words = Words()
    sequence = MODEL.generate(torch.tensor([TEXTS[2]]), max_new_tokens=NEW, streamer=words)[0].tolist()
    assert words.parts[0] == [*TEXTS[2], GMASK, SOP]
    assert [token for part in words.parts for token in part] == sequence


class StopAfter(StoppingCriteria):
    """Stop every row at a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def test_stopping_criteria_end_rows():
    plain = filled([TEXTS[2]], min_new_tokens=NEW)[0]
    stopped = MODEL.generate(
        torch.tensor([TEXTS[2]]), max_new_tokens=NEW, min_new_tokens=NEW, stopping_criteria=[StopAfter(plain[2])]
    )
    assert answers(stopped, len(TEXTS[2]))[0] == plain[: plain.index(plain[2]) + 1]


def test_length_is_that_of_fill_blanks_unless_given():
    model = copy.deepcopy(MODEL)
    model.config.max_position_embeddings = 30
    ids = torch.tensor([TEXTS[2]])
    options = {"eos_token_id": None, "suppress_tokens": [EOP, EOS]}
    assert model.generate(ids, **options).shape[1] == 30
    assert model.generate(ids, max_new_tokens=100, **options).shape[1] == 30
    assert model.generate(ids, max_new_tokens=4, **options).shape[1] == len(TEXTS[2]) + 2 + 4
    assert model.generate(ids, max_length=12, **options).shape[1] == 12
    with pytest.raises(ValueError, match="room for at least 1 new token"):
        model.generate(ids, max_length=5)


def test_embedded_texts_are_completed_as_ids():
    ids = padded(TEXTS)
    mask = (ids != PAD).long()
    embeds = MODEL.get_input_embeddings()(ids)
    for options in ({}, {"num_beams": 3}):
        tokens = MODEL.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NEW, **options)
        assert answers(tokens, 0) == filled(TEXTS, **options)


def test_negative_prompts_are_completed():
    positive, negative = [83, 23, MASK, 53, 71], [[21, 3, 33], [31, 32, MASK, 33]]
    options = {"guidance_scale": 2.0, "max_new_tokens": NEW, "min_new_tokens": NEW}
    plain = MODEL.generate(torch.tensor([positive] * 2), negative_prompt_ids=padded(negative), **options)
    completed = padded([[*prepare_context(text, CONFIG), SOP] for text in negative])
    expected = MODEL.generate(
        torch.tensor([positive] * 2),
        negative_prompt_ids=completed,
        negative_prompt_attention_mask=(completed != PAD).long(),
        **options,
    )
    assert plain.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([PAD, PAD], "empty"),
        ([MASK, PAD], "nothing but masks"),
        ([11, MASK, GMASK], "mixes"),
        ([11] * 3000, "leaves no room"),
    ],
    ids=["empty", "masks", "mixed", "long"],
)
def test_prompts_that_cannot_be_filled_are_refused(row, words):
    with pytest.raises(ValueError, match=words):
        MODEL.generate(torch.tensor([row]))


def test_positions_and_caches_need_whole_prompts():
    ids = torch.tensor([TEXTS[2]])
    with pytest.raises(ValueError, match="end each row in sop"):
        MODEL.generate(ids, position_ids=torch.arange(3)[None])
    cache = DynamicCache(config=CONFIG)
    MODEL(ids[:, :2], past_key_values=cache)
    with pytest.raises(ValueError, match="context has grown"):
        MODEL.generate(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="shape of input_ids"):
        MODEL.generate(ids, attention_mask=torch.ones(1, 5))


def test_a_conversation_goes_on_in_the_columns_of_its_cache():
    rows = [[21, 3, 33], [98, MASK, 141], [83, 23, MASK, 53, 71]]
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    outputs = MODEL.generate(padded(rows), **options, return_dict_in_generate=True)
    longer = torch.cat((outputs.sequences, torch.tensor([[41], [42], [43]])), dim=1)
    cache = outputs["cache"] if "cache" in outputs else outputs["past_key_values"]
    continued = MODEL.generate(longer, past_key_values=cache, **options)
    assert continued.tolist() == MODEL.generate(longer, **options).tolist()


def test_a_cache_whose_rows_were_moved_is_not_reused():
    rows = [[21, 3, 33], [GMASK, SOP, 41, 42]]
    outputs = MODEL.generate(padded(rows), max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    cache = outputs["cache"] if "cache" in outputs else outputs["past_key_values"]
    longer = torch.cat((outputs.sequences, torch.tensor([[41], [42]])), dim=1)
    with pytest.raises(ValueError, match="rows of the cache were moved"):
        MODEL.generate(longer, past_key_values=cache, max_new_tokens=3)


def test_healing_of_the_last_token_is_refused():
    with pytest.raises(ValueError, match="token_healing"):
        MODEL.generate(torch.tensor([TEXTS[2]]), token_healing=True)


def test_completion_in_training_is_warned_of(monkeypatch):
    warnings = []
    monkeypatch.setattr("glm_hf.generation_glm.logger.warning_once", warnings.append)
    model = copy.deepcopy(MODEL)
    model.generate(torch.tensor([TEXTS[2]]), max_new_tokens=1)
    model.train().generate(torch.tensor([[*TEXTS[2], GMASK, SOP]]), max_new_tokens=1)
    assert warnings == []
    model.generate(torch.tensor([TEXTS[2]]), max_new_tokens=1)
    assert "give it prompts that end in sop" in warnings[0]
