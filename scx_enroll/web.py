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
import logging
import math
import socket
import ssl
import time
from dataclasses import dataclass
from typing import Any, Optional, Tuple, cast
from urllib.parse import urljoin

import requests
import urllib3.connection
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict

from scx_enroll import challenges
from scx_enroll.errors import ConfigError
from scx_enroll.exchange import BROKEN, NoAnswer, Peer, SignIn, TooMuch, failure, offer, refusal

MAX_OVERHEAD_BYTES = 4 << 20  # beyond the body: headers, which http.client bounds, and the pages that come with a 401 on the way
READ_BYTES = 1 << 10  # at a time: what is read when the connection breaks is kept, and the request ID may be in it


@dataclass(frozen=True)
class Limits:
    """What one exchange may take: seconds to connect, of silence, in all; bytes of an answer."""

    connect_s: float = 10
    silence_s: float = 120  # a CA behind an HSM and a slow directory answers within a minute
    total_s: float = 180
    body_bytes: int = 1 << 20  # pages have 2-5 kB, PKCS#7 bags up to 20 kB


LIMITS = Limits()


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
    """Exchanges with one web server, signed in as `signin` says; `roots` (DER) are all that its certificate may lead to.

    Raises ConfigError for roots that OpenSSL does not take.
    """

    def __init__(self, peer: Peer, roots: Tuple[bytes, ...], signin: SignIn, limits: Limits) -> None:
        self._peer = peer
        self._limits = limits
        self._signin = signin
        self._context = _context(peer, roots)
        self.session = _Session()
        self.session.trust_env = False
        self.session.auth = signin.auth
        self.session.headers = CaseInsensitiveDict({"Accept-Encoding": "identity"})
        self.session.proxies = {"https": peer.proxy} if peer.proxy else {}
        self.session.adapters.clear()
        self.session.mount("https://", _Adapter(self._context))
        # What they print at WARNING may be what a server sent, and that may be what we sent: whatever is set for one of its modules.
        logging.getLogger("urllib3").propagate = False

    def ask(self, method: str, url: str, **named: Any) -> requests.Response:
        """Send one request, and return the beginning of its answer, for `read`. Raises NoAnswer."""
        try:
            self._signin.prepare(self._context)
        except NoAnswer as problem:
            raise self._clocked(problem, url) if problem.kind == "signin-clock" else problem from None
        if method == "POST" and self._signin.auth:
            return self._post_signed_in(url, **named)
        return self._send(method, url, self._signin, **named)

    def _post_signed_in(self, url: str, **named: Any) -> requests.Response:
        """Send a request once, on a connection that a GET has signed in. Raises NoAnswer where that does not count for the next request."""
        self._sign_connection_in(urljoin(url, "certcarc.asp"))
        response = self._send("POST", url, self._signin, auth=_as_it_is, **named)
        if response.status_code != 401:
            return response
        self.session.close()
        what = f"{self._peer.server} signs in each request, not the connection, so {self._signin.scheme} would send it again and again"
        hint = "see authPersistSingleRequest in IIS, and proxies before it; or choose another auth in [ca]"
        raise NoAnswer(what, hint, "signin", stored=False)

    def offered(self, url: str) -> Tuple[str, ...]:
        """Ask without signing in: return the schemes that the server offers, none where it lets anybody in or asks for a certificate.

        Raises NoAnswer.
        """
        if not self._signin.scheme:  # the connection itself does it
            self._signin.prepare(self._context)
        with self.session, self._send("GET", url, None, auth=_as_it_is) as response:
            if response.status_code not in (200, 401, 403):
                raise refusal(self._peer, self._signin, response)
            return challenges.schemes(offer(response))

    def _clocked(self, problem: NoAnswer, url: str) -> NoAnswer:
        """Say by how much this clock is off, as far as the web server's tells: it is a member of the same domain."""
        try:
            with self.session, self._send("GET", url, None, auth=_as_it_is) as response:
                theirs = _date(response)
        except NoAnswer:
            theirs = None
        apart = int(time.time()) - theirs if theirs is not None else 0
        where = f"; this host's is {abs(apart)} s {'ahead of' if apart > 0 else 'behind'} that of {self._peer.server}" if apart else ""
        return NoAnswer(problem.reason + where, problem.hint, problem.kind, stored=False)

    @property
    def certificate(self) -> bytes:
        """The certificate that the server showed last (DER)."""
        return self._context.exchange.certificate

    def _send(self, method: str, url: str, signin: Optional[SignIn], **named: Any) -> requests.Response:
        room = self._limits.body_bytes + MAX_OVERHEAD_BYTES
        exchange = self._context.exchange = _Exchange(signin, time.monotonic() + self._limits.total_s, room)
        timeout = (self._limits.connect_s, self._limits.silence_s)
        try:
            return self.session.request(method, url, timeout=timeout, stream=True, allow_redirects=False, **named)
        except BROKEN as error:
            raise failure(self._peer, error, sent=exchange.sent) from None

    def _sign_connection_in(self, url: str) -> None:
        """Sign in by a GET where that counts for the connection, so that the request itself is sent once. Raises NoAnswer."""
        response = self._send("GET", url, self._signin)
        try:
            if response.status_code == 401:
                raise refusal(self._peer, self._signin, response)
            while response.raw.read(READ_BYTES):  # then the connection is free for the request
                pass
        except BaseException as error:
            self.session.close()
            if isinstance(error, BROKEN):
                raise failure(self._peer, error, sent=False) from None
            raise

    def read(self, response: requests.Response) -> Answer:
        """Return the page that an answer brings; raise NoAnswer if it brings none, or more than fits."""
        # Each exchange has its own connection: one that is kept may be closing, and a request sent there is doubtful for nothing.
        with self.session, response:
            if response.status_code != 200:
                raise refusal(self._peer, self._signin, response)
            self._signin.proved(challenges.token(offer(response), self._signin.scheme))
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise NoAnswer(f"{self._peer.server} encoded its answer, unasked", "see what stands before it", "server", stored=True)
            body, problem = bytearray(), None
            try:
                for chunk in iter(lambda: response.raw.read(READ_BYTES, decode_content=False), b""):
                    body += chunk
                    if len(body) > self._limits.body_bytes:
                        reason = f"{self._peer.server} answered more than {self._limits.body_bytes} bytes"
                        raise NoAnswer(reason, "see server=, and what stands before it", "server", stored=True)
            except BROKEN as error:
                problem = failure(self._peer, error, sent=True)
            if not problem and response.headers.get("Content-Length", str(len(body))) != str(len(body)):
                problem = NoAnswer(f"the answer of {self._peer.server} is cut off", "see what stands between", "network", stored=True)
            return Answer(bytes(body), _date(response), problem)


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Sign nothing, where requests would take what the session has."""
    return request


# -- transport --------------------------------------------------------------------------------------------------


@dataclass
class _Exchange:
    """One request and its answer: who signs it, until when (monotonic seconds), bytes that may still come, whether it began to leave."""

    signin: Optional[SignIn] = None
    until: float = math.inf
    room: int = MAX_OVERHEAD_BYTES
    sent: bool = False
    certificate: bytes = b""  # that the server showed, DER

    def hurry(self, sock: socket.socket) -> None:
        left = self.until - time.monotonic()
        if left <= 0:
            raise socket.timeout("deadline of the exchange")
        sock.settimeout(min(left, sock.gettimeout() or left))

    def take(self, count: int) -> int:
        self.room -= count
        if self.room < 0:
            raise TooMuch
        return count


class _Context(ssl.SSLContext):
    """TLS as made by `_context`, and the exchange under way."""

    exchange: _Exchange


class _TLSSocket(ssl.SSLSocket):
    def recv_into(self, *args: Any, **named: Any) -> int:
        exchange = cast(_Context, self.context).exchange
        exchange.hurry(self)
        return exchange.take(super().recv_into(*args, **named))


class _ProxySocket(socket.socket):
    """The connection before TLS: only a proxy says anything here."""

    exchange: _Exchange

    def recv_into(self, *args: Any, **named: Any) -> int:
        self.exchange.hurry(self)
        return self.exchange.take(super().recv_into(*args, **named))


class _Connection(urllib3.connection.HTTPSConnection):
    debuglevel = 0  # http.client's own switch would print what is sent, the password with it

    def _new_conn(self) -> socket.socket:
        plain = super()._new_conn()
        sock = _ProxySocket(plain.family, plain.type, plain.proto, plain.detach())
        sock.exchange = cast(_Context, self.ssl_context).exchange
        sock.settimeout(cast(float, self.timeout))
        return sock

    def request(self, *args: Any, **named: Any) -> None:
        """Send a request; urllib3 has connected and verified before it comes here.

        So who we are can be bound to the very connection that it is told on, and the request is sent once.
        """
        exchange = cast(_Context, self.ssl_context).exchange
        exchange.certificate = cast(ssl.SSLSocket, self.sock).getpeercert(binary_form=True) or b""
        authorization = exchange.signin.authorization(exchange.certificate) if exchange.signin else ""
        if authorization:
            named["headers"] = {**(named.get("headers") or {}), "Authorization": authorization}
        exchange.sent = True
        try:
            super().request(*args, **named)
        except BROKEN:
            raise
        except Exception as defect:  # noqa: BLE001 - a defect's words may quote what was to be sent
            raise RuntimeError(f"{type(defect).__name__} while a request was sent").with_traceback(defect.__traceback__) from None


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


def _date(response: requests.Response) -> Optional[int]:
    try:
        return calendar.timegm(email.utils.parsedate_to_datetime(response.headers.get("Date", "")).utctimetuple())
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
