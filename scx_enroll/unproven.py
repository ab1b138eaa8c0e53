"""What was not seen served yet, put there by us while the agent did not run or by others: made up for when it runs, with the way back."""

import hashlib
import os
from contextlib import suppress
from dataclasses import replace
from typing import Any, Dict, Optional

from scx_enroll import activate, places, service, transaction, verify
from scx_enroll import journal as j
from scx_enroll.activate import Site
from scx_enroll.agent import Agent, Pair
from scx_enroll.errors import AgentNotReady, HostError, NotServed


def _way_back(site: Site, agent: Agent) -> Optional[j.Place]:
    """Return what such an installation can be undone to, None where it was proven, is not in place, or can't be undone."""
    known = site.store.journal
    if known.untried and known.before and not known.before.unserved and known.installed:
        with suppress(AgentNotReady, HostError):
            places.check_way_back(site.root, site.store, agent, known.before)
            return known.before if places.stands(site.root, agent.certificate, known.installed) else None
    return None


def take_over(site: Site, agent: Agent, pair: Pair, served: bytes) -> None:
    """Note what others put in place as what is installed; what was in service until then is the way back. `served`: by the agent, DER."""
    journal, leaf = site.store.journal, places.leaf_of(served)
    place = places.kept(site.store, places.place_of(site.root, agent, pair), pair.certificate)
    known = [one for one in (journal.installed, journal.before, journal.original) if one]
    was, before = journal.installed, journal.before
    if was and was.leaf != place.leaf and not was.unserved:
        before = was
    if leaf and leaf != place.leaf:
        kept = (replace(one, unserved=False) for one in known if one.leaf == leaf and places.data_of(site.store, one) is not None)
        before = next(kept, None) or _as_file(site, agent, served, marker=place.marker) or before
    proven, tried = leaf == place.leaf, any(one.leaf == place.leaf and not one.unserved for one in known)
    place = replace(place, unserved=not proven and not tried)
    untried, seen = not proven and before is not None, places.signature(pair)
    site.store.update(installed=place, before=before, proven=proven, untried=untried, seen=seen)


def _as_file(site: Site, agent: Agent, der: bytes, *, marker: bool) -> Optional[j.Place]:
    """Return the place of what the agent serves and nobody has a record of, None where its key is gone."""
    data = verify.pem(der)
    if not service.fits(site.root, agent.key, data):
        return None
    sha256 = hashlib.sha256(data).hexdigest()
    place = j.Place("file", leaf=places.leaf_of(der), sha256=sha256, uid=os.geteuid(), gid=os.getegid(), marker=marker)
    return places.kept(site.store, place, data)


def restart(site: Site, agent: Agent, leaf: str, inputs: str) -> None:
    """Restart the agent, whose files are as they should be, and prove that it serves `leaf`; or undo what was left unproven.

    Undone is only what a restart has shown not to be served, or what would take the last restart.
    Raises AgentNotReady; RolledBack or RollbackFailed where it was undone.
    """
    activate.leave_packagers_alone(site)
    service.check_tool(site.root, agent.scxadmin)
    back, installed, spare = _way_back(site, agent), site.store.journal.installed, activate.has_room(site, 2)
    try:
        if back and installed and installed.unserved and not spare and service.probe(agent.port).leaf != leaf:
            raise NotServed(f"the last restart in the budget is not for {leaf[:16]}, which the agent has never served")
        activate.restart(site, agent, leaf, reserve=int(back is not None and spare))
    except NotServed as cause:
        if back is None:
            raise
        facts: Dict[str, Any] = {"layout": agent.layout, "port": agent.port, "certificate": agent.certificate, "inputs": inputs}
        site.store.installation("install", **facts, target=installed, previous=back, running=True, hold="", pid=0)
        site.store.installation("failed", why=cause.message)
        transaction.proceed(site)
