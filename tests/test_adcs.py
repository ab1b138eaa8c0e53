"""AD CS in every state, seen by whole runs: requests that wait, are lost, or are somebody else's; several CAs; renewed and revoked ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from scx_enroll import enroll, pace
from scx_enroll.journal import HOUR_S
from scx_enroll.rootfs import Root
from scx_enroll.store import Store
from tests.lab.agent import LabHost
from tests.lab.authority import DAY, YEAR, to_pem
from tests.lab.ca import LabCA
from tests.scene import Outcome, Scene, take_openssls_clock_away

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def simulated_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Months pass here."""
    take_openssls_clock_away(monkeypatch)


class Clock:
    """One time for the program and its CAs."""

    def __init__(self) -> None:
        self.offset = 0.0

    def __call__(self) -> float:
        return time.time() + self.offset


@pytest.fixture
def clock() -> Clock:
    """A clock that a test may move."""
    return Clock()


@pytest.fixture
def cas(tmp_path: Path, clock: Clock) -> Iterator[List[LabCA]]:
    """Two CAs of two PKIs, which give the same request IDs."""
    with LabCA(tmp_path / "ca0", name="First CA", clock=clock) as one, LabCA(tmp_path / "ca1", name="Second CA", clock=clock) as two:
        yield [one, two]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LabHost]:
    """A host whose agent is not looked at: what is asked of CAs is all that counts here."""
    with LabHost(tmp_path / "host", key="ec:secp256r1") as made:
        yield made


class Host(Scene):
    """A scene whose agent does not run here, and whose time is the CAs'."""

    clock: Clock

    def run(self, **wish: Any) -> Outcome:
        """Converge once, without touching the agent."""
        self.offset_s = int(self.clock.offset)
        return self.do(enroll.run, live=False, **wish)

    def adopt(self, request_id: int, ca: str = "") -> Outcome:
        """Name a request ID."""
        self.offset_s = int(self.clock.offset)
        return self.do(enroll.adopt, request_id, ca, live=False)

    def look(self) -> Outcome:
        """What a run would do."""
        self.offset_s = int(self.clock.offset)
        return self.do(enroll.inspect, live=False)

    def passes(self, seconds: float) -> None:
        """Let time pass, on the host and on the CAs."""
        self.clock.offset += seconds
        for ca in self.cas:
            ca.switches.date_offset = 0.0

    def contact(self, ca: LabCA) -> Any:
        """What the program remembers of a CA."""
        result = self.look().result
        assert result
        return next(known for known in result.journal.contacts if known.ca == ca.server)

    def notes(self) -> str:
        """What an operator is told beside the result."""
        result = self.look().result
        assert result
        assert result.view.found
        return "\n".join(result.view.found.notes)


def enrolling(host: LabHost, cas: List[LabCA], clock: Clock, **settings: str) -> Host:
    made = Host(host, cas, settings)
    made.clock = clock
    return made


@pytest.fixture
def scene(host: LabHost, cas: List[LabCA], clock: Clock) -> Host:
    """One host with one CA."""
    return enrolling(host, cas[:1], clock)


@pytest.fixture
def both(host: LabHost, cas: List[LabCA], clock: Clock) -> Host:
    """One host with two CAs; it turns to `first(both)` first."""
    return enrolling(host, cas, clock)


def turns_to(scene: Host) -> List[LabCA]:
    """The CAs in the order in which this host turns to them."""
    result = scene.look().result
    assert result
    by_server = {ca.server: ca for ca in scene.cas}
    return [by_server[server] for server in result.view.policy.cas]


# -- pending --------------------------------------------------------------------------------------------------------


def test_a_pending_request_says_what_the_operator_of_the_ca_must_do(scene: Host) -> None:
    """Status 7, the ID, the CA and the act: without them nobody knows whom to call."""
    scene.cas[0].switches.mode = "pending"
    ended = scene.run()
    assert (ended.status, ended.rows) == (7, ("C4",))
    assert "request ID 1 at" in ended.message
    assert scene.cas[0].server in ended.hint
    assert "issue or deny request ID 1" in ended.hint


def test_a_request_that_a_rebuilt_ca_gave_to_somebody_else_is_told_by_its_key(scene: Host) -> None:
    """IDs begin again after a rebuild: the certificate under ours is another host's, and must not be installed, nor end us with 8 for ever."""
    ca = scene.cas[0]
    ca.switches.mode = "pending"
    assert scene.run().status == 7
    before = scene.host.snapshot()
    ca.authority.rebuild()
    ca.switches.mode = "issue"
    ca.write_issuer_trust()
    Path(scene.etc, "ca0.pem").write_bytes(Path(ca.issuer_trust).read_bytes())
    other = ca.authority.submit(foreign_csr(), "SCXAgent")
    assert other.id == 1
    ended = scene.run(now=True)
    assert ended.status == 6
    assert "somebody else's now" in ended.message
    assert scene.host.snapshot() == before
    assert ca.count_post == 1, "a new request only after a pause"
    scene.passes(HOUR_S + 1)
    assert scene.run().status == 0
    assert ca.count_post == 2


def foreign_csr() -> bytes:
    """A request of another host."""
    from cryptography.hazmat.primitives.asymmetric import ec

    from scx_enroll import request

    return request.build_csr(request.RequestSpec("other.lab.test"), ec.generate_private_key(ec.SECP256R1()))


def test_a_deleted_request_is_asked_for_anew_after_a_pause(scene: Host) -> None:
    """An administrator cleans the table: the host must not wait for what nobody has."""
    ca = scene.cas[0]
    ca.switches.mode = "pending"
    scene.run()
    ca.authority.delete(1)
    ended = scene.run(now=True)
    assert (ended.status, ca.count_post) == (6, 1)
    assert "does not know it any more" in ended.message
    ca.switches.mode = "issue"
    scene.passes(HOUR_S + 1)
    assert (scene.run().status, ca.count_post) == (0, 2)


