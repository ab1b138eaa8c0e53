"""Who we are to the web server: a machine in the domain, an account with a password, or whom a client certificate names.

Secrets stand in a systemd credential or in a root-only file, and nowhere else.
"""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import ssl
from typing import TYPE_CHECKING, Callable, Iterator, Mapping, Optional, Tuple

from scx_enroll import keytab, verify
from scx_enroll.errors import CertificateRefused, ConfigError, HostError, SigninRefused
from scx_enroll.rootfs import Root

if TYPE_CHECKING:
    from requests.auth import AuthBase

    from scx_enroll.config import CA
    from scx_enroll.exchange import NoAnswer, SignIn

MAX_PASSWORD_BYTES = 4096  # far beyond Active Directory's 256 characters; a larger file is something else
MAX_PEM_BYTES = 1 << 20  # a chain with its key has some kB
DEFAULT_PASSWORD_FILE = "/etc/scx-enroll/password"  # noqa: S105 - a path
DEFAULT_KEYTAB = "/etc/krb5.keytab"
JOIN = "join the host to the domain (adcli join, realm join), or name the keytab of its computer account: keytab= in [ca]"

# What makes a password unusable, told without showing any of it.
_PROBLEMS = (
    (lambda text: not text, "is empty"),
    (lambda text: "\n" in text or "\r" in text, "holds more than one line"),
    (lambda text: "\0" in text, "holds a NUL"),
    (lambda text: text.startswith("\ufeff"), "begins with a byte order mark"),
)


def authentication(root: Root, ca: CA) -> SignIn:
    """Return what signs each request to `ca` in.

    Raises ConfigError for what the configuration lacks, a file that others can read and a missing library, SigninRefused for a
    keytab that is missing or not this machine's.
    """
    if ca.auth not in _METHODS:
        raise ConfigError(f"auth = {ca.auth} is not known", f"known are {', '.join(_METHODS)}")
    return _METHODS[ca.auth](root, ca)


# -- Kerberos ---------------------------------------------------------------------------------------------------


def _kerberos(root: Root, ca: CA) -> SignIn:
    path, data = _keytab(root, ca)
    try:
        entry = keytab.machine(keytab.parse(data), ca.principal, socket.gethostname())
    except keytab.Unusable as problem:
        raise SigninRefused(f"the keytab {path} {problem}", problem.hint or JOIN) from None
    from scx_enroll.kerberos import Kerberos

    return Kerberos(ca.server, entry, data, path)


def _keytab(root: Root, ca: CA) -> Tuple[str, bytes]:
    found = _secret(root, ca, "keytab", ca.keytab or DEFAULT_KEYTAB, keytab.MAX_BYTES)
    if found is None:
        raise SigninRefused(f"there is no keytab: {ca.keytab or DEFAULT_KEYTAB} does not exist", JOIN)
    return found


# -- passwords --------------------------------------------------------------------------------------------------


class Basic:
    """User and password with each request, as UTF-8 (requests would make them Latin-1 and fail on the rest)."""

    scheme = "Basic"
    binds = False
    cure = "choose what it offers (kerberos or ntlm) as auth in [ca]; Basic would have to be switched on for /certsrv in IIS"
    auth: Optional[AuthBase] = None

    def __init__(self, server: str, user: str, password: bytes) -> None:
        self.account = user
        self._server = server
        self._password = password

    def mark(self, salt: bytes) -> str:
        """Return a slow hash: people choose passwords."""
        from scx_enroll.exchange import password_mark

        return password_mark(self.account, self._password, salt)

    def prepare(self, _context: ssl.SSLContext) -> None:
        """Nothing is needed."""

    def authorization(self, _certificate: bytes) -> str:
        """Return the same for each request: there is no binding, the verified TLS connection is all there is."""
        return "Basic " + base64.b64encode(self.account.encode() + b":" + self._password).decode()

    def refused(self, _token: bytes) -> NoAnswer:
        """Return why."""
        from scx_enroll.exchange import refused_password

        return refused_password(self._server, self.account)

    def proved(self, _token: bytes) -> None:
        """The server proves no more than its TLS certificate does."""


# -- client certificates ----------------------------------------------------------------------------------------


