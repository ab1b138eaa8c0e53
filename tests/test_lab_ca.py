"""The lab's CA keeps to the facts about AD CS: whoever tests against it must not learn habits that no real server has."""

import base64
import datetime as dt
import email.utils
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import warnings

import certsrv
import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import pkcs7 as library
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.lab import ca as program
from tests.lab import messages
from tests.lab.authority import DAY, WRONG, YEAR, Authority, Switches, Template, not_after, not_before, pkcs7, to_der, to_pem
from tests.lab.ca import LabCA
from tests.lab.switches import ANSWERS, CHARSETS, LANGUAGES, described

pytestmark = pytest.mark.lab

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KEY = ec.generate_private_key(ec.SECP256R1())


def make_csr(name="host1.lab.test", key=KEY):
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


CSR = make_csr()


def spki(key):
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def names(certificate):
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)


def verify(leaf_pem, chain, anchor):
    """Have OpenSSL judge a path: returns the error text, "" if it holds."""
    run = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", anchor, "-untrusted", chain, leaf_pem],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return "" if run.returncode == 0 else run.stdout


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with LabCA(tmp_path_factory.mktemp("ca"), first_id=83) as ca:
        yield ca


@pytest.fixture
def ca(shared):
    shared.switches.reset()
    shared.authority.rows.clear()
    shared.authority.posts = 0
    shared.authority.request_right = True
    shared.authority.templates = {"SCXAgent": Template("SCXAgent")}
    shared.bad_passwords = 0
    del shared.log[:]
    return shared


@pytest.fixture
def library_client(ca):
    client = certsrv.Certsrv(ca.server, ca.user, ca.password, cafile=ca.server_trust)
    client.session.trust_env = False
    with client.session:
        yield client


@pytest.fixture
def web(ca):
    with requests.Session() as session:
        session.trust_env = False
        session.verify = ca.server_trust
        session.auth = (ca.user, ca.password)
        session.headers["User-Agent"] = "curl/8"
        yield session


def post(ca, web, template="SCXAgent", csr=CSR, **more):
    form = {"Mode": "newreq", "CertRequest": csr, "CertAttrib": f"CertificateTemplate:{template}\r\n", **more}
    answer = web.post(ca.url + "certfnsh.asp", data=form, allow_redirects=False, timeout=10)
    answer.encoding = "utf-8"
    return answer


def get(ca, web, path):
    answer = web.get(ca.url + path, allow_redirects=False, timeout=10)
    if "text" in answer.headers.get("Content-Type", ""):
        answer.encoding = "utf-8"
    return answer


def element(page, name):
    """The text of the element with exactly this ID, None if there is none."""
    found = re.search(rf"<p\s[^>]*?\bid\s*=\s*[\"']?{name}[\"']?(?:\s[^>]*)?>(.*?)</p>", page, re.IGNORECASE | re.DOTALL)
    return found.group(1).strip() if found else None


# the real client


def test_the_real_client_library_enrols(ca, library_client):
    """The pages must be what certsrv was written against, or everything built on it is tested against a fiction."""
    assert library_client.check_credentials()
    leaf = x509.load_pem_x509_certificate(library_client.get_cert(CSR, "SCXAgent"))
    assert spki(leaf.public_key()) == spki(KEY.public_key())
    assert names(leaf) == ["host1.lab.test"]
    assert (ca.authority.posts, ca.authority.issued) == (1, 1)
    top = x509.load_pem_x509_certificate(library_client.get_ca_cert())
    assert to_der(top) == ca.authority.newest.der
    assert len(library.load_der_pkcs7_certificates(library_client.get_chain())) == 2


def test_the_real_client_library_sees_pending_and_denied(ca, library_client):
    """Both verdicts of the library rest on English text and ids that the pages must carry."""
    ca.switches.mode = "pending"
    with pytest.raises(certsrv.CertificatePendingException) as pending:
        library_client.get_cert(CSR, "SCXAgent")
    number = int(pending.value.req_id)
    with pytest.raises(certsrv.CouldNotRetrieveCertificateException, match="Taken Under Submission"):
        library_client.get_existing_cert(number)
    ca.authority.approve(number)
    assert library_client.get_existing_cert(number).startswith(b"-----BEGIN CERTIFICATE-----\r\n")
    ca.switches.mode = "deny"
    with pytest.raises(certsrv.RequestDeniedException, match=r"Denied by Policy Module  0x80094012, The permissions"):
        library_client.get_cert(CSR, "SCXAgent")


@pytest.mark.parametrize("switch", [{"language": "de", "mode": "pending"}, {"answer": "empty"}, {"answer": "login", "answer_on": "post"}])
def test_the_library_misreads_what_it_is_known_to_misread(ca, library_client, switch):
    """Its weaknesses are the reason for our own reading of pages; if they don't show here, the lab is too kind."""
    ca.switches.update(switch)
    with pytest.raises(certsrv.RequestDeniedException, match="unknown error"):
        library_client.get_cert(CSR, "SCXAgent")


# pages


def test_ids_are_sequential_and_consumed_by_denials(ca, web):
    """A program that takes the id of a denied page for a stored certificate must meet such ids."""
    first = post(ca, web)
    number = int(re.search(r"ReqID=([0-9]+)&amp;", first.text).group(1))
    ca.switches.mode = "deny"
    assert f"Your Request Id is {number + 1}." in post(ca, web).text
    ca.switches.mode = "pending"
    assert element(post(ca, web).text, "locInfoReqID") == f"Your Request Id is {number + 2}."


def test_pages_are_html_with_crlf_and_their_charset_in_the_meta_element_only(ca, web):
    """ASP pages look like that; a parser that needs more would fail on the first real server."""
    answer = post(ca, web)
    assert answer.headers["Content-Type"] == "text/html"
    assert b"charset=UTF-8" in answer.content
    assert b"\n" not in answer.content.replace(b"\r\n", b"")
    assert answer.content.rstrip().endswith(b"</HTML>")
    assert b"<P ID=locInfo>" in answer.content
    ca.switches.charset = True
    assert post(ca, web).headers["Content-Type"] == "text/html; charset=UTF-8"


def test_a_browser_gets_the_id_in_a_script_and_other_types(ca, web):
    """Page and Content-Type follow the User-Agent, so neither may decide anything."""
    plain = post(ca, web).text
    assert plain.count("certnew.cer?ReqID=") == 3
    assert "ReqID=CACert" in plain
    assert get(ca, web, f"certnew.cer?ReqID={max(ca.authority.rows)}&Enc=b64").headers["Content-Type"] == "text/html"
    web.headers["User-Agent"] = "Mozilla/5.0"
    script = post(ca, web).text
    assert re.findall(r"certnew\.cer\?ReqID=([0-9]+)&", script) == [str(max(ca.authority.rows))]
    assert "&amp;Enc" not in script
    assert get(ca, web, f"certnew.cer?ReqID={max(ca.authority.rows)}&Enc=b64").headers["Content-Type"] == "application/pkix-cert"
    ca.switches.sniff = False
    assert "&amp;Enc" in post(ca, web).text


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_follow_the_language_and_ids_do_not(ca, web, language):
    """Only element IDs are the same on every server."""
    ca.switches.update({"language": language, "mode": "pending"})
    page = post(ca, web).text
    assert str(max(ca.authority.rows)) in element(page, "locInfoReqID")
    assert element(page, "locInfoNewReq")
    assert "10" in element(page, "locTimeoutWarning")
    assert ("Certificate Pending" in page) == (language == "en")
    ca.switches.mode = "deny"
    page = post(ca, web).text
    assert element(page, "locDenied")
    assert "0x80094012" in element(page, "locInfoReqIDandReason")
    assert str(max(ca.authority.rows)) in element(page, "locInfoReqIDandReason")


@pytest.mark.parametrize(("quote", "lower"), [("'", False), ('"', True), ("", True)])
def test_ids_may_be_quoted_and_in_any_case(ca, web, quote, lower):
    """Versions differ in such trifles; a verdict may not depend on them."""
    ca.switches.update({"id_quote": quote, "lower_case": lower, "mode": "pending"})
    page = post(ca, web).text
    assert f"{'id' if lower else 'ID'}={quote}locInfoReqID{quote}>" in page
    assert element(page, "locInfoReqID")


