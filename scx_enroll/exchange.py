"""What an exchange with a web server is made of, and why it may bring no answer: in our words, for the operator.

The libraries' own words are not shown, they may quote what was sent.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import socket
import ssl
from dataclasses import dataclass
from typing import Iterator, Mapping, Optional, Protocol, Tuple, Type
from urllib.parse import urlsplit

import requests
import urllib3.exceptions
from requests.auth import AuthBase

from scx_enroll import challenges

MARK_ROUNDS = 600_000  # PBKDF2-HMAC-SHA256, OWASP Password Storage Cheat Sheet 2023
MAX_OFFER_CHARS = 32 << 10  # tokens of NTLM and Kerberos have some hundred bytes
MAX_CAUSES = 8  # deep: requests around urllib3 around http.client are five


@dataclass(frozen=True)
class Peer:
    """Whom we talk to, as the configuration says: host or host:port, "" or the proxy's URL, whose roots count."""

    server: str
    proxy: str
    trust: str


class NoAnswer(Exception):
    """Why there is no page: a reason and a hint for the operator.

    `kind` is network, server or trust, or where we are not let in signin, and with it for what: signin-password and signin-key were
    refused and are not tried again, signin-join is mended by joining the domain, signin-soon by itself, signin-clock by a clock.
    `stored`: nothing rules out that the server took the request.
    """

    def __init__(self, reason: str, hint: str, kind: str, *, stored: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint
        self.kind = kind
        self.stored = stored


class SignIn(Protocol):
    """Who we are to a web server. What goes wrong is raised as NoAnswer."""

    scheme: str  # that the server must offer in WWW-Authenticate; "" for none
    cure: str  # where it offers none such
    binds: bool  # to the TLS channel
    account: str  # as whom; for messages
    auth: Optional[AuthBase]  # what signs in by answers to requests, on a connection that stays

    def mark(self, salt: bytes) -> str:
        """Return a salted hash (hex) of account and secret as they would be sent: it tells that they changed, and nothing else."""

    def prepare(self, context: ssl.SSLContext) -> None:
        """See that everything is there, before anything is connected."""

    def authorization(self, certificate: bytes) -> str:
        """Return Authorization for one request to the server that showed this certificate (DER), on this connection; "" for none."""

    def refused(self, token: bytes) -> NoAnswer:
        """Return why the server refuses us (401) though it offers `scheme`; `token` came with that."""

    def proved(self, token: bytes) -> None:
        """Take the token that came with an answer; raises where the server has to prove who it is, and did not."""


class TooMuch(OSError):
    """A server sends without end."""


# Statuses of what stands before the CA; nothing was stored (facts/adcs.md section 2.4).
_STATUSES: Mapping[int, Tuple[str, str, str]] = {
    403: ("signin", "forbids access to /certsrv", "see in IIS: may {account} use /certsrv? IP restrictions? required client certificates?"),
    404: ("server", "has no /certsrv", "see server=, and that this host has the role Certification Authority Web Enrollment"),
    413: ("server", "finds the request too large", "see AspMaxRequestEntityAllowed on the web server, and proxies before it"),
    503: ("server", "says that /certsrv is out of service", "start the application pool of /certsrv in IIS"),
}

# What broke the exchange, most telling first: the cause, what is said of the server (or proxy), the hint.
_FAILURES: Tuple[Tuple[Tuple[Type[BaseException], ...], str, str], ...] = (
    ((TooMuch,), "answered more than fits", "see server=, and what stands before it"),
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
BROKEN = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError)

_ALERT = re.compile(  # OpenSSL's names; with others the server says nothing about a client certificate
    "ALERT_(CERTIFICATE_REQUIRED|BAD_CERTIFICATE|UNSUPPORTED_CERTIFICATE|CERTIFICATE_(?:REVOKED|EXPIRED|UNKNOWN)|UNKNOWN_CA|ACCESS_DENIED)"
)
_TUNNEL = re.compile(r"Tunnel connection failed: ([0-9]{3})")  # http.client's words


def _causes(error: Optional[BaseException], depth: int = 0) -> Iterator[BaseException]:
    """Give an error and what it wraps: requests and urllib3 keep causes in arguments and in `reason`, too."""
    if error is not None and depth < MAX_CAUSES:
        yield error
        for inner in (*error.args, getattr(error, "reason", None), error.__cause__, error.__context__):
            if isinstance(inner, BaseException):
                yield from _causes(inner, depth + 1)


def failure(peer: Peer, error: BaseException, *, sent: bool) -> NoAnswer:
    """Say why an exchange broke, in our words and the system's: those of the libraries may quote what was sent."""
    causes = tuple(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            hint = f"put the root of its certificate into server-trust, which is now: {peer.trust}"
            reason = f"the TLS certificate of {peer.server} is not trusted: {cause.verify_message}"
            return NoAnswer(reason, _TRUST_HINTS.get(cause.verify_code, hint), "trust", stored=sent)
        alert = _ALERT.search(str(cause.reason)) if isinstance(cause, ssl.SSLError) else None
        if alert:
            wants = alert[1] == "CERTIFICATE_REQUIRED"
            reason = f"{peer.server} {'requires a client certificate' if wants else 'refused the client certificate'} (TLS: {alert[0]})"
            hint = "set auth = certificate, or have /certsrv require none" if wants else "see its dates, and whether it is trusted there"
            return NoAnswer(reason, hint, "signin", stored=sent)
        refused = _TUNNEL.search(str(cause)) if peer.proxy and not sent else None
        if refused:
            reason = f"the proxy {peer.proxy} refused to connect to {peer.server}: HTTP {refused[1]}"
            return NoAnswer(reason, "see proxy=, and what the proxy lets through without signing in", "network", stored=False)
    proxied = peer.proxy and not sent and any(isinstance(cause, urllib3.exceptions.ProxyError) for cause in causes)
    details = [str(getattr(cause, "reason", None) or cause.strerror) for cause in causes if isinstance(cause, OSError) and cause.errno]
    what, hint = next((what, hint) for kinds, what, hint in _FAILURES if any(isinstance(cause, kinds) for cause in causes))
    what = what.format(detail=details[0] if details else "no details")
    return NoAnswer(f"the proxy {peer.proxy} {what}" if proxied else f"{peer.server} {what}", hint, "network", stored=sent)


def offer(response: requests.Response) -> str:
    """Return how the server says that one may sign in; what is too long to be that is nothing that we know."""
    header = response.headers.get("WWW-Authenticate", "")
    return header if len(header) <= MAX_OFFER_CHARS else "Unreadable"


def refusal(peer: Peer, signin: SignIn, response: requests.Response) -> NoAnswer:
    """Say what a status other than 200 means; none of them comes from the CA itself."""
    status = response.status_code
    if status == 401:
        header = offer(response)
        if signin.scheme and header and not response.history and not challenges.offers(header, signin.scheme):
            offered = " and ".join(challenges.schemes(header)) or "something else"
            reason = f"{peer.server} does not offer to sign in by {signin.scheme}, but by {offered} (HTTP 401)"
            return NoAnswer(reason, signin.cure, "signin", stored=False)
        return signin.refused(challenges.token(header, signin.scheme))
    if status in _STATUSES:
        kind, what, hint = _STATUSES[status]
        return NoAnswer(f"{peer.server} {what} (HTTP {status})", hint.format(account=signin.account), kind, stored=False)
    if 300 <= status < 400:
        reason = f"{peer.server} sends us elsewhere (HTTP {status}), to {_redirected(peer, response)}"
        return NoAnswer(reason, "see server=, and what stands before it: redirects are not followed", "server", stored=False)
    hint = "see the event log of the web server, and proxies before it"
    return NoAnswer(f"{peer.server} answered HTTP {status}", hint, "server", stored=True)


def password_mark(user: str, password: bytes, salt: bytes) -> str:
    """Return a slow salted hash (hex) of user and password."""
    return hashlib.pbkdf2_hmac("sha256", password, salt + user.encode(), MARK_ROUNDS).hex()


def refused_password(server: str, user: str, more: str = "") -> NoAnswer:
    """Return that a password was refused: it is not sent again, since accounts lock."""
    hint = f"correct user or password; neither is tried again until it changes{more}"
    return NoAnswer(f"{server} refused user {user} (HTTP 401)", hint, "signin-password", stored=False)


def _redirected(peer: Peer, response: requests.Response) -> str:
    """Say where to; another host is not named: a server may put there what we sent it."""
    own = urlsplit(f"//{peer.server}").hostname
    try:
        host = urlsplit(response.headers.get("Location", "")).hostname or ""
    except ValueError:
        host = ""
    return f"host {own}" if host == own else "another host" if host else "a page of its own"
