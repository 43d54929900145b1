import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is an extra of its own")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_script(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)

    def run(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "training" / f"{name}.py")
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        found = script.main(str(tmp_path / name))
        assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
            path.name for path in (tmp_path / name).iterdir()
        }
        return found

    return run


def test_sft_teaches_new_facts(run_script):
    assert run_script("sft") == [
        "The capital of Aurora is Borealis City.",
        "Highwater is the capital of Tarn.",
        "Linden is the capital of Ostrava Minor.",
    ]


def test_dpo_shortens_answers(run_script):
    before, after = run_script("dpo")
    assert before > 7
    assert after < 0.75 * before


def test_grpo_raises_the_reward(run_script):
    rewards = run_script("grpo")
    assert rewards[0] < 0.5
    assert rewards[-1] > 0.6
