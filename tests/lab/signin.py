"""Who is let in: what a server that insists on channel bindings makes of an Authorization header, connection by connection."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

from .kdc import PYTHON
from .switches import Switches

PROGRAM = str(Path(__file__).with_name("acceptor.py"))
OFFERS: Mapping[str, Tuple[str, ...]] = {
    "negotiate": ("Negotiate", "NTLM"),
    "epa": ("Negotiate", "NTLM"),
    "kerberos": ("Negotiate",),
    "ntlm": ("NTLM",),
    "certificate": (),
}
EVERYTHING = ("Negotiate", "NTLM", 'Basic realm="ca.lab.test"')
PARAMETERS = ' realm="ca.lab.test", charset="UTF-8"'
WRONG = base64.b64encode(b"\xa1\x14\x30\x12\xa0\x03\x0a\x01\x00\xa2\x0b\x04\x09not the server").decode()


@dataclass(frozen=True)
class Verdict:
    """What became of one request's credentials; `reason`: why they were refused, never told to the client.

    `answers` are the WWW-Authenticate headers that belong to it: what was offered, a challenge, or the server's own proof.
    """

    admitted: bool
    account: str = ""
    bound: bool = False
    delegated: bool = False
    mutual: bool = False
    reason: str = ""
    answers: Tuple[str, ...] = ()


class Acceptor:
    """A process of `acceptor.py`, started when it is first asked; questions come from any thread."""

    def __init__(self, method: str, interpreter: str, environment: Mapping[str, str]) -> None:
        """Take what to start."""
        self._words = [interpreter, "-I", PROGRAM, method]
        self._environment = dict(environment)
        self._process: Optional[subprocess.Popen[str]] = None
        self._lock = threading.Lock()

    def ask(self, question: Mapping[str, Any]) -> Dict[str, Any]:
        """Return the answer; one with an error where there is nobody to answer."""
        with self._lock:
            if "end" in question and self._process is None:  # nobody is there who could know it
                return {}
            try:
                running = self._running()
                assert running.stdin and running.stdout
                running.stdin.write(json.dumps(question) + "\n")
                running.stdin.flush()
                if "end" in question:
                    return {}
                answer: Dict[str, Any] = json.loads(running.stdout.readline())
            except (OSError, ValueError) as error:
                return {"error": f"no acceptor: {' '.join(self._words)}: {error}", "token": ""}
            return answer

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
            )
        return self._process

    def close(self) -> None:
        """It has ended; the next question starts another."""
        with self._lock:
            process, self._process = self._process, None
        if process:
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    with contextlib.suppress(OSError):
                        pipe.close()
            process.wait()


class Gate:
    """What the server knows: one account with a password, its keytab, and the switches.

    `keytab` is read anew for each token; "" is a server that has none, and lets nobody in by Kerberos.
    """

    def __init__(self, directory: Path, switches: Switches, user: str, password: str, keytab: str = "") -> None:
        """Take them; processes are started when they are needed."""
        self.switches = switches
        self.keytab = keytab
        self.numbers = itertools.count(1)
        self._users = directory / ".ntlm-users"
        self._account = (user, password)
        clean = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8"}
        # replays are looked for, in files of the lab's
        replays = {"KRB5_CONFIG": os.devnull, "KRB5RCACHEDIR": str(directory)}
        self.acceptors = {
            "kerberos": Acceptor("kerberos", PYTHON, {**clean, **replays}),
            "ntlm": Acceptor("ntlm", sys.executable, {**clean, "NTLM_USER_FILE": str(self._users)}),
        }

    def write_users(self) -> None:
        """The file of NTLM's accounts is there."""
        if not self._users.exists():
            domain, _, name = self._account[0].rpartition("\\")
            with open(os.open(self._users, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="utf-8") as file:
                file.write(f"{domain}:{name}:{self._account[1]}\n")

    def close(self) -> None:
        """No process of it runs, and no password lies about."""
        for acceptor in self.acceptors.values():
            acceptor.close()
        with contextlib.suppress(FileNotFoundError):
            self._users.unlink()

    def offers(self, proof: str = "") -> Tuple[str, ...]:
        """Return the WWW-Authenticate headers of a 401; `proof`: a token that goes with Negotiate."""
        switches = self.switches
        schemes = list(OFFERS.get(switches.auth, EVERYTHING))
        if switches.offers == "parameters":
            schemes = [scheme + ("" if " " in scheme else PARAMETERS) for scheme in schemes]
        if proof and "Negotiate" in schemes:
            schemes[schemes.index("Negotiate")] = f"Negotiate {proof}"
        if switches.offers == "lower":
            schemes = [" ".join((scheme.partition(" ")[0].lower(), *scheme.split(" ")[1:])) for scheme in schemes]
        return (", ".join(schemes),) if switches.offers == "one" and schemes else tuple(schemes)


class Visitor:
    """One connection, which may be signed in, or halfway."""

    def __init__(self, gate: Gate) -> None:
        """Nobody has signed in yet."""
        self._gate = gate
        self._number = next(gate.numbers)
        self._known: Optional[Verdict] = None
        self._halfway: List[str] = []

    def close(self) -> None:
        """What was halfway is forgotten."""
        for method in self._halfway:
            self._gate.acceptors[method].ask({"end": self._number})

    def judge(self, header: str, bindings: bytes) -> Verdict:
        """Judge a request of Negotiate or NTLM on a channel with these bindings."""
        switches = self._gate.switches
        if not header:
            if self._known and switches.persist:
                return Verdict(True, self._known.account, self._known.bound, self._known.delegated, self._known.mutual)
            return self._refuse("no token")
        self._known = None
        scheme, _, text = header.partition(" ")
        offered = [offer.lower() for offer in OFFERS.get(switches.auth, ())]
        try:
            token = base64.b64decode(text, validate=True)
        except ValueError:
            return self._refuse("a token that is no base64")
        if scheme.lower() not in offered or not token:
            return self._refuse("a scheme that is not offered")
        # Windows takes NTLM inside Negotiate wherever NTLM is on
        method = "ntlm" if b"NTLMSSP\0" in token or self._halfway == ["ntlm"] else "kerberos"
        if method == "ntlm" and "ntlm" not in offered:
            return self._refuse("NTLM inside Negotiate")
        known = next(offer for offer in OFFERS[switches.auth] if offer.lower() == scheme.lower())
        return self._step(method, known.lower() if switches.offers == "lower" else known, text, bindings)

    def _step(self, method: str, scheme: str, text: str, bindings: bytes) -> Verdict:
        gate, switches = self._gate, self._gate.switches
        if method == "kerberos" and not gate.keytab:
            return self._refuse("no keytab")
        gate.write_users()
        strictness = "require" if switches.auth == "epa" else switches.epa
        answer = gate.acceptors[method].ask({
            "connection": self._number, "token": text, "bindings": base64.b64encode(bindings).decode() if strictness != "off" else "",
            "require": strictness == "require", "keytab": gate.keytab,
        })  # fmt: skip
        self._halfway = []
        facts = {name: answer[name] for name in ("account", "bound", "delegated", "mutual") if name in answer}
        if answer["error"]:
            return self._refuse(answer["error"], answer["token"], **facts)
        if not answer["done"]:
            self._halfway = [method]
            return Verdict(False, reason="halfway", answers=(f"{scheme} {answer['token']}",))
        self._known = Verdict(True, **facts, answers=self._proof(scheme, answer["token"]))
        return self._known

    def _proof(self, scheme: str, token: str) -> Tuple[str, ...]:
        mutual = self._gate.switches.mutual
        if mutual == "off" or not token:
            return ()
        return (f"{scheme} {WRONG if mutual == 'wrong' else token}",)

    def _refuse(self, reason: str, token: str = "", **facts: Any) -> Verdict:
        proof = token if self._gate.switches.error_token else ""
        return Verdict(False, **facts, reason=reason, answers=self._gate.offers(proof))