def test_denied_pages_in_all_their_shapes(ca, web):
    """Code or id may be missing, and the reason may echo what the requester wrote, links included."""
    ca.switches.mode = "deny"
    reasons = {}
    for shape in ("full", "no-code", "no-id", "bare", "echo"):
        ca.switches.deny_page = shape
        page = post(ca, web).text
        assert element(page, "locDenied")
        reasons[shape] = element(page, "locInfoReqIDandReason")
    assert "0x80094012" in reasons["full"]
    assert "0x8" not in reasons["no-code"]
    assert "Request Id" not in reasons["no-id"]
    assert reasons["bare"] is None
    assert "certnew.cer?ReqID=7&" in reasons["echo"]


def test_an_unknown_template_and_a_broken_csr_are_denied(ca, web):
    """The commonest mistakes of a first installation."""
    assert "0x80094800" in post(ca, web, template="Nonsense").text
    ca.authority.templates["Off"] = Template("Off", published=False)
    assert "0x80094800" in post(ca, web, template="Off").text
    page = post(ca, web, csr=CSR.replace(b"+", b" ")[:200]).text
    assert "Error Parsing Request" in page
    assert element(page, "locDenied")
    assert ca.authority.issued == 0


def test_attributes_are_lines_and_bad_ones_are_ignored(ca, web):
    """A newline in a template's name injects attributes; a test sees them in the row."""
    post(ca, web, template="SCXAgent\nSAN:dns=evil.lab.test\nnonsense")
    row = max(ca.authority.rows.values(), key=lambda item: item.id)
    assert row.attributes == {"certificatetemplate": "SCXAgent", "san": "dns=evil.lab.test"}
    assert b"evil" not in row.certificate


def test_polling_tells_disposition_and_last_status(ca, web):
    """Approval, denial and deletion by a manager each end a poll differently."""
    ca.switches.mode = "pending"
    first, second, third = (max(ca.authority.rows) for _ in range(3) if post(ca, web))
    page = get(ca, web, f"certnew.cer?ReqID={first}&Enc=b64").text
    assert "\t\t5<LocID ID=locDispSpacer>" in page
    assert "Taken Under Submission" in page
    assert "0x0 (WIN32: 0)" in page
    ca.authority.approve(first)
    ca.authority.deny(second)
    ca.authority.delete(third)
    assert "BEGIN CERTIFICATE" in get(ca, web, f"certnew.cer?ReqID={first}&Enc=b64").text
    assert "0x80094014 (-2146877420)" in get(ca, web, f"certnew.cer?ReqID={second}&Enc=b64").text
    assert "0x80094004 (-2146877436)" in get(ca, web, f"certnew.cer?ReqID={third}&Enc=b64").text
    ca.authority.revoke(first)
    assert "\t\t6<LocID" in get(ca, web, f"certnew.cer?ReqID={first}&Enc=b64").text


def test_a_browsers_poll_answers_like_the_submission(ca, web):
    """`chkpnd` exists too, and must not count as a submission."""
    ca.switches.mode = "pending"
    post(ca, web)
    number = max(ca.authority.rows)
    answer = web.post(ca.url + "certfnsh.asp", data={"Mode": "chkpnd", "ReqID": number}, timeout=10)
    assert element(answer.text, "locInfoReqID") == f"Your Request Id is {number}."
    assert ca.authority.posts == 1


def test_paths_ignore_case(ca, web):
    """IIS does."""
    assert "nRenewals" in web.get(ca.url.replace("certsrv", "CertSrv") + "CERTCARC.ASP", timeout=10).text


# certificates, chains, renewals


def test_bodies_are_pem_der_or_bare_base64(ca, web):
    """Enc is a wish; a client has to look at what came."""
    post(ca, web)
    number = max(ca.authority.rows)
    der = ca.authority.rows[number].certificate
    assert get(ca, web, f"certnew.cer?ReqID={number}&Enc=bin").content == der
    pem = get(ca, web, f"certnew.cer?ReqID={number}&Enc=b64").content
    assert pem.startswith(b"-----BEGIN CERTIFICATE-----\r\n")
    assert to_der(x509.load_pem_x509_certificate(pem)) == der
    ca.switches.cer_as = "bare"
    assert base64.b64decode(get(ca, web, f"certnew.cer?ReqID={number}&Enc=b64").content) == der
    ca.switches.cer_as = "der"
    assert get(ca, web, f"certnew.cer?ReqID={number}&Enc=b64").content == der


def test_an_armoured_bag_calls_itself_a_certificate(ca, web):
    """AD CS does, and libraries refuse it as either PEM."""
    post(ca, web)
    number = max(ca.authority.rows)
    text = get(ca, web, f"certnew.p7b?ReqID={number}&Enc=b64").text
    assert text.startswith("-----BEGIN CERTIFICATE-----\r\n")
    bag = base64.b64decode("".join(text.split("\r\n")[1:-2]))
    assert bag == get(ca, web, f"certnew.p7b?ReqID={number}&Enc=bin").content
    found = {to_der(item) for item in library.load_der_pkcs7_certificates(bag)}
    assert found == {ca.authority.rows[number].certificate, *ca.authority.chain()}


@pytest.mark.parametrize("order", ["ordered", "reversed", "shuffled"])
def test_bags_come_in_any_order(ca, web, order):
    """A chain is built by keys and signatures, never by position."""
    post(ca, web)
    ca.switches.update({"bag": order, "bag_extra": True})
    bag = get(ca, web, f"certnew.p7b?ReqID={max(ca.authority.rows)}&Enc=bin").content
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer libraries accept unsorted sets as BER, with a warning
        found = library.load_der_pkcs7_certificates(bag)
    assert len(found) == 4


def test_openssl_reads_the_hand_made_bag(tmp_path):
    """The encoder is ours, so another reader must agree with it."""
    authority = Authority()
    (tmp_path / "bag").write_bytes(pkcs7(sorted(authority.chain())))
    run = subprocess.run(
        ["openssl", "pkcs7", "-inform", "DER", "-in", str(tmp_path / "bag"), "-print_certs"], stdout=subprocess.PIPE, check=True
    )
    assert run.stdout.count(b"BEGIN CERTIFICATE") == 2


def test_renewals_count_keys_and_certificates(tmp_path):
    """Same key: same SKI; new key: a new SKI, and old leaves need the old certificate."""
    with LabCA(tmp_path) as ca, requests.Session() as web:
        web.trust_env, web.verify, web.auth = False, ca.server_trust, (ca.user, ca.password)
        old = ca.authority.submit(CSR, "SCXAgent")
        ca.authority.renew(new_key=True)
        ca.authority.renew()
        ca.authority.renew(new_key=True)
        assert [(item.index, item.key_index) for item in ca.authority.generations] == [(0, 0), (1, 1), (2, 1), (3, 3)]
        assert "var nRenewals=3;" in get(ca, web, "certcarc.asp").text
        skis = []
        for index in range(4):
            der = get(ca, web, f"certnew.cer?ReqID=CACert&Renewal={index}&Enc=bin").content
            assert der == ca.authority.generations[index].der
            skis.append(x509.load_der_x509_certificate(der).extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value)
        assert skis[1] == skis[2]
        assert len(set(skis)) == 3
        assert get(ca, web, "certnew.cer?ReqID=CACert&Renewal=-1&Enc=bin").content == ca.authority.newest.der
        assert "80094004" in get(ca, web, "certnew.cer?ReqID=CACert&Renewal=9&Enc=bin").text
        bag = get(ca, web, f"certnew.p7b?ReqID={old.id}&Enc=bin").content
        assert ca.authority.generations[0].der in {to_der(item) for item in library.load_der_pkcs7_certificates(bag)}
        ca.switches.certcarc = "missing"
        assert "nRenewals" not in get(ca, web, "certcarc.asp").text


def test_a_new_root_comes_with_cross_certificates(tmp_path):
    """The bag then holds certificates that lead elsewhere."""
    authority = Authority()
    authority.renew_root()
    assert len(authority.roots) == 2
    subjects = [x509.load_der_x509_certificate(der).subject for der in authority.chain()]
    assert len(subjects) == 4
    assert len(set(subjects)) == 2


