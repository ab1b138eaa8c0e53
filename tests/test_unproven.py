"""What was installed while the agent did not run, and what leads back from it: to what the agent has served, and never to less than that."""

from __future__ import annotations

import base64
import json
import os
import re
import ssl
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7
from cryptography.x509 import load_der_x509_certificate

from scx_enroll import activate, enroll, plan, transaction, unproven
from scx_enroll.enroll import Options
from scx_enroll.store import Store
from tests.lab import packagescripts
from tests.lab.agent import LabHost, fingerprint
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


def spend(scene: Scene, count: int, ago_s: int = 0) -> None:
    """Leave so many restarts in the budget, made just now."""
    store = Store(scene.root())
    store.load()
    store.save_budget(replace(store.budget, restarts=(scene.tools().clock() - ago_s,) * count))


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


def unheard(scene: Scene) -> None:
    """The agent's command to read its pair again does nothing, and says that it did."""
    tool = Path(scene.host.path("/opt/omi/bin/omiserver"))
    tool.rename(tool.with_name("real"))
    tool.write_text('#!/bin/sh\n[ "$1" = -r ] || exec "${0%/*}/real" "$@"\n')
    tool.chmod(0o755)


def broken(scene: Scene) -> None:
    """Others have the name lead to a certificate that is for another key; the agent goes on with what it has read."""
    scene.host.make_file("/etc/opt/omi/ssl/x.pem", scene.host.new_pair()[0])
    scene.host.relink("x.pem")


def killed(scene: Scene, monkeypatch: pytest.MonkeyPatch, **wish: bool) -> None:
    """Run until the agent was restarted, in vain, and die."""

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(activate, "_await", kill)
        with pytest.raises(KeyboardInterrupt):
            scene.run(**wish)


@pytest.mark.parametrize("how", ["another over it", "two while it was stopped", "two over one of ours", "others broke the name"])
def test_the_way_back_leads_to_what_the_agent_never_served(scene: Scene, how: str) -> None:
    """The first restart shows that it refuses ours; then it serves what it served, by whatever way ours came to be there."""
    if how == "two over one of ours":
        assert scene.run().status == 0
    served = scene.served
    if how == "another over it":
        untried(scene)
        ended = install_another(scene)
    else:
        scene.host.refuse_new()
        scene.host.stop()
        assert scene.run(renew=how == "two over one of ours").status == 0
        if how.startswith("two"):
            assert scene.run(renew=True).status == 0
            scene.host.start()
        else:
            broken(scene)
        ended = scene.run(hasty=True)
    assert (ended.status, scene.served, scene.installed) == (9, served, served), ended
    scene.host.accept_all()
    scene.offset_s = 2 * HOUR_S
    ended = scene.run(now=True)
    assert (ended.status, ended.rows, scene.served == scene.installed != served) == (0, ("L7",), True), ended


@pytest.mark.parametrize("restart", [False, True])
def test_the_way_back_passes_over_what_others_had_served_meanwhile(scene: Scene, restart: bool) -> None:
    """SCOM signed while ours waited for its proof: that counts where it was taken up, else what the agent goes on to serve."""
    untried(scene)
    scene.host.accept_all()
    packagescripts.scom_sign(scene.host, restart=restart)
    served = scene.served
    scene.host.knobs(serve_only=[served])
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


@pytest.mark.parametrize("rekeyed", [False, True])
def test_others_broke_the_name_of_what_is_served(scene: Scene, rekeyed: bool) -> None:
    """The next one is refused: what was served a moment ago comes back, not what stood there before that."""
    assert scene.run().status == 0
    if rekeyed:
        assert scene.run(renew=True, rekey=True).status == 0
    served = scene.served
    before = [] if rekeyed else [journal(scene)["before"]["leaf"]]
    scene.host.knobs(serve_only=[served, *before])
    broken(scene)
    scene.configure(alternative_names="other.lab.test")
    spend(scene, 0)
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served, scene.installed) == (9, served, served), ended


