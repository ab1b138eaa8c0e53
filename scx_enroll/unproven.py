"""What was installed while the agent did not run, so that nothing was proved: made up for when it runs, with the way back."""

from contextlib import suppress
from dataclasses import replace
from typing import Any, Dict, Optional

from scx_enroll import activate, places, service, transaction
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


def take_over(site: Site, agent: Agent, pair: Pair, served: str) -> None:
    """Note what others put in place as what is installed; what was in service until then is the way back. `served`: the agent's leaf."""
    was, before = site.store.journal.installed, site.store.journal.before
    place = places.kept(site.store, places.place_of(site.root, agent, pair), pair.certificate)
    if was and was.leaf != place.leaf and not was.unserved:
        before = was
    unserved = served != place.leaf
    site.store.update(
        installed=replace(place, unserved=unserved), before=before, proven=not unserved, untried=unserved and before is not None,
        seen=places.signature(pair),
    )


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
