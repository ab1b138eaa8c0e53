"""The pair that an agent makes for itself, and the program that makes it (scxsslconfig).

Copied into the host tree and run there, hence no relative imports; needs cryptography.
"""

from __future__ import annotations

import datetime as dt
import os
import sys
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = Union[rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey]


def make_key(kind: str) -> Key:
    """Return a new key: "rsa:2048", "rsa:3072", "ec:secp256r1", "ec:secp384r1", "ec:secp521r1". Raises ValueError for others."""
    family, _, size = kind.partition(":")
    curves: Dict[str, ec.EllipticCurve] = {
        "secp256r1": ec.SECP256R1(),
        "secp384r1": ec.SECP384R1(),
        "secp521r1": ec.SECP521R1(),
    }
    if family == "rsa" and size.isdigit():
        return rsa.generate_private_key(65537, int(size))
    if family == "ec" and size in curves:
        return ec.generate_private_key(curves[size])
    raise ValueError(kind)


def key_pem(key: Key) -> bytes:
    """Return a key as unencrypted PKCS#8, PEM."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def agent_name(host: str, domain: str) -> x509.Name:
    """Return the subject of an agent's own certificate: DC per label, CN=short, CN=fqdn (section 7 of the agent's facts)."""
    short = host.lower()
    parts = [x509.NameAttribute(NameOID.DOMAIN_COMPONENT, label) for label in reversed(domain.split("."))] if domain else []
    fqdn = f"{short}.{domain.lower()}" if domain else short
    return x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, short), x509.NameAttribute(NameOID.COMMON_NAME, fqdn)])


def make_certificate(key: Key, host: str, domain: str) -> bytes:
    """Return the agent's self-signed certificate, PEM: version field v1 although it has extensions, serial 1, no SAN."""
    name = agent_name(host, domain)
    now = dt.datetime.now(dt.timezone.utc).replace(microsecond=0)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=365))
        .not_valid_after(now + dt.timedelta(days=7300))
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    der = as_v1(certificate.public_bytes(serialization.Encoding.DER), certificate.tbs_certificate_bytes, key)
    return armour(der)


def as_v1(der: bytes, signed: bytes, key: Key) -> bytes:
    """Return a certificate without its version field, signed anew: the DER of v1, the default."""
    version = b"\xa0\x03\x02\x01\x02"
    body = _content(signed)
    if not body.startswith(version):
        return der
    signed = _sequence(body[len(version) :])
    if isinstance(key, rsa.RSAPrivateKey):
        signature = key.sign(signed, padding.PKCS1v15(), hashes.SHA256())
    else:
        signature = key.sign(signed, ec.ECDSA(hashes.SHA256()))
    algorithm = body[len(version) :]
    algorithm = algorithm[_size(algorithm) :]  # behind the serial number
    algorithm = algorithm[: _size(algorithm)]
    bits = b"\x00" + signature
    return _sequence(signed + algorithm + b"\x03" + _length(len(bits)) + bits)


def armour(der: bytes) -> bytes:
    """Return one PEM block, LF."""
    import base64

    text = base64.b64encode(der)
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return b"\n".join([b"-----BEGIN CERTIFICATE-----", *lines, b"-----END CERTIFICATE-----", b""])


def _length(size: int) -> bytes:
    if size < 0x80:
        return bytes([size])
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([0x80 | len(octets)]) + octets


def _sequence(body: bytes) -> bytes:
    return b"\x30" + _length(len(body)) + body


def _head(der: bytes) -> Tuple[int, int]:
    """Return the sizes of an element's head and of its content."""
    if der[1] < 0x80:
        return 2, der[1]
    count = der[1] & 0x7F
    return 2 + count, int.from_bytes(der[2 : 2 + count], "big")


def _content(der: bytes) -> bytes:
    head, size = _head(der)
    return der[head : head + size]


def _size(der: bytes) -> int:
    return sum(_head(der))


def _step(_done: str) -> None:
    pass


def scxsslconfig(root: str, arguments: List[str], between: Callable[[str], None] = _step) -> int:
    """Run `scxsslconfig [-f] [-g DIR] [-h HOST] [-d DOMAIN] [-b BITS] [-v]` (section 6): nothing is made over an existing key.

    With -f the key is written in place, through a link where there is one, and the link to the certificate is made anew.
    `between` is told of each step that is done.
    """
    import importlib
    import json

    standin: Any = importlib.import_module(f"{__package__}.standin" if __package__ else "standin")  # or its copy in the tree

    with open(root + "/lab/knobs.json", encoding="utf-8") as file:
        knobs = json.load(file)
    standin.note(root, "scxsslconfig", arguments)
    place = standin.PLACES[knobs["layout"]]
    folder = ""
    host, domain, kind, force = knobs["host"], knobs["domain"], knobs["new_key"], False
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if option == "-f":
            force = True
        elif option in ("-g", "-h", "-d", "-b", "-s", "-e") and rest:
            value = rest.pop(0)
            folder = value if option == "-g" else folder
            host = value if option == "-h" else host
            domain = value if option == "-d" else domain
            kind = f"rsa:{value}" if option == "-b" else kind
        elif option not in ("-v", "-c"):
            print(f"scxsslconfig: unknown option {option}", file=sys.stderr)
            return 1
    if knobs.get("sslconfig_fails"):
        print("scxsslconfig: unable to generate the certificate", file=sys.stderr)
        return 3
    account = knobs.get("account") if standin.UNITS[place.layout] == "omid" else None
    certificate, key = place.certificate, place.key
    if folder:
        certificate, key = (f"{folder}/{path.rpartition('/')[2]}" for path in (certificate, key))
    key_real = standin.host_path(root, key)
    if os.path.exists(key_real) and not force:
        print("Certificate not generated - '-f' option not specified")
        _own(key_real, account)
        return 0
    if not os.path.isdir(os.path.dirname(key_real)):  # purged
        print(f"scxsslconfig: unable to write {key}", file=sys.stderr)
        return 3
    made = make_key(kind)
    _write(key_real, key_pem(made), 0o400)
    between("the key is written")
    _own(key_real, account)
    between("the key has its owner")
    kept = f"{certificate.rpartition('/')[0]}/{certificate.rpartition('/')[2][:-4]}-host-{host}.pem"
    _write(standin.host_path(root, kept), make_certificate(made, host, domain), 0o444)
    between("the host pem is written")
    name = root + certificate
    if os.path.lexists(name):
        os.unlink(name)
        between("the certificate's name is removed")
    os.symlink(kept, name)
    between("the certificate's name is a link")
    print('Generated certificate with hostname="{}", domainname="{}"'.format(host, domain))  # noqa: UP032 - many quotes
    return 0


def _write(path: str, data: bytes, mode: int) -> None:
    """Write in place, as the real program does: no temporary file."""
    if os.path.exists(path):
        os.chmod(path, 0o600)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
    os.chmod(path, mode)


def _own(path: str, account: Optional[List[int]]) -> None:
    if account and os.geteuid() == 0:
        os.chown(path, account[0], account[1])
