"""What the operator sees: one document of plain facts, shown as JSON or as text, and the last lines of a failure.

docs/status.md lists the document's keys. Everything is returned as text; nothing is printed here.
"""

import json
import shlex
import time
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence

from scx_enroll import causes, journal, machine, pace, verify
from scx_enroll.case import RESTARTS_AGAIN, Step
from scx_enroll.errors import EnrollError
from scx_enroll.job import Result

if TYPE_CHECKING:  # most runs have nothing to do with them
    from scx_enroll.behalf import Ended
    from scx_enroll.cacert import Trusted

VERSION = 1
SHOWN_CHANGES = 5  # by `status` in words; the JSON has all
ACTED = {
    "set_aside": "set another machine's state aside",
    "notice": "noticed a change of this machine",
    "accept_name": "took the name that this host has now",
    "recover": "finished or undid what an interrupted run began",
    "restore_pair": "gave the agent's key and certificate, which a package script had moved aside, their names back",
    "make_key": "let the agent's own tool make a key",
    "adopt": "adopted the certificate that is installed",
    "install": "installed generation {generation}",
    "relink": "linked generation {generation} again",
    "roll_back": "put back what was installed before",
    "restart": "restarted the agent",
    "submit": "turned to {ca} for a certificate",
    "repeat": "turned to {ca} again, with the same CSR",
    "poll": "asked the CA what became of the request",
    "abandon": "gave a request up",
    "lost": "noted that the fate of a request is doubtful",
    "take_over": "took a request over",
    "question": "asked {ca} whether the certificate in service was revoked",
}


TOLD = ("abandon", "take_over", "set_aside", "notice", "accept_name")  # with row and reason


def acted(step: Step, *, verbose: bool) -> str:
    """Return the log line of an act that was carried out; `verbose`, and where it has the request ID: with its row and reason."""
    line = ACTED[step.action].format(generation=step.generation, ca=step.ca)
    return f"scx-enroll: {line}" + (f" ({step.row}: {step.reason})" if verbose or step.action in TOLD else "") + "\n"


def failure(error: EnrollError) -> str:
    """Return the last lines of a failure: each cause on a line, and the next step."""
    lines = [f"scx-enroll: error: {line}" for line in error.message.splitlines()]
    if error.hint:
        lines.append(f"scx-enroll: hint: {error.hint}")
    return "\n".join(lines) + "\n"


def error_document(error: EnrollError) -> Dict[str, Any]:
    """Return the document of a run that failed."""
    return {"version": VERSION, "exit_status": error.exit_status, "error": error.message, "hint": error.hint}


def document(result: Result, now: int) -> Dict[str, Any]:
    """Return the facts of a run or a look; no secrets, since anyone may read them."""
    step, view, state = result.step, result.view, result.journal
    found, seen = view.found, view.seen
    held = {held.leaf: held for held in seen.held}
    budget = result.budget.current(now)
    newest = max((h for h in seen.held if not h.mismatches), key=lambda h: h.not_before, default=None)
    return {
        "version": VERSION,
        "time": now,
        "exit_status": result.status,
        "row": step.row,
        "action": step.action,
        "reason": step.reason if step.status or not result.failure else result.failure.message,
        "hint": step.hint if step.status or not result.failure else result.failure.hint,
        "until": step.until,
        "acts": _acts(result.acts),
        "name": found.spec.fqdn if found else None,
        "agent": {
            "layout": found.agent.layout,
            "certificate": found.agent.certificate,
            "key": found.agent.key,
            "port": found.agent.port,
            "account": found.agent.account,
            "process": seen.process,
        } if found else None,
        "installed": _certificate(found.installed) if found and found.installed else None,
        "generation": held[seen.certificate].id if seen.certificate in held else None,
        "proven": bool(seen.certificate) and seen.served == seen.certificate,
        "served": seen.served or None,
        "listening": seen.listening,
        "live": seen.live,
        "renewal_due": pace.due(newest, view.policy, seen.share) if newest else None,
        "question": state.question or None,
        "request": _request(state.request),
        "new_key": seen.staged or None,
        "errands": [{"names": list(request.names), **(_request(request) or {})} for request in result.errands],
        "cas": [
            {
                "server": c.ca, "time": c.at, "exit_status": c.status, "message": c.message, "issuer": c.issuer or None,
                "issuer_ends": c.ends or None, "trusted": c.trusted,
            } for c in state.contacts
        ],
        "waiting_for": [
            {"ca": b.ca or None, "message": b.message, "until": pace.until_of(b, pace.expiry(seen.held))}
            for b in (*state.backoffs, *budget.refused) if b.ca != journal.NOWHERE
        ],
        "hold": state.held(now) or None,
        "hold_until": state.hold_until or None if state.held(now) else None,
        "sealed": state.sealed.since if state.sealed else None,
        "changed": list(machine.changed(state.identity, seen.identity)) if state.identity else [],
        "foreign_key": seen.foreign_key or None,
        "budget": {
            "certificates": sum(s.counts for s in budget.submissions),
            "submissions": len(budget.submissions),
            "restarts": len(budget.restarts),
            "restarts_per_hour": journal.RESTARTS_PER_HOUR,
            "restarts_per_day": journal.RESTARTS_PER_DAY,
            "certificates_per_day": view.policy.certificates_per_day,
            "submissions_per_day": view.policy.submissions_per_day,
        },
        "generations": [g.id for g in result.generations],
        "notes": list(found.notes) if found else [],
        "problems": list(seen.problems),
        "changes": [{"time": one.at, "cause": one.cause, "what": one.what, "done": causes.done(one)} for one in state.changes],
    }


