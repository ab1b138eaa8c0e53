"""What is asked for: names that can be right, keys that the agent and AD CS both take, a request that AD CS can read."""

import base64
import string
import subprocess

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from scx_enroll.errors import AgentNotReady, ConfigError, UsageError
from scx_enroll.request import MAX_CN, RequestSpec, build_csr, check_dns_name, check_fqdn, expand, load_csr, load_key, spki_of

HOST = "host1.corp.example"
KINDS = {
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "p521": lambda: ec.generate_private_key(ec.SECP521R1()),
}


@pytest.fixture(scope="session")
def keys():
    return {name: make() for name, make in KINDS.items()}


def armour(key, form=serialization.PrivateFormat.PKCS8, encryption=None):
    return key.private_bytes(serialization.Encoding.PEM, form, encryption or serialization.NoEncryption())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("host1", "short name"),
        ("localhost", "placeholder"),
        ("localhost.local", "placeholder"),
        ("localhost.corp.example", "placeholder"),
        ("host1.localdomain", "placeholder"),
        ("host1.example.com", "placeholder"),
        ("example.org", "placeholder"),
        ("(none)", "not a host name"),
        ("", "not a host name"),
        ("host1.(none)", "not a host name"),
        ("192.0.2.7", "address"),
        ("2001:db8::7", "address"),
        ("::ffff:192.0.2.7", "address"),
        ("host1.7", "address"),
        (HOST + ".", "dot"),
        ("*.corp.example", "wildcard"),
        ("ho_st.corp.example", "not a host name"),
        ("-host.corp.example", "not a host name"),
        ("host-.corp.example", "not a host name"),
        ("host..corp.example", "not a host name"),
        (".corp.example", "not a host name"),
        ("hóst.corp.example", "not a host name"),
        ("host1.corp.example\n", "not a host name"),
        ("host1 corp.example", "not a host name"),
        ("h" * 64 + ".corp.example", "not a host name"),
        ("h" * 60 + ".corp.example", "longer than the 64 characters"),
    ],
)
def test_a_name_that_can_not_be_this_hosts_is_refused(name, why):
    """SCOM would ask for another one; each certificate for a wrong name is one nobody can use."""
    with pytest.raises(ConfigError, match=why) as refused:
        check_fqdn(name, "name")
    assert refused.value.hint
    assert refused.value.message.startswith("name: ")


@pytest.mark.parametrize(
    "name", ["a.b", HOST, "HOST1.Corp.Example", "xn--hst-6na.corp.example", "h1.corp.local", "1.2.3.corp", "myexample.com"]
)
def test_a_name_is_folded_to_lower_case(name):
    """Names compare without case everywhere, so there is one spelling from here on."""
    assert check_fqdn(name, "name") == name.lower()


def test_a_name_may_be_as_long_as_a_cn():
    """64 characters are allowed, by the standard and by AD CS."""
    name = "h" * 40 + ".corp." + "e" * (MAX_CN - 46)
    assert len(name) == MAX_CN
    assert check_fqdn(name, "name") == name
    with pytest.raises(ConfigError):
        check_fqdn("h" + name, "name")


def test_an_alternative_name_may_be_short_or_long():
    """SAN entries are no CN: only the rules of host names hold."""
    assert check_dns_name("HOST1", "x") == "host1"
    assert len(check_dns_name(".".join(["a" * 60] * 4), "x")) == 243
    with pytest.raises(ConfigError):
        check_dns_name(".".join(["a" * 60] * 5), "x")
    with pytest.raises(ConfigError):
        check_dns_name("localhost", "x")


@given(st.text(alphabet=string.printable + "éßK.", max_size=70))
def test_what_passes_can_stand_in_a_certificate(name):
    """Whatever the operator writes, only ConfigError escapes, and what passes is ASCII labels."""
    try:
        checked = check_fqdn(name, "name")
    except ConfigError:
        return
    assert checked.isascii()
    assert set(checked) <= set(string.ascii_lowercase + string.digits + ".-")
    assert x509.DNSName(checked).value == checked


