"""Accumulated batches have the gradient of one batch with all their samples, on one and two ranks."""

import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import distributed, multiprocessing

from densectx.checkpointing import Checkpoints
from densectx.cli import main
from densectx.data.base import Dataset
from densectx.data.module import DataModule
from densectx.errors import ConfigError
from densectx.losses import Countable, Loss
from densectx.losses.base import Loss as Base
from densectx.model import DenseModel
from densectx.module import DenseModule
from densectx.registry import DATASETS, LOSSES, TASKS
from densectx.types import SourceInfo

N = 3
CLASSES = ("x", "y", "z")


class Uneven(Dataset):
    """Float64 noise; samples differ in how much of them is labelled, some are not at all."""

    info = SourceInfo(classes=CLASSES, keys=("image", "mask"))

    def __init__(self, *, split, length: int = 30, val_length: int = 0, seed: int = 0):
        self.length, self.seed = (length if split == "train" else val_length), seed

    def __len__(self):
        return self.length

    def name(self, index):
        return str(index)

    def __getitem__(self, index):
        rng = torch.Generator().manual_seed(100 * self.seed + index)
        mask = torch.randint(0, 3, (16, 16), generator=rng)
        mask[: int(torch.randint(0, 17, (), generator=rng))] = 255
        return {"image": torch.rand(3, 16, 16, generator=rng, dtype=torch.float64), "mask": mask}


class Uncounted(Base):
    """Mean squared error whose weight nobody knows ahead."""

    def forward(self, output, target):
        known = ~target.isnan()
        return torch.where(known, output - target, 0.0).square().sum(), known.sum().to(output.dtype)


class Liar(Loss, Countable):
    """Counts other pixels than it weighs."""

    def forward(self, output, target):
        return (output - target).square().sum(), torch.tensor(float(target.numel()), dtype=output.dtype)

    def weight(self, target):
        return torch.tensor(float(target.numel() + target.shape[0]))


class Keeping(Base):
    """Makes a tensor when it is first used, and writes into what it is given."""

    unit = None

    def forward(self, output, target):
        self.unit = torch.ones_like(output[:1]) if self.unit is None else self.unit
        target.nan_to_num_()
        return (output * self.unit - target).abs().sum(), torch.tensor(float(target.numel()))


