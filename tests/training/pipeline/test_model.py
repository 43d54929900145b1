"""A model spread over processes: its outputs, its weights in and out of folders, and the memory that takes."""

import json
from pathlib import Path

import pytest
import torch
from forked import run_ranks
from golden import TOLERANCE, golden_arrays, golden_model
from safetensors.torch import load_file, save_file
from small_runs import prepare_deepspeed
from torch import distributed as dist

from glm_hf import GLMConfig, GLMForBlankInfilling
from glm_hf.infilling_glm import infilling_layout
from glm_hf.sharding.degrees import ParallelDegrees
from glm_hf.training.pipeline.engine import deepspeed_3d_config, make_engine, start_deepspeed

BIG = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 8, "num_attention_heads": 16}


@pytest.fixture(scope="module", autouse=True)
def _deepspeed():
    prepare_deepspeed()


def spread(function, parallel: ParallelDegrees, folder: Path) -> list:
    """Run `function()` on as many processes as `parallel` takes, and return what each returns."""

    def rank_main(rank: int):
        dist.init_process_group("gloo")
        start_deepspeed()
        return function()

    folder.mkdir(exist_ok=True)
    return run_ranks(rank_main, parallel.world_size, folder)


def filled(folder: Path, parallel: ParallelDegrees, dtype: torch.dtype = torch.float32):
    from glm_hf.training.pipeline.model import GLMPipeline
    from glm_hf.training.pipeline.weights import load_folder

    pipeline = GLMPipeline(GLMConfig.from_pretrained(folder), parallel, dtype)
    load_folder(pipeline, folder)
    return pipeline


@pytest.mark.parametrize("case", ["gmask_batch", "mask_infill", "smask_end", "right_padded"])
def test_logits_of_the_original_code_come_out_of_a_pipeline(tmp_path, case):
    """2 stages of layers cut in 2, through DeepSpeed's engine."""
    golden_model("cfg1").save_pretrained(tmp_path / "model")
    arrays = {name: golden_arrays("cfg1")[f"{case}.{name}"] for name in ("input_ids", "position_ids", "logits")}
    hidden_from = golden_arrays("cfg1")[f"{case}.attention_mask"][:, 0]
    is_token = ~hidden_from.all(1)  # seen by some token
    parallel = ParallelDegrees(tp_size=2, pp_size=2)

    def rank_main():
        pipeline = filled(tmp_path / "model", parallel)
        config = deepspeed_3d_config(2, 2, 1, micro_batch_size=len(is_token), precision="fp32")
        engine = make_engine(pipeline, torch.optim.AdamW(pipeline.parameters()), config)
        layout = torch.stack((arrays["input_ids"].long(), arrays["position_ids"].long(), is_token.long()))
        labels = (torch.full_like(layout[0], -100), torch.tensor(1.0))
        batch = iter([((layout,), labels)] * 2)  # both stages are busy
        _, hidden = engine.eval_batch(batch, True, bcast_loss=False, reduce_output=None, num_micro_batches=2)
        return pipeline.forward_funcs[-1].logits(hidden).detach() if pipeline.is_last else None

    positions, _ = infilling_layout(
        arrays["input_ids"].long(), GLMConfig.from_pretrained(tmp_path / "model"), is_token
    )
    assert torch.equal(positions[is_token], arrays["position_ids"].long()[is_token])
    *_, left, right = spread(rank_main, parallel, tmp_path / "ranks")
    found = torch.cat((left, right), dim=-1)
    assert (found - arrays["logits"])[is_token].abs().max() <= TOLERANCE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_folder_comes_out_as_it_went_in(deep_folder, tmp_path, dtype, is_tied):
    config = GLMConfig.from_pretrained(deep_folder, tie_word_embeddings=is_tied)
    model = GLMForBlankInfilling(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    parallel = ParallelDegrees(tp_size=2, pp_size=2, dp_size=1)

    def rank_main():
        from glm_hf.training.pipeline.weights import save_folder

        pipeline = filled(tmp_path / "in", parallel, getattr(torch, dtype))
        (tmp_path / "out").mkdir(exist_ok=True)
        if dist.get_rank() == 0:
            (tmp_path / "out" / "model.safetensors").write_bytes(b"of an earlier model")
            (tmp_path / "out" / "checkpoint-1").mkdir()
        save_folder(pipeline, tmp_path / "out", max_shard_size="30KB")
        return pipeline.num_parameters()

    assert set(spread(rank_main, parallel, tmp_path / "ranks")) == {model.num_parameters()}
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert "model.safetensors" not in names  # or it would be taken for the model
    assert "checkpoint-1" in names
    again = GLMForBlankInfilling.from_pretrained(tmp_path / "out", dtype="auto")
    for name, expected in model.state_dict().items():
        found = again.state_dict()[name]
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), name
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, tensors in stored.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in stored.values() for t in tensors.values())
    assert again.config.tie_word_embeddings == is_tied
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["architectures"], fields["dtype"]) == (["GLMForBlankInfilling"], dtype)


