"""Token files are read back by numpy alone, and their writer is stopped in every way a disk and a system can."""

import errno
import json
import os
import pickle
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import xxhash

from glm_hf.training.data import token_file
from glm_hf.training.data.token_file import (
    BLOCK_BYTES,
    TokenFile,
    find_damage,
    open_token_file,
    require_ids,
    write_token_file,
)

DATA_FILES = ("tokens.bin", "boundaries.npy")
FACTS = {"kind": "text", "source": "语料.jsonl"}
PARTS = [[3, 1, 4], [1], [5, 9, 2, 6]]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by fork")


def written(folder: Path, parts: list[list[int]] = PARTS, vocab_size: int = 10, **facts: object) -> TokenFile:
    write_token_file(folder, [parts], FACTS | facts, vocab_size)
    return open_token_file(folder)


def parts_of(corpus: TokenFile) -> list[list[int]]:
    return [part.tolist() for part in np.split(corpus.tokens, corpus.boundaries[1:-1])]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache" / "corpus"


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "<u2"), ((1 << 16) + 1, "<i4"), (150528, "<i4")])
def test_parts_come_back_in_the_smallest_dtype_that_holds_the_vocabulary(folder, vocab_size, dtype):
    parts = [[0, 1, vocab_size - 1], [vocab_size - 2], [7] * 5]
    corpus = written(folder, parts, vocab_size)
    assert parts_of(corpus) == parts
    assert corpus.tokens.dtype == np.dtype(dtype)
    stored = np.fromfile(folder / "tokens.bin", dtype)
    assert stored.tolist() == [token for part in parts for token in part]
    assert np.load(folder / "boundaries.npy").tolist() == [0, 3, 4, 9]


@pytest.mark.parametrize("in_memory", [True, False])
def test_texts_are_read_in_their_order_and_around_the_end(folder, in_memory):
    rng = np.random.default_rng(0)
    corpus = written(folder, [rng.integers(0, 1000, 50).tolist() for _ in range(4)], vocab_size=1000)
    tokens = np.fromfile(folder / "tokens.bin", "<u2")
    if in_memory:
        corpus = TokenFile(folder, tokens, corpus.boundaries, corpus.facts)
    for count in range(1, 30):
        starts, lengths = rng.integers(0, 200, count), rng.integers(0, 201, count)
        following = rng.random(count) < 0.5
        for place in np.flatnonzero(following[1:]) + 1:
            starts[place] = (starts[place - 1] + lengths[place - 1]) % 200
        read = corpus.read_tokens(starts.tolist(), lengths.tolist())
        expected = [np.arange(*pair) % 200 for pair in zip(starts, starts + lengths, strict=True)]
        assert read.tolist() == tokens[np.concatenate(expected)].tolist()


