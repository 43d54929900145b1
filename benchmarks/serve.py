"""Throughput of the server with many clients over what its kernels allow, and the time to a first token under load.

A random INT4 model (INT8 LM head) is served by a process of its own; another one holds the clients, which stream over
HTTP. While all of them get tokens, the tokens per second are compared with those of the kernels alone: the time in the
layers' one call and the LM head's product, taken in the same steps. `of the kernels` is that share, for one client and
for many; `gain` is how many times the tokens of one client many get, and `possible` what the kernels' times allow.

The time to a first token is taken of a request that comes while all slots but a few are decoding, beside another that
comes at the same moment; it should take no longer than one step, its own reading and that of the other.
Run: make bench-serve (some minutes)
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from contextlib import suppress
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from decode import processor, write_models

from glm_hf import GLMForBlankInfilling
from glm_hf.decoding import Decoder, Engine
from glm_hf.serving.app import build_app
from glm_hf.serving.launch import listen
from glm_hf.serving.metrics import Metrics
from glm_hf.serving.service import Settings
from glm_hf.serving.worker import Worker

PROMPT, NEW = 32, 48  # tokens


class Numbers:
    """What stands for a tokenizer: ids as decimal numbers."""

    all_special_ids = ()

    def decode(self, ids: list[int]) -> str:
        """Return the ids with blanks behind them."""
        return "".join(f"{token_id} " for token_id in ids)


class Timed:
    """
    A function whose calls are timed, by their number of rows.

    Args:
        function: The function, whose argument `place` has a row for every slot.
        calls: List of rows and seconds that is filled.
        place: Number of this argument.
    """

    def __init__(self, function: Any, calls: list[tuple[int, float]], place: int) -> None:
        self.function, self.calls, self.place = function, calls, place

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call it."""
        start = time.perf_counter()
        result = self.function(*arguments, **options)
        self.calls.append((len(arguments[self.place]), time.perf_counter() - start))
        return result


def serve(folder: Path, slots: int, threads: int, pipe: Connection) -> None:
    """Serve; send the port, and the kernels' calls since the last time whenever asked."""
    torch.set_num_threads(threads)
    model = GLMForBlankInfilling.from_pretrained(folder, dtype=torch.bfloat16).eval()
    layers: list[tuple[int, float]] = []
    heads: list[tuple[int, float]] = []
    model.model.fused_step = Timed(model.model.fused_step, layers, 1)
    model.lm_head.forward = Timed(model.lm_head.forward, heads, 0)
    metrics = Metrics(slots)
    worker = Worker(Decoder(Engine(model, slots)), metrics, 4 * slots)
    worker.start()
    listener = listen("127.0.0.1", 0)
    app = build_app(worker, Numbers(), Settings("glm"), metrics)

    def answer() -> None:
        pipe.send(listener.getsockname()[1])
        with suppress(EOFError):
            while True:
                pipe.recv()
                pipe.send((list(layers), list(heads)))
                layers.clear()
                heads.clear()

    threading.Thread(target=answer, daemon=True).start()
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


async def stream(client: httpx.AsyncClient, number: int, new: int, times: list[float]) -> None:
    """Ask for tokens, and note when each of them comes."""
    prompt = [5 + (number * 37 + place * 11) % 30000 for place in range(PROMPT)]
    body = {"model": "glm", "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["text"]:
                times.append(time.perf_counter())


async def tokens_per_second(url: str, clients: int) -> float:
    """Return the tokens per second while all clients get some."""
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        times: list[list[float]] = [[] for _ in range(clients)]
        await asyncio.gather(*(stream(client, number, NEW, times[number]) for number in range(clients)))
    begin, end = max(each[0] for each in times), min(each[-1] for each in times)
    return sum(begin < moment <= end for each in times for moment in each) / (end - begin)


async def first_token(url: str, clients: int, pairs: int) -> tuple[float, list[float]]:
    """Return the time to the first token of a lone request, and of two at once beside `clients` others."""
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=None)) as client:

        async def one(number: int) -> float:
            times: list[float] = []
            start = time.perf_counter()
            await stream(client, number, 1, times)
            return times[0] - start

        alone = statistics.median([await one(1000 + number) for number in range(pairs)])
        busy = [asyncio.create_task(stream(client, number, 400, [])) for number in range(clients)]
        await asyncio.sleep(10)
        found: list[float] = []
        for number in range(pairs):
            found += await asyncio.gather(one(2000 + number), one(3000 + number))
            await asyncio.sleep(0.37)
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
    return alone, found


def kernel_seconds(calls: tuple[list[tuple[int, float]], list[tuple[int, float]]], rows: int) -> float:
    """Return the median time that layers and LM head take for a step of so many rows."""
    return sum(statistics.median(seconds for count, seconds in part if count == rows) for part in calls)


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Print the tables."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    server = context.Process(target=serve, args=(folder, options.clients, options.threads, other), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{pipe.recv()}"
    rates: dict[int, list[float]] = {1: [], options.clients: []}
    allowed: dict[int, list[float]] = {1: [], options.clients: []}
    for _ in range(options.rounds + 1):
        for clients in rates:
            pipe.send(None)
            pipe.recv()
            rates[clients].append(asyncio.run(tokens_per_second(url, clients)))
            pipe.send(None)
            allowed[clients].append(clients / kernel_seconds(pipe.recv(), clients))
    print(f"{'clients':>8} {'tokens/s':>9} {'kernels':>9} {'of the kernels':>15}")
    for clients in rates:
        pairs = list(zip(rates[clients][1:], allowed[clients][1:], strict=True))
        rate, possible, share = map(statistics.median, zip(*((a, b, a / b) for a, b in pairs), strict=True))
        print(f"{clients:>8} {rate:>9.1f} {possible:>9.1f} {share:>15.2f}")
    many = options.clients
    gains = [a / b for a, b in zip(rates[many][1:], rates[1][1:], strict=True)]
    allowing = [a / b for a, b in zip(allowed[many][1:], allowed[1][1:], strict=True)]
    share = statistics.median(a / b for a, b in zip(gains, allowing, strict=True))
    print(f"gain {statistics.median(gains):.2f}, possible {statistics.median(allowing):.2f}: {share:.2f} of it\n")
    step = statistics.median(many / rate for rate in rates[many][1:])
    alone, found = asyncio.run(first_token(url, many - 2, 8))
    bound = step + 2 * alone
    print(f"step of {many}: {step * 1e3:.0f} ms; first token alone: {alone * 1e3:.0f} ms")
    print(
        f"first token of two at once beside {many - 2}: median {statistics.median(found) * 1e3:.0f} ms, "
        f"longest {max(found) * 1e3:.0f} ms; step and both readings: {bound * 1e3:.0f} ms"
    )
    server.terminate()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        writer = multiprocessing.get_context("spawn").Process(target=write_models, args=(Path(folder), options.layers))
        writer.start()
        writer.join()
        print(f"{date.today()}, {processor()}, torch {torch.__version__}, {options.threads} threads; ", end="")
        print(f"{options.layers} layers of INT4, median of {options.rounds}\n")
        compare(options, Path(folder, "int4+head"))
