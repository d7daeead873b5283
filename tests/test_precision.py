"""``trainer.precision: auto``."""

from __future__ import annotations

import pytest
import torch

from densectx.precision import cpu_flags, emulated, native_precision

INTEL = "processor : 0\nmodel name : bf16 in name only\nflags\t\t: fpu avx2 avx512f {}\n\nprocessor : 1\n"
ARM = "processor : 0\nFeatures\t: fp asimd {}\n"


@pytest.mark.parametrize(
    ("text", "extra", "native"),
    [
        (INTEL, "avx512_bf16", True),
        (INTEL, "amx_bf16", True),
        (INTEL, "", False),
        (ARM, "bf16", True),
        (ARM, "", False),
    ],
)
def test_flags_of_processors(tmp_path, monkeypatch, text, extra, native):
    file = tmp_path / "cpuinfo"
    file.write_text(text.format(extra))
    monkeypatch.setattr("densectx.precision.cpu_flags", lambda: cpu_flags(file))
    assert native_precision("cpu") == ("bf16-mixed" if native else "32-true")


def test_without_such_a_file_it_is_float32(tmp_path):
    assert cpu_flags(tmp_path / "none") == set()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is chosen first")
def test_this_machine():
    assert native_precision() == native_precision("cpu")
    assert native_precision("tpu") == "32-true"


@pytest.mark.parametrize(
    ("flags", "optimizer", "accelerator", "told"),
    [
        ({"avx2"}, {"class_path": "timm.optim.Muon"}, "cpu", True),
        ({"avx2"}, "torch.optim.Muon", "cpu", True),
        ({"avx2", "avx512_bf16"}, {"class_path": "timm.optim.Muon"}, "cpu", False),
        (set(), {"class_path": "timm.optim.Muon"}, "cpu", False),  # a CPU that does not say
        ({"avx2"}, {"class_path": "timm.optim.Muon"}, "mps", False),
        ({"avx2"}, {"class_path": "densectx.optimizers.AdaMuon"}, "cpu", False),
        ({"avx2"}, "theirs.Muon", "cpu", False),
        ({"avx2"}, None, "cpu", False),
    ],
)
def test_an_optimizer_that_computes_in_emulated_bfloat16_is_told(monkeypatch, flags, optimizer, accelerator, told):
    monkeypatch.setattr("densectx.precision.cpu_flags", lambda: flags)
    assert ("is emulated here" in emulated({"model": {"optimizer": optimizer}}, accelerator)) == told