def test_a_new_key_over_one_that_was_never_served(scene: Scene) -> None:
    """Both are refused: the old key comes back with the certificate that was served for it."""
    served, key = untried(scene), scene.host.read(scene.host.key)
    scene.configure(key="new", alternative_names="other.lab.test")
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served, scene.installed) == (9, served, served), ended
    assert scene.host.read(scene.host.key) == key


@pytest.mark.parametrize("running", [False, True])
def test_a_pair_of_the_packages_came_between_two_of_ours(scene: Scene, running: bool) -> None:
    """An upgrade made a new key: what stood there before the first one of ours is for a key that is gone, and leads nowhere."""
    scene.host.stop()
    assert scene.run().status == 0
    scene.host.omi_upgrade(restart=False)
    own = scene.installed
    if running:
        scene.host.start()
        assert scene.run(hasty=True).status == 0
        assert (scene.do(enroll.roll_back).status, scene.served) == (0, own)
        return
    scene.host.refuse_new()
    assert scene.run(hasty=True).status == 0
    scene.host.start()
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served) == (9, own), ended


def test_the_way_back_leads_to_what_was_kept_since_nothing_was_served(scene: Scene) -> None:
    """The agent took nothing any more; mended, it takes what it served before, and refuses the next one of ours: that is the way back."""
    served = scene.served
    scene.host.refuse_new(b"none")
    assert scene.run().status == 10
    scene.host.knobs(serve_only=[served])
    scene.offset_s = HOUR_S + 1
    ended = install_another(scene)
    assert (ended.status, scene.served) == (9, served), ended


@pytest.mark.parametrize(("fails", "recorded"), [(0, True), (2, True), (2, False)])
def test_an_operator_went_back_from_what_was_never_served(scene: Scene, fails: int, recorded: bool) -> None:
    """It is no way back, however the certificate fares that was served for long; the last restart is for that."""
    assert scene.run().status == 0
    good = scene.served
    scene.host.refuse_new()
    scene.host.stop()
    assert scene.run(renew=True).status == 0
    for path in () if recorded else (scene.state / "original").iterdir():
        path.unlink()
    assert scene.do(enroll.roll_back).status == 0
    enroll.hold(scene.root(), Options(), scene.tools(), "")
    scene.host.start()
    scene.host.kill()
    spend(scene, 0 if fails else 2)
    scene.host.fail_starts(fails)
    ended = scene.run(hasty=True)
    status = 4 if fails else 0
    assert (ended.status, scene.installed, scene.served) == (status, good, "" if fails else good), ended


def test_a_reload_that_ends_the_agent_is_told_as_one_that_changed_nothing(scene: Scene) -> None:
    """It died of a certificate that it had never served, and one restart is left: that is for the way back."""
    served = untried(scene)
    scene.configure(activation="reload")
    spend(scene, 1)
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served) == (9, served), ended


def test_a_reload_that_was_not_heard_undoes_a_certificate(scene: Scene) -> None:
    """The agent goes on with what it has read, so nothing was tried; there is no room for a restart with a way back."""
    served, installed = untried(scene, refuse=False), scene.installed
    scene.configure(activation="reload")
    unheard(scene)
    spend(scene, 1)
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served, scene.installed) == (4, served, installed), ended


def test_it_came_up_with_what_was_not_tried_meanwhile(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """At boot the agent starts between a look and its step; with one restart left nothing that it serves is undone."""
    scene.host.stop()
    assert scene.run().status == 0
    ours = scene.installed
    scene.host.start()
    scene.host.kill()
    spend(scene, 2)
    real = unproven.restart

    def late(*given: Any) -> None:
        scene.host.start()
        real(*given)

    monkeypatch.setattr(unproven, "restart", late)
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served) == (0, ours), ended


def test_a_record_that_can_not_be_read_keeps_the_way_back_open(scene: Scene) -> None:
    """Others may write the copy of what was served: that is no way back, and no reason to go forward for ever."""
    untried(scene)
    for path in (scene.state / "original").iterdir():
        path.chmod(0o666)
    install_another(scene)
    assert journal(scene)["installation"]["state"] == "settled"


