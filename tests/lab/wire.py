"""How a reply goes over the line: its bytes, its framing, and everything that can happen to both."""

from __future__ import annotations

import codecs
import contextlib
import socket
import ssl
import struct
import time
from dataclasses import dataclass
from io import BufferedIOBase
from typing import List, Tuple, Union

from .switches import Switches

MISCOUNT = 10  # bytes by which wrong-more is wrong
ASKING_S = 2.0  # a client without a certificate answers at once too, but nothing shows that
# utf-16 without its byte order mark, which is a switch of its own
_CODECS = {"utf-16": "utf-16-le"}
_MARKS = {"utf-8": codecs.BOM_UTF8, "utf-16": codecs.BOM_UTF16_LE}


@dataclass
class Reply:
    """What the server wants to say: a page as text, or something else as bytes."""

    status: int
    body: Union[str, bytes] = ""
    kind: str = "text/html"
    headers: Tuple[Tuple[str, str], ...] = ()


@dataclass
class Fate:
    """What the switches make of one reply; `ends` tells whether the connection can not be used after it."""

    head: bytes
    body: bytes
    head_pause: float
    body_pause: float
    ends: bool


class Dropped(Exception):
    """Hang up without another byte; `reset`: with a TCP reset."""

    def __init__(self, *, reset: bool = False) -> None:
        """Tell how."""
        super().__init__()
        self.reset = reset


def encoded(page: str, switches: Switches) -> bytes:
    """Return a page's bytes in the encoding that the switches ask for."""
    charset = switches.page_charset
    data = page.encode(_CODECS.get(charset, charset), "replace")
    return _MARKS.get(charset, b"") + data if switches.bom else data


def concerns(scope: str, method: str) -> bool:
    """Tell whether a switch like `slow_on` speaks of this method."""
    return scope in ("all", method)


def prepare(reply: Reply, switches: Switches, method: str, lost: str, reason: str, more: List[Tuple[str, str]]) -> Fate:
    """Return what is to be written; `lost` is one of the switch's kinds that leave an answer, or ""."""
    shaped = concerns(switches.shape_on, method)
    plain = switches if shaped else Switches()
    page = isinstance(reply.body, str)
    body = encoded(reply.body, plain) if isinstance(reply.body, str) else reply.body
    if page and plain.body_bytes > len(body):
        body += b" " * (plain.body_bytes - len(body))
    cut = switches.truncate_at if switches.truncate_at >= 0 else len(body) // 2
    if lost == "truncated-quiet":
        body = body[:cut]
    kind = reply.kind
    if page and switches.charset:
        kind += f"; charset={plain.page_charset.upper()}"
    headers = [("Cache-Control", "private"), *more]
    if plain.content_type != "none" and reply.status != 204:
        headers.append(("Content-Type", plain.content_type or kind))
    headers.append(("X-Powered-By", "ASP.NET"))
    ends = lost == "truncated"
    sent = body[:cut] if ends else body
    if reply.status == 204:
        sent = b""
    elif plain.chunked:
        headers.append(("Transfer-Encoding", "chunked"))
        sent = _chunks(sent, whole=not ends)
    elif plain.content_length == "missing":
        ends = True
    else:
        claimed = {"wrong-more": len(body) + MISCOUNT, "wrong-less": min(cut, len(body))}.get(plain.content_length, len(body))
        ends = ends or claimed != len(sent)
        headers.append(("Content-Length", str(claimed)))
    ends = ends or bool(switches.connection)
    if ends and not lost:
        headers.append(("Connection", "close"))
    version = "1.0" if switches.connection == "1.0" else "1.1"
    lines = [f"HTTP/{version} {reply.status} {reason}", *(f"{name}: {value}" for name, value in [*headers, *reply.headers])]
    head = "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")
    slow = concerns(switches.slow_on, method)
    body_pause = 0.05 if lost == "trickle" else switches.slow_body if slow else 0.0
    return Fate(head, sent, switches.slow_headers if slow else 0.0, body_pause, ends)


def _chunks(body: bytes, *, whole: bool) -> bytes:
    size = max(1, len(body) // 3)
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return framed + b"0\r\n\r\n" if whole else framed


def write(file: BufferedIOBase, fate: Fate) -> None:
    """Write it all, byte by byte where it is to be slow."""
    for data, pause in ((fate.head, fate.head_pause), (fate.body, fate.body_pause)):
        if not pause:
            file.write(data)
            continue
        for number in range(len(data)):
            file.write(data[number : number + 1])
            file.flush()
            time.sleep(pause)
    file.flush()


def ask_afterwards(connection: ssl.SSLSocket) -> None:
    """Ask a client that waits for its reply for a certificate, and wait until it has answered. Raises ssl.SSLError where it can't."""
    connection.verify_client_post_handshake()
    connection.do_handshake()
    before = connection.gettimeout()
    deadline = time.monotonic() + ASKING_S
    connection.setblocking(False)
    try:
        # the answer is read along with what the client sends next, which is nothing until it has its reply
        while time.monotonic() < deadline and not connection.getpeercert():
            with contextlib.suppress(ssl.SSLWantReadError):
                if not connection.recv(1):
                    return
            time.sleep(0.005)
    finally:
        connection.settimeout(before)


def hang_up(connection: socket.socket, *, reset: bool) -> None:
    """End a connection: in order, or so that the other side sees a reset."""
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    else:
        connection.shutdown(socket.SHUT_RDWR)