def test_the_short_name_is_filled_in_and_checked():
    """One configuration serves a fleet; a host that calls itself localhost must not get a certificate."""
    assert expand("{hostname}.mgmt.corp.example", "Host1") == "host1.mgmt.corp.example"
    assert expand("{hostname}.mgmt.corp.example", "host1.other.domain") == "host1.mgmt.corp.example"
    assert expand(HOST, "x") == HOST
    for short in ("localhost", "(none)", ""):
        with pytest.raises(ConfigError):
            expand("{hostname}.mgmt.corp.example", short)
    with pytest.raises(ConfigError):
        expand("{host}.mgmt.corp.example", "host1")


def test_names_stand_once_and_the_fqdn_first():
    """An alternative name that repeats the FQDN is no second name."""
    assert RequestSpec(HOST, ("a.corp.example", HOST, "a.corp.example")).dns_names == (HOST, "a.corp.example")


@pytest.mark.parametrize("kind", KINDS)
def test_the_request_says_what_the_certificate_needs(keys, kind):
    """CN, SAN, EKU and key usage are all there: a template that takes them from the request adds none."""
    csr = x509.load_pem_x509_csr(build_csr(RequestSpec(HOST, ("alias",)), keys[kind]))
    assert csr.is_signature_valid
    assert [(a.oid, a.value) for a in csr.subject] == [(NameOID.COMMON_NAME, HOST)]
    san = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert san.get_values_for_type(x509.DNSName) == [HOST, "alias"]
    assert list(csr.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.SERVER_AUTH]
    usage = csr.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert usage.value.key_encipherment is (kind == "rsa")
    assert not usage.value.key_cert_sign
    assert csr.signature_hash_algorithm.name == {"p384": "sha384", "p521": "sha512"}.get(kind, "sha256")
    assert spki_of(csr.public_key()) == spki_of(keys[kind])


def test_the_request_is_pem_as_ad_cs_reads_it(keys):
    """One block, LF, no other text: it is a form field."""
    pem = build_csr(RequestSpec(HOST), keys["rsa"])
    lines = pem.split(b"\n")
    assert lines[0] == b"-----BEGIN CERTIFICATE REQUEST-----"
    assert lines[-2:] == [b"-----END CERTIFICATE REQUEST-----", b""]
    assert b"\r" not in pem
    assert max(map(len, lines)) == 64


def test_another_program_reads_the_request(keys):
    """openssl finds the same names, so the request is not only readable to the library that wrote it."""
    done = subprocess.run(
        ["openssl", "req", "-noout", "-text", "-verify"], input=build_csr(RequestSpec(HOST, ("alias",)), keys["p384"]), capture_output=True
    )
    text = done.stdout.decode() + done.stderr.decode()
    assert done.returncode == 0
    assert f"DNS:{HOST}, DNS:alias" in text
    assert "TLS Web Server Authentication" in text


def test_the_first_key_of_the_file_counts(keys):
    """The agent takes the first; text and other blocks before it don't matter."""
    first, second = armour(keys["rsa"]), armour(keys["p256"])
    assert spki_of(load_key(b"Bag Attributes\n" + first + second)) == spki_of(keys["rsa"])
    parameters = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
    old = armour(keys["p256"], serialization.PrivateFormat.TraditionalOpenSSL)
    assert spki_of(load_key(parameters + old)) == spki_of(keys["p256"])
    assert spki_of(load_key(first.replace(b"\n", b"\r\n"))) == spki_of(keys["rsa"])


def key_files(keys):
    secret = serialization.BestAvailableEncryption(b"secret")
    return {
        "encrypted": armour(keys["rsa"], encryption=secret),
        "encrypted the old way": armour(keys["rsa"], serialization.PrivateFormat.TraditionalOpenSSL, secret),
        "ed25519": armour(ed25519.Ed25519PrivateKey.generate()),
        "dsa": armour(dsa.generate_private_key(1024)),
        "another curve": armour(ec.generate_private_key(ec.SECP256K1())),
        "der": keys["rsa"].private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        "truncated": armour(keys["rsa"])[:-40],
        "damaged": armour(keys["rsa"]).replace(b"A", b"B"),
        "public": keys["rsa"].public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        "empty": b"",
    }


