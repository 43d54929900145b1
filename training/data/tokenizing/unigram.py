"""The ids of texts of simple letters by a unigram model, in C: what the tokenizers library gives, some times as fast.

`unigram.c` reads a tokenizer from arrays of numpy, which this file fills: its pieces as a trie, the symbols at which
it splits, and what normalisation makes of every letter, for which `FastNormalizer` is asked when it first comes.
"""

import ctypes
import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from glm_hf.training.data.native import NUMBER, POINTER, SIZE, native_library
from glm_hf.training.data.tokenizing.normalizer import FastNormalizer

NUM_LETTERS, MOST_BLANKS = 0x20000, 127  # as in unigram.c
OTHER, SAME, NO_MEMORY, NO_ROOM = 1, 2, -1, -2
MOST_NEW_LETTERS = 4096
MOST_REPLACEMENT_BYTES = 1 << 22
BYTE_NAMES = "(?<=<)(?=0x[0-9A-F]{2}>)"
LARGEST_SCORE = 1e100
"""So that no sum of scores is infinite."""

NODE = np.dtype([("base", "u4"), ("parent", "u4"), ("score", "f8")])


class Arrays(ctypes.Structure):
    """`struct unigram` of unigram.c."""

    _fields_ = [
        *((name, POINTER) for name in ("pieces", "symbols", "piece_ids", "starts", "letters")),
        *((name, POINTER) for name in ("replacements", "blanks", "runs", "byte_ids")),
        ("unknown_score", ctypes.c_double),
        *((name, NUMBER) for name in ("unknown_id", "drops_blanks", "has_prefix")),
        *((name, NUMBER) for name in ("falls_back_to_bytes", "splits_byte_names")),
    ]


def unigram_encoder(state: dict[str, Any], normalizer: FastNormalizer) -> "UnigramEncoder | None":
    """
    Return an encoder of texts of simple letters, None without the C code.

    Args:
        state: The fast tokenizer as JSON. It adds no ids, and special tokens are ordinary text to it.
        normalizer: Its normalisation.

    Raises:
        ValueError: If it is none that `GLMTokenizer` builds of a unigram model.
    """
    library = unigram_library()
    return None if library is None else UnigramEncoder(library, state, normalizer)


@functools.cache
def unigram_library() -> ctypes.CDLL | None:
    """Return what unigram.c was compiled to, None if it was not."""
    library = native_library()
    if library is None:
        return None
    arrays: Any = ctypes.POINTER(Arrays)
    texts = [arrays, POINTER, POINTER, SIZE]
    library.normalize_texts.argtypes = [*texts, POINTER, SIZE, POINTER, POINTER, POINTER, POINTER, SIZE]
    library.segment_texts.argtypes = [*texts, POINTER, POINTER]
    library.build_trie.argtypes = [POINTER, POINTER, NUMBER, POINTER, POINTER, POINTER, POINTER, SIZE]
    library.find_starts.argtypes, library.find_starts.restype = [POINTER, POINTER], None
    for function in (library.normalize_texts, library.segment_texts, library.build_trie):
        function.restype = SIZE
    return library


