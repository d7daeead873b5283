"""What a process has in common, and whether somebody changed it."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from densectx.testing.values import same


def settings() -> dict[str, Any]:
    """{what it is called: its value}; settings that a part must leave as they are."""
    return {
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_default_device()": torch.get_default_device(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled(),
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
        "torch.is_deterministic_algorithms_warn_only_enabled()": (
            torch.is_deterministic_algorithms_warn_only_enabled()
        ),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
        "torch.is_autocast_enabled('cpu')": torch.is_autocast_enabled("cpu"),
        "torch.is_anomaly_enabled()": torch.is_anomaly_enabled(),
        "torch.backends.cudnn.benchmark": torch.backends.cudnn.benchmark,
        "torch.backends.cudnn.deterministic": torch.backends.cudnn.deterministic,
        "warnings.filters": list(warnings.filters),
        "os.environ": {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"},
        "os.getcwd()": os.getcwd(),
    }


def random_states() -> dict[str, Any]:
    """{name of the generator of the process: its state}."""
    return {
        "torch's global generator": torch.get_rng_state(),
        "numpy's global generator": np.random.get_state(legacy=False),  # noqa: NPY002 - to see whether it is used
        "Python's global generator": random.getstate(),
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names whose values differ."""
    return [name for name, value in before.items() if not same(value, after[name])]


def reseed(seed: int) -> None:
    """Set all three global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - that generator is meant
    random.seed(seed)


@contextmanager
def preserved() -> Iterator[None]:
    """Puts back what :func:`settings` and :func:`random_states` tell, whatever happens inside."""
    before, states = settings(), random_states()
    filters = warnings.filters[:]
    try:
        yield
    finally:
        torch.set_default_dtype(before["torch.get_default_dtype()"])
        torch.set_grad_enabled(before["torch.is_grad_enabled()"])
        torch.use_deterministic_algorithms(
            before["torch.are_deterministic_algorithms_enabled()"],
            warn_only=before["torch.is_deterministic_algorithms_warn_only_enabled()"],
        )
        torch.set_num_threads(before["torch.get_num_threads()"])
        torch.set_float32_matmul_precision(before["torch.get_float32_matmul_precision()"])
        torch.set_anomaly_enabled(before["torch.is_anomaly_enabled()"])
        torch.backends.cudnn.benchmark = before["torch.backends.cudnn.benchmark"]
        torch.backends.cudnn.deterministic = before["torch.backends.cudnn.deterministic"]
        warnings.filters[:] = filters  # type: ignore[index]  # a list, typed as a sequence
        if os.getcwd() != before["os.getcwd()"]:
            os.chdir(before["os.getcwd()"])
        for key in set(os.environ) - set(before["os.environ"]) - {"PYTEST_CURRENT_TEST"}:
            del os.environ[key]
        os.environ.update(before["os.environ"])
        torch.set_rng_state(states["torch's global generator"])
        np.random.set_state(states["numpy's global generator"])  # noqa: NPY002
        random.setstate(states["Python's global generator"])
