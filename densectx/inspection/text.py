"""An inspection as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

_SHOWN: Final = (1, 2, 3, 4, 6, 8, 12, 16)  # shifts that the table has columns for; --json has all


def text_of(report: Mapping[str, Any]) -> str:
    """Summary, costs, layers, fields, context, shifts.

    Args:
        report: as :func:`densectx.inspection.report.inspect` makes it.
    """
    lines = [*_summary(report), *_costs(report)]
    printed: set[str] = set()
    for key, task in report["tasks"].items():
        lines += ["", *_layers(key, task, printed), "", *_answer(key, task)]
    for name, context in report["contexts"].items():
        lines += ["", *_context(name, context)]
    if report["suggestion"]:
        found = report["suggestion"]
        field = "" if found["field"] == found["wished"] else f" (fields of 3x3 layers are odd: {found['field']})"
        lines += ["", f"for a field of {found['wished']} cells{field}: dilations {_listed(found['dilations'])}"]
        lines[-1] += f", gridding {found['gridding']:.3f}"
    lines += _shifts(report)
    lines += ["", *(f"left out: {line}" for line in report["skipped"])] if report["skipped"] else []
    return "\n".join(lines) + "\n"


def _summary(report: Mapping[str, Any]) -> Iterator[str]:
    kind = "trained weights" if report["kind"] == "weights" else "a config: fresh random weights"
    yield f"{report['name']}: {kind}, stride {report['stride']}"
    if report["margin"]:
        yield f"its backbone takes {report['margin']} pixels of surroundings on each side, mirrored if there are none"


def _costs(report: Mapping[str, Any]) -> Iterator[str]:
    height, width = report["size"]
    found = report["cost"]
    rows = [(name, part["parameters"], part["macs"]) for name, part in found["parts"].items()]
    rows.append(("total", found["parameters"], found["macs"]))
    yield ""
    table = [("PART", "PARAMETERS", f"MULTIPLY-ADDS, {height}x{width}")]
    table += [(name, f"{count:,}".replace(",", " "), _large(macs)) for name, count, macs in rows]
    yield from _table(table, right=(1, 2))
    yield f"{_large(found['macs_per_megapixel'])} multiply-adds a megapixel"


def _layers(key: str, task: Mapping[str, Any], printed: set[str]) -> Iterator[str]:
    """Those that were not printed for a task before."""
    rows = [("LAYER", "OPERATION", "CHANNELS", "FIELD", "STRIDE", "OFFSET")]
    for layer in task["layers"]:
        row = (
            layer["layer"],
            layer["operation"],
            str(layer["channels"]),
            _field(layer),
            _both(layer["stride"]),
            _both(layer["offset"]),
        )
        if (mark := repr(row)) not in printed:
            printed.add(mark)
            rows.append(row)
    yield f"task {key}, by layer: pixels of its input; offset is the centre of what cell 0 sees"
    if len(rows) > 1:
        yield from _table(rows, right=(2, 3, 4, 5))


def _answer(key: str, task: Mapping[str, Any]) -> Iterator[str]:
    if "answer" not in task:
        yield f"the answer of {key} does not depend on its input"
        return
    answer, measured, effective = task["answer"], task["measured"], task.get("effective")
    yield f"an answer of {key} sees"
    yield f"  theory     {_field(answer)}{'' if answer['global'] else ' pixels'}"
    if answer["global"]:
        yield f"             global: {', '.join(answer['global'][:3])}{', ...' if answer['global'][3:] else ''}"
    if measured:
        sizes = " x ".join(str(measured[name]["field"]) for name in ("rows", "columns"))
        agrees = all(one["agrees"] for one in measured.values())
        holes = [one["field"] - one["connected"] for one in measured.values()]
        yield (
            f"  measured   {sizes}, {'the same' if agrees else 'NOT what theory says'},"
            f" {'every pixel connected' if not any(holes) else f'{max(holes)} rows or columns in it not connected'}"
        )
    if effective:
        sigma = _both(effective["sigma"], digits=1)
        cut = ", which cut it off" if effective["side"] > 0.8 * min(effective["size"]) else ""
        yield (
            f"  effective  {effective['side']:.1f} x {effective['side']:.1f} above 4.55 % of the largest weight"
            f" (Luo et al. 2016), sigma {sigma}, on {_both(effective['size'])} inputs{cut}"
        )
    halo = task["halo"]
    if halo["left"] is not None and halo["top"] is not None:
        yield f"  halo       {halo['left']} left, {halo['right']} right, {halo['top']} above, {halo['bottom']} below"


def _context(name: str, context: Mapping[str, Any]) -> Iterator[str]:
    field = "global" if context["field"] is None else f"{context['field']} x {context['field']} cells"
    yield f"context {name} ({context['name']}, {context['channels']} channels): {field}"
    if context["dilations"] is None:
        return
    side = context["equivalent_kernel"]
    yield f"  dilations  {_listed(context['dilations'])}; field after each {_listed(context['fields'])}"
    yield (
        f"  coverage   {context['connected']} of {side} taps along an axis,"
        f" {'no holes' if context['connected'] == side else 'with holes'};"
        f" gridding {context['gridding']:.3f} (0 even, 1 a lattice)"
    )
    kronecker = "their Kronecker product" if context["kronecker"] else "no Kronecker product, since paths overlap"
    yield (
        f"  kernels    without ReLUs they are one {side}x{side} kernel from {context['kernel_numbers']} numbers instead"
        f" of {side * side}, for each pair of channels; {kronecker}"
    )


def _shifts(report: Mapping[str, Any]) -> Iterator[str]:
    """Errors by network, on the interior and, where it differs, over the whole."""
    found = [(f"task {key}, pixels", task.get("shifts")) for key, task in report["tasks"].items()]
    found += [(f"context {name}, cells", entry.get("shifts")) for name, entry in report["contexts"].items()]
    named = {"context": "Basic context, circular", "segnet": "SegNet-like, circular", "unet": "U-Net-like, circular"}
    found += [(named.get(name, name), errors) for name, errors in report["references"].items()]
    kept = [(name, errors) for name, errors in found if errors]
    if not kept:
        return
    shown = [error["shift"] for error in kept[0][1] if error["shift"] in _SHOWN]
    rows = [("SHIFT OF THE INPUT BY", "", *(str(shift) for shift in shown))]
    for name, errors in kept:
        values = {error["shift"]: error for error in errors}
        inside = [values[shift]["interior"] for shift in shown]
        whole = [values[shift]["whole"] for shift in shown]
        rows.append((name, "interior", *("-" if value is None else _error(value) for value in inside)))
        if any(a is None or abs(a - b) > 1e-3 for a, b in zip(inside, whole, strict=True)):
            rows.append(("", "whole", *(_error(value) for value in whole)))
    yield ""
    yield "relative error of shifting the answer instead of the input (0: equivariant)"
    yield from _table(rows, right=range(2, len(rows[0])))


def _error(value: float) -> str:
    return "0" if value < 5e-5 else f"{value:.2f}" if value >= 0.005 else f"{value:.0e}"


def _field(layer: Mapping[str, Any]) -> str:
    height, width = layer["field"]
    if height is None and width is None:
        local = [side for side in layer["local"] if side is not None]
        return f"global ({max(local)} local)" if local else "global"
    return _both(layer["field"]) if height != width else str(height)


def _both(pair: Sequence[float | None], digits: int = 4) -> str:
    texts = ["-" if value is None else f"{round(value, digits):g}" for value in pair]
    return texts[0] if texts[0] == texts[1] else " x ".join(texts)


def _listed(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


def _large(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def _table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
