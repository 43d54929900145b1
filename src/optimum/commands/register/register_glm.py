"""`optimum-cli export glm-onnx`, which optimum finds in this folder (a namespace package: no `__init__.py` here)."""

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

TEXT = "Export GLM-130B to one ONNX graph with its cache."


class GLMONNXCommand(BaseOptimumCLICommand):
    """The subcommand of `glm-hf` under optimum's name."""

    COMMAND = CommandInfo(name="glm-onnx", help=TEXT)

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options."""
        from glm_hf.cli.onnx import add_settings

        parser.description = TEXT
        parser.add_argument("--model", "-m", required=True, metavar="DIR", help="model folder, quantized or not")
        parser.add_argument("output", metavar="OUT", help="new folder")
        add_settings(parser)

    def run(self) -> None:
        """Run the command as `glm-hf export-onnx`, with its errors of one line."""
        from glm_hf.cli import main

        options = self.args
        flags = [f"--{name}" for name in ("verify", "overwrite") if getattr(options, name)]
        values = ((name, getattr(options, name)) for name in ("dtype", "quantization", "opset"))
        settings = [f"--{name}={value}" for name, value in values if value is not None]
        sys.exit(main(["export-onnx", *settings, *flags, "--", options.model, options.output]))


REGISTER_COMMANDS = [(GLMONNXCommand, ExportCommand)]
