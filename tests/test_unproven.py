"""What was installed while the agent did not run, and what leads back from it: to what the agent has served, and never to less than that."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from scx_enroll import activate, enroll, transaction
from scx_enroll.enroll import Options
from scx_enroll.store import Store
from tests.lab import packagescripts
from tests.lab.agent import LabHost
from tests.lab.authority import to_pem
from tests.lab.ca import LabCA
from tests.scene import BRISK, Outcome, Scene

pytestmark = pytest.mark.slow
HOUR_S = 3600


@pytest.fixture(scope="module")
def shared_ca(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabCA]:
    """One CA for all hosts here."""
    with LabCA(tmp_path_factory.mktemp("ca")) as ca:
        yield ca


@pytest.fixture
def scene(tmp_path: Path, shared_ca: LabCA) -> Iterator[Scene]:
    """A host whose agent serves its own certificate."""
    with LabHost(tmp_path / "host", key="ec:secp256r1") as host:
        host.knobs(poll=0.005)
        assert host.start()
        yield Scene(host, [shared_ca], patience=replace(BRISK, listener_s=1.0, gone_s=0.3))


def journal(scene: Scene) -> Dict[str, Any]:
    found: Dict[str, Any] = json.loads((scene.state / "journal.json").read_bytes())
    return found


def spend(scene: Scene, count: int) -> None:
    """Leave so many restarts in the budget, made just now."""
    store = Store(scene.root())
    store.load()
    store.save_budget(replace(store.budget, restarts=(scene.tools().clock(),) * count))


def untried(scene: Scene, *, refuse: bool = True) -> str:
    """Put a certificate in place while the agent is stopped; it runs again with what it served before, and dies of the new one."""
    served = scene.served
    scene.host.stop()
    assert scene.run().status == 0
    ours = os.readlink(scene.host.path(scene.host.certificate))
    scene.host.move_link_back()
    scene.host.start()
    if refuse:
        scene.host.refuse_new()
    scene.host.relink(ours)
    assert journal(scene)["untried"]
    return served


def install_another(scene: Scene) -> Outcome:
    authority = scene.cas[0].authority
    leaf = authority.issue(enroll.make_csr(scene.root(), Options(), scene.tools()))
    return scene.do(enroll.install, to_pem([leaf, *authority.chain()]), "another.pem")


def killed(scene: Scene, monkeypatch: pytest.MonkeyPatch, **wish: bool) -> None:
    """Run until the agent was restarted, in vain, and die."""

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(activate, "_await", kill)
        with pytest.raises(KeyboardInterrupt):
            scene.run(**wish)


@pytest.mark.parametrize("how", ["another over it", "two while it was stopped", "others broke the name"])
def test_the_way_back_leads_to_what_the_agent_never_served(scene: Scene, how: str) -> None:
    """The first restart shows that it refuses ours; then it serves what it served, by whatever way ours came to be there."""
    served = scene.served
    if how == "another over it":
        untried(scene)
        ended = install_another(scene)
    else:
        scene.host.refuse_new()
        scene.host.stop()
        assert scene.run().status == 0
        if how == "two while it was stopped":
            assert scene.run(renew=True).status == 0
            scene.host.start()
        else:
            scene.host.make_file("/etc/opt/omi/ssl/x.pem", scene.host.new_pair()[0])
            scene.host.relink("x.pem")
        ended = scene.run(hasty=True)
    assert (ended.status, scene.served, scene.installed) == (9, served, served), ended
    scene.host.accept_all()
    scene.offset_s = 2 * HOUR_S
    ended = scene.run(now=True)
    assert (ended.status, ended.rows, scene.served == scene.installed != served) == (0, ("L7",), True), ended


def test_the_way_back_passes_over_what_others_had_served_meanwhile(scene: Scene) -> None:
    """SCOM signed while ours waited for its proof: that is what was served before the next one of ours."""
    untried(scene)
    scene.host.accept_all()
    packagescripts.scom_sign(scene.host)
    served = scene.served
    scene.host.refuse_new()
    ended = install_another(scene)
    assert (ended.status, scene.served, scene.installed) == (9, served, served), ended


def test_an_operator_goes_back_from_one_that_was_not_tried_and_forth_again(scene: Scene) -> None:
    """The second rollback returns to what the first one left, as ever."""
    served = scene.served
    scene.host.stop()
    assert scene.run().status == 0
    ours = scene.installed
    for certificate in (served, ours):
        assert scene.do(enroll.roll_back).status == 0
        assert scene.installed == certificate


@pytest.mark.parametrize("what", ["another", "rollback"])
def test_what_is_served_counts_as_untried_until_a_run_has_noted_it(scene: Scene, what: str) -> None:
    """Somebody started the agent with it: what comes next has it as its way back."""
    scene.host.stop()
    assert scene.run().status == 0
    ours = scene.installed
    scene.host.refuse_new(scene.host.leaf())
    scene.host.start()
    assert scene.served == ours
    if what == "another":
        ended = install_another(scene)
    else:
        scene.host.kill()
        ended = scene.do(enroll.roll_back)
    assert (ended.status, scene.served, scene.installed) == (9, ours, ours), ended


@pytest.mark.parametrize("left", [1, 2])
def test_a_refused_one_over_a_broken_name_takes_the_last_restart(scene: Scene, left: int) -> None:
    """The agent serves what it has read; the way back leads to that, though it is not what stands there, and needs its restart all the same."""
    served = untried(scene)
    scene.host.make_file("/etc/opt/omi/ssl/x.pem", scene.host.new_pair()[0])
    scene.host.relink("x.pem")
    spend(scene, 3 - left)
    scene.host.fail_starts()
    before = scene.host.snapshot()
    ended = install_another(scene)
    assert (ended.status, scene.served) == ({1: 4, 2: 9}[left], served), ended
    assert left == 2 or scene.host.snapshot() == before


@pytest.mark.parametrize("how", ["seen", "restarted", "adopted"])
def test_what_was_proven_since_counts_as_untried(scene: Scene, how: str) -> None:
    """From then on a failed restart says nothing of it, and needs no two of them."""
    if how == "restarted":
        untried(scene, refuse=False)
    else:
        scene.host.stop()
        assert scene.run().status == 0
        if how == "adopted":
            authority = scene.cas[0].authority
            scene.offset_s = HOUR_S + 100
            leaf = authority.issue(enroll.make_csr(scene.root(), Options(), scene.tools()))
            scene.host.make_file("/etc/opt/omi/ssl/mine.pem", to_pem([leaf, *authority.chain()]))
            scene.host.relink("mine.pem")
        else:
            scene.host.start()
    rows = {"seen": (), "restarted": ("L8",), "adopted": ("L7",)}
    ended = scene.run(hasty=True)
    assert (ended.status, ended.rows, journal(scene)["untried"]) == (0, rows[how], False), ended


def test_the_way_back_is_recorded_before_it_is_gone(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that is to put back what was served is killed before it does: the next one knows where to."""
    served = untried(scene)

    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transaction, "_backward", kill)
        with pytest.raises(KeyboardInterrupt):
            install_another(scene)
    assert journal(scene)["installation"]["state"] == "rolling_back"
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served, scene.installed) == (9, served, served), ended


