"""Channel binding to a TLS server's certificate: `tls-server-end-point` of RFC 5929 section 4.1.

The digest is that of the certificate's own signature, with SHA-256 in place of MD5 and SHA-1. Signatures that name no digest
(Ed25519) are left open by the RFC: SHA-256, as MIT's, OpenLDAP's and curl's users of it have settled on. Which digest an RSA-PSS
signature has stands in its parameters; cryptography tells that from version 41 on only, so it is read here.
"""

import hashlib
from typing import Dict, Mapping

from scx_enroll.der import contents

PREFIX = b"tls-server-end-point:"

EXPLICIT_0 = 0xA0

# Contents of object identifiers, as in a signature's AlgorithmIdentifier.
_RSA = bytes.fromhex("2a864886f70d0101")  # 1.2.840.113549.1.1
_PSS = _RSA + b"\x0a"
_ECDSA = bytes.fromhex("2a8648ce3d0403")  # 1.2.840.10045.4.3
_SHA2 = bytes.fromhex("6086480165030402")  # 2.16.840.1.101.3.4.2
_DIGESTS: Mapping[bytes, str] = {
    _RSA + b"\x04": "sha256",  # with MD5
    _RSA + b"\x05": "sha256",  # with SHA-1
    _RSA + b"\x0b": "sha256",
    _RSA + b"\x0c": "sha384",
    _RSA + b"\x0d": "sha512",
    _RSA + b"\x0e": "sha224",
    bytes.fromhex("2a8648ce3d0401"): "sha256",  # ECDSA with SHA-1
    _ECDSA + b"\x01": "sha224",
    _ECDSA + b"\x02": "sha256",
    _ECDSA + b"\x03": "sha384",
    _ECDSA + b"\x04": "sha512",
    bytes.fromhex("2b6570"): "sha256",  # Ed25519
    bytes.fromhex("2b6571"): "sha256",  # Ed448
}
_PSS_DIGESTS: Mapping[bytes, str] = {
    bytes.fromhex("2b0e03021a"): "sha256",  # SHA-1
    _SHA2 + b"\x01": "sha256",
    _SHA2 + b"\x02": "sha384",
    _SHA2 + b"\x03": "sha512",
    _SHA2 + b"\x04": "sha224",
}


class Unbindable(Exception):
    """The certificate's signature is of a kind that no binding is defined for, or it is no certificate."""


def digest_of(certificate: bytes) -> str:
    """Return the name of the digest, as hashlib knows it, that binds a channel to this certificate (DER). Raises Unbindable."""
    try:
        ((_, whole),) = contents(certificate)
        _, (_, algorithm), _ = contents(whole)
        (_, oid), *parameters = contents(algorithm)
        if oid == _PSS:
            return _PSS_DIGESTS[_pss_digest(parameters[0][1] if parameters else b"")]
        return _DIGESTS[oid]
    except (ValueError, KeyError, IndexError):
        raise Unbindable from None


def end_point(certificate: bytes) -> bytes:
    """Return the application data of a channel binding to a server that showed this certificate (DER). Raises Unbindable."""
    return PREFIX + hashlib.new(digest_of(certificate), certificate).digest()


def named(certificate: bytes) -> str:
    """Return the name of the binding and of its digest, for a person; "" where none is defined for this certificate (DER)."""
    try:
        return f"tls-server-end-point, {digest_of(certificate)}"
    except Unbindable:
        return ""


def _pss_digest(parameters: bytes) -> bytes:
    """Return the object identifier of hashAlgorithm in RSASSA-PSS-params (RFC 4055 section 3.1), where it stands; else SHA-1's."""
    found: Dict[int, bytes] = dict(contents(parameters))
    if EXPLICIT_0 not in found:
        return bytes.fromhex("2b0e03021a")
    ((_, algorithm),) = contents(found[EXPLICIT_0])
    return next(contents(algorithm))[1]
