"""Others change the agent's files on a real tree, with a real agent and a real CA: the cause is told, and the least is done that helps."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import pytest

from scx_enroll import enroll
from scx_enroll.causes import done
from scx_enroll.job import Options
from scx_enroll.journal import DAY_S, HOUR_S, Change
from scx_enroll.pace import needs_a_person
from scx_enroll.plan import TRUCE_HINT
from scx_enroll.store import Store
from tests.lab import packagescripts
from tests.lab.agent import LabHost, fingerprint
from tests.lab.authority import to_pem
from tests.lab.ca import LabCA
from tests.scene import Outcome, Scene

ROOT = os.geteuid() == 0


@pytest.fixture
def scene(tmp_path: Path, ca: LabCA) -> Iterator[Scene]:
    """A host that is enrolled."""
    with LabHost(tmp_path / "host", key="ec:secp256r1") as host:
        host.knobs(poll=0.02)
        host.start()
        scene = Scene(host, [ca], {"certificates_per_day": "20"})
        scene.write("ca0.pem", Path(ca.issuer_trust).read_bytes() + to_pem(ca.authority.chain()[:1]))
        assert scene.run().status == 0
        yield scene


def name(scene: Scene) -> Path:
    """The name that the agent reads."""
    return Path(scene.host.path(scene.host.certificate))


def copy(scene: Scene) -> Path:
    """Our copy, to which that name leads."""
    return Path(scene.host.resolve(scene.host.certificate))


def later(scene: Scene, seconds: int) -> None:
    """So much time passes, for the CA too."""
    scene.offset_s += seconds
    for ca in scene.cas:
        ca.switches.date_offset = scene.offset_s


def look(scene: Scene) -> Tuple[Outcome, List[Change]]:
    """One run, and what it told when it saw it."""
    told: List[Change] = []
    ended = scene.run(parts={"noticed": told.append})
    return ended, told


def kept(scene: Scene) -> List[Dict[str, Any]]:
    """What the journal has of changes."""
    changes: List[Dict[str, Any]] = json.loads((scene.state / "journal.json").read_bytes())["changes"]
    return changes


def stranger(scene: Scene) -> None:
    """Put another certificate in place of the link, as a script that knows nothing of it."""
    name(scene).unlink()
    name(scene).write_bytes(scene.host.new_pair()[0])


def serve_other(scene: Scene) -> None:
    """Have the agent serve what is not on its disk any more."""
    real = copy(scene)
    data = real.read_bytes()
    scene.host.scom_sign()
    scene.host.write_through(scene.host.certificate, data)


def reinstall(scene: Scene) -> None:
    """Put the agent's program in place anew, as its package does."""
    path = Path(scene.host.path("/opt/omi/bin/omiserver"))
    shutil.copy2(path, path.with_name("new"))
    path.with_name("new").replace(path)


class Drift(NamedTuple):
    """What is done to a host, what is told of it, what a run does about it and how often agent and CA are asked."""

    disturb: Callable[[Scene], Any]
    cause: str
    what: str
    done: str
    rows: Tuple[str, ...] = ("L7",)
    restarts: int = 0
    posts: int = 0


DRIFTS = {
    "link moved back": Drift(lambda s: s.host.move_link_back(), "link-moved", "omi-host-host1.pem", "relinked"),
    "link to nowhere": Drift(lambda s: s.host.relink("nowhere.pem"), "link-moved", "nowhere.pem, where nothing is", "relinked"),
    "name deleted": Drift(lambda s: name(s).unlink(), "deleted", "omi.pem was deleted", "relinked"),
    "copy deleted": Drift(lambda s: copy(s).unlink(), "deleted", "-1.pem was deleted, to which", "reinstalled"),
    "copy closed": Drift(lambda s: copy(s).chmod(0o600), "permissions", "mode 0600 now", "reinstalled"),
    "copy open to all": Drift(lambda s: copy(s).chmod(0o666), "permissions", "mode 0666 now", "reinstalled"),
    "a stranger's file": Drift(stranger, "replaced", "by somebody, with a self-signed certificate", "relinked"),
    "written through the link": Drift(
        lambda s: s.host.write_through(s.host.certificate, b"garbage"), "overwritten", "by somebody, with what is no certificate", "reinstalled"
    ),
    "signed by SCOM": Drift(lambda s: s.host.scom_sign(), "overwritten", "by SCOM's signing", "reinstalled", restarts=1),
    "another one served": Drift(serve_other, "served-older", "which is not ours", "restarted", ("L8",), 1),
    "scxsslconfig -f": Drift(
        lambda s: (s.host.scxsslconfig_f(), s.host.restart()), "key-regenerated", "scxsslconfig -f made", "asked the CA, reinstalled",
        ("C4", "L7"), 1, 1,
    ),
    "package upgrade": Drift(
        lambda s: s.host.omi_upgrade("ec:secp256r1"), "key-regenerated", "a package upgrade replaced", "asked the CA, reinstalled",
        ("C4", "L7"), 1, 1,
    ),
    "configuration": Drift(lambda s: s.configure(at="1/2"), "configuration", "of scx-enroll changed", "nothing had to be done", ()),
    "agent installed again": Drift(reinstall, "agent-reinstalled", "installed again or upgraded", "nothing had to be done", ()),
}


