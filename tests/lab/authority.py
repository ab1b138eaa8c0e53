"""A certification authority in memory, with AD CS's habits and a list of ways to misbehave.

It issues real certificates with EC keys, keeps a table of requests, and knows no HTTP: `ca` puts the web pages before it.
"""

from __future__ import annotations

import datetime as dt
import itertools
import os
import threading
import time
from dataclasses import dataclass, field, fields
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

DAY = 86400.0
YEAR = 365 * DAY

NO_SUCH_REQUEST = 0x80094004  # CERTSRV_E_PROPERTY_EMPTY, what an unknown or deleted id gets
DENIED_BY_MANAGER = 0x80094014  # CERTSRV_E_ADMIN_DENIED_REQUEST
UNSUPPORTED_TEMPLATE = 0x80094800  # CERTSRV_E_UNSUPPORTED_CERT_TYPE
NO_ENROLL_RIGHT = 0x80094012  # CERTSRV_E_TEMPLATE_DENIED
RPC_UNAVAILABLE = 0x800706BA  # RPC_S_SERVER_UNAVAILABLE, CertSvc stopped
NOT_PARSED = 0x8009310B  # CRYPT_E_ASN1_BADTAG
CA_EXPIRED = 0x800B0101  # CERT_E_EXPIRED

MESSAGES: Mapping[int, str] = {
    NO_SUCH_REQUEST: "The requested property value is empty.",
    DENIED_BY_MANAGER: "The request was denied by a certificate manager or CA administrator.",
    UNSUPPORTED_TEMPLATE: "The requested certificate template is not supported by this CA.",
    NO_ENROLL_RIGHT: "The permissions on the certificate template do not allow the current user to enroll for this type of "
    "certificate.",
    RPC_UNAVAILABLE: "The RPC server is unavailable.",
    NOT_PARSED: "ASN1 bad tag value met.",
    CA_EXPIRED: "A required certificate is not within its validity period when verifying against the current system clock.",
}

WRONG = (
    "",
    "key",  # another public key than the CSR's
    "name",  # CN and SAN of another host
    "san",  # no SAN at all
    "cn",  # no CN
    "eku",  # clientAuth instead of serverAuth
    "ca",  # CA:TRUE
    "expired",
    "future",
    "short",  # ends ten minutes from now
    "issuer",  # signed by an unrelated CA with another name
    "same-name-issuer",  # signed by an unrelated CA that has this CA's name
)


