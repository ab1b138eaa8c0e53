"""What a record says, and whether the aims are met."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import List, Tuple

from scx_enroll.config import Renewal
from scx_enroll.journal import DAY_S, HOUR_S
from tests.fleet.simulation import Record

MOST_BY_HOUR_OF_DAY = 1.2  # peak over mean, after the first cycle
MOST_OVER_CHANCE = 1.5  # of the fullest hour
MOST_IN_RECOVERY = 4.0  # times the mean
CERTIFICATES_PER_DAY = Renewal().certificates_per_day


@dataclass(frozen=True)
class Figures:
    """Rates are submissions an hour; peaks are told in means, where nothing else is said."""

    mean: float  # in the long run: hosts by the time between two renewals
    peak: int  # after the roll-out, whatever happened
    hour_of_day: float  # after the first cycle
    hour: float  # after the roll-out, outside disturbance and recovery
    over_chance: float  # that, in terms of the fullest hour that chance alone gives
    recovery: float  # of hosts that still have time
    forced: float  # of hosts that have none
    contacts: float  # polls, questions and conversations that came to nothing too
    missed: Tuple[str, ...]  # aims


def submissions(record: Record) -> List[int]:
    return [calm + forced for calm, forced in zip(record.hours["calm"], record.hours["forced"])]


def contacts(record: Record) -> List[int]:
    return [sum(counts) for counts in zip(*record.hours.values())]


def figures(record: Record) -> Figures:
    scenario, sent = record.scenario, submissions(record)
    mean = record.hosts / (scenario.period_s / HOUR_S)
    rolled_out, last = record.rolled_out // HOUR_S + 1, scenario.ends // HOUR_S  # the hour in which it ends is a part of one
    recovery = recovery_hours(record)
    disturbed = range(scenario.disturbed[0] // HOUR_S, recovery.stop)
    quiet = [sent[hour] for hour in range(rolled_out, last) if hour not in disturbed]
    recovering = max((record.hours["calm"][hour] for hour in recovery), default=0) / mean
    by_hour = by_hour_of_day(record)
    day = max(by_hour) / (sum(by_hour) / 24)
    long_enough = len(quiet) * HOUR_S >= scenario.period_s  # else hosts were served so late that nothing can be judged
    hour = max(quiet, default=0) / mean
    over_chance = max(quiet, default=0) / fullest_by_chance(mean, max(len(quiet), 1))
    wasted = record.in_vain and not scenario.loses
    aims = (
        ("by hour of the day", day <= MOST_BY_HOUR_OF_DAY),
        ("fullest hour", long_enough and over_chance <= MOST_OVER_CHANCE),
        ("recovery", recovering <= MOST_IN_RECOVERY),
        ("expired", not record.expired and not record.unserved),
        ("in vain", not wasted and record.most_in_a_day <= CERTIFICATES_PER_DAY),
    )
    return Figures(
        mean, max(sent[rolled_out:last]), day, hour, over_chance, recovering, max(record.hours["forced"]) / mean,
        max(contacts(record)) / mean, tuple(name for name, met in aims if not met),
    )


def recovery_hours(record: Record) -> range:
    """Return the hours from the end of the disturbance until all are served whom it kept from it; none without a disturbance."""
    ends = record.scenario.disturbed[1]
    return range(ends // HOUR_S, max(record.recovered, ends) // HOUR_S + 1) if ends else range(0)


def by_hour_of_day(record: Record) -> List[int]:
    """Return submissions by the hour of the day (UTC), over whole days after the first cycle."""
    first = -(-record.scenario.cycled // DAY_S) * 24
    days = (record.scenario.ends // HOUR_S - first) // 24
    sent = submissions(record)
    return [sum(sent[first + 24 * day + hour] for day in range(days)) for hour in range(24)]


def fullest_by_chance(mean: float, hours: int) -> float:
    """Return how many fall into the fullest of so many hours, on average, where each host comes at a time of its own (Poisson)."""
    expected, at_most, count = 0.0, 0.0, 0
    while at_most < 1 - 1e-9 / hours and count < mean + 40 * math.sqrt(mean) + 40:
        log = count * math.log(mean) - mean - math.lgamma(count + 1)
        at_most += math.exp(log)
        expected += 1 - min(at_most, 1.0) ** hours
        count += 1
    return expected