def move_aside(scene: Scene) -> None:
    """Leave the pair where a package script left it that failed half-way."""
    for path in (scene.host.certificate, scene.host.key):
        os.rename(scene.host.path(path), scene.host.path(f"{path}_temp"))


def serve_older(scene: Scene) -> None:
    """Renew, and have the agent serve the generation before again, with the newer one on the disk."""
    older = copy(scene).read_bytes()
    assert scene.run(renew=True).status == 0
    newer = copy(scene).read_bytes()
    scene.host.write_through(scene.host.certificate, older)
    scene.host.restart()
    scene.host.write_through(scene.host.certificate, newer)


def configure_agent(scene: Scene) -> None:
    """Edit omiserver.conf."""
    path = Path(scene.host.path(scene.host.conf))
    path.write_text(path.read_text() + "loglevel=INFO\n")


MADE_ANEW = {  # what touches more than our names, or is mended with more than that
    "moved aside": Drift(move_aside, "moved-aside", "moved the agent's pair aside (*_temp)", "moved back", ("L5",)),
    "agent configured": Drift(configure_agent, "configuration", "omiserver.conf", "nothing had to be done", ()),
    "an older one served": Drift(serve_older, "served-older", "the older generation", "restarted", ("L8",), 3, 1),
    "key deleted": Drift(
        lambda s: os.unlink(s.host.path(s.host.key)), "deleted", "the agent's key was deleted", "a key made, asked the CA, reinstalled",
        ("L5", "C4", "L7"), 1, 1,
    ),
}


def untouched(scene: Scene) -> Dict[str, Any]:
    """All in the agent's folders that is neither the name it reads, nor a copy of ours, nor the marker."""
    ours = (scene.host.certificate, "/etc/opt/omi/ssl/.omi_cert_marker")
    found = scene.host.snapshot()
    return {path: entry for path, entry in found.items() if path not in ours and "/scx-enroll-" not in path}


@pytest.mark.parametrize("drifts", [("link moved back", "copy deleted", "configuration"), pytest.param(DRIFTS, marks=pytest.mark.slow)], ids=["some", "all"])
def test_each_drift_is_told_by_its_cause_and_healed_with_the_least(scene: Scene, ca: LabCA, drifts: Sequence[str]) -> None:
    """One host lives through all of them, some hours apart: log, journal, acts, restarts, requests, and everything else as it was."""
    for drift in drifts:
        disturb, cause, what, deeds, rows, restarts, posts = DRIFTS[drift]
        later(scene, 7 * HOUR_S)  # six restarts a day
        disturb(scene)
        before, restarted, sent, known = untouched(scene), scene.host.restarts, ca.count_post, len(kept(scene))
        ended, told = look(scene)
        assert (ended.status, ended.rows) == (0, rows), (drift, ended)
        upgraded = ["agent-reinstalled"] if drift == "package upgrade" else []
        assert [change.cause for change in told] == [cause, *upgraded], (drift, told)
        assert what in told[0].what, (drift, told)
        assert ended.result is not None
        assert done(ended.result.journal.changes[-len(told)]) == deeds, drift
        assert len(kept(scene)) == min(known + len(told), 16)
        assert (scene.host.restarts - restarted, ca.count_post - sent) == (restarts, posts), drift
        assert scene.is_enrolled(), drift
        assert untouched(scene) == before, drift
        state = scene.remembered()
        assert look(scene)[1] == [], drift
        assert scene.remembered() == state, f"{drift}: told and written once"
        assert len(list(name(scene).parent.glob("scx-enroll-*"))) == 1, drift