def test_a_request_revoked_before_it_was_fetched_goes_to_no_other_ca(both: Host) -> None:
    """Somebody decided it: asking elsewhere would go round a person."""
    first, second = turns_to(both)
    first.switches.mode = "pending"
    both.run()
    first.authority.approve(1)
    first.authority.revoke(1)
    ended = both.run(now=True)
    assert ended.status == 6
    assert "revoked" in ended.message
    assert second.count_post == 0
    assert both.run().status == 6


def test_a_manager_who_denies_is_not_gone_round_by_asking_another_ca(both: Host) -> None:
    """A denial by a person holds for the host, not for one server."""
    first, second = turns_to(both)
    first.switches.mode = "pending"
    both.run()
    first.authority.deny(1)
    ended = both.run(now=True)
    assert (ended.status, second.count_post) == (6, 0)
    assert both.run().status == 6


def test_what_is_held_runs_out_while_nobody_approves_so_another_ca_serves(tmp_path: Path, host: LabHost, clock: Clock) -> None:
    """A forgotten request must not let a host expire beside a CA that could serve; the old ID is told, to be withdrawn."""
    with LabCA(tmp_path / "a", name="A", clock=clock, lifetime=100 * DAY) as a, \
            LabCA(tmp_path / "b", name="B", clock=clock, lifetime=100 * DAY) as b:
        scene = enrolling(host, [a, b], clock)
        first, second = turns_to(scene)
        assert scene.run().status == 0
        first.switches.mode = "pending"
        scene.passes(80 * DAY)
        assert scene.run().status == 7
        scene.passes(5 * DAY)
        assert scene.run().status == 7, "time remains"
        assert second.count_post == 0
        scene.passes(6 * DAY)
        ended = scene.run()
        assert ended.status == 0, ended
        assert (first.count_post, second.count_post) == (2, 1)
        assert "C1" in ended.rows
        assert ended.result
        reason = next(act.reason for act in ended.result.acts if act.action == "abandon")
        assert "request ID 2 at " + first.server in reason


def test_two_cas_that_both_wait_for_a_person_are_not_swapped_for_ever(tmp_path: Path, host: LabHost, clock: Clock) -> None:
    """Each swap leaves a row that somebody may approve: one is enough."""
    with LabCA(tmp_path / "a", name="A", clock=clock, lifetime=100 * DAY) as a, \
            LabCA(tmp_path / "b", name="B", clock=clock, lifetime=100 * DAY) as b:
        scene = enrolling(host, [a, b], clock)
        assert scene.run().status == 0
        a.switches.mode = b.switches.mode = "pending"
        for _ in range(25):
            scene.passes(DAY)
            scene.run()
        scene.passes(70 * DAY)
        for _ in range(10):
            scene.run()
            scene.passes(DAY)
        assert a.count_post + b.count_post <= 3


def test_a_pending_request_ends_with_its_ca_leaving_the_configuration(both: Host, cas: List[LabCA]) -> None:
    """The ID means nothing elsewhere; the other CA serves."""
    first, second = turns_to(both)
    first.switches.mode = "pending"
    both.run()
    both.cas = [second]
    index = cas.index(second)
    for kind in ("web", "ca", "password"):
        os.replace(both.etc / f"{kind}{index}", both.etc / f"{kind}0") if kind == "password" else os.replace(
            both.etc / f"{kind}{index}.pem", both.etc / f"{kind}0.pem"
        )
    both.configure()
    ended = both.run()
    assert (ended.status, second.count_post) == (0, 1)


# -- doubtful, and taken over ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["issue", "pending"])
def test_a_lost_request_is_taken_over_by_its_id(scene: Host, mode: str) -> None:
    """The operator finds the row; no second certificate is asked for."""
    ca = scene.cas[0]
    ca.switches.update({"lost": "after", "lost_times": 1, "mode": mode})
    assert scene.run().status == 5
    ended = scene.adopt(1)
    assert ended.status == (0 if mode == "issue" else 7), ended
    if mode == "pending":
        ca.authority.approve(1)
        assert scene.run(now=True).status == 0
    assert (ca.count_post, ca.authority.issued) == (1, 1)


@pytest.mark.parametrize("state", ["doubtful", "nothing"])
def test_taking_over_somebody_elses_request_changes_nothing(scene: Host, state: str) -> None:
    """A wrong digit must not install another host's certificate, nor lose what is known."""
    ca = scene.cas[0]
    if state == "doubtful":
        ca.switches.update({"lost": "after", "lost_times": 1})
        assert scene.run().status == 5
    other = ca.authority.submit(foreign_csr(), "SCXAgent")
    before, remembered = scene.host.snapshot(), requests_of(scene)
    ended = scene.adopt(other.id)
    assert ended.status == 8
    assert "other.lab.test" in ended.message
    assert scene.host.snapshot() == before
    assert requests_of(scene) == remembered


def requests_of(scene: Host) -> Any:
    """The request as it is remembered."""
    result = scene.look().result
    return result and result.journal.request


def test_taking_over_an_id_that_the_ca_does_not_know_changes_nothing(scene: Host) -> None:
    """It is a typing error, or the wrong CA."""
    scene.cas[0].switches.update({"lost": "after", "lost_times": 1})
    scene.run()
    remembered = requests_of(scene)
    ended = scene.adopt(4711)
    assert ended.status == 6
    assert "4711" in ended.message
    assert ended.hint
    assert requests_of(scene) == remembered


