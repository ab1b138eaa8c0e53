"""Judges a certificate against the same `RequestSpec` the request was built from; reads what certificates come in.

Every mismatch is data, all at once; none is raised. The path to a root is not judged here but by OpenSSL, in a rehearsal;
`chain`, `leads_to` and `split_trust` only sort certificates.
"""

from __future__ import annotations

import base64
import calendar
import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from scx_enroll.der import SEQUENCE, element, elements
from scx_enroll.errors import CertificateRefused, ConfigError
from scx_enroll.request import RequestSpec, kind_of, spki_of

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

MAX_CERTIFICATES = 256  # in one file: a distribution's bundle of roots has about 150
MAX_CHAIN = 8  # intermediates: Windows PKIs have one or two, and cross certificates
MIN_RSA_BITS = 2048  # SCOM's and OpenSSL's default limit
SAFE_RSA_BITS = 3072  # the agent's packages throw shorter keys away: facts/agent.md section 6

_BARE = re.compile(rb"MI[A-Za-z0-9+/\s]+={0,2}")  # base64 without armour: a long SEQUENCE always begins so
_BLOCK = re.compile(rb"-----BEGIN (CERTIFICATE|X509 CERTIFICATE|PKCS7)-----([^-]*)(-----END \1-----)?")
_CONTEXT_0 = 0xA0  # a DER tag; [0] holds a PKCS#7's certificates
_SIGNED_DATA = bytes.fromhex("06092a864886f70d010702")  # 1.2.840.113549.1.7.2, RFC 2315 section 14
_CN, _SERVER_AUTH, _OCSP, _PSS = "2.5.4.3", "1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.48.1", "1.2.840.113549.1.1.10"
# In DER, 2.16.840.1.101.3.4.2.1 and so on.
_SHA2 = {bytes.fromhex(f"60864801650304020{last}"): name for last, name in enumerate(("SHA256", "SHA384", "SHA512"), 1)}
_WEAK_SIGNATURES = {
    **dict.fromkeys(("1.2.840.113549.1.1.5", "1.3.14.3.2.29", "1.2.840.10040.4.3", "1.2.840.10045.4.1"), "SHA-1"),
    **dict.fromkeys(("1.2.840.113549.1.1.2", "1.2.840.113549.1.1.3", "1.2.840.113549.1.1.4"), "MD5 or older"),
}
# Bits of the RSA key that is as strong, to compare keys of different kinds (NIST SP 800-57 part 1, table 2).
_AS_STRONG_AS: Mapping[str, int] = {"ec:secp256r1": 3072, "ec:secp384r1": 7680, "ec:secp521r1": 15360, "ed25519": 3072}


class Mismatch(NamedTuple):
    """One thing that is wrong with a certificate: a stable word, the fact, the next act."""

    what: str  # key, cn, san, eku, ca, dates, signature, key-strength, revocation, path, unreadable
    detail: str
    hint: str


@dataclass(frozen=True)
class Rules:
    """What the operator may ask for; `minimum_key` is "", "rsa:BITS" or "ec:CURVE"."""

    require_cn: bool = True
    require_revocation: bool = False
    minimum_key: str = ""


@dataclass(frozen=True)
class Facts:
    """What is worth knowing of a certificate; times in seconds since the epoch, hashes as hex SHA-256."""

    subject: str
    issuer: str
    serial: str  # hex, as certutil prints it
    not_before: int
    not_after: int
    leaf: str
    spki: str
    names: Tuple[str, ...]  # the SAN's DNS names; the CNs where it has none
    key: str  # "rsa:3072", "ec:secp256r1"


class _Asked(NamedTuple):
    spec: RequestSpec
    spki: str
    rules: Rules
    now: int


# -- reading ----------------------------------------------------------------------------------------------------