def by_hand(scene: Scene, name: str) -> None:
    """Others put a certificate of the CA for the agent's key in place."""
    authority = scene.cas[0].authority
    leaf = authority.issue(enroll.make_csr(scene.root(), Options(), scene.tools()))
    scene.host.make_file(f"/etc/opt/omi/ssl/{name}", to_pem([leaf, *authority.chain()]))
    scene.host.relink(name)


def test_what_others_put_in_place_is_refused(scene: Scene) -> None:
    """A valid certificate of theirs is taken over, as any of ours: where no restart gets the agent to serve it, it serves again what it did."""
    assert scene.run().status == 0
    good = scene.served
    scene.offset_s = HOUR_S + 100
    scene.host.refuse_new()
    by_hand(scene, "mine.pem")
    theirs = scene.installed
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served, scene.installed) == (9, good, good), ended
    spend(scene, 0)
    restarts = scene.host.restarts
    assert [skip["generation"] for skip in journal(scene)["skipped"]] == [theirs[:16]]
    ended = scene.run()
    assert (scene.host.restarts, scene.served, scene.installed) == (restarts, good, good), f"it is not tried again at once: {ended}"


@pytest.mark.parametrize("how", ["at the first look", "after a new key"])
def test_what_others_put_in_place_is_refused_and_nobody_knows_what_was_there(scene: Scene, how: str) -> None:
    """There is no record of what the agent serves, but the agent shows it: that comes back."""
    if how == "after a new key":
        assert scene.run().status == 0
        scene.offset_s = HOUR_S + 100
        scene.host.scxsslconfig_f()
        scene.host.restart()
    own = scene.served
    os.unlink(scene.host.path(scene.host.host_pem))
    by_hand(scene, "mine.pem")
    scene.host.knobs(serve_only=[own])
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served, scene.installed) == (9, own, own), ended
    scene.host.accept_all()
    scene.offset_s += 3 * HOUR_S
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served == scene.installed != own) == (0, True), ended


def test_what_others_put_back_waits_for_two_restarts(scene: Scene) -> None:
    """It was refused before: no attempt that is none is counted against it, and the agent goes on meanwhile."""
    assert scene.run().status == 0
    good = scene.served
    scene.offset_s = HOUR_S + 100
    scene.host.refuse_new()
    by_hand(scene, "mine.pem")
    assert scene.run(hasty=True).status == 9
    scene.offset_s = 48 * HOUR_S
    scene.host.relink("mine.pem")
    spend(scene, 2)
    skipped = journal(scene)["skipped"]
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served, journal(scene)["skipped"]) == (4, good, skipped), ended


def test_an_older_one_that_others_put_back_takes_the_last_restart(scene: Scene) -> None:
    """The agent has served it for long, and is down: nothing is kept for a way back."""
    assert scene.run().status == 0
    older = scene.served
    assert scene.run(renew=True).status == 0
    scene.offset_s = HOUR_S + 100
    scene.host.knobs(serve_only=[older])
    scene.host.make_file("/etc/opt/omi/ssl/x.pem", (scene.state / "generations" / older[:16] / "cert.pem").read_bytes())
    scene.host.relink("x.pem")
    scene.host.kill()
    spend(scene, 2)
    ended = scene.run(hasty=True)
    assert (scene.served, scene.host.restarts > 0) == (older, True), ended


@pytest.mark.parametrize("when", ["by the clock", "by a person", "down"])
def test_what_others_put_in_place_is_refused_again(scene: Scene, when: str) -> None:
    """Configuration management restores the file: it is one of ours by now, which is refused like any, and never keeps the agent down."""
    assert scene.run().status == 0
    good = scene.served
    scene.offset_s = HOUR_S + 100
    scene.host.refuse_new()
    by_hand(scene, "mine.pem")
    for turn in range(2):
        ended = scene.run(hasty=True, now=bool(turn) and when == "by a person")
        assert (ended.status, scene.served, scene.installed) == (9, good, good), ended
        scene.offset_s = (4 if when == "by a person" else 48) * HOUR_S
        scene.host.relink("mine.pem")
        if when == "down":
            scene.host.kill()


