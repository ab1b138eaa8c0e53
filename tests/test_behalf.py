"""`submit`: the CA's part alone, for hosts that can't run the program, against a real HTTPS CA; no agent is anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from scx_enroll import behalf, request, store, verify
from scx_enroll.case import Wish
from scx_enroll.durable import TEMPORARY
from scx_enroll.enroll import Options, Tools
from scx_enroll.errors import EnrollError
from scx_enroll.journal import DAY_S, HOUR_S
from scx_enroll.pace import COOL_DOWN_S, REPEAT_SPREAD_S
from scx_enroll.rootfs import Root
from scx_enroll.store import Store
from tests.lab.ca import LabCA
from tests.scene import take_openssls_clock_away

pytestmark = pytest.mark.slow

PROGRAM = os.path.join(os.path.dirname(sys.executable), "scx-enroll")


class Gateway:
    """A host without an agent that submits for others; `offset_s` moves its clock and the CA's."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.offset_s = 0
        self.ca = LabCA(folder / "ca", clock=lambda: time.time() + self.offset_s, **options)
        self.tree = folder / "root"
        self.etc = self.tree / "etc/scx-enroll"
        self.etc.mkdir(parents=True)
        self.root = Root(str(self.tree))
        for name in ("server-trust.pem", "issuer-trust.pem"):
            (self.etc / name).write_bytes((folder / "ca" / name).read_bytes())
        (self.etc / "password").touch(0o600)
        (self.etc / "password").write_text(self.ca.password + "\n")
        self.folder = folder

    def __enter__(self) -> Gateway:
        self.ca.start()
        self.configure()
        return self

    def __exit__(self, *_: object) -> None:
        self.ca.stop()

    def configure(self, more: str = "") -> None:
        """Write the configuration."""
        (self.etc / "scx-enroll.conf").write_text(
            f"[ca]\nserver = {self.ca.server}\ntemplate = SCXAgent\nauth = basic\nuser = {self.ca.user}\n"
            f"server-trust = /etc/scx-enroll/server-trust.pem\nissuer-trust = /etc/scx-enroll/issuer-trust.pem\n{more}"
        )

    def csr(self, name: str = "aix1", *more: str) -> Path:
        """A request of another host, as a file."""
        path = self.folder / f"{name}.csr"
        spec = request.RequestSpec(f"{name}.lab.test", more)
        path.write_bytes(request.build_csr(spec, ec.generate_private_key(ec.SECP256R1())))
        return path

    def tools(self, **parts: Any) -> Tools:
        """The program's parts, with this clock."""
        return Tools(clock=lambda: int(time.time()) + self.offset_s, **parts)

    def submit(self, path: Path, ca: str = "", adopt: Any = None, parts: Any = None, **wish: bool) -> behalf.Ended:
        """Submit in this process."""
        foreign = request.load_csr(path.read_bytes(), str(path))
        return behalf.submit(self.root, Options(wish=Wish(**wish)), self.tools(**(parts or {})), foreign, ca, adopt)

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the program as a process of its own."""
        return subprocess.run((PROGRAM, *words, "--root", str(self.tree)), capture_output=True, text=True, timeout=60)

    def state(self) -> Dict[str, bytes]:
        """What is remembered."""
        base = self.tree / "var/lib/scx-enroll"
        return {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """A gateway and its CA; hours pass."""
    take_openssls_clock_away(monkeypatch)
    with Gateway(tmp_path) as made:
        yield made


def test_a_certificate_and_its_chain_come_out(gateway: Gateway) -> None:
    """Leaf first, then the intermediates: what the other host's operator installs, and the servers trust."""
    csr = gateway.csr("aix1", "aix1-mgmt.lab.test")
    ran = gateway.command("submit", str(csr))
    assert ran.returncode == 0, ran.stderr
    leaf, *chain = verify.read(ran.stdout.encode())
    assert verify.facts(leaf).names == ("aix1.lab.test", "aix1-mgmt.lab.test")
    assert verify.facts(leaf).spki == request.load_csr(csr.read_bytes(), "").spki
    assert chain == [gateway.ca.authority.newest.der]
    assert verify.facts(leaf).leaf in ran.stderr


