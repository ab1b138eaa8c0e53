"""The pair that a package script of the agent's moved aside and left there.

scx's postinstall renames key and certificate to *_temp, makes a pair of its own, and removes those. Where that fails the agent has
neither, and would be given a new key, though its own is there.
"""

from typing import Optional, Tuple

from scx_enroll import places, request, verify
from scx_enroll.agent import MAX_PEM_BYTES, Agent
from scx_enroll.beside import ASIDE, Beside
from scx_enroll.errors import EnrollError
from scx_enroll.rootfs import Root


def names(root: Root, agent: Agent) -> Tuple[str, ...]:
    """Return the names to be given back, the key first: none is taken, what is aside is a key, and a certificate for the key."""
    found = []
    key = _read(root, agent.key)
    if _is_free(root, agent.key):
        aside = _read(root, agent.key + ASIDE)
        if _spki(aside):
            found, key = [agent.key], aside
    if _is_free(root, agent.certificate):
        leaf = places.certificates_of(_read(root, agent.certificate + ASIDE))[:1]
        if leaf and _spki(key) == verify.facts(leaf[0]).spki:
            found.append(agent.certificate)
    return tuple(found)


def put_back(root: Root, beside: Beside, agent: Agent) -> None:
    """Give key and certificate their names back. Raises HostError where somebody took one meanwhile."""
    for name in names(root, agent):
        beside.move_back(name)


def leftovers(root: Root, agent: Agent) -> Tuple[str, ...]:
    """Name what stands aside though its name is taken by something else, for a person to remove."""
    taken = (name + ASIDE for name in (agent.key, agent.certificate) if not _is_free(root, name))
    there = (path for path in taken if root.entry(path).kind != "absent")
    return tuple(f"{path} is left from a package script, which removes it at its end; look at it, then remove it" for path in there)


def moved_ns(root: Root, agent: Agent) -> int:
    """Return when the last of them was moved, 0 where nothing is aside: the script may still be at work."""
    return max(root.entry(name + ASIDE).ctime_ns for name in (agent.key, agent.certificate))


def _is_free(root: Root, name: str) -> bool:
    """Say whether nothing stands at a name but, where we were killed, the very file that is aside."""
    here, aside = root.entry(name), root.entry(name + ASIDE)
    return here.kind == "absent" or (here.device, here.inode) == (aside.device, aside.inode)


def _read(root: Root, path: str) -> Optional[bytes]:
    try:
        return root.read(path, MAX_PEM_BYTES)
    except FileNotFoundError:
        return None


def _spki(key: Optional[bytes]) -> str:
    """Return the hash of a key's public part, "" for what is no key."""
    try:
        return request.spki_of(request.load_key(key or b""))
    except EnrollError:
        return ""
