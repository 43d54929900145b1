"""How many bytes a GPU holds in 3D training: weights, gradients, optimizer, activations and buffers of its stage.

`B` micro-batch, `L` length, `T = B * L` tokens, `S` of them between linears, `T` or with sequence parallelism `T / n`,
`D` hidden, `F` inner width of the MLP, `H` heads, `K` head dim, `V` vocabulary, `n` tensor-parallel ranks, `d`
replicas, `N` predicted tokens of a micro-batch, `e` bytes of an element in the model's dtype, `P` elements of the
parameters that a rank holds, by sharding/rules.py. The first stage has the embedding, the last the final norm and the
LM head, a replica of the embedding when tied.

weights      `P * e`, in one piece that is padded to a multiple of `2d` per group of the optimizer (with weight decay
             and without).
gradients    `4 * P`: they add up in fp32, and ZeRO-1 shards the optimizer only.
optimizer    `12 * P / d`: master weights in fp32, also of weights in fp32, and two moments.
activations  What a stage keeps of every micro-batch in flight, and what the backward pass of one adds to it.
             Kept by a layer, as autograd's graph tells, in elements of `e` bytes
                 4D * S       input, both normed states, sum behind attention
                 6D/n * T     qkv, rotated query and key, output of attention
                 4F/n * T     both halves of the up-projection, gelu, product
             `16 * S` bytes of norms, `4 * H/n * T` of softmax, `2D * S` of dropout (one per number, as GPUs draw
             it), and the mask, `B * L * L * e`. With selective recomputation half of what has `n` ranks,
             `(3D + 2F)/n * T`, and neither softmax nor mask; with the full one the input alone, `D * S`.
             Kept by a stage: the mask `B * L * L`, cosines and sines `2 * T * K * e`, ids `3 * 8 * T`; what it
             received and what it sent, `S * D * e` each. By the last: input and output of the norm, the latter of two
             micro-batches, and of the LM head its input `N * D * e` and probabilities `4 * N * V/n`.
             Added: what a layer has not kept, and the widest moment of its backward pass, of the MLP; or that of the
             LM head, three copies of the logits in fp32.
buffers      In computing, what is received, `S * D * e` each way, and the gradient of the largest parameter before it
             is added, in 16 bits with its copy in fp32. Memory must also do for two other moments, when activations
             are gone; what these take more counts as buffers:
             reducing  Gradients are averaged: training_zero.py.
             updating  What reducing has left, and the norm of one gradient in fp64; in fp32, or the rank's
                       gradients, flat.

Gradients are counted from the first micro-batch on, which is too much where no more micro-batches come than are in
flight at once. Not counted: CUDA's context, workspaces of libraries and fragmentation, which a reserve is for. The
optimizer is fused AdamW; others need a copy or two of the rank's part of the weights.

Source: graph of `modeling_glm.GLMLayer`; DeepSpeed 0.19, runtime/zero/stage_1_and_2.py and runtime/pipe/engine.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod

from glm_hf.configuration_glm import GLMConfig
from glm_hf.planning.memory import linear_shapes
from glm_hf.planning.training_zero import optimizer_groups, partition_size, places_of, reducing_elements
from glm_hf.sharding.degrees import ParallelDegrees
from glm_hf.sharding.rules import shard_rule

BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
RECOMPUTE = ("full", "selective", "none")
COMPONENTS = ("weights", "gradients", "optimizer", "activations", "buffers")


@dataclass(frozen=True)
class Shape:
    """
    What the bytes of a stage follow from.

    Attributes:
        config: The model.
        parallel: Degrees of parallelism.
        micro_batch: Samples that go through the pipeline at once.
        num_micro_batches: Number of micro-batches of a step.
        sequence: Tokens of a sample.
        precision: "fp16", "bf16" or "fp32".
        target_share: Share of the tokens that are predicted.
    """

    config: GLMConfig
    parallel: ParallelDegrees
    micro_batch: int
    num_micro_batches: int
    sequence: int
    precision: str = "fp16"
    target_share: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch * self.sequence

    @property
    def num_targets(self) -> int:
        """Predicted tokens of a micro-batch."""
        return ceil(self.tokens * self.target_share)

    @property
    def size(self) -> int:
        """Bytes of a number in the model's dtype."""
        return BYTES[self.precision]

    @property
    def slice_tokens(self) -> int:
        """Tokens of a micro-batch whose norms and residuals a rank holds."""
        return self.micro_batch * ceil(self.sequence / self.parallel.sequence_multiple)

    @property
    def state_bytes(self) -> int:
        """Bytes of the hidden states of a micro-batch between linears, as stages send them."""
        return self.slice_tokens * self.config.hidden_size * self.size

    @property
    def whole_state_bytes(self) -> int:
        """Bytes of the hidden states of a micro-batch within linears."""
        return self.tokens * self.config.hidden_size * self.size


