"""How the installed program signs in to a server that insists: the distribution's Python and Kerberos, a KDC, and the lab's CA.

Before each test a client that binds nothing is refused by that very server. The program is a process of its own, as operators run it.
"""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest

from tests import joined
from tests.joined import Joined, Judge, Program
from tests.lab import kdc as realms
from tests.lab.ca import LabCA
from tests.lab.inspecting import Inspecting
from tests.lab.kdc import PYTHON, Kdc
from tests.lab.webcerts import ClientCA
from tests.peers import Peer, tunnel

pytestmark = [pytest.mark.slow, pytest.mark.kdc]

HOST, SERVICE = "HOST1$", "HTTP/localhost"
DAY, HOUR, MINUTE = 86400, 3600, 60
# The program in one process with a look at what it left there, which nobody sees from outside.
INSIDE = """
import ctypes, os, sys
sys.path.insert(0, {folder!r})
from scx_enroll.__main__ import main
before = dict(os.environ)
status = main()
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
assert dict(os.environ) == before
assert [name for name in (b"KRB5CCNAME", b"KRB5_KTNAME", b"KRB5_CLIENT_KTNAME") if getenv(name)] == []
sys.exit(status)
"""


@pytest.fixture(scope="module", autouse=True)
def able():
    """There can be a KDC, and a clock that is ahead."""
    missing = realms.missing() or joined.missing()
    if missing:
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)


