"""Reads WWW-Authenticate: what a server offers to sign in by, and the token that comes with it (RFC 9110 section 11)."""

import base64
import re
from typing import Tuple

MAX_SCHEMES = 6  # in a message; IIS knows five

# Linear, whatever a server sends: a quote that is never closed reaches to the end.
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)', re.DOTALL)
_CHALLENGE = re.compile(r"([A-Za-z][A-Za-z0-9:._-]{0,31})(?:\s+(?!=)(\S.*))?", re.DOTALL)  # a scheme, and its token or first parameter
_TOKEN68 = re.compile("[A-Za-z0-9+/]+=*")
# IANA's registry of schemes, and Microsoft's.
_KNOWN = (
    "basic", "bearer", "concealed", "digest", "dpop", "gnap", "hoba", "kerberos", "mutual", "negotiate", "negotiate:kerberos", "ntlm",
    "oauth", "privatetoken", "scram-sha-1", "scram-sha-256", "vapid",
)  # fmt: skip


def schemes(header: str) -> Tuple[str, ...]:
    """Return the schemes that are offered, each once, in the server's order; of several headers the values are joined by commas.

    What is no scheme that is known is "another": a server may put there what we sent it.
    """
    return tuple(dict.fromkeys(scheme if scheme.lower() in _KNOWN else "another" for scheme, _ in _challenges(header)))[:MAX_SCHEMES]


def offers(header: str, wanted: str) -> bool:
    """Say whether this scheme is offered; case does not count."""
    return wanted.lower() in (scheme.lower() for scheme, _ in _challenges(header))


def token(header: str, wanted: str) -> bytes:
    """Return what the server sends for this scheme, b"" for nothing that can be read."""
    for scheme, text in _challenges(header):
        if scheme.lower() == wanted.lower() and _TOKEN68.fullmatch(text):
            try:
                return base64.b64decode(text)
            except ValueError:
                return b""
    return b""


def _challenges(header: str) -> Tuple[Tuple[str, str], ...]:
    """Return each scheme with its token or first parameter; further parameters are no schemes, and left out."""
    found = filter(None, (_CHALLENGE.fullmatch(part.strip()) for part in _QUOTED.sub('""', header).split(",")))
    return tuple((one[1], one[2] or "") for one in found)
