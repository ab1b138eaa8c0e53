"""The web server's certificates: a good one, one for each fault, one for each way to sign it; and those that clients sign in with."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .authority import DAY, YEAR, make_ca, moment, tlv, to_der, to_pem

_Key = Union[ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey, ed25519.Ed25519PrivateKey]
_Issuer = Tuple[Optional[x509.Certificate], _Key]

# RFC 5929, section 4: the words before a certificate's hash, and the hash where it isn't SHA-256
PREFIX = b"tls-server-end-point:"
DIGESTS: Mapping[str, str] = {
    "rsa-sha384": "sha384", "rsa-sha512": "sha512", "ecdsa-sha384": "sha384", "pss-sha384": "sha384", "pss-sha512": "sha512",
}  # fmt: skip
_HASHES: Mapping[str, hashes.HashAlgorithm] = {
    "sha1": hashes.SHA1(),
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
}
_FAULTS = ("", "unknown-ca", "self-signed", "wrong-name", "expired", "future")
# RFC 8017, appendix A.2: RSA with SHA-1 and SHA-256; the object identifiers of RSASSA-PSS, MGF1 and the hashes
_RSA_SHA1 = bytes.fromhex("300d06092a864886f70d0101050500")
_RSA_SHA256 = bytes.fromhex("300d06092a864886f70d01010b0500")
_PSS = bytes.fromhex("06092a864886f70d01010a")
_MGF1 = bytes.fromhex("06092a864886f70d010108")
_SHA2 = {name: bytes.fromhex(f"06096086480165030402{last:02x}") for name, last in (("sha256", 1), ("sha384", 2), ("sha512", 3))}


@dataclass(frozen=True)
class Shown:
    """A certificate that a server shows: its chain and key as PEM, and the channel bindings that it means."""

    chain: bytes
    secret: bytes
    bindings: bytes


class WebCertificates:
    """Certificates for `name`, `address`, and localhost with its addresses; made when they are first asked for.

    `directory` gets `trust`, the root of the good ones, which never changes.
    """

    def __init__(
        self, directory: Path, name: str, address: str = "127.0.0.1", *, root_name: str = "Lab Web Root", trust: str = "server-trust.pem"
    ) -> None:
        """Make the root, and write it."""
        self._now = time.time()
        self._names = [name, "localhost"]
        self._addresses = sorted({address, "127.0.0.1", "::1"})
        self._lock = threading.RLock()
        self._directory = directory
        self._shown: Dict[str, Shown] = {}
        self._contexts: Dict[Tuple[str, str, str], ssl.SSLContext] = {}
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._root_key = ec.generate_private_key(ec.SECP256R1())
        self._root = make_ca(root_name, self._root_key, self._now - YEAR, self._now + 10 * YEAR)
        (directory / trust).write_bytes(to_pem([to_der(self._root)]))

    def shown(self, switch: str) -> Shown:
        """Return the certificate of the switch `https`."""
        with self._lock:
            if switch not in self._shown:
                self._shown[switch] = self._make(switch)
            return self._shown[switch]

    def context(self, switch: str, ask: str = "", clients: str = "") -> ssl.SSLContext:
        """Return a TLS context; `ask`: as the switch `certificate`, or "" for no client's; `clients`: a file with the roots of those."""
        with self._lock:
            found = self._contexts.get((switch, ask, clients))
            if not found:
                found = self._contexts[switch, ask, clients] = self._context(switch, ask, clients)
            return found

    def _context(self, switch: str, ask: str, clients: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if switch == "rsa-sha1":
            context.set_ciphers("DEFAULT@SECLEVEL=0")
        if ask:
            context.load_verify_locations(clients)
            context.post_handshake_auth = ask == "later"
            context.verify_mode = ssl.CERT_REQUIRED if ask == "required" else ssl.CERT_OPTIONAL
        shown = self.shown(switch)
        path = self._directory / f".web-{switch}-{threading.get_ident()}.pem"
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(shown.chain + shown.secret)
        try:
            context.load_cert_chain(path)
        finally:
            path.unlink()
        return context

    def _make(self, switch: str) -> Shown:
        now = self._now
        names, addresses, span = self._names, self._addresses, (now - DAY, now + YEAR)
        issuer: _Issuer = (self._root, self._root_key)
        kind, _, digest = ("", "", "") if switch in _FAULTS else switch.partition("-")
        if switch == "unknown-ca":
            unknown_key = ec.generate_private_key(ec.SECP256R1())
            issuer = (make_ca("Unknown Web Root", unknown_key, now - YEAR, now + 10 * YEAR), unknown_key)
        if switch == "self-signed":
            issuer = (None, self._key)
        if switch == "wrong-name":
            names, addresses = ["elsewhere.lab.test"], []
        if switch in ("expired", "future"):
            span = (now - YEAR / 2, now - DAY) if switch == "expired" else (now + DAY, now + YEAR)
        chain = b""
        if kind:
            middle_key = _new_key(kind)
            middle = make_ca(f"Lab Web CA {switch}", middle_key, now - YEAR, now + 9 * YEAR, self._root, self._root_key)
            issuer, chain = (middle, middle_key), to_pem([to_der(middle)])
        by_hand = kind == "pss" or digest == "sha1"
        algorithm = None if kind == "ed25519" else _HASHES["sha256" if by_hand else digest or "sha256"]
        made = _leaf(names[0], _alternatives(names, addresses), self._key, span, issuer, ExtendedKeyUsageOID.SERVER_AUTH, algorithm)
        der = to_der(made)
        if by_hand and isinstance(issuer[1], rsa.RSAPrivateKey):
            der = _by_hand(made, issuer[1], kind, digest)
        bindings = PREFIX + hashlib.new(DIGESTS.get(switch, "sha256"), der).digest()
        return Shown(to_pem([der]) + chain, _secret(self._key), bindings)


class ClientCA:
    """A CA for certificates that clients sign in with; its root is in `directory`, as client-ca.pem, whose path is `trust`."""

    def __init__(self, directory: Path) -> None:
        """Make the root, and write it."""
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._root = make_ca("Lab Client Root", self._key, time.time() - YEAR, time.time() + 10 * YEAR)
        self.trust = str(directory / "client-ca.pem")
        Path(self.trust).write_bytes(to_pem([to_der(self._root)]))

    def issue(self, name: str, *, begins: float = -DAY, ends: float = YEAR, server: bool = False) -> Tuple[str, str]:
        """Return the paths of a certificate for `name` and of its key, mode 0600; times are seconds from now.

        `server`: it is for servers, and no client may use it.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        span = (time.time() + begins, time.time() + ends)
        made = _leaf(name, _alternatives([name], []), key, span, (self._root, self._key), usage, hashes.SHA256())
        paths = str(self._directory / f"client-{name}.pem"), str(self._directory / f"client-{name}.key")
        Path(paths[0]).write_bytes(to_pem([to_der(made)]))
        with open(os.open(paths[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(_secret(key))
        return paths


def _new_key(kind: str) -> _Key:
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(ec.SECP256R1()) if kind == "ecdsa" else rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _secret(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _alternatives(names: Sequence[str], addresses: Sequence[str]) -> List[x509.GeneralName]:
    found: List[x509.GeneralName] = [x509.DNSName(name) for name in names]
    return found + [x509.IPAddress(ipaddress.ip_address(text)) for text in addresses]


def _leaf(
    name: str,
    alternatives: Sequence[x509.GeneralName],
    key: ec.EllipticCurvePrivateKey,
    span: Tuple[float, float],
    issuer: _Issuer,
    usage: x509.ObjectIdentifier,
    algorithm: Optional[hashes.HashAlgorithm],
) -> x509.Certificate:
    certificate, issuer_key = issuer
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(certificate.subject if certificate else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment(span[0]))
        .not_valid_after(moment(span[1]))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    signing: Any = algorithm  # of a kind that the library knows
    return builder.sign(issuer_key, signing)


def _by_hand(certificate: x509.Certificate, key: rsa.RSAPrivateKey, kind: str, digest: str) -> bytes:
    """Return it signed once more: RSASSA-PSS, which libraries before 2023 can not, or with SHA-1, which those after 2024 will not."""
    algorithm = _HASHES[digest]
    identifier = _RSA_SHA1
    filled: Union[padding.PSS, padding.PKCS1v15] = padding.PKCS1v15()
    if kind == "pss":
        hashed = tlv(0x30, _SHA2[digest], b"\x05\x00")
        size = algorithm.digest_size
        parameters = tlv(0x30, tlv(0xA0, hashed), tlv(0xA1, tlv(0x30, _MGF1, hashed)), tlv(0xA2, bytes([2, 1, size])))
        identifier, filled = tlv(0x30, _PSS, parameters), padding.PSS(padding.MGF1(algorithm), size)
    signed = certificate.tbs_certificate_bytes
    inner = signed[2 + (signed[1] & 0x7F if signed[1] & 0x80 else 0) :].replace(_RSA_SHA256, identifier, 1)
    fresh = tlv(0x30, inner)
    return tlv(0x30, fresh, identifier, tlv(0x03, b"\x00", key.sign(fresh, filled, algorithm)))
