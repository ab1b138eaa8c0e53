"""How long things wait: renewals, failures, polls. Pure; times are whole seconds since the epoch, handed in."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Callable, Optional, Sequence, Tuple, Union

from scx_enroll.journal import DAY_S, HOUR_S, Backoff, Request, Skip

WEEK_S = 7 * DAY_S  # between two questions whether the certificate in service was revoked
MISSED_S = WEEK_S // 2  # until a question that failed is asked again: the fleet stays spread

COOL_DOWN_S = 15 * 60  # after a POST whose fate is doubtful, at least
REPEAT_SPREAD_S = 4 * HOUR_S  # and over so long: a CA that drowned in a fleet's requests would drown in the same hour again
DOUBT_S = DAY_S  # then a fresh request is made, over another such time
TRUST_SPREAD_S = 3 * DAY_S  # a fleet that gets new roots in one hour renews over this long
SHARES = 1 << 32  # a host's share of the spread is share / SHARES
# First and longest wait; each failure doubles it. Accounts lock after several failures within minutes: a key that was refused is sent after
# an hour, since another domain controller may know it meanwhile, and in the end once a day.
BACKOFF_S = {"soon": (5 * 60, 2 * HOUR_S), "later": (HOUR_S, DAY_S), "key": (HOUR_S, DAY_S), "joining": (5 * 60, 15 * 60)}
JOINING_FAILURES = DAY_S // BACKOFF_S["joining"][1]  # a day; who has not joined the domain by then is waited for like other people
# While a valid certificate is held: at most this part of the time that it has left, and at most so long. Hosts that came due
# in an outage of three days come back over four, not in an hour.
CALM = ((16, DAY_S), (3, 4 * DAY_S))  # after the first failure, after each later one
OF_THIS_HOST = (3, 9, 12)  # statuses of failures that are mended here: configuration, rollback, clock or disk
SIGNIN_REFUSED = 13
PERSON = "person"
PATIENT_STATUSES = (4, 5, 7, 11)  # what a run that only waits ends with
LEAST_PART = 20  # a twentieth of a certificate's life has passed before a new one is asked for
LAST_PART = 0.1  # of a certificate's lifetime: waiting needs a person then
POLL_S = (60, 4 * HOUR_S)  # a pending request is polled after a quarter of its age, within these


@dataclass(frozen=True)
class Held:
    """A certificate that this host holds for the agent's present key, or for the one to come, and what is wrong with it."""

    id: str
    leaf: str  # SHA-256
    not_before: int
    not_after: int
    due: int = 0  # when the renewal that brought it was planned, 0 where none was: the first, a new key, on demand; -n as in Origin
    number: int = 0  # the how-manieth that was obtained
    obtained: int = 0
    mismatches: Tuple[str, ...] = ()
    ca: str = ""  # server, where it knows the certificate by a request ID
    request_id: int = 0
    revoked: bool = False
    key: str = ""  # SHA-256 of the public key that it is for


@dataclass(frozen=True)
class Policy:
    """What the configuration asks for."""

    cas: Tuple[str, ...]  # servers, in the order in which this host asks them
    at: Fraction = Fraction(2, 3)
    spread: Fraction = Fraction(1, 10)
    certificates_per_day: int = 3
    submissions_per_day: int = 24
    pending_s: int = 30 * DAY_S
    settle_s: int = 120
    opens: int = 0  # when the agent may be restarted next, 0 for at any time
    new_key: bool = False  # with each certificate


def due(held: Held, policy: Policy, share: int) -> int:
    """Return when renewal is due: each host at its own place of a cycle, whose length comes from the certificate's real lifetime.

    A certificate that no planned renewal brought (a roll-out, a fleet's keys replaced in one night) is renewed at the host's share of
    the time until `at`: one cycle later the fleet is spread evenly. From then on a host keeps its place: what is late because
    of an outage is planned from the time when it should have been.
    """
    lifetime, start = held.not_after - held.not_before, max(held.not_before, held.obtained)
    reserve = _part(lifetime, policy.spread) // 2
    latest = held.not_before + _part(lifetime, policy.at)
    # A CA near its end, or a very short template, gives certificates that are born past that point: never ask in a loop.
    earliest = start + (held.not_after - start) // LEAST_PART
    planned = min(held.due + _part(lifetime, policy.at) - reserve, latest)
    if held.due < 0:  # or a fleet that upgrades would have half of its renewals behind it
        planned = latest - lifetime * share // SHARES // -held.due
    if held.due and planned >= earliest:
        return planned
    if latest <= earliest:  # adopted late
        latest = start + (held.not_after - start) // 2
    return latest - (latest - earliest) * share // SHARES


