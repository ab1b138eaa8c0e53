"""A Kerberos realm in a folder: MIT's KDC, as a process of the test's, with its database, log, keytabs and krb5.conf.

    with Kdc(tmp_path / "kdc") as kdc:
        kdc.add("HOST1$", "HTTP/ca.lab.test")
        kdc.keytab(tmp_path / "host.keytab", "HOST1$")
        subprocess.run([...], env={**os.environ, "KRB5_CONFIG": kdc.config})

Nothing outside the folder is read or written, and no privilege is needed above port 1023. The KDC ends with the process that made it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Dict, List, Mapping, Optional, Sequence, Union

if TYPE_CHECKING:
    from types import TracebackType

PathName = Union[str, "os.PathLike[str]"]

PYTHON = "/usr/bin/python3"  # the distribution's, which has what its packages bring
PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
TOOLS = {  # and their packages
    "krb5kdc": "krb5-kdc",
    "kdb5_util": "krb5-kdc",
    "kadmin.local": "krb5-admin-server",
    "kinit": "krb5-user",
}
LIMIT_S = 20.0  # to start takes 20 ms
MAX_SHOWN_CHARS = 4000

# Ends with the KDC, which ends with this input, and so with its maker.
KEEPER = """
exec 3<&0
"$@" </dev/null 3<&- &
kdc=$!
{ read -r end || :; kill "$kdc"; } <&3 >/dev/null 2>&1 &
exec 3<&-
wait "$kdc"
"""
CONFIG = """\
[libdefaults]
 default_realm = {realm}
 dns_lookup_kdc = false
 dns_lookup_realm = false
 dns_canonicalize_hostname = false
 rdns = false
{settings}
[realms]
 {realm} = {{
  kdc = {address}:{port}
 }}
[domain_realm]
 .{domain} = {realm}
 {domain} = {realm}
 localhost = {realm}
"""
PROFILE = """\
[kdcdefaults]
 kdc_listen = {address}:{port}
 kdc_tcp_listen = {address}:{port}
[realms]
 {realm} = {{
  database_name = {folder}/principal
  key_stash_file = {folder}/stash
  acl_file = {folder}/acl
  supported_enctypes = aes256-cts:normal aes128-cts:normal
 }}
[logging]
 kdc = FILE:{folder}/kdc.log
 admin_server = FILE:{folder}/kadmin.log
 default = FILE:{folder}/default.log
"""


class Trouble(AssertionError):
    """The KDC did not start, or a command failed; with what was said."""


def missing() -> str:
    """Return what this machine lacks for a KDC and for those that sign in, with the packages that bring it; "" for nothing."""
    lacks = {tool: package for tool, package in TOOLS.items() if not shutil.which(tool, path=PATH)}
    if not has("gssapi"):
        lacks["gssapi"] = "python3-gssapi"
    return f"{' '.join(lacks)}: apt-get install {' '.join(sorted(set(lacks.values())))}" if lacks else ""


def has(module: str) -> bool:
    """Tell whether the distribution's Python has this module."""
    with contextlib.suppress(OSError):
        return subprocess.run([PYTHON, "-I", "-c", f"import {module}"], check=False, capture_output=True).returncode == 0
    return False


