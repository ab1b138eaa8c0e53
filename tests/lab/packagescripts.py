"""What the packages' own scripts, SCOM and an administrator's tools do to the agent's files: step by step, in the real order.

In a test:

    packagescripts.omi_install(host)                             # as an upgrade of OMI: what it does depends on what it finds
    packagescripts.scx_install(host, between=lambda done: ...)   # called after each step, with its name

Each is true to what it stands for, failures included: the exit status is returned, the files stay as they then are. None looks
at what the conf says about the pair: the packages know /etc/opt/omi/ssl only. `restart=False` leaves the agent's process alone,
but for a purge and for the classic agent, which ends where OMI is installed over it.
The facts page on the agent (section 6) has the whys. On a host with a classic agent, OMI and then scx is the migration.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import io
import os
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Callable, List, Mapping, Optional, Protocol, Tuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from . import selfsigned

if TYPE_CHECKING:
    from .agent import LabHost

OMI_SSL = "/etc/opt/omi/ssl"
OMI_KEY = f"{OMI_SSL}/omikey.pem"
OMI_PEM = f"{OMI_SSL}/omi.pem"
MARKER = f"{OMI_SSL}/.omi_cert_marker"
OMI_CONF = "/etc/opt/omi/conf/omiserver.conf"
SCX_SSL = "/etc/opt/microsoft/scx/ssl"
SCX_PEM = f"{SCX_SSL}/scx.pem"
SCX_KEY = f"{SCX_SSL}/scx-key.pem"
SCX_CONF = "/etc/opt/microsoft/scx/conf/omiserver.conf"
CLASSIC_SERVERS = ("/opt/microsoft/scx/bin/omiserver", "/opt/microsoft/scx/bin/scxcimserver", "/opt/microsoft/scx/bin/service_control")
OMSAGENT = "/etc/opt/microsoft/omsagent/scom/certs"
OMSAGENT_ACCOUNT = (991, 991)  # omsagent:omiusers

SHIPPED_CONF = "# omiserver configuration file\nhttpport=0\nhttpsport=0\nloglevel = WARNING\n"
CARRIED_OVER = (
    "httpport", "httpsport", "NoSSLv2", "NoSSLv3", "NoTLSv1_0", "NoTLSv1_1", "NoTLSv1_2", "sslciphersuite", "AuthorizedGroups",
    "UnauthorizedGroups",
)  # fmt: skip
SHA1_SINCE = (1, 6, 9)  # OMI looks for it in the signature
DIGITS_SINCE = (1, 9, 0)  # and at the digits of what openssl prints as the size of the key
MIN_DIGITS = 3072

Between = Callable[[str], None]


class Script(Protocol):
    """A script as a test that runs every one of them sees it."""

    def __call__(self, host: LabHost, *, between: Between = ...) -> Any:
        """Run it; what it returns is its own affair."""


def nothing(_done: str) -> None:
    """Do nothing between two steps."""


# small things that a shell does


def _is_file(host: LabHost, path: str) -> bool:
    """Tell what `[ -f path ]` does: links are followed."""
    try:
        return os.path.isfile(host.resolve(path))
    except OSError:  # a loop
        return False


def _move(host: LabHost, source: str, target: str) -> None:
    os.makedirs(os.path.dirname(host.path(target)), mode=0o755, exist_ok=True)
    os.replace(host.path(source), host.path(target))


def _remove(host: LabHost, path: str) -> None:
    """Remove as `rm -rf` does: a link, not what it leads to."""
    real = host.path(path)
    if os.path.isdir(real) and not os.path.islink(real):
        shutil.rmtree(real)
    elif os.path.lexists(real):
        os.unlink(real)


def _chown(host: LabHost, path: str, account: Tuple[int, int]) -> None:
    """Change the owner as chown does, through links; its failure is nobody's concern, and without root there is none to change."""
    with contextlib.suppress(OSError):
        if os.geteuid() == 0:
            os.chown(host.resolve(path), *account)


def _chmod(host: LabHost, path: str, mode: int) -> None:
    os.chmod(host.resolve(path), mode)


