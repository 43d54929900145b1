"""Tables, comparisons and pictures of results."""

import copy
import json
import random

import pytest
from scipy import stats

from glm_hf.evaluation.original.runs import run_task
from glm_hf.evaluation.report.compare import Pairs, compare, pairs_of
from glm_hf.evaluation.report.figures import figures_of
from glm_hf.evaluation.report.plots import plot_results
from glm_hf.evaluation.report.published import published_figure
from glm_hf.evaluation.report.table import result_table

MODEL = {"name": "a model", "bits": None}


@pytest.fixture(scope="module")
def results(loaded, golden):
    from glm_hf.evaluation.evaluator import Evaluator

    names = ("mul_groups", "stereoset", "crows_pairs", "pile", "gen_greedy_mask", "lambada", "lm_bidirectional_short")
    return {name: run_task(golden / name / "task.yaml", Evaluator(*loaded)) for name in names}


def named(name, average, group="Overall", metric="Accuracy"):
    """A result of one figure."""
    values = {"max": average + 1, "median": average, "average": average}
    return {"model": MODEL, "tasks": {name: {"metrics": {group: {}}, "group_metrics": {group: {metric: values}}}}}


def test_all_kinds_of_figures_are_found(results):
    found = {(each.task, each.group, each.metric): each for each in figures_of({"tasks": results})}
    overall = found["mul_groups", "Overall", "Accuracy"]
    assert (overall.greatest, overall.median, overall.value) == pytest.approx((100, 100, 96.428571))
    assert found["stereoset", "overall", "LMS"].value == 80.0
    assert found["stereoset", "overall", "ICAT"].value == pytest.approx(45.0)
    assert found["crows_pairs", "animal", "CP"].value == 50.0
    assert found["pile", "Encyclopedia", "BPB"].value == pytest.approx(3.726, abs=1e-3)
    assert not found["pile", "Encyclopedia", "BPB"].is_share


def test_a_result_of_one_file_has_the_same_figures(results):
    assert figures_of(results["mul_groups"]) == figures_of({"tasks": {"mul_groups": results["mul_groups"]}})


def test_figures_of_the_harness_are_in_percent_with_their_errors():
    harness = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.25, "acc_stderr,none": 0.01, "word_perplexity,none": 12.0},
            "g": {"acc,none": 0.5, "acc_stderr,none": "N/A"},
        },
        "groups": {"g": {"acc,none": 0.5, "acc_stderr,none": "N/A"}},
    }
    found = {
        (each.task, each.group, each.metric): (each.value, each.error) for each in figures_of({"harness": harness})
    }
    assert found == {
        ("a", "", "acc"): (25.0, 1.0),
        ("a", "", "word_perplexity"): (12.0, None),
        ("g", "(group)", "acc"): (50.0, None),
    }


@pytest.mark.parametrize(
    ("result", "bits", "expected"),
    [
        (named("MMLU", 44.0), 16, 44.751),
        (named("MMLU", 44.0), 4, 44.801),
        (named("MMLU", 44.0, group="stem"), 16, None),
        (named("LAMBADA", 80.0, group="test"), 8, 80.206),
        (named("LAMBADA", 80.0, group="validation"), 8, None),
        (named("LAMBADA-unidirectional", 80.0, group="test"), 16, None),
        (named("WikiText-2", 11.0, group="test", metric="PPL"), 4, 11.167),
        (named("wikitext-103", 11.0, group="all", metric="PPL"), 16, 10.759),
        (named("ptb", 19.0, group="test", metric="PPL"), 16, 18.964),
        (named("ptb", 19.0, group="test", metric="Accuracy"), 16, None),
    ],
)
def test_what_was_published(result, bits, expected):
    (figure,) = figures_of(result)
    assert published_figure(figure, bits) == expected


def test_a_table_marks_what_is_far_from_published_figures():
    lines = result_table({**named("MMLU", 40.0), "model": {"bits": 4}})
    assert lines[0].split() == ["task", "group", "metric", "max", "median", "average", "published", "difference"]
    assert lines[1].split() == ["MMLU", "Overall", "Accuracy", "41.000", "40.000", "40.000", "44.801", "-4.80", "*"]
    assert lines[2].startswith("* 1.0 or more away")
    assert "*" not in "".join(result_table(named("MMLU", 44.2)))
    assert "published" not in result_table(named("other", 44.2))[0]


