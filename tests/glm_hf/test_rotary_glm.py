import copy
import shutil

import pytest
import torch
from golden import golden_model

from glm_hf import GLMConfig, GLMModel
from glm_hf.rotary_glm import GLMRotaryEmbedding, round_to_half

MODEL = golden_model("cfg1")
POSITIONS = torch.arange(2048)[None]


def tables(model=None, positions=POSITIONS, **changes):
    rotary = GLMRotaryEmbedding(GLMConfig(**changes)) if model is None else model
    return torch.stack(rotary(torch.zeros(1), positions))


def test_rounding_equals_fp16_for_every_number_and_tie():
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    halves = halves[halves.isfinite()].sort().values
    middles = (halves[1:] + halves[:-1]) / 2  # ties, all exact in fp32
    values = torch.cat((halves, middles, middles.nextafter(halves[1:]), middles.nextafter(halves[:-1])))
    assert torch.equal(round_to_half(values), values.half().float())


def test_tables_are_those_of_a_computation_in_fp16():
    frequencies = (1.0 / 10000.0 ** (torch.arange(0, 128, 2).float() / 128)).half()
    angles = POSITIONS[..., None].half() * frequencies
    cos, sin = angles.cos().float(), angles.sin().float()
    expected = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))
    assert torch.equal(tables(), expected)


def test_compiled_tables_are_rounded_as_well():
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("compiling on the CPU needs a C++ compiler")
    rotary = GLMRotaryEmbedding(GLMConfig())
    compiled = tables(torch.compile(rotary, fullgraph=True))
    difference = (compiled - tables(rotary)).abs()
    assert difference.max() < 2e-3  # a last bit of fp16 where two cosine routines disagree on a tie
    assert (difference > 0).float().mean() < 1e-3


def test_angles_survive_every_way_to_make_and_cast_a_model(tmp_path):
    ids, positions = torch.tensor([[11, 12, 13]]), torch.tensor([[2030, 2035, 2040]])
    expected = MODEL(ids, position_ids=positions).logits
    cast = copy.deepcopy(MODEL).bfloat16().half().float()
    cast.load_state_dict(MODEL.state_dict())
    of_type = copy.deepcopy(MODEL).type(torch.float32)  # which casts integers, too
    MODEL.save_pretrained(tmp_path)
    loaded = type(MODEL).from_pretrained(tmp_path)
    for model in (cast, of_type, loaded):
        assert torch.equal(model.model.rotary_emb.frequency_bits, MODEL.model.rotary_emb.frequency_bits)
        torch.testing.assert_close(model(ids, position_ids=positions).logits, expected, atol=1e-5, rtol=0)


def test_linear_scaling_stretches_positions():
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 10.0}
    plain = tables(rope_dtype="float32")
    scaled = tables(positions=10 * POSITIONS, rope_dtype="float32", rope_parameters=rope)
    torch.testing.assert_close(scaled, plain, atol=1e-3, rtol=0)  # angles up to 2047 in fp32


def test_type_assigned_later_is_checked_too():
    config = GLMConfig(**MODEL.config.to_dict())
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="rope_type must be one of"):
        GLMModel(config)
