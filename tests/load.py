"""Several hundred hosts at one CA at once: `make load`, or python -m tests.load --hosts N. Status 1 for a lost request or a duplicate.

Each host is a tree of its own with a key of its own, and a real process of the installed program; nothing is started or probed in the
trees, so that the CA is what is loaded. All processes stand ready and are let go together. The first pass is a CA that behaves: one
POST and one certificate for each host. In the second pass every tenth answer is lost and every seventh request is answered 503; hosts
that ended without a certificate run again as much later as their timers might, and the doubtful requests may cost a second certificate,
never one more than the budget allows.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Sequence

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.demo import configure
from tests.lab.agent import LabHost
from tests.lab.ca import LabCA

HOSTS = 300
KEY = "rsa:2048"  # quick to make; the CA does not mind
LIMIT_S = 600  # for all hosts together
CERTIFICATES_A_DAY = 3  # the documented budget of a host
LOST_EVERY, REFUSED_EVERY = 10, 7
# When hosts without a certificate run again, in seconds, and whether the CA still misbehaves: a doubtful request is repeated after up to
# four hours and a quarter, and given up after two days.
LATER = ((4 * 3600 + 16 * 60, True), (9 * 3600, False), (50 * 3600, False))
# What the program starts with, its clock ahead.
PROGRAM = (
    "import sys, time; ahead, real = int(sys.argv.pop(1)), time.time; time.time = lambda: real() + ahead;"
    " from scx_enroll.__main__ import main; sys.exit(main())"
)
# Opening the pipe waits for the other end. These processes stand for machines of their own: what they take is not taken from the CA.
START = ': <"$1"; shift; exec nice -n 10 "$@"'


@dataclass
class Pass:
    """All hosts were run, as often as it took."""

    name: str
    hosts: int
    seconds: float = 0.0
    requests: int = 0
    refused: int = 0
    dropped: int = 0
    posts: int = 0
    issued: int = 0
    cpu_s: List[float] = field(default_factory=list)
    statuses: List[Dict[int, int]] = field(default_factory=list)  # of each wave
    problems: List[str] = field(default_factory=list)

    @property
    def extra(self) -> int:
        return self.issued - self.hosts

    def told(self) -> str:
        """Return the figures."""
        waves = "; then ".join(", ".join(f"{count} with {status}" for status, count in sorted(wave.items())) for wave in self.statuses)
        rate, median_s = self.requests / self.seconds, statistics.median(self.cpu_s)
        lines = [
            f"{self.name}: {self.hosts} hosts, {self.seconds:.1f} s, {self.requests} requests, {rate:.0f}/s, {median_s:.2f} s CPU for a run",
            f"  {self.posts} POSTs, {self.issued} issued, {self.extra} more than hosts; {self.refused} answered 503, {self.dropped} answers lost",
            f"  runs ended: {waves}",
            *(f"  WRONG: {problem}" for problem in self.problems[:20]),
        ]
        return "\n".join(lines)


def make_host(folder: str, number: int, told: Dict[str, str]) -> str:
    """Make one host's tree; returns its root. Run in a process of a pool."""
    host = LabHost(os.path.join(folder, f"host{number}"), port=1270, host=f"host{number}", key=KEY, owned=False)
    configure(host, told)
    return host.root


