"""What stands at the name by which the agent reads its certificate: described, and compared with what was recorded."""

import hashlib
import os
from contextlib import suppress
from dataclasses import replace
from typing import Optional, Tuple

from scx_enroll import journal as j
from scx_enroll import service, verify
from scx_enroll.agent import Agent, Pair
from scx_enroll.beside import COPY
from scx_enroll.errors import AgentNotReady, CertificateRefused, HostError
from scx_enroll.rootfs import Root
from scx_enroll.store import MAX_STATE_BYTES, Generation, Store

COPY_MODE = 0o444  # as the agent's own tool leaves it; everybody may read a certificate


def certificates_of(data: Optional[bytes]) -> Tuple[bytes, ...]:
    """Return the certificates (DER) in what the agent reads; none where it is absent or damaged, which is drift."""
    try:
        return verify.read(data or b"")
    except CertificateRefused:
        return ()


def leaf_of(data: Optional[bytes]) -> str:
    """Return the SHA-256 of the first certificate in `data`, "" where there is none."""
    found = certificates_of(data)
    return hashlib.sha256(found[0]).hexdigest() if found else ""


def place_of(root: Root, agent: Agent, pair: Pair) -> j.Place:
    """Describe what stands at the name the agent reads."""
    data = pair.certificate or b""
    leaf = leaf_of(pair.certificate)
    beside, _, copy = pair.name.text.rpartition("/")
    ours = COPY.fullmatch(copy) if beside in ("", agent.certificate.rpartition("/")[0]) else None
    return j.Place(
        kind=pair.name.kind if pair.name.kind in ("link", "file") else "absent",
        text=pair.name.text,
        leaf=leaf,
        sha256=hashlib.sha256(data).hexdigest() if pair.certificate is not None else "",
        uid=pair.target.uid,
        gid=pair.target.gid,
        mode=pair.target.mode or COPY_MODE,
        marker=bool(agent.marker) and root.entry(agent.marker).kind == "file",
        generation=ours[1] if ours and leaf.startswith(ours[1]) else "",
    )


def sound_copy(root: Root, certificate: str, generation: Generation) -> str:
    """Return the name of a copy beside the agent's that need only be linked: its bytes, owner and mode are right; "" for none."""
    folder, wanted = certificate.rpartition("/")[0], ("file", os.geteuid(), os.getegid(), COPY_MODE)
    for name in root.listdir(folder):
        shape = COPY.fullmatch(name)
        if shape and shape[1] == generation.id:
            entry = root.entry(f"{folder}/{name}")
            sound = (entry.kind, entry.uid, entry.gid, entry.mode) == wanted
            if sound and root.read(f"{folder}/{name}", MAX_STATE_BYTES) == generation.certificate:
                return name
    return ""


def signature(pair: Pair) -> str:
    """Identify the state of the agent's files, to tell our own changes from those of others."""
    entries = (pair.name, pair.target, pair.key_target)
    return hashlib.sha256(repr([(e.kind, e.inode, e.ctime_ns) for e in entries]).encode()).hexdigest()


def reached(name: str, text: str) -> str:
    """Return the path that a link with this text at that name leads to."""
    return text if text.startswith("/") else name.rpartition("/")[0] + "/" + text


def holds(root: Root, path: str, sha256: str) -> bool:
    """Say whether a path leads to bytes with this SHA-256."""
    try:
        return hashlib.sha256(root.read(path, MAX_STATE_BYTES)).hexdigest() == sha256
    except (FileNotFoundError, HostError):
        return False


def stands(root: Root, certificate: str, place: j.Place) -> bool:
    """Say whether the name is as a place says: the same link or file, leading to the same bytes."""
    entry = root.entry(certificate)
    if entry.kind != place.kind or (place.kind == "link" and entry.text != place.text):
        return False
    if not place.sha256:  # nothing was reached through the name
        return root.resolve(certificate).kind == "absent"
    return holds(root, certificate, place.sha256)


def data_of(store: Store, place: j.Place) -> Optional[bytes]:
    """Return the bytes of a place from our own records, None where we have none."""
    if place.saved:
        with suppress(FileNotFoundError):  # it held the key that was replaced
            return store.original(place.saved)
    for generation in store.generations():
        if place.generation and generation.id == place.generation:
            return generation.certificate
    return None


def kept(store: Store, place: j.Place, data: Optional[bytes]) -> j.Place:
    """Return a place whose bytes are in our records: a copy of ours may outlive its generation."""
    if data is None or data_of(store, place) == data:
        return place
    return replace(place, saved=store.save_original(data, place.sha256))


def generation_of(leaf: bytes, chain: Tuple[bytes, ...], origin: j.Origin) -> Generation:
    """Return the generation of a leaf and its intermediates, DER."""
    pems = b"".join(map(verify.pem, chain))
    return Generation(verify.facts(leaf).leaf[:16], verify.pem(leaf), pems, origin)


def check_way_back(root: Root, store: Store, agent: Agent, place: j.Place) -> None:
    """Raise AgentNotReady, before anything is changed, where a place can't be returned to."""
    data = data_of(store, place)
    what = f"certificate {place.leaf[:16]}, which was installed before,"
    if data is None:
        raise AgentNotReady(f"{what} is in no record any more", "see: scx-enroll status")
    if not service.fits(root, agent.key, data):
        raise AgentNotReady(
            f"{what} is for a key that the agent does not have any more, or in a form that it can't load",
            "stay with what is installed; or, for a new pair of the agent's own: scx-enroll hold, then "
            f"{agent.scxsslconfig} -f, then {agent.scxadmin} -restart",
        )


def judged(store: Store, place: j.Place, served: str) -> j.Place:
    """Return what stands there, marked where the agent serves another certificate that we know, or was never seen serving this one."""
    known = [one for one in (store.journal.installed, store.journal.before, store.journal.original) if one]
    unserved = any((served and one.leaf == served) or (one.leaf == place.leaf and one.unserved) for one in known)
    return replace(place, unserved=served != place.leaf and unserved)


def way_back(root: Root, store: Store, key: str, place: j.Place, target: str) -> j.Place:
    """Return what to put back for the leaf `target`: `place`, or where the agent can't load that or never served it, what it can.

    `key`: the path of the key that it is for. What can't be read is no way back; and a target that was served before needs none
    that leads further than to what stood there.
    """
    known = (store.journal.installed, store.journal.before, store.journal.original)

    def leads_back(one: j.Place) -> bool:
        with suppress(HostError):
            data = None if one.unserved or one.leaf == target else data_of(store, one)
            return data is not None and service.fits(root, key, data)
        return False

    served = any(one and one.leaf == target and not one.unserved for one in known)
    return place if served else next((one for one in (place, *known) if one and leads_back(one)), place)