@dataclass(frozen=True)
class StageMemory:
    """
    Bytes of one GPU of a stage: see the module docstring.

    Attributes:
        weights: Module weights.
        gradients: Gradients of all parameters.
        optimizer: Master weights and moments.
        activations: Activations at the widest moment of a backward pass.
        buffers: Everything else that the fullest moment takes.
        moments: The sum at each moment; `total` is the largest.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    moments: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return sum(getattr(self, name) for name in COMPONENTS)


def layer_parameters(shape: Shape) -> Iterator[tuple[str, int]]:
    """Yield the parameters of a layer in the model's order, each with the elements of it that a rank holds."""
    config, linears = shape.config, linear_shapes(shape.config)
    for norm, names in {
        "input_layernorm": ("attention.query_key_value", "attention.dense"),
        "post_attention_layernorm": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    }.items():
        yield from ((f"{norm}.{part}", config.hidden_size) for part in ("weight", "bias"))
        for name in names:
            for part, full in (("weight", linears[name]), ("bias", linears[name][:1])):
                rule = shard_rule(f"{name}.{part}")
                yield f"{name}.{part}", prod(rule.shard_shape(full, shape.parallel.tp_size))


def stage_parameters(shape: Shape, stage: int) -> list[tuple[str, int]]:
    """Return the parameters of a stage as the optimizer goes through them, each with a rank's elements of it."""
    config, parallel = shape.config, shape.parallel
    last, tied = stage == parallel.pp_size - 1, config.tie_word_embeddings
    matrix = config.vocab_size // parallel.tp_size * config.hidden_size
    found = [("embed_tokens.weight", matrix)] if stage == 0 or (last and tied) else []
    for _ in parallel.stage_layers(config.num_hidden_layers)[stage]:
        found += layer_parameters(shape)
    if last:
        found += [(f"norm.{part}", config.hidden_size) for part in ("weight", "bias")]
        found += [] if tied else [("lm_head.weight", matrix)]
    return found


def num_model_parameters(config: GLMConfig) -> int:
    """Return the parameters of the model; a tied matrix counts once."""
    whole = Shape(config, ParallelDegrees(), 1, 1, 1)
    return sum(numbers for _, numbers in stage_parameters(whole, 0))


def layer_bytes_kept(shape: Shape, recompute: str) -> int:
    """Return the bytes that a layer keeps of a micro-batch for its backward pass; `recompute` as in `stage_memory`."""
    if recompute == "full":
        return shape.state_bytes
    config, ranks, tokens = shape.config, shape.parallel.tp_size, shape.tokens
    hidden, inner = config.hidden_size, config.intermediate_size
    dropout = 2 * hidden * (config.hidden_dropout > 0)
    kept = 4 * shape.state_bytes + shape.slice_tokens * (16 + dropout)
    kept += tokens * (3 * hidden + 2 * inner) // ranks * shape.size
    return kept if recompute == "selective" else kept + recomputed_bytes(shape)


