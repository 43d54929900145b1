"""The filling of blanks on top of `generate`: one blank of every text after another, spliced in where its mask was.

`fill_in_turn` is the one loop, of `fill_blanks`, of the fill-mask pipeline and of the command. Texts with several
blanks leave the batch when theirs are filled, and the context window may limit answers to different lengths; what a
caller says of row 3 still reaches the text that was row 3, by `arguments_of_rows`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .configuration_glm import GLMConfig
from .generation_glm import GLMGenerationMixin
from .infilling_glm import mask_token_ids, pad_left, prepare_context, splice_blank, suppress_blanks, unpad

NOT_FINITE = (
    "the model's scores are not finite: its weights are damaged (`glm-hf verify` tells), or too large for its dtype; "
    "load it in another"
)


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
            **generate_kwargs: Arguments of `generate`, which also heeds `generation_config`. `max_new_tokens` counts
                per blank (128 unless given) and `max_length` per text and blank, without padding; both are limited to
                what the model's `max_position_embeddings` leave. A blank always ends at `eop` and `</s>`.

        Returns:
            Sequences, blanks and scores. The logits of every step are kept to compute scores: `V` fp32 values each.

        Raises:
            ValueError: If a text is empty, has only masks, mixes kinds of masks, contains `sop` or is too long.
        """
        texts = unpad(input_ids, attention_mask, self.config.pad_token_id)
        has_own_eos = [text[-1:] == [self.config.eos_token_id] for text in texts]
        contexts = [prepare_context(text, self.config) for text in texts]
        proposals = fill_in_turn(contexts, self.config, self.propose_blanks, generate_kwargs)
        return FilledBlanks(
            sequences=[
                context[:-1] if context[-1:] == [self.config.eos_token_id] and not own_eos else context
                for context, own_eos in zip(contexts, has_own_eos, strict=True)
            ],
            blanks=[[best.ids for best, *_ in of_text] for of_text in proposals],
            scores=[[best.score for best, *_ in of_text] for of_text in proposals],
        )

    @torch.no_grad()
    def propose_blanks(self, contexts: Sequence[Sequence[int]], **generate_kwargs: Any) -> list[list[Blank]]:
        """
        Generate `num_return_sequences` proposals for the next blank of every context, in the order of `generate`.

        Masks and `sop` are suppressed inside a blank, since they would start blanks of their own.

        Args:
            contexts: Id lists as `prepare_context` returns them.
            **generate_kwargs: Arguments of `generate`, as `fill_blanks` takes them.
        """
        rows = [[*context, self.config.sop_token_id] for context in contexts]
        proposals: list[list[Blank]] = [[] for _ in rows]
        num_new = [self._num_new_tokens(len(row), generate_kwargs) for row in rows]
        for limit in sorted(set(num_new)):  # one batch, unless the context window limits some answers
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
        require_finite(blank.score for blank in blanks)
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
        scores = [float(of_tokens[row, longest - len(target) :].sum()) for row, target in enumerate(targets)]
        require_finite(scores)
        return scores

    def _pad_left(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and padding mask `(B, L)` on the device of the embedding."""
        embedding = self.get_input_embeddings()
        hook = getattr(embedding, "_hf_hook", None)  # of accelerate, where the weight is offloaded
        device = getattr(hook, "execution_device", None)
        device = embedding.weight.device if device is None else device
        input_ids, attention_mask = pad_left(rows, self.config.pad_token_id)
        return input_ids.to(device), attention_mask.to(device)


def fill_in_turn(
    contexts: list[list[int]],
    config: GLMConfig,
    propose: Callable[..., list[list[Blank]]],
    arguments: Mapping[str, Any],
) -> list[list[list[Blank]]]:
    """
    Fill the masks of all contexts, one of each at a time from the left, and splice the best proposals in.

    Args:
        contexts: Id lists as `prepare_context` returns them; changed in place to what has been filled.
        config: Configuration with the special token ids.
        propose: Function that takes some of the contexts and the arguments of these rows, and returns the proposals
            for the next blank of each, best first.
        arguments: Keyword arguments of `propose` for all rows.

    Returns:
        For every context and each of its blanks the proposals.
    """
    num_masks = [sum(token_id in mask_token_ids(config) for token_id in context) for context in contexts]
    filled: list[list[list[Blank]]] = [[] for _ in contexts]
    for number in range(max(num_masks, default=0)):
        rows = [row for row, count in enumerate(num_masks) if number < count]
        options = arguments_of_rows(arguments, rows, len(contexts))
        for row, proposals in zip(rows, propose([contexts[row] for row in rows], **options), strict=True):
            contexts[row] = splice_blank(contexts[row], proposals[0].ids, config)
            filled[row].append(proposals)
    return filled


def require_finite(scores: Iterable[float]) -> None:
    """Raise ValueError if a score is NaN or infinite, whose answer means nothing."""
    if not all(map(math.isfinite, scores)):
        raise ValueError(NOT_FINITE)


def read_blank(ids: Sequence[int], log_probs: Sequence[float], end_ids: Sequence[int], pad_id: int) -> Blank:
    """Return generated ids up to the first end token, whose log-probability counts, or padding, which does not."""
    end = next((index for index, token_id in enumerate(ids) if token_id in (*end_ids, pad_id)), len(ids))
    num_scored = end + (end < len(ids) and ids[end] != pad_id)
    return Blank(ids=list(ids[:end]), score=sum(log_probs[:num_scored]))


PER_ROW = ("negative_prompt_ids", "negative_prompt_attention_mask")


def arguments_of_rows(arguments: Mapping[str, Any], rows: Sequence[int], num_rows: int) -> dict[str, Any]:
    """
    Return the arguments of `generate` for some rows of a batch.

    Args:
        arguments: Arguments of `generate` for all rows.
        rows: Numbers of the rows that are generated, ascending.
        num_rows: Rows of the whole batch.
    """
    chosen = dict(arguments)
    if len(rows) == num_rows:
        return chosen
    for name in PER_ROW:
        if chosen.get(name) is not None:
            chosen[name] = chosen[name][list(rows)]
    if (allowed := chosen.get("prefix_allowed_tokens_fn")) is not None:
        chosen["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(rows[row], ids)
    if processors := chosen.get("logits_processor"):
        wrapped = [ProcessorOfAllRows(function, rows, num_rows) for function in processors]
        chosen["logits_processor"] = LogitsProcessorList(wrapped)
    if criteria := chosen.get("stopping_criteria"):
        wrapped = [CriterionOfAllRows(function, rows, num_rows) for function in as_list(criteria)]
        chosen["stopping_criteria"] = StoppingCriteriaList(wrapped)
    return chosen


def as_list(criteria: Any) -> list[Any]:
    """Return stopping criteria as a list, which a single one is not."""
    return [criteria] if isinstance(criteria, StoppingCriteria) else list(criteria)


class RowsOfBatch:
    """
    Some rows of a batch, put in their places in the whole of it.

    Args:
        function: Logits processor or stopping criterion of a caller, who counts the rows of the whole batch.
        rows: Numbers of the rows that are there.
        num_rows: Rows of the whole batch.
    """

    def __init__(self, function: Callable, rows: Sequence[int], num_rows: int) -> None:
        self.function, self.rows, self.num_rows = function, rows, num_rows

    def places(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for each row of the whole batch one of `ids` `(B * n, L)`, the first for those missing, and back."""
        copies = len(ids) // len(self.rows)  # beams or samples of each row
        place = {row: number for number, row in enumerate(self.rows)}
        spread = [place.get(row, 0) * copies + copy for row in range(self.num_rows) for copy in range(copies)]
        back = [row * copies + copy for row in self.rows for copy in range(copies)]
        return torch.tensor(spread, device=ids.device), torch.tensor(back, device=ids.device)


class ProcessorOfAllRows(RowsOfBatch, LogitsProcessor):
    """A logits processor that is called with all rows of the batch."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores `(B * n, V)` that the processor makes of the rows that are there."""
        spread, back = self.places(input_ids)
        return self.function(input_ids[spread], scores[spread])[back]


class CriterionOfAllRows(RowsOfBatch, StoppingCriteria):
    """A stopping criterion that is called with all rows of the batch."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Tell which of the rows that are there `(B * n,)` are done."""
        spread, back = self.places(input_ids)
        scores = tuple(step[spread] for step in scores) if isinstance(scores, tuple) else scores
        done = self.function(input_ids[spread], scores, **kwargs)
        return done[back] if isinstance(done, torch.Tensor) and done.ndim else done
