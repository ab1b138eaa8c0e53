"""Kerberos as others have written it: a domain of Samba's with adcli, Apache's mod_auth_gssapi; and the numbers by which libkrb5 tells causes apart."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.joined import Joined, Program
from tests.lab import apache as apache_lab
from tests.lab import domain as domain_lab
from tests.lab import kdc as kdc_lab
from tests.lab.apache import Apache
from tests.lab.domain import Domain
from tests.lab.kdc import PYTHON, Kdc
from tests.lab.machine import wait_for

pytestmark = pytest.mark.slow

FORMS = ("spnego", "krb5", "by hand")  # libgssapi's SPNEGO; Kerberos bare; Kerberos in SPNEGO of the client's own making
# libkrb5's, signed
NO_CREDENTIALS, STALE, UNKNOWN_CLIENT, REVOKED, UNKNOWN_SERVER = -1765328189, -1765328360, -1765328378, -1765328366, -1765328377
FILES = ("/etc/hosts", "/etc/resolv.conf", "/etc/krb5.conf", "/etc/krb5.keytab")
FOLDERS = ("/etc/samba", "/run/samba", "/var/lib/samba", "/var/lib/samba/private", "/var/cache/samba", "/var/log/samba")

# One GET, and what came of it, in JSON; or the call that failed, with its number. The distribution's own libraries.
CLIENT = r"""
import base64, hashlib, json, re, sys
import gssapi, requests
from gssapi.raw import ChannelBindings
from urllib.parse import urlsplit

SPNEGO, KRB5 = (gssapi.OID.from_int_seq(text) for text in ("1.3.6.1.5.5.2", "1.2.840.113554.1.2.2"))

def tlv(tag, *parts):
    body = b"".join(parts)
    size = len(body).to_bytes(2, "big")
    return bytes([tag]) + (size[1:] if len(body) < 128 else b"\x82" + size) + body

def wrapped(token):
    mechs = tlv(0xA0, tlv(0x30, tlv(6, bytes.fromhex("2a864886f712010202"))))
    return tlv(0x60, tlv(6, bytes.fromhex("2b0601050502")), tlv(0xA0, tlv(0x30, mechs, tlv(0xA2, tlv(4, token)))))

def parts(der):
    while der:
        head, size = 2, der[1]
        if size & 0x80:
            head += size & 0x7F
            size = int.from_bytes(der[2:head], "big")
        yield der[0], der[head:head + size]
        der = der[head + size:]

def unwrapped(answer):
    [(_, sequence)] = parts(answer)
    [(_, body)] = parts(sequence)
    found = {tag: next(parts(value))[1] for tag, value in parts(body)}
    said["state"], said["signed"] = found.get(0xA0, b"\xff")[0], 0xA3 in found
    return found.get(0xA2, b"")

order, said = json.load(sys.stdin), {}
form, call = order["form"], "acquire"
try:
    name = gssapi.Name(order["account"], gssapi.NameType.kerberos_principal)
    # without a mech it is tried once for each, and a wrong key is counted twice; but SPNEGO takes no credentials of Kerberos alone
    credentials = gssapi.Credentials(name=name, usage="initiate", mechs=None if form == "spnego" else [KRB5], store={"client_keytab": "FILE:" + order["keytab"], "ccache": "MEMORY:client"})
    with requests.Session() as session:
        session.trust_env, session.verify = False, order["trust"]
        first = session.get(order["url"], stream=True)
        der = first.raw._connection.sock.getpeercert(True)
        said["first"] = first.status_code
        first.content
        bound = ChannelBindings(application_data=b"tls-server-end-point:" + hashlib.sha256(der).digest())
        service = order["service"] or "HTTP@" + urlsplit(order["url"]).hostname
        context = gssapi.SecurityContext(name=gssapi.Name(service, gssapi.NameType.hostbased_service), creds=credentials,
            mech=SPNEGO if form == "spnego" else KRB5, usage="initiate", flags=[gssapi.RequirementFlag.mutual_authentication],
            channel_bindings=bound if order["bindings"] else None)
        call = "first step"
        token = context.step()
        token = wrapped(token) if form == "by hand" else token
        answer = session.get(order["url"], headers={"Authorization": "Negotiate " + base64.b64encode(token).decode()})
        said.update(status=answer.status_code, user=answer.headers.get("X-User", ""), text=answer.text)
        back = re.search(r"(?i)negotiate\s+([\w+/=]+)", answer.headers.get("WWW-Authenticate", ""))
        call = "second step"
        if back:
            back = base64.b64decode(back[1])
            context.step(unwrapped(back) if form == "by hand" else back)
        said["proved"] = bool(back) and context.complete
