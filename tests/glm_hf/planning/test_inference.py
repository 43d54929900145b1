"""Plans, the maps they emit, their advice, and `glm-hf plan`."""

import itertools
import json
import shlex

import pytest
import torch
from accelerate.utils import check_device_map
from golden import DATA, golden_arrays, golden_config
from transformers import AutoModelForCausalLM
from transformers.integrations.accelerate import compute_module_sizes, infer_auto_device_map

from glm_hf import GLMConfig, GLMForBlankInfilling, GLMQuantizationConfig
from glm_hf.cli import main
from glm_hf.conversion import convert_sat_checkpoint
from glm_hf.planning.devices import Device, parse_devices
from glm_hf.planning.inference import Plan, plan_devices
from glm_hf.planning.memory import activation_bytes, embedding_bytes, kv_cache_bytes, layer_bytes
from glm_hf.quantization.quantizer import GLMQuantizer

GIB = 2**30
CONFIG = GLMConfig()


def plan(devices: str, config: GLMConfig = CONFIG, **options: object) -> Plan:
    return plan_devices(config, parse_devices(devices), **options)


@pytest.fixture
def run(capsys):
    def run_command(command):
        code = main(shlex.split(command))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


@pytest.mark.parametrize("devices", ["24GiB*4", "24GB*4"])
def test_int4_fits_four_cards_of_24_gb(devices):
    assert plan(devices, bits=4).fits


@pytest.mark.parametrize(("devices", "options"), [("40GB*8", {"bits": 16}), ("24GB*8", {"bits": 8})])
def test_fp16_and_int8_fit_eight_cards(devices, options):
    assert plan(devices, **options).fits
    assert plan(devices, tp_size=8, **options).fits


def test_int4_fits_eight_cards_of_11_gb():
    assert plan("10.7GiB*8", bits=4).fits
    assert plan("10.7GiB*8", bits=4, tp_size=8).fits


def test_parts_of_the_released_model_add_up():
    whole = plan("24GiB*4", bits=4)
    linears = 70 * (12288 * 36864 + 12288 * 12288 + 12288 * 65536 + 32768 * 12288)
    rows = 70 * (36864 + 12288 + 65536 + 12288)
    norms = 70 * 4 * 12288 + 2 * 12288
    weights = linears // 2 + 2 * rows + 2 * rows + 2 * norms + 2 * 150528 * 12288 + 4 * 64
    assert sum(use.weights for use in whole.uses) == weights
    assert sum(use.kv_cache for use in whole.uses) == 2 * 70 * 2048 * 12288 * 2


def test_tied_embedding_and_matrix_share_a_device():
    for devices in ("24GiB*4", "8GiB,24GiB*4", "24GiB,cpu=64GiB"):
        places = plan(devices, bits=4).device_map
        assert places["lm_head"] == places["model.embed_tokens"] == places["model.rotary_emb"]
    assert plan("8GiB,24GiB*4", bits=4).device_map["lm_head"] > 0


def test_matrix_that_is_not_tied_may_sit_elsewhere():
    apart = plan("9GiB*2", GLMConfig(tie_word_embeddings=False, num_hidden_layers=2))
    assert apart.device_map["lm_head"] != apart.device_map["model.embed_tokens"]
    assert apart.fits


@pytest.mark.parametrize("sizes", [(24, 24), (24, 12, 40), (6, 24, 24), (9, 9, 30, 9)])
@pytest.mark.parametrize("num_layers", [5, 11])
def test_no_other_cut_leaves_more_room(sizes, num_layers):
    config = GLMConfig(num_hidden_layers=num_layers)
    found = plan(",".join(f"{size}GiB" for size in sizes), config)
    layer = layer_bytes(found.request, 0) + kv_cache_bytes(found.request)
    fixed = GIB // 2 + activation_bytes(found.request)
    embedding = embedding_bytes(found.request) + 4 * 64 + 4 * 12288
    best = max(
        min(
            size * GIB - fixed - count * layer - embedding * (index == holder)
            for index, (size, count) in enumerate(zip(sizes, counts, strict=True))
            if count or index == holder
        )
        for counts in itertools.product(range(num_layers + 1), repeat=len(sizes))
        if sum(counts) == num_layers
        for holder in range(len(sizes))
    )
    assert found.smallest_free == best


def skeleton(bits: int) -> tuple[GLMForBlankInfilling, GLMQuantizer | None]:
    with torch.device("meta"):
        model = GLMForBlankInfilling(CONFIG).half()
    if bits == 16:
        return model, None
    quantizer = GLMQuantizer(GLMQuantizationConfig(bits=bits))
    quantizer.pre_quantized = True
    quantizer.preprocess_model(model)
    return model, quantizer


