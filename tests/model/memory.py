"""The lab in memory: an agent and a CA that are plain objects, on a tree in the memory's file system.

The tree is `LabHost`'s own, so what other owners do to its files is done by the same code. The agent has the habits of the facts
page (sections 3 and 4): status 0 when dead, a stop that outlasts the restart's patience, a start limit, a stray process.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, ClassVar, Dict, Iterator, List, Optional, Tuple, Union
from unittest.mock import patch

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

import scx_enroll
from scx_enroll import agent as agents
from scx_enroll import hresult, keys, outcomes, records, service, unit, verify
from scx_enroll.errors import EnrollError
from scx_enroll.rootfs import Root
from scx_enroll.service import Patience, Served
from tests.lab import packagescripts, selfsigned, standin
from tests.lab.agent import LabHost, fingerprint
from tests.lab.authority import Authority
from tests.model.world import LEAF_S, Clock, World
from tests.test_crash import Fuse

STOPS_S, STARTS_S = 0.03, 0.05
POLLS = 20  # of a restart, for the server to end
RETRY_S, RETRIES, LIMIT, LIMIT_S = 5.0, 3, 5, 10.0  # systemd's, of the unit
TICK_S = 0.001
NEVER = float("inf")
FIRST_PID = 5_000_000  # beyond any real one


@lru_cache(maxsize=4096)
def loads(certificate: bytes, key: bytes) -> Optional[bytes]:
    """Return the leaf (DER) that the agent would serve, None where it dies of the pair."""
    try:
        text = certificate.decode("latin-1")
        der = ssl.PEM_cert_to_DER_cert(text[text.index("-----BEGIN CERTIFICATE-----") : text.index("-----END CERTIFICATE-----") + 25])
        public = serialization.load_pem_private_key(key, None).public_key()
        spki = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, TypeError):
        return None
    return der if spki in der else None


@lru_cache(maxsize=4096)
def printed(certificate: bytes) -> str:
    """Return what the packages look at of what openssl prints of a certificate."""
    try:
        return f"Public-Key: ({verify.facts(verify.read(certificate)[0]).key.rpartition(':')[2].replace('secp256r1', '256')} bit)"
    except (EnrollError, IndexError):
        return ""


class MemoryHost(LabHost):
    """A host whose agent is this object."""

    def __init__(self, root: str, clock: Clock, **options: Any) -> None:
        self.clock = clock
        self.running_pid = 0
        self.leaf_served: Optional[bytes] = None
        self.stray = False
        self.gone_at = self.again_at = NEVER
        self.retries = 0
        self.pids = itertools.count(FIRST_PID)
        self.begun: List[float] = []
        super().__init__(root, port=1270, key="ec:secp256r1", **options)

    # -- its process ----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Let what was to happen until now happen."""
        if self.clock.now() >= self.gone_at:
            self._end(clean=True)
        if self.clock.now() >= self.again_at:
            self._launch(again=True)

    def _end(self, *, clean: bool) -> None:
        self.running_pid, self.leaf_served, self.stray, self.gone_at = 0, None, False, NEVER
        if clean:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path(self.place.pid))

    @property
    def pid(self) -> int:
        self.settle()
        return self.running_pid

    @property
    def starts(self) -> int:
        return len(self.begun)

    def served(self, timeout: float = 5.0, address: str = "127.0.0.1") -> Optional[bytes]:
        self.settle()
        return self.leaf_served

    def wait(self, timeout: float = 5.0) -> bool:
        return self.served() is not None

    def kill(self) -> None:
        self._end(clean=False)
        if standin.load_knobs(self.root).get("respawn"):
            self.again_at, self.retries = self.clock.now() + RETRY_S, 0

    def wait_gone(self, timeout: float = 5.0) -> None:
        self.clock.sleep(min(max(self.gone_at - self.clock.now(), 0) + TICK_S, timeout) if self.gone_at != NEVER else 0)
        self.settle()

    def _launch(self, *, again: bool = False) -> None:
        """`omiserver -d`: what becomes of it nobody is told."""
        self.again_at = NEVER
        if not os.path.exists(self.path(f"{self.place.bin}/{self.place.server}")):
            return
        knobs = standin.load_knobs(self.root)
        self.begun.append(self.clock.now())
        pid = next(self.pids)
        Path(self.path(self.place.pid)).write_text(f"{pid}\n", encoding="ascii")
        try:
            settings = standin.read_settings(self.root, self.place, knobs)
            leaf = loads(standin.read_as(self.root, settings.certificate, settings.account), standin.read_as(self.root, settings.key, settings.account))
        except (OSError, standin.ConfError):
            leaf = None
        mark = fingerprint(leaf)
        refused = mark in knobs.get("refuse", ()) or ("serve_only" in knobs and mark not in knobs["serve_only"])
        if leaf is None or refused or self.starts <= int(knobs.get("fails_until", 0)):
            self._end(clean=False)
            if knobs.get("respawn") and self.retries < RETRIES:
                self.retries += 1
                self.again_at = self.clock.now() + RETRY_S
            return
        self.running_pid, self.leaf_served = pid, leaf if self.port in settings.ports else None

    # -- its programs ---------------------------------------------------------------------------------------------

    def run(self, path: str, *arguments: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        if not os.path.exists(self.path(path)):
            raise FileNotFoundError(path)
        self.settle()
        status, said = PROGRAMS[path.rpartition("/")[2]](self, list(arguments))
        return subprocess.CompletedProcess([path, *arguments], status, said)

    def _stop(self) -> None:
        knobs = standin.load_knobs(self.root)
        if knobs.get("ignore_restart") or self.stray:
            return
        self.again_at = NEVER
        if self.running_pid:
            self.gone_at = min(self.gone_at, self.clock.now() + max(float(knobs.get("stop_takes", 0.0)), STOPS_S))

    def _start(self) -> Tuple[int, str]:
        knobs = standin.load_knobs(self.root)
        self.settle()
        if self.running_pid:
            return 0, ""
        self.retries = 0
        if sum(at > self.clock.now() - LIMIT_S for at in self.begun) >= LIMIT:  # failed unit; the scripts' last resort starts it outside
            self._launch()
            self.stray = bool(self.running_pid)
            return 0, "omi is started."
        self._launch()
        return (int(knobs.get("fails_with", 0)) if not self.running_pid else 0), "omi is started."


def _service_control(host: MemoryHost, words: List[str]) -> Tuple[int, str]:
    if words[0] == "is-running":
        return (1 if host.running_pid else 0), ""
    return _scxadmin(host, [{"reload": "-restart"}.get(words[0], f"-{words[0]}")])


def _scxadmin(host: MemoryHost, words: List[str]) -> Tuple[int, str]:
    verb = words[0].lower() if words else "-h"
    knobs = standin.load_knobs(host.root)
    if verb in ("-restart", "-stop"):
        host._stop()
    if verb == "-restart":
        poll_s = float(knobs.get("poll", 0.5))
        host.clock.sleep(min(max(host.gone_at - host.clock.now(), 0.0) + TICK_S, POLLS * poll_s) if host.running_pid else 0)
    if verb in ("-restart", "-start"):
        status, said = host._start()
        host.clock.sleep(STARTS_S)
        return (1 if status else 0), said
    if verb == "-status":
        return (0 if host.running_pid else 1), "omiserver: is running" if host.running_pid else "omiserver: is stopped"
    return 0, ""


def _omiserver(host: MemoryHost, words: List[str]) -> Tuple[int, str]:
    if words == ["-s"] and host.running_pid:
        host.gone_at = host.clock.now() + STOPS_S
        return 0, "stopped server"
    if words == ["-r"] and host.running_pid:
        pid, host.retries = host.running_pid, RETRIES
        host._launch()
        host.begun.pop()
        if host.running_pid:
            host.running_pid = pid
            Path(host.path(host.place.pid)).write_text(f"{pid}\n", encoding="ascii")
        return 0, "refreshed server"
    if words == ["-d"] and not host.running_pid:
        host._launch()
        host.stray = True
    return 0, ""


def _scxsslconfig(host: MemoryHost, words: List[str]) -> Tuple[int, str]:
    return packagescripts.scxsslconfig(host, *words), "scxsslconfig"


PROGRAMS: Dict[str, Callable[[MemoryHost, List[str]], Tuple[int, str]]] = {
    "scxadmin": _scxadmin, "service_control": _service_control, "omiserver": _omiserver, "scxsslconfig": _scxsslconfig,
}


class Keys:
    """Keys that are made once for all sequences, so that what was found of them is known: each sequence takes them in the same order."""

    pool: ClassVar[List[Any]] = []

    def __init__(self) -> None:
        self.taken = 0

    def __call__(self, _kind: str = "") -> Any:
        if self.taken == len(self.pool):
            self.pool.append(ec.generate_private_key(ec.SECP256R1()))
        self.taken += 1
        return self.pool[self.taken - 1]


class MemoryCA:
    """What `LabCA` is, without the line; its conversations are `Talk`s."""

    server, user, password = "ca.lab.test", "LAB\\svc-enroll", "secret"

    def __init__(self, folder: Path) -> None:
        self.clock: Clock = Clock(real=False)
        self.authority = Authority(clock=self.clock.now, lifetime=LEAF_S)
        self.switches = self.authority.switches
        self.server_trust = self.issuer_trust = str(folder / "issuer-trust.pem")
        Path(self.issuer_trust).write_bytes(b"".join(map(verify.pem, self.authority.roots)))
        self.count_post = 0

    def reset(self, clock: Clock) -> None:
        self.clock, self.authority.clock = clock, clock.now
        self.switches.reset()
        self.authority.rows.clear()
        self.authority._ids = itertools.count(1)
        self.authority.posts = self.count_post = 0


class Talk:
    """One conversation (`ca.Conversation`), with the switches that the model uses: mode, wrong, unavailable, lost, date_offset."""

    def __init__(self, ca: MemoryCA, account: str) -> None:
        self.ca, self.account = ca, account

    def mark(self, _salt: bytes) -> str:
        return "mark"

    def _away(self, method: str) -> Optional[outcomes.Unavailable]:
        if self.ca.switches.unavailable in ("all", method):
            return outcomes.Unavailable(f"{self.ca.server} does not answer", "see that it runs", "server")
        return None

    def authority(self) -> Union[outcomes.Authority, outcomes.Unavailable]:
        return self._away("get") or outcomes.Authority(self.ca.authority.chain(), int(self.ca.clock.now() + self.ca.switches.date_offset))

    def submit(self, csr: bytes, on_id: Callable[[int], None]) -> outcomes.Outcome:
        away, switches = self._away("post"), self.ca.switches
        if away:
            return away
        lost = switches.lost if switches.lost_times else ""
        if lost:
            switches.lost_times -= 1
        self.ca.count_post += 1
        if lost == "before":
            return outcomes.Doubtful(f"{self.ca.server} did not answer", None)
        row = self.ca.authority.submit(csr, "SCXAgent", self.account)
        if lost:
            return outcomes.Doubtful(f"{self.ca.server} did not answer", None)
        if row.state in ("issued", "pending"):
            on_id(row.id)
        return self._said(row.id)

    def fetch(self, request_id: int) -> outcomes.Outcome:
        return self._away("get") or self._said(request_id)

    def _said(self, request_id: int) -> outcomes.Outcome:
        row = self.ca.authority.rows.get(request_id)
        if row is None:
            return outcomes.Gone(request_id)
        if row.state == "pending":
            return outcomes.Pending(request_id)
        if row.state == "revoked":
            return outcomes.Revoked(request_id)
        if row.certificate is None:
            meaning = hresult.meaning(row.hresult)
            return outcomes.Denied(request_id, row.hresult, meaning.sentence, meaning.hint, meaning.retry)
        return outcomes.Certificate(request_id, row.certificate, self.ca.authority.chain(row.generation))


class Time:
    """The module `time`, by the model's clock."""

    def __init__(self, clock: Clock) -> None:
        self.monotonic, self.sleep, self.time = clock.now, clock.sleep, clock.host

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


REHEARSE, FITS = service.rehearse, service.fits
_loaded = lru_cache(maxsize=4096)(verify._load)
_is_issuer = lru_cache(maxsize=4096)(verify._is_issuer)
_known: Dict[Any, Any] = {}  # what was said of pairs and paths, in any sequence


class MemoryWorld(World):
    """A world in which nothing waits."""

    host: MemoryHost

    def parts(self) -> Iterator[Tuple[Any, str, Any]]:
        host = self.host

        def probe(_port: int) -> Served:
            der = host.served()
            return Served(True, fingerprint(der), "", der) if der else Served(False, problem="nothing listens")

        def rehearsed(root: Root, key_path: str, *asked: Any) -> str:
            mark = (root.read(key_path, 1 << 16), *asked)
            if mark not in _known:
                _known[mark] = REHEARSE(root, key_path, *asked)
            return str(_known[mark])

        def fit(root: Root, key_path: str, leaf: bytes) -> bool:
            try:
                mark = (root.read(key_path, 1 << 16), leaf)
            except FileNotFoundError:
                return False
            if mark not in _known:
                _known[mark] = FITS(root, key_path, leaf)
            return bool(_known[mark])

        yield from super().parts()
        yield service, "probe", probe
        yield keys, "make_key", lambda _kind: selfsigned.key_pem(selfsigned.make_key("ec:secp256r1"))
        yield service, "rehearse", rehearsed
        yield service, "fits", fit
        yield verify, "_load", _loaded
        yield verify, "_is_issuer", _is_issuer
        yield service, "start_time", lambda _pid: 0
        yield packagescripts, "_printed", lambda host: printed(host.read(packagescripts.OMI_PEM))
        yield unit, "is_server", lambda pid: pid == host.pid
        yield agents, "_is_running", lambda pid: bool(re.fullmatch(rb"\s*[0-9]+\s*", pid)) and int(pid) == host.pid
        for name, module in list(sys.modules.items()):
            if name.startswith(scx_enroll.__name__ + ".") and getattr(module, "time", None) is time:
                yield module, "time", Time(self.clock)

    def control(self, root: Root, command: Tuple[str, ...], _patience: Patience, started: Callable[[int, int], None]) -> str:  # type: ignore[override]
        service.check_tool(root, command[0])
        started(1, 1)
        done = self.host.run(command[0], *command[1:])
        return f"{' '.join(command)}: exit status {done.returncode}; {done.stdout}"

    def line(self, fuse: Fuse) -> records.Line:
        def connect(_root: Root, _ca: Any) -> Any:
            talk: Any = Talk(self.cas[0], self.account)  # type: ignore[arg-type]  # a MemoryCA
            for name in ("authority", "submit", "fetch"):
                setattr(talk, name, fuse.around(name, getattr(talk, name)))
            return talk

        return records.Line(connect=connect, secret_mark=lambda *_: "mark")

    def passes(self, seconds: float) -> None:
        super().passes(seconds)
        self.host.settle()


@lru_cache(maxsize=1)
def _folder() -> Path:
    """Where trees are made: in memory, one folder for each process."""
    top = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    import atexit

    made = tempfile.mkdtemp(prefix="scx-enroll-model-", dir=top)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


@lru_cache(maxsize=1)
def _ca() -> MemoryCA:
    return MemoryCA(_folder())


def _world(tree: str, clock: Clock, ca: MemoryCA, **options: Any) -> MemoryWorld:
    world = MemoryWorld(MemoryHost(tree, clock, **options), [ca])  # type: ignore[list-item]
    world.patience, world.account = Patience(poll_s=1.0), tree
    world.begin(clock)
    return world


@contextlib.contextmanager
def laboratory() -> Iterator[Callable[..., MemoryWorld]]:
    """Lend a CA and a clock; gives what makes a world of them, also from another one's tree, as a copied machine is made."""
    clock, ca = Clock(real=False), _ca()
    ca.reset(clock)
    folder = tempfile.mkdtemp(dir=_folder())

    def world(image: Optional[MemoryHost] = None) -> MemoryWorld:
        tree = tempfile.mkdtemp(dir=folder)
        if image:
            subprocess.run(["cp", "-a", f"{image.root}/.", tree], check=True)
        return _world(tree, clock, ca, make=image is None)

    try:
        with patch.object(selfsigned, "make_key", Keys()):
            yield world
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def memory_world() -> Iterator[MemoryWorld]:
    """Make a world in memory."""
    with laboratory() as made:
        world = made()
        with world.entered():
            yield world
