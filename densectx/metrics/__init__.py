"""Metrics in the papers' conventions, with sum states only: exact over any number of batches and ranks."""

from densectx.metrics.confusion import ConfusionMetrics
from densectx.metrics.images import ImageMetrics, psnr, quantize
from densectx.metrics.labels import LabelMetrics

__all__ = ["ConfusionMetrics", "ImageMetrics", "LabelMetrics", "psnr", "quantize"]
