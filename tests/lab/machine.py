"""Throwaway Debian machines: a release's own systemd as the first process of a container, the agent at its real paths, a CA.

    with Image("trixie", tmp_path / "image") as image:
        image.copy(package, "/srv/scx-enroll.deb")
        image.chroot("dpkg", "-i", "/srv/scx-enroll.deb")
        image.install_agent()  # once for all machines of this image, or machine.install_agent() for a key of its own
        with Machine(image, "host1") as machine, machine.ca(tmp_path / "ca") as ca:
            machine.copy(ca.server_trust, "/etc/scx-enroll/https.pem")
            machine.run("scx-enroll", "run")
            assert machine.served() == ...

Both are overlays over the release's tree in `roots`, an image is not booted, a machine begins with what its image holds. A machine
is alone in a network of its own, with the addresses 127.0.0.1 and 10.53.0.1; the CA listens on the latter, as ca01.lab.test, and
runs on the test machine's Python, so that a release needs nothing for it. `tests/lab` is seen at /run/lab/tests/lab.

Everything hangs on one process for each machine that ends when the test's process does, for whatever reason; with it go all
others, the mounts and the network. It takes root, and what `missing` names.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Tuple, TypeVar, Union

from . import roots
from .agent import fingerprint, served_leaf
from .kdc import Kdc

if TYPE_CHECKING:
    from types import TracebackType

T = TypeVar("T")
Done = subprocess.CompletedProcess[str]
PathName = Union[str, "os.PathLike[str]"]

ADDRESS = "10.53.0.1"
CA_NAMES = ("ca01.lab.test", "ca02.lab.test", "ca.lab.test")
LAB = ("/run/lab", os.path.dirname(os.path.abspath(__file__)))  # where a machine sees this package, and where it is
ALONE = {"PYTHONPATH": LAB[0], "PYTHONDONTWRITEBYTECODE": "1"}
BOOT_LIMIT_S = 60.0  # takes half a second on a machine with nothing else to do
CLONE_NEWNET = 0x40000000
MAX_SHOWN_CHARS = 4000

# Names of its own below /run, and an address that servers may take before it is there. Lives until its input ends.
KEEPER = """
mkdir -p /run/systemd/nspawn
mount -t tmpfs tmpfs /run/systemd/nspawn
ip link set lo up
echo 1 >/proc/sys/net/ipv4/ip_nonlocal_bind
echo ready
read -r end || :
"""
# The mount is this boot's, and goes with it. The control group is the machine's: others would meet in one.
BOOT = """
mount -t overlay overlay -o "$1" "$2"
echo 0 >"$3/cgroup.procs"
shift 3
exec "$@"
"""
# Whoever signs in is in a scope of his own, whatever he leaves behind too. Through the machine's own view of its control groups,
# which a process of another one may not join from inside.
ENTER = """
echo 0 >"/proc/$1/root/sys/fs/cgroup/init.scope/cgroup.procs"
leader=$1
shift
exec nsenter --target "$leader" --all "$@"
"""
PUT = 'mkdir -p "$(dirname "$1")" && rm -f "$1" && umask 077 && cat >"$1" && chmod "$2" "$1"'

_numbers = itertools.count(1)


class Trouble(AssertionError):
    """A command failed, or nothing happened in time; with what there is to read about it."""


def missing() -> str:
    """Return what this machine lacks for machines, with the packages that bring it; "" for nothing."""
    lacks = roots.missing("nsenter", "ip", "systemd-nspawn", "chroot")
    if lacks:
        return lacks
    try:
        _cgroups()
    except OSError:
        return "version 2 of control groups, mounted and writable"
    with tempfile.TemporaryDirectory() as folder:
        options = roots.overlay(["/etc"], folder)
        words = ["unshare", "--mount", "--net", "--pid", "--fork", "mount", "-t", "overlay", "overlay", "-o", options, f"{folder}/tree"]
        tried = subprocess.run(words, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return f"overlays in name spaces: {tried.stdout.strip()}" if tried.returncode else ""


def wait_for(happens: Callable[[], T], timeout: float = 30.0, what: str = "") -> T:
    """Return the first true value of `happens`, asked ten times a second. Raises Trouble when there is none in time."""
    deadline = time.monotonic() + timeout
    while True:
        found = happens()
        if found:
            return found
        if time.monotonic() > deadline:
            raise Trouble(f"not in {timeout:.0f} s: {what or happens}; at last {found!r}")
        time.sleep(0.1)


def _ran(words: List[str], *, shown: str, check: bool, timeout: float, input: Union[str, bytes, None]) -> Done:
    """Run a command; its two outputs are kept apart. Raises Trouble unless it ends in time, and with status 0 where `check`."""
    data = input.encode() if isinstance(input, str) else input
    given: Dict[str, Any] = {"stdin": subprocess.DEVNULL} if data is None else {"input": data}
    try:
        done = subprocess.run(words, check=False, capture_output=True, timeout=timeout, **given)
    except subprocess.TimeoutExpired as late:
        raise Trouble(f"{shown}: not done after {timeout:.0f} s\n{late.stdout!r}\n{late.stderr!r}") from late
    out, err = (text.decode("utf-8", "backslashreplace") for text in (done.stdout, done.stderr))
    if check and done.returncode:
        raise Trouble(f"{shown}: exit status {done.returncode}\n{out[-MAX_SHOWN_CHARS:]}\n{err[-MAX_SHOWN_CHARS:]}")
    return subprocess.CompletedProcess(list(done.args), done.returncode, out, err)


class Tree:
    """What an image and a machine have in common: files, and commands that are run among them."""

    def run(
        self, *argv: str, check: bool = True, timeout: float = 60.0, input: Union[str, bytes, None] = None, env: Optional[Dict[str, str]] = None
    ) -> Done:
        """Run a command in it, in a clean environment. Raises Trouble as `_ran` does."""
        raise NotImplementedError

    def shell(self, script: str, *argv: str, check: bool = True, timeout: float = 60.0) -> Done:
        """Run a script; it ends at its first failure."""
        return self.run("sh", "-euc", script, "sh", *argv, check=check, timeout=timeout)

    def write(self, path: str, data: Union[str, bytes], mode: int = 0o644) -> None:
        """A file of root's has this content and mode, and the folders above it are there."""
        self.run("sh", "-ec", PUT, "sh", path, f"{mode:o}", input=data)

    def copy(self, source: PathName, path: str, mode: int = 0o644) -> None:
        """A file of the test machine's stands there too, as `write` writes it."""
        self.write(path, Path(source).read_bytes(), mode)

    def read(self, path: str) -> str:
        """Return a file's text."""
        return self.run("cat", path).stdout

    def agent(self, *words: str, check: bool = True) -> Done:
        """Run `python3 -m tests.lab.agent --root /` with a verb: show, scom-sign, omi-upgrade, set NAME=VALUE, ..."""
        return self.run("python3", "-m", "tests.lab.agent", "--root", "/", *words, check=check, env=ALONE)

    def _make_agent(self, host: str, domain: str, key: str, layout: str) -> None:
        self.agent("make", "--machine", "--host", host, "--domain", domain, "--key", key, "--layout", layout)


