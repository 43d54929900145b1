"""The `fill-mask` pipeline, which fills blanks of any length."""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from transformers import GenerationConfig
from transformers.pipelines import FillMaskPipeline

from glm_hf.decoding import Decoder, fill_texts
from glm_hf.decoding.engine import Engine
from glm_hf.filling_glm import Blank, fill_in_turn
from glm_hf.folders.validation import require_matching_tokenizer
from glm_hf.generation_glm import DEFAULT_NEW_TOKENS
from glm_hf.infilling_glm import mask_token_ids, prepare_context, unpad
from glm_hf.pipelines.text_generation import continuation, is_glm

MOST_SLOTS = 32
PLAIN_OPTIONS = (("top_k", 1), ("targets", None), ("num_beams", 1), ("do_sample", False), ("num_return_sequences", 1))
"""Settings of a call, and their values, that the decoder takes."""
PLAIN_FIELDS = {
    *("eos_token_id", "pad_token_id", "bos_token_id", "suppress_tokens", "transformers_version", "_from_model_config"),
    *("use_cache", "output_attentions", "output_hidden_states"),
}
"""Fields of a generation config that change no answer, or that the decoder heeds."""


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
        require_matching_tokenizer(self.tokenizer, model.config)

    def __call__(self, inputs: str | list[str], **kwargs: Any) -> list[Any]:
        """Fill one text or several; none gives an empty list."""
        if inputs == []:
            return []
        if isinstance(inputs, list) and len(inputs) > 1 and all(isinstance(text, str) for text in inputs):
            preprocess, settings, _ = self._sanitize_parameters(**kwargs)
            if self._is_decoded({**self._forward_params, **settings}):
                encoded = [self.preprocess(text, **{**self._preprocess_params, **preprocess}) for text in inputs]
                return self.fill_encoded(encoded, **kwargs)
        return super().__call__(inputs, **kwargs)

    def _is_decoded(self, settings: dict[str, Any]) -> bool:
        """Tell whether the decoder gives what `generate` would: one answer, token by token the most likely."""
        options = {name: value for name, value in settings.items() if (name, value) not in PLAIN_OPTIONS}
        of_model, usual = self.infiller.generation_config.to_diff_dict(), GenerationConfig()
        changed = {name for name, value in of_model.items() if value not in (None, getattr(usual, name, None))}
        return not set(options) - {"max_new_tokens"} and settings.get("top_k") == 1 and changed <= PLAIN_FIELDS

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
        """Return a text with its ids as a context that can be filled; ValueError if it cannot."""
        config = self.model.config
        encoded = self.tokenizer(inputs, return_tensors="pt", **(tokenizer_kwargs or {}))
        [ids] = unpad(encoded["input_ids"], encoded.get("attention_mask"), config.pad_token_id)
        context = prepare_context(ids, config)
        num_masks = len(self.mask_pattern.findall(inputs))
        if num_masks != sum(token_id in mask_token_ids(config) for token_id in ids):
            raise ValueError(f"tokenizer_kwargs must keep all {num_masks} masks of the text")
        return {"context": context, "text": inputs}

    def fill_encoded(self, encoded: Sequence[dict[str, Any]], **settings: Any) -> list[Any]:
        """
        Return the results for texts in one batch.

        Args:
            encoded: What `preprocess` has returned for every text.
            **settings: Call arguments of the pipeline.
        """
        _, forward_settings, _ = self._sanitize_parameters(**settings)
        batch = {name: [text[name] for text in encoded] for name in ("context", "text")}
        outputs = self.forward(batch, **{**self._forward_params, **forward_settings})
        of_texts = zip(outputs["blanks"], outputs["text"], strict=True)
        return [self.postprocess({"blanks": blanks, "text": text}) for blanks, text in of_texts]

    def _forward(
        self,
        model_inputs: dict[str, Any],
        top_k: int = 5,
        targets: list[list[int]] | None = None,
        **generate_kwargs: Any,
    ) -> dict[str, Any]:
        """Return for every text of the batch the proposals for each of its blanks."""
        is_batch = not isinstance(model_inputs["text"], str)
        contexts = model_inputs["context"] if is_batch else [model_inputs["context"]]
        if self._is_decoded({**generate_kwargs, "top_k": top_k, "targets": targets}):
            decoder = Decoder(Engine(self.infiller, min(len(contexts), MOST_SLOTS)))
            most = generate_kwargs.get("max_new_tokens") or DEFAULT_NEW_TOKENS
            decoded = [[[blank] for blank in blanks] for blanks in fill_texts(decoder, contexts, most)]
            return {"blanks": decoded if is_batch else decoded[0], "text": model_inputs["text"]}
        propose = partial(self._propose, top_k, targets)
        blanks = fill_in_turn(list(contexts), self.model.config, propose, generate_kwargs)
        return {"blanks": blanks if is_batch else blanks[0], "text": model_inputs["text"]}

    def _propose(
        self, top_k: int, targets: list[list[int]] | None, contexts: list[list[int]], **generate_kwargs: Any
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
