"""Keys of our own making, from the request until the agent has them; and none for longer."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Optional

from scx_enroll.errors import AgentNotReady
from scx_enroll.request import kind_of, load_key, make_key, spki_of
from scx_enroll.store import Store


@dataclass(frozen=True)
class Key:
    """A private key: the SHA-256 of its SPKI, where it stands beneath the root, its PEM."""

    spki: str
    path: str
    pem: Optional[bytes]


def waiting(store: Store, present: str) -> Optional[Key]:
    """Return the key that waits for its certificate; not one that the agent has by now."""
    for spki in store.staged():
        pem = store.key(spki)
        with suppress(AgentNotReady):  # what a disk made of it is no key any more: another one is made
            if spki != present and spki_of(load_key(pem)) == spki:
                return Key(spki, store.key_path(spki), pem)
    return None


def staged(store: Store, known: Optional[Key], kind: str) -> Key:
    """Return the key to ask a certificate for: the one that waits, if it is of that kind or a request is open for it; else a new one."""
    if known and (store.journal.request.spki == known.spki or kind_of(load_key(known.pem or b"").public_key()) == kind):
        return known
    pem = make_key(kind)
    spki = spki_of(load_key(pem))
    store.save_key(spki, pem)
    store.drop_keys(frozenset({spki}))  # one key waits at a time
    return Key(spki, store.key_path(spki), pem)
