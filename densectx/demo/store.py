"""Answers for as long as somebody may fetch them: in memory, bounded, under names that nobody guesses."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, final

SECONDS: Final = 1800.0
"""After which an answer is forgotten."""
FORGET_EVERY: Final = 5.0
"""Seconds after which whoever has a store lets it forget, whether or not anybody asks for an answer."""
BYTES: Final = 512 << 20
"""Of all answers together; the oldest go first."""


@final
@dataclass(frozen=True)
class Stored:
    """One file: its MIME type, its content, and an encoding of that (``deflate``) or ``""``."""

    kind: str
    content: bytes
    encoding: str = ""


class _Kept(NamedTuple):
    until: float
    files: tuple[Stored, ...]

    @property
    def size(self) -> int:
        return sum(len(file.content) for file in self.files)


@final
class Store:
    """Files by an unguessable token (128 bits) and a number.

    Args:
        limit: bytes of all files together.
        seconds: that they are kept.
        clock: seconds that only go up.
    """

    def __init__(
        self, limit: int = BYTES, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limit, self.seconds, self._clock = limit, seconds, clock
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.Lock()

    def add(self, files: Sequence[Stored]) -> str:
        """Keep files of one answer, forget what is old; their token."""
        token = secrets.token_urlsafe(16)
        with self._lock:
            self._kept[token] = _Kept(self._clock() + self.seconds, tuple(files))
            self._forget()
        return token

    def get(self, token: str, number: int) -> Stored | None:
        """A file, or None where there is none (any more)."""
        with self._lock:
            self._forget()
            kept = self._kept.get(token)
        return kept.files[number] if kept is not None and 0 <= number < len(kept.files) else None

    def forget(self) -> None:
        """Let go of what is old; otherwise that waits until a file is kept or asked for."""
        with self._lock:
            self._forget()

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        with self._lock:
            self._forget()
            return sum(kept.size for kept in self._kept.values())

    def _forget(self) -> None:
        now = self._clock()
        for token in [token for token, kept in self._kept.items() if kept.until <= now]:
            del self._kept[token]
        total = sum(kept.size for kept in self._kept.values())
        while total > self.limit and len(self._kept) > 1:  # the newest stays: its page is about to fetch it
            total -= self._kept.pop(next(iter(self._kept))).size
