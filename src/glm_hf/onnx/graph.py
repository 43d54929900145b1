"""The network as one ONNX graph, for contexts and for single tokens alike.

The graph is written node by node rather than traced: its cache is updated in place, its rotary tables are constants,
and its weights are named before any is read.

Shapes: `B` batch, `L` new tokens, `C` tokens that the cache has room for, `D` hidden, `H` heads, `K` head dim, `F`
inner width of the MLP, `V` vocabulary, `P` positions.

Inputs:
    input_ids                     (B, L)        int64
    position_ids                  (B, L)        int64, below P
    attention_mask                (B, 1, L, C)  bool, what each new token sees, itself among it
    write_indices                 (B)           int64, column of each row's first new token in the cache
    num_logits_to_keep            ()            int64, of how many tokens at the end logits are computed
    past_key_values.{n}.key       (B, H, C, K)  of layer n; .value likewise
Outputs:
    logits                        (B, num_logits_to_keep, V)
    present_key_values.{n}.key    (B, H, C, K)  with the new tokens; may be the memory of the input

Quantized weights are operators of onnxruntime (`MatMulNBits`), everything else is standard.
"""

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from glm_hf.configuration_glm import GLMConfig
from glm_hf.onnx.weights import Weights
from glm_hf.rotary_glm import GLMRotaryEmbedding

CONTRIB = "com.microsoft"


def build_graph(config: GLMConfig, weights: Weights, opset: int, notes: dict[str, str]) -> onnx.ModelProto:
    """
    Return the graph of `GLMForBlankInfilling`, whose weights lie in another file.

    Args:
        config: The model's configuration.
        weights: Where each weight lies in that file, and in which form.
        opset: Version of the standard operators.
        notes: What else the file is to tell.
    """
    model = GraphBuilder(config, weights).build(opset)
    helper.set_model_props(model, notes)
    return model


