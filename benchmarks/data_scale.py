"""What corpora of hundreds of billions of tokens cost before the first step, measured on small ones.

`tokenize` compares `tokenize_corpus` with 1 and 2 processes, `datasets.map(num_proc=2)` with the same tokenizer in
batches, and the sentencepiece library itself on one thread, which gives lists of ids and writes none. Texts are
English and Chinese lines from word lists, a few hundred characters each; the vocabulary is small, so that a text has
more tokens than in GLM-130B's. All take turns, once a round; the table shows medians, the ratios those of the rounds.

`plan` opens, resumes and reads plans of 200 million rows: data_plan.py.

Run: make bench-data-scale
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from corpus import chinese, english, generate
from data_plan import compare_plans
from sentencepiece import SentencePieceProcessor
from tiny_model import save_tiny_model, train_sentencepiece

from glm_hf import GLMTokenizer
from glm_hf.training import tokenize_corpus
from glm_hf.training.data.token_file import open_token_file
from glm_hf.training.data.tokenizing import sources

SCALING_GOAL = 0.9
DATASETS_GOAL = 1.5
SENTENCEPIECE_GOAL = 1.0
LINES_PER_TEXT = 8


def compare_tokenizing(folder: Path, num_bytes: int, rounds: int) -> None:
    """Print the speed of tokenizing beside its peers."""
    model_file = train_sentencepiece(folder / "text.model")
    save_tiny_model(folder / "model", model_file)
    texts, file = write_texts(folder, num_bytes)
    sources.TASK_BYTES = max(1, file.stat().st_size // 8)  # as many shards as there would be of a large corpus
    processor = SentencePieceProcessor(model_file=str(model_file))
    ways: dict[str, Callable[[], object]] = {
        "tokenize_corpus, 1 process": lambda: tokenize(folder, file, 1),
        "tokenize_corpus, 2 processes": lambda: tokenize(folder, file, 2),
        "datasets.map, 2 processes": lambda: map_datasets(folder, file),
        "sentencepiece, 1 thread": lambda: processor.encode(texts, num_threads=1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    num_tokens = open_token_file(folder / "out").facts["num_tokens"]
    print(f"{'tokenize':<32}{'seconds':>10}{'Mtokens/s':>12}{'MB/s':>8}")
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(f"{name:<32}{median:>10.2f}{num_tokens / median / 1e6:>12.2f}{num_bytes / median / 1e6:>8.2f}")
    one, two, peer, library = seconds.values()
    show_ratio("2 processes: share of linear scaling", one, [2 * taken for taken in two], SCALING_GOAL)
    show_ratio("2 processes against datasets.map", peer, two, DATASETS_GOAL)
    show_ratio("1 process against sentencepiece", library, one, SENTENCEPIECE_GOAL)


def show_ratio(name: str, slower: list[float], faster: list[float], goal: float) -> None:
    """Print the median of the rounds' ratios beside the goal."""
    ratio = statistics.median(a / b for a, b in zip(slower, faster, strict=True))
    print(f"{name:<42}{ratio:>6.2f}  (goal: {goal})")


def write_texts(folder: Path, num_bytes: int) -> tuple[list[str], Path]:
    """Write about so many bytes of texts; return the texts, and the file."""
    lines = generate([english, chinese], 2000, seed=1)
    some = ["\n".join(lines[n : n + LINES_PER_TEXT]) for n in range(0, len(lines), LINES_PER_TEXT)]
    texts = some * max(1, num_bytes // sum(len(text.encode()) for text in some))
    file = folder / "texts.jsonl"
    with file.open("w", encoding="utf-8") as written:
        written.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    return texts, file


def tokenize(folder: Path, file: Path, num_proc: int) -> None:
    """Tokenize a file by our command's function."""
    tokenize_corpus(file, folder / "out", tokenizer=folder / "model", num_proc=num_proc, overwrite=True)


def map_datasets(folder: Path, file: Path) -> None:
    """Tokenize a file as most scripts do."""
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    tokenizer = GLMTokenizer.from_pretrained(folder / "model")
    with tempfile.TemporaryDirectory() as cache:
        dataset = load_dataset("json", data_files=str(file), split="train", cache_dir=cache)
        encoded = dataset.map(
            lambda batch: {"input_ids": tokenizer(batch["text"], split_special_tokens=True)["input_ids"]},
            batched=True,
            num_proc=2,
            remove_columns=["text"],
        )
        assert len(encoded) == len(dataset)


PARTS = ("tokenize", "plan")


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--megabytes", type=float, default=120, help="size of the texts")
    parser.add_argument("--rows", type=int, default=200_000_000, help="of the plans")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{platform.machine()}, {date.today()}")
    if "tokenize" in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            compare_tokenizing(Path(folder), int(options.megabytes * 1e6), options.rounds)
    if "plan" in options.parts:
        compare_plans(options.rows, options.rounds)


if __name__ == "__main__":
    main()