class UnigramEncoder:
    """
    Encodes texts of simple letters.

    Args:
        library: What `unigram_library` returns.
        state: The fast tokenizer as JSON. It adds no ids, and special tokens are ordinary text to it.
        normalizer: Its normalisation.

    Raises:
        ValueError: If it is none that `GLMTokenizer` builds of a unigram model.
    """

    def __init__(self, library: ctypes.CDLL, state: dict[str, Any], normalizer: FastNormalizer) -> None:
        model = state["model"]
        if model["type"] != "Unigram" or model.keys() != {"type", "unk_id", "vocab", "byte_fallback"}:
            raise ValueError("the model is no unigram model, or has options that are unknown")
        scores = [score for _, score in model["vocab"]]
        if model["unk_id"] is None or not all(abs(score) < LARGEST_SCORE for score in scores):
            raise ValueError("the model has no unknown piece, or scores that cannot be added up")
        symbols, splits_byte_names = _read_split(state["pre_tokenizer"])
        ids = {piece: number for number, (piece, _) in enumerate(model["vocab"])}
        self.library, self.normalizer = library, normalizer
        self.letters = np.zeros(NUM_LETTERS, np.uint32)
        self.replacements, self.num_replaced = np.zeros(MOST_REPLACEMENT_BYTES, np.uint8), 1
        self.blanks = np.zeros(MOST_BLANKS + 1, np.uint32)
        self._learn_replaced()
        pieces, piece_ids = _build_trie(library, {piece: (scores[number], number) for piece, number in ids.items()})
        orders, _ = _build_trie(library, {symbol: (-order, order) for order, symbol in enumerate(symbols)})
        runs = np.maximum.accumulate(np.where(self.blanks, np.arange(MOST_BLANKS + 1), 1)).astype(np.int32)
        byte_ids = np.array([ids.get(f"<0x{byte:02X}>", -1) for byte in range(256)], np.int32)
        starts = np.empty(NUM_LETTERS, np.uint32)
        library.find_starts(pieces.ctypes.data, starts.ctypes.data)
        self.held = (pieces, orders, piece_ids, starts, self.letters, self.replacements, self.blanks, runs, byte_ids)
        self.arrays = Arrays(
            *(array.ctypes.data for array in self.held),
            *(min(scores) - 10.0, model["unk_id"], normalizer.drops_blanks, normalizer.has_prefix),
            *(model["byte_fallback"], splits_byte_names),
        )

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts, uint32, and how many each has, int64: -1 if it has letters of other kinds."""
        normalized, ends, are_others = self._normalize([text.encode() for text in texts])
        ids, lengths = np.empty(len(normalized), np.uint32), np.empty_like(ends)
        num_ids = self.library.segment_texts(
            *(ctypes.byref(self.arrays), normalized.ctypes.data, ends.ctypes.data, len(ends)),
            *(ids.ctypes.data, lengths.ctypes.data),
        )
        if num_ids == NO_MEMORY:
            raise MemoryError(f"no memory to segment {len(normalized):,} bytes of text")
        lengths[are_others] = -1
        return ids[:num_ids], lengths

    def _normalize(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the normalized texts one behind the other, where they end, and which have letters of other kinds."""
        joined = b"".join(texts)
        ends = np.fromiter(itertools.accumulate(map(len, texts)), np.int64, len(texts))
        new_ends, are_others = np.empty_like(ends), np.empty(len(texts), np.bool_)
        found, num_found = np.empty(MOST_NEW_LETTERS, np.uint32), ctypes.c_int64()
        room = 2 * len(joined) + 4096
        while True:
            normalized = np.empty(room, np.uint8)
            num_bytes = self.library.normalize_texts(
                *(ctypes.byref(self.arrays), joined, ends.ctypes.data, len(ends), normalized.ctypes.data, room),
                *(new_ends.ctypes.data, are_others.ctypes.data),
                *(found.ctypes.data, ctypes.addressof(num_found), len(found)),
            )
            for letter in map(chr, found[: num_found.value].tolist()):
                mapped = self.normalizer.map_letters(letter)
                self.letters[ord(letter)] = SAME if mapped == letter else self._state(mapped)
            if num_bytes == NO_ROOM:
                room *= 2
            elif not num_found.value:
                return normalized[:num_bytes], new_ends, are_others

    def _learn_replaced(self) -> None:
        """Learn the strings that are replaced first."""
        replaced = self.normalizer.replaced
        runs = [len(old) for old, _ in replaced if set(old) == {" "}]
        letters = [old for old, _ in replaced if set(old) != {" "}]
        touched = {letter for old, _ in replaced for letter in old} & {letter for _, new in replaced for letter in new}
        are_letters = all(len(old) == 1 and ord(old) < NUM_LETTERS for old in letters)
        are_runs = all(1 < length <= MOST_BLANKS for length in runs) and sorted(set(runs), reverse=True) == runs
        if touched or not are_letters or not are_runs or len(set(letters)) != len(letters):
            raise ValueError("other strings are replaced than single letters and runs of blanks, the longest first")
        if self.normalizer.map_letters(" ") != " ":
            raise ValueError("a blank is not a simple letter")
        self.letters[ord(" ")] = SAME
        for old, new in replaced:
            state = self._state(self.normalizer.map_letters(new))
            if old in letters:
                self.letters[ord(old)] = state
            elif state == OTHER:
                raise ValueError("runs of blanks become letters that are not simple")
            else:
                self.blanks[len(old)] = state

    def _state(self, mapped: str | None) -> int:
        """Return what the C code is to know of a letter that is simple and becomes `mapped`, or is none (None)."""
        content = b"" if mapped is None else mapped.encode()
        end = self.num_replaced + len(content)
        if mapped is None or len(content) > 255 or end > MOST_REPLACEMENT_BYTES:
            return OTHER
        start, self.num_replaced = self.num_replaced, end
        self.replacements[start:end] = np.frombuffer(content, np.uint8)
        return start << 8 | len(content)


def _read_split(pre_tokenizer: dict[str, Any] | None) -> tuple[list[str], bool]:
    """Return the symbols that are isolated, in their order, and whether so are the names of byte pieces."""
    if pre_tokenizer is None:
        return [], False
    regex = (pre_tokenizer.get("pattern") or {}).get("Regex")
    if pre_tokenizer["type"] != "Split" or regex is None:
        raise ValueError("the text is not split at a pattern")
    patterns = re.split(r"(?<!\\)\|", regex)
    symbols = [re.sub(r"\\(.)", r"\1", pattern, flags=re.DOTALL) for pattern in patterns if pattern != BYTE_NAMES]
    splits_byte_names = patterns[-1:] == [BYTE_NAMES]
    again = [*map(re.escape, symbols), *[BYTE_NAMES] * splits_byte_names]
    expected = {"type": "Split", "pattern": {"Regex": "|".join(again)}, "behavior": "Isolated", "invert": False}
    if pre_tokenizer != expected or "" in symbols:
        raise ValueError("the text is split at more than symbols")
    return symbols, splits_byte_names


def _build_trie(library: ctypes.CDLL, keys: dict[str, tuple[float, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the nodes of a trie of keys with their scores and ids, and the ids by node."""
    encoded = sorted((key.encode(), *values) for key, values in keys.items() if key)
    joined, num_keys = b"".join(key for key, _, _ in encoded), len(encoded)
    ends = np.fromiter(itertools.accumulate(len(key) for key, _, _ in encoded), np.int64, num_keys)
    scores = np.array([score for _, score, _ in encoded], np.float64)
    ids = np.array([number for _, _, number in encoded], np.int32)
    capacity = 1024 + len(joined)
    while True:
        nodes, node_ids = np.empty(capacity, NODE), np.empty(capacity, np.int32)
        arrays = (array.ctypes.data for array in (scores, ids, nodes, node_ids))
        status = library.build_trie(joined, ends.ctypes.data, num_keys, *arrays, capacity)
        if status == NO_MEMORY:
            raise MemoryError(f"no memory for a trie of {num_keys:,} pieces")
        if status != NO_ROOM:
            return nodes, node_ids
        capacity *= 2
