"""What `glm-hf` has for training: `train`, `export-3d` and, of `plan`, the part behind `--train`."""

import argparse
import json
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm_hf.configuration_glm import GLMConfig
    from glm_hf.planning.training_time import Machine

# Options of `plan` for devices only, with their defaults.
DEVICE_OPTIONS = {
    "bits": None,
    "group_size": None,
    "quantize_embeddings": False,
    "context": None,
    "batch": 1,
    "tp": None,
}
GPU_OPTIONS = ("tflops", "gpu_memory", "node_bandwidth", "link_bandwidth", "gpus_per_node")
EFFICIENCIES = ("compute_efficiency", "link_efficiency")
REQUEST_OPTIONS = ("precision", "target_share", "schedule")
PARALLEL_OPTIONS = ("tensor", "pipeline", "data", "partition")
OTHER_OPTIONS = ("micro_batch", "global_batch", "sequence", "gpu", "no_checkpointing", "timeline")
TRAINING_OPTIONS = (*PARALLEL_OPTIONS, *OTHER_OPTIONS, *REQUEST_OPTIONS, *GPU_OPTIONS, *EFFICIENCIES)
DEFAULT_GPU = "A100-40GB"


def add_train(commands: Any) -> None:
    """Add `train`."""
    text = "Train a model as a configuration file says."
    command = commands.add_parser("train", help=text, description=text)
    command.set_defaults(run=train)
    command.add_argument("config", help="YAML file; examples/training holds some to start from")
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    command.add_argument("--output-dir", metavar="FOLDER", help="instead of the one in the file")


def train(options: argparse.Namespace) -> None:
    """Run `train`."""
    from glm_hf.training.launch import RunConfig, train_run

    folder = train_run(RunConfig.read(options.config), resume=options.resume, output_dir=options.output_dir)
    if os.environ.get("RANK", "0") == "0":
        print(folder)


def add_export_3d(commands: Any) -> None:
    """Add `export-3d`."""
    text = "Write a checkpoint of 3D training as a Hugging Face folder."
    command = commands.add_parser("export-3d", help=text, description=text)
    command.set_defaults(run=export_3d)
    command.add_argument("src", help="checkpoint of a run with parallel")
    command.add_argument("dst", help="new folder for the Hugging Face model")
    command.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest output file (default: 5GB)")
    command.add_argument("--no-resume", action="store_true", help="throw away what an interrupted run has left")


def export_3d(options: argparse.Namespace) -> None:
    """Run `export-3d`."""
    from glm_hf.conversion.export_3d import export_3d_checkpoint

    export_3d_checkpoint(options.src, options.dst, max_shard_size=options.max_shard_size, resume=not options.no_resume)
    print(options.dst)


def add_training_plan_options(command: Any) -> None:
    """Add the options that `plan` has with --train."""
    run = command.add_argument_group("with --train: the run")
    for name, help_text in {
        "tensor": "ranks over which every layer is cut (default: 1)",
        "pipeline": "stages (default: 1)",
        "data": "copies of the model (default: 1)",
        "micro-batch": "samples that go through the pipeline at once (default: 1)",
        "global-batch": "samples of a step (default: as many micro-batches as stages)",
        "sequence": "tokens of a sample (default: the model's longest)",
    }.items():
        run.add_argument(f"--{name}", type=int, metavar="N", help=help_text)
    run.add_argument("--partition", type=numbers, metavar="LIST", help="layers of every stage, such as 8,9,9,8")
    run.add_argument("--precision", choices=("fp16", "bf16", "fp32"), help="of the weights (default: fp16)")
    run.add_argument(
        "--no-checkpointing", action="store_true", help="keep activations instead of computing them again"
    )
    run.add_argument("--target-share", type=float, metavar="X", help="of the tokens that are predicted (default: 1)")
    run.add_argument("--schedule", help="1f1b as the trainer; to compare: gpipe, naive (default: 1f1b)")
    run.add_argument("--timeline", metavar="FILE", help="write a PNG of when every stage computes")
    gpu = command.add_argument_group("with --train: the GPUs")
    gpu.add_argument("--gpu", metavar="NAME", help=f"a known one (default: {DEFAULT_GPU}); what follows replaces")
    gpu.add_argument("--tflops", type=float, metavar="X", help="peak in the precision of the run, 10^12 per second")
    gpu.add_argument("--gpu-memory", metavar="SIZE", help="of one GPU, such as 40GiB")
    gpu.add_argument("--node-bandwidth", type=float, metavar="X", help="within a node, each way, GB/s")
    gpu.add_argument("--link-bandwidth", type=float, metavar="X", help="between nodes, per GPU and each way, GB/s")
    gpu.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs of a node")
    gpu.add_argument("--compute-efficiency", type=float, metavar="X", help="share of the peak (default: 0.5)")
    gpu.add_argument("--link-efficiency", type=float, metavar="X", help="share of the bandwidth (default: 0.75)")


