"""The GLM-130B network: DeepNorm post-LN layers with rotary attention and a GeGLU, one class per block.

A layer computes `a = LN(x); h = alpha * a + Attention(a); m = LN(h); y = alpha * m + MLP(m)` with
`alpha = sqrt(2 * num_hidden_layers)`: residuals start from the normed states.

Shapes: `B` batch, `L` length, `D` hidden, `H` heads, `K` head dim, `F` inner width of the MLP, `V` vocabulary.
Layout of the weights (all linears have a bias, the LM head has none):
    embed_tokens.weight                (V, D)   also the LM head when tied
    attention.query_key_value.weight   (3D, D)  per head: K rows of query, K of key, K of value
    attention.dense.weight             (D, D)
    mlp.dense_h_to_4h.weight           (2F, D)  F linear rows, then F gate rows
    mlp.dense_4h_to_h.weight           (D, F)
Source: GLM-130B (arXiv 2210.02414), section 2; DeepNorm (arXiv 2203.00555).
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_glm import GLMConfig
from .filling_glm import BlankGenerationMixin
from .growing_cache_glm import keep_room
from .infilling_glm import masked_lm_layout
from .masking_glm import infilling_attention, layout_ids
from .positions_glm import (
    Mask,
    is_padding_mask,
    kept_states,
    remember_layout,
    require_known_packing,
    warn_of_labelled_context,
    warn_of_trained_rows,
)
from .rotary_glm import GLMRotaryEmbedding, apply_rotary
from .versions_glm import CACHE, one_cache, register_parallel_styles, require_known_cache, require_known_reader


def eager_attention_forward(
    module: "GLMAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attend in plain torch: the reference of the faster implementations, and the one that returns probabilities.

    Scores are divided by `layer + 1` until they are fp32, so that deep layers do not overflow in fp16.

    Args:
        module: The attention block.
        query: `(B, H, L, K)`.
        key: `(B, H, S, K)`.
        value: `(B, H, S, K)`.
        attention_mask: `(B or 1, 1, L, S)` added to the scores, or None.
        scaling: Factor on the scores.
        dropout: Dropout of the probabilities.
        **kwargs: Ignored.

    Returns:
        Output `(B, L, H, K)` and probabilities `(B, H, L, S)`.
    """
    depth = module.layer_idx + 1
    scores = torch.matmul(query * (scaling / depth), key.transpose(2, 3)).float() * depth  # (B, H, L, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.softmax(scores, dim=-1).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), probabilities


