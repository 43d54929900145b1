"""The blank-infilling layout: one rule from token ids to positions and to the two-way context.

A sample is a context, `sop`, and the content of its blanks, each blank after a `sop` of its own:

    The capital of France is [MASK] . </s> sop Paris eop
    \\_________________ context _________/ \\_ causal __/
    0    1       2  3      4  5      6 7   5   5     5     position_ids

Everything before the first `sop` is the context, whose tokens see each other; `sop` and what follows is causal and
sees the whole context. Positions count up; after `sop` they stay at the mask if the context holds a `[MASK]` or
`[sMASK]`, and count on if it ends in `[gMASK]`. A sample without `sop` is causal throughout.

Shapes: `B` batch, `L` length. Source: GLM-130B (arXiv 2210.02414), section 2.1.
"""

from collections.abc import Sequence

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
