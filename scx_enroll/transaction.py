"""Changes what the agent serves, by one rename, and proves it; or puts back what was there, and proves that.

Section "The installation" of docs/state.md is the specification. `proceed` carries out whatever the journal says is
open, from its first step: each step finds done what is done, so it serves a fresh installation and the recovery of one
that was killed alike.
"""

import hashlib
import os
from dataclasses import replace
from typing import Optional, Tuple

from scx_enroll import agent as agents
from scx_enroll import journal as j
from scx_enroll import service
from scx_enroll.activate import Site, Truce, come_back, leave_packagers_alone, prove, within_budget
from scx_enroll.agent import Agent, Pair
from scx_enroll.beside import COPY
from scx_enroll.errors import AgentNotReady, CertificateRefused, EnrollError, HostError, RollbackFailed, RolledBack
from scx_enroll.rootfs import Root
from scx_enroll.store import MAX_STATE_BYTES, Generation
from scx_enroll.verify import read

MAX_SKIPS = 8  # as many as generations are kept
COPY_MODE = 0o444  # as the agent's own tool leaves it; everybody may read a certificate


def certificates_of(data: Optional[bytes]) -> Tuple[bytes, ...]:
    """Return the certificates (DER) in what the agent reads; none where it is absent or damaged, which is drift."""
    try:
        return read(data or b"")
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


def signature(pair: Pair) -> str:
    """Identify the state of the agent's files, to tell our own changes from those of others."""
    entries = (pair.name, pair.target, pair.key_target)
    return hashlib.sha256(repr([(e.kind, e.inode, e.ctime_ns) for e in entries]).encode()).hexdigest()


def install(site: Site, agent: Agent, generation: Generation, *, running: bool, inputs: str) -> None:
    """Put a generation in service. `running`: the agent is meant to run, so it is restarted and must serve it.

    Raises RolledBack or RollbackFailed where it was not served, HostError where nothing could be changed, AgentNotReady
    before anything is changed where the restart budget has no room for the way back.
    """
    name = site.store.beside.free_copy(agent.certificate, generation.id)
    # A migration to OMI moves the classic name, a link, into OMI's folder: there only an absolute text leads to the copy.
    text = name if agent.layout == "omi" else _reached(agent.certificate, name)
    target = j.Place(
        kind="link",
        text=text,
        leaf=leaf_of(generation.certificate),
        sha256=hashlib.sha256(generation.certificate).hexdigest(),
        uid=os.geteuid(),
        gid=os.getegid(),
        mode=COPY_MODE,
        generation=generation.id,
    )
    _begin(site, agent, target, running=running, inputs=inputs, hold="")


def put_back(site: Site, agent: Agent, place: j.Place, *, running: bool, inputs: str, hold: str) -> None:
    """Put back what was in service before, and hold. Raises as `install`."""
    _begin(site, agent, place, running=running, inputs=inputs, hold=hold)


def _begin(site: Site, agent: Agent, target: j.Place, *, running: bool, inputs: str, hold: str) -> None:
    leave_packagers_alone(site)
    if running:
        service.check_tool(site.root, agent.scxadmin)
        within_budget(site, 2)  # one to go forward, one to come back
    pair = agents.read_pair(site.root, agent)
    previous = place_of(site.root, agent, pair)
    if pair.certificate is not None and not previous.generation:
        previous = replace(previous, saved=site.store.save_original(pair.certificate, previous.sha256))
    site.store.installation(
        "install",
        layout=agent.layout,
        port=agent.port,
        certificate=agent.certificate,
        target=target,
        previous=previous,
        running=running,
        inputs=inputs,
        hold=hold,
        pid=0,
    )
    proceed(site)


def proceed(site: Site) -> None:
    """Finish or undo the open installation; `settled` afterwards, or the failure is one that a later run can mend.

    Raises RolledBack or RollbackFailed where the target was not served. A name that somebody else has changed since is
    left as it is: the next look starts from what is there. While the agent is not there to be looked at, or packages are
    being changed, it stays open.
    """
    entry = site.store.journal.installation
    leave_packagers_alone(site)
    agent = _agent(site, entry)
    if agent is None or not any(_stands(site, entry.certificate, _known(place)) for place in (entry.target, entry.previous)):
        site.store.installation("undone" if entry.state == "installing" else "kept")
        return
    if entry.state == "installing":
        try:
            _forward(site, agent)
        except Truce as spent:
            if service.probe(agent.port).listening or not _stands(site, entry.certificate, _known(entry.target)):
                raise
            site.store.installation("failed", why=spent.message)  # a killed run left it down: the last restart is for the way back
        except AgentNotReady as cause:
            if site.store.journal.installation.state == "settled":
                raise
            site.store.installation("failed", why=cause.message)
        except HostError:
            if _open_unchanged(site):
                site.store.installation("undone")
            raise
    if site.store.journal.installation.state == "rolling_back":
        _backward(site, agent)


