"""Streams, collation and loaders: what is trained on when, and that everything is evaluated once."""

import warnings
from collections import Counter

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from densectx.data.base import Dataset
from densectx.data.collate import Collate
from densectx.data.module import DataModule
from densectx.data.streams import EvalSampler, StepSampler
from densectx.errors import ConfigError, DataError
from densectx.registry import DATASETS
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

COLLATE = Collate({"s": 11, "t": 255}, "set data.sources.{source}.augment.crop, or batch_size 1")


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


def test_sizes_must_agree_within_a_batch():
    COLLATE([("s", sample()), ("t", sample(4, 4))])
    message = r"data.sources.s: sizes differ within a batch \(image: 3x2x3, 3x4x4\); set data.sources.s.augment.crop"
    with pytest.raises(DataError, match=message):
        COLLATE([("s", sample()), ("s", sample(4, 4))])


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
    sizes = {"a": None, "b": {"flip": True}, "c": {"scale": [1, 2]}, "d": {"scale": [1, 2], "crop": [8, 9]}}
    infos = DataModule({key: {**mosaic, "augment": augment} for key, augment in sizes.items()}).info()
    assert [infos[key].size for key in sizes] == [(32, 32), (32, 32), None, (8, 9)]
    assert DataModule(SOURCES).sample_name("t", 3, "val") == "val/3"


def test_no_file_is_touched_before_it_is_needed():
    module = DataModule({"x": {"name": "folder", "root": "/nowhere"}}, num_workers=0)
    assert module.info()["x"].channels == 3
    with pytest.raises(DataError, match="/nowhere/train"):
        module.train_dataloader()


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
        with pytest.raises(DataError, match=r"set data.sources.f.augment.crop, or batch_size 1"):
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
        ({"sources": SOURCES, "num_workers": -1}, "data.num_workers"),
        ({"sources": SOURCES, "steps_per_epoch": 0}, "data.steps_per_epoch"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        DataModule(**options)


# -- under Lightning


class Recorder(pl.LightningModule):
    """Trains one number and notes which samples it sees."""

    def __init__(self):
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.evaluated = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append({source: part["key"].tolist() for source, part in batch.items()})
        return self.number**2

    def validation_step(self, batch, batch_idx):
        self.evaluated += [(source, *key) for source, part in batch.items() for key in part["key"].tolist()]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(path, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=path, use_distributed_sampler=False, **quiet, **options)


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
        assert state["DataModule"] == {"steps": step}
        rest = fit(tmp_path, DataModule(SOURCES, num_workers=0), ckpt=path, max_steps=10)
        assert rest.seen == whole.seen[step:], step


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
    assert module.state_dict() == {"steps": 0}
    module.load_state_dict({"steps": 2})
    assert equal(next(iter(module.train_dataloader())), batches[2])


def test_limited_epochs_skip_nothing(tmp_path):
    whole = fit(tmp_path, DataModule(SOURCES, num_workers=0), max_steps=8)
    short = fit(tmp_path, DataModule(SOURCES, num_workers=0), max_steps=8, limit_train_batches=3)
    assert short.seen == whole.seen
