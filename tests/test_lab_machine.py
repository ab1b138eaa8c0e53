"""The lab's machines: that they are what a test of the installed package takes them for."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.lab import machine as lab
from tests.lab import roots
from tests.lab.machine import Image, Machine, Trouble, wait_for

# the first one to ask for a release makes its tree
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SUITE = "trixie"
EC = "ec:secp256r1"
FETCH = """
import sys, ssl, urllib.request
address, trust, authorization = sys.argv[1:]
request = urllib.request.Request(address, headers={"Authorization": authorization})
try:
    print(urllib.request.urlopen(request, context=ssl.create_default_context(cafile=trust or None), timeout=10).status)
except OSError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def able():
    """This machine can have others."""
    missing = lab.missing()
    if missing:
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)


@pytest.fixture
def image(able, tmp_path):
    with Image(SUITE, tmp_path / "image") as made:
        yield made


@pytest.fixture
def host(image):
    """A machine with an agent that is served."""
    with Machine(image, "host1") as made:
        made.install_agent(EC)
        yield made


def pid_of(host):
    return host.read("/var/opt/omi/run/omiserver.pid").strip()


def group_of(host):
    """The control group of the agent's server."""
    groups = host.read(f"/proc/{pid_of(host)}/cgroup")
    return next(line[3:] for line in groups.splitlines() if line.startswith("0::"))


def fetch(host, address, trust="", authorization=""):
    return host.run("python3", "-c", FETCH, address, trust, authorization).stdout


def basic(ca):
    return "Basic " + base64.b64encode(f"{ca.user}:{ca.password}".encode()).decode()


@pytest.mark.parametrize("suite", roots.SUITES)
def test_a_release_that_does_not_boot_or_forgets(able, tmp_path, suite):
    """Each release comes up with its own systemd and Python, keeps its files and its identity, and starts the agent at each boot."""
    with Image(suite, tmp_path / "image") as image:
        image.install_agent(key=EC)
        with Machine(image, "host1") as host:
            assert suite in (host.shell('. /etc/os-release; echo "${VERSION_CODENAME:-sid}"').stdout.strip(), "sid")
            assert host.run("cat", "/proc/1/comm").stdout == "systemd\n"
            assert host.run("systemctl", "--failed", "--no-legend").stdout == ""
            assert host.run("hostname", "--fqdn").stdout == "host1.lab.test\n"
            identity = host.read("/etc/machine-id")
            assert len(identity) == 33
            leaf = wait_for(host.served)
            assert json.loads(host.agent("show").stdout)["installed"] == leaf
            assert (host.unit("omid.service", "ActiveState"), group_of(host)) == ("active", "/system.slice/omid.service")
            host.agent("scom-sign")
            signed = host.served()
            assert signed not in (leaf, "")
            host.write("/etc/kept", "kept", 0o640)
            host.write("/run/lost", "lost")
            host.reboot()
            assert host.shell("cat /etc/kept /etc/machine-id; stat -c %a:%U /etc/kept").stdout == f"kept{identity}640:root\n"
            assert host.run("test", "-e", "/run/lost", check=False).returncode == 1
            assert wait_for(host.served) == signed
            assert "OMI CIM Server" in host.journal("omid.service")


def test_a_masked_agent_that_stays_down_or_stays_masked(host):
    """scxadmin starts it where systemd won't, with status 0: outside its unit, where no restart reaches it, until the cure."""
    leaf = host.served()
    host.run("systemctl", "mask", "--now", "omid.service")
    assert host.served() == ""
    ran = host.run("scxadmin", "-restart")
    assert "omi is started." in ran.stdout
    assert host.wait_for(host.served) == leaf
    stray = pid_of(host)
    assert group_of(host) != "/system.slice/omid.service"
    assert host.run("scxadmin", "-restart").returncode == 0
    assert (pid_of(host), host.served()) == (stray, leaf)
    host.run("systemctl", "unmask", "omid.service")
    host.run("scxadmin", "-restart")
    assert (pid_of(host), host.served()) == (stray, leaf)
    host.run("/opt/omi/bin/omiserver", "-s")
    host.wait_for(lambda: not host.served())
    host.run("scxadmin", "-start")
    assert host.wait_for(host.served) == leaf
    assert group_of(host) == "/system.slice/omid.service"


def test_a_start_limit_that_is_never_reached(host):
    """The start that is one too many is refused by systemd, and made by scxadmin itself, with status 0."""
    host.write("/etc/systemd/system/omid.service.d/slow.conf", "[Unit]\nStartLimitIntervalSec=10min\n")  # for a loaded machine
    host.run("systemctl", "daemon-reload")
    for _ in range(6):
        assert host.run("scxadmin", "-restart").returncode == 0
    assert host.unit("omid.service", "ActiveState") == "failed"
    assert host.wait_for(host.served)
    assert group_of(host) != "/system.slice/omid.service"