def test_a_result_is_no_different_from_itself(results):
    lines = compare({"tasks": results}, {"tasks": results})
    assert len(lines) > 20
    assert all(" +0.000" in line and "*" not in line and "± 0.00" not in line for line in lines[1:])


def flip(result, count):
    """The same result with some predictions changed."""
    other = copy.deepcopy(result)
    (items,) = other["items"].values()
    changed = [item for item in items if item["EM"] == 1.0][:count]
    for item in changed:
        item.update(EM=0.0, F1=0.0, prediction_text="something else")
    right = sum(item["EM"] for item in items)
    other["group_metrics"]["test"]["EM"]["average"] = 100 * right / len(items)
    return other, len(items)


def test_items_that_changed_are_counted(results):
    before = results["gen_greedy_mask"]
    after, count = flip(before, 5)
    lines = compare(before, after)
    (pairs,) = pairs_of(before, after).values()
    mean, reach = pairs.interval
    assert mean == pytest.approx(-5 / count)
    assert "gen_greedy_mask: 0 items right in B only, 5 in A only" in lines
    assert sum("B: something else" in line for line in lines) == 5
    em = next(line for line in lines if " EM " in line)
    assert em.endswith("*") is (abs(mean) > reach)


@pytest.mark.parametrize("changed", [0.01, 0.04, 0.2])
@pytest.mark.parametrize("bias", [0.5, 0.8])
def test_intervals_hold_the_true_difference_at_least_as_often_as_they_say(changed, bias):
    rng, held, count = random.Random(0), 0, 120
    truth = changed * (2 * bias - 1)
    for _ in range(400):
        scores = []
        for _ in range(count):
            is_changed, is_better, is_right = (rng.random() < p for p in (changed, bias, 0.7))
            scores.append((float(not is_better), float(is_better)) if is_changed else (float(is_right),) * 2)
        mean, reach = Pairs(scores, []).interval
        held += abs(mean - truth) <= reach
    assert held / 400 >= 0.93


def test_intervals_of_other_scores_are_those_of_the_mean():
    rng = random.Random(1)
    scores = [(rng.random(), rng.random()) for _ in range(50)]
    mean, reach = Pairs(scores, []).interval
    differences = [after - before for before, after in scores]
    low, high = stats.norm.interval(0.95, loc=sum(differences) / 50, scale=stats.sem(differences))
    assert (mean - reach, mean + reach) == pytest.approx((low, high), abs=1e-6)


def test_items_of_the_harness_tell_what_was_chosen():
    def sample(best, right):
        scores = [[float(number == best), False] for number in range(2)]
        arguments = [["Is it?", " no"], ["Is it?", " yes"]]
        return {"doc_id": 4, "acc": float(best == right), "filtered_resps": scores, "arguments": arguments}

    harness = {"results": {"a": {"acc,none": 0.5}}}
    before, after = ({"harness": harness, "samples": {"a": [sample(best, 1)]}} for best in (0, 1))
    lines = compare(before, after)
    assert lines[-2:] == ["a: 1 items right in B only, 0 in A only", "    4:0  A: no  B: yes"]


def test_other_items_or_no_common_figure_are_refused(results):
    before = results["gen_greedy_mask"]
    after = copy.deepcopy(before)
    next(iter(after["items"].values()))[0]["token"].append(1)
    with pytest.raises(ValueError, match="not the same in both results"):
        compare(before, after)
    with pytest.raises(ValueError, match="no figure in common"):
        compare(before, {"tasks": {}})


@pytest.mark.parametrize("names", [["mul_groups"], ["mul_groups", "stereoset"]])
@pytest.mark.parametrize("count", [1, 2])
def test_a_picture_is_drawn(names, count, results, tmp_path):
    result = {"tasks": {name: results[name] for name in names}}
    path = tmp_path / "picture.png"
    plot_results([result] * count, ["fp16", "INT4"][:count], path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(content[16:20]) > 800  # pixels wide


def test_there_must_be_a_share_to_draw(results, tmp_path):
    with pytest.raises(ValueError, match="no share"):
        plot_results([results["lm_bidirectional_short"]], ["a"], tmp_path / "picture.png")


def test_results_are_plain_json(results):
    for result in results.values():
        assert json.loads(json.dumps(result))["metrics"].keys() == result["metrics"].keys()
