"""A new key: certificate and key change by one rename, proven, or the old pair is back; the old key does not live on."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import ssl
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from cryptography.hazmat.primitives import serialization

from scx_enroll import enroll, keys, request, service
from scx_enroll.beside import Beside
from scx_enroll.errors import HostError
from scx_enroll.journal import DAY_S
from scx_enroll.places import leaf_of
from scx_enroll.rootfs import Root
from scx_enroll.service import Patience
from scx_enroll.store import Store
from tests.lab import packagescripts, standin
from tests.lab.agent import LabHost, fingerprint
from tests.lab.ca import LabCA
from tests.scene import Scene

SSL = "/etc/opt/omi/ssl"
OTHERS_KEY = "/etc/opt/microsoft/omsagent/scom/certs/scom-key.pem"


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabCA]:
    """One CA for all, since its keys are what takes time."""
    with LabCA(tmp_path_factory.mktemp("ca")) as lab:
        yield lab


@pytest.fixture
def scene(tmp_path: Path, ca: LabCA) -> Iterator[Scene]:
    """A host with a weak key, enrolled; new keys are EC, since making RSA keys takes time."""
    ca.switches.reset()
    with LabHost(tmp_path / "host", key="rsa:2048") as host:
        host.start()
        made = Scene(host, [ca], settings={"new_key": "ec:secp256r1"})
        assert made.run().status == 0
        yield made


def spki(host: LabHost) -> str:
    """SHA-256 of the public key of the agent's key."""
    key = serialization.load_pem_private_key(host.read(host.key), password=None)
    der = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def keys_anywhere(scene: Scene) -> List[str]:
    """Every file beneath the root that holds a private key, but for the CA's and the configuration's."""
    found = []
    for folder, _, files in os.walk(scene.host.root):
        for name in files:
            path = Path(folder, name)
            if path.is_symlink() or not path.is_file():
                continue
            if b"PRIVATE KEY" in path.read_bytes() and "/lab/" not in str(path):
                found.append(str(path)[len(scene.host.root):])
    return sorted(found)


def test_a_new_key_is_made_certified_and_served(scene: Scene) -> None:
    """`run --rekey`: another key, a regular file of the agent's account; the usual single link; one restart; the old key is gone."""
    old, restarts = spki(scene.host), scene.host.restarts
    ended = scene.run(renew=True, rekey=True)
    assert (ended.status, ended.rows) == (0, ("C4", "L7")), ended
    assert scene.is_enrolled()
    assert spki(scene.host) != old
    assert scene.host.restarts == restarts + 1
    key = os.lstat(scene.host.path(scene.host.key))
    assert stat.S_ISREG(key.st_mode)
    assert stat.S_IMODE(key.st_mode) == 0o400
    assert (key.st_uid, key.st_gid) == scene.host.account
    assert keys_anywhere(scene) == [scene.host.key]
    names = [name for name in scene.host.snapshot() if "scx-enroll" in name]
    assert len(names) == 1, names
    assert os.readlink(scene.host.path(scene.host.certificate)) == names[0].rpartition("/")[2]
    assert scene.run().rows == ()


# -- killed at any step, and with others at work between any two -------------------------------------------------------

CHANGES = ("save_journal", "save_budget", "save_original", "save_key", "drop_keys", "prune")
BESIDES = ("make_copy", "swap", "set_marker", "sweep", "make_pair", "point", "own", "remove_pairs")


class Crash(BaseException):
    """The power went."""


