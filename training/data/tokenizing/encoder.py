"""Texts and instructions to token ids, long texts in pieces that give the same ids as the whole.

A text is cut behind a line break or tab that has a symbol of its own (`<n>`, `<|tab|>`): the tokenizer isolates the
symbol, so that what stands before it and behind it is encoded on its own. A piece begins with the symbol where it was
cut, whose ids are dropped again, as a text that begins without one gets a dummy prefix. No cut is made in front of a
character that may join the symbol's last one in normalisation, such as a combining mark.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from glm_hf.training.data.tokenizing.normalizer import FastNormalizer
from glm_hf.training.data.tokenizing.unigram import UnigramEncoder, unigram_encoder

PIECE_CHARACTERS = 1 << 12
"""Short, so that a letter which is not simple makes little of a text slow."""
MOST_UNCUT_CHARACTERS = 8 * 2**20
"""Longest text without a place to cut it, as the tokenizer takes some hundred times the memory."""
STARTS = "\t\n -~\u4e00-\u9fff"
"""What a piece may begin with behind its symbol: characters that no normalisation joins to the one before."""

Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


class TextEncoder:
    """
    The ids of texts, as the tokenizer itself gives them.

    Args:
        backend: The fast tokenizer as JSON, without padding and truncation.
        dtype: Dtype of the ids.
        splits_special_tokens: Whether the contents of special tokens are ordinary text.
    """

    def __init__(self, backend: str, dtype: np.dtype, splits_special_tokens: bool) -> None:
        state, self.dtype = json.loads(backend), dtype
        self.backend = _configured(backend, splits_special_tokens)
        self.normalizer: FastNormalizer | None = None
        self.unigram: UnigramEncoder | None = None
        if splits_special_tokens and is_plain(state):
            with suppress(ValueError):
                self.normalizer = FastNormalizer((state["normalizer"] or {}).get("normalizers", []))
                self.unigram = unigram_encoder(state, self.normalizer)
        self.rest = self.backend
        if self.normalizer and self.unigram is None:
            self.rest = _configured(json.dumps(state | {"normalizer": None}), splits_special_tokens)
        self.cut: re.Pattern | None = None
        symbols = cut_symbols(state) if splits_special_tokens else ""
        self.num_dropped = {symbol: len(ids) for symbol, ids in zip(symbols, self.encode(list(symbols)), strict=True)}
        if symbols:
            self.cut = re.compile(f"[{symbols}](?=[{STARTS}])")

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text."""
        ids, lengths = self.encode_joined(texts)
        ends = np.cumsum(lengths).tolist()
        return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def encode_joined(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts one behind the other, and how many each has, int64."""
        return self._encode(texts, self._encode_lines)

    def _encode_lines(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts line by line, so that only the lines with letters that are not simple are slow."""
        lines = [list(self._cut(text, 1)) for text in texts]
        pieces = [piece for text in lines for piece, _, _ in text]
        ids, lengths = self._encode(pieces, lambda others: _encode_by_library(self.backend, others, self.dtype))
        num_dropped = np.array([number for text in lines for _, number, _ in text], np.int64)
        ids, lengths = drop_first(ids, lengths, num_dropped)
        return ids, np.add.reduceat(lengths, np.cumsum([0, *map(len, lines[:-1])]))

    def _encode(self, texts: Sequence[str], encode_others: Encode) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts of simple letters by the fast way, and the others as is said."""
        ids, lengths = self._encode_simple(texts)
        others = np.flatnonzero(lengths < 0)
        if others.size:
            other_ids, counts = encode_others([texts[number] for number in others.tolist()])
            lengths[others] = 0
            ids = np.insert(ids, np.cumsum(lengths)[others].repeat(counts), other_ids)
            lengths[others] = counts
        return ids, lengths

    def _encode_simple(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode the texts of simple letters; the others have no ids and the length -1."""
        if self.unigram:
            ids, lengths = self.unigram.encode(texts)
            return ids.astype(self.dtype), lengths
        normalized = [self.normalizer.normalize(text) if self.normalizer else None for text in texts]
        simple = [text for text in normalized if text is not None]
        ids, counts = _encode_by_library(self.rest, simple, self.dtype)
        lengths = np.full(len(texts), -1, np.int64)
        lengths[[text is not None for text in normalized]] = counts
        return ids, lengths

    def pieces(self, text: str) -> Iterable[tuple[str, int, bool]]:
        """
        Return the pieces of a text, how many ids at the start of each are to be dropped, and whether it is the last.

        Raises:
            ValueError: Once there, if it is too long and cannot be cut.
        """
        return self._cut(text, PIECE_CHARACTERS) if len(text) > PIECE_CHARACTERS else ((text, 0, True),)

    def _cut(self, text: str, size: int) -> Iterator[tuple[str, int, bool]]:
        """Yield the pieces of a text, each as soon as it has more characters than `size`."""
        start = num_dropped = 0
        while len(text) - start > size and self.cut:
            cut = self.cut.search(text, start + size, start + MOST_UNCUT_CHARACTERS)
            if cut is None:
                break
            yield text[start : cut.end()], num_dropped, False
            start, num_dropped = cut.start(), self.num_dropped[cut.group()]
        if len(text) - start > MOST_UNCUT_CHARACTERS:
            raise ValueError(
                f"it has {MOST_UNCUT_CHARACTERS:,} characters without a line break or tab at which the tokenizer's "
                "input can be cut; split it"
            )
        yield text[start:], num_dropped, True


def fingerprint(tokenizer: Any) -> str:
    """Return a digest of everything by which a fast tokenizer of transformers turns text into ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"padding": None, "truncation": None}  # what the last call has set
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _configured(backend: str, splits_special_tokens: bool) -> Tokenizer:
    """Return a fast tokenizer that neither pads nor truncates."""
    loaded = Tokenizer.from_str(backend)
    loaded.no_padding()
    loaded.no_truncation()
    loaded.encode_special_tokens = splits_special_tokens
    return loaded


def _encode_by_library(backend: Tokenizer, texts: list[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    encodings = getattr(backend, "encode_batch_fast", backend.encode_batch)(texts)
    found = [np.array(encoding.ids, dtype) for encoding in encodings]
    return np.concatenate([np.empty(0, dtype), *found]), np.array([len(ids) for ids in found], np.int64)


def drop_first(ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Drop the first ids of texts.

    Args:
        ids: Ids of all texts one behind the other.
        lengths: Number of ids of each.
        counts: How many of them to drop.

    Returns:
        The ids and numbers that are left.
    """
    if not counts.any():
        return ids, lengths
    starts = np.cumsum(lengths) - lengths
    return ids[np.arange(len(ids)) >= np.repeat(starts + counts, lengths)], lengths - counts


def is_plain(state: dict) -> bool:
    """Tell whether a fast tokenizer adds no ids, and looks for no strings in a text but its special tokens."""
    adds_nothing = not (state["post_processor"] or {"special_tokens": {}}).get("special_tokens", True)
    return adds_nothing and all(token["special"] for token in state["added_tokens"])


def cut_symbols(state: dict) -> str:
    """
    Return the characters behind which texts may be cut.

    Args:
        state: The fast tokenizer as JSON. It has such characters if it is as `GLMTokenizer` builds it, and no other
            of its symbols can hold or overlap theirs.
    """
    split = state["pre_tokenizer"] or {}
    regex = (split.get("pattern") or {}).get("Regex") if split.get("type") == "Split" else None
    if regex is None or split.get("behavior") != "Isolated" or split.get("invert") or not is_plain(state):
        return ""
    patterns = [pattern for pattern in re.split(r"(?<!\\)\|", regex) if not pattern.startswith("(?<=<)")]
    symbols = {re.sub(r"\\(.)", r"\1", pattern) for pattern in patterns}
    steps = (state["normalizer"] or {}).get("normalizers", ())
    replaced = {step["pattern"].get("String"): step["content"] for step in steps if step["type"] == "Replace"}
    return "".join(
        text
        for text in "\n\t"
        if replaced.get(text) in symbols and not any(_overlaps(other, replaced[text]) for other in symbols)
    )


def _overlaps(other: str, symbol: str) -> bool:
    """Tell whether `other` can be found in a text so that `symbol`, which is there too, is not."""
    return other != symbol and (
        symbol in other or any(other.endswith(symbol[:length]) for length in range(1, len(symbol)))
    )
