"""Apache with mod_auth_gssapi in front of a few of AD CS's pages: Negotiate as others have written it, SPNEGO and bare Kerberos.

    with Apache(tmp_path / "apache", kdc.keytab(tmp_path / "http.keytab", "HTTP/localhost"), kdc.config) as apache:
        ...  # server = apache.server, server-trust = apache.server_trust
        assert apache.log()[-1].account == "HOST1$@LAB.TEST"

It has what a client reads before a request: certcarc.asp, the CA's certificate and its chain; and tells in X-User whom it took the
client for. It proves itself to those who ask, but insists on no channel bindings: no version of the module can.

Nothing of /etc/apache2 is read. What root starts serves as another user. It ends with the process that made it.
"""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import socket
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional

from . import roots
from .authority import Authority, pkcs7, to_pem
from .kdc import KEEPER
from .machine import PathName, Trouble, wait_for
from .pages import Pages
from .switches import Switches
from .webcerts import WebCertificates

if TYPE_CHECKING:
    from types import TracebackType

USERS = ("www-data", "nobody")
INSIDE = "/run/apache"  # where its folder is seen by a user who may not enter the folders above it
MODULES = "/usr/lib/apache2/modules"
LIMIT_S = 30.0  # takes a tenth of a second
LINES = "apache.log"

BIND = """
mount -t tmpfs -o mode=755 tmpfs /run
mkdir "$2"
mount --bind "$1" "$2"
shift 2
exec "$@"
"""
CONFIG = """\
ServerRoot {root}
ServerName {name}
Listen {address}:{port}
PidFile {root}/pid
ErrorLog {root}/errors
LogLevel info auth_gssapi:debug
CustomLog {root}/{lines} "%>s %u %r"
DocumentRoot {root}/pages
{user}
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authn_core_module {modules}/mod_authn_core.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule authz_user_module {modules}/mod_authz_user.so
LoadModule auth_gssapi_module {modules}/mod_auth_gssapi.so
LoadModule headers_module {modules}/mod_headers.so
LoadModule ssl_module {modules}/mod_ssl.so
StartServers 1
ThreadsPerChild 4
MaxRequestWorkers 4
KeepAliveTimeout 60
SSLSessionCache none
<VirtualHost *:{port}>
 SSLEngine on
 SSLCertificateFile {root}/web.pem
 <Directory {root}/pages>
  Require all denied
 </Directory>
 <Location /certsrv>
  ForceType "text/html"
  AuthType GSSAPI
  AuthName Lab
  GssapiCredStore keytab:{root}/keytab
  GssapiAllowedMech krb5
  GssapiSSLonly On
  GssapiNegotiateOnce On
  Require valid-user
  Header always set X-User "expr=%{{REMOTE_USER}}" "expr=-n %{{REMOTE_USER}}"
 </Location>
</VirtualHost>
"""


@dataclass(frozen=True)
class Line:
    """A request: what was answered, the account or "-", and the request line."""

    status: int
    account: str
    request: str


def missing() -> str:
    """Return what this machine lacks for Apache, with the packages that bring it; "" for nothing."""
    lacks = []
    if not shutil.which("apache2", path=roots.PATH):
        lacks.append("apache2-bin")
    if not glob.glob(f"{MODULES}/mod_auth_gssapi.so"):
        lacks.append("libapache2-mod-auth-gssapi")
    return f"Apache with Kerberos: apt-get install {' '.join(lacks)}" if lacks else ""


