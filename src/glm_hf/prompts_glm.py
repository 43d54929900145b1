"""Prompts of `generate`: completed to what the model was trained on, and given back in the columns they came in.

    as it comes   The capital of France is [MASK] .            The opposite of hot is
    completed     The capital of France is [MASK] . </s> sop   The opposite of hot is [gMASK] sop

What is added stands behind the columns of the prompt, so that `sequences[:, L:]` holds special tokens and then the
answer; rows that get less than others have padding in between. Only rows with a `sop` of their own, beside others
without, are moved to the right end of the batch, and back in what is returned.

Shapes: `B` rows, `L` columns as given, `W` columns with those added, `D` hidden.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .configuration_glm import GLMConfig
from .infilling_glm import mask_token_ids, prepare_context


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
