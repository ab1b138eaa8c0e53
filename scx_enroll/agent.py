"""Finds the SCOM agent beneath the root and reads it: layout, paths, ports, the pair, who is at work on it.

Layouts are found by looking, never by version number. omiserver.conf is read exactly as the agent reads it (OMI's
base/conf.c and server/servercommon.c), because what it makes of a line decides which files root is going to replace.
"""

import os
import pwd
import re
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Tuple

from scx_enroll import systemd
from scx_enroll.errors import AgentNotReady, HostError
from scx_enroll.idle import MAX_STAT_BYTES
from scx_enroll.rootfs import Entry, Root

MAX_CONF_BYTES = 256 << 10  # the shipped omiserver.conf has 4 kB
MAX_PEM_BYTES = 256 << 10  # a pair has 4 kB; the agent itself sets no limit
MAX_PASSWD_BYTES = 1 << 20  # of an image's tree; this host's own is asked through the C library
MAX_PID_BYTES = 64  # a number and a newline
CONF_LINE_BYTES = 1023  # what one fgets() gives the agent; a longer line is several lines to it
SCOM_PORT = 1270
SERVER = "omiserver"  # its process, where there is a pid file

_TOOLS = "/opt/microsoft/scx/bin/tools"
_CLASSIC_SSL = "/etc/opt/microsoft/scx/ssl"
_OLD_KEY = f"{_CLASSIC_SSL}/scx-key.pem"
_DEAD = "the agent would not start, and as a service it says nothing"


@dataclass(frozen=True)
class Agent:
    """The agent's installation: paths beneath the root; see facts/agent.md sections 1 and 2."""

    layout: str  # "omi", "classic-omi" or "pegasus"
    certificate: str  # the name that the server reads
    key: str
    conf: str  # "" for pegasus
    ports: Tuple[int, ...]  # where it serves HTTPS
    port: int  # the one that SCOM uses, always one of them
    account: str  # who reads the pair
    marker: str  # the package's "this pair is mine"; "" where the layout has none
    pid_file: str
    log: str  # for a person
    scxadmin: str
    scxsslconfig: str
    server: str = ""  # its program, by which it is ended and told to read its pair again; "" where that is not known
    unit: str = ""  # what it is called as a service


@dataclass(frozen=True)
class Pair:
    """Certificate and key: what the name is, what it leads to, the bytes (None if absent or dangling)."""

    name: Entry
    target: Entry
    certificate: Optional[bytes]
    key_target: Entry
    key: Optional[bytes]


@dataclass(frozen=True)
class _Layout:
    server: str  # this program and `conf` together make the layout live
    conf: str
    pemfile: str
    keyfile: str
    state: str  # where run/ and log/ are
    nonroot: str
    marker: str
    unit: str


_LAYOUTS: Mapping[str, _Layout] = {
    "omi": _Layout(
        server="/opt/omi/bin/omiserver",
        conf="/etc/opt/omi/conf/omiserver.conf",
        pemfile="/etc/opt/omi/ssl/omi.pem",
        keyfile="/etc/opt/omi/ssl/omikey.pem",
        state="/var/opt/omi",
        nonroot="true",
        marker="/etc/opt/omi/ssl/.omi_cert_marker",
        unit="omid",
    ),
    "classic-omi": _Layout(
        server="/opt/microsoft/scx/bin/omiserver",
        conf="/etc/opt/microsoft/scx/conf/omiserver.conf",
        pemfile=f"{_CLASSIC_SSL}/scx.pem",
        keyfile=f"{_CLASSIC_SSL}/scx-key.pem",
        state="/var/opt/microsoft/scx",
        nonroot="false",
        marker="",
        unit="scx-cimd",
    ),
}


KEYS = tuple(layout.keyfile for layout in _LAYOUTS.values())  # where keys stand, unless omiserver.conf moves them


def _ports(value: str) -> Optional[Tuple[int, ...]]:
    """Return the ports of a list, 0 and repeats left out; None where strtoul() would not take all of an item."""
    found: List[int] = []
    for item in filter(None, value.split(",")):
        if not re.fullmatch(r"[ \t\v\f\r]*([+-]?0+|\+?[0-9]+)", item) or int(item) > 0xFFFF:
            return None
        found.append(int(item))
    return tuple(dict.fromkeys(port for port in found if port))


