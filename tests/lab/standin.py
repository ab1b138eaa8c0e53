"""The stand-in for the agent's programs: omiserver, service_control and scxadmin with their bad habits.

Standard library only: it is copied into the host tree (/lab/standin.py) and run there by a bare interpreter. Each program finds
its root from its own place, and the server process through the pid file beneath that root, never by name, so that many trees
can run side by side. With the knob `machine` the root is a machine's own, "", and systemd keeps the server. Everything is from the facts page on the agent; section numbers below are that page's.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from typing import Any, Dict, List, NamedTuple, NoReturn, Optional, Tuple

MAX_HOPS = 40
MAX_CONF_BYTES = 1 << 20

# the first ones are paths that a conf may set ("nicknames")
KEYS = frozenset(
    [
        "prefix", "libdir", "bindir", "localstatedir", "sysconfdir", "providerdir", "certsdir", "datadir", "rundir",
        "logdir", "schemadir", "schemafile", "pidfile", "logfile", "registerdir", "agentprogram", "serverprogram",
        "includedir", "configfile", "httpport", "httpsport", "pemfile", "keyfile", "trace", "httptrace",
        "idletimeout", "livetime", "loglevel", "ntlmcredsfile", "sslciphersuite", "NoSSLv2", "NoSSLv3", "NoTLSv1_0",
        "NoTLSv1_1", "NoTLSv1_2", "NoSSLCompression", "AuthorizedGroups", "UnauthorizedGroups",
    ]
)
ANY_CASE = frozenset(["nonroot", "service"])

EVENTS = {
    "certificate": (20029, "ERROR"),
    "key-open": (20023, "ERROR"),
    "key-create": (20024, "ERROR"),
    "key-none": (20025, "ERROR"),
    "key-match": (20026, "ERROR"),
    "listen": (20154, "ERROR"),
    "read": (20028, "WARNING"),
    "denied": (30018, "WARNING"),
    "listener": (10020, "FATAL"),
    "engine": (10005, "FATAL"),
}


class Place(NamedTuple):
    """Where a layout keeps its things, all beneath the root."""

    layout: str
    bin: str
    conf: str  # "" for pegasus
    certificate: str
    key: str
    pid: str
    log: str
    server: str
    port: int  # without httpsport


PLACES = {
    "omi": Place(
        "omi",
        "/opt/omi/bin",
        "/etc/opt/omi/conf/omiserver.conf",
        "/etc/opt/omi/ssl/omi.pem",
        "/etc/opt/omi/ssl/omikey.pem",
        "/var/opt/omi/run/omiserver.pid",
        "/var/opt/omi/log/omiserver.log",
        "omiserver",
        5986,
    ),
    "classic-omi": Place(
        "classic-omi",
        "/opt/microsoft/scx/bin",
        "/etc/opt/microsoft/scx/conf/omiserver.conf",
        "/etc/opt/microsoft/scx/ssl/scx.pem",
        "/etc/opt/microsoft/scx/ssl/scx-key.pem",
        "/var/opt/microsoft/scx/run/omiserver.pid",
        "/var/opt/microsoft/scx/log/omiserver.log",
        "omiserver",
        5986,
    ),
    "pegasus": Place(
        "pegasus",
        "/opt/microsoft/scx/bin",
        "",
        "/etc/opt/microsoft/scx/ssl/scx.pem",
        "/etc/opt/microsoft/scx/ssl/scx-key.pem",
        "/var/opt/microsoft/scx/tmp/scx-cimd.pid",
        "/var/opt/microsoft/scx/log/scxcimd.log",
        "scxcimserver",
        1270,
    ),
}
OMI_SHAPES = (
    "omi-regular", "omi-migrated", "omi-dangling", "omi-moved", "omi-apart", "omi-relative", "omi-ports", "omi-root", "both",
)  # the same programs and names; files and conf differ
PLACES.update({name: PLACES["omi"]._replace(layout=name) for name in OMI_SHAPES})
UNITS = {name: "omid" if place.bin == PLACES["omi"].bin else "scx-cimd" for name, place in PLACES.items()}


class Refused(Exception):
    """The pair or a port was refused; `lines` is what goes to the log."""

    def __init__(self, *lines: Tuple[str, str]) -> None:
        """Take (event, text) lines."""
        super().__init__(lines)
        self.lines = lines


class ConfError(Exception):
    """The conf does not read."""


# the tree


def host_path(root: str, path: str) -> str:
    """Return the real path of a path beneath the root, links resolved as in a chroot; the last part may be absent.

    Raises OSError (ELOOP) after 40 links.
    """
    hops = 0
    done: List[str] = []
    left = [part for part in path.split("/") if part][::-1]
    while left:
        part = left.pop()
        if part == ".":
            continue
        if part == "..":
            del done[-1:]
            continue
        here = "/".join([root, *done, part])
        try:
            text = os.readlink(here)
        except OSError:
            done.append(part)
            continue
        hops += 1
        if hops > MAX_HOPS:
            raise OSError(40, "Too many levels of symbolic links", path)
        if text.startswith("/"):
            done = []
        left.extend([piece for piece in text.split("/") if piece][::-1])
    return "/".join([root, *done])


def read_as(root: str, path: str, account: Optional[Tuple[int, int]]) -> bytes:
    """Read a file beneath the root as an account may: x on every directory on the way and r on the file, by mode bits.

    `account` is (uid, gid); None is root. The bits are judged here because a test can't change its user. Raises OSError.
    """
    real = host_path(root, path)
    if account is not None:
        names = real[len(root) :].split("/")[1:]
        for count in range(len(names)):
            folder = "/".join([root, *names[:count]])
            if count and not _may(os.stat(folder), account, 1):
                raise PermissionError(13, "Permission denied", path)
        if not _may(os.stat(real), account, 4):
            raise PermissionError(13, "Permission denied", path)
    with open(real, "rb") as file:
        return file.read()


def _may(state: os.stat_result, account: Tuple[int, int], bit: int) -> bool:
    shift = 6 if state.st_uid == account[0] else 3 if state.st_gid == account[1] else 0
    return bool(state.st_mode >> shift & bit)


def load_knobs(root: str) -> Dict[str, Any]:
    """Return the knobs of /lab/knobs.json; none when the file is gone."""
    try:
        with open(root + "/lab/knobs.json", "rb") as file:
            knobs: Dict[str, Any] = json.loads(file.read())
            return knobs
    except (OSError, ValueError):
        return {}


def place_of(root: str) -> Place:
    """Return the place of the tree's layout."""
    return PLACES[str(load_knobs(root).get("layout", "omi"))]


