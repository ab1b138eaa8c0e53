"""Lets a fleet live through a scenario: jumps from one run that decides something to the next, and counts."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from typing import Dict, List, Tuple

from scx_enroll import pace
from scx_enroll.case import Step
from scx_enroll.journal import DAY_S, HOUR_S
from tests.fleet import paper
from tests.fleet.authority import Authority
from tests.fleet.host import NEVER, Host, world_of
from tests.fleet.scenarios import BEGIN, Scenario

TIMER_SPREAD_S = 45 * 60  # RandomizedDelaySec of the timer
KINDS = ("calm", "forced", "polls", "questions", "turned away")


@dataclass
class Record:
    """What was counted, by the hour since BEGIN.

    calm: submissions of hosts that hold a valid certificate, with time left. forced: others. turned away: the CA could not
    be worked with, whatever was wanted.
    """

    scenario: Scenario
    hosts: int
    hours: Dict[str, List[int]] = field(default_factory=dict)
    rolled_out: int = 0  # the last host has its first certificate; since BEGIN, as the next
    recovered: int = 0  # the last host has submitted that had been turned away before, or had nothing valid
    expired: int = 0  # hosts whose certificate ran out before they had another
    unserved: int = 0  # hosts that hold nothing valid at the end
    longest_without_s: int = 0  # a valid certificate, of one host: from when it came, its key was replaced or its certificate ran out
    issued: int = 0
    in_vain: int = 0
    most_in_a_day: int = 0  # certificates of one host
    restarts: int = 0
    most_restarts: int = 0
    runs: int = 0


class Simulation:
    """One scenario under way; `now` is the clock of all."""

    def __init__(self, scenario: Scenario, hosts: int, seed: int = 1) -> None:
        self.scenario = scenario
        self.now = BEGIN
        self.record = Record(scenario, hosts)
        length = scenario.ends // HOUR_S + 1
        self.hours = self.record.hours = {kind: [0] * length for kind in KINDS}
        terms = scenario.terms(hosts)
        self.cas = {server: Authority(server, number, terms, lambda: self.now) for number, server in enumerate(scenario.servers, 1)}
        world = world_of(lambda: self.now, self.cas, self._resolve, self._acted)
        chance = random.Random(f"{seed} {scenario.name}")
        self.hosts = [Host(number, chance.randrange(TIMER_SPREAD_S), world) for number in range(hosts)]
        self.comes = [BEGIN + scenario.draw(chance) for _ in self.hosts]
        self.rekeyed = [BEGIN + chance.randrange(*scenario.rekeyed) if scenario.rekeyed else NEVER for _ in self.hosts]
        self.without_since = list(self.comes)  # a valid certificate, 0 while there is one
        self.backed_off = False

    # -- what hosts are told --------------------------------------------------------------------------------------------

    def _resolve(self, name: str) -> str:
        begins, ends = (BEGIN + at for at in self.scenario.disturbed)
        return f"other-{name}" if self.scenario.misnamed and begins <= self.now < ends else name

    def _wakes(self, number: int) -> Tuple[int, ...]:
        """When a host has something new to see, whatever it waits for."""
        told = (BEGIN + at for at in self.scenario.disturbed) if self.scenario.misnamed else ()
        return (self.rekeyed[number], *told)

    # -- time -----------------------------------------------------------------------------------------------------------

    def run(self, *, jumping: bool = True) -> Record:
        """Live to the end; returns what was counted. Without `jumping` every tick of every host is a run."""
        with paper.in_use():
            queue = [(host.tick_at(at), host.number) for host, at in zip(self.hosts, self.comes)]
            heapq.heapify(queue)
            while queue and queue[0][0] < BEGIN + self.scenario.ends:
                self.now, number = queue[0]
                until = self._visit(self.hosts[number])
                heapq.heapreplace(queue, (self.hosts[number].tick_at(until if jumping else self.now + 1), number))
            self.now = BEGIN + self.scenario.ends
            return self._totals()

    def _visit(self, host: Host) -> int:
        """Run a host; returns when it has something else to do or to see."""
        number, now = host.number, self.now
        if now >= self.rekeyed[number]:
            host.replace_key(now)
            self.rekeyed[number], self.without_since[number] = NEVER, now
        self.backed_off = bool(host.store.journal.backoffs)
        step = host.run()
        self.record.runs += 1
        wake = min(at for at in (*self._wakes(number), NEVER) if at > now)
        return min(max(step.until or NEVER, now + 1), wake)

    def _acted(self, host: Host, step: Step) -> None:
        hour = (self.now - BEGIN) // HOUR_S
        if step.action == "install":
            self._installed(host)
        if step.action not in ("submit", "repeat", "poll", "question"):
            return
        ca = self.cas[step.ca or _polled(host)]
        kind = {"poll": "polls", "question": "questions"}.get(step.action, "")
        if not kind:
            valid = [held for held in host.seen.held if not held.mismatches]
            kind = "forced" if not valid or self.now >= pace.runs_out_at(tuple(valid)) else "calm"
        self.hours["turned away" if ca.turned_away else kind][hour] += 1
        if (kind == "forced" or (kind == "calm" and self.backed_off)) and not ca.turned_away:
            self.record.recovered = self.now - BEGIN

    def _installed(self, host: Host) -> None:
        if host.installs == 1:
            self.record.rolled_out = self.now - BEGIN
        since = self.without_since[host.number]
        earlier = [held.not_after for held in host.seen.held if held.leaf != host.installed]
        if not since and earlier and max(earlier) <= self.now:
            self.record.expired += 1
            since = max(earlier)
        if since:
            self.record.longest_without_s = max(self.record.longest_without_s, self.now - since)
        self.without_since[host.number] = 0

    def _totals(self) -> Record:
        record = self.record
        record.issued = sum(ca.close_books() for ca in self.cas.values())
        under_way = 0
        for host in self.hosts:
            request = host.store.journal.request
            row = self.cas[request.ca].rows.get(request.id or 0) if request.ca else None
            under_way += bool(row and row.leaf)
            record.restarts += host.restarts
            record.most_restarts = max(record.most_restarts, host.restarts)
            valid = any(not held.mismatches for held in host.look().held)
            record.unserved += not valid
            record.expired += not valid and not self.without_since[host.number]
        record.in_vain = record.issued - sum(host.installs for host in self.hosts) - under_way
        record.most_in_a_day = max(
            (sum(at <= other < at + DAY_S for other in times) for ca in self.cas.values() for times in ca.issued.values() for at in times), default=0,
        )
        return record


def _polled(host: Host) -> str:
    """Return the CA of a request that may have ended just now."""
    request, contacts = host.store.journal.request, host.store.journal.contacts
    return request.ca or max(contacts, key=lambda contact: contact.at).ca
