"""The blank-infilling layout: one rule from token ids to positions and to the two-way context, and whole prompts.

A sample is a context, `sop`, and the content of its blanks, each blank after a `sop` of its own:

    The capital of France is [MASK] . </s> sop Paris eop
    \\_________________ context _________/ \\_ causal __/
    0    1       2  3      4  5      6 7   5   5     5     position_ids

Everything before the first `sop` is the context, whose tokens see each other; `sop` and what follows is causal and
sees the whole context. Positions count up; after `sop` they stay at the mask if the context holds a `[MASK]` or
`[sMASK]`, and count on if it ends in `[gMASK]`. A sample without `sop` is causal throughout.

Prompts of `generate` are completed to what the model was trained on, and given back in the columns they came in:

    as it comes   The capital of France is [MASK] .            The opposite of hot is
    completed     The capital of France is [MASK] . </s> sop   The opposite of hot is [gMASK] sop

What is added stands behind the columns of the prompt, so that `sequences[:, L:]` holds special tokens and then the
answer; rows that get less than others have padding in between. Only rows with a `sop` of their own, beside others
without, are moved to the right end of the batch, and back in what is returned.

Shapes: `B` batch, `L` length as given, `W` with what was added, `D` hidden.
Source: GLM-130B (arXiv 2210.02414), section 2.1.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .configuration_glm import GLMConfig


def infilling_layout(
    input_ids: torch.Tensor, config: GLMConfig, segment_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Derive positions and the two-way context from token ids alone.

    Args:
        input_ids: `(B, L)` whole samples, from their first token on.
        config: Holds the special token ids.
        segment_ids: `(B, L)` integers from 0 to `L`: 0 for padding, otherwise the number of the packed sample that a
            token belongs to. A 2D attention mask is the case of one sample per row. All ones by default.

    Returns:
        `position_ids` `(B, L)`, 0 on padding, and `in_context` `(B, L)` bool, False on padding.
    """
    length = input_ids.shape[1]
    segment_ids = torch.ones_like(input_ids) if segment_ids is None else segment_ids.long()
    is_token = segment_ids > 0
    index = is_token.long().cumsum(1) - 1
    index = index - _lowest_in_segment(index, segment_ids)  # counts from 0 in every segment

    def first_index_of(token_id: int, among: torch.Tensor) -> torch.Tensor:
        """Index of a token's first occurrence in each token's segment; `length` if it has none."""
        found = (input_ids == token_id) & among
        return _lowest_in_segment(index.masked_fill(~found, length), segment_ids)

    sop_index = first_index_of(config.sop_token_id, among=is_token)
    in_context = is_token & (index < sop_index) & (sop_index < length)
    mask_index = first_index_of(config.mask_token_id, among=in_context)
    smask_index = first_index_of(config.smask_token_id, among=in_context)
    blank_index = torch.where(mask_index < length, mask_index, smask_index)
    is_frozen = (index >= sop_index) & (blank_index < length)
    position_ids = torch.where(is_frozen, blank_index, index).masked_fill(~is_token, 0)
    return position_ids, in_context


