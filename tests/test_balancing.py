"""Balancing: methods against formulas written independently, state, and what a training step makes of the factors."""

import csv
import math

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from densectx.balancing import Seen
from densectx.balancing.by_gradient import IMTLG, MGDA, GradNorm, NashMTL, PCGrad, UPGrad
from densectx.balancing.by_loss import DWA, FAMO, Fixed, Uncertainty
from densectx.balancing.gram import last_shared, of_features, of_weights
from densectx.balancing.methods import make_balancer
from densectx.building import instantiate
from densectx.cli import main
from densectx.errors import ConfigError
from densectx.model import DenseModel
from densectx.module import DenseModule
from densectx.registry import BALANCING
from densectx.registry import TASKS as TASKS_REGISTRY
from densectx.rng import generator
from densectx.tasks.segmentation import Segmentation
from densectx.types import SourceInfo

pytestmark = pytest.mark.filterwarnings("ignore:.*self.trainer.*")

AB = ("a", "b")


def gradients(seed, tasks, length=6):
    return np.random.default_rng(seed).standard_normal((tasks, length))


def factors(method, rows, losses=None, seed=0):
    rows = np.asarray(rows, float)
    gram = torch.from_numpy(rows @ rows.T)
    tasks = tuple("abcdefgh"[: len(rows)])
    known = torch.tensor([1.0] * len(rows) if losses is None else losses, dtype=torch.float64)
    return method.factors(Seen(tasks, known, gram, seed)).detach().numpy()


def of(kind, count, **options):
    return kind("abcdefgh"[:count], **options)


# two tasks: |x - u|^2 and |x - v|^2 at x = 0, gradients -2u and -2v -------------------------------------------------

CONFLICT = np.array([[2.0, 0.0], [-1.0, 1.0]])


def test_two_quadratics_in_closed_form():
    one, two = CONFLICT
    gamma = two @ (two - one) / ((one - two) @ (one - two))  # Sener & Koltun 2018, algorithm 1
    assert factors(of(MGDA, 2), CONFLICT) == pytest.approx([gamma, 1 - gamma], abs=1e-12)
    shortest = factors(of(MGDA, 2), CONFLICT) @ CONFLICT
    assert shortest @ one == pytest.approx(shortest @ two)  # perpendicular to the line between the two
    surgery = one - one @ two / (two @ two) * two + two - one @ two / (one @ one) * one  # Yu et al. 2020
    assert factors(of(PCGrad, 2), CONFLICT) @ CONFLICT == pytest.approx(surgery)
    impartial = factors(of(IMTLG, 2), CONFLICT) @ CONFLICT
    lengths = np.linalg.norm(CONFLICT, axis=1)
    assert impartial @ one / lengths[0] == pytest.approx(impartial @ two / lengths[1])
    assert factors(of(UPGrad, 2), CONFLICT) @ CONFLICT == pytest.approx(surgery)  # two tasks: the same projections
    nash = factors(of(NashMTL, 2), CONFLICT)
    product = nash * (CONFLICT @ (nash @ CONFLICT))
    assert product[0] == pytest.approx(product[1], rel=1e-5)  # K a = 1 / a up to scale


def test_a_shorter_gradient_between_the_others_is_the_shortest_combination():
    rows = np.array([[4.0, 0.0], [1.0, 0.0]])
    assert factors(of(MGDA, 2), rows) == pytest.approx([0, 1])
    assert factors(of(MGDA, 2, normalise="l2"), rows) @ rows == pytest.approx([1, 0])


def test_equal_gradients_share_alike():
    assert factors(of(MGDA, 3), np.ones((3, 5))) == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize("kind", [PCGrad, UPGrad])
def test_without_conflict_every_factor_is_one(kind):
    assert factors(of(kind, 3), np.abs(gradients(0, 3))) == pytest.approx(1)