class Kdc:
    """The KDC of `realm` at `address`; `port` 0 is any free one. `settings`: more lines of krb5.conf's [libdefaults].

    `enter`: the words before a command that run it in another network. `config` is the path of krb5.conf, fit for clients and servers.
    """

    def __init__(
        self,
        folder: PathName,
        realm: str = "LAB.TEST",
        address: str = "127.0.0.1",
        port: int = 0,
        settings: Mapping[str, str] = MappingProxyType({}),
        enter: Sequence[str] = (),
    ) -> None:
        """Make the database; nothing runs yet. Raises Trouble."""
        self.folder = Path(folder).absolute()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.realm = realm
        self.config = str(self.folder / "krb5.conf")
        self._address, self._port = address, port or _free_port(address)
        self._enter = list(enter)
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._environment = {
            "PATH": PATH, "LC_ALL": "C", "KRB5_CONFIG": self.config, "KRB5_KDC_PROFILE": str(self.folder / "kdc.conf"),
        }  # fmt: skip
        lines = "".join(f" {name} = {value}\n" for name, value in settings.items())
        facts = {"realm": realm, "domain": realm.lower(), "address": address, "port": self._port, "folder": self.folder}
        (self.folder / "krb5.conf").write_text(CONFIG.format(settings=lines, **facts), encoding="utf-8")
        (self.folder / "kdc.conf").write_text(PROFILE.format(**facts), encoding="utf-8")
        self._run("kdb5_util", "create", "-s", "-r", realm, "-P", "master")

    def __enter__(self) -> Kdc:
        """Start it."""
        self.start()
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        """End it."""
        self.stop()

    @property
    def port(self) -> int:
        """The port it listens on, or did last, over UDP and TCP."""
        return self._port

    @property
    def environment(self) -> Dict[str, str]:
        """What a client's environment needs, over what it has."""
        return {"KRB5_CONFIG": self.config}

    # up and down

    def start(self) -> None:
        """It answers; after `stop()`, on the same port again. Raises Trouble."""
        before = len(self.log())
        command = ["krb5kdc", "-n", "-r", self.realm, "-P", str(self.folder / "pid")]
        words = [*self._enter, "env", "-i", *(f"{name}={value}" for name, value in self._environment.items())]
        words += ["sh", "-c", KEEPER, "keeper", *command]
        with open(self.folder / "output", "wb") as output:
            self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + LIMIT_S
        while "commencing operation" not in self.log()[before:]:
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = self.log()[before:] + (self.folder / "output").read_text(encoding="utf-8", errors="replace")
                self.stop()
                raise Trouble(f"the KDC did not start\n{said[-MAX_SHOWN_CHARS:]}")
            time.sleep(0.002)

    def stop(self) -> None:
        """Nobody answers at its port; the database stays."""
        if self._process is None:
            return
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(LIMIT_S)
        finally:
            self._process.kill()
            self._process = None

    # its database

    def add(self, *principals: str, preauth: bool = True) -> None:
        """Each has a random key, which only a keytab holds; `preauth`: and has to prove that it knows it before a ticket is made."""
        flag = "+requires_preauth" if preauth else "-requires_preauth"
        self.kadmin(*(f"addprinc -randkey {flag} {name}" for name in principals))

    def knows(self, principal: str) -> bool:
        """Tell whether there is one of this name."""
        return f"{principal}@{self.realm}" in self.kadmin("listprincs").split()

    def keytab(self, path: PathName, *principals: str) -> str:
        """A file has exactly the present keys of these, mode 0600; their keys stay as they are. Returns its path."""
        fresh = f"{os.fspath(path)}.fresh"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)
        self.kadmin(*(f"ktadd -norandkey -k {fresh} {name}" for name in principals))
        os.chmod(fresh, 0o600)
        os.replace(fresh, path)
        return os.fspath(path)

    def change_key(self, principal: str) -> None:
        """It has another key, with the next version number: keytabs made before are out of date."""
        self.kadmin(f"cpw -randkey {principal}")

    def delete(self, principal: str) -> None:
        """Nobody of this name is known."""
        self.kadmin(f"delprinc -force {principal}")

    def disable(self, principal: str, *, enabled: bool = False) -> None:
        """It gets no ticket, as a disabled account; or gets some again."""
        self.kadmin(f"modprinc {'+' if enabled else '-'}allow_tix {principal}")

    def expire_password(self, principal: str) -> None:
        """Its password ended long ago, and nothing but a new one helps."""
        self.kadmin(f'modprinc -pwexpire "2020-01-01 00:00:00" {principal}')

    def expire(self, principal: str) -> None:
        """The account itself ended long ago."""
        self.kadmin(f'modprinc -expire "2020-01-01 00:00:00" {principal}')

    def set_password(self, principal: str, password: str) -> None:
        """It has this password, and the key that follows from it."""
        self.kadmin(f"cpw -pw {password} {principal}")

    def kadmin(self, *queries: str) -> str:
        """Run kadmin.local's commands and return what was said. Raises Trouble where one failed."""
        said = self._run("kadmin.local", "-r", self.realm, input="".join(f"{query}\n" for query in queries))
        # its exit status tells nothing
        if re.search(r"^\S+: .*(?: while |does not exist)", said, re.MULTILINE):
            raise Trouble(f"{'; '.join(queries)}\n{said}")
        return said

    def _run(self, *words: str, input: str = "") -> str:
        try:
            done = subprocess.run(
                words, check=False, input=input, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S,
                env=self._environment, executable=shutil.which(words[0], path=PATH),
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Trouble(f"{' '.join(words)}: {error}") from error
        if done.returncode:
            raise Trouble(f"{' '.join(words)}: exit status {done.returncode}\n{done.stdout}")
        return done.stdout

    # what it saw

    def log(self) -> str:
        """Return all that it wrote down: a line for each request, with AS_REQ or TGS_REQ, the verdict, and who asked for what."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "kdc.log").read_text(encoding="utf-8", errors="replace")
        return ""

    def requests(self, kind: str, verdict: str = "", principal: str = "") -> List[str]:
        """Return the lines of one kind, AS_REQ or TGS_REQ, with this verdict and of this client; "" is any."""
        found = (line for line in self.log().splitlines() if f" {kind} (" in line)
        # a client's name stands before " for", whatever else the line holds
        return [line for line in found if f": {verdict}" in line and f"{principal}{'@' if principal else ''}" in line.partition(" for ")[0]]

    @property
    def logins(self) -> int:
        """How many tickets for tickets were issued."""
        return len(self.requests("AS_REQ", "ISSUE:"))

    @property
    def failures(self) -> int:
        """How many requests came with proof of a wrong key, as a wrong password; accounts lock after some."""
        return len(self.requests("AS_REQ", "PREAUTH_FAILED:"))

    @property
    def tickets(self) -> int:
        """How many tickets for services were issued."""
        return len(self.requests("TGS_REQ", "ISSUE:"))


def _free_port(address: str) -> int:
    """Return a port that is free over TCP and UDP."""
    while True:
        with socket.socket() as stream, socket.socket(type=socket.SOCK_DGRAM) as datagram:
            stream.bind((address, 0))
            port = int(stream.getsockname()[1])
            with contextlib.suppress(OSError):
                datagram.bind((address, port))
                return port
