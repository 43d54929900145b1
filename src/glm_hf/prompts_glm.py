"""Prompts of `generate`: completed to what the model was trained on, and given back in the columns they came in.

    as it comes   The capital of France is [MASK] .            The opposite of hot is
    completed     The capital of France is [MASK] . </s> sop   The opposite of hot is [gMASK] sop

Inside, rows stand in an ordinary batch padded on the left. In what is returned, every prompt keeps its columns: what
follows them is what was added, all of it special tokens, and then the answer.

Shapes: `B` rows, `L` columns as given, `W` columns of the completed batch, `D` hidden.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .configuration_glm import GLMConfig
from .infilling_glm import mask_token_ids, prepare_context


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts that end in `sop`, or hold it."""

    input_ids: torch.Tensor
    """`(B, W)`, padded on the left."""
    attention_mask: torch.Tensor
    """`(B, W)`, 1 on tokens."""
    returned: torch.Tensor
    """`(B, L + added)`: the prompts in their own columns, then padding and what was added to each."""
    is_completed: bool
    """Whether anything was added."""


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
    added = [[] if config.sop_token_id in row else added_tokens(row, config) for row in rows]
    if not all(rows):
        raise ValueError("a prompt is empty; give at least one token besides padding")
    ids, mask = pad_left([[*row, *more] for row, more in zip(rows, added, strict=True)], config.pad_token_id)
    behind, _ = pad_left(added, config.pad_token_id)
    device = input_ids.device
    returned = torch.cat((input_ids, behind.to(input_ids)), dim=1)
    return Prompts(ids.to(device), mask.to(device), returned, is_completed=any(added))


def added_tokens(row: Sequence[int], config: GLMConfig) -> list[int]:
    """Return what completes a text to a prompt: a mask if it has none, `</s>` where it belongs, `sop`."""
    return [*prepare_context(row, config), config.sop_token_id][len(row) :]


def needs_completion(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: GLMConfig) -> bool:
    """Tell whether a row `(B, L)` has no `sop`, or is padded on the right."""
    has_sop = (input_ids == config.sop_token_id).any(1)
    last = input_ids[:, -1] != config.pad_token_id if attention_mask is None else attention_mask[:, -1].bool()
    return not bool((has_sop & last).all())


def place_embeddings(
    inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, prompts: Prompts, embed_tokens: torch.nn.Module
) -> torch.Tensor:
    """Return the embeddings `(B, W, D)` of completed prompts, given those `(B, L, D)` of what they were made from."""
    batch, length, _ = inputs_embeds.shape
    is_token = torch.ones(batch, length) if attention_mask is None else attention_mask
    rows = []
    for embeds, kept, ids, mask in zip(
        inputs_embeds, is_token, prompts.input_ids, prompts.attention_mask, strict=True
    ):
        own = embeds[kept.bool().to(embeds.device)]
        num_before, num_tokens = int((mask == 0).sum()), len(own)
        around = embed_tokens(torch.cat((ids[:num_before], ids[num_before + num_tokens :]))).to(embeds)
        rows.append(torch.cat((around[:num_before], own, around[num_before:])))
    return torch.stack(rows)


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