def _service(host: LabHost, verb: str) -> None:
    """Have OMI's service_control stop, start or reload (which is a restart), and wait for what should come of it."""
    control = "/opt/omi/bin/service_control"
    if not _is_file(host, control):
        return
    host.run(control, verb)
    if verb == "stop":
        host.wait_gone()
    elif host.port in host.listed:
        host.wait()


def _end_classic(host: LabHost) -> None:
    """Stop the classic agent, whose unit goes with its package."""
    server = f"{host.place.bin}/{host.place.server}"
    if _is_file(host, server):
        host.run(server, "-s")
        host.wait_gone()


# omiserver.conf


def _rewrite_conf(host: LabHost, change: Callable[[List[str]], List[str]]) -> None:
    """Rewrite the conf as the scripts do with omiconfigeditor: another file, moved over it, 0644."""
    if not _is_file(host, OMI_CONF):
        return
    lines = change(host.read(OMI_CONF).decode("latin-1").splitlines())
    host.make_file(f"{OMI_CONF}_temp", "".join(f"{line}\n" for line in lines).encode("latin-1"), 0o644)
    _move(host, f"{OMI_CONF}_temp", OMI_CONF)


def _set(lines: List[str], key: str, value: str) -> List[str]:
    return [*(line for line in lines if not re.match(rf"{key}[ \t]*=", line)), f"{key}={value}"]


def _list_ports(host: LabHost, *, listed: bool) -> None:
    """Put SCOM's port into httpsport, or take it out."""

    def change(lines: List[str]) -> List[str]:
        found = [line.partition("=")[2] for line in lines if re.match(r"httpsport[ \t]*=", line)]
        ports = [item.strip() for item in (found[-1] if found else "0").split(",")]
        port = str(host.port)
        wanted = [*ports, *([] if port in ports else [port])] if listed else [item for item in ports if item != port]
        return lines if wanted == ports and found else _set(lines, "httpsport", ",".join(wanted) or "0")

    _rewrite_conf(host, change)


def _carry_over(host: LabHost) -> None:
    """Take the settings that OMI's scripts know from an older conf: the saved one of an rpm, else the classic agent's."""
    old = next((path for path in (f"{OMI_CONF}.rpmsave", SCX_CONF) if _is_file(host, path)), "")
    if not old:
        return
    text = host.read(old).decode("latin-1")
    for key in CARRIED_OVER:
        value = re.search(rf"^{key}=([^=\n]*)", text, re.MULTILINE)
        if value and value[1]:
            _rewrite_conf(host, partial(_set, key=key, value=value[1]))


# OMI


def _printed(host: LabHost) -> str:
    """Return what openssl prints of the certificate, "" where it can't."""
    done = subprocess.run(
        ["openssl", "x509", "-in", host.resolve(OMI_PEM), "-text"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False
    )
    return done.stdout.decode("latin-1")


def is_distrusted(host: LabHost, version: str = "1.9.1") -> bool:
    """Tell whether this version of OMI throws the pair away at its installation. What openssl can't read is kept."""
    if not (_is_file(host, OMI_KEY) and _is_file(host, OMI_PEM)):
        return False
    known = tuple(map(int, version.split(".")))
    lines = _printed(host).splitlines()
    if known >= SHA1_SINCE and any("sha1" in line.lower() for line in lines if "signature algorithm" in line.lower()):
        return True
    sizes = [re.sub(r"[^0-9]", "", line) for line in lines if "Public-Key" in line]
    return known >= DIGITS_SINCE and len(sizes) == 1 and 0 < int(sizes[0] or 0) < MIN_DIGITS


def _own_certificate(host: LabHost, key: selfsigned.Key) -> bytes:
    """Return what `openssl req -x509` makes with the two names of OMI's script."""
    names = [x509.NameAttribute(NameOID.COMMON_NAME, text) for text in (host.host, host.fqdn)]
    now = dt.datetime.now(dt.timezone.utc).replace(microsecond=0)
    builder = x509.CertificateBuilder().subject_name(x509.Name(names)).issuer_name(x509.Name(names)).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now).not_valid_after(now + dt.timedelta(days=3650))
    return selfsigned.armour(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER))


