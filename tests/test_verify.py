"""A certificate is accepted only if nothing is wrong with it, and all that is wrong is told at once; no bytes get past that."""

import base64
import contextlib
import datetime
import hashlib
import subprocess
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from scx_enroll import der as ders
from scx_enroll import verify
from scx_enroll.errors import CertificateRefused, ConfigError
from scx_enroll.request import RequestSpec, spki_of
from scx_enroll.verify import MAX_CERTIFICATES, MAX_CHAIN, Rules, chain, facts, judge, leads_to, pem, read, split_trust, warnings
from tests.lab import selfsigned

HOST = "host1.corp.example"
SPEC = RequestSpec(HOST, ("alias.corp.example",))
NOW = 1_900_000_000
DAY = 86400


def moment(seconds):
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).replace(tzinfo=None)


class Keys(dict):
    """Keys by kind and purpose, made when first asked for."""

    def __missing__(self, name):
        kind = name.partition(" ")[0]
        self[name] = ed25519.Ed25519PrivateKey.generate() if kind == "ed25519" else selfsigned.make_key(kind)
        return self[name]


KEYS = Keys()
KEY = "rsa:3072"
USAGE = {
    "digital_signature": True,
    "content_commitment": False,
    "key_encipherment": True,
    "data_encipherment": False,
    "key_agreement": False,
    "key_cert_sign": False,
    "crl_sign": False,
    "encipher_only": False,
    "decipher_only": False,
}


def distinguished(*names):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])


def make(
    *,
    cn=(HOST,),
    san=SPEC.dns_names,
    eku=(ExtendedKeyUsageOID.SERVER_AUTH,),
    usage=None,
    ca=False,
    start=NOW - DAY,
    end=NOW + 365 * DAY,
    key=KEY,
    signer="ec:secp256r1 ca",
    issuer="Lab CA",
    digest=None,
    more=(),
):
    """A certificate, DER, right unless told otherwise; None leaves an extension out."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(distinguished(*cn))
        .issuer_name(distinguished(issuer))
        .public_key(KEYS[key].public_key())
        .serial_number(0x2E0000001D)
        .not_valid_before(moment(start))
        .not_valid_after(moment(end))
    )
    if san is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in san]), critical=False)
    if eku is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(eku), critical=False)
    if usage is not None:
        builder = builder.add_extension(x509.KeyUsage(**{**USAGE, **usage}), critical=True)
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    for extension in more:
        builder = builder.add_extension(extension, critical=False)
    private = KEYS[signer]
    digest = None if isinstance(private, ed25519.Ed25519PrivateKey) else digest or hashes.SHA256()
    return builder.sign(private, digest).public_bytes(serialization.Encoding.DER)


def crl():
    return x509.CRLDistributionPoints([x509.DistributionPoint([x509.UniformResourceIdentifier("ldap:///CN=x")], None, None, None)])


def access(method):
    return x509.AuthorityInformationAccess([x509.AccessDescription(method, x509.UniformResourceIdentifier("http://pki.corp.example/x"))])


def judged(der, rules=None, now=NOW, key=KEY, spec=SPEC):
    return judge(der, spec, spki_of(KEYS[key]), rules or Rules(), now)


def whats(der, **kwargs):
    return [mismatch.what for mismatch in judged(der, **kwargs)]


def rewritten(der, old, new):
    """The certificate with some bytes exchanged everywhere; its signature no longer fits."""
    assert len(old) == len(new)
    assert old in der
    return der.replace(old, new)


# judging


def test_what_was_asked_for_is_accepted():
    """Nothing is wrong with a certificate as AD CS issues it for our request."""
    assert judged(make(usage={})) == ()
    assert judged(make(more=[crl()]), Rules(require_revocation=True, minimum_key="rsa:3072")) == ()
    assert judged(make(san=("HOST1.Corp.Example", "Alias.corp.example", "more.corp.example"), cn=("HOST1.corp.example",))) == ()
    assert judged(make(cn=("host1", HOST))) == ()


@pytest.mark.parametrize(
    ("change", "what", "detail"),
    [
        ({"key": "rsa:2048"}, "key", "not the agent's"),
        ({"cn": ("other.corp.example",)}, "cn", "CN is other.corp.example, not host1.corp.example"),
        ({"cn": ()}, "cn", "CN is missing"),
        ({"cn": ("host1",)}, "cn", "CN is host1"),
        ({"san": (HOST,)}, "san", "SAN lacks alias.corp.example"),
        ({"san": ("alias.corp.example",)}, "san", "SAN lacks host1.corp.example"),
        ({"san": ("*.corp.example",)}, "san", "SAN lacks host1.corp.example, alias.corp.example"),
        ({"san": None}, "san", "SAN lacks alias.corp.example"),
        ({"eku": None}, "eku", "lacks serverAuth"),
        ({"eku": (ExtendedKeyUsageOID.CLIENT_AUTH,)}, "eku", "lacks serverAuth"),
        ({"eku": (ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)}, "eku", "lacks serverAuth"),
        ({"usage": {"digital_signature": False}}, "eku", "lacks digitalSignature"),
        ({"ca": True}, "ca", "CA certificate"),
        ({"start": NOW + 1}, "dates", "not valid yet"),
        ({"end": NOW}, "dates", "expired"),
    ],
)
def test_one_thing_wrong_is_one_mismatch(change, what, detail):
    """Each fault is found, named with its stable word, and comes with the next act."""
    (mismatch,) = judged(make(**change))
    assert mismatch.what == what
    assert detail in mismatch.detail
    assert mismatch.hint
    assert mismatch.detail[0] + mismatch.detail[-1] != "."


def test_everything_wrong_is_told_at_once():
    """Each round with the CA's administrators takes days: one must do."""
    der = make(key="rsa:1024", cn=("x.y",), san=("x.y",), eku=None, ca=True, end=NOW - 1)
    found = whats(der, rules=Rules(require_revocation=True))
    assert found == ["key", "cn", "san", "eku", "ca", "dates", "key-strength", "revocation"]


