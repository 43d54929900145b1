import importlib.util
import sys

import pytest
import torch
from golden import DATA

from glm_hf import GLMConfig, GLMQuantizationConfig
from glm_hf.planning import Device, plan_devices
from glm_hf.planning.memory import linear_bytes, linear_shapes
from glm_hf.sharding import rules
from glm_hf.sharding.rules import COLUMN, GATED, REPLICATED, ROW, SHARD_RULES, shard_rule

MATRIX = torch.arange(32).view(8, 4)


def test_column_gives_every_rank_its_rows():
    first, second = COLUMN.split(MATRIX, 2)
    assert first.tolist() == MATRIX[:4].tolist()
    assert second.tolist() == MATRIX[4:].tolist()


def test_row_gives_every_rank_its_columns():
    first, second = ROW.split(MATRIX, 2)
    assert first.tolist() == MATRIX[:, :2].tolist()
    assert second.tolist() == MATRIX[:, 2:].tolist()


def test_gated_gives_every_rank_rows_of_both_halves():
    first, second = GATED.split(torch.arange(8), 2)
    assert first.tolist() == [0, 1, 4, 5]
    assert second.tolist() == [2, 3, 6, 7]


def test_gated_joins_all_first_halves_and_then_all_second_halves():
    parts = [torch.tensor([10, 20]), torch.tensor([11, 21]), torch.tensor([12, 22])]
    assert GATED.merge(parts).tolist() == [10, 11, 12, 20, 21, 22]


def test_replicated_is_taken_once():
    part = torch.tensor([1.0, 2.0])
    assert REPLICATED.merge([part, part]).tolist() == [1.0, 2.0]
    assert [shard.tolist() for shard in REPLICATED.split(part, 2)] == [[1.0, 2.0], [1.0, 2.0]]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("rule", [COLUMN, ROW, GATED, REPLICATED])
def test_merge_then_split_returns_shards(rule, tp_size):
    parts = [torch.randn(6, 5) for _ in range(tp_size)]
    if rule == REPLICATED:
        parts = parts[:1] * tp_size
    again = rule.split(rule.merge(parts), tp_size)
    assert all(torch.equal(part, shard) and shard.is_contiguous() for part, shard in zip(parts, again, strict=True))


@pytest.mark.parametrize("rule", [COLUMN, ROW, GATED, REPLICATED])
def test_split_then_merge_returns_tensor(rule):
    assert torch.equal(rule.merge(rule.split(MATRIX, 4)), MATRIX)


@pytest.mark.parametrize("rule", [COLUMN, ROW, GATED, REPLICATED])
def test_shard_shape_is_that_of_a_shard(rule):
    assert rule.shard_shape(MATRIX.shape, 2) == rule.split(MATRIX, 2)[0].shape


@pytest.mark.parametrize("rule", [COLUMN, ROW, GATED, REPLICATED])
def test_full_shape_is_that_of_the_merged_tensor(rule):
    assert rule.full_shape(rule.shard_shape(MATRIX.shape, 2), 2) == MATRIX.shape


@pytest.mark.parametrize("rule", [COLUMN, GATED])
def test_row_runs_tell_whose_rows_follow_each_other(rule):
    parts = [iter(part) for part in rule.split(MATRIX, 2)]
    rows = [next(parts[rank]) for rank, num_rows in rule.row_runs(len(MATRIX), 2) for _ in range(num_rows)]
    assert torch.equal(torch.stack(rows), MATRIX)


def test_scale_is_cut_as_its_weight_is():
    assert shard_rule("model.layers.3.mlp.dense_h_to_4h.weight_scale") == GATED
    assert shard_rule("model.layers.3.attention.dense.weight_scale") == ROW


