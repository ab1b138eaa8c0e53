"""Has the agent serve what its files hold, and proves it: restarts within the budget, looks at the wire, starts once more.

That we stop the agent is in the journal before the command that does it, so that an agent which stays down is never taken
for one that was stopped on purpose.
"""

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Callable, Optional, Tuple

from scx_enroll import access, service, systemd, unit
from scx_enroll import agent as agents
from scx_enroll import journal as j
from scx_enroll.agent import Agent
from scx_enroll.errors import AgentNotReady, NeedsPerson, NotServed
from scx_enroll.places import leaf_of
from scx_enroll.rootfs import Root
from scx_enroll.store import Store

ANY = "any"  # in the journal: whichever certificate is in place shall be served
RELOAD_S = 3.0  # the agent needs some 40 ms to read its pair again
GONE_S = 0.5  # it dies of a bad one within 7 ms


@dataclass(frozen=True)
class Site:
    """Where and with what patience the work is done."""

    root: Root
    store: Store
    patience: service.Patience
    clock: Callable[[], int]
    waiting: Callable[[str], None]
    noted: Callable[[str], None] = lambda _message: None  # for the log
    reload: bool = False  # the agent is told to read its pair again, where that is safe, instead of being restarted


class Truce(AgentNotReady):
    """The restart budget is spent; the installation stays as it is, for a later run to go on."""


def refuse_held(site: Site, then: str = "run") -> None:
    """Raise AgentNotReady while the operator holds; `then`: what is to be done again after that."""
    held = site.store.journal.held(site.clock())
    if held:
        raise AgentNotReady(f"held: {held}", f"scx-enroll release, then {then} again")


def forget_the_future(site: Site) -> None:
    """Note when times of the future were first seen: they count for a day from then."""
    budget = site.store.budget
    kept = budget.kept(site.clock())
    if kept.ahead != budget.ahead:
        site.store.save_budget(kept)


def leave_packagers_alone(site: Site) -> None:
    """Raise AgentNotReady while a package manager holds its lock."""
    busy = agents.packager(site.root) if site.root.live else ""
    if busy:
        raise AgentNotReady(f"{busy} is changing packages", "run again when it has finished")


def settle_command(site: Site) -> None:
    """Wait until the control command that an earlier run started has ended."""
    journal = site.store.journal
    command = journal.installation
    apart = bool(command.pid or journal.restarting) and systemd.manages(site.root.path)
    service.await_end(command.pid, command.pid_start, site.patience, site.waiting, unit=apart)


def come_back(site: Site, agent: Agent, leaf: str, *, stopped: bool) -> service.Served:
    """Have the agent serve `leaf` again; `stopped`: we have tried to restart it, so a look alone proves nothing until that must be over.

    A control command that fails is no more than that: what the port shows counts.
    """
    seen, last = service.probe(agent.port), max(site.store.budget.restarts, default=0)
    over = 0 < last < site.clock() - site.patience.command_s - site.patience.listener_s
    if seen.leaf == leaf and (over or not stopped):
        return seen
    try:
        return _bring_up(site, agent, leaf, reserve=0)[0]
    except Truce:
        raise
    except AgentNotReady as problem:
        site.waiting(problem.message)
        return _await(site, agent, leaf, (0, 0))


def start_again(site: Site, agent: Agent) -> None:
    """Start an agent that a restart of ours left down, with the pair that is there now, whoever's, if that can be loaded.

    Where it does not come up, the budget has no room, or packages are being changed, a later run goes on.
    """
    if not site.store.journal.restarting or not site.root.live or agents.packager(site.root):
        return
    data, listed = agents.read_pair(site.root, agent).certificate, agent.port in agent.ports
    needed = 2 if site.store.journal.installation.state == "installing" else 1  # the last one is for the way back

    def is_up() -> bool:
        return service.probe(agent.port).listening if listed else agents.process(site.root, agent) == "running"

    up = is_up()
    loadable = data is not None and service.fits(site.root, agent.key, data) and not access.locked(site.root, agent)
    if not up and loadable and has_room(site, needed):
        said = _control(site, agent, "-start", leaf_of(data), 0)
        if listed:
            _await(site, agent, leaf_of(data), (0, 0))
        end, up = time.monotonic() + site.patience.gone_s, is_up()
        while not up and time.monotonic() < end:
            time.sleep(site.patience.poll_s)
            up = is_up()
        site.noted(f"the agent, which a restart of ours had left down, was {'started' if up else 'not brought up'} ({said})")
    if up:
        site.store.update(restarting="")  # who stops it from now on has a purpose


