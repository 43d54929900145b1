"""`fill` between other commands: whatever stdin, stdout and the locale are."""

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from glm_hf import cli

LINE = "the [MASK] of people\n"
CLOSED = "closed"


@dataclass
class Done:
    """How a process has ended."""

    returncode: int
    stdout: bytes
    stderr: bytes


@pytest.fixture(scope="module")
def _imported(model_folder) -> None:
    """Import once what every forked process would take seconds to import."""
    assert cli.main(["fill", "--model", str(model_folder), "--max-new-tokens", "2", LINE]) == 0


@pytest.fixture
def fill(_imported, model_folder, tmp_path) -> Callable[..., Done]:
    """Function that runs `fill` in a process of its own, with streams as a shell would give them."""

    def run(stdin: bytes | str, *options: str, stdout: str = "", stderr: str = "") -> Done:
        (tmp_path / "stdin").write_bytes(b"" if stdin == CLOSED else stdin)
        paths = [str(tmp_path / "stdin"), stdout or str(tmp_path / "stdout"), stderr or str(tmp_path / "stderr")]
        for name in ("stdout", "stderr"):
            (tmp_path / name).write_bytes(b"")
        pid = os.fork()
        if not pid:
            code = 99
            try:
                logging.getLogger().handlers.clear()
                streams = []
                for number, path in enumerate(paths):
                    os.close(number)
                    is_closed = path == CLOSED or (number == 0 and stdin == CLOSED)
                    os.dup2(os.open(os.devnull if is_closed else path, os.O_RDWR | os.O_CREAT), number)
                    file = open(number, "r+b" if number else "rb", buffering=0, closefd=False)
                    stream = io.TextIOWrapper(io.BufferedWriter(file) if number else io.BufferedReader(file))
                    streams.append(None if is_closed else stream)
                sys.stdin, sys.stdout, sys.stderr = streams
                sys.argv = ["glm-hf", "fill", "--model", str(model_folder), "--max-new-tokens", "2", *options]
                code = cli.run()
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        out, err = ((tmp_path / name).read_bytes() for name in ("stdout", "stderr"))
        return Done(os.waitstatus_to_exitcode(status), out, err)

    return run


def test_a_closed_stdin_is_one_line(fill):
    done = fill(CLOSED)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().splitlines() == [
        "glm-hf: error: stdin is closed; give texts as arguments, or lines on stdin"
    ]


@pytest.mark.parametrize("stdout", [CLOSED, "/dev/full"])
def test_answers_without_a_place_are_an_error(fill, stdout):
    done = fill(LINE.encode(), stdout=stdout)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


def test_a_closed_stderr_changes_nothing(fill):
    assert fill(LINE.encode(), stderr=CLOSED).stdout == fill(LINE.encode()).stdout
    assert fill(b"\xff\n", stderr=CLOSED).returncode == 1


def test_lines_before_a_bad_one_are_answered(fill):
    done = fill(LINE.encode() * 3 + b"a \xff [MASK]\n" + LINE.encode(), "--json")
    assert done.returncode == 1
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == [LINE.strip()] * 3
    [line] = done.stderr.decode().splitlines()
    assert line.startswith("glm-hf: error: text 4: it is not UTF-8: ")


def test_a_long_line_is_refused_in_little_memory(fill):
    done = fill(LINE.encode() + b"a" * 6_000_000 + b"\n")
    assert len(done.stdout.splitlines()) == 1
    [line] = done.stderr.decode().splitlines()
    assert line == "glm-hf: error: text 2: it has more than 100,000 bytes; split it, or raise --max-text-size"
    done = fill(b"a" * 50 + b"\n", "--max-text-size", "49")
    assert "more than 49 bytes" in done.stderr.decode()
    assert fill(b"a" * 49 + b"\r\n", "--max-text-size", "49").returncode == 0


def test_a_strict_locale_keeps_chinese(fill, model_folder: Path):
    text = "天地[MASK]好的"
    expected = fill(f"{text}\n".encode())
    assert expected.stdout.decode().startswith("天地")
    strict = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "glm_hf.cli", "fill", "--model", str(model_folder), "--max-new-tokens", "2"]
    for given, stdin in ([], f"{text}\n".encode()), ([text.encode()], b""):
        done = subprocess.run([*command, *given], input=stdin, capture_output=True, env=strict, check=False)
        assert (done.returncode, done.stdout) == (0, expected.stdout)
