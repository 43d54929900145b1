"""Checkpoints that are written while training goes on, against those for which it waits."""

from pathlib import Path

from small_runs import losses, make_trainer

from glm_hf.folders.checksums import read_checksums

STEPS = 6
SETTINGS = {"dropout": 0.1, "max_steps": STEPS, "save_strategy": "steps", "save_steps": 1}
OF_THE_RUN = {"training_args.bin", "trainer_state.json"}  # which hold its options and times


def files_of(folder: Path) -> dict[str, dict]:
    return {
        f"{checkpoint.name}/{name}": facts
        for checkpoint in folder.glob("checkpoint-*")
        for name, facts in read_checksums(checkpoint).items()
        if name not in OF_THE_RUN
    }


def test_checkpoints_are_byte_for_byte_those_of_a_run_that_waits(model_folder, tmp_path):
    schedule = {"embedding_gradient_shrink": [[0, 0.1], [STEPS, 0.9]]}  # which the model's configuration tells
    waiting = make_trainer(model_folder, tmp_path / "waiting", **SETTINGS, **schedule)
    waiting.train()
    going_on = make_trainer(model_folder, tmp_path / "going-on", async_save=True, **SETTINGS, **schedule)
    going_on.train()
    assert losses(going_on) == losses(waiting)
    expected = files_of(tmp_path / "waiting")
    assert len({name.split("/")[0] for name in expected}) == STEPS
    assert files_of(tmp_path / "going-on") == expected