def _groups(value: str) -> bool:
    """Tell whether each name of a list begins with a letter; whether the group exists is not looked up."""
    return all(re.match("[A-Za-z]|$", item.lstrip(" ")) for item in value.split(","))


def _shaped(pattern: str) -> Callable[[str], bool]:
    return lambda value: bool(re.fullmatch(pattern, value, re.IGNORECASE | re.DOTALL))


_any = _shaped(r".*")
_boolean = _shaped(r"true|false")
_number = _shaped(r"([+-]?[0-9]+)?")

# The other names in base/paths.c; only what moves the pair, the pid file or the log matters here. Not "destdir", which moves
# everything below another root: an agent so configured is none that we know, so it is refused as unknown.
_PLACES = """
    prefix libdir bindir localstatedir sysconfdir providerdir certsdir datadir rundir logdir schemadir schemafile pidfile logfile
    registerdir agentprogram serverprogram includedir configfile socketfile tmpdir authdir httpsendtracefile httprecvtracefile
    httpclientsendtracefile httpclientrecvtracefile srcdir keytabfile clientconfigfile
""".split()  # noqa: SIM905 - forty lines of one word each would say no more

# Each key that GetConfigFileOptions() knows, and what it takes. Keys of the second table match in any case.
_EXACT: Mapping[str, Callable[[str], bool]] = {
    **dict.fromkeys(("httpport", "httpsport"), lambda value: _ports(value) is not None),
    **dict.fromkeys(("idletimeout", "livetime"), _number),
    **dict.fromkeys(("trace", "httptrace", "NoSSLv2", "NoSSLv3", "NoSSLCompression"), _boolean),
    **dict.fromkeys(("NoTLSv1_0", "NoTLSv1_1", "NoTLSv1_2"), _boolean),
    "loglevel": _shaped(r"[0-5]|fatal|error|warning|info|debug|verbose"),
    "sslciphersuite": _any,
    **dict.fromkeys(("pemfile", "keyfile"), _shaped(r".+")),
    **dict.fromkeys(_PLACES, _any),
}
_FOLDED: Mapping[str, Callable[[str], bool]] = {
    **dict.fromkeys(("ntlmcredsfile", "krb5credcache"), _any),
    "service": _shaped(r".+"),
    **dict.fromkeys(("nonroot", "agentdebugging"), _boolean),
    **dict.fromkeys(("authorizedgroups", "unauthorizedgroups"), _groups),
}


def _settings(data: bytes, where: str) -> Dict[str, Tuple[int, str]]:
    """Return each key's last line number and value. Raises AgentNotReady naming the line that the agent dies of."""
    settings: Dict[str, Tuple[int, str]] = {}
    number = 0
    for line in re.findall(rb"[^\n]{0,%d}\n|[^\n]{1,%d}" % (CONF_LINE_BYTES - 1, CONF_LINE_BYTES), data):
        number += 1
        text = os.fsdecode(line.partition(b"\0")[0]).rstrip(" \t\n\v\f\r")
        if not text or text.startswith("#"):
            continue
        shape = re.fullmatch(r"[ \t\v\f\r]*([A-Za-z_][A-Za-z0-9_]*)[ \t\v\f\r]*=[ \t\v\f\r]*(.*)", text, re.DOTALL)
        key = shape[1] if shape else ""
        folded = key if key in _EXACT else key.lower()
        takes = _EXACT.get(key) or _FOLDED.get(folded)
        if not shape:
            why = "not of the form key=value"
        elif takes is None:
            why = f"unknown key {key}"
        elif not takes(shape[2]):
            why = f"bad value for {key}"
        else:
            settings[folded] = (number, shape[2])
            continue
        raise AgentNotReady(f"{where} line {number}: {why}: {_DEAD}", f"correct line {number} of {where}")
    return settings


