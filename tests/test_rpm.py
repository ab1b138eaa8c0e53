"""The rpm as dnf installs, upgrades and removes it, beneath a folder with busybox, from repositories whose packages are named as those of
the distributions. Their Pythons are scripts that fail where the real ones would; they and `systemctl` write down what they are asked.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Tuple

import pytest

from tests import packages

pytestmark = pytest.mark.slow

APPLETS = ("sh", "cat", "grep", "ln", "ls", "mkdir", "readlink", "rm", "true")
UNITS = ("scx-enroll.path", "scx-enroll-soon.timer", "scx-enroll.timer")
PROGRAM = "usr/share/scx-enroll"
CONFIGURATION = "etc/scx-enroll/scx-enroll.conf"
LINK = f"{PROGRAM}/python"
CHECK = "import sys, cryptography, requests; sys.exit(sys.version_info < (3, 9))"

PYTHON = """#!/bin/sh
echo "$0 $*" >>/lab/log
place=/usr/lib/python@number@/site-packages
case "$*" in
"-I -c @check@") @new@ && [ -e $place/cryptography ] && [ -e $place/requests ] ;;
"-I -m compileall -q /@program@")
    for folder in /@program@ /@program@/scx_enroll; do
        mkdir -p $folder/__pycache__
        echo @number@ >$folder/__pycache__/module.pyc
    done
    ;;
