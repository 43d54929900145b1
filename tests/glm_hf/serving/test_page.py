"""The page in a browser, used by the keyboard alone; a machine without Chromium skips these tests."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from running_server import Running, load, serving

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
TWO = "The currency of Thailand is the [MASK] and its capital is [MASK]."


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load()


@pytest.fixture(scope="module")
def server(loaded) -> Iterator[Running]:
    with serving(*loaded, num_slots=8) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """The page in a tab of its own, which fails a test by any error of its script or request to elsewhere."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.tab = browser.new_context(**{"locale": "en-US", **options}).new_page()
        self.problems: list[str] = []
        self.tab.on("pageerror", lambda error: self.problems.append(str(error)))
        self.tab.on("request", lambda request: self._check(request.url, url))
        self.tab.goto(url)
        self.tab.locator("#model", has_text="glm").wait_for()

    def _check(self, requested: str, url: str) -> None:
        if not requested.startswith((url, "data:")):
            self.problems.append(f"request to {requested}")

    def fill(self, text: str) -> None:
        self.tab.locator("#text").focus()
        self.tab.keyboard.press("Control+A")
        self.tab.keyboard.type(text)
        self.tab.keyboard.press("Control+Enter")
        self.wait()

    def wait(self) -> None:
        self.tab.locator("#status", has_text="Done").or_(self.tab.locator("#status", has_text="完成")).wait_for()

    @property
    def output(self) -> str:
        return self.tab.locator("#output").inner_text()


@pytest.fixture
def page(browser, server) -> Iterator[Page]:
    page = Page(browser, server.url)
    yield page
    assert page.problems == []


def test_blanks_are_filled_in_place(page):
    page.fill(TWO)
    assert page.output == "The currency of Thailand is the Thai baht and its capital is Bangkok."
    page.fill("The opposite of hot is")
    assert page.output == "The opposite of hot is cold."


def test_an_alternative_is_picked_by_the_keyboard_and_what_follows_is_filled_anew(page, loaded):
    page.fill(TWO)
    page.tab.locator(".blank").first.focus()
    page.tab.keyboard.press("Enter")
    options = page.tab.get_by_role("option")
    answers = [option.split("\n")[0] for option in options.all_inner_texts()]
    shares = [float(option.split("\n")[1].rstrip(" %")) for option in options.all_inner_texts()]
    assert answers[0] == "Thai baht"
    assert shares == sorted(shares, reverse=True)
    page.tab.keyboard.press("ArrowDown")
    page.tab.keyboard.press("Enter")
    page.wait()
    model, tokenizer = loaded
    text = TWO.replace("[MASK]", answers[1], 1)
    [[second]] = model.fill_blanks([tokenizer(text)["input_ids"]], do_sample=False).blanks
    assert page.output == text.replace("[MASK]", tokenizer.decode(second))


def test_escape_closes_the_answers_and_returns_to_the_blank(page):
    page.fill(TWO)
    page.tab.locator(".blank").last.focus()
    page.tab.keyboard.press("Enter")
    assert page.tab.get_by_role("option").count() > 1
    page.tab.keyboard.press("Escape")
    assert page.tab.get_by_role("option").count() == 0
    assert page.tab.locator(".blank:focus").count() == 1


def test_everything_can_be_reached_by_tab(page):
    page.fill(TWO)
    page.tab.locator("#text").focus()
    reached = set()
    while (focused := page.tab.locator(":focus")).count():  # until it leaves the page
        reached.add(focused.get_attribute("id") or focused.get_attribute("class") or focused.text_content())
        page.tab.keyboard.press("Tab")
    assert {"insert", "example", "Settings", "fill", "blank"} <= reached


def test_errors_are_told(page):
    page.tab.locator("#text").fill("[MASK]")
    page.tab.keyboard.press("Control+Enter")
    page.tab.get_by_role("alert").filter(has_text="nothing but masks").wait_for()


def test_chinese_on_a_phone_in_the_dark(browser, server):
    phone = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "locale": "zh-CN"}
    page = Page(browser, server.url, **phone)
    assert page.tab.locator("h1").inner_text() == "填空"
    page.fill("法国的首都是[MASK]。")
    assert page.output == "法国的首都是巴黎。"
    assert page.tab.locator("html").bounding_box()["width"] <= 360
    assert page.problems == []


def test_a_key_is_asked_for(browser, loaded):
    with serving(*loaded, api_key="secret") as running:
        tab = browser.new_context(locale="en-US").new_page()
        tab.goto(running.url)
        tab.get_by_role("alert").filter(has_text="API key").wait_for()
        tab.locator("#key").fill("secret")
        tab.locator("#text").fill("The capital of France is [MASK].")
        tab.locator("#text").press("Control+Enter")
        tab.locator("#output", has_text="Paris").wait_for()


def test_text_is_shown_as_text(page):
    page.fill("<img src=x onerror=alert(1)> The capital of France is [MASK].")
    assert page.output.startswith("<img src=x onerror=alert(1)> The capital")
    assert page.tab.locator("#output img").count() == 0
