"""The built deb on machines of every Debian release: their own systemd, the agent at its real paths, a CA on the network.

What is looked at is what was installed there, never this checkout.
"""

from __future__ import annotations

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from tests import packages, zones
from tests.lab import machine as machines
from tests.lab import roots
from tests.lab.machine import CA, Image, Machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NEWEST = "trixie"  # of the releases; what the others can't do differently is tried there only
each_suite = pytest.mark.parametrize("suite", roots.SUITES)
PACKAGE = "/srv/scx-enroll.deb"
UNITS = ("scx-enroll.timer", "scx-enroll-soon.timer", "scx-enroll.path")
SERVICE, TICK, CONTROL = "scx-enroll.service", "scx-enroll-tick.service", "scx-enroll-control-*.service"
LINK = "/etc/opt/omi/ssl/omi.pem"
# Waits of two minutes are what operators want, and nothing that a test learns from.
SOON = "[Timer]\nOnActiveSec=\nOnActiveSec={seconds}s\nAccuracySec=100ms\n"


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    """These tests need a machine that can have containers."""
    lacks = machines.missing()
    if lacks:
        missing = f"this machine lacks {lacks}"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    packages.need("dpkg-deb")


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Callable[[str], Image]]:
    """Makes images of a release with the package installed."""
    made: List[Image] = []

    def make(suite: str) -> Image:
        image = Image(suite, tmp_path / suite)
        made.append(image)
        image.copy(packages.current().deb, PACKAGE)
        image.run("dpkg", "-i", PACKAGE)
        return image

    yield make
    for one in made:
        one.close()


def hurry(tree: machines.Tree, seconds: float = 2) -> None:
    """The look after a boot or a change comes sooner than two minutes."""
    tree.write("/etc/systemd/system/scx-enroll-soon.timer.d/test.conf", SOON.format(seconds=seconds))


def configure(tree: machines.Tree, fqdn: str, ca: CA, settle: str = "0s", **secrets: str) -> None:
    """Do what the operator does: CA, account, roots, password."""
    tree.copy(ca.server_trust, "/etc/scx-enroll/https.pem")
    tree.copy(ca.issuer_trust, "/etc/scx-enroll/ca.pem")
    tree.write("/etc/scx-enroll/password", secrets.get("password", ca.password) + "\n", 0o600)
    tree.write(
        "/etc/scx-enroll/conf.d/site.conf",
        f"[host]\nname = {fqdn}\n[ca]\nserver = {ca.server}\ntemplate = SCXAgent\nauth = basic\nuser = {ca.user}\n"
        f"server-trust = /etc/scx-enroll/https.pem\n[agent]\nsettle = {settle}\n",
    )


def issued(ca: CA) -> int:
    """How many certificates the CA has issued."""
    return sum(row["state"] == "issued" for row in ca.rows)


def facts(machine: Machine) -> Dict[str, Any]:
    """What the last run left for anybody to read; while there is nothing, no status."""
    found: Dict[str, Any] = json.loads(machine.run("cat", "/run/scx-enroll/status.json", check=False).stdout or '{"exit_status": null}')
    return found


def installed(machine: Machine) -> str:
    """The SHA-256 of the certificate at the name that the agent reads."""
    return str(json.loads(machine.agent("show").stdout)["installed"])


def agent_of(machine: Machine) -> Dict[str, Any]:
    """Process and restarts of the agent."""
    shown = json.loads(machine.agent("show").stdout)
    return {key: shown[key] for key in ("pid", "restarts", "served")}


def looks(machine: Machine) -> int:
    """How often the service was started."""
    return len(re.findall(r"^(?:Finished|Failed to start)", machine.journal(SERVICE), re.MULTILINE))


def control(machine: Machine) -> str:
    """The units of control commands."""
    return machine.run("systemctl", "list-units", "--all", "--plain", "--no-legend", CONTROL).stdout


def is_enrolled(machine: Machine) -> bool:
    """The agent serves what is installed, and that is one of ours."""
    served = machine.served()
    return bool(served) and served == installed(machine) and "scx-enroll-" in machine.run("readlink", LINK, check=False).stdout


@contextmanager
def enrolled(image: Image, tmp_path: Path, *options: str) -> Iterator[Tuple[Machine, CA]]:
    """A machine whose agent serves what the CA issued; its service looks when it is told to, and two seconds after a change."""
    with Machine(image, "host1") as machine, machine.ca(tmp_path / "ca", *options) as ca:
        machine.install_agent()
        configure(machine, machine.fqdn, ca)
        machine.run("systemctl", "start", SERVICE)
        assert is_enrolled(machine), machine.journal(SERVICE)
        yield machine, ca


# -- installed as an operator installs it ------------------------------------------------------------------------------


@each_suite
def test_a_host_that_is_not_configured_fails_or_nags(image: Callable[[str], Image], suite: str) -> None:
    """After the installation everything runs, does nothing, and says so once; what a person asks for is answered."""
    with Machine(image(suite), "host1") as machine:
        for unit in UNITS:
            assert (machine.unit(unit, "ActiveState"), machine.unit(unit, "UnitFileState")) == ("active", "enabled")
        for _ in range(3):
            machine.run("systemctl", "start", SERVICE)
        assert machine.journal(SERVICE).count("not configured yet") == 1
        assert machine.run("systemctl", "is-system-running").stdout == "running\n"
        assert machine.run("scx-enroll", "--version").stdout == f"scx-enroll {packages.current().version}\n"
        asked = machine.run("scx-enroll", "run", check=False)
        assert (asked.returncode, asked.stdout) == (3, "")
        assert "set server and template in [ca]" in asked.stderr
        assert machine.run("sh", "-c", "ls /usr/share/scx-enroll/scx_enroll/__pycache__ | wc -l").stdout.strip() not in ("", "0")


