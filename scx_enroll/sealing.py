"""Keeps the state and the keys of machines apart: sets aside what another machine left here, and seals an image so that its clones do.

Section "Whose state it is" of docs/state.md is the specification.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Optional, Tuple

from scx_enroll import agent as agents
from scx_enroll import beside, identity, idle, machine, naming, plan, request, service
from scx_enroll import config as configs
from scx_enroll import journal as j
from scx_enroll.activate import ANY, Site, refuse_held
from scx_enroll.agent import Agent
from scx_enroll.case import Observed, Step
from scx_enroll.config import Config
from scx_enroll.errors import AgentNotReady, ConfigError, HostError, Sealed, Unconfigured, UsageError
from scx_enroll.rootfs import Root

KEPT_STRANGERS = 64  # as many as `beside` keeps


@dataclass(frozen=True)
class Seal:
    """How a host was sealed. `key`: SHA-256 of the public key that is baked in; `record`: where that is noted."""

    key: str
    record: str
    deleted: str  # the path of the key that is gone
    request: j.Request  # what a CA still holds for this host
    dropped: bool = False  # a new key was waiting for its certificate, and is gone
    hold: str = ""  # why each clone will be held


def check_image(root: Root) -> None:
    """Raise UsageError where a folder holds nothing that a host has."""
    signs = (identity.MACHINE_ID, configs.PATH, idle.STATE, "/etc/os-release", "/opt/omi", "/opt/microsoft/scx", *agents.KEYS)
    if all(root.entry(path).kind == "absent" for path in signs):
        what = f"{root.path} is no image: neither /etc/machine-id nor an agent nor a configuration is there"
        raise UsageError(what, "give the folder that is the image's /")


def agent_of(site: Site, config: str) -> Optional[Agent]:
    """Return the agent, whatever ports it serves, None where there is none; a configuration that can't be read yet names no other one.

    Raises AgentNotReady, ConfigError where a key stands here, and whose it is can't be told.
    """
    wanted, problem = configs.Agent(), None
    try:
        wanted = configs.given(site.root, config).agent
    except ConfigError as error:
        problem = None if isinstance(error, Unconfigured) else error
    try:
        return agents.find(site.root, wanted.layout, None)
    except AgentNotReady as error:
        why, found = problem or error, [path for path in agents.KEYS if site.root.entry(path).kind != "absent"]
        if found:
            raise type(why)(f"there is a key, {found[0]}, but the agent can't be told: {why.message}", why.hint) from None
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
    agent = None
    with suppress(AgentNotReady, ConfigError):  # the journal has the usual keys all the same
        agent = agent_of(site, config)
    known = {known.key for known in (journal.identity, journal.sealed) if known}
    strangers = _added(journal.strangers, *sorted({*known, journal.request.spki, *_keys(site, agent)} - {""}))
    if agent:
        note(site, agent, strangers)
    told = (j.Change(site.clock(), "cloned", step.reason, ("its state was set aside",)),)
    owed = ANY if journal.restarting and not journal.sealed else ""  # an agent that we stopped is started, whosever the state was
    path = site.store.set_aside(_fresh(journal, identity=replace(seen, since=0), strangers=strangers, changes=told, restarting=owed))
    return (replace(step, reason=f"what was known here is in {path} now"),)


def named_in_full(site: Site, config: str) -> Tuple[str, ...]:
    """Return what to see to where an image's configuration tells each clone the same name."""
    with suppress(ConfigError, HostError):  # told where it is read for good
        wanted = configs.given(site.root, config)
        if not naming.names_itself(wanted):
            what = f"name = {wanted.host.name} is written out in [host]: see that it is this host's, and not the original's"
            return (f"{what}; auto and {request.SHORT_NAME} fit each clone",)
    return ()


