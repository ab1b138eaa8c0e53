"""Whether the state is this machine's: what tells machines apart, and how many parts of that may change.

Two hosts must not share a key, and an image copies keys. One part that changes is a host that was moved, or got another machine-id, or
another name: that is told, and for a week it still counts, since a clone may get its name long after its first boot. Two are another
machine. What is not known never counts. Pure.
"""

import hashlib
import re
from dataclasses import replace
from typing import Optional, Tuple

from scx_enroll.journal import DAY_S, Identity

SETTLE_S = 7 * DAY_S  # after that, one part that changed is as if it had always been so
PARTS = {"machine": "machine-id", "product": "product UUID", "name": "host name"}
_NO_UUIDS = {  # what boards have whose maker entered none
    "03000200040005000006000700080009", "00020003000400050006000700080009", "12345678123456781234567812345678",
    "123456781234567890abcddeefaabbcc", "0123456789abcdef0123456789abcdef", "4c4c454400002010802080c04f202020",
    "fefefefefefefefefefefefefefefefe",
}
_NO_NAMES = {"", "(none)", "localhost", "localhost4", "localhost6"}


def _mark(part: str, text: str) -> str:
    """Return what the journal keeps of a part that is nobody's business (machine-id(5)): nothing else can be done with it."""
    return hashlib.sha256(f"scx-enroll {part} {text}".encode()).hexdigest()[:32]


def machine_id(text: str) -> str:
    """Return the mark of what /etc/machine-id holds, "" where it is empty, not initialised, or none."""
    found = text.strip().lower()
    known = re.fullmatch("[0-9a-f]{32}", found) and len(set(found)) > 1
    return _mark("machine-id", found) if known else ""


def product_uuid(text: str) -> str:
    """Return the mark of the product UUID that the firmware tells, "" for none and for those that many have."""
    found = text.strip().lower().replace("-", "")
    known = re.fullmatch("[0-9a-f]{32}", found) and len(set(found)) > 1 and found not in _NO_UUIDS
    return _mark("product", found) if known else ""


def host_name(text: str) -> str:
    """Return a host's name as it is compared, "" for what hosts without one are called."""
    found = text.strip().lower().rstrip(".")
    return "" if found.partition(".")[0] in _NO_NAMES else found


def same_name(one: str, other: str) -> bool:
    """Say whether two names are of the same host, one of them perhaps without its domain; marks are the same or not."""
    one, other = f"{one.lower()}.", f"{other.lower()}."
    return one.startswith(other) or other.startswith(one)


def changed(known: Identity, seen: Identity) -> Tuple[str, ...]:
    """Return the parts, by their names for people, that are known to be others now."""
    pairs = {name: (getattr(known, part), getattr(seen, part)) for part, name in PARTS.items()}
    return tuple(name for name, (was, now) in pairs.items() if was and now and not same_name(was, now))


def appeared(known: Identity, seen: Identity) -> Tuple[str, ...]:
    """Return the parts that were not known, and are now: as in the first boot of an image."""
    return tuple(name for part, name in PARTS.items() if getattr(seen, part) and not getattr(known, part))


def kept(known: Optional[Identity], seen: Identity, key: str, now: int) -> Identity:
    """Return what is to be remembered of this machine; `key`: of its agent, "" where there is none just now.

    `since`: when a part was first seen to have changed, whose old value counts until that has settled.
    """
    if known is None:
        return replace(seen, key=key, since=0)
    since = known.since if 0 < known.since <= now else now
    pending = bool(changed(known, seen)) and now < since + SETTLE_S
    old, new = (known, seen) if pending else (seen, known)
    parts = {part: getattr(old, part) or getattr(new, part) for part in PARTS}
    return Identity(**parts, key=key or known.key, since=since if pending else 0)