@each_suite
def test_the_unit_of_this_release_is_open_or_not_understood(image: Callable[[str], Image], suite: str) -> None:
    """The release's own systemd takes every line, and gives an exposure of at most 2.2."""
    with Machine(image(suite), "host1") as machine:
        files = [f"/usr/lib/systemd/system/{name}" for name in (SERVICE, TICK, *UNITS)]
        strict = [] if suite == "bullseye" else ["--recursive-errors=one"]
        said = machine.run("systemd-analyze", "verify", "--man=no", *strict, *files)
        assert "scx-enroll" not in said.stdout + said.stderr
        shown = machine.run("systemd-analyze", "security", "--no-pager", SERVICE, check=False).stdout
        exposure = re.search(r"Overall exposure level for scx-enroll.service: ([0-9.]+)", shown)
        assert exposure
        assert float(exposure[1]) <= 2.2, shown


@each_suite
def test_an_operation_of_the_package_changes_what_is_served(image: Callable[[str], Image], suite: str, tmp_path: Path) -> None:
    """Upgrade with an edited configuration, downgrade, reinstallation, removal, installation anew, purge: the agent notices nothing.

    The configuration stays edited, the state stays until it is purged, what was issued stays in service, and the link never dangles.
    """
    following = packages.following()
    with enrolled(image(suite), tmp_path) as (machine, ca):
        before, posts = agent_of(machine), ca.posts
        machine.copy(following.deb, "/srv/next.deb")
        machine.shell("echo '# mine' >>/etc/scx-enroll/scx-enroll.conf")

        def look(version: str, *, configured: bool = True) -> None:
            assert (agent_of(machine), ca.posts, is_enrolled(machine)) == (before, posts, True)
            machine.run("test", "-e", LINK)
            assert machine.run("systemctl", "--failed", "--no-legend").stdout == ""
            known = machine.run("sh", "-c", "systemctl list-units --all --no-legend 'scx-enroll*.timer' 'scx-enroll*.path'").stdout
            if not version:
                assert machine.run("sh", "-c", "command -v scx-enroll", check=False).stdout == ""
                assert " active " not in known
                return
            assert machine.run("scx-enroll", "--version").stdout == f"scx-enroll {version}\n"
            assert all(machine.unit(unit, "ActiveState") == "active" for unit in UNITS), known
            assert machine.read("/etc/scx-enroll/scx-enroll.conf").endswith("# mine\n") is configured
            machine.run("systemctl", "start", SERVICE)
            assert (facts(machine)["exit_status"], agent_of(machine), ca.posts) == (0, before, posts)

        look(packages.current().version)
        machine.run("dpkg", "-i", "--force-confold", "/srv/next.deb")
        look(following.version)
        machine.run("grep", "-q", "^NEXT = ", "/usr/share/scx-enroll/scx_enroll/hresult.py")
        machine.run("dpkg", "-i", "--force-confold", PACKAGE)
        look(packages.current().version)
        machine.run("dpkg", "-i", PACKAGE)
        look(packages.current().version)
        said = machine.run("dpkg", "--remove", "scx-enroll").stdout
        assert f"goes on serving the certificate that was issued, {LINK}" in said
        look("")
        assert machine.run("sh", "-c", "ls -d /usr/share/scx-enroll /usr/sbin/scx-enroll", check=False).stdout == ""
        machine.run("test", "-s", "/var/lib/scx-enroll/journal.json")
        machine.run("dpkg", "-i", PACKAGE)
        look(packages.current().version)
        said = machine.run("dpkg", "--purge", "scx-enroll").stdout
        assert "/etc/scx-enroll holds files of yours" in said
        look("")
        left = machine.run("sh", "-c", "find / -xdev -name '*scx-enroll*' -not -path '/srv/*' -not -path '/proc/*' -not -path '/var/log/*'")
        assert [path for path in left.stdout.split() if not path.startswith(("/etc/scx-enroll", "/etc/opt/omi/ssl/scx-enroll-"))] == []
        machine.run("test", "-s", "/etc/scx-enroll/password")
        machine.run("dpkg", "-i", PACKAGE)  # what is installed is found valid, and taken over
        look(packages.current().version, configured=False)
        assert "adopted" in machine.run("scx-enroll", "status").stdout + machine.journal(SERVICE)


def test_a_release_upgrade_leaves_byte_code_of_the_old_python(image: Callable[[str], Image]) -> None:
    """dpkg tells when /usr/bin/python3 is another one: a unit that can't write would compile the program at each run."""
    made = image(NEWEST)
    made.shell("rm -rf /usr/share/scx-enroll/scx_enroll/__pycache__; dpkg-trigger --no-await /usr/bin/python3; dpkg --triggers-only --pending")
    assert made.run("sh", "-c", "ls /usr/share/scx-enroll/scx_enroll/__pycache__").stdout.count(".pyc") > 20