def note(root: str, tool: str, arguments: List[str]) -> None:
    """Add a line to /lab/calls.log: who was called with what."""
    line = json.dumps({"at": time.time(), "tool": tool, "arguments": arguments, "pid": os.getpid(), "parent": os.getppid()})
    with open(root + "/lab/calls.log", "a", encoding="utf-8") as file:
        file.write(line + "\n")


def start_time(pid: int) -> str:
    """Return when a process started, in clock ticks since boot, as text; "" if there is none or it is a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            parts = file.read().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if parts[0] in (b"Z", b"X") else parts[19].decode()


def running(root: str, place: Place) -> int:
    """Return the pid of this tree's server, 0 if none runs; a pid file left behind by a dead one does not count.

    A pid alone may have gone to another process by now, so the start time noted in /lab/server must fit too.
    """
    try:
        with open(root + place.pid, "rb") as file:
            pid = int(file.read())
        with open(root + "/lab/server", encoding="ascii") as file:
            known = file.read().split()
    except (OSError, ValueError):
        return 0
    return pid if known == [str(pid), start_time(pid)] else 0


def launched(root: str) -> bool:
    """Tell whether the process that the last `omiserver -d` left behind is still there, listening or not yet."""
    try:
        with open(root + "/lab/launched", encoding="ascii") as file:
            pid, start = file.read().split()
    except (OSError, ValueError):
        return False
    return start_time(int(pid)) == start


# omiserver.conf (section 2)


def parse_conf(data: bytes) -> Dict[str, str]:
    """Return the settings, the last one of a name winning. Raises ConfError for whatever the real parser dies of."""
    found: Dict[str, str] = {}
    for number, raw in enumerate(data.decode("latin-1").split("\n"), 1):
        line = raw.rstrip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        name, value = name.strip(" \t"), value.strip(" \t")
        if not equals:
            raise ConfError(f"line {number}: missing =")
        folded = name.lower()
        if folded in ANY_CASE:
            name = folded
        elif name not in KEYS:
            raise ConfError(f"line {number}: unknown key")
        if name in ("httpport", "httpsport"):
            ports(value)
        if name == "nonroot" and value.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ConfError(f"line {number}: bad value")
        found[name] = value
    return found


def ports(value: str) -> Tuple[int, ...]:
    """Return the ports of a list, 0 and repeats left out. Raises ConfError: a blank after a number is fatal, before it fine."""
    found: List[int] = []
    for item in value.split(","):
        text = item.lstrip(" \t")
        if not (text.isascii() and text.isdigit()) or int(text) > 0xFFFF:
            raise ConfError("bad port")
        if int(text) and int(text) not in found:
            found.append(int(text))
    return tuple(found)


class Settings(NamedTuple):
    """What the server goes by."""

    certificate: str
    key: str
    ports: Tuple[int, ...]
    account: Optional[Tuple[int, int]]


def read_settings(root: str, place: Place, knobs: Dict[str, Any]) -> Settings:
    """Read the conf. Raises ConfError or OSError."""
    if not place.conf:
        return Settings(place.certificate, place.key, (int(knobs.get("port", place.port)),), None)
    with open(host_path(root, place.conf), "rb") as file:
        conf = parse_conf(file.read(MAX_CONF_BYTES))
    nonroot = place.bin == PLACES["omi"].bin and conf.get("nonroot", "true").lower() in ("true", "1", "yes")
    account = knobs.get("account")
    run = place.pid.rpartition("/")[0]

    def path(name: str, default: str) -> str:
        value = conf.get(name, default)
        return value if value.startswith("/") else f"{run}/{value}"

    listen = ports(conf.get("httpport", "5985")) + ports(conf.get("httpsport", str(place.port)))
    listen = tuple(port for port in listen if port not in ports(conf.get("httpport", "5985")))
    pair = path("pemfile", place.certificate), path("keyfile", place.key)
    return Settings(pair[0], pair[1], listen, (account[0], account[1]) if nonroot and account else None)


# the server


class Server:
    """The server process, from the pid file on: load the pair, listen, answer, obey signals."""

    def __init__(self, root: str, place: Place, settings: Settings) -> None:
        """Take what the conf said; nothing is opened yet."""
        self.root = root
        self.place = place
        self.settings = settings
        self.context: Any = None
        self.listeners: List[Any] = []
        self.connections: List[Any] = []
        self.hangup = False
        self.term = 0.0
        self.started = time.monotonic()

    def log(self, event: str, text: str) -> None:
        """Write one line in the format of section 8; a good start writes none."""
        number, level = EVENTS[event]
        when = time.strftime("%Y/%m/%d %H:%M:%S", time.gmtime())
        line = f"{when} [{os.getpid()},{os.getpid()}] {level}: null(0): EventId={number} Priority={level} {text}\n"
        path = host_path(self.root, self.place.log)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)

    def load(self) -> None:
        """Read certificate, then key, and make them the pair served from now on. Raises Refused."""
        import ssl

        where, key_where, account = self.settings.certificate, self.settings.key, self.settings.account
        knobs = load_knobs(self.root)
        try:
            data = read_as(self.root, where, account)
        except OSError as error:
            raise Refused(("certificate", f"No server certificate found in {where} ({error.strerror})")) from None
        time.sleep(float(knobs.get("between_opens", 0.0003)))
        none = ("certificate", f"No server certificate found in {key_where}")
        try:
            secret = read_as(self.root, key_where, account)
        except OSError:
            raise Refused(("key-open", f"failed to open private key file: {key_where}"), none) from None
        # only the first certificate is looked at and sent, so nothing behind it may reach the context
        end = data.find(b"-----END CERTIFICATE-----")
        first = data if end < 0 else data[: end + 26].rstrip() + b"\n"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.options &= ~0x80  # SSL_OP_IGNORE_UNEXPECTED_EOF, which Pythons before 3.12 set: OMI does not
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        pair, alone = _memory(first), _memory(secret)
        try:
            context.load_cert_chain(pair, alone, password=_no_passphrase)
        except (ssl.SSLError, ValueError, OSError) as error:
            raise self._why(first, secret, str(error)) from None
        finally:
            _forget(pair)
            _forget(alone)
        leaf = ssl.PEM_cert_to_DER_cert(_first_block(first))
        self._judge(leaf, knobs)
        self.context = context

    def _judge(self, leaf: bytes, knobs: Dict[str, Any]) -> None:
        """Die of a pair that the knobs forbid, as a real agent does of one it can't use."""
        if not knobs.get("serve_only") and not knobs.get("refuse"):
            return
        import hashlib

        found = hashlib.sha256(leaf).hexdigest()
        only = knobs.get("serve_only")
        if (only and found not in only) or found in (knobs.get("refuse") or ()):
            raise Refused(("certificate", f"No server certificate found in {self.settings.certificate}"))

    def _why(self, certificate: bytes, secret: bytes, reason: str) -> Refused:
        where, key_where = self.settings.certificate, self.settings.key
        none = ("certificate", f"No server certificate found in {key_where}")
        if "TYPE_MISMATCH" in reason or "NO_CERTIFICATE_ASSIGNED" in reason:  # the latter: OpenSSL looks for a pair of the key's type
            return Refused(("key-match", f"Private and public key do not match: {key_where}"), none)
        if "MISMATCH" in reason:
            return Refused(("key-none", f"no private key found in: {key_where}"), none)
        if not _begins(certificate, b"CERTIFICATE-----") or not _block_is_sound(certificate):
            return Refused(("certificate", f"No server certificate found in {where} ({reason})"))
        return Refused(("key-create", f"failed to create private key: {key_where} ({reason})"), none)

    def listen(self) -> None:
        """Bind each port on both loopback addresses. Raises Refused when one is busy: one failing port kills all."""
        import socket

        for port in self.settings.ports:
            for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
                try:
                    listener = socket.socket(family, socket.SOCK_STREAM)
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    listener.bind((address, port))
                    listener.listen(64)
                except OSError as error:
                    if family == socket.AF_INET6 and error.errno != 98:
                        continue
                    raise Refused(("listen", f"Listen failed on both IPv4 and IPv6, port {port}: {error.strerror}")) from None
                listener.setblocking(False)
                self.listeners.append(listener)

    def obey(self) -> None:
        """Take signals from now on; before that a stop would be a crash."""
        signal.signal(signal.SIGHUP, self._on_hangup)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGINT, self._on_term)

    def close(self) -> None:
        """Give the ports back."""
        for listener in self.listeners:
            listener.close()

    def serve(self) -> int:
        """Run until told to stop or until the tree or its owner is gone; returns the exit status."""
        import select
        import socket

        wake, waker = socket.socketpair()
        wake.setblocking(False)
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        try:
            self.load()
            self.listen()
        except Refused as refused:
            return self._die(refused)
        dies = float(load_knobs(self.root).get("dies_after") or 0)
        dies = self.started + dies if dies else 0.0
        checked = time.monotonic()
        while True:
            now = time.monotonic()
            if self.term and now >= self.term:
                return 0
            if dies and now >= dies:
                self.log("engine", "abnormal termination of engine process")
                return 1
            pause = min([0.5] + [moment - now for moment in (self.term, dies) if moment])
            ready, _, _ = select.select([wake, *self.listeners], [], [], pause)
            if wake in ready:
                wake.recv(64)
                ready.remove(wake)
            try:
                self._reload()
            except Refused as refused:
                return self._die(refused)
            for listener in ready:
                self._accept(listener)
            if now > checked + 0.5:
                checked = now
                if self._abandoned():
                    return 0

    def _reload(self) -> None:
        """Read the pair again if a SIGHUP asked for it: open connections drop, new ones are refused for 3 ms. Raises Refused."""
        if self.hangup:
            self.hangup = False
            self.load()
            self.close()
            self._drop()
            time.sleep(float(load_knobs(self.root).get("reload_gap", 0.003)))
            self.listeners = []
            self.listen()

    def _abandoned(self) -> bool:
        """Tell whether the tree, or the process that made it, is gone."""
        owner = load_knobs(self.root).get("owner")
        return not os.path.isdir(self.root + "/lab") or bool(owner and start_time(owner[0]) != owner[1])

    def _on_hangup(self, *_: object) -> None:
        self.hangup = True

    def _on_term(self, *_: object) -> None:
        takes = float(load_knobs(self.root).get("stop_takes", 0.0))
        self.term = self.term or time.monotonic() + takes + 0.000001

    def _die(self, refused: Refused) -> int:
        for event, text in refused.lines:
            self.log(event, text)
        port = self.settings.ports[0] if self.settings.ports else 0
        self.log("listener", f"WSMAN_New_Listener() failed for port {port}")
        self.log("engine", "abnormal termination of engine process")
        return 1

    def _drop(self) -> None:
        import socket

        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: Any) -> None:
        import _thread

        try:
            plain, _ = listener.accept()
        except OSError:
            return
        _thread.start_new_thread(self._answer, (plain, self.context))

    def _answer(self, plain: Any, context: Any) -> None:
        """Shake hands, read, stay mute to whoever brings no Authorization header, and close without a close_notify."""
        import socket

        knobs = load_knobs(self.root)
        try:
            plain.setblocking(True)
            plain.settimeout(float(knobs.get("idle", 60.0)))
            if knobs.get("handshake_takes"):
                time.sleep(float(knobs["handshake_takes"]))
            if knobs.get("deaf"):
                time.sleep(60)
            secure = context.wrap_socket(plain, server_side=True, suppress_ragged_eofs=False)
        except (OSError, ValueError):
            plain.close()
            return
        self.connections.append(secure)
        data = b""
        try:
            while len(data) < 1 << 16:
                more = secure.recv(4096)
                if not more:
                    break
                data += more
                if b"\r\n\r\n" in data and b"\nauthorization:" in data.lower():
                    self.log("denied", "Authentication failed")
                    secure.sendall(b'HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nWWW-Authenticate: Basic realm="WSMAN"\r\n\r\n')
                    break
        except socket.timeout:
            pass
        except OSError:  # hung up without a close_notify, or reset
            self.log("read", "ssl-read error")
        finally:
            self.connections.remove(secure)
            secure.close()


