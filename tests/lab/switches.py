"""Every way to make the lab's CA behave: one dataclass, whose fields carry their choices and meaning for whoever prints them."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

LANGUAGES = ("en", "de", "fr", "zh", "ja", "ru", "tr", "ar", "es")
CHARSETS = ("utf-8", "utf-16", "iso-8859-1", "cp1252", "gb2312", "shift_jis", "windows-1251")
METHODS = ("all", "post", "get")

FAULTS: Mapping[str, str] = {
    "": "",
    "key": "another public key than the CSR's",
    "name": "CN and SAN of another host",
    "san": "no SAN at all",
    "cn": "no CN",
    "eku": "clientAuth instead of serverAuth",
    "ca": "CA:TRUE",
    "expired": "ended yesterday",
    "future": "begins tomorrow",
    "short": "ends ten minutes from now",
    "issuer": "signed by an unrelated CA with another name",
    "same-name-issuer": "signed by an unrelated CA that has this CA's name",
}

ANSWERS: Mapping[str, str] = {
    "": "",
    **dict.fromkeys("400 401 403 404 405 408 413 500".split(), "IIS's page for it"),
    "403.4": "IIS: SSL required",
    "403.6": "IIS: address rejected",
    "403.7": "IIS: client certificate required",
    "403.13": "IIS: client certificate revoked",
    "403.16": "IIS: client certificate not trusted",
    "403.17": "IIS: client certificate expired",
    "404-html": "as 404; both follow language",
    "500-asp": "an ASP script's own error page",
    "407": "a proxy wants a password",
    "429": "too many requests, with Retry-After",
    **dict.fromkeys("502 504".split(), "IIS's page for it"),
    "503": "http.sys: the application pool is stopped",
    "proxy-502": "an inspecting proxy's own page, status 502",
    "proxy-504": "an inspecting proxy's own page, status 504",
    **dict.fromkeys("301 302 303 307 308".split(), "a redirect to a login"),
    "login": "200, a sign-in form",
    "captive": "200, a captive portal with a form",
    "json": "200, JSON",
    "204": "no content",
    "empty": "200, no byte",
    "nul": "200, NULs between tags",
    "bad-utf8": "200, bytes that are no UTF-8",
    "huge": "200, 8 MiB of blanks between tags",
    "100-then-close": "100 Continue, then the connection ends",
}

WAYS: Mapping[str, str] = {
    "basic": "Basic is taken, with the account's password; Negotiate and NTLM are offered too, but let nobody in",
    "negotiate": "Negotiate and NTLM",
    "kerberos": "Negotiate, with Kerberos alone inside",
    "ntlm": "NTLM alone",
    "epa": "as negotiate, with epa=require whatever that says",
    "certificate": "a TLS client certificate",
    "refused": "as basic, but every password is wrong",
    "anonymous": "nobody is asked, and nobody may enroll",
}

CERTIFICATES: Mapping[str, str] = {
    "": "",
    "unknown-ca": "from another root",
    "self-signed": "from nobody",
    "wrong-name": "of another host",
    "expired": "ended yesterday",
    "future": "begins tomorrow",
    "rsa-sha1": "a good one, signed by an RSA key with SHA-1; clients need OpenSSL's SECLEVEL=0 for it",
    "rsa-sha256": "signed by an RSA key",
    "rsa-sha384": "with SHA-384",
    "rsa-sha512": "with SHA-512",
    "ecdsa-sha384": "signed by an EC key with SHA-384",
    "pss-sha256": "signed by an RSA key, RSASSA-PSS",
    "pss-sha384": "with SHA-384",
    "pss-sha512": "with SHA-512",
    "ed25519": "signed by an Ed25519 key; RFC 5929 knows no digest for it, SHA-256 is taken",
}

NUMBER = "a number"
TEXT = "any text"


def _switch(default: object, meaning: str, *choices: str, each: Optional[Mapping[str, str]] = None, on: str = "") -> Any:
    """Return a field; `each` are choices with a meaning of their own."""
    return field(default=default, metadata={"choices": choices or tuple(each or ()), "meaning": meaning, "each": each, "heading": on})


@dataclass
class Switches:
    """How the CA behaves; plain attributes, set at any time, in force from the next request on. "" is off.

    A value that is not among a switch's choices is refused when it is set, whichever way: ValueError. A name that is no switch is
    an AttributeError.
    """

    mode: str = _switch(
        "issue", "what becomes of a request: fail is denied to the requester and a failed row, of deny_hresult",
        "issue", "pending", "deny", "fail", on="outcome",
    )  # fmt: skip
    deny_hresult: Optional[int] = _switch(0x80094012, "with mode=deny or fail; none: no code")
    deny_message: str = _switch("", "with mode=deny or fail: a text in place of the HRESULT's own")
    wrong: str = _switch("", "certificates with one fault", each=FAULTS)
    names_from_ad: str = _switch("", '"Build from AD": this name, whatever the CSR says')

    language: str = _switch("en", "of the web server's own texts and labels", *LANGUAGES, on="pages")
    ca_language: str = _switch("", "of disposition messages and HRESULT texts, which are the CA's; empty: as language", "", *LANGUAGES)
    digits: str = _switch("ascii", "native: Arabic-Indic ones in the texts of language=ar; unconfirmed", "ascii", "native")
    deny_page: str = _switch(
        "full", "bare: locDenied alone; echo: certnew.cer?ReqID=7& in the reason", "full", "no-code", "no-id", "bare", "echo",
    )  # fmt: skip
    escape: bool = _switch(False, "messages are HTML-escaped in pages; unconfirmed either way")
    id_quote: str = _switch("", "the quote around element IDs", "", "'", '"')
    id_shape: str = _switch(
        "", "spaced: ID = x; among: between other attributes; wrapped: the tag over several lines", "", "spaced", "among", "wrapped",
    )  # fmt: skip
    lower_case: bool = _switch(False, "<p id=...> instead of <P ID=...>")
    sniff: bool = _switch(True, "the page for browsers to Mozilla; off: the other page to everyone")
    spacer: bool = _switch(True, "certnew.cer without a certificate tells the disposition's number; unconfirmed")
    revoked_status: int = _switch(0, "LastStatus of a revoked request at certnew.cer; unconfirmed")
    foreign: str = _switch(
        "readable", "what certnew.cer tells of another account's request; zero: disposition 0, unconfirmed",
        "readable", "empty", "zero",
    )  # fmt: skip
    certcarc: str = _switch("", "certcarc.asp without nRenewals", "", "missing")
    nrenewals: int = _switch(-1, "what certcarc.asp tells as nRenewals; -1: the truth")
    cer_as: str = _switch("pem", "the body for Enc=b64; bare: base64 without armour", "pem", "bare", "der")
    cer_fails: int = _switch(0, "so many GETs of certnew.cer fail first")
    cer_fails_as: str = _switch("500", "how they fail; html: an error page, 200", "500", "html", "drop")
    bag: str = _switch(
        "sorted", "order of certnew.p7b: sorted as DER's SET OF, ordered is leaf first; all but sorted may be BER; leaf, empty: no chain",
        "sorted", "ordered", "reversed", "shuffled", "leaf", "empty",
    )  # fmt: skip
    bag_extra: bool = _switch(False, "an unrelated CA's certificate in each bag too")

    unavailable: str = _switch("", "CertSvc does not answer the web server's call", "", *METHODS, on="failures")
    unavailable_hresult: int = _switch(
        0x800706BA, "with unavailable; 0x800706be: the call broke midway, a POST is stored. Others: 0x800706bf, 0x80080005, 0x80070005"
    )
    unavailable_stored: bool = _switch(False, "with unavailable: a POST is stored whatever the HRESULT")
    answer: str = _switch("", "somebody else answers, or IIS with an error", each=ANSWERS)
    answer_on: str = _switch("all", "which requests get it", *METHODS)
    answer_times: int = _switch(-1, "how many times, then as usual; -1: always")
    answer_after: bool = _switch(False, "a POST is stored before it is answered like that")
    oversize: str = _switch("413", "the status for a form beyond ASP's limit of 200 000 bytes", "413", "403", "500")

    slow: float = _switch(0.0, "seconds before the reply, the work being done", on="transport")
    slow_headers: float = _switch(0.0, "seconds between the bytes of the status line and the headers")
    slow_body: float = _switch(0.0, "seconds between the bytes of the body")
    slow_on: str = _switch("all", "which replies are slow", *METHODS)
    lost: str = _switch(
        "", "what happens to a reply; a POST is stored, except with before. truncated breaks HTTP's framing, truncated-quiet does not",
        "", "before", "after", "reset", "truncated", "truncated-quiet", "trickle",
    )  # fmt: skip
    lost_on: str = _switch("post", "whose replies; of POSTs only those that submit", *METHODS)
    lost_times: int = _switch(-1, "how many times, then as usual; -1: always")
    truncate_at: int = _switch(-1, "bytes of the body that still arrive where it is cut; -1: half")
    body_bytes: int = _switch(0, "pages are filled up to so many bytes with blanks after their end")
    chunked: bool = _switch(False, "Transfer-Encoding: chunked instead of Content-Length")
    content_length: str = _switch(
        "", "missing: the connection's end is the body's; wrong-less claims what truncate_at says, wrong-more 10 bytes too many",
        "", "missing", "wrong-more", "wrong-less",
    )  # fmt: skip
    content_type: str = _switch("", "in place of the usual header; none: no such header")
    charset: bool = _switch(False, "charset= in the Content-Type header of pages")
    page_charset: str = _switch("utf-8", "the encoding of pages; what it can not say is replaced", *CHARSETS)
    bom: bool = _switch(False, "a byte order mark before each page in a Unicode encoding")
    shape_on: str = _switch("all", "whose replies get body_bytes, chunked, content_length, content_type, page_charset, bom", *METHODS)

    connection: str = _switch(
        "", "close: Connection: close with each reply; 1.0: and HTTP/1.0", "", "close", "1.0"
    )

    auth: str = _switch("basic", "how one signs in; Kerberos takes a keytab, without one nobody is let in by it", each=WAYS, on="who is let in")
    epa: str = _switch(
        "require", "channel bindings, with Negotiate and NTLM: off looks at none; allow lets in who sends none, not who sends wrong ones",
        "off", "allow", "require",
    )  # fmt: skip
    bound_to: str = _switch(
        "", "other: they are compared with those of another certificate than the one that is shown, as behind a proxy", "", "other"
    )
    mutual: str = _switch("on", "the server's own proof, with the reply to a token: off: none; wrong: somebody else's", "on", "off", "wrong")
    persist: bool = _switch(True, "who has signed in by Negotiate or NTLM is not asked again on that connection; off: each request is")
    error_token: bool = _switch(True, "Negotiate's 401 holds what Kerberos says about the failure")
    offers: str = _switch(
        "several", "schemes of a 401: a header each; all in one; with parameters; in lower case", "several", "one", "parameters", "lower"
    )
    unauthorized_body: str = _switch("page", "of a 401; large: 8 MiB", "page", "empty", "large")
    certificate: str = _switch(
        "handshake", "when auth=certificate asks for one: in the handshake; required: and that fails without; later: when a page is asked "
        "for, with TLS 1.3, and in the handshake with 1.2. Who has none gets 403.7, but where it is required",
        "handshake", "required", "later",
    )  # fmt: skip
    enroll: str = _switch("allowed", "denied: 403 for whoever has signed in", "allowed", "denied")
    https: str = _switch("", "the web server's certificate: its faults, and its signature", each=CERTIFICATES)
    date_offset: float = _switch(0.0, "seconds by which the Date header is ahead")

    def __setattr__(self, name: str, value: object) -> None:
        """Set one switch."""
        item = _table().get(name)
        if item is None:
            raise AttributeError(name)
        choices = item.metadata["choices"]
        if choices and value not in choices:
            raise ValueError(f"{name}: {value!r} is none of {', '.join(map(repr, choices))}")
        object.__setattr__(self, name, value)

    def update(self, values: Mapping[str, Any]) -> None:
        """Set several switches by name.

        Raises KeyError for a name that is no switch, TypeError for a value of another kind than the default, ValueError for one
        that is none of the choices.
        """
        for name, value in values.items():
            if name not in _table():
                raise KeyError(name)
            kind = _kind(name)
            fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool) == isinstance(value, bool)
            if not fits and not (name == "deny_hresult" and value is None):
                raise TypeError(f"{name}: {value!r} is no {kind.__name__}")
            setattr(self, name, value)

    def reset(self) -> None:
        """Put every switch back to its default."""
        for name, value in Switches().values().items():
            setattr(self, name, value)

    def values(self) -> Dict[str, Any]:
        """Return every switch as a mapping fit for JSON."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def _table() -> Dict[str, Field[Any]]:
    found: Dict[str, Field[Any]] = Switches.__dataclass_fields__
    return found


