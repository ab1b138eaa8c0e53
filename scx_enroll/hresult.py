"""The error codes of AD CS: what each means, what to do about it, whether trying again can help.

Codes are unsigned 32-bit HRESULTs ([MS-ERREF] 2.1). Sources: [MS-ERREF] for the texts, facts/adcs.md section 6
for the classes. The words are ours: a server's own follow its language.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Mapping, NamedTuple


class Meaning(NamedTuple):
    """A sentence, what the operator can do, and the retry class.

    `retry` is "transient" (nothing was issued, the same request may be sent again), "configuration" (stop until
    something changes), "final" (for this request ID) or "ambiguous" (the request may have been stored).
    """

    sentence: str
    hint: str
    retry: str


_STARTED = "see on the CA that Active Directory Certificate Services runs, and that RPC passes the firewalls"
_CRL = "publish the CRL of the CA and of its parents, and see that the CA reaches their distribution points"
_PUBLISHED = (
    "publish the template on that CA, or set template= in /etc/scx-enroll/scx-enroll.conf to its name "
    "(the cn, not the display name); after a change wait for the directory to replicate"
)
_ENROLL = "grant the account that signs in Read and Enroll on the template, and see that it is the account you expect"
_AGENT_SIGNATURE = "set the template to require no authorized signatures: an unattended host can't give them"
_ACCOUNT = (
    'fill in that attribute of the account that signs in, or let the template take the names from the request ("Supply in the request")'
)
_PARSE = "see whether a proxy changes what is sent; otherwise report it as a defect, with the type of the agent's key"
_ROW = "see on the CA whether the request still exists, and that it is the CA which the request was sent to"

TABLE: Mapping[int, Meaning] = MappingProxyType(
    {
        # the CA was not reached, or is not well; nothing was stored
        0x800706BA: Meaning("the web server can't reach the CA service", _STARTED, "transient"),
        0x800706BF: Meaning("the call to the CA service was not executed", _STARTED, "transient"),
        0x80080005: Meaning("the CA service does not start", "restart CertSvc on the CA: it hangs", "transient"),
        0x80092013: Meaning("the CA can't check revocation: a CRL is offline", _CRL, "transient"),
        0x80092012: Meaning("the CA can't check revocation: no CRL to check", _CRL, "transient"),
        0x80094006: Meaning("the CA's database is being restored", "wait until the restore is over", "transient"),
        0x8009400F: Meaning("the CA has too many database sessions", "wait, or raise DBSessionCount", "transient"),
        0x80090020: Meaning("the CA failed to sign", "look at the CA's key or HSM", "transient"),
        # the call broke half-way
        0x800706BE: Meaning(
            "the call to the CA service broke off",
            "look on the CA whether the request was stored (requester, time)",
            "ambiguous",
        ),
        # about one request ID
        0x80094002: Meaning("the CA has no such request", _ROW, "final"),
        0x80094003: Meaning("the status of the request does not allow it", _ROW, "final"),
        0x80094004: Meaning("the CA has no such request, or nothing in it", _ROW, "final"),
        0x80094014: Meaning("a certificate manager denied the request", "ask the people who run the CA why", "final"),
        # permissions
        0x80094011: Meaning(
            "the account may not request certificates from this CA",
            "grant the account that signs in Request Certificates on the CA (Security)",
            "configuration",
        ),
        0x80094012: Meaning("the account may not enroll for the template", _ENROLL, "configuration"),
        0x80070005: Meaning(
            "the CA denied access",
            "see DCOM access on the CA; web enrollment on another host than the CA needs delegation",
            "configuration",
        ),
        # templates
        0x80094800: Meaning("the template is unknown to the CA or not published on it", _PUBLISHED, "configuration"),
        0x80094801: Meaning("the request names no template", _PUBLISHED, "configuration"),
        0x80094802: Meaning("the template conflicts with the one in the request", _PUBLISHED, "configuration"),
        0x80094807: Meaning(
            "the template is newer than the CA supports",
            "lower the compatibility of the template, or use a newer CA",
            "configuration",
        ),
        0x80094809: Meaning("the template wants a signature of an enrollment agent", _AGENT_SIGNATURE, "configuration"),
        0x8009480A: Meaning("the template wants another application policy", _AGENT_SIGNATURE, "configuration"),
        0x8009480B: Meaning("the template wants another issuance policy", _AGENT_SIGNATURE, "configuration"),
        # names
        0x80094001: Meaning("the subject is invalid or too long", "see name= in /etc/scx-enroll/scx-enroll.conf", "configuration"),
        0x80094803: Meaning(
            "the template wants a subject alternative name",
            'let the template take the names from the request ("Supply in the request")',
            "configuration",
        ),
        0x8009480D: Meaning("the directory has no UPN for the account", _ACCOUNT, "configuration"),
        0x8009480E: Meaning("the directory has no GUID for the account", _ACCOUNT, "configuration"),
        0x8009480F: Meaning("the directory has no DNS name for the account", _ACCOUNT, "configuration"),
        0x80094812: Meaning("the directory has no e-mail address for the account", _ACCOUNT, "configuration"),
        # keys
        0x80094016: Meaning(
            "the key or the signature of the request is too weak for the CA",
            "see the agent's key and the cryptography settings of the template",
            "configuration",
        ),
        0x80094811: Meaning(
            "the key is shorter than the template allows",
            "lower the minimum key size of the template, or give the agent a longer key",
            "configuration",
        ),
        # the request itself
        0x8009310B: Meaning("the CA can't parse the request: bad ASN.1 tag", _PARSE, "configuration"),
        0x80093102: Meaning("the CA can't parse the request: it ends too early", _PARSE, "configuration"),
        0x80093005: Meaning("the CA can't parse the request: OSS error", _PARSE, "configuration"),
        0x80070057: Meaning("the CA got a bad parameter", _PARSE, "configuration"),
        # the CA's own certificate
        0x800B0101: Meaning("the CA's certificate is not within its dates", "renew the CA, and see its clock", "configuration"),
        0x800B010A: Meaning("the CA can't build its own chain", "install the CA's root and intermediates on the CA", "configuration"),
        0x800B0114: Meaning(
            "a name constraint of the CA forbids the name",
            "see the name constraints of the CA's certificates; use a name which they allow",
            "configuration",
        ),
    }
)


def meaning(code: int) -> Meaning:
    """Say what `code` means, the code itself quoted in the sentence; an unknown one is "configuration"."""
    quoted = f"0x{code & 0xFFFFFFFF:08x}"
    known = TABLE.get(code & 0xFFFFFFFF) or Meaning(
        "the CA gave an error that is not known here",
        f"ask `certutil -error {quoted}` on a Windows host, and look at the request on the CA",
        "configuration",
    )
    return known._replace(sentence=f"{known.sentence} ({quoted})")
