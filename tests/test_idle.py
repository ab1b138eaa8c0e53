"""The run that finds nothing to do without the rest of the program: it may answer only what the whole program would answer."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import scx_enroll
from scx_enroll import cli, enroll, idle, premises, report
from scx_enroll.enroll import Options
from scx_enroll.rootfs import Root
from tests.lab.agent import LabHost
from tests.lab.ca import LabCA
from tests.scene import Scene

DAY_S = 24 * 3600
# What an idle run may know of: its own two modules, and what those import.
FOREIGN = {"argparse", "configparser", "contextlib", "cryptography", "dataclasses", "inspect", "requests", "subprocess", "typing", "urllib3"}


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Premises are written though files are a moment old; what that costs is another test's business."""
    monkeypatch.setattr(premises, "FRESH_NS", -(10**12))


@pytest.fixture
def scene(tmp_path: Path, ca: LabCA) -> Iterator[Scene]:
    """An enrolled host whose agent runs."""
    with LabHost(tmp_path / "host", key="ec:secp256r1") as host:
        host.knobs(poll=0.02)
        host.start()
        made = Scene(host, [ca])
        assert made.run().status == 0
        yield made


def whole(scene: Scene, *arguments: str) -> int:
    """Run the whole program here, whatever the premises say; it leaves new ones."""
    return cli.main(scene.argv("run", *arguments)[1:])


PARTS = ("here", "at", "until", "folder", "exit_status", "quiet_status", "claims", "text", "before", "after")


def premises_of(scene: Scene) -> Dict[str, str]:
    """What stands in the file."""
    return dict(zip(PARTS, (scene.state / "premises").read_text().split("\0")))


def answer(scene: Scene, *arguments: str, live: bool = True) -> Any:
    """What an idle run says: a status, or None for a miss."""
    return idle.answer(scene.argv("run", *arguments, live=live)[1:])


def written(parts: Dict[str, Any]) -> bytes:
    """Those premises as a file."""
    return "\0".join(str(parts[name]) for name in PARTS).encode("utf-8", "surrogateescape")


def rewrite(scene: Scene, **changes: Any) -> None:
    """Change what the premises say."""
    path = scene.state / "premises"
    path.write_bytes(written({**premises_of(scene), **changes}))
    path.chmod(0o600)


def claim(scene: Scene, old: str, new: str) -> None:
    """Change what they claim."""
    claims = premises_of(scene)["claims"]
    assert old in claims
    rewrite(scene, claims=claims.replace(old, new, 1))


# -- the same answer ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--unattended",), ("--json",), ("--json", "--unattended"), ("--wait", "5"), ("--wait=5",)])
def test_an_idle_run_says_something_else_than_the_whole_program(scene: Scene, ca: LabCA, arguments: Tuple[str, ...], capsys: Any) -> None:
    """Output, status and the status file are the same, but for the time; agent and CA notice nothing."""
    assert whole(scene, *arguments) == 0
    expected = capsys.readouterr()
    published = Path(scene.host.root, "run/scx-enroll/status.json")
    before, restarts, exchanges = json.loads(published.read_text()), scene.host.restarts, ca.count_get + ca.count_post
    published.write_text("{}")
    started = int(time.time())
    assert answer(scene, *arguments) == 0
    said = capsys.readouterr()
    after = json.loads(published.read_text())
    assert started <= after.pop("time") <= time.time()
    before.pop("time")
    assert after == before
    assert (published.stat().st_mode & 0o777, sorted(os.listdir(published.parent))) == (0o644, ["status.json"])
    if "--json" in arguments:
        assert json.loads(said.out)["time"] >= started
        assert {**json.loads(said.out), "time": 0} == {**json.loads(expected.out), "time": 0}
    else:
        assert said.out == expected.out
    assert (said.err, scene.host.restarts, ca.count_get + ca.count_post) == (expected.err, restarts, exchanges)


@pytest.mark.slow
def test_an_idle_run_pays_for_what_it_does_not_use(scene: Scene) -> None:
    """A process of its own: two modules of ours, none of the big ones, and the answer."""
    assert whole(scene) == 0
    program = (
        "import sys; from scx_enroll.__main__ import main; status = main(); print(status, *sorted(sys.modules), file=sys.stderr)"
    )
    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {program}", *scene.argv("run")[1:]],
        capture_output=True, text=True, check=True,
    )
    status, *modules = ran.stderr.split()
    assert status == "0"
    assert "nothing to do" in ran.stdout
    assert {name.split(".")[0] for name in modules} & FOREIGN == set()
    assert {name for name in modules if name.startswith("scx_enroll")} == {"scx_enroll", "scx_enroll.__main__", "scx_enroll.idle"}


@pytest.mark.slow
def test_the_installed_command_takes_the_long_way(scene: Scene) -> None:
    """The command itself, three times as a timer starts it: the second run looks, the third need not."""
    time.sleep(2.1)  # a process of its own knows no impatience
    assert scene.command("run").returncode == 0
    stamp = premises_of(scene)["at"]
    held = (scene.state / "lock").stat().st_mtime_ns
    ran = scene.command("run")
    assert (ran.returncode, "nothing to do" in ran.stdout) == (0, True)
    assert (premises_of(scene)["at"], (scene.state / "lock").stat().st_mtime_ns) == (stamp, held), "it took the lock, so it looked"


