"""GLM-130B as a first-class Hugging Face model: importing the package registers it with transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from glm_hf._version import __version__
from glm_hf.configuration_glm import GLMConfig
from glm_hf.modeling_glm import GLMForBlankInfilling, GLMForMaskedLM, GLMModel
from glm_hf.pipelines.fill_mask import BlankInfillingPipeline, register_pipelines
from glm_hf.quantization import GLMQuantizationConfig
from glm_hf.quantization.quantizer import register_quantizer
from glm_hf.tokenization_glm import GLMTokenizer
from glm_hf.versions_glm import AutoModelForDecision

AutoConfig.register("glm130b", GLMConfig, exist_ok=True)
AutoModel.register(GLMConfig, GLMModel, exist_ok=True)
AutoModelForCausalLM.register(GLMConfig, GLMForBlankInfilling, exist_ok=True)
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.update(  # where `Trainer` looks up whether label smoothing shifts labels
    glm130b="GLMForBlankInfilling",
    glm130b_in_fsdp="FSDPGLMForBlankInfilling",  # what FSDP makes of its name
    glm130b_behind_prefix="GLMModel",  # what it finds under PEFT's prefix tuning
)
AutoModelForSeq2SeqLM.register(GLMConfig, GLMForBlankInfilling, exist_ok=True)
AutoModelForMaskedLM.register(GLMConfig, GLMForMaskedLM, exist_ok=True)
if AutoModelForDecision is not None:
    AutoModelForDecision.register(GLMConfig, GLMForBlankInfilling, exist_ok=True)  # where `transformers serve` looks
AutoTokenizer.register(GLMConfig, tokenizer_class=GLMTokenizer, exist_ok=True)
register_pipelines()
register_quantizer()

__all__ = [
    "BlankInfillingPipeline",
    "GLMConfig",
    "GLMForBlankInfilling",
    "GLMForMaskedLM",
    "GLMModel",
    "GLMQuantizationConfig",
    "GLMTokenizer",
    "__version__",
]
