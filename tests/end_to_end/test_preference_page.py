"""The annotation page in a real browser."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2irl.preferences.pairs import Plan
from t2irl.preferences.study import Study
from tests.preference_server import TOKEN, Server, votes
from tests.preferences import HOSTILE, write_study

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("CI") != "true",
    reason="no Chromium on the PATH; on Debian and Ubuntu: apt-get install chromium",
)
KEYS = {"left": "ArrowLeft", "right": "ArrowRight", "tie": "ArrowUp", "both_bad": "ArrowDown"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        pytest.fail("no Chromium on the PATH; .ci/run installs it where it can: apt-get install -y chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def enter(browser: Any, url: str, name: str) -> Any:
    """A page in a browser profile of its own, whose rater has typed a name and pressed Enter."""
    page = browser.new_context().new_page()
    page.goto(url)
    page.keyboard.type(name)
    page.keyboard.press("Enter")
    return page


def ready(page: Any, before: str | None = None) -> str | None:
    """Wait for the next question, or the end; its id, None at the end."""
    page.wait_for_function(
        "before => document.body.dataset.section === 'done' || (document.body.dataset.item && document.body.dataset.item !== before"
        " && !document.getElementById('judge').classList.contains('wait'))",
        arg=before,
    )
    return (
        None
        if page.evaluate("document.body.dataset.section") == "done"
        else page.evaluate("document.body.dataset.item")
    )


def press(page: Any, item: str, answer: str) -> str | None:
    """Answer with a key and wait for what comes then."""
    page.keyboard.press(KEYS[answer])
    return ready(page, item)


def settle(page: Any) -> None:
    """Wait until the server has acknowledged everything."""
    page.wait_for_function("(document.body.dataset.waiting ?? '0') === '0'", timeout=20_000)


@needs_browser
def test_three_raters_with_a_reload_and_a_crash_lose_and_double_nothing(
    browser: Any, start: Callable[..., Server], tmp_path: Path
) -> None:
    study = write_study(tmp_path, [f"prompt {k}" for k in range(10)], Plan(gold=0.2, repeat=0.2))
    server = start(study.folder)
    names = ["Ann", "Ben", "Zoë"]
    pages = {name: enter(browser, server.url, name) for name in names}
    at = {name: ready(page) for name, page in pages.items()}
    rng, said = np.random.default_rng(0), dict[tuple[str, str], str]()
    for turn in range(len(study.items)):
        for name, page in pages.items():
            item, answer = at[name], str(rng.choice(list(KEYS)))
            assert item is not None
            if turn == 5 and name == "Ann":
                server.kill()
            said[study.rater(name), item] = answer
            at[name] = press(page, item, answer)
            if turn == 6 and name == "Ben":  # his last answers are in the browser alone
                server = start(study.folder, port=server.port)
            if turn == 8:
                page.reload()
                at[name] = ready(page)
    assert set(at.values()) == {None}
    for page in pages.values():
        settle(page)
    assert votes(study) == said
    assert len(said) == 3 * len(study.items)
    records = study.preferences().records
    assert {r.annotator for r in records} == {study.rater(name) for name in names}
    assert not any("Ann" in r.model_dump_json() for r in records), "names are not stored"


@needs_browser
def test_undo_touch_and_coming_back(browser: Any, start: Callable[..., Server], tmp_path: Path) -> None:
    study = write_study(tmp_path, [f"prompt {k}" for k in range(4)], Plan(gold=0, repeat=0))
    server = start(study.folder)
    page = enter(browser, server.url, "Ann")
    first = ready(page)
    assert first is not None
    second = press(page, first, "left")
    page.keyboard.press("z")
    assert ready(page, second) == first
    third = press(page, first, "right")
    assert third == second
    page.reload()  # the answer before the reload can be taken back as well
    assert ready(page) == second
    page.keyboard.press("Backspace")
    assert ready(page, second) == first
    page.close()

    page = browser.new_context(has_touch=True, viewport={"width": 390, "height": 844}).new_page()
    page.goto(server.url)
    page.tap("#name")
    page.keyboard.type(" ann ")
    page.tap("#enter button")
    item = ready(page)
    taps = {
        "left": "[data-answer=left]",
        "tie": "[data-answer=tie]",
        "both_bad": "[data-answer=both_bad]",
        "right": "#right",
    }
    said = {}
    for answer, target in taps.items():
        assert item is not None
        said[study.rater("Ann"), item] = answer
        page.tap(target)
        item = ready(page, item)
    assert item is None
    settle(page)
    assert votes(study) == said, "the same name is the same rater"


@needs_browser
def test_hostile_captions_are_shown_as_text_and_nothing_tells_a_method(
    browser: Any, start: Callable[..., Server], tmp_path: Path
) -> None:
    study = write_study(tmp_path, HOSTILE, Plan(gold=0, repeat=0), methods=("secretmethod", "otherbaseline"))
    server = start(study.folder)
    page = browser.new_context().new_page()
    seen, traffic = [], []
    page.on("response", lambda r: traffic.append((r.url, str(r.all_headers()), r.body() if r.status == 200 else b"")))
    page.goto(server.url)
    page.keyboard.type("Ann")
    page.keyboard.press("Enter")
    item = ready(page)
    while item is not None:
        seen.append(page.locator("#prompt").evaluate("e => e.textContent"))
        assert page.locator("#prompt > *").count() == 0, "the caption was read as markup"
        assert page.evaluate("document.body.dataset.hacked") is None
        box = page.locator("[data-answer=tie]").bounding_box()
        assert box["y"] + box["height"] <= page.viewport_size["height"], "a long caption pushed the buttons away"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        item = press(page, item, "tie")
    assert sorted(seen) == sorted(HOSTILE)
    everything = b"".join(body + url.encode() + headers.encode() for url, headers, body in traffic)
    for word in (b"secretmethod", b"otherbaseline", b"bright", str(tmp_path).encode()):
        assert word not in everything, f"{word!r} reached the browser"


@needs_browser
@pytest.mark.slow
def test_two_thousand_pairs_come_without_delay(browser: Any, start: Callable[..., Server], tmp_path: Path) -> None:
    made = write_study(tmp_path, [f"prompt {k}" for k in range(200)], Plan(gold=0, repeat=0))
    copies = [i.model_copy(update={"id": f"{i.id}{n}", "pair": f"{i.pair}{n}"}) for n in range(10) for i in made.items]
    study = Study(made.folder, made.settings, tuple(copies))
    study.save()
    page = enter(browser, start(study.folder).url, "Ann")
    item = ready(page)
    # Timed in the page, from the key to the frame that shows the next pair, so that the driver's own time is not in it.
    delays = page.evaluate(
        """async () => {
            const frame = () => new Promise(requestAnimationFrame), delays = [];
            for (let n = 0; n < 60; n += 1) {
                const before = document.body.dataset.item, start = performance.now();
                document.dispatchEvent(new KeyboardEvent("keydown", { key: n % 2 ? "ArrowLeft" : "ArrowRight" }));
                while (document.body.dataset.item === before) await frame();
                delays.push(performance.now() - start);
                await new Promise((wake) => setTimeout(wake, 60));
            }
            return delays;
        }"""
    )
    assert item is not None
    print(f"median {np.median(delays):.0f} ms, longest {max(delays):.0f} ms")
    assert np.quantile(delays, 0.95) < 200
    settle(page)
    assert len(votes(study)) == 60


@needs_browser
def test_a_page_with_a_token_works(browser: Any, start: Callable[..., Server], tmp_path: Path) -> None:
    study = write_study(tmp_path, ["a", "b"], Plan(gold=0, repeat=0))
    server = start(study.folder, "--token", TOKEN)
    page = enter(browser, server.url, "Ann")
    item = ready(page)
    assert TOKEN not in page.url, "the token stays in the history"
    while item is not None:
        item = press(page, item, "left")
    settle(page)
    assert Counter(votes(study).values()) == {"left": 2}