def test_dates_include_the_first_second_and_exclude_the_last():
    """The bounds are exact: a certificate is valid from its first second on."""
    der = make(start=NOW, end=NOW + 10)
    assert [whats(der, now=NOW + at) for at in (-1, 0, 9, 10)] == [["dates"], [], [], ["dates"]]


def test_the_cn_may_be_waived_but_not_the_name():
    """Where a template can't give the CN the SAN must do; where there is no SAN, nothing names the host."""
    waived = Rules(require_cn=False)
    assert judged(make(cn=()), waived) == ()
    assert whats(make(cn=(), san=None), rules=waived) == ["san"]
    assert whats(make(cn=("x.y",), san=None), rules=waived, spec=RequestSpec(HOST)) == ["san"]
    assert whats(make(san=None), spec=RequestSpec(HOST)) == []
    assert whats(make(san=None), rules=waived, spec=RequestSpec(HOST)) == []


SIGNATURES = {
    "sha256WithRSA": ("2a864886f70d01010b", None),
    "SHA-1": ("2a864886f70d010105", "SHA-1"),
    "MD5": ("2a864886f70d010104", "MD5"),
    "MD2": ("2a864886f70d010102", "MD5 or older"),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_weak_signature_is_refused(name):
    """From OpenSSL's security level 1 on the agent would not start with it."""
    oid, weak = SIGNATURES[name]
    der = rewritten(make(signer="rsa:2048 ca"), bytes.fromhex("2a864886f70d01010b"), bytes.fromhex(oid))
    found = judged(der)
    assert [mismatch.what for mismatch in found] == (["signature"] if weak else [])
    assert all(weak in mismatch.detail for mismatch in found)


def test_a_weak_ecdsa_signature_is_refused():
    """SHA-1 under another identifier is SHA-1."""
    der = make()
    algorithm, weak = bytes.fromhex("300a06082a8648ce3d040302"), bytes.fromhex("300906072a8648ce3d0401")
    body = ders.element(der, ders.element(der, 0, len(der)).start, len(der))
    inner = der[body.start : body.end].replace(algorithm, weak)
    rest = der[body.end :].replace(algorithm, weak)
    assert whats(selfsigned._sequence(selfsigned._sequence(inner) + rest)) == ["signature"]


def pss_signed(digest="SHA256"):
    """A certificate with an RSASSA-PSS signature, made by openssl: old libraries can't."""
    key = KEYS["rsa:2048 pss"]
    config = f"[req]\ndistinguished_name=dn\nx509_extensions=v3\nprompt=no\n[dn]\nCN={HOST}\n[v3]\nsubjectAltName=DNS:{HOST}\nextendedKeyUsage=serverAuth\n"
    command = ["openssl", "req", "-x509", "-new", "-key", "/dev/stdin", "-config", "/dev/fd/3", "-days", "3650", f"-{digest.lower()}"]
    command += ["-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:-1", "-outform", "DER"]
    script = "exec 3<<END\n" + config + 'END\nexec "$@"'
    done = subprocess.run(["sh", "-c", script, "sh", *command], input=selfsigned.key_pem(key), capture_output=True, check=True)
    return done.stdout


@pytest.mark.parametrize(("digest", "expected"), [("SHA256", []), ("SHA512", []), ("SHA1", ["signature"])])
def test_pss_is_judged_by_its_hash(digest, expected):
    """AD CS makes RSASSA-PSS with "alternate signature format"; every library's version must say the same."""
    der = pss_signed(digest)
    found = judge(der, RequestSpec(HOST), facts(der).spki, Rules(), facts(der).not_before)
    assert [mismatch.what for mismatch in found] in (expected, ["ca", *expected])


@pytest.mark.parametrize(
    ("key", "minimum", "fits"),
    [
        ("rsa:1024", "", False),
        ("rsa:2048", "", True),
        ("rsa:2048", "rsa:2048", True),
        ("rsa:2048", "rsa:3072", False),
        ("rsa:3072", "rsa:4096", False),
        ("rsa:3072", "ec:secp256r1", True),
        ("rsa:3072", "ec:secp384r1", False),
        ("ec:secp256r1", "", True),
        ("ec:secp256r1", "rsa:3072", True),
        ("ec:secp256r1", "rsa:8192", False),
        ("ec:secp384r1", "ec:secp384r1", True),
        ("ec:secp384r1", "ec:secp521r1", False),
    ],
)
def test_a_key_weaker_than_asked_for_is_refused(key, minimum, fits):
    """minimum-key compares like with like by size, and RSA with EC by strength."""
    assert whats(make(key=key), rules=Rules(minimum_key=minimum), key=key) == ([] if fits else ["key-strength"])


@pytest.mark.parametrize(
    ("more", "fits"),
    [
        ([], False),
        ([crl()], True),
        ([access(AuthorityInformationAccessOID.OCSP)], True),
        ([access(AuthorityInformationAccessOID.CA_ISSUERS)], False),
    ],
)
def test_revocation_addresses_are_asked_for_when_required(more, fits):
    """A Management Server that can't check revocation refuses the agent; the issuer's address is no help in that."""
    assert whats(make(more=more), rules=Rules(require_revocation=True)) == ([] if fits else ["revocation"])
    assert whats(make(more=more)) == []


def test_an_unreadable_extension_is_a_mismatch_not_a_pass():
    """A check that can't be made counts as failed, and the others are made all the same."""
    der = rewritten(
        make(usage={}, end=NOW),
        bytes.fromhex("0603551d0f0101ff0404030205a0"),
        bytes.fromhex("0603551d0f0101ff04040502 05a0".replace(" ", "")),
    )
    found = whats(der)
    assert "unreadable" in found
    assert "dates" in found


# the agent's own certificate


@pytest.fixture(scope="module")
def own():
    return selfsigned.make_certificate(KEYS[KEY], "HOST1", "corp.example")


def test_the_agents_own_certificate_is_read(own):
    """It says v1 and has extensions, which strict parsers refuse; its dates, names and key are needed all the same."""
    (der,) = read(own)
    assert b"\xa0\x03\x02\x01\x02" not in der[:16]
    found = facts(der)
    assert found.serial == "1"
    assert found.names == ("host1", HOST)
    assert found.subject == found.issuer
    assert "DC=corp" in found.subject
    assert found.key == KEY
    assert found.spki == spki_of(KEYS[KEY])
    assert found.leaf == hashlib.sha256(der).hexdigest()
    assert found.not_after - found.not_before == (7300 + 365) * DAY


def test_the_agents_own_certificate_is_judged(own):
    """It has the FQDN as CN and serverAuth; what it lacks are further names, and a path to a root, which the rehearsal tells."""
    (der,) = read(own)
    found = judge(der, SPEC, spki_of(KEYS[KEY]), Rules(), facts(der).not_before)
    assert [mismatch.what for mismatch in found] == ["san"]


def test_names_can_not_write_into_the_log():
    """Whoever signs a certificate chooses its names: no line ends or escape sequences of theirs get out."""
    der = make(cn=("x\n<4>scx-enroll: installed\x1b[2J",))
    (mismatch,) = judged(der)
    for text in (mismatch.detail, facts(der).subject, *warnings(der, SPEC, Rules(require_cn=False))):
        assert text.isprintable()
        assert "scx-enroll: installed" in text


def test_a_certificate_with_a_tail_is_refused():
    """Its fingerprint would not be that of what is served."""
    assert whats(make() + b"\0") == ["unreadable"]
    with pytest.raises(CertificateRefused):
        facts(make() + b"\0")


def test_facts_are_those_of_the_certificate():
    """What status shows and the plan computes with; the fingerprint is of the bytes as they came."""
    der = make()
    found = facts(der)
    assert (found.subject, found.issuer, found.serial) == (f"CN={HOST}", "CN=Lab CA", "2e0000001d")
    assert (found.not_before, found.not_after) == (NOW - DAY, NOW + 365 * DAY)
    assert found.names == SPEC.dns_names
    assert facts(make(key="ec:secp384r1")).key == "ec:secp384r1"
    assert facts(make(key="ed25519 x")).key == "ed25519"
    with pytest.raises(CertificateRefused):
        facts(b"\x30\x03\x02\x01\x00")


def test_warnings_are_not_mismatches():
    """What the packages throw away at an upgrade, or SCOM may not like, is said but accepted."""
    relaxed = Rules(require_cn=False)
    assert warnings(make(), SPEC, Rules()) == ()
    assert "rsa:2048" in warnings(make(key="rsa:2048"), SPEC, Rules())[0]
    assert "ec:secp256r1" in warnings(make(key="ec:secp256r1"), SPEC, Rules())[0]
    assert "CN is missing" in warnings(make(cn=()), SPEC, relaxed)[0]
    assert warnings(make(), SPEC, relaxed) == ()
    assert warnings(b"\x30\x00", SPEC, Rules()) == ()


# reading


def openssl(*words, data):
    return subprocess.run(["openssl", *words], input=data, capture_output=True, check=True).stdout


@pytest.fixture(scope="module")
def two():
    return make(), make(issuer="Other CA")


def joined(two):
    return b"".join(map(pem, two))


def bag(two, form="DER"):
    return openssl("crl2pkcs7", "-nocrl", "-certfile", "/dev/stdin", "-outform", form, data=joined(two))


def bag_of(certificates):
    """The least that is a SignedData, around `certificates` with its tag."""
    signed = selfsigned._sequence(certificates)
    return selfsigned._sequence(bytes.fromhex("06092a864886f70d010702") + b"\xa0" + selfsigned._sequence(signed)[1:])


# The same certificates in every wrapping that they come in: the data, and how many there are.
WRAPPINGS = {
    "pem": (joined, 2),
    "crlf": (lambda two: joined(two).replace(b"\n", b"\r\n"), 2),
    "text around": (lambda two: b"subject=CN = x\n0\x82 -----\xff\n" + joined(two) + b"\ntrailing", 2),
    "x509 label": (lambda two: pem(two[0]).replace(b"CERTIFICATE", b"X509 CERTIFICATE"), 1),
    "one long line": (lambda two: pem(base64.b64decode(base64.b64encode(two[0]))).replace(b"\n", b"").replace(b"E-----M", b"E-----\nM"), 1),
    "der": (lambda two: two[0], 1),
    "bare base64": (lambda two: base64.encodebytes(two[0]).replace(b"\n", b"\r\n"), 1),
    "pkcs7": (bag, 2),
    "pkcs7 pem": (lambda two: bag(two, "PEM"), 2),
    "pkcs7 as certificate": (lambda two: bag(two, "PEM").replace(b"PKCS7", b"CERTIFICATE").replace(b"\n", b"\r\n"), 2),
    "pkcs7 bare base64": (lambda two: base64.b64encode(bag(two)), 2),
    "pkcs7 with an attribute certificate": (lambda two: bag_of(b"\xa0" + selfsigned._sequence(b"\xa2\x01\0" + two[0])[1:]), 1),
    "with a key": (lambda two: selfsigned.key_pem(KEYS[KEY]) + joined(two), 2),
    "nothing": (lambda _: b"", 0),
    "a page": (lambda _: b"<HTML><BODY>Denied</BODY></HTML>", 0),
    "a key": (lambda _: selfsigned.key_pem(KEYS[KEY]), 0),
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_certificates_are_read_from_every_wrapping(two, name):
    """AD CS, browsers, openssl and administrators each have their own; the bytes of the certificate are never changed."""
    wrap, count = WRAPPINGS[name]
    data, expected = wrap(two), two[:count]
    assert sorted(read(data)) == sorted(expected)
    if "pkcs7" not in name:
        assert read(data) == expected  # order is kept where there is one


DAMAGED = {
    "pem cut off": lambda two: pem(two[0])[: len(pem(two[0])) // 2],
    "pem cut off behind a whole one": lambda two: joined(two)[:-30],
    "no end line": lambda two: pem(two[0]).replace(b"END CERT", b"END CRET"),
    "base64 damaged": lambda two: pem(two[0]).replace(b"\n", b"\n!", 3),
    "base64 cut": lambda two: b"\n".join(pem(two[0]).split(b"\n")[:5]) + b"\n-----END CERTIFICATE-----\n",
    "der cut off": lambda two: two[0][:-1],
    "der with a tail": lambda two: two[0] + b"\0",
    "pkcs7 cut off": lambda two: bag(two)[:-5],
    "pkcs7 with a tail": lambda two: bag(two) + b"\0",
    "bare base64 cut": lambda two: base64.b64encode(two[0])[:-8],
    "another sequence": lambda _: b"\x30\x03\x02\x01\x00",
    "another content": lambda two: bag(two).replace(bytes.fromhex("2a864886f70d010702"), bytes.fromhex("2a864886f70d010703"), 1),
    "indefinite length": lambda two: b"\x30\x80" + two[0][4:] + b"\0\0",
    "indefinite length inside": lambda two: bag_of(b"\xa0\x80" + two[0] + b"\0\0"),
    "too many": lambda two: pem(two[0]) * (MAX_CERTIFICATES + 1),
    "empty block": lambda _: b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
    "many beginnings": lambda _: b"-----BEGIN CERTIFICATE-----\n" * 20000,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_half_a_certificate_is_refused(two, name):
    """A truncated download must not look like a file without certificates."""
    with pytest.raises(CertificateRefused) as refused:
        read(DAMAGED[name](two))
    assert refused.value.hint


def test_pem_is_what_the_agent_reads(two):
    """One block, LF, 64 columns; openssl finds the same certificate."""
    text = pem(two[0])
    assert b"\r" not in text
    assert text.count(b"-----BEGIN CERTIFICATE-----\n") == 1
    assert max(map(len, text.split(b"\n"))) == 64
    assert openssl("x509", "-outform", "DER", data=text) == two[0]
    assert read(text) == two[:1]


# sorting


def authority(name, key, signer=None, issuer=None, *, end=NOW + 3650 * DAY, aki=True, ski=True, digest=None):
    more = [x509.SubjectKeyIdentifier.from_public_key(KEYS[key].public_key())] if ski else []
    if aki:
        more.append(x509.AuthorityKeyIdentifier.from_issuer_public_key(KEYS[signer or key].public_key()))
    return make(
        cn=(name,), san=None, eku=None, ca=True, key=key, signer=signer or key, issuer=issuer or name, end=end, more=more, digest=digest
    )


ROOT, SUB, OTHER = "ec:secp256r1 root", "ec:secp256r1 ca", "ec:secp256r1 other"


@pytest.fixture(scope="module")
def pki():
    """Root, two of its subordinates (old and renewed with the same key), a namesake with another key, and a leaf."""
    return {
        "root": authority("Root", ROOT, aki=False),
        "sub": authority("Lab CA", SUB, ROOT, "Root"),
        "renewed": authority("Lab CA", SUB, ROOT, "Root", end=NOW + 4000 * DAY),
        "namesake": authority("Lab CA", OTHER, ROOT, "Root", end=NOW + 9000 * DAY),
        "stranger": authority("Strange", OTHER),
        "leaf": make(more=[x509.AuthorityKeyIdentifier.from_issuer_public_key(KEYS[SUB].public_key())]),
        "plain leaf": make(),
    }


def test_the_chain_is_built_whatever_the_bags_order(pki):
    """The PKCS#7 holds leaf, root and intermediates in any order; roots stay out, they come from the configuration only."""
    bag = [pki["root"], pki["stranger"], pki["leaf"], pki["sub"]]
    assert chain(pki["leaf"], bag) == (pki["sub"],)
    assert chain(pki["leaf"], bag[::-1]) == (pki["sub"],)
    assert chain(pki["leaf"], []) == ()
    assert chain(pki["leaf"], [b"", b"\x30\x00", pki["sub"]]) == (pki["sub"],)
    assert chain(b"junk", bag) == ()


def test_of_several_issuers_the_one_living_longest_is_taken(pki):
    """A CA renewed with the same key: both verify, and the newer saves a second change."""
    assert chain(pki["leaf"], [pki["sub"], pki["renewed"]]) == (pki["renewed"],)
    assert chain(pki["leaf"], [pki["renewed"], pki["sub"]]) == (pki["renewed"],)


@pytest.mark.parametrize("leaf", ["leaf", "plain leaf"])
def test_a_namesake_with_another_key_is_no_issuer(pki, leaf):
    """A CA renewed with a new key has the same name: by identifier, or where there is none by signature, it is passed over."""
    assert chain(pki[leaf], [pki["namesake"], pki["sub"]]) == (pki["sub"],)
    assert chain(pki[leaf], [pki["namesake"]]) == ()


def test_an_issuer_that_the_leaf_does_not_name_is_passed_over(pki):
    """OpenSSL goes by the key identifier first: what it would not follow is no use in the chain."""
    odd = make(more=[x509.AuthorityKeyIdentifier.from_issuer_public_key(KEYS[OTHER].public_key())])
    assert chain(odd, [pki["sub"]]) == ()


def test_a_chain_through_cross_certificates_ends():
    """Old and new root certify each other: no circle is walked, and the self-signed ones stay out."""
    new, old = "ec:secp256r1 newroot", ROOT
    pool = [
        authority("Root", old),
        authority("Root", new),
        authority("Root", new, old),
        authority("Root", old, new),
        authority("Lab CA", SUB, new, "Root"),
    ]
    found = chain(make(), pool)
    assert found[:2] == (pool[4], pool[2])
    assert len(found) <= 3
    assert not set(found) & {pool[0], pool[1]}


def test_a_chain_is_bounded():
    """A bag made to be walked for ever is not."""
    names = ["Lab CA", *(f"CA {number}" for number in range(12))]
    pool = [authority(name, SUB, SUB, issuer) for name, issuer in zip(names, names[1:])]
    assert len(chain(make(), pool)) == MAX_CHAIN


def test_whether_the_cas_chain_ends_in_our_trust(pki):
    """Asked before a request is sent: a certificate that leads elsewhere would be issued and then refused."""
    assert leads_to([pki["sub"], pki["root"]], [pki["root"]])
    assert leads_to([pki["sub"]], [pki["root"]])
    assert leads_to([pki["root"]], [pki["root"]])
    assert leads_to([pki["sub"]], [pki["sub"]])
    assert not leads_to([pki["sub"], pki["root"]], [pki["stranger"]])
    assert not leads_to([pki["stranger"], pki["sub"], pki["root"]], [pki["root"]])
    assert not leads_to([pki["sub"]], [])
    assert not leads_to([], [pki["root"]])
    assert not leads_to([b"junk", pki["root"]], [pki["root"]])
    assert not leads_to([pki["sub"]], [b"junk"])


def test_trust_reaches_over_cross_certificates():
    """The operator still trusts the old root only; the new one is certified by it."""
    new, old = "ec:secp256r1 newroot", ROOT
    anchor, cross = authority("Root", old), authority("Root", new, old)
    issuing = authority("Lab CA", SUB, new, "Root")
    assert leads_to([issuing, authority("Root", new), cross], [anchor])
    assert not leads_to([issuing, authority("Root", new)], [anchor])


def test_a_root_that_only_has_the_right_name_is_no_root(pki):
    """Names are free for anyone to write; the signature decides."""
    fake = authority("Root", OTHER, aki=False, ski=False)
    assert not leads_to([pki["sub"]], [fake])


def test_trust_is_split_into_anchors_and_intermediates(pki):
    """Whatever is put into a client's store is trusted, so only self-signed certificates of the file may go there."""
    anchors, intermediates = split_trust(pem(pki["sub"]) + pem(pki["root"]) + pem(pki["stranger"]))
    assert anchors == (pki["root"], pki["stranger"])
    assert intermediates == (pki["sub"],)
    assert split_trust(b"") == ((), ())


def test_a_cross_certificate_is_no_anchor():
    """It bears the root's name on both sides, but another key signed it."""
    for ids in (True, False):
        cross = authority("Root", "ec:secp256r1 newroot", ROOT, "Root", aki=ids, ski=ids)
        assert split_trust(pem(cross)) == ((), (cross,))


def test_trust_that_can_not_be_read_is_a_mistake_of_the_configuration(pki):
    """The operator wrote the file, or fetched it: the message says which setting."""
    for data in (pem(pki["root"])[:-40], pem(b"\x30\x02\x30\x00")):
        with pytest.raises(ConfigError, match="issuer-trust"):
            split_trust(data)


@pytest.mark.parametrize("kind", ["rsa:2048", "rsa:3072", "ec:secp256r1", "ec:secp384r1", "ec:secp521r1", "ed25519"])
def test_every_kind_of_signature_is_checked(kind):
    """By key and hash as the certificate says; one changed bit makes it another's."""
    key = f"{kind} signer"
    root = authority("Root", key, digest=hashes.SHA384())
    child = authority("Lab CA", SUB, key, "Root", aki=False)
    assert leads_to([child], [root])
    broken = bytearray(child)
    broken[-1] ^= 1
    assert not leads_to([bytes(broken)], [root])
    assert split_trust(pem(root))[0] == (root,)


@pytest.mark.parametrize("digest", ["SHA256", "SHA512"])
def test_pss_signatures_are_checked(digest):
    """Also where the library does not read their parameters."""
    der = pss_signed(digest)
    assert split_trust(pem(der))[0] == (der,)
    broken = bytearray(der)
    broken[-1] ^= 1
    if facts(bytes(broken)).subject:
        key = x509.load_der_x509_certificate(der)
        assert verify._signature_fits(key, key) is True
        assert verify._signature_fits(key, x509.load_der_x509_certificate(bytes(broken))) is False


# any bytes

SEEDS = [make(usage={}, more=[crl(), access(AuthorityInformationAccessOID.OCSP)]), make(key="ec:secp256r1", san=None), pss_signed()]
SEEDS.append(read(selfsigned.make_certificate(KEYS[KEY], "h", "d"))[0])


@st.composite
def mutated(draw):
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(data) - 1))
        how = draw(st.sampled_from(["set", "flip", "cut", "repeat"]))
        if how == "set":
            data[at] = draw(st.integers(0, 255))
        elif how == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del data[at : at + draw(st.integers(1, 8))]
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 8))]
        if not data:
            break
    return bytes(data)


