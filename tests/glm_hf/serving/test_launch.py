"""The command as a process: it says where it listens, finishes what is under way, and runs on several ranks."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from glm_hf.cli import main

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
FRANCE = {"model": "world_facts", "prompt": "The capital of France is [MASK].", "temperature": 0}


def heed_ctrl_c() -> None:
    """Undo what a shell does to processes that it runs behind, and their children: they ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def command(*words: str, launcher: tuple[str, ...] = ("-m", "glm_hf.cli")) -> Iterator[tuple[subprocess.Popen, str]]:
    """Start the command at any port; give the process and its address."""
    process = subprocess.Popen(
        [sys.executable, *launcher, "serve", "--port", "0", *words],
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=heed_ctrl_c,
    )
    try:
        for line in process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


def listening(url: str) -> None:
    """Wait until the server answers."""
    for _ in range(200):
        try:
            httpx.get(f"{url}/health").raise_for_status()
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("the server does not answer")


ONE = ("-m", "glm_hf.cli")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *ONE)


@pytest.mark.parametrize(
    ("number", "launcher"), [(signal.SIGTERM, ONE), (signal.SIGINT, ONE), (signal.SIGTERM, TORCHRUN)]
)
def test_what_is_under_way_is_answered_before_the_end(number, launcher):
    with command("--slots", "2", launcher=launcher) as (process, url):
        listening(url)
        lines: list[str] = []
        begun = threading.Event()

        def read() -> None:
            body = {**FRANCE, "prompt": "The", "max_tokens": 400, "temperature": 1, "seed": 1, "stream": True}
            body["logit_bias"] = {"0": -100}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    lines.append(line)
                    begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(30)
        process.send_signal(number)
        reader.join(60)
        assert [line for line in lines if line][-1] == "data: [DONE]"
        assert json.loads([line for line in lines if line][-2].removeprefix("data: "))["choices"][0]["finish_reason"]
        code = process.wait(20)
        assert code == 128 + number or launcher is TORCHRUN
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")


def test_ranks_of_torchrun_serve_one_model():
    with command("--slots", "4", launcher=TORCHRUN) as (process, url):
        listening(url)
        answers = [httpx.post(f"{url}/v1/completions", json=FRANCE, timeout=60).json() for _ in range(2)]
        assert [answer["choices"][0]["text"] for answer in answers] == ["Paris", "Paris"]
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def test_a_port_that_is_taken_is_an_error_of_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--model", "nowhere"], "no folder nowhere"),
        (["--port", "70000"], "--port is out of range"),
        (["--queue", "-1"], "--queue is out of range"),
        (["--max-length", "2"], "max_length must be from"),
        (["--host", "no.such.host.invalid"], "cannot listen at no.such.host.invalid"),
    ],
)
def test_wrong_options_are_errors_of_one_line(words, reason, capsys):
    assert main(["serve", *words]) == 1
    assert reason in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("glm_hf.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 1
    assert 'pip install "glm_hf[serve]"' in capsys.readouterr().err
