"""A real browser without a network, and pages in it that must say nothing wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
_TIMEOUT_MS = 120_000


def find_chromium() -> str:
    """The system's Chromium. Raises: AssertionError naming the remedy."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    assert found, f"none of {', '.join(CHROMIUM)} is on the PATH: apt-get install chromium"
    return found


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium, headless."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def opened(chromium: Any, path: Path, **options: Any) -> Iterator[Any]:
    """The page of a file; it must ask for nothing else and report no error."""
    context = chromium.new_context(offline=True, viewport={"width": 1440, "height": 1000}, **options)
    context.set_default_timeout(_TIMEOUT_MS)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    yield page
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    context.close()


def data_of(path: Path) -> dict[str, Any]:
    """What a page carries."""
    text = path.read_text(encoding="utf-8").split('<script id="data" type="application/json">')[1]
    return json.loads(text.split("</script>")[0])
