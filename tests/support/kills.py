"""
End commands at random moments, repeat them, and compare with what nothing has disturbed.

`python kills.py KILL INT TERM` ends commands so many times by each signal and prints a table; the suite tries a few.
"""

import gc
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from fuzzing import Tree, import_everything, read_tree
from pipeline_files import TAG, part_files, random_model
from tiny_model import config_for, save_tiny_model, train_sentencepiece

SIGNALS = {"KILL": signal.SIGKILL, "INT": signal.SIGINT, "TERM": signal.SIGTERM}
SENTENCES = {"INT": "interrupted", "TERM": "terminated"}
PARTS_OF_RUN = ("model.safetensors", "optimizer.pt", "scheduler.pt", "tokens.bin", "boundaries.npy", "corpus.json")


class Commands:
    """All commands that make something, with their sources in `root`."""

    def __init__(self, root: Path) -> None:
        from glm_hf import GLMForBlankInfilling, GLMTokenizer
        from glm_hf.training.data.tokenizing import sources

        self.root = root
        sources.TASK_BYTES = 1 << 14  # so that there are several shards
        save_tiny_model(root / "tiny", train_sentencepiece(root / "text.model"))
        tokenizer = GLMTokenizer.from_pretrained(root / "tiny")
        model = GLMForBlankInfilling(
            config_for(tokenizer, hidden_size=256, num_hidden_layers=4, intermediate_size=512)
        )
        model.half().save_pretrained(root / "model", max_shard_size="2MB")
        tokenizer.save_pretrained(root / "model")
        model = random_model(hidden_size=128, intermediate_size=256, num_hidden_layers=6)
        (root / "3d" / TAG).mkdir(parents=True)
        (root / "3d" / "latest").write_text(TAG)
        (root / "3d" / "parallel.json").write_text(json.dumps({"tp_size": 2, "pp_size": 1, "dp_size": 1}))
        model.config.save_pretrained(root / "3d")
        for name, content in part_files(model, 2).items():
            torch.save(content, root / "3d" / TAG / name)
        words = ["people", "time", "work", "天地", "the world", "好的一是在"]
        lines = [json.dumps({"text": " ".join(words[n % 6 :] + words * (n % 20))}) for n in range(2500)]
        (root / "text.jsonl").write_text("\n".join(lines) + "\n")
        self.ids = {
            name: value for name, value in config_for(tokenizer).to_dict().items() if name.endswith("_token_id")
        }
        (root / "ids.json").write_text(json.dumps({**self.ids, "num_attention_heads": 4}))
        status, err = finish(lambda: ["export-sat", str(root / "model"), str(root / "sat"), "--tensor", "2"], root)
        assert status == 0, err
        self.expected: dict[str, Tree] = {}
        self.seconds: dict[str, float] = {}

    def commands(self, folder: Path) -> dict[str, list[str]]:
        """Return the commands, which write to `folder`."""
        model, sat, shards = str(self.root / "model"), str(self.root / "sat"), ["--max-shard-size", "1MB"]
        return {
            "convert": ["convert", sat, "out", "--config", str(self.root / "ids.json"), *shards],
            "quantize": ["quantize", model, "out", "--bits", "4", *shards],
            "export-sat": ["export-sat", model, "out", "--tensor", "4"],
            "reshard": ["reshard", sat, "out", "--tensor", "4"],
            "export-hub": ["export-hub", model, "out"],
            "analyze": ["analyze", model, "--output", "out"],
            "export-3d": ["export-3d", str(self.root / "3d"), "out", *shards],
            "tokenize-corpus": [
                "tokenize",
                str(self.root / "text.jsonl"),
                "out",
                "--tokenizer",
                model,
                "--num-proc",
                "2",
            ],
            "tokenize": ["train", self._config(folder, save_strategy="no", max_steps=1), "--resume"],
            "train": ["train", self._config(folder, documents=300, save_strategy="steps", save_steps=1), "--resume"],
        }

    def _config(self, folder: Path, documents: int | None = None, **training: object) -> str:
        texts = self.root / "text.jsonl"
        if documents is not None:
            texts = self.root / f"{documents}.jsonl"
            if not texts.exists():
                lines = (self.root / "text.jsonl").read_text().splitlines(keepends=True)
                texts.write_text("".join(lines[:documents]))
        config = {
            "model": {"path": str(self.root / "tiny")},
            "data": {
                "cache": str(folder / "cache"),
                "recipe": {"row_length": 64, "window_length": 32},
                "train": [{"path": str(texts)}],
            },
            "training": {
                "output_dir": str(folder / "run"),
                "max_steps": 4,
                "per_device_train_batch_size": 2,
                "use_cpu": True,
                "disable_tqdm": True,
                "report_to": "none",
                **training,
            },
        }
        file = folder / f"{training['save_strategy']}.yaml"
        file.write_text(yaml.safe_dump(config))
        return str(file)

    def prepare(self) -> None:
        """Run every command undisturbed."""
        for name in self.commands(self.root):
            folder = self.root / f"undisturbed-{name}"
            folder.mkdir()
            start = time.monotonic()
            status, err = finish(lambda name=name, folder=folder: self.commands(folder)[name], folder)
            assert status == 0, (name, err)
            self.seconds[name] = time.monotonic() - start
            self.expected[name] = self.result(folder)

    def result(self, folder: Path) -> Tree:
        """Return what a command has made, without times, with the names of whatever it has left."""
        tree = read_tree(folder / "out")
        for part in ("run", "cache"):
            tree |= {name: data for name, data in read_tree(folder / part).items() if name.endswith(PARTS_OF_RUN)}
        left = [path for path in folder.rglob(".*") if path != folder / "cache" / ".lock"]
        # a corpus tells the path of its cache only in the name of its folder
        return tree | {f"left: {path.relative_to(folder)}": b"" for path in left}