@pytest.mark.parametrize("what", ["operator's rollback", "relinked"])
def test_one_start_that_fails_takes_back_what_was_in_service(scene: Scene, what: str) -> None:
    """It did not get as far as the certificate, so it says nothing of it; nobody's decision is undone for that."""
    assert scene.run().status == 0
    good = scene.served
    if what == "relinked":
        scene.host.stop()
        scene.host.move_link_back()
        scene.offset_s = HOUR_S + 100
        assert scene.run(hasty=True).status == 0
    else:
        assert scene.run(renew=True).status == 0
        scene.host.stop()
        scene.offset_s = 2 * HOUR_S + 200
        assert scene.do(enroll.roll_back).status == 0
        enroll.hold(scene.root(), Options(), scene.tools(), "")
    scene.host.start()
    assert scene.served == good
    scene.host.kill()
    scene.host.fail_starts()
    assert scene.run(hasty=True).status == 0
    assert (scene.served, scene.installed) == (good, good)
    assert scene.run(hasty=True).rows == ()


def test_what_was_in_service_before_it_was_relinked_counts_as_tried(scene: Scene) -> None:
    """The agent was mended or broken meanwhile, and its starts tell: what it served for months is not put aside for one that it refuses."""
    assert scene.run().status == 0
    scene.host.stop()
    scene.host.move_link_back()
    scene.offset_s = HOUR_S + 100
    assert scene.run(hasty=True).status == 0
    assert not journal(scene)["untried"]


