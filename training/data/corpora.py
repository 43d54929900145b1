"""Corpora as people have them, tokenized once: files, and datasets on the Hub."""

import glob
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from glm_hf.configuration_glm import GLMConfig
from glm_hf.folders.atomic import remove_leftovers
from glm_hf.folders.validation import require_matching_tokenizer
from glm_hf.tokenization_glm import GLMTokenizer
from glm_hf.training.data.token_file import FACTS_FILE, TokenFile, open_token_file, require_ids, write_token_file
from glm_hf.training.data.tokenizing.encoder import fingerprint
from glm_hf.training.data.tokenizing.instructions import InstructionRule
from glm_hf.training.data.tokenizing.records import MOST_RECORD_BYTES
from glm_hf.training.data.tokenizing.sources import find_sources, kind_of
from glm_hf.training.data.tokenizing.tokenize import RecordRule, tokenize_files

DOCUMENTS_AT_ONCE = 1000


@dataclass(frozen=True)
class CorpusSource:
    """
    Where a corpus comes from and how it is used.

    Args:
        path: File, folder or pattern of files that `tokenize_corpus` takes, name of a dataset on the Hub, or a folder
            that was tokenized before.
        weight: Share of the tokens among texts, or among instructions, in proportion to the other weights; by default
            the number of its tokens, so that every corpus is seen equally often.
        join_documents: Whether documents are joined to full rows, or stay samples of their own.
        text: Field of a text.
        inputs: Field of an instruction, which may hold a mask.
        targets: Field of what is to be written at its first mask.
        truncate_inputs: Whether to leave out the beginning of inputs that do not fit a row, which is an error else.
        name: Configuration of a dataset on the Hub.
        split: Split of a dataset on the Hub.
        max_record_size: Longest record in bytes; a longer one is an error.

    Raises:
        ValueError: If the weight or the size is not above 0.
    """

    path: str
    weight: float | None = None
    join_documents: bool = True
    text: str = "text"
    inputs: str = "inputs"
    targets: str = "targets"
    truncate_inputs: bool = False
    name: str | None = None
    split: str = "train"
    max_record_size: int = MOST_RECORD_BYTES

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not self.max_record_size > 0:
            raise ValueError(f"max_record_size of {self.path} must be above 0, got {self.max_record_size}")
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"the weight of {self.path} must be above 0, got {self.weight}")


def load_corpus(
    source: CorpusSource, tokenizer: GLMTokenizer, config: GLMConfig, cache: str | Path, row_length: int
) -> TokenFile:
    """
    Open a corpus, tokenizing it unless that was done before.

    Args:
        source: Corpus to open.
        tokenizer: Tokenizer of the model.
        config: Configuration of the model.
        cache: Folder for tokenized corpora, one folder each.
        row_length: Number of tokens that an instruction has to fit.

    Raises:
        FileNotFoundError: If there are no such files.
        ValueError: If the corpus is empty, a file is not what its name says, a field is missing, an instruction is too
            long, the corpus was tokenized by another tokenizer, or the tokenizer is not that of the model.
    """
    require_matching_tokenizer(tokenizer, config)
    if (Path(source.path) / FACTS_FILE).is_file():
        corpus = open_token_file(Path(source.path))
        if corpus.facts.get("tokenizer") != fingerprint(tokenizer):
            raise ValueError(
                f"{source.path} was tokenized by another tokenizer than the model's; tokenize its texts again"
            )
        _require_ids(corpus, config)
        return corpus
    files = find_files(source.path)
    origin = {
        **asdict(source),
        "weight": None,
        "join_documents": None,
        "row_length": row_length,
        "tokenizer": fingerprint(tokenizer),
        "files": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }
    del origin["max_record_size"]  # which does not change ids
    digest = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:16]
    name = Path(source.path).name.replace("*", "")
    folder = Path(cache) / f"{name}-{digest}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / ".lock"):  # of several processes, one tokenizes and the others wait
            remove_leftovers(folder.parent)
            remove_versions(folder, name)
            if files and not folder.exists():
                fields = source.text, source.inputs, source.targets
                records = RecordRule(*fields, row_length, source.truncate_inputs, source.max_record_size)
                tokenize_files(files, folder, tokenizer, config, records, source.path)
            elif not folder.exists():
                reader = _HubReader(source, tokenizer, config, row_length)
                facts = {"kind": reader.kind, "source": source.path, "tokenizer": fingerprint(tokenizer)}
                write_token_file(folder, reader.parts(), facts, config.vocab_size)
    corpus = open_token_file(folder)
    _require_ids(corpus, config)
    return corpus


def _require_ids(corpus: TokenFile, config: GLMConfig) -> None:
    """Raise ValueError if a corpus has ids beyond the vocabulary, or texts hold what only blanks hold."""
    of_blanks = (config.mask_token_id, config.gmask_token_id, config.smask_token_id, config.sop_token_id)
    require_ids(corpus, config.vocab_size, of_blanks)


