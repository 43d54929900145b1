"""The C code gives the ids of the tokenizers library and of SentencePiece, and leaves to the former what it cannot."""

import json
import random
import re
from collections.abc import Sequence

import numpy as np
import pytest
from corpus import KINDS, any_unicode, chinese, english, generate, runs
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from glm_hf import GLMTokenizer
from glm_hf.training.data import native
from glm_hf.training.data.tokenizing import encoder, unigram
from glm_hf.training.data.tokenizing.normalizer import SPACE, FastNormalizer
from glm_hf.training.data.tokenizing.unigram import BYTE_NAMES, UnigramEncoder, unigram_library

pytestmark = pytest.mark.skipif(unigram_library() is None, reason="the C code was not built")

SYMBOLS = ["<n>", "<|tab|>", *(f"<|blank_{k}|>" for k in range(2, 81))]
VARIANTS = {
    "nmt_nfkc": {},
    "identity, blanks kept": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "bytes": {"byte_fallback": True, "remove_extra_whitespaces": False},
    "no dummy prefix": {"add_dummy_prefix": False, "byte_fallback": True},
    "lower case": {"normalization_rule_name": "nmt_nfkc_cf"},
    "some blanks": {"user_defined_symbols": ["<|blank_7|>", "<|blank_3|>", "<|tab|>"]},
    "no symbols": {"user_defined_symbols": []},
}


@pytest.fixture(scope="module", params=VARIANTS)
def model_file(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    SentencePieceTrainer.train(
        sentence_iterator=iter(line.replace("\n", " ") for line in generate([*KINDS, runs], 60, seed=0)),
        model_prefix=str(folder / "text"),
        vocab_size=900,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **({"user_defined_symbols": SYMBOLS, "normalization_rule_name": "nmt_nfkc"} | VARIANTS[request.param]),
    )
    return str(folder / "text.model")


@pytest.fixture(scope="module")
def trained(model_file) -> GLMTokenizer:
    return GLMTokenizer.from_sentencepiece(model_file, num_image_tokens=50)


def encoder_of(backend: Tokenizer) -> UnigramEncoder:
    state = json.loads(backend.to_str())
    return UnigramEncoder(unigram_library(), state, FastNormalizer(state["normalizer"]["normalizers"]))


def simple_ids(texts: UnigramEncoder, lines: Sequence[str]) -> dict[str, list[int]]:
    """Return the ids of those lines whose letters are simple."""
    ids, lengths = texts.encode(lines)
    ends = np.cumsum(lengths.clip(0))
    assert ends[-1] == len(ids)
    lines = [(line, end, length) for line, end, length in zip(lines, ends, lengths, strict=True) if length >= 0]
    return {line: ids[end - length : end].tolist() for line, end, length in lines}


@pytest.mark.parametrize("kind", [*KINDS, runs, any_unicode], ids=lambda kind: kind.__name__)
def test_texts_have_the_ids_of_the_tokenizer(trained, kind):
    lines = ["", " ", "   ", "\n", "\t\n", SPACE, f" {SPACE} ", *generate([kind], 100, seed=9)]
    lines += ["".join(lines[i : i + 7]) for i in range(0, len(lines), 7)]
    found = simple_ids(encoder_of(trained.backend_tokenizer), lines)
    assert found == {line: trained.encode(line, split_special_tokens=True) for line in found}
    has_line_breaks = "<n>" in trained.get_vocab() and kind is not any_unicode
    assert len(found) >= (0.5 if has_line_breaks else 0.04) * len(set(lines))


@pytest.mark.parametrize("model_file", ["nmt_nfkc", "bytes"], indirect=True)
def test_texts_have_the_ids_of_sentencepiece(model_file, trained):
    processor = SentencePieceProcessor(model_file=model_file)
    lines = [line.replace("\n", " ") for line in generate([english, chinese], 200, seed=10)]
    found = simple_ids(encoder_of(trained.backend_tokenizer), [line for line in lines if "  " not in line])
    assert found == {line: [50 + token for token in processor.encode(line)] for line in found}
    assert len(found) > 300


@pytest.mark.parametrize("model_file", ["nmt_nfkc"], indirect=True)
def test_letters_that_come_later_or_become_many_or_are_many(trained):
    texts = encoder_of(trained.backend_tokenizer)
    ligatures, symbols = "\ufdfa\u3000" * 3000, "".join(map(chr, range(0x4E00, 0x4E00 + 9000)))
    for lines in (["a\u2026 b"], ["\u2460 a", ligatures, "b"], [symbols, "a", symbols[:500] * 3], [" " * 40000 + "a"]):
        found = simple_ids(texts, lines)
        assert found == {line: trained.encode(line, split_special_tokens=True) for line in lines}


LETTERS = ["a", "b", "c", "\u4e2d", "\u0416", SPACE, "<", "0", "x", "A", ">", "\U00010348"]


def random_tokenizer(rng: random.Random) -> Tokenizer:
    """Return a tokenizer of random pieces, most with the same scores as others, so that paths are tied."""
    known = rng.sample(LETTERS, rng.randint(4, 10))
    pieces = {"".join(rng.choices(known, k=rng.choice([1, 1, 2, 2, 3, 4, 5]))) for _ in range(rng.randint(5, 60))}
    has_bytes = rng.random() < 0.5
    if has_bytes:
        missing = rng.choice([None, *"b\u4e2d\u00df".encode()])
        pieces |= {f"<0x{byte:02X}>" for byte in range(256) if byte != missing}
    scores = rng.choice([[-1.0], [-1.0, -2.0, -3.0], [-0.1, -0.2, -0.3, -0.7], [11.0, 12.0, 25.0], [-1.0, 0.5, -9.25]])
    vocab = [(piece, rng.choice(scores)) for piece in ["<unk>", *sorted(pieces)]]
    if rng.random() < 0.2:
        vocab.append((rng.choice(sorted(pieces)), -0.5))  # a second time
    backend = Tokenizer(models.Unigram(vocab, rng.choice([0, 0, 0, 1]), has_bytes))
    symbols = rng.sample(
        ["<", "a<", "ab", "<n>", "<0x", "x|", "0xA", "b\u4e2d", "x.", "aba", ">"], rng.choice([0, 2, 4, 8])
    )
    patterns = [*map(re.escape, symbols), *[BYTE_NAMES] * (rng.random() < 0.5)]
    if patterns:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(patterns)), "isolated")
    prefix = [normalizers.Prepend(SPACE)] * (rng.random() < 0.5)
    backend.normalizer = normalizers.Sequence([normalizers.Replace(" ", SPACE), *prefix])
    return backend


