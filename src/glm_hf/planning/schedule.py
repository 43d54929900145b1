"""When every stage of a pipeline computes what: DeepSpeed's schedule, 1f1b, and two to compare it with.

    1f1b   `p - s` micro-batches forward on stage `s` of `p`, then one backward and one forward in turns, which is
           PipeDream-Flush. A stage keeps what `p - s` micro-batches need, however many a step has.
    gpipe  All micro-batches forward, then all backward: as fast, but a stage keeps what all of them need.
    naive  One micro-batch at a time goes forward and backward: at any time one stage computes.

A pass begins when its stage is free and its input has come. What a stage sends is under way for `transfer`, meanwhile
the stage continues. Times are in the unit of the durations; integers stay integers.

Source: GLM-130B (arXiv 2210.02414), appendix B.4; PipeDream-Flush (arXiv 2006.09503).
"""

from collections.abc import Sequence
from dataclasses import dataclass

SCHEDULES = ("1f1b", "gpipe", "naive")


@dataclass(frozen=True)
class Pass:
    """
    A micro-batch on a stage.

    Attributes:
        stage: Number of the stage, from 0.
        micro_batch: Number of the micro-batch, from 0.
        is_forward: Forward, else backward.
        start: When it begins.
        end: When it ends.
    """

    stage: int
    micro_batch: int
    is_forward: bool
    start: float
    end: float


@dataclass(frozen=True)
class PipelineRun:
    """
    All passes of a step.

    Attributes:
        stages: The passes of every stage, in order.
    """

    stages: tuple[tuple[Pass, ...], ...]

    @property
    def makespan(self) -> float:
        """Time from the first pass to the end of the last."""
        return max(passes[-1].end for passes in self.stages)

    def busy(self, stage: int) -> float:
        """Return the time that a stage computes."""
        return sum(one.end - one.start for one in self.stages[stage])

    @property
    def bubble(self) -> float:
        """Share of the time, over all stages, in which they wait."""
        busy = sum(self.busy(stage) for stage in range(len(self.stages)))
        return 1 - busy / (len(self.stages) * self.makespan)

    def in_flight(self, stage: int) -> int:
        """Return the most micro-batches that a stage keeps at once: begun forward, not yet ended backward."""
        kept = most = 0
        for one in self.stages[stage]:
            kept += 1 if one.is_forward else -1
            most = max(most, kept)
        return most


def passes_of_stage(schedule: str, stage: int, num_stages: int, num_micro_batches: int) -> list[tuple[int, bool]]:
    """
    Return the order in which a stage works, as (micro-batch, whether forward).

    Raises:
        ValueError: If the schedule is unknown.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    ahead = {"1f1b": num_stages - stage, "gpipe": num_micro_batches, "naive": 1}[schedule]
    ahead = min(ahead, num_micro_batches)
    order = [(index, True) for index in range(ahead)]
    for index in range(num_micro_batches):
        order.append((index, False))
        if index + ahead < num_micro_batches:
            order.append((index + ahead, True))
    return order


def simulate(
    forward: Sequence[float],
    backward: Sequence[float],
    num_micro_batches: int,
    *,
    transfer: float = 0,
    schedule: str = "1f1b",
) -> PipelineRun:
    """
    Run a step.

    Args:
        forward: Duration of a micro-batch's forward pass on every stage.
        backward: Duration of the backward pass on every stage, recomputation included.
        num_micro_batches: Number of micro-batches of the step.
        transfer: Time that states or gradients take from a stage to its neighbour.
        schedule: Name of the schedule, one of `SCHEDULES`.

    Raises:
        ValueError: If there is no stage or no micro-batch, or the schedule is unknown.
    """
    count = len(forward)
    if count == 0 or len(backward) != count or num_micro_batches < 1:
        raise ValueError("a pipeline needs stages, each with both durations, and at least 1 micro-batch")
    orders = [passes_of_stage(schedule, stage, count, num_micro_batches) for stage in range(count)]
    ends: dict[tuple[int, int, bool], float] = {}
    done: list[list[Pass]] = [[] for _ in range(count)]
    while any(len(passes) < len(order) for passes, order in zip(done, orders, strict=True)):
        for stage, (passes, order) in enumerate(zip(done, orders, strict=True)):
            while len(passes) < len(order):
                index, is_forward = order[len(passes)]
                ready = _ready(ends, stage, index, is_forward, count, transfer)
                if ready is None:
                    break
                start = max(ready, passes[-1].end if passes else 0)
                end = start + (forward if is_forward else backward)[stage]
                passes.append(Pass(stage, index, is_forward, start, end))
                ends[stage, index, is_forward] = end
    return PipelineRun(tuple(tuple(passes) for passes in done))


def _ready(
    ends: dict[tuple[int, int, bool], float], stage: int, index: int, is_forward: bool, count: int, transfer: float
) -> float | None:
    """Return when the input of a pass is there, None if that is not yet known."""
    if is_forward and stage == 0:
        return 0
    if not is_forward and stage == count - 1:
        return ends.get((stage, index, True))
    end = ends.get((stage - 1 if is_forward else stage + 1, index, is_forward))
    return None if end is None else end + transfer