def start_unreachable(site: Site, layout: str) -> None:
    """The same for an agent that can't be worked on, since it does not list the port that SCOM uses; not while it is held."""
    if not site.store.journal.held(site.clock()):
        with suppress(AgentNotReady):
            start_again(site, agents.find(site.root, layout, None))


def _instance(site: Site, agent: Agent) -> Tuple[int, int]:
    """Return what tells one start of the agent from another, (0, 0) for nothing: its process, and when that wrote its pid file.

    Not when the process began: the sandbox of the timer's run does not show it.
    """
    pid = agents.pid(site.root, agent)
    return pid, site.root.aside().entry(agent.pid_file).ctime_ns if pid else 0


def _await(site: Site, agent: Agent, leaf: str, before: Tuple[int, int]) -> service.Served:
    return service.await_leaf(
        agent.port,
        leaf,
        lambda: agents.process(site.root, agent),
        site.patience,
        site.waiting,
        lambda: before[1] != 0 and _instance(site, agent) == before,
    )


def comes_up(site: Site, agent: Agent, leaf: str) -> service.Served:
    """Look at the port; where nothing listens, for as long as a command that a killed run left may still be at work."""
    seen = service.probe(agent.port)
    return seen if seen.listening else _await(site, agent, leaf, (0, 0))


def within_budget(site: Site, needed: int) -> j.Budget:
    """Return the budget to add to. Raises Truce where it has no room for `needed` restarts."""
    now = site.clock()
    until = site.store.budget.current(now).restarts_until(needed)
    if until > now:
        raise Truce(
            f"the restart budget ({j.RESTARTS_PER_HOUR} an hour, {j.RESTARTS_PER_DAY} a day) has no room for "
            + ("two: one to go and one to come back" if needed > 1 else "a restart"),
            f"run again in {(until - now) // 60 + 1} minutes; where nobody asked for so many, find out who changes the agent",
        )
    return site.store.budget.kept(now)


def _spend(site: Site, leaf: str, reserve: int) -> None:
    """Count a restart. That we stop the agent is in the journal before, so that it is never taken for somebody's purpose."""
    budget = within_budget(site, 1 + reserve)
    site.store.save_budget(replace(budget, restarts=(*budget.restarts, site.clock())))
    site.store.update(restarting=leaf)


def _call(site: Site, *command: str) -> str:
    """Run one of the agent's tools; its process is in the journal while it runs."""

    def note(pid: int, started: int) -> None:
        site.store.update(installation=replace(site.store.journal.installation, pid=pid, pid_start=started))

    site.waiting(f"waiting for {' '.join(command)}")
    said = service.control(site.root, command, site.patience, note)
    note(0, 0)
    return said


def _control(site: Site, agent: Agent, word: str, leaf: str, reserve: int) -> str:
    """Run scxadmin, within the budget, and whatever systemd's own limit of starts (five in ten seconds, its own included) says."""
    service.check_tool(site.root, agent.scxadmin)
    _spend(site, leaf, reserve)
    if systemd.manages(site.root.path):
        systemd.forget_failures(agent.unit)
    return _call(site, agent.scxadmin, word)


def has_room(site: Site, needed: int) -> bool:
    """Say whether the budget has room for so many restarts."""
    now = site.clock()
    return site.store.budget.current(now).restarts_until(needed) <= now


def _bring_up(site: Site, agent: Agent, leaf: str, *, reserve: int) -> Tuple[service.Served, str]:
    """Restart, and start once more where nothing runs then; returns what is served, and what scxadmin said.

    A server that a restart does not reach is ended by its own command, and the service started. `reserve`: restarts that must stay in
    the budget for the way back. Raises AgentNotReady for such a server that could not be ended.
    """
    before, stray = _instance(site, agent), unit.outside(site.root, agent)
    if stray:
        return _replace(site, agent, leaf, stray, reserve)
    said = _control(site, agent, "-restart", leaf, reserve)
    seen = _await(site, agent, leaf, before)
    same, process = before[0] != 0 and _instance(site, agent) == before, agents.process(site.root, agent)
    if seen.leaf != leaf and same and process == "running":
        if not has_room(site, 1 + reserve):
            end = f"{agent.server} -s"
            message = f"{agents.SERVER}, process {before[0]}, goes on through a restart ({end} ends it)"
            raise NeedsPerson(message, _by_hand(agent, before[0], end))
        return _replace(site, agent, leaf, before[0], reserve)
    # A slow stop makes the agent's own restart end with nothing running; one that died on the pair left a pid file of its own.
    died_of_it = agent.pid_file and process != "stopped" and not same
    if not seen.listening and not died_of_it and has_room(site, 1 + reserve):
        said = _control(site, agent, "-start", leaf, reserve)
        seen = _await(site, agent, leaf, (0, 0))
    return seen, said