def test_a_single_file_leaves_no_index_of_an_earlier_model(deep_folder, tmp_path):
    def rank_main():
        from glm_hf.training.pipeline.weights import save_folder

        pipeline = filled(deep_folder, ParallelDegrees())
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "model.safetensors.index.json").write_text("{}")
        (tmp_path / "out" / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier model")
        save_folder(pipeline, tmp_path / "out")

    alone(rank_main, tmp_path / "ranks")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}


def test_every_file_is_written_by_one_process(deep_folder, tmp_path):
    parallel = ParallelDegrees(tp_size=2, dp_size=2)

    def rank_main():
        from glm_hf.training.pipeline import weights

        pipeline, written, save = filled(deep_folder, parallel), [], weights.save_file
        weights.save_file = lambda tensors, path, **options: (
            written.append(path.name),
            save(tensors, path, **options),
        )
        weights.save_folder(pipeline, tmp_path / "out", max_shard_size="30KB")
        return written

    written = [name for names in spread(rank_main, parallel, tmp_path / "ranks") for name in names]
    assert len(written) == len(set(written)) > 1


def test_activations_are_recomputed_in_the_layers_that_are_asked_for(deep_folder, tmp_path):
    def rank_main():
        pipeline = filled(deep_folder, ParallelDegrees(pp_size=2, partition=(1, 3)))
        pipeline.activation_checkpointing_enable({"preserve_rng_state": False}, every_n_layers=2)
        settings = [layer._gradient_checkpointing_func.keywords for layer in pipeline.layers]
        assert all(one == {"use_reentrant": False, "preserve_rng_state": False} for one in settings)
        flags = [layer.gradient_checkpointing for layer in pipeline.layers]
        calls = []
        layer = pipeline.layers[flags.index(True)]
        layer.attention.register_forward_hook(lambda *_: calls.append(1))
        states = torch.randn(1, 3, 32, requires_grad=True)
        positions = pipeline.rotary_emb(states, torch.arange(3)[None])
        pipeline.train()
        layer(states, position_embeddings=positions).sum().backward()
        with pytest.raises(ValueError, match="offload is not supported"):
            pipeline.activation_checkpointing_enable(offload=True)
        return flags, len(calls)

    ranks = spread(rank_main, ParallelDegrees(pp_size=2), tmp_path / "ranks")
    assert ranks == [([True], 2), ([False, True, False], 2)]  # of layers 0 to 3, the even ones