def test_a_run_is_killed_while_it_takes_over_what_others_put_in_place(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one knows that the agent has never served it, and what it did serve."""
    assert scene.run().status == 0
    good = scene.served
    scene.offset_s = HOUR_S + 100
    scene.host.refuse_new()
    by_hand(scene, "mine.pem")

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("save_original", "add_generation", "prune"):
        with monkeypatch.context() as patch:
            patch.setattr(Store, name, kill)
            with pytest.raises(KeyboardInterrupt):
                scene.run(hasty=True)
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served, scene.installed) == (9, good, good), ended


def test_what_others_put_in_place_needs_one_restart_where_nothing_leads_back(scene: Scene) -> None:
    """The agent serves what was for another key: no restart is kept for a way back that is none."""
    scene.host.scxsslconfig_f()
    by_hand(scene, "mine.pem")
    scene.state.mkdir(mode=0o700, parents=True)
    spend(scene, 2)
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served) == (0, scene.installed), ended


def test_what_others_put_in_place_while_the_agent_was_stopped_is_refused(scene: Scene) -> None:
    """It was in place twice and served never: the agent is not left down with it."""
    own = scene.served
    assert scene.run().status == 0
    scene.offset_s = HOUR_S + 100
    scene.host.stop()
    by_hand(scene, "mine.pem")
    scene.host.knobs(refuse=[fingerprint(scene.host.leaf())])
    assert scene.run(hasty=True).rows == ("L7",)
    scene.offset_s = 3 * HOUR_S  # twice within an hour would be a fight
    scene.host.move_link_back()
    assert scene.run(hasty=True).rows == ("L7",)
    scene.host.start()
    assert scene.served == ""
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served, scene.installed) == (9, own, own), ended


def test_what_was_never_served_is_no_way_back_from_what_others_put_in_place(scene: Scene) -> None:
    """Neither ours nor theirs was ever taken up: the agent goes back to its own."""
    own = scene.served
    scene.host.stop()
    assert scene.run().status == 0
    scene.offset_s = HOUR_S + 100
    by_hand(scene, "mine.pem")
    assert scene.run(hasty=True).rows == ("L7",)
    scene.host.knobs(serve_only=[own])
    scene.host.start()
    assert scene.served == ""
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served, scene.installed) == (9, own, own), ended


@pytest.mark.parametrize("how", ["restarted by the run", "restarted by them, and the run was killed"])
def test_a_rollback_from_what_others_put_in_place(scene: Scene, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """It leads to what was in service until then, not to what was before that, nor to itself."""
    assert scene.run().status == 0
    good = scene.served
    scene.offset_s = HOUR_S + 100
    by_hand(scene, "mine.pem")
    if "killed" in how:
        scene.host.restart()

        def kill(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Store, "add_generation", kill)
            with pytest.raises(KeyboardInterrupt):
                scene.run(hasty=True)
    assert scene.run(hasty=True).status == 0
    assert scene.served == scene.installed != good
    ended = scene.do(enroll.roll_back)
    assert (ended.status, scene.served, scene.installed) == (0, good, good), ended
    assert os.path.islink(scene.host.path(scene.host.certificate)), "it is ours, and stands as ours do"


def test_what_an_operator_put_there_and_installed_afterwards_is_refused(scene: Scene) -> None:
    """It is one of ours before it was seen served, and the agent goes back to what it serves."""
    own = scene.served
    by_hand(scene, "mine.pem")
    theirs = Path(scene.host.path("/etc/opt/omi/ssl/mine.pem")).read_bytes()
    scene.host.knobs(serve_only=[own])
    ended = scene.do(enroll.install, theirs, "mine.pem")
    assert (ended.status, scene.served, scene.installed) == (9, own, own), ended


def test_what_an_operator_put_there_and_restarted_counts_as_never_served(scene: Scene) -> None:
    """The agent has served it for long when it dies: it is started, whatever was installed before."""
    assert scene.run().status == 0
    scene.offset_s = HOUR_S + 100
    by_hand(scene, "mine.pem")
    scene.host.restart()
    theirs = scene.served
    assert scene.do(enroll.install, Path(scene.host.path("/etc/opt/omi/ssl/mine.pem")).read_bytes(), "mine.pem").status == 0
    assert scene.served == theirs
    scene.host.kill()
    spend(scene, 2)
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served, scene.installed) == (0, theirs, theirs), ended


@pytest.mark.parametrize("whose", ["ours", "another"])
def test_a_rollback_after_a_form_that_the_agent_can_not_load_was_mended(scene: Scene, whose: str) -> None:
    """It leads to another certificate, not to those bytes."""
    assert scene.run().status == 0
    wanted = scene.served
    assert scene.run(renew=True).status == 0
    scene.offset_s = HOUR_S + 100
    if whose == "another":
        wanted = scene.served
        by_hand(scene, "mine.pem")
        scene.host.restart()
    der = scene.host.leaf()
    assert der
    scene.host.make_file("/etc/opt/omi/ssl/x.pem", der)
    scene.host.relink("x.pem")
    assert scene.run(hasty=True).status == 0
    assert scene.served == scene.installed == fingerprint(der)
    spend(scene, 0)
    ended = scene.do(enroll.roll_back)
    assert (ended.status, scene.served, scene.installed) == (0, wanted, wanted), ended


@pytest.mark.parametrize("form", ["DER", "PEM"])
def test_a_stopped_agent_stays_stopped_whatever_the_form(scene: Scene, form: str) -> None:
    """It was stopped on purpose; the certificate is put right all the same."""
    assert scene.run().status == 0
    scene.host.stop()
    scene.offset_s = HOUR_S + 100
    der, restarts = scene.host.leaf(), scene.host.restarts
    assert der
    scene.host.make_file("/etc/opt/omi/ssl/x.pem", {"DER": der, "PEM": to_pem([der])}[form])
    scene.host.relink("x.pem")
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served, scene.host.restarts, scene.installed) == (0, "", restarts, fingerprint(der)), ended


def test_what_follows_the_first_certificate_is_not_the_agents_matter(scene: Scene) -> None:
    """It takes the first one of the file, and starts."""
    assert scene.run().status == 0
    served, der, restarts = scene.served, scene.host.leaf(), scene.host.restarts
    assert der
    scene.offset_s = HOUR_S + 100
    second = ssl.DER_cert_to_PEM_cert(pkcs7.serialize_certificates([load_der_x509_certificate(der)], Encoding.DER)).encode()
    scene.host.make_file("/etc/opt/omi/ssl/x.pem", to_pem([der]) + second)
    scene.host.relink("x.pem")
    scene.host.restart()
    assert scene.served == served
    ended = scene.run(hasty=True)
    assert (ended.status, ended.rows, scene.served, scene.host.restarts) == (0, (), served, restarts + 1), ended


FORMS: Dict[str, Callable[[bytes], bytes]] = {
    "DER": bytes,
    "PKCS #7": lambda der: pkcs7.serialize_certificates([load_der_x509_certificate(der)], Encoding.PEM),
    "base64": base64.encodebytes,
    "indented": lambda der: textwrap.indent(to_pem([der]).decode(), "  ").encode(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("whose", ["ours", "another"])
def test_a_certificate_in_a_form_that_the_agent_can_not_load(scene: Scene, form: str, whose: str) -> None:
    """The agent goes on with what it has read, and would die at its next start: what stands there is put right first, and ours is not asked for anew."""
    assert scene.run().status == 0
    served, issued, restarts = scene.served, scene.issued, scene.host.restarts
    scene.offset_s = HOUR_S + 100
    der = scene.host.leaf()
    if whose == "another":
        der = scene.cas[0].authority.issue(enroll.make_csr(scene.root(), Options(), scene.tools()))
    scene.host.make_file("/etc/opt/omi/ssl/x.pem", FORMS[form](der))
    scene.host.relink("x.pem")
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served, scene.installed) == (0, fingerprint(der), fingerprint(der)), ended
    assert (scene.issued, scene.host.restarts - restarts) == (issued, int(whose == "another")), ended
    assert (scene.served == served) == (whose == "ours")
    scene.host.stop()
    scene.host.start()
    assert scene.served == scene.installed


@pytest.mark.parametrize("verb", ["run", "rollback"])
def test_an_agent_that_is_down_waits_for_two_restarts(scene: Scene, verb: str) -> None:
    """Others broke the name of what it served for long: one restart of the day is left, and is enough for that."""
    assert scene.run().status == 0
    good = scene.served
    if verb == "rollback":
        assert scene.run(renew=True).status == 0
    scene.offset_s = 3 * HOUR_S
    broken(scene)
    scene.host.kill()
    store = Store(scene.root())
    store.load()
    store.save_budget(replace(store.budget, restarts=(scene.tools().clock() - 2 * HOUR_S,) * 5))
    ended = scene.run(hasty=True) if verb == "run" else scene.do(enroll.roll_back)
    assert (ended.status, scene.served) == (0, good), ended


def test_an_agent_that_can_not_start_waits_for_a_way_back(scene: Scene) -> None:
    """Others broke the name of one that it never served, and one restart is left: that brings up what it served."""
    served = scene.served
    scene.host.refuse_new()
    scene.host.stop()
    assert scene.run().status == 0
    broken(scene)
    scene.host.start()
    spend(scene, 2)
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served) == (9, served), ended


@pytest.mark.parametrize("how", ["killed", "two starts fail"])
def test_what_was_served_is_undone_over_a_broken_name(scene: Scene, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Months of service say more than a restart that failed: it stays, and is put aside for nothing."""
    assert scene.run().status == 0
    good = scene.served
    broken(scene)
    scene.host.kill()
    spend(scene, 1 if how == "killed" else 0)
    scene.host.fail_starts(1 if how == "killed" else 2)
    if how == "killed":
        killed(scene, monkeypatch, hasty=True)
    ended = scene.run(hasty=True)
    assert (scene.installed, journal(scene)["skipped"]) == (good, []), ended


def test_an_adopted_one_is_a_way_back(scene: Scene) -> None:
    """It is what the agent served last, though nothing of ours was ever put in place."""
    by_hand(scene, "mine.pem")
    scene.host.restart()
    assert scene.run(hasty=True).rows == ("L7",)
    served = scene.served
    scene.host.knobs(serve_only=[served])
    broken(scene)
    scene.configure(alternative_names="other.lab.test")
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served) == (9, served), ended


