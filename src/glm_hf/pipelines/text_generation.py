"""The `text-generation` pipeline, which reads the prompt in both directions."""

from typing import Any

import torch
from transformers.pipelines import TextGenerationPipeline
from transformers.pipelines.text_generation import ReturnType

from glm_hf.configuration_glm import GLMConfig
from glm_hf.infilling_glm import mask_token_ids, prepare_context, suppress_blanks


class GLMTextGenerationPipeline(TextGenerationPipeline):
    """Continue a prompt that is read both ways, `[gMASK]` and `sop` behind it, or answer the turns of a chat."""

    def __new__(cls, model: Any, *args: Any, **kwargs: Any) -> TextGenerationPipeline:
        """Make transformers' own pipeline for models of other kinds."""
        if not is_glm(model):
            return TextGenerationPipeline(model, *args, **kwargs)
        return super().__new__(cls)

    def __call__(self, text_inputs: Any, **kwargs: Any) -> list[Any]:
        """Continue one prompt or chat, or several; none gives an empty list."""
        return [] if text_inputs == [] else super().__call__(text_inputs, **kwargs)

    def preprocess(self, prompt_text: Any, **kwargs: Any) -> dict[str, Any]:
        """Encode a prompt and complete it to a context; chats, and prompts with `sop`, are complete already."""
        inputs = super().preprocess(prompt_text, **kwargs)
        config = self.model.config
        ids = inputs["input_ids"][0].tolist()
        if config.sop_token_id in ids:
            return inputs
        if set(mask_token_ids(config)).intersection(ids):
            raise ValueError('text-generation continues a text without masks; use pipeline("fill-mask") to fill masks')
        inputs["input_ids"] = torch.tensor([[*prepare_context(ids, config), config.sop_token_id]])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return inputs

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> dict[str, Any]:
        """Generate without tokens that would start another blank."""
        return super()._forward(model_inputs, **suppress_blanks(generate_kwargs, self.model.config))

    def postprocess(
        self, model_outputs: dict[str, Any], return_type: ReturnType = ReturnType.FULL_TEXT, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """Decode the answer as the continuation of the prompt, which keeps the blank between them."""
        records = super().postprocess(model_outputs, return_type=return_type, **kwargs)
        if return_type == ReturnType.TENSORS:
            return records
        prompt, length = model_outputs["prompt_text"], model_outputs["input_ids"].shape[-1]
        for record, ids in zip(records, model_outputs["generated_sequence"][0].tolist(), strict=True):
            if isinstance(prompt, str):
                answer = continuation(self.tokenizer, ids[:length], ids[length:])
                record["generated_text"] = prompt + answer if return_type == ReturnType.FULL_TEXT else answer
                continue
            is_new = not kwargs.get("continue_final_message", prompt.messages[-1]["role"] == "assistant")
            answer = continuation(self.tokenizer, [] if is_new else ids[:length], ids[length:])
            if return_type == ReturnType.FULL_TEXT:
                before = "" if is_new else prompt.messages[-1]["content"]
                record["generated_text"][-1] |= {"content": before + answer}
            else:
                record["generated_text"] = answer
        return records


def is_glm(model: Any) -> bool:
    """Tell whether a model is one of ours, also inside the wrapper of an adapter or a compiler."""
    return isinstance(getattr(model, "config", None), GLMConfig)


def continuation(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """Decode ids as what follows a prompt, the blank between them included and special ids left out."""
    special = set(tokenizer.all_special_ids)
    start = [token_id for token_id in prompt if token_id not in special]
    whole = start + [token_id for token_id in ids if token_id not in special]
    return tokenizer.decode(whole).removeprefix(tokenizer.decode(start))