@pytest.fixture(scope="module")
def program(able, tmp_path_factory):
    return Program(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def judge(able):
    made = Judge()
    yield made
    made.close()


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Two CAs; making their keys takes a while."""
    with LabCA(tmp_path_factory.mktemp("ca")) as first, LabCA(tmp_path_factory.mktemp("other")) as second:
        yield first, second


@pytest.fixture
def kdc(tmp_path):
    with Kdc(tmp_path / "kdc") as made:
        made.add(HOST, SERVICE, "JUDGE$")
        made.keytab(tmp_path / "judge.keytab", "JUDGE$")
        yield made


def reset(ca, keytab=""):
    ca.switches.reset()
    ca.authority.rows.clear()
    ca.authority.posts = 0
    ca.gate.keytab = keytab
    ca.on_request = None
    del ca.log[:], ca.tokens[:]


@pytest.fixture
def ca(servers, kdc, judge, tmp_path):
    """A CA that takes Kerberos alone, bound; whoever binds nothing has just been refused."""
    for server in servers:
        reset(server, kdc.keytab(tmp_path / "http.keytab", SERVICE))
        server.switches.auth = "kerberos"
        said = judge.status(server.server, server.server_trust, "JUDGE$", str(tmp_path / "judge.keytab"), kdc.config)
        assert (said, server.log[-1].account, server.log[-1].reason) == ("401", "JUDGE$@LAB.TEST", "the client sent no channel bindings")
        del server.log[:], server.tokens[:]
    return servers[0]


@pytest.fixture
def host(ca, kdc, program, tmp_path):
    """It has joined the realm, and nothing is said about how it signs in."""
    made = Joined(tmp_path / "host", program, [ca], kdc.environment)
    kdc.keytab(made.keytab, HOST)
    yield made
    made.close()


def logins(kdc):
    """Tickets for tickets that the host got, failed preauthentications, and tickets for services."""
    return len(kdc.requests("AS_REQ", "ISSUE:", HOST)), kdc.failures, len(kdc.requests("TGS_REQ", "ISSUE:", HOST))


def assert_good(ca):
    """Each token that came was Kerberos, bound, proved, delegated nothing, and was let in; nothing was posted without one."""
    signed = [seen for seen in ca.log if seen.scheme]
    assert signed
    for seen in signed:
        assert (seen.scheme, seen.authenticated, seen.bound, seen.delegated, seen.mutual) == ("Negotiate", True, True, False, True), seen
    assert all(seen.method == "GET" for seen in ca.log if not seen.scheme)
    assert ca.count_bare_post == 0


# -- signed in ----------------------------------------------------------------------------------------------------------


def test_check_does_not_say_how_it_signed_in_or_submits_something(host, ca, kdc):
    """It is the operator's first command: what is offered, used, bound, and as whom, and nothing is asked for."""
    before = host.snapshot()
    facts = host.check()
    assert {key: facts[key] for key in ("offered", "auth", "signed_in", "account", "exit_status", "error")} == {
        "offered": ["Negotiate"], "auth": "kerberos", "signed_in": True, "account": "HOST1$@LAB.TEST", "exit_status": 0, "error": None,
    }  # fmt: skip
    assert facts["binding"].startswith("tls-server-end-point, ")
    assert (ca.log[0].scheme, ca.log[0].status) == ("", 401)  # what is offered was asked without signing in
    assert_good(ca)
    assert (ca.count_post, ca.authority.posts, host.snapshot()) == (0, 0, before)
    assert logins(kdc) == (1, 0, 1)
    said = host.run("check").stdout
    assert re.search(r"^localhost:\d+: signed in\n  offers +Negotiate\n  used +kerberos, as HOST1\$@LAB\.TEST\n  binding +tls-server-end-point, ", said)
    assert re.search(r"\n  certificate +subject CN=.*, issuer CN=Lab Web Root.*, SHA-256 [0-9a-f]{64}\n$", said)


@pytest.mark.parametrize(
    ("https", "digest"),
    [
        ("rsa-sha256", "sha256"), ("rsa-sha384", "sha384"), ("rsa-sha512", "sha512"), ("ecdsa-sha384", "sha384"), ("pss-sha256", "sha256"),
        ("pss-sha384", "sha384"), ("pss-sha512", "sha512"), ("ed25519", "sha256"), ("rsa-sha1", "sha256"),
    ],
)  # fmt: skip
def test_a_signature_whose_digest_is_not_known(host, ca, tmp_path, https, digest):
    """The binding's digest is the signature's; old cryptography can't name that of RSA-PSS, and a wrong one is a refused sign-in."""
    settings = {}
    if https == "rsa-sha1":  # OpenSSL takes such a chain only where the host's administrator says so
        assert host.check()["exit_status"] == 0
        settings["OPENSSL_CONF"] = str(tmp_path / "openssl.cnf")
        lines = "openssl_conf = all\n[all]\nssl_conf = ssl\n[ssl]\nsystem_default = old\n[old]\nCipherString = DEFAULT:@SECLEVEL=0\n"
        (tmp_path / "openssl.cnf").write_text(lines)
    ca.switches.https = https
    facts = host.check(**settings)
    assert (facts["exit_status"], facts["binding"]) == (0, f"tls-server-end-point, {digest}"), facts["error"]
    assert_good(ca)


@pytest.mark.parametrize(
    "switches",
    [
        {"offers": "one"}, {"offers": "lower"}, {"offers": "parameters"}, {"persist": False}, {"connection": "close"}, {"connection": "1.0"},
        {"unauthorized_body": "large"}, {"unauthorized_body": "empty"}, {"auth": "negotiate"}, {"auth": "epa", "epa": "off"}, {"epa": "allow"},
    ],
    ids=lambda switches: "-".join(f"{name}={value}" for name, value in switches.items()),
)  # fmt: skip
def test_a_server_that_offers_or_closes_in_another_way(host, ca, switches):
    """Schemes come in one header or several, in any case; connections stay or do not: the channel is bound all the same."""
    ca.switches.update(switches)
    facts = host.check()
    assert facts["error"] is None
    assert [offer.lower() for offer in facts["offered"]] == (["negotiate", "ntlm"] if "auth" in switches else ["negotiate"])
    assert_good(ca)


def test_another_keytab_or_principal_is_not_used(host, ca, kdc):
    """Not every host has its key in /etc/krb5.keytab, or signs in by its computer account."""
    kdc.add("SVC-SCX", "ODD$")
    kdc.keytab(host.root / "etc/scx.keytab", "SVC-SCX", "HOST1$")
    os.unlink(host.keytab)
    host.configure("keytab = /etc/scx.keytab", "principal = SVC-SCX")
    assert host.check()["account"] == "SVC-SCX@LAB.TEST"
    assert ca.log[-1].account == "SVC-SCX@LAB.TEST"
    host.configure("keytab = /etc/scx.keytab", "principal = HOST1$@LAB.TEST")
    assert host.check()["account"] == "HOST1$@LAB.TEST"
    host.configure("keytab = /etc/scx.keytab")
    assert host.check()["account"] == "HOST1$@LAB.TEST"  # the one that ends with $
    host.configure("keytab = /etc/scx.keytab", "principal = ODD$")
    assert "holds no key of ODD$, only of HOST1$@LAB.TEST, SVC-SCX@LAB.TEST" in host.check()["error"]


def test_a_keytab_of_several_computers_is_guessed_from(host, ca, kdc):
    """This host's own account is meant, by its name; where none has that, the operator must say which."""
    own = f"{socket.gethostname().partition('.')[0].upper()}$"
    kdc.add("OTHER$", own)
    kdc.keytab(host.keytab, HOST, "OTHER$", own, "HTTP/localhost")
    assert host.check()["account"] == f"{own}@LAB.TEST"
    kdc.keytab(host.keytab, HOST, "OTHER$")
    tokens = len(ca.tokens)
    facts = host.check()
    assert (facts["exit_status"], len(ca.tokens)) == (13, tokens)
    assert "holds keys of several accounts: HOST1$@LAB.TEST, OTHER$@LAB.TEST" in facts["error"]
    assert "principal=" in facts["hint"]


def test_an_old_key_beside_the_new_one(host, kdc, tmp_path):
    """Keytabs keep former keys, so that tickets under way are still read; ours is the newest."""
    old = host.keytab.read_bytes()
    kdc.change_key(HOST)
    kdc.keytab(host.keytab, HOST)
    both = host.keytab.read_bytes()
    host.keytab.write_bytes(both + old[2:])
    assert host.check()["error"] is None
    host.keytab.write_bytes(old + both[2:])
    assert host.check()["error"] is None
    assert kdc.failures == 0
    kdc.change_key(HOST)
    assert "(kvno 2) is out of date" in host.check()["error"]


def test_a_systemd_credential_is_not_used(host, ca, kdc, tmp_path):
    """LoadCredential= hands a keytab over that the host need not have at rest; a CA's own comes before the common one."""
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    kdc.add("COMMON$", "OWN$")
    settings = {"CREDENTIALS_DIRECTORY": str(credentials), "live": True}
    kdc.keytab(credentials / "keytab", "COMMON$")
    assert host.check(**settings)["account"] == "COMMON$@LAB.TEST"
    assert host.check(CREDENTIALS_DIRECTORY=str(credentials))["account"] == "HOST1$@LAB.TEST"  # of an image's own, never the builder's
    text = (host.root / "etc/scx-enroll/scx-enroll.conf").read_text().replace("[ca]", "[ca north]")
    host.write("scx-enroll.conf", text.encode())
    assert host.check(**settings)["account"] == "COMMON$@LAB.TEST"
    kdc.keytab(credentials / "keytab-north", "OWN$")
    assert host.check(**settings)["account"] == "OWN$@LAB.TEST"
    assert_good(ca)


def test_a_ticket_in_a_file_or_a_variable_in_the_environment(host, program, tmp_path):
    """Whoever finds a ticket cache is this host: there is none, not even where KRB5CCNAME says so, and nothing is created but the state."""
    trace, cache = tmp_path / "trace", tmp_path / "cache"
    (host.root / "var/lib/scx-enroll").mkdir(parents=True, mode=0o700)
    strace = ["strace", "-f", "-qq", "-e", "trace=open,openat,creat,mknod,mknodat,link,linkat,symlink,symlinkat,mkdir,mkdirat", "-o", str(trace)]
    ran = host.run("run", before=strace, KRB5CCNAME=f"FILE:{cache}", KRB5RCACHEDIR=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    made = [line for line in trace.read_text().splitlines() if re.search(r"O_CREAT|O_TMPFILE|creat\(|mknod|link|mkdir", line) and "= -1 " not in line]
    places = {name for line in made for name in re.findall(r'"(/[^"]*)"', line)}
    assert made  # the state was written
    assert [name for name in places if not name.startswith((str(host.root), "/dev/", "/proc/self/fd/"))] == []
    assert not cache.exists()
    assert not [line for line in made if "krb5" in line]
    inside = tmp_path / "inside"
    inside.write_text(INSIDE.format(folder=program.folder))
    program.path, kept = inside, program.path
    try:
        assert host.run("check").returncode == 0
    finally:
        program.path = kept


def test_credentials_are_delegated(host, ca, kdc, tmp_path):
    """Neither a realm that makes tickets forwardable, nor a service that is trusted for it, makes us hand ours over."""
    kdc.kadmin("modprinc +ok_as_delegate HTTP/localhost")
    config = tmp_path / "krb5.conf"
    with open(kdc.config, encoding="utf-8") as file:
        text = file.read()
    config.write_text(text.replace("[libdefaults]", "[libdefaults]\n forwardable = true\n proxiable = true"))
    assert host.check(KRB5_CONFIG=str(config))["error"] is None
    assert_good(ca)


@pytest.mark.parametrize("persist", [True, False])
def test_an_enrolment_posts_twice_or_without_its_token(host, ca, kdc, persist):
    """From nothing to a certificate that the running agent serves: one POST, that one signed in, and one ticket for all of it."""
    ca.switches.persist = persist
    assert host.host.start()
    ran = host.run("run", live=True)
    assert ran.returncode == 0, ran.stderr
    (row,) = ca.authority.rows.values()
    assert (row.requester, row.certificate) == ("HOST1$@LAB.TEST", host.host.served())
    assert [seen.path for seen in ca.log if seen.method == "POST"] == ["/certsrv/certfnsh.asp"]
    assert (ca.count_post, ca.count_bare_post, ca.authority.posts) == (1, 0, 1)
    assert_good(ca)
    assert logins(kdc) == (1, 0, 1)
    written = ran.stdout.encode() + ran.stderr.encode() + b"".join(path.read_bytes() for path in host.root.rglob("*") if path.is_file())
    for token in ca.tokens:  # neither as it was sent nor decoded
        assert token.split()[1].encode() not in written
        assert base64.b64decode(token.split()[1]) not in written
    arrived = len(ca.log)
    assert host.run("run", live=True).returncode == 0
    assert (len(ca.log), logins(kdc)) == (arrived, (1, 0, 1))  # nothing to do: neither the CA nor the KDC is asked


def name_both(tmp_path):
    """The second CA is called ca.lab.test."""
    (tmp_path / "hosts").write_text("127.0.0.1 localhost ca.lab.test\n")
    return {"LD_PRELOAD": joined.WRAPPER, "NSS_WRAPPER_HOSTS": str(tmp_path / "hosts")}


@pytest.mark.parametrize("refusing", [0, 1])
def test_a_token_for_one_server_goes_to_another(servers, ca, kdc, program, tmp_path, refusing):
    """With several CAs, of which one refuses us, the other serves; each gets tickets of its own name only, and one POST is made."""
    kdc.add("HTTP/ca.lab.test")
    servers[1].gate.keytab = kdc.keytab(tmp_path / "second.keytab", "HTTP/ca.lab.test")
    servers[refusing].switches.bound_to = "other"
    host = Joined(tmp_path / "host", program, servers, {**kdc.environment, **name_both(tmp_path)})
    kdc.keytab(host.keytab, HOST)
    names = [servers[0].server, servers[1].server.replace("localhost", "ca.lab.test")]
    host.configure(servers=names)
    checked = json.loads(host.run("check", "--json").stdout)
    assert [one["exit_status"] for one in checked] == [13 * (refusing == number) for number in (0, 1)]
    ran = host.run("run")
    assert ran.returncode == 0, ran.stderr
    good, bad = servers[1 - refusing], servers[refusing]
    assert (good.count_post, good.authority.posts, bad.count_post) == (1, 1, 0)
    assert good.count_bare_post == bad.count_bare_post == 0
    for server, own, other in ((servers[0], b"localhost", b"ca.lab.test"), (servers[1], b"ca.lab.test", b"localhost")):
        tickets = [base64.b64decode(token.split()[1]) for token in server.tokens]
        assert tickets
        assert all(own in ticket and other not in ticket for ticket in tickets)  # the service's name stands in the clear in a ticket
    assert not set(servers[0].tokens) & set(servers[1].tokens)


@pytest.mark.parametrize("status", ["302", "307"])
def test_a_redirect_is_followed_with_or_without_a_token(host, ca, status):
    """Whoever stands before the CA could send us anywhere: neither requests nor tokens follow."""
    ca.switches.answer = status
    facts = host.check()
    assert facts["exit_status"] == 5
    assert "sends us elsewhere" in facts["error"]
    assert host.run("run").returncode == 5
    assert {seen.path for seen in ca.log} == {"/certsrv/certcarc.asp"}
    assert len(ca.tokens) <= 2  # to the configured server, one for each attempt
    assert ca.count_post == 0


def test_a_proxy_gets_a_token(host, ca):
    """It passes TLS on unread, so the binding holds; who we are is said inside, and never to the proxy."""
    peer = Peer(tunnel)
    try:
        host.configure(f"proxy = http://127.0.0.1:{peer.port}")
        assert host.check()["error"] is None
        assert host.run("run").returncode == 0
    finally:
        peer.close()
    assert_good(ca)
    assert (ca.count_post, len(peer.received) >= len(ca.log)) == (1, True)
    assert all(request.startswith(b"CONNECT localhost:") and b"uthoriz" not in request for request in peer.received)


def test_a_variable_of_whoever_calls_leads_astray(host, ca):
    """The configuration says where we go and as whom; a shell's variables do not."""
    names = ("KRB5_KTNAME", "KRB5_CLIENT_KTNAME", "KRB5CCNAME", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
    assert host.check(HTTPS_PROXY="http://127.0.0.1:9", **dict.fromkeys(names, "/nonexistent"))["error"] is None
    assert_good(ca)


# -- not signed in ------------------------------------------------------------------------------------------------------


def rewritten(kdc, host, change):
    """The host has another krb5.conf."""
    path = host.root / "etc/krb5.conf"
    with open(kdc.config, encoding="utf-8") as file:
        text = file.read()
    assert change(text) != text
    path.write_text(change(text))
    host.settings["KRB5_CONFIG"] = str(path)


def no_keytab(host, ca, kdc):
    os.unlink(host.keytab)


def no_such_keytab(host, ca, kdc):
    host.configure("keytab = /etc/other.keytab")  # the default is there, and not taken instead


def empty_keytab(host, ca, kdc):
    host.keytab.write_bytes(b"")


def no_keys(host, ca, kdc):
    host.keytab.write_bytes(b"\5\2")


def garbage_keytab(host, ca, kdc):
    host.keytab.write_bytes(b"-----BEGIN CERTIFICATE-----\n")


def torn_keytab(host, ca, kdc):
    host.keytab.write_bytes(host.keytab.read_bytes()[:-9])


def no_machine_key(host, ca, kdc):
    kdc.add("host/host1.lab.test")
    kdc.keytab(host.keytab, "host/host1.lab.test")


def loose_keytab(host, ca, kdc):
    host.keytab.chmod(0o640)


def keytab_of_another(host, ca, kdc):
    os.chown(host.keytab, 4711, 4711)


def stale_key(host, ca, kdc):
    kdc.change_key(HOST)


def stale_key_without_preauth(host, ca, kdc):
    kdc.kadmin(f"modprinc -requires_preauth {HOST}")
    kdc.change_key(HOST)


def gone(host, ca, kdc):
    kdc.delete(HOST)


def disabled(host, ca, kdc):
    kdc.disable(HOST)


def expired(host, ca, kdc):
    kdc.expire(HOST)


def expired_password(host, ca, kdc):
    kdc.expire_password(HOST)


def no_kdc(host, ca, kdc):
    kdc.stop()


def nameless_kdc(host, ca, kdc):
    rewritten(kdc, host, lambda text: text.replace("127.0.0.1", "kdc.nowhere.invalid"))


def no_realm(host, ca, kdc):
    rewritten(kdc, host, lambda text: re.sub(r"(?s)\[realms\].*(?=\[domain_realm\])", "", text))


def broken_config(host, ca, kdc):
    rewritten(kdc, host, lambda text: text + "\n[x\n{\n")


def unknown_service(host, ca, kdc):
    kdc.delete(SERVICE)


def locked_service(host, ca, kdc):
    kdc.disable(SERVICE)


def other_service_key(host, ca, kdc):
    kdc.change_key(SERVICE)


def other_service_key_silently(host, ca, kdc):
    kdc.change_key(SERVICE)
    ca.switches.error_token = False


def other_binding(host, ca, kdc):
    ca.switches.bound_to = "other"


def other_binding_where_it_is_optional(host, ca, kdc):
    ca.switches.update({"bound_to": "other", "epa": "allow", "error_token": False})


def only_ntlm(host, ca, kdc):
    ca.switches.auth = "ntlm"


def nobody_asked(host, ca, kdc):
    ca.switches.auth = "anonymous"


def no_proof(host, ca, kdc):
    ca.switches.mutual = "off"


def wrong_proof(host, ca, kdc):
    ca.switches.mutual = "wrong"


def no_enroll(host, ca, kdc):
    ca.switches.enroll = "denied"


DUE = "join the host to the domain (adcli join, realm join)"
CERTIFICATE = "issuer CN=Lab Web Root,DC=lab,DC=test, SHA-256 "
# What is done; a part of the message and of the hint; tokens that `check` sends, failed preauthentications; when it is tried again.
FAILURES = [
    (no_keytab, "there is no keytab: /etc/krb5.keytab does not exist", DUE, 0, 0, 5 * MINUTE),
    (no_such_keytab, "there is no keytab: /etc/other.keytab does not exist", DUE, 0, 0, 5 * MINUTE),
    (empty_keytab, "the keytab /etc/krb5.keytab is empty", "name another file (keytab= in [ca])", 0, 0, 5 * MINUTE),
    (no_keys, "the keytab /etc/krb5.keytab holds no keys", DUE, 0, 0, 5 * MINUTE),
    (garbage_keytab, "the keytab /etc/krb5.keytab is no keytab", "name another file (keytab= in [ca])", 0, 0, 5 * MINUTE),
    (torn_keytab, "the keytab /etc/krb5.keytab is a damaged keytab", "name another file (keytab= in [ca])", 0, 0, 5 * MINUTE),
    (no_machine_key, "holds no key of a computer account, whose name ends with $, only of host/host1.lab.test@LAB.TEST", DUE, 0, 0, 5 * MINUTE),
    (stale_key, "the key of HOST1$@LAB.TEST in /etc/krb5.keytab (kvno 1) is out of date: LAB.TEST knows another one", "adcli update", 0, 1, HOUR),
    (stale_key_without_preauth, "(kvno 1) is out of date", "adcli update", 0, 0, HOUR),
    (gone, "LAB.TEST has no account HOST1$@LAB.TEST", "join the host again", 0, 0, 5 * MINUTE),
    (disabled, "the account HOST1$@LAB.TEST is disabled, locked or expired in LAB.TEST", "Enable-ADAccount", 0, 0, HOUR),
    (expired, "the account HOST1$@LAB.TEST is disabled, locked or expired in LAB.TEST", "Enable-ADAccount", 0, 0, HOUR),
    (expired_password, "the account HOST1$@LAB.TEST is disabled, locked or expired in LAB.TEST", "reset it", 0, 0, HOUR),
    (no_kdc, "no domain controller of LAB.TEST answers", "see port 88 in the firewalls, and DNS (SRV records _kerberos._tcp.LAB.TEST)", 0, 0, 5 * MINUTE),
    (nameless_kdc, "no domain controller of LAB.TEST answers", "see port 88", 0, 0, 5 * MINUTE),
    (no_realm, "no domain controller of LAB.TEST can be found", "realms and dns_lookup_kdc in /etc/krb5.conf", 0, 0, 5 * MINUTE),
    (broken_config, "/etc/krb5.conf can't be used: Improper format of Kerberos configuration file", "mend it", 0, 0, HOUR),
    (unknown_service, "LAB.TEST knows no service HTTP/localhost", "server= must be the name that the CA's web server is registered by", 0, 0, HOUR),
    (locked_service, "LAB.TEST knows no service HTTP/localhost", "setspn -Q", 0, 0, HOUR),
    (other_service_key, "can't read the ticket for HTTP/localhost", "setspn -Q HTTP/localhost", 1, 0, HOUR),
    (other_service_key_silently, CERTIFICATE, "inspecting proxy's", 1, 0, HOUR),
    (other_binding, CERTIFICATE, "inspecting proxy's", 1, 0, HOUR),
    (other_binding_where_it_is_optional, CERTIFICATE, "inspecting proxy's", 1, 0, HOUR),
    (only_ntlm, "does not offer to sign in by Negotiate, but by NTLM", "provider Negotiate", 1, 0, HOUR),
    (nobody_asked, "did not prove that it is HTTP/localhost", "anonymous access", 1, 0, HOUR),
    (no_proof, "did not prove that it is HTTP/localhost", "see what stands between", 1, 0, HOUR),
    (wrong_proof, "did not prove that it is HTTP/localhost", "see what stands between", 1, 0, HOUR),
    (no_enroll, "forbids access to /certsrv (HTTP 403)", "may HOST1$@LAB.TEST use /certsrv?", 1, 0, HOUR),
]


@pytest.mark.parametrize(("spoil", "message", "hint", "tokens", "failures", "wait_s"), FAILURES, ids=[case[0].__name__ for case in FAILURES])
def test_a_failure_that_looks_like_another(host, ca, kdc, spoil, message, hint, tokens, failures, wait_s):
    """libkrb5 says "No credentials cache found" for half of these: each has its own message, hint and wait, and costs no more than itself.

    Nothing is submitted and nothing on the host changes; `run` says the same as `check`.
    """
    spoil(host, ca, kdc)
    before = host.snapshot()
    facts = host.check()
    assert (facts["exit_status"], facts["signed_in"], facts["binding"]) == (13, False, None)
    assert message in facts["error"]
    assert hint in facts["hint"]
    assert (len(ca.tokens), kdc.failures) == (tokens, failures)
    ran = host.run("run", "--json")
    shown = json.loads(ran.stdout)
    assert (ran.returncode, shown["reason"]) == (13, facts["error"])
    assert wait_s - 5 <= shown["until"] - shown["time"] <= wait_s
    assert (len(ca.tokens), kdc.failures) == (2 * tokens, failures)
    assert (ca.count_post, ca.authority.posts, host.snapshot()) == (0, 0, before)
    assert not any("NTLM" in token or token.startswith("Basic") for token in ca.tokens)


def test_a_server_that_proves_itself_until_the_request_is_sent(host, ca):
    """Whoever answered the POST is not known: what it says is not believed, and the request is not sent again, lest there be two."""

    def begin():
        ca.switches.mutual = "off" if ca.log[-1].method == "POST" else "on"

    ca.on_request = begin
    before = host.snapshot()
    ran = host.run("run")
    assert ran.returncode == 5, ran.stderr
    assert "did not prove that it is HTTP/localhost" in ran.stderr
    assert host.run("run", "--now").returncode == 5
    assert (ca.count_post, ca.authority.posts, host.snapshot()) == (1, 1, before)


@pytest.mark.asleep
def test_a_kdc_that_takes_requests_and_answers_none(host, ca, kdc):
    """A firewall that drops: libkrb5 gives up by itself after half a minute, and the message is the same as for a closed port."""
    with socket.create_server(("127.0.0.1", 0)) as stream, socket.socket(type=socket.SOCK_DGRAM) as datagram:
        datagram.bind(stream.getsockname())
        rewritten(kdc, host, lambda text: text.replace(f":{kdc.port}", f":{stream.getsockname()[1]}"))
        began = time.monotonic()
        facts = host.check()
    assert (facts["exit_status"], facts["error"], ca.tokens) == (13, "no domain controller of LAB.TEST answers", [])
    assert time.monotonic() - began < 75


@pytest.mark.parametrize(("spoil", "message"), [(loose_keytab, "is open to others than its owner"), (keytab_of_another, "belongs to user 4711, not to root")])
def test_a_keytab_that_is_not_root_s_alone(host, ca, kdc, spoil, message):
    """Whoever can read it is this host; whoever can write it decides as whom we sign in."""
    spoil(host, ca, kdc)
    facts = host.check()
    assert (facts["exit_status"], f"/etc/krb5.keytab {message}" in facts["error"], ca.tokens) == (3, True, [])
    assert facts["hint"] in ("chmod 600 /etc/krb5.keytab", "chown root /etc/krb5.keytab")
    assert host.run("run").returncode == 3


def test_an_alias_of_the_server(host, ca, kdc, tmp_path):
    """Tickets are for the name that the server is registered by: the message names it."""
    (tmp_path / "hosts").write_text("127.0.0.1 ca01.lab.test ca.lab.test\n")
    kdc.add("HTTP/ca01.lab.test")
    host.settings.update({"LD_PRELOAD": joined.WRAPPER, "NSS_WRAPPER_HOSTS": str(tmp_path / "hosts")})
    host.configure(servers=[ca.server.replace("localhost", "ca.lab.test")])
    facts = host.check()
    assert (facts["exit_status"], facts["error"], ca.tokens) == (13, "LAB.TEST knows no service HTTP/ca.lab.test", [])
    assert facts["hint"].endswith("no alias and no address; ca.lab.test is an alias of ca01.lab.test")


@pytest.mark.parametrize("registered", ["ca01.lab.test", ""])
def test_a_name_that_libkrb5_makes_of_another(host, ca, kdc, tmp_path, registered):
    """Where krb5.conf has names canonicalised, an alias does; where that leads nowhere, the name that was asked for is told."""
    (tmp_path / "hosts").write_text("127.0.0.1 ca01.lab.test ca.lab.test\n")
    host.settings.update({"LD_PRELOAD": joined.WRAPPER, "NSS_WRAPPER_HOSTS": str(tmp_path / "hosts")})
    host.configure(servers=[ca.server.replace("localhost", "ca.lab.test")])
    rewritten(kdc, host, lambda text: text.replace("canonicalize_hostname = false", "canonicalize_hostname = true"))
    if registered:
        kdc.add("HTTP/ca01.lab.test")
        ca.gate.keytab = kdc.keytab(tmp_path / "ca01.keytab", "HTTP/ca01.lab.test")
        assert host.check()["error"] is None
        assert_good(ca)
    else:
        expected = "LAB.TEST knows no service HTTP/ca.lab.test, asked for as HTTP/ca01.lab.test (see rdns in krb5.conf)"
        assert (host.check()["error"], ca.tokens) == (expected, [])


def test_an_address_in_place_of_the_server_s_name(host, ca):
    """There is no ticket for an address: that is known before anything is asked."""
    host.configure(servers=[ca.server.replace("localhost", "127.0.0.1")])
    ran = host.run("check")
    assert (ran.returncode, ca.log) == (3, [])
    assert "there are no tickets for addresses" in ran.stderr


@pytest.mark.parametrize("offset_s", [10 * MINUTE, -10 * MINUTE])
def test_a_clock_that_is_wrong(host, ca, kdc, offset_s):
    """Kerberos needs clocks that agree; where libkrb5 does not make up for it, that is said, and tried again soon."""
    rewritten(kdc, host, lambda text: text.replace("[libdefaults]", "[libdefaults]\n kdc_timesync = 0"))
    facts = host.check(later_s=offset_s)
    assert (facts["exit_status"], ca.tokens) == (13, [])
    assert "this host's clock and those of the domain controllers of LAB.TEST are too far apart" in facts["error"]
    told = re.search(r"; this host's is (\d+) s (ahead of|behind) that of localhost:\d+$", facts["error"])
    assert told and told[2] == ("ahead of" if offset_s > 0 else "behind")
    assert abs(int(told[1]) - 10 * MINUTE) < MINUTE
    assert "set the clock" in facts["hint"]
    assert host.waits_s(later_s=offset_s) == (13, 5 * MINUTE)


def test_a_server_whose_clock_is_wrong(host, ca, kdc, monkeypatch):
    """It says so in its refusal, which is neither a bad key nor a proxy; clocks are set by themselves, so it is tried again soon."""
    acceptor = ca.gate.acceptors["kerberos"]
    acceptor.close()
    monkeypatch.setattr(acceptor, "_environment", {**acceptor._environment, "LD_PRELOAD": joined.FAKETIME, "FAKETIME": "+1h", "TZ": "UTC"})
    try:
        facts = host.check()
        assert facts["exit_status"] == 13
        assert re.fullmatch(r"the clocks of this host and of localhost:\d+ are too far apart", facts["error"])
        assert host.waits_s("run") == (13, 5 * MINUTE)
    finally:
        acceptor.close()
    assert (len(ca.tokens), ca.count_post) == (2, 0)


@pytest.mark.parametrize("spoil", [no_kdc, unknown_service, other_binding, other_service_key, stale_key, no_keytab])
def test_ntlm_is_tried_where_kerberos_fails(host, ca, kdc, spoil):
    """The server offers both; what is configured is used, or nothing."""
    ca.switches.auth = "negotiate"
    spoil(host, ca, kdc)
    facts = host.check()
    assert (facts["exit_status"], facts["offered"] in (["Negotiate", "NTLM"], None)) == (13, True)
    assert host.run("run", "--now").returncode == 13
    assert not any(token.startswith("NTLM") or b"NTLMSSP" in base64.b64decode(token.split()[1]) for token in ca.tokens)
    assert ca.count_post == 0


@pytest.mark.parametrize(("epa", "root_name"), [("require", "Inspecting Root"), ("require", "Lab Web Root"), ("allow", "Inspecting Root")])
def test_a_man_in_the_middle_whose_root_is_trusted(host, ca, tmp_path, epa, root_name):
    """A proxy that ends TLS passes our token on: the server refuses it, and its certificate is named, since ours to notice is all there is."""
    ca.switches.update({"epa": epa, "error_token": False})
    with Inspecting(tmp_path / "proxy", ca.server, ca.server_trust, root_name=root_name) as proxy:
        with open(proxy.trust, "rb") as file:
            host.write("web0.pem", file.read())
        host.configure(servers=[proxy.server])
        facts = host.check()
        assert host.run("run").returncode == 13
        assert proxy.requests >= 2
    assert facts["exit_status"] == 13
    shown = re.search(r"its TLS certificate: subject CN=localhost, issuer CN=(.*),DC=lab,DC=test, SHA-256 ([0-9a-f]{64})$", facts["error"])
    assert shown and shown[1] == root_name
    assert facts["certificate"].endswith(shown[2])
    assert "inspecting proxy" in facts["hint"]
    assert "channel bindings" in ca.log[-1].reason
    assert (ca.count_post, ca.authority.posts, [seen.authenticated for seen in ca.log if seen.scheme]) == (0, 0, [False, False])


@pytest.mark.parametrize(("auth", "module", "packages"), [
    ("kerberos", "gssapi", ("apt install python3-gssapi", "dnf install python3-gssapi", "zypper install python3-gssapi")),
    ("ntlm", "requests_ntlm", ("apt install python3-requests-ntlm", "dnf install python3-requests_ntlm")),
])  # fmt: skip
def test_a_module_that_is_not_installed(host, ca, auth, module, packages):
    """Packages only recommend it: the message names what to install, for each distribution, and no server is asked."""
    host.write("password", b"secret\n", 0o600)
    host.configure(*(["auth = ntlm", "user = LAB\\svc-enroll"] if auth == "ntlm" else []))
    ran = host.run("check", interpreter=sys.executable)
    assert (ran.returncode, ca.log) == (3, [])
    assert f"auth = {auth} needs the module {module} of {sys.executable}: No module named '{module}'" in ran.stderr
    assert all(package in ran.stderr for package in packages)
    assert host.run("run", interpreter=sys.executable).returncode == 3


# -- again --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [no_keytab, gone], ids=lambda spoil: spoil.__name__)
def test_a_domain_join_is_waited_for_too_long_or_not_at_all(host, ca, kdc, spoil):
    """At first boot it is normal: tried after 5, 10, 15 minutes and so on; who has not joined within a day is waited for like other people."""
    spoil(host, ca, kdc)
    assert host.waits_s("run") == (13, 5 * MINUTE)
    assert host.waits_s("run", later_s=2 * MINUTE)[0] == 13
    assert len(ca.log) == 0  # that one was not due
    at, waits = 0, [5 * MINUTE]
    for _ in range(3):
        at += waits[-1] + 5
        status, wait = host.waits_s("run", "--unattended", later_s=at)
        assert status == 0  # nothing is held that could run out
        waits.append(wait)
    assert [round(wait / MINUTE) for wait in waits] == [5, 10, 15, 15]
    path = host.root / "var/lib/scx-enroll/journal.json"
    journal = json.loads(path.read_text())
    assert journal["backoffs"][0]["failures"] == 4
    journal["backoffs"][0]["failures"] = DAY // (15 * MINUTE)  # such a day was lived through
    path.write_text(json.dumps(journal))
    at += waits[-1] + 5
    status, wait = host.waits_s("run", "--unattended", later_s=at)
    assert (status, round(wait / HOUR)) == (13, 1)
    assert host.run("run", "--now").returncode == 13
    assert (ca.tokens, ca.count_post, kdc.failures) == ([], 0, 0)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_keytab, ("run", "--unattended")), (no_machine_key, ("run",)), (stale_key, ("run",)), (stale_key, ("run", "--unattended")),
        (gone, ("run", "--unattended")),
    ],
    ids=lambda value: getattr(value, "__name__", " ".join(value) if isinstance(value, tuple) else None),
)  # fmt: skip
def test_a_new_keytab_has_to_wait(host, ca, kdc, spoil, words):
    """Joining, and joining again, are the cure: the next look tries it, whatever it waited for."""
    spoil(host, ca, kdc)
    assert host.run("run").returncode == 13
    tried = logins(kdc)
    assert host.run(*words).returncode == (13 if spoil is stale_key or words == ("run",) else 0)
    assert logins(kdc) == tried  # not due
    if spoil is gone:
        kdc.add(HOST)
    kdc.keytab(host.keytab, HOST)
    ran = host.run(*words)
    assert ran.returncode == 0, ran.stderr
    assert (ca.count_post, ca.count_bare_post, ca.authority.posts) == (1, 0, 1)
    assert kdc.failures == (spoil is stale_key)