except gssapi.exceptions.GSSError as error:
    number = error.min_code & 0xFFFFFFFF
    said.update(call=call, number=number - (1 << 32 if number >> 31 else 0), why=str(error))
print(json.dumps(said))
"""


def lacking(missing):
    """What this machine can't do is left out, but not under CI."""
    if missing:
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)


@pytest.fixture(scope="module")
def able():
    """There can be a domain, and clients of it."""
    lacking(domain_lab.missing() or ("" if kdc_lab.has("gssapi") and kdc_lab.has("requests") else "python3-gssapi, python3-requests"))


@pytest.fixture(scope="module")
def before(able):
    """What a domain must not change, as it was."""
    return outside()


@pytest.fixture(scope="module")
def domain(before, tmp_path_factory):
    with Domain(tmp_path_factory.mktemp("domain") / "domain") as made:
        yield made


@pytest.fixture(scope="module")
def host(domain):
    """The keytab of HOST1$, as adcli made it."""
    return domain.join("host1.ad.test", "HOST1")


@pytest.fixture(scope="module")
def ca(domain, tmp_path_factory):
    """The lab's CA at ca1.ad.test, which insists on bindings."""
    with domain.ca(tmp_path_factory.mktemp("ca"), domain.service("CA1", "HTTP/ca1.ad.test")) as made:
        yield made


@pytest.fixture
def ask(domain, ca):
    """Have a client inside the domain ask its CA; by default as HOST1$, bound, in SPNEGO."""

    def carry_out(keytab, account="HOST1$", form="spnego", *, bindings=True, service="", env=None):
        order = {
            "url": f"https://{ca.server}/certsrv/", "trust": ca.server_trust, "keytab": keytab, "account": account, "form": form,
            "bindings": bindings, "service": service,
        }  # fmt: skip
        return json.loads(domain.run(PYTHON, "-I", "-c", CLIENT, input=json.dumps(order), env=env).stdout)

    return carry_out


@pytest.fixture(scope="module")
def realm(tmp_path_factory):
    """MIT's KDC."""
    lacking(kdc_lab.missing())
    with Kdc(tmp_path_factory.mktemp("kdc")) as kdc:
        kdc.add("HOST1$", "HTTP/localhost")
        yield kdc


@pytest.fixture(scope="module")
def apache(realm, tmp_path_factory):
    lacking(apache_lab.missing())
    folder = tmp_path_factory.mktemp("apache")
    with Apache(folder / "apache", realm.keytab(folder / "http.keytab", "HTTP/localhost"), realm.config) as made:
        yield made


@pytest.fixture
def visit(apache, realm, tmp_path):
    """Have a client ask Apache for a page, as HOST1$."""

    def carry_out(page="certcarc.asp", account="HOST1$", form="spnego", *, bindings=True, service="", keytab=""):
        keytab = keytab or realm.keytab(tmp_path / "host.keytab", account)
        order = {
            "url": apache.url + page, "trust": apache.server_trust, "keytab": keytab, "account": account, "form": form,
            "bindings": bindings, "service": service,
        }  # fmt: skip
        words = [PYTHON, "-I", "-c", CLIENT]
        done = subprocess.run(
            words, input=json.dumps(order), stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **realm.environment}
        )
        return json.loads(done.stdout)

    return carry_out