def test_what_a_rollback_restored_is_a_way_back(scene: Scene) -> None:
    """The pair that an upgrade made is back, and others break its name before the next attempt."""
    assert scene.run().status == 0
    scene.host.omi_upgrade(restart=True)
    scene.host.wait()
    own = scene.served
    scene.host.refuse_new()
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served, scene.installed) == (9, own, own), ended
    broken(scene)
    scene.offset_s = 2 * HOUR_S
    ended = scene.run(now=True, hasty=True)
    assert (ended.status, scene.served) == (9, own), ended


def test_what_the_agent_goes_on_to_serve_is_the_way_back(scene: Scene) -> None:
    """Others left one that OpenSSL loads and the agent refuses, and restarted nothing."""
    assert scene.run().status == 0
    served = scene.served
    scene.host.knobs(serve_only=[served])
    by_hand(scene, "x.pem")
    scene.configure(alternative_names="other.lab.test")
    spend(scene, 0)
    ended = scene.run(hasty=True)
    assert (ended.status, scene.served) == (9, served), ended


@pytest.mark.parametrize("how", ["scxadmin", "budget"])
def test_the_timer_forgets_what_failed_where_it_is_told_otherwise(scene: Scene, how: str) -> None:
    """Each restart has a unit of its own, which the message names, and cites another command as the budget runs out: it is the same failure."""
    assert scene.run().status == 0
    scene.host.kill()
    found = []
    if how == "budget":
        spend(scene, 0)
        scene.host.fail_starts(10)
    else:
        scene.host.refuse_new(b"none")
    for turn in range(2):
        if how == "scxadmin":
            scene.host.junk(f"(journalctl -u scx-enroll-control-{turn}.service)")
        found.append(scene.command("run", "--unattended").returncode)
    assert found == [0, 4]


