"""The page for people, in a real browser; see `make test-page`.

`python -m tests.serving.test_page BUNDLE` makes the pictures of docs/serving.md.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import listening, settings_of, wait_for

pytestmark = pytest.mark.browser
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
PICTURES = Path(__file__).parents[2] / "docs"
WIDTHS = {1280: 900, 390: 844}
MADE_MS = 60_000


@contextmanager
def browsing(width: int = 1280) -> Iterator[Any]:
    """A page, and what went wrong on it as its `problems`."""
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "there is no Chromium: install one, or say where it is in CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": WIDTHS[width]})
        yield page
        browser.close()


def until(page: Any, expression: str) -> None:
    """Wait until it is true; the page's policy forbids what Playwright would do."""
    wait_for(lambda: page.evaluate(expression), MADE_MS / 1000)


def make(page: Any, prompt: str, **fields: str) -> Any:
    """Ask for a video; the article of its job."""
    page.fill("textarea", prompt)
    for name, value in fields.items():
        page.fill(f"input[name={name}]", value)
    page.click("button:has-text('Make a video')")
    article = page.locator("article").first
    article.wait_for()
    return article


def test_a_video_is_asked_for_watched_and_shown(demo_bundle: Path, tmp_path: Path) -> None:
    with listening(settings_of(demo_bundle, tmp_path)) as address, browsing() as page:
        asked, wrong = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        until(page, "document.querySelector('[name=model]').options.length == 1")
        assert page.locator("input[name=key]").is_hidden()
        article = make(page, "a red circle moving right", seed="3", steps="20")
        article.locator("video").wait_for(timeout=MADE_MS)
        until(page, "document.querySelector('video').readyState >= 2")
        assert page.evaluate("document.querySelector('video').videoWidth") == 32
        assert "of the block calls were skipped" in article.inner_text() and "seed 3" in article.inner_text()
        assert "reused" in article.locator("canvas").get_attribute("aria-label")
        assert all(url.startswith((address, f"blob:{address}", "data:")) for url in asked) and not wrong
        article.locator("button").click()
        article.wait_for(state="detached")


def test_prompts_are_text_and_errors_are_shown(demo_bundle: Path, tmp_path: Path) -> None:
    with listening(settings_of(demo_bundle, tmp_path)) as address, browsing(390) as page:
        page.goto(address)
        until(page, "document.querySelector('[name=model]').options.length == 1")
        article = make(page, "<img src=x onerror=alert(1)>", steps="4")
        article.locator("video").wait_for(timeout=MADE_MS)
        assert (
            article.locator("h2").inner_text() == "<img src=x onerror=alert(1)>" and not article.locator("img").count()
        )
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.evaluate("document.querySelector('form').noValidate = true")
        page.fill("input[name=steps]", "1000")
        page.click("button:has-text('Make a video')")
        until(page, "document.getElementById('problem').textContent.includes('num_inference_steps')")


def test_a_key_is_asked_for_where_one_is_needed(demo_bundle: Path, tmp_path: Path) -> None:
    with listening(settings_of(demo_bundle, tmp_path, keys=("secret",))) as address, browsing() as page:
        page.goto(address)
        page.locator("input[name=key]").wait_for()
        page.fill("input[name=key]", "secret")
        page.locator("input[name=key]").blur()
        until(page, "document.querySelector('[name=model]').options.length == 1")
        assert not page.locator("#problem").inner_text()


def _pictures(bundle: Path) -> None:
    with tempfile.TemporaryDirectory() as data, listening(settings_of(bundle, Path(data))) as address:
        for width in WIDTHS:
            with browsing(width) as page:
                page.goto(address)
                until(page, "document.querySelector('[name=model]').options.length == 1")
                article = make(page, "a red circle moving right", seed="3", steps="50")
                article.locator("video").wait_for(timeout=MADE_MS)
                until(page, "document.querySelector('video').readyState >= 2")
                page.screenshot(path=PICTURES / f"serving-{width}.png", full_page=True)


if __name__ == "__main__":
    _pictures(Path(sys.argv[1]))