@pytest.mark.parametrize("how", ["by hand", "by the timer"])
@pytest.mark.parametrize("operation", ["upgrade", "remove"])
def test_a_run_in_progress_when_the_package_changes(image: Callable[[str], Image], tmp_path: Path, operation: str, how: str) -> None:
    """One by hand is waited for, the timer's ends after its step; neither loads modules of two versions, nor is left half done."""
    with Machine(image(NEWEST), "host1") as machine, machine.ca(tmp_path / "ca") as ca:
        ca.steer("--set", "slow=4", "--set", "slow_on=post")
        machine.install_agent()
        configure(machine, machine.fqdn, ca)
        machine.copy(packages.following().deb, "/srv/next.deb")
        if how == "by hand":
            running = machine.spawn("scx-enroll", "run")
        else:
            machine.run("systemctl", "start", "--no-block", SERVICE)
        machine.wait_for(lambda: ca.posts, what="the request is on its way")
        machine.run("dpkg", *(("-i", "/srv/next.deb") if operation == "upgrade" else ("--remove", "scx-enroll")), timeout=120)
        if how == "by hand":
            said = running.communicate()[0]
            assert "error: dpkg is changing packages" in said  # what was issued is kept, and installed by the next run
            assert running.returncode == 4
        else:
            assert machine.run("systemctl", "--failed", "--no-legend").stdout == ""
            assert machine.unit("scx-enroll-again.timer", "ActiveState") == "inactive" or operation == "upgrade"
        assert "Traceback" not in machine.journal(SERVICE)
        assert machine.served() == installed(machine)
        ca.steer("--reset")
        if operation == "remove":
            machine.run("dpkg", "-i", PACKAGE)
        machine.run("scx-enroll", "run", "--now")
        assert (is_enrolled(machine), issued(ca)) == (True, 1)


# -- the service -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["by the timer", "by hand"])
def test_an_agent_that_its_scripts_start_by_hand_is_shut_in_or_ended(
    image: Callable[[str], Image], tmp_path: Path, how: str
) -> None:
    """With omid.service masked, the agent that our restart brings up is alive and unconfined a minute after our unit ended, on each release."""

    def check(suite: str) -> str:
        with Machine(image(suite), "host1") as machine, machine.ca(tmp_path / f"ca-{suite}") as ca:
            machine.install_agent()
            configure(machine, machine.fqdn, ca)
            machine.run("systemctl", "mask", "omid")  # it can be stopped, and not started
            machine.run(*(("scx-enroll", "run") if how == "by hand" else ("systemctl", "start", SERVICE)))
            assert is_enrolled(machine), machine.journal(SERVICE)
            time.sleep(60 if how == "by the timer" else 5)
            pid = int(agent_of(machine)["pid"])
            status = machine.read(f"/proc/{pid}/status")
            assert is_enrolled(machine)
            assert SERVICE not in machine.read(f"/proc/{pid}/cgroup")
            for kind in ("mnt", "net", "uts"):
                assert machine.run("readlink", f"/proc/{pid}/ns/{kind}").stdout == machine.run("readlink", f"/proc/1/ns/{kind}").stdout
            assert re.search(r"^NoNewPrivs:\s+0$", status, re.MULTILINE)
            assert re.search(r"^Seccomp:\s+0$", status, re.MULTILINE) or machine.read("/proc/1/status").count("Seccomp:\t2")
            bounding = re.compile(r"^CapBnd:\s+(\w+)$", re.MULTILINE)
            assert bounding.findall(status) == bounding.findall(machine.read("/proc/1/status"))
            machine.run("systemctl", "start", SERVICE)
            assert machine.run("systemctl", "--failed", "--no-legend").stdout == ""
            done = machine.run("scx-enroll", "run", "--renew", check=False, timeout=120)  # its unit is still there; a restart is a no-op then
            assert "already" not in done.stdout + done.stderr + machine.journal(CONTROL)
            assert is_enrolled(machine)
        return suite

    suites = roots.SUITES if how == "by the timer" else (NEWEST,)
    with ThreadPoolExecutor(len(suites)) as pool:
        assert tuple(pool.map(check, suites)) == tuple(suites)


def test_an_agent_that_does_not_do_what_the_sandbox_tells_it(image: Callable[[str], Image], tmp_path: Path) -> None:
    """The service, which sees no process, cures a stray and a unit over its start limit, and reloads what it has seen to be the agent."""
    with enrolled(image(NEWEST), tmp_path) as (machine, ca):
        machine.run("systemctl", "stop", "scx-enroll.path", "scx-enroll-soon.timer")
        ours, posts = machine.served(), ca.posts

        def pid() -> int:
            return int(agent_of(machine)["pid"])

        def look() -> None:
            machine.run("systemctl", "start", SERVICE, timeout=120)
            said = machine.journal(SERVICE) + machine.journal(CONTROL)
            assert (machine.served(), installed(machine), ca.posts) == (ours, ours, posts), said
            assert machine.read(f"/proc/{pid()}/cgroup").strip().endswith("/system.slice/omid.service"), said

        machine.run("systemctl", "stop", "omid")
        machine.agent("move-link-back")
        machine.run("/opt/omi/bin/omiserver", "-d")
        machine.wait_for(machine.served, what="the stray serves")
        stray, restarts = pid(), agent_of(machine)["restarts"]
        look()
        assert pid() != stray
        assert agent_of(machine)["restarts"] == restarts, "one that would have been in vain"

        machine.write("/etc/systemd/system/omid.service.d/slow.conf", "[Unit]\nStartLimitIntervalSec=10min\n")  # for a loaded machine
        machine.shell("systemctl daemon-reload; for time in 1 2 3 4 5 6; do systemctl restart omid || :; done", check=False)
        assert machine.unit("omid", "Result") == "start-limit-hit"
        assert not machine.served()
        look()

        machine.run("scx-enroll", "release")  # or the link, moved again, would be a fight
        machine.shell("rm /var/lib/scx-enroll/budget.json; printf '[agent]\\nactivation = reload\\n' >/etc/scx-enroll/conf.d/reload.conf")
        machine.agent("move-link-back")
        machine.run("/opt/omi/bin/omiserver", "-r")
        machine.wait_for(lambda: machine.served() != ours, what="its own is served")
        before = pid()
        look()
        assert pid() == before, machine.journal(SERVICE)


