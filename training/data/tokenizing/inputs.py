"""The ids of inputs with special tokens such as `[MASK]`: what lies between these is encoded as texts are."""

import json
import re
from collections.abc import Sequence

import numpy as np

from glm_hf.training.data.tokenizing.encoder import TextEncoder, is_plain

ATTACHED = ("lstrip", "rstrip", "single_word", "normalized")  # ways in which a token looks at its neighbours


class InputEncoder:
    """
    The ids of inputs, as the tokenizer itself gives them.

    Args:
        backend: The fast tokenizer as JSON, without padding and truncation.
        texts: Encodes texts without special tokens.
    """

    def __init__(self, backend: str, texts: TextEncoder) -> None:
        state, self.encoder = json.loads(backend), texts
        tokens = state["added_tokens"]
        self.special: dict[str, int] = {}
        self.split: re.Pattern | None = None
        if tokens and is_plain(state) and not any(token[name] for token in tokens for name in ATTACHED):
            self.special = {token["content"]: token["id"] for token in tokens}
            longest_first = sorted(self.special, key=len, reverse=True)
            self.split = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        else:
            self.encoder = TextEncoder(backend, texts.dtype, splits_special_tokens=False)

    def encode(self, inputs: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each."""
        if self.split is None:
            return self.encoder.encode(inputs)
        parts = [self.split.split(text) for text in inputs]  # texts, and special tokens between them, in turns
        texts = iter(self.encoder.encode([part for of_input in parts for part in of_input[::2]]))
        return [
            np.concatenate(
                [self._special(part) if number % 2 else next(texts) for number, part in enumerate(of_input)]
            )
            for of_input in parts
        ]

    def _special(self, token: str) -> np.ndarray:
        return np.array([self.special[token]], self.encoder.dtype)
