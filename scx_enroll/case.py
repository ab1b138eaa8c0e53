"""What a decision rests on: what was observed, what was asked for, what is remembered, and the time; and a step, its result.

Pure; times are whole seconds since the epoch, handed in.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Optional, Tuple, Union

from scx_enroll.journal import RESTARTS_PER_DAY, RESTARTS_PER_HOUR, Backoff, Budget, Fight, Identity, Journal, Skip
from scx_enroll.pace import PERSON, Held, Policy, due, expiry, until_of

NOBODY = Identity()
GUARDED = ("changed", "key")  # not tried again because a command is repeated: accounts lock
RESTARTS_AGAIN = "run it again then; where nobody asked for so many, find out who changes or stops the agent"
RESTARTS_HINT = "it goes on by itself then; where nobody asked for so many, find out who changes or stops the agent"


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
    names: Tuple[str, ...] = ()  # that the certificate shall hold
    trust_changed_at: int = 0  # when the configured roots changed last
    share: int = 0  # this host's place in the spread, 0 .. SHARES - 1
    served_until: int = 0  # when the certificate served expires
    aside: bool = False  # a package script moved the agent's pair aside and left it there
    loadable: bool = True  # there are certificate and key, and they belong together: the agent can start
    identity: Identity = NOBODY  # of this machine, as far as it is known now
    foreign_key: str = ""  # why the agent's key must not be used
    staged: str = ""  # SHA-256 of the public key that waits for its certificate, "" where there is none
    locked: str = ""  # what the agent's account can't get at
    locked_hint: str = ""
    spoilt: str = ""  # why the right certificate stands at its name, and can't stay so
    copies: Tuple[str, ...] = ()  # leaves of which a sound copy of ours stands beside that name
    problems: Tuple[str, ...] = ()  # what is wrong with the certificate at that name
    lasting: bool = False  # no time mends what `blocked` tells

    @property
    def running(self) -> bool:
        """Whether the agent is meant to run here: a stopped one is left stopped."""
        return self.live and (self.listening or self.process != "stopped")


@dataclass(frozen=True)
class Wish:
    """What the operator asked for on the command line."""

    now: bool = False  # wait for no poll interval and no back-off
    renew: bool = False  # a new certificate at once
    rekey: bool = False  # with a new key; renew is set, too
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
    due: int = 0  # of a submission: when the renewal was planned
    retry: str = ""  # of a wait: how (pace.patience), pace.PERSON, or WINDOW
    new_key: bool = False  # of a submission: for a key to be made


@dataclass(frozen=True)
class Case:
    """All that a decision rests on."""

    seen: Observed
    policy: Policy
    journal: Journal
    budget: Budget
    now: int
    wish: Wish

    @cached_property
    def valid(self) -> Tuple[Held, ...]:
        """Newest issue first; among equals the one obtained last."""
        fit = [held for held in self.seen.held if not held.mismatches]
        return tuple(sorted(fit, key=lambda held: (held.not_before, held.number, held.id), reverse=True))

    def skip(self, held: Held) -> Optional[Skip]:
        """Why this certificate is not installed now; `--now` ends it."""
        for skip in self.journal.skipped:
            if skip.generation == held.id and self.waits(skip) and not self.wish.now:
                return skip
        return None

    def until(self, failure: Union[Backoff, Skip]) -> Optional[int]:
        """Return when a failure is forgotten by itself, None for never."""
        return until_of(failure, expiry(self.seen.held))

    def waits(self, failure: Union[Backoff, Skip]) -> bool:
        """Whether a failure still keeps us from trying again."""
        until = self.until(failure)
        fresh = until is None or failure.at <= self.now < until  # one of the future was written by a wrong clock
        return fresh and (failure.inputs == self.seen.inputs or bool(getattr(failure, "secret", "")))

    @cached_property
    def best(self) -> Optional[Held]:
        """The certificate that is to be in service."""
        return next((held for held in self.valid if not self.skip(held)), None)

    def backoff(self, ca: str) -> Optional[Backoff]:
        """Why this CA is not asked now; `--now` ends a wait, `--renew` also what only other inputs would end."""
        found = []
        for backoff in (*self.journal.backoffs, *self.budget.refused):
            wished = self.wish.renew or (self.wish.now and backoff.retry not in GUARDED)
            since = backoff.ca in self.wish.tried or (not backoff.ca and self.wish.tried)
            if backoff.ca in (ca, "") and self.waits(backoff) and (since or not wished):
                found.append(backoff)
        return max(reversed(found), key=lambda backoff: backoff.at, default=None)  # the latest failure is the one to tell

    def refused_secret(self, ca: str) -> bool:
        """Whether this CA has refused the password or key that it would be given, and was not asked since."""
        return ca not in self.wish.tried and any(refused.ca == ca for refused in self.budget.refused)

    @property
    def once(self) -> bool:
        """Whether this run alone was told to do it: a later one would not go on."""
        skipped = self.wish.now and self.best and any(s.generation == self.best.id and self.waits(s) for s in self.journal.skipped)
        return self.wish.renew or bool(skipped)

    def truce(self, name: str) -> Optional[Fight]:
        """Return the fight over one of the agent's two names in which nothing is done to it now; `--now` does not end it."""
        return next((f for f in self.journal.fights if f.name == name and f.at <= self.now < f.until), None)

    def due(self, held: Held) -> int:
        """When renewal of this certificate is due."""
        return due(held, self.policy, self.seen.share)


def waits_for_window(case: Case) -> bool:
    """Say whether a restart is left to the restart window: what is served now must be good until then."""
    seen, opens = case.seen, case.policy.opens
    revoked = any(held.revoked for held in seen.held if held.leaf == seen.served)
    shared = bool(seen.foreign_key)  # another host may have the key
    return opens > case.now and bool(seen.served) and seen.served_until > opens and not revoked and not shared


WINDOW = "window"  # the restart window is waited for, which keeps nobody from asking a CA
NEEDS = {1: "a restart", 2: "two: one to go and one to come back"}


def within_restarts(case: Case, step: Step, needed: int) -> Step:
    """Return the step, or the wait for the restart window, or for the restarts that it may need."""
    if waits_for_window(case):
        hint = "it goes on by itself then, or as soon as the agent serves nothing; a rollback does not wait"
        reason = f"{step.reason}, and the agent is restarted in restart-window only"
        return Step(step.row, "wait", reason, case.policy.opens, 4, hint, retry=WINDOW)
    return within_budget(case, step, needed)


def within_budget(case: Case, step: Step, needed: int) -> Step:
    """Return the step, or the wait for the restarts that it may need."""
    until = case.budget.restarts_until(needed)
    if until <= case.now:
        return step
    spent = f"the restart budget ({RESTARTS_PER_HOUR} an hour, {RESTARTS_PER_DAY} a day) has no room for {NEEDS[needed]}"
    reason = f"{step.reason}, but {spent}"
    vain = not case.seen.listening and len(case.budget.restarts) + needed > RESTARTS_PER_DAY  # it was started in vain all day
    hint = RESTARTS_AGAIN if case.once else RESTARTS_HINT
    return Step(step.row, "wait", reason, until=until, status=4, hint=hint, retry=PERSON if vain else "")
