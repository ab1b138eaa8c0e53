"""NTLM, bound to the TLS channel, by the library requests-ntlm: a password, for where Kerberos can't be.

NTLM signs a connection in, not a request, and takes three messages for it. The library makes the binding; where cryptography
can't name the digest of a certificate's signature it only warns and sends none, which a hardened server refuses like a wrong password:
so nothing is sent then.
"""

import inspect
import ssl
import sys
from typing import Any, Optional

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from requests import PreparedRequest, Response
from requests.auth import AuthBase

from scx_enroll import binding, challenges, verify
from scx_enroll.errors import ConfigError
from scx_enroll.exchange import NoAnswer, offer, password_mark, refused_password

_PACKAGE = "apt install python3-requests-ntlm, dnf install python3-requests_ntlm (from EPEL); or choose another auth"
_KERBEROS = "set auth = kerberos; or give the web server a certificate that is signed with RSA (PKCS #1 v1.5) or ECDSA over SHA-2"
_WEAK = ("md5", "sha1")
HTTP_1_1 = 11  # as http.client writes it


class Ntlm:
    """Signs in as `user`. Raises ConfigError without a library that binds."""

    scheme = "NTLM"
    binds = True
    cure = "give /certsrv in IIS the provider NTLM; or set auth = kerberos, which a hardened server asks for"

    def __init__(self, server: str, user: str, password: str) -> None:
        try:
            from requests_ntlm import HttpNtlmAuth
        except ImportError as problem:
            raise ConfigError(f"auth = ntlm needs the module requests_ntlm of {sys.executable}: {problem}", _PACKAGE) from problem
        if "send_cbt" not in inspect.signature(HttpNtlmAuth).parameters:
            raise ConfigError("this requests_ntlm is older than 1.1.0, and binds no channel", _PACKAGE)
        self.account = user
        self._server = server
        self._password = password
        self.auth: Optional[AuthBase] = _Hooked(server, HttpNtlmAuth(user, password, send_cbt=True))

    def mark(self, salt: bytes) -> str:
        """Return the mark of the same account with Basic: it locks by either."""
        return password_mark(self.account, self._password.encode(), salt)

    def prepare(self, _context: ssl.SSLContext) -> None:
        """Nothing is needed."""

    def authorization(self, certificate: bytes) -> str:
        """Return "", the header is the library's; raises NoAnswer where that would not bind to this certificate (DER)."""
        try:
            named = x509.load_der_x509_certificate(certificate).signature_hash_algorithm
            fits = named is not None and binding.digest_of(certificate) == ("sha256" if named.name in _WEAK else named.name)
        except (ValueError, UnsupportedAlgorithm, binding.Unbindable):
            fits = False
        if not fits:
            what = f"NTLM can't be bound to the certificate of {self._server} on this host; nothing was sent: {verify.whose(certificate)}"
            raise NoAnswer(what, _KERBEROS, "signin", stored=False)
        return ""

    def refused(self, _token: bytes) -> NoAnswer:
        """Return why: whether it was the password, the binding or a policy against NTLM is not told."""
        more = "; where those are right, see whether the domain refuses NTLM, or a proxy inspects TLS"
        return refused_password(self._server, self.account, more)

    def proved(self, _token: bytes) -> None:
        """The server proves no more than its TLS certificate does."""


class _Hooked(AuthBase):
    """The library's hook, where NTLM is offered; what it can't read of a server's challenge is an answer like any other."""

    def __init__(self, server: str, inner: Any) -> None:
        self._server = server
        self._inner = inner

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        request.headers["Connection"] = "Keep-Alive"
        request.register_hook("response", self._answered)  # type: ignore[no-untyped-call] # requests' stubs leave it out
        return request

    def _answered(self, response: Response, **named: Any) -> Response:
        if response.status_code != 401 or not challenges.offers(offer(response), "NTLM"):
            return response
        try:
            answer: Response = self._inner.response_hook(response, **named)
        except (OSError, NoAnswer):
            raise
        except Exception as problem:  # noqa: BLE001 - whatever it stumbles over, the server sent it
            what = f"{self._server} gave an NTLM challenge that can't be read: {type(problem).__name__}"
            raise NoAnswer(what, "see what stands before it; or choose another auth in [ca]", "signin", stored=False) from None
        if answer.status_code == 401 and any(map(_closes, answer.history)):
            what = f"{self._server} does not keep its connections open, which NTLM needs"
            raise NoAnswer(what, "see proxies and load balancers before it; or choose another auth in [ca]", "signin", stored=False)
        return answer


def _closes(response: Response) -> bool:
    return response.headers.get("Connection", "").lower() == "close" or getattr(response.raw, "version", 11) < HTTP_1_1
