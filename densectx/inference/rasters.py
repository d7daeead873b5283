"""Files of pixels that Pillow cannot write: PNG of 16 bits in colour, TIFF of floats."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray


def png16(values: NDArray[np.uint16], most: int = 1 << 30) -> bytes:
    """A PNG file of 16 bits a channel, which Pillow cannot write in colour.

    Args:
        values: (H, W) or (H, W, 3).
        most: bytes of a chunk; the format takes less than 2^31.

    Source: ISO/IEC 15948 (PNG), filter type 2 (up).
    """
    height, width = values.shape[:2]
    rows = np.ascontiguousarray(values, ">u2").view(np.uint8).reshape(height, -1)
    filtered = np.full((height, rows.shape[1] + 1), 2, np.uint8)
    filtered[:1, 1:] = rows[:1]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    packed = memoryview(zlib.compress(filtered.tobytes()))
    chunks: list[tuple[bytes, bytes | memoryview]] = [(b"IHDR", header)]
    chunks += [(b"IDAT", packed[start : start + most]) for start in range(0, len(packed), most)]
    chunks += [(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        part
        for name, data in chunks
        for part in (struct.pack(">I", len(data)), name, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(name))))
    )


def tif32(values: NDArray[np.float32], kind: Literal["minisblack", "rgb"]) -> bytes:
    """A TIFF file of float32, uncompressed; one channel and RGB as pictures are, other numbers of channels in planes.

    Args:
        values: (K, H, W).
        kind: what the numbers are; ``rgb`` for K = 3 only.
    """
    import tifffile

    planes: Literal["separate"] | None = None
    if len(values) == 1:
        values = values[0]
    elif kind == "rgb":
        values = np.ascontiguousarray(np.moveaxis(values, 0, 2))
    else:
        planes = "separate"
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric=kind, planarconfig=planes, metadata=None)
    return file.getvalue()