@pytest.mark.slow
def test_what_touches_more_than_our_names(scene: Scene, ca: LabCA) -> None:
    """The pair moved aside, an older generation served, a key that is gone: the right cause, since the hint goes by it, and one remedy."""
    for drift, (disturb, cause, what, deeds, rows, restarts, posts) in MADE_ANEW.items():
        later(scene, 7 * HOUR_S)
        restarted, sent = scene.host.restarts, ca.count_post
        disturb(scene)
        ended, told = look(scene)
        assert (ended.status, ended.rows) == (0, rows), (drift, ended)
        assert [change.cause for change in told] == [cause], (drift, told)
        assert what in told[0].what, (drift, told)
        assert ended.result is not None
        assert done(ended.result.journal.changes[-1]) == deeds, drift
        assert (scene.host.restarts - restarted, ca.count_post - sent) == (restarts, posts), drift
        assert scene.is_enrolled(), drift
        assert look(scene)[1] == [], drift


@pytest.mark.slow
@pytest.mark.skipif(not ROOT, reason="without root the agent's account is ours, and may enter everything")
def test_a_folder_that_the_agent_can_not_enter(scene: Scene, ca: LabCA) -> None:
    """Named with the command that helps; the agent, which still serves, is left alone."""
    folder = name(scene).parent
    folder.chmod(0o750)
    before = scene.host.snapshot()
    ended, told = look(scene)
    assert [(change.cause, change.what) for change in told] == [("permissions", "the agent's account can't get at /etc/opt/omi/ssl any more")]
    assert (ended.status, ended.hint) == (4, "chmod a+x /etc/opt/omi/ssl")
    assert (scene.host.snapshot(), ca.count_post) == (before, 1)
    folder.chmod(0o755)
    ended, told = look(scene)
    assert (ended.status, told) == (0, [])


@pytest.mark.slow
def test_an_agent_that_its_packages_purge(scene: Scene, ca: LabCA) -> None:
    """Nothing is left of it: told, and nothing asked for; the one that is installed later gets a certificate for its own key."""
    packagescripts.purge(scene.host)
    ended, told = look(scene)
    assert (ended.status, [change.cause for change in told], ca.count_post) == (4, ["agent-removed"], 1)
    assert look(scene)[1] == []
    packagescripts.fresh_install(scene.host, kind="ec:secp256r1")
    ended, told = look(scene)
    assert (ended.status, [change.cause for change in told]) == (0, ["key-regenerated", "agent-reinstalled"])
    assert ca.count_post == 2
    assert scene.is_enrolled()


@pytest.mark.slow
def test_status_log_and_json_tell_it_alike(scene: Scene) -> None:
    """A person who comes later reads what the timer's run has told the log."""
    scene.host.move_link_back()
    ran = scene.command("run", "--unattended")
    lines = ran.stdout.splitlines()
    assert lines[0] == "scx-enroll: link-moved: /etc/opt/omi/ssl/omi.pem was linked to /etc/opt/omi/ssl/omi-host-host1.pem"
    assert lines[1].startswith("scx-enroll: linked generation ")
    assert scene.command("run", "--unattended").stdout == ""
    (change,) = json.loads(scene.command("status", "--json").stdout)["changes"]
    assert (change["cause"], change["done"]) == ("link-moved", "relinked")
    shown = scene.command("status").stdout
    assert f"link-moved: {change['what']}\n  done:         relinked\n" in shown


def test_a_look_writes_nothing_down(scene: Scene) -> None:
    """`status` and `--dry-run` change nothing; the next run still sees it for the first time."""
    scene.host.move_link_back()
    state = scene.remembered()
    scene.do(enroll.inspect)
    assert scene.do(enroll.rehearse).message.endswith("not in place")
    assert scene.remembered() == state
    assert [change.cause for change in look(scene)[1]] == ["link-moved"]


@pytest.mark.slow
def test_a_held_host_tells_and_waits(scene: Scene) -> None:
    """Nothing is done while held; what was open is healed, and told so, after release."""
    enroll.hold(scene.root(), enroll.Options(), scene.tools(), "freeze")
    scene.host.move_link_back()
    before = scene.host.snapshot()
    ended, told = look(scene)
    assert [change.cause for change in told] == ["link-moved"]
    assert ended.result and done(ended.result.journal.changes[-1]) == "nothing: held: freeze"
    assert scene.host.snapshot() == before
    enroll.hold(scene.root(), enroll.Options(), scene.tools(), "")
    ended, told = look(scene)
    assert told == []
    assert ended.result and done(ended.result.journal.changes[-1]) == "relinked"