def test_a_crash_that_nobody_mends(host):
    """systemd starts the agent again after it was killed, and after it died of a pair, once that is good again."""
    before, leaf = pid_of(host), host.served()
    host.shell(f"kill -KILL {before}")
    assert host.wait_for(host.served, 15) == leaf
    assert pid_of(host) != before
    assert group_of(host) == "/system.slice/omid.service"
    host.agent("set", 'refuse=["' + leaf + '"]')
    host.shell(f"kill -HUP {pid_of(host)}")
    host.wait_for(lambda: not host.served(), 5)
    host.agent("accept-all")
    assert host.wait_for(host.served, 15) == leaf


def test_a_service_that_is_killed_takes_the_agent_along(host):
    """What a unit's command starts by hand lives in that unit, and dies with it where the unit says so."""
    host.run("systemctl", "mask", "--now", "omid.service")
    host.run("systemd-run", "--unit=other", "--service-type=oneshot", "--remain-after-exit", "scxadmin", "-restart")
    host.wait_for(host.served)
    assert group_of(host) == "/system.slice/other.service"
    host.run("systemctl", "stop", "other.service")
    assert host.served() == ""


def test_a_network_that_is_there_too_early(image, tmp_path):
    """Where it is to come late, the CA listens already, but there is no way to it before."""
    with Machine(image, "host1", network="late") as host, host.ca(tmp_path / "ca") as ca:
        assert "unreachable" in fetch(host, f"https://{ca.server}/certsrv/")
        host.network_up()
        assert "CERTIFICATE_VERIFY_FAILED" in fetch(host, f"https://{ca.server}/certsrv/")
        host.network_down()
        assert "unreachable" in fetch(host, f"https://{ca.server}/certsrv/")


def test_a_ca_that_can_not_be_used_from_a_machine(image, tmp_path):
    """It is reached by its name, with its trust and account, is steered from outside, and two of them are told apart."""
    with Machine(image, "host1") as host, host.ca(tmp_path / "a") as ca, host.ca(tmp_path / "b", name="ca02.lab.test", port=444) as other:
        assert (ca.server, other.server) == ("ca01.lab.test:443", "ca02.lab.test:444")
        host.copy(ca.server_trust, "/srv/trust.pem")
        address = f"https://{ca.server}/certsrv/"
        assert "401" in fetch(host, address, "/srv/trust.pem")
        assert fetch(host, address, "/srv/trust.pem", basic(ca)) == "200\n"
        assert "CERTIFICATE_VERIFY_FAILED" in fetch(host, f"https://{other.server}/certsrv/", "/srv/trust.pem")
        ca.steer("--set", "answer=503")
        assert "503" in fetch(host, address, "/srv/trust.pem", basic(ca))
        assert (ca.rows, ca.posts) == ([], 0)
        ca.close()
        assert "refused" in fetch(host, address, "/srv/trust.pem")


def test_two_machines_that_meet(image, tmp_path):
    """Two from one image have their own names, identities, files, services, ports and CAs."""
    image.install_agent(key=EC)
    with Machine(image, "host1") as one, Machine(image, "host2") as other:
        assert one.read("/etc/machine-id") != other.read("/etc/machine-id")
        assert (one.fqdn, other.run("hostname", "--fqdn").stdout) == ("host1.lab.test", "host2.lab.test\n")
        with one.ca(tmp_path / "a") as first, other.ca(tmp_path / "b") as second:
            assert first.server == second.server
            one.copy(first.server_trust, "/srv/trust.pem")
            assert other.run("test", "-e", "/srv/trust.pem", check=False).returncode == 1
            assert "401" in fetch(one, f"https://{first.server}/certsrv/", "/srv/trust.pem")
        leaf = other.wait_for(other.served)
        one.run("systemctl", "stop", "omid.service")
        assert (one.served(), other.served()) == ("", leaf)
        one.poweroff()
        assert other.served() == leaf


def test_a_machine_that_is_not_off(image):
    """A power cut takes what was in /run; what is changed meanwhile is there after the next boot."""
    with Machine(image, "host1") as host:
        host.shell("echo mine >/etc/mine; echo gone >/run/gone")
        host.cut_power()
        with pytest.raises(Trouble, match="host1 is off"):
            host.run("true")
        host.off.write("/etc/changed", "changed")
        host.boot()
        assert host.shell("cat /etc/mine /etc/changed; ls /run").stdout.startswith("mine\nchanged")
        assert host.run("test", "-e", "/run/gone", check=False).returncode == 1


