"""Images and clones: no two hosts with one key, no state of one machine in the hands of another, and no false alarm."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from scx_enroll import enroll, idle, premises, request, sealing
from scx_enroll import journal as j
from scx_enroll.beside import BAKED_IN
from scx_enroll.errors import HostError
from scx_enroll.sealing import Seal
from scx_enroll.store import Store
from tests.lab.agent import LabHost
from tests.lab.ca import LabCA
from tests.scene import Scene

UUIDS = "564d1234-5678-9abc-def0-12345678{:04x}"
WEEK_S = 7 * 24 * 3600


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabCA]:
    """One CA for all, since each test counts what it asks for itself."""
    with LabCA(tmp_path_factory.mktemp("ca")) as lab:
        yield lab


@pytest.fixture
def scene(tmp_path: Path, ca: LabCA) -> Iterator[Scene]:
    """A virtual machine with an agent that does not run."""
    with LabHost(tmp_path / "golden", key="ec:secp256r1") as host:
        host.knobs(poll=0.02)
        made = Scene(host, [ca], {"name": "{hostname}.lab.test"})
        become(made, 0)
        yield made


def put(scene: Scene, path: str, text: str) -> None:
    """Write one of the files that say which machine it is."""
    file = Path(scene.host.root, path)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        file.chmod(0o644)
    file.write_text(text)


def become(scene: Scene, number: int, *, machine_id: bool = True, uuid: bool = True, name: bool = True) -> None:
    """Make a tree that of another machine; 0 is the first one."""
    if machine_id:
        put(scene, "etc/machine-id", f"{number:x}23456789abcdef0123456789abcdef0\n")
    if uuid:
        put(scene, "sys/class/dmi/id/product_uuid", UUIDS.format(number) + "\n")
    if name:
        put(scene, "etc/hostname", f"host{number + 1}\n")


def clone(scene: Scene, number: int, **parts: bool) -> Scene:
    """Copy a tree, as an image and its clones are made; it is another machine then."""
    root = Path(scene.host.root).parent / f"clone{number}"
    subprocess.run(["cp", "-a", scene.host.root, str(root)], check=True)  # owners, too
    other = copy.copy(scene)
    other.host, other.acted = LabHost(root, make=False), []
    become(other, number, **parts)
    return other


def spki(scene: Scene) -> str:
    """SHA-256 of the agent's public key."""
    return request.spki_of(request.load_key(scene.host.read(scene.host.key)))


def journal(scene: Scene) -> j.Journal:
    """As it stands on the disk."""
    return j.from_json(j.Journal, (scene.state / "journal.json").read_bytes(), "journal.json")


def seal(scene: Scene, *, delete_key: bool = False, live: bool = False) -> sealing.Seal:
    """Seal the host."""
    work = lambda site: sealing.seal(site, "", delete_key=delete_key)  # noqa: E731 - one line each
    return enroll.seal(scene.root(live=live), enroll.Options(), scene.tools(), work)


def unseal(scene: Scene) -> bool:
    """Undo that."""
    return enroll.seal(scene.root(live=False), enroll.Options(), scene.tools(), lambda site: sealing.unseal(site, ""))


def look(scene: Scene) -> None:
    """Let the program see whose state it is, and do no more."""
    scene.acted.clear()
    enroll.hold(scene.root(live=False), enroll.Options(), scene.tools(), "")


def listed(scene: Scene) -> List[str]:
    """The keys that no host may use."""
    path = Path(scene.host.path(scene.host.key)).with_name(BAKED_IN)
    return [line for line in path.read_text().splitlines() if not line.startswith("#")] if path.exists() else []


def everything(scene: Scene) -> Dict[str, Any]:
    """The agent's tree and the state, for comparison."""
    return {**scene.host.snapshot(), **scene.remembered()}


# -- sealed -------------------------------------------------------------------------------------------------------------


