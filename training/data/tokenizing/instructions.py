"""Inputs and targets of instructions as contexts that fit a row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glm_hf.configuration_glm import GLMConfig


@dataclass(frozen=True)
class InstructionRule:
    """
    How the inputs of instructions become contexts.

    Args:
        config: Configuration of the model, which has the special ids.
        row_length: Number of tokens that context, `sop` and target have to fit.
        targets: Name of the field with the target, for errors.
        truncate_inputs: Whether to leave out the beginning of inputs that do not fit, which is an error else.
    """

    config: "GLMConfig"
    row_length: int
    targets: str
    truncate_inputs: bool

    def context(self, ids: Sequence[int], target_length: int) -> list[int]:
        """Complete inputs to a context that fits a row together with `sop` and the target; ValueError if none does."""
        from glm_hf.infilling_glm import prepare_context  # here, since torch takes longer to import than all the rest

        if not target_length:
            raise ValueError(f"{self.targets!r} is empty")
        room = self.row_length - 1 - target_length - 1  # a mask or `</s>` may be added
        if self.truncate_inputs and room > 0:
            ids = ids[-room:]
        context = prepare_context(ids, self.config)
        if len(context) + 1 + target_length > self.row_length:
            raise ValueError(
                f"inputs of {len(context)} and targets of {target_length} tokens do not fit a row of "
                f"{self.row_length}; shorten them or set truncate_inputs"
            )
        return context
