"""Take the picture of the server's page: `python docs/images/page.py` writes page.png beside it; needs Chromium."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parents[1] / "tests" / "support"))

from running_server import load, serving  # noqa: E402, found by the path above

TEXT = "The currency of Thailand is the [MASK] and its capital is [MASK]."


def main() -> None:
    """Fill a text and show the answers for its second blank."""
    with serving(*load(), num_slots=8, model_name="world_facts") as running, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_context(locale="en-US", viewport={"width": 760, "height": 800}).new_page()
        page.goto(running.url)
        page.locator("#text").fill(TEXT)
        page.keyboard.press("Control+Enter")
        page.locator("#status", has_text="Done").wait_for()
        page.locator(".blank").nth(1).click()
        page.screenshot(path=FOLDER / "page.png", full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