COMMANDS = [("run",), ("run", "--now"), ("run", "--unattended"), ("check",), ("ca-cert", "--fetch"), ("run", "--unattended", "--now")]


@pytest.mark.parametrize("first", [("run",), ("check",), ("ca-cert", "--fetch")], ids=" ".join)
def test_a_stale_key_is_sent_again_by_another_command(host, ca, kdc, first):
    """Domain controllers count: whatever is called, and however often, it was one failed attempt."""
    stale_key(host, ca, kdc)
    assert host.run(*first).returncode == 13
    assert kdc.failures == 1
    for words in {"run": COMMANDS}.get(first[0], COMMANDS[:4]):
        ran = host.run(*words)
        assert (ran.returncode, "is out of date: LAB.TEST knows another one" in ran.stderr, kdc.failures) == (13, True, 1), words
    assert (ca.tokens, ca.count_post) == ([], 0)


def test_a_stale_key_that_time_makes_good(host, ca, kdc):
    """An old key may be one that has not reached every domain controller: it is tried again, each time later, and in the end once a day."""
    stale_key(host, ca, kdc)
    at, waits = 0, []
    for number in range(1, 8):
        status, wait = host.waits_s("run", "--unattended", later_s=at)
        assert (status, kdc.failures) == (13, number)
        assert host.run("check", later_s=at + wait - MINUTE).returncode == 13
        assert kdc.failures == number  # not due
        waits.append(round(wait / HOUR))
        at += wait + MINUTE
    assert waits[0] >= 1
    assert waits[-2:] == [24, 24]
    assert sum(waits[:5]) >= 24  # within a day they do not lock what locks after five
    assert (ca.tokens, ca.count_post) == ([], 0)


