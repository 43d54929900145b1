"""Processes of the command that are told to end, at any moment and also where a library does not let go."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [str(Path(sys.executable).with_name("glm-hf"))]
SENTENCES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
HANGS = """
import sys, ctypes
sys.argv[0] = "glm-hf"
from glm_hf import cli
from glm_hf.cli import signals
signals.patience[:] = [0.5]
def hang(arguments=None):
    print("begun", flush=True)
    {hang}
cli.main = hang
sys.exit(cli.run())
"""
LOSES_IT = """
    import time
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        raise TypeError("as torch does while it is imported")
"""


def heed_ctrl_c() -> None:
    """Undo what a shell does to processes that it runs behind, and their children: they ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(not Path(COMMAND[0]).exists(), reason="the command is not installed")
@pytest.mark.parametrize("number", SENTENCES, ids=lambda number: number.name)
@pytest.mark.parametrize("seconds", [0.05, 0.15, 0.6, 1.5])
def test_a_command_ends_with_a_sentence_from_its_start(number, seconds):
    process = subprocess.Popen(
        [*COMMAND, "fill"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
    )
    time.sleep(seconds)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    assert process.stderr.read().splitlines()[-1] == f"glm-hf: error: {SENTENCES[number]}"
    process.stdin.close()
    process.stderr.close()


@pytest.mark.parametrize("number", SENTENCES, ids=lambda number: number.name)
@pytest.mark.parametrize(
    "hang", ["ctypes.CDLL(None).sleep(60)", "import time; time.sleep(60)", "sys.stdin.read()", LOSES_IT]
)
def test_a_hanging_library_does_not_keep_it(number, hang):
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS.format(hang=hang)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (128 + number, "", f"glm-hf: error: {SENTENCES[number]}\n")