# any tasks ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), tasks=st.integers(2, 6), scale=st.sampled_from([1e-6, 1.0, 1e6]))
@example(seed=430, tasks=6, scale=1.0)  # ill-conditioned
def test_shortest_combination_is_that_of_scipy(seed, tasks, scale):
    rows = gradients(seed, tasks)
    found = factors(of(MGDA, tasks), rows * scale)
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1)
    gram = rows @ rows.T
    best = minimize(
        lambda a: a @ gram @ a,
        np.full(tasks, 1 / tasks),
        jac=lambda a: 2 * gram @ a,
        bounds=[(0, 1)] * tasks,
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found @ gram @ found <= best.fun * (1 + 1e-6) + 1e-9
    slope = gram @ found  # and it is optimal: no vertex is better than those in use
    assert slope.min() >= found @ slope - 1e-9 * np.diag(gram).max()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), tasks=st.integers(2, 5))
def test_pcgrad_is_the_algorithm_on_the_vectors(seed, tasks):
    rows = gradients(seed, tasks, 4)
    rng = generator(7, "balancing", 0)
    total = np.zeros(4)
    for i in range(tasks):
        own = rows[i].copy()
        for j in torch.randperm(tasks, generator=rng).tolist():
            if j != i and own @ rows[j] < 0:
                own -= own @ rows[j] / (rows[j] @ rows[j]) * rows[j]
        total += own
    assert factors(of(PCGrad, tasks), rows, seed=7) @ rows == pytest.approx(total)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), tasks=st.integers(2, 5))
def test_imtl_g_is_equation_5(seed, tasks):
    rows = gradients(seed, tasks)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    apart, turned = rows[0] - rows[1:], unit[0] - unit[1:]
    rest = rows[0] @ turned.T @ np.linalg.inv(apart @ turned.T)
    expected = np.array([1 - rest.sum(), *rest])
    assert factors(of(IMTLG, tasks), rows) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), tasks=st.integers(2, 5), length=st.integers(2, 6))
def test_upgrad_stands_against_no_task_and_is_that_of_scipy(seed, tasks, length):
    rows = gradients(seed, tasks, length)
    found = factors(of(UPGrad, tasks), rows) @ rows
    assert (rows @ found).min() > -1e-8
    expected = np.zeros(length)
    for row in rows:
        nearest = minimize(
            lambda x, g=row: ((x - g) ** 2).sum(),
            row,
            jac=lambda x, g=row: 2 * (x - g),
            constraints={"type": "ineq", "fun": lambda x: rows @ x, "jac": lambda x: rows},
            method="SLSQP",
            options={"ftol": 1e-13, "maxiter": 500},
        )
        expected += nearest.x
    assert found == pytest.approx(expected, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), tasks=st.integers(2, 6))
def test_nash_is_the_bargaining_solution(seed, tasks):
    rows = gradients(seed, tasks, 8)
    found = factors(of(NashMTL, tasks), rows)
    assert found.min() > 0
    assert found.sum() == pytest.approx(tasks)
    product = found * (rows @ (found @ rows))
    assert product == pytest.approx(np.full(tasks, product.mean()), rel=1e-3)


@pytest.mark.parametrize("kind", [PCGrad, MGDA, IMTLG, UPGrad, NashMTL])
def test_dependent_and_absent_gradients_are_no_trouble(kind):
    rows = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 0, 0], [0, 1e-9, 0]])
    found = factors(of(kind, 4), rows)
    assert np.isfinite(found).all()
    assert found[2] == 1, "a task that the shared part does not move is left out"
    assert np.isfinite(factors(of(kind, 1), rows[:1])).all()


# methods with a state -------------------------------------------------------------------------------------------------


