"""The hosts and the CA that the contenders work on, made ready before each run, and looked at after it."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import replace
from typing import Callable, Iterator, List, Optional, Tuple

from scx_enroll import journal as j
from scx_enroll import store
from tests.demo import configure
from tests.lab.agent import LabHost, fingerprint
from tests.lab.ca import LabCA

from .measure import Contender, Sample, expect, measure
from .places import HERE, Place

STATE = "/var/lib/scx-enroll"
FOLDER = "/etc/opt/omi/ssl"  # the agent's
TEMPLATE = "SCXAgent"
KEY = "rsa:3072"  # what the agent's own tool makes
GENERATIONS = store.KEPT_GENERATIONS
ERRANDS = store.KEPT_ERRANDS
JOURNAL_BYTES = 500_000
YOUNG_S = 2.1
WARM_UP = 3  # runs, after the state was changed from outside


class Host:
    """One host with its agent, and what the program and the plain scripts are told of it."""

    def __init__(self, place: Place, ca: LabCA, told: dict, folder: str, name: str, key: str) -> None:
        self.place = place
        self.ca = ca
        self.lab = LabHost(os.path.join(folder, name), host=name, key=key)
        configure(self.lab, told)
        self.told = told
        self.kept = os.path.join(folder, f"{name}-kept")
        subprocess.run(["cp", "-a", self.lab.path("/etc/opt"), self.kept], check=True)
        expect(self.lab.start(), f"the agent of {name} did not start")
        self.before: Tuple[int, ...] = ()

    # -- commands -----------------------------------------------------------------------------------------------------

    def ours(self, *arguments: str, live: bool = True) -> List[str]:
        where = ["--root", self.lab.root, *(["--live"] if live else [])]
        return [self.place.python, "-IS", self.place.program, "run", *where, *arguments]

    def facts(self, *, restart: bool) -> dict:
        root = self.lab.root
        return {
            "fqdn": self.lab.fqdn, "key": self.lab.path(self.lab.key), "certificate": f"{root}{FOLDER}/mine.pem",
            "link": self.lab.path(self.lab.certificate), "server": self.told["server"], "user": self.told["user"],
            "password_file": self.told["password_file"], "server_trust": self.told["server_trust"], "template": TEMPLATE,
            "scxadmin": self.lab.path(self.lab.scxadmin) if restart else "",
        }  # fmt: skip

    def certsrv(self, *, restart: bool) -> List[str]:
        facts = f"{self.kept}-facts-{restart}.json"
        with open(facts, "w", encoding="utf-8") as file:
            json.dump(self.facts(restart=restart), file)
        return [self.place.python, "-I", os.path.join(HERE, "plain.py"), self.place.folder, facts]

    def curl(self, *, restart: bool) -> List[str]:
        words = list(self.facts(restart=restart).values())
        return ["/bin/sh", os.path.join(HERE, "plain.sh"), *filter(None, words)]

    # -- before and after ---------------------------------------------------------------------------------------------

    def count(self) -> None:
        """Remember what `enrolled` and `idle` compare with."""
        self.before = (len(self.ca.log), self.ca.authority.issued, self.lab.restarts, len(self.lab.calls))

    def fresh(self, *, restart: bool = True) -> None:
        """The host is as its installation left it: the agent's own certificate, no state."""
        for path in (STATE, "/run/scx-enroll", "/etc/opt"):
            shutil.rmtree(self.lab.path(path), ignore_errors=True)
        subprocess.run(["cp", "-a", self.kept, self.lab.path("/etc/opt")], check=True)
        if restart:
            expect(self.lab.restart(), "the agent did not come back")
        self.count()

    def grow_older(self) -> None:
        """The premises are two hours old, and the last run an hour ago: no handshake is due."""
        with open(self.lab.path(f"{STATE}/premises"), "rb+") as file:
            parts = file.read().split(b"\0")
            parts[1] = b"%d" % (int(parts[1]) - 2 * 3600)
            file.seek(0)
            file.write(b"\0".join(parts))
        hour_ago = time.time() - 3600
        os.utime(self.lab.path("/run/scx-enroll/status.json"), (hour_ago, hour_ago))

    def forget_last_run(self) -> None:
        """The last run is long ago: a handshake is due."""
        os.utime(self.lab.path("/run/scx-enroll/status.json"), (0, 0))
        self.count()

    def forget_premises(self) -> None:
        """The next run looks at everything, as one of a day does."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.lab.path(f"{STATE}/premises"))
        self.count()

    def enrolled(self, sample: Sample, *, restart: bool = True) -> None:
        """The CA issued one certificate, and it is where the agent reads it; with a restart, it is served."""
        expect(sample.status == 0, "it failed")
        _, issued, restarts, _ = self.before
        rows = self.ca.authority.rows
        expect(self.ca.authority.issued == issued + 1, "the CA did not issue one certificate")
        newest = fingerprint(rows[max(rows)].certificate)
        expect(fingerprint(self.lab.leaf()) == newest, "what was issued is not installed")
        expect(self.lab.restarts == restarts + restart, "the agent was not restarted as often as it should be")
        if restart:
            self.lab.wait()
            expect(fingerprint(self.lab.served()) == newest, "what was issued is not served")

    def idle(self, sample: Sample) -> None:
        """Nothing was done, nobody was asked."""
        expect(sample.status == 0, "it failed")
        expect((len(self.ca.log), self.ca.authority.issued, self.lab.restarts, len(self.lab.calls)) == self.before, "it did something")

    def once(self, *arguments: str) -> Sample:
        """Run the program, unmeasured."""
        sample = measure(self.ours(*arguments))
        expect(sample.status == 0, f"`run` ended with {sample.status}: {sample.output}")
        return sample

    def spend_nothing(self) -> None:
        """Nothing was spent today: the budget would end a benchmark as it ends a loop."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.lab.path(f"{STATE}/budget.json"))

    def enrol(self) -> None:
        """Enrol it, whatever it is now."""
        self.fresh()
        self.once()
        self.spend_nothing()

    def settle(self) -> None:
        """See that a run has nothing to do, and let it find that out a few times; files of this second are no premises."""
        self.once()
        time.sleep(YOUNG_S)
        for _ in range(WARM_UP):
            said = self.once().output
        expect("nothing to do" in said, f"there is something to do: {said}")
        self.count()

    # -- states that differ -------------------------------------------------------------------------------------------

    def amend(self, change: Callable[[j.Journal], j.Journal]) -> None:
        """Change the journal."""
        path = self.lab.path(f"{STATE}/journal.json")
        with open(path, "rb+") as file:
            data = j.to_json(change(j.from_json(j.Journal, file.read(), path)))
            file.seek(0)
            file.truncate()
            file.write(data)

    def grow_generations(self) -> None:
        for _ in range(GENERATIONS - 1):
            self.once("--renew")
            self.spend_nothing()
        expect(len(os.listdir(self.lab.path(f"{STATE}/generations"))) == GENERATIONS, "there are not as many generations as are kept")

    def grow_journal(self) -> None:
        def change(journal: j.Journal) -> j.Journal:
            share = JOURNAL_BYTES // 1200
            message = "the request was denied by the policy module, and the operator was told so in words that fill a line"
            contact = next(iter(journal.contacts))
            back = j.Backoff("", "0" * 64, contact.at, 1, "changed", 6, message, "ask the CA's administrators")
            skip = j.Skip("", "0" * 64, contact.at, 1, "changed", 9, message)
            return replace(
                journal,
                backoffs=tuple(replace(back, ca=f"ca{number}.lab.test") for number in range(share)),
                contacts=(contact, *(replace(contact, ca=f"ca{number}.lab.test", message=message) for number in range(share))),
                skipped=tuple(replace(skip, generation=f"{number:016x}") for number in range(share)),
            )

        self.amend(change)
        expect(self.journal_bytes() > JOURNAL_BYTES * 0.8, f"the journal has {self.journal_bytes()} bytes only")

    def journal_bytes(self) -> int:
        return os.path.getsize(self.lab.path(f"{STATE}/journal.json"))

    def grow_errands(self) -> None:
        settled = j.to_json(j.Journal())
        for number in range(ERRANDS):
            folder = self.lab.path(f"{STATE}/submitted/{number:016x}")
            os.makedirs(f"{folder}/generations", mode=0o700)
            with open(os.open(f"{folder}/journal.json", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                file.write(settled)


class Lab:
    """A CA, and the hosts that were made for it."""

    def __init__(self, place: Place, folder: str, key: str) -> None:
        self.place, self.folder, self.key = place, folder, key
        self.ca = LabCA(os.path.join(folder, "ca"))
        self.ca.start()
        self.hosts: List[Host] = []
        password = os.path.join(folder, "password")
        with open(os.open(password, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="utf-8") as file:
            file.write(self.ca.password + "\n")
        self.told = {
            "server": self.ca.server, "server_trust": self.ca.server_trust, "issuer_trust": self.ca.issuer_trust, "user": self.ca.user,
            "password_file": password,
        }  # fmt: skip

    def host(self, name: str, grow: Optional[Callable[[Host], None]] = None) -> Host:
        """Make a host; with `grow`, an enrolled one in that state."""
        made = Host(self.place, self.ca, self.told, self.folder, name, self.key)
        self.hosts.append(made)
        if grow:
            made.enrol()
            grow(made)
            made.settle()
        return made

    def close(self) -> None:
        for host in self.hosts:
            host.lab.close()
        self.ca.stop()


@contextlib.contextmanager
def lab(place: Place, folder: str, key: str = KEY) -> Iterator[Lab]:
    made = Lab(place, folder, key)
    try:
        yield made
    finally:
        made.close()


# -- certbot ----------------------------------------------------------------------------------------------------------

CERTBOT_CONF = """\
version = 2.1.0
archive_dir = {config}/archive/{name}
cert = {config}/live/{name}/cert.pem
privkey = {config}/live/{name}/privkey.pem
chain = {config}/live/{name}/chain.pem
fullchain = {config}/live/{name}/fullchain.pem

[renewalparams]
account = 00000000000000000000000000000000
authenticator = standalone
server = https://127.0.0.1:1/directory
key_type = rsa
"""


def certbot(program: str, folder: str) -> List[str]:
    """Return the command that finds one certificate, of 90 days, and nothing due."""
    name, config = "host1.lab.test", os.path.join(folder, "config")
    archive, live = (os.path.join(config, kind, name) for kind in ("archive", "live"))
    for made in (archive, live, os.path.join(config, "renewal")):
        os.makedirs(made)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", KEY, "-nodes", "-keyout", f"{archive}/privkey1.pem", "-out", f"{archive}/cert1.pem",
         "-days", "90", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"], check=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    shutil.copy(f"{archive}/cert1.pem", f"{archive}/chain1.pem")
    with open(f"{archive}/cert1.pem", encoding="ascii") as file:
        pem = file.read()
    with open(f"{archive}/fullchain1.pem", "w", encoding="ascii") as file:
        file.write(pem + pem)
    for kind in ("cert", "privkey", "chain", "fullchain"):
        os.symlink(f"../../archive/{name}/{kind}1.pem", f"{live}/{kind}.pem")
    with open(os.path.join(config, "renewal", f"{name}.conf"), "w", encoding="ascii") as file:
        file.write(CERTBOT_CONF.format(config=config, name=name))
    places = ("--config-dir", config, "--work-dir", f"{folder}/work", "--logs-dir", f"{folder}/logs")
    return [program, "renew", *places, "--no-random-sleep-on-renew", "--non-interactive"]


def not_due(sample: Sample) -> None:
    expect(sample.status == 0, "it failed")
    expect("Certificate not yet due for renewal" in sample.output, "it did not say that nothing is due")
    expect("No renewals were attempted" in sample.output, "it did something")


# -- the groups of contenders -----------------------------------------------------------------------------------------

BARE, IDLE = "python3 -c pass", "scx-enroll run, nothing to do"
HANDSHAKE, LOOK = "the same, with a handshake", "the same, everything looked at"
SCRIPT, CURL, RESTART = "certsrv script", "openssl and curl", "scxadmin -restart alone"
ENROL, ENROL_DEAD, SCRIPT_DEAD, CURL_DEAD = "scx-enroll run", "scx-enroll run, no restart", "certsrv script, no restart", "openssl and curl, no restart"
MANY_GENERATIONS, LONG_JOURNAL, MANY_ERRANDS = f"{GENERATIONS} generations", "a long journal", f"{ERRANDS:,} requests of other hosts"


def idle_contenders(made: Lab, certbots: List[Tuple[str, str]]) -> List[Contender]:
    """`certbots`: name of the row, program."""
    rows = [Contender(BARE, [made.place.python, "-c", "pass"])]
    grown = {
        IDLE: lambda _host: None, MANY_GENERATIONS: Host.grow_generations, LONG_JOURNAL: Host.grow_journal,
        MANY_ERRANDS: Host.grow_errands,
    }  # fmt: skip
    for number, (name, grow) in enumerate(grown.items()):
        host = made.host(f"idle{number}", grow)
        host.grow_older()
        rows.append(Contender(name, host.ours("--unattended"), host.count, host.idle))
    host = made.host("handshake", lambda _host: None)
    rows.append(Contender(HANDSHAKE, host.ours("--unattended"), host.forget_last_run, host.idle))
    host = made.host("look", lambda _host: None)
    rows.append(Contender(LOOK, host.ours("--unattended"), host.forget_premises, host.idle))
    for number, (name, program) in enumerate(certbots):
        command = certbot(program, os.path.join(made.folder, f"certbot{number}"))
        for _ in range(WARM_UP):
            not_due(measure(command))
        rows.append(Contender(name, command, check=not_due))
    return rows


def enrol_contenders(made: Lab) -> List[Contender]:
    host = made.host("enrol")

    def alone(sample: Sample) -> None:
        expect(sample.status == 0 and host.lab.wait(), "the agent did not come back")

    def dead(sample: Sample) -> None:
        host.enrolled(sample, restart=False)

    def fresh_dead() -> None:
        host.fresh(restart=False)

    return [
        Contender(ENROL, host.ours(), host.fresh, host.enrolled),
        Contender(SCRIPT, host.certsrv(restart=True), host.fresh, host.enrolled),
        Contender(CURL, host.curl(restart=True), host.fresh, host.enrolled),
        Contender(RESTART, [host.lab.path(host.lab.scxadmin), "-restart"], host.fresh, alone),
        Contender(ENROL_DEAD, host.ours(live=False), fresh_dead, dead),
        Contender(SCRIPT_DEAD, host.certsrv(restart=False), fresh_dead, dead),
        Contender(CURL_DEAD, host.curl(restart=False), fresh_dead, dead),
    ]
