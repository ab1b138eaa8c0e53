"""Arguments in, exit status out."""

import argparse
import os
import signal
import sys
from contextlib import suppress
from typing import Any, NoReturn, Optional, Sequence

from scx_enroll.arguments import parser
from scx_enroll.errors import EnrollError, Sealed, Unconfigured, UsageError
from scx_enroll.idle import open_standard_files, say

PR_SET_DUMPABLE = 4  # prctl(2); what is started from here begins as usual


class _Signals:
    """The first SIGTERM or Ctrl-C ends the run after the step in hand; a second one at once, for the next run to mend."""

    def __init__(self) -> None:
        self.caught = 0
        self.gentle = False  # something is under way that is better finished
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._catch)

    def _catch(self, number: int, _frame: Any) -> None:
        again, self.caught = self.caught, number
        if again or not self.gentle:
            from scx_enroll.job import Stopped

            raise Stopped

    def die(self) -> NoReturn:
        """End as one that the signal killed."""
        signal.signal(self.caught, signal.SIG_DFL)
        os.kill(os.getpid(), self.caught)
        raise SystemExit(128 + self.caught)


def _fail(error: EnrollError, arguments: Optional[argparse.Namespace]) -> int:
    from scx_enroll import report

    given = vars(arguments) if arguments else {}
    if given.get("unattended") and isinstance(error, (Unconfigured, Sealed)):
        if not given.get("told"):
            say(sys.stdout, f"scx-enroll: {'' if isinstance(error, Sealed) else 'not configured yet: '}{error.message}\n")
        return 0
    from scx_enroll.pace import PATIENT_STATUSES

    if given.get("json"):
        say(sys.stdout, report.as_json(report.error_document(error)))
    say(sys.stderr, report.failure(error))
    patient = given.get("unattended") and not given.get("late") and error.exit_status in PATIENT_STATUSES
    return 0 if patient else error.exit_status


def _leave_no_core() -> None:
    """Keys and passwords pass through this process: its memory goes into no core dump, and is shown to root alone."""
    with suppress(ImportError, OSError, AttributeError, MemoryError):  # a Python or a C library without it
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one verb; returns the exit status (docs/exit-status.md)."""
    open_standard_files()
    _leave_no_core()
    signals = _Signals()
    arguments: Optional[argparse.Namespace] = None
    try:
        arguments = parser().parse_args(argv)
        if arguments.verb is None:
            raise UsageError("no verb was given", "see: scx-enroll --help")
        if arguments.verb == "idle":
            from scx_enroll import unattended

            return unattended.idle(vars(arguments))
        from scx_enroll.verbs import VERBS, Call

        return VERBS[arguments.verb](Call(arguments, signals))
    except EnrollError as error:
        return _fail(error, arguments)
    except Exception as error:
        if arguments is not None and vars(arguments).get("verbose"):
            raise
        kind = type(error).__name__
        return _fail(EnrollError(f"a defect of scx-enroll: {kind}: {error}", "run again with --verbose, and report it"), arguments)
    except BaseException as end:
        if isinstance(end, SystemExit) or not signals.caught:
            raise
        say(sys.stderr, "scx-enroll: stopped by a signal; the next run goes on from here\n")
        signals.die()
