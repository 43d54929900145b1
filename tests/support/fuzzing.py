"""
Damage files at random, run the command on them, and judge how it ends.

The oracle: the result of the undamaged files, or one line on stderr, exit code 1 and nothing left. `make fuzz N=2000`
tries so many damages over all subjects and prints a table; the suite tries a few.
"""

import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from golden import DATA
from mutations import damage_bytes, damage_json, places, replace_file
from pipeline_files import TAG, part_files, random_model
from safetensors import safe_open
from tiny_model import save_tiny_model, train_sentencepiece

SECONDS = 60
MEMORY = 3 * 2**30  # beyond what the process has
RIGHT, CLEAN, TRACEBACK, WRONG, HANG = OUTCOMES = ("right", "clean error", "traceback", "silently wrong", "hang")
Tree = dict[str, bytes]


class Opener:
    """Pickles as a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@dataclass
class Attack:
    """
    A command on damaged files.

    Attributes:
        arguments: Arguments of the command.
        what: What was damaged.
        is_right: Whether a result, stdout and what lies at `output`, is right.
        output: Where the command writes.
        stdin: What it reads from stdin.
    """

    arguments: list[str]
    what: str
    is_right: Callable[[str, Tree], bool]
    output: Path | None = None
    stdin: bytes = b""


def read_tree(folder: Path) -> Tree:
    if not folder.is_dir():
        return {}
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(attack: Attack, folder: Path) -> tuple[str, str]:
    """Run an attack in a process of its own; return the outcome and what it printed on stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    (folder / "stdin").write_bytes(attack.stdin)
    pid = os.fork()
    if not pid:
        _child(attack, folder)
    end = time.monotonic() + SECONDS
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return HANG, ""
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(ended[1])
    out, err = ((folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    if (folder / "harm").exists():
        return WRONG, "code from a file has run"
    if code not in (0, 1, 2) or "Traceback" in err:
        return TRACEBACK, f"exit code {code}: {err}"
    tree = read_tree(attack.output) if attack.output is not None else {}
    if code == 0:
        return (RIGHT if attack.is_right(out, tree) else WRONG), err
    lines = [line for line in err.splitlines() if line.startswith("glm-hf: error: ")]
    left = [path.name for path in folder.iterdir() if path.name.startswith((".out", "out"))]
    if len(lines) != 1 or err.splitlines()[-1] != lines[0] or left:
        return TRACEBACK, f"{len(lines)} lines of error, left: {left}: {err}"
    return CLEAN, err


def _child(attack: Attack, folder: Path) -> None:
    code = 99
    logging.getLogger().handlers.clear()  # of pytest, which would keep warnings from stderr
    try:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
        os.dup2(os.open(folder / "stdin", os.O_RDONLY), 0)
        sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False))
        sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), line_buffering=True)
        sys.stderr = io.TextIOWrapper(open(2, "wb", closefd=False), line_buffering=True)
        sys.__stderr__ = sys.stderr
        limit = _virtual_memory() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os.chdir(folder)
        from glm_hf.cli import main

        code = main(attack.arguments)
        sys.stdout.flush()
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _virtual_memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


