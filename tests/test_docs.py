"""The Python snippets of docs/ print what the page says."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if "```python" in page.read_text(encoding="utf-8"))
SNIPPETS = re.compile(r"```python\n(.*?)```\n(?:```\n(.*?)```)?", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_print_what_the_page_says(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    snippets = SNIPPETS.findall(page.read_text(encoding="utf-8"))
    namespace: dict = {}
    for code, expected in snippets:
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), namespace)
        assert printed.getvalue() == expected
