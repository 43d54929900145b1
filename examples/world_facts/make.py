"""
Make the demonstration model from nothing: `python examples/world_facts/make.py`, in the root of the repository.

Needs Babel, datasets, tensorboard and matplotlib (`pip install -e '.[dev]'`), and a C++ compiler. All steps write to
`examples/world_facts/build`. A run that was interrupted is resumed. Another run on such a processor, interrupted or
not, gives the same model bit for bit. At the end, `examples/world_facts/model` holds the model in fp16 with its
tokenizer, and `examples/world_facts` the log, its picture and the results.
"""

import json
import shutil
from pathlib import Path

import torch
from corpus import write_corpus
from evaluate import evaluate, print_table
from tokenizer import train_tokenizer

from glm_hf import GLMForBlankInfilling, GLMQuantizationConfig, GLMTokenizer
from glm_hf.training.launch import train_run
from glm_hf.training.run_config import RunConfig

FOLDER = Path("examples/world_facts")
BUILD = FOLDER / "build"


def publish_model(run: Path, model_folder: Path) -> None:
    """Save the trained model in fp16, with its tokenizer."""
    model = GLMForBlankInfilling.from_pretrained(run, dtype=torch.float16)
    model.config.embedding_gradient_shrink = 1.0
    model.config.use_cache = True
    model.save_pretrained(model_folder)
    tokenizer = GLMTokenizer.from_pretrained(run, model_max_length=model.config.max_position_embeddings)
    tokenizer.save_pretrained(model_folder)


def publish_log(run: Path) -> None:
    """Write the log as JSONL, and draw the losses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    (FOLDER / "training_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, label in (("mask", "[MASK]"), ("gmask", "[gMASK]"), ("instruction", "instructions")):
        points = [(entry["samples"], entry[f"loss_{name}"]) for entry in history if f"loss_{name}" in entry]
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1)
    axes.set(xlabel="samples (rows of 256 tokens)", ylabel="loss per predicted token", yscale="log")
    axes.legend()
    figure.savefig(FOLDER / "loss.png", dpi=120)


def publish_results() -> None:
    """Evaluate the model in fp16 (computed in fp32) and in INT4, print tables and write results.json."""
    tokenizer = GLMTokenizer.from_pretrained(FOLDER / "model")
    found = {}
    for name, options in (("fp16", {}), ("int4", {"quantization_config": GLMQuantizationConfig(bits=4)})):
        model = GLMForBlankInfilling.from_pretrained(FOLDER / "model", dtype=torch.float32, **options).eval()
        results = evaluate(model, tokenizer, BUILD / "corpus")
        print(name)
        print_table(results, by_relation=False)
        found[name] = {key: {part: result[part] for part in ("right", "count")} for key, result in results.items()}
    (FOLDER / "results.json").write_text(json.dumps(found, indent=2) + "\n")


def main() -> None:
    """Run all steps."""
    write_corpus(BUILD / "corpus")
    if not (BUILD / "tokenizer" / "tokenizer.json").is_file():
        train_tokenizer(BUILD / "corpus", BUILD / "tokenizer")
    run = Path(train_run(RunConfig.read(FOLDER / "config.yaml"), resume=True))
    publish_model(run, FOLDER / "model")
    shutil.copy("LICENSE", FOLDER / "model" / "LICENSE")
    publish_log(run)
    publish_results()


if __name__ == "__main__":
    main()
