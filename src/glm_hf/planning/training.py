"""A plan of 3D training: whether every stage fits its GPUs, how long a step takes, and its MFU and HFU.

Memory: training_memory.py; communication and time: training_time.py; the bubble: schedule.py.

MFU   Operations of the model, `measurements.flops_per_token` for every token, per second, over the GPUs' peak.
HFU   The same with what the layers recompute in the backward pass.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

from glm_hf.configuration_glm import GLMConfig
from glm_hf.planning.schedule import SCHEDULES, PipelineRun, simulate
from glm_hf.planning.table import GIB, format_table, gib
from glm_hf.planning.training_memory import (
    BYTES,
    COMPONENTS,
    RECOMPUTE,
    Shape,
    StageMemory,
    activation_bytes,
    num_model_parameters,
    stage_memory,
)
from glm_hf.planning.training_time import (
    KINDS,
    Machine,
    forward_message,
    peak_tflops,
    recomputed_operations,
    sent_bytes,
    stage_seconds,
)
from glm_hf.sharding.degrees import ParallelDegrees
from glm_hf.training.measurements import flops_per_token

DEFAULT_RESERVE = GIB // 2


@dataclass(frozen=True)
class TrainingRequest:
    """
    What is to be planned.

    Args:
        config: Configuration of the model.
        parallel: Degrees of parallelism.
        machine: GPUs and how they perform.
        micro_batch: Number of samples that go through the pipeline at once.
        global_batch: Number of samples of a step.
        sequence: Number of tokens of a sample.
        precision: Precision of the weights: "fp16", "bf16" or "fp32".
        recompute: Activations that are recomputed in the backward pass instead of being kept, one of `RECOMPUTE`.
        target_share: Share of the tokens that are predicted.
        schedule: Pipeline schedule, one of `SCHEDULES`; DeepSpeed runs "1f1b".
        reserve: Bytes per GPU that are left to CUDA, libraries and fragmentation.

    Raises:
        ValueError: If the arguments do not fit together.
    """

    config: GLMConfig
    parallel: ParallelDegrees
    machine: Machine
    micro_batch: int
    global_batch: int
    sequence: int
    precision: str = "fp16"
    recompute: str = "full"
    target_share: float = 1.0
    schedule: str = "1f1b"
    reserve: int = DEFAULT_RESERVE

    def __post_init__(self) -> None:
        """Check the arguments."""
        self.parallel.require_fits(self.config)
        at_once, longest = self.micro_batch * self.parallel.dp_size, self.config.max_position_embeddings
        if self.micro_batch < 1 or self.global_batch < 1 or self.global_batch % at_once:
            raise ValueError(
                f"global_batch must be a multiple of micro_batch times dp_size ({self.micro_batch} x "
                f"{self.parallel.dp_size}), got {self.global_batch}"
            )
        if not 1 <= self.sequence <= longest:
            raise ValueError(f"sequence must be from 1 to {longest} tokens, got {self.sequence}")
        if self.precision not in BYTES:
            raise ValueError(f"precision must be one of {', '.join(BYTES)}, got {self.precision!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {self.recompute!r}")
        if not 0 < self.target_share <= 1:
            raise ValueError(f"target_share must be more than 0 and at most 1, got {self.target_share}")

    @property
    def shape(self) -> Shape:
        """What memory and time follow from."""
        count = self.global_batch // (self.micro_batch * self.parallel.dp_size)
        return Shape(
            self.config, self.parallel, self.micro_batch, count, self.sequence, self.precision, self.target_share
        )


@dataclass(frozen=True)
class TrainingPlan:
    """What a step takes of every GPU, and of time."""

    request: TrainingRequest

    @property
    def stages(self) -> range:
        """Numbers of the stages."""
        return range(self.request.parallel.pp_size)

    @cached_property
    def run(self) -> PipelineRun:
        """The passes of a step, in seconds."""
        request, shape = self.request, self.request.shape
        seconds = [stage_seconds(shape, stage, request.recompute, request.machine) for stage in self.stages]
        forward, backward = zip(*seconds, strict=True)
        transfer = request.machine.send_seconds(forward_message(shape), "pipeline", shape)
        return simulate(forward, backward, shape.num_micro_batches, transfer=transfer, schedule=request.schedule)

    @cached_property
    def memory(self) -> tuple[StageMemory, ...]:
        """Bytes of one GPU of every stage."""
        request = self.request
        return tuple(
            stage_memory(request.shape, stage, self.run.in_flight(stage), request.recompute) for stage in self.stages
        )

    @property
    def free(self) -> tuple[int, ...]:
        """Bytes that a GPU of every stage has left, negative where it has too few."""
        size = self.request.machine.gpu.memory - self.request.reserve
        return tuple(size - memory.total for memory in self.memory)

    @property
    def fits(self) -> bool:
        """Whether no GPU is too small."""
        return min(self.free) >= 0

    def other_activations(self, stage: int) -> int:
        """Return the bytes of a stage's activations if all were kept, or if they are, recomputed."""
        request = self.request
        other = "full" if request.recompute == "none" else "none"
        return activation_bytes(request.shape, stage, self.run.in_flight(stage), other)

    @cached_property
    def sent(self) -> tuple[dict[str, float], ...]:
        """Bytes that a GPU of every stage sends in a step, by kind."""
        return tuple(sent_bytes(self.request.shape, stage, self.request.recompute) for stage in self.stages)

    @property
    def seconds_after_pipeline(self) -> float:
        """Time in which gradients are reduced and weights gathered, on the slowest stage."""
        machine, shape = self.request.machine, self.request.shape
        return max(
            sum(machine.send_seconds(sent[kind], kind, shape) for kind in ("tied", "data")) for sent in self.sent
        )

    @property
    def least_bubble(self) -> float:
        """Share of waiting if stages were equal and messages instant: `(p - 1) / (m + p - 1)` in 1f1b."""
        request, count = self.request, len(self.stages)
        return simulate([1] * count, [2] * count, request.shape.num_micro_batches, schedule=request.schedule).bubble

    @property
    def step_seconds(self) -> float:
        """Time of a step."""
        return self.run.makespan + self.seconds_after_pipeline

    @property
    def model_operations(self) -> float:
        """Operations of a step that the model takes."""
        request = self.request
        number = num_model_parameters(request.config)
        per_token = flops_per_token(request.config, number, number, request.sequence)
        return per_token * request.global_batch * request.sequence

    @property
    def hardware_operations(self) -> float:
        """Operations of a step, recomputed ones included."""
        shape, dp_size = self.request.shape, self.request.parallel.dp_size
        layers = self.request.config.num_hidden_layers * shape.num_micro_batches * dp_size
        return self.model_operations + layers * recomputed_operations(shape, self.request.recompute)

    def _share_of_peak(self, operations: float) -> float:
        world_size = self.request.parallel.world_size
        peak = world_size * peak_tflops(self.request.machine.gpu, self.request.shape) * 1e12
        return operations / self.step_seconds / peak

    @property
    def mfu(self) -> float:
        """Share of the GPUs' peak that the model's operations take."""
        return self._share_of_peak(self.model_operations)

    @property
    def hfu(self) -> float:
        """Share of the GPUs' peak that all operations take."""
        return self._share_of_peak(self.hardware_operations)

    def advice(self) -> str:
        """Return in one line what is missing and what to change, each change planned anew; empty if it fits."""
        if self.fits:
            return ""
        stage = self.free.index(min(self.free))
        options = [option for option, request in changes(self.request) if TrainingPlan(request).fits]
        return (
            f"needs {ceil(-min(self.free) / GIB * 100) / 100:.2f} GiB more on each GPU of stage {stage}; "
            f"{'fits with ' + ', or with '.join(options) if options else 'none of the usual changes makes it fit'}"
        )

    def describe(self) -> str:
        """Return what every stage takes, in GiB, and what a step takes, in lines."""
        other = "recomputed" if self.request.recompute == "none" else "kept whole"
        rows: list[tuple[str, ...]] = [("stage", "layers", *COMPONENTS, "reserve", "total", "free", f"({other})")]
        for stage, (memory, free) in enumerate(zip(self.memory, self.free, strict=True)):
            layers = self.request.parallel.stage_layers(self.request.config.num_hidden_layers)[stage]
            sizes = [getattr(memory, name) for name in COMPONENTS]
            sizes += [self.request.reserve, memory.total + self.request.reserve, free, self.other_activations(stage)]
            rows.append((str(stage), f"{layers.start}-{layers.stop - 1}", *map(gib, sizes)))
        return "\n".join((self.title(), *format_table(rows), "", *self._lines()))

    def title(self) -> str:
        """Return in two lines what is planned."""
        request = self.request
        kept = {"full": "recomputed", "selective": "recomputed selectively", "none": "kept"}[request.recompute]
        return (
            f"{num_model_parameters(request.config) / 1e9:.1f} billion parameters in {request.precision}, "
            f"{request.parallel.describe()} = {request.parallel.world_size} {request.machine.gpu.name}, "
            f"{'sequence parallel, ' * request.parallel.sequence_parallel}activations {kept}\n"
            f"{request.global_batch} x {request.sequence} tokens per step in "
            f"{request.shape.num_micro_batches} micro-batches of {request.micro_batch}, {request.schedule}; "
            f"GiB on each GPU of a stage of {gib(request.machine.gpu.memory)}"
        )

    def _lines(self) -> Iterator[str]:
        """Yield what a step takes, in words."""
        machine, shape, peak = self.request.machine, self.request.shape, self._share_of_peak
        tflops = peak_tflops(machine.gpu, shape)
        tokens = self.request.global_batch * self.request.sequence
        most = {kind: max(sent[kind] for sent in self.sent) / GIB for kind in KINDS}
        yield (
            f"bubble         {self.run.bubble:.1%} of the pipeline's time; with equal stages and instant messages "
            f"{self.least_bubble:.1%}"
        )
        yield "sent per GPU   " + ", ".join(f"{kind} {size:.2f}" for kind, size in most.items()) + " GiB in a step"
        yield (
            f"step           {self.step_seconds:.1f} s: pipeline {self.run.makespan:.1f} s, gradients and weights "
            f"{self.seconds_after_pipeline:.1f} s; {tokens / self.step_seconds:,.0f} tokens/s"
        )
        yield (
            f"of the peak    HFU {self.hfu:.1%}, MFU {self.mfu:.1%} of {tflops:g} TFLOP/s; "
            f"{peak(self.hardware_operations) * tflops:.0f} TFLOP/s per GPU"
        )
        yield (
            f"assumed        layers reach {machine.compute_efficiency:.0%} of the peak while they compute, messages "
            f"{machine.link_efficiency:.0%} of {machine.gpu.node_bandwidth:g} GB/s within a node of "
            f"{machine.gpu.gpus_per_node} and {machine.gpu.link_bandwidth:g} GB/s between nodes"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan in the types of JSON; bytes, seconds, and shares of 1."""
        request = self.request
        layers = request.parallel.stage_layers(request.config.num_hidden_layers)
        names = ("micro_batch", "global_batch", "sequence", "precision", "recompute", "target_share", "schedule")
        stages = [
            {"stage": stage, "layers": list(layers[stage]), "in_flight": self.run.in_flight(stage)}
            | asdict(self.memory[stage])
            | {"total": self.memory[stage].total, "free": self.free[stage], "sent": self.sent[stage]}
            | {"activations_if_switched": self.other_activations(stage)}
            for stage in self.stages
        ]
        return {
            "fits": self.fits,
            "advice": self.advice(),
            "parallel": asdict(request.parallel),
            **{name: getattr(request, name) for name in names},
            "checkpointing": request.recompute != "none",
            "num_micro_batches": request.shape.num_micro_batches,
            "num_parameters": num_model_parameters(request.config),
            "reserve": request.reserve,
            "machine": asdict(request.machine),
            "stages": stages,
            "bubble": self.run.bubble,
            "least_bubble": self.least_bubble,
            "pipeline_seconds": self.run.makespan,
            "step_seconds": self.step_seconds,
            "hfu": self.hfu,
            "mfu": self.mfu,
        }


def changes(request: TrainingRequest) -> Iterator[tuple[str, TrainingRequest]]:
    """Yield changes that save memory, each with the options that make it; none takes more GPUs."""
    if request.recompute != "full":
        yield "--recompute full", replace(request, recompute="full")
    if request.recompute == "none":
        yield "--recompute selective", replace(request, recompute="selective")
    if request.parallel.tp_size > request.parallel.sequence_multiple:
        sliced = replace(request, parallel=replace(request.parallel, sequence_parallel=True))
        yield "--sequence-parallel", sliced
        if request.recompute == "none":
            yield "--sequence-parallel --recompute selective", replace(sliced, recompute="selective")
    if request.micro_batch > 1:
        yield "--micro-batch 1", replace(request, micro_batch=1)
    parallel = request.parallel
    if parallel.dp_size % 2:
        return
    halved = replace(parallel, dp_size=parallel.dp_size // 2)
    for option, changed in {
        f"--tensor {2 * parallel.tp_size}": replace(halved, tp_size=2 * parallel.tp_size),
        f"--pipeline {2 * parallel.pp_size}": replace(halved, pp_size=2 * parallel.pp_size, partition=None),
    }.items():
        try:
            changed.require_fits(request.config)
        except ValueError:
            continue
        yield f"{option} --data {changed.dp_size}", replace(request, parallel=changed)
