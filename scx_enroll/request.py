"""The certificate this host wants, and the request for it: built here, and what `verify` judges by."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Mapping, Tuple, Union

from scx_enroll.errors import AgentNotReady, ConfigError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    PrivateKey = Union[rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey]

MAX_CN = 64  # characters: ub-common-name, RFC 5280 appendix A.1
MAX_DNS_NAME = 253  # characters: 255 octets in the wire format, RFC 1035 section 2.3.4
MAX_LABEL = 63  # characters, RFC 1035 section 2.3.4
SHORT_NAME = "{hostname}"

# Curves that AD CS and the agent both know, with the hash that fits their strength (FIPS 186-5, section 6.1.1).
CURVES: Mapping[str, str] = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", re.ASCII)
_KEY = re.compile(rb"-----BEGIN ([A-Z ]*)PRIVATE KEY-----.*?-----END \1PRIVATE KEY-----", re.DOTALL)
_CSR = re.compile(rb"-----BEGIN (NEW )?CERTIFICATE REQUEST-----([^-]*)-----END (?:NEW )?CERTIFICATE REQUEST-----")
_PLACEHOLDERS = ("example.com", "example.net", "example.org", "localdomain")  # RFC 2606 section 3, and hosts(5)'s


@dataclass(frozen=True)
class RequestSpec:
    """What the certificate must name: the FQDN as CN and in the SAN, the alternative names in the SAN."""

    fqdn: str
    alternative_names: Tuple[str, ...] = ()

    @property
    def dns_names(self) -> Tuple[str, ...]:
        """The names of the SAN, the FQDN first, without repeats."""
        return tuple(dict.fromkeys((self.fqdn, *self.alternative_names)))


def check_dns_name(name: str, where: str) -> str:
    """Return `name` in lower case if it may stand in a SAN (short names may); `where` it was found goes into messages.

    Raises ConfigError for what is no host name (RFC 1123 section 2.1), or no name of one particular host.
    """
    folded = name.lower()
    labels = folded.split(".")
    if ":" in folded or labels[-1].isdigit():
        why = "is an address, not a name"
    elif folded.endswith("."):
        why = "ends in a dot"
    elif "*" in folded:
        why = "is a wildcard"
    elif len(folded) > MAX_DNS_NAME or any(len(label) > MAX_LABEL or not _LABEL.fullmatch(label) for label in labels):
        why = f"is not a host name: labels are up to {MAX_LABEL} letters, digits and inner hyphens"
    elif labels[0] == "localhost" or any(f".{folded}".endswith(f".{known}") for known in _PLACEHOLDERS):
        why = "is a placeholder"
    else:
        return folded
    raise ConfigError(f"{where}: {name!r} {why}", "give the name that the Management Server connects to")


def check_fqdn(name: str, where: str) -> str:
    """Return `name` in lower case if it can be a certificate's CN and name this host everywhere; ConfigError if not."""
    folded = check_dns_name(name, where)
    if "." not in folded:
        raise ConfigError(f"{where}: {name!r} is a short name", "give the FQDN that the Management Server connects to")
    if len(folded) > MAX_CN:
        hint = "choose a shorter name, and let the Management Server connect to that"
        raise ConfigError(f"{where}: {name!r} is longer than the {MAX_CN} characters of a CN", hint)
    return folded


def expand(configured: str, short: str) -> str:
    """Return the FQDN that `configured` means on the host called `short`; ConfigError as `check_fqdn`."""
    return check_fqdn(configured.replace(SHORT_NAME, short.partition(".")[0]), "name")


