"""Runs from a configuration file, as `glm-hf train` starts them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from forked import run_ranks
from small_runs import prepare_deepspeed
from transformers import AutoModelForCausalLM, AutoTokenizer

from glm_hf import GLMForBlankInfilling, GLMQuantizationConfig
from glm_hf.cli import main
from glm_hf.folders.atomic import exclusive
from glm_hf.folders.records import facts_of_files
from glm_hf.training import GLMTrainingArguments
from glm_hf.training.data.random_numbers import key_of
from glm_hf.training.launch import build_trainer, train_run
from glm_hf.training.run_config import RunConfig, fields_of

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "training").glob("*.yaml"))
WORDS = ["people", "time", "work", "天地", "people work", "the time of people is the work of the world", "好的一是在"]


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [" ".join(WORDS[n % 7 :] + WORDS[: n % 5]) for n in range(40)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    lines = [json.dumps({"inputs": f"the [MASK] of {word}", "targets": word}) for word in WORDS]
    (folder / "instructions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def settings(model_folder, corpus, tmp_path) -> dict:
    return {
        "model": {"path": str(model_folder)},
        "data": {
            "cache": str(tmp_path / "cache"),
            "recipe": {"row_length": 64, "window_length": 32},
            "train": [{"path": str(corpus / "text.jsonl"), "join_documents": False}],
        },
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
        },
    }


def write(settings: dict, folder: Path) -> Path:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def run_command(settings: dict, folder: Path, capsys, *options: str) -> tuple[int, str, str]:
    code = main(["train", str(write(settings, folder)), *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_run_saves_a_model_that_loads(settings, tmp_path, capsys):
    code, out, _ = run_command(settings, tmp_path, capsys)
    assert (code, out.splitlines()[-1]) == (0, str(tmp_path / "run"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert type(model).__name__ == "GLMForBlankInfilling"
    assert len(tokenizer) <= model.config.vocab_size
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


def test_a_new_model_is_made_from_sizes(settings, tmp_path, model_folder):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    settings["model"] = {"tokenizer": str(model_folder), "config": sizes}
    trainers = [build_trainer(RunConfig.read(write(settings, tmp_path))) for _ in range(2)]
    config = trainers[0].model.config
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert (config.hidden_size, config.vocab_size) == (16, len(tokenizer))
    assert config.gmask_token_id == tokenizer.gmask_token_id
    weights = [trainer.model.get_input_embeddings().weight for trainer in trainers]
    assert torch.equal(*weights)


def test_settings_of_every_section_arrive(settings, tmp_path, corpus):
    settings["model"]["overrides"] = {"hidden_dropout": 0.25}
    settings["model"]["attn_implementation"] = "eager"
    settings["data"] |= {"instruction_share": [[0, 0.0], [1000, 0.5]], "seed": 5}
    settings["data"]["train"] += [{"path": str(corpus / "instructions.jsonl")}]
    settings["data"]["eval"] = [{"path": str(corpus / "text.jsonl"), "join_documents": False}]
    settings["training"]["embedding_gradient_shrink"] = [[0, 0.1], [10, 1.0]]
    trainer = build_trainer(RunConfig.read(write(settings, tmp_path)))
    config = trainer.model.config
    assert (config.hidden_dropout, config._attn_implementation) == (0.25, "eager")
    assert trainer.data_collator.recipe.row_length == 64
    assert trainer.data_collator.seed == 5
    assert len(trainer.train_dataset.rows) == 2
    assert {trainer.train_dataset[n].objective for n in range(20)} == {"mask", "gmask"}
    assert "instruction" in {trainer.train_dataset[n].objective for n in range(1000, 1100)}
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))


def test_a_finished_run_is_not_overwritten_but_goes_on(settings, tmp_path, capsys):
    assert run_command(settings, tmp_path, capsys)[0] == 0
    settings["training"]["max_steps"] = 3
    code, _, err = run_command(settings, tmp_path, capsys)
    assert code == 1
    assert "holds checkpoint-2 already; resume, or choose another folder" in err
    code, out, _ = run_command(settings, tmp_path, capsys, "--resume")
    assert code == 0
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]
    assert run_command(settings, tmp_path, capsys, "--output-dir", str(tmp_path / "other"))[0] == 0
    assert (tmp_path / "other" / "checkpoint-3").is_dir()


@pytest.mark.parametrize("options", [[], ["--resume"]])
def test_a_finished_run_is_complete_while_nothing_has_changed(settings, tmp_path, corpus, capsys, caplog, options):
    assert run_command(settings, tmp_path, capsys)[0] == 0
    before = facts_of_files(tmp_path / "run")
    assert run_command(settings, tmp_path, capsys, *options)[:2] == (0, f"{tmp_path / 'run'}\n")
    assert "run is already complete" in caplog.text
    assert facts_of_files(tmp_path / "run") == before
    caplog.clear()
    (tmp_path / "run" / "model.safetensors").unlink()
    assert run_command(settings, tmp_path, capsys, "--resume")[0] == 0
    assert "already complete" not in caplog.text
    assert (tmp_path / "run" / "model.safetensors").is_file()
    [file, *_] = corpus.rglob("*.jsonl") if corpus.is_dir() else [corpus]
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(json.dumps({"text": "one more"}) + "\n")
    assert run_command(settings, tmp_path, capsys)[0] == 1


def test_a_run_begins_anew_when_told_to(settings, tmp_path, capsys):
    settings["training"]["max_steps"] = 3
    assert run_command(settings, tmp_path, capsys)[0] == 0
    settings["training"]["max_steps"] = 2
    assert run_command(settings, tmp_path, capsys, "--overwrite")[0] == 0
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2"}


def test_two_commands_do_not_share_a_folder(settings, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with exclusive(tmp_path / "run" / ".lock", tmp_path / "run"):
        for option in ("--resume", "--overwrite"):
            code, _, err = run_command(settings, tmp_path, capsys, option)
            assert (code, err.count("another process is writing to")) == (1, 1)


@pytest.mark.parametrize(
    "text",
    [
        "model: &a [" + "[" * 3000,
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "? {1: 2}\n: 3",
        "model: !!python/object/apply:os.system ['touch harm']",
        "\x00",
        "- " * 5000,
    ],
)
def test_hostile_yaml_is_one_line(tmp_path, capsys, text):
    (tmp_path / "run.yaml").write_text(text)
    assert main(["train", str(tmp_path / "run.yaml")]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "run.yaml" in line
    assert len(line) < 1000


@pytest.mark.parametrize(
    "peft",
    [
        {"type": "LORA", "r": 4},
        {"type": "IA3"},
        {"type": "PREFIX_TUNING", "num_virtual_tokens": 4},
    ],
    ids=lambda peft: peft["type"],
)
@pytest.mark.parametrize("quantization", [None, {"bits": 4}], ids=["fp32", "int4"])
def test_adapters_learn_save_and_load(settings, tmp_path, corpus, peft, quantization):
    from peft import PeftModel

    settings["peft"] = peft
    settings["data"]["train"] = [{"path": str(corpus / "instructions.jsonl")}]
    settings["training"] |= {"max_steps": 12, "learning_rate": 0.1, "warmup_share": 0.0, "save_strategy": "no"}
    settings["training"] |= {"divergence_action": "none"}
    if quantization:
        settings["model"]["quantization"] = quantization
    trainer = build_trainer(RunConfig.read(write(settings, tmp_path)))
    before = {name: tensor.clone() for name, tensor in trainer.model.get_base_model().state_dict().items()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])
    after = trainer.model.get_base_model().state_dict()
    adapters = ("lora_", "ia3_", "prompt")
    assert all(torch.equal(before[name], after[name]) for name in before if not any(a in name for a in adapters))
    trainer.save_model()
    options = {"quantization_config": GLMQuantizationConfig(**quantization)} if quantization else {}
    base = GLMForBlankInfilling.from_pretrained(settings["model"]["path"], dtype=torch.float32, **options)
    again = PeftModel.from_pretrained(base, trainer.args.output_dir).eval()
    ids = trainer.processing_class(["the [MASK] of people"])["input_ids"]
    expected = trainer.model.eval().fill_blanks(ids, max_new_tokens=4)
    assert again.fill_blanks(ids, max_new_tokens=4) == expected


def test_prompts_without_a_place_in_packed_rows_are_refused(settings, tmp_path):
    settings["peft"] = {"type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    with pytest.raises(ValueError, match="PROMPT_TUNING has no place for a prompt of each; use PREFIX_TUNING"):
        build_trainer(RunConfig.read(write(settings, tmp_path)))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_worked_configurations_have_known_keys_only(file, tmp_path):
    run = RunConfig.read(file)
    assert run.data.train
    portable = {name: value for name, value in run.training.items() if name not in ("deepspeed", "fp16")}
    fields_of(GLMTrainingArguments, portable | {"output_dir": str(tmp_path), "report_to": "none"}, "training")


def change(settings: dict, path: str, value: object) -> None:
    *sections, last = path.split(".")
    for section in sections:
        settings = settings[section]
    settings[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("surprise", {}, "sections of"),
        ("model.pth", "x", "keys of model are"),
        ("data.trian", [], "keys of data are"),
        ("data.train", [{"path": "nowhere.jsonl"}], "no corpus files at nowhere.jsonl"),
        ("data.train", [{"pth": "nowhere"}], "keys of a corpus are"),
        ("data.recipe", {"row_lenght": 3}, "keys of recipe are"),
        ("training.learn_rate", 1, "keys of training are"),
        ("training.train_samples", 1, ""),
        ("peft", {"type": "MAGIC"}, "peft: type must be one of"),
        ("peft", {"type": "LORA", "rank": 3}, "keys of peft LORA are"),
        ("training.global_batch_size", 0, "batches must grow"),
        ("data.instruction_share", [[5, 0.1], [1, 0.2]], "growing places"),
        ("data.instruction_share", 1.5, r"instruction_share must lie in"),
        ("data.train", None, "needs data: train, a list"),
        ("data.train", [{}], "keys of a corpus: "),
        ("data.recipe", 3, "keys of recipe must stand with their values"),
        ("training.learning_rate", "abc", "learning_rate must be a number, got 'abc'"),
        ("peft", {"type": "LORA", "r": "x"}, "r must be a number, got 'x'"),
        ("model.quantization", {"bitz": 4}, "keys of quantization: "),
        ("model.overrides", {"hiden_dropout": 0.1}, "keys of overrides are"),
        ("model", {"config": {"hidden_size": 16}}, "config and tokenizer"),
    ],
)
def test_a_wrong_configuration_is_one_line(settings, tmp_path, capsys, path, value, message):
    change(settings, path, value)
    if path == "training.train_samples":
        settings["training"] |= {"max_steps": -1}
        message = "1 samples do not fill one batch of 2"
    code, _, err = run_command(settings, tmp_path, capsys)
    assert code == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("glm-hf: error: ")
    assert message.replace("\\", "") in last
    assert not list(tmp_path.glob("run/checkpoint-*"))


def test_a_file_that_is_no_configuration_is_one_line(tmp_path, capsys):
    for content in ("a: [1", "just text", "model: 3"):
        (tmp_path / "config.yaml").write_text(content)
        assert main(["train", str(tmp_path / "config.yaml")]) == 1
        assert capsys.readouterr().err.startswith("glm-hf: error: ")
    assert main(["train", str(tmp_path / "missing.yaml")]) == 1


def test_training_that_stops_itself_is_one_line(settings, tmp_path, capsys, monkeypatch):
    from glm_hf.training import GLMTrainer

    monkeypatch.setattr(GLMTrainer, "_squared_gradient_norms", lambda self: torch.full((4,), torch.nan))
    monkeypatch.setattr(GLMTrainer, "compute_loss", nan_loss(GLMTrainer.compute_loss))
    code, _, err = run_command(settings, tmp_path, capsys)
    assert code == 1
    assert "training stops before the update of step 1: the loss is nan" in err.splitlines()[-1]


def nan_loss(compute_loss):
    return lambda *args, **kwargs: compute_loss(*args, **kwargs) * torch.nan


def test_train_run_needs_no_command(settings, tmp_path):
    assert train_run(RunConfig.read(write(settings, tmp_path))) == str(tmp_path / "run")


def test_weights_and_kinds_of_every_corpus_arrive(settings, tmp_path, corpus):
    texts = [
        {"path": str(corpus / "text.jsonl"), "join_documents": join, "weight": 1 + join} for join in (False, True)
    ]
    settings["data"] |= {"train": texts, "eval": texts[:1]}
    settings["training"]["seed"] = 7
    trainer = build_trainer(RunConfig.read(write(settings, tmp_path)))
    assert trainer.train_dataset.weights.tolist() == [1, 2]
    assert [rows.join_documents for rows in trainer.train_dataset.rows] == [False, True]
    assert [rows.key for rows in trainer.train_dataset.rows] == [key_of(7, 0), key_of(7, 1)]
    assert (trainer.data_collator.seed, len(trainer.eval_dataset.rows)) == (7, 1)


def test_instructions_are_five_percent_by_default(settings, tmp_path, corpus):
    settings["data"]["train"] += [{"path": str(corpus / "instructions.jsonl")}]
    dataset = build_trainer(RunConfig.read(write(settings, tmp_path))).train_dataset
    assert dataset.instruction_share(np.array([0, 10**6])).tolist() == [0.05, 0.05]


def test_sentence_blanks_know_where_sentences_end(settings, tmp_path, tokenizer):
    settings["data"]["recipe"] |= {"smask_probability": 1.0, "mask_probability": 0.0}
    trainer = build_trainer(RunConfig.read(write(settings, tmp_path)))
    assert tokenizer.convert_tokens_to_ids("<n>") in trainer.data_collator.sentence_end_ids


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_has_the_dtype_of_its_section(settings, tmp_path, dtype):
    settings["model"]["dtype"] = dtype
    assert build_trainer(RunConfig.read(write(settings, tmp_path))).model.dtype == getattr(torch, dtype)


def test_overrides_reach_a_new_model(settings, tmp_path, model_folder):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    settings["model"] = {"tokenizer": str(model_folder), "config": sizes, "overrides": {"hidden_dropout": 0.25}}
    assert build_trainer(RunConfig.read(write(settings, tmp_path))).model.config.hidden_dropout == 0.25


def test_weights_of_some_corpora_only_are_refused(settings, tmp_path, corpus):
    path = str(corpus / "text.jsonl")
    settings["data"]["train"] = [{"path": path, "weight": 2}, {"path": path}]
    with pytest.raises(ValueError, match="give every corpus a weight, or none"):
        build_trainer(RunConfig.read(write(settings, tmp_path)))


def test_numbers_are_read_as_people_write_them(settings, tmp_path):
    file = write(settings, tmp_path)
    file.write_text(file.read_text() + "  learning_rate: 1e-4\n  initial_learning_rate: 5E-6\n")
    assert RunConfig.read(file).training["learning_rate"] == 1e-4
    assert build_trainer(RunConfig.read(file)).args.initial_learning_rate == 5e-6


def run_parallel(settings: dict, folder: Path, world_size: int) -> list[int]:
    """Run the command on processes as DeepSpeed's launcher starts them, and return their exit codes."""
    prepare_deepspeed()
    file = write(settings, folder)
    return run_ranks(lambda rank: main([f"--local_rank={rank}", "train", str(file)]), world_size, folder)


