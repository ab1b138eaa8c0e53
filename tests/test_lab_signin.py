"""The lab's CA refuses whom a hardened server refuses, judged by clients that are not ours: gssapi with requests, curl, pyspnego, requests_ntlm."""

import base64
import concurrent.futures
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time

import pytest
import requests
import spnego
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from spnego.channel_bindings import GssChannelBindings

from tests.lab import ca as program
from tests.lab import kdc as realm_lab
from tests.lab import machine as machine_lab
from tests.lab import roots
from tests.lab.ca import LabCA
from tests.lab.inspecting import Inspecting
from tests.lab.kdc import PYTHON, Kdc, Trouble
from tests.lab.machine import Image, Machine
from tests.lab.signin import Acceptor
from tests.lab.webcerts import ClientCA, WebCertificates

pytestmark = pytest.mark.lab

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SPNEGO, KRB5 = "1.3.6.1.5.5.2", "1.2.840.113554.1.2.2"
NAMES = ("HOST1$", "HTTP/localhost")
FORM = {"Mode": "newreq", "CertRequest": "", "CertAttrib": "CertificateTemplate:SCXAgent\r\n"}

# Lives as long as the module's tests: an order in JSON a line, and what came of it. The distribution's own libraries.
CLIENT = r"""
import base64, hashlib, json, re, ssl, sys
import gssapi, requests
from gssapi.raw import ChannelBindings
from requests.adapters import HTTPAdapter
from urllib.parse import urlsplit

class Old(HTTPAdapter):
    def init_poolmanager(self, *words, **more):
        context = ssl.create_default_context()
        context.set_ciphers("DEFAULT@SECLEVEL=0")
        super().init_poolmanager(*words, ssl_context=context, **more)

class HostNegotiate(requests.auth.AuthBase):
    def __init__(self, order):
        self.order, self.said = order, {}
        name = gssapi.Name(order.get("account", "HOST1$"), gssapi.NameType.kerberos_principal)
        self.credentials = gssapi.Credentials(name=name, usage="initiate", store={
            "client_keytab": "FILE:" + order["keytab"], "ccache": "MEMORY:" + order["cache"]})
    def __call__(self, request):
        request.register_hook("response", self.answer)
        return request
    def bindings(self, response):
        raw = response.raw
        sock = getattr(getattr(raw, "_connection", None), "sock", None) or raw._fp.fp.raw._sock
        digest = hashlib.new(self.order.get("digest", "sha256"), sock.getpeercert(True)).digest()
        kind = self.order.get("bindings", "right")
        data = {"right": digest, "none": None, "wrong": digest[::-1]}[kind]
        return data and ChannelBindings(application_data=b"tls-server-end-point:" + data)
    def answer(self, response, **more):
        if response.status_code != 401 or "Authorization" in response.request.headers:
            return response
        if not re.search(r"(?i)\bnegotiate\b", response.headers.get("WWW-Authenticate", "")):
            return response
        flags = [gssapi.RequirementFlag.integrity] + [gssapi.RequirementFlag.mutual_authentication] * self.order.get("mutual", True)
        flags += [gssapi.RequirementFlag.delegate_to_peer] * self.order.get("delegate", False)
        context = gssapi.SecurityContext(name=gssapi.Name("HTTP@" + urlsplit(response.url).hostname, gssapi.NameType.hostbased_service), creds=self.credentials,
            mech=gssapi.OID.from_int_seq(self.order["mech"]), usage="initiate", flags=flags, channel_bindings=self.bindings(response))
        response.content
        response.raw.release_conn()
        again = response.request.copy()
        token = context.step()
        again.headers["Authorization"] = "Negotiate " + base64.b64encode(token).decode()
        out = response.connection.send(again, **more)
        out.history.append(response)
        back = re.search(r"(?i)negotiate\s+([\w+/=]+)", out.headers.get("WWW-Authenticate", ""))
        self.said["token"] = again.headers["Authorization"]
        self.said["back"] = back[1] if back else ""
        try:
            self.said["proved"] = bool(back and out.status_code != 401 and [context.step(base64.b64decode(back[1])), context.complete][1])
        except gssapi.exceptions.GSSError as error:
            self.said["proved"] = False
        return out

def carry_out(order):
    said = {}
    with requests.Session() as session:
        session.trust_env, session.verify = False, order["trust"]
        session.headers["User-Agent"] = "judge"
        if order.get("old"):
            session.mount("https://", Old())
        if order["how"] == "ntlm":
            import requests_ntlm
            session.auth = requests_ntlm.HttpNtlmAuth(order["user"], order["password"], send_cbt=order.get("send_cbt", True))
        else:
            session.auth = HostNegotiate(order)
            said = session.auth.said
        seen = []
        for number in range(order.get("times", 1)):
            if order.get("form"):
                out = session.post(order["url"], data=order["form"], allow_redirects=False, timeout=20)
            else:
                out = session.get(order["url"], allow_redirects=False, timeout=20)
            seen.append([*(old.status_code for old in out.history), out.status_code])
        return dict(said, seen=seen, status=out.status_code, offers=out.headers.get("WWW-Authenticate", ""),
            bytes=len(out.content), text=out.text[:3000])

for line in sys.stdin:
    try:
        answer = carry_out(json.loads(line))
    except Exception as error:
        answer = {"error": type(error).__name__ + ": " + str(error)}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def able():
    """There can be a KDC."""
    missing = realm_lab.missing()
    if missing:
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)


@pytest.fixture(scope="module")
def realm(able, tmp_path_factory):
    """Two accounts, a host's and the web server's, with their keytabs in `folder`."""
    with Kdc(tmp_path_factory.mktemp("kdc"), settings={"forwardable": "true"}) as kdc:
        kdc.add(*NAMES)
        kdc.keytab(kdc.folder / "host.keytab", "HOST1$")
        kdc.keytab(kdc.folder / "http.keytab", "HTTP/localhost")
        yield kdc


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with LabCA(tmp_path_factory.mktemp("ca")) as ca:
        yield ca


@pytest.fixture
def ca(shared):
    """A CA that has nothing to do with Kerberos."""
    shared.switches.reset()
    shared.authority.rows.clear()
    shared.authority.posts = 0
    shared.gate.keytab = ""
    del shared.log[:], shared.tokens[:]
    return shared


@pytest.fixture
def site(ca, realm):
    """A CA that takes Kerberos alone."""
    ca.gate.keytab = str(realm.folder / "http.keytab")
    ca.switches.auth = "kerberos"
    return ca


@pytest.fixture(scope="module")
def process(realm):
    """The client's."""
    words = [PYTHON, "-I", "-c", CLIENT]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **realm.environment}
    ) as running:
        yield running
        running.stdin.close()


