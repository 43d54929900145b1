"""Every command and snippet of the README and the pages of docs/ runs and prints what the page shows.

Blocks marked `python` run in one namespace per page; an unmarked block behind one is what it prints. Blocks marked
`console` hold commands behind `$` and what they print on stdout, and the line of an error. `...` stands for anything.
Blocks marked `bash` need weights, processes or machines that are not here: of them, the options are checked. A page
that asks a server is given one of the small model.
"""

import argparse
import io
import re
import shlex
import shutil
import subprocess
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from running_server import load, serving

from glm_hf.cli import main
from glm_hf.cli.parser import build_parser

ROOT = Path(__file__).parents[1]
SERVER = "http://127.0.0.1:8000"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)")


def blocks_of(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def pages_with(*languages: str) -> list:
    found = [page for page in PAGES if {language for language, _ in blocks_of(page)} & set(languages)]
    return [pytest.param(page, id=page.stem) for page in found]


def assert_prints(printed: str, shown: str) -> None:
    """Check that what was printed is what the page shows."""
    lines = [".*" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*?") for line in shown.splitlines()]
    pattern = "\n".join(lines).replace("\n.*\n", "\n(?:.*\n)*?").removeprefix(".*\n")
    prefix = "(?:.*\n)*?" if shown.startswith("...") else ""
    assert re.fullmatch(prefix + pattern + "\n?", printed), f"printed:\n{printed}\nshown:\n{shown}"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty current folder from which the examples can be seen."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(code: str, namespace: dict, page: Path) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(code, str(page), "exec"), namespace)
    return printed.getvalue()


def run_command(line: str) -> str:
    """Run a `glm-hf` command in this process, or curl; return what it prints, its error in the last line."""
    program, *words = shlex.split(line)
    if program == "curl":
        return subprocess.run([program, *words], capture_output=True, text=True, check=True).stdout
    assert program == "glm-hf", line
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        main(words)
    errors = [line for line in err.getvalue().splitlines() if line.startswith("glm-hf: error:")]
    return "\n".join((out.getvalue().rstrip("\n"), *errors))


@pytest.mark.parametrize("page", pages_with("python", "console"))
def test_snippets_and_commands_print_what_the_page_shows(page, folder):
    blocks = blocks_of(page)
    namespace: dict = {}
    with ExitStack() as stack:
        if any(SERVER in content for _, content in blocks):
            url = stack.enter_context(serving(*load(), model_name="world_facts")).url
            blocks = [(language, content.replace(SERVER, url)) for language, content in blocks]
        run_blocks(page, blocks, namespace)


def run_blocks(page: Path, blocks: list[tuple[str, str]], namespace: dict) -> None:
    """Run the snippets and commands of a page, and check what they print."""
    for (language, content), (next_language, shown) in zip(blocks, [*blocks[1:], ("end", "")], strict=True):
        if language == "python":
            printed = run_python(content, namespace, page)
            assert_prints(printed, "" if next_language else shown.rstrip("\n"))
        elif language == "console":
            for part in content.removeprefix("$ ").split("\n$ "):
                command, _, shown_lines = part.partition("\n")
                if command.startswith("curl") and shutil.which("curl") is None:
                    continue
                assert_prints(run_command(command), shown_lines.rstrip("\n"))


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_that_are_not_run_have_known_options(page):
    for language, content in blocks_of(page):
        for line in content.splitlines() if language == "bash" else ():
            words = shlex.split(line, comments=True)
            if "glm_hf.cli" in words:
                words = ["glm-hf", *words[words.index("glm_hf.cli") + 1 :]]
            if words[0] == "glm-hf":
                assert isinstance(build_parser().parse_args(words[1:]), argparse.Namespace)
            elif words[0] == "make":
                assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
            else:
                assert words[0] in ("pip", "deepspeed", "torchrun", "optimum-cli", "export"), line


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in (*PAGES, ROOT / "CONTRIBUTING.md")])
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_make_targets_in_the_pages_are_there():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"`make ([\w-]+)", page.read_text(encoding="utf-8")):
            assert f"\n{target}:" in makefile, target


def test_pictures_are_those_that_the_script_draws():
    namespace: dict = {"__name__": "draw", "__file__": str(ROOT / "docs" / "images" / "draw.py")}
    exec((ROOT / "docs" / "images" / "draw.py").read_text(), namespace)
    assert (ROOT / "docs" / "images" / "rooms.svg").read_text() == namespace["draw_rooms"]()
    assert (ROOT / "docs" / "images" / "layout.svg").read_text() == namespace["draw_layout"]()
