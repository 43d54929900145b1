"""The fast normalisation of simple letters gives what the tokenizer's own normalizer gives."""

import json
import random

import pytest
from corpus import KINDS, any_unicode, generate, runs

from glm_hf import GLMTokenizer
from glm_hf.training.data.tokenizing.normalizer import COMPOSE, WRITE_BLANKS, FastNormalizer


def steps_of(tokenizer: GLMTokenizer) -> list[dict]:
    return json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"]["normalizers"]


@pytest.fixture(scope="module")
def normalizer(tokenizer) -> FastNormalizer:
    return FastNormalizer(steps_of(tokenizer))


@pytest.mark.parametrize("kind", [*KINDS, runs, any_unicode], ids=lambda kind: kind.__name__)
def test_texts_become_what_the_tokenizer_makes_of_them(tokenizer, normalizer, kind):
    texts = generate([kind], 60, seed=5)
    found = [(text, normalizer.normalize(text)) for text in texts]
    simple = [(text, result) for text, result in found if result is not None]
    assert simple == [(text, tokenizer.backend_tokenizer.normalizer.normalize_str(text)) for text, _ in simple]
    assert len(simple) >= (0.1 if kind is any_unicode else 0.7) * len(texts)


def test_simple_letters_are_alone_whatever_their_neighbours_are(tokenizer, normalizer):
    rng = random.Random(0)
    letters = [chr(code) for code in rng.sample([*range(1, 0xD800), *range(0xE000, 0x11000)], 4000)]
    simple = [letter for letter in letters if normalizer.normalize(letter) is not None]
    assert len(simple) > 2000
    text = "".join(rng.choices([*simple, " ", "a", "<", "\n"], k=6000))
    assert normalizer.normalize(text) == tokenizer.backend_tokenizer.normalizer.normalize_str(text)


@pytest.mark.parametrize(
    "text", ["", " ", "  a  b  ", "\u2581 a \u2581", "\u3000a\u3000 b\xa0", "\n \n", "\uff41\uff0c\u2026"]
)
def test_blanks_are_treated_alike(tokenizer, normalizer, text):
    assert normalizer.normalize(text) == tokenizer.backend_tokenizer.normalizer.normalize_str(text)


@pytest.mark.parametrize("text", ["e\u0301", "\n\u0338", "\r\n", "\u1112\u1161", "👩\u200d👧", "🇩🇪", "\u0e01\u0e33"])
def test_letters_that_join_their_neighbours_are_left_to_the_tokenizer(normalizer, text):
    assert normalizer.normalize(text) is None


def test_other_steps_are_refused(tokenizer):
    steps = steps_of(tokenizer)
    for other in ([*steps, COMPOSE], steps[1:2], [{"type": "Lowercase"}, *steps], [*steps, WRITE_BLANKS]):
        with pytest.raises(ValueError, match="the normalizer has other steps"):
            FastNormalizer(other)