def test_leaves_verify_strictly_and_carry_what_ad_cs_puts_in(ca, web, tmp_path):
    """Strict verification of Python 3.13 and Microsoft's own extensions must both be met by tests."""
    (tmp_path / "leaf").write_bytes(base64_pem(ca.authority.issue(CSR)))
    chain = tmp_path / "chain"
    chain.write_bytes(base64_pem(ca.authority.newest.der))
    assert verify(str(tmp_path / "leaf"), str(chain), ca.issuer_trust) == ""
    leaf = x509.load_pem_x509_certificate((tmp_path / "leaf").read_bytes())
    oids = {item.oid.dotted_string for item in leaf.extensions}
    assert {"1.3.6.1.4.1.311.21.7", "1.3.6.1.4.1.311.21.10", "2.5.29.31", "1.3.6.1.5.5.7.1.1", "2.5.29.35"} <= oids
    assert abs(not_before(leaf) - (time.time() - 600)) < 60


def base64_pem(der):
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)


def test_the_clock_can_be_moved_and_the_cas_end_caps_leaves():
    """Renewal is about time: tests must issue certificates years from now, and near the CA's end."""
    now = [1_800_000_000.0]
    authority = Authority(clock=lambda: now[0], lifetime=dt.timedelta(days=100), ca_lifetime=300 * DAY)
    leaf = x509.load_der_x509_certificate(authority.issue(CSR))
    assert (not_before(leaf), not_after(leaf)) == (now[0] - 600, now[0] + 100 * DAY)
    now[0] += 250 * DAY
    leaf = x509.load_der_x509_certificate(authority.issue(CSR))
    assert not_after(leaf) == 1_800_000_000 + 300 * DAY
    now[0] += 60 * DAY
    assert authority.submit(CSR, "SCXAgent").hresult == 0x800B0101


def test_wrong_certificates_are_wrong_in_one_thing_each(tmp_path):
    """A check is proven only by a certificate that fails it alone."""
    authority = Authority()
    anchor, chain = tmp_path / "anchor", tmp_path / "chain"
    anchor.write_bytes(base64_pem(authority.roots[0]))
    chain.write_bytes(base64_pem(authority.newest.der))
    seen = {}
    for wrong in WRONG:
        authority.switches.wrong = wrong
        leaf = x509.load_der_x509_certificate(authority.submit(CSR, "SCXAgent").certificate)
        extensions = {item.oid: item.value for item in leaf.extensions}
        (tmp_path / "leaf").write_bytes(base64_pem(to_der(leaf)))
        san = extensions.get(x509.SubjectAlternativeName.oid)
        basic = extensions.get(x509.BasicConstraints.oid)
        seen[wrong] = {
            word
            for word, holds in {
                "key": spki(leaf.public_key()) == spki(KEY.public_key()),
                "cn": [item.value for item in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == ["host1.lab.test"],
                "san": san is not None and san.get_values_for_type(x509.DNSName) == ["host1.lab.test"],
                "eku": ExtendedKeyUsageOID.SERVER_AUTH in extensions[x509.ExtendedKeyUsage.oid],
                "ca": basic is None or not basic.ca,
                "dates": not_before(leaf) <= time.time() < not_after(leaf),
                "path": wrong in ("eku", "ca", "expired", "future") or verify(*map(str, (tmp_path / "leaf", chain, anchor))) == "",
            }.items()
            if not holds
        }
    assert seen == {
        "": set(),
        "key": {"key"},
        "name": {"cn", "san"},
        "san": {"san"},
        "cn": {"cn"},
        "eku": {"eku"},
        "ca": {"ca"},
        "expired": {"dates"},
        "future": {"dates"},
        "short": set(),
        "issuer": {"path"},
        "same-name-issuer": {"path"},
    }


def test_names_can_be_built_from_the_directory():
    """A template that ignores the CSR's names is the commonest misconfiguration."""
    authority = Authority()
    authority.switches.names_from_ad = "host1.ad.lab.test"
    assert names(x509.load_der_x509_certificate(authority.issue(CSR))) == ["host1.ad.lab.test"]


# who is let in


def test_without_or_with_wrong_credentials_iis_answers(ca, web):
    """Wrong passwords are counted: accounts lock, so a test must be able to say `one try`."""
    web.auth = None
    answer = post(ca, web)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == 'Negotiate, NTLM, Basic realm="ca.lab.test"'
    assert "<h2>401 - " in answer.text
    assert "loc" not in answer.text.replace("-//W3C//DTD", "")
    assert ca.bad_passwords == 0
    web.auth = (ca.user, "wrong")
    assert post(ca, web).status_code == 401
    assert ca.bad_passwords == 1
    assert (ca.authority.posts, ca.count_post) == (0, 2)
    ca.switches.auth = "negotiate"
    web.auth = (ca.user, ca.password)
    answer = post(ca, web)
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Negotiate, NTLM")
    ca.switches.auth = "anonymous"
    web.auth = None
    assert post(ca, web).status_code == 200


def test_the_log_holds_no_secret(ca, web):
    """Request logs are printed by failing tests."""
    post(ca, web)
    assert [(seen.method, seen.status, seen.authenticated, seen.scheme) for seen in ca.log] == [("POST", 200, True, "Basic")]
    secret = base64.b64encode(f"{ca.user}:{ca.password}".encode()).decode()
    assert ca.password not in repr(ca.log)
    assert secret not in repr(ca.log)


@pytest.mark.parametrize(
    ("switch", "words"), [("unknown-ca", "unable to get local issuer|self.signed"), ("wrong-name", "match"), ("expired", "expired")]
)
def test_the_https_certificate_can_be_bad(ca, web, switch, words):
    """Each of them must end the conversation before a password is sent."""
    ca.switches.https = switch
    web.close()
    with pytest.raises(requests.exceptions.SSLError, match=words):
        get(ca, web, "")
    assert ca.log == []
    ca.switches.https = ""
    assert get(ca, web, "").status_code == 200


def test_the_two_trusts_differ(ca):
    """Who signs the web server is not who signs certificates; a mix-up must fail."""
    with open(ca.server_trust, "rb") as one, open(ca.issuer_trust, "rb") as other:
        assert one.read() != other.read()
    context = ssl.create_default_context(cafile=ca.server_trust)
    for name in ("localhost", "ca.lab.test", "127.0.0.1"):
        with socket.create_connection(("127.0.0.1", ca.port)) as plain, context.wrap_socket(plain, server_hostname=name) as secure:
            assert secure.version() in ("TLSv1.2", "TLSv1.3")
    context = ssl.create_default_context(cafile=ca.issuer_trust)
    with socket.create_connection(("127.0.0.1", ca.port)) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname="localhost")


# answers that are not the CA's, and none at all


@pytest.mark.parametrize("status", ["401", "403", "404", "413", "500", "502", "503", "504"])
def test_error_statuses_have_a_page_without_element_ids(ca, web, status):
    """Only the status tells; nothing was stored."""
    ca.switches.answer = status
    answer = post(ca, web)
    assert answer.status_code == int(status)
    assert " ID=" not in answer.text
    assert ca.authority.rows == {}


def test_an_ambiguous_status_may_hide_a_stored_row(ca, web):
    """502 from a proxy after the CA issued: the case in which a second POST makes a second certificate."""
    ca.switches.update({"answer": "502", "answer_after": True, "answer_on": "post", "answer_times": 1})
    assert post(ca, web).status_code == 502
    assert (ca.authority.issued, ca.authority.posts) == (1, 1)
    assert post(ca, web).status_code == 200


@pytest.mark.parametrize("status", ["301", "302", "303", "307", "308"])
def test_redirects_lead_to_a_login(ca, web, status):
    """They must not be followed: some would carry the CSR, some turn the POST into a GET."""
    ca.switches.answer = status
    answer = post(ca, web)
    assert answer.status_code == int(status)
    assert answer.headers["Location"].endswith("/login")


def test_pages_that_mean_nothing(ca, web):
    """Login form, nothing, NULs, broken UTF-8, 8 MiB: all with status 200."""
    for kind, test in {
        "login": lambda body: b"type=password" in body,
        "empty": lambda body: body == b"",
        "nul": lambda body: bytes(4096) in body,
        "bad-utf8": lambda body: b"\xff" in body,
        "huge": lambda body: len(body) > 8 << 20,
    }.items():
        ca.switches.answer = kind
        answer = post(ca, web)
        assert answer.status_code == 200
        assert test(answer.content), kind