def begin(arguments: Callable[[], list[str]], folder: Path) -> int:
    """Start a command in a process of its own, which listens to signals as the command does; return its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    (folder / "stderr").touch()
    given = arguments()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # as when glm_hf is imported
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    gc.freeze()  # as in forked.py
    code = 99
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what it runs behind
    logging.getLogger().handlers.clear()  # of pytest, which would keep warnings from stderr
    try:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False, buffering=1) for number in (1, 2))
        os.chdir(folder)
        from glm_hf.cli import run

        sys.argv = ["glm-hf", *given]
        code = run()
        sys.stdout.flush()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def finish(arguments: Callable[[], list[str]], folder: Path) -> tuple[int, str]:
    """Run a command to its end; return its exit code and what it printed on stderr."""
    _, status = os.waitpid(begin(arguments, folder), 0)
    return os.waitstatus_to_exitcode(status), (folder / "stderr").read_text(errors="replace")


def end_and_repeat(
    commands: Commands, name: str, kind: str, rng: random.Random, folder: Path
) -> tuple[str, list[str]]:
    """End a command at a random moment, and repeat it; return how it ended, and what is wrong then."""
    problems = []

    def arguments() -> list[str]:
        return commands.commands(folder)[name]

    pid = begin(arguments, folder)
    time.sleep(rng.uniform(0, 1.1) * commands.seconds[name])
    os.kill(pid, SIGNALS[kind])
    _, status = os.waitpid(pid, 0)
    code, err = os.waitstatus_to_exitcode(status), (folder / "stderr").read_text(errors="replace")
    if code == 0:
        ended = "finished"
    elif kind == "KILL":
        ended = "ended"
    else:
        ended = "ended"
        if code != 128 + SIGNALS[kind] and code != -SIGNALS[kind]:  # before it listens, it ends by the signal itself
            problems.append(f"exit code {code}: {err[-1500:]}")
        elif code > 0 and (SENTENCES[kind] not in err or "Traceback" in err):
            problems.append(f"no sentence: {err[-1500:]}")
    code, err = finish(arguments, folder)
    if code:
        problems.append(f"repeated: exit code {code}: {err[-1500:]}")
    code, err = finish(arguments, folder)
    if code or "already complete" not in err:
        problems.append(f"repeated once more: exit code {code}: {err[-1500:]}")
    found, expected = commands.result(folder), commands.expected[name]
    if differing := sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)):
        problems.append(f"differs from an undisturbed run: {differing}")
    return ended, problems


def main() -> int:
    torch.set_num_threads(1)
    import_everything()
    counts = dict(zip(SIGNALS, map(int, sys.argv[1:]), strict=False))
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = f"{temporary}/cache"
        commands = Commands(Path(tempfile.mkdtemp(dir=temporary)))
        commands.prepare()
        names = list(commands.seconds)
        table: dict[str, Counter] = {name: Counter() for name in names}
        failures = []
        for kind, number in counts.items():
            for count in range(number):
                name, rng = names[count % len(names)], random.Random(f"{kind} {count}")
                folder = Path(tempfile.mkdtemp(dir=temporary))
                ended, problems = end_and_repeat(commands, name, kind, rng, folder)
                table[name][f"{kind} {ended}"] += 1
                table[name]["wrong"] += bool(problems)
                failures += [f"{kind} {count} {name}: {problem}" for problem in problems]
                shutil.rmtree(folder)
    columns = [f"{kind} {ended}" for kind in SIGNALS for ended in ("ended", "finished")] + ["wrong"]
    for name, row in [("command", None), *table.items(), ("all", sum(table.values(), Counter()))]:
        cells = columns if row is None else [str(row[column]) for column in columns]
        sys.stdout.write("  ".join([name.ljust(10), *(cell.rjust(13) for cell in cells)]) + "\n")
    sys.stdout.write("".join(f"\n{failure}\n" for failure in failures))
    return 1 if failures else 0


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    sys.exit(main())