def _memory(data: bytes) -> str:
    """Put bytes where OpenSSL can read them by name and nobody else can."""
    handle = os.memfd_create("pair")
    os.write(handle, data)
    return f"/proc/self/fd/{handle}"


def _forget(path: str) -> None:
    os.close(int(path.rpartition("/")[2]))


def _no_passphrase() -> str:
    raise ValueError("no passphrase callback")


def _begins(data: bytes, end: bytes) -> bool:
    return any(line.startswith(b"-----BEGIN ") and line.rstrip().endswith(end) for line in data.split(b"\n"))


def _first_block(data: bytes) -> str:
    start = data.find(b"-----BEGIN CERTIFICATE-----")
    return data[start:].decode("latin-1").replace("\r", "")


def _block_is_sound(data: bytes) -> bool:
    import binascii

    start, end = data.find(b"-----BEGIN CERTIFICATE-----"), data.find(b"-----END CERTIFICATE-----")
    try:
        der = binascii.a2b_base64(data[start + 27 : end])
    except ValueError:
        return False
    return 0 <= start < end and der[:1] == b"\x30" and b"\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02" not in der[:24]


# the programs


def omiserver(root: str, arguments: List[str]) -> int:
    """Run `omiserver`: -d, -s, -r, or in the foreground (section 4)."""
    place = place_of(root)
    verbs = {"-d": "daemon", "--daemonize": "daemon", "-s": "stop", "--stop": "stop", "-r": "reload", "--reload-config": "reload"}
    verb = ""
    for argument in arguments:
        if argument in ("-v", "--version"):
            print(f"{place.bin}/omiserver: OMI-1.9.1-0 - lab")
            return 0
        if argument not in verbs:
            print(f"{place.bin}/omiserver: unknown option: {argument}", file=sys.stderr)
            return 1
        verb = verbs[argument]
    if verb in ("stop", "reload"):
        pid = running(root, place)
        if not pid:
            print(f"{place.bin}/omiserver: server is not running")
            return 0
        os.kill(pid, signal.SIGTERM if verb == "stop" else signal.SIGHUP)
        print(f"{place.bin}/omiserver: {'stopped server' if verb == 'stop' else 'refreshed server'}")
        return 0
    if verb == "daemon":
        child = os.fork()
        if child:
            _write(root + "/lab/launched", f"{child} {start_time(child)}\n")
            return 0
        # from here on nobody sees an exit status or a word on stderr
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        _leave(_run(root, place))
    return _run(root, place)


