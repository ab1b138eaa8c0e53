"""What a conversation with a certification authority can end in, and what that means to the operator.

The server has no idempotency, so each outcome says whether the request may have been stored (facts/adcs.md section 5).
"""

from dataclasses import dataclass
from typing import Mapping, Optional, Tuple, Union

from scx_enroll.errors import CARefused, CAUnreachable, EnrollError, SigninRefused


@dataclass(frozen=True)
class Certificate:
    """Issued: the leaf, and what else the CA sent with it in no order; all DER."""

    request_id: int
    leaf: bytes
    bag: Tuple[bytes, ...]


@dataclass(frozen=True)
class Pending:
    """The request waits for the CA's operator."""

    request_id: int


@dataclass(frozen=True)
class Denied:
    """The CA said no; nothing was issued. `retry` is hresult's class."""

    request_id: Optional[int]
    hresult: Optional[int]
    reason: str
    hint: str
    retry: str


@dataclass(frozen=True)
class Revoked:
    """The certificate was issued and then revoked."""

    request_id: int


@dataclass(frozen=True)
class Gone:
    """The CA has no such request (any more)."""

    request_id: int


@dataclass(frozen=True)
class Unavailable:
    """No usable answer, and surely nothing issued; `kind` is one of SIGNIN's, network, server, trust or refused."""

    reason: str
    hint: str
    kind: str


@dataclass(frozen=True)
class Doubtful:
    """The request may have been stored. `answered`: the CA took it, but under which ID is not known."""

    reason: str
    request_id: Optional[int]
    answered: bool = False


@dataclass(frozen=True)
class Unfetched:
    """Issued under this request ID, but the certificate could not be read yet: fetch it later."""

    request_id: int
    reason: str
    hint: str


@dataclass(frozen=True)
class Unknown:
    """An answer that was not recognised; `where` names the page and why. Nothing may be concluded."""

    where: str
    skeleton: str
    request_id: Optional[int]
    doubtful: bool  # a request may have been stored
    whole: bool = True  # the page had its end, so that sending the same again would bring the same page


@dataclass(frozen=True)
class Authority:
    """The CA itself: DER certificates, its own newest one first and the others in no order; its clock (epoch seconds)."""

    chain: Tuple[bytes, ...]
    date: Optional[int]


@dataclass(frozen=True)
class Greeting:
    """What a web server is and offers: schemes of WWW-Authenticate, none where it lets everybody in; its TLS certificate (DER)."""

    offered: Tuple[str, ...]
    certificate: bytes
    account: str  # as whom we sign in
    binds: bool  # to the TLS channel


Outcome = Union[Certificate, Pending, Denied, Revoked, Gone, Unavailable, Doubtful, Unfetched, Unknown]
Problem = Tuple[str, EnrollError]  # when to try again (journal.Backoff), and what to say

# What kept us from being let in: when to try again.
SIGNIN: Mapping[str, str] = {
    "signin": "later",
    "signin-soon": "soon",
    "signin-clock": "soon",
    "signin-join": "joining",
    "signin-key": "key",
    "signin-password": "changed",
}


def unavailable(outcome: Unavailable) -> Problem:
    """Say what it means that nothing was stored."""
    if outcome.kind in SIGNIN:
        return SIGNIN[outcome.kind], SigninRefused(outcome.reason, outcome.hint)
    if outcome.kind == "refused":
        return "later", CARefused(outcome.reason, outcome.hint)
    return "soon", CAUnreachable(outcome.reason, outcome.hint)


def refused(outcome: Union[Denied, Revoked, Gone], server: str) -> Problem:
    """Say what it means that there will be no certificate under this request ID."""
    what = f"request ID {outcome.request_id}" if outcome.request_id is not None else "the request"
    retry, hint = "later", f"ask the operator of {server} why, then: scx-enroll run --now"
    if isinstance(outcome, Denied):
        reason, hint = outcome.reason, outcome.hint or hint
        retry = "soon" if outcome.retry == "transient" else "later"
    else:
        reason = "its certificate was revoked" if isinstance(outcome, Revoked) else "the CA does not know it any more"
    return retry, CARefused(f"{server} refused {what}: {reason}", hint)


def by_a_person(outcome: Union[Denied, Revoked, Gone]) -> bool:
    """Say whether somebody decided it, so that no other CA is asked instead."""
    return isinstance(outcome, Revoked) or (isinstance(outcome, Denied) and outcome.retry == "final")


def sentence(outcome: Outcome) -> str:
    """Say why there is no certificate yet."""
    if isinstance(outcome, (Gone, Revoked)):
        return "the CA does not know it" if isinstance(outcome, Gone) else "it was revoked"
    return outcome.where if isinstance(outcome, Unknown) else str(getattr(outcome, "reason", ""))
