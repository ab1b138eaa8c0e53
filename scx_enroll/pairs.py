"""A new key: certificate and key change together, by one rename.

For the length of the change both names that the agent reads lead through one link, `scx-enroll-pair`, to a folder with
both files. Making that shape, and unmaking it, changes no byte that the agent would read; between the two the link turns from
the old pair to the new one, or back. Two renames would leave a dead pair where the power fails between them.

Others write here meanwhile: through the links, or over one of the names. So what is there is looked at before each step, and
nothing is swapped that somebody else has touched.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Tuple

from scx_enroll import journal as j
from scx_enroll.beside import PAIR, PAIR_CERTIFICATE, PAIR_KEY, PAIR_LINK
from scx_enroll.errors import AgentNotReady, HostError
from scx_enroll.places import reached
from scx_enroll.rootfs import Root
from scx_enroll.store import MAX_STATE_BYTES, Store

AGAIN = "run again: it starts from what is there"
DISTURBED = ("others changed the agent's files while a certificate was put in place", AGAIN)


class Disturbed(AgentNotReady):
    """Somebody else changed the agent's files in the middle of it; what is there now is theirs."""


@dataclass(frozen=True)
class Names:
    """The names by which the agent reads its certificate and its key, and who must be able to read the key (uid, gid)."""

    certificate: str
    key: str
    owner: Tuple[int, int]


@dataclass(frozen=True)
class Side:
    """One of the two pairs: the bytes of both files, PEM; `bare`: it has no certificate, another one stands for it."""

    certificate: bytes
    key: bytes
    bare: bool = False


def same(root: Root, path: str, data: bytes) -> bool:
    """Say whether a path leads to these bytes."""
    try:
        return root.read(path, MAX_STATE_BYTES) == data
    except (FileNotFoundError, HostError):
        return False


def reads(root: Root, names: Names, side: Side) -> bool:
    """Say whether the agent would read this pair now, by whatever links."""
    if not same(root, names.key, side.key):
        return False
    return same(root, names.certificate, side.certificate) or (side.bare and root.resolve(names.certificate).kind == "absent")


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _links(root: Root, names: Names) -> Tuple[Tuple[str, str], ...]:
    """Return each name with the text that leads it through the link: relative, from where its folder really is."""
    to = root.resolve(_folder(names.certificate)).path
    way = os.path.relpath(to, root.resolve(_folder(names.key)).path)
    through = PAIR_LINK if way == "." else f"{way}/{PAIR_LINK}"
    return (names.certificate, f"{PAIR_LINK}/{PAIR_CERTIFICATE}"), (names.key, f"{through}/{PAIR_KEY}")


def _leads(root: Root, name: str, text: str) -> bool:
    return root.entry(name).text == text  # none but a link has one


def are_through(root: Root, names: Names) -> bool:
    """Say whether either name leads through the link."""
    return any(_leads(root, name, text) for name, text in _links(root, names))


def _holds(root: Root, names: Names, pair: str, side: Side) -> bool:
    inside = f"{_folder(names.certificate)}/{pair}"
    return same(root, f"{inside}/{PAIR_CERTIFICATE}", side.certificate) and same(root, f"{inside}/{PAIR_KEY}", side.key)


def check(root: Root, names: Names, side: Side, *, lost: bool = False) -> None:
    """Raise Disturbed where the agent does not read this pair any more, unless it is known to be `lost`."""
    if not lost and not reads(root, names, side):
        raise Disturbed(*DISTURBED)


def is_broken(root: Root, names: Names) -> bool:
    """Say whether a name leads through the link to nothing: what somebody put there between our look and our rename is lost."""
    return any(_leads(root, *link) and root.resolve(link[0]).kind == "absent" for link in _links(root, names))


def _pair_of(store: Store, names: Names, side: Side) -> str:
    """Return the folder that holds this pair, made where there is none; the one in use, if it does."""
    root, folder = store.root, _folder(names.certificate)
    used = root.entry(f"{folder}/{PAIR_LINK}").text
    for name in sorted(filter(PAIR.fullmatch, root.listdir(folder)), key=lambda name: name != used):
        if _holds(root, names, name, side):
            return name
    return store.beside.make_pair(names.certificate, side.certificate, side.key, names.owner)


def switch(store: Store, names: Names, now: Side, then: Side) -> None:
    """Have the agent read `then` instead of `now`, which it reads. Raises Disturbed."""
    root, beside = store.root, store.beside
    here, there = _pair_of(store, names, now), _pair_of(store, names, then)

    def look(*through: Tuple[str, str]) -> None:
        """See before each rename that it replaces nothing but what we know, by nothing but what we made."""
        check(root, names, now)
        if not (_holds(root, names, here, now) and _holds(root, names, there, then) and all(_leads(root, *link) for link in through)):
            raise Disturbed(*DISTURBED)

    links = _links(root, names)
    for pair, side in ((here, now), (there, then)):
        if not beside.own(names.certificate, pair, names.owner, side.key):
            raise Disturbed(*DISTURBED)
    if not all(_leads(root, *link) for link in links):
        look()
        beside.point(names.certificate, here)
        for name, text in links:
            if not _leads(root, name, text):
                look()
                beside.swap(name, j.Place(kind="link", text=text))
    look(*links)
    if not _point(store, names, here, there):
        raise Disturbed(*DISTURBED)


def _point(store: Store, names: Names, here: str, there: str) -> bool:
    """Turn the link; back again where somebody's file came over a name meanwhile, which belongs to what they wrote through it."""
    for pair in (there, here):
        store.beside.point(names.certificate, pair)
        if all(_leads(store.root, *link) for link in _links(store.root, names)):
            return pair == there
    return False


def turn_back(store: Store, names: Names, side: Side) -> bool:
    """Have both names lead to this pair again, whatever others wrote through the link; says whether they do: both still go through it."""
    links = _links(store.root, names)
    if not all(_leads(store.root, *link) for link in links):
        return False
    pair = _pair_of(store, names, side)
    owned = store.beside.own(names.certificate, pair, names.owner, side.key) and all(_leads(store.root, *link) for link in links)
    return owned and _point(store, names, store.root.entry(f"{_folder(names.certificate)}/{PAIR_LINK}").text, pair)


def put_key(store: Store, names: Names, place: j.KeyPlace, key: bytes) -> None:
    """Put the key where it belongs, a regular file or the link that was there, whose bytes the agent reads already."""
    root = store.root
    entry = root.entry(names.key)
    if place.kind == "link" and same(root, reached(names.key, place.text), key):
        if entry.text != place.text:
            store.beside.swap(names.key, j.Place(kind="link", text=place.text))
    elif (entry.kind, entry.uid, entry.gid) != ("file", place.uid, place.gid) or not same(root, names.key, key):
        file = j.Place(kind="file", uid=place.uid, gid=place.gid, mode=place.mode)
        store.beside.swap(names.key, file, key)


def straighten(store: Store, names: Names) -> None:
    """Make regular files of the names that lead through the link, whatever they lead to now, and remove link and folders."""
    root = store.root
    for name, text in _links(root, names):
        found = root.resolve(name)
        if _leads(root, name, text) and found.kind == "file":
            place = j.Place(kind="file", uid=found.uid, gid=found.gid, mode=found.mode)
            store.beside.swap(name, place, root.read(name, MAX_STATE_BYTES))
    if not are_through(root, names):  # else it leads to nothing, and that is not ours to decide
        remove(store, names)


def remove(store: Store, names: Names) -> None:
    """Remove link and folders; one that can't be removed is no reason to leave a change open, and `tidy` tells."""
    with suppress(HostError):
        store.beside.remove_pairs(names.certificate)