def test_a_tick_that_starts_the_service_for_nothing_or_fails_to(image: Callable[[str], Image], tmp_path: Path) -> None:
    """While the last answer stands the service and its sandbox rest; a change starts it; a Python that is gone shows."""
    with enrolled(image(NEWEST), tmp_path) as (machine, _ca):
        machine.run("systemctl", "stop", "scx-enroll.path", "scx-enroll-soon.timer")

        def started() -> str:
            return machine.unit(SERVICE, "ExecMainStartTimestampMonotonic")

        time.sleep(2)  # files of this second are no premises
        machine.run("systemctl", "start", SERVICE)
        before, told = started(), facts(machine)["time"]
        time.sleep(1)
        machine.run("systemctl", "start", TICK)
        assert (started(), facts(machine)["time"] > told) == (before, True)
        ours = machine.served()
        machine.agent("scom-sign")
        machine.run("systemctl", "start", TICK)
        machine.wait_for(lambda: machine.served() == ours, what="ours is served again")
        assert started() != before
        machine.wait_for(lambda: machine.unit(SERVICE, "ActiveState") == "inactive", what="the run has ended")
        machine.shell("mv /usr/bin/python3 /usr/bin/python3-gone")
        assert machine.run("systemctl", "start", TICK, check=False).returncode != 0
        assert TICK in machine.run("systemctl", "--failed", "--no-legend").stdout


def test_a_killed_run_leaves_a_control_command_that_nobody_waits_for(image: Callable[[str], Image], tmp_path: Path) -> None:
    """The command is a unit of its own and goes on: the next run waits for it, and then finishes what was begun."""
    with Machine(image(NEWEST), "host1") as machine, machine.ca(tmp_path / "ca") as ca:
        machine.install_agent()
        configure(machine, machine.fqdn, ca)
        machine.agent("set", "restart_takes=6")
        machine.run("systemctl", "start", "--no-block", SERVICE)
        machine.wait_for(lambda: "activating" in control(machine), what="the agent is being restarted")
        machine.run("systemctl", "kill", "--signal=KILL", SERVICE)
        machine.wait_for(lambda: machine.unit(SERVICE, "ActiveState") == "failed", what="the run is dead")
        assert "activating" in control(machine)
        machine.run("systemctl", "start", SERVICE)
        assert is_enrolled(machine)
        assert (issued(ca), json.loads(machine.agent("show").stdout)["restarts"]) == (1, 1)


@pytest.mark.parametrize("how", ["in order", "by the plug"])
def test_a_machine_that_goes_down_while_its_agent_is_restarted(image: Callable[[str], Image], tmp_path: Path, how: str) -> None:
    """The installation stays open, the shutdown is not held up, and after the boot the host ends with the one certificate it asked for."""
    made = image(NEWEST)
    hurry(made)
    with Machine(made, "host1") as machine, machine.ca(tmp_path / "ca") as ca:
        machine.install_agent()
        configure(machine, machine.fqdn, ca)
        machine.agent("set", "restart_takes=5")
        machine.run("systemctl", "start", "--no-block", SERVICE)
        machine.wait_for(lambda: "activating" in control(machine), what="the agent is being restarted")
        began = time.monotonic()
        if how == "in order":
            machine.poweroff()
        else:
            machine.cut_power()
        assert time.monotonic() - began < 20
        machine.boot()
        machine.wait_for(lambda: is_enrolled(machine), what="the agent serves it after the boot")
        machine.wait_for(lambda: facts(machine)["exit_status"] == 0, what="the next look has settled it")
        assert '"installing"' not in machine.read("/var/lib/scx-enroll/journal.json")
        assert issued(ca) == 1


@each_suite
def test_a_host_that_comes_at_another_minute_each_time(image: Callable[[str], Image], suite: str) -> None:
    """The minute of the hourly look is the host's own: the same after the timer's and the machine's restart, another on another host.

    What was missed while the host was off comes within the hour.
    """
    made = image(suite)

    def minute(machine: Machine) -> int:
        shown = machine.unit("scx-enroll.timer", "NextElapseUSecRealtime")
        return int(machine.run("date", "-d", shown, "+%s").stdout) % 3600

    with Machine(made, "host1") as one, Machine(made, "host2") as other:
        first = minute(one)
        one.run("systemctl", "restart", "scx-enroll.timer")
        assert abs(minute(one) - first) <= 60
        assert minute(other) != first
        one.run("touch", "-d", "3 hours ago", "/var/lib/systemd/timers/stamp-scx-enroll.timer")
        one.reboot()
        shown = one.unit("scx-enroll.timer", "NextElapseUSecRealtime")
        assert int(one.run("date", "-d", shown, "+%s").stdout) - time.time() < 3600
        assert one.unit("scx-enroll.timer", "Persistent") == "yes"