@pytest.fixture
def judge(process, site, realm, tmp_path):
    """Have the client do something at `site`; every test's client begins without tickets."""

    def carry_out(how="negotiate", **order):
        whole = {
            "url": site.url, "trust": site.server_trust, "keytab": str(realm.folder / "host.keytab"), "mech": [int(n) for n in SPNEGO.split(".")],
            "cache": tmp_path.name, "how": how, "user": site.user, "password": site.password, **order,
        }  # fmt: skip
        process.stdin.write(json.dumps(whole) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    return carry_out


def last(ca):
    return ca.log[-1]


def csr():
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "host1.lab.test")])
    made = x509.CertificateSigningRequestBuilder().subject_name(name).sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM).decode()


# Kerberos, and the channel it is bound to


@pytest.mark.kdc
def test_a_client_without_bindings_is_refused(site, judge):
    """It is the commonest client there is, and the mistake that shows nowhere but at a server that insists."""
    said = judge(bindings="none")
    assert said["seen"] == [[401, 401]]
    assert (last(site).authenticated, last(site).account, last(site).bound) == (False, "HOST1$@LAB.TEST", False)
    assert last(site).reason == "the client sent no channel bindings"


@pytest.mark.kdc
def test_a_bound_client_is_let_in_and_knows_the_server(site, judge):
    """What is asked of our own client: one token, bound, nothing delegated, and the server's proof looked at."""
    said = judge()
    assert said["seen"] == [[401, 200]]
    assert said["proved"]
    assert (last(site).account, last(site).scheme, last(site).bound, last(site).delegated, last(site).mutual) == (
        "HOST1$@LAB.TEST", "Negotiate", True, False, True,
    )  # fmt: skip
    assert site.tokens == [said["token"]]


@pytest.mark.kdc
@pytest.mark.parametrize(
    ("epa", "right", "none", "wrong"), [("require", 200, 401, 401), ("allow", 200, 200, 401), ("off", 200, 200, 200)]
)
def test_each_strictness_takes_and_refuses_what_it_says(site, judge, epa, right, none, wrong):
    """Wrong bindings are never the same as none: a proxy is noticed by a server that only allows them."""
    site.switches.epa = epa
    assert [judge(bindings=kind)["status"] for kind in ("right", "none", "wrong")] == [right, none, wrong]


@pytest.mark.kdc
def test_epa_as_a_way_to_sign_in_insists_whatever_else_is_said(site, judge):
    """Tests that name it must not be softened by another switch."""
    site.switches.update({"auth": "epa", "epa": "off"})
    assert [judge(bindings=kind)["status"] for kind in ("right", "none")] == [200, 401]


