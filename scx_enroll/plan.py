"""Decides the next step from what was observed: pure, so that every decision can be tested and simulated.

The first row that matches in LOCAL, else in CA, is the step. LOCAL serves the best valid certificate that is held,
whatever the certification authority is doing; CA (`asking`) sees to it that a fresh one is held. Every step says why, and
*until* when it would not change by itself.
"""

from dataclasses import replace
from typing import Callable, List, Optional, Tuple, Union

from scx_enroll import machine
from scx_enroll.asking import CA
from scx_enroll.case import WINDOW, Case, Observed, Step, Wish, within_budget, within_restarts
from scx_enroll.journal import DAY_S, HOUR_S, Backoff, Budget, Identity, Journal, Skip
from scx_enroll.pace import PERSON, Policy, runs_out_at

WAITING = ("wait", "hold", "nothing")
REST_S = 7 * DAY_S  # as long as any answer stands: then everything is looked at, whatever nobody thought of
MANY = 2  # parts of a machine's identity that no single machine changes within a week
MAX_SETTLE_S = 30 * 60  # files that never rest are not waited for any longer

AFTERWARDS = "; then run it again, which is not remembered"
TRUCE_HINT = (
    "find out who does it (scx-enroll status tells what was seen) and stop one of the two: this program with scx-enroll hold; "
    "or them, and then: scx-enroll release"
)


# -- local: serve the best valid certificate that is held -----------------------------------------------------------


def _differ(parts: Tuple[str, ...]) -> str:
    return f"{', '.join(parts)} {'differs' if len(parts) == 1 else 'differ'}"


def whose(journal: Journal, seen: Identity) -> Optional[Step]:
    """L0: what to do about a state that is another machine's, or of a host that was sealed; needs no configuration."""
    known, sealed = journal.identity, journal.sealed
    if sealed:
        changed = (*machine.changed(sealed, seen), *machine.appeared(sealed, seen))
        if changed:
            return Step("L0", "set_aside", f"the image was sealed on another machine: {_differ(changed)}")
        reason = "this host is sealed: nothing is done until another machine has its state"
        return Step("L0", "wait", reason, status=4, hint="make the image of it; to go on with this host itself: scx-enroll seal --undo")
    changed = machine.changed(known, seen) if known else ()
    if len(changed) < MANY:
        return None
    return Step("L0", "set_aside", f"the state is another machine's: {_differ(changed)}")


def _another_machine(case: Case) -> Optional[Step]:
    return whose(case.journal, case.seen.identity)


def interrupted(journal: Journal) -> Optional[Step]:
    """L1; needs no configuration and no observation."""
    state = journal.installation.state
    if state == "settled":
        return None
    return Step("L1", "recover", f"an earlier run was interrupted in state {state}")


def _interrupted(case: Case) -> Optional[Step]:
    return interrupted(case.journal)


def _agent_missing(case: Case) -> Optional[Step]:
    if not case.seen.blocked:
        return None
    return Step("L2", "wait", case.seen.blocked, status=4, hint=case.seen.blocked_hint, retry=PERSON if case.seen.lasting else "")


def quiet_from(seen: Observed, policy: Policy, now: int) -> int:
    """Return when the agent's files will have been quiet for long enough, 0 where they are."""
    at = seen.changed_at + min(policy.settle_s, MAX_SETTLE_S)
    return at if seen.changed_at and seen.changed_at <= now < at else 0


def _others_at_work(case: Case) -> Optional[Step]:
    seen = case.seen
    if seen.busy:
        return Step("L3", "wait", seen.busy, status=4, hint="run again when the package manager has finished")
    quiet_at = quiet_from(seen, case.policy, case.now)
    if case.wish.hasty or not quiet_at:
        return None
    reason = f"the agent's files changed {case.now - seen.changed_at} s ago and must be quiet for {case.policy.settle_s} s"
    return Step("L3", "wait", reason, until=quiet_at, status=4, hint="run again then, or now with --now")


def _held_by_operator(case: Case) -> Optional[Step]:
    held = case.journal.held(case.now)
    if not held:
        return None
    status = 4 if case.wish.renew else 0  # what was asked for was not done
    hint = "scx-enroll release" + (AFTERWARDS if status else "")
    return Step("L4", "hold", f"held: {held}", until=case.journal.hold_until or None, status=status, hint=hint)


def _moved_aside(case: Case) -> Optional[Step]:
    reason = "a package script moved the agent's key and certificate aside, and left it with none"
    return Step("L5", "restore_pair", reason) if case.seen.aside else None


def _no_key(case: Case) -> Optional[Step]:
    return None if case.seen.key else Step("L5", "make_key", "the agent has no key")


def _locked_out(case: Case) -> Optional[Step]:
    if not case.seen.locked:
        return None
    reason = f"the agent's account can't get at {case.seen.locked}, so it will not start again"
    return Step("L2", "wait", reason, status=4, hint=case.seen.locked_hint, retry=PERSON)


def _key_fought_over(case: Case) -> Optional[Step]:
    return _truce(case, "key") if case.best is None and case.seen.key else None


def _truce(case: Case, name: str) -> Optional[Step]:
    fight, seen = case.truce(name), case.seen
    if fight is None or (seen.running and not seen.served):  # an agent that is down has nothing to lose; the budgets bound it
        return None
    judged = f"which is not what is wanted ({'; '.join(seen.problems)})" if seen.problems else "which is valid"
    about = judged if seen.served == seen.certificate else "which is not what is installed"
    serves = f"serves {seen.served[:16]}, {about}" if seen.served else "serves nothing"
    reason = f"truce: others rewrote the agent's {name} again after it was put right; meanwhile the agent {serves}"
    return Step("L7", "wait", reason, until=fight.until, status=4, hint=TRUCE_HINT + (AFTERWARDS if case.wish.renew else ""), retry=PERSON)


