import ast
import builtins
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from corpus import KINDS, generate
from golden import TOLERANCE, golden_arrays, golden_model, read_json
from huggingface_hub import ModelCard
from sentencepiece import SentencePieceTrainer
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import glm_hf
from glm_hf import GLMConfig, GLMForBlankInfilling
from glm_hf.folders.validation import INDEX
from glm_hf.hub import export as hub_glm
from glm_hf.hub.export import export_hub_folder
from glm_hf.hub.model_card import SIZES, model_card
from glm_hf.infilling_glm import prepare_context
from glm_hf.tokenization_glm import GLMTokenizer

CASE = "mask_infill"
FILLED = next(entry for entry in read_json("cfg1", "generation.json")["fill_blanks"] if entry["case"] == "two_masks")
TEXT = "the people [MASK] the day"
HEADS = {
    "AutoModel": "GLMModel",
    "AutoModelForCausalLM": "GLMForBlankInfilling",
    "AutoModelForSeq2SeqLM": "GLMForBlankInfilling",
    "AutoModelForMaskedLM": "GLMForMaskedLM",
}
if hasattr(transformers, "AutoModelForDecision"):
    HEADS["AutoModelForDecision"] = "GLMForBlankInfilling"
COMMIT = "0123456789abcdef" * 2 + "01234567"
REMOTE = Path(__file__).parents[2] / "support" / "load_without_glm_hf.py"
TRAINING_STATE = {"optimizer.pt", "trainer_state.json", "training_args.bin", "notes.txt"}