class Points:
    """Calls `act` before each change of state and files, and each control command, which is after the one before; counts them."""

    def __init__(self, act: Callable[[int, str], None]) -> None:
        self.act = act
        self.names: List[str] = []

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with a point before it."""

        def wrapped(*arguments: Any, **named: Any) -> Any:
            self.point(f"before {name}")
            return function(*arguments, **named)

        return wrapped

    def point(self, name: str) -> None:
        """Reach a point."""
        self.names.append(name)
        self.act(len(self.names), name)

    def store(self, root: Root) -> Store:
        """Return a store whose changes are points."""
        store = Store(root)
        for owner, names in ((store, CHANGES), (store.beside, BESIDES)):
            for name in names:
                setattr(owner, name, self.around(name, getattr(owner, name)))
        return store


def crash_at(chosen: int) -> Points:
    """Return points of which one, and every later one, is a crash: a dead process does nothing more."""

    def act(number: int, name: str) -> None:
        if number >= chosen:
            raise Crash(name)

    return Points(act)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, ca: LabCA) -> Path:
    """A host whose new certificate for a new key was obtained, and is about to be installed."""
    ca.switches.reset()
    root = tmp_path_factory.mktemp("template") / "host"
    with LabHost(root, key="ec:secp256r1") as host:
        host.start()
        scene = Scene(host, [ca], settings={"new_key": "ec:secp256r1"})
        assert scene.run().status == 0

        def stop(*_: Any) -> None:
            raise Crash

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(enroll, "ACTS", {**enroll.ACTS, "install": stop})
            with pytest.raises(Crash):
                scene.run(renew=True, rekey=True)
        host.kill()
        for name in ("/lab/calls.log", "/lab/starts.log"):
            Path(host.path(name)).unlink()
    return root


def clone(template: Path, root: Path, ca: LabCA) -> Scene:
    """Return a scene on a copy of that host; its agent runs."""
    subprocess.run(["cp", "-a", str(template), str(root)], check=True)  # owners, too
    host = LabHost(root, make=False)
    host.knobs(owner=[os.getpid(), standin.start_time(os.getpid())])
    made = Scene.of(host, [ca])
    made.patience = Patience(command_s=20, listener_s=5, gone_s=0.4, poll_s=0.02)  # the stand-in is up, or dead, in less
    return made


def pair_fits(host: LabHost) -> bool:
    """Whether OpenSSL takes what the agent would read as a pair."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("ALL:@SECLEVEL=0")
    try:
        context.load_cert_chain(host.resolve(host.certificate), host.resolve(host.key))
    except (OSError, ssl.SSLError):
        return False
    return True


def assert_tidy(scene: Scene, where: str) -> None:
    """One key, a regular file of the agent's account; at most one copy; no pair folders, no link, nothing on its way."""
    host = scene.host
    assert pair_fits(host), where
    assert not os.path.islink(host.path(host.key)), where
    assert set(keys_anywhere(scene)) - {OTHERS_KEY} == {host.key}, where
    left = [name for name in host.snapshot() if "scx-enroll" in name]
    assert len(left) <= 1, f"{left} {where}"


CALLS = ("open", "os.rename", "os.remove", "os.link", "os.symlink", "os.chmod", "os.chown", "os.mkdir", "os.rmdir")
_watches: List[Callable[[str], None]] = []


