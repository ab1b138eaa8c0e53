"""Changes what the agent serves, by one rename, and proves it; or puts back what was there, and proves that.

Section "The installation" of docs/state.md is the specification. `proceed` carries out whatever the journal says is
open, from its first step: each step finds done what is done, so it serves a fresh installation and the recovery of one
that was killed alike.
"""

import hashlib
import os
from dataclasses import replace
from typing import Any, Dict, Optional

from scx_enroll import agent as agents
from scx_enroll import journal as j
from scx_enroll import pairs, service
from scx_enroll.activate import Site, Truce, come_back, comes_up, leave_packagers_alone, prove, start_again, within_budget
from scx_enroll.agent import Agent, Pair
from scx_enroll.errors import AgentNotReady, EnrollError, HostError, NeedsPerson, RollbackFailed, RolledBack
from scx_enroll.places import COPY_MODE, data_of, holds, judged, kept, leaf_of, place_of, reached, signature, sound_copy, stands, way_back
from scx_enroll.request import load_key, spki_of
from scx_enroll.store import Generation

ROLES = {"target": "previous", "previous": "target"}  # each with the other one
MAX_SKIPS = 8  # as many as generations are kept


def install(site: Site, agent: Agent, generation: Generation, *, running: bool, inputs: str, key: str = "") -> None:
    """Put a generation in service. `running`: the agent is meant to run, so it is restarted and must serve it.

    `key`: the staged key (SPKI hash) that it is for, "" where the agent's stays.
    Raises RolledBack or RollbackFailed where it was not served, HostError where nothing could be changed, AgentNotReady
    before anything is changed where the restart budget has no room for the way back.
    """
    name = sound_copy(site.root, agent.certificate, generation) or site.store.beside.free_copy(agent.certificate, generation.id)
    # A migration to OMI moves the classic name, a link, into OMI's folder: there only an absolute text leads to the copy.
    text = name if agent.layout == "omi" else reached(agent.certificate, name)
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
    _begin(site, agent, target, running=running, inputs=inputs, hold="", key=key)


def put_back(site: Site, agent: Agent, place: j.Place, *, running: bool, inputs: str, hold: str) -> None:
    """Put back what was in service before, and hold. Raises as `install`."""
    _begin(site, agent, place, running=running, inputs=inputs, hold=hold)


def _begin(site: Site, agent: Agent, target: j.Place, *, running: bool, inputs: str, hold: str, key: str = "") -> None:
    leave_packagers_alone(site)
    if running:
        service.check_tool(site.root, agent.scxadmin)
    pair = agents.read_pair(site.root, agent)
    previous, served = place_of(site.root, agent, pair), service.probe(agent.port).leaf if running else ""
    if running and served != target.leaf:
        sound = pair.certificate is not None and service.fits(site.root, agent.key, pair.certificate)
        further = way_back(site.root, site.store, agent.key, previous, target.leaf) != previous
        within_budget(site, 2 if sound or (further and served) else 1)  # one to go forward, one for the way back, where there is one
    previous = kept(site.store, previous, pair.certificate)
    site.store.installation(
        "install", layout=agent.layout, port=agent.port, certificate=agent.certificate,
        target=target, previous=judged(site.store, previous, served), running=running, inputs=inputs, hold=hold, pid=0,
        **(_new_key(site, agent, pair, key) if key else {}),
    )
    proceed(site)


def _new_key(site: Site, agent: Agent, pair: Pair, spki: str) -> Dict[str, Any]:
    """Return what the journal needs to change the key, too; the present one is kept until the new pair is proven."""
    owner, present = agents.owner(site.root, agent), pair.key_target
    if pair.key is None:
        raise AgentNotReady("the agent's key is gone", pairs.AGAIN)
    old = spki_of(load_key(pair.key))
    site.store.save_key(old, pair.key, old=True)
    name = site.root.entry(agent.key)
    uid, gid = owner or (present.uid, present.gid)
    previous = j.KeyPlace(name.kind, old, name.text, present.uid, present.gid, present.mode)
    return {"key": agent.key, "key_target": j.KeyPlace("file", spki, "", uid, gid), "key_previous": previous}