*) exit 64 ;;
esac
"""
SYSTEMCTL = """#!/bin/sh
there=$(grep -h ^__version__ /@program@/scx_enroll/__init__.py 2>/dev/null)
echo "systemctl $* | ${there:-gone}" >>/lab/log
case "$1 $2" in
"preset "*) shift; for unit; do echo >/lab/enabled/$unit; done ;;
"--no-reload disable") shift 2; for unit; do rm -f /lab/enabled/$unit; done ;;
"--quiet is-enabled") [ -e /lab/enabled/$3 ] ;;
esac
"""
FLOCK = """#!/bin/sh
echo "flock $*" >>/lab/log
[ ! -e /lab/held ]
"""


@dataclass(frozen=True)
class Family:
    """A distribution's Python: its package, what comes before the names of its libraries', and whether it is /usr/bin/python3."""

    package: str
    version: str
    libraries: str
    provides: Tuple[str, ...] = ()
    default: bool = False
    link: str = ""  # what /usr/bin/python3 is

    @property
    def number(self) -> str:
        return ".".join(self.version.split(".")[:2])


def beside(package: str, version: str) -> Family:
    return Family(package, version, f"{package}-")


RHEL_8 = Family("python36", "3.6.8", "python3-", ("python3 = 3.6.8",), default=True, link="/etc/alternatives/python3")
SLES_15 = Family("python3", "3.6.15", "python3-", default=True)
REPOSITORIES: Dict[str, Tuple[Family, ...]] = {
    "RHEL 8.10": (RHEL_8, beside("python39", "3.9.20"), beside("python3.11", "3.11.13"), beside("python3.12", "3.12.11")),
    "RHEL 8.8": (RHEL_8, beside("python39", "3.9.16"), beside("python3.11", "3.11.2")),
    "RHEL 8.4": (RHEL_8, beside("python39", "3.9.2")),
    "RHEL 8 without a newer Python": (RHEL_8,),
    "RHEL 9": (Family("python3", "3.9.21", "python3-", default=True), beside("python3.11", "3.11.11"), beside("python3.12", "3.12.9")),
    "RHEL 10": (Family("python3", "3.12.9", "python3-", default=True),),
    "SLES 15": (SLES_15, beside("python311", "3.11.13")),
    # what is called python3-... is only provided
    "SLES 16": (Family("python313", "3.13.5", "python313-", ("python3 = 3.13.5",), default=True), beside("python311", "3.11.13")),
}


class Host:
    """A folder with the distribution's default Python and its repository, in which dnf runs scripts for real."""

    def __init__(self, place: Path, distribution: str, *, bare: bool = False) -> None:
        self.place, self.root, self.families = place, place / "root", REPOSITORIES[distribution]
        self.make_root()
        self.make_repository()
        self.default = next(family for family in self.families if family.default)
        self.alternative(f"python{self.default.number}")
        if not bare:
            self.dnf("install", self.default.package, "util-linux")

    def make_root(self) -> None:
        for folder in ("bin", "usr/bin", "dev", "tmp", "lab/enabled", "run/systemd/system", "var/lib"):
            (self.root / folder).mkdir(parents=True)
        shutil.copy(shutil.which("busybox"), self.root / "bin" / "busybox")
        for applet in APPLETS:
            (self.root / "bin" / applet).symlink_to("busybox")
        (self.root / "dev" / "null").touch()
        (self.root / "usr/bin/systemctl").write_text(SYSTEMCTL.replace("@program@", PROGRAM), encoding="utf-8")
        (self.root / "usr/bin/systemctl").chmod(0o755)

    def make_repository(self) -> None:
        here = self.place / "repository"
        here.mkdir()
        packages.stub(here, "util-linux", "2.32", {"/usr/bin/flock": FLOCK})
        packages.stub(here, "python3-gssapi", "1.5.1", depends=[f"python(abi) = {self.families[0].number}"])
        for family in self.families:
            script = PYTHON
            for name, value in (("number", family.number), ("check", CHECK), ("program", PROGRAM), ("new", str(family.number != "3.6").lower())):
                script = script.replace(f"@{name}@", value)
            files = {f"/usr/bin/python{family.number}": script}
            if family.default:
                files["/usr/bin/python3"] = f"-> {family.link or f'python{family.number}'}"
            packages.stub(here, family.package, family.version, files, provides=[f"python(abi) = {family.number}", *family.provides])
            for library in ("cryptography", "requests"):
                name = family.libraries + library
                provides = [f"python3-{library} = 9.9"] if family.default and not name.startswith("python3-") else []
                packages.stub(
                    here, name, "9.9", {f"/usr/lib/python{family.number}/site-packages/{library}": ""}, depends=[family.package], provides=provides
                )
        self.next = self.place / "next"
        self.next.mkdir()
        shutil.copy(packages.current().rpm, here)
        shutil.copy(packages.following().rpm, self.next)
        for folder in (here, self.next):
            packages.output_of("createrepo_c", "-q", folder)

    def alternative(self, name: str) -> None:
        """What `alternatives --set python3` does."""
        link = self.root / "etc/alternatives/python3"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(f"/usr/bin/{name}")

    def run(self, *words: str, next_version: bool = False) -> "subprocess.CompletedProcess[str]":
        found = ["--repofrompath", f"lab,file://{self.place / 'repository'}", "--repo", "lab"]
        if next_version:
            found += ["--repofrompath", f"next,file://{self.next}", "--repo", "next"]
        return subprocess.run(
            ["dnf", "-y", f"--installroot={self.root}", "--releasever=9", "--nogpgcheck", "--setopt=plugins=0", *found, *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "LC_ALL": "C.UTF-8"},
        )

    def dnf(self, *words: str, next_version: bool = False) -> str:
        """dnf succeeded without a complaint, and this is what it said."""
        ran = self.run(*words, next_version=next_version)
        assert ran.returncode == 0, ran.stdout
        assert not re.search(r"warning: (?!\S+ (?:saved|created) as )|error:|failed|not found|can't", ran.stdout), ran.stdout
        return ran.stdout

    def log(self) -> "list[str]":
        """What the scripts asked for since the last look."""
        path = self.root / "lab" / "log"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        path.write_text("", encoding="utf-8")
        return lines

    def installed(self) -> "set[str]":
        return set(packages.output_of("rpm", "--root", self.root, "-qa", "--qf", "%{NAME}\n").split())

    def version(self) -> str:
        return packages.output_of("rpm", "--root", self.root, "-q", "--qf", "%{VERSION}", "scx-enroll")

    def files(self) -> "set[str]":
        """Everything of ours, but what rpm and dnf keep."""
        found = (str(path.relative_to(self.root)) for path in self.root.rglob("*"))
        return {name for name in found if "scx-enroll" in name and not name.startswith(("lab/", "var/cache/", "root/"))}

    def verified(self) -> str:
        """What rpm finds changed in the files of the package."""
        return subprocess.run(
            ["rpm", "--root", self.root, "-V", "--nodeps", "scx-enroll"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ).stdout


@pytest.fixture
def host_of(tmp_path):
    packages.need("rpm", "dnf", "createrepo_c", "busybox")
    if os.geteuid() != 0:
        told = "not root, who may install beneath another folder"
        pytest.fail(told) if os.environ.get("CI") == "true" else pytest.skip(told)
    return lambda distribution, **more: Host(tmp_path / "host", distribution, **more)


@pytest.fixture
def host(host_of):
    """A RHEL 9 with the package, its configuration edited, and state."""
    host = host_of("RHEL 9")
    host.dnf("install", "scx-enroll")
    with (host.root / CONFIGURATION).open("a", encoding="utf-8") as file:
        file.write("# mine\n")
    (host.root / "var/lib/scx-enroll").mkdir()
    (host.root / "var/lib/scx-enroll/lock").touch()
    host.log()
    return host


def python_of(host):
    """The one family that is there with its libraries."""
    there = host.installed()
    (family,) = (family for family in host.families if {family.package, *(family.libraries + name for name in ("cryptography", "requests"))} <= there)
    return family


# Which Python.


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        ("RHEL 8.10", "python3.11 python3.12"),  # as the solver likes
        ("RHEL 8.8", "python3.11"),
        ("RHEL 8.4", "python39"),
        ("RHEL 9", "python3"),
        ("RHEL 10", "python3"),
        ("SLES 15", "python311"),
        ("SLES 16", "python313"),
    ],
)
def test_the_program_is_run_by_a_python_too_old_or_without_libraries(host_of, distribution, expected):
    """dnf brings one Python that is new enough, the distribution's own where it is, and its libraries; that one runs the program."""
    host = host_of(distribution)
    before = host.installed()
    host.dnf("install", "scx-enroll")
    family = python_of(host)
    assert family.package in expected.split()
    gssapi = {"python3-gssapi"} if family.default else set()  # that of another Python is of no use
    libraries = {f"{family.libraries}{name}" for name in ("cryptography", "requests")}
    assert host.installed() - before == {"scx-enroll", *libraries, *gssapi} | ({family.package} - before)
    interpreter = "/usr/bin/python3" if family.default else f"/usr/bin/python{family.number}"
    assert os.readlink(host.root / LINK) == interpreter
    asked = [line for line in host.log() if "python" in line]
    assert asked[-2:] == [f"{interpreter} -I -c {CHECK}", f"/{LINK} -I -m compileall -q /{PROGRAM}"]
    assert (host.root / PROGRAM / "scx_enroll/__pycache__/module.pyc").read_text(encoding="utf-8") == f"{family.number}\n"


