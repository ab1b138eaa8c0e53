"""TLS and control with real keys, sockets and processes: nothing hangs, nothing is believed that was not seen."""

import contextlib
import datetime as dt
import functools
import hashlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from scx_enroll import idle, service
from scx_enroll.errors import AgentNotReady
from scx_enroll.rootfs import Root
from scx_enroll.service import Patience, Served, await_end, await_leaf, check_path, control, fits, probe, rehearse, start_time

FQDN = "host.corp.lab.test"
NOW = dt.datetime.now(dt.timezone.utc).replace(tzinfo=None, microsecond=0)
DAY = dt.timedelta(days=1)
KEY = "/etc/key.pem"
QUICK = Patience(command_s=5.0, listener_s=2.0, gone_s=0.3, poll_s=0.02)
SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


def silent(*_arguments):
    pass


# -- a small PKI ----------------------------------------------------------------------------------------------------


def new_key():
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key, encryption=None):
    algorithm = encryption or serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, algorithm)


def certify(key, name, issuer=None, *, ca=False, begin=NOW - DAY, end=NOW + 30 * DAY, eku=(SERVER,), names=(FQDN,), by=None):
    """A certificate for `key`; `issuer` is (key, certificate) or None for self-signed; `by` overrides the issuer's name."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer, above = issuer or (key, None)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by or (above.subject if above else subject))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if ca:
        usage = x509.KeyUsage(
            digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
            key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
        )
        builder = builder.add_extension(usage, critical=True)
    else:
        if eku:
            builder = builder.add_extension(x509.ExtendedKeyUsage(eku), critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(one) for one in names]), critical=False)
    return builder.sign(signer, hashes.SHA256())


def pem(*certificates):
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)


def der(certificate):
    return certificate.public_bytes(serialization.Encoding.DER)


def fingerprint(certificate):
    return hashlib.sha256(der(certificate)).hexdigest()


class PKI:
    """Root, issuing CA, and the agent's key."""

    def __init__(self):
        self.root_key, self.issuing_key, self.key = new_key(), new_key(), new_key()
        self.root = certify(self.root_key, "Lab Root", ca=True)
        self.issuing = certify(self.issuing_key, "Lab Issuing", (self.root_key, self.root), ca=True)

    @property
    def by(self):
        return self.issuing_key, self.issuing

    def leaf(self, **changes):
        return certify(self.key, changes.pop("name", FQDN), changes.pop("issuer", self.by), **changes)


@pytest.fixture(scope="module")
def pki():
    return PKI()


@pytest.fixture
def tree(tmp_path, pki):
    """A root that holds the agent's key."""
    (tmp_path / "etc").mkdir()
    (tmp_path / KEY[1:]).write_bytes(key_pem(pki.key))
    (tmp_path / KEY[1:]).chmod(0o600)
    return tmp_path


@pytest.fixture
def root(tree):
    return Root(str(tree), live=True)


@pytest.fixture(autouse=True)
def _no_descriptor_is_lost():
    """What is looked at every hour for years must not leak."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    for _ in range(50):  # threads of the servers below close theirs a moment later
        if len(os.listdir("/proc/self/fd")) <= before:
            break
        time.sleep(0.02)
    assert len(os.listdir("/proc/self/fd")) <= before


# -- the pair -------------------------------------------------------------------------------------------------------


def test_a_pair_that_fits(root, pki):
    """The agent's key and a certificate for it; a chain after the leaf does no harm."""
    assert fits(root, KEY, pem(pki.leaf()))
    assert fits(root, KEY, pem(pki.leaf(), pki.issuing))


def test_a_certificate_for_another_key(root, pki):
    """The agent would die silently on it."""
    assert not fits(root, KEY, pem(certify(new_key(), FQDN, pki.by)))
    assert not fits(root, KEY, pem(pki.issuing, pki.leaf())), "the leaf must come first"