def read(data: bytes) -> Tuple[bytes, ...]:
    """Return every certificate in `data` as DER, in order; none if it holds nothing of the kind.

    Takes PEM (also with text around, CRLF, several), DER, PKCS#7 as DER or armoured as PKCS7 or CERTIFICATE (which is what
    AD CS does), and bare base64. Raises CertificateRefused for what is cut off, damaged or too much.
    """
    blocks = list(_BLOCK.finditer(data))
    try:
        if not all(end for _, _, end in map(re.Match.groups, blocks)):
            raise ValueError("a PEM block is cut off")
        if blocks:
            found = [der for block in blocks for der in _split(_unbase64(block[2]))]
        elif data[:1] == b"\x30":
            found = list(_split(data))
        else:
            found = list(_split(_unbase64(data))) if _BARE.fullmatch(data.strip()) else []
        if len(found) > MAX_CERTIFICATES:
            raise ValueError(f"there are more than {MAX_CERTIFICATES}")
    except ValueError as problem:
        raise CertificateRefused(f"certificates can't be read: {problem}", "fetch the file again") from problem
    return tuple(found)


def pem(der: bytes) -> bytes:
    """Return one PEM block with LF, as the agent and everything else reads it (RFC 7468)."""
    lines = re.sub(rb"(.{1,64})", rb"\1\n", base64.b64encode(der))
    return b"-----BEGIN CERTIFICATE-----\n%b-----END CERTIFICATE-----\n" % lines


def _unbase64(text: bytes) -> bytes:
    return base64.b64decode(b"".join(text.split()), validate=True)


def _split(der: bytes) -> Iterator[bytes]:
    """Yield the certificate that `der` is, or those in the PKCS#7 that it is. Raises ValueError if it is neither."""
    outer = element(der, 0, len(der))
    first = element(der, outer.start, outer.end)
    if outer.tag == first.tag == SEQUENCE and outer.end == len(der):
        yield der
    elif der[first.at : first.end] == _SIGNED_DATA and outer.end == len(der):
        explicit = element(der, first.end, outer.end)
        signed = element(der, explicit.start, explicit.end)
        for part in elements(der, signed.start, signed.end):
            if part.tag == _CONTEXT_0:
                inner = elements(der, part.start, part.end)
                yield from (der[one.at : one.end] for one in inner if one.tag == SEQUENCE)  # others are attribute certificates
    else:
        raise ValueError("neither a certificate nor a PKCS#7")


def _load(der: bytes) -> Certificate:
    """Parse a certificate, also the agent's own, which says v1 and has extensions. Raises ValueError, whatever is raised."""
    from cryptography import x509

    if element(der, 0, len(der)).end != len(der):
        raise ValueError("something follows the certificate")  # which old versions of cryptography don't mind
    try:
        return x509.load_der_x509_certificate(der)
    except Exception as problem:
        raise ValueError(f"not a certificate: {problem}") from problem


@lru_cache(maxsize=64)  # a look asks for the same few again and again
def facts(der: bytes) -> Facts:
    """Return what is worth knowing of a certificate. Raises CertificateRefused if it can't be read."""
    try:
        certificate = _load(der)
        names = _san(certificate)
        return Facts(
            subject=_shown(certificate.subject.rfc4514_string()),
            issuer=_shown(certificate.issuer.rfc4514_string()),
            serial=f"{certificate.serial_number:x}",
            not_before=_seconds(certificate, "not_valid_before"),
            not_after=_seconds(certificate, "not_valid_after"),
            leaf=hashlib.sha256(der).hexdigest(),
            spki=spki_of(certificate),
            names=_common_names(certificate) if names is None else names,
            key=kind_of(certificate.public_key()),
        )
    except Exception as problem:
        raise CertificateRefused(f"certificate can't be read: {problem}", "get another one") from problem


def whose(der: bytes) -> str:
    """Say whose certificate it is, so that a person recognises an inspecting proxy's."""
    try:
        known = facts(der)
    except CertificateRefused:
        return "not readable"
    return f"subject {known.subject}, issuer {known.issuer}, SHA-256 {known.leaf}"


