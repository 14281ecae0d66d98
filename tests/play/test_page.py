"""The page in a real browser: every tab once, on a desk and on a phone, and no request that leaves the machine."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the extra [play] is not installed")
api = pytest.importorskip("playwright.sync_api", reason="playwright (the extra [play-test]) is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,  # a server and a browser: two minutes of a core
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt install chromium"),
]

ROOT = Path(__file__).parents[2]
#: A tab's place for results, and how many pictures its first example leaves there, the large one included.
TABS = {"Draw": ("draw", 8), "Vary": ("vary", 9), "Between": ("between", 10), "Edit": ("edit", 19)}
TABS |= {"Inpaint": ("inpaint", 5), "Look inside": ("look", 9)}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Serve the packaged weights."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "unclip_pl", "play", "--run", "shapes", "--port", str(port)]
    proxy = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")  # leads nowhere
    server = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | proxy,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    found = f"http://127.0.0.1:{port}"
    for _ in range(240):
        assert server.poll() is None, server.communicate()[0].decode()
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(found, timeout=5).close()
            break
        except OSError:
            time.sleep(0.5)
    yield found
    server.terminate()
    assert server.wait(30) == 143


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser that finds no host but this machine."""
    api.expect.set_options(timeout=60_000)  # other tests may have the cores
    rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", rules])
        yield browser
        browser.close()


@pytest.fixture(params=[1280, 390])
def page(request: pytest.FixtureRequest, chromium: Any, address: str) -> Iterator[Any]:
    """The page at a width; in the end, what it asked for was all on this machine, and no script failed."""
    asked: list[str] = []
    failed: list[str] = []
    page = chromium.new_page(viewport={"width": request.param, "height": 900})
    page.set_default_timeout(60_000)
    page.on("request", lambda sent: asked.append(sent.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(address)
    page.get_by_role("button", name="Draw", exact=True).wait_for()
    yield page
    page.close()
    assert asked
    assert not [
        url
        for url in asked
        if urlsplit(url).scheme in ("http", "https", "ws") and urlsplit(url).hostname != "127.0.0.1"
    ]
    assert not failed


desk = pytest.mark.parametrize("page", [1280], indirect=True)


def open_tab(page: Any, name: str) -> None:
    tab = page.get_by_role("tab", name=name, exact=True).filter(visible=True)
    if tab.count():
        tab.first.click()
    else:  # a phone has room for a few
        page.locator(".overflow-menu button").first.click()
        page.locator(".overflow-dropdown button", has_text=name).click()


def button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True).filter(visible=True).first


def finished(page: Any, place: str, pictures: int) -> None:
    api.expect(page.locator(f"#{place} figure")).to_have_count(pictures, timeout=60_000)
    api.expect(page.locator(f"#{place} .play-bar")).to_have_count(0, timeout=60_000)


def fits(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("name", TABS)
def test_every_tab_draws_its_first_example(page: Any, name: str, tmp_path: Path) -> None:
    place, pictures = TABS[name]
    open_tab(page, name)
    page.locator(".gallery-item, tbody tr").filter(visible=True).first.click()
    finished(page, place, pictures)
    api.expect(page.locator(f"#{place} .play-line")).to_have_count(0)
    if name == "Look inside":
        api.expect(page.locator(".play-map circle")).to_have_count(501)
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert fits(page)


def test_the_report_is_there(page: Any) -> None:
    open_tab(page, "Report")
    assert "held-out captions" in page.frame_locator(".play-report").locator("body").inner_text()
    assert fits(page)


@desk
def test_the_first_picture_is_there_within_five_seconds(page: Any) -> None:
    start = time.monotonic()
    button(page, "Draw").click()
    page.locator("#draw figure").first.wait_for()
    assert time.monotonic() - start < 5
    finished(page, "draw", 8)


@desk
def test_a_stopped_drawing_ends_and_makes_room(page: Any) -> None:
    open_tab(page, "Vary")
    page.get_by_label("number input for Variations").fill("16")
    page.locator(".gallery-item").filter(visible=True).first.click()
    page.locator("#vary .play-bar").wait_for()
    button(page, "Stop").click()
    api.expect(page.locator("#vary .play-bar")).to_have_text("stopped")
    open_tab(page, "Draw")
    button(page, "Draw").click()
    finished(page, "draw", 8)
    api.expect(page.locator("#vary .play-bar")).to_have_text("stopped")


@desk
def test_a_second_visitor_waits_for_the_first(page: Any, chromium: Any, address: str) -> None:
    page.get_by_label("number input for Pictures of each prior").fill("8")
    other = chromium.new_page()
    other.goto(address)
    button(other, "Draw").wait_for()
    button(page, "Draw").click()
    page.locator("#draw .play-bar").wait_for()
    button(other, "Draw").click()
    other.get_by_text("queue").first.wait_for()
    assert not other.locator("#draw figure").count()
    finished(page, "draw", 32)
    finished(other, "draw", 8)
    other.close()


@desk
def test_a_slider_goes_along_the_strip(page: Any) -> None:
    open_tab(page, "Between")
    button(page, "Mix").click()
    finished(page, "between", 10)
    large = page.locator("#between .play-large figcaption")
    api.expect(large).to_have_text("0.5")
    page.get_by_label("number input for From the first to the second").filter(visible=True).fill("0.25")
    api.expect(large).to_have_text("0.25")


@desk
def test_a_brush_says_what_is_drawn_again(page: Any, tmp_path: Path) -> None:
    Image.new("RGB", (48, 32), (20, 20, 80)).save(tmp_path / "picture.png")
    Image.new("L", (30, 30), 255).save(tmp_path / "mask.png")
    open_tab(page, "Inpaint")
    page.get_by_role("button", name="Inpaint", exact=True).click()
    api.expect(page.locator("#inpaint .play-line")).to_contain_text("choose a file, or click an example")
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.locator("input[type=file]").first.set_input_files(tmp_path / "picture.png")
    canvas = panel.locator("canvas").first
    canvas.wait_for()
    page.wait_for_timeout(2000)  # the editor takes the picture
    button(page, "Inpaint").click()
    api.expect(page.locator("#inpaint .play-line")).to_contain_text("Nothing is painted")
    finished(page, "inpaint", 5)
    box = canvas.bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 30, middle[1] + 30, steps=5)
    page.mouse.up()
    page.wait_for_timeout(1000)
    button(page, "Inpaint").click()
    api.expect(page.locator("#inpaint .play-line")).to_have_count(0)
    finished(page, "inpaint", 5)
    page.get_by_text("A mask from a file").click()
    panel.locator("input[type=file]").last.set_input_files(tmp_path / "mask.png")
    page.wait_for_timeout(1000)
    button(page, "Inpaint").click()
    api.expect(page.locator("#inpaint .play-line")).to_contain_text("Expected a mask of 48 × 32 pixels")


@desk
def test_an_upload_that_is_no_picture_is_one_line(page: Any, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("no picture")
    open_tab(page, "Vary")
    page.get_by_role("tabpanel").filter(visible=True).locator("input[type=file]").first.set_input_files(
        tmp_path / "no.png"
    )
    page.wait_for_timeout(1000)
    button(page, "Vary").click()
    api.expect(page.locator("#vary .play-line")).to_contain_text("Expected an image (PNG, JPEG")