def outside():
    """Names and times of what a controller of this machine's own would change."""
    found = {}
    for name in FILES:
        with contextlib.suppress(OSError):
            found[name] = os.stat(name).st_mtime_ns
    for folder in FOLDERS:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            found[folder] = sorted((entry.name, entry.stat(follow_symlinks=False).st_mtime_ns) for entry in entries)
    return found


# Samba's domain


@pytest.mark.parametrize("form", FORMS)
def test_the_keytab_of_adclis_join_signs_in(ask, host, ca, form):
    """What an operator has after joining the domain is all that a host needs; with each form of a token the server sees who, and bound."""
    said = ask(host, form=form)
    assert said["first"] == 401
    assert (said["status"], said["proved"]) == (200, True)
    seen = ca.requests[-1]
    assert (seen["account"], seen["bound"]) == ("HOST1$@AD.TEST", True)


@pytest.mark.parametrize("form", FORMS)
def test_a_client_without_bindings_is_refused_in_a_domain(ask, host, form):
    """A hardened server lets in no ticket that isn't bound to its certificate, however good it is."""
    said = ask(host, form=form, bindings=False)
    assert (said["status"], said["proved"]) == (401, False)


def test_a_domain_names_what_is_wrong_with_an_account(domain, ask):
    """Disabled, stale and deleted are different work for the operator: each has its number, in any language; who proves no key learns no more."""
    keytab = domain.join("host2.ad.test", "HOST2")
    assert ask(keytab, "HOST2$")["status"] == 200
    for change, number in ((domain.disable, REVOKED), (domain.reset_password, STALE), (domain.delete, UNKNOWN_CLIENT)):
        change("HOST2")
        said = ask(keytab, "HOST2$")
        assert (change.__name__, said["call"], said["number"]) == (change.__name__, "acquire", number)


@pytest.mark.parametrize("account", ["host/host1.ad.test", "RestrictedKrbHost/HOST1"])
def test_a_service_name_in_the_keytab_is_no_client(ask, host, account):
    """Most entries of a joined host's keytab are no accounts: who takes the first that looks like a host can't sign in."""
    said = ask(host, account)
    assert (said["call"], said["number"]) == ("acquire", UNKNOWN_CLIENT)


@pytest.mark.parametrize("account", ["HOST3$", "host1$", "HOST1$@OTHER.TEST"])
def test_an_account_that_the_keytab_lacks_is_told_like_no_keytab(ask, host, account):
    """The library says the same for all of them, so whoever wants to help looks into the keytab himself; case counts."""
    for said in (ask(host, account), ask("/nonexistent", "HOST1$")):
        assert (said["call"], said["number"]) == ("acquire", NO_CREDENTIALS)


def test_an_alias_of_the_ca_needs_canonical_names(domain, ask, host):
    """A URL with the CA's alias is the usual reason for an unknown service: it works only where the library may ask for the canonical name."""
    said = ask(host, form="krb5", service="HTTP@ca.ad.test")
    assert (said["call"], said["number"]) == ("first step", UNKNOWN_SERVER)
    with open(domain.config, encoding="utf-8") as file:
        text = file.read()
    path = domain.folder / "canonical.conf"
    path.write_text(text.replace("dns_canonicalize_hostname = false", "dns_canonicalize_hostname = fallback"), encoding="utf-8")
    assert ask(host, form="krb5", service="HTTP@ca.ad.test", env={"KRB5_CONFIG": str(path)})["status"] == 200


def test_spnego_hides_the_number_of_what_failed(ask, host):
    """Behind libgssapi's SPNEGO numbers are made up from call to call: who tells causes apart by them must make the token without it."""
    numbers = {form: ask(host, form=form, service="HTTP@nobody.ad.test")["number"] for form in FORMS}
    assert numbers["krb5"] == numbers["by hand"] == UNKNOWN_SERVER
    assert 100000 < numbers["spnego"] < 101000