@pytest.mark.slow
@pytest.mark.skipif(not ROOT, reason="without root the agent's account is ours, and may read everything")
def test_a_key_that_the_agent_can_not_read_asks_no_ca(scene: Scene, ca: LabCA) -> None:
    """The agent would die at its next start, and a new certificate with it: named, with the command; nothing is done."""
    key = Path(scene.host.path(scene.host.key))
    key.chmod(0o400)
    os.chown(key, 0, 0)
    before = scene.host.snapshot()
    ended, told = look(scene)
    assert [change.cause for change in told] == ["permissions"]
    assert (ended.status, ended.hint) == (4, "chown omi /etc/opt/omi/ssl/omikey.pem && chmod 0400 /etc/opt/omi/ssl/omikey.pem")
    assert scene.run(renew=True).status == 4
    assert ca.count_post == 1
    assert scene.host.snapshot() == before
    os.chown(key, *scene.host.account)
    ended, told = look(scene)
    assert (ended.status, told) == (0, [])
    assert ended.result and done(ended.result.journal.changes[-1]) == "nothing had to be done"


@pytest.mark.slow
def test_an_agent_that_is_gone_and_one_that_comes_back(scene: Scene) -> None:
    """Purged by a package script: told, status 4, nothing asked for; a new one is told as well."""
    path = Path(scene.host.path("/opt/omi/bin/omiserver"))
    path.rename(path.with_name("kept"))
    ended, told = look(scene)
    assert (ended.status, [change.cause for change in told]) == (4, ["agent-removed"])
    assert look(scene)[1] == []
    path.with_name("kept").rename(path)
    ended, told = look(scene)
    assert (ended.status, [change.cause for change in told]) == (0, ["agent-reinstalled"])


@pytest.mark.slow
def test_a_state_from_a_backup_keeps_the_certificate_in_service(scene: Scene, ca: LabCA, tmp_path: Path) -> None:
    """The state of last week knows neither what is installed nor what was done: adopted, and the CA is not asked."""
    shutil.copytree(scene.state, tmp_path / "backup")
    assert scene.run(renew=True).status == 0
    served = scene.served
    shutil.rmtree(scene.state)
    shutil.copytree(tmp_path / "backup", scene.state)
    ended, told = look(scene)
    assert [change.cause for change in told] == ["restored"]
    assert (ended.status, ended.rows, ca.count_post) == (0, ("L7",), 2)
    assert ended.result and done(ended.result.journal.changes[-1]) == "adopted"
    assert scene.served == served == scene.installed


@pytest.mark.slow
def test_a_clock_that_went_back_is_told_once(scene: Scene) -> None:
    """Nothing is done about it; certificates and budgets go on as their own rules say."""
    scene.offset_s = -3 * HOUR_S
    assert [change.cause for change in look(scene)[1]] == ["clock"]
    assert look(scene)[1] == []
    scene.offset_s = 0
    assert look(scene)[1] == []


@pytest.mark.slow
def test_what_others_have_half_done_has_no_cause_yet(scene: Scene) -> None:
    """Within `settle` a package may have deleted what it is about to write: nothing is told before its files are quiet."""
    scene.configure(settle="10m")
    look(scene)
    name(scene).unlink()
    ended, told = look(scene)
    assert (ended.status, told) == (4, [])
    later(scene, 601)
    ended, told = look(scene)
    assert (ended.status, [change.cause for change in told]) == (0, ["deleted"])


def in_truce(scene: Scene) -> None:
    """SCOM signs, is put right, and signs again within the hour."""
    later(scene, 2 * HOUR_S)
    for _ in range(2):
        scene.host.scom_sign()
        ended = scene.run()
        later(scene, 600)
    assert ended.message.startswith("truce: ")


@pytest.mark.slow
def test_a_truce_does_not_keep_an_agent_down(scene: Scene) -> None:
    """Who made the agent unable to start has made the truce pointless; only the restart budget bounds the cure."""
    ours = scene.served
    in_truce(scene)
    scene.host.install(b"no certificate\n")
    scene.host.restart()
    assert scene.served == ""
    ended = scene.run()
    assert ended.status == 0, ended
    assert scene.served == ours


