"""The CA table of the plan: hold a fresh certificate for what is wanted, whoever's key it is for."""

from dataclasses import replace
from typing import Callable, Optional, Tuple

from scx_enroll.case import Case, Step, within_budget
from scx_enroll.journal import DAY_S, free_at
from scx_enroll.pace import (
    DOUBT_S,
    POLL_S,
    SHARES,
    SIGNIN_REFUSED,
    TRUST_SPREAD_S,
    WEEK_S,
    Held,
    doubt_ends,
    first_question,
    patience,
    repeat_at,
    runs_out_at,
)

MAX_POSTS_PER_CSR = 2
BUDGET_HINT = "mend the cause meanwhile; or, where so many are meant, raise certificates-per-day or submissions-per-day in [renewal]"
CA_REFUSED, CERTIFICATE_REFUSED, ROLLED_BACK = 6, 8, 9


def _pending(case: Case) -> Optional[Step]:
    request = case.journal.request
    if request.state != "submitted":
        return None
    what = f"request ID {request.id} at {request.ca}"
    unwanted = _unwanted(case)
    if unwanted:
        return Step("C1", "abandon", f"{what} is abandoned: {unwanted}")
    if case.now >= request.since + case.policy.pending_s:
        return Step("C1", "abandon", f"{what} is abandoned: not issued within {case.policy.pending_s // DAY_S} days")
    ends = request.since + case.policy.pending_s
    refused = _signin_refused(case, request.ca)
    if refused:
        return replace(refused, row="C1", until=min(refused.until or ends, ends))
    again = case.wish.renew and case.refused_secret(request.ca)  # a person says that the account was mended
    if case.wish.now or again or not case.now < request.next <= case.now + POLL_S[1]:
        return Step("C1", "poll", f"{what} is asked for")
    other, other_from = _other_to_turn_to(case)
    if other_from is not None and other_from <= case.now:
        reason = f"{what} is abandoned: it is pending, what is held runs out, and {other} could serve"
        return Step("C1", "abandon", reason, ca=request.ca, status=7, hint=f"withdraw it, or approve such requests in time on {request.ca}")
    until = min(request.next, ends, other_from or ends)
    if request.pending:
        hint = f"the operator of {request.ca} must issue or deny request ID {request.id}; then: scx-enroll run --now"
        doubt = f" as far as is known: {request.why}" if request.why else ""
        return Step("C1", "wait", f"{what} is pending{doubt}", until=until, status=7, hint=hint)
    hint = "it is asked for again by itself, or now with: scx-enroll run --now"
    return Step("C1", "wait", f"{what} was not fetched: {request.why}", until=until, status=5, hint=hint)


def _unwanted(case: Case) -> str:
    """Say why nothing good can come of the request any more, "" if it can."""
    request = case.journal.request
    if request.ca not in case.policy.cas:
        return "that CA is not configured any more"
    if request.spki not in (case.seen.key, case.seen.staged):
        return "the key that it asks for is not here any more"
    if request.spki == case.seen.key and case.seen.foreign_key:
        return case.seen.foreign_key
    if request.names and case.seen.names and request.names != case.seen.names:
        return f"it asks for {', '.join(request.names)}, which is not wanted any more"
    return ""


def _other_to_turn_to(case: Case) -> Tuple[str, Optional[int]]:
    """Return another CA, and from when on it is turned to, where time runs out while a person at this one does nothing."""
    request = case.journal.request
    free = {ca: 0 if backoff is None else case.until(backoff) for ca, backoff in ((ca, case.backoff(ca)) for ca in case.policy.cas)}
    others = [(at, ca) for ca, at in free.items() if ca != request.ca and at is not None]
    if not request.pending or not others or not case.seen.held:
        return "", None
    at, other = min(others, key=lambda pair: pair[0])
    over = _over_budget(case, "C1")
    return other, max(at, request.since + DAY_S, runs_out_at(case.seen.held), (over.until or 0) if over else 0)