@pytest.mark.kdc
def test_a_server_behind_a_proxy_that_ends_tls_refuses_right_bindings(site, judge):
    """Both sides are right, and the certificate between them is not the same."""
    site.switches.bound_to = "other"
    assert judge()["status"] == 401
    assert "channel bindings" in last(site).reason.lower()
    site.switches.epa = "allow"
    assert judge()["status"] == 401


@pytest.mark.kdc
def test_a_bare_kerberos_token_is_taken_too(site, judge):
    """Debian 11's SPNEGO loses the bindings, so there a client has no other way."""
    mech = [int(number) for number in KRB5.split(".")]
    said = judge(mech=mech)
    assert (said["status"], said["proved"], last(site).bound) == (200, True, True)
    assert judge(mech=mech, bindings="none")["status"] == 401


@pytest.mark.kdc
def test_delegated_credentials_are_seen(site, judge):
    """A client that hands its ticket to the web server must be caught by its tests."""
    assert judge(delegate=True)["status"] == 200
    assert last(site).delegated


@pytest.mark.kdc
def test_a_client_that_wants_no_proof_is_seen(site, judge):
    """Who doesn't ask for mutual authentication can be sent anywhere."""
    judge(mutual=False)
    assert (last(site).authenticated, last(site).mutual) == (True, False)


@pytest.mark.kdc
@pytest.mark.parametrize("mutual", ["off", "wrong"])
def test_a_server_that_does_not_prove_itself_is_told_apart(site, judge, mutual):
    """200 alone proves nothing: anybody can say it."""
    site.switches.mutual = mutual
    said = judge()
    assert (said["status"], said["proved"], bool(said["back"])) == (200, False, mutual == "wrong")


@pytest.mark.kdc
def test_a_token_is_good_once(site, judge):
    """A client that sends its header with each request would do so at a real server only once."""
    said = judge()
    for persist, seen in ((True, 401), (False, 401)):
        site.switches.persist = persist
        answer = requests.get(site.url, headers={"Authorization": said["token"]}, verify=site.server_trust, timeout=20)
        assert answer.status_code == seen
        assert "replay" in last(site).reason


@pytest.mark.kdc
@pytest.mark.parametrize("told", [True, False])
def test_a_stale_service_key_is_a_401_with_and_without_a_word_about_it(site, judge, realm, tmp_path, told):
    """The server's administrator changed the key and not the keytab; the client's own keytab is in order."""
    old = tmp_path / "old.keytab"
    shutil.copy(site.gate.keytab, old)
    site.gate.keytab, site.switches.error_token = str(old), told
    realm.change_key("HTTP/localhost")
    realm.keytab(realm.folder / "http.keytab", "HTTP/localhost")
    said = judge()
    assert (said["seen"], bool(said["back"]), said["offers"] == "Negotiate") == ([[401, 401]], told, not told)
    assert "keytab is likely out of date" in last(site).reason
    shutil.copy(realm.folder / "http.keytab", old)
    assert judge()["status"] == 200  # nothing was restarted


@pytest.mark.kdc
def test_whoever_signs_in_must_not_be_whoever_may_enroll(site, judge):
    """403 after the sign-in is another mistake than 401, of another administrator."""
    site.switches.enroll = "denied"
    said = judge()
    assert (said["seen"], said["proved"]) == ([[401, 403]], True)
    assert (last(site).account, last(site).authenticated) == ("HOST1$@LAB.TEST", True)


@pytest.mark.kdc
def test_a_post_is_counted_with_and_without_its_token(site, judge):
    """A request must be submitted once, however often it had to be sent; and its body is for those only who may see it."""
    said = judge(url=site.url + "certfnsh.asp", form={**FORM, "CertRequest": csr()})
    assert said["seen"] == [[401, 200]]
    assert (site.count_post, site.count_bare_post, site.authority.posts) == (2, 1, 1)
    assert [seen.sent_bytes for seen in site.log] == [seen.sent_bytes for seen in site.log[:1]] * 2
    assert last(site).sent_bytes > 300
    assert [row.requester for row in site.authority.rows.values()] == ["HOST1$@LAB.TEST"]


@pytest.mark.kdc
@pytest.mark.parametrize(("persist", "asked"), [(True, [[401, 200], [200], [200]]), (False, [[401, 200]] * 3)])
def test_a_kept_connection_may_be_asked_again(site, judge, persist, asked):
    """Servers differ, so a client must be ready for 401 at any request."""
    site.switches.persist = persist
    assert judge(times=3)["seen"] == asked


@pytest.mark.kdc
@pytest.mark.parametrize("connection", ["close", "1.0"])
def test_a_server_that_closes_after_each_reply_still_lets_in(site, judge, connection):
    """The token then goes over another connection than the 401, to the same certificate."""
    site.switches.connection = connection
    assert judge(times=2)["seen"] == [[401, 200], [401, 200]]


