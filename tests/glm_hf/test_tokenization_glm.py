import copy
import pickle
import random
import socket
import struct
import subprocess
import sys
import unicodedata
from pathlib import Path

import huggingface_hub.constants
import pytest
from corpus import CODE_POINTS, KINDS, any_unicode, generate, runs
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer, TokenizersBackend

from glm_hf.configuration_glm import GLMConfig
from glm_hf.tokenization_glm import GLMTokenizer

SYMBOLS = ["<n>", "<|tab|>", *(f"<|blank_{k}|>" for k in range(2, 81))]
SPECIAL_NAMES = ["mask", "gmask", "smask", "eod", "sop", "eop", "enc", "dblock"]
LINES = generate(KINDS, 1500, seed=1)
VARIANTS = {
    "identity": {"normalization_rule_name": "identity"},
    "identity, blanks kept": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "bytes": {"byte_fallback": True, "remove_extra_whitespaces": False},
    "no dummy prefix": {"add_dummy_prefix": False, "byte_fallback": True},
    "lower case": {"normalization_rule_name": "nmt_nfkc_cf"},
}


def train(folder: Path, model_type: str, **options) -> str:
    options = {"user_defined_symbols": SYMBOLS, "normalization_rule_name": "nmt_nfkc", **options}
    SentencePieceTrainer.train(
        sentence_iterator=iter(line.replace("\n", " ") for line in generate([*KINDS, runs], 200, seed=0)),
        model_prefix=str(folder / "text"),
        model_type=model_type,
        vocab_size=1200,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return str(folder / "text.model")


def append(model_file: str, path: Path, pieces: list[str], score: float) -> str:
    """Copy a model with further pieces: in its file format, messages that follow each other are one message."""
    content = bytearray(Path(model_file).read_bytes())
    for text in map(str.encode, pieces):
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score)
        content += b"\x0a" + bytes([len(piece)]) + piece
    path.write_bytes(content)
    return str(path)


def with_symbols(text: str) -> str:
    """Write whitespace as icetk does before it calls SentencePiece."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for k in range(80, 1, -1):
        text = text.replace(" " * k, f"<|blank_{k}|>")
    return text


def differences(tokenizer, lines: list[str], expected: list[list[int]], offset: int) -> list[tuple]:
    found = tokenizer(lines)["input_ids"]
    shifted = [[piece + offset for piece in pieces] for pieces in expected]
    return [case for case in zip(lines, found, shifted, strict=True) if case[1] != case[2]]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def model_file(request, tmp_path_factory) -> str:
    return train(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def sentencepiece(model_file) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=model_file)


@pytest.fixture(scope="module")
def tokenizer(model_file) -> GLMTokenizer:
    return GLMTokenizer.from_sentencepiece(model_file, num_image_tokens=50)


@pytest.fixture(scope="module")
def unigram_file(tmp_path_factory) -> str:
    return train(tmp_path_factory.mktemp("plain"), "unigram")


@pytest.fixture(scope="module")
def lossless(tmp_path_factory) -> GLMTokenizer:
    """Return a tokenizer whose model normalises nothing and knows every byte."""
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    return GLMTokenizer.from_sentencepiece(train(tmp_path_factory.mktemp("lossless"), "bpe", **options))


@pytest.fixture(scope="module")
def released(unigram_file, tmp_path_factory) -> GLMTokenizer:
    """Return a tokenizer with as many pieces as icetk's."""
    missing = 130000 - SentencePieceProcessor(model_file=unigram_file).piece_size()
    path = tmp_path_factory.mktemp("released") / "ice_text.model"
    return GLMTokenizer.from_sentencepiece(
        append(unigram_file, path, [f"\u2581filler{i}" for i in range(missing)], -30.0)
    )


@pytest.fixture
def folder(tokenizer, tmp_path) -> Path:
    names = [*SPECIAL_NAMES[:6], "eos", "pad"]
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    GLMConfig(vocab_size=len(tokenizer), hidden_size=8, num_attention_heads=2, **ids).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_corpus_has_ten_thousand_lines():
    assert len(LINES) >= 10_000


def test_ids_equal_sentencepiece_with_whitespace_kept(tokenizer, sentencepiece):
    expected = sentencepiece.encode([with_symbols(line) for line in LINES])
    assert differences(tokenizer, LINES, expected, offset=50) == []


def test_ids_equal_sentencepiece_with_whitespace_left_to_the_model(model_file, sentencepiece):
    tokenizer = GLMTokenizer.from_sentencepiece(model_file, num_image_tokens=0, preserve_linebreaks=False)
    assert differences(tokenizer, LINES, sentencepiece.encode(LINES), offset=0) == []


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_ids_equal_sentencepiece_for_every_kind_of_model(model_type, options, tmp_path):
    path = train(tmp_path, model_type, **options)
    sentencepiece, lines = SentencePieceProcessor(model_file=path), LINES[:2100]
    expected = sentencepiece.encode([with_symbols(line) for line in lines])
    assert differences(GLMTokenizer.from_sentencepiece(path, 0), lines, expected, offset=0) == []


