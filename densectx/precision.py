"""Which precision a machine is made for: bf16 is several times faster with instructions for it, slower without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}  # x86: Intel, AMD; the others: ARM


def native_precision(accelerator: str = "auto") -> str:
    """What ``trainer.precision: auto`` stands for: ``"bf16-mixed"`` where the device has instructions for it.

    Args:
        accelerator: ``"cpu"``, ``"gpu"`` or ``"cuda"``; ``"auto"`` is a GPU where there is one. Others get
            ``"32-true"``.

    Returns:
        ``"bf16-mixed"`` or ``"32-true"``; of a CPU that does not tell its instructions the latter.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if accelerator in ("auto", "cpu") and cpu_flags() & _FLAGS else "32-true"


def full_name(precision: object) -> str:
    """``trainer.precision`` as Lightning's list has it: ``16`` stands for ``16-mixed``, ``64`` for ``64-true``."""
    short = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
    return short.get(str(precision), str(precision))


def emulated(config: Mapping[str, Any], accelerator: str) -> str:
    """A warning where an optimizer computes in bfloat16, for which the device has no instructions; empty if not.

    Args:
        config: of a run.
        accelerator: type of the device, see :func:`native_precision`; nothing is said of others than CPU and CUDA.
    """
    optimizer = (config.get("model") or {}).get("optimizer")
    name = optimizer.get("class_path") if isinstance(optimizer, Mapping) else optimizer
    known = accelerator == "cuda" or (accelerator == "cpu" and bool(cpu_flags()))
    muon = str(name).startswith(("timm.optim.", "torch.optim.")) and str(name).endswith(".Muon")
    if not (known and muon) or native_precision(accelerator) == "bf16-mixed":
        return ""
    return (
        f"model.optimizer: {name} computes in bfloat16, which is emulated here: an update can take longer than forward"
        " and backward. densectx.optimizers.AdaMuon computes in float32."
    )


def cpu_flags(file: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Instruction sets of the processor as Linux names them, empty on other systems."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()[2:]}
