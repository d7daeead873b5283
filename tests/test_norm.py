"""Normalisation layers per kind of input: which copy runs, what trains it, where it starts; and the exchanged ones."""

import copy
import csv
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import FrozenBatchNorm2d

import densectx
from densectx.checkpoint import init_from, load_weights, save_safetensors
from densectx.cli import main
from densectx.errors import CheckpointError, ConfigError
from densectx.model import DenseModel
from densectx.module import DenseModule
from densectx.nn.norm import PerInput, make_norm, select, set_norm, spread
from densectx.registry import TASKS
from densectx.rng import generator
from densectx.types import SourceInfo

warnings.filterwarnings("ignore", ".*self.trainer.*")

INFO = {
    "a": SourceInfo(classes=("x", "y"), keys=("image", "mask")),
    "b": SourceInfo(classes=("x", "y", "z"), keys=("image", "mask")),
}
TASKS_OF = {
    "segmentation": {"name": "segmentation", "source": "a"},
    "again": {"name": "segmentation", "source": "a"},
    "other": {"name": "segmentation", "source": "b"},
    "denoising": {"name": "denoising", "source": "a"},
    "colorization": {"name": "colorization", "source": "b"},
}
KINDS = {
    "segmentation": "image:a",
    "again": "image:a",
    "other": "image:b",
    "denoising": "denoising",
    "colorization": "colorization",
}


def model_of(norm="per_input", tasks=TASKS_OF, seed=0, **more):
    torch.manual_seed(seed)
    config = {
        "backbone": {"name": "timm", "model": "resnet10t", "levels": 3},
        "projection": {"channels": 6},
        "context": {"name": "context7", "init_noise": 0.2, "norm": "batch"},
        "norm": norm,
        "tasks": tasks,
        **more,
    }
    model = DenseModel.from_config(config, INFO)
    for p in model.parameters():
        if not p.any():  # residual parts that start at zero would hide what lies before them
            nn.init.normal_(p, std=0.05)
    return model


def batch_of(step, sources=("a", "b"), count=2, size=24):
    rng = torch.Generator().manual_seed(step)
    return {
        source: {
            "image": torch.rand(count, 3, size, size, generator=rng),
            "mask": torch.randint(0, len(INFO[source].classes), (count, size, size), generator=rng),
            "gray": torch.tensor([False] * count),
            "key": torch.tensor([[0, i] for i in range(count)]),
        }
        for source in sources
    }


def copies(model, kind):
    """{name: value} of the norm layers of a kind, statistics included."""
    return {k: v.clone() for k, v in model.state_dict().items() if f".norms.{kind}." in k}


def scramble(module):
    """Batch norms that differ between copies, so that a wrong one shows."""
    rng = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(generator=rng)
            part.running_var.uniform_(0.5, 2, generator=rng)


@pytest.mark.parametrize("name", TASKS.names())
def test_a_task_says_whether_it_takes_the_image_unchanged(name):
    info = SourceInfo(classes=("x", "y"), keys=("image", "mask", "target"), target="map")
    batch = {**batch_of(0)["a"], "target": torch.rand(2, 1, 24, 24)}
    spec = {"name": name, "source": "a"}
    try:
        model = DenseModel.from_config({"backbone": "plain", "projection": None, "tasks": {"t": spec}}, {"a": info})
    except ConfigError as error:
        pytest.skip(f"wants another source: {error}")
    task = model.task("t")
    x, _ = task.prepare(batch, [generator(i) for i in range(2)])
    assert (x is batch["image"]) == task.unchanged


def test_kinds_and_what_they_cost():
    model, shared = model_of(), model_of("batch")
    assert model.kinds == KINDS
    assert shared.kinds == {}
    norms = [m for m in model.modules() if isinstance(m, PerInput)]
    assert len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in shared.modules())
    assert all(list(m.norms) == ["image:a", "image:b", "denoising", "colorization"] for m in norms)
    single = sum(p.numel() for m in shared.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in shared.parameters()) + 3 * single


def test_each_kind_runs_its_own_layers_also_where_predict_shares_the_image():
    """A model of the task alone, with its copies as the only layers, answers the same."""
    model = model_of().eval()
    scramble(model)
    image = torch.rand(3, 24, 40)
    together = model.predict(image)
    for key, kind in KINDS.items():
        alone = model_of("batch").eval()
        state = {k: v for k, v in model.state_dict().items() if ".norms." not in k}
        state |= {k.replace(f".norms.{kind}.", "."): v for k, v in copies(model, kind).items()}
        alone.load_state_dict(state)
        assert torch.allclose(together[key], alone.predict(image)[key], atol=1e-6), key
    assert not torch.allclose(
        model.trunk(image[None], "denoising")[-1], model.trunk(image[None], "image:a")[-1], atol=1e-2
    )