@pytest.mark.parametrize("seed", range(40))
def test_ties_and_unknown_letters_and_bytes_and_symbols_are_treated_alike(seed):
    rng = random.Random(seed)
    backend = random_tokenizer(rng)
    letters = [*LETTERS, " ", "<n>", "<0xA0>", "<0x0F>", "<0x0x", "x|", "x.", "xb", "aba", "\u00df"]
    lines = ["".join(rng.choices(letters, k=rng.choice([1, 3, 9, 30, 200]))) for _ in range(150)]
    found = simple_ids(encoder_of(backend), lines)
    assert found == {line: backend.encode(line).ids for line in lines}


@pytest.mark.parametrize("has_c", [True, False])
def test_texts_of_other_letters_stand_where_they_belong(tokenizer, monkeypatch, has_c):
    if not has_c:
        monkeypatch.setattr(encoder, "unigram_encoder", lambda state, normalizer: None)
    texts = encoder.TextEncoder(tokenizer.backend_tokenizer.to_str(), np.dtype("<u2"), True)
    lines = ["e\u0301", "", "a", "e\u0301", "\u1112\u1161", "the people", "", "\r\n", *generate(KINDS, 5, seed=3), "b"]
    lines += ["\n".join(generate([*KINDS, any_unicode], 2, seed=seed)) for seed in range(20)]
    lines += ["\n\ne\u0301\n a\n\u0301\n\n", "\r\n\n"]
    expected = [tokenizer.encode(line, split_special_tokens=True) for line in lines]
    ids, lengths = texts.encode_joined(lines)
    assert (texts.unigram is not None) == has_c
    assert ids.dtype == np.dtype("<u2")
    assert lengths.tolist() == list(map(len, expected))
    assert ids.tolist() == [i for part in expected for i in part]
    assert [part.tolist() for part in texts.encode(lines)] == expected
    assert texts.encode([]) == []


def test_other_tokenizers_are_left_to_the_library(tokenizer):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = state["normalizer"]["normalizers"]

    def with_regex(regex: str, **options: object) -> dict:
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        return state | {"pre_tokenizer": split | options}

    others = [
        state | {"model": {"type": "BPE", "vocab": {}, "merges": []}},
        state | {"model": state["model"] | {"alpha": 0.1}},
        state | {"model": state["model"] | {"unk_id": None}},
        state | {"pre_tokenizer": {"type": "Digits", "individual_digits": True}},
        *(with_regex(regex) for regex in ("<n>+", "[ab]", "a||b", "a.b", f"{BYTE_NAMES}|a", r"a\|b|c\\|d", r"\d")),
        with_regex("a", invert=True),
        with_regex("a", behavior="Removed"),
    ]
    for other in others:
        with pytest.raises(ValueError, match="the model|the text is"):
            UnigramEncoder(unigram_library(), other, FastNormalizer(steps))


@pytest.mark.parametrize(
    "replaced",
    [
        [("ab", "c")],
        [("\n", "<n>"), ("n", "m")],
        [("  ", "<2>"), ("   ", "<3>")],
        [(" " * 200, "<200>")],
        [(" ", "_")],
        [("\n", "a"), ("\n", "b")],
        [("  ", "e\u0301")],
        [("\n", "a b"), ("  ", "<2>")],
        [("\U000f0000", "a")],
    ],
)
def test_other_replacements_are_left_to_the_library(tokenizer, replaced):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = [step for step in state["normalizer"]["normalizers"] if step != state["normalizer"]["normalizers"][0]]
    first = [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in replaced]
    other = state | {"normalizer": {"type": "Sequence", "normalizers": [*first, *steps]}}
    with pytest.raises(ValueError, match=r"other strings are replaced|runs of blanks become"):
        UnigramEncoder(unigram_library(), other, FastNormalizer(other["normalizer"]["normalizers"]))
    backend = Tokenizer.from_str(json.dumps(other))
    backend.encode_special_tokens = True
    [found] = encoder.TextEncoder(json.dumps(other), np.dtype("<i4"), True).encode(["the ab\nn   people"])
    assert found.tolist() == backend.encode("the ab\nn   people").ids


def test_an_installation_without_the_c_code_says_so(monkeypatch, caplog):
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(unigram, "native_library", native.native_library.__wrapped__)
    assert unigram.unigram_library.__wrapped__() is None
    assert "was installed without its C code" in caplog.text
