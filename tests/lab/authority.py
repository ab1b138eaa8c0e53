"""A certification authority in memory, with AD CS's habits and a list of ways to misbehave.

It issues real certificates with EC keys, keeps a table of requests, and knows no HTTP: `server` puts the web pages before it.
"""

from __future__ import annotations

import datetime as dt
import itertools
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from . import messages
from .switches import FAULTS, Switches

__all__ = [
    "DAY", "WRONG", "YEAR", "Authority", "Generation", "Row", "Switches", "Template", "make_ca", "moment", "pkcs7", "to_der", "to_pem",
]  # fmt: skip

DAY = 86400.0
YEAR = 365 * DAY

NO_SUCH_REQUEST = 0x80094004  # CERTSRV_E_PROPERTY_EMPTY, what an unknown or deleted id gets
DENIED_BY_MANAGER = 0x80094014  # CERTSRV_E_ADMIN_DENIED_REQUEST
UNSUPPORTED_TEMPLATE = 0x80094800  # CERTSRV_E_UNSUPPORTED_CERT_TYPE
NO_REQUEST_RIGHT = 0x80094011  # CERTSRV_E_ENROLL_DENIED
NO_ENROLL_RIGHT = 0x80094012  # CERTSRV_E_TEMPLATE_DENIED
SIGNATURES_MISSING = 0x80094809  # CERTSRV_E_SIGNATURE_COUNT
KEY_TOO_SHORT = 0x80094811  # CERTSRV_E_KEY_LENGTH
NOT_PARSED = 0x8009310B  # CRYPT_E_ASN1_BADTAG
CA_EXPIRED = 0x800B0101  # CERT_E_EXPIRED
ATTRIBUTES = {"upn": 0x8009480D, "guid": 0x8009480E, "dns": 0x8009480F, "mail": 0x80094812}  # what an account may lack

ANONYMOUS = "NT AUTHORITY\\IUSR"  # whoever comes where IIS asks nobody
MANAGER = "LAB\\manager"

WRONG = tuple(FAULTS)


@dataclass
class Template:
    """A template as published on the CA; `name` is its cn.

    `names` is "request" (supplied in the request) or "directory" (those of the account that asks, plus its SID); `enroll` tells
    whether the account has the right to; `directory_attribute` is one of `ATTRIBUTES` that the account lacks and the template wants.
    """

    name: str
    published: bool = True
    needs_approval: bool = False
    lifetime: Optional[float] = None  # seconds; None: the CA's
    names: str = "request"
    enroll: bool = True
    minimum_rsa_bits: int = 0
    agent_signatures: int = 0
    directory_attribute: str = ""


@dataclass
class Row:
    """A line of the request table. `state` is issued, pending, denied, revoked or failed."""

    id: int
    state: str
    csr: bytes
    template: str
    attributes: Dict[str, str]
    requester: str
    at: float
    hresult: int = 0
    words: str = "taken"  # which disposition message, as `messages.words` knows them
    message: str = ""  # the text beside the HRESULT
    language: str = "en"  # the CA's when it decided
    certificate: Optional[bytes] = None  # DER
    generation: int = 0  # index of the CA certificate it was issued under


@dataclass
class Generation:
    """One certificate of the CA; `index` counts renewals, `key_index` is the index at which its key was made."""

    index: int
    key_index: int
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    above: Tuple[x509.Certificate, ...]  # up to the root; none where it is the root itself

    @property
    def der(self) -> bytes:
        """The certificate, DER."""
        return to_der(self.certificate)


@dataclass
class _Anchor:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    key_index: int = 0
    cross: List[x509.Certificate] = field(default_factory=list)


def to_der(certificate: x509.Certificate) -> bytes:
    """Return a certificate's DER."""
    return certificate.public_bytes(serialization.Encoding.DER)


def to_pem(ders: Sequence[bytes]) -> bytes:
    """Return certificates, given as DER, as PEM blocks one after the other, LF."""
    loaded = (x509.load_der_x509_certificate(der) for der in ders)
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in loaded)


def not_before(certificate: x509.Certificate) -> float:
    """Return a certificate's NotBefore in seconds since the epoch, with any version of cryptography."""
    return _seconds(certificate, "not_valid_before")


def not_after(certificate: x509.Certificate) -> float:
    """Return a certificate's NotAfter in seconds since the epoch, with any version of cryptography."""
    return _seconds(certificate, "not_valid_after")


