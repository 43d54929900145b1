"""GLM-130B as a first-class Hugging Face model: importing the package registers it with transformers.

The names below are imported when they are asked for. In a process of the `glm-hf` command the registration waits until
a subcommand needs it, so that help and plans need no model.
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any


def _is_command() -> bool:
    """Tell whether this process is `glm-hf` or `python -m glm_hf.cli`, in which nothing but the command runs."""
    [program] = sys.argv[:1] or [""]
    name, _ = os.path.splitext(os.path.basename(program))
    return name == "glm-hf" or (program == "-m" and "glm_hf.cli" in sys.orig_argv)


if _is_command() and hasattr(signal, "pthread_sigmask"):  # until the command listens to them
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})

from glm_hf.deprecated.modules import find_renamed_modules  # noqa: E402, by then signals have to wait

if TYPE_CHECKING:
    from glm_hf import conversion, quantization, training
    from glm_hf.configuration_glm import GLMConfig
    from glm_hf.modeling_glm import GLMForBlankInfilling, GLMForMaskedLM, GLMModel
    from glm_hf.pipelines.fill_mask import BlankInfillingPipeline
    from glm_hf.quantization.configuration import GLMQuantizationConfig
    from glm_hf.tokenization_glm import GLMTokenizer

__version__ = "0.2.0"

MODULES = {
    "BlankInfillingPipeline": "glm_hf.pipelines.fill_mask",
    "GLMConfig": "glm_hf.configuration_glm",
    "GLMForBlankInfilling": "glm_hf.modeling_glm",
    "GLMForMaskedLM": "glm_hf.modeling_glm",
    "GLMModel": "glm_hf.modeling_glm",
    "GLMQuantizationConfig": "glm_hf.quantization.configuration",
    "GLMTokenizer": "glm_hf.tokenization_glm",
    "conversion": "glm_hf.conversion",
    "quantization": "glm_hf.quantization",
    "training": "glm_hf.training",
}
"""Where the public names are defined."""


def lazy_names(
    namespace: dict[str, Any], modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    Return `__getattr__` and `__dir__` of a module whose names are imported when they are asked for (PEP 562).

    Args:
        namespace: Namespace of the module, which keeps what has been imported.
        modules: Module of every name; a name that is the last part of its own module is that module.
    """

    def import_name(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {namespace['__name__']!r} has no attribute {name!r}")
        module = import_module(modules[name])
        value = module if modules[name].endswith(f".{name}") else getattr(module, name)
        namespace[name] = value
        return value

    return import_name, lambda: sorted({*namespace, *modules})


__getattr__, __dir__ = lazy_names(globals(), MODULES)


def register() -> None:
    """Make GLM known to transformers' Auto classes, pipelines and quantizers; harmless when repeated."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from glm_hf.configuration_glm import GLMConfig
    from glm_hf.modeling_glm import GLMForBlankInfilling, GLMForMaskedLM, GLMModel
    from glm_hf.onnx.configuration import GLMONNXConfig
    from glm_hf.onnx.runtime import ORTGLMForBlankInfilling, ORTGLMForMaskedLM
    from glm_hf.pipelines import register_pipelines
    from glm_hf.quantization.quantizer import register_quantizer
    from glm_hf.tokenization_glm import GLMTokenizer
    from glm_hf.versions_glm import AutoModelForDecision

    transformers.AutoConfig.register("glm130b", GLMConfig, exist_ok=True)
    transformers.AutoModel.register(GLMConfig, GLMModel, exist_ok=True)
    transformers.AutoModelForCausalLM.register(GLMConfig, GLMForBlankInfilling, exist_ok=True)
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.update(  # where `Trainer` looks up whether label smoothing shifts labels
        glm130b="GLMForBlankInfilling",
        glm130b_in_fsdp="FSDPGLMForBlankInfilling",  # what FSDP makes of its name
        glm130b_behind_prefix="GLMModel",  # what it finds under PEFT's prefix tuning
    )
    transformers.AutoModelForSeq2SeqLM.register(GLMConfig, GLMForBlankInfilling, exist_ok=True)
    transformers.AutoModelForMaskedLM.register(GLMConfig, GLMForMaskedLM, exist_ok=True)
    if AutoModelForDecision is not None:  # where `transformers serve` looks
        AutoModelForDecision.register(GLMConfig, GLMForBlankInfilling, exist_ok=True)
    transformers.AutoTokenizer.register(GLMConfig, tokenizer_class=GLMTokenizer, exist_ok=True)
    transformers.AutoConfig.register("glm130b_onnx", GLMONNXConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(GLMONNXConfig, ORTGLMForBlankInfilling, exist_ok=True)
    transformers.AutoModelForMaskedLM.register(GLMONNXConfig, ORTGLMForMaskedLM, exist_ok=True)
    transformers.AutoTokenizer.register(GLMONNXConfig, tokenizer_class=GLMTokenizer, exist_ok=True)
    register_pipelines()
    register_quantizer()


find_renamed_modules()
if not _is_command():
    register()

__all__ = [
    "BlankInfillingPipeline",
    "GLMConfig",
    "GLMForBlankInfilling",
    "GLMForMaskedLM",
    "GLMModel",
    "GLMQuantizationConfig",
    "GLMTokenizer",
    "__version__",
    "conversion",
    "quantization",
    "training",
]