def rolling_back(scene: Scene) -> str:
    """A rollback is open: our restart to come back left the agent down. Returns what it is to serve."""
    untried(scene)
    store = Store(scene.root())
    store.load()
    facts: Dict[str, Any] = {"layout": "omi", "port": scene.host.port, "certificate": scene.host.certificate}
    before = store.journal.before
    assert before
    store.installation("install", **facts, target=store.journal.installed, previous=before, running=True, also={"restarting": before.leaf})
    store.installation("failed", why="the agent does not serve 0123")
    return before.leaf


def test_a_rollback_that_a_person_completed_is_closed(scene: Scene) -> None:
    """Our last restart must be over by now, and the agent serves what it is to serve: that is proof, and takes no restart."""
    before = rolling_back(scene)
    spend(scene, 6, ago_s=120)
    restarts = scene.host.restarts
    ended = scene.run()
    assert (ended.status, scene.served, scene.installed, scene.host.restarts) == (9, before, before, restarts), ended
    assert journal(scene)["installation"]["state"] == "settled"


def test_a_rollback_of_unknown_age_is_proved_by_a_restart(scene: Scene) -> None:
    """The record of the restarts is lost: the last one may have been a moment ago."""
    before, restarts = rolling_back(scene), scene.host.restarts
    spend(scene, 0)
    ended = scene.run()
    assert (ended.status, scene.served, scene.host.restarts) == (9, before, restarts + 1), ended


