"""Several processes for one run of ``densectx predict --devices N``: started, watched, and stopped together."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from densectx.errors import DistributedError
from densectx.imports import child_command

LAUNCHED: Final = "DENSECTX_PREDICT_LAUNCHED"  # is set in the processes that are started here
_GRACE: Final = 30.0  # seconds to write the summary in, for those that are told to stop
_LOOK: Final = 0.05  # seconds between two looks
_ENDS: Final = (signal.SIGTERM, signal.SIGHUP)  # which the children, in sessions of their own, do not get


def launch(arguments: Sequence[str], number: int) -> int:
    """Run the command in so many processes, each of which does its share.

    Args:
        arguments: behind ``predict``.
        number: of processes.

    Returns:
        The exit status: the worst of all; 128 + the signal (143, 129) if SIGTERM or SIGHUP ended the run.

    Raises:
        DistributedError: one of them ended early; the others are stopped, what was done is in the summary.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command, common = child_command("-m", "densectx", "predict", *arguments)
    common |= {LAUNCHED: "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    children: list[subprocess.Popen[bytes]] = []
    with _asked_to_end() as asked:
        try:
            for rank in range(number):
                stream = subprocess.DEVNULL if rank else None  # the first one reads the list and prints the summary
                children.append(
                    subprocess.Popen(
                        command,
                        env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=stream,
                        stdout=stream,
                        start_new_session=True,  # an interruption is passed on, once
                    )
                )
            return _watch(children, asked)
        finally:
            _stop(children)


@contextmanager
def _asked_to_end() -> Iterator[list[int]]:
    """Signals that ask this process to end, as they come; they only are noted, so that no child is lost.

    Signals that are ignored stay so, as ``nohup`` wants it. Threads other than the main one cannot have handlers: in
    them nothing is noted.
    """
    asked: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in _ENDS} if main else {}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda number, _: asked.append(number))
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _watch(children: Sequence[subprocess.Popen[bytes]], asked: Sequence[int]) -> int:
    """Wait for all, or until a signal asks to end; the first one ends last, unless something is wrong."""
    while True:
        if asked:
            return 128 + asked[0]
        codes = [child.poll() for child in children]
        early = next((rank for rank, code in enumerate(codes[1:], 1) if code), None)
        if codes[0] is not None and codes[0] < 0:
            early = 0
        if early is not None:
            code = codes[early]
            assert code is not None
            how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
            _stop(children)
            raise DistributedError(
                f"predict: process {early} of {len(children)} {how}, the others are stopped; run the command again,"
                " what is done is skipped."
            )
        if codes[0] is not None:
            return codes[0]
        time.sleep(_LOOK)


def _stop(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """End those that run, politely first."""
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
    until = time.monotonic() + _GRACE
    try:
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(until - time.monotonic(), 0))
    finally:  # a second interruption ends the grace, not the stopping
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
