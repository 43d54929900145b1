"""What every token sees and where it stands: the infilling layout in the form that attention implementations take.

A cache may begin with a learned prefix (`PrefixCache`), which all tokens see. It takes up the first positions, as for
other rotary models in PEFT: with `P` learned tokens, the text and its frozen masks stand `P` further right.

Shapes: `B` batch, `L` new tokens, `P` learned prefix, `S` all tokens with those in the cache, `D` hidden.
"""

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from .configuration_glm import GLMConfig
from .infilling_glm import infilling_layout

Mask = torch.Tensor | BlockMask | None

logger = logging.get_logger(__name__)


def infilling_attention(
    config: GLMConfig,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    attention_mask: Mask,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    segment_ids: torch.Tensor | None,
) -> tuple[Mask, torch.Tensor, int | None]:
    """
    Turn the arguments of `GLMModel.forward` into those of its layers.

    Args:
        config: Special ids and attention implementation.
        input_ids: `(B, L)`, or what `layout_ids` found; without them the tokens are causal.
        inputs_embeds: `(B, L, D)`, for sizes, dtype and device.
        attention_mask: `(B, S)` padding mask, or a mask ready made, which wins over the derived one.
        position_ids: `(B, L)`, which win over the derived ones.
        past_key_values: Cache; once it holds more than a learned prefix, the new tokens are causal.
        segment_ids: `(B, L)` number of each token's packed sample.

    Returns:
        Mask in the form of the attention implementation, `position_ids`, and the `context_length` that all rows share
        if the mask was reduced to the rows behind it.

    Raises:
        ValueError: If `segment_ids` come together with an `attention_mask` or a filled cache or are not as many as the
            tokens, or a context, without positions, with a filled cache, or embeddings whose context is unknown are
            trained on.
    """
    is_ready = attention_mask is not None and not is_padding_mask(attention_mask)
    if is_ready and position_ids is not None:
        return expand_mask(attention_mask, config, inputs_embeds.dtype), position_ids, None
    past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
    prefix_length = getattr(past_key_values, "prefix_length", 0)
    length = inputs_embeds.shape[1]
    if segment_ids is not None and (attention_mask is not None or past_length != prefix_length):
        raise ValueError(
            "segment_ids mark padding and hold whole samples: leave out attention_mask and past_key_values"
        )
    if segment_ids is not None and segment_ids.shape[1] != length:
        raise ValueError(
            f"segment_ids must number each of the {length} tokens of a row, got {segment_ids.shape[1]}; learned "
            "tokens in front of packed samples would belong to none of them: use prefix tuning or LoRA instead"
        )

    in_context = None
    if past_length != prefix_length:
        if position_ids is None and brings_context(input_ids, config):
            raise ValueError(
                "tokens of a context came with a filled cache, whose tokens would not see them; pass position_ids "
                "and a 4D attention_mask to say what they see"
            )
        derived = continued_positions(attention_mask, length, past_length, inputs_embeds.device)
    else:
        if input_ids is None:
            input_ids = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
            require_no_training(inputs_embeds)
        padding = attention_mask[:, -length:] if is_padding_mask(attention_mask) else None
        derived, in_context = infilling_layout(input_ids, config, padding if segment_ids is None else segment_ids)
        derived = derived + prefix_length
    position_ids = derived if position_ids is None else position_ids
    if is_ready:
        return expand_mask(attention_mask, config, inputs_embeds.dtype), position_ids, None

    if in_context is not None and segment_ids is None and not prefix_length:
        context_length = shared_context_length(in_context, attention_mask, config)
        if context_length:
            return rows_behind_context(context_length, inputs_embeds, past_key_values), position_ids, context_length
        if context_length == 0:
            in_context = None
    if segment_ids is not None and in_context is not None and config._attn_implementation != "flex_attention":
        return (
            expand_mask(packed_mask(segment_ids, in_context, prefix_length), config, inputs_embeds.dtype),
            position_ids,
            None,
        )
    blocks = None
    if in_context is not None:
        blocks = torch.where(in_context, 0 if segment_ids is None else segment_ids, -1)
        blocks = nn.functional.pad(blocks, (prefix_length, 0), value=-1)  # (B, P + L)
    mask = create_causal_mask(
        config,
        inputs_embeds,
        attention_mask,
        past_key_values,
        and_mask_function=None if segment_ids is None else same_segment(segment_ids, prefix_length),
        block_sequence_ids=blocks,
    )
    return mask, position_ids, None


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


def brings_context(input_ids: torch.Tensor | None, config: GLMConfig) -> bool:
    """Tell whether several new tokens `(B, L)` hold a `sop` behind others, as they do when a context is added."""
    if input_ids is None or input_ids.shape[1] == 1 or is_tracing(input_ids) or input_ids.is_meta:
        return False
    return bool((input_ids[:, 1:] == config.sop_token_id).any())


def is_padding_mask(attention_mask: Mask) -> TypeGuard[torch.Tensor]:
    """Tell whether a mask is `(B, S)` and so marks padding only."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


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


def continued_positions(
    attention_mask: Mask, length: int, past_length: int | torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Return `(B or 1, L)` positions that count on from a filled cache; padding is not counted."""
    if is_padding_mask(attention_mask):
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
    return torch.arange(length, device=device)[None] + past_length


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


@torch.no_grad()
def layout_ids(inputs_embeds: torch.Tensor, embed_tokens: nn.Module, config: GLMConfig) -> torch.Tensor | None:
    """
    Find the tokens that shape a sample among embeddings `(B, L, D)`: those equal to the row of `sop` or of a mask.

    Embedding looks rows up and so keeps them to the last bit. Learned tokens in front of a text (prompt tuning,
    P-tuning) equal no row and thus belong to the context; one that was made as a copy of such a row, and not trained
    since, counts as its token.

    Returns:
        Ids `(B, L)`, -1 for every other token, or None if there is no `sop`, which leaves the context unknown.
    """
    special_ids = (config.mask_token_id, config.smask_token_id, config.sop_token_id)
    rows = embed_tokens(torch.tensor(special_ids, device=inputs_embeds.device)).to(inputs_embeds)
    ids = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
    for token_id, row in zip(special_ids, rows, strict=True):
        ids.masked_fill_((inputs_embeds == row).all(2), token_id)
    if is_tracing(ids) or ids.is_meta or bool((ids == config.sop_token_id).any()):
        return ids
    return None


def require_no_training(inputs_embeds: torch.Tensor) -> None:
    """Warn that embeddings without `sop` are read causally; raise ValueError if a gradient is to flow through them."""
    if torch.is_grad_enabled() and inputs_embeds.requires_grad:
        raise ValueError(
            "no row of inputs_embeds is the embedding of sop, so their context is unknown (noise on embeddings, as of "
            "NEFTune, hides it); pass input_ids, or position_ids and a 4D attention_mask. With PEFT, embed without "
            "noise, or use prefix tuning or LoRA"
        )
    logger.warning_once("inputs_embeds hold no embedding of sop and are read causally; end their context in one")
