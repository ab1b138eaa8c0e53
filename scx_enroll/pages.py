"""Reads a page of AD CS web enrollment into an outcome; knows no HTTP, and no human language.

Business outcomes are all HTTP 200 and their text follows the server's language; element IDs, links, numbers and
HRESULTs do not (facts/adcs.md section 2). The order of the questions is the contract:

    0  no </HTML>                              -> cut off, so unknown; only step 2 stays usable (its ID ends at `&`)
    1  ID locDenied or locInfoReqIDandReason   -> Denied: its message echoes the requester's text, so it comes first
    2  certnew.cer?ReqID=N&, all the same N    -> Issued
    3  ID locInfoReqID                         -> Pending
    4  a number right before ID locDispSpacer  -> the disposition ([MS-WCCE] 3.2.1.4.2.1.3)
    5  an HRESULT in the text                  -> denied by a manager, or Failed
    6  anything else                           -> Unknown

Every pattern is linear: a hostile page of 1 MiB costs about a second, whatever is in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Dict, List, Optional, Set, Tuple, Union

MAX_SKELETON_CHARS = 8192  # a bug report's worth; ours

DENIED_BY_MANAGER = 0x80094014  # [MS-ERREF] CERTSRV_E_ADMIN_DENIED_REQUEST


@dataclass(frozen=True)
class Issued:
    """A certificate was issued; a disposition page does not say for which request ID."""

    request_id: Optional[int]


@dataclass(frozen=True)
class Pending:
    """The request waits for the CA's operator; a disposition page does not say which, and on others the ID may be illegible."""

    request_id: Optional[int]


@dataclass(frozen=True)
class Denied:
    """The CA said no; old servers leave out the request ID, the HRESULT or both."""

    request_id: Optional[int]
    hresult: Optional[int]


@dataclass(frozen=True)
class Revoked:
    """The certificate was issued and then revoked."""


@dataclass(frozen=True)
class Failed:
    """An error, of the CA or about the request ID that was asked for; `own`: surely the latter, for a disposition stands beside it."""

    hresult: Optional[int]
    own: bool = False


@dataclass(frozen=True)
class Unknown:
    """Nothing may be concluded; `skeleton` is what of the page may stand in a bug report."""

    why: str
    skeleton: str
    whole: bool = True  # it has its end, so the same request would be answered by the same page


Outcome = Union[Issued, Pending, Denied, Revoked, Failed, Unknown]

_TAG = re.compile(r"<(/?[a-z][^<>]*)>|<!--|-->", re.IGNORECASE)
_NAME = re.compile(r"/?[^\s/]+")
_ATTRIBUTE = re.compile(r"""([^\s"'=/]+)(?:\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"']*)))?""")
_ISSUED = re.compile(r"certnew\.cer\?ReqID=(\d+)&", re.IGNORECASE)
_INTEGER = re.compile(r"(?:(?<!\w)-)?[0-9]+(?:[.,'\u2019\u00a0\u202f][0-9]+)*")  # 1.089 is one number, or none
_REQUEST_ID = re.compile(r"[1-9][0-9]{0,9}")  # a 32-bit row number ([MS-WCCE] 3.2.1.4.2.1)
_HRESULT = re.compile(r"0x[89a-f][0-9a-f]{7}(?![0-9a-f])", re.IGNORECASE)
_ENTITY = re.compile(r"&#?[0-9a-z]{1,32};", re.IGNORECASE)
_NUMBER_AT_END = re.compile(r"(?<![0-9])-?[0-9]{1,10}$")
_LAST_STATUS_ZERO = re.compile(r"0x0{1,8} \(WIN32: 0\b", re.IGNORECASE)
_RENEWALS = re.compile(r"\bnRenewals\s*=\s*([0-9]{1,4})\s*;")

