"""What a cache remembers of the samples in it, so that whoever steps the model next stays at the right positions.

Behind a `[MASK]` every token of a blank has the position of the mask, which the new tokens alone do not tell. So a
forward pass over whole samples notes on the cache where each row's blank stands. Rows may be repeated, chosen or
reordered afterwards, as beam and contrastive search do: where blanks differ, a row is recognized by the first layer's
keys of `sop` and the last token of its context, which depend on nothing but these tokens and their positions.

Shapes: `B` rows, `R` rows when the cache was filled, `L` tokens, `H` heads, `k` features of a key.
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.utils.import_utils import is_tracing

from .configuration_glm import GLMConfig

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


def recall_frozen(cache: Cache, input_ids: torch.Tensor | None, batch_size: int, config: GLMConfig) -> torch.Tensor:
    """
    Return `(B,)` positions at which new tokens behind a filled cache stay, -1 where positions count on.

    Raises:
        ValueError: If the cache does not tell, was cut within a context, or holds a text that was read without the
            `sop` that comes now.
    """
    layout: CachedLayout | None = getattr(cache, "glm_layout", None)
    if layout is None:
        raise ValueError(FOREIGN_CACHE)
    is_traced = is_tracing(layout.frozen) or layout.frozen.is_meta
    if not is_traced and layout.last_sop >= 0 and int(cache.get_seq_length()) < layout.last_sop:
        raise ValueError("the cache was cut within its context, whose rest would not be seen both ways; fill it anew")
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
