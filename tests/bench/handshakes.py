"""How many handshakes fail while the agent gets a new certificate: a renewal beside the bare command that it needs."""

import contextlib
import math
import os
import socket
import ssl
import statistics
import subprocess
import threading
import time
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from .measure import expect
from .scenes import Host, Lab

RATE = 200  # a second: far more than a Management Server's, so that a gap of milliseconds is seen
THREADS = 8
AROUND_S = 0.3  # of load before and after
KEY = "ec:secp256r1"  # its handshakes cost less than they show
RESTART, RENEWAL, RELOAD, QUIET_RENEWAL = "scxadmin -restart", "a renewal", "omiserver -r", "a renewal with activation = reload"


class Load:
    """Handshakes at a steady rate, from entering to leaving; `tried` and `failed` count them."""

    def __init__(self, port: int, rate: float = RATE) -> None:
        self.port, self.rate = port, rate
        self.tried = self.failed = 0
        self._lock, self._end = threading.Lock(), threading.Event()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.check_hostname, self._context.verify_mode = False, ssl.CERT_NONE
        self._threads: List[threading.Thread] = []

    def __enter__(self) -> "Load":
        began = time.monotonic()
        for number in range(THREADS):
            self._threads.append(threading.Thread(target=self._work, args=(began + number / self.rate,)))
            self._threads[-1].start()
        return self

    def __exit__(self, *_failure: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _work(self, due: float) -> None:
        while not self._end.wait(max(due - time.monotonic(), 0)):
            due += THREADS / self.rate
            good = self._shake()
            with self._lock:
                self.tried, self.failed = self.tried + 1, self.failed + (not good)

    def _shake(self) -> bool:
        try:
            # not a connected one, which is lost, with a warning later on, where the server dies at the wrong moment
            with self._context.wrap_socket(socket.socket(), do_handshake_on_connect=False) as secure:
                secure.settimeout(5)
                secure.connect(("127.0.0.1", self.port))
                secure.do_handshake()
                with contextlib.suppress(OSError):  # what comes after the handshake is not what is counted
                    secure.unwrap()
        except OSError:
            return False
        return True


@dataclass
class Tally:
    """What became of the handshakes around some renewals or commands: all that were tried, those that failed around each."""

    tried: int = 0
    failures: List[int] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Of all of them."""
        return sum(self.failures)

    @property
    def each(self) -> float:
        """Failed handshakes for each renewal or command."""
        return statistics.mean(self.failures)

    @property
    def error(self) -> float:
        """The standard error of that, squared."""
        return statistics.pvariance(self.failures) / len(self.failures)


def no_more(one: Tally, other: Tally) -> bool:
    """Say whether no more failed for the one than for the other, beyond chance: three standard errors, since they fail in clusters."""
    return one.each <= other.each + 3 * math.sqrt(one.error + other.error)


def during(host: Host, command: Sequence[str], around_s: float = AROUND_S) -> Load:
    """Return the load that was on the agent while this command was run, to its end and until the agent serves again."""
    with Load(host.lab.port) as load:
        time.sleep(around_s)
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        expect(ended.returncode == 0 and host.lab.wait(), f"{command}: {ended.stdout}")
        time.sleep(around_s)
    return load


def measured(made: Lab, rounds: int, told: Callable[[str], None]) -> Dict[str, Tally]:
    """Each round does each once, on two hosts that differ in `activation` only."""
    hosts = []
    for name, lines in (("restarted", ""), ("reloaded", "[agent]\nactivation = reload\n")):
        host = Host(made.place, made.ca, made.told, made.folder, name, KEY)
        made.hosts.append(host)
        os.makedirs(host.lab.path("/etc/scx-enroll/conf.d"), exist_ok=True)
        with open(host.lab.path("/etc/scx-enroll/conf.d/bench.conf"), "w", encoding="utf-8") as file:
            file.write(lines)
        host.enrol()
        hosts.append(host)
    restarted, reloaded = hosts
    contenders: Dict[str, Tuple[Host, Optional[List[str]]]] = {
        RESTART: (restarted, [restarted.lab.path(restarted.lab.scxadmin), "-restart"]), RENEWAL: (restarted, None),
        RELOAD: (reloaded, [reloaded.lab.path("/opt/omi/bin/omiserver"), "-r"]), QUIET_RENEWAL: (reloaded, None),
    }  # fmt: skip
    found = {name: Tally() for name in contenders}
    for number in range(rounds):
        for name, (host, command) in contenders.items():
            host.spend_nothing()
            before, process = host.lab.served(), host.lab.pid
            load = during(host, command or host.ours("--renew"))
            expect(command or host.lab.served() not in (None, before), f"{name}: nothing new is served")
            expect((host.lab.pid == process) == (host is reloaded), f"{name}: not what its row says was done to the agent")
            tally = found[name]
            tally.tried += load.tried
            tally.failures.append(load.failed)
        told(f"round {number + 1} of {rounds}")
    return found


def aims(found: Dict[str, Tally]) -> List[Tuple[str, str, bool]]:
    """What is to be reached, what was measured, and whether that is it."""
    pairs = ((RENEWAL, RESTART), (QUIET_RENEWAL, RELOAD))
    return [
        (f"handshakes that {one} fails: no more than {other}, but by chance", f"{found[one].each:.1f} and {found[other].each:.1f}", no_more(found[one], found[other]))
        for one, other in pairs
    ]


def section(found: Dict[str, Tally]) -> str:
    """Return the part of docs/bench.md."""

    def ratio(name: str, other: str) -> str:
        return f"{found[name].each / found[other].each:.2f}" if found[other].failed else "-"

    rows = [
        (name, f"{len(found[name].failures)}", f"{found[name].tried:,}", f"{found[name].failed:,}", f"{found[name].each:.1f}", ratio(name, other))
        for name, other in ((RESTART, RESTART), (RENEWAL, RESTART), (RELOAD, RELOAD), (QUIET_RENEWAL, RELOAD))
    ]
    heads = ("", "times", "handshakes", "failed", "for each", "times the bare one")
    marks = ("-", *("-:",) * (len(heads) - 1))
    table = "".join("| " + " | ".join(cells) + " |\n" for cells in (heads, marks, *rows))
    return f"""\
## Handshakes that fail meanwhile

{RATE} handshakes a second at the agent's port, from shortly before to shortly after: a renewal beside the command that it needs, `scxadmin -restart` or, with `activation = reload`,
`omiserver -r`. The stand-in agent's gaps are those of the real one, but for the time that a start takes. All took turns in one run; the agents' keys are {KEY}.

{table}"""