@lru_cache(maxsize=4)
def load_key(pem: bytes) -> PrivateKey:
    """Return the first private key of a PEM file, as the agent reads it. Raises AgentNotReady with the reason."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    found = _KEY.search(pem)
    if not found:
        raise AgentNotReady("the agent's key file holds no PEM private key", "make a new key: scxsslconfig -f")
    if found[1] == b"ENCRYPTED " or b"Proc-Type: 4,ENCRYPTED" in found[0]:
        raise AgentNotReady("the agent's key is encrypted, which the agent can't read", "make a new key: scxsslconfig -f")
    try:
        key: Any = _load_unchecked(found[0] + b"\n")
        if isinstance(key, rsa.RSAPrivateKey):
            key.public_key().public_numbers().public_key()  # numbers that make no public key
    except (ValueError, TypeError, UnsupportedAlgorithm) as problem:
        raise AgentNotReady("the agent's key can't be read", "make a new key: scxsslconfig -f") from problem
    if isinstance(key, rsa.RSAPrivateKey) or (isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in CURVES):
        return key
    raise AgentNotReady("the agent's key is neither RSA nor on a NIST curve", "make a new key: scxsslconfig -f")


def make_key(kind: str) -> bytes:
    """Return a new private key of a kind such as "rsa:3072", as PEM (PKCS#8) without a passphrase, which the agent can't give."""
    from cryptography.hazmat.backends import default_backend
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    family, _, detail = kind.partition(":")
    key: Any
    if family == "rsa":
        key = rsa.generate_private_key(65537, int(detail), default_backend())
    else:
        key = ec.generate_private_key(getattr(ec, detail.upper())(), default_backend())
    made: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return made


def _load_unchecked(pem: bytes) -> Any:
    """Load a private key without RSA_check_key, a tenth of a second that no look has a use for. `build_csr` sees what the key signs."""
    import cryptography
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if int(cryptography.__version__.partition(".")[0]) >= 39:
        return load_pem_private_key(pem, password=None, unsafe_skip_rsa_key_validation=True)
    from cryptography.hazmat.backends.openssl.backend import backend

    if hasattr(backend, "_rsa_skip_check_key"):
        backend._rsa_skip_check_key = True  # noqa: SLF001 - cryptography 3.4 to 38 offer no other way
    return load_pem_private_key(pem, password=None)


def spki_of(key_or_certificate: Any) -> str:
    """Return the SHA-256 of the SubjectPublicKeyInfo of a private key, public key or certificate."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = key_or_certificate.public_key() if hasattr(key_or_certificate, "public_key") else key_or_certificate
    return hashlib.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


@dataclass(frozen=True)
class Foreign:
    """A certificate request that another host made: as PEM, what it asks for, its public key, and the SHA-256 of its DER.

    `key` is its kind, as "rsa:3072" or "ec:secp256r1".
    """

    pem: bytes
    spec: RequestSpec
    spki: str
    digest: str
    key: str


def load_csr(data: bytes, name: str) -> Foreign:
    """Return the one request in a file (PEM or DER). Raises UsageError for what is none, or can't become a SCOM agent's certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    hint = "make it on that host, e.g.: openssl req -new -key KEY -subj /CN=its.fqdn -out host.csr"
    blocks = _CSR.findall(data)
    try:
        der = base64.b64decode(b"".join(blocks[0][1].split()), validate=True) if blocks else data
        csr: Any = x509.load_der_x509_csr(der)
        sound = csr.is_signature_valid and len(blocks) < 2  # which of two is meant?
        spki, sans, common = spki_of(csr), _names_asked(csr), [str(a.value) for a in csr.subject if a.oid.dotted_string == "2.5.4.3"]
        made, key = csr.public_bytes(Encoding.PEM), kind_of(csr.public_key())
    except Exception as problem:
        raise UsageError(f"{name} holds no certificate request that can be read", hint) from problem
    if not sound:
        raise UsageError(f"{name} holds more than one request, or its signature is wrong: it was damaged on its way", hint)
    if key.partition(":")[0] not in ("rsa", "ec"):
        raise UsageError(f"the key of {name} is {key}: AD CS takes RSA, and the NIST curves", hint)
    fitting = [cn for cn in common if "." in cn] or common or list(sans)
    if not fitting:
        raise UsageError(f"{name} asks for no name", hint)
    try:
        fqdn = check_fqdn(fitting[0], name)
        spec = RequestSpec(fqdn, tuple(check_dns_name(san, name) for san in sans))
    except ConfigError as problem:
        raise UsageError(problem.message, "make the request for the name that the Management Server connects to") from problem
    if sans and fqdn not in spec.alternative_names:
        raise UsageError(f"the SAN of {name} lacks its CN {fqdn}, so the certificate would not be for that name", hint)
    return Foreign(made, spec, spki, hashlib.sha256(der).hexdigest(), key)


def kind_of(public_key: Any) -> str:
    """Return the kind of a public key: "rsa:3072", "ec:secp256r1", "ed25519"."""
    if hasattr(public_key, "curve"):
        return f"ec:{public_key.curve.name}"
    kind = type(public_key).__name__.strip("_").replace("PublicKey", "").lower()
    return f"{kind}:{public_key.key_size}" if hasattr(public_key, "key_size") else kind


def _names_asked(csr: Any) -> Tuple[str, ...]:
    from cryptography import x509

    for extension in csr.extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            return tuple(extension.value.get_values_for_type(x509.DNSName))
    return ()


def build_csr(spec: RequestSpec, key: PrivateKey) -> bytes:
    """Return a PKCS#10 request as PEM with LF, signed by `key`: CN, SAN, serverAuth and a critical key usage.

    A template that builds the names from AD ignores these; one that takes them from the request needs them all here,
    since the `SAN:` attribute is never sent (facts/adcs.md section 7). Raises AgentNotReady for a key whose signature does not verify.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    is_rsa = isinstance(key, rsa.RSAPrivateKey)
    algorithm = hashes.SHA256() if isinstance(key, rsa.RSAPrivateKey) else getattr(hashes, CURVES[key.curve.name])()
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=is_rsa,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    names = [x509.DNSName(name) for name in spec.dns_names]
    builder = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, spec.fqdn)]))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(usage, critical=True)
    )
    damaged = AgentNotReady("the agent's key is damaged: what it signs does not verify", "make a new key: scxsslconfig -f")
    try:
        made = builder.sign(key, algorithm)
        good = made.is_signature_valid
    except Exception as problem:  # whatever OpenSSL and cryptography make of such numbers
        raise damaged from problem
    if not good:
        raise damaged
    return made.public_bytes(Encoding.PEM)
