"""The web server's certificates: one that is good, and one for each fault."""

from __future__ import annotations

import ipaddress
import os
import ssl
import time
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .authority import DAY, YEAR, make_ca, moment, to_der, to_pem

_Issuer = Tuple[Optional[x509.Certificate], ec.EllipticCurvePrivateKey]


def contexts(directory: Path, name: str, address: str = "127.0.0.1") -> Dict[str, ssl.SSLContext]:
    """Write server-trust.pem and return TLS contexts: the good one under "", the bad ones under the names of the switch.

    The good one is for `name`, `address`, and localhost with its addresses.
    """
    now = time.time()
    key, root_key, unknown_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    root = make_ca("Lab Web Root", root_key, now - YEAR, now + 10 * YEAR)
    unknown = make_ca("Unknown Web Root", unknown_key, now - YEAR, now + 10 * YEAR)
    (directory / "server-trust.pem").write_bytes(to_pem([to_der(root)]))
    names, span = [name, "localhost"], (now - DAY, now + YEAR)
    good: _Issuer = (root, root_key)
    leaves: Dict[str, Tuple[Sequence[str], Tuple[float, float], _Issuer]] = {
        "": (names, span, good),
        "unknown-ca": (names, span, (unknown, unknown_key)),
        "self-signed": (names, span, (None, key)),
        "wrong-name": (["elsewhere.lab.test"], span, good),
        "expired": (names, (now - YEAR / 2, now - DAY), good),
        "future": (names, (now + DAY, now + YEAR), good),
    }
    found = {}
    for switch, (dns, times, issuer) in leaves.items():
        addresses = () if switch == "wrong-name" else sorted({address, "127.0.0.1", "::1"})
        leaf = _leaf(dns, key, times, issuer, addresses)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        path = directory / f".web{'-' + switch if switch else ''}.pem"
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(leaf + secret)
        context.load_cert_chain(path)
        path.unlink()
        found[switch] = context
    return found


def _leaf(
    names: Sequence[str],
    key: ec.EllipticCurvePrivateKey,
    span: Tuple[float, float],
    issuer: _Issuer,
    addresses: Sequence[str],
) -> bytes:
    certificate, issuer_key = issuer
    alternatives: List[x509.GeneralName] = [x509.DNSName(name) for name in names]
    alternatives += [x509.IPAddress(ipaddress.ip_address(text)) for text in addresses]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    leaf = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(certificate.subject if certificate else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment(span[0]))
        .not_valid_after(moment(span[1]))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    return leaf.public_bytes(serialization.Encoding.PEM)
