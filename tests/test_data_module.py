"""Streams, collation and loaders: what is trained on when, and that everything is evaluated once."""

import errno
import os
import resource
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import multiprocessing
from torch.utils.data import DataLoader

from densectx import cli
from densectx.data.base import Dataset
from densectx.data.collate import Collate
from densectx.data.items import Items
from densectx.data.module import DataModule
from densectx.data.streams import EvalSampler, StepSampler
from densectx.data.transforms import Augment
from densectx.errors import ConfigError, DataError, MemoryLimitError
from densectx.registry import DATASETS
from densectx.resilience.failures import explained
from densectx.types import SourceInfo

# -- streams


def sampler(lengths, batch_sizes, *, world=1, rank=0, steps=10, start=0, sampling="joint", seed=0):
    return StepSampler(
        lengths, batch_sizes, sampling=sampling, seed=seed, world=world, rank=rank, steps=steps, start=lambda: start
    )


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 20), b=st.integers(1, 7), seed=st.integers(0, 99))
def test_each_sample_comes_once_a_pass(n, b, seed):
    items = [item for batch in sampler({"s": n}, {"s": b}, steps=3 * n + 5, seed=seed) for item in batch]
    assert [pass_ for _, pass_, _ in items] == [position // n for position in range(len(items))]
    for pass_ in range(len(items) // n):
        assert sorted(index for _, p, index in items if p == pass_) == list(range(n))


def test_passes_and_sources_and_seeds_have_their_own_order():
    def order(source, pass_, seed):
        step = sampler({source: 50}, {source: 50}, seed=seed)
        return [index for _, _, index in step.batch(pass_)]

    orders = {tuple(order(*key)) for key in (("a", 0, 0), ("a", 1, 0), ("b", 0, 0), ("a", 0, 1))}
    assert len(orders) == 4


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 12), b=st.integers(1, 3), world=st.integers(1, 4), sampling=st.sampled_from(["joint", "alternate"])
)
def test_the_global_order_does_not_depend_on_the_number_of_ranks(n, b, world, sampling):
    lengths = {"s": n, "t": n + 3}
    one = sampler(lengths, dict.fromkeys(lengths, b * world), sampling=sampling)
    parts = [sampler(lengths, dict.fromkeys(lengths, b), world=world, rank=r, sampling=sampling) for r in range(world)]
    for whole, *shares in zip(one, *parts, strict=True):
        for source in lengths:
            shared = [item for share in shares for item in share if item[0] == source]
            assert shared == [item for item in whole if item[0] == source]


@pytest.mark.parametrize("sampling", ["joint", "alternate"])
def test_an_iteration_starts_where_the_run_stands(sampling):
    lengths, sizes = {"s": 5, "t": 7}, {"s": 2, "t": 3}
    whole = list(sampler(lengths, sizes, steps=30, sampling=sampling))
    for start in range(20):
        assert list(sampler(lengths, sizes, steps=10, start=start, sampling=sampling)) == whole[start : start + 10]


def test_alternating_sources_take_turns():
    batches = list(sampler({"s": 4, "t": 4, "u": 4}, {"s": 1, "t": 2, "u": 4}, steps=12, sampling="alternate"))
    assert [batch[0][0] for batch in batches] == list("stu") * 4
    assert sorted(item[2] for batch in batches for item in batch if item[0] == "s") == [0, 1, 2, 3]  # nothing skipped


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", range(8))
@pytest.mark.parametrize("b", [1, 2, 3])
def test_evaluation_takes_everything_once(world, n, b):
    lengths, sizes = {"s": n, "t": 3, "empty": 0}, {"s": b, "t": 1, "empty": 1}
    parts = [list(EvalSampler(lengths, sizes, world=world, rank=rank)) for rank in range(world)]
    items = Counter(item for part in parts for batch in part for item in batch)
    assert items == Counter([("s", 0, i) for i in range(n)] + [("t", 0, i) for i in range(3)])
    for part in parts:
        assert all(len({item[0] for item in batch}) == 1 for batch in part)  # one source a batch
        sources = [batch[0][0] for batch in part]
        both = min(sources.count("s"), sources.count("t"))
        assert sources[: 2 * both] == ["s", "t"] * both  # in turn, so that a limited evaluation sees every source


# -- collation

COLLATE = Collate(
    {"s": SourceInfo(ignore_index=11), "t": SourceInfo()}, "set data.sources.{source}.augment.crop, or batch_size 1"
)


def sample(height=2, width=3, **labels):
    return {"image": torch.rand(3, height, width), **labels}


