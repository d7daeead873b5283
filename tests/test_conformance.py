"""Every registered backbone, context, head, task and loss keeps its contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densectx import BACKBONES, CONTEXTS, LOSSES, TASKS
from densectx.model import DenseModel
from densectx.rng import generator
from densectx.types import Feature, SourceInfo

INFO = SourceInfo(classes=("a", "b", "c"), keys=("image", "mask"))
CASES = {name: ({"name": name}, INFO) for name in TASKS.names()} | {
    "regression": ({"name": "regression"}, SourceInfo(keys=("image", "target"), target="map")),
    "restoration": ({"name": "restoration"}, SourceInfo(keys=("image", "target"), target="image")),
    "segmentation binary": (
        {"name": "segmentation", "mode": "binary"},
        SourceInfo(classes=("a", "b"), keys=("image", "mask")),
    ),
    "segmentation multilabel": (
        {"name": "segmentation", "mode": "multilabel"},
        SourceInfo(classes=("a", "b", "c"), keys=("image", "target"), target="labels"),
    ),
}
"""Every task, and its modes: a spec, and a source that it takes."""
SPECS = {"timm": {"name": "timm", "model": "resnet10t"}}
LIGHT = [n for n in BACKBONES.names() if n not in ("dilated_resnet50", "dilated_resnet101", "dilated_resnet34")]
FEATURES = (Feature(6, 2), Feature(8, 4), Feature(5, 4))


def spec(name):
    return SPECS.get(name, {"name": name})


def pyramid(height, width, batch=2):
    return [torch.randn(batch, c, height // s, width // s) for c, s in FEATURES]


def samples(info=INFO, height=24, width=20, batch=2):
    """What a source of this kind gives."""
    rng = torch.Generator().manual_seed(0)
    found = {
        "image": torch.rand(batch, 3, height, width, generator=rng),
        "gray": torch.tensor([False] * batch),
        "key": torch.tensor([[0, i] for i in range(batch)]),
    }
    if info.target != "none":
        channels = {"map": 1, "labels": len(info.classes), "image": 3}[info.target]
        values = torch.rand(batch, channels, height, width, generator=rng)
        found["target"] = values.round() if info.target == "labels" else values
    else:
        found["mask"] = torch.randint(0, len(info.classes), (batch, height, width), generator=rng)
    return found


def model_of(case, backbone=None, context=None):
    """A small model with one task; its context is not tied to the identity, so that gradients reach everything."""
    torch.manual_seed(0)
    task, info = CASES[case]
    config = {
        "backbone": backbone or {"name": "plain", "width": 6},
        "projection": {"channels": 4},
        "context": context or {"name": "context7", "init_noise": 0.3},
        "tasks": {"task": {**task, "source": "s"}},
    }
    return DenseModel.from_config(config, {"s": info})


def rngs(batch):
    return [generator("test", *key) for key in batch["key"].tolist()]


@pytest.mark.parametrize("name", BACKBONES.names())
def test_backbone_shapes_are_what_it_declares(name):
    net = BACKBONES.build(spec(name)).eval()
    stride = max(f.stride for f in net.features)
    assert [f.stride for f in net.features] == sorted(f.stride for f in net.features)
    with torch.no_grad():
        maps = net(torch.rand(1, net.in_channels, 3 * stride, 2 * stride))
    assert [tuple(m.shape) for m in maps] == [
        (1, f.channels, 3 * stride // f.stride, 2 * stride // f.stride) for f in net.features
    ]


@pytest.mark.parametrize("name", CONTEXTS.names())
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_context_keeps_every_size(name, height, width):
    context = CONTEXTS.build(name, in_channels=2).eval()
    assert context(torch.rand(1, 2, height, width)).shape == (1, 2, height, width)
    assert context.receptive_field >= 1


@pytest.mark.parametrize("name", list(CASES))
def test_task_trains_every_parameter_and_measures(name):
    model, batch = model_of(name), samples(CASES[name][1])
    task = model.task("task")
    x, target = task.prepare(batch, rngs(batch))
    again, _ = task.prepare(batch, rngs(batch))
    assert torch.equal(x, again), "randomness comes from the generators alone"
    for parameter in task.head.parameters():  # residual heads start at zero, which hides the layers before
        torch.nn.init.normal_(parameter, std=0.1)
    output = model({"task": x})["task"]
    terms = task.loss(output, target)
    assert set(terms) == set(task.coefficients)
    total = sum(s / w for s, w in terms.values())
    total.backward()
    assert torch.isfinite(total)
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    prediction = task.postprocess(output.detach(), x)
    task.update(prediction, x, target)
    values = task.metrics.compute()
    assert {task.score.metric, f"{task.score.metric}_{task.score.baseline}"} <= set(values)
    assert all(torch.isfinite(v) for v in values.values())
    task.metrics.reset()
    drawn = task.draw(prediction[:1], x[:1], {k: v[:1] for k, v in target.items()})
    assert all(p.ndim == 3 and p.shape[0] == 3 and p.min() >= 0 and p.max() <= 1 for p in drawn)


@pytest.mark.fault("I13")
@pytest.mark.parametrize("name", list(CASES))
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 97), st.integers(1, 97), st.booleans())
def test_task_answers_at_every_size(name, height, width, strided):
    backbone = {"name": "timm", "model": "resnet10t", "levels": 3} if strided else {"name": "plain", "width": 4}
    model = model_of(name, backbone, "basic").eval()
    image = torch.rand(3, height, width)
    answer = model.predict(image)["task"]
    scale = model.task("task").scale
    assert answer.shape[1:] == (height * scale, width * scale)
    assert torch.isfinite(answer).all()


def forms(name):
    """The forms of target that a loss takes; a loss that says nothing is one of numbers."""
    return getattr(LOSSES.get(name), "takes", ()) or ("numbers",)


@pytest.mark.fault("I17")
@pytest.mark.parametrize(("name", "form"), [(name, form) for name in LOSSES.names() for form in forms(name)])
def test_loss_without_labels_is_zero_with_a_graph(name, form):
    loss = LOSSES.build(name)
    output = torch.randn(2, 3, 4, 4, requires_grad=True)
    target = torch.full((2, 4, 4), 255) if form == "ids" else torch.full((2, 3, 4, 4), torch.nan)
    total, weight = loss(output, target)
    total.backward()
    assert total.item() == 0
    assert weight.item() == 0
    assert torch.equal(output.grad, torch.zeros_like(output))


@pytest.mark.parametrize(("name", "form"), [(name, form) for name in LOSSES.names() for form in forms(name)])
def test_loss_of_a_batch_is_the_sum_over_its_images(name, form):
    """What makes any number of ranks equal one process: sums and weights add up, image by image."""
    torch.manual_seed(0)
    loss = LOSSES.build(name)
    output = torch.randn(4, 3, 13, 12, dtype=torch.float64, requires_grad=True)
    if form == "ids":
        target = torch.randint(0, 3, (4, 13, 12))
        target[0, 4:], target[1] = 255, 255
    else:
        target = torch.randint(0, 2, (4, 3, 13, 12)).double()
        target[0, :, 12:], target[1], target[2, 0] = torch.nan, torch.nan, torch.nan
    whole = loss(output, target)
    single = [loss(output[i : i + 1], target[i : i + 1]) for i in range(4)]
    for one, parts in zip(whole, zip(*single, strict=True), strict=True):
        assert torch.allclose(one, sum(parts), rtol=1e-12)
    assert 0 < whole[1] < loss(output, target.nan_to_num(0) if form != "ids" else target % 3)[1]
    (a,) = torch.autograd.grad(whole[0], output)
    (b,) = torch.autograd.grad(sum(s for s, _ in single), output)
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