def _adoptable(case: Case) -> Optional[Step]:
    if not case.seen.stranger:
        return None
    return Step("L7", "adopt", "a valid certificate is installed that is not in our records")


def _not_installed(case: Case) -> Optional[Step]:
    best, seen = case.best, case.seen
    if best is None or (seen.certificate == best.leaf and not seen.spoilt):
        return None
    truce = _truce(case, "certificate")
    if truce:
        return truce
    action = "relink" if best.leaf in seen.copies else "install"
    what = f"generation {best.id} is valid{' for a new key' if best.key != seen.key else ''} and not in place"
    step = Step("L7", action, seen.spoilt if seen.certificate == best.leaf else what, generation=best.id)
    ways = 2 if seen.loadable else 1  # there and back, where there is a way back
    waits = within_restarts(case, step, ways) if seen.running and seen.served != best.leaf else step
    if waits.action == "wait" and seen.loadable and not seen.listening:  # what is there is better than nothing
        waits = within_budget(case, Step("L9", "restart", "nothing listens on the agent's port"), 1)
    return _fought_over(case, waits)


def _fought_over(case: Case, step: Step) -> Step:
    """A wait over an agent that others keep down is for a person."""
    return replace(step, hint=TRUCE_HINT, retry=PERSON) if step.action == "wait" and case.truce("certificate") else step


def _not_served(case: Case) -> Optional[Step]:
    best, seen = case.best, case.seen
    if best is None or not seen.live or not seen.listening or seen.served == best.leaf:
        return None
    reason = f"the agent serves {seen.served[:16] or 'no TLS'} instead of {best.id}"
    known = case.journal.installed
    ways = 2 if case.journal.untried or (known and known.leaf != seen.certificate) else 1  # there and back, where it was never served
    return within_restarts(case, Step("L8", "restart", reason), ways)


def _not_listening(case: Case) -> Optional[Step]:
    best, seen = case.best, case.seen
    ours = best is not None or bool(case.journal.restarting)  # an agent that we stopped, or whose pair was mended, goes on with what it has
    if not ours or seen.listening or not seen.running or not seen.loadable:
        return None
    return _fought_over(case, within_restarts(case, Step("L9", "restart", "nothing listens on the agent's port"), 1))


Row = Callable[[Case], Optional[Step]]

LOCAL: Tuple[Row, ...] = (
    _another_machine, _interrupted, _agent_missing, _held_by_operator, _others_at_work, _moved_aside, _key_fought_over, _no_key,
    _locked_out, _adoptable, _not_installed, _not_served, _not_listening,
)

def _soonest(case: Case, until: Optional[int]) -> Optional[int]:
    """Return `until`, or an earlier moment at which another certificate that is held, or another failure, comes into question."""
    skips = [case.skip(held) for held in case.valid]
    failures: List[Union[Backoff, Skip]] = [skip for skip in skips if skip]
    failures += [backoff for backoff in (*case.journal.backoffs, *case.budget.refused) if case.waits(backoff)]
    moments = [until, *(case.until(failure) for failure in failures)]
    return min((moment for moment in moments if moment is not None), default=None)


def decide(
    seen: Observed, policy: Policy, journal: Journal, budget: Budget, now: int, wish: Wish = Wish(),
    rows: Tuple[Row, ...] = (*LOCAL, *CA),
) -> Step:
    """Return the next step: the first row that matches. `rows`: CA alone on behalf of a host that is not this one."""
    case = Case(seen, policy, journal, budget.current(now), now, wish)
    step = next(step for step in (row(case) for row in rows) if step)
    if step.retry == WINDOW:
        # a CA is asked outside the restart window, too
        asked = next(step for step in (row(case) for row in CA) if step)
        if asked.action not in WAITING:
            return asked
        step = replace(step, until=min(policy.opens, asked.until or policy.opens))
    waits = step.action in ("wait", "nothing") and step.row not in ("L0", "L2", "L3")
    return replace(step, until=_soonest(case, step.until)) if waits else step


def rest(seen: Observed, policy: Policy, journal: Journal, budget: Budget, now: int) -> Optional[Tuple[Step, int]]:
    """Return what a plain run decides, and until when it decides the very same if nothing changes but the time; at most a week.

    None where there is something to do, an agent that we stopped is still to be started, others are at work, or a clock was wrong.
    """
    step = decide(seen, policy, journal, budget, now)
    times = [*(s.at for s in budget.submissions), *budget.restarts]
    startable = seen.running and (seen.blocked or (seen.loadable and not seen.locked)) and not journal.held(now)
    if (journal.restarting and startable) or step.action not in WAITING or step.row == "L3" or any(at > now for at in times):
        return None
    moments = [now + REST_S, step.until, runs_out_at(seen.held), journal.request.next]
    moments += [moment for held in seen.held for moment in (held.not_before, held.not_after, held.obtained)]
    moments.append(policy.opens - HOUR_S)  # from then on the timer's run arranges a look at the very time
    moments += [journal.identity.since + machine.SETTLE_S] if journal.identity else []
    moments += [at + DAY_S for at in times]  # what the day was spent on is told
    moments += [*(backoff.at for backoff in journal.backoffs), *(skip.at for skip in journal.skipped)]
    moments += [moment for fight in journal.fights for moment in (fight.at, fight.until)]
    return step, min(moment for moment in moments if moment is not None and moment > now)
