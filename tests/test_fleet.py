"""The fleet simulation: that it does what the program does, and that a small fleet comes well through every scenario."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest

from scx_enroll import journal as j
from scx_enroll import observe
from scx_enroll.config import Renewal
from scx_enroll.journal import DAY_S, HOUR_S
from scx_enroll.pace import WEEK_S
from tests.fleet import paper
from tests.fleet.authority import Authority, Fault, Terms, approved_at
from tests.fleet.figures import MOST_IN_RECOVERY, by_hour_of_day, figures, fullest_by_chance, recovery_hours
from tests.fleet.host import Host, world_of
from tests.fleet.scenarios import BEGIN, FLEET, TABLE
from tests.fleet.simulation import Simulation
from tests.lab.agent import LabHost
from tests.lab.ca import LabCA
from tests.scene import Scene, take_openssls_clock_away
from tests.test_month import hasty

SMALL = 1000  # hosts
LIFETIME_S = 30 * DAY_S
NO_TEMPLATE = {"mode": "deny", "deny_hresult": 0x80094800}

# -- against the program itself -------------------------------------------------------------------------------------

# What befalls one host: the lab's switches, what the simulated CA has instead, and the runs, in seconds after the first.
WELL: Dict[str, Any] = {}
LIVES: Dict[str, List[Tuple[Dict[str, Any], Dict[str, Any], Tuple[int, ...]]]] = {
    "issued, asked about, renewed": [(WELL, WELL, (0, 60, 4 * DAY_S, 11 * DAY_S, 18 * DAY_S, 20 * DAY_S, 38 * DAY_S))],
    "pending": [({"mode": "pending"}, {"approval": True}, (0, 30, 60, 300, HOUR_S, 6 * HOUR_S))],
    "template withdrawn": [(NO_TEMPLATE, {"faults": ("withdrawn",)}, (0, 600, HOUR_S, 3 * HOUR_S, 9 * HOUR_S)), (WELL, WELL, (2 * DAY_S, 6 * DAY_S))],
    "template withdrawn when it renews": [
        (WELL, WELL, (0,)), (NO_TEMPLATE, {"faults": ("withdrawn",)}, (20 * DAY_S, 21 * DAY_S, 22 * DAY_S)), (WELL, WELL, (25 * DAY_S, 27 * DAY_S)),
    ],
    "out of service": [({"answer": "503"}, {"faults": ("down",)}, (0, 300, 900, 2000, HOUR_S, 2 * HOUR_S)), (WELL, WELL, (5 * HOUR_S,))],
    "out of service when it renews": [
        (WELL, WELL, (0,)), ({"answer": "503"}, {"faults": ("down",)}, (10 * DAY_S, 20 * DAY_S, 21 * DAY_S, 22 * DAY_S)), (WELL, WELL, (26 * DAY_S,)),
    ],
    "somebody else's web server": [({"https": "unknown-ca"}, {"faults": ("elsewhere",)}, (0, 300, 900)), (WELL, WELL, (HOUR_S,))],
    "answers lost": [({"lost": "after"}, {"per_second": 1e-6, "loses": True}, (0, 300, 901, 2000, HOUR_S, DAY_S + 60)), (WELL, WELL, (2 * DAY_S + 120,))],
}


def told(journal: j.Journal, budget: j.Budget) -> Dict[str, Any]:
    """What the plan goes by, without words and hashes."""
    request = replace(journal.request, ca="", csr="", spki="", id=bool(journal.request.id), inputs="", why="")
    return {
        "request": request,
        "backoffs": [replace(backoff, ca=bool(backoff.ca), inputs="", message="", hint="") for backoff in journal.backoffs],
        "question": journal.question,
        "contacts": [(contact.at, contact.status) for contact in journal.contacts],
        "submissions": budget.submissions,
    }


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuple[LabCA, LabHost, List[int]]]:
    """One CA, one host, and the time that both go by."""
    now = [int(time.time())]
    folder = tmp_path_factory.mktemp("fleet")
    years = 365 * 86400.0
    with LabCA(folder / "ca", clock=lambda: float(now[0]), lifetime=float(LIFETIME_S), ca_lifetime=20 * years, root_lifetime=40 * years) as ca, \
            LabHost(folder / "host", key="ec:secp256r1") as host:
        yield ca, host, now


@pytest.mark.slow
@pytest.mark.parametrize("life", LIVES)
def test_a_simulated_host_that_leads_another_life(tmp_path: Path, lab: Any, life: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation means something only while its CA, its store and its runs leave the same records as the real ones."""
    import shutil

    ca, host, now = lab
    ca.switches.reset()
    ca.authority.rows.clear()
    for name in ("etc/scx-enroll", "var/lib/scx-enroll", "run/scx-enroll"):
        shutil.rmtree(Path(host.root, name), ignore_errors=True)
    host.move_link_back()
    take_openssls_clock_away(monkeypatch)
    scene, begin = Scene(host, [ca]), now[0]
    monkeypatch.setattr(observe, "share_of", lambda _: 1 << 31)
    authority = Authority("ca01.example", 1, Terms(LIFETIME_S), lambda: now[0])
    simulated = Host(0, 0, world_of(lambda: now[0], {authority.server: authority}, lambda _: host.fqdn, lambda *_: None))
    for switches, terms, moments in LIVES[life]:
        ca.switches.reset()
        ca.switches.update(switches)
        faults = tuple(Fault(kind, 0, 1 << 40) for kind in terms.get("faults", ()))
        authority.terms = Terms(LIFETIME_S, **{**terms, "faults": faults})
        for moment in moments:
            now[0] = begin + moment
            ran = scene.run(live=False, parts={"line": hasty(), "clock": lambda: now[0]})
            with paper.in_use():
                step = simulated.run()
            assert ran.result, ran.message
            assert (step.row, step.action, step.until, step.status) == \
                (ran.result.step.row, ran.result.step.action, ran.result.step.until, ran.result.step.status), moment
            assert told(simulated.store.journal, simulated.store.budget) == told(ran.result.journal, ran.result.budget), moment
            assert [replace(g.origin, ca="", request_id=0) for g in simulated.store.kept] == \
                [replace(g.origin, ca="", request_id=0) for g in ran.result.generations], moment


