"""
CPU seconds of a process until the command or the package is ready, beside peers, each in a process of its own.

    python benchmarks/startup.py [--rounds 7]

Processes take turns; medians of user and system time together, and the ratio to the peer named behind.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

BIN = Path(sys.executable).parent
PEER = "from transformers import GPTNeoXForCausalLM, AutoTokenizer, pipeline"
COMMANDS = {
    "hf --help": [BIN / "hf", "--help"],
    "glm-hf --help": [BIN / "glm-hf", "--help"],
    "glm-hf fill --nonsense": [BIN / "glm-hf", "fill", "--nonsense"],
    "glm-hf plan --preset 130b --devices 24GiB*4": [
        *(BIN / "glm-hf", "plan", "--preset", "130b", "--devices", "24GiB*4", "--bits", "4"),
    ],
    "import torch": [sys.executable, "-c", "import torch"],
    PEER: [sys.executable, "-c", PEER],
    "import glm_hf": [sys.executable, "-c", "import glm_hf"],
}


def cpu_seconds(command: list[str | Path]) -> float:
    """Run a command and return the user and system time of its process."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd=Path(__file__).parent
    )
    _, _, usage = os.wait4(process.pid, 0)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            seconds[name].append(cpu_seconds(command))
    print(f"{'process':<72} CPU seconds")
    for name, values in seconds.items():
        print(f"{name:<72} {median(values):11.2f}")
    print(f"import glm_hf / peer: {median(seconds['import glm_hf']) / median(seconds[PEER]):.2f}")


if __name__ == "__main__":
    main()
