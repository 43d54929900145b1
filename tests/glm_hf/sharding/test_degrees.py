"""Degrees of parallelism: who holds what."""

import pytest
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from glm_hf import GLMConfig
from glm_hf.sharding.degrees import ParallelDegrees


def test_the_first_and_last_stage_of_glm_130b_are_a_layer_lighter():
    stages = ParallelDegrees(4, 8, 24).stage_layers(70)
    assert [len(stage) for stage in stages] == [8, 9, 9, 9, 9, 9, 9, 8]
    assert [layer for stage in stages for layer in stage] == list(range(70))


@pytest.mark.parametrize(
    ("num_layers", "stages", "expected"),
    [(4, 2, [2, 2]), (3, 2, [2, 1]), (7, 4, [2, 2, 2, 1]), (5, 5, [1] * 5), (6, 1, [6]), (10, 4, [2, 3, 3, 2])],
)
def test_stages_are_balanced(num_layers, stages, expected):
    assert [len(stage) for stage in ParallelDegrees(pp_size=stages).stage_layers(num_layers)] == expected


def test_a_partition_of_ones_own():
    parallel = ParallelDegrees.of({"pp_size": 3, "partition": [1, 4, 2]})
    assert parallel.stage_layers(7) == (range(1), range(1, 5), range(5, 7))
    with pytest.raises(ValueError, match="partition must hold the 8 layers of the model, got 7"):
        parallel.stage_layers(8)


def test_ranks_are_numbered_as_deepspeed_does():
    parallel = ParallelDegrees(tp_size=2, pp_size=3, dp_size=4)
    topology = PipeModelDataParallelTopology(3, 2, 4)
    for rank in range(parallel.world_size):
        place = topology.get_coord(rank)
        assert parallel.coordinates(rank) == (place.pipe, place.data, place.model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tp_size": 0}, "tp_size must be an integer of at least 1, got 0"),
        ({"pp_size": "two"}, "pp_size must be an integer of at least 1, got 'two'"),
        ({"dp_size": True}, "dp_size must be an integer"),
        ({"tp": 2}, "parallel takes tp_size, pp_size, dp_size, partition, sequence_parallel, got"),
        ([2, 2, 2], "parallel takes tp_size"),
        ({"pp_size": 2, "partition": [3]}, r"partition must have a value per stage \(2\), got 1"),
        ({"pp_size": 2, "partition": [3, 0]}, "at least 1 layer"),
        ({"pp_size": 2, "partition": 3}, "partition must list"),
    ],
)
def test_impossible_degrees_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ParallelDegrees.of(given)


def test_old_names_of_the_degrees_are_read_with_a_warning():
    with pytest.warns(DeprecationWarning, match="parallel: tensor, data became tp_size, dp_size"):
        degrees = ParallelDegrees.of({"tensor": 2, "data": 3, "pp_size": 4})
    assert degrees == ParallelDegrees(tp_size=2, pp_size=4, dp_size=3)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (ParallelDegrees(tp_size=7), r"tp_size must divide num_attention_heads \(96\), got 7"),
        (ParallelDegrees(tp_size=64), "tp_size must divide num_attention_heads"),
        (ParallelDegrees(pp_size=71), r"pp_size must be at most the number of layers \(70\), got 71"),
    ],
)
def test_a_model_that_cannot_be_spread_is_refused(parallel, message):
    with pytest.raises(ValueError, match=message):
        parallel.require_fits(GLMConfig())


def test_a_vocabulary_that_cannot_be_cut_is_refused():
    config = GLMConfig(vocab_size=150530)
    with pytest.raises(ValueError, match=r"tp_size must divide vocab_size \(150530\), got 4"):
        ParallelDegrees(tp_size=4).require_fits(config)


def test_an_mlp_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match=r"tp_size must divide intermediate_size \(32770\), got 4"):
        ParallelDegrees(tp_size=4).require_fits(GLMConfig(intermediate_size=32770))


def test_the_number_of_processes_must_be_the_product():
    with pytest.raises(ValueError, match="tensor 2 x pipeline 2 x data 2 takes 8 processes, but 4 were started"):
        ParallelDegrees(2, 2, 2).require_world(4)