@pytest.mark.kdc
@pytest.mark.parametrize("body", ["page", "empty", "large"])
def test_a_401_of_any_size_is_followed_by_the_token(site, judge, body):
    """It has to be read to its end, or the connection is of no use for the token."""
    site.switches.unauthorized_body = body
    assert judge()["seen"] == [[401, 200]]
    size = judge(bindings="none")["bytes"]
    assert {"page": 0 < size < 5000, "empty": size == 0, "large": size > 4 << 20}[body]


@pytest.mark.kdc
@pytest.mark.parametrize(
    ("auth", "offers", "told"),
    [
        ("negotiate", "several", "Negotiate, NTLM"),
        ("negotiate", "one", "Negotiate, NTLM"),
        ("negotiate", "lower", "negotiate, ntlm"),
        ("negotiate", "parameters", 'Negotiate realm="ca.lab.test", charset="UTF-8", NTLM realm="ca.lab.test", charset="UTF-8"'),
        ("kerberos", "several", "Negotiate"),
        ("ntlm", "several", "NTLM"),
        ("certificate", "several", ""),
    ],
)
def test_schemes_are_offered_in_every_spelling(site, judge, auth, offers, told):
    """Header fields are lists, case does not matter, and parameters may follow (RFC 9110)."""
    site.switches.update({"auth": auth, "offers": offers})
    answer = requests.get(site.url, verify=site.server_trust, timeout=20)
    assert answer.headers.get("WWW-Authenticate", "") == told
    assert len(answer.raw.headers.getlist("WWW-Authenticate")) == (0 if not told else 1 if offers == "one" or "," not in told else 2)
    if "egotiate" in told:
        assert judge()["seen"] == [[401, 200]]


@pytest.mark.kdc
@pytest.mark.parametrize(
    "header",
    [
        "Negotiate", "Negotiate ", "Negotiate !", "Negotiate YII=", "Basic dTpw", "Bearer x", "NTLM TlRMTVNTUAABAAAA", "Negotiate TlRMTVNTUAABAAAA",
        "Negotiate " + "YIIB" * 4000,
    ],
)  # fmt: skip
def test_nonsense_is_refused_and_breaks_nothing(site, judge, header):
    """The server judges others after it."""
    assert requests.get(site.url, headers={"Authorization": header}, verify=site.server_trust, timeout=20).status_code == 401
    assert last(site).reason
    assert judge()["status"] == 200


