"""
transformers' own tests of models, run on ours.

What a class of tests shares is in `transformers_tests`; here are a tiny model, its inputs, and the tests whose
assumptions a prefix language model does not meet, each with the reason.
"""

import unittest
from typing import Any
from unittest import mock

import pytest
import torch
from glu_shards import compare_gradients_with_glu
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers_tests import test_modeling_common, test_tensor_parallel_mixin
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from glm_hf import GLMConfig, GLMForBlankInfilling, GLMForMaskedLM, GLMModel
from glm_hf.modeling_glm import GLMPreTrainedModel
from glm_hf.rotary_glm import GLMRotaryEmbedding

# The tests tell heads from base models by class names in transformers' own tables.
for table, model_class in {
    "MODEL_MAPPING_NAMES": GLMModel,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": GLMForBlankInfilling,
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": GLMForMaskedLM,
}.items():
    setattr(test_modeling_common, table, getattr(test_modeling_common, table) | {"glm130b": model_class.__name__})

test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None  # by default a list of transformers' own models


class GLMModelTester:
    """A tiny model and its inputs: a context with a `[MASK]`, `</s>`, `sop` and the content of the blank."""

    base_model_class = GLMModel
    causal_lm_class = GLMForBlankInfilling
    batch_size = 13
    seq_length = 12
    context_length = 8
    blank_index = 3
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    rope_dtype = "float16"
    is_training = True

    def get_config(self) -> GLMConfig:
        return GLMConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=40,
            max_position_embeddings=128,
            rope_dtype=self.rope_dtype,
            eos_token_id=92,
            mask_token_id=93,
            gmask_token_id=94,
            smask_token_id=95,
            eod_token_id=96,
            sop_token_id=97,
            eop_token_id=98,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[GLMConfig, dict[str, Any]]:
        config = self.get_config()
        input_ids = 1 + ids_tensor([self.batch_size, self.seq_length], config.eos_token_id - 1)  # no special ids
        input_ids[:, self.blank_index] = config.mask_token_id
        input_ids[:, self.context_length - 1] = config.eos_token_id
        input_ids[:, self.context_length] = config.sop_token_id
        return config, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class GLMModelTest(
    ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, TensorParallelTesterMixin, unittest.TestCase
):
    model_tester = GLMModelTester()
    all_model_classes = (GLMModel, GLMForBlankInfilling, GLMForMaskedLM)
    test_can_init_all_missing_weights_before_2023 = True  # the age of a model is read from a line that we lack
    masked_lm_has_blanks = True

    def setUp(self) -> None:
        self.model_tester = GLMModelTester()
        test_modeling_common.global_rng.seed(0)

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: type[PreTrainedModel], return_labels: bool = False
    ) -> dict[str, Any]:
        """Give `GLMForMaskedLM` texts without `sop`, which it appends itself."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if model_class is GLMForMaskedLM and "input_ids" in inputs:
            config = self.model_tester.get_config()
            removed = [config.sop_token_id, *([] if self.masked_lm_has_blanks else [config.mask_token_id])]
            ids = inputs["input_ids"]
            inputs["input_ids"] = ids.masked_fill(torch.isin(ids, torch.tensor(removed)), 1)
        return inputs

    def test_config(self) -> None:
        ConfigTester(self, config_class=GLMConfig, hidden_size=32, num_attention_heads=4).run_common_tests()

    def test_attention_outputs(self) -> None:
        """Leave the masks out of texts for `GLMForMaskedLM`: it appends a token for each, which is attended to."""
        self.masked_lm_has_blanks = False
        super().test_attention_outputs()

    def test_hidden_states_output(self) -> None:
        """Leave the masks out of texts for `GLMForMaskedLM`, as above."""
        self.masked_lm_has_blanks = False
        super().test_hidden_states_output()

    def test_inputs_embeds_matches_input_ids(self) -> None:
        """Give mask and positions, which otherwise follow from `input_ids` and cannot from embeddings."""
        length, context_length = self.model_tester.seq_length, self.model_tester.context_length
        visible = torch.ones(length, length, dtype=torch.bool).tril()
        visible[:context_length, :context_length] = True
        position_ids = torch.arange(length)[None].clamp(max=context_length - 1)
        position_ids[:, context_length:] = self.model_tester.blank_index
        super().test_inputs_embeds_matches_input_ids(
            attention_mask=visible[None, None], position_ids=position_ids.expand(self.model_tester.batch_size, -1)
        )

    def _create_text_training_batch(self, batch_size: int, seq_length: int, vocab_size: int) -> dict[str, Any]:
        """Begin with `sop`, behind which a text is learned causally, as the original is throughout."""
        batch = super()._create_text_training_batch(batch_size, seq_length - 1, vocab_size)
        sop = torch.full((batch_size, 1), self.model_tester.get_config().sop_token_id)
        return {name: torch.cat((sop, ids), dim=1) for name, ids in batch.items()}

    def test_bc_cache_name_forward(self) -> None:
        """Take a cache by either name; the original also asks for a warning at the older one."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in (GLMModel, GLMForBlankInfilling):
            model = model_class(config).eval()
            caches = {name: DynamicCache(config=config) for name in ("cache", "past_key_values")}
            states = [model(**inputs, **{name: cache})[0] for name, cache in caches.items()]
            torch.testing.assert_close(*states)
            assert all(cache.get_seq_length() for cache in caches.values())

    def test_model_forward_default_config_values(self) -> None:
        """Take GLM-130B's vocabulary, since the default of `eos_token_id` must lie in it."""
        self.model_tester.vocab_size = GLMConfig.vocab_size
        super().test_model_forward_default_config_values()

    def test_model_rope_scaling_from_config_0_linear(self) -> None:
        """Take fp32 angles, without which scaled positions are refused."""
        self.model_tester.rope_dtype = "float32"
        super().test_model_rope_scaling_from_config_0_linear()

    def test_model_rope_scaling_from_config_2_yarn(self) -> None:
        """Take fp32 angles, as above."""
        self.model_tester.rope_dtype = "float32"
        super().test_model_rope_scaling_from_config_2_yarn()

    def test_model_rope_scaling_from_config_1_dynamic(self) -> None:
        """Expect an error: keys in the cache would be rotated for another length than the query."""
        with pytest.raises(StrictDataclassClassValidationError, match="rope_type must be one of"):
            GLMConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 10.0})

    def test_model_rope_scaling_frequencies(self) -> None:
        """
        Check the frequencies of the static types by transformers' own criteria.

        The original also asks for `dynamic`, which is refused.
        """

        def tables(**rope_parameters: Any) -> torch.Tensor:
            self.model_tester.rope_dtype = "float32"
            config = self.model_tester.get_config()
            config.rope_parameters = {"rope_theta": 10000.0, **rope_parameters}
            return torch.cat(GLMRotaryEmbedding(config)(torch.zeros(1), torch.arange(192)[None]), dim=-1)

        default = tables(rope_type="default")
        linear = tables(rope_type="linear", factor=10.0)
        yarn = tables(rope_type="yarn", factor=10.0)
        torch.testing.assert_close(linear[:, ::10], default[:, :20])
        for scaled in (linear, yarn):
            assert not torch.allclose(scaled[:, :10], default[:, :10])
            assert not torch.allclose(scaled, default)

    def _get_tp_config(self, tie_word_embeddings: bool | None = None) -> GLMConfig:
        """Initialise biases too, from here to the end of the test: shards of zeros are all alike."""
        initialise = GLMPreTrainedModel._init_weights

        def initialise_biases_too(model: GLMPreTrainedModel, module: nn.Module) -> None:
            initialise(model, module)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.normal_(module.bias)

        patch = mock.patch.object(GLMPreTrainedModel, "_init_weights", initialise_biases_too)
        patch.start()
        self.addCleanup(patch.stop)
        return super()._get_tp_config(tie_word_embeddings)

    def test_tp_backward(self) -> None:
        """Tell the test how the style `glu_colwise` cuts a gradient, so that it can compare it."""
        with mock.patch.object(test_tensor_parallel_mixin, "_test_tp_backward_impl", compare_gradients_with_glu):
            super().test_tp_backward()
