"""The file of figures as Markdown; everything here is computed from what the file says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

TITLES = {
    "segmentation": "The same trunk, other decoders",
    "arithmetic": "Share of the processor's arithmetic",
    "sharing": "Several tasks from one trunk",
    "restoration": "Denoiser and x2 network",
    "optimizers": "Updates",
    "loader": "Loader",
    "growth": "Growth",
    "startup": "Start",
}


def tables(found: dict[str, Any]) -> str:
    """The whole page."""
    lines = ["# Speed", ""]
    for name, title in TITLES.items():
        lines += [f"## {title}", ""]
        if name not in found["sections"]:
            lines += ["Not run.", ""]
            continue
        section = found["sections"][name]
        if section["quick"]:
            lines += ["**A quick run: tiny sizes, these figures mean nothing.**", ""]
        if aim := section.get("aim"):
            lines += [f"Aim: {aim}." if isinstance(aim, str) else f"Aim: below {aim:.0%}.", ""]
        for part in (_comparisons, _memory, _megapixels, _shares, _stall, _curves, _measured):
            lines += part(section)
        lines += [_origin(section), ""]
    return "\n".join(lines)


def _origin(section: dict[str, Any]) -> str:
    machine = section["machine"]
    on = f"{section['threads']} threads on {machine['cores']} cores of {machine['processor']}, torch {machine['torch']}"
    commit, _, changed = section["commit"].partition("+")
    commit = commit[:7] + f"+{changed}" * bool(changed)
    return f"`{section['command']}` at {commit}, {on}, {section['wall_s']:.0f} s."


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table and an empty line; nothing without rows."""
    rows = list(rows)
    lines = [heads, ["---"] * len(heads), *rows] if rows else []
    return ["| " + " | ".join(line) + " |" for line in lines] + [""] * bool(rows)


def _comparisons(section: dict[str, Any]) -> list[str]:
    rows = []
    for row in section.get("comparisons", ()):
        (name, ours), *others = row["arms"].items()
        for other, theirs in others:
            ratio = row["ratios"][other]
            more = [f"{ratio[key]:.2f}" if key in ratio else "" for key in ("macs", "time_by_macs")]
            rows.append([row["what"], name, other, _ms(ours), _ms(theirs), f"**{ratio['time']:.2f}**", *more])
    heads = ["what", "ours", "against", "ours, ms", "theirs, ms", "time", "multiply-adds", "time / multiply-adds"]
    return table(heads, rows)


def _memory(section: dict[str, Any]) -> list[str]:
    rows = []
    for row in section.get("comparisons", ()):
        for name, arm in row["arms"].items():
            if "peak_mb" in arm:
                ratio = row["ratios"].get(name, {}).get("memory")
                told = f"**{ratio:.2f}**" if ratio else ""
                rows.append([row["what"], name, f"{arm['weights_mb']:.1f}", f"{arm['peak_mb']:.0f}", told])
    return table(["what", "", "weights, MiB", "peak, MiB", "one trunk / it"], rows)


def _megapixels(section: dict[str, Any]) -> list[str]:
    rows = []
    for row in section.get("comparisons", ()):
        for name, arm in row["arms"].items():
            if "s_per_megapixel" in arm:
                thousands = [f"{arm[key] / 1e3:.0f}" for key in ("macs_per_pixel", "parameters")]
                rows.append([row["what"], name, f"{arm['s_per_megapixel']:.3f}", *thousands])
    return table(["what", "network", "s a megapixel", "1000 multiply-adds a pixel", "1000 parameters"], rows)


def _shares(section: dict[str, Any]) -> list[str]:
    arms = {group["what"]: group["arms"] for group in section.get("measured", ())}
    rows = []
    for share in section.get("shares", ()):
        rates = [f"{arms[share['what']][name]['macs_per_s'] / 1e9:.0f}" for name in (share["arm"], share["of"])]
        aim = f"{share['aim']:.0%}{'' if share['reached'] else ', missed'}"
        rows.append([share["what"], share["arm"], *rates, share["of"], f"**{share['share']:.0%}**", aim])
    lines = table(["what", "kind", "GMAC/s", "GMAC/s of the product", "product", "share", "aim"], rows)
    profiles = section.get("profiles", {})
    rows = [
        [what, ", ".join(f"{kind} {share:.0%}" for kind, share in found["kinds"].items() if share >= 0.005)]
        for what, found in profiles.items()
    ]
    return lines + table(["where the time goes when the aim is missed", "shares of operators' own time"], rows)


def _stall(section: dict[str, Any]) -> list[str]:
    if "stall" not in section:
        return []
    arms = {**section["fed"]["arms"], **section["apart"]}
    rows = [[name, _ms(arm), f"{arm['images_per_s']:.1f}"] for name, arm in arms.items()]
    lines = table([f"{section['config']}, {section['dtype']}", "ms", "images/s"], rows)
    kept = "hidden" if section["reached"] else "not hidden"
    told = f"Stall: **{section['stall']:.1%}** of the step, {section['workers']} loader process(es): {kept}."
    beside = section["fed"]["ratios"]["step"]["time"]
    return [*lines, f"{told} A step takes **{beside:.2f}** times one whose batch lies in memory.", ""]


def _curves(section: dict[str, Any]) -> list[str]:
    rows = []
    for curve in section.get("curves", ()):
        medians = [arm["median_s"] for arm in curve["arms"].values()]
        relative = ", ".join(f"x{x}: {t / medians[0]:.2f}" for x, t in zip(curve["x"], medians, strict=True))
        fit = f"{1e3 * curve['offset_s']:.1f} + {1e3 * curve['slope_s']:.2f} x"
        power = f"{curve['exponent']:.2f}" if curve["over"] == "pixels" else ""  # tasks share a trunk: no power of them
        rows.append([curve["what"], relative, fit, f"{curve['worst']:.0%}", power])
    lines = table(["what", "time, first = 1", "line, ms", "farthest from it", "exponent"], rows)
    if ranks := section.get("ranks"):
        one, two = (f"{1e3 * ranks[key]:.0f} ms" for key in ("one_rank_step_s", "two_ranks_step_s"))
        said = f"Ranks, a thread each, the same batch a rank: a step of one {one}, of two {two}: "
        said += f"**{ranks['images_per_s_ratio']:.2f}** times the images/s"
        lines += [f"{said} ({ranks['images_per_s_ratio_without_exchange']:.2f} without exchange).", ""]
    return lines


def _measured(section: dict[str, Any]) -> list[str]:
    rows = [
        [group["what"], name, _ms(arm)]
        for group in section.get("measured", ())
        if "shares" not in section
        for name, arm in group["arms"].items()
    ]
    return table(["what", "", "ms"], rows)


def _ms(arm: dict[str, Any]) -> str:
    return f"{1e3 * arm['median_s']:.4g}"
