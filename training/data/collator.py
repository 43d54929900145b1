"""Texts and instructions to the tensors of blank-infilling training."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.state import GradientState
from transformers.utils import logging

from glm_hf.configuration_glm import GLMConfig
from glm_hf.infilling_glm import prepare_context
from glm_hf.tokenization_glm import GLMTokenizer
from glm_hf.training.data.blanks import (
    IGNORED,
    InfilledTexts,
    draw_entries,
    draw_sentence_spans,
    draw_suffixes,
    draw_word_spans,
    exclusive_sum,
    first_in_each,
    lay_out,
    mask_spans,
    ragged_range,
)
from glm_hf.training.data.document_spans import keep_inside_documents
from glm_hf.training.data.packing.rows import Row, choose_objectives, next_fit, split_documents
from glm_hf.training.data.random_numbers import OBJECTIVE, ORDER, PART, keys_of, uniform
from glm_hf.training.data.recipe import OBJECTIVES, InfillingRecipe

logger = logging.get_logger(__name__)


@dataclass
class DataCollatorForBlankInfilling:
    """
    Cut blanks into texts and lay them out as GLM-130B was trained, several samples side by side in a row.

        {"input_ids": a b c d e f g}  ->  input_ids     a [MASK] d e [MASK] g </s> sop f   sop b c      pad pad
                                          position_ids  0   1    2 3   4    5  6    4  4    1  1 1       0   0
                                          segment_ids   1   1    1 1   1    1  1    1  1    1  1 1       0   0
                                          shift_labels  .   .    . .   .    .  .    f eop   b  c eop     .   .
                                          labels        .   .    . .   .    .  .    .  f   eop b  c      eop .

    `shift_labels` are what each token is to predict, -100 where nothing is. `labels` are the same one token later, as
    `Trainer`, its label smoothing and its metrics take them: compare them with the prediction one token before. Where
    the last token of the longest row predicts, a column of padding makes room for its label. What a sample sees
    follows from `segment_ids` and its first `sop`.

    A feature becomes one row. It is one of

    - `input_ids`: the ids of a text, with `attention_mask` if it is padded. Of a text too long for a row, one of the
      parts that it would fill is drawn; to train on all of it, tokenize it with `load_corpus`.
    - `inputs` and `targets`: ids of an instruction, and what is to be written at its first mask. A `[gMASK]` is added
      to inputs without a mask. `Trainer` passes them on with `remove_unused_columns=False`.
    - a row that `BlankInfillingDataset` has planned.

    Draws are keyed by a feature's `sample_id`, so that neither its neighbours nor the number of workers change them;
    without one, by its tokens, so that a text has the same blanks in every epoch.

    Args:
        config: Special ids and size of the vocabulary; a `GLMTokenizer` has them, too.
        recipe: Shares and lengths of the blanks.
        seed: Seed of all random draws.
        sentence_end_ids: Tokens that end a sentence, for `[sMASK]` blanks; see `sentence_ends`.
        with_origin: Whether to return `objectives`, `corpora` and `sample_ids` `(B,)`, too, of features that have a
            `sample_id`.
        with_labels: Whether to return `labels`, and the column of padding that they may need.
        padding: `"max_length"` pads to `row_length` (and a column more with `labels`), `"longest"` to the longest row
            of a batch, or as `"max_length"` does where accelerate joins the batches of several processes: those of a
            stream, which need one length.
    """

    config: GLMConfig
    recipe: InfillingRecipe = field(default_factory=InfillingRecipe)
    seed: int = 0
    sentence_end_ids: Sequence[int] = ()
    with_origin: bool = False
    with_labels: bool = True
    padding: str = "longest"

    def __post_init__(self) -> None:
        """Prepare the table of sentence ends."""
        if self.recipe.smask_probability and not len(self.sentence_end_ids):
            raise ValueError("smask_probability needs sentence_end_ids, which tell where sentences end")
        if self.padding not in ("longest", "max_length"):
            raise ValueError(f"padding must be longest or max_length, got {self.padding!r}")
        self._ends_sentence = np.zeros(self.config.vocab_size, dtype=bool)
        self._ends_sentence[list(self.sentence_end_ids)] = True

    def __call__(self, features: Iterable[Row | dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Return `input_ids`, `position_ids`, `segment_ids`, `shift_labels` and `labels`, each `(B, L)` int64.

        `L` is `row_length` if the features are planned rows, and the longest row otherwise; one more where `labels`
        need it.

        Raises:
            ValueError: If a feature is of no kind above or has no token, or if inputs and targets do not fit a row.
        """
        features = list(features)
        rows = [self._row_of(feature) for feature in features]
        groups = []
        for objective in OBJECTIVES:
            members = np.array([number for number, row in enumerate(rows) if row.objective == objective])
            if len(members):
                groups.append((members, *self.infill([rows[number] for number in members])))
        is_planned = any(isinstance(feature, Row) for feature in features)
        padding = {"input_ids": self.config.pad_token_id, "position_ids": 0, "segment_ids": 0, "shift_labels": IGNORED}
        length = self._length_of([(parts[-1], lengths) for _, parts, lengths in groups], is_planned)
        batch = {name: np.empty((len(rows), length), dtype=np.int64) for name in padding}
        for members, parts, lengths in groups:
            for number, start, count in zip(members, exclusive_sum(lengths), lengths, strict=True):
                for values, part, fill in zip(batch.values(), parts, padding.values(), strict=True):
                    values[number, :count] = part[start : start + count]
                    values[number, count:] = fill
        if self.with_labels:
            batch["labels"] = np.empty_like(batch["shift_labels"])
            batch["labels"][:, 0] = IGNORED
            batch["labels"][:, 1:] = batch["shift_labels"][:, :-1]
        tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
        if self.with_origin:
            tensors["objectives"] = torch.tensor([OBJECTIVES.index(row.objective) for row in rows])
            tensors["corpora"] = torch.tensor([row.corpus for row in rows])
            tensors["sample_ids"] = torch.tensor([row.sample_id for row in rows])
        return tensors

    def _length_of(self, groups: list[tuple[np.ndarray, np.ndarray]], is_planned: bool) -> int:
        """Return the length of a batch, from labels and lengths of the rows of every objective."""
        if is_planned and not self.with_labels:
            return self.recipe.row_length
        if self.padding == "max_length" or joins_processes(GradientState().active_dataloader):
            return self.recipe.row_length + self.with_labels
        length = self.recipe.row_length if is_planned else max(int(lengths.max()) for _, lengths in groups)
        predicts_last = (
            (labels[lengths.cumsum()[lengths == length] - 1] != IGNORED).any() for labels, lengths in groups
        )
        return length + (self.with_labels and any(predicts_last))

    def infill(self, rows: Sequence[Row]) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """
        Lay out rows of one objective.

        Returns:
            `input_ids`, `position_ids`, `segment_ids` and `shift_labels` of all rows, one after another without
            padding, and `(rows,)` how many tokens each has.
        """
        samples_per_row = np.array([len(row.lengths) for row in rows])
        numbers = ragged_range(np.zeros_like(samples_per_row), samples_per_row)
        tokens, lengths, is_end = (
            np.concatenate([getattr(row, name) for row in rows]) for name in ("tokens", "lengths", "is_end")
        )
        joined = Row(rows[0].objective, tokens, lengths, is_end, sample_id=-1)
        if joined.objective == "instruction":
            texts = self._read_instructions(joined)
        else:
            sample_ids = np.repeat([row.sample_id for row in rows], samples_per_row)
            before = np.repeat([row.samples_before for row in rows], samples_per_row)
            texts = self._mask_spans(joined, keys_of(self.seed, sample_ids, before + numbers))
        parts, sample_lengths = lay_out(texts, numbers, self.config.sop_token_id, self.config.eop_token_id)
        return parts, np.add.reduceat(sample_lengths, exclusive_sum(samples_per_row))

    def _mask_spans(self, row: Row, keys: np.ndarray) -> InfilledTexts:
        """Draw the blanks of texts, with a key for each."""
        if row.objective == "gmask":
            spans = draw_suffixes(row.lengths, self.recipe, keys)
        elif row.objective == "smask":
            ends_sentence = self._ends_sentence[row.tokens]
            spans = draw_sentence_spans(row.lengths, ends_sentence, self.recipe, keys, self._is_end(row))
        else:
            spans = draw_word_spans(row.lengths, self.recipe, keys)
            spans = keep_inside_documents(spans, row.lengths, self._is_end(row), keys)
        count = np.bincount(spans.sample, minlength=len(keys))
        order = draw_entries(count, count, keys, ORDER)
        mask_token_id = getattr(self.config, f"{row.objective}_token_id")
        texts = mask_spans(row.tokens, row.lengths, spans, mask_token_id, self.config.eos_token_id, order)
        if row.objective == "gmask":
            return replace(texts, blank_position=np.full(len(order), -1), is_closed=row.is_end)
        return texts

    def _is_end(self, row: Row) -> np.ndarray:
        """Return which tokens of texts end a document that another may follow."""
        return row.tokens == self.config.eos_token_id

    def _read_instructions(self, row: Row) -> InfilledTexts:
        """Return contexts and targets of instructions."""
        is_context = np.repeat(np.tile([True, False], len(row.lengths)), row.lengths.ravel())
        context, context_lengths = row.tokens[is_context], row.lengths[:, 0]
        is_mask = (context == self.config.mask_token_id) | (context == self.config.smask_token_id)
        return InfilledTexts(
            context=context,
            context_lengths=context_lengths,
            blank=row.tokens[~is_context],
            blank_lengths=row.lengths[:, 1],
            blank_sample=np.arange(len(row.lengths)),
            blank_position=first_in_each(is_mask, context_lengths),
            is_closed=row.is_end,
        )

    def _row_of(self, feature: Row | dict[str, Any]) -> Row:
        """Return the row of a feature, planning that of a text or an instruction."""
        if isinstance(feature, Row):
            return feature
        if "inputs" in feature and "targets" in feature:
            return self._plan_instruction(feature)
        if "input_ids" not in feature:
            raise ValueError(
                f"a feature needs input_ids, or inputs and targets, got {', '.join(feature) or 'none'}; Trainer "
                "passes on all that a dataset has with remove_unused_columns=False"
            )
        return self._plan_text(feature)

    def _plan_text(self, feature: dict[str, Any]) -> Row:
        """Return the row of a text, or one of the rows that it would fill."""
        tokens = np.asarray(feature["input_ids"], dtype=np.int64)
        if feature.get("attention_mask") is not None:
            tokens = tokens[np.asarray(feature["attention_mask"], dtype=bool)]
        if not tokens.size:
            raise ValueError("a feature has no token; leave empty texts out")
        sample_id = int(feature.get("sample_id", zlib.crc32(tokens.tobytes())))
        key = keys_of(self.seed, np.array([sample_id]), np.zeros(1))
        objective = OBJECTIVES[choose_objectives(uniform(key, OBJECTIVE, np.zeros(1)), self.recipe)[0]]
        _, _, lengths = split_documents(np.array([len(tokens)]), self.recipe.longest_text(objective))
        first = next_fit(self.recipe.infilled_length(lengths, objective), self.recipe.row_length)
        if len(first) > 2:
            logger.warning_once(
                "a text is too long for a row, so that one of its parts is drawn; to train on all of it, tokenize it "
                "with load_corpus and take a BlankInfillingDataset"
            )
        part = int(uniform(key, PART, np.zeros(1))[0] * (len(first) - 1))
        a, b = first[part : part + 2]
        ends = lengths.cumsum()
        is_end = ends == len(tokens)
        return Row(
            objective,
            tokens[ends[a] - lengths[a] : ends[b - 1]],
            lengths[a:b],
            is_end[a:b],
            sample_id,
            samples_before=int(a),
        )

    def _plan_instruction(self, feature: dict[str, Any]) -> Row:
        """Return the row of an instruction."""
        context = prepare_context(feature["inputs"], self.config)
        target = list(feature["targets"])
        if not target:
            raise ValueError("a feature has no targets; leave such instructions out")
        longest = self.recipe.longest_instruction
        if len(context) + 1 + len(target) > longest:
            raise ValueError(
                f"inputs of {len(context)} and targets of {len(target)} tokens do not fit a row of {longest}; "
                "shorten them"
            )
        lengths = np.array([[len(context), len(target)]])
        tokens = np.array([*context, *target])
        return Row("instruction", tokens, lengths, np.array([True]), int(feature.get("sample_id", 0)))


def joins_processes(loader: Any) -> bool:
    """Tell whether a loader of accelerate joins the batches of several processes before it shares them out."""
    return isinstance(loader, DataLoaderDispatcher) and loader.state.num_processes > 1


def sentence_ends(tokenizer: GLMTokenizer) -> list[int]:
    """Return the ids of the tokens that end a sentence: full stops, question and exclamation marks, line breaks."""
    return [
        token_id
        for token, token_id in tokenizer.get_vocab().items()
        if token == "<n>" or token.rstrip("\"'”’)」』").endswith(tuple(".!?。！？…"))
    ]
