"""A tokenization that ends at any moment is resumed, and makes what an undisturbed one makes."""

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from corpus import chinese, english, generate
from fuzzing import read_tree

from glm_hf.folders.atomic import AtomicFolder
from glm_hf.training import tokenize_corpus
from glm_hf.training.data import token_file
from glm_hf.training.data.tokenizing import growing_corpus, sources
from glm_hf.training.data.tokenizing.growing_corpus import GrowingCorpus, HashedFile
from glm_hf.training.data.tokenizing.shards import ShardMaker

TEXTS = generate([english, chinese], 16, seed=7)
MOMENTS = [
    (ShardMaker, "make"),
    (GrowingCorpus, "_log"),
    (HashedFile, "append"),
    (HashedFile, "sync"),
    (HashedFile, "write_header"),
    (growing_corpus, "write_facts"),
    (AtomicFolder, "publish"),
    (AtomicFolder, "remove"),
]
KILLS = 16


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch) -> None:
    monkeypatch.setattr(sources, "TASK_BYTES", 120)
    for module in (token_file, growing_corpus):
        monkeypatch.setattr(module, "BLOCK_BYTES", 256)


@pytest.fixture
def files(tmp_path) -> list[Path]:
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for number, path in enumerate(paths):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS[number::3]]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


@pytest.fixture
def tokenize(model_folder, files, tmp_path) -> Callable[..., None]:
    def tokenize(out: str = "out", **options: object) -> None:
        settings = {"num_proc": 1, "tokenizer": model_folder} | options
        tokenize_corpus(files, tmp_path / out, **settings)

    return tokenize


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """The numbers of the shards that this process makes."""
    numbers = []
    make = ShardMaker.make

    def counted(maker: ShardMaker, number: int, task: sources.Task) -> dict:
        result = make(maker, number, task)
        numbers.append(number)
        return result

    monkeypatch.setattr(ShardMaker, "make", counted)
    return numbers


def without_source(folder: Path) -> dict[str, object]:
    tree: dict[str, object] = dict(read_tree(folder))
    facts = json.loads((folder / "corpus.json").read_text())
    return tree | {"corpus.json": {name: value for name, value in facts.items() if name != "source"}}


def count_moments(patch: pytest.MonkeyPatch, at: Callable[[int], None]) -> list[int]:
    """Have `at` called with the number of calls before every call of the functions in `MOMENTS`."""
    calls = [0]

    def counting(function: Callable) -> Callable:
        def wrapper(*args: object, **kwargs: object) -> object:
            calls[0] += 1
            at(calls[0])
            return function(*args, **kwargs)

        return wrapper

    for owner, name in MOMENTS:
        patch.setattr(owner, name, counting(getattr(owner, name)))
    return calls


