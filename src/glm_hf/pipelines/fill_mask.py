"""Pipelines: `fill-mask` that fills blanks of any length, `text-generation` that reads the prompt both ways.

Registered for the tasks of these names by `import glm_hf`; models of other kinds get transformers' own pipelines.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.pipelines import PIPELINE_REGISTRY, FillMaskPipeline, TextGenerationPipeline
from transformers.pipelines.text_generation import ReturnType

from glm_hf.configuration_glm import GLMConfig
from glm_hf.filling_glm import Blank
from glm_hf.infilling_glm import mask_token_ids, prepare_context, splice_blank
from glm_hf.prompts_glm import suppress_blanks, unpad
from glm_hf.rows_glm import arguments_of_rows


class BlankInfillingPipeline(FillMaskPipeline):
    """
    Fill the masks of a text with blanks of any length, best proposals first.

    `pipeline("fill-mask", model=folder)("Paris is the [MASK] of France.", top_k=3)`

    `[MASK]`, `[sMASK]` and `[gMASK]` are filled one after another from the left, each time with the best proposal in
    the masks before; a text without a mask is continued. A result is a list of dicts, for several masks a list of such
    lists, with `score` (probability of the whole blank and its end), `token` (its id, a list of ids unless it is
    exactly one), `token_str` and `sequence`.

    Call arguments: `top_k` (5), `targets` (texts of any length to choose from), `tokenizer_kwargs`, and those of
    `generate`, such as `max_new_tokens` (per blank) and `num_beams` (at least `top_k`).
    """

    def __new__(cls, model: Any, *args: Any, **kwargs: Any) -> FillMaskPipeline:
        """Make transformers' own pipeline for models of other kinds."""
        if not is_glm(model):
            return FillMaskPipeline(model, *args, **kwargs)
        return super().__new__(cls)

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        masks = (self.tokenizer.mask_token, self.tokenizer.smask_token, self.tokenizer.gmask_token)
        self.mask_pattern = re.compile(f"({'|'.join(map(re.escape, masks))})")
        self.infiller = model.as_blank_infilling() if hasattr(model, "as_blank_infilling") else model
        if len(self.tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} tokens, but the model's vocabulary has "
                f"{model.config.vocab_size} rows; use the tokenizer that belongs to the model"
            )

    def __call__(self, inputs: str | list[str], **kwargs: Any) -> list[Any]:
        """Fill one text or several; none gives an empty list."""
        return [] if inputs == [] else super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        targets: str | Sequence[str] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **generate_kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess = {} if tokenizer_kwargs is None else {"tokenizer_kwargs": tokenizer_kwargs}
        forward = dict(generate_kwargs)
        if top_k is not None:
            if top_k < 1:
                raise ValueError(f"top_k must be at least 1, got {top_k}")
            forward["top_k"] = top_k
        if targets is not None:
            forward["targets"] = self._encode_targets([targets] if isinstance(targets, str) else targets)
        return preprocess, forward, {}

    def _encode_targets(self, targets: Sequence[str]) -> list[list[int]]:
        """Return the ids of every distinct target."""
        ids = [self.tokenizer(target, add_special_tokens=False)["input_ids"] for target in dict.fromkeys(targets)]
        if not ids or not all(ids):
            raise ValueError("targets must hold at least one text, and none of them may be empty")
        special = set(self.tokenizer.all_special_ids)
        if any(special.intersection(target) for target in ids):
            raise ValueError("targets must be plain text, without special tokens such as [MASK]")
        return ids

    def preprocess(self, inputs: str, tokenizer_kwargs: dict[str, Any] | None = None, **_: Any) -> dict[str, Any]:
        """Encode a text and check that it can be filled."""
        encoded = self.tokenizer(inputs, return_tensors="pt", **(tokenizer_kwargs or {}))
        ids = encoded["input_ids"][0].tolist()
        prepare_context(ids, self.model.config)
        num_masks = len(self.mask_pattern.findall(inputs))
        if num_masks != sum(token_id in mask_token_ids(self.model.config) for token_id in ids):
            raise ValueError(f"tokenizer_kwargs must keep all {num_masks} masks of the text")
        return {**encoded, "text": inputs}

    def _forward(
        self,
        model_inputs: dict[str, Any],
        top_k: int = 5,
        targets: list[list[int]] | None = None,
        **generate_kwargs: Any,
    ) -> dict[str, Any]:
        """Return for every text of the batch the proposals for each of its blanks."""
        config = self.model.config
        texts = unpad(model_inputs["input_ids"], model_inputs.get("attention_mask"), config.pad_token_id)
        contexts = [prepare_context(text, config) for text in texts]
        num_masks = [sum(token_id in mask_token_ids(config) for token_id in context) for context in contexts]
        blanks: list[list[list[Blank]]] = [[] for _ in texts]
        for number in range(max(num_masks)):
            rows = [row for row, count in enumerate(num_masks) if number < count]
            options = arguments_of_rows(generate_kwargs, rows, len(texts))
            proposed = self._propose([contexts[row] for row in rows], top_k, targets, options)
            for row, proposals in zip(rows, proposed, strict=True):
                blanks[row].append(proposals)
                contexts[row] = splice_blank(contexts[row], proposals[0].ids, config)
        return {"blanks": blanks, "text": model_inputs["text"]}

    def _propose(
        self,
        contexts: list[list[int]],
        top_k: int,
        targets: list[list[int]] | None,
        generate_kwargs: dict[str, Any],
    ) -> list[list[Blank]]:
        """Return the `top_k` best proposals for the next blank of every context."""
        if targets is None:
            options = {**generate_kwargs, "num_return_sequences": top_k}
            num_beams = max(top_k, generate_kwargs.get("num_beams", 1))
            if num_beams > 1 and not options.get("do_sample"):
                options |= {"num_beams": num_beams, "length_penalty": 0.0}  # ranks by probability
            return [
                best_first(blanks, adds_up="length_penalty" in options)
                for blanks in self.infiller.propose_blanks(contexts, **options)
            ]
        proposed = []
        for context in contexts:
            scores = self.infiller.score_blanks([context] * len(targets), targets)
            blanks = [Blank(ids, score) for ids, score in zip(targets, scores, strict=True)]
            proposed.append(best_first(blanks, adds_up=False)[:top_k])
        return proposed

    def postprocess(self, model_outputs: dict[str, Any], **_: Any) -> list[Any]:
        """Decode the proposals for one text, whose own characters are kept as they are."""
        blanks, text = (model_outputs[key] for key in ("blanks", "text"))
        if isinstance(blanks[0][0], list):  # not batched: still a batch of one
            blanks = blanks[0]
        parts = self.mask_pattern.split(text)  # texts between masks and masks by turns
        if len(parts) == 1:
            prompt = self.tokenizer(text)["input_ids"]
            return [
                self._describe(blank, text + continuation(self.tokenizer, prompt, blank.ids)) for blank in blanks[0]
            ]
        results = []
        for number, proposals in enumerate(blanks):
            before, after = "".join(parts[: 2 * number + 1]), "".join(parts[2 * number + 2 :])
            answers = [self.tokenizer.decode(blank.ids) for blank in proposals]
            results.append(
                [self._describe(b, before + answer + after) for b, answer in zip(proposals, answers, strict=True)]
            )
            parts[2 * number + 1] = answers[0]
        return results[0] if len(results) == 1 else results

    def _describe(self, blank: Blank, sequence: str) -> dict[str, Any]:
        """Return one result in the format of `FillMaskPipeline`."""
        return {
            "score": math.exp(blank.score),
            "token": blank.ids[0] if len(blank.ids) == 1 else blank.ids,
            "token_str": self.tokenizer.decode(blank.ids),
            "sequence": sequence,
        }


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


