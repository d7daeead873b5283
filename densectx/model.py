"""The deployable network: backbone, projection, one context module, tasks. Pure torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeAlias, cast, final

import torch
from torch import Tensor, nn

from densectx.backbones.base import Backbone, MarginBackbone
from densectx.errors import ConfigError, PluginError, unknown
from densectx.nn.colour import grey
from densectx.nn.context import Context
from densectx.nn.modes import evaluating
from densectx.nn.norm import NORMS, select, set_norm
from densectx.nn.on_colour import luma_only, per_channel
from densectx.nn.precision import full, no_autocast
from densectx.nn.projection import PROJECTION, make_projection
from densectx.nn.resize import missing, pad_to_multiple, reflect101
from densectx.registry import BACKBONES, CONTEXTS, TASKS
from densectx.tasks.base import Options, Task
from densectx.tasks.options import flat, grouped, repeated, resolved
from densectx.types import Feature, SourceInfo

MODEL_KEYS: Final = ("backbone", "projection", "context", "tasks", "norm", "ablate")
"""Keys of a config's ``model`` that say what the network is."""
Pass: TypeAlias = tuple[int, str | None, int]
Keep: TypeAlias = Callable[[Tensor, int, Callable[[Tensor], Tensor]], Tensor]
"""(trunk input, its surround, what computes the projected features of an input) -> those features, perhaps kept."""
Branch: TypeAlias = Callable[[str, Sequence[Tensor]], Sequence[Tensor]]
"""(task, the features that its head will read) -> features of the same values."""