def test_taking_over_beside_a_request_that_waits_is_refused(scene: Host) -> None:
    """Two requests for one host are one too many."""
    scene.cas[0].switches.mode = "pending"
    scene.run()
    ended = scene.adopt(2)
    assert ended.status == 2
    assert "request ID 1" in ended.message
    assert scene.adopt(1).status == 7, "its own ID is a poll"


@pytest.mark.parametrize("fate", ["pending-then-issued", "pending-then-denied", "denied", "revoked"])
def test_a_wrong_id_named_by_the_operator_does_not_cost_the_right_one(scene: Host, fate: str) -> None:
    """Of a pending or denied row nobody can tell whose it is: the doubt comes back, and no second certificate is asked for."""
    ca = scene.cas[0]
    ca.switches.update({"lost": "after", "lost_times": 1})
    assert scene.run().status == 5
    ca.switches.mode = "pending" if fate.startswith("pending") else "issue"
    other = ca.authority.submit(foreign_csr(), "SCXAgent")
    ca.switches.mode = "issue"
    posts = ca.count_post
    if fate == "denied":
        ca.authority.rows[other.id].certificate = None
        ca.authority.deny(other.id)
    if fate == "revoked":
        ca.authority.revoke(other.id)
    ended = scene.adopt(other.id)
    if fate.startswith("pending"):
        assert ended.status == 7
        ca.authority.approve(other.id) if fate.endswith("issued") else ca.authority.deny(other.id)
        scene.passes(600)
        assert scene.run().status in (5, 6)
    else:
        assert ended.status == 6
        assert "nothing was changed" in ended.message
        assert ": ;" not in ended.message
    assert requests_of(scene).state == "doubtful"
    assert ca.count_post == posts
    assert scene.adopt(1).status == 0
    assert ca.count_post == posts


def test_another_id_may_be_named_while_the_first_is_not_confirmed(scene: Host) -> None:
    """A wrong digit is mended at once; nobody has to deny a stranger's request for it."""
    ca = scene.cas[0]
    ca.switches.update({"lost": "after", "lost_times": 1})
    assert scene.run().status == 5
    ca.switches.mode = "pending"
    other = ca.authority.submit(foreign_csr(), "SCXAgent")
    assert scene.adopt(other.id).status == 7
    assert scene.adopt(1).status == 0
    assert ca.authority.issued == 1


def test_a_revocation_seen_while_an_id_is_named_is_kept(scene: Host) -> None:
    """The CA said it, so what is in service is not called valid any more."""
    ca = scene.cas[0]
    assert scene.run().status == 0
    ca.authority.revoke(1)
    assert scene.adopt(1).status == 0
    assert ca.authority.issued == 2
    assert scene.installed == fingerprint(ca.authority.rows[2].certificate or b"")


def test_requests_that_a_manager_denied_cost_no_certificates_of_the_day(scene: Host) -> None:
    """They issued nothing: three mistakes of an operator must not block the host for a day."""
    ca = scene.cas[0]
    for number in range(1, 5):
        ca.switches.mode = "pending"
        assert scene.run(renew=True).status == 7
        ca.authority.deny(number)
        assert scene.run(now=True).status == 6
    ca.switches.mode = "issue"
    assert scene.run(renew=True).status == 0
    assert ca.count_post == 5


def test_taking_over_at_one_of_several_cas_needs_its_name(both: Host) -> None:
    """The same ID is another certificate at another CA."""
    first, second = turns_to(both)
    first.switches.update({"lost": "after", "lost_times": 1})
    assert both.run().status == 5
    assert both.adopt(1, second.server).status == 2
    assert both.adopt(1, "elsewhere").status == 2
    assert both.adopt(1).status == 0, "a doubtful request names its CA itself"
    assert both.adopt(1).status == 2
    assert second.count_get == 0


def test_taking_over_at_a_ca_that_left_the_configuration_is_told(both: Host) -> None:
    """A name that is no longer there is no defect."""
    first, second = turns_to(both)
    first.switches.update({"lost": "after", "lost_times": 1})
    assert both.run().status == 5
    conf = (both.etc / "scx-enroll.conf").read_text()
    section = conf.index(f"[ca c{both.cas.index(first)}]")
    rest = conf.find("[ca ", section + 1)
    both.write("scx-enroll.conf", (conf[:section] + (conf[rest:] if rest > 0 else "")).encode())
    remembered = requests_of(both)
    ended = both.adopt(1)
    assert ended.status == 2
    assert first.server in ended.message
    assert requests_of(both) == remembered
    assert second.count_get == 0


def test_taking_over_is_possible_where_the_journal_was_lost(scene: Host) -> None:
    """A request that was approved meanwhile is not wasted."""
    ca = scene.cas[0]
    ca.switches.mode = "pending"
    scene.run()
    (scene.state / "journal.json").unlink()
    ca.authority.approve(1)
    assert scene.adopt(1).status == 0
    assert ca.count_post == 1


def test_taking_over_on_a_held_host_changes_nothing(scene: Host) -> None:
    """Held is held."""
    enroll.hold(scene.root(live=False), enroll.Options(), scene.tools(), "change freeze")
    assert scene.adopt(1).status == 4
    assert scene.cas[0].count_get == 0


def test_a_whole_page_that_is_not_understood_is_not_asked_for_again_the_same_day(scene: Host) -> None:
    """The CA took the request: sent again, it would take it twice, and answer by the same page."""
    ca = scene.cas[0]
    ca.switches.update({"answer": "login", "answer_on": "post", "answer_after": True})
    ended = scene.run()
    assert ended.status == 5
    assert "skeleton" in ended.message
    for _ in range(20):
        scene.passes(HOUR_S)
        assert scene.run(now=True).status == 5
    assert ca.count_post == 1


