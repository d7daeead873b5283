"""A network that is as connected as another one, with one positive channel a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from densectx.errors import ConfigError

_CHANNELWISE: Final = frozenset({"avg_pool2d", "interpolate"})
_NOTHING: Final = """
pow relu relu_ relu6 leaky_relu leaky_relu_ gelu silu silu_ sigmoid sigmoid_ tanh hardswish hardswish_ hardsigmoid
hardsigmoid_ hardtanh hardtanh_ elu elu_ selu mish softplus softmax log_softmax log clamp clamp_ clamp_min clamp_max
clip dropout dropout1d dropout2d feature_dropout batch_norm layer_norm group_norm instance_norm rms_norm
"""
_IDENTITY: Final = frozenset(_NOTHING.split())


def thin_copy(module: nn.Module) -> nn.Module:
    """The same network, parameters of ones that take no memory."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        ones = torch.ones((), dtype=torch.float64).expand(parameter.shape)
        memo[id(parameter)] = nn.Parameter(ones, requires_grad=False)
    for buffer in module.buffers():
        if buffer.device.type == "meta":
            memo[id(buffer)] = torch.ones(buffer.shape, dtype=buffer.dtype)
        else:
            memo[id(buffer)] = buffer.detach().cpu().clone()
        if buffer.is_floating_point():
            memo[id(buffer)] = memo[id(buffer)].double()
    return copy.deepcopy(module, memo).eval()


class Shared(Exception):
    """Something is added in place to a map whose channels share their memory."""


@final
class Thin(TorchFunctionMode):
    """Exchanges operations while a network runs.

    Args:
        shared: let the channels of a convolution's output, which are equal, be one in memory.
    """

    def __init__(self, *, shared: bool = True) -> None:
        super().__init__()
        self.shared = shared

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _IDENTITY:
            return args[0] if args else kwargs["input"]
        if name in _EXCHANGED:
            y = _EXCHANGED[name](*args, **kwargs)
            return y if self.shared else y.contiguous()
        if args and isinstance(args[0], Tensor) and _equal(args[0]):
            if name in _CHANNELWISE:
                return func(args[0][:, :1], *args[1:], **kwargs).expand(-1, args[0].shape[1], -1, -1)
            if name.startswith("__i"):  # x += y gives x its new value
                return getattr(torch.Tensor, name.replace("__i", "__", 1))(*args, **kwargs)
            if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
                raise Shared
        return func(*args, **kwargs)


def _equal(x: Tensor) -> bool:
    """Whether the channels of a map are one in memory."""
    return x.ndim == 4 and x.shape[1] > 1 and x.stride(1) == 0


def _means(x: Tensor, groups: int) -> Tensor:
    """Mean over the channels of each group: (B, C, H, W) -> (B, groups, H, W)."""
    if _equal(x):
        return x[:, :1].expand(-1, groups, -1, -1)
    batch, channels, height, width = x.shape
    return x.reshape(batch, groups, channels // groups, height, width).mean(2)


def _spread(y: Tensor, out: int) -> Tensor:
    """(B, groups, H, W) -> (B, out, H, W), each channel of its group."""
    groups = y.shape[1]
    return y.expand(-1, out, -1, -1) if groups == 1 else y.repeat_interleave(out // groups, 1)


def _conv2d(
    input: Tensor,  # noqa: A002 - torch's names, callers use them
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    taps = weight.shape[2:]
    ones = torch.full((groups, 1, *taps), 1 / taps.numel(), dtype=input.dtype)
    y = F.conv2d(_means(input, groups), ones, None, stride, padding, dilation, groups)
    return _spread(y, weight.shape[0])


def _conv_transpose2d(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    ones = torch.ones((groups, 1, *weight.shape[2:]), dtype=input.dtype)
    y = F.conv_transpose2d(_means(input, groups), ones, None, stride, padding, output_padding, groups, dilation)
    return _spread(y, weight.shape[1] * groups)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    mean = input[..., :1] if input.stride(-1) == 0 else input.mean(-1, keepdim=True)
    return mean.expand(*input.shape[:-1], weight.shape[0])


def _max_pool2d(
    input: Tensor,  # noqa: A002
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    if _equal(input):
        thin = _max_pool2d(input[:, :1], kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return thin.expand(-1, input.shape[1], -1, -1)
    if return_indices:
        raise ConfigError("the field of a network that uses a max-pool's indices cannot be measured with mean pools.")
    if dilation not in (1, (1, 1)):
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        ones = torch.ones((input.shape[1], 1, *kernel), dtype=input.dtype)
        return F.conv2d(input, ones, None, stride or kernel_size, padding, dilation, input.shape[1])
    return F.avg_pool2d(input, kernel_size, stride or kernel_size, padding, ceil_mode)


def _pad(input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:  # noqa: A002
    return F.pad(input, pad, mode)  # a border of -inf, for a max-pool, is one of zeros for a mean


_EXCHANGED: Final[Mapping[str, Callable[..., Tensor]]] = {
    "conv2d": _conv2d,
    "conv_transpose2d": _conv_transpose2d,
    "linear": _linear,
    "max_pool2d": _max_pool2d,
    "_max_pool2d": _max_pool2d,
    "pad": _pad,
}