def _leave(status: int) -> NoReturn:
    os._exit(status)


def _run(root: str, place: Place) -> int:
    os.chdir("/")
    knobs = load_knobs(root)
    if knobs.get("start_takes"):
        time.sleep(float(knobs["start_takes"]))
    try:
        settings = read_settings(root, place, knobs)
    except (ConfError, OSError) as error:
        print(f"{place.server}: {error}", file=sys.stderr)
        return 1
    if running(root, place):
        print(f"{place.server}: server is already running", file=sys.stderr)
        return 1
    pid_file = root + place.pid
    server = Server(root, place, settings)
    server.obey()
    try:
        _write(root + "/lab/server", f"{os.getpid()} {start_time(os.getpid())}\n")
        _write(pid_file, f"{os.getpid()}\n")
    except OSError as error:
        print(f"{place.server}: {error}", file=sys.stderr)
        return 5
    status = server.serve()
    server.close()  # before the pid file goes: whoever starts next needs the ports
    if status == 0:
        with contextlib.suppress(OSError):
            os.unlink(pid_file)
    elif load_knobs(root).get("respawn"):
        _respawn(root, place)
    # open connections live in threads that nobody waits for
    _leave(status)


def _respawn(root: str, place: Place) -> None:
    """Start again in a while, as systemd's Restart=on-failure does; a stop or a start by hand ends the waiting."""
    if os.fork():
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _write(root + "/lab/respawner", f"{os.getpid()} {start_time(os.getpid())}\n")
    time.sleep(float(load_knobs(root).get("respawn") or 0))
    knobs = load_knobs(root)
    owner = knobs.get("owner")
    if not knobs.get("respawn") or (owner and start_time(owner[0]) != owner[1]):
        _leave(0)
    _attempt(root)
    program = f"{root}{place.bin}/{place.server}"
    os.execv(program, [program, "-d"])


