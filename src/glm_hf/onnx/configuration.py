"""The configuration of a folder that holds a graph instead of weights."""

from glm_hf.configuration_glm import GLMConfig


class GLMONNXConfig(GLMConfig):
    """`GLMConfig` under a model type of its own, by which Auto classes tell a graph from weights."""

    model_type = "glm130b_onnx"


__all__ = ["GLMONNXConfig"]