@each_suite
def test_a_change_by_others_stays_until_the_next_hour(image: Callable[[str], Image], suite: str, tmp_path: Path) -> None:
    """SCOM signs the certificate anew: the path unit sees it, the service puts ours back, and what that writes starts nothing more."""
    made = image(suite)
    hurry(made)
    with enrolled(made, tmp_path) as (machine, ca):
        ours, posts = machine.served(), ca.posts
        machine.wait_for(lambda: machine.unit("scx-enroll.path", "SubState") == "waiting", what="our own changes are over")
        machine.agent("scom-sign")
        assert machine.served() != ours
        machine.wait_for(lambda: machine.served() == ours, timeout=60, what="ours is served again")
        machine.wait_for(lambda: machine.unit(SERVICE, "ActiveState") == "inactive", what="the run has ended")
        assert (is_enrolled(machine), ca.posts) == (True, posts)
        count, restarts = looks(machine), agent_of(machine)["restarts"]
        time.sleep(8)
        assert looks(machine) <= count + 1
        assert agent_of(machine)["restarts"] == restarts
        assert machine.unit("scx-enroll.path", "ActiveState") == "active"


def test_two_programs_that_rewrite_a_name_for_ever(image: Callable[[str], Image], tmp_path: Path) -> None:
    """Configuration management puts its link back at once, and the path unit tells us: one cure, then a truce, a failed service, and peace until a person ends it."""
    made = image(NEWEST)
    hurry(made, 1)
    with enrolled(made, tmp_path) as (machine, ca):
        machine.wait_for(lambda: machine.unit("scx-enroll.path", "SubState") == "waiting", what="our own changes are over")
        ours, before, key = machine.served(), agent_of(machine), machine.run("sha256sum", "/etc/opt/omi/ssl/omikey.pem").stdout
        theirs = machine.run("sh", "-c", "ls /etc/opt/omi/ssl/omi-host-*").stdout.strip()
        # what is done before a look has wholly ended, the path unit does not see: the next hour's look does
        seen = "systemctl show --value -p SubState scx-enroll.path | grep -q waiting"
        again = f"while :; do [ $(readlink {LINK}) = {theirs} ] || {{ {seen} && ln -sfn {theirs} {LINK}; }}; sleep 0.2; done"
        machine.run("systemd-run", "--quiet", "--unit=management", "sh", "-c", again)
        machine.wait_for(lambda: machine.unit(SERVICE, "ActiveState") == "failed", what="it is a fight")
        journal = machine.journal(SERVICE)
        assert journal.count("scx-enroll: linked generation") == 1, journal
        assert "waiting: truce: others rewrote the agent's certificate again after it was put right" in journal
        assert "then: scx-enroll release" in journal
        machine.wait_for(lambda: machine.unit("scx-enroll.path", "SubState") == "waiting", what="what was written is seen")
        count = looks(machine)
        time.sleep(3)
        machine.run("systemctl", "start", TICK)
        machine.wait_for(lambda: machine.unit(SERVICE, "ActiveState") == "failed", what="it fails again")
        assert looks(machine) <= count + 1
        assert machine.run("readlink", LINK).stdout.strip() == theirs
        assert (agent_of(machine), ca.posts, machine.run("sha256sum", "/etc/opt/omi/ssl/omikey.pem").stdout) == (before, 1, key)
        told = facts(machine)
        assert (told["exit_status"], told["row"], told["served"]) == (4, "L7", ours), "nobody restarted it, so it serves ours all the time"
        assert 3500 < told["until"] - told["changes"][-1]["time"] <= 3600
        machine.run("systemctl", "stop", "management")
        assert machine.run("scx-enroll", "release").stdout == "scx-enroll: released; the next run goes on\n"
        machine.run("systemctl", "start", SERVICE)
        assert (is_enrolled(machine), agent_of(machine), ca.posts) == (True, before, 1)
        assert machine.run("systemctl", "--failed", "--no-legend").stdout == ""


@each_suite
def test_a_storm_of_changes_runs_into_a_limit_or_starts_a_run_each(image: Callable[[str], Image], suite: str, tmp_path: Path) -> None:
    """A thousand changes in half a minute are a handful of looks; afterwards the path unit still works."""
    made = image(suite)
    hurry(made, 5)
    with enrolled(made, tmp_path) as (machine, _ca):
        machine.wait_for(lambda: machine.unit("scx-enroll.path", "SubState") == "waiting", what="our own changes are over")
        count, began = looks(machine), time.monotonic()
        storm = "i=0; while [ $i -lt 1000 ]; do : >/etc/opt/omi/ssl/storm; rm /etc/opt/omi/ssl/storm; sleep 0.02; i=$((i+1)); done"
        machine.shell(storm, timeout=120)
        took = time.monotonic() - began
        assert 1 <= looks(machine) - count <= took / 5 + 2
        for unit in ("scx-enroll.path", "scx-enroll-soon.timer", SERVICE):
            assert machine.unit(unit, "ActiveState") != "failed"
        machine.wait_for(lambda: machine.unit("scx-enroll.path", "SubState") == "waiting", what="the storm is over")
        ours = machine.served()
        machine.agent("scom-sign")
        machine.wait_for(lambda: machine.served() == ours, timeout=60, what="a change after the storm is seen")


