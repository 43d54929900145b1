"""The parser of all subcommands."""

import argparse

import glm_hf
from glm_hf.cli.checkpoints import add_convert, add_export_3d, add_export_sat, add_reshard, add_verify
from glm_hf.cli.evaluate import add_evaluate
from glm_hf.cli.fill import add_fill
from glm_hf.cli.hub import add_export_hub
from glm_hf.cli.onnx import add_export_onnx
from glm_hf.cli.plan import add_plan
from glm_hf.cli.quantization import add_analyze, add_quantize
from glm_hf.cli.serve import add_serve
from glm_hf.cli.train import add_report, add_tokenize, add_train


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="glm-hf", description="GLM-130B in Hugging Face transformers.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {glm_hf.__version__}")
    parser.add_argument(
        "--local_rank", help=argparse.SUPPRESS
    )  # from DeepSpeed's launcher, which sets LOCAL_RANK, too
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        *(add_convert, add_quantize, add_analyze, add_export_sat, add_reshard, add_verify),
        *(add_fill, add_evaluate, add_serve, add_export_hub, add_export_onnx),
        *(add_plan, add_tokenize, add_train, add_report, add_export_3d),
    ):
        add(commands)
    return parser
