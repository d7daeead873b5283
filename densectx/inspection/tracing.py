"""One pass of a network on the meta device in which every operation passes on what its positions see."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from densectx.backbones.base import MarginBackbone
from densectx.errors import ConfigError
from densectx.inspection.memory import ByIdentity, Memory
from densectx.inspection.naming import named, pool_of
from densectx.inspection.operations.call import Call, Refused
from densectx.inspection.operations.table import rule_of
from densectx.inspection.shell import Shell, shell_of
from densectx.inspection.spans import Spans

Axes: TypeAlias = tuple[Spans, Spans]
"""What elements see along H and along W."""

_FLOATS: Final = 1 << 12  # numbers that are not whole are followed as long as there are few: sizes, scales, coordinates
_WHOLE: Final = 1 << 22


@final
@dataclass(frozen=True)
class Step:
    """A convolution, pool, resampling or global operation that ran.

    Attributes:
        layer: name of the module that it ran in; of the outermost the name of its class.
        operation: what it was, e.g. ``"conv 3x3, dilation 2"``.
        channels: of its output.
        axes: what its output sees.
    """

    layer: str
    operation: str
    channels: int
    axes: Axes


@final
@dataclass(frozen=True)
class Trace:
    """What one pass showed.

    Attributes:
        steps: in the order in which they ran.
        output: what the module answered with.
        axes: of a tensor among ``output``; None for one that does not depend on the input.
    """

    steps: list[Step]
    output: Any
    axes: Callable[[Tensor], Axes | None]


def trace(module: nn.Module, shape: Sequence[int], run: Callable[[nn.Module, Tensor], Any] | None = None) -> Trace:
    """Follow an input of a shape through a module; nothing is computed and no weight is copied.

    Args:
        module: any network, in evaluation mode from here on; on any device, unchanged.
        shape: (B, C, H, W) of the input.
        run: ``run(module, x)`` calls it; ``module(x)`` if left out.

    Raises:
        ConfigError: an operation that nobody has taught this module, named with its layer, or a network that cannot
            run on the meta device.
        TooLarge: an attention over more positions than fit; try a smaller input.
    """
    return follow(shell_of(module), shape, run)


def follow(shell: Shell, shape: Sequence[int], run: Callable[[nn.Module, Tensor], Any] | None = None) -> Trace:
    """As :func:`trace`, of a network that was copied before."""
    module, known = shell
    tracer = _Tracer(known)
    with ExitStack() as stack:
        stack.enter_context(tracer.naming(module))
        stack.enter_context(torch.no_grad())
        x = torch.empty(tuple(shape), device="meta")
        tracer.see(x, (Spans.of_input(shape, x.ndim - 2), Spans.of_input(shape, x.ndim - 1)))
        with tracer:
            try:
                output = module(x) if run is None else run(module, x)
            except (NotImplementedError, RuntimeError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ConfigError(
                    f"the receptive field cannot be derived: layer {tracer.layer!r} does not run on torch's meta"
                    f" device ({reason})."
                ) from error
    return Trace(tracer.steps, output, tracer.axes_of)


@final
class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__ is not typed
    """Follows operations; those on numbers that do not depend on the input are computed for real beside it."""

    def __init__(self, known: Mapping[Tensor, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._axes, self._written, self.values, self.pools = ByIdentity(), ByIdentity(), ByIdentity(), ByIdentity()
        for tensor, value in known.items():
            self.values[tensor] = value
        self.steps: list[Step] = []
        self._stack: list[str] = []
        self._sharing: dict[int, list[weakref.ref[Tensor]]] = {}

    @property
    def layer(self) -> str:
        """Name of the innermost module that runs."""
        return self._stack[-1] if self._stack else ""

    @contextmanager
    def naming(self, module: nn.Module) -> Iterator[None]:
        """Know which module runs."""

        def enter(name: str) -> Callable[[nn.Module, Any], None]:
            return lambda module, inputs: self._stack.append(name)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self._stack.pop()

        handles = []
        for name, part in module.named_modules():
            name = name or type(part).__name__
            handles += [part.register_forward_pre_hook(enter(name)), part.register_forward_hook(leave)]
            if isinstance(part, MarginBackbone):  # a model calls this instead of the module
                part.valid = self._named(name, type(part).valid.__get__(part))  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _named(self, name: str, method: Callable[[Tensor], list[Tensor]]) -> Callable[[Tensor], list[Tensor]]:
        def run(x: Tensor) -> list[Tensor]:
            self._stack.append(name)
            found = method(x)
            self._stack.pop()
            return found

        return run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and self.values.get(args[0]) is not None:
            return self.values.get(args[0]).item()  # a number that does not depend on the input
        result = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if all(self.axes_of(tensor) is None for tensor in given):
            self._compute(func, args, kwargs, given, outputs)
            return result
        name = func._overloadpacket.__name__
        base = name.rstrip("_")
        rule = rule_of(base, func.tags)
        if rule is None:
            raise ConfigError(f"the receptive field cannot be derived through {name!r} of layer {self.layer!r}.")
        bound = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
        bound = {a.name: bound.get(a.name, a.default_value) for a in func._schema.arguments}
        try:
            per_axis = [rule(self._call(base, bound, outputs, axis)) for axis in (0, 1)]
        except Refused as error:
            raise ConfigError(
                f"the receptive field cannot be derived through {name!r} of layer {self.layer!r}: {error}."
            ) from error
        lists = [found if isinstance(found, list) else [found] * len(outputs) for found in per_axis]
        for output, h, w in zip(outputs, *lists, strict=True):
            self.see(output, (h, w))
        if base.startswith("max_pool2d"):
            self.pools[outputs[-1]] = pool_of(bound)
        self._record(base, bound, given, outputs)
        return result

    def _call(self, name: str, bound: Mapping[str, Any], outputs: Sequence[Tensor], axis: int) -> Call:
        def spans(tensor: Tensor) -> Spans | None:
            found = self.axes_of(tensor)
            return None if found is None else found[axis]

        def values(tensor: Tensor) -> Tensor | None:
            return tensor if tensor.device.type != "meta" else self.values.get(tensor)

        return Call(name, bound, outputs, self.layer, spans, values, self.pools.get)

    def _compute(self, func: Any, args: Any, kwargs: Any, given: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """The numbers of index tensors and the like, which the meta device does not know."""
        for output in outputs:
            self._register(output)
        small = all(t.numel() <= (_FLOATS if t.is_floating_point() else _WHOLE) for t in outputs)
        random = torch.Tag.nondeterministic_seeded in func.tags or "empty" in func._overloadpacket.__name__
        if (
            not outputs
            or not small
            or random
            or any(t.device.type == "meta" and self.values.get(t) is None for t in given)
        ):
            return
        leaves, spec = tree_flatten((args, kwargs))
        real = [self._real(leaf) for leaf in leaves]
        args, kwargs = tree_unflatten(real, spec)
        for output, value in zip(outputs, tree_leaves(func(*args, **kwargs)), strict=True):
            if output.device.type == "meta":
                self.values[output] = value

    def _real(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return self.values.get(leaf, leaf)
        return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf

    def _register(self, tensor: Tensor) -> bool:
        """Remember who shares which memory; whether the tensor was there before, so that it was written in place."""
        sharing = self._sharing.setdefault(tensor.untyped_storage()._cdata, [])
        alive = [other for reference in sharing if (other := reference()) is not None]
        if any(other is tensor for other in alive):
            return True
        sharing[:] = [weakref.ref(other) for other in (*alive, tensor)]
        return False

    def axes_of(self, tensor: Tensor) -> Axes | None:
        """What a tensor sees; None for one that does not depend on the input."""
        found: Axes | None = self._axes.get(tensor)
        writes = self._written.pop(id(tensor), (tensor, ()))[1]
        for other, axes in writes:
            found = found or (Spans.nothing(tensor.ndim), Spans.nothing(tensor.ndim))
            h, w = (
                Memory(tensor).write(tensor, a).write(other, b).read(tensor) for a, b in zip(found, axes, strict=True)
            )
            found = self._axes[tensor] = h, w
        return found

    def see(self, tensor: Tensor, axes: Axes) -> None:
        """Say what a tensor sees: a new one, or one that was written in place."""
        for spans in axes:
            if np.broadcast_shapes(spans.shape, tuple(tensor.shape)) != tuple(tensor.shape):
                raise AssertionError(f"spans of shape {spans.shape} for a tensor of {tuple(tensor.shape)}")
        before = self.axes_of(tensor)
        written = self._register(tensor)
        self._axes[tensor] = axes
        if not written or (before is not None and all(_same(*pair) for pair in zip(before, axes, strict=True))):
            return
        for reference in self._sharing[tensor.untyped_storage()._cdata]:  # looked at when they are used
            other = reference()
            if other is not None and other is not tensor:
                self._written[other] = (*self._written.get(other, ()), (tensor, axes))

    def _record(self, name: str, bound: Mapping[str, Any], given: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        axes = self.axes_of(outputs[0])
        if axes is None:
            return
        causes = {cause for spans in axes for cause in spans.causes}
        before = {c for t in given for spans in self.axes_of(t) or () for c in spans.causes}
        operation = named(name, bound) or (f"global: {name.strip('_').replace('_', ' ')}" if causes - before else "")
        if operation:
            shape = outputs[0].shape
            self.steps.append(Step(self.layer, operation, int(shape[1]) if len(shape) > 1 else 1, axes))


def _same(one: Spans, other: Spans) -> bool:
    return one is other or (
        all(np.array_equal(*pair) for pair in ((one.lo, other.lo), (one.hi, other.hi), (one.clean, other.clean)))
        and one.causes == other.causes
    )