def proceed(site: Site) -> None:
    """Finish or undo the open installation; `settled` afterwards, or the failure is one that a later run can mend.

    Raises RolledBack or RollbackFailed where the target was not served. A name that somebody else has changed since is
    left as it is: the next look starts from what is there. While the agent is not there to be looked at, or packages are
    being changed, it stays open.
    """
    entry = site.store.journal.installation
    leave_packagers_alone(site)
    agent = _agent(site, entry)
    same = agent.certificate == entry.certificate and entry.key in ("", agent.key)
    if not same or not any(_is_there(site, agent, role) for role in ROLES):
        _close(site, agent)
        return
    try:
        _finish(site, agent)
    except pairs.Disturbed:
        _close(site, agent)
        raise


def _finish(site: Site, agent: Agent) -> None:
    if site.store.journal.installation.state == "installing":
        try:
            _forward(site, agent)
        except Truce:
            seen = comes_up(site, agent, _place(site.store.journal.installation, "target").leaf)
            if seen.listening or not _is_there(site, agent, "target"):
                raise
            _fail(site, agent, "the agent is down, and the last restart in the budget is for what was there")
        except AgentNotReady as cause:
            if site.store.journal.installation.state == "settled" or isinstance(cause, pairs.Disturbed):
                raise
            _leave_to_others(site, agent, "target")
            _fail(site, agent, cause.message)
        except HostError:
            if site.store.journal.installation.state == "installing" and not _is_there(site, agent, "target"):
                _close(site, agent)
            raise
    if site.store.journal.installation.state == "rolling_back":
        try:
            _backward(site, agent)
        except Truce as spent:
            served, wanted = service.probe(agent.port).leaf, _place(site.store.journal.installation, "previous").leaf
            vain = len(site.store.budget.current(site.clock()).restarts) >= j.RESTARTS_PER_DAY and not (served and served == wanted)
            raise (NeedsPerson if vain else Truce)(f"{site.store.journal.installation.why}; {spent.message}", spent.hint) from None


def _leave_to_others(site: Site, agent: Agent, role: str) -> None:
    """Raise Disturbed where something else than this role stands there by now that the agent can load: it is not ours to take away."""
    found = agents.read_pair(site.root, agent).certificate
    if not _is_there(site, agent, role) and found is not None and service.fits(site.root, agent.key, found):
        raise pairs.Disturbed(*pairs.DISTURBED)


def _way_back(site: Site, agent: Agent) -> j.Place:
    """Return what to put back where the open installation fails."""
    entry = site.store.journal.installation
    key = site.store.key_path(entry.key_previous.spki, old=True) if entry.key_previous else agent.key
    return way_back(site.root, site.store, key, _place(entry, "previous"), _place(entry, "target").leaf)


def _fail(site: Site, agent: Agent, why: str) -> None:
    site.store.installation("failed", why=why, previous=_way_back(site, agent))


def _agent(site: Site, entry: j.Installation) -> Agent:
    """Return the agent whose installation is open, which may read another name by now: a migration, or another conf.

    Raises AgentNotReady where there is none that can be looked at.
    """
    try:
        found = agents.find(site.root, entry.layout, None)
    except AgentNotReady:
        found = agents.find(site.root, "auto", None)
    if found.conf and entry.port not in found.ports:
        start_again(site, found)
    return agents.find(site.root, found.layout, entry.port)