def numbers(text: str) -> tuple[int, ...]:
    """Parse integers with commas between them."""
    return tuple(int(part) for part in text.split(","))


def require_options_of_one_plan(options: argparse.Namespace) -> None:
    """Raise ValueError if options of `plan --devices` and of `plan --train` are mixed."""
    defaults = DEVICE_OPTIONS if options.train else dict.fromkeys(TRAINING_OPTIONS) | {"no_checkpointing": False}
    for name, default in defaults.items():
        if getattr(options, name) != default:
            there, here = ("--devices", "--train") if options.train else ("--train", "--devices")
            raise ValueError(f"--{name.replace('_', '-')} belongs to {there}, not to {here}")


def plan_training(options: argparse.Namespace, config: "GLMConfig") -> None:
    """Run `plan --train` for a model."""
    from glm_hf.planning.devices import parse_size
    from glm_hf.planning.timeline import plot_timeline
    from glm_hf.planning.training import TrainingPlan, TrainingRequest
    from glm_hf.sharding.degrees import Parallel

    if options.timeline is not None and find_spec("matplotlib") is None:
        raise ValueError("--timeline needs matplotlib: pip install 'glm-hf[plot]'")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{options.model} is quantized, whose weights cannot be trained; give the model that is not")
    parallel = Parallel(**given(options, PARALLEL_OPTIONS))
    micro_batch = 1 if options.micro_batch is None else options.micro_batch
    per_round = micro_batch * parallel.data * parallel.pipeline
    plan = TrainingPlan(
        TrainingRequest(
            config,
            parallel,
            machine_of(options),
            micro_batch,
            per_round if options.global_batch is None else options.global_batch,
            config.max_position_embeddings if options.sequence is None else options.sequence,
            checkpointing=not options.no_checkpointing,
            reserve=parse_size(options.reserve),
            **given(options, REQUEST_OPTIONS),
        )
    )
    print(json.dumps(plan.to_dict()) if options.json else plan.describe())
    if options.timeline is not None:
        plot_timeline(plan.run, options.timeline, f"{parallel.describe()}, {plan.request.schedule}")
    if not plan.fits:
        raise ValueError(f"does not fit: {plan.advice()}")


def given(options: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the options of these names that were given."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def machine_of(options: argparse.Namespace) -> "Machine":
    """Return the GPUs that the options state: a known kind, with what is given replaced."""
    from dataclasses import replace

    from glm_hf.planning.devices import parse_size
    from glm_hf.planning.training_time import GPUS, Machine

    name = DEFAULT_GPU if options.gpu is None else options.gpu
    if name not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, or one of them with its numbers replaced, got {name}")
    changes = given(options, GPU_OPTIONS)
    if "gpu_memory" in changes:
        changes["memory"] = parse_size(changes.pop("gpu_memory"))
    if "tflops" in changes:
        changes["tflops_fp32"] = changes["tflops"]
    if changes:
        changes["name"] = f"{name} (changed)"
    return Machine(replace(GPUS[name], **changes), **given(options, EFFICIENCIES))