@pytest.mark.parametrize(
    ("devices", "bits"), [("24GiB*4", 4), ("24GB*8", 8), ("40GB*8", 16), ("24GiB*2,80GiB,cpu=100GiB", 8)]
)
def test_maps_hold_every_weight_and_keep_to_the_memory(devices, bits):
    planned = plan(devices, bits=bits)
    model, quantizer = skeleton(bits)
    check_device_map(model, planned.device_map)
    sizes, _ = compute_module_sizes(model, quantizer)
    for use in planned.uses:
        assert sum(sizes[module] for module in use.modules) == use.weights
        assert use.weights <= planned.max_memory.get(use.device.name, 0)
    layers = [layer for use in planned.uses for layer in use.layers]
    assert layers == list(range(70))


@pytest.mark.parametrize(("devices", "bits"), [("24GiB*4", 4), ("24GB*8", 8), ("40GB*8", 16)])
def test_max_memory_leaves_room_for_the_cache_wherever_auto_puts_layers(devices, bits):
    planned = plan(devices, bits=bits)
    model, quantizer = skeleton(bits)
    places = infer_auto_device_map(
        model, max_memory=planned.max_memory, no_split_module_classes=["GLMLayer"], hf_quantizer=quantizer
    )
    sizes, _ = compute_module_sizes(model, quantizer)
    for device in planned.request.devices:
        modules = [module for module, place in places.items() if place == device.name]
        layers = [module for module in modules if module.startswith("model.layers.")]
        used = sum(sizes[module] for module in modules if module != "lm_head")
        used += len(layers) * kv_cache_bytes(planned.request) + planned.uses[0].activations + planned.request.reserve
        assert used <= device.num_bytes
    assert set(places.values()) <= {device.name for device in planned.request.devices}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Golden cfg2 as fp16 and as INT4."""
    parent = tmp_path_factory.mktemp("planned")
    for name in ("sat_tp1", "sat_int4_tp1"):
        convert_sat_checkpoint(DATA / "cfg2" / name, parent / name, config=golden_config("cfg2"))
    return parent


@pytest.mark.parametrize("name", ["sat_tp1", "sat_int4_tp1"])
def test_model_on_host_and_disk_answers_as_without_a_map(name, folders, tmp_path):
    config = GLMConfig.from_pretrained(folders / name)
    size = next(
        size
        for size in range(0, 10**9, 10**4)
        if plan_devices(config, [Device("cpu", size), Device("disk", None)], reserve=0).fits
    )
    planned = plan_devices(config, [Device("cpu", size), Device("disk", None)], reserve=0)
    assert set(planned.device_map.values()) == {"cpu", "disk"}
    ids = golden_arrays("cfg2")["mask_infill.input_ids"]
    options = {"dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(
        folders / name, device_map=planned.device_map, offload_folder=tmp_path, **options
    )
    assert model.hf_device_map == planned.device_map
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folders / name, **options)(ids).logits
        assert torch.equal(model(ids).logits, expected)


def test_offloaded_layers_are_cached_by_the_gpu_that_computes_them():
    planned = plan("24GiB,cpu=30GiB,disk", bits=4)
    gpu, host, disk = planned.uses
    assert gpu.kv_cache == 70 * kv_cache_bytes(planned.request)
    assert gpu.activations > activation_bytes(planned.request)
    assert (host.kv_cache, disk.kv_cache, host.activations, disk.reserve) == (0, 0, 0, 0)
    assert min(len(gpu.layers), len(host.layers), len(disk.layers)) > 0
    fewer = plan("40GiB,cpu=64GiB,disk", bits=4)
    assert len(fewer.uses[0].layers) > len(gpu.layers)
    assert not fewer.uses[2].modules


def test_host_is_left_alone_when_the_gpus_are_enough():
    planned = plan("24GiB*4,cpu=64GiB,disk", bits=4)
    assert {use.device.name for use in planned.uses if use.modules} == {0, 1, 2, 3}
    assert (planned.uses[4].weights, planned.uses[4].reserve) == (0, 0)


def test_more_work_never_takes_less_memory():
    for grown in ({"context": 1024}, {"context": 2048}, {"batch": 2}, {"bits": 8}, {"bits": 16}, {"group_size": 128}):
        small, large = plan("24GiB*4", bits=4, context=512), plan("24GiB*4", **({"bits": 4, "context": 512} | grown))
        assert large.smallest_free < small.smallest_free
    frees = [plan("24GiB*4", bits=4, context=context).smallest_free for context in range(64, 2049, 64)]
    assert frees == sorted(frees, reverse=True)


@pytest.mark.parametrize("added", ["24GiB", "80GiB", "1GiB", "1MiB"])
def test_another_device_never_makes_a_plan_worse(added):
    for before in ("24GiB", "24GiB*2", "24GiB*4", "24GiB*3,12GiB"):
        plain = plan(before, bits=4)
        for devices in (f"{before},{added}", f"{added},{before}"):
            assert plan(devices, bits=4).smallest_free >= plain.smallest_free


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        ("10.3GiB*8", "--bits 4"),
        ("24GiB*4", ""),
        ("24GiB*2", "--bits 4 --tp 2"),
        ("24GiB*4", "--bits 4 --batch 8"),
        ("24GiB*2,12GiB", "--bits 4"),
        ("cpu=67GiB", ""),
    ],
)
def test_advice_is_true_and_asks_for_no_more_than_needed(devices, options, run):
    command = f"plan --preset 130b --devices {devices} {options}"
    code, out, err = run(command)
    assert code == 1
    assert "from_pretrained" not in out
    assert err.startswith("glm-hf: error: does not fit: needs ")
    advised = err.strip().split("fits with ")[1].split(", or with ")
    assert advised
    for change in advised:
        assert run(f"{command} {change}")[0] == 0, change
    for change in advised:
        if change.startswith("--context"):
            assert run(f"{command} --context {int(change.split()[1]) + 64}")[0] == 1
        if change.startswith("--batch"):
            assert run(f"{command} --batch {int(change.split()[1]) + 1}")[0] == 1
        if change.startswith("--devices"):
            fewer = parse_devices(change.split()[1])[:-1]
            sizes = ",".join(str(device.num_bytes) for device in fewer)
            assert run(f"{command} --devices {sizes}")[0] == 1


@pytest.mark.parametrize(
    ("devices", "options", "expected"),
    [
        ("24GB*8", {}, "fits with --bits 8, or "),
        ("24GiB*2,12GiB", {"bits": 4}, "fits with --devices 24GiB*2,12GiB,24GiB"),
        ("cpu=67GiB", {}, "fits with --bits 4 --context "),
        ("4GiB*30", {}, "fits with --bits 4 --quantize-embeddings --context "),
        ("1GiB", {}, "no option makes it fit"),
    ],
)
def test_advice_begins_with_the_smallest_change_and_joins_what_is_not_enough(devices, options, expected):
    assert expected in plan(devices, **options).advice()


def test_advice_leaves_stored_weights_as_they_are():
    config = GLMConfig(quantization_config=GLMQuantizationConfig(bits=8).to_dict())
    advice = plan("24GiB*4", config).advice()
    assert "--devices" in advice
    assert "--bits" not in advice
    assert "--quantize" not in advice


def test_missing_memory_is_that_of_the_fullest_device(run):
    planned = plan("24GiB*4", bits=8)
    _, _, err = run("plan --preset 130b --devices 24GiB*4 --bits 8")
    missing = float(err.split("needs ")[1].split(" GiB")[0])
    assert 0 <= missing - -planned.smallest_free / GIB < 0.011
    assert plan_devices(CONFIG, [Device(index, int((24 + missing) * GIB)) for index in range(4)], bits=8).fits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp_size": 7}, r"tp_size must divide num_attention_heads \(96\), got 7"),
        ({"tp_size": 0}, r"tp_size must divide num_attention_heads"),
        ({"tp_size": 3}, r"tp_size must divide intermediate_size \(32768\), got 3"),
        ({"tp_size": 8}, r"tp_size of 8 needs as many GPUs and nothing else, got 4 devices"),
        ({"bits": 4, "group_size": 4096, "tp_size": 4}, r"the groups of a row of attention.dense \(3\), got 4"),
        (
            {"bits": 4, "group_size": 100},
            r"group_size must divide the 12288 input features of .* and be even, got 100",
        ),
        ({"bits": 8, "group_size": 0}, r"group_size must be a positive integer"),
        ({"bits": 5}, r"bits must be 4, 8 or 16, got 5"),
        ({"group_size": 128}, r"group_size and quantize_embeddings belong to bits of 4 or 8"),
        ({"bits": 16, "quantize_embeddings": True}, r"belong to bits of 4 or 8"),
        ({"context": 0}, r"context must be from 1 to 2048 tokens, got 0"),
        ({"context": 2049}, r"context must be from 1 to 2048 tokens, got 2049"),
        ({"batch": 0}, r"batch must be at least 1, got 0"),
        ({"reserve": -1}, r"reserve must not be negative, got -1"),
    ],
)
def test_sizes_that_do_not_fit_together(options, message):
    with pytest.raises(ValueError, match=message):
        plan("24GiB*4", **options)


@pytest.mark.parametrize("devices", ["disk", "24GiB,24GiB,cpu=24GiB,disk"])
def test_devices_that_cannot_do_it(devices):
    with pytest.raises(ValueError, match="devices must hold a GPU|nothing else, got 4 devices"):
        plan(devices, tp_size=4)


def test_command_prints_a_table_and_code_that_loads(run, folders, monkeypatch):
    code, out, _ = run(f"plan {folders / 'sat_int4_tp1'} --devices cpu=1GiB --context 32 --batch 3")
    assert code == 0
    table, usage = out.split("\n\n")
    title, header, *rows, total = table.splitlines()
    assert title == "5 layers in INT4, embedding in float16, context 32, batch 3; sizes in GiB"
    assert header.split() == "device size layers weights KV cache activations reserve free".split()
    assert [row.split() for row in rows] == [
        ["cpu", "1.00", "0-4", "0.00", "0.00", "0.00", "0.50", "0.50", "embedding,", "LM", "head"]
    ]
    assert total.split() == ["all", "1.00", "5", "0.00", "0.00", "0.00", "0.50", "0.50"]
    names: dict = {}
    exec(usage, names)
    assert isinstance(names["model"], GLMForBlankInfilling)
    assert set(names["device_map"].values()) == {"cpu"}
    assert names["max_memory"].keys() == {"cpu"}


def test_printed_map_is_the_planned_one(run):
    _, out, _ = run("plan --preset 130b --bits 4 --devices 24GiB*4")
    names: dict = {}
    exec(out[out.index("device_map = {") : out.index("model = ")], names)
    assert names["device_map"] == plan("24GiB*4", bits=4).device_map
    assert names["max_memory"] == plan("24GiB*4", bits=4).max_memory


def test_command_prints_json(run):
    code, out, _ = run("plan --preset 130b --bits 4 --devices 24GiB*4 --json --reserve 1GiB")
    printed = json.loads(out)
    planned = plan("24GiB*4", bits=4, reserve=GIB)
    assert code == 0
    assert printed["device_map"] == planned.device_map
    assert printed["max_memory"] == {str(name): size for name, size in planned.max_memory.items()}
    assert [device["free"] for device in printed["devices"]] == [use.free for use in planned.uses]
    code, out, err = run("plan --preset 130b --devices 24GiB*4 --json")
    assert (code, json.loads(out)["fits"]) == (1, False)
    assert json.loads(out)["advice"] in err


def test_tensor_parallel_plan_tells_how_to_run(run):
    code, out, _ = run("plan --preset 130b --bits 4 --devices 24GiB*4 --tp 4")
    assert code == 0
    assert out.split("\n\n")[0].splitlines()[-1].split()[:3] == ["all", "96.00", "70"]
    assert "torchrun --nproc-per-node 4" in out
    assert 'DistributedConfig(tp_size=4, tp_plan="auto")' in out
    assert "device_map" not in out


def test_stored_bits_are_not_contradicted(run, folders):
    folder = folders / "sat_int4_tp1"
    assert run(f"plan {folder} --bits 4 --devices cpu=1GiB")[0] == 0
    for option in ("--bits 8", "--bits 16", "--group-size 10", "--quantize-embeddings"):
        code, _, err = run(f"plan {folder} --devices cpu=1GiB {option}")
        assert (code, "the model is stored with" in err) == (1, True)
    _, _, err = run(f"plan {folder} --devices cpu=1GiB --reserve 0.95GiB --batch 2000")
    assert "--bits" not in err
    assert "--batch" in err


def test_folders_that_hold_no_such_model(run, tmp_path):
    assert "has no config.json" in run(f"plan {tmp_path} --devices 24GiB")[2]
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "must hold a glm130b model, got bert" in run(f"plan {tmp_path} --devices 24GiB")[2]
    fields = golden_config("cfg1").to_dict() | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert "must be quantized by glm_hf, got quant_method 'gptq'" in run(f"plan {tmp_path} --devices 24GiB")[2]


@pytest.mark.parametrize(
    "arguments", ["--devices 24GiB", "x --preset 130b --devices 24GiB", "--preset 130b", "--preset 7b"]
)
def test_command_needs_one_model_and_devices(arguments):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", *arguments.split()])