def test_new_weights_do_not_depend_on_how_a_model_is_spread(deep_folder, tmp_path):
    config = GLMConfig.from_pretrained(deep_folder, hidden_size=64, intermediate_size=128)
    degrees = [ParallelDegrees(), ParallelDegrees(tp_size=2), ParallelDegrees(pp_size=3), ParallelDegrees(2, 2, 1)]

    def made(parallel: ParallelDegrees, folder: Path) -> dict[str, torch.Tensor]:
        def rank_main():
            from glm_hf.training.pipeline.model import GLMPipeline
            from glm_hf.training.pipeline.weights import initialize, save_folder

            pipeline = GLMPipeline(config, parallel, torch.float32)
            initialize(pipeline, seed=5)
            save_folder(pipeline, folder / "model")
            tied = pipeline.tied_modules
            return tied["embed_tokens"].weight.detach() if tied else None

        copies = [weight for weight in spread(rank_main, parallel, folder) if weight is not None]
        assert all(map(torch.equal, copies[: parallel.tp_size], copies[-parallel.tp_size :]))  # first and last stage
        return GLMForBlankInfilling.from_pretrained(folder / "model").state_dict()

    expected, *others = [made(parallel, tmp_path / str(number)) for number, parallel in enumerate(degrees)]
    for other in others:
        assert all(torch.equal(other[name], weight) for name, weight in expected.items())
    for name, weight in GLMForBlankInfilling(config).state_dict().items():  # drawn by the model itself
        assert float(expected[name].std()) == pytest.approx(float(weight.std()), rel=0.1, abs=1e-9), name
        assert float(expected[name].mean()) == pytest.approx(float(weight.mean()), abs=0.01)
    layers = [expected[f"model.layers.{index}.attention.dense.weight"] for index in range(4)]
    assert len({float(layer.sum()) for layer in layers}) == 4


def test_a_process_reads_its_own_share_and_a_tensor_more(tmp_path):
    """Of 620 million parameters on 4 stages."""
    config = GLMConfig(vocab_size=64000, **BIG, **special_ids())
    with torch.device("meta"):
        model = GLMForBlankInfilling(config).half()
    assert model.num_parameters() > 500e6
    config.save_pretrained(tmp_path / "model")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    files = [[name for name in tensors if (".layers." in name) == is_layer] for is_layer in (True, False)]
    for number, names in enumerate(files):  # one file of all layers, so that a stage needs a part of a file
        content = {name: torch.full(tensors[name].shape, number, dtype=torch.float16) for name in names}
        save_file(content, tmp_path / "model" / f"model-{number}.safetensors")
        del content
    weight_map = {name: f"model-{number}.safetensors" for number, names in enumerate(files) for name in names}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    parallel = ParallelDegrees(pp_size=4)

    def rank_main():
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = memory("VmHWM")
        pipeline = filled(tmp_path / "model", parallel, torch.float16)
        share = sum(parameter.nbytes for parameter in pipeline.parameters())
        assert all(float(layer.mlp.dense_4h_to_h.weight[-1, -1]) == 0 for layer in pipeline.layers)
        return memory("VmHWM") - before, share

    largest = max(tensor.nbytes for tensor in tensors.values())
    for grown, share in spread(rank_main, parallel, tmp_path / "ranks"):
        assert share < 0.5 * 2 * model.num_parameters()
        assert grown <= share + largest + 30e6, (grown, share, largest)  # buffers of allocator and libraries


def special_ids() -> dict[str, int]:
    names = ("eos", "mask", "gmask", "smask", "eod", "sop", "eop")
    return {f"{name}_token_id": number for number, name in enumerate(names, 1)}


def memory(kind: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[kind].split()[0]) * 1024


def alone(function, folder: Path):
    [result] = spread(function, ParallelDegrees(), folder)
    return result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.bias"), "has no model.norm.bias"),
        (
            lambda tensors: tensors.update({"model.norm.bias": torch.zeros(31)}),
            r"model.norm.bias is \(31,\) in the folder, but config.json tells \(32,\)",
        ),
    ],
)
def test_a_folder_of_another_model_is_refused(deep_folder, tmp_path, change, message):
    tensors = load_file(deep_folder / "model.safetensors")
    change(tensors)
    GLMConfig.from_pretrained(deep_folder).save_pretrained(tmp_path / "model")
    save_file(tensors, tmp_path / "model" / "model.safetensors")

    def rank_main():
        with pytest.raises(ValueError, match=message):
            filled(tmp_path / "model", ParallelDegrees())

    alone(rank_main, tmp_path / "ranks")


def test_a_damaged_file_is_refused(deep_folder, tmp_path):
    GLMConfig.from_pretrained(deep_folder).save_pretrained(tmp_path / "model")
    content = (deep_folder / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(content[:-100])

    def rank_main():
        with pytest.raises(ValueError, match="model.safetensors is damaged"):
            filled(tmp_path / "model", ParallelDegrees())

    alone(rank_main, tmp_path / "ranks")
