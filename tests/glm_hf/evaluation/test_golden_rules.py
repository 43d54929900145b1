"""What single functions of the original return for invented input."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from glm_hf.evaluation.beams import Beam
from glm_hf.evaluation.original import metrics
from glm_hf.evaluation.original.generation import choose_word
from glm_hf.evaluation.samples import (
    Rule,
    choice_sample,
    generation_row,
    num_windows,
    single_token_sample,
    stack,
    window_sample,
)

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "evaluation"
RULES = json.loads((GOLDEN / "rules" / "expected.json").read_text())


@pytest.fixture(scope="module")
def config():
    return AutoConfig.from_pretrained(GOLDEN / "model")


def spelled(sample, config):
    """What every token of a row sees."""
    rows = stack([sample], config.pad_token_id)["attention_mask"][0, 0].long().tolist()
    return ["".join(map(str, row)) for row in rows]


def rule_of(case):
    return Rule("[gMASK]" if case["use_task_mask"] else "[MASK]", case.get("unidirectional", False), 2048)


@pytest.mark.parametrize("case", RULES["answers"], ids=lambda case: case["prediction"])
def test_answers(case):
    assert metrics.normalize_answer(case["prediction"]) == case["normalized"]
    assert metrics.exact_match(case["prediction"], case["targets"]) == case["EM"]
    assert metrics.f1(case["prediction"], case["targets"]) == pytest.approx(case["F1"], abs=1e-12)
    assert float(case["prediction"] in case["targets"]) == case["lambada"]


@pytest.mark.parametrize("case", RULES["lambada_beams"], ids=lambda case: case["prediction_text"])
def test_the_beam_that_answers(case):
    texts = dict(enumerate(case["beam_texts"]))

    class Evaluator:
        end_ids = ()

        def decode(self, ids):
            return texts[ids[0]]

    beams = [Beam([number], 0, 0.0) for number in texts]
    assert metrics.first_word(texts[choose_word(beams, Evaluator())[0]]) == case["prediction_text"]


@pytest.mark.parametrize("case", RULES["group_metrics"], ids=lambda case: len(case["files"]))
def test_groups(case):
    files = {file["file"]: file for file in case["files"]}
    found = metrics.group_metrics(files)
    for name, expected in case["result"].items():
        assert found[name] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("case", RULES["classification"], ids=lambda case: len(case["labels"]))
def test_classification(case):
    share = metrics.accuracy(case["predictions"], case["labels"])
    for name in ("Accuracy", "F1_mul", "Precision", "Recall"):
        assert share == pytest.approx(case.get(name, share), abs=1e-9)


@pytest.mark.parametrize("case", RULES["perplexity"], ids=lambda case: case["text"])
def test_perplexity(case):
    assert metrics.count_words(case["text"]) == case["num_words"]
    assert metrics.perplexity(case["losses"], case["num_words"]) == pytest.approx(case["PPL"], rel=1e-12)


@pytest.mark.parametrize(
    "case", RULES["windows"], ids=lambda case: f"{case['num_tokens']} {case['generation_length']}"
)
def test_windows(case, config):
    rule = Rule("[gMASK]", case["unidirectional"], case["max_seq_length"])
    tokens, stride = [100 + number for number in range(case["num_tokens"])], case["generation_length"]
    assert num_windows(len(tokens), stride, rule) == len(case["windows"])
    for number, expected in enumerate(case["windows"]):
        sample = window_sample(tokens, number, stride, rule, config)
        assert sample.input_ids == expected["token"]
        assert [*sample.input_ids[: sample.num_context], *sample.targets] == expected["target"]
        assert sample.num_context == expected["num_mutually_visible"]
        assert len(sample.rows) == len(sample.targets) == expected["num_loss_tokens"]


@pytest.mark.parametrize("case", RULES["multi_choice_samples"], ids=lambda case: f"{case['text']} {case['choices']}")
def test_rows_of_choices(case, config):
    lay_out = single_token_sample if case["is_single_token"] else choice_sample
    sample = lay_out(case["text"], case["choices"], rule_of(case), config)
    assert sample.input_ids == case["token"]
    assert sample.position_ids == case["position_id"]
    assert spelled(sample, config) == case["visible_rows"]
    places = case["choice_target_ids"] if case["is_single_token"] else sum(case["choice_target_ids"], [])
    assert sorted(set(sample.rows)) == places


@pytest.mark.parametrize("case", RULES["generation_samples"], ids=lambda case: f"{case['text']}")
def test_rows_to_go_on(case, config):
    if "error" in case:
        with pytest.raises(ValueError, match="gMASK"):
            generation_row(case["text"], 4, rule_of(case), config)
        return
    row, layout = generation_row(case["text"], 4, rule_of(case), config)
    assert row == case["token"]
    assert list(layout.position_ids) == case["position_id"]
    assert [layout.next_position + step * layout.increment for step in range(4)] == case["target_position_id"]
    for query, seen in enumerate(case["visible_rows"]):
        assert seen == "".join("01"[key < layout.num_context or key <= query] for key in range(len(row)))


def test_crows_pairs():
    case = RULES["crows_pairs"]
    found = metrics.crows_pairs(case["examples"], [values[0] for values in case["log_probs"]])
    assert found == pytest.approx(case["result"], abs=1e-12)


@pytest.mark.parametrize("case", RULES["stereoset"], ids=lambda case: len(case["predictions"]))
def test_stereoset(case):
    for found, expected in zip(metrics.stereoset(case["examples"], case["predictions"]), case["result"], strict=True):
        assert found == pytest.approx(expected, abs=1e-9)


def test_bits_per_byte():
    case, documents = RULES["bits_per_byte"], []
    losses = iter(case["losses"])
    for document in case["documents"]:
        part = [next(losses) for _ in range(document["num_sequences"])]
        documents.append((document["meta"]["pile_set_name"], document["utf8_length"], part))
    assert metrics.bits_per_byte(documents) == pytest.approx(case["result"], abs=1e-12)
