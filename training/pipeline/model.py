"""GLM as a pipeline: the layers of `modeling_glm`, a stage of them per process, sharded over tensor-parallel ranks.

Between stages travel the hidden states `(B, L, D)`, with sequence parallelism each rank's slice `(B, L/n, D)`, and, as
integers in one piece, what mask and positions follow from: the layout `(3, B, L)` of `input_ids`, `position_ids` and
`segment_ids`. The head is part of the loss, which needs the logits of predicted tokens only.

DeepSpeed numbers the parts of the model, which is how checkpoints name them: 0 the embedding, 1 to `num_layers` the
layers, then the final norm and the LM head, which is the embedding again when they are tied.

Importing this file imports DeepSpeed.

Shapes: `B` batch, `L` length, `D` hidden, `V` vocabulary, `n` tensor-parallel ranks.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn
from torch.utils.checkpoint import checkpoint

from glm_hf.configuration_glm import GLMConfig
from glm_hf.masking_glm import infilling_attention
from glm_hf.modeling_glm import GLMForBlankInfilling, GLMLayer, shrink_gradient
from glm_hf.rotary_glm import GLMRotaryEmbedding
from glm_hf.sharding.degrees import ParallelDegrees
from glm_hf.training.data.blanks import IGNORED
from glm_hf.training.pipeline.collectives import TensorGroup, gather_sequence
from glm_hf.training.pipeline.recomputation import GRANULARITIES, set_recomputation
from glm_hf.training.pipeline.tensor_parallel import VocabParallelEmbedding, mark_sharded, shard_layer

EMBEDDING = "embed_tokens"


class _Part(LayerSpec):
    """A part of the model that is made where it is needed."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__(nn.Module)
        self.make = make

    def build(self, log: bool = False) -> nn.Module:
        """Return the module."""
        return self.make()


class _TiedPart(TiedLayerSpec):
    """A part that several stages hold, and keep alike."""

    def __init__(self, key: str, make: Callable[[], nn.Module]) -> None:
        super().__init__(key, nn.Module)
        self.make = make

    def build(self, log: bool = False) -> nn.Module:
        """Return the module."""
        return self.make()