@pytest.mark.slow
def test_a_host_that_waits_or_is_held_looks_every_hour(tmp_path: Path, ca: LabCA, capsys: Any) -> None:
    """A pending request ends with 7 by hand and quietly for the timer, until the next poll is due; a hold is told, too."""
    ca.switches.update({"mode": "pending"})
    with LabHost(tmp_path / "host", key="ec:secp256r1") as host:
        host.start()
        scene = Scene(host, [ca])
        assert scene.run().status == 7
        assert whole(scene) == 7
        told = capsys.readouterr()
        until = int(premises_of(scene)["until"])
        assert until - time.time() <= 61
        assert (answer(scene), answer(scene, "--unattended")) == (7, 0)
        assert capsys.readouterr() == told
        rewrite(scene, until=int(time.time()))
        assert answer(scene) is None
        assert cli.main([*scene.argv("hold")[1:], "change freeze"]) == 0
        assert answer(scene) is None
        assert whole(scene) == 0
        capsys.readouterr()
        assert answer(scene) == 0
        assert "held: change freeze" in capsys.readouterr().out


@pytest.mark.slow
def test_an_image_without_an_agent_looks_every_hour(scene: Scene, capsys: Any) -> None:
    """The program is baked in, the agent comes later: until then it costs nothing, and then it is seen."""
    server = below(scene, "/opt/omi/bin/omiserver")
    server.rename(server.with_name("later"))
    assert whole(scene) == 4
    assert "agent-removed" in capsys.readouterr().out, "told once, and written down"
    assert whole(scene) == 4
    told = capsys.readouterr()
    assert (answer(scene), answer(scene, "--unattended")) == (4, 0)
    assert capsys.readouterr() == told
    server.with_name("later").rename(server)
    assert answer(scene) is None


def idles(scene: Scene, *arguments: str) -> int:
    """The exit status of what the timer asks before it starts the service; nothing is said."""
    done = subprocess.run([*scene.argv("run")[:1], "idle", *scene.argv("run")[2:], *arguments], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "") or done.returncode == 2
    return done.returncode


@pytest.mark.slow
def test_the_timer_passes_over_a_host_that_needs_a_look(scene: Scene) -> None:
    """0 starts no service; a change, an answer that needs a person, and a defect of the premises do."""
    assert whole(scene) == 0
    assert idles(scene) == 0
    assert json.loads(Path(scene.host.root, "run/scx-enroll/status.json").read_text())["time"] >= int(time.time()) - 5
    assert idles(scene, "--bogus") == 2
    rewrite(scene, quiet_status="13")
    assert idles(scene) == idle.HAS_TO_LOOK == 75
    rewrite(scene, quiet_status="0")
    assert idles(scene) == 0
    scene.host.kill()
    assert idles(scene) == 75
    (scene.state / "premises").unlink()
    assert idles(scene) == 75


def bare(tmp_path: Path) -> Tuple[Path, List[str]]:
    """A host where the package was installed and nothing else was done, and the timer's command line for it."""
    etc = tmp_path / "host" / "etc" / "scx-enroll"
    (etc / "conf.d").mkdir(parents=True)
    (etc / "scx-enroll.conf").write_text("[ca]\n#server = ca01.corp.example\n", encoding="ascii")
    return etc, ["run", "--root", str(tmp_path / "host"), "--unattended"]


def test_an_unconfigured_host_loads_the_program_every_hour(tmp_path: Path, capsys: Any) -> None:
    """It may stay so for months: the first run says so, the next ones compare, and leave the same for anybody to read."""
    _etc, line = bare(tmp_path)
    assert (cli.main(line), capsys.readouterr().out.count("not configured yet")) == (0, 1)
    assert (cli.main(line), *capsys.readouterr()) == (0, "", "")  # the first one has made the folders
    published = tmp_path / "host" / "run" / "scx-enroll" / "status.json"
    before = json.loads(published.read_text())
    assert (idle.answer(line), *capsys.readouterr()) == (0, "", "")
    after = json.loads(published.read_text())
    assert {**before, "time": 0} == {**after, "time": 0}
    assert (cli.main(line), *capsys.readouterr()) == (0, "", "")


def test_a_person_is_not_told_that_nothing_is_configured(tmp_path: Path, capsys: Any) -> None:
    """By hand it is a failure, in words or as JSON, whatever the timer's runs have left."""
    _etc, line = bare(tmp_path)
    assert (cli.main(line), cli.main(line), idle.answer(line)) == (0, 0, 0)
    assert idle.answer(line[:-1]) is None
    assert idle.answer([*line, "--json"]) is None
    capsys.readouterr()
    assert (cli.main(line[:-1]), "error: no certification authority" in capsys.readouterr().err) == (3, True)


@pytest.mark.parametrize("change", ["edited", "added", "removed", "unreadable"])
def test_a_configuration_that_comes_later_is_not_seen(tmp_path: Path, change: str) -> None:
    """An image is started without a CA, and configured afterwards: the next tick must look at the whole."""
    etc, line = bare(tmp_path)
    assert (cli.main(line), cli.main(line), idle.answer(line)) == (0, 0, 0)
    if change == "edited":
        (etc / "scx-enroll.conf").write_text("[ca]\nserver = ca01.corp.example\n", encoding="ascii")
    elif change == "added":
        (etc / "conf.d" / "10-ca.conf").write_text("[ca]\nserver = ca01.corp.example\n", encoding="ascii")
    elif change == "removed":
        (etc / "scx-enroll.conf").unlink()
    else:
        (etc / "scx-enroll.conf").chmod(0o666)
    assert idle.answer(line) is None