def make_hosts(folder: str, count: int, told: Dict[str, str]) -> List[LabHost]:
    """Make all of them; keys take a while."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        roots = list(pool.map(make_host, [folder] * count, range(count), [told] * count))
    return [LabHost(root, make=False) for root in roots]


def run_all(hosts: Sequence[LabHost], folder: str, ahead_s: int, found: Pass) -> List[int]:
    """Run the program on all hosts at once; returns the exit statuses."""
    gate = os.path.join(folder, "gate")
    if not os.path.exists(gate):
        os.mkfifo(gate)
    waiting: Dict[int, int] = {}
    for number, host in enumerate(hosts):
        command = [sys.executable, "-I", "-c", PROGRAM, str(ahead_s), "run", "--root", host.root]
        with open(f"{host.root}.out", "wb") as output:
            child = subprocess.Popen(
                ["/bin/sh", "-c", START, "sh", gate, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/"
            )
        waiting[child.pid] = number
        child.returncode = 0  # waited for below
    statuses = [-1] * len(hosts)
    time.sleep(0.5)
    opened = os.open(gate, os.O_RDWR)
    began = time.monotonic()
    try:
        while waiting:
            pid, how, usage = os.wait4(-1, os.WNOHANG)
            if pid in waiting:
                statuses[waiting.pop(pid)] = os.waitstatus_to_exitcode(how)
                found.cpu_s.append(usage.ru_utime + usage.ru_stime)
            elif not pid:
                time.sleep(0.01)
                if time.monotonic() > began + LIMIT_S:
                    raise SystemExit(f"load: {len(waiting)} hosts are not done after {LIMIT_S} s")
    finally:
        for pid in waiting:
            os.kill(pid, 9)
        os.close(opened)
    found.seconds += time.monotonic() - began
    found.statuses.append(dict(Counter(statuses)))
    return statuses


def spki(certificate: x509.Certificate) -> str:
    public = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(public).hexdigest()


def examine(hosts: Sequence[LabHost], ca: LabCA, found: Pass, most: int) -> None:
    """See that each host holds one certificate, of the CA, for its own key and name, and that the CA issued none in vain."""
    rows: Dict[str, List[bytes]] = {}
    for row in ca.authority.rows.values():
        if row.certificate:
            rows.setdefault(spki(x509.load_der_x509_certificate(row.certificate)), []).append(row.certificate)
    keys = set()
    for host in hosts:
        held = os.path.join(host.root, "var", "lib", "scx-enroll", "generations")
        names = os.listdir(held) if os.path.isdir(held) else []
        der = host.leaf()
        leaf = x509.load_der_x509_certificate(der) if der else None
        key = spki(leaf) if leaf else ""
        issued = rows.get(key, [])
        keys.add(key)
        if len(names) != 1 or der not in issued:
            with open(f"{host.root}.out", encoding="utf-8", errors="replace") as file:
                found.problems.append(f"lost: {host.fqdn} holds {len(names)} certificates; {file.read().strip()}")
        elif leaf is None or host.fqdn not in leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
            x509.DNSName
        ):
            found.problems.append(f"{host.fqdn} holds the certificate of another host")
        if len(issued) > most:
            found.problems.append(f"duplicate: {len(issued)} certificates were issued for {host.fqdn}")
    if len(keys) != len(hosts):
        found.problems.append(f"{len(hosts)} hosts hold {len(keys)} keys")
    strangers = set(rows) - keys
    if strangers:
        found.problems.append(f"the CA issued for {len(strangers)} keys that no host has")


class Faults:
    """Loses every tenth answer, and answers 503 to every seventh request, whoever asks."""

    def __init__(self, ca: LabCA) -> None:
        self.ca = ca
        self.on = True
        self.arrived = self.lost = self.refused = 0
        ca.switches.update({"lost": "after", "lost_on": "all", "lost_times": 0, "answer": "503", "answer_times": 0})
        ca.on_request = self.next

    def next(self) -> None:
        with self.ca._lock:
            self.arrived += 1
            if self.on and self.arrived % LOST_EVERY == 0:
                self.ca.switches.lost_times += 1
                self.lost += 1
            if self.on and self.arrived % REFUSED_EVERY == 0:
                self.ca.switches.answer_times += 1
                self.refused += 1

    def end(self) -> None:
        with self.ca._lock:
            self.on = False
            self.ca.switches.update({"lost_times": 0, "answer_times": 0})


def load(name: str, folder: str, count: int, *, faults: bool) -> Pass:
    """One pass with a CA of its own."""
    found = Pass(name, count)
    os.makedirs(folder)
    with LabCA(os.path.join(folder, "ca")) as ca:
        password = os.path.join(folder, "password")
        with open(os.open(password, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="utf-8") as file:
            file.write(ca.password + "\n")
        told = {
            "server": ca.server, "server_trust": ca.server_trust, "issuer_trust": ca.issuer_trust, "user": ca.user,
            "password_file": password,
        }  # fmt: skip
        hosts = make_hosts(folder, count, told)
        trouble: Optional[Faults] = Faults(ca) if faults else None
        left: List[LabHost] = list(hosts)
        for ahead_s, misbehaving in ((0, faults), *(LATER if faults else ())):
            if trouble and not misbehaving:
                trouble.end()
            ca.switches.date_offset = float(ahead_s)
            statuses = run_all(left, folder, ahead_s, found)
            left = [host for host, status in zip(left, statuses) if status]
            if not left:
                break
        found.problems += [f"{host.fqdn} ended without a certificate" for host in left]
        seen = list(ca.log)
        found.requests, found.posts, found.issued = len(seen), ca.count_post, ca.authority.issued
        found.refused = sum(one.status == 503 for one in seen)
        found.dropped = sum(one.status == 0 for one in seen)
        examine(hosts, ca, found, CERTIFICATES_A_DAY if faults else 1)
        stored = sum(one.method == "POST" and one.status == 0 for one in seen)
        if found.extra > stored:
            found.problems.append(f"{found.extra} certificates too many, but only {stored} answers to a POST were lost")
        if not faults and found.posts != count:
            found.problems.append(f"{found.posts} POSTs for {count} hosts")
        for host in hosts:
            host.close()
    return found


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=HOSTS, help="how many (default: %(default)s; each takes 40 MB while it runs)")
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    given = parser.parse_args(arguments)
    if given.hosts < 1:
        parser.error("--hosts is at least 1")
    wrong = False
    with tempfile.TemporaryDirectory(prefix="scx-load-") as folder:
        for name, faults in (("a CA that behaves", False), ("a CA that loses answers", True)):
            found = load(name, os.path.join(folder, str(faults)), given.hosts, faults=faults)
            print(json.dumps(vars(found)) if given.json else found.told(), flush=True)
            wrong = wrong or bool(found.problems)
    if not given.json:
        print("not as it should be" if wrong else "as it should be: nothing lost, one certificate for each host, none in vain beyond lost answers and the budget")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