def _seconds(certificate: Certificate, field: str) -> int:
    # cryptography 42 deprecates the naive times; both are UTC
    moment = getattr(certificate, f"{field}_utc", None) or getattr(certificate, field)
    return calendar.timegm(moment.utctimetuple())


def _extension(certificate: Certificate, name: str) -> Any:
    """Return the value of an extension by the name of its class; None if it is missing."""
    return next((found.value for found in certificate.extensions if type(found.value).__name__ == name), None)


def _san(certificate: Certificate) -> Optional[Tuple[str, ...]]:
    """Return the DNS names of the SAN in lower case; None if there is no SAN."""
    from cryptography import x509

    san = _extension(certificate, "SubjectAlternativeName")
    return None if san is None else tuple(name.lower() for name in san.get_values_for_type(x509.DNSName))


def _common_names(certificate: Certificate) -> Tuple[str, ...]:
    return tuple(str(name.value).lower() for name in certificate.subject if name.oid.dotted_string == _CN)


def _shown(text: str) -> str:
    return text if text.isprintable() else ascii(text)  # names are the CA's, or anybody's; the log and the terminal are ours


# -- judging ----------------------------------------------------------------------------------------------------

_Findings = Iterable[Tuple[str, str]]  # the fact, the next act


def _check_key(certificate: Certificate, asked: _Asked) -> _Findings:
    if spki_of(certificate) != asked.spki:
        yield "public key is not the agent's", "see who replaced the key or the certificate, then run again"


def _check_cn(certificate: Certificate, asked: _Asked) -> _Findings:
    names = _common_names(certificate)
    if asked.rules.require_cn and asked.spec.fqdn not in names:
        fact = f"CN is {_shown(', '.join(names)) or 'missing'}, not {asked.spec.fqdn}"
        yield fact, "let the template take the subject from the request, or set require-cn = no"


def _check_san(certificate: Certificate, asked: _Asked) -> _Findings:
    names = _san(certificate)
    if names is None:  # then the CN is all there is, and _check_cn has its say about the FQDN
        names = (*_common_names(certificate), *((asked.spec.fqdn,) if asked.rules.require_cn else ()))
    missing = [name for name in asked.spec.dns_names if name not in names]
    if missing:
        yield f"SAN lacks {', '.join(missing)}", "let the template take the names from the request"


def _check_eku(certificate: Certificate, _: _Asked) -> _Findings:
    if _SERVER_AUTH not in [usage.dotted_string for usage in _extension(certificate, "ExtendedKeyUsage") or ()]:
        yield "EKU lacks serverAuth", "add Server Authentication to the template"
    if not getattr(_extension(certificate, "KeyUsage"), "digital_signature", True):
        yield "key usage lacks digitalSignature", "allow digital signatures in the template"


def _check_ca(certificate: Certificate, _: _Asked) -> _Findings:
    if getattr(_extension(certificate, "BasicConstraints"), "ca", False):
        yield "it is a CA certificate", "choose a template for servers"


def _check_dates(certificate: Certificate, asked: _Asked) -> _Findings:
    if asked.now < _seconds(certificate, "not_valid_before"):
        yield "it is not valid yet", "see that the clocks of this host and of the CA agree"
    if asked.now >= _seconds(certificate, "not_valid_after"):
        yield "it has expired", "get a new one; see that this host's clock is right"


def _check_signature(certificate: Certificate, _: _Asked) -> _Findings:
    oid = certificate.signature_algorithm_oid.dotted_string
    # the default hash of PSS is SHA-1: RFC 4055 section 3.1
    weak = _WEAK_SIGNATURES.get(oid) or ("SHA-1" if oid == _PSS and not _pss_hash(certificate) else "")
    if weak:
        yield f"it is signed with {weak}", "let the CA sign with SHA-256"