def test_a_stopped_service_says_so_without_any_outcome(ca, web):
    """CertSvc stopped before the POST, or between POST and GET."""
    ca.switches.unavailable = "post"
    page = post(ca, web).text
    assert "0x800706ba (WIN32: 1722)" in page
    assert element(page, "locDenied") is None
    assert ca.authority.rows == {}
    ca.switches.unavailable = "get"
    post(ca, web)
    assert "0x800706ba" in get(ca, web, f"certnew.cer?ReqID={max(ca.authority.rows)}&Enc=b64").text


@pytest.mark.parametrize(("lost", "stored"), [("before", 0), ("after", 1), ("truncated", 1)])
def test_a_reply_can_be_lost(ca, web, lost, stored):
    """What the client sees is the same, what the CA holds is not; and nobody repeats the POST behind its back."""
    ca.switches.update({"lost": lost, "lost_times": 1})
    try:
        answer = post(ca, web)
        assert lost == "truncated"
        assert len(answer.content) < int(answer.headers["Content-Length"])
    except requests.exceptions.RequestException:
        pass
    assert (ca.authority.issued, ca.authority.posts, ca.count_post) == (stored, 1, 1)
    web.close()
    assert "ReqID" in post(ca, web).text


def test_a_cut_page_can_look_complete_to_http(ca, web):
    """A proxy may cut inside the id: 89 becomes 8."""
    ca.switches.mode = "pending"
    whole = post(ca, web).content
    ca.switches.update({"lost": "truncated-quiet", "truncate_at": whole.index(b"Request Id is ") + 15})
    assert post(ca, web).content.endswith(b"Your Request Id is " + str(max(ca.authority.rows)).encode()[:1])


def test_a_slow_reply_is_worked_on_before(ca, web):
    """A client that gives up waiting has a row on the CA."""
    ca.switches.update({"slow": 0.5, "slow_on": "post"})
    form = {"Mode": "newreq", "CertRequest": CSR, "CertAttrib": "CertificateTemplate:SCXAgent"}
    with pytest.raises(requests.exceptions.ReadTimeout):
        web.post(ca.url + "certfnsh.asp", data=form, timeout=0.2)
    assert ca.authority.issued == ca.count_post == 1


@pytest.mark.parametrize("way", ["500", "html", "drop"])
def test_fetching_can_fail_a_few_times(ca, web, way):
    """Then a GET is repeated, never the POST."""
    post(ca, web)
    number = max(ca.authority.rows)
    ca.switches.update({"cer_fails": 2, "cer_fails_as": way})
    for _ in range(2):
        try:
            assert "BEGIN" not in get(ca, web, f"certnew.cer?ReqID={number}&Enc=b64").text
        except requests.exceptions.ConnectionError:
            assert way == "drop"
    assert "BEGIN" in get(ca, web, f"certnew.cer?ReqID={number}&Enc=b64").text


def test_a_form_beyond_asps_limit_is_refused(ca, web):
    """200 000 bytes by default."""
    assert post(ca, web, csr=b"x" * 200_001).status_code == 413
    assert ca.authority.posts == 0


def test_connections_are_kept_and_the_clock_can_be_wrong(ca, web):
    """Keep-alive is what a server does; Date is how a client notices clocks apart."""
    ca.switches.date_offset = 3600
    date = get(ca, web, "certcarc.asp").headers["Date"]
    assert abs(email.utils.parsedate_to_datetime(date).timestamp() - time.time() - 3600) < 5
    pool = web.get_adapter(ca.url).poolmanager
    get(ca, web, "certcarc.asp")
    assert [pool.pools.get(key).num_connections for key in pool.pools.keys()] == [1]  # noqa: SIM118 - not a dict: it refuses to be iterated


def test_a_stopped_server_refuses_and_comes_back_on_its_port(tmp_path):
    """An outage, and its end, under the same address."""
    ca = LabCA(tmp_path)
    ca.start()
    ca.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ca.port), timeout=2)
    port = ca.port
    with ca:
        assert ca.port == port


def test_stopping_cuts_connections_that_are_kept(tmp_path):
    """A machine that goes down takes its connections with it, used or not."""
    with LabCA(tmp_path) as ca, requests.Session() as web:
        web.trust_env, web.verify, web.auth = False, ca.server_trust, (ca.user, ca.password)
        get(ca, web, "certcarc.asp")
        pools = web.get_adapter(ca.url).poolmanager.pools
        (kept,) = [item.sock for key in pools.keys() for item in pools.get(key).pool.queue if item]  # noqa: SIM118 - as above
        ca.stop()
        kept.settimeout(5)
        assert kept.recv(1) == b""


def test_switches_refuse_unknown_names_and_wrong_kinds():
    """A misspelt switch would be a test of nothing."""
    switches = Switches()
    with pytest.raises(KeyError):
        switches.update({"mod": "pending"})
    with pytest.raises(TypeError):
        switches.update({"cer_fails": "2"})
    switches.update({"slow": 1})
    assert switches.values()["slow"] == 1


