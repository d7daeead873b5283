"""What holds for every part that is a ``torch.nn.Module``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from densectx.testing.report import expect
from densectx.testing.states import changed, random_states
from densectx.testing.values import copied, difference, same, shape, tensors

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_OWN = ("_parameters", "_buffers", "_modules")


def stir(module: nn.Module) -> None:
    """Give parameters that start at zero some noise: what starts at zero hides the layers before it."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() and not parameter.any():
                nn.init.normal_(parameter, std=0.1)


def modes(module: nn.Module) -> dict[str, Any]:
    """Training mode of every part and whether every parameter is trained."""
    flags: dict[str, Any] = {name or "itself": part.training for name, part in module.named_modules()}
    return flags | {f"{name}.requires_grad": p.requires_grad for name, p in module.named_parameters()}


def check_registered(module: nn.Module) -> None:
    """No tensor that neither moves to a GPU nor is saved.

    Raises:
        CheckFailed: a plain attribute holds a tensor.
    """
    loose = [
        f"{name}.{key}".lstrip(".")
        for name, part in module.named_modules()
        if not isinstance(part, Metric)  # a metric's states are attributes
        for key, value in vars(part).items()
        if key not in _OWN and any(True for _ in tensors(value))
    ]
    expect(
        not loose,
        f"tensors in plain attributes: {', '.join(loose)}",
        "register each with register_buffer (persistent=False if the constructor makes it again) or as nn.Parameter",
    )


def check_gradients(module: nn.Module, what: str, advice: str) -> None:
    """Every parameter that is trained has a gradient that is finite and not zero.

    Raises:
        CheckFailed: some have none.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    silent = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    expect(not silent, f"no gradient reaches {_some(silent)} of {what}", advice)
    bad = [name for name, p in trained.items() if p.grad is not None and not p.grad.isfinite().all()]
    expect(
        not bad,
        f"the gradient of {_some(bad)} of {what} is not finite",
        "find the NaN or overflow; see autograd's anomaly mode",
    )


def check_untouched(before: Any, after: Any, method: str, what: str) -> None:
    """Tensors given to a method are as they were.

    Raises:
        CheckFailed: they are not.
    """
    expect(
        same(before, after), f"{method} changes {what} in place", "work on copies: other tasks read the same tensors"
    )


def check_alike_in_bf16(answer: Callable[[], Tensor], what: str) -> None:
    """Under bf16 autocast an answer is within a few percent of float32.

    Raises:
        CheckFailed: not finite, or farther away.
    """
    with torch.no_grad():
        full = answer().float()
        with torch.autocast("cpu", torch.bfloat16):
            half = answer().float()
    expect(bool(half.isfinite().all()), f"{what} is not finite under bf16 autocast", "take sums and ratios in float32")
    error, level = float((half - full).abs().mean()), float(full.abs().mean())
    expect(
        error <= 0.05 * level + 0.01,
        f"{what} is {error:.3g} away from float32 under bf16 autocast (mean absolute; its level is {level:.3g})",
        "bf16 has 3 digits: keep sums, colours and residuals in float32 (densectx.nn.precision.full)",
    )


def check_answer(
    y: Any, expected: tuple[int | None, ...], what: str, advice: str, dtype: torch.dtype | None = None
) -> None:
    """A finite tensor of a shape, None being any size.

    Raises:
        CheckFailed: it is none.
    """
    expect(isinstance(y, Tensor), f"{what} is a {type(y).__name__}, not a tensor", advice)
    fits = y.ndim == len(expected) and all(e in (None, s) for e, s in zip(expected, y.shape, strict=True))
    wanted = "x".join("any" if size is None else str(size) for size in expected)
    expect(fits, f"{what} is {shape(y)}, expected {wanted}", advice)
    expect(dtype in (None, y.dtype), f"{what} is {shape(y)}, expected {str(dtype).removeprefix('torch.')}", advice)
    expect(bool(y.isfinite().all()), f"{what} has values that are not finite", "look for 0 / 0, log of 0 and overflow")


def check_one_by_one(answer: Callable[[slice], Tensor], close: float) -> None:
    """The answer of a part in evaluation mode to some of its samples, of which it has two, depends on no other.

    Raises:
        CheckFailed: it does, or uses a generator of the process.
    """
    with torch.no_grad():
        together = answer(slice(None))
        states = random_states()
        alone = answer(slice(1, None))
    used = changed(states, random_states())
    expect(not used, f"in evaluation mode it uses {', '.join(used)}", "drop and draw only if self.training")
    error = difference(alone[0], together[1])
    expect(error < close, f"alone a sample differs by {error:.3g}", "take no statistics over the batch in eval()")


def check_round_trip(module: ModuleT, other: ModuleT, answer: Callable[[ModuleT], Any]) -> None:
    """The state of a part, loaded into one built anew, gives the same answer to the bit.

    Raises:
        CheckFailed: it does not.
    """
    load_into(other, module)
    with torch.no_grad():
        equal = same(answer(module.eval()), answer(other.eval()))
    expect(
        equal,
        "one built anew with the saved state answers differently",
        "keep what is learned in parameters and buffers",
    )


def load_into(other: nn.Module, module: nn.Module) -> None:
    """Bring the state of one module into another one that was built alike.

    Raises:
        CheckFailed: the keys or shapes differ.
    """
    state: Mapping[str, Tensor] = copied(dict(module.state_dict()))
    try:
        other.load_state_dict(state)
    except RuntimeError as error:
        expect(
            False,
            f"its state does not fit one built alike ({' '.join(str(error).split())})",
            "make every parameter and buffer in the constructor, from the options alone",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