def _check_strength(certificate: Certificate, asked: _Asked) -> _Findings:
    problem = weakness(kind_of(certificate.public_key()), asked.rules)
    if problem:
        yield problem, "make a stronger key"


def weakness(key: str, rules: Rules) -> str:
    """Return why a key of that kind is too weak, "" if it isn't."""
    minimum = rules.minimum_key or f"rsa:{MIN_RSA_BITS}"
    return f"key is {key}, weaker than {minimum}" if _strength(key) < _strength(minimum) else ""


def _strength(key: str) -> int:
    bits = key.rpartition(":")[2]
    return _AS_STRONG_AS.get(key) or (int(bits) if bits.isdigit() else 0)


def _check_revocation(certificate: Certificate, asked: _Asked) -> _Findings:
    if asked.rules.require_revocation and not _extension(certificate, "CRLDistributionPoints"):
        access = _extension(certificate, "AuthorityInformationAccess") or ()
        if _OCSP not in [place.access_method.dotted_string for place in access]:
            yield "it names no CRL or OCSP address", "let the CA add one, or set require-revocation = no"


_CHECKS: Tuple[Tuple[str, Callable[[Certificate, _Asked], _Findings]], ...] = (
    ("key", _check_key),
    ("cn", _check_cn),
    ("san", _check_san),
    ("eku", _check_eku),
    ("ca", _check_ca),
    ("dates", _check_dates),
    ("signature", _check_signature),
    ("key-strength", _check_strength),
    ("revocation", _check_revocation),
)


def judge(der: bytes, spec: RequestSpec, spki: str, rules: Rules, now: int) -> Tuple[Mismatch, ...]:
    """Return everything that is wrong with a certificate for `spec` and the key `spki`; nothing means accept.

    Never raises, on any bytes: what can't be read is a mismatch.
    """
    try:
        certificate = _load(der)
    except ValueError as problem:
        return (Mismatch("unreadable", str(problem), "get another certificate"),)
    found: List[Mismatch] = []
    for what, check in _CHECKS:
        try:
            found.extend(Mismatch(what, *finding) for finding in check(certificate, _Asked(spec, spki, rules, now)))
        except Exception as problem:  # noqa: BLE001 - whatever cryptography raises on these bytes, they are not accepted
            found.append(Mismatch("unreadable", f"{what} can't be read: {problem}", "get another certificate"))
    return tuple(found)


def warnings(der: bytes, spec: RequestSpec, rules: Rules) -> Tuple[str, ...]:
    """Return what the operator should know of a certificate that is accepted. Never raises."""
    try:
        certificate = _load(der)
        key, names = kind_of(certificate.public_key()), _common_names(certificate)
    except Exception:  # noqa: BLE001 - `judge` has said so
        return ()
    found = []
    if not key.startswith("rsa:") or int(key[4:]) < SAFE_RSA_BITS:
        thrown = "the agent's packages throw it away at their next upgrade"
        found.append(f"key is {key}: {thrown}; rsa:{SAFE_RSA_BITS} stays: scx-enroll run --rekey")
    if not rules.require_cn and spec.fqdn not in names:
        found.append(f"CN is {_shown(', '.join(names)) or 'missing'}, not {spec.fqdn}: SCOM may refuse it")
    return tuple(found)


# -- sorting ----------------------------------------------------------------------------------------------------


def chain(leaf: bytes, pool: Sequence[bytes]) -> Tuple[bytes, ...]:
    """Return the intermediates of `pool` that lead from `leaf` upwards, issuer first, without self-signed ones.

    Of several candidates the one living longest. What can't be read is left out. Bounded by MAX_CHAIN.
    """
    known = [(der, certificate) for der, certificate in _loaded(pool) if not _is_issuer(certificate, certificate)]
    child = next((certificate for _, certificate in _loaded([leaf])), None)
    path: List[bytes] = []
    while child is not None and len(path) < MAX_CHAIN:
        issuers = [pair for pair in known if pair[0] not in (leaf, *path) and _is_issuer(pair[1], child)]
        if not issuers:
            break
        der, child = max(issuers, key=lambda pair: _seconds(pair[1], "not_valid_after"))
        path.append(der)
    return tuple(path)


