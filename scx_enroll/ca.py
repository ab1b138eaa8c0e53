"""One conversation with AD CS: the CSR's bytes in, an outcome out. It never sees the agent's key.

The server has no idempotency, so each outcome says whether the request may have been stored: a POST is sent at most once, and
nobody beneath repeats it (facts/adcs.md section 5). What pages mean is `pages`' business, what an exchange may do is `web`'s.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Callable, Dict, List, Mapping, Optional, Protocol, Tuple, Union

import certsrv
import requests

from scx_enroll import config, hresult, pages, verify
from scx_enroll.errors import CertificateRefused, ConfigError
from scx_enroll.exchange import NoAnswer, Peer, SignIn
from scx_enroll.outcomes import (
    Authority,
    Certificate,
    Denied,
    Doubtful,
    Gone,
    Greeting,
    Outcome,
    Pending,
    Revoked,
    Unavailable,
    Unfetched,
    Unknown,
)
from scx_enroll.rootfs import Root
from scx_enroll.web import LIMITS, Answer, Client, Limits

MAX_BUNDLE_BYTES = 4 << 20  # Debian's bundle of roots has 0.2 MB
NEWEST = -1  # Renewal= of the CA's newest certificate, where certcarc.asp does not tell (facts/adcs.md section 1)
_LATER = "it is asked for again; see the CA and its web server if that goes on"
_NO_SUCH_REQUEST = (0x80094002, 0x80094004)  # CERTSRV_E_NO_REQUEST, CERTSRV_E_PROPERTY_EMPTY

# Debian, Ubuntu; RHEL, Fedora; SUSE; RHEL where the second one, a link, is missing.
BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
)


class Conversation(Protocol):
    """What `enroll` needs of a CA."""

    def authority(self) -> Union[Authority, Unavailable, Unknown]:
        """Ask for the CA's own certificates: this sends nothing, and shows whether the server is trusted and lets us in."""

    def mark(self, salt: bytes) -> str:
        """Return the mark of the secret that is used here (exchange.SignIn)."""

    def greet(self) -> Union[Greeting, Unavailable]:
        """Ask without signing in how one may; this sends nothing of ours."""

    def submit(self, csr: bytes, on_id: Callable[[int], None]) -> Outcome:
        """Send the CSR (PEM), at most once; `on_id` gets the request ID before the certificate is fetched."""

    def fetch(self, request_id: int) -> Outcome:
        """Ask what became of a request; never doubtful."""


def connect(root: Root, ca: config.CA, signin: SignIn, limits: Limits = LIMITS) -> Conversation:
    """Prepare a conversation with `ca`; the network is not touched yet. Raises ConfigError or HostError for server-trust."""
    path, roots = _roots(root, ca.server_trust)
    return _Certsrv(ca, signin, Client(Peer(ca.server, ca.proxy, path), roots, signin, limits))


def _roots(root: Root, server_trust: str) -> Tuple[str, Tuple[bytes, ...]]:
    """Return where the roots for the web server's certificate stand, and what stands there (DER)."""
    for path in BUNDLES if server_trust == "system" else (server_trust,):
        try:
            return path, verify.read(root.read(path, MAX_BUNDLE_BYTES, trusted=True))
        except FileNotFoundError:
            continue
        except CertificateRefused as problem:
            raise ConfigError(f"server-trust: {path}: {problem.message}", "give the roots as PEM") from problem
    if server_trust == "system":
        raise ConfigError("server-trust: this system has no bundle of roots", "install ca-certificates, or name a PEM file")
    raise ConfigError(f"server-trust: there is no {server_trust}", "put the root of the web server's certificate there, as PEM")