def test_gradnorm_is_the_algorithm():
    method = of(GradNorm, 2, alpha=1.5, lr=0.1)
    rows, pace, first = np.array([[3.0, 0], [0, 1.0]]), np.ones(2), None
    for losses in ([4.0, 2.0], [2.0, 1.9], [1.0, 1.8]):
        first = np.array(losses) if first is None else first
        assert factors(method, rows, losses) == pytest.approx(pace)
        ratio = np.array(losses) / first
        lengths = np.linalg.norm(rows, axis=1)
        pulls = pace * lengths
        slope = np.sign(pulls - pulls.mean() * (ratio / ratio.mean()) ** 1.5) * lengths / pulls.mean()
        pace = pace - 0.1 * slope
        pace = 2 * pace / pace.sum()
    assert pace[0] < pace[1], "the task with the long gradient that is ahead is held back"


def test_gradnorm_goes_on_with_another_weight():
    """L(0) is the loss without its weight: a run whose weight is changed keeps the loss ratio that it had."""
    gram = torch.eye(2, dtype=torch.float64)
    losses = torch.tensor([[4.0, 2.0], [2.0, 1.9], [1.0, 1.8]], dtype=torch.float64)
    found = []
    for later in (1.0, 5.0):
        method = of(GradNorm, 2)
        for row, first in zip(losses, (1.0, later, later), strict=True):
            weights = torch.tensor([first, 1.0], dtype=torch.float64)
            method.factors(Seen(AB, weights * row, gram, 0, weights))
        found.append((method.first.tolist(), method.pace.tolist()))
    assert found[0] == found[1]
    assert found[0][0] == [4.0, 2.0]


def test_dwa_is_equation_7():
    method = of(DWA, 2, temperature=2.0, every=2)
    table = [(4, 1), (2, 1), (2, 1), (1, 1), (9, 9)]
    found = [factors(method, CONFLICT, losses) for losses in table]
    assert np.array(found[:4]) == pytest.approx(1)
    ratio = np.array([1.5 / 3, 1.0]) / 2
    assert found[4] == pytest.approx(2 * np.exp(ratio) / np.exp(ratio).sum())


def test_famo_is_algorithm_1():
    method = of(FAMO, 2, lr=0.05, decay=0.01)
    xi = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([xi], lr=0.05, weight_decay=0.01)
    last = None
    for losses in ([4.0, 2.0], [2.0, 1.9], [1.0, 1.8], [1.1, 1.0]):
        level = torch.tensor(losses, dtype=torch.float64)
        if last is not None:
            (xi.grad,) = torch.autograd.grad(xi.softmax(0), xi, last.log() - level.log())
            optimizer.step()
        raw = (xi.softmax(0) / level).detach()
        assert factors(method, CONFLICT, losses) == pytest.approx((raw / raw.sum()).numpy())
        last = level


def test_uncertainty_is_kendalls_loss():
    method = of(Uncertainty, 2, start=0.3)
    assert factors(method, CONFLICT) == pytest.approx(1 / (2 * math.exp(0.3)))
    assert method.regulariser({"a": 1.0, "b": 0.5}).item() == pytest.approx(0.3 / 2 * 1.5)


@pytest.mark.parametrize("name", BALANCING.names())
def test_a_method_goes_on_exactly(name):
    """State is all in the state dict; tasks may be missing at a step."""
    steps = np.random.default_rng(0)
    table = [(AB if k % 3 else ("b",), steps.uniform(0.5, 2, 2), steps.standard_normal((2, 3))) for k in range(12)]

    def run(method, some):
        found = []
        for tasks, losses, rows in some:
            at = ["ab".index(task) for task in tasks]
            gram = torch.from_numpy(rows[at] @ rows[at].T)
            found.append(method.factors(Seen(tasks, torch.from_numpy(losses[at]), gram, 3)).tolist())
        return found

    options = {"every": 2} if name == "dwa" else {}
    whole, first, second = (BALANCING.get(name)(AB, **options) for _ in range(3))
    expected = run(whole, table)
    before = run(first, table[:5])
    second.load_state_dict(first.state_dict())
    assert before + run(second, table[5:]) == expected


