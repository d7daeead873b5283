"""Dilated residual networks (Yu, Koltun & Funkhouser 2017) as backbones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final, final

from timm.models import adapt_input_conv
from torch import Tensor

from densectx.backbones.base import Backbone, Standardize, add_maps, check_channels, read_weights, stem_statistics
from densectx.backbones.drn_network import ARCHS, Arch, Network
from densectx.errors import CheckpointError, ConfigError, unknown

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)


@final
class DRN(Backbone):
    """A dilated residual network: (B, in_channels, H, W), multiples of 8 -> five levels, the last ones at stride 8.

    Family A is a ResNet whose late layers dilate; C has convolutions in place of max-pooling and, against gridding,
    blocks without shortcut at the end; D is C with plain convolutions at both ends. Levels are at strides 1, 2, 4, 8, 8
    (A: 2, 4, 8, 8, 8). Modules below ``net`` carry the published names.

    Args:
        arch: which one: a_50, c_26, c_42, c_58, d_22, d_38, d_54 or d_105.
        weights: local file with published weights (a classifier's or a segmentation network's), or null.
        mean: of R, G and B in 0..1, subtracted; the default is ImageNet's, which the published classifiers expect.
        std: of R, G and B, divided by.
        in_channels: other than 3, the first convolution's weights are adapted by timm's rule, see
            :func:`densectx.backbones.base.stem_statistics`.
        maps: how many of the last input channels are maps (a noise level) and no image: not standardised, their weights
            start at zero.

    Raises:
        ConfigError: no such network, or another number of means than 3.
        CheckpointError: the weights are missing, unreadable, or of another network.
    """

    def __init__(
        self,
        arch: Arch = "d_22",
        weights: str | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        in_channels: int = 3,
        maps: int = 0,
    ) -> None:
        super().__init__()
        if arch not in ARCHS:
            raise ConfigError(unknown("arch of drn", arch, ARCHS))
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ConfigError(f"drn: mean {list(mean)} and std {list(std)}: expected three numbers each, std positive.")
        self.in_channels, image = in_channels, check_channels(f"drn_{arch}", in_channels, maps)
        self.standardize = Standardize(
            stem_statistics(mean, image, (0.0,) * maps), stem_statistics(std, image, (1.0,) * maps)
        )
        self.net = Network(arch, image)
        self.features = self.net.levels
        if weights is not None:
            self._load(weights, arch, image)
        add_maps(f"drn_{arch}", self.net.stem(), image, maps)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, H, W) -> five maps, see ``features``."""
        levels: list[Tensor] = self.net(self.standardize(x))
        return levels

    def _load(self, path: str, arch: str, channels: int) -> None:
        given = read_weights(path)
        state = {own: given[key] for key, own in self.net.named_keys(given).items()}
        wanted = self.net.state_dict()
        # files of before torch 0.4.1 do not count batches
        state = {k: v for k, v in wanted.items() if k.endswith(".num_batches_tracked")} | state
        stem = next(iter(wanted))
        if stem in state and state[stem].shape[1:2] == (3,):
            state[stem] = adapt_input_conv(channels, state[stem])
        wrong = [k for k, v in wanted.items() if k not in state or state[k].shape != v.shape]
        wrong += [k for k in state if k not in wanted]
        if wrong:
            raise CheckpointError(
                f"weights {path!r} do not fit drn_{arch}: {len(wrong)} tensors are missing, unknown or of another"
                f" shape ({', '.join(wrong[:4])}); expected the published weights of this network."
            )
        self.net.load_state_dict(state)


drn_a_50 = partial(DRN, arch="a_50")
drn_c_26 = partial(DRN, arch="c_26")
drn_c_42 = partial(DRN, arch="c_42")
drn_c_58 = partial(DRN, arch="c_58")
drn_d_22 = partial(DRN, arch="d_22")
drn_d_38 = partial(DRN, arch="d_38")
drn_d_54 = partial(DRN, arch="d_54")
drn_d_105 = partial(DRN, arch="d_105")