def test_a_unit_fails_while_it_only_waits_or_not_where_a_person_is_needed(image: Callable[[str], Image], tmp_path: Path) -> None:
    """A pending request is polled within the hour, and no failure; a wrong password is, with cause and next step, and stays one."""
    with Machine(image(NEWEST), "host1") as machine, machine.ca(tmp_path / "ca") as ca:
        ca.steer("--set", "mode=pending")
        machine.install_agent()
        configure(machine, machine.fqdn, ca)
        machine.run("systemctl", "start", SERVICE)
        assert (facts(machine)["exit_status"], machine.unit(SERVICE, "Result")) == (7, "success")
        left = machine.unit("scx-enroll-again.timer", "NextElapseUSecMonotonic")
        assert machine.unit("scx-enroll-again.timer", "ActiveState") == "active", left
        assert machine.run("systemctl", "--failed", "--no-legend").stdout == ""
        ca.steer("--approve", "1", "--set", "mode=")
        machine.wait_for(lambda: is_enrolled(machine), timeout=100, what="the poll after a minute has fetched it")
        ca.steer("--set", "mode=pending")
        machine.shell("sed -i 's/^template.*/&\\n/; s/^settle.*/&/' /etc/scx-enroll/conf.d/site.conf")
        machine.run("scx-enroll", "run", "--renew", check=False)
        machine.run("systemctl", "start", SERVICE)
        assert machine.unit("scx-enroll-again.timer", "ActiveState") == "active"
        machine.run("systemctl", "stop", "scx-enroll.path", "scx-enroll-soon.timer", "scx-enroll.timer")
        assert machine.unit("scx-enroll-again.timer", "ActiveState") == "inactive"
        machine.run("systemctl", "start", SERVICE)
        assert machine.unit("scx-enroll-again.timer", "ActiveState") == "inactive"
    (tmp_path / "second").mkdir()
    with Machine(image("bookworm"), "host2") as machine, machine.ca(tmp_path / "second" / "ca") as ca:
        machine.install_agent()
        configure(machine, machine.fqdn, ca, password="Marker-Wrong-1")
        for _ in range(2):
            assert machine.run("systemctl", "start", SERVICE, check=False).returncode != 0
            assert SERVICE in machine.run("systemctl", "--failed", "--no-legend").stdout
        said = machine.journal(SERVICE)
        assert "error: " in said
        assert "(HTTP 401)" in said
        assert "hint: " in said
        assert "Marker-Wrong-1" not in machine.run("journalctl", "--no-pager", "-b").stdout
        machine.write("/etc/scx-enroll/password", ca.password, 0o600)
        machine.run("systemctl", "start", SERVICE)
        assert (is_enrolled(machine), machine.run("systemctl", "--failed", "--no-legend").stdout) == (True, "")


