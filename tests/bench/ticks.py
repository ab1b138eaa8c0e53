"""`make ticks`, or python -m tests.bench.ticks [SUITE...]: what the installed timer costs a day beside the distribution's certbot.

In a booted machine of each release, as systemd counts it for the units: the CPU time of systemd's own work for a unit, its sandbox
included, is in there. The agent serves a valid certificate; certbot, from the release's own packages, has one that is not due.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List, Sequence

from tests import packages
from tests.lab import roots
from tests.lab.machine import CA, Image, Machine

from .__main__ import CERTBOT_TICKS, HANDSHAKES, LOOKS, TICKS
from .places import machine as this_machine
from .scenes import certbot

SERVICE, TICK = "scx-enroll.service", "scx-enroll-tick.service"
PREMISES = "/var/lib/scx-enroll/premises"
OLDER = f"""
with open("{PREMISES}", "rb+") as file:
    parts = file.read().split(b"\\0")
    parts[1] = b"%d" % (int(parts[1]) - 2 * 3600)
    file.seek(0)
    file.write(b"\\0".join(parts))
"""


def cpu_ms(machine: Machine, unit: str, rounds: int, before: Callable[[], object] = lambda: None) -> float:
    """The median of what a unit's run took."""
    found: List[float] = []
    for _ in range(rounds):
        before()
        machine.run("systemctl", "reset-failed", unit, check=False)  # five starts in ten seconds are a unit's limit
        machine.run("systemctl", "start", unit)
        found.append(int(machine.unit(unit, "CPUUsageNSec")) / 1e6)
    return statistics.median(found)


def configure(machine: Machine, ca: CA) -> None:
    machine.copy(ca.server_trust, "/etc/scx-enroll/https.pem")
    machine.copy(ca.issuer_trust, "/etc/scx-enroll/ca.pem")
    machine.write("/etc/scx-enroll/password", ca.password, 0o600)
    machine.write(
        "/etc/scx-enroll/conf.d/site.conf",
        f"[host]\nname = {machine.fqdn}\n[ca]\nserver = {ca.server}\ntemplate = SCXAgent\nauth = basic\nuser = {ca.user}\n"
        "server-trust = /etc/scx-enroll/https.pem\n[agent]\nsettle = 0s\n",
    )


def install_certbot(image: Image, folder: Path) -> str:
    """The release's own, with one certificate; returns its version."""
    image.copy("/etc/resolv.conf", "/etc/resolv.conf")
    image.shell("apt-get -qq -o Acquire::Check-Valid-Until=false update; DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends certbot", timeout=600)
    certbot("certbot", str(folder))
    shutil.make_archive(str(folder / "config"), "tar", folder / "config")
    image.write("/srv/config.tar", (folder / "config.tar").read_bytes())
    image.shell(f"tar xf /srv/config.tar -C /etc/letsencrypt; sed -i 's#{folder}/config#/etc/letsencrypt#' /etc/letsencrypt/renewal/*.conf")
    return image.run("certbot", "--version").stdout.split()[-1]


def measured(suite: str, rounds: int, *, alone: bool) -> Dict[str, float]:
    """CPU in ms: a tick with and without a handshake, a whole look in its sandbox, and certbot's unit, whose version is in the name."""
    with tempfile.TemporaryDirectory(prefix="scx-ticks-") as folder, Image(suite, Path(folder) / "image") as image:
        version = "" if alone else install_certbot(image, Path(folder) / "certbot")
        image.copy(packages.current().deb, "/srv/scx-enroll.deb")
        image.run("dpkg", "-i", "/srv/scx-enroll.deb")
        with Machine(image, "host1") as machine, machine.ca(Path(folder) / "ca") as ca:
            machine.install_agent("rsa:3072")
            configure(machine, ca)
            machine.run("systemctl", "start", SERVICE)
            machine.run("systemctl", "stop", "scx-enroll.path", "scx-enroll-soon.timer")
            time.sleep(2)  # files of this second are no premises
            found = {"look": cpu_ms(machine, SERVICE, rounds, lambda: machine.run("rm", "-f", PREMISES))}
            machine.run("systemctl", "start", SERVICE)
            found["handshake"] = cpu_ms(machine, TICK, rounds, lambda: machine.run("touch", "-d", "@0", "/run/scx-enroll/status.json"))
            machine.run("python3", "-c", OLDER)
            found["tick"] = cpu_ms(machine, TICK, rounds)
            if not alone:
                found[f"certbot {version}"] = cpu_ms(machine, "certbot.service", rounds)
                assert "No renewals were attempted" in machine.run("certbot", "renew", "--no-random-sleep-on-renew").stdout
            return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ticks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--alone", action="store_true", help="without certbot, which the package archive has to be asked for")
    parser.add_argument("suites", nargs="*", default=roots.SUITES, metavar="SUITE")
    given = parser.parse_args(arguments)
    print(f"CPU ms of the units, medians of {given.rounds}; {this_machine()}")
    for suite in given.suites:
        found = measured(suite, given.rounds, alone=given.alone)
        day = (TICKS - HANDSHAKES - LOOKS) * found["tick"] + HANDSHAKES * found["handshake"] + LOOKS * found["look"]
        others = "".join(f"; {name} {ms:.0f}, its two {CERTBOT_TICKS * ms:.0f}: ratio {day / (CERTBOT_TICKS * ms):.2f}" for name, ms in found.items() if name.startswith("certbot"))
        print(f"{suite}: tick {found['tick']:.1f}, with a handshake {found['handshake']:.1f}, whole look {found['look']:.0f}; a day {day:.0f}{others}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
