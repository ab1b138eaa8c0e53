"""Channel binding, and the tokens and keys around it: what is computed from bytes that come from a server or stand in a keytab."""

import base64
import hashlib
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scx_enroll import binding, challenges, der, keytab, spnego

NULL = "0500"
SHA1, SHA224, SHA256, SHA384, SHA512 = "2b0e03021a", "608648016503040204", "608648016503040201", "608648016503040202", "608648016503040203"


def encoded(tag, content):
    """DER, written here by itself: definite lengths up to 65535."""
    size = len(content)
    length = bytes([size]) if size < 128 else bytes([0x81, size]) if size < 256 else b"\x82" + size.to_bytes(2, "big")
    return bytes([tag]) + length + content


def algorithm(oid, parameters=b""):
    return encoded(0x30, encoded(0x06, bytes.fromhex(oid)) + parameters)


def certificate(signature, filling=b"to be signed"):
    return encoded(0x30, encoded(0x30, encoded(0x04, filling)) + signature + encoded(0x03, b"\0signature"))


def pss(digest="", *, further=b""):
    named = encoded(0xA0, algorithm(digest, bytes.fromhex(NULL))) if digest else b""
    return algorithm("2a864886f70d01010a", encoded(0x30, named + further))


ALGORITHMS = {
    "RSA with MD5": (algorithm("2a864886f70d010104", bytes.fromhex(NULL)), "sha256"),
    "RSA with SHA-1": (algorithm("2a864886f70d010105", bytes.fromhex(NULL)), "sha256"),
    "RSA with SHA-224": (algorithm("2a864886f70d01010e", bytes.fromhex(NULL)), "sha224"),
    "RSA with SHA-256": (algorithm("2a864886f70d01010b", bytes.fromhex(NULL)), "sha256"),
    "RSA with SHA-384": (algorithm("2a864886f70d01010c", bytes.fromhex(NULL)), "sha384"),
    "RSA with SHA-512": (algorithm("2a864886f70d01010d", bytes.fromhex(NULL)), "sha512"),
    "ECDSA with SHA-1": (algorithm("2a8648ce3d0401"), "sha256"),
    "ECDSA with SHA-256": (algorithm("2a8648ce3d040302"), "sha256"),
    "ECDSA with SHA-384": (algorithm("2a8648ce3d040303"), "sha384"),
    "ECDSA with SHA-512": (algorithm("2a8648ce3d040304"), "sha512"),
    "Ed25519": (algorithm("2b6570"), "sha256"),
    "RSA-PSS, SHA-1 by default": (pss(), "sha256"),
    "RSA-PSS, SHA-1 by name": (pss(SHA1), "sha256"),
    "RSA-PSS with SHA-224": (pss(SHA224), "sha224"),
    "RSA-PSS with SHA-256": (pss(SHA256), "sha256"),
    "RSA-PSS with SHA-384, and MGF1 with another": (pss(SHA384, further=encoded(0xA1, algorithm("2a864886f70d010108", algorithm(SHA256)))), "sha384"),
    "RSA-PSS with SHA-512": (pss(SHA512), "sha512"),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_digest_of_the_certificate_s_own_signature_binds_the_channel(name):
    """RFC 5929 section 4.1; another digest is another binding, which a hardened server refuses."""
    signature, digest = ALGORITHMS[name]
    whole = certificate(signature)
    assert binding.digest_of(whole) == digest
    assert binding.end_point(whole) == b"tls-server-end-point:" + hashlib.new(digest, whole).digest()
    assert digest in binding.named(whole)


@pytest.mark.parametrize("kind", ["sha256", "sha384", "sha512", "sha1", "pss:sha256", "pss:sha384", "pss:sha512"])
def test_the_digest_is_read_from_what_openssl_makes(kind, tmp_path):
    """Certificates written here could share a mistake with what reads them."""
    digest = kind.rpartition(":")[2]
    padding = ["-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:-1"] if kind.startswith("pss") else []
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-subj", "/CN=ca", f"-{digest}", *padding]
    subprocess.run([*words, "-outform", "der", "-out", "ca.der"], cwd=tmp_path, check=True, capture_output=True)
    assert binding.digest_of((tmp_path / "ca.der").read_bytes()) == {"sha1": "sha256"}.get(digest, digest)


@pytest.mark.parametrize(
    "wrong",
    [
        b"", b"\x30", b"no certificate", certificate(algorithm("2a03")), certificate(pss("2a03")), certificate(b""), certificate(algorithm(""))[:-3],
        certificate(algorithm("2a864886f70d01010b")) + b"\0", encoded(0x30, b"\x1f\x81\x01\x00"), encoded(0x30, b"\x30\x80\x00\x00"),
    ],
)  # fmt: skip
def test_a_certificate_of_a_kind_without_binding_is_refused(wrong):
    """Signing in without a binding, or with a guessed one, would look like a wrong password."""
    with pytest.raises(binding.Unbindable):
        binding.end_point(wrong)
    assert binding.named(wrong) == ""


@given(st.binary(max_size=300))
def test_no_bytes_of_a_server_break_the_reading(data):
    """Whatever a server calls its certificate, token or offer: documented errors alone."""
    for read in (binding.end_point, binding.digest_of):
        try:
            read(data)
        except binding.Unbindable:
            pass
    assert isinstance(spnego.answer(data), bytes)
    header = data.decode("latin-1")
    assert len(challenges.schemes(header)) <= challenges.MAX_SCHEMES
    assert isinstance(challenges.token(header, "Negotiate"), bytes)
    try:
        list(der.contents(data))
    except ValueError:
        pass


# -- SPNEGO ---------------------------------------------------------------------------------------------------------

KERBEROS = bytes.fromhex("06092a864886f712010202")


@given(st.binary(max_size=70000))
def test_the_envelope_of_the_first_token(token):
    """RFC 4178 section 4.2.1: one mechanism, Kerberos, and its token; every length of a length."""
    sent = spnego.init(token)
    ((tag, content),) = der.contents(sent)
    (oid, inner) = der.contents(content)
    assert (tag, oid, inner[0]) == (0x60, (0x06, bytes.fromhex("2b0601050502")), 0xA0)
    ((_, fields),) = der.contents(inner[1])
    mechanisms, carried = der.contents(fields)
    assert mechanisms == (0xA0, encoded(0x30, KERBEROS))
    assert list(der.contents(carried[1])) == [(0x04, token)]
    assert (carried[0], len(sent)) == (0xA2, len(der.encoded(0x60, content)))


@pytest.mark.parametrize(
    ("answer", "token"),
    [
        (encoded(0xA1, encoded(0x30, encoded(0xA0, b"\x0a\x01\x00") + encoded(0xA1, KERBEROS) + encoded(0xA2, encoded(0x04, b"AP-REP")))), b"AP-REP"),
        (encoded(0xA1, encoded(0x30, encoded(0xA2, encoded(0x04, b"x" * 300)))), b"x" * 300),
        (encoded(0xA1, encoded(0x30, encoded(0xA0, b"\x0a\x01\x02"))), b""),  # rejected
        (encoded(0xA1, b""), b""),
        (encoded(0xA1, encoded(0x30, encoded(0xA2, b""))), b""),
        (encoded(0x60, KERBEROS + b"\x02\x00raw"), encoded(0x60, KERBEROS + b"\x02\x00raw")),  # no envelope: Kerberos' own
        (b"\xa1\x7f", b""),
        (b"", b""),
    ],
)
def test_the_server_s_token_comes_out_of_its_envelope(answer, token):
    """Its proof is in there, or the reason of its refusal."""
    assert spnego.answer(answer) == token


# -- what a server offers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "schemes"),
    [
        ("Negotiate, NTLM", ("Negotiate", "NTLM")),
        ("Negotiate", ("Negotiate",)),
        ('Basic realm="ca, Negotiate, NTLM"', ("Basic",)),
        ('Basic realm="a \\" b, NTLM", Negotiate', ("Basic", "Negotiate")),
        ('Digest realm="r", nonce="n", qop="auth", charset=UTF-8, Negotiate', ("Digest", "Negotiate")),
        ('Digest realm = "r", qop = "auth", NTLM', ("Digest", "NTLM")),
        ("Negotiate oYG2MIGzoAMKAQ==, NTLM TlRMTVNTUAAC", ("Negotiate", "NTLM")),
        ("negotiate,negotiate,NTLM", ("negotiate", "NTLM")),
        ("Negotiate:Kerberos", ("Negotiate:Kerberos",)),
        ("", ()),
        (", ,", ()),
        ("a b c, NTLM", ("another", "NTLM")),
        ("Basic, Bearer, Digest, DPoP, HOBA, Mutual, NTLM, Negotiate", ("Basic", "Bearer", "Digest", "DPoP", "HOBA", "Mutual")),
    ],
)
def test_what_a_server_offers_to_sign_in_by(header, schemes):
    """The operator is shown these words; a realm is no scheme, whatever stands in it."""
    assert challenges.schemes(header) == schemes