def find_files(path: str) -> list[Path]:
    """Return the files of a path, folder or pattern in the order of their names; none for the name of a dataset."""
    is_local = Path(path).exists() or any(letter in path for letter in "*?[") or kind_of(path) is not None
    if not is_local and len(Path(path).parts) <= 2 and not path.startswith((".", "/")):
        return []
    return find_sources([path])


def remove_versions(folder: Path, name: str) -> None:
    """Remove what was written, by processes that were killed, of other versions of a corpus."""
    for home in folder.parent.glob(f".{glob.escape(name)}-*.partial"):
        if home.name != f".{folder.name}.partial":
            shutil.rmtree(home)


class _HubReader:
    """The documents of a dataset on the Hub as token ids."""

    def __init__(self, source: CorpusSource, tokenizer: GLMTokenizer, config: GLMConfig, row_length: int) -> None:
        self.source, self.tokenizer, self.config = source, tokenizer, config
        self.rule = InstructionRule(config, row_length, source.targets, source.truncate_inputs)
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError("datasets are read by the package of that name: pip install datasets") from error
        try:
            self.dataset = load_dataset(source.path, source.name, split=source.split, streaming=True)
            first = next(iter(self.dataset), None)
        except Exception as error:
            raise self._explained(error) from error
        if first is None:
            raise ValueError(f"{source.path} is empty: it holds no document")
        self.kind = "text" if source.text in first else "instructions"
        if self.kind == "instructions" and not {source.inputs, source.targets} <= first.keys():
            raise ValueError(
                f"{source.path} must have a field {source.text!r}, or {source.inputs!r} and {source.targets!r}, "
                f"got {', '.join(map(repr, first))}"
            )

    def parts(self) -> Iterator[list[list[int]]]:
        """Yield batches of documents with their `</s>`, or of contexts and targets in turns."""
        convert = self._texts if self.kind == "text" else self._instructions
        num_tokens = before = 0
        with tqdm(desc=f"Tokenizing {Path(self.source.path).name}", unit=" documents") as progress:
            batches = self.dataset.iter(batch_size=DOCUMENTS_AT_ONCE)
            while True:
                try:
                    batch = next(batches, None)
                except Exception as error:
                    raise self._explained(error) from error
                if batch is None:
                    break
                for piece in self._pieces(batch, before):
                    parts = convert(piece, before)
                    before += len(next(iter(piece.values())))
                    num_tokens += sum(map(len, parts))
                    progress.update(before - progress.n)
                    yield parts
        if not num_tokens:
            raise ValueError(f"{self.source.path} is empty: none of its {before} documents holds any text")

    def _pieces(self, batch: dict[str, list], before: int) -> Iterator[dict[str, list]]:
        """Yield a batch in pieces of at most `max_record_size`; ValueError if a record is longer."""
        most = self.source.max_record_size
        fields = (self.source.text,) if self.kind == "text" else (self.source.inputs, self.source.targets)
        columns = [batch[field] for field in fields if field in batch]
        records = zip(*columns, strict=True)
        sizes = [sum(len(str(value).encode("utf-8", "replace")) for value in record) for record in records]
        start = size = 0
        for number, of_record in enumerate(sizes):
            if of_record > most:
                raise ValueError(
                    f"record {before + number + 1} of {self.source.path} has {of_record:,} bytes, more than "
                    f"{most:,}; split it, or raise max_record_size"
                )
            if size + of_record > most:
                yield {name: values[start:number] for name, values in batch.items()}
                start, size = number, 0
            size += of_record
        yield {name: values[start:] for name, values in batch.items()}

    def _strings(self, batch: dict[str, list], field: str, before: int) -> list[str]:
        """Return a field of a batch; ValueError if a record has no string there."""
        values = batch.get(field) or [None] * len(next(iter(batch.values())))
        for number, value in enumerate(values, before + 1):
            if not isinstance(value, str):
                raise ValueError(
                    f"record {number} of {self.source.path} must have a string in {field!r}, got {value!r}"
                )
        return values

    def _texts(self, batch: dict[str, list], before: int) -> list[list[int]]:
        texts = self._strings(batch, self.source.text, before)
        documents = self.tokenizer(texts, split_special_tokens=True, verbose=False)["input_ids"]
        return [[*ids, self.config.eos_token_id] for ids in documents if ids]

    def _instructions(self, batch: dict[str, list], before: int) -> list[list[int]]:
        inputs = self.tokenizer(self._strings(batch, self.source.inputs, before), verbose=False)["input_ids"]
        targets = self._strings(batch, self.source.targets, before)
        targets = self.tokenizer(targets, split_special_tokens=True)["input_ids"]
        parts = []
        for number, (ids, target) in enumerate(zip(inputs, targets, strict=True), before + 1):
            try:
                parts += [self.rule.context(ids, len(target)), target]
            except ValueError as error:
                raise ValueError(f"record {number} of {self.source.path}: {error}") from error
        return parts

    def _explained(self, error: Exception) -> ValueError:
        return ValueError(f"{self.source.path} is no file here, and no dataset that the Hub returns: {error}")
