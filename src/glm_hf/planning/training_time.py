"""How long a step of 3D training takes and how much every GPU sends, from the peak and the links of a stated GPU.

`T` tokens of a micro-batch, `L` length, `D` hidden, `F` inner width of the MLP, `V` vocabulary, `n` tensor-parallel
ranks, `d` replicas, `m` micro-batches, `N` predicted tokens of one, `e` bytes of an element in the model's
dtype, `P` elements of the parameters that a rank holds.

operations  Of a layer forward, over its ranks: `T * (2 * (4D^2 + 3DF) + 4DL)`, twice that backward, and forward once
            more with full recomputation, `T * 4DL` with the selective one. Of the LM head: `2NVD` forward, twice that
            backward.
sent        By one GPU in a step, where an all-reduce over `k` ranks sends `2 (k-1)/k` times its size:
            tensor    `m * T * D * e` all-reduced twice per layer in each pass, the repeated one included; once by the
                      embedding forward; `N * D * e` and `12 * N` by the LM head. With sequence parallelism as much:
                      reduce-scatter and all-gather are the halves of an all-reduce, of which the embedding has one in
                      each pass, and so has the final norm. Besides, each column-parallel linear gathers its input
                      again backward, half of an all-reduce, while it computes.
            pipeline  `T * D * e`, with sequence parallelism `T/n * D * e`, and, forward, three ids of 8 bytes per
                      token, to each neighbour
            data      `P * e` all-reduced, though a rank needs a part only (DeepSpeed's default in ZeRO-1); then
                      `(d-1)/d * P * e`, the weights
            tied      `V/n * D * e` between the first stage and the last
time        Operations at `compute_efficiency` of the peak, bytes at `link_efficiency` of a link. All-reduces of
            layers stop computation; between stages, states travel while a stage continues if it can. What follows the
            pipeline (tied, data) is not overlapped. The update itself takes milliseconds and is left out.

Ranks stand as `ParallelDegrees` numbers them, and a group within one node uses the links of the node.
"""

from dataclasses import dataclass, fields

from glm_hf.planning.table import GIB
from glm_hf.planning.training_memory import Shape, stage_parameters
from glm_hf.training.measurements import PEAK_TFLOPS, attention_flops_per_token, layer_flops_per_token

# Assumed, not measured here. With these, the run of the paper comes out 3% faster than it was. Kernels fused by hand,
# as Megatron-LM's, reach more than half of the peak; small models and narrow parts of layers less.
COMPUTE_EFFICIENCY = 0.5
LINK_EFFICIENCY = 0.75  # of large messages
KINDS = ("tensor", "pipeline", "data", "tied")


@dataclass(frozen=True)
class Gpu:
    """
    A kind of GPU and how it is linked to others.

    Attributes:
        name: Name of the kind, such as A100-40GB.
        tflops: Peak in 16 bits, 10^12 operations per second.
        tflops_fp32: Peak in fp32, 10^12 operations per second.
        memory: Bytes.
        node_bandwidth: Bandwidth to GPUs of the same node, each way, 10^9 bytes per second.
        link_bandwidth: Bandwidth to other nodes, per GPU and each way, 10^9 bytes per second.
        gpus_per_node: GPUs of a node.
    """

    name: str
    tflops: float
    tflops_fp32: float
    memory: int
    node_bandwidth: float
    link_bandwidth: float
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        """Check the numbers."""
        for field in fields(self)[1:]:
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name} of a GPU must be more than 0, got {getattr(self, field.name)}")


# From data sheets: NVLink, or PCIe for RTX cards; InfiniBand of a DGX of that time, or 100 Gbit/s per node.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("V100-32GB", PEAK_TFLOPS["V100"], 15.7, 32 * GIB, 150, 6.25),
        Gpu("A100-40GB", PEAK_TFLOPS["A100"], 19.5, 40 * GIB, 300, 25),
        Gpu("A100-80GB", PEAK_TFLOPS["A100"], 19.5, 80 * GIB, 300, 25),
        Gpu("H100-80GB", PEAK_TFLOPS["H100"], 67, 80 * GIB, 450, 50),
        Gpu("H200-141GB", PEAK_TFLOPS["H200"], 67, 140 * GIB, 450, 50),
        Gpu("RTX3090-24GB", PEAK_TFLOPS["RTX 3090"], 35.6, 24 * GIB, 32, 1.5),
        Gpu("RTX4090-24GB", PEAK_TFLOPS["RTX 4090"], 82.6, 24 * GIB, 32, 1.5),
    )
}


@dataclass(frozen=True)
class Machine:
    """
    GPUs as they perform.

    Attributes:
        gpu: Their kind.
        compute_efficiency: Share of the peak that layers reach while they compute.
        link_efficiency: Share of a link's bandwidth that messages reach.
    """

    gpu: Gpu
    compute_efficiency: float = COMPUTE_EFFICIENCY
    link_efficiency: float = LINK_EFFICIENCY

    def __post_init__(self) -> None:
        """Check the shares."""
        for name in ("compute_efficiency", "link_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be more than 0 and at most 1, got {getattr(self, name)}")

    def compute_seconds(self, operations: float, shape: Shape) -> float:
        """Return the time that operations take, shared by the ranks of a layer."""
        return operations / shape.parallel.tp_size / (peak_tflops(self.gpu, shape) * 1e12 * self.compute_efficiency)

    def send_seconds(self, num_bytes: float, kind: str, shape: Shape) -> float:
        """Return the time that a GPU's bytes of one of `KINDS` take."""
        bandwidth = self.gpu.node_bandwidth if is_in_node(kind, shape, self.gpu) else self.gpu.link_bandwidth
        return num_bytes / (bandwidth * 1e9 * self.link_efficiency)