@given(st.binary(max_size=200))
def test_a_token_of_any_length_is_found(token):
    """Two of three tokens end with padding, which looks like a parameter."""
    header = f"NTLM, Negotiate {base64.b64encode(token).decode()}, Basic realm=\"x\""
    assert challenges.token(header, "negotiate") == token
    assert challenges.token(header, "NTLM") == challenges.token(header, "Basic") == b""
    assert challenges.token("Negotiate A", "Negotiate") == challenges.token("Negotiate oY!", "Negotiate") == b""
    assert challenges.offers(header, "BASIC")
    assert not challenges.offers(header, "Digest")


# -- keytabs --------------------------------------------------------------------------------------------------------


def counted(data):
    return struct.pack(">H", len(data)) + data


def entry(principal, kvno=2, *, key=b"\x11" * 32, old=False):
    name, _, realm = principal.rpartition("@")
    parts = name.split("/")
    body = struct.pack(">H", len(parts)) + counted(realm.encode()) + b"".join(counted(part.encode()) for part in parts)
    body += struct.pack(">IIBH", 1, 1764115200, kvno & 0xFF, 18) + counted(key)
    return struct.pack(">i", len(body) + (0 if old else 4)) + body + (b"" if old else struct.pack(">I", kvno))


def hole(size):
    return struct.pack(">i", -size) + b"\0" * size