@final
class DenseModel(nn.Module):
    """One trunk for every task: backbone -> 1x1 projection -> context module -> one head a task.

    Inputs of any size >= 1 are padded bottom and right to a multiple of the total stride by repeating the border,
    and outputs are cropped; tasks whose adapted input is the same tensor (and, with ``norm: per_input``, of the same
    kind) share one pass through the trunk.

    Args:
        backbone: built backbone.
        projection: the last level to the context's channels (``nn.Identity`` for none).
        contexts: one shared module under the key ``"shared"``, or one a task under the task's key.
        tasks: built tasks by key.
        ablate: ``"trunk_zero"`` feeds the heads zeros instead of features.
        kinds: the kind of input of each task, for a trunk with norm layers per input; empty for one that makes no
            difference between inputs.
        config: what :meth:`from_config` can build this model from again, in plain JSON types.
    """

    def __init__(
        self,
        backbone: Backbone,
        projection: nn.Module,
        contexts: Mapping[str, Context],
        tasks: Mapping[str, Task],
        *,
        ablate: str | None = None,
        kinds: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.projection = backbone, projection
        self.context = nn.ModuleDict(contexts)
        self.tasks = nn.ModuleDict(tasks)
        self.ablate = ablate
        self.kinds = dict(kinds or {})
        self.config = dict(config or {})
        self.stride = max(feature.stride for feature in backbone.features)
        self.kept: Keep | None = None  # in its place the trunk is asked for what is not there; pyramids are not kept
        self.branch: Branch | None = None  # between shared features and heads, while gradients are balanced

    def task(self, key: str) -> Task:
        """The task of a key."""
        return cast("Task", self.tasks[key])

    @classmethod
    def from_config(cls, config: Mapping[str, Any], sources: Mapping[str, SourceInfo]) -> DenseModel:
        """Build a model from the ``model`` part of a config.

        Args:
            config: ``{backbone, projection, context, tasks: {key: {name, source, ...}}, norm, ablate}``; null is the
                same as absent, except for ``projection: null``, which means none.
            sources: what each data source is; used by the tasks that name it.

        Raises:
            ConfigError: unknown keys, names or options, and combinations that cannot work.
        """
        for key in config:
            if key not in MODEL_KEYS:
                raise ConfigError(f"model: {unknown('key', key, MODEL_KEYS)}")
        given = config.get("tasks") or {}
        if not isinstance(given, Mapping):
            raise ConfigError(f"expected tasks by their keys, as {{seg: segmentation}}, got {given!r}.", "model.tasks")
        specs = {key: spec for key, spec in given.items() if spec is not None}
        if not config.get("backbone") or not specs:
            raise ConfigError("model: a backbone and at least one task are needed (model.backbone, model.tasks).")
        norm, ablate = config.get("norm") or "batch", config.get("ablate")
        if norm not in NORMS:
            raise ConfigError(unknown("norm", str(norm), NORMS), "model.norm")
        if ablate not in (None, "trunk_zero"):
            raise ConfigError(unknown("arm", str(ablate), ("trunk_zero",)), "model.ablate")
        backbone: Backbone = BACKBONES.build(config["backbone"], "model.backbone")
        projection, channels = make_projection(config.get("projection", PROJECTION), backbone.features[-1].channels)
        context = config.get("context") or "basic"
        context = {"name": context} if isinstance(context, str) else context
        if not isinstance(context, Mapping):
            raise ConfigError(f"expected a name or a mapping with 'name', got {context!r}.", "model.context")
        context = dict(context)
        keys = ["shared"] if context.pop("share", True) else list(specs)
        contexts = {key: CONTEXTS.build(context, "model.context", in_channels=channels) for key in keys}
        features = (*backbone.features, Feature(channels, backbone.features[-1].stride))
        tasks, used = {}, {}
        for key, spec in specs.items():
            where = f"model.tasks.{key}"
            if not key.isidentifier() or key == "shared" or hasattr(nn.ModuleDict, key):
                raise ConfigError(f"a task cannot be called {key!r}; choose an identifier like denoise_25.", where)
            _, options = TASKS.check(spec, ("features", "in_channels", "info"), where)
            source = str(options["source"])
            if source not in sources:
                raise ConfigError(unknown("source", source, sources), f"{where}.source")
            used[source] = sources[source].to_config()
            runtime: dict[str, Any] = {"features": features, "in_channels": backbone.in_channels}
            tasks[key] = TASKS.build(spec, where, info=sources[source], **runtime)
            _check_labels(tasks[key], source, sources, where)
        kinds = _kinds(tasks) if norm == "per_input" else {}
        inputs = list(dict.fromkeys(kinds.values()))
        exchanged = set_norm(backbone, norm, inputs)
        if kinds and "shared" in contexts:  # a task's own context sees one kind anyway
            exchanged += set_norm(contexts["shared"], norm, inputs)
        if kinds and not exchanged:
            raise ConfigError("there is no batch norm to copy for each kind of input; take batch.", "model.norm")
        built = {**_plain(dict(config)), "sources": used}
        return cls(backbone, projection, contexts, tasks, ablate=ablate, kinds=kinds, config=built)

    def trunk(self, x: Tensor, kind: str | None = None, surround: int = 0) -> list[Tensor]:
        """(B, in_channels, H + 2 s, W + 2 s) -> the pyramid and the projected last level of the padded input.

        Inputs are padded at the bottom and on the right to multiples of ``stride``. A backbone that needs a margin is
        given the surroundings, mirrored where they do not suffice, and its features are those of the (H, W) in the
        middle; to another one surroundings are part of the input.

        Args:
            x: adapted input.
            kind: with ``norm: per_input`` the kind of x, one of ``kinds``; null for the one that ran last.
            surround: s, pixels of surroundings on each side.

        Raises:
            PluginError: the backbone does not answer with a level for each of its features.
        """
        if kind is not None:
            select((self.backbone, self.context), kind)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.ablate is None):
            if margin := self.margin:
                assert isinstance(self.backbone, MarginBackbone)
                before = margin - surround
                bottom, right = (before + missing(size - 2 * surround, self.stride) for size in x.shape[-2:])
                pyramid = self.backbone.valid(reflect101(x, before, bottom, before, right))
            else:
                pyramid = self.backbone(pad_to_multiple(x, self.stride))
            _check_levels(pyramid, self.backbone)
            features = [*pyramid, self.projection(pyramid[-1])]
        return [torch.zeros_like(f) for f in features] if self.ablate == "trunk_zero" else features

    @property
    def margin(self) -> int:
        """Pixels of surroundings on each side that the backbone uses up, 0 for most."""
        return self.backbone.margin if isinstance(self.backbone, MarginBackbone) else 0

    def forward(self, inputs: Mapping[str, Tensor], surround: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        """Task inputs by key to outputs: {task: (B, channels, H + 2 s, W + 2 s)} -> {task: (B, K, H * f, W * f)}.

        Args:
            inputs: x of each task; f is its scale.
            surround: s of each task, so many pixels on each side of x are its surroundings, for which there is no
                output; 0 where it says nothing.

        Raises:
            TypeError: one tensor for all tasks; :meth:`predict` answers an image.
        """
        if isinstance(inputs, Tensor):  # type: ignore[unreachable]  # of callers without a type checker
            raise TypeError("expected {task: x}, as the tasks prepare it; predict(image) answers an image.")
        passes: dict[Pass, tuple[Tensor, list[Tensor]]] = {}  # by identity and kind; holds the key's tensor alive
        contexts: dict[tuple[Pass, str], Tensor] = {}
        inputs_of_trunk: dict[tuple[Any, ...], Tensor] = {}  # tensors adapted alike are to be one
        outputs = {}
        for key, x in inputs.items():
            task = self.task(key)
            how = (id(x), type(task).adapt, task.channels, task.in_channels, task.maps)
            adapted, border = inputs_of_trunk.setdefault(how, task.adapt(x)), (surround or {}).get(key, 0)
            kind = self.kinds.get(key)
            this = (id(adapted), kind, border)
            if this not in passes:
                passes[this] = (adapted, self._levels(adapted, kind, border))
            levels, shared = passes[this][1], "shared" in self.context
            which = "shared" if shared else key
            if not shared:  # the task's own context is a part of its branch
                levels = self._branched(key, levels)
            if (this, which) not in contexts:  # only right behind the pass of its kind
                contexts[this, which] = self.context[which](levels[-1])
            features = [*levels[:-1], contexts[this, which]]
            if shared:
                features = self._branched(key, features)
            if border and self.margin:  # the features are those of the middle
                x, border = x[..., border:-border, border:-border], 0
            output = task.head(features, pad_to_multiple(x, self.stride))
            first = border * task.scale // task.input_scale
            height, width = ((size - 2 * border) * task.scale // task.input_scale for size in x.shape[-2:])
            outputs[key] = output[..., first : first + height, first : first + width]
        return outputs

    def _branched(self, key: str, features: list[Tensor]) -> list[Tensor]:
        return features if self.branch is None else list(self.branch(key, features))

    def _levels(self, x: Tensor, kind: str | None, surround: int) -> list[Tensor]:
        if self.kept is None:
            return self.trunk(x, kind, surround)
        return [self.kept(x, surround, lambda part: self.trunk(part, kind, surround)[-1])]

    @torch.no_grad()
    def predict(
        self,
        image: Tensor,
        tasks: Iterable[str] | None = None,
        options: Options | None = None,
    ) -> dict[str, Tensor]:
        """Answer for an image as it is given: nothing is added to it and it is not reduced.

        Threads may call it at the same time; they take turns.

        Args:
            image: (C, H, W) or (B, C, H, W), C = 1 or the model's channels, sRGB float 0..1 or uint8, any device.
            tasks: keys of the tasks to answer, or one key; null for all.
            options: run-time options, ``{"denoising.sigma": 25.0}``; a (B,) tensor gives each image its own. What
                is left out, None or negative is found as :meth:`resolve` finds it.

        Returns:
            {task: (K, H * scale, W * scale)} float32 on the image's device, batched as the image: class
            probabilities, restored sRGB (unclamped), colorized sRGB.

        Raises:
            ConfigError: unknown task or option, a shape or type that no image has, an option that must be given;
                weights none of which is float32.
        """
        if all(parameter.dtype != torch.float32 for parameter in self.parameters()):
            raise ConfigError(
                f"the model's weights are {next(self.parameters()).dtype}, and predict needs them in float32: call"
                " model.float(), and for half precision predict inside torch.autocast(device, torch.bfloat16)."
            )
        keys = self._keys(tasks)
        wanted = grouped(self.resolve(image, keys, options))
        batch, device = as_batch(image), next(self.parameters()).device
        with evaluating(self):
            found = self._answers(keys, batch.to(device), wanted)
        return {key: (y if image.ndim == 4 else y[0]).float().to(image.device) for key, y in found.items()}

    @torch.no_grad()
    def resolve(
        self, image: Tensor, tasks: Iterable[str] | None = None, options: Options | None = None
    ) -> dict[str, float | Tensor | None]:
        """The run-time options that :meth:`predict` takes for an image, with what it would estimate.

        Given back to :meth:`predict` they change nothing. A colour image that a gray model takes channel by channel
        has one estimate for all of its channels.

        Args:
            image: as in :meth:`predict`.
            tasks: keys of the tasks, null for all.
            options: as in :meth:`predict`.

        Returns:
            ``{"denoising.sigma": ...}`` of the tasks: what was given or is the default, as it is; or, where an
            estimator answers for it, a (B,) float32 tensor (B = 1 for a single image) on the model's device.

        Raises:
            ConfigError: unknown task or option, no number, a tensor that does not have one number an image.
        """
        keys = self._keys(tasks)
        known = [f"{key}.{option}" for key in self.tasks for option in self.task(key).options]
        for name in options or ():
            if name not in known:
                raise ConfigError(unknown("option", name, known))
        batch, given = as_batch(image).to(next(self.parameters()).device), grouped(options or {})
        return flat({k: resolved(self.task(k), given.get(k, {}), self._seen(k, batch), k) for k in keys})

    def _keys(self, tasks: Iterable[str] | None) -> list[str]:
        keys = list(self.tasks) if tasks is None else [tasks] if isinstance(tasks, str) else list(tasks)
        for key in keys:
            if key not in self.tasks:
                raise ConfigError(unknown("task", key, self.tasks))
        return keys

    def _answers(self, keys: Iterable[str], image: Tensor, options: Mapping[str, Options]) -> dict[str, Tensor]:
        def run(some: Iterable[str], batch: Tensor) -> dict[str, Tensor]:
            times = batch.shape[0] // image.shape[0]  # a gray model takes the channels of an image as so many images
            with no_autocast(batch.device):
                inputs = {key: self.task(key).inputs(batch, repeated(options.get(key, {}), times)) for key in some}
            outputs = self(inputs)
            with no_autocast(batch.device):
                return {k: self.task(k).postprocess(full(y), inputs[k]) for k, y in outputs.items()}

        def only(key: str, batch: Tensor) -> Tensor:
            return run([key], batch)[key]

        by_channels: dict[int, list[str]] = {}
        for key in keys:
            by_channels.setdefault(self.channels(key), []).append(key)
        found: dict[str, Tensor] = {}
        for channels, some in by_channels.items():
            if image.shape[1] in (1, channels):  # together: tasks that use the image unchanged share a pass
                found |= run(some, image.expand(-1, channels, -1, -1))
            elif channels == 1 and image.shape[1] == 3:
                found |= {key: self._gray_on_colour(key, partial(only, key), image) for key in some}
            else:
                raise ConfigError(f"an image of {image.shape[1]} channels; this model takes 1 or {channels}.")
        return found

    def _gray_on_colour(self, key: str, run: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        task = self.task(key)
        if task.on_colour == "per_channel":
            return per_channel(run, image)
        return run(self._seen(key, image)) if task.on_colour == "gray" else luma_only(run, image, task.scale)

    def _seen(self, key: str, image: Tensor) -> Tensor:
        """The part of an image that a task looks at: all of it, or what a gray model sees of colours."""
        if image.shape[1] != 3 or self.channels(key) != 1 or self.task(key).on_colour == "per_channel":
            return image
        return grey(image)  # the luma of luma_only is the same

    @property
    def context_channels(self) -> int:
        """Channels of what the context modules take: the projection's, or without one the backbone's."""
        maps = [part.out_channels for part in self.projection.modules() if isinstance(part, nn.Conv2d)]
        return maps[-1] if maps else self.backbone.features[-1].channels

    def channels(self, key: str) -> int:
        """Channels of the images that a task takes."""
        info = self.config.get("sources", {}).get(self.task(key).source, {})
        return int(info.get("channels", 3))


def without_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config without the file or download that its backbone starts from: the same network."""
    backbone = config.get("backbone")
    if not isinstance(backbone, Mapping):
        return dict(config)
    return {**config, "backbone": {k: v for k, v in backbone.items() if k not in ("weights", "pretrained")}}


def _check_labels(task: Task, source: str, sources: Mapping[str, SourceInfo], where: str) -> None:
    """A task whose labels its source never delivers would be left out of every batch, without a word."""
    needed = {key for key in ("mask", "target") if key in task.requires}
    if lacking := sorted(needed - set(sources[source].keys)):
        able = ", ".join(name for name, info in sources.items() if needed <= set(info.keys))
        raise ConfigError(
            f"samples of source {source!r} have no {' and no '.join(lacking)}, which the task learns from; name a"
            f" source whose samples do{f' ({able})' if able else ''}.",
            f"{where}.source",
        )


def _check_levels(pyramid: Any, backbone: Backbone) -> None:
    """One tensor would be taken for as many levels as it has samples, and train."""
    count = len(backbone.features)
    if isinstance(pyramid, list | tuple) and len(pyramid) == count:
        return
    given = f"{len(pyramid)} levels" if isinstance(pyramid, list | tuple) else f"a {type(pyramid).__name__}"
    raise PluginError(
        f"backbone {type(backbone).__name__} gives {given}; expected a list of {count}, a tensor for each of its"
        " features."
    )


def _kinds(tasks: Mapping[str, Task]) -> dict[str, str]:
    """{task: kind of its input}: the source where the image is taken unchanged, else the task itself.

    No task is called like a source's kind: task keys are identifiers.
    """
    return {key: f"image:{task.source}".replace(".", "_") if task.unchanged else key for key, task in tasks.items()}


def as_batch(image: Tensor) -> Tensor:
    """(C, H, W) or (B, C, H, W), float or uint8 -> (B, C, H, W) float32, sRGB 0..1.

    Raises:
        ConfigError: another number of dimensions, an empty image, or another type.
    """
    if not isinstance(image, Tensor):
        raise ConfigError(
            f"an image of type {type(image).__name__}; expected a tensor. NumPy's (H, W, C) becomes one by"
            " torch.from_numpy(image).permute(2, 0, 1), a file by densectx.data.reader.read_image(path)."
        )
    if image.ndim not in (3, 4) or 0 in image.shape:
        raise ConfigError(f"an image of shape {tuple(image.shape)}; expected (C, H, W) or (B, C, H, W), not empty.")
    if not (image.is_floating_point() or image.dtype == torch.uint8):
        raise ConfigError(f"an image of type {image.dtype}; expected float in 0..1 or uint8.")
    image = image if image.ndim == 4 else image[None]
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


def _plain(value: Any) -> Any:
    """Mappings and sequences as dicts and lists, so that a config is JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
