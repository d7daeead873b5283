"""The page of `densectx demo` in a real browser: every kind of answer, divider, keyboard, bad files, narrow, dark."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from densectx.demo.examples import landscape, noisy

TIMEOUT = 60_000  # ms; an idle machine needs a second


def encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def served(demo, every_output):
    return demo(every_output, megabytes=0.3, megapixels=0.02)


@pytest.fixture
def opened(browser, served):
    """Opens the page; after the test: nothing was asked of another host, and the console is clean but for refusals."""
    contexts, asked, said = [], [], []

    def opened(width=1000, height=700, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(TIMEOUT)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"http://127.0.0.1:{served.port}/")
        page.wait_for_selector(".task")
        return page

    yield opened
    for context in contexts:
        context.close()
    here = f"http://127.0.0.1:{served.port}/"
    assert [url for url in asked if not url.startswith((here, f"blob:{here}"))] == []
    assert [line for line in said if not re.match(r"Failed to load resource: .* (400|413) ", line)] == []


def give(page, pixels, name="a.png"):
    content = pixels if isinstance(pixels, bytes) else encoded(pixels)
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})


def run(page, *tasks):
    for box in page.locator(".task input[type=checkbox]").all():
        box.set_checked(not tasks or box.get_attribute("value") in tasks)
    page.click("#run")
    page.wait_for_selector("#cancel", state="hidden")


def card(page, task):
    return page.locator(f".card[data-task={task}]")


def pixels_of(locator):
    return np.array(Image.open(io.BytesIO(locator.screenshot())).convert("RGB"), np.int16)


def test_every_task_from_an_example(opened, served):
    page = opened()
    assert page.locator("#run").is_disabled()
    assert page.locator(".example").count() == len(served.about["examples"])
    give(page, landscape(120))
    run(page)
    tasks = [task["key"] for task in served.about["tasks"]]
    assert [one.get_attribute("data-task") for one in page.locator(".card").all()] == tasks
    assert re.fullmatch(r"6 answers in [0-9.]+ s\.", page.inner_text("#status"))
    for task in tasks:
        images = card(page, task).locator("img")
        assert all(image.evaluate("i => i.decode().then(() => i.naturalWidth > 0)") for image in images.all())
    page.wait_for_selector("#error", state="hidden")


def test_an_example_is_chosen_by_keyboard(opened):
    page = opened()
    page.get_by_role("button", name="Drawn landscape", exact=True).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#run:enabled")
    assert page.get_by_role("button", name="Drawn landscape", exact=True).get_attribute("aria-pressed") == "true"
    assert "Drawn landscape" in page.inner_text("#drop-text")


def test_the_divider_by_mouse_and_by_keys(opened):
    page = opened()
    give(page, noisy(landscape(120)))
    run(page, "denoising")
    stage, divider = card(page, "denoising").locator(".stage"), page.get_by_role("slider", name="Divider")
    for image in stage.locator("img").all():
        image.evaluate("i => i.decode()")
    box = stage.bounding_box()
    share = "d => [Number(d.value), d.getAttribute('aria-valuetext')]"
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + 40, steps=4)
    page.mouse.up()
    value, said = divider.evaluate(share)
    assert value == pytest.approx(20, abs=1)
    assert said == "20 % input"
    divider.press("End")
    input_only = pixels_of(stage)
    divider.press("Home")
    answer_only = pixels_of(stage)
    assert divider.evaluate(share) == [0, "0 % input"]
    differs = np.abs(input_only - answer_only).max(2) > 8
    assert differs[:, 60:-60].mean() > 0.5
    divider.press("ArrowRight")
    assert divider.evaluate(share)[0] == 0.5
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 60)
    page.mouse.move(0, 0)
    assert divider.evaluate(share)[0] == pytest.approx(50, abs=0.5)
    half, middle = pixels_of(stage), differs.shape[1] // 2
    assert (np.abs(half - input_only).max(2) <= 8)[50:, 30 : middle - 30].mean() > 0.98  # below the tags
    assert (np.abs(half - answer_only).max(2) <= 8)[50:, middle + 30 : -30].mean() > 0.98


def test_a_larger_answer_lies_on_its_input(opened):
    page = opened()
    give(page, landscape(90))
    run(page, "super_resolution")
    found = card(page, "super_resolution")
    assert "180 \u00d7 134" in found.inner_text()  # 90 x 67 is given
    boxes = [image.bounding_box() for image in found.locator(".stage img").all()]
    assert boxes[0] == boxes[1]
    natural = [image.evaluate("i => [i.naturalWidth, i.naturalHeight]") for image in found.locator(".stage img").all()]
    assert natural == [[180, 134], [90, 67]]
    found.get_by_label("200 %").check()
    assert found.locator(".stage").bounding_box()["width"] == 360


def test_classes_have_areas_colours_and_names(opened, every_output):
    import torch

    import densectx

    pixels = landscape(120)
    value = densectx.load(every_output).predict(torch.from_numpy(pixels).permute(2, 0, 1))["segmentation"]
    ids = value.argmax(0).numpy()
    page = opened()
    give(page, pixels)
    run(page, "segmentation")
    found = card(page, "segmentation")
    names, colours = ("sky", "road", "tree"), ((70, 130, 180), (128, 64, 128), (107, 142, 35))
    shares = np.bincount(ids.ravel(), minlength=3) / ids.size
    order = np.argsort(-shares)
    said = [row.inner_text().split("\n") for row in found.locator(".legend button").all()]
    assert said == [[names[i], f"{shares[i] * 100:.1f} %"] for i in order if shares[i]]
    found.get_by_label("Strength of the colours").press("End")
    y, x = (int(v) for v in np.argwhere(ids == order[0])[len(ids)])
    page.mouse.move(0, 0)
    shown, box = pixels_of(found.locator(".stage")), found.locator(".stage").bounding_box()
    scale = box["width"] / ids.shape[1]
    np.testing.assert_allclose(shown[int((y + 0.5) * scale), int((x + 0.5) * scale)], colours[order[0]], atol=2)
    found.locator(".stage").hover(position={"x": (x + 0.5) * scale, "y": (y + 0.5) * scale})
    assert found.locator(".readout").inner_text() == f"{names[order[0]]} at ({x}, {y})"
    assert found.locator(".legend button.here").inner_text().startswith(names[order[0]])
    found.locator(".legend button").first.click()
    page.mouse.move(0, 0)
    hidden = pixels_of(found.locator(".stage"))[int((y + 0.5) * scale), int((x + 0.5) * scale)]
    assert np.abs(hidden - colours[order[0]]).max() > 20


def test_labels_and_numbers_are_read_off(opened, every_output):
    import torch

    import densectx

    pixels = landscape(120)
    value = densectx.load(every_output).predict(torch.from_numpy(pixels).permute(2, 0, 1))
    page = opened()
    give(page, pixels)
    run(page, "tags", "depth")
    held = [name for name, row in zip(("sky", "road", "tree"), value["tags"] >= 0.5, strict=True) if row[45, 60]]
    for task, expected in (("tags", ", ".join(held) or "no class"), ("depth", f"{value['depth'][0, 45, 60]:.4g}")):
        frame = card(page, task).locator(".frame")
        frame.focus()
        for key in ("ArrowRight", "ArrowLeft"):  # from the middle, one step and back
            frame.press(key)
        readout = card(page, task).locator(".readout")
        assert readout.inner_text() == f"{expected} at (60, 45)"
        assert readout.get_attribute("aria-live") == "polite"
    low, high = card(page, "depth").locator(".scale").inner_text().split()
    assert [float(low), float(high)] == pytest.approx(
        [value["depth"].min().item(), value["depth"].max().item()], rel=1e-3
    )


def test_the_receptive_field_is_drawn_to_scale(opened):
    page = opened()
    give(page, landscape(120))
    run(page, "segmentation", "super_resolution")
    for task, field in (("segmentation", 37), ("super_resolution", 41)):  # as the layers add up, see test_demo.py
        found = card(page, task)
        found.get_by_label("Receptive field").check()
        stage = found.locator(".stage")
        box = stage.bounding_box()
        stage.hover(position={"x": box["width"] * 0.5, "y": box["height"] * 0.4})
        drawn, scale = found.locator(".field-box").bounding_box(), box["width"] / 120
        assert drawn["width"] == pytest.approx(field * scale, abs=1)
        assert drawn["height"] == pytest.approx(field * scale, abs=1)
        assert drawn["x"] + drawn["width"] / 2 == pytest.approx(box["x"] + box["width"] / 2, abs=scale + 1)
        assert f"sees {field} \u00d7 {field} pixels" in found.locator(".readout").inner_text()
        found.get_by_label("Receptive field").uncheck()
        assert found.locator(".field-box").is_hidden()


def test_options_are_sent_and_answers_downloaded(opened):
    page = opened()
    give(page, landscape(60))
    run(page, "denoising")
    assert "sigma estimated" in card(page, "denoising").inner_text()
    page.get_by_label("Sigma").fill("40")
    run(page, "denoising")
    assert "estimated" not in card(page, "denoising").inner_text()
    page.get_by_label("Sigma").fill("300")
    run(page, "denoising")
    assert "expected 0 to 255" in page.get_by_role("alert").inner_text()
    for name in ("denoising.png", "denoising.npy"):
        with page.expect_download() as download:
            card(page, "denoising").get_by_role("link", name=name).click()
        assert download.value.suggested_filename == name
        content = download.value.path().read_bytes()
        if name.endswith("npy"):
            assert np.load(io.BytesIO(content)).shape == (3, 45, 60)
        else:
            assert Image.open(io.BytesIO(content)).size == (60, 45)


BAD = [
    (b"\x89PNG\r\n\x1a\nnothing", "Not a readable image; expected PNG"),
    (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "Not a readable image"),
    (encoded(np.zeros((200, 300), np.uint8)), "0.1 million pixels (300 x 200)"),
    (bytes(400_000), "The file has 400 kB; this page takes up to 300 kB."),
]


def test_bad_files_are_told(opened):
    page = opened()
    give(page, landscape(60))
    run(page, "depth")
    for content, said in BAD:
        give(page, content, "bad.png")
        if len(content) < 300_000:
            page.click("#run")
        page.get_by_role("alert").get_by_text(said).wait_for()
        assert card(page, "depth").is_visible(), "the last answer stays"
    give(page, landscape(60))
    assert page.locator("#error").is_hidden()


def test_dropped_and_pasted(opened):
    page = opened()
    fill = """async ([kind, bytes]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
        const options = {bubbles: true, cancelable: true, dataTransfer: transfer, clipboardData: transfer};
        document.body.dispatchEvent(kind === "drop" ? new DragEvent("drop", options) : new ClipboardEvent("paste", options));
    }"""
    for kind, name in (("drop", "dropped.png"), ("paste", "Pasted picture")):
        page.evaluate(fill, [kind, list(encoded(landscape(40)))])
        page.locator("#drop-text", has_text=name).wait_for()
    run(page, "depth")
    assert card(page, "depth").is_visible()


def test_cancel(opened, served, monkeypatch):
    import time

    def slow(content, tasks, options, step):
        while True:
            step("Thinking", 0.4)
            time.sleep(0.01)

    page = opened()
    give(page, landscape(60))
    monkeypatch.setattr(served.queue, "answering", slow)
    page.click("#run")
    page.locator("#status", has_text="Thinking").wait_for()
    assert page.get_by_role("progressbar").get_attribute("value") == "0.4"
    page.get_by_role("button", name="Cancel").click()
    page.locator("#status", has_text="Cancelled.").wait_for()
    assert page.get_by_role("button", name="Run").is_enabled()
    end = time.monotonic() + 20
    while served.queue._jobs:
        assert time.monotonic() < end
        time.sleep(0.01)


# -- for everyone

CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility() || element.closest("noscript, .skip, .tag, :disabled")) continue;
    const [a, b] = [light(rgba(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), element.className || element.tagName, element.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""

NAMELESS = """() => [...document.querySelectorAll("button, input, a, progress, select, [tabindex='0']")]
  .filter((one) => one.checkVisibility())
  .filter((one) => !((one.labels?.length && [...one.labels].some((l) => l.textContent.trim())) || one.getAttribute("aria-label")
    || one.getAttribute("aria-labelledby") || (one.matches("button, a") && one.textContent.trim())))
  .map((one) => one.outerHTML)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_narrow_dark_and_readable(opened, scheme, width):
    page = opened(width, 800, color_scheme=scheme)
    give(page, landscape(120))
    run(page)
    give(page, b"bad", "bad.png")
    run(page)
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 40
    assert [row for row in contrasts if row[0] < 4.5] == []  # WCAG 2.2, 1.4.3 (AA)
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", dark))) < 60) == (scheme == "dark")
    assert page.evaluate("[...document.images].filter(i => !i.hasAttribute('alt')).length") == 0
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(e => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert page.get_attribute("html", "lang") == "en"


FOCUSED = """() => { const at = document.activeElement;
  const near = [at, at.parentElement, at.nextElementSibling].filter(Boolean).map((one) => getComputedStyle(one));
  const marked = near.some((style) => style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2);
  return [at.id || at.className || at.type || at.tagName, marked || at.matches(".divider, body")]; }"""


def test_everything_is_reached_by_tab_and_shows_it(opened):
    page = opened()
    give(page, landscape(60))
    run(page, "segmentation", "denoising")
    seen = []
    while [name for name, _ in seen].count("skip") < 2:  # once around, from wherever it begins
        page.keyboard.press("Tab")
        seen.append(page.evaluate(FOCUSED))
        assert len(seen) < 200
    names = [name for name, _ in seen]
    assert [name for name, marked in seen if not marked] == []
    for wanted in ("file", "example", "checkbox", "run", "radio", "frame", "divider"):
        assert wanted in names, names
    assert names.count("frame") in (2, 4)