def test_a_stale_key_that_each_ca_costs_an_attempt(servers, ca, kdc, program, tmp_path):
    """The key is the same for all CAs: what one of them brought to light counts for the others."""
    host = Joined(tmp_path / "host", program, servers, kdc.environment)
    kdc.keytab(host.keytab, HOST)
    stale_key(host, ca, kdc)
    for words in COMMANDS[:5]:
        ran = host.run(*words)
        assert (ran.returncode, "is out of date" in ran.stderr, kdc.failures) == (13, True, 1), words
    kdc.keytab(host.keytab, HOST)
    assert host.run("run").returncode == 0
    assert (sum(server.count_post for server in servers), kdc.failures) == (1, 1)


def test_submit_signs_in_otherwise_than_run(host, ca, kdc, tmp_path):
    """Another's request goes the same way: bound, proved, posted once."""
    request = tmp_path / "host1.csr"
    request.write_text(host.run("csr").stdout)
    ran = host.run("submit", str(request))
    assert ran.returncode == 0, ran.stderr
    assert_good(ca)
    assert (ca.count_post, ca.authority.posts, logins(kdc)) == (1, 1, (1, 0, 1))


def test_submit_sends_a_stale_key_once_more(host, ca, kdc, tmp_path):
    """A key that was refused is nobody's to send again, whichever verb asks: neither before nor after."""
    made = host.run("csr")
    assert made.returncode == 0, made.stderr
    request = tmp_path / "host1.csr"
    request.write_text(made.stdout)
    stale_key(host, ca, kdc)
    for _ in range(2):
        ran = host.run("submit", str(request))
        assert (ran.returncode, kdc.failures) == (13, 1), ran.stderr
        assert "is out of date" in ran.stderr
    assert host.run("run", "--now").returncode == 13
    assert (kdc.failures, ca.tokens, ca.count_post) == (1, [], 0)


