"""``densectx report``: its numbers against brute force, its markup against hostile names, what it does without."""

from __future__ import annotations

import csv
import inspect
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torchmetrics import Metric

import densectx
from densectx import cli
from densectx.building import build_module
from densectx.config import load_yaml
from densectx.data.module import DataModule
from densectx.data.reader import read_image
from densectx.errors import ConfigError
from densectx.report import chart as charts
from densectx.report.build import write_report
from densectx.report.chart import Line, chart
from densectx.report.errors import error_map
from densectx.report.gallery import gallery
from densectx.report.history import Series, read_history
from densectx.report.images import SIDE, embedded, thumbnail
from densectx.report.markup import escaped, tag
from densectx.report.measure import measure
from densectx.report.ranking import SHOWN, Ranking, Scored
from densectx.report.run import open_run
from densectx.report.settings import ABSENT, MODEL, settings

HOSTILE = '<script>document.title="owned"</script>'
CLASSES = [HOSTILE, 'b" onmouseover="document.title=1', "&amp;<b>", "nowhere"]
NAMES = ["a<img src=x onerror=document.title=2>", "b", "c\u202eknip", "d", "e", "f", "g"]

CONFIG = """
model:
  backbone: {name: plain, width: 6}
  projection: {channels: 6}
  context: {name: context7}
  norm: batch
  tasks:
    segmentation: {name: segmentation, source: scenes}
    denoising: {name: denoising, source: scenes, sigma: 25.0}
    super_resolution: {name: super_resolution, source: scenes, scale: 2}
    colorization: {name: colorization, source: scenes}
    regression: {name: regression, source: scenes, low: 0, high: 4}
    tags: {name: segmentation, source: tagged, mode: multilabel}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01, eps: 1.0e-8}}
data:
  sources:
    scenes:
      name: image_mask
      root: data
      images: images/{subset}
      masks: masks/{subset}
      targets: depth/{subset}
      classes: CLASSES
      batch_size: 1
    tagged: {name: image_mask, root: data, images: "images/{subset}", masks: "tags/{subset}/{class}", classes: [one, two], batch_size: 1}
  num_workers: 0
trainer:
  accelerator: cpu
  precision: 32-true
  max_steps: 4
  val_check_interval: 2
  check_val_every_n_epoch: null
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
"""


def make_data(root):
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for kind in ("images", "masks", "depth", "tags"):
            for below in ("one", "two") if kind == "tags" else ("",):
                (root / kind / split / below).mkdir(parents=True)
        for i, name in enumerate(NAMES):
            h, w = 12 + 2 * i, 24 - 2 * i
            pixels = rng.integers(0, 255, (h, w, 3), np.uint8)
            mask = rng.integers(0, 3, (h, w)).astype(np.uint8)
            mask[0, :4] = 255
            Image.fromarray(pixels).save(root / "images" / split / f"{name}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"{name}.png")
            np.save(root / "depth" / split / f"{name}.npy", rng.uniform(0, 4, (h, w)).astype(np.float32))
            for below in ("one", "two"):
                Image.fromarray(rng.integers(0, 2, (h, w)).astype(np.uint8)).save(
                    root / "tags" / split / below / f"{name}.png"
                )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with a task of every kind, on data whose names are hostile."""
    folder = tmp_path_factory.mktemp("report")
    make_data(folder / "data")
    (folder / "all.yaml").write_text(
        CONFIG.replace("CLASSES", str(CLASSES)).replace("root: data", f"root: {folder}/data")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DENSECTX_RUN", "")
        assert cli.main(["fit", "-c", "all.yaml"]) == 0
    return folder / "runs" / "all" / "0"


@pytest.fixture
def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "all" / "0", symlinks=True))


class Page(HTMLParser):
    """The elements of a page, with the text in each; refuses wrong nesting."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.found = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        element = {"tag": name, "attributes": dict(attributes), "text": "", "inside": [e["tag"] for e in self.open]}
        self.found.append(element)
        if name not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, name):
        assert self.open.pop()["tag"] == name

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, name):
        return [e for e in self.found if e["tag"] == name]