def raw(ca, path, form="", *, wait_s=10.0):
    """Send one request on a connection of its own and return the bytes that came, and whether the end was a reset."""
    body = form.encode()
    token = base64.b64encode(f"{ca.user}:{ca.password}".encode()).decode()
    head = (
        f"{'POST' if form else 'GET'} /certsrv/{path} HTTP/1.1\r\nHost: {ca.server}\r\nAuthorization: Basic {token}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context(cafile=ca.server_trust)
    secure = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    found, steps = b"", [secure.do_handshake, lambda: secure.write(head.encode() + body)]
    with socket.create_connection(("127.0.0.1", ca.port), timeout=wait_s) as plain:
        while True:
            try:
                if steps:
                    steps[0]()
                    del steps[0]
                    continue
                part = secure.read(65536)
                if not part:
                    return found, False
                found += part
            except ssl.SSLWantReadError:
                # a socket of ssl's would tell of a reset as if it were an ordinary end
                try:
                    plain.sendall(outgoing.read())
                    came = plain.recv(65536)
                except ConnectionResetError:
                    return found, True
                incoming.write(came) if came else incoming.write_eof()
            except ssl.SSLError:
                return found, False


def form():
    """A submission as a form."""
    return "Mode=newreq&CertAttrib=CertificateTemplate%3ASCXAgent&CertRequest=" + CSR.decode().replace("+", "%2B").replace("\n", "%0A")


def newest(ca):
    return ca.authority.rows[max(ca.authority.rows)]


def poll(ca, web, number):
    return get(ca, web, f"certnew.cer?ReqID={number}&Enc=b64").text


# the language of the web server and that of the CA


def test_the_web_server_and_the_ca_may_speak_different_languages(ca, web):
    """An English CA behind a German web server is common: neither language may be concluded from the other."""
    ca.switches.update({"language": "de", "ca_language": "en", "mode": "deny"})
    page = post(ca, web).text
    assert element(page, "locDenied") == "Ihre Zertifikatanforderung wurde verweigert."
    assert "Denied by Policy Module  0x80094012, The permissions" in element(page, "locInfoReqIDandReason")
    ca.switches.update({"language": "en", "ca_language": "de"})
    page = post(ca, web).text
    assert element(page, "locDenied") == "Your certificate request was denied."
    assert "Vom Richtlinienmodul verweigert  0x80094012, Die Berechtigungen" in element(page, "locInfoReqIDandReason")
    ca.switches.ca_language = ""
    assert "Denied by Policy Module" in post(ca, web).text


def test_the_id_stands_first_or_after_other_words(ca, web):
    """Whoever expects the English sentence's order finds nothing."""
    ca.switches.mode = "pending"
    found = {}
    for language in LANGUAGES:
        ca.switches.language = language
        text = element(post(ca, web).text, "locInfoReqID")
        found[language] = text.index(str(newest(ca).id))
        assert re.findall("[0-9]+", text) == [str(newest(ca).id)]
    assert found["tr"] == 0
    assert found["es"] > 40


def test_arabic_pages_run_right_to_left_and_may_have_their_own_digits(ca, web):
    """Nobody has seen such a page, so a client may say `unknown`, and nothing else."""
    ca.switches.update({"language": "ar", "mode": "pending"})
    page = post(ca, web).text
    assert "<HTML Dir=rtl>" in page
    assert str(newest(ca).id) in element(page, "locInfoReqID")
    ca.switches.digits = "native"
    text = element(post(ca, web).text, "locInfoReqID")
    assert not re.search("[0-9]", text)
    assert int("".join(re.findall("[\u0660-\u0669]", text))) == newest(ca).id
    ca.switches.language = "de"
    assert str(newest(ca).id + 1) in element(post(ca, web).text, "locInfoReqID")


CODES = [
    int(code, 16)
    for code in (
        "800706ba 800706bf 800706be 80080005 80092013 80092012 80094006 8009400f 80090020 80094001 80094002 80094004 80094003 80094011 "
        "80094012 80094014 80094016 80094800 80094801 80094802 80094803 80094807 80094809 8009480a 8009480b 8009480d 8009480e 8009480f "
        "80094812 80094811 8009310b 80093102 80093005 80070005 80070057 800b0101 800b010a 800b0114 80004005 8000ffff"
    ).split()
]


def test_every_known_code_denies_with_its_text_and_an_unknown_one_without(ca, web):
    """A program that knows the codes is tested with each; one that reads the texts meets a second language."""
    for language, unknown in (("en", "The request was denied."), ("de", "Die Anforderung wurde verweigert.")):
        ca.switches.update({"mode": "deny", "language": language})
        texts = set()
        for code in [*CODES, 0x8009ABCD]:
            ca.switches.deny_hresult = code
            reason = element(post(ca, web).text, "locInfoReqIDandReason")
            found = re.search(r"  0x([0-9a-f]{8}), (.*)\r\n", reason)
            assert int(found.group(1), 16) == code
            texts.add(found.group(2))
            assert newest(ca).hresult == code
        assert len(texts) == len(CODES) + 1
        assert unknown in texts
    assert sorted(messages.known()) == sorted([0, *CODES])


def test_a_denial_may_echo_anything_escaped_or_not(ca, web):
    """The facts leave open whether messages are escaped: a link or an element in them may look real."""
    echo = '<A Href="certnew.cer?ReqID=7&amp;Enc=b64">x</A><P ID=locInfoReqID> 7 </P>'
    ca.switches.update({"mode": "deny", "deny_message": echo})
    assert echo in post(ca, web).text
    ca.switches.escape = True
    page = post(ca, web).text
    assert echo not in page
    assert "&lt;A Href=" in page


@pytest.mark.parametrize("shape", ["spaced", "among", "wrapped"])
def test_element_ids_stand_anywhere_in_their_tag(ca, web, shape):
    """Between other attributes, with blanks around the sign, or on a line of their own."""
    ca.switches.update({"id_shape": shape, "id_quote": '"', "mode": "pending"})
    page = post(ca, web).text
    assert str(newest(ca).id) in element(page, "locInfoReqID")
    assert '<P ID="locInfoReqID">' not in page


# what templates and the CA demand


@pytest.mark.parametrize(
    ("template", "hresult"),
    [
        (Template("T"), 0),
        (Template("T", published=False), 0x80094800),
        (Template("T", enroll=False), 0x80094012),
        (Template("T", minimum_rsa_bits=2048), 0x80094811),
        (Template("T", minimum_rsa_bits=1024), 0),
        (Template("T", agent_signatures=1), 0x80094809),
        (Template("T", directory_attribute="dns"), 0x8009480F),
        (Template("T", directory_attribute="mail"), 0x80094812),
        (Template("T", directory_attribute="upn"), 0x8009480D),
        (Template("T", directory_attribute="guid"), 0x8009480E),
    ],
    ids=str,
)
def test_templates_deny_with_the_code_of_what_is_missing(template, hresult):
    """Each misconfiguration has one code, and the operator is to be told which."""
    authority = Authority()
    authority.templates["T"] = template
    row = authority.submit(RSA_CSR, "T")
    assert (row.state, row.hresult) == ("denied" if hresult else "issued", hresult)


RSA_CSR = make_csr(key=rsa.generate_private_key(65537, 1024))


def test_a_template_can_wait_for_a_manager(ca, web):
    """As everybody's request does with mode=pending, but for one template alone."""
    ca.authority.templates["Slow"] = Template("Slow", needs_approval=True)
    assert element(post(ca, web, template="Slow").text, "locInfoReqID")
    assert "ReqID=CACert" in post(ca, web).text


def test_an_account_may_lack_the_right_to_request_at_all(ca, web):
    """That is a right on the CA and another code than a template's."""
    ca.authority.request_right = False
    assert "0x80094011" in post(ca, web).text


def test_names_from_the_directory_are_the_accounts_with_its_sid(ca, web):
    """The CSR's names are ignored: a host's certificate then bears the name of the service account that asked."""
    authority = Authority()
    authority.templates["AD"] = Template("AD", names="directory")
    host = x509.load_der_x509_certificate(authority.submit(CSR, "AD", "LAB\\WEB7$").certificate)
    assert names(host) == ["web7.lab.test"]
    user = x509.load_der_x509_certificate(authority.submit(CSR, "AD", "LAB\\svc-enroll").certificate)
    assert user.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "svc-enroll"
    assert names(user) == []
    for leaf in (host, user):
        sid = leaf.extensions.get_extension_for_oid(x509.ObjectIdentifier("1.3.6.1.4.1.311.25.2")).value.value
        assert b"S-1-5-21-" in sid
    ca.authority.templates["AD"] = Template("AD", names="directory")
    post(ca, web, template="AD")
    assert b"svc-enroll" in newest(ca).certificate


# certnew.cer where there is no certificate


@pytest.mark.parametrize("spacer", [True, False])
def test_what_certnew_tells_of_each_kind_of_request(ca, web, spacer):
    """With the unconfirmed number a client can tell them apart; without it only codes and localised words are left."""
    ca.switches.update({"mode": "pending", "spacer": spacer, "language": "de"})
    for _ in range(4):
        post(ca, web)
    first = min(ca.authority.rows)
    ca.authority.deny(first)
    ca.authority.approve(first + 1)
    ca.authority.revoke(first + 1)
    ca.authority.delete(first + 2)
    ca.switches.mode = "deny"
    post(ca, web)
    ca.switches.deny_hresult = None
    post(ca, web)
    ca.switches.update({"mode": "fail", "deny_hresult": 0x80094001})
    post(ca, web)
    expected = {
        first: ("2", "0x80094014 (-2146877420)", "Verweigert von LAB\\manager"),
        first + 1: ("6", "0x0 (WIN32: 0)", "Gesperrt von LAB\\manager"),
        first + 2: (None, "0x80094004 (-2146877436)", ""),
        first + 3: ("5", "0x0 (WIN32: 0)", "Zur Bearbeitung angenommen"),
        first + 4: ("2", "0x80094012 (-2146877422)", "Vom Richtlinienmodul verweigert  0x80094012, Die Berechtigungen"),
        first + 5: ("2", "0x0 (WIN32: 0)", "Vom Richtlinienmodul verweigert  Die Anforderung wurde verweigert."),
        first + 6: ("-2146877439", "0x80094001 (-2146877439)", "Fehler beim Erstellen"),
        first + 7: (None, "0x80094004 (-2146877436)", ""),
    }
    for number, (disposition, status, words) in expected.items():
        page = poll(ca, web, number)
        shown = re.findall(r"Disposition:</B>\t\t(-?[0-9]+)<LocID ID=locDispSpacer> - </LocID>", page)
        assert shown == ([disposition] if disposition and spacer else [])
        assert status in page
        assert words in page
        assert ("Letzter Status:</B>\t\t" in page) == bool(words)
        assert "BEGIN" not in page
    ca.switches.revoked_status = 0x80094003
    assert "0x80094003" in poll(ca, web, first + 1)


def test_a_failed_request_is_denied_to_its_requester(ca, web):
    """The CA's own table calls it failed; the page is that of a denial."""
    ca.switches.update({"mode": "fail", "deny_hresult": 0x80094001})
    page = post(ca, web).text
    assert "Error Constructing or Publishing Certificate  0x80094001" in element(page, "locInfoReqIDandReason")
    assert newest(ca).state == "failed"


def test_other_accounts_requests_may_be_hidden(ca, web):
    """The facts leave open whether they are; a stranger's certificate must not be taken for one's own either way."""
    stranger = ca.authority.submit(CSR, "SCXAgent", "LAB\\other$").id
    assert "BEGIN CERTIFICATE" in poll(ca, web, stranger)
    ca.switches.foreign = "empty"
    assert "0x80094004" in poll(ca, web, stranger)
    ca.switches.foreign = "zero"
    assert "\t\t0<LocID ID=locDispSpacer>" in poll(ca, web, stranger)
    post(ca, web)
    assert "BEGIN CERTIFICATE" in poll(ca, web, newest(ca).id)


# a CA that is not well


@pytest.mark.parametrize(
    ("hresult", "shown", "stored"),
    [
        (0x800706BA, "0x800706ba (WIN32: 1722)", 0),
        (0x800706BF, "0x800706bf (WIN32: 1727)", 0),
        (0x80080005, "0x80080005 (-2146959355)", 0),
        (0x80070005, "0x80070005 (WIN32: 5)", 0),
        (0x800706BE, "0x800706be (WIN32: 1726)", 1),
    ],
)
def test_the_call_to_the_service_fails_in_different_ways(ca, web, hresult, shown, stored):
    """Only a call that broke midway leaves a request behind."""
    ca.switches.update({"unavailable": "post", "unavailable_hresult": hresult, "language": "fr"})
    page = post(ca, web).text
    assert shown in page
    assert ("n'a pas démarré" in page) == (hresult == 0x800706BA)
    assert (len(ca.authority.rows), ca.authority.posts) == (stored, 1)
    assert element(page, "locDenied") is None
    ca.switches.unavailable_stored = True
    assert shown in post(ca, web).text
    assert len(ca.authority.rows) == stored + 1


@pytest.mark.parametrize("status", ["413", "403", "500"])
def test_the_answer_to_an_oversized_form_can_be_chosen(ca, web, status):
    """Servers differ in it."""
    ca.switches.oversize = status
    assert post(ca, web, csr=b"x" * 200_001).status_code == int(status)


# other answers


@pytest.mark.parametrize("kind", [kind for kind in ANSWERS if kind not in ("", "100-then-close")])
def test_no_foreign_answer_has_an_element_of_the_cas_or_stores_anything(ca, web, kind):
    """Whatever stands between may say anything, but not what only the CA says."""
    ca.switches.update({"answer": kind, "language": "de"})
    answer = post(ca, web)
    assert answer.status_code == {"404-html": 404, "500-asp": 500, "proxy-502": 502, "proxy-504": 504}.get(
        kind, int(kind[:3]) if kind[:3].isdigit() else 200
    )
    assert not re.search(r"(?i)\bid\s*=\s*[\"']?loc(?!Info>)", answer.text)
    assert not re.search("ReqID=[0-9]", answer.text)
    assert ca.authority.rows == {}


def test_foreign_answers_are_what_they_are_called(ca, web):
    """A substatus shows in the text alone; a proxy and a portal have pages of their own, with numbers and forms in them."""
    for kind, words in {
        "403.4": "<h2>403.4 - Forbidden: SSL is required",
        "403.7": "SSL client certificate is required",
        "403.16": "untrusted or invalid",
        "500-asp": "certfnsh.asp</font>",
        "proxy-502": "gateway 502",
        "captive": "<form action=",
        "json": '{"error"',
    }.items():
        ca.switches.answer = kind
        assert words in post(ca, web).text
    for kind, header in {"407": "Proxy-Authenticate", "429": "Retry-After", "401": "WWW-Authenticate", "proxy-504": "Via"}.items():
        ca.switches.answer = kind
        assert header in post(ca, web).headers
    ca.switches.answer = "204"
    answer = post(ca, web)
    assert (answer.content, "Content-Length" in answer.headers) == (b"", False)
    ca.switches.update({"answer": "404-html", "language": "ru"})
    assert "<h1>Ошибка сервера</h1>" in post(ca, web).text
    ca.switches.answer = "100-then-close"
    assert raw(ca, "certfnsh.asp", form()) == (b"HTTP/1.1 100 Continue\r\n\r\n", False)


# the way over the line


@pytest.mark.parametrize(("switch", "part"), [("slow_headers", 0), ("slow_body", 1)])
def test_bytes_can_come_one_by_one(ca, switch, part):
    """Every read is short of its time-out, and the whole outlasts any patience; headers are no exception."""
    ca.switches.update({switch: 0.001, "slow_on": "get"})
    start = time.monotonic()
    found, _ = raw(ca, "certcarc.asp")
    took = time.monotonic() - start
    head, _, body = found.partition(b"\r\n\r\n")
    assert took > 0.001 * len((head, body)[part])
    ca.switches.slow_on = "post"
    start = time.monotonic()
    raw(ca, "certcarc.asp")
    assert time.monotonic() - start < took / 2


@pytest.mark.parametrize("lost", ["before", "after", "reset", "truncated"])
def test_replies_to_gets_can_be_lost_too(ca, web, lost):
    """The certificate exists and can be fetched again."""
    post(ca, web)
    ca.switches.update({"lost": lost, "lost_on": "get", "lost_times": 1})
    found, reset = raw(ca, f"certnew.cer?ReqID={newest(ca).id}&Enc=b64")
    assert reset == (lost == "reset")
    assert b"END CERTIFICATE" not in found
    assert (found != b"") == (lost == "truncated")
    assert b"END CERTIFICATE" in raw(ca, f"certnew.cer?ReqID={newest(ca).id}&Enc=b64")[0]


def test_a_submission_can_end_in_a_reset(ca):
    """To the client that is another error than a closed connection, and the row is there as well."""
    ca.switches.lost = "reset"
    assert raw(ca, "certfnsh.asp", form()) == (b"", True)
    assert ca.authority.issued == 1


def test_pages_can_be_filled_up(ca, web):
    """A page that means something, and is larger than anybody should read."""
    ca.switches.update({"mode": "pending", "body_bytes": 3 << 20})
    body = post(ca, web).content
    assert len(body) == 3 << 20
    assert body.rstrip().endswith(b"</HTML>")


def test_bodies_can_be_chunked_and_the_last_chunk_missing(ca, web):
    """No Content-Length to compare with, so only the framing tells that something is missing."""
    ca.switches.chunked = True
    answer = post(ca, web)
    assert answer.headers["Transfer-Encoding"] == "chunked"
    assert "Content-Length" not in answer.headers
    assert answer.text.rstrip().endswith("</HTML>")
    assert b"\r\n0\r\n\r\n" in raw(ca, "certfnsh.asp", form())[0]
    ca.switches.lost = "truncated"
    assert b"\r\n0\r\n\r\n" not in raw(ca, "certfnsh.asp", form())[0]


@pytest.mark.parametrize("way", ["missing", "wrong-more", "wrong-less"])
def test_the_content_length_can_be_missing_or_wrong(ca, way):
    """Each of them ends with the connection, and none is what the body is."""
    ca.switches.update({"content_length": way, "truncate_at": 100})
    head, _, body = raw(ca, "certfnsh.asp", form())[0].partition(b"\r\n\r\n")
    claimed = re.search(rb"(?i)content-length: ([0-9]+)", head)
    assert body.rstrip().endswith(b"</HTML>")
    assert (int(claimed.group(1)) if claimed else None) == {"missing": None, "wrong-more": len(body) + 10, "wrong-less": 100}[way]


def test_the_content_type_can_be_anything_or_nothing(ca, web):
    """It decides nothing."""
    ca.switches.content_type = "text/plain; charset=klingon"
    assert post(ca, web).headers["Content-Type"] == "text/plain; charset=klingon"
    assert get(ca, web, f"certnew.cer?ReqID={newest(ca).id}&Enc=b64").headers["Content-Type"] == "text/plain; charset=klingon"
    ca.switches.content_type = "none"
    assert "Content-Type" not in post(ca, web).headers
    ca.switches.shape_on = "get"
    assert post(ca, web).headers["Content-Type"] == "text/html"


@pytest.mark.parametrize("charset", CHARSETS)
def test_pages_come_in_the_encoding_that_they_name(ca, web, charset):
    """Old servers have the code page of their country; what it lacks becomes a question mark."""
    language = {"gb2312": "zh", "shift_jis": "ja", "windows-1251": "ru"}.get(charset, "de")
    ca.switches.update({"page_charset": charset, "language": language, "mode": "pending"})
    answer = post(ca, web)
    page = answer.content.decode({"utf-16": "utf-16-le"}.get(charset, charset))
    assert f"charset={charset.upper()}" in page
    assert "�" not in element(page, "locInfoReqID")
    assert "?" not in element(page, "locInfoReqID")
    assert str(newest(ca).id) in element(page, "locInfoReqID")
    ca.switches.bom = True
    mark = {"utf-8": b"\xef\xbb\xbf", "utf-16": b"\xff\xfe"}.get(charset, b"\r\n" if charset == "" else b"<!")
    assert post(ca, web).content.startswith(mark)
    ca.switches.update({"language": "ar", "bom": False})
    assert (b"?" in post(ca, web).content) == (charset not in ("utf-8", "utf-16"))


def test_pages_can_be_twisted_by_the_test(ca, web):
    """What no switch can do to a page: its bytes are handed over, and what comes back is sent."""
    seen = []
    ca.twist = lambda method, body: seen.append((method, body[:2])) or b"twisted"
    try:
        assert post(ca, web).content == b"twisted"
        assert get(ca, web, "certcarc.asp").content == b"twisted"
        assert "BEGIN" in poll(ca, web, newest(ca).id)
    finally:
        ca.twist = None
    assert seen == [("post", b"<!"), ("get", b"<!")]


# the old client library's misreadings


@pytest.mark.parametrize(
    "switch",
    [
        {"answer": "captive", "answer_on": "post"},
        {"answer": "302", "answer_on": "post", "answer_times": 1},
        {"mode": "pending", "language": "ja"},
        {"unavailable": "post"},
        {"page_charset": "utf-16"},
    ],
    ids=str,
)
def test_the_library_takes_what_it_does_not_know_for_a_refusal(ca, library_client, switch):
    """A portal, a redirect that it follows, a stopped service: none of them is a denial."""
    ca.switches.update(switch)
    with pytest.raises((certsrv.RequestDeniedException, requests.exceptions.HTTPError)) as refused:
        library_client.get_cert(CSR, "SCXAgent")
    assert ca.authority.issued == (1 if "page_charset" in switch else 0)
    assert "answer" in switch or refused.type is certsrv.RequestDeniedException


def test_the_library_stumbles_over_headers_and_missing_words(ca, library_client):
    """A missing header, a parameter in it, a page without the number: none is an error of the server."""
    ca.switches.update({"content_type": "application/pkix-cert; charset=UTF-8", "shape_on": "get"})
    with pytest.raises(certsrv.CouldNotRetrieveCertificateException):
        library_client.get_cert(CSR, "SCXAgent")
    ca.switches.content_type = "none"
    with pytest.raises(KeyError):
        library_client.get_cert(CSR, "SCXAgent")
    ca.switches.update({"content_type": "", "certcarc": "missing"})
    with pytest.raises(AttributeError):
        library_client.get_ca_cert()
    ca.switches.update({"certcarc": "", "answer": "login"})
    assert library_client.check_credentials()
    assert ca.authority.issued == 2


def test_the_library_sends_the_request_again_where_it_is_told_to(ca, library_client):
    """307 and 308 keep method and body: the request goes to whoever the answer names."""
    ca.switches.update({"answer": "307", "answer_on": "post", "answer_times": 1})
    with pytest.raises(requests.exceptions.HTTPError):
        library_client.get_cert(CSR, "SCXAgent")
    assert [(seen.method, seen.path) for seen in ca.log] == [("POST", "/certsrv/certfnsh.asp"), ("POST", "/login")]


# who is let in, in the other ways


@pytest.mark.parametrize(
    ("auth", "offers"),
    [
        ("negotiate", "Negotiate, NTLM"),
        ("epa", "Negotiate, NTLM"),
        ("kerberos", "Negotiate"),
        ("ntlm", "NTLM"),
        ("refused", 'Negotiate, NTLM, Basic realm="ca.lab.test"'),
    ],
)
def test_right_passwords_can_be_refused(ca, web, auth, offers):
    """Another way to sign in is wanted, or the account is locked: the 401 does not say why."""
    ca.switches.auth = auth
    answer = post(ca, web)
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, offers)
    assert ca.bad_passwords == (1 if auth == "refused" else 0)
    assert ca.authority.posts == 0