@pytest.mark.kdc
def test_curl_is_let_in_as_far_as_it_binds(site, realm, tmp_path):
    """A second implementation; most builds of it bind nothing."""
    environment = {**os.environ, **realm.environment, "KRB5CCNAME": f"FILE:{tmp_path}/cache"}
    subprocess.run(["kinit", "-kt", str(realm.folder / "host.keytab"), "HOST1$"], env=environment, check=True)
    words = ["curl", "-s", "--noproxy", "*", "-o", os.devnull, "-w", "%{http_code}", "--cacert", site.server_trust, "--negotiate", "-u", ":"]

    def curl():
        return subprocess.run([*words, site.url], env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout

    assert curl() == ("200" if last(site).bound else "401")
    assert last(site).account == "HOST1$@LAB.TEST"
    site.switches.epa = "allow"
    assert curl() == "200"


# the certificate that a binding is made from

SIGNATURES = [
    ("", "sha256"), ("rsa-sha256", "sha256"), ("rsa-sha384", "sha384"), ("rsa-sha512", "sha512"), ("ecdsa-sha384", "sha384"),
    ("pss-sha256", "sha256"), ("pss-sha384", "sha384"), ("pss-sha512", "sha512"), ("ed25519", "sha256"), ("rsa-sha1", "sha256"),
]  # fmt: skip


@pytest.mark.kdc
@pytest.mark.parametrize(("https", "digest"), SIGNATURES)
def test_the_signature_says_which_digest_binds(site, judge, https, digest):
    """RFC 5929: a client that always takes SHA-256 works at most servers, and never at the others."""
    site.switches.https = https
    said = judge(digest=digest, old=https == "rsa-sha1")
    assert (said.get("error"), said.get("seen"), last(site).bound) == (None, [[401, 200]], True)
    assert judge(digest="sha512" if digest != "sha512" else "sha256", old=https == "rsa-sha1")["status"] == 401


@pytest.mark.parametrize(("https", "digest"), SIGNATURES)
def test_openssl_agrees_on_the_signature(tmp_path, https, digest):
    """The RSASSA-PSS ones are made by hand; each has to be what its name says, under the root that never changes."""
    web = WebCertificates(tmp_path, "ca.lab.test")
    before = (tmp_path / "server-trust.pem").read_bytes()
    shown = web.shown(https)
    (tmp_path / "chain.pem").write_bytes(shown.chain)
    level = ["-auth_level", "0"] if https == "rsa-sha1" else []
    words = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", *level, "-CAfile", str(tmp_path / "server-trust.pem")]
    judged = subprocess.run([*words, "-untrusted", str(tmp_path / "chain.pem"), str(tmp_path / "chain.pem")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert judged.returncode == 0, judged.stdout
    text = subprocess.run(["openssl", "x509", "-noout", "-text", "-in", str(tmp_path / "chain.pem")], stdout=subprocess.PIPE, text=True, check=True).stdout
    kind, _, name = https.partition("-")
    if kind == "pss":
        assert text.count("rsassaPss") == 2
        assert f"Hash Algorithm: {name}" in text
    elif kind:
        assert f"Signature Algorithm: {kind if kind == 'ed25519' else ''}".strip().lower() in text.lower()
        assert (name.upper() if kind == "ecdsa" else name or "ED25519").lower() in text.lower()
    der = ssl.PEM_cert_to_DER_cert(shown.chain.decode().partition("-----END CERTIFICATE-----")[0] + "-----END CERTIFICATE-----\n")
    assert shown.bindings == b"tls-server-end-point:" + hashlib.new(digest, der).digest()
    assert (tmp_path / "server-trust.pem").read_bytes() == before


@pytest.mark.kdc
@pytest.mark.parametrize("root_name", ["Inspecting Root", "Lab Web Root"])
def test_an_inspecting_proxy_is_noticed_though_its_root_is_trusted(site, judge, tmp_path, root_name):
    """The operator has put its root into the trust file; only bindings tell that somebody reads along."""
    with Inspecting(tmp_path / "proxy", site.server, site.server_trust, root_name=root_name) as proxy:
        order = {"url": proxy.url, "trust": proxy.trust}
        said = judge(**order)
        assert (said["seen"], proxy.requests, len(site.log)) == ([[401, 401]], 2, 2)
        assert "channel bindings" in last(site).reason.lower()
        site.switches.epa = "allow"
        assert judge(**order)["status"] == 401
        assert judge(**order, bindings="none")["status"] == 200
        site.switches.epa = "off"
        said = judge(url=proxy.url + "certfnsh.asp", trust=proxy.trust, form={**FORM, "CertRequest": csr()})
        assert (said["status"], site.authority.posts) == (200, 1)
        assert "error" in judge(url=proxy.url)  # its root is not the CA's


# NTLM


def bindings_of(connection, kind):
    digest = hashlib.sha256(connection.sock.getpeercert(binary_form=True)).digest()
    data = {"right": digest, "wrong": digest[::-1]}.get(kind)
    return GssChannelBindings(application_data=b"tls-server-end-point:" + data) if data else None


def ntlm(ca, kind="right", password="", scheme="NTLM", protocol="ntlm", times=1):
    """Three legs on one connection, then more requests; returns the statuses."""
    statuses = []
    connection = http.client.HTTPSConnection(ca.server, context=ssl.create_default_context(cafile=ca.server_trust), timeout=20)
    try:
        connection.connect()
        bindings = bindings_of(connection, kind)
        client = spnego.client(
            ca.user, password or ca.password, hostname="localhost", service="http", channel_bindings=bindings, protocol=protocol,
            options=spnego.NegotiateOptions.use_ntlm if protocol == "ntlm" else spnego.NegotiateOptions.none,
        )  # fmt: skip
        token = client.step()
        while token and len(statuses) < 4:
            connection.request("GET", "/certsrv/", headers={"Authorization": f"{scheme} {base64.b64encode(token).decode()}"})
            answer = connection.getresponse()
            answer.read()
            statuses.append(answer.status)
            back = re.search(rf"{scheme} (\S+)", answer.headers.get("WWW-Authenticate", ""))
            token = client.step(base64.b64decode(back[1])) if back and not client.complete else b""
        for _ in range(times - 1):
            connection.request("GET", "/certsrv/")
            answer = connection.getresponse()
            answer.read()
            statuses.append(answer.status)
    finally:
        connection.close()
    return statuses


@pytest.mark.parametrize(
    ("epa", "right", "none", "wrong"), [("require", 200, 401, 401), ("allow", 200, 200, 401), ("off", 200, 200, 200)]
)
def test_ntlm_takes_and_refuses_the_same_bindings(ca, epa, right, none, wrong):
    """A server that insists does so whatever the scheme."""
    ca.switches.update({"auth": "ntlm", "epa": epa})
    assert [ntlm(ca, kind) for kind in ("right", "none", "wrong")] == [[401, right], [401, none], [401, wrong]]
    assert (last(ca).scheme, last(ca).account) == ("NTLM", ca.user if wrong == 200 else "")


@pytest.mark.parametrize(("epa", "status"), [("require", 401), ("allow", 200)])
def test_ntlm_bindings_of_nothing_but_zeros_are_none(ca, monkeypatch, epa, status):
    """Clients that know no channel may send them ([MS-NLMP] 3.1.5.1.2), and the library takes them for right ones."""
    monkeypatch.setattr("spnego._ntlm.md5", lambda data: bytes(16))
    ca.switches.update({"auth": "ntlm", "epa": epa})
    assert (ntlm(ca), last(ca).bound) == ([401, status], False)


def test_ntlm_with_another_password_or_none(ca):
    """The account's name alone is no proof, bound or not."""
    ca.switches.auth = "ntlm"
    assert ntlm(ca, password="wrong") == [401, 401]
    assert requests.get(ca.url, auth=(ca.user, ca.password), verify=ca.server_trust, timeout=20).status_code == 401
    ca.switches.epa = "off"
    assert ntlm(ca, password="wrong") == [401, 401]
    assert ca.authority.posts == 0


def test_ntlm_signs_a_connection_in(ca):
    """Later requests of the same connection need no token, unless the server wants one."""
    ca.switches.auth = "ntlm"
    assert ntlm(ca, times=3) == [401, 200, 200, 200]
    assert (last(ca).scheme, last(ca).account, last(ca).bound) == ("", ca.user, True)
    ca.switches.persist = False
    assert ntlm(ca, times=2) == [401, 200, 401]


def test_ntlm_needs_a_connection_that_stays(ca):
    """Where a proxy closes it after each reply nobody signs in, and the message has to say so."""
    ca.switches.update({"auth": "ntlm", "connection": "close"})
    assert ntlm(ca)[-1] == 401


@pytest.mark.parametrize("protocol", ["ntlm", "negotiate"])
def test_ntlm_inside_negotiate_counts_as_ntlm(ca, protocol):
    """Windows takes it there, so a client that is to use Kerberos only must be caught if it falls back."""
    ca.switches.auth = "negotiate"
    statuses = ntlm(ca, scheme="Negotiate", protocol=protocol)
    assert (statuses[-1], last(ca).account, last(ca).bound) == (200, ca.user, True)
    assert ntlm(ca, "none", scheme="Negotiate", protocol=protocol)[-1] == 401
    ca.switches.auth = "kerberos"
    assert ntlm(ca, scheme="Negotiate", protocol=protocol)[-1] == 401
    assert last(ca).reason == "NTLM inside Negotiate"


@pytest.mark.kdc
def test_the_distributions_ntlm_client_is_let_in_bound(site, judge):
    """It binds by default; what it does at a certificate whose digest it does not know is seen too."""
    if not realm_lab.has("requests_ntlm"):
        pytest.fail("python3-requests-ntlm") if os.environ.get("CI") == "true" else pytest.skip("apt-get install python3-requests-ntlm")
    site.switches.auth = "ntlm"
    said = judge("ntlm")
    assert (said["status"], last(site).account, last(site).bound) == (200, site.user, True)
    assert judge("ntlm", password="wrong")["status"] == 401
    assert judge("ntlm", send_cbt=False)["status"] == 401


# client certificates


def with_certificate(ca, pair=None, tls="", path=""):
    context = ssl.create_default_context(cafile=ca.server_trust)
    context.post_handshake_auth = True
    if tls == "1.2":
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    if pair:
        context.load_cert_chain(*pair)
    connection = http.client.HTTPSConnection(ca.server, context=context, timeout=20)
    try:
        connection.request("GET", f"/certsrv/{path}")
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize("certificate", ["handshake", "required", "later"])
def test_a_client_certificate_signs_in(ca, certificate):
    """Asked for in the handshake or when a page is wanted; its name is the account."""
    ca.switches.update({"auth": "certificate", "certificate": certificate})
    pair = ca.clients.issue("host1.lab.test")
    assert with_certificate(ca, pair)[0] == 200
    assert (last(ca).account, last(ca).scheme, ca.tokens) == ("host1.lab.test", "", [])
    assert with_certificate(ca, pair, tls="1.2")[0] == 200


@pytest.mark.parametrize("certificate", ["handshake", pytest.param("later", marks=pytest.mark.slow)])
def test_a_missing_client_certificate_is_told_in_a_page(ca, certificate):
    """403.7, whose number stands in the text only."""
    ca.switches.update({"auth": "certificate", "certificate": certificate})
    status, page = with_certificate(ca)
    assert (status, "403.7" in page, last(ca).authenticated) == (403, True, False)


def test_a_required_client_certificate_ends_the_handshake(ca):
    """No page tells why: the client has to."""
    ca.switches.update({"auth": "certificate", "certificate": "required"})
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
        with_certificate(ca)
    assert ca.log == []


@pytest.mark.parametrize("certificate", ["handshake", "required", "later"])
def test_client_certificates_that_do_not_count(ca, tmp_path, certificate):
    """Of another CA, ended, and not for clients."""
    ca.switches.update({"auth": "certificate", "certificate": certificate})
    for pair in (ClientCA(tmp_path).issue("host1.lab.test"), ca.clients.issue("old", ends=-60), ca.clients.issue("web", server=True)):
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
            with_certificate(ca, pair)
    assert not any(seen.authenticated for seen in ca.log)


# the realm


def kinit(kdc, keytab, tmp_path):
    words = ["kinit", "-c", f"FILE:{tmp_path}/cache", "-kt", keytab, "HOST1$"]
    return subprocess.run(words, env={**os.environ, **kdc.environment}, stderr=subprocess.PIPE, text=True).stderr


@pytest.mark.kdc
def test_a_realm_in_every_state_that_a_host_meets(able, tmp_path):
    """Each has its own message in the field, and must be had without another machine."""
    kdc = Kdc(tmp_path / "kdc")
    with kdc:
        kdc.add(*NAMES)
        assert kdc.requests("AS_REQ") == []
        keytab = kdc.keytab(tmp_path / "host.keytab", "HOST1$")
        assert os.stat(keytab).st_mode & 0o777 == 0o600
        assert kinit(kdc, keytab, tmp_path) == ""
        assert (kdc.logins, kdc.failures, kdc.tickets) == (1, 0, 0)
        kdc.change_key("HOST1$")
        assert "Preauthentication failed" in kinit(kdc, keytab, tmp_path)
        assert (kdc.logins, kdc.failures) == (1, 1)
        assert len(kdc.requests("AS_REQ", "PREAUTH_FAILED", "HOST1$")) == 1
        assert kdc.requests("AS_REQ", "PREAUTH_FAILED", "HOST2$") == []
        assert kinit(kdc, kdc.keytab(keytab, "HOST1$"), tmp_path) == ""
        kdc.disable("HOST1$")
        assert "revoked" in kinit(kdc, keytab, tmp_path)
        kdc.disable("HOST1$", enabled=True)
        assert kinit(kdc, keytab, tmp_path) == ""
        kdc.expire_password("HOST1$")
        assert "Password has expired" in kinit(kdc, keytab, tmp_path)
        kdc.expire("HOST1$")
        assert "entry in database has expired" in kinit(kdc, keytab, tmp_path)
        kdc.delete("HOST1$")
        assert "not found in Kerberos database" in kinit(kdc, keytab, tmp_path)
        kdc.stop()
        assert "Cannot contact any KDC" in kinit(kdc, keytab, tmp_path)
        port = kdc.port
        kdc.start()
        assert kdc.port == port
        assert "not found" in kinit(kdc, keytab, tmp_path)
        with pytest.raises(Trouble, match="does not exist"):
            kdc.keytab(keytab, "HOST1$")
        with pytest.raises(Trouble, match="already exists"):
            kdc.add("HTTP/localhost")


@pytest.mark.kdc
def test_a_kdc_ends_with_the_process_that_made_it(able, tmp_path):
    """However that ended: a port that is still taken would fail the next test."""
    script = "import sys, time; from tests.lab.kdc import Kdc; kdc = Kdc(sys.argv[1]); kdc.start(); print(kdc.port, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=CHECKOUT, stdout=subprocess.PIPE) as maker:
        assert int(maker.stdout.readline()) > 0
        pid = int((tmp_path / "pid").read_text())
        maker.kill()
        deadline = time.monotonic() + 20
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
            time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}")


# the server, whoever comes


@pytest.mark.kdc
def test_many_come_at_once(site, judge):
    """One acceptor serves them all; no answer goes to another's question."""
    site.switches.auth = "negotiate"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        kinds = ["right", "none", "wrong"] * 5
        found = [pool.submit(ntlm, site, kind) for kind in kinds]
        bound = [judge()["status"] for _ in range(5)]
        assert [future.result()[-1] for future in found] == [200, 401, 401] * 5
    assert bound == [200] * 5


def test_nothing_is_left_when_the_ca_has_ended(tmp_path):
    """Neither a process, nor a file with a password."""
    with LabCA(tmp_path) as ca:
        ca.switches.auth = "ntlm"
        assert ntlm(ca) == [401, 200]
        pid = ca.gate.acceptors["ntlm"]._process.pid
        assert os.path.exists(f"/proc/{pid}")
    assert not os.path.exists(f"/proc/{pid}")
    for folder, _, files in os.walk(tmp_path):
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                assert ca.password.encode() not in file.read()


def test_an_acceptor_that_can_not_start_lets_nobody_in():
    """Without the library the answer is a reason, not a hole."""
    acceptor = Acceptor("kerberos", "/nonexistent/python3", {})
    assert acceptor.ask({"connection": 1})["error"].startswith("no acceptor")
    acceptor = Acceptor("kerberos", sys.executable, {})
    question = {"connection": 1, "token": "", "bindings": "", "require": True, "keytab": ""}
    assert acceptor.ask(question)["error"]
    acceptor.close()


@pytest.mark.kdc
def test_the_log_tells_who_came_and_holds_no_token(site, judge):
    """Request logs are printed by failing tests; `tokens` is for searching only."""
    said = judge()
    secret = said["token"].split()[1]
    assert secret not in repr(site.log)
    assert secret in site.tokens[0]
    for folder, _, files in os.walk(site.directory):
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                assert secret.encode() not in file.read()


@pytest.mark.kdc
def test_the_program_signs_in_like_the_class(realm, judge, tmp_path):
    """Containers get the same CA as another process, with all switches from its first request on."""
    command = [sys.executable, "-m", "tests.lab.ca", "--directory", str(tmp_path / "ca")]
    serving = [*command, "--kerberos-keytab", str(realm.folder / "http.keytab"), "--begin", "auth=kerberos", "--tokens", str(tmp_path / "tokens")]
    with subprocess.Popen(serving, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as served:
        try:
            url = served.stdout.readline().split()[-1]
            ready = json.loads((tmp_path / "ca" / "ready.json").read_text())
            order = {"url": f"https://{url}/certsrv/", "trust": ready["server_trust"]}
            assert ready["client_ca"] == str(tmp_path / "ca" / "client-ca.pem")
            assert judge(**order, bindings="none")["status"] == 401
            said = judge(**order)
            assert said["status"] == 200
            assert (tmp_path / "tokens").read_text().splitlines()[-1] == said["token"]
            assert os.stat(tmp_path / "tokens").st_mode & 0o777 == 0o600
            subprocess.run([*command, "--set", "epa=allow"], cwd=CHECKOUT, check=True)
            assert judge(**order, bindings="none")["status"] == 200
            table = json.loads(subprocess.run([*command, "--rows"], cwd=CHECKOUT, check=True, stdout=subprocess.PIPE).stdout)
            assert table["arrived"] == 6
            assert [request["bound"] for request in table["requests"][-3:]] == [True, False, False]
        finally:
            served.send_signal(signal.SIGTERM)
    assert not (tmp_path / "ca" / "ready.json").exists()


@pytest.mark.parametrize(
    ("words", "message"), [(["--begin", "auth=magic"], "'magic' is none of 'basic'"), (["--begin", "epa"], "NAME=VALUE expected")]
)
def test_a_switch_to_begin_with_that_is_none(tmp_path, capsys, words, message):
    """A CA that begins in another state than was typed would prove nothing."""
    with pytest.raises(SystemExit):
        program.main(["--directory", str(tmp_path), *words])
    assert message in capsys.readouterr().err


@pytest.mark.kdc
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("suite", roots.SUITES)
def test_each_release_signs_in_with_its_own_packages(able, tmp_path, suite):
    """A host as it is in the field: joined, with python3-gssapi and python3-requests-ntlm of its release, and nothing else."""
    missing = machine_lab.missing()
    if missing:
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    with Image(suite, tmp_path / "image") as image, Machine(image, "host1") as host:
        kdc = host.kdc(tmp_path / "kdc")
        assert host.run("stat", "-c", "%a %U", "/etc/krb5.keytab").stdout == "600 root\n"
        with host.ca(tmp_path / "ca", kdc=kdc) as ca:
            host.copy(ca.server_trust, "/etc/https.pem")
            mech = [int(number) for number in (KRB5 if suite == "bullseye" else SPNEGO).split(".")]
            order = {
                "url": f"https://{ca.server}/certsrv/", "trust": "/etc/https.pem", "keytab": "/etc/krb5.keytab", "cache": "judge", "mech": mech,
                "how": "negotiate", "user": ca.user, "password": ca.password,
            }  # fmt: skip

            def judged(**more):
                return json.loads(host.run("python3", "-c", CLIENT, input=json.dumps({**order, **more}) + "\n").stdout)

            said = judged()
            assert (said.get("error"), said.get("status"), said.get("proved")) == (None, 200, True)
            seen = ca.requests[-1]
            assert (seen["account"], seen["bound"], seen["delegated"]) == ("HOST1$@LAB.TEST", True, False)
            assert judged(bindings="none")["status"] == 401
            assert kdc.failures == 0
            ca.steer("--set", "auth=ntlm")
            said = judged(how="ntlm")
            assert (said.get("error"), said.get("status"), ca.requests[-1]["bound"]) == (None, 200, True)
            kdc.stop()
            ca.steer("--set", "auth=kerberos")
            assert "Cannot contact any KDC" in judged().get("error", "")
        with host.ca(tmp_path / "ca", kdc=kdc) as ca:  # once more, with the same folder
            assert ca.requests == []
