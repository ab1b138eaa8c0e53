"""What a host is called: asked once, kept until somebody accepts another name, since SCOM goes on asking for the old one."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, Iterator, List

import pytest

from scx_enroll import enroll, naming
from scx_enroll import journal as j
from scx_enroll.config import CA, Agent, Config, Host, Renewal, Report
from scx_enroll.errors import AgentNotReady, ConfigError, UsageError
from scx_enroll.rootfs import Root
from tests.lab.agent import LabHost
from tests.lab.ca import LabCA
from tests.scene import Scene

PATTERN = "{hostname}.lab.test"
FRESH = j.Journal()


def config(name: str) -> Config:
    """One that says only that."""
    return Config(Host(name=name), (CA(server="ca01"),), Renewal(), Agent(), Report())


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """A tree of a host called lin01."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/hostname").write_text("lin01\n")
    return Root(str(tmp_path), live=True)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> List[str]:
    """What the resolver says, one answer after the other; the last one for ever. "" is an answer without a name."""
    said = ["lin01.lab.test"]
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *rest: Any, **named: Any) -> Any:
        if port is not None:  # not ours: the CA's address
            return real(host, port, *rest, **named)
        name = said.pop(0) if len(said) > 1 else said[0]
        if name == "SERVFAIL":
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, name, ("192.0.2.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return said


def rename(root: Root, name: str) -> None:
    """Give the host another name."""
    Path(root.path, "etc/hostname").write_text(f"{name}\n")


@pytest.mark.parametrize("said", [["other.lab.test"], [""], ["SERVFAIL"], ["a.lab.test", "b.lab.test"]], ids=["another", "none", "fails", "flaps"])
def test_a_resolver_that_changes_its_mind_after_the_first_success(root: Root, answers: List[str], said: List[str]) -> None:
    """It is not even asked."""
    answers[:] = said
    latched = j.Journal(latch=j.Latch("lin01", "lin01.lab.test"))
    assert naming.host_fqdn(root, config("auto"), latched, None) == "lin01.lab.test"
    assert answers == said
    assert naming.renamed(root, config("auto"), latched) == ""


def test_a_resolver_that_gives_two_answers_before_the_first_success(root: Root, answers: List[str]) -> None:
    """Neither is taken: a certificate for the wrong one is worth nothing."""
    answers[:] = ["a.lab.test", "b.lab.test", "a.lab.test"]
    with pytest.raises(AgentNotReady, match=r"a\.lab\.test and b\.lab\.test"):
        naming.host_fqdn(root, config("auto"), FRESH, None)
    assert naming.host_fqdn(root, config("auto"), FRESH, None) == "a.lab.test"


@pytest.mark.parametrize("said", ["", "lin01", "localhost.localdomain"])
def test_a_resolver_that_knows_no_full_name(root: Root, answers: List[str], said: str) -> None:
    """A short name and a placeholder are refused with what to do."""
    answers[:] = [said]
    with pytest.raises(ConfigError) as caught:
        naming.host_fqdn(root, config("auto"), FRESH, None)
    assert caught.value.hint


@pytest.mark.parametrize("rule", ["auto", PATTERN])
def test_a_name_that_changes_while_a_request_is_open(root: Root, answers: List[str], rule: str) -> None:
    """What was asked for is waited for; another rule in the configuration ends that."""
    asked = j.Journal(request=j.Request("submitted", id=7, names=("lin01.lab.test", "x"), rule=rule))
    answers[:] = ["other.lab.test"]
    rename(root, "other")
    assert naming.host_fqdn(root, config(rule), asked, None) == "lin01.lab.test"
    assert naming.host_fqdn(root, config("{hostname}.corp.test"), asked, None) == "other.corp.test"
    assert naming.host_fqdn(root, config("fixed.lab.test"), asked, None) == "fixed.lab.test"


def test_a_pattern_is_latched_and_another_pattern_is_not(root: Root) -> None:
    """Renamed, the host keeps the name; what the operator changes in the configuration counts at once."""
    latched = j.Journal(latch=j.Latch("lin01", "lin01.lab.test", PATTERN))
    rename(root, "lin02")
    assert naming.host_fqdn(root, config(PATTERN), latched, None) == "lin01.lab.test"
    assert naming.host_fqdn(root, config(PATTERN), FRESH, None) == "lin02.lab.test"
    assert naming.host_fqdn(root, config("{hostname}.corp.test"), latched, None) == "lin02.corp.test"
    assert "renamed from lin01 to lin02" in naming.renamed(root, config(PATTERN), latched)
    assert naming.renamed(root, config("fixed.lab.test"), latched) == ""
    rename(root, "localhost")
    assert naming.renamed(root, config(PATTERN), latched) == "", "not named yet"
    rename(root, "lin01.lab.test")
    assert naming.renamed(root, config(PATTERN), latched) == "", "the same, in full"


def test_a_name_that_was_told_is_not_accepted(root: Root) -> None:
    """It is changed where it stands."""
    with pytest.raises(UsageError, match=r"name = fixed\.lab\.test"):
        naming.accepted(root, config("fixed.lab.test"))
    assert naming.accepted(root, config(PATTERN)) == j.Latch("lin01", "lin01.lab.test", PATTERN)


# -- whole runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabCA]:
    """A CA that issues at once."""
    with LabCA(tmp_path_factory.mktemp("ca")) as lab:
        yield lab


@pytest.mark.parametrize("rule", [pytest.param("auto", marks=pytest.mark.slow), PATTERN])
def test_a_renamed_host_is_told_until_its_name_is_accepted(tmp_path: Path, ca: LabCA, answers: List[str], rule: str) -> None:
    """Nothing is asked for, however often it runs; then once, for the new name."""
    live = rule == "auto"  # which is only told of a host that runs here
    with LabHost(tmp_path / "host", key="ec:secp256r1") as host:
        scene = Scene(host, [ca], {"name": rule})
        answers[:] = [host.fqdn]
        if live:
            host.start()
        assert scene.run(live=live).status == 0
        issued, before = ca.authority.issued, scene.installed
        rename(scene.root(), "new1")
        answers[:] = ["new1.lab.test"]
        for row in (("L0",), ()):
            ended = scene.run(live=live)
            assert (ended.status, ended.rows) == (0, row)
            assert ended.result and ended.result.view.found
            assert any("renamed from host1 to new1" in note and "--accept-name" in note for note in ended.result.view.found.notes)
        assert (ca.authority.issued, scene.installed) == (issued, before)
        changes = [(change.cause, change.what) for change in ended.result.journal.changes]
        assert changes == [("renamed", "this host calls itself new1, and was host1")], "once"
        accept = enroll.Options(accept_name=True)
        result = enroll.run(scene.root(live=live), accept, scene.tools())
        assert [step.action for step in result.acts] == ["accept_name", "submit", "install"]
        assert result.view.ready.installed
        assert result.view.ready.installed.names == ("new1.lab.test",)
        assert ca.authority.issued == issued + 1
        assert not result.view.ready.notes or all("renamed" not in note for note in result.view.ready.notes)
        assert enroll.run(scene.root(live=live), accept, scene.tools()).acts == ()


def test_a_held_host_accepts_no_name(tmp_path: Path, ca: LabCA) -> None:
    """Nothing changes until `release`, the record of its name included."""
    with LabHost(tmp_path / "host", key="ec:secp256r1") as host:
        scene = Scene(host, [ca], {"name": PATTERN})
        scene.run(live=False)
        enroll.hold(scene.root(live=False), enroll.Options(), scene.tools(), "freeze")
        rename(scene.root(), "new1")
        before = scene.remembered()
        with pytest.raises(AgentNotReady, match="held: freeze"):
            enroll.run(scene.root(live=False), enroll.Options(accept_name=True), scene.tools())
        assert scene.remembered() == before


def test_a_host_that_was_enrolled_before_names_were_kept(tmp_path: Path, ca: LabCA) -> None:
    """The valid certificate in place says by which name it succeeded: that is latched at the next run."""
    with LabHost(tmp_path / "host", key="ec:secp256r1") as host:
        scene = Scene(host, [ca], {"name": PATTERN})
        scene.run(live=False)
        store = enroll.site_of(scene.root(live=False), scene.tools()).store
        with store.lock(0, lambda _message: None):
            store.update(latch=None)
        scene.run(live=False)
        rename(scene.root(), "new1")
        issued = ca.authority.issued
        ended = scene.run(live=False)
        assert (ended.status, ca.authority.issued) == (0, issued)
        scene.configure(name="told.lab.test")
        assert scene.run(live=False).status == 0
        assert ca.authority.issued == issued + 1, "changed by the operator"
        store.load()
        assert store.journal.latch is None