def test_an_anonymous_server_lets_everybody_in_and_nobody_enroll(ca, web):
    """Nobody is asked for a password, and the account that asks has no right on the template."""
    ca.switches.auth = "anonymous"
    web.auth = None
    assert "0x80094012" in post(ca, web).text
    assert get(ca, web, "certcarc.asp").status_code == 200


# a CA's life


def issuer_of(authority, tmp_path, row):
    """Have OpenSSL judge a leaf with its bag and all roots; returns its complaint."""
    chain = authority.chain(row.generation)
    (tmp_path / "leaf").write_bytes(base64_pem(row.certificate))
    (tmp_path / "bag").write_bytes(to_pem(chain))
    (tmp_path / "roots").write_bytes(to_pem(authority.roots))
    return verify(*(str(tmp_path / name) for name in ("leaf", "bag", "roots")))


@pytest.mark.parametrize("tiers", [1, 2, 3])
def test_every_hierarchy_lives_through_its_renewals(tmp_path, tiers):
    """Root, policy and issuing CA: after each renewal old and new certificates lead to a root that the CA had."""
    authority = Authority(tiers=tiers)
    assert len(authority.chain()) == tiers
    rows = [authority.submit(CSR, "SCXAgent")]
    for renewal in (authority.renew, lambda: authority.renew(new_key=True), authority.renew_root):
        renewal()
        rows.append(authority.submit(CSR, "SCXAgent"))
    assert [(item.index, item.key_index) for item in authority.generations] == [(0, 0), (1, 0), (2, 2), (3, 3)]
    assert [issuer_of(authority, tmp_path, row) for row in rows] == [""] * 4
    assert len(authority.roots) == (4 if tiers == 1 else 2)
    same = [x509.load_der_x509_certificate(authority.chain(index)[0]) for index in (0, 1)]
    assert same[0].public_key().public_numbers() == same[1].public_key().public_numbers()
    assert same[0] != same[1]
    # either certificate of the same key verifies the old leaf
    rows[0].generation = 1
    assert issuer_of(authority, tmp_path, rows[0]) == ""


