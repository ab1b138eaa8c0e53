"""A domain of Samba's, an implementation of Active Directory that shares nothing with MIT's KDC, in a network of its own.

    with Domain(tmp_path / "domain") as domain:
        keytab = domain.join("host1.ad.test", "HOST1")  # by adcli, as an operator does it
        domain.service("CA1", "HTTP/ca1.ad.test")
        with domain.ca(tmp_path / "ca") as ca:
            domain.run("/usr/bin/python3", "client.py", ca.server, keytab, ca.server_trust)

Its controller is dc1.ad.test at 10.53.0.1, and so is ca1.ad.test, with the alias ca.ad.test; who is inside finds the domain by its
DNS alone. /etc, /run and Samba's folders are private to it: nothing of the machine's is changed, and any number may run at once.

Everything hangs on one process that ends when the test's process does, for whatever reason; with it go all others, the mounts and
the network. It takes root, and what `missing` names.
"""

from __future__ import annotations

import base64
import contextlib
import glob
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Optional, Set, Union

from . import roots
from .machine import ADDRESS, CA, PathName, Trouble, _children, _ran, wait_for

if TYPE_CHECKING:
    from types import TracebackType

ADMINISTRATOR, PASSWORD = "Administrator", "Passw0rd!x"
SERVICE_PASSWORD, OTHER_PASSWORD = "Longer!Passw0rd9", "Another!Passw0rd9"  # as Samba wants them: long, and of several kinds
INSIDE = "/run/domain"  # where the controller's files are seen; they hold their own paths
PORTS = {88, 389, 445}  # Kerberos, LDAP, SMB
LISTENING = "0A"  # in /proc/net/tcp
LIMIT_S = 120.0  # takes four seconds to make and two to start on a machine with nothing else to do
MAX_AGE_DAYS = 30  # passwords in a domain end after 42
FILES = {  # and their packages; the last three are asked for while a domain is made
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ip": "iproute2",
    "samba": "samba",
    "samba-tool": "samba-common-bin",
    "ldbmodify": "ldb-tools",
    "adcli": "adcli",
    "/usr/share/samba/setup/provision.ldif": "samba-ad-provision",
    "/usr/lib/*/samba/vfs/acl_xattr.so": "samba-vfs-modules",
    "/usr/lib/*/samba/ldb/samba_secrets.so": "samba-dsdb-modules",
}
SETTINGS = f"{INSIDE}/etc/smb.conf"
PROVISION = (
    "samba-tool", "domain", "provision", "--server-role=dc", "--dns-backend=SAMBA_INTERNAL", "--host-name=dc1",
    f"--host-ip={ADDRESS}", f"--adminpass={PASSWORD}", f"--targetdir={INSIDE}", f"--option=interfaces=lo {ADDRESS}",
    "--option=bind interfaces only=yes",
)  # fmt: skip
NAMES = ("samba_spnupdate", "-s", SETTINGS)  # a controller has its services' names only some time after its first start
# A lone controller has nobody to tell of names, time and changes. The key for TLS takes longer than all else.
CONTROLLER = (
    "samba", "-i", "-s", SETTINGS, "--debug-stdout", "-d1", "--option=tls enabled=no",
    "--option=server services=s3fs rpc ldap cldap kdc dns",
)  # fmt: skip

# /etc as the machine has it, but for what would lead out of here; Samba's settings too are nobody's. Lives until its input ends.
KEEPER = """
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/samba /run/etc/upper /run/etc/work "$1"
mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work /etc
mkdir -p /etc/samba
rm -f /etc/hosts /etc/resolv.conf /etc/krb5.conf /etc/samba/smb.conf
cp "$2/hosts" "$2/resolv.conf" "$2/krb5.conf" /etc
: >/etc/samba/smb.conf
for folder in /var/lib/samba /var/cache/samba /var/log/samba; do
    [ ! -d $folder ] || mount -t tmpfs -o mode=755 tmpfs $folder
done
mount --bind "$2/ad" "$1"
hostname dc1
ip link set lo up
ip address add "$3/24" dev lo
echo ready
read -r end || :
"""
CONFIG = """\
[libdefaults]
 default_realm = {realm}
 rdns = false
 dns_canonicalize_hostname = false
 udp_preference_limit = 1
"""
HOSTS = """\
127.0.0.1 localhost
{address} dc1.{domain} dc1
{address} ca1.{domain} ca.{domain}
"""
ACCOUNT = """\
dn: {dn}
objectClass: computer
sAMAccountName: {name}$
userAccountControl: 4096
servicePrincipalName: {spn}
msDS-SupportedEncryptionTypes: 24
clearTextPassword:: {password}
"""
CHANGE = """\
dn: {dn}
changetype: modify
replace: {name}
{name}{value}
"""


