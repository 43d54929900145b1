"""Pipelines of transformers that fill blanks and continue prompts; models of other kinds get transformers' own."""

from transformers.pipelines import PIPELINE_REGISTRY

from glm_hf.pipelines.fill_mask import BlankInfillingPipeline
from glm_hf.pipelines.text_generation import GLMTextGenerationPipeline


def register_pipelines() -> None:
    """Put the pipelines in the place of transformers' own, whose default models stay."""
    tasks = {"fill-mask": BlankInfillingPipeline, "text-generation": GLMTextGenerationPipeline}
    for task, pipeline_class in tasks.items():
        PIPELINE_REGISTRY.supported_tasks[task]["impl"] = pipeline_class


__all__ = ["BlankInfillingPipeline", "GLMTextGenerationPipeline", "register_pipelines"]
