"""The page's server: static files, the model's description, pictures in, answers out; all of it bounded."""

from __future__ import annotations

import asyncio
import json
import math
import re
import socket
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from importlib import resources
from typing import Any, Final, final
from urllib.parse import parse_qsl

from densectx.demo import guard
from densectx.demo.examples import examples, png
from densectx.demo.jobs import Job, Queue
from densectx.demo.store import Store
from densectx.demo.uploads import Uploads
from densectx.demo.wire import HEAD_BYTES, Refusal, Request, Response, linger, read_body, read_head

CONNECTIONS: Final = 128
"""At most at a time. One more, and the oldest that has not said what it wants is closed."""

_STATIC: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_RESULT: Final = re.compile(r"/api/results/([A-Za-z0-9_-]{22})/([0-9]{1,4})")
_END: Final = ("done", "failed", "cancelled")
_SAID_EVERY: Final = 0.05  # seconds


@final
class Server:
    """Answers requests; see :meth:`start`.

    Args:
        about: what the page is told of the model, see :func:`densectx.demo.describe.describe`.
        queue: runs the model.
        uploads: looks at pictures before they are queued.
        store: has the answers.
    """

    def __init__(self, about: Mapping[str, Any], queue: Queue, uploads: Uploads, store: Store) -> None:
        self.about, self.queue, self.uploads, self.store = about, queue, uploads, store
        self.port = 0
        self._files = _static()
        self._examples: dict[str, bytes] = {}
        self._waiting: dict[asyncio.StreamWriter, None] = {}  # connections that have not said what they want, in order
        self._open: set[asyncio.StreamWriter] = set()

    async def start(self, listening: socket.socket) -> asyncio.Server:
        """Answer on a socket; its port is in ``port`` then."""
        self.port = int(listening.getsockname()[1])
        return await asyncio.start_server(self._connected, sock=listening, limit=HEAD_BYTES)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= CONNECTIONS:
            idle = next(iter(self._waiting), writer)
            self._forget(idle)
            idle.transport.abort()
            if idle is writer:
                return
        self._open.add(writer)
        try:
            await self._served(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client is gone, or the server ends
        except Exception:
            traceback.print_exc(file=sys.stderr)
        finally:
            self._forget(writer)
            writer.close()

    def _forget(self, writer: asyncio.StreamWriter) -> None:
        self._open.discard(writer)
        self._waiting.pop(writer, None)

    async def _served(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._waiting[writer] = None
        response = Response(writer, guard.HEADERS)
        try:
            request = await read_head(reader)
            self._waiting.pop(writer, None)
            if request is None:
                return
            response.head_only = request.method == "HEAD"
            guard.check(request, self.port)
            await self._route(request, reader, response)
        except Refusal as refused:
            await response.send_json(refused.status, {"message": refused.message}, refused.headers)
            await linger(reader, writer)

    async def _route(self, request: Request, reader: asyncio.StreamReader, response: Response) -> None:
        if request.method == "POST":
            if request.path != "/api/answer":
                raise Refusal(404, "There is nothing here.")
            await self._answer(request, reader, response)
        elif request.path in self._files:
            await response.send(200, *self._files[request.path])
        elif request.path == "/api/model":
            await response.send_json(200, self.about)
        elif found := _RESULT.fullmatch(request.path):
            file = self.store.get(found[1], int(found[2]))
            if file is None:
                raise Refusal(404, "This answer is not kept any more; run the model again.")
            encoding = {"Content-Encoding": file.encoding} if file.encoding else {}
            # an attachment is never shown as a page of this origin, whatever it holds
            await response.send(200, file.kind, file.content, {"Content-Disposition": "attachment", **encoding})
        else:
            await response.send(200, "image/png", await self._example(request.path))

    async def _example(self, path: str) -> bytes:
        name = path.removeprefix("/api/examples/")
        if name == path or name not in (known := examples()):
            raise Refusal(404, "There is nothing here.")
        if name not in self._examples:
            self._examples[name] = await asyncio.to_thread(lambda: png(known[name].make()))
        return self._examples[name]

    async def _answer(self, request: Request, reader: asyncio.StreamReader, response: Response) -> None:
        """Take a picture, then tell how far it is, a JSON object a line, until it is answered or the client leaves."""
        length = request.length()
        if length > self.uploads.max_bytes:
            raise Refusal(
                413,
                f"The file has {length / 1e6:.1f} MB; this page takes up to {self.uploads.max_bytes / 1e6:g} MB.",
            )
        tasks, options = self._asked(request.query)
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def told() -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(changed.set)

        job = Job(tasks, options, told)
        self.queue.enter(job)
        try:
            if request.headers.get("expect", "").lower() == "100-continue":
                await response.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            content = await read_body(reader, length)
            await asyncio.to_thread(self.uploads.check, content)
            self.queue.ready(job, content)
            await response.start(200, {"Content-Type": "application/x-ndjson"})
            del content  # the queue has it until it is read
            gone = asyncio.ensure_future(_left(reader))
            while job.state not in _END:
                changed.clear()
                await response.write(self._line(job))
                some = asyncio.ensure_future(changed.wait())
                await asyncio.wait({gone, some}, return_when=asyncio.FIRST_COMPLETED)
                some.cancel()
                if gone.done():
                    return
                await asyncio.sleep(_SAID_EVERY)
            gone.cancel()
            await response.write(self._line(job))
        finally:
            self.queue.leave(job)

    def _line(self, job: Job) -> bytes:
        told: dict[str, Any] = {"state": job.state}
        if job.state == "queued":
            told["before"] = self.queue.before(job)
        elif job.state == "running":
            told |= {"stage": job.stage, "share": round(job.share, 3)}
        elif job.state == "failed":
            told["message"] = job.message
        elif job.state == "done":
            told |= job.answer
        return json.dumps(told).encode() + b"\n"

    def _asked(self, query: str) -> tuple[list[str], dict[str, float]]:
        """Tasks and run-time options of ``tasks=a,b&denoising.sigma=25``."""
        try:
            given = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=64))
        except ValueError:
            raise Refusal(400, "The options are malformed.") from None
        known = {task["key"]: task for task in self.about["tasks"]}
        wanted = given.pop("tasks", ",".join(known)).split(",")
        if unknown := [key for key in wanted if key not in known]:
            raise Refusal(400, f"There is no task {unknown[0][:50]!r} here." if unknown[0] else "Choose a task.")
        options: dict[str, float] = {}
        for name, text in given.items():
            key, _, option = name.partition(".")
            if key not in wanted or option not in [one["name"] for one in known[key]["options"]]:
                raise Refusal(400, f"None of the chosen tasks has an option {name[:50]!r}.")
            try:
                options[name] = float(text)
            except ValueError:
                options[name] = math.nan
            if not math.isfinite(options[name]):
                raise Refusal(400, f"{name} is {text[:50]!r}; expected a number.")
        return [key for key in known if key in wanted], options


async def _left(reader: asyncio.StreamReader) -> None:
    """Until the client goes away; it has nothing more to say."""
    with suppress(OSError):
        await reader.read(1)


def _static() -> dict[str, tuple[str, bytes]]:
    """{path: (MIME type, content)} of all that is ever served from files."""
    found = {}
    for file in resources.files("densectx.demo").joinpath("static").iterdir():
        kind = _STATIC.get("." + file.name.rpartition(".")[2])
        if kind is not None:
            found["/" if file.name == "index.html" else f"/{file.name}"] = (kind, file.read_bytes())
    return found