def _lowest_in_segment(values: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """Return for every token the lowest value `(B, L)` found in its segment."""
    batch, length = values.shape
    lowest = values.new_full((batch, length + 1), length).scatter_reduce(1, segment_ids, values, "amin")
    return lowest.gather(1, segment_ids)


def prepare_context(token_ids: Sequence[int], config: GLMConfig) -> list[int]:
    """
    Complete a text to a context: `[gMASK]` if it has no mask, `</s>` unless it ends in a mask.

    Raises:
        ValueError: If the text is empty, holds nothing but masks, mixes kinds of masks, already contains `sop`, or
            leaves no room for an answer in `max_position_embeddings`.
    """
    context = [int(token_id) for token_id in token_ids]
    masks = mask_token_ids(config)
    found = [token_id for token_id in context if token_id in masks]
    if not context:
        raise ValueError("the text is empty; give at least one token besides the masks")
    if all(token_id in (*masks, config.eos_token_id) for token_id in context):
        raise ValueError("the text holds nothing but masks; give at least one token besides them")
    if len(set(found)) > 1:
        raise ValueError("the text mixes [MASK], [gMASK] and [sMASK]; use one kind of mask in one text")
    if config.sop_token_id in context:
        raise ValueError("the text already contains the start-of-blank token (sop), which is added here")
    if not found:
        context.append(config.gmask_token_id)
    if context[-1] not in (*masks, config.eos_token_id):
        context.append(config.eos_token_id)
    if len(context) + 1 >= config.max_position_embeddings:
        raise ValueError(
            f"the text has {len(context)} tokens, which leaves no room for an answer in the "
            f"{config.max_position_embeddings} tokens of the model; shorten it"
        )
    return context


def next_blank(context: Sequence[int], config: GLMConfig) -> int | None:
    """Return the index of the mask that is filled next, or None if the context has no mask."""
    for token_id in mask_token_ids(config):
        if token_id in context:
            return list(context).index(token_id)
    return None


def splice_blank(context: Sequence[int], blank: Sequence[int], config: GLMConfig) -> list[int]:
    """Return the context with its next mask replaced by the ids of a blank."""
    index = next_blank(context, config)
    if index is None:
        raise ValueError("the context has no mask to fill")
    return [*context[:index], *blank, *context[index + 1 :]]


def mask_token_ids(config: GLMConfig) -> tuple[int, int, int]:
    """Return the ids of the masks in the order in which they are filled."""
    return config.mask_token_id, config.smask_token_id, config.gmask_token_id


def masked_lm_layout(
    input_ids: torch.Tensor,
    config: GLMConfig,
    padding_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Append `</s>` and one `sop` for every `[MASK]`, so that one forward pass scores all of them apart.

    Args:
        input_ids: `(B, L)` texts without `sop`.
        config: Holds the special token ids.
        padding_mask: `(B, L)`, 1 or True on tokens.
        position_ids: `(B, L)` positions of the texts; tokens are counted by default.

    Returns:
        `input_ids` `(B, T)` with the appended columns, `attention_mask` `(B, 1, T, T)` bool, `position_ids` `(B, T)`,
        and `source` `(B, L)`: the column whose output belongs to each input token, a `sop` for a `[MASK]`.
    """
    batch, length = input_ids.shape
    is_token = torch.ones_like(input_ids, dtype=torch.bool) if padding_mask is None else padding_mask.bool()
    if position_ids is None:
        position_ids = (is_token.long().cumsum(1) - 1).clamp(min=0)
    position_ids = position_ids.expand(batch, length)
    is_mask = (input_ids == config.mask_token_id) & is_token
    rank = is_mask.long().cumsum(1) - 1  # (B, L) which blank a [MASK] is
    source = torch.arange(length, device=input_ids.device).expand(batch, length)
    num_blanks = int(is_mask.sum(1).max())
    if num_blanks == 0:
        return input_ids, is_token[:, None, None].expand(-1, 1, length, -1), position_ids, source

    last = torch.where(is_token, source, 0).amax(1, keepdim=True)  # (B, 1) column of the last token
    needs_eos = ~torch.isin(
        input_ids.gather(1, last), input_ids.new_tensor([*mask_token_ids(config), config.eos_token_id])
    )
    needs_eos &= is_mask.any(1, keepdim=True)
    blank_positions = position_ids.new_zeros(batch, num_blanks + 1).scatter(
        1, torch.where(is_mask, rank, num_blanks), torch.where(is_mask, position_ids, 0)
    )[:, :num_blanks]
    eos = input_ids.new_full((batch, 1), config.eos_token_id)
    sops = input_ids.new_full((batch, num_blanks), config.sop_token_id)
    eos_position = position_ids.gather(1, last) + 1
    ids = torch.cat((input_ids, eos, sops), dim=1)
    positions = torch.cat((position_ids, eos_position, blank_positions), dim=1)
    in_context = torch.cat((is_token, needs_eos, torch.zeros_like(sops, dtype=torch.bool)), dim=1)
    itself = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
    visible = in_context[:, None, None] | itself
    return ids, visible, positions, torch.where(is_mask, length + 1 + rank, source)


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts that hold `sop` and end in a token."""

    input_ids: torch.Tensor
    """`(B, W)`."""
    attention_mask: torch.Tensor
    """`(B, W)`, 1 on tokens."""
    added: torch.Tensor
    """`(B, W - L)` what was added to each row, padded on the left."""
    columns: torch.Tensor | None
    """`(B, W)` where each column stood before rows were moved; None if none was."""


def complete_prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: GLMConfig) -> Prompts:
    """
    Complete every row without `sop` to a context with `sop` behind, by the rule of `prepare_context`.

    Args:
        input_ids: `(B, L)`, padded on any side.
        attention_mask: `(B, L)`, 1 or True on tokens; by default every token is one but the pad token.
        config: Holds the special ids.

    Raises:
        ValueError: If a row is empty or cannot be completed, or the mask is not of the shape of the ids.
    """
    rows = unpad(input_ids, attention_mask, config.pad_token_id)
    if not all(rows):
        raise ValueError("a prompt is empty; give at least one token besides padding")
    is_token = (input_ids != config.pad_token_id if attention_mask is None else attention_mask).long()
    behind = [[] if config.sop_token_id in row else added_tokens(row, config) for row in rows]
    added, is_added = (part.to(input_ids.device) for part in pad_left(behind, config.pad_token_id))
    ids, mask = torch.cat((input_ids, added), dim=1), torch.cat((is_token, is_added), dim=1)  # (B, W)
    num_behind = mask.flip(1).argmax(1)  # padding behind the last token of each row
    if not num_behind.any():
        return Prompts(ids, mask, added, None)
    columns = (torch.arange(ids.shape[1], device=ids.device) - num_behind[:, None]) % ids.shape[1]
    return Prompts(ids.gather(1, columns), mask.gather(1, columns), added, columns)


def added_tokens(row: Sequence[int], config: GLMConfig) -> list[int]:
    """Return what completes a text to a prompt: a mask if it has none, `</s>` where it belongs, `sop`."""
    return [*prepare_context(row, config), config.sop_token_id][len(row) :]


def needs_completion(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: GLMConfig) -> bool:
    """Tell whether a row `(B, L)` has no `sop`, or is padded on the right."""
    has_sop = (input_ids == config.sop_token_id).any(1)
    last = input_ids[:, -1] != config.pad_token_id if attention_mask is None else attention_mask[:, -1].bool()
    return not bool((has_sop & last).all())


def complete_embeddings(
    inputs_embeds: torch.Tensor, prompts: Prompts, embed_tokens: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the embeddings `(B, W, D)` of completed prompts, given those `(B, L, D)` of what they were made from."""
    embeds = torch.cat((inputs_embeds, embed_tokens(prompts.added).to(inputs_embeds)), dim=1)
    return embeds if prompts.columns is None else embeds.take_along_dim(prompts.columns[..., None], dim=1)


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and padding mask `(B, L)` of rows of any lengths."""
    length = max(map(len, rows), default=0)
    padded = [[pad_token_id] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(padded, dtype=torch.long), torch.tensor(mask, dtype=torch.long)


def unpad(
    input_ids: torch.Tensor | Iterable[Sequence[int]], attention_mask: torch.Tensor | None, pad_token_id: int
) -> list[list[int]]:
    """Return the texts of a batch as id lists without padding."""
    if isinstance(input_ids, torch.Tensor):
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be 2D (batch, length), got {tuple(input_ids.shape)}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must be of the shape of input_ids {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}"
            )
        kept = input_ids != pad_token_id if attention_mask is None else attention_mask
        return [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, kept, strict=True)]
    if attention_mask is not None:
        raise ValueError("attention_mask belongs to a padded tensor; lists of ids have no padding")
    return [list(ids) for ids in input_ids]


def suppress_blanks(generate_kwargs: dict[str, Any], config: GLMConfig) -> dict[str, Any]:
    """Add masks and `sop` to the tokens that `generate` suppresses, since they would start blanks of their own."""
    suppressed = {*mask_token_ids(config), config.sop_token_id, *(generate_kwargs.get("suppress_tokens") or ())}
    return {**generate_kwargs, "suppress_tokens": sorted(suppressed)}