def missing() -> str:
    """Return what this machine lacks for a domain, with the packages that bring it; "" for nothing."""
    if os.geteuid() != 0:
        return "root, for a network of its own"
    lacks = [name for name in FILES if not (glob.glob(name) if name.startswith("/") else shutil.which(name, path=roots.PATH))]
    return f"{' '.join(lacks)}: apt-get install {' '.join(sorted({FILES[name] for name in lacks}))}" if lacks else ""


class Domain:
    """A domain whose realm is `realm`, with a controller that runs from entering on; at the end it is gone.

    `config` is the path of the krb5.conf that `run` and `spawn` set; all of `folder` is seen inside as outside.
    """

    def __init__(self, folder: PathName, realm: str = "AD.TEST") -> None:
        """Make its files, from those in the cache where there are some; nothing runs yet. Raises Trouble."""
        self.folder = Path(folder).absolute()
        self.folder.mkdir(mode=0o755, parents=True)
        self.realm = realm
        self.name = realm.lower()
        self.controller = f"dc1.{self.name}"
        self.config = str(self.folder / "krb5.conf")
        self._spaces: Optional[_Spaces] = None
        self._started: List[subprocess.Popen[str]] = []
        subprocess.run(["cp", "-a", _provisioned(realm), str(self.folder / "ad")], check=True)

    def __enter__(self) -> Domain:
        """Start it."""
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        """End it."""
        self.close()

    # up and down

    def start(self) -> None:
        """Its controller answers. Raises Trouble."""
        spaces = self._spaces = _Spaces(self.folder, self.realm)
        with open(self.folder / "log", "ab") as log:
            controller = subprocess.Popen(
                self.words(*CONTROLLER), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, text=True
            )
        self._started.append(controller)

        def answers() -> bool:
            if controller.poll() is not None:
                raise Trouble(f"the controller ended\n{self.log()}")
            return spaces.listens() >= PORTS

        wait_for(answers, LIMIT_S, "the controller answers")

    def close(self) -> None:
        """Nothing of it runs; its files stay."""
        if self._spaces:
            self._spaces.close()
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LIMIT_S)
            if process.stdout:
                process.stdout.close()
        self._spaces, self._started = None, []

    def log(self) -> str:
        """Return the end of what the controller said."""
        return (self.folder / "log").read_text(encoding="utf-8", errors="backslashreplace")[-4000:]

    # doing things in it

    def words(self, *argv: str, env: Optional[Dict[str, str]] = None) -> List[str]:
        """Return the command that runs `argv` inside, as root, with nothing of this environment but the krb5.conf's path."""
        if self._spaces is None:
            raise Trouble("the domain does not run")
        settings = {
            "PATH": roots.PATH, "HOME": "/root", "LANG": "C.UTF-8", "KRB5_CONFIG": self.config,
            "KRB5CCNAME": f"FILE:{self.folder}/tickets", **(env or {}),
        }  # fmt: skip
        return [*self._spaces.enter, "env", "-i", *(f"{name}={value}" for name, value in settings.items()), *argv]

    def run(
        self, *argv: str, check: bool = True, timeout: float = 60.0, input: Union[str, bytes, None] = None, env: Optional[Dict[str, str]] = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside; its two outputs are kept apart.

        Raises Trouble unless it ends in time, and with status 0 where `check`.
        """
        shown = f"in {self.realm}: {' '.join(argv)}"
        return _ran(self.words(*argv, env=env), shown=shown, check=check, timeout=timeout, input=input)

    def spawn(self, *argv: str, env: Optional[Dict[str, str]] = None) -> subprocess.Popen[str]:
        """Start a command as `run` does, with a pipe for both its outputs; it ends with the domain."""
        started = subprocess.Popen(
            self.words(*argv, env=env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._started.append(started)
        return started

    def ca(self, folder: PathName, keytab: str, *options: str, port: int = 443) -> CA:
        """Return the lab's CA at ca1 in this network; it takes Kerberos alone, and insists on bindings. `options`: of `tests.lab.ca`."""
        words = self.words()
        command = [sys.executable, "-I", "-m", f"{__package__}.ca", "--directory", os.fspath(folder)]
        serving = ["--address", ADDRESS, "--server-name", f"ca1.{self.name}", "--port", str(port), "--kerberos-keytab", keytab]
        return CA(words, command, [*serving, "--begin", "auth=kerberos", *options], Path(folder))

    # its accounts

    def join(self, fqdn: str, computer: str) -> str:
        """A machine is in the domain, as `adcli join` does it for an administrator; returns the path of the keytab that this made."""
        keytab = str(self.folder / f"{computer}.keytab")
        self.run(
            "adcli", "join", f"--domain={self.name}", f"--domain-controller={self.controller}", f"--login-user={ADMINISTRATOR}",
            "--stdin-password", f"--host-keytab={keytab}", f"--host-fqdn={fqdn}", f"--computer-name={computer}", input=PASSWORD,
        )  # fmt: skip
        return keytab

    def service(self, computer: str, spn: str) -> str:
        """There is a computer with this service's name, which takes AES; returns the path of a keytab of the service's."""
        fields = {"dn": self._dn(computer), "name": computer, "spn": spn, "password": _secret(SERVICE_PASSWORD)}
        self._ldb("ldbadd", input=ACCOUNT.format(**fields))
        keytab = str(self.folder / f"{computer}.service.keytab")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(keytab)
        self.run("samba-tool", "domain", "exportkeytab", keytab, f"--principal={spn}", "-s", SETTINGS)
        return keytab

    def reset_password(self, computer: str) -> None:
        """A computer's password is another: its keytabs are out of date."""
        self._change(computer, "clearTextPassword", f":: {_secret(OTHER_PASSWORD)}")

    def disable(self, computer: str) -> None:
        """A computer's account is disabled."""
        self._change(computer, "userAccountControl", ": 4098")

    def delete(self, computer: str) -> None:
        """There is no such computer."""
        self._ldb("ldbdel", self._dn(computer), "--recursive")

    def _change(self, computer: str, name: str, value: str) -> None:
        self._ldb("ldbmodify", input=CHANGE.format(dn=self._dn(computer), name=name, value=value))

    def _ldb(self, tool: str, *argv: str, input: str = "") -> None:
        self.run(tool, "-H", f"{INSIDE}/private/sam.ldb", *argv, input=input)

    def _dn(self, computer: str) -> str:
        return f"CN={computer},CN=Computers,{',DC='.join(['', *self.name.split('.')])[1:]}"


class _Spaces:
    """The name spaces of a domain whose files are in a folder; all that was entered into them ends with `close`."""

    def __init__(self, folder: Path, realm: str) -> None:
        (folder / "ad").mkdir(exist_ok=True)
        facts = {"realm": realm, "domain": realm.lower(), "address": ADDRESS}
        (folder / "hosts").write_text(HOSTS.format(**facts), encoding="utf-8")
        (folder / "resolv.conf").write_text(f"nameserver {ADDRESS}\n", encoding="utf-8")
        (folder / "krb5.conf").write_text(CONFIG.format(**facts), encoding="utf-8")
        words = ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec", KEEPER]
        self._keeper = subprocess.Popen(
            [*words, "keeper", INSIDE, str(folder), ADDRESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        if not self._keeper.stdout or self._keeper.stdout.readline() != b"ready\n":
            self.close()
            raise Trouble(f"{folder}: no name spaces of its own")
        self._inner = _children(self._keeper.pid)[0]
        self.enter = ["nsenter", "--target", str(self._inner), "--mount", "--uts", "--ipc", "--net", "--pid"]

    def listens(self) -> Set[int]:
        """Return the TCP ports that somebody listens on, inside."""
        lines = Path(f"/proc/{self._inner}/net/tcp").read_text(encoding="ascii").splitlines()[1:]
        return {int(line.split()[1].rpartition(":")[2], 16) for line in lines if line.split()[3] == LISTENING}

    def close(self) -> None:
        """They are gone, with all that ran there."""
        self._keeper.kill()
        for pipe in (self._keeper.stdin, self._keeper.stdout):
            if pipe:
                pipe.close()
        self._keeper.wait()


def _provisioned(realm: str) -> str:
    """Return the files of a domain that nobody has started yet, made now if there are none that are young enough. Raises Trouble."""
    version = subprocess.run(["samba", "--version"], check=True, capture_output=True, text=True).stdout
    key = hashlib.sha256(repr((version, realm, PROVISION, NAMES, KEEPER, CONFIG, HOSTS)).encode()).hexdigest()[:12]
    cache = os.path.join(roots.cache(), "domains")
    os.makedirs(cache, mode=0o700, exist_ok=True)
    with roots._locked(os.path.join(cache, "lock")):
        fitting = sorted(glob.glob(os.path.join(cache, f"{key}-*")))
        if fitting and roots._age_days(fitting[-1]) < MAX_AGE_DAYS:
            return os.path.join(fitting[-1], "ad")
        fresh = Path(cache, ".making")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        spaces = _Spaces(fresh, realm)
        try:
            for words in ((*PROVISION, f"--realm={realm}", f"--domain={realm.partition('.')[0]}"), NAMES):
                _ran([*spaces.enter, *words], shown=" ".join(words), check=True, timeout=LIMIT_S, input=None)
        finally:
            spaces.close()
        made = os.path.join(cache, f"{key}-{int(time.time())}")
        os.rename(fresh, made)
        # nobody still copies an older one
        for other in glob.glob(os.path.join(cache, "*-*")):
            if roots._age_days(other) > MAX_AGE_DAYS + 2:
                shutil.rmtree(other, ignore_errors=True)
        return os.path.join(made, "ad")


def _secret(password: str) -> str:
    return base64.b64encode(password.encode("utf-16-le")).decode("ascii")