def test_a_root_renewed_with_its_key_has_no_cross_certificates():
    """There is nothing to cross over."""
    authority = Authority()
    authority.renew_root(new_key=False)
    assert (len(authority.roots), len(authority.chain())) == (2, 2)


@pytest.mark.parametrize("tiers", [1, 2, 3])
def test_an_expired_ca_denies_and_keeps_its_indexes(tiers):
    """800b0101, until it is renewed."""
    authority = Authority(tiers=tiers)
    authority.renew()
    authority.expire()
    assert [(item.index, item.key_index) for item in authority.generations] == [(0, 0), (1, 0)]
    assert not_after(authority.newest.certificate) < time.time()
    assert authority.submit(CSR, "SCXAgent").hresult == 0x800B0101
    authority.renew(new_key=True)
    assert authority.submit(CSR, "SCXAgent").state == "issued"


@pytest.mark.parametrize("tiers", [1, 2, 3])
def test_a_ca_near_its_end_shortens_certificates(tiers):
    """The template says two years, the CA has five days left."""
    leaf = x509.load_der_x509_certificate(Authority(tiers=tiers, ca_lifetime=5 * DAY).issue(CSR))
    assert abs(not_after(leaf) - time.time() - 5 * DAY) < 60


def test_certificates_can_lack_key_identifiers(tmp_path):
    """Then names and signatures alone tell who signed."""
    authority = Authority(tiers=3, aki=False)
    for der in (authority.issue(CSR), *authority.chain()):
        oids = {item.oid.dotted_string for item in x509.load_der_x509_certificate(der).extensions}
        assert not oids & {"2.5.29.35", "2.5.29.14"}
    (tmp_path / "leaf").write_bytes(base64_pem(authority.issue(CSR)))
    (tmp_path / "bag").write_bytes(to_pem(authority.chain()))
    (tmp_path / "roots").write_bytes(to_pem(authority.roots))
    command = ["openssl", "verify", "-CAfile", str(tmp_path / "roots"), "-untrusted", str(tmp_path / "bag"), str(tmp_path / "leaf")]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def test_a_ca_installed_anew_has_its_old_name_and_counts_from_one(tmp_path):
    """An ID of the old one is somebody else's on the new one, and the old certificates lead nowhere."""
    authority = Authority(first_id=50)
    authority.renew()
    row, chain = authority.submit(CSR, "SCXAgent"), authority.chain()
    authority.rebuild()
    assert (authority.rows, authority.newest.index) == ({}, 0)
    again = authority.submit(CSR, "SCXAgent")
    assert (row.id, again.id, authority.posts) == (50, 1, 2)
    assert not set(chain) & set(authority.chain())
    assert x509.load_der_x509_certificate(chain[0]).subject == x509.load_der_x509_certificate(authority.chain()[0]).subject
    assert issuer_of(authority, tmp_path, again) == ""
    row.generation = 0
    assert issuer_of(authority, tmp_path, row) != ""


