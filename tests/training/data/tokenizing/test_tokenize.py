"""Folders that `tokenize_corpus` makes hold what SentencePiece and the tokenizer make of the same files."""

import gzip
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from corpus import KINDS, any_unicode, chinese, english, generate, runs
from fuzzing import read_tree
from sentencepiece import SentencePieceProcessor
from tiny_model import NUM_IMAGE_TOKENS, config_for

from glm_hf import GLMTokenizer
from glm_hf.training import CorpusSource, load_corpus, tokenize_corpus
from glm_hf.training.data.token_file import TokenFile, find_damage, open_token_file
from glm_hf.training.data.tokenizing import encoder, shards, sources

TEXTS = generate([english, chinese], 20, seed=7)
PAIRS = [{"inputs": f"the people [MASK] {text}", "targets": "a long day"} for text in generate([english], 20, seed=8)]


@pytest.fixture
def tokenize(model_folder, tmp_path):
    """Return a function that tokenizes files into `tmp_path / "out"` or another folder, and opens it."""

    def tokenize(*paths: object, out: str = "out", num_proc: int = 1, **options: object) -> TokenFile:
        folder = tmp_path / out
        tokenize_corpus(list(map(str, paths)), folder, tokenizer=model_folder, num_proc=num_proc, **options)
        corpus = open_token_file(folder)
        assert find_damage(corpus) == []
        assert sorted(path.name for path in folder.iterdir()) == ["boundaries.npy", "corpus.json", "tokens.bin"]
        assert not folder.with_name(f".{out}.partial").exists()
        return corpus

    return tokenize


@pytest.fixture(scope="module")
def ids_of(model_folder):
    """Return a function that encodes a text by SentencePiece."""
    processor = SentencePieceProcessor(model_file=str(model_folder.parent / "text.model"))
    return lambda text: [NUM_IMAGE_TOKENS + token for token in processor.encode(text)]


@pytest.fixture
def small_tasks(monkeypatch) -> None:
    monkeypatch.setattr(sources, "TASK_BYTES", 150)


def parts_of(corpus: TokenFile) -> list[list[int]]:
    ends = corpus.boundaries.tolist()
    return [corpus.tokens[start:end].tolist() for start, end in zip(ends[:-1], ends[1:], strict=True)]