# the training step ----------------------------------------------------------------------------------------------------

INFO = {"s": SourceInfo(classes=("x", "y"), keys=("image", "mask"))}
TASKS = {
    "segmentation": {"name": "segmentation", "source": "s", "weight": 0.5},
    "other": {"name": "segmentation", "source": "s"},
    "denoising": {"name": "denoising", "source": "s", "weight": 3, "head": {"name": "decoder", "width": 4}},
}
LINEAR = {k: {**v, "head": "linear"} for k, v in TASKS.items() if k != "denoising"}


def module_of(balancing, tasks=TASKS, freeze=(), **config):
    torch.manual_seed(0)
    backbone = {"name": "plain", "width": 6, "depth": 2}
    config = {"backbone": backbone, "projection": {"channels": 4}, "norm": "none", "tasks": tasks, **config}
    config.setdefault("context", {"name": "context7", "init_noise": 0.3})
    module = DenseModule(DenseModel.from_config(config, INFO), torch.optim.SGD, balancing=balancing, freeze=freeze)
    module = module.double()
    for p in module.model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return module


def batch(seed=0, planted=False):
    rng = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 2, (3, 12, 12), generator=rng)
    mask[0, :5] = 255
    image = torch.rand(3, 3, 12, 12, generator=rng, dtype=torch.float64)
    return {
        "s": {"image": image, "mask": mask, "gray": torch.zeros(3) > 0, "key": torch.tensor([[0, i] for i in range(3)])}
    }


def step(module, **options):
    module.zero_grad()
    module.training_step(batch(**options), 0).backward()
    return {name: p.grad.clone() for name, p in module.model.named_parameters() if p.grad is not None}


def own_gradients(module, tasks=TASKS):
    """Of every task alone: weight * loss, by a module that has the others at weight 0."""
    found = {}
    for key in tasks:
        for other in tasks:
            module.balancer.weights[other] = tasks[other].get("weight", 1) if other == key else 0
        found[key] = step(module)
    module.balancer.weights.update({key: spec.get("weight", 1) for key, spec in tasks.items()})
    return found


@pytest.mark.parametrize("name", ["pcgrad", "mgda", "imtl_g", "upgrad", "nash_mtl"])
@pytest.mark.parametrize("share", [True, False])
def test_one_backward_combines_shared_gradients_and_leaves_heads_alone(name, share, monkeypatch):
    module = module_of(name, context={"name": "context7", "init_noise": 0.3, "share": share})
    asked = []
    method = module.balancing
    real = method.factors
    monkeypatch.setattr(method, "factors", lambda seen: asked.append((seen, real(seen))) or asked[-1][1])
    combined = step(module)
    seen, factor = asked[0]
    alone = own_gradients(
        module_same := module_of("fixed", context={"name": "context7", "init_noise": 0.3, "share": share})
    )
    weights = [
        n for n, p in module_same.model.named_parameters() if any(p is q for q in last_shared(module_same.model))
    ]
    rows = torch.stack([torch.cat([alone[key][n].flatten() for n in weights]) for key in TASKS])
    assert torch.allclose(seen.gram, rows @ rows.T, rtol=1e-9, atol=1e-18)
    for parameter, found in combined.items():
        own = [alone[key].get(parameter, torch.zeros_like(found)) for key in TASKS]
        shared = parameter.startswith(("backbone", "projection", "context.shared"))
        scale = factor.tolist() if shared else [1.0] * 3
        expected = sum(a * g for a, g in zip(scale, own, strict=True))
        assert torch.allclose(found, expected, rtol=1e-8, atol=1e-14), parameter