def test_the_number_of_renewals_can_be_a_lie(ca, web):
    """3 on a CA that was never renewed: Renewal=3 then brings nothing."""
    ca.switches.nrenewals = 3
    assert "var nRenewals=3;" in get(ca, web, "certcarc.asp").text
    ca.switches.nrenewals = 0
    assert "var nRenewals=0;" in get(ca, web, "certcarc.asp").text


# switches


def test_a_choice_that_does_not_exist_is_refused_and_the_others_are_named():
    """A misspelt value would switch nothing on, and a test would prove nothing."""
    switches = Switches()
    with pytest.raises(ValueError, match=r"mode: 'pendig' is none of 'issue', 'pending', 'deny', 'fail'"):
        switches.update({"mode": "pendig"})
    with pytest.raises(ValueError, match="lost"):
        switches.lost = "aftr"
    with pytest.raises(AttributeError):
        switches.mod = "pending"
    with pytest.raises(TypeError):
        switches.update({"bom": 1})
    with pytest.raises(TypeError):
        switches.update({"cer_fails": True})
    assert switches == Switches()


def test_help_lists_every_switch_with_its_choices_and_meaning():
    """It is made from the switches themselves, so none can be missing; nor may one have nothing to say."""
    told = {switch.name: switch for _, group in described() for switch in group}
    assert list(told) == list(Switches().values())
    text = program.epilog()
    for name, switch in told.items():
        assert f"\n  {name}=" in text
        assert switch.meaning
        assert switch.choices or switch.each
        for choice in Switches.__dataclass_fields__[name].metadata["choices"]:
            assert choice in text


# the program


@pytest.mark.slow
def test_the_program_serves_and_is_steered_from_another_process(tmp_path):
    """The demo runs the CA as a process of its own."""
    command = [sys.executable, "-m", "tests.lab.ca", "--directory", str(tmp_path)]
    serving = [*command, "--tiers", "3", "--language", "de", "--ca-language", "en", "--template", "Slow:approval", "--first-id", "7"]
    with subprocess.Popen(serving, cwd=CHECKOUT, stdout=subprocess.DEVNULL) as server, requests.Session() as web:
        try:
            ready = tmp_path / "ready.json"
            deadline = time.monotonic() + 10
            while not ready.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            told = json.loads(ready.read_text())
            with open(told["password_file"], encoding="ascii") as file:
                web.auth = (told["user"], file.read().rstrip("\n"))
            assert os.stat(told["password_file"]).st_mode & 0o777 == 0o600
            web.trust_env, web.verify = False, told["server_trust"]
            url = f"https://{told['server']}/certsrv/"
            form = {"Mode": "newreq", "CertRequest": CSR, "CertAttrib": "CertificateTemplate:SCXAgent"}
            subprocess.run([*command, "--set", "mode=pending"], cwd=CHECKOUT, check=True)
            assert "Anforderungs-ID: 7." in web.post(url + "certfnsh.asp", data=form, timeout=10).text
            subprocess.run([*command, "--approve", "7"], cwd=CHECKOUT, check=True)
            assert "BEGIN CERTIFICATE" in web.get(url + "certnew.cer?ReqID=7&Enc=b64", timeout=10).text
            assert len(library.load_der_pkcs7_certificates(web.get(url + "certnew.p7b?ReqID=7&Enc=bin", timeout=10).content)) == 4
            rows = subprocess.run([*command, "--rows"], cwd=CHECKOUT, check=True, stdout=subprocess.PIPE).stdout
            assert json.loads(rows)["rows"][0]["state"] == "issued"
            subprocess.run([*command, "--reset", "--set", "deny_page=echo"], cwd=CHECKOUT, check=True)
            assert "locInfo>" in web.post(url + "certfnsh.asp", data=form, timeout=10).text
            slow = {**form, "CertAttrib": "CertificateTemplate:Slow"}
            assert "locInfoReqID" in web.post(url + "certfnsh.asp", data=slow, timeout=10).text
            subprocess.run([*command, "--rebuild", "--trust"], cwd=CHECKOUT, check=True)
            assert "ReqID=1&" in web.post(url + "certfnsh.asp", data=form, timeout=10).text
            assert subprocess.run([*command, "--set", "mod=x"], cwd=CHECKOUT, stderr=subprocess.DEVNULL).returncode == 2
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(10) == 0
    assert not ready.exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--set", "mode=pendig"], "none of 'issue', 'pending', 'deny', 'fail'"),
        (["--set", "mod=x"], "no switch 'mod'; there are: "),
        (["--set", "mode"], "NAME=VALUE expected, not 'mode'"),
        (["--set", "cer_fails=two"], "cer_fails: a number expected, not 'two'"),
        (["--set", "bom=2"], "bom: on or off expected, not '2'"),
        (["--set", "deny_hresult=none "], "deny_hresult: a number expected"),
        (["--set", "mode=deny"], "no CA runs in "),
        (["--approve", "1"], "no CA runs in "),
        (["--approve", "x"], "a request ID expected, not 'x'"),
        (["--deny", "-1"], "argument --deny"),
        (["--port", "70000"], "a port from 0 to 65535 expected"),
        (["--tiers", "4"], "argument --tiers"),
        (["--lifetime", "0"], "a number of seconds above 0 expected, not '0'"),
        (["--ca-lifetime", "nan"], "a number of seconds above 0 expected, not 'nan'"),
        (["--language", "xx"], "argument --language"),
        (["--template", "A:approve"], "'approve' is none of approval, directory, unpublished, no-enroll"),
        (["--template", ":approval"], "it needs a name"),
        (["--appr", "1"], "unrecognized arguments: --appr"),
    ],
    ids=str,
)
def test_a_word_that_does_not_fit_is_one_error_and_status_2(tmp_path, capsys, words, complaint):
    """Whoever tries things mistypes things."""
    with pytest.raises(SystemExit) as end:
        program.main(["--directory", str(tmp_path), *words])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err.splitlines()[-1]
    assert err.count("error: ") == 1


def test_a_directory_that_can_not_be_and_a_port_that_is_taken_are_errors_too(ca, tmp_path, capsys):
    """No traceback for what the machine refuses either."""
    (tmp_path / "file").write_text("")
    for words in (["--directory", str(tmp_path / "file")], ["--directory", str(tmp_path / "new"), "--port", str(ca.port)]):
        with pytest.raises(SystemExit) as end:
            program.main(words)
        assert end.value.code == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_setting_nothing_is_the_default_again(tmp_path):
    """The empty value means something for some switches only; for all of them it leads back."""
    (tmp_path / "ready.json").write_text("{}")
    program.main(["--directory", str(tmp_path), "--set", "mode=deny", "--set", "deny_hresult=80094800", "--set", "bom=yes"])
    wish = json.loads((tmp_path / "switches.json").read_text())
    assert wish == {"mode": "deny", "deny_hresult": 80094800, "bom": True}
    program.main(["--directory", str(tmp_path), "--set", "mode=", "--set", "deny_hresult=0x80094800", "--set", "bom=", "--set", "slow="])
    wish = json.loads((tmp_path / "switches.json").read_text())
    assert wish == {"mode": "issue", "deny_hresult": 0x80094800, "bom": False, "slow": 0.0}
    (tmp_path / "switches.json").write_text("[")
    with pytest.raises(SystemExit):
        program.main(["--directory", str(tmp_path), "--set", "mode="])
    program.main(["--directory", str(tmp_path), "--reset"])
    assert json.loads((tmp_path / "switches.json").read_text()) == {}


def test_templates_are_described_in_one_word():
    """As an operator sets them up."""
    assert program.template("A") == Template("A")
    assert program.template("A:approval:directory") == Template("A", needs_approval=True, names="directory")
    assert program.template("A:unpublished:no-enroll") == Template("A", published=False, enroll=False)
    found = program.parser().parse_args(["--directory", "d", "--template", "A", "--template", "B:approval", "--ca-lifetime", "60"])
    assert [item.name for item in found.template] == ["A", "B"]
    assert found.ca_lifetime == 60 < YEAR