def test_missing_labels_are_filled():
    mask, target = torch.ones(2, 3, dtype=torch.int64), torch.ones(1, 2, 3)
    batch = COLLATE(
        [
            ("s", sample(mask=mask)),
            ("t", sample(gray=torch.tensor(True))),
            ("s", sample(target=target)),
        ]
    )
    assert list(batch) == ["s", "t"]
    assert batch["s"]["image"].shape == (2, 3, 2, 3)
    assert batch["s"]["mask"].tolist() == [mask.tolist(), [[11] * 3] * 2]
    assert batch["s"]["mask"].dtype == torch.int64
    assert batch["s"]["target"][0].isnan().all()
    assert torch.equal(batch["s"]["target"][1], target)
    assert set(batch["t"]) == {"image", "gray"}
    assert batch["t"]["gray"].tolist() == [True]
    assert batch["s"]["gray"].tolist() == [False, False]
    assert batch["s"]["gray"].dtype == torch.bool
    alone = {"image": torch.rand(1, 2, 3)}
    made = {**alone, "gray": torch.tensor(False)}  # of colours
    assert COLLATE([("s", alone), ("s", made)])["s"]["gray"].tolist() == [True, False]


def test_sizes_must_agree_within_a_batch():
    COLLATE([("s", sample()), ("t", sample(4, 4))])
    message = r"data.sources.s: sizes differ within a batch \(image: 3x2x3, 3x4x4\); set data.sources.s.augment.crop"
    with pytest.raises(DataError, match=message):
        COLLATE([("s", sample()), ("s", sample(4, 4))])


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4), scale=st.integers(1, 2))
def test_sizes_may_differ_where_padding_is_asked_for(sizes, scale):
    infos = {"s": SourceInfo(ignore_index=11, target="map", scale=scale)}
    samples = [
        {
            "image": torch.rand(3, h, w),
            "mask": torch.ones(h, w, dtype=torch.int64),
            "target": torch.ones(1, h * scale, w * scale),
            "valid": torch.ones(h, w, dtype=torch.bool),
            "key": torch.tensor([0, 0]),
        }
        for h, w in sizes
    ]
    batch = Collate(infos, "no", pad=["s"])([("s", sample) for sample in samples])["s"]
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    assert batch["image"].shape == (len(sizes), 3, height, width)
    assert batch["target"].shape == (len(sizes), 1, height * scale, width * scale)
    for i, (h, w) in enumerate(sizes):
        valid = torch.zeros(height, width, dtype=torch.bool)
        valid[:h, :w] = True
        assert torch.equal(batch["valid"][i], valid)
        assert torch.equal(batch["mask"][i], torch.where(valid, 1, 11))
        fine = valid.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        assert torch.equal(batch["target"][i, 0].isnan(), ~fine)
        rows, columns = torch.arange(height).clamp(max=h - 1), torch.arange(width).clamp(max=w - 1)
        assert torch.equal(batch["image"][i], samples[i]["image"][:, rows][:, :, columns])


# -- the module


class Counting(Dataset):
    """Images whose value is their index; the second half has no mask."""

    def __init__(self, n: int = 6, size: int = 8, *, split="train"):
        self.n, self.size, self.split = n, size, split
        self.info = SourceInfo(classes=("a", "b"), palette=((0, 0, 0), (9, 9, 9)), keys=("image", "mask"))

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        image = torch.full((3, self.size, self.size + 2), index / 100)
        image[0, 0] = torch.arange(self.size + 2) / 100
        mask = torch.full((self.size, self.size + 2), index % 2)
        return {"image": image, "gray": torch.tensor(False), **({"mask": mask} if index < self.n / 2 else {})}

    def name(self, index):
        return f"{self.split}/{index}"


@pytest.fixture(autouse=True)
def counting():
    DATASETS.register("counting")(Counting)
    yield
    DATASETS.unregister("counting")


AUGMENT = {"scale": [0.8, 1.5], "crop": 6, "flip": True, "color": 0.2}
SOURCES = {
    "s": {"name": "counting", "n": 6, "batch_size": 2, "augment": AUGMENT},
    "t": {"name": "counting", "n": 10, "batch_size": 3},
}


RARE = {"crop": 4, "rare": {"classes": ["b"], "probability": 0.5}}


def equal(a, b):
    same = [torch.equal(a[s][k].nan_to_num(-1), b[s][k].nan_to_num(-1)) for s in a for k in a[s]]
    return a.keys() == b.keys() and all(a[s].keys() == b[s].keys() for s in a) and all(same)


