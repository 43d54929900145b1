import json
from dataclasses import replace

import pytest

from glm_hf import GLMConfig
from glm_hf.planning.table import GIB
from glm_hf.planning.timeline import plot_timeline
from glm_hf.planning.training import TrainingPlan, TrainingRequest
from glm_hf.planning.training_time import (
    GPUS,
    Gpu,
    Machine,
    is_in_node,
    sent_bytes,
    stage_seconds,
    tensor_bytes,
)
from glm_hf.sharding.degrees import ParallelDegrees

A100 = Machine(GPUS["A100-40GB"])
STATES = 2048 * 12288 * 2  # bytes of a micro-batch's hidden states


def plan(parallel=None, **changes):
    """The run of the paper, with some of it changed."""
    parallel = ParallelDegrees(4, 8, 24) if parallel is None else parallel
    settings = {"config": GLMConfig(), "machine": A100, "micro_batch": 1, "global_batch": 4224, "sequence": 2048}
    return TrainingPlan(TrainingRequest(parallel=parallel, **(settings | changes)))


def test_operations_of_the_paper_make_its_utilization_in_its_time():
    """88.5 s per step: 32.5% of the peak by the model, 43.3% with what is computed again."""
    paper = plan()
    peak = 88.5 * 768 * 312e12
    assert paper.model_operations / peak == pytest.approx(0.325, abs=0.003)
    assert paper.hardware_operations / peak == pytest.approx(0.433, abs=0.004)


def test_operations_are_counted_by_hand():
    paper, tokens = plan(), 4224 * 2048
    assert paper.model_operations == (6 * 128_697_794_560 + 12 * 70 * 12288 * 2048) * tokens
    again = 70 * (2 * (4 * 12288**2 + 3 * 12288 * 32768) + 4 * 12288 * 2048) * tokens
    assert paper.hardware_operations == paper.model_operations + again
    assert plan(recompute="none").hardware_operations == paper.model_operations


def test_the_run_of_the_paper_is_near_what_it_was():
    """Within 5%, with two assumed efficiencies that were not made to fit."""
    paper = plan()
    assert paper.request.shape.num_micro_batches == 176
    assert paper.least_bubble == pytest.approx(7 / 183, abs=1e-12)
    assert paper.step_seconds == pytest.approx(88.5, rel=0.05)
    assert paper.hfu == pytest.approx(0.433, rel=0.05)
    assert paper.mfu == pytest.approx(0.325, rel=0.05)
    assert paper.fits


def test_utilization_is_operations_by_time_and_peak():
    paper = plan()
    assert paper.mfu == pytest.approx(paper.model_operations / paper.step_seconds / (768 * 312e12), rel=1e-12)
    fp32 = plan(precision="fp32")
    assert fp32.mfu == pytest.approx(fp32.model_operations / fp32.step_seconds / (768 * 19.5e12), rel=1e-12)
    assert fp32.step_seconds > 10 * paper.step_seconds


@pytest.mark.parametrize(
    "changed",
    [
        plan(schedule="naive"),
        plan(ParallelDegrees(8, 4, 24)),
        plan(ParallelDegrees(2, 16, 24)),
        plan(ParallelDegrees(4, 8, 24, partition=(8, 8, 9, 9, 9, 9, 9, 9))),
        plan(micro_batch=2),
    ],
    ids=["naive", "tensor 8", "tensor 2", "heavy end", "micro-batch 2"],
)
def test_what_the_paper_rejected_is_slower(changed):
    assert changed.step_seconds > 1.02 * plan().step_seconds


@pytest.mark.parametrize(
    "changed",
    [plan(recompute="none"), plan(schedule="gpipe"), plan(ParallelDegrees(1, 8, 96))],
    ids=["no checkpointing", "gpipe", "tensor 1"],
)
def test_what_the_paper_rejected_does_not_fit(changed):
    assert not changed.fits
    assert changed.advice().startswith("needs ")


