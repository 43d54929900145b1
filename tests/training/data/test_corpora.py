"""Corpora are compared with what SentencePiece makes of their texts, and bad ones end in one clear error."""

import copy
import gzip
import json
import os
import threading
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from corpus import chinese, english, generate
from sentencepiece import SentencePieceProcessor
from tiny_model import NUM_IMAGE_TOKENS, config_for

from glm_hf import GLMConfig, GLMTokenizer
from glm_hf.infilling_glm import prepare_context
from glm_hf.training import CorpusSource, load_corpus
from glm_hf.training.data import corpora
from glm_hf.training.data.token_file import TokenFile, write_token_file
from glm_hf.training.data.tokenizing import records, shards, sources
from glm_hf.training.data.tokenizing.encoder import fingerprint

TEXTS = generate([english, chinese], 20, seed=7)
ROW_LENGTH = 64


@pytest.fixture(scope="module")
def config(tokenizer) -> GLMConfig:
    return config_for(tokenizer)


@pytest.fixture
def load(tokenizer, config, tmp_path):
    """Return a function that opens a corpus with the cache in `tmp_path / "cache"`, given as a string."""

    def load(path: object, row_length: int = ROW_LENGTH, **fields: object) -> TokenFile:
        source = CorpusSource(str(path), **fields)
        return load_corpus(source, tokenizer, config, str(tmp_path / "cache"), row_length)

    return load


@pytest.fixture
def count_runs(monkeypatch) -> list[str]:
    """Every time that a corpus is tokenized, its path."""
    runs = []
    of_files, of_hub = corpora.tokenize_files, corpora._HubReader.parts
    monkeypatch.setattr(corpora, "tokenize_files", lambda *args: runs.append(args[5]) or of_files(*args))
    monkeypatch.setattr(corpora._HubReader, "parts", lambda reader: runs.append(reader.source.path) or of_hub(reader))
    return runs


def write_lines(file: Path, records: list[object]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if file.suffix == ".gz" else open)(file, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return file


def write_texts(file: Path, texts: list[str], field: str = "text") -> Path:
    records = [{field: text} for text in texts]
    if file.suffix == ".parquet":
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(records).to_parquet(file)
        return file
    return write_lines(file, records)


def parts_of(corpus: TokenFile) -> list[list[int]]:
    ends = corpus.boundaries.tolist()
    return [corpus.tokens[start:end].tolist() for start, end in zip(ends[:-1], ends[1:], strict=True)]


@pytest.fixture(scope="module")
def ids_of(model_folder):
    """Return a function that encodes a text by SentencePiece."""
    processor = SentencePieceProcessor(model_file=str(model_folder.parent / "text.model"))
    return lambda text: [NUM_IMAGE_TOKENS + token for token in processor.encode(text)]


def folders(cache: Path) -> list[str]:
    return [path.name for path in cache.glob("*") if path.is_dir()] if cache.exists() else []


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "we [ird]* name?.jsonl"])
def test_texts_become_the_ids_of_the_tokenizer_and_end_in_eos(tokenizer, load, tmp_path, name, ids_of):
    corpus = load(write_texts(tmp_path / name, TEXTS))
    assert parts_of(corpus) == [[*ids_of(text), tokenizer.eos_token_id] for text in TEXTS]
    assert corpus.facts["kind"] == "text"
    assert corpus.facts["source"] == str(tmp_path / name)
    assert corpus.num_documents == len(TEXTS)


@pytest.mark.parametrize("mark", ["", "\ufeff", "\n "])
def test_a_file_may_hold_one_array_of_records(load, tmp_path, mark):
    records = [{"text": text} for text in TEXTS]
    (tmp_path / "a.json").write_text(mark + json.dumps(records, indent=1), encoding="utf-8")
    assert parts_of(load(tmp_path / "a.json")) == parts_of(load(write_lines(tmp_path / "b.jsonl", records)))


