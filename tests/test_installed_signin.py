"""The built deb signs in on machines of every Debian release: their own Kerberos and Python, in the sandbox of the installed unit.

The CA insists on channel bindings, as a hardened server does; nothing but the release's packages and ours is there.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from tests import packages
from tests.joined import UNBOUND
from tests.lab import kdc as realms
from tests.lab import machine as machines
from tests.lab import roots
from tests.lab.kdc import Kdc
from tests.lab.machine import CA, Image, Machine
from tests.test_installed import SERVICE, facts, hurry, is_enrolled, issued

pytestmark = [pytest.mark.slow, pytest.mark.kdc, pytest.mark.timeout(600)]

NEWEST = "trixie"
PACKAGE = "/srv/scx-enroll.deb"
KEYTAB = "/etc/krb5.keytab"
EC = "ec:secp256r1"

# All that may change on a host that is enrolled: state, report and lock; the agent's folder; what systemd and the agent write themselves.
OURS = re.compile(
    r"/(?:var/lib/scx-enroll|run|proc|sys|dev)(?:/.*)?|/etc/opt/omi/ssl(?:/.*)?|/var/opt/omi(?:/.*)?|/var/log/.*|/var/lib/systemd(?:/.*)?|/lab(?:/.*)?"
)
CHANGED = r"find / -xdev \( -path /proc -o -path /sys -o -path /run \) -prune -o -newer /srv/before \( -type f -o -type l -o -type p -o -type s \) -print; find /tmp /var/tmp -type f"


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    """These tests need a machine that can have containers, and a KDC."""
    lacks = machines.missing() or realms.missing()
    if lacks:
        missing = f"this machine lacks {lacks}"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    packages.need("dpkg-deb")


@contextmanager
def installed(suite: str, tmp_path: Path) -> Iterator[Machine]:
    """A machine of this release with the package; it is off, so that it can be prepared."""
    with Image(suite, tmp_path / "image") as image:
        image.copy(packages.current().deb, PACKAGE)
        image.run("dpkg", "-i", PACKAGE)
        image.install_agent(key=EC)
        machine = Machine(image, "host1")
        try:
            yield machine
        finally:
            machine.close()


def configure(tree: machines.Tree, fqdn: str, ca: CA, *more: str) -> None:
    """Do what the operator does where nothing is said about the sign-in: name the CA, its template and the roots."""
    tree.copy(ca.server_trust, "/etc/scx-enroll/https.pem")
    tree.copy(ca.issuer_trust, "/etc/scx-enroll/ca.pem")
    text = f"[host]\nname = {fqdn}\n[agent]\nsettle = 0s\n[ca]\nserver = {ca.server}\ntemplate = SCXAgent\nserver-trust = /etc/scx-enroll/https.pem\n"
    tree.write("/etc/scx-enroll/conf.d/site.conf", text + "".join(f"{line}\n" for line in more))


def unbound(machine: Machine, ca: CA, keytab: str = KEYTAB) -> str:
    """What the server says to a client that binds nothing."""
    order = {"server": ca.server, "trust": "/etc/scx-enroll/https.pem", "account": "HOST1$", "keytab": keytab, "config": "/etc/krb5.conf"}
    return machine.run("python3", "-I", "-c", UNBOUND, input=json.dumps(order) + "\n").stdout.strip()


def ours(ca: CA) -> List[Dict[str, Any]]:
    """The program's requests."""
    return [seen for seen in ca.requests if seen["agent"] != "unbound"]


def assert_signed_in_well(ca: CA, kdc: Kdc) -> None:
    """Each of the program's requests but the first, which asks what is offered, was signed in by Kerberos, bound, not delegated, proved; one POST."""
    seen = ours(ca)
    assert [(one["method"], one["status"]) for one in seen if one["method"] == "POST"] == [("POST", 200)]
    for one in seen:
        if one["scheme"]:
            assert (one["scheme"], one["account"], one["bound"], one["delegated"], one["mutual"]) == ("Negotiate", "HOST1$@LAB.TEST", True, False, True), one
        else:
            assert (one["method"], one["status"]) == ("GET", 401), one
    assert (issued(ca), ca.posts, kdc.failures) == (1, 1, 0)


