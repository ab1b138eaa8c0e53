"""Writes down what others did to the agent's files, once, and what was done about it; `causes` names it.

What is compared is in the journal, written at the end of each run that looked. A look alone (`status`, `--dry-run`) writes nothing.
"""

import hashlib
from contextlib import suppress
from dataclasses import replace
from typing import Callable, Optional, Sequence, Tuple

from scx_enroll import __version__, causes, machine, naming, places, plan, verify
from scx_enroll import agent as agents
from scx_enroll import journal as j
from scx_enroll.activate import Site
from scx_enroll.case import Step
from scx_enroll.causes import Sight
from scx_enroll.config import Config
from scx_enroll.errors import EnrollError, HostError
from scx_enroll.observe import View


def notice(site: Site, config: Config, view: View, told: Callable[[j.Change], None], *, hasty: bool) -> bool:
    """Write down what is otherwise than the last run left or saw it, and tell it; says whether there was anything.

    Not while others are at work: what they have half done has no cause yet.
    """
    now = site.clock()
    if _at_work(site, view, now, hasty=hasty):
        return False
    sight = _sight(site, config, view)
    found = causes.named(site.store.journal, sight)
    if not found:
        return False
    fights = causes.fights(site.store.journal, sight, [cause for cause, _ in found], now)
    changes = tuple(j.Change(now, cause, what, waits="nothing yet") for cause, what in found)
    _write(site, sight, (*site.store.journal.changes, *changes), fights=fights)
    for change in changes:
        told(change)
    return True


def unwritten(site: Site, config: Config, view: View) -> Tuple[j.Change, ...]:
    """Return what others did that no run has written down yet."""
    if _at_work(site, view, site.clock(), hasty=False):
        return ()
    found = causes.named(site.store.journal, _sight(site, config, view))
    return tuple(j.Change(site.clock(), cause, what, waits="nothing yet: no run has seen it") for cause, what in found)


def conclude(site: Site, config: Config, view: View, acts: Sequence[Step], step: Step, *, hasty: bool) -> None:
    """Write down what this run did about what was open, and what is there now."""
    changes = causes.settled(site.store.journal.changes, acts, causes.waits(step))
    if _at_work(site, view, site.clock(), hasty=hasty):
        if changes != site.store.journal.changes:
            site.store.update(changes=changes)
        return
    _write(site, _sight(site, config, view), changes)


def failed(site: Site, acts: Sequence[Step], error: EnrollError) -> None:
    """Write down that what was open is so still, since the run failed."""
    changes = causes.settled(site.store.journal.changes, acts, f"failed: {error.message.partition(chr(10))[0]}")
    with suppress(HostError):  # the failure itself is what must be told
        if changes != site.store.journal.changes:
            site.store.update(changes=changes)


def _at_work(site: Site, view: View, now: int, *, hasty: bool) -> bool:
    if view.found is None:
        return site.root.live and agents.packager(site.root) != ""
    return bool(view.seen.busy or (plan.quiet_from(view.seen, view.policy, now) and not hasty))


def _write(site: Site, sight: Sight, changes: Sequence[j.Change], **more: object) -> None:
    journal, now = site.store.journal, site.clock()
    was = journal.known
    fresh = was is not None and 0 <= now - was.at < causes.FRESH_S and replace(sight.known, at=was.at) == was
    known = was if fresh else replace(sight.known, at=now)
    new = replace(journal, known=known, changes=tuple(changes)[-causes.KEPT_CHANGES:], newest=sight.newest, **more)  # type: ignore[arg-type]  # its fields
    if new != journal:
        site.store.save_journal(new)


def _sight(site: Site, config: Config, view: View) -> Sight:
    """Return what a look saw. Where no agent can be worked on, what was known of it stays, but that it may be gone."""
    root, store, found, seen = site.root, site.store, view.found, view.seen
    was, generations = causes.remembered(store.journal), store.generations()
    newest = max((one.origin.number for one in generations), default=0)
    meaning = f"{__version__} {hashlib.sha256(repr(config).encode()).hexdigest()}"
    now = site.clock()
    written = [one.origin.obtained for one in generations] + [change.at for change in store.journal.changes]
    host = machine.host_name(naming.short_name(root)) or was.host
    known = replace(was, config=meaning, clock=causes.clock(now, store.journal.known, written), host=host)
    if found is None:
        path = was.program.partition(" ")[0]
        gone = bool(path) and root.resolve(path).kind != "file"
        return Sight(replace(known, program=path if gone else was.program), newest=newest, generations=tuple(g.id for g in generations))
    agent, account = found.agent, agents.owner(root, found.agent)
    program, conf = agents.marks(root, agent.layout)
    odd = seen.served != seen.certificate
    known = replace(
        known, key=seen.key, place=places.place_of(root, agent, found.pair), program=program, conf=conf, locked=seen.locked,
        account=f"{agent.account} {account[0]}" if account else "", served=seen.served if odd else "",
        names=f"{agent.certificate} {agent.key}",
    )
    older = next((one.id for one in seen.held if one.leaf == seen.served), "")
    return Sight(
        known, agent.certificate, _signer(found.installed), found.installed is None or found.installed.spki == seen.key, older,
        tuple(one.id for one in generations), newest, seen.aside,
    )


def _signer(facts: Optional[verify.Facts]) -> str:
    if facts is None:
        return ""
    return causes.ITSELF if facts.issuer == facts.subject else causes.SCOM if "CN=SCX-Certificate" in facts.issuer else facts.issuer
