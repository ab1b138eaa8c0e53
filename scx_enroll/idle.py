"""The run that finds nothing to do, without the rest of the program: the last answer stands while all that it rests on does.

A run that did nothing leaves its premises in the state directory (`premises`): what stood at every path it looked at, what the
agent's port served, the host's name, and until when `plan` would decide the same. Here they are checked. What is missing,
damaged, changed or not understood is a miss, and the whole program runs. A fleet pays for this every hour, so it imports
next to nothing, and what others need as well (`probe`, `say`) has its home here.
"""

from __future__ import annotations

import _socket  # socket, made from it, takes as long to import as everything here takes to run
import os
import stat
import sys
import time

from scx_enroll import __version__

TYPE_CHECKING = False  # typing takes as long again
if TYPE_CHECKING:
    from typing import Any, Callable

VERSION = 1
STATE = "/var/lib/scx-enroll"
STATUS_FOLDER, STATUS_NAME = "/run/scx-enroll", "status.json"
PREMISES = "premises"
MAX_PREMISES_BYTES = 1 << 20  # some 20 kB
MAX_STAT_BYTES = 4096  # 52 numbers and a name of 15 bytes
MAX_SAID_BYTES = 256  # a UUID
CONNECT_S = 5.0  # to a port of this host; an agent that is busy answers in milliseconds
CLOSE_S = 0.5
ADDRESSES = ((_socket.AF_INET, "127.0.0.1"), (_socket.AF_INET6, "::1"))  # the agent binds the wildcard, dual-stack where it can
PROBED_S = 12 * 3600  # a handshake costs more than all the rest, so two of the timer's runs a day do it where the server is known
FLAGS = ("--unattended", "--json")  # of `run`
UNIT_S = 30  # a manager that answers at all answers in milliseconds
SYSTEMCTL = ("/usr/bin/systemctl", "/bin/systemctl")
HAS_TO_LOOK = 75  # exit status of the verb `idle`: none that a run ends with
MAX_WAIT_DIGITS = 4  # what is longer the whole program looks at


def nowhere() -> int:
    """Return a descriptor that swallows whatever is written to it, for the caller to close."""
    return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def open_standard_files() -> None:
    """See that descriptors 0 to 2 are open, since a file of ours under one of these numbers would be written to."""
    while (fd := nowhere()) <= 2:
        pass
    os.close(fd)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the locale can't show is no defect


def say(stream: Any, text: str) -> None:
    """Write and flush; where nobody can be told (the reader has gone, the log's disk is full), the work goes on all the same."""
    try:
        if stream is not None:
            stream.write(text)
            stream.flush()
    except OSError:
        fd = nowhere()
        os.dup2(fd, stream.fileno())
        os.close(fd)


# -- what can be seen of the host: a word for each state, to be compared -----------------------------------------------


def facts(found: os.stat_result) -> str:
    """Return what of a name's state can't change unnoticed; a folder's times also tell of what does not matter, so not they."""
    kept = [found.st_mode, found.st_uid, found.st_gid, found.st_dev, found.st_ino]
    if not stat.S_ISDIR(found.st_mode):
        kept.append(found.st_ctime_ns)  # of every change to content, owner or mode; it can't be set
    return ",".join(map(str, kept))


def stands(path: str) -> str:
    """Return the facts of what stands at a path now, links not followed; "" where there is nothing."""
    try:
        return facts(os.lstat(path))
    except (FileNotFoundError, NotADirectoryError):
        return ""


def says(path: str) -> str:
    """Return what a small file of the kernel's holds, in hexadecimal, since its times tell nothing; "" where it can't be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            return file.read(MAX_SAID_BYTES).hex()
    except OSError:
        return ""


def listed(found: os.stat_result) -> str:
    """Return what changes with every name that comes to a folder, or goes."""
    return str(found.st_ctime_ns)


def is_locked(fd: int) -> bool:
    """Tell whether another process holds a write lock on an open file (fcntl(2), F_GETLK); none is taken."""
    import fcntl
    import struct

    # struct flock with 64-bit offsets, as Python builds it: type, whence, start, length, pid
    answer = fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
    return bool(struct.unpack_from("h", answer)[0] != fcntl.F_UNLCK)


def _ended(pid: str) -> str:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return "ended"
    return ""


def _lives(pid: str) -> str:
    """Return the name of a process, whose number may be another's by now; the sandbox hides it, and there this is a miss."""
    with open(f"/proc/{pid}/stat", "rb") as file:  # proc_pid_stat(5)
        name, _, rest = file.read(MAX_STAT_BYTES).partition(b"(")[2].rpartition(b")")
    return "" if rest.split()[0] in (b"Z", b"X") else name.decode()


