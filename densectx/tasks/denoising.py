"""Removal of additive noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor

from densectx.errors import ConfigError
from densectx.losses import Criterion
from densectx.metrics import quantize
from densectx.nn.noise import noise_level, signal_noise
from densectx.registry import HEADS
from densectx.tasks import restoring
from densectx.tasks.base import Options, Target
from densectx.types import Feature, Sample, Score, SourceInfo, Spec


@final
class Denoising(restoring.Restoring):
    """Noisy image (B, C, H, W) -> clean image (B, C, H, W), sRGB 0..1, unclamped.

    Noise is N(0, (sigma / 255)^2), or with ``noise: poisson_gaussian`` N(0, gain * x + (sigma / 255)^2) at clean
    value x (Foi et al. 2008, eq. 2 and 4, in its normal approximation); drawn on the device in float32, neither
    clipped nor rounded.

    With ranges the network sees all levels: ``blind`` does not tell it which, else it is told by a map of the noise's
    standard deviation, an extra input channel (FFDNet, Zhang et al. 2018); the trunk takes it where
    ``model.backbone.in_channels`` leaves room, the head always. The map is sigma / 255 everywhere, or
    sqrt(gain * y + (sigma / 255)^2) with y the noisy image itself, clamped to [0, 1], mean over channels.

    PSNR and SSIM as published: answer clamped and rounded to 8 bit, whole image, mean over images.

    Args:
        features: given by the model.
        in_channels: given by the model.
        info: given by the model.
        source: key of the data source.
        weight: of its loss.
        sigma: noise level on the 0..255 scale, or [low, high] to train on the whole range.
        test_sigma: level that is evaluated, null for ``sigma`` (the middle of a range).
        noise: ``gaussian`` or ``poisson_gaussian``.
        gain: of the Poisson part, variance / signal at signals 0..1, or [low, high].
        test_gain: gain that is evaluated, null for ``gain`` (the middle of a range).
        blind: whether the network has to do without the level of a range.
        cutblur: probability of CutBlur in training (:func:`densectx.tasks.restoring.cutblur`).
        head: spec of the head.
        loss: spec of the loss, or a list of them.
    """

    score = Score("psnr", "noisy")
    on_colour = "per_channel"
    output = "restored"

    def __init__(
        self,
        features: Sequence[Feature],
        in_channels: int,
        info: SourceInfo,
        source: str,
        weight: float = 1.0,
        sigma: float | Sequence[float] = 25.0,
        test_sigma: float | None = None,
        noise: Literal["gaussian", "poisson_gaussian"] = "gaussian",
        gain: float | Sequence[float] = 0.0,
        test_gain: float | None = None,
        blind: bool = False,
        cutblur: float = 0.0,
        head: Spec = "decoder",
        loss: Spec | Sequence[Spec] = "l1",
    ) -> None:
        levels = restoring.span("denoising: sigma", sigma, 0, 255)
        gains = restoring.span("denoising: gain", gain, 0, 1)
        poisson = noise == "poisson_gaussian"
        if poisson != (gains[1] > 0):
            raise ConfigError(f"denoising: gain {gain!r} with noise {noise!r}; poisson_gaussian has a gain above 0.")
        ranges = levels[0] < levels[1] or gains[0] < gains[1]
        if blind and not ranges:
            raise ConfigError(f"denoising: blind is for a range [low, high], and sigma is {sigma!r}, gain {gain!r}.")
        conditioned = ranges and not blind
        channels = info.channels + conditioned
        super().__init__(source, weight, channels=channels, in_channels=in_channels, maps=int(conditioned))
        self.sigma, self.gain, self.conditioned = levels, gains, conditioned
        if test_gain is not None and not poisson:
            raise ConfigError(f"denoising: test_gain {test_gain!r} with noise {noise!r}; poisson_gaussian has a gain.")
        self.test_sigma = _tested("test_sigma", test_sigma, levels, 255)
        self.test_gain = _tested("test_gain", test_gain, gains, 1)
        self.image_channels, self.cutblur = info.channels, restoring.chance("denoising: cutblur", cutblur)
        if conditioned and poisson:
            self.options = {"sigma": None, "gain": None}
            self.estimators = {"sigma": _sigma_beside_gain, "gain": _gain}
        elif conditioned:
            self.options = {"sigma": None}
            self.estimators = {"sigma": _sigma}
        level = f"sigma {self.test_sigma:g}" + (f", gain {self.test_gain:g}" if poisson else "")
        self.convention = (
            f"{level} not clipped, 8-bit {restoring.colours(info.channels)}, whole image, per image, peak 255"
        )
        name = head if isinstance(head, str) else str(head.get("name"))
        if conditioned and in_channels != channels and "in_channels" not in HEADS.options(name):
            raise ConfigError(
                f"denoising: neither the trunk nor head {name!r} would see the noise level of a range of sigmas; set"
                f" model.backbone.in_channels to {channels}, or take head 'decoder', or set blind."
            )
        self.head = HEADS.build(
            head, "head", features=features, in_channels=channels, out_channels=info.channels, scale=1, residual=True
        )
        self.criterion = Criterion(loss, form="numbers")
        self.metrics = restoring.restored_metrics("noisy")

    def prepare(self, batch: Sample, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Target]:
        """Image plus noise (and level map); the clean image."""
        clean = batch["image"]
        sigmas, gains, noise = [], [], []
        for rng, image in zip(rngs, clean, strict=True):
            sigmas.append(self._drawn(self.sigma, self.test_sigma, rng))
            if self.gain[1] > 0:
                gains.append(self._drawn(self.gain, self.test_gain, rng))
            noise.append(torch.randn(image.shape, generator=rng, device=rng.device))
        sigma = torch.stack(sigmas).view(-1, 1, 1, 1)
        gain = torch.stack(gains).view(-1, 1, 1, 1) if gains else torch.zeros_like(sigma)
        stacked = torch.stack(noise)
        # one channel of noise for a gray image, so that the noisy image is gray too
        stacked = torch.where(batch["gray"].view(-1, 1, 1, 1), stacked[:, :1].expand_as(stacked), stacked)
        noisy = clean + stacked * deviation(clean, sigma, gain)
        levels = self._map(noisy, sigma, gain)
        if self.training:
            noisy = restoring.cutblur(noisy, clean, rngs, self.cutblur)
        x = torch.cat([noisy, levels], 1) if self.conditioned else noisy
        return x, {"image": restoring.masked(clean, batch)}

    def inputs(self, image: Tensor, options: Options) -> Tensor:
        """The given (noisy) image, with its level map if the network takes one.

        Raises:
            ConfigError: a level is out of range, or not a number since the image has values that are not finite.
        """
        if not self.conditioned:
            return image
        sigma = _level("sigma", options.get("sigma"), 255.0, image)
        gain = _level("gain", options.get("gain"), 1.0, image) if "gain" in self.options else torch.zeros_like(sigma)
        return torch.cat([image, self._map(image, sigma, gain)], 1)

    def update(self, prediction: Tensor, x: Tensor, target: Target) -> None:
        """Of the answer and of the noisy input (not clipped)."""
        # the noisy input is measured as it is: theory says 20 log10(255 / sigma)
        restoring.measure(self.metrics, quantize(prediction), x[:, : self.image_channels], target["image"])

    def draw(self, prediction: Tensor, x: Tensor, target: Target) -> list[Tensor]:
        """Noisy, denoised, clean."""
        return restoring.pictures(x[:, : self.image_channels], prediction, target["image"])

    def _drawn(self, ends: tuple[float, float], test: float, rng: torch.Generator) -> Tensor:
        draw = torch.rand((), generator=rng, device=rng.device)
        return ends[0] + (ends[1] - ends[0]) * draw if self.training else torch.full_like(draw, test)

    def _map(self, noisy: Tensor, sigma: Tensor, gain: Tensor) -> Tensor:
        """The noise's standard deviation as the network is told it: (B, C, H, W) -> (B, 1, H, W)."""
        return deviation(noisy.mean(1, keepdim=True).clamp(0, 1), sigma, gain).to(noisy.dtype)


