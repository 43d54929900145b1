"""The rules that hold the house together: who imports whom, how large files grow, and what a wheel contains."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"glm_hf": "src/glm_hf", "conversion": "conversion", "training": "training", "quantization": "quantization"}
FILES = {room: sorted((ROOT / folder).glob("*.py")) for room, folder in ROOMS.items()}
# What each room may import of ours. `glm_hf` stands for the files of the model, `facade` for its __init__ and command.
ARROWS = {
    "glm_hf": set(),
    "facade": {"glm_hf", "quantization", "conversion", "training"},
    "quantization": set(),
    "conversion": {"glm_hf", "quantization.functional"},
    "training": {"glm_hf", "conversion.shard_rules"},
}
# Files of what cannot be defined without an optional package; they are imported where they are used.
DEFERRED = {
    "kernels_triton.py": "glm_hf.quantization.kernels_triton",
    "pipeline_model.py": "glm_hf.training.pipeline.model",
}
OPTIONAL = {"triton", "deepspeed", "peft", "lm_eval", "datasets", "sentencepiece", "matplotlib", "trl"}


def imports_of(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def all_files() -> list:
    return [pytest.param(room, path, id=f"{room}/{path.name}") for room, paths in FILES.items() for path in paths]


@pytest.mark.parametrize(("room", "path"), all_files())
def test_arrows_point_downwards(room, path):
    is_facade = path.name in ("__init__.py", "cli.py", "cli_training.py") and room == "glm_hf"
    allowed = ARROWS["facade" if is_facade else room]
    for name in imports_of(path):
        if not name.startswith("glm_hf"):
            continue
        assert room != "glm_hf" or is_facade, f"{path.name} must import its neighbours by `from .x import y`: {name}"
        target = name.removeprefix("glm_hf").removeprefix(".")
        target_room = target.split(".")[0] if target.split(".")[0] in ROOMS else "glm_hf"
        assert target_room == room or target_room in allowed or target in allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize(
    "path", [path for path in FILES["glm_hf"] if path.name.endswith("_glm.py")], ids=lambda p: p.name
)
def test_model_files_are_flat(path):
    for name in imports_of(path):
        level = len(name) - len(name.lstrip("."))
        assert level <= 1, name
        assert not level or "." not in name[1:], name


@pytest.mark.parametrize(("room", "path"), all_files())
def test_optional_packages_are_imported_where_they_are_used(room, path):
    if path.name in DEFERRED:
        return
    assert not OPTIONAL & {name.split(".")[0] for name in imports_of(path, top_level_only=True)}


@pytest.mark.parametrize(("room", "path"), all_files())
def test_files_keep_to_one_subject(room, path):
    limit = 600 if path.name == "modeling_glm.py" else 400
    assert len(path.read_text().splitlines()) <= limit


@pytest.mark.parametrize("path", FILES["quantization"] + FILES["training"], ids=lambda path: path.name)
def test_files_of_optional_packages_are_imported_where_they_are_used(path):
    if path.name not in ("stage_weights.py", "stage_folder.py"):  # of the pipeline, and deferred as it is
        assert not set(DEFERRED.values()) & imports_of(path, top_level_only=True)


def test_import_needs_no_optional_package():
    rooms = "glm_hf, glm_hf.conversion, glm_hf.training"
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(OPTIONAL)!r})); import {rooms}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


PUBLIC = {
    "glm_hf": [
        "BlankInfillingPipeline", "GLMConfig", "GLMForBlankInfilling", "GLMForMaskedLM", "GLMModel", "GLMTokenizer",
    ],
    "glm_hf.conversion": [
        "convert_sat_checkpoint", "export_sat_checkpoint", "reshard_sat_checkpoint", "verify_checkpoint",
    ],
    "glm_hf.quantization": [
        "GLMQuantizationConfig", "QuantizedLinear", "dequantize_weight", "pack_int4", "quantize_weight",
        "quantized_linear", "unpack_int4",
    ],
    "glm_hf.training": [
        "DataCollatorForBlankInfilling", "GLM3DTrainer", "GLMTrainer", "GLMTrainingArguments",
        "shrink_embedding_gradient", "to_conversation",
    ],
}  # fmt: skip


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_there(module):
    names = importlib.import_module(module).__all__
    assert set(PUBLIC[module]) <= set(names)


WORLD_FACTS = {
    "LICENSE", "__init__.py", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


@pytest.mark.parametrize("has_compiler", [True, False])
def test_wheel_contains_every_room_and_nothing_else(tmp_path, has_compiler):
    if has_compiler and not shutil.which("cc"):
        pytest.skip("no C compiler here")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    sources = [name for name in listed.split("\0") if name and not name.startswith("tests/")]
    if not sources:
        pytest.skip("not a git checkout, whose files would be the sources")
    for name in sources:
        if (ROOT / name).is_file():
            target = tmp_path / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "."]
    environment = dict(os.environ) if has_compiler else os.environ | {"CC": "no-such-compiler"}
    subprocess.run([*command, "--wheel-dir", tmp_path / "wheel"], cwd=tmp_path / "source", check=True, env=environment)
    [wheel] = (tmp_path / "wheel").glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"glm_hf/py.typed"}
    if has_compiler:
        expected.add("glm_hf/quantization/_kernels_cpu.abi3.so")
        assert "-cp311-abi3-" in wheel.name
    for room, folder in ROOMS.items():
        package = "glm_hf" if room == "glm_hf" else f"glm_hf/{room}"
        tracked = [Path(name) for name in sources if Path(name).parent == Path(folder) and name.endswith(".py")]
        expected |= {f"{package}/{path.name}" for path in tracked}
    expected |= {f"glm_hf/world_facts/{name}" for name in WORLD_FACTS}
    assert sum((ROOT / "examples/world_facts/model" / name).stat().st_size for name in WORLD_FACTS) <= 8_000_000
    assert names == expected
