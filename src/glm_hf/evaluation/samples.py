"""The rows that the original's evaluation feeds the model: choices side by side, contexts to continue, windows.

    multi-choice   text with its mask │ sop choice 1 │ sop choice 2 │ ...    a choice sees the text and itself
    generation     text with its mask │ sop                                  `[gMASK] sop text` if unidirectional
    windows        prompt [gMASK] │ sop text                                 prompt two-way, text one-way

A choice stands without its last token, which is only predicted. A text without the mask gets it behind; nothing
else is added, neither `</s>` nor `eop`. Only the mask that is configured counts: others in the text are tokens as
any. So positions are given here and not derived from the ids.

Shapes: `B` rows, `L` length.
Source: the evaluation code released with GLM-130B.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch

from glm_hf.configuration_glm import GLMConfig
from glm_hf.decoding import Layout


@dataclass(frozen=True)
class Rule:
    """How texts become rows; the defaults are those of the original."""

    mask: str = "[MASK]"
    """`[MASK]`, whose answers all stand at its position, or `[gMASK]`, whose answers count on."""
    is_unidirectional: bool = False
    """Whether texts are read from left to right; needs `[gMASK]`. Choices ignore it."""
    max_length: int = 2048
    """Most tokens of a row; longer texts are cut on the left."""
    adds_eos: bool = False
    """Whether `</s>` stands behind a text that does not end in its mask, as when blanks are filled."""
    scores_eop: bool = False
    """Whether the end of a choice (`eop`) counts."""

    def __post_init__(self) -> None:
        """Raise ValueError if the settings do not go together."""
        if self.mask not in ("[MASK]", "[gMASK]"):
            raise ValueError(f"mask must be [MASK] or [gMASK], got {self.mask}")
        if self.is_unidirectional and self.mask != "[gMASK]":
            raise ValueError("unidirectional needs [gMASK] (use_task_mask: true)")
        if self.max_length < 4:
            raise ValueError(f"max_seq_length must be at least 4, got {self.max_length}")

    def mask_id(self, config: GLMConfig) -> int:
        """Return the id of the mask."""
        return config.mask_token_id if self.mask == "[MASK]" else config.gmask_token_id


@dataclass(frozen=True)
class Sample:
    """A row, and which of its outputs are scored."""

    input_ids: list[int]
    position_ids: list[int]
    num_context: int
    """Number of first tokens, which all tokens see."""
    blocks: list[tuple[int, int]]
    """First and last place (exclusive) of every answer, causal inside and blind to the others."""
    rows: list[int]
    """Places whose outputs are scored."""
    targets: list[int]
    """What is to come behind each of them."""
    splits: list[int]
    """Number of rows of every answer."""


def choice_sample(text: Sequence[int], choices: Sequence[Sequence[int]], rule: Rule, config: GLMConfig) -> Sample:
    """
    Lay out all choices of a question in one row.

    Args:
        text: Ids of the question, with or without its mask.
        choices: Ids of each choice.
        rule: How texts become rows.
        config: Special ids.

    Raises:
        ValueError: If a choice is empty, or the choices do not fit the window.
    """
    if not choices or not all(choices):
        raise ValueError("a question needs choices of at least one token each")
    choices = [[*choice, config.eop_token_id] if rule.scores_eop else list(choice) for choice in choices]
    length = sum(map(len, choices))
    room = length if length > len(choices) else 1  # as if every choice of the file had one token
    if room >= rule.max_length:
        raise ValueError(f"the choices have {length} tokens, which leaves no room for the text in {rule.max_length}")
    context, mask_place = with_mask(cut_left(text, rule.max_length - room - 2), rule, config)
    ids, blocks = list(context), []
    rows: list[int] = []
    positions = list(range(len(context)))
    for choice in choices:
        start = len(ids)
        ids += [config.sop_token_id, *choice[:-1]]
        blocks.append((start, len(ids)))
        rows += range(start, len(ids))
        steps = range(len(choice))
        positions += [mask_place if rule.mask == "[MASK]" else len(context) + step for step in steps]
    targets = [token for choice in choices for token in choice]
    return Sample(ids, positions, len(context), blocks, rows, targets, [len(choice) for choice in choices])


def single_token_sample(
    text: Sequence[int], choices: Sequence[Sequence[int]], rule: Rule, config: GLMConfig
) -> Sample:
    """Lay out a question whose choices have one token each: a `sop` for all of them."""
    sample = choice_sample(text, [choices[0]], rule, config)
    place = len(sample.input_ids) - 1
    return Sample(
        sample.input_ids,
        sample.position_ids,
        sample.num_context,
        sample.blocks,
        [place] * len(choices),
        [choice[0] for choice in choices],
        [1] * len(choices),
    )


def generation_row(
    text: Sequence[int], max_new_tokens: int, rule: Rule, config: GLMConfig
) -> tuple[list[int], Layout]:
    """
    Lay out a text that is to be continued, or whose blank is to be filled.

    Args:
        text: Ids, with or without the mask.
        max_new_tokens: Room that is left.
        rule: How texts become rows.
        config: Special ids.

    Returns:
        Ids of the row, and where its tokens and those to come stand.

    Raises:
        ValueError: If there is no room for the text, or `[gMASK]` stands inside of it.
    """
    room = rule.max_length - max_new_tokens - 2
    if room < 1:
        raise ValueError(f"{max_new_tokens} new tokens leave no room for a text in {rule.max_length}")
    text = cut_left(text, room)
    is_inside = config.gmask_token_id in (text if rule.is_unidirectional else text[:-1])
    if rule.mask == "[gMASK]" and is_inside:
        raise ValueError("[gMASK] must stand at the end of a text that is to be continued, or nowhere")
    if rule.is_unidirectional:
        row = [config.gmask_token_id, config.sop_token_id, *text]
        return row, Layout(tuple(range(len(row))), 1, len(row), 1)
    context, mask_place = with_mask(text, rule, config)
    counted = range(len(context))
    row = [*context, config.sop_token_id]
    if rule.mask == "[MASK]":
        return row, Layout((*counted, mask_place), len(context), mask_place, 0)
    return row, Layout((*counted, len(context)), len(context), len(context) + 1, 1)


def num_windows(num_tokens: int, stride: int, rule: Rule) -> int:
    """Return the number of windows of a document."""
    return ceil(max(num_tokens - (rule.max_length - 1), 0) / stride) + 1


def window_sample(tokens: Sequence[int], number: int, stride: int, rule: Rule, config: GLMConfig) -> Sample:
    """
    Lay out one window of a document.

    The first predicts all of its tokens, a later one the last `stride` of them behind a two-way prompt; if
    unidirectional, every window predicts all of its tokens, so that those of two windows count twice.

    Args:
        tokens: Ids of the document.
        number: Number of the window, from 0 on.
        stride: Tokens from one window to the next (`generation_length`).
        rule: How texts become rows.
        config: Special ids.
    """
    tokens = list(tokens[number * stride : number * stride + rule.max_length - 1])
    prompt_length = 0 if number == 0 or rule.is_unidirectional else rule.max_length - 1 - stride
    prompt, text = tokens[:prompt_length], tokens[prompt_length:]  # from the end if negative, as in the original
    ids = [*prompt, rule.mask_id(config), config.sop_token_id, *text[:-1]]
    first = len(prompt) + 1
    rows = list(range(first, first + len(text)))
    return Sample(ids, list(range(len(ids))), first, [(first, len(ids))], rows, text, [len(text)])


def with_mask(text: Sequence[int], rule: Rule, config: GLMConfig) -> tuple[list[int], int]:
    """Return a text with its mask, appended if it has none, and the place of the first."""
    context, mask_id = list(text), rule.mask_id(config)
    if mask_id not in context:
        context.append(mask_id)
    if rule.adds_eos and context[-1] not in (mask_id, config.eos_token_id):
        context.append(config.eos_token_id)
    return context, context.index(mask_id)


def cut_left(text: Sequence[int], length: int) -> list[int]:
    """Return the last tokens of a text."""
    return list(text[max(len(text) - max(length, 0), 0) :])


def stack(samples: Sequence[Sample], pad_token_id: int) -> dict[str, Any]:
    """
    Return the arguments of a model that reads rows together, padded on the right.

    Returns:
        `input_ids` and `position_ids` `(B, L)`, `attention_mask` `(B, 1, L, L)` bool, True where a token sees.
    """
    batch, length = len(samples), max(len(sample.input_ids) for sample in samples)
    rows = np.zeros((3, batch, length), np.int64)  # numpy writes a row in a tenth of torch's time
    rows[0] = pad_token_id
    for index, sample in enumerate(samples):
        rows[0, index, : len(sample.input_ids)] = sample.input_ids
        rows[1, index, : len(sample.position_ids)] = sample.position_ids
        rows[2, index, len(sample.input_ids) :] = len(sample.blocks) + 1
        for number, (start, end) in enumerate(sample.blocks, start=1):
            rows[2, index, start:end] = number
    input_ids, position_ids, block = torch.from_numpy(rows)  # block: 0 in the context, then 1, 2, ...
    is_causal = torch.ones(length, length, dtype=torch.bool).tril()
    sees = (block[:, None] == 0) | ((block[:, :, None] == block[:, None]) & is_causal)  # (B, query, key)
    return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": sees[:, None]}