def omi_install(
    host: LabHost,
    *,
    kind: str = "rsa:3072",
    version: str = "1.9.1",
    distrusted: bool = False,
    conf_replaced: bool = False,
    uid: int = 0,
    restart: bool = True,
    between: Between = nothing,
) -> int:
    """Install or upgrade OMI. `kind`: of a new key. `distrusted`: the pair is thrown away, whatever it is.

    `conf_replaced`: it is an rpm whose conf takes the old one's place. `uid`: of the account, where it is made anew.
    """
    classic = not host.is_omi
    if classic:  # the preinstall script knows the older services
        _end_classic(host)
        host.become("omi")
    elif restart:
        _service(host, "stop")
        between("the agent is stopped")
    _make_account(host, uid)
    os.makedirs(host.path(OMI_SSL), mode=0o755, exist_ok=True)
    host.put_programs()
    if conf_replaced and _is_file(host, OMI_CONF):
        _move(host, OMI_CONF, f"{OMI_CONF}.rpmsave")
    if not _is_file(host, OMI_CONF):
        host.make_file(OMI_CONF, SHIPPED_CONF, 0o444)
    between("the files are unpacked")
    _carry_over(host)
    between("older settings are carried over")
    if distrusted or is_distrusted(host, version):
        for name in os.listdir(host.path(OMI_SSL)):
            if not name.startswith("."):
                _remove(host, f"{OMI_SSL}/{name}")
        between("ssl/* is deleted")
    if not (_is_file(host, OMI_KEY) and _is_file(host, OMI_PEM)) and not _own_pair(host, kind, between):
        return 1
    _chown(host, OMI_KEY, host.account)
    between("the key has its owner")
    if restart:
        _service(host, "start")
        between("the agent is started")
    return 0


def _own_pair(host: LabHost, kind: str, between: Between) -> bool:
    """Make OMI's own pair; False where its files can't be written: a link leads into a folder that is not there."""
    host.make_file(f"{OMI_SSL}/ssl.cnf", f"[ req ]\nCN = {host.host}\nCN = {host.fqdn}\n")
    key = selfsigned.make_key(kind)
    for path, data, mode, done in (
        (OMI_KEY, selfsigned.key_pem(key), 0o600, "the key is written"),
        (OMI_PEM, _own_certificate(host, key), 0o644, "the certificate is written"),
    ):
        try:
            host.write_through(path, data, mode)
        except OSError:
            return False
        between(done)
    _chmod(host, OMI_KEY, 0o600)
    _chmod(host, OMI_PEM, 0o644)
    between("the modes are set")
    host.make_file(MARKER, "")
    between("the marker is made")
    return True


def _make_account(host: LabHost, uid: int) -> None:
    """Make the account `omi` where there is none; without root it is the caller, whatever `uid` says."""
    passwd = Path(host.path("/etc/passwd"))
    text = passwd.read_text(encoding="utf-8")
    if host.machine or re.search("^omi:", text, re.MULTILINE):
        return
    own = (uid, uid) if uid and os.geteuid() == 0 else host.account
    host.account = own
    host.knobs(account=list(own))
    passwd.write_text(f"{text}omi:x:{own[0]}:{own[1]}::/:/bin/false\n", encoding="utf-8")
    group = Path(host.path("/etc/group"))
    group.write_text(f"{group.read_text(encoding='utf-8')}omi:x:{own[1]}:\n", encoding="utf-8")