def best_first(blanks: Sequence[Blank], adds_up: bool) -> list[Blank]:
    """
    Sort proposals by probability and merge those of the same ids.

    Args:
        blanks: Proposals.
        adds_up: Whether equal ids are different events, ended by `eop` and by `</s>`, as they are in a beam search.
    """
    merge = (lambda a, b: float(np.logaddexp(a, b))) if adds_up else max
    scores: dict[tuple[int, ...], float] = {}
    for blank in blanks:
        ids = tuple(blank.ids)
        scores[ids] = merge(scores[ids], blank.score) if ids in scores else blank.score
    return sorted((Blank(list(ids), score) for ids, score in scores.items()), key=lambda b: b.score, reverse=True)


def is_glm(model: Any) -> bool:
    """Tell whether a model is one of ours, also inside the wrapper of an adapter or a compiler."""
    return isinstance(getattr(model, "config", None), GLMConfig)


def continuation(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """Decode ids as what follows a prompt, the blank between them included and special ids left out."""
    special = set(tokenizer.all_special_ids)
    start = [token_id for token_id in prompt if token_id not in special]
    whole = start + [token_id for token_id in ids if token_id not in special]
    return tokenizer.decode(whole).removeprefix(tokenizer.decode(start))


def register_pipelines() -> None:
    """Put the pipelines in the place of transformers' own, whose default models stay."""
    tasks = {"fill-mask": BlankInfillingPipeline, "text-generation": GLMTextGenerationPipeline}
    for task, pipeline_class in tasks.items():
        PIPELINE_REGISTRY.supported_tasks[task]["impl"] = pipeline_class