@pytest.mark.slow
def test_a_status_that_needs_a_person_is_swallowed(scene: Scene, capsys: Any) -> None:
    """What fails for the timer goes on failing, with its words on stderr."""
    assert whole(scene) == 0
    capsys.readouterr()
    rewrite(scene, exit_status=6, quiet_status=6, text="scx-enroll: error: no\n")
    assert answer(scene, "--unattended") == 6
    assert capsys.readouterr() == ("", "scx-enroll: error: no\n")


# -- what makes it look ---------------------------------------------------------------------------------------------


def in_place(path: Path) -> None:
    """Other bytes of the same length, in the same file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.write(data)
    path.chmod(mode & 0o777)


def with_its_time(path: Path) -> None:
    """Other bytes, and the old time of the last change to them: the time of the change itself can't be set."""
    before = path.stat()
    in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    """The same bytes in another file."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    other.replace(path)


def generation(scene: Scene) -> Path:
    """The folder of the one that is held."""
    return next((scene.state / "generations").iterdir())


def below(scene: Scene, path: str) -> Path:
    """A path of the host, links followed."""
    return Path(scene.host.root, path.lstrip("/")).resolve()


MISSES: Dict[str, Callable[[Scene], Any]] = {
    "configuration touched": lambda s: os.utime(s.etc / "scx-enroll.conf"),
    "configuration edited": lambda s: in_place(s.etc / "scx-enroll.conf"),
    "configuration readable by others": lambda s: (s.etc / "scx-enroll.conf").chmod(0o666),
    "configuration gone": lambda s: (s.etc / "scx-enroll.conf").rename(s.etc / "kept"),
    "a file came to conf.d": lambda s: ((s.etc / "conf.d").mkdir(), (s.etc / "conf.d/a.conf").write_text("[host]\n")),
    "issuer-trust replaced": lambda s: replaced(s.etc / "ca0.pem"),
    "journal edited": lambda s: in_place(s.state / "journal.json"),
    "budget gone": lambda s: (s.state / "budget.json").unlink(),
    "another run was here": lambda s: enroll.hold(s.root(), Options(), s.tools(), ""),
    "certificate of record edited": lambda s: in_place(generation(s) / "cert.pem"),
    "chain of record replaced": lambda s: replaced(generation(s) / "chain.pem"),
    "a generation came": lambda s: (s.state / "generations" / ("e" * 16)).mkdir(),
    "a generation went": lambda s: shutil.rmtree(generation(s)),
    "state open to others": lambda s: s.state.chmod(0o777),
    "link moved": lambda s: s.host.relink("omi-host-old.pem"),
    "link made anew": lambda s: s.host.relink(os.readlink(s.host.path(s.host.certificate))),
    "written through the link": lambda s: in_place(below(s, s.host.certificate)),
    "written through the link, and its time put back": lambda s: with_its_time(below(s, s.host.certificate)),
    "certificate belongs to another": lambda s: os.chown(below(s, s.host.certificate), 990, 990),
    "key replaced": lambda s: replaced(below(s, s.host.key)),
    "key deleted": lambda s: below(s, s.host.key).unlink(),
    "key unreadable": lambda s: below(s, s.host.key).chmod(0),
    "a stray in the agent's folder": lambda s: below(s, s.host.certificate).with_name(".scx-enroll.0123456789abcdef").touch(),
    "folder of the key belongs to another": lambda s: os.chown(below(s, s.host.key).parent, 991, 990),
    "folder of the key of another group": lambda s: os.chown(below(s, s.host.key).parent, -1, 991),
    "folder of the key open to others": lambda s: below(s, s.host.key).parent.chmod(0o777),
    "agent's configuration edited": lambda s: in_place(below(s, s.host.conf)),
    "agent installed again": lambda s: replaced(below(s, "/opt/omi/bin/omiserver")),
    "agent gone": lambda s: below(s, "/opt/omi/bin/omiserver").unlink(),
    "a second agent came": lambda s: (below(s, "/opt/microsoft/scx/bin").mkdir(parents=True, exist_ok=True),
                                      below(s, "/opt/microsoft/scx/bin/omiserver").touch()),
    "agent killed": lambda s: s.host.kill(),
    "agent stopped": lambda s: s.host.stop(),
    "agent serves another": lambda s: (s.host.new_pair(), s.host.restart()),
    "restarted by others": lambda s: s.host.restart(),
    "status folder gone": lambda s: shutil.rmtree(below(s, "/run/scx-enroll")),
    "zypper at work": lambda s: below(s, "/run/zypp.pid").write_text(f"{os.getpid()}\n"),
    "a lock file came": lambda s: (below(s, "/var/lib/dpkg").mkdir(parents=True), below(s, "/var/lib/dpkg/lock").touch()),
    "machine-id edited": lambda s: in_place(below(s, "/etc/machine-id")),
    "a product UUID came": lambda s: (below(s, "/sys/class/dmi/id").mkdir(parents=True, exist_ok=True),
                                      below(s, "/sys/class/dmi/id/product_uuid").write_text("564d1234-5678-9abc-def0-123456789abc\n")),
    "host name edited": lambda s: in_place(below(s, "/etc/hostname")),
    "a key was noted as baked in": lambda s: below(s, s.host.key).with_name(".scx-enroll-baked-in").write_text(f"{'a' * 64}\n"),
    "premises gone": lambda s: (s.state / "premises").unlink(),
    "premises of another": lambda s: os.chown(s.state / "premises", 990, 990),
    "premises written by others": lambda s: (s.state / "premises").chmod(0o622),
    "premises behind a link": lambda s: ((s.state / "premises").rename(s.state / "x"), (s.state / "premises").symlink_to("x")),
    "premises cut": lambda s: os.truncate(s.state / "premises", 3000),
    "premises that never end": lambda s: ((s.state / "premises").unlink(), os.mkfifo(s.state / "premises", 0o600)),
    "premises empty": lambda s: os.truncate(s.state / "premises", 0),
    "premises endless": lambda s: os.truncate(s.state / "premises", idle.MAX_PREMISES_BYTES + 1),
    "a time that has come": lambda s: rewrite(s, until=int(time.time())),
    "clock set back": lambda s: rewrite(s, at=int(time.time()) + 5),
    "another host": lambda s: rewrite(s, here=premises_of(s)["here"].replace(socket.gethostname(), "other")),
    "another Python": lambda s: rewrite(s, here=premises_of(s)["here"].replace(sys.version, "2.7")),
    "another program": lambda s: rewrite(s, here=premises_of(s)["here"].replace(scx_enroll.__version__, "0.0.1")),
    "installed anew": lambda s: rewrite(s, here=premises_of(s)["here"].replace(idle.stands(idle.__file__), "")),
    "another certificate is served": lambda s: claim(s, "port 1,3", "port 1,4"),
    "another OpenSSL": lambda s: claim(s, "library OpenSSL", "library LibreSSL"),
    "nobody listened": lambda s: claim(s, "port 1,", "port 0,"),
    "a part is missing": lambda s: (s.state / "premises").write_bytes(b"\0".join((s.state / "premises").read_bytes().split(b"\0")[:-1])),
    "a claim of a kind that is not known": lambda s: claim(s, "looked ", "felt "),
    "a status folder that was not looked at": lambda s: rewrite(s, folder=s.host.root),
}
NEEDS_ROOT = {change for change in MISSES if "another" in change and ("belongs" in change or " of another" in change)}


@pytest.mark.slow
@pytest.mark.parametrize("change", MISSES)
def test_a_change_that_goes_unseen(scene: Scene, change: str, capsys: Any) -> None:
    """Whatever it is, the whole program looks; nothing was said, and the status file is as it was."""
    if change in NEEDS_ROOT and os.geteuid() != 0:
        pytest.skip("only root may give a file away")
    assert whole(scene) == 0
    assert answer(scene) == 0
    capsys.readouterr()
    status = Path(scene.host.root, "run/scx-enroll/status.json").read_bytes()
    MISSES[change](scene)
    assert answer(scene) is None
    assert capsys.readouterr() == ("", "")
    if change != "status folder gone":
        assert Path(scene.host.root, "run/scx-enroll/status.json").read_bytes() == status


def age(scene: Scene, seconds: int, last: int = 3600) -> None:
    """The premises are so old, and the last run is so long ago."""
    now = int(time.time())
    rewrite(scene, at=now - seconds)
    os.utime(below(scene, "/run/scx-enroll/status.json"), (now - last, now - last))


HALF_DAY_S, HOUR_S = 12 * 3600, 3600


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "last", "looked"),
    [
        (HOUR_S, HOUR_S, False), (11 * HOUR_S, HOUR_S, False), (HALF_DAY_S - 3, HOUR_S, False), (HALF_DAY_S + 3, HOUR_S, True),
        (HALF_DAY_S + HOUR_S + 3, HOUR_S, False), (2 * HALF_DAY_S - 3, 2 * HALF_DAY_S - 3, True), (6 * HALF_DAY_S - 3, 2 * HALF_DAY_S, True),
        (HALF_DAY_S + 3, HALF_DAY_S + 5, True), (HOUR_S, -60, True),
    ],
)  # fmt: skip
def test_a_tick_that_does_a_handshake_for_nothing_or_never(
    scene: Scene, seconds: int, last: int, looked: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The first run of each half day sees what is served, however seldom runs come and at whatever second; a person's always does."""
    assert whole(scene) == 0
    asked: List[str] = []
    real = idle._serves
    monkeypatch.setitem(idle.CLAIMS, "port", lambda port: asked.append(port) or real(port))
    age(scene, seconds, last)
    assert answer(scene, "--unattended") == 0
    assert bool(asked) is looked
    age(scene, HOUR_S)
    asked.clear()
    assert answer(scene) == 0
    assert asked == [str(scene.host.port)]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["agent killed", "agent stopped", "agent serves another", "restarted by others", "key replaced", "link moved"])
