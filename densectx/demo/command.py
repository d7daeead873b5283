"""The command ``densectx demo``: its arguments, the model, the server until it is interrupted."""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, final

from densectx.demo.store import FORGET_EVERY
from densectx.errors import ConfigError
from densectx.model_names import where_to_get
from densectx.parsing import Parser
from densectx.registry import MODELS

if TYPE_CHECKING:
    from densectx.demo.server import Server

DEFAULT: Final = "multitask"
"""The model that is shown if none is given."""

_PORT: Final = 8765
_END_SECONDS: Final = 3.0  # for the layer of the network that is running


def main(argv: Sequence[str]) -> int:
    """Serve the page until the process is interrupted.

    Args:
        argv: the arguments behind ``demo``.

    Returns:
        The exit status 0, after ``--help`` only: SIGINT ends it with ``KeyboardInterrupt``, status 130.

    Raises:
        ConfigError: an argument, no model, an address that cannot be had.
        CheckpointError, PluginError: the model cannot be loaded.
    """
    given = _parsed(argv)
    name = given.model or _default()
    with _listening(given.host, given.port) as listening:
        from densectx.demo.build import Limits, build  # torch only now: --help and usage errors are quick

        limits = Limits(given.max_mb, given.max_mpx, given.queue)
        tasks = None if given.tasks is None else [key.strip() for key in given.tasks.split(",")]
        server = build(name, tasks, given.device, limits)
        try:
            asyncio.run(_serve(server, listening))
        finally:
            server.queue.close(_END_SECONDS)
    return 0


def _listening(host: str, port: int) -> socket.socket:
    """Before the model is loaded: what cannot be had is said at once."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot be had ({error.strerror or error}); --port 0 takes any free port."
        ) from None


async def _serve(server: Server, listening: socket.socket) -> None:
    host = listening.getsockname()[0]
    answering = await server.start(listening)
    shown = f"[{host}]" if ":" in host else host
    about = server.about
    keys = ", ".join(task["key"] for task in about["tasks"])
    sys.stdout.write(f"{about['name']}: {keys}, on {about['device']}\n")
    sys.stdout.write(f"http://{shown}:{server.port}/   (Ctrl-C ends it)\n")
    sys.stdout.flush()
    try:
        while True:  # serve_forever would wait for every open connection at the end
            await asyncio.sleep(FORGET_EVERY)
            server.store.forget()
    finally:
        answering.close()


def _default() -> str:
    if DEFAULT in MODELS.names():
        return DEFAULT
    others = [entry.name for entry in MODELS.entries() if entry.entry_point is not None]
    named = f"densectx demo {others[0]}" if others else "densectx demo runs/quickstart/0"
    raise ConfigError(
        f"demo: no MODEL is given and no package provides the model {DEFAULT!r}.{where_to_get(DEFAULT)} Give a run"
        f" folder, a checkpoint, a .safetensors file or a model name: {named}."
        + (f" Installed packages have {', '.join(others)} (`densectx list models`)." if others else "")
    )


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "demo",
        description="A page on this machine to try a model on pictures. Nothing leaves the machine, and only this"
        " machine reaches the page; from another one: ssh -L PORT:127.0.0.1:PORT THIS_MACHINE.",
        epilog="Exit status: 130 after Ctrl-C, 2 also where the port is taken; `densectx --help` lists all.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"checkpoint, .safetensors file, run folder or model name (default: {DEFAULT}, if it is installed)",
    )
    parser.add_argument("--port", type=_whole(0, 65535), default=_PORT, help="0 takes any free port (%(default)s)")
    parser.add_argument("--host", choices=("127.0.0.1", "::1"), default="127.0.0.1", help="of this machine, always")
    parser.add_argument("--tasks", metavar="A,B", help="tasks to offer (default: all of the model)")
    parser.add_argument("--device", default="auto", help="auto (cuda if there is one, else cpu), cpu, cuda, ...")
    parser.add_argument("--max-mb", type=_positive, default=20.0, metavar="MB", help="of a file (%(default)g)")
    parser.add_argument(
        "--max-mpx", type=_positive, default=40.0, metavar="MPX", help="million pixels of a picture (%(default)g)"
    )
    parser.add_argument(
        "--queue", type=_whole(0, 1000), default=8, metavar="N", help="pictures that may wait (%(default)s)"
    )
    parser.add_allow_import("let the model name PKG.module:Attr")
    return parser.parse(argv)


@final
class _whole:  # noqa: N801 - a type of argparse
    """A whole number between two, both included."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high

    def __call__(self, text: str) -> int:
        value = int(text) if text.isascii() and text.isdigit() else -1
        if not self.low <= value <= self.high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {self.low} to {self.high}, got {text!r}")
        return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value
