"""The lab's agent keeps to the facts about the real one: a kinder one would prove nothing about the program."""

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15

from tests.lab import selfsigned, standin
from tests.lab.agent import RUNNABLE, LabHost, fingerprint, served_leaf
from tests.lab.authority import pkcs7

pytestmark = pytest.mark.lab

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EC = "ec:secp256r1"


@pytest.fixture
def host(tmp_path):
    with LabHost(tmp_path / "host", key=EC) as host:
        yield host


def conf(host, text):
    path = host.path(host.conf)
    os.chmod(path, 0o644)
    with open(path, "wb") as file:
        file.write(text.encode().replace(b"{port}", str(host.port).encode()))


def alive_within(host, seconds=2.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if host.pid:
            return True
        time.sleep(0.01)
    return False


def gone(host, seconds=3.0):
    deadline = time.monotonic() + seconds
    while host.pid and time.monotonic() < deadline:
        time.sleep(0.01)
    return not host.pid


# the tree


@pytest.mark.parametrize("layout", RUNNABLE)
def test_each_layout_starts_serves_its_leaf_and_stops(tmp_path, layout):
    """All layouts have the same habits, in other places."""
    with LabHost(tmp_path, layout, key=EC) as host:
        assert host.served() is None
        assert host.start()
        assert host.served() == host.leaf()
        assert host.served(address="::1") in (host.leaf(), None)
        assert host.run(host.scxadmin, "-status").returncode == 0
        host.stop()
        assert (host.pid, host.served()) == (0, None)
        assert not os.path.exists(host.path(host.place.pid))
        assert host.run(host.scxadmin, "-status").returncode == 1
        assert host.log == ""


def test_a_dangling_certificate_starts_nothing(tmp_path):
    """The key is sound and the host pem is there: the link leads elsewhere."""
    with LabHost(tmp_path, "omi-dangling", key=EC) as host:
        assert not host.start()
        assert os.path.lexists(host.path(host.certificate))
        assert "EventId=20029" in host.log


def test_an_agent_of_two_ports_serves_both(tmp_path):
    """The same pair at each of them."""
    with LabHost(tmp_path, "omi-ports", key=EC) as host:
        assert len(set(host.ports)) == 2
        assert host.start()
        assert {served_leaf(port) for port in host.ports} == {host.leaf()}


@pytest.mark.parametrize(("layout", "pair"), [("omi-moved", "/etc/pki/scom /etc/pki/scom"), ("omi-apart", "/etc/pki/scom /etc/pki/private")])
def test_a_moved_pair_leaves_the_packages_own_where_it_was(tmp_path, layout, pair):
    """The packages' scripts work on theirs, and so does SCOM: the agent serves the other one."""
    with LabHost(tmp_path, layout, key=EC) as host:
        assert f"{os.path.dirname(host.certificate)} {os.path.dirname(host.key)}" == pair
        assert host.resolve("/etc/opt/microsoft/scx/ssl/scx.pem") == host.path("/etc/opt/omi/ssl/omi-host-host1.pem")
        host.start()
        assert host.served() == host.leaf()
        host.scom_sign()
        assert host.served() == host.leaf()


def test_links_and_modes_are_the_packages(host):
    """Links are absolute and mean the tree; modes are what the packages give."""
    found = host.snapshot()
    assert found["/etc/opt/omi/ssl/omi.pem"].text == "/etc/opt/omi/ssl/omi-host-host1.pem"
    assert found["/etc/opt/microsoft/scx/ssl/scx.pem"].text == "/etc/opt/omi/ssl/omi.pem"
    assert found["/etc/opt/omi/ssl/omi-host-host1.pem"].mode == 0o444
    assert found["/etc/opt/omi/ssl/omikey.pem"].mode == 0o400
    assert found["/etc/opt/omi/ssl"].mode == 0o755
    assert os.stat(host.path(host.conf)).st_mode & 0o777 == 0o444
    assert host.resolve("/etc/opt/microsoft/scx/ssl/scx.pem") == host.path("/etc/opt/omi/ssl/omi-host-host1.pem")
    if os.geteuid() == 0:
        assert found["/etc/opt/omi/ssl/omikey.pem"].uid == host.account[0]


def test_a_fresh_omi_has_a_regular_certificate_and_the_marker(tmp_path):
    """The marker tells the scx package that the pair is its own to replace."""
    with LabHost(tmp_path, "omi-regular", key=EC) as host:
        found = host.snapshot()
        assert (found["/etc/opt/omi/ssl/omi.pem"].kind, found["/etc/opt/omi/ssl/omi.pem"].mode) == ("file", 0o644)
        assert found["/etc/opt/omi/ssl/.omi_cert_marker"].data == b""


@pytest.mark.parametrize("kind", ["rsa:2048", "rsa:3072", EC])
def test_the_agents_own_certificate_is_v1_with_extensions_and_no_san(tmp_path, kind):
    """Strict parsers reject it, and the program must not."""
    with LabHost(tmp_path, key=kind, domain="corp.lab.test") as host:
        text = subprocess.run(
            ["openssl", "x509", "-inform", "der", "-noout", "-text"], input=host.leaf(), stdout=subprocess.PIPE, check=True
        ).stdout.decode()
        assert "Version: 1 (0x0)" in text
        assert "TLS Web Server Authentication" in text
        assert "Subject Alternative" not in text
        subject = next(line for line in text.splitlines() if "Subject:" in line).replace(" = ", "=")
        assert subject.split("Subject: ")[1] == "DC=test, DC=lab, DC=corp, CN=host1, CN=host1.corp.lab.test"
        check = subprocess.run(
            ["openssl", "verify", "-CAfile", host.resolve(host.certificate), host.resolve(host.certificate)], stdout=subprocess.PIPE
        )
        assert check.returncode == 0
        assert host.start()


def test_two_hosts_run_side_by_side(tmp_path):
    """Processes are found by pid file beneath the root, never by name."""
    with LabHost(tmp_path / "one", key=EC) as one, LabHost(tmp_path / "two", key=EC) as two:
        assert one.start()
        assert two.start()
        assert one.port != two.port
        assert one.served() != two.served()
        one.stop()
        assert two.served() == two.leaf()


def test_a_start_is_quick(host):
    """Hundreds of tests start an agent."""
    host.start()
    host.stop()
    begin = time.monotonic()
    assert host.start()
    assert time.monotonic() - begin < 1.0  # about 0.1 s; the rest is for a busy machine


# the pair


BAD = {
    "der": lambda host, cert, key: (ssl.PEM_cert_to_DER_cert(cert.decode()), key),
    "pkcs7": lambda host, cert, key: (selfsigned.armour(pkcs7([ssl.PEM_cert_to_DER_cert(cert.decode())])), key),
    "indented": lambda host, cert, key: (b"".join(b"  " + line + b"\n" for line in cert.splitlines()), key),
    "truncated": lambda host, cert, key: (cert[: len(cert) // 2], key),
    "ca-first": lambda host, cert, key: (host.new_pair()[0] + cert, key),
    "mismatch": lambda host, cert, key: (cert, host.new_pair()[1]),
    "other-type": lambda host, cert, key: (cert, selfsigned.key_pem(selfsigned.make_key("rsa:2048"))),
    "encrypted": lambda host, cert, key: (
        cert,
        serialization.load_pem_private_key(key, None).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
        ),
    ),
    "key-truncated": lambda host, cert, key: (cert, key[: len(key) // 2]),
    "empty": lambda host, cert, key: (b"", key),
}
EVENT = {
    "mismatch": 20025,
    "ca-first": 20025,
    "other-type": 20026,
    "encrypted": 20024,
    "key-truncated": 20024,
}


@pytest.mark.parametrize("kind", sorted(BAD))
def test_a_bad_pair_kills_silently_and_the_tools_say_started(host, kind):
    """Exit statuses and texts prove nothing: that is why the program looks at the wire."""
    host.install(*BAD[kind](host, *host.new_pair()))
    done = host.run(host.scxadmin, "-start")
    assert (done.returncode, done.stdout) == (0, "omi is started.\n")
    assert not host.wait(3)
    assert os.path.exists(host.path(host.place.pid))
    events = [int(line.split("EventId=")[1].split()[0]) for line in host.log.splitlines()]
    assert events[0] == EVENT.get(kind, 20029)
    assert events[-3:] == [20029, 10020, 10005]


@pytest.mark.parametrize("make", [lambda pem: b"some text\n" + pem, lambda pem: pem.replace(b"\n", b"\r\n")])
def test_text_before_and_crlf_are_fine(host, make):
    """Accepted by the real server; refusing them in the lab would hide nothing but teach wrong rules."""
    certificate, key = host.new_pair()
    host.install(make(certificate), key)
    assert host.start()
    assert host.served() == host.leaf()


def test_only_the_leaf_is_sent(host):
    """A chain in the file never reaches a client: intermediates have to be on the Management Servers."""
    certificate, key = host.new_pair()
    host.install(certificate + host.new_pair()[0], key)
    assert host.start()
    sent = subprocess.run(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{host.port}", "-showcerts"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ).stdout
    assert sent.count(b"BEGIN CERTIFICATE") == 1
    assert host.served() == ssl.PEM_cert_to_DER_cert(certificate.decode())


def test_an_unreadable_key_or_folder_kills(host):
    """The agent reads as its own user: x on each folder, r on the file."""
    os.chmod(host.resolve(host.key), 0o000)
    host.run(host.scxadmin, "-start")
    assert not host.wait(2)
    assert "EventId=20023" in host.log
    os.chmod(host.resolve(host.key), 0o400)
    os.chmod(host.path("/etc/opt/omi/ssl"), 0o700 if os.geteuid() == 0 else 0o600)
    host.run(host.scxadmin, "-start")
    assert not host.wait(2)
    os.chmod(host.path("/etc/opt/omi/ssl"), 0o755)
    assert host.start()


def test_nonroot_false_reads_as_root(host):
    """Then the same modes do no harm."""
    if os.geteuid():
        pytest.skip("only root reads what nobody may")
    conf(host, "httpport=0\nhttpsport=0,{port}\nNonRoot=false\n")
    os.chmod(host.resolve(host.key), 0o000)
    assert host.start()


def test_the_old_leaf_is_served_until_restart_or_reload(host):
    """File and wire are two things."""
    host.start()
    old = host.served()
    host.install(*host.new_pair())
    assert host.served() == old != host.leaf()
    host.run(host.scxadmin, "-restart", "provider")
    assert host.served() == old
    pid = host.pid
    host.reload()
    deadline = time.monotonic() + 5
    while host.served() != host.leaf() and time.monotonic() < deadline:  # for a moment it may serve nothing
        time.sleep(0.01)
    assert host.served() == host.leaf()
    assert host.pid == pid
    host.install(*host.new_pair())
    assert host.restart()
    assert host.served() == host.leaf()
    assert host.pid != pid
    assert host.restarts == 1


def test_a_reload_with_a_bad_pair_kills_and_says_nothing(host):
    """-r is quicker than a restart, and as deadly."""
    host.start()
    host.install(b"junk")
    assert host.run("/opt/omi/bin/omiserver", "-r").returncode == 0
    assert gone(host)
    assert os.path.exists(host.path(host.place.pid))
    assert host.run("/opt/omi/bin/omiserver", "-r").returncode == 0
    assert "not running" in host.run("/opt/omi/bin/omiserver", "-s").stdout


def test_a_swap_between_the_two_opens_kills(host):
    """Certificate and key are opened one after the other; two renames around a start are a race."""
    host.knobs(between_opens=0.5)
    certificate, key = host.new_pair()
    host.run(host.scxadmin, "-start")
    assert alive_within(host)
    time.sleep(0.25)
    host.install(certificate, key)
    assert gone(host)
    assert "EventId=20025" in host.log


# the conf


@pytest.mark.parametrize(
    "text",
    [
        "  # indented\nhttpport=0\nhttpsport={port}\n",
        "\ufeffhttpport=0\nhttpsport={port}\n",
        "httpport=0\nhttpsport={port}\nnonsense\n",
        "httpport=0\nhttpsport={port}\nunknown=1\n",
        "httpport=0\nhttpsport=0 ,{port}\n",
        "httpport=0\nhttpsport={port},\n",
        "httpport=0\nhttpsport={port} # scom\n",
    ],
)
def test_a_bad_conf_is_fatal_and_silent(host, text):
    """With -d not even the log is open yet."""
    conf(host, text)
    done = host.run(host.scxadmin, "-start")
    assert (done.returncode, done.stdout) == (0, "omi is started.\n")
    assert not host.wait(1)
    assert host.log == ""
    assert host.run("/opt/omi/bin/omiserver").returncode == 1


def test_the_conf_moves_the_pair_and_the_last_value_wins(host):
    """pemfile and keyfile count, wherever they point; relative ones are beneath the run directory."""
    certificate, key = host.new_pair()
    conf(
        host,
        "# x\nhttpport = 0\t\r\nhttpsport = 1,2\nhttpsport = 0, {port},{port}\n"
        "pemfile=/nowhere\npemfile=/etc/moved.pem\nkeyfile=moved.key\nNONROOT=true\nService=omi\n",
    )
    for path, data in (("/etc/moved.pem", certificate), ("/var/opt/omi/run/moved.key", key)):
        with open(host.path(path), "wb") as file:
            file.write(data)
    assert host.start()
    assert host.served() == ssl.PEM_cert_to_DER_cert(certificate.decode())


def test_a_busy_port_kills_all(host):
    """One failing port takes the others with it."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        conf(host, "httpport=0\nhttpsport={port},PORT\n".replace("PORT", str(other.getsockname()[1])))
        host.run(host.scxadmin, "-start")
        assert not host.wait(2)
    assert "EventId=20154" in host.log
    assert "EventId=10020" in host.log


def test_defaults_of_the_parser():
    """What is absent matters: without httpsport the agent listens on 5986, not on SCOM's port."""
    assert standin.ports("0, 1270,1270") == (1270,)
    assert standin.parse_conf(b"") == {}
    with pytest.raises(standin.ConfError):
        standin.ports("70000")


# the tools


def test_tools_answer_as_the_table_says(host):
    """Arguments in any case, all parsed before any runs."""
    assert host.run(host.scxadmin, "-version").stdout.startswith("Version: 1.9.1-0 ")
    assert host.run(host.scxadmin).returncode == 0
    assert "Usage" in host.run(host.scxadmin, "-h").stdout
    done = host.run(host.scxadmin, "-start", "-nonsense")
    assert (done.returncode, host.starts) == (1, 0)
    assert host.run(host.scxadmin, "-start", "provider").returncode == 1
    assert host.run(host.scxadmin, "-RESTART", "CIMOM").returncode == 0
    assert host.wait()
    assert host.restarts == 1
    assert os.readlink(host.path("/usr/sbin/scxadmin")) == host.scxadmin


def test_service_control_inverts_is_running(host):
    """1 means running; and a missing conf is 3."""
    control = "/opt/omi/bin/service_control"
    assert host.run(control, "is-running").returncode == 0
    host.start()
    assert host.run(control, "is-running").returncode == 1
    assert host.run(control, "nonsense").returncode == 1
    pid = host.pid
    assert host.run(control, "reload").returncode == 0
    assert host.wait()
    assert host.pid != pid
    os.unlink(host.path(host.conf))
    assert host.run(control, "start").returncode == 3
    done = host.run(host.scxadmin, "-restart")
    assert (done.returncode, "RETURN CODE: 3" in done.stdout) == (1, True)


def test_a_start_beside_a_running_server_is_silent(host):
    """It asks no questions, so what it prints means nothing."""
    host.start()
    pid = host.pid
    done = host.run(host.scxadmin, "-start")
    assert (done.returncode, done.stdout, host.pid) == (0, "", pid)
    assert host.run("/opt/omi/bin/omiserver").returncode == 1


def test_a_kill_leaves_the_pid_file_and_a_stop_does_not(host):
    """So one can tell a crash from a stop on purpose."""
    host.start()
    host.kill()
    assert os.path.exists(host.path(host.place.pid))
    assert host.start()
    host.stop()
    assert not os.path.exists(host.path(host.place.pid))


# on the wire


def test_the_server_is_mute_without_authorization_and_closes_without_a_word(host):
    """A probe that sends HTTP waits for a minute; one that expects close_notify fails."""
    host.start()
    context = ssl._create_unverified_context()
    with socket.create_connection(("127.0.0.1", host.port)) as plain, context.wrap_socket(plain) as secure:
        secure.sendall(b"POST /wsman HTTP/1.1\r\nHost: x\r\n\r\n")
        secure.settimeout(0.3)
        with pytest.raises(OSError, match="timed out"):
            secure.recv(1)
    with socket.create_connection(("127.0.0.1", host.port)) as plain, context.wrap_socket(plain) as secure:
        secure.sendall(b"POST /wsman HTTP/1.1\r\nAuthorization: X\r\n\r\n")
        secure.settimeout(5)
        assert secure.recv(100).startswith(b"HTTP/1.1 401")
    assert "WARNING" in host.log


def test_a_probe_that_says_goodbye_leaves_no_line_in_the_log(host):
    """And one that just hangs up does."""
    host.start()
    host.served()
    time.sleep(0.1)
    assert "ssl-read error" not in host.log
    context = ssl._create_unverified_context()
    with socket.create_connection(("127.0.0.1", host.port)) as plain, context.wrap_socket(plain) as secure:
        secure.settimeout(2)
        with contextlib.suppress(OSError):  # an EOF error, which Python 3.9 keeps to itself
            secure.unwrap()
    with socket.create_connection(("127.0.0.1", host.port)) as plain, context.wrap_socket(plain):
        pass
    deadline = time.monotonic() + 2
    while "ssl-read error" not in host.log and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "ssl-read error" in host.log


# misbehaviour on demand


def test_an_agent_that_refuses_the_new_certificate(host):
    """It dies of every leaf but one, and comes back with that one: the rollback's whole reason."""
    host.start()
    old = host.read(host.certificate), host.read(host.key)
    host.refuse_new()
    host.install(*host.new_pair())
    assert not host.restart()
    assert host.run(host.scxadmin, "-start").returncode == 0
    host.install(*old)
    assert host.restart()
    host.install(*host.new_pair())
    host.accept_all()
    assert host.restart()


def test_a_slow_stop_ends_a_restart_with_nothing_running(host):
    """The start sees the process that is on its way out, does nothing, and says 0."""
    host.start()
    host.slow_stop(0.6, poll=0.01)
    assert host.run(host.scxadmin, "-restart").returncode == 0
    assert gone(host)
    assert host.served() is None
    assert host.start()


def test_ignored_restarts_leave_the_old_leaf_served(host):
    """Status 0, same process, old leaf."""
    host.start()
    old, pid = host.served(), host.pid
    host.install(*host.new_pair())
    host.ignore_restart(poll=0.005)
    assert host.run(host.scxadmin, "-restart").returncode == 0
    assert (host.served(), host.pid) == (old, pid)


def test_a_stray_process_is_cured_by_ending_it_by_hand(host):
    """omiserver -s, wait, start: the only way that works on the real one."""
    host.start()
    pid = host.pid
    host.make_stray(poll=0.005)
    assert host.run(host.scxadmin, "-restart").returncode == 0
    assert host.pid == pid
    host.run("/opt/omi/bin/omiserver", "-s")
    assert gone(host)
    assert host.start()
    pid = host.pid
    assert host.restart()
    assert host.pid != pid


def test_starts_that_fail_first(host):
    """One more start may be all it takes; with a status scxadmin tells it."""
    host.fail_starts(2)
    assert host.run(host.scxadmin, "-start").returncode == 0
    assert host.run(host.scxadmin, "-restart").returncode == 0
    assert host.served() is None
    assert host.start()
    assert host.starts == 3
    host.fail_starts(1, status=2)
    done = host.run(host.scxadmin, "-restart")
    assert (done.returncode, "RETURN CODE: 2" in done.stdout) == (1, True)


def test_the_start_limit_ends_with_nothing_running(host):
    """systemd allows five starts in ten seconds; the next restart says 0 and leaves nothing."""
    host.knobs(start_limit=[2, 30])
    assert host.start()
    assert host.restart()
    assert host.run(host.scxadmin, "-restart").returncode == 0
    assert host.served() is None


def test_a_dying_agent_is_started_again_by_its_unit(host):
    """Restart=on-failure: -status may catch it alive, and a repaired file heals by itself."""
    good = host.read(host.certificate), host.read(host.key)
    host.install(b"junk")
    host.knobs(respawn=0.1)
    host.run(host.scxadmin, "-start")
    assert not host.wait(1)
    host.install(*good)
    assert host.wait(3)
    host.stop()
    time.sleep(0.3)
    assert host.pid == 0


def test_an_agent_can_die_later(host):
    """A first answer is not the end of the proof."""
    host.knobs(dies_after=0.4)
    assert host.start()
    assert gone(host)
    assert "10005" in host.log


def test_slow_restarts_junk_and_a_missing_scxadmin(host):
    """What an operator's machine may look like."""
    host.start()
    host.slow_restart(0.3)
    host.junk("junk \u00fc")
    begin = time.monotonic()
    done = host.run(host.scxadmin, "-restart")
    assert time.monotonic() - begin > 0.3
    assert done.stdout.startswith("junk")
    host.remove_scxadmin()
    with pytest.raises(FileNotFoundError):
        host.run(host.scxadmin, "-restart")


# other owners


def test_scxsslconfig_makes_nothing_over_a_key(host):
    """Without -f it is no repair: not even a missing certificate comes back."""
    before = host.snapshot()
    assert "not generated" in host.run("/opt/microsoft/scx/bin/tools/scxsslconfig").stdout
    assert host.snapshot() == before
    os.unlink(host.path(host.certificate))
    assert host.run("/opt/microsoft/scx/bin/tools/scxsslconfig").returncode == 0
    assert host.leaf() is None
    os.unlink(host.path(host.key))
    assert host.run("/opt/microsoft/scx/bin/tools/scxsslconfig").returncode == 0
    assert host.start()
    assert host.served() == host.leaf()


def test_scxsslconfig_with_force_replaces_the_pair_under_a_running_agent(host):
    """A new key that nobody asked for: seen by its fingerprint."""
    host.start()
    before = host.snapshot()
    host.scxsslconfig_f()
    after = host.snapshot()
    assert before[host.key].data != after[host.key].data
    assert after[host.certificate].text == host.host_pem
    assert host.served() != host.leaf()
    assert host.restart()
    assert host.served() == host.leaf()


def test_scxsslconfig_writes_the_key_through_a_link(host):
    """So a key that is a link leads the tool into somebody else's file."""
    other = host.path("/etc/opt/omi/ssl/elsewhere.pem")
    os.rename(host.path(host.key), other)
    os.symlink("/etc/opt/omi/ssl/elsewhere.pem", host.path(host.key))
    with open(other, "rb") as file:
        before = file.read()
    host.scxsslconfig_f()
    with open(other, "rb") as file:
        assert file.read() != before
    assert os.path.islink(host.path(host.key))


def test_a_management_server_signs_through_the_links(host):
    """cp follows links into whatever they resolve to, also into a file of ours."""
    host.start()
    ours = "/etc/opt/omi/ssl/ours.pem"
    shutil.copy(host.resolve(host.certificate), host.path(ours))
    host.relink(ours)
    key = host.read(host.key)
    der = host.scom_sign()
    assert host.served() == der
    assert os.readlink(host.path(host.certificate)) == ours
    assert host.read(ours) == selfsigned.armour(der)
    assert host.read(host.key) == key
    assert "SCX-Certificate" in x509.load_der_x509_certificate(der).issuer.rfc4514_string()
    host.move_link_back()
    assert host.restart()
    assert host.served() != der


def test_a_signature_for_an_old_key_kills(host):
    """The late cp after a rekey."""
    host.start()
    old = serialization.load_pem_private_key(host.read(host.key), None).public_key()
    host.scxsslconfig_f()
    assert host.restart()
    host.scom_sign(public_key=old)
    assert host.served() is None


def test_an_omi_upgrade_wipes_and_an_scx_upgrade_links_again(host):
    """Both act on the same folder with their own idea of whose pair it is."""
    host.start()
    host.omi_upgrade(EC)
    found = host.snapshot()
    assert found[host.certificate].kind == "file"
    assert "/etc/opt/omi/ssl/omi-host-host1.pem" not in found
    assert "/etc/opt/omi/ssl/.omi_cert_marker" in found
    assert host.served() == host.leaf()
    host.scx_upgrade()
    found = host.snapshot()
    assert found[host.certificate].kind == "link"
    assert "/etc/opt/omi/ssl/.omi_cert_marker" not in found
    assert "/etc/opt/omi/ssl/omi.pem_temp" not in found
    assert host.served() == host.leaf()
    host.scx_upgrade()
    assert "/etc/opt/microsoft/scx/ssl/scx.pem_backup" in host.snapshot()


# nothing is left behind


def test_the_server_ends_when_its_tree_is_gone(tmp_path):
    """Test runs leave nothing running."""
    host = LabHost(tmp_path / "host", key=EC)
    host.start()
    pid = host.pid
    assert standin.start_time(pid)
    shutil.rmtree(host.root)
    deadline = time.monotonic() + 3
    while standin.start_time(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert standin.start_time(pid) == ""
    host.close()


def test_the_server_ends_when_the_test_process_is_killed(tmp_path):
    """Even by SIGKILL."""
    code = (
        "import sys, os; from tests.lab.agent import LabHost\n"
        f"host = LabHost({str(tmp_path / 'host')!r}, key='ec:secp256r1'); assert host.start()\n"
        "print(host.pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, stdout=subprocess.PIPE)
    pid = int(run.stdout)
    deadline = time.monotonic() + 3
    while standin.start_time(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert standin.start_time(pid) == ""


@pytest.mark.slow
def test_the_program_form_does_the_same(tmp_path):
    """The demo is a shell's."""

    def lab(*arguments):
        command = [sys.executable, "-m", "tests.lab.agent", "--root", str(tmp_path / "host"), *arguments]
        return subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE)

    made = json.loads(lab("make", "--key", EC, "--owner", str(os.getpid())).stdout)
    with LabHost(tmp_path / "host", make=False) as host:
        assert made["port"] == host.port
        assert lab("start").returncode == 0
        shown = json.loads(lab("show").stdout)
        assert shown["served"] == shown["installed"] == fingerprint(host.served())
        assert lab("refuse-new").returncode == 0
        assert lab("set", "junk=\"x\"", "poll=0.01").returncode == 0
        host.install(*host.new_pair())
        assert lab("restart").returncode == 1
        assert lab("accept-all").returncode == 0
        assert lab("scom-sign").returncode == 0
        assert host.served() == host.leaf()
        assert b"omi install" in lab("script").stdout
        assert lab("script", "omi install, pair distrusted").returncode == 0
        assert os.path.exists(host.path("/etc/opt/omi/ssl/.omi_cert_marker"))
        assert lab("stop").returncode == 0
        assert host.pid == 0


def test_signing_without_the_version_field_keeps_the_signature_right():
    """A certificate that does not verify would be refused for another reason than meant."""
    for kind in ("rsa:2048", "ec:secp384r1"):
        key = selfsigned.make_key(kind)
        der = ssl.PEM_cert_to_DER_cert(selfsigned.make_certificate(key, "H", "lab.test").decode())
        head, size = selfsigned._head(der[4:])
        signed, rest = der[4 : 4 + head + size], der[4 + head + size :]
        bits = rest[selfsigned._size(rest) :]
        signature = selfsigned._content(bits)[1:]
        if kind.startswith("rsa"):
            key.public_key().verify(signature, signed, PKCS1v15(), hashes.SHA256())
        else:
            key.public_key().verify(signature, signed, ec.ECDSA(hashes.SHA256()))