def _request(request: journal.Request) -> Optional[Dict[str, Any]]:
    if request.state == "none":
        return None
    return {
        "state": request.state, "ca": request.ca, "id": request.id, "since": request.since, "next": request.next,
        "pending": request.pending,
    }


def _certificate(facts: verify.Facts) -> Dict[str, Any]:
    return {
        "subject": facts.subject,
        "issuer": facts.issuer,
        "names": list(facts.names),
        "serial": facts.serial,
        "not_before": facts.not_before,
        "not_after": facts.not_after,
        "sha256": facts.leaf,
        "key": facts.key,
    }


def as_json(facts: Mapping[str, Any]) -> str:
    """Return a document as JSON."""
    return json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def when(at: Optional[int]) -> str:
    """Return a time as an operator reads it."""
    return "never" if at is None else time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))


def _shown(request: Mapping[str, Any]) -> str:
    known = f"ID {request['id']}" if request["id"] is not None else "no ID known"
    return f"{'pending' if request['pending'] else request['state']}, {known}, at {request['ca']}, since {when(request['since'])}"


def _conditions(facts: Mapping[str, Any]) -> List[List[str]]:
    shown = {
        "hold": facts["hold"] and f"{facts['hold']}, until {when(facts['hold_until']) if facts['hold_until'] else 'scx-enroll release'}",
        "sealed": facts["sealed"] and f"as an image, {when(facts['sealed'])}",
        "this machine": facts["changed"] and f"{', '.join(facts['changed'])} changed",
        "key": facts["foreign_key"],
    }
    return [[name, text] for name, text in shown.items() if text]


def _changed(changes: Sequence[Mapping[str, Any]]) -> List[List[str]]:
    told = [(f"{when(one['time'])} {one['cause']}: {one['what']}", one["done"]) for one in changes]
    return [row for what, done in told for row in (["changed", what], ["  done", done])]


def _next(facts: Mapping[str, Any]) -> List[List[str]]:
    shown = {
        "next": f"{facts['row']} {facts['action']}: {facts['reason']}",
        "  not before": when(facts["until"]) if facts["until"] else "",
        "  hint": facts["hint"],
    }
    return [[name, text] for name, text in shown.items() if text]