def test_a_byte_order_mark_is_no_part_of_the_first_line(load, tmp_path):
    file = write_texts(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert parts_of(load(tmp_path / "b.jsonl")) == parts_of(load(file))


def test_more_documents_than_a_batch_keep_their_order(tokenizer, load, tmp_path, monkeypatch, ids_of):
    monkeypatch.setattr(corpora, "DOCUMENTS_AT_ONCE", 7)
    corpus = load(write_texts(tmp_path / "a.jsonl", TEXTS))
    assert parts_of(corpus) == [[*ids_of(text), tokenizer.eos_token_id] for text in TEXTS]


def test_texts_without_a_token_are_left_out(load, tmp_path):
    corpus = load(write_texts(tmp_path / "a.jsonl", ["", *TEXTS[:3], "", TEXTS[3]]))
    assert parts_of(corpus) == parts_of(load(write_texts(tmp_path / "b.jsonl", TEXTS[:4])))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".jsonl.gz"])
@pytest.mark.parametrize("pattern", ["data", "data/*", "data/part-[0-9]*"])
def test_files_of_a_folder_or_pattern_come_in_the_order_of_their_names(load, tmp_path, suffix, pattern):
    for number in (2, 0, 1):
        write_texts(tmp_path / "data" / f"part-{number}{suffix}", TEXTS[number::3])
    whole = load(write_texts(tmp_path / "whole.jsonl", [*TEXTS[0::3], *TEXTS[1::3], *TEXTS[2::3]]))
    assert parts_of(load(tmp_path / pattern)) == parts_of(whole)


def test_a_folder_is_searched_to_the_bottom_and_other_files_left_alone(load, tmp_path):
    write_texts(tmp_path / "data" / "deep" / "er" / "a.jsonl", TEXTS[:2])
    (tmp_path / "data" / "README.md").write_text("about")
    assert load(tmp_path / "data").num_documents == 2


def test_an_empty_file_among_others_is_no_error(load, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.jsonl").touch()
    write_texts(tmp_path / "data" / "1.jsonl", TEXTS)
    assert load(tmp_path / "data").num_documents == len(TEXTS)


def test_another_field_may_hold_the_text(load, tmp_path):
    corpus = load(write_texts(tmp_path / "a.jsonl", TEXTS, field="content"), text="content")
    assert corpus.num_documents == len(TEXTS)


@pytest.mark.parametrize("mask", ["[MASK]", "[gMASK]", "[sMASK]", "<|startofpiece|>", "<|endofdocument|>"])
def test_a_special_token_typed_in_a_text_stays_text(tokenizer, load, tmp_path, ids_of, mask):
    text = f"the people {mask} of the world"
    ids = parts_of(load(write_texts(tmp_path / "a.jsonl", [text])))[0][:-1]
    assert ids == ids_of(text)
    assert not {*ids} & {*range(len(tokenizer) - 8, len(tokenizer))}
    targets = write_lines(tmp_path / "b.jsonl", [{"inputs": "the people", "targets": text}])
    assert parts_of(load(targets))[1] == ids


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("the people [MASK] of the world", ["the people ", "mask", " of the world", "eos"]),
        ("the people of the world [gMASK]", ["the people of the world ", "gmask"]),
        ("the people [sMASK]", ["the people ", "smask"]),
        ("the people of the world", ["the people of the world", "gmask"]),
        ("[MASK] of [MASK] world", ["mask", " of ", "mask", " world", "eos"]),
    ],
)
def test_inputs_are_completed_like_the_context_of_a_prompt(tokenizer, config, load, tmp_path, ids_of, text, parts):
    corpus = load(write_lines(tmp_path / "a.jsonl", [{"inputs": text, "targets": "a long day"}]))
    special = {name: [getattr(tokenizer, f"{name}_token_id")] for name in ("mask", "gmask", "smask", "eos")}
    context, target = parts_of(corpus)
    assert context == [token for part in parts for token in special.get(part) or ids_of(part)]
    assert context == prepare_context(tokenizer(text)["input_ids"], config)
    assert target == ids_of("a long day")
    assert corpus.facts["kind"] == "instructions"
    assert corpus.num_documents == 1


