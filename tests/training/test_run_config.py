"""Sections of a configuration file: a value of any kind is taken or refused with a ValueError."""

import pytest
import yaml

from glm_hf.training.run_config import RunConfig

WHOLE = {
    "model": {
        **{"path": "model", "tokenizer": "model", "config": {"num_layers": 2}, "quantization": {"bits": 4}},
        **{"dtype": "float32", "overrides": {"hidden_dropout": 0.0}, "attn_implementation": "sdpa"},
    },
    "data": {
        **{"train": [{"path": "a.jsonl", "weight": 1.0}], "eval": [{"path": "b.jsonl"}], "cache": "tokenized"},
        **{"recipe": {"row_length": 512}, "instruction_share": 0.1, "seed": 7},
    },
    "training": {"output_dir": "run"},
    "parallel": {"tp_size": 1},
    "peft": {"type": "LORA", "r": 4},
}
PLACES = [(section, key) for section, keys in WHOLE.items() for key in keys]
PLACES += [("data", "train", 0), ("data", "train", 0, "path"), ("data", "train", 0, "weight"), ("model",), ("data",)]
VALUES = (5, 1.5, "text", "", True, None, [], [5], [[1, 2], [3]], {}, {"a": 1}, float("nan"), float("inf"), -1)


def changed(place, value):
    """Return the text of a whole file with one value changed."""
    settings = yaml.safe_load(yaml.safe_dump(WHOLE))
    del settings["peft" if place[0] == "model" else "parallel"]
    if place[0] in ("data", "parallel"):
        del settings["model"]["quantization"]
    settings = settings | {place[0]: settings.get(place[0], WHOLE[place[0]])}
    part = settings
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    return yaml.safe_dump(settings)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_any_value_is_taken_or_refused(tmp_path, place):
    messages = []
    for value in VALUES:
        (tmp_path / "run.yaml").write_text(changed(place, value))
        try:
            RunConfig.read(tmp_path / "run.yaml")
        except ValueError as error:
            messages.append(str(error))  # any other error fails
    assert all(0 < len(message) < 2000 for message in messages)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("data", "seed"), "../../x", "seed must be a number or nothing, got '../../x'"),
        (("data", "eval"), 5, "needs data: eval, a list of corpora"),
        (("data", "cache"), 5, "cache must be a folder, got 5"),
        (("data", "train", 0, "weight"), "x", "weight must be a number or nothing, got 'x'"),
        (("model", "quantization"), 5, "quantization must be keys with values, got 5"),
    ],
)
def test_a_value_of_another_kind_is_named(tmp_path, place, value, message):
    (tmp_path / "run.yaml").write_text(changed(place, value))
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        RunConfig.read(tmp_path / "run.yaml")
    assert message in str(refusal.value)