class Apache:
    """Listens at a free port as localhost, with the service's keys in `keytab` and a krb5.conf, `config`; both are copied.

    Its certificate is for `name` too, from a root of its own.
    """

    def __init__(self, folder: PathName, keytab: PathName, config: PathName, name: str = "ca.lab.test") -> None:
        """Make its files; nothing listens yet."""
        self.folder = Path(folder).absolute()
        (self.folder / "pages" / "certsrv").mkdir(parents=True)
        self.server_trust = str(self.folder / "server-trust.pem")
        self.issuer_trust = str(self.folder / "issuer-trust.pem")
        self.port = _free_port()
        self.server = f"localhost:{self.port}"
        self.url = f"https://{self.server}/certsrv/"
        self._process: Optional[subprocess.Popen[bytes]] = None
        _write(self.folder / "krb5.conf", Path(config).read_bytes(), 0o644)
        shown = WebCertificates(self.folder, name).shown("")
        _write(self.folder / "web.pem", shown.chain + shown.secret, 0o600)
        self.use_keytab(keytab)
        authority = Authority()
        chain = authority.chain()
        pages = {
            "certcarc.asp": Pages(authority, Switches()).renewals().encode(),
            "certnew.cer": to_pem(chain[:1]),
            # armoured as a certificate although it is PKCS#7 (facts 4)
            "certnew.p7b": ssl.DER_cert_to_PEM_cert(pkcs7(chain)).encode(),
            "default.asp": b"<HTML></HTML>",
        }
        for page, text in pages.items():
            _write(self.folder / "pages" / "certsrv" / page, text, 0o644)
        Path(self.issuer_trust).write_bytes(to_pem(authority.roots))

    def __enter__(self) -> Apache:
        """Start it."""
        self.start()
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        """End it."""
        self.stop()

    def use_keytab(self, keytab: PathName) -> None:
        """It has these keys from now on; those who serve may read them."""
        path = self.folder / "keytab"
        _write(path, Path(keytab).read_bytes(), 0o600)
        if os.geteuid() == 0:
            account = pwd.getpwnam(_user())
            os.chown(path, account.pw_uid, account.pw_gid)

    def start(self) -> None:
        """It listens. Raises Trouble."""
        entering: List[str] = []
        root, user = str(self.folder), ""
        if os.geteuid() == 0:
            os.chmod(self.folder, 0o755)
            root, user = INSIDE, f"User {_user()}\nGroup #{pwd.getpwnam(_user()).pw_gid}"
            entering = ["unshare", "--mount", "sh", "-ec", BIND, "bind", str(self.folder), INSIDE]
        facts = {"root": root, "user": user, "name": "localhost", "address": "127.0.0.1", "port": self.port}
        (self.folder / "apache.conf").write_text(CONFIG.format(modules=MODULES, lines=LINES, **facts), encoding="utf-8")
        environment = {"PATH": roots.PATH, "LC_ALL": "C", "KRB5_CONFIG": f"{root}/krb5.conf"}
        words = [*entering, "sh", "-c", KEEPER, "keeper", "apache2", "-d", root, "-f", f"{root}/apache.conf", "-DFOREGROUND"]
        with open(self.folder / "output", "ab") as output:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
        try:
            wait_for(self._listens, LIMIT_S, "Apache listens")
        except BaseException:
            self.stop()
            raise

    def _listens(self) -> bool:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                return True
        if self._process and self._process.poll() is not None:
            raise Trouble(f"Apache did not start\n{self.said()}")
        return False

    def stop(self) -> None:
        """Nobody answers at its port; its files stay."""
        if self._process and self._process.stdin:
            self._process.stdin.close()
            self._process.wait(LIMIT_S)
        self._process = None

    def said(self) -> str:
        """Return what it said on its way up, and about what it refused."""
        names = ("output", "errors")
        return "".join((self.folder / name).read_text(encoding="utf-8", errors="replace") for name in names if (self.folder / name).exists())

    def log(self) -> List[Line]:
        """Return the requests, in the order in which they were answered."""
        found = []
        for line in (self.folder / LINES).read_text(encoding="utf-8", errors="replace").splitlines():
            status, account, request = line.split(" ", 2)
            found.append(Line(int(status), account, request))
        return found


def _user() -> str:
    """Return who serves where root starts."""
    names = {account.pw_name for account in pwd.getpwall()}
    return next(name for name in USERS if name in names)


def _write(path: Path, data: bytes, mode: int) -> None:
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
    path.chmod(mode)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
