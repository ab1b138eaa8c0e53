"""Decides the next step from what was observed: pure, so that every decision can be tested and simulated.

The first row that matches in LOCAL, else in CA, is the step. LOCAL serves the best valid certificate that is held,
whatever the certification authority is doing; CA sees to it that a fresh one is held. Every step says why, and *until*
when it would not change by itself. Times are whole seconds since the epoch, handed in.
"""

from dataclasses import dataclass, replace
from typing import Callable, Optional, Tuple, Union

from scx_enroll.journal import (
    DAY_S,
    RESTARTS_PER_DAY,
    RESTARTS_PER_HOUR,
    Backoff,
    Budget,
    Journal,
    Skip,
    free_at,
)
from scx_enroll.pace import DOUBT_S, POLL_S, SHARES, TRUST_SPREAD_S, Held, Policy, due, until_of

MAX_SETTLE_S = 30 * 60  # files that never rest are not waited for any longer
MAX_POSTS_PER_CSR = 2
RESTARTS_HINT = "it goes on by itself then; where nobody asked for so many, find out who changes or stops the agent"
ROLLED_BACK, SIGNIN_REFUSED = 9, 13


@dataclass(frozen=True)
class Observed:
    """What one look at the host found."""

    blocked: str = ""  # why the agent can't be worked on
    blocked_hint: str = ""
    busy: str = ""  # who changes packages now
    changed_at: int = 0  # when somebody else changed the agent's files last, 0 for never
    key: str = ""  # SHA-256 of the public key, "" where there is none
    certificate: str = ""  # SHA-256 of the leaf at the name the agent reads
    held: Tuple[Held, ...] = ()
    stranger: Optional[Held] = None  # the leaf at that name, where it is valid and no generation
    live: bool = True  # the agent of this root runs here
    listening: bool = False
    served: str = ""  # SHA-256 of the leaf
    process: str = "running"  # "running" | "stopped" on purpose | "died"
    inputs: str = ""  # hash of what a request is made from
    trust_changed_at: int = 0  # when the configured roots changed last
    share: int = 0  # this host's place in the spread, 0 .. SHARES - 1

    @property
    def running(self) -> bool:
        """Whether the agent is meant to run here: a stopped one is left stopped."""
        return self.live and (self.listening or self.process != "stopped")


@dataclass(frozen=True)
class Wish:
    """What the operator asked for on the command line."""

    now: bool = False  # wait for no poll interval and no back-off
    renew: bool = False  # a new certificate at once
    hasty: bool = False  # wait for no quiet files
    tried: Tuple[str, ...] = ()  # CAs that failed since: their back-offs count again


@dataclass(frozen=True)
class Step:
    """What to do next, why, and until when nothing else would be decided without a change from outside."""

    row: str
    action: str
    reason: str
    until: Optional[int] = None
    status: int = 0  # exit status of a run that ends with this step
    hint: str = ""
    generation: str = ""
    ca: str = ""


@dataclass(frozen=True)
class _Case:
    seen: Observed
    policy: Policy
    journal: Journal
    budget: Budget
    now: int
    wish: Wish

    @property
    def valid(self) -> Tuple[Held, ...]:
        """Newest issue first; among equals the one obtained last."""
        fit = [held for held in self.seen.held if not held.mismatches]
        return tuple(sorted(fit, key=lambda held: (held.not_before, held.number, held.id), reverse=True))

    def skip(self, held: Held) -> Optional[Skip]:
        """Why this certificate is not installed now; `--now` ends it."""
        for skip in self.journal.skipped:
            if skip.generation == held.id and self._waits(skip) and not self.wish.now:
                return skip
        return None

    def _waits(self, failure: Union[Backoff, Skip]) -> bool:
        until = until_of(failure)
        fresh = until is None or failure.at <= self.now < until  # one of the future was written by a wrong clock
        return failure.inputs == self.seen.inputs and fresh

    @property
    def best(self) -> Optional[Held]:
        return next((held for held in self.valid if not self.skip(held)), None)

    def backoff(self, ca: str) -> Optional[Backoff]:
        """Why this CA is not asked now; `--now` ends a wait, `--renew` also what only other inputs would end."""
        found = []
        for backoff in self.journal.backoffs:
            wished = self.wish.renew or (self.wish.now and backoff.retry != "changed")
            since = backoff.ca in self.wish.tried or (not backoff.ca and self.wish.tried)
            if backoff.ca in (ca, "") and self._waits(backoff) and (since or not wished):
                found.append(backoff)
        return max(reversed(found), key=lambda backoff: backoff.at, default=None)  # the latest failure is the one to tell

    def due(self, held: Held) -> int:
        """When renewal of this certificate is due."""
        return due(held, self.policy, self.seen.share)