def test_where_only_the_last_weights_are_shared_the_proxy_is_the_full_gradient():
    """And elsewhere signs agree: segmentation against a task with opposed labels."""
    frozen = ["backbone", "projection", *(f"context.shared.layers.{i}" for i in range(0, 12, 2))]
    for freeze in (frozen, []):
        module = module_of("pcgrad", LINEAR, freeze=freeze)
        alone = own_gradients(module_of("fixed", LINEAR, freeze=freeze), LINEAR)
        names = [n for n, p in module.model.named_parameters() if p.requires_grad and not n.startswith("tasks")]
        rows = torch.stack([torch.cat([alone[key][n].flatten() for n in names]) for key in LINEAR])
        full = rows @ rows.T
        proxy = gram_of(module)
        if freeze:
            assert torch.allclose(proxy, full, rtol=1e-9)
        assert proxy[0, 1].sign() == full[0, 1].sign()


def gram_of(module, data=None, kind=of_weights):
    """As a training step measures it."""
    prepared = module._prepare(data or batch())
    with module.balancer.branched():
        outputs = module._run(prepared.inputs, prepared.surround)
    terms = {key: module.model.task(key).loss(y, prepared.targets[key]) for key, y in outputs.items()}
    found = module._normaliser(terms, module.device, None, 0)
    losses = {key: module.balancer.weights[key] * loss for key, loss in found.shares.items()}
    tasks = list(module.model.tasks)
    if kind is of_features:
        return of_features(losses, tasks, module.balancer._branches.features, device=module.device)
    return of_weights(losses, tasks, last_shared(module.model))


@pytest.mark.parametrize("opposed", [True, False])
def test_planted_conflict_and_agreement_have_their_sign_in_both_proxies(opposed):
    """Two heads with the same weights whose labels are opposed or equal: cosine of the full gradients and proxies."""
    module = module_of({"name": "mgda", "of": "features"}, LINEAR)
    tasks = module.model.tasks
    tasks["other"].load_state_dict(tasks["segmentation"].state_dict())
    with torch.no_grad():  # both answer about one half, so that labels alone decide
        for parameter in [*tasks["other"].parameters(), *tasks["segmentation"].parameters()]:
            parameter.mul_(1e-3)
    if opposed:
        prepare = tasks["other"].prepare

        def swapped(sample, rngs):
            x, target = prepare(sample, rngs)
            return x, {"mask": torch.where(target["mask"] == 255, 255, 1 - target["mask"])}

        tasks["other"].prepare = swapped
    for kind in (of_weights, of_features):
        gram = gram_of(module, kind=kind)
        cosine = gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt()
        assert cosine < -0.9 if opposed else cosine == pytest.approx(1), (kind, cosine)


@pytest.mark.parametrize("kind", [of_weights, of_features])
def test_small_gradients_survive_float16_by_the_scale_of_the_scaler(kind):
    torch.manual_seed(0)
    weights, x = torch.randn(64, 8), torch.randn(4, 64)

    def gram(dtype, scale):
        features = (x.to(dtype) * 1).requires_grad_()
        last = weights.to(dtype).requires_grad_()
        losses = {key: (features @ last).float().sin().sum() * 1e-8 * (1 + i) for i, key in enumerate("ab")}
        if kind is of_features:
            return of_features(losses, ["a", "b"], dict.fromkeys("ab", features), scale, device=features.device)
        return of_weights(losses, ["a", "b"], [last], scale)

    exact = gram(torch.float32, 1.0)
    assert torch.equal(gram(torch.float32, 2.0**16), exact), "a power of two changes nothing"
    assert not gram(torch.float16, 1.0).any(), "without it they are 0"
    assert torch.allclose(gram(torch.float16, 2.0**16), exact, rtol=0.05)


def test_features_are_measured_where_tasks_share_one_input():
    found = step(module_of({"name": "mgda", "of": "features"}, LINEAR))
    assert all(torch.isfinite(g).all() for g in found.values())
    with pytest.raises(ConfigError, match=r"model.balancing: of: features .* denoising"):
        module_of({"name": "mgda", "of": "features"})


