"""What an installation does at each of its forks, on a real tree; whether the agent serves is told it by the tests."""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Tuple

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from scx_enroll import activate, pairs, places, request, service, transaction, verify
from scx_enroll import agent as agents
from scx_enroll.activate import Site, Truce
from scx_enroll.beside import Beside
from scx_enroll.errors import AgentNotReady, HostError, NeedsPerson, RollbackFailed, RolledBack
from scx_enroll.journal import RESTARTS_PER_DAY, Budget, Installation, Origin, Place, Skip
from scx_enroll.places import certificates_of, generation_of, leaf_of
from scx_enroll.rootfs import Root
from scx_enroll.service import Served
from scx_enroll.store import KEPT_GENERATIONS, Generation, Store
from tests.lab import selfsigned
from tests.lab.agent import LabHost
from tests.scene import BRISK

EC = "ec:secp256r1"
NOW = 1_700_000_000
SSL = "/etc/opt/omi/ssl"
MARKER = f"{SSL}/.omi_cert_marker"
ROOT = os.geteuid() == 0


class Killed(BaseException):
    """The power went."""


@dataclass
class Stage:
    """A host whose agent serves what it is told to; `fails` ends each proof, `answer` is what a rollback finds served, by default the right one."""

    host: LabHost
    store: Store
    fails: Optional[BaseException] = None
    answer: Optional[Served] = None
    then: Callable[[], Any] = lambda: None
    up: bool = False
    live: bool = True
    told: List[Tuple[Any, ...]] = field(default_factory=list)

    @property
    def site(self) -> Site:
        return Site(Root(self.host.root, self.live), self.store, BRISK, lambda: NOW, str)

    @property
    def agent(self) -> agents.Agent:
        return agents.find(Root(self.host.root), port=self.host.port)

    @property
    def state(self) -> str:
        return self.store.journal.installation.state

    @property
    def leaf(self) -> str:
        return leaf_of(self.host.read(self.host.certificate))

    def prove(self, _site: Site, _agent: agents.Agent, leaf: str, *, reserve: int) -> None:
        self.told.append(("prove", leaf, reserve))
        self.then()
        if self.fails:
            raise self.fails

    def come_back(self, _site: Site, _agent: agents.Agent, leaf: str, *, stopped: bool) -> Served:
        self.told.append(("come back", leaf, stopped))
        return self.answer or Served(listening=True, leaf=leaf)

    def comes_up(self, *_: Any) -> Served:
        return Served(listening=self.up)

    def generation(self, key: Optional[bytes] = None) -> Generation:
        """A new certificate for the agent's key, or for another one, at hand."""
        loaded: Any = load_pem_private_key(key or self.host.read(self.host.key), None)
        (leaf,) = certificates_of(selfsigned.make_certificate(loaded, self.host.host, self.host.domain))
        made = generation_of(leaf, (), Origin())
        self.store.add_generation(made)
        return made

    def new_key(self) -> Tuple[Generation, str]:
        """A certificate for a new key, and that key's hash."""
        pem = request.make_key(EC)
        spki = request.spki_of(request.load_key(pem))
        self.store.save_key(spki, pem)
        return self.generation(pem), spki

    def install(self, generation: Generation, key: str = "", *, running: bool = True) -> None:
        transaction.install(self.site, self.agent, generation, running=running, inputs="i", key=key)

    def begin(self, generation: Generation, key: str = "") -> None:
        """Install until the proof, and die."""
        fails, self.fails = self.fails, Killed()
        with pytest.raises(Killed):
            self.install(generation, key)
        self.fails = fails
        self.told.clear()

    def stop_before(self, monkeypatch: pytest.MonkeyPatch, generation: Generation, key: str = "") -> None:
        """Begin to install, and die before the first file changes."""

        def die(*_: Any) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(transaction, "_turn", die)
            with pytest.raises(Killed):
                self.install(generation, key)

    def fail(self, generation: Generation, key: str = "") -> None:
        """The same, and what is installed is to go back."""
        self.begin(generation, key)
        self.store.installation("failed", why="it died")

    def proceed(self) -> None:
        transaction.proceed(self.site)

    def skip(self, generation: str, failures: int = 1, inputs: str = "i") -> Skip:
        return Skip(generation, inputs, NOW, failures, "later", 9, "m")


@pytest.fixture
def layout() -> str:
    return "omi"


