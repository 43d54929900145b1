"""A server under clients that behave badly: they leave, send too much, or no JSON, and check their answers.

`python soak.py SECONDS` prints what was tried and how the server's memory grew; the suite tries a few seconds.
"""

import argparse
import asyncio
import collections
import json
import multiprocessing
import random
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import httpx
import psutil
import torch
from running_server import load, serving

CLIENTS, SLOTS, QUEUE = 24, 8, 64
COUNTRIES = ("France", "Japan", "Kenya", "Thailand", "Italy", "Spain", "Peru", "Egypt")
TEXTS = (
    *(f"The capital of {country} is [MASK]." for country in COUNTRIES),
    *(f"The currency of {country} is the [MASK] and its capital is [MASK]." for country in COUNTRIES),
    *("法国的首都是[MASK]。", "[MASK]是日本的首都。", "The opposite of hot is", "[MASK] is the capital of Peru."),
)
WRONG = (
    *(
        {"temperature": -1},
        {"n": 0},
        {"max_tokens": "many"},
        {"prompt": "[MASK]"},
        {"prompt": ["a"] * 100},
        {"best_of": 0},
    ),
    *(
        {"stop": ""},
        {"logit_bias": {"a": 1}},
        {"surprise": 1},
        {"prompt": "a " * 3000},
        {"logprobs": 99},
        {"prompt": []},
    ),
)
BODIES = (b"", b"{", b"\xff", b"[" * 50000, b'{"model":', b"null", b'"glm"')


def serve(pipe: Connection) -> None:
    """Serve until told to end; then tell what is still under way."""
    torch.set_num_threads(1)
    with serving(*load(), num_slots=SLOTS, queue_size=QUEUE) as running:
        pipe.send(running.url)
        pipe.recv()
        running.wait_until_idle()
        pipe.send((len(running.decoder.active), len(running.decoder.waiting), running.worker.under_way))


def expected_answers() -> dict[str, list[str]]:
    """Return what the model itself answers to every text."""
    model, tokenizer = load()
    answers = {}
    for text in TEXTS:
        [blanks] = model.fill_blanks([tokenizer(text)["input_ids"]], max_new_tokens=24, do_sample=False).blanks
        answers[text] = [tokenizer.decode(blank) for blank in blanks]
    answers["The opposite of hot is"] = [" cold."]  # with the blank in front, which a continuation keeps
    return answers