class GLMAttention(nn.Module):
    """Multi-head attention with rotary positions on the whole head."""

    def __init__(self, config: GLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """Attend from `(B, L, D)` to itself and the cache; other arguments as in `GLMLayer.forward`."""
        return self.attend(self.query_key_value(hidden_states), *args, **kwargs)  # (B, L, 3D)

    def attend(
        self,
        qkv: torch.Tensor,
        attention_mask: Mask,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None = None,
        context_length: int | None = None,
        drops_context: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend with the projections `(B, L, 3D)` of the tokens; other arguments as in `GLMLayer.forward`."""
        qkv = qkv.view(*qkv.shape[:2], -1, 3, self.head_dim)  # (B, L, H, 3, K)
        cos, sin = (table[:, :, None, None] for table in position_embeddings)  # (B, L, 1, 1, K)
        query, key = apply_rotary(qkv[:, :, :, :2], cos, sin).transpose(1, 2).unbind(3)  # (B, H, L, K)
        value = qkv[:, :, :, 2].transpose(1, 2)  # (B, H, L, K)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, H, S, K)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        options = {"scaling": self.scaling, "dropout": dropout, **kwargs}
        if context_length is None:
            output, probabilities = attend(self, query, key, value, attention_mask, **options)
        else:
            # The context needs no mask, so its rows reach the fused kernels; the mask holds the other rows only.
            context, rest = query.tensor_split([context_length], dim=2)
            output, probabilities = attend(self, rest, key, value, attention_mask, **options)
            if not drops_context:
                of_context = (states[:, :, :context_length] for states in (context, key, value))
                output = torch.cat((attend(self, *of_context, None, is_causal=False, **options)[0], output), dim=1)
        return self.dense(output.flatten(2)), probabilities  # (B, L, H, K) -> (B, L, D)


register_parallel_styles()


class GLMMLP(nn.Module):
    """GeGLU: the second half of the up-projection, activated, gates the first."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(B, L, D)` to `(B, L, D)`."""
        return self.contract(self.dense_h_to_4h(hidden_states))

    def contract(self, expanded: torch.Tensor) -> torch.Tensor:
        """Gate `(B, L, 2F)` and map it to `(B, L, D)`."""
        linear, gate = expanded.chunk(2, dim=-1)  # 2 x (B, L, F)
        return self.dense_4h_to_h(linear * nn.functional.gelu(gate))


class GLMLayer(GradientCheckpointingLayer):
    """One DeepNorm layer."""

    def __init__(self, config: GLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.alpha = (2 * config.num_hidden_layers) ** 0.5
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = GLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = GLMMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Mask = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        context_length: int | None = None,
        drops_context: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Apply the layer.

        Args:
            hidden_states: `(B, L, D)`.
            past_key_values: Cache, updated in place; by its place, since by its name it is dropped, by different
                versions of transformers in different cases, under gradient checkpointing.
            attention_mask: In the form of the attention implementation, None where nothing is hidden but the future.
            position_embeddings: Cosines and signed sines `(B, L, K)`.
            context_length: If given, the first `context_length` tokens of every row see exactly each other, and
                `attention_mask` holds the rows of the others.
            drops_context: Whether to leave these first tokens out of the result; their keys and values are computed.
            **kwargs: Passed to the attention implementation.

        Returns:
            `(B, L, D)`, or `(B, L - context_length, D)` without the context.
        """
        normed = self.input_layernorm(hidden_states)
        output, _ = self.attention(
            normed, attention_mask, position_embeddings, past_key_values, context_length, drops_context, **kwargs
        )
        if drops_context:
            normed = normed[:, context_length:]
        output = nn.functional.dropout(output, p=self.hidden_dropout, training=self.training)
        normed = self.post_attention_layernorm(torch.add(output, normed, alpha=self.alpha))
        output = nn.functional.dropout(self.mlp(normed), p=self.hidden_dropout, training=self.training)
        return torch.add(output, normed, alpha=self.alpha)


class GLMPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what transformers needs to know of the architecture."""

    config: GLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False  # its masks would silently drop the two-way context
    _supports_context_parallel = False  # assumes a causal context
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": GLMLayer, "attentions": GLMAttention}

    def __init__(self, config: GLMConfig, *args: Any, **kwargs: Any) -> None:
        quantization = getattr(config, "quantization_config", None)  # still a dict if transformers has skipped it
        if isinstance(quantization, dict) and quantization.get("quant_method") not in AUTO_QUANTIZER_MAPPING:
            raise ValueError(
                f"the weights are quantized by {quantization.get('quant_method')!r}, for which nothing is registered "
                "here, and their codes would be taken for weights; import glm_hf of a version that knows it"
            )
        super().__init__(config, *args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embedding, or of the last norm if the embedding is quantized."""
        embedding = self.get_input_embeddings().weight
        return embedding.dtype if embedding.is_floating_point() else self.base_model.norm.weight.dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count as transformers does; quantized layers tell how many weights their parameters stand for."""
        count = super().num_parameters(only_trainable, exclude_embeddings)
        quantized = [module for module in self.modules() if hasattr(module, "uncounted_weights")]
        corrections = {parameter: number for module in quantized for parameter, number in module.uncounted_weights()}
        return count if only_trainable else count + sum(corrections.values())

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Initialise a module that was not loaded; the shortcut for custom code would skip blocks without weights."""
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise by DeepNorm: Xavier normal; value, attention output and MLP shrunk by `(2 * layers)^-1/2`."""
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        shrink = (2 * self.config.num_hidden_layers) ** -0.5
        if not all(parameter.is_floating_point() for parameter in module.parameters()):
            if (require_loaded := getattr(module, "require_loaded", None)) is not None:
                require_loaded(self)  # a quantized layer, whose codes cannot be drawn at random
        elif isinstance(module, nn.Embedding):
            init.xavier_normal_(module.weight)
        elif isinstance(module, GLMRotaryEmbedding):
            init.copy_(module.frequency_bits, module.compute_frequency_bits())
        elif isinstance(module, GLMMLP):
            std = shrink * xavier_std(hidden, inner)
            init.normal_(module.dense_h_to_4h.weight, std=std)
            init.normal_(module.dense_4h_to_h.weight, std=std)
        elif isinstance(module, GLMAttention):
            std = xavier_std(hidden, hidden)
            init.normal_(module.dense.weight, std=shrink * std)
            weight = module.query_key_value.weight
            if not getattr(weight, "_is_hf_initialized", False):
                init.normal_(weight, std=std)
                weight.view(-1, 3, module.head_dim, hidden)[:, 2].mul_(shrink)
        else:
            super()._init_weights(module)

    def _resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Resize as transformers does; ValueError if the embedding is quantized, since codes cannot be drawn."""
        is_quantized = not self.get_input_embeddings().weight.is_floating_point()
        if is_quantized and (new_num_tokens, pad_to_multiple_of) != (None, None):
            raise ValueError(
                "a quantized embedding cannot be resized; resize the model that is not quantized and quantize that, "
                "or call model.dequantize() first"
            )
        return super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)


def shrink_gradient(states: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return states of the same values, of whose gradient only the share `alpha` reaches what they were made of."""
    if alpha == 1:
        return states
    fixed = states.detach()
    return fixed + alpha * (states - fixed)


def xavier_std(fan_in: int, fan_out: int) -> float:
    """Return the standard deviation of Xavier normal initialisation."""
    return (2 / (fan_in + fan_out)) ** 0.5


class GLMModel(GLMPreTrainedModel):
    """
    The network without a head: token ids to hidden states after the final norm.

    Attributes:
        fused_step: What takes one new token of every row through all layers at once, or returns None where it cannot;
            set by those who replace linears by others of their own. Takes the layers and what they are called with.
    """

    fused_step: Callable[..., torch.Tensor | None] | None = None

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GLMLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rotary_emb = GLMRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        segment_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_outputs: int = 0,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Encode token ids.

        Without a mask and positions of the caller's, both follow from `input_ids`: the tokens before a sample's first
        `sop` see each other, all others see what stands before them (see `infilling_glm`). A sample without `sop` and
        tokens added to a filled cache are causal with positions that count up. The same follows from `inputs_embeds`
        in which the embeddings of `sop` and masks stand unchanged.

        Args:
            input_ids: `(B, L)` token ids.
            attention_mask: 1 or True where a token may be seen. `(B, S)` marks padding and is joined with the mask
                above; `(B or 1, 1, L, S)` replaces it, under every attention implementation.
            position_ids: `(B, L)` rotary positions; replace the derived ones. Plain counts, which libraries for causal
                models pass, do not: where they begin anew within a row they delimit packed samples.
            past_key_values: Cache of earlier tokens. New ones stay at the mask of their blank, or count on.
            segment_ids: `(B, L)` integers from 0 to `L` for samples packed side by side in a row: the number of a
                token's sample, 0 on padding. Each sample sees only itself and has its own context and positions.
            inputs_embeds: `(B, L, D)` instead of `input_ids`.
            use_cache: Whether to return the cache.
            num_outputs: How many tokens at the end have their states used, 0 for all. The last layer then leaves out
                the context where that is possible, and `last_hidden_state` is shorter, but never than this.
            cache: Name of `past_key_values` from transformers 5.24 on.
            **kwargs: Passed to the attention implementation.

        Returns:
            `last_hidden_state` `(B, L, D)` and the cache; `hidden_states` and `attentions` when asked for.

        Raises:
            ValueError: If not exactly one of `input_ids` and `inputs_embeds` is given, `segment_ids` come together
                with an `attention_mask` or a filled cache, a context comes with a filled cache, packed samples are
                marked by something that is not read here, embeddings without `sop` are trained on, or a filled cache
                comes under gradient checkpointing.
            RuntimeError: If a cache comes under an unknown name.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        require_known_cache(kwargs, "the model")
        require_known_packing(kwargs, position_ids, segment_ids)
        past_key_values = self._usable_cache(one_cache(past_key_values, cache))
        if self.training and torch.is_grad_enabled() and segment_ids is None:
            warn_of_trained_rows(input_ids, self.config, position_ids is not None)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        elif attention_mask is None or is_padding_mask(attention_mask):
            input_ids = layout_ids(inputs_embeds, self.embed_tokens, self.config)
        if self.training:
            inputs_embeds = shrink_gradient(inputs_embeds, self.config.embedding_gradient_shrink)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        keep_room(past_key_values, self.config.max_position_embeddings)

        attention = infilling_attention(
            self.config, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, segment_ids
        )
        position_embeddings = self.rotary_emb(inputs_embeds, attention.position_ids)
        hidden_states = inputs_embeds
        num_rest = inputs_embeds.shape[1] - (attention.context_length or 0)
        drops_context = attention.context_length is not None and 0 < num_outputs <= num_rest
        layers = self.layers
        if self.config.num_hidden_layers < len(layers):  # in drafts that leave early
            layers = layers[: self.config.num_hidden_layers]
        fused = None
        if self.fused_step is not None and inputs_embeds.shape[1] == 1 and not torch.compiler.is_compiling():
            fused = self.fused_step(
                layers, inputs_embeds, past_key_values, attention.mask, position_embeddings, **kwargs
            )
        for layer in layers if fused is None else ():
            hidden_states = layer(
                hidden_states,
                past_key_values,
                attention_mask=attention.mask,
                position_embeddings=position_embeddings,
                context_length=attention.context_length,
                drops_context=drops_context and layer is layers[-1],
                **kwargs,
            )
        hidden_states = hidden_states if fused is None else fused
        if past_key_values is not None and attention.fills_cache:
            remember_layout(past_key_values, input_ids, attention.position_ids, attention.in_context, self.config)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: past_key_values})

    def _usable_cache(self, cache: Cache | None) -> Cache | None:
        """Return the cache; where layers are computed twice, None for an empty one, ValueError for a filled one."""
        if cache is None or not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return cache
        if cache.get_seq_length() > 0:
            raise ValueError(
                "gradient checkpointing computes layers twice, which a filled cache or a learned prefix cannot take; "
                "switch it off by model.gradient_checkpointing_disable()"
            )
        return None


class GLMForBlankInfilling(GLMPreTrainedModel, BlankGenerationMixin):
    """GLM with its LM head: predicts the next token of a blank, and generates."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.model = GLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"
        self.stop_at_end_of_blank()
        self.post_init()

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tie the LM head to the embeddings, unless the caller would read the model from left to right."""
        require_known_reader(sys._getframe(1).f_globals.get("__name__"))
        super().tie_weights(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        segment_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Predict the token after each.

        Args:
            input_ids: As in `GLMModel.forward`, like the arguments up to `inputs_embeds`.
            attention_mask: As in `GLMModel.forward`.
            position_ids: As in `GLMModel.forward`.
            past_key_values: As in `GLMModel.forward`.
            segment_ids: As in `GLMModel.forward`.
            inputs_embeds: As in `GLMModel.forward`.
            labels: `(B, L)` aligned with `input_ids` (the loss shifts them), -100 on the context, `sop` and padding.
                `shift_labels`, what each token is to predict, are taken instead when given (`Trainer` passes them on
                with `remove_unused_columns=False`; as a named argument here they would hide its evaluation loss).
            use_cache: Whether to return the cache.
            logits_to_keep: Compute logits of the last so many tokens only, 0 for all; or of the given indices; or of
                the tokens that a bool mask `(B, L)` marks, `(tokens, V)` in the order of the rows.
            cache: As in `GLMModel.forward`.
            **kwargs: Passed to the attention implementation and the loss.

        Returns:
            `logits` `(B, L, V)`, the mean `loss` when labels are given, and the cache.
        """
        wants_all = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        num_outputs = logits_to_keep if isinstance(logits_to_keep, int) and not wants_all else 0
        has_labels = labels is not None or kwargs.get("shift_labels") is not None
        warn_of_labelled_context(input_ids, labels, segment_ids, self.config)
        if has_labels and not self.training and segment_ids is None:
            warn_of_trained_rows(input_ids, self.config, position_ids is not None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            segment_ids=segment_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_outputs=num_outputs,
            cache=cache,
            **kwargs,
        )
        logits = self.lm_head(kept_states(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if has_labels:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class GLMForMaskedLM(GLMPreTrainedModel):
    """GLM as a masked language model: scores one token for every `[MASK]` in a single forward pass."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.model = GLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """
        Score the tokens of a text whose tokens all see each other.

        A row with masks is completed as for generation: `</s>` unless it ends in a mask or `</s>`, then one `sop` for
        each `[MASK]`, at its position and seeing the context only. The logits of a mask are those of its `sop`, which
        are the ones `GLMForBlankInfilling` begins that blank with.

        Args:
            input_ids: `(B, L)` token ids without `sop`.
            attention_mask: `(B, L)`, 1 or True on tokens, 0 or False on padding. A 4D mask is taken as it is, and
                then no `sop` is added.
            position_ids: `(B, L)`; by default tokens are counted.
            inputs_embeds: `(B, L, D)` instead of `input_ids`; then no `sop` is added.
            labels: `(B, L)` with the token of each `[MASK]`, -100 elsewhere.
            **kwargs: Passed to the attention implementation and the loss.

        Returns:
            `logits` `(B, L, V)` and the mean `loss` when labels are given. `hidden_states` and `attentions`, when
            asked for, hold the added tokens behind the `L` given ones.
        """
        source = None
        if input_ids is not None and (attention_mask is None or is_padding_mask(attention_mask)):
            input_ids, attention_mask, position_ids, source = masked_lm_layout(
                input_ids, self.config, attention_mask, position_ids
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if source is not None:
            hidden_states = hidden_states.take_along_dim(source[..., None], dim=1)  # (B, L, D)
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def as_blank_infilling(self) -> GLMForBlankInfilling:
        """Return the generating head over the same modules; no weight is copied."""
        with torch.device("meta"):
            head = GLMForBlankInfilling(self.config)
        head.model, head.lm_head = self.model, self.lm_head
        return head.train(self.training)


__all__ = ["GLMForBlankInfilling", "GLMForMaskedLM", "GLMModel", "GLMPreTrainedModel"]