def test_a_rollback_believes_what_a_restart_may_yet_end(scene: Scene) -> None:
    """Our restart was a moment ago: that the agent serves what it shall is no proof while it may be about to stop."""
    before = rolling_back(scene)
    spend(scene, 6)
    ended = scene.run()
    assert (ended.status, scene.served, journal(scene)["installation"]["state"]) == (4, before, "rolling_back"), ended


@pytest.mark.parametrize("how", ["rolling back", "not in place"])
def test_the_timer_succeeds_where_the_agent_is_down_for_a_day(scene: Scene, how: str) -> None:
    """Nothing listens, and the restarts of the day are spent: a person is needed."""
    if how == "rolling back":
        rolling_back(scene)
    else:
        assert scene.run().status == 0
        broken(scene)
    scene.host.kill()
    spend(scene, 6)
    assert [scene.command("run", "--unattended").returncode for _ in range(2)] == [4, 4]
    assert scene.served == ""
    if how == "rolling back":
        scene.host.start()
        assert scene.command("run", "--unattended").returncode == 0, "a person has started it"


def test_a_reload_that_was_not_heard_undoes_an_installation(scene: Scene) -> None:
    """Nothing was tried, and there is no room for a restart with a way back: it stays open, and nothing is put aside."""
    assert scene.run().status == 0
    good = scene.served
    scene.configure(activation="reload")
    unheard(scene)
    spend(scene, 1)
    ended = install_another(scene)
    assert (ended.status, scene.served, journal(scene)["skipped"]) == (4, good, []), ended
    scene.offset_s = HOUR_S + 1
    assert scene.run(hasty=True).status == 0
    assert scene.served == scene.installed != good


