"""What every token sees and where it stands: the infilling layout in the form that attention implementations take.

A cache may begin with a learned prefix (`PrefixCache`), which all tokens see. It takes up the first positions, as for
other rotary models in PEFT: with `P` learned tokens, the text and its frozen masks stand `P` further right.

Shapes: `B` batch, `L` new tokens, `P` learned prefix, `S` all tokens with those in the cache, `D` hidden.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from .configuration_glm import GLMConfig
from .infilling_glm import infilling_layout
from .positions_glm import Mask, is_filled, is_padding_mask, read_positions, step_positions

logger = logging.get_logger(__name__)


class InfillingAttention(NamedTuple):
    """What the layers of a model need to know of their tokens."""

    mask: Mask
    """In the form of the attention implementation, None where nothing is hidden but the future."""
    position_ids: torch.Tensor
    """`(B, L)`."""
    context_length: int | None = None
    """Length of the context that all rows share, if the mask was reduced to the rows behind it."""
    fills_cache: bool = False
    """Whether the tokens are whole samples, which come first in a cache."""
    in_context: torch.Tensor | None = None
    """`(B, L)` of whole samples, one a row, at the positions of their layout."""


def infilling_attention(
    config: GLMConfig,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    attention_mask: Mask,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    segment_ids: torch.Tensor | None,
) -> InfillingAttention:
    """
    Turn the arguments of `GLMModel.forward` into those of its layers.

    Args:
        config: Special ids and attention implementation.
        input_ids: `(B, L)`, or what `layout_ids` found; without them the tokens are causal.
        inputs_embeds: `(B, L, D)`, for sizes, dtype and device.
        attention_mask: `(B, S)` padding mask, or a mask ready made, which wins over the derived one.
        position_ids: `(B, L)`, which win over the derived ones unless they are plain counts (`read_positions`).
        past_key_values: Cache; once it holds more than a learned prefix, the new tokens are causal.
        segment_ids: `(B, L)` number of each token's packed sample.

    Raises:
        ValueError: If `segment_ids` come together with an `attention_mask` or a filled cache or are not as many as the
            tokens, or a context, without positions, with a filled cache, or embeddings whose context is unknown are
            trained on, or the cache does not tell where new tokens stand.
    """
    is_ready = attention_mask is not None and not is_padding_mask(attention_mask)
    if is_ready and position_ids is not None:
        return InfillingAttention(expand_mask(attention_mask, config, inputs_embeds.dtype), position_ids)
    prefix_length = getattr(past_key_values, "prefix_length", 0)
    is_continued = past_key_values is not None and is_filled(past_key_values)
    require_fitting_segments(segment_ids, attention_mask, inputs_embeds, is_continued)
    if is_continued:
        assert past_key_values is not None
        position_ids = step_positions(config, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values)
        if is_ready:
            return InfillingAttention(expand_mask(attention_mask, config, inputs_embeds.dtype), position_ids)
        return InfillingAttention(make_mask(config, inputs_embeds, attention_mask, past_key_values), position_ids)

    if input_ids is None:
        input_ids = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
        require_no_training(inputs_embeds)
    padding = attention_mask[:, -input_ids.shape[1] :] if is_padding_mask(attention_mask) else None
    is_derived = True
    if position_ids is not None and segment_ids is None:
        position_ids, segment_ids, is_derived = read_positions(
            position_ids.expand_as(input_ids) - prefix_length, input_ids, padding, config
        )
        position_ids = position_ids + prefix_length
        attention_mask = attention_mask if segment_ids is None else None  # these mark padding, too
    derived, in_context = infilling_layout(input_ids, config, padding if segment_ids is None else segment_ids)
    position_ids = derived + prefix_length if position_ids is None else position_ids
    context_length = None
    if is_ready:
        mask = expand_mask(attention_mask, config, inputs_embeds.dtype)
    else:
        if segment_ids is None and not prefix_length:
            context_length = shared_context_length(in_context, attention_mask, config)
        if context_length:
            mask = rows_behind_context(context_length, inputs_embeds, past_key_values)
        elif context_length == 0:
            mask = make_mask(config, inputs_embeds, attention_mask, past_key_values)
        else:
            mask = sample_mask(config, inputs_embeds, attention_mask, past_key_values, in_context, segment_ids)
    is_known = is_derived and segment_ids is None
    return InfillingAttention(mask, position_ids, context_length or None, True, in_context if is_known else None)


def require_fitting_segments(
    segment_ids: torch.Tensor | None, attention_mask: Mask, inputs_embeds: torch.Tensor, is_continued: bool
) -> None:
    """Raise ValueError unless numbers of packed samples cover the tokens, and nothing else does."""
    if segment_ids is None:
        return
    if attention_mask is not None or is_continued:
        raise ValueError(
            "segment_ids mark padding and hold whole samples: leave out attention_mask and past_key_values"
        )
    if segment_ids.shape[1] != (length := inputs_embeds.shape[1]):
        raise ValueError(
            f"segment_ids must number each of the {length} tokens of a row, got {segment_ids.shape[1]}; learned "
            "tokens in front of packed samples would belong to none of them: use prefix tuning or LoRA instead"
        )


def sample_mask(
    config: GLMConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: Mask,
    past_key_values: Cache | None,
    in_context: torch.Tensor,
    segment_ids: torch.Tensor | None,
) -> Mask:
    """Return the mask of whole samples with contexts `(B, L)`, packed or one a row."""
    prefix_length = getattr(past_key_values, "prefix_length", 0)
    if segment_ids is not None and config._attn_implementation != "flex_attention":
        return expand_mask(packed_mask(segment_ids, in_context, prefix_length), config, inputs_embeds.dtype)
    blocks = torch.where(in_context, 0 if segment_ids is None else segment_ids, -1)
    return make_mask(
        config,
        inputs_embeds,
        attention_mask,
        past_key_values,
        and_mask_function=None if segment_ids is None else same_segment(segment_ids, prefix_length),
        block_sequence_ids=nn.functional.pad(blocks, (prefix_length, 0), value=-1),  # (B, P + L)
    )


def make_mask(
    config: GLMConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: Mask,
    past_key_values: Cache | None,
    block_sequence_ids: torch.Tensor | None = None,
    **options: Any,
) -> Mask:
    """
    Return a causal mask in which blocks see themselves, in the form of the attention implementation.

    A function of the user's that is registered without one for its masks gets an additive mask, which all know.

    Raises:
        ValueError: If the implementation's masks, as those of flash attention, cannot hold two-way contexts.
    """
    name = config._attn_implementation
    if name not in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping:
        config = copy.copy(config)
        config._attn_implementation = "eager"
    mask = create_causal_mask(
        config, inputs_embeds, attention_mask, past_key_values, block_sequence_ids=block_sequence_ids, **options
    )
    is_dense = isinstance(mask, BlockMask) or (isinstance(mask, torch.Tensor) and mask.ndim == 4)
    if block_sequence_ids is not None and not is_dense:
        raise ValueError(
            f"the attention implementation {name!r} makes masks that would drop the two-way context; use sdpa, eager "
            "or flex_attention, or register a mask function for it that returns 4D masks"
        )
    return mask


def packed_mask(segment_ids: torch.Tensor, in_context: torch.Tensor, prefix_length: int) -> torch.Tensor:
    """
    Return which tokens of packed samples see which, `(B, 1, L, P + L)`, many times faster than by mask functions.

    Args:
        segment_ids: `(B, L)` number of each token's sample.
        in_context: `(B, L)` whether a token belongs to the context of its sample.
        prefix_length: Learned tokens `P` in front, which all see.
    """
    length = segment_ids.shape[1]
    visible = in_context[:, :, None] & in_context[:, None]
    visible |= torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    visible &= segment_ids[:, :, None] == segment_ids[:, None]
    return nn.functional.pad(visible, (prefix_length, 0), value=True)[:, None]


def expand_mask(attention_mask: Mask, config: GLMConfig, dtype: torch.dtype) -> Mask:
    """Bring a ready mask `(B or 1, 1, L, S)`, 1 or True on what is seen, into the form the implementation takes."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.is_floating_point():
        return attention_mask
    visible = attention_mask.bool()
    if config._attn_implementation == "sdpa":
        return visible
    if config._attn_implementation == "flex_attention":
        batch, _, length, kv_length = visible.shape
        return create_block_mask(
            lambda row, head, query, key: visible[row, 0, query, key], batch, None, length, kv_length, visible.device
        )
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def shared_context_length(in_context: torch.Tensor, padding: Mask, config: GLMConfig) -> int | None:
    """
    Return the length of the context `(B, L)` if all rows agree on it and none is padded, else None.

    Only sdpa profits: context rows then need no mask, which keeps its fused kernels. Reading the lengths waits for the
    device once, so nothing is read while a graph is traced.
    """
    if config._attn_implementation != "sdpa" or is_tracing(in_context) or in_context.is_meta:
        return None
    lengths = in_context.sum(1)
    is_padded = (padding == 0).any().long() if isinstance(padding, torch.Tensor) else torch.zeros_like(lengths[0])
    shortest, longest, padded = torch.stack((lengths.min(), lengths.max(), is_padded)).tolist()
    return shortest if shortest == longest and not padded else None


