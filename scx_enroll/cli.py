"""Arguments in, exit status out."""

import argparse
import io
import os
import signal
import sys
import time
from typing import Any, Callable, Dict, List, NoReturn, Optional, Sequence

from scx_enroll import __version__
from scx_enroll.errors import Busy, EnrollError, HostError, Unconfigured, UsageError

MAX_ARGUMENT_BYTES = 1 << 20  # a certificate with its chain has some kB
MAX_WAIT_S = 24 * 3600  # for the lock; a run takes minutes
QUIET_POLL_S = 15.0
MAX_QUIET_S = 30 * 60  # an unattended run waits this long for others to finish with the agent's files

HELP = """usage: scx-enroll [options] VERB [options]

Gets the SCOM agent's certificate signed by AD CS, installs it, and proves that it is served.

  run              make this host match its configuration; with nothing to do, do nothing
    --dry-run      say what would be done, and why
    --now          wait for no poll interval, back-off or quiet files
    --renew        ask for a new certificate at once
    --wait SECONDS wait for another run to end
    --unattended   for the timer: quiet, and status 0 while nothing needs a person
  status           what is installed, served, pending and due
    --json         print facts as JSON; also with run, install, rollback
  csr              print a certificate request for the agent's key
  install FILE     verify a certificate brought by hand, and put it in service
  rollback         go back to what was installed before, prove it, and hold
  hold [REASON]    change nothing until release
  release          end a hold

options:
  --config FILE    instead of /etc/scx-enroll/scx-enroll.conf; conf.d is looked for beside it
  --root DIR       take every path beneath DIR; nothing there is started or probed
  --live           the agent beneath --root runs here: restart and probe it
  --verbose        say why each step was taken, and what it waits for
  --version, --help

exit status: 0 done, 1 bug, 2 usage, 3 configuration, 4 agent, 5 CA unreachable, 6 CA refused, 7 pending,
8 certificate refused, 9 rolled back, 10 rollback failed, 11 busy, 12 this host, 13 sign-in refused
"""


def _say(stream: Any, text: str) -> None:
    """Write and flush; where nobody can be told (the reader has gone, the log's disk is full), the work goes on all the same."""
    try:
        if stream is not None:
            stream.write(text)
            stream.flush()
    except OSError:
        from scx_enroll.rootfs import nowhere

        fd = nowhere()
        os.dup2(fd, stream.fileno())
        os.close(fd)


