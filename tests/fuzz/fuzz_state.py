"""Fuzz target: any bytes as the journal, the list of baked-in keys and a key that waits, and as a time and hours that a person gives.

python -m tests.fuzz.fuzz_state [SECONDS]
"""

import contextlib
import random
import tempfile
from functools import partial
from pathlib import Path
from typing import Callable

from scx_enroll import agent as agents
from scx_enroll import arguments, identity, journal, keys, values
from scx_enroll.agent import Agent
from scx_enroll.errors import HostError, UsageError
from scx_enroll.rootfs import Root
from scx_enroll.store import Store

from . import loop

NOW = 1_700_000_000
SPKI = "ab" * 32
AGENT = "/etc/opt/omi/ssl"
SEEDS = (
    journal.to_json(journal.Journal(
        installation=journal.Installation(
            "installing", "omi", 1270, f"{AGENT}/omi.pem", journal.Place("link", "a.pem"), journal.Place("file"), key=f"{AGENT}/omikey.pem",
            key_target=journal.KeyPlace("file", SPKI), key_previous=journal.KeyPlace("link", SPKI, "k.pem"),
        ),
        identity=journal.Identity("m", "p", "host1"), sealed=journal.Identity("m"), strangers=(SPKI,), hold="freeze", hold_until=NOW,
        known=journal.Known(NOW, SPKI, journal.Place("link", "a.pem")), changes=(journal.Change(NOW, "overwritten", "by SCOM"),),
        fights=(journal.Fight("key", NOW, NOW + 3600, 3600),),
    )),
    f"# keys\n{SPKI}\n{SPKI[::-1]}\n".encode(),
    b"-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA==\n-----END PRIVATE KEY-----\n",
    b"2026-12-24T06:00",
    b"02:00-05:00, 22:30-00:30",
)


def one(base: Path, found: Agent, data: bytes) -> None:
    """Read it as everything: a result or a documented refusal."""
    root = Root(str(base))
    with contextlib.suppress(HostError):
        journal.from_json(journal.Journal, data, "journal.json")
    record, kept = base / identity.record_of(found).lstrip("/"), base / Store.key_path(SPKI).lstrip("/")
    for path in (record, kept):
        path.write_bytes(data)
        path.chmod(0o600)
    with contextlib.suppress(HostError):
        identity.baked_in(root, found)
    with contextlib.suppress(HostError):
        keys.waiting(Store(root), "")
    text = data.decode("latin-1")
    with contextlib.suppress(UsageError):
        assert arguments.moment(text, NOW) > NOW
    with contextlib.suppress(ValueError):
        assert values.windows(text)


def prepared(base: Path) -> Callable[[bytes], None]:
    """Return `one` for a folder in which there are an agent and a state."""
    for name, text in (("opt/omi/bin/omiserver", ""), ("etc/opt/omi/conf/omiserver.conf", "httpsport=1270\n"), ("etc/opt/omi/ssl/x", "")):
        path = base / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (base / "var/lib/scx-enroll/keys").mkdir(parents=True)
    return partial(one, base, agents.find(Root(str(base))))


def mutated(chance: random.Random) -> bytes:
    """Return a seed with a few pieces changed."""
    return loop.spliced(chance, SEEDS, 1 << 16)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        loop.run(prepared(Path(folder)), mutated, "inputs read")