def _agent(site: Site, entry: j.Installation) -> Optional[Agent]:
    """Return the agent whose installation is open, None where it reads another name now: a migration, or another conf.

    Raises AgentNotReady where there is none that can be looked at.
    """
    try:
        found = agents.find(site.root, entry.layout, entry.port)
    except AgentNotReady:
        found = agents.find(site.root, "auto", entry.port)
    return found if found.certificate == entry.certificate else None


def _open_unchanged(site: Site) -> bool:
    """Say whether the open installation has not changed the name yet."""
    entry = site.store.journal.installation
    return entry.state == "installing" and not _stands(site, entry.certificate, _known(entry.target))


def _known(place: Optional[j.Place]) -> j.Place:
    if place is None:  # from_json refuses such a journal
        raise EnrollError("an open installation lacks its target or previous place")
    return place


def _reached(certificate: str, text: str) -> str:
    """Return the path that a link with this text at the agent's name leads to."""
    return text if text.startswith("/") else certificate.rpartition("/")[0] + "/" + text


def _holds(site: Site, path: str, sha256: str) -> bool:
    try:
        return hashlib.sha256(site.root.read(path, MAX_STATE_BYTES)).hexdigest() == sha256
    except (FileNotFoundError, HostError):
        return False


def _stands(site: Site, certificate: str, place: j.Place) -> bool:
    entry = site.root.entry(certificate)
    if entry.kind != place.kind or (place.kind == "link" and entry.text != place.text):
        return False
    if not place.sha256:  # nothing was reached through the name
        return site.root.resolve(certificate).kind == "absent"
    return _holds(site, certificate, place.sha256)


def _data(site: Site, place: j.Place) -> Optional[bytes]:
    """Return the bytes of a place from our own records, None where we have none."""
    if place.saved:
        return site.store.original(place.saved)
    for generation in site.store.generations():
        if place.generation and generation.id == place.generation:
            return generation.certificate
    return None


def _fits(site: Site, agent: Agent, place: j.Place) -> bool:
    data = _data(site, place)
    return data is not None and service.fits(site.root, agent.key, data)


def _put(site: Site, role: str) -> bool:
    """Make the open installation's "target" or "previous" stand, copying its bytes from our records where they are gone.

    Says whether it does: False where nothing was recorded to put there.
    """
    entry = site.store.journal.installation
    certificate, place = entry.certificate, _known(entry.target if role == "target" else entry.previous)
    if _stands(site, certificate, place):
        return True
    if place.kind == "link" and _holds(site, _reached(certificate, place.text), place.sha256):
        site.store.beside.swap(certificate, place)
        return True
    data = _data(site, place)
    if data is None:
        return False
    # Where it can't stand as it did, what shall stand instead is recorded first, or a run killed here would not know it again.
    if not place.generation:
        _record(site, role, replace(place, kind="file", text=""))
        site.store.beside.swap(certificate, place, data)
        return True
    if site.root.entry(_reached(certificate, place.text)).kind != "absent":  # somebody else's bytes under that name
        folder, slash, _ = place.text.rpartition("/")
        place = replace(place, text=folder + slash + site.store.beside.free_copy(certificate, place.generation))
        _record(site, role, place)
    site.store.beside.make_copy(certificate, place.text.rpartition("/")[2], data, place)
    site.store.beside.swap(certificate, place)
    return True


def _record(site: Site, role: str, place: j.Place) -> None:
    entry = site.store.journal.installation
    known = entry.target if role == "target" else entry.previous
    if place != known:
        moved = replace(entry, target=place) if role == "target" else replace(entry, previous=place)
        site.store.update(installation=moved)


def _mark(site: Site, agent: Agent, place: j.Place) -> None:
    if agent.marker and (site.root.entry(agent.marker).kind == "file") != place.marker:
        site.store.beside.set_marker(agent.marker, present=place.marker)


