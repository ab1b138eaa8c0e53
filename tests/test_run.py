"""Whole runs against a real HTTPS CA and a real listening agent: every ending that docs/exit-status.md promises."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator

import pytest

from scx_enroll import activate, enroll, transaction
from scx_enroll import agent as agents
from scx_enroll.pace import COOL_DOWN_S, REPEAT_SPREAD_S
from scx_enroll.store import Store
from tests.lab.agent import LabHost, fingerprint
from tests.lab.authority import WRONG, to_pem
from tests.lab.ca import LabCA
from tests.scene import Scene

pytestmark = pytest.mark.slow
HOUR_S = 3600
REFUSED_BY_US = [kind for kind in WRONG if kind not in ("", "short", "san")]  # without SAN the CN serves, as SCOM asks


@pytest.fixture
def scene(tmp_path: Path, ca: LabCA) -> Iterator[Scene]:
    """A host with a running agent that serves its self-signed certificate."""
    with LabHost(tmp_path / "host", key="ec:secp256r1") as host:
        host.knobs(poll=0.02)
        host.start()
        yield Scene(host, [ca])


def unchanged(scene: Scene, before: Any, served: str) -> None:
    """Nothing that the agent reads or serves is other than before."""
    assert scene.host.snapshot() == before
    assert scene.served == served


# -- the good endings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["rsa:3072", "rsa:2048", "ec:secp256r1", "ec:secp384r1"])
def test_first_run_enrols_every_key(tmp_path: Path, ca: LabCA, key: str) -> None:
    """The promise itself: one run, one certificate, one restart, and the port serves it. tests/test_layouts.py has the layouts."""
    with LabHost(tmp_path / "host", key=key) as host:
        host.start()
        scene = Scene(host, [ca])
        ended = scene.run()
        assert (ended.status, ended.rows) == (0, ("C4", "L7")), ended
        assert scene.is_enrolled()
        assert (ca.authority.issued, ca.count_post, host.restarts) == (1, 1, 1)
        assert Path(host.path(host.certificate)).is_symlink()
        assert not Path(host.path("/etc/opt/omi/ssl/.omi_cert_marker")).exists()


def test_leaf_alone_is_installed_readable_by_all(scene: Scene) -> None:
    """The agent sends only the first certificate, and its account must be able to read it."""
    scene.run()
    target = Path(scene.host.resolve(scene.host.certificate))
    assert target.read_bytes().count(b"BEGIN CERTIFICATE") == 1
    assert target.stat().st_mode & 0o7777 == 0o444
    assert not Path(scene.host.path(scene.host.certificate)).readlink().is_absolute()


def test_second_run_touches_neither_network_nor_agent_nor_disk(scene: Scene, ca: LabCA) -> None:
    """It is what a fleet executes all day."""
    scene.run()
    before, gets, state = scene.host.snapshot(), ca.count_get, scene.remembered()
    ended = scene.run()
    assert (ended.status, ended.rows) == (0, ())
    assert (ca.count_get, ca.count_post, scene.host.restarts) == (gets, 1, 1)
    assert scene.host.snapshot() == before
    assert scene.remembered() == state


def test_renewal_when_due_installs_the_new_one(tmp_path: Path) -> None:
    """Certificates run out; the lifetime that counts is the certificate's real one."""
    offset = [0]
    with LabCA(tmp_path / "ca", lifetime=600, clock=lambda: time.time() + offset[0]) as ca, \
            LabHost(tmp_path / "host", key="ec:secp256r1") as host:
        host.start()
        scene = Scene(host, [ca], {"spread": "1/100", "at": "2/3"})
        scene.run()
        first = scene.served
        scene.offset_s = offset[0] = ca.switches.date_offset = 250
        ended = scene.run()
        assert (ended.status, ended.rows) == (0, ("C4", "L7"))
        assert scene.is_enrolled()
        assert scene.served != first
        assert ca.authority.issued == 2


def test_renew_asks_at_once(scene: Scene, ca: LabCA) -> None:
    """An operator who changed the template wants the new certificate now."""
    scene.run()
    first = scene.served
    assert scene.run(renew=True).status == 0
    assert scene.is_enrolled()
    assert scene.served != first
    copies = list(Path(scene.host.path(scene.host.certificate)).parent.glob("scx-enroll-*"))
    assert len(copies) == 1, "copies that nothing refers to are removed"


def test_alternative_names_are_asked_for_and_checked(scene: Scene) -> None:
    """A host that SCOM knows by a second name needs it in the SAN."""
    scene.configure(alternative_names="old.lab.test")
    ended = scene.run()
    assert ended.status == 0
    assert ended.result and ended.result.view.found and ended.result.view.found.installed
    assert set(ended.result.view.found.installed.names) == {scene.host.fqdn, "old.lab.test"}


def test_pending_then_approved_on_a_later_run(scene: Scene, ca: LabCA) -> None:
    """A template with manager approval must end in one certificate, however long that takes."""
    ca.switches.mode = "pending"
    before, served = scene.host.snapshot(), scene.served
    ended = scene.run()
    assert ended.status == 7
    assert "request ID 1" in ended.message
    assert "must issue or deny" in ended.hint
    unchanged(scene, before, served)
    assert scene.run().status == 7, "a run that only waits repeats the status"
    ca.authority.approve(1)
    assert scene.run(now=True).status == 0
    assert scene.is_enrolled()
    assert (ca.count_post, ca.authority.issued) == (1, 1)


def test_pending_then_denied_is_not_asked_again(scene: Scene, ca: LabCA) -> None:
    """A manager's no is final for the ID, and asking at once again would only annoy."""
    ca.switches.mode = "pending"
    before, served = scene.host.snapshot(), scene.served
    scene.run()
    ca.authority.deny(1)
    assert scene.run(now=True).status == 6
    assert scene.run().status == 6
    assert ca.count_post == 1
    unchanged(scene, before, served)


# -- the CA says no, or nothing -------------------------------------------------------------------------------------


def test_denial_is_told_with_its_cause_and_not_repeated(scene: Scene, ca: LabCA) -> None:
    """Status 6, the template's problem named, and no second POST before the back-off ends."""
    ca.switches.mode = "deny"
    before, served = scene.host.snapshot(), scene.served
    ended = scene.run()
    assert ended.status == 6
    assert "0x80094012" in ended.message
    assert ended.hint
    assert scene.run().status == 6
    assert ca.count_post == 1
    unchanged(scene, before, served)
    ca.switches.mode = "issue"
    assert scene.run(now=True).status == 0