@pytest.mark.parametrize("is_new", [False, True])
def test_a_model_is_spread_over_processes(settings, tmp_path, model_folder, is_new):
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    sizes["vocab_size"] = 600  # of which 2 ranks can have a half each
    if is_new:
        settings["model"] = {"tokenizer": str(model_folder), "config": sizes}
    settings["parallel"] = {"pp_size": 2} if not is_new else {"tp_size": 2, "pp_size": 1}
    assert run_parallel(settings, tmp_path, 2) == [0, 0]
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "run").config
    assert config.num_hidden_layers == (3 if is_new else 2)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").vocab_size > 0
    assert (tmp_path / "run" / "checkpoint-2" / "parallel.json").is_file()


@pytest.mark.parametrize("is_new", [False, True])
def test_overrides_reach_a_model_that_is_spread(settings, tmp_path, model_folder, is_new):
    prepare_deepspeed()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    if is_new:
        settings["model"] = {"tokenizer": str(model_folder), "config": sizes}
    settings["model"]["overrides"] = {"hidden_dropout": 0.25}
    settings["parallel"] = {"dp_size": 1}
    run = RunConfig.read(write(settings, tmp_path))
    assert run_ranks(lambda rank: build_trainer(run).model.layers[0].hidden_dropout, 1, tmp_path) == [0.25]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel": {"tp_size": 2}}, "takes 2 processes, but 1 were started"),
        ({"parallel": {"tp": 1}}, "parallel takes tp_size, pp_size, dp_size, partition"),
        ({"parallel": {"dp_size": 1}, "peft": {"type": "IA3"}}, "under parallel, adapters are of type LORA, got IA3"),
        ({"parallel": {"dp_size": 1}, "model": {"dtype": "float16"}}, "dtype follows from fp16 and bf16 of training"),
        ({"parallel": {"dp_size": 1}, "model": {"quantization": {"bits": 4}}}, "parallel takes weights that"),
    ],
)
def test_what_cannot_be_spread_is_one_error(settings, tmp_path, capsys, change, message):
    settings["model"] |= change.pop("model", {})
    code, _, err = run_command(settings | change, tmp_path, capsys)
    assert code == 1
    assert message in err.splitlines()[-1]