def test_a_change_that_goes_unseen_without_a_handshake(scene: Scene, change: str, capsys: Any) -> None:
    """A server that was restarted, or whose files changed so that it could serve something else, is noticed by the next tick."""
    assert whole(scene) == 0
    age(scene, HOUR_S)
    assert answer(scene, "--unattended") == 0
    MISSES[change](scene)
    assert answer(scene, "--unattended") is None


@pytest.mark.slow
def test_another_process_has_the_servers_number(scene: Scene, capsys: Any) -> None:
    """A server that died leaves its pid file, and the number may be given out again."""
    assert whole(scene) == 0
    age(scene, HOUR_S)
    claims = premises_of(scene)["claims"]
    assert f"\nserver omiserver {scene.host.pid}\n" in claims
    rewrite(scene, claims=claims.replace(f"server omiserver {scene.host.pid}", f"server omiserver {os.getpid()}"))
    age(scene, HOUR_S)
    assert answer(scene, "--unattended") is None


@pytest.mark.slow
def test_a_server_that_is_not_known_is_taken_for_granted(scene: Scene, capsys: Any) -> None:
    """Where no pid file tells its process, each tick looks at the port."""
    assert whole(scene) == 0
    kept = [line for line in premises_of(scene)["claims"].split("\n") if not line.startswith("server ")]
    rewrite(scene, claims="\n".join(kept).replace("port 1,3", "port 1,4"))
    age(scene, 2 * HOUR_S)
    assert answer(scene, "--unattended") is None