def omi_remove(host: LabHost, *, rpm: bool = False, restart: bool = True, between: Between = nothing) -> int:
    """Remove OMI: programs and account go, the pair stays. `rpm`: a conf that was changed is saved, dpkg leaves it in place."""
    if restart:
        _service(host, "stop")
        between("the agent is stopped")
    _remove(host, "/opt/omi")
    if rpm and _is_file(host, OMI_CONF):
        _move(host, OMI_CONF, f"{OMI_CONF}.rpmsave")
    between("the files are removed")
    for name in ("passwd", "group"):
        path = Path(host.path(f"/etc/{name}"))
        if not host.machine:
            path.write_text(re.sub("^omi:.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE), encoding="utf-8")
    between("the account is removed")
    return 0


def omi_reinstall(host: LabHost, *, uid: int = 0, kind: str = "rsa:3072", restart: bool = True, between: Between = nothing) -> int:
    """Remove OMI and install it again; `uid`: of the account then."""
    omi_remove(host, restart=restart, between=between)
    between("nothing is installed")
    return omi_install(host, kind=kind, uid=uid, restart=restart, between=between)


# scx


def scxsslconfig(host: LabHost, *arguments: str, between: Between = nothing) -> int:
    """Run scxsslconfig, within this process; the shell's 127 where its package is gone."""
    if not os.path.exists(host.path("/opt/microsoft/scx/bin/tools/scxsslconfig")):
        return 127
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return selfsigned.scxsslconfig(host.root, list(arguments), between)


def scx_install(
    host: LabHost, *, dpkg: bool = False, fails: bool = False, restart: bool = True, between: Between = nothing
) -> int:
    """Install or upgrade scx. `dpkg`: whose upgrade runs the removal script of the old one first. `fails`: to make the new pair."""
    if dpkg:
        _before_removal(host, between)
    _remove(host, "/usr/sbin/scxadmin")
    host.put_scx_programs()
    os.makedirs(host.path(SCX_SSL), mode=0o755, exist_ok=True)
    for path in CLASSIC_SERVERS:
        _remove(host, path)
    between("the files are unpacked")
    _remove(host, SCX_CONF)
    _list_ports(host, listed=True)
    between("the port is listed")
    if os.path.isfile(host.path(MARKER)) and not _new_pair(host, fails=fails, between=between):
        return 1
    if _is_file(host, SCX_PEM):
        _move(host, SCX_PEM, f"{SCX_PEM}_backup")
        between("scx.pem is moved aside")
    if os.path.lexists(host.path(SCX_PEM)):  # ln: File exists, and the script ends at what fails
        return 1
    os.symlink(OMI_PEM, host.path(SCX_PEM))
    between("scx.pem is a link again")
    if restart:
        _service(host, "reload")
        between("the agent is restarted")
    return 0


def _new_pair(host: LabHost, *, fails: bool, between: Between) -> bool:
    """Put a pair of scx's own, or the classic agent's, in the place of OMI's; False where that fails: the old names stay aside."""
    for path in (OMI_KEY, OMI_PEM):
        if _is_file(host, path):
            _move(host, path, f"{path}_temp")
            between(f"{path.rpartition('/')[2]} is moved aside")
    older = f"{SCX_SSL}/scx-seclevel1"
    if _is_file(host, f"{older}-key.pem") and not _is_file(host, SCX_KEY):
        _move(host, f"{older}-key.pem", OMI_KEY)
        between("the older key is moved in")
    elif _is_file(host, SCX_KEY):
        _move(host, SCX_KEY, OMI_KEY)
        between("the classic key is moved in")
    if _is_file(host, f"{older}.pem") and not _is_file(host, SCX_PEM):
        _remove(host, OMI_PEM)
        _move(host, f"{older}.pem", f"{OMI_SSL}/omi-host-{host.host}.pem")
        between("the older certificate is moved in")
        os.symlink(f"{SCX_SSL}/omi-host-{host.host}.pem", host.path(OMI_PEM))  # the wrong folder: the script's own mistake
        between("the certificate's name is a link")
    elif _is_file(host, SCX_PEM):
        _move(host, SCX_PEM, OMI_PEM)
        between("the classic certificate's name is moved in")
    if fails or scxsslconfig(host, between=between):
        return False
    _remove(host, MARKER)
    between("the marker is removed")
    for path in (OMI_KEY, OMI_PEM):
        _remove(host, f"{path}_temp")
    between("what was aside is removed")
    return True


def _before_removal(host: LabHost, between: Between) -> None:
    _list_ports(host, listed=False)
    between("the port is not listed any more")
    for path in (f"{SCX_PEM}_backup", SCX_PEM):
        _remove(host, path)
    between("scx.pem is removed")


def scx_remove(host: LabHost, *, restart: bool = True, between: Between = nothing) -> int:
    """Remove scx: its port, its link and its programs go; OMI goes on with the pair."""
    if not host.is_omi:
        _end_classic(host)
    _before_removal(host, between)
    for path in ("/opt/microsoft/scx/bin", "/usr/sbin/scxadmin"):
        _remove(host, path)
    between("the files are removed")
    if restart:
        _service(host, "reload")
        between("the agent is restarted")
    return 0


# the bundle


def bundle_upgrade(host: LabHost, *, kind: str = "rsa:3072", restart: bool = True, between: Between = nothing) -> int:
    """Upgrade as a Management Server does: OMI, then scx."""
    return omi_install(host, kind=kind, restart=restart, between=between) or scx_install(host, restart=restart, between=between)


def bundle_reinstall(
    host: LabHost, *, uid: int = 0, kind: str = "rsa:3072", restart: bool = True, between: Between = nothing
) -> int:
    """Remove both and install both, as a Management Server does after an upgrade that failed."""
    scx_remove(host, restart=False, between=between)
    omi_remove(host, restart=restart, between=between)
    between("nothing is installed")
    omi_install(host, kind=kind, uid=uid, restart=False, between=between)
    return scx_install(host, restart=restart, between=between)


def purge(host: LabHost, *, restart: bool = True, between: Between = nothing) -> int:
    """Remove both packages and all that is theirs, as `--purge` does. The agent ends, whatever `restart` says: its pid file goes."""
    scx_remove(host, restart=False, between=between)
    for kept in ("/etc", "/opt", "/var/opt"):
        _remove(host, f"{kept}/opt/microsoft/scx" if kept == "/etc" else f"{kept}/microsoft/scx")
    between("what was scx's is removed")
    host.kill()
    omi_remove(host, restart=False, between=between)
    for path in ("/etc/opt/omi", "/var/opt/omi"):
        _remove(host, path)
    between("what was OMI's is removed")
    return 0


def fresh_install(host: LabHost, *, uid: int = 0, kind: str = "rsa:3072", restart: bool = True, between: Between = nothing) -> int:
    """Install both where nothing is: OMI makes a pair with its marker, scx replaces it."""
    omi_install(host, kind=kind, uid=uid, restart=False, between=between)
    return scx_install(host, restart=restart, between=between)


def purge_and_install(
    host: LabHost, *, uid: int = 0, kind: str = "rsa:3072", restart: bool = True, between: Between = nothing
) -> int:
    """Purge, then install anew."""
    purge(host, restart=restart, between=between)
    between("nothing is installed")
    return fresh_install(host, uid=uid, kind=kind, restart=restart, between=between)


# SCOM


def scom_discover(host: LabHost) -> bytes:
    """Return what SCOM's `cat` of scx.pem brings it, b"" where that leads nowhere."""
    return host.read(SCX_PEM) if _is_file(host, SCX_PEM) else b""


def _public_key(certificate: bytes) -> Any:
    """Return a certificate's key; openssl takes the agent's own ones, v1 with extensions, whatever a library thinks of them."""
    done = subprocess.run(["openssl", "x509", "-noout", "-pubkey"], input=certificate, stdout=subprocess.PIPE, check=True)
    return serialization.load_pem_public_key(done.stdout)


def scom_signed(host: LabHost, public_key: Any) -> bytes:
    """Return the DER of what a Management Server signs for this host and key."""
    now = dt.datetime.now(dt.timezone.utc).replace(microsecond=0)
    issuer = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, "SCX-Certificate"),
            x509.NameAttribute(NameOID.TITLE, "SCX55a3b1c2-0000-4000-8000-000000000001"),
            x509.NameAttribute(NameOID.DOMAIN_COMPONENT, "ms01"),
        ]
    )
    return (
        x509.CertificateBuilder()
        .subject_name(selfsigned.agent_name(host.host, host.domain))
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=3650))
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )


