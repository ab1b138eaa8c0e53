"""`make demo`: it shows what it says, in time, and nothing is left of it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests import demo
from tests.lab import kdc

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

LIMIT_S = 60


def processes(folder):
    """Every process with this folder in its arguments, environment or working directory."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        said = b""
        for name in ("cmdline", "environ"):
            try:
                with open(f"/proc/{pid}/{name}", "rb") as file:
                    said += file.read()
            except OSError:
                continue  # it has ended, or is another user's
        try:
            said += os.fsencode(os.readlink(f"/proc/{pid}/cwd"))
        except OSError:
            pass
        if os.fsencode(folder) in said:
            found.append(said)
    return found


@pytest.fixture
def start(tmp_path):
    """Start the demo with a temporary folder of its own, as Ctrl-C in a shell would find it; afterwards nothing may be left."""
    started = []

    def begin(*words, **options):
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        process = subprocess.Popen(
            (sys.executable, "-I", "-m", "tests.demo", *words), env=environment, cwd="/", text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        try:
            process.stdout.close()
            process.terminate()
            process.wait(10)
        finally:
            process.kill()
            process.wait()


def test_the_demo_shows_something_else_than_it_says(start, tmp_path):
    """Every step ends as announced, within a minute, and nothing is left."""
    began = time.monotonic()
    played = start()
    shown, _ = played.communicate(timeout=LIMIT_S)
    assert played.returncode == 0, shown
    assert time.monotonic() - began < LIMIT_S
    commands = [line[len("$ scx-enroll ") :].partition(" --root")[0] for line in shown.splitlines() if line.startswith("$ scx-enroll ")]
    assert commands == ["run", "run", "run --renew", "run", "run --renew"]
    statuses = [line.split()[2].rstrip(",") for line in shown.splitlines() if line.startswith("  [exit status ")]
    assert statuses == ["0", "0", "0", "0", "9"]
    assert shown.count("(self-signed)") == 1
    assert "nothing to do" in shown
    assert "byte for byte" in shown
    assert os.listdir(tmp_path) == []
    assert processes(str(tmp_path)) == []


def test_the_demo_in_a_kerberos_realm_of_its_own(start, tmp_path):
    """The same, signed in with the host's own key and bound to the channel: no password is to be seen; interrupted, it leaves no KDC."""
    lacks = demo.lacking()
    if lacks:
        pytest.fail(lacks) if os.environ.get("CI") == "true" else pytest.skip(f"this machine lacks {lacks}")
    shown, _ = start("kerberos").communicate(timeout=LIMIT_S)
    statuses = [line.split()[2].rstrip(",") for line in shown.splitlines() if line.startswith("  [exit status ")]
    assert statuses == ["0", "0", "0", "0", "0", "9"], shown
    assert "used         kerberos, as HOST1$@LAB.TEST\n" in shown
    assert "binding      tls-server-end-point, sha256\n" in shown
    assert "password =" not in shown
    another = start("kerberos")
    assert any(line.startswith("$ scx-enroll check") for line in another.stdout)
    os.killpg(another.pid, signal.SIGTERM)
    assert another.wait(timeout=20) == -signal.SIGTERM
    assert os.listdir(tmp_path) == []
    assert processes(str(tmp_path)) == []


def test_the_demo_says_what_a_machine_without_a_kdc_lacks(monkeypatch, capsys):
    """A clear word and the command that mends it, before anything is made."""
    monkeypatch.setattr(kdc, "missing", lambda: "krb5kdc: apt-get install krb5-kdc")
    monkeypatch.setattr(sys, "argv", ["demo", "kerberos"])
    assert demo.main() == 1
    assert capsys.readouterr().err == "demo: AUTH=kerberos can't be shown here, this machine lacks krb5kdc: apt-get install krb5-kdc\n"
    monkeypatch.setattr(sys, "argv", ["demo", "ntlm"])
    assert demo.main() == 2
    assert "basic or kerberos" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("after", ["", "listening", "$ scx-enroll run --root", "$ scx-enroll run --renew", "6. An agent", "Now this agent"])
def test_the_demo_is_interrupted(start, tmp_path, number, after):
    """Whenever a signal comes, the demo dies of it, and no process and no file is left."""
    played = start()
    if after == "listening":  # before anything is shown of it
        while not any(name.startswith("scx-demo-") and os.listdir(tmp_path / name) for name in os.listdir(tmp_path)):
            assert played.poll() is None
            time.sleep(0.005)
    elif after:
        assert any(line.startswith(after) for line in played.stdout)
        time.sleep(0.3)  # in the middle of it
    else:
        while not os.listdir(tmp_path):
            assert played.poll() is None
    os.killpg(played.pid, number)
    assert played.wait(timeout=20) == -number
    assert os.listdir(tmp_path) == []
    assert processes(str(tmp_path)) == []


def test_the_reader_of_the_demo_goes_away(start, tmp_path):
    """`make demo | head` ends the demo, and nothing is left."""
    played = start()
    played.stdout.readline()
    played.stdout.close()
    assert played.wait(timeout=LIMIT_S) == 1
    assert os.listdir(tmp_path) == []
    assert processes(str(tmp_path)) == []
