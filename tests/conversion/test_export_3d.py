"""Checkpoints of 3D-parallel training become the folder that the whole model would have saved."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from pipeline_files import TAG, change, make, part_files, random_model, write_checkpoint, write_json

from glm_hf import GLMForBlankInfilling
from glm_hf.conversion import export_3d_checkpoint, verify_checkpoint
from glm_hf.conversion.streaming import segments as partial_folder
from glm_hf.conversion.streaming import stored_tensor
from glm_hf.conversion.streaming.stored_tensor import RowReader

BLOCK_BYTES = 1000  # less than most tensors have
SHARDS = {"max_shard_size": "4KB"}
EMBEDDING, LAYER, NORM = "layer_00-model_{}-model_states.pt", "layer_02-model_{}-model_states.pt", "layer_04-model_{}"
LAYER_0, LAYER_1 = (LAYER.format(rank) for rank in ("00", "01"))


@pytest.fixture(autouse=True)
def _many_blocks(monkeypatch) -> None:
    monkeypatch.setattr(stored_tensor, "BLOCK_BYTES", BLOCK_BYTES)


@pytest.fixture
def src(tmp_path) -> Path:
    """Checkpoint of two ranks, in fp32."""
    return make(tmp_path / "checkpoint-4")[0]


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_holds(folder: Path, model: GLMForBlankInfilling) -> None:
    """Check that a folder loads to exactly the model, without anything left over."""
    loaded, info = GLMForBlankInfilling.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    expected, actual = model.state_dict(), loaded.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("options", [SHARDS, {}], ids=["several shards", "one file"])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_folder_is_the_one_that_the_whole_model_saves(num_ranks, dtype, is_tied, options, tmp_path):
    src, model = make(tmp_path / "checkpoint-4", num_ranks, dtype=dtype, tie_word_embeddings=is_tied)
    export_3d_checkpoint(src, tmp_path / "hf", **options)
    assert_holds(tmp_path / "hf", model)
    model.save_pretrained(tmp_path / "saved", **options)
    files = read_folder(tmp_path / "hf")
    assert files.keys() == read_folder(tmp_path / "saved").keys()
    assert len(files) > 8 if options else len(files) == 3
    for name in ("config.json", "generation_config.json"):
        assert json.loads(files[name]) == json.loads((tmp_path / "saved" / name).read_text())
    assert verify_checkpoint(tmp_path / "saved", tmp_path / "hf").problems == []
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("num_layers", [12, 101])
def test_layers_stand_in_the_order_of_their_numbers(num_layers, tmp_path):
    src, model = make(tmp_path / "checkpoint-4", 1, num_hidden_layers=num_layers, hidden_size=8)
    assert (src / TAG / f"layer_{num_layers}-model_00-model_states.pt").exists()
    export_3d_checkpoint(src, tmp_path / "hf")
    assert_holds(tmp_path / "hf", model)


def test_ranks_stand_in_the_order_of_their_numbers(tmp_path):
    src, model = make(tmp_path / "checkpoint-4", 12, num_attention_heads=12, hidden_size=24, intermediate_size=48)
    export_3d_checkpoint(src, tmp_path / "hf")
    assert_holds(tmp_path / "hf", model)


def test_tied_output_matrix_need_not_be_there(tmp_path):
    model = random_model()
    contents = {name: content for name, content in part_files(model, 2).items() if not name.startswith("layer_05")}
    write_checkpoint(tmp_path / "checkpoint-4", model, contents, 2)
    export_3d_checkpoint(tmp_path / "checkpoint-4", tmp_path / "hf")
    assert_holds(tmp_path / "hf", model)


def test_tensors_may_share_their_bytes_with_others(tmp_path):
    model = random_model()
    contents = part_files(model, 2)
    for content in contents.values():
        flat = torch.cat([tensor.flatten() for tensor in content.values()])
        parts = flat.split([tensor.numel() for tensor in content.values()])
        content |= {name: part.view_as(content[name]) for name, part in zip(content, parts, strict=True)}
    src = write_checkpoint(tmp_path / "checkpoint-4", model, contents, 2)
    export_3d_checkpoint(src, tmp_path / "hf")
    assert_holds(tmp_path / "hf", model)
    damage(src / TAG / LAYER_1, contents[LAYER_1]["mlp.dense_4h_to_h.weight"])
    assert_refused(src, tmp_path / "other", rf"{LAYER_1}: .* is damaged")


def test_never_more_than_a_block_is_read(src, tmp_path, monkeypatch):
    sizes = []
    take = RowReader.take

    def record(self: RowReader, num_rows: int) -> torch.Tensor:
        sizes.append(num_rows * self._tensor.nbytes // self._tensor.shape[0])
        return take(self, num_rows)

    monkeypatch.setattr(RowReader, "take", record)
    export_3d_checkpoint(src, tmp_path / "hf")
    assert len(sizes) > 100
    assert max(sizes) <= BLOCK_BYTES


def test_small_files_travel_along_and_the_state_of_training_does_not(src, tmp_path):
    texts = {"tokenizer.json": "{}", "tokenizer_config.json": "{1}", "README.md": "of mine"}
    state = ["trainer_state.json", "training_args.bin", "scheduler.pt", "rng_state_0.pth", "glm_training_state.json"]
    state += ["zero_to_fp32.py", "zero_to_torch.py", "latest_universal", ".hidden", "model.safetensors"]
    for name in (*texts, *state):
        (src / name).write_text(texts.get(name, "state"))
    (src / f"{TAG}_universal").mkdir()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "bf16_zero_x_states.pt"):
        (src / TAG / name).write_text("of DeepSpeed")
    export_3d_checkpoint(src, tmp_path / "hf")
    files = read_folder(tmp_path / "hf")
    assert files.keys() == {"config.json", "generation_config.json", "model.safetensors", *texts}
    assert all(files[name].decode() == text for name, text in texts.items())


def test_generation_settings_of_the_checkpoint_are_kept(src, tmp_path):
    write_json(src / "generation_config.json", max_new_tokens=7)
    export_3d_checkpoint(src, tmp_path / "hf")
    assert GLMForBlankInfilling.from_pretrained(tmp_path / "hf").generation_config.max_new_tokens == 7


def test_configuration_tells_the_dtype_of_the_weights(src, tmp_path):
    write_json(src / "config.json", dtype="float16", architectures=None)
    export_3d_checkpoint(src, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("float32", ["GLMForBlankInfilling"])


class Stop(Exception):
    pass


def stop_after(num_segments: int, run: Callable[[], None]) -> None:
    """Run a function until a number of segments is finished."""
    whole = partial_folder._save

    def save(home: Path, manifest: dict) -> None:
        whole(home, manifest)
        if len(manifest["finished"]) == num_segments:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partial_folder, "_save", save)
        with pytest.raises(Stop):
            run()


@pytest.mark.parametrize("num_segments", [1, 4])
def test_interrupted_run_goes_on(num_segments, src, tmp_path):
    export_3d_checkpoint(src, tmp_path / "whole", **SHARDS)
    run = partial(export_3d_checkpoint, src, tmp_path / "hf", **SHARDS)
    stop_after(num_segments, run)
    assert not (tmp_path / "hf").exists()
    marks = list((tmp_path / ".hf.partial" / "folder").iterdir())
    assert len(marks) == num_segments
    for path in marks:
        os.utime(path, (1, 1))
    run()
    assert read_folder(tmp_path / "hf") == read_folder(tmp_path / "whole")
    assert all((tmp_path / "hf" / path.name).stat().st_mtime == 1 for path in marks)
    assert not (tmp_path / ".hf.partial").exists()


def test_checkpoint_that_has_changed_is_noticed(src, tmp_path):
    run = partial(export_3d_checkpoint, src, tmp_path / "hf", **SHARDS)
    stop_after(2, run)
    change(src, LAYER_1, lambda content: content["mlp.dense_4h_to_h.weight"].add_(1))
    with pytest.raises(ValueError, match=rf"^{LAYER_1} has changed since the interrupted run .*resume=False"):
        run()
    run(resume=False)
    assert (tmp_path / "hf" / "config.json").exists()


def test_other_options_are_noticed(src, tmp_path):
    stop_after(2, partial(export_3d_checkpoint, src, tmp_path / "hf", **SHARDS))
    with pytest.raises(ValueError, match=r"the interrupted run in \S+ had other options"):
        export_3d_checkpoint(src, tmp_path / "hf")


def assert_refused(src: Path, dst: Path, message: str, **options: object) -> None:
    """Check that an export fails with a message of one line and leaves nothing."""
    with pytest.raises((ValueError, OSError), match=message) as caught:
        export_3d_checkpoint(src, dst, **options)
    assert type(caught.value) in (ValueError, FileNotFoundError, FileExistsError)
    assert "\n" not in str(caught.value)
    assert not hasattr(caught.value, "__notes__")
    assert not dst.with_name(f".{dst.name}.partial").exists()


@pytest.mark.parametrize("name", ["config.json", "parallel.json", "latest"])
def test_folder_that_is_no_checkpoint(name, src, tmp_path):
    (src / name).unlink()
    assert_refused(src, tmp_path / "hf", rf"must be a checkpoint of 3D-parallel training, .* but has no {name}$")


def test_folder_that_is_not_there(tmp_path):
    assert_refused(tmp_path / "x", tmp_path / "hf", r"x must be a checkpoint .* no config.json, parallel.json, latest")


def test_output_folder_of_a_run(src, tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-99-old"):
        (tmp_path / name).mkdir()
    (tmp_path / "config.json").touch()
    assert_refused(tmp_path, tmp_path / "hf", rf"holds checkpoints; .* the last is {tmp_path}/checkpoint-10$")


@pytest.mark.parametrize("tag", ["global_step5", "", ".", "../checkpoint-4/global_step4"])
def test_latest_that_names_nothing(tag, src, tmp_path):
    (src / "latest").write_text(tag)
    assert_refused(src, tmp_path / "hf", rf"latest names '{tag}', but \S+ has no folder of that name")


@pytest.mark.parametrize("tensor", [0, "2", None, True, [2]])
def test_degree_that_is_no_number(tensor, src, tmp_path):
    write_json(src / "parallel.json", tp_size=tensor)
    assert_refused(src, tmp_path / "hf", r"parallel.json: tp_size must be an integer of at least 1, got")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, r"must hold a glm130b model, got gpt2"),
        ({"quantization_config": {"bits": 4}}, r"config.json has a quantization_config, but weights in training are"),
        ({"hidden_size": "wide"}, r"config.json is not valid: "),
        ({"num_hidden_layers": 5}, r"layer_06-model_00-model_states.pt is missing: .* tell of 7 parts on 2 tensor"),
        ({"num_hidden_layers": 4}, r"layer_04-model_00-model_states.pt: attention.dense.bias is missing; expected"),
        ({"num_hidden_layers": 2}, r"layer_05-model_00-model_states.pt is not of this checkpoint: .* of 5 parts on"),
        ({"num_hidden_layers": 1}, r"layer_04-model_00-model_states.pt is not of this checkpoint: .* of 4 parts on"),
        (
            {"vocab_size": 49},
            r"and parallel.json do not fit: model.embed_tokens.weight: tp_size must split dim",
        ),
        ({"vocab_size": 50}, r"layer_00\S+: weight is \(24, 16\) float32, but config.json and .* tell \(25, 16\)"),
        ({"intermediate_size": 20}, r"layer_01\S+: mlp.dense_h_to_4h.weight is \(40, 16\) float32, but .*\(20, 16\)"),
    ],
    ids=str,
)
def test_configuration_of_another_model(fields, message, src, tmp_path):
    write_json(src / "config.json", **fields)
    assert_refused(src, tmp_path / "hf", message)


def test_output_matrix_of_its_own_that_is_missing(src, tmp_path):
    write_json(src / "config.json", tie_word_embeddings=False)
    for rank in ("00", "01"):
        (src / TAG / f"layer_05-model_{rank}-model_states.pt").unlink()
    assert_refused(src, tmp_path / "hf", r"layer_05-model_00-model_states.pt is missing")


@pytest.mark.parametrize(
    "name", [EMBEDDING.format("01"), LAYER_0, LAYER_1, "layer_05-model_01-model_states.pt"], ids=str
)
def test_file_that_is_missing(name, src, tmp_path):
    (src / TAG / name).unlink()
    assert_refused(src, tmp_path / "hf", rf"{name} is missing: .* 6 parts on 2 tensor-parallel ranks; copy")


@pytest.mark.parametrize("name", ["layer_02-model_02-model_states.pt", "layer_06-model_00-model_states.pt"])
def test_file_of_another_checkpoint(name, src, tmp_path):
    shutil.copyfile(src / TAG / LAYER_0, src / TAG / name)
    assert_refused(src, tmp_path / "hf", rf"{name} is not of this checkpoint: .* remove what belongs elsewhere")


@pytest.mark.parametrize(("name", "other"), [(LAYER_1, LAYER_0), (LAYER_0, "layer_03-model_00-model_states.pt")])
def test_file_that_stands_for_another(name, other, src, tmp_path):
    shutil.copyfile(src / TAG / other, src / TAG / name)
    assert_refused(src, tmp_path / "hf", rf"{name} was saved as {other}: it was renamed, or files were swapped")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda c: c.pop("attention.dense.bias"), r"attention.dense.bias is missing; expected the tensors of"),
        (lambda c: c.update(extra=torch.ones(3)), r"extra is unknown; expected the tensors of GLMForBlankInfilling"),
        (lambda c: c.update({7: torch.ones(3)}), r"7 is no name; expected tensors by their names"),
        (lambda c: c.update(extra=5), r"extra is a int; expected a tensor"),
        (
            lambda c: c.update({"mlp.dense_4h_to_h.weight": torch.ones(20, 16)}),
            r"mlp.dense_4h_to_h.weight is \(20, 16\) float32, but config.json and parallel.json tell \(16, 20\)",
        ),
        (
            lambda c: c.update({"attention.dense.weight": c["attention.dense.weight"].half()}),
            r"attention.dense.weight is torch.float16, but weight in \S+layer_00-model_00\S+ is torch.float32",
        ),
        (lambda c: c.pop("input_layernorm.bias"), r"input_layernorm.bias is missing"),
        (lambda c: c["input_layernorm.weight"].__setitem__(5, 0.25), r"input_layernorm.weight differs from"),
        (lambda c: c["mlp.dense_4h_to_h.bias"].__setitem__(5, float("nan")), r"mlp.dense_4h_to_h.bias differs from"),
    ],
)
def test_rank_that_holds_something_else(how, message, src, tmp_path):
    change(src, LAYER_1, how)
    assert_refused(src, tmp_path / "hf", rf"{LAYER_1}: {message}")


@pytest.mark.parametrize("name", ["input_layernorm.bias", "post_attention_layernorm.weight", "attention.dense.bias"])
def test_ranks_that_differ_in_the_sign_of_a_zero(name, src, tmp_path):
    change(src, LAYER_0, lambda content: content[name].__setitem__(3, 0.0))
    change(src, LAYER_1, lambda content: content[name].__setitem__(3, -0.0))
    message = rf"{LAYER_1}: {name} differs from {name} in \S+{LAYER_0}, but all ranks must hold the same; training has"
    assert_refused(src, tmp_path / "hf", message)


@pytest.mark.parametrize("row", [0, 13, 23])
def test_tied_matrices_that_differ(row, src, tmp_path):
    change(src, "layer_05-model_01-model_states.pt", lambda content: content["weight"][row].add_(1e-3))
    message = r"layer_05-model_01\S+: weight differs from weight in \S+layer_00-model_01\S+, but the LM head is"
    assert_refused(src, tmp_path / "hf", message)


def test_norm_that_is_the_same_with_nan_on_all_ranks_is_copied(src, tmp_path):
    for name in (LAYER_0, LAYER_1):
        change(src, name, lambda content: content["input_layernorm.weight"].__setitem__(5, float("nan")))
    export_3d_checkpoint(src, tmp_path / "hf")
    assert GLMForBlankInfilling.from_pretrained(tmp_path / "hf").model.layers[1].input_layernorm.weight[5].isnan()


def test_weights_that_are_integers(tmp_path):
    model = random_model()
    contents = {
        name: {inner: tensor.to(torch.int8) for inner, tensor in content.items()}
        for name, content in part_files(model, 1).items()
    }
    src = write_checkpoint(tmp_path / "checkpoint-4", model, contents, 1)
    assert_refused(src, tmp_path / "hf", r"layer_00\S+: weight is torch.int8, .* expected one floating point dtype")


def damage(path: Path, tensor: torch.Tensor) -> None:
    """Flip a bit of a tensor in a file."""
    content = bytearray(path.read_bytes())
    content[content.index(tensor.contiguous().numpy().tobytes())] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("num_bytes", [0, 1000, -1])
def test_file_that_was_cut_short(num_bytes, src, tmp_path):
    os.truncate(src / TAG / LAYER_1, num_bytes % (src / TAG / LAYER_1).stat().st_size)
    assert_refused(src, tmp_path / "hf", rf"{LAYER_1} is not a complete zip file of torch.save, copy it again")


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        (LAYER_1, "mlp.dense_4h_to_h.weight"),
        (LAYER_1, "mlp.dense_h_to_4h.weight"),
        (LAYER_1, "input_layernorm.weight"),
        (EMBEDDING.format("00"), "weight"),
        ("layer_05-model_00-model_states.pt", "weight"),
    ],
)
def test_bit_that_has_flipped(name, inner, src, tmp_path):
    damage(src / TAG / name, torch.load(src / TAG / name, weights_only=True)[inner])
    assert_refused(src, tmp_path / "hf", rf"{name}: {inner} is damaged: its CRC-32 is", **SHARDS)
    assert not (tmp_path / "hf").exists()


class RunsCode:
    def __reduce__(self) -> tuple:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("content", [{"weight": RunsCode()}, RunsCode()], ids=["value", "whole"])
def test_file_that_would_run_code(content, src, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, src / TAG / LAYER_1)
    assert_refused(src, tmp_path / "hf", rf"{LAYER_1} holds more than plain tensors or is damaged; refused")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{}, [torch.ones(3)], torch.ones(3), 5])
def test_file_without_names(content, src, tmp_path):
    torch.save(content, src / TAG / LAYER_1)
    assert_refused(src, tmp_path / "hf", rf"{LAYER_1} has no tensors$")


def test_destination_that_holds_something(src, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").touch()
    assert_refused(src, tmp_path / "hf", r"hf exists already; choose another folder or remove it")
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["mine"]


def test_shard_size_that_is_none(src, tmp_path):
    assert_refused(src, tmp_path / "hf", r"many", max_shard_size="many")