class Subjects:
    """What can be damaged; the undamaged ones lie in `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sat = DATA / "cfg1" / "sat_tp2"
        names = ("mask", "gmask", "smask", "eod", "sop", "eop")
        special = {"eos_token_id": 2} | {f"{name}_token_id": 144 + i for i, name in enumerate(names)}
        (root / "ids.json").write_text(json.dumps(special))
        self.model = root / "model"
        save_tiny_model(self.model, train_sentencepiece(root / "text.model"))
        self._save_3d(root / "checkpoint-3d")
        self.texts = root / "text.jsonl"
        words = ["people", "time", "work", "天地", "the world", "好的一是在"]
        lines = [json.dumps({"text": " ".join(words[n % 6 :] + words)}) for n in range(30)]
        self.texts.write_text("\n".join(lines) + "\n")
        self.expected: dict[str, Any] = {}
        self.config = {
            "model": {"path": str(self.model), "dtype": "float32"},
            "data": {
                "cache": str(root / "cache"),
                "train": [{"path": str(self.texts), "join_documents": False, "weight": 1.0}],
                "recipe": {"row_length": 64, "window_length": 32, "mask_probability": 0.3},
                "instruction_share": 0.05,
                "seed": 1,
            },
            "training": {
                "output_dir": str(root / "run"),
                "max_steps": 1,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-3,
                "save_strategy": "steps",
                "save_steps": 1,
                "use_cpu": True,
                "disable_tqdm": True,
                "report_to": "none",
            },
        }

    def _save_3d(self, folder: Path) -> None:
        model = random_model()
        (folder / TAG).mkdir(parents=True)
        (folder / "latest").write_text(TAG)
        (folder / "parallel.json").write_text(json.dumps({"tp_size": 2, "pp_size": 1, "dp_size": 1}))
        model.config.save_pretrained(folder)
        for name, content in part_files(model, 2).items():
            torch.save(content, folder / TAG / name)

    def prepare(self) -> None:
        """Run everything on what is not damaged."""
        folder = self.root / "undamaged"
        folder.mkdir()
        (self.root / "run.yaml").write_text(yaml.safe_dump(self.config))
        commands = {
            "convert": ["convert", str(self.sat), "out", "--config", str(self.root / "ids.json")],
            "export-3d": ["export-3d", str(self.root / "checkpoint-3d"), "out"],
            "train": ["train", str(self.root / "run.yaml")],
            **{f"model {command[0]}": command for command in self.model_commands(self.model)},
        }
        for name, command in commands.items():
            work = folder / name.replace(" ", "-")
            work.mkdir()

            def keep(out: str, tree: Tree, name: str = name) -> bool:
                self.expected[name] = out, tree
                return True

            outcome, err = run(Attack(command, "nothing", keep, work / "out"), work)
            assert outcome == RIGHT, (name, err)
        [self.cache] = [path for path in (self.root / "cache").iterdir() if path.is_dir()]
        self.checkpoint = self.root / "run" / "checkpoint-1"

    def model_commands(self, model: Path) -> list[list[str]]:
        return [
            ["fill", "--model", str(model), "the [MASK] of people", "--max-new-tokens", "4"],
            ["quantize", str(model), "out", "--bits", "8"],
            ["export-sat", str(model), "out", "--tensor", "2"],
            ["export-hub", str(model), "out"],
            ["verify", str(model)],
            ["analyze", str(model), "--output", "out"],
        ]

    def rank_bytes(self, rng: random.Random, folder: Path) -> Attack:
        """Bytes of a checkpoint of the original code."""
        src = Path(shutil.copytree(self.sat, folder / "sat"))
        path = rng.choice(sorted(path for path in src.rglob("*") if path.is_file()))
        what = damage_bytes(path, rng) if rng.random() < 0.9 else replace_file(path, rng)
        return self._convert(src, what, folder)

    def rank_names(self, rng: random.Random, folder: Path) -> Attack:
        """Names of rank files, and files beside them."""
        src = Path(shutil.copytree(self.sat, folder / "sat"))
        files = sorted((src / "49300").iterdir())
        path, other = rng.sample(files, 2)
        name = rng.choice(
            (
                *("mp_rank_0000_model_states.pt", "mp_rank_000_model_states.pt", "mp_rank_1_model_states.pt"),
                *("mp_rank_００_model_states.pt", "mp_rank_٠١_model_states.pt", "MP_RANK_00_MODEL_STATES.PT"),
                *("mp_rank_00_model_states.pt.bak", "mp_rank_00_model_states (1).pt", "mp_rank_02_model_states.pt"),
                *("mp_rank_-1_model_states.pt", "mp_rank_00_model_states.pth", "mp_rank_ 0_model_states.pt"),
            )
        )
        content = path.read_bytes()
        if rng.random() < 0.5:
            path.unlink()
        elif rng.random() < 0.3:
            path.write_bytes(other.read_bytes())
        (src / "49300" / name).write_bytes(content)
        return self._convert(src, f"{name} beside {path.name}", folder)

    def rank_content(self, rng: random.Random, folder: Path) -> Attack:
        """What a rank file has pickled."""
        src = Path(shutil.copytree(self.sat, folder / "sat"))
        path = rng.choice(sorted((src / "49300").iterdir()))
        content = torch.load(path, weights_only=True)
        module = content["module"]
        name = rng.choice(sorted(module))
        old = module[name]
        deep: list = []
        for _ in range(5000):
            deep = [deep]
        changes: dict[str, Any] = {
            "expanded": lambda: torch.zeros(1).half().expand(50_000, 50_000),
            "one long row": lambda: torch.zeros(1).half().expand(1, 2_000_000_000),
            "code": lambda: Opener(folder / "harm"),
            "number": lambda: 5,
            "list": lambda: [old],
            "deep": lambda: deep,
            "transposed": lambda: old.t().contiguous() if old.ndim == 2 else old[:-1],
            "float64": lambda: old.double(),
            "complex": lambda: old.to(torch.complex64),
            "sparse": lambda: old.float().to_sparse(),
            "empty": lambda: old[:0],
            "scalar": lambda: torch.tensor(1.0).half(),
            "meta": lambda: old.to("meta"),
            "parameter": lambda: torch.nn.Parameter(old.float(), requires_grad=False),
        }
        kind = rng.choice((*changes, "no name", "number as name", "no module", "extra", "list of all"))
        if kind in changes:
            module[name] = changes[kind]()
        elif kind == "no name":
            del module[name]
        elif kind == "number as name":
            module[5] = old
        elif kind == "no module":
            content = {"model": module}
        elif kind == "extra":
            module["transformer.layers.0.attention.extra"] = old
        else:
            content = [module]
        sys.setrecursionlimit(20_000)
        torch.save(content, path)
        sys.setrecursionlimit(1000)
        return self._convert(src, f"{kind} for {name}", folder, may_differ=kind == "parameter")

    def _convert(self, src: Path, what: str, folder: Path, may_differ: bool = False) -> Attack:
        expected = self.expected["convert"][1]
        arguments = ["convert", str(src), "out", "--config", str(self.root / "ids.json")]
        return Attack(arguments, what, lambda out, tree: tree == expected or may_differ, folder / "out")

    def model_values(self, rng: random.Random, folder: Path) -> Attack:
        """Values in the JSON files of a model folder."""
        model = Path(shutil.copytree(self.model, folder / "model"))
        name = rng.choice(("config.json", "config.json", "generation_config.json", "tokenizer_config.json"))
        added = {
            "config.json": (
                *("quantization_config", "attn_implementation", "num_labels", "auto_map", "id2label", "torch_dtype"),
                *("pad_token_id", "architectures", "tie_word_embeddings", "rope_parameters", "transformers_version"),
            ),
            "generation_config.json": (
                "num_beams",
                "temperature",
                "suppress_tokens",
                "max_length",
                "cache_implementation",
            ),
            "tokenizer_config.json": (
                "auto_map",
                "padding_side",
                "model_max_length",
                "chat_template",
                "extra_special_tokens",
            ),
        }[name]
        what, may_be_meant = damage_json(model / name, rng, added)
        return self._model_attack(rng, model, what, may_be_meant, folder)

    def model_files(self, rng: random.Random, folder: Path) -> Attack:
        """Bytes and kinds of the files of a model folder; of weights only the header, as they have no checksum."""
        model = Path(shutil.copytree(self.model, folder / "model"))
        path = rng.choice(sorted(model.iterdir()))
        if rng.random() < 0.2:
            return self._model_attack(rng, model, replace_file(path, rng), False, folder)
        within = None
        if path.suffix == ".safetensors":
            within = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        before = path.read_bytes()
        what = damage_bytes(path, rng, within)
        return self._model_attack(rng, model, what, path.suffix == ".json" and _still_json(path, before), folder)

    def model_index(self, rng: random.Random, folder: Path) -> Attack:
        """The index of weights in several files."""
        model = Path(shutil.copytree(self.model, folder / "model"))
        with safe_open(model / "model.safetensors", framework="pt") as file:
            weight_map = dict.fromkeys(file.keys(), "model-00001-of-00001.safetensors")
        (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
        index = model / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
        (folder / "model-00001-of-00001.safetensors").symlink_to(self.model / "model.safetensors")
        if rng.random() < 0.4:
            content = json.loads(index.read_text())
            name = rng.choice(sorted(content["weight_map"]))
            paths = ("../model-00001-of-00001.safetensors", str(self.model / "model.safetensors"), "config.json")
            content["weight_map"][name] = rng.choice(paths)
            index.write_text(json.dumps(content))
            return self._model_attack(rng, model, f"index: {content['weight_map'][name]}", False, folder)
        what, _ = damage_json(index, rng)
        return self._model_attack(rng, model, what, False, folder)

    def model_weights(self, rng: random.Random, folder: Path) -> Attack:
        """Weights that are NaN or infinite, missing, unknown or of another shape."""
        from safetensors.torch import load_file, save_file

        model = Path(shutil.copytree(self.model, folder / "model"))
        weights = load_file(model / "model.safetensors")
        name = rng.choice(sorted(weights))
        kind = rng.choice(("nan", "inf", "missing", "unknown", "shape", "integers", "float64"))
        if kind in ("nan", "inf"):
            weights[name].view(-1)[rng.randrange(weights[name].numel())] = float(kind)
        elif kind == "missing":
            del weights[name]
        elif kind == "unknown":
            weights["model.extra"] = torch.ones(2)
        elif kind == "shape":
            weights[name] = torch.cat((weights[name], weights[name]))
        else:
            weights[name] = weights[name].to(torch.int64 if kind == "integers" else torch.float64)
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        command = rng.choice(self.model_commands(model))

        def is_right(out: str, tree: Tree) -> bool:
            err = (folder / "stderr").read_text()
            if kind in ("nan", "inf"):  # reported, or refused; answers that it does not reach are right
                return "not finite" in err or command[0] in ("fill", "analyze")  # which reads matrices only
            return False

        return Attack(command, f"{kind} in {name}: {command[0]}", is_right, folder / "out")

    def _model_attack(self, rng: random.Random, model: Path, what: str, may_be_meant: bool, folder: Path) -> Attack:
        command = rng.choice(self.model_commands(model))
        expected, expected_tree = self.expected[f"model {command[0]}"]
        weights = {name: content for name, content in expected_tree.items() if name.endswith((".safetensors", ".pt"))}

        def is_right(out: str, tree: Tree) -> bool:
            if may_be_meant:
                return True
            same_weights = {*weights.values()} <= {*tree.values()}  # whatever the names of the files
            return same_weights and (command[0] != "fill" or out == expected)

        return Attack(command, f"{what}: {command[0]}", is_right, folder / "out")

    def checkpoints(self, rng: random.Random, folder: Path) -> Attack:
        """A checkpoint of training, which is verified or resumed from."""
        shutil.copytree(self.root / "run", folder / "run")
        checkpoint = folder / "run" / "checkpoint-1"
        path = rng.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file()))
        before = path.read_bytes()
        kind = rng.random()
        what = damage_bytes(path, rng) if kind < 0.8 else replace_file(path, rng)
        changed = not path.is_file() or path.read_bytes() != before
        unchanged_json = path.name == "checksums.json" and path.is_file() and _still_json(path, before, same=True)
        if rng.random() < 0.7:
            arguments = ["verify", str(checkpoint)]
        else:
            config = json.loads(json.dumps(self.config))
            config["training"] |= {"output_dir": str(folder / "run"), "max_steps": 2}
            (folder / "run.yaml").write_text(yaml.safe_dump(config))
            arguments = ["train", str(folder / "run.yaml"), "--resume"]
        return Attack(arguments, f"{what}: {arguments[0]}", lambda out, tree: not changed or unchanged_json)

    def token_caches(self, rng: random.Random, folder: Path) -> Attack:
        """A tokenized corpus, which is verified or trained on."""
        cache = folder / "cache" / self.cache.name
        shutil.copytree(self.cache, cache)
        path = rng.choice(sorted(cache.iterdir()))
        before = path.read_bytes()
        what = damage_bytes(path, rng) if rng.random() < 0.8 else replace_file(path, rng)
        changed = not path.is_file() or path.read_bytes() != before
        is_json = path.name == "corpus.json"
        if rng.random() < 0.6:
            arguments = ["verify", str(cache)]
        else:
            config = json.loads(json.dumps(self.config))
            config["training"] |= {"output_dir": str(folder / "run")}
            config["data"]["cache"] = str(folder / "cache")
            (folder / "run.yaml").write_text(yaml.safe_dump(config))
            arguments = ["train", str(folder / "run.yaml")]
        return Attack(arguments, f"{what}: {arguments[0]}", lambda out, tree: not changed or is_json)

    def configurations(self, rng: random.Random, folder: Path) -> Attack:
        """The configuration of a training run."""
        config = json.loads(json.dumps(self.config))
        config["training"]["output_dir"] = str(folder / "run")
        file = folder / "run.yaml"
        if rng.random() < 0.4:
            file.write_text(yaml.safe_dump(config))
            what = damage_bytes(file, rng)
        else:
            file.write_text(json.dumps(config))
            what, _ = damage_json(file, rng)
        return Attack(["train", str(file)], what, lambda out, tree: True)

    def texts_of_stdin(self, rng: random.Random, folder: Path) -> Attack:
        """Lines that are to be filled."""
        pieces = (
            b"people",
            b"[MASK]",
            b"[gMASK]",
            b"[sMASK]",
            b" ",
            "天".encode(),
            b"\xff",
            b"\0",
            b"sop",
            b"</s>",
            b"a" * 3000,
        )
        lines = [b"".join(rng.choices(pieces, k=rng.randrange(0, 6))) for _ in range(rng.randrange(0, 5))]
        end = rng.choice((b"\n", b"\r\n"))
        stdin = end.join(lines) + rng.choice((b"", end))
        count = len(stdin.split(b"\n")) - (stdin.endswith(b"\n") or not stdin)
        arguments = ["fill", "--model", str(self.model), "--json", "--max-new-tokens", "3"]
        return Attack(arguments, repr(stdin[:60]), lambda out, tree: len(out.splitlines()) == count, stdin=stdin)

    def checkpoints_3d(self, rng: random.Random, folder: Path) -> Attack:
        """A checkpoint of 3D training."""
        src = Path(shutil.copytree(self.root / "checkpoint-3d", folder / "checkpoint-4"))
        path = rng.choice(sorted(path for path in src.rglob("*") if path.is_file()))
        if path.suffix == ".json" and rng.random() < 0.5:
            what, may_be_meant = damage_json(path, rng)
        else:
            before = path.read_bytes()
            what = damage_bytes(path, rng) if rng.random() < 0.9 else replace_file(path, rng)
            may_be_meant = path.suffix == ".json" and path.is_file() and _still_json(path, before)
        expected = {
            name: content for name, content in self.expected["export-3d"][1].items() if name.endswith("tensors")
        }

        def is_right(out: str, tree: Tree) -> bool:
            return may_be_meant or all(tree.get(name) == content for name, content in expected.items())

        return Attack(["export-3d", str(src), "out"], what, is_right, folder / "out")

    def all(self) -> list[Callable[[random.Random, Path], Attack]]:
        return [
            *(self.rank_bytes, self.rank_names, self.rank_content, self.model_values, self.model_files),
            *(self.model_index, self.model_weights, self.checkpoints, self.token_caches, self.configurations),
            *(self.texts_of_stdin, self.checkpoints_3d),
        ]


def _still_json(path: Path, before: bytes, same: bool = False) -> bool:
    """Tell whether a damaged JSON file still has values of the kinds that it had, or the same if asked."""
    try:
        new, old = json.loads(path.read_bytes()), json.loads(before)
    except (ValueError, RecursionError):
        return False
    return new == old if same else len(places(new)) > 0


def fuzz(subjects: Subjects, number: int, seed: int, folder: Path) -> tuple[dict[str, Counter], list[str]]:
    """Try `number` attacks in turns; return the outcomes by subject, and what went wrong, a line each."""
    table: dict[str, Counter] = {attack.__name__: Counter() for attack in subjects.all()}
    failures = []
    for count in range(number):
        make = subjects.all()[count % len(table)]
        rng = random.Random(f"{seed} {count}")
        work = Path(tempfile.mkdtemp(dir=folder))
        attack = make(rng, work)
        outcome, err = run(attack, work)
        table[make.__name__][outcome] += 1
        if os.environ.get("FUZZ_SHOW"):
            sys.stderr.write(f"SHOW {make.__name__} {count} {outcome} {attack.what}: {err.strip()[-300:]}\n")
        if outcome not in (RIGHT, CLEAN):
            failures.append(f"{make.__name__} {seed} {count}: {attack.what}: {outcome}: {err.strip()[-1500:]}")
        shutil.rmtree(work, ignore_errors=True)
    return table, failures


def import_everything() -> None:
    """Import once what every forked process would take seconds to import."""
    import datasets  # noqa: F401
    import matplotlib.figure  # noqa: F401
    from transformers import Trainer, pipeline  # noqa: F401

    import glm_hf.cli.fill  # noqa: F401
    import glm_hf.conversion.analysis.report  # noqa: F401
    import glm_hf.hub.export  # noqa: F401
    import glm_hf.training.launch  # noqa: F401


def main() -> int:
    number, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    torch.set_num_threads(1)
    import_everything()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        subjects = Subjects(Path(tempfile.mkdtemp(dir=folder)))
        subjects.prepare()
        table, failures = fuzz(subjects, number, seed, Path(folder))
    rows = [["damaged", "tried", *OUTCOMES]]
    for name, counts in table.items():
        rows.append([name.replace("_", " "), str(counts.total()), *(str(counts[outcome]) for outcome in OUTCOMES)])
    totals = sum(table.values(), Counter())
    rows.append(["all", str(totals.total()), *(str(totals[outcome]) for outcome in OUTCOMES)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        sys.stdout.write("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + "\n")
    for failure in failures:
        sys.stdout.write(f"\n{failure}\n")
    return 1 if failures else 0


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    sys.exit(main())
