"""The harness' model against the original's files, and the tasks that come with the package."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")
import datasets  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from glm_hf.evaluation.evaluate import TASKS, harness_tasks  # noqa: E402
from glm_hf.evaluation.evaluator import Evaluator  # noqa: E402
from glm_hf.evaluation.harness import GLMHarness  # noqa: E402
from glm_hf.evaluation.original.runs import run_task  # noqa: E402

CHOICES = ["mul_mask_multi", "mul_mask_single", "mul_gmask_multi", "ethos_fewshot", "crows_pairs"]
ANSWERS = ["gen_greedy_mask", "gen_greedy_gmask", "gen_greedy_gmask_uni", "gen_beam_mask", "lambada"]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(items):
    """What the harness would ask about each choice of each item."""
    return [
        SimpleNamespace(args=(item["inputs_pretokenized"], f" {choice}"), doc_id=number, task_name="t")
        for number, item in enumerate(items)
        for choice in item["choices_pretokenized"]
    ]


def plain(items):
    """Items that are given as text, with one mask or none."""
    return [
        (number, item)
        for number, item in enumerate(items)
        if "inputs_pretokenized" in item
        and not {"inputs", "choices", "targets"} & item.keys()
        and item["inputs_pretokenized"].count("[MASK]") <= 1
        and item["inputs_pretokenized"].count("[gMASK]") == 0
    ]


@pytest.mark.parametrize(
    "name", ["mul_mask_multi", "mul_mask_single", "mul_gmask_multi", "ethos_fewshot", "crows_pairs"]
)
def test_choices_score_as_in_the_originals_files(name, evaluator, golden):
    expected = run_task(golden / name / "task.yaml", evaluator)
    task, (items,) = expected["task"], expected["items"].values()
    mask = "[gMASK]" if task["use_task_mask"] else "[MASK]"
    model = GLMHarness(evaluator=evaluator, mask=mask, max_length=task["max_seq_length"])
    chosen = [
        (number, item)
        for number, item in plain(read(golden / name / "data.jsonl"))
        if mask == "[MASK]" or "[MASK]" not in item["inputs_pretokenized"]
    ]
    found = model.loglikelihood(asked([item for _, item in chosen]), disable_tqdm=True)
    expected_scores = [score for number, _ in chosen for score in items[number]["log_probs"]]
    assert len(expected_scores) > 30
    assert [float(score) for score, _ in found] == pytest.approx(expected_scores, abs=2e-4)


@pytest.mark.parametrize(
    "name", ["gen_greedy_mask", "gen_greedy_gmask", "gen_greedy_gmask_uni", "gen_beam_mask", "lambada"]
)
def test_answers_are_those_of_the_originals_files(name, evaluator, golden):
    expected = run_task(golden / name / "task.yaml", evaluator)
    task = expected["task"]
    (file, items), *_ = expected["items"].items()
    mask = "[gMASK]" if task["use_task_mask"] else "[MASK]"
    settings = {"until": [], "max_gen_toks": task["max_gen_length"], "do_sample": False}
    if task["sampling_strategy"] == "BeamSearchStrategy":
        names = ("num_beams", "length_penalty", "no_repeat_ngram_size", "min_gen_length")
        settings |= {name: task[name] for name in names}
    if name == "lambada":
        settings["answer_rule"] = "lambada"
    model = GLMHarness(
        evaluator=evaluator, mask=mask, unidirectional=task["unidirectional"], max_length=task["max_seq_length"]
    )
    chosen = [
        (number, item)
        for number, item in plain(read(golden / name / file))
        if mask == "[MASK]" or "[MASK]" not in item["inputs_pretokenized"]
    ]
    requests = [SimpleNamespace(args=(item["inputs_pretokenized"], settings)) for _, item in chosen]
    found = model.generate_until(requests, disable_tqdm=True)
    expected_texts = [evaluator.decode(items[number]["generated"]) for number, _ in chosen]
    assert len(expected_texts) > 20
    assert found == expected_texts


@pytest.mark.parametrize("name", ["lm_bidirectional", "lm_unidirectional_short", "lm_mask"])
def test_texts_have_the_losses_of_the_originals_files(name, evaluator, golden):
    expected = run_task(golden / name / "task.yaml", evaluator)
    task = expected["task"]
    model = GLMHarness(
        evaluator=evaluator,
        mask="[gMASK]" if task["use_task_mask"] else "[MASK]",
        unidirectional=task["unidirectional"],
        max_length=task["max_seq_length"],
        generation_length=task["generation_length"],
    )
    for file, windows in expected["items"].items():
        text = (golden / name / file).read_text()
        (found,) = model.loglikelihood_rolling([SimpleNamespace(args=(text,))], disable_tqdm=True)
        assert found == pytest.approx(-sum(window["loss"] for window in windows), rel=1e-6)


def test_the_class_that_reads_from_left_to_right_is_refused(golden):
    arguments = {"pretrained": str(golden / "model"), "device": "cpu"}
    with pytest.raises(RuntimeError, match="reads GLM from left to right"):
        get_model("hf")(**arguments)


def test_a_model_in_hand_is_refused_by_that_class_too(loaded):
    model, tokenizer = loaded
    with pytest.raises(RuntimeError, match="reads GLM from left to right"):
        get_model("hf")(pretrained=model, tokenizer=tokenizer)


def test_the_model_is_known_by_name(golden):
    model = get_model("glm").create_from_arg_string(f"pretrained={golden / 'model'},dtype=float32,batch_size=4")
    assert model.batch_size == 4
    assert model.evaluator.scorer.model.dtype == torch.float32
    ((score, _),) = model.loglikelihood(asked([{"inputs_pretokenized": "a [MASK]", "choices_pretokenized": ["b"]}]))
    assert math.isfinite(score)


def test_answers_end_at_stop_strings(evaluator):
    model = GLMHarness(evaluator=evaluator)
    text = "The capital of France is"
    whole, stopped, other = model.generate_until(
        [SimpleNamespace(args=(text, {"until": until, "max_gen_toks": 8})) for until in ([], ["ris"], ["zzz", "a"])],
        disable_tqdm=True,
    )
    assert whole.startswith("Paris")
    assert (stopped, other) == ("Pa", "P")


def test_sampled_answers_are_the_same_each_time(evaluator):
    settings = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 3.0, "top_k": 50}
    requests = [SimpleNamespace(args=("The currency of Japan is", settings))]
    found = {tuple(GLMHarness(evaluator=evaluator).generate_until(requests, disable_tqdm=True)) for _ in range(3)}
    assert len(found) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"mask": "MASK"}, "mask must be"),
        ({"normalize": "words"}, "normalize must be"),
        ({"pretrained": None, "evaluator": None}, "pretrained must name a model"),
    ],
)
def test_wrong_arguments_are_refused(arguments, reason, evaluator):
    with pytest.raises(ValueError, match=reason):
        GLMHarness(**{"evaluator": evaluator, **arguments})


def test_chats_end_in_their_blank(evaluator):
    model = GLMHarness(evaluator=evaluator)
    chat = model.apply_chat_template([{"role": "user", "content": "The capital of France is"}])
    assert chat.endswith("[gMASK]<|startofpiece|>")
    settings = {"until": [], "max_gen_toks": 8}
    requests = [SimpleNamespace(args=(text, settings)) for text in (chat, "The capital of France is")]
    of_chat, of_text = model.generate_until(requests, disable_tqdm=True)
    assert of_chat == of_text
    with pytest.raises(ValueError, match="holds the start-of-blank token"):
        model.generate_until([SimpleNamespace(args=(f"{chat}Paris", settings))], disable_tqdm=True)


def test_texts_with_several_masks_are_refused(evaluator):
    request = asked([{"inputs_pretokenized": "a [MASK] b [MASK]", "choices_pretokenized": ["c"]}])
    with pytest.raises(ValueError, match=r"holds 2 times \[MASK\]"):
        GLMHarness(evaluator=evaluator).loglikelihood(request, disable_tqdm=True)


def test_unknown_settings_of_answers_are_refused(evaluator):
    request = SimpleNamespace(args=("a", {"until": [], "typical_p": 0.5}))
    with pytest.raises(ValueError, match="typical_p is not supported"):
        GLMHarness(evaluator=evaluator).generate_until([request], disable_tqdm=True)


def test_the_blank_that_joins_a_continuation_is_no_part_of_it(evaluator, monkeypatch):
    seen, tokenize = [], evaluator.tokenize
    monkeypatch.setattr(evaluator, "tokenize", lambda text: seen.append(text) or tokenize(text))
    requests = asked([{"inputs_pretokenized": "It is [MASK].", "choices_pretokenized": ["a", "b c"]}])
    GLMHarness(evaluator=evaluator).loglikelihood(requests, disable_tqdm=True)
    assert sorted(seen) == ["It is [MASK].", "a", "b c"]


def test_means_of_tokens_if_asked_for(evaluator):
    requests = asked([{"inputs_pretokenized": "It is [MASK].", "choices_pretokenized": ["a", "the city of Paris"]}])
    sums = GLMHarness(evaluator=evaluator).loglikelihood(requests, disable_tqdm=True)
    means = GLMHarness(evaluator=evaluator, normalize="tokens").loglikelihood(requests, disable_tqdm=True)
    for (total, _), (mean, _) in zip(sums, means, strict=True):
        assert mean == pytest.approx(total / total.num_tokens)
    assert sums[1][0].num_tokens > 1


# What the public data sets hold, as far as the tasks look at it.
STORY = {
    "premise": "A cat sat.",
    "hypothesis": "A cat stood.",
    "sentence1": "猫坐着。",
    "sentence2": "猫站着。",
    "label": 1,
}
STEREOSET = {
    "context": "The BLANK is red.",
    "bias_type": "colour",
    "sentences": {
        "sentence": ["The rose is red.", "The sky is red.", "The two is red."],
        "gold_label": [1, 0, 2],
    },
}
NONE = dict.fromkeys(("gender", "national_origin", "disability", "religion", "sexual_orientation"), 0.0)
ROWS = {
    "nyu-mll/glue": {**STORY, "sentence": "It rains.", "question": "Does it rain?"},
    "regisss/math_qa": {"Problem": "1 + 1?", "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5", "correct": "b"},
    "CogComp/mc_taco": {"sentence": "It rains.", "question": "How long?", "answer": "an hour", "label": 1},
    "allenai/openbookqa": {
        "question_stem": "Ice is",
        "choices": {"text": ["cold", "hot"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "qiaojin/PubMedQA": {"context": {"contexts": ["Ice is cold."]}, "question": "Is it?", "final_decision": "yes"},
    "aps/super_glue": STORY,
    "clue/clue": {
        **STORY,
        "text": "猫坐着，它在睡觉。",
        "target": {"span1_text": "猫", "span2_text": "它"},
        "abst": "猫",
        "keyword": ["猫", "狗"],
        "context": "猫坐着。",
        "question": "谁坐着？",
        "choice": ["猫", "狗"],
        "answer": "猫",
        "answers": {"text": ["猫"]},
    },
    "iamollas/ethos": {"text": "A text.", "label": 0, **NONE, "race": 0.9},
    "nyu-mll/crows_pairs": {"sent_more": "A cat.", "sent_less": "A dog.", "stereo_antistereo": 0, "bias_type": 1},
    "McGill-NLP/stereoset": STEREOSET,
    "EleutherAI/lambada_openai": {"text": "The capital of France is Paris"},
    "EleutherAI/wikitext_document_level": {"page": "The capital of France is Paris."},
    "ptb-text-only/ptb_text_only": {"sentence": "the capital of france"},
    "monology/pile-uncopyrighted": {"text": "The capital of France is Paris."},
    "cais/mmlu": {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "high_school_maths"},
}
FEWCLUE = {
    "bustm": {"sentence1": "猫", "sentence2": "狗", "label": "0"},
    "chid": {"content": "他#idiom#地走了。", "candidates": ["高兴", "快乐"], "answer": 1},
    "cluewsc": {"text": "猫，它", "target": {"span1_text": "猫", "span2_text": "它"}, "label": "true"},
    "csl": {"abst": "猫", "keyword": ["猫"], "label": "1"},
    "eprstmt": {"sentence": "很好", "label": "Positive"},
    "ocnli": {"sentence1": "猫", "sentence2": "狗", "label": "neutral"},
}
OURS = sorted(path.stem for path in TASKS.rglob("glm_*.yaml") if "group:" not in path.read_text())


@pytest.fixture(scope="module")
def results(loaded, tmp_path_factory):
    """What the harness finds of all tasks of the package, with data sets of one kind of row in place of the public."""
    folder = tmp_path_factory.mktemp("fewclue")

    def load_dataset(path, name=None, **_):
        row = ROWS[path]
        if name == "c3":
            row = {**row, "context": [row["context"]]}
        if name == "intersentence":
            row = {**row, "context": "The rose."}
        rows = datasets.Dataset.from_list([{**row, "number": number} for number in range(12)])
        return datasets.DatasetDict(dict.fromkeys(("train", "dev", "validation", "validation_matched", "test"), rows))

    for name, row in FEWCLUE.items():
        (folder / name).mkdir()
        (folder / name / "test_public.json").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_dataset)
        manager = harness_tasks(OURS, {"metadata": {"data_dir": str(folder)}})
        model = GLMHarness(evaluator=Evaluator(*loaded))
        return lm_eval.simple_evaluate(model=model, tasks=OURS, task_manager=manager, limit=2, bootstrap_iters=0)


@pytest.mark.parametrize("name", OURS)
def test_a_task_of_the_package_runs(name, results):
    metrics = {key: value for key, value in results["results"][name].items() if key.endswith(",none")}
    assert metrics
    assert all(math.isfinite(value) for key, value in metrics.items() if "stderr" not in key)
    assert results["samples"][name]
    for sample in results["samples"][name]:
        texts = [str(argument) for arguments in sample["arguments"] for argument in arguments]
        assert not any(mark in text for text in texts for mark in ("{{", "}}", "#idiom#", "BLANK"))


def test_the_originals_37_tasks_are_there():
    kept = [name for name in OURS if name not in ("glm_stereoset_intersentence", "glm_stereoset_intrasentence")]
    assert len(kept) + 1 == 37
    names = TaskManager(include_path=str(TASKS), include_defaults=False).all_groups
    assert {"glm_bloom", "glm_clue", "glm_fewclue", "glm_ethos", "glm_stereoset", "glm_paper", "world_facts"} <= set(
        names
    )


def test_every_task_names_its_data():
    for path in TASKS.rglob("glm_*.yaml"):
        text = path.read_text()
        if "group:" not in text:
            assert "Data: " in text.splitlines()[0], path


def test_missing_data_are_one_line(monkeypatch):
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nas there is no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="the data of piqa cannot be had"):  # a task of the harness itself
        harness_tasks(["piqa"], {})
    with pytest.raises(ValueError, match=r"cannot be had: give the folder datasets"):
        harness_tasks(["glm_fewclue_csl"], {})
    with pytest.raises(ValueError, match="the data of glm_glue_cola cannot be had: ") as caught:
        harness_tasks(["glm_glue_cola"], {})
    assert "\n" not in str(caught.value)


def test_a_folder_of_tasks_is_read_before_those_of_the_package(tmp_path):
    """A name of the package's own stands for what the folder has."""
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "a", "answer": "b"}) + "\n")
    (tmp_path / "mine.yaml").write_text(
        f"task: {OURS[0]}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    manager = harness_tasks(OURS[:1], {"include_path": str(tmp_path)})
    [task] = manager.kept["tasks"].values()
    assert [task.doc_to_text(doc) for doc in task.test_docs()] == ["a"]