def test_a_kdc_that_is_down_is_waited_for_as_people_are(host, ca, kdc):
    """It is back soon: five minutes, then ten, and the unit is not failed meanwhile; then the host is enrolled without anybody."""
    kdc.stop()
    assert host.waits_s("run", "--unattended") == (0, 5 * MINUTE)
    assert host.waits_s("run", "--unattended", later_s=5 * MINUTE + 5) == (0, 10 * MINUTE)
    kdc.start()
    assert host.run("run", "--unattended", later_s=14 * MINUTE).returncode == 0
    assert ca.tokens == []  # not due
    ran = host.run("run", "--unattended", later_s=16 * MINUTE)
    assert ran.returncode in (0, 12), ran.stderr  # by then the CA's clock and the faked one disagree
    assert ca.tokens
    assert host.run("run", "--now").returncode == 0
    assert (ca.count_post, ca.authority.posts) == (1, 1)


# -- NTLM ---------------------------------------------------------------------------------------------------------------


UNBOUND_NTLM = """
import sys, requests, requests_ntlm
from cryptography.hazmat.backends.openssl import backend  # brings MD4, which ntlm_auth takes from OpenSSL 3
server, trust, user = sys.argv[1:]
auth = requests_ntlm.HttpNtlmAuth(user, sys.stdin.read(), send_cbt=False)
print(requests.get("https://" + server + "/certsrv/", auth=auth, verify=trust).status_code, end="")
"""