_DISPOSITIONS: Dict[int, Outcome] = {2: Denied(None, None), 3: Issued(None), 5: Pending(None), 6: Revoked()}
_FOREIGN = 0
_HIDDEN = {"script": "/script", "style": "/style", "<!--": "-->"}
_KNOWN_TAG = re.compile(  # of HTML 4.01, and AD CS's own LocID
    "/?(?:a|b|base|big|blockquote|body|br|button|caption|center|code|col|colgroup|dd|div|dl|dt|em|fieldset|font|form|frame|frameset|h[1-6]|head"
    "|hr|html|i|iframe|img|input|label|legend|li|link|locid|meta|nobr|noscript|object|ol|optgroup|option|p|param|pre|script|select|small|span"
    "|strike|strong|style|sub|sup|table|tbody|td|textarea|tfoot|th|thead|title|tr|tt|u|ul)"
)
_KNOWN_ID = re.compile(  # of AD CS's pages
    "loc(?:ContactAdmin|Denied|DerEnc|DispSpacer|DownloadCert|DownloadCertChain|ErrorMsg|HomeAlign|HomeLink|Info|InfoNewReq|InfoReqID"
    "|InfoReqIDandReason|MSCertSrv|PageFont|PageTitle|TimeoutWarning)"
)
_WANTED = frozenset({"locdenied", "locinforeqid", "locinforeqidandreason"})


@dataclass(frozen=True)
class _Elements:
    """What a page holds, without tags and scripts."""

    inside: Dict[str, List[str]]  # lower-case ID -> the text inside each element that has it
    before_spacer: str  # the text right before locDispSpacer
    text: str
    asks_password: bool


def classify(body: bytes) -> Outcome:
    """Say what a page means, by the order above; never raises, whatever the bytes."""
    page = body.decode("utf-8", errors="replace")
    whole = re.search(r"</html\s*>", page, re.IGNORECASE) is not None
    seen = _elements(page)
    links = {match[1] for match in _ISSUED.finditer(page)}
    denied = "locdenied" in seen.inside or "locinforeqidandreason" in seen.inside
    if not whole and (denied or len(links) != 1):
        return Unknown("the page is cut off" if page.strip() else "the page is empty", skeleton(page), whole=False)
    if denied:
        return _denied(page, seen.inside.get("locinforeqidandreason", []))
    if links:
        return _issued(page, links)
    if "locinforeqid" in seen.inside:
        return _pending(page, seen.inside["locinforeqid"])
    return _disposition(page, seen)


def renewals(body: bytes) -> Optional[int]:
    """Give the index of the CA's newest certificate from certcarc.asp, None where it does not say one."""
    found = {int(match[1]) for match in _RENEWALS.finditer(body.decode("utf-8", errors="replace"))}
    return found.pop() if len(found) == 1 else None


def skeleton(page: str) -> str:
    """Give the tags and IDs of a page, those that are known: no text, no other attribute, at most MAX_SKELETON_CHARS."""
    parts: List[str] = []
    room = MAX_SKELETON_CHARS
    for match in filter(None, (found[1] for found in _TAG.finditer(page))):
        name, attributes = _attributes(match)
        shown = name if _KNOWN_TAG.fullmatch(name) else "#"  # whatever else stands in brackets may be somebody's address
        identity = attributes.get("id", "")
        known = identity if _KNOWN_ID.fullmatch(identity) else "#"  # a server may put there what we sent it
        part = f"<{shown} ID={known}>" if identity else f"<{shown}>"
        room -= len(part)
        if room < 0:
            break
        parts.append(part)
    return "".join(parts)


def _issued(page: str, links: Set[str]) -> Outcome:
    link = links.pop()
    if links or not _REQUEST_ID.fullmatch(link):
        return _unknown(page, "the page links to more than one request ID, or to an impossible one")
    return Issued(int(link))


def _denied(page: str, reasons: List[str]) -> Outcome:
    ids = _request_ids(reasons)
    if len(ids) > 1:
        return _unknown(page, "the page of a denial shows more than one request ID")
    return Denied(ids.pop() if ids else None, _hresult(" ".join(reasons)))