def test_ca_down_is_unreachable_and_nothing_is_sent(scene: Scene, ca: LabCA) -> None:
    """Surely not stored: tried again later, and it costs nothing of the budget."""
    ca.stop()
    before, served = scene.host.snapshot(), scene.served
    ended = scene.run()
    assert ended.status == 5
    unchanged(scene, before, served)
    ca.start()
    ended = scene.run()
    assert (ended.status, ca.count_post) == (5, 0), "the back-off holds"
    scene.offset_s = 301
    ca.switches.date_offset = 301
    assert scene.run().status == 0
    assert ca.authority.issued == 1


def test_stopped_certsvc_costs_no_certificate(scene: Scene, ca: LabCA) -> None:
    """The web server lives, the CA behind it doesn't: surely not stored."""
    ca.switches.unavailable = "post"
    ended = scene.run()
    assert ended.status == 5
    assert ended.result
    assert [s.counts for s in ended.result.budget.submissions] == [False]
    ca.switches.unavailable = ""
    assert scene.run(now=True).status == 0
    assert ca.authority.issued == 1


@pytest.mark.parametrize(("lost", "rows"), [("before", 1), ("after", 2), ("truncated", 2)])
def test_reply_lost_sends_the_same_csr_once_more_after_a_pause(scene: Scene, ca: LabCA, lost: str, rows: int) -> None:
    """The server has no idempotency: an answer that was lost must cost one more certificate at the most."""
    ca.switches.lost, ca.switches.lost_times = lost, 1
    before, served = scene.host.snapshot(), scene.served
    ended = scene.run()
    assert ended.status == 5
    assert "doubtful" in ended.message
    assert scene.run(now=True).status == 5, "not even --now shortens the pause"
    assert ca.count_post == 1
    unchanged(scene, before, served)
    scene.offset_s = COOL_DOWN_S + REPEAT_SPREAD_S
    assert scene.run().status == 0
    assert scene.is_enrolled()
    assert len(ca.authority.rows) == rows
    assert len({row.csr for row in ca.authority.rows.values()}) == 1


def test_reply_lost_twice_waits_a_day(scene: Scene, ca: LabCA) -> None:
    """Twice doubtful may be two certificates; a person can look at the CA meanwhile."""
    ca.switches.lost = "after"
    scene.run()
    scene.offset_s = COOL_DOWN_S + REPEAT_SPREAD_S
    assert scene.run().status == 5
    scene.offset_s = 12 * HOUR_S
    assert scene.run(now=True).status == 5
    assert ca.count_post == 2


def test_certificate_not_fetched_is_fetched_later_without_a_second_post(scene: Scene, ca: LabCA) -> None:
    """Once the ID is known nothing is doubtful: GETs only."""
    ca.switches.cer_fails = 1
    ended = scene.run()
    assert ended.status == 5
    assert scene.run(now=True).status == 0
    assert (ca.count_post, ca.authority.issued) == (1, 1)
    assert scene.is_enrolled()


def test_unrecognised_page_is_kept_as_a_skeleton(scene: Scene, ca: LabCA) -> None:
    """Nothing may be concluded from it, and a bug report needs something to show."""
    ca.switches.answer, ca.switches.answer_on = "login", "post"
    ended = scene.run()
    assert ended.status == 5
    (page,) = (scene.state / "pages").iterdir()
    assert str(page.name) in ended.message
    assert page.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("wrong", REFUSED_BY_US)
def test_wrong_certificate_changes_nothing_and_is_not_asked_for_again(scene: Scene, ca: LabCA, wrong: str) -> None:
    """A certificate that SCOM or the agent would not take must not replace one that works, nor be bought twice."""
    ca.switches.wrong = wrong
    before, served = scene.host.snapshot(), scene.served
    ended = scene.run()
    assert ended.status == 8, ended
    unchanged(scene, before, served)
    assert scene.run().status == 8
    scene.offset_s = 36 * HOUR_S
    assert scene.run().status == 8, "time alone does not mend a template"
    assert ca.count_post == 1
    assert scene.host.restarts == 0


def test_refused_certificate_is_asked_for_again_when_the_operator_says_so(scene: Scene, ca: LabCA) -> None:
    """The template is mended on the CA, which no input of this host shows."""
    ca.switches.wrong = "eku"
    scene.run()
    ca.switches.wrong = ""
    assert scene.run(renew=True).status == 0
    assert scene.is_enrolled()


def test_refused_password_is_tried_once_until_it_changes(scene: Scene, ca: LabCA) -> None:
    """Accounts lock."""
    scene.write("password0", b"not the password\n", 0o600)
    ended = scene.run()
    assert ended.status == 13
    scene.offset_s = 30 * 24 * HOUR_S
    assert scene.run().status == 13
    assert scene.run(now=True).status == 13
    assert ca.bad_passwords == 1
    scene.offset_s = 0
    scene.write("password0", ca.password.encode(), 0o600)
    assert scene.run().status == 0


def test_budget_of_certificates_is_kept_whatever_is_asked(scene: Scene, ca: LabCA) -> None:
    """Three a day, however often somebody calls for more."""
    for _ in range(5):
        last = scene.run(renew=True)
        scene.offset_s += 61 * 60  # another hour of restarts
        ca.switches.date_offset = scene.offset_s
    assert ca.authority.issued == 3
    assert "budget" in last.message
    assert last.status != 0
    assert scene.is_enrolled()


def test_ca_that_leads_to_no_configured_root_gets_no_request(scene: Scene, ca: LabCA) -> None:
    """What can fail after a certificate was issued should fail before."""
    scene.write("ca0.pem", Path(ca.server_trust).read_bytes())
    ended = scene.run()
    assert ended.status == 3
    assert "nothing was sent" in ended.message
    assert ca.count_post == 0


def test_clock_far_from_the_cas_sends_nothing(scene: Scene, ca: LabCA) -> None:
    """A wrong clock makes a good certificate look expired."""
    ca.switches.date_offset = 400
    ended = scene.run()
    assert ended.status == 12
    assert "clock" in ended.message
    assert ca.count_post == 0


def test_web_server_that_is_not_trusted_gets_no_password(scene: Scene, ca: LabCA) -> None:
    """There is no switch that turns verification off."""
    scene.write("web0.pem", Path(ca.issuer_trust).read_bytes())
    assert scene.run().status == 5
    assert ca.log == []


