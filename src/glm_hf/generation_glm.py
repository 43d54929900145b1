"""Generation for a prefix language model: what differs from transformers' own, and the filling of blanks.

Positions and context are derived from the full ids at every step, so nothing has to be carried along.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import logging

from .configuration_glm import GLMConfig
from .infilling_glm import infilling_layout, mask_token_ids, prepare_context, splice_blank
from .masking_glm import Mask, is_padding_mask, layout_ids
from .peft_glm import num_virtual_tokens

DEFAULT_NEW_TOKENS = 128

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class FilledBlanks:
    """Texts with their blanks filled in."""

    sequences: list[list[int]]
    """Ids of every input with its masks replaced, without `sop`, `eop` and appended `</s>`."""
    blanks: list[list[list[int]]]
    """Ids of every blank of every input, in the order in which they were filled."""
    scores: list[list[float]]
    """Sum of the log-probabilities of every blank's tokens, its end token included."""


@dataclass(frozen=True)
class Blank:
    """One proposal for one blank."""

    ids: list[int]
    """Its tokens, without the end token."""
    score: float
    """Sum of log-probabilities of its tokens and its end token."""


class GLMGenerationMixin(GenerationMixin):
    """`generate` with two-way contexts and positions that stay at the mask, and `fill_blanks` on top of it."""

    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """
        Generate as in transformers; prompts end in `sop` (`fill_blanks` adds it).

        Raises:
            ValueError: If `prefill_chunk_size` is set: early chunks of a context could not see later ones.
        """
        settings = generation_config if generation_config is not None else self.generation_config
        if kwargs.get("prefill_chunk_size", settings.prefill_chunk_size) is not None:
            raise ValueError("prefill_chunk_size would hide later context from earlier; leave it unset")
        return super().generate(inputs, generation_config, **kwargs)

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
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Mask = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """
        Prepare one forward pass, with positions derived from the full `input_ids` `(B, S)`.

        Positions given to `generate` win; those of new tokens count on from the last one.

        Raises:
            ValueError: If a cache is reused that does not hold the whole context, or begins with a learned prefix, or
                several tokens at a time are to follow a learned prompt.
        """
        if hasattr(past_key_values, "prefix_length") and kwargs.get("use_cache") is False:
            past_key_values = None  # all tokens are read again, behind a prefix that PEFT makes anew
        if is_first_iteration and past_key_values is not None:
            self._check_reused_cache(input_ids, past_key_values)
        padding = attention_mask if is_padding_mask(attention_mask) else None
        ids = input_ids if inputs_embeds is None else self._ids_with_embedded(input_ids, inputs_embeds, padding)
        if is_first_iteration and not (ids == self.config.sop_token_id).any():
            logger.warning_once("the prompt has no sop token and is read causally; fill_blanks adds what is missing")
        if position_ids is None:
            position_ids = infilling_layout(ids, self.config, padding)[0]
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            position_ids=position_ids,
            **kwargs,
        )
        if past_key_values is not None and not past_key_values.is_compileable:
            past_length, positions = past_key_values.get_seq_length(), model_inputs["position_ids"]
            num_learned = past_length + positions.shape[1] - ids.shape[1]
            if past_length and num_learned > 0:
                if positions.shape[1] > 1:  # PEFT hands on the last one only
                    raise ValueError("behind a learned prompt tokens are generated one by one; leave assistants out")
                if not hasattr(past_key_values, "prefix_length"):
                    model_inputs["decode_position_ids"] = positions + num_learned  # PEFT drops position_ids
        return model_inputs

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

    def _check_reused_cache(self, input_ids: torch.Tensor, past_key_values: Cache) -> None:
        """Raise unless every row's context and first `sop` lie in the cache."""
        past_length = int(past_key_values.get_seq_length())
        if past_length == 0:
            return
        if hasattr(past_key_values, "prefix_length"):
            raise ValueError("a cache behind a learned prefix cannot be reused; start without past_key_values")
        if input_ids.shape[1] <= past_length:
            raise ValueError("a reused cache needs the ids of the whole sequence, not only the new ones")
        is_sop = input_ids == self.config.sop_token_id
        first_sop = torch.where(is_sop.any(1), is_sop.int().argmax(1), -1)
        if (first_sop >= past_length).any():
            raise ValueError(
                "the context has grown since the cache was filled, and its old tokens would not see the new ones; "
                "start without past_key_values"
            )

    @staticmethod
    def create_masks_for_generate(
        config: Any,
        inputs_embeds: torch.Tensor,
        attention_mask: Mask,
        past_key_values: Cache,
        position_ids: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> Any:
        """Make the mask of a decode step for a cache of fixed size; the prefill mask is made from ids by the model."""
        if is_first_iteration or not past_key_values.is_initialized:
            return attention_mask
        return create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values)

    @torch.no_grad()
    def fill_blanks(
        self,
        input_ids: torch.Tensor | Iterable[Sequence[int]],
        attention_mask: torch.Tensor | None = None,
        **generate_kwargs: Any,
    ) -> FilledBlanks:
        """
        Fill every mask of every text, one after another, and splice the answers in.

        A text without a mask is continued. `</s>`, `[gMASK]` and `sop` are added as the model was trained.

        Args:
            input_ids: `(B, L)` token ids, or a list of id lists of any lengths.
            attention_mask: `(B, L)`, 1 or True on tokens, if `input_ids` is a padded tensor; by default every token is
                one but the pad token.
            **generate_kwargs: For `generate`, which also heeds `generation_config`. `max_new_tokens` counts per blank
                (128 unless given) and `max_length` per text and blank, without padding; both are cut to what the
                model's `max_position_embeddings` leave. A blank always ends at `eop` and `</s>`.

        Returns:
            Sequences, blanks and scores. The logits of every step are kept to compute scores: `V` fp32 numbers each.

        Raises:
            ValueError: If a text is empty, has only masks, mixes kinds of masks, contains `sop` or is too long.
        """
        texts = unpad(input_ids, attention_mask, self.config.pad_token_id)
        contexts = [prepare_context(text, self.config) for text in texts]
        num_masks = [sum(token_id in mask_token_ids(self.config) for token_id in context) for context in contexts]
        has_own_eos = [text[-1:] == [self.config.eos_token_id] for text in texts]
        blanks: list[list[Blank]] = [[] for _ in texts]
        for number in range(max(num_masks, default=0)):
            rows = [row for row, count in enumerate(num_masks) if number < count]
            proposals = self.propose_blanks([contexts[row] for row in rows], **generate_kwargs)
            for row, (best, *_) in zip(rows, proposals, strict=True):
                contexts[row] = splice_blank(contexts[row], best.ids, self.config)
                blanks[row].append(best)
        return FilledBlanks(
            sequences=[
                context[:-1] if context[-1:] == [self.config.eos_token_id] and not own_eos else context
                for context, own_eos in zip(contexts, has_own_eos, strict=True)
            ],
            blanks=[[blank.ids for blank in of_text] for of_text in blanks],
            scores=[[blank.score for blank in of_text] for of_text in blanks],
        )

    @torch.no_grad()
    def propose_blanks(self, contexts: Sequence[Sequence[int]], **generate_kwargs: Any) -> list[list[Blank]]:
        """
        Generate `num_return_sequences` proposals for the next blank of every context, in the order of `generate`.

        Masks and `sop` are suppressed inside a blank, since they would start blanks of their own.

        Args:
            contexts: Id lists as `prepare_context` returns them.
            **generate_kwargs: As in `fill_blanks`.
        """
        rows = [[*context, self.config.sop_token_id] for context in contexts]
        proposals: list[list[Blank]] = [[] for _ in rows]
        num_new = [self._num_new_tokens(len(row), generate_kwargs) for row in rows]
        for limit in sorted(set(num_new)):  # one batch, unless the context window cuts some answers short
            group = [index for index, number in enumerate(num_new) if number == limit]
            for index, blanks in zip(
                group, self._propose([rows[index] for index in group], limit, generate_kwargs), strict=True
            ):
                proposals[index] = blanks
        return proposals

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

    def _propose(self, rows: list[list[int]], num_new: int, generate_kwargs: dict[str, Any]) -> list[list[Blank]]:
        """Generate at most `num_new` tokens behind rows that end in `sop`."""
        input_ids, attention_mask = self._pad_left(rows)
        length = input_ids.shape[1]
        end_ids = [self.config.eop_token_id, self.config.eos_token_id]
        settings = generate_kwargs.get("generation_config") or self.generation_config
        options = {"suppress_tokens": settings.suppress_tokens, **generate_kwargs}
        options.pop("max_length", None)
        outputs = self.generate(
            input_ids,
            attention_mask=attention_mask,
            **{
                **suppress_blanks(options, self.config),
                "max_new_tokens": num_new,
                "eos_token_id": end_ids,
                "pad_token_id": self.config.sop_token_id,  # suppressed, so never generated
                "return_dict_in_generate": True,
                "output_logits": True,
            },
        )
        log_probs = self.compute_transition_scores(
            outputs.sequences, outputs.logits, beam_indices=outputs.get("beam_indices"), normalize_logits=True
        )  # (B * num_return_sequences, new tokens)
        blanks = [
            read_blank(ids, scores, end_ids, self.config.sop_token_id)
            for ids, scores in zip(outputs.sequences[:, length:].tolist(), log_probs.tolist(), strict=True)
        ]
        count = len(blanks) // len(rows)
        return [blanks[row * count : (row + 1) * count] for row in range(len(rows))]

    @torch.no_grad()
    def score_blanks(self, contexts: Sequence[Sequence[int]], blanks: Sequence[Sequence[int]]) -> list[float]:
        """
        Return the log-probability of `blanks[i]`, closed by `eop`, in the next mask of `contexts[i]`.

        Args:
            contexts: Id lists as `prepare_context` returns them.
            blanks: Id lists without `sop` and `eop`.
        """
        starts = [[*context, self.config.sop_token_id] for context in contexts]
        targets = [[*blank, self.config.eop_token_id] for blank in blanks]
        rows = [[*start, *target] for start, target in zip(starts, targets, strict=True)]
        if (length := max(map(len, rows))) > self.config.max_position_embeddings:
            raise ValueError(
                f"context and blank have {length} tokens, but the model takes {self.config.max_position_embeddings}"
            )
        input_ids, attention_mask = self._pad_left(rows)
        longest = max(map(len, targets))
        logits = self(input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=longest + 1).logits
        log_probs = logits[:, :-1].float().log_softmax(-1)  # (B, longest, V)
        of_tokens = log_probs.gather(2, input_ids[:, -longest:, None]).squeeze(2)
        return [float(of_tokens[row, longest - len(target) :].sum()) for row, target in enumerate(targets)]

    def _pad_left(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and padding mask `(B, L)` on the device of the embedding."""
        embedding = self.get_input_embeddings()
        hook = getattr(embedding, "_hf_hook", None)  # of accelerate, where the weight is offloaded
        device = getattr(hook, "execution_device", None)
        device = embedding.weight.device if device is None else device
        length = max(map(len, rows))
        padded = [[self.config.pad_token_id] * (length - len(row)) + list(row) for row in rows]
        mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(padded, device=device), torch.tensor(mask, device=device)


def suppress_blanks(generate_kwargs: dict[str, Any], config: GLMConfig) -> dict[str, Any]:
    """Add masks and `sop` to the tokens that `generate` suppresses, since they would start blanks of their own."""
    suppressed = {*mask_token_ids(config), config.sop_token_id, *(generate_kwargs.get("suppress_tokens") or ())}
    return {**generate_kwargs, "suppress_tokens": sorted(suppressed)}


def read_blank(ids: Sequence[int], log_probs: Sequence[float], end_ids: Sequence[int], pad_id: int) -> Blank:
    """Cut generated ids at the first end token, whose log-probability counts, or at padding, which does not."""
    end = next((index for index, token_id in enumerate(ids) if token_id in (*end_ids, pad_id)), len(ids))
    num_scored = end + (end < len(ids) and ids[end] != pad_id)
    return Blank(ids=list(ids[:end]), score=sum(log_probs[:num_scored]))


def unpad(
    input_ids: torch.Tensor | Iterable[Sequence[int]], attention_mask: torch.Tensor | None, pad_token_id: int
) -> list[list[int]]:
    """Return the texts of a batch as id lists without padding."""
    if isinstance(input_ids, torch.Tensor):
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be 2D (batch, length), got {tuple(input_ids.shape)}")
        kept = input_ids != pad_token_id if attention_mask is None else attention_mask
        return [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, kept, strict=True)]
    if attention_mask is not None:
        raise ValueError("attention_mask belongs to a padded tensor; lists of ids have no padding")
    return [list(ids) for ids in input_ids]