def test_gray_pictures_on_a_colour_trunk_are_one_input(monkeypatch):
    monkeypatch.setitem(INFO, "s", SourceInfo(classes=("x", "y"), keys=("image", "mask"), channels=1))
    module, gray = module_of({"name": "mgda", "of": "features"}, LINEAR), batch()
    gray["s"]["image"] = gray["s"]["image"][:, :1]
    passes = []
    module.model.backbone.register_forward_hook(lambda layer, given, answer: passes.append(given[0]))
    module.training_step(gray, 0).backward()
    assert [tuple(x.shape) for x in passes] == [(3, 3, 12, 12)], "one pass, of three equal channels"


def test_a_rank_without_losses_adds_on_the_device_of_the_model():
    """NCCL takes no other; meta stands for a device that is not the CPU, and cannot be copied from."""
    with pytest.raises(NotImplementedError, match="meta tensor"):
        of_features({}, AB, {}, device=torch.device("meta"))


def test_watching_changes_no_gradient():
    plain, watched = step(module_of("fixed")), step(module_of({"name": "fixed", "watch": True}))
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


@pytest.mark.parametrize("balancing", ["fixed", "uncertainty", "mgda"])
def test_a_task_of_weight_0_does_not_move(balancing):
    module = module_of(balancing, {**TASKS, "denoising": {**TASKS["denoising"], "weight": 0}})
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
    before = {name: p.clone() for name, p in module.named_parameters()}
    for seed in range(3):
        optimizer.zero_grad()
        module.training_step(batch(seed=seed), 0).backward()
        module.on_before_optimizer_step(optimizer)
        optimizer.step()
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert not {name for name in moved if "denoising" in name}
    assert moved == {name for name in before if "denoising" not in name}


def test_a_loss_that_is_not_finite_teaches_no_method(monkeypatch):
    module = module_of({"name": "famo"})
    module.refuses_not_finite = False
    broken = batch()
    broken["s"]["image"][0] = torch.nan
    before = {name: value.clone() for name, value in module.balancing.state_dict().items()}
    module.training_step(broken, 0)
    assert all(
        torch.equal(value, before[name]) or value.isnan().all() for name, value in module.balancing.state_dict().items()
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pcgrd", "did you mean 'pcgrad'"),
        ({"alpha": 1}, "as a name or a mapping with 'name'"),
        ({"name": "gradnorm", "alpa": 1}, "did you mean 'alpha'"),
        ({"name": "gradnorm", "alpha": "much"}, "alpha: expected a number, got 'much'"),
        ({"name": "gradnorm", "alpha": -1.0}, "alpha -1.0 must not be negative"),
        ({"name": "mgda", "of": "weight"}, "did you mean 'weights'"),
        ({"name": "dwa", "every": 0}, "must be positive"),
        ({"name": "fixed", "watch": 3}, "watch: expected true or false"),
        ({"name": "dwa", "of": "features"}, "add watch: true"),
    ],
)
def test_what_cannot_work_is_refused(spec, message):
    with pytest.raises(ConfigError, match=r"^model\.balancing") as error:
        module_of(spec)
    assert message in str(error.value)


def test_gradients_need_something_shared():
    with pytest.raises(ConfigError, match="nothing that tasks share"):
        module_of("mgda", ablate="trunk_zero") if False else module_of(
            "mgda", freeze=["backbone", "projection", "context"]
        )
    with pytest.raises(ConfigError, match="trunk_zero leaves nothing"):
        module_of("mgda", ablate="trunk_zero")
    assert {tuple(p.shape) for p in last_shared(module_of("mgda", context="none").model)} == {(4, 6, 1, 1), (4,)}
    model = module_of("fixed", context="none", projection=None).model
    assert all(any(p is q for q in model.backbone.parameters()) for p in last_shared(model))
    assert isinstance(make_balancer("fixed", model, 0).method, Fixed)


# a run ----------------------------------------------------------------------------------------------------------------

