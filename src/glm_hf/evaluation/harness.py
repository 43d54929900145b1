"""
GLM as a model of lm-evaluation-harness, by the name `glm`.

    import glm_hf.evaluation.harness
    lm_eval.simple_evaluate(model="glm", model_args="pretrained=FOLDER", tasks=["mmlu"])

The harness's own class for transformers reads every model from left to right, GLM as well, whose scores are then
wrong. Here the choices of a question stand in one row, each behind the question with its blank; texts are predicted
in windows behind a two-way prompt; answers are decoded in slots. A text that holds `[MASK]` or `[gMASK]` is blank
there; another gets one behind.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  (first, so that its own classes keep their names)
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from glm_hf.conversion.loading import load, rank
from glm_hf.decoding import Sampling
from glm_hf.evaluation.beams import BeamSettings
from glm_hf.evaluation.evaluator import GREEDY, Evaluator, dtype_on
from glm_hf.evaluation.journal import Journal
from glm_hf.evaluation.original.generation import best_answer, choose_word, with_bans
from glm_hf.evaluation.original.items import padded_lengths
from glm_hf.evaluation.samples import Rule, Sample, choice_sample, generation_row, num_windows, window_sample

DEFAULT_GENERATION_LENGTH = 256
"""Of answers, and of windows, in tokens."""


class LogProb(float):
    """The log-probability of a continuation, which knows how many tokens it has."""

    num_tokens: int

    @classmethod
    def of(cls, log_probs: Sequence[float]) -> "LogProb":
        """Return the sum of the log-probabilities of tokens."""
        total = cls(sum(log_probs))
        total.num_tokens = len(log_probs)
        return total


@register_model("glm")
class GLMHarness(TemplateLM):
    """
    A GLM that the harness asks for log-likelihoods and answers.

    Args:
        pretrained: Folder or Hub name of a model, a model, or None with `evaluator`.
        tokenizer: Tokenizer of a model that is given as such.
        evaluator: Model, tokenizer and what is known from before, instead of the two.
        dtype: Name of the dtype that is computed in; `auto` for float32 on CPUs, else that of the files.
        bits: 4 or 8 to quantize the weights while loading.
        device: Device of the whole model; by default all GPUs there are, else the CPU.
        batch_size: Most rows at once; `auto` and 1, the harness's default, for as many as have some thousand tokens.
        mask: `[MASK]` or `[gMASK]` where a text holds neither; by default `[MASK]` for choices, `[gMASK]` else.
        unidirectional: Whether texts are read from left to right where they end in `[gMASK]`.
        add_eos: Whether `</s>` stands behind a text that does not end in its mask.
        score_eop: Whether the end of a continuation counts.
        normalize: `none` for the sum of the tokens' log-probabilities, `tokens` for their mean.
        max_length: Most tokens of a row; by default the model's window.
        generation_length: Tokens from one window of a text to the next.
        journal: File that keeps what is known of rows, from which an interrupted run resumes.
        max_batch_size: Taken and not used; the harness passes it.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        pretrained: Any = None,
        tokenizer: Any = None,
        evaluator: Evaluator | None = None,
        dtype: str = "auto",
        bits: int | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        mask: str | None = None,
        unidirectional: bool = False,
        add_eos: bool = False,
        score_eop: bool = False,
        normalize: str = "none",
        max_length: int | None = None,
        generation_length: int = DEFAULT_GENERATION_LENGTH,
        journal: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if mask not in (None, "[MASK]", "[gMASK]"):
            raise ValueError(f"mask must be [MASK] or [gMASK], got {mask}")
        if normalize not in ("none", "tokens"):
            raise ValueError(f"normalize must be none or tokens, got {normalize}")
        rows = None if batch_size in (None, 1, "1") or str(batch_size).startswith("auto") else int(str(batch_size))
        self.evaluator = evaluator or make_evaluator(pretrained, tokenizer, dtype, bits, device, rows, journal)
        self.tokenizer = self.evaluator.tokenizer
        self.mask, self.unidirectional, self.normalize = mask, unidirectional, normalize
        self.settings = {"adds_eos": add_eos, "scores_eop": score_eop}
        self._max_length = max_length or self.evaluator.config.max_position_embeddings
        self.generation_length = generation_length
        self.batch_size_per_gpu = rows or "auto"

    @property
    def eot_token_id(self) -> int:
        """The token that ends an answer."""
        return self.evaluator.config.eop_token_id

    @property
    def max_length(self) -> int:
        """Most tokens of a row."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Most new tokens where a task does not say."""
        return min(DEFAULT_GENERATION_LENGTH, self._max_length // 2)

    @property
    def device(self) -> torch.device:
        """Where ids go."""
        return self.evaluator.scorer.device

    @property
    def batch_size(self) -> int | str:
        """Most rows at once."""
        return self.batch_size_per_gpu

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the harness's own caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text, nothing added."""
        return self.evaluator.tokenize(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat as text, laid out around its blank."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def rule(self, text: str, default: str, one_way: bool = False) -> Rule:
        """Return how a text becomes a row, by the mask that it holds; ValueError if it holds several."""
        mask = next((name for name in ("[gMASK]", "[MASK]") if name in text), self.mask or default)
        if text.count(mask) > 1:
            raise ValueError(
                f"a text holds {text.count(mask)} times {mask}, of which only one can be asked for; where examples "
                "stand before a question, let both end without it: it is put behind the question"
            )
        return Rule(mask, one_way and mask == "[gMASK]", self._max_length, **self.settings)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log-probability, and whether they are what the model would write, of continuations of contexts."""
        groups = [list(group) for _, group in groupby(requests, key=question_of)]
        samples = [self._lay_out(group[0].args[0], [request.args[1] for request in group]) for group in groups]
        with tqdm(total=len(samples), desc="Scoring", unit="rows", disable=disable_tqdm or rank() > 0) as bar:
            scores = self.evaluator.score(samples, bar.update)
        found: list[tuple[float, bool]] = []
        for known in scores:
            sums = [LogProb.of(log_probs) for log_probs in known.log_probs]
            values = [total / total.num_tokens for total in sums] if self.normalize == "tokens" else sums
            found += zip(values, known.is_greedy, strict=True)
        return found

    def _lay_out(self, context: str, continuations: Sequence[str]) -> Sample:
        """Return the row of a context and its continuations, without the blanks that join them."""
        rule = self.rule(context, "[MASK]")
        choices = [self.evaluator.tokenize(text.lstrip(" ")) for text in continuations]
        return choice_sample(self._context(context), choices, rule, self.evaluator.config)

    def _context(self, text: str) -> list[int]:
        """Return the ids of a text, without the `sop` that a chat ends in and every row has; ValueError for others."""
        ids, sop = self.evaluator.tokenize(text), self.evaluator.config.sop_token_id
        ids = ids[:-1] if ids and ids[-1] == sop else ids
        if sop in ids:
            raise ValueError("a text holds the start-of-blank token (sop), which is added here")
        return ids

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """Return what `loglikelihood` returns, of `((context, continuation), ids of one, ids of the other)`."""
        samples = [
            choice_sample(context, [continuation], self.rule(texts[0], "[MASK]"), self.evaluator.config)
            for texts, context, continuation in requests
        ]
        scores = self.evaluator.score(samples)
        return [(LogProb.of(known.log_probs[0]), known.is_greedy[0]) for known in scores]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of every text, whose tokens are predicted in windows."""
        samples: list[Sample] = []
        owners: list[int] = []
        stride = min(self.generation_length, self._max_length - 1)
        for number, request in enumerate(requests):
            (text,) = request.args
            tokens, rule = self.evaluator.tokenize(text), self.rule("", "[gMASK]", self.unidirectional)
            for window in range(num_windows(len(tokens), stride, rule) if tokens else 0):
                samples.append(window_sample(tokens, window, stride, rule, self.evaluator.config))
                owners.append(number)
        totals = [0.0] * len(requests)
        with tqdm(total=len(samples), desc="Predicting", unit="windows", disable=disable_tqdm or rank() > 0) as bar:
            for owner, known in zip(owners, self.evaluator.score(samples, bar.update), strict=True):
                totals[owner] += sum(known.log_probs[0])
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to every context, up to the first of its stop strings."""
        found = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda number: repr(sorted(requests[number].args[1].items())))
        with tqdm(total=len(requests), desc="Answering", unit="texts", disable=disable_tqdm or rank() > 0) as bar:
            for _, same in groupby(order, key=lambda number: repr(sorted(requests[number].args[1].items()))):
                numbers = list(same)
                texts = [requests[number].args[0] for number in numbers]
                answers = self._generate(texts, dict(requests[numbers[0]].args[1]), bar.update)
                for number, answer in zip(numbers, answers, strict=True):
                    found[number] = answer
        return found

    def _generate(self, texts: Sequence[str], settings: dict[str, Any], on_row: Callable[[], Any]) -> list[str]:
        """Return the answers to texts that have the same settings."""
        stops = stop_strings(settings.pop("until", None))
        most = int(settings.pop("max_gen_toks", settings.pop("max_new_tokens", self.max_gen_toks)))
        is_word = settings.pop("answer_rule", None) == "lambada"
        one_way = bool(settings.pop("unidirectional", self.unidirectional))
        beams = beam_settings(settings, most)
        rules = [self.rule(text, "[gMASK]", one_way) for text in texts]
        rows = [
            generation_row(self._context(text), most, rule, self.evaluator.config)
            for text, rule in zip(texts, rules, strict=True)
        ]
        if beams is None:
            known = self.evaluator.generate(rows, most, sampling_of(settings), stops, on_row)
            return [cut(self.evaluator.decode(answer.ids), stops) for answer in known]
        beams = with_bans(beams, self.evaluator) if is_word else beams
        found = self.evaluator.search_beams(rows, padded_lengths([len(row) for row, _ in rows], 1), beams, on_row)
        choose = choose_word if is_word else best_answer
        return [cut(self.evaluator.decode(choose(each, self.evaluator)), stops) for each in found]


def make_evaluator(
    pretrained: Any,
    tokenizer: Any,
    dtype: str,
    bits: int | None,
    device: str | None,
    batch_size: int | None,
    journal: str | None,
) -> Evaluator:
    """Return the evaluator of a folder, a Hub name or a model with its tokenizer."""
    if isinstance(pretrained, str):
        loaded = load(pretrained, dtype=dtype_on(device, dtype), bits=bits, device=device)
        kept = None if journal is None else Journal(Path(journal), loaded.origin)
        return Evaluator(loaded.model, loaded.tokenizer, kept, batch_size)
    if pretrained is None or tokenizer is None:
        raise ValueError("pretrained must name a model, or be one and come with its tokenizer")
    return Evaluator(pretrained, tokenizer, None, batch_size)


def question_of(request: Any) -> tuple[Any, ...]:
    """Return what the requests of a question have in common."""
    return request.args[0], getattr(request, "task_name", None), getattr(request, "doc_id", None)


def stop_strings(until: str | Iterable[str] | None) -> list[str]:
    """Return the texts that end an answer."""
    return [until] if isinstance(until, str) else [text for text in until or () if text]


def cut(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of its stop strings."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def beam_settings(settings: dict[str, Any], most: int) -> BeamSettings | None:
    """Return how beams are searched, by the names of the original's task files, None for one beam."""
    names = ("length_penalty", "no_repeat_ngram_size", "min_gen_length")
    given = {name: settings.pop(name) for name in names if name in settings}
    num_beams = int(settings.pop("num_beams", 1))
    if num_beams == 1:
        return None
    settings.pop("do_sample", None)
    return BeamSettings(num_beams, max_gen_length=most, **given)


def sampling_of(settings: dict[str, Any]) -> Sampling:
    """
    Return how tokens are chosen, by the names of transformers' `generate`.

    Raises:
        ValueError: If a setting is not known.
    """
    does_sample = bool(settings.pop("do_sample", settings.get("temperature", 0) > 0))
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    if unknown := sorted(set(settings) - set(names)):
        raise ValueError(f"generation setting {unknown[0]} is not supported; known are {', '.join(names)}")
    if not does_sample:
        penalty = float(settings.get("repetition_penalty", 1.0))
        return GREEDY if penalty == 1 else Sampling(repetition_penalty=penalty)
    return Sampling(**{"temperature": 1.0, "seed": 0, **settings})