@pytest.mark.slow
def test_a_person_ends_a_truce(scene: Scene) -> None:
    """`release`, once the other one was stopped; and until then each unattended run fails, since no time mends it."""
    ours = scene.served
    in_truce(scene)
    ended = scene.run()
    assert ended.result
    assert needs_a_person(ended.status, ended.result.view.seen.held, scene.tools().clock(), ended.result.step.retry)
    assert "then: scx-enroll release" in ended.hint
    assert scene.command("release").stdout == "scx-enroll: released; the next run goes on\n"
    assert scene.run().status == 0
    assert scene.served == ours


@pytest.mark.slow
def test_status_tells_what_no_run_has_seen_yet(scene: Scene) -> None:
    """One looks just after something happened; the look itself writes nothing down."""
    scene.host.scom_sign()
    before = scene.remembered()
    told = scene.do(enroll.inspect).result
    assert told
    assert [(one.cause, done(one)) for one in told.journal.changes[-1:]] == [("overwritten", "nothing yet: no run has seen it")]
    assert scene.remembered() == before


@pytest.mark.slow
def test_another_pair_is_configured_and_nobody_replaced_anything(scene: Scene) -> None:
    """`pemfile` and `keyfile` lead to another pair, and back: a configuration, no rewrite and no fight."""
    host = scene.host
    conf = Path(host.path(host.conf))
    shipped = conf.read_bytes()
    other = "/etc/opt/omi/ssl/other.pem", "/etc/opt/omi/ssl/other-key.pem"
    for path, data in zip(other, host.new_pair()):
        host.make_file(path, data, 0o400, host.account)
    for text in (shipped + f"pemfile={other[0]}\nkeyfile={other[1]}\n".encode(), shipped):
        later(scene, 600)
        conf.chmod(0o644)
        conf.write_bytes(text)
        ended, told = look(scene)
        assert [change.cause for change in told] == ["configuration"], told
    assert ended.result and ended.result.journal.fights == ()


@pytest.mark.slow
def test_a_rollback_to_what_is_there_says_so(scene: Scene) -> None:
    """Else the way forward that a second rollback is would be lost, and the host held for nothing."""
    scene.run(renew=True)
    later(scene, 2 * HOUR_S)
    assert scene.do(enroll.roll_back).status == 0
    enroll.hold(scene.root(), Options(), scene.tools(), "")
    store = Store(scene.root())
    with store.lock(0, lambda _: None):
        store.update(before=store.journal.installed)
    before = scene.remembered()
    ended = scene.do(enroll.roll_back)
    assert (ended.status, "is in place already" in ended.message) == (2, True)
    assert scene.remembered() == before


@pytest.mark.slow
def test_two_rewrites_within_an_hour_are_a_fight(scene: Scene, ca: LabCA) -> None:
    """SCOM signs again what was just put right: it is left alone for an hour, `--now` or not, and then tried again."""
    later(scene, 2 * HOUR_S)
    ours = scene.served
    scene.host.scom_sign()
    assert scene.run().status == 0, "once is no fight"
    later(scene, 600)
    foreign = fingerprint(scene.host.scom_sign())
    before, restarts = scene.host.snapshot(), scene.host.restarts
    ended, told = look(scene)
    assert [change.cause for change in told] == ["overwritten"]
    assert (ended.status, ended.rows) == (4, ())
    assert ended.message.startswith("truce: others rewrote the agent's certificate again after it was put right")
    assert f"the agent serves {foreign[:16]}, which is not what is wanted" in ended.message
    assert ended.result and ended.result.step.until
    assert done(ended.result.journal.changes[-1]).startswith("waiting: truce: ")
    assert scene.run(now=True).status == scene.run(renew=True).status == 4
    assert scene.host.snapshot() == before
    assert (scene.host.restarts, ca.count_post, scene.served) == (restarts, 1, foreign)
    later(scene, HOUR_S)
    ended, told = look(scene)
    assert (ended.status, ended.rows, told) == (0, ("L7",), [])
    assert scene.served == ours
    assert ended.result and done(ended.result.journal.changes[-1]) == "reinstalled"
    later(scene, HOUR_S)
    scene.host.move_link_back()
    ended = look(scene)[0]
    assert ended.status == 4, "not quiet for a day yet"
    assert ended.result and ended.result.step.until
    assert ended.result.step.until - ended.result.journal.fights[0].at == 2 * HOUR_S