def _part(whole: int, part: Fraction) -> int:
    return whole * part.numerator // part.denominator


def needs_a_person(status: int, held: Tuple[Held, ...], now: int, retry: str = "") -> bool:
    """Say whether an unattended run that ends with `status` should fail: waiting is no failure while time remains.

    `held`: all that is held, expired ones too. With nothing held yet, as at first boot, there is nothing to run out.
    `retry`: of the back-off that it waits for, as `patience` says; or "person", where no time mends it.
    """
    if retry == PERSON:
        return True
    if status not in PATIENT_STATUSES and not (status == SIGNIN_REFUSED and (retry == "soon" or (retry == "joining" and not held))):
        return status != 0
    return bool(held) and now >= runs_out_at(held)


def runs_out_at(held: Tuple[Held, ...]) -> int:
    """Return when little is left of everything that is held; what is wrong in anything but its dates is nothing."""
    good = (one for one in held if all(what.startswith("dates:") for what in one.mismatches))
    return max((one.not_after - int(max(one.not_after - one.not_before, 1) * LAST_PART) for one in good), default=0)


def expiry(held: Tuple[Held, ...]) -> int:
    """Return when the last of what is valid expires, 0 where nothing is."""
    return max((one.not_after for one in held if not one.mismatches), default=0)


def patience(failure: Union[Backoff, Skip]) -> str:
    """Return in what way a failure is waited for: as its `retry` says, but a domain join for a day only."""
    return "later" if failure.retry == "joining" and failure.failures > JOINING_FAILURES else failure.retry


def until_of(failure: Union[Backoff, Skip], expires: int = 0) -> Optional[int]:
    """Return when a failure is forgotten by itself, None for never. `expires`: when what is validly held does, 0 for nothing.

    A CA is asked again the later, the longer there is time; what was wrong with this host is looked at again soon.
    """
    if failure.retry not in BACKOFF_S:
        return None
    first, longest = BACKOFF_S[patience(failure)]
    failures = failure.failures - (JOINING_FAILURES if patience(failure) != failure.retry else 0)
    left = expires - failure.at
    if left > 0 and failure.status not in OF_THIS_HOST:
        part, most = CALM[min(max(failure.failures, 1), len(CALM)) - 1]
        return failure.at + max(min(left // part, most), first)
    return failure.at + int(min(first * 2 ** min(max(failures - 1, 0), 30), longest))


def _elsewhere(share: int) -> int:
    """Return another place of the same host: with the one that it has in the cycle, spreads would fold into each other."""
    return (share << 8) % SHARES


def repeat_at(request: Request, share: int) -> int:
    """Return when the CSR of a doubtful request may be sent again: each host at its own time."""
    return request.next + REPEAT_SPREAD_S * _elsewhere(share) // SHARES


def doubt_ends(request: Request, share: int) -> int:
    """Return when a doubtful request is given up."""
    return request.since + DOUBT_S + DOUBT_S * _elsewhere(share) // SHARES


def first_question(obtained: int, share: int) -> int:
    """Return when a CA is first asked whether a new certificate was revoked: a fleet asks spread over a week."""
    return obtained + WEEK_S // 2 + WEEK_S * _elsewhere(share) // SHARES


def opens(windows: Tuple[Tuple[int, int], ...], now: int, local: Callable[[float], Sequence[int]]) -> int:
    """Return when the first of these ranges of the day begins, 0 while one lasts or where there are none.

    `local`: time.localtime, so that a day with an hour more or less is as the clock on the wall has it: a range that the day lacks is
    left out, one that comes twice lasts twice.
    """

    def lasts(at: int) -> bool:
        minute = local(at)[3] * 60 + local(at)[4]
        return any(start <= minute < end if start < end else minute >= start or minute < end for start, end in windows)

    if not windows or lasts(now):
        return 0
    return next(at for at in range(now - now % 60 + 60, now + 3 * DAY_S, 60) if lasts(at))


def poll_after(age_s: int) -> int:
    """Return how long to wait before a pending request of that age is polled again."""
    return min(max(age_s // 4, POLL_S[0]), POLL_S[1])