def test_threads_that_predict_take_turns():
    """Which copy runs, and evaluation itself, are attributes of the layers."""
    model, image = model_of(), torch.rand(3, 24, 40)
    scramble(model)
    asked = ["denoising", "colorization"] * 12
    alone = {key: model.predict(image, key)[key] for key in set(asked)}
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda key: model.predict(image, key)[key], asked))
    assert all(torch.equal(answer, alone[key]) for key, answer in zip(asked, found, strict=True))
    assert all(part.training for part in model.modules())
    assert torch.equal(copy.deepcopy(model).predict(image, "denoising")["denoising"], alone["denoising"])


def test_tasks_of_one_kind_share_a_pass():
    model = model_of().eval()
    passes = []
    model.backbone.register_forward_hook(lambda *_: passes.append(1))
    model.predict(torch.rand(3, 16, 16))
    assert len(passes) == 4
    passes.clear()
    model.predict(torch.rand(3, 16, 16), tasks=["segmentation", "again"])
    assert len(passes) == 1


def test_only_the_kinds_of_a_step_move():
    model = model_of()
    module = DenseModule(model, torch.optim.AdamW)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    before = {kind: copies(model, kind) for kind in set(KINDS.values())}
    for step in range(2):  # momentum of the first step must not move anything in the second either
        sources = ("a", "b") if step == 0 else ("a",)
        if step == 1:
            before = {kind: copies(model, kind) for kind in set(KINDS.values())}
        optimizer.zero_grad()
        module.training_step(batch_of(step, sources), 0).backward()
        module.on_before_optimizer_step(optimizer)
        optimizer.step()
        for kind, old in before.items():
            moved = {k for k, v in copies(model, kind).items() if not torch.equal(v, old[k])}
            assert moved == (set(old) if step == 0 or kind in ("image:a", "denoising") else set()), kind


def test_a_kind_without_labels_has_no_gradient():
    module = DenseModule(model_of(), torch.optim.SGD)
    batch = batch_of(0)
    batch["b"]["mask"].fill_(255)
    module.training_step(batch, 0).backward()
    module.on_before_optimizer_step(None)
    moving = {k for k, p in module.model.named_parameters() if p.grad is not None and ".norms." in k}
    assert {k.split(".norms.")[1].split(".")[0] for k in moving} == {"image:a", "denoising", "colorization"}