def test_a_sealed_host_does_nothing_whatever_it_is_told(scene: Scene, ca: LabCA) -> None:
    """Each verb ends with 4 and the way back, before it looks at anything; the idle run needs no program for that."""
    assert scene.run(live=False).status == 0
    sealed = seal(scene)
    assert (sealed.key, listed(scene)) == (spki(scene), [spki(scene)])
    before, posts = everything(scene), ca.count_post
    for verb, arguments in (
        (enroll.run, ()), (enroll.install, (b"x", "x.pem")), (enroll.roll_back, ()), (enroll.adopt, (7, "")), (enroll.hold, ("",)),
    ):
        ended = scene.do(verb, *arguments, live=False)
        assert (ended.status, ended.rows, "sealed" in ended.message, "seal --undo" in ended.hint) == (4, (), True, True), verb
    assert (everything(scene), ca.count_post) == (before, posts)


def test_the_timer_of_a_sealed_host_is_content(scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Status 0, said once, also when the certificate runs out; the next tick has its answer without the program."""
    from scx_enroll import cli

    monkeypatch.setattr(premises, "FRESH_NS", -(10**12))
    seal(scene)
    argv = scene.argv("run", "--unattended", live=False)[1:]
    assert cli.main(argv) == 0
    assert "this host is sealed" in capsys.readouterr().out
    assert idle.answer(argv) == 0
    assert cli.main(argv) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main(scene.argv("run", live=False)[1:]) == 4
    assert "hint: make the image" in capsys.readouterr().err
    become(scene, 1, machine_id=False, name=False)
    assert idle.answer(argv) is None


def test_status_tells_that_a_host_is_sealed(scene: Scene, capsys: Any) -> None:
    """And of a clone, before its first run, that its state is another machine's."""
    from scx_enroll import cli

    assert scene.run(live=False).status == 0
    seal(scene)
    before = everything(scene)
    assert cli.main(scene.argv("status", live=False)[1:]) == 0
    shown = capsys.readouterr().out
    assert "sealed:         as an image, 2" in shown
    assert "next:           L0 wait: this host is sealed" in shown
    assert "L6" not in shown
    become(scene, 1)
    assert cli.main(scene.argv("status", "--json", live=False)[1:]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["row"], found["action"], bool(found["sealed"])) == ("L0", "set_aside", True)
    become(scene, 0)
    assert everything(scene) == before


def test_sealing_twice_changes_nothing(scene: Scene) -> None:
    """A build script may do it again."""
    scene.run(live=False)
    seal(scene)
    first = everything(scene)
    first.pop("journal.json")
    seal(scene)
    again = everything(scene)
    again.pop("journal.json")
    assert again == first
    assert journal(scene).sealed


def test_a_seal_that_is_undone_leaves_the_host_as_it_was(scene: Scene, ca: LabCA) -> None:
    """Its key is its own, its certificate is in place, and nothing is asked for."""
    scene.run(live=False)
    issued = ca.authority.issued
    before = everything(scene)
    seal(scene)
    assert unseal(scene)
    assert not unseal(scene)
    assert everything(scene) == before
    assert (scene.run(live=False).status, ca.authority.issued) == (0, issued)


def test_keys_of_an_earlier_image_stay_listed_when_a_seal_is_undone(scene: Scene) -> None:
    """Only what this seal noted is taken back."""
    path = Path(scene.host.path(scene.host.key)).with_name(BAKED_IN)
    path.write_text("a" * 64 + "\n")
    seal(scene)
    assert listed(scene) == ["a" * 64, spki(scene)]
    unseal(scene)
    assert listed(scene) == ["a" * 64]


def test_an_image_without_agent_and_configuration_is_sealed(scene: Scene) -> None:
    """Both may come at first boot; what is there of neither must not be asked for."""
    shutil.rmtree(scene.host.path("/opt"))
    shutil.rmtree(scene.host.path("/etc/opt"))
    (scene.etc / "scx-enroll.conf").write_text("[nonsense\n")
    assert seal(scene) == sealing.Seal("", "", "", j.Request())
    assert scene.run(live=False).message.startswith("this host is sealed"), "before the configuration is read"
    (scene.etc / "scx-enroll.conf").unlink()
    assert unseal(scene)


@pytest.mark.parametrize("delete_key", [False, True])
@pytest.mark.parametrize("how", ["two agents", "no agent", "a typing error"])
def test_a_key_that_can_not_be_told_whose_it_is_is_in_no_sealed_image(scene: Scene, how: str, delete_key: bool) -> None:
    """A seal that overlooks a key says that there is none, and each clone uses it."""
    if how == "no agent":
        shutil.rmtree(scene.host.path("/opt"))
    else:
        put(scene, "opt/microsoft/scx/bin/omiserver", "")
        put(scene, "etc/opt/microsoft/scx/conf/omiserver.conf", "httpsport=1270\n")
    if how == "a typing error":
        (scene.etc / "scx-enroll.conf").write_text("[agnet]\nlayout = omi\n")
    before = everything(scene)
    reason = {"two agents": "two agents are installed", "no agent": "no agent was found", "a typing error": "agnet"}[how]
    with pytest.raises(enroll.EnrollError, match=reason) as caught:
        seal(scene, delete_key=delete_key)
    assert scene.host.key in caught.value.message
    assert everything(scene) == before


@pytest.mark.parametrize("delete_key", [False, True])
def test_an_agent_that_scom_can_not_reach_yet_is_sealed(scene: Scene, delete_key: bool) -> None:
    """An image before --enable-opsmgr has a key as any other."""
    path = Path(scene.host.path(scene.host.conf))
    path.write_text("httpsport=0\nhttpport=0\n")
    key = spki(scene)
    sealed = seal(scene, delete_key=delete_key, live=True)
    assert (sealed.key, sealed.deleted) == (("", scene.host.key) if delete_key else (key, ""))
    assert listed(scene) == ([] if delete_key else [key])
    assert Path(scene.host.path(scene.host.key)).exists() != delete_key


def test_a_folder_that_is_no_image_is_not_sealed(scene: Scene, tmp_path: Path) -> None:
    """A wrong --root would be told that all is well, and the image goes out with its key."""
    (tmp_path / "empty").mkdir()
    ended = scene.command("seal", "--root", str(tmp_path / "empty"))
    assert (ended.returncode, "is no image" in ended.stderr, os.listdir(tmp_path / "empty")) == (2, True, [])


@pytest.mark.parametrize("how", ["sealed", "key deleted", "undone", "nobody sealed"])
def test_a_hold_outlives_the_image(scene: Scene, how: str) -> None:
    """It is an operator's word, and only an operator ends it: no clone asks a CA for anything meanwhile."""
    scene.run(live=False)
    enroll.hold(scene.root(live=False), enroll.Options(), scene.tools(), "change freeze", 2_000_000_000)
    if how != "nobody sealed":
        sealed = seal(scene, delete_key=how == "key deleted")
        assert "each clone will be held: change freeze" in sealing.told(sealed, "/")
    if how == "undone":
        unseal(scene)
    other = clone(scene, 0 if how == "undone" else 1)
    ended = other.run(live=False)
    assert (ended.message, ended.rows) == ("held: change freeze", () if how == "undone" else ("L0",)), ended
    assert (journal(other).hold, journal(other).hold_until) == ("change freeze", 2_000_000_000)


def test_a_request_that_a_sealed_host_leaves_is_named(scene: Scene, ca: LabCA) -> None:
    """Somebody may have to withdraw it: no clone takes it over."""
    ca.switches.mode = "pending"
    try:
        assert scene.run(live=False).status == 7
    finally:
        ca.switches.mode = "issue"
    sealed = seal(scene)
    assert f"request ID {sealed.request.id} at {ca.server}" in sealing.told(sealed, "/")
    other = clone(scene, 1)
    other.run(live=False)
    assert journal(other).request.id != sealed.request.id


def test_a_request_for_a_key_that_is_not_this_hosts_is_not_printed(scene: Scene) -> None:
    """Neither on the sealed host nor on a clone: a certificate for it would be worth nothing."""
    scene.run(live=False)
    seal(scene)
    for number in (0, 1):
        become(scene, number)
        with pytest.raises(enroll.AgentNotReady):
            enroll.make_csr(scene.root(live=False), enroll.Options(), scene.tools())


# -- the key deleted ----------------------------------------------------------------------------------------------------


def test_a_sealed_image_without_key_holds_nothing_of_its_host(scene: Scene) -> None:
    """No key, no certificate, no name that leads nowhere, nothing in the state but the seal and the budget."""
    scene.run(live=False)
    folder = Path(scene.host.path(scene.host.key)).parent
    (folder / "omikey.pem_temp").write_text("a key that a package script put by")
    key = scene.host.read(scene.host.key)
    sealed = seal(scene, delete_key=True)
    assert sealed.deleted == scene.host.key
    assert os.listdir(folder) == []
    assert sorted(scene.remembered()) == ["budget.json", "journal.json"]
    assert not any(key in path.read_bytes() for path in Path(scene.host.root).rglob("*") if path.is_file() and not path.is_symlink())
    assert seal(scene, delete_key=True).deleted, "again, as where it was interrupted"
    assert scene.run(live=False).status == 4


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 5))
def test_a_deletion_that_is_interrupted_leaves_no_name_that_leads_nowhere(scene: Scene, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent's packages write through such a link; and the second call finishes what the first began."""
    scene.run(live=False)
    real, calls = os.unlink, [0]

    def unlink(path: Any, **named: Any) -> None:
        if isinstance(path, str) and path.endswith(".pem"):
            calls[0] += 1
            if calls[0] > step:
                raise OSError(5, "Input/output error")
        real(path, **named)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", unlink)
        try:
            seal(scene, delete_key=True)
        except HostError:
            pass
    name = Path(scene.host.path(scene.host.certificate))
    assert not name.is_symlink() or Path(scene.host.resolve(scene.host.certificate)).exists()
    assert not Path(scene.host.path(scene.host.key)).exists()
    assert scene.run(live=False).status == 4
    seal(scene, delete_key=True)
    assert os.listdir(name.parent) == []


def test_an_old_agent_is_nowhere_without_its_key(tmp_path: Path, ca: LabCA) -> None:
    """Pegasus is known by its key: deleted, every clone would say that no agent is there. Refused, and nothing is sealed."""
    with LabHost(tmp_path / "host", "pegasus", key="ec:secp256r1") as host:
        scene = Scene(host, [ca])
        before = everything(scene)
        with pytest.raises(enroll.AgentNotReady, match="known by its key") as caught:
            seal(scene, delete_key=True)
        assert caught.value.hint.startswith("seal without --delete-key")
        assert everything(scene) == before
        assert seal(scene).key == spki(scene)


def test_a_running_agent_keeps_its_key(scene: Scene) -> None:
    """It would die at its next restart; nothing is sealed, and the hint says what first."""
    scene.host.start()
    scene.run()
    before = everything(scene)
    with pytest.raises(enroll.AgentNotReady) as caught:
        seal(scene, delete_key=True, live=True)
    assert "scxadmin -stop" in caught.value.hint
    assert everything(scene) == before
    scene.host.stop()
    seal(scene, delete_key=True, live=True)
    become(scene, 1)
    ended = scene.run()
    assert ended.rows == ("L0", "L5", "L9"), ended
    assert "restart budget" in ended.message, "it is the image's, too"
    (scene.state / "budget.json").unlink()  # as an hour later
    assert scene.run().status == 0
    assert scene.is_enrolled(), "its package's key is made anew, and the agent serves a certificate for that"


def test_a_key_that_others_may_use_is_not_deleted(scene: Scene) -> None:
    """The agent's key may be a link of the operator's to a key that serves more than the agent."""
    shared = Path(scene.host.root, "etc/shared.pem")
    key = Path(scene.host.path(scene.host.key))
    key.rename(shared)
    key.symlink_to("/etc/shared.pem")
    before = everything(scene)
    with pytest.raises(enroll.AgentNotReady, match=r"leads to /etc/shared\.pem"):
        seal(scene, delete_key=True)
    assert everything(scene) == before


@pytest.mark.parametrize("name", ["omi.pem_backup", "omikey.pem_temp"])
def test_a_folder_among_what_would_be_deleted(scene: Scene, name: str) -> None:
    """A key may lie in it; what is refused must be refused before anything is gone."""
    scene.run(live=False)
    Path(scene.host.path(scene.host.key)).with_name(name).mkdir()
    before = everything(scene)
    with pytest.raises(enroll.AgentNotReady, match=rf"{name} is a folder"):
        seal(scene, delete_key=True)
    assert everything(scene) == before


def test_a_new_key_that_waits_is_not_in_the_image(scene: Scene, ca: LabCA) -> None:
    """Its request is named, since somebody must withdraw it; afterwards the host says what became of the key."""
    scene.run(live=False)
    ca.switches.mode = "pending"
    try:
        assert scene.run(live=False, renew=True, rekey=True).status == 7
        told = sealing.told(seal(scene), "/")
        assert f"request ID {journal(scene).request.id}" in told
        assert "the new key that it is for is not kept" in told
        unseal(scene)
        acts: List[Any] = []
        scene.run(live=False, parts={"acted": acts.append})
    finally:
        ca.switches.mode = "issue"
    assert next(act.reason for act in acts if act.action == "abandon").endswith("the key that it asks for is not here any more")


# -- clones -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [True, False])
def test_the_state_of_another_machine_is_set_aside_and_its_key_is_not_used(scene: Scene, sealed: bool) -> None:
    """What the clone knows of the original is: whose key it must not use, and what of the day's budget is spent."""
    scene.run(live=False)
    if sealed:
        seal(scene)
    state, budget = scene.remembered(), (scene.state / "budget.json").read_bytes()
    other = clone(scene, 1)
    ended = other.run(live=False)
    assert ended.rows[0] == "L0"
    told = journal(other).changes[0]
    assert (told.cause, told.deeds, told.waits) == ("cloned", ("its state was set aside",), "")
    aside = {name.partition("foreign/1/")[2]: data for name, data in other.remembered().items() if name.startswith("foreign/1/")}
    assert aside == {name: data for name, data in state.items() if name != "budget.json"}
    assert spki(scene) in journal(other).strangers
    assert listed(other) == [spki(scene)]
    assert (journal(other).sealed, other.state.joinpath("budget.json").read_bytes()[:20]) == (None, budget[:20])
    assert spki(scene) not in {held.id for held in ended.result.view.seen.held} if ended.result else True
    assert scene.remembered() == state


def test_a_clone_is_told_once(scene: Scene) -> None:
    """One cause, one sentence, and where the rest is; the records that it lacks are not lost, but another machine's."""
    scene.run(live=False)
    other = clone(scene, 1, name=False)
    told: List[Any] = []
    note = lambda kind: lambda what: told.append((kind, what if isinstance(what, str) else getattr(what, "what", "") or what.reason))  # noqa: E731 - one line
    other.run(live=False, parts={"noticed": note("cause"), "acted": note("act"), "noted": note("note")})
    assert [what for kind, what in told if kind == "cause"] == ["the state is another machine's: machine-id, product UUID differ"]
    assert [change.cause for change in journal(other).changes] == ["cloned"]
    assert told[1] == ("act", "what was known here is in /var/lib/scx-enroll/foreign/1 now")
    notes = [what for kind, what in told if kind == "note"]
    assert [note.partition(",")[0] for note in notes] == ["a new key was made"], "each clone has a name of its own"


def test_the_last_step_of_an_image_is_not_done_to_the_host_that_builds_it(scene: Scene) -> None:
    """It would lose its own machine-id, and be shut down."""
    sealed = seal(scene)
    assert sealing.told(sealed, "/").endswith("next: truncate -s 0 /etc/machine-id, shut the host down, make the image\n")
    assert sealing.told(sealed, "/mnt/image").endswith("next: truncate -s 0 /mnt/image/etc/machine-id, then make the image\n")


TAKEN = Seal("ab" * 32, "/ssl/.scx-enroll-baked-in", "", j.Request())


@pytest.mark.parametrize(
    ("sealed", "lines"),
    [
        (TAKEN, ["the agent's key abababababababab is in the image, and noted as such in /ssl/.scx-enroll-baked-in; a clone uses another one"]),
        (replace(TAKEN, key=""), ["no agent's key was found here"]),
        (
            replace(TAKEN, key="", deleted="/ssl/key.pem"),
            ["the agent's key /ssl/key.pem and its certificates are deleted; its own tool makes new ones at first boot"],
        ),
        (replace(TAKEN, key="", dropped=True), ["no agent's key was found here", "note: a new key that waited for its certificate is not kept"]),
        (
            replace(TAKEN, key="", request=j.Request("doubtful", "ca01"), dropped=True),
            [
                "no agent's key was found here",
                "note: a request whose ID is not known at ca01 is this host's; no clone takes it over; the new key that it is for is not kept: have it denied there",
            ],
        ),
        (
            replace(TAKEN, key="", hold="freeze"),
            [
                "no agent's key was found here",
                "note: each clone will be held: freeze; where that is not meant: scx-enroll seal --undo, scx-enroll release, and seal again",
            ],
        ),
    ],
    ids=["key", "no key", "deleted", "new key", "request", "held"],
)
def test_a_seal_does_not_tell_what_is_in_the_image(sealed: Seal, lines: List[str]) -> None:
    """Who hands an image on must know which secrets, requests and holds go with it."""
    first, *found, last = sealing.told(sealed, "/").removesuffix("\n").split("\n")
    assert found == [f"scx-enroll: {line}" for line in lines]
    assert first == "scx-enroll: sealed: runs do nothing here until another machine has this state"
    assert last.startswith("scx-enroll: next: ")


def test_a_private_key_that_was_saved_with_a_certificate_does_not_travel(scene: Scene) -> None:
    """It is another machine's secret; in foreign/ it would outlive everything."""
    scene.run(live=False)
    saved = scene.state / "original" / f"{'a' * 64}.pem"
    saved.write_bytes(Path(scene.host.path(scene.host.certificate)).read_bytes() + Path(scene.host.path(scene.host.key)).read_bytes())
    saved.chmod(0o600)
    other = clone(scene, 1)
    look(other)
    assert other.acted == ["L0"]
    assert list(other.state.glob("foreign/1/generations/*"))
    assert not [path for path in other.state.glob("foreign/**/*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
    assert saved.exists(), "the original keeps what is its own"


def test_a_gateways_clone_does_not_go_on_with_the_requests_of_the_original(scene: Scene, ca: LabCA) -> None:
    """The certificate that comes of one is fetched once, by who asked for it; and an image asks for none."""
    csr = scene.etc / "other.csr"
    csr.write_text(scene.command("csr", live=False).stdout)
    ca.switches.mode = "pending"
    try:
        assert scene.command("submit", str(csr), live=False).returncode in (2, 7)
    finally:
        ca.switches.mode = "issue"
    seal(scene)
    done = scene.command("submit", str(csr), live=False)
    assert done.returncode == 4
    assert "this host is sealed" in done.stderr or "sealed" in done.stderr


def test_one_part_differs(scene: Scene) -> None:
    """Grammar."""
    seal(scene)
    become(scene, 1, machine_id=False, uuid=False)
    ended = scene.run(live=False)
    assert journal(scene).changes[0].what == "the image was sealed on another machine: host name differs", ended


def test_a_clone_whose_name_is_written_out_is_told_so(scene: Scene) -> None:
    """It would get a certificate for the name of the original."""
    scene.configure(name="host1.lab.test")
    scene.run(live=False)
    other, notes = clone(scene, 1), []  # type: ignore[var-annotated]  # of str
    for _ in range(2):
        other.run(live=False, parts={"noted": notes.append})
    assert [note.partition(": ")[0] for note in notes if "key" not in note] == ["name = host1.lab.test is written out in [host]"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sealed", "nobody sealed", "the state is not in the image"])
def test_three_clones_end_with_three_keys_and_three_certificates(scene: Scene, ca: LabCA, how: str) -> None:
    """And with that of the original, which notices nothing, four."""
    scene.run(live=False)
    if how != "nobody sealed":
        seal(scene)
    image = clone(scene, 0)
    if how == "the state is not in the image":
        shutil.rmtree(image.state)
    original, issued, clones = everything(scene), ca.authority.issued, []
    for number in (1, 2, 3):
        one = clone(image, number)
        clones.append(one)
        for _ in range(2):
            ended = one.run(live=False)
            assert (ended.status, one.installed) == (0, one.installed), ended
        assert ended.rows == (), "the second run finds nothing to do"
        assert ended.result
        assert ended.result.view.ready.installed
        assert ended.result.view.ready.installed.names == (f"host{number + 1}.lab.test",)
    assert len({spki(one) for one in (scene, *clones)}) == 4
    assert len({one.installed for one in (scene, *clones)}) == 4
    assert ca.authority.issued == issued + 3
    assert everything(scene) == original


@pytest.mark.slow
@pytest.mark.parametrize("step", range(6, 17))
def test_a_clone_of_a_host_whose_key_was_just_being_changed(scene: Scene, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every rename of it: the clone ends with a key that is neither the old nor the new one, and with nothing of the change left."""
    scene.run(live=False)
    real, calls = os.rename, [0]

    def rename(source: Any, to: Any, **named: Any) -> None:
        if not str(to).endswith((".json", "premises")):
            calls[0] += 1
            if calls[0] > step:
                raise KeyboardInterrupt
        real(source, to, **named)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename)
        with contextlib.suppress(KeyboardInterrupt):
            scene.run(live=False, renew=True, rekey=True)
    other = clone(scene, 1)
    known = {spki(other)}
    for path in (*other.state.glob("keys/*"), *Path(other.host.path(other.host.key)).parent.glob("scx-enroll-pair*/*key*")):
        known.add(request.spki_of(request.load_key(path.read_bytes())))
    other.run(live=False)
    ended = other.run(live=False)
    assert (ended.status, ended.rows) == (0, ()), ended
    assert spki(other) not in known
    assert not Path(other.host.path(other.host.key)).is_symlink()
    assert not [name for name in os.listdir(Path(other.host.path(other.host.key)).parent) if "pair" in name or name.startswith(".scx-enroll.")]
    assert not list(other.state.rglob("keys/*"))


def test_a_key_made_after_the_last_run_is_not_used_by_a_clone_either(scene: Scene) -> None:
    """Whether it was made before or after the copy can't be told, so it is another machine's."""
    scene.run(live=False)
    first = spki(scene)
    scene.host.install(*scene.host.new_pair())
    other = clone(scene, 1)
    other.run(live=False)
    assert set(listed(other)) == {first, spki(scene)}


def test_an_open_installation_of_the_original_is_not_finished_by_a_clone(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would put the original's certificate in place, and restart for it; nothing of it is even looked at."""
    monkeypatch.setattr("scx_enroll.transaction._forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        scene.run(live=False)
    monkeypatch.undo()
    assert journal(scene).installation.state == "installing"
    other = clone(scene, 1)
    before = other.host.snapshot()
    look(other)
    assert other.acted == ["L0"]
    assert journal(other).installation == j.Installation()
    snapshot = other.host.snapshot()
    assert {name for name in {*before, *snapshot} if before.get(name) != snapshot.get(name)} <= {f"{Path(scene.host.key).parent}/{BAKED_IN}"}
    assert scene.run(live=False).rows[0] == "L1", "the original goes on"


@pytest.mark.slow
@pytest.mark.parametrize("step", range(8))
def test_setting_aside_that_is_interrupted_is_done_again(scene: Scene, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it ends, the next run knows whose key that is; nothing of the original's is lost."""
    scene.run(live=False)
    wanted = {name.rpartition("/")[2]: data for name, data in scene.remembered().items() if name != "budget.json"}
    other, calls = clone(scene, 1), [0]

    def failing(real: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] > step:
                raise KeyboardInterrupt
            return real(*arguments, **named)
        return call

    with monkeypatch.context() as patched:
        for name in ("rename", "link"):
            patched.setattr(os, name, failing(getattr(os, name)))
        with pytest.raises(KeyboardInterrupt):
            other.run(live=False)
    look(other)
    assert spki(scene) in listed(other)
    assert spki(scene) in journal(other).strangers
    found = {name.rpartition("/")[2]: data for name, data in other.remembered().items() if name.startswith("foreign/")}
    assert {name: data for name, data in found.items() if name in wanted} == wanted


def test_a_container_whose_image_holds_the_state(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """An overlay renames no folder of its lower layers (EXDEV): the state is moved file by file."""
    scene.run(live=False)
    state, other, real = scene.remembered(), clone(scene, 1), os.rename

    def rename(source: Any, to: Any, **named: Any) -> None:
        if os.path.isdir(f"/proc/self/fd/{named['src_dir_fd']}/{source}") and not source.startswith(".scx-enroll."):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, to, **named)

    monkeypatch.setattr(os, "rename", rename)
    look(other)
    aside = {name.partition("foreign/1/")[2]: data for name, data in other.remembered().items() if name.startswith("foreign/1/")}
    assert aside == {name: data for name, data in state.items() if name != "budget.json"}


def test_a_clone_whose_agent_comes_later_knows_the_key_of_the_image(scene: Scene) -> None:
    """There is no place for the list yet, but the journal has it."""
    scene.run(live=False)
    other = clone(scene, 1)
    shutil.move(other.host.path("/opt"), other.host.path("/kept"))
    assert other.run(live=False).rows == ("L0",)
    assert (listed(other), spki(scene) in journal(other).strangers) == ([], True)
    shutil.move(other.host.path("/kept"), other.host.path("/opt"))
    seen = other.run(live=False).result
    assert seen is None or seen.view.seen.foreign_key or spki(other) != spki(scene)


# -- no clones ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [
    dict(machine_id=True, uuid=False, name=False), dict(machine_id=False, uuid=True, name=False), dict(machine_id=False, uuid=False, name=True),
], ids=["regenerated machine-id", "moved virtual machine", "renamed"])
def test_one_change_is_told_once_and_nothing_else_happens(scene: Scene, ca: LabCA, parts: Dict[str, bool]) -> None:
    """Certificate, key and state stay."""
    scene.run(live=False)
    issued, before = ca.authority.issued, scene.host.snapshot()
    become(scene, 1, **parts)
    ended = scene.run(live=False)
    assert (ended.status, ended.rows) == (0, ("L0",))
    assert scene.run(live=False).rows == ()
    assert (ca.authority.issued, scene.host.snapshot()) == (issued, before)
    scene.offset_s = WEEK_S + 5
    assert scene.run(live=False).rows == ()
    assert journal(scene).identity.since == 0  # type: ignore[union-attr]  # it is there
    assert not (scene.state / "foreign").exists()


def test_a_container_is_told_apart_by_nothing_and_keeps_its_state(scene: Scene, ca: LabCA) -> None:
    """No DMI, and each start has another name: one known part that changes again and again is no alarm."""
    (Path(scene.host.root, "sys/class/dmi/id/product_uuid")).unlink()
    put(scene, "etc/machine-id", "")
    scene.run(live=False)
    issued = ca.authority.issued
    for number in (1, 2, 3):
        become(scene, number, machine_id=False, uuid=False)
        assert scene.run(live=False).status == 0
    assert ca.authority.issued == issued
    assert not (scene.state / "foreign").exists()


def test_a_state_restored_from_a_backup_is_this_hosts_own(scene: Scene, ca: LabCA, tmp_path: Path) -> None:
    """It is older than the agent's files: the valid certificate in place is adopted, and the CA is not asked."""
    scene.run(live=False)
    shutil.copytree(scene.state, tmp_path / "backup")
    assert scene.run(live=False, renew=True).status == 0
    issued, installed = ca.authority.issued, scene.installed
    shutil.rmtree(scene.state)
    shutil.copytree(tmp_path / "backup", scene.state)
    scene.state.chmod(0o700)
    ended = scene.run(live=False)
    assert (ended.status, ended.rows, ca.authority.issued, scene.installed) == (0, ("L7",), issued, installed)


def test_a_journal_of_an_earlier_version_is_this_machines(scene: Scene) -> None:
    """It has no identity yet: the first run notes it, silently."""
    scene.run(live=False)
    raw = json.loads((scene.state / "journal.json").read_text())
    for key in ("identity", "sealed", "strangers"):
        raw.pop(key)
    raw["latch"].pop("rule")
    (scene.state / "journal.json").write_text(json.dumps(raw))
    assert scene.run(live=False).rows == ()
    assert journal(scene).identity


def test_neither_machine_id_nor_uuid_stand_in_the_state(scene: Scene) -> None:
    """machine-id(5) asks for that; the state may be copied, the value may be a secret of other programs."""
    scene.run(live=False)
    for name in ("etc/machine-id", "sys/class/dmi/id/product_uuid"):
        text = Path(scene.host.root, name).read_text().strip()
        assert not any(text.encode() in data or text.replace("-", "").encode() in data for data in scene.remembered().values())


@pytest.mark.slow
def test_two_states_aside_lie_beside_each_other(scene: Scene) -> None:
    """A clone of a clone has what was set aside twice, and all the keys."""
    scene.run(live=False)
    other = clone(scene, 1)
    other.run(live=False)
    third = clone(other, 2)
    third.run(live=False)
    assert sorted(os.listdir(third.state / "foreign")) == ["1", "2"]
    assert spki(scene) in listed(third)
    assert Store(third.root(live=False)).generations is not None