def scom_sign(
    host: LabHost, *, found: bytes = b"", public_key: Any = None, restart: bool = True, between: Between = nothing
) -> Optional[bytes]:
    """Sign as a Management Server does: `cat` of scx.pem, later `cp` onto it through the links, then a restart by scxadmin.

    `found`: what an earlier `cat` brought; `public_key`: another than that certificate's. Returns the DER, None where there was
    nothing to sign. The `cp` comes whenever it comes: between the two anything may have happened.
    """
    found = found or scom_discover(host)
    if not found and public_key is None:
        return None
    key = public_key or _public_key(found)
    between("the certificate is fetched")
    der = scom_signed(host, key)
    if os.path.exists(host.resolve(SCX_PEM)):  # cp does not write through a link that leads nowhere
        host.write_through(SCX_PEM, selfsigned.armour(der))
        between("the signed one is copied")
    if restart:
        host.restart()
        between("the agent is restarted")
    return der


# omsagent


def omsagent_install(host: LabHost, *, linked: bool = False, between: Between = nothing) -> int:
    """Install the log agent: with a pair of its own, or with links to the agent's, whose key it then takes for its account."""
    account = OMSAGENT_ACCOUNT if os.geteuid() == 0 else host.account
    for name, target in (("scom-cert.pem", OMI_PEM), ("scom-key.pem", OMI_KEY)):
        path = f"{OMSAGENT}/{name}"
        os.makedirs(host.path(OMSAGENT), mode=0o755, exist_ok=True)
        if linked:
            _remove(host, path)
            os.symlink(target, host.path(path))
        between(f"{name} is there")
    if not linked:
        key = selfsigned.make_key("ec:secp256r1")
        host.make_file(f"{OMSAGENT}/scom-cert.pem", selfsigned.make_certificate(key, host.host, host.domain))
        host.make_file(f"{OMSAGENT}/scom-key.pem", selfsigned.key_pem(key), 0o400)
    _chown(host, f"{OMSAGENT}/scom-key.pem", account)
    between("scom-key.pem has its owner")
    return 0