@pytest.fixture(scope="module")
def page(run):
    return page_of(run)


def page_of(run, **options):
    path, missing = write_report(run, run / "again.html", **options)
    assert missing == []
    return Page(path.read_text(encoding="utf-8"))


# what the page is


def test_the_page_is_whole_and_asks_nobody(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.all("script") == []
    assert [e for e in page.all("meta") if "default-src 'none'" in e["attributes"].get("content", "")]
    for element in page.found:
        for key, value in element["attributes"].items():
            assert not key.startswith("on"), (key, value)
            if key in ("src", "href"):
                assert value.startswith(("data:image/", "data:,", "#")), value[:60]
    assert "url(" not in text
    assert "@import" not in text
    identities = [e["attributes"]["id"] for e in page.found if "id" in e["attributes"]]
    assert len(set(identities)) == len(identities)
    links = {e["attributes"]["href"][1:] for e in page.all("a")}
    assert links <= set(identities)
    assert {"scores", "curves", "task-0", "task-5", "field", "config", "environment", "checkpoints"} <= links


def test_those_who_do_not_see_it_are_told(page):
    assert all(e["attributes"].get("alt") for e in page.all("img"))
    for svg in page.all("svg"):
        if svg["attributes"].get("aria-hidden") != "true":
            assert svg["attributes"]["role"] == "img"
            titles = {svg["attributes"][key] for key in ("aria-labelledby", "aria-describedby")}
            assert titles <= {e["attributes"].get("id") for e in page.found if e["text"]}
    assert all(e["attributes"].get("scope") in ("row", "col") for e in page.all("th"))
    levels = [int(e["tag"][1]) for e in page.found if re.fullmatch("h[1-6]", e["tag"])]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_hostile_names_are_text(run, page):
    codes = [e["text"] for e in page.all("code")]
    assert any(NAMES[0] in text for text in codes)
    heads = [e["text"] for e in page.all("th")]
    for name in CLASSES:
        assert name in heads
    assert page.all("b") == [e for e in page.all("b") if "ol" in e["inside"]], "no class name became markup"
    assert HOSTILE not in (run / "report.html").read_text(encoding="utf-8")


@given(st.text(), st.text())
def test_any_text_comes_back_as_text(text, value):
    page = Page(tag("p", text, title=value))
    assert len(page.found) == 1
    valid = page.found[0]["text"]
    assert escaped(valid) == escaped(text.replace("\r\n", "\n").replace("\r", "\n")) or "\r" in text
    assert re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", valid) is None
    valid.encode("utf-8")
    assert list(page.found[0]["attributes"]) == ["title"]


def test_names_that_are_no_text():
    assert escaped("a\udcff<") == "a\\udcff&lt;"


# its numbers


def test_classes_are_those_of_brute_force(run, page):
    model = densectx.load(run)
    folder = run.parents[2] / "data"
    confusion = np.zeros((4, 4))
    for name in NAMES:
        image, _ = read_image(folder / "images" / "val" / f"{name}.png")
        answer = model.predict(image, ["segmentation"])["segmentation"].argmax(0).numpy()
        truth = np.asarray(Image.open(folder / "masks" / "val" / f"{name}.png"))
        for t in range(4):
            for a in range(4):
                confusion[t, a] += ((truth == t) & (answer == a)).sum()
    data = DataModule(densectx_data(run), num_workers=0)
    found = measure(model, data, "val", seed=0)
    np.testing.assert_array_equal(found["segmentation"].metric.confusion.numpy(), confusion)
    cells = [
        e["text"]
        for e in page.all("td")
        if "strong" in e["attributes"].get("class", "") or e["attributes"].get("class") in ("right", "wrong")
    ]
    shares = 100 * confusion[:3] / confusion[:3].sum(1, keepdims=True)
    shown = [0 if cell == "\N{MIDDLE DOT}" else int(cell) for cell in cells]
    np.testing.assert_allclose(shown, shares.ravel(), atol=0.51)
    assert any("not in the truth" in e["text"] for e in page.all("td"))


def densectx_data(run):
    from densectx.config import load_yaml

    return load_yaml(run / "config.yaml")["data"]["sources"]


def test_measures_are_those_of_the_fit(run):
    logged = read_history(run / "metrics.csv").validation(None)[1]
    found = measure(
        densectx.load(run / "checkpoints" / "last.ckpt"), DataModule(densectx_data(run), num_workers=0), "val", seed=0
    )
    assert set(found) == {"segmentation", "denoising", "super_resolution", "colorization", "regression", "tags"}
    for key, one in found.items():
        assert one.looked == one.labelled == one.total == len(NAMES)
        assert len(one.scored) == len(NAMES)
        for name, value in one.values.items():
            assert value == pytest.approx(logged[f"val/{key}/{name}"], rel=1e-4, abs=1e-4, nan_ok=True), (key, name)


class Unsaid(Metric):
    """Squared errors; as torchmetrics' guide writes one, without ``full_state_update``."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction, baseline, truth):
        self.total += torch.stack([(answer - truth).square().double().mean() for answer in (prediction, baseline)])

    def compute(self):
        return {"psnr": self.total[0], "psnr_noisy": self.total[1]}


class Nested(Metric):
    """States of its own beside those of another one."""

    def __init__(self):
        super().__init__()
        self.inner = Unsaid()
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, *images):
        self.inner.update(*images)
        self.count += len(images[0])

    def compute(self):
        return {name: total / self.count for name, total in self.inner.compute().items()}


@pytest.mark.parametrize(("metric", "factor"), [(Unsaid, 1), (Nested, len(NAMES))])
def test_metrics_that_torchmetrics_does_not_merge(run, metric, factor):
    model = densectx.load(run)
    model.task("denoising").metrics = metric()
    one = measure(model, DataModule(densectx_data(run), num_workers=0), "val", seed=0)["denoising"]
    for name, single in (("psnr", [s.score for s in one.scored]), ("psnr_noisy", [s.trivial for s in one.scored])):
        assert len(single) == len(NAMES)
        assert one.values[name] * factor == pytest.approx(sum(single))


def test_scores_of_single_images(run):
    """PSNR of a denoised image, by its definition."""
    model, data = densectx.load(run), DataModule(densectx_data(run), num_workers=0)
    one = measure(model, data, "val", seed=0)["denoising"]
    worst, best = one.ranking.ends()
    assert len(worst) == len(best) == SHOWN
    ordered = sorted(one.scored, key=lambda scored: scored.score)
    assert [s.name for s in worst] == [s.name for s in ordered[:3]]
    assert [s.name for s in best] == [s.name for s in reversed(ordered[-3:])]
    assert np.mean([s.score for s in one.scored]) == pytest.approx(one.values["psnr"], rel=1e-6)
    noisy, answer, truth = (p.double() for p in worst[0].pictures)
    assert noisy.shape == answer.shape == truth.shape
    error = (answer * 255).round() - (truth * 255).round()
    assert worst[0].score == pytest.approx(float(10 * torch.log10(255**2 / error.square().mean())), abs=1e-3)
    np.testing.assert_allclose(worst[0].error.values, 255 * (answer - truth).abs().mean(0), atol=1e-3)


def test_limit_is_spread_over_the_split(run):
    one = measure(densectx.load(run), DataModule(densectx_data(run), num_workers=0), "val", seed=0, limit=3)[
        "denoising"
    ]
    assert [Path(s.name).stem for s in one.scored] == [NAMES[i] for i in (0, 2, 4)]
    assert (one.looked, one.labelled, one.total) == (3, 3, 7)
    page = page_of(run, split="test", limit=3)
    assert any("6 of 14 samples" in e["text"] for e in page.all("caption"))  # of two sources, not of six tasks


def test_samples_without_a_label_are_looked_at(copied):
    config = load_yaml(copied / "config.yaml")
    scenes = config["data"]["sources"]["scenes"]
    folder = Path(scenes["root"])
    with open(copied / "test.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "mask", "target"])
        for number, name in enumerate(NAMES):
            mask = folder / f"masks/test/{name}.png" if number < 4 else ""
            rows.writerow([folder / f"images/test/{name}.png", mask, folder / f"depth/test/{name}.npy"])
    table = {"name": "manifest", "file": str(copied / "{split}.csv"), "target": "map", "classes": CLASSES}
    config["data"]["sources"]["scenes"] = table
    (copied / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    page = page_of(copied, split="test")
    assert any(e["text"] == "Measured for this page on the test split." for e in page.all("caption"))
    notes = [e["text"] for e in page.all("p") if e["text"].startswith("Classes and pictures")]
    assert sum("all 7 samples of the test split" in text for text in notes) == len(notes) == 6
    assert sum("of which 4 have its labels" in text for text in notes) == 1


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=20), st.booleans())
def test_ranking_is_a_sort(scores, higher):
    ranking = Ranking(higher)
    for index, score in enumerate(scores):
        if ranking.takes(score):
            ranking.add(Scored(str(index), score, 0.0))
    worst, best = ranking.ends()
    ordered = sorted(scores, reverse=not higher)
    count = len(scores)
    assert [s.score for s in worst] == ordered[: min(SHOWN, (count + 1) // 2)]
    assert [s.score for s in best] == ordered[::-1][: min(SHOWN, count // 2)]
    assert not {s.name for s in worst} & {s.name for s in best}


class _Task:
    def __init__(self, output):
        self.output = output


def test_error_maps_of_each_kind():
    rng = torch.Generator().manual_seed(0)
    scores, mask = torch.rand(1, 3, 5, 7, generator=rng), torch.randint(0, 3, (1, 5, 7), generator=rng)
    mask[0, 0, 0] = 9
    found = error_map(_Task("classes"), scores, {"mask": mask}, (), 9)
    for y in range(5):
        for x in range(7):
            expected = float("nan") if (y, x) == (0, 0) else float(scores[0, :, y, x].argmax() != mask[0, y, x])
            assert found.values[y, x].item() == pytest.approx(expected, nan_ok=True)
    labels = (torch.rand(1, 3, 5, 7, generator=rng) > 0.5).float()
    labels[0, :, 0, 0], labels[0, 1, 1, 1] = torch.nan, torch.nan
    found = error_map(_Task("labels"), scores, {"target": labels}, (), 9).values
    assert found[0, 0].isnan()
    pairs = [((scores[0, c, 1, 1] >= 0.5) != (labels[0, c, 1, 1] >= 0.5)).item() for c in (0, 2)]
    assert found[1, 1].item() == pytest.approx(np.mean(pairs))
    depth = torch.rand(1, 1, 5, 7, generator=rng)
    found = error_map(_Task("values"), depth + 0.25, {"value": depth, "unit": depth * 9}, (), 9).values
    torch.testing.assert_close(found, torch.full((5, 7), 0.25))
    drawn = [torch.zeros(3, 5, 7), torch.full((3, 5, 7), 2.0), torch.full((3, 5, 7), 0.5)]
    found = error_map(_Task("image"), scores, {"ab": depth}, drawn, 9).values
    torch.testing.assert_close(found, torch.full((5, 7), 127.5))


def test_tasks_whose_errors_cannot_be_drawn(run, monkeypatch):
    scores = torch.rand(1, 3, 5, 7)
    pictures = [torch.zeros(3, 5, 7), torch.zeros(3, 5, 7), torch.zeros(3, 10, 14)]
    assert error_map(_Task("classes"), scores, {"mask": torch.zeros(1, 3, 5, 7)}, pictures, 9).values.isnan().all()
    for drawn in (pictures, pictures[:2], pictures[:1]):
        assert error_map(_Task("image"), scores, {}, drawn, 9).values.isnan().all()
    model, data = densectx.load(run), DataModule(densectx_data(run), num_workers=0)
    for key in model.tasks:
        task = model.task(key)
        monkeypatch.setattr(task, "draw", lambda *answer, draw=task.draw: draw(*answer)[:2])
    found = measure(model, data, "val", seed=0)
    for key, names in (("denoising", ["Input", "Answer"]), ("segmentation", ["Input", "Answer", "Error"])):
        page = Page(str(tag("div", gallery(key, model.task(key), found[key]))))
        captions = [e["text"] for e in page.all("figcaption") if e["text"] in ("Input", "Answer", "Truth", "Error")]
        assert captions == names * 2 * SHOWN
        assert any("Error: " in e["text"] for e in page.all("p")) == ("Error" in names)


def test_thumbnails_keep_means_and_colours():
    picture = torch.rand(3, 2 * SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    small = thumbnail(picture)
    torch.testing.assert_close(small, torch.nn.functional.avg_pool2d(picture, 2))
    assert set(thumbnail(picture, exact=True).unique().tolist()) <= set(picture.unique().tolist())
    picture[:, :, : SIDE // 2] = torch.nan
    assert thumbnail(picture)[:, :, : SIDE // 4].isnan().all()
    noise = embedded(torch.rand(3, 300, 300), "noise")
    assert "data:image/jpeg" in noise
    assert "data:image/png" in embedded(torch.zeros(3, 300, 300), "black")


# curves


@example([1.0, 2.2250738585072014e-308], True)  # a decade below that is not a number of float64
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=1500), st.booleans())
def test_charts_take_any_numbers(values, smooth):
    series = Series(tuple(range(1, len(values) + 1)), tuple(values))
    page = Page(chart("loss", [Line("loss", series, smooth=smooth)], "c"))
    for path in page.all("path"):
        assert "nan" not in path["attributes"]["d"]
        numbers = [float(x) for x in re.findall(r"-?\d+\.?\d*", path["attributes"]["d"])]
        assert all(-1 <= number <= 441 for number in numbers)
    thin = charts._thinned(series)
    assert len(thin.steps) <= 240
    assert thin.steps[-1] == len(values)


@given(st.floats(-1e5, 1e5), st.floats(1e-4, 1e5))
def test_ticks_are_round_and_inside(low, width):
    ticks = charts._round_numbers(low, low + width, whole=False)
    assert 3 <= len(ticks) <= 7
    assert all(low - 1e-6 * width <= tick <= low + width + 1e-6 * width for tick in ticks)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (28.5963, 28.6042, ["28.596", "28.598", "28.600", "28.602", "28.604"]),
        (0.0, 100.0, ["0", "50", "100"]),
        (-1.0, 1.0, ["\N{MINUS SIGN}1", "0", "1"]),
        (1e-7, 2e-3, ["0.000", "0.001", "0.002"]),
    ],
)
def test_labels_tell_ticks_apart(low, high, labels):
    page = Page(chart("x", [Line("x", Series((1, 2), (low, high)))], "c"))
    assert [e["text"] for e in page.all("text") if e["attributes"]["text-anchor"] == "end"] == labels


def test_history_reads_what_the_fit_wrote(run, tmp_path):
    history = read_history(run / "metrics.csv")
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    loss = history.series["train/denoising/loss"]
    assert loss.steps == (1, 2, 3, 4)
    assert loss.values == tuple(float(row["train/denoising/loss"]) for row in rows)
    assert history.validation(2)[0] == 2
    assert history.validation(4)[1]["val/denoising/psnr"] == float(rows[3]["val/denoising/psnr"])
    assert history.validation(3) == (0, {})
    assert read_history(tmp_path / "none.csv").steps == 0


def test_what_a_user_logs_for_no_task_is_a_curve(copied):
    rows = list(csv.DictReader((copied / "metrics.csv").open()))
    with (copied / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "val/loss"])
        writer.writeheader()
        writer.writerows({**row, "val/loss": 0.5} for row in rows)
    page = page_of(copied, limit=1)
    assert any("as the fit logged it" in e["text"] for e in page.all("caption"))
    assert "val/loss" in [e["text"] for e in page.all("figcaption")]


def test_conflicts_are_shown_where_they_were_logged(copied, page):
    assert "conflict" not in {e["attributes"].get("id") for e in page.found}
    rows = list(csv.DictReader((copied / "metrics.csv").open()))
    with (copied / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "balance/cos/segmentation/denoising", "balance/norm/denoising"])
        writer.writeheader()
        for i, row in enumerate(rows):
            logged = {"balance/cos/segmentation/denoising": 0.5 - i / 3, "balance/norm/denoising": 2}
            writer.writerow({**row, **logged})
    page = page_of(copied, limit=1)
    assert "Tasks in conflict" in [e["text"] for e in page.all("h2")]
    row = next(e["text"] for e in page.all("tr") if "segmentation and denoising" in e["text"])
    assert row.endswith("50%")
    assert "length of gradients" in [e["text"] for e in page.all("figcaption")]
    assert not any("balance/" in e["text"] for e in page.all("figcaption")), "not among the curves too"


# config


def test_defaults_of_the_model_are_those_of_the_command():
    parameters = inspect.signature(build_module).parameters
    assert {key: parameters[key].default for key in MODEL} == dict(MODEL)
    left = {"sources", "seed", "backbone", "tasks", "optimizer", "projection", "name"}
    assert parameters.keys() - left == set(MODEL)


def test_settings_that_differ(run):
    from densectx.config import load_yaml

    differing, equal = settings(load_yaml(run / "config.yaml"))
    found = {one.key: (one.value, one.default) for one in differing}
    assert found["model.tasks.denoising.name"] == ("denoising", ABSENT)
    assert "model.tasks.denoising.sigma" not in found, "25 is the default"
    assert "model.norm" not in found
    assert found["model.optimizer.init_args.lr"] == (0.01, 1e-3)
    assert "model.optimizer.init_args.eps" not in found
    assert found["model.projection.channels"] == (6, 128)
    assert found["trainer.max_steps"] == (4, -1)
    assert found["data.sources.scenes.batch_size"] == (1, 4)
    assert found["data.num_workers"] == (0, 2)
    assert equal >= 3


def test_settings_of_what_is_not_known():
    config = {
        "model": {"backbone": "nowhere", "optimizer": {"class_path": "os.system", "init_args": {"a": 1}}, "freeze": []},
        "data": {"sources": {"x": {"name": "gone", "root": "r"}}},
    }
    found = {one.key: one.default for one in settings(config)[0]}
    assert found["model.backbone"] is ABSENT
    assert found["model.optimizer.init_args.a"] is ABSENT
    assert found["data.sources.x.root"] is ABSENT


# what cannot be had, and the fit


def test_without_its_data(copied, capsys):
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("/data", "/gone"))
    assert cli.main(["report", str(copied), "-o", str(copied / "x.html")]) == 3
    assert "no such folder" in capsys.readouterr().err
    page = Page((copied / "x.html").read_text())
    assert any("no such folder" in e["text"] for e in page.all("li"))
    assert {"scores", "curves", "field"} <= {e["attributes"].get("id") for e in page.found}


def test_data_that_had_to_be_there_in_time(copied):
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("\ndata:\n", "\ndata:\n  timeout: 30.0\n"))
    assert load_yaml(copied / "config.yaml")["data"]["timeout"] == 30.0
    found = open_run(copied)
    assert (found.missing, found.data.timeout) == ([], 30.0)


def test_a_config_without_sources(copied):
    config = load_yaml(copied / "config.yaml")
    del config["data"]["sources"]
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    found = open_run(copied)
    assert found.data is None
    assert [str(error) for error in found.missing] == [
        "data.sources is missing; the configs folder of densectx has examples."
    ]


def test_without_a_sound_checkpoint(copied, capsys):
    for file in (copied / "checkpoints").glob("step-*"):
        file.write_bytes(b"no")
    (copied / "metrics.csv").write_text("step,a\nx,y\n")
    assert cli.main(["report", str(copied)]) == 3
    error = capsys.readouterr().err
    assert "metrics.csv: is no table" in error
    assert "cannot be read as a checkpoint" in error
    page = Page((copied / "report.html").read_text())
    assert {"config", "environment"} <= {e["attributes"].get("id") for e in page.found}
    assert page.all("img") == []


def test_of_one_checkpoint(copied, capsys):
    assert cli.main(["report", str(copied / "checkpoints" / "step-2.ckpt"), "--limit", "1"]) == 0
    assert capsys.readouterr().out == f"{copied / 'report.html'}\n"
    page = Page((copied / "report.html").read_text())
    assert any("step-2.ckpt, step 2" in e["text"] for e in page.all("p"))
    assert any("after step 2" in e["text"] for e in page.all("caption"))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere"], "nowhere: there is no run folder"),
        ([], "required: RUN"),
        (["x", "--limit", "-1"], "--limit -1"),
        (["x", "--split", "train"], "invalid choice"),
        (["x", "--limits", "1"], "unknown option '--limits'; did you mean '--limit'?"),
        (["x", "y"], "unexpected 'y'"),
    ],
)
def test_usage(capsys, arguments, part):
    assert cli.main(["report", *arguments]) == 2
    assert part in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(run, capsys):
    assert cli.main(["report", str(run), "-o", "/nowhere/x.html", "--limit", "1"]) == 8
    assert "/nowhere/x.html" in capsys.readouterr().err


def test_a_device_without_float64_is_refused(run):
    with pytest.raises(ConfigError, match=r"--device mps: Apple's GPU has no float64.* take cpu"):
        write_report(run, device="mps")


def test_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="is no run folder"):
        write_report(tmp_path)


SMALL = """
model:
  backbone: {name: plain, width: 4}
  projection: {channels: 4}
  context: none
  tasks: {denoising: {name: denoising, source: mosaic}}
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01}}
data:
  sources: {mosaic: {name: mosaic, size: 16, length: 8, val_length: 2}}
  num_workers: 0
