"""A proxy that inspects TLS, between a client and the CA: what it decrypts it passes on unchanged, over TLS of its own.

    with Inspecting(tmp_path / "proxy", ca.server, ca.server_trust) as proxy:
        ...  # server = proxy.server, server-trust = proxy.trust
        assert proxy.requests == 2

Its certificates are for the same names as the CA's, from a root that has the same name with `root_name="Lab Web Root"`. A client that
trusts `trust`, as on hosts where such a proxy is in use, finds no fault with it; only channel bindings tell.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import threading
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional

from .webcerts import WebCertificates

if TYPE_CHECKING:
    from types import TracebackType

CHUNK_BYTES = 1 << 16
LIMIT_S = 60.0


class Inspecting:
    """Listens at a port of 127.0.0.1 for the CA at `upstream`, HOST:PORT, which shows a certificate of the root in `upstream_trust`."""

    def __init__(
        self, folder: os.PathLike[str], upstream: str, upstream_trust: str, *, root_name: str = "Inspecting Root", https: str = ""
    ) -> None:
        """Make root and certificate, of the kind that the CA's switch `https` names; nothing listens yet."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name, _, port = upstream.rpartition(":")
        self.trust = str(folder / "inspecting-root.pem")
        self.requests = 0
        self._upstream = (name, int(port))
        self._name = name
        self._inner = ssl.create_default_context(cafile=upstream_trust)
        certificates = WebCertificates(folder, name, root_name=root_name, trust="inspecting-root.pem")
        self._outer = certificates.context(https)
        self._lock = threading.Lock()
        self._open: List[ssl.SSLSocket] = []
        self._listener: Optional[socket.socket] = None

    def __enter__(self) -> Inspecting:
        """Listen."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        """Cut every connection, and listen no more."""
        assert self._listener
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for side in list(self._open):
            _cut(side)

    @property
    def port(self) -> int:
        """The port it listens on."""
        assert self._listener
        return int(self._listener.getsockname()[1])

    @property
    def server(self) -> str:
        """What to write after `server =`."""
        return f"{self._name}:{self.port}"

    @property
    def url(self) -> str:
        """The address of the CA's pages, through it."""
        return f"https://{self.server}/certsrv/"

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        """One connection to the CA for each of a client's: NTLM signs connections in."""
        client.settimeout(LIMIT_S)
        with client, contextlib.suppress(OSError, ssl.SSLError), self._outer.wrap_socket(client, server_side=True) as outer:
            plain = socket.create_connection(self._upstream, LIMIT_S)
            with plain, self._inner.wrap_socket(plain, server_hostname=self._name) as inner:
                with self._lock:
                    self._open += [outer, inner]
                self._pass_on(outer, inner)

    def _pass_on(self, outer: ssl.SSLSocket, inner: ssl.SSLSocket) -> None:
        """Until one side ends. In one thread: a TLS connection is not for two."""
        asked = False
        while True:
            sides = [side for side in (outer, inner) if side.pending()] or select.select([outer, inner], [], [], LIMIT_S)[0]
            if not sides:
                return
            for side in sides:
                data = _read(side)
                if data is None:
                    continue
                if not data:
                    return
                if side is outer and not asked:  # the first bytes since an answer
                    with self._lock:
                        self.requests += 1
                asked = side is outer
                (inner if side is outer else outer).sendall(data)


def _read(side: ssl.SSLSocket) -> Optional[bytes]:
    """Return what has come, b"" at the end, None where it was TLS's own affair."""
    side.setblocking(False)
    try:
        return side.recv(CHUNK_BYTES)
    except ssl.SSLWantReadError:
        return None
    finally:
        side.settimeout(LIMIT_S)


def _cut(side: ssl.SSLSocket) -> None:
    with contextlib.suppress(OSError):
        side.shutdown(socket.SHUT_RDWR)