def nothing_of_ours(scene: Scene) -> None:
    """What happens on a host all day."""
    Path(scene.host.root, "etc/motd").write_text("hello")
    Path(scene.host.root, "var/log").mkdir(exist_ok=True)
    (scene.etc / "notes").write_text("not ours")
    Path(scene.host.root, "run/other").mkdir()
    below(scene, scene.host.key).read_bytes()
    (scene.state / "pages/1.html").write_text("old")


@pytest.mark.slow
def test_what_does_not_matter_makes_it_look(scene: Scene, capsys: Any) -> None:
    """Neighbours that change, files that are read, and other trees are nothing to it; else nothing would ever be idle."""
    assert whole(scene) == 0
    nothing_of_ours(scene)
    assert answer(scene) == 0


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process holds a lock as a package manager does."""
    held = subprocess.Popen(
        [sys.executable, "-c", "import fcntl,sys,time; f=open(sys.argv[1],'r+'); fcntl.lockf(f,fcntl.LOCK_EX); print(1,flush=True); time.sleep(60)",
         str(path)], stdout=subprocess.PIPE,
    )
    assert held.stdout
    try:
        assert held.stdout.readline() == b"1\n"
        yield
    finally:
        held.kill()
        held.wait()
        held.stdout.close()


@pytest.mark.slow
def test_a_package_manager_is_not_noticed(scene: Scene, capsys: Any) -> None:
    """Its lock leaves no trace in a file's times; row L3 must come all the same, and go again."""
    lock = below(scene, "/var/lib/dpkg/lock")
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert whole(scene) == 0
    assert answer(scene) == 0
    with locked(lock):
        assert answer(scene) is None
        assert scene.run().result.step.row == "L3"  # type: ignore[union-attr]
    assert whole(scene) == 0
    assert answer(scene) == 0


@pytest.mark.slow
def test_a_run_in_progress_is_not_noticed(scene: Scene, capsys: Any) -> None:
    """Who runs beside another run is told so (11), not that there is nothing to do."""
    assert whole(scene) == 0
    tools = scene.tools()
    with tools.store(scene.root()).lock(0, lambda _message: None):
        assert answer(scene) is None
        assert scene.command("run").returncode == 11