def as_status(facts: Mapping[str, Any]) -> str:
    """Return a document as `status` shows it."""
    if "error" in facts:
        return f"the last run failed: {facts['error']}\n{facts['hint']}\nas of {when(facts['time'])}\n"
    rows: List[List[str]] = [["host name", facts["name"] or "unknown"]]
    agent, installed, request = facts["agent"], facts["installed"], facts["request"]
    if agent:
        rows.append(["agent", f"{agent['layout']}, {agent['certificate']}, port {agent['port']}, {agent['process']}"])
    if installed:
        rows += [
            ["installed", installed["sha256"]],
            ["  subject", installed["subject"]],
            ["  issuer", installed["issuer"]],
            ["  names", ", ".join(installed["names"])],
            ["  valid", f"{when(installed['not_before'])} to {when(installed['not_after'])}"],
            ["  key", installed["key"]],
            ["  generation", facts["generation"] or "not one of ours"],
            *(["  problem", problem] for problem in facts["problems"]),
        ]
    elif agent:
        rows.append(["installed", "no certificate that can be read"])
    if facts["listening"]:
        served = "the certificate installed" if facts["proven"] else facts["served"] or "no TLS"
    else:
        served = "nothing listens" if facts["live"] else "not probed: this root's agent does not run here"
    rows.append(["served", served])
    if facts["renewal_due"]:
        rows.append(["renewal due", when(facts["renewal_due"])])
    if request:
        rows.append(["request", _shown(request)])
    rows += [["new key", f"made and not in service yet, SHA-256 of its SPKI {spki}"] for spki in (facts["new_key"],) if spki]
    rows += [["for another", f"{', '.join(errand['names'])}: {_shown(errand)}"] for errand in facts["errands"]]
    rows += [["CA", f"{ca['server']}, {when(ca['time'])}: {ca['message']}"] for ca in facts["cas"]]
    for w in facts["waiting_for"]:
        until = when(w["until"]) if w["until"] else "the configuration, the key or the password changes"
        told = w["message"] if w["ca"] and w["message"].startswith(w["ca"]) else f"{w['ca'] or 'any CA'}: {w['message']}"
        rows.append(["waiting", f"{told}; until {until}"])
    rows += _conditions(facts)
    budget = facts["budget"]
    spent = (
        f"submissions {budget['submissions']} of {budget['submissions_per_day']}, certificates issued or possibly issued "
        f"{budget['certificates']} of {budget['certificates_per_day']}"
    )
    allowed = f"{budget['restarts_per_hour']} an hour and {budget['restarts_per_day']} a day, the last one for the way back"
    rows.append(["last 24 hours", f"{spent}, restarts {budget['restarts']} (of {allowed})"])
    rows += _changed(facts["changes"][-SHOWN_CHANGES:])
    rows += [["note", note] for note in facts["notes"]]
    rows += _next(facts)
    return "".join(f"{name + ':':16}{value}\n" for name, value in rows) + f"as of {when(facts['time'])}\n"


def as_end(facts: Mapping[str, Any], *, failed: bool, wished: str = "") -> str:
    """Return the last lines of a run that was not stopped by an error: what is in service, or what it waits for.

    `wished`: "--renew" or "--rekey", by which a certificate was asked for; what failed then is not tried again by itself.
    """
    lines = [f"scx-enroll: note: {note}" for note in facts["notes"]]
    changed = any(act["action"] in ("install", "relink", "roll_back", "adopt") for act in facts["acts"])
    if changed and not facts["proven"] and not facts["exit_status"]:
        lines.append("scx-enroll: note: not proven: the agent was stopped, or does not run here; a later run looks again")
    if facts["exit_status"]:
        waits = facts["until"] and not failed
        lines.append(f"scx-enroll: {'waiting' if waits else 'error'}: {facts['reason']}")
        gone = wished and not facts["request"] and facts["row"].startswith("C")  # the CA's answer was no; what the agent waits for comes
        if facts["until"] and (not gone or facts["hint"] == RESTARTS_AGAIN):
            lines.append(f"scx-enroll: next attempt not before {when(facts['until'])}")
        if facts["hint"]:
            again = f"scx-enroll run {wished}" if gone else "scx-enroll run --now"
            lines.append(f"scx-enroll: hint: {facts['hint'].replace('scx-enroll run --now', again)}")
        return "\n".join(lines) + "\n"
    end = facts["reason"] if facts["acts"] or facts["action"] != "nothing" else f"nothing to do: {facts['reason']}"
    lines.append(f"scx-enroll: {end}")
    installed = facts["installed"]
    if facts["acts"] and installed:
        lines.append(f"scx-enroll: {installed['subject']}, issued by {installed['issuer']}, "
                     f"until {when(installed['not_after'])}, SHA-256 {installed['sha256']}")
    if facts["hold"]:
        lines.append("scx-enroll: hint: scx-enroll release ends the hold")
    if facts["action"] == "nothing" and facts["renewal_due"]:
        lines.append(f"scx-enroll: renewal is due at {when(facts['renewal_due'])}")
    return "\n".join(lines) + "\n"