trainer: {accelerator: cpu, max_steps: 1, enable_progress_bar: false, enable_model_summary: false}
"""


@pytest.fixture
def fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSECTX_RUN", "")
    (tmp_path / "small.yaml").write_text(SMALL)

    def fit(*arguments):
        assert cli.main(["fit", "-c", "small.yaml", *arguments]) == 0
        return max((tmp_path / "runs" / "small").iterdir())

    return fit


def test_fit_writes_it_unless_told_not_to(fit):
    run = fit()
    assert (run / "report.html").stat().st_size > 10_000
    assert "processes" in (run / "environment.json").read_text()
    run = fit("--no-report")
    assert not (run / "report.html").exists()
    run = fit("--trainer.enable_checkpointing=false")
    assert not (run / "report.html").exists()


def test_a_report_that_fails_does_not_fail_the_fit(fit, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("densectx.training.write_report", broken)
    run = fit()
    assert (run / "checkpoints" / "last.ckpt").exists()
    said = [line for line in capsys.readouterr().err.splitlines() if "report" in line]
    assert said == ["densectx: report: not written: RuntimeError: two lines"]


def test_many_classes_are_a_picture():
    from densectx.metrics import ConfusionMetrics
    from densectx.report.classes import classes

    metric = ConfusionMetrics(40, 255)
    metric.confusion += torch.eye(40, dtype=torch.long) * 7
    metric.confusion[3, 5] = 2
    page = Page(tag("div", classes(metric, [f"class {i}" for i in range(40)], [])))
    assert len(page.all("img")) == 1
    assert any(e["text"] == "class 3 taken for class 5: 0.71%" for e in page.all("li"))
    assert classes(ConfusionMetrics(2, 255), ["a", "b"], []) == []


@pytest.mark.slow  # two processes start, train and end: half a minute
def test_two_processes_write_one_report(tmp_path):
    import os
    import subprocess
    import sys

    (tmp_path / "small.yaml").write_text(SMALL)
    environment = {**os.environ, "PYTHONPATH": str(Path(densectx.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    environment.pop("DENSECTX_RUN", None)
    command = [
        sys.executable,
        "-m",
        "densectx",
        "fit",
        "-c",
        "small.yaml",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/small/0/report.html").exists()
    assert done.stderr.count("Report: ") == 1
