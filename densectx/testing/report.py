"""Checks by name, what they found, and one message about all of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from densectx.errors import ConfigError, unknown
from densectx.testing.states import preserved

_HERE = Path(__file__).parent


@final
class CheckFailed(AssertionError):
    """One check found something.

    Args:
        found: what is so.
        advice: what to do about it.
    """

    def __init__(self, found: str, advice: str) -> None:
        super().__init__(f"{found} -> {advice}")
        self.found, self.advice = found, advice


@final
class ChecksFailed(AssertionError):
    """What all checks of a part found.

    Args:
        subject: the part, e.g. ``"task 'edges'"``.
        failures: {check: what it found and what to do}.
        ran: number of checks that ran.
        note: a sentence at the end.
    """

    def __init__(self, subject: str, failures: Mapping[str, str], ran: int, note: str = "") -> None:
        lines = [f"{subject}: {len(failures)} of {ran} checks failed"]
        lines += [f"  {name}: {text}" for name, text in failures.items()]
        super().__init__("\n".join([*lines, *([f"  {note}"] if note else [])]))
        self.failures = dict(failures)


@final
@dataclass(frozen=True)
class Check:
    """One check of one part; call it to run it.

    Attributes:
        name: what holds where it passes.
        run: raises AssertionError where it does not hold.
    """

    name: str
    run: Callable[[], None]

    def __call__(self) -> None:
        """Run it; random states and other settings of the process are put back afterwards."""
        with preserved():
            self.run()


def expect(ok: bool, found: str, advice: str) -> None:
    """Fail with what was found and what to do about it, unless ``ok``.

    Raises:
        CheckFailed: not ``ok``.
    """
    if not ok:
        raise CheckFailed(found, advice)


def run_checks(subject: str, checks: Sequence[Check], expected_failed_checks: Mapping[str, str]) -> None:
    """Run all checks and raise one error about those that failed; the first one is needed by all others.

    Args:
        subject: the part, for the message.
        checks: the first one builds the part: where it fails the others are not run.
        expected_failed_checks: {check: reason} that may fail; one that passes all the same is a failure.

    Raises:
        ConfigError: an expected failure that is no check.
        ChecksFailed: every failed check with what was found and what to do.
    """
    names = [check.name for check in checks]
    for name in expected_failed_checks:
        if name not in names:
            raise ConfigError(unknown("check", name, names), "expected_failed_checks")
    failures: dict[str, str] = {}
    for number, check in enumerate(checks):
        said = _failure(check)
        if said and check.name not in expected_failed_checks:
            failures[check.name] = said
        elif not said and check.name in expected_failed_checks:
            reason = expected_failed_checks[check.name]
            failures[check.name] = (
                f"passes, though expected to fail ({reason}) -> take it out of expected_failed_checks"
            )
        if said and number == 0:
            raise ChecksFailed(
                subject, failures or {check.name: said}, 1, f"{len(checks) - 1} more checks need this one."
            )
    if failures:
        raise ChecksFailed(subject, failures, len(checks))


def _failure(check: Check) -> str:
    """What a check found, ``""`` for nothing."""
    try:
        check()
    except CheckFailed as error:
        return str(error)
    except Exception as error:  # the part under test may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame for frame in frames if Path(frame.filename).parent != _HERE] or list(frames)
        last = theirs[-1]
        text = str(error).strip().partition("\n")[0]
        return f"raised {type(error).__name__}: {text} ({last.filename}, line {last.lineno}, in {last.name})"
    return ""
