"""Dilated VGG-16 (Yu & Koltun 2016, section 4); timm and others refuse to dilate VGG."""

from __future__ import annotations

from typing import Literal, final

from timm.models import adapt_input_conv
from torch import Tensor, nn

from densectx.backbones.base import Backbone, Standardize, add_maps, check_channels, read_weights, stem_statistics
from densectx.errors import CheckpointError, ConfigError
from densectx.types import Feature

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_DILATIONS = (1, 1, 1, 1, 2)


@final
class DilatedVGG16(Backbone):
    """The 13 convolutions of VGG-16 at stride 8: (B, in_channels, H, W) -> levels at strides 1, 2, 4, 8, 8.

    pool4 and pool5 do not stride; the convolutions behind pool4 are dilated by 2. Padding is "same" with zeros.
    Modules carry torchvision's names (``features.N``), so torchvision's and timm's VGG-16 weights fit.

    Args:
        pools: ``removed`` drops pool4 (the paper: weights fit, the function changes), ``dilated`` keeps it as a
            stride-1 max-pool, which keeps the function of the strided network exactly (on its grid).
            pool5 has no convolution behind it here and is left out.
        weights: local file with VGG-16 weights (torchvision's or timm's keys), or null for random ones.
        in_channels: other than 3, the first convolution's weights are adapted by timm's rule, see
            :func:`densectx.backbones.base.stem_statistics`.
        maps: how many of the last input channels are maps (a noise level) and no image: not standardised, their weights
            start at zero.
    """

    def __init__(
        self,
        pools: Literal["removed", "dilated"] = "removed",
        weights: str | None = None,
        in_channels: int = 3,
        maps: int = 0,
    ) -> None:
        super().__init__()
        if pools not in ("removed", "dilated"):
            raise ConfigError(f"dilated_vgg16: pools {pools!r} is not 'removed' or 'dilated'.")
        self.in_channels, image = in_channels, check_channels("dilated_vgg16", in_channels, maps)
        self.features = (Feature(64, 1), Feature(128, 2), Feature(256, 4), Feature(512, 8), Feature(512, 8))
        self.standardize = Standardize(
            stem_statistics((0.485, 0.456, 0.406), image, (0.0,) * maps),
            stem_statistics((0.229, 0.224, 0.225), image, (1.0,) * maps),
        )
        c_in = image
        layers: list[nn.Module] = []
        self._taps: list[int] = []  # index of the last layer of each stage
        for stage, (channels, dilation) in enumerate(zip(_STAGES, _DILATIONS, strict=True)):
            for width in channels:
                conv = nn.Conv2d(c_in, width, 3, padding=dilation, dilation=dilation)
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # Conv2d's bias is typed Optional; it is there
                layers += [conv, nn.ReLU(inplace=True)]
                c_in = width
            self._taps.append(len(layers) - 1)
            if stage < 3:
                layers.append(nn.MaxPool2d(2, 2, ceil_mode=True))
            elif stage == 3:  # a 2x2 window; one column and row of -inf keep the size
                dilated = nn.Sequential(nn.ConstantPad2d((0, 1, 0, 1), float("-inf")), nn.MaxPool2d(2, 1))
                layers.append(dilated if pools == "dilated" else nn.Identity())
        self.layers = nn.ModuleDict({"features": nn.ModuleList(layers)})
        if weights is not None:
            self._load(weights, image)
        stem = layers[0]
        assert isinstance(stem, nn.Conv2d)
        add_maps("dilated_vgg16", stem, image, maps)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, H, W), multiples of 8 -> five maps, see ``features``."""
        pyramid = []
        x = self.standardize(x)
        stages = self.layers["features"]
        assert isinstance(stages, nn.ModuleList)
        for index, layer in enumerate(stages):
            x = layer(x)
            if index in self._taps:
                # the next layers work in place only on their own output, so a tapped map stays as it is
                pyramid.append(x)
        return pyramid

    def _load(self, path: str, channels: int) -> None:
        state = {k: v for k, v in read_weights(path).items() if k.startswith("features.")}
        wanted = self.layers.state_dict()
        stem = state.get("features.0.weight")
        if stem is not None and stem.shape[1:] == (3, 3, 3):
            state["features.0.weight"] = adapt_input_conv(channels, stem)
        wrong = [k for k, v in wanted.items() if k not in state or state[k].shape != v.shape]
        if wrong:
            raise CheckpointError(
                f"weights {path!r} do not fit dilated_vgg16: {len(wrong)} of {len(wanted)} tensors are missing or of"
                f" another shape ({', '.join(wrong[:4])}); expected torchvision's or timm's vgg16."
            )
        self.layers.load_state_dict({k: state[k] for k in wanted})