@pytest.mark.parametrize("distribution", ["RHEL 8.10", "RHEL 9", "RHEL 10", "SLES 16"])
def test_nothing_runs_the_program_where_no_python_was(host_of, distribution):
    """In a minimal image the same transaction brings Python: in whatever order, it is found."""
    host = host_of(distribution, bare=True)
    host.dnf("install", "scx-enroll")
    family = python_of(host)
    assert os.readlink(host.root / LINK) in ("/usr/bin/python3" if family.default else "", f"/usr/bin/python{family.number}")
    assert (host.root / PROGRAM / "scx_enroll/__pycache__/module.pyc").read_text(encoding="utf-8") == f"{family.number}\n"


def test_installed_where_no_python_is_new_enough(host_of):
    """The installation is refused, and says what is missing, instead of a program that fails every hour."""
    host = host_of("RHEL 8 without a newer Python")
    before = host.installed()
    ran = host.run("install", "scx-enroll")
    assert ran.returncode == 1
    for name in ("scx-enroll", "python3 >= 3.9", "python3.12", "python3.11", "python39"):
        assert name in ran.stdout
    assert (host.installed(), host.files()) == (before, set())


@pytest.mark.parametrize("distribution", ["RHEL 8.8", "RHEL 9", "SLES 15"])
def test_rpm_does_not_understand_the_dependency(host_of, distribution):
    """Without dnf, too: what is missing is refused by rpm itself, and what is there is enough."""
    host = host_of(distribution)
    command = ["rpm", "--root", host.root, "--force-debian", "-i", "--test", packages.current().rpm]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert (ran.returncode, "is needed by scx-enroll" in ran.stdout) == (1, True)
    family = host.families[0 if distribution == "RHEL 9" else -1]
    host.dnf("install", f"{family.libraries}cryptography", f"{family.libraries}requests")
    assert packages.output_of(*command) == ""


def test_a_newer_python_without_libraries_is_chosen(host_of):
    """What only has the right number does not run the program."""
    host = host_of("RHEL 8.10")
    host.dnf("install", "python3.12", "python39-requests", "python39-cryptography")
    host.dnf("install", "scx-enroll")
    assert os.readlink(host.root / LINK) == "/usr/bin/python3.9"
    assert "python3.11" not in host.installed()


