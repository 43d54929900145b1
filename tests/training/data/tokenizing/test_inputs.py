"""Inputs with special tokens get the ids of the tokenizer, whatever stands between these."""

import json
import random

import numpy as np
import pytest
from corpus import KINDS, any_unicode, generate, runs
from tokenizers import AddedToken, Tokenizer

from glm_hf import GLMTokenizer
from glm_hf.training.data.tokenizing.encoder import TextEncoder
from glm_hf.training.data.tokenizing.inputs import InputEncoder

LETTERS = [
    *"ab .\n\t中。é\u0301\u3000",
    "  ",
    "▁",
    "🙂",
    "👩\u200d👧",
    "<0x41>",
    "<n>",
    "[",
    "]",
    "MASK",
    "[MAS",
    "<|",
]


def encoder_of(backend: Tokenizer) -> InputEncoder:
    state = json.dumps(json.loads(backend.to_str()) | {"padding": None, "truncation": None})
    return InputEncoder(state, TextEncoder(state, np.dtype(np.int32), splits_special_tokens=True))


@pytest.fixture(scope="module")
def encoder(tokenizer) -> InputEncoder:
    return encoder_of(tokenizer.backend_tokenizer)


def ids_of(encoder: InputEncoder, inputs: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in encoder.encode(inputs)]


def test_random_inputs_have_the_ids_of_the_tokenizer(tokenizer, encoder):
    rng, parts = random.Random(0), [*LETTERS, *tokenizer.all_special_tokens]
    inputs = ["", *("".join(rng.choices(parts, k=rng.randrange(14))) for _ in range(3000))]
    assert encoder.split is not None
    assert ids_of(encoder, inputs) == tokenizer(inputs)["input_ids"]


@pytest.mark.parametrize("kind", [*KINDS, runs, any_unicode], ids=lambda kind: kind.__name__)
def test_texts_around_masks_have_the_ids_of_the_tokenizer(tokenizer, encoder, kind):
    texts = generate([kind], 60, seed=8)
    inputs = [
        first + mask + second for first, second in zip(texts, texts[1:], strict=False) for mask in ("[MASK]", "")
    ]
    assert ids_of(encoder, inputs) == tokenizer(inputs)["input_ids"]


def with_tokens(tokenizer: GLMTokenizer, *tokens: AddedToken | str) -> GLMTokenizer:
    changed = GLMTokenizer(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    changed.add_special_tokens({"extra_special_tokens": list(tokens)})
    return changed


def test_the_longest_of_tokens_that_begin_alike_is_taken(tokenizer):
    changed = with_tokens(tokenizer, "[X", "[X]", "[X]y")
    inputs = ["a [X] b", "[X]y", "[X[X]y[X]", "[X [X]] [MASK]"]
    encoder = encoder_of(changed.backend_tokenizer)
    assert encoder.split is not None
    assert ids_of(encoder, inputs) == changed(inputs)["input_ids"]


@pytest.mark.parametrize("attached", ["lstrip", "rstrip", "single_word", "normalized"])
def test_tokens_that_look_at_their_neighbours_are_left_to_the_tokenizer(tokenizer, attached):
    changed = with_tokens(tokenizer, AddedToken("[X]", special=True, **{attached: True}))
    inputs = ["a [X] b", "a\n[X]\nb", "a[X]b", " [X] ", "[X]", "［X］ a [MASK]"]
    assert ids_of(encoder_of(changed.backend_tokenizer), inputs) == changed(inputs)["input_ids"]
