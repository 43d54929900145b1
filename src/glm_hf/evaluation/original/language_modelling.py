"""Files of texts whose tokens are predicted in windows; perplexity of a text, bits per byte of the Pile."""

from pathlib import Path
from typing import Any

from glm_hf.evaluation.evaluator import Evaluator, OnRow
from glm_hf.evaluation.original import metrics
from glm_hf.evaluation.original.items import FileResult, read_ids
from glm_hf.evaluation.original.task_file import TaskFile, read_items, read_lines
from glm_hf.evaluation.samples import Sample, num_windows, window_sample


class DocumentFile:
    """
    Documents of one file, cut into windows: the whole text, or for the Pile a document a line.

    Args:
        task: What is asked.
        path: Text, or JSON lines with `text` (ids), `text_pretokenized` and `meta`.
        evaluator: Tokenizes and scores.

    Raises:
        ValueError: If a line is damaged, there is no text, or windows leave a document's end out.
    """

    def __init__(self, task: TaskFile, path: Path, evaluator: Evaluator) -> None:
        self.task, self.evaluator = task, evaluator
        self.documents: list[dict[str, Any]] = []
        self.windows: list[tuple[int, Sample]] = []
        if task.kind == "Pile":
            read = [read_document(item, evaluator, f"{path}, item {i}") for i, item in enumerate(read_items(path), 1)]
        else:
            text = read_lines(path)
            tokens = evaluator.tokenize(text)
            read = [(tokens, {"num_original_tokens": metrics.count_words(text)})]
        for tokens, document in read:
            if not tokens:
                continue
            count = num_windows(len(tokens), task.generation_length, task.rule)
            self.documents.append({**document, "num_sequences": count, "num_tokens": len(tokens)})
            for number in range(count):
                sample = window_sample(tokens, number, task.generation_length, task.rule, evaluator.config)
                if not sample.targets:
                    raise ValueError(
                        f"{path}: generation_length {task.generation_length} leaves a window without tokens; it must "
                        f"be less than max_seq_length {task.max_seq_length}"
                    )
                self.windows.append((len(self.documents) - 1, sample))
        if not self.windows:
            raise ValueError(f"{path} has no text")

    @property
    def num_rows(self) -> int:
        """Number of windows."""
        return len(self.windows)

    def run(self, on_row: OnRow) -> FileResult:
        """Score the windows."""
        scores = self.evaluator.score([sample for _, sample in self.windows], on_row)
        losses = [-sum(known.log_probs[0]) for known in scores]
        report = [self._report(number, loss) for number, loss in enumerate(losses)]
        more = {"documents": self.documents}
        if self.task.kind != "Pile":
            found = {"PPL": metrics.perplexity(losses, self.documents[0]["num_original_tokens"])}
            return FileResult(found, len(report), report, more)
        of_documents: list[list[float]] = [[] for _ in self.documents]
        for (document, _), loss in zip(self.windows, losses, strict=True):
            of_documents[document].append(loss)
        parts = [
            (document["meta"]["pile_set_name"], document["utf8_length"], part)
            for document, part in zip(self.documents, of_documents, strict=True)
        ]
        return FileResult({"BPB": metrics.bits_per_byte(parts)}, len(report), report, more)

    def _report(self, number: int, loss: float) -> dict[str, Any]:
        """Return what is to be told of a window."""
        document, sample = self.windows[number]
        where = {"document": document} if self.task.kind == "Pile" else {}
        prompt = sample.input_ids[: sample.num_context]
        return {
            **where,
            "token": sample.input_ids,
            "target": [*prompt, *sample.targets],
            "position_id": sample.position_ids,
            "num_mutually_visible": sample.num_context,
            "num_loss_tokens": len(sample.targets),
            "loss": loss,
        }


def read_document(item: dict[str, Any], evaluator: Evaluator, where: str) -> tuple[list[int], dict[str, Any]]:
    """Return ids of a document of the Pile, and what is known of it; ValueError if something is wrong with it."""
    meta, text = item.get("meta"), item.get("text_pretokenized")
    if not isinstance(meta, dict) or not isinstance(meta.get("pile_set_name"), str):
        raise ValueError(f"{where}: meta must have a pile_set_name")
    if not isinstance(text, str):
        raise ValueError(f"{where}: text_pretokenized must be a text, whose bytes are counted")
    tokens = read_ids({"text": item["text"]} if "text" in item else item, "text", evaluator, where)
    return tokens, {"utf8_length": len(text.encode()), "meta": meta}