def recomputed_bytes(shape: Shape) -> int:
    """Return the bytes that a layer does not keep with selective recomputation."""
    config, ranks = shape.config, shape.parallel.tp_size
    numbers = 3 * config.hidden_size // ranks + 2 * config.intermediate_size // ranks
    mask = shape.micro_batch * shape.sequence**2 * shape.size
    return shape.tokens * (numbers * shape.size + 4 * config.num_attention_heads // ranks) + mask


def stage_bytes_kept(shape: Shape, stage: int, recompute: str) -> int:
    """Return the bytes that a stage keeps of a micro-batch in flight."""
    config, tokens = shape.config, shape.tokens
    last = stage == shape.parallel.pp_size - 1
    layers = len(shape.parallel.stage_layers(config.num_hidden_layers)[stage])
    kept = layers * layer_bytes_kept(shape, recompute)
    kept += shape.micro_batch * shape.sequence**2 + tokens * (2 * config.head_dim * shape.size + 3 * 8)
    kept += shape.state_bytes * ((stage > 0) + (not last))
    if last:
        columns = config.vocab_size // shape.parallel.tp_size
        kept += 2 * shape.state_bytes + 8 * shape.slice_tokens
        kept += shape.num_targets * (config.hidden_size * shape.size + 4 * columns)
    return kept


def backward_bytes(shape: Shape, stage: int, recompute: str) -> int:
    """Return the bytes that the backward pass of a micro-batch adds to what is kept, at its widest moment."""
    inner = shape.config.intermediate_size // shape.parallel.tp_size
    layer = shape.whole_state_bytes + shape.state_bytes + shape.tokens * 2 * inner * shape.size
    if recompute == "full":
        layer += layer_bytes_kept(shape, "none") - shape.state_bytes
    elif recompute == "selective":
        layer += shape.tokens * 2 * inner * shape.size
    if stage < shape.parallel.pp_size - 1:
        return layer
    columns = shape.config.vocab_size // shape.parallel.tp_size
    head = 8 * shape.num_targets * columns
    # When the layers' turn comes, the probabilities, what they were made of and the norm's input are gone.
    gone = shape.num_targets * (shape.config.hidden_size * shape.size + 4 * columns) + shape.state_bytes
    return max(head, layer - gone)


def activation_bytes(shape: Shape, stage: int, in_flight: int, recompute: str) -> int:
    """Return the bytes of activations at the widest moment, with so many micro-batches in flight."""
    last = stage == shape.parallel.pp_size - 1
    second_output = shape.state_bytes if last and shape.num_micro_batches > 1 else 0
    kept = in_flight * stage_bytes_kept(shape, stage, recompute)
    return kept + second_output + backward_bytes(shape, stage, recompute)


def stage_memory(shape: Shape, stage: int, in_flight: int, recompute: str) -> StageMemory:
    """
    Return the bytes of one GPU of a stage.

    Args:
        shape: Sizes of the run.
        stage: Number of the stage, from 0.
        in_flight: Micro-batches that the stage keeps at once.
        recompute: What layers compute again in the backward pass instead of keeping it, one of `RECOMPUTE`: all, what
            lies between their linears, or nothing.
    """
    size, dp_size = shape.size, shape.parallel.dp_size
    parameters = stage_parameters(shape, stage)
    groups = optimizer_groups(parameters)
    largest = max(numbers for _, numbers in parameters)
    total, partition = sum(map(sum, groups)), sum(partition_size(group, dp_size) for group in groups)
    weights, gradients = partition * dp_size * size, total * 4
    activations = activation_bytes(shape, stage, in_flight, recompute)

    received = shape.state_bytes * ((stage > 0) + (stage < shape.parallel.pp_size - 1))
    is_16_bit, adds = size == 2, shape.num_micro_batches > 1
    flat = 0 if is_16_bit else 4 * partition
    added = largest * (size * (adds or is_16_bit) + 4 * (adds and is_16_bit))
    held = {
        "computing": gradients + activations + added,
        "reducing": 4 * max(reducing_elements(groups, dp_size, is_16_bit)),
        "updating": 4 * max(places_of(groups, dp_size, is_16_bit)) + max(flat, 8 * min(largest, partition)),
    }
    moments = {name: weights + 12 * partition + received + num_bytes for name, num_bytes in held.items()}
    buffers = max(moments.values()) - weights - gradients - 12 * partition - activations
    return StageMemory(weights, gradients, 12 * partition, activations, buffers, moments)