@pytest.mark.parametrize("call", ["preadv", "readinto"])
def test_threads_read_one_file_side_by_side(folder, monkeypatch, call):
    if call == "readinto":
        monkeypatch.delattr(os, "preadv", raising=False)
    corpus = written(folder, [list(range(1, 1000)) for _ in range(20)], vocab_size=1000)
    tokens = np.fromfile(folder / "tokens.bin", "<u2")

    def read(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        starts = rng.integers(0, 19_000, 1000).tolist()
        return all(np.array_equal(corpus.read_tokens([n], [900]), tokens[n : n + 900]) for n in starts)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


def test_a_corpus_that_is_replaced_is_read_as_it_was(folder):
    corpus = written(folder)
    written(folder, [[2] * 4, [2] * 4])
    assert corpus.read_tokens([0], [8]).tolist() == [3, 1, 4, 1, 5, 9, 2, 6]
    assert corpus.read_boundaries(0, 3).tolist() == [0, 3, 4, 8]


def test_a_corpus_that_becomes_shorter_is_noticed(folder):
    corpus = written(folder)
    os.truncate(folder / "tokens.bin", 14)
    assert corpus.read_tokens([0], [7]).tolist() == [3, 1, 4, 1, 5, 9, 2]
    with pytest.raises(ValueError, match=r"tokens\.bin is damaged: it has become shorter; tokenize it again"):
        corpus.read_tokens([5], [3])


@needs_fork
def test_reading_moves_no_place_in_a_file_that_forked_processes_share(folder):
    corpus = written(folder)
    corpus.read_tokens([5], [3])
    corpus.read_boundaries(1, 2)
    assert [file.tell() for file in corpus.files] == [0, 0]


def test_batches_follow_each_other(folder):
    write_token_file(folder, iter([PARTS[:1], [], PARTS[1:]]), FACTS, 10)
    assert parts_of(open_token_file(folder)) == PARTS


def test_files_say_what_they_hold(folder):
    corpus = written(folder)
    facts = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    hashes = {name: [xxhash.xxh3_64_hexdigest((folder / name).read_bytes())] for name in DATA_FILES}
    counts = {"format": 2, "dtype": "<u2", "num_tokens": 8, "vocab_size": 10, "block_bytes": BLOCK_BYTES}
    assert facts == {**FACTS, **counts, "xxh3_64": hashes} == corpus.facts
    assert {path.name for path in folder.iterdir()} == {"tokens.bin", "boundaries.npy", "corpus.json"}


@pytest.mark.parametrize(("kind", "number"), [("text", 4), ("instructions", 2)])
def test_a_document_is_a_part_and_an_instruction_two(folder, kind, number):
    assert written(folder, [[1], [2], [3], [4]], kind=kind).num_documents == number


def test_tokens_are_mapped_and_cannot_be_changed(folder):
    corpus = written(folder)
    assert isinstance(corpus.tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        corpus.tokens[0] = 1


def test_the_folder_is_as_readable_as_others(folder):
    written(folder)
    assert folder.stat().st_mode == folder.parent.stat().st_mode


@needs_fork
def test_a_copy_in_another_process_reads_the_same(folder):
    corpus = written(folder)
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        assert pool.submit(parts_of, corpus).result() == PARTS


def test_a_pickle_is_small_however_large_the_corpus(folder):
    corpus = written(folder, [[1] * 1000] * 100)
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 1000
    copy = pickle.loads(pickled)
    assert isinstance(copy.tokens, np.memmap)
    assert parts_of(copy) == parts_of(corpus)


def test_a_new_corpus_replaces_an_old_one(folder):
    old = written(folder)
    (folder / "left over").touch()
    new = written(folder, [[8, 8]])
    assert parts_of(new) == [[8, 8]]
    assert parts_of(old) == PARTS  # who has it open goes on reading
    assert not (folder / "left over").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["corpus"]


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_disk(monkeypatch, stage: str) -> None:
    """Let the disk be full from one step of writing on."""
    if stage == "tokens":
        open_file = Path.open
        monkeypatch.setattr(
            Path, "open", lambda path, *mode: open_file(Path("/dev/full") if path.suffix == ".bin" else path, *mode)
        )
    elif stage == "sync":
        monkeypatch.setattr(os, "fsync", full_disk)
    else:
        monkeypatch.setattr(token_file.np, "save", full_disk)


@pytest.mark.parametrize("is_replaced", [False, True])
@pytest.mark.parametrize("stage", ["tokens", "sync", "boundaries"])
def test_a_full_disk_is_an_error_that_leaves_nothing_new(folder, monkeypatch, stage, is_replaced):
    if stage == "tokens" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full, which every write to fails")
    if is_replaced:
        written(folder)
    with monkeypatch.context() as patch:
        fill_disk(patch, stage)
        with pytest.raises(OSError, match="No space left on device"):
            write_token_file(folder, [[[1] * 100_000]], FACTS, 10)
    assert [path.name for path in folder.parent.iterdir()] == ["corpus"] * is_replaced
    if is_replaced:
        assert parts_of(open_token_file(folder)) == PARTS


@pytest.mark.parametrize("error", [ValueError("record 2"), KeyboardInterrupt()])
def test_a_source_that_fails_leaves_nothing(folder, error):
    def parts() -> Iterator[list[list[int]]]:
        yield PARTS
        raise error

    with pytest.raises(type(error)):
        write_token_file(folder, parts(), FACTS, 10)
    assert not list(folder.parent.iterdir())


@needs_fork
def test_a_writer_that_is_killed_leaves_no_corpus_and_stands_in_nobodys_way(folder):
    def parts() -> Iterator[list[list[int]]]:
        yield [[1] * 100_000]
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        write_token_file(folder, parts(), FACTS, 10)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not folder.exists()
    assert parts_of(written(folder)) == PARTS


def test_an_id_that_its_dtype_cannot_hold_is_an_error(folder):
    with pytest.raises(OverflowError):
        written(folder, [[1 << 16]], vocab_size=10)


@pytest.mark.parametrize("name", ["tokens.bin", "boundaries.npy", "corpus.json"])
def test_a_file_that_is_not_there_is_named(folder, name):
    written(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        open_token_file(folder)


@pytest.mark.parametrize("size", [0, 1, 15, 17, 32])
def test_tokens_of_another_size_are_an_error(folder, size):
    written(folder)
    os.truncate(folder / "tokens.bin", size)
    with pytest.raises(ValueError, match=f"corpus is damaged: 8 tokens expected, {size} bytes found; tokenize it"):
        open_token_file(folder)


def test_boundaries_of_other_tokens_are_an_error(folder):
    written(folder)
    np.save(folder / "boundaries.npy", np.array([0, 3, 9]))
    with pytest.raises(ValueError, match="corpus is damaged: 8 tokens expected"):
        open_token_file(folder)


@pytest.mark.parametrize("size", [0, 10, 130])
def test_truncated_boundaries_are_an_error(folder, size):
    written(folder)
    os.truncate(folder / "boundaries.npy", size)
    with pytest.raises(ValueError, match="corpus is not a tokenized corpus: "):
        open_token_file(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"dtype": "<u2"}', '{"dtype": "no", "num_tokens": 8}'])
def test_a_damaged_corpus_json_is_an_error(folder, content):
    written(folder)
    (folder / "corpus.json").write_text(content)
    with pytest.raises(ValueError, match="corpus is not a tokenized corpus: "):
        open_token_file(folder)


def test_a_folder_of_another_format_is_refused(folder):
    written(folder)
    facts = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps(facts | {"format": 3}))
    with pytest.raises(ValueError, match="has format 3, this version reads 2; tokenize it again"):
        open_token_file(folder)


def flip(path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("name", DATA_FILES)
def test_every_flipped_bit_is_noticed(folder, name):
    written(folder)
    size = (folder / name).stat().st_size
    for position in range(size):
        flip(folder / name, position, position % 8)
        with pytest.raises(ValueError, match=r"corpus.* is (damaged|not a tokenized corpus)"):
            open_token_file(folder)
        flip(folder / name, position, position % 8)
    assert parts_of(open_token_file(folder)) == PARTS


def test_a_large_corpus_is_checked_in_part_when_it_is_opened_and_as_a_whole_when_asked(folder, monkeypatch):
    monkeypatch.setattr(token_file, "BLOCK_BYTES", 64)
    written(folder, [[7] * 32] * 100, vocab_size=10)  # a block each
    monkeypatch.setattr(token_file, "BLOCKS_AT_OPENING", 50)
    monkeypatch.setattr(token_file, "BLOCKS_OF_LARGE", 4)
    for block, is_seen in ((0, True), (1, False), (33, True), (50, False), (99, True)):
        flip(folder / "tokens.bin", block * 64 + 5, 3)
        if is_seen:
            with pytest.raises(ValueError, match="tokens.bin is damaged: bytes"):
                open_token_file(folder)
        else:
            [problem] = find_damage(open_token_file(folder))
            assert f"bytes {block * 64:,} to {(block + 1) * 64:,} are not those that were written" in problem
        flip(folder / "tokens.bin", block * 64 + 5, 3)
    assert find_damage(open_token_file(folder)) == []


def test_a_corpus_of_an_earlier_version_is_read_with_a_warning(folder, caplog):
    written(folder)
    facts = json.loads((folder / "corpus.json").read_text())
    old = {name: facts[name] for name in facts if name not in ("xxh3_64", "block_bytes")} | {"format": 1}
    (folder / "corpus.json").write_text(json.dumps(old))
    assert parts_of(open_token_file(folder)) == PARTS
    assert "without checksums" in caplog.text
    np.save(folder / "boundaries.npy", np.array([0, 5, 3, 6, 8]))
    with pytest.raises(ValueError, match="its numbers do not rise"):
        open_token_file(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "O"},
        {"dtype": "<i8"},
        {"num_tokens": 10**30},
        {"num_tokens": True},
        {"block_bytes": 10**18},
        {"block_bytes": 0},
        {"xxh3_64": {}},
        {"xxh3_64": {"tokens.bin": 5, "boundaries.npy": []}},
        {"xxh3_64": {"tokens.bin": [], "boundaries.npy": []}},
        {"kind": ["text"]},
    ],
)
def test_impossible_facts_are_an_error(folder, change):
    written(folder)
    facts = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps(facts | change))
    with pytest.raises(ValueError, match="corpus"):
        open_token_file(folder)


@pytest.mark.parametrize(
    ("ids", "kind", "found"), [([3, 50], "text", 50), ([3, 7], "text", 7), ([8, 50], "instructions", 50)]
)
def test_ids_beyond_the_vocabulary_and_masks_in_a_text_are_an_error(folder, ids, kind, found):
    corpus = written(folder, [[1, 2], ids], kind=kind, vocab_size=100)
    with pytest.raises(ValueError, match=rf"tokens.bin: token [23] is {found}, which has no place"):
        require_ids(corpus, 40, {7, 8})


def test_masks_in_instructions_are_right(folder):
    require_ids(written(folder, [[1, 7], [3]], kind="instructions", vocab_size=100), 40, {7})