def find(root: Root, layout: str = "auto", port: Optional[int] = 0) -> Agent:
    """Return the agent beneath `root`; `port` 0 means SCOM's own, None whichever it serves, 0 then where it serves none.

    Raises AgentNotReady, saying what was seen, if there is none, or two, or its configuration is not fit for SCOM.
    """
    live = [name for name, known in _LAYOUTS.items() if all(_is_file(root, path) for path in (known.server, known.conf))]
    if not live and _is_file(root, _OLD_KEY):
        live = ["pegasus"]
    if len(live) > 1 and layout == "auto":
        seen = " and ".join(f"{name} ({_LAYOUTS[name].conf})" for name in live)
        raise AgentNotReady(f"two agents are installed: {seen}", "remove the old one, or set layout in [agent]")
    if not live or layout not in ("auto", *live):
        wanted = "agent" if layout == "auto" else f"agent of layout {layout}"
        old = _old(root)
        cure = f"; or, where an old one is, give its key the name back, or have one made ({_TOOLS}/scxsslconfig)" if old else ""
        raise AgentNotReady(f"no {wanted} was found: {_seen(root)}{old}", f"install the SCOM agent{cure}, then run again")
    chosen = live[0] if layout == "auto" else layout
    return _pegasus(port or SCOM_PORT) if chosen == "pegasus" else _omi(root, chosen, SCOM_PORT if port == 0 else port)


def _is_file(root: Root, path: str) -> bool:
    return root.resolve(path).kind == "file"


def marks(root: Root, layout: str) -> Tuple[str, str]:
    """Return path and state of the agent's server and of its configuration: what tells one installation of it from another."""
    known = _LAYOUTS.get(layout)
    return (mark(root, known.server), mark(root, known.conf)) if known else ("", "")


def mark(root: Root, path: str) -> str:
    """Return a path, and which file stands there; the path alone where none does."""
    found = root.resolve(path)
    return f"{path} {found.inode},{found.mtime_ns},{found.size}" if found.kind == "file" else path


_LOOKED = tuple(path for known in _LAYOUTS.values() for path in (known.server, known.conf))


def _seen(root: Root) -> str:
    return "; ".join(f"{path} is {'there' if _is_file(root, path) else 'missing'}" for path in _LOOKED)


def _old(root: Root) -> str:
    """Name the key that is missing where Pegasus, which is known by it, left its certificate."""
    if any(_is_file(root, path) for path in (*_LOOKED, _OLD_KEY)) or root.entry(f"{_CLASSIC_SSL}/scx.pem").kind == "absent":
        return ""
    aside = f"; {_OLD_KEY}_temp is there" if _is_file(root, f"{_OLD_KEY}_temp") else ""
    return f"; {_OLD_KEY}, by which an agent older than scx 1.5 is known, is missing{aside}"


def _omi(root: Root, name: str, port: Optional[int]) -> Agent:
    known = _LAYOUTS[name]
    # Who may write this file chooses which names root replaces, so it must be root's.
    settings = _settings(root.read(known.conf, MAX_CONF_BYTES, trusted=True), known.conf)

    def value(key: str, default: str) -> str:
        return settings.get(key, (0, default))[1]

    def path(key: str, default: str) -> str:
        given = value(key, default)
        return given if given.startswith("/") else f"{known.state}/run/{given}"  # where the server's chdir() went

    ports = _ports(value("httpsport", "5986")) or ()
    if port is None:
        port = next(iter(ports), 0)
    elif port not in ports:
        listed = ", ".join(map(str, ports)) or "no port"
        hint = (
            f"add it: /opt/omi/bin/omiconfigeditor httpsport -a {port} < {known.conf} > new, put new in its place and run "
            "scxadmin -restart; or install the agent with --enable-opsmgr; or set port in [agent]"
        )
        raise AgentNotReady(f"{known.conf}: httpsport lists {listed}, not {port}, which SCOM connects to", hint)
    return Agent(
        layout=name,
        certificate=path("pemfile", known.pemfile),
        key=path("keyfile", known.keyfile),
        conf=known.conf,
        ports=ports,
        port=port,
        account=value("service", "omi") if value("nonroot", known.nonroot).lower() == "true" else "root",
        marker=known.marker,
        pid_file=path("pidfile", f"{known.state}/run/omiserver.pid"),
        log=path("logfile", f"{known.state}/log/omiserver.log"),
        scxadmin=f"{_TOOLS}/scxadmin",
        scxsslconfig=f"{_TOOLS}/scxsslconfig",
        server=known.server,
        unit=known.unit,
    )


