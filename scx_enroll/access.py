"""Whether the agent's account can get at what it must read: it opens certificate and key as itself, long after root wrote them."""

import os
from contextlib import suppress
from typing import FrozenSet, Optional, Tuple

from scx_enroll import agent as agents
from scx_enroll.agent import Agent
from scx_enroll.errors import HostError, NeedsPerson
from scx_enroll.rootfs import MAX_LINKS, Root

MAX_GROUP_BYTES = 1 << 20  # a host's own groups; those of a directory stand in no file

Account = Tuple[int, FrozenSet[int]]  # uid, and every gid


def account_of(root: Root, agent: Agent) -> Optional[Account]:
    """Return who reads the pair, None where that is root, or not known here. What it rests on is noted."""
    owner = None if agent.account == "root" else agents.owner(root, agent)
    if owner is None:
        return None
    if root.path == "/":
        for path in ("/etc/passwd", "/etc/group"):
            root.resolve(path)
        return owner[0], frozenset(os.getgrouplist(agent.account, owner[1]))
    with suppress(FileNotFoundError, HostError):
        lines = root.read("/etc/group", MAX_GROUP_BYTES).decode("utf-8", "replace").splitlines()
        groups = [line.split(":") for line in lines if line.count(":") == 3]
        joined = (int(gid) for _, _, gid, names in groups if gid.isdecimal() and agent.account in names.split(","))
        return owner[0], frozenset((owner[1], *joined))
    return owner[0], frozenset({owner[1]})


def _may(root: Root, account: Account, path: str, bit: int) -> bool:
    entry = root.resolve(path)
    shift = 6 if entry.uid == account[0] else 3 if entry.gid in account[1] else 0
    return entry.kind == "absent" or bool(entry.mode >> shift & bit) or root.has_acl(path)


def locked(root: Root, agent: Agent) -> str:
    """Return the first folder on the way to certificate and key that the agent's account can't enter, or the key; "" for none.

    A certificate that it can't read is another matter (`readable`): that can be put right here. "" as well where the account is not
    known.
    """
    account = account_of(root, agent)
    if account is None:
        return ""
    for name in (agent.certificate, agent.key):
        for folder in root.way(name):
            if (folder != "/" or root.path == "/") and not _may(root, account, folder, 0o1):
                return folder
    return "" if _may(root, account, agent.key, 0o4) else agent.key


def readable(root: Root, agent: Agent) -> bool:
    """Say whether the agent's account can read the certificate at the name it reads."""
    account = account_of(root, agent)
    return account is None or _may(root, account, agent.certificate, 0o4)


def cure(agent: Agent, path: str) -> str:
    """Return the command that opens a path for the agent's account."""
    return f"chown {agent.account} {path} && chmod 0400 {path}" if path == agent.key else f"chmod a+x {path}"


def demand(root: Root, agent: Agent) -> None:
    """Raise HostError where the agent's account can't get at its pair."""
    path = locked(root, agent)
    if path:
        raise HostError(f"the agent's account {agent.account} can't get at {path}", cure(agent, path))


def demand_two(root: Root, agent: Agent) -> None:
    """Raise NeedsPerson where the key is read through the certificate's name, which a run gives to a bare certificate."""
    certificate, name, hops = root.entry(agent.certificate).path, agent.key, 0
    reason = f"the agent reads its key through the name of its certificate, {agent.certificate}: a new one there would take the key away"
    while hops <= MAX_LINKS:
        entry = root.entry(name)
        if entry.path == certificate:
            own = f"{agent.certificate.removesuffix('.pem')}-key.pem"
            then = f", then keyfile={own} in {agent.conf}, and {agent.scxadmin} -restart"
            copy = f"cp -p --remove-destination {agent.certificate} {agent.key}" if hops else f"cp -p {agent.certificate} {own}{then}"
            raise NeedsPerson(reason, f"give the key a file of its own: {copy}")
        if entry.kind != "link":
            break
        name, hops = os.path.join(entry.path.rpartition("/")[0] or "/", entry.text), hops + 1