def _open_standard_files() -> None:
    """See that descriptors 0 to 2 are open: a file of ours under one of these numbers would be written to."""
    from scx_enroll.rootfs import nowhere

    while (fd := nowhere()) <= 2:
        pass
    os.close(fd)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, "see: scx-enroll --help")

    def format_help(self) -> str:
        return HELP

    def _print_message(self, message: str, file: Any = None) -> None:
        _say(file or sys.stdout, message)


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    common.add_argument("--config")
    common.add_argument("--root")
    common.add_argument("--live", action="store_true")
    common.add_argument("--verbose", action="store_true")
    parser = _Parser(prog="scx-enroll", parents=[common], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"scx-enroll {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    made = {}
    for verb in VERBS:
        made[verb] = verbs.add_parser(verb, parents=[common], allow_abbrev=False)
    for option in ("--dry-run", "--now", "--renew", "--unattended"):
        made["run"].add_argument(option, action="store_true")
    for verb in ("run", "install", "rollback", "hold", "release"):
        made[verb].add_argument("--wait", type=_seconds, default=0.0, metavar="SECONDS")
    for verb in ("run", "status", "install", "rollback"):
        made[verb].add_argument("--json", action="store_true", default=argparse.SUPPRESS)
    made["install"].add_argument("file", metavar="FILE")
    made["hold"].add_argument("reason", nargs="?", default="", metavar="REASON")
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= MAX_WAIT_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to {MAX_WAIT_S}")
    return value


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
            from scx_enroll.enroll import Stopped

            raise Stopped

    def die(self) -> NoReturn:
        """End as one that the signal killed."""
        signal.signal(self.caught, signal.SIG_DFL)
        os.kill(os.getpid(), self.caught)
        raise SystemExit(128 + self.caught)


def _progress(*, verbose: bool) -> Callable[[str], None]:
    """Tell a person at a terminal what a long wait is for, each thing once; say nothing to a log unless asked."""
    if not sys.stderr.isatty() and not verbose:
        return lambda _message: None
    told: List[str] = []

    def tell(message: str) -> None:
        if told[-1:] != [message]:
            told.append(message)
            _say(sys.stderr, f"scx-enroll: {message} …\n")

    return tell


class _Call:
    """One call: its arguments, and what the verbs share."""

    def __init__(self, arguments: argparse.Namespace, signals: _Signals) -> None:
        from scx_enroll import enroll, report
        from scx_enroll.plan import Wish
        from scx_enroll.rootfs import Root

        self.enroll, self.report = enroll, report
        self.given: Dict[str, Any] = vars(arguments)
        self.json = self.flag("json")
        self.quiet = self.flag("unattended")
        for option in ("root", "config"):
            if self.given.get(option) == "":
                raise UsageError(f"--{option} is empty", "an unset variable in the shell looks like this")
        if self.flag("live") and "root" not in self.given:
            raise UsageError("--live goes with --root", "without --root this host's own agent is meant anyway")
        self.root = Root(self.given.get("root", "/"), self.flag("live"))
        wish = Wish(now=self.flag("now"), renew=self.flag("renew"))
        self.options = enroll.Options(self.given.get("config", ""), wish, self.given.get("wait", 0.0))
        self.signals = signals
        self.tools = enroll.Tools(waiting=_progress(verbose=self.flag("verbose")), acted=self._acted, stopping=lambda: signals.caught != 0)

    def flag(self, name: str) -> bool:
        """Whether an option without value was given."""
        return bool(self.given.get(name))

    def _acted(self, step: Any) -> None:
        if not self.json:
            _say(sys.stdout, self.report.acted(step, verbose=self.flag("verbose")))

    def end(self, result: Any) -> int:
        """Publish and show the end of a run; returns its exit status."""
        facts = self.report.document(result, self.tools.clock())
        self._publish(facts)
        from scx_enroll.pace import needs_a_person

        status = facts["exit_status"]
        if self.quiet and not needs_a_person(status, result.view.seen.held, self.tools.clock()):
            status = 0
        if self.json:
            _say(sys.stdout, self.report.as_json(facts))
        elif not self.quiet or status or facts["acts"] or self.flag("verbose"):
            stream = sys.stderr if facts["exit_status"] else sys.stdout
            _say(stream, self.report.as_end(facts, failed=result.failure is not None, wished=self.flag("renew")))
        return int(status)

    def _carefully(self, verb: Callable[..., Any], *arguments: Any) -> Any:
        """Carry out a verb that a signal may only end between two steps."""
        self.signals.gentle = True
        try:
            return verb(self.root, self.options, self.tools, *arguments)
        finally:
            self.signals.gentle = False

    def _publish(self, facts: Dict[str, Any]) -> None:
        """Leave the facts for anybody to read; what was done keeps its status where that fails."""
        try:
            self.tools.store(self.root).publish(facts)
        except HostError as problem:
            if "error" not in facts:
                _say(sys.stderr, f"scx-enroll: note: {problem.message}\n")

    def run(self) -> int:
        """Converge; an unattended run waits until others have finished with the agent's files."""
        if self.flag("dry_run"):
            return self._dry_run()
        deadline = time.monotonic() + MAX_QUIET_S
        while True:
            try:
                result = self._carefully(self.enroll.run)
            except EnrollError as error:
                self.given["late"] = self.quiet and self._is_late(error)
                if not isinstance(error, Busy):  # the other run tells
                    self._publish({**self.report.error_document(error), "time": self.tools.clock()})
                raise
            if not self.quiet or result.step.row != "L3" or time.monotonic() >= deadline:
                return self.end(result)
            if self.tools.stopping():
                raise self.enroll.Stopped
            time.sleep(QUIET_POLL_S)

    def _is_late(self, error: EnrollError) -> bool:
        """Say whether a failure that is only waited for needs a person, since what is held runs out."""
        from scx_enroll.pace import needs_a_person

        try:
            held = self.enroll.inspect(self.root, self.options, self.tools).view.seen.held
        except EnrollError:
            return False
        return needs_a_person(error.exit_status, held, self.tools.clock())

    def _dry_run(self) -> int:
        if self.quiet or self.given.get("wait"):
            raise UsageError("--dry-run changes nothing, so it waits for nothing and is never quiet", "leave the other option out")
        result = self.enroll.rehearse(self.root, self.options, self.tools)
        facts = self.report.document(result, self.tools.clock())
        if self.json:
            _say(sys.stdout, self.report.as_json(facts))
        else:
            until = f"\nuntil: {self.report.when(result.step.until)}" if result.step.until else ""
            hint = f"\nhint: {result.step.hint}" if result.step.hint else ""
            _say(sys.stdout, f"{result.step.row} {result.step.action}: {result.step.reason}{until}{hint}\n")
        return 0

    def status(self) -> int:
        """Root looks anew; anybody else is shown what the last run saw."""
        if self.root.path == "/" and os.geteuid() != 0:
            import json

            from scx_enroll.store import MAX_STATE_BYTES, STATUS

            try:
                facts = json.loads(self.root.read(STATUS, MAX_STATE_BYTES, trusted=True))
                shown = self.report.as_status(facts)
            except FileNotFoundError:
                raise HostError("no run has left a status yet", "let root run: scx-enroll run") from None
            except (ValueError, KeyError, TypeError, RecursionError):
                raise HostError(f"{STATUS} is not understood", "let root run: scx-enroll run") from None
        else:
            facts = self.report.document(self.enroll.inspect(self.root, self.options, self.tools), self.tools.clock())
            shown = self.report.as_status(facts)
        _say(sys.stdout, self.report.as_json(facts) if self.json else shown)
        return 0

    def csr(self) -> int:
        """Print a CSR."""
        _say(sys.stdout, self.enroll.make_csr(self.root, self.options, self.tools).decode())
        return 0

    def install(self) -> int:
        """Install a certificate from a file."""
        from scx_enroll.rootfs import read_argument

        name = self.given["file"]
        data = read_argument(name, MAX_ARGUMENT_BYTES)
        return self.end(self._carefully(self.enroll.install, data, name))

    def rollback(self) -> int:
        """Go back and hold."""
        return self.end(self._carefully(self.enroll.roll_back))

    def _no_config(self) -> None:
        if "config" in self.given:
            raise UsageError("hold and release need no configuration", "leave --config out")

    def hold(self) -> int:
        """Hold."""
        given = "".join(letter if letter.isprintable() else " " for letter in self.given["reason"])
        reason = " ".join(given.split()) or "by the operator"
        self._no_config()
        self._carefully(self.enroll.hold, reason)
        _say(sys.stdout, f"scx-enroll: held: {reason}; nothing is changed until: scx-enroll release\n")
        return 0

    def release(self) -> int:
        """End a hold."""
        self._no_config()
        self._carefully(self.enroll.hold, "")
        _say(sys.stdout, "scx-enroll: released; the next run goes on\n")
        return 0


VERBS: Dict[str, Callable[[_Call], int]] = {
    "run": _Call.run,
    "status": _Call.status,
    "csr": _Call.csr,
    "install": _Call.install,
    "rollback": _Call.rollback,
    "hold": _Call.hold,
    "release": _Call.release,
}


def _fail(error: EnrollError, arguments: Optional[argparse.Namespace]) -> int:
    from scx_enroll import report

    given = vars(arguments) if arguments else {}
    if given.get("unattended") and isinstance(error, Unconfigured):
        _say(sys.stdout, f"scx-enroll: not configured yet: {error.message}\n")
        return 0
    from scx_enroll.pace import PATIENT_STATUSES

    if given.get("json"):
        _say(sys.stdout, report.as_json(report.error_document(error)))
    _say(sys.stderr, report.failure(error))
    patient = given.get("unattended") and not given.get("late") and error.exit_status in PATIENT_STATUSES
    return 0 if patient else error.exit_status


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one verb; returns the exit status (docs/exit-status.md)."""
    _open_standard_files()
    signals = _Signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the locale can't show is no defect
    arguments: Optional[argparse.Namespace] = None
    try:
        arguments = _parser().parse_args(argv)
        if arguments.verb is None:
            raise UsageError("no verb was given", "see: scx-enroll --help")
        return VERBS[arguments.verb](_Call(arguments, signals))
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
        _say(sys.stderr, "scx-enroll: stopped by a signal; the next run goes on from here\n")
        signals.die()