class Step(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module.training_step(batch, 0)


def train(rank, world, port, file):
    """Two ranks that see other sources, evaluation statistics (batch statistics depend on the batch of a rank)."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*self.trainer.*")
    module = DenseModule(model_of(), torch.optim.SGD).double()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    net = Step(module)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        distributed.init_process_group("gloo", rank=rank, world_size=world)
        net = DistributedDataParallel(net)  # plain: no flag for unused parameters
    found = []
    for step, ranks in enumerate([("a", "b"), ("a", "a"), ("b", "b"), ("b", "a")]):
        sources = set(ranks) if world == 1 else {ranks[rank]}
        batch = batch_of(step, ("a", "b"))
        batch = {s: {k: v.double() if k == "image" else v for k, v in batch[s].items()} for s in sorted(sources)}
        if world > 1 and ranks[0] == ranks[1]:
            batch = {s: {k: v[rank : rank + 1] for k, v in sample.items()} for s, sample in batch.items()}
        module.zero_grad()
        net(batch).backward()
        module.on_before_optimizer_step(None)
        found.append({n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()})
    if world > 1:
        distributed.destroy_process_group()
    if rank == 0:
        torch.save(found, file)


def test_ranks_with_other_kinds_equal_one_process(tmp_path, free_port):
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    train(0, 1, 0, one)
    port = free_port()
    multiprocessing.start_processes(train, (2, port, two), nprocs=2, start_method="spawn")
    for step, (single, double) in enumerate(zip(torch.load(one), torch.load(two), strict=True)):
        idle = {n for n, g in single.items() if g is None}
        assert bool(idle) == (step in (1, 2))
        assert idle == {n for n, g in double.items() if g is None}
        for name in single.keys() - idle:
            error = (double[name] - single[name]).norm() / single[name].norm().clamp_min(1e-14)
            assert error < 1e-9, (step, name, error)


def test_a_batch_model_fills_every_copy(tmp_path):
    old = model_of("batch", seed=3)
    scramble(old)
    save_safetensors(old, tmp_path / "old.safetensors")
    new = model_of()
    said = init_from(new, tmp_path / "old.safetensors")
    assert "fresh" not in said
    assert "not used" not in said
    image = torch.rand(3, 16, 16)
    expected, found = old.predict(image), new.predict(image)
    for key, value in expected.items():
        assert torch.allclose(found[key], value, atol=1e-6), key
    with pytest.raises(CheckpointError, match=r"per_input.*init_from"):
        load_weights(model_of(), old.state_dict(), "old")


@pytest.mark.parametrize("kind", ["group", "frozen", "per_input"])
def test_norms_with_an_activation_are_found_in_a_model_of_another_kind(tmp_path, kind):
    """Beside the norm, which timm's layer is itself, lies the activation: the norm is called otherwise."""
    backbone = {"name": "timm", "model": "efficientnet_lite0", "levels": 3}
    old, new = (model_of(norm, backbone=backbone, seed=seed) for norm, seed in (("batch", 3), (kind, 0)))
    scramble(old)
    save_safetensors(old, tmp_path / "old.safetensors")
    assert "fresh" not in init_from(new, tmp_path / "old.safetensors")
    x = torch.rand(1, 3, 16, 16)
    if kind != "group":  # which answers otherwise
        for a, b in zip(new.eval().backbone(x), old.eval().backbone(x), strict=True):
            assert torch.allclose(a, b, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("kind", ["group", "frozen"])
def test_norms_with_an_activation_find_the_way_back(tmp_path, kind):
    backbone = {"name": "timm", "model": "efficientnet_lite0", "levels": 3}
    old = model_of(kind, backbone=backbone, seed=3)
    save_safetensors(old, tmp_path / "old.safetensors")
    for norm in ("batch", "per_input"):
        said = init_from(model_of(norm, backbone=backbone), tmp_path / "old.safetensors")
        assert "not used" not in said


def test_a_new_kind_starts_from_the_one_of_images(tmp_path):
    old = model_of(tasks={k: TASKS_OF[k] for k in ("denoising", "other")}, seed=3)
    scramble(old)
    save_safetensors(old, tmp_path / "old.safetensors")
    new = model_of()
    init_from(new, tmp_path / "old.safetensors")
    image = torch.rand(1, 3, 16, 16)
    for kind, origin in (("image:a", "image:b"), ("colorization", "image:b"), ("denoising", "denoising")):
        expected = old.eval().trunk(image, origin)[-1]
        assert torch.allclose(new.eval().trunk(image, kind)[-1], expected, atol=1e-6), kind
    state = new.state_dict()
    assert spread(new, state).keys() == state.keys()


def test_per_input_from_the_command_line_resumes_and_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSECTX_RUN", "")
    (tmp_path / "small.yaml").write_text("""
model:
  backbone: {name: timm, model: resnet10t, levels: 3, drop_path: 0.5}
  projection: {channels: 6}
  context: context7
  norm: per_input
  tasks:
    segmentation: {name: segmentation, source: mosaic}
    denoising: {name: denoising, source: mosaic}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
data:
  sources: {mosaic: {name: mosaic, size: 24, length: 8, val_length: 3, batch_size: 4}}
  num_workers: 0
trainer: {accelerator: cpu, max_steps: 4, val_check_interval: 2, check_val_every_n_epoch: null,
  enable_progress_bar: false, enable_model_summary: false}
""")
    assert main(["fit", "-c", "small.yaml", "--name", "whole"]) == 0
    assert main(["fit", "-c", "small.yaml", "--name", "part", "--trainer.max_steps", "3"]) == 0
    more = ["--resume", str(tmp_path / "runs/part/0"), "--allow-changed", "trainer"]
    assert main(["fit", "-c", "small.yaml", "--name", "part", *more]) == 0
    whole, part = (densectx.load(tmp_path / f"runs/{name}/0/checkpoints/last.ckpt") for name in ("whole", "part"))
    assert part.kinds == {"segmentation": "image:mosaic", "denoising": "denoising"}
    for (key, a), b in zip(whole.state_dict().items(), part.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    rows = list(csv.DictReader((tmp_path / "runs/whole/0/metrics.csv").open()))
    assert any(row["val/denoising/psnr"] for row in rows)


def test_compiled_parts_follow_the_selection():
    model = model_of(tasks={k: TASKS_OF[k] for k in ("segmentation", "denoising")}).eval()
    scramble(model)
    image = torch.rand(3, 16, 16)
    plain = model.predict(image)
    model.backbone.compile(backend="eager")
    model.context["shared"].compile(backend="eager")
    for _ in range(2):
        compiled = model.predict(image)
        assert all(torch.allclose(compiled[key], value, atol=1e-6) for key, value in plain.items())


def test_more_kinds_than_dynamo_compiles_by_default_are_all_compiled(monkeypatch):
    counted, compile_ = [], nn.Module.compile
    backend = {"backend": lambda graph, _: counted.append(1) or graph.forward}  # as inductor, in no time
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compile_(module, **options, **backend))
    tasks = {f"denoise_{i}": {"name": "denoising", "source": "a", "sigma": i, "head": "linear"} for i in range(9)}
    model = model_of(tasks=tasks, backbone={"name": "timm", "model": "resnet10t", "levels": 1}, context="none")
    DenseModule(model, torch.optim.SGD, compile=True)
    x = torch.rand(1, 3, 16, 16)
    for kind in tasks:
        model.trunk(x, kind)
    assert len(counted) == 9


def test_exported_graph_holds_every_kind():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model_of().eval()
            scramble(self.model)

        def forward(self, x):
            return self.model({"segmentation": x, "denoising": x})

    net, x = Both(), torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        exported = torch.export.export(net, (x,), strict=False).module()
        for key, value in net(x).items():
            assert torch.allclose(exported(x)[key], value, atol=1e-6)


def test_per_input_needs_batch_norms_and_knows_its_kinds():
    with pytest.raises(ConfigError, match="no batch norm"):
        model_of(backbone="plain", context="context7")
    with pytest.raises(ConfigError, match="did you mean 'per_input'"):
        model_of("per_inputs")
    with pytest.raises(KeyError, match="no normalisation for inputs of kind 'x', only image:a"):
        select([model_of()], "x")


def test_contexts_per_task_keep_their_own_norm():
    model = model_of(context={"name": "context7", "norm": "batch", "share": False})
    assert not any(isinstance(m, PerInput) for m in model.context.modules())
    model.eval().predict(torch.rand(3, 16, 16))


@pytest.mark.parametrize("kind", ["group", "none", "frozen", "per_input"])
@pytest.mark.parametrize("model", ["resnet10t", "efficientnet_lite0"])
def test_norms_are_exchanged_with_their_activation(kind, model):
    net = timm.create_model(model, features_only=True)
    scramble(net)
    x = torch.rand(1, 3, 32, 32)
    acts = sum(isinstance(m, nn.ReLU | nn.ReLU6) for m in net.modules())
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    with torch.no_grad():
        reference = [m.clone() for m in net.eval()(x)]
    set_norm(net, kind, ["k"])
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == (norms if kind == "per_input" else 0)
    assert sum(isinstance(m, nn.ReLU | nn.ReLU6) for m in net.modules()) == acts
    assert sum(isinstance(m, nn.GroupNorm) for m in net.modules()) == (norms if kind == "group" else 0)
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in net.modules()) == (norms if kind == "frozen" else 0)
    if kind in ("frozen", "per_input"):  # frozen: also in training mode the statistics are the ones it had
        again = net.train(kind == "frozen")(x)
        for a, b in zip(again, reference, strict=True):
            assert torch.allclose(a, b, atol=1e-4 * float(b.abs().max()))


def test_without_norms_an_activation_does_not_overwrite_the_input_of_its_block():
    net = timm.create_model("resnetv2_18", features_only=True).eval()
    set_norm(net, "none")
    careful = copy.deepcopy(net)
    for module in careful.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    x = torch.rand(1, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(net(x), careful(x), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_frozen_norm_answers_in_the_type_it_is_given(dtype):
    """As a batch norm in evaluation does, so that everything behind it stays in half precision."""
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 2)
    net = nn.Sequential(norm)
    reference = norm.eval()
    set_norm(net, "frozen")
    x = torch.randn(2, 4, 5, 5).to(dtype)
    theirs = FrozenBatchNorm2d(4, norm.eps)
    theirs.load_state_dict(net[0].state_dict())
    y = net.train()(x)
    assert y.dtype == dtype
    assert torch.equal(y, reference(x))
    torch.testing.assert_close(y.float(), theirs(x.float()), atol=1e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


def test_group_norm_divides_any_width():
    for width in (1, 3, 12, 40, 96, 100):
        net = nn.Sequential(nn.Conv2d(1, width, 1), nn.BatchNorm2d(width))
        set_norm(net, "group")
        y = net(torch.rand(2, 1, 9, 9))
        groups = net[1].num_groups
        flat = y.view(2, groups, -1)
        assert width % groups == 0
        assert torch.allclose(flat.mean(-1), torch.zeros(2, groups), atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_group_norm_of_one_number_a_group_is_the_shift(training):
    """torch refuses it for a batch of one only, in evaluation too."""
    norm = make_norm("group", 8).train(training)
    nn.init.normal_(norm.bias)
    x, larger = torch.randn(2, 8, 1, 1), torch.randn(1, 8, 3, 2)
    torch.testing.assert_close(norm(x[:1]).flatten(), norm.bias, atol=1e-3, rtol=0)
    assert torch.equal(norm(x[:1]), norm(x)[:1])
    assert torch.equal(norm(larger), nn.functional.group_norm(larger, 8, norm.weight, norm.bias))
