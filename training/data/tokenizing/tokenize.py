"""Texts and instructions on disk, tokenized once into a corpus that training opens, by several processes."""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from glm_hf import __version__
from glm_hf.configuration_glm import GLMConfig
from glm_hf.folders.atomic import AtomicFolder, destination
from glm_hf.folders.validation import find_folder, load_tokenizer, read_config, require_matching_tokenizer
from glm_hf.tokenization_glm import WINDOW, GLMTokenizer
from glm_hf.training.data.native import num_cores
from glm_hf.training.data.token_file import dtype_for
from glm_hf.training.data.tokenizing.encoder import fingerprint
from glm_hf.training.data.tokenizing.growing_corpus import JOURNAL, SHARDS, GrowingCorpus
from glm_hf.training.data.tokenizing.instructions import InstructionRule
from glm_hf.training.data.tokenizing.processes import ShardWorkers
from glm_hf.training.data.tokenizing.records import MOST_RECORD_BYTES, place_of, read_records
from glm_hf.training.data.tokenizing.shards import Job
from glm_hf.training.data.tokenizing.sources import Task, find_sources, plan_tasks
from glm_hf.training.data.tokenizing.unigram import unigram_library

TOKENIZER_FILES = ("*.json", "*.jinja")

logger = logging.getLogger(__name__)


def tokenize_corpus(
    sources: str | Path | Sequence[str | Path],
    dst: str | Path,
    *,
    tokenizer: str | Path,
    num_proc: int | None = None,
    text: str = "text",
    inputs: str = "inputs",
    targets: str = "targets",
    row_length: int = WINDOW,
    truncate_inputs: bool = False,
    resume: bool = True,
    overwrite: bool = False,
) -> None:
    """
    Tokenize files into a folder that `CorpusSource(path)` takes; nothing if it is there already.

    Files end in `.jsonl`, `.json` (a record per line, or all in one array), `.txt` (a document per file) or
    `.parquet`, the first three also with `.gz` or `.zst` behind. The ids are those of the tokenizer for the whole
    texts, whatever the number of processes. Whenever an interrupted run is repeated, it resumes with the shards that
    are missing, about 16 MiB of text each, and those of files that have changed.

    Args:
        sources: Files, folders and patterns; the documents of each come in the order of the files' names.
        dst: Destination; missing parents are made.
        tokenizer: Folder of the model, or its name on the Hub; the weights are not needed.
        num_proc: Number of processes, by default one for every core.
        text: Field of a text.
        inputs: Field of an instruction, which may hold a mask.
        targets: Field of what is to be written at its first mask.
        row_length: Number of tokens that an instruction has to fit.
        truncate_inputs: Whether to leave out the beginning of inputs that do not fit, which is an error else.
        resume: Whether to resume an interrupted run rather than to discard what it has written.
        overwrite: Whether to replace a folder at `dst`, once the new one is complete.

    Raises:
        FileNotFoundError: If there are no such files, or the tokenizer is not there.
        FileExistsError: If `dst` holds something else.
        ValueError: If a file is damaged or of another kind, a record lacks its fields, a text cannot be cut into
            pieces of at most 8 Mi characters, or an interrupted run had other options.
        OSError: If the disk is full, or a process was killed.
    """
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc must be at least 1, got {num_proc}")
    folder = find_folder(tokenizer, TOKENIZER_FILES)
    config, loaded = read_config(folder), load_tokenizer(folder)
    require_matching_tokenizer(loaded, config)
    paths = [str(sources)] if isinstance(sources, (str, Path)) else list(map(str, sources))
    records = RecordRule(text, inputs, targets, row_length, truncate_inputs)
    name = paths[0] if len(paths) == 1 else Path(dst).name
    tokenize_files(
        find_sources(paths), Path(dst), loaded, config, records, name, num_proc, resume=resume, overwrite=overwrite
    )


@dataclass(frozen=True)
class RecordRule:
    """
    What is read of records.

    Attributes:
        text: Field of a text.
        inputs: Field of an instruction.
        targets: Field of what is to be written at its first mask.
        row_length: Number of tokens that an instruction has to fit.
        truncate_inputs: Whether to leave out the beginning of inputs that do not fit, which is an error else.
        most_bytes: Longest record.
    """

    text: str
    inputs: str
    targets: str
    row_length: int
    truncate_inputs: bool
    most_bytes: int = MOST_RECORD_BYTES


