"""Texts and instructions to token ids, long texts in pieces that give the same ids as the whole.

A text is cut behind a line break or tab that has a symbol of its own (`<n>`, `<|tab|>`): the tokenizer isolates the
symbol, so that what stands before it and behind it is encoded on its own. A piece begins with the symbol where it was
cut, whose ids are dropped again, as a text that begins without one gets a dummy prefix. No cut is made in front of a
character that may join the symbol's last one in normalisation, such as a combining mark.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
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
        symbols = cut_symbols(state) if splits_special_tokens else ""
        self.num_dropped = {symbol: len(ids) for symbol, ids in zip(symbols, self.encode(list(symbols)), strict=True)}
        self.cut = re.compile(f"[{symbols}](?=[{STARTS}])") if symbols else None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text."""
        ids, lengths = self.encode_joined(texts)
        ends = np.cumsum(lengths).tolist()
        return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def encode_joined(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts one behind the other, and how many each has, int64."""
        if self.unigram is None:
            found = self._encode_by_library(texts)
            return np.concatenate([np.empty(0, self.dtype), *found]), np.array(
                [len(array) for array in found], np.int64
            )
        ids, lengths = self.unigram.encode(texts)
        ids = ids.astype(self.dtype)
        others = np.flatnonzero(lengths < 0)
        if others.size:
            found = _encode(self.backend, [texts[number] for number in others.tolist()], self.dtype)
            counts = [len(array) for array in found]
            lengths[others] = 0
            ids = np.insert(ids, np.cumsum(lengths)[others].repeat(counts), np.concatenate(found))
            lengths[others] = counts
        return ids, lengths

    def _encode_by_library(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text as the tokenizers library gives them."""
        normalized = [self.normalizer.normalize(text) if self.normalizer else None for text in texts]
        whole = [text for text, done in zip(texts, normalized, strict=True) if done is None]
        encoded_whole = iter(_encode(self.backend, whole, self.dtype))
        encoded_rest = iter(_encode(self.rest, [done for done in normalized if done is not None], self.dtype))
        return [next(encoded_whole if done is None else encoded_rest) for done in normalized]

    def pieces(self, text: str) -> Iterable[tuple[str, int, bool]]:
        """
        Return the pieces of a text, how many ids at the start of each are to be dropped, and whether it is the last.

        Raises:
            ValueError: Once there, if it is too long and cannot be cut.
        """
        return self._cut(text) if len(text) > PIECE_CHARACTERS else ((text, 0, True),)

    def _cut(self, text: str) -> Iterator[tuple[str, int, bool]]:
        """Yield the pieces of a long text."""
        start = num_dropped = 0
        while len(text) - start > PIECE_CHARACTERS and self.cut:
            cut = self.cut.search(text, start + PIECE_CHARACTERS, start + MOST_UNCUT_CHARACTERS)
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


def _encode(backend: Tokenizer, texts: list[str], dtype: np.dtype) -> list[np.ndarray]:
    encodings = getattr(backend, "encode_batch_fast", backend.encode_batch)(texts)
    return [np.array(encoding.ids, dtype) for encoding in encodings]


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