def deviation(x: Tensor, sigma: Tensor, gain: Tensor) -> Tensor:
    """Standard deviation of the noise at signal x: sqrt(gain * x + (sigma / 255)^2), in the shape of x.

    Args:
        x: (B, C, H, W), 0..1.
        sigma: (B, 1, 1, 1), on the 0..255 scale.
        gain: (B, 1, 1, 1).
    """
    return (gain * x.clamp_min(0) + (sigma / 255).square()).sqrt()


def _sigma(image: Tensor) -> Tensor:
    """Estimate of sigma; no more than an image can have: a checkerboard looks like noise beyond that."""
    return (noise_level(image) * 255).clamp(max=255)


def _sigma_beside_gain(image: Tensor) -> Tensor:
    """The same with a gain."""
    return (signal_noise(image)[1] * 255).clamp(max=255)


def _gain(image: Tensor) -> Tensor:
    """Estimate of the gain, at most 1."""
    return signal_noise(image)[0].clamp(max=1)


def _level(name: str, value: float | Tensor | None, high: float, image: Tensor) -> Tensor:
    """An option of ``predict`` as (B, 1, 1, 1)."""
    if value is None:
        raise ConfigError(f"denoising needs the noise level of the image: {name} is not given.")
    number = value if isinstance(value, Tensor) else torch.full((), float(value), device=image.device)
    level = number.to(image.device, torch.float32).expand(image.shape[0]).view(-1, 1, 1, 1)
    # a graph that is being exported has no numbers to check, nor has a picture that is only a shape
    if not (torch.compiler.is_compiling() or level.is_meta) and not bool(((level >= 0) & (level <= high)).all()):
        if level.isnan().any() and not image.isfinite().all():
            raise ConfigError(f"denoising: {name} cannot be estimated: the image has values that are NaN or infinite.")
        raise ConfigError(
            f"denoising: {name} is {value}, expected 0 to {high:g}, or a negative number to have it estimated"
            " (--set denoising.sigma=25, options={'denoising.sigma': 25})."
        )
    return level


def _tested(name: str, value: float | None, trained: tuple[float, float], high: float) -> float:
    """What is evaluated: the middle of what is trained, unless a value is given."""
    ends = trained if value is None else restoring.span(f"denoising: {name}", value, 0, high)
    return sum(ends) / 2