def test_a_second_call_prints_the_same_without_asking_anybody(gateway: Gateway) -> None:
    """It works like make: a cron job may call it every day."""
    csr = gateway.csr()
    first, gets, before = gateway.command("submit", str(csr)), gateway.ca.count_get, gateway.state()
    second = gateway.command("submit", str(csr))
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert (gateway.ca.count_get, gateway.ca.count_post) == (gets, 1)
    assert gateway.state() == before


def test_the_file_asked_for_is_written_whole_or_not_at_all(gateway: Gateway) -> None:
    """An empty file from a redirection would be installed by the next script."""
    csr, output = gateway.csr(), gateway.folder / "out.pem"
    before = verify.pem(gateway.ca.authority.newest.der).decode()
    output.write_text(before)
    gateway.ca.switches.mode = "pending"
    ran = gateway.command("submit", str(csr), "--output", str(output))
    assert ran.returncode == 7
    assert output.read_text() == before
    gateway.ca.authority.approve(1)
    ran = gateway.command("submit", str(csr), "--now", "--output", str(output))
    assert (ran.returncode, ran.stdout) == (0, "")
    assert len(verify.read(output.read_bytes())) == 2
    assert output.stat().st_mode & 0o777 == 0o644
    assert not [name for name in os.listdir(gateway.folder) if name.startswith(TEMPORARY)]


@pytest.mark.parametrize("where", ["/proc/nowhere/out.pem", "/nonexistent/out.pem"])
def test_an_output_that_can_not_be_written_is_told_before_anything_is_asked_for(gateway: Gateway, where: str) -> None:
    """What can fail after a certificate was issued should have failed before."""
    ran = gateway.command("submit", str(gateway.csr()), "--output", where)
    assert ran.returncode == 12
    assert "hint: " in ran.stderr
    assert gateway.ca.count_get == gateway.ca.count_post == 0