class _Ended(Exception):
    """No error: an outcome on its way out through certsrv."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self.outcome = outcome


class _Certsrv(certsrv.Certsrv):  # type: ignore[misc] # certsrv has no annotations
    """certsrv's requests with our limits, and our reading of what comes back. Nothing is logged."""

    session: requests.Session

    def __init__(self, ca: config.CA, signin: SignIn, client: Client) -> None:
        super().__init__(ca.server, "", "", cafile="unused")
        client.session.headers["User-Agent"] = self.session.headers["User-agent"]
        self.session = client.session
        self._client = client
        self._signin = signin
        self._template = ca.template
        self._on_id: Callable[[int], None] = lambda _: None

    def authority(self) -> Union[Authority, Unavailable, Unknown]:
        try:
            index = pages.renewals(self._get(self._url("certcarc.asp")).content)
            asked: Dict[str, Union[str, int]] = {"ReqID": "CACert", "Renewal": NEWEST if index is None else index}
            answer = self._get(self._url("certnew.cer"), params={**asked, "Enc": "b64"})
            newest = _certificate(answer)
            bag = self._bag(asked) if newest else ()
        except NoAnswer as end:
            return _unavailable(end)
        if newest:
            return Authority((newest, *(der for der in bag if der != newest)), answer.date)
        page = pages.classify(answer.content)
        if isinstance(page, pages.Failed) and page.hresult is not None:
            return self._unwell(page.hresult)
        return Unknown("certnew.cer of the CA" + _why(page), _skeleton(page, answer), None, doubtful=False)

    def mark(self, salt: bytes) -> str:
        return self._signin.mark(salt)

    def greet(self) -> Union[Greeting, Unavailable]:
        try:
            offered = self._client.offered(self._url("certcarc.asp"))
        except NoAnswer as end:
            return _unavailable(end)
        return Greeting(offered, self._client.certificate, self._signin.account, self._signin.binds)

    def submit(self, csr: bytes, on_id: Callable[[int], None]) -> Outcome:
        known: List[int] = []

        def note(request_id: int) -> None:
            on_id(request_id)
            known.append(request_id)

        self._on_id = note
        try:
            leaf = self.get_cert(csr.decode("ascii"), self._template)
        except _Ended as end:
            if known and isinstance(end.outcome, Unavailable):
                return Unfetched(known[0], end.outcome.reason, end.outcome.hint)
            if known and isinstance(end.outcome, Unknown):
                return Unfetched(known[0], f"{self.server} gave an unknown answer, {end.outcome.where}", _LATER)
            return end.outcome
        return Certificate(known[0], leaf, self._rest(known[0], leaf))

    def fetch(self, request_id: int) -> Outcome:
        try:
            leaf = self.get_existing_cert(str(request_id))
        except _Ended as end:
            return end.outcome
        return Certificate(request_id, leaf, self._rest(request_id, leaf))

    # -- certsrv's hooks

    def get_existing_cert(self, req_id: str, encoding: str = "b64") -> bytes:
        """Return the certificate as DER, or raise _Ended with what the CA says instead."""
        request_id = int(req_id)
        try:
            answer = self._get(self._url("certnew.cer"), params={"ReqID": request_id, "Enc": encoding})
        except NoAnswer as end:
            raise _Ended(_unavailable(end)) from None
        leaf = _certificate(answer)
        if leaf is None:
            raise _Ended(self._fetched(request_id, answer))
        return leaf

    def _post(self, url: str, **named: Any) -> Answer:
        """Send the request; return the page only if a certificate was issued, its ID noted."""
        try:
            answer = self._handle_response(self._client.ask("POST", url, **named))
        except NoAnswer as end:
            raise _Ended(Doubtful(end.reason, None) if end.stored else _unavailable(end)) from None
        page = pages.classify(answer.content)
        if isinstance(page, pages.Unknown) and answer.problem:
            raise _Ended(Doubtful(answer.problem.reason, None))
        if not isinstance(page, pages.Issued) or page.request_id is None:
            raise _Ended(self._submitted(page, answer))
        self._on_id(page.request_id)
        return Answer(b"certnew.cer?ReqID=%d&" % page.request_id)  # so that certsrv can't read another ID than we did

    def _get(self, url: str, **named: Any) -> Answer:
        answer = self._handle_response(self._client.ask("GET", url, **named))
        if answer.problem:
            raise answer.problem
        return answer

    def _handle_response(self, response: requests.Response) -> Answer:
        return self._client.read(response)

    # -- conclusions

    def _submitted(self, page: pages.Outcome, answer: Answer) -> Outcome:
        """Conclude from the page that answered the request, unless it says issued."""
        if isinstance(page, pages.Pending) and page.request_id is not None:
            self._on_id(page.request_id)
            return Pending(page.request_id)
        if isinstance(page, pages.Pending):
            return Doubtful(f"{self.server} took the request under submission, but shows no request ID", None, answered=True)
        if isinstance(page, pages.Denied):
            code = self._recorded(page.request_id) if page.hresult is None and page.request_id is not None else page.hresult
            return self._denied(page.request_id, code)
        if isinstance(page, pages.Failed) and page.hresult is not None:
            meaning = hresult.meaning(page.hresult)
            if page.hresult not in hresult.TABLE or meaning.retry == "ambiguous":  # one retry, says the facts page
                return Doubtful(f"{self.server}: {meaning.sentence}", None)
            if meaning.retry == "transient":
                return self._unwell(page.hresult)
            refused = self._denied(None, page.hresult)
            return Unavailable(f"{self.server}: {refused.reason}", refused.hint, "refused")
        whole = not isinstance(page, pages.Unknown) or page.whole
        return Unknown("certfnsh.asp" + _why(page), _skeleton(page, answer), None, doubtful=True, whole=whole)

    def _fetched(self, request_id: int, answer: Answer) -> Outcome:
        """Conclude from the page that came instead of a certificate."""
        page = pages.classify(answer.content)
        if getattr(page, "request_id", None) in (None, request_id):
            if isinstance(page, pages.Pending):
                return Pending(request_id)
            if isinstance(page, pages.Revoked):
                return Revoked(request_id)
            if isinstance(page, pages.Denied):
                return self._denied(request_id, page.hresult)
            if isinstance(page, pages.Issued):
                return Unfetched(request_id, f"{self.server} says issued, but gave no certificate", _LATER)
            if isinstance(page, pages.Failed) and page.hresult is not None:
                if page.hresult in _NO_SUCH_REQUEST:
                    return Gone(request_id)
                if page.own or (_recordable(page.hresult) and hresult.meaning(page.hresult).retry == "configuration"):
                    return self._denied(request_id, page.hresult)
                return self._unwell(page.hresult)
        return Unknown("certnew.cer" + _why(page), _skeleton(page, answer), request_id, doubtful=False)

    def _denied(self, request_id: Optional[int], code: Optional[int]) -> Denied:
        if code is None:
            return Denied(request_id, None, "the CA gave no reason", "look at the request on the CA: Failed Requests", "configuration")
        meaning = hresult.meaning(code)
        known = {"template": self._template, "account": self._signin.account}
        named = "".join(f", {what} {name}" for what, name in known.items() if f" {what} " in f"{meaning.sentence} ")
        return Denied(request_id, code, meaning.sentence + named, meaning.hint, meaning.retry)

    def _unwell(self, code: int) -> Unavailable:
        meaning = hresult.meaning(code)
        return Unavailable(f"{self.server}: {meaning.sentence}", meaning.hint, "server")

    def _recorded(self, request_id: int) -> Optional[int]:
        """Ask for the code of a denial that came without one."""
        try:
            page = pages.classify(self._get(self._url("certnew.cer"), params={"ReqID": request_id, "Enc": "b64"}).content)
        except NoAnswer:
            return None
        own = isinstance(page, pages.Denied) or (isinstance(page, pages.Failed) and (page.own or _recordable(page.hresult or 0)))
        return getattr(page, "hresult", None) if own else None

    def _rest(self, request_id: int, leaf: bytes) -> Tuple[bytes, ...]:
        """Return what the CA sends along with a certificate; none if that fails, for the certificate is worth more."""
        try:
            return tuple(der for der in self._bag({"ReqID": request_id}) if der != leaf)
        except NoAnswer:
            return ()

    def _bag(self, asked: Mapping[str, Union[str, int]]) -> Tuple[bytes, ...]:
        for encoding in ("b64", "bin"):
            answer = self._get(self._url("certnew.p7b"), params={**asked, "Enc": encoding})
            with suppress(CertificateRefused):
                found = verify.read(answer.content)
                if found:
                    return found
        return ()

    def _url(self, page: str) -> str:
        return f"https://{self.server}/certsrv/{page}"


def _unavailable(end: NoAnswer) -> Unavailable:
    return Unavailable(end.reason, end.hint, end.kind)


def _recordable(code: int) -> bool:
    """Whether a CA records this code with a request: known, of FACILITY_SECURITY or FACILITY_CERT; others mean that it was not asked."""
    return code in hresult.TABLE and code >> 16 & 0x7FF in (9, 11)


def _certificate(answer: Answer) -> Optional[bytes]:
    """Return the one certificate that an answer is, whatever its Content-Type says."""
    try:
        found = verify.read(answer.content)
    except CertificateRefused:
        return None
    return found[0] if len(found) == 1 else None


def _why(page: pages.Outcome) -> str:
    return f": {page.why}" if isinstance(page, pages.Unknown) else f": {type(page).__name__.lower()}, which makes no sense here"


def _skeleton(page: pages.Outcome, answer: Answer) -> str:
    return page.skeleton if isinstance(page, pages.Unknown) else pages.skeleton(answer.text)
