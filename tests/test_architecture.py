"""The rules that hold the house together: who imports whom, how large files grow, and what a wheel contains."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "glm_hf"
# The rooms from top to bottom: a room imports itself and what lies below it, nothing beside it or above.
ORDER = (
    ("cli",),
    ("glm_hf",),  # the package's own __init__
    ("serving", "planning", "evaluation", "onnx"),
    ("training",),
    ("conversion",),
    ("quantization",),
    ("hub", "pipelines"),
    ("decoding",),
    ("folders", "sharding"),
    ("model", "deprecated"),
)
MOST_FILES = 13  # about a dozen
MOST_LINES = 400
LONGEST = {"modeling_glm.py": 600}
# Files of what cannot be defined without an optional package; they are imported where they are used.
DEFERRED = {
    "glm_hf.quantization.kernels_triton",
    "glm_hf.quantization.kernels_triton_attention",
    "glm_hf.quantization.kernels_triton_step",
    "glm_hf.training.pipeline.fp32_gradients",
    "glm_hf.training.pipeline.model",
    *(f"glm_hf.serving.{name}" for name in ("app", "chat", "completions", "guard", "launch", "metrics", "protocol")),
    *(f"glm_hf.serving.{name}" for name in ("service", "text", "worker")),
    "glm_hf.evaluation.harness",
    "glm_hf.onnx.graph",
    "glm_hf.onnx.weights",
    *(f"glm_hf.evaluation.tasks.{name}" for name in ("fewclue.docs", "language.docs", "world_facts.data")),
}
# What the package's own __init__ has for all rooms.
OF_THE_PACKAGE = {"glm_hf.__version__", "glm_hf.lazy_names"}
OPTIONAL = {
    *("triton", "deepspeed", "peft", "lm_eval", "datasets", "sentencepiece", "matplotlib", "trl"),
    *("onnx", "onnxruntime", "optimum"),
    *("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client", "openai"),
}


def find_modules() -> dict[str, Path]:
    """Return all files of the package by the names they are imported by, through the links to the other rooms."""
    found = {}
    for folder, _, names in os.walk(PACKAGE, followlinks=True):
        for path in (Path(folder) / name for name in names if name.endswith(".py")):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return dict(sorted(found.items()))


MODULES = find_modules()
all_modules = pytest.mark.parametrize("module", MODULES)


def travels(module: str) -> bool:
    """Tell whether a file is one of those that `export-hub` puts beside the weights."""
    return module.count(".") == 1 and module.endswith("_glm")


def room_of(module: str) -> str:
    """Return the room of a file: "model" for what travels, "glm_hf" for the package's own __init__."""
    return "model" if travels(module) else module.split(".")[min(1, module.count("."))]


def level_of(module: str) -> int:
    return next(level for level, rooms in enumerate(ORDER) if room_of(module) in rooms)


def statements_of(node: ast.AST, top_level_only: bool) -> Iterator[ast.AST]:
    """Yield the nodes of a file, without those for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from () if top_level_only else statements_of(child, top_level_only)


@cache
def imports_of(module: str, top_level_only: bool = False) -> set[str]:
    """Return what a file imports, by absolute names: of ours the modules, of other packages their names."""
    found = set()
    for node in statements_of(ast.parse(MODULES[module].read_text()), top_level_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = f"glm_hf.{node.module}" if node.level else node.module or ""
            names = {f"{source}.{alias.name}" for alias in node.names} - OF_THE_PACKAGE
            found |= {name if name in MODULES else source for name in names}
    return found


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "glm_hf"}


@all_modules
def test_arrows_point_downwards(module):
    for name in ours(imports_of(module)):
        assert name in MODULES, name
        same_room = room_of(name) == room_of(module)
        assert same_room or level_of(name) > level_of(module), f"{module} imports {name}"


@all_modules
def test_nothing_inside_imports_the_package_itself(module):
    if room_of(module) not in ("glm_hf", "cli"):
        assert "glm_hf" not in imports_of(module)


def test_imports_go_in_no_circle():
    waiting = {module: ours(imports_of(module)) - {module} for module in MODULES if module != "glm_hf"}
    while leaves := [module for module, names in waiting.items() if not names & set(waiting)]:
        for module in leaves:
            del waiting[module]
    assert not waiting, f"circles among {sorted(waiting)}"


@pytest.mark.parametrize("module", filter(travels, MODULES))
def test_files_that_travel_are_flat(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("glm_hf")):
            assert node.level == 1, f"{module} must import its neighbours by `from .x import y`"
            assert "." not in (node.module or "")


@all_modules
def test_only_files_that_travel_are_named_so(module):
    assert travels(module) or not module.endswith("_glm")


@all_modules
def test_optional_packages_are_imported_where_they_are_used(module):
    if module not in DEFERRED:
        assert not OPTIONAL & {name.split(".")[0] for name in imports_of(module, top_level_only=True)}


@all_modules
def test_files_of_optional_packages_are_imported_where_they_are_used(module):
    if module != "glm_hf.training.pipeline.weights" and module not in DEFERRED:  # deferred as they are
        assert not DEFERRED & imports_of(module, top_level_only=True)


@all_modules
def test_files_keep_to_one_subject(module):
    path = MODULES[module]
    assert len(path.read_text().splitlines()) <= LONGEST.get(path.name, MOST_LINES)


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES.values()}), ids=lambda path: path.name)
def test_folders_can_be_seen_at_a_glance(folder):
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MOST_FILES


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
    "LICENSE", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


COMPILED = ("quantization/_kernels_cpu", "training/data/_native")


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
        elif (ROOT / name).is_symlink():
            target = tmp_path / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to((ROOT / name).readlink())
    setup = tmp_path / "source" / "setup.py"
    setup.write_text(setup.read_text().replace("-O3", "-O0"))  # the compiler takes most of its time for speed
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "."]
    environment = dict(os.environ) if has_compiler else os.environ | {"CC": "no-such-compiler"}
    subprocess.run([*command, "--wheel-dir", tmp_path / "wheel"], cwd=tmp_path / "source", check=True, env=environment)
    [wheel] = (tmp_path / "wheel").glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"glm_hf/py.typed"} | {str(path.relative_to(PACKAGE.parent)) for path in MODULES.values()}
    if has_compiler:
        expected |= {f"glm_hf/{name}.abi3.so" for name in COMPILED}
        assert "-cp311-abi3-" in wheel.name
    expected |= {f"glm_hf/world_facts/{name}" for name in WORLD_FACTS}
    expected.add("optimum/commands/register/register_glm.py")
    expected |= {f"glm_hf/serving/page/{name}" for name in ("index.html", "page.css", "page.js")}
    tasks = [path for suffix in ("yaml", "jsonl") for path in (PACKAGE / "evaluation" / "tasks").rglob(f"*.{suffix}")]
    assert len(tasks) > 40
    expected |= {str(path.relative_to(PACKAGE.parent)) for path in tasks}
    assert sum((ROOT / "examples/world_facts/model" / name).stat().st_size for name in WORLD_FACTS) <= 25_000_000
    assert names == expected
