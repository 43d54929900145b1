"""Where tokens stand: positions that callers give, plain counts instead of them, and steps behind a cache.

Behind a `[MASK]` every token of a blank has the position of the mask, which the new tokens alone do not tell. So a
forward pass over whole samples notes on the cache where each row's blank stands, and whoever steps the model next
stays at the right positions. Rows may be repeated, chosen or reordered afterwards, as beam and contrastive search do:
where blanks differ, a row is recognized by the first layer's keys of `sop` and the last token of its context, which
depend on nothing but these tokens and their positions.

Shapes: `B` batch, `R` rows when the cache was filled, `L` new tokens, `S` all tokens with those in the cache,
`D` hidden, `H` heads, `k` features of a key.
"""

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from .configuration_glm import GLMConfig
from .infilling_glm import infilling_layout, mask_token_ids

Mask = torch.Tensor | BlockMask | None
PACKING_ARGUMENTS = ("cu_seq_lens_q", "seq_idx")  # of flash attention
CAUSAL_ROWS = (
    "rows without sop are trained on and read causally, not as GLM reads; lay rows out as context, sop, answer and "
    "eop, by DataCollatorForBlankInfilling, or by glm_hf.training.to_conversation and the tokenizer's chat template"
)
JOINED_ROWS = (
    "rows hold another sample behind an eop, and both are read together; pass segment_ids, or position_ids that start "
    "again, as TRL does with padding_free or packing_strategy='bfd'"
)
LABELLED_CONTEXT = (
    "labels stand on the context, whose tokens see what they are to predict; set them to -100 up to sop, inclusive"
)

logger = logging.get_logger(__name__)


def step_positions(
    config: GLMConfig,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    attention_mask: Mask,
    position_ids: torch.Tensor | None,
    past_key_values: Cache,
) -> torch.Tensor:
    """Return positions `(B, L)` of tokens behind a filled cache: those given, unless they are plain counts."""
    batch, length, _ = inputs_embeds.shape
    counted = continued_positions(attention_mask, length, past_key_values.get_seq_length(), inputs_embeds.device)
    counted = counted.expand(batch, length)
    if position_ids is None:
        if brings_context(input_ids, config):
            raise ValueError(
                "tokens of a context came with a filled cache, whose tokens would not see them; pass position_ids "
                "and a 4D attention_mask to say what they see"
            )
    elif not can_recall(past_key_values) or is_tracing(position_ids):
        return position_ids
    frozen = recall_frozen(past_key_values, input_ids, batch, config)[:, None].to(counted.device)
    own = torch.where(frozen >= 0, frozen, counted)
    if position_ids is None:
        return own
    return torch.where((position_ids == counted).all(1, keepdim=True), own, position_ids)


def read_positions(
    position_ids: torch.Tensor, input_ids: torch.Tensor, padding: torch.Tensor | None, config: GLMConfig
) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """
    Tell what is meant by positions `(B, L)` of whole rows that a caller gives.

    Libraries written for causal models pass plain counts, which begin anew with every packed sample. Such a count is
    no position of a blank: GLM's own positions take its place, in each of the samples that it delimits.

    Args:
        position_ids: Positions as the caller gives them.
        input_ids: `(B, L)`.
        padding: `(B, L)`, 1 or True on tokens.
        config: Holds the special ids.

    Returns:
        Positions to use; `segment_ids` `(B, L)` if rows are packed; whether all rows have the positions of their
        layout.

    Raises:
        ValueError: If positions start again within a row, but are not plain counts.
    """
    is_token = torch.ones_like(input_ids, dtype=torch.bool) if padding is None else padding.bool()
    derived = infilling_layout(input_ids, config, padding)[0]
    index = is_token.long().cumsum(1) - 1
    is_start = is_token & ((position_ids == 0) | (index == 0))
    since_start = index - index.masked_fill(~is_start, 0).cummax(1).values
    is_counted = ((position_ids == since_start) | ~is_token).all(1, keepdim=True)
    is_derived = ((position_ids == derived) | ~is_token).all(1, keepdim=True)
    is_replaced = is_counted & ~is_derived
    segment_ids = torch.where(is_replaced, is_start.long().cumsum(1), 1) * is_token
    before = nn.functional.pad(position_ids, (1, 0))[:, :-1]
    starts_again = is_start & (index > 0) & (before != 0) & (input_ids != config.sop_token_id)
    is_unclear = (starts_again & ~is_counted & ~is_derived).any()
    if not (is_tracing(input_ids) or input_ids.is_meta):
        unclear, num_segments, num_rows, fits = torch.stack(
            (is_unclear.long(), segment_ids.amax(), is_replaced.sum(), (is_replaced | is_derived).all().long())
        ).tolist()
        if unclear:
            raise ValueError(
                "position_ids start again within a row, as those of packed samples do, but are no plain counts; pass "
                "segment_ids to keep samples apart"
            )
        if not num_rows:
            return position_ids, None, bool(fits)
        if num_segments == 1:
            return torch.where(is_replaced, derived, position_ids), None, bool(fits)
    return (
        torch.where(is_replaced, infilling_layout(input_ids, config, segment_ids)[0], position_ids),
        segment_ids,
        False,
    )