def _unit(name: str) -> str:
    """Return the state of a service, "-" where systemd can't be asked; of an agent that is stopped, so few pay for it."""
    words = [next(filter(os.path.exists, SYSTEMCTL), SYSTEMCTL[0]), "show", "--property=ActiveState", f"{name}.service"]
    inside, outside = os.pipe()
    child = os.posix_spawn(words[0], words, {"LC_ALL": "C"}, file_actions=[(os.POSIX_SPAWN_DUP2, outside, 1)])
    os.close(outside)
    try:
        import select

        answers = select.poll()
        answers.register(inside, select.POLLIN)
        if not answers.poll(UNIT_S * 1000):  # it says its one line at once, or nothing
            os.kill(child, 9)
        said = os.read(inside, MAX_STAT_BYTES).decode().strip()
    finally:
        os.close(inside)
        os.waitpid(child, 0)
    return said.partition("=")[2] or "-"


def _free(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return "" if is_locked(fd) else "free"
    finally:
        os.close(fd)


class _Plain(_socket.socket):
    """What a TLS object may refer to weakly."""


def probe(port: int, shake: Callable[[Any], bytes | None]) -> tuple[bool, bytes, str]:
    """Look at what this host's port serves: one handshake, nothing verified, nothing sent.

    `shake` does it on a connected socket, and returns the leaf. Returns whether somebody listens, the leaf served (DER), or
    b"" and why there is none.
    """
    seen = (False, b"", "nothing listens")
    for family, address in ADDRESSES:
        connected = False
        try:
            plain = _Plain(family, _socket.SOCK_STREAM)
        except OSError:  # a host without IPv6
            continue
        try:
            plain.settimeout(CONNECT_S)
            plain.connect((address, port))
            connected = True
            der = shake(plain)
            if der:
                return True, der, ""
        except OSError as problem:
            if connected:
                seen = (True, b"", f"no TLS handshake: {problem.strerror or problem}")
        finally:
            plain.close()
    return seen


def _shake(plain: Any) -> bytes | None:
    """Do what `service` does with the ssl module; an interpreter in which this has changed makes the whole program look."""
    import _ssl  # the same holds for ssl

    context: Any = _ssl._SSLContext(_ssl.PROTOCOL_TLS_CLIENT)  # noqa: SLF001 - see the import
    context.check_hostname = False
    context.verify_mode = _ssl.CERT_NONE
    try:
        context.minimum_version = _ssl.PROTO_MINIMUM_SUPPORTED
        context.set_ciphers("ALL:@SECLEVEL=0")
    except (_ssl.SSLError, ValueError):
        pass
    connection = context._wrap_socket(plain, False)  # noqa: SLF001 - C takes no names here
    connection.do_handshake()
    der: bytes | None = connection.getpeercert(True)
    try:
        plain.settimeout(CLOSE_S)
        connection.shutdown()
    except (OSError, ValueError):
        pass
    return der


def served(*, listening: bool, der: bytes) -> str:
    """Return the word for what a port serves."""
    return f"{listening:d},{der.hex()}"


def openssl(_name: str = "") -> str:
    """Return the version of the library that a handshake rests on."""
    import _ssl

    return _ssl.OPENSSL_VERSION.replace(" ", "_")


def _serves(port: str) -> str:
    listening, der, _ = probe(int(port), _shake)
    return served(listening=listening, der=der)


# -- the answer -------------------------------------------------------------------------------------------------------

CLAIMS: dict[str, Callable[[str], str]] = {  # what was seen, and how it is seen now
    "looked": stands,
    "says": says,
    "listed": lambda path: listed(os.stat(path)),
    "unlocked": _free,
    "process": _ended,
    "server": _lives,
    "unit": _unit,
    "library": openssl,
    "port": _serves,
}


def answer(arguments: list[str], *, silent: bool = False) -> int | None:
    """Give the last answer again and return its exit status; None where the whole program must look. `silent`: in no words."""
    try:
        asked = _asked(arguments)
        if asked is None:
            return None
        root, now, quiet = os.path.realpath(asked.get("--root", "/")), int(time.time()), "--unattended" in asked
        config = os.path.abspath(asked["--config"]) if "--config" in asked else ""
        where, at, until, folder, ended, patient, claims, text, before, after = _read(root.rstrip("/") + STATE)
        if where != here(root, config, live=root == "/" or "--live" in asked) or not int(at) <= now < int(until):
            return None
        if not ended and ("--json" in asked or not quiet):  # what a person is told of a failure has another form
            return None
        status, document = int(patient if quiet else ended), f"{before}{now}{after}"
        claimed, checked = claims.split("\n"), claims.split("\n")
        if quiet and _is_seen(claimed, int(at), int(os.stat(f"{folder}/{STATUS_NAME}").st_mtime), now):
            checked = [claim for claim in claimed if not claim.startswith(("port ", "library "))]
        if not all(map(_holds, checked)) or not _publish(folder, document, claimed):
            return None
    except Exception:  # noqa: BLE001 - whatever is wrong, the whole program finds it again, and has the words for it
        return None
    if "--json" in asked and not silent:
        say(sys.stdout, document)
    elif (not quiet or status) and not silent:
        say(sys.stderr if int(ended) else sys.stdout, text)
    return status


def _is_seen(claims: list[str], at: int, last: int, now: int) -> bool:
    """Say whether what the port serves need not be looked at: no half day has begun since the last run, and the server is known.

    While the process that was seen serving it lives, and no file has changed, it serves the same: it reads certificate and key
    when it starts, and when it is told to read them again. `last`: when a run last published its status.
    """
    known = any(claim.startswith("server ") for claim in claims)
    return known and at <= last <= now and (last - at) // PROBED_S == (now - at) // PROBED_S


def _asked(arguments: list[str]) -> dict[str, str] | None:
    """Return the options of a plain `run`, None for every other command line."""
    words, asked = list(arguments), {}
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name in ("--root", "--config") or (name == "--wait" and "run" in asked):
            value = value if equals else words.pop(0)
            if not value:
                return None
            asked[name] = value
        elif word == "--live" or (word in FLAGS and "run" in asked) or (word == "run" and word not in asked):
            asked[word] = word
        else:
            return None
    wait = asked.get("--wait", "0")
    plain = "run" in asked and wait.isascii() and wait.isdigit() and len(wait) <= MAX_WAIT_DIGITS
    return asked if plain and ("--root" in asked or "--live" not in asked) else None


def _read(folder: str) -> list[str]:
    fd = os.open(f"{folder}/{PREMISES}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        data = file.read(MAX_PREMISES_BYTES + 1) if stat.S_ISREG(found.st_mode) else b""
    if found.st_uid != os.geteuid() or found.st_mode & 0o022 or len(data) > MAX_PREMISES_BYTES:
        raise ValueError("not ours")
    return data.decode("utf-8", "surrogateescape").split("\0")


def here(root: str, config: str, *, live: bool) -> str:
    """Return what tells one host, one tree and one program from another; `config` is "" for the usual file."""
    program = [VERSION, __version__, stands(__file__), sys.version]
    return repr([*program, root, config, live, _socket.gethostname()])


def _holds(claim: str) -> bool:
    """Say whether a claim, of the form `KIND WORD NAME`, is true."""
    kind, was, name = claim.split(" ", 2)
    return bool(CLAIMS[kind](name) == was)


def _publish(folder: str, text: str, claims: list[str]) -> bool:
    """Replace the status that anyone may read, as the whole run does; False where its folder is not the one that was looked at."""
    inside = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if f"looked {facts(os.fstat(inside))} {folder}" not in claims:
            return False
        temporary = f".scx-enroll.{os.urandom(8).hex()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=inside)
        try:
            with open(fd, "wb") as file:
                file.write(text.encode("utf-8", "backslashreplace"))
                os.fchmod(fd, 0o644)
            os.rename(temporary, STATUS_NAME, src_dir_fd=inside, dst_dir_fd=inside)
        except OSError:
            os.unlink(temporary, dir_fd=inside)
            raise
    finally:
        os.close(inside)
    return True
