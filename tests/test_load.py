"""`make load`: many hosts at one CA at once, with fewer of them, since a test machine does other things too."""

import json
import subprocess
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from tests.lab.agent import LabHost
from tests.lab.ca import LabCA
from tests.load import Pass, examine

HOSTS = 40


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_many_hosts_at_once_lose_a_request_or_ask_twice():
    """Every host ends with one certificate of its own; a CA that behaves gets one POST from each, one that loses answers few more."""
    done = subprocess.run(
        (sys.executable, "-I", "-m", "tests.load", "--hosts", str(HOSTS), "--json"), capture_output=True, text=True, cwd="/", timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    good, bad = map(json.loads, done.stdout.splitlines())
    assert good["statuses"] == [{"0": HOSTS}]
    assert good["posts"] == good["issued"] == HOSTS
    assert good["dropped"] == good["refused"] == 0
    assert bad["dropped"] and bad["refused"], "the CA answered everything"
    assert len(bad["statuses"]) > 1, "no host had to run again"
    assert bad["issued"] <= HOSTS + bad["dropped"]
    assert good["problems"] == bad["problems"] == []


def test_a_lost_request_or_a_duplicate_is_not_seen(tmp_path):
    """What the load test looks for, it finds: a host without a certificate, a second one, one for a key that nobody has."""
    key = "ec:secp256r1"
    with LabCA(tmp_path / "ca") as ca, LabHost(tmp_path / "a", port=1270, key=key) as one, LabHost(tmp_path / "b", port=1270, key=key) as other:
        for host in (one, other):
            with open(f"{host.root}.out", "w", encoding="utf-8") as file:
                file.write("what it said")
        private = serialization.load_pem_private_key(one.read(one.key), None)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one.fqdn)])
        csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(private, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        for _ in range(2):
            assert ca.authority.submit(csr, "SCXAgent", ca.user, {}).certificate
        found = Pass("", 2)
        examine((one, other), ca, found, 1)
        examine((other,), ca, found, 2)
    assert found.problems == [
        f"lost: {one.fqdn} holds 0 certificates; what it said",
        f"duplicate: 2 certificates were issued for {one.fqdn}",
        f"lost: {other.fqdn} holds 0 certificates; what it said",
        f"lost: {other.fqdn} holds 0 certificates; what it said",
        "the CA issued for 1 keys that no host has",
    ]