def test_a_domain_changes_nothing_outside_and_bears_another_beside_it(before, domain, host, tmp_path):
    """Tests run beside each other, on machines that may be members of a real domain."""
    with Domain(tmp_path / "second") as second:
        for folder in ("/etc", "/run"):
            assert second.run("stat", "-c", "%d", folder).stdout != domain.run("stat", "-c", "%d", folder).stdout
        assert "not found in Kerberos database" in second.run("kinit", "-k", "-t", host, "HOST1$", check=False).stderr
        domain.run("kinit", "-k", "-t", host, "HOST1$")
    assert outside() == before


def test_a_domain_and_an_apache_end_with_the_process_that_made_them(able, realm, tmp_path):
    """A test run that is killed leaves no controller, no mounts, no server at a port."""
    lacking(apache_lab.missing())
    http = realm.keytab(tmp_path / "http.keytab", "HTTP/localhost")
    script = (
        "import sys, time; from tests.lab.apache import Apache; from tests.lab.domain import Domain\n"
        f"with Domain({str(tmp_path / 'domain')!r}) as domain, Apache({str(tmp_path / 'apache')!r}, {http!r}, {realm.config!r}) as apache:\n"
        "    domain.spawn('sleep', '1000'); print(apache.port, flush=True); time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-I", "-c", script], stdout=subprocess.PIPE, text=True) as maker:
        try:
            assert maker.stdout.readline()
            for name in ("samba", "apache2", "sleep"):
                wait_for(lambda name=name: any(line.startswith(name) for line in mentioning(tmp_path)), what=f"{name} runs")
        finally:
            maker.kill()
    wait_for(lambda: not mentioning(tmp_path), what="nothing is left")


def mentioning(folder):
    """The processes with this folder in their environment, arguments or mounts."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            texts = []
            for name in ("environ", "cmdline", "mountinfo"):
                with open(f"/proc/{pid}/{name}", encoding="utf-8", errors="replace") as file:
                    texts.append(file.read())
            if str(folder) in "".join(texts) and int(pid) != os.getpid():
                found.append(texts[1])
    return found


@pytest.fixture(scope="module")
def program(able, tmp_path_factory):
    """The program as the deb installs it."""
    return Program(tmp_path_factory.mktemp("program"))


def test_the_program_enrolls_with_the_keytab_of_adclis_join(domain, host, ca, program, tmp_path):
    """Joined as operators join, nothing else configured: bound, as the computer account, and the request posted once."""
    joined = Joined(tmp_path / "host1", program, [ca], {"KRB5_CONFIG": str(domain.config)})
    try:
        shutil.copy(host, joined.keytab)
        facts = joined.check(before=domain.words())
        assert (facts["account"], facts["error"]) == ("HOST1$@AD.TEST", None)
        assert facts["binding"].startswith("tls-server-end-point")
        ended = joined.run("run", before=domain.words())
        assert (ended.returncode, "installed generation" in ended.stdout) == (0, True), ended.stderr
        seen = [one for one in ca.requests if one["method"] == "POST"]
        assert [(one["account"], one["bound"], one["delegated"], one["status"]) for one in seen] == [("HOST1$@AD.TEST", True, False, 200)]
        # with the krb5.conf that adcli leaves where there was none: DNS alone
        plain = tmp_path / "krb5.conf"
        plain.write_text("[libdefaults]\n", encoding="ascii")
        assert joined.check(before=domain.words(env={"KRB5_CONFIG": str(plain)}))["error"] is None
    finally:
        joined.close()


def test_the_program_tells_apart_what_a_domain_refuses(domain, ca, program, tmp_path):
    """Disabled, stale, deleted: each with its cause and cure, by Samba's own answers."""
    joined = Joined(tmp_path / "host4", program, [ca], {"KRB5_CONFIG": str(domain.config)})
    try:
        shutil.copy(domain.join("host4.ad.test", "HOST4"), joined.keytab)
        for change, words, hint in (
            (domain.disable, "is disabled, locked or expired", "Enable-ADAccount"),
            (domain.reset_password, "is out of date", "adcli update"),
            (domain.delete, "AD.TEST has no account HOST4$@AD.TEST", "join the host again"),
        ):
            change("HOST4")
            facts = joined.check(before=domain.words())
            assert (facts["exit_status"], words in facts["error"], hint in facts["hint"]) == (13, True, True), facts
            (joined.root / "var/lib/scx-enroll/budget.json").unlink(missing_ok=True)  # so that it asks again
    finally:
        joined.close()


