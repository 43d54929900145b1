import random

import pytest

from glm_hf.planning.schedule import SCHEDULES, simulate


def run_of_deepspeed(forward, backward, num_micro_batches, transfer):
    """Execute DeepSpeed's instructions: its order of passes, each when its message is there."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.pipe.schedule import (
        BackwardPass,
        ForwardPass,
        RecvActivation,
        RecvGrad,
        SendActivation,
        SendGrad,
        TrainSchedule,
    )

    count = len(forward)
    queues = [
        [command for step in TrainSchedule(num_micro_batches, count, stage).steps() for command in step]
        for stage in range(count)
    ]
    clocks, messages, passes = [0] * count, {}, [[] for _ in range(count)]
    last_end = [{} for _ in range(count)]  # by kind and buffer
    while any(queues):
        for stage, queue in enumerate(queues):
            while queue:
                command = queue[0]
                name = type(command)
                if name in (RecvActivation, RecvGrad):
                    key = (stage, name)
                    if not messages.get(key):
                        break
                    clocks[stage] = max(clocks[stage], messages[key].pop(0))
                elif name in (ForwardPass, BackwardPass):
                    start = clocks[stage]
                    clocks[stage] += (forward if name is ForwardPass else backward)[stage]
                    passes[stage].append((name is ForwardPass, start, clocks[stage]))
                    last_end[stage][name, command.buffer_id] = clocks[stage]
                elif name is SendActivation:
                    end = last_end[stage][ForwardPass, command.buffer_id]
                    messages.setdefault((stage + 1, RecvActivation), []).append(end + transfer)
                elif name is SendGrad:
                    end = last_end[stage][BackwardPass, command.buffer_id]
                    messages.setdefault((stage - 1, RecvGrad), []).append(end + transfer)
                queue.pop(0)
    return passes


@pytest.mark.parametrize(
    ("stages", "micro_batches"), [(1, 1), (1, 5), (2, 1), (3, 2), (4, 4), (4, 9), (5, 12), (8, 17)]
)
def test_passes_are_those_of_deepspeed(stages, micro_batches):
    draw = random.Random(stages * 100 + micro_batches)
    forward = [draw.randint(1, 9) for _ in range(stages)]
    backward = [draw.randint(1, 30) for _ in range(stages)]
    for transfer in (0, 2):
        run = simulate(forward, backward, micro_batches, transfer=transfer)
        expected = run_of_deepspeed(forward, backward, micro_batches, transfer)
        assert [[(one.is_forward, one.start, one.end) for one in passes] for passes in run.stages] == expected


@pytest.mark.parametrize("stages", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 7, 8, 9, 40])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_equal_stages_wait_as_the_formula_says(stages, micro_batches, schedule):
    run = simulate([2] * stages, [5] * stages, micro_batches, schedule=schedule)
    assert run.makespan == (micro_batches + stages - 1) * 7
    assert run.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1), abs=1e-12)


def test_the_run_of_the_paper_waits_for_3_8_percent():
    assert round(simulate([1] * 8, [3] * 8, 176).bubble, 3) == 0.038


def test_naive_pipeline_has_one_stage_at_work():
    run = simulate([1, 2, 3], [2, 4, 6], 5, schedule="naive")
    assert run.makespan == 5 * 18
    passes = sorted((one for passes in run.stages for one in passes), key=lambda one: one.start)
    assert all(earlier.end == later.start for earlier, later in zip(passes, passes[1:], strict=False))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("micro_batches", [1, 3, 11])
def test_every_pass_happens_once_when_its_input_is_there(schedule, micro_batches):
    forward, backward, transfer = [3, 1, 4, 1], [5, 9, 2, 6], 2
    run = simulate(forward, backward, micro_batches, transfer=transfer, schedule=schedule)
    found = {(one.stage, one.micro_batch, one.is_forward): one for passes in run.stages for one in passes}
    assert len(found) == sum(map(len, run.stages)) == 4 * micro_batches * 2
    for (stage, index, is_forward), one in found.items():
        assert one.end - one.start == (forward if is_forward else backward)[stage]
        source = (stage - 1, index, True) if is_forward else (stage + 1, index, False)
        if source in found:
            assert one.start >= found[source].end + transfer
        elif not is_forward:
            assert one.start >= found[stage, index, True].end
    for passes in run.stages:
        assert all(earlier.end <= later.start for earlier, later in zip(passes, passes[1:], strict=False))


@pytest.mark.parametrize(
    ("schedule", "micro_batches", "expected"),
    [
        ("1f1b", 20, [4, 3, 2, 1]),
        ("1f1b", 2, [2, 2, 2, 1]),
        ("1f1b", 1, [1, 1, 1, 1]),
        ("gpipe", 20, [20, 20, 20, 20]),
        ("naive", 20, [1, 1, 1, 1]),
    ],
)
def test_stages_keep_as_many_micro_batches_as_the_schedule_makes_them(schedule, micro_batches, expected):
    run = simulate([1] * 4, [2] * 4, micro_batches, schedule=schedule)
    assert [run.in_flight(stage) for stage in range(4)] == expected


def test_the_slowest_stage_sets_the_pace():
    """The slow stage begins after one unit and never waits: its second forward pass hides the last stage's first."""
    run = simulate([1, 4, 1], [2, 8, 2], 50)
    assert run.makespan == 1 + 50 * 12 + 2
    assert run.busy(1) == 600


def test_messages_make_stages_wait():
    fast, slow = (simulate([10] * 4, [20] * 4, 30, transfer=transfer) for transfer in (0, 1))
    assert fast.makespan + 2 * 3 < slow.makespan < fast.makespan + 2 * 33


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], 1), "a pipeline needs stages"),
        (([1], [1, 2], 1), "a pipeline needs stages"),
        (([1], [1], 0), "at least 1 micro-batch"),
    ],
)
def test_impossible_pipelines_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(*arguments)


def test_unknown_schedules_are_refused():
    with pytest.raises(ValueError, match="schedule must be one of 1f1b, gpipe, naive, got 'zero'"):
        simulate([1], [1], 1, schedule="zero")