@pytest.mark.parametrize("data", [b"", b"\0", b"no pem", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_bytes_that_are_no_certificate(root, data):
    """False, as the agent can't read them either."""
    assert not fits(root, KEY, data)


def test_a_certificate_in_der(root, pki):
    """The agent reads PEM only."""
    assert not fits(root, KEY, der(pki.leaf()))


@pytest.mark.parametrize("content", [b"", b"no key\n", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_key_that_can_not_be_read(root, tree, pki, content):
    """A damaged key fits nothing."""
    (tree / KEY[1:]).write_bytes(content)
    assert not fits(root, KEY, pem(pki.leaf()))


def test_a_key_in_der(root, tree, pki):
    """The agent reads PEM only."""
    data = pki.key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tree / KEY[1:]).write_bytes(data)
    assert not fits(root, KEY, pem(pki.leaf()))


def test_a_missing_key(root, pki):
    """False, not an error: the plan sees to it."""
    assert not fits(root, "/etc/nowhere.pem", pem(pki.leaf()))


def test_an_encrypted_key_asks_for_a_passphrase(root, tree, pki, monkeypatch):
    """A timer has no terminal: the failure names the key, and nothing is read from standard input."""
    (tree / KEY[1:]).write_bytes(key_pem(pki.key, serialization.BestAvailableEncryption(b"secret")))
    monkeypatch.setattr(sys, "stdin", None)
    for call in (lambda: fits(root, KEY, pem(pki.leaf())), lambda: rehearse(root, KEY, pem(pki.leaf()), (der(pki.root),), FQDN)):
        with pytest.raises(AgentNotReady, match=r"/etc/key\.pem is encrypted") as caught:
            call()
        assert "passphrase" in caught.value.hint


def test_the_key_is_looked_for_inside_the_root(root, tree, pki):
    """An absolute link in the tree leads to the tree's key."""
    (tree / "etc" / "link.pem").symlink_to(KEY)
    assert fits(root, "/etc/link.pem", pem(pki.leaf()))


def test_an_old_pair_does_not_count_as_a_pair(root, tree):
    """What was served before may be RSA 1024 with SHA-1 by SCOM: it fits, else no rollback to it would be tried."""
    key = rsa.generate_private_key(65537, 1024)
    (tree / KEY[1:]).write_bytes(key_pem(key))
    assert fits(root, KEY, pem(certify(key, FQDN)))


# -- the rehearsal --------------------------------------------------------------------------------------------------


def rehearsed(root, pki, *certificates, anchors=None, fqdn=FQDN):
    """What the handshake says; and that the check without the key says the same of the path, word for word."""
    chosen = tuple(map(der, (pki.root,) if anchors is None else anchors))
    said = rehearse(root, KEY, pem(*certificates), chosen, fqdn)
    assert said.startswith("OpenSSL refuses the pair") or check_path(tuple(map(der, certificates)), chosen, fqdn) == said
    return said


def test_a_good_chain(root, pki):
    """The leaf and its intermediate lead to the configured root."""
    assert rehearsed(root, pki, pki.leaf(), pki.issuing) == ""


def test_a_name_only_in_the_common_name(root, pki):
    """A SAN is not demanded here: `verify` judges the CN, SCOM asks for it."""
    assert rehearsed(root, pki, pki.leaf(names=()), pki.issuing) == ""


def test_a_leaf_directly_below_the_root(root, pki):
    """One level is a PKI, too; several anchors are looked through."""
    leaf = pki.leaf(issuer=(pki.root_key, pki.root))
    assert rehearsed(root, pki, leaf) == ""
    other = certify(new_key(), "Other Root", ca=True)
    assert rehearsed(root, pki, leaf, anchors=(other, pki.root)) == ""


def test_a_missing_intermediate(root, pki):
    """Told with OpenSSL's own words and code, for a search engine."""
    problem = rehearsed(root, pki, pki.leaf())
    assert "unable to get local issuer certificate" in problem
    assert "20" in problem


def test_a_foreign_root_among_the_intermediates(root, pki):
    """Whatever the CA sends along is not trusted for that: x509-limbo's chain-untrusted-root."""
    foreign_key = new_key()
    foreign = certify(foreign_key, "Foreign Root", ca=True)
    leaf = pki.leaf(issuer=(foreign_key, foreign))
    assert "self" in rehearsed(root, pki, leaf, foreign)
    assert rehearsed(root, pki, leaf, foreign, anchors=(foreign,)) == ""


def test_a_foreign_root_with_the_name_of_ours(root, pki):
    """The signature decides, not the name."""
    foreign_key = new_key()
    foreign = certify(foreign_key, "Lab Root", ca=True)
    assert rehearsed(root, pki, pki.leaf(issuer=(foreign_key, foreign)), foreign) != ""


def test_an_anchor_that_is_not_self_signed(root, pki):
    """Whether an intermediate in the store is trusted differs between versions of Python: here it never is."""
    assert rehearsed(root, pki, pki.leaf(), pki.issuing, anchors=(pki.issuing,)) != ""
    assert rehearsed(root, pki, pki.leaf(), anchors=(pki.issuing,)) != ""


@pytest.mark.parametrize(("begin", "end"), [(NOW - 9 * DAY, NOW - DAY), (NOW + DAY, NOW + 9 * DAY)], ids=["expired", "not-yet"])
def test_dates_of_the_whole_path(root, pki, begin, end):
    """The leaf's, the intermediate's and the root's count alike."""
    assert rehearsed(root, pki, pki.leaf(begin=begin, end=end), pki.issuing) != ""
    issuing = certify(pki.issuing_key, "Lab Issuing", (pki.root_key, pki.root), ca=True, begin=begin, end=end)
    assert rehearsed(root, pki, pki.leaf(), issuing) != ""
    anchor = certify(pki.root_key, "Lab Root", ca=True, begin=begin, end=end)
    assert rehearsed(root, pki, pki.leaf(), pki.issuing, anchors=(anchor,)) != ""


@pytest.mark.parametrize("names", [("other.corp.lab.test",), ("host.corp.lab.test.evil.test",), ("host",), ("*.lab.test",)])
def test_another_name(root, pki, names):
    """The Management Server connects to the FQDN; with a SAN the CN does not count."""
    assert "ostname mismatch" in rehearsed(root, pki, pki.leaf(names=names), pki.issuing)


@pytest.mark.parametrize("eku", [(CLIENT,), (ExtendedKeyUsageOID.CODE_SIGNING,)])
def test_a_certificate_for_clients(root, pki, eku):
    """serverAuth is what a Management Server asks for."""
    assert "purpose" in rehearsed(root, pki, pki.leaf(eku=eku), pki.issuing)


def test_both_purposes_are_as_good_as_one(root, pki):
    """Templates copied from Computer carry clientAuth as well."""
    assert rehearsed(root, pki, pki.leaf(eku=(CLIENT, SERVER)), pki.issuing) == ""


def test_an_issuer_that_is_no_ca(root, pki):
    """A leaf can't issue leaves."""
    other_key = new_key()
    other = certify(other_key, "Lab Host", pki.by)
    assert rehearsed(root, pki, pki.leaf(issuer=(other_key, other)), other, pki.issuing) != ""


def test_a_leaf_for_another_key_in_rehearsal(root, pki):
    """Refused before the handshake, with OpenSSL's reason."""
    assert "OpenSSL refuses the pair" in rehearsed(root, pki, certify(new_key(), FQDN, pki.by), pki.issuing)


def test_no_anchor_at_all(root, pki):
    """An empty store must not fall back to the system's."""
    assert rehearsed(root, pki, pki.leaf(), pki.issuing, anchors=()) == "issuer-trust holds no self-signed certificate"


@pytest.mark.parametrize("anchors", [(b"\0",), (b"\x30\x03\x02\x01\x00",), (b"garbage" * 100,)])
def test_an_anchor_that_can_not_be_read(root, pki, anchors):
    """An objection, never a traceback."""
    assert rehearse(root, KEY, pem(pki.leaf(), pki.issuing), anchors, FQDN) != ""
    assert check_path((der(pki.leaf()), der(pki.issuing)), anchors, FQDN) != ""


def test_the_environment_names_other_roots(root, pki, tree, monkeypatch):
    """SSL_CERT_FILE of whoever runs it adds no trust."""
    foreign_key = new_key()
    foreign = certify(foreign_key, "Foreign Root", ca=True)
    (tree / "roots.pem").write_bytes(pem(foreign))
    monkeypatch.setenv("SSL_CERT_FILE", str(tree / "roots.pem"))
    assert rehearsed(root, pki, pki.leaf(issuer=(foreign_key, foreign)), foreign) != ""


def test_a_long_chain_ends(root, pki):
    """Ten intermediates fit into the rounds of the handshake in memory."""
    issuer, chain = (pki.root_key, pki.root), []
    for number in range(10):
        key = new_key()
        issuer = key, certify(key, f"Lab Issuing {number}", issuer, ca=True)
        chain.insert(0, issuer[1])
    assert rehearsed(root, pki, pki.leaf(issuer=issuer), *chain) == ""


@pytest.mark.parametrize("make", [lambda: rsa.generate_private_key(65537, 2048), lambda: ec.generate_private_key(ec.SECP384R1())], ids=["rsa", "p384"])
def test_a_path_is_checked_for_every_kind_of_key(pki, make):
    """The key of a leaf from another host decides the cipher suite of the flight that is written by hand."""
    key = make()
    ders = (der(certify(key, FQDN, pki.by)), der(pki.issuing))
    assert check_path(ders, (der(pki.root),), FQDN) == ""
    assert "purpose" in check_path((der(certify(key, FQDN, pki.by, eku=(CLIENT,))), ders[1]), (der(pki.root),), FQDN)
    assert "20" in check_path(ders[:1], (der(pki.root),), FQDN)


def test_a_path_longer_than_a_record_is_checked(pki):
    """A TLS record holds 16 KiB; a bag of cross certificates may be longer."""
    fillers = [der(certify(new_key(), f"Filler {number} {'x' * 40}", ca=True)) for number in range(80)]
    assert sum(map(len, fillers)) > service.MAX_RECORD_BYTES
    assert check_path((der(pki.leaf()), der(pki.issuing), *fillers), (der(pki.root),), FQDN) == ""


@pytest.mark.parametrize("leaf", [b"", b"junk", b"\x30\x00", bytes(70000)])
def test_a_path_of_anything_is_an_objection(pki, leaf):
    """Whatever is given as a certificate: a sentence, never a traceback, and never accepted."""
    assert check_path((leaf,), (der(pki.root),), FQDN) != ""
    assert check_path((), (der(pki.root),), FQDN) != ""


def test_an_openssl_that_verifies_too_late_accepts_nothing(pki, monkeypatch):
    """Should a version look at the certificate only after the proof of the key, silence would mean acceptance: it must not."""
    monkeypatch.setattr(service, "_objection", lambda *_: "")
    assert check_path((der(pki.leaf()), der(pki.issuing)), (der(pki.root),), FQDN) != ""


# -- the probe ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(serve, family=socket.AF_INET, port=0):
    """A server on loopback that hands every connection to `serve`; its port."""
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1" if family == socket.AF_INET else "::1", port))
    listener.listen()
    stop, connections = threading.Event(), []

    def loop():
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            with contextlib.suppress(OSError, ValueError):
                serve(connection)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        stop.set()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.close()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def tls(tree, key, certificate, configure=silent):
    """What a TLS server does with a connection: like the agent, it never answers close_notify."""
    (tree / "served.pem").write_bytes(key_pem(key) + pem(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    configure(context)
    context.load_cert_chain(str(tree / "served.pem"))

    def serve(connection):
        with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as secured:
            secured.settimeout(5)
            secured.recv(1)

    return serve


def only(version):
    def configure(context):
        context.minimum_version = context.maximum_version = version

    return configure


def old(context):
    """What a ten years old agent speaks."""
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AES128-SHA:@SECLEVEL=0")


def test_nothing_listens():
    """Refused at once, on both families."""
    began = time.monotonic()
    assert probe(free_port()) == Served(listening=False, leaf="", problem="nothing listens")
    assert time.monotonic() - began < 1


def looked(port):
    """What is seen; an idle run, which does it without the ssl module, sees the same."""
    seen = probe(port)
    assert idle.probe(port, idle._shake)[:2] == (seen.listening, seen.der)
    return seen


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=lambda version: version.name)
def test_what_is_served_is_told_by_its_fingerprint(tree, pki, version):
    """With every TLS of today; the leaf is not verified, it is looked at."""
    leaf = pki.leaf(begin=NOW - 9 * DAY, end=NOW - DAY, names=("elsewhere",))
    with listening(tls(tree, pki.key, leaf, only(version))) as port:
        assert looked(port) == Served(listening=True, leaf=fingerprint(leaf), problem="", der=der(leaf))


def test_an_old_agent_is_seen_too(tree):
    """Self-signed, RSA 1024, ciphers without forward secrecy: it looks and does not trust."""
    key = rsa.generate_private_key(65537, 1024)
    certificate = certify(key, FQDN)
    with listening(tls(tree, key, certificate, old)) as port:
        assert looked(port).leaf == fingerprint(certificate)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1 is deprecated:DeprecationWarning")
def test_tls_1_0_is_seen_too(tree, pki):
    """Agents of the time spoke it; where this OpenSSL can't, there is nothing to test."""

    def configure(context):
        old(context)
        context.maximum_version = context.minimum_version = ssl.TLSVersion.TLSv1

    key = rsa.generate_private_key(65537, 2048)
    certificate = certify(key, FQDN)
    try:
        serve = tls(tree, key, certificate, configure)
    except (ValueError, ssl.SSLError):
        pytest.skip("OpenSSL was built without TLS 1.0")
    with listening(serve) as port:
        assert looked(port).leaf == fingerprint(certificate)


def test_an_agent_that_listens_on_ipv6_only(tree, pki):
    """The wildcard may be one of the two families."""
    try:
        with socket.socket(socket.AF_INET6) as tried:
            tried.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no ::1")
    leaf = pki.leaf()
    with listening(tls(tree, pki.key, leaf), socket.AF_INET6) as port:
        assert looked(port).leaf == fingerprint(leaf)


def test_a_listener_that_says_nothing(monkeypatch):
    """It took the connection and is silent: told within the time-out, once for each address it listens on."""
    monkeypatch.setattr(idle, "CONNECT_S", 0.3)
    with listening(lambda connection: time.sleep(4)) as port:
        began = time.monotonic()
        seen = looked(port)
        assert time.monotonic() - began < 3
    assert (seen.listening, seen.leaf) == (True, "")
    assert "no TLS handshake" in seen.problem


def test_a_listener_that_drips(monkeypatch):
    """The time-out is for the handshake, not for each byte of it."""
    monkeypatch.setattr(idle, "CONNECT_S", 0.5)

    def drip(connection):
        for byte in b"\x16\x03\x03\x40\x00" + b"\0" * 100:
            connection.sendall(bytes([byte]))
            time.sleep(0.1)

    with listening(drip) as port:
        began = time.monotonic()
        assert probe(port).leaf == ""
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("first", [b"", b"HTTP/1.0 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n", b"\x15\x03\x03\0\x02\x02\x28", b"\0" * 4096])
def test_a_listener_that_speaks_something_else(first):
    """Closed at once, plain HTTP, ssh, an alert: listening, no leaf, and why."""

    def serve(connection):
        connection.recv(4096)
        connection.sendall(first)
        connection.close()

    with listening(serve) as port:
        seen = probe(port)
    assert (seen.listening, seen.leaf) == (True, "")
    assert seen.problem.startswith("no TLS handshake")


def test_the_wrong_address_is_blamed():
    """What failed on 127.0.0.1 is told, not that nothing listens on ::1, too."""

    def serve(connection):
        connection.recv(4096)
        connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")
        connection.close()

    with listening(serve) as port:
        assert "refused" not in probe(port).problem.lower()


def test_a_server_that_asks_for_our_certificate(tree, pki):
    """None is sent and none is needed to see its own."""

    def configure(context):
        context.verify_mode = ssl.CERT_OPTIONAL

    leaf = pki.leaf()
    with listening(tls(tree, pki.key, leaf, configure)) as port:
        assert looked(port).leaf == fingerprint(leaf)


def test_the_probe_is_counted_as_a_truncated_connection(tree, pki):
    """It ends with close_notify, so the agent's log has no error for each hour."""
    ends = []
    (tree / "served.pem").write_bytes(key_pem(pki.key) + pem(pki.leaf()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(tree / "served.pem"))

    def serve(connection):
        with context.wrap_socket(connection, server_side=True, suppress_ragged_eofs=False) as secured:
            try:
                ends.append(secured.recv(1))
            except OSError as problem:
                ends.append(problem)

    with listening(serve) as port:
        assert probe(port).leaf
        for _ in range(100):
            if ends:
                break
            time.sleep(0.01)
    assert ends == [b""]


# -- waiting for the agent ------------------------------------------------------------------------------------------


class Clock:
    """Time for await_leaf without waiting for it: each look costs `look_s`."""

    def __init__(self, monkeypatch, answers, look_s=0.1):
        self.now, self.looks, self.look_s = 0.0, 0, look_s
        self.answers = answers
        monkeypatch.setattr(service.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(service.time, "sleep", self.sleep)
        monkeypatch.setattr(service, "probe", self.probe)

    def sleep(self, seconds):
        self.now += seconds

    def probe(self, _port):
        self.looks += 1
        self.now += self.look_s
        return self.answers(self.now)


NOTHING, OTHER, WANTED = Served(listening=False), Served(listening=True, leaf="other"), Served(listening=True, leaf="leaf")


def awaited(process, patience=None, told=silent):
    return await_leaf(1270, "leaf", process, patience or Patience(), told)


def test_the_leaf_is_served_already(monkeypatch):
    """One look, no wait."""
    clock = Clock(monkeypatch, lambda now: WANTED)
    assert awaited(lambda: "running") == WANTED
    assert clock.looks == 1


def test_the_leaf_comes_late(monkeypatch):
    """An agent on a loaded host, old certificate first, then nothing, then the new one; a person is told."""
    told = []
    Clock(monkeypatch, lambda now: OTHER if now < 5 else NOTHING if now < 20 else WANTED)
    assert awaited(lambda: "running", told=told.append) == WANTED
    assert set(told) == {"waiting for the agent to serve leaf on port 1270"}


@pytest.mark.parametrize("answer", [OTHER, Served(listening=True, problem="no TLS handshake")])
def test_a_server_that_goes_on_serving_something_else(monkeypatch, answer):
    """The whole time is given, and what was seen last is returned."""
    clock = Clock(monkeypatch, lambda now: answer)
    assert awaited(lambda: "died") == answer
    assert 30 <= clock.now < 31


def test_a_process_that_runs_and_does_not_listen(monkeypatch):
    """It may still be starting: the whole time is given."""
    clock = Clock(monkeypatch, lambda now: NOTHING)
    assert awaited(lambda: "running") == NOTHING
    assert 30 <= clock.now < 31


@pytest.mark.parametrize("state", ["died", "stopped"])
def test_a_server_that_died_on_the_pair(monkeypatch, state):
    """No process and no listener for longer than systemd takes to start it again: not waited for any longer."""
    clock = Clock(monkeypatch, lambda now: NOTHING)
    assert awaited(lambda: state) == NOTHING
    assert 8 <= clock.now < 9


def test_a_server_that_dies_and_is_started_again(monkeypatch):
    """systemd's RestartSec is shorter than the patience: each sign of life begins the wait anew."""
    clock = Clock(monkeypatch, lambda now: WANTED if now > 22 else NOTHING)
    assert awaited(lambda: "running" if int(clock.now) % 6 == 0 else "died") == WANTED


def test_a_probe_that_takes_long_is_not_repeated_for_ever(monkeypatch):
    """The deadline is looked at after each probe, so the bound is the deadline and one probe."""
    clock = Clock(monkeypatch, lambda now: Served(listening=True, problem="silent"), look_s=10.0)
    awaited(lambda: "running")
    assert clock.now <= 40


def test_a_real_agent_that_comes_up_late(tree, pki):
    """With a real socket and small patience."""
    port, leaf = free_port(), pki.leaf()
    stack = contextlib.ExitStack()
    timer = threading.Timer(0.2, lambda: stack.enter_context(listening(tls(tree, pki.key, leaf), port=port)))
    timer.start()
    try:
        assert await_leaf(port, fingerprint(leaf), lambda: "running", QUICK, silent).leaf == fingerprint(leaf)
    finally:
        timer.join()
        stack.close()


# -- control --------------------------------------------------------------------------------------------------------


def tool(tree, text, mode=0o755):
    """A control command in the tree."""
    path = tree / "scxadmin"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(mode)
    return path


def run(root, *words, patience=QUICK, started=silent):
    return control(root, ("/scxadmin", *words), patience, started)


def test_a_command_with_its_words_and_its_status(root, tree):
    """Both are told to a person, on one line; a failure of the command is no more than text."""
    tool(tree, 'echo "did  $1"; echo more >&2; exit 3')
    assert run(root, "-restart") == "/scxadmin -restart: exit status 3; did -restart more"


def test_a_missing_command(root):
    """Told with the package to repair."""
    with pytest.raises(AgentNotReady, match="/scxadmin is missing") as caught:
        run(root)
    assert "package scx" in caught.value.hint


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), os.mkfifo, lambda p: p.symlink_to("/nowhere")])
def test_a_command_that_is_no_file(root, tree, make):
    """A folder, a pipe, a dangling link: as if it were missing, and nothing blocks."""
    make(tree / "scxadmin")
    with pytest.raises(AgentNotReady, match="is missing"):
        run(root)


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_a_command_that_others_may_write(root, tree, mode):
    """Root would run what anybody wrote: refused with the command that mends it."""
    tool(tree, "touch /ran", mode)
    with pytest.raises(AgentNotReady, match="may be written by others") as caught:
        run(root)
    assert "chmod 0755 /scxadmin" in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root: files of another user")
def test_a_command_of_another_user(root, tree):
    """Its owner could change it at any time."""
    os.chown(tool(tree, "true"), 65534, 65534)
    with pytest.raises(AgentNotReady, match="may be written by others"):
        run(root)


@pytest.mark.parametrize(("text", "mode"), [("true", 0o644), (None, 0o755)])
def test_a_command_that_can_not_be_started(root, tree, text, mode):
    """Not executable, or an interpreter that is missing."""
    path = tool(tree, text or "", mode)
    if text is None:
        path.write_text("#!/nowhere/interpreter\n")
    with pytest.raises(AgentNotReady, match="can't be started"):
        run(root)


def test_a_secret_of_ours_in_the_commands_environment(root, tree, monkeypatch):
    """The agent may live for months: it gets a bare environment, no standard input, no descriptor and no controlling terminal."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/x")
    monkeypatch.setenv("MARKER_PASSWORD", "hunter2")
    secret = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(secret, True)
    try:
        tool(tree, 'env; pwd; ls -l /proc/self/fd | tail -n +2 | while read a b c d e f g h i; do echo "fd $i"; done; cat; ps -o sid= -p $$')
        said = run(root)
    finally:
        os.close(secret)
    for word in ("hunter2", "MARKER", "CREDENTIALS", "PYTHON"):
        assert word not in said
    assert "LC_ALL=C" in said
    assert "HOME=/" in said
    assert str(secret) not in [part.split()[0] for part in said.split("fd ")[1:]]


def test_a_daemon_that_keeps_our_output_open(root, tree):
    """The agent inherits standard output: the command's end is enough, and the daemon is left alone."""
    tool(tree, "sleep 30 & echo $!; echo started")
    began = time.monotonic()
    said = run(root)
    assert time.monotonic() - began < 3
    daemon = int(said.split("; ")[1].split()[0])
    try:
        assert start_time(daemon)
    finally:
        os.kill(daemon, signal.SIGKILL)


def test_a_command_that_hangs_is_killed_alone(root, tree):
    """After the deadline it ends; what it started may be the agent, and lives on."""
    tool(tree, f"sleep 60 & echo $! > {tree}/daemon; exec sleep 60")
    pids = []
    began = time.monotonic()
    with pytest.raises(AgentNotReady, match="/scxadmin -restart did not end within 0 s"):
        run(root, "-restart", patience=Patience(command_s=0.3), started=lambda pid, _start: pids.append(pid))
    assert time.monotonic() - began < 3
    daemon = int((tree / "daemon").read_text())
    try:
        assert start_time(pids[0]) == 0, "it is gone, and no zombie"
        assert start_time(daemon)
    finally:
        os.kill(daemon, signal.SIGKILL)


def test_a_command_that_says_too_much(root, tree):
    """Its first 4 kB are for a person; a megabyte and bytes of any kind are no trouble."""
    tool(tree, "head -c 1000000 /dev/zero | tr '\\0' x; printf '\\377\\n'")
    assert len(run(root)) < 5000
    tool(tree, "printf '\\377\\033[31m\\0 red\\n'")
    assert "red" in run(root)


def test_a_command_that_speaks_to_the_terminal(root, tree):
    """What a program says reaches a log on one line and without escape sequences."""
    tool(tree, "printf '\\033[31mred\\033[0m\\007\\n'")
    assert "\x1b" not in run(root)
    assert "\x07" not in run(root)


def test_the_process_is_known_while_it_runs(root, tree):
    """Its pid and start time are in the journal before it ends, so that the next run can wait for it."""
    tool(tree, f"while [ ! -e {tree}/go ]; do sleep 0.01; done")
    seen = []

    def started(pid, start):
        seen.append((pid, start, start_time(pid)))
        (tree / "go").touch()

    run(root, started=started)
    ((pid, start, looked),) = seen
    assert pid > 0
    assert start == looked > 0


# -- a command of an earlier run ------------------------------------------------------------------------------------


@pytest.fixture
def child():
    process = subprocess.Popen(["/bin/sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_start_times_tell_processes_apart(child):
    """Field 22 of stat, whatever the process calls itself; 0 where there is none."""
    assert start_time(child.pid) > 0
    assert start_time(child.pid) >= start_time(os.getpid())
    assert start_time(0) == start_time(-1) == start_time(2**31) == 0
    odd = subprocess.Popen(["/bin/sh", "-c", "printf ') 1 2 (' > /proc/self/comm; echo; exec 1>&-; sleep 5 & wait"], stdout=subprocess.PIPE)
    try:
        odd.stdout.readline()
        assert start_time(odd.pid) >= start_time(child.pid)
    finally:
        odd.kill()
        odd.communicate()


def test_a_command_under_way_is_waited_for(child):
    """It may still restart the agent: nothing is done beside it."""
    started = start_time(child.pid)
    told = []

    def waiting(message):
        told.append(message)
        child.kill()
        child.wait()

    await_end(child.pid, started, QUICK, waiting)
    assert told == [f"waiting for the control command of an earlier run, process {child.pid}"]


def test_a_command_that_never_ends(child):
    """Bounded: status 4 naming the process; it is not killed, it is not ours any more."""
    with pytest.raises(AgentNotReady, match=f"process {child.pid}") as caught:
        await_end(child.pid, start_time(child.pid), Patience(command_s=0.2, poll_s=0.02), silent)
    assert f"ps -fp {child.pid}" in caught.value.hint
    assert child.poll() is None


@pytest.mark.parametrize("known", [lambda pid: (pid, start_time(pid) - 1), lambda pid: (pid, 0), lambda pid: (0, 0), lambda pid: (-1, 7)])
def test_another_process_under_the_same_number(child, known):
    """After a reboot the pid may be anybody's: only the start time says whose it is."""
    await_end(*known(child.pid), QUICK, functools.partial(pytest.fail, "waited for a stranger"))


def test_a_command_that_ended_but_was_not_reaped():
    """In a container whose first process reaps nothing a zombie stays for ever: it has ended all the same."""
    zombie = subprocess.Popen(["/bin/true"])
    try:
        for _ in range(200):
            with open(f"/proc/{zombie.pid}/stat", encoding="ascii") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    break
            time.sleep(0.01)
        with open(f"/proc/{zombie.pid}/stat", encoding="ascii") as file:
            started = int(file.read().rpartition(")")[2].split()[19])
        await_end(zombie.pid, started, Patience(command_s=0.3, poll_s=0.02), silent)
    finally:
        zombie.wait()