def test_second_ca_is_asked_where_the_first_surely_stored_nothing(tmp_path: Path) -> None:
    """One CA in maintenance must not stop a fleet."""
    with LabCA(tmp_path / "a") as a, LabCA(tmp_path / "b") as b, LabHost(tmp_path / "host", key="ec:secp256r1") as host:
        host.start()
        scene = Scene(host, [a, b])
        scene.run()
        first, second = (a, b) if a.authority.issued else (b, a)
        first.stop()
        ended = scene.run(renew=True)
        assert ended.status == 0
        assert second.authority.issued == 1
        assert scene.is_enrolled()


def test_doubtful_request_stays_with_its_ca(tmp_path: Path) -> None:
    """The first CA may have issued: a second one must not issue another."""
    with LabCA(tmp_path / "a") as a, LabCA(tmp_path / "b") as b, LabHost(tmp_path / "host", key="ec:secp256r1") as host:
        host.start()
        scene = Scene(host, [a, b])
        for ca in (a, b):
            ca.switches.lost, ca.switches.lost_times = "after", 1
        assert scene.run().status == 5
        assert scene.posts == 1
        scene.offset_s = COOL_DOWN_S + REPEAT_SPREAD_S
        assert scene.run().status == 0
        assert sorted((a.authority.issued, b.authority.issued)) == [0, 2]


# -- the agent ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["omi", "omi-regular", "classic-omi"])
def test_agent_that_refuses_the_new_pair_gets_the_old_one_back(tmp_path: Path, ca: LabCA, layout: str) -> None:
    """The agent's tools say "started" when it died: only the wire tells, and the host must be as it was."""
    with LabHost(tmp_path / "host", layout, key="ec:secp256r1") as host:
        host.knobs(poll=0.02)
        host.start()
        scene = Scene(host, [ca])
        before, served = host.snapshot(), scene.served
        host.refuse_new()
        ended = scene.run()
        assert ended.status == 9, ended
        after = host.snapshot()
        assert {name: entry for name, entry in after.items() if not name.rpartition("/")[2].startswith("scx-enroll-")} == before
        assert after.keys() == before.keys(), "no copy is left behind"
        assert scene.served == served
        restarts = host.restarts
        again = scene.run()
        assert (again.status, again.rows, ca.count_post, host.restarts) == (9, (), 1, restarts)
        host.accept_all()
        scene.offset_s = 61 * 60
        assert scene.run().status == 0, "after the back-off the same certificate is tried again, not a new one"
        assert ca.count_post == 1
        assert scene.is_enrolled()


def test_agent_that_refuses_a_renewal_serves_the_earlier_certificate(scene: Scene) -> None:
    """Rollback goes to the last certificate that worked, not to the self-signed one."""
    scene.run()
    served = scene.served
    scene.host.refuse_new()
    scene.offset_s = 61 * 60
    scene.cas[0].switches.date_offset = scene.offset_s
    assert scene.run(renew=True).status == 9
    assert scene.served == served == scene.installed


def test_agent_that_takes_nothing_any_more_keeps_the_one_that_verifies(scene: Scene) -> None:
    """If the old pair does not come up either, the pair was not the cause."""
    scene.host.knobs(serve_only=["0" * 64])
    ended = scene.run()
    assert ended.status == 10
    assert scene.served == ""
    known = {fingerprint(row.certificate) for row in scene.cas[0].authority.rows.values()}
    assert scene.installed in known
    scene.host.accept_all()
    scene.offset_s = 61 * 60
    assert scene.run().status == 0, "started again within the budget"
    assert scene.is_enrolled()
    assert scene.cas[0].count_post == 1


def test_slow_stop_that_ends_with_nothing_running_is_started_again(scene: Scene) -> None:
    """The agent's own restart says 0 and leaves nothing running when its stop outlasts the poll."""
    scene.host.slow_stop(seconds=1.0, poll=0.01)
    assert scene.run().status == 0
    assert scene.is_enrolled()


def test_missing_control_command_is_seen_before_anything_is_asked_for(scene: Scene) -> None:
    """Without scxadmin nothing can be proved, so a certificate would be issued in vain."""
    before, served = scene.host.snapshot(), scene.served
    scene.host.remove_scxadmin()
    ended = scene.run()
    assert ended.status == 4
    assert "scxadmin" in ended.message
    assert scene.posts == 0
    unchanged(scene, before, served)


def test_agent_stopped_on_purpose_is_left_stopped_and_proved_later(scene: Scene) -> None:
    """An operator who stopped it has a reason."""
    scene.host.stop()
    ended = scene.run()
    assert ended.status == 0
    assert scene.served == ""
    assert scene.host.pid == 0
    assert "not proven" in ended.message
    scene.host.start()
    assert scene.is_enrolled()
    scene.run()
    assert b'"proven": true' in (scene.state / "journal.json").read_bytes()


@pytest.mark.parametrize("how", ["stopped", "serving"])
def test_agent_that_refuses_what_it_could_not_be_asked_about_gets_the_old_one_back(scene: Scene, ca: LabCA, how: str) -> None:
    """Installed while it was stopped, so nothing was proved: when it runs again, that is made up for, with the way back."""
    served = scene.served
    if how == "stopped":
        scene.host.refuse_new()
        scene.host.stop()
        assert scene.run().status == 0
        scene.host.start()
    else:
        scene.host.stop()
        assert scene.run().status == 0
        ours = os.readlink(scene.host.path(scene.host.certificate))
        scene.host.move_link_back()
        scene.host.start()
        scene.host.refuse_new()
        scene.host.relink(ours)
    posts = ca.count_post
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served, ca.count_post) == (9, served, posts), ended
    assert "was rolled back: the agent does not serve" in ended.message
    assert scene.installed == served
    assert scene.run(hasty=True).rows == ()
    scene.host.accept_all()
    scene.offset_s = HOUR_S + 1
    assert scene.run(now=True).status == 0
    assert scene.is_enrolled()