def _close(site: Site, agent: Agent) -> None:
    """End an installation that changed nothing, or whose names somebody else has changed: what is there stays, and is served."""
    entry = site.store.journal.installation
    if entry.key:
        names, previous = _names(site, agent, entry), _side(site, entry, "previous")
        if pairs.is_broken(site.root, names) and previous:
            _straighten(site, agent, "target" if previous.bare else "previous", lost=True)
        pairs.straighten(site.store, names)
    site.store.installation("undone" if entry.state == "installing" else "kept")
    if entry.key_target:
        site.store.drop_keys(frozenset({entry.key_target.spki}))
    start_again(site, agent)


def _names(site: Site, agent: Agent, entry: j.Installation) -> pairs.Names:
    """Return the names of a pair that is changed; the account may have another number by now."""
    known = entry.key_target
    return pairs.Names(entry.certificate, entry.key, agents.owner(site.root, agent) or (known.uid, known.gid) if known else (0, 0))


def _place(entry: j.Installation, role: str) -> j.Place:
    place = entry.target if role == "target" else entry.previous
    if place is None:  # from_json refuses such a journal
        raise EnrollError("an open installation lacks its target or previous place")
    return place


def _side(site: Site, entry: j.Installation, role: str) -> Optional[pairs.Side]:
    """Return one of the two pairs from our own records, None where they are gone."""
    key = entry.key_target if role == "target" else entry.key_previous
    certificate, stands_for = data_of(site.store, _place(entry, role)), data_of(site.store, _place(entry, "target"))
    if key is None or stands_for is None:
        return None
    try:
        return pairs.Side(certificate or stands_for, site.store.key(key.spki, old=role == "previous"), certificate is None)
    except FileNotFoundError:
        return None


def _is_there(site: Site, agent: Agent, role: str) -> bool:
    """Say whether the agent reads what the open installation calls "target" or "previous"."""
    entry = site.store.journal.installation
    if not entry.key:
        return stands(site.root, entry.certificate, _place(entry, role))
    side = _side(site, entry, role)
    return side is not None and pairs.reads(site.root, _names(site, agent, entry), side)


def _turn(site: Site, agent: Agent, role: str) -> bool:
    """Have the agent's names lead to the target, or to what was there before; says whether they do."""
    entry = site.store.journal.installation
    if not entry.key or _is_there(site, agent, role):
        return bool(entry.key) or _put(site, role)
    now, then = _side(site, entry, ROLES[role]), _side(site, entry, role)
    if now is None or then is None:
        return False
    if role == "target" or not pairs.turn_back(site.store, _names(site, agent, entry), then):
        pairs.switch(site.store, _names(site, agent, entry), now, then)
    return True


def _straighten(site: Site, agent: Agent, role: str, *, lost: bool = False) -> None:
    """After a change of the key: a regular file again, and the usual single link. `lost`: they lead to nothing now. Raises Disturbed."""
    entry = site.store.journal.installation
    side, key = _side(site, entry, role), entry.key_target if role == "target" else entry.key_previous
    if side and key:
        names = _names(site, agent, entry)
        pairs.check(site.root, names, side, lost=lost)
        accounts = entry.key_target is not None and (key.uid, key.gid) == (entry.key_target.uid, entry.key_target.gid)
        for _ in range(2):  # the account may have another number by now, and yet another while we write
            uid, gid = _names(site, agent, entry).owner if accounts else (key.uid, key.gid)
            pairs.put_key(site.store, names, replace(key, uid=uid, gid=gid), side.key)
        pairs.check(site.root, names, side, lost=lost)
        _put(site, role)
        if role == "target":
            site.store.drop_originals()
        pairs.remove(site.store, names)


def _fits(site: Site, agent: Agent, role: str) -> bool:
    """Say whether OpenSSL takes a side's certificate with the key that goes with it: the agent's own, or the one in our records."""
    entry = site.store.journal.installation
    data, key = data_of(site.store, _place(entry, role)), entry.key_target if role == "target" else entry.key_previous
    path = site.store.key_path(key.spki, old=role == "previous") if key else agent.key
    return data is not None and service.fits(site.root, path, data)