CONFIG = """
model:
  backbone: {name: plain, width: 12, depth: 2}
  projection: {channels: 2, activation: none}
  context: {name: context7, residual: true}
  tasks:
    segmentation: {name: segmentation, source: mosaic, head: upsample}
    opposed: {name: test-opposed, source: mosaic}
  balancing: {name: fixed, watch: true}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
data:
  sources:
    mosaic: {name: mosaic, names: [brick, grass], size: 24, length: 10, val_length: 2, batch_size: 4}
  num_workers: 0
trainer:
  accelerator: cpu
  max_steps: 30
  log_every_n_steps: 3
  val_check_interval: 30
  check_val_every_n_epoch: null
  enable_progress_bar: false
  enable_model_summary: false
"""


def opposed(features, in_channels, info, source, weight: float = 1.0):
    """Segmentation from the same logits whose truth is always another class."""
    task = Segmentation(features, in_channels, info, source, weight, head="upsample")
    prepare = task.prepare

    def planted(sample, rngs):
        x, target = prepare(sample, rngs)
        other = (target["mask"] + 1) % len(info.classes)
        return x, {"mask": torch.where(target["mask"] == info.ignore_index, target["mask"], other)}

    task.prepare = planted
    return task


@pytest.fixture
def opposed_task():
    TASKS_REGISTRY.register("test-opposed")(opposed)
    yield
    TASKS_REGISTRY.unregister("test-opposed")


def test_planted_conflict_is_on_the_panel(tmp_path, monkeypatch, opposed_task):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSECTX_RUN", "")
    (tmp_path / "c.yaml").write_text(CONFIG)
    assert main(["fit", "-c", "c.yaml"]) == 0
    with (tmp_path / "runs" / "c" / "0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/segmentation/loss"]]
    cosines = [float(row["balance/cos/segmentation/opposed"]) for row in rows]
    assert len(cosines) == 10
    assert max(cosines[5:]) < -0.5, cosines
    assert all(float(row["balance/weight/opposed"]) == 1 for row in rows)
    assert all(float(row["balance/norm/opposed"]) > 0 for row in rows)
    page = (tmp_path / "runs" / "c" / "0" / "report.html").read_text()
    assert "Tasks in conflict" in page
    assert "segmentation and opposed" in page
    figure = page[page.index("cosine: segmentation and opposed") :]
    assert "least \N{MINUS SIGN}" in figure[: figure.index("</figure>")]


def test_a_run_goes_on_exactly_with_its_balancing(tmp_path, monkeypatch, opposed_task):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSECTX_RUN", "")
    (tmp_path / "c.yaml").write_text(CONFIG)
    flags = ["--model.balancing", "{name: gradnorm, lr: 0.1}", "--trainer.accumulate_grad_batches=2", "--no-report"]
    flags += ["--trainer.log_every_n_steps=2", "--data.steps_per_epoch=4"]
    assert main(["fit", "-c", "c.yaml", *flags, "--trainer.max_steps=4", "--trainer.val_check_interval=4"]) == 0
    folder = tmp_path / "runs" / "c" / "0" / "checkpoints"
    whole = torch.load(folder / "step-4.ckpt", weights_only=True)["state_dict"]
    table = (folder.parent / "metrics.csv").read_text()
    assert [row["step"] for row in csv.DictReader(table.splitlines()) if row["balance/norm/opposed"]] == ["1", "3"]
    (folder / "step-4.ckpt").unlink()
    assert main(["fit", "-c", "c.yaml", *flags, "--trainer.max_steps=4", "--trainer.val_check_interval=4",
                 "--resume", str(folder / "step-2.ckpt")]) == 0  # fmt: skip
    again = torch.load(folder / "step-4.ckpt", weights_only=True)["state_dict"]
    assert "balancing.pace" in whole
    assert (whole["balancing.pace"] - 1).abs().max() > 1e-3
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert (folder.parent / "metrics.csv").read_text() == table