def _stop_respawner(root: str) -> None:
    try:
        with open(root + "/lab/respawner", encoding="ascii") as file:
            pid, start = file.read().split()
    except (OSError, ValueError):
        return
    _unlink(root + "/lab/respawner")
    if start_time(int(pid)) == start:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGTERM)


def _write(path: str, text: str) -> None:
    # written aside and renamed: nobody may read half a number
    fresh = f"{path}.{os.getpid()}"
    with open(fresh, "w", encoding="ascii") as file:
        file.write(text)
    os.rename(fresh, path)


def service_control(root: str, arguments: List[str]) -> int:
    """Run `service_control`: start, stop, restart, reload, is-running (section 4)."""
    place = place_of(root)
    verb = arguments[0] if arguments else ""
    note(root, "service_control", arguments)
    if place.conf and not os.path.exists(host_path(root, place.conf)):
        print("omiserver.conf not found")
        return 3
    if verb == "is-running":
        return 1 if running(root, place) else 0
    if verb == "stop":
        return _stop(root, place)
    if verb == "start":
        return _start(root, place)
    if verb in ("restart", "reload"):
        _stop(root, place)
        _poll(root, place, load_knobs(root))
        return _start(root, place)
    print(f"Unknown parameter : {verb}")
    return 1


def _stop(root: str, place: Place) -> int:
    knobs = load_knobs(root)
    pid = running(root, place)
    if knobs.get("ignore_restart") or (pid and knobs.get("stray") == pid):
        return 0  # a process outside the unit: stopping the unit does not reach it
    _stop_respawner(root)
    if _has_unit(knobs):
        _systemctl("stop", place)  # what runs outside the unit is not reached
    elif pid:
        os.kill(pid, signal.SIGTERM)
    elif knobs.get("unit_clears_pid"):
        _unlink(root + place.pid)
    print("omi is stopped.")
    return 0


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _start(root: str, place: Place) -> int:
    knobs = load_knobs(root)
    if running(root, place):
        return 0  # silent: whether it is on its way out is not asked
    _stop_respawner(root)
    attempt = _attempt(root)
    if attempt <= int(knobs.get("fails_until", 0)):
        status = int(knobs.get("fails_with", 0))
        print("omi is started." if not status else "omi failed to start.")
        return status
    limit = knobs.get("start_limit")
    if limit and _recent(root, float(limit[1])) > int(limit[0]):
        print("omi is started.")
        return 0
    if _has_unit(knobs) and _systemctl("start", place) == 0:
        print("omi is started.")
        return 0
    # where there is no unit, or it is masked or over its start limit: this always "works", in whatever control group called it
    program = f"{root}{place.bin}/{place.server}"
    pid = os.fork()
    if not pid:
        os.execv(program, [program, "-d"])
    os.waitpid(pid, 0)
    print("omi is started.")
    return 0


