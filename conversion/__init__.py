"""SAT checkpoints to Hugging Face folders and back."""

from glm_hf.conversion.convert import convert_sat_checkpoint

__all__ = ["convert_sat_checkpoint"]