@pytest.mark.parametrize("suite", roots.SUITES)
def test_a_release_that_can_not_sign_in_bound_or_leaves_files(suite: str, tmp_path: Path) -> None:
    """With nothing said about the sign-in, the unit of the release enrolls the host at a server that refuses whoever binds nothing."""
    with installed(suite, tmp_path) as machine:
        machine.boot()
        kdc = machine.kdc(tmp_path / "kdc")
        with machine.ca(tmp_path / "ca", kdc=kdc) as ca:
            configure(machine, machine.fqdn, ca)
            machine.agent("start")
            machine.wait_for(machine.served)
            assert unbound(machine, ca) == "401"
            assert ca.requests[-1]["reason"] == "the client sent no channel bindings"
            before = machine.served()
            machine.run("touch", "/srv/before")
            machine.run("systemctl", "start", SERVICE, check=False)
            assert is_enrolled(machine), machine.journal(SERVICE)
            assert machine.served() != before
            assert_signed_in_well(ca, kdc)
            changed = machine.shell(CHANGED).stdout.split("\n")
            assert [path for path in changed if path and not OURS.fullmatch(path)] == []
            said = machine.run("scx-enroll", "check").stdout
            assert re.search(r": signed in\n  offers +Negotiate\n  used +kerberos, as HOST1\$@LAB\.TEST\n  binding +tls-server-end-point, sha256\n", said)


@pytest.mark.parametrize(("suite", "how"), [("bullseye", "cp"), ("trixie", "mv")])
def test_a_domain_join_after_the_first_boot_is_missed_or_fails_the_boot(suite: str, how: str, tmp_path: Path) -> None:
    """Without a keytab nothing is failed and nobody is called; once it is there, in place or renamed, the host is enrolled without help."""
    with installed(suite, tmp_path) as machine:
        machine.boot()
        kdc = machine.kdc(tmp_path / "kdc", keytab="/srv/krb5.keytab")
        with machine.ca(tmp_path / "ca", kdc=kdc) as ca:
            configure(machine, machine.fqdn, ca)
            assert unbound(machine, ca, "/srv/krb5.keytab") == "401"
            hurry(machine)  # not before: what was looked at and told by then is not told again
            machine.reboot()
            machine.wait_for(lambda: facts(machine)["exit_status"] == 13, what="the first look found no keytab")
            machine.wait_for(lambda: machine.unit(SERVICE, "ActiveState") == "inactive", what="the run has ended")
            said = machine.journal(SERVICE)
            assert said.count("there is no keytab: /etc/krb5.keytab does not exist") == 1
            assert "adcli join, realm join" in said
            assert machine.run("systemctl", "is-system-running").stdout == "running\n"
            assert ours(ca) == []
            machine.run(how, "/srv/krb5.keytab", "/etc/krb5.keytab")
            machine.wait_for(lambda: is_enrolled(machine), what="the host is enrolled")
            machine.wait_for(lambda: machine.unit(SERVICE, "ActiveState") == "inactive", what="the run has ended")
            assert_signed_in_well(ca, kdc)
            assert machine.run("systemctl", "--failed", "--no-legend").stdout == ""


def test_a_renewal_by_the_timer_that_ntlm_does_not_sign_in(tmp_path: Path) -> None:
    """The release's requests_ntlm, a password that only systemd hands over, and a certificate that lives for half a minute: nobody does anything."""
    with installed("bookworm", tmp_path) as machine:
        machine.boot()
        kdc = machine.kdc(tmp_path / "kdc")
        with machine.ca(tmp_path / "ca", "--lifetime", "40", kdc=kdc) as ca:
            configure(machine, machine.fqdn, ca, "auth = ntlm", f"user = {ca.user}")
            assert unbound(machine, ca) == "401"
            ca.steer("--set", "auth=ntlm")
            machine.agent("start")
            machine.write("/srv/secrets/password", ca.password + "\n", 0o600)
            machine.write("/etc/systemd/system/scx-enroll.service.d/credential.conf", "[Service]\nLoadCredential=password:/srv/secrets/password\n")
            machine.run("systemctl", "daemon-reload")
            machine.run("systemctl", "start", SERVICE, check=False)
            assert is_enrolled(machine), machine.journal(SERVICE)
            first = machine.served()
            machine.wait_for(lambda: machine.served() not in ("", first), timeout=60, what="it was renewed")
            machine.wait_for(lambda: is_enrolled(machine), what="what is served is installed")
            assert issued(ca) == ca.posts >= 2
            signed = [seen for seen in ours(ca) if seen["authenticated"]]
            assert {(seen["account"], seen["bound"]) for seen in signed} == {(ca.user, True)}
            assert all(seen["authenticated"] for seen in ours(ca) if seen["method"] == "POST")
            assert machine.run("systemctl", "--failed", "--no-legend").stdout == ""
            assert machine.run("test", "-e", "/etc/scx-enroll/password", check=False).returncode == 1
            assert ca.password not in machine.journal(SERVICE)
