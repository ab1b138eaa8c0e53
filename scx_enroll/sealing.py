"""Keeps the state and the keys of machines apart: sets aside what another machine left here, and seals an image so that its clones do.

Section "Whose state it is" of docs/state.md is the specification.
"""

from dataclasses import dataclass, replace
from typing import Optional, Tuple

from scx_enroll import agent as agents
from scx_enroll import config as configs
from scx_enroll import identity, machine, naming, plan, request, service
from scx_enroll import journal as j
from scx_enroll.activate import Site
from scx_enroll.agent import Agent
from scx_enroll.case import Observed, Step
from scx_enroll.config import Config
from scx_enroll.errors import AgentNotReady, ConfigError, Sealed

KEPT_STRANGERS = 64  # as many as `beside` keeps


@dataclass(frozen=True)
class Seal:
    """How a host was sealed. `key`: SHA-256 of the public key that is baked in; `record`: where that is noted."""

    key: str
    record: str
    deleted: str  # the path of the key that is gone
    request: j.Request  # what a CA still holds for this host


def agent_of(site: Site, config: str) -> Optional[Agent]:
    """Return the agent, where one is found; a configuration that can't be read yet names no other one."""
    try:
        wanted = configs.given(site.root, config).agent
    except ConfigError:
        wanted = configs.Agent()
    try:
        return agents.find(site.root, wanted.layout, wanted.port)
    except AgentNotReady:
        return None


def settle(site: Site, config: str, *, seals: bool = False) -> Tuple[Step, ...]:
    """See that the state is this machine's, before anything is made of it; returns what was done about that.

    Raises Sealed on the host that was sealed, unless the work `seals`.
    """
    journal, seen = site.store.journal, identity.read(site.root)
    step = plan.whose(journal, seen)
    if step and step.action == "wait" and not seals:
        raise Sealed(step.reason, step.hint)
    if step is None or step.action == "wait":
        return ()
    agent = agent_of(site, config)
    known = {known.key for known in (journal.identity, journal.sealed) if known}
    strangers = _added(journal.strangers, *sorted({*known, journal.request.spki, *_keys(site, agent)} - {""}))
    if agent:
        note(site, agent, strangers)
    path = site.store.set_aside(j.Journal(identity=replace(seen, since=0), strangers=strangers))
    return (replace(step, reason=f"{step.reason}; it is in {path} now"),)


def remember(site: Site, seen: Observed) -> Tuple[Step, ...]:
    """Keep what tells this machine and its key from others; returns the note of a part that has changed."""
    known = site.store.journal.identity
    kept = machine.kept(known, seen.identity, seen.key, site.clock())
    if kept != known:
        site.store.update(identity=kept)
    if not kept.since or (known and known.since):
        return ()
    return (Step("L0", "notice", f"its {machine.changed(kept, seen.identity)[0]} changed"),)


def accept_name(site: Site, config: Config) -> Tuple[Step, ...]:
    """Take the name that the host gives itself now. Raises UsageError, ConfigError, AgentNotReady."""
    latch, store = naming.accepted(site.root, config), site.store
    if store.journal.held(site.clock()):
        raise AgentNotReady(f"held: {store.journal.hold}", "scx-enroll release, then run again")
    if latch == store.journal.latch:
        return ()
    store.update(latch=latch)
    return (Step("L0", "accept_name", f"its certificate shall name {latch.fqdn}"),)


def _keys(site: Site, agent: Optional[Agent]) -> Tuple[str, ...]:
    """Return the SHA-256 of each public key that stands here: whoever made it, it can't be told whether that was before the copy."""
    found = []
    for path in dict.fromkeys((*((agent.key,) if agent else ()), *agents.KEYS)):
        try:
            found.append(request.spki_of(request.load_key(site.root.read(path, agents.MAX_PEM_BYTES))))
        except (FileNotFoundError, AgentNotReady):  # none, or none that anybody can use
            continue
    return tuple(found)


def _added(known: Tuple[str, ...], *new: str) -> Tuple[str, ...]:
    return (*(one for one in known if one not in new), *new)[-KEPT_STRANGERS:]


def note(site: Site, agent: Agent, keys: Tuple[str, ...]) -> None:
    """Add to the list of baked-in keys beside the agent's. Raises HostError where that can't be read."""
    listed = identity.baked_in(site.root, agent)
    more = _added(listed, *(key for key in keys if key not in listed))
    if more != listed:
        site.store.beside.save_baked_in(agent.key, more)


def seal(site: Site, config: str, *, delete_key: bool) -> Seal:
    """Disarm the runs until another machine begins with this state. Raises AgentNotReady before anything is changed."""
    agent = agent_of(site, config)
    if delete_key and agent:
        _check_deletion(site, agent)
    store, open_request = site.store, site.store.journal.request
    key = (_keys(site, agent) or ("",))[0] if agent else ""
    seen = replace(identity.read(site.root), key=key, since=site.clock())
    if delete_key:  # the certificates are worth nothing without their key
        store.save_journal(j.Journal(sealed=seen, identity=store.journal.identity, strangers=store.journal.strangers))
        if agent:
            store.beside.delete_pair(agent.key, agent.certificate)
        store.empty()
        return Seal("", "", agent.key if agent else "", open_request)
    store.drop_keys(frozenset())  # one that waits for its certificate would be a secret in the image
    store.update(sealed=seen)  # before the key is noted as nobody's: a run would replace it
    if agent and key:
        note(site, agent, (key,))
    return Seal(key, identity.record_of(agent) if agent and key else "", "", open_request)


def _check_deletion(site: Site, agent: Agent) -> None:
    """Refuse where the agent would go on with a key that is gone, or where the key is not the agent's alone."""
    if site.root.live and (service.probe(agent.port).listening or (agent.pid_file and agents.process(site.root, agent) == "running")):
        raise AgentNotReady("the agent runs, and would die at its next restart without its key", f"stop it first: {agent.scxadmin} -stop")
    target = site.root.resolve(agent.key).path
    if target.rpartition("/")[0] != site.root.resolve(agent.key.rpartition("/")[0]).path:
        raise AgentNotReady(f"the agent's key {agent.key} leads to {target}, perhaps others'", "see whose it is, and remove it yourself")


def unseal(site: Site, config: str) -> bool:
    """Arm the runs again on the host that was sealed, whose key is its own; returns whether it was sealed."""
    sealed, agent = site.store.journal.sealed, agent_of(site, config)
    if sealed is None:
        return False
    if agent:
        listed = identity.baked_in(site.root, agent)
        if sealed.key in listed:
            site.store.beside.save_baked_in(agent.key, tuple(key for key in listed if key != sealed.key))
    site.store.update(sealed=None)
    return True


def told(sealed: Seal) -> str:
    """Return what was made of a host that is to be an image, and what is left to do."""
    lines = ["sealed: runs do nothing here until another machine has this state"]
    if sealed.deleted:
        lines.append(f"the agent's key {sealed.deleted} and its certificates are deleted; its own tool makes new ones at first boot")
    elif sealed.key:
        lines.append(f"the agent's key {sealed.key[:16]} is in the image, and noted as such in {sealed.record}; a clone uses another one")
    else:
        lines.append("no agent's key was found here")
    if sealed.request.state != "none":
        known = "a request whose ID is not known" if sealed.request.id is None else f"request ID {sealed.request.id}"
        lines.append(f"note: {known} at {sealed.request.ca} is this host's; no clone takes it over")
    lines.append("next: truncate -s 0 /etc/machine-id, shut the host down, make the image")
    return "".join(f"scx-enroll: {line}\n" for line in lines)