@pytest.mark.parametrize("case", key_files({"rsa": KINDS["rsa"]()}))
def test_a_key_the_agent_or_ad_cs_can_not_use_is_refused(keys, case):
    """Said before anything is asked of the CA, with the way to a new key and without a byte of this one."""
    pem = key_files(keys)[case]
    with pytest.raises(AgentNotReady) as refused:
        load_key(pem)
    assert "scxsslconfig -f" in refused.value.hint
    assert ("encrypted" in refused.value.message) is ("encrypted" in case)
    for line in filter(None, pem.split(b"\n")[1:-2]):
        assert line.decode("latin-1") not in refused.value.message


def test_a_damaged_key_signs_a_request():
    """A bit of the disk's own in each secret part: refused when it is read or when its signature does not verify, never sent to the CA."""
    key = rsa.generate_private_key(65537, 2048)
    der = key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    numbers = key.private_numbers()
    for number in (numbers.d, numbers.dmp1, numbers.dmq1, numbers.iqmp):
        whole = number.to_bytes((number.bit_length() + 7) // 8, "big")
        der = der.replace(whole, whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
    pem = b"-----BEGIN RSA PRIVATE KEY-----\n" + base64.encodebytes(der) + b"-----END RSA PRIVATE KEY-----\n"
    with pytest.raises(AgentNotReady) as refused:
        build_csr(RequestSpec("lin01.corp.example"), load_key(pem))
    assert "scxsslconfig -f" in refused.value.hint


@pytest.mark.parametrize("part", ["n", "e", "d", "p", "q", "dmp1", "dmq1", "iqmp"])
@pytest.mark.parametrize("value", [0, 1, 2, 4])
def test_a_key_of_numbers_that_make_none(part, value):
    """Whatever OpenSSL raises on them, at whatever call: not ready, with the way to a new key."""
    key = rsa.generate_private_key(65537, 2048)
    numbers = key.private_numbers()
    public = numbers.public_numbers
    names = {"n": public.n, "e": public.e, "d": numbers.d, "p": numbers.p, "q": numbers.q, "dmp1": numbers.dmp1, "dmq1": numbers.dmq1, "iqmp": numbers.iqmp}
    names[part] = value

    def integer(number):
        data = number.to_bytes(number.bit_length() // 8 + 1, "big")
        return b"\x02" + length(len(data)) + data

    def length(size):
        return bytes([size]) if size < 128 else bytes([0x82]) + size.to_bytes(2, "big")

    body = b"".join(map(integer, (0, *names.values())))
    der = b"\x30" + length(len(body)) + body
    pem = b"-----BEGIN RSA PRIVATE KEY-----\n" + base64.encodebytes(der) + b"-----END RSA PRIVATE KEY-----\n"
    try:
        loaded = load_key(pem)
        assert len(spki_of(loaded)) == 64
        csr = build_csr(RequestSpec("lin01.corp.example"), loaded)
    except AgentNotReady as refused:
        assert "scxsslconfig -f" in refused.hint
    else:
        assert x509.load_pem_x509_csr(csr).is_signature_valid, "OpenSSL did without that number"


@given(st.data())
def test_no_key_file_escapes_as_anything_but_not_ready(keys, data):
    """The file is written by others, and may hold anything."""
    pem = bytearray(armour(keys["p256"]))
    for _ in range(data.draw(st.integers(1, 6))):
        pem[data.draw(st.integers(0, len(pem) - 1))] = data.draw(st.integers(0, 255))
    try:
        load_key(bytes(pem))
    except AgentNotReady:
        pass


# -- requests that other hosts made ---------------------------------------------------------------------------------


def openssl_csr(folder, subject, *extra):
    """A request as somebody makes it on an old host."""
    subprocess.run(
        ["openssl", "req", "-new", "-newkey", "rsa:2048", "-nodes", "-keyout", str(folder / "k.pem"), "-subj", subject, "-out",
         str(folder / "r.csr"), *extra], check=True, capture_output=True,
    )
    return (folder / "r.csr").read_bytes()


def test_a_request_made_with_openssl_on_an_old_host(tmp_path):
    """CN alone is what such hosts make; it is what SCOM asks for."""
    csr = openssl_csr(tmp_path, f"/O=Corp/CN={HOST}")
    foreign = load_csr(csr, "r.csr")
    assert foreign.spec == RequestSpec(HOST)
    assert foreign.spec.dns_names == (HOST,)
    loaded = x509.load_pem_x509_csr(csr)
    assert foreign.spki == spki_of(loaded)
    assert x509.load_pem_x509_csr(foreign.pem).tbs_certrequest_bytes == loaded.tbs_certrequest_bytes


def test_the_fqdn_among_several_names_of_the_agents_own_kind(tmp_path):
    """The agent's tool writes CN=short, CN=fqdn."""
    assert load_csr(openssl_csr(tmp_path, f"/DC=example/CN=host1/CN={HOST}"), "r.csr").spec.fqdn == HOST


@pytest.mark.parametrize("name", KINDS)
def test_a_request_is_read_in_every_wrapping(keys, name):
    """PEM with CRLF and text around, the older armour, DER: all are the same request, with the same identity."""
    pem = build_csr(RequestSpec(HOST, ("other.corp.example",)), keys[name])
    der = x509.load_pem_x509_csr(pem).public_bytes(serialization.Encoding.DER)
    wrapped = [pem, pem.replace(b"\n", b"\r\n"), b"Certificate Request:\n" + pem + b"\n", pem.replace(b" CERTIFICATE", b" NEW CERTIFICATE"), der]
    found = {load_csr(data, "r.csr") for data in wrapped}
    assert len(found) == 1
    assert found.pop().spec.dns_names == (HOST, "other.corp.example")


def damaged(pem):
    der = bytearray(x509.load_pem_x509_csr(pem).public_bytes(serialization.Encoding.DER))
    der[-5] ^= 1
    return bytes(der)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda pem: b"", "no certificate request"),
        (lambda pem: b"root:x:0:0:root:/root:/bin/sh\n", "no certificate request"),
        (lambda pem: pem[: len(pem) // 2], "no certificate request"),
        (lambda pem: pem.replace(b"A", b"?"), "no certificate request"),
        (lambda pem: pem * 2, "more than one"),
        (damaged, "signature is wrong"),
    ],
    ids=["empty", "passwd", "cut", "garbled", "two", "damaged"],
)
def test_what_is_no_request_is_a_usage_error(keys, make, why):
    """One clear sentence with the file's name and how to make one; never a traceback."""
    with pytest.raises(UsageError, match=why) as caught:
        load_csr(make(build_csr(RequestSpec(HOST), keys["p256"])), "r.csr")
    assert caught.value.message.startswith("r.csr")
    assert "openssl req" in caught.value.hint


@pytest.mark.parametrize(
    ("subject", "why"),
    [("/O=Corp", "asks for no name"), ("/CN=host1", "short name"), ("/CN=192.0.2.7", "address"), ("/CN=*.corp.example", "wildcard"),
     ("/CN=localhost.localdomain", "placeholder"), ("/CN=host 1.corp.example", "not a host name")],
)
def test_a_request_for_what_can_be_no_agents_name(tmp_path, subject, why):
    """SCOM would refuse the certificate: better before it is issued."""
    with pytest.raises(UsageError, match=why):
        load_csr(openssl_csr(tmp_path, subject), "r.csr")


def test_a_request_whose_san_lacks_its_cn(tmp_path):
    """It is told as what it is, a wrong request; not afterwards as a wrong template."""
    csr = openssl_csr(tmp_path, f"/CN={HOST}", "-addext", "subjectAltName=DNS:other.corp.example")
    with pytest.raises(UsageError, match="lacks its CN"):
        load_csr(csr, "r.csr")


def test_a_request_for_a_key_that_ad_cs_does_not_know():
    """AD CS knows RSA and the NIST curves."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(ed25519.Ed25519PrivateKey.generate(), None)
    with pytest.raises(UsageError, match="ed25519"):
        load_csr(csr.public_bytes(serialization.Encoding.PEM), "r.csr")


def test_a_request_for_a_name_in_the_san_only(tmp_path):
    """Some tools leave the subject empty."""
    csr = openssl_csr(tmp_path, "/O=Corp", "-addext", f"subjectAltName=DNS:{HOST},DNS:other.corp.example,IP:192.0.2.7")
    assert load_csr(csr, "r.csr").spec == RequestSpec(HOST, (HOST, "other.corp.example"))


@given(st.binary(max_size=400))
def test_any_bytes_as_a_request_are_refused_in_words(data):
    """A file is an argument: whoever names the wrong one gets a sentence."""
    with pytest.raises(UsageError):
        load_csr(data, "r.csr")
