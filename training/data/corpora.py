"""Corpora as people have them, tokenized once: JSONL and Parquet files, and datasets on the Hub."""

import glob
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock
from tqdm import tqdm

from glm_hf.configuration_glm import GLMConfig
from glm_hf.folders.atomic import remove_leftovers
from glm_hf.folders.validation import require_matching_tokenizer
from glm_hf.tokenization_glm import GLMTokenizer
from glm_hf.training.data.token_file import FACTS_FILE, TokenFile, open_token_file, require_ids, write_token_file
from glm_hf.training.data.tokenizing.instructions import InstructionRule

DOCUMENTS_AT_ONCE = 1000
SCANNED_AT_ONCE = 2**20
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class CorpusSource:
    """
    Where a corpus comes from and how it is used.

    Args:
        path: File, folder or pattern of `.jsonl`, `.json` or `.parquet` files (also with `.gz` or `.zst` behind), name
            of a dataset on the Hub, or a folder that was tokenized before.
        weight: Share of the tokens among texts, or among instructions, in proportion to the other weights; by default
            the number of its tokens, so that every corpus is seen equally often.
        join_documents: Whether documents are joined to full rows, or stay samples of their own.
        text: Field of a text.
        inputs: Field of an instruction, which may hold a mask.
        targets: Field of what is to be written at its first mask.
        truncate_inputs: Whether to leave out the beginning of inputs that do not fit a row, which is an error else.
        name: Configuration of a dataset on the Hub.
        split: Split of a dataset on the Hub.
        max_record_size: Longest record in bytes; a longer one is an error, as the tokenizer takes some hundred times
            the memory.

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
    max_record_size: int = 8 * 2**20

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
    folder = Path(cache) / f"{Path(source.path).name.replace('*', '')}-{digest}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / ".lock"):  # of several processes, one tokenizes and the others wait
            remove_leftovers(folder.parent)
            if not folder.exists():
                reader = _Reader(source, files, tokenizer, config, row_length)
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
    is_local = Path(path).exists() or any(letter in path for letter in "*?[") or reader_of(path)
    if not is_local and len(Path(path).parts) <= 2 and not path.startswith((".", "/")):
        return []
    found = [Path(path)] if Path(path).is_file() else [Path(name) for name in glob.glob(path)]
    if Path(path).is_dir():
        found = [file for file in Path(path).rglob("*") if reader_of(file.name) and file.name != FACTS_FILE]
    if not found:
        raise FileNotFoundError(f"there are no corpus files at {path}")
    if unknown := [file for file in found if not reader_of(file.name)]:
        raise ValueError(f"{unknown[0]} must end in {', '.join(READERS)}, or these with .gz or .zst behind")
    if len({reader_of(file.name) for file in found}) > 1:
        raise ValueError(f"{path} mixes JSON and Parquet files; give them as two corpora")
    return sorted(found)


def reader_of(name: str) -> str | None:
    """Return which reader of `datasets` takes a file of this name."""
    suffixes = [suffix for suffix in Path(name).suffixes if suffix not in (".gz", ".zst")]
    return READERS.get(suffixes[-1]) if suffixes else None


def fingerprint(tokenizer: GLMTokenizer) -> str:
    """Return a digest of everything that turns text into ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"padding": None, "truncation": None}  # what the last call has set
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def require_short_lines(file: Path, most_bytes: int) -> None:
    """
    Check that no line of a JSON file is longer than the reader can bear; what cannot be read is left to the reader.

    Raises:
        ValueError: If a line has more than `most_bytes` bytes.
    """
    number, length = 1, 0
    for block in _read_blocks(file):
        *ended, rest = block.split(b"\n")
        for line in ended:
            if length + len(line) > most_bytes:
                break
            number, length = number + 1, 0
        else:
            length += len(rest)
            if length <= most_bytes:
                continue
        raise ValueError(
            f"line {number} of {file} has more than {most_bytes:,} bytes; split it, or raise max_record_size"
        )


def _read_blocks(file: Path) -> Iterator[bytes]:
    """Yield the content of a file, decompressed, as far as it can be read."""
    try:
        with fsspec.open(str(file), "rb", compression="infer") as content:
            while block := content.read(SCANNED_AT_ONCE):
                yield block
    except (OSError, EOFError, zlib.error):
        return


def find_bad_line(file: Path) -> str | None:
    """Tell which line of a JSONL file is no JSON object; None for an array, and for what cannot be looked into."""
    with fsspec.open(str(file), "rb", compression="infer") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if number == 1 and line.startswith(b"["):
                    return None
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} of {file} must be a JSON object, got {line[:40]!r}"
        except (OSError, EOFError):
            return None
        except (ValueError, RecursionError) as reason:
            return f"line {number} of {file} is not JSON: {reason}"
    return None


class _Reader:
    """The documents of a source as token ids."""

    def __init__(
        self, source: CorpusSource, files: list[Path], tokenizer: GLMTokenizer, config: GLMConfig, row_length: int
    ) -> None:
        self.source, self.files, self.tokenizer, self.config = source, files, tokenizer, config
        self.rule = InstructionRule(config, row_length, source.targets, source.truncate_inputs)
        for file in files if files and reader_of(files[0].name) == "json" else ():
            require_short_lines(file, source.max_record_size)
        try:
            self.dataset = self._open()
            first = next(iter(self.dataset), None)
        except StopIteration:  # how `load_dataset` ends when all files are empty
            first = None
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

    def _open(self) -> Any:
        """Return the records of the source as they stream in."""
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError("corpora are read by the package datasets: pip install datasets") from error
        if not self.files:
            return load_dataset(self.source.path, self.source.name, split=self.source.split, streaming=True)
        names = [glob.escape(str(file)) for file in self.files]  # `load_dataset` takes them for patterns
        return load_dataset(reader_of(self.files[0].name), data_files=names, split="train", streaming=True)

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
        """Name the line that is no JSON object, where that is what is wrong."""
        if not self.files:
            return ValueError(f"{self.source.path} is no file here, and no dataset that the Hub returns: {error}")
        if reader_of(self.files[0].name) == "json":
            for line in filter(None, map(find_bad_line, self.files)):
                return ValueError(line)
        return ValueError(f"{self.source.path} cannot be read: {error}")
