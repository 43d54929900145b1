"""SAT checkpoints to Hugging Face folders and back, and their quantization."""

from glm_hf.conversion.convert import convert_sat_checkpoint
from glm_hf.conversion.export import export_sat_checkpoint, reshard_sat_checkpoint
from glm_hf.conversion.export_3d import export_3d_checkpoint
from glm_hf.conversion.quantize import quantize_checkpoint
from glm_hf.conversion.verify import verify_checkpoint

__all__ = [
    "convert_sat_checkpoint",
    "export_3d_checkpoint",
    "export_sat_checkpoint",
    "quantize_checkpoint",
    "reshard_sat_checkpoint",
    "verify_checkpoint",
]