@dataclass
class Switches:
    """How the CA behaves; plain attributes, set at any time, in force from the next request on.

    Those of the first group act in `Authority`, the others only over HTTP (`ca`). Choices are given beside each; "" is off.
    """

    mode: str = "issue"  # issue | pending | deny
    deny_hresult: Optional[int] = NO_ENROLL_RIGHT
    deny_message: str = ""  # in place of the HRESULT's own text
    wrong: str = ""  # one of WRONG
    names_from_ad: str = ""  # "Build from AD": this name, whatever the CSR says

    deny_page: str = "full"  # full | no-code | no-id | bare (locDenied alone) | echo (certnew.cer?ReqID=7& in the reason)
    unavailable: str = ""  # post | get | all: CertSvc stopped, the 800706ba page
    answer: str = ""  # an HTTP status (401 403 404 413 500 502 503 504 301 302 303 307 308), login, empty, nul, bad-utf8, huge
    answer_on: str = "all"  # all | post | get
    answer_times: int = -1  # how many times, then as usual; -1: always
    answer_after: bool = False  # a POST is stored before it is answered like that
    slow: float = 0.0  # seconds before the reply, the work being done
    slow_on: str = "all"  # all | post | get
    lost: str = ""  # of a POST's reply: before | after | truncated | truncated-quiet | trickle; "after" and later ones are stored
    lost_times: int = -1
    truncate_at: int = -1  # bytes of the page that still arrive; -1: half
    cer_fails: int = 0  # so many GETs of certnew.cer fail first
    cer_fails_as: str = "500"  # 500 | html | drop
    language: str = "en"  # en | de | fr | zh
    id_quote: str = ""  # the quote around element IDs: nothing, ' or "
    lower_case: bool = False  # <p id=...> instead of <P ID=...>
    sniff: bool = True  # the page for browsers to Mozilla; off: the other page to everyone
    charset: bool = False  # charset=UTF-8 in the Content-Type header
    auth: str = "basic"  # basic | negotiate (no Basic offered) | anonymous
    https: str = ""  # unknown-ca | wrong-name | expired
    date_offset: float = 0.0  # seconds by which the Date header is ahead
    certcarc: str = ""  # missing: a page without nRenewals
    bag: str = "sorted"  # sorted (as DER's SET OF) | ordered (leaf first) | reversed | shuffled (these are BER) | leaf | empty
    bag_extra: bool = False  # an unrelated CA's certificate in each bag too
    cer_as: str = "pem"  # the body for Enc=b64: pem | bare (base64 without armour) | der

    def update(self, values: Mapping[str, Any]) -> None:
        """Set several switches by name.

        Raises KeyError for a name that is no switch, TypeError for a value of another kind than the present one.
        """
        known = {item.name for item in fields(self)}
        for name, value in values.items():
            if name not in known:
                raise KeyError(name)
            now = getattr(self, name)
            if name != "deny_hresult" and not isinstance(value, (int, float) if isinstance(now, float) else type(now)):
                message = f"{name}: {value!r}"
                raise TypeError(message)
            setattr(self, name, value)

    def reset(self) -> None:
        """Put every switch back to its default."""
        fresh = Switches()
        for item in fields(self):
            setattr(self, item.name, getattr(fresh, item.name))

    def values(self) -> Dict[str, Any]:
        """Return every switch as a mapping fit for JSON."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass
class Template:
    """A template as published on the CA; `name` is its cn."""

    name: str
    published: bool = True
    needs_approval: bool = False
    lifetime: Optional[float] = None  # seconds; None: the CA's


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
    message: str = ""
    certificate: Optional[bytes] = None  # DER
    generation: int = 0  # index of the CA certificate it was issued under


@dataclass
class Generation:
    """One certificate of the CA; `index` counts renewals, `key_index` is the index at which its key was made."""

    index: int
    key_index: int
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    root: x509.Certificate

    @property
    def der(self) -> bytes:
        """The certificate, DER."""
        return to_der(self.certificate)


@dataclass
class _Anchor:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
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


def _application_policies() -> x509.UnrecognizedExtension:
    server_auth = bytes.fromhex("06082b06010505070301")
    return x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.4.1.311.21.10"), tlv(0x30, tlv(0x30, server_auth)))


def make_ca(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    start: float,
    end: float,
    issuer: Optional[x509.Certificate] = None,
    issuer_key: Optional[ec.EllipticCurvePrivateKey] = None,
    version: Tuple[int, int] = (0, 0),
    path_length: Optional[int] = None,
) -> x509.Certificate:
    """Return a CA certificate that strict path validation accepts; self-signed without an issuer."""
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
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_ca_version(*version), critical=False)
    )
    if issuer:
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
    """A root, an issuing CA below it, its templates and its request table.

    `clock` gives the CA's time in seconds since the epoch and may be replaced at any time. `lifetime` of leaves is a number of
    seconds or a timedelta. NotBefore is ten minutes back and NotAfter never beyond the CA's own certificate, as on AD CS
    (facts 7). Request ids are sequential and consumed by denials too (facts 2.1). Safe for use from several threads.
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
        switches: Optional[Switches] = None,
    ) -> None:
        """Make the keys and certificates: one root, and with `tiers=2` an issuing CA signed by it."""
        self.name = name
        self.clock = clock
        self.lifetime: Union[float, dt.timedelta] = lifetime
        self.ca_lifetime = ca_lifetime
        self.root_lifetime = root_lifetime
        self.tiers = tiers
        self.switches = switches or Switches()
        self.templates: Dict[str, Template] = {"SCXAgent": Template("SCXAgent")}
        self.crl_urls: List[str] = ["ldap:///CN=Lab,CN=CDP,DC=lab,DC=test", "http://pki.lab.test/LabCA{suffix}.crl"]
        self.aia_urls: List[str] = ["ldap:///CN=Lab,CN=AIA,DC=lab,DC=test", "http://pki.lab.test/LabCA{suffix}.crt"]
        self.posts = 0
        self.rows: Dict[int, Row] = {}
        self._ids = itertools.count(first_id)
        self._lock = threading.RLock()
        self._roots: List[_Anchor] = []
        self.generations: List[Generation] = []
        self._stranger: Dict[str, Generation] = {}
        self.renew_root()

    # the CA's own certificates

    def renew_root(self) -> None:
        """Make a root with a new key; from the second on, cross certificates old/new as well, and renew the CA below it."""
        now = self.clock()
        key = _new_key()
        name = self.name + " Root" if self.tiers > 1 else self.name
        index = len(self._roots)
        certificate = make_ca(name, key, now - YEAR, now + self.root_lifetime, version=(index, index))
        anchor = _Anchor(key, certificate)
        if self._roots:
            old = self._roots[-1]
            end = min(not_after(old.certificate), not_after(certificate))
            anchor.cross = [
                make_ca(name, key, now - DAY, end, old.certificate, old.key, version=(index, index)),
                make_ca(name, old.key, now - DAY, end, certificate, key, version=(index, index)),
            ]
        self._roots.append(anchor)
        self.renew(new_key=True)

    def renew(self, *, new_key: bool = False) -> None:
        """Renew the CA's certificate: its index grows by one; a new key sets the key index to it (facts 10)."""
        now = self.clock()
        index = len(self.generations)
        anchor = self._roots[-1]
        if self.tiers == 1:
            key, key_index, certificate = anchor.key, index, anchor.certificate
        else:
            last = self.generations[-1] if self.generations and not new_key else None
            key, key_index = (last.key, last.key_index) if last else (_new_key(), index)
            end = min(now + self.ca_lifetime, not_after(anchor.certificate))
            certificate = make_ca(
                self.name, key, now - YEAR / 2, end, anchor.certificate, anchor.key, version=(index, key_index), path_length=0
            )
        self.generations.append(Generation(index, key_index, key, certificate, anchor.certificate))

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
        found = [generation.der]
        if self.tiers > 1:
            found.append(to_der(generation.root))
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
                self._stranger[kind] = Generation(0, 0, key, certificate, root)
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
        """Take a request (PEM) and return its row, already issued, pending or denied as templates and switches say."""
        with self._lock:
            self.posts += 1
            row = Row(next(self._ids), "pending", csr, template, dict(attributes or {}), requester, self.clock())
            self.rows[row.id] = row
            known = self.templates.get(template)
            if self.switches.mode == "deny":
                self._deny(row, self.switches.deny_hresult or 0, self.switches.deny_message)
            elif _load_csr(csr) is None:
                self._deny(row, NOT_PARSED, "Error Parsing Request  ")
            elif known is None or not known.published:
                self._deny(row, UNSUPPORTED_TEMPLATE, f"{MESSAGES[UNSUPPORTED_TEMPLATE]}: {template}.")
            elif self.clock() >= not_after(self.newest.certificate):
                self._deny(row, CA_EXPIRED, "")
            elif self.switches.mode == "pending" or known.needs_approval:
                row.message = "Taken Under Submission"
            else:
                self._issue(row)
            return row

    def approve(self, request_id: int) -> Row:
        """Issue a pending or denied request, as a certificate manager may (MS-CSRA 3.1.4.1.3). KeyError: no such row."""
        with self._lock:
            row = self.rows[request_id]
            if row.certificate is None:
                self._issue(row)
            return row

    def deny(self, request_id: int, hresult: int = DENIED_BY_MANAGER) -> Row:
        """Deny a pending request. KeyError: no such row."""
        with self._lock:
            row = self.rows[request_id]
            self._deny(row, hresult, "")
            return row

    def delete(self, request_id: int) -> None:
        """Remove a row, as an administrator may; its id is never used again. KeyError: no such row."""
        with self._lock:
            del self.rows[request_id]

    def revoke(self, request_id: int) -> Row:
        """Mark an issued certificate as revoked. KeyError: no such row."""
        with self._lock:
            row = self.rows[request_id]
            row.state, row.message = "revoked", "Revoked"
            return row

    def issue(self, csr: bytes, template: str = "SCXAgent", *, wrong: str = "") -> bytes:
        """Return a leaf (DER) for a CSR (PEM), outside the request table; `wrong` as in `WRONG`.

        Raises ValueError for a CSR that does not parse.
        """
        request = _load_csr(csr)
        if request is None:
            message = "not a certificate request"
            raise ValueError(message)
        return self._leaf(request, self.templates.get(template), wrong)

    def _deny(self, row: Row, hresult: int, message: str) -> None:
        row.state, row.hresult = "denied", hresult
        row.message = message or MESSAGES.get(hresult, "The request was denied.")

    def _issue(self, row: Row) -> None:
        request = _load_csr(row.csr)
        if request is None:
            return
        row.certificate = self._leaf(request, self.templates.get(row.template), self.switches.wrong)
        row.state, row.hresult, row.message, row.generation = "issued", 0, "Issued", self.newest.index

    def _leaf(self, request: x509.CertificateSigningRequest, template: Optional[Template], wrong: str) -> bytes:
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
        subject, names = self._names(request, wrong)
        key = _new_key().public_key() if wrong == "key" else request.public_key()
        encipherment = not isinstance(key, ec.EllipticCurvePublicKey)
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH if wrong == "eku" else ExtendedKeyUsageOID.SERVER_AUTH]
        extensions: List[Tuple[x509.ExtensionType, bool]] = [
            (_usage(ca=wrong == "ca", encipherment=encipherment), True),
            (x509.ExtendedKeyUsage(usages), False),
            (x509.SubjectKeyIdentifier.from_public_key(key), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), False),
            (_template_extension(), False),
        ]
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