@pytest.mark.parametrize("fault", ["packages", "no tool", "another link", "another name"])
def test_unproven_certificate_is_not_undone_for_what_says_nothing_of_it(scene: Scene, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Nothing was tried with it, or it is not what the agent has read: told as it is, and what is installed stays."""
    scene.host.refuse_new()
    scene.host.stop()
    assert scene.run().status == 0
    scene.host.start()
    name = Path(scene.host.path(scene.host.certificate))
    if fault == "packages":
        real = activate.leave_packagers_alone

        def late(site: activate.Site) -> None:
            monkeypatch.setattr(agents, "packager", lambda _root: "dpkg")
            real(site)

        monkeypatch.setattr(activate, "leave_packagers_alone", late)
    elif fault == "no tool":
        tool = Path(scene.host.path(scene.host.scxadmin))
        tool.rename(tool.with_suffix(".away"))
    elif fault == "another link":
        text = os.readlink(name)
        name.unlink()
        name.symlink_to(f"../ssl/{text}")
    else:
        data = name.read_bytes()
        name.unlink()
        name.write_bytes(data)
    installed, before, starts = scene.installed, scene.host.snapshot(), scene.host.starts
    ended = scene.run(hasty=True)
    assert (ended.status, scene.installed, scene.host.starts) == (4, installed, starts + fault.startswith("another")), ended
    assert "rolled back" not in ended.message
    assert fault in ("another link", "another name") or scene.host.snapshot() == before
    assert b'"state": "settled"' in (scene.state / "journal.json").read_bytes()


def test_certificate_that_was_kept_since_it_is_not_the_cause_is_undone_later(scene: Scene) -> None:
    """The agent took nothing any more, and both were tried: one restart a look, until it is mended; then what verifies is served."""
    scene.host.refuse_new(b"none")
    assert scene.run().status == 10
    kept, starts = scene.installed, scene.host.starts
    scene.offset_s = HOUR_S + 1
    ended = scene.run(hasty=True)
    assert (ended.status, scene.installed, scene.host.starts) == (4, kept, starts + 1), ended
    scene.host.accept_all()
    scene.host.start()
    assert scene.run(hasty=True).status == 0
    assert (scene.served, scene.is_enrolled()) == (kept, True)


def test_operator_goes_back_on_a_stopped_agent_and_it_refuses_that(scene: Scene) -> None:
    """It serves what it served, which is put aside by nobody any more: no daily reinstallation, and no failure."""
    scene.run()
    scene.run(renew=True)
    served = scene.served
    scene.host.refuse_new()
    scene.host.stop()
    scene.offset_s = HOUR_S + 1
    assert scene.do(enroll.roll_back).status == 0
    enroll.hold(scene.root(), enroll.Options(), scene.tools(), "")
    scene.host.start()
    assert scene.run(hasty=True).status == 9
    assert scene.served == served
    ended = scene.run(hasty=True)
    assert (ended.status, ended.rows) == (0, ()), ended


def test_agent_that_is_about_to_be_asked_about_an_unproven_one_keeps_a_restart_for_the_way_back(scene: Scene) -> None:
    """It serves what it has read; with one restart left a new certificate that it may die of waits."""
    scene.host.stop()
    assert scene.run().status == 0
    ours = os.readlink(scene.host.path(scene.host.certificate))
    scene.host.move_link_back()
    scene.host.start()
    scene.host.relink(ours)
    now = scene.tools().clock()
    store = Store(scene.root())
    store.load()
    store.save_budget(replace(store.budget, restarts=(now, now)))
    served, starts = scene.served, scene.host.starts
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served, scene.host.starts) == (4, served, starts), ended
    assert "no room for two" in ended.message


def test_dead_agent_gets_no_certificate_it_could_not_prove(scene: Scene) -> None:
    """A failed proof must mean something, so the present agent has to answer first."""
    scene.host.kill()
    ended = scene.run()
    assert ended.status == 4
    assert scene.posts == 0


def test_dead_agent_with_a_valid_certificate_is_started_once(scene: Scene) -> None:
    """L9: nothing listens, and it was not stopped on purpose."""
    scene.run()
    scene.host.kill()
    ended = scene.run()
    assert (ended.status, ended.rows) == (0, ("L9",))
    assert scene.is_enrolled()


def test_link_moved_back_is_healed_without_ca_and_without_restart(scene: Scene, ca: LabCA) -> None:
    """The least that helps: the process still serves our certificate."""
    scene.run()
    gets = ca.count_get
    scene.host.move_link_back()
    ended = scene.run()
    assert (ended.status, ended.rows) == (0, ("L7",))
    assert (ca.count_get, ca.count_post, scene.host.restarts) == (gets, 1, 1)
    assert scene.is_enrolled()


def test_link_moved_back_and_agent_restarted_by_others_is_healed(scene: Scene, ca: LabCA) -> None:
    """The whole drift, seen on the wire."""
    scene.run()
    scene.host.move_link_back()
    scene.host.restart()
    assert not scene.is_enrolled()
    assert scene.run().status == 0
    assert scene.is_enrolled()
    assert ca.count_post == 1


def test_certificate_overwritten_through_our_link_is_put_back_from_the_record(scene: Scene, ca: LabCA) -> None:
    """SCOM's signing writes through the links, so the copy in the agent's folder is not the record."""
    scene.run()
    served = scene.served
    scene.host.scom_sign()
    assert scene.served != served
    assert scene.run().status == 0
    assert scene.served == served
    assert ca.count_post == 1


def test_new_key_gets_a_new_certificate(scene: Scene, ca: LabCA) -> None:
    """A package upgrade threw the key away: the old certificate must not be paired with the new key."""
    scene.run()
    scene.host.scxsslconfig_f()
    scene.host.restart()
    assert scene.run().status == 0
    assert scene.is_enrolled()
    assert ca.count_post == 2


def test_missing_key_is_made_by_the_agents_own_tool(scene: Scene) -> None:
    """L5: a fresh image may have no key yet."""
    scene.host.stop()
    for name in (scene.host.key, scene.host.certificate):
        Path(scene.host.path(name)).unlink()
    ended = scene.run()
    assert ended.rows[0] == "L5"
    assert ended.status == 0
    scene.host.start()
    assert scene.is_enrolled()


def test_files_that_changed_just_now_are_waited_for(scene: Scene) -> None:
    """A package is being installed: two hands in one folder."""
    scene.configure(settle="2m")
    ended = scene.run()
    assert (ended.status, scene.posts) == (4, 0)
    assert scene.run(now=True).status == 0
    assert scene.run().status == 0, "our own change is not somebody else's"


# -- interrupted, lost, brought by hand -----------------------------------------------------------------------------


def test_lost_journal_adopts_what_is_installed_without_the_ca(scene: Scene, ca: LabCA) -> None:
    """State lost must not cost a certificate."""
    scene.run()
    served, intermediate = scene.served, to_pem(ca.authority.chain()[:1])
    subprocess.run(["rm", "-rf", str(scene.state)], check=True)
    scene.write("ca0.pem", Path(ca.issuer_trust).read_bytes() + intermediate)
    gets = ca.count_get
    ended = scene.run()
    assert (ended.status, ended.rows, ca.count_get, ca.count_post) == (0, ("L7",), gets, 1)
    assert scene.served == served
    assert scene.host.restarts == 1


def test_lost_journal_with_unknown_intermediate_asks_for_the_chain_only(scene: Scene, ca: LabCA) -> None:
    """GETs tell the chain; a POST would buy what is there already."""
    scene.run()
    served = scene.served
    subprocess.run(["rm", "-rf", str(scene.state)], check=True)
    ended = scene.run()
    assert (ended.status, ca.count_post, scene.host.restarts) == (0, 1, 1)
    assert scene.served == served


def test_damaged_journal_is_refused_and_nothing_changes(scene: Scene) -> None:
    """Guessing at what was going on could end in a dead agent."""
    scene.run()
    path = scene.state / "journal.json"
    path.write_bytes(path.read_bytes()[:-20])
    before, served, state = scene.host.snapshot(), scene.served, scene.remembered()
    ended = scene.run()
    assert ended.status == 12
    assert "move" in ended.hint
    unchanged(scene, before, served)
    assert scene.remembered() == state


def test_csr_and_install_do_the_same_without_a_ca_connection(scene: Scene, ca: LabCA, tmp_path: Path) -> None:
    """A host in a cut-off network gets its certificate on a stick."""
    ca.stop()
    csr = scene.command("csr")
    assert (csr.returncode, csr.stderr) == (0, "")
    leaf = ca.authority.issue(csr.stdout.encode())
    file = tmp_path / "issued.pem"
    file.write_bytes(to_pem([leaf, *ca.authority.chain()]))
    done = scene.command("install", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert scene.served == scene.installed == fingerprint(leaf)
    assert scene.run().status == 0, "and it stays"


@pytest.mark.parametrize("wrong", ["key", "name", "eku", "issuer", "expired"])
def test_install_of_a_wrong_file_changes_nothing(scene: Scene, ca: LabCA, tmp_path: Path, wrong: str) -> None:
    """The same judgement as for what the CA sends."""
    csr = scene.command("csr").stdout.encode()
    file = tmp_path / "issued.pem"
    file.write_bytes(to_pem([ca.authority.issue(csr, wrong=wrong), *ca.authority.chain()]))
    before, served = scene.host.snapshot(), scene.served
    done = scene.command("install", str(file))
    assert done.returncode == 8
    assert "hint:" in done.stderr
    unchanged(scene, before, served)


def test_rollback_returns_proves_and_holds_until_release(scene: Scene, ca: LabCA) -> None:
    """Undo is one command, and the timer does not undo the undo."""
    served = scene.served
    scene.run()
    enrolled = scene.served
    assert scene.do(enroll.roll_back).status == 0
    assert scene.served == served
    assert scene.run().rows == ()
    enroll.hold(scene.root(), enroll.Options(), scene.tools(), "")
    assert scene.run().rows == (), "what the operator rolled back is not installed again by itself"
    scene.offset_s = HOUR_S + 1  # two restarts so far
    assert scene.run(now=True).rows == ("L7",)
    assert scene.served == enrolled
    assert ca.count_post == 1


def test_rollback_of_a_renewal_returns_to_the_certificate_before(scene: Scene) -> None:
    """Its copy is gone from the agent's folder; the record is not."""
    scene.run()
    first = scene.served
    scene.run(renew=True)
    assert scene.served != first
    scene.offset_s = HOUR_S + 1  # two restarts so far
    assert scene.do(enroll.roll_back).status == 0
    assert scene.served == first == scene.installed


def test_rollback_with_nothing_before_says_so(scene: Scene) -> None:
    """There is nothing to undo."""
    assert scene.do(enroll.roll_back).status == 2


def test_image_tree_is_installed_unproven_and_nothing_is_started(scene: Scene) -> None:
    """An image's tree must not restart its builder's agent."""
    served, calls = scene.served, len(scene.host.calls)
    ended = scene.run(live=False)
    assert ended.status == 0
    assert "not proven" in ended.message
    assert len(scene.host.calls) == calls
    assert scene.served == served
    assert scene.run().status == 0, "the first live run proves it"
    assert scene.is_enrolled()


def test_dry_run_changes_nothing(scene: Scene, ca: LabCA) -> None:
    """It prints the step, the reason, and stops."""
    before, served = scene.host.snapshot(), scene.served
    done = scene.command("run", "--dry-run")
    assert done.returncode == 0
    assert done.stdout.startswith("C4 submit:")
    (scene.etc / "password0").chmod(0o644)
    done = scene.command("run", "--dry-run")
    assert done.returncode in (3, 12), "a step that would fail before it acts is told now"
    assert "chmod" in done.stderr
    assert ca.log == []
    assert not scene.state.exists()
    unchanged(scene, before, served)


def test_status_changes_nothing_and_tells_both_certificates(scene: Scene) -> None:
    """The first thing an operator types."""
    scene.run()
    state = scene.remembered()
    done = scene.command("status")
    assert done.returncode == 0
    assert scene.served in done.stdout
    assert "renewal due" in done.stdout
    assert scene.remembered() == state


def test_second_run_at_once_is_busy_and_names_the_holder(scene: Scene, ca: LabCA) -> None:
    """The timer and a person at the same time."""
    ca.switches.slow = 1.5
    first = subprocess.Popen(scene.argv("run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 10
        while not ca.log and time.monotonic() < deadline:
            time.sleep(0.02)
        second = scene.command("run")
        assert second.returncode == 11
        assert f"process {first.pid}" in second.stderr
        third = scene.command("run", "--wait", "60")
        assert third.returncode == 0
    finally:
        first.communicate(timeout=60)
    assert first.returncode == 0
    assert ca.authority.issued == 1


def test_sigterm_finishes_the_step_and_the_next_run_goes_on(scene: Scene, ca: LabCA) -> None:
    """A unit that is stopped must not leave a doubtful request behind."""
    ca.switches.slow, ca.switches.slow_on = 1.0, "post"
    child = subprocess.Popen(scene.argv("run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 10
    while not ca.count_post and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=30)
    assert child.returncode == -signal.SIGTERM
    ca.switches.slow = 0
    assert scene.run().status == 0
    assert (ca.count_post, ca.authority.issued) == (1, 1)


def test_unattended_run_is_silent_and_succeeds_while_it_only_waits(scene: Scene, ca: LabCA) -> None:
    """Waiting is no failure of the unit."""
    ca.switches.mode = "pending"
    assert scene.command("run", "--unattended").returncode == 0
    done = scene.command("run", "--unattended")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_unattended_run_fails_where_a_person_is_needed(scene: Scene, ca: LabCA) -> None:
    """What needs a person is visible in systemctl --failed."""
    ca.switches.mode = "deny"
    done = scene.command("run", "--unattended")
    assert done.returncode == 6
    assert "hint:" in done.stderr


@pytest.mark.parametrize("fault", ["denied", "password", "trust", "refused", "lost", "unknown", "good"])
def test_the_password_is_in_nothing_that_is_written_or_printed(scene: Scene, ca: LabCA, fault: str) -> None:
    """Secrets never reach a log, an error, a saved page, or a file that others may read."""
    import base64

    ca.switches.mode = "deny" if fault == "denied" else "issue"
    ca.switches.wrong = "eku" if fault == "refused" else ""
    ca.switches.lost = "after" if fault == "lost" else ""
    ca.switches.answer, ca.switches.answer_on = ("login", "post") if fault == "unknown" else ("", "all")
    marker = "marker-Zo3kQ9-secret" if fault == "password" else ca.password
    scene.write("password0", marker.encode(), 0o600)
    if fault == "trust":
        scene.write("web0.pem", Path(ca.issuer_trust).read_bytes())
    done = scene.command("run", "--verbose")
    said = done.stdout + done.stderr + scene.command("status", "--json").stdout
    pair = f"{ca.user}:{marker}".encode()
    needles = [marker, base64.b64encode(pair).decode(), base64.b64encode(marker.encode()).decode().rstrip("=")]
    files = [path for path in Path(scene.host.root).rglob("*") if path.is_file() and path.name != "password0"]
    written = [path for path in files if any(needle.encode() in path.read_bytes() for needle in needles)]
    assert written == []
    assert not any(needle in said for needle in needles)
    key = Path(scene.host.path(scene.host.key)).read_bytes().split(b"\n")[2]
    assert key.decode() not in said
    assert [path for path in files if key in path.read_bytes()] == [Path(scene.host.resolve(scene.host.key))]


def test_nothing_listens_on_the_port_scom_uses(scene: Scene) -> None:
    """1270 not listed is a configuration fault of the agent, not of the enrolment."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        conf = scene.write("scx-enroll.conf", (scene.etc / "scx-enroll.conf").read_bytes().replace(
            f"port = {scene.host.port}".encode(), f"port = {taken.getsockname()[1]}".encode()))
        assert conf.exists()
        ended = scene.run()
    assert ended.status == 4
    assert "httpsport" in ended.message
    assert scene.posts == 0


def test_rollback_to_a_certificate_that_the_agent_refuses_comes_back_and_does_not_hold(scene: Scene) -> None:
    """The way back needs a restart too, so it must be there before the first one is spent; a dead agent is not held."""
    scene.run()
    scene.run(renew=True)
    served = scene.served
    scene.host.refuse_new()
    ended = scene.do(enroll.roll_back)
    assert (ended.status, scene.served) == (4, served), "two restarts this hour: no room for the way back"
    scene.offset_s = HOUR_S + 1
    ended = scene.do(enroll.roll_back)
    assert (ended.status, scene.served) == (9, served)
    assert b'"hold": ""' in (scene.state / "journal.json").read_bytes()


def test_renewal_that_could_not_be_installed_is_not_asked_for(scene: Scene, ca: LabCA) -> None:
    """A certificate costs the CA something: without restarts left it would only lie about."""
    scene.run()
    scene.run(renew=True)
    ended = scene.run(renew=True)
    assert ended.status == 4
    assert "restart budget" in ended.message
    assert ca.authority.issued == 2


def test_hold_and_release_need_neither_agent_nor_configuration(scene: Scene) -> None:
    """The operator stops everything in the middle of a broken installation."""
    (scene.etc / "scx-enroll.conf").unlink()
    assert scene.command("hold", "maintenance").returncode == 0
    scene.configure()
    assert scene.run().message == "held: maintenance"
    assert scene.command("release").returncode == 0
    assert scene.run().status == 0


@pytest.mark.parametrize("damage", [b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"garbage", b"half"])
def test_damaged_certificate_file_is_drift_and_healed(scene: Scene, ca: LabCA, damage: bytes) -> None:
    """A truncated omi.pem is a reason to act, not to fail."""
    scene.run()
    name = Path(scene.host.path(scene.host.certificate))
    data = name.read_bytes()
    name.unlink()
    name.write_bytes(data[: len(data) // 2] if damage == b"half" else damage)
    assert scene.run().status == 0
    assert scene.is_enrolled()
    assert ca.count_post == 1


def test_leaf_alone_from_the_same_ca_is_installed_with_the_known_intermediate(scene: Scene, ca: LabCA, tmp_path: Path) -> None:
    """AD CS offers the certificate without its chain, and the chain is known from the last time."""
    scene.run()
    leaf = ca.authority.issue(scene.command("csr").stdout.encode())
    (tmp_path / "leaf.pem").write_bytes(to_pem([leaf]))
    done = scene.command("install", str(tmp_path / "leaf.pem"))
    assert done.returncode == 0, done.stderr
    assert "installed generation" in done.stdout
    assert scene.served == fingerprint(leaf)


def test_a_person_at_a_terminal_is_told_what_a_wait_is_for(scene: Scene) -> None:
    """Thirty seconds of silence look like a hang; a log needs none of it."""
    import pty

    scene.host.slow_restart(1.0)
    terminal, end = pty.openpty()
    child = subprocess.Popen(scene.argv("run"), stdout=subprocess.DEVNULL, stderr=end)
    assert child.wait(60) == 0
    os.write(end, b"end of the test")
    said = os.read(terminal, 65536).decode()
    os.close(end)
    os.close(terminal)
    assert f"waiting for {scene.cas[0].server}" in said
    assert "waiting for /opt/microsoft/scx/bin/tools/scxadmin -restart" in said
    scene.host.move_link_back()
    scene.host.restart()
    assert "waiting" not in scene.command("run").stderr


def test_the_latest_failure_is_told_not_the_one_before(scene: Scene, ca: LabCA) -> None:
    """Who mended the template and then meets another fault must not hunt the old one."""
    ca.switches.wrong = "eku"
    assert scene.run().status == 8
    ca.switches.wrong, ca.switches.auth = "", "negotiate"
    ended = scene.run(renew=True)
    assert (ended.status, "Basic" in ended.message) == (13, True), ended
    assert scene.run().status == 13
    ca.switches.auth = "basic"
    assert scene.run(renew=True).status == 0


def test_a_rollback_to_a_certificate_that_is_not_valid_stays_visible(scene: Scene) -> None:
    """After release nothing is done by itself, and the host is not what the configuration asks for."""
    scene.run()
    scene.do(enroll.roll_back)
    enroll.hold(scene.root(), enroll.Options(), scene.tools(), "")
    ended = scene.run()
    assert (ended.status, ended.rows) == (9, ())
    assert "run --now" in ended.hint


def test_a_rollback_between_two_valid_certificates_is_no_failure(scene: Scene) -> None:
    """The one in service is valid, so nobody need be called."""
    scene.run()
    scene.run(renew=True)
    scene.offset_s = HOUR_S + 1
    scene.do(enroll.roll_back)
    enroll.hold(scene.root(), enroll.Options(), scene.tools(), "")
    assert scene.run().status == 0
    assert scene.is_enrolled()


# -- what a review found --------------------------------------------------------------------------------------------


def test_agent_that_our_restart_left_down_is_not_taken_for_stopped_on_purpose(scene: Scene) -> None:
    """Nothing runs after a slow stop and no restart is left: later runs must start it, not say that nothing is to do."""
    scene.run()
    scene.run(renew=True)  # two of three restarts
    scene.host.move_link_back()
    scene.host.restart()
    scene.host.relink(next(name for name in scene.host.snapshot() if "scx-enroll-" in name).rpartition("/")[2])
    scene.host.slow_stop(seconds=1.0, poll=0.01)
    assert scene.run().status == 4, "the third restart ends with nothing running"
    assert scene.served == ""
    assert scene.run().status == 4
    scene.host.knobs(stop_takes=None, poll=0.05)
    scene.offset_s = HOUR_S + 1
    ended = scene.run()
    assert (ended.status, ended.rows) == (0, ("L9",))
    assert scene.is_enrolled()


def test_rollback_is_not_proved_by_a_process_that_is_about_to_end(scene: Scene) -> None:
    """The restart back is a slow stop: what the old process serves in its last seconds proves nothing."""
    scene.host.refuse_new()
    served = scene.served
    scene.host.knobs(stop_takes=2.5, poll=0.01)
    ended = scene.run()
    time.sleep(3)
    assert ended.status == 9
    assert scene.served == served


def test_refused_password_is_not_sent_by_polls_either(scene: Scene, ca: LabCA) -> None:
    """A pending request is polled for days: each poll with a wrong password brings the lock nearer."""
    ca.switches.mode = "pending"
    scene.run()
    scene.write("password0", b"changed on the other side\n", 0o600)
    scene.offset_s = 3 * HOUR_S
    assert scene.run().status == 13
    for hours in (6, 30):
        scene.offset_s = hours * HOUR_S
        assert scene.run().status == 13
    assert scene.run(now=True).status == 13
    assert ca.bad_passwords == 1
    scene.write("password0", ca.password.encode(), 0o600)
    assert scene.run(now=True).status == 7
    ca.authority.approve(1)
    scene.offset_s = 0
    assert scene.run(now=True).status == 0
    assert ca.count_post == 1


def test_inputs_that_changed_while_pending_are_asked_for_afterwards(scene: Scene, ca: LabCA) -> None:
    """The certificate of the old request does not fit; that says nothing about the new inputs."""
    ca.switches.mode = "pending"
    scene.run()
    scene.configure(alternative_names="second.lab.test")
    ca.authority.approve(1)
    ca.switches.mode = "issue"
    ended = scene.run(now=True)
    assert ended.status == 0, ended
    assert ended.result and ended.result.view.found and ended.result.view.found.installed
    assert "second.lab.test" in ended.result.view.found.installed.names
    assert ca.count_post == 2


def interrupted(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill a run after the swap and before the restart."""

    class Killed(BaseException):
        pass

    def kill(*_arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(transaction, "prove", lambda *_a, **_k: kill())
        with pytest.raises(Killed):
            scene.run()
    assert b'"state": "installing"' in (scene.state / "journal.json").read_bytes()


def test_agent_that_is_gone_for_a_moment_leaves_an_installation_open(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package upgrade takes the server away and brings it back: no reason to roll back a good certificate."""
    interrupted(scene, monkeypatch)
    server = Path(scene.host.path("/opt/omi/bin/omiserver"))
    server.rename(server.with_suffix(".away"))
    assert scene.run().status == 4
    assert b'"state": "installing"' in (scene.state / "journal.json").read_bytes()
    server.with_suffix(".away").rename(server)
    assert scene.run().status == 0
    assert scene.is_enrolled()
    assert scene.posts == 1


def test_an_open_installation_is_finished_without_a_configuration(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """L1: the operator's typing error must not leave the agent between two certificates."""
    interrupted(scene, monkeypatch)
    (scene.etc / "scx-enroll.conf").write_text("[nonsense\n")
    assert scene.run().status == 3
    assert scene.is_enrolled()


def test_key_that_changed_while_interrupted_is_not_paired_with_the_old_certificate(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pair would kill the agent at its next start."""
    interrupted(scene, monkeypatch)
    scene.host.scxsslconfig_f()
    ended = [scene.run() for _ in range(3)][-1]
    scene.offset_s = HOUR_S + 1
    scene.cas[0].switches.date_offset = scene.offset_s
    ended = scene.run()
    assert ended.status == 0, ended
    assert scene.is_enrolled()


@pytest.mark.parametrize("verb", ["install", "rollback"])
def test_package_manager_at_work_stops_every_verb(scene: Scene, tmp_path: Path, verb: str) -> None:
    """A restart in the middle of an upgrade meets half an agent."""
    scene.run()
    file = tmp_path / "issued.pem"
    file.write_bytes(to_pem([scene.cas[0].authority.issue(scene.command("csr").stdout.encode())]))
    lock = Path(scene.host.path("/var/lib/dpkg/lock-frontend"))
    lock.parent.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl,sys,time; f=open(sys.argv[1],'w'); fcntl.lockf(f,fcntl.LOCK_EX); print('held',flush=True); time.sleep(60)",
         str(lock)], stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        before, served = scene.host.snapshot(), scene.served
        done = scene.command(verb, *([str(file)] if verb == "install" else []))
        assert done.returncode == 4, done.stderr
        assert "dpkg" in done.stderr
        assert scene.run().status == 4
        assert scene.command("hold", "freeze").returncode == scene.command("release").returncode == 0, "they change nothing of the agent's"
        unchanged(scene, before, served)
    finally:
        holder.kill()
        holder.communicate()


def test_missing_password_does_not_stop_healing(scene: Scene) -> None:
    """Serve the best valid certificate, whatever the CA is doing."""
    scene.run()
    scene.write("password0", b"wrong\n", 0o600)
    assert scene.run(renew=True).status == 13
    (scene.etc / "password0").unlink()
    scene.host.move_link_back()
    assert "L7" in scene.run().rows
    assert scene.is_enrolled()


def test_full_log_disk_does_not_stop_the_work(scene: Scene) -> None:
    """/dev/full stands for it: the certificate was obtained, so it is installed."""
    with open("/dev/full", "w") as full:
        child = subprocess.Popen(scene.argv("run"), stdout=full, stderr=full)
        assert child.wait(60) == 0
    assert scene.is_enrolled()


def test_certificate_that_is_born_old_is_not_asked_for_in_a_loop(tmp_path: Path) -> None:
    """A template of some minutes, or a CA at its end: NotBefore lies ten minutes back, so renewal seems due at once."""
    with LabCA(tmp_path / "ca", lifetime=60) as ca, LabHost(tmp_path / "host", key="ec:secp256r1") as host:
        host.start()
        scene = Scene(host, [ca])
        assert scene.run().status == 0
        assert scene.run().status == 0
        assert ca.authority.issued == 1


def test_folder_that_the_agents_account_cannot_enter_is_seen_before(scene: Scene) -> None:
    """The agent reads as its own user; a certificate that it can't reach is as fatal as a wrong one."""
    if os.geteuid() != 0:
        pytest.skip("without root the agent's account is ours, and may enter")
    Path(scene.host.path("/etc/opt/omi")).chmod(0o700)
    ended = scene.run()
    assert ended.status == 4
    assert ended.hint == "chmod a+x /etc/opt/omi"
    assert scene.posts == 0


def test_name_auto_that_contradicts_a_signed_certificate_stops_and_shows_both(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """SCOM goes on asking for the name it knows."""
    scene.run()
    monkeypatch.setattr(socket, "gethostname", lambda: "other")
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *a, **k: [(socket.AF_INET, socket.SOCK_STREAM, 6, "other.lab.test", ("192.0.2.1", 0))]
    )
    scene.configure(name="auto")
    ended = scene.run()
    assert ended.status == 3
    assert "other.lab.test" in ended.message
    assert scene.host.fqdn in ended.message


def test_name_auto_is_latched_at_the_first_success(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that gives another answer tomorrow changes nothing."""
    answers = [scene.host.fqdn]
    monkeypatch.setattr(socket, "gethostname", lambda: "host1")
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *rest: Any, **named: Any) -> Any:
        if host != "host1":
            return real(host, port, *rest, **named)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, answers[0], ("192.0.2.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    scene.configure(name="auto")
    assert scene.run().status == 0
    assert scene.is_enrolled()
    answers[0] = "wrong.lab.test"
    ended = scene.run()
    assert (ended.status, ended.rows) == (0, ())


@pytest.mark.parametrize(("code", "status"), [(socket.EAI_AGAIN, 4), (socket.EAI_NONAME, 3)])
def test_a_resolver_that_is_not_up_yet_is_taken_for_a_wrong_configuration(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, code: int, status: int
) -> None:
    """Early in a boot there is no network: that is waited for. A name that the resolver does not know needs a person."""

    def resolve(*_arguments: Any, **_named: Any) -> Any:
        raise socket.gaierror(code, "no answer")

    monkeypatch.setattr(socket, "gethostname", lambda: "host1")
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    scene.configure(name="auto")
    ended = scene.run()
    assert (ended.status, scene.posts) == (status, 0)
    assert "host1" in ended.message
    assert ended.hint


def test_original_whose_file_was_deleted_comes_back_from_the_saved_bytes(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """OMI's packages delete ssl/*: the link that stood there would dangle, and packages overwrite keys behind a dangling name."""
    served = scene.served
    scene.host.refuse_new()
    real = transaction.prove

    def prove(*arguments: Any, **named: Any) -> None:
        Path(scene.host.path(scene.host.host_pem)).unlink()
        real(*arguments, **named)

    monkeypatch.setattr(transaction, "prove", prove)
    assert scene.run().status == 9
    assert scene.served == served == scene.installed
    name = Path(scene.host.path(scene.host.certificate))
    assert name.is_file() and not name.is_symlink()


def test_installation_by_hand_that_is_refused_is_not_carried_out_by_a_later_run(scene: Scene, tmp_path: Path) -> None:
    """A command that ended with a failure must not be done behind the operator's back an hour later."""
    scene.run()
    csr = enroll.make_csr(scene.root(), enroll.Options(), scene.tools())
    authority = scene.cas[0].authority
    leaf = authority.issue(csr)
    certificate = to_pem([leaf, *authority.chain()])
    for _ in range(2):
        scene.host.move_link_back()
        scene.host.restart()
        scene.run()
    ended = scene.do(enroll.install, certificate, "other.pem")
    assert ended.status == 4
    assert "restart budget" in ended.message
    scene.offset_s += 2 * HOUR_S
    scene.cas[0].switches.date_offset = scene.offset_s
    assert scene.run().status == 0
    assert fingerprint(leaf) not in (scene.served, scene.installed)


def test_agents_key_that_is_too_weak_is_told_before_a_certificate_is_asked_for(scene: Scene, ca: LabCA) -> None:
    """It would be issued, and refused here; the hint has the command for a stronger one."""
    scene.configure(minimum_key="ec:secp384r1")
    before, served = scene.host.snapshot(), scene.served
    ended = scene.run()
    assert ended.status == 4
    assert "weaker than ec:secp384r1" in ended.message
    assert "run --rekey" in ended.hint
    assert (ca.count_get, ca.count_post) == (0, 0)
    unchanged(scene, before, served)
