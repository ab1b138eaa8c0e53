"""Negotiation with one mechanism on offer, Kerberos: the envelope of RFC 4178 around its tokens.

libgssapi's own would do as well, but libkrb5 1.18 loses the channel bindings there, and all versions hide Kerberos' error
numbers behind made-up ones. With one mechanism there is nothing to negotiate, and no mechListMIC (RFC 4178 section 5).
"""

from scx_enroll.der import OCTETS, OID, SEQUENCE, contents, encoded

KERBEROS = "1.2.840.113554.1.2.2"
_KERBEROS = bytes.fromhex("2a864886f712010202")
_SPNEGO = bytes.fromhex("2b0601050502")
_APPLICATION, _INIT, _RESPONSE = 0x60, 0xA0, 0xA1
_MECHANISMS, _TOKEN, _ANSWER = 0xA0, 0xA2, 0xA2  # mechTypes and mechToken of NegTokenInit, responseToken of NegTokenResp


def init(token: bytes) -> bytes:
    """Return the NegTokenInit that offers Kerberos, and holds its first token."""
    mechanisms = encoded(_MECHANISMS, encoded(SEQUENCE, encoded(OID, _KERBEROS)))
    body = encoded(SEQUENCE, mechanisms, encoded(_TOKEN, encoded(OCTETS, token)))
    return encoded(_APPLICATION, encoded(OID, _SPNEGO), encoded(_INIT, body))


def answer(data: bytes) -> bytes:
    """Return Kerberos' token in a NegTokenResp, or `data` itself where it has no such envelope; b"" where there is none."""
    try:
        ((tag, outer),) = contents(data)
        if tag != _RESPONSE:
            return data
        ((_, fields),) = contents(outer)
        ((_, token),) = contents(dict(contents(fields)).get(_ANSWER, encoded(OCTETS)))
    except ValueError:
        return b""
    return token