@pytest.mark.parametrize("how", ["it died of it", "killed in its restart"])
def test_the_last_restart_is_for_what_was_never_served(scene: Scene, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """One restart is left in the hour, and the agent is down: it goes to what it has served."""
    served = scene.served
    if how == "it died of it":
        scene.host.refuse_new()
        scene.host.stop()
        assert scene.run().status == 0
        scene.host.start()
        spend(scene, 2)
    else:
        untried(scene)
        spend(scene, 1)
        killed(scene, monkeypatch, hasty=True)
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served) == (9, served), ended
    assert "the last restart in the budget is not for" in ended.message


def test_a_way_back_that_has_to_wait_does_not_say_what_for(scene: Scene) -> None:
    """What was refused, and that the budget is spent: both, for who reads the log."""
    served = untried(scene)
    store = Store(scene.root())
    store.load()
    facts: Dict[str, Any] = {"layout": "omi", "port": scene.host.port, "certificate": scene.host.certificate}
    place = store.journal.installed
    store.installation("install", **facts, target=place, previous=store.journal.before, running=True)
    store.installation("failed", why="the agent does not serve 0123")
    scene.host.kill()
    spend(scene, 3)
    ended = scene.run(hasty=True)
    assert ended.status == 4
    assert ended.message.startswith("the agent does not serve 0123; the restart budget")
    scene.offset_s = HOUR_S + 1
    assert (scene.run(hasty=True).status, scene.served) == (9, served)


@pytest.mark.parametrize("fault", ["a tool that can't be started", "somebody else's pid file"])
def test_a_restart_that_was_not_made_undoes_a_certificate(scene: Scene, fault: str) -> None:
    """Nothing was tried with it; the agent goes on with what it has read."""
    served = untried(scene, refuse=False)
    if fault == "somebody else's pid file":
        scene.host.make_stray(poll=0.005)
        Path(scene.host.path("/var/opt/omi/run/omiserver.pid")).write_text("1\n")
        Path(scene.host.path(scene.host.scxadmin)).write_text("#!/bin/sh\nexit 0\n")
    else:
        Path(scene.host.path(scene.host.scxadmin)).write_text("#!/nonexistent/sh\n")
    installed = scene.installed
    ended = scene.run(hasty=True)
    assert (ended.status, scene.installed, scene.served) == (4, installed, served), ended


@pytest.mark.parametrize("times", [1, 3])
def test_starts_in_vain_spend_the_restart_of_the_way_back(scene: Scene, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """SCOM's port is not listed, so that nothing can be proved; when it is again, what was served before comes back at once."""
    served = scene.served
    scene.host.refuse_new()
    killed(scene, monkeypatch)
    conf = Path(scene.host.path("/etc/opt/omi/conf/omiserver.conf"))
    before = conf.read_bytes()
    conf.write_bytes(re.sub(rb"(?m)^httpsport=.*$", b"httpsport=0", before))
    for hour in range(times * 3):
        scene.offset_s = hour * HOUR_S
        assert scene.run(hasty=True).status == 4
    conf.write_bytes(before)
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served) == (9, served), ended


def test_a_hold_is_lost_where_what_a_killed_run_began_is_rolled_back(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who freezes a host must find it frozen; what was rolled back is told, too."""
    served = scene.served
    scene.host.refuse_new()
    killed(scene, monkeypatch)
    notes: List[str] = []
    enroll.hold(scene.root(), Options(), scene.tools(noted=notes.append), "freeze")
    assert (journal(scene)["hold"], scene.served) == ("freeze", served)
    assert any(note.startswith("what an interrupted run began was ended: generation") for note in notes), notes


def test_an_agent_that_refuses_what_it_served_is_not_a_failure_of_the_timer(scene: Scene) -> None:
    """It is down, and no time mends it: the unit fails, also when the same was told before."""
    assert scene.run().status == 0
    scene.host.refuse_new(b"none")
    scene.host.kill()
    for _ in range(2):
        ended = scene.command("run", "--unattended")
        assert ended.returncode == 4, ended.stderr
    assert scene.served == ""