def _pending(page: str, elements: List[str]) -> Outcome:
    ids = _request_ids(elements)
    if len(ids) > 1:
        return _unknown(page, "a request is pending, but the page shows more than one request ID")
    return Pending(ids.pop() if ids else None)


def _disposition(page: str, seen: _Elements) -> Outcome:
    hresult = _hresult(seen.text)
    number = _NUMBER_AT_END.search(seen.before_spacer.rstrip())
    if number:
        disposition = int(number[0])
        if disposition == _FOREIGN:
            return _unknown(page, "the certificate was not issued by this CA")
        outcome = _DISPOSITIONS.get(disposition)
        if outcome is None:
            return _failed(disposition & 0xFFFFFFFF if disposition < 0 else hresult, own=True)
        return Denied(None, hresult) if isinstance(outcome, Denied) else outcome
    if len({code.lower() for code in _HRESULT.findall(seen.text)}) > 1:
        return _unknown(page, "the page shows more than one error")
    if hresult is not None:
        return _failed(hresult)
    if _LAST_STATUS_ZERO.search(seen.text):  # pending, revoked, or denied without a code
        return _unknown(page, "it tells no disposition, and no error")
    return _unknown(page, "it is a sign-in form" if seen.asks_password else "nothing in it is known from AD CS")


def _failed(hresult: Optional[int], *, own: bool = False) -> Outcome:
    return Denied(None, hresult) if hresult == DENIED_BY_MANAGER else Failed(hresult, own)


def _unknown(page: str, why: str) -> Unknown:
    return Unknown(why, skeleton(page))


def _request_ids(texts: List[str]) -> Set[int]:
    """Give the first integer of each text, where it can be a request ID; the 0 of an HRESULT, negative and grouped ones can't."""
    firsts = (match[0] for match in map(_INTEGER.search, texts) if match)
    return {int(first) for first in firsts if _REQUEST_ID.fullmatch(first)}


def _hresult(text: str) -> Optional[int]:
    match = _HRESULT.search(text)
    return int(match[0], 16) if match else None


def _elements(page: str) -> _Elements:
    inside: Dict[str, List[str]] = {}
    opened: Dict[str, Tuple[str, List[str]]] = {}  # elements being read: ID -> tag name, runs of text
    finished: List[Tuple[str, List[str]]] = []  # the same and earlier ones: ID, runs of text
    text: List[str] = []
    spacer: Optional[str] = None
    hidden = ""  # what ends the script, style or comment that is being passed over
    asks_password = False
    end = 0
    for match in _TAG.finditer(page):
        run = "" if hidden else page[end : match.start()]
        end = match.end()
        name, attributes = _attributes(match[1] or match[0])
        if run:
            text.append(run)
            for _, runs in opened.values():
                runs.append(run)
        if hidden:
            hidden = "" if name == hidden else hidden
            continue
        hidden = _HIDDEN.get(name, "")
        closes = "p" if name == "p" else name[1:]  # browsers end an open <P> at the next one
        opened = {identity: pair for identity, pair in opened.items() if pair[0] != closes}
        identity = attributes.get("id", "").lower()
        if identity == "locdispspacer" and spacer is None:
            spacer = run
        if identity in _WANTED:
            opened[identity] = (name, [])
            finished.append((identity, opened[identity][1]))
        asks_password = asks_password or (name == "input" and attributes.get("type", "").lower() == "password")
    if not hidden:
        text.append(page[end:])
    for identity, runs in finished:
        inside.setdefault(identity, []).append(_ENTITY.sub(" ", " ".join(runs)))
    return _Elements(inside, spacer or "", " ".join(text), asks_password)


def _attributes(tag: str) -> Tuple[str, Dict[str, str]]:
    """Split what stands between < and > into the lower-case name and the attributes; the first of a name counts."""
    name = _NAME.match(tag)
    found: Dict[str, str] = {}
    if name is None:
        return "", found
    for attribute, *values in _ATTRIBUTE.findall(tag, name.end()):
        found.setdefault(attribute.lower(), "".join(values))
    return name[0].lower(), found