def test_joint_batches():
    module = DataModule(SOURCES, num_workers=0)
    loader = module.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 4  # ceil(10 / 3): an epoch shows the longest source once
    for batch in batches:
        assert batch["s"]["image"].shape == (2, 3, 6, 6)
        assert batch["t"]["image"].shape == (3, 3, 8, 10)
        assert batch["t"]["key"].shape == (3, 2)
        assert batch["t"]["gray"].shape == (3,)
        for (_, index), image in zip(batch["t"]["key"].tolist(), batch["t"]["image"], strict=True):
            assert image[1, 1, 1] == pytest.approx(index / 100)
        unlabelled = batch["t"]["key"][:, 1] >= 5
        if "mask" in batch["t"]:
            assert ((batch["t"]["mask"] == 255).flatten(1).all(1) == unlabelled).all()
        else:
            assert unlabelled.all()
    keys = torch.cat([batch["t"]["key"] for batch in batches]).tolist()
    assert sorted(index for pass_, index in keys if pass_ == 0) == list(range(10))
    assert {pass_ for pass_, _ in keys} == {0, 1}


def test_alternating_batches():
    module = DataModule(SOURCES, "alternate", num_workers=0)
    batches = list(module.train_dataloader())
    assert [list(batch) for batch in batches] == [["s"], ["t"]] * 4
    assert len(DataModule(SOURCES, num_workers=0, steps_per_epoch=3).train_dataloader()) == 3


def test_workers_change_nothing():
    inline = [list(DataModule(SOURCES, num_workers=0).train_dataloader()) for _ in range(2)]
    workers = DataModule(SOURCES, num_workers=2).train_dataloader()
    for batches in (inline[1], list(workers)):
        assert len(batches) == len(inline[0])
        assert all(equal(a, b) for a, b in zip(inline[0], batches, strict=True))
    other = list(DataModule(SOURCES, num_workers=0, seed=1).train_dataloader())
    assert not all(equal(a, b) for a, b in zip(inline[0], other, strict=True))


def test_augmentation_is_counted_by_pass_and_index():
    module = DataModule({"s": {**SOURCES["s"], "batch_size": 1}}, num_workers=0, steps_per_epoch=12)
    seen = {tuple(batch["s"]["key"][0].tolist()): batch["s"]["image"] for batch in module.train_dataloader()}
    assert not any(torch.equal(seen[0, index], seen[1, index]) for index in range(6))
    module = DataModule({"s": SOURCES["s"]}, num_workers=0)  # another batch size
    for batch in module.train_dataloader():
        for key, image in zip(batch["s"]["key"].tolist(), batch["s"]["image"], strict=True):
            assert torch.equal(image, seen[tuple(key)][0])


def test_evaluation_batches():
    module = DataModule({**SOURCES, "t": {**SOURCES["t"], "eval_batch_size": 4}}, num_workers=0)
    for loader in (module.val_dataloader(), module.test_dataloader()):
        batches = list(loader)
        assert [list(batch) for batch in batches] == [["s"], ["t"]] * 3 + [["s"]] * 3
        assert torch.cat([batch["t"]["key"] for batch in batches if "t" in batch]).tolist() == [
            [0, i] for i in range(10)
        ]
        assert batches[0]["s"]["image"].shape == (1, 3, 8, 10)  # not augmented


def test_info_and_names():
    infos = DataModule(SOURCES).info()
    assert infos["s"].size == (6, 6)
    assert infos["t"].size is None
    mosaic = {"name": "mosaic", "size": 32}
    sizes = {
        "a": None,
        "b": {"flip": True},
        "c": {"scale": [1, 2], "pad": True},
        "d": {"scale": [1, 2], "crop": [8, 9]},
    }
    infos = DataModule({key: {**mosaic, "augment": augment} for key, augment in sizes.items()}).info()
    assert [infos[key].size for key in sizes] == [(32, 32), (32, 32), None, (8, 9)]
    assert DataModule(SOURCES).sample_name("t", 3, "val") == "val/3"


def test_no_file_is_touched_before_it_is_needed():
    module = DataModule({"x": {"name": "folder", "root": "/nowhere"}}, num_workers=0)
    assert module.info()["x"].channels == 3
    with pytest.raises(DataError, match=r"^data\.sources\.x\.root: /nowhere: no such folder; set this key"):
        module.train_dataloader()


