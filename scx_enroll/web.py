"""One HTTPS exchange with a web server that may do anything: verified, bounded, never repeated.

Nothing of the environment counts (proxies, bundles of roots, .netrc), no redirect is followed, and nothing of a request or an
answer is logged. Where no answer comes, `NoAnswer` says why, and whether the request began to leave. That is observed
(`_Exchange.sent`), not concluded from the kind of an exception: behind a proxy, urllib3 1.26 calls a reset after the request
"cannot connect to proxy", and a TLS error in the answer is the same class as one in the handshake.

The deadline of an exchange is kept by the sockets themselves: each receive waits for what is left of it, at most. A signal would
need the main thread, could strike within a callback, and may be swallowed by somebody's clean-up; a second thread would have to
find the socket. What stays outside is the resolver, whose own limits stand in resolv.conf(5).
"""

from __future__ import annotations

import calendar
import email.utils
import http.client
import logging
import math
import re
import socket
import ssl
import time
from dataclasses import dataclass
from typing import Any, Iterator, Mapping, Optional, Tuple, Type, cast
from urllib.parse import urlsplit

import requests
import urllib3.connection
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from requests.structures import CaseInsensitiveDict

from scx_enroll.errors import ConfigError

MAX_CAUSES = 8  # deep: requests around urllib3 around http.client are five
READ_BYTES = 1 << 10  # at a time: what is read when the connection breaks is kept, and the request ID may be in it


@dataclass(frozen=True)
class Peer:
    """Whom we talk to, as the configuration says: host or host:port, as which user, "" or the proxy's URL, whose roots count."""

    server: str
    user: str
    proxy: str
    trust: str


@dataclass(frozen=True)
class Limits:
    """What one exchange may take: seconds to connect, of silence, in all; bytes of an answer."""

    connect_s: float = 10
    silence_s: float = 120  # a CA behind an HSM and a slow directory answers within a minute
    total_s: float = 180
    body_bytes: int = 1 << 20  # pages have 2-5 kB, PKCS#7 bags up to 20 kB


LIMITS = Limits()


