"""From the command to a running server: the model is loaded, on one process or on the ranks of torchrun."""

import signal
import socket
import sys
from ipaddress import ip_address
from typing import Any

import torch
import uvicorn

from glm_hf.conversion.loading import load, num_ranks
from glm_hf.decoding import Decoder, Engine, Request
from glm_hf.decoding.ranks import RankedEngine
from glm_hf.serving.app import build_app
from glm_hf.serving.metrics import Metrics
from glm_hf.serving.service import Settings
from glm_hf.serving.worker import Worker


def serve(
    model: str,
    settings: Settings,
    *,
    host: str,
    port: int,
    num_slots: int,
    max_length: int | None,
    queue_size: int,
    seconds_to_finish: int,
) -> None:
    """
    Serve a model until the process is told to end; requests under way are answered first.

    Under torchrun every process is a rank of the model, and the first of them serves.

    Args:
        model: Folder or Hub name of a model.
        settings: What the server is started with.
        host: Address to listen at.
        port: Port to listen at, 0 for any.
        num_slots: Choices that are decoded at once.
        max_length: Most tokens of a context and its answer, the model's window by default.
        queue_size: Choices that may wait for a slot.
        seconds_to_finish: Seconds for requests under way when the process is told to end.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it is damaged, or the settings are out of range.
        OSError: If nobody can listen at the address.
    """
    known = load(model)
    loaded, tokenizer = known.model, known.tokenizer
    devices = {parameter.device for parameter in loaded.parameters()}
    is_on_one_gpu = len(devices) == 1 and loaded.device.type == "cuda"  # whose steps can be captured as graphs
    options: dict[str, Any] = {"num_slots": num_slots, "max_length": max_length, "is_static": is_on_one_gpu}
    if num_ranks() > 1:
        engine = RankedEngine(loaded, **options)
        if torch.distributed.get_rank() > 0:
            for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 says when to end
                signal.signal(number, signal.SIG_IGN)
            engine.follow()
            return
        try:
            run(engine, tokenizer, settings, listen(host, port), queue_size, seconds_to_finish)
        finally:
            engine.stop()
    else:
        run(Engine(loaded, **options), tokenizer, settings, listen(host, port), queue_size, seconds_to_finish)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket at an address; OSError if it is taken or not of this machine."""
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(kind, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error
    return listener


def run(
    engine: Engine,
    tokenizer: Any,
    settings: Settings,
    listener: socket.socket,
    queue_size: int,
    seconds_to_finish: int,
) -> None:
    """Serve an engine at a socket."""
    warm_up(engine)
    metrics = Metrics(engine.cache.num_slots)
    worker = Worker(Decoder(engine), metrics, engine.cache.num_slots + queue_size)
    worker.start()
    app = build_app(worker, tokenizer, settings, metrics)
    host, port = listener.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    note(f"{settings.model_name} at http://{address}:{port}, with a page to try it; Ctrl-C ends it")
    if settings.api_key is None and not ip_address(host).is_loopback:
        note("everyone who reaches this address may use it; --api-key asks for a key")
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=seconds_to_finish,
        )
    )
    try:
        server.run(sockets=[listener])
    finally:
        worker.stop()


def warm_up(engine: Engine) -> None:
    """Decode a text, so that memory is taken and graphs are captured before anyone waits; MemoryError if short."""
    config, most = engine.config, min(4, engine.max_length - engine.num_virtual - 2)
    row = [config.gmask_token_id, config.sop_token_id]
    try:
        Decoder(engine).run([Request(row, max_new_tokens=most)])
    except torch.OutOfMemoryError as error:
        slots, length = engine.cache.num_slots, engine.max_length
        raise MemoryError(
            f"{slots} slots of {length} tokens do not fit the memory; lower --slots or --max-length"
        ) from error


def note(text: str) -> None:
    """Tell what is going on, on stderr."""
    if sys.stderr is not None:
        sys.stderr.write(f"glm-hf: {text}\n")
        sys.stderr.flush()
