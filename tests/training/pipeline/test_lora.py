"""LoRA on the layers of a pipeline against PEFT on the whole model in one process."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import yaml
from forked import run_ranks, start, wait
from pipeline_runs import EVALUATED, SETTINGS, make_3d_trainer, same_on_all, without_times
from safetensors.torch import load_file, save_file
from small_runs import RECIPE, Texts, make_arguments

from glm_hf import GLMConfig, GLMForBlankInfilling
from glm_hf.cli import main
from glm_hf.conversion import export_3d_checkpoint
from glm_hf.sharding.degrees import ParallelDegrees
from glm_hf.training import DataCollatorForBlankInfilling, GLMTrainer
from glm_hf.training.pipeline.checkpoint import require_own
from glm_hf.training.pipeline.lora import LoRAPlan

ALL = {"tp_size": 2, "pp_size": 2, "dp_size": 2}
LINEARS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
CLIPPED = {"max_grad_norm": 0.05}  # below every norm, so that all gradients are clipped
SAVING = CLIPPED | {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
EXACT = 1e-5  # of losses, norms and weights: sums in another order


def lora(**changes) -> peft.LoraConfig:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 32, "target_modules": LINEARS} | changes)


def save_adapter_of_peft(model: Path, folder: Path, **changes) -> Path:
    """Save an adapter that changes the model's answers."""
    torch.manual_seed(0)
    whole = peft.get_peft_model(GLMForBlankInfilling.from_pretrained(model, dtype="float32"), lora(**changes))
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    whole.save_pretrained(folder)
    return folder


def train_in_one_process(model: Path, adapter: Path, folder: Path, **changes) -> list[dict]:
    """Train the adapter by PEFT, save it as `folder/adapter`, and return what was logged."""

    def whole():
        base = GLMForBlankInfilling.from_pretrained(model, dtype="float32", hidden_dropout=0.0)
        trained = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
        args = make_arguments(folder / "alone", **(SETTINGS | changes))
        collator = DataCollatorForBlankInfilling(base.config, RECIPE, seed=3)
        trainer = GLMTrainer(trained, args, collator, train_dataset=Texts(), eval_dataset=Texts(EVALUATED))
        trainer.train()
        trainer.save_model(str(folder / "adapter"))
        return [without_times(entry) for entry in trainer.state.log_history]

    return wait(start(whole, folder / "result"), folder / "result")


def train_in_a_pipeline(model: Path, adapter, folder: Path, degrees: dict, resume=None, **changes) -> list[dict]:
    """Train the adapter, save it as `folder/adapter`, and return what was logged, which all ranks agree on."""

    def rank_main(rank: int):
        trainer = make_3d_trainer(model, folder, degrees, objects={"peft_config": adapter}, **changes)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        trainer.save_model(str(folder / "adapter"))
        return [without_times(entry) for entry in trainer.state.log_history]

    return same_on_all(rank_main, degrees, folder)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def largest_difference(folder: Path, other: Path) -> float:
    found, expected = weights_of(folder), weights_of(other)
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def steps(history: list[dict]) -> list[dict]:
    return [entry for entry in history if "loss" in entry]


def compare(found: list[dict], expected: list[dict]) -> None:
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        assert mine == pytest.approx(theirs, abs=EXACT), theirs["step"]


@pytest.fixture(scope="module")
def adapter(deep_folder, tmp_path_factory) -> Path:
    return save_adapter_of_peft(deep_folder, tmp_path_factory.mktemp("peft") / "adapter")