def test_ids_equal_sentencepiece_without_whitespace_symbols(tmp_path):
    path = train(tmp_path, "unigram", user_defined_symbols=[])
    expected = SentencePieceProcessor(model_file=path).encode(LINES[:2100])
    assert differences(GLMTokenizer.from_sentencepiece(path, 0), LINES[:2100], expected, offset=0) == []


def test_of_two_symbols_the_longer_wins(tmp_path):
    path = train(tmp_path, "bpe", user_defined_symbols=["<m>", "<m>the", "<m><m>"])
    tokenizer, text = GLMTokenizer.from_sentencepiece(path, 0), "the <m>the people <m><m><m> <m>er <m"
    assert tokenizer(text)["input_ids"] == SentencePieceProcessor(model_file=path).encode(text)
    assert {"<m>", "<m>the", "<m><m>"} <= set(tokenizer.tokenize(text))


def test_bpe_merges_by_score_and_not_by_place_in_the_file(tmp_path):
    path = train(tmp_path, "bpe")
    vocab = GLMTokenizer.from_sentencepiece(path).get_vocab()
    first, second = next((a, b) for a in "twsb" for b in "twsb" if a + b not in vocab)
    path = append(path, tmp_path / "appended.model", [first + second], score=1.0)
    tokenizer, sentencepiece = GLMTokenizer.from_sentencepiece(path, 0), SentencePieceProcessor(model_file=path)
    assert f"\u2581{first}" in vocab
    assert tokenizer.tokenize(first + second) == ["\u2581", first + second]
    assert tokenizer(first + second)["input_ids"] == sentencepiece.encode(first + second)


def test_runs_of_one_character_differ_only_between_equally_likely_segmentations(tokenizer, sentencepiece):
    """In `====...` the same pieces in another order score the same; SentencePiece's float32 rounding picks one."""
    lines = generate([runs], 1000, seed=2)
    unequal = differences(tokenizer, lines, sentencepiece.encode(lines), offset=50)
    if type(tokenizer.backend_tokenizer.model).__name__ == "BPE":
        assert unequal == []
    assert all(sorted(found) == sorted(expected) for _, found, expected in unequal)
    assert len(unequal) < len(lines) / 2


def test_any_unicode_is_normalised_like_sentencepiece_and_then_composed(model_file, sentencepiece):
    """Marks in an unusual order, or after a letter that already carries one, are all that NFC changes on top."""
    tokenizer = GLMTokenizer.from_sentencepiece(model_file, num_image_tokens=0, preserve_linebreaks=False)
    lines = generate([any_unicode], 4000, seed=3)
    normalize = tokenizer.backend_tokenizer.normalizer.normalize_str
    composed = [line for line in lines if unicodedata.is_normalized("NFC", sentencepiece.normalize(line))]
    assert [normalize(line) for line in lines] == [
        unicodedata.normalize("NFC", line) for line in sentencepiece.normalize(lines)
    ]
    assert len(composed) > 0.9 * len(lines)
    assert differences(tokenizer, composed, sentencepiece.encode(composed), offset=0) == []


@pytest.mark.parametrize(
    "text", ["cafe\u0301", "A\u0301 \uff21\u0301", "\u1112\u1161\u11ab", "\u304b\u3099", "a\r\nb"]
)
def test_graphemes_of_several_characters_are_normalised_whole(text, tokenizer, sentencepiece):
    assert tokenizer(text)["input_ids"] == [50 + piece for piece in sentencepiece.encode(with_symbols(text))]


def test_newline_tab_and_blanks_have_their_own_tokens(tokenizer):
    text = "a\n\n\tb" + " " * 83 + "c"
    assert tokenizer.tokenize(text)[-6:] == ["<n>", "<|tab|>", "b", "<|blank_80|>", "<|blank_3|>", "c"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_released_ids_follow_the_pieces(released):
    ids = [getattr(released, f"{name}_token_id") for name in SPECIAL_NAMES]
    assert ids == list(range(150000, 150008))
    assert (released.eos_token_id, released.pad_token_id, released.unk_token_id) == (20002, 0, 20000)
    assert (released.vocab_size, len(released)) == (150000, 150008)
    config = GLMConfig()
    names = ["mask", "gmask", "smask", "eod", "sop", "eop", "eos", "pad"]
    assert all(getattr(config, f"{name}_token_id") == getattr(released, f"{name}_token_id") for name in names)
    assert released.convert_ids_to_tokens([150000, 150001, 150002]) == ["[MASK]", "[gMASK]", "[sMASK]"]


def test_large_tokenizer_loads_from_a_folder_without_asking_the_network(released, tmp_path, monkeypatch):
    lookups = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: lookups.append(args))
    released.save_pretrained(tmp_path)
    loaded = GLMTokenizer.from_pretrained(tmp_path)
    assert loaded("People [MASK]")["input_ids"] == released("People [MASK]")["input_ids"]
    assert lookups == []