def test_a_restart_window_by_another_clock_than_the_machines(image: Callable[[str], Image], tmp_path: Path) -> None:
    """The service goes by /etc/localtime, in a night without that hour too: it arranges a look for the very moment, and sees another zone come."""
    with enrolled(image(NEWEST), tmp_path) as (machine, ca):
        machine.run("systemctl", "stop", "scx-enroll.path", "scx-enroll-soon.timer")
        jump = int(time.time()) // 60 * 60 + 4 * 60  # in the hour after a boot it looks each five minutes anyway
        wall = (jump // 60 + 7 * 60) % zones.DAY_MIN

        def move(wall: int) -> None:
            machine.shell("rm -f /etc/localtime")
            machine.write("/etc/localtime", zones.localtime(zones.place(jump, wall % zones.DAY_MIN)))

        def window(begins: int, ends: int) -> None:
            """It is open between these minutes from the jump, as the clock has them that nobody put forward."""
            hours = (f"{moment % zones.DAY_MIN // 60:02}:{moment % 60:02}" for moment in (wall + begins, wall + ends))
            machine.write("/etc/scx-enroll/conf.d/window.conf", f"[agent]\nrestart-window = {'-'.join(hours)}\n")

        def waits() -> int:
            """Return until when the service waits, and changes nothing."""
            machine.run("systemctl", "start", SERVICE)
            assert (facts(machine)["exit_status"], facts(machine)["row"], facts(machine)["generation"]) == (4, "L7", generation)
            assert (agent_of(machine), ca.posts, machine.shell(look).stdout) == (before, 2, pair)
            assert machine.run("systemctl", "--failed", "--no-legend").stdout == ""
            return int(facts(machine)["until"])

        move(wall)
        assert machine.run("date", "-d", f"@{jump}", "+%H:%M").stdout.strip() == time.strftime("%H:%M", time.gmtime((wall + 60) * 60))
        window(0, 60)
        look = "cd /etc/opt/omi/ssl; ls -lA --time-style=+; sha256sum omi.pem omikey.pem"
        before, pair, generation = agent_of(machine), machine.shell(look).stdout, facts(machine)["generation"]
        assert machine.run("scx-enroll", "run", "--renew", check=False).returncode == 4
        assert waits() == jump + 23 * 3600
        window(30, 120)
        assert waits() == jump
        (timer,) = json.loads(machine.run("systemctl", "list-timers", "--output=json", "scx-enroll-again.timer").stdout)
        assert abs(timer["next"] / 1e6 - jump) < 10
        time.sleep(2)  # files of this second are no premises
        assert waits() == jump
        machine.run("systemctl", "start", TICK)
        assert (agent_of(machine), looks(machine)) == (before, 4)
        move(wall + 75)
        machine.run("systemctl", "start", TICK)
        machine.wait_for(lambda: is_enrolled(machine) and machine.served() != before["served"], what="the new one is served")
        assert (agent_of(machine)["restarts"], ca.posts) == (before["restarts"] + 1, 2)


def test_files_that_were_moved_out_of_the_sandbox(image: Callable[[str], Image], tmp_path: Path) -> None:
    """`pemfile=` leads elsewhere: nothing is asked for, the error prints the drop-in, and the delivered example does it."""
    with Machine(image(NEWEST), "host1") as machine, machine.ca(tmp_path / "ca") as ca:
        machine.install_agent(started=False)
        machine.shell(
            "mkdir -p /srv/agent; cp -aL /etc/opt/omi/ssl /srv/agent/; chmod 0755 /srv/agent /srv/agent/ssl\n"
            "chmod 0644 /etc/opt/omi/conf/omiserver.conf; echo pemfile=/srv/agent/ssl/omi.pem >>/etc/opt/omi/conf/omiserver.conf"
        )
        machine.agent("start")
        configure(machine, machine.fqdn, ca)
        assert machine.run("systemctl", "start", SERVICE, check=False).returncode != 0
        said = machine.journal(SERVICE)
        assert "error: can't write /srv/agent/ssl/omi.pem: Read-only file system" in said
        assert "[Service] and ReadWritePaths=/srv/agent/ssl" in said
        assert ca.posts == 0
        machine.shell(documented("packages.md", "moved-files.conf"))
        machine.run("systemctl", "start", SERVICE)
        shown = machine.run("openssl", "x509", "-in", "/srv/agent/ssl/omi.pem", "-noout", "-fingerprint", "-sha256").stdout
        assert machine.served() == shown.partition("=")[2].strip().replace(":", "").lower()
        assert (issued(ca), facts(machine)["exit_status"]) == (1, 0)


def test_files_of_the_agents_account_that_the_sandbox_keeps_from_being_put_back(image: Callable[[str], Image], tmp_path: Path) -> None:
    """The agent dies of the new certificate: a regular omi.pem of the account's, its mode and the package's marker come back, unattended."""
    with Machine(image(NEWEST), "host1") as machine, machine.ca(tmp_path / "ca") as ca:
        machine.install_agent(layout="omi-regular")
        configure(machine, machine.fqdn, ca)
        machine.shell("chown omi:omi /etc/opt/omi/ssl/omi.pem; chmod 0600 /etc/opt/omi/ssl/omi.pem")
        look = "stat -c '%n %F %U:%G %a' /etc/opt/omi/ssl/omi.pem /etc/opt/omi/ssl/.omi_cert_marker; sha256sum /etc/opt/omi/ssl/omi.pem"
        before, served = machine.shell(look).stdout, machine.served()
        machine.agent("refuse-new")
        assert machine.run("systemctl", "start", SERVICE, check=False, timeout=180).returncode != 0
        assert facts(machine)["exit_status"] == 9
        assert (machine.shell(look).stdout, machine.served()) == (before, served)


@pytest.mark.parametrize("folder", ["/etc/opt/omi/ssl", "/etc/opt/microsoft/scx/ssl"])
def test_a_folder_of_the_agent_that_nobody_watches(image: Callable[[str], Image], folder: str) -> None:
    """A change in either, also in one that comes after the boot, starts the look that follows in two minutes."""
    with Machine(image(NEWEST), "host1") as machine:
        machine.run("systemctl", "stop", "scx-enroll-soon.timer")
        machine.wait_for(lambda: machine.unit("scx-enroll.path", "SubState") == "waiting", what="it watches")
        machine.shell(f"mkdir -p {folder}; : >{folder}/x")
        machine.wait_for(lambda: machine.unit("scx-enroll-soon.timer", "ActiveState") == "active", what="a look is on its way")


def documented(page: str, word: str) -> str:
    """The commands of a page's block that has this word."""
    text = (packages.CHECKOUT / "docs" / page).read_text(encoding="utf-8")
    return next(block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if word in block)


@each_suite
def test_a_password_that_only_systemd_hands_over(image: Callable[[str], Image], suite: str, tmp_path: Path) -> None:
    """The delivered drop-ins for credentials work as they stand; the encrypted one where the release has it."""
    with Machine(image(suite), "host1") as machine, machine.ca(tmp_path / "ca") as ca:
        machine.install_agent()
        configure(machine, machine.fqdn, ca)
        machine.shell("install -d -m 0700 /etc/scx-enroll-secrets; mv /etc/scx-enroll/password /etc/scx-enroll-secrets/password")
        assert machine.run("systemctl", "start", SERVICE, check=False).returncode != 0
        machine.shell(documented("packages.md", "credential.conf"))
        machine.run("systemctl", "start", SERVICE)
        assert is_enrolled(machine)
        if suite != "bullseye":  # systemd 247 has plain ones only
            drop_in = "/etc/systemd/system/scx-enroll.service.d/credential.conf"
            command = re.search(r"^#   (systemd-creds .*)$", machine.read(drop_in), re.MULTILINE)
            assert command
            machine.shell(f"{command[1]} </etc/scx-enroll-secrets/password; rm /etc/scx-enroll-secrets/password")
            machine.shell(f"sed -i -e 's/^LoadCredential=/#&/' -e 's/^#LoadCredentialEncrypted=/LoadCredentialEncrypted=/' {drop_in}; systemctl daemon-reload")
            machine.shell("rm -rf /var/lib/scx-enroll/generations /var/lib/scx-enroll/journal.json")
            machine.agent("scxsslconfig-f")
            machine.agent("restart")
            machine.run("systemctl", "start", SERVICE)
            assert (is_enrolled(machine), issued(ca)) == (True, 2)


@pytest.mark.parametrize("word", ["schedule.conf", "window.conf"])
def test_an_example_of_another_schedule_that_does_not_work(image: Callable[[str], Image], word: str) -> None:
    """The commands of docs/packages.md, as they stand: the timer has its new times, and no unit complains."""
    with Machine(image(NEWEST), "host1") as machine:
        machine.shell(documented("packages.md", word))
        calendar = machine.unit("scx-enroll.timer", "TimersCalendar")
        assert ("06:00" if word == "schedule.conf" else "02:00") in calendar
        assert "hourly" not in calendar
        assert ":00:00 ;" not in calendar.replace("06:00:00", "").replace("02:00:00", "")
        assert machine.unit("scx-enroll.path", "ActiveState") == ("active" if word == "schedule.conf" else "inactive")
        assert machine.run("systemctl", "--failed", "--no-legend").stdout == ""


def test_cron_does_what_the_timer_does(image: Callable[[str], Image], tmp_path: Path) -> None:
    """The delivered line's command with cron's environment, where no systemd runs."""
    made = image(NEWEST)
    line = re.search(r"^17 \* \* \* \* root (.*)$", made.read("/usr/share/doc/scx-enroll/examples/scx-enroll.cron"), re.MULTILINE)
    assert line
    ran = made.run("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LOGNAME=root", "SHELL=/bin/sh", "sh", "-c", line[1])
    assert "not configured yet" in ran.stdout
    assert made.run("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-c", line[1]).stdout in ("", ran.stdout)


# -- first boot --------------------------------------------------------------------------------------------------------


@pytest.mark.asleep
def test_a_first_boot_at_which_everything_comes_late(image: Callable[[str], Image], tmp_path: Path) -> None:
    """From an image with package and configuration: the agent, the network and the CA come after the boot, and nobody does anything.

    On each release the boot is neither delayed nor failed by it, and the host ends enrolled, once. That takes the five minutes after which
    the first attempt is repeated.
    """

    def check(suite: str) -> str:
        made = image(suite)
        hurry(made, 6)
        machine = Machine(made, "host1", network="late")
        try:
            with machine.ca(tmp_path / f"ca-{suite}") as ca:
                configure(machine.off, machine.fqdn, ca, settle="3s")
                late = roots.SUITES.index(suite) % 2 == 0  # the network; at the others the CA
                if not late:
                    ca.steer("--set", "unavailable=all")
                    machine.network_up()
                machine.boot()
                assert machine.run("systemctl", "is-system-running").stdout == "running\n"
                machine.wait_for(lambda: facts(machine)["exit_status"] == 4, what="the first look found no agent")
                machine.install_agent()
                machine.wait_for(lambda: facts(machine)["exit_status"] == 5, what="the second found no CA")
                if late:
                    machine.network_up()
                ca.steer("--reset")
                machine.wait_for(lambda: is_enrolled(machine), timeout=330, what="the host is enrolled")
                machine.wait_for(lambda: machine.unit(SERVICE, "ActiveState") == "inactive", what="the run has ended")
                assert (issued(ca), ca.posts) == (1, 1)
                assert machine.run("systemctl", "--failed", "--no-legend").stdout == ""
                assert "Failed to start" not in machine.journal(SERVICE)
        finally:
            machine.close()
        return suite

    with ThreadPoolExecutor(len(roots.SUITES)) as pool:
        assert tuple(pool.map(check, roots.SUITES)) == roots.SUITES


def test_a_machine_of_a_sealed_image_uses_its_key_or_state(image: Callable[[str], Image], tmp_path: Path) -> None:
    """The first boot's machine-id, made by systemd, arms what the image holds, in the sandbox too; a second boot is the same machine."""
    made = image(NEWEST)
    made.install_agent(key="ec:secp256r1")
    assert "is in the image" in made.run("scx-enroll", "seal").stdout
    assert made.run("scx-enroll", "run", check=False).returncode == 4
    listed = "/etc/opt/omi/ssl/.scx-enroll-baked-in"
    with Machine(made, "host1") as machine, machine.ca(tmp_path / "ca") as ca:
        configure(machine, machine.fqdn, ca)
        machine.run("systemctl", "start", SERVICE, check=False)
        assert is_enrolled(machine), machine.journal(SERVICE)
        assert "set another machine's state aside" in machine.journal(SERVICE)
        key = machine.shell("openssl pkey -in /etc/opt/omi/ssl/omikey.pem -pubout -outform DER | sha256sum | cut -c1-64").stdout
        assert key not in machine.read(listed)
        machine.reboot()
        machine.run("systemctl", "start", SERVICE)
        assert machine.run("ls", "/var/lib/scx-enroll/foreign").stdout == "1\n"
        assert (issued(ca), ca.posts) == (1, 1)
