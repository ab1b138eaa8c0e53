"""Files through which another process steers a running CA: switches.json is the wish, acts.jsonl a queue of deeds.

Both are read before each request and once a second; rows.json tells what the request table holds, and the last requests, as it
was before the last reply was sent.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Sequence, Tuple

from . import messages
from .pages import disposition
from .server import LabCA
from .switches import Switches, parse

ID_VERBS: Mapping[str, str] = {
    "approve": "issue a pending or denied request",
    "deny": "deny a request",
    "delete": "remove a request from the table",
    "revoke": "mark a certificate as revoked",
}
CA_VERBS: Mapping[str, str] = {
    "renew": "renew the CA's certificate with the same key",
    "renew-key": "renew the CA's certificate with a new key",
    "renew-root": "renew root and CA with new keys; cross certificates come with it",
    "expire": "let the CA's certificate be one that ended yesterday",
    "rebuild": "install the CA anew: new keys, no requests, IDs from 1 again",
    "trust": "write issuer-trust.pem anew, as an operator does after a new root",
}

SHOWN_REQUESTS = 100


class Unfit(Exception):
    """What was typed can not be done; its text says why."""


class Steering:
    """The running CA's side."""

    def __init__(self, lab: LabCA) -> None:
        """Take the CA to steer."""
        self.lab = lab
        self.switches = lab.directory / "switches.json"
        self.acts = lab.directory / "acts.jsonl"
        self._stamp = (0, 0)
        self._wish: Dict[str, Any] = {}
        self._done = 0
        self._lock = threading.Lock()

    def apply(self) -> None:
        """Take over what changed; a wish that does not read is printed and left out."""
        with self._lock:
            with contextlib.suppress(FileNotFoundError):
                state = self.switches.stat()
                if (state.st_mtime_ns, state.st_ino) != self._stamp:
                    self._stamp = (state.st_mtime_ns, state.st_ino)
                    self._set(self.switches.read_text())
            with contextlib.suppress(FileNotFoundError):
                lines = self.acts.read_text().splitlines()
                for line in lines[self._done :]:
                    self._act(line)
                self._done = len(lines)
            self._publish()

    def publish(self) -> None:
        """Write down what the CA holds now."""
        with self._lock:
            self._publish()

    def _set(self, text: str) -> None:
        """Take over what differs from the last wish only: switches that count down are not wound up again by another's change."""
        default = Switches().values()
        try:
            wish = dict(json.loads(text))
            changes = {name: default[name] for name in self._wish if name not in wish}
            changes.update({name: value for name, value in wish.items() if name not in self._wish or self._wish[name] != value})
            self.lab.switches.update(changes)
        except (KeyError, TypeError, ValueError) as error:
            print(f"switches.json: {error!r}", file=sys.stderr, flush=True)
            return
        self._wish = wish

    def _act(self, line: str) -> None:
        authority = self.lab.authority
        try:
            act = dict(json.loads(line))
            number = int(act.get("id", 0))
            deeds: Dict[str, Callable[[], object]] = {
                "approve": lambda: authority.approve(number),
                "deny": lambda: authority.deny(number),
                "delete": lambda: authority.delete(number),
                "revoke": lambda: authority.revoke(number),
                "renew": authority.renew,
                "renew-key": lambda: authority.renew(new_key=True),
                "renew-root": authority.renew_root,
                "expire": authority.expire,
                "rebuild": authority.rebuild,
                "trust": self.lab.write_issuer_trust,
            }
            deeds[str(act["do"])]()
        except KeyError as error:
            print(f"acts.jsonl: {line}: no {error}", file=sys.stderr, flush=True)
        except (TypeError, ValueError) as error:
            print(f"acts.jsonl: {line}: {error}", file=sys.stderr, flush=True)

    def _publish(self) -> None:
        rows = [
            {
                "id": row.id,
                "state": row.state,
                "template": row.template,
                "hresult": messages.code(row.hresult),
                "message": disposition(row),
            }
            for row in list(self.lab.authority.rows.values())
        ]
        requests = [asdict(seen) for seen in self.lab.log[-SHOWN_REQUESTS:]]
        table = {"posts": self.lab.authority.posts, "arrived": len(self.lab.log), "rows": rows, "requests": requests}
        text = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
        write(self.lab.directory / "rows.json", text)


def write(path: Path, text: str) -> None:
    """Put a file in place whole."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def wish(changes: Sequence[str]) -> Dict[str, Any]:
    """Return NAME=VALUE words as switches and their values. Raises Unfit."""
    found = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise Unfit(f"NAME=VALUE expected, not {change!r}")
        try:
            found[name] = parse(name, text)
        except KeyError:
            raise Unfit(f"no switch {name!r}; there are: {', '.join(sorted(Switches().values()))}") from None
        except (TypeError, ValueError) as error:
            raise Unfit(str(error)) from None
    return found


def steer(directory: Path, changes: Mapping[str, Any], acts: Sequence[Tuple[str, int]], *, reset: bool) -> None:
    """Write a wish and deeds down for the CA that runs there. Raises Unfit."""
    if not (directory / "ready.json").exists():
        raise Unfit(f"no CA runs in {directory}: start one there first")
    path = directory / "switches.json"
    before: Dict[str, Any] = {}
    if not reset and path.exists():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError):
            raise Unfit(f"{path} does not read: put it right, or use --reset") from None
    if changes or reset:
        write(path, json.dumps({**before, **changes}, indent=1) + "\n")
    if acts:
        with (directory / "acts.jsonl").open("a") as file:
            file.writelines(json.dumps({"do": do, "id": number}) + "\n" for do, number in acts)