class Image(Tree):
    """A release that is not booted, over its tree in `roots`; what is changed goes to `folder`, and away when it is closed.

    While machines over it run, nothing may be changed in it.
    """

    def __init__(self, suite: str, folder: PathName, layers: Tuple[str, ...] = ()) -> None:
        """Make the folder; nothing is mounted but while a command runs. `layers`: of another image, to begin with."""
        self.suite = suite
        self.folder = os.path.realpath(folder)
        self.lower = layers or (roots.root(suite),)
        os.makedirs(self.folder, mode=0o755)

    @property
    def layers(self) -> Tuple[str, ...]:
        """What another image, or a machine, begins with."""
        roots.overlay(self.lower, self.folder)  # makes the folders
        return (os.path.join(self.folder, "upper"), *self.lower)

    def __enter__(self) -> Image:
        """Return the image."""
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        """Remove it."""
        self.close()

    def close(self) -> None:
        """What was changed is gone."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(
        self, *argv: str, check: bool = True, timeout: float = 60.0, input: Union[str, bytes, None] = None, env: Optional[Dict[str, str]] = None
    ) -> Done:
        """Run a command with the image as its root and systemd not running; /run is empty, and gone afterwards."""
        words = roots.entering(
            self.lower, self.folder, argv, empty="run", bind=(LAB[1], f"{LAB[0]}/tests/lab"), environment=env or {}
        )
        return _ran(words, shown=f"{self.suite}: {' '.join(argv)}", check=check, timeout=timeout, input=input)

    chroot = run

    def install_agent(
        self, host: str = "host1", key: str = "rsa:2048", layout: str = "omi", *, domain: str = "lab.test"
    ) -> None:
        """The stand-in agent is installed and enabled; its pair is the same on all machines of this image."""
        self._make_agent(host, domain, key, layout)


class Machine(Tree):
    """A machine that begins with what an image holds, booted on entering, and again as often as wanted; at the end it is gone.

    `network`: "up", or "late" for one that has no address but the loopback ones before `network_up`. Its machine ID is its own
    unless the image has one.
    """

    def __init__(self, image: Image, name: str, *, domain: str = "lab.test", network: str = "up") -> None:
        """Make its files and its network; it is not booted. While it is off, `off` is its files, to be changed."""
        if network not in ("up", "late"):
            raise ValueError(network)
        self.name = name
        self.domain = domain
        self.fqdn = f"{name}.{domain}" if domain else name
        self.off = Image(image.suite, os.path.join(image.folder, "machines", name), image.layers)
        self.off.write("/etc/hostname", f"{name}\n")
        self.off.write("/etc/hosts", f"{roots.HOSTS}127.0.1.1 {self.fqdn}{f' {name}' if domain else ''}\n{ADDRESS} {' '.join(CA_NAMES)}\n")
        self._leader = 0
        self._nspawn: Optional[subprocess.Popen[bytes]] = None
        self._started: List[subprocess.Popen[str]] = []
        self._kdcs: List[Kdc] = []
        self._cgroup = os.path.join(_cgroups(), f"scx-lab-{os.getpid()}-{next(_numbers)}")
        _sweep()
        os.mkdir(self._cgroup)
        words = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec", KEEPER]
        self._keeper = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if not self._keeper.stdout or self._keeper.stdout.readline() != b"ready\n":
            self.close()
            raise Trouble(f"{name}: no network of its own")
        self._inner = _children(self._keeper.pid)[0]
        if network == "up":
            self.network_up()

    def __enter__(self) -> Machine:
        """Boot it."""
        try:
            self.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        """Remove it."""
        self.close()

    # on and off

    def boot(self, timeout: float = BOOT_LIMIT_S) -> None:
        """It is up: all that its systemd had to start was started or has failed. Raises Trouble."""
        layers, folder = self.off.lower, self.off.folder
        nspawn = (
            "systemd-nspawn", "--boot", "--directory", f"{folder}/tree", f"--machine={self.name}", "--register=no", "--keep-unit",
            "--network-namespace-path=/proc/self/ns/net", "--resolv-conf=off", "--timezone=off", "--link-journal=no", "--console=pipe",
            f"--bind-ro={LAB[1]}:{LAB[0]}/tests/lab",
        )  # fmt: skip
        words = [*self._outside_words(), "unshare", "--mount", "sh", "-ec", BOOT, "boot"]
        words += [roots.overlay(layers, folder), f"{folder}/tree", self._cgroup, *nspawn]
        environment = {"PATH": os.environ.get("PATH", roots.PATH), "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
        with open(f"{folder}/console", "ab") as console:
            self._nspawn = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, env=environment
            )
        deadline = time.monotonic() + timeout
        while not self._find_leader():
            if self._nspawn.poll() is not None or time.monotonic() > deadline:
                raise Trouble(f"{self.name} did not boot\n{self.console()}")
            time.sleep(0.02)
        words = ["nsenter", "--target", str(self._leader), "--all", "systemctl", "is-system-running", "--wait"]
        state = _ran(words, shown="boot", check=False, timeout=timeout, input=None).stdout.strip()
        if state not in ("running", "degraded"):
            raise Trouble(f"{self.name} booted to {state!r}\n{self.console()}")

    def poweroff(self, timeout: float = BOOT_LIMIT_S) -> None:
        """It is off, after an orderly shutdown. Raises Trouble."""
        if self._nspawn is None:
            return
        os.kill(self._leader, signal.SIGRTMIN + 4)
        try:
            self._nspawn.wait(timeout)
        except subprocess.TimeoutExpired:
            raise Trouble(f"{self.name} did not shut down\n{self.console()}") from None
        self._is_off()

    def cut_power(self) -> None:
        """It is off, and nothing on it had time for anything; what was written is there, as nothing of the kernel's is lost."""
        if self._nspawn is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._leader or self._nspawn.pid, signal.SIGKILL)
        self._nspawn.wait(BOOT_LIMIT_S)
        self._is_off()

    def reboot(self) -> None:
        """It was shut down and is up again, with its files as they were, /run and /tmp empty. Raises Trouble."""
        self.poweroff()
        self.boot()

    def close(self) -> None:
        """Nothing of it is left: processes, mounts, network, files."""
        self._keeper.kill()  # and with it all others, which those that wait for them outside notice
        for kdc in self._kdcs:
            kdc.stop()
        for process in (*self._started, self._nspawn):
            if process:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(BOOT_LIMIT_S)
                if process.stdout:
                    process.stdout.close()
        for pipe in (self._keeper.stdin, self._keeper.stdout):
            if pipe:
                pipe.close()
        self._keeper.wait()
        self._is_off()
        _remove_group(self._cgroup)
        self.off.close()

    def _is_off(self) -> None:
        self._nspawn, self._leader = None, 0

    def _find_leader(self) -> bool:
        """Tell whether its first process is systemd and can be asked."""
        assert self._nspawn
        for parent in _children(self._nspawn.pid):
            for child in _children(parent):
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{child}/comm").read_text(encoding="ascii") == "systemd\n" and os.path.exists(
                        f"/proc/{child}/root/run/systemd/private"
                    ):
                        self._leader = child
                        return True
        return False

    def console(self) -> str:
        """Return the end of what it said while it booted."""
        text = Path(self.off.folder, "console").read_text(encoding="utf-8", errors="backslashreplace")
        return text[-MAX_SHOWN_CHARS:]

    # doing things on it

    def run(
        self, *argv: str, check: bool = True, timeout: float = 60.0, input: Union[str, bytes, None] = None, env: Optional[Dict[str, str]] = None
    ) -> Done:
        """Run a command as root does who has signed in: in a scope of its own, with nothing of the test's environment.

        Raises Trouble where it fails and `check`, or isn't done in time; it may go on then.
        """
        return _ran(self._words(argv, env), shown=f"{self.name}: {' '.join(argv)}", check=check, timeout=timeout, input=input)

    def spawn(self, *argv: str, env: Optional[Dict[str, str]] = None) -> subprocess.Popen[str]:
        """Start a command as `run` does, with a pipe for both its outputs; it ends with the machine."""
        started = subprocess.Popen(
            self._words(argv, env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._started.append(started)
        return started

    def _words(self, argv: Tuple[str, ...], env: Optional[Dict[str, str]]) -> List[str]:
        if not self._leader:
            raise Trouble(f"{self.name} is off")
        settings = {"PATH": roots.PATH, "HOME": "/root", "LANG": "C.UTF-8", **(env or {})}
        clean = ["env", "-i", *(f"{name}={value}" for name, value in settings.items())]
        return ["sh", "-ec", ENTER, "enter", str(self._leader), *clean, "systemd-run", "--quiet", "--scope", "--collect", "--", *argv]

    def unit(self, name: str, property: str) -> str:
        """Return a property of a unit as systemd shows it."""
        return self.run("systemctl", "show", "--value", "-p", property, name).stdout.strip()

    def journal(self, unit: str) -> str:
        """Return the messages of a unit, and of systemd about it, since boot."""
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "--quiet", "-b", "-o", "cat", "-u", unit).stdout

    def wait_for(self, happens: Callable[[], T], timeout: float = 30.0, what: str = "") -> T:
        """As `wait_for`."""
        return wait_for(happens, timeout, f"{self.name}: {what or happens}")

    # its network

    def network_up(self) -> None:
        """It has its address, and reaches the CA."""
        self.outside("ip", "address", "add", f"{ADDRESS}/24", "dev", "lo")

    def network_down(self) -> None:
        """It has the loopback addresses only."""
        self.outside("ip", "address", "del", f"{ADDRESS}/24", "dev", "lo")

    def outside(self, *argv: str, check: bool = True, timeout: float = 60.0) -> Done:
        """Run a command of the test machine in this machine's network."""
        words = [*self._outside_words(), *argv]
        return _ran(words, shown=f"beside {self.name}: {' '.join(argv)}", check=check, timeout=timeout, input=None)

    def _outside_words(self) -> List[str]:
        return ["nsenter", "--target", str(self._inner), "--mount", "--net", "--pid"]

    def in_network(self, act: Callable[[], T]) -> T:
        """Return what `act` returns, done in a thread whose new sockets are in this machine's network."""
        found: List[T] = []
        failed: List[BaseException] = []

        def enter() -> None:
            try:
                with open(f"/proc/{self._inner}/ns/net", "rb") as space:
                    libc = ctypes.CDLL(None, use_errno=True)
                    if libc.setns(space.fileno(), CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                found.append(act())
            except BaseException as error:  # noqa: BLE001 - raised again where it was asked for
                failed.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return found[0]

    def served(self, port: int = 1270) -> str:
        """Return the SHA-256 of the leaf that is served, in hex; "" where nothing listens."""
        return self.in_network(lambda: fingerprint(served_leaf(port)))

    def kdc(self, folder: PathName, *, settings: Mapping[str, str] = MappingProxyType({}), keytab: str = "/etc/krb5.keytab") -> Kdc:
        """Return a KDC that answers in this machine's network, whether or not that is up; it ends with the machine at the latest.

        This machine has joined the realm, LAB.TEST: it has its krb5.conf, and a keytab of the account SHORTNAME$.
        """
        made = Kdc(folder, address=ADDRESS, port=88, settings=settings, enter=self._outside_words())
        self._kdcs.append(made)
        account = f"{self.name.upper()}$"
        made.add(account)
        made.start()
        self.copy(made.config, "/etc/krb5.conf")
        self.copy(made.keytab(os.path.join(folder, "machine.keytab"), account), keytab, 0o600)
        return made

    def ca(self, folder: PathName, *options: str, name: str = CA_NAMES[0], port: int = 443, kdc: Optional[Kdc] = None) -> CA:
        """Return a CA that listens in this machine's network, whether or not that is up; `options` as of `tests.lab.ca`.

        `kdc`: of the realm in whose name it takes Kerberos, as the switch `auth` says from the beginning.
        """
        if kdc:
            service = f"HTTP/{name}"
            if not kdc.knows(service):
                kdc.add(service)
            os.makedirs(folder, exist_ok=True)
            keytab = kdc.keytab(os.path.join(folder, "http.keytab"), service)
            options = ("--kerberos-keytab", keytab, "--begin", "auth=kerberos", *options)
        command = [sys.executable, "-I", "-m", f"{__package__}.ca", "--directory", os.fspath(folder)]
        serving = ["--address", ADDRESS, "--server-name", name, "--port", str(port), *options]
        return CA(self._outside_words(), command, serving, Path(folder))

    # its agent

    def install_agent(self, key: str = "rsa:2048", layout: str = "omi", *, started: bool = True) -> None:
        """The stand-in agent is installed and enabled, with a pair of its own; `started`: and serves it."""
        self._make_agent(self.name, self.domain, key, layout)
        if started:
            self.agent("start")


class CA:
    """The lab's CA as a process in a machine's network; its files are in `directory`."""

    def __init__(self, enter: List[str], command: List[str], serving: List[str], directory: Path) -> None:
        """Start it, and wait until it listens. Raises Trouble."""
        self.directory = directory
        self._command = command
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / "output", "wb") as output:
            self._process = subprocess.Popen(
                [*enter, *command, *serving], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

        def listens() -> bool:
            if self._process.poll() is not None:
                raise Trouble(f"the CA ended\n{(directory / 'output').read_text(encoding='utf-8')}")
            return (directory / "ready.json").exists()

        wait_for(listens, what="the CA listens")
        ready: Dict[str, Any] = json.loads((directory / "ready.json").read_text(encoding="utf-8"))
        self.server = str(ready["server"])
        self.server_trust = str(ready["server_trust"])
        self.issuer_trust = str(ready["issuer_trust"])
        self.user = str(ready["user"])
        self.password = Path(ready["password_file"]).read_text(encoding="utf-8").strip()

    def __enter__(self) -> CA:
        """Return the CA."""
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        """End it."""
        self.close()

    def close(self) -> None:
        """It does not listen any more."""
        for child in _children(self._process.pid):  # nsenter passes no signal on
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def steer(self, *options: str) -> str:
        """Steer it as `tests.lab.ca` does: "--set", "mode=pending", "--approve", "1", ...; returns what is said."""
        words = [*self._command, *options]
        return _ran(words, shown=" ".join(words), check=True, timeout=60, input=None).stdout

    @property
    def posts(self) -> int:
        """How many submissions were let in."""
        return int(self._table()["posts"])

    @property
    def requests(self) -> List[Dict[str, Any]]:
        """The last 100 requests, as `server.Seen` describes them."""
        requests: List[Dict[str, Any]] = self._table()["requests"]
        return requests

    @property
    def rows(self) -> List[Dict[str, Any]]:
        """The request table."""
        rows: List[Dict[str, Any]] = self._table()["rows"]
        return rows

    def _table(self) -> Dict[str, Any]:
        self.steer("--rows")  # has it written as it is now
        table: Dict[str, Any] = json.loads((self.directory / "rows.json").read_text(encoding="utf-8"))
        return table


def _children(parent: int) -> List[int]:
    found = []
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = Path(path).read_text(encoding="latin-1").rpartition(")")[2].split()
            if int(fields[1]) == parent:
                found.append(int(path.split("/")[2]))
    return found


def _cgroups() -> str:
    """Return the folder of this process's own control group, version 2; machines get theirs below it. Raises OSError."""
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    mount = re.search(r"^\S+ \S+ \S+ (\S+) (\S+) .* - cgroup2 ", mounts, re.MULTILINE)
    own = re.search(r"^0::(.*)$", Path("/proc/self/cgroup").read_text(encoding="utf-8"), re.MULTILINE)
    if not mount or not own:
        raise FileNotFoundError(2, "no control groups, version 2")
    folder = os.path.normpath(f"{mount[2]}/{os.path.relpath(own[1], mount[1])}")
    if not os.access(f"{folder}/cgroup.procs", os.W_OK):
        raise PermissionError(13, "control groups can't be made", folder)
    return folder


def _sweep() -> None:
    """Remove the control groups of tests that were killed."""
    for group in glob.glob(os.path.join(_cgroups(), "scx-lab-*")):
        if not os.path.isdir(f"/proc/{group.split('-')[-2]}"):
            _remove_group(group, timeout=0.0)


def _remove_group(group: str, timeout: float = 5.0) -> None:
    """A control group and those below it are gone, unless processes of it are still on their way out after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while os.path.isdir(group):
        for folder, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        if time.monotonic() >= deadline:
            return
        time.sleep(0.02)
