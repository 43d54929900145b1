"""GLM as an ONNX graph: `export_onnx` writes it, `ORTGLMForBlankInfilling` runs it in onnxruntime."""

from typing import TYPE_CHECKING

from glm_hf import lazy_names

if TYPE_CHECKING:
    from glm_hf.onnx.export import export_onnx
    from glm_hf.onnx.runtime import ORTGLMForBlankInfilling
    from glm_hf.onnx.verify import verify_onnx

MODULES = {
    "ORTGLMForBlankInfilling": "glm_hf.onnx.runtime",
    "export_onnx": "glm_hf.onnx.export",
    "verify_onnx": "glm_hf.onnx.verify",
}

__getattr__, __dir__ = lazy_names(globals(), MODULES)

__all__ = ["ORTGLMForBlankInfilling", "export_onnx", "verify_onnx"]