def test_the_administrator_points_python3_elsewhere(host_of):
    """On RHEL 8 /usr/bin/python3 is an alternative, which may be Python 3.6 again tomorrow: the program does not depend on it."""
    host = host_of("RHEL 8.8")
    host.dnf("install", "python3.11")
    host.alternative("python3.11")
    host.dnf("install", "scx-enroll")
    assert os.readlink(host.root / LINK) == "/usr/bin/python3.11"


def test_forced_where_no_python_fits(host_of):
    """rpm --nodeps is possible: it says what is missing, and a later installation finds what is there by then."""
    host = host_of("RHEL 9")
    said = packages.output_of("rpm", "--root", host.root, "--force-debian", "-i", "--nodeps", packages.current().rpm)
    assert "scx-enroll: no Python 3.9 or later with cryptography and requests was found; install one, then reinstall scx-enroll" in said
    assert not os.path.lexists(host.root / LINK)
    host.dnf("install", "python3-cryptography", "python3-requests")
    host.dnf("reinstall", "scx-enroll")
    assert os.readlink(host.root / LINK) == "/usr/bin/python3"


# The life cycle.


def unit_calls(log):
    """(verb, unit, version on the disk) of each call that stops or starts a unit."""
    found = (re.fullmatch(r'systemctl (stop|start) (\S+) \| (?:__version__ = "(.*?)".*|gone)', line) for line in log)
    return [found.groups() for found in found if found]


def assert_waited(log, old, new):
    """Units were stopped, and a run waited for, before the files changed; they were started after that."""
    stopped = [*UNITS, "scx-enroll-tick.service", "scx-enroll.service", "scx-enroll-again.timer"]
    calls = unit_calls(log)
    assert calls == [*(("stop", unit, old) for unit in stopped), *(("start", unit, new) for unit in UNITS)]
    waited = log.index("flock --wait 600 /var/lib/scx-enroll/lock true")
    assert len(unit_calls(log[:waited])) == len(stopped)
    compiled = log.index(f"/{LINK} -I -m compileall -q /{PROGRAM}")
    assert unit_calls(log[compiled:]) == calls[len(stopped):]


def test_a_fresh_installation_is_not_started(host_of):
    """The units are enabled by the distribution's presets, once, and started when everything is there."""
    host = host_of("RHEL 9")
    host.dnf("install", "scx-enroll")
    log = host.log()
    assert [line.split(" | ")[0] for line in log if " preset " in line] == [f"systemctl preset {' '.join(UNITS)}"]
    assert unit_calls(log) == [("start", unit, packages.current().version) for unit in UNITS]
    assert log.index(f"/{LINK} -I -m compileall -q /{PROGRAM}") < [" start " in line for line in log].index(True)
    assert host.verified() == ""


def test_an_image_is_built_without_systemd(host_of):
    """In an image under construction, or a container, units are enabled but neither started nor stopped, and nothing complains."""
    host = host_of("RHEL 9")
    (host.root / "run/systemd/system").rmdir()
    host.dnf("install", "scx-enroll")
    assert [line.split()[1] for line in host.log() if line.startswith("systemctl")] == ["preset"]
    (host.root / "usr/bin/systemctl").unlink()
    host.dnf("reinstall", "scx-enroll")
    host.dnf("remove", "scx-enroll")
    assert host.files() == set()


def test_an_upgrade_loses_the_configuration_or_runs_into_a_run(host):
    """Forth and back: the operator's changes stay, the new default lies beside; units stop before and start after."""
    old, new = packages.current().version, packages.following().version
    mine = (host.root / CONFIGURATION).read_text(encoding="utf-8")
    host.dnf("upgrade", "scx-enroll", next_version=True)
    assert_waited(host.log(), old, new)
    assert (host.version(), (host.root / CONFIGURATION).read_text(encoding="utf-8")) == (new, mine)
    assert "Only the next version" in (host.root / f"{CONFIGURATION}.rpmnew").read_text(encoding="utf-8")
    assert os.readlink(host.root / LINK) == "/usr/bin/python3"
    assert "only the next version" in (host.root / PROGRAM / "scx_enroll/hresult.py").read_text(encoding="utf-8")
    (host.root / f"{CONFIGURATION}.rpmnew").unlink()

    host.dnf("downgrade", "scx-enroll")
    assert_waited(host.log(), new, old)
    assert (host.version(), (host.root / CONFIGURATION).read_text(encoding="utf-8")) == (old, mine)

    host.dnf("reinstall", "scx-enroll")
    assert_waited(host.log(), old, old)
    assert (host.version(), (host.root / CONFIGURATION).read_text(encoding="utf-8")) == (old, mine)
    assert os.readlink(host.root / LINK) == "/usr/bin/python3"
    assert (host.root / PROGRAM / "scx_enroll/__pycache__/module.pyc").exists()
    assert re.fullmatch(rf"\S+  c /{CONFIGURATION}\n", host.verified())
    assert (host.root / "var/lib/scx-enroll/lock").exists()