def _signin_refused(case: Case, ca: str) -> Optional[Step]:
    """Not even a poll is sent where we were not let in: accounts lock."""
    backoff = case.backoff(ca)
    if backoff is None or backoff.status != SIGNIN_REFUSED:
        return None
    until = case.until(backoff)
    return Step("C2", "wait", backoff.message, until=until, status=backoff.status, hint=backoff.hint, retry=patience(backoff))


def _doubtful(case: Case) -> Optional[Step]:
    request = case.journal.request
    if request.state == "submitting":
        return Step("C2", "lost", "an earlier run was killed while it submitted a request")
    if request.state != "doubtful":
        return None
    unwanted = _unwanted(case)
    if unwanted:
        return Step("C2", "abandon", f"the doubtful request at {request.ca} is abandoned: {unwanted}")
    ends = doubt_ends(request, case.seen.share)
    if not request.since - DOUBT_S <= case.now < ends:
        return Step("C2", "abandon", f"the doubtful request at {request.ca} is abandoned, one to two days after it was first sent")
    again = min(repeat_at(request, case.seen.share), ends) if request.tries < MAX_POSTS_PER_CSR and not request.answered else ends
    if case.now < again:
        reason = f"it is doubtful whether {request.ca} stored a request: {request.why}"
        hint = f"look for it on {request.ca} (requester, time), then: scx-enroll run --adopt ID; the next attempt follows by itself"
        return Step("C2", "wait", reason, until=again, status=5, hint=hint)
    refused = _signin_refused(case, request.ca)
    if refused:
        return replace(refused, until=min(refused.until or ends, ends))
    over = _over_budget(case, "C2")
    if over:
        return replace(over, until=min(over.until or ends, ends))
    return Step("C2", "repeat", "the same CSR is submitted once more", ca=request.ca)


def _refused(case: Case) -> Optional[Step]:
    for ca in case.policy.cas:
        backoff = case.backoff(ca)
        if backoff and backoff.status == CERTIFICATE_REFUSED:
            return Step("C3", "wait", backoff.message, status=CERTIFICATE_REFUSED, hint=backoff.hint)
    last = sorted(case.seen.held, key=lambda held: held.number)[-2:]
    if last and not case.valid and not case.wish.renew and _lacks_a_root(last[-1]) and last[-1].obtained >= case.seen.trust_changed_at:
        what = f"the certificate of request ID {last[-1].request_id} from {last[-1].ca}"
        hint = "see that issuer-trust holds the CA's root, and its intermediates where the CA does not send them; it is installed then"
        return Step("C3", "wait", f"{what} is held, but refused: {last[-1].mismatches[0]}", status=CERTIFICATE_REFUSED, hint=hint)
    if len(last) == 2 and all(held.revoked for held in last) and not case.valid and not case.wish.renew:
        reason = f"the CA revoked generation {last[0].id} and then its successor {last[1].id}; no other is asked for"
        return Step("C3", "wait", reason, status=CA_REFUSED, hint=f"ask the operator of {last[1].ca} why, then: scx-enroll run --renew")
    return None


def _needed(case: Case) -> Optional[Step]:
    newest, planned, new_key = case.valid[0] if case.valid else None, 0, case.policy.new_key or case.wish.rekey
    if newest is None and _displaced(case) and not (case.wish.now or case.wish.renew):
        spread_until = case.seen.trust_changed_at + TRUST_SPREAD_S * case.seen.share // SHARES
        if case.now < spread_until:
            reason = "the certificate in service leads to none of the configured roots; its renewal is spread over days"
            return Step("C6", "nothing", reason, until=spread_until)
    if newest is None:
        gone = [held for held in case.seen.held if held.revoked and held.key == case.seen.key]
        revoked = max(gone, key=lambda held: held.number, default=None)
        reason = f"the CA revoked generation {revoked.id}" if revoked else case.seen.foreign_key or "no valid certificate is held"
        new_key = new_key or bool(revoked or case.seen.foreign_key)
    elif case.wish.renew:
        reason = f"a new {'key' if case.wish.rekey else 'certificate'} was asked for"
    elif case.now >= case.due(newest):
        planned = case.due(newest)
        reason = f"renewal of generation {newest.id} is due"
    else:
        return None
    over = _over_budget(case, "C4")
    if over:
        return over
    step = Step("L6" if case.seen.foreign_key else "C4", "submit", reason, due=planned, new_key=new_key)
    if case.seen.running and case.budget.restarts_until(2) > case.now:
        return within_budget(case, step, 2)  # a certificate that can't be installed is not worth a request
    waits = []
    for ca in case.policy.cas:
        backoff = case.backoff(ca)
        if backoff is None:
            return replace(step, ca=ca)
        waits.append(backoff)
    untils = [until for until in map(case.until, waits) if until is not None]
    # What needs a person comes first, in whichever order this host asks: a fleet says the same.
    first, until = min(waits, key=lambda backoff: patience(backoff) in ("soon", "joining")), min(untils, default=None)
    hint = first.hint if until is None or "scx-enroll run" in first.hint else f"{first.hint}; then: scx-enroll run --now"
    return Step("C4", "wait", first.message, until=until, status=first.status, hint=hint, retry=patience(first))


