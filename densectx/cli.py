"""The command ``densectx``: finds the command's code, imports only that, and turns errors into exit statuses."""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
import traceback
from typing import NoReturn

import densectx
from densectx.data.workers import innermost
from densectx.errors import ConfigError, DensectxError, StorageError, unknown
from densectx.parsing import STATUSES, Parser
from densectx.standard import prepare

COMMANDS = {
    "fit": "train",
    "validate": "measure on the validation split",
    "test": "measure on the test split",
    "predict": "run a model on images, folders or a list of files",
    "export": "write a model as ONNX, torch.export, native code or plain weights",
    "convert": "published weights (Caffe, VGG-16, DRN) into a model file",
    "demo": "a page on this machine to try a model on pictures",
    "report": "a run as one HTML file: curves, scores, best and worst pictures",
    "inspect": "what a model sees and costs: fields, multiply-adds, coverage, shifts; pictures",
    "doctor": "whether this machine, and the cluster around it, can train",
    "shard": "the data of a config as tar shards with an index: few large files",
    "lint": "look the data of a config over before hours of training",
    "list": "what is registered: backbones, contexts, heads, tasks, datasets, losses, balancing, models",
    "show": "origin, options and documentation of one registered name",
}

_MODULES = {
    "predict": "densectx.inference.command",
    "export": "densectx.export.command",
    "convert": "densectx.published.command",
    "demo": "densectx.demo.command",
    "report": "densectx.report.command",
    "inspect": "densectx.inspection.command",
    "shard": "densectx.shard",
    "lint": "densectx.lint",
    "doctor": "densectx.doctor.command",
}
"""Where a command's ``main`` is."""
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit status: 0 done, 2 config or usage, 3 data, 4 checkpoint, 5 plug-in, 6 numeric,
        7 distributed or timeout, 8 storage, 9 out of memory, 130 interrupted, 143 preempted, 1 a bug.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except DensectxError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        sys.stderr.write(f"densectx: error: {innermost(error)}\n")
        return error.status
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        known = _explained(error)
        if known is None or "--debug" in arguments:
            traceback.print_exc()
        if known is None:
            return 1
        sys.stderr.write(f"densectx: error: {known}\n")
        return known.status
    return status


def _explained(error: Exception) -> DensectxError | None:
    """What is known of an error of the system's or torch's, such as a disk that is full, a memory that is too small."""
    if isinstance(error, OSError) and error.errno in _STORAGE:
        return StorageError(f"{error.filename or 'a file'}: {error.strerror}; free space or write elsewhere.")
    if "torch" not in sys.modules:
        return None
    found: DensectxError | None = importlib.import_module("densectx.resilience.failures").explained(error, None)
    return found


def run() -> NoReturn:
    """The command as a process: :func:`main`, and its status as that of the process, whoever reads what it prints.

    After an error the ranks of a run leave at once: their process group still stands, and its threads, where the
    interpreter meets them while it ends, may abort the process (SIGABRT in the place of the status).
    """
    prepare()
    status = main()
    distributed = sys.modules.get("torch.distributed")
    if status and distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    rest = list(arguments)
    while rest[:1] == ["--debug"]:
        rest.pop(0)
    if not rest:
        raise ConfigError(f"no command is given. Commands: {', '.join(COMMANDS)}. `densectx --help` describes them.")
    command, rest = rest[0], rest[1:]
    if command in ("-h", "--help"):
        sys.stdout.write(_help())
    elif command == "--version":
        sys.stdout.write(f"densectx {densectx.__version__}\n")
    elif command in ("fit", "validate", "test"):
        if command == "fit":
            importlib.import_module("densectx.resilience.lock").refuse_held(
                rest
            )  # at once, not after torch is imported
        return int(importlib.import_module("densectx.training").main(command, rest))
    elif command in _MODULES:
        return int(importlib.import_module(_MODULES[command]).main(_without_debug(rest)))
    elif command == "list":
        _list(_without_debug(rest))
    elif command == "show":
        _show(_without_debug(rest))
    else:
        kind = "option" if command.startswith("-") else "command"
        raise ConfigError(unknown(kind, command, [*COMMANDS, "--help", "--version", "--debug"]))
    return 0


def _without_debug(arguments: list[str]) -> list[str]:
    return [argument for argument in arguments if argument != "--debug"]


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: densectx COMMAND ...",
            "",
            "Multi-task dense prediction around one dilated context module.",
            "",
            "commands:",
            *lines,
            "",
            STATUSES,
            "`densectx COMMAND --help` describes a command; --debug prints the traceback of an error; --version.\n",
        ]
    )


def _list(arguments: list[str]) -> None:
    from densectx import listing
    from densectx.registry import REGISTRIES

    parser = Parser("list", description="What is registered, and whether its metadata is in order.")
    parser.add_argument("kind", nargs="?", metavar="KIND", help="one of " + ", ".join(REGISTRIES))
    parser.add_argument("--json", action="store_true", help='print one object with "format": 1')
    parser.add_argument(
        "--check",
        action="store_true",
        help="import what other packages provide, a process a package; what is broken is told, the status stays 0",
    )
    given = parser.parse_args(arguments)
    kinds = list(REGISTRIES) if given.kind is None else [listing.registry_of(given.kind).kind]
    lines = listing.listed(kinds, check=given.check)
    sys.stdout.write(listing.as_json(lines) if given.json else listing.table(lines))


def _show(arguments: list[str]) -> None:
    from densectx import listing

    parser = Parser("show", description="Origin, options and documentation of one registered name.")
    parser.add_argument("kind", metavar="KIND", help="e.g. tasks")
    parser.add_argument("name", metavar="NAME", help="as `densectx list` prints it")
    given = parser.parse_args(arguments)
    sys.stdout.write(listing.shown(given.kind, given.name))
