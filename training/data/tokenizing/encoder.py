"""Texts and instructions to token ids, long texts in pieces that give the same ids as the whole.

A text is cut behind a line break or tab that has a symbol of its own (`<n>`, `<|tab|>`): the tokenizer isolates the
symbol, so that what stands before it and behind it is encoded on its own. A piece begins with the symbol where it was
cut, whose ids are dropped again, as a text that begins without one gets a dummy prefix. No cut is made in front of a
character that may join the symbol's last one in normalisation, such as a combining mark.
"""

import json
import re
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

PIECE_CHARACTERS = 1 << 16
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
        self.backend, self.dtype = Tokenizer.from_str(backend), dtype
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = splits_special_tokens
        self._encode = getattr(self.backend, "encode_batch_fast", self.backend.encode_batch)
        symbols = cut_symbols(json.loads(backend)) if splits_special_tokens else ""
        self.num_dropped = {symbol: len(ids) for symbol, ids in zip(symbols, self.encode(list(symbols)), strict=True)}
        self.cut = re.compile(f"[{symbols}](?=[{STARTS}])") if symbols else None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text."""
        return [np.array(encoding.ids, self.dtype) for encoding in self._encode(list(texts))]

    def pieces(self, text: str) -> Iterator[tuple[str, int]]:
        """
        Yield the pieces of a text, and how many ids at the start of each are to be dropped.

        Raises:
            ValueError: If it is too long, and cannot be cut.
        """
        start = num_dropped = 0
        while len(text) - start > PIECE_CHARACTERS and self.cut:
            cut = self.cut.search(text, start + PIECE_CHARACTERS, start + MOST_UNCUT_CHARACTERS)
            if cut is None:
                break
            yield text[start : cut.end()], num_dropped
            start, num_dropped = cut.start(), self.num_dropped[cut.group()]
        if len(text) - start > MOST_UNCUT_CHARACTERS:
            raise ValueError(
                f"it has {MOST_UNCUT_CHARACTERS:,} characters without a line break or tab at which the tokenizer's "
                "input can be cut; split it"
            )
        yield text[start:] if start else text, num_dropped


def cut_symbols(state: dict) -> str:
    """
    Return the characters behind which texts may be cut.

    Args:
        state: The fast tokenizer as JSON. It has such characters if it is as `GLMTokenizer` builds it, and no other
            of its symbols can hold or overlap theirs.
    """
    split = state["pre_tokenizer"] or {}
    regex = (split.get("pattern") or {}).get("Regex") if split.get("type") == "Split" else None
    adds_nothing = not (state["post_processor"] or {"special_tokens": {}}).get("special_tokens", True)
    is_plain = adds_nothing and all(token["special"] for token in state["added_tokens"])
    if regex is None or split.get("behavior") != "Isolated" or split.get("invert") or not is_plain:
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