def test_instructions_may_have_other_fields(load, tmp_path):
    records = [{"question": "the people", "answer": "of the world"}] * 3
    corpus = load(write_lines(tmp_path / "a.jsonl", records), inputs="question", targets="answer")
    assert corpus.num_documents == 3


def test_an_instruction_may_fill_a_row_to_the_last_token(load, tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"inputs": "people time " * 5, "targets": "way"}])
    context, target = map(len, parts_of(load(file)))
    assert list(map(len, parts_of(load(file, row_length=context + 1 + target)))) == [context, target]
    with pytest.raises(ValueError, match="do not fit"):
        load(file, row_length=context + target)


@pytest.mark.parametrize("mask", ["", "[MASK]", "[gMASK]"])
@pytest.mark.parametrize("more", ["", " way"])
def test_inputs_too_long_lose_their_beginning_if_that_is_wished(load, tmp_path, mask, more):
    record = {"inputs": "people time " * 100 + mask + more, "targets": "way of life"}
    file = write_lines(tmp_path / "a.jsonl", [record])
    whole = parts_of(load(file, row_length=1000))
    context, target = parts_of(load(file, truncate_inputs=True))
    assert target == whole[1]
    assert context == whole[0][-len(context) :]
    is_complete = mask and not more  # nothing is added to it
    assert len(context) + 1 + len(target) == ROW_LENGTH - bool(is_complete)
    short = write_lines(tmp_path / "b.jsonl", [{"inputs": "people", "targets": "way"}])
    assert parts_of(load(short, truncate_inputs=True)) == parts_of(load(short))


def test_a_tokenized_corpus_is_not_tokenized_again(load, tmp_path, count_runs):
    file = write_texts(tmp_path / "a.jsonl", TEXTS)
    first = load(file)
    assert parts_of(load(file, weight=3.0, join_documents=False)) == parts_of(first)
    assert count_runs == [str(file)]
    assert len(folders(tmp_path / "cache")) == 1


@pytest.mark.parametrize("change", ["content", "time", "row length", "truncation", "tokenizer", "new file"])
def test_a_corpus_is_tokenized_again_when_something_changed(tokenizer, config, tmp_path, count_runs, change):
    path, row_length, fields = tmp_path / "data", ROW_LENGTH, {}
    file = write_texts(path / "a.jsonl", TEXTS)
    load_corpus(CorpusSource(str(path)), tokenizer, config, tmp_path / "cache", row_length)
    if change == "content":
        write_texts(file, TEXTS[:3])
    elif change == "time":
        os.utime(file, ns=(1, 1))
    elif change == "row length":
        row_length += 1
    elif change == "truncation":
        fields["truncate_inputs"] = True
    elif change == "tokenizer":
        tokenizer = other_tokenizer(tokenizer)
    else:
        write_texts(path / "b.jsonl", TEXTS)
    again = load_corpus(CorpusSource(str(path), **fields), tokenizer, config, tmp_path / "cache", row_length)
    assert len(count_runs) == 2
    assert again.num_documents == {"content": 3, "new file": 2 * len(TEXTS)}.get(change, len(TEXTS))


def other_tokenizer(tokenizer: GLMTokenizer) -> GLMTokenizer:
    """A tokenizer with one token more, of an id that the model has a row for."""
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["wholly new"])
    return other


def test_a_call_that_pads_and_truncates_does_not_make_it_another_tokenizer(tokenizer, load, tmp_path, count_runs):
    file = write_texts(tmp_path / "a.jsonl", TEXTS)
    folder = load(file).folder
    tokenizer(["people", "people time way"], padding=True, truncation=True, max_length=2)
    load(file)
    load(folder)
    assert len(count_runs) == 1


def test_a_tokenized_folder_is_a_corpus_without_its_files(load, tmp_path):
    file = write_texts(tmp_path / "a.jsonl", TEXTS)
    corpus = load(file)
    corpus.folder.rename(tmp_path / "elsewhere")
    file.unlink()
    assert parts_of(load(tmp_path / "elsewhere")) == parts_of(corpus)