@pytest.fixture
def ntlm(host, ca):
    """The host signs in by NTLM and a password; who binds nothing, with the same password, has just been refused."""
    if not realms.has("requests_ntlm"):
        told = "apt-get install python3-requests-ntlm"
        pytest.fail(told) if os.environ.get("CI") == "true" else pytest.skip(told)
    os.unlink(host.keytab)
    host.write("password", ca.password.encode() + b"\n", 0o600)
    host.configure("auth = ntlm", f"user = {ca.user}")
    ca.switches.auth = "ntlm"
    words = [PYTHON, "-I", "-c", UNBOUND_NTLM, ca.server, ca.server_trust, ca.user]
    said = subprocess.run(words, input=ca.password, capture_output=True, text=True, check=True).stdout
    assert (said, ca.log[-1].scheme, ca.log[-1].authenticated) == ("401", "NTLM", False)
    del ca.log[:], ca.tokens[:]
    return host


@pytest.mark.parametrize(("auth", "https"), [("ntlm", ""), ("ntlm", "rsa-sha384"), ("negotiate", "ecdsa-sha384"), ("epa", "rsa-sha512")])
def test_ntlm_that_is_not_bound_or_posts_bare(ntlm, ca, kdc, auth, https):
    """Three messages sign the connection in before the request goes over it, once; no ticket is asked for."""
    ca.switches.update({"auth": auth, "https": https})
    facts = ntlm.check()
    assert (facts["error"], facts["auth"], facts["account"]) == (None, "ntlm", ca.user)
    assert facts["binding"].startswith("tls-server-end-point, ")
    assert ntlm.run("run").returncode == 0
    signed = [seen for seen in ca.log if seen.authenticated]
    assert {(seen.account, seen.bound) for seen in signed} == {(ca.user, True)}
    assert (ca.count_post, ca.authority.posts) == (1, 1)
    assert [seen.authenticated for seen in ca.log if seen.method == "POST"] == [True]
    assert kdc.requests("AS_REQ", principal=HOST) == []
    assert ca.password not in "".join(ca.tokens)


@pytest.mark.parametrize("https", ["pss-sha256", "pss-sha512", "ed25519"])
def test_ntlm_without_its_binding_is_sent(ntlm, ca, https):
    """Where the library can't name the digest it sends no binding, and a hardened server says that the password is wrong."""
    named = subprocess.run([PYTHON, "-I", "-c", "import cryptography as c; print(c.__version__)"], capture_output=True, text=True).stdout
    ca.switches.https = https
    facts = ntlm.check()
    if int(named.split(".")[0]) > 40 and https != "ed25519":
        assert facts["error"] is None
        return
    assert (facts["exit_status"], ca.tokens) == (13, [])
    assert "NTLM can't be bound to the certificate of localhost" in facts["error"]
    assert "nothing was sent" in facts["error"]
    assert re.search(f"issuer CN=Lab Web CA {https},.* SHA-256 [0-9a-f]{{64}}$", facts["error"])
    assert "set auth = kerberos" in facts["hint"]
    assert ntlm.run("run").returncode == 13
    assert (ca.tokens, ca.count_post) == ([], 0)


def test_a_wrong_password_is_sent_twice(ntlm, ca):
    """It is never tried again by itself, by no command, not in a month: accounts lock. A new one is tried at once."""
    ntlm.write("password", b"wrong\n", 0o600)
    facts = ntlm.check()
    assert (facts["exit_status"], "refused user LAB\\svc-enroll (HTTP 401)" in facts["error"]) == (13, True)
    sent = len(ca.tokens)
    assert sent == 2  # one exchange: who we are, and the proof that was wrong
    for words in COMMANDS:
        assert ntlm.run(*words).returncode == 13
    assert ntlm.run("run", "--unattended", later_s=30 * DAY).returncode == 13
    assert len(ca.tokens) == sent
    ntlm.write("password", ca.password.encode(), 0o600)
    assert ntlm.run("run").returncode == 0
    assert (ca.authority.posts, ca.count_post) == (1, 1)


