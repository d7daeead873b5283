"""Which precision a machine is made for: bf16 is several times faster with instructions for it, slower without."""

from __future__ import annotations

from pathlib import Path

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


def cpu_flags(file: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Instruction sets of the processor as Linux names them, empty on other systems."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()[2:]}
