"""Reading ``.caffemodel``: both versions of its messages, every kind of damage, nothing slow and nothing large."""

import contextlib
import re
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from densectx.errors import CheckpointError
from densectx.published.caffe import open_caffemodel

LAYERS = {
    "conv1_1": (np.arange(54, dtype=np.float32).reshape(2, 3, 3, 3) / 7, np.float32([0.5, -0.25])),
    "fc7": (np.float32([[1, 2, 3], [4, 5, 6]]).reshape(2, 3, 1, 1), np.float32([-1, 1])),
}


def read(path):
    with open_caffemodel(path) as model:
        return {name: [model.read(blob) for blob in blobs] for name, blobs in model.layers.items()}


def refused(tmp_path, content):
    path = tmp_path / "bad.caffemodel"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.caffemodel: ") as caught:
        read(path)
    return str(caught.value)


def number(value):
    """A varint, written once more."""
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + number(value // 128)


def field(tag, content):
    return number(tag * 8 + 2) + number(len(content)) + content


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_every_form_of_the_messages(caffemodel, tmp_path, old, packed, legacy, double):
    content = caffemodel({"data": ()} | LAYERS, old=old, packed=packed, legacy=legacy, double=double)
    (tmp_path / "net.caffemodel").write_bytes(content)
    found = read(tmp_path / "net.caffemodel")
    assert list(found) == ["conv1_1", "fc7"], "layers without weights are none of ours"
    for name, blobs in LAYERS.items():
        for got, wanted in zip(found[name], blobs, strict=True):
            shape = (1,) * (4 - wanted.ndim) + wanted.shape if legacy else wanted.shape
            assert got.dtype == torch.float32
            assert got.shape == shape
            assert np.array_equal(got.numpy().reshape(wanted.shape), wanted)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrays(np.float32, array_shapes(max_dims=4, max_side=9), elements=st.floats(width=32)), st.booleans(), st.booleans()
)
def test_any_array_comes_back(caffemodel, tmp_path, array, old, packed):
    path = tmp_path / "any.caffemodel"
    path.write_bytes(caffemodel({"é": (array,)}, old=old, packed=packed))
    assert np.array_equal(read(path)["é"][0].numpy(), array, equal_nan=True)


def test_numbers_in_several_pieces_and_unknown_fields(tmp_path):
    data = np.arange(6, dtype="<f4")
    pieces = field(5, data[:2].tobytes()) + b"\x2d" + data[2:3].tobytes() + field(5, data[3:].tobytes())
    blob = field(7, b"\x08\x02" + field(1, b"\x03") + b"\x48\x07") + field(6, b"differences") + pieces
    layer = field(1, b"old name") + b"\x7d1234" + b"\x619876abcd" + field(7, blob) + field(1, b"fc") + field(900, b"!")
    path = tmp_path / "pieces.caffemodel"
    path.write_bytes(b"\x28\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01" + field(100, layer))
    assert np.array_equal(read(path)["fc"][0].numpy(), data.reshape(2, 3))


