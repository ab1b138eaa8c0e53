"""What is remembered of the CAs: what each said last, why one is not asked for now, what the budget was spent on."""

import hashlib
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple

from scx_enroll import journal as j
from scx_enroll import outcomes, pace
from scx_enroll.activate import Site
from scx_enroll.case import GUARDED
from scx_enroll.config import CA, Config
from scx_enroll.errors import CARefused, CAUnreachable, ConfigError, EnrollError, HostError, SigninRefused
from scx_enroll.pace import Held
from scx_enroll.rootfs import Root

if TYPE_CHECKING:
    from scx_enroll import ca as cas


KEPT_REVOKED = 8  # as many as generations are kept
KEPT_REFUSED = 8  # secrets that no CA is given now, in case that they come back


def _connect(root: Root, ca: CA) -> "cas.Conversation":
    from scx_enroll import ca as cas
    from scx_enroll import signin

    return cas.connect(root, ca, signin.authentication(root, ca))


def _secret_mark(root: Root, ca: CA, salt: bytes) -> str:
    from scx_enroll import signin

    return signin.authentication(root, ca).mark(salt)


@dataclass(frozen=True)
class Line:
    """How CAs are reached: a conversation with one, and a mark of the secret that would be used there (exchange.SignIn.mark)."""

    connect: Callable[[Root, CA], "cas.Conversation"] = _connect
    secret_mark: Callable[[Root, CA, bytes], str] = _secret_mark


