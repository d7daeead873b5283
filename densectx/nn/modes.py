"""Evaluation for a while."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

from torch import nn

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # not in modules: they are copied
_making = threading.Lock()


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every part has the mode that it had, frozen ones their own.

    Threads take turns, a module each: modes, and which of several norm layers runs, are attributes of its parts. A
    process that is forked meanwhile keeps the evaluation mode.
    """
    with ExitStack() as turns:
        for module in sorted(modules, key=id):  # one order for all: else two might wait for each other
            turns.enter_context(_lock(module))
        modes = {part: part.training for module in modules for part in module.modules()}
        for module in modules:
            module.eval()
        try:
            yield
        finally:
            for part, training in modes.items():
                part.training = training


def _lock(module: nn.Module) -> threading.RLock:
    """The lock of a module; one thread may take it again inside."""
    with _making:
        return _locks.setdefault(module, threading.RLock())


def _forget() -> None:
    """New locks in a forked process: those of threads that it does not have would stay taken for ever."""
    global _locks, _making
    _locks, _making = WeakKeyDictionary(), threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_forget)
