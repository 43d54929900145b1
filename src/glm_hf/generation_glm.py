"""Generation for a prefix language model: what differs from transformers' own.

Positions and context are derived from the full ids, so nothing has to be carried along from step to step.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.utils import logging

from .infilling_glm import (
    Prompts,
    complete_embeddings,
    complete_prompts,
    infilling_layout,
    mask_token_ids,
    needs_completion,
    suppress_blanks,
)
from .masking_glm import find_tokens, layout_ids, make_mask
from .peft_glm import num_virtual_tokens
from .positions_glm import Mask, is_padding_mask, knows_positions
from .versions_glm import CACHE, CACHE_NAMES, hook_error, one_cache, require_known_cache, require_known_hooks

DEFAULT_NEW_TOKENS = 128
GROWN_CONTEXT = (
    "the context has grown since the cache was filled, and its old tokens would not see the new ones; start without "
    "past_key_values"
)
COMPLETED_IN_TRAINING = (
    "prompts without sop were completed while the model trains: a trainer that generates takes what was added for "
    "tokens of the answer, and may end it at </s>; give it prompts that end in sop, as "
    "glm_hf.training.to_conversation and the tokenizer's chat template make them"
)

logger = logging.get_logger(__name__)


@dataclass
class RunningGeneration:
    """What a call of `generate` knows, against which its hooks are checked."""

    model: Any
    has_positions: bool
    """Whether the caller has given `position_ids`."""
    has_padding: bool
    num_prepared: int = 0
    """Forward passes that the hook has prepared."""


# Of the thread: servers generate in several at once.
RUNNING: ContextVar[RunningGeneration | None] = ContextVar("running", default=None)


class GLMGenerationMixin(GenerationMixin):
    """`generate` with two-way contexts, prompts that are completed, and positions that stay at the mask."""

    @torch.no_grad()
    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """
        Generate as in transformers, behind prompts that are completed as `fill_blanks` completes texts.

        A row without `sop` gets a `[gMASK]` if it has no mask, `</s>` where it belongs, and `sop`; its first blank is
        generated, in which tokens that would start another one are suppressed. Returned sequences hold what was added
        behind the columns of the prompts, as special tokens. A row with `sop` is taken as it is: `[gMASK] sop` in
        front of a text has it read causally.

        Args:
            inputs: `(B, L)` token ids, also as `input_ids`; or `inputs_embeds` `(B, L, D)`.
            generation_config: As in transformers. At most 128 new tokens are generated unless a length is given, and
                never more than the model's `max_position_embeddings` leave to the longest row.
            **kwargs: As in transformers; `negative_prompt_ids` are completed, too.

        Raises:
            ValueError: If a row is no text to be filled (see `fill_blanks`), if `position_ids` or a filled cache come
                with a row without `sop`, or if `prefill_chunk_size` is set: early chunks of a context could not see
                later ones.
            RuntimeError: If generation of the installed transformers does not call what the model relies on.
        """
        settings = generation_config if generation_config is not None else self.generation_config
        if kwargs.get("prefill_chunk_size", settings.prefill_chunk_size) is not None:
            raise ValueError("prefill_chunk_size would hide later context from earlier; leave it unset")
        if kwargs.get("token_healing", settings.token_healing):
            raise ValueError("token_healing would write the end of the prompt, which is sop, anew; leave it unset")
        require_known_hooks(super())
        require_known_cache({name: value for name, value in kwargs.items() if name not in CACHE_NAMES}, "generate")
        if (cache := one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))) is not None:
            kwargs[CACHE] = cache
        if inputs is not None and "input_ids" not in kwargs:
            kwargs["input_ids"] = inputs
        is_reused = cache is not None and not settings.is_assistant and int(cache.get_seq_length()) > 0
        if is_reused:
            self._check_reused_cache(kwargs.get("input_ids"), cache)
        given, completed = kwargs.get("input_ids"), self._complete_arguments(kwargs, settings)
        if is_reused and completed is not None:
            raise ValueError(GROWN_CONTEXT)
        num_new = self._num_new_tokens(longest_row(kwargs), {**kwargs, "generation_config": settings})
        kwargs = {name: value for name, value in kwargs.items() if name != "max_length"} | {"max_new_tokens": num_new}
        if generation_config is not None:  # which takes no further settings beside it
            generation_config = copy.deepcopy(generation_config)
            kwargs = generation_config.update(**kwargs)
            generation_config.max_length = None
        with self._running(kwargs):
            outputs = super().generate(generation_config=generation_config, **kwargs)
        if completed is None or completed.columns is None:
            return outputs
        if isinstance(used := kwargs.get(CACHE, getattr(outputs, CACHE, None)), Cache):
            used.glm_rows_were_moved = True
        return outputs if given is None else with_prompts(outputs, torch.cat((given, completed.added), dim=1))

    def _complete_arguments(self, arguments: dict[str, Any], settings: GenerationConfig) -> Prompts | None:
        """Complete prompts among the arguments of `generate`, in place, and return them; None if there are none."""
        config = self.config
        if (negative := arguments.get("negative_prompt_ids")) is not None:
            mask = arguments.get("negative_prompt_attention_mask")
            if needs_completion(negative, mask, config):
                prompts = complete_prompts(negative, mask, config)
                arguments["negative_prompt_ids"] = prompts.input_ids
                arguments["negative_prompt_attention_mask"] = prompts.attention_mask
        mask, embeds = arguments.get("attention_mask"), arguments.get("inputs_embeds")
        ids = arguments.get("input_ids")
        gives_ids = ids is not None and ids.shape[-1] > 0
        if embeds is not None and not gives_ids:
            structural = (*mask_token_ids(config), config.eos_token_id, config.sop_token_id)
            ids = find_tokens(embeds, self.get_input_embeddings(), structural)
            mask = torch.ones_like(ids) if mask is None else mask
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or not needs_completion(ids, mask, config):
            return None
        if arguments.get("position_ids") is not None or (mask is not None and mask.ndim != 2):
            raise ValueError(
                "position_ids and 4D masks are for whole prompts: end each row in sop and pad on the left, or leave "
                "them out"
            )
        prompts = complete_prompts(ids, mask, config)
        arguments["attention_mask"] = prompts.attention_mask
        if gives_ids:
            arguments["input_ids"] = prompts.input_ids
        if embeds is not None:
            arguments["inputs_embeds"] = complete_embeddings(embeds, prompts, self.get_input_embeddings())
        if prompts.added.shape[1]:
            if self.training:
                logger.warning_once(COMPLETED_IN_TRAINING)
            options = {"suppress_tokens": settings.suppress_tokens, **arguments}
            arguments["suppress_tokens"] = suppress_blanks(options, config)["suppress_tokens"]
        return prompts

    @contextmanager
    def _running(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Check the hooks of a call of `generate`, while it runs, against its arguments."""
        mask = arguments.get("attention_mask")
        running = RunningGeneration(
            self,
            has_positions=arguments.get("position_ids") is not None,
            has_padding=mask is not None and is_padding_mask(mask) and bool((mask == 0).any()),
        )
        token = RUNNING.set(running)
        try:
            yield
        finally:
            RUNNING.reset(token)
        if not running.num_prepared and arguments.get("custom_generate") is None:
            raise hook_error("the hook prepare_inputs_for_generation was not called")

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Load the generation config of a folder; one made from the model's config would lack `eop`."""
        super().adjust_generation_fn(*args, **kwargs)
        if self.generation_config._from_model_config:
            self.stop_at_end_of_blank()

    def stop_at_end_of_blank(self) -> None:
        """Make `generate` end a row at `eop` and at `</s>`."""
        self.generation_config.eos_token_id = [self.config.eop_token_id, self.config.eos_token_id]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse continuous batching, whose masks are causal and would give other answers."""
        raise ValueError(
            "continuous batching would read the context causally; call generate on a padded batch instead"
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        attention_mask: Mask = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """
        Prepare one forward pass, with positions from the full `input_ids` `(B, S)` unless the cache knows them.

        Positions given to `generate` win; those of new tokens count on from the last one.

        Raises:
            ValueError: If several tokens at a time are to follow a learned prompt.
            RuntimeError: If generation hands over something else than it is known to do.
        """
        require_known_cache(kwargs, "prepare_inputs_for_generation")
        cache = kwargs.get(CACHE)
        if hasattr(cache, "prefix_length") and kwargs.get("use_cache") is False:
            cache = kwargs[CACHE] = None  # all tokens are read again, behind a prefix that PEFT makes anew
        self._check_hook(attention_mask, position_ids)
        padding = attention_mask if is_padding_mask(attention_mask) else None
        ids = input_ids if inputs_embeds is None else self._ids_with_embedded(input_ids, inputs_embeds, padding)
        is_behind = cache is not None and not kwargs.get("is_first_iteration")
        if position_ids is None and is_behind and not knows_positions(cache):
            position_ids = infilling_layout(ids, self.config, padding)[0]
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            **kwargs,
        )
        if cache is None:
            return model_inputs
        mask = model_inputs.get("attention_mask")
        if kwargs.get("is_first_iteration") and mask is not None and not is_padding_mask(mask):
            raise hook_error("the hook create_masks_for_generate was not called")
        if not cache.is_compileable:
            new = model_inputs.get("inputs_embeds")
            past_length, length = cache.get_seq_length(), (model_inputs["input_ids"] if new is None else new).shape[1]
            if past_length + length < ids.shape[1]:
                raise hook_error(f"{ids.shape[1] - past_length - length} tokens were left out")
            if past_length and length > 1 and past_length + length > ids.shape[1]:  # PEFT hands on the last one only
                raise ValueError("behind a learned prompt tokens are generated one by one; leave assistants out")
        model_inputs["past_key_values"] = model_inputs.pop(CACHE)  # the name that PEFT knows, in all versions
        return model_inputs

    def _check_hook(self, attention_mask: Mask, position_ids: torch.Tensor | None) -> None:
        """Note that a forward pass is prepared; RuntimeError if what `generate` was given does not arrive."""
        running = RUNNING.get()
        if running is None or running.model is not self:
            return
        if position_ids is not None and not running.has_positions:
            raise hook_error("the hook _prepare_position_ids_for_generation was not called")
        if attention_mask is None and running.has_padding:
            raise hook_error("the padding mask was not handed to prepare_inputs_for_generation")
        running.num_prepared += 1

    def _ids_with_embedded(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, padding: torch.Tensor | None
    ) -> torch.Tensor:
        """Return ids `(B, S)` of a prompt given as embeddings, as far as they shape a sample, and of what followed."""
        if padding is not None and padding.shape[1] == input_ids.shape[1]:
            return input_ids  # these hold the prompt's, too
        embedded = layout_ids(inputs_embeds, self.get_input_embeddings(), self.config)
        embedded = input_ids.new_full(inputs_embeds.shape[:2], -1) if embedded is None else embedded
        return torch.cat((embedded, input_ids), dim=1)

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        """Prepare none: `prepare_inputs_for_generation` derives positions at every step."""

    def _check_reused_cache(self, input_ids: torch.Tensor | None, cache: Cache) -> None:
        """Raise ValueError unless every row's context and first `sop` lie in the cache."""
        past_length = int(cache.get_seq_length())
        if hasattr(cache, "glm_rows_were_moved"):
            raise ValueError("rows of the cache were moved in a batch with others that had no sop; fill a cache anew")
        if hasattr(cache, "prefix_length"):
            raise ValueError("a cache behind a learned prefix cannot be reused; start without past_key_values")
        if input_ids is None or input_ids.shape[1] <= past_length:
            raise ValueError("a reused cache needs the ids of the whole sequence, not only the new ones")
        is_sop = input_ids == self.config.sop_token_id
        if (is_sop.int().argmax(1) >= past_length).any():
            raise ValueError(GROWN_CONTEXT)

    @staticmethod
    def create_masks_for_generate(
        config: Any, inputs_embeds: torch.Tensor, attention_mask: Mask, **kwargs: Any
    ) -> Any:
        """Make the mask of a decode step for a cache of fixed size; the prefill mask is made from ids by the model."""
        cache = kwargs[CACHE]
        if kwargs.get("is_first_iteration") or not cache.is_initialized:
            return attention_mask
        return make_mask(config, inputs_embeds, attention_mask, cache)

    def _num_new_tokens(self, length: int, generate_kwargs: dict[str, Any]) -> int:
        """Return how many tokens may follow a row of `length`, by the caller, the generation config and the window."""
        settings = generate_kwargs.get("generation_config") or self.generation_config
        new, total = (generate_kwargs.get(name, getattr(settings, name)) for name in ("max_new_tokens", "max_length"))
        if new is None:
            new = DEFAULT_NEW_TOKENS if total is None else total - length
        room = self.config.max_position_embeddings - num_virtual_tokens(self) - length
        if new < 1 or room < 1:
            raise ValueError(
                f"the text of {length} tokens must leave room for at least 1 new token, got max_new_tokens={new} and "
                f"{room} left of the {self.config.max_position_embeddings} tokens of the model"
            )
        return min(new, room)


def longest_row(arguments: dict[str, Any]) -> int:
    """Return the length of the longest prompt among the arguments of `generate`, without padding."""
    ids, embeds, mask = (arguments.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    if mask is not None and is_padding_mask(mask):
        return int(mask.sum(1).max())
    return embeds.shape[1] if embeds is not None else ids.shape[1] if isinstance(ids, torch.Tensor) else 1


def with_prompts(outputs: Any, prompts: torch.Tensor) -> Any:
    """Return what `generate` returned with `prompts` `(B, W)` as the first columns of its sequences."""
    sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
    prompts = prompts.to(sequences).repeat_interleave(len(sequences) // len(prompts), dim=0)
    sequences = torch.cat((prompts, sequences[:, prompts.shape[1] :]), dim=1)
    if isinstance(outputs, torch.Tensor):
        return sequences
    outputs.sequences = sequences
    return outputs