def _put(site: Site, role: str) -> bool:
    """Make the open installation's "target" or "previous" stand, copying its bytes from our records where they are gone.

    Says whether it does: False where nothing was recorded to put there.
    """
    entry = site.store.journal.installation
    certificate, place = entry.certificate, _place(entry, role)
    if stands(site.root, certificate, place):
        return True
    if holds(site.root, reached(certificate, place.text), place.sha256):
        site.store.beside.swap(certificate, place)
        return True
    data = data_of(site.store, place)
    if data is None:
        return False
    # Where it can't stand as it did, what shall stand instead is recorded first, or a run killed here would not know it again.
    if not place.generation:
        _record(site, role, replace(place, kind="file", text=""))
        site.store.beside.swap(certificate, place, data)
        return True
    if site.root.entry(reached(certificate, place.text)).kind != "absent":  # somebody else's bytes under that name
        folder, slash, _ = place.text.rpartition("/")
        place = replace(place, text=folder + slash + site.store.beside.free_copy(certificate, place.generation))
        _record(site, role, place)
    site.store.beside.make_copy(certificate, place.text.rpartition("/")[2], data, place)
    site.store.beside.swap(certificate, place)
    return True


def _record(site: Site, role: str, place: j.Place) -> None:
    site.store.update(installation=replace(site.store.journal.installation, **dict[str, Any]({role: place})))


def _mark(site: Site, agent: Agent, place: j.Place) -> None:
    if agent.marker and (site.root.entry(agent.marker).kind == "file") != place.marker:
        site.store.beside.set_marker(agent.marker, present=place.marker)


def _forward(site: Site, agent: Agent) -> None:
    """Raises AgentNotReady where the target is in place but not served."""
    entry = site.store.journal.installation
    target = _place(entry, "target")
    if not _fits(site, agent, "target"):
        if _is_there(site, agent, "target"):
            raise AgentNotReady("the agent's key changed while its certificate was installed")
        _close(site, agent)
        raise AgentNotReady("the certificate to install does not fit the agent's key any more", pairs.AGAIN)
    _turn(site, agent, "target")
    _mark(site, agent, target)
    proven = site.root.live and entry.running
    if proven:
        if entry.key and not _is_there(site, agent, "target"):
            raise pairs.Disturbed(*pairs.DISTURBED)  # a restart would end an agent that still serves what it has read
        back = _fits(site, agent, "previous") or _way_back(site, agent) != entry.previous
        prove(site, agent, target.leaf, reserve=int(back))
    _straighten(site, agent, "target")
    _settle(site, agent, "proved" if proven else "left_unproven", installed=_current(site, agent), proven=proven)


def _current(site: Site, agent: Agent) -> j.Place:
    """Return what stands at the name, and where its bytes are kept, if they are."""
    saved = {place.sha256: place.saved for place in (_place(site.store.journal.installation, role) for role in ROLES)}
    found = place_of(site.root, agent, agents.read_pair(site.root, agent))
    return replace(found, saved=saved.get(found.sha256, ""))