class Foreign(pl.LightningModule):
    """A module of somebody else's."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, index):
        return self.weight * batch["s"]["image"].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


DATASETS.register("test-uneven")(Uneven)
LOSSES.register("test-uncounted")(Uncounted)
LOSSES.register("test-liar")(Liar)
LOSSES.register("test-keeping")(Keeping)

TASK = {
    "segmentation": {
        "name": "segmentation",
        "source": "s",
        "loss": ["cross_entropy", {"name": "dice", "weight": 0.5}],
        "weight": 2,
    },
    "other": {"name": "segmentation", "source": "t", "loss": {"name": "focal", "class_weights": [1, 2, 3]}},
    "denoising": {"name": "denoising", "source": "t", "loss": ["l1", "ssim"]},
}


def module_of(tasks=TASK, balancing="uncertainty"):
    torch.manual_seed(0)
    info = dict.fromkeys(("s", "t"), Uneven.info)
    config = {"backbone": {"name": "plain", "width": 4, "depth": 2}, "projection": {"channels": 4}, "norm": "none"}
    config |= {"context": {"name": "context7", "init_noise": 0.3}, "tasks": tasks}
    module = DenseModule(
        DenseModel.from_config(config, info), lambda p: torch.optim.SGD(p, lr=0.0), balancing=balancing
    )
    for p in module.model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return module.double()


class Gradients(pl.Callback):
    """Those of every optimizer step."""

    def __init__(self):
        self.found = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found.append(
            {name: None if p.grad is None else p.grad.clone() for name, p in pl_module.named_parameters()}
        )


def fit(
    batch, accumulate, *, sampling="joint", batches=None, module=None, workers=0, callbacks=(), resume=None, **options
):
    seen = Gradients()
    sources = {key: {"name": "test-uneven", "batch_size": batch, "seed": i} for i, key in enumerate("st")}
    data = DataModule(sources, sampling, workers, steps_per_epoch=batches)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=options.pop("max_epochs", 1),
        accumulate_grad_batches=accumulate,
        callbacks=[seen, *callbacks],
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        logger=False,
        limit_val_batches=0,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module or module_of(), datamodule=data, ckpt_path=resume, weights_only=resume and True)
    return seen.found


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name, gradient in other.items():
            if gradient is None:
                assert one[name] is None, name
                continue
            assert (one[name] - gradient).norm() <= 1e-10 * gradient.norm().clamp_min(1e-6), name


def test_a_window_is_one_batch():
    assert_equal(fit(2, N, batches=6), fit(2 * N, 1, batches=2))


def test_the_last_window_of_an_epoch_may_be_shorter():
    """Five batches of 2: windows of 6 and 4 samples."""
    found = fit(2, N, batches=5, max_epochs=2)
    assert len(found) == 4
    assert_equal(found[:1], fit(6, 1, batches=1))
    assert_equal(found[1:2], fit_samples(range(6, 10)))
    assert_equal(found[2:3], fit_samples(range(10, 16)))


def fit_samples(positions):
    """The gradient of one batch of the samples at these positions of both streams."""
    data = DataModule({key: {"name": "test-uneven", "batch_size": 1, "seed": i} for i, key in enumerate("st")})
    loader = data.train_dataloader()
    items = [loader.batch_sampler._streams[source][p] for source in "st" for p in positions]
    module = module_of()
    module.training_step(loader.collate_fn([loader.dataset[item] for item in items]), 0).backward()
    module.on_before_optimizer_step(None)
    return [{name: p.grad for name, p in module.named_parameters()}]


@pytest.mark.filterwarnings("ignore:.*self.trainer.*")
def test_sources_in_turn_make_one_batch_of_both():
    """A window of s, t, s, t is the joint batch; regularisers count once."""
    found = fit(2, 4, sampling="alternate", batches=4)
    assert_equal(found, fit_samples(range(4)))


def test_a_batch_of_a_window_is_moved_once(monkeypatch):
    move, moved = pl.core.hooks.DataHooks.transfer_batch_to_device, []

    def counted(self, batch, device, index):
        moved.append(batch)
        return move(self, batch, device, index)

    monkeypatch.setattr(pl.core.hooks.DataHooks, "transfer_batch_to_device", counted)
    fit(2, N, batches=6)
    assert len(moved) == 6
    moved.clear()
    fit(2, N, batches=6, module=Foreign())
    assert len(moved) == 6, "a module that does not move windows gets moved batches"


@pytest.mark.filterwarnings("ignore:.*self.trainer.*", "ignore:.*does not have many workers.*")
def test_an_evaluation_logs_the_loss_of_its_split():
    """Terms are normalised over the split, whatever its batches; a task without samples in it logs none."""
    keeping = {"name": "denoising", "source": "s", "loss": ["l1", {"name": "test-keeping", "weight": 0.1}]}
    module = module_of({**TASK, "keeping": keeping})
    sources = {"s": {"name": "test-uneven", "val_length": 5, "eval_batch_size": 2}, "t": {"name": "test-uneven"}}
    data = DataModule(sources, num_workers=0)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", logger=False, use_distributed_sampler=False, **quiet)
    trainer.validate(module, data, verbose=False)
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.endswith("/loss")}
    assert found.keys() == {"val/segmentation/loss", "val/keeping/loss"}
    assert found.keys() < set(module.metric_names("val"))
    loader = data.val_dataloader()
    batch = loader.collate_fn([loader.dataset["s", 0, index] for index in range(5)])
    inputs, targets, _ = module._prepare(batch)
    for key, output in module.model(inputs).items():
        task = module.model.task(key)
        terms = task.loss(output, targets[key])
        expected = sum(task.coefficients[name] * total / weight for name, (total, weight) in terms.items())
        assert found[f"val/{key}/loss"] == pytest.approx(expected.item(), rel=1e-6)
        expected.backward(retain_graph=True)  # with what was made in the evaluation and kept


def test_workers_change_nothing():
    assert_equal(fit(2, N, batches=6, workers=1), fit(2, N, batches=6))


class InsideTheSecondWindow(pl.Callback):
    """Stops there, or writes a file there."""

    def __init__(self, file=None):
        self.file = file

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == N + 1:
            if self.file:
                trainer.save_checkpoint(self.file)
            else:
                trainer.should_stop = True


def test_a_stop_inside_a_window_waits_for_its_end(tmp_path):
    whole, place = fit(2, N), {"default_root_dir": tmp_path}
    part = fit(2, N, callbacks=[Checkpoints(), InsideTheSecondWindow()], **place)
    assert_equal(part, whole[:2])
    rest = fit(2, N, callbacks=[Checkpoints()], resume=tmp_path / "checkpoints" / "last.ckpt", **place)
    assert_equal(rest, whole[2:])


def test_after_a_file_from_inside_a_window_the_next_ones_are_whole(tmp_path):
    whole, file = fit(2, N), tmp_path / "inside.ckpt"
    fit(2, N, callbacks=[Checkpoints(), InsideTheSecondWindow(file)], default_root_dir=tmp_path)
    rest = fit(2, N, callbacks=[Checkpoints()], resume=file, default_root_dir=tmp_path / "rest")
    assert len(rest) == 4, "the last batch of the second window, and three windows"
    assert_equal(rest[1:], whole[2:])


def test_what_is_not_countable_is_averaged():
    tasks = {"denoising": {"name": "denoising", "source": "t", "loss": "test-uncounted"}}
    (found,) = fit(2, N, batches=N, module=module_of(tasks, "fixed"))
    singles = fit(2, 1, batches=N, module=module_of(tasks, "fixed"))
    mean = {name: sum(one[name] for one in singles) / N for name in found}
    assert_equal([found], [mean])
    (short,) = fit(2, N, batches=2, module=module_of(tasks, "fixed"))
    assert_equal([short], [{name: sum(one[name] for one in singles[:2]) / 2 for name in short}])


@pytest.mark.parametrize("ratios", [{"s": 1, "t": 1}, {"s": 3, "t": 1}])
def test_what_is_not_countable_is_averaged_over_the_batches_that_have_it(ratios):
    """And so is its regulariser: the task's only batch of the window counts as one alone."""
    tasks = {"segmentation": TASK["segmentation"], "denoising": {**TASK["denoising"], "loss": "test-uncounted"}}
    size = sum(ratios.values())
    (found,) = fit(2, size, sampling={"name": "ratio", "ratios": ratios}, batches=size, module=module_of(tasks))
    (alone,) = fit(2, 1, batches=1, module=module_of(tasks))
    names = [name for name in alone if "denoising" in name]
    assert "balancing.log_variance.denoising" in names
    assert_equal([{name: found[name] for name in names}], [{name: alone[name] for name in names}])


