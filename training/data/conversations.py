"""Rows of prompts and answers as conversations, the form in which TRL's trainers meet GLM's layout.

TRL joins the texts of a row as a causal model reads them. Conversations go through the tokenizer's chat template
instead, which puts `sop` in front of an answer and `eop` behind it. This module does not need TRL.
"""

from collections.abc import Mapping
from typing import Any

ROLES = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
OTHER_NAMES = {"inputs": "prompt", "targets": "completion"}


def to_conversation(row: Mapping[str, Any]) -> dict[str, Any]:
    """
    Turn a row of texts into what `SFTTrainer`, `DPOTrainer` and `GRPOTrainer` of TRL take.

    Use it as `dataset.map(to_conversation, remove_columns=dataset.column_names)`:

        {"prompt": "The capital of France is [MASK].", "completion": "Paris"} ->
        {"prompt": [{"role": "user", "content": "The capital of France is [MASK]."}],
         "completion": [{"role": "assistant", "content": "Paris"}]}

    Args:
        row: Fields of one of these sets; further ones, such as what a reward function needs, are kept.
            `prompt` and `completion`, or `inputs` and `targets`, for SFT;
            `prompt`, `chosen` and `rejected` for DPO;
            `prompt` alone, or `inputs`, for GRPO;
            `messages`, a chat whose last turn is the answer, for SFT.
            A prompt may hold a mask. A field that is a list of turns already stays one.

    Returns:
        The row, with turns for texts. Chats in `messages` are split into `prompt` and `completion`, so that the loss
        is that of the answer alone.

    Raises:
        ValueError: If the fields are none of these, or one is neither a text nor turns.
    """
    fields = {OTHER_NAMES.get(name, name): value for name, value in row.items()}
    if len(fields) < len(row):
        raise ValueError(f"a row must have prompt or inputs and completion or targets, not both, got {', '.join(row)}")
    if "messages" in fields:
        if "prompt" in fields or len(fields["messages"]) < 2:
            raise ValueError("messages must hold a question and its answer, and stand without a prompt")
        *fields["prompt"], answer = fields.pop("messages")
        fields["completion"] = [answer]
    answers = ROLES.keys() & fields.keys() - {"prompt"}
    if "prompt" not in fields or answers not in (set(), {"completion"}, {"chosen", "rejected"}):
        raise ValueError(
            "a row must have prompt (or inputs), alone or with completion (or targets) or with chosen and rejected; "
            f"or messages; got {', '.join(row)}"
        )
    return fields | {name: _turns(name, fields[name]) for name in ("prompt", *answers)}


def _turns(name: str, value: Any) -> list[dict[str, Any]]:
    """Return a field as turns of a conversation."""
    if isinstance(value, str) and value.strip():
        return [{"role": ROLES[name], "content": value}]
    if isinstance(value, list) and value and all(isinstance(turn, Mapping) for turn in value):
        return value
    raise ValueError(f"{name} must be a text that is not empty, or a list of turns, got {value!r}")


__all__ = ["to_conversation"]