@pytest.mark.parametrize("balancing", ["{name: fixed, watch: true}", "pcgrad"])
def test_what_is_measured_in_the_backbone_is_not_compiled(tmp_path, monkeypatch, balancing):
    """A backward that was compiled for one use cannot be run a second time, at the step that is logged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSECTX_RUN", "")
    (tmp_path / "c.yaml").write_text(CONFIG)
    flags = ["--model.projection=null", "--model.context=none", "--model.tasks.segmentation.head=linear"]
    flags += ["--model.tasks.opposed=null", "--model.tasks.other={name: segmentation, source: mosaic}"]
    flags += ["--model.compile=true", "--model.balancing", balancing, "--no-report"]
    flags += ["--trainer.max_steps=2", "--trainer.log_every_n_steps=2", "--trainer.limit_val_batches=0"]
    assert main(["fit", "-c", "c.yaml", *flags]) == 0
    table = (tmp_path / "runs" / "c" / "0" / "metrics.csv").read_text()
    assert "balance/cos/segmentation/other" in table


IN_TURN = """
model:
  backbone: {name: plain, width: 4, depth: 2}
  tasks:
    one: {name: segmentation, source: a}
    other: {name: segmentation, source: b}
    idle: {name: segmentation, source: b, weight: 0}
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01}}
data:
  sources:
    a: {name: mosaic, size: 8, length: 4, val_length: 1}
    b: {name: mosaic, size: 8, length: 4, val_length: 1}
  sampling: alternate
trainer: {accelerator: cpu, max_steps: 1, limit_val_batches: 0}
"""
RATIO = {"name": "ratio", "ratios": {"a": 3, "b": 1}}
TEMPERATURE = {"name": "temperature", "temperature": 2}


def built(folder, balancing, **more):
    config = yaml.safe_load(IN_TURN)
    config["model"]["balancing"] = balancing
    for path, value in more.items():
        part, *middle, last = path.split("__")
        node = config[part]
        for key in middle:
            node = node[key]
        node[last] = value
    return instantiate(config, folder, "fit")


@pytest.mark.parametrize("name", sorted(set(BALANCING.names()) - {"fixed", "uncertainty"}))
def test_a_method_that_would_compare_one_task_with_itself_is_refused(tmp_path, name):
    message = rf"^model\.balancing: {name} compares .* data.sampling alternate no step has two. .* fixed or uncertainty"
    with pytest.raises(ConfigError, match=message):
        built(tmp_path, name)


@pytest.mark.parametrize("sampling", ["alternate", RATIO, TEMPERATURE, [{**RATIO, "until": 2}, "alternate"]])
def test_gradients_of_one_task_a_step_cannot_be_watched(tmp_path, sampling):
    with pytest.raises(ConfigError, match=r"^model\.balancing: watch: true .* data.sampling (alternate|ratio|temp)"):
        built(tmp_path, {"name": "fixed", "watch": True}, data__sampling=sampling)


@pytest.mark.parametrize(
    ("balancing", "more"),
    [
        ("fixed", {}),
        ("uncertainty", {}),
        ("dwa", {"data__sampling": "joint"}),
        ("dwa", {"data__sampling": [{"name": "joint", "until": 2}, "alternate"]}),
        ("dwa", {"model__tasks__idle__weight": 1}),
        ("dwa", {"model__tasks__other__weight": 0}),  # a task alone has nothing to be balanced with
    ],
)
def test_methods_that_have_something_to_compare_or_need_not_are_built(tmp_path, balancing, more):
    built(tmp_path, balancing, **more)


def test_a_refused_balancing_is_status_2_and_leaves_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSECTX_RUN", "")
    (tmp_path / "c.yaml").write_text(IN_TURN)
    assert main(["fit", "-c", "c.yaml", "--model.balancing=mgda"]) == 2
    assert "Take data.sampling joint" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "c").exists()