def _kind(name: str) -> type:
    return type(_table()[name].default)


def parse(name: str, text: str) -> Any:
    """Return a switch's value from what somebody typed; nothing is the default.

    Raises KeyError for a name that is no switch, ValueError with a sentence for a value that does not fit.
    """
    item = _table()[name]
    kind = _kind(name)
    value: Any = text
    if not text:
        return item.default
    if kind is bool:
        words = {"1": True, "true": True, "on": True, "yes": True, "0": False, "false": False, "off": False, "no": False}
        if text.lower() not in words:
            raise ValueError(f"{name}: on or off expected, not {text!r}")
        value = words[text.lower()]
    elif name == "deny_hresult" and text == "none":
        value = None
    elif kind in (int, float):
        try:
            value = int(text, 0) if kind is int else float(text)
        except ValueError:
            raise ValueError(f"{name}: {NUMBER} expected, not {text!r}") from None
    Switches().update({name: value})
    return value


@dataclass(frozen=True)
class Described:
    """What to tell people about a switch; `each` are choices with a meaning of their own."""

    name: str
    default: str
    choices: str
    meaning: str
    each: Mapping[str, str]


def described() -> Iterator[Tuple[str, List[Described]]]:
    """Yield the groups of switches, each below its heading."""
    heading = ""
    group: List[Described] = []
    for item in fields(Switches):
        if item.metadata["heading"] and group:
            yield heading, group
            group = []
        heading = item.metadata["heading"] or heading
        kind = _kind(item.name)
        each = {choice: meaning for choice, meaning in (item.metadata["each"] or {}).items() if choice}
        choices = " | ".join(choice or "(nothing)" for choice in item.metadata["choices"])
        choices = "" if each else choices or {bool: "on | off", str: TEXT}.get(kind, NUMBER)
        default = f"0x{item.default:08x}" if item.name.endswith("_hresult") else str(item.default)
        if kind is bool:
            default = "on" if item.default else "off"
        group.append(Described(item.name, default, choices, item.metadata["meaning"], each))
    yield heading, group
