"""The server of `densectx demo`: what it answers, and what it never does, asked by http.client and by bare sockets."""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import io
import json
import re
import socket
import struct
import threading
import time
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

import densectx
from densectx import cli
from densectx.data.reader import read_image
from densectx.demo import command, examples, jobs, server, store, wire
from densectx.demo.answers import Answering
from densectx.demo.build import Limits, build
from densectx.demo.field import field_of
from densectx.demo.uploads import Uploads
from densectx.demo.wire import Refusal
from densectx.inference.reading import Reading
from densectx.inference.writers import Answer, image_png

BYTES = {"Content-Type": "application/octet-stream"}


def ask(port, method, path, body=None, headers=None):
    """(status, headers, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {**(BYTES if method == "POST" else {}), **(headers or {})})
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read()
    finally:
        connection.close()


def answer(port, content, query="", status=200):
    """The last line of the answer to a picture, or the refusal."""
    found, _, body = ask(port, "POST", f"/api/answer?{query}", content)
    assert found == status, body
    return json.loads(body.splitlines()[-1])


def raw(port, data, *, wait=5.0):
    """All that the server says to some bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall(data)
        said = b""
        while chunk := connection.recv(65536):
            said += chunk
        return said


def encoded(pixels, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def port(demo, every_output):
    """Of a server with the usual limits."""
    return demo(every_output).port


@pytest.fixture(scope="module")
def picture():
    return encoded(examples.landscape(64))


class Held:
    """In the place of the model: every picture takes until ``go`` is set, or nobody waits for it."""

    def __init__(self):
        self.go, self.began, self.ended = threading.Event(), threading.Semaphore(0), []

    def __call__(self, content, tasks, options, step):
        self.began.release()
        try:
            while not self.go.wait(0.01):
                step("Waiting", 0.5)
        except jobs.Cancelled:
            self.ended.append("cancelled")
            raise
        self.ended.append("done")
        return {"input": {}, "seconds": 0.0, "results": []}


# -- answers


def test_answers_are_those_of_predict(port, every_output, picture, tmp_path):
    model = densectx.load(every_output)
    (tmp_path / "a.png").write_bytes(picture)
    image, _ = read_image(tmp_path / "a.png")
    truth = model.predict(image, options={"denoising.sigma": 20})
    said = answer(port, picture, "denoising.sigma=20")
    assert (said["state"], said["input"]["width"], said["input"]["height"]) == ("done", 64, 48)
    assert [result["task"] for result in said["results"]] == list(model.tasks)
    for result in said["results"]:
        value = truth[result["task"]]
        assert (result["height"], result["width"], result["channels"]) == (*value.shape[1:], len(value))
        files = {file["name"]: ask(port, "GET", file["url"])[2] for file in result["files"]}
        np.testing.assert_array_equal(np.load(io.BytesIO(files[f"{result['task']}.npy"])), value.numpy())
        view = result["view"]
        if result["output"] in ("restored", "image"):
            shown = ask(port, "GET", view["image"]["url"])[2]
            assert shown == image_png(Answer(image, False, value), keep_gray=result["output"] == "restored")
        if "cells" in view:
            status, headers, packed = ask(port, "GET", view["cells"]["url"])
            assert (status, headers["Content-Encoding"]) == (200, "deflate")
            kind = np.float32 if view["kind"] == "values" else np.uint8
            cells = np.frombuffer(zlib.decompress(packed), kind)
            truths = {"classes": value.argmax(0), "labels": value >= 0.5, "values": value[0]}
            np.testing.assert_array_equal(cells, truths[view["kind"]].numpy().ravel())
        if view["kind"] in ("classes", "labels"):
            held = {"classes": torch.nn.functional.one_hot(value.argmax(0), 3).permute(2, 0, 1), "labels": value >= 0.5}
            areas = held[view["kind"]].double().mean((1, 2)).tolist()
            assert [row["share"] for row in view["classes"]] == pytest.approx(areas, rel=1e-12)


def test_metrics_are_not_moved_to_the_device(every_output):
    """They count in float64, which MPS does not have."""
    model, step = densectx.load(every_output), lambda words, share: None
    uploads = Uploads(Reading.of(model, list(model.tasks)), 10**6, 10**6)
    moved = []

    class Moves(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            moved.extend([args[0].dtype] if function is torch.Tensor.to else [])
            return function(*args, **(kwargs or {}))

    with Moves():
        answering = Answering(model, torch.device("cpu"), uploads, store.Store())
        answering(encoded(examples.landscape(16)), ["depth"], {}, step)
    assert torch.float32 in moved
    assert torch.float64 not in moved


def test_options_are_estimated_where_none_is_given(port):
    noisy = examples.noisy(np.full((64, 64, 3), 128, np.uint8))
    (result,) = answer(port, encoded(noisy), "tasks=denoising")["results"]
    assert result["estimated"]["sigma"] == pytest.approx(25, rel=0.1)


def test_depth_and_gray_are_kept(port):
    gray = answer(port, encoded(examples.gray(examples.landscape(64))), "tasks=denoising")
    assert gray["input"]["gray"]
    (file, _) = gray["results"][0]["files"]
    assert Image.open(io.BytesIO(ask(port, "GET", file["url"])[2])).mode == "L"
    deep = (np.arange(40 * 50, dtype=np.uint16) * 30).reshape(40, 50)
    result = answer(port, encoded(deep), "tasks=denoising")["results"][0]
    files = [ask(port, "GET", url)[2] for url in (result["files"][0]["url"], result["view"]["image"]["url"])]
    assert [Image.open(io.BytesIO(content)).mode for content in files] == ["I;16", "L"]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "TIFF", "PPM", "npy"])