class GraphBuilder:
    """
    The nodes, constants and weights of a graph that is being written.

    Args:
        config: The model's configuration.
        weights: Where each weight lies.
    """

    def __init__(self, config: GLMConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights
        self.dtype = weights.onnx_dtype
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.row_shapes: dict[tuple[int, ...], str] = {}
        self.token_shape: str = self.add("Shape", "input_ids")  # (B, L)

    def build(self, opset: int) -> onnx.ModelProto:
        """Write all nodes and return the graph."""
        config = self.config
        states = self.add("Reshape", self.embed("model.embed_tokens.weight"), self.ints([-1, config.hidden_size]))
        self.add_rotary_tables()
        for index in range(config.num_hidden_layers):
            states = self.add_layer(f"model.layers.{index}", index, states)
        states = self.add("Reshape", states, self.row_shape(config.hidden_size))  # (B, L, D)
        states = self.add(
            "Slice",
            states,
            self.add("Unsqueeze", self.add("Neg", "num_logits_to_keep"), self.ints([0])),
            self.ints([np.iinfo(np.int64).max]),
            self.ints([1]),
        )
        states = self.add_norm("model.norm", states)
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        rows = self.add("Reshape", states, self.ints([-1, config.hidden_size]))
        logits = self.add_linear(head, rows, has_bias=False)
        shape = self.add(
            "Concat",
            self.add("Shape", "input_ids", start=0, end=1),
            self.ints([-1]),
            self.ints([config.vocab_size]),
            axis=0,
        )
        self.add("Reshape", logits, shape, output="logits")
        return self.finish(opset)

    def add_layer(self, name: str, index: int, states: str) -> str:
        """Write a layer, from states `(B * L, D)` to states of the same shape."""
        alpha = self.number((2 * self.config.num_hidden_layers) ** 0.5)
        normed = self.add_norm(f"{name}.input_layernorm", states)
        output = self.add_attention(f"{name}.attention", index, normed)
        normed = self.add_norm(f"{name}.post_attention_layernorm", self.scaled_sum(normed, alpha, output))
        inner = self.add_linear(f"{name}.mlp.dense_h_to_4h.weight", normed)
        linear, gate = self.add("Split", inner, num_outputs=2, axis=1)
        inner = self.add("Mul", linear, self.add("Gelu", gate))
        return self.scaled_sum(normed, alpha, self.add_linear(f"{name}.mlp.dense_4h_to_h.weight", inner))

    def scaled_sum(self, normed: str, alpha: str, output: str) -> str:
        """Write `alpha * normed + output`."""
        return self.add("Add", self.add("Mul", normed, alpha), output)

    def add_attention(self, name: str, index: int, states: str) -> str:
        """Write the attention of a layer, which first takes its new keys and values into the cache."""
        heads, size = self.config.num_attention_heads, self.config.head_dim
        qkv = self.add_linear(f"{name}.query_key_value.weight", states)
        qkv = self.add("Reshape", qkv, self.row_shape(heads, 3 * size))  # (B, L, H, 3K)
        qkv = self.add("Transpose", qkv, perm=[0, 2, 1, 3])
        query, key, value = self.add("Split", qkv, num_outputs=3, axis=3)  # (B, H, L, K)
        tables = ("rotary_cos", "rotary_sin", "position_ids")
        query, key = (self.add("RotaryEmbedding", part, *tables) for part in (query, key))
        key, value = (
            self.add(
                "TensorScatter",
                f"past_key_values.{index}.{kind}",
                part,
                "write_indices",
                axis=2,
                output=f"present_key_values.{index}.{kind}",
            )
            for kind, part in (("key", key), ("value", value))
        )
        output = self.attend(query, key, value)
        output = self.add("Transpose", output, perm=[0, 2, 1, 3])
        return self.add_linear(f"{name}.dense.weight", self.add("Reshape", output, self.ints([-1, heads * size])))

    def attend(self, query: str, key: str, value: str) -> str:
        """Write attention `(B, H, L, K)` in fp32, as the scores of deep layers are beyond fp16."""
        if self.dtype == TensorProto.FLOAT:
            return self.add("Attention", query, key, value, "attention_mask")
        wide = [self.add("Cast", states, to=TensorProto.FLOAT) for states in (query, key, value)]
        return self.add("Cast", self.add("Attention", *wide, "attention_mask"), to=self.dtype)

    def add_norm(self, name: str, states: str) -> str:
        """Write a layer norm of the last dimension."""
        weight, bias = self.plain(f"{name}.weight"), self.plain(f"{name}.bias")
        return self.add("LayerNormalization", states, weight, bias, epsilon=self.config.layer_norm_eps)

    def add_linear(self, name: str, states: str, has_bias: bool = True) -> str:
        """Write `states @ weight.T + bias` of states `(rows, K)` and the weight `name` `(N, K)`."""
        biases = [self.plain(f"{name.removesuffix('.weight')}.bias")] if has_bias else []
        if name not in self.weights.quantized:
            return self.add("Gemm", states, self.plain(name), *biases, transB=1)
        blocks = self.weights.quantized[name]
        self.add_codes(name)
        sizes: dict[str, Any] = {"N": blocks.num_rows, "K": blocks.num_columns, "block_size": blocks.block_size}
        inputs = (states, f"{name}.codes", f"{name}.scales", "", "", *biases)
        return self.add("MatMulNBits", *inputs, domain=CONTRIB, bits=blocks.bits, accuracy_level=1, **sizes)

    def embed(self, name: str) -> str:
        """Write the look-up of `input_ids` in the embedding: `(B, L, D)`."""
        if name not in self.weights.quantized:
            return self.add("Gather", self.plain(name), "input_ids")
        self.add_codes(name)
        blocks = self.weights.quantized[name]
        rows = self.add(
            "Cast", self.add("Gather", f"{name}.codes", "input_ids"), to=self.dtype
        )  # (B, L, blocks, size)
        scales = self.add("Unsqueeze", self.add("Gather", f"{name}.scales", "input_ids"), self.ints([-1]))
        rows = self.add("Mul", self.add("Sub", rows, self.number(2.0 ** (blocks.bits - 1))), scales)
        num_padded = blocks.num_blocks * blocks.block_size
        rows = self.add("Reshape", rows, self.row_shape(num_padded))
        columns = self.config.hidden_size
        if num_padded == columns:
            return rows
        return self.add("Slice", rows, self.ints([0]), self.ints([columns]), self.ints([2]))

    def add_rotary_tables(self) -> None:
        """Add cosines and sines of all positions `(P, K/2)`, as the model computes them, rounding included."""
        positions = torch.arange(self.config.max_position_embeddings)[None]
        cos, signed_sin = GLMRotaryEmbedding(self.config)(torch.zeros(()), positions)
        half = self.config.head_dim // 2
        for name, table in (("cos", cos[0, :, :half]), ("sin", signed_sin[0, :, half:])):
            self.constants[f"rotary_{name}"] = self.constant(f"rotary_{name}", table.numpy())

    def plain(self, name: str) -> str:
        """Add a weight that is not quantized, and return its name."""
        self.constants[name] = self.weights.initializer(name)
        return name

    def add_codes(self, name: str) -> None:
        """Add codes and scales of a quantized weight."""
        for part in (f"{name}.codes", f"{name}.scales"):
            self.constants[part] = self.weights.initializer(part)

    def row_shape(self, *sizes: int) -> str:
        """Return the shape `(B, L, ...)`, of which one of B and L follows from the number of elements."""
        if sizes not in self.row_shapes:
            self.row_shapes[sizes] = self.add("Concat", self.token_shape, self.ints(list(sizes)), axis=0)
        return self.row_shapes[sizes]

    def ints(self, values: list[int]) -> str:
        """Return the name of a constant list of integers."""
        name = "ints_" + "_".join(map(str, values))
        self.constants.setdefault(name, self.constant(name, np.array(values, dtype=np.int64), cast=False))
        return name

    def number(self, value: float) -> str:
        """Return the name of a constant number in the dtype of the graph."""
        name = f"number_{value}"
        self.constants.setdefault(name, self.constant(name, np.array(value)))
        return name

    def constant(self, name: str, values: np.ndarray, cast: bool = True) -> onnx.TensorProto:
        """Return a constant that lies in the graph itself, cast to the dtype of the graph."""
        if cast:
            values = values.astype(helper.tensor_dtype_to_np_dtype(self.dtype))
        return numpy_helper.from_array(values, name)

    def add(self, kind: str, *inputs: str, output: str | None = None, domain: str = "", **attributes: Any) -> Any:
        """Write a node and return the name of its output, or the names where there are several."""
        count = attributes.get("num_outputs", 1)
        name = f"{kind}_{len(self.nodes)}" if output is None else output
        outputs = [name] if count == 1 else [f"{name}.{number}" for number in range(count)]
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0] if count == 1 else outputs

    def finish(self, opset: int) -> onnx.ModelProto:
        """Return the graph of all nodes, with its inputs and outputs."""
        config, integer = self.config, TensorProto.INT64
        kinds = [(index, kind) for index in range(config.num_hidden_layers) for kind in ("key", "value")]
        cache_shape: list[str | int | None] = ["batch", config.num_attention_heads, "capacity", config.head_dim]

        def cache(prefix: str) -> list[onnx.ValueInfoProto]:
            return [
                helper.make_tensor_value_info(f"{prefix}_key_values.{index}.{kind}", self.dtype, cache_shape)
                for index, kind in kinds
            ]

        inputs = [
            helper.make_tensor_value_info("input_ids", integer, ["batch", "length"]),
            helper.make_tensor_value_info("position_ids", integer, ["batch", "length"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.BOOL, ["batch", 1, "length", "capacity"]),
            helper.make_tensor_value_info("write_indices", integer, ["batch"]),
            helper.make_tensor_value_info("num_logits_to_keep", integer, []),
        ]
        logits = helper.make_tensor_value_info("logits", self.dtype, ["batch", "kept", config.vocab_size])
        graph = helper.make_graph(
            self.nodes,
            "glm130b",
            [*inputs, *cache("past")],
            [logits, *cache("present")],
            initializer=list(self.constants.values()),
        )
        opsets = [helper.make_opsetid("", opset)]
        if self.weights.quantized:
            opsets.append(helper.make_opsetid(CONTRIB, 1))
        version = helper.find_min_ir_version_for(opsets, True)
        return helper.make_model(graph, opset_imports=opsets, producer_name="glm_hf", ir_version=version)