def leads_to(certificates: Sequence[bytes], anchors: Sequence[bytes]) -> bool:
    """Tell whether the first of `certificates` is one of `anchors`, or leads to one through the others. Never raises."""
    roots = _loaded(anchors)
    rest = _loaded(certificates)
    reached = rest[:1] if certificates and rest and rest[0][0] == certificates[0] else []
    for der, certificate in reached:  # grows as it goes
        if any(der == root or _is_issuer(anchor, certificate) for root, anchor in roots):
            return True
        reached.extend(pair for pair in rest if pair not in reached and _is_issuer(pair[1], certificate))
    return False


@lru_cache(maxsize=64)
def split_trust(pem_bytes: bytes, where: str = "issuer-trust") -> Tuple[Tuple[bytes, ...], Tuple[bytes, ...]]:
    """Return the anchors (self-signed) and the intermediates of a file. Raises ConfigError if one can't be read."""
    try:
        pairs = [(der, _load(der)) for der in read(pem_bytes)]
    except (CertificateRefused, ValueError) as problem:
        raise ConfigError(f"{where}: {problem}", "replace the file by the CA's root certificate as PEM") from problem
    anchors = tuple(der for der, certificate in pairs if _is_issuer(certificate, certificate))
    return anchors, tuple(der for der, _ in pairs if der not in anchors)


def _loaded(ders: Sequence[bytes]) -> List[Tuple[bytes, Certificate]]:
    found = []
    for der in dict.fromkeys(ders):
        try:
            found.append((der, _load(der)))
        except ValueError:
            continue
    return found


def _is_issuer(parent: Certificate, child: Certificate) -> bool:
    """Tell whether `parent` issued `child`, by names, key identifiers and signature. Never raises.

    A signature that this host's OpenSSL does not check (SHA-1 under a distribution's policy) counts as good: this only
    sorts, the rehearsal judges.
    """
    try:
        if parent.subject != child.issuer:
            return False
        asked, given = _extension(child, "AuthorityKeyIdentifier"), _extension(parent, "SubjectKeyIdentifier")
        differ = asked and given and asked.key_identifier and asked.key_identifier != given.digest
        return not differ and _signature_fits(parent, child) is not False
    except Exception:  # noqa: BLE001 - whatever cryptography raises on these bytes, it is no issuer
        return False


def _signature_fits(parent: Certificate, child: Certificate) -> Optional[bool]:
    """Tell whether the signature of `child` is by the key of `parent`; None where that can't be checked here."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

    key: Any = parent.public_key()
    signed = (child.signature, child.tbs_certificate_bytes)
    pss = child.signature_algorithm_oid.dotted_string == _PSS
    try:
        digest: Any = getattr(hashes, _pss_hash(child) or "SHA1")() if pss else child.signature_hash_algorithm
        if isinstance(key, rsa.RSAPublicKey):
            # Windows and OpenSSL make the salt as long as the hash
            key.verify(*signed, padding.PSS(padding.MGF1(digest), digest.digest_size) if pss else padding.PKCS1v15(), digest)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(*signed, ec.ECDSA(digest))
        else:
            key.verify(*signed)
    except InvalidSignature:
        return False
    except UnsupportedAlgorithm:
        return None
    return True


def _pss_hash(certificate: Certificate) -> str:
    """Return the SHA-2 hash that RSASSA-PSS parameters name, "" if none (old cryptography does not read them)."""
    der = certificate.tbs_certificate_bytes
    body = element(der, 0, len(der))
    algorithm = next(part for part in elements(der, body.start, body.end) if part.tag == SEQUENCE)
    return next((name for oid, name in _SHA2.items() if oid in der[algorithm.start : algorithm.end]), "")