def test_every_format_is_read(port, kind):
    pixels = examples.landscape(32)
    content = encoded(pixels, kind) if kind != "npy" else npy(pixels)
    assert answer(port, content, "tasks=depth")["state"] == "done"


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_fields_are_those_of_the_network(every_output):
    model = densectx.load(every_output)
    sides = {key: field_of(model, key)["h"] for key in ("segmentation", "super_resolution")}
    widths = {
        key: {last - first + 1 for first, last in zip(s["first"], s["last"], strict=True)} for key, s in sides.items()
    }
    # context7 has dilations 1 1 2 4 8 1: 1 + 2 * 17 = 35, and one 3x3 convolution of the backbone: 37
    assert (widths["segmentation"], sides["segmentation"]["step"]) == ({37}, 1)
    assert sides["super_resolution"]["step"] / sides["super_resolution"]["period"] == 0.5
    assert widths["super_resolution"] == {41}  # two more 3x3 convolutions of the decoder


def test_examples_need_no_other_package(monkeypatch):
    assert "coffee-noisy" in examples.examples()
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skimage" else found(name))
    made = {name: example.make() for name, example in examples.examples().items()}
    assert len(made) == 4
    assert {pixels.dtype for pixels in made.values()} == {np.dtype(np.uint8)}
    assert all(min(pixels.shape[:2]) >= 96 and pixels.std() > 20 for pixels in made.values())


def test_every_example_is_served(port):
    about = json.loads(ask(port, "GET", "/api/model")[2])
    for example in about["examples"]:
        status, headers, body = ask(port, "GET", f"/api/examples/{example['name']}")
        assert (status, headers["Content-Type"]) == (200, "image/png")
        Image.open(io.BytesIO(body)).load()


# -- the queue


def test_places_in_the_queue_and_a_full_one(demo, every_output, picture):
    served = demo(every_output, queue=2)
    served.queue.answering = held = Held()
    lines, threads = {}, []

    def send(number):
        lines[number] = ask(served.port, "POST", "/api/answer", picture)[2].splitlines()

    for number in range(3):
        threads.append(threading.Thread(target=send, args=(number,)))
        threads[-1].start()
        until(lambda: len(served.queue._jobs) == len(threads) and all(j.state != "sending" for j in served.queue._jobs))
    status, headers, body = ask(served.port, "POST", "/api/answer", picture)
    assert (status, headers["Retry-After"]) == (503, "1")
    assert json.loads(body)["message"] == "3 pictures are being worked on."
    held.go.set()
    for thread in threads:
        thread.join()
    said = {number: [json.loads(line) for line in some] for number, some in lines.items()}
    assert [said[number][0].get("before", 0) for number in range(3)] == [0, 1, 2]
    assert {some[-1]["state"] for some in said.values()} == {"done"}
    assert answer(served.port, picture)["state"] == "done"