def fight(scene: Scene, disturb: Callable[[], Any]) -> Outcome:
    """Disturb, and let a run look, ten minutes after what was before."""
    later(scene, 600)
    disturb()
    return scene.run()


def counted(scene: Scene) -> Tuple[Any, ...]:
    """Whatever must not change in a truce: bytes, links and owners, restarts, requests, what is served."""
    return scene.host.snapshot(), scene.host.restarts, scene.host.starts, scene.posts, scene.served


@pytest.mark.slow
def test_a_fight_that_goes_on_for_days(scene: Scene) -> None:
    """Something puts its file back each time: left alone for longer and longer, up to a day, tried once in between, and forgotten after a quiet day."""
    ours, restarts = scene.served, scene.host.restarts
    later(scene, 2 * HOUR_S)
    assert fight(scene, lambda: stranger(scene)).rows == ("L7",)
    for hours in (1, 2, 4, 8, 16, 24, 24):
        ended = fight(scene, lambda: stranger(scene))
        began, before = scene.tools().clock(), counted(scene)
        for passed in (0, hours * HOUR_S // 2, hours * HOUR_S - 5):
            scene.offset_s = began + passed - int(time.time())
            ended = scene.run(now=passed != 0)
            assert (ended.status, ended.rows) == (4, ()), (hours, ended)
            assert ended.message.startswith("truce: others rewrote the agent's certificate again")
            assert ended.result
            assert ended.result.step.until
            assert abs(ended.result.step.until - began - hours * HOUR_S) < 5, hours
            assert counted(scene) == before
        later(scene, 10)
        assert scene.run().rows == ("L7",), "tried again by itself"
        assert (scene.served, scene.installed, scene.host.restarts, scene.posts) == (ours, ours, restarts, 1)
    later(scene, 2 * DAY_S + 10)
    assert fight(scene, lambda: stranger(scene)).rows == ("L7",), "once is no fight"
    ended = fight(scene, lambda: stranger(scene))
    assert ended.result
    assert ended.result.journal.fights[0].rest_s == HOUR_S


def test_a_fight_that_only_the_hourly_look_sees(scene: Scene) -> None:
    """Under cron nothing tells of a change: configuration management every half an hour is put right once, not each hour for ever."""
    assert fight(scene, lambda: stranger(scene)).rows == ("L7",)
    later(scene, HOUR_S + 60)
    stranger(scene)
    before = counted(scene)
    ended = scene.run()
    assert (ended.status, ended.rows, counted(scene)) == (4, (), before)
    assert ended.message.startswith("truce: ")


def test_a_fight_after_a_release_counts_from_nought(scene: Scene) -> None:
    """Who ended the truce has stopped the other one; a new fight is as short as a first one."""
    for _ in range(2):
        ended = fight(scene, lambda: stranger(scene))
    assert ended.status == 4
    assert enroll.hold(scene.root(), Options(), scene.tools(), "") == "a truce over the agent's certificate"
    assert (scene.run().rows, fight(scene, lambda: stranger(scene)).rows) == (("L7",), ("L7",))
    ended = fight(scene, lambda: stranger(scene))
    assert ended.result
    assert (ended.status, ended.result.journal.fights[0].rest_s) == (4, HOUR_S)


@pytest.mark.slow
def test_a_fight_over_the_key_costs_a_certificate_an_hour(scene: Scene, ca: LabCA) -> None:
    """A script makes a new pair each time: in the truce the CA is asked for nothing, whoever runs it, and what the script made is served."""

    def remake() -> None:
        scene.host.scxsslconfig_f()
        scene.host.restart()

    assert fight(scene, remake).rows == ("C4", "L7")
    ended = fight(scene, remake)
    before = counted(scene)
    for wish in ({}, {"now": True}, {"renew": True}):
        ended = scene.run(**wish)
        assert (ended.status, ended.rows) == (4, ()), (wish, ended)
        assert ended.message.startswith("truce: others rewrote the agent's key again")
        assert "then: scx-enroll release" in ended.hint
    assert ended.result
    until = ended.result.step.until
    assert counted(scene) == before
    ended = fight(scene, remake)
    assert ended.result
    assert (ended.result.step.until, ended.result.journal.fights[0].rest_s) == (until, HOUR_S), "what was not put right is no new fight"
    assert ca.count_post == 2
    later(scene, HOUR_S)
    assert (scene.run().rows, ca.count_post) == (("C4", "L7"), 3)
    assert scene.is_enrolled()


@pytest.mark.slow
def test_a_fight_that_keeps_the_agent_down(scene: Scene) -> None:
    """It is put right each time, since it has nothing to lose, as far as the restart budget goes; then the service fails, for a person."""
    later(scene, 2 * HOUR_S)
    host, at = scene.host, []

    def break_it() -> None:
        host.install(b"no certificate\n")
        host.restart()

    ended = fight(scene, break_it)
    while ended.status == 0:
        assert scene.is_enrolled()
        at.append(scene.tools().clock())
        later(scene, 0 if len(at) % 2 else HOUR_S)
        ended = fight(scene, break_it)
        assert host.restarts == 2 * (len(at) + 1) + (ended.status == 0), "one of theirs, one of ours, and the enrollment's"
    assert len(at) == 5, "six a day, with the enrollment's"
    before = counted(scene)
    for passed in (0, HOUR_S, 12 * HOUR_S):
        later(scene, passed)
        ended = scene.run()
        assert ended.result
        assert (ended.status, ended.rows, counted(scene)) == (4, (), before)
        assert "the restart budget (3 an hour, 6 a day) has no room" in ended.message
        assert ended.result.step.until
        assert ended.result.step.until > scene.tools().clock()
        assert needs_a_person(ended.status, ended.result.view.seen.held, scene.tools().clock(), ended.result.step.retry)
        assert "then: scx-enroll release" in ended.hint


@pytest.mark.slow
def test_a_truce_that_nobody_is_told_of(scene: Scene) -> None:
    """The timer's run, at the very hour: its status, last lines, the document for anybody, `status` and `--dry-run` say the same, and do nothing."""
    for expected in (0, 4):
        stranger(scene)
        ran = scene.command("run", "--unattended")
        assert ran.returncode == expected, ran
    before = counted(scene)
    lines = ran.stderr.splitlines()
    reason, until, hint = lines[-3:]
    assert reason.startswith("scx-enroll: waiting: truce: others rewrote the agent's certificate again after it was put right; meanwhile the agent serves ")
    assert re.fullmatch(r"scx-enroll: next attempt not before \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", until)
    assert hint == f"scx-enroll: hint: {TRUCE_HINT}"
    left = json.loads((Path(scene.host.root) / "run/scx-enroll/status.json").read_bytes())
    seen = json.loads(scene.command("status", "--json").stdout)
    for facts in (left, seen):
        assert (facts["exit_status"], facts["row"], facts["action"], facts["hint"]) == (4, "L7", "wait", TRUCE_HINT)
        assert f"scx-enroll: waiting: {facts['reason']}" == reason
        assert 3500 < facts["until"] - facts["time"] <= 3600
        assert facts["changes"][-1]["done"].startswith(f"waiting: {facts['reason']}, until ")
    shown = scene.command("status").stdout
    assert f"next:           L7 wait: {seen['reason']}\n  not before:   {until[-23:]}\n  hint:         {TRUCE_HINT}\n" in shown
    assert seen["reason"] in scene.command("run", "--dry-run").stdout
    again = scene.command("run", "--unattended")
    assert (again.returncode, again.stderr) == (4, ran.stderr), "each look of the hour fails"
    assert counted(scene) == before


# -- back to the original ---------------------------------------------------------------------------------------------


def to_original(*arguments: Any) -> Any:
    """`rollback --original`."""
    return enroll.roll_back(*arguments, original=True)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["omi", "omi-regular"])