def test_an_upgrade_enables_what_the_operator_disabled(host):
    """Presets are for the first installation only."""
    (host.root / "lab/enabled/scx-enroll.path").unlink()
    host.dnf("upgrade", "scx-enroll", next_version=True)
    log = host.log()
    assert [line for line in log if " preset " in line] == []
    assert [unit for verb, unit, _ in unit_calls(log) if verb == "start"] == ["scx-enroll-soon.timer", "scx-enroll.timer"]


@pytest.mark.parametrize("act", ["upgrade", "reinstall", "remove"])
def test_files_change_beneath_a_run_that_does_not_end(host, act):
    """The act is given up with one line, the old package stays whole, and the units that were stopped for it run again."""
    version = packages.current().version
    before, whole = host.files(), host.verified()
    (host.root / "lab/held").touch()
    ran = host.run(act, "scx-enroll", next_version=act == "upgrade")
    assert ran.returncode == 1
    assert "scx-enroll: a run goes on for more than ten minutes; let it end, or end it, then try again" in ran.stdout
    assert (host.version(), host.files(), host.verified()) == (version, before, whole)
    assert os.readlink(host.root / LINK) == "/usr/bin/python3"
    calls = unit_calls(host.log())
    assert {unit: verb for verb, unit, _ in calls if unit in UNITS} == dict.fromkeys(UNITS, "start")  # the last call for each
    assert {path.name for path in (host.root / "lab/enabled").iterdir()} == set(UNITS)

    (host.root / "lab/held").unlink()
    host.dnf(act, "scx-enroll", next_version=act == "upgrade")


def test_removal_leaves_more_than_is_the_operators(host):
    """State and configuration stay, and it says so; byte code, link, folders and enabled units go; stopped before, not started."""
    (host.root / "etc/scx-enroll/password").touch()
    said = host.dnf("remove", "scx-enroll")
    assert host.files() == {"etc/scx-enroll", "etc/scx-enroll/password", f"{CONFIGURATION}.rpmsave", "var/lib/scx-enroll", "var/lib/scx-enroll/lock"}
    assert (host.root / f"{CONFIGURATION}.rpmsave").read_text(encoding="utf-8").endswith("# mine\n")
    assert "scx-enroll: its state stays in /var/lib/scx-enroll, your configuration in /etc/scx-enroll" in said
    calls = unit_calls(host.log())
    assert [(verb, version) for verb, _, version in calls] == [("stop", packages.current().version)] * 6
    assert list((host.root / "lab/enabled").iterdir()) == []


def test_removal_leaves_folders_where_nothing_was_changed(host_of):
    """Installed and removed: nothing of it is left."""
    host = host_of("RHEL 9")
    host.dnf("install", "scx-enroll")
    assert host.files() != set()
    host.dnf("remove", "scx-enroll")
    assert host.files() == set()


@pytest.mark.parametrize("name", ["etc/opt/omi/ssl/omi.pem", "etc/opt/microsoft/scx/ssl/scx.pem"])
def test_removal_takes_the_certificate_with_it(host, name):
    """The agent goes on serving what it serves, and who removes the program is told that nobody renews it."""
    link = host.root / name
    link.parent.mkdir(parents=True)
    link.with_name("scx-enroll-1.pem").write_text("certificate", encoding="ascii")
    link.symlink_to("scx-enroll-1.pem")
    said = host.dnf("remove", "scx-enroll")
    assert f"scx-enroll: the agent goes on serving the certificate that was issued, /{name}; nobody renews it from now on" in said
    assert link.read_text(encoding="ascii") == "certificate"