@pytest.fixture
def stage(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """An agent with a pair of its own; nothing runs."""
    with LabHost(tmp_path / "host", layout, key=EC) as host:
        store = Store(Root(host.root))
        made = Stage(host, store)
        for name in ("prove", "come_back", "comes_up"):
            monkeypatch.setattr(transaction, name, getattr(made, name))
        monkeypatch.setattr(transaction, "start_again", lambda _site, _agent: made.told.append(("start again",)))
        with store.lock(0, str):
            yield made


def ours(host: LabHost) -> List[str]:
    """What of ours stands in the agent's folders."""
    return [name for name in host.snapshot() if "scx-enroll" in name]


def fits(stage: Stage) -> bool:
    """Whether what the agent would read is a pair."""
    return service.fits(Root(stage.host.root), stage.host.key, stage.host.read(stage.host.certificate))


# -- before anything is changed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sound", "spent"), [(True, 2), (True, 1), (False, 2)], ids=["a way back", "room for it", "nothing to go back to"])
def test_the_last_restart_is_kept_for_the_way_back(stage: Stage, sound: bool, spent: int) -> None:
    """With one restart left an installation waits; where nothing could be put back that would run, there is nothing to keep it for."""
    new = stage.generation()
    if not sound:
        stage.host.install(stage.host.new_pair()[0])
    stage.store.save_budget(Budget(restarts=(NOW,) * spent))
    before = stage.host.snapshot()
    if sound and spent == 2:
        with pytest.raises(Truce, match="no room for two"):
            stage.install(new)
        assert (stage.host.snapshot(), stage.state, stage.told) == (before, "settled", [])
    else:
        stage.install(new)
        assert stage.told == [("prove", leaf_of(new.certificate), int(sound))]


def test_the_last_restart_is_kept_for_a_way_back_that_leads_further(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others broke what was installed while the agent was stopped: what it served before, and does, can be put back, and needs a restart for that."""
    monkeypatch.setattr(service, "probe", lambda _port, served=stage.leaf: Served(listening=True, leaf=served))
    stage.install(stage.generation(), running=False)
    stage.host.make_file("/etc/opt/omi/ssl/x.pem", stage.host.new_pair()[0])
    stage.host.relink("x.pem")
    new = stage.generation()
    stage.store.save_budget(Budget(restarts=(NOW, NOW)))
    before = stage.host.snapshot()
    with pytest.raises(Truce, match="no room for two"):
        stage.install(new)
    assert (stage.host.snapshot(), stage.state, stage.told) == (before, "settled", [])


@pytest.mark.parametrize("why", ["it is served already", "the agent does not run"])
def test_what_needs_no_restart_waits_for_no_budget(stage: Stage, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """A link that was moved back is put right at once, whatever others made of the restarts of today; so is a stopped agent's."""
    new = stage.generation()
    stage.store.save_budget(Budget(restarts=(NOW,) * 3))
    if why == "it is served already":
        monkeypatch.setattr(service, "probe", lambda _port: Served(listening=True, leaf=leaf_of(new.certificate)))
    else:
        stage.host.remove_scxadmin()  # nor for a tool that nobody calls
    stage.install(new, running=why == "it is served already")
    assert (stage.leaf, len(stage.told)) == (leaf_of(new.certificate), int(why == "it is served already"))


@pytest.mark.parametrize("why", ["packages are changed", "the tool may be written by others"])
def test_what_can_not_be_finished_is_not_begun(stage: Stage, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """A restart could not be made, so nothing is written down, let alone changed."""
    new, before = stage.generation(), stage.host.snapshot()
    if why == "packages are changed":
        monkeypatch.setattr(agents, "packager", lambda _root: "dpkg")
    else:
        Path(stage.host.path(stage.host.scxadmin)).chmod(0o777)
    with pytest.raises(AgentNotReady, match=r"dpkg is changing packages|may be written by others"):
        stage.install(new)
    assert (stage.host.snapshot(), stage.state, stage.told) == (before, "settled", [])


def test_a_copy_that_is_whole_is_linked_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the link was moved one rename is all that is done; and the journal is written twice, since each time waits for the disk."""
    new, saved = stage.generation(), []
    monkeypatch.setattr(stage.store, "save_journal", lambda journal, real=stage.store.save_journal: saved.append(1) or real(journal))
    stage.install(new)
    assert len(saved) == 2
    before = stage.host.snapshot()
    stage.host.move_link_back()
    stage.install(new)
    assert (stage.host.snapshot(), len(saved)) == (before, 4)


@pytest.mark.parametrize("layout", ["omi-regular"])
def test_the_marker_of_the_package_goes_with_its_certificate(stage: Stage) -> None:
    """Its scripts would replace ours where it stands, and keep what was there where it doesn't."""
    before = stage.host.snapshot()
    stage.install(stage.generation())
    assert not os.path.exists(stage.host.path(MARKER))
    original = stage.store.journal.original
    assert original
    transaction.put_back(stage.site, stage.agent, original, running=False, inputs="i", hold="by me")
    assert stage.host.snapshot() == before


def test_only_what_is_in_no_record_is_saved(stage: Stage) -> None:
    """A copy of ours is known by its generation; where that is gone, the bytes are kept, or a rollback would find nothing to put back."""
    own, first, second = stage.host.read(stage.host.certificate), stage.generation(), stage.generation()
    stage.install(first)
    stage.install(second)
    assert [path.read_bytes() for path in Path(stage.host.path("/var/lib/scx-enroll/original")).iterdir()] == [own]
    shutil.rmtree(stage.host.path(f"/var/lib/scx-enroll/generations/{second.id}"))
    stage.install(first)
    before = stage.store.journal.before
    assert before
    transaction.put_back(stage.site, stage.agent, before, running=True, inputs="i", hold="by me")
    assert stage.host.read(stage.host.certificate) == second.certificate


def test_the_agents_key_vanishes_before_it_is_changed(stage: Stage) -> None:
    """A package has just removed it: nothing is written down, let alone changed."""
    new, spki = stage.new_key()
    Path(stage.host.path(stage.host.key)).unlink()
    before = stage.host.snapshot()
    with pytest.raises(AgentNotReady, match="the agent's key is gone"):
        stage.install(new, spki)
    assert (stage.host.snapshot(), stage.state) == (before, "settled")


# -- runs that were killed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["omi", "classic-omi"])
def test_the_name_of_a_copy_is_taken(stage: Stage, layout: str) -> None:
    """Somebody's bytes stand where a copy stood that a rollback leads to: another name is taken, and a run that is killed then knows it again."""
    first, second = stage.generation(), stage.generation()
    stage.install(first)
    stage.install(second)
    before, folder = stage.store.journal.before, os.path.dirname(stage.host.certificate)
    assert before
    taken = f"{folder}/scx-enroll-{first.id}-1.pem"
    stage.host.make_file(taken, b"somebody's")
    stage.fails = Killed()
    with pytest.raises(Killed):
        transaction.put_back(stage.site, stage.agent, before, running=True, inputs="i", hold="by me")
    assert (stage.host.read(taken), stage.leaf) == (b"somebody's", before.leaf)
    text = os.readlink(stage.host.path(stage.host.certificate))
    assert os.path.join(folder, text) == f"{folder}/scx-enroll-{first.id}-2.pem"
    assert (os.path.isabs(text), os.path.isabs(before.text)) == (layout != "omi",) * 2, "a migration moves a classic link"
    stage.fails = None
    stage.proceed()
    assert (stage.state, stage.store.journal.hold, stage.leaf) == ("settled", "by me", before.leaf)


def test_what_a_link_of_others_led_to_is_gone(stage: Stage) -> None:
    """The saved bytes stand at the name itself then, and a run that is killed knows them again."""
    own = stage.host.read(stage.host.certificate)
    stage.install(stage.generation())
    Path(stage.host.path(stage.host.host_pem)).unlink()
    original = stage.store.journal.original
    assert original
    stage.fails = Killed()
    with pytest.raises(Killed):
        transaction.put_back(stage.site, stage.agent, original, running=True, inputs="i", hold="by me")
    assert not os.path.islink(stage.host.path(stage.host.certificate))
    stage.fails = None
    stage.proceed()
    assert (stage.state, stage.store.journal.hold, stage.host.read(stage.host.certificate)) == ("settled", "by me", own)


def test_the_tree_of_a_killed_run_became_an_image(stage: Stage) -> None:
    """Nothing runs there: it ends as installed and not proven, to be undone where a host that is made of it finds that it must be."""
    new = stage.generation()
    stage.begin(new)
    stage.live = False
    stage.proceed()
    journal = stage.store.journal
    assert (stage.told, stage.state, stage.leaf, journal.proven, journal.untried) == ([], "settled", leaf_of(new.certificate), False, True)


def test_a_key_that_others_changed_before_the_first_step(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of ours is there yet, and the certificate would end the agent: left as it is, not rolled back."""
    stage.stop_before(monkeypatch, stage.generation())
    Path(stage.host.path(stage.host.key)).write_bytes(stage.host.new_pair()[1])
    before = stage.host.snapshot()
    with pytest.raises(AgentNotReady, match="does not fit the agent's key any more"):
        stage.proceed()
    assert (stage.host.snapshot(), stage.state, stage.told) == (before, "settled", [("start again",)])
    assert (stage.store.journal.installed, stage.store.journal.before) == (None, None)


def test_packages_are_changed_while_an_installation_is_open(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their scripts restart the agent themselves: it waits, as it is, and for no command that an earlier run left."""
    new = stage.generation()
    stage.store.update(installation=Installation(pid=4711))
    stage.begin(new)
    assert stage.store.journal.installation.pid == 0
    before = stage.host.snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(agents, "packager", lambda _root: "dpkg")
        with pytest.raises(AgentNotReady, match="dpkg is changing packages"):
            stage.proceed()
    assert (stage.host.snapshot(), stage.state, stage.told) == (before, "installing", [])
    stage.proceed()
    assert (stage.leaf, stage.state) == (leaf_of(new.certificate), "settled")


@pytest.mark.parametrize("layout", ["omi", "pegasus"])
def test_no_port_is_listed_any_more(stage: Stage, layout: str) -> None:
    """Nothing can be proved then, but an agent that we stopped is started; an old agent lists none, and none is missed."""
    new = stage.generation()
    stage.begin(new)
    if layout == "omi":
        conf = Path(stage.host.path(stage.host.conf))
        conf.chmod(0o644)
        conf.write_text(f"{conf.read_text()}\nhttpsport=0\n")
        with pytest.raises(AgentNotReady, match="httpsport lists no port"):
            stage.proceed()
        assert (stage.told, stage.state, stage.leaf) == ([("start again",)], "installing", leaf_of(new.certificate))
    else:
        stage.proceed()
        assert (stage.told, stage.state) == ([("prove", leaf_of(new.certificate), 1)], "settled")


def test_a_key_that_others_changed_after_the_commit(stage: Stage) -> None:
    """Neither certificate fits it: an agent that still serves what it has read is not restarted, and nothing is put in place."""
    stage.begin(stage.generation())
    Path(stage.host.path(stage.host.key)).write_bytes(stage.host.new_pair()[1])
    before = stage.host.snapshot()
    with pytest.raises(AgentNotReady, match="key changed while its certificate was installed"):
        stage.proceed()
    assert (stage.host.snapshot(), stage.state, stage.told, stage.store.journal.proven) == (before, "settled", [("start again",)], False)


@pytest.mark.parametrize("state", ["installing", "rolling_back"])
@pytest.mark.parametrize("what", ["pemfile", "keyfile"])
def test_another_pair_is_configured_meanwhile(stage: Stage, what: str, state: str) -> None:
    """What the agent does not read any more proves nothing: closed, nothing restarted, and a pair stays there that would run."""
    generation, spki = stage.new_key() if what == "keyfile" else (stage.generation(), "")
    (stage.begin if state == "installing" else stage.fail)(generation, spki)
    names = stage.host.certificate, stage.host.key
    conf = Path(stage.host.path(stage.host.conf))
    conf.chmod(0o644)
    conf.write_text(f"{conf.read_text()}\n{what}={SSL}/other.pem\n")
    stage.proceed()
    assert (stage.state, stage.told) == ("settled", [("start again",)])
    assert leaf_of(stage.host.read(names[0])) == leaf_of(generation.certificate)
    assert service.fits(Root(stage.host.root), names[1], stage.host.read(names[0]))
    assert not [name for name in ours(stage.host) if "pair" in name]


@pytest.mark.parametrize("committed", [False, True], ids=["before the commit", "after it"])
def test_a_new_certificate_is_lost_while_a_key_is_changed(stage: Stage, monkeypatch: pytest.MonkeyPatch, committed: bool) -> None:
    """Its record is gone, so it can't be told from somebody else's: what is there stays, as regular files."""
    new, spki = stage.new_key()
    before = stage.leaf
    if committed:
        stage.begin(new, spki)
    else:
        stage.stop_before(monkeypatch, new, spki)
    shutil.rmtree(stage.host.path(f"/var/lib/scx-enroll/generations/{new.id}"))
    stage.proceed()
    assert (stage.state, stage.leaf, fits(stage), ours(stage.host)) == ("settled", leaf_of(new.certificate) if committed else before, True, [])


@pytest.mark.parametrize("what", ["the certificate", "the new key", "the old key"])
def test_records_that_vanish_while_we_work(stage: Stage, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """What is in no record is not put in place, nor left where there would be no way back; nothing changes."""
    new, spki = (stage.generation(), "") if what == "the certificate" else stage.new_key()
    stage.stop_before(monkeypatch, new, spki)
    if what == "the certificate":
        shutil.rmtree(stage.host.path(f"/var/lib/scx-enroll/generations/{new.id}"))
    else:
        stage.store.drop_keys(frozenset({spki} if what == "the old key" else ()))
    if what == "the new key":
        old = request.spki_of(request.load_key(stage.host.read(stage.host.key)))
        stage.store.save_key(old, stage.host.read(stage.host.key), old=True)
    before = stage.host.snapshot()
    assert not transaction._turn(stage.site, stage.agent, "target")
    assert stage.host.snapshot() == before


def test_a_run_is_killed_between_the_commit_of_a_new_key_and_its_proof(stage: Stage) -> None:
    """The next one goes on with the proof: both names still go through the link, so the way back is one rename."""
    new, spki = stage.new_key()
    stage.begin(new, spki)
    texts: List[str] = []
    stage.then = lambda: texts.extend(os.readlink(stage.host.path(name)) for name in (stage.host.certificate, stage.host.key))
    stage.proceed()
    assert texts == ["scx-enroll-pair/cert.pem", "scx-enroll-pair/key.pem"]
    assert (stage.state, stage.leaf, fits(stage), stage.store.kept_keys()) == ("settled", leaf_of(new.certificate), True, set())


@pytest.mark.parametrize("lost", ["the pairs", "the pairs, and there was no certificate", "the pairs, and the record of the old key"])
def test_both_names_lead_to_nothing_while_a_key_is_changed(stage: Stage, lost: str) -> None:
    """The old pair comes back from our records, the new one where the old one was none; what is in no record can't be."""
    if "no certificate" in lost:
        Path(stage.host.path(stage.host.certificate)).unlink()
    own = stage.host.read(stage.host.key), "" if "no certificate" in lost else stage.leaf
    new, spki = stage.new_key()
    stage.begin(new, spki)
    for path in Path(stage.host.path(SSL)).glob("scx-enroll-pair-*"):
        shutil.rmtree(path)
    if "record" in lost:
        next(Path(stage.host.path("/var/lib/scx-enroll/keys")).glob("*.old.pem")).unlink()
    before = stage.host.snapshot()
    stage.proceed()
    assert (stage.state, stage.told) == ("settled", [("start again",)])
    assert stage.store.kept_keys() == {spki}, "it waits for another try"
    if "record" in lost:
        assert stage.host.snapshot() == before
    elif "no certificate" in lost:
        assert (stage.leaf, fits(stage)) == (leaf_of(new.certificate), True)
    else:
        assert (stage.host.read(stage.host.key), stage.leaf, ours(stage.host)) == (*own, [])


@pytest.mark.parametrize("when", ["before the restart", "before the proof ends", "while the key is put in place"])
def test_others_make_a_pair_while_a_key_is_changed(stage: Stage, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """It is theirs: nothing of it is replaced, no agent is restarted that still serves what it has read, and the next look starts from it."""
    certificate, key = stage.host.new_pair()

    def disturb(*_: Any) -> None:
        stage.host.make_file(stage.host.certificate, certificate)
        stage.host.make_file(stage.host.key, key, 0o400, stage.host.account)

    def after(real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (real(*arguments), disturb())[0]

    if when == "before the restart":
        monkeypatch.setattr(transaction, "_turn", after(transaction._turn))
    elif when == "before the proof ends":
        stage.then = disturb
    else:
        monkeypatch.setattr(pairs, "put_key", after(pairs.put_key))
    with pytest.raises(pairs.Disturbed):
        stage.install(*stage.new_key())
    assert (stage.host.read(stage.host.certificate), stage.host.read(stage.host.key), ours(stage.host)) == (certificate, key, [])
    assert [one[0] for one in stage.told] == ["prove"] * (when != "before the restart") + ["start again"]
    assert (stage.state, stage.store.journal.installed) == ("settled", None)


def test_others_write_through_the_link_before_the_commit(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signed by SCOM while a run goes on that was killed with both names on their link: that stays, and the agent keeps its key."""
    theirs, key, point, own = stage.generation().certificate, stage.host.read(stage.host.key), Beside.point, Beside.own
    turns: List[str] = []

    def die(self: Beside, path: str, pair: str) -> None:
        turns.append(pair)
        if len(turns) == 2:
            raise Killed
        point(self, path, pair)

    def disturb(*arguments: Any) -> bool:
        stage.host.write_through(stage.host.certificate, theirs)
        return own(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Beside, "point", die)
        with pytest.raises(Killed):
            stage.install(*stage.new_key())
    monkeypatch.setattr(Beside, "own", disturb)
    with pytest.raises(pairs.Disturbed):
        stage.proceed()
    assert (stage.host.read(stage.host.certificate), stage.host.read(stage.host.key), ours(stage.host)) == (theirs, key, [])
    assert (stage.state, stage.told) == ("settled", [("start again",)])


@pytest.mark.parametrize("layout", ["omi-regular"])
@pytest.mark.parametrize("refused", [False, True])
def test_the_file_of_before_holds_the_old_key_besides(stage: Stage, refused: bool) -> None:
    """What is saved of it is a secret that ends with the key; and what a rollback needs as long as the key stays."""
    stage.host.install(stage.host.read(stage.host.certificate) + stage.host.read(stage.host.key))
    both, before = stage.host.read(stage.host.certificate), stage.host.snapshot()
    if refused:
        stage.fails = AgentNotReady("it died")
        with pytest.raises(RolledBack):
            stage.install(*stage.new_key())
        assert stage.host.snapshot() == before
    else:
        stage.install(*stage.new_key())
    assert [path.read_bytes() for path in Path(stage.host.path("/var/lib/scx-enroll/original")).iterdir()] == [both] * refused


def test_the_record_of_a_new_certificate_vanishes_while_it_is_proved(stage: Stage) -> None:
    """It is served, so it is in service; what can't be compared any more stays as it is, for the next run to make regular."""
    new, spki = stage.new_key()
    stage.then = lambda: shutil.rmtree(stage.host.path(f"/var/lib/scx-enroll/generations/{new.id}"))
    stage.install(new, spki)
    assert (stage.state, stage.store.journal.proven, stage.leaf, fits(stage)) == ("settled", True, leaf_of(new.certificate), True)


@pytest.mark.skipif(not ROOT, reason="without root files are not given away")
def test_the_agents_account_gets_another_number_while_a_key_is_changed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reinstallation of its package, even while we write: the key is that account's, or the agent could not start."""
    new, spki = stage.new_key()
    stage.begin(new, spki)
    passwd, put_key = Path(stage.host.path("/etc/passwd")), pairs.put_key

    def put(*arguments: Any) -> None:
        put_key(*arguments)
        passwd.write_text(passwd.read_text().replace("omi:x:991:", "omi:x:992:"))

    passwd.write_text(passwd.read_text().replace(f"omi:x:{stage.host.account[0]}:", "omi:x:991:"))
    monkeypatch.setattr(pairs, "put_key", put)
    stage.proceed()
    assert (os.lstat(stage.host.path(stage.host.key)).st_uid, stage.state) == (992, "settled")


@pytest.mark.skipif(not ROOT, reason="without root files are not given away")
def test_an_old_key_of_another_owner_comes_back_as_it_was(stage: Stage) -> None:
    """An administrator's own choice is not ours to correct: the rollback gives the key to whom it belonged."""
    os.chown(stage.host.path(stage.host.key), stage.host.account[0], 0)
    before = stage.host.snapshot()
    new, spki = stage.new_key()
    stage.fail(new, spki)
    with pytest.raises(RolledBack):
        stage.proceed()
    assert (stage.host.snapshot(), stage.store.staged()) == (before, (spki,)), "the new one waits for another try"


@pytest.mark.skipif(not ROOT, reason="without root files are not given away")
def test_nobody_knows_the_agents_account(stage: Stage) -> None:
    """It is of a directory that does not answer: the new key is for whom the old one was."""
    Path(stage.host.path("/etc/passwd")).write_text("root:x:0:0:root:/root:/bin/sh\n")
    stage.install(*stage.new_key())
    found = os.lstat(stage.host.path(stage.host.key))
    assert ((found.st_uid, found.st_gid), fits(stage)) == (stage.host.account, True)


# -- the way back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("live", "running"), [(True, True), (True, False), (False, True)], ids=["runs", "was stopped", "an image"])
def test_what_was_there_is_put_back_and_proved_where_something_runs(stage: Stage, live: bool, running: bool) -> None:
    """Nothing is started that is not meant to run; what was not seen served is not called proven, and stays aside where it was."""
    first = stage.generation()
    stage.install(first)
    stage.store.update(skipped=(stage.skip(first.id),), restarting="any")
    earlier = stage.store.journal.before
    new, before = stage.generation(), stage.host.snapshot()
    stage.fail(new)
    stage.store.update(installation=replace(stage.store.journal.installation, running=running))
    stage.live = live
    with pytest.raises(RolledBack, match=f"generation {new.id} was rolled back: it died; the agent serves {stage.store.journal.installed.leaf[:16]} as before"):
        stage.proceed()
    assert stage.host.snapshot() == before
    assert stage.told == ([("come back", leaf_of(first.certificate), True)] if live and running else [])
    assert stage.store.journal.restarting == ("" if live and running else "any"), "it is down because of us until it is seen up"
    assert stage.store.journal.before == earlier, "what a rollback returns to is what was before it"
    assert (stage.state, stage.store.journal.proven) == ("settled", live and running)
    assert [skip.generation for skip in stage.store.journal.skipped] == ([] if live and running else [first.id]) + [new.id]


def test_a_run_is_killed_on_the_way_back(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is back in place already is found there, and proved."""
    before = stage.host.snapshot()
    stage.fail(stage.generation())

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(transaction, "come_back", die)
        with pytest.raises(Killed):
            stage.proceed()
    with pytest.raises(RolledBack):
        stage.proceed()
    assert stage.host.snapshot() == before


@pytest.mark.parametrize("when", ["before the restart", "on the way back"])
def test_others_put_theirs_in_place_meanwhile(stage: Stage, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """What they made can be loaded, and is theirs: it stays, and is started; the next look decides."""
    theirs = stage.generation()
    stage.host.make_file("/etc/opt/omi/ssl/theirs.pem", theirs.certificate)
    real, role = transaction._turn, "target" if when == "before the restart" else "previous"

    def turn(site: Site, agent: agents.Agent, which: str) -> bool:
        done = real(site, agent, which)
        if which == role:
            stage.host.relink("theirs.pem")
        return done

    monkeypatch.setattr(transaction, "_turn", turn)
    stage.fails = AgentNotReady("it serves another")
    stage.answer = Served(listening=True, leaf=leaf_of(theirs.certificate))
    with pytest.raises(AgentNotReady, match="others changed the agent's files"):
        stage.install(stage.generation())
    assert (stage.leaf, stage.state, stage.told[-1]) == (leaf_of(theirs.certificate), "settled", ("start again",))


def test_others_break_the_link_meanwhile(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there can't be loaded, so that the agent would be down with it: what was there before comes back."""
    real, before = transaction._turn, stage.leaf
    stage.host.make_file("/etc/opt/omi/ssl/theirs.pem", stage.host.new_pair()[0])

    def turn(site: Site, agent: agents.Agent, which: str) -> bool:
        done = real(site, agent, which)
        if which == "target":
            stage.host.relink("theirs.pem")
        return done

    monkeypatch.setattr(transaction, "_turn", turn)
    stage.fails = AgentNotReady("it died")
    with pytest.raises(RolledBack, match="it died"):
        stage.install(stage.generation())
    assert stage.leaf == before


def test_the_copy_of_before_is_gone(stage: Stage) -> None:
    """It is made anew from the record, and the certificate of before is in service again."""
    first = stage.generation()
    stage.install(first)
    before = stage.host.snapshot()
    stage.fails = AgentNotReady("it died")
    stage.then = lambda: os.unlink(stage.host.path(f"{SSL}/scx-enroll-{first.id}-1.pem"))
    with pytest.raises(RolledBack):
        stage.install(stage.generation())
    assert stage.host.snapshot() == before


@pytest.mark.parametrize("layout", ["omi-regular"])
@pytest.mark.parametrize("key", [False, True], ids=["the agent's key", "a new key"])
@pytest.mark.parametrize(
    ("answer", "said"),
    [(Served(listening=False, problem="nothing listens"), "nothing listens"), (Served(listening=True, leaf="ab" * 32), "ab" * 8)],
    ids=["nothing", "another"],
)
def test_what_was_there_is_not_served_either(stage: Stage, key: bool, answer: Served, said: str) -> None:
    """The certificate was not the cause, so the one that verifies stays: whole, without what belonged to the other, and not called proven."""
    new, spki = stage.new_key() if key else (stage.generation(), "")
    stage.fails, stage.answer = AgentNotReady("it died"), answer
    with pytest.raises(RollbackFailed, match=f"neither generation {new.id} nor what it served before: {said};"):
        stage.install(new, spki)
    assert (stage.leaf, fits(stage), stage.store.journal.proven) == (leaf_of(new.certificate), True, False)
    assert not os.path.exists(stage.host.path(MARKER))
    assert ours(stage.host) == [f"{SSL}/scx-enroll-{new.id}-1.pem"]
    assert os.lstat(stage.host.path(stage.host.key)).st_mode == stat.S_IFREG | (0o400 if key else 0o600)
    assert (stage.state, stage.store.journal.skipped, stage.store.kept_keys()) == ("settled", (), set())


@pytest.mark.parametrize("layout", ["omi-regular"])
@pytest.mark.parametrize("live", [True, False], ids=["runs", "an image"])
def test_what_was_there_would_not_run(stage: Stage, monkeypatch: pytest.MonkeyPatch, live: bool) -> None:
    """Its key is another one: nothing of it is put back, not even for a moment, and no restart is spent on it."""
    marks: List[bool] = []
    monkeypatch.setattr(Beside, "set_marker", lambda self, path, *, present, real=Beside.set_marker: marks.append(present) or real(self, path, present=present))
    stage.host.install(stage.host.new_pair()[0])
    new = stage.generation()
    stage.fail(new)
    stage.live = live
    with pytest.raises(RollbackFailed, match="that can't be put back"):
        stage.proceed()
    assert stage.told == []
    assert (stage.leaf, stage.state, marks) == (leaf_of(new.certificate), "settled", [False])


def test_the_new_certificate_would_not_run_either_by_now(stage: Stage) -> None:
    """Its record is gone, and what was there is not served: that stays in place all the same, since it fits the key."""
    new, before = stage.generation(), stage.leaf
    stage.fails, stage.answer = AgentNotReady("it died"), Served(listening=False)
    stage.then = lambda: shutil.rmtree(stage.host.path(f"/var/lib/scx-enroll/generations/{new.id}"))
    with pytest.raises(RollbackFailed):
        stage.install(new)
    assert (stage.leaf, stage.state) == (before, "settled")


@pytest.mark.parametrize("layout", ["omi-regular"])
@pytest.mark.parametrize("live", [True, False], ids=["runs", "an image"])
def test_what_was_there_is_more_than_we_read(stage: Stage, live: bool) -> None:
    """A file of many certificates, whose first one the agent took: that nothing listens is not what it served before."""
    stage.host.install(stage.host.read(stage.host.certificate) * (verify.MAX_CERTIFICATES + 1))
    assert (stage.leaf, fits(stage)) == ("", True)
    new, before = stage.generation(), stage.host.snapshot()
    stage.fail(new)
    stage.live, stage.answer = live, Served(listening=False, problem="nothing listens")
    with pytest.raises(RollbackFailed if live else RolledBack, match="nothing listens" if live else "the agent serves nothing as before"):
        stage.proceed()
    assert (stage.host.snapshot() == before, stage.leaf) == ((False, leaf_of(new.certificate)) if live else (True, ""))


def test_others_write_through_the_link_while_a_new_key_is_proved(stage: Stage) -> None:
    """Signed by SCOM at that moment, for the key of before: what they wrote goes with the new pair, and the old one is back."""
    before = stage.host.snapshot()
    stage.fails = AgentNotReady("it died")
    stage.then = lambda: stage.host.write_through(stage.host.certificate, stage.host.new_pair()[0])
    with pytest.raises(RolledBack):
        stage.install(*stage.new_key())
    assert stage.host.snapshot() == before


def test_a_key_that_others_put_in_place_of_a_link_is_rolled_back(stage: Stage) -> None:
    """It is the new one, by another way than our link: the pair is made again, and then the old one."""
    before = stage.host.snapshot()
    stage.fail(*stage.new_key())
    key = stage.host.read(stage.host.key)
    stage.host.make_file(stage.host.key, key, 0o400, stage.host.account)
    with pytest.raises(RolledBack):
        stage.proceed()
    assert stage.host.snapshot() == before


def test_the_original_is_refused(stage: Stage) -> None:
    """An operator went back to what we did not make: it is told as that, and ours is in service again."""
    new = stage.generation()
    stage.install(new)
    original, before = stage.store.journal.before, stage.host.snapshot()
    assert original
    stage.fails = AgentNotReady("it died")
    with pytest.raises(RolledBack, match=f"certificate {original.leaf[:16]} was rolled back: it died;"):
        transaction.put_back(stage.site, stage.agent, original, running=True, inputs="i", hold="by me")
    assert (stage.host.snapshot(), stage.store.journal.hold) == (before, "")
    assert [skip.generation for skip in stage.store.journal.skipped] == [original.leaf[:16]]
    stage.fails = None
    transaction.put_back(stage.site, stage.agent, original, running=True, inputs="i", hold="by me")
    assert [skip.generation for skip in stage.store.journal.skipped] == [new.id], "what is served is not put aside"


def test_what_failed_is_remembered_once_and_not_for_ever(stage: Stage) -> None:
    """Failures in a row make the pauses longer, with the same inputs; the list does not grow."""
    new = stage.generation()
    others = tuple(stage.skip(f"{number:016}") for number in range(10))
    stage.store.update(skipped=(*others, stage.skip(new.id, 2), stage.skip(new.id, 7, "others")))
    stage.fails = AgentNotReady("it died")
    with pytest.raises(RolledBack):
        stage.install(new)
    *left, last = stage.store.journal.skipped
    assert tuple(left) == others[-transaction.MAX_SKIPS :]
    assert (last.generation, last.failures, last.status, last.retry, last.at) == (new.id, 3, 9, "later", NOW)


# -- its end -------------------------------------------------------------------------------------------------------------


def test_what_an_operator_goes_back_from_is_put_aside_once(stage: Stage) -> None:
    """With what is newer; and neither what is older, nor what is in place: that would be taken away again by the next run."""
    first, second, third = stage.generation(), stage.generation(), stage.generation()
    stage.install(first)
    stage.install(third)
    older = stage.skip("0" * 16)
    stage.store.update(skipped=(older, stage.skip(third.id, 4), stage.skip(first.id)), hold_until=NOW + 1)
    before = stage.store.journal.before
    assert before
    transaction.put_back(stage.site, stage.agent, before, running=True, inputs="i", hold="by me")
    skipped = stage.store.journal.skipped
    assert [(skip.generation, skip.failures) for skip in skipped] == [(older.generation, 1), (third.id, 5), (second.id, 1)]
    assert [(skip.retry, skip.status, skip.message) for skip in skipped[1:]] == [("changed", 0, f"generation {one.id} was by me") for one in (third, second)]
    assert (stage.store.journal.hold, stage.store.journal.hold_until) == ("by me", 0)


def test_what_the_first_installation_replaced_stays_known(stage: Stage) -> None:
    """`rollback --original`, after any number of renewals."""
    own = stage.leaf
    for _ in range(2):
        stage.install(stage.generation())
    original, before = stage.store.journal.original, stage.store.journal.before
    assert original and before
    assert (original.leaf == own, before.leaf == own) == (True, False)


def test_a_hold_is_over_an_open_installation(stage: Stage) -> None:
    """A change freeze goes on when what was begun before is done."""
    stage.begin(stage.generation())
    stage.store.update(hold="freeze", hold_until=NOW + 1)
    stage.proceed()
    assert (stage.state, stage.store.journal.hold, stage.store.journal.hold_until) == ("settled", "freeze", NOW + 1)


@pytest.mark.parametrize("key", [False, True], ids=["the agent's key", "a new key"])
def test_a_stopped_agent_gets_another_certificate(stage: Stage, key: bool) -> None:
    """What it may die of later is undone then; not where the key changed, since the old one does not live on."""
    new, spki = stage.new_key() if key else (stage.generation(), "")
    stage.store.update(restarting="any", skipped=(stage.skip(new.id), stage.skip("0" * 16)))
    stage.install(new, spki, running=False)
    journal = stage.store.journal
    assert journal.skipped == (stage.skip("0" * 16),), "it is in place, so it is not put aside"
    assert (stage.told, fits(stage), stage.store.kept_keys()) == ([], True, set())
    assert (journal.proven, journal.untried, journal.restarting) == (False, not key, "any")


def test_what_nothing_has_served_is_no_way_back(stage: Stage) -> None:
    """Installed while the agent was stopped: what was there before it is what a failure, and a rollback, return to."""
    pristine, own = stage.host.snapshot(), stage.leaf
    untried, new = stage.generation(), stage.generation()
    stage.install(untried, running=False)
    stage.fails = AgentNotReady("it died")
    with pytest.raises(RolledBack):
        stage.install(new)
    assert stage.host.snapshot() == pristine
    stage.fails = None
    stage.install(untried, running=False)
    stage.install(new)
    before = stage.store.journal.before
    assert before
    assert before.leaf == own


def test_what_stands_there_counts_as_refused_where_nothing_is_served(stage: Stage) -> None:
    """Nothing stood there once, and nothing is served now: that says nothing of what stands there."""
    stage.store.update(before=Place("absent"))
    place = Place("file", leaf="ab" * 32)
    assert not places.judged(stage.store, place, "").unserved
    stage.store.update(before=replace(place, leaf="cd" * 32))
    assert places.judged(stage.store, place, "cd" * 32).unserved


def test_another_certificate_than_the_one_installed_is_proved(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """That says nothing of the one that was installed while the agent was stopped."""
    stage.install(stage.generation(), running=False)
    monkeypatch.setattr(activate, "prove", lambda *_, **__: None)
    activate.restart(stage.site, stage.agent, "ab" * 32, reserve=0)
    known = stage.store.journal
    assert (known.proven, known.untried, known.installed and known.installed.unserved) == (False, True, True)
    assert known.installed
    activate.restart(stage.site, stage.agent, known.installed.leaf, reserve=0)
    known = stage.store.journal
    assert (known.proven, known.untried, known.installed and known.installed.unserved) == (True, False, False)


def test_an_operator_goes_back_from_what_was_not_tried(stage: Stage) -> None:
    """A second rollback is the way forward."""
    new = stage.generation()
    stage.install(new, running=False)
    for leaf in (leaf_of(new.certificate), stage.store.journal.original and stage.store.journal.original.leaf):
        before = stage.store.journal.before
        assert before
        transaction.put_back(stage.site, stage.agent, before, running=False, inputs="i", hold="by me")
        assert stage.store.journal.before
        assert (stage.store.journal.before.leaf, stage.leaf) == (leaf, before.leaf)


@pytest.mark.parametrize(("running", "same", "untried"), [(True, True, False), (True, False, True), (False, True, True)])
def test_what_was_proven_need_not_be_tried_again(stage: Stage, running: bool, same: bool, untried: bool) -> None:
    """Its link was moved while the agent was stopped; another certificate, or one that nothing has served yet, is to be tried."""
    first = stage.generation()
    stage.install(first, running=running)
    stage.host.move_link_back()
    stage.install(first if same else stage.generation(), running=False)
    assert stage.store.journal.untried == untried


@pytest.mark.parametrize("served", ["what was there before", "another", "nothing"])
def test_the_restarts_of_the_day_were_in_vain(stage: Stage, monkeypatch: pytest.MonkeyPatch, served: str) -> None:
    """Whoever else answers at the port, the agent does not serve what it did: a person is needed. Not where it does."""
    leaf = {"what was there before": stage.leaf, "another": "0" * 64, "nothing": ""}[served]
    stage.fail(stage.generation())
    stage.store.save_budget(Budget(restarts=(NOW,) * RESTARTS_PER_DAY))

    def spent(*_: Any, **__: Any) -> None:
        raise Truce("spent", "wait")

    monkeypatch.setattr(transaction, "come_back", spent)
    monkeypatch.setattr(service, "probe", lambda _port: Served(listening=bool(leaf), leaf=leaf))
    with pytest.raises(AgentNotReady, match="it died; spent") as ended:
        stage.proceed()
    assert isinstance(ended.value, NeedsPerson) == (served != "what was there before")


def test_the_bytes_of_what_was_put_back_are_still_kept(stage: Stage) -> None:
    """What is in service by an operator's wish is none of ours: the next installation could not be undone to it, were others to break its name."""
    stage.install(stage.generation())
    original = stage.store.journal.before
    assert original and original.saved
    transaction.put_back(stage.site, stage.agent, original, running=True, inputs="i", hold="by me")
    stage.host.make_file("/etc/opt/omi/ssl/x.pem", stage.host.new_pair()[0])
    stage.host.relink("x.pem")
    stage.fails = AgentNotReady("it died")
    with pytest.raises(RolledBack):
        stage.install(stage.generation())
    assert stage.leaf == original.leaf


def test_the_budget_is_spent_on_the_way_back(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both causes are told, the files are as they were, and a later run proves that."""
    before = stage.host.snapshot()
    stage.fail(stage.generation())

    def spent(*_: Any, **__: Any) -> None:
        raise Truce("spent", "wait")

    with monkeypatch.context() as patch:
        patch.setattr(transaction, "come_back", spent)
        with pytest.raises(Truce, match="it died; spent") as ended:
            stage.proceed()
    assert (ended.value.hint, stage.state) == ("wait", "rolling_back")
    with pytest.raises(RolledBack):
        stage.proceed()
    assert stage.host.snapshot() == before


def test_old_certificates_do_not_pile_up(stage: Stage) -> None:
    """Each renewal leaves one more."""
    made = [stage.generation() for _ in range(KEPT_GENERATIONS + 2)]
    stage.install(made[-1])
    assert [one.id for one in stage.store.generations()] == [one.id for one in made[2:]]


@pytest.mark.parametrize("what", ["down", "up", "down, and others are at work"])
def test_the_budget_is_spent_when_a_killed_installation_is_gone_on_with(stage: Stage, what: str) -> None:
    """Our restart left the agent down: the last one is for the way back. One that runs, or that reads others' files, waits for the next run."""
    before = stage.leaf
    new = stage.generation()
    stage.begin(new)
    stage.fails, stage.up = Truce("spent"), what == "up"
    if "others" in what:
        stage.then = stage.host.move_link_back
    with pytest.raises(RolledBack if what == "down" else Truce, match="the agent is down, and the last restart" if what == "down" else "spent"):
        stage.proceed()
    assert stage.state == ("settled" if what == "down" else "installing")
    assert stage.leaf == (leaf_of(new.certificate) if what == "up" else before)


@pytest.mark.parametrize("when", ["before the commit", "after the commit", "after the end"])
def test_the_disk_fails(stage: Stage, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Before the commit nothing has happened; after it the next run goes on, with the same certificate, and proves it."""
    new, before = stage.generation(), stage.host.snapshot()
    error = HostError("Input/output error")

    def broken(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        if when == "before the commit":
            patch.setattr(Beside, "make_copy", broken)
        elif when == "after the commit":
            stage.fails = error
        else:
            patch.setattr(Store, "prune", broken)
        with pytest.raises(HostError, match="Input/output error"):
            stage.install(new)
    assert stage.state == ("installing" if when == "after the commit" else "settled")
    assert (stage.host.snapshot() == before) == (when == "before the commit")
    stage.fails = None
    if when == "after the commit":
        link = os.lstat(stage.host.path(stage.host.certificate))
        stage.proceed()
        assert os.lstat(stage.host.path(stage.host.certificate)) == link, "what is done is found done"
    if when != "before the commit":
        assert (stage.leaf, stage.state, stage.store.journal.proven) == (leaf_of(new.certificate), "settled", True)
        assert not stage.store.journal.untried