@pytest.mark.parametrize("auth", ["kerberos", "certificate"])
def test_ntlm_that_is_not_offered_is_sent(ntlm, ca, auth):
    """Hardened servers take Negotiate only: that is said, and nothing of the password leaves."""
    ca.switches.auth = auth
    facts = ntlm.check()
    assert (facts["exit_status"], ca.tokens) == (13, [])
    if auth == "kerberos":
        assert "does not offer to sign in by NTLM, but by Negotiate" in facts["error"]
        assert "auth = kerberos" in facts["hint"]
    assert ntlm.run("run", "--now").returncode == 13
    assert (ca.tokens, ca.count_post) == ([], 0)


def test_ntlm_through_a_proxy_that_ends_tls(ntlm, ca, tmp_path):
    """The proof is bound to the proxy's certificate, and worth nothing at the server."""
    with Inspecting(tmp_path / "proxy", ca.server, ca.server_trust) as proxy:
        with open(proxy.trust, "rb") as file:
            ntlm.write("web0.pem", file.read())
        ntlm.configure("auth = ntlm", f"user = {ca.user}", servers=[proxy.server])
        facts = ntlm.check()
    assert (facts["exit_status"], ca.count_post, any(seen.authenticated for seen in ca.log)) == (13, 0, False)
    assert "a proxy inspects TLS" in facts["hint"]


# -- Basic --------------------------------------------------------------------------------------------------------------


def test_basic_that_is_not_offered_or_not_asked_for(host, ca):
    """It has no binding: `check` says so, and Kerberos' failure never leads to it."""
    host.write("password", ca.password.encode() + b"\n", 0o600)
    host.configure("auth = basic", f"user = {ca.user}")
    ca.switches.auth = "basic"
    facts = host.check()
    assert (facts["error"], facts["auth"], facts["binding"]) == (None, "basic", None)
    assert "binding      none, basic has none" in host.run("check").stdout
    ca.switches.auth = "kerberos"
    facts = host.check()
    assert (facts["exit_status"], "does not offer to sign in by Basic, but by Negotiate" in facts["error"]) == (13, True)


# -- client certificates ------------------------------------------------------------------------------------------------


@pytest.fixture
def certified(host, ca):
    """The host signs in by a client certificate."""
    os.unlink(host.keytab)
    ca.switches.auth = "certificate"
    give(host, *ca.clients.issue("host1.lab.test"))
    host.configure("auth = certificate", "client-certificate = /etc/scx-enroll/client.pem", "client-key = /etc/scx-enroll/client.key")
    return host


def give(host, certificate, key):
    with open(certificate, "rb") as file:
        host.write("client.pem", file.read())
    with open(key, "rb") as file:
        host.write("client.key", file.read(), 0o600)


@pytest.mark.parametrize("asked", ["handshake", "required", "later"])
def test_a_client_certificate_is_asked_for_in_each_way(certified, ca, asked):
    """In the handshake, or only once a page is wanted; the request is sent once, and no header tells who we are."""
    ca.switches.certificate = asked
    facts = certified.check()
    assert (facts["error"], facts["auth"], facts["binding"]) == (None, "certificate", None)
    assert "CN=host1.lab.test" in facts["account"]
    assert certified.run("run").returncode == 0
    assert (ca.tokens, ca.authority.posts) == ([], 1)
    assert {seen.account for seen in ca.log if seen.authenticated} == {"host1.lab.test"}
    assert [seen.authenticated for seen in ca.log if seen.method == "POST"] == [True]


def test_a_client_key_as_a_systemd_credential(certified, ca, tmp_path):
    """The certificate is public; its key need not lie in /etc."""
    (tmp_path / "credentials").mkdir()
    shutil.move(certified.root / "etc/scx-enroll/client.key", tmp_path / "credentials" / "client-key")
    assert certified.check(live=True, CREDENTIALS_DIRECTORY=str(tmp_path / "credentials"))["error"] is None
    assert ca.log[-1].account == "host1.lab.test"
    assert certified.check()["exit_status"] == 3


def other_key(host, ca, tmp_path):
    give(host, ca.clients.issue("host1.lab.test")[0], ca.clients.issue("other.lab.test")[1])


def encrypted_key(host, ca, tmp_path):
    source, path = tmp_path / "plain.key", tmp_path / "encrypted.key"
    shutil.copy(host.root / "etc/scx-enroll/client.key", source)
    joined.packages.output_of("openssl", "pkcs8", "-topk8", "-in", source, "-out", path, "-passout", "pass:secret")
    host.write("client.key", path.read_bytes(), 0o600)


def no_key(host, ca, tmp_path):
    os.unlink(host.root / "etc/scx-enroll/client.key")


def no_certificate(host, ca, tmp_path):
    os.unlink(host.root / "etc/scx-enroll/client.pem")


def garbage_certificate(host, ca, tmp_path):
    host.write("client.pem", b"nothing\n")


def garbage_key(host, ca, tmp_path):
    host.write("client.key", b"nothing\n", 0o600)


def loose_key(host, ca, tmp_path):
    (host.root / "etc/scx-enroll/client.key").chmod(0o644)


def key_of_another(host, ca, tmp_path):
    os.chown(host.root / "etc/scx-enroll/client.key", 4711, 4711)


def writable_certificate(host, ca, tmp_path):
    (host.root / "etc/scx-enroll/client.pem").chmod(0o666)


