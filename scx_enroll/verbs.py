"""What each verb does, from its arguments to its exit status: it calls the driver, and shows what came of it."""

import argparse
import os
import sys
import time
from contextlib import suppress
from typing import Any, Callable, Dict, List, Protocol, Sequence

from scx_enroll.errors import Busy, ConfigError, EnrollError, HostError, NeedsPerson, NotServed, Sealed, Unconfigured, UsageError
from scx_enroll.idle import say

MAX_ARGUMENT_BYTES = 1 << 20  # a certificate with its chain has some kB
QUIET_POLL_S = 15.0
MAX_QUIET_S = 30 * 60  # an unattended run waits this long for others to finish with the agent's files, where no timer can


class Signals(Protocol):
    """What asked for the end, 0 for nothing; and whether something is under way that is better finished."""

    caught: int
    gentle: bool


def _progress(*, verbose: bool) -> Callable[[str], None]:
    """Tell a person at a terminal what a long wait is for, each thing once; say nothing to a log unless asked."""
    if not sys.stderr.isatty() and not verbose:
        return lambda _message: None
    told: List[str] = []

    def tell(message: str) -> None:
        if told[-1:] != [message]:
            told.append(message)
            say(sys.stderr, f"scx-enroll: {message} …\n")

    return tell


class Call:
    """One call: its arguments, and what the verbs share."""

    def __init__(self, arguments: argparse.Namespace, signals: Signals) -> None:
        from scx_enroll import enroll, job, report
        from scx_enroll.case import Wish
        from scx_enroll.rootfs import Root

        self.enroll, self.report, self.stopped = enroll, report, job.Stopped
        self.given: Dict[str, Any] = vars(arguments)
        self.json = self.flag("json")
        self.quiet = self.flag("unattended")
        for option in ("root", "config"):
            if self.given.get(option) == "":
                raise UsageError(f"--{option} is empty", "an unset variable in the shell looks like this")
        if self.flag("live") and "root" not in self.given:
            raise UsageError("--live goes with --root", "without --root this host's own agent is meant anyway")
        self.root = Root(self.given.get("root", "/"), self.flag("live"))
        wish = Wish(now=self.flag("now"), renew=self.flag("renew") or self.flag("rekey"), rekey=self.flag("rekey"))
        self.options = job.Options(self.given.get("config", ""), wish, self.given.get("wait", 0.0), self.flag("accept_name"))
        self.signals = signals
        self.told: Any = sys.stdout  # where acts are told
        self.progress = _progress(verbose=self.flag("verbose"))
        self.tools = job.Tools(
            waiting=self._waiting, acted=self._acted, noticed=self._noticed, stopping=lambda: signals.caught != 0, noted=self._noted,
        )

    def flag(self, name: str) -> bool:
        """Whether an option without value was given."""
        return bool(self.given.get(name))

    def _waiting(self, message: str) -> None:
        """Tell what a wait is for. On a system that goes down nothing can be proved any more: what is open stays so for the next boot."""
        if self.signals.caught:
            from scx_enroll import systemd

            if systemd.manages(self.root.path) and systemd.is_going_down():
                raise self.stopped
        self.progress(message)

    def _noted(self, message: str) -> None:
        if not self.json:
            say(self.told, f"scx-enroll: note: {message}\n")

    def _acted(self, step: Any) -> None:
        if not self.json:
            say(self.told, self.report.acted(step, verbose=self.flag("verbose")))

    def _noticed(self, change: Any) -> None:
        if not self.json:
            say(self.told, f"scx-enroll: {change.cause}: {change.what}\n")

    def end(self, result: Any) -> int:
        """Publish and show the end of a run; returns its exit status."""
        facts = self.report.document(result, self.tools.clock())
        self._publish(facts)
        from scx_enroll.pace import needs_a_person

        status = facts["exit_status"]
        if self.quiet and not needs_a_person(status, result.view.seen.held, self.tools.clock(), result.step.retry):
            status = 0
        if self.json:
            say(sys.stdout, self.report.as_json(facts))
        elif not self.quiet or status or facts["acts"] or self.flag("verbose"):
            stream = sys.stderr if facts["exit_status"] else sys.stdout
            wished = "--rekey" if self.options.wish.rekey else "--renew" if self.options.wish.renew else ""
            say(stream, self.report.as_end(facts, failed=result.failure is not None, wished=wished))
        return int(status)

    def _carefully(self, verb: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Carry out a verb that a signal may only end between two steps."""
        self.signals.gentle = True
        try:
            return verb(self.root, self.options, self.tools, *arguments, **named)
        finally:
            self.signals.gentle = False

    def _journal(self) -> Any:
        store = self.tools.store(self.root)
        store.load()
        return store.journal

    def _publish(self, facts: Dict[str, Any]) -> None:
        """Leave the facts for anybody to read; what was done keeps its status where that fails."""
        try:
            self.tools.store(self.root).publish(self.report.as_json(facts))
        except HostError as problem:
            if "error" not in facts:
                say(sys.stderr, f"scx-enroll: note: {problem.message}\n")

    def run(self) -> int:
        """Converge; an unattended run waits until others have finished with the agent's files."""
        self._check_adopt()
        if self.flag("dry_run"):
            return self._dry_run()
        if self.given["adopt"] is not None:
            return self.end(self._carefully(self.enroll.adopt, self.given["adopt"], self.given["ca"] or ""))
        from scx_enroll import unattended

        deadline = time.monotonic() + MAX_QUIET_S
        timed = self.quiet and unattended.is_timed(self.root)
        while True:
            try:
                result = self._carefully(self.enroll.run)
            except EnrollError as error:
                self._failed(error, timed=timed)
                raise
            if not self.quiet or timed or result.step.row != "L3" or time.monotonic() >= deadline:
                status = self.end(result)
                step = result.step
                if not (timed and unattended.look_again(result.status, step.until, self.tools.clock(), others=step.row == "L3")):
                    self._leave_premises(result)
                return status
            if self.tools.stopping():
                raise self.stopped
            unattended.load_everything()
            time.sleep(QUIET_POLL_S)

    def _failed(self, error: EnrollError, *, timed: bool) -> None:
        from scx_enroll import unattended

        # what a restart said differs from one to the next
        told = unattended.is_told(self.root, error.message.partition(":")[0] if isinstance(error, NotServed) else error.message)
        self.given["late"] = self.quiet and self._is_late(error, told=told)
        if not isinstance(error, Busy):  # the other run tells
            self.given["told"] = told
            self._publish({**self.report.error_document(error), "time": self.tools.clock()})
        if isinstance(error, (Unconfigured, Sealed)):
            self._leave_premises(error)
        elif timed:
            unattended.look_again(error.exit_status, None, self.tools.clock())

    def _leave_premises(self, result: Any) -> None:
        from scx_enroll import premises

        config = os.path.abspath(self.options.config) if self.options.config else ""
        with suppress(Exception):  # the run has ended and said so; the next one looks again
            write = premises.of_nothing if isinstance(result, EnrollError) else premises.of
            known = write(self.root, config, result, self.tools.clock())
            if known:
                self.tools.store(self.root).save_premises(known)

    def _check_adopt(self) -> None:
        if self.given["ca"] and self.given["adopt"] is None:
            raise UsageError("--ca says at which CA the request of --adopt is", "give --adopt ID too, or leave --ca out")
        apart = {"adopt": ("dry_run", "unattended", "renew", "rekey", "accept_name"), "accept_name": ("dry_run", "unattended")}
        for first, others in apart.items():
            for option in others:
                if self.given[first] not in (None, False) and self.flag(option):
                    raise UsageError(f"--{first.replace('_', '-')} does not go with --{option.replace('_', '-')}", "leave one of them out")

    def _is_late(self, error: EnrollError, *, told: bool) -> bool:
        """Say whether a failure that is only waited for needs a person, since what is held runs out."""
        from scx_enroll.pace import needs_a_person

        if isinstance(error, NeedsPerson):
            return told or not isinstance(error, NotServed)
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
            say(sys.stdout, self.report.as_json(facts))
        else:
            until = f"\nuntil: {self.report.when(result.step.until)}" if result.step.until else ""
            hint = f"\nhint: {result.step.hint}" if result.step.hint else ""
            say(sys.stdout, f"{result.step.row} {result.step.action}: {result.step.reason}{until}{hint}\n")
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
            try:
                facts = self.report.document(self.enroll.inspect(self.root, self.options, self.tools), self.tools.clock())
            except ConfigError:
                held = self._journal().held(self.tools.clock())
                if held and not self.json:
                    say(sys.stdout, f"held: {held}\n")
                raise
            shown = self.report.as_status(facts)
        say(sys.stdout, self.report.as_json(facts) if self.json else shown)
        return 0

    def csr(self) -> int:
        """Print a CSR."""
        say(sys.stdout, self.enroll.make_csr(self.root, self.options, self.tools).decode())
        return 0

    def install(self) -> int:
        """Install a certificate from a file."""
        from scx_enroll.rootfs import read_argument

        name = self.given["file"]
        data = read_argument(name, MAX_ARGUMENT_BYTES)
        return self.end(self._carefully(self.enroll.install, data, name))

    def submit(self) -> int:
        """Get a certificate for another host's request."""
        from scx_enroll import behalf, request
        from scx_enroll.rootfs import Root, read_argument

        name, output = self.given["file"], self.given.get("output")
        foreign = request.load_csr(read_argument(name, MAX_ARGUMENT_BYTES), name)
        place = self.tools.store(Root("/"))
        if output is not None:  # before anything is asked for
            behalf.check_output(os.path.abspath(output), MAX_ARGUMENT_BYTES)
            place.beside.check_folder(os.path.abspath(output))
        self.told = sys.stderr  # standard output is the certificate's
        try:
            ended = self._carefully(behalf.submit, foreign, self.given["ca"] or "", self.given["adopt"])
        except EnrollError as error:
            raise type(error)(error.message, self.report.for_errand(error.hint, name)) from error
        facts = self.report.errand_document(ended, name, self.tools.clock())
        pems = (facts["certificate"] or "") + facts["chain"]
        if output is not None and pems:
            place.deliver(os.path.abspath(output), pems.encode())
        if self.json:
            say(sys.stdout, self.report.as_json(facts))
        elif output is None:
            say(sys.stdout, pems)
        say(sys.stderr, self.report.as_errand(facts))
        return int(facts["exit_status"])

    def ca_cert(self) -> int:
        """Print the trust for the Management Servers."""
        from scx_enroll import cacert

        found, failures = self._carefully(cacert.show, self.given["ca"] or "", fetch=self.flag("fetch"))
        shown = self.report.as_trust(found, fetched=self.flag("fetch")) if found else ""
        return self._asked(self.report.trust_json(found) if self.json else shown, failures)

    def _asked(self, shown: str, failures: Sequence[EnrollError]) -> int:
        say(sys.stdout, shown)
        for failure in failures:
            say(sys.stderr, self.report.failure(failure))
        return int(failures[0].exit_status) if failures else 0

    def check(self) -> int:
        """Try to sign in at each CA."""
        from scx_enroll import check

        tried = self._carefully(check.check, self.given["ca"] or "", retry=self.flag("retry"))
        shown = check.as_json(tried) if self.json else check.as_text(tried)
        return self._asked(shown, [one.told(alone=len(tried) == 1) for one in tried if one.problem])

    def rollback(self) -> int:
        """Go back and hold."""
        return self.end(self._carefully(self.enroll.roll_back, original=self.flag("original")))

    def _no_config(self) -> None:
        if "config" in self.given:
            raise UsageError("hold and release need no configuration", "leave --config out")

    def hold(self) -> int:
        """Hold."""
        from scx_enroll.arguments import moment

        given = "".join(letter if letter.isprintable() else " " for letter in self.given["reason"])
        reason = " ".join(given.split()) or "by the operator"
        self._no_config()
        until = moment(self.given["until"], self.tools.clock()) if self.given["until"] is not None else 0
        self._carefully(self.enroll.hold, reason, until)
        end = f" {self.report.when(until)}, or until" if until else ""
        say(sys.stdout, f"scx-enroll: held: {reason}; nothing is changed until{end}: scx-enroll release\n")
        return 0

    def release(self) -> int:
        """End a hold, and truces."""
        self._no_config()
        held = self._carefully(self.enroll.hold, "")
        kept = any(skip.retry == "changed" and "rolled back" in skip.message for skip in self._journal().skipped)
        but = "; what was rolled back stays back until: scx-enroll run --now, or --renew" if held and kept else ""
        say(sys.stdout, f"scx-enroll: released; the next run goes on{but}\n" if held else "scx-enroll: not held; nothing was changed\n")
        return 0

    def seal(self) -> int:
        """Prepare an image, or go on with the host that was sealed."""
        from scx_enroll import sealing

        if self.flag("undo"):
            if self.flag("delete_key"):
                raise UsageError("--undo does not go with --delete-key", "leave one of them out")
            undone = self._carefully(self.enroll.seal, lambda site: sealing.unseal(site, self.options.config))
            say(sys.stdout, "scx-enroll: " + ("not sealed any more; the next run goes on\n" if undone else "this host is not sealed\n"))
            return 0
        sealed = self._carefully(self.enroll.seal, lambda site: sealing.seal(site, self.options.config, delete_key=self.flag("delete_key")))
        say(sys.stdout, sealing.told(sealed, self.root.path))
        return 0


VERBS: Dict[str, Callable[[Call], int]] = {
    "run": Call.run,
    "status": Call.status,
    "csr": Call.csr,
    "install": Call.install,
    "submit": Call.submit,
    "ca-cert": Call.ca_cert,
    "check": Call.check,
    "rollback": Call.rollback,
    "hold": Call.hold,
    "release": Call.release,
    "seal": Call.seal,
}
