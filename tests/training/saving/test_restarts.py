"""Runs that torchrun starts again, `--max-restarts`, after a process has died."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import run_ranks
from small_runs import losses, make_trainer

from glm_hf.training import GLMTrainingArguments

SUPPORT = Path(__file__).parents[2] / "support"
RUN = """
import json, os, signal, sys
from pathlib import Path
from small_runs import losses, make_trainer
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

class DieOnce(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
        if state.global_step == 3 and attempt == ("0", "1"):
            os.kill(os.getpid(), signal.SIGKILL)

model, folder = map(Path, sys.argv[1:])
saving = {"save_strategy": "steps", "save_steps": 1, "async_save": True}
trainer = make_trainer(model, folder, max_steps=5, callbacks=[DieOnce()], **saving)
trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
file = folder.parent / f"{folder.name}-{os.environ['RANK']}.json"
file.write_text(json.dumps([os.environ["TORCHELASTIC_RESTART_COUNT"], losses(trainer)]))
"""


def test_a_run_that_is_started_again_resumes_alone(model_folder, tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    torchrun += ["--monitor-interval=0.1"]
    path = os.pathsep.join((str(SUPPORT), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": path}
    command = [*torchrun, str(tmp_path / "run.py"), str(model_folder), str(tmp_path / "run")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-5000:]

    def undisturbed(rank: int) -> list[float]:
        trainer = make_trainer(model_folder, tmp_path / "undisturbed", max_steps=5)
        trainer.train()
        return losses(trainer)

    for rank, expected in enumerate(run_ranks(undisturbed, 2, tmp_path)):
        assert json.loads((tmp_path / f"run-{rank}.json").read_text()) == ["1", expected]


def test_a_store_that_outlives_its_processes_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    GLMTrainingArguments(output_dir=str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        GLMTrainingArguments(output_dir=str(tmp_path))
