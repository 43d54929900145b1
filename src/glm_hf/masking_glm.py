"""What every token sees and where it stands: the infilling layout in the form that attention implementations take.

Shapes: `B` batch, `L` new tokens, `S` all tokens with those in the cache, `D` hidden.
"""

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils.import_utils import is_tracing

from .configuration_glm import GLMConfig
from .infilling_glm import infilling_layout

Mask = torch.Tensor | BlockMask | None


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
        input_ids: `(B, L)`; without them nothing is known of the context and the tokens are causal.
        inputs_embeds: `(B, L, D)`, for sizes, dtype and device.
        attention_mask: `(B, S)` padding mask, or a mask ready made, which wins over the derived one.
        position_ids: `(B, L)`, which win over the derived ones.
        past_key_values: Cache; once it holds tokens, the new ones are causal.
        segment_ids: `(B, L)` number of each token's packed sample.

    Returns:
        Mask in the form of the attention implementation, `position_ids`, and the `context_length` that all rows share
        if the mask was reduced to the rows behind it.

    Raises:
        ValueError: If `segment_ids` come together with an `attention_mask` or a filled cache, or a context, without
            positions, with a filled cache.
    """
    is_ready = attention_mask is not None and not is_padding_mask(attention_mask)
    if is_ready and position_ids is not None:
        return expand_mask(attention_mask, config, inputs_embeds.dtype), position_ids, None
    past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
    if segment_ids is not None and (attention_mask is not None or past_length):
        raise ValueError(
            "segment_ids mark padding and hold whole samples: leave out attention_mask and past_key_values"
        )

    length = inputs_embeds.shape[1]
    in_context = None
    if past_length:
        if position_ids is None and brings_context(input_ids, config):
            raise ValueError(
                "tokens of a context came with a filled cache, whose tokens would not see them; pass position_ids "
                "and a 4D attention_mask to say what they see"
            )
        derived = continued_positions(attention_mask, length, past_length, inputs_embeds.device)
    else:
        if input_ids is None:
            input_ids = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
        padding = attention_mask[:, -length:] if is_padding_mask(attention_mask) else None
        derived, in_context = infilling_layout(input_ids, config, padding if segment_ids is None else segment_ids)
    position_ids = derived if position_ids is None else position_ids
    if is_ready:
        return expand_mask(attention_mask, config, inputs_embeds.dtype), position_ids, None

    if in_context is not None and segment_ids is None:
        context_length = shared_context_length(in_context, attention_mask, config)
        if context_length:
            return rows_behind_context(context_length, inputs_embeds, past_key_values), position_ids, context_length
        if context_length == 0:
            in_context = None
    blocks = None
    if in_context is not None:
        blocks = torch.where(in_context, 0 if segment_ids is None else segment_ids, -1)
    mask = create_causal_mask(
        config,
        inputs_embeds,
        attention_mask,
        past_key_values,
        and_mask_function=None if segment_ids is None else same_segment(segment_ids),
        block_sequence_ids=blocks,
    )
    return mask, position_ids, None


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


def same_segment(segment_ids: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Return the mask function that keeps packed samples `(B, L)` apart."""
    return lambda batch, head, query, key: segment_ids[batch, query] == segment_ids[batch, key]
