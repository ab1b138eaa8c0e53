"""Who we are to the web server: where the password comes from, what is refused, and that it is shown nowhere."""

import base64
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scx_enroll import signin
from scx_enroll.config import CA
from scx_enroll.errors import ConfigError
from scx_enroll.rootfs import Root

BASIC = CA(server="ca.example", auth="basic", user="CORP\\svc")


@pytest.fixture
def write(tmp_path):
    def write(data, path="etc/scx-enroll/password", mode=0o600):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        file.chmod(mode)
        return str(file)

    return write


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    return Root(str(tmp_path))


def sent(root, ca=BASIC):
    """What stands in the Authorization header."""
    scheme, _, token = signin.authentication(root, ca).authorization(b"").partition(" ")
    assert scheme == "Basic"
    return base64.b64decode(token)


@pytest.mark.parametrize("password", ["plain", "pässwörd €", "with : colon", "  blanks  ", "密码"])
def test_a_password_outside_latin_1_goes_out_as_utf_8(root, write, password):
    """requests encodes text as Latin-1: a euro sign would be a crash, and an umlaut a refused sign-in."""
    write(f"{password}\n".encode())
    assert sent(root) == f"CORP\\svc:{password}".encode()


def test_one_newline_is_stripped_and_no_more(root, write):
    """Editors add one newline; a second one means that the file is not what it should be."""
    write(b"secret")
    assert sent(root).endswith(b":secret")
    write(b"secret\n\n")
    with pytest.raises(ConfigError, match="more than one line"):
        signin.authentication(root, BASIC)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"secret\nsecond", "more than one line"),
        (b"secret\r\n", "more than one line"),
        (b"sec\0ret", "NUL"),
        (b"\xef\xbb\xbfsecret", "byte order mark"),
        (b"secret\xff", "not UTF-8"),
        (b"secret" * 1000, "longer than"),
    ],
)
def test_a_password_file_that_can_not_be_meant(root, write, data, problem):
    """A wrong password locks the account: what can't be one is refused before it is sent, and not shown."""
    write(data)
    with pytest.raises(ConfigError, match=problem) as failure:
        signin.authentication(root, BASIC)
    assert failure.value.hint
    assert "secret" not in failure.value.message + failure.value.hint


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_password_file_that_others_can_read(root, write, mode):
    """The message is the command that mends it."""
    write(b"secret", mode=mode)
    with pytest.raises(ConfigError, match="open to others") as failure:
        signin.authentication(root, BASIC)
    assert failure.value.hint.startswith("chmod 600 ")


def test_no_password_anywhere(root):
    """The message names the file to make, not a traceback."""
    with pytest.raises(ConfigError, match="/etc/scx-enroll/password does not exist"):
        signin.authentication(root, BASIC)
    with pytest.raises(ConfigError, match="/etc/other does not exist"):
        signin.authentication(root, CA(auth="basic", user="u", password_file="/etc/other"))


def test_a_configured_password_file_that_is_missing_is_not_replaced_by_the_default(root, write):
    """Another CA's password must not be sent because of a typing error."""
    write(b"secret")
    with pytest.raises(ConfigError, match="/etc/other does not exist"):
        signin.authentication(root, CA(auth="basic", user="u", password_file="/etc/other"))


def test_a_systemd_credential_comes_first_and_the_labelled_one_before_all(tmp_path, write, monkeypatch):
    """LoadCredential= is how a unit hands a secret over; with several CAs each has its own."""
    write(b"file")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    live = Root(str(tmp_path), live=True)
    assert sent(live).endswith(b":file")
    write(b"common", "credentials/password", 0o400)
    assert sent(live).endswith(b":common")
    labelled = CA(label="north", auth="basic", user="u")
    assert sent(live, labelled).endswith(b":common")
    write(b"north", "credentials/password-north", 0o400)
    assert sent(live, labelled).endswith(b":north")
    assert sent(live).endswith(b":common")


def test_a_credential_of_the_building_host_is_not_used_for_an_image(tmp_path, write, monkeypatch):
    """With --root the tree is another machine's: the builder's secrets are not its."""
    write(b"file")
    write(b"builder", "credentials/password", 0o400)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    assert sent(Root(str(tmp_path))).endswith(b":file")


@pytest.mark.parametrize("user", ["", "corp:svc"])
def test_a_user_that_basic_can_not_carry(root, write, user):
    """certsrv would send "None:None", and a colon would move a part of the name into the password."""
    write(b"secret")
    with pytest.raises(ConfigError, match="user"):
        signin.authentication(root, CA(auth="basic", user=user))


@pytest.mark.parametrize("auth", ["", "negotiate", "Basic"])
def test_a_method_that_is_not_known(root, auth):
    """Never a silent fall-back to Basic."""
    with pytest.raises(ConfigError, match="is not known"):
        signin.authentication(root, CA(auth=auth, user="u"))


def test_the_mark_changes_with_the_password_and_nothing_else(root, write):
    """A refused password is not tried again until it changes; the journal holds only a slow salted hash."""
    write(b"secret\n")
    first = signin.authentication(root, BASIC).mark(b"salt")
    assert signin.authentication(root, replace(BASIC, user="CORP\\other")).mark(b"salt") != first, "another account is another secret"
    write(b"secret")
    assert signin.authentication(root, BASIC).mark(b"salt") == first
    assert signin.authentication(root, BASIC).mark(b"other") != first
    write(b"Secret")
    assert signin.authentication(root, BASIC).mark(b"salt") != first
    assert "secret" not in first
    assert len(first) == 64


@given(st.binary(max_size=64))
def test_any_password_file_is_taken_or_refused_with_a_hint(tmp_path_factory, data):
    """Only ConfigError comes out, whatever stands in the file; what is taken is what stands there."""
    folder = tmp_path_factory.mktemp("root")
    file = folder / "password"
    file.write_bytes(data)
    file.chmod(0o600)
    try:
        found = sent(Root(str(folder)), CA(auth="basic", user="u", password_file="/password"))
    except ConfigError as failure:
        assert failure.hint
    else:
        assert found in (b"u:" + data, b"u:" + data[:-1])


def test_importing_it_costs_no_requests():
    """An idle run must not pay for requests."""
    program = "import sys, scx_enroll.signin; sys.exit('requests' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ)