def until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_client_that_leaves_ends_its_job(demo, every_output, picture):
    served = demo(every_output)
    served.queue.answering = held = Held()
    head = f"POST /api/answer HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Type: application/octet-stream\r\n"
    head += f"Content-Length: {len(picture)}\r\n\r\n"
    running, waiting = (socket.create_connection(("127.0.0.1", served.port)) for _ in range(2))
    running.sendall(head.encode() + picture)
    held.began.acquire(timeout=20)
    waiting.sendall(head.encode() + picture)
    until(lambda: len(served.queue._jobs) == 2)
    waiting.close()
    until(lambda: len(served.queue._jobs) == 1)
    running.close()
    until(lambda: held.ended == ["cancelled"] and not served.queue._jobs)
    sending = socket.create_connection(("127.0.0.1", served.port))
    sending.sendall(head.encode() + picture[:100])
    until(lambda: len(served.queue._jobs) == 1)
    sending.close()
    until(lambda: not served.queue._jobs)


def test_a_pass_through_the_network_ends_between_layers(every_output, picture):
    from densectx.demo.build import build

    answering, seen = build(every_output, None, "cpu").queue.answering, []

    def step(stage, share):
        seen.append((stage, share))
        if share > 0.3:
            raise jobs.Cancelled

    with pytest.raises(jobs.Cancelled):
        answering(picture, list(answering.model.tasks), {}, step)
    assert seen[-1][0] == "Running the network"
    assert [share for _, share in seen] == sorted(share for _, share in seen)
    assert len(seen) > 3
    assert not any(module._forward_hooks for module in answering.model.modules())


def test_a_bug_is_told_without_its_words(demo, every_output, picture, capfd):
    served = demo(every_output)

    def broken(*_):
        raise RuntimeError("/secret/path")

    served.queue.answering = broken
    said = answer(served.port, picture)
    assert said["state"] == "failed"
    assert "/secret" not in said["message"]
    assert "/secret/path" in capfd.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_said(error):
    assert jobs.words(error) == "This machine has too little memory for a picture of this size; make it smaller."


def test_answers_are_forgotten():
    now = [0.0]
    kept = store.Store(limit=100, seconds=60, clock=lambda: now[0])
    first = kept.add([store.Stored("a", bytes(40)), store.Stored("b", bytes(20))])
    assert re.fullmatch(r"[A-Za-z0-9_-]{22}", first)
    assert kept.get(first, 1).content == bytes(20)
    assert [kept.get(*key) for key in ((first, 2), (first, -1), ("A" * 22, 0))] == [None] * 3
    second = kept.add([store.Stored("a", bytes(50))])
    assert (kept.get(first, 0), kept.size) == (None, 50)
    now[0] = 60.0
    assert (kept.get(second, 0), kept.size) == (None, 0)


def test_answers_are_forgotten_though_nobody_asks(every_output, monkeypatch):
    monkeypatch.setattr(command, "FORGET_EVERY", 0.01)
    served = build(every_output, None, "cpu", Limits())
    served.store = store.Store(seconds=0.05)
    file = store.Stored("a", bytes(40))
    kept = weakref.ref(file)
    served.store.add([file])
    del file

    async def serve():
        with socket.create_server(("127.0.0.1", 0)) as listening:
            serving = asyncio.ensure_future(command._serve(served, listening))
            async with asyncio.timeout(10):
                while kept() is not None:
                    await asyncio.sleep(0.01)
            serving.cancel()
            await asyncio.wait([serving])

    try:
        with ThreadPoolExecutor(1) as pool:  # this thread may have the loop of a browser
            pool.submit(asyncio.run, serve()).result()
    finally:
        served.queue.close(10)