def test_rollback_to_the_original_after_years(tmp_path: Path, ca: LabCA, layout: str) -> None:
    """What stood there before the first installation comes back: kind, bytes, marker; it is served, and held."""
    with LabHost(tmp_path / "host", layout, key="ec:secp256r1") as host:
        host.knobs(poll=0.02)
        host.start()
        scene, before, served = Scene(host, [ca]), host.snapshot(), fingerprint(host.served())
        assert scene.do(to_original).status == 2, "nothing is to be undone"
        scene.run()
        scene.run(renew=True)
        later(scene, 2 * HOUR_S)
        ended = scene.do(to_original)
        assert ended.status == 0, ended
        assert scene.served == served
        assert host.snapshot() == before
        assert scene.run().rows == ()
        assert scene.run().message.startswith("held: rolled back by the operator")


@pytest.mark.slow
@pytest.mark.parametrize("original", [False, True])
def test_rollback_to_a_certificate_for_a_key_that_is_gone(scene: Scene, original: bool) -> None:
    """It is refused before anything is changed, with what can be done instead."""
    scene.host.scxsslconfig_f()
    scene.host.restart()
    if original:
        assert scene.run().status == 0
    before, state, served = scene.host.snapshot(), scene.state.joinpath("original"), scene.served
    files = sorted(path.name for path in state.iterdir())
    ended = scene.do(to_original if original else enroll.roll_back)
    assert ended.status == 4
    assert "is for a key that the agent does not have any more" in ended.message
    assert "scxsslconfig -f" in ended.hint
    assert (scene.host.snapshot(), scene.served, sorted(path.name for path in state.iterdir())) == (before, served, files)
    assert not json.loads((scene.state / "journal.json").read_bytes())["hold"]


