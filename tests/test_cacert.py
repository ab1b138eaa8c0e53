"""`ca-cert`: the trust that the Management Servers need, from what is known here or from the CA itself."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest

from scx_enroll import verify
from tests.lab.authority import to_pem
from tests.lab.ca import LabCA
from tests.test_behalf import Gateway

pytestmark = pytest.mark.slow


@pytest.fixture(params=[1, 2, 3])
def gateway(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    """PKIs of one, two and three levels."""
    with Gateway(tmp_path, tiers=request.param) as made:
        yield made


def told(text: str) -> List[Tuple[str, str, bytes]]:
    """What was printed: store, file name and certificate of each command."""
    blocks = re.findall(r"for the store (Root|CA): (\S+)\n.*?(-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----)", text, re.DOTALL)
    found = [(store, file, verify.read(pem.encode())[0]) for store, file, pem in blocks]
    assert re.findall(r"^certutil -addstore -f (Root|CA) (\S+)$", text, re.MULTILINE) == [(store, file) for store, file, _ in found]
    return found


def test_root_goes_to_root_and_intermediates_to_ca(gateway: Gateway) -> None:
    """Windows looks for anchors in one store and for the way in the other; the agent sends its leaf alone."""
    assert gateway.submit(gateway.csr()).status == 0
    ran = gateway.command("ca-cert", "--fetch")
    assert ran.returncode == 0, ran.stderr
    found = told(ran.stdout)
    authority = gateway.ca.authority
    assert [der for store, _, der in found if store == "Root"] == list(authority.roots)
    assert {der for store, _, der in found if store == "CA"} == set(authority.chain()) - set(authority.roots)
    assert len({file for _, file, _ in found}) == len(found)
    for _, _, der in found:
        assert hashlib.sha256(der).hexdigest() in ran.stdout
        assert hashlib.sha1(der).hexdigest() in ran.stdout
    assert "NO, not by issuer-trust" not in ran.stdout
    assert gateway.ca.count_post == 1


def test_what_is_known_here_is_printed_without_asking_anybody(tmp_path: Path) -> None:
    """The CA may be down, and what is trusted does not depend on what it says."""
    with Gateway(tmp_path) as gateway:
        intermediate = to_pem([gateway.ca.authority.newest.der])
        with (gateway.etc / "issuer-trust.pem").open("ab") as file:
            file.write(intermediate)
        ran = gateway.command("ca-cert")
        assert [store for store, _, _ in told(ran.stdout)] == ["Root", "CA"]
        assert gateway.ca.count_get == 0
        assert not (gateway.tree / "var").exists(), "a look writes nothing"


def test_what_leads_to_no_trusted_root_is_not_printed_as_trust(tmp_path: Path) -> None:
    """A stray certificate in the file must not be imported on every Management Server."""
    with Gateway(tmp_path) as gateway:
        stray = gateway.ca.authority.stranger().der
        with (gateway.etc / "issuer-trust.pem").open("ab") as file:
            file.write(to_pem([stray, gateway.ca.authority.newest.der]))
        assert stray not in [der for _, _, der in told(gateway.command("ca-cert").stdout)]


def test_an_intermediate_that_is_not_known_yet_is_said(tmp_path: Path) -> None:
    """Importing the root alone would leave servers without the way to it."""
    with Gateway(tmp_path) as gateway:
        ran = gateway.command("ca-cert")
        assert [store for store, _, _ in told(ran.stdout)] == ["Root"]
        assert "ca-cert --fetch" in ran.stdout


def test_one_ca_that_does_not_answer_does_not_hide_the_others(tmp_path: Path) -> None:
    """What can be had is shown; the failure is told, and is the status."""
    with Gateway(tmp_path) as gateway, LabCA(tmp_path / "two", name="Second CA") as second:
        shutil.copy(second.issuer_trust, gateway.etc / "two.pem")
        conf = (gateway.etc / "scx-enroll.conf").read_text().replace("[ca]", "[ca one]")
        (gateway.etc / "scx-enroll.conf").write_text(
            conf + f"[ca two]\nserver = {second.server}\ntemplate = T\nauth = basic\nuser = u\nissuer-trust = /etc/scx-enroll/two.pem\n"
            "password-file = /etc/scx-enroll/password\nserver-trust = /etc/scx-enroll/server-trust.pem\n"
        )
        ran = gateway.command("ca-cert", "--fetch")
        assert ran.returncode == 5
        assert [der for store, _, der in told(ran.stdout) if store == "Root"] == list(gateway.ca.authority.roots)
        assert second.server in ran.stderr


def test_what_the_ca_sends_is_not_trusted_before_a_person_compared_it(tmp_path: Path) -> None:
    """That is how issuer-trust is made; nothing is written anywhere by it."""
    with Gateway(tmp_path) as gateway:
        (gateway.etc / "issuer-trust.pem").unlink()
        ran = gateway.command("ca-cert", "--fetch")
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.count("NO, not by issuer-trust") == 2
        assert "Compare SHA-256" in ran.stdout
        assert not (gateway.etc / "issuer-trust.pem").exists()
        root = next(der for store, _, der in told(ran.stdout) if store == "Root")
        (gateway.etc / "issuer-trust.pem").write_bytes(verify.pem(root))
        assert gateway.submit(gateway.csr()).status == 0


def test_a_chain_that_leads_elsewhere_is_shown_as_not_trusted(tmp_path: Path) -> None:
    """A CA that was installed anew, or somebody in between."""
    with Gateway(tmp_path) as gateway:
        gateway.ca.authority.rebuild()
        ran = gateway.command("ca-cert", "--fetch")
        assert ran.returncode == 0
        assert ran.stdout.count("NO, not by issuer-trust") == 2


@pytest.mark.parametrize("switches", [{"answer": "503"}, {"answer": "login"}, {"unavailable": "all"}, {"auth": "refused"}, {"https": "unknown-ca"}], ids=str)
def test_a_ca_that_does_not_answer_is_one_clear_error(tmp_path: Path, switches: dict) -> None:
    """With its hint, and a refused password is not sent again."""
    with Gateway(tmp_path) as gateway:
        gateway.ca.switches.update(switches)
        for _ in range(2):
            ran = gateway.command("ca-cert", "--fetch")
            assert ran.returncode == (13 if "auth" in switches else 5)
            assert ran.stdout == ""
            assert "hint: " in ran.stderr
        assert gateway.ca.bad_passwords <= 1


def test_each_of_several_cas_is_shown_or_one_alone(tmp_path: Path) -> None:
    """Two PKIs are two roots to import."""
    with Gateway(tmp_path) as gateway, LabCA(tmp_path / "two", name="Second CA") as second:
        shutil.copy(second.issuer_trust, gateway.etc / "two.pem")
        conf = (gateway.etc / "scx-enroll.conf").read_text().replace("[ca]", "[ca one]")
        (gateway.etc / "scx-enroll.conf").write_text(
            conf + f"[ca two]\nserver = {second.server}\ntemplate = T\nauth = basic\nuser = u\nissuer-trust = /etc/scx-enroll/two.pem\n"
        )
        assert [der for _, _, der in told(gateway.command("ca-cert").stdout)] == [*gateway.ca.authority.roots, *second.authority.roots]
        assert [der for _, _, der in told(gateway.command("ca-cert", "--ca", "two").stdout)] == list(second.authority.roots)
        assert gateway.command("ca-cert", "--ca", "three").returncode == 2


def test_the_same_as_json(tmp_path: Path) -> None:
    """For whoever rolls trust out by a script."""
    with Gateway(tmp_path) as gateway:
        listed = json.loads(gateway.command("ca-cert", "--fetch", "--json").stdout)
        assert [one["store"] for one in listed] == ["Root", "CA"]
        assert all(one["trusted"] for one in listed)
        assert [verify.read(one["pem"].encode())[0] for one in listed] == [*gateway.ca.authority.roots, gateway.ca.authority.newest.der]


def test_openssl_reads_each_block_of_the_output(tmp_path: Path) -> None:
    """The text around is no obstacle: the whole output is a PEM file, too."""
    with Gateway(tmp_path) as gateway:
        text = gateway.command("ca-cert", "--fetch").stdout
        ran = subprocess.run(["openssl", "crl2pkcs7", "-nocrl", "-certfile", "/dev/stdin"], input=text, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert len(verify.read(ran.stdout.encode())) == 2