# -- local: serve the best valid certificate that is held -----------------------------------------------------------


def interrupted(journal: Journal) -> Optional[Step]:
    """L1; needs no configuration and no observation."""
    state = journal.installation.state
    if state == "settled":
        return None
    return Step("L1", "recover", f"an earlier run was interrupted in state {state}")


def _interrupted(case: _Case) -> Optional[Step]:
    return interrupted(case.journal)


def _agent_missing(case: _Case) -> Optional[Step]:
    if not case.seen.blocked:
        return None
    return Step("L2", "wait", case.seen.blocked, status=4, hint=case.seen.blocked_hint)


def _others_at_work(case: _Case) -> Optional[Step]:
    seen = case.seen
    if seen.busy:
        return Step("L3", "wait", seen.busy, status=4, hint="run again when the package manager has finished")
    quiet_at = seen.changed_at + min(case.policy.settle_s, MAX_SETTLE_S)
    if case.wish.hasty or not seen.changed_at or not seen.changed_at <= case.now < quiet_at:
        return None
    reason = f"the agent's files changed {case.now - seen.changed_at} s ago and must be quiet for {case.policy.settle_s} s"
    return Step("L3", "wait", reason, until=quiet_at, status=4, hint="run again then, or now with --now")


def _held_by_operator(case: _Case) -> Optional[Step]:
    if not case.journal.hold:
        return None
    status = 4 if case.wish.renew else 0  # what was asked for was not done
    return Step("L4", "hold", f"held: {case.journal.hold}", status=status, hint="scx-enroll release")


def _no_key(case: _Case) -> Optional[Step]:
    return None if case.seen.key else Step("L5", "make_key", "the agent has no key")


def _adoptable(case: _Case) -> Optional[Step]:
    if not case.seen.stranger:
        return None
    return Step("L7", "adopt", "a valid certificate is installed that is not in our records")


def _not_installed(case: _Case) -> Optional[Step]:
    best, seen = case.best, case.seen
    if best is None or seen.certificate == best.leaf:
        return None
    step = Step("L7", "install", f"generation {best.id} is valid and not in place", generation=best.id)
    return _within_restarts(case, step, 2) if seen.running else step


def _not_served(case: _Case) -> Optional[Step]:
    best, seen = case.best, case.seen
    if best is None or not seen.live or not seen.listening or seen.served == best.leaf:
        return None
    reason = f"the agent serves {seen.served[:16] or 'no TLS'} instead of {best.id}"
    return _within_restarts(case, Step("L8", "restart", reason, generation=best.id), 1)


def _not_listening(case: _Case) -> Optional[Step]:
    best, seen = case.best, case.seen
    if best is None or seen.listening or not seen.running:
        return None
    return _within_restarts(case, Step("L9", "restart", "nothing listens on the agent's port", generation=best.id), 1)


NEEDS = {1: "a restart", 2: "two: one to go and one to come back"}