# -- on behalf of another host, and for the Management Servers --------------------------------------------------------


def errand_document(ended: "Ended", name: str, now: int) -> Dict[str, Any]:
    """Return the facts of `submit` of the file `name`: how it stands, and certificate and chain as PEM."""
    step, shown = ended.step, None if ended.step.status else ended.failure
    one, hint = ended.generation, shown.hint if shown else ended.step.hint
    return {
        "version": VERSION,
        "time": now,
        "exit_status": ended.status,
        "name": ended.spec.fqdn,
        "reason": shown.message if shown else step.reason if step.status else f"a valid certificate for {ended.spec.fqdn} is held",
        "hint": for_errand(hint, name),
        "acts": _acts(ended.acts),
        "until": step.until,
        "request": _request(ended.journal.request),
        "facts": _certificate(verify.facts(verify.read(one.certificate)[0])) if one else None,
        "certificate": one.certificate.decode() if one else None,
        "chain": one.chain.decode() if one else "",
    }


def for_errand(hint: str, name: str) -> str:
    """Return a hint whose commands are those for the request in the file `name`."""
    return hint.replace("scx-enroll run", f"scx-enroll submit {shlex.quote(name)}")


def _acts(acts: Sequence[Step]) -> List[Dict[str, str]]:
    return [{"row": act.row, "action": act.action, "reason": act.reason} for act in acts]


def as_errand(facts: Mapping[str, Any]) -> str:
    """Return what a person is told beside the certificate."""
    lines, held = [], facts["facts"]
    if held:
        until = when(held["not_after"])
        lines.append(f"scx-enroll: {held['subject']}, issued by {held['issuer']}, until {until}, SHA-256 {held['sha256']}")
    if facts["exit_status"]:
        lines.append(f"scx-enroll: {'waiting' if facts['until'] else 'error'}: {facts['reason']}")
        if facts["until"]:
            lines.append(f"scx-enroll: next attempt not before {when(facts['until'])}: call it again then")
        if facts["hint"]:
            lines.append(f"scx-enroll: hint: {facts['hint']}")
    return "".join(f"{line}\n" for line in lines)


def as_trust(found: "Sequence[Trusted]", *, fetched: bool) -> str:
    """Return each certificate with its fingerprints, and the commands that import it on a Management Server."""
    parts = []
    for one in found:
        kind = "root, for the store Root" if one.store == "Root" else "intermediate, for the store CA"
        parts.append(
            f"{kind}: {one.file}\n  subject      {one.facts.subject}\n  issuer       {one.facts.issuer}\n"
            f"  valid        {when(one.facts.not_before)} to {when(one.facts.not_after)}\n"
            f"  SHA-256      {one.facts.leaf}\n  SHA-1        {one.sha1} (the thumbprint in Windows)\n"
            f"  trusted here {'yes' if one.trusted else 'NO, not by issuer-trust'}\n{verify.pem(one.der).decode()}"
        )
    lines = []
    if fetched and not all(one.trusted for one in found):
        lines.append("This came from the CA's web server and proves nothing. Compare SHA-256 with the people who run the PKI. Then add the")
        lines.append("root to the file that issuer-trust names; those that are there stay as long as certificates lead to them.")
    if not fetched:
        lines.append("Intermediates are known after the first certificate from a CA. All that a CA has now: scx-enroll ca-cert --fetch")
    lines.append("Save each block under its name on every Management Server and gateway of the resource pool. There, as administrator:")
    lines += [f"certutil -addstore -f {one.store} {one.file}" for one in found]
    return "\n".join([*parts, *lines]) + "\n"


def trust_json(found: "Sequence[Trusted]") -> str:
    """Return the same as JSON: a list."""
    return json.dumps(
        [
            {
                "store": one.store, "file": one.file, "subject": one.facts.subject, "issuer": one.facts.issuer,
                "not_before": one.facts.not_before, "not_after": one.facts.not_after, "sha256": one.facts.leaf, "sha1": one.sha1,
                "trusted": one.trusted, "pem": verify.pem(one.der).decode(),
            } for one in found
        ], indent=1, ensure_ascii=False,
    ) + "\n"
