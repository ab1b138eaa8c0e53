"""Every layout that real hosts have: the program does its whole job there, and leaves the packages nothing to stumble over."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, List, Set

import pytest

from scx_enroll import enroll, transaction
from scx_enroll.enroll import Options
from tests.lab.agent import LAYOUTS, Entry, LabHost, fingerprint, served_leaf
from tests.lab.ca import LabCA
from tests.lab.packagescripts import MARKER, OMI_PEM, SCRIPTS, SCX_PEM, bundle_upgrade, omi_install
from tests.scene import Scene

EC = "ec:secp256r1"
QUICKLY = ("omi-regular",)  # "omi" is all other tests' layout
ALIKE = ("omi-ports", "omi-root", "omi-moved")  # in what the packages' scripts see
# Before each of these the tree is as the call before has left it.
CHANGES = ("open", "os.rename", "os.remove", "os.link", "os.symlink", "os.chmod", "os.chown", "os.mkdir", "os.rmdir", "os.truncate")

_watched: Dict[LabHost, List[str]] = {}
_dangling: List[str] = []


def _see(event: str, _arguments: object) -> None:
    if event in CHANGES:
        for host, names in _watched.items():
            _dangling.extend(f"{name} before {event}" for name in names if not os.path.isfile(host.resolve(name)))


sys.addaudithook(_see)  # for good: it does next to nothing while nobody is watched


@contextmanager
def watched(host: LabHost) -> Iterator[None]:
    """No name that the server, the packages or SCOM go by dangles or vanishes, not even between two system calls."""
    _dangling.clear()
    names = {host.certificate, host.key, SCX_PEM, host.place.certificate, host.place.key}
    _watched[host] = [name for name in names if os.path.lexists(host.path(name))]
    try:
        yield
        _see(CHANGES[0], ())
    finally:
        del _watched[host]
    assert _dangling == []


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabCA]:
    with LabCA(tmp_path_factory.mktemp("ca")) as ca:
        yield ca


@pytest.fixture(autouse=True)
def _now(ca: LabCA) -> None:
    ca.switches.date_offset = 0


def settings(layout: str) -> Dict[str, str]:
    """What the operator has to say about a layout."""
    return {"layout": "omi"} if layout == "both" else {}


def changed(before: Dict[str, Entry], after: Dict[str, Entry]) -> Set[str]:
    """The paths that came, went or are another thing."""
    return {path for path in {*before, *after} if before.get(path) != after.get(path)}


def check_install(host: LabHost, before: Dict[str, Entry]) -> str:
    """The name is a link to a copy beside it, of the right owner and mode; nothing else is other than `before`.

    The link is relative, but where the packages may move it: a classic name.
    """
    after = host.snapshot()
    name = after[host.certificate]
    folder = f"{os.path.dirname(host.certificate)}/"
    text = name.text if host.is_omi else name.text[len(folder) :]
    copy = folder + text
    assert (name.kind, name.uid, name.gid) == ("link", os.geteuid(), os.getegid())
    assert name.text == (text if host.is_omi else copy)
    assert text.startswith("scx-enroll-")
    assert "/" not in text
    assert after[copy].kind == "file"
    assert (after[copy].mode, after[copy].uid, after[copy].gid) == (0o444, os.geteuid(), os.getegid())
    assert after[copy].data.count(b"BEGIN CERTIFICATE") == 1
    gone = {path for path in before if os.path.dirname(path) + "/" == folder and Path(path).name.startswith("scx-enroll-")} | {MARKER}
    assert changed(before, after) - gone == {host.certificate, copy}
    assert MARKER not in after
    if SCX_PEM in before:
        assert after[SCX_PEM] == before[SCX_PEM] or host.certificate == SCX_PEM
        assert os.path.isfile(host.resolve(SCX_PEM))
    return copy


def an_hour_later(scene: Scene, ca: LabCA) -> None:
    """So that there is room in the budget of restarts."""
    scene.offset_s += 3600
    ca.switches.date_offset = scene.offset_s


@pytest.mark.parametrize(
    "layout",
    [name if name in QUICKLY else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "omi-dangling"],
)
def test_every_layout_is_enrolled_healed_renewed_and_rolled_back(tmp_path: Path, ca: LabCA, layout: str) -> None:
    """Owner, mode and kind of all that changes, and that nothing else does; the marker goes, and comes back with what was there."""
    with LabHost(tmp_path / "host", layout, key=EC) as host:
        host.start()
        scene = Scene(host, [ca], settings(layout))
        pristine, served, posts = host.snapshot(), scene.served, ca.count_post
        with watched(host):
            assert scene.run().rows == ("C4", "L7")
        check_install(host, pristine)
        assert scene.is_enrolled()
        assert {fingerprint(served_leaf(port)) for port in host.ports} == {scene.served}
        with watched(host):
            assert scene.do(enroll.roll_back).status == 0
        assert host.snapshot() == pristine
        assert scene.served == served
        enroll.hold(scene.root(), Options(), scene.tools(), "")
        an_hour_later(scene, ca)
        with watched(host):
            assert scene.run(now=True).rows == ("L7",)
        copy = check_install(host, pristine)
        installed = host.snapshot()
        os.unlink(host.path(host.certificate))
        host.make_file(host.certificate, b"a stranger's")
        with watched(host):
            assert scene.run().rows == ("L7",)
        assert changed(installed, host.snapshot()) <= {copy, host.certificate, check_install(host, pristine)}
        assert ca.count_post == posts + 1
        before = host.snapshot()
        with watched(host):
            an_hour_later(scene, ca)
            assert scene.run(renew=True).rows == ("C4", "L7")
        assert check_install(host, before) not in before
        assert scene.is_enrolled()
        assert ca.count_post == posts + 2


def test_a_dangling_certificate_is_mended_and_the_agent_started(tmp_path: Path, ca: LabCA) -> None:
    """A migration's own mistake: the key is sound and nothing can run, so nobody has stopped it on purpose."""
    with LabHost(tmp_path / "host", "omi-dangling", key=EC) as host:
        scene = Scene(host, [ca])
        pristine = host.snapshot()
        ended = scene.run()
        assert (ended.status, ended.rows) == (0, ("C4", "L7")), ended
        check_install(host, pristine)
        assert scene.is_enrolled()
        with watched(host):
            assert scene.do(enroll.roll_back).status == 2  # to nothing
            assert scene.run().rows == ()
        assert host.restarts == 1


