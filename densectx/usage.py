"""Help texts of the training commands, from the docstrings of what they configure."""

from __future__ import annotations

from densectx.building import build_module
from densectx.data.module import DataModule
from densectx.data.transforms import Augment
from densectx.docstrings import arguments, first_sentence
from densectx.parsing import STATUSES

_FILES = {True: "-c FILE [-c FILE ...]", False: "[-c FILE ...] [--ckpt_path RUN|FILE]"}  # fit, or measures


def help_text(command: str) -> str:
    """What `densectx fit --help` and its sisters print."""
    lines = [
        f"usage: densectx {command} {_FILES[command == 'fit']} [--KEY.KEY VALUE ...] [options]",
        "",
        "Files merge deeply in order, flags override single keys; unknown keys are refused. Keys:",
        "",
        "  model.name             a model of `densectx list models` to start from; weights too if it has some",
    ]
    described = arguments(build_module.__doc__)
    lines += [f"  model.{name:<16} {text}" for name, text in described.items() if name not in ("sources", "seed")]
    described = arguments(DataModule.__doc__)
    lines += [f"  data.{name:<17} {text}" for name, text in described.items() if name != "seed"]
    lines += [
        "  trainer.*              arguments of pytorch_lightning.Trainer",
        "  seed_everything        seed of weights, order, augmentation, noise and dropout (0)",
        "  init_from              file or run whose matching weights are taken",
        "  requires               distributions to name when one is missing",
        "",
        "augment of a source, for training only:",
        "",
    ]
    described = arguments(Augment.__doc__)
    lines += [
        f"  {name:<22} {first_sentence(text)}" for name, text in described.items() if name not in ("info", "where")
    ]
    lines += [
        "",
        "options:",
        "",
        "  --print_config         print the merged config and stop",
        "  --allow-import PKG     let the config name PKG.module:Attr",
        "  --debug                traceback of an error",
    ]
    if command == "fit":
        lines.append("  --name NAME            folder under runs/, else the first file's name")
        lines.append("  --resume RUN|FILE|auto go on with a run; refuses a changed config or changed data")
        lines.append("  --allow-changed KEY    changed all the same; data: the files too")
        lines.append("  --no-report            leave out RUN/report.html, which looks at 64 samples a source")
    else:
        lines.append("  --ckpt_path FILE|RUN   weights to measure; without -c by the config of their run")
    lines += [
        "",
        "environment:",
        "",
        "  DENSECTX_TIMEOUT       seconds that a rank waits for the others in a collective (300)",
        "  DENSECTX_START_TIMEOUT seconds in which all ranks have to meet (20; 60 where this command starts them)",
        "",
        STATUSES.rstrip(),
    ]
    if command == "fit":
        lines.append("after 130 and 143 a checkpoint is there if a step was done: --resume goes on")
    return "\n".join(lines) + "\n"
