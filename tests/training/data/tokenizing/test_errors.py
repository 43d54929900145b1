"""What `tokenize_corpus` cannot make ids of is one sentence that says where, and long texts take little memory."""

import gzip
import json
import os
from pathlib import Path

import forked
import pyarrow.parquet
import pytest

from glm_hf.training import tokenize_corpus
from glm_hf.training.data.tokenizing import sources

PAIR = {"inputs": "the people [MASK]", "targets": "of"}
A = '{"text": "a"}\n'
BAD_FILES = {
    "empty file": ("a.jsonl", "", "a.jsonl is empty: it holds no document"),
    "empty lines": ("a.jsonl", "\n\n", "a.jsonl is empty: it holds no document"),
    "empty texts": ("a.jsonl", [{"text": ""}] * 2, "a.jsonl is empty: no document of it holds any text"),
    "empty text file": ("a.txt", "", "a.txt is empty: it holds no document"),
    "no JSON at once": ("a.jsonl", "text\n", "line 1 of .*a.jsonl is not JSON: Expecting value"),
    "no JSON later": ("a.jsonl", A * 90 + "\nnope\n", "line 92 of .*a.jsonl is not JSON"),
    "cut off": ("a.jsonl", A + '{"text": "b', "line 2 of .*a.jsonl is not JSON"),
    "no JSON in .gz": ("a.jsonl.gz", A + "nope\n", "line 2 of .*a.jsonl.gz is not JSON"),
    "no UTF-8": ("a.jsonl", b'{"text": "\xff"}\n', "line 1 of .*a.jsonl is not JSON: 'utf-8' codec"),
    "no UTF-8 in text": ("a.txt", b"a \xff", "a.txt is not text in UTF-8: .* byte 0xff"),
    "half a pair": ("a.jsonl", A + '{"text": "\\ud800"}\n', "line 2 of .* holds half a surrogate pair in 'text'"),
    "no object": ("a.jsonl", A + '"b"\n', "line 2 of .*a.jsonl must be a JSON object, got b'\"b\""),
    "half an array": ("a.json", "[\n" + A + ",\n", "a.json is not JSON: Expecting value"),
    "half an array in .gz": ("a.json.gz", "\n [" + A, "a.json.gz is not JSON: Expecting"),
    "an array of numbers": ("a.jsonl", "[" + A + ", 5]", "record 2 of .*a.jsonl must be a JSON object, got 5"),
    "a bad record": ("a.json", '[{"text": "a"}, {"text": 5}]', "record 2 of .*a.json must have a string in 'text'"),
    "no .gz": ("a.jsonl.gz", A.encode(), "a.jsonl.gz cannot be read: Not a gzipped file"),
    "half a .gz": ("a.jsonl.gz", gzip.compress(A.encode() * 99)[:-9], "a.jsonl.gz cannot be read: Compressed file"),
    "no .zst": ("a.jsonl.zst", A.encode(), "a.jsonl.zst cannot be read: "),
    "no Parquet": ("a.parquet", b"text", "a.parquet cannot be read: .*Parquet"),
    "missing field": ("a.jsonl", [{"txt": "a", "n": 1}], "line 1 of .*'text', or 'inputs' and 'targets', got 'txt'"),
    "no targets": ("a.jsonl", [{"inputs": "a"}], "'text', or 'inputs' and 'targets', got 'inputs'"),
    "missing later": ("a.jsonl", [{"text": "a"}, {"b": "a"}], "line 2 of .* must have a string in 'text', got None"),
    "number": ("a.jsonl", [{"text": "a"}, {"text": 5}], "line 2 of .*a.jsonl .* string in 'text', got 5"),
    "null in Parquet": ("a.parquet", ["a"] * 9 + [None], "row 10 of .*a.parquet must have a string in 'text'"),
    "null inputs": ("a.jsonl", [PAIR, PAIR | {"inputs": None}], "line 2 of .* string in 'inputs', got None"),
    "empty targets": ("a.jsonl", [PAIR, PAIR | {"targets": ""}], "line 2 of .*a.jsonl: 'targets' is empty"),
    "two kinds of masks": ("a.jsonl", [PAIR, PAIR | {"inputs": "a [MASK] [gMASK]"}], "line 2 of .* mixes .MASK"),
    "long inputs": (
        "a.jsonl",
        [PAIR, PAIR | {"inputs": "people time " * 40}],
        r"line 2 of .*: inputs of \d\d and targets of \d tokens do not fit a row of 64; shorten .* truncate_inputs",
    ),
    "unknown suffix": ("a.csv", "text", "a.csv must end in .jsonl, .json, .txt, .parquet, or these but"),
    "compressed Parquet": ("a.parquet.gz", "text", r"a.parquet.gz must end in"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_an_error_that_says_where(model_folder, tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(sources, "TASK_BYTES", 40)
    file = tmp_path / name
    if isinstance(content, list) and name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": content}), file, row_group_size=3)
    elif isinstance(content, list):
        file.write_text("".join(json.dumps(record) + "\n" for record in content))
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        (gzip.open if file.suffix == ".gz" else open)(file, "wt").write(content)
    with pytest.raises(ValueError, match=message):
        tokenize_corpus(file, tmp_path / "out", tokenizer=model_folder, num_proc=1, row_length=64)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_proc", [0, -1])
def test_the_number_of_processes_must_be_above_zero(tmp_path, num_proc):
    with pytest.raises(ValueError, match=f"num_proc must be at least 1, got {num_proc}"):
        tokenize_corpus("a.jsonl", tmp_path / "out", tokenizer=tmp_path, num_proc=num_proc)


def test_files_that_are_not_there_or_given_twice_are_an_error(model_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no corpus files at .*a.jsonl"):
        tokenize_corpus(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=model_folder)
    with pytest.raises(FileNotFoundError, match="there are no corpus files at"):
        tokenize_corpus(tmp_path, tmp_path / "out", tokenizer=model_folder)
    (tmp_path / "a.jsonl").write_text(A)
    with pytest.raises(ValueError, match="a.jsonl is given twice; its documents would be there twice"):
        tokenize_corpus([tmp_path, tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=model_folder)
    os.mkfifo(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="b.jsonl is not a regular file"):
        tokenize_corpus(tmp_path / "b.jsonl", tmp_path / "out", tokenizer=model_folder)


def test_a_file_that_changes_while_it_is_read_is_an_error(model_folder, tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_text(A)
    plan = sources.plan_tasks(sources.find_sources([file]))
    monkeypatch.setattr("glm_hf.training.data.tokenizing.tokenize.plan_tasks", lambda _: plan)
    file.write_text(A * 2)
    with pytest.raises(ValueError, match="a.jsonl has changed while it was read; run the command again"):
        tokenize_corpus(file, tmp_path / "out", tokenizer=model_folder, num_proc=1)


def memory(name: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's peak")
def test_a_long_line_takes_some_times_its_size_and_not_hundreds(model_folder, tmp_path):
    def growth_for(num_bytes: int) -> int:
        file = tmp_path / f"{num_bytes}.jsonl"
        file.write_text(json.dumps({"text": "time\n" + "people time\n" * (num_bytes // 12)}))

        def run() -> int:
            before = memory("VmRSS")
            tokenize_corpus(file, tmp_path / f"{num_bytes}", tokenizer=model_folder, num_proc=1)
            return memory("VmHWM") - before

        result = tmp_path / f"{num_bytes}.pickle"
        return forked.wait(forked.start(run, result), result)

    small, large = 1 << 20, 6 << 20
    assert growth_for(large) - growth_for(small) < 8 * (large - small)