anything = st.one_of(mutated(), st.binary(max_size=80), mutated().map(pem), mutated().map(base64.b64encode))


@settings(max_examples=400)
@given(anything)
def test_no_bytes_escape_the_judgement(data):
    """Whatever a server or a file holds: mismatches or none, facts or a refusal, never a traceback."""
    found = judge(data, SPEC, spki_of(KEYS[KEY]), Rules(require_revocation=True, minimum_key="ec:secp384r1"), NOW)
    assert all(mismatch.what and mismatch.detail for mismatch in found)
    warnings(data, SPEC, Rules(require_cn=False))
    chain(data, [data, *SEEDS])
    leads_to([data], SEEDS)
    leads_to([SEEDS[0]], [data])
    try:
        facts(data)
    except CertificateRefused:
        pass
    try:
        for der in read(data):
            facts(der)
    except CertificateRefused:
        pass
    try:
        split_trust(data)
    except ConfigError:
        pass


@given(mutated())
def test_another_certificate_than_the_one_judged_is_never_accepted(data):
    """Of the mutations only those pass that leave all that was checked as it was."""
    if judged(data):
        return
    found = facts(data)
    assert found.spki == spki_of(KEYS[KEY])
    assert set(SPEC.dns_names) <= set(found.names)
    assert found.not_before <= NOW < found.not_after


def test_reading_hostile_text_takes_no_longer_than_its_length():
    """A CA's answer may have 1 MiB, and a run that hangs holds the lock."""
    started = time.process_time()
    for body in (b"MI" + b" " * (1 << 20) + b"!", b"MI" + b"A" * (1 << 20) + b"=!", b"-----BEGIN CERTIFICATE-----" * 30000):
        with contextlib.suppress(CertificateRefused):
            verify.read(body)
    assert time.process_time() - started < 5, "72 s for 4 kB, once"