def test_specials_inside_words_are_ordinary_text(tokenizer, sentencepiece):
    text = "People soporific eod sop eop ENC dBLOCK MASK <s> </s> <unk> <0x0A> 你eop好"
    assert tokenizer(text)["input_ids"] == [50 + piece for piece in sentencepiece.encode(text)]


def test_masks_in_text_are_recognised_and_split_it_into_separately_encoded_parts(tokenizer, sentencepiece):
    def pieces(text):
        return [50 + piece for piece in sentencepiece.encode(text)]

    expected = [*pieces("the "), tokenizer.mask_token_id, *pieces(" is"), tokenizer.gmask_token_id]
    assert tokenizer("the [MASK] is[gMASK]")["input_ids"] == expected
    assert tokenizer("[sMASK]")["input_ids"] == [tokenizer.smask_token_id]


def test_every_special_token_encodes_to_itself(tokenizer):
    ids = tokenizer(tokenizer.all_special_tokens)["input_ids"]
    assert ids == [[token_id] for token_id in tokenizer.all_special_ids]


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False, "byte_fallback": True}])
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_split_special_tokens_leaves_no_way_from_text_to_a_special_id(model_type, options, tmp_path):
    path = train(tmp_path, model_type, **options)
    tokenizer, sentencepiece = GLMTokenizer.from_sentencepiece(path, 50), SentencePieceProcessor(model_file=path)
    contents = [*tokenizer.all_special_tokens, "<| <s> |>", "<| image 7 |>", "<s>", "</s>", "<unk>", "<0x0A>", "\n"]
    for text in [*contents, *(a + b for a in contents for b in contents)]:
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert ids == [50 + piece for piece in sentencepiece.encode(with_symbols(text))]


def test_encoding_adds_no_special_token(tokenizer):
    assert tokenizer("")["input_ids"] == []
    assert tokenizer("the people")["input_ids"] == tokenizer("the people", add_special_tokens=False)["input_ids"]
    assert not set(tokenizer("the people")["input_ids"]) & set(tokenizer.all_special_ids)