def test_72_layers_make_the_ends_the_slowest_and_fullest():
    config = GLMConfig(num_hidden_layers=72)
    even, paper = plan(ParallelDegrees(4, 8, 24, partition=(9,) * 8), config=config), plan()
    seconds = [sum(stage_seconds(even.request.shape, stage, "full", A100)) for stage in range(8)]
    assert seconds.index(max(seconds)) == 7
    assert max(seconds[:7]) == pytest.approx(min(seconds[:7]), rel=0.01)
    assert even.run.bubble > paper.run.bubble
    assert even.memory[0].weights - even.memory[1].weights == 2 * 37632 * 12288
    assert paper.memory[0].weights == pytest.approx(paper.memory[1].weights, rel=0.01)


def test_messages_of_the_paper_are_counted_by_hand():
    shape = plan().request.shape
    first, middle, last = (sent_bytes(shape, stage, recompute="full") for stage in (0, 3, 7))
    ring = 2 * 3 / 4
    assert middle["tensor"] == 176 * ring * 9 * 6 * STATES
    assert first["tensor"] == 176 * ring * (8 * 6 + 1) * STATES
    assert last["tensor"] == 176 * ring * ((8 * 6 + 1) * STATES + 12 * 2048)
    assert middle["pipeline"] == 176 * (2 * STATES + 24 * 2048)
    assert first["pipeline"] == 176 * (STATES + 24 * 2048)
    assert last["pipeline"] == 176 * STATES
    assert middle["data"] == pytest.approx((2 * 4 + 2) / 2 * 23 / 24 * 8_155_514_880)
    assert first["tied"] == last["tied"] == 4 * 37632 * 12288
    assert middle["tied"] == 0


def test_layers_kept_whole_send_a_third_less():
    shape = plan().request.shape
    assert tensor_bytes(shape, 3, recompute="full") == (1.5 * 18 * STATES, 1.5 * 36 * STATES)
    assert tensor_bytes(shape, 3, recompute="none") == (1.5 * 18 * STATES, 1.5 * 18 * STATES)


SLICED = ParallelDegrees(4, 8, 24, sequence_parallel=True)


def test_slices_send_what_whole_states_do_and_inputs_again_backward():
    """In elements of hidden states: an all-gather or a reduce-scatter over 4 ranks sends 3/4 of them."""
    whole, sliced = plan(recompute="none").request.shape, plan(SLICED, recompute="none").request.shape
    one = 3 / 4 * STATES
    for stage, more in ((0, 0), (3, 0), (7, one)):  # the final norm's, which predicted tokens are taken from
        parts = [sum(tensor_bytes(shape, stage, "none")) for shape in (sliced, whole)]
        assert parts[0] - parts[1] == more
    sent = [sent_bytes(shape, 3, "none") for shape in (sliced, whole)]
    assert sent[0]["tensor"] - sent[1]["tensor"] == 176 * 9 * 2 * one
    assert sent[0]["pipeline"] == 176 * (2 * STATES / 4 + 24 * 2048)
    assert sent[0]["data"] == sent[1]["data"]


def test_selective_recomputation_repeats_attention():
    selective, kept = plan(recompute="selective"), plan(recompute="none")
    again = 70 * 4 * 12288 * 2048 * 4224 * 2048
    assert selective.hardware_operations == kept.model_operations + again
    assert selective.mfu < plan(recompute="none").mfu
    assert selective.mfu > plan().mfu
    machine = Machine(Gpu("slow", 1, 1, GIB, 1, 1), 0.5, 1.0)
    seconds = [stage_seconds(one.request.shape, 3, one.request.recompute, machine)[1] for one in (selective, kept)]
    assert seconds[0] - seconds[1] == pytest.approx(9 * 2048 * 4 * 12288 * 2048 / 4 / 0.5e12)


def test_slices_and_selective_recomputation_make_the_run_of_the_paper_fit():
    assert [plan(parallel, recompute="selective").fits for parallel in (None, SLICED)] == [False, True]
    sliced = plan(SLICED, recompute="selective")
    assert sliced.step_seconds < 0.85 * plan().step_seconds
    assert ", sequence parallel, activations recomputed selectively\n" in sliced.title()


