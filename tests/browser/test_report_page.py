"""The page of ``densectx report`` in a real browser: no request, no script, wide, narrow, dark, on paper, by keyboard."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from densectx import cli

HOSTILE = ['<script>document.title="owned"</script>', '"><img src=x onerror="document.title=1">', "road"]
CONFIG = """
model:
  backbone: {name: plain, width: 6}
  projection: {channels: 6}
  context: context7
  tasks:
    segmentation: {name: segmentation, source: scenes}
    denoising: {name: denoising, source: scenes}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
data:
  sources: {scenes: {name: image_mask, root: data, images: "i/{subset}", masks: "m/{subset}", classes: CLASSES}}
  num_workers: 0
trainer: {accelerator: cpu, max_steps: 3, log_every_n_steps: 1, enable_progress_bar: false, enable_model_summary: false}
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of a small fit whose classes and files have hostile names."""
    folder = tmp_path_factory.mktemp("page")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind, high, shape in (("i", 255, (40, 60, 3)), ("m", 3, (40, 60))):
            (folder / "data" / kind / split).mkdir(parents=True)
            for name in ("a", "b<img src=x onerror=document.title=2>", "c", "d"):
                pixels = rng.integers(0, high, shape).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "data" / kind / split / f"{name}.png")
    (folder / "small.yaml").write_text(CONFIG.replace("CLASSES", str(HOSTILE)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DENSECTX_RUN", "")
        assert cli.main(["fit", "-c", "small.yaml"]) == 0
    return folder / "runs" / "small" / "0" / "report.html"


@pytest.fixture
def opened(browser, written):
    """Opens the page; after the test: nothing but the file was asked for, and nothing was said."""
    contexts, asked, said = [], [], []

    def opened(width=1280, height=900, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **options))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(written.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith("data:") and url != written.as_uri()] == []
    assert said == []


def test_nothing_is_asked_and_nothing_runs(opened):
    page = opened()
    page.wait_for_timeout(300)
    assert page.title() == "small / 0 \N{MIDDLE DOT} densectx"
    assert page.locator("h1").inner_text() == "small / 0"
    assert page.locator("main script").count() == 0
    for name in HOSTILE:
        assert page.get_by_role("rowheader", name=name, exact=True).count() > 0
    loaded = page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert loaded
    assert page.locator("img").count() >= 8


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_does_not_scroll_sideways(opened, width):
    page = opened(width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_dark_and_light(opened):
    grounds = []
    for scheme in ("light", "dark"):
        page = opened(color_scheme=scheme)
        ground, ink = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
        grounds.append(ground)
        assert contrast(ground, ink) > 7
        for part in ("main .note", "nav a", ".chart text"):
            style = "fill" if part == ".chart text" else "color"
            colour = page.locator(part).first.evaluate(f"e => getComputedStyle(e).{style}")
            assert contrast(ground, colour) > 4.5, (scheme, part)
    assert grounds[0] != grounds[1]


def contrast(one, other):
    """Of two colours as CSS writes them, by WCAG 2.2."""
    lights = []
    for text in (one, other):
        linear = []
        for value in text[text.index("(") + 1 : -1].split(",")[:3]:
            c = float(value) / 255
            linear.append(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_by_keyboard(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    page.locator("summary").last.focus()
    page.keyboard.press("Enter")
    assert page.locator("details").last.evaluate("e => e.open")
    assert page.locator("pre").is_visible()


def test_on_paper(opened):
    page = opened(color_scheme="dark")
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