def test_a_page_that_was_cut_off_is_asked_for_once_more(scene: Host) -> None:
    """A cut may not come twice; either certificate fits the key."""
    ca = scene.cas[0]
    ca.switches.update({"lost": "truncated-quiet", "lost_times": 1, "truncate_at": 300})
    assert scene.run().status == 5
    scene.passes(pace.COOL_DOWN_S + pace.REPEAT_SPREAD_S)
    assert scene.run().status == 0
    assert ca.count_post == 2


# -- several CAs -----------------------------------------------------------------------------------------------------

SURELY_NOT_STORED = [
    {"answer": "403"}, {"answer": "404"}, {"answer": "413"}, {"answer": "503"}, {"answer": "302"}, {"answer": "307"},
    {"unavailable": "all"}, {"unavailable": "post"}, {"https": "unknown-ca"}, {"https": "wrong-name"}, {"auth": "negotiate"}, {"lost": "before"},
]


@pytest.mark.parametrize("switches", SURELY_NOT_STORED[:-1], ids=str)
def test_the_other_ca_serves_where_surely_nothing_was_stored(both: Host, switches: Any) -> None:
    """Two CAs are there so that one may fail; exactly one certificate comes of it."""
    first, second = turns_to(both)
    first.switches.update(switches)
    ended = both.run()
    assert ended.status == 0, ended
    assert (first.authority.issued, second.authority.issued) == (0, 1)
    assert both.contact(first).status in (5, 13)
    assert both.contact(second).status == 0


def test_the_other_ca_serves_where_the_first_is_down(both: Host) -> None:
    """No connection, nothing stored."""
    first, second = turns_to(both)
    first.stop()
    assert both.run().status == 0
    assert second.authority.issued == 1


@pytest.mark.parametrize(
    "switches",
    [{"lost": "after"}, {"lost": "before"}, {"answer": "500", "answer_on": "post"}, {"answer": "502", "answer_on": "post", "answer_after": True},
     {"answer": "empty", "answer_on": "post"}, {"answer": "login", "answer_on": "post"}, {"mode": "pending"}],
    ids=str,
)
def test_a_pending_or_doubtful_request_stays_with_its_ca(both: Host, switches: Any) -> None:
    """What may have been stored there must not be asked for here as well."""
    first, second = turns_to(both)
    first.switches.update(switches)
    for _ in range(3):
        assert both.run().status in (5, 7)
    assert second.count_post == 0
    assert first.count_post == 1


def test_each_ca_has_its_own_password_template_and_trust(both: Host) -> None:
    """The second serves with its own, whatever is wrong with the first's."""
    first, second = turns_to(both)
    assert first.password != second.password
    assert first.authority.roots != second.authority.roots
    first.authority.templates.clear()
    assert both.run().status == 0
    assert second.authority.issued == 1
    assert [seen.status for seen in second.log if seen.method == "POST"] == [200]
    assert both.contact(first).status == 6


def test_hosts_are_spread_over_the_cas_and_each_stays_where_it_is() -> None:
    """A fleet must not begin at one server; and a CA that is added moves only its share of the hosts."""
    from scx_enroll import config, observe

    def first(host: str, *servers: str) -> str:
        return observe.ordered(tuple(config.CA(server=server) for server in servers), host)[0].server

    hosts = [f"host{number}.lab.test" for number in range(3000)]
    two = [first(host, "a", "b") for host in hosts]
    assert two == [first(host, "b", "a") for host in hosts], "the order in the file does not count"
    assert 1350 < two.count("a") < 1650
    three = [first(host, "a", "b", "c") for host in hosts]
    assert all(now in (before, "c") for before, now in zip(two, three))
    assert 850 < three.count("c") < 1150
    after = [observe.ordered(tuple(config.CA(server=server) for server in "abc"), host)[1].server for host, at in zip(hosts, three) if at == "c"]
    assert 0.4 < after.count("a") / len(after) < 0.6, "the hosts of a CA that is down are spread over the others"


def test_the_last_outcome_of_each_ca_is_in_the_status(both: Host) -> None:
    """An operator asks first which of them works."""
    first, second = turns_to(both)
    first.switches.deny_hresult = 0x80094800
    first.switches.mode = "deny"
    both.run()
    shown = both.command("status", live=False).stdout
    assert f"CA:             {first.server}, " in shown
    assert "0x80094800" in shown
    assert f"{second.server}, " in shown
    assert "it issued request ID 1" in shown


def test_a_password_refused_by_one_ca_is_sent_there_once_by_every_verb(both: Host) -> None:
    """Accounts lock: not a run, not a request for another host, not ca-cert sends it again."""
    first, second = turns_to(both)
    number = both.cas.index(first)
    both.write(f"password{number}", b"wrong\n", 0o600)
    assert both.run().status == 0
    assert first.bad_passwords == 1
    csr = both.write("other.csr", foreign_csr())
    assert both.command("submit", str(csr), live=False).returncode == 0
    assert both.command("ca-cert", "--fetch", "--ca", f"c{number}", live=False).returncode == 13
    assert both.command("run", "--now", live=False).returncode == 0
    assert first.bad_passwords == 1
    assert second.authority.issued == 2
    both.write(f"password{number}", first.password.encode() + b"\n", 0o600)
    assert both.command("ca-cert", "--fetch", "--ca", f"c{number}", live=False).returncode == 0


# -- the CA's own certificate ----------------------------------------------------------------------------------------