def _see(event: str, arguments: Tuple[Any, ...]) -> None:
    writes = event in CALLS and (event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
    if writes and _watches:
        watch = _watches.pop()  # it opens files itself
        watch(event)
        _watches.append(watch)


sys.addaudithook(_see)  # for good: it does next to nothing while nobody watches


def test_no_system_call_of_a_new_key_leaves_half_a_pair_or_a_key_in_the_open(tmp_path: Path, ca: LabCA, template: Path) -> None:
    """Before each call that changes a file the agent could start with what is there, and each key is its owner's alone."""
    scene = clone(template, tmp_path / "host", ca)
    host, old, seen, wrong = scene.host, "", [0], []

    def watch(event: str) -> None:
        seen[0] += 1
        if not pair_fits(host):
            wrong.append(f"no pair before {event} {seen[0]}")
        stray = [name for name in keys_anywhere(scene) if os.stat(host.path(name)).st_mode & 0o077]
        wrong.extend(f"{name} is open to others before {event} {seen[0]}" for name in stray)

    with host:
        old = spki(host)
        _watches.append(watch)
        try:
            assert scene.run(live=False).status == 0
        finally:
            _watches.clear()
        assert wrong == []
        assert seen[0] > 50
        assert spki(host) != old


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a crash leaves its child unreaped
@pytest.mark.parametrize("refused", [False, True], ids=["taken", "refused"])
def test_the_power_fails_at_any_step_of_a_new_key(
    tmp_path: Path, ca: LabCA, template: Path, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent serves the old pair or the new one at any time; the next runs finish or undo it; no key is left over."""
    number = 0
    while True:
        number += 1
        scene = clone(template, tmp_path / f"host{number}", ca)
        host = scene.host
        with host:
            assert host.start(20)
            served = scene.served
            old = spki(host)
            if refused:
                host.refuse_new()
            points = crash_at(number)
            with monkeypatch.context() as patch:
                patch.setattr(service, "control", points.around("control", service.control))
                try:
                    scene.run(parts={"store": points.store})
                    crashed = False
                except Crash:
                    crashed = True
            where = f"point {number}: {points.names[-1]}"
            assert pair_fits(host), where
            for _ in range(5):
                ended = scene.run()
                if not ended.rows and ended.status in (0, 9):
                    break
                scene.offset_s += 3700
            assert ended.status == (9 if refused else 0), f"{where}: {ended}"
            if refused:
                assert (scene.served, spki(host)) == (served, old), where
                assert len(keys_anywhere(scene)) == 2, where  # the new one waits for another try
            else:
                assert scene.is_enrolled(), where
                assert scene.served != served, where
                assert spki(host) != old, where
                assert_tidy(scene, where)
        shutil.rmtree(host.root)
        if not crashed:
            break
    assert number > 20


REST: Tuple[str, ...] = ("omi removal", "purge", "scx removal", "scx install, no new pair", "omsagent, linked")  # what these leave need not be a pair


def script_at(chosen: int, host: LabHost, script: str) -> Points:
    """Return points of which one runs a package script."""

    def act(number: int, _name: str) -> None:
        if number == chosen:
            packagescripts.SCRIPTS[script](host)

    return Points(act)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("script", packagescripts.SCRIPTS)
def test_a_package_script_runs_between_any_two_steps_of_a_new_key(tmp_path: Path, ca: LabCA, template: Path, script: str) -> None:
    """What is there afterwards is a pair, ours or the script's; nothing of ours is in the way; the name dangles only where the script did it."""
    number = 0
    while True:
        number += 1
        scene = clone(template, tmp_path / f"host{number}", ca)
        host = scene.host
        points = script_at(number, host, script)
        with host:
            scene.run(live=False, parts={"store": points.store})
            where = f"{script} at point {number} of {len(points.names)}"
            for _ in range(3):
                ended = scene.run(live=False, hasty=True)
                if not ended.rows:
                    break
            if script not in REST:
                assert ended.status == 0, f"{where}: {ended}"
                assert_tidy(scene, where)
                assert not os.path.exists(host.path(f"{SSL}/.omi_cert_marker")), where
            assert not any("scx-enroll-pair" in name for name in host.snapshot()), where
        shutil.rmtree(host.root)
        if number >= len(points.names):
            break
    assert number > 10 or script in REST


PAIRS = tuple(name for name in packagescripts.SCRIPTS if name not in REST)
SPREAD = 19  # about as many points as a live change of the key has


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("refused", [False, True], ids=["taken", "refused"])
def test_a_package_script_runs_while_the_agent_gets_its_new_key(
    tmp_path: Path, ca: LabCA, template: Path, refused: bool
) -> None:
    """With restarts and proofs, and an agent that may die of the new pair: it ends enrolled, with one key, and nothing in the way."""
    for number, script in enumerate(PAIRS):
        ca.switches.reset()
        scene = clone(template, tmp_path / f"host{number}", ca)
        host, point = scene.host, 1 + (7 * number + 3 * refused) % SPREAD
        with host:
            assert host.start(20)
            if refused:
                host.refuse_new()
            points = script_at(point, host, script)
            first = scene.run(parts={"store": points.store})
            where = f"{script} at point {point} of {len(points.names)}"
            if not refused:
                assert first.status != 10, f"{where}: {first}"
                assert scene.served or script == "purge and install", where
            host.accept_all()
            for _ in range(6):
                if script == "purge and install" and not scene.served:
                    host.start(20)  # it ends the agent, and these scripts start none
                scene.offset_s += 4 * 3600
                ca.switches.date_offset = scene.offset_s
                ended = scene.run(now=True)
                if not ended.rows and ended.status == 0 and scene.served:
                    break
            assert ended.status == 0, f"{where}: {ended}"
            assert scene.is_enrolled(), where
            assert_tidy(scene, where)
            assert not any("scx-enroll-pair" in name for name in host.snapshot()), where
        shutil.rmtree(host.root)
    ca.switches.reset()


def refuse_ours(scene: Scene) -> None:
    """Make the agent die of the certificate that is about to be installed, and of no other."""
    leaves = {leaf_of(one.certificate) for one in Store(Root(scene.host.root)).generations()}
    scene.host.knobs(refuse=sorted(leaves - {fingerprint(scene.host.leaf())}))


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("script", ["scxsslconfig -f", "bundle upgrade"])
@pytest.mark.parametrize("when", ["before own", "before point"])
def test_a_package_script_makes_a_pair_while_the_old_one_is_put_back(
    tmp_path: Path, ca: LabCA, template: Path, script: str, when: str
) -> None:
    """Our restart left the agent down, so it is started at once with what the script made, not an hour later by the next run."""
    ca.switches.reset()
    scene = clone(template, tmp_path / "host", ca)
    host, seen = scene.host, []

    def act(_number: int, name: str) -> None:
        if b'"state": "rolling_back"' in (scene.state / "journal.json").read_bytes():
            seen.append(name)
            if name == when and seen.count(when) == 1:
                packagescripts.SCRIPTS[script](host)

    with host:
        assert host.start(20)
        old = scene.served
        refuse_ours(scene)
        ended = scene.run(parts={"store": Points(act).store})
        assert when in seen
        assert ended.status == 4, ended
        assert ended.message == "others changed the agent's files while a certificate was put in place"
        assert scene.served not in ("", old), "the pair that the script made"
        assert scene.served == fingerprint(host.leaf())
        assert pair_fits(host)
        assert not any("scx-enroll-pair" in name for name in host.snapshot())


def test_somebody_puts_a_key_over_our_link_in_the_moment_of_the_commit(tmp_path: Path, ca: LabCA, template: Path) -> None:
    """Their certificate went through our link, their key over it: the link turns back, or the agent would have one of each."""
    scene = clone(template, tmp_path / "host", ca)
    host, turns = scene.host, []

    def act(_number: int, name: str) -> None:
        if name == "before point":
            turns.append(name)
            if len(turns) == 2:
                packagescripts.SCRIPTS["scxsslconfig -f"](host)

    with host:
        old = spki(host)
        ended = scene.run(live=False, parts={"store": Points(act).store})
        assert ended.status == 4, ended
        assert len(turns) == 3, "made, turned, turned back"
        assert pair_fits(host)
        assert spki(host) != old
        assert not any("scx-enroll-pair" in name for name in host.snapshot())


# -- what asks for a new key ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_new_key_with_each_certificate(tmp_path: Path, ca: LabCA) -> None:
    """`key = new`: the first certificate and each renewal are for a key made here; RSA 3072 where nothing else is said."""
    ca.switches.reset()
    with LabHost(tmp_path / "host", key="rsa:2048") as host:
        host.start()
        scene, package = Scene(host, [ca], settings={"key": "new"}), spki(host)
        ended = scene.run()
        assert (ended.status, ended.rows) == (0, ("C4", "L7")), ended
        first = spki(host)
        assert first != package
        assert ended.result is not None
        assert ended.result.view.ready.installed is not None
        assert ended.result.view.ready.installed.key == "rsa:3072"
        assert not any("throw it away" in note for note in ended.result.view.ready.notes)
        scene.configure(new_key="ec:secp384r1")
        assert scene.run().rows == (), "a configuration that changed is for the next key"
        assert scene.run(renew=True).status == 0
        assert spki(host) not in (package, first)
        assert keys_anywhere(scene) == [host.key]
        assert keys_anywhere(scene) == [host.key]
        assert scene.is_enrolled()


@pytest.mark.parametrize("settings", [{}, {"key": "new", "new_key": "ec:secp256r1"}], ids=["the agent's key", "new keys"])
def test_no_key_is_made_while_the_ca_can_give_no_more_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Dict[str, str]) -> None:
    """A CA near its end is asked again and again for days: each time a key would be made, told of, and thrown away."""
    made: List[str] = []
    monkeypatch.setattr(keys, "make_key", lambda kind: made.append(kind) or request.make_key(kind))
    with LabCA(tmp_path / "ca", ca_lifetime=10 * DAY_S) as ca, LabHost(tmp_path / "host", key="ec:secp256r1") as host:
        scene = Scene(host, [ca], settings=settings)
        assert scene.run(live=False).status == 0
        first, key = scene.installed, spki(host)
        for day in (7, 8, 9):
            scene.offset_s = day * DAY_S
            ca.switches.date_offset = scene.offset_s
            ended = scene.run(live=False)
            assert (ended.status, ended.rows[-1:]) == (6, ("C4",)), ended
            assert "would last no longer" in ended.message
            assert (scene.installed, spki(host), keys_anywhere(scene)) == (first, key, [host.key])
        assert (scene.posts, len(made)) == (1, len(settings) // 2)
        assert scene.run(live=False, renew=True).status == 0, "somebody wants it all the same"
        assert (scene.posts, len(made)) == (2, len(settings))
        assert (scene.installed != first, spki(host) != key, keys_anywhere(scene)) == (True, bool(settings), [host.key])


def test_the_agents_own_key_stays_where_nobody_asked(scene: Scene) -> None:
    """A weak key is a warning, with the command; never a new key by itself."""
    old = spki(scene.host)
    ended = scene.run(renew=True)
    assert ended.status == 0
    assert spki(scene.host) == old
    assert ended.result is not None
    assert any("rsa:2048" in note and "scx-enroll run --rekey" in note for note in ended.result.view.ready.notes)


def test_a_key_that_the_configuration_forbids(scene: Scene) -> None:
    """`minimum-key` refuses the agent's key before anything is asked for, and names the command that mends it."""
    scene.configure(minimum_key="rsa:3072")
    posts, before = scene.posts, scene.host.snapshot()
    ended = scene.run()
    assert (ended.status, ended.hint) == (4, "make a stronger one: scx-enroll run --rekey")
    assert (scene.posts, scene.host.snapshot()) == (posts, before)
    assert scene.run(renew=True, rekey=True).status == 0
    assert scene.is_enrolled()
    assert scene.run().rows == ()


def test_a_revoked_certificate_takes_its_key_with_it(scene: Scene) -> None:
    """Revoked: a new key and one request. Revoked again: a person means it."""
    first = spki(scene.host)
    for expected in (True, False):
        held = scene.run().result
        assert held is not None
        newest = max(held.view.seen.held, key=lambda one: one.number)
        scene.cas[0].authority.revoke(newest.request_id)
        scene.offset_s += 11 * 24 * 3600
        scene.cas[0].switches.date_offset = scene.offset_s
        before, issued = spki(scene.host), scene.issued
        ended = scene.run()
        assert (spki(scene.host) != before, scene.issued - issued) == (expected, int(expected)), ended
    assert ended.status == 6
    assert spki(scene.host) != first


def test_a_revoked_certificate_leaves_its_key_to_an_older_one(scene: Scene) -> None:
    """A renewal comes long before the former one ends: that is for the same key, which may be what was lost."""
    scene.offset_s += 3700
    scene.cas[0].switches.date_offset = scene.offset_s
    held = scene.run(renew=True).result
    assert held is not None
    assert len(held.view.seen.held) == 2
    before, issued = spki(scene.host), scene.issued
    scene.cas[0].authority.revoke(max(held.view.seen.held, key=lambda one: one.number).request_id)
    scene.offset_s += 11 * 24 * 3600
    scene.cas[0].switches.date_offset = scene.offset_s
    ended = scene.run()
    assert (ended.status, scene.issued - issued) == (0, 1), ended
    assert spki(scene.host) != before


@pytest.mark.parametrize("known", [True, False], ids=["pending", "doubtful"])
def test_a_new_key_is_asked_for_while_a_request_for_the_present_one_is_open(scene: Scene, known: bool) -> None:
    """Who fears for a key must not believe that it is being replaced, when the next certificate is for the same one."""
    if known:
        scene.cas[0].switches.mode = "pending"
    else:
        scene.cas[0].switches.lost, scene.cas[0].switches.lost_times = "before", 1
    scene.run(renew=True)
    before, posts = scene.remembered(), scene.posts
    ended = scene.run(renew=True, rekey=True)
    assert (ended.status, ended.rows) == (4, ())
    assert "no new key was made" in ended.message
    assert "scx-enroll run --rekey" in ended.hint
    assert ("--adopt ID" in ended.hint) != known
    assert scene.posts == posts
    assert {name for name in scene.remembered() if name.startswith("keys/")} == {name for name in before if name.startswith("keys/")} == set()


def test_a_new_key_that_waits_for_the_window_is_overtaken(scene: Scene) -> None:
    """The certificate that was asked for last counts; a private key that nothing leads to any more does not stay."""
    later = time.localtime(scene.tools().clock() + 6 * 3600)
    scene.configure(restart_window=f"{later.tm_hour:02}:00-{later.tm_hour:02}:30")
    assert scene.run(renew=True, rekey=True).status == 4
    assert len(list((scene.state / "keys").iterdir())) == 1
    scene.offset_s += 3700
    scene.cas[0].switches.date_offset = scene.offset_s
    scene.run(renew=True)
    scene.configure(restart_window="")
    for _ in range(2):
        scene.offset_s += 3700
        scene.cas[0].switches.date_offset = scene.offset_s
        ended = scene.run()
    assert ended.status == 0, ended
    assert list((scene.state / "keys").iterdir()) == []


def test_two_new_keys_wait_at_once(scene: Scene) -> None:
    """The certificate of the one would be taken for nobody's, and the other kept: one key waits at a time, the one asked for last."""
    scene.cas[0].switches.unavailable = "post"
    for kind in ("ec:secp256r1", "ec:secp384r1", "ec:secp256r1", "ec:secp384r1"):
        scene.configure(new_key=kind)
        scene.offset_s += 3700
        scene.cas[0].switches.date_offset = scene.offset_s
        scene.run(renew=True, rekey=True)
        assert len(list((scene.state / "keys").iterdir())) <= 1, kind


def test_a_new_key_waits_for_its_certificate(scene: Scene) -> None:
    """Pending for days: the key stands in the state directory, for root alone, and the agent serves the old pair meanwhile."""
    old, served = spki(scene.host), scene.served
    scene.cas[0].switches.mode = "pending"
    asked = scene.run(renew=True, rekey=True)
    assert asked.status == 7
    waiting = list((scene.state / "keys").iterdir())
    assert [stat.S_IMODE(path.stat().st_mode) for path in waiting] == [0o600]
    assert stat.S_IMODE((scene.state / "keys").stat().st_mode) == 0o700
    scene.offset_s += 4 * 3600
    scene.cas[0].switches.date_offset = scene.offset_s
    assert scene.run().status == 7
    assert (spki(scene.host), scene.served) == (old, served)
    scene.cas[0].switches.mode = "issue"
    assert asked.result is not None
    scene.cas[0].authority.approve(asked.result.journal.request.id or 0)
    ended = scene.run(now=True)
    assert (ended.status, ended.rows) == (0, ("C1", "L7"))
    assert spki(scene.host) != old
    assert scene.is_enrolled()
    assert keys_anywhere(scene) == [scene.host.key]


@pytest.mark.parametrize("fault", ["down", "denied"])
def test_no_certificate_comes_and_no_key_is_left_over(scene: Scene, fault: str) -> None:
    """A key that nothing waits with is removed; the agent's stays."""
    before, served = scene.host.snapshot(), scene.served
    if fault == "down":
        scene.cas[0].switches.unavailable = "all"
    else:
        scene.cas[0].switches.mode = "deny"
    assert scene.run(renew=True, rekey=True).status in (5, 6)
    assert keys_anywhere(scene) == [scene.host.key]
    assert (scene.host.snapshot(), scene.served) == (before, served)


def test_a_key_that_waits_is_damaged(scene: Scene) -> None:
    """The request for it is given up, named, and the agent's own pair stays in service."""
    scene.cas[0].switches.mode = "pending"
    assert scene.run(renew=True, rekey=True).status == 7
    path = next((scene.state / "keys").iterdir())
    path.write_bytes(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    ended = scene.run()
    assert (ended.status, ended.rows) == (0, ("C1",)), ended
    assert not path.exists()
    assert scene.is_enrolled()


# -- the shapes of the old pair ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["as delivered", "a link of the administrator's"])
def test_the_new_pair_is_refused_and_the_old_one_is_back(scene: Scene, shape: str) -> None:
    """Rolled back and proven: every name, byte, owner and mode as before; the new key waits for another try."""
    host = scene.host
    if shape != "as delivered":
        os.rename(host.path(host.key), host.path(f"{SSL}/mine.pem"))
        os.symlink("mine.pem", host.path(host.key))
        assert host.restart()
    host.refuse_new()
    before, served = host.snapshot(), scene.served
    ended = scene.run(renew=True, rekey=True)
    assert ended.status == 9, ended
    assert (host.snapshot(), scene.served) == (before, served)
    host.accept_all()
    scene.offset_s += 3700
    scene.cas[0].switches.date_offset = scene.offset_s
    assert scene.run(now=True).status == 0
    assert scene.served != served
    assert not os.path.islink(host.path(host.key))


def test_a_stopped_agent_gets_its_new_pair_and_stays_stopped(scene: Scene) -> None:
    """Stopped on purpose: installed, unproven, not started."""
    scene.host.stop()
    old = spki(scene.host)
    assert scene.run(renew=True, rekey=True).status == 0
    assert spki(scene.host) != old
    assert scene.host.pid == 0
    assert scene.host.start()
    assert scene.is_enrolled()


@pytest.mark.slow
def test_key_and_certificate_stand_in_different_folders(tmp_path: Path, ca: LabCA) -> None:
    """`pemfile` and `keyfile` lead elsewhere: the key's name leads through the same link for the length of the change."""
    ca.switches.reset()
    with LabHost(tmp_path / "host", "omi-apart", key="ec:secp256r1") as host:
        host.start()
        scene = Scene(host, [ca], settings={"new_key": "ec:secp256r1"})
        assert scene.run().status == 0
        old = spki(host)
        assert os.path.dirname(host.key) != os.path.dirname(host.certificate)
        host.refuse_new()
        served = scene.served
        assert scene.run(renew=True, rekey=True).status == 9
        assert (scene.served, spki(host)) == (served, old)
        host.accept_all()
        scene.offset_s += 3700
        scene.cas[0].switches.date_offset = scene.offset_s
        assert scene.run(now=True).status == 0
        assert scene.is_enrolled()
        assert spki(host) != old
        assert keys_anywhere(scene) == [f"{SSL}/omikey.pem", host.key], "the package's own, which nobody reads, stays"


def test_the_journal_is_lost_in_the_middle(tmp_path: Path, ca: LabCA, template: Path) -> None:
    """Both names lead through our link and nobody knows why: it ends as it should have, with regular files."""
    scene = clone(template, tmp_path / "host", ca)
    host = scene.host
    with host:
        host.start()
        points = crash_at(10**6)

        def act(_number: int, name: str) -> None:
            if name == "before point" and os.path.islink(host.path(host.key)):
                raise Crash

        points.act = act
        with pytest.raises(Crash):
            scene.run(parts={"store": points.store})
        (scene.state / "journal.json").unlink()
        assert scene.run().status == 0
        assert_tidy(scene, "afterwards")
        assert scene.is_enrolled()


def test_the_disk_is_full(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pair can be made: nothing has changed, and the next run goes on."""
    before, served = scene.host.snapshot(), scene.served

    def full(*_: Any) -> str:
        raise HostError("can't write it: No space left on device", "free some space")

    with monkeypatch.context() as patch:
        patch.setattr(Beside, "make_pair", full)
        assert scene.run(renew=True, rekey=True).status == 12
    assert (scene.host.snapshot(), scene.served) == (before, served)
    assert scene.run().status == 0
    assert scene.served != served


# -- the key stands in the certificate's file ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["one file in the conf", "the key's name is a link to it"])
def test_certificate_and_key_are_one_file(tmp_path: Path, ca: LabCA, how: str) -> None:
    """Any change of the name would take the agent's key away: refused before the CA is asked; with the two files of the hint it goes on."""
    ca.switches.reset()
    with LabHost(tmp_path / "host", "omi-regular", key="ec:secp256r1") as host:
        pem, key = Path(host.path(host.certificate)), Path(host.path(host.key))
        both = pem.read_bytes() + key.read_bytes()
        for path in (pem, key):
            path.unlink()
        pem.write_bytes(both)
        pem.chmod(0o400)
        os.chown(pem, *host.account)
        conf = Path(host.path(host.conf))
        conf.chmod(0o644)
        plain = conf.read_text()
        if how == "one file in the conf":
            conf.write_text(f"{plain}\npemfile={host.certificate}\nkeyfile={host.certificate}\n")
        else:
            key.symlink_to("omi.pem")
        assert host.start()
        scene = Scene(host, [ca], settings={"new_key": "ec:secp256r1"})
        before, served, asked = host.snapshot(), scene.served, scene.posts
        for wish in ({}, {"renew": True, "rekey": True}):
            ended = scene.run(**wish)
            assert (ended.status, ended.rows) == (4, ()), ended
            assert ended.message.startswith(f"the agent reads its key through the name of its certificate, {host.certificate}")
        assert scene.command("run", "--unattended").returncode == 4, "no time mends it"
        assert (host.snapshot(), scene.served, scene.posts) == (before, served, asked)
        command = ended.hint.partition(": ")[2].partition(", then ")[0].replace(" /", f" {host.root}/")
        subprocess.run(command.split(), check=True)
        if how == "one file in the conf":
            conf.write_text(f"{plain}\npemfile={host.certificate}\nkeyfile={SSL}/omi-key.pem\n")
        assert scene.run().status == 0
        assert scene.is_enrolled()
        old = scene.served
        assert scene.run(renew=True, rekey=True).status == 0
        assert scene.served != old


def test_the_certificates_file_holds_a_key_besides(tmp_path: Path, ca: LabCA) -> None:
    """What is saved of it is needed for the way back, as it was; once the agent has another key, that secret does not live on."""
    ca.switches.reset()
    with LabHost(tmp_path / "host", "omi-regular", key="ec:secp256r1") as host:
        pem = Path(host.path(host.certificate))
        both = pem.read_bytes() + host.read(host.key)
        pem.write_bytes(both)
        assert host.start()
        scene = Scene(host, [ca], settings={"new_key": "ec:secp256r1"})
        assert scene.run().status == 0
        assert [path.read_bytes() for path in (scene.state / "original").iterdir()] == [both]
        assert scene.run(renew=True, rekey=True).status == 0
        assert keys_anywhere(scene) == [host.key]
        before = host.snapshot()
        ended = scene.do(functools.partial(enroll.roll_back, original=True))
        assert (ended.status, host.snapshot()) == (4, before), ended
        assert scene.run().status == 0


# -- nothing is asked for that could not be put in service -----------------------------------------------------------------


def test_a_new_key_that_the_configuration_forbids(scene: Scene) -> None:
    """`new-key` weaker than `minimum-key`: its certificate would be refused, so it is not asked for; every hint leads out."""
    scene.configure(minimum_key="ec:secp384r1")
    before, posts = scene.host.snapshot(), scene.posts
    ended = scene.run(renew=True)
    assert (ended.status, ended.hint) == (4, "set new-key = ec:secp384r1 in [agent], then: scx-enroll run --rekey")
    ended = scene.run(renew=True, rekey=True)
    assert (ended.status, ended.hint) == (3, "set new-key = ec:secp384r1 in [agent]")
    assert ended.message == "new-key ec:secp256r1 is weaker than minimum-key ec:secp384r1; nothing was asked for"
    assert (scene.host.snapshot(), scene.posts, keys_anywhere(scene)) == (before, posts, [scene.host.key])
    scene.configure(new_key="ec:secp384r1")
    assert scene.run(renew=True, rekey=True).status == 0
    assert scene.run().status == 0


@pytest.mark.parametrize("what", ["a folder", "a file", "the key's folder"])
def test_something_is_in_the_way_of_a_new_key(scene: Scene, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is seen before a certificate is issued, and named."""
    name = f"{SSL}/scx-enroll-pair"
    expected = f"{name} is in the way of a new key, and not ours"
    if what == "a folder":
        os.mkdir(scene.host.path(name))
    elif what == "a file":
        Path(scene.host.path(name)).touch()
    else:
        real, expected = Beside.check_folder, f"can't write {scene.host.key}: Read-only file system"

        def check(self: Beside, path: str) -> None:
            if path == scene.host.key:
                raise HostError(expected)
            real(self, path)

        monkeypatch.setattr(Beside, "check_folder", check)
    before, posts = scene.host.snapshot(), scene.posts
    ended = scene.run(renew=True, rekey=True)
    assert (ended.status, ended.message) == (12, expected)
    assert ended.hint == (f"see whose it is, and move it away: mv {name} /root/" if name in expected else "")
    assert (scene.host.snapshot(), scene.posts, keys_anywhere(scene)) == (before, posts, [scene.host.key])


def test_a_key_is_made_and_the_ca_can_not_even_be_asked(scene: Scene) -> None:
    """No password: the key that was made for the request does not stay."""
    scene.configure(key="new")
    (scene.etc / "password0").unlink()
    assert scene.run(renew=True).status == 3
    assert keys_anywhere(scene) == [scene.host.key]


# -- what others and killed runs leave ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["omi", "omi-apart"])
def test_pairs_of_a_run_that_nobody_remembers(tmp_path: Path, ca: LabCA, layout: str) -> None:
    """Killed, and its journal lost, or copied to another machine: link, folders and what was on its way hold secrets, and go."""
    ca.switches.reset()
    with LabHost(tmp_path / "host", layout, key="ec:secp256r1") as host:
        host.start()
        scene = Scene(host, [ca])
        assert scene.run().status == 0
        before, keys = host.snapshot(), keys_anywhere(scene)
        for folder in dict.fromkeys(map(os.path.dirname, (host.path(host.key), host.path(host.certificate)))):
            Path(folder, ".scx-enroll.0123456789abcdef").write_bytes(host.read(host.key))
        pair = Path(folder, "scx-enroll-pair-3")
        pair.mkdir()
        (pair / "key.pem").write_bytes(host.read(host.key))
        Path(folder, "scx-enroll-pair").symlink_to("scx-enroll-pair-1")
        assert scene.run().status == 0
        assert keys_anywhere(scene) == keys
        assert host.snapshot() == before


@pytest.mark.parametrize("why", ["held", "not quiet"])
def test_nothing_is_cleared_up_while_others_are_at_work(scene: Scene, why: str) -> None:
    """Under `hold`, and while somebody changes the agent's files, not even leftovers are touched; afterwards they are."""
    marker = Path(scene.host.path(f"{SSL}/.omi_cert_marker"))
    marker.touch()
    Path(scene.host.path(f"{SSL}/.scx-enroll.0123456789abcdef")).touch()
    if why == "held":
        enroll.hold(scene.root(), enroll.Options(), scene.tools(), "by me")
    else:
        scene.configure(settle="30m")
        os.chmod(scene.host.path(scene.host.key), 0o600)
        os.chmod(scene.host.path(scene.host.key), 0o400)
    before = scene.host.snapshot()
    assert scene.run().status == (0 if why == "held" else 4)
    assert scene.host.snapshot() == before
    enroll.hold(scene.root(), enroll.Options(), scene.tools(), "")
    assert scene.run(hasty=True).status == 0
    assert not marker.exists()


def test_a_folder_of_our_name_that_is_too_deep_to_be_ours(scene: Scene) -> None:
    """The agent's account may make one: the new pair is served and settled all the same, and the folder is named."""
    deep = scene.host.path(f"{SSL}/scx-enroll-pair-1") + "/a" * 40
    os.makedirs(deep)
    served = scene.served
    ended = scene.run(renew=True, rekey=True)
    assert (ended.status, ended.hint) == (12, "see who made it, and move it away")
    assert ended.message.startswith(f"can't write {SSL}/scx-enroll-pair-1: ")
    assert scene.is_enrolled()
    assert scene.served != served
    assert keys_anywhere(scene) == [scene.host.key]
    shutil.rmtree(scene.host.path(f"{SSL}/scx-enroll-pair-1"))
    assert (scene.run().status, scene.run().rows) == (0, ())
