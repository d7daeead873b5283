"""From what a look at the data found to what its user should know: errors end training, warnings spoil it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final, Literal, NamedTuple, final

from densectx.data.alignment import REACH
from densectx.data.causes import Expected
from densectx.data.likeness import near
from densectx.data.survey import Survey
from densectx.types import SourceInfo

Severity = Literal["error", "warning"]
Surveys = dict[str, dict[str, Survey]]
_Found = tuple[str, tuple[float, ...]]  # name of a sample, detail of its cause

_LAID: Final = 5  # masks from which on their mean position says something
_MOVED: Final = 3  # pixels from which on masks are said to be moved: annotators draw a pixel wide of the edge
_PEAK, _GAIN, _CLEAR = 0.08, 0.9, 4.0  # of the correlation of borders: least height, zero / peak, standard deviations
_COMMON: Final = 0.5  # share of pairs from which on a shift is that of all
_KNOWN: Final = 0.9  # share of declared colours from which on masks are pictures of the palette
_DEEP: Final = 65535 // 8  # greatest number of 16-bit files up to which their values may be of fewer bits
_SHOWN: Final = 8  # ids that a message names


@final
class Problem(NamedTuple):
    """Something to look at.

    Attributes:
        severity: an ``error`` ends training, a ``warning`` spoils it.
        source: key in ``data.sources``.
        split: of it.
        message: what is wrong and what to do.
        kind: ``unusable``, ``colours``, ``indices``, ``turned``, ``ratio``, ``ids``, ``sizes``, ``unlabelled``,
            ``absent``, ``palette``, ``depth``, ``shift``, ``scene``, ``mask_shift``, ``twins``, ``leak`` or
            ``near_leak``.
    """

    severity: Severity
    source: str
    split: str
    message: str
    kind: str


def problems(surveys: Surveys, infos: Mapping[str, SourceInfo], expected: Mapping[str, Expected]) -> Iterator[Problem]:
    """Everything worth saying about the splits of all sources."""
    for source, splits in surveys.items():
        for split, found in splits.items():
            # where nothing else can be read, to pass over it does not help
            unread: Severity = "warning" if found.skips and found.contents else "error"
            for kind, message in _causes(found, infos[source]):
                yield Problem(unread, source, split, message, kind)
            yield from (Problem("error", source, split, message, "unusable") for message in found.errors)
            yield from (Problem(unread, source, split, message, "unusable") for message in found.skipped)
            if message := _sizes(found, expected[source], split):
                yield Problem("error", source, split, message, "sizes")
            for kind, message in _warnings(found, infos[source], expected[source]):
                yield Problem("warning", source, split, message, kind)
    yield from _leaks(surveys)


def summarised(found: Survey) -> set[str]:
    """Messages of the unusable samples that one of a common cause speaks of too."""
    counts = Counter(cause.kind for _, _, cause in found.causes)
    return {message for _, message, cause in found.causes if counts[cause.kind] > 1}


def _causes(found: Survey, info: SourceInfo) -> Iterator[tuple[str, str]]:
    """What several unusable samples have in common; of one its own message says enough."""
    for kind in ("colours", "indices", "turned", "ratio", "ids"):
        some = [(name, cause.detail) for name, _, cause in found.causes if cause.kind == kind]
        if len(some) > 1:
            yield from ((kind, message) for message in _common(kind, some, info))


def _common(kind: str, some: list[_Found], info: SourceInfo) -> Iterator[str]:
    first, count = some[0][0], len(some)
    if kind == "colours":
        share = sum(detail[0] for _, detail in some) / count
        fix = "set colors: true" if share > _KNOWN else "declare what they mean by 'colors'"
        yield (
            f"{count} masks are pictures of colours where class ids are expected (first that of {first});"
            f" {share:.0%} of their pixels have a colour of the palette: {fix}."
        )
    elif kind == "indices":
        yield f"{count} masks hold class ids where colours are expected (first that of {first}): leave 'colors' out."
    elif kind == "turned":
        yield (
            f"{count} labels have height and width exchanged (first that of {first}): they were drawn on pictures whose"
            " EXIF orientation was not applied; turn them."
        )
    elif kind == "ratio":
        yield from _ratios(some, info)
    else:
        ids = sorted({int(value) for _, detail in some for value in detail})
        shown = ", ".join(map(str, ids[:_SHOWN])) + (", ..." if len(ids) > _SHOWN else "")
        start = f', or \'remap\' if they begin at 1 ("0": ignore, "1": {info.classes[0]}, ...)'
        fix = f"add classes or name them in 'remap'{start if ids == [len(info.classes)] else ''}"
        yield f"{count} masks hold ids that are no classes (first that of {first}): {shown}; {fix}."


def _ratios(some: list[_Found], info: SourceInfo) -> Iterator[str]:
    for ratio, count in Counter(detail[0] for _, detail in some).most_common():
        first = next(name for name, detail in some if detail[0] == ratio)
        whole = info.target == "image" and ratio >= 1 and ratio == int(ratio)
        fix = f"set scale: {int(ratio)}" if whole else "resize one of them"
        yield f"{count} labels are {ratio:g} times as large as their images (first that of {first}): {fix}."


def _sizes(found: Survey, expected: Expected, split: str) -> str:
    """Samples of different sizes do not fit in a batch."""
    if found.sizes is None or found.sizes[0] == found.sizes[1]:
        return ""
    train = split == "train"
    count, key = (expected.batch, "batch_size") if train else (expected.eval_batch, "eval_batch_size")
    if count == 1 or (train and expected.fixed):
        return ""
    fix = f"set augment.crop or augment.pad, or {key} 1" if train else f"set {key} to 1"
    return f"the images have different sizes, and {key} is {count}: {fix}."


def _warnings(found: Survey, info: SourceInfo, expected: Expected) -> Iterator[tuple[str, str]]:
    for name in found.unlabelled:
        yield "unlabelled", f"{name}: not one pixel is labelled."
    hidden = expected.direct and found.ignored and found.pixels.count(0) == 1  # such as masks of 0 and 255
    for name, count in zip(info.classes, found.pixels, strict=False):
        if not count:
            yield "absent", f"class {name!r} occurs nowhere.{_ignored(name, found, info) if hidden else ''}"
    if message := _palette(found, info):
        yield "palette", message
    if message := _depth(found):
        yield "depth", message
    yield from _pairs(found)
    if message := _mask_shift(found):
        yield "mask_shift", message
    for twins in found.contents.values():
        if len(twins) > 1:
            yield "twins", f"the same picture {len(twins)} times: {', '.join(twins)}."


def _ignored(absent: str, found: Survey, info: SourceInfo) -> str:
    """Whether the unlabelled pixels are the class that is absent, and what to write if they are."""
    share = 100 * found.ignored / (sum(found.pixels) + found.ignored)
    ids = [(i, name) for i, name in enumerate(info.classes) if name != absent][:_SHOWN]
    table = ", ".join(f'"{i}": {name}' for i, name in [*ids, (info.ignore_index, absent)])
    return (
        f" {share:.3g}% of the pixels are ignore_index {info.ignore_index}: is that the class?"
        f" Then remap: {{{table}{', ...' if len(ids) < len(info.classes) - 1 else ''}}}."
    )


def _palette(found: Survey, info: SourceInfo) -> str:
    """Colours inside of mask files that are not those declared for their ids."""
    wrong: dict[int, tuple[int, tuple[int, int, int]]] = {}
    for (index, colour), count in found.palettes.items():
        if colour != info.palette[index] and count > wrong.get(index, (0, colour))[0]:
            wrong[index] = count, colour
    if not wrong:
        return ""
    parts = []
    for index, (count, colour) in sorted(wrong.items())[:_SHOWN]:
        of = f", which is declared for {info.classes[info.palette.index(colour)]!r}" if colour in info.palette else ""
        parts.append(f"id {index} ({info.classes[index]!r}) is {colour} in {count} files{of}")
    more = ", ..." if len(wrong) > _SHOWN else ""
    return (
        f"the palettes of mask files are not the declared one: {'; '.join(parts)}{more}. Are the ids in another order?"
    )


def _depth(found: Survey) -> str:
    """Numbers of 10 or 12 bits in files of 16."""
    if not 0 < found.deepest <= _DEEP:
        return ""
    bits = found.deepest.bit_length()
    return (
        f"the {found.deep} images of 16 bits hold numbers up to {found.deepest}, and 65535 is white: nearly black"
        f" pictures. If the numbers have {bits} bits, set value_range: [0, {(1 << bits) - 1}]."
    )


def _pairs(found: Survey) -> Iterator[tuple[str, str]]:
    """Target pictures that do not lie on their images."""
    shifts = Counter(pair.shift for _, pair in found.pairs if pair.shift is not None)
    moved = {shift: count for shift, count in shifts.items() if shift != (0, 0)}
    whole = next((s for s, count in moved.items() if count > 1 and count >= _COMMON * len(found.pairs)), None)
    if whole is not None:
        yield (
            "shift",
            f"{moved[whole]} of {len(found.pairs)} targets are shifted against their images by {_said(whole)}.",
        )
    for name, pair in found.pairs:
        if pair.shift not in (None, (0, 0), whole):
            assert pair.shift is not None
            yield "shift", f"{name}: its target is shifted against it by {_said(pair.shift)}."
        if pair.other == "turned":
            yield "scene", f"{name}: its target is turned or mirrored."
        elif pair.other == "scene":
            yield "scene", f"{name}: its target shows something else."


def _mask_shift(found: Survey) -> str:
    """Masks that as a whole lie beside the edges of their pictures."""
    if found.laid < _LAID:
        return ""
    mean = found.edges / found.laid
    peak, zero = float(mean.max()), float(mean[REACH, REACH])
    down, right = (value - REACH for value in divmod(int(mean.argmax()), mean.shape[1]))
    clear = peak >= _PEAK and peak - float(mean.mean()) >= _CLEAR * float(mean.std()) and zero <= _GAIN * peak
    if not clear or max(abs(down), abs(right)) < _MOVED:
        return ""
    return f"masks lie beside the edges of their pictures: they fit best moved by {_said((down, right))}."


def _said(shift: tuple[int, int]) -> str:
    down, right = shift
    parts = [f"{abs(down)} pixels {'down' if down > 0 else 'up'}"] if down else []
    parts += [f"{abs(right)} pixels to the {'right' if right > 0 else 'left'}"] if right else []
    return " and ".join(parts)


def _leaks(surveys: Surveys) -> Iterator[Problem]:
    """Pictures of one split in another one, over all sources: what is measured on them is not held out."""
    trained = {source: parts["train"] for source, parts in surveys.items() if "train" in parts}
    for source, splits in surveys.items():
        for split in ("val", "test"):
            if split not in splits:
                continue
            held_out = splits[split]
            for other, seen in trained.items():
                same = held_out.contents.keys() & seen.contents.keys()
                for content in sorted(same):
                    pair = f"{held_out.contents[content][0]} is also {seen.contents[content][0]}"
                    yield Problem("warning", source, split, f"leak: {pair} of {other}'s train.", "leak")
                mine = [one for one in held_out.prints if one[1] not in same]
                theirs = [one for one in seen.prints if one[1] not in same]
                told = set[str]()
                for index, place in near([one[2] for one in mine], [one[2] for one in theirs]):
                    if mine[index][0] not in told:
                        told.add(mine[index][0])
                        pair = f"{mine[index][0]} is nearly {theirs[place][0]}"
                        yield Problem("warning", source, split, f"leak: {pair} of {other}'s train.", "near_leak")