class NoAnswer(Exception):
    """Why there is no page: a reason and a hint for the operator.

    `kind` is network, server, signin, signin-password or trust. `stored`: nothing rules out that the server took the request.
    """

    def __init__(self, reason: str, hint: str, kind: str, *, stored: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint
        self.kind = kind
        self.stored = stored


@dataclass(frozen=True)
class Answer:
    """The body of a page (status 200), the server's clock in epoch seconds, and why the body ends too early if it does."""

    content: bytes
    date: Optional[int] = None
    problem: Optional[NoAnswer] = None

    @property
    def text(self) -> str:
        """The page as certsrv reads it."""
        return self.content.decode("utf-8", errors="replace")


class Client:
    """Exchanges with one web server, signed in by `auth`; `roots` (DER) are all that its certificate may lead to.

    Raises ConfigError for roots that OpenSSL does not take.
    """

    def __init__(self, peer: Peer, roots: Tuple[bytes, ...], auth: AuthBase, limits: Limits) -> None:
        self._peer = peer
        self._limits = limits
        self._context = _context(peer, roots)
        self.session = _Session()
        self.session.trust_env = False
        self.session.auth = auth
        self.session.headers = CaseInsensitiveDict({"Accept-Encoding": "identity"})
        self.session.proxies = {"https": peer.proxy} if peer.proxy else {}
        self.session.adapters.clear()
        self.session.mount("https://", _Adapter(self._context))
        # What they print at WARNING may be what a server sent, and that may be what we sent.
        logging.getLogger("urllib3").setLevel(logging.CRITICAL)

    def ask(self, method: str, url: str, **named: Any) -> requests.Response:
        """Send one request, and return the beginning of its answer, for `read`. Raises NoAnswer."""
        exchange = self._context.exchange = _Exchange(time.monotonic() + self._limits.total_s)
        timeout = (self._limits.connect_s, self._limits.silence_s)
        try:
            return self.session.request(method, url, timeout=timeout, stream=True, allow_redirects=False, **named)
        except _BROKEN as error:
            raise _failure(self._peer, error, sent=exchange.sent) from None

    def read(self, response: requests.Response) -> Answer:
        """Return the page that an answer brings; raise NoAnswer if it brings none, or more than fits."""
        # Each exchange has its own connection: one that is kept may be closing, and a request sent there is doubtful for nothing.
        with self.session, response:
            if response.status_code != 200:
                raise _refusal(self._peer, response)
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise NoAnswer(f"{self._peer.server} encoded its answer, unasked", "see what stands before it", "server", stored=True)
            body, problem = bytearray(), None
            try:
                for chunk in iter(lambda: response.raw.read(READ_BYTES, decode_content=False), b""):
                    body += chunk
                    if len(body) > self._limits.body_bytes:
                        reason = f"{self._peer.server} answered more than {self._limits.body_bytes} bytes"
                        raise NoAnswer(reason, "see server=, and what stands before it", "server", stored=True)
            except _BROKEN as error:
                problem = _failure(self._peer, error, sent=True)
            if not problem and response.headers.get("Content-Length", str(len(body))) != str(len(body)):
                problem = NoAnswer(f"the answer of {self._peer.server} is cut off", "see what stands between", "network", stored=True)
            return Answer(bytes(body), _date(response), problem)


# -- transport --------------------------------------------------------------------------------------------------


@dataclass
class _Exchange:
    """One request and its answer: when it must be over (monotonic seconds), and whether the request began to leave."""

    until: float = math.inf
    sent: bool = False

    def hurry(self, sock: socket.socket) -> None:
        left = self.until - time.monotonic()
        if left <= 0:
            raise socket.timeout("deadline of the exchange")
        sock.settimeout(min(left, sock.gettimeout() or left))


class _Context(ssl.SSLContext):
    """TLS as made by `_context`, and the exchange under way."""

    exchange: _Exchange


class _TLSSocket(ssl.SSLSocket):
    def recv_into(self, *args: Any, **named: Any) -> int:
        cast(_Context, self.context).exchange.hurry(self)
        return super().recv_into(*args, **named)


class _ProxySocket(socket.socket):
    """The connection before TLS: only a proxy says anything here."""

    exchange: _Exchange

    def recv_into(self, *args: Any, **named: Any) -> int:
        self.exchange.hurry(self)
        return super().recv_into(*args, **named)


class _Connection(urllib3.connection.HTTPSConnection):
    debuglevel = 0  # http.client's own switch would print what is sent, the password with it

    def _new_conn(self) -> socket.socket:
        plain = super()._new_conn()
        sock = _ProxySocket(plain.family, plain.type, plain.proto, plain.detach())
        sock.exchange = cast(_Context, self.ssl_context).exchange
        sock.settimeout(cast(float, self.timeout))
        return sock

    def request(self, *args: Any, **named: Any) -> None:
        cast(_Context, self.ssl_context).exchange.sent = True  # urllib3 has connected and verified before it comes here
        super().request(*args, **named)


class _Adapter(HTTPAdapter):
    """Puts our context into each pool, and keeps every other source of trust out.

    requests 2.32.0 to 2.32.2 hand a context of their own to the pool, all others certifi's path to `cert_verify`.
    """

    def __init__(self, context: _Context) -> None:
        self._context = context
        super().__init__(max_retries=0)

    def proxy_manager_for(self, proxy: str, **named: Any) -> Any:
        make: Any = super().proxy_manager_for
        return make(proxy, proxy_ssl_context=self._context, **named)

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:  # noqa: ARG002 - requests' interface
        conn.cert_reqs = "CERT_REQUIRED"
        conn.ca_certs = conn.ca_cert_dir = None
        conn.conn_kw["ssl_context"] = self._context
        conn.ConnectionCls = _Connection


class _Session(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> Optional[str]:  # noqa: ARG002 - requests' interface
        """No answer leads anywhere: requests would read its whole body, and send the CSR again for a 307."""
        return None


def _context(peer: Peer, roots: Tuple[bytes, ...]) -> _Context:
    """Return TLS >= 1.2 that trusts `roots` and nothing else, with the same flags on every Python."""
    context = _Context(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = _TLSSocket
    context.exchange = _Exchange()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = True
    context.hostname_checks_common_name = False  # RFC 9110 section 4.3.4
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags = ssl.VERIFY_X509_TRUSTED_FIRST
    try:
        context.load_verify_locations(cadata=b"".join(roots))
    except (ssl.SSLError, ValueError) as problem:
        raise ConfigError(f"{peer.trust} holds no certificates that OpenSSL takes", "give the roots as PEM") from problem
    return context


# -- why there is no answer -------------------------------------------------------------------------------------

# Statuses of what stands before the CA; nothing was stored (facts/adcs.md section 2.4).
_STATUSES: Mapping[int, Tuple[str, str, str]] = {
    401: ("signin-password", "refused user {user}", "correct user or password; neither is tried again until it changes"),
    403: ("signin", "forbids access to /certsrv", "see IP restrictions and required client certificates of /certsrv in IIS"),
    404: ("server", "has no /certsrv", "see server=, and that this host has the role Certification Authority Web Enrollment"),
    413: ("server", "finds the request too large", "see AspMaxRequestEntityAllowed on the web server, and proxies before it"),
    503: ("server", "says that /certsrv is out of service", "start the application pool of /certsrv in IIS"),
}

# What broke the exchange, most telling first: the cause, what is said of the server (or proxy), the hint.
_FAILURES: Tuple[Tuple[Tuple[Type[BaseException], ...], str, str], ...] = (
    ((socket.gaierror,), "has no address that can be found", "see the name in the configuration, and this host's DNS"),
    ((ssl.SSLError,), "failed in TLS: {detail}", "it must speak TLS 1.2 or later on that port"),
    ((ConnectionRefusedError,), "refused the connection", "see the port, and that the web server runs"),
    ((socket.timeout, TimeoutError, requests.Timeout), "did not answer in time", "see the route and the firewalls to it, and its load"),
    ((ConnectionError, http.client.RemoteDisconnected), "closed the connection", "see what stands between, and its event log"),
    ((http.client.HTTPException,), "gave an answer that is not HTTP", "see the port, and what stands between"),
    ((Exception,), "could not be reached: {detail}", "see the route and the firewalls to it"),
)

# OpenSSL's verify codes (x509_vfy.h) that server-trust can't cure.
_TRUST_HINTS: Mapping[int, str] = {
    9: "see the clocks of this host and of the web server",
    10: "renew the certificate of the web server, or see this host's clock",
    62: "set server= to a name that stands in the certificate of the web server",
}

# All that requests and urllib3 raise for what a server does; anything else is a defect.
_BROKEN = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError)

_TUNNEL = re.compile(r"Tunnel connection failed: ([0-9]{3})")  # http.client's words
_BASIC = re.compile(r"(?:^|,)\s*Basic\b", re.IGNORECASE)
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}")


def _causes(error: Optional[BaseException], depth: int = 0) -> Iterator[BaseException]:
    """Give an error and what it wraps: requests and urllib3 keep causes in arguments and in `reason`, too."""
    if error is not None and depth < MAX_CAUSES:
        yield error
        for inner in (*error.args, getattr(error, "reason", None), error.__cause__, error.__context__):
            if isinstance(inner, BaseException):
                yield from _causes(inner, depth + 1)


def _failure(peer: Peer, error: BaseException, *, sent: bool) -> NoAnswer:
    """Say why an exchange broke, in our words and the system's: those of the libraries may quote what was sent."""
    causes = tuple(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            hint = f"put the root of its certificate into server-trust, which is now: {peer.trust}"
            reason = f"the TLS certificate of {peer.server} is not trusted: {cause.verify_message}"
            return NoAnswer(reason, _TRUST_HINTS.get(cause.verify_code, hint), "trust", stored=sent)
        refused = _TUNNEL.search(str(cause)) if peer.proxy and not sent else None
        if refused:
            reason = f"the proxy {peer.proxy} refused to connect to {peer.server}: HTTP {refused[1]}"
            return NoAnswer(reason, "see proxy=, and what the proxy lets through without signing in", "network", stored=False)
    proxied = peer.proxy and not sent and any(isinstance(cause, urllib3.exceptions.ProxyError) for cause in causes)
    details = [str(getattr(cause, "reason", None) or cause.strerror) for cause in causes if isinstance(cause, OSError) and cause.errno]
    what, hint = next((what, hint) for kinds, what, hint in _FAILURES if any(isinstance(cause, kinds) for cause in causes))
    what = what.format(detail=details[0] if details else "no details")
    return NoAnswer(f"the proxy {peer.proxy} {what}" if proxied else f"{peer.server} {what}", hint, "network", stored=sent)


def _refusal(peer: Peer, response: requests.Response) -> NoAnswer:
    """Say what a status other than 200 means; none of them comes from the CA itself."""
    status = response.status_code
    offered = response.headers.get("WWW-Authenticate", "Basic")
    if status == 401 and not _BASIC.search(offered):
        methods = [method for method in ("Negotiate", "NTLM") if method.lower() in offered.lower()]
        reason = f"{peer.server} does not offer to sign in by Basic, but by {' and '.join(methods) or 'something else'} (HTTP 401)"
        return NoAnswer(reason, "switch on Basic Authentication for /certsrv in IIS", "signin", stored=False)
    if status in _STATUSES:
        kind, what, hint = _STATUSES[status]
        return NoAnswer(f"{peer.server} {what.format(user=peer.user)} (HTTP {status})", hint, kind, stored=False)
    if 300 <= status < 400:
        reason = f"{peer.server} sends us elsewhere (HTTP {status}), to {_redirected(response)}"
        return NoAnswer(reason, "see server=, and what stands before it: redirects are not followed", "server", stored=False)
    hint = "see the event log of the web server, and proxies before it"
    return NoAnswer(f"{peer.server} answered HTTP {status}", hint, "server", stored=True)


def _redirected(response: requests.Response) -> str:
    try:
        host = urlsplit(response.headers.get("Location", "")).hostname or ""
    except ValueError:
        host = ""
    return f"host {host}" if _HOST.fullmatch(host) else "a page of its own"


def _date(response: requests.Response) -> Optional[int]:
    try:
        return calendar.timegm(email.utils.parsedate_to_datetime(response.headers.get("Date", "")).utctimetuple())
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