class Records:
    """The records of one run about the CAs. `failure`: what went wrong last, None after success."""

    def __init__(self, site: Site, config: Config, line: Line) -> None:
        self.site = site
        self.store = site.store
        self.config = config
        self.line = line
        self.failure: Optional[EnrollError] = None
        self.talks: Dict[str, cas.Conversation] = {}  # the last one with each server

    def begin(self) -> Optional[EnrollError]:
        """Begin an act; returns what went wrong before."""
        earlier, self.failure = self.failure, None
        return earlier

    # -- passwords and keys that were refused ------------------------------------------------------------------------

    def forget_old_secrets(self) -> None:
        """Have what was refused count where it would be sent now.

        Another password or keytab ends a back-off, and one that can't be read does while it can't be sent; the first one again does not.
        """
        known = self.store.budget.refused
        given = {ca.server: self._given(ca) for ca in self.config.cas} if known else {}
        refused: List[j.Backoff] = []
        for secret in dict.fromkeys(one.secret for one in known):
            same = [one for one in known if one.secret == secret]
            servers = [ca for ca, mark in given.items() if mark == secret]
            refused += [replace(max(same, key=lambda one: one.at), ca=ca) for ca in servers or [j.NOWHERE]]
        idle = [one for one in refused if one.ca == j.NOWHERE]
        kept = tuple(one for one in refused if one.ca != j.NOWHERE or one in idle[-KEPT_REFUSED:])
        if kept != known:
            self.store.save_budget(replace(self.store.budget, refused=kept))
        waiting = tuple(one for one in self.store.journal.backoffs if not one.secret or self._joins_still(one))
        if waiting != self.store.journal.backoffs:
            self.store.update(backoffs=waiting)

    def let_in(self, ca: CA) -> None:
        """The CA took the secret, whatever it, or another CA that is given the same, said earlier."""
        taken = {refused.secret for refused in self.store.budget.refused if refused.ca == ca.server}
        refused = tuple(one for one in self.store.budget.refused if one.secret not in taken)
        if refused != self.store.budget.refused:
            self.store.save_budget(replace(self.store.budget, refused=refused))

    def alike(self, server: str) -> Tuple[str, ...]:
        """Return this server, and those that would be given the secret that it has refused."""
        secrets_ = {one.secret for one in self.store.budget.refused if one.ca == server}
        return (server, *(one.ca for one in self.store.budget.refused if one.secret in secrets_ and one.ca != server))

    def check_secret(self, ca: CA) -> None:
        """Raise SigninRefused where this CA has refused the secret that it would be given, and it is not time yet to try it again."""
        self.forget_old_secrets()
        for refused in self.store.budget.refused:
            until = pace.until_of(refused)
            if refused.ca == ca.server and (until is None or refused.at <= self.site.clock() < until):
                raise SigninRefused(f"not tried, since {refused.message}", refused.hint)

    def _given(self, ca: CA) -> Optional[str]:
        """Return the mark of the secret that this CA would be given, None where it can't be read."""
        try:
            return self.line.secret_mark(self.site.root, ca, self._salt())
        except (ConfigError, HostError, SigninRefused):
            return None

    def _sent(self, ca: CA) -> str:
        """Return the mark of the secret that this CA was given: as it was read for that, whatever stands in its file by now."""
        return self.talks[ca.server].mark(self._salt())

    def _joined(self, ca: CA) -> str:
        """Return a mark of the keytab, or of why there is none."""
        try:
            return self.line.secret_mark(self.site.root, ca, self._salt())
        except (ConfigError, HostError, SigninRefused) as problem:
            return hashlib.sha256(self._salt() + problem.message.encode()).hexdigest()

    def _joins_still(self, waiting: j.Backoff) -> bool:
        return any(ca.server == waiting.ca and self._joined(ca) == waiting.secret for ca in self.config.cas)

    def _salt(self) -> bytes:
        if not self.store.budget.salt:
            self.store.save_budget(replace(self.store.budget, salt=secrets.token_hex(16)))
        return self.store.budget.salt.encode()

    # -- what a CA said -----------------------------------------------------------------------------------------------

    def met(self, ca: CA, status: int, message: str, **certificate: Any) -> None:
        """Record what a CA said, and what was seen of its certificate (fields of `Contact`)."""
        self.store.update(contacts=self.contacts(ca, status, message, **certificate))

    def contacts(self, ca: CA, status: int, message: str, **certificate: Any) -> Tuple[j.Contact, ...]:
        """Return what is known of each configured CA, with what this one said now."""
        known = {contact.ca: contact for contact in self.store.journal.contacts}
        known[ca.server] = replace(
            known.get(ca.server, j.Contact(ca.server, 0, 0, "")), at=self.site.clock(), status=status, message=message, **certificate
        )
        return tuple(known[other.server] for other in self.config.cas if other.server in known)

    def fail(
        self, ca: CA, inputs: str, retry: str, problem: EnrollError, *, event: str = "", every: bool = False
    ) -> None:
        """Record why this CA (`every`: any) is not asked for now, and the event of the request machine with it."""
        signin = isinstance(problem, SigninRefused)
        if retry in GUARDED:  # a cure at the CA is no change that can be seen from here
            cure = "; where only the account was mended: scx-enroll check --retry" if signin else "; then: scx-enroll run --renew"
            problem = type(problem)(problem.message, problem.hint + cure)
        server, now = "" if every else ca.server, self.site.clock()
        secret = "" if not signin else self._joined(ca) if retry == "joining" else self._sent(ca) if retry in GUARDED else ""
        entry, refused = self.store.journal, secret and retry in GUARDED
        known = (*entry.backoffs, *self.store.budget.refused)
        same = (b for b in known if (b.ca, b.retry) == (server, retry) and (b.inputs == inputs or b.secret == secret != ""))
        failures = max((b.failures for b in same), default=0) + 1
        backoff = j.Backoff(
            server, inputs, now, failures, retry, problem.exit_status, problem.message, problem.hint, secret
        )
        moved = entry.request
        if event:
            state = j.step(j.REQUEST, moved.state, event)
            again = replace(moved, state=state, next=now + pace.COOL_DOWN_S, why=problem.message)
            moved = j.Request() if state == "none" else again
        if refused:
            given = (other.server for other in self.config.cas if other.server == ca.server or self._given(other) == secret)
            alike = tuple(replace(backoff, ca=server) for server in given)
            others = tuple(one for one in self.store.budget.refused if one.secret != secret)
            self.store.save_budget(replace(self.store.budget, refused=(*others, *alike)))
        configured = {"", *(other.server for other in self.config.cas)}
        kept = tuple(b for b in entry.backoffs if b.ca != server and b.ca in configured)
        met = self.contacts(ca, problem.exit_status, problem.message)
        self.store.update(backoffs=kept if refused else (*kept, backoff), request=moved, contacts=met)
        self.failure = problem

    def missed(self, ca: CA, problem: outcomes.Problem) -> None:
        """Record what went wrong while nothing was asked for: only a refused secret keeps us from asking again."""
        if problem[0] in GUARDED:
            self.fail(ca, "", *problem)
        else:
            self.met(ca, problem[1].exit_status, problem[1].message)
        self.failure = None

    def note_revoked(self, ca: CA, held: Held) -> None:
        """The CA called this certificate revoked: it is not valid any more, whatever its dates say."""
        kept = (*self.store.journal.revoked, held.id)[-KEPT_REVOKED:]
        message = f"the certificate of request ID {held.request_id} was revoked"
        self.store.update(revoked=kept, contacts=self.contacts(ca, CARefused.exit_status, message))

    def doubt(self, why: str, *, answered: bool) -> None:
        """The request may have been stored; `answered`: so surely that it is not sent again."""
        self.store.request("lost", next=self.site.clock() + pace.COOL_DOWN_S, why=why, answered=answered)

    def unrecognised(self, outcome: outcomes.Unknown, ca: CA) -> CAUnreachable:
        """Keep the skeleton of a page, and return what to say of it."""
        path = self.store.save_page(outcome.skeleton, self.site.clock())
        return CAUnreachable(
            f"an answer of {ca.server} was not recognised ({outcome.where}); its skeleton is in {path}",
            "look at that page in a browser; the skeleton holds tags only and may be shown to others",
        )

    # -- what was spent -------------------------------------------------------------------------------------------------

    def spend(self, now: int) -> None:
        """Count a submission before it is made, as one that may issue a certificate."""
        budget = self.store.budget.kept(now)
        self.store.save_budget(replace(budget, submissions=(*budget.submissions, j.Submission(now, counts=True))))

    def unspend(self, since: int) -> None:
        """The submission of that time surely issued nothing; it still is a submission."""
        budget = self.store.budget
        spent = tuple(replace(s, counts=False) if s.at == since else s for s in budget.submissions)
        if spent != budget.submissions:
            self.store.save_budget(replace(budget, submissions=spent))