def test_an_agent_that_died_of_its_dangling_certificate_is_mended(tmp_path: Path, ca: LabCA) -> None:
    """Its silence says nothing about the next certificate."""
    with LabHost(tmp_path / "host", "omi-dangling", key=EC) as host:
        assert not host.start()
        scene = Scene(host, [ca])
        assert scene.run().rows == ("C4", "L7")
        assert scene.is_enrolled()


def test_an_agent_that_is_silent_for_another_reason_is_left_alone(tmp_path: Path, ca: LabCA) -> None:
    """What keeps a sound pair from being served would keep a new one from it: nothing is asked for."""
    with LabHost(tmp_path / "host", key=EC) as host:
        host.start()
        scene, posts = Scene(host, [ca]), ca.count_post
        host.kill()
        assert "does not answer" in scene.run().message
        host.stop()
        os.unlink(host.path(host.place.pid))
        assert scene.run().status == 0  # stopped on purpose
        assert (host.pid, ca.count_post) == (0, posts + 1)


def kill_at_the_restart(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run ends between the change and its proof, as where the power fails."""

    class Killed(BaseException):
        pass

    def kill(*_arguments: object, **_names: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(transaction, "prove", kill)
        with pytest.raises(Killed):
            scene.run()


@pytest.mark.slow
def test_an_open_installation_ends_with_a_migration(tmp_path: Path, ca: LabCA, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout that it belongs to never comes back: it must not be waited for."""
    with LabHost(tmp_path / "host", "classic-omi", key=EC) as host:
        host.start()
        scene, posts = Scene(host, [ca]), ca.count_post
        kill_at_the_restart(scene, monkeypatch)
        bundle_upgrade(host, kind=EC)
        with watched(host):
            ended = scene.run()
        assert (ended.status, ended.rows) == (0, ("L1",)), ended
        assert scene.is_enrolled()
        assert (ca.count_post, host.restarts) == (posts + 1, 0)


@pytest.mark.slow
def test_an_open_installation_ends_where_the_agent_reads_another_pair(
    tmp_path: Path, ca: LabCA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An rpm has replaced the conf: what is installed under the old name can't be proved, and is no failure."""
    with LabHost(tmp_path / "host", "omi-apart", key=EC) as host:
        host.start()
        scene = Scene(host, [ca])
        kill_at_the_restart(scene, monkeypatch)
        omi_install(host, version="1.8.1", conf_replaced=True)
        with watched(host):
            ended = scene.run()
        assert (ended.status, ended.rows) == (0, ("L1", "C4", "L7")), ended
        assert host.certificate == OMI_PEM
        assert scene.is_enrolled()
        assert host.restarts == 1


@pytest.mark.slow
def test_a_refused_certificate_leaves_a_fresh_agent_as_it_was(tmp_path: Path, ca: LabCA) -> None:
    """The marker, too: without it the next upgrade of scx would keep the pair that OMI made."""
    with LabHost(tmp_path / "host", "omi-regular", key=EC) as host:
        host.start()
        host.refuse_new()
        scene, before, served = Scene(host, [ca]), host.snapshot(), host.served()
        with watched(host):
            assert scene.run().status == 9
        assert (host.snapshot(), host.served()) == (before, served)


def test_two_agents_are_refused_with_what_was_seen(tmp_path: Path, ca: LabCA) -> None:
    """Between the halves of an upgrade both are there: which one SCOM asks is not for us to guess."""
    with LabHost(tmp_path / "host", "both", key=EC) as host:
        host.start()
        scene, before, posts = Scene(host, [ca]), host.snapshot(), ca.count_post
        ended = scene.run()
        assert ended.status == 4
        assert "two agents are installed: omi (/etc/opt/omi/conf/omiserver.conf) and classic-omi (/etc/opt/microsoft/scx" in ended.message
        assert "layout" in ended.hint
        assert (host.snapshot(), ca.count_post, host.restarts) == (before, posts, 0)


# -- the packages, afterwards ---------------------------------------------------------------------------------------


def outcome(kept: Path, folder: Path, script: str) -> bool:
    """Whether an agent starts after a script, on a copy of a host whose agent does not run."""
    subprocess.run(["cp", "-a", kept, folder], check=True)
    with LabHost(folder, make=False) as copy:
        SCRIPTS[script](copy)
        works = copy.would_start()
    subprocess.run(["rm", "-rf", folder], check=True)
    return works


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["classic-omi", "pegasus"])
def test_a_migration_takes_our_certificate_along(tmp_path: Path, ca: LabCA, layout: str) -> None:
    """The classic name is moved, as a link, into OMI's folder: it leads to our copy from there, too, and nobody has to do anything."""
    with LabHost(tmp_path / "host", layout, key=EC) as host:
        host.start()
        scene = Scene(host, [ca])
        scene.run()
        served, posts = scene.served, ca.count_post
        assert bundle_upgrade(host, kind=EC) == 0
        assert (host.is_omi, scene.served) == (True, served)
        restarts = host.restarts
        with watched(host):
            assert (scene.run().status, scene.served, host.restarts, ca.count_post) == (0, served, restarts, posts)
        an_hour_later(scene, ca)
        before = host.snapshot()
        with watched(host):
            assert scene.run(renew=True).rows == ("C4", "L7")
        check_install(host, before)
        assert scene.is_enrolled()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ALIKE])
def test_no_script_fares_worse_with_ours_than_with_the_agents_own(tmp_path: Path, ca: LabCA, layout: str) -> None:
    """Whatever the packages do next, an agent comes out of it that starts, unless the agent's own pair would not have either."""
    with LabHost(tmp_path / "host", layout, key=EC) as host:
        subprocess.run(["cp", "-a", host.root, tmp_path / "own"], check=True)
        host.start()
        scene = Scene(host, [ca], settings(layout))
        assert scene.run().status == 0
        host.stop()
        worse = [
            script
            for script in SCRIPTS
            if not outcome(Path(host.root), tmp_path / "after", script) and outcome(tmp_path / "own", tmp_path / "after", script)
        ]
        assert worse == []