def test_padding_goes_left_with_id_zero_and_is_masked(tokenizer):
    batch = tokenizer(["the people", "the"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][1, -1] == tokenizer("the")["input_ids"][-1]
    padding = batch["attention_mask"][1] == 0
    assert padding.sum() >= 1
    assert batch["input_ids"][1][padding].tolist() == [0] * int(padding.sum())
    assert padding.tolist() == sorted(padding.tolist(), reverse=True)


def test_without_image_tokens_pads_with_the_model_own_piece(unigram_file, tmp_path):
    tokenizer = GLMTokenizer.from_sentencepiece(unigram_file, num_image_tokens=0)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (0, 2, 1200)
    path = train(tmp_path, "bpe", pad_id=3)
    assert GLMTokenizer.from_sentencepiece(path, num_image_tokens=0).pad_token_id == 3
    assert GLMTokenizer.from_sentencepiece(path, num_image_tokens=5).pad_token_id == 0


def test_added_tokens_are_numbered_after_the_specials(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    assert tokenizer.add_tokens(["<new>"]) == 1
    assert tokenizer.convert_tokens_to_ids("<new>") == tokenizer.dblock_token_id + 1 == len(tokenizer) - 1


@pytest.mark.parametrize("copies", [lambda t: pickle.loads(pickle.dumps(t)), copy.deepcopy])
def test_copies_encode_alike(copies, tokenizer):
    copied = copies(tokenizer)
    assert copied("the [MASK]\n")["input_ids"] == tokenizer("the [MASK]\n")["input_ids"]
    assert copied.sop_token_id == tokenizer.sop_token_id


def test_saved_twice_it_still_encodes_decodes_and_names_tokens_alike(tokenizer, folder):
    again = folder / "again"
    GLMTokenizer.from_pretrained(folder).save_pretrained(again)
    loaded = GLMTokenizer.from_pretrained(again)
    ids = tokenizer(LINES[:700])["input_ids"]
    assert loaded(LINES[:700])["input_ids"] == ids
    assert loaded.batch_decode(ids) == tokenizer.batch_decode(ids)
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert set(loaded.all_special_ids) == set(tokenizer.all_special_ids)
    assert (loaded.padding_side, loaded.model_input_names) == ("left", ["input_ids", "attention_mask"])
    assert len(loaded) == len(tokenizer)


def test_auto_tokenizer_gives_the_registered_class(tokenizer, folder):
    AutoTokenizer.register(GLMConfig, tokenizer_class=GLMTokenizer, exist_ok=True)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert type(loaded) is GLMTokenizer
    assert loaded("the [MASK]")["input_ids"] == tokenizer("the [MASK]")["input_ids"]


def test_auto_tokenizer_without_glm_hf_gives_the_same_ids(tokenizer, folder):
    script = (
        "import sys; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1]); "
        "print(type(t).__name__, t.padding_side, t.sop_token_id, *t('the [MASK] people')['input_ids'])"
    )
    run = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    ids = tokenizer("the [MASK] people")["input_ids"]
    assert run.stdout.split() == [TokenizersBackend.__name__, "left", *map(str, [tokenizer.sop_token_id, *ids])]


def test_decode_restores_any_text_exactly(lossless):
    rng = random.Random(4)
    blocks = [
        *map(chr, CODE_POINTS),
        *LINES[:700],
        "👩‍👩‍👧",
        "\u202eאבג\u202c",
        "\x00\x1b",
        "[MASK]",
        " [gMASK] ",
        "  ",
    ]
    for _ in range(3000):
        text = "".join(rng.choice([rng.choice(blocks), rng.choice(blocks[-8:])]) for _ in range(rng.randint(1, 12)))
        if "<n>" not in text:  # which is how a line break is written
            assert lossless.decode(lossless(text)["input_ids"]) == text


@pytest.mark.parametrize("text", ["a [MASK] b", "a[MASK]b", " [MASK]  b ", "[gMASK][sMASK] ", "a\n[MASK]\n\tb"])
def test_decode_keeps_blanks_around_masks(text, lossless):
    assert lossless.decode(lossless(text)["input_ids"]) == text


def test_decode_equals_sentencepiece_part_by_part(tokenizer, sentencepiece):
    for line in generate(KINDS[:5], 200, seed=5):
        pieces = sentencepiece.encode(with_symbols(line))
        if sentencepiece.unk_id() not in pieces:
            part = sentencepiece.decode(pieces)
            for k in range(80, 1, -1):
                part = part.replace(f"<|blank_{k}|>", " " * k)
            part = part.replace("<n>", "\n").replace("<|tab|>", "\t")
            assert tokenizer.decode(tokenizer(line + "[MASK]" + line)["input_ids"]) == part + "[MASK]" + part


def test_decode_can_leave_out_special_tokens(tokenizer):
    ids = [*tokenizer("the people")["input_ids"], tokenizer.sop_token_id, tokenizer.eop_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the people"
    assert tokenizer.decode(ids) == "the people<|startofpiece|><|endofpiece|>"


def test_offsets_point_into_the_text(tokenizer):
    text = "the people [MASK] work\nwell"
    encoding = tokenizer(text, return_offsets_mapping=True)
    offsets = encoding["offset_mapping"]
    assert offsets == sorted(offsets)
    assert all(0 <= start < end <= len(text) for start, end in offsets)
    start, end = offsets[encoding["input_ids"].index(tokenizer.mask_token_id)]
    assert text[start:end] == "[MASK]"
    joined = "".join(text[start:end] for start, end in offsets)
    assert joined.replace(" ", "") == text.replace(" ", "")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.model"):
        GLMTokenizer.from_sentencepiece(tmp_path / "nothing.model")


@pytest.mark.parametrize("content", [b"", b"just some text\n", bytes(100)])
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "text.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"must be a SentencePiece model, but .*text\.model is none"):
        GLMTokenizer.from_sentencepiece(tmp_path / "text.model")


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("char", {}, "model must be unigram or bpe, got char"),
        ("word", {}, "model must be unigram or bpe, got word"),
        ("bpe", {"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ("bpe", {"eos_id": -1}, "eos_id"),
        ("bpe", {"user_defined_symbols": ["[MASK]"]}, r"special tokens itself, got \[MASK\]"),
        ("bpe", {"user_defined_symbols": ["<A>"], "normalization_rule_name": "nmt_nfkc_cf"}, "changes.*<A>"),
    ],
)
def test_models_that_cannot_be_reproduced_are_refused(model_type, options, message, tmp_path):
    path = train(tmp_path, model_type, **options)
    with pytest.raises(ValueError, match=message):
        GLMTokenizer.from_sentencepiece(path)


def test_negative_number_of_image_tokens_is_refused(unigram_file):
    with pytest.raises(ValueError, match="at least 0, got -1"):
        GLMTokenizer.from_sentencepiece(unigram_file, num_image_tokens=-1)
