"""Every registered backbone, context, head, task and loss keeps its contract."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densectx import BACKBONES, CONTEXTS, HEADS, LOSSES, TASKS
from densectx.model import DenseModel
from densectx.rng import generator
from densectx.types import Feature, SourceInfo

INFO = SourceInfo(classes=("a", "b", "c"), keys=("image", "mask"))
SPECS = {"timm": {"name": "timm", "model": "resnet10t"}}
LIGHT = [n for n in BACKBONES.names() if n not in ("dilated_resnet50", "dilated_resnet101", "dilated_resnet34")]
FEATURES = (Feature(6, 2), Feature(8, 4), Feature(5, 4))


def spec(name):
    return SPECS.get(name, {"name": name})


def pyramid(height, width, batch=2):
    return [torch.randn(batch, c, height // s, width // s) for c, s in FEATURES]


def samples(height=24, width=20, batch=2):
    rng = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand(batch, 3, height, width, generator=rng),
        "mask": torch.randint(0, 3, (batch, height, width), generator=rng),
        "gray": torch.tensor([False] * batch),
        "key": torch.tensor([[0, i] for i in range(batch)]),
    }


def model_of(task, **options):
    """A small model with one task; its context is not tied to the identity, so that gradients reach everything."""
    torch.manual_seed(0)
    config = {
        "backbone": {"name": "plain", "width": 6},
        "projection": {"channels": 4},
        "context": {"name": "context7", "init_noise": 0.3},
        "tasks": {"task": {"name": task, "source": "s", **options}},
    }
    return DenseModel.from_config(config, {"s": INFO})


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


@pytest.mark.parametrize("name", LIGHT)
def test_backbone_gradients_bf16_and_state(name):
    net = BACKBONES.build(spec(name))
    for p in net.parameters():  # timm starts the last norm of a residual branch at zero, which hides the branch
        if not p.any():
            torch.nn.init.constant_(p, 0.5)
    x = torch.rand(2, 3, 64, 64)
    sum(m.square().mean() for m in net(x)).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    net.eval()
    with torch.no_grad():
        full = net(x)[-1]
        with torch.autocast("cpu", torch.bfloat16):
            half = net(x)[-1].float()
        assert (half - full).abs().mean() < 0.05 * full.abs().mean() + 1e-3
        assert torch.allclose(net(x[:1])[-1], full[:1], rtol=1e-3, atol=1e-4 * float(full.abs().max()))
    other = BACKBONES.build(spec(name)).eval()
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    assert torch.equal(other(x)[-1], full)


@pytest.mark.parametrize("name", CONTEXTS.names())
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_context_keeps_every_size(name, height, width):
    context = CONTEXTS.build(name, in_channels=2).eval()
    assert context(torch.rand(1, 2, height, width)).shape == (1, 2, height, width)
    assert context.receptive_field >= 1


@pytest.mark.parametrize("name", CONTEXTS.names())
def test_context_gradients_bf16_batch_invariance(name):
    torch.manual_seed(0)
    options = {} if name in ("none", "aspp") else {"init_noise": 0.3}
    context = CONTEXTS.build({"name": name, **options}, in_channels=4)
    x = torch.rand(2, 4, 40, 40, requires_grad=True)
    y = context(x)
    y.square().mean().backward()
    assert x.grad is not None
    assert [n for n, p in context.named_parameters() if not p.grad.abs().sum() > 0] == []
    with torch.autocast("cpu", torch.bfloat16):
        assert (context(x).float() - y).abs().mean() < 0.05 * y.abs().mean()
    assert torch.allclose(context(x[:1]), y[:1], rtol=1e-4, atol=1e-5 * float(y.detach().abs().max()))


@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", HEADS.names())
def test_head_shape_and_gradient(name, residual, scale):
    runtime = {"features": FEATURES, "in_channels": 3, "out_channels": 5 if name == "upsample" else 3}
    head = HEADS.build(name, scale=scale, residual=residual, **runtime)
    features, x = [f.requires_grad_() for f in pyramid(16, 24)], torch.rand(2, 3, 16, 24)
    y = head(features, x)
    assert y.shape == (2, runtime["out_channels"], 16 * scale, 24 * scale)
    if residual and name != "upsample":
        from densectx.nn.resize import bicubic

        assert torch.equal(y, bicubic(x, up=scale)), "an untrained correction is zero"
        torch.nn.init.normal_(list(head.parameters())[-2], std=0.1)
        y = head(features, x)
    y.square().sum().backward()
    assert [n for n, p in head.named_parameters() if not p.grad.abs().sum() > 0] == []
    assert features[-1].grad.abs().sum() > 0


@pytest.mark.parametrize("name", TASKS.names())
def test_task_trains_every_parameter_and_measures(name):
    model, batch = model_of(name), samples()
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


@pytest.mark.parametrize("name", TASKS.names())
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 97), st.integers(1, 97), st.booleans())
def test_task_answers_at_every_size(name, height, width, strided):
    backbone = {"name": "timm", "model": "resnet10t", "levels": 3} if strided else {"name": "plain", "width": 4}
    config = {"backbone": backbone, "projection": {"channels": 4}, "tasks": {"task": {"name": name, "source": "s"}}}
    model = DenseModel.from_config(config, {"s": INFO}).eval()
    image = torch.rand(3, height, width)
    answer = model.predict(image)["task"]
    scale = model.task("task").scale
    assert answer.shape[1:] == (height * scale, width * scale)
    assert torch.isfinite(answer).all()


@pytest.mark.parametrize("name", TASKS.names())
def test_task_is_batch_invariant_and_runs_in_bf16(name):
    model = model_of(name).eval()
    images = torch.rand(3, 3, 21, 33)
    both = model.predict(images)["task"]
    assert torch.allclose(model.predict(images[1])["task"], both[1], atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.predict(images)["task"]
    assert half.dtype == torch.float32
    assert (half - both).abs().mean() < 0.05


@pytest.mark.parametrize("name", TASKS.names())
def test_task_state_round_trip(name):
    model, other = model_of(name).eval(), model_of(name).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    other.load_state_dict(model.state_dict())
    image = torch.rand(3, 16, 16)
    assert torch.equal(model.predict(image)["task"], other.predict(image)["task"])


@pytest.mark.parametrize("name", LOSSES.names())
def test_loss_without_labels_is_zero_with_a_graph(name):
    loss = LOSSES.build(name)
    output = torch.randn(2, 3, 4, 4, requires_grad=True)
    target = torch.full((2, 4, 4), 255) if name == "cross_entropy" else torch.full((2, 3, 4, 4), torch.nan)
    total, weight = loss(output, target)
    total.backward()
    assert total.item() == 0
    assert weight.item() == 0
    assert torch.equal(output.grad, torch.zeros_like(output))
