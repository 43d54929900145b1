"""Recipes for models larger than the GPUs, as far as they run without one."""

import json

import pytest
from forked import run_ranks, start, wait
from small_runs import EXAMPLES, make_trainer, prepare_deepspeed

RUN = {"max_steps": 3, "per_device_train_batch_size": 2}
RECIPES = sorted(path.stem for path in EXAMPLES.glob("zero*.json"))


def recipe(name: str) -> dict:
    return json.loads((EXAMPLES / f"{name}.json").read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_every_option_of_a_recipe_is_one_of_deepspeed(name):
    prepare_deepspeed()
    from deepspeed.compile.config import CompileConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    given = recipe(name)
    assert DeepSpeedZeroConfig(**given["zero_optimization"]).stage == int(name[4])  # which refuses unknown names
    CompileConfig(**given.get("compile", {}))
    with pytest.raises(ValueError, match="no_such_option"):
        DeepSpeedZeroConfig(**given["zero_optimization"], no_such_option=1)


def test_offload_to_the_host_trains_as_one_process_does(model_folder, tmp_path):
    prepare_deepspeed()

    def train(**options):
        trainer = make_trainer(model_folder, tmp_path / "run", **RUN, **options)
        trainer.train()
        names = ("loss", "grad_norm", "embedding_grad_norm", "grad_norm/layers_0", "grad_norm/other")
        return [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]

    def rank_main(rank: int):
        given = recipe("zero3_cpu")
        for part in ("offload_optimizer", "offload_param"):
            given["zero_optimization"][part]["pin_memory"] = False  # or DeepSpeed compiles an operator for a minute
        return train(deepspeed=given)

    expected = wait(start(train, tmp_path / "result"), tmp_path / "result")
    for found in run_ranks(rank_main, 2, tmp_path):
        for mine, theirs in zip(found, expected, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3)


ZENFLOW = {"offload_optimizer": {"device": "cpu"}, "zenflow": {"topk_ratio": 0.1}}


@pytest.mark.parametrize(
    ("refused", "settings"),
    [
        ("zenflow", {"zero_optimization": {"stage": 2} | ZENFLOW}),
        ("checkpoint.writer", {"checkpoint": {"writer": {"type": "fast", "decoupled": True}}}),
        ("datastates_ckpt", {"datastates_ckpt": {"host_cache_size": 1}}),
    ],
)
def test_what_does_not_wait_for_the_trainer_is_refused(model_folder, tmp_path, refused, settings):
    """accelerate tells DeepSpeed when to update, and the trainer hashes files that DeepSpeed has written."""
    prepare_deepspeed()

    def rank_main(rank: int) -> None:
        with pytest.raises(ValueError, match=f"deepspeed must not have {refused}"):
            make_trainer(model_folder, tmp_path / "run", **RUN, deepspeed=recipe("zero2") | settings)

    run_ranks(rank_main, 1, tmp_path)