class ClientCertificate:
    """The TLS connection itself says who we are: at its beginning, or when the server asks for it later."""

    scheme = ""
    binds = False
    cure = ""
    auth: Optional[AuthBase] = None

    def __init__(self, root: Root, ca: CA) -> None:
        self._server = ca.server
        self._pair = _pair(root, ca)
        try:
            self.account = verify.facts(verify.read(self._pair[0])[0]).subject
            self.prepare(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        except (CertificateRefused, IndexError):
            what = f"client-certificate {ca.client_certificate} holds no certificate"
            raise ConfigError(what, "give it as PEM, its chain after it") from None
        except ssl.SSLError as problem:
            why = "does not belong to it" if "MISMATCH" in str(problem.reason) else "is no private key, or one that OpenSSL does not take"
            hint = "give both as PEM, the key without a passphrase"
            raise ConfigError(f"client-certificate {ca.client_certificate}: client-key {ca.client_key} {why}", hint) from None
        except _Encrypted:
            hint = "store it without a passphrase, in a file that only root can read"
            raise ConfigError(f"client-key {ca.client_key} is encrypted", hint) from None

    def mark(self, salt: bytes) -> str:
        """Return a hash of both; the key is random."""
        return hashlib.sha256(salt + b"".join(self._pair)).hexdigest()

    def prepare(self, context: ssl.SSLContext) -> None:
        """The pair is loaded. IIS asks for it in the handshake, or only for /certsrv: by renegotiation, in TLS 1.3 afterwards."""
        context.post_handshake_auth = True
        files = []
        try:
            for name, data in zip(("certificate", "key"), self._pair):
                files.append(os.memfd_create(name, os.MFD_CLOEXEC))
                os.write(files[-1], data)
            context.load_cert_chain(f"/proc/self/fd/{files[0]}", f"/proc/self/fd/{files[1]}", _no_passphrase)
        finally:
            for file in files:
                os.close(file)

    def authorization(self, _certificate: bytes) -> str:
        """Return nothing: no header is needed."""
        return ""

    def refused(self, _token: bytes) -> NoAnswer:
        """Return why: the certificate belongs to nobody there."""
        from scx_enroll.exchange import NoAnswer

        hint = "map it in IIS (client certificate mapping, or its account in AD), and let /certsrv accept client certificates"
        return NoAnswer(f"{self._server} knows nobody by the client certificate {self.account} (HTTP 401)", hint, "signin", stored=False)

    def proved(self, _token: bytes) -> None:
        """The server proves no more than its TLS certificate does."""


class _Encrypted(Exception):
    """The key asks for a passphrase."""


def _no_passphrase() -> bytes:
    raise _Encrypted


def _pair(root: Root, ca: CA) -> Tuple[bytes, bytes]:
    try:
        certificate = root.read(ca.client_certificate, MAX_PEM_BYTES, trusted=True)
    except FileNotFoundError:
        raise ConfigError(f"client-certificate: there is no {ca.client_certificate}", "put the certificate there, as PEM") from None
    except HostError as problem:
        raise ConfigError(problem.message, problem.hint) from problem
    key = _secret(root, ca, "client-key", ca.client_key, MAX_PEM_BYTES)
    if key is None:
        raise ConfigError(f"client-key: there is no {ca.client_key}", f"put the key there: install -m 600 FILE {ca.client_key}")
    return certificate, key[1]


# -- secrets ----------------------------------------------------------------------------------------------------


def _secret(root: Root, ca: CA, name: str, path: str, limit: int) -> Optional[Tuple[str, bytes]]:
    """Return a secret and where it stands, None where there is none: in a systemd credential, else in a file of root's alone.

    Raises ConfigError for a file that others own or can read.
    """
    for tree, place in _places(root, ca, name, path):
        try:
            return place, tree.read(place, limit, private=True)
        except FileNotFoundError:
            continue
        except HostError as problem:
            raise ConfigError(problem.message, problem.hint) from problem
    return None


def _places(root: Root, ca: CA, name: str, path: str) -> Iterator[Tuple[Root, str]]:
    """Yield the places a secret may stand, the first that exists counts; credentials only where this host's agent is."""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY", "")
    if root.live and credentials.startswith("/"):
        for credential in (f"{name}-{ca.label}", name) if ca.label else (name,):
            yield Root("/"), f"{credentials}/{credential}"
    yield root, path


def _user(ca: CA) -> str:
    if not ca.user or ":" in ca.user:
        raise ConfigError(f"auth = {ca.auth} needs a user without a colon", "set user in [ca], e.g. CORP\\svc-scx-enroll")
    return ca.user


def _password(root: Root, ca: CA) -> bytes:
    path = ca.password_file or DEFAULT_PASSWORD_FILE
    found = _secret(root, ca, "password", path, MAX_PASSWORD_BYTES)
    if found is None:
        hint = f"write it there: install -m 600 /dev/stdin {path}"
        raise ConfigError(f"there is no password for user {ca.user}: {path} does not exist", hint)
    return _checked(*found)


def _checked(path: str, data: bytes) -> bytes:
    hint = "it must hold the password alone, on one line, in UTF-8"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"the password in {path} is not UTF-8", hint) from None
    text = text[:-1] if text[-1:] == "\n" else text
    for applies, problem in _PROBLEMS:
        if applies(text):
            raise ConfigError(f"the password file {path} {problem}", hint)
    return text.encode("utf-8")


def _basic(root: Root, ca: CA) -> SignIn:
    return Basic(ca.server, _user(ca), _password(root, ca))


def _ntlm(root: Root, ca: CA) -> SignIn:
    from scx_enroll.ntlm import Ntlm

    return Ntlm(ca.server, _user(ca), _password(root, ca).decode())


_METHODS: Mapping[str, Callable[[Root, CA], SignIn]] = {
    "kerberos": _kerberos,
    "ntlm": _ntlm,
    "basic": _basic,
    "certificate": ClientCertificate,
}