def _has_unit(knobs: Dict[str, Any]) -> bool:
    """Tell whether this is a machine of its own, whose systemd runs."""
    return bool(knobs.get("machine")) and os.path.isdir("/run/systemd/system")


def _systemctl(verb: str, place: Place) -> int:
    sys.stdout.flush()
    return os.spawnlp(os.P_WAIT, "systemctl", "systemctl", verb, UNITS[place.layout])


def _attempt(root: str) -> int:
    path = root + "/lab/starts.log"
    with open(path, "a", encoding="ascii") as file:
        file.write(f"{time.time():.3f}\n")
    with open(path, encoding="ascii") as file:
        return len(file.readlines())


def _recent(root: str, window: float) -> int:
    with open(root + "/lab/starts.log", encoding="ascii") as file:
        return sum(1 for line in file if float(line) > time.time() - window)


def _poll(root: str, place: Place, knobs: Dict[str, Any]) -> None:
    interval = float(knobs.get("poll", 0.05))
    for _ in range(20):
        if not running(root, place):
            return
        time.sleep(interval)


USAGE = """Usage: scxadmin
Generic options (for all commands)
  [generic options]  - generic options are: [-quiet]
General Options
  scxadmin -start [all|cimom|provider]
  scxadmin -stop [all|cimom|provider]
  scxadmin -restart [all|cimom|provider]
  scxadmin -status
  scxadmin -version
  scxadmin -h
"""