def test_of_several_processes_one_tokenizes(load, tmp_path, count_runs):
    file = write_texts(tmp_path / "a.jsonl", TEXTS)
    found = []
    threads = [threading.Thread(target=lambda: found.append(parts_of(load(file)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert found[1:] == found[:-1]
    assert len(count_runs) == 1


def test_datasets_of_the_hub_are_streamed(tokenizer, load, monkeypatch, count_runs, ids_of):
    calls = []

    def load_dataset(*names: object, **options: object) -> datasets.IterableDataset:
        calls.append((names, options))
        return datasets.Dataset.from_list([{"text": text} for text in TEXTS]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = load("owner/name", name="zh", split="validation")
    assert calls == [(("owner/name", "zh"), {"split": "validation", "streaming": True})]
    assert parts_of(corpus) == [[*ids_of(text), tokenizer.eos_token_id] for text in TEXTS]
    load("owner/name", name="zh", split="validation")
    load("owner/name", name="en", split="validation")
    assert len(count_runs) == 2


def test_a_name_that_neither_a_file_nor_the_hub_has_is_an_error(load, monkeypatch):
    def load_dataset(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'dta' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="dta is no file here, and no dataset .*: Dataset 'dta' doesn't exist"):
        load("dta")


PAIR = {"inputs": "the people [MASK]", "targets": "of"}
BAD_RECORDS = {
    "empty": ([], "name is empty: it holds no document"),
    "empty texts": ([{"text": ""}] * 2, "name is empty: none of its 2 documents holds any text"),
    "missing field": ([{"txt": "a", "n": 1}], "'text', or 'inputs' and 'targets', got 'txt', 'n'"),
    "no targets": ([{"inputs": "a"}], "'text', or 'inputs' and 'targets', got 'inputs'"),
    "null": ([{"text": "a"}, {"text": None}], "record 2 of owner/name must have a string in 'text', got None"),
    "null later": ([{"text": "a"}] * 1500 + [{"text": None}], "record 1501 of owner/name must have a string"),
    "numbers": ([{"text": 5}], "record 1 of owner/name must have a string in 'text', got 5"),
    "null inputs": (
        [PAIR, PAIR | {"inputs": None}],
        "record 2 of owner/name must have a string in 'inputs'",
    ),
    "empty targets": ([PAIR] * 1200 + [PAIR | {"targets": ""}], "record 1201 of owner/name: 'targets' is empty"),
    "only a mask": ([PAIR | {"inputs": "[MASK]"}], "record 1 of owner/name: the text holds nothing but"),
    "two kinds of masks": ([PAIR, PAIR | {"inputs": "a [MASK] [gMASK]"}], "record 2 of owner/name: .* mixes .MASK"),
    "long": ([{"text": "time " * 300}], "record 1 of owner/name has 1,500 bytes, more than 1,000; split it, or raise"),
}


@pytest.mark.parametrize(("records", "message"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_record_of_the_hub_is_an_error_that_says_where(load, tmp_path, monkeypatch, records, message):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Records(records))
    with pytest.raises(ValueError, match=message):
        load("owner/name", max_record_size=1000)
    assert not folders(tmp_path / "cache")


class Records(list):
    """Records as a dataset of the Hub has them."""

    def iter(self, batch_size):
        for start in range(0, len(self), batch_size):
            batch = self[start : start + batch_size]
            yield {name: [record.get(name) for record in batch] for name in batch[0]}


BAD_FILES = {
    "no JSON": ("a.jsonl", '{"text": "a"}\n' * 20_000 + "nope\n", "line 20001 of .*a.jsonl is not JSON"),
    "empty texts": ("a.json", '[{"text": ""}]', "a.json is empty: no document of it holds any text"),
    "half an array": ("a.json", '[{"text": "a"},', "a.json is not JSON: "),
    "an array of numbers": ("a.json", '[{"text": "a"}, 5]', "record 2 of .*a.json must be a JSON object, got 5"),
    "no .gz": ("a.jsonl.gz", '{"text": "a"}\n', "a.jsonl.gz cannot be read: Not a gzipped file"),
    "unknown suffix": ("a.csv", "text", "a.csv must end in .jsonl, .json, .txt, .parquet, or these but .parquet with"),
    "no suffix": ("a", "text", "a must end in .jsonl"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_an_error_that_says_where_and_leaves_no_folder(load, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)
    assert not folders(tmp_path / "cache")


def test_targets_that_leave_no_room_are_too_long_even_when_inputs_are_truncated(load, tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"inputs": "the people", "targets": "people time " * 40}])
    with pytest.raises(ValueError, match="line 1 of .* do not fit a row of 64"):
        load(file, truncate_inputs=True)
    assert not folders(tmp_path / "cache")


def test_the_bad_one_of_several_files_is_named(load, tmp_path):
    write_texts(tmp_path / "data" / "0.jsonl", TEXTS)
    (tmp_path / "data" / "1.json").write_text(json.dumps([{"text": "an array"}], indent=1))
    (tmp_path / "data" / "2.jsonl").write_text('{"text": "a"}\nnope\n')
    with pytest.raises(ValueError, match="line 2 of .*2.jsonl is not JSON"):
        load(tmp_path / "data")
    assert not folders(tmp_path / "cache")


@pytest.mark.parametrize("path", ["a.jsonl", "*.jsonl", "folder/deeper/a.parquet", "folder/deeper/without/end"])
def test_files_that_are_not_there_are_an_error(load, tmp_path, path):
    with pytest.raises(FileNotFoundError, match="there are no corpus files at .*" + path.split("/")[-1][-5:]):
        load(tmp_path / path)
    assert not folders(tmp_path / "cache")


def test_a_folder_without_a_corpus_is_an_error(load, tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no corpus files at"):
        load(tmp_path)


def test_a_corpus_may_have_files_of_several_kinds(load, tmp_path):
    write_texts(tmp_path / "data" / "a.jsonl", TEXTS)
    write_texts(tmp_path / "data" / "b.parquet", TEXTS)
    parts = parts_of(load(tmp_path / "data"))
    assert parts[: len(TEXTS)] == parts[len(TEXTS) :]


def test_a_corpus_of_another_tokenizer_is_an_error(tokenizer, config, load, tmp_path):
    folder = load(write_texts(tmp_path / "a.jsonl", TEXTS)).folder
    with pytest.raises(ValueError, match="was tokenized by another tokenizer than the model's; tokenize its texts"):
        load_corpus(CorpusSource(str(folder)), other_tokenizer(tokenizer), config, tmp_path / "cache", ROW_LENGTH)


def test_a_tokenizer_with_ids_that_the_model_lacks_is_an_error(tokenizer, tmp_path):
    file = write_texts(tmp_path / "a.jsonl", TEXTS)
    size = len(tokenizer)
    source, cache = CorpusSource(str(file)), tmp_path / "cache"
    corpus = load_corpus(source, tokenizer, config_with(tokenizer, size), cache, ROW_LENGTH)
    for path in (file, corpus.folder):  # before and after it was tokenized
        with pytest.raises(ValueError, match=f"has {size} tokens, but .* has {size - 1} rows; use"):
            load_corpus(CorpusSource(str(path)), tokenizer, config_with(tokenizer, size - 1), cache, ROW_LENGTH)


def config_with(tokenizer: GLMTokenizer, vocab_size: int) -> GLMConfig:
    """A configuration with a smaller vocabulary, in which the special ids have their place."""
    ids = {name: value for name, value in config_for(tokenizer).to_dict().items() if name.endswith("_token_id")}
    return GLMConfig(vocab_size=vocab_size, **ids)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_must_be_above_zero(weight):
    with pytest.raises(ValueError, match="the weight of a.jsonl must be above 0, got"):
        CorpusSource("a.jsonl", weight=weight)


@pytest.mark.parametrize("name", ["eos", "gmask", "sop"])
def test_a_tokenizer_with_other_special_ids_is_refused(tmp_path, tokenizer, name):
    write_texts(tmp_path / "a.jsonl", ["people"])
    config = config_for(tokenizer)
    setattr(config, f"{name}_token_id", 3)
    with pytest.raises(ValueError, match=f"{name}_token_id = .*, but the config has 3; use the tokenizer"):
        load_corpus(CorpusSource(str(tmp_path / "a.jsonl")), tokenizer, config, tmp_path / "cache", 64)


def test_what_a_killed_tokenization_has_left_goes_with_the_next_one(tmp_path, load):
    cache = tmp_path / "cache"
    for left in (".text-0123456789abcdef.partial", ".text.jsonl-0123456789abcdef.partial"):
        (cache / left / "folder").mkdir(parents=True)
        (cache / left / "folder" / "tokens.bin").write_bytes(b"half")
    (cache / left / "journal.jsonl").touch()  # of another version of the corpus
    kept = cache / ".of-somebody.partial"
    kept.mkdir()
    (kept / "else").touch()
    load(write_texts(tmp_path / "text.jsonl", ["people"]))
    assert [path.name for path in cache.glob(".*.partial")] == [kept.name]


def test_a_tokenization_that_was_cut_off_is_resumed(load, tmp_path, monkeypatch, ids_of, tokenizer):
    monkeypatch.setattr(sources, "TASK_BYTES", 150)
    file = write_texts(tmp_path / "a.jsonl", TEXTS)
    make, made = shards.ShardMaker.make, []

    def fails_at_the_fifth(maker, number, task):
        if number == 5 and not made.count("failed"):
            made.append("failed")
            raise OSError(28, "No space left on device")
        made.append(number)
        return make(maker, number, task)

    monkeypatch.setattr(shards.ShardMaker, "make", fails_at_the_fifth)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    with pytest.raises(OSError, match="No space left"):
        load(file)
    load(file)
    assert made == [*range(5), "failed", *range(5, len(made) - 1)]
    assert parts_of(load(file)) == [[*ids_of(text), tokenizer.eos_token_id] for text in TEXTS]


@pytest.mark.parametrize(
    "name", ["text.jsonl", "text.json", "text.jsonl.gz", "text.parquet", "text.txt", "array.json"]
)
def test_a_record_that_is_too_long_is_refused_in_little_memory(tmp_path, tokenizer, config, name):
    texts = ["people", "time " * 400_000]
    lines = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    path = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    elif name == "array.json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif name.endswith(".txt"):
        path.write_text(texts[1])
    else:
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    with pytest.raises(ValueError, match=r"(text|array).* has more than 1,000,000 bytes; split it, or raise"):
        load_corpus(CorpusSource(str(path), max_record_size=10**6), tokenizer, config, tmp_path / "cache", 64)
    num_documents = 1 if name == "text.txt" else 2
    corpus = load_corpus(CorpusSource(str(path)), tokenizer, config, tmp_path / "cache", 64)
    assert corpus.num_documents == num_documents


def test_an_array_that_no_memory_would_hold_is_refused(load, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MOST_RECORD_BYTES", 100)
    (tmp_path / "a.json").write_text(json.dumps([{"text": "time"}] * 20))
    with pytest.raises(ValueError, match="a.json is an array of more than 100 bytes; write every record into a line"):
        load(tmp_path / "a.json")


def test_the_longest_record_is_no_part_of_what_a_corpus_is_known_by(tmp_path, tokenizer, config):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "people"}\n')
    for size in (10**6, 10**7):
        load_corpus(CorpusSource(str(path), max_record_size=size), tokenizer, config, tmp_path / "cache", 64)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_ids_beyond_the_vocabulary_are_refused_with_checksums_that_are_right(tmp_path, tokenizer, config):
    facts = {"kind": "text", "source": "x", "tokenizer": fingerprint(tokenizer)}
    for bad in (config.vocab_size, config.mask_token_id, config.sop_token_id):
        write_token_file(tmp_path / "corpus", [[[30, bad, 40]]], facts, 1 << 17)
        with pytest.raises(ValueError, match=rf"token 1 is {bad}, which has no place in a text"):
            load_corpus(CorpusSource(str(tmp_path / "corpus")), tokenizer, config, tmp_path / "cache", 64)
