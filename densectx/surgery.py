"""A context module put into a trained network (Yu & Koltun 2016, section 3: it "can be plugged in").

In a config the same is ``init_from: RUN`` beside ``context: {name: basic, init_noise: 0}``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from densectx.errors import ConfigError
from densectx.model import DenseModel, without_weights
from densectx.nn.context import NoContext
from densectx.nn.modes import evaluating
from densectx.registry import CONTEXTS
from densectx.types import SourceInfo, Spec

_PROBE = 4  # side in cells of the picture that shows whether a backbone's features are signed


def insert_context(model: DenseModel, context: Spec = "basic", *, truncate: bool = False) -> DenseModel:
    """A model with a fresh context module between the trained features and the trained heads.

    It starts as the identity (``init_noise`` is 0 unless given), so on features of at least 0, and with ``residual:
    true`` on any, the answers are those of the model to the last bit. (In wide contexts the identity is a mean over
    grouped channels, exact up to rounding; without noise those channels stay tied in training.)

    Args:
        model: of :meth:`densectx.model.DenseModel.from_config`, without a context; left as it is.
        context: spec of a context that can start as the identity.
        truncate: features may be negative, and the context's start, max(x, 0), is meant: the published networks put
            theirs behind class scores.

    Returns:
        A new model, on the CPU, in the mode of the given one.

    Raises:
        ConfigError: the model has a context, features may be negative and neither ``residual`` nor ``truncate`` says
            what becomes of them, or the spec is not possible or no identity at the start (``aspp``, ``norm: batch``).
    """
    if any(not isinstance(old, NoContext) for old in model.context.values()):
        raise ConfigError("the model has a context already, whose weights would be lost; take one with context: none.")
    if not model.config:
        raise ConfigError("the model has no config to build the new one from; build it by DenseModel.from_config.")
    spec: dict[str, Any] = {"name": context} if isinstance(context, str) else dict(context)
    if "init_noise" in CONTEXTS.options(str(spec.get("name"))):
        spec.setdefault("init_noise", 0.0)
    if not truncate and not spec.get("residual") and _signed(model):
        raise ConfigError(
            "the features in front of the context may be negative, and a context starts as max(x, 0), not as x: answers"
            " would change. Take residual: true, which keeps them, or truncate=True if cutting off is meant (the paper"
            " does, behind class scores)."
        )
    config = {**{key: value for key, value in model.config.items() if key != "sources"}, "context": spec}
    sources = {key: SourceInfo.from_config(info) for key, info in model.config.get("sources", {}).items()}
    grown = DenseModel.from_config(without_weights(config), sources)
    width = grown.context_channels
    if not spec.get("init_noise") and not all(_is_identity(part, width) for part in grown.context.values()):
        raise ConfigError(f"the context {spec} does not start as the identity; take one of dilations without a norm.")
    grown.config = {**grown.config, "backbone": model.config["backbone"]}
    fresh = {key: value for key, value in grown.state_dict().items() if key.startswith("context.")}
    grown.load_state_dict({**model.state_dict(), **fresh})
    return grown.train(model.training)


@torch.no_grad()
def _is_identity(context: nn.Module, channels: int) -> bool:
    """Whether features of at least 0 come out as they went in, up to rounding."""
    features = torch.rand(1, channels, _PROBE, _PROBE, generator=torch.Generator().manual_seed(0))
    answer = context.eval()(features)
    return answer.shape == features.shape and torch.allclose(answer, features, rtol=0, atol=1e-6)


@torch.no_grad()
def _signed(model: DenseModel) -> bool:
    """Whether what the context reads may be negative: no ReLU in front; without a projection, as a picture shows."""
    if not isinstance(model.projection, nn.Identity):
        last = model.projection[-1] if isinstance(model.projection, nn.Sequential) else model.projection
        return not isinstance(last, nn.ReLU)
    place = next(model.backbone.parameters())
    side = _PROBE * model.stride
    picture = torch.rand(1, model.backbone.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    with evaluating(model):
        features = model.trunk(picture.to(place))[-1]
    return bool((features < 0).any())
