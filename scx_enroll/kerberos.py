"""Kerberos with the machine's keytab, bound to the TLS channel: what Extended Protection of IIS requires (facts/auth.md sections 2 to 4).

A token is made for each request, once the TLS connection that carries it stands and was verified, so it is bound to the very
certificate that was seen there, and a request is sent once. Tickets are in this process's memory only; nothing is delegated;
there is no other method to fall back to. libkrb5's texts mislead, so failures are told by its numbers.
"""

import base64
import errno
import hashlib
import itertools
import os
import re
import socket
import ssl
import sys
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Callable, Iterator, List, Mapping, Optional, Tuple, TypeVar, cast

from scx_enroll import binding, keytab, spnego, verify
from scx_enroll.errors import ConfigError
from scx_enroll.exchange import NoAnswer
from scx_enroll.keytab import Entry

if TYPE_CHECKING:
    from requests.auth import AuthBase

ERROR_TABLE = -1765328384  # of krb5_err.et; RFC 4120's own codes come first, as they are
KDC_S = 60.0  # for domain controllers to answer; one that is silent takes libkrb5 some 18 s
MAX_TEXT = 160  # characters of a text of libkrb5's

_PACKAGE = "apt install python3-gssapi, dnf install python3-gssapi, or zypper install python3-gssapi; or choose another auth"
_AGAIN = "renew it: adcli update; else join the host again"

# What libkrb5 reports, by its number in the error table: kind (exchange.NoAnswer), what is said, and the hint.
_CLIENT = (
    "signin-join", "{realm} has no account {account}",
    "a new one may take minutes to reach every domain controller; where it was deleted, join the host again (adcli join, realm join)",
)  # fmt: skip
_DISABLED = (
    "signin", "the account {account} is disabled, locked or expired in {realm}", "enable it there: Enable-ADAccount, or unlock or reset it",
)  # fmt: skip
_STALE = ("signin-key", "the key of {account} in {keytab} (kvno {kvno}) is out of date: {realm} knows another one", _AGAIN)
_SERVICE = (
    "signin", "{realm} knows no service {spn}{asked}",
    "server= must be the name that the CA's web server is registered by (setspn -Q HTTP/…), no alias and no address{canonical}",
)  # fmt: skip
_CLOCK = (
    "signin-clock", "this host's clock and those of the domain controllers of {realm} are too far apart",
    "set the clock (chrony, systemd-timesyncd)",
)  # fmt: skip
_SERVER_CLOCK = ("signin-clock", "the clocks of this host and of {server} are too far apart", "set the one that is wrong")
_SILENT = (
    "signin-soon", "no domain controller of {realm} answers", "see port 88 in the firewalls, and DNS (SRV records _kerberos._tcp.{realm})",
)  # fmt: skip
_REALM = (
    "signin-soon", "no domain controller of {realm} can be found",
    "see DNS (SRV records _kerberos._tcp.{realm}), and realms and dns_lookup_kdc in /etc/krb5.conf",
)  # fmt: skip
_CIPHER = ("signin", "{realm} and {keytab} have no type of encryption in common for {account}", _AGAIN)
_OWN_KEY = (
    "signin", "{server} can't read the ticket for {spn}",
    "the SPN must belong to the account that /certsrv runs as, and to no other: setspn -Q {spn}",
)  # fmt: skip
_UNPROVEN = (
    "signin", "{server} did not prove that it is {spn}",
    "see what stands between: it is not the CA's web server; or it lets everybody in, switch off anonymous access there",
)  # fmt: skip
_SETTINGS = ("signin", "/etc/krb5.conf can't be used: {text}", "mend it; a domain member needs none where DNS has the SRV records")
_FAILURES: Mapping[int, Tuple[str, str, str]] = {
    6: _CLIENT,  # C_PRINCIPAL_UNKNOWN
    **dict.fromkeys((1, 18, 21, 23), _DISABLED),  # NAME_EXP, CLIENT_REVOKED, CLIENT_NOTYET, KEY_EXP
    **dict.fromkeys((24, 31, 210), _STALE),  # PREAUTH_FAILED, BAD_INTEGRITY, KRB5_PREAUTH_FAILED
    **dict.fromkeys((2, 7, 19, 22, 27), _SERVICE),  # S_PRINCIPAL_UNKNOWN, and what is expired, revoked, not valid yet, no service
    **dict.fromkeys((32, 33, 37, 148), _CLOCK),  # TKT_EXPIRED, TKT_NYV, SKEW, KDCREP_SKEW
    **dict.fromkeys((29, 156, 220), _SILENT),  # SVC_UNAVAILABLE, KDC_UNREACH, REALM_CANT_RESOLVE
    **dict.fromkeys((68, 154, 217, 224), _REALM),  # WRONG_REALM, REALM_UNKNOWN, ERR_HOST_REALM_UNKNOWN, CONFIG_NODEFREALM
    **dict.fromkeys((14, 150, 152, 181, 200, 236, 237), _CIPHER),  # ETYPE_NOSUPP and libkrb5's own, KT_NOTFOUND among them
    **dict.fromkeys((135, 136), _SETTINGS),  # CONFIG_CANTOPEN, CONFIG_BADFORMAT
}
# The same of what the web server sends with its refusal.
_BY_THE_SERVER: Mapping[int, Tuple[str, str, str]] = {
    **dict.fromkeys((31, 35, 36, 41, 44, 45), _OWN_KEY),  # BAD_INTEGRITY, NOT_US, BADMATCH, MODIFIED, BADKEYVER, NOKEY
    **dict.fromkeys((32, 33, 37), _SERVER_CLOCK),  # TKT_EXPIRED, TKT_NYV, SKEW
}