def peak_tflops(gpu: Gpu, shape: Shape) -> float:
    """Return the peak in the precision of a run."""
    return gpu.tflops_fp32 if shape.precision == "fp32" else gpu.tflops


def is_in_node(kind: str, shape: Shape, gpu: Gpu) -> bool:
    """Tell whether no group of a kind has ranks on two nodes."""
    parallel = shape.parallel
    span = {"tensor": parallel.tp_size, "data": parallel.tp_size * parallel.dp_size}.get(kind, parallel.world_size)
    return parallel.world_size <= gpu.gpus_per_node or gpu.gpus_per_node % span == 0


def layer_operations(shape: Shape) -> int:
    """Return the operations of a layer's forward pass on a micro-batch, over its ranks."""
    return shape.tokens * layer_flops_per_token(shape.config, shape.sequence)


def head_operations(shape: Shape) -> int:
    """Return the operations of the LM head's forward pass on a micro-batch, over its ranks."""
    return 2 * shape.num_targets * shape.config.vocab_size * shape.config.hidden_size


def reduced_bytes(num_bytes: float, ranks: int) -> float:
    """Return what a rank sends to all-reduce so many bytes."""
    return 2 * (ranks - 1) * num_bytes / ranks


def recomputed_operations(shape: Shape, recompute: str) -> int:
    """Return the operations that a layer repeats in its backward pass on a micro-batch, over its ranks."""
    if recompute == "selective":
        return shape.tokens * attention_flops_per_token(shape.config, shape.sequence)
    return layer_operations(shape) * (recompute == "full")


def tensor_bytes(shape: Shape, stage: int, recompute: str) -> tuple[float, float]:
    """Return what a GPU waits to send within its layers for a micro-batch, in the forward and in the backward pass."""
    config, parallel, whole = shape.config, shape.parallel, shape.whole_state_bytes
    once = 2 * num_layers_of(shape, stage) * whole
    forward, backward = once, once * (2 if recompute == "full" else 1)
    half = whole // 2 if parallel.sequence_multiple > 1 else 0
    if stage == 0:
        forward += whole - half
        backward += half
    if stage == parallel.pp_size - 1:
        forward += 3 * 4 * shape.num_targets + half
        backward += shape.num_targets * config.hidden_size * shape.size
    return reduced_bytes(forward, parallel.tp_size), reduced_bytes(backward, parallel.tp_size)


def gathered_again_bytes(shape: Shape, stage: int) -> float:
    """Return what a GPU sends within its layers for a micro-batch while it computes, in the backward pass."""
    is_sliced = shape.parallel.sequence_multiple > 1
    return is_sliced * num_layers_of(shape, stage) * reduced_bytes(shape.whole_state_bytes, shape.parallel.tp_size)


def num_layers_of(shape: Shape, stage: int) -> int:
    """Return the number of layers of a stage."""
    return len(shape.parallel.stage_layers(shape.config.num_hidden_layers)[stage])


def sent_bytes(shape: Shape, stage: int, recompute: str) -> dict[str, float]:
    """Return what a GPU of a stage sends in a step, by kind (module docstring)."""
    config, parallel, count = shape.config, shape.parallel, shape.num_micro_batches
    first, last = stage == 0, stage == parallel.pp_size - 1
    parameters = sum(numbers for _, numbers in stage_parameters(shape, stage))
    is_tied = config.tie_word_embeddings and parallel.pp_size > 1 and (first or last)
    return {
        "tensor": count * (sum(tensor_bytes(shape, stage, recompute)) + gathered_again_bytes(shape, stage)),
        "pipeline": count * ((not last) * forward_message(shape) + (not first) * shape.state_bytes),
        "data": reduced_bytes(parameters * (4 + shape.size / 2), parallel.dp_size),
        "tied": is_tied * config.vocab_size // parallel.tp_size * config.hidden_size * 4,
    }


def forward_message(shape: Shape) -> int:
    """Return the bytes that a stage sends to the next for a micro-batch."""
    return shape.state_bytes + 3 * 8 * shape.tokens


def stage_seconds(shape: Shape, stage: int, recompute: str, machine: Machine) -> tuple[float, float]:
    """Return how long the forward and the backward pass of a micro-batch take on a stage."""
    layers = num_layers_of(shape, stage)
    forward = layers * layer_operations(shape)
    backward = 2 * forward + layers * recomputed_operations(shape, recompute)
    if stage == shape.parallel.pp_size - 1:
        forward += head_operations(shape)
        backward += 2 * head_operations(shape)
    sent = tensor_bytes(shape, stage, recompute)
    return tuple(  # type: ignore[return-value]
        machine.compute_seconds(operations, shape) + machine.send_seconds(num_bytes, "tensor", shape)
        for operations, num_bytes in zip((forward, backward), sent, strict=True)
    )
