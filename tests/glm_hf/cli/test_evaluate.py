"""`glm-hf evaluate`, as it is typed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from kills import begin, finish

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "evaluation"
MODEL = GOLDEN / "model"
TASK = GOLDEN / "mul_groups" / "task.yaml"


def read(path):
    return json.loads(path.read_text())


def test_a_task_file_gives_a_table_and_a_result(run, tmp_path):
    code, out, _ = run("evaluate", MODEL, "--task-file", TASK, "--output", tmp_path / "result.json")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["task", "group", "metric", "max", "median", "average"],
        ["mul_groups", "capitals", "Accuracy", "100.000", "100.000", "100.000"],
        ["mul_groups", "words", "Accuracy", "100.000", "100.000", "93.333"],
        ["mul_groups", "Overall", "Accuracy", "100.000", "100.000", "96.429"],
    ]
    result, expected = read(tmp_path / "result.json"), read(TASK.with_name("expected.json"))
    assert result["metrics"] == expected["metrics"]
    assert result["model"]["dtype"] == "float32"
    assert result["task"]["max_seq_length"] == 2048
    assert result["versions"].keys() == {"glm_hf", "torch", "transformers"}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_folder_of_tasks(run, tmp_path):
    code, _, _ = run(
        *("evaluate", MODEL, "mul_groups/task", "pile/task", "--tasks-dir", GOLDEN, "--data-dir", GOLDEN),
        *("--output", tmp_path / "result.json", "--plot", tmp_path / "picture.png"),
    )
    assert code == 0
    result = read(tmp_path / "result.json")
    for name in ("mul_groups", "pile"):
        expected = read(GOLDEN / name / "expected.json")["metrics"]
        assert result["tasks"][name]["metrics"].keys() == expected.keys()
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_two_precisions_side_by_side(run, tmp_path):
    for name, options in (("fp16", ()), ("int4", ("--bits", 4))):
        code, _, _ = run("evaluate", MODEL, "--task-file", TASK, "--output", tmp_path / f"{name}.json", *options)
        assert code == 0
    assert read(tmp_path / "int4.json")["model"]["bits"] == 4
    code, out, _ = run(
        "evaluate", "--compare", tmp_path / "fp16.json", tmp_path / "int4.json", "--plot", tmp_path / "both.png"
    )
    assert code == 0
    assert out.splitlines()[0].split() == ["task", "group", "metric", "A", "B", "difference", "95%", "interval"]
    assert len([line for line in out.splitlines() if line.startswith("mul_groups ")]) == 3
    assert (tmp_path / "both.png").exists()


def test_options_overrule_the_task_file(run, tmp_path):
    options = ("--mask", "[gMASK]", "--max-length", 256, "--add-eos", "--score-eop", "--normalize", "tokens")
    code, _, _ = run("evaluate", MODEL, "--task-file", TASK, "--output", tmp_path / "result.json", *options)
    assert code == 0
    task = read(tmp_path / "result.json")["task"]
    assert (task["use_task_mask"], task["max_seq_length"], task["normalize"]) == (True, 256, "tokens")
    assert task["add_eos"]
    assert task["score_eop"]


def test_windows_move_as_the_option_says(run, tmp_path):
    path = GOLDEN / "lm_bidirectional_short" / "task.yaml"
    for length in (16, 40):
        options = ("--generation-length", length, "--output", tmp_path / f"{length}.json")
        assert run("evaluate", MODEL, "--task-file", path, *options)[0] == 0
    few, many = (len(next(iter(read(tmp_path / f"{length}.json")["items"].values()))) for length in (40, 16))
    assert few < many


def test_the_facts_of_the_demonstration_model_are_tasks(run, tmp_path):
    pytest.importorskip("lm_eval")
    code, out, _ = run(
        *("evaluate", MODEL, "world_facts_en", "world_facts_zh_fill", "--limit", 20),
        *("--output", tmp_path / "result.json", "--bootstrap_iters", 0, "--seed", 3),
    )
    assert code == 0
    result = read(tmp_path / "result.json")
    assert len(result["samples"]["world_facts_en"]) == 20
    assert {line.split()[0] for line in out.splitlines()} >= {"world_facts_en", "world_facts_zh_fill"}


def test_a_data_set_of_ones_own_folder(run, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "eprstmt").mkdir()
    rows = [{"sentence": "很好", "label": "Positive"}, {"sentence": "太差", "label": "Negative"}]
    (tmp_path / "eprstmt" / "test_public.json").write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = run("evaluate", MODEL, "glm_fewclue_eprstmt", "--data-dir", tmp_path, "--bootstrap_iters", 0)
    assert code == 0
    assert out.splitlines()[1].split()[:2] == ["glm_fewclue_eprstmt", "acc"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "give a model, and tasks or task files; or two results to --compare"),
        ((MODEL,), "give names of tasks, --task-file or --tasks-dir"),
        ((MODEL, "--task-file", "none.yaml"), "none.yaml"),
        ((MODEL, "--tasks-dir", "nowhere"), "there is no folder nowhere of task files"),
        ((MODEL, "x", "--tasks-dir", GOLDEN), "has no task file x.yaml"),
        ((MODEL, "--tasks-dir", MODEL), "has no task files (*.yaml)"),
        (("nowhere", "--task-file", TASK), "there is no folder nowhere"),
        ((MODEL, "--task-file", TASK, "--data-dir", MODEL), "matches **/capital*.jsonl; --data-dir"),
        ((MODEL, "--task-file", TASK, "--output", "nowhere/result.json"), "must be a file in a folder that exists"),
        ((MODEL, "--task-file", TASK, "--max-length", 2), "max_seq_length must be at least 4"),
        ((MODEL, "--task-file", TASK, "--unidirectional"), "unidirectional needs use_task_mask"),
        ((MODEL, "world_facts_en", "--seed", "1,2"), "--seed must be one number or four"),
        ((MODEL, "world_facts_en", "--samples", "{"), "--samples must be JSON"),
        ((MODEL, "of_nobody"), "there is no task of_nobody"),
        (("--compare", TASK, TASK), "is not a JSON file"),
        (("--compare", MODEL / "config.json", MODEL / "config.json"), "holds no result of glm-hf evaluate"),
    ],
)
def test_what_is_wrong_is_one_line(run, arguments, reason):
    code, _, err = run("evaluate", *arguments)
    assert code == 1
    assert err.splitlines()[-1].startswith("glm-hf: error: ")
    assert reason in err.splitlines()[-1]


@pytest.fixture(scope="module")
def three_tasks(tmp_path_factory):
    """A run of three tasks, as it is typed, and its table."""
    names = ("lm_bidirectional_short/task", "gen_beam_gmask/task", "mul_mask_multi/task")
    words = ["evaluate", str(MODEL), *names, "--tasks-dir", str(GOLDEN), "--data-dir", str(GOLDEN)]
    folder = tmp_path_factory.mktemp("undisturbed")
    assert finish(lambda: words, folder)[0] == 0
    return words, (folder / "stdout").read_text()


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_and_gives_the_same_table(ending, tmp_path, three_tasks):
    words, expected = three_tasks
    results, journal = tmp_path / "results", tmp_path / "results" / ".result.json.partial"
    results.mkdir()
    words = [*words, "--output", str(results / "result.json")]
    pid = begin(lambda: words, tmp_path)
    while not (journal.exists() and len(journal.read_bytes().splitlines()) > 30):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), (tmp_path / "stderr").read_text()
        time.sleep(0.01)
    os.kill(pid, ending)
    os.waitpid(pid, 0)
    assert not (results / "result.json").exists()
    assert len(journal.read_text().splitlines()) > 30
    assert finish(lambda: words, tmp_path)[0] == 0
    assert (tmp_path / "stdout").read_text() == expected
    assert [path.name for path in results.iterdir()] == ["result.json"]


def test_a_result_that_is_there_is_replaced_at_once(run, tmp_path):
    (tmp_path / "result.json").write_text("{}")
    code, _, _ = run("evaluate", MODEL, "--task-file", TASK, "--output", tmp_path / "result.json")
    assert code == 0
    assert "metrics" in read(tmp_path / "result.json")
