"""Certification authorities in memory, as `ca` shows them to the program: what they say, what they store, when they fail."""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Tuple, Union

from scx_enroll import hresult, outcomes
from scx_enroll.journal import DAY_S, HOUR_S
from tests.fleet import paper

CLOCK_SKEW_S = 600  # NotBefore is so much before the issue, as on AD CS
PATIENCE_S = 120  # the program waits so long for an answer (`web.LIMITS`)
TEMPLATE_UNKNOWN = 0x80094800
APPROVAL_HOUR = 10  # UTC, when a person looks at what waits


@dataclass(frozen=True)
class Fault:
    """What is wrong, from when to when; `server`: with which CA, "" for all."""

    kind: str  # "down" | "elsewhere": its name leads to another machine | "withdrawn": the template
    begins: int
    ends: int
    server: str = ""


@dataclass(frozen=True)
class Terms:
    """How the CAs of one scenario work."""

    lifetime_s: int
    approval: bool = False  # a person issues on weekdays
    per_second: float = 0.0  # what one CA can do, 0: whatever comes
    loses: bool = False  # beyond that it stores the request, but the answer comes too late; else it refuses
    faults: Tuple[Fault, ...] = ()


@dataclass
class Row:
    """A request that was stored: the certificate, or when a person issues it."""

    spki: str
    name: str
    leaf: bytes = b""
    issued_at: int = 0


@dataclass
class Authority:
    """One CA. `turned_away`: whether the last conversation ended without the CA having worked."""

    server: str
    number: int
    terms: Terms
    clock: Callable[[], int]
    rows: Dict[int, Row] = field(default_factory=dict)
    issued: Dict[str, List[int]] = field(default_factory=dict)  # when, by the key
    turned_away: bool = False
    taken: Tuple[int, int] = (0, 0)  # conversations in the last moment, and which that was
    busy_until: float = 0.0

    def fault(self, kind: str) -> bool:
        """Whether something is wrong now."""
        now = self.clock()
        return any(f.kind == kind and f.server in ("", self.server) and f.begins <= now < f.ends for f in self.terms.faults)

    # -- the conversation (`ca.Conversation`) ---------------------------------------------------------------------------

    def authority(self) -> Union[outcomes.Authority, outcomes.Unavailable]:
        gone = self._unreachable() or self._crowded()
        if gone:
            return gone
        own = paper.made(self.number, 0, 1 << 33, "ca", self.server)
        return outcomes.Authority((own,), self.clock())

    def submit(self, csr: bytes, on_id: Callable[[int], None]) -> outcomes.Outcome:
        """An outage may begin between the preflight and the POST."""
        gone = self._unreachable()
        if gone:
            return gone
        now, request_id = self.clock(), self.number * 10**9 + len(self.rows) + 1
        _, spki, name = csr.decode().split()
        if self.fault("withdrawn"):
            self.rows[request_id] = Row(spki, name)
            meaning = hresult.meaning(TEMPLATE_UNKNOWN)
            reason = f"{meaning.sentence}, template SCXAgent"
            return outcomes.Denied(request_id, TEMPLATE_UNKNOWN, reason, meaning.hint, meaning.retry)
        row = self.rows[request_id] = Row(spki, name, issued_at=approved_at(now) if self.terms.approval else now)
        if not self.terms.approval:
            self._issue(request_id, row)
        if self.terms.loses and self.terms.per_second:
            self.busy_until = max(self.busy_until, now) + 1 / self.terms.per_second
            if self.busy_until - now > PATIENCE_S:
                return outcomes.Doubtful(f"{self.server} did not answer in time", None)
        on_id(request_id)
        return outcomes.Pending(request_id) if self.terms.approval else outcomes.Certificate(request_id, row.leaf, ())

    def fetch(self, request_id: int) -> outcomes.Outcome:
        gone = self._unreachable()
        if gone:
            return gone
        row = self.rows[request_id]
        if not row.leaf and row.issued_at > self.clock():
            return outcomes.Pending(request_id)
        if not row.leaf:
            self._issue(request_id, row)
        return outcomes.Certificate(request_id, row.leaf, ())

    # -- its inside -----------------------------------------------------------------------------------------------------

    def _issue(self, request_id: int, row: Row) -> None:
        begins = row.issued_at - CLOCK_SKEW_S
        row.leaf = paper.made(request_id, begins, row.issued_at + self.terms.lifetime_s, row.spki, row.name)
        self.issued.setdefault(row.spki, []).append(row.issued_at)

    def _unreachable(self) -> Union[outcomes.Unavailable, None]:
        self.turned_away = True
        if self.fault("down"):
            return outcomes.Unavailable(f"{self.server} does not answer", "see that it runs", "network")
        if self.fault("elsewhere"):
            return outcomes.Unavailable(f"{self.server}: its certificate is another's", "see server-trust", "trust")
        self.turned_away = False
        return None

    def _crowded(self) -> Union[outcomes.Unavailable, None]:
        """So many conversations in one second, and no more. Of less than one a second, one in so many seconds."""
        rate = self.terms.per_second
        if not rate or self.terms.loses:
            return None
        moment_s = math.ceil(1 / rate)
        moment = self.clock() // moment_s
        done = self.taken[0] if self.taken[1] == moment else 0
        if done >= round(rate * moment_s):
            self.turned_away = True
            return outcomes.Unavailable(f"{self.server} says that /certsrv is out of service (HTTP 503)", "start it", "server")
        self.taken = (done + 1, moment)
        return None

    def close_books(self) -> int:
        """Issue what a person has issued meanwhile and nobody fetched; returns how many certificates were issued in all."""
        for request_id, row in self.rows.items():
            if not row.leaf and 0 < row.issued_at <= self.clock():
                self._issue(request_id, row)
        return sum(map(len, self.issued.values()))


def approved_at(now: int) -> int:
    """Return when a person issues what is submitted now: once a day, Monday to Friday."""
    day = now - now % DAY_S + APPROVAL_HOUR * HOUR_S
    while day <= now or dt.datetime.fromtimestamp(day, dt.timezone.utc).weekday() >= 5:
        day += DAY_S
    return day