def tokenize_files(
    files: Sequence[Path],
    dst: Path,
    tokenizer: GLMTokenizer,
    config: GLMConfig,
    records: RecordRule,
    name: str,
    num_proc: int | None = None,
    *,
    resume: bool = True,
    overwrite: bool = False,
) -> None:
    """
    Tokenize files as `tokenize_corpus` does, with a tokenizer that is loaded.

    Args:
        files: What `find_sources` returns.
        dst: Destination; missing parents are made.
        tokenizer: Tokenizer of the model.
        config: Configuration of the model.
        records: What is read of records.
        name: Name of the corpus in logs and errors.
        num_proc: Number of processes, by default one for every core.
        resume: Whether to resume an interrupted run rather than to discard what it has written.
        overwrite: Whether to replace a folder at `dst`, once the new one is complete.

    Raises:
        FileExistsError, ValueError, OSError: As `tokenize_corpus` does.
    """
    tasks = plan_tasks(files)
    fields = _find_fields(tasks, records, name)
    is_text = len(fields) == 1
    rule = None if is_text else InstructionRule(config, records.row_length, records.targets, records.truncate_inputs)
    digest = fingerprint(tokenizer)
    plan = _Plan(
        tasks,
        options={
            "version": __version__,
            "tokenizer": digest,
            "vocab_size": config.vocab_size,
            "fields": fields,
            "rule": None if is_text else [records.row_length, records.truncate_inputs],
        },
        facts={"kind": "text" if is_text else "instructions", "source": name, "tokenizer": digest},
    )
    target = AtomicFolder(
        destination(dst),
        replaces=overwrite,
        owns=frozenset({JOURNAL, Path(JOURNAL).with_suffix(".new").name}),
        origin={"options": plan.options, "tasks": hashlib.sha256("".join(plan.hashes).encode()).hexdigest()},
    )
    if _is_finished(target):
        return
    backend, dtype = tokenizer.backend_tokenizer.to_str(), dtype_for(config.vocab_size).str
    job = Job(str(target.work / SHARDS), backend, dtype, config.eos_token_id, fields, rule, records.most_bytes)
    unigram_library()  # if it is missing, this process says so, not each of the others
    # The processes come first, as a lock that they inherit would outlive this one.
    with ShardWorkers(job, min(num_proc or num_cores(), len(tasks))) as workers, target.locked():
        target.give_back()
        if not _is_finished(target):  # another run may have come to its end meanwhile
            if not resume:
                (target.home / JOURNAL).unlink(missing_ok=True)
            if not (target.home / JOURNAL).exists():
                target.clear()
            _run(target, plan, workers)
        target.remove()


@dataclass(frozen=True)
class _Plan:
    """What is tokenized: the tasks, the options that the ids depend on, and the facts of the corpus."""

    tasks: list[Task]
    options: dict[str, Any]
    facts: dict[str, Any]

    @cached_property
    def hashes(self) -> list[str]:
        """Hash of every task, its files' sizes and times of change included."""
        contents = (json.dumps([asdict(piece) for piece in task]) for task in self.tasks)
        return [hashlib.sha256(content.encode()).hexdigest() for content in contents]


def _is_finished(target: AtomicFolder) -> bool:
    """Tell whether the destination is the result already; FileExistsError if it holds something else."""
    target.require_own()
    if target.is_complete():
        return True
    target.require_possible()
    return False


def _run(target: AtomicFolder, plan: _Plan, workers: ShardWorkers) -> None:
    """Make the shards that are missing, and rename the folder."""
    corpus = GrowingCorpus(target.home, target.work, plan.options, plan.hashes, np.dtype(workers.job.dtype))
    try:
        with closing(corpus):
            _make_missing(corpus, plan, workers)
            if not corpus.num_tokens:
                raise ValueError(f"{plan.facts['source']} is empty: no document of it holds any text")
            corpus.finish(plan.facts, plan.options["vocab_size"])
        target.publish()
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(target.dst)  # a full disk does not tell which
        if corpus.num_tokens or len(corpus.made) > len(corpus.appended):
            done = f"{len(corpus.made)} of {len(plan.tasks)} shards are finished"
            error.add_note(f"{done}; run the same command to resume")
        else:
            target.remove()
        raise


def _make_missing(corpus: GrowingCorpus, plan: _Plan, workers: ShardWorkers) -> None:
    missing = corpus.missing()
    sizes = [sum(piece.num_bytes for piece in task) for task in plan.tasks]
    if len(missing) < len(plan.tasks):
        logger.warning("%d of %d shards are finished already", len(plan.tasks) - len(missing), len(plan.tasks))
    corpus.append_waiting()
    start, num_tokens, initial = time.monotonic(), 0, sum(sizes) - sum(sizes[n] for n in missing)
    with tqdm(
        total=sum(sizes), initial=initial, desc="Tokenizing", unit="B", unit_scale=True, disable=None
    ) as progress:
        for number, made in workers.make((n, plan.tasks[n]) for n in missing):
            corpus.add(number, made)
            num_tokens += made["num_tokens"]
            progress.set_postfix_str(f"{num_tokens / (time.monotonic() - start):,.0f} tokens/s", refresh=False)
            progress.update(sizes[number])


def _find_fields(tasks: Sequence[Task], records: RecordRule, name: str) -> tuple[str, ...]:
    """Return the fields of the first record that make its kind; ValueError if it lacks them, or there is none."""
    text, inputs, targets = records.text, records.inputs, records.targets
    for piece in (piece for task in tasks for piece in task):
        for number, record in read_records(piece, (text, inputs, targets), records.most_bytes):
            if text in record:
                return (text,)
            if {inputs, targets} <= record.keys():
                return inputs, targets
            raise ValueError(
                f"{place_of(piece, number)} must have a field {text!r}, or {inputs!r} and {targets!r}, got "
                f"{', '.join(map(repr, record)) or 'none'}"
            )
    raise ValueError(f"{name} is empty: it holds no document")