def a_blob(shape=b"", data=b""):
    return field(100, field(1, b"conv1_1") + field(7, shape + data))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no layers"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "field number 0"),
        (b"PK\x03\x04" + bytes(200), "field number 0"),
        (field(1, b"net"), "no layers"),
        (field(100, field(1, b"data")), "none of its 1 layers has weights"),
        (b"\xa0\x06\x01", "layer 1 is a varint at byte 2, expected a length and bytes"),
        (field(100, b"\x08\x01" + field(7, b"")), "name of layer 1 is a varint"),
        (field(100, field(1, b"\xff\xfe") + field(7, b"")), "no text"),
        (field(100, field(1, b"x") + b"\x38\x01"), "blob 0 of layer 1 is a varint"),
        (a_blob(b"\x38\x02"), r"shape of blob 0 of layer 1 \(conv1_1\) is a varint"),
        (a_blob(field(7, b"\x0d\0\0\0\0")), "32 bits"),
        (a_blob(b"", b"\x28\x01"), "data of blob 0 of .* is a varint .* expected a length and bytes or 32 bits"),
        (a_blob(b"", field(5, b"123")), "3 bytes, no multiple of 4"),
        (a_blob(field(7, field(1, b"\x02"))), r"has 0 numbers, its shape \(2\) needs 2"),
        (a_blob(field(7, field(1, b"\x02")), field(5, bytes(12))), r"has 3 numbers, its shape \(2\) needs 2"),
        (a_blob(b"\x08\x02\x10\x03", field(5, bytes(8))), r"has 2 numbers, its shape \(2, 3, 0, 0\) needs 0"),
        (a_blob(field(7, field(1, b"\xff" * 9 + b"\x01\x01")), field(5, bytes(4))), r"\(-1, 1\), with a negative"),
        (a_blob(field(7, field(1, b"\xff" * 8 + b"\x7f" + b"\xff" * 8 + b"\x7f"))), "has 0 numbers"),
        (a_blob(field(7, field(1, b"\x80" * 10 + b"\x01"))), "more than 64 bits"),
        (a_blob(field(7, field(1, b"\xff" * 9 + b"\x02"))), "more than 64 bits"),
        (a_blob(field(7, field(1, b"\x01" * 33)), field(5, bytes(4))), "more than 32 dimensions"),
        (a_blob(field(7, field(1, b"\x01" * 999)), field(5, bytes(4))), "at most 32 numbers"),
        (a_blob(field(7, field(1, b"\x01")) * 2, field(5, bytes(4))), "two shapes"),
        (2 * a_blob(field(7, field(1, b"\x01")), field(5, bytes(4))), "two layers are called 'conv1_1'"),
        (b"\xa2\x06" + number(2**31), "length of 2147483648, 2\\^31 or more"),
        (b"\xa2\x06" + number(2**63), "2\\^31 or more"),
        (b"\xa2\x06" + number(2**31 - 1) + bytes(9), "2147483647 bytes long, but only 9 follow"),
        (field(100, field(1, b"x") + b"\x3a" + number(99) + bytes(9)), "99 bytes long, but only 9 follow"),
        (b"\xa2" + b"\x80" * 30, "more than 64 bits"),
        (b"\xa2", "ends within a number"),
        (b"\xa3\x06", "wire type 3"),
        (b"\x0d12", "ends within field 1"),
        (b"\x08\x01" * 200_001, "more than 200000 fields"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_is_told(tmp_path, content, said):
    message = refused(tmp_path, content)
    assert re.search(said, message), message
    assert "\n" not in message


def test_what_is_no_file(tmp_path):
    for path in (tmp_path / "none.caffemodel", tmp_path):
        with pytest.raises(CheckpointError, match="no such file"):
            read(path)


@pytest.mark.parametrize("old", [False, True])
def test_every_truncation_is_refused_or_leaves_whole_layers(caffemodel, tmp_path, old):
    content = caffemodel(LAYERS, old=old)
    path = tmp_path / "cut.caffemodel"
    first = len(caffemodel({"conv1_1": LAYERS["conv1_1"]}, old=old))
    for length in range(len(content)):
        path.write_bytes(content[:length])
        if length == first:  # a whole message: nothing says that another one was to follow
            assert list(read(path)) == ["conv1_1"]
        else:
            with pytest.raises(CheckpointError, match=r"cut\.caffemodel"):
                read(path)


def survives(path):
    """A good read or a refusal, in little memory; the test's own time limit says that it is soon."""
    tracemalloc.start()
    try:
        with contextlib.suppress(CheckpointError):
            for blobs in read(path).values():
                assert all(isinstance(blob, torch.Tensor) for blob in blobs)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_random_bytes(tmp_path, content):
    path = tmp_path / "random"
    path.write_bytes(content)
    survives(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.booleans(), st.booleans(), st.lists(st.tuples(st.integers(0, 2999), st.integers(0, 7)), min_size=1, max_size=4)
)
def test_flipped_bits(caffemodel, tmp_path, old, packed, flips):
    content = bytearray(caffemodel(LAYERS, old=old, packed=packed))
    for at, bit in flips:
        content[at % len(content)] ^= 1 << bit
    path = tmp_path / "flipped"
    path.write_bytes(content)
    survives(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2999), st.binary(min_size=1, max_size=12), st.booleans())
def test_bytes_put_in_or_over(caffemodel, tmp_path, at, put, over):
    content = caffemodel(LAYERS)
    at %= len(content)
    path = tmp_path / "changed"
    path.write_bytes(content[:at] + put + content[at + (len(put) if over else 0) :])
    survives(path)


def test_memory_is_that_of_the_layer_read(caffemodel, tmp_path):
    """Twenty layers of 4 and 5 MB, read one after the other, packed and not."""
    path = tmp_path / "large.caffemodel"
    array = np.ones((1000, 1000), np.float32)
    with path.open("wb") as file:
        for index in range(10):
            file.write(caffemodel({f"a{index}": (array,)}) + caffemodel({f"b{index}": (array,)}, packed=False))
    code = f"""
import re
from pathlib import Path
import torch
from densectx.published.caffe import open_caffemodel
def peak():  # of this process; getrusage also knows the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
with open_caffemodel({str(path)!r}) as model:
    total = sum(float(model.read(blob).sum()) for blobs in model.layers.values() for blob in blobs)
print(total, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    total, kilobytes = done.stdout.split()
    assert float(total) == 20e6
    assert int(kilobytes) < 25_000, "the file has 90 MB"
