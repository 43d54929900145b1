"""Plans of ZeRO-3 with offload against the estimates of DeepSpeed's own source."""

import json

import pytest

from glm_hf import GLMConfig
from glm_hf.cli import main
from glm_hf.planning.training import TrainingRequest
from glm_hf.planning.training_memory import num_model_parameters
from glm_hf.planning.training_offload import OffloadPlan
from glm_hf.planning.training_time import GPUS, Machine
from glm_hf.sharding.degrees import ParallelDegrees

STATE = ("weights", "gradients", "optimizer")


def plan_of(device: str, data: int = 16, **changes) -> OffloadPlan:
    settings = {"micro_batch": 1, "global_batch": data, "sequence": 2048, "precision": "bf16"} | changes
    parallel = changes.pop("parallel", ParallelDegrees(dp_size=data))
    settings.pop("parallel", None)
    return OffloadPlan(TrainingRequest(GLMConfig(), parallel, Machine(GPUS["A100-80GB"]), **settings), device)


def state_of(plan: OffloadPlan, place: str) -> int:
    return sum(plan.components[name].get(place, 0) for name in STATE)


@pytest.mark.parametrize("device", ["none", "cpu"])
def test_the_state_is_that_of_the_estimate_of_deepspeed(device):
    """Theirs is 18 bytes per parameter; ours has 16 of them on the GPUs, and all gradients twice on the host."""
    stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3")
    count = num_model_parameters(GLMConfig())
    host, gpu, layer = stage3.estimate_zero3_model_states_mem_needs(
        count, 10**9, 8, 2, cpu_offload=device == "cpu", cpu_offload_params=device == "cpu", additional_buffer_factor=1
    )
    plan = plan_of(device)
    if device == "none":
        assert state_of(plan, "GPU") == pytest.approx(16 / 18 * (gpu - layer), rel=1e-6)
        assert plan.total("host") == plan.total("NVMe") == 0
    else:
        assert state_of(plan, "host") * 8 == pytest.approx(20 / 18 * host, rel=1e-6)
        assert state_of(plan, "GPU") == plan.total("NVMe") == 0


def test_nvme_leaves_gradients_and_buffers_on_the_host():
    plan, share = plan_of("nvme"), num_model_parameters(GLMConfig()) / 16
    assert plan.total("NVMe") == pytest.approx((2 + 16) * share, rel=1e-6)
    on_the_way = (1e9 + 5 * 1e8) * 2 + 4 * 1e9 * 4  # DeepSpeed's max_in_cpu, and buffers of both kinds
    assert plan.total("host") == pytest.approx(2 * share + on_the_way, rel=1e-6)


def test_what_does_not_fit_tells_where_it_would(capsys):
    words = ["plan", "--train", "--preset", "130b", "--data", "16", "--gpu", "A100-80GB", "--precision", "bf16"]
    assert main([*words, "--offload", "none"]) == 1
    assert "fits with --offload cpu" in capsys.readouterr().err
    assert main([*words, "--offload", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"]["host"] == plan_of("cpu").total("host")


def test_sharding_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="offload is of ZeRO-3, which has --data alone"):
        plan_of("cpu", parallel=ParallelDegrees(tp_size=2, dp_size=16))
    with pytest.raises(ValueError, match="recomputes layers whole: take --recompute full or none"):
        plan_of("cpu", recompute="selective")
