"""Protocol buffers' wire format, read from a file by seeking: nothing but what is asked for is held in memory.

Source: https://protobuf.dev/programming-guides/encoding. No schema, no code generation, no dependency.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, NoReturn, final

import numpy as np

from densectx.errors import CheckpointError

VARINT: Final = 0
FIXED64: Final = 1
BYTES: Final = 2
FIXED32: Final = 5

_WIDTHS: Final = {FIXED64: 8, FIXED32: 4}
_KINDS: Final = {VARINT: "a varint", FIXED64: "64 bits", BYTES: "a length and bytes", FIXED32: "32 bits"}
_MOST_FIELDS: Final = 200_000  # real files have thousands; damaged ones must not keep the reader busy
_MOST_BYTES: Final = 2**31 - 1  # of a message, protocol buffers' own limit


class Field(NamedTuple):
    """One field of a message, or a row of fields of the same number and fixed width.

    Attributes:
        number: of the field.
        wire: VARINT, FIXED64, BYTES or FIXED32.
        start: where its (first) value begins in the file.
        stop: where its (last) value ends.
        value: of a varint, unsigned.
        rows: 1, or how many fields of fixed width follow each other; their values are a tag byte apart.
    """

    number: int
    wire: int
    start: int
    stop: int
    value: int = 0
    rows: int = 1


@final
class Wire:
    """The messages of a file.

    Args:
        file: opened for reading bytes, seekable.
        path: its name, for messages.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = file.seek(0, 2)
        self._left = _MOST_FIELDS

    def fail(self, what: str) -> NoReturn:
        """Raise for a file that is not what it should be.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"{self.path}: is damaged or no Caffe model: {what}.")

    def expect(self, field: Field, wires: tuple[int, ...], what: str) -> None:
        """Check the wire type of a field.

        Raises:
            CheckpointError: it is of another one.
        """
        if field.wire not in wires:
            expected = " or ".join(_KINDS[wire] for wire in wires)
            self.fail(f"{what} is {_KINDS[field.wire]} at byte {field.start}, expected {expected}")

    def read(self, start: int, length: int) -> bytes:
        """Bytes of the file.

        Raises:
            CheckpointError: it ends before, or cannot be read.
        """
        try:
            self.file.seek(start)
            found = self.file.read(length)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror or error}.") from error
        if len(found) < length:
            self.fail(f"it ends at byte {start + len(found)}, expected {length - len(found)} more")
        return found

    def fields(self, start: int, stop: int, where: str) -> Iterator[Field]:
        """The fields of a message, in order; what they contain is not read.

        Args:
            start: first byte of the message.
            stop: first byte behind it.
            where: what the message is, for messages to the user.

        Raises:
            CheckpointError: truncated, a length beyond the message or of 2^31 and more, an overlong varint, an
                unknown wire type, or far too many fields.
        """
        position = start
        while position < stop:
            self._left -= 1
            if self._left < 0:
                self.fail(f"it has more than {_MOST_FIELDS} fields")
            head = self.read(position, min(20, stop - position))
            tag, used = self._varint(head, 0, position, where)
            number, wire = tag >> 3, tag & 7
            if not 1 <= number < 2**29:
                self.fail(f"{where} has a field number {number} at byte {position}")
            if wire == VARINT:
                value, end = self._varint(head, used, position, where)
                field = Field(number, wire, position + used, position + end, value)
            elif wire == BYTES:
                length, used = self._varint(head, used, position, where)
                begin = position + used
                if length > _MOST_BYTES:
                    self.fail(f"field {number} of {where} at byte {position} has a length of {length}, 2^31 or more")
                if length > stop - begin:
                    self.fail(
                        f"field {number} of {where} at byte {position} is {length} bytes long, but only"
                        f" {stop - begin} follow (truncated?)"
                    )
                field = Field(number, wire, begin, begin + length)
            elif wire in _WIDTHS:
                field = self._row(position, stop, used, Field(number, wire, position + used, stop), where)
            else:
                self.fail(f"field {number} of {where} at byte {position} has the wire type {wire}")
            yield field
            position = field.stop

    def varints(self, field: Field, most: int, where: str) -> list[int]:
        """The values of a varint field, or of a packed one.

        Raises:
            CheckpointError: more than ``most``, or broken.
        """
        if field.wire == VARINT:
            return [field.value]
        length = field.stop - field.start
        if length > 10 * most:
            self.fail(f"{where} has {length} bytes of numbers, expected at most {most} numbers")
        packed, at, found = self.read(field.start, length), 0, []
        while at < length:
            value, at = self._varint(packed, at, field.start, where)
            found.append(value)
        return found

    def _varint(self, data: bytes, at: int, position: int, where: str) -> tuple[int, int]:
        """(value, index behind it) of a varint in ``data``, which begins at ``position`` of the file."""
        window = data[at : at + 10]
        last = next((index for index, byte in enumerate(window) if byte < 128), None)
        if last is None and len(window) < 10:
            self.fail(f"{where} ends within a number at byte {position + at} (truncated?)")
        value = sum((byte & 127) << (7 * index) for index, byte in enumerate(window[: (last or 0) + 1]))
        if last is None or value >= 2**64:
            self.fail(f"{where} has a number of more than 64 bits at byte {position + at}")
        return value, at + last + 1

    def _row(self, position: int, stop: int, used: int, first: Field, where: str) -> Field:
        """A fixed-width field and those like it right behind: unpacked arrays are millions of them."""
        step = used + _WIDTHS[first.wire]
        if stop - position < step:
            self.fail(f"{where} ends within field {first.number} at byte {position} (truncated?)")
        count, most, batch = 1, (stop - position) // step, 4
        if used == 1:
            tag = self.read(position, 1)[0]
            while count < most:
                take = min(batch, most - count)
                begin = position + count * step
                tags = np.frombuffer(self.read(begin, take * step), np.uint8)[::step]
                same = tags == tag
                if not same.all():
                    count += int(same.argmin())
                    break
                count, batch = count + take, min(batch * 4, 1 << 18)
        return Field(first.number, first.wire, first.start, position + count * step, rows=count)