@pytest.fixture(scope="module")
def alone(deep_folder, adapter, tmp_path_factory):
    """Folder of one process, and what it logs."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, train_in_one_process(deep_folder, adapter, folder, **SAVING)


@pytest.fixture(scope="module")
def spread(deep_folder, adapter, tmp_path_factory):
    """Folder of a run on 8 processes with checkpoints, and what it logs."""
    folder = tmp_path_factory.mktemp("spread") / "run"
    return folder, train_in_a_pipeline(deep_folder, adapter, folder, ALL, **SAVING)


def test_eight_processes_train_an_adapter_as_peft_does_in_one(alone, spread, adapter):
    (whole, expected), (folder, history) = alone, spread
    assert len(steps(history)) == 10
    compare(history[:-1], expected[:-1])  # the last entry sums up the run
    assert largest_difference(folder / "adapter", whole / "adapter") <= EXACT
    assert largest_difference(folder / "adapter", adapter) > 1e-2  # it has learned
    assert min(entry["grad_norm"] for entry in steps(history)) > CLIPPED["max_grad_norm"]


def test_the_operations_are_those_of_peft(deep_folder, adapter, tmp_path):
    """Frozen weights take no gradients of their own."""
    degrees = {"tp_size": 2, "dp_size": 2}
    ranks = same_on_all(
        lambda rank: (
            make_3d_trainer(deep_folder, tmp_path / "run", degrees, objects={"peft_config": adapter}).flops_per_token
        ),
        degrees,
        tmp_path / "run",
    )
    whole = GLMForBlankInfilling.from_pretrained(deep_folder)
    config, frozen = whole.config, whole.num_parameters()
    added = sum(weight.numel() for weight in weights_of(adapter).values())
    of_attention = 12 * config.num_hidden_layers * config.hidden_size * RECIPE.row_length
    assert ranks == 4 * frozen + 6 * added + of_attention


def test_ranks_that_have_slices_of_the_tokens_train_the_same_adapter(deep_folder, adapter, alone, tmp_path):
    whole, expected = alone
    degrees = {"tp_size": 2, "pp_size": 2, "dp_size": 1, "sequence_parallel": True}
    history = train_in_a_pipeline(deep_folder, adapter, tmp_path / "run", degrees, **SAVING)
    compare(history[:-1], expected[:-1])
    assert largest_difference(tmp_path / "run" / "adapter", whole / "adapter") <= EXACT


def logits_of(model: Path, adapter: Path | None) -> torch.Tensor:
    base = GLMForBlankInfilling.from_pretrained(model, dtype="float32")
    whole = base if adapter is None else peft.PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        return whole.eval()(torch.arange(40, 72)[None]).logits


def test_the_folder_is_one_of_peft(deep_folder, alone, spread, adapter):
    (whole, _), (folder, _) = alone, spread
    expected = logits_of(deep_folder, whole / "adapter")
    torch.testing.assert_close(logits_of(deep_folder, folder / "adapter"), expected, atol=1e-4, rtol=0)
    for other in (adapter, None):
        assert (logits_of(deep_folder, other) - expected).abs().max() > 1e-2
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    fields, theirs = (json.loads((each / "adapter_config.json").read_text()) for each in (folder / "adapter", adapter))
    assert fields.pop("base_model_name_or_path") == str(deep_folder)
    theirs.pop("base_model_name_or_path")
    assert {name: sorted(v) if isinstance(v, list) else v for name, v in fields.items()} == {
        name: sorted(v) if isinstance(v, list) else v for name, v in theirs.items()
    }


def test_only_the_adapter_is_trained_and_in_checkpoints(deep_folder, spread, adapter, tmp_path):
    """A checkpoint is itself a folder of PEFT."""
    folder, _ = spread
    number = sum(weight.numel() for weight in weights_of(adapter).values())
    assert largest_difference(folder / "checkpoint-10", folder / "adapter") == 0
    stored = {
        name
        for file in (folder / "checkpoint-10" / "global_step10").glob("layer_*")
        for name in torch.load(file, weights_only=True)
    }
    assert {name.rsplit(".", 2)[1] for name in stored} == {"lora_A", "lora_B"}

    def rank_main(rank: int) -> tuple:
        trainer = make_3d_trainer(deep_folder, tmp_path / "run", {}, objects={"peft_config": adapter}, max_steps=1)
        trainer.train()
        states = trainer.engine.optimizer.optimizer.state.values()
        frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
        return sum(state["exp_avg"].numel() for state in states), [p.grad is None for p in frozen]

    num_states, has_none = same_on_all(rank_main, {}, tmp_path / "ranks")
    assert num_states == number
    assert all(has_none)
    assert len(has_none) == 51


def test_a_run_resumes_bit_for_bit(deep_folder, tmp_path, spread, adapter):
    folder, history = spread
    again = train_in_a_pipeline(deep_folder, adapter, tmp_path / "run", ALL, resume=folder / "checkpoint-8", **SAVING)
    assert steps(again) == steps(history)
    assert largest_difference(tmp_path / "run" / "adapter", folder / "adapter") == 0


@pytest.mark.parametrize(("pipeline", "tensor", "data"), [(4, 1, 1), (1, 2, 2)])
def test_a_run_resumes_with_other_degrees(deep_folder, tmp_path, spread, adapter, pipeline, tensor, data):
    folder, history = spread
    degrees = {"tp_size": tensor, "pp_size": pipeline, "dp_size": data}
    again = train_in_a_pipeline(
        deep_folder, adapter, tmp_path / "run", degrees, resume=folder / "checkpoint-4", **SAVING
    )
    compare(again[:-1], history[:-1])
    assert largest_difference(tmp_path / "run" / "adapter", folder / "adapter") <= EXACT


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": None},
        {"target_modules": r".*mlp\..*", "use_rslora": True, "r": 5},
        {"target_modules": "all-linear", "exclude_modules": ["dense"], "init_lora_weights": "gaussian"},
        {"rank_pattern": {"dense": 2}, "alpha_pattern": {"dense_h_to_4h": 3}, "layers_to_transform": [0, 3]},
    ],
)
def test_a_new_adapter_has_the_updates_of_peft_and_follows_the_seed(deep_folder, tmp_path, changes):
    """Names, sizes and factors as in one process, and values that do not depend on how the model is spread."""
    config = lora(**changes)
    whole = peft.get_peft_model(GLMForBlankInfilling.from_pretrained(deep_folder), lora(**changes))
    expected = peft.get_peft_model_state_dict(whole)
    scalings = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in whole.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }

    def save(degrees: dict, name: str, **settings) -> dict[str, torch.Tensor]:
        def rank_main(rank: int) -> None:
            trainer = make_3d_trainer(
                deep_folder, tmp_path / "run", degrees, objects={"peft_config": config}, **settings
            )
            assert trainer.model.adapter.scalings == scalings
            trainer.save_model(str(tmp_path / name))

        same_on_all(rank_main, degrees, tmp_path / "ranks")
        return weights_of(tmp_path / name)

    found, again = save({}, "one"), save({"tp_size": 2, "pp_size": 2}, "four")
    assert {name: weight.shape for name, weight in found.items()} == {n: w.shape for n, w in expected.items()}
    assert all(torch.equal(found[name], again[name]) for name in found)
    other = save({}, "other", seed=7)
    for name, weight in found.items():
        if "lora_B" in name:
            assert not weight.any()
        else:
            assert not torch.equal(weight, other[name])
            assert float(weight.std()) == pytest.approx(float(expected[name].std()), rel=0.4)
    torch.testing.assert_close(logits_of(deep_folder, tmp_path / "one"), logits_of(deep_folder, None))


def test_adapters_drop_inputs_alike_on_all_ranks_and_again_when_recomputed(deep_folder, tmp_path):
    """What ranks share stays the same on all of them; of what they have apart each drops its own."""
    degrees, config = {"tp_size": 2}, lora(lora_dropout=0.5)

    def rank_main(rank: int):
        trainer = make_3d_trainer(
            deep_folder, tmp_path / "run", degrees, objects={"peft_config": config}, max_steps=3, **CLIPPED
        )
        dropped = []
        layer = trainer.model.layers[0]
        layer.mlp.dense_4h_to_h.lora_A.register_forward_pre_hook(lambda _, inputs: dropped.append(inputs[0] == 0))
        layer.mlp.dense_h_to_4h.lora_A.register_forward_pre_hook(lambda _, inputs: dropped.append(inputs[0] == 0))
        trainer.train()
        shared = [layer.mlp.dense_h_to_4h.lora_A.weight, layer.mlp.dense_4h_to_h.lora_B.weight]
        return dropped[0::2], dropped[1::2], [weight.detach() for weight in shared]

    (shared, own, whole), (other_shared, other_own, other_whole) = run_ranks(rank_main, 2, tmp_path)
    assert all(map(torch.equal, shared, other_shared))
    assert not any(map(torch.equal, own, other_own))
    assert all(map(torch.equal, whole, other_whole))
    assert float(torch.stack([mask.float().mean() for mask in own]).mean()) == pytest.approx(0.5, abs=0.05)
    options = {"max_steps": 3, **CLIPPED}
    plain = train_in_a_pipeline(deep_folder, config, tmp_path / "plain", degrees, **options)
    recomputed = train_in_a_pipeline(
        deep_folder, config, tmp_path / "less", degrees, activation_checkpointing=True, **options
    )
    assert steps(recomputed) == steps(plain)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_sixteen_bits_stay_close(deep_folder, tmp_path, adapter, alone, precision):
    found = train_in_a_pipeline(deep_folder, adapter, tmp_path / "run", {"pp_size": 2}, **CLIPPED, **{precision: True})
    for name in ("loss", "grad_norm"):
        expected = [entry[name] for entry in steps(alone[1])]
        assert [entry[name] for entry in steps(found)] == pytest.approx(expected, abs=1e-2)


def test_the_command_trains_an_adapter_of_a_model_that_is_spread(model_folder, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "the people of the world work"}\n' * 20)
    config = {
        "model": {"path": str(model_folder)},
        "data": {
            "cache": str(tmp_path / "cache"),
            "recipe": {"row_length": 64, "window_length": 32},
            "train": [{"path": str(tmp_path / "text.jsonl")}],
        },
        "training": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "save_strategy": "no", "report_to": "none"},
        "parallel": {"tp_size": 2},
        "peft": {"type": "LORA", "r": 3},
    }
    config["training"] |= {"use_cpu": True, "disable_tqdm": True, "learning_rate": 0.1, "warmup_share": 0.0}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert run_ranks(lambda rank: main(["train", str(tmp_path / "run.yaml")]), 2, tmp_path) == [0, 0]
    loaded = peft.PeftModel.from_pretrained(GLMForBlankInfilling.from_pretrained(model_folder), tmp_path / "run")
    assert loaded.peft_config["default"].r == 3
    assert all(weight.any() for name, weight in loaded.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.IA3Config(task_type="CAUSAL_LM"), "adapters are of type LORA, got IA3"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "got PREFIX_TUNING"),
        (lora(use_dora=True), "LORA does not take use_dora"),
        (lora(bias="lora_only"), "LORA does not take bias"),
        (lora(lora_bias=True), "LORA does not take lora_bias"),
        (lora(modules_to_save=["lm_head"]), "LORA does not take modules_to_save"),
        (lora(layer_replication=[(0, 2), (1, 4)]), "LORA does not take layer_replication"),
        (lora(trainable_token_indices=[1]), "LORA does not take trainable_token_indices"),
        (lora(target_parameters=["mlp.dense_4h_to_h.weight"]), "LORA does not take target_parameters"),
        (lora(init_lora_weights="olora"), "init_lora_weights must be True or 'gaussian', got 'olora'"),
        (lora(init_lora_weights=False), "init_lora_weights must be True or 'gaussian', got False"),
        (lora(target_modules=["dense", "embed_tokens"]), "must be linears of layers, got model.embed_tokens"),
        (lora(target_modules=["dense", "lm_head"]), "must be linears of layers, got lm_head"),
        (lora(layers_to_transform=[0, 1]), "every stage must have a layer with an adapter, but stage 1 has none"),
        (lora(lora_dropout=0.1), "lora_dropout with tp_size above 1 needs attention_dropout 0"),
        (lora(target_modules=["other"]), "other"),
    ],
    ids=lambda value: "" if isinstance(value, peft.PeftConfig) else value,
)
def test_adapters_that_stages_cannot_have_are_refused(deep_folder, config, message):
    model = GLMConfig.from_pretrained(deep_folder, attention_dropout=0.1)
    with pytest.raises(ValueError, match=message) as caught:
        LoRAPlan.of(config, deep_folder, model, ParallelDegrees(tp_size=2, pp_size=2))
    assert "\n" not in str(caught.value)


def test_a_model_that_is_nowhere_is_refused(deep_folder):
    config = GLMConfig.from_pretrained(deep_folder)
    with pytest.raises(ValueError, match="give the folder of a model"):
        LoRAPlan.of(lora(), config, config, ParallelDegrees())


def test_folders_of_no_adapter_or_of_another_are_refused(deep_folder, tmp_path, adapter):
    config = GLMConfig.from_pretrained(deep_folder)
    with pytest.raises(FileNotFoundError, match="must hold an adapter, as PEFT saves it, but has no adapter_config"):
        LoRAPlan.of(deep_folder, deep_folder, config, ParallelDegrees())
    weights = weights_of(adapter)
    name, *_ = weights
    broken = {
        "lacks": {other: weight for other, weight in weights.items() if other != name},
        "has an unknown": weights | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)},
        "but the model takes": weights | {name: torch.zeros(4, 33)},
    }
    shutil.copytree(adapter, tmp_path / "adapter")

    def rank_main(rank: int) -> list[str]:
        errors = []
        for changed in broken.values():
            save_file(changed, tmp_path / "adapter" / "adapter_model.safetensors")
            with pytest.raises(ValueError, match="adapter_model.safetensors") as caught:
                make_3d_trainer(deep_folder, tmp_path, {}, objects={"peft_config": tmp_path / "adapter"})
            errors.append(str(caught.value))
        return errors

    for message, error in zip(broken, same_on_all(rank_main, {}, tmp_path / "ranks"), strict=True):
        assert message in error


def test_checkpoints_of_other_adapters_are_refused(deep_folder, tmp_path, spread):
    checkpoint = spread[0] / "checkpoint-4"
    config, degrees = GLMConfig.from_pretrained(deep_folder), ParallelDegrees()
    require_own(checkpoint, config, LoRAPlan.of(lora(), deep_folder, config, degrees))
    for changes, message in (
        ({"r": 5}, "its r is 4, but here it is 5"),
        ({"target_modules": ["dense"]}, "another adapter: its target_modules is"),
        ({"use_rslora": True}, "another adapter: its use_rslora is False"),
    ):
        with pytest.raises(ValueError, match=message):
            require_own(checkpoint, config, LoRAPlan.of(lora(**changes), deep_folder, config, degrees))
    with pytest.raises(ValueError, match="has trained an adapter, but here it would be all weights"):
        require_own(checkpoint, config)
    shutil.copytree(checkpoint, tmp_path / "whole", ignore=shutil.ignore_patterns("adapter_*"))
    with pytest.raises(ValueError, match="has trained all weights, but here it would be an adapter"):
        require_own(tmp_path / "whole", config, LoRAPlan.of(lora(), deep_folder, config, degrees))
    with pytest.raises(ValueError, match="holds an adapter alone: load it by PeftModel"):
        export_3d_checkpoint(checkpoint, tmp_path / "model")