def _pegasus(port: int) -> Agent:
    return Agent(
        layout="pegasus",
        certificate=f"{_CLASSIC_SSL}/scx.pem",
        key=_OLD_KEY,
        conf="",
        ports=(port,),
        port=port,
        account="root",
        marker="",
        pid_file="",
        log="the agent's own log",
        scxadmin=f"{_TOOLS}/scxadmin",
        scxsslconfig=f"{_TOOLS}/scxsslconfig",
        unit="scx-cimd",
    )


def owner(root: Root, agent: Agent) -> Optional[Tuple[int, int]]:
    """Return uid and gid of the account that reads the pair, ours where we may not give files away; None where it is not known here."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    if agent.account == "root":
        return 0, 0
    if root.path == "/":
        try:
            account = pwd.getpwnam(agent.account)
        except KeyError:
            return None
        return account.pw_uid, account.pw_gid
    lines = (_contents(root, "/etc/passwd", MAX_PASSWD_BYTES) or b"").split(b"\n")
    words = (line.split(b":") for line in lines if line.startswith(os.fsencode(agent.account) + b":"))
    return next(((int(word[2]), int(word[3])) for word in words if len(word) > 3 and word[2].isdigit() and word[3].isdigit()), None)


def read_pair(root: Root, agent: Agent) -> Pair:
    """Return what the agent would read now. Raises HostError for a loop of links, or what is no regular file."""
    return Pair(
        name=root.entry(agent.certificate),
        target=root.resolve(agent.certificate),
        certificate=_contents(root, agent.certificate, MAX_PEM_BYTES),
        key_target=root.resolve(agent.key),
        key=_contents(root, agent.key, MAX_PEM_BYTES),
    )


def _contents(root: Root, path: str, limit: int) -> Optional[bytes]:
    try:
        return root.read(path, limit)
    except FileNotFoundError:
        return None


def pid(root: Root, agent: Agent) -> int:
    """Return what the pid file says, 0 where there is none or it holds no number."""
    found = _contents(root, agent.pid_file, MAX_PID_BYTES) if agent.pid_file else None
    return int(found) if found and re.fullmatch(rb"\s*[1-9][0-9]{0,8}\s*", found) else 0


def process(root: Root, agent: Agent) -> str:
    """Return "running", "stopped" (no pid file: on purpose) or "died" (a pid file, but no such process; or its unit says so).

    In a tree that isn't live nothing runs. Pegasus leaves no pid file we know of: "running", and the port must tell. systemd removes
    the pid file of a service that failed; while it is about to start that again, it is down all the same.
    """
    if not root.live:
        return "stopped"
    if not agent.pid_file:
        return "running"
    pid = _contents(root, agent.pid_file, MAX_PID_BYTES)
    if pid is None:
        return "died" if _state(root, agent) in ("failed", "activating") else "stopped"
    return "running" if _is_running(pid) else "died"


def _state(root: Root, agent: Agent) -> str:
    """Return the state of the agent's unit, "" where systemd does not keep it; it is noted, since it is no file."""
    if not systemd.manages(root.path):
        return ""
    state = root.notes.units[agent.unit] = systemd.show(agent.unit, "ActiveState").get("ActiveState", "")
    return state


def _is_running(pid: bytes) -> bool:
    if not re.fullmatch(rb"\s*[1-9][0-9]{0,8}\s*", pid):  # kill(2) takes 0 and less for groups
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's, so it is there
    try:
        return Root("/").read(f"/proc/{int(pid)}/stat", MAX_STAT_BYTES).rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (OSError, HostError, IndexError):  # the sandbox hides it
        return True


def packager(root: Root) -> str:
    """Return the name of a package manager that holds its lock ("dpkg", "rpm", "zypp"), or "". No lock is taken."""
    return next(_packagers(root), "")


def _packagers(root: Root) -> Iterator[str]:
    locks = {
        "dpkg": ("/var/lib/dpkg/lock-frontend", "/var/lib/dpkg/lock"),
        "rpm": ("/usr/lib/sysimage/rpm/.rpm.lock", "/var/lib/rpm/.rpm.lock"),
    }
    for name, paths in locks.items():
        if any(root.is_locked(path) for path in paths):
            yield name
    pid = _contents(root, "/run/zypp.pid", MAX_PID_BYTES) if root.live else None
    if _is_running(pid or b""):
        yield "zypp"
    elif pid and pid.strip().isdigit():
        root.notes.ended.add(int(pid))
