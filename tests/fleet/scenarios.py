"""What may happen to a fleet, as a table."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Callable, Mapping, Optional, Tuple

from scx_enroll.journal import DAY_S, HOUR_S
from scx_enroll.pace import Policy
from tests.fleet.authority import Fault, Terms

BEGIN = 1_767_571_200  # Monday 2026-01-05 00:00 UTC
MONTH_S = 30 * DAY_S
WORKING_HOURS = (9, 17)
FLEET = 100_000  # hosts

Draw = Callable[[random.Random], int]  # when a host comes, in seconds after BEGIN


def at_once(_: random.Random) -> int:
    """Everything is switched on in the same minute; each host's timer spreads that over 45 minutes."""
    return 9 * HOUR_S


def in_two_weeks(chance: random.Random) -> int:
    """Ten working days, nine to five."""
    day = chance.randrange(10)
    first, last = WORKING_HOURS
    return (day + day // 5 * 2) * DAY_S + chance.randrange(first * HOUR_S, last * HOUR_S)


@dataclass(frozen=True)
class Scenario:
    """A roll-out, and one disturbance. Times are seconds after BEGIN."""

    name: str
    says: str
    draw: Draw = in_two_weeks
    rolled_out: int = 12 * DAY_S  # the last host has come
    disturbed: Tuple[int, int] = (0, 0)  # from when to when something is wrong
    fault: str = ""  # `authority.Fault`
    fault_at: Tuple[int, ...] = ()  # with which CAs, by number; () for all
    cas: int = 1
    lifetime_s: int = MONTH_S
    approval: bool = False
    per_second: float = 0.0  # where the fleet has 100,000 hosts
    loses: bool = False  # answers; only then may certificates be issued in vain
    rekeyed: Optional[Tuple[int, int]] = None  # each host's key is replaced between these
    misnamed: bool = False  # while disturbed, hosts that have no name yet see another one

    @property
    def servers(self) -> Tuple[str, ...]:
        return tuple(f"ca{number:02d}.example" for number in range(1, self.cas + 1))

    def terms(self, hosts: int) -> Terms:
        """How the CAs work for a fleet of that size: a small one gets a small CA."""
        begins, ends = (BEGIN + at for at in self.disturbed)
        servers = [self.servers[number] for number in self.fault_at] or [""]
        faults = tuple(Fault(self.fault, begins, ends, server) for server in servers) if self.fault else ()
        return Terms(self.lifetime_s, self.approval, self.per_second * hosts / FLEET, self.loses, faults)

    @property
    def period_s(self) -> int:
        """Between two renewals of one host, on average."""
        policy = Policy(self.servers)
        return int(self.lifetime_s * (policy.at - policy.spread / 2))

    @property
    def cycled(self) -> int:
        """When every host has renewed once since the roll-out and the disturbance."""
        latest = int(self.lifetime_s * Policy(()).at)
        return max(self.rolled_out, self.disturbed[1]) + latest + 2 * DAY_S

    @property
    def ends(self) -> int:
        """After one more cycle."""
        return self.cycled + self.period_s


STEADY = 16 * DAY_S  # a Wednesday, four days after the roll-out
OUTAGE = Scenario("", "", fault="down")


def _outage(name: str, says: str, hours: int, **more: object) -> Scenario:
    return replace(OUTAGE, name=name, says=says, disturbed=(STEADY + 9 * HOUR_S, STEADY + (9 + hours) * HOUR_S), **more)  # type: ignore[arg-type]


TABLE: Mapping[str, Scenario] = {one.name: one for one in (
    Scenario("staggered", "rolled out over two weeks of working hours"),
    Scenario("at-once", "rolled out in one minute", at_once, 10 * HOUR_S),
    _outage("outage-hour", "the CA is down for an hour", 1),
    _outage("outage-day", "the CA is down for a day", 24),
    _outage("outage-3-days", "the CA is down for three days", 72),
    replace(OUTAGE, name="outage-roll-out", says="rolled out in one minute while the CA is down for a day", draw=at_once, rolled_out=10 * HOUR_S,
            disturbed=(0, DAY_S)),
    Scenario("ten-a-second", "rolled out in one minute; the CA takes ten requests a second and refuses others", at_once, 10 * HOUR_S, per_second=10),
    Scenario("answers-lost", "as ten-a-second, but it stores all and answers too late", at_once, 10 * HOUR_S, per_second=10, loses=True),
    Scenario("approval", "a person approves each request, on weekdays at ten", approval=True),
    Scenario("rekey-night", "a package upgrade replaces every key between two and four at night", disturbed=(STEADY + 2 * HOUR_S, STEADY + 4 * HOUR_S),
             rekeyed=(STEADY + 2 * HOUR_S, STEADY + 4 * HOUR_S)),
    _outage("failover", "of two CAs one is down for three days", 72, cas=2, fault_at=(0,)),
    Scenario("wrong-names", "on a day of the roll-out the name server gives wrong answers for an hour", disturbed=(7 * DAY_S + 11 * HOUR_S, 7 * DAY_S + 12 * HOUR_S),
             fault="elsewhere", misnamed=True),
    Scenario("withdrawn", "the template is withdrawn for a week", disturbed=(STEADY, STEADY + 7 * DAY_S), fault="withdrawn"),
    _outage("ninety-days", "certificates of ninety days; the CA is down for three days", 72, lifetime_s=90 * DAY_S),
)}