# Apache's Negotiate, and MIT's KDC


@pytest.mark.parametrize("form", FORMS)
def test_apache_takes_each_form_and_proves_itself(visit, form):
    """A server that shares no line with the lab's takes bare Kerberos and both kinds of SPNEGO, and its proof is found good."""
    said = visit(form=form)
    assert (said["first"], said["status"], said["user"], said["proved"]) == (401, 200, "HOST1$@LAB.TEST", True)
    assert "nRenewals=0" in said["text"]
    if form == "by hand":
        assert (said["state"], said["signed"]) == (0, False)


def test_the_program_signs_in_to_apache(apache, realm, program, tmp_path):
    """Its tokens are read, and the proof that it demands is made, by a server that was written by others."""
    joined = Joined(tmp_path / "host1", program, [apache], realm.environment)
    try:
        realm.keytab(joined.keytab, "HOST1$")
        facts = joined.check()
        assert (facts["offered"], facts["account"], facts["error"]) == (["Negotiate"], "HOST1$@LAB.TEST", None)
    finally:
        joined.close()


def test_apache_lets_in_whoever_is_not_bound(visit):
    """It is no judge of bindings: what it takes may still be refused by a server that insists."""
    assert visit(bindings=False)["status"] == 200


def test_apache_has_the_cas_certificates(visit):
    """What a client reads before it asks for a certificate is there, behind the sign-in."""
    for page in ("certnew.cer?ReqID=CACert&Renewal=0&Enc=b64", "certnew.p7b?ReqID=CACert&Renewal=0&Enc=b64"):
        said = visit(page)
        assert (said["first"], said["status"]) == (401, 200)
        assert said["text"].startswith("-----BEGIN CERTIFICATE-----")


@pytest.mark.parametrize("form", FORMS)
def test_apache_refuses_a_ticket_for_an_older_key(visit, apache, realm, tmp_path, form):
    """A service whose keytab fell behind is a 401 after a good sign-in; the client has nothing to change."""
    realm.change_key("HTTP/localhost")
    try:
        said = visit(form=form)
        assert said["status"] == 401
        assert not said.get("proved")
    finally:
        apache.use_keytab(realm.keytab(tmp_path / "http.keytab", "HTTP/localhost"))
    assert visit(form=form)["status"] == 200


@pytest.mark.parametrize(
    ("cause", "number"),
    [("change_key", STALE), ("disable", REVOKED), ("delete", UNKNOWN_CLIENT), ("expire_password", -1765328361), ("expire", -1765328383)],
)
def test_mits_kdc_names_causes_by_the_same_numbers(visit, realm, tmp_path, cause, number):
    """A number that one KDC alone used would be no way to tell a cause; and a failed sign-in is one at the KDC too, which counts them."""
    account = f"{cause.upper()}$"
    realm.add(account)
    keytab = realm.keytab(tmp_path / "account.keytab", account)
    getattr(realm, cause)(account)
    failures = realm.failures
    said = visit(account=account, form="krb5", keytab=keytab)
    assert (said["call"], said["number"]) == ("acquire", number)
    assert realm.failures - failures == (cause == "change_key")