EMPTY = {"name": "folder", "root": ".", "splits": {"train": None, "val": None, "test": None}}


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"name": "folder", "root": "data/a"}, "x.root: data/a: no such folder"),
        ({"name": "image_mask", "preset": "voc", "root": "data/a"}, "x.root: data/a: no such folder"),
        ({"name": "paired", "preset": "div2k", "scale": 2, "root": "data/a"}, "x.root: data/a: no such folder"),
        ({"name": "manifest", "file": "data/a/x.csv"}, "x.file: data/a/x.csv: the manifest cannot be read"),
        (
            {"name": "concat", "parts": [EMPTY, {"name": "folder", "root": "data/a"}]},
            "x.parts.1.root: data/a: no such folder",
        ),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_missing_data_are_named_by_their_key(spec, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DENSECTX_DATA", raising=False)
    for said in ("not set", "now data"):
        if said == "now data":
            monkeypatch.setenv("DENSECTX_DATA", "data")
        data = DataModule({"x": spec}, num_workers=0)
        for split in ("train", "val"):
            with pytest.raises(DataError) as error:
                len(data.datasets[split]["x"])
            assert str(error.value).startswith(f"data.sources.{named}")
            assert f"set DENSECTX_DATA ({said}) to the folder that has a" in str(error.value)
    monkeypatch.setenv("DENSECTX_DATA", "/elsewhere")
    with pytest.raises(DataError, match=r"; set this key to where it is\.$"):
        len(DataModule({"x": spec}, num_workers=0).datasets["train"]["x"])


def test_a_missing_index_of_shards_is_named_by_its_key():
    with pytest.raises(
        DataError, match=r"^data\.sources\.x\.root: /nowhere/index\.json: no such file; `densectx shard"
    ):
        DataModule({"x": {"name": "shards", "root": "/nowhere"}}, num_workers=0)


@pytest.mark.parametrize("command", ["fit -c", "lint", "shard -o out"])
def test_commands_name_the_key_of_missing_data(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DENSECTX_DATA", raising=False)
    config = Path(__file__).resolve().parents[1] / "configs" / "denoising_bsds500.yaml"
    assert cli.main([*command.split(), str(config)]) == 3
    said = "".join(capsys.readouterr())
    assert "data.sources.bsds500.root: data/bsds500/images: no such folder; set DENSECTX_DATA (not set)" in said


def test_sizes_that_augmentation_makes_differ_are_refused_before_data_are_read():
    spec = {"name": "folder", "root": "/nowhere", "augment": {"scale": [0.5, 1.5]}}
    fix = r"data\.sources\.s\.augment\.scale: .* a batch of 4 .*set data\.sources\.s\.augment\.crop, augment\.pad: true"
    with pytest.raises(ConfigError, match=fix):
        DataModule({"s": spec})
    one_size = ({"scale": [0.5, 0.5]}, {"scale": [0.5, 1.5], "crop": 8}, {"scale": [0.5, 1.5], "pad": True})
    for fixed in ({"batch_size": 1}, *({"augment": augment} for augment in one_size)):
        DataModule({"s": {**spec, **fixed}})
    read = DataModule({"s": {**SOURCES["s"], "augment": {"scale": [0.5, 1.5], "pad": True}}}, num_workers=0)
    assert all("valid" in batch["s"] for batch in read.train_dataloader())


def test_errors_of_data(tmp_path):
    with pytest.raises(DataError, match=r"data.sources.s: no training samples"):
        DataModule({"s": {"name": "counting", "n": 0}}, num_workers=0).train_dataloader()
    with pytest.raises(DataError, match=r"train/\d: image 8x10 is smaller than crop 99x99"):
        list(DataModule({"s": {**SOURCES["s"], "augment": {"crop": 99}}}, num_workers=0).train_dataloader())
    for index in range(2):
        Image.fromarray(np.zeros((4, 4 + index), np.uint8)).save(tmp_path / f"{index}.png")
    splits = {split: {"from": ["."]} for split in ("train", "val", "test")}
    spec = {"name": "folder", "root": str(tmp_path), "splits": splits, "eval_batch_size": 2}
    for workers in (0, 2):
        module = DataModule({"f": spec}, num_workers=workers)
        with pytest.raises(DataError, match=r"sizes differ .*3x4x4, 3x4x5.*; set data.sources.f.eval_batch_size to 1"):
            list(module.val_dataloader())
        with pytest.raises(DataError, match=r"set data.sources.f.augment.crop or augment.pad, or batch_size 1"):
            list(module.train_dataloader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": {}}, "data.sources: expected a mapping"),
        ({"sources": {"s": 3}}, "data.sources.s: expected a data set"),
        ({"sources": {"s": "countin"}}, "data.sources.s: unknown dataset 'countin'; did you mean 'counting'"),
        ({"sources": {"s": {"name": "counting", "m": 1}}}, "data.sources.s: dataset 'counting' has no option 'm'"),
        ({"sources": {"s": {"name": "counting", "split": "val"}}}, "'split' is set by densectx"),
        ({"sources": {"s": {"name": "counting", "batch_size": 0}}}, "data.sources.s.batch_size: expected"),
        ({"sources": {"s": {"name": "counting", "eval_batch_size": "2"}}}, "data.sources.s.eval_batch_size: expected"),
        ({"sources": {"s": {"name": "counting", "augment": {"corp": 3}}}}, "data.sources.s.augment: .* 'crop'"),
        ({"sources": SOURCES, "sampling": "join"}, "expected joint or alternate, got 'join'; did you mean 'joint'"),
        ({"sources": SOURCES, "on_corrupt": "skp"}, "data.on_corrupt: expected error or skip, .*; did you mean 'skip'"),
        ({"sources": {"s": {**SOURCES["s"], "augment": {"cutmix": 1, "scale": [1, 2]}}}}, "s.augment.cutmix: needs"),
        ({"sources": {"s": {**SOURCES["s"], "augment": RARE | {"crop": None}}}}, "s.augment.rare: .* there is no crop"),
        (
            {"sources": {"f": {"name": "folder", "root": "x", "augment": RARE}}},
            "f.augment.rare: the source has no masks",
        ),
        ({"sources": SOURCES, "num_workers": -1}, "data.num_workers"),
        ({"sources": SOURCES, "steps_per_epoch": 0}, "data.steps_per_epoch"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        DataModule(**options)


# -- mixing


MIX = {**AUGMENT, "pad": True, "rotate90": True, "rare": RARE["rare"], "cutmix": 0.6}
MIXED = {"s": {"name": "counting", "n": 7, "batch_size": 4, "augment": MIX}}


def by_key(batches):
    """{(source, pass, index): {key: tensor}} of collated batches; labels that only some batches have are filled."""
    found = {}
    for batch in batches:
        for source, part in batch.items():
            for i, key in enumerate(part["key"].tolist()):
                values = {"mask": torch.full((6, 6), 255), **{name: value[i] for name, value in part.items()}}
                assert found.setdefault((source, *key), values) is values
    return found


def identical(a, b):
    return a.keys() == b.keys() and all(
        a[k].keys() == b[k].keys() and all(torch.equal(a[k][n], b[k][n]) for n in a[k]) for k in a
    )


def run_rank(rank, world, port, spec, workers, path):
    """One process of a run of 5 steps under Lightning, which notes every sample it trains on."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world), NODE_RANK="0")
        os.environ["LOCAL_RANK"] = str(rank)
    if "counting" not in DATASETS.names():
        DATASETS.register("counting")(Counting)
    module, recorder = DataModule(spec, num_workers=workers), Recorder(keep=True)
    strategy = {"devices": world, "strategy": "ddp"} if world > 1 else {}
    fit(path, module, recorder, max_steps=5, limit_val_batches=0, **strategy)
    torch.save(recorder.batches, path / f"{world}-{rank}.pt")


def test_two_ranks_and_any_number_of_workers_mix_the_same(tmp_path, free_port):
    """CutMix reads samples that another rank or worker has; still each sample is the same to the bit."""
    half = {"s": {**MIXED["s"], "batch_size": 2}}
    run_rank(0, 1, 0, MIXED, 0, tmp_path)
    port = free_port()
    multiprocessing.start_processes(run_rank, (2, port, half, 0, tmp_path), nprocs=2, start_method="spawn")
    one, *two = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert len(one) == len(two[0]) == len(two[1]) == 5
    samples = by_key(one)
    assert len(samples) == 20
    assert identical(samples, by_key([*two[0], *two[1]]))
    for workers in (1, 3):
        loader = DataModule(MIXED, num_workers=workers, steps_per_epoch=5).train_dataloader()
        assert identical(samples, by_key(loader))


def test_the_share_of_mixed_samples():
    dataset = Counting(50)
    plain, mixed = (
        [
            Items({"s": dataset}, {"s": Augment(crop=6, cutmix=share, info=dataset.info)}, 0)["s", pass_, index][1]
            for pass_ in range(6)
            for index in range(50)
        ]
        for share in (0.0, 0.4)
    )
    changed = sum(not torch.equal(a["image"], b["image"]) for a, b in zip(plain, mixed, strict=True))
    assert 80 < changed < 140  # 120 expected, less those with too small a box or with themselves
    partners = {round(float(value) * 100) for b in mixed for value in b["image"].unique()}
    assert len(partners) > 45  # of the whole source


def test_mixed_samples_of_partial_labels_keep_image_and_mask_together():
    dataset = Counting(6)  # image: index / 100, mask: index % 2 of the first three
    items = Items({"s": dataset}, {"s": Augment(crop=[7, 10], cutmix=1.0, info=dataset.info)}, 0)
    seen = Counter()
    for index in range(6):
        for pass_ in range(20):
            part = items["s", pass_, index][1]
            inner = part["image"][1].mul(100).round().long()
            expected = torch.where(inner < 3, inner % 2, 255)
            if "mask" in part:
                assert torch.equal(part["mask"], expected)
            else:
                assert (expected == 255).all()
            seen[int(inner.unique().numel())] += 1
    assert set(seen) == {1, 2}
    assert seen[2] > 60


@pytest.mark.fault("I12")
@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_any_size_train_in_one_batch(tmp_path, workers):
    sizes = [(1, 1), (1, 9), (7, 1), (5, 6), (12, 3)]
    for index, (height, width) in enumerate(sizes):
        Image.fromarray(np.full((height, width, 3), index + 1, np.uint8)).save(tmp_path / f"{index}.png")
    splits = {"train": {"from": ["."]}, "val": None, "test": None}
    spec = {"name": "folder", "root": str(tmp_path), "splits": splits, "batch_size": 5}
    for augment, size in (({"pad": True}, (12, 9)), ({"pad": True, "crop": 8, "rotate90": True}, (8, 8))):
        module = DataModule({"f": {**spec, "augment": augment}}, num_workers=workers)
        assert module.info()["f"].size == ((8, 8) if "crop" in augment else None)
        batch = next(iter(module.train_dataloader()))["f"]
        assert batch["image"].shape == (5, 3, *size)
        for (_, index), image, valid in zip(batch["key"].tolist(), batch["image"], batch["valid"], strict=True):
            area = [min(side, size[0]) for side in sizes[index]] if "crop" in augment else sizes[index]
            assert int(valid.sum()) == area[0] * area[1]
            assert image.unique().tolist() == [pytest.approx((index + 1) / 255)]


def test_voc_images_smaller_than_the_crop(tmp_path):
    """The shipped config's augmentation on images of VOC's sizes, which are at most 500 pixels a side."""
    from densectx.yamlfile import load_yaml

    source = load_yaml(Path(__file__).parents[1] / "configs" / "segmentation_voc.yaml")["data"]["sources"]["voc"]
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for name, (height, width) in {"a": (281, 500), "b": (500, 375), "c": (112, 142)}.items():
        Image.fromarray(np.full((height, width, 3), 80, np.uint8)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        Image.fromarray(np.full((height, width), 3, np.uint8)).save(tmp_path / "SegmentationClass" / f"{name}.png")
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text("a\nb\nc\n")
    module = DataModule({"voc": {**source, "root": str(tmp_path), "batch_size": 3}}, num_workers=0, steps_per_epoch=4)
    masks = torch.cat([batch["voc"]["mask"] for batch in module.train_dataloader()])
    assert masks.shape == (12, *module.info()["voc"].size)
    assert set(masks.unique().tolist()) == {3, 255}


# -- broken files


@pytest.fixture
def broken(tmp_path):
    """Six images, of which the second and the third are cut off and the last is no image."""
    for index in range(6):
        Image.fromarray(np.full((8, 8, 3), 10 * index, np.uint8)).save(tmp_path / f"{index}.png")
    for index in (1, 2):
        data = (tmp_path / f"{index}.png").read_bytes()
        (tmp_path / f"{index}.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "5.png").write_bytes(b"no image")
    splits = {"train": {"from": ["."]}, "val": {"from": ["."]}, "test": None}
    return {"f": {"name": "folder", "root": str(tmp_path), "splits": splits, "batch_size": 3}}


@pytest.mark.fault("I01")
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_errors_or_skipped(broken, workers, capfd):
    with pytest.raises(DataError, match=r"[125]\.png: "):
        list(DataModule(broken, num_workers=workers).train_dataloader())
    module = DataModule(broken, num_workers=workers, steps_per_epoch=10, on_corrupt="skip")
    loader = module.train_dataloader()
    first = [dict(batch["f"].items()) for batch in loader]
    for batch in first:
        values = batch["image"].mul(255).round().flatten(1)
        assert (values[:, 0] == 10 * batch["key"][:, 1]).all()  # the key says which sample it is
    order = [index for items in sampler({"f": 6}, {"f": 3}) for _, _, index in items]
    taken = [index for batch in first for index in batch["key"][:, 1].tolist()]
    assert taken == [{1: 3, 2: 3, 5: 0}.get(index, index) for index in order]
    list(loader)
    lines = capfd.readouterr().err.splitlines()
    assert all(line.startswith("densectx: warning: data.sources.f: ") for line in lines)
    for name in ("1.png", "2.png", "5.png"):
        assert 1 <= sum(name in line for line in lines) <= max(workers, 1)  # once a process
    assert {Path(name).name for name in module.skipped()["f"]} == {"1.png", "2.png", "5.png"}
    module.teardown("fit")
    assert "3 of 6 training samples were skipped: " in capfd.readouterr().err
    with pytest.raises(DataError, match=r"1\.png"):  # evaluation would be of other data
        list(module.val_dataloader())


def test_a_source_without_one_good_file_ends_the_run(broken, tmp_path):
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"no image")
    for workers in (0, 2):
        module = DataModule(broken, num_workers=workers, on_corrupt="skip")
        with pytest.raises(DataError, match=r"data.sources.f: none of 6 samples can be read. .*\.png: not a readable"):
            list(module.train_dataloader())


def test_the_reason_is_given_by_a_process_that_found_no_bad_file_itself(broken, tmp_path):
    data = DataModule(broken, num_workers=0, on_corrupt="skip").train_dataloader().dataset
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"no image")
    for _ in range(2):  # the second finds every flag set, as a process does whose sibling was faster
        with pytest.raises(DataError, match=r"none of 6 samples can be read. .*\.png: not a readable"):
            data[("f", 0, 0)]


def test_skipping_works_in_spawned_workers(broken):
    module = DataModule(broken, num_workers=0, on_corrupt="skip")
    loader = module.train_dataloader()
    spawned = DataLoader(
        loader.dataset,
        batch_sampler=loader.batch_sampler,
        collate_fn=loader.collate_fn,
        num_workers=1,
        multiprocessing_context="spawn",
    )
    assert sum(len(batch["f"]["image"]) for batch in spawned) == 6
    assert len(module.skipped()["f"]) == 3


# -- under Lightning


class Recorder(pl.LightningModule):
    """Trains one number and notes which samples it sees."""

    def __init__(self, keep=False):
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))
        self.keep, self.seen, self.evaluated, self.batches = keep, [], [], []

    def training_step(self, batch, batch_idx):
        self.seen.append({source: part["key"].tolist() for source, part in batch.items()})
        if self.keep:
            self.batches.append(batch)
        return self.number**2

    def validation_step(self, batch, batch_idx):
        self.evaluated += [(source, *key) for source, part in batch.items() for key in part["key"].tolist()]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(path, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=path, use_distributed_sampler=False, **quiet, **options)


@pytest.mark.fault("I01")
def test_a_run_says_at_its_end_what_it_has_skipped(broken, tmp_path, capfd):
    module = DataModule(broken, num_workers=2, on_corrupt="skip")
    recorder = fit(tmp_path, module, max_steps=4, limit_val_batches=0)
    assert len(recorder.seen) == 4
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("densectx: warning: data.")]
    assert any("1.png: " in line and line.endswith("Skipped (data.on_corrupt).") for line in lines)
    assert "3 of 6 training samples were skipped" in lines[-1]
    assert not any("training samples" in line for line in lines[:-1])


class SaveAt(pl.Callback):
    """Writes a checkpoint at the end of one step, as preemption and periodic checkpoints do."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def fit(tmp_path, module, recorder=None, ckpt=None, **options):
    recorder = recorder or Recorder()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(num_workers|logging interval|does not have many workers).*")
        warnings.filterwarnings("error", ".*not resumable.*")
        trainer(tmp_path, **options).fit(recorder, module, ckpt_path=ckpt)
    return recorder


def test_training_goes_on_at_every_step(tmp_path):
    """10 steps in epochs of 4: checkpoints inside epochs, at their ends, and of the run's end."""
    whole = fit(tmp_path, DataModule(SOURCES, num_workers=0), max_steps=10)
    expected = list(sampler({"s": 6, "t": 10}, {"s": 2, "t": 3}, steps=10))
    assert whole.seen == [{s: [[p, i] for name, p, i in items if name == s] for s in "st"} for items in expected]
    assert Counter(whole.evaluated)["s", 0, 0] > 1
    for step in range(1, 10):
        path = tmp_path / f"{step}.ckpt"
        first = fit(tmp_path, DataModule(SOURCES, num_workers=0), max_steps=10, callbacks=[SaveAt(step, path)])
        assert first.seen == whole.seen[: len(first.seen)]
        state = torch.load(path, weights_only=True)
        assert state["DataModule"]["steps"] == step
        rest = fit(tmp_path, DataModule(SOURCES, num_workers=0), ckpt=path, max_steps=10)
        assert rest.seen == whole.seen[step:], step


def test_with_other_batch_sizes_a_run_goes_on_at_the_next_sample(tmp_path):
    """Twice over, through several passes: no sample comes twice in a pass, none is left out."""
    seen, path = {"s": [], "t": []}, None
    for batch, steps in ((4, 5), (1, 9), (3, 20)):
        sources = {"s": {**SOURCES["s"], "batch_size": batch}, "t": {**SOURCES["t"], "batch_size": 2 * batch}}
        module = DataModule(sources, "alternate", num_workers=0, steps_per_epoch=100)
        last, path = path, tmp_path / f"{batch}.ckpt"
        part = fit(tmp_path, module, ckpt=last, max_steps=20, callbacks=[SaveAt(steps, path)])
        for taken in part.seen:
            for source, keys in taken.items():
                seen[source] += keys
    whole = {source: sampler({source: n}, {source: 1}, steps=len(seen[source])) for source, n in (("s", 6), ("t", 10))}
    assert seen == {source: [list(items[0][1:]) for items in one] for source, one in whole.items()}


def test_a_state_without_positions_goes_on_at_the_next_sample(caplog):
    module = DataModule({"s": {"name": "counting", "n": 6, "batch_size": 1}}, num_workers=0)
    with caplog.at_level("INFO"):
        module.load_state_dict({"steps": 7, "ranks": 2, "batch_sizes": {"s": 2}})
    expected = sampler({"s": 6}, {"s": 1}, start=28)
    assert [batch["s"]["key"][0].tolist() for batch in module.train_dataloader()] == [
        list(items[0][1:]) for items in list(expected)[:6]
    ]
    assert "goes on with 1: a step takes {'s': 1} samples instead of {'s': 4}" in caplog.text
    assert "every sample still comes once a pass" in caplog.text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_is_pinned_where_the_run_has_a_gpu(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module = DataModule(SOURCES, num_workers=0)
    strategy = SimpleNamespace(root_device=torch.device(device))
    module.trainer = SimpleNamespace(strategy=strategy, world_size=1, global_rank=0)
    assert module.val_dataloader().pin_memory == (device == "cuda")


def test_workers_and_checkpoints_between_epochs(tmp_path):
    module = DataModule(SOURCES, "alternate", num_workers=1, steps_per_epoch=3)
    whole = fit(tmp_path, module, max_steps=9)
    path = tmp_path / "end.ckpt"

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, *_):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(path)

    fit(tmp_path, DataModule(SOURCES, "alternate", num_workers=0, steps_per_epoch=3), max_steps=9, callbacks=[Save()])
    again = fit(tmp_path, DataModule(SOURCES, "alternate", 0, steps_per_epoch=3), ckpt=path, max_steps=9)
    assert again.seen == whole.seen[6:]


def test_a_state_without_a_trainer():
    module = DataModule(SOURCES, num_workers=0)
    batches = list(module.train_dataloader())
    positions = {"s": 0, "t": 0}
    assert module.state_dict() == {"steps": 0, "ranks": 1, "batch_sizes": {"s": 2, "t": 3}, "positions": positions}
    module.load_state_dict({"steps": 2})
    assert equal(next(iter(module.train_dataloader())), batches[2])


def test_limited_epochs_skip_nothing(tmp_path):
    whole = fit(tmp_path, DataModule(SOURCES, num_workers=0), max_steps=8)
    short = fit(tmp_path, DataModule(SOURCES, num_workers=0), max_steps=8, limit_train_batches=3)
    assert short.seen == whole.seen


def test_what_is_read_as_numbers_stays_on_the_cpu():
    """Reading it from a device would wait for everything that was asked of it, at every step."""
    data = DataModule({"mosaic": {"name": "mosaic", "size": 16, "length": 4, "val_length": 1}})
    batch = next(iter(data.train_dataloader()))
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    places = {name: value.device.type for name, value in moved["mosaic"].items() if isinstance(value, torch.Tensor)}
    assert places["image"] == "meta"
    assert places["key"] == "cpu"
    assert moved["mosaic"].keys() == batch["mosaic"].keys()
    assert moved["mosaic"]["key"].tolist() == batch["mosaic"]["key"].tolist()


@pytest.fixture
def few_files():
    """Far fewer open files than a window of gradient accumulation has tensors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 60, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="where open files are not listed")
def test_a_window_of_many_batches_does_not_run_out_of_open_files(few_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(
        "model:\n  backbone: {name: plain, width: 4, depth: 1}\n  projection: {channels: 4}\n  context: null\n"
        "  tasks: {denoising: {name: denoising, source: a, sigma: 25}}\n"
        "  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.001}}\n"
        "data: {sources: {a: {name: mosaic, size: 16, batch_size: 1}}, num_workers: 1}\n"
        "trainer: {max_steps: 1, accelerator: cpu, accumulate_grad_batches: 64, limit_val_batches: 0, logger: false,"
        " enable_checkpointing: false, enable_progress_bar: false, enable_model_summary: false}\n"
    )
    assert cli.main(["fit", "-c", "c.yaml", "--no-report"]) == 0
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] in (few_files, 65536)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("received 0 items of ancdata"),
        OSError(errno.EMFILE, "Too many open files"),
        OSError("Caught OSError in DataLoader worker process 0.\nOSError: [Errno 24] Too many open files"),
    ],
)
def test_too_many_open_files_are_explained(error):
    known = explained(error, None)
    assert isinstance(known, MemoryLimitError)
    assert all(part in str(known) for part in ("ulimit", "trainer.accumulate_grad_batches", "data.num_workers: 0"))