T = TypeVar("T")
_numbers = itertools.count()  # of caches: those of earlier conversations stay in memory


class Kerberos:
    """Signs in as the machine whose key is `entry`; `data` is the keytab that `path` held. Raises ConfigError without gssapi."""

    scheme = "Negotiate"
    binds = True
    cure = "give /certsrv in IIS the provider Negotiate (or Negotiate:Kerberos), or choose another auth in [ca]"
    auth: "Optional[AuthBase]" = None
    _keys = -1

    def __init__(self, server: str, entry: Entry, data: bytes, path: str) -> None:
        try:
            import gssapi
        except ImportError as problem:
            why = f"auth = kerberos needs the module gssapi of {sys.executable}: {problem}"
            raise ConfigError(why, _PACKAGE) from problem
        self.account = entry.principal
        self._gssapi: Any = gssapi
        self._server, self._host = server, server.partition(":")[0]
        self._spn = f"HTTP/{self._host}"
        self._names = {
            "server": server, "account": entry.principal, "realm": entry.realm, "kvno": entry.kvno, "keytab": path, "spn": self._spn,
        }
        # In memory alone, under a name that libkrb5 can open: what was checked is what is used.
        self._keys = os.memfd_create("keytab", os.MFD_CLOEXEC)
        os.write(self._keys, data)
        self._credentials: Any = None
        self._context: Any = None
        self._newest = keytab.newest(keytab.parse(data), entry)
        self._exact = True
        self._said = ""
        self._seen = b""

    def mark(self, salt: bytes) -> str:
        """Return a hash of the account and its newest keys, which are random: not of the file, which others rewrite."""
        return hashlib.sha256(salt + f"{self.account}\0".encode() + self._newest).hexdigest()

    def prepare(self, _context: ssl.SSLContext) -> None:
        """The account is signed in at a domain controller, for this process alone."""
        if self._credentials is None:
            with self._told():
                name = self._gssapi.Name(self.account, self._gssapi.NameType.kerberos_principal)
                store = {"client_keytab": f"FILE:/proc/self/fd/{self._keys}", "ccache": f"MEMORY:scx-enroll-{next(_numbers)}"}
                # For one mechanism: asked for all, libgssapi sends a key that is out of date once for each, and that counts.
                only = [self._gssapi.OID.from_int_seq(spnego.KERBEROS)]
                self._credentials = self._in_time(lambda: self._gssapi.Credentials(name=name, mechs=only, usage="initiate", store=store))

    def __del__(self) -> None:
        """Forget the keys."""
        if self._keys >= 0:
            os.close(self._keys)

    def authorization(self, certificate: bytes) -> str:
        """Return the first token for the server, bound to the channel where it showed this certificate (DER)."""
        self._seen = certificate
        try:
            bound = binding.end_point(certificate)
        except binding.Unbindable:
            what = f"no channel binding is known for the certificate of {self._server}; nothing was sent: {verify.whose(certificate)}"
            hint = "give the web server a certificate that is signed with RSA or ECDSA over SHA-2"
            raise NoAnswer(what, hint, "signin", stored=False) from None
        while True:
            with self._told():
                try:
                    return f"Negotiate {base64.b64encode(spnego.init(self._in_time(lambda: self._begun(bound)))).decode()}"
                except self._gssapi.exceptions.GSSError as error:
                    if not self._exact or _FAILURES.get(_number(error)) is not _SERVICE:
                        raise
            self._exact = False

    def _begun(self, bound: bytes) -> bytes:
        """Begin a context with the service, and return its first token.

        The name is first taken as it is written: what krb5.conf may make of it by DNS is as good as the PTR records. Where the domain
        does not know it so, it may be an alias that krb5.conf has resolved.
        """
        gssapi, kinds = self._gssapi, self._gssapi.NameType
        exact = gssapi.Name(f"{self._spn}@", kinds.kerberos_principal)  # of whichever realm knows it: referrals (RFC 6806)
        self._context = gssapi.SecurityContext(
            name=exact if self._exact else gssapi.Name(f"HTTP@{self._host}", kinds.hostbased_service),
            creds=self._credentials,
            mech=gssapi.OID.from_int_seq(spnego.KERBEROS),
            flags=[gssapi.RequirementFlag.mutual_authentication],
            usage="initiate",
            channel_bindings=gssapi.raw.ChannelBindings(application_data=bound),
        )
        return self._step(None) or b""

    def _in_time(self, act: Callable[[], T]) -> T:
        """Do what may ask domain controllers, for a while at most: libkrb5's own patience grows with their number."""
        done: List[Tuple[Optional[T], Optional[BaseException]]] = []

        def work() -> None:
            try:
                done.append((act(), None))
            except BaseException as problem:  # noqa: BLE001 - raised again below
                self._said = _text(problem) if isinstance(problem, self._gssapi.exceptions.GSSError) else ""  # known in this thread alone
                done.append((None, problem))

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        worker.join(KDC_S)
        if not done:
            raise self._no_answer(*_SILENT)
        value, problem = done[0]
        if problem:
            raise problem
        return cast(T, value)

    def _step(self, token: Optional[bytes]) -> Optional[bytes]:
        out: Optional[bytes] = self._context.step(token)
        _ = self._context.complete  # an error that came with a token is raised by the next look only
        return out

    def refused(self, token: bytes) -> NoAnswer:
        """A ticket was had, but the server does not take it: say why, as far as it tells."""
        inner = spnego.answer(token)
        if inner:
            try:
                self._step(inner)
            except self._gssapi.exceptions.GSSError as error:
                if _number(error) in _BY_THE_SERVER:
                    return self._no_answer(*_BY_THE_SERVER[_number(error)])
        what = f"{self._server} refused the ticket of {self.account} for {self._spn} (HTTP 401)"
        hint = "where that is not IIS's own certificate but an inspecting proxy's or a load balancer's, have TLS end at IIS; else see"
        return NoAnswer(
            f"{what}; its TLS certificate: {verify.whose(self._seen)}",
            f"{hint} that {self._spn} belongs to the account that /certsrv runs as (setspn -Q), and the web server's security log",
            "signin", stored=False,
        )  # fmt: skip

    def proved(self, token: bytes) -> None:
        """The server has opened the ticket: nobody but the service itself can answer so. Raises NoAnswer."""
        inner = spnego.answer(token)
        if inner:
            with suppress(self._gssapi.exceptions.GSSError):
                self._step(inner)
                if self._context.complete:
                    return
        raise self._no_answer(*_UNPROVEN, stored=True)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._gssapi.exceptions.GSSError as error:
            raise self._no_answer(*_explained(error), text=self._said) from None

    def _no_answer(self, kind: str, what: str, hint: str, text: str = "", *, stored: bool = False) -> NoAnswer:
        server = re.search(r"^Server (\S+?)(?:@\S*)? not found", text)
        asked = f", asked for as {server[1]} (see rdns in krb5.conf)" if server and server[1] != self._spn else ""
        canonical = _canonical(self._host) if "{canonical}" in hint else ""
        names = {
            **self._names, "text": text, "asked": asked,
            "canonical": canonical and f"; {self._host} is an alias of {canonical}",
        }  # fmt: skip
        return NoAnswer(what.format(**names), hint.format(**names), kind, stored=stored)


def _number(error: Any) -> int:
    return (int(error.min_code) - ERROR_TABLE) & 0xFFFFFFFF


def _explained(error: Any) -> Tuple[str, str, str]:
    """Return kind, words and hint. EAGAIN comes from the resolver, for the name of a domain controller."""
    if error.min_code == errno.EAGAIN:
        return _SILENT
    unknown = f"Kerberos failed with code {error.min_code}: {{text}}"
    return _FAILURES.get(_number(error), ("signin", unknown, "to see where: KRB5_TRACE=/dev/stderr scx-enroll check"))


def _text(error: Any) -> str:
    """Return libkrb5's own text: str() would put "Unspecified GSS failure" and a number before it."""
    with suppress(Exception):  # it is asked of the library
        return "".join(letter for letter in "; ".join(error.get_all_statuses(error.min_code, False)) if letter.isprintable())[:MAX_TEXT]
    return "no text"


def _canonical(host: str) -> str:
    """Return the name that an alias stands for, as the resolver knows it; "" where it is none."""
    with suppress(OSError):
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_CANONNAME)
        name = next((one[3] for one in found if one[3]), "").lower()
        return name if re.fullmatch("[a-z0-9.-]{1,253}", name) and name != host else ""
    return ""