def write(file: Path, data: list) -> Path:
    """Write records, or texts as records, as the ending of the file's name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": row} if isinstance(row, str) else row for row in data]
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=7)
        return file
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if ".txt" in file.suffixes:
        content = "\n".join(data).encode()
    if file.suffix == ".gz":
        content = gzip.compress(content[:99]) + gzip.compress(content[99:])  # as tools that compress in parallel do
    elif file.suffix == ".zst":
        content = pyarrow.Codec("zstd").compress(content, asbytes=True)
    file.write_bytes(content)
    return file


FILES = ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.zst", "a.parquet", "we [ird]* name?.jsonl"]


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("name", FILES)
def test_texts_become_the_ids_of_sentencepiece_and_end_in_eos(tokenizer, tokenize, tmp_path, name, ids_of):
    corpus = tokenize(write(tmp_path / name, TEXTS))
    assert parts_of(corpus) == [[*ids_of(text), tokenizer.eos_token_id] for text in TEXTS]
    assert corpus.facts["kind"] == "text"
    assert corpus.facts["source"] == str(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_a_text_file_is_one_document(tokenizer, tokenize, tmp_path, name):
    [document] = parts_of(tokenize(write(tmp_path / name, TEXTS)))
    assert document == [*tokenizer.encode("\n".join(TEXTS)), tokenizer.eos_token_id]


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("data", [TEXTS, PAIRS], ids=["texts", "instructions"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_training_reads_the_folder_as_it_reads_the_files(tokenizer, tokenize, tmp_path, data, name):
    file = write(tmp_path / name, data)
    config = config_for(tokenizer)
    expected = load_corpus(CorpusSource(str(file)), tokenizer, config, tmp_path / "cache", 64)
    found = tokenize(file, row_length=64)
    assert read_tree(found.folder) == read_tree(expected.folder)
    again = load_corpus(CorpusSource(str(found.folder)), tokenizer, config, tmp_path / "cache", 64)
    assert parts_of(again) == parts_of(expected)


@pytest.mark.parametrize("truncate_inputs", [False, True])
def test_instructions_may_have_other_fields_and_lose_their_beginning(tokenizer, tokenize, tmp_path, truncate_inputs):
    question, answer = "people time " * (60 if truncate_inputs else 3), "of the world"
    fields = {"inputs": "question", "targets": "answer", "truncate_inputs": truncate_inputs}
    file = write(tmp_path / "a.jsonl", [{"question": question, "answer": answer}] * 3)
    context, target = parts_of(tokenize(file, row_length=64, **fields))[:2]
    ids, special = tokenizer.encode(question), [tokenizer.mask_token_id, tokenizer.gmask_token_id]
    assert target == tokenizer.encode(answer)
    written = [token for token in context if token not in (*special, tokenizer.eos_token_id)]
    assert written == ids[len(ids) - len(written) :]
    assert len(written) == len(ids) if not truncate_inputs else len(context) + 1 + len(target) in (63, 64)


@pytest.mark.parametrize("task_bytes", [1, 2, 37, 1000])
def test_every_line_belongs_to_one_task_wherever_a_file_is_divided(tokenize, tmp_path, monkeypatch, task_bytes):
    texts = ["", "a", *TEXTS[:8], "time " * 50]
    file = write(tmp_path / "a.jsonl", texts)
    file.write_bytes(b"\n\n" + file.read_bytes().rstrip(b"\n"))  # blank lines, and no line break at the end
    whole = tokenize(file, out="whole")
    monkeypatch.setattr(sources, "TASK_BYTES", task_bytes)
    assert len(sources.plan_tasks([file])) == -(-file.stat().st_size // task_bytes)
    assert read_tree(tokenize(file).folder) == read_tree(whole.folder)


@pytest.mark.usefixtures("small_tasks")
def test_sources_of_several_kinds_come_in_their_order_and_those_of_a_folder_by_name(tokenize, tmp_path, ids_of):
    for number in (2, 0, 1):
        write(tmp_path / "data" / f"part-{number}.jsonl", TEXTS[number:30:3])
    write(tmp_path / "data" / ".hidden" / "part-3.jsonl", TEXTS)
    last, first = write(tmp_path / "z.parquet", TEXTS[30:35]), write(tmp_path / "a.txt", TEXTS[35:36])
    corpus = tokenize(last, tmp_path / "data", first)
    order = [*TEXTS[30:35], *TEXTS[0:30:3], *TEXTS[1:30:3], *TEXTS[2:30:3], TEXTS[35]]
    assert [part[:-1] for part in parts_of(corpus)] == [ids_of(text) for text in order]
    assert corpus.facts["source"] == "out"


@pytest.mark.usefixtures("small_tasks")
def test_any_number_of_processes_makes_the_same_bytes(tokenize, tmp_path):
    for number, name in enumerate(FILES[:5]):
        write(tmp_path / "data" / f"{number}-{name}", TEXTS)
    one = tokenize(tmp_path / "data", out="one")
    many = tokenize(tmp_path / "data", out="many", num_proc=3)
    assert read_tree(many.folder) == read_tree(one.folder)


def test_a_corpus_of_many_blocks_has_the_hash_of_each(tokenize, tmp_path, monkeypatch):
    from glm_hf.training.data import token_file
    from glm_hf.training.data.tokenizing import growing_corpus

    for module in (token_file, growing_corpus):
        monkeypatch.setattr(module, "BLOCK_BYTES", 256)
    monkeypatch.setattr(sources, "TASK_BYTES", 150)
    corpus = tokenize(write(tmp_path / "a.jsonl", TEXTS))  # where all blocks are compared
    assert len(corpus.facts["xxh3_64"]["tokens.bin"]) > 2
    assert len(corpus.facts["xxh3_64"]["boundaries.npy"]) > 1


def tokenizer_of(model_folder: Path, preserve_linebreaks: bool = True) -> GLMTokenizer:
    return GLMTokenizer.from_sentencepiece(
        model_folder.parent / "text.model", NUM_IMAGE_TOKENS, preserve_linebreaks=preserve_linebreaks
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_long_text_in_pieces_has_the_ids_of_the_whole(tokenizer, monkeypatch, seed):
    rng = random.Random(seed)
    lines = generate([*KINDS, runs, any_unicode], 60, seed=seed)
    ends = ["\n", "\n", "\n\n", " \n", "\n  ", "\t", "\r\n", "\n\u0338", "\n\u0301", "<n>", "\n\u1161", "\u0600\n"]
    text = "".join(line + rng.choice(ends) for line in lines)
    monkeypatch.setattr(encoder, "PIECE_CHARACTERS", 5)
    texts = encoder.TextEncoder(tokenizer.backend_tokenizer.to_str(), "<i4", True)
    pieces = list(texts.pieces(text))
    assert len(pieces) > 100
    ids = [
        found[num_dropped:]
        for found, (_, num_dropped, _) in zip(texts.encode([p for p, _, _ in pieces]), pieces, strict=True)
    ]
    assert [i for part in ids for i in part] == tokenizer.encode(text, split_special_tokens=True)


def test_only_symbols_that_the_tokenizer_isolates_are_places_to_cut(model_folder, tokenizer):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    assert encoder.cut_symbols(state) == "\n"
    for symbol in ("x<", "a<n", "<n><n>", "a<n>b"):
        pattern = "|".join((symbol, "<n>"))
        split = state["pre_tokenizer"] | {"pattern": {"Regex": pattern}}
        assert encoder.cut_symbols(state | {"pre_tokenizer": split}) == ""
    split = state["pre_tokenizer"] | {"pattern": {"Regex": r"<\|tab\|>|<n>"}}
    assert encoder.cut_symbols(state | {"pre_tokenizer": split}) == "\n"  # without a step that makes tabs of it
    own = state | {"added_tokens": [*state["added_tokens"], state["added_tokens"][0] | {"special": False}]}
    assert encoder.cut_symbols(own) == ""
    without = tokenizer_of(model_folder, preserve_linebreaks=False)
    assert encoder.cut_symbols(json.loads(without.backend_tokenizer.to_str())) == ""


def test_documents_longer_than_a_batch_keep_their_ends(tokenizer, tokenize, tmp_path, monkeypatch):
    texts = ["\n".join(TEXTS), "", *TEXTS[:5], "\n".join(TEXTS * 2), " ", TEXTS[0]]
    monkeypatch.setattr(encoder, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 70)
    found = parts_of(tokenize(write(tmp_path / "a.jsonl", texts)))
    assert found == [[*ids, tokenizer.eos_token_id] for ids in map(tokenizer.encode, texts) if ids]


def test_a_long_text_without_a_place_to_cut_is_refused(tokenize, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(encoder, "MOST_UNCUT_CHARACTERS", 400)
    tokenize(write(tmp_path / "a.jsonl", ["time " * 75 + "\n" + "time " * 75]))
    bad = write(tmp_path / "b.jsonl", ["a", "time\n" + "time " * 85])
    with pytest.raises(ValueError, match="line 2 of .*b.jsonl: it has 400 characters without a line break or tab"):
        tokenize(bad, out="b")