JOINED = b"\x05\x02" + b"".join(
    entry(f"{name}@CORP.EXAMPLE", kvno) for kvno in (2, 3) for name in ("HOST1$", "host/HOST1", "host/host1.corp.example", "RestrictedKrbHost/HOST1")
)


def chosen(data, wanted="", host="host1"):
    return keytab.machine(keytab.parse(data), wanted, host)


def test_the_machine_s_newest_key_is_found_among_its_services():
    """What adcli writes: the account's keys of now and before, and those of host/ and others, which are no client names in AD."""
    assert (chosen(JOINED).principal, chosen(JOINED).kvno) == ("HOST1$@CORP.EXAMPLE", 3)
    assert chosen(JOINED).realm == "CORP.EXAMPLE"
    assert chosen(JOINED, host="renamed.corp.example").principal == "HOST1$@CORP.EXAMPLE"


@pytest.mark.parametrize("wanted", ["HOST1$", "HOST1$@CORP.EXAMPLE"])
def test_a_configured_principal_is_taken_with_or_without_its_realm(wanted):
    """Both are how people write it."""
    assert chosen(JOINED, wanted).principal == "HOST1$@CORP.EXAMPLE"
    assert chosen(b"\x05\x02" + entry("svc-enroll@CORP.EXAMPLE"), "svc-enroll").principal == "svc-enroll@CORP.EXAMPLE"


def test_of_several_machines_this_host_s_is_taken():
    """A keytab may hold a cluster's account, too."""
    data = JOINED + entry("CLUSTER7$@CORP.EXAMPLE")
    assert chosen(data).principal == "HOST1$@CORP.EXAMPLE"
    assert chosen(data, host="HOST1.corp.example").principal == "HOST1$@CORP.EXAMPLE"
    with pytest.raises(keytab.Unusable, match=r"several accounts: CLUSTER7\$@CORP.EXAMPLE, HOST1\$@CORP.EXAMPLE"):
        chosen(data, host="other")
    with pytest.raises(keytab.Unusable, match="several"):
        chosen(data + entry("HOST1$@OLD.EXAMPLE"))