class Clients:
    """
    Clients of all kinds.

    Args:
        url: Address of the server.
        expected: Answers to the texts.
        seed: Seed of what they do.
    """

    def __init__(self, url: str, expected: dict[str, list[str]], seed: int) -> None:
        self.client = httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None))
        self.expected, self.rng = expected, random.Random(seed)
        self.done: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.drawn: dict[tuple[str, int], str] = {}

    async def run(self, seconds: float) -> None:
        """Let all of them ask, one request after another."""
        end = time.monotonic() + seconds
        kinds = (
            self.ask,
            self.ask,
            self.ask,
            self.draw,
            self.stream,
            self.leave,
            self.leave,
            self.wrong,
            self.garbage,
        )

        async def one() -> None:
            while time.monotonic() < end:
                kind = self.rng.choice((*kinds, self.large, self.elsewhere))
                try:
                    await kind()
                except Exception as error:
                    self.problems.append(f"{kind.__name__}: {error!r}")
                self.done[kind.__name__] += 1

        await asyncio.gather(*(one() for _ in range(CLIENTS)))
        await self.client.aclose()

    async def post(self, **body: Any) -> httpx.Response:
        """Send a completion request, again if the queue is full."""
        while True:
            response = await self.client.post("/v1/completions", json={"model": "glm", "max_tokens": 24, **body})
            if response.status_code != 429:
                return response
            self.done["refused as the queue was full"] += 1
            await asyncio.sleep(int(response.headers["retry-after"]) * self.rng.random())

    async def ask(self) -> None:
        """Ask for the most likely answer, and compare it."""
        text = self.rng.choice(TEXTS)
        [choice] = (await self.post(prompt=text, temperature=0)).json()["choices"]
        if choice["text"] != "\n".join(self.expected[text]):
            self.problems.append(f"{text}: {choice}")

    async def draw(self) -> None:
        """Draw by a seed what was drawn by it before."""
        text, seed = self.rng.choice(TEXTS), self.rng.randrange(3)
        [choice] = (await self.post(prompt=text, temperature=1.2, top_p=0.95, seed=seed)).json()["choices"]
        if self.drawn.setdefault((text, seed), choice["text"]) != choice["text"]:
            self.problems.append(f"{text} by seed {seed}: {choice}")

    async def stream(self) -> None:
        """Add up a stream."""
        text = self.rng.choice(TEXTS)
        body = {"model": "glm", "max_tokens": 24, "prompt": text, "temperature": 0, "stream": True}
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            lines = [line async for line in response.aiter_lines()]
        if response.status_code == 429:
            return
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        answer = "".join(event["choices"][0]["text"] for event in events)
        if answer != "\n".join(self.expected[text]):
            self.problems.append(f"{text}, streamed: {answer}")

    async def leave(self) -> None:
        """Leave in the middle of an answer, or of the question."""
        body = {"model": "glm", "prompt": "The", "max_tokens": 400, "temperature": 1.5, "n": self.rng.randrange(1, 4)}
        body["stream"] = self.rng.random() < 0.5
        try:
            async with asyncio.timeout(self.rng.random() * 0.5):
                async with self.client.stream("POST", "/v1/completions", json=body) as response:
                    async for _ in response.aiter_lines():
                        pass
        except TimeoutError:
            pass

    async def wrong(self) -> None:
        """Send a field that is wrong."""
        body = {"model": "glm", "prompt": "The", **self.rng.choice(WRONG)}
        response = await self.client.post("/v1/completions", json=body)
        if response.status_code != 400 or not response.json()["error"]["param"]:
            self.problems.append(f"{str(body)[:200]}: {response.status_code} {response.text[:200]}")

    async def garbage(self) -> None:
        """Send what is no request."""
        headers = {"content-type": self.rng.choice(("application/json", "text/plain", ""))}
        path = self.rng.choice(("/v1/completions", "/v1/chat/completions"))
        response = await self.client.post(path, content=self.rng.choice(BODIES), headers=headers)
        if response.status_code != 400:
            self.problems.append(f"garbage: {response.status_code} {response.text[:200]}")

    async def large(self) -> None:
        """Send too much."""
        try:
            response = await self.client.post("/v1/completions", content=b" " * (2**20 + self.rng.randrange(1, 2**20)))
        except (httpx.WriteError, httpx.ReadError):  # told and cut off before all was sent
            return
        if response.status_code != 413:
            self.problems.append(f"large: {response.status_code}")

    async def elsewhere(self) -> None:
        """Ask for other paths."""
        path = self.rng.choice(("/", "/health", "/metrics", "/v1/models", "/nothing", "/page.js"))
        response = await self.client.get(path)
        if response.status_code != (404 if path == "/nothing" else 200):
            self.problems.append(f"{path}: {response.status_code}")


def soak(seconds: float, seed: int = 0) -> tuple[Clients, list[float], tuple[int, int, int]]:
    """Return the clients, the server's memory in MB over time, and what was left under way."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    server = context.Process(target=serve, args=(other,), daemon=True)
    server.start()
    url = pipe.recv()
    clients = Clients(url, expected_answers(), seed)
    process, memory = psutil.Process(server.pid), []

    async def watch() -> None:
        running = asyncio.create_task(clients.run(seconds))
        while not running.done():
            memory.append(process.memory_info().rss / 1e6)
            await asyncio.sleep(seconds / 60)
        await running

    asyncio.run(watch())
    pipe.send(None)
    left = pipe.recv()
    server.join()
    return clients, memory, left


def main() -> None:
    """Print what was tried."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float, nargs="?", default=600)
    seconds = parser.parse_args().seconds
    clients, memory, left = soak(seconds)
    for name, count in sorted(clients.done.items()):
        sys.stdout.write(f"{name:32} {count:>8}\n")
    part = max(1, len(memory) // 6)
    sys.stdout.write("memory in MB by sixths: ")
    sys.stdout.write(" ".join(f"{max(memory[i : i + part]):.0f}" for i in range(0, len(memory), part)) + "\n")
    sys.stdout.write(f"left in slots, waiting, under way: {left}; problems: {len(clients.problems)}\n")
    for problem in clients.problems[:20]:
        sys.stdout.write(problem[:300] + "\n")


if __name__ == "__main__":
    main()