def _lacks_a_root(held: Held) -> bool:
    return bool(held.mismatches) and all(what.startswith("path:") for what in held.mismatches)


def _displaced(case: Case) -> bool:
    """Say whether what is installed lost nothing but its root: the configured roots changed, the certificate did not."""
    return any(held.leaf == case.seen.certificate and _lacks_a_root(held) for held in case.seen.held)


def _over_budget(case: Case, row: str) -> Optional[Step]:
    policy, sent = case.policy, case.budget.submissions
    until = max(
        free_at((s.at for s in sent if s.counts), policy.certificates_per_day - 1, DAY_S),
        free_at((s.at for s in sent), policy.submissions_per_day - 1, DAY_S),
    )
    if until <= case.now:
        return None
    last = next((b for b in case.journal.backoffs if b.inputs == case.seen.inputs), None)
    reason = (
        f"the submission budget is spent ({policy.certificates_per_day} certificates and "
        f"{policy.submissions_per_day} submissions a day)" + (f"; the last failure: {last.message}" if last else "")
    )
    return Step(row, "wait", reason, until=until, status=last.status if last else 6, hint=BUDGET_HINT)


def _asked_about(case: Case) -> Tuple[Optional[Held], Optional[int]]:
    """Return the certificate in service, and when the CA that knows it by a request ID is to be asked whether it was revoked.

    A time beyond two weeks was written by a wrong clock.
    """
    held, asked = case.best, case.journal.question
    if held is None or not held.request_id or held.ca not in case.policy.cas:
        return held, None
    first = first_question(held.obtained, case.seen.share)
    at = asked if first <= asked <= case.now + 2 * WEEK_S else min(first, case.now + 2 * WEEK_S)
    backoff = case.backoff(held.ca)
    free = 0 if backoff is None else case.until(backoff)
    return held, None if free is None else max(at, free)


def _question(case: Case) -> Optional[Step]:
    held, at = _asked_about(case)
    if held is None or at is None or case.now < at:
        return None
    reason = f"once a week {held.ca} is asked whether it revoked request ID {held.request_id}"
    return Step("C5", "question", reason, generation=held.id, ca=held.ca)


def _nothing(case: Case) -> Step:
    newest, at = case.valid[0], _asked_about(case)[1]
    skip = case.skip(newest)
    if skip:
        status = skip.status or (0 if case.best else ROLLED_BACK)  # put aside by the operator, with nothing valid in its place
        hint = "mend the cause, then: scx-enroll run --now"
        step = Step("C6", "wait", skip.message, until=case.due(newest), status=status, hint=hint, generation=newest.id)
    else:
        proven = case.seen.served == newest.leaf
        reason = f"generation {newest.id} is valid and {'in service' if proven else 'installed, not proven'}"
        step = Step("C6", "nothing", reason, until=case.due(newest), generation=newest.id)
    return step if at is None else replace(step, until=min(case.due(newest), at))


CA: Tuple[Callable[[Case], Optional[Step]], ...] = (_pending, _doubtful, _refused, _needed, _question, _nothing)