def _seconds(certificate: x509.Certificate, name: str) -> float:
    aware: Optional[dt.datetime] = getattr(certificate, name + "_utc", None)
    if aware is None:
        naive: dt.datetime = getattr(certificate, name)
        aware = naive.replace(tzinfo=dt.timezone.utc)
    return aware.timestamp()


def moment(seconds: float) -> dt.datetime:
    """Return a time as certificates hold it: whole seconds, UTC."""
    return dt.datetime.fromtimestamp(int(seconds), dt.timezone.utc)


def tlv(tag: int, *parts: bytes) -> bytes:
    """Return one DER element: tag, length, the parts joined."""
    body = b"".join(parts)
    size = len(body)
    if size < 0x80:
        return bytes([tag, size]) + body
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + body


def pkcs7(ders: Sequence[bytes]) -> bytes:
    """Return a certs-only PKCS#7 bag, DER, in the order given (RFC 2315 signedData without signers)."""
    signed_data = bytes.fromhex("06092a864886f70d010702")
    data = bytes.fromhex("06092a864886f70d010701")
    inner = tlv(0x30, tlv(0x02, b"\x01"), tlv(0x31), tlv(0x30, data), tlv(0xA0, *ders), tlv(0x31))
    return tlv(0x30, signed_data, tlv(0xA0, inner))


def _common_name(name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.DOMAIN_COMPONENT, "test"),
            x509.NameAttribute(NameOID.DOMAIN_COMPONENT, "lab"),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _ca_version(index: int, key_index: int) -> x509.UnrecognizedExtension:
    number = key_index << 16 | index
    value = tlv(0x02, number.to_bytes(number.bit_length() // 8 + 1, "big"))
    return x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.4.1.311.21.1"), value)


def _template_extension() -> x509.UnrecognizedExtension:
    oid = bytes.fromhex("060c2b0601040182371508011e63")  # an id under 1.3.6.1.4.1.311.21.8, Microsoft's arc for templates
    value = tlv(0x30, oid, tlv(0x02, b"\x64"), tlv(0x02, b"\x05"))
    return x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.4.1.311.21.7"), value)


def _security_identifier(account: str) -> x509.UnrecognizedExtension:
    """Return the extension of KB5014754, a name of the account's SID; the SID is made up from the account's name."""
    relative = 1000 + int.from_bytes(account.lower().encode(), "big") % 100_000
    sid = f"S-1-5-21-1004336348-1177238915-682003330-{relative}".encode()
    oid = bytes.fromhex("060a2b060104018237190201")  # 1.3.6.1.4.1.311.25.2.1
    value = tlv(0x30, tlv(0xA0, oid, tlv(0xA0, tlv(0x04, sid))))
    return x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.4.1.311.25.2"), value)


def _application_policies() -> x509.UnrecognizedExtension:
    server_auth = bytes.fromhex("06082b06010505070301")
    return x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.4.1.311.21.10"), tlv(0x30, tlv(0x30, server_auth)))


def common_name(der: bytes) -> str:
    """Return the CN of a certificate's subject, "" where it has none."""
    found = x509.load_der_x509_certificate(der).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def make_ca(
    name: str,
    key: Union[ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey, ed25519.Ed25519PrivateKey],
    start: float,
    end: float,
    issuer: Optional[x509.Certificate] = None,
    issuer_key: Optional[ec.EllipticCurvePrivateKey] = None,
    version: Tuple[int, int] = (0, 0),
    path_length: Optional[int] = None,
    identifiers: bool = True,
) -> x509.Certificate:
    """Return a CA certificate that strict path validation accepts, with `identifiers` (SKI, AKI); self-signed without an issuer."""
    subject = _common_name(name)
    signer = issuer_key or key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment(start))
        .not_valid_after(moment(end))
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(_ca_version(*version), critical=False)
    )
    if identifiers:
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    if issuer and identifiers:
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    return builder.sign(signer, hashes.SHA256())


