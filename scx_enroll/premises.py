"""Writes down what the answer of a run that did nothing rests on, for `idle` to check instead of looking anew.

Whatever the run looked at, it looked at through `rootfs`, which noted it; what the port served and until when the plan would say
the same are added. What can't be promised is not written: the next run looks again.
"""

from dataclasses import replace
from typing import Any, Dict, List, Optional, Tuple

from scx_enroll import agent as agents
from scx_enroll import idle, pace, plan, report
from scx_enroll import journal as j
from scx_enroll.errors import Unconfigured
from scx_enroll.job import Result
from scx_enroll.rootfs import Root

FRESH_NS = 10**9  # file systems keep the time of a change to a second at worst: one of the same second would not be seen


def of(root: Root, config: str, result: Result, now: int) -> Optional[bytes]:
    """Return the premises of a run that ended so, None where it did something or something may change unnoticed.

    `config`: the absolute path of --config, or "". They hold the words, the document and the statuses of a plain run.
    """
    seen, ready = result.view.seen, result.view.found
    known = plan.rest(seen, result.view.policy, result.journal, result.budget, now)
    folder = root.host_path(idle.STATUS_FOLDER)
    if result.acts or known is None or any(one.ca != j.NOWHERE for one in result.budget.refused) or not _quiet(root):
        return None
    if ready and (ready.resolved or seen.process != ("running" if seen.listening else "stopped")):
        return None
    step, until = known
    facts = report.document(replace(result, step=step), now)
    status = facts["exit_status"]
    at = min((until, *(moment for moment in (ready.turns if ready else ()) if moment > now)))
    port: List[str] = []
    if root.live and ready:  # takes longest, so at last
        pid = agents.pid(root.aside(), ready.agent) if seen.listening and seen.process == "running" else 0
        port = [f"server {agents.SERVER} {pid}"] if pid else []  # as the kernel names its process
        port.append(f"library {idle.openssl()} OpenSSL")
        port.append(f"port {idle.served(listening=seen.listening, der=ready.served)} {ready.agent.port}")
    patient = status if pace.needs_a_person(status, seen.held, now, step.retry) else 0
    where = (idle.here(root.path, config, live=root.live), now, at, folder)
    return _written(root, where, facts, (str(status), patient, report.as_end(facts, failed=False)), port)


def of_nothing(root: Root, config: str, error: Unconfigured, now: int) -> Optional[bytes]:
    """Return the premises of an unattended run that found no CA configured: the next one has nothing to say."""
    where = (idle.here(root.path, config, live=root.live), now, now + plan.REST_S, root.host_path(idle.STATUS_FOLDER))
    return _written(root, where, report.error_document(error), ("", 0, ""), []) if _quiet(root) else None


def _written(
    root: Root, where: Tuple[str, int, int, str], facts: Dict[str, Any], said: Tuple[str, int, str], port: List[str]
) -> Optional[bytes]:
    """Put the parts together. `where`: of which host, since and until when, the status's folder; `said`: both exit statuses, words."""
    notes = root.notes
    claims = [f"looked {was} {path}" for path, was in notes.looked.items()]
    claims += [f"listed {was} {path}" for path, was in notes.listed.items()]
    claims += [f"says {said} {path}" for path, said in notes.said.items()]
    claims += [f"unlocked free {path}" for path in sorted(notes.unlocked)]
    claims += [f"process ended {pid}" for pid in notes.ended]
    claims += [f"unit {state or '-'} {name}" for name, state in notes.units.items()]
    claims += port
    if any("\n" in claim for claim in claims):
        return None
    before, after = report.as_json({**facts, "time": 0}).split('\n "time": 0')
    status, patient, text = said
    parts = (*where, status, patient, "\n".join(claims), text, f'{before}\n "time": ', after)
    return "\0".join(map(str, parts)).encode("utf-8", "surrogateescape")


def _quiet(root: Root) -> bool:
    """Say whether all that was looked at, but our own state, had rested before the run began, and stood still since."""
    notes, ours = root.notes, root.host_path(idle.STATE) + "/"
    times = [changed for path, changed in notes.changed_ns.items() if not path.startswith(ours)]
    return None not in notes.looked.values() and max(times, default=0) < notes.since_ns // 10**9 * 10**9 - FRESH_NS