@pytest.mark.slow
def test_a_name_of_this_host_that_changed(scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """It may be part of the name that the certificate shall have, or be worth a note."""
    assert whole(scene) == 0
    assert answer(scene) == 0
    monkeypatch.setattr(idle._socket, "gethostname", lambda: "renamed")
    assert answer(scene) is None


ASKED: List[Tuple[str, ...]] = [
    ("--now",), ("--renew",), ("--dry-run",), ("--adopt", "7"), ("--verbose",), ("--wait", "x"), ("--wait", "99999"), ("--wait",), ("--json=1",),
    ("--jso",), ("run",), ("x",), ("--root", ""), ("--config", "-x"), ("--help",), ("--",), ("",),
]


@pytest.mark.slow
def test_a_command_line_that_means_something_else(scene: Scene, tmp_path: Path, capsys: Any) -> None:
    """Only a plain run is answered; every other one, the wrong ones too, is the whole program's."""
    assert whole(scene) == 0
    for arguments in ASKED:
        assert answer(scene, *arguments) is None, arguments
    root = scene.host.root
    for words in ([], ["status", "--root", root], ["--root", root, "--live"], ["--json", "run", "--root", root, "--live"], ["run", "--live"],
                  ["run", "--root", str(tmp_path), "--live"], ["--wait", "1", "run", "--root", root, "--live"]):
        assert idle.answer(words) is None, words
    assert answer(scene, live=False) is None, "it was probed, and shall not be"
    assert answer(scene, "--config", str(scene.etc / "scx-enroll.conf")) is None, "these are other files, as far as is known"
    assert idle._asked(["run", "--live"]) is None, "it goes with --root, says the whole program"
    assert idle.answer(["--root", f"{root}/../{os.path.basename(root)}", "run", f"--root={root}", "--live"]) == 0
    assert whole(scene, "--config", str(scene.etc / "scx-enroll.conf")) == 0
    assert answer(scene, "--config", str(scene.etc / "scx-enroll.conf")) == 0
    os.utime(scene.etc / "scx-enroll.conf")
    assert answer(scene, "--config", str(scene.etc / "scx-enroll.conf")) is None


@pytest.mark.slow
def test_a_tree_that_is_not_live_is_probed(scene: Scene, capsys: Any) -> None:
    """An image's tree rests, too, and its builder's ports are left alone."""
    assert cli.main(scene.argv("run", live=False)[1:]) == 0
    assert "\nport " not in premises_of(scene)["claims"]
    scene.host.stop()
    assert answer(scene, live=False) == 0


# -- what is written down -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_premises_of_a_file_that_may_still_change_unseen(scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Two changes within a file system's tick leave one time; so what others changed a moment ago is no premise yet."""
    monkeypatch.setattr(premises, "FRESH_NS", 10**9)
    time.sleep(2.1)
    os.utime(scene.etc / "ca0.pem")
    assert whole(scene) == 0
    assert not (scene.state / "premises").exists()
    time.sleep(2.1)
    assert whole(scene) == 0
    assert answer(scene) == 0


@pytest.mark.slow
def test_premises_of_a_run_that_did_something(scene: Scene, capsys: Any) -> None:
    """It looked several times, before and after its acts: the next run looks in full, once."""
    scene.host.kill()
    assert whole(scene) == 0
    assert not (scene.state / "premises").exists()
    shutil.rmtree(scene.state)
    assert whole(scene) == 0
    assert "adopted" in capsys.readouterr().out
    assert not (scene.state / "premises").exists()


@pytest.mark.slow
def test_premises_of_a_refused_password(scene: Scene, capsys: Any) -> None:
    """It may come from a place that no path tells of; the next run compares."""
    scene.write("password0", b"wrong\n", 0o600)
    assert whole(scene, "--renew") == 13
    assert whole(scene) in (0, 13)
    assert not (scene.state / "premises").exists()


@pytest.mark.slow
def test_premises_of_a_name_that_the_resolver_gave(tmp_path: Path, ca: LabCA, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Until the first success the name is not latched, and another answer is another request."""
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "host1.lab.test", ("127.0.0.1", 0))]
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, *rest, **named: answers if port is None else real(host, port, *rest, **named))
    ca.switches.update({"mode": "pending"})
    with LabHost(tmp_path / "host", key="ec:secp256r1") as host:
        host.start()
        scene = Scene(host, [ca], {"name": "auto"})
        assert scene.run().status == 7
        assert whole(scene) == 7
        assert not (scene.state / "premises").exists()


@pytest.mark.slow
def test_a_status_that_can_not_be_replaced(scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The whole program looks, and says so; what was begun is taken away again."""
    assert whole(scene) == 0

    def full(*_arguments: object, **_named: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", full)
        assert answer(scene) is None
    assert os.listdir(below(scene, "/run/scx-enroll")) == ["status.json"]
    assert answer(scene) == 0


@pytest.mark.slow
def test_premises_that_outlive_a_certificate_at_hand(scene: Scene, capsys: Any) -> None:
    """What it was judged by may end before it: an intermediate, a root, one that issuer-trust holds beside."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.timezone.utc)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ends soon")])
    soon = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(hours=1)).sign(key, hashes.SHA256())
    )
    scene.write("ca0.pem", Path(scene.cas[0].issuer_trust).read_bytes() + soon.public_bytes(serialization.Encoding.PEM))
    assert whole(scene) == 0
    assert int(premises_of(scene)["until"]) - time.time() < 3601


@pytest.mark.slow
def test_premises_of_an_agent_that_is_not_what_it_seems(scene: Scene, capsys: Any) -> None:
    """It listens and has no pid file: what runs there may change without a trace."""
    below(scene, "/var/opt/omi/run/omiserver.pid").unlink()
    assert whole(scene) == 0
    assert not (scene.state / "premises").exists()


@pytest.mark.slow
def test_a_refusal_is_swallowed(tmp_path: Path, ca: LabCA, capsys: Any) -> None:
    """What a person must mend fails each hour for the timer, too, idle or not."""
    ca.switches.update({"mode": "deny", "deny_hresult": 0x80094800})
    with LabHost(tmp_path / "host", key="ec:secp256r1") as host:
        host.start()
        scene = Scene(host, [ca])
        assert scene.run().status == 6
        assert whole(scene) == 6
        told = capsys.readouterr()
        assert (answer(scene, "--unattended"), capsys.readouterr()) == (6, told)


@pytest.mark.slow
def test_an_absolute_link_leads_out_of_a_tree(scene: Scene, capsys: Any) -> None:
    """In a tree without the agent's folder a link comes up: it is followed inside, as the whole program does, so it is a change."""
    opt, srv = Path(scene.host.root, "opt"), Path(scene.host.root, "srv/agent")
    srv.parent.mkdir()
    opt.rename(srv)
    assert (whole(scene), whole(scene)) == (4, 4), "the first one writes down that the agent is gone"
    assert answer(scene) == 4
    opt.symlink_to("/srv/agent")
    assert answer(scene) is None


@pytest.mark.slow
def test_a_status_folder_that_is_exchanged_meanwhile(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Between the check and the file the tree's owner puts a link in its place: nothing is written where it leads."""
    assert whole(scene) == 0
    folder, kept = below(scene, "/run/scx-enroll"), tmp_path / "elsewhere"
    kept.mkdir()
    holds = idle._holds

    def exchanging(claim: str) -> bool:
        held = holds(claim)
        if claim.startswith("port ") and not folder.is_symlink():
            folder.rename(folder.with_name("moved"))
            folder.symlink_to(kept)
        return held

    monkeypatch.setattr(idle, "_holds", exchanging)
    assert answer(scene) is None
    folder.unlink()
    shutil.copytree(folder.with_name("moved"), folder)
    monkeypatch.setattr(idle, "_holds", holds)
    assert answer(scene) is None, "another folder of the same name"
    assert os.listdir(kept) == []


@pytest.mark.slow
def test_a_status_folder_that_fails_a_run_that_has_ended_well(scene: Scene, capsys: Any) -> None:
    """The status can't be published, so there are no premises either; the run's own status stays."""
    folder = below(scene, "/run/scx-enroll")
    folder.parent.mkdir(exist_ok=True)
    folder.symlink_to("scx-enroll")
    assert whole(scene) == 0
    assert "note: " in capsys.readouterr().err
    assert not (scene.state / "premises").exists()


def test_what_two_looks_saw_differently(tmp_path: Path) -> None:
    """A file that changed in the middle of a run was one thing for one decision and another for the next: no premise."""
    root = Root(str(tmp_path))
    assert premises._quiet(root)
    assert root.entry("/file").kind == "absent"
    (tmp_path / "file").touch()
    assert root.entry("/file").kind == "file"
    assert not premises._quiet(root)


@pytest.mark.slow
def test_a_stale_pid_of_zypper_comes_to_life(scene: Scene, capsys: Any) -> None:
    """Its file stays behind; another process may get the number, and the whole program then waits (L3)."""
    child = subprocess.Popen(["true"])
    child.wait()
    below(scene, "/run").joinpath("zypp.pid").write_text(f"{child.pid}\n")
    assert whole(scene) == 0
    assert answer(scene) == 0
    claim(scene, f"process ended {child.pid}", f"process ended {os.getpid()}")
    assert answer(scene) is None


@pytest.mark.slow
def test_premises_that_can_not_be_written(scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The run's own answer counts; the next one looks again, that is all."""
    def full(*_arguments: object) -> None:
        raise premises_full

    from scx_enroll.errors import HostError
    from scx_enroll.store import Store
    premises_full = HostError("can't write premises.json: no space")
    monkeypatch.setattr(Store, "save_premises", full)
    assert whole(scene) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert answer(scene) is None


@pytest.mark.slow
def test_premises_are_open_to_others(scene: Scene, capsys: Any) -> None:
    """They tell of paths and times only, but are state like all else; no key and no password is in them."""
    assert whole(scene) == 0
    path = scene.state / "premises"
    assert path.stat().st_mode & 0o777 == 0o600
    data = path.read_bytes()
    assert scene.cas[0].password.encode() not in data
    assert b"PRIVATE" not in data


class Crash(BaseException):
    """The power failed."""


@pytest.mark.slow
def test_an_idle_run_that_is_killed_leaves_half_a_status(scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Before each of its calls to the system: the status file is whole, and the next run ends well and clears up."""
    assert whole(scene) == 0
    status = Path(scene.host.root, "run/scx-enroll/status.json")
    points = 0
    for name in ("open", "lstat", "fstat", "fchmod", "rename", "close", "kill"):
        real = getattr(os, name)
        for point in range(1, 60):
            left = [point]

            def failing(*arguments: Any, real: Any = real, left: List[int] = left, **named: Any) -> Any:
                left[0] -= 1
                if not left[0]:
                    raise Crash
                return real(*arguments, **named)

            monkeypatch.setattr(os, name, failing)
            try:
                answer(scene)
                break
            except Crash:
                points += 1
            finally:
                monkeypatch.setattr(os, name, real)
            assert json.loads(status.read_text())["exit_status"] == 0
    assert points > 50
    assert answer(scene) == 0
    assert whole(scene) == 0
    assert os.listdir(status.parent) == ["status.json"]


# -- the property: what it answers, the whole program answers ---------------------------------------------------------


CHANGES = [change for change in MISSES if "agent " not in change and not change.startswith(("restarted", "premises", "another ", "a time", "clock", "nobody", "a part", "a claim", "a status f", "installed"))]


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.sampled_from([*CHANGES, *["neighbours", "a run", "a run"] * 8]), min_size=2, max_size=5))
def test_premises_hold_and_the_plan_has_something_to_do(changes: List[str], scene: Scene, tmp_path: Path) -> None:
    """Whatever others do to a tree, in any order: an answer is given only where a whole look comes to the same, word for word."""
    as_it_was(scene, tmp_path / "saved")
    run = scene.argv("run", live=False)[1:]  # an agent that is restarted each time would take minutes
    cli.main(run)
    for change in changes:
        with suppress(OSError, StopIteration, AssertionError):  # some can't be done after others
            nothing_of_ours(scene) if change == "neighbours" else cli.main(run) if change == "a run" else MISSES[change](scene)
        known = scene.state / "premises"
        before = known.read_bytes() if known.exists() else b""
        status = answer(scene, live=False)
        event("missed" if status is None else "answered")
        if status is None:
            continue
        result = enroll.inspect(scene.root(live=False), Options(), scene.tools())
        assert result.step.action in ("nothing", "wait", "hold")
        first, second = before.decode().split("\0")[-2:]
        assert json.loads(f"{first}0{second}") == report.document(result, 0)


def as_it_was(scene: Scene, saved: Path) -> None:
    """Put the tree back as it was at the first call."""
    root = Path(scene.host.root)
    if not saved.exists():
        subprocess.run(["cp", "-a", str(root), str(saved)], check=True)  # owners, too
    shutil.rmtree(root)
    subprocess.run(["cp", "-a", str(saved), str(root)], check=True)


# -- any bytes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with a state directory, a status folder and one file to look at."""
    base = tmp_path_factory.mktemp("tree").resolve()
    for folder in ("var/lib/scx-enroll", "run/scx-enroll"):
        (base / folder).mkdir(parents=True)
    return base


def good(base: Path) -> Dict[str, Any]:
    """Premises that hold in the tree."""
    folder = f"{base}/run/scx-enroll"
    return {
        "here": idle.here(str(base), "", live=False), "at": 0, "until": 10**10, "folder": folder, "exit_status": 0, "quiet_status": 0,
        "claims": f"looked {idle.stands(str(base))} {base}\nlooked {idle.stands(folder)} {folder}", "text": "nothing to do\n",
        "before": '{\n "time": ', "after": "\n}\n",
    }


def ask(base: Path, data: bytes) -> Any:
    """Answer a plain run with these bytes as premises."""
    path = base / "var/lib/scx-enroll/premises"
    path.write_bytes(data)
    path.chmod(0o600)
    return idle.answer(["run", "--root", str(base)])


def test_premises_that_hold(tree: Path, capsys: Any) -> None:
    """The example that the next tests spoil."""
    assert ask(tree, written(good(tree))) == 0
    assert capsys.readouterr().out == "nothing to do\n"


@given(st.binary(max_size=200) | st.lists(st.text(max_size=5), max_size=12).map(lambda parts: "\0".join(parts).encode("utf-8", "replace")))
def test_bytes_that_are_no_premises(tree: Path, data: bytes) -> None:
    """A disk's rubbish is a miss: nothing is raised, said or written."""
    assert ask(tree, data) is None
    assert os.listdir(tree / "run/scx-enroll") in ([], ["status.json"])


@given(st.sampled_from(PARTS[:7]), st.text(max_size=9) | st.sampled_from(["-1", "1e9", "looked  /nowhere", "port 0, 0", "\n", "9" * 5000]))
def test_premises_with_one_wrong_part(tree: Path, part: str, value: str) -> None:
    """What is not understood is a miss; a number in its place is one."""
    found = ask(tree, written({**good(tree), part: value}))
    if part == "exit_status":
        assert found is None or found == int(value)
    elif part in ("quiet_status", "at", "until"):
        assert found in (None, 0)
    else:
        assert found is None


@pytest.mark.parametrize("what", ["stdout", "stderr"])
def test_a_reader_that_has_gone(tree: Path, what: str) -> None:
    """A broken pipe, or no descriptor at all, changes no status."""
    known = {**good(tree), "exit_status": 7, "quiet_status": 0} if what == "stderr" else good(tree)
    ask(tree, written(known))
    program = f"import sys; sys.path[:0] = {sys.path!r}; from scx_enroll.__main__ import main; sys.exit(main())"
    argv = [sys.executable, "-I", "-S", "-c", program, "run", "--root", str(tree)]
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(argv, check=False, **{what: writer}, **({"stderr": subprocess.PIPE} if what == "stdout" else {"stdout": subprocess.PIPE}))
    os.close(writer)
    assert (ran.returncode, ran.stdout or b"", ran.stderr or b"") == (known["exit_status"], b"", b"")
    closed = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *argv], check=False)
    assert closed.returncode == known["exit_status"]


def test_a_ctrl_c_shows_a_traceback(tree: Path) -> None:
    """Pressed while the program starts: it ends as one that the signal killed, without a word."""
    program = (
        f"import sys; sys.path[:0] = {sys.path!r}; from scx_enroll import idle, __main__ as m\n"
        "def pressed(arguments): raise KeyboardInterrupt\n"
        "idle.answer = pressed\nsys.exit(m.main())"
    )
    ran = subprocess.run([sys.executable, "-I", "-S", "-c", program, "run"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (-2, "", "")


def test_a_file_that_is_locked_by_nobody(tmp_path: Path) -> None:
    """Our own locks are none, as fcntl(2) has it; those of others are the other tests' business."""
    path = tmp_path / "lock"
    path.touch()
    with path.open("r+b") as file:
        assert not idle.is_locked(file.fileno())
        fcntl.lockf(file, fcntl.LOCK_EX)
        assert not idle.is_locked(file.fileno())