class GLMPipeline(PipelineModule):
    """
    One process's share of GLM: a stage, sharded over the tensor-parallel ranks, whose weights are still to be filled.

    Args:
        config: Configuration of the model.
        parallel: Degrees of parallelism; there must be as many processes.
        dtype: Dtype of the weights.

    Attributes:
        config: The model's configuration.
        ranks: The tensor-parallel ranks of this process.
        observe: Called with the losses `(N,)` of a micro-batch and its labels, on the last stage.
        collect: Called with the normed hidden states `(B, L, D)` and the losses `(N,)` of a micro-batch there.
        label_smoothing: Share of the loss that is distributed over the vocabulary, in `[0, 1]`.
        adapter: Plan of the adapter that alone is trained; None if all weights are.

    Raises:
        ValueError: If the model cannot be spread in this way.
    """

    def __init__(self, config: GLMConfig, parallel: ParallelDegrees, dtype: torch.dtype) -> None:
        parallel.require_fits(config)
        with torch.device("meta"):
            whole = GLMForBlankInfilling(config)  # chooses the attention implementation, too
        count = config.num_hidden_layers
        embedding: LayerSpec = _Part(lambda: self._make_embedding(dtype))
        head: LayerSpec = _Part(lambda: self._make_embedding(dtype))
        if config.tie_word_embeddings:
            embedding, head = (_TiedPart(EMBEDDING, lambda: self._make_embedding(dtype)) for _ in range(2))
        layers = [_Part(partial(self._make_layer, index, dtype)) for index in range(count)]
        topology = PipeModelDataParallelTopology(parallel.pp_size, parallel.tp_size, parallel.dp_size)
        self.config, self.parallel = config, parallel
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():  # it prints its topology
            super().__init__([embedding, *layers, _Part(lambda: self._make_norm(dtype)), head], topology=topology)
        for prefix, module in self.named_parts():
            mark_sharded(module, prefix, self.ranks)
        self.loss_fn = self.loss_of
        self.observe: Callable[..., None] | None = None
        self.collect: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        self.label_smoothing = 0.0
        self.adapter: Any = None
        self.rotary_emb = GLMRotaryEmbedding(config).to(next(self.parameters()).device)
        self._num_parameters = whole.num_parameters()

    def num_parameters(self) -> int:
        """Return the number of parameters of the whole model; a tied matrix counts once."""
        return self._num_parameters

    @property
    def ranks(self) -> TensorGroup:
        """The tensor-parallel ranks of this process."""
        grid, parallel = self.mpu(), self.parallel
        return TensorGroup(
            parallel.tp_size,
            grid.get_slice_parallel_rank(),
            grid.get_slice_parallel_group(),
            parallel.sequence_parallel,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    def stage_of(self, name: str) -> int:
        """Return the stage that holds a parameter of the model; of a tied matrix, the first."""
        if not name.startswith("model.layers."):
            return 0 if name.startswith("model.embed_tokens.") else self.num_stages - 1
        return self.stage_owner(int(name.split(".")[2]) + 1)

    @property
    def is_first(self) -> bool:
        """Whether this is the stage that embeds tokens."""
        return self.stage_id == 0

    @property
    def is_last(self) -> bool:
        """Whether this is the stage that predicts tokens."""
        return self.stage_id == self.num_stages - 1

    @property
    def layers(self) -> list[GLMLayer]:
        """The layers of this stage."""
        return [module for module in self.forward_funcs if isinstance(module, GLMLayer)]

    def named_parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield what this stage holds, each with the prefix of its parameters' names in the model."""
        count = self.config.num_hidden_layers
        for index, module in enumerate(self.forward_funcs, self._local_start):
            if index == 0:
                yield "model.embed_tokens.", module
            elif index <= count:
                yield f"model.layers.{index - 1}.", module
            elif index == count + 1:
                yield "model.norm.", module
            elif not self.config.tie_word_embeddings:
                yield "lm_head.", module
            elif not self.is_first:
                yield "model.embed_tokens.", module

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """
        Apply this stage.

        Args:
            inputs: The hidden states, except on the first stage, then the layout.

        Returns:
            The same for the next stage; the normed hidden states on the last.

        Raises:
            ValueError: If slices of the tokens would not be equal.
        """
        *states, layout = inputs
        input_ids, position_ids, segment_ids = layout
        if layout.shape[-1] % self.parallel.sequence_multiple:
            raise ValueError(
                f"with sequence_parallel, tp_size ({self.parallel.tp_size}) must divide the length of the rows, got "
                f"{layout.shape[-1]}; pad them"
            )
        hidden_states = states[0] if states else self._embed(input_ids)
        of_all = hidden_states.new_empty(1).expand(*input_ids.shape, self.config.hidden_size)  # (B, L, D)
        attention = infilling_attention(self.config, input_ids, of_all, None, position_ids, None, segment_ids)
        position_embeddings = self.rotary_emb(hidden_states, attention.position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, attention_mask=attention.mask, position_embeddings=position_embeddings
            )
        if self.is_last:
            return self.forward_funcs[-2](hidden_states)
        return hidden_states, layout

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        embeddings = self.forward_funcs[0](input_ids)
        return shrink_gradient(embeddings, self.config.embedding_gradient_shrink) if self.training else embeddings

    def loss_of(self, hidden_states: torch.Tensor, labels: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """
        Return the loss of a micro-batch on the last stage: the sum over predicted tokens, times a factor.

        Args:
            hidden_states: `(B, L, D)` normed, or this rank's slice of the tokens.
            labels: What tokens are to predict `(B, L)`, the factor, and whatever `observe` takes besides.
        """
        shift_labels, factor, *origin = labels
        hidden_states = gather_sequence(hidden_states, self.ranks)
        is_target = shift_labels != IGNORED
        head = self.forward_funcs[-1]
        logits = head.logits(hidden_states[is_target])
        losses = head.cross_entropy(logits, shift_labels[is_target], self.label_smoothing)
        if self.observe is not None:
            self.observe(losses, shift_labels, *origin)
        if self.collect is not None:
            self.collect(hidden_states, losses)
        return losses.sum() * factor

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Compute what layers hold again, all or by `recompute_granularity`; other arguments as in transformers."""
        if offload:
            raise ValueError("activation_checkpointing_kwargs: offload is not supported in a pipeline")
        settings = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        granularity = settings.pop("recompute_granularity", GRANULARITIES[0])
        if granularity not in GRANULARITIES:
            raise ValueError(f"recompute_granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
        for layer in self.layers:
            is_recomputed = layer.attention.layer_idx % every_n_layers == 0
            set_recomputation(layer, granularity if is_recomputed else None, partial(checkpoint, **settings))

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Do as `activation_checkpointing_enable`, by its name in older versions of transformers."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers, offload)

    def _partition_layers(self, method: str = "uniform") -> None:
        """Give every stage its layers, the first the embedding and the last norm and head."""
        ends = [layers.stop + 1 for layers in self.parallel.stage_layers(self.config.num_hidden_layers)]
        self.parts = [0, *ends[:-1], ends[-1] + 2]
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    def _make_layer(self, index: int, dtype: torch.dtype) -> nn.Module:
        with torch.device("meta"):
            layer = GLMLayer(self.config, index).to(dtype)
        return shard_layer(layer, self.ranks).to_empty(device="cpu")

    def _make_embedding(self, dtype: torch.dtype) -> nn.Module:
        with torch.device("meta"):
            embedding = VocabParallelEmbedding(self.config, self.ranks).to(dtype)
        return embedding.to_empty(device="cpu")

    def _make_norm(self, dtype: torch.dtype) -> nn.Module:
        return nn.LayerNorm(self.config.hidden_size, self.config.layer_norm_eps, dtype=dtype)
