"""The filling of blanks on top of `generate`: one blank of every text after another, spliced in where its mask was."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .generation_glm import GLMGenerationMixin
from .infilling_glm import mask_token_ids, prepare_context, splice_blank
from .prompts_glm import pad_left, suppress_blanks, unpad
from .rows_glm import arguments_of_rows


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


class BlankGenerationMixin(GLMGenerationMixin):
    """
    `fill_blanks`, and its parts for pipelines: proposals for one blank, and the scores of given answers.

    transformers knows by the words `GenerationMixin` in this name that the model generates.
    """

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
            options = arguments_of_rows(generate_kwargs, rows, len(texts))
            proposals = self.propose_blanks([contexts[row] for row in rows], **options)
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
            options = arguments_of_rows(generate_kwargs, group, len(rows))
            proposed = self._propose([rows[index] for index in group], limit, options)
            for index, blanks in zip(group, proposed, strict=True):
                proposals[index] = blanks
        return proposals

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
        input_ids, attention_mask = pad_left(rows, self.config.pad_token_id)
        return input_ids.to(device), attention_mask.to(device)


def read_blank(ids: Sequence[int], log_probs: Sequence[float], end_ids: Sequence[int], pad_id: int) -> Blank:
    """Cut generated ids at the first end token, whose log-probability counts, or at padding, which does not."""
    end = next((index for index, token_id in enumerate(ids) if token_id in (*end_ids, pad_id)), len(ids))
    num_scored = end + (end < len(ids) and ids[end] != pad_id)
    return Blank(ids=list(ids[:end]), score=sum(log_probs[:num_scored]))
