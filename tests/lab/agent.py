"""A host with the SCOM agent under a root directory: its files, its tools and a server that behaves like the real one.

In a test:

    with LabHost(tmp_path / "host1") as host:
        host.start()
        assert host.served() == host.leaf()
        ...  # run the program with --root host.root --live
        assert host.restarts == 1

From a shell: `python -m tests.lab.agent --root DIR make --port 1270`, then `start`, `stop`, `show`, `set NAME=VALUE`, ...

Absolute links in the tree are meant inside the root. What the server process does is in `standin`. Nothing outlives the test:
the server ends itself when the tree or the process that made it is gone.

With `--root / make --machine`, on a machine that is for nothing else, the agent stands at its real paths with an account and a
unit of its own (`machine` boots such machines). Nothing ends it there but systemd.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import pwd
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple, Union

from . import packagescripts, selfsigned, standin

if TYPE_CHECKING:
    from types import TracebackType

LAYOUTS = tuple(standin.PLACES)
RUNNABLE = tuple(name for name in LAYOUTS if name != "omi-dangling")
OMI_ACCOUNT = (990, 990)  # uid and gid of `omi` in the tree's own passwd, when the lab runs as root
TOOLS = "/opt/microsoft/scx/bin/tools"
OMI_SSL = "/etc/opt/omi/ssl"
SCX_SSL = "/etc/opt/microsoft/scx/ssl"
SSL_FOLDERS = (OMI_SSL, SCX_SSL, "/etc/opt/omi/certs", "/etc/pki/scom", "/etc/pki/private")  # the last three of an admin's

OMI_CONF = """# omiserver configuration file

##
## httpport -- listening port for the binary protocol (default is 5985)
##
httpport=0

##
## httpsport -- listening port for the binary protocol (default is 5986)
##
httpsport={ports}

##
## loglevel -- set the loglevel for the OMI server
##
loglevel = WARNING

#pemfile=/etc/opt/omi/ssl/omi.pem
#keyfile=/etc/opt/omi/ssl/omikey.pem
"""
MORE_CONF = {  # what an admin added
    "omi-moved": "pemfile=/etc/pki/scom/agent.pem\nkeyfile=/etc/pki/scom/agent-key.pem\n",
    "omi-apart": "pemfile=/etc/pki/scom/agent.pem\nkeyfile=/etc/pki/private/agent.key\n",
    "omi-root": "nonroot=false\n",
}

CLASSIC_CONF = """# omiserver configuration file
httpport=0
httpsport={ports}
localstatedir=/var/opt/microsoft/scx
providerdir=/opt/microsoft/scx/lib
pemfile=/etc/opt/microsoft/scx/ssl/scx.pem
keyfile=/etc/opt/microsoft/scx/ssl/scx-key.pem
agentprogram=/opt/microsoft/scx/bin/omiagent
"""

# as the packages bring it, but for the links to OpenSSL that it looks after before each start
UNIT = """[Unit]
Description=OMI CIM Server
After=network.target

[Service]
Type=forking
PIDFile={place.pid}
ExecStart={place.bin}/{place.server} -d
ExecStop={place.bin}/{place.server} -s
ExecReload={place.bin}/{place.server} -r
TimeoutStartSec=5
Restart=on-failure
RestartSec=5s

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class Entry:
    """What stands at one name: `kind` is file, link or dir; `data` of a file, `text` of a link."""

    kind: str
    mode: int
    data: bytes = b""
    text: str = ""
    uid: int = 0
    gid: int = 0


def fingerprint(der: Optional[bytes]) -> str:
    """Return the lower-case hex SHA-256 of a certificate's DER, "" for none."""
    return hashlib.sha256(der).hexdigest() if der else ""


