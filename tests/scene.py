"""A host, a CA and the program between them, for the tests of whole runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import pytest

from scx_enroll import enroll, service
from scx_enroll.errors import EnrollError
from scx_enroll.job import Options, Result, Tools
from scx_enroll.plan import Wish
from scx_enroll.rootfs import Root
from scx_enroll.service import Patience
from tests.lab.agent import LabHost, fingerprint
from tests.lab.ca import LabCA

# The stand-in agent starts in a tenth of a second, so what a real host may take need not be waited for.
BRISK = Patience(command_s=20, listener_s=5, gone_s=3, poll_s=0.02)


NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, openssl/x509_vfy.h


def take_openssls_clock_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where time is simulated, let OpenSSL, which has the kernel's, check no dates; `verify` judges the leaf's by the time it is given."""
    real = service._client_context

    def timeless(anchors: Tuple[bytes, ...]) -> Any:
        context = real(anchors)
        context.verify_flags |= NO_CHECK_TIME
        return context

    monkeypatch.setattr(service, "_client_context", timeless)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit status, last message, hint, and the rows of `plan` that were acted on."""

    status: int
    message: str
    hint: str
    rows: Tuple[str, ...] = ()
    result: Optional[Result] = None


@dataclass
class Scene:
    """One host's tree, configured for one or more lab CAs. `offset_s` moves the clock that the program sees."""

    host: LabHost
    cas: Sequence[LabCA]
    settings: Dict[str, str] = field(default_factory=dict)
    offset_s: int = 0
    patience: Patience = BRISK
    acted: List[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Write configuration, password and trust."""
        self.etc.mkdir(parents=True, exist_ok=True)
        for number, ca in enumerate(self.cas):
            self.write(f"web{number}.pem", Path(ca.server_trust).read_bytes())
            self.write(f"ca{number}.pem", Path(ca.issuer_trust).read_bytes())
            self.write(f"password{number}", ca.password.encode() + b"\n", 0o600)
        self.configure()

    @classmethod
    def of(cls, host: LabHost, cas: Sequence[LabCA], **settings: str) -> Scene:
        """Return the scene of a tree that is configured already; `settings` as it was."""
        made = cls.__new__(cls)
        made.host, made.cas, made.settings, made.offset_s, made.patience, made.acted = host, cas, settings, 0, BRISK, []
        return made

    @property
    def etc(self) -> Path:
        """The configuration's folder."""
        return Path(self.host.root, "etc/scx-enroll")

    @property
    def state(self) -> Path:
        """The state directory."""
        return Path(self.host.root, "var/lib/scx-enroll")

    def write(self, name: str, data: bytes, mode: int = 0o644) -> Path:
        """Write a file of the configuration's folder."""
        path = self.etc / name
        path.write_bytes(data)
        path.chmod(mode)
        return path

    def configure(self, **settings: str) -> None:
        """Write the configuration anew; `settings` are keys with `_` for `-`, of the section that has them."""
        self.settings.update(settings)
        left = dict(self.settings)

        def lines(keys: Sequence[str]) -> str:
            return "".join(f"{key.replace('_', '-')} = {left.pop(key)}\n" for key in keys if key in left)

        left.setdefault("name", self.host.fqdn)
        left.setdefault("settle", "0s")
        text = "[host]\n" + lines(("name", "alternative_names"))
        text += "[renewal]\n" + lines(("at", "spread", "certificates_per_day", "submissions_per_day", "pending_days"))
        text += f"[agent]\nport = {self.host.port}\n" + lines(("settle", "layout", "minimum_key", "activation", "restart_window", "key", "new_key"))
        shared = lines(("require_cn", "require_revocation", "template"))
        if "template" not in shared:
            shared += "template = SCXAgent\n"
        for number, ca in enumerate(self.cas):
            name = f"[ca c{number}]" if len(self.cas) > 1 else "[ca]"
            text += (
                f"{name}\nserver = {ca.server}\nauth = basic\nuser = {ca.user}\n{shared}"
                f"server-trust = /etc/scx-enroll/web{number}.pem\nissuer-trust = /etc/scx-enroll/ca{number}.pem\n"
                f"password-file = /etc/scx-enroll/password{number}\n"
            )
        assert not left, f"settings that no section took: {left}"
        self.write("scx-enroll.conf", text.encode())

    # -- running --------------------------------------------------------------------------------------------------

    def tools(self, **parts: Any) -> Tools:
        """The program's parts, with this scene's clock and patience."""
        base = Tools(
            clock=lambda: int(time.time()) + self.offset_s,
            patience=self.patience,
            acted=lambda step: self.acted.append(step.row),
        )
        return replace(base, **parts)

    def root(self, *, live: bool = True) -> Root:
        """The host's tree as the program sees it."""
        return Root(self.host.root, live)

    def do(self, verb: Callable[..., Any], *arguments: Any, live: bool = True, parts: Optional[Dict[str, Any]] = None,
           **wish: bool) -> Outcome:
        """Carry out a verb of `enroll` in this process."""
        self.acted.clear()
        try:
            result: Result = verb(
                self.root(live=live), Options(wish=Wish(**wish)), self.tools(**(parts or {})), *arguments
            )
        except EnrollError as error:
            return Outcome(error.exit_status, error.message, error.hint, tuple(self.acted))
        shown = result.failure if result.failure and not result.step.status else None
        message = shown.message if shown else result.step.reason
        return Outcome(result.status, message, result.step.hint, tuple(self.acted), result)

    def run(self, *, live: bool = True, parts: Optional[Dict[str, Any]] = None, **wish: bool) -> Outcome:
        """Converge once."""
        return self.do(enroll.run, live=live, parts=parts, **wish)

    def command(self, *arguments: str, live: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run the program as a process of its own."""
        return subprocess.run(
            self.argv(*arguments, live=live), capture_output=True, text=True, timeout=timeout, check=False, cwd="/"
        )

    def argv(self, *arguments: str, live: bool = True) -> List[str]:
        """Return the command line of the program for this host."""
        where = ["--root", self.host.root, *(["--live"] if live else [])]
        return [os.path.join(os.path.dirname(sys.executable), "scx-enroll"), *arguments[:1], *where, *arguments[1:]]

    # -- looking --------------------------------------------------------------------------------------------------

    @property
    def served(self) -> str:
        """SHA-256 of what the agent serves, "" for nothing."""
        return fingerprint(self.host.served())

    @property
    def installed(self) -> str:
        """SHA-256 of the first certificate at the name the agent reads."""
        return fingerprint(self.host.leaf())

    @property
    def issued(self) -> int:
        """Certificates issued by all CAs."""
        return sum(ca.authority.issued for ca in self.cas)

    @property
    def posts(self) -> int:
        """POSTs that reached any CA."""
        return sum(ca.count_post for ca in self.cas)

    def is_enrolled(self) -> bool:
        """Whether the agent serves what is installed, and one of the CAs issued that."""
        known = {
            fingerprint(row.certificate) for ca in self.cas for row in ca.authority.rows.values() if row.certificate
        }
        return bool(self.served) and self.served == self.installed and self.served in known

    def remembered(self) -> Dict[str, bytes]:
        """Return every file of the state directory but the lock, for comparison before and after."""
        return {
            str(path.relative_to(self.state)): path.read_bytes()
            for path in sorted(self.state.rglob("*")) if path.is_file() and path.name != "lock"
        }
