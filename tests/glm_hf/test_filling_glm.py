"""Arguments of `fill_blanks` that belong to rows reach their texts, whichever of them are still being filled."""

import copy

import pytest
import torch
from golden import golden_model
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

MODEL = golden_model("cfg1")
CONFIG = MODEL.config
MASK, GMASK, SMASK = CONFIG.mask_token_id, CONFIG.gmask_token_id, CONFIG.smask_token_id
SOP, EOS, EOP = CONFIG.sop_token_id, CONFIG.eos_token_id, CONFIG.eop_token_id
TEXTS = [[21, 3, 33], [98, MASK, 141, 88, MASK], [83, 23, MASK, 53, 71], [7, MASK, 8, MASK, 9, MASK]]
TOKENS = [[31, 32], [41, 42], [51, 52], [61, 62]]  # what each text may answer
OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 2}


def only(rows):
    """Arguments that let each of the rows write its own tokens only."""
    return {"prefix_allowed_tokens_fn": lambda row, ids: [*TOKENS[rows[row]], EOP]}


class Allow(LogitsProcessor):
    """Allow the tokens of each row, counted in the whole batch."""

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, input_ids, scores):
        copies = len(scores) // len(self.rows)
        for number, row in enumerate(self.rows):
            block = scores[number * copies : (number + 1) * copies]
            kept = block[:, [*TOKENS[row], EOP]].clone()
            block[:] = -torch.inf
            block[:, [*TOKENS[row], EOP]] = kept
        return scores


def processors(rows):
    return {"logits_processor": LogitsProcessorList([Allow(rows)])}


class StopAt(StoppingCriteria):
    """Stop each row at the second of its tokens."""

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, input_ids, scores, **kwargs):
        copies = len(input_ids) // len(self.rows)
        ends = torch.tensor([TOKENS[row][1] for row in self.rows]).repeat_interleave(copies)
        return input_ids[:, -1] == ends


def criteria(rows):
    return {**only(rows), "stopping_criteria": StoppingCriteriaList([StopAt(rows)])}


def guidance(rows):
    negative = torch.tensor([[11 + row, MASK, 12, 13 + row, EOS, SOP] for row in rows])
    return {
        "guidance_scale": 3.0,
        "negative_prompt_ids": negative,
        "negative_prompt_attention_mask": torch.ones_like(negative),
    }


def filled(model, texts, make, rows, **options):
    return model.fill_blanks(texts, **OPTIONS, **options, **make(rows)).blanks


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("make", [only, processors, criteria])
def test_each_text_is_filled_as_if_alone(make, options):
    together = filled(MODEL, TEXTS, make, [0, 1, 2, 3], **options)
    alone = [filled(MODEL, [text], make, [row], **options)[0] for row, text in enumerate(TEXTS)]
    assert together == alone
    assert {token for blank in together[1] for token in blank} <= set(TOKENS[1])


def test_each_text_is_guided_by_its_own_negative_prompt():
    together = filled(MODEL, TEXTS, guidance, [0, 1, 2, 3])
    assert together == [filled(MODEL, [text], guidance, [row])[0] for row, text in enumerate(TEXTS)]
    assert together != filled(MODEL, TEXTS, guidance, [3, 2, 1, 0])


@pytest.mark.parametrize("make", [only, processors, criteria, guidance])
def test_texts_that_the_window_cuts_keep_their_arguments(make):
    model = copy.deepcopy(MODEL)
    model.config.max_position_embeddings = 14
    texts = [[11] * 9 + [MASK], TEXTS[0], [12] * 10 + [MASK], TEXTS[2]]
    together = filled(model, texts, make, [0, 1, 2, 3])
    assert together == [filled(model, [text], make, [row])[0] for row, text in enumerate(texts)]
    assert len(together[2][0]) <= 2