@pytest.mark.parametrize("what", ["device", "pipe", "folder", "link", "key", "request"])
def test_an_output_never_replaces_what_holds_no_certificate(gateway: Gateway, what: str) -> None:
    """A typing error must not cost a key, nor root's /dev/null its life."""
    csr, output = gateway.csr(), gateway.folder / "out"
    if what == "device":
        os.mknod(output, 0o600 | 0o020000, os.makedev(1, 3)) if os.geteuid() == 0 else output.symlink_to("/dev/null")
    elif what == "pipe":
        os.mkfifo(output)
    elif what == "folder":
        output.mkdir()
    elif what == "link":
        output.symlink_to(gateway.folder / "elsewhere")
    elif what == "key":
        output.write_text("-----BEGIN PRIVATE KEY-----\nMII\n-----END PRIVATE KEY-----\n")
    else:
        output = csr
    before = os.lstat(output)
    ran = gateway.command("submit", str(csr), "--output", str(output))
    assert ran.returncode == 2
    assert "would replace" in ran.stderr
    assert (os.lstat(output).st_ino, os.lstat(output).st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert gateway.ca.count_get == gateway.ca.count_post == 0


def test_a_weak_key_is_told_before_anything_is_sent(gateway: Gateway) -> None:
    """The certificate would be refused here: better before it is issued."""
    gateway.configure("[agent]\nminimum-key = ec:secp384r1\n")
    ran = gateway.command("submit", str(gateway.csr()))
    assert ran.returncode == 2
    assert "weaker than ec:secp384r1" in ran.stderr
    assert gateway.ca.count_get == 0


def test_what_is_kept_of_one_request_is_bounded_and_this_hosts_own_state_untouched(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is renewed for years must not fill the disk, nor cost this host the bytes that a rollback needs."""
    monkeypatch.setattr(store, "KEPT_GENERATIONS", 2)
    monkeypatch.setattr(store, "KEPT_ORIGINALS", 1)
    gateway.configure("[renewal]\ncertificates-per-day = 20\n")
    csr = gateway.csr()
    gateway.submit(csr)
    originals = [gateway.tree / "var/lib/scx-enroll/original" / f"{digit * 64}.pem" for digit in "012"]
    for original in originals:
        original.touch(0o600)
    for _ in range(4):
        assert gateway.submit(csr, renew=True).status == 0
    (folder,) = (gateway.tree / "var/lib/scx-enroll/submitted").iterdir()
    assert len(list((folder / "generations").iterdir())) == 2
    assert all(original.exists() for original in originals)


def test_pending_is_told_kept_and_resumed(gateway: Gateway) -> None:
    """Status 7, the ID, and the call that goes on; polled only when due, or with --now."""
    csr = gateway.csr()
    gateway.ca.switches.mode = "pending"
    ran = gateway.command("submit", str(csr))
    assert (ran.returncode, ran.stdout) == (7, "")
    assert "request ID 1 at" in ran.stderr
    assert f"scx-enroll submit {csr} --now" in ran.stderr
    gets = gateway.ca.count_get
    assert gateway.submit(csr).status == 7
    assert gateway.ca.count_get == gets, "not before it is due"
    gateway.offset_s += 120
    assert gateway.submit(csr).status == 7
    assert gateway.ca.count_get == gets + 1
    gateway.ca.authority.approve(1)
    gateway.offset_s += 8 * HOUR_S
    assert gateway.submit(csr).status == 0
    assert gateway.ca.count_post == 1


def test_doubtful_cools_down_and_sends_the_same_request_once_more(gateway: Gateway) -> None:
    """Either certificate fits; a lost answer is not a licence for a third."""
    csr = gateway.csr()
    gateway.ca.switches.lost = "after"
    assert gateway.submit(csr).status == 5
    assert gateway.submit(csr, now=True).status == 5
    assert gateway.ca.count_post == 1
    gateway.offset_s += COOL_DOWN_S + REPEAT_SPREAD_S
    assert gateway.submit(csr).status == 5
    gateway.offset_s += COOL_DOWN_S + REPEAT_SPREAD_S
    assert gateway.submit(csr).status == 5
    assert gateway.ca.count_post == 2
    assert {row.csr for row in gateway.ca.authority.rows.values()} == {csr.read_bytes()}
    gateway.ca.switches.lost = ""
    assert gateway.submit(csr, adopt=2).status == 0, "the operator found the row"
    assert gateway.ca.count_post == 2


def test_taking_over_another_hosts_request_changes_nothing(gateway: Gateway) -> None:
    """With many hosts a wrong ID is likely."""
    one, two = gateway.csr("aix1"), gateway.csr("aix2")
    assert gateway.submit(one).status == 0
    gateway.ca.switches.update({"lost": "after", "lost_times": 1})
    assert gateway.submit(two).status == 5
    before = gateway.state()
    ran = gateway.command("submit", str(two), "--adopt", "1")
    assert ran.returncode == 8
    assert "aix1.lab.test" in ran.stderr
    assert {name: data for name, data in gateway.state().items() if "contacts" not in name and b'"request"' not in data} == {
        name: data for name, data in before.items() if b'"request"' not in data
    }
    assert gateway.command("submit", str(two), "--adopt", "2").returncode == 0


@pytest.mark.parametrize(
    ("switches", "status", "words"),
    [
        ({"mode": "deny", "deny_hresult": 0x80094800}, 6, "not published"),
        ({"answer": "503"}, 5, "out of service"),
        ({"https": "unknown-ca"}, 5, "not trusted"),
        ({"auth": "refused"}, 13, "refused user"),
        ({"wrong": "key"}, 8, "public key"),
        ({"wrong": "eku"}, 8, "serverAuth"),
        ({"wrong": "same-name-issuer"}, 8, "local issuer"),
        ({"wrong": "name"}, 8, "CN is other.lab.test"),
        ({"wrong": "expired"}, 8, "expired"),
    ],
    ids=str,
)
def test_the_same_messages_and_statuses_as_for_this_host(gateway: Gateway, switches: Dict[str, Any], status: int, words: str) -> None:
    """An operator learns them once; nothing is printed that must not be installed, and nothing is asked for twice."""
    csr = gateway.csr()
    gateway.ca.switches.update(switches)
    for _ in range(2):
        ran = gateway.command("submit", str(csr))
        assert (ran.returncode, ran.stdout) == (status, ""), ran.stderr
        assert words in ran.stderr
        assert "hint: " in ran.stderr
    assert gateway.ca.count_post <= 1
    assert gateway.ca.bad_passwords <= 1


def test_the_budget_is_this_hosts_for_all_it_submits(gateway: Gateway) -> None:
    """A loop over files must not empty the CA: the fourth waits, and says how to raise the limit is the operator's."""
    csrs = [gateway.csr(f"aix{number}") for number in range(4)]
    assert [gateway.submit(csr).status for csr in csrs] == [0, 0, 0, 6]
    assert "3 certificates" in gateway.submit(csrs[3]).step.reason
    assert gateway.submit(csrs[3], now=True, renew=True).status == 6
    gateway.configure("[renewal]\ncertificates-per-day = 4\n")
    assert gateway.submit(csrs[3]).status == 0
    assert gateway.ca.authority.issued == 4


def test_a_refused_password_is_sent_once_for_all_requests(gateway: Gateway) -> None:
    """Ten hosts in a loop would lock the account."""
    gateway.ca.switches.auth = "refused"
    assert [gateway.submit(gateway.csr(f"aix{number}")).status for number in range(5)] == [13] * 5
    assert gateway.ca.bad_passwords == 1




def test_a_certificate_that_is_due_is_asked_for_anew(gateway: Gateway) -> None:
    """The same call renews: a cron job is all that the gateway needs."""
    csr = gateway.csr()
    first = gateway.submit(csr).generation
    gateway.offset_s += 500 * DAY_S
    ended = gateway.submit(csr)
    assert (ended.status, gateway.ca.authority.issued) == (0, 2)
    assert first
    assert ended.generation
    assert ended.generation.id != first.id


def test_a_renewal_that_fails_still_brings_the_certificate_that_is_valid(gateway: Gateway) -> None:
    """Status and sentence tell; the certificate is as good as before."""
    csr = gateway.csr()
    first = gateway.submit(csr).generation
    gateway.offset_s += 500 * DAY_S
    gateway.ca.switches.answer = "503"
    ended = gateway.submit(csr)
    assert (ended.status, ended.generation) == (5, first)


def test_renew_asks_at_once(gateway: Gateway) -> None:
    """After a change of the template."""
    csr = gateway.csr()
    first = gateway.submit(csr).generation
    second = gateway.submit(csr, renew=True).generation
    assert first
    assert second
    assert first.id != second.id
    assert gateway.ca.authority.issued == 2


def test_several_requests_wait_side_by_side(gateway: Gateway) -> None:
    """Each has its own folder; this host's own journal is not touched."""
    gateway.ca.switches.mode = "pending"
    csrs = [gateway.csr(f"aix{number}") for number in range(3)]
    assert [gateway.submit(csr).status for csr in csrs] == [7, 7, 7]
    for number in (2, 1, 3):
        gateway.ca.authority.approve(number)
    assert [gateway.submit(csr, now=True).status for csr in csrs] == [0, 0, 0]
    assert gateway.ca.count_post == 3
    assert "journal.json" not in gateway.state()
    for csr, number in zip(csrs, (1, 2, 3)):
        generation = gateway.submit(csr).generation
        assert generation
        assert verify.read(generation.certificate)[0] == gateway.ca.authority.rows[number].certificate


def test_one_ca_alone_can_be_named(tmp_path: Path) -> None:
    """Where the other one's template is another."""
    with Gateway(tmp_path) as gateway, LabCA(tmp_path / "two", name="Second CA") as second:
        (gateway.etc / "two.pem").write_bytes(Path(second.issuer_trust).read_bytes())
        (gateway.etc / "web.pem").write_bytes(Path(second.server_trust).read_bytes())
        (gateway.etc / "password-two").touch(0o600)
        (gateway.etc / "password-two").write_text(second.password)
        conf = (gateway.etc / "scx-enroll.conf").read_text().replace("[ca]", "[ca one]")
        (gateway.etc / "scx-enroll.conf").write_text(
            conf + f"[ca two]\nserver = {second.server}\ntemplate = SCXAgent\nauth = basic\nuser = {second.user}\n"
            "server-trust = /etc/scx-enroll/web.pem\nissuer-trust = /etc/scx-enroll/two.pem\npassword-file = /etc/scx-enroll/password-two\n"
        )
        for number in range(3):
            assert gateway.submit(gateway.csr(f"aix{number}"), "two").status == 0
        assert (gateway.ca.count_post, second.count_post) == (0, 3)
        with pytest.raises(EnrollError, match="no CA called three"):
            gateway.submit(gateway.csr("aix9"), "three")


def test_a_ca_named_beside_a_request_that_waits_elsewhere_is_refused(tmp_path: Path) -> None:
    """Turning away from a pending request would get a second certificate."""
    with Gateway(tmp_path) as gateway, LabCA(tmp_path / "two", name="Second CA") as second:
        conf = (gateway.etc / "scx-enroll.conf").read_text().replace("[ca]", "[ca one]")
        (gateway.etc / "scx-enroll.conf").write_text(conf + f"[ca two]\nserver = {second.server}\ntemplate = T\nauth = basic\nuser = u\n")
        gateway.ca.switches.mode = "pending"
        csr = gateway.csr()
        assert gateway.submit(csr, "one").status == 7
        with pytest.raises(EnrollError, match="request ID 1 is waited for"):
            gateway.submit(csr, "two")
        assert second.count_get == 0
        gateway.ca.authority.approve(1)
        assert gateway.submit(csr, "one", now=True).status == 0


def test_a_request_that_was_given_up_is_named(gateway: Gateway) -> None:
    """Somebody may have to withdraw it."""
    csr = gateway.csr()
    gateway.ca.switches.mode = "pending"
    assert gateway.submit(csr).status == 7
    gateway.ca.switches.mode = "issue"
    gateway.offset_s += 31 * DAY_S
    told: List[Any] = []
    ended = gateway.submit(csr, parts={"acted": told.append})
    assert ended.status == 0
    assert "request ID 1" in next(step.reason for step in told if step.action == "abandon")
    assert [step.action for step in ended.acts] == [step.action for step in told]


def test_requests_that_wait_are_shown_by_status_and_in_the_document(gateway: Gateway) -> None:
    """They wait for somebody: an operator asks one place for all of it."""
    gateway.ca.switches.mode = "pending"
    assert gateway.submit(gateway.csr("aix7")).status == 7
    (waits,) = Store(gateway.root).waiting_errands()
    assert (waits.names, waits.id, waits.ca) == (("aix7.lab.test",), 1, gateway.ca.server)


def test_what_submit_does_is_told_beside_the_certificate(gateway: Gateway) -> None:
    """Standard output is the certificate's alone."""
    ran = gateway.command("submit", str(gateway.csr()))
    assert ran.stdout.startswith("-----BEGIN CERTIFICATE-----")
    assert "turned to" in ran.stderr


def test_hints_name_the_command_that_helps(gateway: Gateway) -> None:
    """`run` is about this host's agent."""
    csr = gateway.csr()
    gateway.ca.switches.auth = "refused"
    for words in ((), ("--adopt", "7")):
        ran = gateway.command("submit", str(csr), *words)
        assert ran.returncode == 13
        assert "scx-enroll run" not in ran.stderr
        assert "scx-enroll check --retry" in ran.stderr


def test_what_is_said_in_json(gateway: Gateway) -> None:
    """One document for a script: status, certificate and chain, or what it waits for."""
    csr = gateway.csr()
    gateway.ca.switches.mode = "pending"
    waits = json.loads(gateway.command("submit", str(csr), "--json").stdout)
    assert (waits["exit_status"], waits["certificate"], waits["request"]["id"], waits["request"]["pending"]) == (7, None, 1, True)
    gateway.ca.authority.approve(1)
    done = json.loads(gateway.command("submit", str(csr), "--json", "--now").stdout)
    assert (done["exit_status"], done["name"], done["request"]) == (0, "aix1.lab.test", None)
    assert verify.read((done["certificate"] + done["chain"]).encode())
    assert done["facts"]["names"] == ["aix1.lab.test"]


@pytest.mark.parametrize("argv", [("--now",), ("/nonexistent",), (".",)], ids=str)
def test_wrong_arguments_are_told_and_cost_nothing(gateway: Gateway, argv: Any) -> None:
    """One sentence, status 2 or 12, and nobody is asked."""
    ran = gateway.command("submit", *argv)
    assert ran.returncode in (2, 12)
    assert ran.stderr.startswith("scx-enroll: error: ")
    assert "Traceback" not in ran.stderr
    assert gateway.ca.count_get == 0


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", "99999999999", ""])
def test_a_request_id_that_is_none(gateway: Gateway, text: str) -> None:
    """Told as usage, before anything is asked."""
    for verb in (("submit", "file"), ("run",)):
        ran = gateway.command(*verb, f"--adopt={text}")
        assert ran.returncode == 2
        assert "request ID" in ran.stderr


def test_old_ones_are_forgotten_and_those_that_wait_are_not(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway runs for years: what it remembers is bounded."""
    monkeypatch.setattr(store, "KEPT_ERRANDS", 2)
    gateway.ca.switches.mode = "pending"
    waiting = gateway.csr("waiting")
    assert gateway.submit(waiting).status == 7
    gateway.ca.switches.mode = "issue"
    gateway.configure("[renewal]\ncertificates-per-day = 20\n")
    for number in range(4):
        assert gateway.submit(gateway.csr(f"aix{number}")).status == 0
    names = os.listdir(gateway.tree / "var/lib/scx-enroll/submitted")
    assert len(names) == 3
    assert request.load_csr(waiting.read_bytes(), "").digest[:16] in names
    gateway.ca.authority.approve(1)
    assert gateway.submit(waiting, now=True).status == 0


class Crash(BaseException):
    """The power fails."""


CHANGES = ("save_journal", "save_budget", "add_generation", "begin_errand")


def test_after_a_crash_at_any_change_the_next_call_goes_on(gateway: Gateway) -> None:
    """Killed before or after any change: at most one certificate more than one, never a lost ID, and the call ends well."""
    reached = []
    for point in range(1, 60):
        count = [0]

        def tick(point: int = point, count: List[int] = count) -> None:
            count[0] += 1
            if count[0] == point:
                raise Crash

        def around(call: Any, tick: Any = tick) -> Any:
            def wrapped(*arguments: Any, **named: Any) -> Any:
                tick()
                result = call(*arguments, **named)
                tick()
                return result

            return wrapped

        def crashing(root: Root, around: Any = around) -> Store:
            made = Store(root)
            for name in CHANGES:
                setattr(made, name, around(getattr(made, name)))
            return made

        csr = gateway.csr(f"host{point}")
        posts = gateway.ca.count_post
        budget = gateway.tree / "var/lib/scx-enroll/budget.json"
        if budget.exists():
            budget.unlink()
        try:
            gateway.submit(csr, parts={"store": crashing})
        except Crash:
            reached.append(point)
        for _ in range(4):
            ended = gateway.submit(csr)
            if ended.status == 0:
                break
            gateway.offset_s += COOL_DOWN_S + REPEAT_SPREAD_S
        assert ended.status == 0, point
        assert ended.generation
        assert gateway.ca.count_post - posts <= 2, point
        assert not list(gateway.tree.rglob(f"{TEMPORARY}*"))
        if not reached or reached[-1] != point:
            break
    assert len(reached) > 10


def test_what_a_killed_call_left_on_its_way_is_removed(gateway: Gateway) -> None:
    """A generation that was being written when the power failed."""
    csr = gateway.csr()
    assert gateway.submit(csr).status == 0
    (folder,) = (gateway.tree / "var/lib/scx-enroll/submitted").iterdir()
    for place in (folder, folder / "generations"):
        (place / f"{TEMPORARY}0123").mkdir()
        (place / f"{TEMPORARY}0123" / "cert.pem").touch()
    assert gateway.submit(csr).status == 0
    assert not list(gateway.tree.rglob(f"{TEMPORARY}*"))