@pytest.mark.parametrize(("rule", "tp_size"), [(COLUMN, 3), (ROW, 8), (GATED, 8)])
def test_uneven_split_is_refused(rule, tp_size):
    with pytest.raises(
        ValueError, match=rf"tp_size must split dimension \d of a tensor of shape \(8, 4\) .* got {tp_size}"
    ):
        rule.split(MATRIX, tp_size)


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("config", ["cfg1", "cfg2"])
def test_rules_join_the_ranks_of_the_original_tool(config, tp_size):
    def load(size: int, rank: int) -> dict[str, torch.Tensor]:
        path = DATA / config / f"sat_tp{size}" / "49300" / f"mp_rank_{rank:02d}_model_states.pt"
        return torch.load(path, weights_only=True)["module"]

    whole, ranks = load(1, 0), [load(tp_size, rank) for rank in range(tp_size)]
    for name, expected in whole.items():
        if not name.endswith("inv_freq"):
            hf_name = name.replace("transformer.word_embeddings", "model.embed_tokens")
            rule = shard_rule(
                hf_name.replace("transformer.final_layernorm", "model.norm").replace("transformer", "model")
            )
            assert torch.equal(rule.merge([rank[name] for rank in ranks]), expected), name
            assert all(
                torch.equal(shard, rank[name])
                for shard, rank in zip(rule.split(expected, tp_size), ranks, strict=True)
            ), name


def test_row_parallel_biases_and_norms_are_replicated():
    replicated = {name for name, rule in SHARD_RULES.items() if rule == REPLICATED}
    norms = {
        f"{norm}.{kind}" for norm in ("input_layernorm", "post_attention_layernorm") for kind in ("weight", "bias")
    }
    assert replicated == norms | {
        "attention.dense.bias",
        "mlp.dense_4h_to_h.bias",
        "model.norm.weight",
        "model.norm.bias",
    }


def test_unknown_name_has_no_rule():
    with pytest.raises(KeyError, match="lm_head"):
        shard_rule("lm_head.bias")


def test_all_who_shard_follow_the_plan_of_the_model():
    """The plan is what transformers shards by; everything else is asked here, each by its own words."""
    config = GLMConfig(num_hidden_layers=1)
    for name, style in config.base_model_tp_plan.items():
        linear = name.removeprefix("layers.*.")
        is_row = style == "rowwise"
        assert shard_rule(f"model.layers.0.{linear}.weight").dim == int(is_row)
        assert (shard_rule(f"model.layers.0.{linear}.bias") == REPLICATED) == is_row
        ranks = GLMQuantizationConfig(row_parallel_groups=4)  # scales of a model that was quantized rank by rank
        assert ranks.num_groups(f"model.layers.0.{linear}", 64) == (4 if is_row else 1)
        rows, columns = linear_shapes(config)[linear]
        halved = plan_devices(config, [Device(0, 2**40), Device(1, 2**40)], tp_size=2).request
        bias = rows * 2 if is_row else rows
        assert linear_bytes(halved, 0, linear) == rows * columns + bias


def test_a_change_of_the_plan_reaches_the_rules(monkeypatch):
    plan = GLMConfig.base_model_tp_plan | {"layers.*.attention.dense": "colwise"}
    monkeypatch.setattr(GLMConfig, "base_model_tp_plan", plan)
    spec = importlib.util.spec_from_file_location("changed_rules", rules.__file__)
    changed = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "changed_rules", changed)  # where dataclasses look for it
    spec.loader.exec_module(changed)
    assert changed.shard_rule("model.layers.3.attention.dense.bias") == changed.COLUMN
    assert changed.ROW_PARALLEL == ("mlp.dense_4h_to_h",)


@pytest.mark.parametrize("linear", rules.PLAN)
def test_shards_of_an_update_multiply_to_the_shard_of_the_weight(linear):
    """Of `B A`, which LoRA adds to a weight."""
    name, tp_size = f"model.layers.3.{linear}", 2
    lora_a, lora_b = torch.randn(3, 8, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    of_a, of_b = (
        shard_rule(f"{name}.lora_{part}.weight").split(w, tp_size) for part, w in (("A", lora_a), ("B", lora_b))
    )
    for shard, a, b in zip(shard_rule(f"{name}.weight").split(lora_b @ lora_a, tp_size), of_a, of_b, strict=True):
        torch.testing.assert_close(b @ a, shard)