def _usage(*, ca: bool, encipherment: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=encipherment,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


class Authority:
    """A root, CAs below it, the last of which issues; its templates and its request table.

    `clock` gives the CA's time in seconds since the epoch and may be replaced at any time. `lifetime` of leaves is a number of
    seconds or a timedelta. NotBefore is ten minutes back and NotAfter never beyond the CA's own certificate, as on AD CS
    (facts 7). Request ids are sequential and consumed by denials too (facts 2.1). `request_right` tells whether accounts may
    request from this CA at all; `domain` is where accounts live. Safe for use from several threads.
    """

    def __init__(
        self,
        name: str = "Lab Issuing CA",
        *,
        clock: Callable[[], float] = time.time,
        lifetime: Union[float, dt.timedelta] = 2 * YEAR,
        first_id: int = 1,
        ca_lifetime: float = 5 * YEAR,
        root_lifetime: float = 20 * YEAR,
        tiers: int = 2,
        aki: bool = True,
        switches: Optional[Switches] = None,
    ) -> None:
        """Make the keys and certificates of 1 to 3 `tiers`: a root, a policy CA, the issuing CA; without `aki` no SKI or AKI."""
        if tiers not in (1, 2, 3):
            raise ValueError(f"tiers: {tiers} is none of 1, 2, 3")
        self.name = name
        self.clock = clock
        self.lifetime: Union[float, dt.timedelta] = lifetime
        self.ca_lifetime = ca_lifetime
        self.root_lifetime = root_lifetime
        self.tiers = tiers
        self.aki = aki
        self.request_right = True
        self.domain = "lab.test"
        self.switches = switches or Switches()
        self.templates: Dict[str, Template] = {"SCXAgent": Template("SCXAgent")}
        self.crl_urls: List[str] = ["ldap:///CN=Lab,CN=CDP,DC=lab,DC=test", "http://pki.lab.test/LabCA{suffix}.crl"]
        self.aia_urls: List[str] = ["ldap:///CN=Lab,CN=AIA,DC=lab,DC=test", "http://pki.lab.test/LabCA{suffix}.crt"]
        self.posts = 0
        self._lock = threading.RLock()
        self._stranger: Dict[str, Generation] = {}
        self._install(first_id)

    def _install(self, first_id: int) -> None:
        self.rows: Dict[int, Row] = {}
        self._ids = itertools.count(first_id)
        self._roots: List[_Anchor] = []
        self._policies: List[_Anchor] = []
        self.generations: List[Generation] = []
        self.renew_root()

    def rebuild(self) -> None:
        """Install the CA anew under the same name: new keys, no requests, ids from 1 again. `posts` goes on counting."""
        with self._lock:
            self._install(1)

    # the CA's own certificates

    def renew_root(self, *, new_key: bool = True) -> None:
        """Renew the root, by default with a new key and cross certificates old/new, and then all below it."""
        with self._lock:
            anchor = self._root(new_key=new_key)
            self._roots.append(anchor)
            if self.tiers == 1:
                self._append(anchor.key, anchor.certificate, (), new_key=new_key)
                return
            if self.tiers == 3:
                self._policies.append(self._policy(anchor))
            self.renew(new_key=True)

    def _root(self, *, new_key: bool) -> _Anchor:
        now = self.clock()
        old = self._roots[-1] if self._roots else None
        index = len(self._roots)
        key_index = old.key_index if old and not new_key else index
        key = old.key if old and not new_key else _new_key()
        name = self.name + " Root" if self.tiers > 1 else self.name
        lifetime = self.root_lifetime if self.tiers > 1 else min(self.root_lifetime, self.ca_lifetime)
        version = (index, key_index)
        certificate = make_ca(name, key, now - YEAR, now + lifetime, version=version, identifiers=self.aki)
        cross = []
        if old and new_key:
            end = min(not_after(old.certificate), not_after(certificate))
            cross = [
                make_ca(name, key, now - DAY, end, old.certificate, old.key, version=version, identifiers=self.aki),
                make_ca(name, old.key, now - DAY, end, certificate, key, version=version, identifiers=self.aki),
            ]
        return _Anchor(key, certificate, key_index, cross)

    def _policy(self, root: _Anchor) -> _Anchor:
        now = self.clock()
        index = len(self._policies)
        key = _new_key()
        end = min(now + self.root_lifetime / 2, not_after(root.certificate))
        certificate = make_ca(
            self.name + " Policy", key, now - YEAR * 3 / 4, end, root.certificate, root.key,
            version=(index, index), path_length=1, identifiers=self.aki,
        )  # fmt: skip
        return _Anchor(key, certificate, index)

    def renew(self, *, new_key: bool = False) -> None:
        """Renew the issuing CA's certificate: its index grows by one; a new key sets the key index to it (facts 10)."""
        with self._lock:
            if self.tiers == 1:
                self.renew_root(new_key=new_key)
                return
            now = self.clock()
            key = _new_key() if new_key or not self.generations else self.newest.key
            self._append(key, *self._issuing(key, now - YEAR / 2, now + self.ca_lifetime, new_key=new_key), new_key=new_key)

    def expire(self) -> None:
        """Let the issuing CA's newest certificate be one that ended yesterday, with key and index as before."""
        with self._lock:
            newest, now = self.newest, self.clock()
            if self.tiers == 1:
                version = (newest.index, newest.key_index)
                certificate = make_ca(
                    self.name, newest.key, now - YEAR, now - DAY, version=version, identifiers=self.aki
                )
                self._roots[-1].certificate = newest.certificate = certificate
                return
            self.generations.pop()
            key_kept = bool(self.generations) and newest.key_index != newest.index
            certificate, above = self._issuing(newest.key, now - YEAR / 2, now - DAY, new_key=not key_kept)
            self._append(newest.key, certificate, above, new_key=not key_kept)

    def _issuing(
        self, key: ec.EllipticCurvePrivateKey, start: float, end: float, *, new_key: bool
    ) -> Tuple[x509.Certificate, Tuple[x509.Certificate, ...]]:
        superior = self._policies[-1] if self._policies else self._roots[-1]
        certificate = make_ca(
            self.name, key, start, min(end, not_after(superior.certificate)), superior.certificate, superior.key,
            version=(len(self.generations), self._key_index(new_key=new_key)), path_length=0, identifiers=self.aki,
        )  # fmt: skip
        root = self._roots[-1].certificate
        return certificate, (superior.certificate, root) if self._policies else (root,)

    def _key_index(self, *, new_key: bool) -> int:
        return len(self.generations) if new_key or not self.generations else self.newest.key_index

    def _append(
        self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, above: Tuple[x509.Certificate, ...], *, new_key: bool
    ) -> None:
        key_index = self._key_index(new_key=new_key)
        self.generations.append(Generation(len(self.generations), key_index, key, certificate, above))

    @property
    def newest(self) -> Generation:
        """The generation that signs."""
        return self.generations[-1]

    @property
    def roots(self) -> Tuple[bytes, ...]:
        """All roots, DER, oldest first: what the operator puts into the issuer trust."""
        return tuple(to_der(anchor.certificate) for anchor in self._roots)

    def chain(self, index: int = -1) -> Tuple[bytes, ...]:
        """Return the CA certificate of a generation and what stands above it up to the root, DER; cross certificates last.

        Raises IndexError for a generation that does not exist.
        """
        if index < -1:
            raise IndexError(index)
        generation = self.generations[index]
        found = [generation.der, *map(to_der, generation.above)]
        found.extend(to_der(cross) for anchor in self._roots for cross in anchor.cross)
        return tuple(found)

    def stranger(self, *, same_name: bool = False) -> Generation:
        """Return an unrelated CA, made when first asked for; with `same_name` it calls itself as this one does."""
        kind = "same" if same_name else "other"
        with self._lock:
            if kind not in self._stranger:
                now = self.clock()
                name = self.name if same_name else "Unrelated CA"
                root_key, key = _new_key(), _new_key()
                root = make_ca(name + " Root", root_key, now - YEAR, now + 10 * YEAR)
                certificate = make_ca(name, key, now - YEAR, now + 9 * YEAR, root, root_key)
                self._stranger[kind] = Generation(0, 0, key, certificate, (root,))
            return self._stranger[kind]

    # the request table

    @property
    def issued(self) -> int:
        """How many certificates were issued, revoked ones included."""
        with self._lock:
            return sum(1 for row in self.rows.values() if row.certificate is not None)

    def count_post(self) -> None:
        """Count an authenticated submission that never reaches `submit`."""
        with self._lock:
            self.posts += 1

    def submit(
        self, csr: bytes, template: str, requester: str = "LAB\\host1$", attributes: Optional[Mapping[str, str]] = None
    ) -> Row:
        """Take a request (PEM) and return its row, already issued, pending, denied or failed as templates and switches say."""
        with self._lock:
            self.posts += 1
            row = Row(next(self._ids), "pending", csr, template, dict(attributes or {}), requester, self.clock())
            row.language = self.language
            self.rows[row.id] = row
            hresult = self._judge(row)
            known = self.templates.get(template)
            if self.switches.mode in ("deny", "fail"):
                self._deny(row, self.switches.deny_hresult or 0, self.switches.deny_message)
                if self.switches.mode == "fail":
                    row.state, row.words = "failed", "constructing"
            elif hresult:
                detail = f"{messages.text(hresult, row.language)}: {template}." if hresult == UNSUPPORTED_TEMPLATE else ""
                self._deny(row, hresult, detail)
                if hresult == NOT_PARSED:
                    row.words = "parsing"
            elif self.switches.mode == "pending" or (known and known.needs_approval):
                row.words = "taken"
            else:
                self._issue(row)
            return row

    @property
    def language(self) -> str:
        """The language of disposition messages and HRESULT texts."""
        return self.switches.ca_language or self.switches.language

    def _judge(self, row: Row) -> int:
        """Return the HRESULT with which policy denies a request, 0 for none."""
        request, template = _load_csr(row.csr), self.templates.get(row.template)
        if request is None:
            return NOT_PARSED
        if not self.request_right:
            return NO_REQUEST_RIGHT
        if template is None or not template.published:
            return UNSUPPORTED_TEMPLATE
        if not template.enroll or row.requester == ANONYMOUS:
            return NO_ENROLL_RIGHT
        key = request.public_key()
        if isinstance(key, rsa.RSAPublicKey) and key.key_size < template.minimum_rsa_bits:
            return KEY_TOO_SHORT
        if template.agent_signatures:
            return SIGNATURES_MISSING
        if template.directory_attribute:
            return ATTRIBUTES[template.directory_attribute]
        return CA_EXPIRED if self.clock() >= not_after(self.newest.certificate) else 0

    def approve(self, request_id: int) -> Row:
        """Issue a pending or denied request, as a certificate manager may (MS-CSRA 3.1.4.1.3). KeyError: no such row."""
        with self._lock:
            row = self.rows[request_id]
            if row.certificate is None:
                self._issue(row)
            return row

    def deny(self, request_id: int, hresult: int = DENIED_BY_MANAGER) -> Row:
        """Deny a pending request, as a certificate manager. KeyError: no such row."""
        with self._lock:
            row = self.rows[request_id]
            self._deny(row, hresult, "")
            row.words = "manager"
            return row

    def delete(self, request_id: int) -> None:
        """Remove a row, as an administrator may; its id is never used again. KeyError: no such row."""
        with self._lock:
            del self.rows[request_id]

    def revoke(self, request_id: int) -> Row:
        """Mark an issued certificate as revoked. KeyError: no such row."""
        with self._lock:
            row = self.rows[request_id]
            row.state, row.words, row.language = "revoked", "revoked", self.language
            return row

    def issue(self, csr: bytes, template: str = "SCXAgent", *, wrong: str = "") -> bytes:
        """Return a leaf (DER) for a CSR (PEM), outside the request table; `wrong` as in `WRONG`.

        Raises ValueError for a CSR that does not parse.
        """
        request = _load_csr(csr)
        if request is None:
            message = "not a certificate request"
            raise ValueError(message)
        return self._leaf(request, self.templates.get(template), wrong, "LAB\\host1$")

    def _deny(self, row: Row, hresult: int, message: str) -> None:
        row.state, row.words, row.hresult, row.language = "denied", "policy", hresult, self.language
        own = messages.text(hresult, row.language) if hresult else ""
        row.message = message or own or messages.words("unknown", row.language)

    def _issue(self, row: Row) -> None:
        request = _load_csr(row.csr)
        if request is None:
            return
        row.certificate = self._leaf(request, self.templates.get(row.template), self.switches.wrong, row.requester)
        row.state, row.hresult, row.words, row.language = "issued", 0, "issued", self.language
        row.generation = self.newest.index

    def _leaf(
        self, request: x509.CertificateSigningRequest, template: Optional[Template], wrong: str, requester: str
    ) -> bytes:
        if wrong not in WRONG:
            raise ValueError(wrong)
        now = self.clock()
        signer = self.newest
        if wrong in ("issuer", "same-name-issuer"):
            signer = self.stranger(same_name=wrong != "issuer")
        start, end = now - 600, now + self._lifetime(template)
        start, end = {
            "expired": (now - 2 * DAY, now - DAY),
            "future": (now + DAY, end + DAY),
            "short": (start, now + 600),
        }.get(wrong, (start, end))
        end = min(end, not_after(signer.certificate))
        from_directory = template is not None and template.names == "directory"
        subject, names = self._account_names(requester) if from_directory else self._names(request, wrong)
        key = _new_key().public_key() if wrong == "key" else request.public_key()
        encipherment = not isinstance(key, ec.EllipticCurvePublicKey)
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH if wrong == "eku" else ExtendedKeyUsageOID.SERVER_AUTH]
        extensions: List[Tuple[x509.ExtensionType, bool]] = [
            (_usage(ca=wrong == "ca", encipherment=encipherment), True),
            (x509.ExtendedKeyUsage(usages), False),
            (_template_extension(), False),
        ]
        if self.aki:
            extensions.append((x509.SubjectKeyIdentifier.from_public_key(key), False))
            extensions.append((x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), False))
        if from_directory:
            extensions.append((_security_identifier(requester), False))
        if wrong != "eku":
            extensions.append((_application_policies(), False))
        if wrong == "ca":
            extensions.append((x509.BasicConstraints(ca=True, path_length=None), True))
        if names is not None:
            extensions.append((names, not list(subject)))  # RFC 5280 4.2.1.6: critical beside an empty subject
        extensions.extend((item, False) for item in self._addresses(signer))
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(signer.certificate.subject)
            .public_key(key)
            .serial_number(int.from_bytes(b"\x2e" + os.urandom(18), "big"))
            .not_valid_before(moment(start))
            .not_valid_after(moment(end))
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical=critical)
        return to_der(builder.sign(signer.key, hashes.SHA256()))

    def _lifetime(self, template: Optional[Template]) -> float:
        lifetime = self.lifetime if template is None or template.lifetime is None else template.lifetime
        return lifetime.total_seconds() if isinstance(lifetime, dt.timedelta) else lifetime

    def _names(
        self, request: x509.CertificateSigningRequest, wrong: str
    ) -> Tuple[x509.Name, Optional[x509.SubjectAlternativeName]]:
        other = "other.lab.test" if wrong == "name" else self.switches.names_from_ad
        if other:
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, other)])
            return subject, x509.SubjectAlternativeName([x509.DNSName(other)])
        subject = request.subject
        if wrong == "cn":
            subject = x509.Name([item for item in subject if item.oid != NameOID.COMMON_NAME])
        if wrong == "san":
            return subject, None
        try:
            return subject, request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return subject, None

    def _account_names(self, account: str) -> Tuple[x509.Name, x509.SubjectAlternativeName]:
        """Return what the directory holds of an account: a host's DNS name, a user's UPN."""
        name = account.rpartition("\\")[2]
        host = name.rstrip("$").lower() + "." + self.domain
        if name.endswith("$"):
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
            return subject, x509.SubjectAlternativeName([x509.DNSName(host)])
        upn = x509.OtherName(ObjectIdentifier("1.3.6.1.4.1.311.20.2.3"), tlv(0x0C, f"{name}@{self.domain}".encode()))
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), x509.SubjectAlternativeName([upn])

    def _addresses(self, signer: Generation) -> List[x509.ExtensionType]:
        suffix = f"({signer.key_index})" if signer.key_index else ""
        found: List[x509.ExtensionType] = []
        if self.crl_urls:
            urls: List[x509.GeneralName] = [x509.UniformResourceIdentifier(url.format(suffix=suffix)) for url in self.crl_urls]
            found.append(x509.CRLDistributionPoints([x509.DistributionPoint(urls, None, None, None)]))
        if self.aia_urls:
            method = x509.oid.AuthorityInformationAccessOID.CA_ISSUERS
            found.append(
                x509.AuthorityInformationAccess(
                    [
                        x509.AccessDescription(method, x509.UniformResourceIdentifier(url.format(suffix=suffix)))
                        for url in self.aia_urls
                    ]
                )
            )
        return found


def _load_csr(csr: bytes) -> Optional[x509.CertificateSigningRequest]:
    try:
        request = x509.load_pem_x509_csr(csr)
        sound = request.is_signature_valid
    except Exception:  # noqa: BLE001 - the library's kinds of failure differ between versions; each one means "does not parse"
        return None
    return request if sound else None