def _by_hand(agent: Agent, pid: int, end: str) -> str:
    return f"see whose it is (ps -fp {pid}), end it ({end}) and start the service: {agent.scxadmin} -start"


def _replace(site: Site, agent: Agent, leaf: str, pid: int, reserve: int) -> Tuple[service.Served, str]:
    """End a server that no restart reaches, wait until it is gone, and start the service; one start in the budget."""
    if not unit.is_server(pid):
        hint = f"see what that is (ps -fp {pid}), and who listens on port {agent.port} (ss -ltnp); remove the file where it is a leftover"
        raise NeedsPerson(f"a restart changed nothing: {agent.pid_file} names process {pid}, which is not {agents.SERVER}", hint)
    for tool in (agent.server, agent.scxadmin):
        service.check_tool(site.root, tool)
    _spend(site, leaf, reserve)
    before = _instance(site, agent)
    said = _call(site, agent.server, "-s")
    end = time.monotonic() + site.patience.listener_s
    while _instance(site, agent) == before and agents.process(site.root, agent) == "running":
        if time.monotonic() >= end:
            raise NeedsPerson(f"{agents.SERVER}, process {pid}, does not end ({said})", _by_hand(agent, pid, f"kill {pid}"))
        site.waiting(f"waiting for process {pid} to end")
        time.sleep(site.patience.poll_s)
    if systemd.manages(site.root.path):
        systemd.forget_failures(agent.unit)
    said = _call(site, agent.scxadmin, "-start")
    return _await(site, agent, leaf, (0, 0)), said


def _reload(site: Site, agent: Agent, leaf: str, seen: service.Served, *, reserve: int) -> bool:
    """Have the agent read its pair again, where that is safe; says whether it serves `leaf` now, else a restart is next.

    Raises AgentNotReady where the budget has no room for that.
    """
    why = unit.unreachable(site.root, agent) if seen.listening else "nothing listens on its port"
    if why:
        site.noted(f"the agent is restarted, not reloaded: {why}")
        return False
    _spend(site, leaf, reserve)
    said = _call(site, agent.server, "-r")
    brief = replace(site.patience, listener_s=min(site.patience.listener_s, RELOAD_S), gone_s=min(site.patience.gone_s, GONE_S))
    seen = service.await_leaf(agent.port, leaf, lambda: agents.process(site.root, agent), brief, site.waiting)
    if seen.leaf == leaf:
        return True
    message = f"the agent did not take up {leaf[:16]} when it was told to read its certificate again ({said})"
    if not has_room(site, 1 + reserve):
        raise (Truce if seen.listening else NotServed)(message, f"see {agent.log}")
    site.noted(f"{message}, so it is restarted")
    return False


def prove(site: Site, agent: Agent, leaf: str, *, reserve: int) -> None:
    """Have the agent serve `leaf`, restarting it where it does not yet. Raises AgentNotReady where it doesn't."""
    seen = service.probe(agent.port)
    if seen.leaf == leaf or (site.reload and _reload(site, agent, leaf, seen, reserve=reserve)):
        return
    before = seen.leaf
    seen, said = _bring_up(site, agent, leaf, reserve=reserve)
    if seen.leaf != leaf:
        found = f"it serves {seen.leaf[:16]}" if seen.leaf else seen.problem
        if before and before == seen.leaf and not agent.pid_file:
            found = f"it goes on serving {before[:16]}: the restart did not reach its server; ss -ltnp tells that process"
        told = "; ".join(filter(None, (said, unit.said(site.root, agent))))
        raise NotServed(f"the agent does not serve {leaf[:16]}: {found} ({told})", f"see {agent.log}")


def restart(site: Site, agent: Agent, leaf: str, *, reserve: int) -> None:
    """Restart the agent, whose files are as they should be, and prove that it serves `leaf`. Raises AgentNotReady."""
    prove(site, agent, leaf, reserve=reserve)
    installed = site.store.journal.installed
    if installed and installed.leaf == leaf:
        site.store.proved(restarting="")
    else:
        site.store.update(proven=False, restarting="")


def make_key(site: Site, agent: Agent) -> Tuple[str, Optional[bytes]]:
    """Let the agent's own tool make the key that is missing; returns what it said and the key.

    It makes key and certificate only where there is no key. Raises AgentNotReady where there is none afterwards.
    """
    said = service.control(site.root, (agent.scxsslconfig,), site.patience, lambda _pid, _started: None)
    key = agents.read_pair(site.root, agent).key
    if key is None:
        raise AgentNotReady(f"the agent has no key and its own tool made none ({said})", f"repair the agent: see {agent.log}")
    return said, key
