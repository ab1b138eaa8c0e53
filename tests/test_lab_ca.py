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
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs7 as library
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.lab.authority import DAY, WRONG, Authority, Switches, Template, not_after, not_before, pkcs7, to_der
from tests.lab.ca import LabCA

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
    found = re.search(rf"<p id=[\"']?{name}[\"']?>(.*?)</p>", page, re.IGNORECASE | re.DOTALL)
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


@pytest.mark.parametrize("language", ["en", "de", "fr", "zh"])
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
    assert ca.authority.issued == 1


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


def test_switches_refuse_unknown_names_and_wrong_kinds():
    """A misspelt switch would be a test of nothing."""
    switches = Switches()
    with pytest.raises(KeyError):
        switches.update({"mod": "pending"})
    with pytest.raises(TypeError):
        switches.update({"cer_fails": "2"})
    switches.update({"slow": 1})
    assert switches.values()["slow"] == 1


# the program


@pytest.mark.slow
def test_the_program_serves_and_is_steered_from_another_process(tmp_path):
    """The demo runs the CA as a process of its own."""
    command = [sys.executable, "-m", "tests.lab.ca", "--directory", str(tmp_path)]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL) as server, requests.Session() as web:
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
            assert "locInfoReqID" in web.post(url + "certfnsh.asp", data=form, timeout=10).text
            subprocess.run([*command, "--approve", "1"], cwd=CHECKOUT, check=True)
            assert "BEGIN CERTIFICATE" in web.get(url + "certnew.cer?ReqID=1&Enc=b64", timeout=10).text
            rows = subprocess.run([*command, "--rows"], cwd=CHECKOUT, check=True, stdout=subprocess.PIPE).stdout
            assert json.loads(rows)["rows"][0]["state"] == "issued"
            subprocess.run([*command, "--reset", "--set", "deny_page=echo"], cwd=CHECKOUT, check=True)
            assert "locInfo>" in web.post(url + "certfnsh.asp", data=form, timeout=10).text
            assert subprocess.run([*command, "--set", "mod=x"], cwd=CHECKOUT, stderr=subprocess.DEVNULL).returncode
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(10) == 0
    assert not ready.exists()
