"""What the command imports before it is needed, and what the package gives without importing it at once."""

import os
import subprocess
import sys

import pytest

import glm_hf

HEAVY = {"torch", "transformers", "numpy", "safetensors", "accelerate"}
PLAN = ("plan", "--preset", "130b", "--devices", "24GiB*8", "--bits", "4")


def imported_by(*words: str) -> tuple[int, set[str]]:
    """Run the command in a process of its own; return its exit code and all modules that it imported."""
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules, sep='\\n', file=sys.stderr))"
    code += "; sys.argv[0] = 'glm-hf'; from glm_hf.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    return done.returncode, set(done.stderr.splitlines())


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [(["--help"], 0), (["--version"], 0), (["fill", "--help"], 0), (["fill", "--nonsense"], 2), ([], 2)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_help_and_wrong_usage_import_nothing_heavy(words, exit_code):
    code, modules = imported_by(*words)
    assert code == exit_code
    assert not HEAVY & modules


def test_a_plan_imports_no_model():
    code, modules = imported_by(*PLAN)
    assert code == 0
    assert {"torch", "glm_hf.configuration_glm"} <= modules
    for unneeded in ("glm_hf.modeling_glm", "transformers.generation.utils", "transformers.pipelines", "accelerate"):
        assert unneeded not in modules


@pytest.mark.parametrize("program", ["glm_hf.cli", "script"])
def test_only_the_command_puts_the_registration_off(program, tmp_path):
    script = "import sys, glm_hf; print('glm_hf.modeling_glm' in sys.modules, file=sys.stderr)"
    (tmp_path / "script.py").write_text(script)
    words = {"glm_hf.cli": ["-m", "glm_hf.cli", "--version"], "script": [tmp_path / "script.py"]}[program]
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    assert ("glm_hf.modeling_glm" in done.stderr) == (program == "script")


def test_public_names_are_listed_and_others_refused():
    assert set(glm_hf.__all__) <= set(dir(glm_hf))
    assert glm_hf.training.GLMTrainer.__module__ == "glm_hf.training.trainer"
    with pytest.raises(AttributeError, match="no attribute 'GLMNothing'"):
        _ = glm_hf.GLMNothing