def test_a_picture_is_let_go_when_it_is_answered():
    class Content:
        pass

    content, done = Content(), threading.Event()
    kept = weakref.ref(content)
    queue = jobs.Queue(lambda content, *_: {}, 1)
    job = jobs.Job([], {}, lambda: done.set() if job.state == "done" else None)
    queue.enter(job)
    queue.ready(job, content)
    del content
    try:
        assert done.wait(10)
        assert kept() is None
    finally:
        queue.close(10)


# -- what is refused


POST = b"POST /api/answer HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/octet-stream\r\n"
REFUSED = {
    "no length": (POST + b"\r\n", 411),
    "chunks": (
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        411,
    ),
    "negative length": (
        b"POST /api/answer HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/octet-stream\r\nContent-Length: -1\r\n\r\n",
        400,
    ),
    "two lengths": (b"POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: {host}\r\nHost: evil.example\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "folded header": (b"GET / HTTP/1.1\r\nHost: {host}\r\nA: b\r\n c\r\n\r\n", 400),
    "space before colon": (b"GET / HTTP/1.1\r\nHost : {host}\r\n\r\n", 400),
    "bare line feeds": (b"GET / HTTP/1.1\nHost: {host}\n\n\r\n\r\n", 400),
    "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "absolute target": (b"GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n", 400),
    "long head": (b"GET / HTTP/1.1\r\nHost: {host}\r\nA: " + b"a" * 20000 + b"\r\n\r\n", 431),
    "long target": (b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\nHost: {host}\r\n\r\n", 400),
    "TRACE": (b"TRACE / HTTP/1.1\r\nHost: {host}\r\n\r\n", 405),
    "DELETE": (b"DELETE /api/results/x/0 HTTP/1.1\r\nHost: {host}\r\n\r\n", 405),
}


def test_malformed_requests(port, monkeypatch):
    monkeypatch.setattr(wire, "LINGER_SECONDS", 0.05)
    for name, (request, status) in REFUSED.items():
        said = raw(port, request.replace(b"{host}", f"127.0.0.1:{port}".encode()))
        assert said.startswith(f"HTTP/1.1 {status} ".encode()), name
        assert b"Traceback" not in said
    assert raw(port, f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()).startswith(b"HTTP/1.1 200 ")
    assert raw(port, f"HEAD / HTTP/1.1\r\nHost: LOCALHOST:{port}\r\n\r\n".encode()).endswith(b"\r\n\r\n")


def declaring(height, width):
    """The beginning of a PNG of a size."""
    chunks = (b"IHDR" + struct.pack(">II", width, height) + b"\x08\x02\x00\x00\x00", b"IDAT" + zlib.compress(bytes(99)))
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.fault("A10")
def test_files_over_the_limits(demo, every_output, record_property):
    served = demo(every_output, megabytes=0.5, megapixels=0.05)
    head = f"POST /api/answer HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Type: application/octet-stream\r\n"
    said = raw(served.port, f"{head}Content-Length: {10**9}\r\n\r\n".encode() + bytes(1 << 20))
    assert said.startswith(b"HTTP/1.1 413 ")
    assert b"The file has 1000.0 MB; this page takes up to 0.5 MB." in said
    said = answer(served.port, encoded(np.zeros((250, 300), np.uint8)), status=413)
    assert said["message"].startswith(
        "The picture has 0.1 million pixels (300 x 250); this page takes up to 0.05 million."
    )
    said = answer(served.port, declaring(60_000, 60_000), status=400)
    assert "3600000000 pixels" in said["message"]
    assert answer(served.port, encoded(np.zeros((250, 200), np.uint8)), "tasks=depth")["state"] == "done"
    record_property("count", 3)


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(1)</script></svg>'
BAD = {
    "empty": b"",
    "text": b"no picture",
    "SVG": SVG,
    "HTML": b"<!doctype html><script>alert(1)</script>",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "PDF": b"%PDF-1.7\n",
    "GIF": encoded(np.zeros((4, 4), np.uint8), "GIF"),
    "ICO": encoded(np.zeros((16, 16), np.uint8), "ICO"),
    "zip": b"PK\x03\x04" + bytes(99),
    "pickle": b"\x80\x04cos\nsystem\n(S'touch /tmp/pwned'\ntR.",
    "npy of objects": npy(np.array([[{}]], dtype=object)),
    "npy of text": npy(np.array([["a"]])),
    "npy of 1 axis": npy(np.zeros(5)),
    "truncated": encoded(np.arange(4096, dtype=np.uint8).reshape(64, 64))[:-40],
    "two frames": encoded(np.zeros((4, 4), np.uint8), "TIFF", save_all=True, append_images=[Image.new("L", (4, 4), 9)]),
}


@pytest.mark.fault("A10")
def test_bad_files_are_told_in_words_and_leave_nothing(port, tmp_path, monkeypatch, record_property):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name, content in BAD.items():
        _, _, body = ask(port, "POST", "/api/answer?tasks=depth", content)
        message = json.loads(body.splitlines()[-1])["message"]
        assert message, name
        assert not re.search(r"densectx-|tmp|Traceback|/", message), (name, message)
    assert list(tmp_path.iterdir()) == []
    record_property("count", len(BAD))


@pytest.mark.fault("A10")
def test_a_polyglot_comes_back_as_pixels_only(port, picture):
    for content in (picture + SVG, picture + b"<script>alert(1)</script>", picture + b"PK\x03\x04 evil"):
        said = answer(port, content)
        urls = {said["input"]["url"]} | {file["url"] for result in said["results"] for file in result["files"]}
        for url in urls:
            _, headers, body = ask(port, "GET", url)
            assert headers["Content-Type"] in ("image/png", "image/tiff", "application/octet-stream")
            assert (headers["Content-Disposition"], headers["X-Content-Type-Options"]) == ("attachment", "nosniff")
            assert b"alert" not in body
            assert b"evil" not in body


# requests of published advisories on gradio (CVE-2023-51449, 2024-1561, 2024-1728, 2024-4325, 2024-34510, 2024-47084,
# 2024-47164, 2024-47166, 2024-47867 and their neighbours), and the usual ways out of a folder
ESCAPES = [
    *("/file=/etc/passwd", "/file/etc/passwd", "/file=../../../etc/passwd", "/file=http://127.0.0.1:22/"),
    *(
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=%2fetc%2fpasswd",
        "/proxy=http://127.0.0.1:1/",
        "/proxy=%2fetc",
    ),
    *("/component_server", "/upload", "/upload_progress", "/queue/join", "/queue/data", "/run/predict", "/api/predict"),
    *("/config", "/info", "/login", "/token", "/monitoring", "/custom_component/x/../../../etc/passwd", "/theme.css"),
    *("/static/../../../../etc/passwd", "/static/..%2f..%2f..%2fetc/passwd", "/assets/%2e%2e/%2e%2e/etc/passwd"),
    *("/../../../../etc/passwd", "/..%2f..%2f..%2fetc%2fpasswd", "/..%5c..%5cetc%5cpasswd", "//etc/passwd"),
    *(
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..;/etc/passwd",
        "/.%00./etc/passwd",
        "/main.js/../../server.py",
        "/main.js%00.png",
    ),
    *("/index.html", "/server.py", "/__init__.py", "/../server.py", "/.git/config", "/%2egit/config", "/style.css/"),
    *("/api/examples/../../../../etc/passwd", "/api/examples/..%2fserver.py", "/api/examples/", "/api/examples/x"),
    *("/api/results/../../etc/passwd", "/api/results/AAAAAAAAAAAAAAAAAAAAAA/0", "/api/results/*/0", "/api/results/"),
    *(
        "/api/answer",
        "/api/answer?url=http://127.0.0.1:1/",
        "/api/model/..%2f..",
        "/cgi-bin/x",
        "/%c0%ae%c0%ae/etc/passwd",
    ),
]


@pytest.mark.fault("A11")
def test_nothing_but_the_page_is_read(port, record_property, monkeypatch):
    monkeypatch.setattr(wire, "LINGER_SECONDS", 0.02)
    statuses = [ask(port, "GET", path)[0] for path in ESCAPES]
    assert [(p, s) for p, s in zip(ESCAPES, statuses, strict=True) if s != 404] == []
    assert {ask(port, "POST", path, b"x", {})[0] for path in ESCAPES if not path.startswith("/api/answer")} == {404}
    record_property("count", 2 * len(ESCAPES))


@pytest.mark.fault("A11")
def test_urls_and_names_are_no_inputs(port, picture):
    for query in (
        "url=http://127.0.0.1:1/",
        "path=/etc/passwd",
        "file=/etc/passwd",
        "tasks=../x",
        "tasks=",
        "tasks=depth&a.b=1",
    ):
        assert answer(port, picture, query, status=400)["message"]
    for query in (
        "denoising.sigma=nan",
        "denoising.sigma=1e999",
        "denoising.sigma=x",
        "denoising.gain=1",
        "%ff",
        "&".join(["a=1"] * 99),
    ):
        assert answer(port, picture, query, status=400)["message"]
    assert "expected 0 to 255" in answer(port, picture, "tasks=denoising&denoising.sigma=300")["message"]


FOREIGN = [
    ("GET", "/", {"Host": "evil.example"}, 403),
    ("GET", "/", {"Host": "evil.example:{port}"}, 403),
    ("GET", "/api/model", {"Host": "127.0.0.1.nip.io:{port}"}, 403),
    ("GET", "/api/model", {"Host": "127.0.0.1:1"}, 403),
    ("GET", "/api/model", {"Host": "127.0.0.1"}, 403),
    ("GET", "/api/model", {"Host": "0.0.0.0:{port}"}, 403),
    ("GET", "/api/model", {"Host": "[::ffff:127.0.0.1]:{port}"}, 403),
    ("GET", "/api/model", {"Origin": "https://evil.example"}, 403),
    ("GET", "/api/model", {"Sec-Fetch-Site": "cross-site"}, 403),
    ("GET", "/main.js", {"Sec-Fetch-Site": "same-site"}, 403),
    ("POST", "/api/answer", {"Origin": "https://evil.example"}, 403),
    ("POST", "/api/answer", {"Origin": "null"}, 403),
    ("POST", "/api/answer", {"Origin": "http://127.0.0.1:1"}, 403),
    ("POST", "/api/answer", {"Origin": "http://localhost:{port}"}, 403),
    ("POST", "/api/answer", {"Sec-Fetch-Site": "cross-site"}, 403),
    ("POST", "/api/answer", {"Content-Type": "text/plain"}, 415),
    ("POST", "/api/answer", {"Content-Type": "multipart/form-data; boundary=x"}, 415),
    ("POST", "/api/answer", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ("OPTIONS", "/api/answer", {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}, 405),
]


@pytest.mark.fault("A11")
def test_other_pages_are_not_answered(port, picture, record_property, monkeypatch):
    monkeypatch.setattr(wire, "LINGER_SECONDS", 0.02)
    for method, path, headers, status in FOREIGN:
        headers = {name: value.replace("{port}", str(port)) for name, value in headers.items()}
        found, said, _ = ask(port, method, path, picture if method == "POST" else None, headers)
        assert found == status, headers
        assert not [name for name in said if name.lower().startswith("access-control")]
    own = {"Origin": f"http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"}
    assert ask(port, "POST", "/api/answer?tasks=depth", picture, own)[0] == 200
    record_property("count", len(FOREIGN))


def test_every_answer_forbids_the_browser_what_it_can(port, picture):
    url = answer(port, picture, "tasks=depth")["input"]["url"]
    for path in ("/", "/main.js", "/style.css", "/icon.svg", "/api/model", "/nothing", url):
        _, headers, _ = ask(port, "GET", path)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["Cache-Control"] == "no-store"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")
    page = ask(port, "GET", "/")[2].decode()
    assert set(re.findall(r'(?:src|href)="([^"#]+)"', page)) == {"/icon.svg", "/style.css", "/main.js"}


@pytest.mark.fault("A10")
def test_slow_clients_do_not_stand_in_the_way(demo, every_output, picture, monkeypatch, record_property):
    monkeypatch.setattr(wire, "HEAD_SECONDS", 1.0)
    monkeypatch.setattr(wire, "LINGER_SECONDS", 0.05)
    monkeypatch.setattr(server, "CONNECTIONS", 8)
    served = demo(every_output)
    slow = [socket.create_connection(("127.0.0.1", served.port), timeout=20) for _ in range(40)]
    for connection in slow:
        connection.sendall(b"GET / HT")
    assert ask(served.port, "GET", "/")[0] == 200  # the oldest idle ones are closed for it
    assert len(served._open) <= 8
    assert answer(served.port, picture, "tasks=depth")["state"] == "done"
    assert slow[-1].recv(99).startswith(b"HTTP/1.1 408 ")
    for connection in slow:
        connection.close()
    head = f"POST /api/answer HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Type: application/octet-stream\r\n"
    monkeypatch.setattr(wire, "BODY_SECONDS", 0.3)
    said = raw(served.port, f"{head}Content-Length: 1000\r\n\r\nabc".encode(), wait=20)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert not served.queue._jobs
    record_property("count", len(slow) + 1)


def test_expect_continue_is_answered(port, picture):
    head = (
        f"POST /api/answer?tasks=depth HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/octet-stream\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(f"{head}Expect: 100-continue\r\nContent-Length: {len(picture)}\r\n\r\n".encode())
        assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(picture)
        assert connection.recv(12) == b"HTTP/1.1 200"


# -- the command


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        ([], 2, "no MODEL is given and no package provides the model 'multitask'"),
        (["nothing.ckpt", "--port", "0"], 4, "no such file, run folder or model name"),
        (["m", "--port", "70000"], 2, "expected a whole number from 0 to 65535, got '70000'"),
        (["m", "--host", "0.0.0.0"], 2, "invalid choice: '0.0.0.0'"),
        (["m", "--max-mb", "0"], 2, "expected a positive number, got '0'"),
        (["m", "--que", "3"], 2, "unknown option '--que'; did you mean '--queue'?"),
        (["m", "--share"], 2, "unknown option '--share'"),
        (["{model}", "--port", "0", "--tasks", "denoisng"], 2, "did you mean 'denoising'?"),
        (["{model}", "--port", "0", "--device", "gpu"], 2, "unknown device 'gpu'"),
    ],
)
def test_usage_errors(arguments, status, part, every_output, capsys):
    assert cli.main(["demo", *(text.replace("{model}", str(every_output)) for text in arguments)]) == status
    assert part in capsys.readouterr().err


def test_without_a_model_it_says_what_there_is(distribute, capsys):
    assert cli.main(["demo"]) == 2
    assert "pip install ./plugins/densectx-zoo in a checkout" in capsys.readouterr().err
    distribute("densectx-zoo", {"models": {"sr-x2": "Task", "denoise-gray": "Task"}})
    assert cli.main(["demo"]) == 2
    said = capsys.readouterr().err
    assert "pip install" not in said
    assert "a model name: densectx demo denoise-gray." in said
    assert "Installed packages have denoise-gray, sr-x2 (`densectx list models`)." in said


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["demo", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Nothing leaves the machine" in said
    assert all(
        option in said for option in ("--port", "--host", "--queue", "--max-mb", "--max-mpx", "--device", "--tasks")
    )


def test_the_default_model_is_the_installed_one(distribute, every_output, monkeypatch):
    from densectx.demo import command

    distribute(
        "fake-zoo", {"models": {"multitask": "fake_zoo:path"}}, f"def path():\n    return {str(every_output)!r}\n"
    )
    assert command._default() == "multitask"
    assert next(iter(densectx.load(command._default()).tasks)) == "segmentation"


def test_refusals_say_what_they_are():
    refused = Refusal(413, "Too large.", {"A": "b"})
    assert (refused.status, refused.message, refused.headers, str(refused)) == (
        413,
        "Too large.",
        {"A": "b"},
        "Too large.",
    )
