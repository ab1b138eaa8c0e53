"""The lab's CA behind HTTPS: a server in a thread, what it looks at in a request, and which page it answers with."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import hmac
import http
import os
import random
import secrets
import socket
import ssl
import sys
import threading
import time
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Tuple, Union
from urllib.parse import parse_qs, urlsplit

from . import foreign, webcerts
from .authority import ANONYMOUS, NO_SUCH_REQUEST, Authority, common_name, pkcs7, to_pem
from .pages import Pages, readable
from .signin import OFFERS, Gate, Verdict, Visitor
from .wire import Dropped, Reply, ask_afterwards, concerns, encoded, hang_up, prepare, write

if TYPE_CHECKING:
    from types import TracebackType

MAX_DRAINED_BYTES = 8 << 20  # of a form that is refused
MAX_FORM_BYTES = 200_000  # ASP's AspMaxRequestEntityAllowed, by default
HUGE_BYTES = 8 << 20
CALL_BROKE = 0x800706BE  # RPC_S_CALL_FAILED: the CA may have done it all

REDIRECTS = ("301", "302", "303", "307", "308")
PROXY_OFFER = ("Proxy-Authenticate", 'Basic realm="proxy.example"')


@dataclass
class Seen:
    """One request as the server saw it, without secrets; in the log from its arrival on.

    `status` is 0 until it is answered, and where the connection was dropped without an answer.
    """

    method: str
    path: str  # as sent, with the query
    authenticated: bool
    status: int
    agent: str
    scheme: str = ""  # the first word of Authorization
    account: str = ""  # who signed in, also where that did not help
    bound: bool = False  # right channel bindings came, and were looked at
    delegated: bool = False  # credentials of the client's came with the token, for the server's use
    mutual: bool = False  # the client wanted the server's own proof
    reason: str = ""  # why credentials were not enough
    sent_bytes: int = 0  # of the request's body


class LabCA:
    """An `Authority` behind HTTPS on `address`, in a thread of this process.

    `directory` gets server-trust.pem (the root of the HTTPS certificate, unrelated to the CA) and issuer-trust.pem (the CA's
    roots). `server` is "localhost:PORT", or with another address than 127.0.0.1 "SERVER_NAME:PORT". `authority.posts` counts the
    submissions that were let in, `count_post` all POSTs. `user` and `password` are for Basic and NTLM, `keytab` for Kerberos, of any
    principal in it; replace the file, or `gate.keytab`, at any time. `client_ca` is the path of the roots of client certificates, by
    default those of `clients`, which issues some. `tokens` are all Authorization headers that came; given a path, they go
    to that file too.
    `on_request` is called before each request, `on_reply` before each reply is sent; `twist` gets "get" or "post" and each page's
    bytes, and returns what is sent instead.
    Further keyword arguments go to `Authority`.
    """

    def __init__(
        self,
        directory: os.PathLike[str],
        *,
        port: int = 0,
        address: str = "127.0.0.1",
        server_name: str = "ca.lab.test",
        user: str = "LAB\\svc-enroll",
        password: str = "",
        keytab: str = "",
        client_ca: str = "",
        tokens: Optional[os.PathLike[str]] = None,
        authority: Optional[Authority] = None,
        **options: Any,
    ) -> None:
        """Make keys, certificates and the trust files; nothing listens yet."""
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.user = user
        self.password = password or "lab-" + secrets.token_urlsafe(18)
        self.authority = authority or Authority(**options)
        self.switches = self.authority.switches
        self.pages = Pages(self.authority, self.switches)
        self.server_name = server_name
        self.bad_passwords = 0
        self.log: List[Seen] = []
        self.tokens: List[str] = []
        self._tokens = tokens
        self.gate = Gate(self.directory, self.switches, self.user, self.password, keytab)
        self.on_request: Optional[Callable[[], None]] = None
        self.on_reply: Optional[Callable[[], None]] = None
        self.twist: Optional[Callable[[str, bytes], bytes]] = None
        self._lock = threading.RLock()
        self._port = port
        self._address = address
        self._httpd: Optional[_Server] = None
        self._web = webcerts.WebCertificates(self.directory, server_name, address)
        self.clients = webcerts.ClientCA(self.directory)
        self.client_ca = client_ca or self.clients.trust
        self.server_trust = str(self.directory / "server-trust.pem")
        self.issuer_trust = str(self.directory / "issuer-trust.pem")
        self.write_issuer_trust()

    def write_issuer_trust(self) -> None:
        """Write the CA's present roots to the issuer trust; again after `authority.renew_root()`, as an operator would."""
        Path(self.issuer_trust).write_bytes(to_pem(self.authority.roots))

    def __enter__(self) -> LabCA:
        """Listen."""
        self.start()
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        """Stop listening."""
        self.stop()

    def start(self) -> None:
        """Bind and serve in a background thread; after `stop()`, on the same port again."""
        handler = type("Handler", (_Handler,), {"lab": self})
        self._httpd = _Server((self._address, self._port), handler)
        self._port = int(self._httpd.server_address[1])
        threading.Thread(target=self._httpd.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Close the port and every open connection: from here on connections are refused."""
        if self._httpd:
            self._httpd.shutdown()
            self._httpd.server_close()
            self._httpd.drop()
            self._httpd = None
        self.gate.close()

    @property
    def port(self) -> int:
        """The port it listens on, or did last."""
        return self._port

    @property
    def server(self) -> str:
        """What to write after `server =`."""
        name = "localhost" if self._address == "127.0.0.1" else self.server_name
        return f"{name}:{self._port}"

    @property
    def url(self) -> str:
        """The address of the pages."""
        return f"https://{self.server}/certsrv/"

    @property
    def count_get(self) -> int:
        """How many GETs arrived."""
        return self._count("GET")

    @property
    def count_post(self) -> int:
        """How many POSTs arrived, whether or not they were let in."""
        return self._count("POST")

    @property
    def count_bare_post(self) -> int:
        """How many POSTs arrived without an Authorization header."""
        with self._lock:
            return sum(1 for seen in self.log if seen.method == "POST" and not seen.scheme)

    def _count(self, method: str) -> int:
        with self._lock:
            return sum(1 for seen in self.log if seen.method == method)

    @property
    def bindings(self) -> bytes:
        """The channel bindings that it compares with on the next connection; tls-server-end-point, RFC 5929."""
        return self.bindings_of(self.switches.https)

    def bindings_of(self, https: str) -> bytes:
        """Return those of a connection on which this certificate was shown, unless `bound_to` says otherwise."""
        return self._web.shown("unknown-ca" if self.switches.bound_to else https).bindings

    # used by the handler, once for each connection or request

    def context(self, https: Optional[str] = None) -> ssl.SSLContext:
        """Return the TLS context for the next connection, which shows this certificate; by default the one of the switch."""
        ask = self.switches.certificate if self.switches.auth == "certificate" else ""
        return self._web.context(self.switches.https if https is None else https, ask, self.client_ca if ask else "")

    def record(self, seen: Seen, token: str) -> None:
        """Add to the log, and the Authorization header to `tokens`."""
        with self._lock:
            self.log.append(seen)
            if token:
                self.tokens.append(token)
            if token and self._tokens:
                with open(os.open(self._tokens, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", encoding="latin-1") as file:
                    file.write(f"{token}\n")

    def admit(self, header: str) -> bool:
        """Judge a header of Basic; wrong passwords are counted."""
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            given = base64.b64decode(token, validate=True)
        except ValueError:
            given = b""
        good = self.switches.auth == "basic" and hmac.compare_digest(given, f"{self.user}:{self.password}".encode())
        if not good:
            with self._lock:
                self.bad_passwords += 1
        return good

    def take(self, name: str) -> bool:
        """Use up one of a counted switch: True while it is -1 or above 0."""
        with self._lock:
            left = int(getattr(self.switches, name))
            if left > 0:
                setattr(self.switches, name, left - 1)
            return left != 0


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 1024  # hundreds of hosts may come at once

    def __init__(self, address: Tuple[str, int], handler: Any) -> None:
        self.open: List[socket.socket] = []
        self.lock = threading.Lock()
        super().__init__(address, handler)

    def opened(self, connection: socket.socket) -> None:
        """Remember a connection, so that `drop` finds it."""
        with self.lock:
            self.open = [*(item for item in self.open if item.fileno() >= 0), connection]

    def process_request(self, request: Any, client_address: Any) -> None:
        self.opened(request)
        super().process_request(request, client_address)

    def drop(self) -> None:
        """Cut what is still open."""
        for item in self.open:
            with contextlib.suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent about clients that hang up; anything else is a fault of the lab and is shown."""
        error = sys.exc_info()[1]
        if not isinstance(error, (OSError, ValueError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "Microsoft-IIS/10.0"
    sys_version = ""
    timeout = 120
    disable_nagle_algorithm = True
    lab: LabCA
    server: _Server
    seen: Seen
    visitor: Visitor
    https: str  # the certificate that was shown

    def setup(self) -> None:
        # the handshake happens here, in the connection's own thread, so that a silent client blocks nobody
        self.request.settimeout(self.timeout)
        plain = self.request
        self.https = self.lab.switches.https
        self.request = self.lab.context(self.https).wrap_socket(plain, server_side=True)
        self.server.opened(self.request)
        self.visitor = Visitor(self.lab.gate)
        super().setup()

    def finish(self) -> None:
        self.visitor.close()
        with contextlib.suppress(OSError, ValueError):
            super().finish()
        with contextlib.suppress(OSError):
            self.request.close()

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError, TimeoutError, socket.timeout):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def date_time_string(self, timestamp: Optional[float] = None) -> str:
        now = self.lab.authority.clock() if timestamp is None else timestamp
        return email.utils.formatdate(now + self.lab.switches.date_offset, usegmt=True)

    def do_GET(self) -> None:
        self._serve("get", b"")

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if length > MAX_FORM_BYTES:
            self.close_connection = True
            self._arrived(length)
            self.rfile.read(min(length, MAX_DRAINED_BYTES))  # else the close may overtake the answer, as a reset
            status = self.lab.switches.oversize
            self._send("post", Reply(int(status), self._iis(status)), authenticated=False)
            return
        self._serve("post", self.rfile.read(length))

    def _serve(self, method: str, body: bytes) -> None:
        lab = self.lab
        self._arrived(len(body))
        if lab.on_request:
            lab.on_request()
        switches = lab.switches
        split = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(split.query, keep_blank_values=True).items()}
        form = {name: values[-1] for name, values in parse_qs(body.decode("latin-1"), keep_blank_values=True).items()}
        scripted = bool(switches.answer) and concerns(switches.answer_on, method) and lab.take("answer_times")
        try:
            # a proxy or http.sys answers before anybody looks at credentials; so does IIS where credentials are the matter
            if scripted and not (switches.answer_after and method == "post"):
                self._send(method, self._scripted(switches.answer), authenticated=False)
                return
            verdict = self._judge()
            seen = self.seen
            seen.account, seen.bound, seen.delegated, seen.mutual = verdict.account, verdict.bound, verdict.delegated, verdict.mutual
            seen.reason = verdict.reason
            headers = tuple(("WWW-Authenticate", answer) for answer in verdict.answers)
            if not verdict.admitted:
                self._send(method, self._refusal(headers), authenticated=False)
                return
            seen.authenticated = True
            if switches.enroll == "denied":
                self._send(method, Reply(403, self._iis("403"), headers=headers), authenticated=True)
                return
            lost = self._lost(method, form)
            if lost == "before":
                if method == "post":
                    lab.authority.count_post()
                raise Dropped
            reply = self._page(method, split.path.lower(), query, form)
            reply = replace(reply, headers=(*reply.headers, *headers))
            if switches.slow and concerns(switches.slow_on, method):
                time.sleep(switches.slow)
            if scripted:
                reply = self._scripted(switches.answer)
            self._send(method, reply, authenticated=True, lost=lost)
        except Dropped as dropped:
            self._hang_up(reset=dropped.reset)

    def _judge(self) -> Verdict:
        lab, way = self.lab, self.lab.switches.auth
        header = self.headers.get("Authorization", "")
        if way == "anonymous":
            return Verdict(True, ANONYMOUS)
        if way == "certificate":
            account = self._certified()
            return Verdict(bool(account), account, reason="" if account else "no certificate")
        if way in OFFERS:
            return self.visitor.judge(header, lab.bindings_of(self.https))
        good = lab.admit(header)
        return Verdict(good, lab.user if good else "", reason="" if good else "no password", answers=() if good else lab.gate.offers())

    def _certified(self) -> str:
        """Return the CN of the client's certificate, "" where there is none; asks for one where that is how it is done."""
        connection: ssl.SSLSocket = self.request
        if self.lab.switches.certificate == "later" and not connection.getpeercert(binary_form=True):
            with contextlib.suppress(ssl.SSLError):  # a client that can't, as with TLS 1.2
                ask_afterwards(connection)
        der = connection.getpeercert(binary_form=True)
        return common_name(der) if der else ""

    def _refusal(self, headers: Tuple[Tuple[str, str], ...]) -> Reply:
        switches = self.lab.switches
        if switches.auth == "certificate":
            return Reply(403, self._iis("403.7"))
        bodies: Mapping[str, Callable[[], Union[str, bytes]]] = {
            "page": lambda: self._iis("401"),
            "empty": lambda: b"",
            "large": lambda: b"<HTML>" + b" " * HUGE_BYTES + b"</HTML>",
        }
        return Reply(401, bodies[switches.unauthorized_body](), headers=headers)

    def _lost(self, method: str, form: Mapping[str, str]) -> str:
        switches = self.lab.switches
        if not switches.lost or not concerns(switches.lost_on, method):
            return ""
        if method == "post" and form.get("Mode") != "newreq":
            return ""
        return switches.lost if self.lab.take("lost_times") else ""

    # what is asked for

    def _page(self, method: str, path: str, query: Mapping[str, str], form: Mapping[str, str]) -> Reply:
        lab, pages = self.lab, self.lab.pages
        if path == "/certsrv":
            return Reply(301, "", headers=(("Location", "/certsrv/"),))
        name = path[len("/certsrv/") :] if path.startswith("/certsrv/") else "?"
        if method == "get" and name in ("", "default.asp"):
            return Reply(200, pages.welcome())
        if method == "get" and name == "certcarc.asp":
            if lab.switches.unavailable in ("get", "all"):
                return Reply(200, pages.stopped())
            return Reply(200, pages.renewals())
        if method == "get" and name in ("certnew.cer", "certnew.p7b"):
            return self._download(name, {key.lower(): value for key, value in query.items()})
        if method == "post" and name == "certfnsh.asp":
            return self._finish(form)
        return Reply(404, self._iis("404"))

    def _finish(self, form: Mapping[str, str]) -> Reply:
        lab, pages, switches = self.lab, self.lab.pages, self.lab.switches
        mode = form.get("Mode", "")
        stopped = switches.unavailable in ("post", "all")
        if mode == "chkpnd":
            row = lab.authority.rows.get(_number(form.get("ReqID", "")))
            if stopped:
                return Reply(200, pages.stopped())
            if row is None:
                return Reply(200, pages.failure(NO_SUCH_REQUEST))
            return Reply(200, pages.outcome(row, mozilla=self._mozilla()))
        if mode != "newreq":
            return Reply(500, self._iis("500"))
        if stopped and not switches.unavailable_stored and switches.unavailable_hresult != CALL_BROKE:
            lab.authority.count_post()
            return Reply(200, pages.stopped())
        attributes = _attributes(form.get("CertAttrib", ""))
        template = attributes.get("certificatetemplate", "")
        row = lab.authority.submit(form.get("CertRequest", "").encode("latin-1"), template, self._account(), attributes)
        return Reply(200, pages.stopped() if stopped else pages.outcome(row, mozilla=self._mozilla()))

    def _account(self) -> str:
        return self.seen.account

    def _download(self, name: str, query: Mapping[str, str]) -> Reply:
        lab, pages, switches = self.lab, self.lab.pages, self.lab.switches
        wanted = query.get("reqid", "")
        binary = query.get("enc", "b64").lower() == "bin"
        if switches.unavailable in ("get", "all"):
            return Reply(200, pages.stopped())
        if wanted.lower() == "cacert":
            try:
                chain = lab.authority.chain(int(query.get("renewal", "-1")))
            except (IndexError, ValueError):
                return Reply(200, pages.failure(NO_SUCH_REQUEST))
            return self._bag(list(chain), binary=binary) if name.endswith("p7b") else self._certificate(chain[0], binary=binary)
        if name == "certnew.cer" and switches.cer_fails > 0 and lab.take("cer_fails"):
            if switches.cer_fails_as == "drop":
                raise Dropped
            return Reply(500, self._iis("500")) if switches.cer_fails_as == "500" else Reply(200, pages.failure(0x80004005))
        row = lab.authority.rows.get(_number(wanted))
        if row is None:
            return Reply(200, pages.failure(NO_SUCH_REQUEST))
        if not readable(row, self._account(), switches.foreign):
            return Reply(200, pages.foreign() if switches.foreign == "zero" else pages.failure(NO_SUCH_REQUEST))
        if row.certificate is None or row.state == "revoked":
            return Reply(200, pages.no_certificate(row))
        if name.endswith("p7b"):
            return self._bag([row.certificate, *lab.authority.chain(row.generation)], binary=binary)
        return self._certificate(row.certificate, binary=binary)

    def _certificate(self, der: bytes, *, binary: bool) -> Reply:
        shape = "der" if binary else self.lab.switches.cer_as
        body = der if shape == "der" else _armour(der, bare=shape == "bare")
        return Reply(200, body, "application/pkix-cert" if self._mozilla() else "text/html")

    def _bag(self, ders: List[bytes], *, binary: bool) -> Reply:
        switches = self.lab.switches
        if switches.bag_extra:
            ders.append(self.lab.authority.stranger().der)
        if switches.bag in ("leaf", "empty"):
            ders = ders[:1] if switches.bag == "leaf" else []
        if switches.bag == "sorted":
            ders.sort()
        if switches.bag == "reversed":
            ders.reverse()
        if switches.bag == "shuffled":
            random.shuffle(ders)
        bag = pkcs7(ders)
        # armoured as a certificate although it is PKCS#7 (facts 4)
        body = bag if binary else _armour(bag)
        return Reply(200, body, "application/x-pkcs7-certificates" if self._mozilla() else "text/html")

    def _mozilla(self) -> bool:
        return self.lab.switches.sniff and self.headers.get("User-Agent", "").startswith("Mozilla")

    # the answer

    def _iis(self, name: str) -> str:
        return foreign.iis(name, self.lab.switches.language)

    def _scripted(self, kind: str) -> Reply:
        pages: Mapping[str, Callable[[], Reply]] = {
            "login": lambda: Reply(200, foreign.LOGIN),
            "captive": lambda: Reply(200, foreign.CAPTIVE),
            "json": lambda: Reply(200, foreign.JSON, "application/json"),
            "204": lambda: Reply(204),
            "empty": lambda: Reply(200, ""),
            "nul": lambda: Reply(200, b"<HTML>" + bytes(4096) + b"</HTML>"),
            "bad-utf8": lambda: Reply(200, b"<HTML><P ID=locInfo> \xff\xfe\x80\xc3 </P></HTML>"),
            "huge": lambda: Reply(200, b"<HTML>" + b" " * HUGE_BYTES + b"</HTML>"),
            "500-asp": lambda: Reply(500, foreign.ASP),
            "proxy-502": lambda: Reply(502, foreign.proxy(502), headers=(("Via", "1.1 inspect.example"),)),
            "proxy-504": lambda: Reply(504, foreign.proxy(504), headers=(("Via", "1.1 inspect.example"),)),
            "407": lambda: Reply(407, foreign.proxy(407), headers=(PROXY_OFFER,)),
            "429": lambda: Reply(429, foreign.proxy(429), headers=(("Retry-After", "120"),)),
            "401": lambda: Reply(401, self._iis("401"), headers=(("WWW-Authenticate", "Negotiate"), ("WWW-Authenticate", "NTLM"))),
        }
        if kind in pages:
            return pages[kind]()
        if kind == "100-then-close":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.wfile.flush()
            raise Dropped
        if kind in REDIRECTS:
            return Reply(int(kind), "", headers=(("Location", f"https://{self.lab.server}/login"),))
        name = kind.partition("-")[0]
        return Reply(int(name[:3]), self._iis(name))

    def _send(self, method: str, reply: Reply, *, authenticated: bool, lost: str = "") -> None:
        lab = self.lab
        if lost in ("after", "reset"):
            raise Dropped(reset=lost == "reset")
        if lab.twist and isinstance(reply.body, str):
            reply = replace(reply, body=lab.twist(method, encoded(reply.body, lab.switches)))
        more = [("Server", self.server_version), ("Date", self.date_time_string())]
        fate = prepare(reply, lab.switches, method, lost, http.HTTPStatus(reply.status).phrase, more)
        self.seen.status, self.seen.authenticated = reply.status, authenticated
        if lab.on_reply:
            lab.on_reply()
        write(self.wfile, fate)
        if fate.ends:
            self._hang_up(reset=False)

    def _hang_up(self, *, reset: bool) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            hang_up(self.request, reset=reset)

    def _arrived(self, sent_bytes: int) -> None:
        header = self.headers.get("Authorization", "")
        agent, scheme = self.headers.get("User-Agent", ""), header.partition(" ")[0]
        self.seen = Seen(self.command, self.path, False, 0, agent, scheme, sent_bytes=sent_bytes)
        self.lab.record(self.seen, header)


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else -1


def _attributes(text: str) -> Dict[str, str]:
    """Split `name:value` lines; bad ones are silently ignored (MS-WCCE 3.2.1.4.2.1.2). Names in lower case."""
    found: Dict[str, str] = {}
    for line in text.split("\n"):
        name, colon, value = line.strip().partition(":")
        if colon and name.strip():
            found[name.strip().lower()] = value.strip()
    return found


def _armour(der: bytes, *, bare: bool = False) -> bytes:
    text = base64.b64encode(der)
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    if not bare:
        lines = [b"-----BEGIN CERTIFICATE-----", *lines, b"-----END CERTIFICATE-----"]
    return b"\r\n".join([*lines, b""])