@pytest.mark.parametrize(
    ("spoil", "message", "hint"),
    [
        (other_key, "client-key /etc/scx-enroll/client.key does not belong to it", "as PEM"),
        (encrypted_key, "client-key /etc/scx-enroll/client.key is encrypted", "without a passphrase"),
        (no_key, "client-key: there is no /etc/scx-enroll/client.key", "install -m 600"),
        (no_certificate, "client-certificate: there is no /etc/scx-enroll/client.pem", "as PEM"),
        (garbage_certificate, "client-certificate /etc/scx-enroll/client.pem holds no certificate", "as PEM"),
        (garbage_key, "client-key /etc/scx-enroll/client.key is no private key", "as PEM"),
        (loose_key, "/etc/scx-enroll/client.key is open to others than its owner", "chmod 600 /etc/scx-enroll/client.key"),
        (key_of_another, "/etc/scx-enroll/client.key belongs to user 4711, not to root", "chown root /etc/scx-enroll/client.key"),
        (writable_certificate, "/etc/scx-enroll/client.pem", "chmod"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_client_certificate_that_can_not_be_used(certified, ca, tmp_path, spoil, message, hint):
    """It is this host's mistake, and seen before any server is asked; a passphrase is not waited for."""
    spoil(certified, ca, tmp_path)
    facts = certified.check()
    assert facts["exit_status"] == 3
    assert message in facts["error"]
    assert hint in facts["hint"]
    assert "secret" not in facts["error"] + facts["hint"]
    assert ca.log == []


@pytest.mark.parametrize("asked", ["handshake", "required", "later"])
def test_a_client_certificate_of_somebody_unknown(certified, ca, tmp_path, asked):
    """The server ends the connection, or says 403 or 401: nothing is posted, and it is not called a fault of the network without a word."""
    give(certified, *ClientCA(tmp_path).issue("host1.lab.test"))
    ca.switches.certificate = asked
    facts = certified.check()
    assert facts["exit_status"] in (5, 13)
    assert certified.run("run").returncode in (5, 13)
    assert (ca.count_post, any(seen.authenticated for seen in ca.log)) == (0, False)


def test_a_client_certificate_that_is_not_mapped(certified, ca):
    """The certificate is good, and belongs to nobody there: 401, and the hint says what to do in IIS."""
    ca.switches.auth = "refused"
    facts = certified.check()
    assert (facts["exit_status"], ca.tokens) == (13, [])
    assert "knows nobody by the client certificate CN=host1.lab.test" in facts["error"]
    assert "map it in IIS" in facts["hint"]
    ca.switches.update({"auth": "certificate", "enroll": "denied"})
    facts = certified.check()
    assert (facts["exit_status"], "forbids access to /certsrv (HTTP 403)" in facts["error"]) == (13, True)
    assert ca.count_post == 0


# -- no account locks ---------------------------------------------------------------------------------------------------


def two(servers, kdc, program, tmp_path):
    """A host that asks two CAs, with one keytab."""
    made = Joined(tmp_path / "two", program, servers, kdc.environment)
    kdc.keytab(made.keytab, HOST)
    return made


def test_renew_sends_a_refused_key_to_each_ca(servers, ca, kdc, program, tmp_path):
    """Five CAs and one command would be the usual threshold at which accounts lock."""
    host = two(servers, kdc, program, tmp_path)
    stale_key(host, ca, kdc)
    for failures in (1, 2, 3):
        assert host.run("run", *([] if failures == 1 else ["--renew"])).returncode == 13
        assert kdc.failures == failures


def test_a_keytab_that_is_loose_or_away_for_a_moment_is_no_other_one(host, ca, kdc):
    """Configuration management that corrects a mode, or writes the same file anew, does not make a refused key worth another try."""
    stale_key(host, ca, kdc)
    kept = host.keytab.read_bytes()
    assert host.run("run").returncode == 13
    for spoil in (lambda: host.keytab.chmod(0o644), host.keytab.unlink, lambda: host.keytab.write_bytes(b"")):
        spoil()
        host.run("run")
        host.keytab.write_bytes(kept)
        host.keytab.chmod(0o600)
        assert host.run("run", "--unattended").returncode == 13
    assert kdc.failures == 1


def test_a_keytab_that_others_write_into_holds_the_same_refused_key(host, ca, kdc, tmp_path):
    """Samba and administrators add services' keys, and each change starts a run."""
    stale_key(host, ca, kdc)
    assert host.run("run").returncode == 13
    kdc.add("nfs/host1.lab.test")
    with open(kdc.keytab(tmp_path / "nfs.keytab", "nfs/host1.lab.test"), "rb") as file:
        host.keytab.write_bytes(host.keytab.read_bytes() + file.read()[2:])
    assert host.run("run", "--unattended").returncode == 13
    assert kdc.failures == 1


def test_one_account_in_two_spellings_or_a_configuration_there_and_back(servers, ca, kdc, program, tmp_path):
    """The account locks, however it is written, and it stays refused whatever the configuration said meanwhile."""
    host = two(servers, kdc, program, tmp_path)
    path = host.root / "etc/scx-enroll/scx-enroll.conf"
    plain = path.read_text()
    path.write_text(f"{plain}principal = HOST1$\n")
    stale_key(host, ca, kdc)
    assert host.run("run").returncode == 13
    other = host.write("other.keytab", b"", 0o600)
    kdc.keytab(other, HOST)  # a good one, of the same account
    for text, status in ((plain.replace("template", "keytab = /etc/scx-enroll/nothing\ntemplate"), 13), (plain, 13)):
        path.write_text(text)
        assert host.run("run", "--unattended").returncode in (0, status)
    assert host.run("run").returncode == 13
    assert kdc.failures == 1


@pytest.mark.parametrize("spoil", ["no library", "loose keytab"])
def test_another_ca_serves_beside_one_that_this_host_can_not_sign_in_to(servers, ca, program, kdc, tmp_path, spoil):
    """After an upgrade of Python, say: one CA asks for what is missing now, the other one does not."""
    for server in servers:
        server.switches.auth = "basic"
    for kerberos in range(2):  # whichever it turns to first
        host = Joined(tmp_path / f"host{kerberos}", program, servers, kdc.environment)
        kdc.keytab(host.keytab, HOST)
        host.write("password", servers[1 - kerberos].password.encode() + b"\n", 0o600)
        basic = f"template = SCXAgent\nauth = basic\nuser = {servers[1 - kerberos].user}\n"
        path = host.root / "etc/scx-enroll/scx-enroll.conf"
        parts = path.read_text().partition("[ca c1]")
        text = [parts[0], parts[1] + parts[2]]
        text[1 - kerberos] = text[1 - kerberos].replace("template = SCXAgent\n", basic)
        path.write_text("".join(text))
        if spoil == "loose keytab":
            host.keytab.chmod(0o640)
        ended = host.run("run", interpreter=sys.executable if spoil == "no library" else PYTHON)
        assert "installed generation" in ended.stdout, ended.stderr
        host.close()


@pytest.mark.parametrize("switches", [{"persist": False}, {"connection": "close"}, {"connection": "1.0"}], ids=str)
def test_ntlm_where_connections_are_not_kept(ntlm, ca, switches):
    """NTLM signs a connection in: without it, a request would be sent three times, or a good password be called wrong for good."""
    ca.switches.update(switches)
    ended = ntlm.run("run")
    assert ended.returncode == 13
    assert ("signs in each request, not the connection" if "persist" in switches else "does not keep its connections open") in ended.stderr
    assert (ca.authority.posts, ca.count_post) == (0, 1 if "persist" in switches else 0)
    ca.switches.update({"persist": True, "connection": ""})
    assert ntlm.run("run", "--now").returncode == 0
    assert ca.authority.posts == 1


def test_a_kdc_that_is_down_is_no_try_of_a_doubtful_request(host, ca, kdc):
    """The one repeat that it has is for when it can be sent."""
    ca.switches.update({"lost": "after", "lost_times": 1})
    assert host.run("run").returncode == 5
    kdc.stop()
    for later_s in (5 * HOUR, 6 * HOUR):
        assert host.run("run", later_s=later_s).returncode in (5, 13)
    assert ca.count_post == 1
    kdc.start()
    ended = host.run("run", "--now", later_s=9 * HOUR)
    assert (ca.count_post, "installed generation" in ended.stdout) == (2, True), ended.stderr


# -- what waits ---------------------------------------------------------------------------------------------------------


def test_a_refused_key_is_tried_again_by_check_when_it_is_time(host, ca, kdc):
    """Whoever looks with `check` waits as long as the timer does, and no longer; and what it saw counts."""
    stale_key(host, ca, kdc)
    for later_s, failures in ((0, 1), (HOUR // 2, 1), (HOUR + 60, 2), (2 * HOUR, 2), (3 * HOUR + 120, 3)):
        assert host.run("check", later_s=later_s).returncode == 13
        assert kdc.failures == failures, later_s


def test_a_pending_request_whose_domain_is_silent_is_no_failure_of_the_unit(host, ca, kdc):
    """It waits for a person at the CA, and nobody here can do anything: looked at anew, as a wait, and by what is remembered of it."""
    ca.switches.mode = "pending"
    assert host.run("run").returncode == 7
    kdc.stop()
    assert host.run("run", "--now", later_s=5 * MINUTE).returncode in (7, 13)
    for later_s in (6 * MINUTE, 7 * MINUTE, 8 * MINUTE):
        assert host.run("run", "--unattended", later_s=later_s).returncode == 0
    ca.switches.mode = "issue"
    kdc.start()


def test_a_weekly_question_without_a_keytab_fails_nothing(host, ca):
    """A host that left its domain is told at the next renewal, by `check`, and in what the CA said last."""
    assert host.run("run", "--now").returncode == 0
    host.keytab.unlink()
    asked = len(ca.log)
    ended = host.run("run", "--unattended", later_s=15 * 24 * HOUR)
    assert (ended.returncode, len(ca.log)) == (0, asked), ended.stderr
    assert "there is no keytab" in host.run("status", later_s=15 * 24 * HOUR).stdout