def continued_positions(
    attention_mask: Mask, length: int, past_length: int | torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Return `(B or 1, L)` positions that count on from a filled cache; padding is not counted."""
    if is_padding_mask(attention_mask):
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
    return torch.arange(length, device=device)[None] + past_length


def brings_context(input_ids: torch.Tensor | None, config: GLMConfig) -> bool:
    """Tell whether several new tokens `(B, L)` hold a `sop` behind others, as they do when a context is added."""
    if input_ids is None or input_ids.shape[1] == 1 or is_tracing(input_ids) or input_ids.is_meta:
        return False
    return bool((input_ids[:, 1:] == config.sop_token_id).any())


def is_padding_mask(attention_mask: Mask) -> TypeGuard[torch.Tensor]:
    """Tell whether a mask is `(B, S)` and so marks padding only."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


def require_known_packing(
    arguments: dict[str, Any], position_ids: torch.Tensor | None, segment_ids: torch.Tensor | None
) -> None:
    """Raise ValueError if samples are packed by the arguments of flash attention alone, which nothing here reads."""
    marks = [name for name in PACKING_ARGUMENTS if arguments.get(name) is not None]
    if marks and position_ids is None and segment_ids is None:
        raise ValueError(f"{marks[0]} does not keep packed samples apart here; pass segment_ids or position_ids")


def warn_of_trained_rows(input_ids: torch.Tensor | None, config: GLMConfig, gives_positions: bool) -> None:
    """
    Warn once of rows `(B, L)` that are not trained on as GLM is.

    Those are rows without `sop`, and without positions that may tell samples apart, rows that continue with another
    sample behind an `eop`.
    """
    if input_ids is None or is_tracing(input_ids) or input_ids.is_meta:
        return
    is_sop, is_eop = input_ids == config.sop_token_id, input_ids == config.eop_token_id
    is_mask = torch.isin(input_ids, input_ids.new_tensor(mask_token_ids(config)))
    is_behind_eop = is_eop.cumsum(1) > 0
    is_joined = is_behind_eop & (is_mask | (is_sop & (is_sop.cumsum(1) == 1)))
    has_joined, all_have_sop = torch.stack((is_joined.any(), is_sop.any(1).all())).tolist()
    if has_joined and not gives_positions:
        logger.warning_once(JOINED_ROWS)
    if not all_have_sop:
        logger.warning_once(CAUSAL_ROWS)


def warn_of_labelled_context(
    input_ids: torch.Tensor | None, labels: torch.Tensor | None, segment_ids: torch.Tensor | None, config: GLMConfig
) -> None:
    """Warn once of labels `(B, L)`, aligned with the ids, on tokens of the context or `sop`."""
    if input_ids is None or labels is None or is_tracing(input_ids) or input_ids.is_meta:
        return
    if labels.shape == input_ids.shape and segment_ids is None:
        is_sop = input_ids == config.sop_token_id
        in_context = infilling_layout(input_ids, config)[1] | (is_sop & (is_sop.cumsum(1) == 1))
        if (in_context & (labels != -100)).any():
            logger.warning_once(LABELLED_CONTEXT)


NUM_FEATURES = 8  # of the keys of every head, by which rows are recognized

FOREIGN_CACHE = (
    "the cache does not tell where its blanks stand, since it was not filled by whole samples without positions of "
    "their own; pass position_ids, or fill a cache by one forward pass over everything up to sop"
)


@dataclass(frozen=True)
class CachedLayout:
    """Where the blanks of the rows in a cache stand."""

    frozen: torch.Tensor
    """`(R,)` position at which new tokens stay, -1 where positions count on."""
    columns: torch.Tensor
    """`(R, 2)` columns of the last context token and of `sop`, or of the last tokens of a row without it."""
    keys: torch.Tensor | None
    """`(R, H, 2, k)` in these columns, None where all rows are alike or keys cannot be read."""
    last_sop: int
    """Column of the last row's `sop`, -1 if any row has none; 0 while a graph is traced."""


def remember_layout(
    cache: Cache,
    input_ids: torch.Tensor | None,
    position_ids: torch.Tensor,
    in_context: torch.Tensor | None,
    config: GLMConfig,
) -> None:
    """
    Note the layout of the samples that have just filled a cache, or that it is unknown.

    Args:
        cache: The cache; a learned prefix may stand in front.
        input_ids: `(B, L)`; None for embeddings without `sop`.
        position_ids: `(B, L)` that were used.
        in_context: `(B, L)` whether a token belongs to the context; None where positions are not those of the layout.
        config: Holds the special ids.
    """
    if in_context is None:
        cache.glm_layout = None
        return
    position_ids = position_ids.expand_as(in_context)
    input_ids = torch.full_like(position_ids, -1) if input_ids is None else input_ids
    is_sop = input_ids == config.sop_token_id
    has_sop = is_sop.any(1)
    column = torch.where(has_sop, is_sop.int().argmax(1), input_ids.shape[1] - 1)  # (B,)
    at_sop = position_ids.gather(1, column[:, None]).squeeze(1)
    context_end = position_ids.masked_fill(~in_context, -1).amax(1)
    frozen = torch.where(has_sop & (at_sop <= context_end), at_sop, -1)
    index = torch.arange(input_ids.shape[1], device=input_ids.device)
    context_column = torch.where(in_context, index, -1).amax(1)  # (B,) of the last token of the context
    context_column = torch.where(context_column < 0, column, context_column)
    columns = torch.stack((context_column, column), dim=1) + getattr(cache, "prefix_length", 0)
    keys, last_sop = None, 0
    if not (is_tracing(input_ids) or input_ids.is_meta):
        lowest, highest, last, all_have = torch.stack(
            (frozen.amin(), frozen.amax(), columns.amax(), has_sop.all().long())
        ).tolist()
        last_sop = last if all_have else -1
        if lowest == highest:
            frozen = frozen[:1]
        elif (stored := keys_of_first_layer(cache, last)) is not None:
            keys = stored.take_along_dim(columns[:, None, :, None].to(stored.device), dim=2).clone()  # (R, H, 2, k)
    cache.glm_layout = CachedLayout(frozen, columns, keys, last_sop)


def is_filled(cache: Cache) -> bool:
    """
    Tell whether a cache holds more than a learned prefix.

    A graph that is traced cannot look into a cache of fixed size. There, one that was ever filled by the model is
    taken to be filled, and any other to be empty; the graph checks it when it runs.
    """
    past_length, prefix_length = cache.get_seq_length(), getattr(cache, "prefix_length", 0)
    if not isinstance(past_length, torch.Tensor) or not is_tracing(past_length):
        return bool(past_length != prefix_length)
    was_filled = hasattr(cache, "glm_layout")
    is_as_traced = (past_length != prefix_length) == was_filled
    torch._assert_async(
        is_as_traced, "a cache was emptied, or filled by others, behind a compiled model: make it anew"
    )
    return was_filled


def recall_frozen(cache: Cache, input_ids: torch.Tensor | None, batch_size: int, config: GLMConfig) -> torch.Tensor:
    """
    Return `(B,)` positions at which new tokens behind a filled cache stay, -1 where positions count on.

    Raises:
        ValueError: If the cache does not tell, was cropped within a context, or holds a text that was read without the
            `sop` that comes now.
    """
    layout: CachedLayout | None = getattr(cache, "glm_layout", None)
    if layout is None:
        raise ValueError(FOREIGN_CACHE)
    is_traced = is_tracing(layout.frozen) or layout.frozen.is_meta
    if not is_traced and layout.last_sop >= 0 and int(cache.get_seq_length()) < layout.last_sop:
        raise ValueError(
            "the cache was cropped within its context, whose rest would not be seen both ways; fill it anew"
        )
    if not is_traced and layout.last_sop < 0 and input_ids is not None and has_sop_in(input_ids, config):
        raise ValueError("the cache holds a context that was read causally, without its sop; read both in one pass")
    if len(layout.frozen) == 1:
        return layout.frozen.expand(batch_size)
    if layout.keys is None and not is_traced:
        raise ValueError(
            "rows of this kind of cache, whose blanks stand at different places, cannot be told apart; pass "
            "position_ids, or use a DynamicCache or a StaticCache"
        )
    if layout.keys is None:
        return layout.frozen
    return layout.frozen[rows_in_cache(cache, layout)]


def can_recall(cache: Cache) -> bool:
    """Tell whether a cache knows where the blank of each row stands, in whatever order its rows are."""
    layout = getattr(cache, "glm_layout", None)
    return layout is not None and (len(layout.frozen) == 1 or layout.keys is not None)


def knows_positions(cache: Cache | None) -> bool:
    """Tell whether a cache that grows holds rows that are all alike, so that new tokens need no look at all ids."""
    layout = getattr(cache, "glm_layout", None)
    if cache is None or layout is None or len(layout.frozen) > 1 or cache.is_compileable:
        return False
    return bool(cache.get_seq_length() > 0)


def rows_in_cache(cache: Cache, layout: CachedLayout) -> torch.Tensor:
    """Return `(B,)` which of the rows that have filled a cache each of its rows is; ValueError if none."""
    keys = keys_of_first_layer(cache, 0)
    assert keys is not None, "keys that were read once can be read again"
    assert layout.keys is not None, "only rows whose keys are known are looked for"
    now = keys[:, :, layout.columns.to(keys.device)].transpose(1, 2)  # (B, R, H, 2, k)
    is_found = (now == layout.keys).flatten(2).all(2).to(layout.frozen.device)  # (B, R)
    frozen = layout.frozen.expand_as(is_found)
    lowest = frozen.masked_fill(~is_found, torch.iinfo(frozen.dtype).max).amin(1)
    highest = frozen.masked_fill(~is_found, -2).amax(1)
    if not (lowest == highest).all():
        raise ValueError(FOREIGN_CACHE)
    return is_found.int().argmax(1)


def has_sop_in(input_ids: torch.Tensor, config: GLMConfig) -> bool:
    """Tell whether any of the ids is `sop`."""
    return bool((input_ids == config.sop_token_id).any())


def keys_of_first_layer(cache: Cache, column: int) -> torch.Tensor | None:
    """Return the first `k` features of the first layer's keys `(B, H, S, k)`; None where `column` cannot be read."""
    keys = getattr(cache.layers[0], "keys", None)
    if not isinstance(keys, torch.Tensor) or keys.ndim != 4 or keys.shape[2] <= column:
        return None
    return keys[..., :NUM_FEATURES]


def kept_states(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Return the states `(B, L, D)` of the last so many tokens, of given ones, or `(tokens, D)` of those in a mask."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]  # all for 0
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)
    return hidden_states[:, logits_to_keep]