def _settle(site: Site, agent: Agent, event: str, *, installed: j.Place, proven: bool) -> None:
    """Close the installation; remember what is there and what was before."""
    journal = site.store.journal
    entry, before = journal.installation, _place(journal.installation, "previous")
    forward, hold = event in ("proved", "left_unproven", "kept"), entry.hold if event in ("proved", "left_unproven") else ""
    skipped = tuple(skip for skip in journal.skipped if not ((forward or proven) and skip.generation == installed.leaf[:16]))
    if hold:  # it stands against what was in service, and what is newer than what is now
        ids = [generation.id for generation in site.store.generations()]
        newer = ids[ids.index(installed.generation) + 1 :] if installed.generation in ids else ids
        aside = tuple(filter(None, dict.fromkeys((before.generation, *newer))))
        skips = (_skip(site, one, entry.inputs, "changed", 0, f"generation {one} was {hold}") for one in aside)
        skipped = (*(skip for skip in skipped if skip.generation not in aside), *skips)
    known = journal.installed
    tried = any(one and one.leaf == installed.leaf and not one.unserved for one in (known, journal.before, journal.original, before))
    site.store.beside.sweep(agent.certificate, (installed.text,))  # before the end is recorded, or a crash would leave copies behind
    site.store.installation(
        event,
        also={
            "installed": replace(installed, unserved=event in ("left_unproven", "kept") and not tried),
            "proven": proven,
            "untried": event == "left_unproven" and not entry.key and not (known and known.leaf == installed.leaf and not known.unserved),
            "restarting": "" if proven else journal.restarting,
            "before": way_back(site.root, site.store, agent.key, before, installed.leaf)
            if forward and before.leaf != installed.leaf else journal.before,
            "original": journal.original or before,
            "seen": signature(agents.read_pair(site.root, agent)),
            "skipped": skipped,
            "hold": hold or journal.hold,
            "hold_until": 0 if hold else journal.hold_until,
        },
    )
    site.store.prune()
    if entry.key_target:
        site.store.drop_keys(frozenset() if forward else frozenset({entry.key_target.spki}))  # the old one does not live on


def _skip(site: Site, generation: str, inputs: str, retry: str, status: int, message: str) -> j.Skip:
    earlier = [s.failures for s in site.store.journal.skipped if s.generation == generation and s.inputs == inputs]
    return j.Skip(generation, inputs, site.clock(), max(earlier, default=0) + 1, retry, status, message)


def _backward(site: Site, agent: Agent) -> None:
    """Put back what was there. Raises RolledBack where that is proven or can't be told, else RollbackFailed."""
    entry = site.store.journal.installation
    target, previous = _place(entry, "target"), _place(entry, "previous")
    what = f"generation {target.generation}" if target.generation else f"certificate {target.leaf[:16]}"
    fits = _fits(site, agent, "previous")
    if not fits and not _fits(site, agent, "target"):  # a restart would end an agent that may still serve what it has read
        _settle(site, agent, "kept", installed=_current(site, agent), proven=False)
        start_again(site, agent)
        raise AgentNotReady(entry.why, pairs.AGAIN)
    restored = fits and _turn(site, agent, "previous")
    if restored:
        _mark(site, agent, previous)
    answer = service.Served(listening=False, problem="that can't be put back")
    if restored and site.root.live and entry.running:
        answer = come_back(site, agent, previous.leaf, stopped=bool(site.store.journal.restarting))
    if restored and (not entry.running or not site.root.live or (previous.leaf and answer.leaf == previous.leaf)):
        message = f"{what} was rolled back: {entry.why}"
        skip = _skip(site, target.leaf[:16], entry.inputs, "later", RolledBack.exit_status, message)
        others = tuple(s for s in site.store.journal.skipped if s.generation != skip.generation)[-MAX_SKIPS:]
        site.store.update(skipped=(*others, skip))
        _straighten(site, agent, "previous")
        _settle(site, agent, "restored", installed=_current(site, agent), proven=entry.running and site.root.live)
        raise RolledBack(
            f"{message}; the agent serves {previous.leaf[:16] or 'nothing'} as before",
            f"see {agent.log}, mend the cause, then: scx-enroll run --now",
        )
    if restored:
        _leave_to_others(site, agent, "previous")
    if _fits(site, agent, "target") and _turn(site, agent, "target"):
        _mark(site, agent, target)
        _straighten(site, agent, "target")
    _settle(site, agent, "kept", installed=_current(site, agent), proven=False)
    raise RollbackFailed(
        f"the agent serves neither {what} nor what it served before: {answer.problem or answer.leaf[:16]}; the certificate "
        "is not the cause, and the one that verifies stays installed",
        f"see {agent.log}, start the agent with {agent.scxadmin} -start, then run again",
    )
