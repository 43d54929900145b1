"""`glm-hf tokenize` makes the folder that `glm-hf train` takes."""

import json

import pytest

from glm_hf.training.data.token_file import open_token_file


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"content": text}) + "\n" for text in ("the people", "the time", "")))
    return file


def test_tokenize_prints_the_folder_which_train_may_open(run, model_folder, text_file, tmp_path):
    arguments = ("tokenize", text_file, tmp_path / "out", "--tokenizer", model_folder, "--text-field", "content")
    assert run(*arguments) == (0, f"{tmp_path / 'out'}\n", "")
    assert open_token_file(tmp_path / "out").num_documents == 2
    code, out, err = run("verify", tmp_path / "out")
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "MODEL"], "must have a field 'text', or 'inputs' and 'targets', got 'content'"),
        (["--tokenizer", "nowhere"], "there is no folder nowhere, and it is not a Hub name"),
        (["--tokenizer", "MODEL", "--text-field", "content", "--num-proc", "0"], None),
        (["--text-field", "content"], None),
    ],
)
def test_mistakes_are_one_sentence_and_wrong_usage_is_code_2(
    run, model_folder, text_file, tmp_path, arguments, message
):
    words = [str(model_folder) if word == "MODEL" else word for word in arguments]
    if message is None:
        with pytest.raises(SystemExit, match="2"):
            run("tokenize", text_file, tmp_path / "out", *words)
        return
    code, out, err = run("tokenize", text_file, tmp_path / "out", *words)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert message in err
    assert not (tmp_path / "out").exists()
