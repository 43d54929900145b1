"""A plan of ZeRO-3 whose state lies on the GPUs, in the memory of their hosts, or on NVMe: what each of them holds.

`P` parameters, `d` GPUs, `e` bytes of an element in the model's dtype. Per GPU:

weights      `P * e / d`, where parameters are offloaded to.
gradients    `P * e / d`, on the host if the optimizer is offloaded.
optimizer    `12 * P / d`, master weights and two moments in fp32; where it is offloaded to with the gradients in fp32,
             `4 * P / d` more.
gathered     On the GPU, whole: up to `stage3_max_live_parameters` and the largest matrix, of which the gradient too.
buckets      On the GPU, `reduce_bucket_size` and `stage3_prefetch_bucket_size`; on the host, what is on its way to
             NVMe: `max_in_cpu` and `buffer_count * buffer_size` of the parameters, and `buffer_count` subgroups of the
             optimizer in fp32.
activations  On the GPU, those of the whole model, as training_memory.py counts them for one stage.

An estimate from the sizes that DeepSpeed's source allocates; neither its memory nor its time has been measured, so
there is no time in it.

Source: DeepSpeed 0.19, runtime/zero/stage3.py, offload_config.py and partitioned_param_swapper.py.
"""

from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

from glm_hf.planning.table import GIB, format_table, gib
from glm_hf.planning.training import TrainingRequest
from glm_hf.planning.training_memory import activation_bytes, num_model_parameters, stage_parameters

OFFLOAD_DEVICES = ("none", "cpu", "nvme")
PLACES = ("GPU", "host", "NVMe")
# DeepSpeed's defaults, in elements, and counts.
MAX_LIVE_PARAMETERS = MAX_IN_CPU = SUB_GROUP_SIZE = 1_000_000_000
REDUCE_BUCKET_SIZE, PREFETCH_BUCKET_SIZE = 500_000_000, 50_000_000
PARAMETER_BUFFERS, PARAMETER_BUFFER_SIZE, OPTIMIZER_BUFFERS = 5, 100_000_000, 4


@dataclass(frozen=True)
class OffloadPlan:
    """
    What ZeRO-3 takes of every GPU, and of the host memory and NVMe of its node for it.

    Args:
        request: The run, with neither tensor nor pipeline parallelism.
        device: Where optimizer and parameters lie: "none" for the GPUs, "cpu" or "nvme".

    Raises:
        ValueError: If the run is sharded in another way, or recomputes in parts, or the device is unknown.
    """

    request: TrainingRequest
    device: str

    def __post_init__(self) -> None:
        """Check the arguments."""
        parallel = self.request.parallel
        if self.device not in OFFLOAD_DEVICES:
            raise ValueError(f"offload must be one of {', '.join(OFFLOAD_DEVICES)}, got {self.device!r}")
        if parallel.tp_size * parallel.pp_size > 1:
            raise ValueError(f"offload is of ZeRO-3, which has --data alone, got {parallel.describe()}")
        if self.request.recompute == "selective":
            raise ValueError("offload is of GLMTrainer, which recomputes layers whole: take --recompute full or none")

    @cached_property
    def components(self) -> dict[str, dict[str, int]]:
        """Bytes per GPU by component and place."""
        request, size = self.request, self.request.shape.size
        share = ceil(num_model_parameters(request.config) / request.parallel.world_size)
        largest = max(numbers for _, numbers in stage_parameters(request.shape, 0))
        state = {"none": "GPU", "cpu": "host", "nvme": "NVMe"}[self.device]
        live = min(MAX_LIVE_PARAMETERS + largest, num_model_parameters(request.config))
        is_offloaded = self.device != "none"
        buckets = {"GPU": (REDUCE_BUCKET_SIZE + PREFETCH_BUCKET_SIZE) * size}
        if self.device == "nvme":
            parameters = min(share, MAX_IN_CPU) + PARAMETER_BUFFERS * PARAMETER_BUFFER_SIZE
            buckets["host"] = parameters * size + OPTIMIZER_BUFFERS * min(share, SUB_GROUP_SIZE) * 4
        return {
            "weights": {state: share * size},
            "gradients": {"host" if is_offloaded else "GPU": share * size},
            "optimizer": {state: share * (12 + 4 * is_offloaded)},
            "gathered": {"GPU": (live + largest) * size},
            "buckets": buckets,
            "activations": {"GPU": activation_bytes(request.shape, 0, 1, request.recompute)},
        }

    def total(self, place: str) -> int:
        """Return the bytes per GPU of one of `PLACES`, on the GPU with the reserve."""
        reserve = self.request.reserve if place == "GPU" else 0
        return sum(places.get(place, 0) for places in self.components.values()) + reserve

    @property
    def fits(self) -> bool:
        """Whether the GPUs are large enough; what hosts and NVMe have is not known."""
        return self.total("GPU") <= self.request.machine.gpu.memory

    @property
    def gpus_per_node(self) -> int:
        """GPUs that share a host."""
        return min(self.request.machine.gpu.gpus_per_node, self.request.parallel.world_size)

    def advice(self) -> str:
        """Return in one line what is missing and which other place would do; empty if it fits."""
        if self.fits:
            return ""
        missing = self.total("GPU") - self.request.machine.gpu.memory
        others = [name for name in OFFLOAD_DEVICES if OffloadPlan(self.request, name).fits]
        return (
            f"needs {ceil(missing / GIB * 100) / 100:.2f} GiB more on each GPU; "
            f"{'fits with --offload ' + others[0] if others else 'no offload makes it fit'}"
        )

    def describe(self) -> str:
        """Return what is held where, in GiB."""
        request, count = self.request, self.gpus_per_node
        rows: list[tuple[str, ...]] = [("", "GPU", f"host of {count}", f"NVMe of {count}")]
        cells = self.components | {"reserve": {"GPU": request.reserve}}
        cells["total"] = {place: self.total(place) for place in PLACES}
        for name, places in cells.items():
            held = [places.get(place, 0) * (1 if place == "GPU" else count) for place in PLACES]
            rows.append((name, *(gib(num_bytes) if num_bytes else "-" for num_bytes in held)))
        where = {"none": "on the GPUs", "cpu": "in host memory", "nvme": "on NVMe"}[self.device]
        return "\n".join(
            (
                f"{num_model_parameters(request.config) / 1e9:.1f} billion parameters in {request.precision}, ZeRO-3 "
                f"on {request.parallel.world_size} {request.machine.gpu.name}, weights and optimizer {where}",
                f"micro-batches of {request.micro_batch} x {request.sequence} tokens; GiB of a GPU of "
                f"{gib(request.machine.gpu.memory)}, and of the node that {count} share; estimated, not measured",
                *format_table(rows),
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan in the types of JSON; bytes per GPU."""
        return {
            "fits": self.fits,
            "advice": self.advice(),
            "offload": self.device,
            "gpus_per_node": self.gpus_per_node,
            "components": self.components,
            "total": {place: self.total(place) for place in PLACES},
        }
