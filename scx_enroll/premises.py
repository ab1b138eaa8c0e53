"""Writes down what the answer of a run that did nothing rests on, for `idle` to check instead of looking anew.

Whatever the run looked at, it looked at through `rootfs`, which noted it; what the port served and until when the plan would say
the same are added. What can't be promised is not written: the next run looks again.
"""

import json
from dataclasses import replace
from typing import Optional

from scx_enroll import idle, pace, plan, report
from scx_enroll.enroll import Result
from scx_enroll.rootfs import Root

FRESH_NS = 10**9  # file systems keep the time of a change to a second at worst: one of the same second would not be seen


def of(root: Root, config: str, result: Result, now: int) -> Optional[bytes]:
    """Return the premises of a run that ended so, None where it did something or something may change unnoticed.

    `config`: the absolute path of --config, or "". They hold the words, the document and the statuses of a plain run.
    """
    seen, ready = result.view.seen, result.view.found
    known = plan.rest(seen, result.view.policy, result.journal, result.budget, now)
    if result.acts or result.failure or ready is None or ready.resolved or known is None or result.budget.refused:
        return None
    folder = root.host_path(idle.STATUS_FOLDER)
    if seen.process != ("running" if seen.listening else "stopped") or not _quiet(root):
        return None
    step, until = known
    facts = report.document(replace(result, step=step, acts=(), failure=None), now)
    before, after = report.as_json({**facts, "time": 0}).split('\n "time": 0')
    status = facts["exit_status"]
    premises = {
        "here": idle.here(root.path, config, live=root.live),
        "at": now,
        "until": min(until, *(moment for moment in ready.turns if moment > now)),
        "looked": root.notes.looked,
        "listed": root.notes.listed,
        "locks": sorted(root.notes.locks),
        "port": ready.agent.port if root.live else 0,
        "listening": seen.listening,
        "served": seen.served,
        "folder": folder,
        "exit_status": status,
        "quiet_status": status if pace.needs_a_person(status, seen.held, now) else 0,
        "text": report.as_end(facts, failed=False),
        "document": [f'{before}\n "time": ', after],
    }
    return json.dumps(premises, separators=(",", ":")).encode()


def _quiet(root: Root) -> bool:
    """Say whether all that was looked at, but our own state, had rested before the run began, and stood still since."""
    notes, ours = root.notes, root.host_path(idle.STATE) + "/"
    times = [facts[-1] for path, facts in notes.looked.items() if facts and len(facts) > 6 and not path.startswith(ours)]
    times += [times[-1] for path, times in notes.listed.items() if not path.startswith(ours)]
    fresh = notes.since_ns // 10**9 * 10**9 - FRESH_NS
    return None not in notes.looked.values() and max(times, default=0) < fresh