def test_a_step_is_the_pipeline_and_what_follows():
    """Gradients in fp32, weights and the tied embedding over 25 GB/s, three quarters of which are reached."""
    paper = plan()
    ends, middle = 8 * 453_084_160 + 37632 * 12288, 9 * 453_084_160
    seconds = (4 * 37632 * 12288 + (2 * 4 + 2) * 23 / 24 * (ends + 2 * 12288)) / (25e9 * 0.75)
    assert ends > middle
    assert paper.seconds_after_pipeline == pytest.approx(seconds, rel=1e-12)
    assert paper.step_seconds == paper.run.makespan + paper.seconds_after_pipeline


def test_messages_between_stages_hold_the_pipeline_up():
    slow = plan(machine=replace(A100, gpu=replace(A100.gpu, link_bandwidth=5)))
    first, second = slow.run.stages[:2]
    message = (STATES + 24 * 2048) / (5e9 * 0.75)
    assert second[0].start == pytest.approx(first[0].end + message, rel=1e-12)
    assert slow.run.makespan > plan().run.makespan + 176 * message


def test_single_process_sends_nothing():
    alone = plan(ParallelDegrees(), global_batch=4)
    assert set(alone.sent[0].values()) == {0}
    assert alone.seconds_after_pipeline == 0
    assert alone.run.bubble == 0


def test_passes_take_operations_and_messages_by_hand():
    """A hypothetical GPU of 1 TFLOP/s, half of which is reached, and links of 1 GB/s, fully used."""
    machine = Machine(Gpu("slow", 1, 1, GIB, 1, 1), 0.5, 1.0)
    operations = 2048 * (2 * (4 * 12288**2 + 3 * 12288 * 32768) + 4 * 12288 * 2048)
    forward, backward = stage_seconds(plan().request.shape, 3, "full", machine)
    assert forward == pytest.approx(9 * operations / 4 / 0.5e12 + 1.5 * 18 * STATES / 1e9)
    assert backward == pytest.approx(3 * 9 * operations / 4 / 0.5e12 + 1.5 * 36 * STATES / 1e9)
    head = 2 * 2048 * 150528 * 12288
    last = stage_seconds(plan().request.shape, 7, "full", machine)[0]
    assert last == pytest.approx((8 * operations + head) / 4 / 0.5e12 + 1.5 * (16 * STATES + 12 * 2048) / 1e9)


@pytest.mark.parametrize(
    ("parallel", "inside"),
    [
        (ParallelDegrees(4, 8, 24), ["tensor"]),
        (ParallelDegrees(16, 2, 1), []),
        (ParallelDegrees(2, 8, 4), ["tensor", "data"]),
        (ParallelDegrees(2, 2, 2), ["tensor", "pipeline", "data", "tied"]),
        (ParallelDegrees(3, 4, 2), []),  # three ranks would lie across nodes of eight
    ],
)
def test_links_are_chosen_by_where_ranks_stand(parallel, inside):
    shape = replace(plan().request.shape, parallel=parallel)
    kinds = ("tensor", "pipeline", "data", "tied")
    assert [kind for kind in kinds if is_in_node(kind, shape, A100.gpu)] == inside


def test_advice_names_changes_that_fit():
    kept = plan(recompute="none")
    missing = -min(kept.free) / GIB
    assert 13 < missing < 14
    rounded_up = f"{missing + 0.005:.2f}"
    assert kept.advice() == (
        f"needs {rounded_up} GiB more on each GPU of stage 0; fits with --recompute full, or with --sequence-parallel "
        "--recompute selective, or with --tensor 8 --data 12"
    )
    assert plan(ParallelDegrees(8, 4, 12), recompute="none", global_batch=4224).fits is False
    assert plan(ParallelDegrees(8, 8, 12), recompute="none").fits
    small = replace(A100, gpu=replace(A100.gpu, memory=GIB))
    assert plan(machine=small).advice().endswith("none of the usual changes makes it fit")