def _forward(site: Site, agent: Agent) -> None:
    """Raises AgentNotReady where the target is in place but not served."""
    entry = site.store.journal.installation
    target = _known(entry.target)
    usable = _fits(site, agent, target)
    if not _stands(site, entry.certificate, target) and not usable:
        site.store.installation("undone")
        raise AgentNotReady(
            "the certificate to install does not fit the agent's key any more", "run again: it starts from what is there"
        )
    if not usable:
        raise AgentNotReady("the agent's key changed while its certificate was installed")
    _put(site, "target")
    _mark(site, agent, target)
    proven = site.root.live and entry.running
    if proven:
        prove(site, agent, target.leaf, reserve=1)
    _settle(site, agent, "proved" if proven else "left_unproven", installed=_current(site, agent), proven=proven)


def _current(site: Site, agent: Agent) -> j.Place:
    return place_of(site.root, agent, agents.read_pair(site.root, agent))


def _settle(site: Site, agent: Agent, event: str, *, installed: j.Place, proven: bool) -> None:
    """Close the installation; remember what is there and what was before."""
    journal = site.store.journal
    entry, before = journal.installation, _known(journal.installation.previous)
    forward, hold = event in ("proved", "left_unproven", "kept"), entry.hold if event in ("proved", "left_unproven") else ""
    skipped = tuple(skip for skip in journal.skipped if not (forward and skip.generation == installed.generation))
    if hold and before.generation:
        skipped += (_skip(site, before.generation, entry.inputs, "changed", 0, f"generation {before.generation} was {hold}"),)
    site.store.beside.sweep(agent.certificate, (installed.text,))  # before the end is recorded, or a crash would leave copies behind
    site.store.installation(
        event,
        also={
            "installed": installed,
            "proven": proven,
            "restarting": "" if proven else journal.restarting,
            "before": before if forward else journal.before,
            "original": journal.original or before,
            "seen": signature(agents.read_pair(site.root, agent)),
            "skipped": skipped,
            "hold": hold or journal.hold,
        },
    )
    site.store.prune()


def _skip(site: Site, generation: str, inputs: str, retry: str, status: int, message: str) -> j.Skip:
    earlier = [s.failures for s in site.store.journal.skipped if s.generation == generation and s.inputs == inputs]
    return j.Skip(generation, inputs, site.clock(), max(earlier, default=0) + 1, retry, status, message)


def _backward(site: Site, agent: Agent) -> None:
    """Put back what was there. Raises RolledBack where that is proven or can't be told, else RollbackFailed."""
    entry = site.store.journal.installation
    target, previous = _known(entry.target), _known(entry.previous)
    what = f"generation {target.generation}" if target.generation else "the earlier certificate"
    fits = _fits(site, agent, previous)
    if not fits and not _fits(site, agent, target):  # a restart would end an agent that may still serve what it has read
        _settle(site, agent, "kept", installed=_current(site, agent), proven=False)
        raise AgentNotReady(entry.why, "run again: it starts from what is there")
    restored = fits and _put(site, "previous")
    if restored:
        _mark(site, agent, previous)
    answer = service.Served(listening=False)
    if restored and site.root.live and entry.running:
        answer = come_back(site, agent, previous.leaf, stopped=bool(site.store.journal.restarting))
    if restored and (not entry.running or not site.root.live or (previous.leaf and answer.leaf == previous.leaf)):
        message = f"{what} was rolled back: {entry.why}"
        skip = _skip(site, target.generation, entry.inputs, "later", RolledBack.exit_status, message)
        _remember_skip(site, skip)
        _settle(site, agent, "restored", installed=_current(site, agent), proven=entry.running and site.root.live)
        raise RolledBack(
            f"{message}; the agent serves {previous.leaf[:16] or 'nothing'} as before",
            f"see {agent.log}, mend the cause, then: scx-enroll run --now",
        )
    if _fits(site, agent, target):
        _put(site, "target")
        _mark(site, agent, target)
    _settle(site, agent, "kept", installed=_current(site, agent), proven=False)
    raise RollbackFailed(
        f"the agent serves neither {what} nor what it served before: {answer.problem or answer.leaf[:16]}; the certificate "
        "is not the cause, and the one that verifies stays installed",
        f"see {agent.log}, start the agent with {agent.scxadmin} -start, then run again",
    )


def _remember_skip(site: Site, skip: j.Skip) -> None:
    others = tuple(s for s in site.store.journal.skipped if s.generation != skip.generation)[-MAX_SKIPS:]
    site.store.update(skipped=(*others, skip))
