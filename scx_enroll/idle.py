"""The run that finds nothing to do, without the rest of the program: the last answer stands while all that it rests on does.

A run that did nothing leaves its premises in the state directory (`premises`): what stood at every path it looked at, what the
agent's port served, the host's name, and until when `plan` would decide the same. Here they are checked. What is missing,
damaged, changed or not understood is a miss, and the whole program runs. A fleet pays for this every hour, so it imports
no other module of ours, and what others need as well (`probe`, `say`) has its home here.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import ssl
import stat
import struct
import sys
import time
from collections.abc import Sequence

from scx_enroll import __version__

TYPE_CHECKING = False  # importing typing takes as long as all the checks
if TYPE_CHECKING:
    from typing import Any

VERSION = 1
STATE = "/var/lib/scx-enroll"
STATUS_FOLDER, STATUS_NAME = "/run/scx-enroll", "status.json"
PREMISES = "premises.json"
MAX_PREMISES_BYTES = 1 << 20  # some 20 kB
CONNECT_S = 5.0  # to a port of this host; an agent that is busy answers in milliseconds
CLOSE_S = 0.5
ADDRESSES = ("127.0.0.1", "::1")  # the agent binds the wildcard, dual-stack where it can
FLAGS = ("--unattended", "--json")  # of `run`
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


# -- what can be seen of the host -------------------------------------------------------------------------------------


def facts(found: os.stat_result) -> list[int]:
    """Return what of a name's state can't change unnoticed; a folder's times also tell of what does not matter, so not they."""
    kept = [stat.S_IFMT(found.st_mode), stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_dev, found.st_ino]
    return kept if stat.S_ISDIR(found.st_mode) else [*kept, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def stands(path: str) -> list[int]:
    """Return the facts of what stands at a path now, links not followed; none where there is nothing."""
    try:
        return facts(os.lstat(path))
    except (FileNotFoundError, NotADirectoryError):
        return []


def listed(found: os.stat_result) -> list[int]:
    """Return what changes with every name that comes to a folder, or goes."""
    return [found.st_mtime_ns, found.st_ctime_ns]


def is_locked(fd: int) -> bool:
    """Tell whether another process holds a write lock on an open file (fcntl(2), F_GETLK); none is taken."""
    # struct flock with 64-bit offsets, as Python builds it: type, whence, start, length, pid
    answer = fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
    return bool(struct.unpack_from("h", answer)[0] != fcntl.F_UNLCK)


def probe(port: int) -> tuple[bool, str, str]:
    """Look at what this host's port serves: one handshake, nothing verified, nothing sent.

    Returns whether somebody listens, the SHA-256 of the leaf served, or "" and why there is none. Old protocols and ciphers
    are allowed, because it looks and does not trust. The server never answers close_notify, so the end of `unwrap` is an
    error that means nothing; without it the agent's log gets one.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.set_ciphers("ALL:@SECLEVEL=0")
    except (ssl.SSLError, ValueError):
        pass
    seen = (False, "", "nothing listens")
    for address in ADDRESSES:
        connected = False
        try:
            with socket.create_connection((address, port), CONNECT_S) as plain:
                connected = True
                with context.wrap_socket(plain) as connection:
                    der = connection.getpeercert(binary_form=True)
                    try:
                        connection.settimeout(CLOSE_S)
                        connection.unwrap()
                    except (OSError, ValueError):
                        pass
                if der:
                    return True, hashlib.sha256(der).hexdigest(), ""
        except OSError as problem:
            if connected:
                seen = (True, "", f"no TLS handshake: {problem.strerror or problem}")
    return seen


# -- the answer -------------------------------------------------------------------------------------------------------


def answer(arguments: Sequence[str]) -> int | None:
    """Give the last answer again and return its exit status; None where the whole program must look."""
    try:
        asked = _asked(arguments)
        if asked is None:
            return None
        root = os.path.realpath(asked.get("--root", "/"))
        known, now = _read(root.rstrip("/") + STATE), int(time.time())
        if not (_meant(known, asked, root) and known["at"] <= now < known["until"] and _holds(known)):
            return None
        quiet, (before, after) = "--unattended" in asked, known["document"]
        ended, text = known["exit_status"], str(known["text"])
        status: int = known["quiet_status"] if quiet else ended
        if type(status) is not int or type(ended) is not int:
            return None
        document = f"{before}{now}{after}"
        if known["folder"] not in known["looked"]:
            return None
        _publish(known["folder"], document)
    except Exception:  # noqa: BLE001 - whatever is wrong, the whole program finds it again, and has the words for it
        return None
    if "--json" in asked:
        say(sys.stdout, document)
    elif not quiet or status:
        say(sys.stderr if ended else sys.stdout, text)
    return status


def _asked(arguments: Sequence[str]) -> dict[str, str] | None:
    """Return the options of a plain `run`, None for every other command line."""
    words, asked = list(arguments), {}
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name in ("--root", "--config") or (name == "--wait" and "run" in asked):
            value = value if equals else words.pop(0)
            if not value or value[0] == "-":
                return None
            asked[name] = value
        elif word == "--live" or (word in FLAGS and "run" in asked) or (word == "run" and word not in asked):
            asked[word] = word
        else:
            return None
    wait = asked.get("--wait", "0")
    plain = "run" in asked and wait.isascii() and wait.isdigit() and len(wait) <= MAX_WAIT_DIGITS
    return asked if plain and ("--root" in asked or "--live" not in asked) else None


def _read(folder: str) -> Any:
    fd = os.open(f"{folder}/{PREMISES}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        found, data = os.fstat(fd), file.read(MAX_PREMISES_BYTES + 1)
    if found.st_uid != os.geteuid() or found.st_mode & 0o022 or len(data) > MAX_PREMISES_BYTES:
        raise ValueError("not ours")
    return json.loads(data)


def here(root: str, config: str, *, live: bool) -> list[object]:
    """Return what tells one host, one tree and one program from another; `config` is "" for the usual file."""
    program = [VERSION, __version__, stands(__file__), sys.version, ssl.OPENSSL_VERSION]
    return [*program, root, config, live, os.geteuid(), socket.gethostname()]


def _meant(known: Any, asked: dict[str, str], root: str) -> bool:
    config = os.path.abspath(asked["--config"]) if "--config" in asked else ""
    return bool(known["here"] == here(root, config, live=root == "/" or "--live" in asked))


def _holds(known: Any) -> bool:
    """Say whether everything is as it was; the port, which takes longest, at last."""
    if any(stands(path) != was for path, was in known["looked"].items()):
        return False
    if any(listed(os.stat(path)) != was for path, was in known["listed"].items()):
        return False
    for path in known["locks"]:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if is_locked(fd):
                return False
        finally:
            os.close(fd)
    return not known["port"] or probe(known["port"])[:2] == (known["listening"], known["served"])


def _publish(folder: str, text: str) -> None:
    """Replace the status that anyone may read, as the whole run does."""
    temporary = f"{folder}/.scx-enroll.{os.urandom(8).hex()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(text.encode("utf-8", "backslashreplace"))
            os.fchmod(fd, 0o644)
        os.rename(temporary, f"{folder}/{STATUS_NAME}")
    except OSError:
        os.unlink(temporary)
        raise