def _within_restarts(case: _Case, step: Step, needed: int) -> Step:
    until = case.budget.restarts_until(needed)
    if until <= case.now:
        return step
    spent = f"the restart budget ({RESTARTS_PER_HOUR} an hour, {RESTARTS_PER_DAY} a day) has no room for {NEEDS[needed]}"
    reason = f"{step.reason}, but {spent}"
    return Step(step.row, "wait", reason, until=until, status=4, hint=RESTARTS_HINT)


# -- the certification authority: hold a fresh certificate for what is wanted ---------------------------------------


def _pending(case: _Case) -> Optional[Step]:
    request = case.journal.request
    if request.state != "submitted":
        return None
    what = f"request ID {request.id} at {request.ca}"
    if request.ca not in case.policy.cas:
        return Step("C1", "abandon", f"{what} is abandoned: that CA is not configured any more")
    if request.spki != case.seen.key:
        return Step("C1", "abandon", f"{what} is abandoned: the agent has another key now")
    if case.now >= request.since + case.policy.pending_s:
        return Step("C1", "abandon", f"{what} is abandoned: not issued within {case.policy.pending_s // DAY_S} days")
    refused = _signin_refused(case, request.ca)
    if refused:
        return replace(refused, row="C1")
    if case.wish.now or not case.now < request.next <= case.now + POLL_S[1]:
        return Step("C1", "poll", f"{what} is asked for")
    until = min(request.next, request.since + case.policy.pending_s)
    if request.pending:
        hint = f"the operator of {request.ca} must issue or deny request ID {request.id}; then: scx-enroll run --now"
        return Step("C1", "wait", f"{what} is pending", until=until, status=7, hint=hint)
    hint = "it is asked for again by itself, or now with: scx-enroll run --now"
    return Step("C1", "wait", f"{what} was not fetched: {request.why}", until=until, status=5, hint=hint)


def _signin_refused(case: _Case, ca: str) -> Optional[Step]:
    """Not even a poll is sent with a password that was refused: accounts lock."""
    backoff = case.backoff(ca)
    if backoff is None or backoff.status != SIGNIN_REFUSED:
        return None
    return Step("C2", "wait", backoff.message, until=until_of(backoff), status=backoff.status, hint=backoff.hint)


def _doubtful(case: _Case) -> Optional[Step]:
    request = case.journal.request
    if request.state == "submitting":
        return Step("C2", "lost", "an earlier run was killed while it submitted a request")
    if request.state != "doubtful":
        return None
    if request.ca not in case.policy.cas or request.spki != case.seen.key:
        return Step("C2", "abandon", "the doubtful request is abandoned: its CA or its key is not ours any more")
    ends = request.since + DOUBT_S
    if not request.since - DOUBT_S <= case.now < ends:
        return Step("C2", "abandon", "the doubtful request is abandoned after a day")
    again = min(request.next, ends) if request.tries < MAX_POSTS_PER_CSR else ends
    if case.now < again:
        reason = f"it is doubtful whether {request.ca} stored a request: {request.why}"
        hint = f"look for this host's request on {request.ca}; the next attempt follows by itself"
        return Step("C2", "wait", reason, until=again, status=5, hint=hint)
    refused = _signin_refused(case, request.ca)
    if refused:
        return replace(refused, until=min(refused.until or ends, ends))
    over = _over_budget(case, "C2")
    if over:
        return replace(over, until=min(over.until or ends, ends))
    return Step("C2", "repeat", "the same CSR is submitted once more", ca=request.ca)


def _refused(case: _Case) -> Optional[Step]:
    for ca in case.policy.cas:
        backoff = case.backoff(ca)
        if backoff and backoff.status == 8:
            return Step("C3", "wait", backoff.message, status=8, hint=backoff.hint)
    return None


