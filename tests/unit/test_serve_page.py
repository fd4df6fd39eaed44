"""The page of `serve` in a headless Chromium: drop, ask, stream, stop, errors, what the model sees, and the keyboard alone."""

import base64
import io
import re
import shutil
import threading

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed; pip install '.[dev]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install '.[dev]'")

from deepstack_jax.serve.app import Settings  # noqa: E402
from deepstack_jax.serve.engine import Engine  # noqa: E402
from tests.unit.serving import served, until  # noqa: E402
from tests.unit.talker import LIMITS, picture, talker  # noqa: E402

expect = playwright.expect
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT = 120_000  # ms, on a busy machine


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=TIMEOUT)
    with playwright.sync_playwright() as driver:
        system = next(filter(None, map(shutil.which, NAMES)), None)
        try:
            browser = driver.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium here that starts ({str(error).splitlines()[0]}); install one, or run playwright install")
        yield browser
        browser.close()


class Paced(Engine):
    """An engine whose calls of the loop are let through one by one, where a test says so."""

    def __init__(self, *args):
        super().__init__(*args)
        self.held, self.calls = False, threading.Semaphore(0)

    def _decode(self):
        if self.held:
            self.calls.acquire()
        super()._decode()

    def let_go(self):
        self.held = False
        self.calls.release()


@pytest.fixture(scope="module")
def lmm():
    return talker()


@pytest.fixture
def engine(lmm):
    engine = Paced(lmm.answerer, LIMITS)
    engine.start()
    yield engine
    engine.close()
    engine.let_go()


@pytest.fixture
def page(browser, engine):
    with served(engine, Settings("tiny")) as address:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(TIMEOUT)
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text) if "Content Security Policy" in message.text else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        expect(page).to_have_title("tiny")
        yield page
        assert said == [], "the page breaks its own policy, or fails"
        assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
        page.close()


def drop(page, *files: tuple[str, str, bytes]) -> None:
    """Files (name, type, content) let go over the page."""
    given = [(name, kind, base64.b64encode(content).decode()) for name, kind, content in files]
    transfer = page.evaluate_handle(
        """(files) => {
          const transfer = new DataTransfer();
          for (const [name, type, content] of files)
            transfer.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name, { type }));
          return transfer;
        }""",
        given,
    )
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed, 40, 20).save(file, "PNG")
    return file.getvalue()


def answer(page):
    return page.locator(".turn.assistant .words").last


def done(page) -> None:
    page.wait_for_selector("#send:visible")


def test_drop_ask_look_and_ask_again(page, lmm):
    drop(page, ("one.png", "image/png", png(1)), ("notes.txt", "text/plain", b"hi"), ("two.png", "image/png", png(2)))
    page.locator("#waiting img").nth(1).wait_for()
    assert page.get_by_role("alert").text_content() == "notes.txt is not a picture"
    page.get_by_role("button", name="Remove two.png").click()
    page.fill("#words", "what?")
    page.locator("#max_tokens").evaluate("(input) => (input.value = 9)")
    page.keyboard.press("Enter")
    done(page)
    first = lmm.generate([png(1)], "what?", max_new_tokens=9)
    assert answer(page).text_content() == first
    assert page.locator(".rate").text_content().startswith("9 tokens, ")
    assert "tokens/s" in page.get_by_role("status").text_content()
    assert page.get_by_role("alert").count() == 0, "an old error is still shown"

    switch = page.get_by_role("switch", name="What the model sees")
    switch.focus()
    page.keyboard.press("Space")
    page.locator(".views figure").nth(3).wait_for()
    assert switch.get_attribute("aria-checked") == "true"
    assert page.locator(".views figcaption b").all_text_contents()[:3] == ["Global view", "Crops", "Crops by layer"]
    assert page.locator(".tags li").all_text_contents()[0].startswith("layer 1: 4 tokens")
    assert page.locator(".views img").evaluate_all("(all) => all.every((one) => one.naturalWidth > 0)")
    page.keyboard.press("Space")
    assert not page.locator(".sight").is_visible()

    page.fill("#words", "and?")
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(4)
    done(page)
    talk = lmm.chat(max_new_tokens=9)
    assert [talk.ask("what?", [png(1)]), talk.ask("and?")] == page.locator(".turn.assistant .words").all_text_contents()
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".turn").count() == 0


def test_an_answer_comes_in_pieces_and_is_stopped(page, engine, lmm):
    engine.held = True
    page.fill("#words", "tell")
    page.locator("#max_tokens").evaluate("(input) => (input.value = 40)")
    page.keyboard.press("Enter")
    for _ in range(2):
        engine.calls.release()
    whole = lmm.generate(None, "tell", max_new_tokens=40)
    expect(answer(page)).to_have_text(re.compile(".{5,}"))
    assert page.get_by_role("log").get_attribute("aria-busy") == "true"
    page.get_by_role("button", name="Stop").click()
    done(page)
    said = answer(page).text_content()
    assert whole.startswith(said)
    assert 4 < len(said) < len(whole)
    assert page.get_by_role("status").text_content() == "Stopped"
    assert page.evaluate("document.activeElement.id") == "words"
    engine.let_go()
    until(lambda: engine.load == (0, 0))


def test_what_goes_wrong_is_shown_and_the_question_is_kept(page, engine):
    drop(page, ("bad.png", "image/png", b"no picture"))
    page.locator("#waiting img").wait_for()
    page.fill("#words", "what?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#error:visible")
    assert "cannot read image <10 bytes>" in page.get_by_role("alert").text_content()
    assert page.locator(".turn").count() == 0
    assert page.input_value("#words") == "what?"
    page.get_by_role("button", name="Remove bad.png").click()

    engine.held = True
    page.keyboard.press("Enter")
    expect(answer(page)).to_have_text(re.compile("."))
    engine.close()
    engine.let_go()
    expect(page.get_by_role("alert")).to_contain_text("the server is stopping")
    assert answer(page).text_content(), "what was said stays"


def test_a_connection_that_breaks_is_shown(page):
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body='data: {"choices": []}\n\n'))
    page.fill("#words", "what?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#error:visible")
    assert page.get_by_role("alert").text_content() == "the connection broke before the answer was complete"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_on_a_phone_and_focus_is_seen(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 400, "height": 800})
    drop(page, ("a-picture-with-a-rather-long-name-for-a-narrow-screen.png", "image/png", png(3)))
    page.get_by_role("switch").click()
    page.locator(".views figure").nth(3).wait_for()
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    shown = []
    page.locator("#new").focus()
    for _ in range(12):
        outline = "getComputedStyle(document.activeElement.closest('.button') ?? document.activeElement).outlineWidth"
        shown.append(page.evaluate(f"[document.activeElement.tagName, {outline}]"))
        page.keyboard.press("Tab")
    assert all(width == "3px" for name, width in shown if name != "BODY"), shown
    assert len({name for name, _ in shown}) >= 4