def rows_behind_context(context_length: int, inputs_embeds: torch.Tensor, past_key_values: Cache | None) -> Mask:
    """Return the mask `(1, 1, L - context_length, S)` of the tokens behind the context, None for one that sees all."""
    length = inputs_embeds.shape[1]
    kv_length = past_key_values.get_mask_sizes(length, 0)[0] if past_key_values is not None else length
    if length - context_length == 1 and kv_length == length:
        return None
    visible = torch.ones(length - context_length, kv_length, dtype=torch.bool, device=inputs_embeds.device)
    return visible.tril(context_length)[None, None]


def same_segment(segment_ids: torch.Tensor, prefix_length: int) -> Callable[..., torch.Tensor]:
    """Return the mask function that keeps packed samples `(B, L)` apart, behind a prefix that all of them see."""
    segments = nn.functional.pad(segment_ids, (prefix_length, 0))  # (B, P + L)
    return lambda batch, head, query, key: (segments[batch, query] == segments[batch, key]) | (key < prefix_length)


def layout_ids(inputs_embeds: torch.Tensor, embed_tokens: nn.Module, config: GLMConfig) -> torch.Tensor | None:
    """
    Find the tokens that shape a sample among embeddings `(B, L, D)`: `sop` and the masks of short blanks.

    Learned tokens in front of a text (prompt tuning, P-tuning) equal no row of the embedding and thus belong to the
    context; one that was made as a copy of such a row, and not trained since, counts as its token.

    Returns:
        Ids `(B, L)`, -1 for every other token, or None if there is no `sop`, which leaves the context unknown.
    """
    special_ids = (config.mask_token_id, config.smask_token_id, config.sop_token_id)
    ids = find_tokens(inputs_embeds, embed_tokens, special_ids)
    if is_tracing(ids) or ids.is_meta or bool((ids == config.sop_token_id).any()):
        return ids
    return None


@torch.no_grad()
def find_tokens(inputs_embeds: torch.Tensor, embed_tokens: nn.Module, token_ids: Sequence[int]) -> torch.Tensor:
    """Return ids `(B, L)` of embeddings that equal a token's row, to the last bit, and -1 elsewhere."""
    rows = embed_tokens(torch.tensor(token_ids, device=inputs_embeds.device)).to(inputs_embeds)
    ids = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
    for token_id, row in zip(token_ids, rows, strict=True):
        ids.masked_fill_((inputs_embeds == row).all(2), token_id)
    return ids


def require_no_training(inputs_embeds: torch.Tensor) -> None:
    """Warn that embeddings without `sop` are read causally; raise ValueError if a gradient is to flow through them."""
    if torch.is_grad_enabled() and inputs_embeds.requires_grad:
        raise ValueError(
            "no row of inputs_embeds is the embedding of sop, so their context is unknown (noise on embeddings, as of "
            "NEFTune, hides it); pass input_ids, or position_ids and a 4D attention_mask. With PEFT, embed without "
            "noise, or use prefix tuning or LoRA"
        )
    logger.warning_once("inputs_embeds hold no embedding of sop and are read causally; end their context in one")
