"""Subcommand `plan`, for inference on devices and, with --train, for 3D training."""

import argparse
import json
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from glm_hf.cli.commands import add_command, integers

if TYPE_CHECKING:
    from glm_hf.configuration_glm import GLMConfig
    from glm_hf.planning.training_time import Machine

DEFAULT_GPU = "A100-40GB"
# Options with --train by what they describe; those that are not given have the defaults of the classes.
DEGREES = ("tp_size", "pp_size", "dp_size", "partition", "sequence_parallel")
REQUEST = ("precision", "target_share", "schedule")
GPU = ("tflops", "gpu_memory", "node_bandwidth", "link_bandwidth", "gpus_per_node")
EFFICIENCIES = ("compute_efficiency", "link_efficiency")


def add_plan(commands: Any) -> None:
    """Add `plan`."""
    text = "Tell whether a model fits devices, and where its layers go."
    command = add_command(commands, "plan", plan, text, registers=False)
    model = command.add_mutually_exclusive_group(required=True)
    model.add_argument("model", nargs="?", help="folder of a model; its config.json is enough")
    model.add_argument("--preset", choices=("130b",), help="instead of a folder: GLM-130B")
    purpose = command.add_mutually_exclusive_group(required=True)
    purpose.add_argument(
        "--devices", metavar="LIST", help="such as 24GiB*4, or 24GiB,cpu=64GiB,disk; auto: GPUs of torch"
    )
    purpose.add_argument("--train", action="store_true", help="plan 3D training instead: memory, bubble and time")
    command.add_argument(
        *("--tensor", "--tp"), dest="tp_size", type=int, metavar="N", help="tensor-parallel ranks of every layer"
    )
    command.add_argument("--reserve", default="0.5GiB", metavar="SIZE", help="left free per device (default: 0.5GiB)")
    command.add_argument("--json", action="store_true", help="print the plan as JSON, sizes in bytes")
    command.set_defaults(
        device_options=add_device_options(command.add_argument_group("with --devices")),
        training_options=[
            *add_run_options(command.add_argument_group("with --train: the run")),
            *add_gpu_options(command.add_argument_group("with --train: the GPUs")),
        ],
    )


def add_device_options(group: Any) -> list[argparse.Action]:
    """Add and return the options of plans for devices alone."""
    return [
        group.add_argument("--bits", type=int, choices=(4, 8, 16), help="of the layers' weights (default: as stored)"),
        group.add_argument("--group-size", type=int, metavar="N", help="input features per scale (default: a row)"),
        group.add_argument("--quantize-embeddings", action="store_true", help="INT8 rows, besides --bits 4 or 8"),
        group.add_argument(
            "--context", type=int, metavar="N", help="prompt and answer (default: the model's longest)"
        ),
        group.add_argument("--batch", type=int, default=1, metavar="N", help="sequences times beams (default: 1)"),
    ]


def add_run_options(group: Any) -> list[argparse.Action]:
    """Add and return the options of a training run."""

    def add(*names: str, **options: Any) -> argparse.Action:
        return group.add_argument(*names, **options)

    recompute = group.add_mutually_exclusive_group()
    return [
        add("--pipeline", "--pp", dest="pp_size", type=int, metavar="N", help="pipeline stages (default: 1)"),
        add("--data", "--dp", dest="dp_size", type=int, metavar="N", help="replicas of the model (default: 1)"),
        add(
            "--sequence-parallel",
            action="store_true",
            default=None,
            help="norms and residuals of a share of the tokens on every tensor-parallel rank",
        ),
        add("--partition", type=integers, metavar="LIST", help="layers of every stage, such as 8,9,9,8"),
        add("--micro-batch", type=int, metavar="N", help="samples of a micro-batch (default: 1)"),
        add("--global-batch", type=int, metavar="N", help="samples of a step (default: a micro-batch per stage)"),
        add("--sequence", type=int, metavar="N", help="tokens of a sample (default: the model's longest)"),
        add("--precision", choices=("fp16", "bf16", "fp32"), help="of the weights (default: fp16)"),
        recompute.add_argument(
            "--recompute",
            choices=("full", "selective", "none"),
            help="what is recomputed of a layer: all, attention and the gate of the MLP, or nothing (default: full)",
        ),
        recompute.add_argument("--no-checkpointing", action="store_true", help="as --recompute none"),
        add("--target-share", type=float, metavar="X", help="share of the tokens that are predicted (default: 1)"),
        add("--schedule", help="1f1b as the trainer; to compare: gpipe, naive (default: 1f1b)"),
        add("--offload", choices=("none", "cpu", "nvme"), help="plan ZeRO-3 on --data GPUs, its state on these"),
        add("--timeline", metavar="FILE", help="write a PNG of when every stage computes"),
    ]