def test_a_ca_without_trust_here_gets_no_request(scene: Host) -> None:
    """What its chain ends in is known before anything is sent."""
    scene.cas[0].authority.rebuild()
    ended = scene.run()
    assert ended.status == 3
    assert "ca-cert --fetch" in ended.hint
    assert scene.cas[0].count_post == 0
    assert scene.contact(scene.cas[0]).trusted is False


@pytest.mark.parametrize("new_key", [False, True])
def test_a_renewed_ca_certificate_is_reported_before_it_bites(scene: Host, new_key: bool) -> None:
    """Management Servers need the new one before the next renewal; the weekly question sees it."""
    ca = scene.cas[0]
    assert scene.run().status == 0
    assert scene.notes().count("CA certificate") == 0
    ca.authority.renew(new_key=new_key)
    scene.passes(11 * DAY)
    ended = scene.run()
    assert (ended.status, ended.rows, ca.count_post) == (0, ("C5",), 1)
    newest = ca.authority.newest.der
    assert fingerprint(newest) in scene.notes()
    assert "ca-cert --fetch" in scene.notes()
    assert scene.run(renew=True).status == 0
    assert "signs with a new CA certificate" not in scene.notes(), "the renewed certificate came with it"


def fingerprint(der: bytes) -> str:
    """SHA-256."""
    import hashlib

    return hashlib.sha256(der).hexdigest()


def test_a_new_root_is_reported_before_renewal_would_be_refused(scene: Host) -> None:
    """A root is trusted only when the operator adds it: they must hear of it in time."""
    ca = scene.cas[0]
    assert scene.run().status == 0
    ca.authority.rebuild()
    scene.passes(11 * DAY)
    assert scene.run().status == 0
    assert "leads to no root in /etc/scx-enroll/ca0.pem any more" in scene.notes()
    assert scene.run(renew=True).status == 3
    assert ca.count_post == 1


def test_a_new_root_with_cross_certificates_still_leads_to_the_old_one(scene: Host) -> None:
    """That is what cross certificates are for: renewal goes on, and the new certificate is reported."""
    ca = scene.cas[0]
    assert scene.run().status == 0
    ca.authority.renew_root()
    scene.passes(11 * DAY)
    assert scene.run().status == 0
    assert "signs with a new CA certificate" in scene.notes()
    assert scene.run(renew=True).status == 0
    assert ca.authority.issued == 2


def test_an_old_certificate_in_the_bag_does_not_make_the_ca_look_old(scene: Host) -> None:
    """A bag holds cross certificates and ended ones; only the way to the root counts."""
    ca = scene.cas[0]
    assert scene.run().status == 0
    anchor = ca.authority._roots[-1]
    from tests.lab.authority import make_ca

    old = make_ca("Old Cross", anchor.key, clock_of(scene) - 3 * YEAR, clock_of(scene) - YEAR, anchor.certificate, anchor.key)
    anchor.cross.append(old)
    scene.passes(600 * DAY)
    ended = scene.run()
    assert ended.status == 0
    assert ca.authority.issued == 2


def clock_of(scene: Host) -> float:
    """The time of the scene."""
    return scene.clock()


@pytest.mark.parametrize("settings", [{}, {"key": "new", "new_key": "ec:secp256r1"}], ids=["the agent's key", "new keys"])
def test_a_ca_that_ends_soon_is_reported_and_not_asked_for_nothing(tmp_path: Path, host: LabHost, clock: Clock, settings: Dict[str, str]) -> None:
    """Certificates get shorter with it, and in the end gain no time: not one is asked for in vain."""
    with LabCA(tmp_path / "ca", clock=clock, lifetime=100 * DAY, ca_lifetime=120 * DAY) as ca:
        scene = enrolling(host, [ca], clock, **settings)
        assert scene.run().status == 0
        refused = 0
        for _ in range(59):
            scene.passes(2 * DAY)
            ended = scene.run()
            refused += "C4" in ended.rows and "would last no longer" in ended.message
        assert refused > 3
        assert (ca.authority.issued, ca.count_post) == (2, 2), "another would last no longer"
        assert "ends soon and shortens what it issues" in scene.notes()


