"""As much of HTTP/1.1 as one page needs (RFC 9112): a request a connection, every part bounded in bytes and time."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, final

HEAD_BYTES: Final = 1 << 14
"""A longer request line with headers is refused; also how much is read ahead."""
HEAD_SECONDS: Final = 10.0
"""From the start of a connection to the end of its headers."""
BODY_SECONDS, BODY_RATE = 10.0, 1 << 18
"""A body may take so long, and a second more for so many bytes."""
WRITE_SECONDS: Final = 15.0
"""Within which a client must take some of what it is sent."""
LINGER_SECONDS, LINGER_BYTES = 2.0, 1 << 26
"""What a refused client still sends is read for so long, else it would never see why."""

_CHUNK: Final = 1 << 16
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TARGET: Final = re.compile(r"/[!-~]{0,2000}")


class Refusal(Exception):
    """An answer that is an error: status, words for the user, and headers."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


@final
@dataclass(frozen=True)
class Request:
    """The head of a request.

    Attributes:
        method: in capitals.
        path: of the target, as it was sent: nothing is decoded, so nothing can be smuggled through an encoding.
        query: behind the ``?``.
        headers: by lower-case name.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]

    def length(self) -> int:
        """Bytes of the body.

        Raises:
            Refusal: not said, or not said once in plain digits.
        """
        if "transfer-encoding" in self.headers:
            raise Refusal(411, "Send the picture with its length, not in chunks.")
        text = self.headers.get("content-length")
        if text is None:
            raise Refusal(411, "The length of the picture is missing.")
        if not re.fullmatch(r"[0-9]{1,15}", text):
            raise Refusal(400, "The length of the picture is no number.")
        return int(text)


async def read_head(reader: asyncio.StreamReader) -> Request | None:
    """The head of a request; None if the client went without one.

    Raises:
        Refusal: too long, too slow, or malformed.
    """
    try:
        async with asyncio.timeout(HEAD_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    except asyncio.LimitOverrunError:
        raise Refusal(431, "The head of the request is too long.") from None
    except TimeoutError:
        raise Refusal(408, "The request took too long.") from None
    return parse_head(head)


def parse_head(head: bytes) -> Request:
    """A request line and headers, up to the empty line.

    Raises:
        Refusal: malformed, or a header that must be unique is given twice.
    """
    try:
        first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        method, target, version = first.split(" ")
    except ValueError:
        raise Refusal(400, "Not an HTTP request.") from None
    if version not in ("HTTP/1.1", "HTTP/1.0") or not _TOKEN.fullmatch(method) or not _TARGET.fullmatch(target):
        raise Refusal(400, "Not a request that is understood here.")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name = name.lower()
        if not colon or not _TOKEN.fullmatch(name) or re.search(r"[\0\r\n]", value):
            raise Refusal(400, "A header of the request is malformed.")
        if name in headers and name in ("host", "origin", "content-length", "transfer-encoding", "content-type"):
            raise Refusal(400, f"The header {name} is given twice.")
        headers[name] = value.strip(" \t")
    path, _, query = target.partition("?")
    return Request(method, path, query, headers)


async def read_body(reader: asyncio.StreamReader, length: int) -> bytes:
    """The body of a request.

    Raises:
        Refusal: too slow.
        asyncio.IncompleteReadError: the client went away.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS + length / BODY_RATE):
            return await reader.readexactly(length)
    except TimeoutError:
        raise Refusal(408, "The picture took too long to arrive.") from None


@final
class Response:
    """Writes one answer, after which the connection is closed.

    Args:
        writer: of the connection.
        headers: that every answer has.
        head_only: of a request by HEAD.
    """

    def __init__(self, writer: asyncio.StreamWriter, headers: Mapping[str, str], *, head_only: bool = False) -> None:
        self.writer, self.headers, self.head_only = writer, dict(headers), head_only

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Status line and headers."""
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        lines += [f"{name}: {value}" for name, value in {**self.headers, **headers, "Connection": "close"}.items()]
        await self.write("\r\n".join([*lines, "", ""]).encode("ascii"))

    async def write(self, content: bytes) -> None:
        """Some of the body, no faster than the client takes it.

        Raises:
            ConnectionError: the client is gone, or does not take it.
        """
        for start in range(0, len(content), _CHUNK):
            self.writer.write(content[start : start + _CHUNK])
            try:
                async with asyncio.timeout(WRITE_SECONDS):
                    await self.writer.drain()
            except TimeoutError:
                raise ConnectionResetError("the client takes nothing") from None

    async def send(self, status: int, kind: str, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        """A whole answer."""
        about = {"Content-Type": kind, "Content-Length": str(len(content))}
        await self.start(status, {**about, **(headers or {})})
        if not self.head_only:
            await self.write(content)

    async def send_json(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        """A whole answer in JSON."""
        await self.send(status, "application/json", json.dumps(value).encode(), headers)


async def linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read and forget what a client goes on to send: closing at once would reset the connection over the answer."""
    with suppress(TimeoutError, OSError):
        if writer.can_write_eof():
            writer.write_eof()
        async with asyncio.timeout(LINGER_SECONDS):
            left = LINGER_BYTES
            while left > 0 and (chunk := await reader.read(_CHUNK)):
                left -= len(chunk)
