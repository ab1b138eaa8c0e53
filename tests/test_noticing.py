"""What a run writes down of others' changes: when, once, and of which facts; `causes` names them from there."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator, Optional

import pytest

from scx_enroll import agent as agents
from scx_enroll import drift, places, verify
from scx_enroll.activate import Site
from scx_enroll.case import Observed, Step
from scx_enroll.causes import FRESH_S, ITSELF, SCOM, Sight
from scx_enroll.errors import HostError
from scx_enroll.journal import Change, Journal, Known
from scx_enroll.observe import Ready, View
from scx_enroll.pace import Held, Policy
from scx_enroll.request import RequestSpec, load_key, spki_of
from scx_enroll.rootfs import Root
from scx_enroll.store import STATE, Store
from tests.lab.agent import LabHost
from tests.scene import BRISK

NOW = 1_800_000_000
SERVER = "/opt/omi/bin/omiserver"
CONFIG: Any = "all that it is asked for is what it means"
DONE = Step("-", "nothing", "as it should be")
WAITS = Step("L3", "wait", "dpkg is changing packages", status=4)


class Spot:
    """A host whose agent was seen at work; `saves` counts what is written to the journal."""

    def __init__(self, host: LabHost) -> None:
        os.makedirs(host.path(STATE), 0o700)
        self.host, self.now, self.saves = host, NOW, 0
        self.store = Store(Root(host.root))
        self.real, self.store.save_journal = self.store.save_journal, self.save  # type: ignore[method-assign]
        self.site = Site(self.store.root, self.store, BRISK, lambda: self.now, lambda _: None)

    def save(self, journal: Journal) -> None:
        """Write it, and count."""
        self.saves += 1
        self.real(journal)

    def view(self, *, found: bool = True, settle_s: int = 120, **seen: Any) -> View:
        """What one look finds; `seen`: what is otherwise than usual."""
        if not found:
            return View(Observed(blocked="no agent was found", **seen), Policy(("ca",)), None)
        agent = agents.find(self.store.root, port=None)
        pair = agents.read_pair(self.store.root, agent)
        facts = verify.facts(places.certificates_of(pair.certificate)[0])
        usual = Observed(key=spki_of(load_key(pair.key or b"")), certificate=facts.leaf, served=facts.leaf, listening=True)
        ready = Ready(agent, pair, RequestSpec(self.host.fqdn), facts, (), None, (), (), b"", False, None)
        return View(replace(usual, **seen), Policy(("ca",), settle_s=settle_s), ready)

    def known(self, view: View) -> Known:
        """What the journal knows after a run that ends with that view."""
        drift.conclude(self.site, CONFIG, view, (), DONE, hasty=False)
        assert self.store.journal.known
        return self.store.journal.known

    def sight(self, view: View) -> Sight:
        """What that view is to `causes`."""
        return drift._sight(self.site, CONFIG, view)


@pytest.fixture
def spot(tmp_path: Path) -> Iterator[Spot]:
    """A host that a run has looked at."""
    with LabHost(tmp_path / "host", key="ec:secp256r1") as host:
        made = Spot(host)
        made.known(made.view())
        made.saves = 0
        yield made


AT_WORK = [  # what is found, a lock of a package manager, the tree is live, hasty; whether others are at work
    ({}, "", True, False, False),
    ({"busy": "dpkg is changing packages"}, "", True, True, True),
    ({"changed_at": NOW - 60}, "", True, False, True),
    ({"changed_at": NOW - 60}, "", True, True, False),
    ({"changed_at": NOW - 121}, "", True, False, False),
    ({}, "dpkg", True, False, False),
    ({"found": False}, "", True, False, False),
    ({"found": False}, "dpkg", True, False, True),
    ({"found": False}, "dpkg", False, False, False),
]


@pytest.mark.parametrize(("seen", "lock", "live", "hasty", "at_work"), AT_WORK)
def test_nothing_has_a_cause_while_others_are_at_work(
    spot: Spot, monkeypatch: pytest.MonkeyPatch, seen: dict[str, Any], lock: str, live: bool, hasty: bool, at_work: bool
) -> None:
    """An upgrade half-way looks like a deletion; the wrong cause would be told, and never taken back. Afterwards it is told, once."""
    monkeypatch.setattr(agents, "packager", lambda _root: lock)
    spot.site.root.live = live
    spot.store.update(known=replace(spot.known(spot.view()), host="before"))
    before, told = spot.store.journal, []
    view = spot.view(**seen)
    assert drift.notice(spot.site, CONFIG, view, told.append, hasty=hasty) is not at_work
    assert [change.cause for change in told] == ([] if at_work else ["renamed"])
    assert (spot.store.journal == before) is at_work
    assert drift.notice(spot.site, CONFIG, view, told.append, hasty=hasty) is False
    if not hasty:
        spot.store.save_journal(before)
        shown = drift.unwritten(spot.site, CONFIG, view)
        assert [(change.cause, change.waits) for change in shown] == ([] if at_work else [("renamed", "nothing yet: no run has seen it")])
        assert spot.store.journal == before


@pytest.mark.parametrize("how", ["at work", "failed"])
def test_what_became_of_a_change_is_written_where_it_says_more(spot: Spot, how: str) -> None:
    """The operator reads why it still waits; the same answer each hour wears no disk. What was last seen stays as it was."""

    def end() -> None:
        if how == "at work":
            drift.conclude(spot.site, CONFIG, spot.view(busy="dpkg is changing packages"), (), WAITS, hasty=False)
        else:
            drift.failed(spot.site, (), HostError("the disk is full\nand more"))

    end()
    assert spot.saves == 0, "nothing is open"
    spot.store.update(changes=(Change(NOW, "renamed", "it was", waits="nothing yet"),))
    known, spot.saves = spot.store.journal.known, 0
    spot.now += 60
    expected = "waiting: dpkg is changing packages" if how == "at work" else "failed: the disk is full"
    for _ in range(2):
        end()
        assert [change.waits for change in spot.store.journal.changes] == [expected]
    assert spot.saves == 1
    assert spot.store.journal.known == known


@pytest.mark.parametrize(("seconds", "anew"), [(-1, True), (0, False), (FRESH_S - 1, False), (FRESH_S, True)])
def test_the_time_of_a_look_is_written_once_a_week(spot: Spot, seconds: int, anew: bool) -> None:
    """Clocks are judged by it, so it must not grow old; nor may every run write. A time of the future is put right at once."""
    spot.now += seconds
    assert spot.known(spot.view()).at == (NOW + seconds if anew else NOW)
    assert spot.saves == int(anew)


@pytest.mark.parametrize(
    ("program", "there", "expected"),
    [("", True, ""), (f"{SERVER} 1,2,3", True, f"{SERVER} 1,2,3"), (f"{SERVER} 1,2,3", False, SERVER)],
    ids=["none was known", "it is there, and can't be worked on", "it is gone"],
)
def test_an_agent_that_is_not_found_is_gone_only_where_its_program_is(spot: Spot, program: str, there: bool, expected: str) -> None:
    """A typing error in its configuration is no removal; and what was known of it is compared again when it is back."""
    spot.store.update(known=replace(spot.store.journal.known or Known(), program=program))
    if not there:
        os.unlink(spot.host.path(SERVER))
    was = spot.store.journal.known
    assert was
    spot.site.root.live = False
    for name in ("/etc/hostname", "/etc/hosts"):
        os.unlink(spot.host.path(name))
    known = spot.sight(spot.view(found=False)).known
    assert (known.host, known.program, known.key, known.place, known.account) == ("host1", expected, was.key, was.place, was.account)


def test_an_agent_that_was_never_there(spot: Spot) -> None:
    """The program is installed before the agent is: nothing is known, and nothing went away."""
    spot.store.save_journal(Journal())
    assert spot.sight(spot.view(found=False)).known.program == ""


@pytest.mark.parametrize(
    ("served", "told", "older"),
    [(None, "", "newest"), ("o" * 64, "o" * 64, "older"), ("x" * 64, "x" * 64, ""), ("", "", "")],
    ids=["what is installed", "one of ours", "a stranger's", "nothing"],
)
def test_what_is_served_although_another_is_installed(spot: Spot, served: Optional[str], told: str, older: str) -> None:
    """Which one it is: an agent that was not restarted needs another remedy than one that somebody took over."""
    view = spot.view()
    held = tuple(Held(name, leaf, 0, 1) for name, leaf in (("newest", view.seen.certificate), ("older", "o" * 64)))
    seen = replace(view.seen, held=held, served=view.seen.served if served is None else served, listening=served != "")
    sight = spot.sight(replace(view, seen=seen))
    assert sight.known.served == told
    assert sight.older == older or not told


@pytest.mark.parametrize(("account", "expected"), [((990, 991), "omi 990"), (None, "")])
def test_who_reads_the_pair(spot: Spot, monkeypatch: pytest.MonkeyPatch, account: Optional[tuple[int, int]], expected: str) -> None:
    """An account that was made anew has another number; one that is not known here is no change."""
    monkeypatch.setattr(agents, "owner", lambda *_: account)
    assert spot.sight(spot.view()).known.account == expected


def test_whose_certificate_stands_there_and_whether_it_fits(spot: Spot) -> None:
    """Who signed it tells who wrote it; a key without its certificate is another case than a new pair."""
    view = spot.view()
    ready = view.ready
    assert ready.installed
    for subject, issuer, signer in (("CN=h", "CN=h", ITSELF), ("CN=h", "CN=SCX-Certificate,DC=a", SCOM), ("CN=h", "CN=CA", "CN=CA")):
        one = replace(view, found=replace(ready, installed=replace(ready.installed, subject=subject, issuer=issuer)))
        assert spot.sight(one).signer == signer
        assert spot.sight(one).fits
    other = replace(view, found=replace(ready, installed=replace(ready.installed, spki="another")))
    assert not spot.sight(other).fits
    none = spot.sight(replace(view, found=replace(ready, installed=None)))
    assert (none.signer, none.fits) == ("", True)