@pytest.mark.parametrize("options", [{"tiers": 3}, {"tiers": 1}, {"aki": False}], ids=str)
def test_chains_of_every_length_and_without_identifiers(tmp_path: Path, host: LabHost, clock: Clock, options: Any) -> None:
    """A policy CA between, a root that issues itself, an old CA without identifiers: the chain is built and stored."""
    with LabCA(tmp_path / "ca", clock=clock, **options) as ca:
        scene = enrolling(host, [ca], clock)
        for bag in ("sorted", "shuffled"):
            ca.switches.bag = bag
            assert scene.run(renew=bag == "shuffled").status == 0
        (newest, *_) = sorted((scene.state / "generations").iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        stored = (newest / "chain.pem").read_bytes().count(b"BEGIN CERTIFICATE")
        assert stored == ca.authority.tiers - 1


# -- revoked ---------------------------------------------------------------------------------------------------------


def test_a_revoked_certificate_is_noticed_within_a_week_or_so_and_replaced_once(scene: Host) -> None:
    """SCOM refuses it; one new request follows, and no more if that one is revoked, too."""
    ca = scene.cas[0]
    assert scene.run().status == 0
    first = scene.installed
    ca.authority.revoke(1)
    scene.passes(11 * DAY)
    ended = scene.run()
    assert (ended.status, ended.rows) == (0, ("C5", "C4", "L7"))
    assert scene.installed != first
    assert ca.count_post == 2
    ca.authority.revoke(2)
    scene.passes(18 * DAY)
    ended = scene.run()
    assert ended.status == 6
    assert "revoked" in ended.message
    for _ in range(5):
        scene.passes(DAY)
        assert scene.run(now=True).status == 6
    assert ca.count_post == 2
    assert scene.run(renew=True).status == 0, "a person may ask for another"


def test_the_question_is_asked_once_a_week_and_touches_nothing(scene: Host) -> None:
    """It costs six GETs a week and never a certificate."""
    ca = scene.cas[0]
    assert scene.run().status == 0
    before, asked = scene.host.snapshot(), 0
    for _ in range(40):
        scene.passes(DAY)
        gets = ca.count_get
        ended = scene.run()
        assert ended.status == 0
        asked += ended.rows == ("C5",)
        assert (ca.count_get > gets) == (ended.rows == ("C5",))
    assert 4 <= asked <= 6
    assert (scene.host.snapshot(), ca.count_post) == (before, 1)


@pytest.mark.parametrize(
    "switches", [{"answer": "503"}, {"answer": "login"}, {"unavailable": "get"}, {"auth": "negotiate"}, {"https": "expired"}], ids=str
)
def test_a_question_that_is_not_answered_is_no_failure_and_asked_again_in_half_a_week(scene: Host, switches: Any) -> None:
    """The certificate in service is as good as before."""
    ca = scene.cas[0]
    assert scene.run().status == 0
    ca.switches.update(switches)
    scene.passes(11 * DAY)
    ended = scene.run()
    assert (ended.status, ended.rows) == (0, ("C5",))
    assert scene.contact(ca).status in (5, 13)
    assert scene.run().rows == (), "not at every run"
    ca.switches.reset()
    scene.passes(3.5 * DAY + 1)
    assert scene.run().rows == ("C5",)
    assert scene.contact(ca).status == 0
    assert scene.contact(ca).message.endswith("is in force")


def test_a_question_after_a_rebuild_does_not_revoke_anything(scene: Host) -> None:
    """Another certificate under our ID says nothing about ours."""
    ca = scene.cas[0]
    assert scene.run().status == 0
    ca.authority.rebuild()
    ca.authority.submit(foreign_csr(), "SCXAgent")
    scene.passes(11 * DAY)
    assert (scene.run().status, ca.authority.issued) == (0, 1)
    assert "not the one in service" in scene.contact(ca).message


# -- loops, lost chains, and other ways to lose what was had ----------------------------------------------------------


def test_a_refused_password_is_sent_once_by_renew_beside_a_pending_request(scene: Host) -> None:
    """The hint says --renew; a run that polls with it again and again would lock the account."""
    ca = scene.cas[0]
    ca.switches.mode = "pending"
    assert scene.run().status == 7
    ca.switches.auth = "refused"
    scene.passes(HOUR_S)
    assert scene.run().status == 13
    refused = ca.bad_passwords
    assert scene.run(renew=True).status == 13
    assert ca.bad_passwords <= refused + 1
    assert scene.run().status == 13
    assert scene.run(now=True).status == 13
    assert ca.bad_passwords <= refused + 1


def test_a_poll_that_is_forbidden_after_the_configuration_changed_ends(scene: Host) -> None:
    """One GET and a wait, not a poll without end."""
    ca = scene.cas[0]
    ca.switches.mode = "pending"
    assert scene.run().status == 7
    scene.configure(minimum_key="rsa:2048")
    ca.switches.answer = "403"
    scene.passes(HOUR_S)
    gets = ca.count_get
    assert scene.run().status == 13
    assert ca.count_get == gets + 1
    assert scene.run().status == 13
    assert ca.count_get == gets + 1


@pytest.mark.parametrize("way", ["approved", "named", "repeated"])
def test_a_chain_that_does_not_come_along_does_not_cost_the_certificate(scene: Host, way: str) -> None:
    """One failed download must not throw a certificate away for which somebody was asked; the CA's own chain does as well."""
    ca = scene.cas[0]
    if way == "approved":
        ca.switches.mode = "pending"
        assert scene.run().status == 7
        ca.authority.approve(1)
    else:
        ca.switches.update({"lost": "after", "lost_times": 1})
        assert scene.run().status == 5
    ca.switches.bag = "empty"
    if way == "named":
        ended = scene.adopt(1)
    else:
        scene.passes(pace.COOL_DOWN_S + pace.REPEAT_SPREAD_S)
        ended = scene.run(now=True)
    assert ended.status == 0, ended
    assert ca.authority.issued <= (2 if way == "repeated" else 1)


def test_a_certificate_that_leads_to_no_root_yet_is_kept_until_the_trust_is_mended(scene: Host) -> None:
    """An approved certificate is worth a person's time: with the right root it goes into service without another request."""
    ca = scene.cas[0]
    ca.switches.mode = "pending"
    assert scene.run().status == 7
    right = (scene.etc / "ca0.pem").read_bytes()
    (scene.etc / "ca0.pem").write_bytes((scene.etc / "web0.pem").read_bytes())
    ca.authority.approve(1)
    before = scene.host.snapshot()
    ended = scene.run(now=True)
    assert ended.status == 8
    assert "path" in ended.message
    assert scene.host.snapshot() == before
    assert scene.run(now=True).status == 8, "and nothing else is asked for"
    assert ca.count_post == 1
    (scene.etc / "ca0.pem").write_bytes(right)
    ended = scene.run()
    assert (ended.status, ended.rows, ca.count_post) == (0, ("L7",), 1)


@pytest.mark.parametrize("code", [0x80090030, 0x8000FFFF, 0x80004005, 0x80094003])
def test_an_error_that_is_not_known_ends_no_request_that_waits(scene: Host, code: int) -> None:
    """What is not recognised is unknown: the row may still be approved."""
    ca = scene.cas[0]
    ca.switches.mode = "pending"
    assert scene.run().status == 7
    ca.switches.update({"unavailable": "get", "unavailable_hresult": code})
    ended = scene.run(now=True)
    assert ended.status == 7
    assert ended.result
    assert ended.result.failure is None, "it goes on waiting for a person"
    assert requests_of(scene).state == "submitted"
    ca.switches.update({"unavailable": ""})
    ca.authority.approve(1)
    assert scene.run(now=True).status == 0
    assert ca.count_post == 1


def test_renew_is_fulfilled_by_a_certificate_that_was_pending(scene: Host) -> None:
    """One was asked for; it came."""
    ca = scene.cas[0]
    ca.switches.mode = "pending"
    assert scene.run().status == 7
    ca.authority.approve(1)
    ca.switches.mode = "issue"
    scene.passes(HOUR_S)
    assert scene.run(renew=True).status == 0
    assert (ca.count_post, ca.authority.issued) == (1, 1)


@pytest.mark.parametrize("fault", ["chain", "clock"])
def test_a_ca_that_fails_the_preflight_does_not_keep_the_other_one_from_serving(both: Host, fault: str) -> None:
    """Nothing was sent to it; its share of the fleet must not expire beside a healthy CA."""
    first, second = turns_to(both)
    if fault == "chain":
        first.authority.rebuild()
    else:
        first.switches.date_offset = 4000.0
    ended = both.run()
    assert ended.status == 0
    assert (first.count_post, second.authority.issued) == (0, 1)
    assert both.contact(first).status == (3 if fault == "chain" else 12)


def test_one_account_refused_by_one_ca_is_not_tried_at_the_other(tmp_path: Path, host: LabHost, clock: Clock) -> None:
    """Both ask the same directory: a second try is a second step to a locked account."""
    with LabCA(tmp_path / "a", name="A", clock=clock, password="same") as a, LabCA(tmp_path / "b", name="B", clock=clock, password="same") as b:
        scene = enrolling(host, [a, b], clock)
        for number in range(2):
            scene.write(f"password{number}", b"wrong\n", 0o600)
        assert scene.run().status == 13
        assert a.bad_passwords + b.bad_passwords == 1
        assert scene.run(now=True).status == 13
        assert a.bad_passwords + b.bad_passwords == 1
        for number in range(2):
            scene.write(f"password{number}", b"same\n", 0o600)
        assert scene.run().status == 0


def test_a_pending_request_for_a_name_that_is_not_wanted_any_more_is_given_up(scene: Host) -> None:
    """Whoever approves it after a week would get a certificate that is refused; the ID is told, to be withdrawn."""
    ca = scene.cas[0]
    ca.switches.mode = "pending"
    assert scene.run().status == 7
    scene.configure(alternative_names="new.lab.test")
    ca.switches.mode = "issue"
    ended = scene.run()
    assert ended.status == 0
    assert ended.result
    assert "request ID 1" in next(act.reason for act in ended.result.acts if act.action == "abandon")


def test_many_cas_that_do_not_answer_are_no_defect(host: LabHost, cas: List[LabCA], clock: Clock) -> None:
    """Twenty is many, but not too many."""
    scene = enrolling(host, cas[:1], clock)
    conf = (scene.etc / "scx-enroll.conf").read_text().replace("[ca]", "[ca c0]")
    section = conf[conf.index("[ca c0]"):]
    ports = range(2, 22)
    more = "".join(section.replace("c0", f"c{port}").replace(cas[0].server, f"localhost:{port}").replace("/web0", "/web0") for port in ports)
    more = more.replace("/webc", "/web")
    scene.write("scx-enroll.conf", (conf + more).encode())
    cas[0].stop()
    ended = scene.run()
    assert ended.status == 5, ended


def test_a_host_that_holds_only_a_revoked_certificate_is_not_patient(tmp_path: Path, host: LabHost, clock: Clock) -> None:
    """SCOM refuses it already: another CA is turned to, and the timer's run tells."""
    with LabCA(tmp_path / "a", name="A", clock=clock) as a, LabCA(tmp_path / "b", name="B", clock=clock) as b:
        scene = enrolling(host, [a, b], clock)
        first, second = turns_to(scene)
        assert scene.run().status == 0
        first.authority.revoke(1)
        first.switches.mode = "pending"
        scene.passes(11 * DAY)
        ended = scene.run()
        assert ended.status == 7
        assert ended.result
        assert pace.needs_a_person(7, ended.result.view.seen.held, int(clock()))
        scene.passes(DAY + HOUR_S)
        assert scene.run().status == 0
        assert second.authority.issued == 1


def test_a_note_about_a_missing_root_goes_with_the_mending(scene: Host) -> None:
    """A note that stays after the cure is not believed the next time."""
    ca = scene.cas[0]
    assert scene.run().status == 0
    ca.authority.rebuild()
    scene.passes(11 * DAY)
    scene.run()
    assert "leads to no root" in scene.notes()
    ca.write_issuer_trust()
    both_roots = (scene.etc / "ca0.pem").read_bytes() + Path(ca.issuer_trust).read_bytes()
    (scene.etc / "ca0.pem").write_bytes(both_roots)
    os.utime(scene.etc / "ca0.pem", (clock_of(scene) + 60, clock_of(scene) + 60))
    assert "leads to no root" not in scene.notes()


def test_an_account_that_was_mended_is_let_in_by_renew_and_stays_so(scene: Host) -> None:
    """The password is the same, so only a person can say that it is good again; after that nobody has to say it twice."""
    ca = scene.cas[0]
    ca.switches.mode = "pending"
    assert scene.run().status == 7
    ca.switches.auth = "refused"
    scene.passes(HOUR_S)
    assert scene.run().status == 13
    ca.switches.auth = "basic"
    assert scene.run(now=True).status == 13
    assert scene.run(renew=True).status == 7
    ca.authority.approve(1)
    assert scene.run(now=True).status == 0
    assert ca.count_post == 1


def test_intermediates_of_issuer_trust_make_up_for_what_the_ca_does_not_send(tmp_path: Path, host: LabHost, clock: Clock) -> None:
    """Preflight, verification and ca-cert all take them; the CA sends its own certificate alone."""
    with LabCA(tmp_path / "ca", clock=clock, tiers=3) as ca:
        scene = enrolling(host, [ca], clock)
        ca.switches.bag = "leaf"
        policy = [der for der in ca.authority.chain() if der != ca.authority.newest.der and der not in ca.authority.roots]
        assert scene.run().status == 3
        (scene.etc / "ca0.pem").write_bytes(Path(ca.issuer_trust).read_bytes() + to_pem(policy))
        assert scene.run(now=True).status == 0
        shown = scene.command("ca-cert", "--fetch", live=False).stdout
        assert "NO, not by issuer-trust" not in shown
        assert shown.count("for the store CA") == 2


# -- killed between any two changes -----------------------------------------------------------------------------------


class Crash(BaseException):
    """The power fails."""


CHANGES = ("save_journal", "save_budget", "add_generation", "save_page", "make_copy", "swap", "sweep")


def crashing(point: int, names: List[str]) -> Any:
    """A store whose power fails before or after its changes, at the `point`th of these moments."""

    def tick(name: str) -> None:
        names.append(name)
        if len(names) == point:
            raise Crash

    def made(root: Root) -> Store:
        store = Store(root)

        def around(name: str, call: Any) -> Any:
            def wrapped(*arguments: Any, **named: Any) -> Any:
                tick(f"before {name}")
                result = call(*arguments, **named)
                tick(f"after {name}")
                return result

            return wrapped

        for name in CHANGES:
            owner = store if hasattr(store, name) else store.beside
            setattr(owner, name, around(name, getattr(owner, name)))
        return store

    return made


@pytest.mark.parametrize("act", ["adopt", "question"])
def test_after_a_crash_while_an_id_is_taken_over_or_the_question_is_asked_the_next_runs_end_well(
    scene: Host, tmp_path: Path, act: str
) -> None:
    """No ID is lost, nothing is asked for beside it, and what was revoked does not stay."""
    ca, root, saved = scene.cas[0], Path(scene.host.root), tmp_path / "saved"
    if act == "adopt":
        ca.switches.update({"lost": "after", "lost_times": 1})
        assert scene.run().status == 5
    else:
        assert scene.run().status == 0
        ca.authority.revoke(1)
        scene.passes(11 * DAY)
    first, offset = scene.installed, scene.clock.offset
    subprocess.run(["cp", "-a", str(root), str(saved)], check=True)  # owners, too
    reached = 0
    for point in range(1, 80):
        shutil.rmtree(root)
        subprocess.run(["cp", "-a", str(saved), str(root)], check=True)
        scene.clock.offset, scene.offset_s = offset, int(offset)
        posts, names = ca.count_post, []
        parts = {"store": crashing(point, names)}
        try:
            scene.do(enroll.adopt, 1, "", live=False, parts=parts) if act == "adopt" else scene.do(enroll.run, live=False, parts=parts)
        except Crash:
            reached += 1
        for _ in range(4):
            ended = scene.run()
            if ended.status == 5 and act == "adopt":
                ended = scene.adopt(1)
            if ended.status == 0 and (act == "adopt" or scene.installed != first):
                break
            scene.passes(DAY + 60 if act == "adopt" else 2 * DAY)
        assert ended.status == 0, (point, names[-1:])
        assert scene.installed != first, (point, names[-1:])
        most = 0 if act == "adopt" else 2  # a run that was killed while it submitted leaves a doubt
        assert ca.count_post - posts <= most, (point, names[-1:])
        if len(names) < point:
            break
    assert reached > 8


def test_another_kind_of_failure_waits_from_its_own_beginning(scene: Host, cas: List[LabCA]) -> None:
    """Four times nobody answered, then somebody says no: an hour, as at any first time, not sixteen."""
    cas[0].switches.answer = "503"
    for waits in (300, 600, 1200, 2400):
        ended = scene.run()
        assert ended.result
        assert abs((ended.result.step.until or 0) - time.time() - scene.clock.offset - waits) < 30
        scene.passes(waits + 1)
    cas[0].switches.answer = "403"
    ended = scene.run()
    assert ended.result
    assert ended.status == 13
    assert abs((ended.result.step.until or 0) - time.time() - scene.clock.offset - HOUR_S) < 30


def test_an_account_that_was_mended_is_tried_once_when_a_person_says_so(scene: Host, cas: List[LabCA]) -> None:
    """`check --retry` signs in and does nothing else; without it no command sends what was refused, and none repeats a failed retry."""
    ca = cas[0]
    ca.switches.auth = "refused"
    assert scene.run().status == 13
    sent = ca.bad_passwords
    told = scene.command("check", live=False)
    assert (told.returncode, ca.bad_passwords) == (13, sent)
    assert f"scx-enroll: error: not tried, since {ca.server} refused user" in told.stderr
    assert "offers       Negotiate, NTLM, Basic" in told.stdout, "what it offers is seen all the same"
    assert scene.command("check", "--retry", live=False).returncode == 13
    assert ca.bad_passwords == sent + 1
    ca.switches.auth = "basic"
    assert scene.run(now=True).status == 13
    assert scene.command("check", "--retry", live=False).returncode == 0
    assert (scene.posts, scene.issued) == (0, 0)
    assert scene.run().status == 0
    assert (ca.bad_passwords, scene.issued) == (sent + 1, 1)
