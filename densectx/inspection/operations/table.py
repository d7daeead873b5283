"""ATen's operations by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from densectx.inspection.operations import movement, sums, windows
from densectx.inspection.operations.call import Call, Result


def _table(*pairs: tuple[Callable[[Call], Result], str]) -> dict[str, Callable[[Call], Result]]:
    return {name: rule for rule, names in pairs for name in names.split()}


RULES: Final = _table(
    (sums.pointwise, "clone detach alias _to_copy lift_fresh contiguous native_dropout dropout isnan"),
    (sums.pointwise, "where masked_fill feature_dropout bernoulli prelu _prelu_kernel rrelu_with_noise"),
    (
        sums.pointwise,
        "hardswish hardsigmoid hardtanh relu6 mish silu elu celu selu leaky_relu log_sigmoid_forward softplus",
    ),
    (sums.pointwise, "softshrink hardshrink threshold gelu clamp nan_to_num"),
    (sums.copy, "copy"),
    (sums.constant, "zero fill empty_like zeros_like ones_like full_like rand_like randn_like"),
    (sums.constant, "new_zeros new_ones new_full new_empty new_empty_strided"),
    (windows.convolution, "convolution"),
    (windows.pool, "max_pool2d_with_indices max_pool2d avg_pool2d"),
    (windows.unpool, "max_unpool2d"),
    (windows.adaptive, "_adaptive_avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d"),
    (windows.resample, "upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d"),
    (windows.resample, "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"),
    (windows.padded, "constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d"),
    (
        sums.reduction,
        "mean sum nansum amax amin max min prod any all var std var_mean std_mean logsumexp argmax argmin",
    ),
    (sums.reduction, "linalg_vector_norm norm median nanmedian count_nonzero aminmax sort topk"),
    (sums.along, "_softmax _log_softmax _safe_softmax softmax log_softmax cumsum cumprod logcumsumexp"),
    (sums.layer_norm, "native_layer_norm _fused_rms_norm"),
    (sums.group_norm, "native_group_norm"),
    (
        sums.batch_norm,
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm",
    ),
    (sums.batch_norm, "_batch_norm_with_update _batch_norm_no_update"),
    (sums.matrices, "mm bmm addmm baddbmm"),
    (sums.attention, "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention"),
    (sums.attention, "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"),
    (movement.view, "view _unsafe_view _reshape_alias reshape"),
    (movement.expand, "expand"),
    (movement.repeat, "repeat"),
    (movement.permute, "permute transpose t"),
    (movement.part, "slice"),
    (movement.select, "select"),
    (movement.split, "split split_with_sizes unbind"),
    (movement.index, "index_select index"),
    (movement.flip, "flip"),
    (movement.roll, "roll"),
    (movement.cat, "cat stack"),
    (movement.shuffle, "pixel_shuffle pixel_unshuffle channel_shuffle"),
    (windows.patches, "im2col"),
    (windows.unfold, "unfold"),
    (movement.unsqueeze, "unsqueeze"),
    (movement.squeeze, "squeeze"),
    (sums.glu, "glu"),
)
"""ATen's operations that are no pointwise ones; those say so themselves (``torch.Tag.pointwise``)."""


def rule_of(name: str, tags: Sequence[Any]) -> Callable[[Call], Result] | None:
    """How an operation passes spans on; None for one that nobody has thought about."""
    return RULES.get(name) or (sums.pointwise if torch.Tag.pointwise in tags else None)