# all of them


def _scom_signs_late(host: LabHost, *, between: Between = nothing) -> int:
    scom_sign(host, public_key=selfsigned.make_key(QUICK).public_key(), restart=False, between=between)
    return 0


def _scxsslconfig_fails(host: LabHost, *, between: Between = nothing) -> int:
    host.knobs(sslconfig_fails=True)
    status = scxsslconfig(host, "-f", between=between)
    host.knobs(sslconfig_fails=None)
    return status


def _scxsslconfig_f(host: LabHost, *, between: Between = nothing) -> int:
    return scxsslconfig(host, "-f", between=between)


def _scxsslconfig(host: LabHost, *, between: Between = nothing) -> int:
    return scxsslconfig(host, between=between)


QUICK = "ec:secp256r1"  # the real ones make RSA-3072, which takes a hundred times as long
OTHER_UID = 1990
_NEW: Mapping[str, Any] = {"kind": QUICK, "restart": False}
# Each without a restart; what stands afterwards depends on what stood there alone.
SCRIPTS: Mapping[str, Script] = MappingProxyType(
    {
        "omi install": partial(omi_install, **_NEW),
        "omi install, before 1.6.9": partial(omi_install, version="1.6.8", **_NEW),
        "omi install, pair distrusted": partial(omi_install, distrusted=True, **_NEW),
        "omi install, conf replaced": partial(omi_install, conf_replaced=True, **_NEW),
        "omi reinstall, other uid": partial(omi_reinstall, uid=OTHER_UID, **_NEW),
        "omi removal": partial(omi_remove, restart=False),
        "scx install, rpm": partial(scx_install, restart=False),
        "scx install, dpkg": partial(scx_install, dpkg=True, restart=False),
        "scx install, no new pair": partial(scx_install, fails=True, restart=False),
        "scx removal": partial(scx_remove, restart=False),
        "bundle upgrade": partial(bundle_upgrade, **_NEW),
        "bundle reinstall": partial(bundle_reinstall, uid=OTHER_UID, **_NEW),
        "purge": partial(purge, restart=False),
        "purge and install": partial(purge_and_install, uid=OTHER_UID, **_NEW),
        "scxsslconfig": _scxsslconfig,
        "scxsslconfig -f": _scxsslconfig_f,
        "scxsslconfig -f, failing": _scxsslconfig_fails,
        "scom sign": partial(scom_sign, restart=False),
        "scom sign, old key": _scom_signs_late,
        "omsagent": omsagent_install,
        "omsagent, linked": partial(omsagent_install, linked=True),
    }
)
