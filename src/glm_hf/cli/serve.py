"""Subcommand `serve`."""

import argparse
import os
from importlib.resources import files
from typing import Any

from glm_hf.cli import signals
from glm_hf.cli.commands import add_command, positive


def add_serve(commands: Any) -> None:
    """Add `serve`."""
    command = add_command(
        commands, "serve", serve, "Serve a model by an OpenAI-compatible API, with a page to try it."
    )
    command.add_argument(
        "--model", metavar="FOLDER", help="folder or Hub name of a model (default: a small one that comes with glm_hf)"
    )
    command.add_argument("--name", help="name of the model in requests (default: that of its folder)")
    command.add_argument("--slots", type=positive, default=32, metavar="N", help="texts decoded at once (default: 32)")
    command.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    command.add_argument("--port", type=int, default=8000, metavar="N", help="port, 0 for any (default: 8000)")
    command.add_argument(
        "--api-key", metavar="KEY", help="key that requests must bring (default: GLM_HF_API_KEY, or none)"
    )
    command.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="most tokens of a text and its answer (default: the model's window)",
    )
    command.add_argument(
        "--queue", type=int, default=256, metavar="N", help="texts that may wait; others are told to (default: 256)"
    )
    command.add_argument(
        "--max-body-size", type=int, default=2**20, metavar="N", help="largest request in bytes (default: 1048576)"
    )
    command.add_argument(
        "--timeout", type=float, default=600, metavar="S", help="seconds that a request may take (default: 600)"
    )
    command.add_argument(
        "--shutdown-timeout",
        type=int,
        default=60,
        metavar="S",
        help="seconds to answer what is under way when told to end (default: 60)",
    )


def serve(options: argparse.Namespace) -> None:
    """Run `serve`."""
    for name in ("port", "queue", "max_body_size", "timeout", "shutdown_timeout"):
        if (value := getattr(options, name)) < 0 or (name == "port" and value > 65535):
            raise ValueError(f"--{name.replace('_', '-')} is out of range: {value}")
    try:
        from glm_hf.serving.launch import serve
        from glm_hf.serving.service import Settings
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'serving needs {error.name}: pip install "glm_hf[serve]"') from error

    signals.wait_longer(options.shutdown_timeout)
    model = str(files("glm_hf") / "world_facts") if options.model is None else options.model
    folder_name = os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model
    settings = Settings(
        model_name=options.name or folder_name,
        api_key=options.api_key or os.environ.get("GLM_HF_API_KEY"),
        most_bytes=options.max_body_size,
        timeout=options.timeout,
    )
    serve(
        model,
        settings,
        host=options.host,
        port=options.port,
        num_slots=options.slots,
        max_length=options.max_length,
        queue_size=options.queue,
        seconds_to_finish=options.shutdown_timeout,
    )