@pytest.mark.slow
def test_a_hold_that_ends_by_itself(scene: Scene) -> None:
    """The change freeze is over, and nobody remembers to release; the timer's run goes on."""
    scene.host.move_link_back()
    now = scene.tools().clock()
    enroll.hold(scene.root(), enroll.Options(), scene.tools(), "freeze", now + DAY_S)
    ended = scene.run()
    assert ended.result and ended.result.step.until == now + DAY_S
    later(scene, DAY_S + 1)
    assert scene.run().rows == ("L7",)


def test_what_an_interrupted_run_healed_is_told(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The change was seen before the power failed; that the next run finished the work is part of its story."""
    scene.host.move_link_back()

    def power_fails(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("scx_enroll.transaction._forward", power_fails)
        with pytest.raises(KeyboardInterrupt):
            scene.run()
    assert scene.run().rows[0] == "L1"
    told = json.loads((scene.state / "journal.json").read_bytes())["changes"][-1]
    assert (told["cause"], told["deeds"], told["waits"]) == ("link-moved", ["an interrupted run finished"], ""), told


def test_a_hold_while_a_package_manager_keeps_an_installation_open(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who holds in an emergency need not wait for dpkg; what was begun is told, and the next run finishes it first. No other work begins."""
    scene.host.move_link_back()
    with monkeypatch.context() as patch:
        patch.setattr("scx_enroll.transaction._forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scene.run()
    before, notes = scene.host.snapshot(), []
    with monkeypatch.context() as patch:
        patch.setattr("scx_enroll.agent.packager", lambda _root: "dpkg")
        assert (scene.run().message, scene.do(enroll.roll_back).status) == ("dpkg is changing packages", 4)
        enroll.hold(scene.root(), Options(), scene.tools(noted=notes.append), "freeze")
    assert notes == ["what an interrupted run began is still open, and the next run goes on with it: dpkg is changing packages"]
    assert scene.host.snapshot() == before
    assert scene.run().message == "held: freeze"
    assert scene.acted == ["L1"]


@pytest.mark.slow
def test_a_hold_outlives_a_clock_that_was_far_ahead(scene: Scene) -> None:
    """A change freeze does not end because a clock was wrong for an hour."""
    now = scene.tools().clock()
    enroll.hold(scene.root(), enroll.Options(), scene.tools(), "freeze", now + DAY_S)
    scene.offset_s += 400 * DAY_S
    scene.run()
    scene.offset_s -= 400 * DAY_S
    scene.host.move_link_back()
    before = scene.host.snapshot()
    ended = scene.run()
    assert ended.result and (ended.result.step.row, ended.rows) == ("L4", ())
    assert scene.host.snapshot() == before


@pytest.mark.slow
def test_what_is_brought_by_hand_once_a_hold_is_over(scene: Scene) -> None:
    """No run has come since; a person need not release what holds no more."""
    brought = next(scene.state.glob("generations/*/cert.pem")).read_bytes()
    now = scene.tools().clock()
    enroll.hold(scene.root(), enroll.Options(), scene.tools(), "freeze", now + DAY_S)
    assert scene.do(enroll.install, brought, "it").message == "held: freeze"
    later(scene, DAY_S + 1)
    assert scene.do(enroll.install, brought, "it").status == 0