def test_a_command_whose_failure_is_not_seen(image):
    """Status and both outputs are given back, nothing of the test's environment is there, and what takes too long is an error."""
    with Machine(image, "host1") as host:
        done = host.shell("echo out; echo err >&2; exit 3", check=False)
        assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
        with pytest.raises(Trouble, match=r"exit status 3\nwhat went wrong"):
            host.shell("echo what went wrong; exit 3")
        assert host.run("cat", input="given").stdout == "given"
        assert set(host.run("env", env={"MORE": "1"}).stdout.split()) >= {"MORE=1", "HOME=/root"}
        assert "PYTEST" not in host.run("env").stdout
        assert host.run("pwd").stdout == "/\n"
        with pytest.raises(Trouble, match="not done after"):
            host.run("sleep", "30", timeout=0.5)
        with host.spawn("sh", "-c", "echo began; sleep 600") as started:
            assert started.stdout.readline() == "began\n"
            host.close()


def test_a_program_that_is_not_the_installed_one(image):
    """The lab is seen there, the checkout's program is not; and nobody there can change the lab."""
    with Machine(image, "host1") as host:
        for tree in (host, image):
            assert "No module named 'scx_enroll'" in tree.run("python3", "-c", "import scx_enroll", check=False, env=lab.ALONE).stderr
            assert "Read-only" in tree.run("touch", "/run/lab/tests/lab/new", check=False).stderr


def test_a_package_of_which_parts_are_left_out(image):
    """An image takes a package without a network, its manual pages and documentation too."""
    image.write("/srv/p/DEBIAN/control", "Package: p\nVersion: 1\nArchitecture: all\nMaintainer: m <m@lab.test>\nDescription: p\n")
    files = ["/usr/share/doc/p/README", "/usr/share/man/man8/p.8", "/usr/share/locale/de/p", "/etc/p.conf"]
    for file in files:
        image.write(f"/srv/p{file}", "text\n")
    image.shell("chmod -R u=rwX,go=rX /srv/p; dpkg-deb --build /srv/p /srv/p.deb; dpkg -i /srv/p.deb; rm -r /srv/p")
    with Machine(image, "host1") as host:
        assert [file for file in files if host.read(file) != "text\n"] == []
        host.run("dpkg", "--purge", "p")
        assert host.run("test", "-e", "/etc/p.conf", check=False).returncode == 1
    assert image.read("/etc/p.conf") == "text\n"
    assert not os.path.exists(f"{image.lower[-1]}/etc/p.conf")


def test_a_machine_that_outlives_a_killed_test(able, tmp_path):
    """No process, mount or control group is left where a test is killed, or after the next one."""
    script = (
        "import sys, time\nfrom tests.lab.machine import Image, Machine\n"
        f"image = Image({SUITE!r}, {str(tmp_path / 'image')!r})\n"
        "with Machine(image, 'host1') as host, host.ca(image.folder + '/ca'):\n"
        "    print(host._leader, host._cgroup, flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-I", "-c", script], stdout=subprocess.PIPE, text=True) as test:
        leader, group = test.stdout.readline().split()
        assert os.path.isdir(f"/proc/{leader}") and os.path.isdir(group)
        test.send_signal(signal.SIGKILL)
    wait_for(lambda: not os.path.isdir(f"/proc/{leader}"), 10)
    with open("/proc/mounts", encoding="utf-8") as file:
        assert str(tmp_path) not in file.read()
    listed = subprocess.run(["ps", "-eo", "args"], stdout=subprocess.PIPE, text=True) if os.path.exists("/bin/ps") else None
    assert not listed or str(tmp_path) not in listed.stdout
    lab._sweep()
    assert not os.path.isdir(group)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The trees that were made instead of real ones, each with one file."""
    calls = []

    def make(suite, tree):
        calls.append(suite)
        time.sleep(0.1)
        os.makedirs(tree)
        with open(os.path.join(tree, str(len(calls))), "x", encoding="ascii"):
            pass

    monkeypatch.setenv("SCX_ENROLL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(roots, "_make", make)
    return calls


def test_a_tree_that_everybody_makes_at_once(made):
    """Several that ask together get one and the same, complete; another suite has its own."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(roots.root("sid"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(set(found)), made) == (4, 1, ["sid"])
    assert roots.root("trixie") != found[0]


def test_a_tree_that_is_half_made_or_old_or_of_other_things(made, monkeypatch):
    """What a killed run left is not taken; after a month, and with other packages, a tree is made anew, the former left for its users."""
    first = roots.root("sid")
    half = os.path.join(os.path.dirname(first), ".sid.making", "half")
    os.makedirs(half)
    assert roots.root("sid") == first
    old = first.rpartition("-")[0] + f"-{int(time.time()) - 31 * 86400}"
    os.rename(first, old)
    second = roots.root("sid")
    assert (second, os.listdir(second), os.path.isdir(old), os.path.exists(half)) == (first[:-10] + second[-10:], ["2"], True, False)
    monkeypatch.setattr(roots, "PACKAGES", ("other",))
    assert roots.root("sid") not in (first, second, old)
    older = first.rpartition("-")[0] + f"-{int(time.time()) - 33 * 86400}"
    os.rename(old, older)
    monkeypatch.setattr(roots, "PACKAGES", ("another",))
    roots.root("sid")
    assert not os.path.exists(older)
