"""GLM-130B as a first-class Hugging Face model: importing the package registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from glm_hf._version import __version__
from glm_hf.configuration_glm import GLMConfig
from glm_hf.modeling_glm import GLMForBlankInfilling, GLMForMaskedLM, GLMModel

AutoConfig.register("glm130b", GLMConfig, exist_ok=True)
AutoModel.register(GLMConfig, GLMModel, exist_ok=True)
AutoModelForCausalLM.register(GLMConfig, GLMForBlankInfilling, exist_ok=True)
AutoModelForSeq2SeqLM.register(GLMConfig, GLMForBlankInfilling, exist_ok=True)
AutoModelForMaskedLM.register(GLMConfig, GLMForMaskedLM, exist_ok=True)

__all__ = ["GLMConfig", "GLMForBlankInfilling", "GLMForMaskedLM", "GLMModel", "__version__"]