def add_gpu_options(group: Any) -> list[argparse.Action]:
    """Add and return the options that describe the GPUs of a training run."""

    def add(name: str, help_text: str, **options: Any) -> argparse.Action:
        return group.add_argument(name, help=help_text, **{"type": float, "metavar": "X", **options})

    return [
        add("--gpu", f"known kind (default: {DEFAULT_GPU}), whose figures the next replace", type=str, metavar="NAME"),
        add("--tflops", "peak in the precision of the run, 10^12 per second"),
        add("--gpu-memory", "memory of one GPU, such as 40GiB", type=str, metavar="SIZE"),
        add("--node-bandwidth", "within a node, each way, GB/s"),
        add("--link-bandwidth", "between nodes, per GPU and each way, GB/s"),
        add("--gpus-per-node", "GPUs of a node", type=int, metavar="N"),
        add("--compute-efficiency", "share of the peak (default: 0.5)"),
        add("--link-efficiency", "share of the bandwidth (default: 0.75)"),
    ]


def plan(options: argparse.Namespace) -> None:
    """Run `plan`."""
    from glm_hf.configuration_glm import GLMConfig
    from glm_hf.folders.validation import read_config

    require_options_of_one_plan(options)
    config = GLMConfig() if options.model is None else read_config(options.model)
    if options.train:
        plan_training(options, config)
    else:
        plan_inference(options, config)


def require_options_of_one_plan(options: argparse.Namespace) -> None:
    """Raise ValueError if options of `plan --devices` and of `plan --train` are mixed."""
    theirs, here, there = (
        (options.device_options, "--train", "--devices")
        if options.train
        else (options.training_options, "--devices", "--train")
    )
    for action in theirs:
        if getattr(options, action.dest) != action.default:
            raise ValueError(f"{action.option_strings[0]} belongs to {there}, not to {here}")


def plan_inference(options: argparse.Namespace, config: "GLMConfig") -> None:
    """Run `plan --devices`."""
    from glm_hf.planning import plan_devices
    from glm_hf.planning.devices import parse_devices, parse_size

    settings = {action.dest: getattr(options, action.dest) for action in options.device_options}
    planned = plan_devices(
        config,
        parse_devices(options.devices),
        **settings,
        tp_size=options.tp_size,
        reserve=parse_size(options.reserve),
    )
    print(json.dumps(planned.to_dict()) if options.json else planned.describe())
    if not planned.fits:
        raise ValueError(f"does not fit: {planned.advice()}")
    if not options.json:
        print(f"\n{planned.usage(options.model or 'FOLDER')}")


def plan_training(options: argparse.Namespace, config: "GLMConfig") -> None:
    """Run `plan --train`."""
    from glm_hf.planning.devices import parse_size
    from glm_hf.planning.timeline import plot_timeline
    from glm_hf.planning.training import TrainingPlan, TrainingRequest
    from glm_hf.planning.training_offload import OffloadPlan
    from glm_hf.sharding.degrees import ParallelDegrees

    if options.timeline is not None and find_spec("matplotlib") is None:
        raise ValueError("--timeline needs matplotlib: pip install 'glm-hf[plot]'")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{options.model} is quantized, whose weights cannot be trained; give the model that is not")
    degrees = ParallelDegrees(**given(options, DEGREES))
    micro_batch = 1 if options.micro_batch is None else options.micro_batch
    per_round = micro_batch * degrees.dp_size * degrees.pp_size
    request = TrainingRequest(
        config,
        degrees,
        machine_of(options),
        micro_batch,
        per_round if options.global_batch is None else options.global_batch,
        config.max_position_embeddings if options.sequence is None else options.sequence,
        recompute="none" if options.no_checkpointing else options.recompute or "full",
        reserve=parse_size(options.reserve),
        **given(options, REQUEST),
    )
    if options.offload is not None and options.timeline is not None:
        raise ValueError("--timeline is of a pipeline, which --offload has not")
    planned: TrainingPlan | OffloadPlan = TrainingPlan(request)
    if options.offload is not None:
        planned = OffloadPlan(request, options.offload)
    print(json.dumps(planned.to_dict()) if options.json else planned.describe())
    if options.timeline is not None and isinstance(planned, TrainingPlan):
        plot_timeline(planned.run, options.timeline, f"{degrees.describe()}, {request.schedule}")
    if not planned.fits:
        raise ValueError(f"does not fit: {planned.advice()}")


def given(options: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the options of these names that were given."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def machine_of(options: argparse.Namespace) -> "Machine":
    """Return the GPUs that the options describe: a known kind, with the given figures in the place of its own."""
    from dataclasses import replace

    from glm_hf.planning.devices import parse_size
    from glm_hf.planning.training_time import GPUS, Machine

    name = DEFAULT_GPU if options.gpu is None else options.gpu
    if name not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, or one of them with its figures replaced, got {name}")
    changes = given(options, GPU)
    if "gpu_memory" in changes:
        changes["memory"] = parse_size(changes.pop("gpu_memory"))
    if "tflops" in changes:
        changes["tflops_fp32"] = changes["tflops"]
    if changes:
        changes["name"] = f"{name} (changed)"
    return Machine(replace(GPUS[name], **changes), **given(options, EFFICIENCIES))