def _needed(case: _Case) -> Optional[Step]:
    newest = case.valid[0] if case.valid else None
    if newest is None and _displaced(case) and not (case.wish.now or case.wish.renew):
        spread_until = case.seen.trust_changed_at + TRUST_SPREAD_S * case.seen.share // SHARES
        if case.now < spread_until:
            reason = "the certificate in service leads to none of the configured roots; its renewal is spread over days"
            return Step("C5", "nothing", reason, until=spread_until)
    if newest is None:
        reason = "no valid certificate is held"
    elif case.wish.renew:
        reason = "a new certificate was asked for"
    elif case.now >= case.due(newest):
        reason = f"renewal of generation {newest.id} is due"
    else:
        return None
    over = _over_budget(case, "C4")
    if over:
        return over
    step = Step("C4", "submit", reason)
    if case.seen.running and case.budget.restarts_until(2) > case.now:
        return _within_restarts(case, step, 2)  # a certificate that can't be installed is not worth a request
    waits = []
    for ca in case.policy.cas:
        backoff = case.backoff(ca)
        if backoff is None:
            return replace(step, ca=ca)
        waits.append(backoff)
    untils = [until for until in map(until_of, waits) if until is not None]
    first = waits[0]
    until = min(untils, default=None)
    return Step("C4", "wait", first.message, until=until, status=first.status, hint=first.hint)


def _soonest(case: _Case, until: Optional[int]) -> Optional[int]:
    """Return `until`, or an earlier moment at which another certificate that is held comes into question."""
    skips = [case.skip(held) for held in case.valid]
    moments = [until, *(until_of(skip) for skip in skips if skip)]
    return min((moment for moment in moments if moment is not None and moment > case.now), default=None)


def _displaced(case: _Case) -> bool:
    """Say whether what is installed lost nothing but its root: the configured roots changed, the certificate did not."""
    return any(
        held.leaf == case.seen.certificate and held.mismatches and all(what.startswith("path:") for what in held.mismatches)
        for held in case.seen.held
    )


def _over_budget(case: _Case, row: str) -> Optional[Step]:
    policy, sent = case.policy, case.budget.submissions
    until = max(
        free_at((s.at for s in sent if s.counts), policy.certificates_per_day - 1, DAY_S),
        free_at((s.at for s in sent), policy.submissions_per_day - 1, DAY_S),
    )
    if until <= case.now:
        return None
    last = next((b for b in case.journal.backoffs if b.inputs == case.seen.inputs), None)
    reason = (
        f"the submission budget is spent ({policy.certificates_per_day} certificates and "
        f"{policy.submissions_per_day} submissions a day)" + (f"; the last failure: {last.message}" if last else "")
    )
    return Step(row, "wait", reason, until=until, status=last.status if last else 6, hint="mend the cause meanwhile")


def _nothing(case: _Case) -> Step:
    newest = case.valid[0]
    skip = case.skip(newest)
    if skip:
        status = skip.status or (0 if case.best else ROLLED_BACK)  # put aside by the operator, with nothing valid in its place
        hint = "mend the cause, then: scx-enroll run --now"
        return Step("C5", "wait", skip.message, until=case.due(newest), status=status, hint=hint, generation=newest.id)
    return Step(
        "C5", "nothing", f"generation {newest.id} is valid and in service"
        if case.seen.served == newest.leaf else f"generation {newest.id} is valid and installed, not proven",
        until=case.due(newest), generation=newest.id,
    )


Row = Callable[[_Case], Optional[Step]]

LOCAL: Tuple[Row, ...] = (
    _interrupted, _agent_missing, _held_by_operator, _others_at_work, _no_key, _adoptable, _not_installed, _not_served,
    _not_listening,
)
CA: Tuple[Row, ...] = (_pending, _doubtful, _refused, _needed, _nothing)


def decide(seen: Observed, policy: Policy, journal: Journal, budget: Budget, now: int, wish: Wish = Wish()) -> Step:
    """Return the next step: the first row that matches in LOCAL, else in CA."""
    case = _Case(seen, policy, journal, budget.current(now), now, wish)
    step = next(step for step in (row(case) for row in (*LOCAL, *CA)) if step)
    waits = step.action in ("wait", "nothing") and step.row not in ("L2", "L3")
    return replace(step, until=_soonest(case, step.until)) if waits else step