def test_memory_is_compared_with_the_gpu():
    paper = plan(reserve=3 * GIB)
    assert paper.free == tuple(37 * GIB - memory.total for memory in paper.memory)
    exact = replace(A100, gpu=replace(A100.gpu, memory=max(memory.total for memory in paper.memory)))
    assert plan(machine=exact, reserve=0).fits
    assert not plan(machine=exact, reserve=1).fits


def test_description_has_a_row_per_stage_and_says_what_is_assumed():
    lines = plan().describe().splitlines()
    assert lines[0] == (
        "128.7 billion parameters in fp16, tensor 4 x pipeline 8 x data 24 = 768 A100-40GB, activations recomputed"
    )
    assert lines[2].split()[:3] == ["stage", "layers", "weights"]
    assert [line.split()[:3] for line in lines[3:11]] == [
        [str(stage), layers, "7.61" if stage in (0, 7) else "7.60"]
        for stage, layers in enumerate(("0-7", "8-16", "17-25", "26-34", "35-43", "44-52", "53-61", "62-69"))
    ]
    assert "with equal stages and instant messages 3.8%" in lines[12]
    assert lines[-1].startswith("assumed        layers reach 50% of the peak while they compute, messages 75% of 300")


def test_json_adds_up():
    found = json.loads(json.dumps(plan().to_dict()))
    assert [len(stage["layers"]) for stage in found["stages"]] == [8, 9, 9, 9, 9, 9, 9, 8]
    assert [stage["in_flight"] for stage in found["stages"]] == [8, 7, 6, 5, 4, 3, 2, 1]
    for stage in found["stages"]:
        parts = ("weights", "gradients", "optimizer", "activations", "buffers")
        assert sum(stage[name] for name in parts) == stage["total"]
        assert stage["total"] + stage["free"] + found["reserve"] == 40 * GIB
        assert stage["activations_if_switched"] > stage["activations"]
    assert found["num_parameters"] == 128_697_794_560


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 4225}, r"global_batch must be a multiple of micro_batch times dp_size \(1 x 24\), got 4225"),
        ({"micro_batch": 0}, "global_batch must be a multiple"),
        ({"sequence": 2049}, "sequence must be from 1 to 2048 tokens, got 2049"),
        ({"precision": "int8"}, "precision must be one of fp16, bf16, fp32, got 'int8'"),
        ({"target_share": 0}, "target_share must be more than 0 and at most 1, got 0"),
        ({"schedule": "zero"}, "schedule must be one of"),
        ({"recompute": "some"}, "recompute must be one of full, selective, none, got 'some'"),
        ({"parallel": ParallelDegrees(7, 8, 24)}, r"tp_size must divide num_attention_heads \(96\), got 7"),
        ({"parallel": ParallelDegrees(4, 8, 24, partition=(9,) * 8)}, "partition must hold the 70 layers"),
    ],
)
def test_impossible_runs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_impossible_machines_are_refused():
    with pytest.raises(ValueError, match=r"compute_efficiency must be more than 0 and at most 1, got 1\.5"):
        replace(A100, compute_efficiency=1.5)
    with pytest.raises(ValueError, match="link_bandwidth of a GPU must be more than 0, got 0"):
        replace(A100.gpu, link_bandwidth=0)


def size_of_png(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_timeline_of_many_micro_batches_shows_the_beginning_once_more(tmp_path):
    pytest.importorskip("matplotlib")
    short = plan(ParallelDegrees(4, 8, 24), global_batch=24 * 12)
    plot_timeline(short.run, tmp_path / "short.png", "12 micro-batches")
    plot_timeline(plan().run, tmp_path / "long.png", "176 micro-batches")
    (width, height), (other_width, other_height) = (
        size_of_png(tmp_path / f"{name}.png") for name in ("short", "long")
    )
    assert width == other_width == 1800
    assert other_height > 1.5 * height
