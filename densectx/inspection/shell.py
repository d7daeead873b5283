"""A network without its numbers: the same modules on the meta device."""

from __future__ import annotations

import copy
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

_LARGEST: Final = 1 << 22  # numbers of a buffer that is remembered


class Shell(NamedTuple):
    """A network in evaluation mode with float32 tensors on the meta device.

    Attributes:
        module: the copy.
        known: the numbers of its buffers.
    """

    module: nn.Module
    known: dict[Tensor, Tensor]


def shell_of(module: nn.Module) -> Shell:
    """The shell of a network on any device, which is left as it is; no weight is copied."""
    memo: dict[int, Any] = {}
    known: dict[Tensor, Tensor] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(_single(torch.empty_like(parameter, device="meta")), requires_grad=False)
    for buffer in module.buffers():
        meta = memo[id(buffer)] = _single(torch.empty_like(buffer, device="meta"))
        if buffer.device.type != "meta" and buffer.numel() <= _LARGEST:
            known[meta] = _single(buffer.detach().cpu())
    shell = copy.deepcopy(module, memo)
    for part in shell.modules():  # the hooks of whoever owns the original are not asked
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return Shell(shell.eval(), known)


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
