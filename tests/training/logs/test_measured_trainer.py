"""Losses by corpus, norms of gradients by group of layers and shares of the peak, against sums by hand."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import run_ranks, start, wait
from pipeline_runs import make_3d_trainer
from small_runs import RECIPE, make_trainer, prepare_deepspeed, zero
from torch.nn.functional import cross_entropy

from glm_hf import GLMConfig, GLMForBlankInfilling
from glm_hf.planning.training import TrainingPlan, TrainingRequest
from glm_hf.planning.training_time import GPUS, Machine
from glm_hf.sharding.degrees import ParallelDegrees
from glm_hf.training import BlankInfillingDataset
from glm_hf.training.data.dataset import names_of
from glm_hf.training.data.token_file import open_token_file, write_token_file
from glm_hf.training.measurements import LossMeter, ParameterGroups

SOURCES = {"text/en/*.jsonl": "text", "text/zh/*.jsonl": "text", "instructions.jsonl": "instructions"}
NAMES = ("text/en", "text/zh", "instructions")
RUN = {"max_steps": 3, "per_device_train_batch_size": 2, "global_batch_size": 16, "max_grad_norm": 0.5}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> BlankInfillingDataset:
    folder, rng = tmp_path_factory.mktemp("corpora"), np.random.default_rng(0)
    for number, (source, kind) in enumerate(SOURCES.items()):
        parts = [rng.integers(30, 500, rng.integers(4, 20)).tolist() for _ in range(40)]
        write_token_file(folder / str(number), [parts], {"kind": kind, "source": source}, 512)
    opened = [open_token_file(folder / str(number)) for number in range(len(SOURCES))]
    return BlankInfillingDataset(opened, RECIPE, instruction_share=0.3)


def alone(function, folder: Path):
    """Run a function on a process of its own."""
    folder.mkdir()
    return wait(start(function, folder / "result"), folder / "result")


def steps(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def measured(entry: dict) -> dict[str, float]:
    return {name: value for name, value in entry.items() if "/" in name}


def corpus_of(row, corpora: BlankInfillingDataset) -> str:
    """Find the corpus of a row by the tokens of its first text alone."""
    text = row.tokens[: int(row.lengths[0].sum())].tobytes()
    [found] = [
        name
        for name, rows in zip(NAMES, corpora.rows, strict=True)
        if text in np.tile(rows.corpus.tokens, 2).astype(np.int64).tobytes()  # a text may go on at the first token
    ]
    return found


def brute_force(model, corpora: BlankInfillingDataset, batch: dict, numbers: range) -> dict[str, float]:
    """Mean loss over the tokens of each corpus, of rows one after another."""
    losses = {name: [] for name in NAMES}
    for row, number in enumerate(numbers):
        inputs = {name: batch[name][row : row + 1] for name in ("input_ids", "position_ids", "segment_ids")}
        labels = batch["shift_labels"][row : row + 1]
        with torch.no_grad():
            found = cross_entropy(model.eval()(**inputs).logits.mT, labels, reduction="none")
        losses[corpus_of(corpora[number], corpora)] += found[labels != -100].tolist()
    assert all(losses.values())
    return {name: sum(values) / len(values) for name, values in losses.items()}


def test_the_loss_of_a_corpus_is_the_mean_over_its_tokens(model_folder, tmp_path, corpora):
    trainer = make_trainer(model_folder, tmp_path, data=corpora, **RUN)
    batch = trainer.data_collator([corpora[number] for number in range(16)])
    model = GLMForBlankInfilling.from_pretrained(model_folder, dtype="float32")
    expected = brute_force(model, corpora, batch, range(16))
    evaluated = trainer.evaluate(torch.utils.data.Subset(corpora, range(16)))
    assert not any("/" in name for name in evaluated)  # of a dataset whose corpora have no names
    trainer.train()
    assert {name: steps(trainer)[0][f"loss/{name}"] for name in NAMES} == pytest.approx(expected, abs=1e-5)


def test_evaluation_tells_the_losses_of_corpora(model_folder, tmp_path, corpora, monkeypatch):
    monkeypatch.setattr(BlankInfillingDataset, "__len__", lambda self: 16)
    trainer = make_trainer(model_folder, tmp_path, per_device_eval_batch_size=3)
    batch = trainer.data_collator([corpora[number] for number in range(16)])
    expected = brute_force(trainer.model, corpora, batch, range(16))
    found = trainer.evaluate(corpora)
    assert {name: found[f"eval_loss/{name}"] for name in NAMES} == pytest.approx(expected, abs=1e-5)


def test_rows_of_no_known_corpus_count_for_none():
    meter = LossMeter(torch.device("cpu"), ("a", "b"))
    labels = torch.tensor([[5, 6], [7, -100]])
    meter.add(torch.ones(3), labels, labels, torch.tensor([0, 2]), torch.tensor([-1, 1]), torch.tensor([0, 1]))
    assert meter.describe(meter.take()) == {"loss_mask": 1.0, "loss_gmask": 1.0, "loss/b": 1.0}


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["corpus/en/*.jsonl", "corpus/zh/*.parquet"], ("en", "zh")),
        (["/data/a.jsonl.gz", "b.jsonl"], ("/data/a", "b")),
        (["corpus/text.en.jsonl", "corpus/text.zh.jsonl.zst"], ("text.en", "text.zh")),
        (["corpus/v1.5", "corpus/part.*", "corpus/part-*.json"], ("v1.5", "part", "part-")),
        (["user/set", "user/set"], ("set-0", "set-1")),
        (["data/c4 (en).jsonl", "data/wiki"], ("c4_en_", "wiki")),
    ],
)
def test_corpora_have_short_names_each_another(paths, names):
    assert names_of(paths) == names


def test_norms_of_groups_are_those_of_their_gradients(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, **RUN)
    [batch, *_] = list(trainer.get_train_dataloader())
    trainer.train()
    model = GLMForBlankInfilling.from_pretrained(model_folder, dtype="float32", hidden_dropout=0.0)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "segment_ids")}
    cross_entropy(model(**inputs).logits.flatten(0, 1), batch["shift_labels"].flatten()).backward()

    def norm(*prefixes: str) -> float:
        own = [p.grad.flatten() for name, p in model.named_parameters() if name.startswith(prefixes)]
        return torch.cat(own).norm().item()

    logged = steps(trainer)[0]
    assert measured(logged) == pytest.approx(
        {
            "grad_norm/layers_0": norm("model.layers.0."),
            "grad_norm/layers_1": norm("model.layers.1."),
            "grad_norm/other": norm("model.norm."),
        },
        rel=1e-3,
    )
    assert logged["embedding_grad_norm"] == pytest.approx(norm("model.embed_tokens."), rel=1e-3)
    parts = [logged["embedding_grad_norm"], *measured(logged).values()]
    assert np.linalg.norm(parts) == pytest.approx(logged["grad_norm"], rel=1e-4)  # clipped after that


def test_seventy_layers_have_eight_groups_in_their_order():
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(70)]
    named = [(f"base_model.model.layers.{number}.mlp.lora_A", weight) for number, weight in enumerate(weights)]
    groups = ParameterGroups(named, torch.ones(1), 70)
    spans = [tuple(map(int, found)) for found in re.findall(r"layers_(\d+)-(\d+)", " ".join(groups.names))]
    assert [start for start, _ in spans] == [0, *(end + 1 for _, end in spans[:-1])]
    assert (len(spans), spans[-1][1]) == (8, 69)
    squares = groups.squared_norms([weight.detach() * 2 for weight in weights], torch.device("cpu"))
    assert squares[1:-1].tolist() == [4 * (end - start + 1) for start, end in spans]
    assert (float(squares[0]), float(squares[-1]), groups.has_embedding) == (0, 0, False)


def test_large_gradients_in_fp16_do_not_overflow():
    weight = torch.nn.Parameter(torch.full((1000,), 6e4, dtype=torch.float16))
    groups = ParameterGroups([("model.norm.weight", weight)], None, 2)
    assert groups.squared_norms([weight.detach()], torch.device("cpu"))[-1].sqrt() == pytest.approx(
        6e4 * 1000**0.5, rel=1e-3
    )


def test_only_what_is_trained_has_a_norm(model_folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = GLMForBlankInfilling.from_pretrained(model_folder, dtype="float32")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["dense"], layers_to_transform=[1], r=4))
    trainer = make_trainer(model_folder, tmp_path, objects={"model": adapted}, max_steps=1)
    trainer.train()
    logged = steps(trainer)[0]
    assert measured(logged).keys() == {"grad_norm/layers_1"}
    assert logged["grad_norm/layers_1"] == pytest.approx(logged["grad_norm"], rel=1e-5)
    assert "embedding_grad_norm" not in logged


def compare(found: list[dict], expected: list[dict], tolerance: float) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert {f"loss/{name}" for name in NAMES} <= measured(theirs).keys() == measured(mine).keys()
        assert measured(mine) == pytest.approx(measured(theirs), abs=tolerance)


@pytest.mark.parametrize("stage", [None, 1, 2, 3])
def test_processes_log_what_one_does(model_folder, tmp_path, corpora, stage):
    if stage is not None:
        prepare_deepspeed()

    def train(**options):
        trainer = make_trainer(model_folder, tmp_path / "run", data=corpora, **RUN, **options)
        trainer.train()
        return steps(trainer)

    def rank_main(rank: int):
        if stage is None:
            return train()
        return train(deepspeed=zero(stage))

    expected = alone(train, tmp_path / "alone")
    for found in run_ranks(rank_main, 2, tmp_path):
        compare(found, expected, 1e-4)


def test_a_pipeline_logs_what_one_process_does(deep_folder, tmp_path, corpora):
    options = {"embedding_gradient_shrink": 1.0, "peak_tflops": 1.0, "activation_checkpointing": True}

    def train():
        trainer = make_trainer(deep_folder, tmp_path / "one", data=corpora, **RUN, **options)
        trainer.train()
        return steps(trainer)

    def rank_main(rank: int):
        degrees = {"tp_size": 2, "pp_size": 2, "dp_size": 1}
        trainer = make_3d_trainer(deep_folder, tmp_path / "run", degrees, data=corpora, **RUN, **options)
        trainer.train()
        return steps(trainer)

    expected = alone(train, tmp_path / "alone")
    for found in run_ranks(rank_main, 4, tmp_path):
        compare(found, expected, 1e-5)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine["hfu"] / mine["mfu"] == pytest.approx(theirs["hfu"] / theirs["mfu"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_utilization_is_that_of_the_plan(model_folder, tmp_path, checkpointing):
    config = GLMConfig.from_pretrained(model_folder)
    machine = Machine(GPUS["A100-40GB"])
    recompute = "full" if checkpointing else "none"
    request = TrainingRequest(config, ParallelDegrees(), machine, 1, 1, 48, "fp16", recompute)
    plan = TrainingPlan(request)
    trainer = make_trainer(
        model_folder, tmp_path, max_steps=1, peak_tflops=2.0, activation_checkpointing=checkpointing
    )
    trainer.train()
    logged = steps(trainer)[0]
    assert logged["hfu"] / logged["mfu"] == pytest.approx(plan.hfu / plan.mfu)
    assert logged["mfu"] == pytest.approx(plan.model_operations / 48 * logged["tokens_per_second"] / 2e12)


def test_a_processor_has_no_utilization(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, max_steps=1)
    trainer.train()
    assert not {"mfu", "hfu"} & steps(trainer)[0].keys()


def test_tensorboard_gets_all_curves(model_folder, tmp_path, corpora, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    settings = RUN | {"report_to": "tensorboard", "peak_tflops": 1.0}
    trainer = make_trainer(model_folder, tmp_path, data=corpora, **settings)
    trainer.train()
    events = event_accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    logged = steps(trainer)
    names = {name for entry in logged for name in entry} - {"step"}
    assert {"loss/text/en", "grad_norm/layers_0", "loss_gmask", "hfu", "tokens_per_second"} <= names
    assert {f"train/{name}" for name in names} <= set(events.Tags()["scalars"])
    values = [event.value for event in events.Scalars("train/loss/text/en")]
    assert values == pytest.approx([entry["loss/text/en"] for entry in logged])