def test_a_weight_that_was_counted_otherwise_is_refused():
    tasks = {"denoising": {"name": "denoising", "source": "t", "loss": "test-liar"}}
    with pytest.raises(ConfigError, match=r"model.tasks.denoising: loss 'test-liar' has weight 1536, .* counted 1538"):
        fit(2, N, batches=N, module=module_of(tasks, "fixed"))
    assert len(fit(2, 1, batches=1, module=module_of(tasks, "fixed"))) == 1, "nothing is counted without accumulation"


@pytest.mark.filterwarnings("ignore:.*self.trainer.*")
@pytest.mark.parametrize("key", sorted(one.name for one in TASKS.entries() if one.distribution == "densectx"))
def test_tasks_count_what_they_weigh(key):
    """Every task and loss of densectx, but for the bins of chroma."""
    from densectx.testing.task_case import TaskCase

    case = TaskCase(key)
    model, batch = case.model(), case.batch()
    x, target = case.prepared(model, batch)
    task = case.task(model)
    terms = task.loss(case.output(model, x), target)
    assert task.countable == terms.keys()
    for name, weight in task.weights(target).items():
        assert weight.ndim == 0
        assert float(weight) == pytest.approx(float(terms[name][1]))


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in ("l1", "mse", "charbonnier", "ssim")]
    + [(name, {}) for name in ("cross_entropy", "dice", "tversky", "lovasz", "focal", "bce")]
    + [("cross_entropy", {"class_weights": [1, 2, 3]}), ("focal", {"class_weights": [1, 2, 3]})]
    + [(name, {"absent": value}) for name in ("dice", "lovasz") for value in (True, False)],
)
def test_losses_count_what_they_weigh(name, options):
    rng = torch.Generator().manual_seed(1)
    loss = LOSSES.build({"name": name, **options}, ignore_index=255, classes=3)
    output, numbers = (torch.rand(4, 3, 16, 16, generator=rng) for _ in range(2))
    ids = torch.randint(0, 3, (4, 16, 16), generator=rng)
    ids[0, :9], ids[1] = 255, 255
    numbers[0, :, :2], numbers[1], numbers[2] = torch.nan, torch.nan, numbers[2] * 0
    takes = loss.takes or ("numbers",)
    for form in takes:
        target = ids if form == "ids" else numbers
        assert float(loss.weight(target)) == pytest.approx(float(loss(output, target)[1])), form


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_check_interval": 0.4, "steps": 10}, "after batch 4"),
        ({"val_check_interval": 0.5, "steps": 12}, None),
        ({"val_check_interval": 4, "steps": 12}, "after batch 4"),
        ({"val_check_interval": 6, "steps": 10, "check_val_every_n_epoch": None}, "after batch 12"),
        ({"val_check_interval": 6, "steps": 12, "check_val_every_n_epoch": None}, None),
        ({"val_check_interval": 1.0, "steps": 10}, None),
    ],
)
def test_validation_inside_a_window_is_refused(options, message):
    from types import SimpleNamespace

    from densectx.accumulation import check_validation

    steps, every = options["steps"], options["val_check_interval"]
    trainer = SimpleNamespace(
        accumulate_grad_batches=N,
        num_training_batches=steps,
        val_check_batch=every if isinstance(every, int) else int(steps * every),
        check_val_every_n_epoch=options.get("check_val_every_n_epoch", 1),
        max_epochs=3,
        max_steps=-1,
        enable_validation=True,
    )
    if message is None:
        check_validation(trainer)
        return
    with pytest.raises(ConfigError, match=message):
        check_validation(trainer)