@pytest.mark.parametrize(
    ("data", "wanted", "problem"),
    [
        (b"", "", "is empty"),
        (b"\x05\x02", "", "holds no keys"),
        (b"\x05\x01" + JOINED[2:], "", "is no keytab"),
        (b"-----BEGIN PRIVATE KEY-----", "", "is no keytab"),
        (JOINED[:-9], "", "is a damaged keytab"),
        (JOINED[:2] + struct.pack(">i", 3) + b"\0\1\0", "", "is a damaged keytab"),
        (b"\x05\x02" + entry("host/host1.corp.example@CORP.EXAMPLE"), "", "holds no key of a computer account.* host/host1.corp.example@CORP.EXAMPLE"),
        (JOINED, "HOST2$", r"holds no key of HOST2\$, only of HOST1\$@CORP.EXAMPLE"),
        (JOINED, "HOST1$@OTHER.EXAMPLE", "holds no key of HOST1"),
    ],
)
def test_a_keytab_that_does_not_serve_says_what_it_holds(data, wanted, problem):
    """libkrb5 says "No credentials cache found" for all of these."""
    with pytest.raises(keytab.Unusable, match=problem):
        chosen(data, wanted)


def test_holes_old_entries_and_what_follows_the_end_are_passed_over():
    """ktutil leaves holes where it removed an entry, and old writers no 32-bit key version."""
    data = b"\x05\x02" + hole(70) + entry("HOST1$@R", 300) + hole(8) + entry("HOST1$@R", 7, old=True) + struct.pack(">i", 0) + b"rubbish"
    assert [(one.principal, one.kvno) for one in keytab.parse(data)] == [("HOST1$@R", 300), ("HOST1$@R", 7)]


def test_a_name_with_separators_in_it_is_not_another_name():
    """As libkrb5 shows it: escaped."""
    body = struct.pack(">H", 1) + counted(b"R") + counted(b"a/b@c") + struct.pack(">IIBH", 1, 0, 1, 18) + counted(b"k")
    (only,) = keytab.parse(b"\x05\x02" + struct.pack(">i", len(body)) + body)
    assert (only.principal, only.kvno) == ("a\\/b\\@c@R", 1)


def test_what_others_write_into_a_keytab_makes_it_no_other_key():
    """A key that was refused must not be sent again because Samba wrote a service's keys beside it, or an old one went."""
    first = keytab.newest(keytab.parse(JOINED), chosen(JOINED))
    assert first
    for other in (JOINED + entry("nfs/host1@CORP.EXAMPLE", 9), b"\x05\x02" + entry("HOST1$@CORP.EXAMPLE", 3), JOINED + entry("HOST1$@CORP.EXAMPLE", 1, key=b"old")):
        assert keytab.newest(keytab.parse(other), chosen(other)) == first
    for other in (JOINED + entry("HOST1$@CORP.EXAMPLE", 4), b"\x05\x02" + entry("HOST1$@CORP.EXAMPLE", 3, key=b"\x12" * 32)):
        assert keytab.newest(keytab.parse(other), chosen(other)) != first or chosen(other).kvno == 4


def test_a_key_is_not_shown_with_its_entry():
    """Whatever prints an entry prints no key."""
    assert "\\x11" not in repr(chosen(JOINED))
    assert chosen(JOINED).key


@given(st.one_of(st.binary(max_size=200), st.builds(lambda at, byte: JOINED[:at] + bytes([byte]) + JOINED[at + 1 :], st.integers(0, len(JOINED)), st.integers(0, 255))))
def test_no_keytab_breaks_the_reading(data):
    """Damaged by a disk or by hand: one clear refusal."""
    for prefix in (b"", b"\x05\x02"):
        try:
            keytab.machine(keytab.parse(prefix + data), "", "host1")
        except keytab.Unusable as problem:
            assert str(problem).isprintable()