def _fresh(journal: j.Journal, **known: Any) -> j.Journal:
    """Return a new journal, in which an operator's hold outlives the old one."""
    return j.Journal(hold=journal.hold, hold_until=journal.hold_until, **known)


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
    refuse_held(site)
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
    store, before = site.store, site.store.journal
    rest = (before.request, bool(store.staged()), before.held(site.clock()))
    key = (_keys(site, agent) or ("",))[0] if agent else ""
    seen = replace(identity.read(site.root), key=key, since=site.clock())
    if delete_key:  # the certificates are worth nothing without their key
        store.save_journal(_fresh(before, sealed=seen, identity=before.identity, strangers=before.strangers))
        if agent:
            store.beside.delete_pair(agent.key, agent.certificate)
        store.empty()
        return Seal("", "", agent.key if agent else "", *rest)
    store.drop_keys(frozenset())  # one that waits for its certificate would be a secret in the image
    store.update(sealed=seen)  # before the key is noted as nobody's: a run would replace it
    if agent and key:
        note(site, agent, (key,))
    return Seal(key, identity.record_of(agent) if agent and key else "", "", *rest)


def _check_deletion(site: Site, agent: Agent) -> None:
    """Refuse where the agent would go on with a key that is gone, or be unknown without, or where the key is not the agent's alone."""
    if agent.layout == "pegasus":
        hint = "seal without --delete-key: a clone does not go on with the key that came with it"
        raise AgentNotReady("an agent older than scx 1.5 is known by its key, and not found without", hint)
    listening = site.root.live and agent.port and service.probe(agent.port).listening
    if listening or (agent.pid_file and agents.process(site.root, agent) == "running"):
        raise AgentNotReady("the agent runs, and would die at its next restart without its key", f"stop it first: {agent.scxadmin} -stop")
    target = site.root.resolve(agent.key).path
    if target.rpartition("/")[0] != site.root.resolve(agent.key.rpartition("/")[0]).path:
        raise AgentNotReady(f"the agent's key {agent.key} leads to {target}, perhaps others'", "see whose it is, and remove it yourself")
    for path in (agent.key, agent.certificate):
        folder = path.rpartition("/")[0]
        for name in site.root.listdir(folder):
            found = site.root.entry(f"{folder}/{name}")
            if found.kind == "dir" and (beside.OF_THE_AGENT.fullmatch(name) or found.path == site.root.entry(path).path):
                raise AgentNotReady(f"{found.path} is a folder, where only files are deleted", "see whose it is, and remove it yourself")


def unseal(site: Site, config: str) -> bool:
    """Arm the runs again on the host that was sealed, whose key is its own; returns whether it was sealed."""
    sealed = site.store.journal.sealed
    if sealed is None:
        return False
    agent = agent_of(site, config) if sealed.key else None
    if agent:
        listed = identity.baked_in(site.root, agent)
        if sealed.key in listed:
            site.store.beside.save_baked_in(agent.key, tuple(key for key in listed if key != sealed.key))
    site.store.update(sealed=None)
    return True


def told(sealed: Seal, root: str) -> str:
    """Return what was made of a host that is to be an image, and what is left to do; `root`: the path of its tree, "/" for this host."""
    lines = ["sealed: runs do nothing here until another machine has this state"]
    if sealed.deleted:
        lines.append(f"the agent's key {sealed.deleted} and its certificates are deleted; its own tool makes new ones at first boot")
    elif sealed.key:
        lines.append(f"the agent's key {sealed.key[:16]} is in the image, and noted as such in {sealed.record}; a clone uses another one")
    else:
        lines.append("no agent's key was found here")
    if sealed.request.state != "none":
        known = "a request whose ID is not known" if sealed.request.id is None else f"request ID {sealed.request.id}"
        gone = "; the new key that it is for is not kept: have it denied there" if sealed.dropped else ""
        lines.append(f"note: {known} at {sealed.request.ca} is this host's; no clone takes it over{gone}")
    elif sealed.dropped:
        lines.append("note: a new key that waited for its certificate is not kept")
    if sealed.hold:
        otherwise = "scx-enroll seal --undo, scx-enroll release, and seal again"
        lines.append(f"note: each clone will be held: {sealed.hold}; where that is not meant: {otherwise}")
    here = root == "/"
    lines.append(f"next: truncate -s 0 {'' if here else root}/etc/machine-id, {'shut the host down, ' if here else 'then '}make the image")
    return "".join(f"scx-enroll: {line}\n" for line in lines)
