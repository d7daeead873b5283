"""Help texts of the training commands, from the docstrings of what they configure."""

from __future__ import annotations

import inspect

from densectx.building import build_module
from densectx.data.module import DataModule


def help_text(command: str) -> str:
    """What `densectx fit --help` and its sisters print."""
    lines = [
        f"usage: densectx {command} -c FILE [-c FILE ...] [--KEY.KEY VALUE ...] [options]",
        "",
        "Files merge deeply in order, flags override single keys; unknown keys are refused. Keys:",
        "",
    ]
    described = _arguments(build_module.__doc__)
    lines += [f"  model.{name:<16} {text}" for name, text in described.items() if name not in ("sources", "seed")]
    described = _arguments(DataModule.__doc__)
    lines += [f"  data.{name:<17} {text}" for name, text in described.items() if name != "seed"]
    lines += [
        "  trainer.*              arguments of pytorch_lightning.Trainer",
        "  seed_everything        seed of weights, order, augmentation, noise and dropout (0)",
        "  init_from              file or run whose matching weights are taken",
        "  requires               distributions to name when one is missing",
        "",
        "options:",
        "",
        "  --name NAME            folder under runs/, else the first file's name",
        "  --print_config         print the merged config and stop",
        "  --allow-import PKG     let the config name PKG.module:Attr",
        "  --debug                traceback of an error",
    ]
    if command == "fit":
        lines.append("  --resume RUN|FILE|auto go on with a run; refuses a changed config or changed data")
        lines.append("  --allow-changed KEY    changed all the same; data: the files too")
        lines.append("  --no-report            leave out RUN/report.html, which looks at 64 samples a source")
    else:
        lines.append("  --ckpt_path FILE|RUN   weights to measure")
    lines += [
        "",
        "environment:",
        "",
        "  DENSECTX_TIMEOUT       seconds that a rank waits for the others in a collective (300)",
        "  DENSECTX_START_TIMEOUT seconds in which all ranks have to meet (20; 60 where this command starts them)",
    ]
    return "\n".join(lines) + "\n"


def _arguments(text: str | None) -> dict[str, str]:
    """The arguments of a Google-style docstring with their descriptions on one line."""
    found: dict[str, str] = {}
    _, _, section = inspect.cleandoc(text or "").partition("Args:\n")
    for line in section.splitlines():
        if not line.startswith("    "):
            break
        if line.startswith("     ") and found:
            found[next(reversed(found))] += " " + line.strip()
        else:
            name, _, description = line.strip().partition(": ")
            found[name] = description
    return found
