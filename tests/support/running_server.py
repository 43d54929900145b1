"""A server in this process, at a port of its own, and the small model of world facts that it serves."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
import uvicorn
from transformers import AutoModelForCausalLM, AutoTokenizer

from glm_hf.decoding import Decoder, Engine
from glm_hf.serving.app import build_app
from glm_hf.serving.launch import listen
from glm_hf.serving.metrics import Metrics
from glm_hf.serving.service import Settings
from glm_hf.serving.worker import Worker

FOLDER = str(files("glm_hf") / "world_facts")


@dataclass
class Running:
    """A server that runs."""

    url: str
    worker: Worker
    metrics: Metrics

    @property
    def decoder(self) -> Decoder:
        return self.worker.decoder

    def wait_until_idle(self, seconds: float = 20) -> None:
        """Wait until nothing is decoded or counted as under way."""
        end = time.monotonic() + seconds
        while not self.decoder.is_idle or self.worker.under_way:
            assert time.monotonic() < end, (len(self.decoder.active), len(self.decoder.waiting), self.worker.under_way)
            time.sleep(0.01)


def load() -> tuple[Any, Any]:
    """Return model and tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(FOLDER)


@contextmanager
def serving(
    model: Any, tokenizer: Any, num_slots: int = 4, queue_size: int = 64, **settings: Any
) -> Iterator[Running]:
    """Serve a model as long as the context lasts."""
    metrics = Metrics(num_slots)
    worker = Worker(Decoder(Engine(model, num_slots)), metrics, num_slots + queue_size)
    worker.start()
    listener = listen("127.0.0.1", 0)
    app = build_app(worker, tokenizer, Settings(**{"model_name": "glm", **settings}), metrics)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", worker, metrics)
    finally:
        server.should_exit = True
        thread.join()
        worker.stop()
