"""Runs that torchrun's agent starts again, `--max-restarts`, after a process has died."""

import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from forked import run_ranks, start, wait
from pipeline_runs import make_3d_trainer
from small_runs import losses, make_trainer
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

SETTINGS = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "async_save": True}
DEGREES = {"tp_size": 1, "pp_size": 2, "dp_size": 1}


class DieOnce(TrainerCallback):
    """Kills one process at the end of the third step, before anything was started again."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("is_3d", [False, True], ids=["ddp", "3d"])
def test_a_run_that_is_started_again_resumes_alone(request, model_folder, tmp_path, is_3d):
    folder = tmp_path / "run"
    source = request.getfixturevalue("deep_folder") if is_3d else model_folder

    def train(folder: Path, callbacks: tuple[TrainerCallback, ...] = ()) -> tuple[int, list[float]]:
        trainer = (
            make_3d_trainer(source, folder, DEGREES, **SETTINGS) if is_3d else make_trainer(source, folder, **SETTINGS)
        )
        for callback in callbacks:
            trainer.add_callback(callback)
        last = get_last_checkpoint(folder) if folder.is_dir() else None
        trainer.train(resume_from_checkpoint=last)
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), losses(trainer)

    def worker() -> tuple[int, list[float]]:
        torch.set_num_threads(1)
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        return train(folder, (DieOnce(),))

    def launch() -> dict[int, tuple[int, list[float]]]:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=2,
            max_restarts=2,
            run_id="restarts",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            monitor_interval=0.1,
            start_method="fork",
        )
        return elastic_launch(config, worker)()

    (tmp_path / "undisturbed").mkdir()
    undisturbed = run_ranks(lambda rank: train(tmp_path / "undisturbed" / "run"), 2, tmp_path / "undisturbed")
    restarted = wait(start(launch, tmp_path / "result"), tmp_path / "result")
    assert restarted == {rank: (1, found) for rank, (_, found) in enumerate(undisturbed)}