def test_a_run_that_was_killed_at_any_moment_is_resumed_shard_by_shard(tokenize, tmp_path, made):
    with pytest.MonkeyPatch.context() as patch:
        calls = count_moments(patch, lambda _: None)
        tokenize("whole")
    num_shards = len(made)
    assert num_shards > 10

    def end_at(last: int) -> Callable[[], None]:
        def run() -> None:
            count_moments(pytest.MonkeyPatch(), lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == last else None)
            tokenize()

        return run

    for last in range(1, calls[0] + 1, max(1, calls[0] // KILLS)):
        made.clear()
        _, how = forked.outcome_of(forked.start(end_at(last), tmp_path / "result"), tmp_path / "result")
        assert how == "ended with status 9"
        journal = tmp_path / ".out.partial" / "journal.jsonl"
        kept = journal.read_text().count('"made"') if journal.exists() else 0
        tokenize()
        assert len(made) == (0 if not kept and (tmp_path / "out").exists() and last == calls[0] else num_shards - kept)
        assert without_source(tmp_path / "out") == without_source(tmp_path / "whole")
        assert not (tmp_path / ".out.partial").exists()
        shutil.rmtree(tmp_path / "out")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_workers_end_with_their_parent_and_leave_what_another_number_of_them_resumes(tokenize, tmp_path, made):
    tokenize("whole")
    total = len(made)
    made.clear()

    def end_in_the_middle() -> None:
        patch = pytest.MonkeyPatch()
        add = GrowingCorpus.add

        def add_and_end(corpus: GrowingCorpus, number: int, made: dict) -> None:
            add(corpus, number, made)
            if len(corpus.made) == 5:
                children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
                (tmp_path / "pids").write_text(children)
                os.kill(os.getpid(), signal.SIGKILL)

        patch.setattr(GrowingCorpus, "add", add_and_end)
        tokenize(num_proc=3)

    forked.outcome_of(forked.start(end_in_the_middle, tmp_path / "result"), tmp_path / "result")
    pids = list(map(int, (tmp_path / "pids").read_text().split()))
    assert len(pids) == 3
    deadline = time.monotonic() + 60
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    tokenize()
    assert len(made) == total - 5
    assert without_source(tmp_path / "out") == without_source(tmp_path / "whole")


def test_a_worker_that_was_killed_is_an_error_and_the_rest_is_kept(tokenize, tmp_path, monkeypatch):
    tokenize("whole")
    make = ShardMaker.make

    def die(maker: ShardMaker, number: int, task: sources.Task) -> dict:
        if number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(maker, number, task)

    with monkeypatch.context() as patch:
        patch.setattr(ShardMaker, "make", die)  # which forked workers inherit
        with pytest.raises(OSError, match="has died, perhaps for want of memory; run the same command to resume"):
            tokenize(num_proc=2)
    tokenize()
    assert without_source(tmp_path / "out") == without_source(tmp_path / "whole")


def interrupt(tokenize: Callable[..., None], at: int) -> list[str]:
    """Interrupt a run at shard `at`; return the notes of the error."""
    make = ShardMaker.make

    def end(maker: ShardMaker, number: int, task: sources.Task) -> dict:
        if number == at:
            raise KeyboardInterrupt
        return make(maker, number, task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardMaker, "make", end)
        with pytest.raises(KeyboardInterrupt) as caught:
            tokenize()
    return getattr(caught.value, "__notes__", [])


def test_an_interrupted_run_says_how_to_resume_and_one_without_a_shard_leaves_nothing(tokenize, tmp_path, made):
    assert interrupt(tokenize, 0) == []
    assert not (tmp_path / ".out.partial").exists()
    [note] = interrupt(tokenize, 3)
    assert note.startswith("3 of ")
    assert note.endswith(" shards are finished; run the same command to resume")
    tokenize()
    assert sorted(made) == sorted({*made} | {0, 1, 2})


def test_a_bad_line_costs_only_its_shard_once_it_is_mended(tokenize, files, tmp_path, made):
    lines = files[1].read_text().splitlines()
    files[1].write_text("\n".join([*lines[:-1], lines[-1][:-3]]) + "\n")
    with pytest.raises(ValueError, match=f"line {len(lines)} of .*b.jsonl is not JSON"):
        tokenize()
    assert len(made) > 3
    files[1].write_text("\n".join(lines) + "\n")
    made.clear()
    tokenize()
    resumed = [*made]
    tokenize("whole")
    assert min(resumed) > 0
    assert without_source(tmp_path / "out") == without_source(tmp_path / "whole")


@pytest.mark.parametrize("changed", ["content", "time", "new file"])
def test_shards_of_a_file_that_has_changed_are_made_anew(tokenize, files, tmp_path, made, changed):
    tasks = sources.plan_tasks(files)
    first = next(number for number, task in enumerate(tasks) if "b.jsonl" in str(task))
    interrupt(tokenize, len(tasks) - 1)
    made.clear()
    if changed == "content":
        files[1].write_text('{"text": "wholly other"}\n')
    elif changed == "time":
        os.utime(files[1], ns=(1, 1))
    else:
        files.insert(1, tmp_path / "new.jsonl")
        files[1].write_text('{"text": "wholly new"}\n')
    tokenize()
    resumed = [*made]
    tokenize("whole")
    assert min(resumed) in (first, first - 1)
    assert without_source(tmp_path / "out") == without_source(tmp_path / "whole")


def test_a_run_with_other_options_is_not_resumed_but_may_begin_anew(tokenize, tmp_path):
    interrupt(tokenize, 3)
    for path in tmp_path.glob("*.jsonl"):
        path.write_text(path.read_text().replace('"text"', '"content"'))
    with pytest.raises(ValueError, match="the interrupted run had other options or another version .*--no-resume"):
        tokenize(text="content")
    tokenize(text="content", resume=False)
    tokenize("whole", text="content")
    assert without_source(tmp_path / "out") == without_source(tmp_path / "whole")


@pytest.mark.parametrize("name", ["tokens.bin", "boundaries.npy"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damage_to_what_is_kept_is_an_error(tokenize, tmp_path, name, damage):
    interrupt(tokenize, 9)
    path = tmp_path / ".out.partial" / "folder" / name
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content if damage == "changed" else content[:150])
    with pytest.raises(ValueError, match=f"{name} (should have .* bytes|is damaged).*--no-resume"):
        tokenize()
    tokenize(resume=False)


def test_a_line_of_the_journal_that_was_cut_off_does_not_count(tokenize, tmp_path, made):
    tokenize("whole")
    interrupt(tokenize, 5)
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    with journal.open("a") as file:
        file.write('{"made": 5, "num_tok')
    tokenize()
    assert without_source(tmp_path / "out") == without_source(tmp_path / "whole")


def test_a_finished_folder_is_known_and_another_one_is_not_touched(tokenize, files, tmp_path, made, caplog):
    tokenize()
    made.clear()
    with caplog.at_level(logging.WARNING):
        tokenize()
    assert "is already complete" in caplog.text
    assert made == []
    before = read_tree(tmp_path / "out")
    files[0].write_text('{"text": "the people"}\n')
    with pytest.raises(FileExistsError, match="out exists already; choose another folder or remove it .*--overwrite"):
        tokenize()
    assert read_tree(tmp_path / "out") == before
    tokenize(overwrite=True)
    tokenize("whole")
    assert without_source(tmp_path / "out") == without_source(tmp_path / "whole")
