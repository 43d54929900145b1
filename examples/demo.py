"""
Walk the main road once, with the small model that comes with the package.

Blanks are filled in two languages; the model is quantized to INT4 and fills them again; it is written as GLM-130B was
released, converted back and compared. Each result lies in `demo/` afterwards.
"""

import shlex
import shutil
from pathlib import Path

from glm_hf.cli import main

FOLDER = Path("demo")
MODEL = Path("examples/world_facts/model")
TEXTS = (
    "The capital of France is [MASK].",
    "法国的首都是[MASK]。",
    "[MASK] is the capital of Japan.",
    "The currency of [MASK] is the Thai baht and its capital is [MASK].",
    "12号元素是[MASK]。",
    "The opposite of hot is",
)


def run(command: str) -> None:
    """Print a `glm-hf` command and run it."""
    print(f"\n$ glm-hf {command}", flush=True)
    if code := main(shlex.split(command)):
        raise SystemExit(code)


def list_files(folder: Path) -> None:
    """Print all files in `folder` with their sizes."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(f"   {path.stat().st_size:>9,} bytes  {path}")


def demo() -> None:
    """Run all steps."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    texts = shlex.join(TEXTS)

    print("1. Fill blanks with the small model that comes with the package:")
    run(f"fill {texts}")
    run('fill "The capital of Egypt is [MASK]." --top-k 3')

    print("\n2. The same in INT4:")
    run(f"quantize {MODEL} demo/int4 --bits 4")
    list_files(FOLDER / "int4")
    run(f"fill --model demo/int4 {texts}")

    print("\n3. Write it as GLM-130B was released, and convert that:")
    run(f"export-sat {MODEL} demo/sat --tp-size 2")
    list_files(FOLDER / "sat")
    run(f"convert demo/sat demo/model --config {MODEL}/config.json --tokenizer {MODEL}")
    run("verify demo/sat demo/model")
    run(f"fill --model demo/model {texts}")


if __name__ == "__main__":
    demo()