@pytest.mark.slow
@pytest.mark.parametrize("name", ["outage-day", "rekey-night", "wrong-names", "approval"])
def test_something_that_happens_between_two_jumps(name: str) -> None:
    """Jumping from *until* to *until* is the same life as looking each hour, as the timer does: the plan promises that nothing is missed."""
    jumped, ticked = Simulation(TABLE[name], 20).run(), Simulation(TABLE[name], 20).run(jumping=False)
    assert ticked.runs > 10 * jumped.runs
    assert replace(ticked, runs=0) == replace(jumped, runs=0)


# -- small fleets -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_a_fleet_that_comes_to_harm_or_does_harm(name: str) -> None:
    """What `make fleet` shows of a large fleet, looked at in each test run with a small one, and with what chance adds to that."""
    record = Simulation(TABLE[name], SMALL).run()
    # Every outage here is shorter than the time that a certificate has left when its renewal is due.
    assert (record.expired, record.unserved) == (0, 0)
    # Two renewals each; nothing in vain but where answers are lost; never beyond the budget; a restart for each and no more.
    assert record.issued >= 3 * SMALL
    assert record.in_vain == 0 or record.scenario.loses
    assert record.most_in_a_day <= Renewal().certificates_per_day
    assert 3 * SMALL <= record.restarts <= record.issued - record.in_vain
    # Hosts that have time come back by and by.
    hours, calm = recovery_hours(record), record.hours["calm"]
    allowed = fullest_by_chance(6 * MOST_IN_RECOVERY * figures(record).mean, max(len(hours), 1))
    assert max((sum(calm[hour:hour + 6]) for hour in hours), default=0) <= 1.2 * allowed
    # After one cycle there is no wave any more.
    by_hour = by_hour_of_day(record)
    assert max(by_hour) <= 1.2 * fullest_by_chance(sum(by_hour) / 24, 24)
    assert figures(record).over_chance <= 1.5


# -- the figures ------------------------------------------------------------------------------------------------------


def test_the_fullest_hour_of_chance_alone() -> None:
    """What the aims are measured by: of 24 hours with four each, the fullest has eight; of one hour, the mean."""
    assert fullest_by_chance(4, 1) == pytest.approx(4, abs=0.01)
    assert 8 < fullest_by_chance(4, 24) < 9
    assert 255 < fullest_by_chance(225, 900) < 280


def test_an_approval_at_the_weekend() -> None:
    """What is submitted on Friday afternoon waits until Monday at ten."""
    friday = BEGIN + 4 * DAY_S + 15 * HOUR_S
    assert approved_at(friday) == BEGIN + WEEK_S + 10 * HOUR_S
    assert approved_at(friday - 6 * HOUR_S) == friday - 5 * HOUR_S


@pytest.mark.slow
def test_an_aim_that_is_missed_goes_unnoticed() -> None:
    """The command prints its table and ends with 1 where an aim is missed: three hosts are never evenly spread."""
    ran = subprocess.run(
        [sys.executable, "-I", "-m", "tests.fleet", "--hosts", "3", "--scenario", "staggered", "--jobs", "1"], capture_output=True, text=True,
    )
    assert ran.returncode == 1
    assert re.search(r"^\| staggered \| 3 \|.*\| missed: by hour of the day.* \|$", ran.stdout, re.MULTILINE)


@pytest.mark.checkout
def test_a_scenario_that_the_page_does_not_show(checkout: str) -> None:
    """docs/fleet.md and its picture show all scenarios, with a fleet as large as was asked for, and say what each is."""
    with open(os.path.join(checkout, "docs", "fleet.md"), encoding="utf-8") as file:
        page = file.read()
    with open(os.path.join(checkout, "docs", "fleet.svg"), encoding="utf-8") as file:
        picture = file.read()
    shown = re.findall(r"^\| ([\w-]+) \| ([0-9,]+) \|", page, re.MULTILINE)
    assert shown == [(name, f"{FLEET:,}") for name in TABLE]
    assert [name for name in TABLE if f">{name}</text>" not in picture] == []
    assert len(picture) < 300_000