def scxadmin(root: str, arguments: List[str]) -> int:
    """Run `scxadmin` (the table of section 4): arguments in any case, all parsed before any runs."""
    place = place_of(root)
    knobs = load_knobs(root)
    note(root, "scxadmin", arguments)
    if knobs.get("junk"):
        print(knobs["junk"])
    words = [argument.lower() for argument in arguments]
    deeds: List[Tuple[str, str]] = []
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if word in ("-start", "-stop", "-restart", "-status"):
            what = "all"
            if index < len(words) and words[index] in ("all", "cimom", "provider"):
                what = words[index]
                index += 1
            deeds.append((word, what))
        elif word in ("-version", "-h", "-?", "-help"):
            deeds.append((word, ""))
        elif word != "-quiet":
            print(f"scxadmin: unknown option: {arguments[index - 1]}", file=sys.stderr)
            print(USAGE)
            return 1
    if not deeds:
        print(USAGE)
    status = 0
    for verb, what in deeds:
        status = max(status, _deed(root, place, verb, what))
    return status


def _deed(root: str, place: Place, verb: str, what: str) -> int:
    knobs = load_knobs(root)
    if verb == "-version":
        print("Version: 1.9.1-0 (Labeled_Build - 20240101)")
    elif verb == "-status":
        pid = running(root, place)
        print(f"{place.server}: is {'running' if pid else 'stopped'}")
        print("omiagent: is stopped")
        return 0 if pid else 1
    elif verb == "-start":
        if what == "provider":
            print("operation is not supported")
            return 1
        return _control(root, place, "start")
    elif verb == "-stop":
        return _control(root, place, "stop") if what != "provider" else 0
    elif verb == "-restart":
        if what == "provider":
            return 0  # kills omiagent only; the pair is not read again
        if knobs.get("restart_takes"):
            time.sleep(float(knobs["restart_takes"]))
        _control(root, place, "stop")
        _poll(root, place, knobs)
        if knobs.get("between_halves"):
            time.sleep(float(knobs["between_halves"]))
        return _control(root, place, "start")
    else:
        print(USAGE)
    return 0


def _control(root: str, place: Place, verb: str) -> int:
    note(root, "service_control", [verb])
    if place.conf and not os.path.exists(host_path(root, place.conf)):
        print("omiserver.conf not found")
        status = 3
    else:
        status = _stop(root, place) if verb == "stop" else _start(root, place)
    if status:
        print(f"RETURN CODE: {status}")
    return 1 if status else 0