def served_leaf(port: int, timeout: float = 5.0, address: str = "127.0.0.1") -> Optional[bytes]:
    """Return the DER of the leaf that a port serves, None if nothing listens or answers TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # not wrap_socket, which loses the socket, with a warning later on, where the server dies at the wrong moment
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    secure = context.wrap_bio(incoming, outgoing)
    try:
        with socket.create_connection((address, port), timeout=timeout) as plain:
            while True:
                try:
                    secure.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    plain.sendall(outgoing.read())
                    data = plain.recv(16384)
                    if not data:
                        return None
                    incoming.write(data)
            der = secure.getpeercert(binary_form=True)
            with contextlib.suppress(OSError):  # the agent never answers close_notify
                secure.unwrap()
            with contextlib.suppress(OSError):
                plain.sendall(outgoing.read())
                while plain.recv(16384):  # closing before it does would be a reset
                    pass
            return der
    except OSError:
        return None


class LabHost:
    """The host's tree beneath `root`, and the means to run and to disturb its agent.

    `layout`: "omi" (today's), "classic-omi" (scx 1.5), "pegasus", and of today's: "omi-regular" (omi.pem a regular file with the
    package's marker, as a fresh OMI or an OMI upgrade leaves it), "omi-migrated" (omi.pem is the classic link, moved; its host pem
    stayed), "omi-dangling" (a migration that linked to the wrong folder: this one does not start), "omi-moved" and "omi-apart" (the
    conf puts the pair into another folder, or into two), "omi-relative" (an admin's relative link), "omi-ports" (two of them, `ports`),
    "omi-root" (nonroot=false), "both" (OMI beside scx 1.5, as between the two halves of an upgrade). `key`: as `selfsigned.make_key` takes it. `port` 0: a free one.
    `account`: uid and gid of the agent's user; by default the caller's own, for root 990. `machine`: the root is /, of a machine that
    is for nothing else: its identity stays as it is, the account is a real one, and the server is a unit of its systemd.
    """

    def __init__(
        self,
        root: Union[str, os.PathLike[str]],
        layout: str = "omi",
        port: int = 0,
        host: str = "host1",
        domain: str = "lab.test",
        key: str = "rsa:2048",
        *,
        account: Optional[Tuple[int, int]] = None,
        owned: bool = True,
        make: bool = True,
        machine: bool = False,
    ) -> None:
        """Make the tree; with `make=False`, take one that stands there. `owned`: the server ends with this process."""
        self.root = os.path.realpath(root).rstrip("/")
        if make and machine != (self.root == ""):
            raise ValueError("a machine's own agent stands at /, and no other does")
        self._reservations: List[int] = []  # bare descriptors: forgetting to close them must not be a warning in somebody's test
        if not make:
            knobs = standin.load_knobs(self.root)
            self.layout, self.port, self.host, self.domain = (
                str(knobs["layout"]),
                int(knobs["port"]),
                str(knobs["host"]),
                str(knobs["domain"]),
            )
            self.place = standin.PLACES[self.layout]
            self.account: Tuple[int, int] = tuple(knobs["account"])
            self.ports: Tuple[int, ...] = tuple(knobs.get("ports", [self.port]))
            self.machine = bool(knobs.get("machine"))
            return
        if layout not in LAYOUTS:
            raise ValueError(layout)
        self.layout = layout
        self.host = host
        self.domain = domain
        self.place = standin.PLACES[layout]
        self.machine = machine
        self.port = port or (1270 if machine else self._free_port())
        self.ports = (self.port, self._free_port()) if layout == "omi-ports" else (self.port,)
        own = _system_account() if machine else OMI_ACCOUNT if os.geteuid() == 0 else (os.geteuid(), os.getegid())
        self.account = account or own
        self._lay_out(key, owned=owned and not machine)

    def __enter__(self) -> LabHost:
        """Return the host; the agent is not started."""
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        """Kill whatever runs here."""
        self.close()

    def close(self) -> None:
        """Kill the agent, whatever its state, and let stragglers know."""
        if os.path.isdir(self.path("/lab")):
            self.knobs(owner=[0, "gone"])
            self.kill()
        while self._reservations:
            os.close(self._reservations.pop())

    # making the tree

    def _free_port(self) -> int:
        """Find a port outside the range that the system hands out, and keep it for this object by a name in the abstract space."""
        for _ in range(200):
            port = random.randint(20000, 31999)
            mark = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                mark.bind(f"\0scx-lab-port-{port}")
                for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
                    with socket.socket(family, socket.SOCK_STREAM) as probe:
                        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        try:
                            probe.bind((address, port))
                        except OSError:
                            if family == socket.AF_INET:
                                raise
            except OSError:
                mark.close()
                continue
            self._reservations.append(mark.detach())
            return port
        message = "no free port"
        raise OSError(message)

    def _lay_out(self, key: str, *, owned: bool) -> None:
        place = self.place
        os.makedirs(self.root or "/", mode=0o755, exist_ok=True)
        if not self.machine:
            self._identify()
        for folder in (place.certificate, f"{SCX_SSL}/x", "/lab/x", "/run/x", "/tmp/x"):
            os.makedirs(os.path.dirname(self.path(folder)), mode=0o755, exist_ok=True)
        start = standin.start_time(os.getpid())
        knobs: Dict[str, Any] = {
            "layout": self.layout,
            "port": self.port,
            "ports": list(self.ports),
            "host": self.host,
            "domain": self.domain,
            "account": list(self.account),
            "new_key": key,
            "owner": [os.getpid(), start] if owned else None,
            **({"machine": True} if self.machine else {}),
        }
        Path(self.path("/lab/knobs.json")).write_text(json.dumps(knobs), encoding="utf-8")
        for source in (standin.__file__, selfsigned.__file__):
            shutil.copy(source, self.path("/lab/"))
        if place.conf:
            conf = OMI_CONF if self.is_omi else CLASSIC_CONF
            listed = ",".join(map(str, (0, *self.ports) if self.is_omi else self.ports))
            self.make_file(place.conf, conf.format(ports=listed) + MORE_CONF.get(self.layout, ""), 0o444)
        self.put_programs()
        self.put_scx_programs()
        self._make_pair(key)
        if self.machine:
            unit = standin.UNITS[self.layout]
            self.make_file(f"/lib/systemd/system/{unit}.service", UNIT.format(place=place))
            # a package does it after the unit is there, in an image as well as on a machine that runs
            if os.path.isdir("/run/systemd/system"):
                subprocess.run(["systemctl", "daemon-reload"], check=True)
            subprocess.run(["systemctl", "--quiet", "enable", unit], check=True)

    def _identify(self) -> None:
        """Make the tree one of a host with a name and accounts."""
        self.make_file("/etc/passwd", f"root:x:0:0:root:/root:/bin/sh\nomi:x:{self.account[0]}:{self.account[1]}::/:/bin/false\n")
        self.make_file("/etc/group", f"root:x:0:\nomi:x:{self.account[1]}:\n")
        fqdn = f"{self.host}.{self.domain}" if self.domain else self.host
        self.make_file("/etc/hostname", f"{self.host}\n")
        self.make_file("/etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {fqdn} {self.host}\n")
        self.make_file("/etc/resolv.conf", f"domain {self.domain}\n" if self.domain else "")
        self.make_file("/etc/nsswitch.conf", "hosts: files dns\n")
        self.make_file("/etc/machine-id", hashlib.sha256(self.root.encode()).hexdigest()[:32] + "\n", 0o444)

    def put_programs(self) -> None:
        """The programs of the server's package are there, and the folders that it works in."""
        place = self.place
        for path in (place.pid, place.log):
            os.makedirs(os.path.dirname(self.path(path)), mode=0o755, exist_ok=True)
        if place.conf:
            self._tool(f"{place.bin}/service_control", "service_control")
        self._tool(f"{place.bin}/{place.server}", "omiserver")

    def put_scx_programs(self) -> None:
        """The programs of scx are there."""
        self._tool(f"{TOOLS}/scxadmin", "scxadmin")
        self._tool(f"{TOOLS}/scxsslconfig", "scxsslconfig")
        os.makedirs(self.path("/usr/sbin"), exist_ok=True)
        name = self.path("/usr/sbin/scxadmin")
        if not os.path.lexists(name):
            os.symlink(f"{TOOLS}/scxadmin", name)

    def become(self, layout: str) -> None:
        """The host has another layout from now on: its tools and this object go by that one. No file of the agent changes."""
        self.layout, self.place = layout, standin.PLACES[layout]
        self.knobs(layout=layout)

    def _make_pair(self, kind: str) -> None:
        if self.layout == "both":
            classic = standin.PLACES["classic-omi"]
            self.make_file(classic.conf, CLASSIC_CONF.format(ports=self.port), 0o444)
            self._tool(f"{classic.bin}/{classic.server}", "omiserver")
            self._put_pair(kind, classic.key, classic.certificate, f"{SCX_SSL}/scx-host-{self.host}.pem", account=None)
        elif self.is_omi:
            os.symlink(f"{OMI_SSL}/omi.pem", self.path(f"{SCX_SSL}/scx.pem"))
        own, scx = f"{OMI_SSL}/omi-host-{self.host}.pem", f"{SCX_SSL}/scx-host-{self.host}.pem"
        target, text = {
            "omi-regular": ("", ""),
            "both": ("", ""),
            "omi-migrated": (scx, scx),
            "omi-dangling": (own, f"{SCX_SSL}/omi-host-{self.host}.pem"),
            "omi-relative": (f"/etc/opt/omi/certs/{self.host}.pem", f"../certs/{self.host}.pem"),
        }.get(self.layout, (own, own) if self.is_omi else (scx, scx))
        account = self.account if self.is_omi else None
        self._put_pair(kind, self.place.key, self.place.certificate, target, text, account=account)
        if not target:
            self.make_file(f"{OMI_SSL}/.omi_cert_marker", "")
        if self.layout in ("omi-moved", "omi-apart"):  # the package's pair stays where it is, unused
            self._put_pair(kind, self.key, self.certificate, "/etc/pki/scom/issued.pem", "issued.pem", account=account)
            text = "issued.pem"
        self.knobs(link=text)

    def _put_pair(
        self, kind: str, key: str, name: str, target: str, text: str = "", *, account: Optional[Tuple[int, int]]
    ) -> None:
        """Make a pair: `name` a link with `text` (by default `target`) while the certificate is at `target`; "" for a regular file."""
        made = selfsigned.make_key(kind)
        certificate = selfsigned.make_certificate(made, self.host, self.domain)
        self.make_file(key, selfsigned.key_pem(made), 0o400 if target else 0o600, account)
        self.make_file(target or name, certificate, 0o444 if target else 0o644)
        if target:
            os.symlink(text or target, self.path(name))

    def make_file(
        self, path: str, data: Union[str, bytes], mode: int = 0o644, account: Optional[Tuple[int, int]] = None
    ) -> None:
        """Write a file anew, never through a link."""
        real = self.path(path)
        os.makedirs(os.path.dirname(real), mode=0o755, exist_ok=True)
        if os.path.lexists(real):
            os.unlink(real)
        with open(os.open(real, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        os.chmod(real, mode)
        if account and os.geteuid() == 0:
            os.chown(real, account[0], account[1])

    def _tool(self, path: str, name: str) -> None:
        module = "selfsigned" if name == "scxsslconfig" else "standin"
        up = "/".join([".."] * path.strip("/").count("/"))
        # scxsslconfig needs the installed cryptography; the others start faster without site
        flags = "-I" if module == "selfsigned" else "-IS"
        interpreter = f"#!{sys.executable} {flags}\n"
        if len(interpreter) > 120 or " " in sys.executable:
            interpreter = f"#!/bin/sh\n''''exec \"{sys.executable}\" {flags} \"$0\" \"$@\" # '''\n"
        body = (
            "import os, sys\n"
            f"root = os.path.normpath(os.path.join(os.path.dirname(os.path.realpath(__file__)), {up!r})).rstrip('/')\n"
            "sys.path.insert(0, root + '/lab')\n"
            f"import {module}\n"
            f"sys.exit({module}.{name}(root, sys.argv[1:]))\n"
        )
        self.make_file(path, interpreter + body, 0o755)

    # looking

    @property
    def is_omi(self) -> bool:
        """Whether the server is today's OMI: its account is `omi`, its unit omid."""
        return standin.UNITS[self.layout] == "omid"

    @property
    def host_pem(self) -> str:
        """What the agent's certificate link says in a fresh tree: the host pem's path, or an admin's text."""
        stem = "omi" if self.is_omi else "scx"
        text: str = standin.load_knobs(self.root).get("link", "")
        return text or f"{os.path.dirname(self.place.certificate)}/{stem}-host-{self.host}.pem"

    @property
    def fqdn(self) -> str:
        """The host's full name."""
        return f"{self.host}.{self.domain}" if self.domain else self.host

    @property
    def certificate(self) -> str:
        """The path beneath the root of the name that the server reads the certificate by: where the conf says, if it reads."""
        settings = self._read()
        return settings.certificate if settings else self.place.certificate

    @property
    def key(self) -> str:
        """The path beneath the root of the key, likewise."""
        settings = self._read()
        return settings.key if settings else self.place.key

    @property
    def listed(self) -> Tuple[int, ...]:
        """The ports that the conf lists."""
        settings = self._read()
        return settings.ports if settings else ()

    def _read(self) -> Optional[standin.Settings]:
        try:
            return standin.read_settings(self.root, self.place, standin.load_knobs(self.root))
        except (OSError, standin.ConfError):
            return None

    @property
    def conf(self) -> str:
        """The path beneath the root of omiserver.conf, "" for pegasus."""
        return self.place.conf

    @property
    def scxadmin(self) -> str:
        """The path beneath the root of scxadmin."""
        return f"{TOOLS}/scxadmin"

    def path(self, path: str) -> str:
        """Return the real name of a path beneath the root, the last part's link not followed."""
        return self.root + path

    def resolve(self, path: str) -> str:
        """Return the real path of a path beneath the root, links followed as in a chroot."""
        return standin.host_path(self.root, path)

    def read(self, path: str) -> bytes:
        """Return the content of a file beneath the root, links followed as in a chroot."""
        return Path(self.resolve(path)).read_bytes()

    def leaf(self) -> Optional[bytes]:
        """Return the DER of the first certificate that the server would read from disk, None if it dangles or does not parse."""
        try:
            text = self.read(self.certificate).decode("latin-1")
            end = text.index("-----END CERTIFICATE-----") + 25
            return ssl.PEM_cert_to_DER_cert(text[text.index("-----BEGIN CERTIFICATE-----") : end])
        except (OSError, ValueError):
            return None

    def served(self, timeout: float = 5.0, address: str = "127.0.0.1") -> Optional[bytes]:
        """Return the DER of the leaf that the port serves, None if nothing listens or answers TLS."""
        return served_leaf(self.port, timeout, address)

    @property
    def pid(self) -> int:
        """The pid of the running server, 0 if there is none."""
        return standin.running(self.root, self.place)

    @property
    def calls(self) -> List[Dict[str, Any]]:
        """Every call of a tool so far: tool, arguments, at, pid, parent."""
        try:
            lines = Path(self.path("/lab/calls.log")).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    @property
    def restarts(self) -> int:
        """How often `scxadmin -restart` was asked for, other than for providers only."""
        wanted = [[word.lower() for word in call["arguments"]] for call in self.calls if call["tool"] == "scxadmin"]
        return sum(1 for words in wanted if "-restart" in words and "provider" not in words)

    @property
    def starts(self) -> int:
        """How often the service was really started, failed starts included."""
        try:
            return len(Path(self.path("/lab/starts.log")).read_text(encoding="ascii").splitlines())
        except FileNotFoundError:
            return 0

    @property
    def log(self) -> str:
        """The server's own log, "" while there is none."""
        try:
            return self.read(self.place.log).decode()
        except FileNotFoundError:
            return ""

    def snapshot(self) -> Dict[str, Entry]:
        """Return everything under the ssl directories by its path beneath the root, for comparison before and after."""
        found: Dict[str, Entry] = {}
        for top in SSL_FOLDERS:
            for folder, folders, files in os.walk(self.path(top)):
                for name in [*folders, *files, ""]:
                    real = os.path.join(folder, name) if name else folder
                    state = os.lstat(real)
                    mode = state.st_mode & 0o7777
                    owner = (state.st_uid, state.st_gid)
                    if os.path.islink(real):
                        entry = Entry("link", 0, b"", os.readlink(real), *owner)
                    elif os.path.isdir(real):
                        entry = Entry("dir", mode, b"", "", *owner)
                    else:
                        entry = Entry("file", mode, Path(real).read_bytes(), "", *owner)
                    found[real[len(self.root) :]] = entry
        return found

    # running

    def run(self, path: str, *arguments: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a program of the tree, given by its path beneath the root."""
        return subprocess.run(
            [self.path(path), *arguments],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def start(self, timeout: float = 5.0) -> bool:
        """Start the agent by scxadmin and wait until its port answers; False if it died or does not answer in time."""
        self.run(self.scxadmin, "-start")
        return self.wait(timeout)

    def wait(self, timeout: float = 5.0) -> bool:
        """Wait until the port answers TLS; False if the server died meanwhile or the time is over."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.served(timeout=1.0):
                return True
            if not standin.launched(self.root) and not standin.load_knobs(self.root).get("respawn"):
                return False
            time.sleep(0.01)
        return False

    def would_start(self) -> bool:
        """Whether the server would take what is on disk now: its own loading, as its account, without a process."""
        settings = self._read()
        if not settings or not os.path.exists(self.path(f"{self.place.bin}/{self.place.server}")):
            return False
        try:
            standin.Server(self.root, self.place, settings).load()
        except standin.Refused:
            return False
        return True

    def stop(self, timeout: float = 5.0) -> None:
        """Stop the agent on purpose, by scxadmin, and wait until it is gone: no pid file is left."""
        self.run(self.scxadmin, "-stop")
        self.wait_gone(timeout)

    def restart(self) -> bool:
        """Restart by scxadmin and wait until the port answers."""
        self.run(self.scxadmin, "-restart")
        return self.wait()

    def reload(self) -> None:
        """Have the server read its pair again (`omiserver -r`)."""
        self.run(f"{self.place.bin}/{self.place.server}", "-r")

    def kill(self) -> None:
        """Kill the server (SIGKILL), as a crash would: its pid file stays."""
        pid = self.pid
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self.wait_gone(5.0)

    def wait_gone(self, timeout: float = 5.0) -> None:
        """Wait until no server runs."""
        deadline = time.monotonic() + timeout
        while self.pid and time.monotonic() < deadline:
            time.sleep(0.005)

    # misbehaviour, while it runs

    def knobs(self, **values: Any) -> Dict[str, Any]:
        """Set knobs (None removes one) and return all. They are read by the tools at each call and by the server when it loads.

        serve_only, refuse: lists of leaf fingerprints. stop_takes, start_takes, restart_takes, between_halves, dies_after, respawn,
        poll, idle, between_opens, handshake_takes, reload_gap: seconds. ignore_restart, deaf, sslconfig_fails, unit_clears_pid: true. stray: a pid.
        fails_until: number of the last start that fails, fails_with its status. start_limit: [starts, seconds]. junk: text.
        """
        knobs = standin.load_knobs(self.root)
        knobs.update(values)
        knobs = {name: value for name, value in knobs.items() if value is not None}
        path = Path(self.path("/lab/knobs.json"))
        fresh = path.with_name(f"knobs.{os.getpid()}")
        fresh.write_text(json.dumps(knobs), encoding="utf-8")
        fresh.replace(path)
        return knobs

    def refuse_new(self, only: Optional[bytes] = None) -> None:
        """From now on the agent dies of every leaf but `only` (DER), by default the one now on disk."""
        self.knobs(serve_only=[fingerprint(only if only is not None else self.leaf())])

    def accept_all(self) -> None:
        """Take `refuse_new` back."""
        self.knobs(serve_only=None, refuse=None)

    def slow_stop(self, seconds: float = 1.5, poll: float = 0.02) -> None:
        """Make a stop outlast scxadmin's poll (20 x `poll`): a restart ends with nothing running and status 0 (section 4)."""
        self.knobs(stop_takes=seconds, poll=poll)

    def ignore_restart(self, *, on: bool = True, poll: float = 0.02) -> None:
        """Make every restart a no-op with status 0, the old leaf staying served, whatever process runs."""
        self.knobs(ignore_restart=on or None, poll=poll)

    def make_stray(self, poll: float = 0.02) -> None:
        """Put the running process outside its unit: restarts are no-ops until `omiserver -s` has ended it (section 4)."""
        self.knobs(stray=self.pid, poll=poll)

    def fail_starts(self, count: int = 1, status: int = 0) -> None:
        """Make the next `count` starts fail: nothing comes up, and service_control's exit status is `status`."""
        self.knobs(fails_until=self.starts + count, fails_with=status)

    def slow_restart(self, seconds: float) -> None:
        """Make `scxadmin -restart` wait so long before it does anything."""
        self.knobs(restart_takes=seconds)

    def junk(self, text: str = "\x1b[31m\u00fcberraschend\x1b[0m") -> None:
        """Make scxadmin print something before anything else."""
        self.knobs(junk=text)

    def remove_scxadmin(self) -> None:
        """Take scxadmin away."""
        os.unlink(self.path(self.scxadmin))

    # other owners of the same files (section 6)

    def relink(self, target: str) -> None:
        """Point the certificate's name elsewhere, as others do it: unlinked, then made anew."""
        name = self.path(self.certificate)
        if os.path.lexists(name):
            os.unlink(name)
        os.symlink(target, name)

    def move_link_back(self) -> None:
        """Point the certificate's name at the agent's own host pem again."""
        self.relink(self.host_pem)

    def scxsslconfig_f(self) -> None:
        """Make a new pair by `scxsslconfig -f`. The agent goes on serving the old one."""
        if packagescripts.scxsslconfig(self, "-f"):
            raise RuntimeError("scxsslconfig failed")

    def scom_sign(self, *, restart: bool = True, public_key: Any = None) -> bytes:
        """Sign as a Management Server does, and restart; returns the DER. See `packagescripts.scom_sign`."""
        signed = packagescripts.scom_sign(self, public_key=public_key, restart=restart)
        if signed is None:
            raise FileNotFoundError(2, "it leads nowhere", packagescripts.SCX_PEM)
        return signed

    def omi_upgrade(self, kind: str = "rsa:3072", *, restart: bool = True) -> None:
        """Lose the pair to an upgrade of OMI that distrusts it, whatever it is."""
        packagescripts.omi_install(self, kind=kind, distrusted=True, restart=restart)

    def scx_upgrade(self, *, restart: bool = True) -> None:
        """Upgrade scx, as an rpm."""
        packagescripts.scx_install(self, restart=restart)

    def write_through(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write onto a name as a shell does: through its links into the file behind, in place, its mode kept; `mode`: of a new one."""
        real = self.resolve(path)
        mode = os.stat(real).st_mode & 0o7777 if os.path.exists(real) else mode
        with contextlib.suppress(FileNotFoundError):
            os.chmod(real, mode | 0o200)
        Path(real).write_bytes(data)
        os.chmod(real, mode)

    def install(self, certificate: bytes, key: Optional[bytes] = None) -> None:
        """Put a certificate (any bytes) where the server reads it, and a key if given, without a restart."""
        self.write_through(self.certificate, certificate)
        if key is not None:
            self.write_through(self.key, key)

    def new_pair(self, kind: str = "ec:secp256r1") -> Tuple[bytes, bytes]:
        """Return (certificate, key), PEM, of a fresh self-signed pair for this host; nothing is written."""
        made = selfsigned.make_key(kind)
        return selfsigned.make_certificate(made, self.host, self.domain), selfsigned.key_pem(made)


def _system_account() -> Tuple[int, int]:
    """Return uid and gid of this machine's own `omi`, made as its package does where there is none."""
    try:
        entry = pwd.getpwnam("omi")
    except KeyError:
        subprocess.run(
            ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/home/omi", "--shell", "/bin/false", "omi"],
            check=True,
        )
        entry = pwd.getpwnam("omi")
    return entry.pw_uid, entry.pw_gid


# the program


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.lab.agent", description="A host tree with a stand-in SCOM agent.")
    parser.add_argument("--root", required=True, type=Path)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    verbs.required = True
    make = verbs.add_parser("make", help="lay out a tree")
    make.add_argument("--layout", choices=LAYOUTS, default="omi")
    make.add_argument("--port", type=int, default=0)
    make.add_argument("--host", default="host1")
    make.add_argument("--domain", default="lab.test")
    make.add_argument("--key", default="rsa:2048", help="rsa:2048, rsa:3072, ec:secp256r1, ...")
    make.add_argument("--machine", action="store_true", help="at / of a machine that is for nothing else, as a unit of its systemd")
    make.add_argument("--owner", type=int, default=0, metavar="PID", help="the agent ends itself when this process is gone")
    for verb, text in (
        ("start", "start the agent and wait for its port"),
        ("stop", "stop it on purpose"),
        ("kill", "kill it: a stale pid file stays"),
        ("restart", "restart it"),
        ("show", "print what is on disk, served and running, as JSON"),
        ("move-link-back", "point the certificate's link at the agent's own file"),
        ("scxsslconfig-f", "make a new pair as the agent's tool does"),
        ("scom-sign", "sign as a Management Server does, and restart"),
        ("omi-upgrade", "lose the pair to an OMI upgrade, and restart"),
        ("scx-upgrade", "upgrade scx, and restart"),
        ("refuse-new", "die of every certificate but the present one"),
        ("accept-all", "take refuse-new back"),
        ("make-stray", "make the running process one that restarts don't reach"),
    ):
        verbs.add_parser(verb, help=text)
    script = verbs.add_parser("script", help="run a package's script, without a restart; list them where none is named")
    script.add_argument("name", nargs="?", choices=tuple(packagescripts.SCRIPTS), metavar="NAME")
    knob = verbs.add_parser("set", help="set knobs; the value is JSON or a text, null removes")
    knob.add_argument("pairs", nargs="+", metavar="NAME=VALUE")
    return parser


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _show(host: LabHost) -> Dict[str, Any]:
    leaf, served = host.leaf(), host.served()
    name = host.path(host.certificate)
    return {
        "root": host.root or "/",
        "layout": host.layout,
        "port": host.port,
        "certificate": host.certificate,
        "link": os.readlink(name) if os.path.islink(name) else "",
        "installed": fingerprint(leaf),
        "served": fingerprint(served),
        "pid": host.pid,
        "restarts": host.restarts,
    }


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Make a tree, or work on one; returns the exit status, 1 where the agent does not answer after a start."""
    options = _parser().parse_args(arguments)
    if options.verb == "make":
        host = LabHost(
            options.root, options.layout, options.port, options.host, options.domain, options.key, owned=False, machine=options.machine
        )
        if options.owner:
            host.knobs(owner=[options.owner, standin.start_time(options.owner)])
        print(json.dumps(_show(host), indent=1))
        return 0
    host = LabHost(options.root, make=False)
    if options.verb == "show":
        print(json.dumps(_show(host), indent=1))
    elif options.verb == "script" and not options.name:
        print("\n".join(packagescripts.SCRIPTS))
    elif options.verb == "script":
        packagescripts.SCRIPTS[options.name](host)
    elif options.verb == "set":
        host.knobs(**{name: _value(text) for name, _, text in (pair.partition("=") for pair in options.pairs)})
    else:
        done = getattr(host, options.verb.replace("-", "_"))()
        return 1 if done is False else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