@pytest.mark.parametrize("left", [1, 2])
def test_a_refused_one_over_a_broken_name_takes_the_last_restart(scene: Scene, left: int) -> None:
    """The agent serves what it has read; the way back leads to that, though it is not what stands there, and needs its restart all the same."""
    served = untried(scene)
    broken(scene)
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
        scene.host.start()
        if how == "adopted":
            scene.offset_s = HOUR_S + 100
            by_hand(scene, "mine.pem")
            scene.host.stop()
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
    for hours in (1, 9):
        scene.host.move_link_back()
        scene.offset_s = hours * HOUR_S + 100
        ended = scene.run(hasty=True)
        assert (ended.status, ended.rows, journal(scene)["untried"]) == (0, ("L7",), False), ended


def test_what_others_renew_piles_up(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one is adopted, and saved as a way back; old ones go, as ever."""
    monkeypatch.setattr("scx_enroll.store.KEPT_ORIGINALS", 1)
    for turn in range(5):
        by_hand(scene, f"mine-{turn}.pem")
        scene.host.restart()
        scene.offset_s = turn * 9 * HOUR_S
        assert scene.run(hasty=True).rows == ("L7",)
    assert len(list((scene.state / "original").iterdir())) <= 2, "the newest one, and what stood there first"


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


def test_the_last_restart_is_kept_from_the_way_back_itself(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the restart that puts back what was served, and SCOM's port is not listed then: what is there by now is started."""
    scene.host.refuse_new()
    real, calls = activate._control, []

    def second(*given: Any) -> str:
        calls.append(given)
        said = real(*given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return said

    with monkeypatch.context() as patch:
        patch.setattr(activate, "_control", second)
        with pytest.raises(KeyboardInterrupt):
            scene.run()
    assert journal(scene)["installation"]["state"] == "rolling_back"
    scene.host.kill()
    conf = Path(scene.host.path("/etc/opt/omi/conf/omiserver.conf"))
    conf.write_bytes(re.sub(rb"(?m)^httpsport=.*$", b"httpsport=0", conf.read_bytes()))
    assert scene.run(hasty=True).status == 4
    assert scene.host.pid != 0


@pytest.mark.parametrize("why", ["port not listed", "no pid file", "the agent is gone", "held", "not live"])
def test_a_host_rests_though_its_agent_was_left_down(scene: Scene, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """Nothing would be started in the next run either: each one looks in full for nothing, but for what changes."""
    assert scene.run().status == 0
    scene.offset_s = HOUR_S + 100
    scene.host.kill()
    scene.host.fail_starts()
    killed(scene, monkeypatch, hasty=True)
    if why == "held":
        enroll.hold(scene.root(), Options(), scene.tools(), "freeze")
    if why == "the agent is gone":
        os.unlink(scene.host.path("/opt/omi/bin/omiserver"))
    if why == "no pid file":
        Path(scene.host.path("/var/opt/omi/run/omiserver.pid")).unlink()
    if why in ("port not listed", "no pid file"):
        spend(scene, 3)
        conf = Path(scene.host.path("/etc/opt/omi/conf/omiserver.conf"))
        conf.write_bytes(re.sub(rb"(?m)^httpsport=.*$", b"httpsport=0", conf.read_bytes()))
    for _ in range(2):
        ended = scene.run(hasty=True, live=why != "not live")
    assert ended.result
    assert journal(scene)["restarting"]
    store, view = Store(scene.root()), ended.result.view
    store.load()
    rests = plan.rest(view.seen, view.policy, store.journal, store.budget, scene.tools().clock() + 10)
    assert (rests is None) == (why in ("port not listed", "no pid file")), "that one is started as soon as the budget has room"


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
    """A start may fail once for a reason that passes; where the next run finds the same, a person is needed, and the unit fails."""
    assert scene.run().status == 0
    scene.host.refuse_new(b"none")
    scene.host.kill()
    for status in (0, 4):
        ended = scene.command("run", "--unattended")
        assert ended.returncode == status, ended.stderr
    assert scene.served == ""