def test_fit_refuses_a_fraction_that_falls_into_a_window(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSECTX_RUN", "")
    (tmp_path / "c.yaml").write_text(
        "model: {backbone: {name: plain, width: 4}, projection: {channels: 4}, context: context7,"
        " tasks: {d: {name: denoising, source: m}}, optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}}\n"
        "data: {sources: {m: {name: mosaic, size: 16, length: 10, val_length: 1, batch_size: 1}}, num_workers: 0}\n"
        "trainer: {accelerator: cpu, max_epochs: 1, accumulate_grad_batches: 4, val_check_interval: 0.5,"
        " enable_progress_bar: false, enable_model_summary: false}\n"
    )
    assert main(["fit", "-c", "c.yaml"]) == 2
    assert "validation after batch 5, inside a window of accumulate_grad_batches 4" in capsys.readouterr().err


def rank(number, port, folder):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    import os

    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2", NODE_RANK="0", GROUP_RANK="0", TORCHELASTIC_RUN_ID="x",
    )  # fmt: skip
    found = fit(1, N, batches=5, devices=2, strategy="ddp")
    if number == 0:
        torch.save(found, folder / "found.pt")
    distributed.destroy_process_group()


def test_two_ranks_and_a_window_are_one_batch(tmp_path, free_port):
    started = multiprocessing.start_processes(rank, (free_port(), tmp_path), nprocs=2, start_method="spawn", join=False)
    try:
        for _ in range(60):
            if started.join(timeout=3):
                break
        else:
            pytest.fail("the ranks did not end")
    finally:
        for process in started.processes:
            process.kill()
    found = torch.load(tmp_path / "found.pt")
    assert_equal(found, [*fit_samples(range(6)), *fit_samples(range(6, 10))])