def train_tokenizer(folder: Path) -> GLMTokenizer:
    """Train a tokenizer with the ids of cfg1: 144 pieces, `</s>` 2, the special tokens from 144 on."""
    SentencePieceTrainer.train(
        sentence_iterator=iter(line.replace("\n", " ") for line in generate(KINDS[:1], 200, seed=0)),
        model_prefix=str(folder / "text"),
        vocab_size=144,
        character_coverage=0.98,
        minloglevel=2,
        num_threads=1,
    )
    return GLMTokenizer.from_sentencepiece(folder / "text.model", num_image_tokens=0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "source"
    golden_model("cfg1").save_pretrained(folder, max_shard_size="300KB")
    train_tokenizer(folder.parent).save_pretrained(folder)
    for name in TRAINING_STATE:
        (folder / name).write_text("private")
    (folder / "MODEL_LICENSE").write_text("terms")
    return folder


@pytest.fixture(scope="module")
def exported(source) -> Path:
    folder = source.parent / "glm-tiny"
    export_hub_folder(source, folder)
    return folder


@pytest.fixture
def broken(source, tmp_path) -> Path:
    """A copy of the source to be damaged by the test."""
    return Path(shutil.copytree(source, tmp_path / "broken"))


def download(folder: Path, repo_id: str, home: Path) -> None:
    """Lay `folder` into the cache of huggingface_hub, as if it had been downloaded from `repo_id`."""
    cache = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    shutil.copytree(folder, cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)


@pytest.fixture(scope="module")
def remote(exported) -> dict:
    """What a process without glm_hf finds in the exported folder."""
    folder = exported.parent
    with_masks = [int(word) if word.isdigit() else 144 for word in FILLED["text"].split()]
    torch.save(
        {"input_ids": golden_arrays("cfg1")[f"{CASE}.input_ids"], "with_masks": [with_masks]}, folder / "inputs.pt"
    )
    download(exported, "me/glm-tiny", folder / "home")
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, str(REMOTE), exported.name, TEXT]
    finished = subprocess.run(
        command, cwd=folder, env=os.environ | settings, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return torch.load(folder / "results.pt") | {"printed": finished.stdout}


def test_every_auto_class_loads_without_glm_hf(remote):
    assert remote["modules"] == []
    names = {auto: name for auto, (_, name) in remote["classes"].items()}
    assert names == {"AutoConfig": "GLMConfig", "AutoTokenizer": "GLMTokenizer", **HEADS}
    assert all(module.startswith("transformers_modules.") for module, _ in remote["classes"].values())


def test_remote_logits_are_those_of_the_original(remote):
    golden = golden_arrays("cfg1")[f"{CASE}.logits"]
    for auto in [auto for auto, head in HEADS.items() if head == "GLMForBlankInfilling"]:
        assert (remote["outputs"][auto] - golden).abs().max() < TOLERANCE


def test_remote_models_compute_what_local_ones_do(remote):
    model = golden_model("cfg1")
    input_ids = golden_arrays("cfg1")[f"{CASE}.input_ids"]
    masked = glm_hf.GLMForMaskedLM(model.config).eval()
    masked.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(remote["outputs"]["AutoModel"], model.model(input_ids)[0])
        torch.testing.assert_close(remote["outputs"]["AutoModelForMaskedLM"], masked(input_ids)[0])
    assert remote["generated"].tolist() == model.generate(input_ids, max_new_tokens=4).tolist()
    assert remote["sequences"] == FILLED["answers"]


def test_remote_tokenizer_and_pipeline_agree_with_local_ones(remote, source):
    tokenizer = GLMTokenizer.from_pretrained(source)
    assert remote["ids"] == tokenizer(TEXT)["input_ids"]
    assert remote["chat"] == [*prepare_context(remote["ids"], golden_model("cfg1").config), 148]
    assert remote["special"] == [144, 148, "left"]
    masked = glm_hf.GLMForMaskedLM.from_pretrained(source).eval()
    with torch.no_grad():
        logits = masked(torch.tensor([remote["ids"]])).logits[0, remote["ids"].index(144)]
    best = logits.softmax(-1).topk(3)
    assert [token for token, _ in remote["fill-mask"]] == best.indices.tolist()
    assert [score for _, score in remote["fill-mask"]] == pytest.approx(best.values.tolist(), rel=1e-4)


def test_remote_code_is_refused_without_trust(remote):
    assert remote["refused"] == [("AutoConfig", True), ("AutoModelForCausalLM", True), ("AutoTokenizer", True)]


def test_a_folder_saved_from_remote_code_loads_again(remote):
    for auto, logits in remote["again"].items():
        torch.testing.assert_close(logits, remote["outputs"][auto])
    assert remote["ids again"] == remote["ids"]


def test_a_downloaded_repository_loads_as_the_folder_does(remote):
    assert remote["classes from Hub"] == f"transformers_modules.me.glm_hyphen_tiny.{COMMIT}.modeling_glm"
    torch.testing.assert_close(remote["from Hub"], remote["outputs"]["AutoModelForCausalLM"])
    assert remote["ids from Hub"] == remote["ids"]


def test_usage_in_the_card_runs(remote):
    answers = ast.literal_eval(remote["printed"])
    assert len(answers) == 1
    assert "[MASK]" not in answers[0]


def test_local_classes_are_used_without_a_prompt(exported, monkeypatch):
    def no_prompt(*_):
        pytest.fail("asked for trust in remote code")

    monkeypatch.setattr(builtins, "input", no_prompt)
    for auto in filter(partial(hasattr, transformers), json.loads((exported / "config.json").read_text())["auto_map"]):
        loaded = getattr(transformers, auto).from_pretrained(exported)
        assert type(loaded) is getattr(glm_hf, HEADS.get(auto, "GLMConfig"))
    assert type(transformers.AutoTokenizer.from_pretrained(exported)) is GLMTokenizer


def test_the_folder_is_flat_and_holds_what_a_model_needs_only(source, exported):
    files = contents(exported)
    code = {
        f"{part}_glm.py"
        for part in (
            "growing_cache",
            "chat",
            "configuration",
            "filling",
            "generation",
            "infilling",
            "masking",
            "modeling",
            "peft",
            "positions",
            "rotary",
            "tokenization",
            "versions",
        )  # fmt: skip
    }
    assert files.keys() == contents(source).keys() - TRAINING_STATE | code | {"README.md"}
    for name in code:
        assert files[name] == Path(glm_hf.__file__).with_name(name).read_bytes()
    for name in contents(source).keys() - TRAINING_STATE - {"config.json", "tokenizer_config.json"}:
        assert files[name] == (source / name).read_bytes()
    assert os.stat(exported).st_mode == os.stat(source).st_mode


def test_configurations_change_by_their_auto_map_only(source, exported):
    for name in ("config.json", "tokenizer_config.json"):
        changed = json.loads((exported / name).read_text())
        del changed["auto_map"]
        assert changed == json.loads((source / name).read_text())


def test_shipped_code_imports_its_neighbours_and_the_listed_packages_only(exported):
    [requirements] = re.findall(r"pip install (.*)", (exported / "README.md").read_text())
    installed = {re.split("[<>=]", word)[0] for word in requirements.replace('"', "").split()}
    allowed = sys.stdlib_module_names | installed | {"huggingface_hub", "tokenizers"}  # which transformers needs
    files = {path.stem: path for path in exported.glob("*.py")}
    graph = {}
    for name, path in files.items():
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert set(get_imports(path)) <= allowed, name  # those in a try block may be missing
        graph[name] = {node.module for node in imports if node.level == 1}
        assert all(node.level <= 1 for node in imports), name
        assert set(get_relative_imports(path)) == graph[name], name  # its pattern also matches docstrings
    assert set(itertools.chain(*graph.values())) <= files.keys()


def test_the_card_states_the_size_of_this_model(source, exported):
    card = ModelCard.load(exported / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "license": "unknown",
        "pipeline_tag": "fill-mask",
        "tags": ["glm", "glm130b", "blank-infilling"],
    }
    num_parameters = len(torch.nn.utils.parameters_to_vector(golden_model("cfg1").parameters()))
    assert card.text.strip().startswith("# glm-tiny\n")
    assert f"{num_parameters:,} parameters: 3 layers, hidden size 64,\n4 heads, a vocabulary of 160 " in card.text
    num_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert f"The weights take {num_bytes / 1e9:.3g} GB" in card.text
    assert "are for non-commercial research" not in card.text


def test_the_card_of_a_model_of_the_released_size_has_its_licence():
    card = ModelCard(model_card(GLMConfig().to_dict(), "released", 130 * 10**9, 260 * 10**9))
    assert card.data.license == "other"
    assert card.data.license_name == "glm-130b-license"
    assert card.data.license_link.startswith("https://")
    assert card.data.language == ["en", "zh"]
    assert card.text.strip().startswith("# GLM-130B\n")
    assert "70 layers, hidden size 12288,\n96 heads," in card.text
    assert "non-commercial research" in card.text
    assert "arxiv.org/abs/2210.02414" in card.text


@pytest.mark.parametrize("name", SIZES)
def test_a_model_of_another_size_is_not_called_the_released_one(name):
    config = GLMConfig().to_dict()
    card = ModelCard(model_card(config | {name: config[name] * 2}, "small", 1, 1))
    assert card.data.license == "unknown"
    assert card.text.strip().startswith("# small\n")


def test_weights_are_linked_even_through_symbolic_links(broken, tmp_path):
    snapshot = tmp_path / "models--me--glm" / "snapshots" / "0123abc"  # as in the cache of huggingface_hub
    snapshot.parent.mkdir(parents=True)
    broken.rename(snapshot)
    (snapshot.parent.parent / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        blob = snapshot.parent.parent / "blobs" / str(number)
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, snapshot))
    (tmp_path / "out").mkdir()
    export_hub_folder(snapshot, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert not path.is_symlink()
        assert path.samefile(snapshot / path.name)


@pytest.mark.parametrize("name", ["MODEL_LICENSE", "tokenizer.json", "*.safetensors", "generation_config.json"])
def test_links_to_files_elsewhere_are_refused(broken, tmp_path, name):
    [path, *_] = broken.glob(name)
    path.rename(tmp_path / "private")
    path.symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match=rf"{re.escape(path.name)} is a link to .*private, outside of the folder"):
        export_hub_folder(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "entry", ["../other/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", ".x.safetensors"]
)
def test_an_index_entry_elsewhere_is_refused(broken, tmp_path, entry):
    index = json.loads((broken / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = entry
    (broken / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected names of files beside it"):
        export_hub_folder(broken, tmp_path / "out")


def test_the_same_export_again_is_complete_and_another_is_refused(source, broken, tmp_path, caplog):
    export_hub_folder(source, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    export_hub_folder(source, tmp_path / "out")
    assert "already complete" in caplog.text
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (broken / "MODEL_LICENSE").write_text("changed")
    with pytest.raises(FileExistsError, match="exists already; choose another folder or remove it"):
        export_hub_folder(broken, tmp_path / "out")
    export_hub_folder(broken, tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "out"]


def test_weights_are_copied_with_a_warning_where_links_fail(source, tmp_path, monkeypatch, caplog):
    link, calls = os.link, itertools.count()

    def fail_on_the_second(*args):
        if next(calls):
            raise OSError(18, "Invalid cross-device link")
        link(*args)

    monkeypatch.setattr(os, "link", fail_on_the_second)
    export_hub_folder(source, tmp_path / "out")
    assert [record.getMessage() for record in caplog.records if record.name == "glm_hf.hub.export"] == [
        "cannot hard-link the weights (Invalid cross-device link): copying them"
    ]
    for path in source.glob("*.safetensors"):
        copied = tmp_path / "out" / path.name
        assert copied.read_bytes() == path.read_bytes()
        assert not copied.samefile(path)


def test_single_file_weights_are_exported(broken, tmp_path):
    for path in broken.glob("model*"):
        path.unlink()
    golden_model("cfg1").save_pretrained(broken)
    export_hub_folder(broken, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").samefile(broken / "model.safetensors")
    model = GLMForBlankInfilling.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model.state_dict(), golden_model("cfg1").state_dict(), atol=0, rtol=0)


def test_an_exported_folder_is_exported_again(exported, tmp_path):
    export_hub_folder(exported, tmp_path / "glm-tiny")
    assert contents(tmp_path / "glm-tiny") == contents(exported)


def test_custom_pipelines_do_not_travel(broken, tmp_path):
    edit_json(broken / "config.json", custom_pipelines={"fill-mask": {"impl": "pipeline_glm.BlankInfillingPipeline"}})
    export_hub_folder(broken, tmp_path / "out")
    assert "custom_pipelines" not in json.loads((tmp_path / "out" / "config.json").read_text())


class StubHub:
    """Stands for `HfApi` and remembers its calls."""

    calls: list = []

    def create_repo(self, repo_id, *, exist_ok):
        self.calls.append(("create", repo_id, exist_ok))

    def upload_folder(self, *, repo_id, folder_path):
        self.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


def test_upload_happens_only_when_asked(source, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_glm, "HfApi", StubHub)
    monkeypatch.setattr(StubHub, "calls", [])
    export_hub_folder(source, tmp_path / "kept")
    assert StubHub.calls == []
    export_hub_folder(source, tmp_path / "pushed", push_to="me/glm-tiny")
    assert StubHub.calls == [
        ("create", "me/glm-tiny", True),
        ("upload", "me/glm-tiny", sorted(contents(exported))),
    ]
    assert 'from_pretrained("me/glm-tiny", trust' in (tmp_path / "pushed" / "README.md").read_text()


def test_a_refused_repository_leaves_no_folder(source, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Repo id"):
        export_hub_folder(source, tmp_path / "out", push_to="not/a/repository")

    def refuse(*_, **__):
        raise PermissionError("not logged in")

    monkeypatch.setattr(StubHub, "create_repo", refuse)
    monkeypatch.setattr(hub_glm, "HfApi", StubHub)
    with pytest.raises(PermissionError, match="not logged in"):
        export_hub_folder(source, tmp_path / "out", push_to="me/glm-tiny")
    assert list(tmp_path.iterdir()) == []


def without(name: str):
    return lambda folder: (folder / name).unlink()


def truncated(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (shutil.rmtree, FileNotFoundError, "config.json"),
        (without("config.json"), FileNotFoundError, "has no config.json"),
        (without("tokenizer.json"), FileNotFoundError, "has no tokenizer.json"),
        (without("model-00002-of-00003.safetensors"), FileNotFoundError, "has no model-00002-of-00003.safetensors"),
        (without("model.safetensors.index.json"), FileNotFoundError, "has no model.safetensors"),
        (truncated, ValueError, "safetensors is damaged"),
        (lambda folder: (folder / "config.json").write_text("{"), ValueError, "config.json is not a JSON file"),
        (lambda folder: edit_json(folder / "config.json", model_type="glm"), ValueError, "a glm130b model, got glm"),
        (lambda folder: edit_json(folder / "config.json", hidden_size=63), ValueError, "is not valid: hidden_size"),
        (lambda folder: edit_json(folder / "config.json", quantization_config={"bits": 4}), ValueError, "quantized"),
    ],
)  # fmt: skip
def test_bad_sources_are_refused_in_one_line(broken, tmp_path, damage, error, message):
    damage(broken)
    with pytest.raises(error, match=message) as caught:
        export_hub_folder(broken, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"broken"}


def test_an_occupied_destination_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out exists already"):
        export_hub_folder(source, tmp_path / "out")
    with pytest.raises(FileExistsError, match="mine.txt exists already"):
        export_hub_folder(source, tmp_path / "out" / "mine.txt")
    assert contents(tmp_path / "out") == {"mine.txt": b"mine"}


def test_an_interrupted_export_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub_glm, "_link_or_copy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_hub_folder(source, tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "mine").mkdir()
    with pytest.raises(FileExistsError, match="is not of an interrupted run"):
        export_hub_folder(source, tmp_path / "out")
